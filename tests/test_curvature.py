"""Curvature against per-sequence autograd, exact enumeration of labels, and the invariances of its units."""

import copy
import warnings

import pytest
import torch
from conftest import make_batch, make_lora_bert, make_lora_llama
from torch.nn import functional as F

from kalman_peft import AdapterState, estimate_curvature
from kalman_peft.curvature.fisher import scoring
from kalman_peft.curvature.memory import SPACES, STRUCTURES
from kalman_peft.curvature.taps import tapped
from kalman_peft.observations import CategoricalObservation
from kalman_peft.precision.base import Layout
from kalman_peft.sampling import invert_cdf


ALL = [
    (s, space) for s in STRUCTURES for space in SPACES if space == "adapter" or s in ("diagonal", "kronecker", "ekfac")
]


def shifted_log_likelihood(model, batch, row):
    """Sum of log p over the labels of one sequence, computed on that sequence alone."""
    real = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row][real][None], batch["labels"][row][real]
    log_p = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    keep = labels[1:] != -100
    return log_p[:-1][keep].gather(-1, labels[1:][keep][:, None]).sum()


def reference_diagonal(model, batch, space="adapter"):
    """Sum over sequences of squared scores, by one autograd call per sequence."""
    state = AdapterState(model)
    model.eval()
    total = None
    for row in range(len(batch["labels"])):
        log_likelihood = shifted_log_likelihood(model, batch, row)
        grads = torch.autograd.grad(log_likelihood, list(state.parameters().values()))
        squares = {k: g.square() for k, g in zip(state.parameters(), grads, strict=True)}
        total = squares if total is None else {k: total[k] + squares[k] for k in total}
    tokens = (batch["labels"][:, 1:] != -100).sum()
    return {k: v / tokens for k, v in total.items()}


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"v_proj": 3}}])
def test_diagonal_empirical_is_exact_per_sequence(batch, lora):
    model = make_lora_llama(**lora)
    precision, record = estimate_curvature(
        model, [batch], "diagonal", "empirical", space="adapter", progress_bar=False
    )
    for key, expected in reference_diagonal(model, batch).items():
        torch.testing.assert_close(precision.entries[key], expected, rtol=1e-9, atol=1e-12)
    assert record["num_tokens"] == (batch["labels"][:, 1:] != -100).sum()
    assert record["num_sequences"] == 3


def test_delta_diagonal_empirical_is_exact(batch):
    # Gradient of the merged weight, by autograd through a dense update of the base weight.
    model = make_lora_llama()
    precision, _ = estimate_curvature(model, [batch], "diagonal", "empirical", space="delta_w", progress_bar=False)
    merged = copy.deepcopy(model).merge_and_unload()
    weights = {n: m.weight for n, m in merged.named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))}
    for w in weights.values():
        w.requires_grad_(True)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    expected = {n: 0 for n in weights}
    for row in range(3):
        grads = torch.autograd.grad(shifted_log_likelihood(merged, batch, row), list(weights.values()))
        for n, g in zip(weights, grads, strict=True):
            expected[n] = expected[n] + g.square() / tokens
    assert len(precision.entries) == len(weights)
    for name, f in precision.entries.items():
        torch.testing.assert_close(f, expected[name.removeprefix("base_model.model.")], rtol=1e-8, atol=1e-12)


def exact_fisher_diagonal(model, batch):
    """sum over tokens and classes of p (d log p)^2: the diagonal of the generalized Gauss-Newton matrix."""
    state = AdapterState(model)
    model.eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    rows = logits[:, :-1][labels != -100]
    log_p = rows.log_softmax(-1)
    n, v = log_p.shape
    basis = torch.eye(n * v, dtype=log_p.dtype).view(n * v, n, v)
    jacobian = torch.autograd.grad(log_p, list(state.parameters().values()), basis, is_grads_batched=True)
    p = log_p.detach().exp().reshape(-1)
    return {
        k: torch.einsum("n,n...->...", p, j.square()) / n for k, j in zip(state.parameters(), jacobian, strict=True)
    }


def test_diagonal_sampled_converges_to_exact_gauss_newton():
    batch = make_batch(lengths=(4, 3), prompt=1)
    model = make_lora_llama(target_modules=["v_proj"])
    exact = torch.cat([v.flatten() for v in exact_fisher_diagonal(model, batch).values()])
    errors = []
    for draws in (50, 3200):
        precision, _ = estimate_curvature(
            model, [batch], "diagonal", "sampled", space="adapter", num_samples=draws, progress_bar=False
        )
        mean = torch.cat([v.flatten() for v in precision.entries.values()])
        errors.append(((mean - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.06
    assert errors[1] < errors[0] / 4  # 64 times the draws: 8 times less error, up to luck


def test_kronecker_is_exact_for_a_single_datum():
    # One observed token in a one-token sequence: one rank-one gradient per factor, whose square is L (x) R.
    batch = make_batch(lengths=(2,), prompt=1)
    batch["input_ids"][:, 1] = 5
    model = make_lora_llama(target_modules=["v_proj", "down_proj"])
    state = AdapterState(model)
    for space in ("adapter", "delta_w"):
        precision, _ = estimate_curvature(model, [batch], "kronecker", "empirical", space=space, progress_bar=False)
        if space == "adapter":
            grads = torch.autograd.grad(shifted_log_likelihood(model, batch, 0), list(state.parameters().values()))
            expected = dict(zip(state.parameters(), grads, strict=True))
        else:
            merged = copy.deepcopy(model).merge_and_unload()
            weights = {
                "base_model.model." + n: m.weight.requires_grad_(True)
                for n, m in merged.named_modules() if n.endswith(("v_proj", "down_proj"))
            }  # fmt: skip
            grads = torch.autograd.grad(shifted_log_likelihood(merged, batch, 0), list(weights.values()))
            expected = dict(zip(weights, grads, strict=True))
        for name, (left, right) in precision.blocks.items().items():
            dense = torch.kron(left.to_dense(), right.to_dense())
            g = expected[name].reshape(-1)
            torch.testing.assert_close(dense, torch.outer(g, g), rtol=1e-7, atol=1e-10)


def test_kronecker_exact_fisher_of_a_linear_gaussian_layer():
    # Cotangents with identity covariance: E[g g^T] (x) E[x x^T] is the Fisher of a linear layer with Gaussian loss.
    from kalman_peft.curvature.moments import SecondMoment

    torch.manual_seed(0)
    x, w = torch.randn(50, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    inputs = SecondMoment(4, 4, 256, "x", x)
    inputs.add(x, 1.0)
    right = inputs.finalize()
    hessian = torch.autograd.functional.hessian(lambda v: (x @ v.T).square().sum() / 2, w).reshape(12, 12)
    torch.testing.assert_close(torch.kron(torch.eye(3, dtype=torch.float64), right.to_dense()), hessian)


def probe(precision):
    """The precision times three random vectors: tells two matrices apart, whatever their eigenvectors' signs."""
    layout = Layout(precision.coordinates())
    vectors = torch.randn(3, layout.size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return {f"{i}.{key}": y for i, x in enumerate(vectors) for key, y in precision.matvec(layout.unflatten(x)).items()}


def run_empirical(model, batches, structure="kronecker", space="delta_w"):
    precision, _ = estimate_curvature(model, batches, structure, "empirical", space=space, progress_bar=False)
    return probe(precision)


def assert_same(first, second, rtol=1e-8, atol=1e-11):
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=rtol, atol=atol)


@pytest.mark.parametrize("structure,space", ALL, ids="-".join)
class TestInvariances:
    def test_padding_side_and_length(self, structure, space):
        model = make_lora_llama(attn="sdpa")  # eager masks overflow to NaN in float64 where a row is all padding
        right = run_empirical(model, [make_batch()], structure, space)
        left = make_batch(side="left")
        left["position_ids"] = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        assert_same(right, run_empirical(model, [left], structure, space))
        longer = {k: F.pad(v, (0, 3), value=-100 if k == "labels" else 0) for k, v in make_batch().items()}
        assert_same(right, run_empirical(model, [longer], structure, space))

    def test_batch_split(self, structure, space, batch):
        model = make_lora_llama()
        split = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
        assert_same(run_empirical(model, [batch], structure, space), run_empirical(model, split, structure, space))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, structure, space, batch, reentrant):
        model = make_lora_llama()
        plain = run_empirical(model, [batch], structure, space)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        assert_same(plain, run_empirical(model, [batch], structure, space))
        assert model.training and all(m.training for m in model.modules())

    def test_sdpa_equals_eager_and_dropout_is_off(self, structure, space, batch):
        eager = run_empirical(make_lora_llama(), [batch], structure, space)
        sdpa = make_lora_llama(attn="sdpa", lora_dropout=0.5, model_overrides={"attention_dropout": 0.5}).train()
        assert_same(
            eager, run_empirical(sdpa, [batch], structure, space), rtol=1e-3, atol=1e-6
        )  # eager's softmax is float32

    def test_bf16_keeps_the_trace_and_sums_in_float32(self, structure, space):
        batches = [make_batch(lengths=(9, 7, 8, 6), seed=s) for s in range(8)]

        def run(model):
            return estimate_curvature(model, batches, structure, "empirical", space=space, progress_bar=False)[0]

        reference = run(make_lora_llama(torch.float32, attn="sdpa"))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = run(make_lora_llama(torch.float32, attn="sdpa"))
        pure = run(make_lora_llama(torch.float32, attn="sdpa").to(torch.bfloat16))
        trace, expected = reference.to_dense().trace(), probe(reference)
        size = sum(v.square().sum() for v in expected.values())
        for precision, allowed in ((pure, 0.01), (mixed, 0.02)):
            assert precision.dtype == torch.float32
            assert abs(precision.to_dense().trace() / trace - 1) < allowed
            error = sum((v - expected[k]).square().sum() for k, v in probe(precision).items())
            assert 0 < error < 0.08**2 * size


def test_input_moment_counts_real_positions_that_carry_gradient(batch):
    # S is the mean of x x^T over positions before the last label of each sequence, prompt included.
    model = make_lora_llama(target_modules=["q_proj"])
    seen = []
    handle = model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].detach())
    )
    precision, _ = estimate_curvature(model, [batch], "kronecker", "empirical", progress_bar=False)
    handle.remove()
    rows = torch.cat([seen[0][i, : n - 1] for i, n in enumerate((6, 4, 5))])
    _, right = precision.blocks.items()["base_model.model.model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(right.to_dense(), rows.T @ rows / len(rows))


def test_sequence_classification_matches_autograd():
    model = make_lora_bert()
    batch = make_batch(lengths=(5, 3), prompt=0)
    batch["labels"] = torch.tensor([2, 0])
    state = AdapterState(model, warn_excluded=False)
    precision, record = estimate_curvature(
        model, [batch], "diagonal", "empirical", space="adapter", progress_bar=False
    )
    model.eval()
    expected = {k: 0 for k in state.parameters()}
    for row, n in enumerate((5, 3)):
        one = {k: batch[k][row : row + 1, :n] for k in ("input_ids", "attention_mask")}
        loss = F.cross_entropy(model(**one).logits, batch["labels"][row : row + 1])
        for k, g in zip(expected, torch.autograd.grad(loss, list(state.parameters().values())), strict=True):
            expected[k] = expected[k] + g.square() / 2
    assert record["num_tokens"] == 2
    assert_same(precision.entries, expected)


def test_curvature_of_a_vanishes_at_zero_b_and_is_warned_of(batch):
    model = make_lora_llama(random_b=False)
    with pytest.warns(UserWarning, match="every lora_A is exactly zero.*delta_w"):
        precision, _ = estimate_curvature(model, [batch], "diagonal", space="adapter", progress_bar=False)
    for key, f in precision.entries.items():
        assert (f.abs().max() == 0) == ("lora_A" in key)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged, _ = estimate_curvature(model, [batch], progress_bar=False)
    assert all(s.trace() > 0 for pair in merged.blocks.items().values() for s in pair)


@pytest.mark.parametrize("reentrant", [True, False])
def test_taps_reproduce_every_gradient(batch, reentrant):
    model = make_lora_llama(lora_dropout=0.3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    state = AdapterState(model)
    sums: dict[str, torch.Tensor] = {}
    calls: list[tuple] = []

    def handler(index, side, inputs, grads):
        pair = state.pairs[index]
        key = pair.key_a if side == "a" else pair.key_b
        calls.append((index, side))
        sums[key] = torch.einsum("bto,bti->oi", grads, inputs)

    with tapped(state, handler):
        model(**batch).loss.backward()
    assert len(calls) == len(set(calls)) == 2 * len(state)  # every factor once
    for key, p in state.parameters().items():
        torch.testing.assert_close(sums[key], p.grad)


def test_everything_is_restored_after_an_exception(batch):
    model = make_lora_llama().train()
    model.config.use_cache = True
    state = AdapterState(model)
    model(**batch).loss.backward()
    grads = {k: p.grad.clone() for k, p in state.parameters().items()}
    flags = [p.requires_grad for p in model.parameters()]
    bad = {k: v.clone() for k, v in batch.items()}
    bad["labels"][0, 3] = 99
    with pytest.raises(ValueError, match="outside the 17 classes"):
        estimate_curvature(model, [batch, bad], progress_bar=False)
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.config.use_cache is True
    assert all(not m._forward_hooks for p in state for m in (p.linear_a, p.linear_b))
    assert_same({k: p.grad for k, p in state.parameters().items()}, grads)


def test_frozen_adapter_can_be_measured(batch):
    model = make_lora_llama()
    for p in model.parameters():
        p.requires_grad_(False)
    reference = run_empirical(make_lora_llama(), [batch])
    assert_same(run_empirical(model, [batch]), reference)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("require_grads", [False, True])
def test_raises_when_the_adapter_is_merged_disabled_or_not_active(batch, require_grads):
    model = make_lora_llama()
    model.add_adapter("other", model.peft_config["default"])
    if require_grads:
        model.enable_input_require_grads()
    with pytest.raises(ValueError, match="No gradient reaches adapter 'other'"):
        estimate_curvature(model, [batch], adapter_name="other", progress_bar=False)
    with model.disable_adapter(), pytest.raises(ValueError, match="No gradient reaches"):
        estimate_curvature(model, [batch], progress_bar=False)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        estimate_curvature(model, [batch], progress_bar=False)


@pytest.mark.parametrize("loader", [[], [make_batch(prompt=6)]])
def test_raises_when_nothing_is_observed(loader):
    with pytest.raises(ValueError, match="held no labels"):
        estimate_curvature(make_lora_llama(), loader, progress_bar=False)


def test_raises_when_labels_are_missing(batch):
    batch.pop("labels")
    with pytest.raises(ValueError, match="no `labels`"):
        estimate_curvature(make_lora_llama(), [batch], progress_bar=False)


def test_raises_when_logits_are_not_finite(batch):
    model = make_lora_llama()
    model.base_model.model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        estimate_curvature(model, [batch], progress_bar=False)


@pytest.mark.parametrize(
    "kwargs,match",
    [
        ({"structure": "banded"}, "structure must be one of"),
        ({"structure": "dense"}, "over the factors A and B: use space='adapter'"),
        ({"fisher": "true"}, "fisher must be one of"),
        ({"space": "w"}, "space must be one of"),
        ({"fisher": "empirical", "num_samples": 2}, "num_samples"),
        ({"rank": 0}, "rank must be"),
        ({"rank": 1.5}, "rank must be a whole number"),
        ({"max_batches": "3"}, "max_batches must be a whole number"),
        ({"max_samples": 0}, "max_samples must be"),
        ({"weights": {"a": 1.0}}, "several sources"),
    ],
)
def test_raises_when_an_option_is_unknown(batch, kwargs, match):
    with pytest.raises(ValueError, match=match):
        estimate_curvature(make_lora_llama(), [batch], progress_bar=False, **kwargs)


def test_raises_when_dora_meets_delta_w(batch):
    with pytest.raises(ValueError, match="scaling \\* B A"):
        estimate_curvature(make_lora_llama(use_dora=True), [batch], progress_bar=False)


def test_raises_when_the_task_is_unknown():
    model = make_lora_bert()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="single-label classification"):
        estimate_curvature(model, [], progress_bar=False)


def test_sampler_draws_from_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 700, generator=generator).mul(2)
    logits[0, 100:300] = -torch.inf
    p = logits.softmax(-1).expand(200_000, -1)
    draws = invert_cdf(p, generator)
    frequency = torch.bincount(draws, minlength=700) / len(draws)
    assert frequency[100:300].sum() == 0
    # chi-square with 499 degrees of freedom
    keep = p[0] > 0
    statistic = (len(draws) * (frequency - p[0])[keep].square() / p[0][keep]).sum()
    assert statistic < 650


def test_scoring_asks_for_no_weight_gradient(batch):
    model = make_lora_llama()
    with scoring(AdapterState(model)):
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training


def test_positions_of_bidirectional_models_are_the_attention_mask():
    observation = CategoricalObservation(shift=False)
    mask = torch.tensor([[1, 1, 0]])
    assert observation.positions(torch.tensor([1]), mask).tolist() == [[True, True, False]]
    assert observation.positions(torch.tensor([1]), None) is None
