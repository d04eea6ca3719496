"""The command `optimize`: names, options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffalign.cli_options import Guidance, Rows, Steps
from diffalign.errors import DiffalignError


def optimize(
    target: Annotated[
        str | None,
        typer.Argument(help="A recipe such as optimize/tiny_lcm, a run, a model folder or a hub id."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes such as method.lr=2.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    prompts: Annotated[str | None, typer.Option(help="scenes:held-out, or a file of prompts.")] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")] = None,
    reward: Annotated[
        str | None, typer.Option(help="What is to be high; diffalign rewards lists them.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="reward|person", help="Who says which pictures are better.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a person's session.")] = False,
    held_out: Annotated[
        list[str] | None, typer.Option(metavar="A,B,C", help="Rewards to measure and not to optimise.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="reno, best_of_n, random_search, zero_order, ...")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Of gradient methods.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="N or Ns", help="Per picture: network evaluations, or seconds: 200, 30s."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="First seed.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: Rows = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")] = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only draw the pictures of a noise.safetensors again.")
    ] = None,
) -> None:
    """Improve pictures without touching weights: optimise or search the noise that they are made of."""
    from diffalign import commands_optimize
    from diffalign.commands import reward_specs

    if replay is not None:
        commands_optimize.replay_command(replay, target, out)
        return
    if target is None:
        raise DiffalignError("nothing to optimise; give a recipe, a model, or --replay FILE")
    if prompt and prompts:
        raise DiffalignError("give either --prompts FILE or --prompt TEXT, not both")
    given: dict[str, Any] = {
        "prompts": list(prompt) if prompt else prompts,
        "num_prompts": num_prompts,
        "reward": reward,
        "labels": labels,
        "held_out": reward_specs(held_out),
        "method.method": method,
        "method.iterations": iterations,
        "seed": seed,
        "generation.steps": steps,
        "generation.guidance": guidance,
        "generation.batch_size": batch_size,
        "generation.resolution": resolution,
        **_budget(budget),
    }
    if out is not None:
        given |= {"output_dir": str(out.parent), "name": out.name}
    commands_optimize.optimize_command(target, overrides or [], given, resume)


def _budget(text: str | None) -> dict[str, float]:
    """`200` is network evaluations per picture, `30s` is seconds."""
    if text is None:
        return {}
    try:
        return (
            {"budget.seconds": float(text[:-1])} if text.endswith("s") else {"budget.evaluations": int(text)}
        )
    except ValueError:
        raise DiffalignError(
            f"--budget is {text!r}; expected network evaluations per picture such as 200, or seconds such as 30s"
        ) from None
