"""Pure tensor functions: errors, margins and losses. No models, no input or output."""
