"""The bundled pairs with a share of their labels reversed, and what `diffalign data relabel` makes of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from diffalign.data.pairs import label_noise
from diffalign.data.sources import open_source
from diffalign.data.writers import PairRow, write_parquet

SOURCE = "scenes:preferences"
REWARD = "scenes-ensemble"


def wrong_share(flipped: float) -> float:
    """Share of wrong labels after flipping: a tenth of the bundled ones is wrong to begin with."""
    return round(0.1 + 0.8 * flipped, 3)


def relabelled_name(share: float) -> str:
    """Name of the folder with relabelled pairs."""
    return f"relabelled-{round(100 * share)}"


def write_relabelled(folder: Path, share: float, seed: int = 0) -> Path:
    """Reverse the labels that `data.flipped` would, let the ensemble flip back those it is sure of.

    The command is told the share of wrong labels, as the losses are that allow for them.

    Returns the folder of the new pairs; one that is there is kept.

    Raises:
        CalledProcessError: the command failed.
    """
    out = folder / relabelled_name(share)
    if not out.is_dir():
        noisy = write_flipped(folder / f"flipped-{round(100 * share)}", share, seed)
        command = [sys.executable, "-m", "diffalign", "data", "relabel", str(noisy)]
        known = ["--label-noise", str(wrong_share(share))]
        options = ["--rewards", REWARD, "--mode", "flip", *known, "--out", str(out)]
        subprocess.run([*command, *options], check=True)
    return out


def write_flipped(folder: Path, share: float, seed: int) -> Path:
    """The bundled training pairs with the labels of `data.flipped` reversed, as parquet; returns the folder."""
    records = open_source(SOURCE, "train")
    reverse = label_noise(len(records), share, seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = (
        PairRow(replace(record, label_0=1 - record.label_0) if flip else record)
        for record, flip in zip(records, reverse, strict=True)
    )
    write_parquet(folder, "train", rows)
    return folder
