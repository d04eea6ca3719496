"""Puts the parts of a run together: model, trainer, cached data, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from diffalign.config import RunConfig, trainer_class, trainer_config
from diffalign.engine.curriculum import check_curriculum, open_curriculum
from diffalign.engine.fit import Fit, check_fit
from diffalign.engine.parallel import Parallel
from diffalign.engine.smoothing import open_smoothing
from diffalign.errors import DiffalignError
from diffalign.progress import Reporter

GRID_PROMPTS = 8


class Sized(Protocol):
    """Anything with a number of pairs, pictures or groups."""

    def __len__(self) -> int: ...


@dataclass
class Ingredients:
    """What the engine needs.

    Fields:
        backbone: has `network`, `trainable_parameters()`, `trainable_state()`.
        trainer: has `fetch(draw)`, `loss(batch)`.
        cache: the training data. unit: what it counts in.
        evaluate: held-out metrics of the current weights, by full name.
        pictures: a PIL image of samples of the current weights. export: writes the final files into a folder.
        summary: what a reader must know to judge the run's numbers.
        report: writes the report of the finished training into the run folder.
        monitor: watches for over-optimisation (`diffalign.evaluation.monitor`); its pictures replace `pictures`.
        curriculum: which pairs are drawn when (`diffalign.engine.curriculum`); None: all of them all the time.
        smoothing: penalises uneven changes with the noise (`diffalign.engine.smoothing`); None: off.
        rounds: draws the samples of an online method (`diffalign.engine.rounds`); None: it learns from stored data.
        best_metric: what decides which checkpoint is best; None: `evaluation.best_metric`.
    """

    backbone: Any
    trainer: Any
    cache: Sized
    evaluate: Callable[[], dict[str, float]] | None = None
    pictures: Callable[[], Any] | None = None
    export: Callable[[Path], None] | None = None
    summary: str = ""
    report: Callable[[], Any] | None = None
    monitor: Any = None
    curriculum: Any = None
    smoothing: Any = None
    unit: str = "pairs"
    rounds: Any = None
    best_metric: str | None = None


def assemble(config: RunConfig, parallel: Parallel, reporter: Reporter) -> Ingredients:
    """The real parts, by what the trainer learns from: latents of pairs, pictures or groups, rollouts of the model
    itself drawn once, or anew as it trains (online), noises of prompts, or judgements (reward models).

    Raises:
        DiffalignError: bad model, data or prompts, or ones that do not go together.
    """
    fit = check_fit(config)
    check_curriculum(config, parallel.sharded)
    if fit.kind == "rollouts":
        from diffalign.engine.rollout_assembly import assemble_rollouts

        return assemble_rollouts(config, parallel, reporter)
    if fit.kind == "prompts":
        from diffalign.engine.online_assembly import assemble_online

        return assemble_online(config, parallel, reporter)
    if fit.kind == "noises":
        from diffalign.engine.noise_assembly import assemble_noises

        return assemble_noises(config, parallel, reporter)
    if fit.kind == "judgements":
        from diffalign.engine.scorer_assembly import assemble_scorer

        return assemble_scorer(config, parallel, reporter)
    if config.model.tune == "head":
        from diffalign.engine.latent_assembly import assemble_latent_reward

        return assemble_latent_reward(config, fit, parallel, reporter)
    return assemble_generator(config, fit, parallel, reporter)


def assemble_generator(config: RunConfig, fit: Fit, parallel: Parallel, reporter: Reporter) -> Ingredients:
    """The parts of a run that tunes a generator: data is encoded on first use, by the first process; the others
    wait for its files.

    Raises:
        DiffalignError: bad model, data or prompts.
    """
    opened = OpenedOnce(config, parallel)
    pictures = picture_prompts(config)
    cache, held_out = open_caches(config, fit, opened, parallel.is_main, reporter)
    backbone = opened()
    backbone.release_encoders()
    options = trainer_config(config)
    trainer = trainer_class(config)(options, backbone, config.seed)
    reporter.say("preparing the trainer")
    trainer.prepare(
        cache,
        config.folder / "reference",
        parallel.is_main,
        held_out=None if held_out is None else _held_out_draws(config, held_out),
        progress=reporter,
    )
    evaluate = None if held_out is None else lambda: _held_out_metrics(config, trainer, backbone, held_out)
    parts = generator_parts(config, trainer, cache, evaluate, pictures, reporter)
    return replace(
        parts,
        curriculum=open_curriculum(config, cache),
        smoothing=open_smoothing(config, trainer, parallel),
    )


def generator_parts(
    config: RunConfig,
    trainer: Any,
    cache: Any,
    evaluate: Callable[[], dict[str, float]] | None,
    pictures: list[Any],
    reporter: Reporter,
) -> Ingredients:
    """What every run that tunes a generator is made of, around a trainer that has its data.

    Args:
        pictures: prompts of the sample grid (`picture_prompts`).
    """
    backbone = trainer.backbone
    return Ingredients(
        backbone,
        trainer,
        cache,
        evaluate,
        None if not pictures else lambda: _sample_grid(config, backbone, pictures),
        lambda folder: _export(config, backbone, folder),
        _summary(config, trainer.config, backbone),
        lambda: _report(config),
        _monitor(config, trainer, reporter),
        unit=cache.unit,
    )


class OpenedOnce:
    """Opens the model for tuning when first called, and gives the same one afterwards."""

    def __init__(self, config: RunConfig, parallel: Parallel):
        self.config, self.parallel = config, parallel
        self._backbone: Any = None

    def __call__(self) -> Any:
        """The backbone."""
        if self._backbone is None:
            from diffalign.backbones import open_backbone
            from diffalign.backbones.early import read_only

            config = self.config
            options = trainer_config(config)
            self._backbone = open_backbone(
                read_only(config.model) if config.model.tune == "head" else config.model,
                device=self.parallel.device,
                parts="network",
                resolution=config.data.resolution,
                frozen_copy=trainer_class(config).needs_frozen_copy(options, config.model.tune),
                seed=config.seed,
            )
        return self._backbone


def open_data(config: RunConfig, parallel: Parallel, reporter: Reporter) -> tuple[Any, Any]:
    """Training data and held-out pairs (None when there are none) of a recipe, encoded where still missing.

    Raises:
        DiffalignError: bad model or data, ones that do not go together, or a full disk.
    """
    fit = check_fit(config)
    if fit.kind in ("prompts", "noises"):
        raise DiffalignError(
            f"trainer.method {config.trainer['method']} draws its own samples while it trains; there is nothing to "
            "cache. Run `diffalign train`."
        )
    if fit.kind == "rollouts":
        from diffalign.engine.rollout_assembly import open_rollouts

        return open_rollouts(config, OpenedOnce(config, parallel), parallel.is_main, reporter)
    if fit.kind == "judgements":
        from diffalign.engine.scorer_assembly import ClipOnce, open_judged

        return open_judged(config, ClipOnce(config, parallel.device), parallel.is_main, reporter)
    return open_caches(config, fit, OpenedOnce(config, parallel), parallel.is_main, reporter)


def open_caches(
    config: RunConfig, fit: Fit, opener: Callable[[], Any], builder: bool, reporter: Reporter
) -> tuple[Any, Any]:
    """Cached training data and held-out pairs (None when there are none), encoded where still missing.

    Raises:
        DiffalignError: bad data, or a full disk.
    """
    from diffalign.data.cache import build_cache
    from diffalign.data.sources import open_held_out

    def build(records: Any, data: Any) -> Any:
        return build_cache(records, opener, data, config.model, config.seed, reporter, builder)

    if fit.kind == "pairs":
        cache = build(fit.records, config.data)
    else:
        cache = open_singles(config, fit, opener, builder, reporter)
    # Whatever is trained on, held-out data are pairs; a format of pictures is not theirs.
    paired = {"format": "auto"} if config.data.format == "pictures" else {}
    records = open_held_out(config.data.model_copy(update=paired))
    if records is None:
        return cache, None
    # Controls and augmentation belong to training; held-out pairs are measured as they are.
    plain = config.data.model_copy(update={"labels": "given", "flipped": 0.0, "flip": False})
    return cache, build(records, plain)


def open_singles(
    config: RunConfig, fit: Fit, opener: Callable[[], Any], builder: bool, reporter: Reporter
) -> Any:
    """Cached single pictures or groups. Pairs that are taken apart use the encoded images of the pairs.

    Raises:
        DiffalignError: no usable data, or a full disk.
    """
    from diffalign.data.picture_cache import GroupCache, PictureCache
    from diffalign.data.store import open_encoded

    assert fit.records is not None, "only judgements come without records"
    store = open_encoded(fit.records, opener, config.data, config.model, reporter, builder)
    if fit.kind == "pictures":
        return PictureCache(store, fit.pictures(config))
    cache = GroupCache(store, fit.pictures(config), trainer_config(config).group_size)
    if cache.groups.left_out:
        reporter.say(
            f"{cache.groups.left_out} groups are left out: fewer than {cache.groups.size} pictures, not all judged, or "
            "all tied"
        )
    return cache


def _held_out_draws(config: RunConfig, cache: Any) -> Any:
    """The draws that `_held_out_metrics` measures at."""
    from diffalign.evaluation.implicit import DRAWS, draws_seed
    from diffalign.reference import FixedDraws

    return FixedDraws(cache, draws_seed(config.evaluation.seed), DRAWS)


def _held_out_metrics(config: RunConfig, trainer: Any, backbone: Any, cache: Any) -> dict[str, float]:
    from diffalign.evaluation.implicit import implicit_accuracy

    rows = config.optim.batch_size
    values = implicit_accuracy(trainer, backbone, cache, seed=config.evaluation.seed, batch_size=rows)
    return {f"held_out/{name}": value for name, value in values.items()}


def picture_prompts(config: RunConfig) -> list[Any]:
    """Prompts of the sample grid, with seeds; read first, so that a bad file is noticed early."""
    if config.evaluation.prompts is None:
        return []
    from diffalign.evaluation.prompts import read_prompts, with_seeds

    prompts = read_prompts(config.evaluation.prompts)[: min(GRID_PROMPTS, config.evaluation.num_prompts)]
    return with_seeds(prompts, config.evaluation.seed)


def _monitor(config: RunConfig, trainer: Any, reporter: Reporter) -> Any:
    """The watch for over-optimisation, when the recipe names prompts and rewards of single pictures."""
    options, backbone = config.evaluation, trainer.backbone
    if options.prompts is None or not options.rewards or not options.monitor.num_prompts:
        return None
    from diffalign.evaluation.monitor import Monitor
    from diffalign.evaluation.pictures import Settings
    from diffalign.evaluation.prompts import read_prompts, with_seeds
    from diffalign.rewards import distinct, load_reward, place

    loaded = (load_reward(spec) for spec in options.rewards)
    rewards = distinct([place(reward, backbone.device) for reward in loaded if reward.kind == "sample"])
    if not rewards:
        return None
    prompts = with_seeds(read_prompts(options.prompts, options.monitor.num_prompts), options.seed)
    settings = Settings(options.steps, options.guidance, options.batch_size)
    gold, proxies = options.monitor.gold, optimised(config, trainer)
    monitor = Monitor(backbone, prompts, settings, rewards, gold=gold, proxies=proxies)
    reporter.say(f"monitor: {len(prompts)} prompts, gold reward {monitor.gold}")
    return monitor


def optimised(config: RunConfig, trainer: Any) -> list[str]:
    """Names of the rewards that training optimises: that of the method and those it is made of.

    A reward that the trainer already has is not loaded again.
    """
    from diffalign.rewards import load_reward

    reward, spec = getattr(trainer, "reward", None), getattr(trainer_config(config), "reward", None)
    if reward is None and spec is not None:
        reward = load_reward(spec)
    found = [] if reward is None else [reward]
    names = []
    while found:
        reward = found.pop()
        names.append(reward.name)
        found += getattr(reward, "of", [])
    return names


def _sample_grid(config: RunConfig, backbone: Any, prompts: list[Any]) -> Any:
    from diffalign.evaluation.grids import image_grid
    from diffalign.evaluation.pictures import Settings, generate_batch

    options = config.evaluation
    with backbone.inference():
        images = generate_batch(
            backbone, prompts, Settings(options.steps, options.guidance, options.batch_size)
        )
    # Text encoders and VAE would otherwise take GPU memory from training.
    backbone.release_encoders()
    return image_grid(images, columns=4, labels=[prompt.text for prompt in prompts])


def _export(config: RunConfig, backbone: Any, folder: Path) -> None:
    from diffalign.export import save_lora, save_pipeline
    from diffalign.export.model_card import model_card

    lora = config.model.tune == "lora"
    file = (save_lora if lora else save_pipeline)(backbone, folder)
    form = "diffusers" if lora else "merged"
    card = model_card(config.folder, config, form, file.name, backbone.source)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _report(config: RunConfig) -> None:
    from diffalign.evaluation.report import write_report

    write_report(config.folder)


def _summary(config: RunConfig, options: Any, backbone: Any) -> str:
    """Method options, latent size, precision: a beta means nothing without its reduction and latent size."""
    shown = ", ".join(f"{name} {value}" for name, value in options.model_dump().items() if name != "method")
    size = "x".join(map(str, backbone.latent_shape))
    lora = config.model.lora
    tuned = (
        f"LoRA rank {lora.rank}, alpha/rank {lora.alpha / lora.rank:g}"
        if config.model.tune == "lora"
        else "full"
    )
    dtype = str(backbone.dtype).removeprefix("torch.")
    return (
        f"{config.trainer['method']}: {shown}; latents {size}\n"
        f"{config.model.path}: {tuned}; {dtype}, attention {backbone.attention}"
    )
