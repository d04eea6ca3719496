"""Degradation ladders: worse at every rung, the same for the same seed, and pairs that say so."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from pair_fakes import build, draw, encoded_array, records
from PIL import Image

from diffalign.config import DataConfig
from diffalign.data.degraded import DEGRADATIONS, RUNGS, degraded, ladder, with_degraded
from diffalign.data.records import PreferenceRecord, as_records
from diffalign.data.sources import open_held_out, open_records
from diffalign.samples import scenes


def scene(seed: int = 0) -> Image.Image:
    return Image.fromarray(scenes.draw(next(scenes.training_scenes(seed))[1]))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64)


def png(image: Image.Image) -> bytes:
    return encoded_array(np.asarray(image))


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_every_rung_is_further_from_the_picture(kind):
    rungs = ladder(scene(), kind, seed=3)
    assert len(rungs) == RUNGS + 1
    distance = [np.abs(pixels(rung) - pixels(rungs[0])).mean() for rung in rungs]
    assert distance[0] == 0
    assert all(worse > better for better, worse in pairwise(distance)), distance
    assert {rung.size for rung in rungs} == {(64, 64)}
    assert {rung.mode for rung in rungs} == {"RGB"}


def test_a_degradation_depends_on_its_seed_only():
    assert png(degraded(scene(), "noise", 2, 5)) == png(degraded(scene(), "noise", 2, 5))
    assert png(degraded(scene(), "noise", 2, 5)) != png(degraded(scene(), "noise", 2, 6))


def test_noise_has_the_stated_spread_and_a_tint_keeps_the_mean():
    gray = Image.new("RGB", (128, 128), (128, 128, 128))
    # A third of 64 levels at the first of three rungs.
    assert pixels(degraded(gray, "noise", 1)).std() == pytest.approx(64 / 3, rel=0.02)
    tinted = pixels(degraded(gray, "tint", 3, 1)).mean((0, 1)) - 128
    assert np.abs(tinted).max() == pytest.approx(80, abs=0.5)
    assert tinted.mean() == pytest.approx(0, abs=0.5)


def test_kinds_and_rungs_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="blur, noise"):
        degraded(scene(), "blurr", 1)
    with pytest.raises(ValueError, match="0 to 3"):
        degraded(scene(), "blur", 4)


def scene_records() -> list[PreferenceRecord]:
    """The preferred picture is first, then second."""
    return [
        PreferenceRecord("a", png(scene(0)), png(scene(1)), 1.0, "s", prompt_1="b", weight=0.5),
        PreferenceRecord("c", png(scene(2)), png(scene(3)), 0.0, "s", prompt_1="d", weight=0.5),
    ]


def test_added_pairs_compare_rungs_of_preferred_pictures():
    source = as_records(scene_records())
    found = with_degraded(source, 10.0)
    assert len(found) == 22
    assert found[0] == source[0]
    originals = {"a": scene(0), "d": scene(3)}
    firsts = []
    for record in found[2:]:
        original = pixels(originals[record.prompt])
        better, worse = (pixels(Image.open(io.BytesIO(x))) for x in (record.chosen, record.rejected))
        assert np.abs(better - original).mean() < np.abs(worse - original).mean()
        assert record.prompts == (record.prompt, record.prompt)
        assert record.weight == 0.5
        assert record.source.startswith("degraded ")
        firsts.append(record.label_0)
    assert {0.0, 1.0} == set(firsts)
    assert {record.prompt for record in found[2:]} == {"a", "d"}


def test_added_pairs_are_the_same_each_time_and_have_an_identity():
    source = replace(as_records(scene_records()), identity="x")
    one, two = (with_degraded(source, 2.0) for _ in range(2))
    assert list(one) == list(two)
    assert one.identity == two.identity
    assert len({source.identity, one.identity, with_degraded(source, 1.0).identity}) == 3
    assert [r.source for r in with_degraded(source, 2.0, seed=1).rows] != [r.source for r in one.rows]


@pytest.mark.usefixtures("fingerprint")
def test_a_broken_picture_is_counted_and_not_trained_on(tmp_path):
    rows = [*records(3), PreferenceRecord("p", b"broken", b"broken", 1.0)]
    cache = build(tmp_path, with_degraded(as_records(rows), 2.0))
    faulty = {fault["record"] for fault in cache.broken}
    assert 3 in faulty
    assert len(cache) == 12 - len(faulty)
    batch = cache.fetch(draw(*range(len(cache))))
    assert len(batch) == len(cache)


def test_the_recipe_option_adds_to_training_pairs_only(tmp_path):
    options = {
        "source": "scenes:preferences",
        "held_out": "scenes:preferences",
        "resolution": 64,
        "limit": 20,
    }
    plain, more = (DataConfig(**options, degraded=share) for share in (0.0, 0.5))
    assert (len(open_records(plain)), len(open_records(more))) == (20, 30)
    assert len(open_held_out(more)) == len(open_held_out(plain))
