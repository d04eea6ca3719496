"""Train the tiny scorers: a CLIP on scenes, then an aesthetic head and preference heads on its frozen embeddings.

Stages of `python -m diffalign.samples.build`: `clip` needs the tokenizer of `tiny-sdxl`, `scorers` needs the CLIP
and the preference pairs. Both are deterministic from the seed.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.objectives.reward_model import credit, ties_loss
from diffalign.randomness import derive_seed, generator
from diffalign.rewards.aesthetic import AestheticHead
from diffalign.rewards.clip_model import ClipModel, load_clip
from diffalign.rewards.heads import PreferenceSpec, build_head, spec_to_dict
from diffalign.rewards.preprocess import normalize
from diffalign.rewards.scenes_scorers import AESTHETIC, PREFERENCE
from diffalign.samples.architectures import MAX_TOKENS
from diffalign.samples.degrade import degrade
from diffalign.samples.judge import MIN_CONTRAST, find_objects
from diffalign.samples.training import autocast, learning_rate, pictures, report
from diffalign.trainers.reward_model import member_weights

EMBEDDING = 128
CLIP_PICTURES = 12_000
RATED_PICTURES = 2_000
MEMBERS = 5
HIDDEN = 64
DROPOUT = 0.2
TIE_FACTOR = 5.0
# Strength of the pull of a pair's two scores to a mean of zero. Without it each member may add an offset of its own to
# all pictures of a prompt, which no pair shows, and the members' spread would measure that (Eisenstein et al. 2023).
CENTERING = 0.02
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": EMBEDDING,
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 2, 1], "width": 16},
    "text_cfg": {
        "context_length": MAX_TOKENS,
        "hf_tokenizer_name": ".",  # not empty: open_clip then takes the tokenizer from the model's own folder
        "width": 64,
        "heads": 4,
        "layers": 3,
    },
}


def train_clip(out: Path, seed: int, steps: int, batch: int, device: str) -> None:
    """Contrastive training on degraded scenes with their captions; writes an open_clip `local-dir` folder."""
    torch.manual_seed(derive_seed("clip", seed))
    folder = out / "scorers" / "clip"
    write_clip_config(out / "tiny-sdxl" / "tokenizer", folder)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images, captions = pictures(seed + 3, CLIP_PICTURES)
    tokens, which = tokenize_distinct(tokenizer, captions)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).to(device).train()
    model.visual.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    draws = generator("clip augmentation", seed)
    started, running = time.time(), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 2e-3)
        rows = torch.randint(len(images), (batch,), generator=draws)
        loss = contrastive_step(model, images[rows.numpy()], tokens[which[rows]], which[rows], draws, device)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            report("clip", step, steps, float(np.mean(running[-50:])), started)
            save_clip(model, folder)


def write_clip_config(tokenizer: Path, folder: Path) -> None:
    """Put the configuration and the tokenizer where open_clip looks for them: both in the model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder / path.name)
    size = len(json.loads((folder / "vocab.json").read_text()))
    config = {**CLIP_CONFIG, "text_cfg": {**CLIP_CONFIG["text_cfg"], "vocab_size": size}}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 64}}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n")


def save_clip(model: CLIP, folder: Path) -> None:
    """Write the weights in half precision; open_clip reads them into a model of any precision."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    save_file({k: t.cpu().contiguous() for k, t in state.items()}, folder / "open_clip_model.safetensors")


def tokenize_distinct(tokenizer: open_clip.HFTokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids `[K, L]` of the K distinct captions, and which of them each caption is `[N]`."""
    distinct = list(dict.fromkeys(captions))
    number = {text: i for i, text in enumerate(distinct)}
    return tokenizer(distinct), torch.tensor([number[text] for text in captions])


def contrastive_step(
    model: CLIP, images: np.ndarray, tokens: Tensor, which: Tensor, draws: torch.Generator, device: str
) -> Tensor:
    """Loss of one batch of pictures `[B, 64, 64, 3]` uint8, degraded."""
    pixels = normalize(degrade(unit(images), draws)).to(device, memory_format=torch.channels_last)
    with autocast(device):
        pictured = model.encode_image(pixels)
    pictured = F.normalize(pictured.float(), dim=-1)
    said = model.encode_text(tokens.to(device), normalize=True)
    return contrastive_loss(pictured, said, model.logit_scale.exp().clamp(max=100), which.to(device))


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, which: Tensor) -> Tensor:
    """Symmetric InfoNCE of normalised embeddings `[B, D]` in which equal captions share the target.

    Radford et al. 2021, fig. 3; the target is spread over all pairs of one caption, as in UniCL (Yang et al. 2022).
    """
    logits = scale * images @ texts.T
    target = (which[:, None] == which[None, :]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass(frozen=True)
class Pairs:
    """Preference pairs.

    Fields:
        captions: N of them. images: `[N, 2, 64, 64, 3]` uint8. labels: `[N]` of the first image: 1, 0; 0.5 is a tie.
    """

    captions: list[str]
    images: np.ndarray
    labels: Tensor


def read_pairs(file: Path) -> Pairs:
    """The pairs of a parquet file of the embedded world."""
    table = pq.read_table(file, columns=["caption", "jpg_0", "jpg_1", "label_0"])
    columns = [[_pixels(jpeg) for jpeg in table[name].to_pylist()] for name in ("jpg_0", "jpg_1")]
    labels = torch.tensor(table["label_0"].to_pylist(), dtype=torch.float32)
    return Pairs(table["caption"].to_pylist(), np.stack([np.stack(c) for c in columns], 1), labels)


def _pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def unit(images: np.ndarray) -> Tensor:
    """uint8 `[N, H, W, 3]` to float `[N, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def embed(clip: ClipModel, pixels: Tensor) -> Tensor:
    """Embeddings `[N, D]` of pictures `[N, 3, 64, 64]` in [0, 1]."""
    return torch.cat([clip.embed_images(chunk).cpu() for chunk in pixels.split(256)])


def train_scorers(out: Path, seed: int, device: str) -> None:
    """Train the aesthetic head and the preference heads."""
    clip = load_clip(str(out / "scorers" / "clip")).to(device)
    pairs = read_pairs(out / "preferences" / "train-00000.parquet")
    train_aesthetic(clip, pairs, out / "scorers" / AESTHETIC, seed)
    train_preference(clip, pairs, out / "scorers" / PREFERENCE, seed)


def rating(image: np.ndarray) -> float:
    """A rating from 1 to 10 of a picture `[64, 64, 3]` uint8, whatever its prompt.

    Three fifths are for clean shapes in pure colours, a fifth each for contrast and for a balanced composition.
    """
    found = find_objects(image)
    if not found:
        return 1.0
    clean = float(np.mean([f.overlap * f.purity for f in found]))
    pixels = image.astype(np.float32)
    distance = np.linalg.norm(pixels - np.median(pixels.reshape(-1, 3), 0), axis=2)
    shapes = distance > MIN_CONTRAST
    contrast = min(1.0, float(distance[shapes].mean()) / 300) if shapes.any() else 0.0
    weights = np.array([f.radius**2 for f in found])
    center = np.average([(f.x, f.y) for f in found], axis=0, weights=weights)
    balance = max(0.0, 1 - float(np.linalg.norm(center - 32)) / 32)
    return 1 + 9 * (0.6 * clean + 0.2 * contrast + 0.2 * balance)


def rated_pictures(pairs: Pairs, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures `[N, 3, 64, 64]` in [0, 1] with ratings `[N]`: scenes from clean to broken, and generated ones."""
    scenes = unit(pictures(seed + 4, RATED_PICTURES)[0])
    draws = generator("rated pictures", seed)
    parts = scenes.split(RATED_PICTURES // 4)
    broken = [degrade(part, draws, strength) for strength, part in enumerate(parts)]
    pixels = torch.cat([*broken, unit(pairs.images[:, 0])])
    bytes_ = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels, torch.tensor([rating(image) for image in bytes_])


def train_aesthetic(clip: ClipModel, pairs: Pairs, file: Path, seed: int, steps: int = 1200) -> None:
    """Fit LAION's head in small to ratings by squared error."""
    torch.manual_seed(derive_seed("aesthetic", seed))
    pixels, ratings = rated_pictures(pairs, seed)
    features = embed(clip, pixels)
    head = AestheticHead((clip.width, 128, 64, 32, 16, 1)).train()
    with torch.no_grad():
        head.layers[-1].bias.fill_(ratings.mean())
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 3e-3)
        rows = torch.randint(len(features), (128,))
        loss = F.mse_loss(head(features[rows]), ratings[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (head.eval()(features) - ratings).square().mean() / ratings.var()
    print(f"aesthetic: {len(ratings)} pictures, R2 {1 - error.item():.2f}", flush=True)
    save_file({name: t.contiguous() for name, t in head.state_dict().items()}, file)


def train_preference(clip: ClipModel, pairs: Pairs, file: Path, seed: int, steps: int = 600) -> None:
    """Fit the ensemble of heads by Bradley-Terry with ties, each member on a bootstrap sample of the pairs."""
    torch.manual_seed(derive_seed("preference", seed))
    images, texts = pair_embeddings(clip, pairs, seed)
    scale = clip.logit_scale.exp().item()
    spec = PreferenceSpec(
        clip.width, scale, "mlp", MEMBERS, hidden=HIDDEN, dropout=DROPOUT, seed=derive_seed("heads", seed)
    )
    head = build_head(spec)
    weights = member_weights(len(texts), MEMBERS, "bootstrap", seed).T
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=1.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 2e-3)
        rows = torch.randint(len(texts), (256,))
        version = torch.randint(len(images), (256,))
        scores = pair_scores(head, images[version, rows], texts[rows])
        losses = ties_loss(scores[..., 0] - scores[..., 1], pairs.labels[rows], TIE_FACTOR)
        losses = losses + CENTERING * scores.sum(-1).square()
        optimizer.zero_grad()
        (weights[:, rows] * losses).mean().backward()
        optimizer.step()
    with torch.no_grad():
        scores = pair_scores(head.eval(), images[0], texts)
    right = credit(scores[..., 0] - scores[..., 1], pairs.labels)
    unseen = (weights == 0) & (pairs.labels != 0.5)
    print(f"preference: {len(texts)} pairs, out-of-bag accuracy {right[unseen].mean():.3f}", flush=True)
    save_file(head.state_dict(), file, {"spec": json.dumps(spec_to_dict(spec))})


def pair_embeddings(clip: ClipModel, pairs: Pairs, seed: int, versions: int = 4) -> tuple[Tensor, Tensor]:
    """Embeddings of pictures `[V, N, 2, D]`, first as they are and then degraded, and of captions `[N, D]`."""
    draws = generator("pair augmentation", seed)
    pixels = unit(pairs.images.reshape(-1, *pairs.images.shape[2:]))
    kinds = [pixels, *(degrade(pixels, draws, 0.5) for _ in range(versions - 1))]
    images = torch.stack([embed(clip, kind) for kind in kinds])
    return images.unflatten(1, (-1, 2)), clip.embed_texts(pairs.captions).cpu()


def pair_scores(head: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """Scores `[M, B, 2]` of both pictures `[B, 2, D]` of each caption `[B, D]`."""
    mean, _ = head(images.flatten(0, 1), texts.repeat_interleave(2, 0))
    return mean[..., 0].unflatten(1, (-1, 2))
