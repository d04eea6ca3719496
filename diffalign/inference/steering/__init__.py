"""Methods that act between the steps of a sampling run: one file per method, and `walk.py` that they share."""
