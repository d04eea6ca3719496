"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Classifier-free guidance scale.")]
Rows = Annotated[int | None, typer.Option("--batch-size", min=1, help="Pictures made at once.")]
