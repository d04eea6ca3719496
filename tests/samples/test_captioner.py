"""The captioner of the embedded world: true of the picture, and in the prompt's words where these are true."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from PIL import Image

from diffalign.samples import scenes
from diffalign.samples.captioner import describe
from diffalign.samples.judge import judge
from diffalign.samples.scenes import Placed


def drawn(*things: tuple[str, str, float, float, float]) -> Image.Image:
    """Things as (shape, colour, x, y, radius)."""
    return Image.fromarray(scenes.draw(tuple(Placed(*thing) for thing in things)))


RED_CIRCLE, BLUE_STAR = ("circle", "red", 16, 32, 8), ("star", "blue", 46, 34, 9)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle left of a blue star", "a red circle left of a blue star"),
        ("a blue star right of a red circle", "a blue star right of a red circle"),
        ("a blue star and a red circle", "a blue star and a red circle"),
        ("a blue star left of a red circle", "a blue star right of a red circle"),
        ("a red circle above a blue star", "a red circle left of a blue star"),
        ("a green circle and a blue star", "a red circle and a blue star"),
    ],
)
def test_two_things_are_told_in_the_order_of_the_prompt_and_never_where_they_are_not(prompt, expected):
    assert describe(drawn(RED_CIRCLE, BLUE_STAR), prompt) == expected


def test_the_size_of_one_thing_is_told_when_the_prompt_asks_for_one():
    small, large = drawn(("star", "red", 32, 32, 7)), drawn(("star", "red", 32, 32, 13))
    assert [describe(image, "a large red star") for image in (small, large)] == [
        "a small red star",
        "a large red star",
    ]
    assert describe(small, "a red star") == "a red star"


def test_things_that_are_alike_are_counted():
    row = [("star", "red", x, 32, 8) for x in (11, 32, 53)]
    assert describe(drawn(*row[:2]), "three red stars") == "two red stars"
    assert describe(drawn(*row), "a red star") == "three red stars"
    assert describe(drawn(*row[:2], ("star", "blue", 53, 32, 8)), "two red stars") == "three stars"
    five = [("star", "red", x, y, 7) for x, y in ((11, 12), (32, 12), (53, 12), (11, 40), (32, 40))]
    assert describe(drawn(*five), "a red star") == "three red stars"


def test_captions_of_rendered_scenes_are_true_of_them_whatever_the_prompt():
    worlds = [(scene, scenes.draw(placed)) for scene, placed in islice(scenes.training_scenes(3), 60)]
    pictures = [Image.fromarray(pixels) for _, pixels in worlds]
    for (_, pixels), image, (other, _) in zip(worlds, pictures, [*worlds[1:], worlds[0]], strict=True):
        assert judge(np.array(pixels), describe(image, scenes.caption(other))).correct
    # Prompts that leave a colour open get it told; all others are said again.
    closed = [
        (scenes.caption(scene), image)
        for (scene, _), image in zip(worlds, pictures, strict=True)
        if scene.category != "two_objects"
    ]
    assert len(closed) > 40
    assert all(describe(image, prompt) == prompt for prompt, image in closed)


def test_other_prompts_and_pictures():
    assert describe(drawn(RED_CIRCLE), "Portrait of a knight, oil on canvas") == "a red circle"
    with pytest.raises(ValueError, match="no circle, square, triangle or star"):
        describe(drawn(), "a red circle")
    with pytest.raises(ValueError, match="128x64 pixels; expected 64x64"):
        describe(Image.new("RGB", (128, 64)), "a red circle")
