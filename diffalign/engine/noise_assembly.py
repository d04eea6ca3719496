"""Puts together a run that learns noises: prompts, a reward with gradients, the generator to differentiate through."""

from __future__ import annotations

from diffalign.config import RunConfig, trainer_class, trainer_config
from diffalign.engine.assembly import Ingredients, OpenedOnce, generator_parts, picture_prompts
from diffalign.engine.online_assembly import gold_metric, prompt_set
from diffalign.engine.parallel import Parallel
from diffalign.engine.rollout_assembly import image_reward
from diffalign.errors import DiffalignError
from diffalign.inference.objective import differentiable_rewards
from diffalign.inference.own_sampler import check_steps
from diffalign.progress import Reporter
from diffalign.rewards import Reward, place


def assemble_noises(config: RunConfig, parallel: Parallel, reporter: Reporter) -> Ingredients:
    """The parts of a run whose method differentiates a reward of the pictures that noises become.

    Raises:
        DiffalignError: bad model, prompts or reward, a reward without gradients, sharding, or few steps of an ordinary
            model.
    """
    options = trainer_config(config)
    if parallel.sharded:
        raise DiffalignError(
            f"trainer.method {config.trainer['method']} differentiates through the generator, which sharded runs "
            "(FSDP) do not support. Use one process or DDP (configs/accelerate/ddp.yaml)."
        )
    pictures, prompts = picture_prompts(config), prompt_set(config)
    opened = OpenedOnce(config, parallel)
    reward = place(with_gradients(image_reward(options.reward), config), opened().device)
    check_steps(opened(), options.steps, None)
    trainer = trainer_class(config)(options, opened(), config.seed)
    trainer.reward, trainer.prompts = reward, prompts.prompts
    parts = generator_parts(config, trainer, prompts, None, pictures, reporter)
    parts.best_metric = gold_metric(config, parts.monitor)
    return parts


def with_gradients(reward: Reward, config: RunConfig) -> Reward:
    """The reward itself.

    Raises:
        DiffalignError: it has no gradients; says which have.
    """
    if not reward.differentiable:
        raise DiffalignError(
            f"trainer.method {config.trainer['method']} needs gradients, but trainer.reward {reward.name!r} has none. "
            f"Rewards with gradients: {', '.join(differentiable_rewards())}."
        )
    return reward
