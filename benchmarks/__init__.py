"""Timings: how fast our steps are, as ratios against plain reference-style steps run in the same process."""
