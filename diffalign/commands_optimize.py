"""What `diffalign optimize` does: from a recipe or a model to a folder of pictures, noises and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.inference.config import OptimizeConfig, load_optimize_recipe, optimize_config
from diffalign.progress import Reporter
from diffalign.recipes import optimize_names


def optimize_command(
    target: str, overrides: Sequence[str], options: dict[str, Any], resume: bool = False
) -> None:
    """Optimise, write the folder and print what came of it.

    Args:
        target: a recipe (shipped or file), a run folder, a model folder, a hub id or `scenes:NAME`.
        options: dotted keys of the configuration with values from the command line; None is not given.
        resume: whether to go on with a person's session.

    Raises:
        DiffalignError: bad input; or some prompts failed, after all the others are written.
        KeyboardInterrupt: interrupted, after the best so far is written.
    """
    from diffalign.evaluation.pictures import silent
    from diffalign.inference.budget import Budget
    from diffalign.inference.person import Person
    from diffalign.inference.record import write_record
    from diffalign.inference.run import optimize
    from diffalign.yamls import to_yaml

    config = configured(target, overrides, options)
    prompts = _prompts(config)
    folder = Path(config.output_dir) / config.name
    reward, held_out = _judges(config, folder, resume)
    with Reporter() as reporter, _opened(config.model, config.generation.resolution) as backbone:
        found = optimize(
            backbone,
            prompts,
            reward,
            method=config.method,
            seed=config.seed,
            generation=config.generation,
            budget=Budget(**config.budget.model_dump()),
            caution=config.caution,
            held_out=held_out,
            baseline=config.baseline,
            shown=config.shown,
            # A bar would be drawn over what a person types.
            progress=silent if isinstance(reward, Person) else reporter,
        )
        write_record(found, backbone, folder)
    (folder / "config.yaml").write_text(to_yaml(config.model_dump(mode="json")), encoding="utf-8")
    _show(found, folder)
    if found.stopped == "interrupted":
        raise KeyboardInterrupt
    if isinstance(reward, Person) and reward.quit:
        print(found.stopped)
        return
    if found.problem:
        raise DiffalignError(f"{found.problem} What was found is in {folder}.")


def replay_command(file: Path, model: str | None, out: Path | None) -> None:
    """Draw the pictures of a file of noises again.

    Args:
        model: another model than the file's; None: the file's. out: folder; None: `replay` beside the file.
    """
    from diffalign.evaluation.pictures import write_picture
    from diffalign.inference.noise_file import check_replayable, read_noises
    from diffalign.inference.replay import replay

    content = read_noises(file)
    check_replayable(content)
    config = ModelConfig(**content.model) if model is None else ModelConfig(path=model)
    folder = out or file.parent / "replay"
    folder.mkdir(parents=True, exist_ok=True)
    with Reporter() as reporter, _opened(config, content.settings.get("resolution")) as backbone:
        for row, picture in enumerate(replay(backbone, content)):
            write_picture(picture, folder / f"{row:04d}.png")
        reporter.say(f"{len(content.prompts)} pictures in {folder}")


def configured(target: str, overrides: Sequence[str], options: dict[str, Any]) -> OptimizeConfig:
    """The configuration of a recipe or model with overrides; options of the command line go last."""
    given = [f"{key}={_as_yaml(value)}" for key, value in options.items() if value is not None]
    # Which method it is decides on the meaning of its options, so it goes first.
    given.sort(key=lambda override: not override.startswith("method.method="))
    if Path(target).is_file() or target.removesuffix(".yaml") in optimize_names():
        return load_optimize_recipe(target, [*given, *overrides])
    name = Path(target.replace(":", "-")).name or "model"
    values = {"name": name, "model": {"path": target}, "method": {"method": "reno"}}
    return optimize_config(values, [*given, *overrides], "the command line")


def _as_yaml(value: Any) -> str:
    """A value on one line of YAML."""
    import json

    return json.dumps(value, ensure_ascii=False)


def _judges(config: OptimizeConfig, folder: Path, resume: bool) -> tuple[Any, list[Any]]:
    """What is optimised, a reward or a person, and what is only measured."""
    from diffalign.inference.person import Person

    if config.labels == "person":
        measured = [] if config.reward is None else [config.reward]
        return Person(folder / "person", resume=resume), [*measured, *config.held_out]
    if resume:
        raise DiffalignError("--resume goes on with a person's session; give it with --labels person")
    if config.reward is None:
        raise DiffalignError("no reward to optimise; give --reward NAME (diffalign rewards lists them)")
    return config.reward, config.held_out


def _prompts(config: OptimizeConfig) -> list[Any]:
    from diffalign.evaluation.prompts import EvalPrompt, read_prompts, with_seeds

    if config.prompts is None:
        raise DiffalignError(
            "no prompts; give --prompt TEXT once or more, or --prompts FILE (or scenes:held-out)"
        )
    if isinstance(config.prompts, str):
        return with_seeds(read_prompts(config.prompts, config.num_prompts), config.seed)
    return with_seeds([EvalPrompt(text) for text in config.prompts][: config.num_prompts], config.seed)


@contextmanager
def _opened(model: ModelConfig, resolution: int | None) -> Iterator[Any]:
    """The tuned model of a run, or a model as it is: without adapters, which would only cost time."""
    from accelerate import PartialState

    from diffalign.backbones import open_backbone
    from diffalign.commands import open_for_pictures

    if (Path(model.path) / "config.yaml").is_file():
        yield open_for_pictures(model.path, resolution)[0]
        return
    device = PartialState().default_device
    backbone = open_backbone(
        model.model_copy(update={"tune": "lora"}), device=device, parts="all", resolution=resolution
    )
    with backbone.reference():
        yield backbone


def _show(found: Any, folder: Path) -> None:
    """The table of rewards, what it cost, and where things are."""
    from diffalign.inference.report import summary

    console, stages = Console(), list(found.rewards)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    rows = summary(found)
    table.add_column("reward", overflow="fold", no_wrap=max(map(len, rows), default=0) <= 20)
    for heading in stages:
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("95 % interval", justify="right", no_wrap=True)
    for name, row in rows.items():
        interval = row.get("interval")
        cells = [f"{row[stage]:.4g}" if stage in row else "" for stage in stages]
        table.add_row(name, *cells, f"{interval[0]:+.3g} to {interval[1]:+.3g}" if interval else "")
    console.print(table)
    lines = [
        f"{found.evaluations} network evaluations and {found.backwards} backward ones per picture; "
        f"{found.seconds:.1f} s",
        f"report: {folder / 'report.md'}",
        f"pictures: {folder / 'comparison.png'}",
        f"noises: {folder / 'noise.safetensors'}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
