"""The cache with a real (random, tiny) SDXL pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from pair_fakes import data_config, encoded, encoded_array, never_opened, pickapic_row, ramp, write_pickapic

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.data.cache import build_cache
from diffalign.data.images import load_picture
from diffalign.data.sources import open_source
from diffalign.randomness import Draw


def test_cached_batch_equals_what_the_backbone_gives(tiny_sdxl: Path, tmp_path: Path) -> None:
    first, second = encoded_array(ramp(96, 64), "JPEG"), encoded((20, 200, 90), (64, 80), "JPEG")
    rows = [pickapic_row("a red circle", 0.0, first, second), pickapic_row("two squares", 1.0, first, second)]
    source = str(write_pickapic(tmp_path / "x.parquet", rows))
    model = ModelConfig(path=str(tiny_sdxl), precision="fp32")
    config = data_config(tmp_path / "cache", resolution=64)
    backbone = open_backbone(model, device="cpu", parts="all", resolution=64)

    build_cache(open_source(source), lambda: backbone, config, model)
    cache = build_cache(open_source(source), never_opened, config, model)
    draw = Draw(3, 5, [0, 1], [0, 1], 2)
    batch = cache.fetch(draw)

    pixels = torch.stack([load_picture(image, 64).pixels for image in (first, second)])
    mean, std = backbone.encode(pixels)
    noise = torch.stack([draw.normal(mean.shape[1:], "posterior", image) for image in (0, 1)], 1)
    expected = mean + std * noise[0]
    torch.testing.assert_close(batch.rejected[0], expected[0])
    torch.testing.assert_close(batch.chosen[0], expected[1])
    text = backbone.encode_prompts(["a red circle", "two squares"])
    torch.testing.assert_close(batch.conditioning_chosen.embeddings, text.embeddings)
    assert text.pooled is not None
    assert batch.conditioning_rejected.pooled is not None
    torch.testing.assert_close(batch.conditioning_rejected.pooled, text.pooled)
    assert batch.conditioning_chosen.time_ids is not None
    assert batch.conditioning_chosen.time_ids.tolist() == [[80, 64, 8, 0, 64, 64], [64, 96, 0, 16, 64, 64]]
    torch.testing.assert_close(cache.unconditional(2).embeddings, backbone.unconditional(2).embeddings)
