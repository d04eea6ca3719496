"""Errors of pairs: hand-worked numbers, shared noise, the right target, gradients of the policy only."""

from __future__ import annotations

import types
from contextlib import contextmanager

import pytest
import torch

from diffalign.conditioning import Conditioning
from diffalign.data.batch import PairBatch
from diffalign.elbo import NoisedPairs, noise_pairs, pair_errors, reference_errors
from diffalign.process import Process
from diffalign.randomness import Draw

ABAR = torch.linspace(0.99, 0.01, 10, dtype=torch.float64)


class Network:
    """Answers with given predictions and remembers who was asked."""

    device = torch.device("cpu")

    def __init__(self, policy=None, reference=None, prediction="epsilon", tune="lora"):
        self.process = Process(prediction, ABAR)
        self.config = types.SimpleNamespace(tune=tune)
        self.policy, self.frozen = policy, reference
        self.asked = []

    @contextmanager
    def inference(self):
        with torch.no_grad():
            yield

    def predict(self, x_t, t, cond, reference=False):
        self.asked.append("reference" if reference else "policy")
        return self.frozen.detach() if reference else self.policy


def batch_of(count, elements=(4, 3, 3)):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, count, *elements, generator=generator)
    told = [Conditioning(torch.full((count, 1, 2), float(side))) for side in (1, 2)]
    ones = torch.ones(count)
    return PairBatch(chosen, rejected, *told, ones, ones, Draw(0, 0, range(count), range(count), count))


def hand_worked(policy):
    target, told = torch.zeros(2, 2), Conditioning(torch.zeros(2, 1, 1))
    # Chosen row first: reference errors (2^2 + 4^2)/2 = 10 and 0, policy errors (1 + 9)/2 = 5 and (4 + 0)/2 = 2.
    network = Network(policy, torch.tensor([[2.0, -4.0], [0.0, 0.0]]))
    return network, NoisedPairs(torch.zeros(2, 2), torch.zeros(2), target, told)


def test_hand_worked_errors():
    policy = torch.tensor([[1.0, 3.0], [2.0, 0.0]], requires_grad=True)
    network, pairs = hand_worked(policy)
    errors = pair_errors(network, pairs)
    assert [errors.chosen_error.item(), errors.rejected_error.item()] == [5.0, 2.0]
    assert [errors.chosen_delta.item(), errors.rejected_delta.item()] == [-5.0, 2.0]
    assert sorted(network.asked) == ["policy", "reference"]
    assert reference_errors(network, pairs).tolist() == [10.0, 0.0]


def test_stored_errors_replace_the_reference_forward_and_give_the_same_gradient():
    gradients = []
    for stored in (None, torch.tensor([10.0, 0.0])):
        policy = torch.tensor([[1.0, 3.0], [2.0, 0.0]], requires_grad=True)
        network, pairs = hand_worked(policy)
        errors = pair_errors(network, pairs, stored)
        assert [errors.chosen_delta.item(), errors.rejected_delta.item()] == [-5.0, 2.0]
        assert [errors.chosen_error.item(), errors.rejected_error.item()] == [5.0, 2.0]
        assert network.asked.count("reference") == (stored is None)
        assert not errors.chosen_error.requires_grad
        (errors.chosen_delta - errors.rejected_delta).sum().backward()
        gradients.append(policy.grad)
    # d/dp of the mean of p^2 over two elements is p, with the sign of each row.
    assert gradients[0].tolist() == gradients[1].tolist() == [[1.0, 3.0], [-2.0, 0.0]]


def test_before_full_fine_tuning_starts_the_network_is_its_own_reference():
    policy = torch.tensor([[1.0, 3.0], [2.0, 0.0]], requires_grad=True)
    network, pairs = hand_worked(policy)
    network.config.tune = "full"
    errors = reference_errors(network, pairs)
    assert network.asked == ["policy"]
    assert errors.tolist() == [5.0, 2.0]
    assert not errors.requires_grad


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_both_pictures_of_a_pair_get_the_same_noise_and_time(prediction):
    batch, t = batch_of(3), torch.tensor([0, 4, 9])
    noise = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    network = Network(prediction=prediction)
    pairs = noise_pairs(network, batch, t, noise)
    assert pairs.t.tolist() == [0, 4, 9, 0, 4, 9]
    assert pairs.conditioning.embeddings[:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]
    x0 = torch.cat([batch.chosen, batch.rejected])
    alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in network.process.alpha_sigma(pairs.t))
    seen = (pairs.x_t - alpha * x0) / sigma
    torch.testing.assert_close(seen, torch.cat([noise, noise]), rtol=1e-3, atol=1e-4)
    expected = {"epsilon": torch.cat([noise, noise]), "sample": x0}
    expected["v_prediction"] = alpha * expected["epsilon"] - sigma * x0
    torch.testing.assert_close(pairs.target, expected[prediction])


def test_errors_are_float32_when_the_network_answers_in_bf16():
    policy = torch.tensor([[1.0, 3.0], [2.0, 0.0]], dtype=torch.bfloat16)
    network, pairs = hand_worked(policy)
    errors = pair_errors(network, pairs)
    assert errors.chosen_delta.dtype == errors.chosen_error.dtype == torch.float32
