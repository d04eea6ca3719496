"""When a cache is used again, when it is made anew, and what interruptions and damage do to it."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_fakes import (
    MODEL,
    FakeBackbone,
    build,
    data_config,
    draw,
    encoded,
    never_opened,
    pickapic_row,
    records,
    red,
    reopen,
    write_pickapic,
)
from safetensors.torch import load_file

from diffalign.config import ModelConfig
from diffalign.data import images, keys, shards
from diffalign.data.cache import PairCache, build_cache
from diffalign.data.keys import cache_key, records_digest
from diffalign.data.pairs import choose_pairs
from diffalign.data.records import as_records
from diffalign.data.sources import open_source
from diffalign.errors import DiffalignError

pytestmark = pytest.mark.usefixtures("fingerprint")

LABELS = (1.0, 0.0, 0.5)


# Keys: what forces encoding anew, and what does not


@pytest.mark.parametrize(
    "options", [{"labels": "swapped"}, {"labels": "random"}, {"ties": "half"}, {"latents": "mode"}]
)
def test_labels_ties_and_sampling_use_the_same_cache(tmp_path: Path, options: dict[str, Any]) -> None:
    first = build(tmp_path, records(6, LABELS))
    assert reopen(tmp_path, records(6, LABELS), **options).key == first.key


def test_swapped_labels_swap_the_batch(tmp_path: Path) -> None:
    given = build(tmp_path, records(4), FakeBackbone(std=0.5)).fetch(draw(0, 2))
    swapped = reopen(tmp_path, records(4), labels="swapped").fetch(draw(0, 2))
    assert torch.equal(given.chosen, swapped.rejected)
    assert torch.equal(given.rejected, swapped.chosen)


def test_relabelled_records_use_the_same_cache(tmp_path: Path) -> None:
    build(tmp_path, records(4))
    relabelled = reopen(tmp_path, records(4, (0.0,)))
    assert red(relabelled.fetch(draw(1)).chosen) == [6]


@pytest.mark.parametrize(
    "options",
    [{"resolution": 8}, {"crop": "random"}, {"flip": True}, {"shard_size": 3}, {"max_pixels": 10**6}],
)
def test_other_preprocessing_is_another_cache(tmp_path: Path, options: dict[str, Any]) -> None:
    first = build(tmp_path, records(2))
    with pytest.raises(AssertionError, match="backbone was opened"):
        reopen(tmp_path, records(2), **options)
    assert build(tmp_path, records(2), **options).key != first.key


def test_other_model_precision_or_contents_is_another_cache(tmp_path: Path) -> None:
    build(tmp_path, records(2))
    config = data_config(tmp_path)
    repainted = [replace(records(2)[0], image_1=encoded((200, 0, 0))), records(2)[1]]
    renamed = [replace(records(2)[0], prompt="else"), records(2)[1]]
    for source, model in [
        (records(2), ModelConfig(path="other", precision="fp32")),
        (records(2), ModelConfig(path="fake", precision="bf16")),
        (repainted, MODEL),
        (renamed, MODEL),
        (records(3), MODEL),
    ]:
        with pytest.raises(AssertionError, match="backbone was opened"):
            build_cache(source, never_opened, config, model)


def test_half_precision_models_are_stored_in_half_the_space(tmp_path: Path) -> None:
    fake = FakeBackbone()
    model = ModelConfig(path="fake", precision="bf16")
    cache = build_cache(records(2), lambda: fake, data_config(tmp_path), model)  # type: ignore[arg-type, return-value]
    assert load_file(cache.folder / "records-00000.safetensors")["latents"].dtype == torch.float16
    assert load_file(cache.folder / "records-00000.safetensors")["time_ids"].dtype == torch.float32
    batch = cache.fetch(draw(0, 1))
    assert batch.chosen.dtype == batch.conditioning_chosen.embeddings.dtype == torch.float32
    assert red(batch.chosen) == [0, 4]


def test_stale_cache_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = as_records(records(2))
    cache = build(tmp_path, source)
    digest = records_digest(source, tmp_path)
    other = cache_key(data_config(tmp_path, resolution=32), "other model", "fp32", digest, 2)
    with pytest.raises(
        DiffalignError, match=r"stale: model is 'fingerprint of fake'.*resolution is 16 in the cache and 32"
    ):
        PairCache.open(cache.folder, other, choose_pairs(source))


def test_records_are_hashed_once_per_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [pickapic_row("p", 1.0, encoded((i, 0, 0)), encoded((9, 9, 9))) for i in range(3)]
    path = write_pickapic(tmp_path / "x.parquet", rows)
    build(tmp_path / "cache", open_source(str(path)))

    def unread(image: Any) -> bytes:
        raise AssertionError("images were read although the source is unchanged")

    monkeypatch.setattr(keys, "image_hash", unread)
    monkeypatch.setattr(images, "decode", unread)
    assert len(reopen(tmp_path / "cache", open_source(str(path)))) == 3
    write_pickapic(path, rows[:2])
    with pytest.raises(AssertionError, match="images were read"):
        reopen(tmp_path / "cache", open_source(str(path)))


def test_copy_of_the_source_elsewhere_uses_the_same_cache(tmp_path: Path) -> None:
    rows = [pickapic_row("p", 1.0, encoded((i, 0, 0)), encoded((9, 9, 9))) for i in range(3)]
    build(tmp_path / "cache", open_source(str(write_pickapic(tmp_path / "x.parquet", rows))))
    copy = write_pickapic(tmp_path / "elsewhere" / "y.parquet", rows, row_group_size=3)
    assert len(reopen(tmp_path / "cache", open_source(str(copy)))) == 3


# Interruption and damage


def test_restart_continues_after_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, records(8), FakeBackbone(fail_after=8))
    assert not list(tmp_path.glob("*/index.json"))
    fake = FakeBackbone()
    cache = build(tmp_path, records(8), fake)
    assert fake.encoded == 8  # the two shards that were finished are not encoded again
    assert fake.prompts == []
    assert red(cache.fetch(draw(*range(8))).chosen) == [4 * i for i in range(8)]


def test_missing_and_truncated_shards_are_rebuilt_alone(tmp_path: Path) -> None:
    cache = build(tmp_path, records(8))
    before = load_file(cache.folder / "records-00001.safetensors")["latents"]
    damaged = cache.folder / "records-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    (cache.folder / "records-00003.safetensors").unlink()
    fake = FakeBackbone()
    build(tmp_path, records(8), fake)
    assert fake.encoded == 8
    assert torch.equal(load_file(damaged)["latents"], before)


def test_opening_a_damaged_cache_names_the_file(tmp_path: Path) -> None:
    source = as_records(records(4))
    cache = build(tmp_path, source)
    key = cache_key(data_config(tmp_path), "fingerprint of fake", "fp32", records_digest(source, tmp_path), 4)
    (cache.folder / "prompts-00000.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(
        DiffalignError, match=r"prompts-00000\.safetensors cannot be used.*only this file is rebuilt"
    ):
        PairCache.open(cache.folder, key, choose_pairs(source))
    (cache.folder / "index.json").unlink()
    with pytest.raises(DiffalignError, match="not a complete cache"):
        PairCache.open(cache.folder, key, choose_pairs(source))


def test_shard_of_another_cache_is_not_used(tmp_path: Path) -> None:
    first, second = build(tmp_path, records(2)), build(tmp_path, records(2), resolution=8)
    name = "records-00000.safetensors"
    (first.folder / name).write_bytes((second.folder / name).read_bytes())
    fake = FakeBackbone()
    assert build(tmp_path, records(2), fake).fetch(draw(0)).chosen.shape == (1, 3, 4, 4)
    assert fake.encoded == 4


def test_only_the_index_missing_opens_no_model(tmp_path: Path) -> None:
    cache = build(tmp_path, records(3))
    (cache.folder / "index.json").unlink()
    assert len(reopen(tmp_path, records(3))) == 3


def test_full_disk_keeps_finished_shards_and_leaves_nothing_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file, written = shards.save_file, []

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full_disk)
    with pytest.raises(
        DiffalignError, match=r"cannot write .*No space left on device.*continues where it stopped"
    ):
        build(tmp_path, records(6))
    assert not list(tmp_path.glob("*/*.partial"))
    monkeypatch.setattr(shards, "save_file", save_file)
    fake = FakeBackbone()
    build(tmp_path, records(6), fake)
    assert fake.encoded == 8


def test_nan_latents_are_never_stored(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"VAE gave numbers that are not finite.*fp16-fix"):
        build(tmp_path, records(2), FakeBackbone(std=float("nan")))
    assert not list(tmp_path.glob("*/pairs-*"))
