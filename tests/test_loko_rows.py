"""Scores and information of rows, damped and weighed, against dense matrices in float64."""

import pytest
import torch
from test_observation_roots import check_second_moment

from kalman_peft import CategoricalObservation, GaussianObservation, LoKO
from kalman_peft.loko.rows import linearise


F64 = torch.float64
PLAIN = CategoricalObservation(shift=False)
LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.4, -0.5], dtype=F64)


def read(logits, labels, observation=PLAIN, damping=0.0, form="logit", outlier_threshold=None, **kwargs):
    options = {"damping": damping, "form": form, "outlier_threshold": outlier_threshold}
    return linearise(logits, labels, observation, options=options, **kwargs)


def curvature():
    p = LOGITS.softmax(-1)
    return torch.diag(p) - torch.outer(p, p)


def information(damping, form):
    h = curvature()
    if form == "logit":
        return h + damping / 4 * (torch.eye(5, dtype=F64) - 1 / 5)  # of trace `damping`
    return h @ torch.linalg.inv(h + damping / 4 * torch.eye(5, dtype=F64)) @ h


DAMPED = [(0.0, "logit"), (0.3, "logit"), (0.3, "softmax"), (0.01, "softmax")]


@pytest.mark.parametrize("damping,form", DAMPED)
@pytest.mark.parametrize("kind", ["sampled", "rademacher"])
def test_draws_have_the_information_of_their_form(kind, damping, form):
    n = 20_000
    rows = read(LOGITS.expand(n, 5), torch.zeros(n).long(), damping=damping, form=form)
    drawn = rows.draw(kind, rows.random(0, 3))
    assert (drawn.mean(0).abs() < 4.5 * drawn.std(0) / n**0.5 + 1e-12).all()
    check_second_moment(drawn, information(damping, form))


@pytest.mark.parametrize("damping,form", DAMPED)
def test_roots_sum_to_the_information_of_their_form(damping, form):
    # Three sequences with two, one and no labels, the first of the second sequence off.
    logits = LOGITS.expand(3, 2, 5)
    rows = read(logits, torch.tensor([[1, 4], [-100, 0], [-100, -100]]), damping=damping, form=form)
    total, touched = torch.zeros(3, 2, 5, 5, dtype=F64), []
    for cotangent, sequences in rows.roots(None, 100):
        assert (cotangent != 0).any(-1).sum(1).max() == 1  # one label of each sequence at a time
        total += cotangent[..., :, None] * cotangent[..., None, :]
        touched.append(sequences.tolist())
    expected = information(damping, form)
    for sequence, position, seen in [(0, 0, 1), (0, 1, 1), (1, 0, 0), (1, 1, 1), (2, 0, 0), (2, 1, 0)]:
        torch.testing.assert_close(total[sequence, position], seen * expected)
    half = len(touched) // 2
    assert touched == [[True, True, False]] * half + [[True, False, False]] * half
    with pytest.raises(ValueError, match=f"takes {2 * half} backward passes for this batch .* more than 3"):
        list(rows.roots(None, 3))


@pytest.mark.parametrize("damping,form", DAMPED)
def test_score_of_the_form(damping, form):
    rows = read(LOGITS.expand(2, 5), torch.tensor([1, 3]), damping=damping, form=form)
    e = LOGITS.softmax(-1) - torch.eye(5, dtype=F64)[[1, 3]]
    h = curvature()
    if form == "softmax":
        e = e @ torch.linalg.inv(h + damping / 4 * torch.eye(5, dtype=F64)) @ h
    torch.testing.assert_close(rows.score(), e)


@pytest.mark.parametrize("damping,form", [(0.0, "logit"), (0.2, "logit"), (0.2, "softmax")])
def test_outliers_weigh_by_the_formula(damping, form):
    c, labels = 1.5, torch.tensor([2, 1, 4])
    logits = torch.stack([LOGITS, LOGITS, 4 * LOGITS])
    rows = read(logits, labels, damping=damping, form=form, outlier_threshold=c)
    plain = read(logits, labels, damping=damping, form=form)
    for n in range(3):
        p = logits[n].softmax(-1)
        e = torch.eye(5, dtype=F64)[labels[n]] - p
        damped = torch.diag(p) - torch.outer(p, p) + 0.05 * torch.eye(5, dtype=F64)
        weight = 1 / (1 + e @ torch.linalg.solve(damped, e) / c**2)
        torch.testing.assert_close(rows.weights[n], weight)
        torch.testing.assert_close(rows.score()[n], weight * plain.score()[n])
        for kind in ("sampled", "rademacher"):
            drawn, whole = (r.draw(kind, r.random(0, 1)) for r in (rows, plain))
            torch.testing.assert_close(drawn[n], weight.sqrt() * whole[n])
        pairs = zip(rows.roots(None, 9), plain.roots(None, 9), strict=True)
        for (root, _), (whole, _) in pairs:
            torch.testing.assert_close(root[n], weight.sqrt() * whole[n])
    assert rows.weights[1] < 0.5 * rows.weights[0]
    torch.testing.assert_close(rows.loss, plain.loss)


@pytest.mark.parametrize("variance", [None, 4.0])
def test_outliers_of_a_regression_weigh_by_the_estimated_noise(variance):
    outputs, labels = torch.zeros(2, 2, dtype=F64), torch.tensor([[3.0, 4.0], [0.0, 0.1]], dtype=F64)
    observation = GaussianObservation(1.0 if variance else 0.5)
    rows = read(outputs, labels, observation, outlier_threshold=2.0, variance=variance)
    expected = 1 / (1 + labels.square().sum(-1) / (variance or 0.5) / 4)
    torch.testing.assert_close(rows.weights, expected)


def test_draws_do_not_depend_on_padding_or_split():
    # Three sequences of three, one and two labels; padded on either side, in either split.
    ids = [[1, 2, 3], [4], [0, 2]]
    whole = read(LOGITS.expand(3, 3, 5), torch.tensor([[1, 2, 3], [4, -100, -100], [0, 2, -100]]))
    left = read(LOGITS.expand(3, 4, 5), torch.tensor([[-100, 1, 2, 3], [-100] * 3 + [4], [-100, -100, 0, 2]]))
    parts = [read(LOGITS.expand(1, len(row), 5), torch.tensor([row])) for row in ids]
    for kind in ("sampled", "rademacher"):
        drawn = whole.draw(kind, whole.random(10, 4))[whole.logits.new_ones(3, 3).bool() & mask(whole)]
        other = left.draw(kind, left.random(10, 4))[mask(left)]
        alone = torch.cat([r.draw(kind, r.random(10 + i, 4))[mask(r)] for i, r in enumerate(parts)])
        torch.testing.assert_close(drawn, other)
        torch.testing.assert_close(drawn, alone)
        assert not torch.equal(drawn, whole.draw(kind, whole.random(11, 4))[mask(whole)])


def mask(rows):
    found = torch.zeros(rows.logits.shape[:-1].numel(), dtype=torch.bool)
    found[rows.index] = True
    return found.view(rows.logits.shape[:-1])


def classification_error(threshold, seed):
    """Of a linear classifier filtered in one pass over labels of which 30 % are drawn anew, against clean ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4400, 8, generator=generator, dtype=F64)
    truth = 3 * torch.randn(4, 8, generator=generator, dtype=F64)
    clean = (x @ truth.T).argmax(-1)
    noisy = torch.rand(len(x), generator=generator) < 0.3
    labels = torch.where(noisy, torch.randint(0, 4, (len(x),), generator=generator), clean)
    w = filtered(x[:400], labels[:400], PLAIN, threshold, 4)
    return float(((x[400:] @ w.T).argmax(-1) != clean[400:]).double().mean())


def regression_error(threshold, seed):
    """Squared error of weights filtered in one pass over labels of which 30 % are off by much."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 8, generator=generator, dtype=F64)
    truth = torch.randn(1, 8, generator=generator, dtype=F64)
    noisy = torch.rand(400, 1, generator=generator) < 0.3
    noise = torch.randn(400, 1, generator=generator, dtype=F64) * torch.where(noisy, 10.0, 0.3)
    w = filtered(x, x @ truth.T + noise, GaussianObservation(0.09), threshold, 1)
    return float((w - truth).square().sum())


def filtered(x, labels, observation, threshold, outputs):
    w = torch.nn.Parameter(torch.zeros(outputs, x.shape[1], dtype=F64))
    optimizer = LoKO(
        [("w", w)], observation, memory="dense", columns="exact", prior_precision={"w": 0.1},
        outlier_threshold=threshold, max_decrease=None, damping=0.0,
    )  # fmt: skip
    for start in range(0, len(x), 20):
        optimizer.observe(x[start : start + 20] @ w.T, labels[start : start + 20])
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("error,threshold,most", [(classification_error, 4.0, 0.93), (regression_error, 3.0, 0.3)])
def test_weighing_outliers_withstands_label_noise(error, threshold, most):
    pairs = [(error(None, seed), error(threshold, seed)) for seed in range(5)]
    plain, robust = (torch.tensor(values) for values in zip(*pairs, strict=True))
    assert robust.mean() < most * plain.mean() and (robust < plain).sum() >= 4, pairs
