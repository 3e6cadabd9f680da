"""Losses against the reference code's numbers, plain-Python oracles and closed forms.

`tests/golden/aspo.json` was computed in float64 by the reference code of arXiv 2510.06062
(github.com/wizard-III/Archer2.0 at b08d963, `verl/trainer/ppo/core_algos.py`); its `meta` says how.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aspo_learner.losses import (
    LOSSES,
    Mean,
    aggregate,
    aspo_loss,
    behavior_correction,
    effective_sample_size,
    entropy_split_mask,
    grpo_loss,
    k3_kl,
    merge_metrics,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "aspo.json").read_text())
KEYS = ("logprobs", "old_logprobs", "advantages", "mask")
BATCHES = ["batch_token_mean", "batch_seq_mean_token_mean", "batch_token_mean_kl_k3"]
AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
PER_TOKEN = {"aggregation": "seq-mean-token-sum", "normalizer": 1}  # the gradient is each token's own

quick = settings(max_examples=50, deadline=None, database=None)
log_ratios = st.floats(-25, 25) | st.floats(-0.5, 0.5)
poisons = st.sampled_from([math.nan, math.inf, -math.inf, 1e30])
seeds = st.integers(0, 2**32 - 1)


def t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ones(like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool)


def gradient(loss: Any, logprobs: Tensor, *args: Any, **options: Any) -> Tensor:
    leaf = logprobs.clone().requires_grad_()
    loss(leaf, *args, **options)[0].backward()
    assert leaf.grad is not None
    return leaf.grad


def close(got: Tensor | None, want: Tensor | None, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)


def pick(batch: dict[str, Tensor]) -> list[Tensor]:
    return [batch[key] for key in KEYS]


def random_batch(seed: int, rows: int = 4, columns: int = 6, spread: float = 0.5) -> dict[str, Tensor]:
    """Rows of one sign each, with ragged lengths; the last row may be empty."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, columns, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=g)
    lengths[-1] = seed % 2 * lengths[-1]
    noise = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return {
        "logprobs": old + spread * noise,
        "old_logprobs": old,
        "advantages": torch.randn(rows, 1, generator=g, dtype=torch.float64).expand(rows, columns),
        "mask": torch.arange(columns).expand(rows, columns) < lengths,
        "correction": 2 * torch.rand(rows, columns, generator=g, dtype=torch.float64),
    }


def test_every_golden_case_is_used() -> None:
    assert set(GOLDEN) == {"meta", "grid", "grid_eps_asym", *BATCHES}


GRID_GRADIENTS = [
    ("grid", aspo_loss, "grad_log_prob"),
    ("grid_eps_asym", aspo_loss, "grad_log_prob"),
    ("grid", grpo_loss, "grpo_dualclip_grad"),
]


@pytest.mark.parametrize(("grid", "loss", "column"), GRID_GRADIENTS)
def test_golden_grid_gradients(grid: str, loss: Any, column: str) -> None:
    eps = {name: GOLDEN[grid]["params"][name] for name in ("eps_low", "eps_high")}
    columns = ("log_prob", "old_log_prob", "advantage", column)
    new, old, adv, want = (t([[row[name]] for row in GOLDEN[grid]["rows"]]) for name in columns)
    close(gradient(loss, new, old, adv, ones(new), **PER_TOKEN, **eps), want, rtol=1e-6)


@pytest.mark.parametrize("case", BATCHES)
def test_golden_batches(case: str) -> None:
    inputs, params, outputs = (GOLDEN[case][name] for name in ("inputs", "params", "outputs"))
    new, old, adv = (t(inputs[name]) for name in ("log_prob", "old_log_prob", "advantages"))
    mask = torch.tensor(inputs["mask"])
    aggregation, kl_coef = params["agg_mode"], params.get("kl_coef", 0.0)
    clips = {name: params[name] for name in ("eps_low", "eps_high", "dual_clip_neg", "dual_clip_pos")}
    new.requires_grad_()
    loss, metrics = aspo_loss(new, old, adv, mask, aggregation=aggregation, **clips)
    if kl_coef:
        kl = aggregate(k3_kl(new, t(inputs["ref_log_prob"]), mask), mask, aggregation)
        assert kl.item() == pytest.approx(outputs["kl_loss"], rel=1e-6)
        loss = loss + kl_coef * kl
    loss.backward()
    close(new.grad, t(outputs["grad_log_prob"]), rtol=1e-6)

    # the reference divides the hard-clip fractions by all tokens, and stores fractions in float32
    got = [float(metrics[f"clip_fraction_{sign}"].numerator) / int(mask.sum()) for sign in ("pos", "neg")]
    got += [float(metrics[f"dual_clip_fraction_{sign}"]) for sign in ("neg", "pos")]
    assert got == pytest.approx(list(outputs["metrics"].values()), rel=1e-6)


def oracle_weight(log_ratio: float, adv: float, eps: tuple[float, float], caps: Any, kind: str) -> float:
    """k * w of one token, as the table in the paper's notation reads."""
    r = math.exp(max(-20.0, min(20.0, log_ratio)))
    cap_pos, cap_neg = caps
    if adv < 0:
        if r < 1 - eps[0]:
            return 0.0
        return cap_neg if r > cap_neg else r
    if r > 1 + eps[1]:
        return 0.0
    w = {"reciprocal": 1 / r, "one": 1.0, "ratio": r}[kind]
    return cap_pos if w > cap_pos else w


@quick
@given(
    st.lists(
        st.tuples(log_ratios, st.sampled_from([-2.0, 0.0, 0.5]), st.booleans(), st.floats(0, 2)), min_size=1
    ),
    st.tuples(st.sampled_from([0.1, 0.2, 0.3]), st.sampled_from([0.1, 0.2, 0.28])),
    st.tuples(st.floats(1.5, 10), st.floats(1.5, 10)),
    st.sampled_from(["reciprocal", "one", "ratio"]),
)
def test_gradient_is_minus_advantage_correction_mask_weight(
    tokens: list[Any], base_eps: tuple[float, float], caps: tuple[float, float], kind: str
) -> None:
    want = []
    for x, adv, low_entropy, b in tokens:
        eps = base_eps if low_entropy else (0.4, 0.4)
        assume(all(abs(math.exp(x) - edge) > 1e-9 for edge in (1 - eps[0], 1 + eps[1])))
        want.append(-adv * b * oracle_weight(x, adv, eps, caps, kind))
    log_ratio, adv, low_entropy, b = (t([list(column)]) for column in zip(*tokens, strict=True))
    options = dict(
        zip(("eps_low", "eps_high", "dual_clip_pos", "dual_clip_neg"), base_eps + caps, strict=True)
    )
    options |= {"correction": b, "positive_weight": kind, "clip_low_entropy_mask": low_entropy.bool()}
    arguments = (log_ratio - 1.5, torch.full_like(adv, -1.5), adv, ones(adv))
    close(gradient(aspo_loss, *arguments, **options, **PER_TOKEN), t([want]), rtol=1e-6)


@pytest.mark.parametrize("entropy_mask", [None, torch.tensor([[True]])])
@pytest.mark.parametrize("loss", [aspo_loss, grpo_loss])
@pytest.mark.parametrize("log_ratio", [0.3, -0.3])
def test_the_clip_edge_keeps_its_gradient_and_the_next_number_does_not(
    log_ratio: float, loss: Any, entropy_mask: Tensor | None
) -> None:
    adv, ratio = math.copysign(1, log_ratio), t([[log_ratio]]).exp().item()
    for edge, alive in ((ratio, True), (math.nextafter(ratio, 1.0), False)):
        eps = abs(edge - 1)
        assert 1 + adv * eps == edge
        options = {"eps_low": eps, "eps_high": eps, "clip_low_entropy_mask": entropy_mask}
        got = gradient(loss, t([[log_ratio]]), t([[0.0]]), t([[adv]]), torch.tensor([[1]]), **options)
        assert bool(got.item() != 0) is alive


def test_log_ratio_is_bounded_and_its_gradient_alive() -> None:
    new, old, adv = t([[-1000.0, 0.0]]), t([[0.0, -1000.0]]), t([[1.0, -1.0]])
    options = {"dual_clip_pos": math.inf, "dual_clip_neg": math.inf} | PER_TOKEN
    close(gradient(aspo_loss, new, old, adv, ones(new), **options), math.exp(20) * t([[-1.0, 1.0]]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_on_policy_every_loss_is_the_plain_policy_gradient(name: str, aggregation: str) -> None:
    batch = random_batch(7)
    new, adv, mask = batch["logprobs"], batch["advantages"], batch["mask"]
    got = gradient(LOSSES[name], new, new, adv, mask, aggregation=aggregation)
    lengths = mask.double().sum(-1, keepdim=True)
    sequences = (lengths > 0).sum()
    share = lengths.sum() if aggregation == "token-mean" else lengths.clamp(min=1) * sequences
    close(got, -adv * mask / share)


def test_response_mean_gives_a_response_one_weight_but_keeps_each_tokens_clip() -> None:
    ratios = t([[0.5, 1.0, 1.6, 9.0], [0.5, 1.0, 1.6, 9.0], [8.0, 1.1, 0.9, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0]] * 3)
    adv = t([[1.0] * 4, [-1.0] * 4, [2.0] * 4])
    got = gradient(LOSSES["response-mean"], ratios.log(), torch.zeros_like(ratios), adv, mask, **PER_TOKEN)
    mean, saturated = (0.5 + 1.0 + 1.6) / 3, 3.0  # the third row's mean is 10 / 3
    close(got, t([[-mean, -mean, 0, 0], [0, 1.0, 1.6, 0], [0, -2 * saturated, -2 * saturated, 0]]))


def test_named_ablations_differ_only_in_the_positive_weight() -> None:
    new, old, adv = t([[0.5, 0.7]]).log(), t([[0.0, 0.0]]), t([[1.0, 1.0]])
    want = {"aspo": [2, 1 / 0.7], "no-is": [1, 1], "response-mean": [0.6, 0.6], "ratio": [0.5, 0.7]}
    for name, weights in want.items():
        close(gradient(LOSSES[name], new, old, adv, ones(new), **PER_TOKEN), -t([weights]))


@quick
@given(seeds, st.sampled_from(["grpo", "dapo"]), st.sampled_from(["token-mean", "seq-mean-token-mean"]))
def test_grpo_is_the_gradient_of_the_clipped_objective(seed: int, name: str, aggregation: str) -> None:
    batch = random_batch(seed, spread=1.2)
    high = 0.2 if name == "grpo" else 0.28
    new, mask = batch["logprobs"].clone().requires_grad_(), batch["mask"]
    total = t(0.0)
    for i in range(len(new)):
        for j in range(int(mask[i].sum())):
            r, adv = (new[i, j] - batch["old_logprobs"][i, j]).exp(), batch["advantages"][i, j]
            objective = torch.minimum(r * adv, r.clamp(0.8, 1 + high) * adv)
            objective = torch.maximum(objective, 3 * adv) if adv < 0 else objective
            share = mask.sum() if aggregation == "token-mean" else mask[i].sum() * mask.any(-1).sum()
            total = total - objective / share
    total.backward()
    close(gradient(LOSSES[name], *pick(batch), aggregation=aggregation), new.grad)


def test_each_comparison_loss_has_its_papers_aggregation_and_range() -> None:
    new, old, adv = t([[1.25, 1.0], [1.0, 1.0]]).log(), torch.zeros(2, 2).double(), torch.ones(2, 2).double()
    mask = torch.tensor([[1, 1], [1, 0]])
    close(gradient(grpo_loss, new, old, adv, mask), t([[0, -1 / 4], [-1 / 2, 0]]))
    close(gradient(LOSSES["dapo"], new, old, adv, mask), t([[-1.25 / 3, -1 / 3], [-1 / 3, 0]]))
    close(gradient(LOSSES["gspo"], new, old, adv, mask), t([[0, 0], [-1 / 2, 0]]))
    close(gradient(LOSSES["cispo"], new, old, adv, mask), t([[-1.25 / 3, -1 / 3], [-1 / 3, 0]]))


@quick
@given(seeds, st.floats(0.01, 1.0))
def test_gspo_is_the_gradient_of_the_sequence_objective(seed: int, eps: float) -> None:
    batch = random_batch(seed)
    new, mask = batch["logprobs"].clone().requires_grad_(), batch["mask"]
    objective = t(0.0)
    for i in range(len(new)):
        n, adv = int(mask[i].sum()), batch["advantages"][i, 0]
        if n:
            s = torch.prod((new[i, :n] - batch["old_logprobs"][i, :n]).exp()) ** (1 / n)
            objective = objective + torch.minimum(s * adv, s.clamp(1 - eps, 1 + eps) * adv)
    (-objective / mask.any(-1).sum()).backward()
    close(gradient(LOSSES["gspo"], *pick(batch), eps_low=eps, eps_high=eps), new.grad)


def test_cispo_clips_the_weight_of_both_signs_and_drops_no_token() -> None:
    ratios = t([[0.01, 0.6, 1.0, 1.9, 50.0]])
    for adv in (1.5, -1.5):
        arguments = (ratios.log(), torch.zeros_like(ratios), torch.full_like(ratios, adv), ones(ratios))
        got = gradient(LOSSES["cispo"], *arguments, eps_low=0.5, eps_high=0.8, **PER_TOKEN)
        close(got, -adv * t([[0.5, 0.6, 1.0, 1.8, 1.8]]))


@quick
@given(seeds, st.sampled_from(list(LOSSES)), st.sampled_from(AGGREGATIONS), poisons)
def test_what_is_masked_never_matters(seed: int, name: str, aggregation: str, poison: float) -> None:
    batch = random_batch(seed)
    mask = batch["mask"] = batch["mask"] & (batch["correction"] > 0.5)  # holes inside sequences too
    dirty = {key: x if key == "mask" else torch.where(mask, x, poison) for key, x in batch.items()}
    results = []
    for x, kept in ((batch, mask), (dirty, mask.int()), (dirty, mask.double())):
        new = x["logprobs"].clone().requires_grad_()
        arguments = (new, x["old_logprobs"], x["advantages"], kept)
        loss, metrics = LOSSES[name](*arguments, aggregation=aggregation, correction=x["correction"])
        loss.backward()
        sums = [(float(mean.numerator), float(mean.denominator)) for mean in metrics.values()]
        results.append((loss.item(), new.grad, sums))
    (loss, grad, sums), *others = results
    assert not grad[~mask].any()
    assert math.isfinite(loss)
    for other_loss, other_grad, other_sums in others:
        assert torch.equal(other_grad, grad)
        assert (other_loss, other_sums) == (loss, sums)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages", "correction"])
def test_a_nan_that_counts_is_not_hidden(name: str, where: str) -> None:
    batch = random_batch(3)
    batch[where] = batch[where].clone()
    batch[where][0, 0] = math.nan
    loss, metrics = LOSSES[name](*pick(batch), correction=batch["correction"])
    if (name, where) == ("no-is", "old_logprobs"):  # its positive weight is 1 whatever the ratio
        assert math.isnan(float(metrics["ratio_mean"]))
    else:
        assert math.isnan(loss.item())


@quick
@given(seeds, st.sampled_from(list(LOSSES)), st.sampled_from(AGGREGATIONS), st.sets(st.integers(1, 4)))
def test_micro_batches_add_up_to_the_batch(seed: int, name: str, aggregation: str, cuts: set[int]) -> None:
    batch = random_batch(seed, rows=5)
    counted = batch["mask"] if aggregation == "token-mean" else batch["mask"].any(-1)
    whole = batch["logprobs"].clone().requires_grad_()
    loss, metrics = LOSSES[name](
        whole, *pick(batch)[1:], aggregation=aggregation, correction=batch["correction"]
    )
    loss.backward()

    parts = batch["logprobs"].clone().requires_grad_()
    total, pieces = t(0.0), []
    for start, stop in pairwise([0, *sorted(cuts), 5]):
        piece = (parts[start:stop], *(x[start:stop] for x in pick(batch)[1:]))
        options = {"correction": batch["correction"][start:stop], "normalizer": float(counted.sum())}
        part, part_metrics = LOSSES[name](*piece, aggregation=aggregation, **options)
        part.backward()
        total, pieces = total + part.detach(), [*pieces, part_metrics]
    close(total, loss.detach())
    close(parts.grad, whole.grad)
    merged = merge_metrics(pieces)
    assert merged.keys() == metrics.keys()
    for key, mean in metrics.items():
        assert float(merged[key]) == pytest.approx(float(mean), rel=1e-9, abs=1e-12, nan_ok=True)
        assert float(merged[key].denominator) == float(mean.denominator)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_empty_sequence_is_no_sequence_and_an_empty_batch_is_zero(name: str, aggregation: str) -> None:
    batch = random_batch(1)
    assert bool(batch["mask"].any(-1).all())
    longer = [torch.cat([x, torch.zeros_like(x[:2])]) for x in pick(batch)]
    alone = LOSSES[name](*pick(batch), aggregation=aggregation)[0]
    close(LOSSES[name](*longer, aggregation=aggregation)[0], alone)

    new = batch["logprobs"].clone().requires_grad_()
    arguments = (new, batch["old_logprobs"], batch["advantages"], torch.zeros_like(batch["mask"]))
    for normalizer in (None, 0, 5):
        loss, metrics = LOSSES[name](*arguments, aggregation=aggregation, normalizer=normalizer)
        (grad,) = torch.autograd.grad(loss, new)
        assert loss.item() == 0
        assert not grad.any()
        assert all(math.isnan(float(mean)) for mean in metrics.values())


def test_half_precision_inputs_are_computed_in_float32() -> None:
    *floats, mask = pick(random_batch(5))
    half = [x.bfloat16() for x in floats]
    loss = aspo_loss(*half, mask)[0]
    assert loss.dtype == torch.float32
    assert loss == aspo_loss(*(x.float() for x in half), mask)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_only_logprobs_gets_a_gradient(name: str) -> None:
    batch = random_batch(5)
    leaves = {key: x if key == "mask" else x.clone().requires_grad_() for key, x in batch.items()}
    loss, metrics = LOSSES[name](**leaves)
    loss.backward()
    assert [key for key, x in leaves.items() if x.grad is not None] == ["logprobs"]
    assert not any(x.numerator.requires_grad for x in metrics.values())


def test_metrics_of_a_batch_done_by_hand() -> None:
    ratios = t([[0.1, 1.0, 2.0, 7.0], [0.5, 2.0, 8.0, 7.0], [9.0, 9.0, 7.0, 7.0]])
    adv = t([[1.0] * 4, [-2.0] * 4, [0.0] * 4])
    b = t([[0.5] * 4, [1.0] * 4, [1.0] * 4])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    metrics = aspo_loss(ratios.log(), torch.zeros_like(ratios), adv, mask, correction=b)[1]
    logs = [math.log(x) for x in (0.1, 1.0, 2.0, 0.5, 2.0, 8.0, 9.0, 9.0)]
    weights = [0.5 * 3, 0.5 * 1, 0, 0, 2, 3, 0, 0]
    want = {
        "surrogate": (1 * 0.5 * (3 + 1) - 2 * (2 + 3)) / 8,
        "ratio_mean": (3.1 + 10.5 + 18) / 8,
        "ratio_mean_pos": 3.1 / 3,
        "ratio_mean_neg": 10.5 / 3,
        "weight_mean_pos": (3 + 1 + 0) / 3,
        "weight_mean_neg": (0 + 2 + 3) / 3,
        **{f"{clip}_fraction_{sign}": 1 / 3 for clip in ("clip", "dual_clip") for sign in ("pos", "neg")},
        "corrected_weight_mean": sum(weights) / 8,
        "corrected_weight_square_mean": sum(w * w for w in weights) / 8,
        "approx_kl_k1": -sum(logs) / 8,
        "approx_kl_k3": sum(math.exp(x) - 1 - x for x in logs) / 8,
    }
    assert {name: float(mean) for name, mean in metrics.items()} == pytest.approx(want)
    share = float(effective_sample_size(t([weights]), ones(t([weights])))) / 8
    assert want["corrected_weight_mean"] ** 2 / want["corrected_weight_square_mean"] == pytest.approx(share)


def test_metrics_of_comparison_losses_say_which_clip_it_was() -> None:
    ratios, adv = t([[0.5, 1.0, 9.0, 9.0]]), t([[-1.0, -1.0, -1.0, 1.0]])
    arguments = (ratios.log(), torch.zeros_like(ratios), adv, ones(ratios))
    fractions = ("clip_fraction_neg", "dual_clip_fraction_neg", "clip_fraction_pos", "dual_clip_fraction_pos")
    names = ("weight_mean_neg", *fractions)
    want = {
        "aspo": (4 / 3, 1 / 3, 1 / 3, 1, 0),
        "ratio": (4 / 3, 1 / 3, 1 / 3, 1, 0),
        "grpo": (1 / 3, 1 / 3, 1 / 3, 1, 0),
        "cispo": (6.5 / 3, 0, 1 / 3, 0, 1),
    }
    for name, values in want.items():
        metrics = LOSSES[name](*arguments)[1]
        assert [float(metrics[key]) for key in names] == pytest.approx(list(values))
    sequence = LOSSES["gspo"](*arguments)[1]
    assert float(sequence["ratio_mean_neg"]) == pytest.approx(40.5**0.25)
    assert float(sequence["approx_kl_k1"]) == pytest.approx(-math.log(40.5) / 4)
    assert float(sequence["clip_fraction_pos"]) == 1


def test_means_add_and_a_mean_of_nothing_is_nan() -> None:
    assert float(Mean(1, 4) + Mean(t(2.0), t(2.0))) == 0.5
    assert math.isnan(float(Mean(0, 0)))
    merged = merge_metrics([{"a": Mean(1, 2)}, {"a": Mean(2, 2), "b": Mean(3, 1)}])
    assert {name: float(mean) for name, mean in merged.items()} == {"a": 0.75, "b": 3.0}
    assert merge_metrics([]) == {}


def test_k3_kl_value_bounds_and_gradient() -> None:
    ref = t([[-1.0, -1.0, -1.0, -30.0, -1.0, math.nan]]).requires_grad_()
    new = t([[-1.0, -1.5, -4.0, -1.0, -1e4, math.nan]]).requires_grad_()
    kl = k3_kl(new, ref, mask := torch.tensor([[1, 1, 1, 1, 1, 0]]))
    close(kl.detach(), t([[0, math.exp(0.5) - 1.5, 10, 10, 10, 0]]))
    kl.sum().backward()
    close(new.grad, t([[0, 1 - math.exp(0.5), 0, 0, 0, 0]]))
    assert (ref.grad, aggregate(ref, mask).item()) == (None, -34 / 5)


def test_entropy_split_takes_each_rows_lowest_fraction() -> None:
    falling = torch.arange(10.0, 0.0, -1.0)
    entropy = torch.stack([falling, 100 * falling, torch.ones(10), falling, falling])
    mask = torch.ones(5, 10, dtype=torch.int64)
    mask[3, :5] = mask[4] = 0
    entropy[3, :5] = math.nan
    got = entropy_split_mask(entropy, mask)
    assert got.dtype == torch.bool
    assert got.int().tolist() == [[0] * 2 + [1] * 8] * 2 + [[1] * 10, [0] * 6 + [1] * 4, [0] * 10]
    assert entropy_split_mask(entropy, mask, low_fraction=0.5)[0].tolist() == [False] * 5 + [True] * 5


def test_behavior_correction_modes_and_levels() -> None:
    s = t([[0.25, 1.0, 3.0, 7.0], [0.5, 2.0, 1.5, 7.0]])
    proximal, behavior = s.log() - 1, torch.full_like(s, -1.0)
    proximal[:, 3] = math.nan
    mask = torch.tensor([[1, 1, 1, 0]] * 2)

    def b(**options: Any) -> Tensor:
        result = behavior_correction(proximal.clone().requires_grad_(), behavior, mask, **options)
        assert not result.requires_grad
        return result

    close(b(), t([[0.25, 1, 2, 0], [0.5, 2, 1.5, 0]]))
    close(b(cap=1.2), t([[0.25, 1, 1.2, 0], [0.5, 1.2, 1.2, 0]]))
    close(b(mode="mask", floor=0.4, cap=2.5), t([[0, 1, 0, 0], [0.5, 2, 1.5, 0]]))
    close(b(mode="none"), t([[1, 1, 1, 0]] * 2))
    close(b(level="sequence", cap=1.0), t([[0.75, 0.75, 0.75, 0], [1, 1, 1, 0]]))
    close(b(level="sequence", mode="mask", floor=1.0), t([[0, 0, 0, 0], [1.5, 1.5, 1.5, 0]]))


def test_behavior_correction_is_bounded_and_keeps_its_edges() -> None:
    far, near = t([[30.0, 30.0]]), t([[0.0, 0.0]])
    for level in ("token", "sequence"):
        close(behavior_correction(far, near, ones(far), level=level, cap=math.inf), t([[math.exp(20)] * 2]))
    close(behavior_correction(near, near, ones(near), mode="mask", floor=1.0, cap=1.0), t([[1.0, 1.0]]))


def test_effective_sample_size() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    for weights, want in (([2, 2, 2, 2, 9], 4.0), ([0, 0, 5, 0, 9], 1.0), ([1, 2, 3, 0, math.nan], 36 / 14)):
        assert float(effective_sample_size(t([weights]), mask)) == pytest.approx(want)
    assert float(effective_sample_size(t([[0.0] * 5]), mask)) == 0


X, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
BAD_ARGUMENTS = [
    ((X, X, X[:, 0], MASK), {}, r"advantages has shape \(2,\): expand it to \(2, 3\)"),
    ((X, X[:1], X, MASK), {}, "old_logprobs has shape"),
    ((X, X, X, MASK[:, :2]), {}, "mask has shape"),
    ((X[0], X[0], X[0], MASK[0]), {}, r"make it \[sequences, tokens\]"),
    ((X, X, X, MASK), {"correction": X[:1]}, "correction has shape"),
    ((X, X, X, MASK), {"aggregation": "mean"}, "use token-mean, seq-mean-token-mean or"),
    *(((X, X, X, MASK), {"normalizer": n}, "pass the whole batch's count") for n in (-1, 0.5, math.nan)),
]
BAD_CALLS = [
    *((loss, *bad) for loss in LOSSES.values() for bad in BAD_ARGUMENTS),
    (aspo_loss, (X, X, X, MASK), {"positive_weight": "flip"}, "use reciprocal, one"),
    (grpo_loss, (X, X, X, MASK), {"clip_low_entropy_mask": MASK[:1]}, "clip_low_entropy_mask has shape"),
    (behavior_correction, (X, X, MASK), {"mode": "clip"}, "use truncate"),
    (behavior_correction, (X, X, MASK), {"level": "row"}, "use token or sequence"),
    (k3_kl, (X, X[:1], MASK), {}, "ref_logprobs has shape"),
    (entropy_split_mask, (X, MASK[:1]), {}, "mask has shape"),
    (effective_sample_size, (X, MASK[:1]), {}, "mask has shape"),
    (aggregate, (X, MASK[:1]), {}, "mask has shape"),
]


def test_bad_arguments_say_what_to_do() -> None:
    for function, arguments, options, message in BAD_CALLS:
        with pytest.raises(ValueError, match=message):
            function(*arguments, **options)
