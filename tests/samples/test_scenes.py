"""Captions, held-out combinations and layouts of the scenes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.samples import scenes
from diffalign.samples.scenes import Placed, Scene, Thing


@given(seed=st.integers(0, 100_000))
@settings(deadline=None, max_examples=200)
def test_captions_read_back_into_the_same_scene(seed):
    scene = scenes.random_scene(np.random.default_rng(seed))
    assert scenes.parse_caption(scenes.caption(scene)) == scene


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("a small red circle", Scene("single_object", (Thing("circle", "red", "small"),))),
        ("a red circle", Scene("colors", (Thing("circle", "red"),))),
        ("three black stars", Scene("counting", (Thing("star", "black"),) * 3)),
        ("A circle and a blue star.", Scene("two_objects", (Thing("circle"), Thing("star", "blue")))),
        (
            "a blue square to the left of a yellow star",
            Scene("position", (Thing("square", "blue"), Thing("star", "yellow")), "left of"),
        ),
        (
            "a red circle and a blue star",
            Scene("attribute_binding", (Thing("circle", "red"), Thing("star", "blue"))),
        ),
    ],
)
def test_parsing_of_each_category(text, scene):
    assert scenes.parse_caption(text) == scene


@pytest.mark.parametrize(
    "text", ["", "a dog", "four red circles", "a pink circle", "a red circle beside a star"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a scene caption"):
        scenes.parse_caption(text)


def test_training_shows_no_held_out_combination():
    drawn = list(itertools.islice(scenes.training_scenes(0), 3000))
    shown = {frozenset((p.color, p.shape) for p in placed) for _, placed in drawn}
    assert not any(pair in scenes.RESERVED for group in shown for pair in group)
    for scene, placed in drawn:
        things = tuple(Thing(p.shape, p.color, t.size) for p, t in zip(placed, scene.things, strict=True))
        assert not scenes.is_held_out(Scene(scene.category, things, scene.relation))


def test_held_out_captions_are_unique_held_out_and_cover_every_category():
    rows = scenes.held_out_captions()
    assert len(rows) == len({text for text, _ in rows}) >= 250
    assert all(scenes.is_held_out(scenes.parse_caption(text)) for text, _ in rows)
    assert {category for _, category in rows} == set(scenes.CATEGORIES)
    assert rows == scenes.held_out_captions()


def test_a_fifth_of_the_pairs_is_held_out():
    names = [Thing(s, c) for c in scenes.PALETTE for s in scenes.SHAPES if (c, s) not in scenes.RESERVED]
    pairs = [Scene("attribute_binding", p) for p in itertools.combinations(names, 2)]
    share = np.mean([scenes.is_held_out(pair) for pair in pairs])
    assert 0.12 < share < 0.28
    assert scenes.is_held_out(pairs[0]) == scenes.is_held_out(
        Scene("position", pairs[0].things[::-1], "above")
    )


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_layouts_are_inside_apart_and_obey_their_relation(seed):
    rng = np.random.default_rng(seed)
    scene = scenes.complete_scene(scenes.random_scene(rng), rng)
    placed = scenes.place(scene, rng)
    assert all(p.radius < p.x < 64 - p.radius and p.radius < p.y < 64 - p.radius for p in placed)
    for a, b in itertools.combinations(placed, 2):
        assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
    if scene.relation:
        assert scenes.stands(*placed, scene.relation, margin=12)


def test_relations_by_hand():
    left, right = Placed("circle", "red", 10, 30, 5), Placed("circle", "red", 40, 35, 5)
    assert scenes.stands(left, right, "left of", 5)
    assert scenes.stands(right, left, "right of", 5)
    assert not scenes.stands(left, right, "above", 5)
    assert not scenes.stands(right, left, "left of", 5)


def test_placing_an_open_scene_is_refused():
    with pytest.raises(ValueError, match="complete_scene"):
        scenes.place(Scene("colors", (Thing("circle"),)), np.random.default_rng(0))
