"""Scorers of generated media, by name. `REWARDS` is the whole catalogue; nothing is imported before it is asked for."""

from __future__ import annotations

from diffalign.rewards.base import Facts, FunctionReward, Reward, RewardOutput, distinct, facts_of, place
from diffalign.rewards.specs import Spec, build_reward

REWARDS: dict[str, str] = {
    "clip": "diffalign.rewards.clip:ClipScore",
    "aesthetic-v1": "diffalign.rewards.aesthetic:AestheticV1",
    "aesthetic-v2": "diffalign.rewards.aesthetic:AestheticV2",
    "pickscore": "diffalign.rewards.pickscore:PickScore",
    "hpsv2": "diffalign.rewards.hps:HpsV2",
    "hpsv2.1": "diffalign.rewards.hps:HpsV21",
    "hpsv3": "diffalign.rewards.hpsv3:HPSv3",
    "image-reward": "diffalign.rewards.image_reward:ImageReward",
    "http-judge": "diffalign.rewards.http_judge:HttpJudge",
    "jpeg-compressibility": "diffalign.rewards.compressibility:JpegCompressibility",
    "jpeg-incompressibility": "diffalign.rewards.compressibility:JpegIncompressibility",
    "sharpness": "diffalign.rewards.diagnostics:SHARPNESS",
    "saturation": "diffalign.rewards.diagnostics:SATURATION",
    "brightness": "diffalign.rewards.diagnostics:BRIGHTNESS",
    "colourfulness": "diffalign.rewards.diagnostics:COLOURFULNESS",
    "trained": "diffalign.rewards.preference_head:TrainedReward",
    "latent": "diffalign.inference.latent_reward:LatentReward",
    "scenes-judge": "diffalign.rewards.scenes_judge:ScenesJudge",
    "frechet": "diffalign.rewards.sets.rewards:FrechetReward",
    "kid": "diffalign.rewards.sets.rewards:KidReward",
    "cmmd": "diffalign.rewards.sets.rewards:CmmdReward",
    "vendi": "diffalign.rewards.sets.rewards:VendiReward",
    "diversity": "diffalign.rewards.sets.rewards:DiversityReward",
    "exemplar-frechet": "diffalign.rewards.sets.exemplars:ExemplarFrechet",
    "exemplar-density": "diffalign.rewards.sets.exemplars:ExemplarDensity",
    "exemplar-nearest": "diffalign.rewards.sets.exemplars:ExemplarNearest",
    "scenes-clip": "diffalign.rewards.scenes_scorers:ScenesClip",
    "scenes-aesthetic": "diffalign.rewards.scenes_scorers:ScenesAesthetic",
    "scenes-preference": "diffalign.rewards.scenes_scorers:ScenesPreference",
    "scenes-ensemble": "diffalign.rewards.scenes_scorers:ScenesEnsemble",
    "scenes-latent": "diffalign.inference.latent_reward:ScenesLatent",
    "weighted-sum": "diffalign.rewards.combine.weighted_sum:WeightedSum",
    "ensemble-mean": "diffalign.rewards.combine.ensembles:EnsembleMean",
    "wco": "diffalign.rewards.combine.ensembles:WorstCase",
    "uwo": "diffalign.rewards.combine.ensembles:UncertaintyWeighted",
    "entropic": "diffalign.rewards.combine.ensembles:Entropic",
    "reward-robust": "diffalign.rewards.combine.ensembles:RewardRobust",
    "mc-dropout": "diffalign.rewards.combine.dropout:MCDropout",
    "augmented": "diffalign.rewards.combine.augmented:Augmented",
    "inverse-uncertainty": "diffalign.rewards.combine.weights:InverseUncertainty",
    "log-sigmoid": "diffalign.rewards.combine.against_base:LogSigmoid",
    "par": "diffalign.rewards.combine.against_base:Par",
    "group-win-rate": "diffalign.rewards.combine.in_group:GroupWinRate",
    "rank-average": "diffalign.rewards.combine.in_group:RankAverage",
    "constrained": "diffalign.rewards.combine.constrained:Constrained",
    "guarded": "diffalign.rewards.guard:Guarded",
}

__all__ = [
    "REWARDS",
    "Facts",
    "FunctionReward",
    "Reward",
    "RewardOutput",
    "Spec",
    "distinct",
    "facts_of",
    "load_reward",
    "place",
]


def load_reward(spec: Spec) -> Reward:
    """A reward from its specification (see `diffalign.rewards.specs`): a name, `module:Name`, a mapping or a file.

    Raises:
        DiffalignError: unknown name or option (the nearest is named), or what was found is not a reward.
    """
    return build_reward(spec, REWARDS)
