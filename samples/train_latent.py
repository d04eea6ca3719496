"""The shipped reward of noisy latents: a run of the recipe `scenes/latent_reward`, its weights rounded to fp16.

Stage `latent` of `python -m diffalign.samples.build`; it needs `tiny-sdxl` and the preference pairs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from diffalign.config import load_recipe
from diffalign.engine import train
from diffalign.rewards.run_folders import DESCRIPTIONS, WEIGHTS, reward_folder

NAME = "scenes-latent"
GENERATOR = "scenes:tiny-sdxl"


def train_latent(out: Path, seed: int) -> None:
    """Train on the pairs of `out` and write `scorers/latent`."""
    pairs = out / "preferences"
    with tempfile.TemporaryDirectory() as folder:
        places = [f"output_dir={folder}", f"data.cache_dir={folder}/cache", f"model.path={out / 'tiny-sdxl'}"]
        data = [f"data.source={pairs}", f"data.held_out={pairs}"]
        train(load_recipe("scenes/latent_reward", [*places, *data, f"seed={seed}"]))
        ship(Path(folder) / "scenes-latent-reward", out / "scorers" / "latent")


def ship(run: Path, folder: Path) -> None:
    """Copy what a finished run found into a folder of the package."""
    final = reward_folder(run, "latent")
    facts = json.loads((final / DESCRIPTIONS["latent"]).read_text(encoding="utf-8"))
    facts = {**facts, "name": NAME, "model": {"path": GENERATOR}}
    del facts["versions"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in load_file(final / WEIGHTS).items()}, folder / WEIGHTS)
    (folder / DESCRIPTIONS["latent"]).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
