"""LoKO's memories against dense filters in float64."""

import pytest
import torch

from kalman_peft.loko.memories import DiagonalMemory, KroneckerMemory
from kalman_peft.loko.memories.kronecker import _CHUNK_BYTES
from kalman_peft.loko.views import Flat, Stack


F64 = {"dtype": torch.float64}


def dense_precision(memory):
    """The Kronecker memory's precision as a matrix over vec(M), row-major, for a stack of one."""
    left, right, e = (memory.tensors[key][0] for key in ("left", "right", "precision"))
    o, i = left.shape[0], right.shape[0]
    held = right.square().sum(0).round().bool()
    right, inside = right[:, held], e[:, :-1][:, held]
    complement = torch.eye(i, **F64) - right @ right.T
    total = torch.zeros(o * i, o * i, **F64)
    for a in range(o):
        across = right @ torch.diag(inside[a]) @ right.T + e[a, -1] * complement
        total += torch.kron(torch.outer(left[:, a], left[:, a]), across)
    return total


def draws(n, o, i, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, o, i, generator=generator, **F64)
    if rank:
        x = torch.randn(n, 1, o, rank, generator=generator, **F64) @ torch.randn(rank, i, generator=generator, **F64)
    return x


def new_memory(o, i, rank, prior=0.5):
    memory = KroneckerMemory(stack(1, o, i, **F64), rank)
    memory.set_prior(torch.tensor([prior], **F64))
    return memory


def stack(n, *shape, **kwargs):
    """A view of n parameters of one shape."""
    params = [torch.zeros(shape, **kwargs) for _ in range(n)]
    return Stack([f"p{j}" for j in range(n)], params, [False] * n)


@pytest.mark.parametrize("kind", ["stack", "flat"])
def test_views_join_add_and_measure_the_parameters(kind):
    shapes = [(3, 5), (5, 3), (3, 5)] if kind == "stack" else [(3, 5), (4,), ()]
    params = [torch.randn(s, generator=torch.Generator().manual_seed(j)).bfloat16() for j, s in enumerate(shapes)]
    names = ["a", "b", "c"]
    view = Stack(names, params, [False, True, False]) if kind == "stack" else Flat(names, params)
    before = [p.clone() for p in params]
    joined = view.gather([params[0], None, params[2]], *())
    assert joined.dtype == torch.float32
    parts = view.slices(joined)
    assert torch.equal(parts[0], params[0].float()) and torch.equal(parts[1], torch.zeros(shapes[1]))
    each = [torch.stack([p, 2 * p]) for p in params]
    for part, rows in zip(view.slices(view.gather(each, 2)), each, strict=True):
        assert torch.equal(part, rows.float())
    values = view.read()
    torch.testing.assert_close(view.norms(values), torch.stack([p.float().norm() for p in params]))
    torch.testing.assert_close(view.per_parameter(values), torch.stack([p.float().sum() for p in params]))
    assert view.expand(torch.arange(3.0)).expand(view.shape).unique().tolist() == [0, 1, 2]
    view.add(values, 0.5)
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, (1.5 * old.float()).bfloat16())


def test_kronecker_memory_equals_bayesian_linear_regression():
    # y = M x + noise of unit covariance. The Fisher of a datum is I (x) x x^T; its square root are the o columns
    # e_j x^T. Stepping with these, datum by datum, must give the posterior of the regression, mean and covariance.
    o, i, n, prior = 3, 6, 10, 0.5
    generator = torch.Generator().manual_seed(1)
    x, truth = torch.randn(n, i, generator=generator, **F64), torch.randn(o, i, generator=generator, **F64)
    y = x @ truth.T + torch.randn(n, o, generator=generator, **F64)
    memory, m = new_memory(o, i, rank=i, prior=prior), torch.zeros(1, o, i, **F64)
    for t in range(n):
        columns = torch.einsum("ja,i->jai", torch.eye(o, **F64), x[t])[:, None]  # (o, 1, o, i)
        memory.update(columns)
        score = torch.outer(y[t] - m[0] @ x[t], x[t])[None]
        m = m + memory.gain(score)
        gram = prior * torch.eye(i, **F64) + x[: t + 1].T @ x[: t + 1]
        torch.testing.assert_close(m[0], torch.linalg.solve(gram, x[: t + 1].T @ y[: t + 1]).T)
        torch.testing.assert_close(dense_precision(memory), torch.kron(torch.eye(o, **F64), gram))
    covariance = torch.linalg.inv(gram)
    torch.testing.assert_close(memory.traces().sum(), o * covariance.trace())


def test_a_belief_as_factor_gives_the_map_of_the_penalised_objective():
    # Each datum brings its share of the penalty: after N of them the filter's mean minimises
    # sum 1/2 |y - M x|^2 + N lambda/2 |M - M_0|^2 + prior/2 |M - start|^2, without ever adding the penalty to a loss.
    o, i, n, prior, strength = 3, 6, 10, 0.5, 0.3
    generator = torch.Generator().manual_seed(1)
    x, y, m0 = (torch.randn(*shape, generator=generator, **F64) for shape in ((n, i), (n, o), (o, i)))
    memory, m = new_memory(o, i, rank=i, prior=prior), torch.zeros(1, o, i, **F64)
    for t in range(n):
        memory.update(torch.einsum("ja,i->jai", torch.eye(o, **F64), x[t])[:, None])
        memory.add_diagonal(torch.full((1, o, i), strength, **F64))
        score = torch.outer(y[t] - m[0] @ x[t], x[t])[None] - strength * (m - m0)
        m = m + memory.gain(score)
    gram = (prior + n * strength) * torch.eye(i, **F64) + x.T @ x
    torch.testing.assert_close(m[0], torch.linalg.solve(gram, x.T @ y + n * strength * m0.T).T)


@pytest.mark.parametrize("rank", [3, 8, 12])
def test_gain_is_the_inverse_of_the_dense_precision(rank):
    memory = new_memory(3, 12, rank)
    for draw in draws(5, 3, 12):
        memory.update(draw[None])
    dense = dense_precision(memory)
    score = draws(1, 3, 12, seed=9)[0]
    step = memory.gain(score)
    torch.testing.assert_close(step.reshape(-1), torch.linalg.solve(dense, score.reshape(-1)))
    columns = draws(4, 3, 12, seed=10)  # (m, n, o, i)
    flat = columns.reshape(4, -1)
    torch.testing.assert_close(memory.gram(columns), flat @ torch.linalg.solve(dense, flat.T))
    torch.testing.assert_close(memory.traces().sum(), torch.linalg.inv(dense).trace())


def test_a_stack_in_parts_equals_the_whole(monkeypatch):
    found = []
    for limit in (2**30, 1):
        monkeypatch.setitem(_CHUNK_BYTES, "cpu", limit)
        memory = KroneckerMemory(stack(5, 3, 12, **F64), 8)
        memory.set_prior(torch.full((5,), 0.5, **F64))
        generator = torch.Generator().manual_seed(0)
        columns = torch.randn(2, 5, 3, 12, generator=generator, **F64)
        memory.update(columns)
        found.append(
            (memory.tensors["precision"], memory.gain(columns), memory.gain(columns[0]), memory.gram(columns))
        )
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("rank", [4, 12])
def test_trace_of_the_precision_counts_every_draw_once(rank):
    # The information of a draw has trace ||C||^2, whatever the basis and however it turns.
    memory, total = new_memory(3, 12, rank), 0.5 * 36
    for draw in draws(30, 3, 12, rank=5):
        memory.update(2.0**0.5 * draw[None])
        total += 2.0 * draw.square().sum()
        torch.testing.assert_close(dense_precision(memory).trace(), total)


def test_turning_the_basis_keeps_the_diagonal_of_the_precision():
    memory = new_memory(3, 5, 5)
    for draw in draws(4, 3, 5):
        memory.update(draw[None])
    before = dense_precision(memory)
    memory.update(1e-9 * draws(1, 3, 5, seed=4)[None, 0])  # turns, adds nothing visible
    torch.testing.assert_close(dense_precision(memory), before, rtol=1e-6, atol=1e-6)


def test_process_noise_adds_to_the_covariance_and_forgetting_relaxes_to_the_prior():
    memory = new_memory(3, 6, 6)
    for draw in draws(5, 3, 6):
        memory.update(draw[None])
    before = dense_precision(memory)
    memory.diffuse(torch.tensor([0.2], **F64))
    expected = torch.linalg.inv(torch.linalg.inv(before) + 0.2 * torch.eye(18, **F64))
    torch.testing.assert_close(dense_precision(memory), expected)
    memory.relax(0.7)
    torch.testing.assert_close(dense_precision(memory), 0.7 * expected + 0.3 * 0.5 * torch.eye(18, **F64))


def test_predict_without_noise_is_the_identity():
    for memory in (new_memory(3, 6, 6), DiagonalMemory(stack(1, 4))):
        before = {k: v.clone() for k, v in memory.tensors.items()}
        memory.relax(1.0)
        memory.diffuse(torch.zeros(1))
        assert all(torch.equal(memory.tensors[k], v) for k, v in before.items())


def test_diagonal_information_enters_as_its_diagonal_in_the_basis():
    memory = new_memory(3, 6, 6)
    for draw in draws(5, 3, 6):
        memory.update(draw[None])
    before = memory.tensors["precision"].clone()
    f = torch.rand(1, 3, 6, generator=torch.Generator().manual_seed(0), **F64)
    memory.add_diagonal(f)
    basis = torch.kron(memory.tensors["left"][0].contiguous(), memory.tensors["right"][0].contiguous())
    expected = (basis.T @ torch.diag(f.reshape(-1)) @ basis).diagonal().view(3, 6)
    torch.testing.assert_close((memory.tensors["precision"] - before)[0, :, :-1], expected)


def test_diagonal_memory_is_the_diagonal_of_the_dense_update_and_stays_positive():
    memory = DiagonalMemory(stack(1, 7))
    memory.set_prior(torch.tensor([2.0]))
    generator = torch.Generator().manual_seed(0)
    dense = 2.0 * torch.eye(7)
    for _ in range(50):
        c = torch.randn(1, 1, 7, generator=generator)
        memory.update(c)
        dense += torch.outer(c[0, 0], c[0, 0])
    torch.testing.assert_close(memory.tensors["precision"][0], dense.diagonal())
    g = torch.randn(1, 7, generator=generator)
    torch.testing.assert_close(memory.gain(g), g / dense.diagonal())


@pytest.mark.parametrize("kind", ["kronecker", "diagonal"])
def test_precision_stays_positive_and_finite_over_many_float32_steps(kind):
    generator = torch.Generator().manual_seed(0)
    view = stack(2, 4, 20)
    memory = KroneckerMemory(view, 6) if kind == "kronecker" else DiagonalMemory(view)
    memory.set_prior(torch.tensor([1e-3, 1e3]))
    for step in range(1500):
        scale = 10.0 ** torch.randint(-4, 4, (1,), generator=generator).item()
        memory.relax(0.999)
        memory.diffuse(torch.full((2,), 1e-6))
        memory.update(scale * torch.randn(1, 2, 4, 20, generator=generator).bfloat16().float())
        if step % 100 == 0:
            memory.update(torch.zeros(1, 2, 4, 20))
    assert (memory.tensors["precision"] > 0).all() and torch.isfinite(memory.tensors["precision"]).all()
    step = memory.gain(torch.randn(2, 4, 20, generator=generator))
    assert torch.isfinite(step).all()
