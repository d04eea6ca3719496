"""What a run will take, before it starts: parameters, memory, compute and disk, without loading any weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffalign.config import RunConfig, trainer_class, trainer_config
from diffalign.plan_latent import latent_size
from diffalign.plan_network import NetworkSize, network_size
from diffalign.plan_online import Drawing

if TYPE_CHECKING:
    from rich.table import Table

GB = 1e9
# Bytes of optimiser state per trained weight; Adafactor keeps a row and a column per matrix.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.0, "adafactor": 0.05}
# Four bits per weight of a linear layer, and 0.13 for its scales (QLoRA, section 3).
NF4_BYTES = 4.13 / 8


@dataclass(frozen=True)
class Amount:
    """How much there is to train on.

    Fields:
        count: number of pairs, pictures or groups; None: unknown. unit: which of them. pictures: in one of them.
    """

    count: int | None
    unit: str = "pairs"
    pictures: int = 2


@dataclass(frozen=True)
class Plan:
    """Resources of a run; None where the model or the data is not on this machine yet.

    `drawing` is what an online method samples; its optimiser steps learn from as many rows as that gives.
    """

    config: RunConfig
    dtype: torch.dtype
    frozen_copy: bool
    network: NetworkSize | None
    data: Amount
    world: int = 1
    drawing: Drawing | None = None

    @property
    def pairs_per_step(self) -> int:
        """Pairs (pictures, groups) of an optimiser step over all processes."""
        optim = self.config.optim
        return optim.batch_size * optim.accumulation * self.world

    @property
    def epochs(self) -> float | None:
        """Passes over the data."""
        count = self.data.count
        return count and self.config.optim.steps * self.pairs_per_step / count

    def memory(self) -> dict[str, float]:
        """Bytes per process by use, without the libraries' own (about 1 GB on a GPU); empty when unknown."""
        size, config = self.network, self.config
        if size is None:
            return {}
        full = config.model.tune == "full"
        width = self.dtype.itemsize
        uses = {
            "network": size.total * 4.0 if full else self._frozen_bytes(size) + size.trained * 4.0,
            "frozen copy": size.total * width if self.frozen_copy else 0.0,
            "gradients": size.trained * 4.0,
            "optimiser": size.trained * OPTIMIZER_BYTES[config.optim.optimizer],
            "averaged weights": size.trained * 4.0 if config.optim.ema else 0.0,
            # Autocast keeps a low-precision copy of float32 weights during a forward.
            "cast weights": size.total * width if full and width < 4 else 0.0,
            "activations": float(size.activations * config.optim.batch_size * self.data.pictures / 2),
        }
        return {name: value for name, value in uses.items() if value}

    def _frozen_bytes(self, size: NetworkSize) -> float:
        plain = size.total - size.trained - size.quantized
        return plain * self.dtype.itemsize + size.quantized * NF4_BYTES

    def flops(self) -> float | None:
        """Floating-point operations of the whole run over all processes; of an online run those of drawing."""
        if self.network is None:
            return None
        options = self.config.trainer
        # Backward costs one forward for the inputs' gradients, and one more for the weights'.
        passes = 1 + (0 if self.network.frozen else 1 if self.config.model.tune == "lora" else 2)
        asks = "reference" in trainer_class(self.config).Config.model_fields
        passes += asks and options.get("reference") != "cached"
        passes += self.config.model.gradient_checkpointing
        if self.drawing is not None:
            return self.drawing.flops(self.network.forward_flops / 2)
        pairs = self.config.optim.steps * self.pairs_per_step
        return float(self.network.forward_flops) * passes * pairs * self.data.pictures / 2

    def disk(self) -> float | None:
        """Bytes of the checkpoints that are kept, and of the one being written."""
        if self.network is None:
            return None
        kept = self.config.checkpoint.keep_last + 1 + self.config.checkpoint.keep_best
        each = 4 + OPTIMIZER_BYTES[self.config.optim.optimizer] + (4 if self.config.optim.ema else 0)
        return self.network.trained * each * kept

    def table(self) -> Table:
        """The plan for people."""
        from rich.table import Table

        table = Table(title=f"plan of {self.config.name}", show_header=False)
        for name, value in self._lines():
            table.add_row(name, value)
        return table

    def _lines(self) -> Iterator[tuple[str, str]]:
        unknown, size = "unknown until downloaded", self.network
        yield "trained weights", f"{size.trained:,} of {size.total:,}" if size else unknown
        yield "precision", str(self.dtype).removeprefix("torch.")
        yield from self._steps(unknown)
        uses = self.memory()
        yield "memory (estimate)", f"{sum(uses.values()) / GB:.2f} GB per process" if uses else unknown
        for name, value in uses.items():
            yield f"  {name}", f"{value / GB:.2f} GB"
        if self.config.smoothness is not None:
            share = self.config.smoothness.share
            yield (
                "smoothness",
                f"a gradient of a gradient for {share:.0%} of the records, not in these numbers",
            )
        flops, disk = self.flops(), self.disk()
        yield (
            "compute" if self.drawing is None else "compute of drawing",
            f"{flops:.2e} FLOP ({flops / 1e14 / 3600:.2f} h at 100 TFLOP/s)" if flops else unknown,
        )
        yield "checkpoints", f"up to {disk / GB:.2f} GB of disk" if disk else unknown

    def _steps(self, unknown: str) -> Iterator[tuple[str, str]]:
        optim = self.config.optim
        if self.drawing is not None:
            yield "steps", f"{optim.steps:,}, {optim.batch_size} rows at once"
            yield from self.drawing.lines()
            return
        yield (
            f"{self.data.unit} per step",
            f"{self.pairs_per_step} ({optim.batch_size} x {optim.accumulation} micro-steps "
            f"x {self.world} processes)",
        )
        yield "steps", f"{optim.steps:,}: {optim.steps * self.pairs_per_step:,} {self.data.unit}"
        yield (
            "epochs",
            f"{self.epochs:.2f} of {self.data.count:,} {self.data.unit}" if self.epochs else unknown,
        )


def plan_run(config: RunConfig) -> Plan:
    """Size a run up for this machine.

    Raises:
        DiffalignError: bad trainer options, or a model or data path that does not exist.
    """
    import os

    from diffalign.backbones.loading import choose_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_precision(config.model.precision, device)
    kind, options = trainer_class(config), trainer_config(config)
    data = _amount(config)
    if "judgements" in kind.data_kinds:
        from diffalign.plan_scorer import scorer_size

        frozen, size = False, scorer_size(config)
    else:
        frozen = kind.needs_frozen_copy(options, config.model.tune)
        size = network_size(config, dtype) if config.model.tune != "head" else latent_size(config, dtype)
    told = size is not None and size.told_guidance
    drawing = Drawing.of(options, config.optim.steps, told) if "prompts" in kind.data_kinds else None
    return Plan(config, dtype, frozen, size, data, int(os.environ.get("WORLD_SIZE", "1")), drawing)


def _amount(config: RunConfig) -> Amount:
    """What there is to train on in local data; the number is unknown for data on the hub.

    Raises:
        DiffalignError: the method does not learn from such data.
    """
    from diffalign.data.pairs import choose_pairs
    from diffalign.data.picture_labels import make_groups
    from diffalign.data.sources import open_records
    from diffalign.engine.fit import DRAWN, check_fit

    source, data = config.data.source, config.data
    if not source.startswith("scenes:") and source.count("/") == 1 and not Path(source).expanduser().exists():
        return Amount(None)
    fit = check_fit(config)
    if fit.kind == "prompts":
        return Amount(None, "rows", 1)
    if fit.kind == "noises":
        from diffalign.engine.online_assembly import prompt_set

        return Amount(len(prompt_set(config)), "prompts", 1)
    if fit.kind in DRAWN:
        return Amount(None)
    if fit.kind == "pictures":
        return Amount(len(fit.pictures(config)), "pictures", 1)
    if fit.kind == "groups":
        groups = make_groups(fit.pictures(config), trainer_config(config).group_size, source)
        return Amount(len(groups), "groups", groups.size)
    return Amount(len(choose_pairs(open_records(data), data.labels, data.ties, config.seed, data.flipped)))
