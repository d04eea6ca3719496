"""One file per algorithm. `TRAINERS` names them; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from diffalign.errors import DiffalignError, did_you_mean

TRAINERS: dict[str, str] = {
    "awm": "diffalign.trainers.awm:AWMTrainer",
    "dpo": "diffalign.trainers.dpo:DPOTrainer",
    "dragon": "diffalign.trainers.dragon:DragonTrainer",
    "dspo": "diffalign.trainers.dspo:DSPOTrainer",
    "hypernoise": "diffalign.trainers.hypernoise:HypernoiseTrainer",
    "inpo": "diffalign.trainers.inpo:InPOTrainer",
    "kto": "diffalign.trainers.kto:KTOTrainer",
    "latent_reward": "diffalign.trainers.latent_reward:LatentRewardTrainer",
    "listwise": "diffalign.trainers.listwise:ListwiseTrainer",
    "mapo": "diffalign.trainers.mapo:MaPOTrainer",
    "nft": "diffalign.trainers.nft:NFTTrainer",
    "online_preference": "diffalign.trainers.online_preference:OnlinePreferenceTrainer",
    "orw_cfm": "diffalign.trainers.orw_cfm:ORWTrainer",
    "parrot": "diffalign.trainers.parrot:ParrotTrainer",
    "policy_gradient": "diffalign.trainers.policy_gradient:PolicyGradientTrainer",
    "prdp": "diffalign.trainers.prdp:PRDPTrainer",
    "raft": "diffalign.trainers.raft:RAFTTrainer",
    "rpo": "diffalign.trainers.rpo:RPOTrainer",
    "rwr": "diffalign.trainers.rwr:RWRTrainer",
    "sft": "diffalign.trainers.sft:SFTTrainer",
    "simpo": "diffalign.trainers.simpo:SimPOTrainer",
    "step_preference": "diffalign.trainers.step_preference:StepPreferenceTrainer",
    "pal": "diffalign.trainers.pal:PALTrainer",
    "reward_model": "diffalign.trainers.reward_model:RewardModelTrainer",
}


def trainer_class(method: str) -> Any:
    """The trainer class of a method.

    Raises:
        DiffalignError: no such method; the nearest one is named.
    """
    if method not in TRAINERS:
        hint = did_you_mean(method, list(TRAINERS))
        raise DiffalignError(f"trainer.method is {method!r}; expected one of: {', '.join(TRAINERS)}.{hint}")
    module, name = TRAINERS[method].split(":")
    return getattr(importlib.import_module(module), name)
