"""The command line: names, options and help. What commands do is in `commands.py`, imported when one runs."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffalign.cli_data import data
from diffalign.cli_optimize import optimize
from diffalign.cli_options import Guidance, Rows, Steps
from diffalign.errors import DiffalignError

app = typer.Typer(
    name="diffalign",
    help="Fine-tune image generators on preferences, and measure whether anything got better.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipes = typer.Typer(no_args_is_help=True, help="The shipped recipes.")
app.add_typer(recipes, name="recipes")
app.add_typer(data, name="data")
app.command()(optimize)

Recipe = Annotated[str, typer.Argument(help="A shipped recipe such as scenes/dpo, or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes such as optim.lr=1e-4.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, such as runs/demo.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; works anywhere in the line.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Fine-tune image generators on preferences, and measure whether anything got better."""
    if version:
        from diffalign import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps instead of the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
) -> None:
    """Tune, evaluate and report on the embedded world; needs no download and no GPU."""
    from diffalign.commands import run_demo_command

    run_demo_command(output, steps, seed)


@recipes.command("list")
def recipes_list() -> None:
    """List the shipped recipes."""
    from diffalign.commands import list_recipes

    list_recipes()


@recipes.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a recipe.")]) -> None:
    """Print a recipe with its comments."""
    from diffalign.recipes import shipped_text

    typer.echo(shipped_text(name), nl=False)


@recipes.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    target: Annotated[Path, typer.Argument(help="File or folder to write.")] = Path("."),
) -> None:
    """Copy a recipe for editing."""
    from diffalign.recipes import copy_recipe

    typer.echo(str(copy_recipe(name, target)))


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved configuration, memory and cost; train nothing."),
    ] = False,
) -> int:
    """Train a recipe. Several processes: accelerate launch -m diffalign train ..."""
    from diffalign import commands

    config = commands.recipe_with_overrides(recipe, overrides or [], name)
    return commands.show_plan(config) if dry_run else commands.run_training(config, resume)


@app.command()
def cache(recipe: Recipe, overrides: Overrides = None) -> None:
    """Encode the pictures and prompts of a recipe; an interrupted run continues where it stopped."""
    from diffalign import commands

    commands.fill_caches(commands.recipe_with_overrides(recipe, overrides or [], None))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder, hub id, or scenes:tiny-sdxl.")],
    prompts: Annotated[str | None, typer.Option(help="scenes:held-out, or a file of prompts.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    num: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: Rows = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")] = None,
) -> None:
    """Make pictures with a model or a run."""
    from diffalign.commands import generate_pictures

    generate_pictures(model, prompts, prompt or [], out, num, seed, steps, guidance, batch_size, resolution)


@app.command()
def evaluate(
    run: RunFolder,
    against: Annotated[str, typer.Option(help="base (the untuned model), a model, or another run.")] = "base",
    prompts: Annotated[
        str | None, typer.Option(help="scenes:held-out, a file or folder, a hub id, or a set such as parti.")
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")] = None,
    rewards: Annotated[
        list[str] | None, typer.Option(metavar="A,B,C", help="Rewards, the main one first.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="Folder of the weights inside the run.")] = "final",
    seed: Annotated[int | None, typer.Option(min=0, help="First seed.")] = None,
    seeds_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures per prompt and model.")] = 1,
    encoder: Annotated[
        str, typer.Option(help="Measures diversity: pixels:8, scenes-clip, clip:..., dino:...")
    ] = "pixels:8",
    drift_pictures: Annotated[
        int, typer.Option(min=0, help="Base pictures behind the drift; 0 leaves it out.")
    ] = 64,
    istd_paths: Annotated[
        int, typer.Option(min=0, help="Paths between noises behind ISTD, 11 pictures each; 0 leaves it out.")
    ] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: Rows = None,
) -> None:
    """Compare a run with its base on the same prompts and seeds; writes report.html and evaluation.json."""
    from diffalign.commands import evaluate_run_command

    evaluate_run_command(
        run,
        against,
        rewards,
        prompts=prompts,
        num=num,
        checkpoint=checkpoint,
        seed=seed,
        seeds_per_prompt=seeds_per_prompt,
        encoder=encoder,
        drift_pictures=drift_pictures,
        istd_paths=istd_paths,
        steps=steps,
        guidance=guidance,
        batch_size=batch_size,
    )


@app.command()
def score(
    files: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    rewards: Annotated[
        list[str], typer.Option(metavar="A,B,C", help="Rewards; diffalign rewards lists them.")
    ],
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL with file and prompt, or one line per picture.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a score per file: .csv or .jsonl.")] = None,
    on_error: Annotated[
        Literal["raise", "skip"], typer.Option(help="What to do with what cannot be read or scored.")
    ] = "raise",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures scored at once.")] = 8,
) -> None:
    """Score picture files; prompts come from pictures.jsonl or .txt files beside them, if not given."""
    from diffalign.commands import score_files_command

    score_files_command(files, rewards, prompt, prompts, out, on_error, batch_size)


@app.command("rewards")
def rewards_list(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the rewards with scale, backbone and licence; loads no weights."""
    from diffalign.commands import list_rewards

    list_rewards(json)


@app.command()
def export(
    run: RunFolder,
    format: Annotated[
        Literal["diffusers", "kohya", "peft", "merged"],
        typer.Option(help="kohya is for ComfyUI and A1111; merged is a whole pipeline."),
    ] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="Folder to write; RUN/export/FORMAT if not given.")] = None,
) -> None:
    """Write a finished run in the format of another tool, with a model card."""
    from diffalign.commands import export_run_command

    export_run_command(run, format, out)


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe: does it fit on this machine?")] = None,
    overrides: Overrides = None,
) -> int:
    """Show what is installed, what the machine can do, and whether a recipe fits."""
    from diffalign.commands import run_doctor

    return run_doctor(recipe, overrides or [])


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 2 for bad input, 130 or 143 when stopped."""
    debug = "--debug" in arguments
    try:
        result = app([a for a in arguments if a != "--debug"], standalone_mode=False, prog_name="diffalign")
        return result if isinstance(result, int) else 0
    except DiffalignError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC and not debug:
            print("error: the disk is full; free some space and run the command again", file=sys.stderr)
            return 2
        # Usage errors of the option parser know how to show themselves.
        if not hasattr(error, "show"):
            raise
        error.show()
        return int(getattr(error, "exit_code", 2))


def main() -> None:
    """Entry point of the `diffalign` script."""
    sys.exit(run(sys.argv[1:]))
