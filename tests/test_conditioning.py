"""Row operations and number formats of conditioning."""

import pytest
import torch

from diffalign.conditioning import Conditioning


def make(n: int) -> Conditioning:
    rows = torch.arange(n, dtype=torch.float32)
    return Conditioning(rows.reshape(n, 1, 1).expand(n, 2, 3), rows.reshape(n, 1), rows.reshape(n, 1) + 1025)


def test_select_and_repeat_keep_fields_together():
    chosen = make(4).select([2, 0])
    assert chosen.pooled.flatten().tolist() == [2.0, 0.0]
    assert chosen.time_ids.flatten().tolist() == [1027.0, 1025.0]
    assert make(2).repeat(2).pooled.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_half_precision_leaves_time_ids_exact():
    half = make(1).to("cpu", torch.bfloat16)
    assert half.embeddings.dtype == half.pooled.dtype == torch.bfloat16
    assert half.time_ids.dtype == torch.float32
    # bf16 would have rounded it to 1024.
    assert half.time_ids.item() == 1025.0


def test_concat_joins_rows_and_refuses_different_fields():
    assert len(Conditioning.concat([make(2), make(3)])) == 5
    with pytest.raises(ValueError, match="different fields"):
        Conditioning.concat([make(2), Conditioning(torch.zeros(1, 2, 3))])
