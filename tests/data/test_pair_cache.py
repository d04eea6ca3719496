"""What a batch from the cache holds."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pair_fakes import (
    MODEL,
    FakeBackbone,
    build,
    data_config,
    draw,
    encoded,
    encoded_array,
    never_opened,
    pickapic_row,
    ramp,
    records,
    red,
    reopen,
    write_pickapic,
)

from diffalign.data import encode
from diffalign.data import store as store_module
from diffalign.data.cache import PairCache, build_cache
from diffalign.data.records import PreferenceRecord
from diffalign.data.sources import open_source
from diffalign.errors import DiffalignError

pytestmark = pytest.mark.usefixtures("fingerprint")

LABELS = (1.0, 0.0, 0.5)


# What a batch holds


def test_batch_against_literal_values(tmp_path: Path) -> None:
    weighted = [replace(record, weight=1.0 + i) for i, record in enumerate(records(6, LABELS))]
    cache = build(tmp_path, weighted, ties="half")
    batch = cache.fetch(draw(1, 5, 3, 0))
    assert batch.chosen.shape == batch.rejected.shape == (4, 3, 4, 4)
    assert batch.chosen.dtype == torch.float32
    # Record i has red 4i and 4i+2; records 1 and 4 prefer the second image, 2 and 5 are ties.
    assert red(batch.chosen) == [6, 20, 12, 0]
    assert red(batch.rejected) == [4, 22, 14, 2]
    assert batch.preference.tolist() == [1.0, 0.5, 1.0, 1.0]
    assert batch.weight.tolist() == [2.0, 6.0, 4.0, 1.0]
    assert batch.conditioning_chosen.pooled is not None
    assert batch.conditioning_chosen.pooled[:, 0].tolist() == [ord("1"), ord("1"), ord("1"), ord("0")]
    assert batch.conditioning_chosen.embeddings.shape == (4, 3, 2)
    assert batch.conditioning_chosen.time_ids is not None
    assert batch.conditioning_chosen.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 4
    assert len(batch) == 4


def test_ties_are_left_out_by_default(tmp_path: Path) -> None:
    cache = build(tmp_path, records(6, LABELS))
    assert len(cache) == 4
    assert red(cache.fetch(draw(0, 1, 2, 3)).chosen) == [0, 6, 12, 18]


def test_each_image_has_its_own_prompt_when_given(tmp_path: Path) -> None:
    first = replace(records(1)[0], prompt="a", prompt_1="bb", label_0=0.0)
    batch = build(tmp_path, [first, records(2)[1]]).fetch(draw(0, 1))
    assert batch.conditioning_chosen.embeddings[:, 0, 0].tolist() == [2.0, 8.0]
    assert batch.conditioning_rejected.embeddings[:, 0, 0].tolist() == [1.0, 8.0]


def test_sizes_are_each_image_s_own_and_height_first(tmp_path: Path) -> None:
    record = PreferenceRecord("p", encoded_array(ramp(24, 16)), encoded((0, 0, 0), (16, 64)), 0.0)
    batch = build(tmp_path, [record]).fetch(draw(0))
    assert batch.conditioning_chosen.time_ids is not None
    assert batch.conditioning_chosen.time_ids.dtype == torch.float32
    assert batch.conditioning_chosen.time_ids.tolist() == [[64, 16, 24, 0, 16, 16]]
    assert batch.conditioning_rejected.time_ids is not None
    assert batch.conditioning_rejected.time_ids.tolist() == [[16, 24, 0, 4, 16, 16]]


def test_family_without_sizes_gets_no_time_ids(tmp_path: Path) -> None:
    batch = build(tmp_path, records(2), FakeBackbone(sizes=False)).fetch(draw(0, 1))
    assert batch.conditioning_chosen.time_ids is None


def test_each_distinct_prompt_is_encoded_once(tmp_path: Path) -> None:
    fake = FakeBackbone()
    build(tmp_path, records(7), fake)
    assert fake.prompts == ["prompt 0", "prompt 1"]
    assert fake.encoded == 14


def test_unconditional_rows(tmp_path: Path) -> None:
    cond = build(tmp_path, records(2)).unconditional(3)
    assert cond.embeddings.shape == (3, 3, 2)
    assert cond.embeddings.unique().tolist() == [-1.0]
    assert cond.time_ids is None


def test_to_moves_every_tensor(tmp_path: Path) -> None:
    batch = build(tmp_path, records(2)).fetch(draw(0)).to("meta")
    tensors = [batch.chosen, batch.rejected, batch.preference, batch.weight]
    tensors += [
        *batch.conditioning_chosen.tensors().values(),
        *batch.conditioning_rejected.tensors().values(),
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# Posterior sampling


def test_posterior_noise_belongs_to_record_and_step_not_to_the_batch(tmp_path: Path) -> None:
    cache = build(tmp_path, records(6), FakeBackbone(std=0.5))
    whole = cache.fetch(draw(4, 1, 5))
    parts = [cache.fetch(draw(4, 1, 5).slice(i, i + 1)) for i in range(3)]
    assert torch.equal(whole.chosen, torch.cat([part.chosen for part in parts]))
    assert torch.equal(whole.rejected, torch.cat([part.rejected for part in parts]))
    assert not torch.equal(cache.fetch(draw(4, step=1)).chosen, parts[0].chosen)
    assert torch.equal(cache.fetch(draw(4)).chosen, parts[0].chosen)


def test_posterior_sample_has_the_stored_mean_and_deviation_and_independent_images(tmp_path: Path) -> None:
    fake = FakeBackbone(std=0.5)
    sampled, mode = build(tmp_path, records(1), fake), reopen(tmp_path, records(1), latents="mode")
    mean = mode.fetch(draw(0))
    assert red(mean.chosen) == [0]
    noise_0, noise_1 = (
        torch.cat(
            [
                (getattr(sampled.fetch(draw(0, step=s)), side) - getattr(mean, side)).flatten()
                for s in range(200)
            ]
        )
        for side in ("chosen", "rejected")
    )
    # 9600 draws: deviations of the estimates are about 0.005, 0.004 and 0.01.
    assert abs(noise_0.mean()) < 0.025
    assert abs(noise_0.std() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([noise_0, noise_1]))[0, 1]) < 0.05


# Flips and crops


def test_flip_is_the_same_for_both_images_and_updates_the_crop(tmp_path: Path) -> None:
    wide = encoded_array(ramp(25, 16))
    cache = build(tmp_path, [PreferenceRecord("p", wide, wide, 1.0)], flip=True)
    seen = set()
    for step in range(12):
        batch = cache.fetch(draw(0, step=step))
        assert torch.equal(batch.chosen, batch.rejected)
        rising = bool(batch.chosen[0, 0, 0, 0] < batch.chosen[0, 0, 0, -1])
        assert batch.conditioning_chosen.time_ids is not None
        left = int(batch.conditioning_chosen.time_ids[0, 3])
        assert left == (5 if rising else 25 - 16 - 5)
        seen.add(rising)
    assert seen == {True, False}


def test_random_crop_is_shared_by_the_pair_and_differs_between_records(tmp_path: Path) -> None:
    wide = encoded_array(ramp(80, 16))
    cache = build(tmp_path, [PreferenceRecord("p", wide, wide, 1.0)] * 8, crop="random")
    batch = cache.fetch(draw(*range(8)))
    assert torch.equal(batch.chosen, batch.rejected)
    assert batch.conditioning_chosen.time_ids is not None
    lefts = batch.conditioning_chosen.time_ids[:, 3].tolist()
    assert len(set(lefts)) > 3
    middle = (batch.chosen[:, 0].mean((1, 2)) + 1) * 127.5
    torch.testing.assert_close(middle, torch.tensor([left + 7.5 for left in lefts]))


# Broken images


def test_broken_images_are_skipped_and_listed(tmp_path: Path) -> None:
    source = records(7)
    source[0] = replace(source[0], image_1=b"not an image")
    source[3] = replace(source[3], image_0=tmp_path / "gone.png")
    source[4] = replace(source[4], image_0=b"", image_1=source[4].image_1[:45])  # type: ignore[index]
    cache = build(tmp_path / "cache", source)
    assert len(cache) == 4
    assert red(cache.fetch(draw(0, 1, 2, 3)).chosen) == [4, 8, 20, 24]
    index = json.loads((cache.folder / "index.json").read_text())
    assert [(fault["record"], fault["image"]) for fault in index["broken"]] == [
        (0, 1),
        (3, 0),
        (4, 0),
        (4, 1),
    ]
    assert "cannot be decoded" in index["broken"][0]["reason"]
    assert index["broken"][1]["source"].endswith("gone.png")


def test_a_shard_of_only_broken_images_is_skipped(tmp_path: Path) -> None:
    source = records(5)
    source[2], source[3] = (replace(source[i], image_0=b"x") for i in (2, 3))
    cache = build(tmp_path, source)
    assert red(cache.fetch(draw(0, 1, 2)).chosen) == [0, 4, 16]
    assert len(reopen(tmp_path, source)) == 3


def test_nothing_left_is_an_error_with_reasons(tmp_path: Path) -> None:
    broken = [replace(record, image_0=b"x") for record in records(3)]
    with pytest.raises(DiffalignError, match=r"no usable pair is left of 3.*cannot be decoded"):
        build(tmp_path, broken)


def test_all_ties_are_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"data\.ties=half"):
        reopen(tmp_path, records(3, (0.5,)))
    assert not list(tmp_path.iterdir())


# Reading


def test_shards_are_memory_mapped(tmp_path: Path) -> None:
    cache = build(tmp_path, records(4))
    cache.fetch(draw(0, 2))
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("no /proc on this system")
    text = mapped.read_text()
    assert str((cache.folder / "records-00000.safetensors").resolve()) in text
    assert str((cache.folder / "records-00001.safetensors").resolve()) in text


def test_a_batch_is_not_a_view_of_the_map(tmp_path: Path) -> None:
    cache = build(tmp_path, records(2))
    cache.fetch(draw(0, 1)).chosen.zero_()
    cache.fetch(draw(0, 1)).conditioning_chosen.embeddings.zero_()
    assert red(cache.fetch(draw(0, 1)).chosen) == [0, 4]
    assert cache.fetch(draw(0)).conditioning_chosen.embeddings.unique().tolist() == [8.0]


def test_other_processes_wait_for_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "POLL_SECONDS", 0.01)
    path = write_pickapic(
        tmp_path / "x.parquet", [pickapic_row("p", 1.0, encoded((8, 0, 0)), encoded((9, 9, 9)))]
    )
    config = data_config(tmp_path / "cache")
    found: list[PairCache] = []

    def follow() -> None:
        found.append(
            build_cache(open_source(str(path)), never_opened, config, MODEL, builder=False, timeout=30)
        )

    follower = threading.Thread(target=follow)
    follower.start()
    build(tmp_path / "cache", open_source(str(path)))
    follower.join(30)
    assert red(found[0].fetch(draw(0)).chosen) == [8]


def test_waiting_ends_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "POLL_SECONDS", 0.01)
    with pytest.raises(DiffalignError, match=r"waited 0 s for .*index\.json"):
        build_cache(records(2), never_opened, data_config(tmp_path), MODEL, builder=False, timeout=0.02)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    build_cache(
        records(5),
        FakeBackbone,  # type: ignore[arg-type]
        data_config(tmp_path),
        MODEL,
        progress=lambda what, done, total: calls.append((what, done, total)),
    )
    assert ("reading records", 5, 5) in calls
    assert ("encoding prompts", 2, 2) in calls
    assert calls[-1] == ("encoding images", 5, 5)


def test_vae_batches_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path / "a", records(6), shard_size=6).fetch(draw(*range(6)))
    monkeypatch.setattr(encode, "PIXELS_PER_CALL", 4 * 16 * 16)
    parts = build(tmp_path / "b", records(6), shard_size=6).fetch(draw(*range(6)))
    assert torch.equal(whole.chosen, parts.chosen)
