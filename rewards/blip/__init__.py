"""The BLIP networks of ImageReward: a vision transformer and a text encoder that attends to it."""

from diffalign.rewards.blip.text import TextEncoder
from diffalign.rewards.blip.vision import VisionTransformer

__all__ = ["TextEncoder", "VisionTransformer"]
