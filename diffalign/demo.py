"""`diffalign demo`: the main job on the embedded world, from preference pairs to a measured result."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from diffalign.config import load_recipe
from diffalign.engine import train
from diffalign.evaluation.evaluate import evaluate_run
from diffalign.evaluation.result import Evaluation
from diffalign.progress import Reporter

RECIPE = "scenes/dpo"


def run_demo(output: Path, overrides: list[str], reporter: Reporter) -> Evaluation:
    """Tune the embedded model on its pairs, compare it with its base on held-out prompts, write the report.

    An earlier demo in the same folder is replaced; encoded pictures and the base's pictures are used again.

    Args:
        output: the run folder, such as `runs/demo`. overrides: `key.path=value` on top of the recipe.

    Raises:
        DiffalignError: a bad override, a full disk.
    """
    demo = [f"output_dir={output.parent}", f"name={output.name}", "evaluation.every=100"]
    config = load_recipe(RECIPE, [*demo, *overrides])
    shutil.rmtree(config.folder, ignore_errors=True)
    started = time.monotonic()
    reporter.say(f"tuning {config.model.path} on {config.data.source} for {config.optim.steps} steps")
    result = train(config, reporter=reporter)
    if result.signal is not None:
        raise KeyboardInterrupt
    tuned = time.monotonic()
    evaluation = evaluate_run(config.folder, progress=reporter)
    minutes = [(tuned - started) / 60, (time.monotonic() - tuned) / 60]
    reporter.say(f"tuning {minutes[0]:.1f} min, evaluation {minutes[1]:.1f} min")
    return evaluation
