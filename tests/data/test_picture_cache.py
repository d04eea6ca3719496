"""Cached pictures and groups: what a batch holds, from files of their own and from pairs taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_fakes import MODEL, FakeBackbone, build, data_config, draw, encoded, never_opened, records, red

from diffalign.data.picture_cache import GroupCache, PictureCache
from diffalign.data.picture_labels import (
    Pictures,
    group_values,
    make_groups,
    pictures_of,
    pictures_of_pairs,
    stretched,
)
from diffalign.data.pictures import PictureRecord, as_pictures
from diffalign.data.records import as_records
from diffalign.data.store import EncodedRecords, open_encoded
from diffalign.errors import DiffalignError
from diffalign.randomness import Draw

pytestmark = pytest.mark.usefixtures("fingerprint")


def pictures(*known: dict[str, Any]) -> list[PictureRecord]:
    """Pictures `i` of red 4 i and prompt `p`, unless said otherwise."""
    return [
        PictureRecord(**({"prompt": "p", "image": encoded((4 * i, 0, 0)), "source": "test"} | values))
        for i, values in enumerate(known)
    ]


def encode(folder: Path, source: Any, backbone: Any = None, **options: Any) -> EncodedRecords:
    fake = FakeBackbone() if backbone is None else backbone
    return open_encoded(source, lambda: fake, data_config(folder, **options), MODEL)


def named(**columns: Any) -> Pictures:
    """Entries in one group, where not said otherwise; what is not given is not known."""
    count = len(next(iter(columns.values())))
    values: dict[str, Any] = {name: np.full(count, np.nan) for name in ("label", "score", "rank")}
    values |= {"records": np.arange(count), "slots": np.zeros(count, int), "group": np.zeros(count, int)}
    values |= {"weight": np.ones(count, np.float32)} | {name: np.asarray(v) for name, v in columns.items()}
    return Pictures(**values)


def test_single_pictures_keep_label_weight_caption_and_sizes(tmp_path: Path) -> None:
    source = pictures({"label": 1.0, "weight": 2.0}, {"label": 0.25, "prompt": "long"}, {"score": 3.0})
    records_ = as_pictures(source)
    cache = PictureCache(encode(tmp_path, records_), pictures_of(records_))
    batch = cache.fetch(draw(1, 0, 2))
    assert red(batch.latents) == [4, 0, 8]
    assert batch.label.tolist() == [0.25, 1.0, 0.5]  # not judged: nobody knows
    assert batch.weight.tolist() == [1.0, 2.0, 1.0]
    assert batch.conditioning.embeddings[:, 0, 0].tolist() == [4.0, 1.0, 1.0]
    assert batch.conditioning.time_ids is not None
    assert batch.conditioning.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    assert (len(cache), cache.unit, len(cache.unconditional(2))) == (3, "pictures", 2)


def test_pairs_taken_apart_use_the_cache_of_the_pairs(tmp_path: Path) -> None:
    source = as_records(records(4, (1.0, 0.0, 0.7, 0.5)))
    paired = build(tmp_path, source, latents="mode")
    store = open_encoded(source, never_opened, data_config(tmp_path, latents="mode"), MODEL)  # type: ignore[arg-type]
    single = PictureCache(store, pictures_of_pairs(source))
    both, apart = paired.fetch(draw(0, 1, 2)), single.fetch(draw(0, 2, 4, 1, 3, 5))
    assert single.key == paired.key
    assert torch.equal(apart.latents, torch.cat([both.chosen, both.rejected]))
    assert torch.equal(apart.label, torch.cat([both.preference, 1 - both.preference]))
    text = [both.conditioning_chosen.embeddings, both.conditioning_rejected.embeddings]
    assert torch.equal(apart.conditioning.embeddings, torch.cat(text))
    assert len(single) == 6  # the tie is dropped


def test_pictures_and_pairs_of_the_same_files_are_different_caches(tmp_path: Path) -> None:
    source = as_records(records(1))
    apart = as_pictures([PictureRecord("prompt 0", source[0].images[i], label=1.0) for i in (0, 1)])
    assert encode(tmp_path, source).key != encode(tmp_path, apart).key


def test_posterior_noise_belongs_to_the_record_not_to_the_batch(tmp_path: Path) -> None:
    source = as_pictures(pictures(*[{"label": 1.0}] * 4))
    cache = PictureCache(encode(tmp_path, source, FakeBackbone(std=0.5)), pictures_of(source))
    whole, part = cache.fetch(draw(2, 0, 1)), cache.fetch(draw(2, 0, 1).slice(2, 3))
    assert torch.equal(whole.latents[2:], part.latents)
    assert not torch.equal(cache.fetch(draw(1, step=1)).latents, part.latents)


def test_broken_pictures_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    source = as_pictures(pictures({"label": 1.0}, {"label": 1.0, "image": b"broken"}, {"label": 0.0}))
    cache = PictureCache(encode(tmp_path, source), pictures_of(source))
    assert red(cache.fetch(draw(0, 1)).latents) == [0, 8]
    assert [(fault["record"], fault["image"]) for fault in cache.broken] == [(1, 0)]
    bad = as_pictures(pictures({"label": 1.0, "image": b"broken"}))
    with pytest.raises(
        DiffalignError, match=r"no usable picture is left of 1 .*record 0 \(test\): cannot be"
    ):
        PictureCache(encode(tmp_path / "bad", bad), pictures_of(bad))


def test_groups_hold_values_and_captions_of_their_pictures(tmp_path: Path) -> None:
    known = [
        {"score": s, "group": g, "weight": w}
        for s, g, w in ((2.0, "a", 1), (9, "b", 3), (6.0, "a", 2), (1, "b", 3))
    ]
    source = as_pictures(pictures(*known))
    cache = GroupCache(encode(tmp_path, source), pictures_of(source))
    batch = cache.fetch(draw(1, 0))
    assert batch.latents.shape[:2] == batch.values.shape == (2, 2)
    assert len(batch.conditioning) == 4
    of_red = dict(zip(red(batch.latents.flatten(0, 1)), batch.values.flatten().tolist(), strict=True))
    assert of_red == {0: 0.0, 8: 1.0, 4: 1.0, 12: 0.0}  # group a: 2 < 6; group b: 9 > 1
    assert set(red(batch.latents[0])) == {4, 12}
    assert batch.weight.tolist() == [3.0, 1.5]
    assert (cache.unit, len(cache), cache.groups.left_out) == ("groups", 2, 0)


def test_larger_groups_are_sampled_in_random_order_by_the_step(tmp_path: Path) -> None:
    source = as_pictures(pictures(*[{"rank": r} for r in (1, 2, 3, 4)]))
    cache = GroupCache(encode(tmp_path, source), pictures_of(source), size=2)
    value = {0: 1.0, 4: 2 / 3, 8: 1 / 3, 12: 0.0}
    seen = set()
    for step in range(40):
        batch = cache.fetch(draw(0, step=step))
        first, second = red(batch.latents[0])
        assert first != second
        assert batch.values[0].tolist() == pytest.approx([value[first], value[second]])
        seen.add((first, second))
    assert len(seen) == 12  # every ordered choice of two out of four
    assert torch.equal(cache.fetch(draw(0)).values, cache.fetch(draw(0)).values)


def test_values_come_from_ranks_then_scores_then_labels() -> None:
    rows = np.arange(3)
    every = named(rank=[1.0, 3.0, 2.0], score=[0.0, 1.0, 5.0], label=[0.2, 0.9, 0.9])
    np.testing.assert_allclose(group_values(every, rows), [1.0, 0.0, 0.5])
    scored = named(score=[0.0, 1.0, 5.0], label=[0.2, 0.9, 0.9], rank=[1.0, np.nan, 2.0])
    np.testing.assert_allclose(group_values(scored, rows), [0.0, 0.2, 1.0])
    np.testing.assert_allclose(group_values(named(label=[0.2, 0.9, 0.9]), rows), [0.2, 0.9, 0.9])
    assert group_values(named(label=[0.2, np.nan, 0.9]), rows) is None
    np.testing.assert_allclose(stretched(np.array([7.0, 7.0])), [0.5, 0.5])


def test_the_most_frequent_size_is_taken_and_what_says_nothing_is_left_out() -> None:
    group = [0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 4]
    score = [1, 2, 3, 3, 2, 1, 5, 6, 9, 7, 7, 7]
    found = make_groups(named(group=group, score=np.asarray(score, float)))
    assert (found.size, len(found), found.left_out) == (3, 2, 3)  # too small, alone, all tied
    assert found.starts.tolist() == [0, 3, 6]
    assert make_groups(named(group=group, score=np.asarray(score, float)), 2).starts.tolist() == [0, 3, 6, 8]
    with pytest.raises(
        DiffalignError, match=r"none of 5 groups has at least 4 pictures.*trainer\.group_size"
    ):
        make_groups(named(group=group, score=np.asarray(score, float)), 4)


def test_controls_reverse_or_deal_out_what_is_known() -> None:
    known = [
        {"label": 1.0, "score": 2.0, "rank": 1},
        {"label": 0.25, "score": -1.0, "rank": 3},
        {"label": 0.0, "rank": 2},
    ]
    source = as_pictures(pictures(*known))
    swapped = pictures_of(source, "swapped")
    assert swapped.label.tolist() == [0.0, 0.75, 1.0]
    assert swapped.rank.tolist() == [3.0, 1.0, 2.0]
    assert swapped.score[:2].tolist() == [-2.0, 1.0]
    assert np.isnan(swapped.score[2])
    many = as_pictures([PictureRecord(f"p{i}", b"", label=float(i < 30)) for i in range(60)])
    dealt = pictures_of(many, "random", seed=1)
    assert dealt.label.sum() == 30
    assert 8 < dealt.label[:30].sum() < 22
    assert not np.array_equal(pictures_of(many, "random", seed=2).label, dealt.label)
    noisy = pictures_of(many, flipped=0.5, seed=3).label
    assert 15 < (noisy != pictures_of(many).label).sum() < 45


def test_labels_stay_in_their_group_when_dealt_out() -> None:
    rows = [PictureRecord("p", b"", score=float(i), group=str(i // 4)) for i in range(40)]
    dealt = pictures_of(as_pictures(rows), "random", seed=1)
    for start in range(0, 40, 4):
        assert sorted(dealt.score[start : start + 4]) == list(range(start, start + 4))
    assert not np.array_equal(dealt.score, np.arange(40))


def test_swapped_pairs_taken_apart_are_the_other_way_round() -> None:
    source = as_records(records(2, (1.0, 0.0)))
    given, swapped = pictures_of_pairs(source), pictures_of_pairs(source, "swapped")
    assert given.slots.tolist() == [0, 1, 1, 0]
    assert swapped.slots.tolist() == [1, 0, 0, 1]
    assert given.label.tolist() == swapped.label.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert given.group.tolist() == [0, 0, 1, 1]


def test_flips_are_shared_by_a_group(tmp_path: Path) -> None:
    wide = np.zeros((16, 16, 3), np.uint8)
    wide[:, :8] = 255
    from pair_fakes import encoded_array

    source = as_pictures([PictureRecord("p", encoded_array(wide), rank=r) for r in (1, 2)])
    cache = GroupCache(encode(tmp_path, source, flip=True), pictures_of(source))
    sides = {tuple(cache.fetch(Draw(0, s, [0], [0], 1)).latents[0, :, 0, 0, 0].tolist()) for s in range(12)}
    assert sides == {(1.0, 1.0), (-1.0, -1.0)}
