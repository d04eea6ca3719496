"""Preference pairs sampled from the tiny base model and labelled by the judge, in the Pick-a-Pic schema.

Per caption three pictures are sampled. The best and the worst by the judge's score make a pair; a tenth of the
labels is flipped, as people err; captions whose pictures score alike give ties, kept up to an eighth of the set.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from PIL import Image

from diffalign.randomness import derive_seed
from diffalign.samples import scenes
from diffalign.samples.judge import judge

GUIDANCE = 4.0
STEPS = 12
PER_CAPTION = 3
LABEL_NOISE = 0.1
TIES = 0.125
BATCH = 60


@dataclass(frozen=True)
class Pair:
    """A caption, two pictures `[64, 64, 3]` uint8 and the label of the first: 1, 0, or 0.5 for a tie."""

    caption: str
    images: tuple[np.ndarray, np.ndarray]
    label: float


def build_preferences(out: Path, seed: int, device: str, train: int = 1700, validation: int = 260) -> None:
    """Sample, judge and write both splits under `out/preferences`."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(out / "tiny-sdxl").to(device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    texts = training_captions(seed, train + validation)
    for split, chosen in (("validation", texts[:validation]), ("train", texts[validation:])):
        pairs = sample_pairs(pipeline, chosen, derive_seed("preferences", seed, split))
        write_pairs(out / "preferences" / f"{split}-00000.parquet", pairs)


def training_captions(seed: int, count: int) -> list[str]:
    """Captions that are not held out; a caption may come twice, as in Pick-a-Pic."""
    drawn = scenes.training_scenes(derive_seed("preference captions", seed))
    return [scenes.caption(scene) for scene, _ in (next(drawn) for _ in range(count))]


def sample_pairs(pipeline: StableDiffusionXLPipeline, texts: list[str], seed: int) -> list[Pair]:
    """The pairs of all captions, ties thinned to their share."""
    rng = np.random.default_rng(seed)
    pairs: list[Pair] = []
    started = time.time()
    per_batch = BATCH // PER_CAPTION
    for start in range(0, len(texts), per_batch):
        chunk = texts[start : start + per_batch]
        images = sample(pipeline, [t for t in chunk for _ in range(PER_CAPTION)], seed + start)
        groups = images.reshape(len(chunk), PER_CAPTION, *images.shape[1:])
        pairs += [make_pair(text, group, rng) for text, group in zip(chunk, groups, strict=True)]
        left = (time.time() - started) / len(pairs) * (len(texts) - len(pairs))
        print(f"preferences {len(pairs)}/{len(texts)}, {left / 60:.1f} min left", flush=True)
    decided = [pair for pair in pairs if pair.label != 0.5]
    ties = [pair for pair in pairs if pair.label == 0.5][: round(len(decided) * TIES / (1 - TIES))]
    kept = decided + ties
    return [kept[i] for i in rng.permutation(len(kept))]


def sample(pipeline: StableDiffusionXLPipeline, texts: list[str], seed: int) -> np.ndarray:
    """Pictures `[N, 64, 64, 3]` uint8."""
    generators = [torch.Generator("cpu").manual_seed(derive_seed(seed, i)) for i in range(len(texts))]
    with torch.autocast(pipeline.device.type, torch.bfloat16):
        images = pipeline(
            texts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="np"
        ).images
    return (images * 255).round().astype(np.uint8)


def make_pair(text: str, group: np.ndarray, rng: np.random.Generator) -> Pair:
    """Best and worst of a group `[K, 64, 64, 3]` in random order, with label noise."""
    scores = [judge(image, text).score for image in group]
    order = rng.permutation(len(group))
    best, worst = max(order, key=lambda i: scores[i]), min(order, key=lambda i: scores[i])
    if scores[best] == scores[worst]:
        return Pair(text, (group[order[0]], group[order[1]]), 0.5)
    first_is_best = rng.random() < 0.5
    images = (group[best], group[worst]) if first_is_best else (group[worst], group[best])
    flipped = rng.random() < LABEL_NOISE
    return Pair(text, images, float(first_is_best != flipped))


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    """Write a parquet shard with the columns of Pick-a-Pic v2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(
            {
                "caption": [pair.caption for pair in pairs],
                "jpg_0": [jpeg(pair.images[0]) for pair in pairs],
                "jpg_1": [jpeg(pair.images[1]) for pair in pairs],
                "label_0": [pair.label for pair in pairs],
                "label_1": [1 - pair.label for pair in pairs],
                "are_different": [pair.label != 0.5 for pair in pairs],
                "has_label": [True] * len(pairs),
                "model_0": ["tiny-sdxl"] * len(pairs),
                "model_1": ["tiny-sdxl"] * len(pairs),
                "ranking_id": list(range(len(pairs))),
                "user_id": [0] * len(pairs),
                "num_example_per_prompt": [1] * len(pairs),
            }
        ),
        path,
    )


def jpeg(image: np.ndarray) -> bytes:
    """JPEG bytes of a picture, without chroma subsampling since shapes are few pixels wide."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
