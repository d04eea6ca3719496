"""The embedded world: captioned scenes, their exact judge, tiny trained models and preference pairs."""

from pathlib import Path

FOLDER = Path(__file__).parent
