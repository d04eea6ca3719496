"""Fine-tuning on the preferred pictures: the control of every preference method, and reward-weighted regression.

With certain labels it minimises the denoising error of the chosen picture. With soft labels p = sigmoid(reward gap), as
relabelling by a reward gives them, both pictures count with weights exp(reward / temperature) normalised over the pair:
reward-weighted regression, which Liu et al. 2025 (arXiv 2501.13918) use for flow models as Flow-RWR. Of single pictures
those are imitated that are rather good than bad (label above one half); `rwr.py` weighs all of them by their scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from diffalign.backbones.base import Backbone
from diffalign.data.batch import PairBatch, UnpairedBatch
from diffalign.data.cache import PairCache
from diffalign.data.picture_labels import Pictures
from diffalign.elbo import policy_errors
from diffalign.errors import DiffalignError
from diffalign.objectives.pairwise import dpo_margin, squared_error
from diffalign.objectives.reference_free import imitation_error
from diffalign.trainers.pairs import Losses, PairOptions, averaged, pair_metrics
from diffalign.trainers.pictures import PictureTrainer


class SFTConfig(PairOptions):
    """Fine-tuning on the preferred pictures, weighted by reward where the labels are soft."""

    method: Literal["sft"] = "sft"
    temperature: float = Field(default=1.0, gt=0)
    """Of the weights exp(reward / temperature), normalised over the pair; certain labels always weigh 1 and 0."""


class SFTTrainer(PictureTrainer):
    """Denoising error of the preferred picture, or of every good one."""

    Config = SFTConfig
    data_kinds: ClassVar[tuple[str, ...]] = ("pairs", "pictures")
    needs: ClassVar[dict[str, tuple[str, ...]]] = {"pictures": ("label",)}
    beta = 1.0

    def __init__(self, config: SFTConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self._all_certain = False

    @classmethod
    def choose(cls, config: Any, pictures: Pictures) -> Pictures:
        """The pictures that are rather good than bad.

        Raises:
            DiffalignError: there is none.
        """
        good = pictures.keep(pictures.label > 0.5)
        if len(good) == 0:
            raise DiffalignError(
                f"none of {len(pictures)} pictures has a label above 0.5, and sft imitates those that have. Label "
                "good pictures 1, or weigh scored ones with trainer.method=rwr."
            )
        return good

    def prepare(self, cache: Any, folder: Path | None = None, builder: bool = True, **options: Any) -> None:
        """Take the data; whether all labels of pairs are certain decides what goes through the network."""
        super().prepare(cache, folder, builder, **options)
        self._all_certain = isinstance(cache, PairCache) and bool((cache.pairs.preference == 1).all())

    def loss(self, batch: PairBatch | UnpairedBatch) -> Losses:
        """Losses `[B]` and metrics `[B]`; rejected pictures cost nothing when all labels are certain."""
        if isinstance(batch, UnpairedBatch):
            error = self._errors_singly(batch)
            worth = (batch.weight * batch.label).to(error.device)
            return worth * error, {"error": error.detach()}
        times = self.config.times_per_pair
        pairs, weight = self._noised(batch, times), batch.weight.to(self.backbone.device)
        if self._all_certain:
            rows = range(len(pairs.t) // 2)
            x_t, t, target = (x[: len(rows)] for x in (pairs.x_t, pairs.t, pairs.target))
            pred = self.backbone.predict(x_t, t, pairs.conditioning.select(rows))
            chosen = averaged(squared_error(pred, target), times)
            return chosen * weight, {"chosen_error": chosen.detach()}
        chosen, rejected = (averaged(error, times) for error in policy_errors(self.backbone, pairs))
        preference = batch.preference.to(chosen.device)
        losses = imitation_error(chosen, rejected, preference, self.config.temperature)
        metrics = {"chosen_error": chosen, "rejected_error": rejected}
        return losses * weight, pair_metrics(dpo_margin(chosen, rejected, self.beta), metrics)
