"""RAFT and loops of curation: draw, keep what a reward likes, fine-tune on it, again.

Reward ranked fine-tuning (Dong et al. 2023, arXiv 2304.06767) keeps the best of K samples of each prompt. With
`form: bt` somebody picks one of K with probability softmax(reward) and real data may be mixed in: the self-consuming
loop of Ferbach et al. 2024 (arXiv 2407.09499), of which RAFT is the limit of temperature 0. No log-probabilities, no
negatives; any sampler, any reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.guidance import is_told_guidance
from diffalign.conditioning import Conditioning
from diffalign.data.picture_labels import Pictures
from diffalign.errors import DiffalignError
from diffalign.objectives.curation import above, best, best_prompts, chosen, real_per_row, softmax_weights
from diffalign.objectives.pairwise import squared_error
from diffalign.randomness import Draw, batch_records, derive_seed, generator
from diffalign.sampling.collection import Collected, joined
from diffalign.sampling.rollout import Told, predict
from diffalign.trainers.forward_online import whole_round
from diffalign.trainers.online import Losses, OnlineOptions, OnlineTrainer, State, sample_weights
from diffalign.trainers.online_rows import CleanRows, Rows


class RAFTConfig(OnlineOptions):
    """Reward ranked fine-tuning, and self-consuming loops."""

    method: Literal["raft"] = "raft"
    form: Literal["best", "bt", "weighted", "all"] = "best"
    """Which samples are learned from. best: the best of each prompt. bt: those that somebody picks with probability
    softmax(reward / temperature). weighted: all, weighted by that softmax. all: all above `threshold`."""
    keep: int = Field(default=1, ge=1)
    """best, bt: samples kept per prompt, of `samples`."""
    scope: Literal["prompt", "round"] = "prompt"
    """Among which samples one is good: those of its prompt, or all of the round, as many in all: that gets more reward
    from the same samples, and moves the data to easy prompts."""
    prompt_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a round's prompts that is kept, those with the best samples; 0.8 in the diffusion example of the
    release."""
    threshold: float | None = None
    """Samples with a reward at or below this are never learned from; with `form: all` and a reward of 0 or 1, 0.5 keeps
    the successes. null: none."""
    temperature: float = Field(default=1.0, gt=0)
    """bt, weighted: of softmax(reward / temperature), in units of the reward. Lower is sharper; a reward in [0, 1]
    needs about 0.1 to make a difference."""
    real: float = Field(default=0.0, ge=0, lt=1)
    """Share of real pictures in the training data, drawn from `data.source`: of pairs the chosen pictures, of single
    pictures the good ones. Above (samples - 1) / samples it bounds how far a bt loop can drift, however long."""
    replay: float = Field(default=0.0, ge=0, lt=1)
    """Share of samples in the training data that were kept in the last rounds: steadier, and slower to follow."""
    replay_rounds: int = Field(default=4, ge=1)
    """How many rounds back samples are replayed."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the squared distance to the frozen model's prediction, beside the denoising error: the path KL up to
    its weights over time. Costs a forward pass of the reference."""
    guided: bool = True
    """With guidance while drawing: fit the guided prediction, for twice the cost. false: the conditional one, as plain
    fine-tuning does; sampling then guides once more what was drawn with guidance."""
    noise_levels: int = Field(default=4, ge=1)
    """Draws of (time, noise) per picture and pass; each is a row."""
    time_weighting: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of training times; logit_normal is for flow models."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> RAFTConfig:
        if self.keep > self.samples:
            raise ValueError(f"keep is {self.keep}; should be at most samples, {self.samples}")
        if self.real + self.replay >= 1:
            raise ValueError(f"real + replay is {self.real + self.replay:g}; should be below 1")
        return self


@dataclass(frozen=True)
class Kept:
    """Pictures that are learned from, on this process, M in all.

    Fields:
        latents: `[M, C, h, w]`, clean. told: M rows. weight: `[M]` factor on the loss.
        group: `[M]` long, place in the round of the group that a picture goes with. number: `[M]` long, one of its own
            in the whole round.
    """

    latents: Tensor
    told: Told
    weight: Tensor
    group: Tensor
    number: Tensor

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class Memory:
    """Samples kept in earlier rounds: latents `[M, C, h, w]`, conditioning, numbers in their rounds, rounds `[M]`."""

    latents: Tensor
    conditioning: Conditioning
    number: Tensor
    round: Tensor

    def select(self, rows: Tensor) -> Memory:
        """Some samples: indices, or a mask `[M]`."""
        index = torch.arange(len(self.round))[rows]
        told = self.conditioning.select(index)
        return Memory(self.latents[index], told, self.number[index], self.round[index])

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        told = {f"told.{name}": value for name, value in self.conditioning.tensors().items()}
        return {"latents": self.latents, "number": self.number, "round": self.round, **told}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> Memory:
        """From `tensors`, each sample once, by round and number."""
        told = {name[5:]: value for name, value in tensors.items() if name.startswith("told.")}
        found = Memory(tensors["latents"], Conditioning(**told), tensors["number"], tensors["round"])
        keys = list(zip(found.round.tolist(), found.number.tolist(), strict=True))
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        return found.select(torch.tensor([first[key] for key in sorted(first)]).long())


class RAFTTrainer(OnlineTrainer):
    """Denoising errors of curated samples, mixed with real pictures and samples of earlier rounds."""

    Config = RAFTConfig

    def __init__(self, config: RAFTConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        # The engine puts the encoded pictures of data.source here when `wants_pictures`.
        self.pictures: Any = None
        self._guided = config.guided or is_told_guidance(backbone.core)
        self._kept: Kept | None = None
        self._memory: Memory | None = None

    @classmethod
    def needs_frozen_copy(cls, config: RAFTConfig, tune: str) -> bool:
        """Whether a second network has to be loaded: only the KL term asks the reference."""
        return config.kl > 0 and super().needs_frozen_copy(config, tune)

    @staticmethod
    def wants_pictures(config: RAFTConfig) -> bool:
        """Whether the run needs the pictures of `data.source`, encoded."""
        return config.real > 0

    @classmethod
    def choose(cls, config: RAFTConfig, pictures: Pictures) -> Pictures:
        """The real pictures: those labelled good; where nothing is labelled, the best of each group.

        So another generator's samples can be mixed in: K scored pictures a prompt, of which the best is taken.

        Raises:
            DiffalignError: none is good.
        """
        if np.isnan(pictures.label).all():
            return pictures.keep(best_of_groups(pictures))
        good = pictures.keep(pictures.label > 0.5)
        if len(good) == 0:
            raise DiffalignError(
                f"none of {len(pictures)} pictures of data.source has a label above 0.5, and trainer.real takes those "
                "that have. Label real pictures 1, or set trainer.real=0."
            )
        return good

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        """Curate a round.

        Raises:
            RuntimeError: there should be real pictures, and nobody gave any.
        """
        whole = whole_round(self.gather, collected)
        rewards = whole.rewards.reshape(-1, collected.samples)
        weights = curation_weights(self.config, rewards, self.seed, collected.round).flatten()
        real, replay = (self._company(weights > 0, name) for name in ("real", "replay"))
        own = self._curated(collected, weights[whole.own])
        earlier = self._replayed(collected, replay, whole.own)
        self._kept = together([own, earlier, self._real(collected, real, whole.own, int(replay.sum()))])
        self._remember(collected, own)
        facts = kept_facts(whole.rewards, weights)
        return self._rows(self._kept), facts | {"real": float(real.sum())} if self.config.real else facts

    def batch(self, rows: Sequence[int], draw: Draw) -> CleanRows:
        """Clean pictures and noise of some rows."""
        assert self._kept is not None, "learn comes first"
        picture = torch.tensor(list(rows)) // self.config.noise_levels
        x0 = self._kept.latents[picture]
        noise, uniform = draw.normal(tuple(x0.shape[1:]), "noise"), draw.uniform("time", stratified=True)
        return CleanRows(x0, noise, uniform, self._kept.told.select(picture), picture, draw)

    def loss(self, batch: CleanRows) -> Losses:
        """Losses and metrics, each `[B]`."""
        assert self._kept is not None, "learn comes first"
        x_t, target, t = batch.noised(self.backbone.process, self.config.time_weighting)
        prediction = self._predict(x_t, t, batch.told)
        error = squared_error(prediction, target)
        losses = self._kept.weight[batch.sample.cpu()].to(error.device) * error
        metrics = {"error": error.detach()}
        if self.config.kl:
            with self.backbone.inference(), self.backbone.reference():
                reference = self._predict(x_t, t, batch.told)
            distance = squared_error(prediction, reference)
            losses = losses + self.config.kl * distance
            metrics["distance"] = distance.detach()
        return losses, metrics

    def state(self) -> State:
        """The samples that can be replayed, of all processes."""
        if self._memory is None:
            return {}, {}
        # A process that was resumed remembers those of all; `Memory.of` takes each once.
        everyone = {name: self.gather(value.contiguous()) for name, value in self._memory.tensors().items()}
        return Memory.of(everyone).tensors(), {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self._memory = Memory.of(tensors) if tensors else None

    def _predict(self, x_t: Tensor, t: Tensor, told: Told) -> Tensor:
        if self._guided:
            return predict(self.backbone, x_t, t, told)
        return self.backbone.predict(x_t, t, told.conditioning)

    def _rows(self, kept: Kept) -> Rows:
        draws = self.config.noise_levels
        number = kept.number[:, None] * draws + torch.arange(draws)
        return Rows(kept.group.repeat_interleave(draws), number.flatten())

    def _company(self, kept: Tensor, name: Literal["real", "replay"]) -> Tensor:
        """How many pictures of another source go with each sample of the whole round, `[N_all]`."""
        shares = {"real": self.config.real, "replay": self.config.replay}
        others = sum(shares.values()) - shares[name]
        counts = torch.zeros(len(kept)).long()
        # Of what is not from the third source.
        counts[kept] = real_per_row(int(kept.sum()), shares[name] / (1 - others))
        return counts

    def _curated(self, collected: Collected, weights: Tensor) -> Kept:
        """This process's samples with a weight `[N]` above 0."""
        rows = (weights > 0).nonzero().flatten()
        trusted = weights * sample_weights(collected, self.config.uncertainty)
        return Kept(
            collected.latents[rows],
            collected.told.select(rows),
            trusted[rows].float(),
            collected.places[rows],
            collected.numbers[rows],
        )

    def _replayed(self, collected: Collected, counts: Tensor, own: Tensor) -> Kept:
        """Earlier samples of the same places, so that no process needs those of another one."""
        number, sample = companions(counts, own)
        place, memory = collected.places[sample], self._memory
        if memory is None:
            return nothing(collected)
        past = [(memory.number // collected.samples == where).nonzero().flatten() for where in place]
        rows = torch.tensor([row for row, found in enumerate(past) if len(found)]).long()
        keys = ("replay", collected.round)
        found = [int(past[r][derive_seed(self.seed, *keys, int(number[r])) % len(past[r])]) for r in rows]
        told = told_as(collected.told, memory.conditioning.select(torch.tensor(found).long()))
        weight = torch.ones(len(found))
        return Kept(memory.latents[found], told, weight, place[rows], number[rows] + len(counts))

    def _real(self, collected: Collected, counts: Tensor, own: Tensor, replayed: int) -> Kept:
        """Real pictures, other ones in each round; all come once before any comes again."""
        number, sample = companions(counts, own)
        if not len(number):
            return nothing(collected)
        if self.pictures is None:
            raise RuntimeError("trainer.real needs real pictures; set RAFTTrainer.pictures to a PictureCache")
        seed = derive_seed(self.seed, "real pictures")
        records = batch_records(seed, collected.round, int(counts.sum()), len(self.pictures))
        mine, places = [records[index] for index in number.tolist()], number.tolist()
        found = self.pictures.fetch(Draw(seed, collected.round, mine, places, len(records)))
        told, weight = told_as(collected.told, found.conditioning), torch.ones(len(mine))
        # Numbers of samples and of replayed ones come first.
        number = number + len(counts) + replayed
        return Kept(found.latents.float(), told, weight, collected.places[sample], number)

    def _remember(self, collected: Collected, own: Kept) -> None:
        """Add this round's samples to those that can be replayed, and forget the oldest."""
        if not self.config.replay:
            return
        when = torch.full((len(own),), collected.round)
        latest = Memory(own.latents, own.told.conditioning, own.number, when).tensors()
        if self._memory is not None:
            recent = self._memory.round > collected.round - self.config.replay_rounds
            mine = torch.isin(self._memory.number // collected.samples, collected.places)
            earlier = self._memory.select(recent & mine).tensors()
            latest = {name: torch.cat([earlier[name], value]) for name, value in latest.items()}
        self._memory = Memory.of(latest)


def curation_weights(config: RAFTConfig, rewards: Tensor, seed: int, number: int) -> Tensor:
    """Weights `[P, K]` of the samples of a whole round, 0 for those that are not learned from.

    Args:
        rewards: `[P, K]`, NaN where unknown. seed, number: of the run and of the round; `bt` draws with them.
    """
    allowed = above(rewards, config.threshold) & best_prompts(rewards, config.prompt_share)[:, None]
    rewards = rewards.masked_fill(~allowed, torch.nan)
    if config.form == "weighted":
        return softmax_weights(rewards, config.temperature, config.scope)
    if config.form == "best":
        return best(rewards, config.keep, config.scope).float()
    if config.form == "all":
        return allowed.float()
    uniform = torch.rand(rewards.shape, generator=generator(seed, "curation", number), dtype=torch.float64)
    return chosen(rewards, config.temperature, uniform, config.keep, config.scope).float()


def kept_facts(rewards: Tensor, weights: Tensor) -> dict[str, float]:
    """Share of the samples `[N]` that is learned from, and their weighted mean reward."""
    kept = weights > 0
    found = {"kept": float(kept.float().mean())}
    if kept.any():
        share = weights[kept].double() / weights[kept].double().sum()
        found["kept_reward"] = float((share * rewards[kept].double()).sum())
    return found


def companions(counts: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Running numbers `[n]` of the pictures that go with this process's samples, and the sample of each `[n]`.

    Args:
        counts: how many go with each sample of the whole round `[N_all]`. own: which of those are here `[N]`.
    """
    mine = counts[own]
    sample = torch.arange(len(own)).repeat_interleave(mine)
    within = torch.arange(len(sample)) - (mine.cumsum(0) - mine)[sample]
    return (counts.cumsum(0) - counts)[own][sample] + within, sample


def told_as(told: Told, conditioning: Conditioning) -> Told:
    """Other conditioning `[n]` with the guidance and the unconditional branch of a round."""
    other = told.unconditional
    if other is not None:
        other = other.select(torch.zeros(len(conditioning)).long())
    return replace(told, conditioning=conditioning, unconditional=other)


def nothing(collected: Collected) -> Kept:
    """No pictures."""
    rows = torch.zeros(0).long()
    return Kept(collected.latents[rows], collected.told.select(rows), torch.zeros(0), rows, rows)


def together(parts: Sequence[Kept]) -> Kept:
    """Pictures of several sources, one after the other."""
    filled = [part for part in parts if len(part)] or list(parts[:1])
    latents, weight, group, number = (
        torch.cat([getattr(part, name) for part in filled])
        for name in ("latents", "weight", "group", "number")
    )
    return Kept(latents, joined([part.told for part in filled]), weight, group, number)


def best_of_groups(pictures: Pictures) -> np.ndarray:
    """Entries of the picture with the highest score, or else the first rank, of each group.

    Raises:
        DiffalignError: no picture has a score or a rank.
    """
    value = np.where(np.isnan(pictures.score), -pictures.rank, pictures.score)
    known = np.flatnonzero(~np.isnan(value))
    if len(known) == 0:
        raise DiffalignError(
            "the pictures of data.source have neither labels, scores nor ranks, and trainer.real takes the good ones. "
            "Label real pictures 1, or set trainer.real=0."
        )
    order = known[np.lexsort((-value[known], pictures.group[known]))]
    return order[np.unique(pictures.group[order], return_index=True)[1]]
