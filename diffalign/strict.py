"""What every section of a configuration is built on."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Base of every configuration: unknown keys are errors, docstrings are the fields' descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1] <= 1:
        raise ValueError("should be two rising values in [0, 1]")
    return value


UnitRange = Annotated[tuple[float, float], AfterValidator(_rising)]
"""Two rising values in [0, 1]."""
