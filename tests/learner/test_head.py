"""The fused head against float64 log_softmax: values, gradients, tiles, and what it holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aspo_learner import head
from aspo_learner.head import token_logprobs_and_entropy


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._TILES, "cpu", (5, 7))


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


def problem(n: int, vocabulary: int, *, scale: float = 1.0, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n * vocabulary)
    hidden = (scale * torch.randn(n, width, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (n,))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("n", "vocabulary"), [(1, 1), (1, 40), (5, 7), (6, 8), (23, 50), (12, 3)])
def test_values_and_gradients_are_those_of_log_softmax(n: int, vocabulary: int, temperature: float) -> None:
    hidden, weight, targets = problem(n, vocabulary)
    slopes = torch.randn(2, n, dtype=torch.float64)
    results = []
    for compute in (
        lambda: oracle(hidden, weight, targets, temperature),
        lambda: token_logprobs_and_entropy(hidden, weight, targets, temperature=temperature),
    ):
        logprobs, entropy = compute()
        gradients = torch.autograd.grad((slopes[0] * logprobs + slopes[1] * entropy).sum(), (hidden, weight))
        results.append((logprobs, entropy, *gradients))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("result", [0, 1])
def test_each_result_has_its_own_gradient(result: int) -> None:
    hidden, weight, targets = problem(9, 20)
    expected = torch.autograd.grad(oracle(hidden, weight, targets, 1.0)[result].sum(), (hidden, weight))
    found = torch.autograd.grad(
        token_logprobs_and_entropy(hidden, weight, targets)[result].sum(), (hidden, weight)
    )
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_fp32_stays_near_float64_for_flat_and_for_peaked_distributions(scale: float) -> None:
    hidden, weight, targets = problem(40, 200, scale=scale)
    expected = oracle(hidden, weight, targets, 1.0)
    found = token_logprobs_and_entropy(hidden.float(), weight.float(), targets)
    magnitude = max(float((hidden @ weight.T).abs().max().detach()), math.log(len(weight)))
    for left, right in zip(expected, found, strict=True):
        assert right.dtype == torch.float32
        assert bool(torch.isfinite(right).all())
        assert float((right - left).detach().abs().max()) < 2e-6 * magnitude


def test_a_tile_far_above_the_ones_before_it_takes_over() -> None:
    hidden = torch.ones(3, 1)
    weight = torch.cat([torch.full((7, 1), -500.0), torch.full((7, 1), 500.0), torch.zeros(7, 1)])
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, torch.tensor([8, 0, 20]))
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -1000.0, -500.0]) - torch.tensor(7.0).log())
    torch.testing.assert_close(entropy, torch.full((3,), 7.0).log())


def test_bf16_products_are_summed_in_fp32() -> None:
    hidden, weight, targets = (t.detach() for t in problem(30, 100, width=64))
    low = hidden.bfloat16().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(low, weight.float().requires_grad_(), targets)
    expected = oracle(low.double(), weight.bfloat16().double(), targets, 1.0)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, targets = problem(9, 20)
    token_logprobs_and_entropy(hidden, weight.detach(), targets)[0].sum().backward()
    assert hidden.grad is not None
    token_logprobs_and_entropy(hidden.detach(), weight, targets)[0].sum().backward()
    assert weight.grad is not None
    assert not token_logprobs_and_entropy(hidden.detach(), weight.detach(), targets)[0].requires_grad


def test_no_tokens_give_empty_results_and_no_gradient() -> None:
    hidden, weight, _ = problem(1, 20)
    logprobs, entropy = token_logprobs_and_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
