import io
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Benchmarks are not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.method_cells import BACKBONES, METHODS, RELABELLED, cell, cells, noisy, table
from benchmarks.method_matrix import commands
from benchmarks.wrong_attributes import records
from diffalign.config import load_recipe, trainer_config
from diffalign.samples.judge import judge


def judged(difference, low, high):
    return {"metrics": {"scenes-judge": {"difference": difference, "interval": [low, high]}}}


@pytest.mark.parametrize("group", ["matrix", "label_noise", "dual_captions"])
def test_every_cell_is_a_valid_recipe_with_a_name_of_its_own(group, tmp_path):
    found = cells(group, None, list(BACKBONES), [0, 1])
    assert len({one.name for one in found}) == len(found)
    for one in found:
        overrides = commands(one, tmp_path, 10, 8)[0][5:]
        config = load_recipe(one.recipe, overrides)
        trainer_config(config)
        assert (config.seed, config.optim.steps) == (one.seed, 10)


def test_methods_that_assume_wrong_labels_are_told_how_many_there_are():
    # A tenth is wrong to begin with; of 40 % reversed ones 0.1 * 0.6 + 0.9 * 0.4 = 0.42.
    assert noisy(cell("cdpo", "tiny-sdxl", 0), 0.4).overrides["trainer.label_smoothing"] == 0.42
    assert noisy(cell("rdpo", "tiny-sdxl", 0), 0.2).overrides["trainer.label_flip"] == 0.26
    assert "trainer.label_smoothing" not in noisy(cell("dpo", "tiny-sdxl", 0), 0.4).overrides


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"\['dqo'\] should be of: dpo"):
        cells("matrix", ["dqo"], ["tiny-sdxl"], [0])
    with pytest.raises(ValueError, match="expected matrix, label_noise or dual_captions"):
        cells("everything", None, ["tiny-sdxl"], [0])


def test_a_cell_shows_its_interval_and_several_seeds_their_spread():
    first = cell(next(iter(METHODS)), "tiny-sdxl", 0)
    second = cell(first.method, "tiny-lcm", 0), cell(first.method, "tiny-lcm", 1)
    results = [
        (first, judged(0.05, -0.012, 0.1)),
        (second[0], judged(0.02, 0, 0)),
        (second[1], judged(0.04, 0, 0)),
    ]
    lines = table(results, "matrix")
    assert lines[0].startswith("| method | tiny-sdxl |")
    assert lines[2].startswith(f"| {first.method} | +5.0 (-1.2 to +10.0) | +3.0 ± 1.4 (+2.0, +4.0) |")
    assert len(lines) == 3


def test_flipped_and_relabelled_cells_stand_in_columns_of_their_share():
    found = cells("label_noise", ["dpo", RELABELLED], ["tiny-sdxl"], [0])
    lines = table([(one, judged(one.flipped, 0, 1)) for one in found], "label_noise")
    assert lines[0] == "| method | 0% flipped | 20% flipped | 40% flipped |"
    assert [line.count("+20.0") for line in lines[2:]] == [1, 1]
    assert lines[3].startswith("| dpo, relabelled |  | +20.0")


def test_wrong_attribute_pairs_are_right_for_their_own_captions_only():
    for record in islice(records(0), 40):
        assert record.prompt != record.prompt_1
        (right, wrong), prompts = (decoded(record.image_0), decoded(record.image_1)), record.prompts
        assert judge(right, prompts[0]).correct
        assert judge(wrong, prompts[1]).correct
        assert not judge(wrong, prompts[0]).correct
        assert (right != wrong).any()


def decoded(image):
    return np.asarray(Image.open(io.BytesIO(image)))
