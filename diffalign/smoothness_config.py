"""Options of the regulariser of Smooth Diffusion; no tensor library is imported here."""

from __future__ import annotations

from pydantic import Field

from diffalign.strict import StrictModel


class SmoothnessConfig(StrictModel):
    """A smooth latent space: equal changes of the noise change pictures equally (arXiv 2312.04410)."""

    weight: float = Field(default=1.0, gt=0)
    """Factor of the penalty beside the method's loss, whose scale decides what is much (docs/methods/smoothness.md)."""
    decay: float = Field(default=0.01, gt=0, le=1)
    """Share of a step's mean variation that the running mean takes in after many steps; the release's is 0.01."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the records that are penalised in a step, drawn at random and weighted up: each costs a forward pass
    and a backward pass that is differentiated, several times a record's training."""
