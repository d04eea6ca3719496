"""What the commands do; each function prints for people and leaves the work to the library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffalign.config import EvaluationConfig, ModelConfig, RunConfig, load_recipe, load_run_config
from diffalign.errors import DiffalignError
from diffalign.progress import Reporter

SHOWN_FILES = 20


def recipe_with_overrides(recipe: str, overrides: Sequence[str], name: str | None) -> RunConfig:
    """A recipe with overrides, its run renamed if asked, its trainer's options checked."""
    from diffalign.config import with_trainer_defaults

    named = [*overrides, f"name={name}"] if name else list(overrides)
    return with_trainer_defaults(load_recipe(recipe, named))


def run_demo_command(output: Path, steps: int | None, seed: int) -> None:
    """The main job on the embedded world."""
    from diffalign.demo import run_demo

    if output.is_dir() and any(output.iterdir()) and not (output / "config.yaml").is_file():
        raise DiffalignError(
            f"{output} is not an earlier demo and would be replaced; choose another --output"
        )
    overrides = [f"seed={seed}", *([f"optim.steps={steps}"] if steps else [])]
    with Reporter() as reporter:
        evaluation = run_demo(output, overrides, reporter)
    show_result(output, evaluation)


def list_recipes() -> None:
    """Names and what they are for; then the launcher files."""
    from diffalign.recipes import launcher_names, optimize_names, recipe_names, summary

    table = Table(box=None, show_header=False)
    for name in recipe_names():
        table.add_row(name, summary(name))
    table.add_section()
    table.add_row("", "for diffalign optimize, which trains nothing:")
    for name in optimize_names():
        table.add_row(name, summary(name))
    table.add_section()
    table.add_row("", "for accelerate launch --config_file, after diffalign recipes copy:")
    for name in launcher_names():
        table.add_row(name, summary(name))
    Console().print(table)


def run_training(config: RunConfig, resume: bool) -> int:
    """Train and return the exit code."""
    from diffalign.engine import train
    from diffalign.engine.parallel import end_together

    return end_together(train(config, resume=resume).exit_code)


def show_plan(config: RunConfig) -> int:
    """Resolved configuration, size, memory and cost."""
    from diffalign.plan import plan_run
    from diffalign.yamls import to_yaml

    console = Console()
    console.print(to_yaml(config.model_dump(mode="json")), markup=False, soft_wrap=True)
    console.print(plan_run(config).table())
    return 0


def fill_caches(config: RunConfig) -> None:
    """Encode what is missing, then say what there is."""
    from diffalign.engine.assembly import open_data
    from diffalign.engine.parallel import Parallel

    with Reporter() as reporter:
        caches = open_data(config, Parallel(), reporter)
        for label, pairs in zip(("training", "held-out"), caches, strict=True):
            if pairs is None:
                continue
            reporter.say(
                f"{label}: {len(pairs)} {pairs.unit} in {pairs.folder}, {len(pairs.broken)} images left out"
            )
            for fault in pairs.broken[:20]:
                place = f"record {fault['record']}, image {fault['image']} ({fault['source']})"
                reporter.say(f"  {place}: {fault['reason']}")


def validate_data(
    source: str,
    split: str,
    held_out: str | None,
    held_out_split: str,
    format: str,
    pairs: str,
    limit: int | None,
    as_json: bool,
) -> int:
    """Print the report; exit code 2 when nothing is left to train on."""
    from diffalign.data.sources import open_source
    from diffalign.data.validate import validate

    records = open_source(source, split, format, limit, pairs)
    other = open_source(held_out, held_out_split, format, pairs=pairs) if held_out else None
    with Reporter(Console(stderr=True)) as reporter:
        report = validate(records, other, progress=reporter)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(report.table())
    return 0 if report.usable else 2


def generate_pictures(
    model: str,
    source: str | None,
    texts: Sequence[str],
    out: Path,
    num: int | None,
    seed: int,
    steps: int | None,
    guidance: float | None,
    batch_size: int | None,
    resolution: int | None,
) -> None:
    """Write `NNNN.png` for every prompt and `pictures.jsonl` with prompt and seed of each."""
    from diffalign.evaluation.pictures import Settings, generate_batch, write_picture

    prompts = _prompts(source, texts, num, seed)
    backbone, defaults = open_for_pictures(model, resolution)
    settings = Settings(
        steps or defaults.steps,
        defaults.guidance if guidance is None else guidance,
        batch_size or defaults.batch_size,
    )
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    with Reporter() as reporter:
        for start in range(0, len(prompts), settings.batch_size):
            rows = prompts[start : start + settings.batch_size]
            for offset, image in enumerate(generate_batch(backbone, rows, settings)):
                file = f"{start + offset:04d}.png"
                write_picture(image, out / file)
                row = rows[offset]
                lines.append(
                    json.dumps({"file": file, "prompt": row.text, "seed": row.seed}, ensure_ascii=False)
                )
            reporter("pictures", len(lines), len(prompts))
        (out / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        reporter.say(
            f"{len(lines)} pictures in {out} ({settings.steps} steps, guidance {settings.guidance:g})"
        )


def open_for_pictures(model: str, resolution: int | None) -> tuple[Any, EvaluationConfig]:
    """A run's tuned model or an untuned one, ready to generate, and the settings its pictures are made with.

    Raises:
        DiffalignError: neither a run folder nor a model.
    """
    from accelerate import PartialState
    from safetensors.torch import load_file

    from diffalign.backbones import open_backbone
    from diffalign.engine.checkpoints import run_weights

    device = PartialState().default_device
    if not (Path(model) / "config.yaml").is_file():
        config = ModelConfig(path=model)
        return open_backbone(config, device=device, parts="all", resolution=resolution), EvaluationConfig()
    run = load_run_config(model)
    backbone = open_backbone(
        run.model, device=device, parts="all", resolution=resolution or run.data.resolution, seed=run.seed
    )
    backbone.load_trainable_state(load_file(run_weights(Path(model))))
    return backbone, run.evaluation


def _prompts(source: str | None, texts: Sequence[str], num: int | None, seed: int) -> list[Any]:
    from diffalign.evaluation.prompts import EvalPrompt, read_prompts, with_seeds

    if (source is None) == (not texts):
        raise DiffalignError("give either --prompts FILE (or scenes:held-out), or --prompt TEXT once or more")
    found = read_prompts(source, num) if source else [EvalPrompt(text) for text in texts][:num]
    return with_seeds(found, seed)


def reward_specs(given: Sequence[str] | None) -> list[str] | None:
    """Specifications from options that may each hold several, separated by commas; None when none were given.

    Raises:
        DiffalignError: an empty name, as in `clip,,hpsv2`.
    """
    if not given:
        return None
    specs = [spec.strip() for one in given for spec in one.split(",")]
    if not all(specs):
        raise DiffalignError(f"--rewards {','.join(given)} holds an empty name; expected names such as a,b,c")
    return specs


def evaluate_run_command(run: Path, against: str, rewards: Sequence[str] | None, **options: Any) -> None:
    """Evaluate, print the table and say where the report is."""
    from diffalign.evaluation.evaluate import evaluate_run

    against_model = None if against == "base" else against
    with Reporter() as reporter:
        evaluation = evaluate_run(
            run, against_model, rewards=reward_specs(rewards), progress=reporter, **options
        )
    show_result(run, evaluation)


def show_result(run: Path, evaluation: Any) -> None:
    """Warnings, the table, side effects, the verdict in words, and where the report and the pictures are."""
    from diffalign.evaluation.wording import lost_prompts, side_effect_lines, verdict

    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for warning in evaluation.warnings:
        console.print(f"[bold yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    console.print(comparison_table(evaluation.comparison, evaluation.sets))
    say(verdict(evaluation.comparison))
    for line in (*lost_prompts(evaluation), *side_effect_lines(evaluation)):
        say(line)
    for label, name in (("report", "report.html"), ("pictures", "comparison.png"), ("weights", "final")):
        say(f"{label}: {run / name}")


def comparison_table(comparison: Any, sets: Mapping[str, Any] | None = None) -> Table:
    """Base against tuned, per metric and per category of the main metric; at the end the rewards of whole sets."""
    from diffalign.evaluation.wording import amount, change, interval

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # eighty columns hold no lines between
    for heading in ("metric", "base", "tuned", "change", "95 % interval", "wins %", "n"):
        first = heading == "metric"
        table.add_column(heading, justify="left" if first else "right", no_wrap=not first, overflow="fold")

    def row(label: str, metric: Any) -> None:
        values = (
            amount(metric, metric.base),
            amount(metric, metric.tuned),
            change(metric, metric.difference).removesuffix(" points"),
            interval(metric, metric.interval).removesuffix(" points"),
        )
        table.add_row(label, *values, f"{100 * metric.wins.rate:.1f}", str(metric.n))

    for name, metric in comparison.metrics.items():
        row(name, metric)
    main = comparison.main.name
    for category, metrics in comparison.categories.items():
        row(f"  {category}", metrics[main])
    for name, one in (sets or {}).items():
        low, high = one.interval
        values = f"{one.base:.4g}", f"{one.tuned:.4g}", f"{one.difference:+.3g}", f"{low:+.3g} to {high:+.3g}"
        table.add_row(f"{name} (set)", *values, "", str(one.n))
    return table


def score_files_command(
    files: Sequence[Path],
    rewards: Sequence[str],
    prompt: str | None,
    prompts: Path | None,
    out: Path | None,
    on_error: Literal["raise", "skip"],
    batch_size: int,
) -> None:
    """Score files, print the table, write the scores if asked, and list what was left out."""
    import torch

    from diffalign.evaluation.files import score_files, write_scores
    from diffalign.rewards import distinct, load_reward, place

    if out is not None and out.suffix.lower() not in (".csv", ".jsonl"):
        raise DiffalignError(f"cannot write scores to {out}; expected a name that ends in .csv or .jsonl")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorers = distinct([place(load_reward(spec), device) for spec in reward_specs(rewards) or []])
    with Reporter() as reporter:
        scores = score_files(
            files, scorers, prompt=prompt, prompts=prompts, batch_size=batch_size, on_error=on_error,
            progress=reporter,
        )  # fmt: skip
    console = Console()
    if len(scores.files) <= SHOWN_FILES:
        console.print(_file_table(scores))
    console.print(_summary_table(scores))
    for path, reason in list(scores.faults.items())[:SHOWN_FILES]:
        console.print(f"left out: {path} {reason}", markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_scores(scores, out)
        console.print(f"scores: {out}", markup=False, highlight=False, soft_wrap=True)


def _summary_table(scores: Any) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("reward", "mean", "std", "min", "max", "n", "skipped"):
        table.add_column(heading, justify="left" if heading == "reward" else "right", no_wrap=True)
    for name, facts in scores.summary().items():
        numbers = [f"{facts[key]:.4g}" for key in ("mean", "std", "min", "max")]
        table.add_row(name, *numbers, f"{facts['n']:.0f}", f"{facts['skipped']:.0f}")
    return table


def _file_table(scores: Any) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("file", no_wrap=True)
    for name in scores.scores:
        # Names of many rewards take two lines rather than the place of the file's name.
        table.add_column(name, justify="right", overflow="fold")
    for i, path in enumerate(scores.files):
        values = [column[i] for column in scores.scores.values()]
        table.add_row(escape(path.name), *("" if v != v else f"{v:.4g}" for v in values))
    return table


def list_rewards(as_json: bool) -> None:
    """The catalogue of rewards: scale, backbone and licence of each."""
    from diffalign.evaluation.catalogue import catalogue

    entries = catalogue()
    if as_json:
        print(json.dumps([entry.as_json() for entry in entries], indent=2))
        return
    console = Console()
    for entry in entries:
        what = entry.problem or entry.summary
        console.print(f"[bold]{escape(entry.name)}[/]  {escape(what)}", highlight=False, soft_wrap=True)
        facts = entry.facts
        known = {"scale": facts.scale, "backbone": facts.backbone, "licence": facts.licence}
        known |= {"kind": entry.kind if entry.kind in ("set", "wrapper") else ""}
        for label, text in known.items():
            if text:
                console.print(f"    {label}: {text}", markup=False, highlight=False, soft_wrap=True)


def export_run_command(run: Path, format: Any, out: Path | None) -> None:
    """Export and list the files."""
    from diffalign.export import export_run

    for path in export_run(run, format, out or run / "export" / format):
        print(path)


def run_doctor(recipe: str | None, overrides: Sequence[str]) -> int:
    """Facts about the machine, and whether a recipe fits; exit code 2 when it does not."""
    from diffalign.doctor import fits, machine_table

    console = Console()
    console.print(machine_table())
    if recipe is None:
        return 0
    from diffalign.plan import plan_run

    plan = plan_run(recipe_with_overrides(recipe, overrides, None))
    console.print(plan.table())
    answer, message = fits(plan)
    console.print(message, markup=False, highlight=False)
    return 0 if answer else 2
