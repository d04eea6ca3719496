"""One step of Diffusion-DPO as the public scripts take it, to measure ours against.

Everything happens in the loop and in fp32: JPEG decoding, the VAE, tokenizers and both text encoders, the policy and
the reference one after the other, the optimiser. Follows the step of diffusers' `train_diffusion_dpo_sdxl.py`
(research_projects), with the picture transforms of its data loader and the LoRA layers of our recipe.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torchvision import transforms

from diffalign.backbones import resolve_model
from diffalign.backbones.loading import quiet
from diffalign.backbones.lora import target_modules
from diffalign.config import RunConfig
from diffalign.data.records import PreferenceRecord, read_image
from diffalign.randomness import batch_records


class ReferenceStyleStep:
    """A model with LoRA and an optimiser; each call takes one step on the next pairs."""

    def __init__(self, config: RunConfig, records: Sequence[PreferenceRecord], device: torch.device) -> None:
        self.config, self.records, self.device = config, records, device
        with quiet():
            self.pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
                resolve_model(config.model.path), torch_dtype=torch.float32
            ).to(device)
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            part.requires_grad_(False)
        self.unet = self.trainable(config)
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.optim.lr, weight_decay=config.optim.weight_decay
        )
        side = config.data.resolution
        self.transform = transforms.Compose(
            [
                transforms.Resize(side, transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        self.batches = self._batches()

    def trainable(self, config: RunConfig) -> Any:
        """The network, with what is trained of it."""
        return add_lora(self.pipeline.unet, config)

    def __call__(self) -> float:
        """Take a step and return its loss."""
        loss = self.loss(next(self.batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self, batch: list[PreferenceRecord]) -> Tensor:
        """Mean loss of a batch of pairs: eq. 14 of Wallace et al. 2023 on means over latent elements."""
        inputs, noise = self.noised(batch)
        chosen, rejected = self.errors(inputs, noise).chunk(2)
        self.unet.disable_adapters()
        with torch.no_grad():
            ref_chosen, ref_rejected = self.errors(inputs, noise).chunk(2)
        self.unet.enable_adapters()
        beta = self.config.trainer["beta"]
        margin = -0.5 * beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
        return -F.logsigmoid(margin).mean()

    def errors(self, inputs: dict[str, Any], noise: Tensor) -> Tensor:
        """The network's squared errors `[2B]`, means over latent elements."""
        return (self.unet(**inputs).sample - noise).square().mean((1, 2, 3))

    def noised(self, batch: list[PreferenceRecord], shared: bool = True) -> tuple[dict[str, Any], Tensor]:
        """What the network is given for chosen, then rejected pictures, and their noise `[2B, C, h, w]`.

        Args:
            shared: both pictures of a pair get the same noise and time.
        """
        pixels, time_ids = self.pictures(batch)
        vae = self.pipeline.vae
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            states, pooled = self.text([record.prompt for record in batch])
        noise = torch.randn_like(latents)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),), device=self.device)
        if shared:
            noise, t = noise.chunk(2)[0].repeat(2, 1, 1, 1), t.chunk(2)[0].repeat(2)
        inputs = {
            "sample": self.scheduler.add_noise(latents, noise, t),
            "timestep": t,
            "encoder_hidden_states": states.repeat(2, 1, 1),
            "added_cond_kwargs": {"time_ids": time_ids, "text_embeds": pooled.repeat(2, 1)},
        }
        return inputs, noise

    def pictures(self, batch: list[PreferenceRecord]) -> tuple[Tensor, Tensor]:
        """Chosen pictures, then rejected ones, `[2B, 3, R, R]` in [-1, 1], and their time ids `[2B, 6]`."""
        chosen = [record.image_0 if record.label_0 >= 0.5 else record.image_1 for record in batch]
        rejected = [record.image_1 if record.label_0 >= 0.5 else record.image_0 for record in batch]
        pixels, time_ids = [], []
        side = self.config.data.resolution
        for source in chosen + rejected:
            image = Image.open(io.BytesIO(read_image(source))).convert("RGB")
            pixels.append(self.transform(image))
            time_ids.append([image.height, image.width, 0, 0, side, side])
        return torch.stack(pixels).to(self.device), torch.tensor(time_ids, device=self.device).float()

    def text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """States `[B, L, D]` and pooled embedding `[B, P]` of both text encoders."""
        pipeline, outputs = self.pipeline, []
        pairs = (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        )
        for tokenizer, encoder in pairs:
            tokens = tokenizer(
                prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            outputs.append(encoder(tokens.input_ids.to(self.device), output_hidden_states=True))
        return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[-1][0]

    def _batches(self) -> Iterator[list[PreferenceRecord]]:
        for step in range(self.config.optim.steps):
            rows = batch_records(self.config.seed, step, self.config.optim.batch_size, len(self.records))
            yield [self.records[row] for row in rows]


def add_lora(unet: Any, config: RunConfig) -> Any:
    """The network with the adapters of our recipe, through peft as the scripts do."""
    lora = config.model.lora
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=lora.rank,
            lora_alpha=int(lora.alpha),
            target_modules=target_modules(unet, lora.targets),
            init_lora_weights="gaussian",
        )
    )
    return unet.train()
