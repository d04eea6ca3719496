"""The commands under `diffalign data`; what they do is imported when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffalign.cli_options import Guidance, Rows, Steps

data = typer.Typer(no_args_is_help=True, help="Look at preference data, and make it.")


Split = Annotated[str, typer.Option(help="Split of the source.")]
Format = Annotated[str, typer.Option(help="A format of data.format; auto: by files and columns.")]
Ranked = Annotated[
    Literal["all", "best_worst", "adjacent"], typer.Option(help="Which pairs a ranking gives.")
]


@data.command("validate")
def data_validate(
    source: Annotated[str, typer.Argument(help="File, folder, hub id, or scenes:preferences.")],
    split: Split = "train",
    held_out: Annotated[str | None, typer.Option(help="Held-out source, to look for shared prompts.")] = None,
    held_out_split: Annotated[str, typer.Option(help="Split of the held-out source.")] = "validation",
    format: Format = "auto",
    pairs: Ranked = "all",
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first so many records.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Count ties, broken or missing pictures, duplicates, contradictions and shared prompts."""
    from diffalign.commands import validate_data

    return validate_data(source, split, held_out, held_out_split, format, pairs, limit, json)


@data.command("relabel")
def data_relabel(
    source: Annotated[str, typer.Argument(help="Pairs: a file, folder, hub id, or scenes:preferences.")],
    rewards: Annotated[
        list[str], typer.Option(metavar="A,B,C", help="Rewards; several are the members of one ensemble.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new pairs and the scores.")],
    mode: Annotated[
        Literal["flip", "drop", "soften", "replace", "posterior"],
        typer.Option(help="What the rewards may do to a label."),
    ] = "soften",
    threshold: Annotated[
        float, typer.Option(help="flip, drop: chance against a label that overrules it.")
    ] = 0.9,
    trust: Annotated[float, typer.Option(help="soften: share of the rewards in the new label.")] = 0.5,
    max_uncertainty: Annotated[
        float | None, typer.Option(help="Rewards less certain than this have no say; drop removes the pair.")
    ] = None,
    decide_ties: Annotated[bool, typer.Option("--decide-ties", help="flip: decide clear ties too.")] = False,
    hard: Annotated[
        bool, typer.Option("--hard", help="replace: the preferred picture wins for certain.")
    ] = False,
    weights: Annotated[
        Literal["given", "uncertainty"], typer.Option(help="uncertainty: times exp(-uncertainty).")
    ] = "given",
    probability: Annotated[
        Literal["members", "normal"],
        typer.Option(help="Chance: mean over members, or a normally distributed margin."),
    ] = "members",
    temperature: Annotated[str, typer.Option(help="Of margins: fit, or a number.")] = "fit",
    label_noise: Annotated[str, typer.Option(help="Share of labels that are wrong: fit, or a rate.")] = "fit",
    split: Split = "train",
    format: Format = "auto",
    pairs: Ranked = "all",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many records.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures scored at once.")] = 16,
    on_error: Annotated[
        Literal["raise", "skip"], typer.Option(help="What to do with what a reward cannot score.")
    ] = "raise",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Score and report; write no pairs.")] = False,
) -> None:
    """Change, drop or soften the labels of pairs by what rewards think of them (AI feedback)."""
    from diffalign import commands_data
    from diffalign.data.pair_rules import LabelRule
    from diffalign.data.relabel import Options

    options = Options(
        LabelRule(mode, threshold, trust, max_uncertainty, decide_ties, hard),
        probability,
        commands_data.parse_fitted(temperature, "--temperature"),
        commands_data.parse_fitted(label_noise, "--label-noise"),
        weights,
    )
    commands_data.relabel_command(
        source,
        rewards,
        out,
        options,
        split=split,
        format=format,
        pairs=pairs,
        limit=limit,
        batch_size=batch_size,
        on_error=on_error,
        dry_run=dry_run,
    )


@data.command("from-samples")
def data_from_samples(
    model: Annotated[str, typer.Argument(help="Run folder, model folder, hub id, or scenes:tiny-sdxl.")],
    prompts: Annotated[str, typer.Option(help="scenes:held-out, a file or folder, a hub id, or a set.")],
    rewards: Annotated[
        list[str], typer.Option(metavar="A,B,C", help="Rewards; the first one ranks the pictures.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for pictures, scores and pairs.")],
    per_prompt: Annotated[int, typer.Option(min=2, help="Pictures per prompt.")] = 4,
    rule: Annotated[
        Literal["best_worst", "best_random", "adjacent", "ranked"],
        typer.Option(help="Which pairs of a prompt's pictures are made."),
    ] = "best_worst",
    min_margin: Annotated[float, typer.Option(min=0, help="Smallest gap of scores that makes a pair.")] = 0.0,
    chosen_ranks: Annotated[
        str | None, typer.Option(help="Ranks that a chosen picture may have, such as 1-2.")
    ] = None,
    rejected_ranks: Annotated[
        str | None, typer.Option(help="Ranks that a rejected picture may have, such as 5-8.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Soft labels sigmoid(gap / temperature) instead of 1.")
    ] = None,
    format: Annotated[Literal["jsonl", "parquet"], typer.Option(help="Of the pairs.")] = "jsonl",
    num: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: Rows = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")] = None,
    on_error: Annotated[
        Literal["raise", "skip"], typer.Option(help="What to do with what a reward cannot score.")
    ] = "raise",
) -> None:
    """Make pictures with a model, score them, and make pairs of each prompt's better and worse ones."""
    from diffalign import commands_data
    from diffalign.data.pair_rules import Selection

    chosen, rejected = (
        commands_data.parse_ranks(text, option)
        for text, option in ((chosen_ranks, "--chosen-ranks"), (rejected_ranks, "--rejected-ranks"))
    )
    commands_data.from_samples_command(
        commands_data.Making(model, prompts, per_prompt, num, seed, steps, guidance, batch_size, resolution),
        rewards,
        out,
        Selection(rule, min_margin, chosen, rejected),
        temperature=temperature,
        format=format,
        on_error=on_error,
    )


@data.command("caption")
def data_caption(
    source: Annotated[str, typer.Argument(help="Pairs: a file, folder, hub id, or scenes:preferences.")],
    captioner: Annotated[
        str,
        typer.Option(metavar="MODULE:NAME", help="Function of a picture and its prompt; @ARGUMENT makes it."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pairs and the captions.")],
    perturb: Annotated[
        Literal["weak", "medium", "strong"] | None,
        typer.Option(help="Exchange words of the rejected picture's caption."),
    ] = None,
    split: Split = "train",
    format: Format = "auto",
    pairs: Ranked = "all",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many records.")] = None,
) -> None:
    """Write a caption for every picture of pairs, so that each is told what it shows (DCPO)."""
    from diffalign import commands_data

    commands_data.caption_command(
        source, captioner, out, perturb, split=split, format=format, pairs=pairs, limit=limit
    )
