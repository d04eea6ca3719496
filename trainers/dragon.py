"""DRAGON: learn from the contrast of a good and a bad set of the policy's own samples, under any reward.

Bai et al. 2025, "DRAGON: Distributional Rewards Optimize Diffusion Generative Models" (arXiv 2504.15217); no code is
public. A reward may judge single samples, samples against exemplars, or whole sets (Frechet distance to exemplars,
Vendi diversity). In the first two cases the best samples go into the positive set and the worst into the negative one.
In the third a random half of each prompt's samples goes into either set, and elements are swapped as long as that
raises the reward of the positive set. Diffusion-DPO or Diffusion-KTO then makes the positive set likelier against
the reference, and the negative one less likely. What the paper leaves open is decided in docs/methods/dragon.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.guidance import is_told_guidance, tell_guidance
from diffalign.errors import DiffalignError
from diffalign.objectives.contrast import Contrast, crossed, over_groups, within_groups
from diffalign.objectives.pairwise import dpo_loss, dpo_margin, error_delta, squared_error
from diffalign.objectives.unpaired import kto_baseline, kto_loss
from diffalign.randomness import Draw, derive_seed, generator
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.sets.as_samples import SetFeatures
from diffalign.rewards.sets.exchange import (
    SetScore,
    exchange_gains,
    exchanged_halves,
    random_halves,
    set_score,
)
from diffalign.rewards.sets.rewards import SetReward
from diffalign.sampling.collection import Collected
from diffalign.sampling.rollout import chunks
from diffalign.trainers.contrast_rows import ContrastRows, ContrastTable
from diffalign.trainers.online import (
    Losses,
    OnlineOptions,
    OnlineTrainer,
    WholeRound,
    sample_weights,
    whole_round,
)
from diffalign.trainers.online_rows import Rows
from diffalign.trainers.pairs import pair_metrics

# For means over latent elements; KTO's formula lacks the factor 1/2 of the DPO margin.
BETA = {"dpo": 500.0, "kto": 250.0}


class DragonConfig(OnlineOptions):
    """DRAGON."""

    method: Literal["dragon"] = "dragon"
    samples: int = Field(default=4, ge=1)
    """Samples of a group. Set rewards halve each group, and leave one of an odd number out."""
    surrogate: Literal["dpo", "kto"] = "dpo"
    """dpo: pairs at shared noise. kto: single samples, desirable or not, against a common baseline."""
    pairing: Literal["paired", "unpaired"] = "paired"
    """paired: both sets hold each prompt equally often, and a pair is of one prompt. unpaired: samples of all prompts
    compete, so the positive set also learns which prompts are easy."""
    pairs: Literal["best_worst", "halves"] = "best_worst"
    """Rewards of single samples, paired: one pair per prompt, or the better half against the worse half."""
    share: float = Field(default=0.5, gt=0, le=0.5)
    """Rewards of single samples, unpaired: part of the round that goes into each set; less is clearer and fewer."""
    min_gap: float = Field(default=0.0, ge=0)
    """Rewards of single samples: pairs that differ by no more are ties and left out."""
    exchange: int = Field(default=4, ge=0)
    """Set rewards: most passes of swaps over the positive set. 0: the better of two random halves as it is."""
    starts: int = Field(default=4, ge=1)
    """Set rewards: random divisions that are tried; the best one after its swaps counts."""
    weighting: Literal["equal", "gain"] = "equal"
    """gain: a pair counts by what the reward loses if its two samples change places, against the mean of that. Paired
    only."""
    beta: float | None = Field(default=None, gt=0)
    """Pull to the reference, for errors that are means over elements. null: 500 for dpo, 250 for kto, which are the
    same: KTO's formula lacks the factor 1/2. The offline releases have 5000 and 1000."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """dpo: the share of pairs taken to be the wrong way round, which bounds the margin."""
    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = "kahneman_tversky"
    """kto: how a gain is felt, as for the method kto."""
    baseline: Literal["step", "zero"] = "step"
    """kto: what gains are compared with. step: their mean over the optimiser step, at least 0, for one more forward of
    policy and reference. zero: nothing."""
    draws: int = Field(default=1, ge=1)
    """Rows per pair or sample, each with a noise and a time of its own: less noise for as many times the compute."""
    stratified_times: bool = True
    """Spread the times of an optimiser step evenly over the schedule."""
    time_weighting: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of training times."""

    @model_validator(mode="after")
    def _fits_together(self) -> DragonConfig:
        if self.weighting == "gain" and self.pairing == "unpaired":
            raise ValueError("weighting should be equal unless pairing is paired: it weighs pairs")
        if self.pairing == "paired" and self.samples < 2:
            raise ValueError(
                "samples should be at least 2 unless pairing is unpaired: pairs are of one prompt"
            )
        self.beta = BETA[self.surrogate] if self.beta is None else self.beta
        return self


class DragonTrainer(OnlineTrainer):
    """Positive and negative sets of a round, and a contrastive loss on them."""

    Config: ClassVar[type[OnlineOptions]] = DragonConfig

    def __init__(self, config: DragonConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        # Filled in from the surrogate by the configuration.
        self.beta = float(config.beta or 0.0)
        self.baseline = torch.zeros(())
        self._table: ContrastTable | None = None

    @classmethod
    def open_reward(cls, spec: Any) -> Reward:
        """A reward of single pictures as it is, a set reward as `SetFeatures`.

        Raises:
            DiffalignError: it judges neither.
        """
        reward = load_reward(spec)
        if reward.modality == "image" and reward.kind == "sample":
            return reward
        if isinstance(reward, SetReward):
            return SetFeatures(reward)  # type: ignore[return-value]
        raise DiffalignError(
            f"trainer.reward {reward.name!r} scores {reward.modality} of kind {reward.kind}; expected a reward of "
            "single pictures, or a set reward: frechet, kid, cmmd, vendi, diversity, or a subclass of SetReward."
        )

    @property
    def features(self) -> Callable[[Tensor, Sequence[str]], Tensor] | None:
        """What is computed of every picture: features for a set reward, nothing for others."""
        found = self._set_features()
        return None if found is None else found.features

    def _set_features(self) -> SetFeatures | None:
        """The set reward that is learned from, inside of its guard; None for rewards of single samples."""
        inner = [self.reward, *getattr(self.reward, "of", ())]
        return next((one for one in inner if isinstance(one, SetFeatures)), None)

    # A round

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        """Build both sets out of the round of all processes, and rows of pairs (dpo) or single samples (kto)."""
        options = self.config
        features = {} if collected.features is None else {"features": collected.features}
        whole = whole_round(self.gather, collected, features)
        contrast, found = self._sets(whole, collected.round)
        of_pairs = contrast.weights() if options.weighting == "gain" else torch.ones(len(contrast.positive))
        own = torch.isin(whole["numbers"], collected.numbers)
        mine = own[contrast.positive]
        self._table = self._rows(collected, contrast.on(own), of_pairs[mine])
        return self._table.rows, found

    def _sets(self, whole: WholeRound, number: int) -> tuple[Contrast, dict[str, float]]:
        """Both sets among the samples of round `number`."""
        options, places, rewards = self.config, whole.places, whole.rewards
        if "features" in whole.columns:
            groups = places if options.pairing == "paired" else torch.zeros_like(places)
            return self._exchanged(whole["features"], groups, rewards.isfinite(), number)
        if options.pairing == "paired":
            contrast = within_groups(rewards, places, options.pairs, options.min_gap)
        else:
            contrast = over_groups(rewards, options.share, options.min_gap)
        return contrast, instance_metrics(rewards, contrast)

    def _exchanged(
        self, features: Tensor, groups: Tensor, known: Tensor, number: int
    ) -> tuple[Contrast, dict[str, float]]:
        """Sets for a set reward; of samples whose features are numbers."""
        found, usable = self._set_features(), known & features.isfinite().all(1)
        assert found is not None, "features are computed for set rewards alone"
        reward = found.inner

        def score(own: Tensor) -> SetScore:
            return set_score(reward, own)

        if not len(random_halves(groups, usable, 0)):
            return Contrast(*torch.zeros(2, 0).long()), {"pairs": 0.0}
        keys, options = (self.seed, "halves", number), self.config
        done = exchanged_halves(
            features, groups, usable, score, *keys, passes=options.exchange, starts=options.starts
        )
        halves = done.halves
        gain = exchange_gains(features, halves, score) if options.weighting == "gain" else None
        measured = {
            "reward": float(reward.value(features[usable])),
            "before": done.before,
            "positive": done.after,
            "negative": score(features[halves.negative]).value,
            "pairs": float(len(halves)),
            "swaps": float(len(done.swaps)),
            "passes": float(done.passes),
        }
        return Contrast(halves.positive, halves.negative, gain), measured

    def _rows(self, collected: Collected, contrast: Contrast, of_pairs: Tensor) -> ContrastTable:
        """The rows of this process's samples of both sets."""
        options, weights = self.config, sample_weights(collected, self.config.uncertainty)
        if options.surrogate == "kto":
            both = torch.cat([contrast.positive, contrast.negative])
            paired = torch.cat([of_pairs, of_pairs]) if options.weighting == "gain" else 1.0
            return ContrastTable(collected, contrast, weights[both] * paired, False, options.draws)
        if options.pairing == "unpaired":
            size = max(len(contrast.positive), len(contrast.negative))
            keys = self.seed, "crossed", collected.round, int(collected.numbers[0])
            contrast = crossed(contrast, torch.randperm(size, generator=generator(*keys)))
            of_pairs = torch.ones(len(contrast.positive))
        both = weights[contrast.positive] * weights[contrast.negative]
        return ContrastTable(collected, contrast, both * of_pairs, True, options.draws)

    # An optimiser step

    def begin(self, rows: Sequence[int]) -> None:
        """Measure KTO's baseline: the mean gain over the rows of all processes, at noise of its own."""
        if self.config.surrogate != "kto" or self.config.baseline != "step":
            return
        total = torch.zeros(1, 2)
        assert self._table is not None
        assert self.collected is not None
        seed = derive_seed(self.seed, "baseline", self.collected.round)
        numbers = self._table.rows.number[torch.tensor(list(rows), dtype=torch.long)].tolist()
        for part in chunks(len(numbers), self.config.sampling.batch_size):
            own = numbers[part.start : part.stop]
            draw = Draw(seed, 0, own, own, 0)
            batch = self._table.take(rows[part.start : part.stop], draw, stratified=False)
            with torch.no_grad():
                gain, _ = self._gains(batch.to(self.backbone.device))
            total[0] += torch.tensor([float(gain.sum()), float(len(gain))])
        gained, count = self.gather(total).sum(0)
        self.baseline = kto_baseline(gained, count.clamp(min=1))

    def batch(self, rows: Sequence[int], draw: Draw) -> ContrastRows:
        """The tensors of some rows."""
        assert self._table is not None
        return self._table.take(rows, draw, self.config.stratified_times)

    def loss(self, batch: ContrastRows) -> Losses:
        """Losses `[B]` and metrics `[B]`."""
        options, (gain, error) = self.config, self._gains(batch)
        if options.surrogate == "kto":
            baseline = self.baseline.to(gain)
            advantage = self.beta * (gain - baseline)
            losses = kto_loss(advantage, batch.label, options.utility)
            right = ((gain > baseline) == (batch.label > 0.5)).float()
            metrics = {"gain": gain, "error": error, "implicit_accuracy": right}
            metrics |= {"signed_gain": (2 * batch.label - 1) * gain, "baseline": baseline.expand_as(gain)}
            return losses * batch.weight, {name: value.detach() for name, value in metrics.items()}
        (chosen, rejected), errors = (-gain).chunk(2), error.chunk(2)
        margin = dpo_margin(chosen, rejected, self.beta)
        losses = dpo_loss(margin, batch.label, options.label_smoothing) * batch.weight
        named = {"chosen_delta": chosen, "rejected_delta": rejected}
        return losses, pair_metrics(margin, named, chosen_error=errors[0], rejected_error=errors[1])

    def _gains(self, batch: ContrastRows) -> tuple[Tensor, Tensor]:
        """What the policy gained on the reference on each sample, and its error, `[S]`."""
        process, core = self.backbone.process, self.backbone.core
        t = process.times(batch.uniform.cpu(), self.config.time_weighting).to(batch.x0.device)
        x_t, target = process.noise(batch.x0, batch.noise, t), process.target(batch.x0, batch.noise, t)
        told = batch.conditioning
        if is_told_guidance(core):
            told = tell_guidance(told, self.config.sampling.guidance)
        reference = self.backbone.predict(x_t, t, told, reference=True)
        policy = self.backbone.predict(x_t, t, told)
        return -error_delta(policy, reference, target), squared_error(policy.detach(), target)


def instance_metrics(rewards: Tensor, contrast: Contrast) -> dict[str, float]:
    """What a round's sets of rewards of single samples are like."""
    found = {"positive_size": float(len(contrast.positive)), "negative_size": float(len(contrast.negative))}
    if len(contrast.positive) and len(contrast.negative):
        found["positive"] = float(rewards[contrast.positive].mean())
        found["negative"] = float(rewards[contrast.negative].mean())
    return found
