"""Every Fisher against enumeration: on the cotangents themselves, and through a model by autograd Jacobians."""

import pytest
import torch
from conftest import make_batch, make_lora_bert, make_lora_llama, randomise_b

from kalman_peft import AdapterState, CategoricalObservation, GaussianObservation, estimate_curvature
from kalman_peft.curvature.fisher import exact_count, kinds_for, resolve_reduction, score_cotangents


CAUSAL, PLAIN = CategoricalObservation(shift=True), CategoricalObservation(shift=False)
GAUSSIAN = GaussianObservation(0.4)


def make_outputs(observation, seed=0):
    """Logits of two sequences of unequal numbers of labels, with the curvature block of each observed row."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(observation, GaussianObservation):
        outputs = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        blocks = {(b,): torch.eye(3).double() / observation.variance for b in range(2)}
        return outputs, torch.randn(2, 3, generator=generator), blocks
    logits = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[-100, 1, 2, 0], [-100, 2, -100, -100]])
    rows = [(b, t) for b in range(2) for t in range(4) if labels[b, t] != -100]
    if observation.shift:
        rows = [(b, t - 1) for b, t in rows]
    p = logits.softmax(-1)
    return logits, labels, {row: p[row].diag() - torch.outer(p[row], p[row]) for row in rows}


def dense_second_moment(draws, shape):
    """Mean over draws of v v^T of whole sequences, (B, T V, T V)."""
    v = torch.stack(draws).reshape(len(draws), shape[0], -1)
    return torch.einsum("kbi,kbj->bij", v, v)


def dense_blocks(shape, blocks):
    """The output curvature of whole sequences, (B, T V, T V): one block per observed row, nothing between rows."""
    out = torch.zeros(*shape, *shape[1:], dtype=torch.float64)
    for row, block in blocks.items():
        out[(row[0], *row[1:], slice(None), *row[1:], slice(None))] = block
    size = shape[1:].numel()
    return out.reshape(shape[0], size, size)


@pytest.mark.parametrize("observation", [CAUSAL, PLAIN, GAUSSIAN])
def test_exact_cotangents_sum_to_the_output_curvature(observation):
    logits, labels, blocks = make_outputs(observation)
    cotangents, observed, _ = score_cotangents(logits, labels, observation, ["exact"])
    draws = list(cotangents)
    assert observed == len(blocks)
    longest = 1 if observation is GAUSSIAN else 3
    assert len(draws) == len(cotangents) == exact_count(logits, labels, observation) == 3 * longest
    torch.testing.assert_close(dense_second_moment(draws, logits.shape), dense_blocks(logits.shape, blocks))


@pytest.mark.parametrize("kind", ["sampled", "rademacher"])
@pytest.mark.parametrize("observation", [CAUSAL, PLAIN, GAUSSIAN])
def test_drawn_cotangents_converge_to_the_output_curvature(kind, observation):
    logits, labels, blocks = make_outputs(observation)
    expected = dense_blocks(logits.shape, blocks)
    generator = torch.Generator().manual_seed(1)
    errors = []
    for count in (100, 6400):
        draws = list(score_cotangents(logits, labels, observation, [kind] * count, generator)[0])
        errors.append((dense_second_moment(draws, logits.shape) / count - expected).norm() / expected.norm())
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 4  # 64 times the draws: 8 times less error, up to luck


@pytest.mark.parametrize("observation", [CAUSAL, PLAIN, GAUSSIAN])
def test_empirical_token_is_the_empirical_score_of_each_token_with_a_sign(observation):
    logits, labels, blocks = make_outputs(observation)
    (plain,) = score_cotangents(logits, labels, observation, ["empirical"])[0]
    count = 4000
    draws = list(
        score_cotangents(logits, labels, observation, ["empirical_token"] * count, torch.Generator().manual_seed(0))[0]
    )
    for draw in draws[:20]:
        torch.testing.assert_close(draw.abs(), plain.abs())
    own = {row: torch.outer(plain[row], plain[row]) for row in blocks}
    expected = dense_blocks(logits.shape, own)
    error = dense_second_moment(draws, logits.shape) / count - expected
    assert error.norm() < 0.05 * expected.norm()
    block_of_row = dense_blocks(logits.shape, {row: torch.ones(3, 3).double() for row in blocks}).bool()
    assert error[block_of_row].abs().max() < 1e-10  # a sign squares to one: only products of two tokens are random


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_loss_is_the_mean_negative_log_likelihood(fisher):
    logits, labels, _ = make_outputs(CAUSAL)
    _, count, loss = score_cotangents(logits, labels, CAUSAL, [fisher])
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert count == 4


def test_nothing_observed_gives_no_cotangent():
    logits, labels, _ = make_outputs(CAUSAL)
    cotangents, count, loss = score_cotangents(logits, torch.full_like(labels, -100), CAUSAL, ["exact", "sampled"])
    assert len(cotangents) == len(list(cotangents)) == count == loss == 0
    assert exact_count(logits, torch.full_like(labels, -100), CAUSAL) == 0


def test_exact_enumerates_packed_sequences_in_parallel():
    logits = torch.randn(1, 6, 3, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, 1, 1, 2]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert exact_count(logits, labels, CAUSAL) == 5 * 3
    assert exact_count(logits, labels, CAUSAL, segments) == 2 * 3
    cotangents, observed, _ = score_cotangents(logits, labels, CAUSAL, ["exact"], segments=segments)
    assert observed == 4
    draws = torch.stack(list(cotangents))[:, 0]
    assert draws[:, [2, 5]].abs().max() == 0
    both = draws.flatten(2).abs().sum(-1).gt(0)  # (cotangents, positions)
    assert (
        both.tolist()
        == [[True, False, False, True, False, False]] * 3 + [[False, True, False, False, True, False]] * 3
    )


# -- through a model -------------------------------------------------------------------------------------------------


def jacobian_fisher(model, outputs, observed_rows, curvature):
    """Diagonal of sum_i J_i^T H_i J_i per label, with J_i by autograd and H_i given."""
    state = AdapterState(model, warn_excluded=False)
    parameters = list(state.parameters().values())
    total = [torch.zeros_like(p) for p in parameters]
    for row in observed_rows:
        z = outputs[row]
        j = torch.autograd.grad(z, parameters, torch.eye(len(z), dtype=z.dtype), True, is_grads_batched=True)
        h = curvature(z.detach())
        for sum_, jp in zip(total, j, strict=True):
            sum_ += torch.einsum("c...,cd,d...->...", jp, h, jp)
    return {k: t / len(observed_rows) for k, t in zip(state.parameters(), total, strict=True)}


def categorical_curvature(z):
    p = z.softmax(-1)
    return p.diag() - torch.outer(p, p)


def make_case(task):
    """Model, batch, and the diagonal of the exact Fisher per label."""
    if task == "causal":
        model, batch = make_lora_llama(target_modules=["v_proj", "down_proj"]), make_batch(lengths=(4, 3), prompt=1)
        observed = [(b, t) for b, t in (batch["labels"][:, 1:] != -100).nonzero().tolist()]
        curvature = categorical_curvature
    else:
        outputs = {"classification": 3, "regression": 1, "regression of two": 2}[task]
        model, batch = make_lora_bert(num_labels=outputs), make_batch(lengths=(5, 3), prompt=0)
        randomise_b(model)
        if task == "classification":
            batch["labels"], curvature = torch.tensor([2, 0]), categorical_curvature
        else:
            model.base_model.model.config.problem_type = "regression"
            batch["labels"] = torch.randn(2, outputs) if outputs > 1 else torch.randn(2)
            curvature = lambda z: torch.eye(len(z)).double()  # noqa: E731
        observed = [(0,), (1,)]
    model.eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return model, batch, jacobian_fisher(model, logits, observed, curvature)


def run_diagonal(model, batch, fisher, **kwargs):
    return estimate_curvature(model, [batch], "diagonal", fisher, space="adapter", progress_bar=False, **kwargs)


TASKS = ["causal", "classification", "regression", "regression of two"]


@pytest.mark.parametrize("task", TASKS)
def test_exact_equals_enumeration_by_jacobians(task):
    model, batch, expected = make_case(task)
    precision, record = run_diagonal(model, batch, "exact")
    assert precision.entries.keys() == expected.keys()
    for key, f in precision.entries.items():
        # Llama's eager attention takes its softmax in float32
        torch.testing.assert_close(f, expected[key], rtol=1e-6, atol=1e-10)
    assert record["fisher"] == "exact" and record["reduction"] == "token"


def test_exact_of_a_regression_scales_with_the_variance():
    model, batch, expected = make_case("regression")
    precision, _ = run_diagonal(model, batch, "exact", observation=GaussianObservation(0.25))
    for key, f in precision.entries.items():
        torch.testing.assert_close(f, expected[key] / 0.25)


@pytest.mark.parametrize("fisher", ["sampled", "rademacher"])
@pytest.mark.parametrize("task", TASKS)
def test_drawn_fishers_converge_to_the_exact_one(task, fisher):
    model, batch, expected = make_case(task)
    reference = torch.cat([f.flatten() for f in expected.values()])
    precision, _ = run_diagonal(model, batch, fisher, num_samples=600)
    mean = torch.cat([precision.entries[k].flatten() for k in expected])
    assert ((mean - reference).norm() / reference.norm()) < 0.15


def test_exact_kronecker_of_one_label_is_the_fisher():
    # One position that carries gradient: sum_c vec(g_c x^T) vec(g_c x^T)^T = (sum_c g_c g_c^T) (x) x x^T.
    batch = make_batch(lengths=(2,), prompt=1)
    model = make_lora_llama(target_modules=["v_proj"])
    precision, _ = estimate_curvature(model, [batch], "kronecker", "exact", space="adapter", progress_bar=False)
    state = AdapterState(model)
    model.eval()
    z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, 0]
    j = torch.autograd.grad(z, list(state.parameters().values()), torch.eye(17).double(), is_grads_batched=True)
    h = categorical_curvature(z.detach())
    for key, jp in zip(state.parameters(), j, strict=True):
        left, right = precision.blocks.items()[key]
        flat = jp.flatten(1)
        dense = torch.kron(left.to_dense(), right.to_dense())
        torch.testing.assert_close(dense, flat.T @ h @ flat, rtol=1e-5, atol=1e-7)  # RMSNorm works in float32


def token_scores(model, batch):
    """The squared score of every label on its own, summed; per label."""
    state = AdapterState(model)
    model.eval()
    log_p = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    keep = (batch["labels"][:, 1:] != -100).nonzero().tolist()
    total = None
    for b, t in keep:
        score = log_p[b, t, batch["labels"][b, t + 1]]
        grads = torch.autograd.grad(score, list(state.parameters().values()), retain_graph=True)
        total = [g.square() + (0 if total is None else total[k]) for k, g in enumerate(grads)]
    return torch.cat([f.flatten() for f in total]) / len(keep)


def test_empirical_per_token_converges_to_the_sum_over_tokens():
    batch = make_batch(lengths=(4, 3), prompt=1)
    model = make_lora_llama(target_modules=["v_proj"])
    expected = token_scores(model, batch)
    per_sequence, record = run_diagonal(model, batch, "empirical")
    assert record["reduction"] == "sequence"
    errors = []
    for draws in (20, 1280):
        precision, record = run_diagonal(model, batch, "empirical", reduction="token", num_samples=draws)
        mean = torch.cat([f.flatten() for f in precision.entries.values()])
        errors.append(((mean - expected).norm() / expected.norm()).item())
    assert record["reduction"] == "token"
    assert errors[1] < 0.06 and errors[1] < errors[0] / 3
    other = torch.cat([f.flatten() for f in per_sequence.entries.values()])
    assert (other - expected).norm() > 0.3 * expected.norm()  # they are different Fishers


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_empirical_per_token_is_per_sequence_where_a_sequence_has_one_label(task):
    model, batch, _ = make_case(task)
    first, _ = run_diagonal(model, batch, "empirical")
    second, _ = run_diagonal(model, batch, "empirical", reduction="token")
    for key, f in first.entries.items():
        torch.testing.assert_close(f, second.entries[key], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("outputs", [1, 2])
def test_empirical_of_a_regression_matches_autograd(outputs):
    model, batch, _ = make_case("regression" if outputs == 1 else "regression of two")
    state = AdapterState(model, warn_excluded=False)
    precision, record = run_diagonal(model, batch, "empirical", observation=GaussianObservation(0.5))
    assert record["num_tokens"] == record["num_sequences"] == 2
    total = {k: 0 for k in state.parameters()}
    for row, n in enumerate((5, 3)):
        one = {k: batch[k][row : row + 1, :n] for k in ("input_ids", "attention_mask")}
        loss = (model(**one).logits[0] - batch["labels"][row]).square().sum() / (2 * 0.5)
        for k, g in zip(total, torch.autograd.grad(loss, list(state.parameters().values())), strict=True):
            total[k] = total[k] + g.square() / 2
    for key, f in precision.entries.items():
        torch.testing.assert_close(f, total[key], rtol=1e-9, atol=1e-12)


# -- names and refusals ----------------------------------------------------------------------------------------------


def test_reduction_is_resolved():
    assert resolve_reduction("empirical") == "sequence"
    assert resolve_reduction("empirical", "token") == "token"
    for fisher in ("sampled", "rademacher", "exact"):
        assert resolve_reduction(fisher) == resolve_reduction(fisher, "token") == "token"
    assert kinds_for("empirical", "token", 2) == (["empirical_token"] * 2, 0.5)
    assert kinds_for("empirical", "sequence") == (["empirical"], 1.0)
    assert kinds_for("exact", "token") == (["exact"], 1.0)
    assert kinds_for("rademacher", "token", 4) == (["rademacher"] * 4, 0.25)


@pytest.mark.parametrize("fisher", ["sampled", "rademacher", "exact"])
def test_raises_when_a_fisher_is_asked_for_per_sequence(fisher):
    with pytest.raises(ValueError, match="uncorrelated between tokens"):
        resolve_reduction(fisher, "sequence")


def test_raises_when_a_name_is_unknown():
    with pytest.raises(ValueError, match="fisher must be one of"):
        resolve_reduction("true")
    with pytest.raises(ValueError, match="reduction must be one of"):
        resolve_reduction("sampled", "batch")


@pytest.mark.parametrize("fisher,reduction,samples", [("exact", "token", 2), ("empirical", "sequence", 3), ("sampled", "token", 0)])  # fmt: skip
def test_raises_when_samples_are_asked_for_of_what_is_not_drawn(fisher, reduction, samples):
    with pytest.raises(ValueError, match="num_samples"):
        kinds_for(fisher, reduction, samples)


def test_raises_when_the_exact_fisher_takes_too_many_passes():
    logits, labels, _ = make_outputs(CAUSAL)
    with pytest.raises(ValueError, match=r"takes 9 backward passes.*3 labels.*3 outputs.*fisher='sampled'"):
        score_cotangents(logits, labels, CAUSAL, ["exact"], exact_limit=8)
    score_cotangents(logits, labels, CAUSAL, ["exact"], exact_limit=9)
    with pytest.raises(ValueError, match="more than 4096"):
        score_cotangents(torch.zeros(1, 3, 3000), torch.ones(1, 3).long(), CAUSAL, ["exact"])


def test_raises_when_outputs_are_not_finite():
    with pytest.raises(ValueError, match="NaN or Inf"):
        score_cotangents(torch.tensor([[float("nan")]]), torch.zeros(1), GAUSSIAN, ["empirical"])
