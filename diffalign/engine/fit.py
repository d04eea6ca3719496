"""Whether method, options, data and model go together: checked in one place, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.config import RunConfig, trainer_class, trainer_config
from diffalign.data.picture_labels import Pictures, make_groups, pictures_of, pictures_of_pairs
from diffalign.data.picture_sources import find_pictures, open_pictures, source_kinds
from diffalign.data.pictures import PictureRecords
from diffalign.data.records import Records
from diffalign.data.sources import open_records
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.process import Process

WORDS = {
    "pairs": "pairs",
    "pictures": "single pictures",
    "groups": "ranked or scored groups of pictures",
    "judgements": "judged pairs (a reward model)",
    "rollouts": "denoising steps that it draws itself",
    "prompts": "prompts, for which it draws its own samples while it trains",
    "noises": "noises of prompts, through whose pictures it differentiates",
}
# Kinds that are not made of data.source.
DRAWN = ("rollouts", "prompts", "noises")
# Kinds made of stored pictures that a generator is tuned on.
STORED = ("pairs", "pictures", "groups")
# Options of pairs that mean nothing for files of single pictures.
PAIRS_ONLY = ("pairs", "votes", "ties", "rejected_caption", "degraded")


@dataclass(frozen=True)
class Fit:
    """What a run learns from.

    Fields:
        kind: pairs, pictures, groups, judgements, rollouts, prompts or noises. records: the records of the source,
            images not read yet; None where nothing needs them here.
    """

    kind: str
    records: Records | PictureRecords | None = None

    def pictures(self, config: RunConfig) -> Pictures:
        """The single pictures that the method learns from, pairs taken apart, with the controls of the recipe."""
        data = config.data
        if isinstance(self.records, PictureRecords):
            found = pictures_of(self.records, data.labels, config.seed, data.flipped)
        else:
            assert self.records is not None, "only judgements come without records"
            found = pictures_of_pairs(self.records, data.labels, data.ties, config.seed, data.flipped)
        chosen: Pictures = trainer_class(config).choose(trainer_config(config), found)
        return chosen


def check_fit(config: RunConfig) -> Fit:
    """Read what is known of the data, and refuse what cannot work; no image is read and no model is opened.

    Raises:
        DiffalignError: the method does not learn from such data, or the data lacks what it needs (the message lists the
            methods that fit); an option that means nothing here; bad data.
    """
    check_options(config)
    check_adapters(config)
    check_smoothness(config)
    if drawn := [kind for kind in kinds_of(trainer_class(config)) if kind in DRAWN]:
        return Fit(drawn[0])
    kind = chosen_kind(config)
    _check_kind_options(config, kind)
    needs = _needs(trainer_class(config), kind)
    if kind == "judgements" and not needs:
        return Fit(kind)
    fit = Fit(kind, _opened(config, kind))
    known = facts(fit.records)
    if needs and not known & set(needs):
        raise DiffalignError(
            f"{_source(config)}: its records have no {' or '.join(needs)}, which trainer.method "
            f"{config.trainer['method']} learns from; they have: {', '.join(sorted(known)) or 'nothing of that'}. "
            f"Methods that fit this data: {', '.join(fitting_methods(source_kinds(config.data), known))}."
        )
    if kind == "groups":
        make_groups(fit.pictures(config), trainer_config(config).group_size, _source(config))
    return fit


def chosen_kind(config: RunConfig) -> str:
    """What the method learns from in this run.

    Raises:
        DiffalignError: it takes nothing that the source holds or `data.kind` names; the methods that fit are listed.
    """
    taken, made = kinds_of(trainer_class(config)), source_kinds(config.data)
    wanted = made if config.data.kind == "auto" else (config.data.kind,)
    fitting = [kind for kind in taken if kind in wanted and kind in made]
    if fitting:
        return str(fitting[0])
    held = WORDS["pairs" if "pairs" in made else "pictures"]
    asked = "" if config.data.kind == "auto" else f", and data.kind is {config.data.kind}"
    offered = [kind for kind in made if config.data.kind in ("auto", kind)]
    methods = ", ".join(fitting_methods(offered)) if offered else "none; set data.kind=auto"
    raise DiffalignError(
        f"{_source(config)} holds {held}{asked}, but trainer.method {config.trainer['method']} learns from "
        f"{' or '.join(WORDS[kind] for kind in taken)}. Methods that fit this data: {methods}."
    )


def kinds_of(trainer: Any) -> tuple[str, ...]:
    """What a method learns from, the usual kind first; pairs unless it says otherwise."""
    return tuple(getattr(trainer, "data_kinds", ("pairs",)))


def fitting_methods(kinds: Sequence[str], known: set[str] | None = None) -> list[str]:
    """Methods that learn from one of the kinds and, if it is known what records say, find what they need."""
    from diffalign.trainers import TRAINERS
    from diffalign.trainers import trainer_class as named

    found = []
    for method in TRAINERS:
        trainer = named(method)
        for kind in kinds_of(trainer):
            needs = _needs(trainer, kind)
            if kind in kinds and (known is None or not needs or known & set(needs)):
                found.append(method)
                break
    return found


def stored_methods() -> list[str]:
    """Methods that tune a generator on stored pictures."""
    from diffalign.trainers import trainer_class as named

    return [method for method in fitting_methods(STORED) if "lora" in named(method).tunes]


def facts(records: Records | PictureRecords | None) -> set[str]:
    """What at least one record says: label, score, rank, user."""
    if isinstance(records, PictureRecords):
        names = ("label", "score", "rank")
        return {name for name in names if any(getattr(row, name) is not None for row in records.rows)}
    rows = () if records is None else records.rows
    return {"label", "score"} | ({"user"} if any(row.user is not None for row in rows) else set())


def check_options(config: RunConfig) -> None:
    """Refuse options that mean nothing for this model's process.

    Raises:
        DiffalignError: an option or a sampling kernel of flow models with a model that is none, or the other way round.
    """
    options = trainer_config(config)
    weighting = getattr(options, "time_weighting", "uniform")
    beta = getattr(options, "beta_weighting", "constant")
    drawing = getattr(options, "sampling", None) or getattr(options, "rollouts", None)
    kernel = getattr(drawing, "kernel", None)
    if weighting == "uniform" and beta == "constant" and kernel is None:
        return
    process = _process(config)
    if kernel is not None:
        from diffalign.sampling.transition import Kernel

        Kernel(kernel).check(process)
    if weighting == "logit_normal" and not process.is_flow:
        raise DiffalignError(
            f"trainer.time_weighting is logit_normal, which is for flow models; {config.model.path} has "
            f"{process.num_timesteps} discrete timesteps ({process.prediction}). Set trainer.time_weighting=uniform."
        )
    predicts = {"epsilon": "noise", "v_prediction": "velocity", "flow": "velocity"}.get(process.prediction)
    if beta == f"{predicts}_space":
        raise DiffalignError(
            f"trainer.beta_weighting is {beta}, which changes nothing for {config.model.path}: it predicts {predicts}. "
            "Set trainer.beta_weighting=constant."
        )


def check_adapters(config: RunConfig) -> None:
    """Refuse adapters that are not for what the method learns.

    Raises:
        DiffalignError: adapters of the network with a method that changes noises, or the other way round.
    """
    wanted = "noise" if "noises" in kinds_of(trainer_class(config)) else "network"
    model = config.model
    if model.tune == "lora" and model.lora.changes != wanted:
        raise DiffalignError(
            f"model.lora.changes is {model.lora.changes}, but adapters of trainer.method {config.trainer['method']} "
            f"change the {wanted}. Set model.lora.changes={wanted}."
        )


def check_smoothness(config: RunConfig) -> None:
    """Refuse the regulariser where nothing can be differentiated twice, or no stored picture is noised.

    Raises:
        DiffalignError: a method that does not learn from stored pictures (those that do are listed), a compiled
            network, or an attention kernel without a second derivative.
    """
    if config.smoothness is None:
        return
    instead = "or remove the section smoothness"
    if config.trainer["method"] not in stored_methods():
        raise DiffalignError(
            f"smoothness is on, but trainer.method {config.trainer['method']} tunes no generator on stored pictures, "
            f"which are what it noises. Use a method that does ({', '.join(stored_methods())}), {instead}."
        )
    if config.model.compile:
        raise DiffalignError(
            "smoothness is on, whose penalty is a gradient within a gradient; compiled networks have none. Set "
            f"model.compile=false, {instead}."
        )
    if config.model.attention not in ("auto", "sdpa"):
        raise DiffalignError(
            f"smoothness is on, but attention {config.model.attention} cannot be differentiated twice. Set "
            f"model.attention=auto, {instead}."
        )


def _check_kind_options(config: RunConfig, kind: str) -> None:
    """Refuse options that only pairs have, where something else is learned from."""
    if kind in ("pairs", "judgements"):
        return
    captions = getattr(trainer_config(config), "captions", "own")
    if captions != "own":
        raise DiffalignError(
            f"trainer.captions is {captions}, but the run learns from {WORDS[kind]}: each has its own. Set "
            "trainer.captions=own."
        )
    if config.curriculum.stages > 1:
        raise DiffalignError(
            f"curriculum.stages is {config.curriculum.stages}, but the run learns from {WORDS[kind]}: gaps belong to "
            "pairs. Set curriculum.stages=1."
        )
    if find_pictures(config.data) is None:
        return
    for name in PAIRS_ONLY:
        value, default = getattr(config.data, name), type(config.data).model_fields[name].default
        if value != default:
            raise DiffalignError(
                f"data.{name} is {value!r}, but {_source(config)} holds single pictures, for which it means nothing; "
                "remove it"
            )


def _opened(config: RunConfig, kind: str) -> Records | PictureRecords:
    """The records of the source: single pictures where it holds them and the run does not need pairs."""
    if kind in ("pictures", "groups") and find_pictures(config.data) is not None:
        return open_pictures(config.data)
    return open_records(config.data)


def _needs(trainer: Any, kind: str) -> tuple[str, ...]:
    """What records of this kind must say, one of them."""
    return tuple(getattr(trainer, "needs", {}).get(kind, ()))


def _process(config: RunConfig) -> Process:
    from diffalign.backbones.loading import open_source
    from diffalign.backbones.schedule import scheduler_process

    # A generator under a head that is trained is one, too.
    return scheduler_process(open_source(config.model.model_copy(update={"tune": "lora"})))


def _source(config: RunConfig) -> str:
    return f"data.source {config.data.source}"
