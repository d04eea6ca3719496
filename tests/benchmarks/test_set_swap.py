import sys
from pathlib import Path

import pytest
import torch

# Benchmarks are not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.set_swap import SCRATCH, frechet_works, measure, vendi_works


@pytest.mark.parametrize("works_of", [frechet_works, vendi_works])
def test_all_ways_give_the_same_value(works_of):
    works, error = works_of(70, 12, torch.device("cpu"))
    assert error < 1e-9
    scratch = works[SCRATCH].values()
    assert float(works["exchange, 64 one by one"].values()[0]) == pytest.approx(scratch, abs=1e-8)
    assert float(works["carried out"].values()) == pytest.approx(scratch, abs=1e-8)
    torch.testing.assert_close(
        works["exchange, 64 at once"].values(), works["exchange, 64 one by one"].values()
    )


def test_ratios_are_against_recomputation():
    result = measure(64, 4, repeats=2, warmup=0, device=torch.device("cpu"))
    assert [row["ratio"] for row in result["rows"] if row["way"] == SCRATCH] == [1.0, 1.0]
    assert len(result["rows"]) == 8
