"""Perturbed captions: what changes, what must not, and where the caption ends up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_fakes import records

from diffalign.config import DataConfig
from diffalign.data.captions import (
    ATTRIBUTES,
    LEVELS,
    perturb_caption,
    perturb_rejected,
)
from diffalign.data.records import PreferenceRecord, as_records
from diffalign.data.sources import open_held_out, open_records
from diffalign.errors import DiffalignError
from diffalign.samples import scenes
from diffalign.samples.judge import judge

TWO = "a red circle and a blue star"


def changed(before: str, after: str) -> int:
    return sum(a != b for a, b in zip(before.split(), after.split(), strict=True))


def test_levels_change_their_share_of_the_attribute_words():
    # red, circle, blue, star: 40, 60 and 80 % of 4 are 1.6, 2.4 and 3.2.
    assert [changed(TWO, perturb_caption(TWO, level)) for level in LEVELS] == [2, 2, 3]
    assert changed("two blue stars", perturb_caption("two blue stars", "weak")) == 1


def test_words_that_the_caption_uses_are_exchanged_first():
    # Of two words at most one changes, and the only other colour here is the other one's.
    assert perturb_caption("red, then green", "strong") in ("green, then green", "red, then red")


def test_a_word_of_another_family_never_appears_and_capitals_stay():
    for seed in range(20):
        word = perturb_caption("Red", "weak", seed)
        assert word.lower() in ATTRIBUTES[0]
        assert word.lower() != "red"
        assert word[0].isupper()


@given(seed=st.integers(0, 10**6), level=st.sampled_from(sorted(LEVELS)))
@settings(deadline=None, max_examples=40)
def test_scene_captions_stay_captions_of_other_pictures(seed, level):
    scene, placed = next(scenes.training_scenes(seed))
    text = scenes.caption(scene)
    other = perturb_caption(text, level, seed)
    assert other != text
    assert other == perturb_caption(text, level, seed)
    assert not judge(scenes.draw(placed), scenes.parse_caption(other)).correct


def test_a_caption_without_attributes_loses_words_but_never_all():
    text = "portrait of somebody thinking deeply"
    for level, left in (("weak", 3), ("medium", 3), ("strong", 2)):
        kept = perturb_caption(text, level).split()
        # Four long words: 1.6, 2.4 and 3.2 of them go, and "of" stays.
        assert len(kept) == left
        assert set(kept) < set(text.split())
    assert perturb_caption("hm", "strong") == "hm"


def test_unknown_level_is_refused():
    with pytest.raises(DiffalignError, match="Did you mean 'weak'"):
        perturb_caption(TWO, "weka")


@pytest.mark.parametrize(("label", "perturbed"), [(1.0, 1), (0.8, 1), (0.0, 0), (0.3, 0)])
def test_the_rejected_picture_gets_the_perturbed_caption(label, perturbed):
    row = PreferenceRecord(TWO, b"0", b"1", label, prompt_1="a green square and a black star")
    before = as_records([row])[0].prompts
    after = perturb_rejected(as_records([row]), "medium")[0].prompts
    assert after[1 - perturbed] == before[1 - perturbed]
    assert after[perturbed] != before[perturbed]
    assert after[perturbed] == perturb_caption(before[perturbed], "medium")


def test_ties_keep_their_caption_and_pictures_stay_where_they_are():
    source = as_records([PreferenceRecord(TWO, b"0", b"1", 0.5), PreferenceRecord(TWO, b"2", b"3", 0.0)])
    tie, pair = perturb_rejected(source, "strong")
    assert tie.prompts == (TWO, TWO)
    assert (pair.image_0, pair.image_1) == (b"2", b"3")
    assert pair.prompts[1] == TWO


def test_the_identity_follows_the_level():
    source = replace(as_records(records(2)), identity="x")
    found = {perturb_rejected(source, level).identity for level in LEVELS}
    assert len({*found, "x"}) == 4
    assert perturb_rejected(as_records(records(2)), "weak").identity is None


def test_the_recipe_option_perturbs_training_pairs_and_leaves_held_out_ones(tmp_path):
    lines = [{"prompt": TWO, "chosen": "a.png", "rejected": "b.png"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(source=str(path), held_out=str(path), resolution=64, rejected_caption="medium")
    (train,), (held_out,) = open_records(config).rows, open_held_out(config).rows
    assert train.prompts == (TWO, perturb_caption(TWO, "medium"))
    assert held_out.prompts == (TWO, TWO)
