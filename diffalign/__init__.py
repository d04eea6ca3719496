"""Fine-tune image and audio generators on preferences and rewards, and measure whether anything got better."""

__version__ = "0.1.0"
