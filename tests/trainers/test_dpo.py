"""Diffusion-DPO on cached scenes with a tiny random SDXL: exact starting point, shared draws, learning."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pair_world import counted_forwards, move_weights, open_model, open_pairs, whole_draw

from diffalign.errors import DiffalignError
from diffalign.evaluation.implicit import DRAWS, draws_seed, implicit_accuracy
from diffalign.objectives.pairwise import squared_error
from diffalign.reference import FixedDraws
from diffalign.trainers.dpo import DPOConfig, DPOTrainer
from diffalign.validation import validate_section


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where encoded scenes are kept for all tests of this file."""
    return tmp_path_factory.mktemp("pairs")


def make_trainer(model: Path, folder: Path, options=None, labels="given", **opening):
    backbone = open_model(model, **opening)
    trainer = DPOTrainer(DPOConfig(**(options or {})), backbone, seed=0)
    trainer.prepare(open_pairs(backbone, folder, labels=labels))
    return trainer


def official_losses(policy, reference, target, beta):
    """The authors' released computation, in float64; chosen rows first."""
    policy_w, policy_l = (policy.double() - target.double()).pow(2).mean([1, 2, 3]).chunk(2)
    reference_w, reference_l = (reference.double() - target.double()).pow(2).mean([1, 2, 3]).chunk(2)
    return -F.logsigmoid(-0.5 * beta * ((policy_w - policy_l) - (reference_w - reference_l)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("reference", "opening"),
    [
        ("adapters_off", {"tune": "lora"}),
        ("frozen_copy", {"tune": "lora", "frozen_copy": True}),
        ("frozen_copy", {"tune": "full", "frozen_copy": True}),
    ],
)
def test_margin_is_exactly_zero_and_loss_log_two_at_the_start(
    tiny_sdxl, folder, precision, reference, opening
):
    trainer = make_trainer(tiny_sdxl, folder, {"reference": reference}, precision=precision, **opening)
    batch = trainer.fetch(whole_draw())
    losses, metrics = trainer.loss(batch)
    assert torch.equal(metrics["margin"], torch.zeros(4))
    assert torch.equal(losses, torch.full((4,), math.log(2)))
    move_weights(trainer.backbone)
    assert trainer.loss(batch)[1]["margin"].abs().min() > 0


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.01), ("bf16", 1.0)])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_margin_is_tiny_at_the_start_with_stored_reference_errors(tiny_sdxl, folder, precision, bound, tune):
    """Stored errors were computed in other batches, so kernels round differently; beta / 2 = 2500 multiplies it."""
    options = {"reference": "cached", "reference_draws": 2, "caption_dropout": 0.5}
    trainer = make_trainer(tiny_sdxl, folder, options, precision=precision, tune=tune)
    for step in range(4):
        _, metrics = trainer.loss(trainer.fetch(whole_draw(step=step)))
        assert metrics["margin"].abs().max() < bound


def test_loss_equals_the_official_formula(tiny_sdxl, folder):
    trainer = make_trainer(tiny_sdxl, folder, {"beta": 5000})
    move_weights(trainer.backbone)
    batch = trainer.fetch(whole_draw())
    losses, metrics = trainer.loss(batch)
    pairs = trainer._noised(batch)
    outputs = [
        trainer.backbone.predict(pairs.x_t, pairs.t, pairs.conditioning, reference=frozen).detach()
        for frozen in (False, True)
    ]
    expected = official_losses(*outputs, pairs.target, 5000)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-3, atol=1e-3)
    error = squared_error(outputs[0], pairs.target)
    torch.testing.assert_close(torch.cat([metrics["chosen_error"], metrics["rejected_error"]]), error)
    assert torch.equal(metrics["implicit_accuracy"], (metrics["margin"] > 0).float())


def test_one_forward_of_policy_and_one_of_reference_share_noise_and_time(tiny_sdxl, folder):
    trainer = make_trainer(tiny_sdxl, folder)
    batch = trainer.fetch(whole_draw())
    with counted_forwards(trainer.backbone) as calls:
        trainer.loss(batch)
    assert sorted(call["reference"] for call in calls) == [False, True]
    assert torch.equal(calls[0]["x_t"], calls[1]["x_t"])
    t, x_t = calls[0]["t"], calls[0]["x_t"]
    assert torch.equal(t[:4], t[4:])
    assert len(set(t[:4].tolist())) == 4
    alpha, _ = trainer.backbone.process.alpha_sigma(t[:4])
    noise_apart = (x_t[:4] - x_t[4:]) - alpha.reshape(-1, 1, 1, 1) * (batch.chosen - batch.rejected)
    assert noise_apart.abs().max() < 1e-5


def test_losses_do_not_depend_on_how_the_batch_is_split(tiny_sdxl, folder):
    trainer = make_trainer(tiny_sdxl, folder, {"caption_dropout": 0.5})
    move_weights(trainer.backbone)
    draw = whole_draw()
    whole = trainer._noised(trainer.fetch(draw))
    halves = [trainer._noised(trainer.fetch(draw.slice(start, start + 2))) for start in (0, 2)]
    for i, half in enumerate(halves):
        rows = [2 * i, 2 * i + 1, 4 + 2 * i, 5 + 2 * i]
        assert torch.equal(half.x_t, whole.x_t[rows])
        assert torch.equal(half.t, whole.t[rows])
        assert torch.equal(half.conditioning.embeddings, whole.conditioning.embeddings[rows])
    losses, _ = trainer.loss(trainer.fetch(draw))
    parts = [trainer.loss(trainer.fetch(draw.slice(start, start + 2)))[0] for start in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), losses, rtol=1e-3, atol=1e-3)


def test_the_next_step_draws_other_noise(tiny_sdxl, folder):
    trainer = make_trainer(tiny_sdxl, folder)
    first, second = (trainer._noised(trainer.fetch(whole_draw(step=step))) for step in (0, 1))
    assert not torch.equal(first.t, second.t)
    assert (first.x_t - second.x_t).abs().mean() > 0.1


def test_times_cover_the_schedule_evenly_or_crowd_in_its_middle(tiny_sdxl, folder):
    """Stratified: one time per sixth for six pairs. Logit-normal: 68 % within one deviation, 0.27 T to 0.73 T."""
    draw = whole_draw(6)
    spread = make_trainer(tiny_sdxl, folder)
    times = spread._noised(spread.fetch(draw)).t[:6]
    assert sorted(int(t) * 6 // 1000 for t in times) == list(range(6))
    middle = make_trainer(tiny_sdxl, folder, {"time_weighting": "logit_normal"})
    uniform = torch.linspace(0.0005, 0.9995, 1000)
    inner = (middle.backbone.process.times(uniform, "logit_normal") - 500).abs() < 231
    assert inner.float().mean().item() == pytest.approx(0.683, abs=0.01)
    seen = middle._noised(middle.fetch(draw)).t[:6]
    assert (seen - 500).abs().float().mean() < (times - 500).abs().float().mean()


def test_captions_stay_by_default(tiny_sdxl, folder):
    assert DPOConfig().caption_dropout == 0
    trainer = make_trainer(tiny_sdxl, folder)
    batch = trainer.fetch(whole_draw())
    assert (batch.conditioning_chosen.embeddings.abs().sum((1, 2)) > 0).all()


def test_caption_dropout_replaces_rows_by_the_unconditional_embedding(tiny_sdxl, folder):
    """SDXL's pipeline uses zeros as the unconditional branch; sizes are no text and stay."""
    plain, dropping = (
        make_trainer(tiny_sdxl, folder, {"caption_dropout": rate}).fetch(whole_draw(6)) for rate in (0.0, 0.5)
    )
    for side in ("conditioning_chosen", "conditioning_rejected"):
        before, after = getattr(plain, side), getattr(dropping, side)
        dropped = after.embeddings.abs().sum((1, 2)) == 0
        assert 0 < dropped.sum() < 6
        assert torch.equal(after.pooled.abs().sum(1) == 0, dropped)
        assert torch.equal(after.embeddings[~dropped], before.embeddings[~dropped])
        assert torch.equal(after.pooled[~dropped], before.pooled[~dropped])
        assert torch.equal(after.time_ids, before.time_ids)
    assert torch.equal(
        dropping.conditioning_chosen.embeddings.abs().sum((1, 2)) == 0,
        dropping.conditioning_rejected.embeddings.abs().sum((1, 2)) == 0,
    )


def test_sum_with_beta_divided_by_the_elements_equals_mean(tiny_sdxl, folder):
    elements = 4 * 16 * 16
    by_mean = make_trainer(tiny_sdxl, folder, {"beta": 2048, "reduction": "mean"})
    by_sum = make_trainer(tiny_sdxl, folder, {"beta": 2048 / elements, "reduction": "sum"})
    results = []
    for trainer in (by_mean, by_sum):
        move_weights(trainer.backbone)
        results.append(trainer.loss(trainer.fetch(whole_draw()))[0])
    assert torch.equal(*results)
    assert by_sum.beta == by_mean.beta == 2048


def test_a_v_prediction_model_is_trained_on_velocities(tiny_sd_v, folder):
    """Historic bug: noise as the target of a model that predicts velocities."""
    trainer = make_trainer(tiny_sd_v, folder)
    move_weights(trainer.backbone)
    batch = trainer.fetch(whole_draw())
    losses, _ = trainer.loss(batch)
    pairs = trainer._noised(batch)
    x0 = torch.cat([batch.chosen, batch.rejected])
    noise = torch.cat([batch.draw.normal(batch.chosen.shape[1:], "noise")] * 2)
    alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in trainer.backbone.process.alpha_sigma(pairs.t))
    velocity = alpha * noise - sigma * x0
    torch.testing.assert_close(pairs.target, velocity)
    outputs = [
        trainer.backbone.predict(pairs.x_t, pairs.t, pairs.conditioning, reference=frozen).detach()
        for frozen in (False, True)
    ]
    right, wrong = (official_losses(*outputs, target, 5000.0) for target in (velocity, noise))
    torch.testing.assert_close(losses.double(), right, rtol=1e-3, atol=1e-3)
    assert (losses - wrong).abs().max() > 0.1


def test_a_tie_pulls_to_no_side_and_weights_scale_the_loss(tiny_sdxl, folder):
    trainer = make_trainer(tiny_sdxl, folder)
    batch = trainer.fetch(whole_draw())
    half = replace(batch, preference=torch.full((4,), 0.5))
    trainer.loss(half)[0].sum().backward()
    gradients = [p.grad for _, p in trainer.backbone.trainable_parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.abs().max() == 0 for gradient in gradients)
    heavy = replace(batch, weight=torch.tensor([1.0, 2.0, 0.0, 1.0]))
    losses = trainer.loss(heavy)[0]
    torch.testing.assert_close(losses, math.log(2) * heavy.weight)


def train_a_little(trainer: DPOTrainer, steps: int = 12) -> None:
    """Repeat one batch."""
    batch = trainer.fetch(whole_draw())
    optimizer = torch.optim.AdamW([p for _, p in trainer.backbone.trainable_parameters()], lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        trainer.loss(batch)[0].mean().backward()
        optimizer.step()


@pytest.mark.parametrize("reference", ["adapters_off", "cached"])
def test_a_few_steps_raise_the_margin_and_swapped_labels_lower_it(tiny_sdxl, folder, reference):
    margins = {}
    for labels in ("given", "swapped"):
        trainer = make_trainer(tiny_sdxl, folder, {"reference": reference, "reference_draws": 1}, labels)
        train_a_little(trainer)
        judged = make_trainer(tiny_sdxl, folder)
        judged.backbone.load_trainable_state(trainer.backbone.trainable_state())
        draw = trainer.fetch(whole_draw()).draw
        chosen, rejected = judged.deltas(judged._batch(draw), draw)
        margins[labels] = judged.margin(chosen, rejected).mean().item()
    assert margins["given"] > 0.1
    assert margins["swapped"] < -0.1


def test_only_full_fine_tuning_without_stored_errors_needs_a_second_network():
    def needs(reference, tune):
        return DPOTrainer.needs_frozen_copy(DPOConfig(reference=reference), tune)

    assert not needs("adapters_off", "lora")
    assert needs("adapters_off", "full")
    assert needs("frozen_copy", "lora")
    assert needs("frozen_copy", "full")
    assert not needs("cached", "full")


def test_full_fine_tuning_with_stored_errors_measures_held_out_pairs_without_a_second_network(
    tiny_sdxl, folder, tmp_path
):
    copied = make_trainer(tiny_sdxl, folder, {"reference": "frozen_copy"}, tune="full", frozen_copy=True)
    stored = make_trainer(tiny_sdxl, folder, {"reference": "cached", "reference_draws": 1}, tune="full")
    held_out = open_pairs(stored.backbone, folder)
    fixed = FixedDraws(held_out, draws_seed(5), DRAWS)
    stored.prepare(held_out, tmp_path / "reference", held_out=fixed)
    results = []
    for trainer in (copied, stored):
        move_weights(trainer.backbone, 0.01)
        results.append(implicit_accuracy(trainer, trainer.backbone, held_out, seed=5, batch_size=4))
    assert results[0]["margin"] != 0
    assert results[1] == pytest.approx(results[0], rel=1e-2)
    # A resumed run finds the files, though its weights will be others by then.
    again = make_trainer(tiny_sdxl, folder, {"reference": "cached", "reference_draws": 1}, tune="full")
    with counted_forwards(again.backbone) as calls:
        again.prepare(held_out, tmp_path / "reference", held_out=fixed)
    assert not calls


def test_full_fine_tuning_without_any_reference_says_so(tiny_sdxl, folder):
    trainer = make_trainer(tiny_sdxl, folder, {"reference": "cached", "reference_draws": 1}, tune="full")
    with pytest.raises(DiffalignError, match="frozen copy"):
        implicit_accuracy(trainer, trainer.backbone, trainer._cache, seed=0, batch_size=4)


def test_fetch_before_prepare_says_what_to_do(tiny_sdxl):
    trainer = DPOTrainer(DPOConfig(), open_model(tiny_sdxl))
    with pytest.raises(RuntimeError, match="prepare"):
        trainer.fetch(whole_draw())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, r"trainer\.beta: is 0; expected"),
        ({"beta": -5}, r"trainer\.beta: is -5"),
        ({"label_smoothing": 0.5}, r"trainer\.label_smoothing: is 0\.5"),
        ({"label_smoothing": -0.1}, r"trainer\.label_smoothing"),
        ({"caption_dropout": 1.0}, r"trainer\.caption_dropout"),
        ({"reference_draws": 0}, r"trainer\.reference_draws"),
        ({"reference": "adapter_off"}, r"adapters_off"),
        ({"betta": 500}, r"did you mean trainer\.beta\?"),
        ({"label_smooth": 0.1}, r"did you mean trainer\.label_smoothing\?"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(DiffalignError, match=message):
        validate_section(DPOConfig, {"method": "dpo", **options}, "trainer")
