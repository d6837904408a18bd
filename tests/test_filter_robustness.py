"""Whatever comes: float32 filters stay positive and finite, and say so when they skip a batch."""

import math
from typing import Any

import pytest
import torch
from filtering import F64, Toy, covariance, linear, rand, two_layers
from test_memories import stack

from kalman_peft import CategoricalObservation, LoKO
from kalman_peft.loko import MEMORIES
from kalman_peft.loko.memories import CovarianceMemory, DenseMemory, DiagonalMemory, KroneckerMemory
from kalman_peft.loko.memories.base import Joint, cholesky


def bfloat16_columns(number, *shape):
    """Random columns of very different sizes, as a bfloat16 backward pass gives them."""
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-4, 4, (number,), generator=generator)
    columns = torch.randn(number, 1, *shape, generator=generator) * scale.view(-1, *(1,) * (len(shape) + 1))
    return columns.bfloat16().float()


def check_tensors(memory):
    assert all(torch.isfinite(t).all() for t in memory.tensors.values())
    for key in {"precision", "variance"} & memory.tensors.keys():
        values = memory.tensors[key]
        assert ((values.diagonal(dim1=-2, dim2=-1) if isinstance(memory, DenseMemory) else values) > 0).all()


PRIORS = torch.tensor([1e-3, 1e3])


def test_diagonal_memory_stays_positive_over_a_hundred_thousand_steps():
    memory, columns, noise = DiagonalMemory(stack(2, 2, 4)), bfloat16_columns(1000, 2, 2, 4), torch.full((2,), 1e-6)
    memory.set_prior(PRIORS)
    for step in range(100_000):
        memory.update(columns[step % 1000])
        if step % 10 == 0:
            memory.relax(0.99)
            memory.diffuse(noise)
    check_tensors(memory)
    assert (memory.variances() >= 1e-6).all()


def test_covariance_memory_stays_positive_over_a_hundred_thousand_steps():
    # For a single column, `Joint.explained` is (P c)^2 / (1 + c^T P c); checked below, and much quicker.
    memory, columns, noise = CovarianceMemory(stack(2, 2, 4)), bfloat16_columns(1000, 2, 2, 4), torch.full((2,), 1e-9)
    memory.set_prior(PRIORS)
    for step in range(100_000):
        column = columns[step % 1000]
        gained = memory.gain(column)
        explained = gained[0].square() / (1 + (gained * column).sum())
        if step % 1000 == 0:
            torch.testing.assert_close(Joint([column], [memory]).explained(0), explained)
        memory.update(column, explained)
        if step % 1000 == 999:
            memory.relax(0.99)
            memory.diffuse(noise)
    check_tensors(memory)


def test_covariance_memory_survives_explained_variance_beyond_its_own():
    # Rounding may make p - explained negative; p_+ >= 1 / (1/p + c^2) holds all the same.
    memory = CovarianceMemory(stack(1, 4))
    memory.set_prior(torch.tensor([1e-3]))
    column = torch.tensor([[[1e4, 1.0, 1e-4, 0.0]]])
    memory.update(column, memory.variance * 1.000001)
    torch.testing.assert_close(memory.variance, 1 / (1e-3 + column[0].square()))


def test_kronecker_memory_stays_positive_and_keeps_its_basis_orthonormal():
    # 5,000 steps only: each takes two eigendecompositions.
    memory, columns, noise = (
        KroneckerMemory(stack(2, 2, 8), 3),
        bfloat16_columns(1000, 2, 2, 8),
        torch.full((2,), 1e-6),
    )
    memory.set_prior(PRIORS)
    for step in range(5_000):
        memory.update(columns[step % 1000])
        if step % 10 == 0:
            memory.relax(0.99)
            memory.diffuse(noise)
    check_tensors(memory)
    for key in ("left", "right"):
        basis = memory.tensors[key]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1]).expand(2, -1, -1), rtol=0, atol=1e-5)
    assert torch.isfinite(memory.gain(columns[:5, 0])).all() and (memory.variances() > 0).all()


# -- classifiers in float32 --------------------------------------------------------------------------------------------


def classifier(memory, make=two_layers, prior=1.0, **given):
    toy = make(outputs=3, inputs=5, dtype=torch.float32)
    options: dict[str, Any] = {"rank": 4, "block_limit": 13} | given
    optimizer = LoKO(
        toy.params.items(), CategoricalObservation(shift=False), memory=memory,
        prior_precision=dict.fromkeys(toy.params, prior), **options,
    )  # fmt: skip
    return toy, optimizer


def take(toy, optimizer, x, labels):
    loss = optimizer.observe(toy(x), labels)
    optimizer.step()
    return float(loss)


def stream(steps=12, batch=4):
    labels = torch.randint(0, 3, (steps, batch), generator=torch.Generator().manual_seed(1))
    return list(zip(rand(steps, batch, 5, seed=3).float(), labels, strict=True))


def assert_sound(toy, optimizer):
    for memory in optimizer._memories:
        check_tensors(memory)
        assert torch.isfinite(memory.variances()).all() and torch.isfinite(memory.sample()).all()
    assert all(torch.isfinite(p).all() for p in toy.params.values())
    assert all(math.isfinite(v) for v in optimizer.diagnostics.values())
    variances = torch.linalg.eigvalsh(covariance(optimizer, toy))
    assert variances.min() > -1e-6 * variances.max()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("limit", [1.0, None])
def test_priors_over_six_decades(memory, limit):
    for prior in (1e-3, 1e-1, 1e1, 1e3):
        for columns in ("exact", "sampled"):
            toy, optimizer = classifier(memory, prior=prior, max_decrease=limit, columns=columns)
            before = toy.theta
            for x, labels in stream():
                take(toy, optimizer, x, labels)
            assert_sound(toy, optimizer)
            assert (toy.theta - before).norm() > 1e-4


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("limit", [1.0, None])
def test_a_very_loose_prior_and_duplicated_rows(memory, limit):
    # Collinear columns of energy 1e8 and more: in float32 their Gram matrix plus one is not positive definite.
    for columns in ("exact", "sampled"):
        toy, optimizer = classifier(memory, prior=1e-8, max_decrease=limit, columns=columns, process_noise=0.01)
        for x, labels in stream():
            take(toy, optimizer, x[:1].repeat(4, 1), labels[:1].repeat(4))
        assert all(torch.isfinite(p).all() for p in toy.params.values())
        for m in optimizer._memories:
            check_tensors(m)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("limit", [1.0, None])
@pytest.mark.parametrize("make", [linear, two_layers])
def test_labels_that_the_model_holds_least_likely(memory, limit, make):
    toy, optimizer = classifier(memory, make, prior=0.1, max_decrease=limit)
    for x, _ in stream():
        with torch.no_grad():
            labels = toy(3 * x).argmin(-1)
        take(toy, optimizer, 3 * x, labels)
    assert_sound(toy, optimizer)


def test_one_confidently_wrong_batch_does_not_stop_adaptive_noise():
    # Its expected energy is next to nothing: a mean of ratios would be 1e37 from then on.
    toy, optimizer = classifier("diagonal", linear, adaptive_noise=0.8, max_decrease=0.05, damping=0.0)
    for k, (x, labels) in enumerate(stream(60)):
        if k == 10:
            with torch.no_grad():
                x, labels = 300 * x, toy(300 * x).argmin(-1)
        take(toy, optimizer, x, labels)
        if k == 10:
            assert optimizer.diagnostics["innovation"] > 1e6
            assert 10 < optimizer.param_groups[0]["misfit"] < 1e9
    assert 0.1 < optimizer.param_groups[0]["misfit"] < 10
    assert_sound(toy, optimizer)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_single_sample_for_ever(memory):
    toy, optimizer = classifier(memory)
    x, labels = stream()[0]
    losses = [take(toy, optimizer, x[:1], labels[:1]) for _ in range(25)]
    assert losses[-1] < losses[0]
    assert_sound(toy, optimizer)


def spoil(kind, toy, x, labels):
    logits = toy(x)
    if kind == "masked":
        return logits, torch.full_like(labels, -100)
    if kind == "overflow":  # finite logits and scores, whose squares are not
        logits = toy(1e18 * x)
        return logits, logits.detach().argmin(-1)
    worst = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}[kind]
    spoilt = torch.zeros_like(logits)
    spoilt[1] = worst
    return logits + spoilt, labels


SAID = {"masked": "no label", "overflow": "overflow", "nan": "NaN", "inf": "NaN or Inf", "-inf": "NaN or Inf"}


@pytest.mark.parametrize("memory", [*MEMORIES, "paper"])
def test_a_spoilt_batch_leaves_everything_as_it_is_and_is_said(memory, caplog):
    kinds = list(SAID)
    if memory == "paper":
        toy = linear(outputs=3, inputs=5, dtype=torch.float32)
        optimizer = LoKO(toy.params.items(), CategoricalObservation(shift=False), mode="paper")
        kinds.remove("overflow")  # probabilities that are 0 or 1 have no slope
    else:
        toy, optimizer = classifier(memory, linear, forgetting=0.99, process_noise=1e-3)
    for (x, labels), kind in zip(stream(), kinds, strict=False):
        take(toy, optimizer, x, labels)
        kept = [t.clone() for m in optimizer._memories for t in m.tensors.values()]
        before = toy.theta
        caplog.clear()
        optimizer.observe(*spoil(kind, toy, x, labels))
        optimizer.step()
        assert SAID[kind] in caplog.text, kind
        assert torch.equal(toy.theta, before), kind
        now = [t for m in optimizer._memories for t in m.tensors.values()]
        assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True)), kind
    assert_sound(toy, optimizer)


@pytest.mark.parametrize("memory", MEMORIES)
def test_one_spoilt_micro_batch_spoils_the_step(memory, caplog):
    toy, optimizer = classifier(memory)
    (x, labels), before = stream()[0], toy.theta
    optimizer.observe(toy(x), labels)
    optimizer.observe(*spoil("nan", toy, x, labels))
    optimizer.step()
    assert "NaN or Inf" in caplog.text and torch.equal(toy.theta, before)
    take(toy, optimizer, x, labels)
    assert not torch.equal(toy.theta, before)


def test_scores_that_are_masked_by_minus_infinity_are_no_fault():
    # Classes ruled out by a logit of -inf have no probability, and no score.
    shapes = {"w": (3, 5)}
    ruled_out = torch.tensor([0.0, 0.0, -float("inf")])
    toy = Toy(shapes, lambda p, x: x @ p["w"].mT + ruled_out, dtype=torch.float32)
    optimizer = LoKO(toy.params.items(), CategoricalObservation(shift=False), prior_precision={"w": 1.0}, damping=0.0)
    before = toy.params["w"].detach().clone()
    for x, labels in stream():
        take(toy, optimizer, x, labels.clamp(max=1))
    assert torch.equal(toy.params["w"][2], before[2]) and not torch.equal(toy.params["w"][:2], before[:2])


def test_cholesky_lifts_what_rounding_made_negative():
    root = rand(6, 2, seed=1) * 1e4
    broken = torch.eye(6, dtype=F64) + (root @ root.T).float().double()
    broken = broken - 1.5 * torch.eye(6, dtype=F64)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(broken)
    found = cholesky(broken, least=1.0)
    values = torch.linalg.eigvalsh(found @ found.T)
    assert values.min() > 0.99
    torch.testing.assert_close(values[-2:], torch.linalg.eigvalsh(broken)[-2:])
    sound = torch.eye(6, dtype=F64) + root @ root.T
    torch.testing.assert_close(cholesky(torch.stack([sound, sound]))[1], torch.linalg.cholesky(sound))
