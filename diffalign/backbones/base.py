"""One interface over the model families: what the other rooms know of a diffusers pipeline."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from diffalign.backbones.attention import set_attention
from diffalign.backbones.loading import Source, choose_precision, loading, quiet
from diffalign.backbones.lora import adapters_off, add_lora, load_lora_state, lora_state
from diffalign.conditioning import Conditioning
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.process import Process, expand_as

ENCODE_BATCH = 64


class Backbone:
    """A generator whose network is tuned; VAE and text encoders stay frozen and are loaded when first needed.

    Fields:
        family, modality: what it is. config: how it was opened.
        core: the bare network. network: the same as the engine wraps it (DDP); `predict` calls this one.
        process: the forward process. latent_shape: `(C, h, w)`. resolution: `(height, width)` in pixels.
        device, dtype: where the network runs and in which number format; trained weights are float32.
        attention: name of the attention kernel in use.
    """

    modality: ClassVar[str] = "image"
    family: ClassVar[str]
    pipeline_class: ClassVar[Any]
    pipeline_options: ClassVar[dict[str, Any]] = {}

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
        self.dtype = choose_precision(config.precision, device)
        self.process = scheduler_process(source)
        self.core = self._load_network()
        self.factor = self._vae_factor()
        self.latent_shape = self._latent_shape(resolution)
        self.resolution = (self.latent_shape[1] * self.factor, self.latent_shape[2] * self.factor)
        self.attention = set_attention(self.core, config.attention, device, self.dtype)
        self._frozen = self._frozen_copy() if frozen_copy else None
        self._use_frozen = False
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
        shift, scale = _latent_scaling(vae, self.device)
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1], float32, of latents `[B, C, h, w]`; differentiable."""
        vae = self.pipeline().vae
        shift, scale = _latent_scaling(vae, self.device)
        images = vae.decode((latents.to(self.device) / scale + shift).to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    # The network

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, reference: bool = False) -> Tensor:
        """The network's output `[B, C, h, w]` in float32, in its own parameterisation.

        Args:
            x_t: noisy latents `[B, C, h, w]`. t: times `[B]` of the process.
            cond: conditioning of `B` rows, with sizes where the family has them.
            reference: use the frozen model, without gradients.
        """
        if not reference:
            return self._forward(
                self._frozen if self._use_frozen and self._frozen else self.network, x_t, t, cond
            )
        with torch.no_grad(), self.reference():
            return self._forward(self._frozen or self.core, x_t, t, cond)

    def guided(
        self, x_t: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning, scale: float | Tensor
    ) -> Tensor:
        """Classifier-free guidance (Ho and Salimans 2022) in one forward of twice the batch.

        Args:
            scale: guidance scale, a number or `[B]`; 1 is the conditional prediction.
            uncond: as from `unconditional`; sizes it lacks are those of `cond`.
        """
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
        before, self._use_frozen = self._use_frozen, self._frozen is not None
        try:
            with nullcontext() if self._use_frozen else adapters_off(self._lora_layers):
                yield
        finally:
            self._use_frozen = before

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

    def pipeline(self) -> Any:
        """A diffusers pipeline around the current policy weights; parts not loaded yet are loaded now.

        Each call returns the same object, whose network follows training and `reference()`.
        """
        if self._pipeline is None:
            self._pipeline = self.load_pipeline(self.core, self._encoder_dtype())
            for name in ("vae", "text_encoder", "text_encoder_2"):
                if (part := getattr(self._pipeline, name, None)) is not None:
                    part.requires_grad_(False).to(self.device)
        self._pipeline.unet = self._frozen if self._use_frozen else self.core
        return self._pipeline

    def load_pipeline(self, network: nn.Module, dtype: torch.dtype) -> Any:
        """A new pipeline on the CPU around a network, its other parts loaded in a number format."""
        parts = {"unet": network, **({"vae": self._other_vae(dtype)} if self.config.vae else {})}
        pipeline: Any = loading(
            f"pipeline {self.source.name}",
            lambda: self.pipeline_class.from_pretrained(
                self.source.path,
                torch_dtype=dtype,
                **parts,
                **self.pipeline_options,
                **self.source.arguments(),
            ),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def release_encoders(self) -> None:
        """Free the memory of VAE and text encoders; they are loaded again when needed."""
        self._pipeline = None

    def _load_network(self) -> nn.Module:
        master = torch.float32 if self.config.tune == "full" else self.dtype
        network = loading(
            f"network of {self.source.name}",
            lambda: UNet2DConditionModel.from_pretrained(
                self.source.path, subfolder="unet", torch_dtype=master, **self.source.arguments()
            ),
        )
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
            network.forward = _autocast(network.forward, self.device.type, self.dtype)  # type: ignore[method-assign]

    def _encoder_dtype(self) -> torch.dtype:
        """Number format of VAE and text encoders: one for both, since the pipeline's latents take the text's.

        fp16 is used only with another VAE, since the ordinary SDXL VAE overflows in it.
        """
        half = self.dtype == torch.bfloat16 or (self.dtype == torch.float16 and self.config.vae is not None)
        return self.dtype if half and self.device.type == "cuda" else torch.float32

    def _other_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        return loading(
            f"VAE {self.config.vae}",
            lambda: AutoencoderKL.from_pretrained(self.config.vae, torch_dtype=dtype, use_safetensors=True),
        )

    def _vae_factor(self) -> int:
        """Pixels per latent along one side, from the VAE's configuration alone."""
        if self.config.vae is not None:
            config = loading(f"VAE {self.config.vae}", lambda: AutoencoderKL.load_config(self.config.vae))
        else:
            revision = {"revision": self.source.revision} if self.source.revision else {}
            config = loading(
                f"VAE of {self.source.name}",
                lambda: AutoencoderKL.load_config(self.source.path, subfolder="vae", **revision),
            )
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def _latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        config: Any = self.core.config
        side = config.sample_size if resolution is None else resolution / self.factor
        if side != int(side):
            raise DiffalignError(
                f"resolution is {resolution}; expected a multiple of {self.factor} for {self.source.name}."
            )
        return (config.in_channels, int(side), int(side))

    def _forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        # Embeddings are cast once here rather than in each of the cross-attention layers.
        cond = cond.to(self.device, self.dtype)
        out = network(x_t, self.process.model_time(t), return_dict=False, **self._network_inputs(cond))[0]
        return out.float()

    def _network_inputs(self, cond: Conditioning) -> dict[str, Any]:
        return {"encoder_hidden_states": cond.embeddings}

    def _encode_text(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        raise NotImplementedError

    def _encode_unconditional(self, pipeline: Any) -> Conditioning:
        raise NotImplementedError


def scheduler_process(source: Source) -> Process:
    """The forward process of a model, from its scheduler's configuration.

    Raises:
        DiffalignError: the configuration is missing or describes a process that is not known here.
    """
    revision = {"revision": source.revision} if source.revision else {}
    config = loading(
        f"scheduler of {source.name}",
        lambda: DDPMScheduler.load_config(source.path, subfolder="scheduler", **revision),
    )
    try:
        return Process.from_scheduler(dict(config))
    except ValueError as error:
        raise DiffalignError(f"the scheduler of {source.name} is not supported: {error}") from error


def _autocast(forward: Callable[..., Any], device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    """A network's forward under autocast, with its output in the format of its input.

    Schedulers of diffusers give the latents the output's format, which then has to fit the VAE.
    """

    @functools.wraps(forward)
    def run(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype):
            out = forward(sample, *args, **kwargs)
        if isinstance(out, tuple):
            return (out[0].to(sample.dtype), *out[1:])
        out.sample = out.sample.to(sample.dtype)
        return out

    return run


def _latent_scaling(vae: Any, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
    """Shift and scale with `network_latent = (vae_latent - shift) * scale`."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean = torch.tensor(config.latents_mean, device=device).reshape(1, -1, 1, 1)
        std = torch.tensor(config.latents_std, device=device).reshape(1, -1, 1, 1)
        return mean, config.scaling_factor / std
    return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor


def _with_missing(cond: Conditioning, other: Conditioning) -> Conditioning:
    """`cond` with the fields it lacks taken from `other`."""
    return Conditioning(**{**other.tensors(), **cond.tensors()})
