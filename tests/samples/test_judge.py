"""The judge against the renderer's ground truth, and its limits."""

import numpy as np
import pytest

from diffalign.samples import scenes
from diffalign.samples.judge import find_objects, judge
from diffalign.samples.scenes import Placed, draw


def render(rng, scene):
    complete = scenes.complete_scene(scene, rng)
    return draw(scenes.place(complete, rng), scenes.random_background(rng))


def test_clean_renders_are_judged_right_at_least_99_percent_in_every_category():
    rng = np.random.default_rng(0)
    for category in scenes.CATEGORIES:
        drawn = [scenes.random_scene(rng, category) for _ in range(120)]
        right = [judge(render(rng, scene), scenes.caption(scene)).correct for scene in drawn]
        assert np.mean(right) >= 0.99, category


def test_pictures_of_other_captions_are_judged_wrong():
    rng = np.random.default_rng(1)
    drawn = [scenes.random_scene(rng) for _ in range(150)]
    pictures = [render(rng, scene) for scene in drawn]
    wrong = [
        judge(picture, scenes.caption(other)).correct
        for picture, scene, other in zip(pictures, drawn, drawn[1:] + drawn[:1], strict=True)
        if not set(scene.things) & set(other.things)
    ]
    assert np.mean(wrong) <= 0.02


PAIR = (Placed("square", "blue", 16, 32, 8), Placed("star", "yellow", 46, 30, 8))


@pytest.mark.parametrize(
    ("prompt", "failed"),
    [
        ("a blue square left of a yellow star", set()),
        ("a blue square right of a yellow star", {"relation"}),
        ("a yellow square and a blue star", {"color_1", "color_2"}),
        ("a blue square", {"count"}),
        ("three blue squares", {"count", "shape_2", "color_2", "shape_3", "color_3"}),
        ("a blue triangle and a yellow star", {"shape_1"}),
    ],
)
def test_each_fault_fails_its_own_check(prompt, failed):
    verdict = judge(draw(PAIR), prompt)
    assert {name for name, ok in verdict.checks.items() if not ok} == failed
    assert verdict.correct == (not failed)
    assert verdict.score == pytest.approx(1 - len(failed) / len(verdict.checks))


def test_size_is_judged():
    small, large = (draw((Placed("circle", "red", 32, 32, r),)) for r in (7, 13))
    assert judge(small, "a small red circle").correct
    assert not judge(large, "a small red circle").correct
    assert judge(large, "a large red circle").correct


def test_a_two_coloured_square_is_no_square():
    image = draw((Placed("square", "yellow", 32, 32, 10),)).copy()
    image[:, :32][(image[:, :32] != 240).any(2)] = scenes.PALETTE["blue"]
    assert len(find_objects(image)) == 2
    assert not judge(image, "a yellow square").correct


def test_touching_objects_of_two_colours_are_told_apart():
    image = draw((Placed("square", "red", 24, 32, 9), Placed("square", "blue", 39.5, 32, 9)))
    assert judge(image, "a red square left of a blue square").correct


def test_an_empty_picture_has_no_objects_and_score_zero():
    verdict = judge(draw(()), "a red circle")
    assert (verdict.correct, verdict.score, verdict.quality) == (False, 0.0, 0.0)


def test_specks_and_faint_shapes_are_ignored():
    image = draw((Placed("circle", "red", 32, 32, 10),)).copy()
    image[5:8, 5:8] = (30, 90, 205)
    image[50:60, 50:60] = (215, 215, 215)
    assert judge(image, "a red circle").correct


def test_noise_is_not_a_picture():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not judge(noise, "a red circle").correct


def test_wrong_array_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(64, 64\)"):
        judge(np.zeros((64, 64), np.uint8), "a red circle")
