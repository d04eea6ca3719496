"""The loop around a trainer: steps, checkpoints, resume, several processes, clean stops."""

from diffalign.engine.session import RunResult, train

__all__ = ["RunResult", "train"]
