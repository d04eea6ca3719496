"""Draws belong to records and steps, not to a stream."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.randomness import Draw, batch_records, derive_seed


def whole(step: int = 3, size: int = 8) -> Draw:
    return Draw(
        seed=1, step=step, records=list(range(10, 10 + size)), positions=list(range(size)), global_batch=size
    )


@given(cut=st.integers(1, 7), stratified=st.booleans())
@settings(deadline=None, max_examples=20)
def test_draws_do_not_depend_on_the_batch_split(cut, stratified):
    draw = whole()
    parts = [draw.slice(0, cut), draw.slice(cut, 8)]
    assert torch.equal(draw.normal((2, 3), "noise"), torch.cat([p.normal((2, 3), "noise") for p in parts]))
    uniform = torch.cat([p.uniform("time", stratified=stratified) for p in parts])
    assert torch.equal(draw.uniform("time", stratified=stratified), uniform)


def test_draws_differ_by_seed_step_record_and_use():
    draw = whole()
    noise = draw.normal((4,), "noise")
    assert len({tuple(row.tolist()) for row in noise}) == 8
    assert not torch.equal(noise, whole(step=4).normal((4,), "noise"))
    assert not torch.equal(noise, draw.normal((4,), "posterior"))


def test_stratified_draws_fall_once_into_each_stratum():
    uniform = whole().uniform("time", stratified=True)
    assert sorted((uniform * 8).floor().long().tolist()) == list(range(8))


def test_epochs_visit_every_record_once_and_continue_across_steps():
    visited = [r for step in range(10) for r in batch_records(seed=0, step=step, global_batch=3, size=15)]
    assert sorted(visited[:15]) == list(range(15))
    assert sorted(visited[15:30]) == list(range(15))
    assert visited[:15] != visited[15:30]
    # A batch may straddle two epochs, and may be larger than the data.
    assert sorted(batch_records(0, 0, 4, 2)) == [0, 0, 1, 1]


def test_seeds_are_stable_and_order_sensitive():
    assert derive_seed("a", 1) == derive_seed("a", 1) != derive_seed(1, "a")
    assert 0 <= derive_seed("a", 1) < 2**63
