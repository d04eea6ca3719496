"""One interface over the model families: what the other rooms know of a diffusers pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffalign.backbones.attention import set_attention
from diffalign.backbones.guidance import guidance_inputs, is_told_guidance, tell_guidance
from diffalign.backbones.loading import Source, choose_precision, loading, quiet
from diffalign.backbones.lora import adapters_off, add_lora, load_lora_state, lora_state
from diffalign.backbones.meta import unet_inputs
from diffalign.backbones.precision import autocast_forward
from diffalign.backbones.quantized import compute_in, quantization_arguments
from diffalign.backbones.schedule import scheduler_config, scheduler_process
from diffalign.backbones.vae import latent_scaling, other_vae, vae_factor
from diffalign.conditioning import Conditioning
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.precision import at_least_float32
from diffalign.process import expand_as

ENCODE_BATCH = 64


class Backbone:
    """A generator whose network is tuned; VAE and text encoders stay frozen and are loaded when first needed.

    Fields:
        family, modality: what it is. config: how it was opened.
        network_name, network_class: part of the pipeline that is tuned, and its class in diffusers.
        left_out: parts that a model may lack, and that `model.text_encoder_3=false` leaves out.
        core: the bare network. network: the same as the engine wraps it (DDP); `predict` calls this one.
        process: the forward process. latent_shape: `(C, h, w)`. resolution: `(height, width)` in pixels.
        is_reference: whether this is inside `reference()`.
        anchor: adapter weights that the reference carries, with their parameters; none: it has no adapters.
        prompt_prefix: put before the prompts of pictures (`model.prompt_prefix`); empty inside `reference()`.
        device, dtype: where the network runs and in which number format; trained weights are float32.
        attention: name of the attention kernel in use.
    """

    modality: ClassVar[str] = "image"
    family: ClassVar[str]
    pipeline_class: ClassVar[Any]
    pipeline_options: ClassVar[dict[str, Any]] = {}
    left_out: ClassVar[tuple[str, ...]] = ()
    network_name: ClassVar[str] = "unet"
    network_class: ClassVar[Any] = UNet2DConditionModel

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        device: torch.device,
        resolution: int | None,
        frozen_copy: bool,
        seed: int,
    ):
        self.source, self.config, self.device = source, config, device
        self.prompt_prefix = config.prompt_prefix
        self.dtype = choose_precision(config.precision, device)
        self.core = self._load_network()
        self.factor = vae_factor(source, config)
        self.latent_shape = self._latent_shape(resolution)
        self.resolution = (self.latent_shape[1] * self.factor, self.latent_shape[2] * self.factor)
        self.process = scheduler_process(source, config.few_steps, self._step_options)
        self.attention = set_attention(self.core, config.attention, device, self.dtype)
        self._frozen = self._frozen_copy() if frozen_copy else None
        self._use_frozen = self.is_reference = False
        self.anchor: Sequence[tuple[nn.Parameter, Tensor]] = ()
        self._lora_layers = self._make_trainable(seed)
        self.core.to(device)
        self._run_in_precision(self.core)
        self.network: nn.Module = self.core
        self._pipeline: Any = None
        self._unconditional: Conditioning | None = None

    # Text

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning of prompts: float32, without sizes; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        pipeline = self.pipeline()
        with torch.no_grad(), quiet():
            parts = [
                self._encode_text(pipeline, unique[start : start + ENCODE_BATCH]).map(Tensor.float)
                for start in range(0, len(unique), ENCODE_BATCH)
            ]
        rows = {prompt: row for row, prompt in enumerate(unique)}
        return Conditioning.concat(parts).select([rows[prompt] for prompt in prompts])

    def unconditional(self, n: int) -> Conditioning:
        """What the pipeline uses as the unconditional branch of guidance, `n` rows, without sizes."""
        if self._unconditional is None:
            with torch.no_grad(), quiet():
                self._unconditional = self._encode_unconditional(self.pipeline()).map(Tensor.float)
        return self._unconditional.repeat(n)

    def with_sizes(self, cond: Conditioning, original: Tensor, crop: Tensor, target: Tensor) -> Conditioning:
        """Add size conditioning where the family has it.

        Args:
            original: `[B, 2]` height, width of the pictures before resizing. crop: `[B, 2]` top, left.
            target: `[B, 2]` height, width after cropping.
        """
        return cond

    # Pictures

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[B, C, h, w]` of the latents of images `[B, 3, H, W]` in [-1, 1].

        Both are float32 in the network's latent space: sample as `mean + std * noise`.
        """
        vae = self.pipeline().vae
        with torch.no_grad():
            posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        shift, scale = latent_scaling(vae, self.device)
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1], at least float32, of latents `[B, C, h, w]`; differentiable."""
        vae = self.pipeline().vae
        shift, scale = latent_scaling(vae, self.device)
        images = vae.decode((latents.to(self.device) / scale + shift).to(vae.dtype), return_dict=False)[0]
        return (at_least_float32(images) / 2 + 0.5).clamp(0, 1)

    # The network

    @property
    def acting(self) -> nn.Module:
        """The bare network that answers: `core`, or inside `reference()` its frozen copy if there is one."""
        return self._frozen if self._use_frozen and self._frozen is not None else self.core

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, reference: bool = False) -> Tensor:
        """The network's output `[B, C, h, w]` in float32 (float64 of float64 weights), in its own parameterisation.

        Args:
            x_t: noisy latents `[B, C, h, w]`. t: times `[B]` of the process.
            cond: conditioning of `B` rows, with sizes where the family has them.
            reference: use the frozen model, without gradients.
        """
        if not reference:
            return self._forward(self.acting if self._use_frozen else self.network, x_t, t, cond)
        with torch.no_grad(), self.reference():
            return self._forward(self._frozen or self.core, x_t, t, cond)

    def guided(
        self, x_t: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning, scale: float | Tensor
    ) -> Tensor:
        """Classifier-free guidance (Ho and Salimans 2022) in one forward of twice the batch.

        A network that is told its guidance scale gets it in one forward of the batch.

        Args:
            scale: guidance scale, a number or `[B]`; 1 is the conditional prediction.
            uncond: as from `unconditional`; sizes it lacks are those of `cond`. Unused by a network that is told.
        """
        if is_told_guidance(self.core):
            return self.predict(x_t, t, tell_guidance(cond, scale))
        both = Conditioning.concat([_with_missing(uncond, cond), cond])
        off, on = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return off + (expand_as(scale, on) if isinstance(scale, Tensor) else scale) * (on - off)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block `predict` is the frozen model: its copy if there is one, else adapters are off.

        Raises:
            DiffalignError: full fine-tuning without a frozen copy has no reference.
        """
        if self._frozen is None and self.config.tune == "full":
            raise DiffalignError("full fine-tuning has no reference model without a frozen copy.")
        before = self._use_frozen, self.is_reference
        self._use_frozen, self.is_reference = self._frozen is not None, True
        try:
            with (
                self.unprefixed(),
                nullcontext() if self._use_frozen else adapters_off(self._lora_layers, self.anchor),
            ):
                yield
        finally:
            self._use_frozen, self.is_reference = before

    @contextmanager
    def unprefixed(self) -> Iterator[None]:
        """Inside the block pictures are made for the prompts as they are, as those of the base model."""
        before, self.prompt_prefix = self.prompt_prefix, ""
        try:
            yield
        finally:
            self.prompt_prefix = before

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside the block the network has no dropout and no gradients."""
        training = self.core.training
        self.core.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.core.train(training)

    def scheduler_options(self, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The scheduler's configuration, and what its `set_timesteps` is given besides the number of steps."""
        config = scheduler_config(self.source)
        return config, self._step_options(config, steps)

    # Trained weights

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained, all float32."""
        return [(name, p) for name, p in self.core.named_parameters() if p.requires_grad]

    def trainable_state(self) -> dict[str, Tensor]:
        """Trained weights by name, sharing memory with the network: adapters, or the whole network."""
        if self.config.tune == "lora":
            return lora_state(self.core)
        return {name: value.detach() for name, value in self.core.state_dict().items()}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Copy trained weights in place, so that optimisers keep their parameters.

        Raises:
            DiffalignError: names or shapes differ from the network's.
        """
        if self.config.tune == "lora":
            load_lora_state(self.core, state)
            return
        try:
            self.core.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split()[:40])
            raise DiffalignError(f"the weights do not fit the network: {reason}") from error

    # The whole model

    @property
    def call_options(self) -> dict[str, Any]:
        """What the pipeline has to be called with besides prompts, sizes, steps and guidance."""
        return {}

    def pipeline(self) -> Any:
        """A diffusers pipeline around the current policy weights; parts not loaded yet are loaded now.

        Each call returns the same object, whose network follows training and `reference()`.
        """
        if self._pipeline is None:
            self._pipeline = self.load_pipeline(self.core, self._encoder_dtype())
            for name, part in self._pipeline.components.items():
                if isinstance(part, nn.Module) and name != self.network_name:
                    part.requires_grad_(False).to(self.device)
        setattr(self._pipeline, self.network_name, self.acting)
        return self._pipeline

    def load_pipeline(self, network: nn.Module, dtype: torch.dtype) -> Any:
        """A new pipeline on the CPU around a network, its other parts loaded in a number format."""
        parts = {
            self.network_name: network,
            **({"vae": other_vae(self.config, dtype)} if self.config.vae else {}),
        }
        pipeline: Any = loading(
            f"pipeline {self.source.name}",
            lambda: self.pipeline_class.from_pretrained(
                self.source.path,
                torch_dtype=dtype,
                **parts,
                **self.pipeline_options,
                **self.absent_parts(self.source, self.config),
                **self.source.arguments(),
            ),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @classmethod
    def absent_parts(cls, source: Source, config: ModelConfig) -> dict[str, None]:
        """Parts to do without; diffusers wants to be told even of those that the model's index says are missing."""
        have = {name for name, entry in source.index.items() if isinstance(entry, list) and entry[0]}
        return {n: None for n in cls.left_out if n not in have or not config.text_encoder_3}

    def release_encoders(self) -> None:
        """Free the memory of VAE and text encoders; they are loaded again when needed."""
        self._pipeline = None

    def _load_network(self) -> nn.Module:
        master = torch.float32 if self.config.tune == "full" else self.dtype
        network = loading(
            f"network of {self.source.name}",
            lambda: self.network_class.from_pretrained(
                self.source.path,
                subfolder=self.network_name,
                torch_dtype=master,
                **quantization_arguments(self.config, self.dtype),
                **self.source.arguments(),
            ),
        )
        compute_in(network, self.dtype)
        if self.config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def _make_trainable(self, seed: int) -> list[Any]:
        self.core.train()
        if self.config.tune == "full":
            self.core.requires_grad_(True)
            return []
        return add_lora(self.core, self.config.lora, seed, autocast=self.dtype != torch.float32)

    def _frozen_copy(self) -> nn.Module:
        """The base network as the reference, with all matrices in the precision they are used in.

        Norms keep the policy's format, so that policy and reference agree exactly at step 0.
        """
        frozen = copy.deepcopy(self.core).requires_grad_(False).eval()
        for module in frozen.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(self.dtype)
        frozen.to(self.device)
        self._run_in_precision(frozen)
        return frozen

    def _run_in_precision(self, network: nn.Module) -> None:
        """Make the network's forward run under autocast, whoever calls it: trainer, DDP or pipeline."""
        if self.config.compile:
            network.forward = torch.compile(network.forward)  # type: ignore[method-assign]
        if self.dtype != torch.float32:
            network.forward = autocast_forward(network.forward, self.device.type, self.dtype)  # type: ignore[method-assign]

    def _encoder_dtype(self) -> torch.dtype:
        """Number format of VAE and text encoders: one for both, since the pipeline's latents take the text's.

        fp16 is used only with another VAE, since the ordinary SDXL VAE overflows in it.
        """
        half = self.dtype == torch.bfloat16 or (self.dtype == torch.float16 and self.config.vae is not None)
        return self.dtype if half and self.device.type == "cuda" else torch.float32

    def _latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        channels, side, multiple = self._latent_facts()
        side = side if resolution is None else resolution / self.factor
        if side % multiple:
            raise DiffalignError(
                f"resolution is {resolution}; expected a multiple of {self.factor * multiple} for "
                f"{self.source.name}."
            )
        return (channels, int(side), int(side))

    def _latent_facts(self) -> tuple[int, float, int]:
        """Channels of the latents, their side for the model's own resolution, and what a side must be a multiple of."""
        config: Any = self.core.config
        return config.in_channels, config.sample_size, 1

    def _step_options(self, config: dict[str, Any], steps: int) -> dict[str, Any]:
        """What the pipeline gives `set_timesteps` of a scheduler of this configuration besides the steps' number."""
        return {}

    def _forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        # Embeddings are cast once here rather than in each of the cross-attention layers.
        cond = cond.to(self.device, self.dtype)
        return at_least_float32(self._call(network, x_t, self.process.model_time(t), cond))

    def _call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """The network's output `[B, C, h, w]` at times `[B]` as the network counts them."""
        output: Tensor = network(x_t, time, return_dict=False, **self._network_inputs(cond))[0]
        return output

    @classmethod
    def meta_inputs(cls, config: Any, side: int, dtype: torch.dtype) -> dict[str, Any]:
        """What a network of this configuration is given for two `side` x `side` latents, as shapes without data."""
        return unet_inputs(config, side, dtype)

    def _network_inputs(self, cond: Conditioning) -> dict[str, Any]:
        """What a UNet is given besides latents and time."""
        told = guidance_inputs(self.core, cond, self.config.guidance_embedding)
        return {"encoder_hidden_states": cond.embeddings, **told}

    def _encode_text(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        raise NotImplementedError

    def _encode_unconditional(self, pipeline: Any) -> Conditioning:
        raise NotImplementedError


def _with_missing(cond: Conditioning, other: Conditioning) -> Conditioning:
    """`cond` with the fields it lacks taken from `other`."""
    return Conditioning(**{**other.tensors(), **cond.tensors()})
