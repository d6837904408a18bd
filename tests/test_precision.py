"""Structures of a precision against dense matrices in float64."""

import pytest
import torch
from conftest import make_lora_llama, randomise_b

from kalman_peft import AdapterState
from kalman_peft.precision import (
    DeltaDiagonalPrecision,
    DeltaKroneckerPrecision,
    DiagonalPrecision,
    EigenFactor,
    KroneckerPrecision,
    precision_from_tensors,
)
from kalman_peft.precision.factor import divide_in_eigenbasis
from kalman_peft.precision.kronecker import KroneckerBlocks


F64 = {"dtype": torch.float64}


def spd(n, seed, rank=None):
    x = torch.randn(n, rank or 2 * n, generator=torch.Generator().manual_seed(seed), **F64)
    return x @ x.T / n


def make(structure, space, model, rank=None):
    """A random precision over the model's adapter, and its dense matrix in that space, name by name."""
    state = AdapterState(model)
    shapes = (
        {k: tuple(p.shape) for k, p in state.parameters().items()} if space == "adapter"
        else {p.name: (p.b.shape[0], p.a.shape[1]) for p in state}
    )  # fmt: skip
    scaling = {p.name: p.scaling for p in state}
    dense = {}
    if structure == "diagonal":
        generator = torch.Generator().manual_seed(5)
        entries = {n: torch.rand(shape, generator=generator, **F64) for n, shape in shapes.items()}
        dense = {n: f.reshape(-1).diag() for n, f in entries.items()}
        precision = DiagonalPrecision(entries) if space == "adapter" else DeltaDiagonalPrecision(entries, scaling)
    else:
        blocks = {}
        for i, (n, (o, d)) in enumerate(shapes.items()):
            left, right = EigenFactor.from_dense(spd(o, i), rank), EigenFactor.from_dense(spd(d, 50 + i), rank)
            blocks[n] = (left, right)
            dense[n] = torch.kron(left.to_dense(), right.to_dense())
        blocks = KroneckerBlocks(blocks)
        precision = KroneckerPrecision(blocks) if space == "adapter" else DeltaKroneckerPrecision(blocks, scaling)
    return precision, dense


def reference_energy(dense, state, mean, model):
    """1/2 sum vec(x - x0)^T dense vec(x - x0), differentiable in `state`."""
    view = AdapterState(model)
    if next(iter(dense)).endswith(".weight"):
        offsets = {n: state[n] - mean[n] for n in dense}
    else:
        offsets = {p.name: p.scaling * (state[p.key_b] @ state[p.key_a] - mean[p.key_b] @ mean[p.key_a]) for p in view}
    return sum(o.reshape(-1) @ dense[n] @ o.reshape(-1) for n, o in offsets.items()) / 2


CASES = [
    (structure, space, rank)
    for structure, rank in (("diagonal", None), ("kronecker", None), ("kronecker", 1))
    for space in ("adapter", "delta_w")
]


@pytest.mark.parametrize("structure,space,rank", CASES)
@pytest.mark.parametrize("zero_start", [True, False])
def test_energy_gradient_and_gauss_newton_diagonal(structure, space, rank, zero_start):
    model = make_lora_llama(random_b=not zero_start, rank_pattern={"v_proj": 3})
    precision, dense = make(structure, space, model, rank)
    view = AdapterState(model)
    mean = {k: p.detach().clone() for k, p in view.parameters().items()}
    for p in view.parameters().values():
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), **F64))
    state = {k: p.detach().clone().requires_grad_(True) for k, p in view.parameters().items()}
    energy, gradient = precision.energy_and_gradient(state, mean)
    expected = reference_energy(dense, state, mean, model)
    torch.testing.assert_close(energy, expected.detach())
    expected.backward()
    assert gradient.keys() == state.keys()
    for k, g in gradient.items():
        torch.testing.assert_close(g, state[k].grad)

    # Gauss-Newton diagonal: second derivative along each weight, with what is bilinear in B and A held fixed.
    diagonal = precision.diagonal(state)
    pair = view.pairs[1]
    for key in (pair.key_a, pair.key_b):
        one = state[key].detach()

        def along(x, key=key):
            return reference_energy(dense, {**{k: v.detach() for k, v in state.items()}, key: x}, mean, model)

        hessian = torch.autograd.functional.hessian(along, one).reshape(one.numel(), -1)
        torch.testing.assert_close(diagonal[key].reshape(-1), hessian.diagonal())


@pytest.mark.parametrize("structure,space,rank", [c for c in CASES if c[:2] != ("diagonal", "delta_w")])
@pytest.mark.parametrize("zero_start", [True, False])
def test_proximal_solves_its_stationarity_condition(structure, space, rank, zero_start):
    model = make_lora_llama(random_b=not zero_start)
    precision, _ = make(structure, space, model, rank)
    view = AdapterState(model)
    mean = view.tensors()
    mean = {k: v.clone() for k, v in mean.items()}
    randomise_b(model, seed=7)
    start = {k: p.detach().clone() for k, p in view.parameters().items()}
    step = 0.7
    new = precision.proximal(start, mean, step)
    if space == "adapter":
        _, gradient = precision.energy_and_gradient(new, mean)
        for k in new:
            torch.testing.assert_close(new[k] + step * gradient[k], start[k])
    else:  # block by block: B against the old A, then A against the new B
        middle = {k: new[k] if "lora_B" in k else start[k] for k in new}
        _, gradient = precision.energy_and_gradient(middle, mean)
        for k in (k for k in new if "lora_B" in k):
            torch.testing.assert_close(new[k] + step * gradient[k], start[k])
        _, gradient = precision.energy_and_gradient(new, mean)
        for k in (k for k in new if "lora_A" in k):
            torch.testing.assert_close(new[k] + step * gradient[k], start[k])


@pytest.mark.parametrize(
    "structure,space", [("diagonal", "adapter"), ("kronecker", "adapter"), ("kronecker", "delta_w")]
)
def test_proximal_limits(structure, space):
    model = make_lora_llama(random_b=False)
    precision, _ = make(structure, space, model)
    view = AdapterState(model)
    mean = view.snapshot()
    randomise_b(model)
    start = {k: p.detach().clone() for k, p in view.parameters().items()}
    for k, v in precision.proximal(start, mean, 0.0).items():
        torch.testing.assert_close(v, start[k])
    strong = precision.proximal(start, mean, 1e12)
    assert precision.energy(strong, mean) < 1e-9 * precision.energy(start, mean)


def test_delta_w_energy_is_invariant_to_the_gauge():
    model = make_lora_llama()
    precision, _ = make("kronecker", "delta_w", model)
    state = AdapterState(model).snapshot()
    state = {k: v.double() for k, v in state.items()}
    mean = {k: torch.zeros_like(v) for k, v in state.items()}
    turned = {}
    for i, pair in enumerate(AdapterState(model)):
        m = torch.randn(2, 2, generator=torch.Generator().manual_seed(i), **F64)
        turned[pair.key_a], turned[pair.key_b] = torch.linalg.solve(m, state[pair.key_a]), state[pair.key_b] @ m
    torch.testing.assert_close(precision.energy(turned, mean), precision.energy(state, mean))


def test_delta_w_proximal_is_refused_for_the_diagonal():
    precision, _ = make("diagonal", "delta_w", make_lora_llama())
    with pytest.raises(ValueError, match="proximal form is not supported for structure='diagonal'"):
        precision.proximal({}, {}, 1.0)


@pytest.mark.parametrize("structure,space,rank", CASES)
def test_tensors_round_trip(structure, space, rank):
    model = make_lora_llama()
    precision, _ = make(structure, space, model, rank)
    again = precision_from_tensors(structure, space, precision.tensors())
    state = {k: v.double() for k, v in AdapterState(model).snapshot().items()}
    mean = {k: torch.zeros_like(v) for k, v in state.items()}
    assert torch.equal(again.energy(state, mean), precision.energy(state, mean))


def test_raises_when_the_structure_is_unknown():
    with pytest.raises(ValueError, match="Unknown precision structure 'dense'"):
        precision_from_tensors("dense", "adapter", {})


def test_factor_keeps_top_pairs_and_trace():
    matrix = spd(12, 0)
    factor = EigenFactor.from_dense(matrix, 4)
    values = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(factor.values, values[-4:])
    torch.testing.assert_close(factor.tail, values[:-4].mean())
    torch.testing.assert_close(factor.trace(), matrix.trace())
    torch.testing.assert_close(factor.to_dense().diagonal(), factor.diagonal())
    torch.testing.assert_close(EigenFactor.from_dense(matrix).to_dense(), matrix)


def test_sketch_is_exact_at_low_rank_and_close_on_decaying_spectra():
    omega = torch.randn(60, 24, generator=torch.Generator().manual_seed(1), **F64)
    low = spd(60, 2, rank=7)
    factor = EigenFactor.from_sketch(low @ omega, omega, low.trace(), 8)
    torch.testing.assert_close(factor.to_dense(), low, rtol=1e-7, atol=1e-8)

    basis = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(3), **F64))[0]
    decaying = basis @ torch.diag(torch.arange(1, 61, **F64) ** -1.5) @ basis.T
    factor = EigenFactor.from_sketch(decaying @ omega, omega, decaying.trace(), 8)
    best = EigenFactor.from_dense(decaying, 8)
    torch.testing.assert_close(factor.trace(), decaying.trace())
    error = (factor.to_dense() - decaying).norm()
    assert error < 1.6 * (best.to_dense() - decaying).norm()


@pytest.mark.parametrize("ranks", [(None, None), (2, None), (None, 2), (2, 2)])
def test_division_in_the_joint_eigenbasis(ranks):
    left, right = EigenFactor.from_dense(spd(4, 0), ranks[0]), EigenFactor.from_dense(spd(5, 1), ranks[1])
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), **F64)
    y = divide_in_eigenbasis(left, right, x, 0.3)
    dense = torch.eye(20, **F64) + 0.3 * torch.kron(left.to_dense(), right.to_dense())
    torch.testing.assert_close(y.reshape(-1), torch.linalg.solve(dense, x.reshape(-1)))
