"""LoKO's memories against dense filters in float64."""

import pytest
import torch

from kalman_peft.memories import DiagonalMemory, KroneckerMemory


F64 = {"dtype": torch.float64}


def dense_precision(memory):
    """The Kronecker memory's precision as a matrix over vec(M), row-major, for a stack of one."""
    left, right, e = memory["left"][0], memory["right"][0], memory["precision"][0]
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
    memory = KroneckerMemory.create(torch.Size((1, o, i)), torch.zeros((), **F64), rank)
    KroneckerMemory.set_prior(memory, torch.tensor([prior], **F64))
    return memory


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
        KroneckerMemory.update(memory, columns, weight=o)  # the mean over draws times their number
        score = torch.outer(y[t] - m[0] @ x[t], x[t])[None]
        m = m + KroneckerMemory.gain(memory, score)[0]
        gram = prior * torch.eye(i, **F64) + x[: t + 1].T @ x[: t + 1]
        torch.testing.assert_close(m[0], torch.linalg.solve(gram, x[: t + 1].T @ y[: t + 1]).T)
        torch.testing.assert_close(dense_precision(memory), torch.kron(torch.eye(o, **F64), gram))
    covariance = torch.linalg.inv(gram)
    torch.testing.assert_close(KroneckerMemory.trace(memory), o * covariance.trace())


def test_a_belief_as_factor_gives_the_map_of_the_penalised_objective():
    # Each datum brings its share of the penalty: after N of them the filter's mean minimises
    # sum 1/2 |y - M x|^2 + N lambda/2 |M - M_0|^2 + prior/2 |M - start|^2, without ever adding the penalty to a loss.
    o, i, n, prior, strength = 3, 6, 10, 0.5, 0.3
    generator = torch.Generator().manual_seed(1)
    x, y, m0 = (torch.randn(*shape, generator=generator, **F64) for shape in ((n, i), (n, o), (o, i)))
    memory, m = new_memory(o, i, rank=i, prior=prior), torch.zeros(1, o, i, **F64)
    for t in range(n):
        KroneckerMemory.update(memory, torch.einsum("ja,i->jai", torch.eye(o, **F64), x[t])[:, None], weight=o)
        KroneckerMemory.add_diagonal(memory, torch.full((1, o, i), strength, **F64))
        score = torch.outer(y[t] - m[0] @ x[t], x[t])[None] - strength * (m - m0)
        m = m + KroneckerMemory.gain(memory, score)[0]
    gram = (prior + n * strength) * torch.eye(i, **F64) + x.T @ x
    torch.testing.assert_close(m[0], torch.linalg.solve(gram, x.T @ y + n * strength * m0.T).T)


@pytest.mark.parametrize("rank", [3, 8, 12])
def test_gain_is_the_inverse_of_the_dense_precision(rank):
    memory = new_memory(3, 12, rank)
    for draw in draws(5, 3, 12):
        KroneckerMemory.update(memory, draw[None], 1.0)
    dense = dense_precision(memory)
    score = draws(1, 3, 12, seed=9)[0]
    step, energy = KroneckerMemory.gain(memory, score)
    torch.testing.assert_close(step.reshape(-1), torch.linalg.solve(dense, score.reshape(-1)))
    gathered = dense - 0.5 * torch.eye(36, **F64)
    torch.testing.assert_close(energy, step.reshape(-1) @ gathered @ step.reshape(-1))
    torch.testing.assert_close(KroneckerMemory.trace(memory), torch.linalg.inv(dense).trace())


@pytest.mark.parametrize("rank", [4, 12])
def test_trace_of_the_precision_counts_every_draw_once(rank):
    # The information of a draw has trace ||C||^2, whatever the basis and however it turns.
    memory, total = new_memory(3, 12, rank), 0.5 * 36
    for draw in draws(30, 3, 12, rank=5):
        KroneckerMemory.update(memory, draw[None], 2.0)
        total += 2.0 * draw.square().sum()
        torch.testing.assert_close(dense_precision(memory).trace(), total)


def test_turning_the_basis_keeps_the_diagonal_of_the_precision():
    memory = new_memory(3, 5, 5)
    for draw in draws(4, 3, 5):
        KroneckerMemory.update(memory, draw[None], 1.0)
    before = dense_precision(memory)
    KroneckerMemory.update(memory, 1e-9 * draws(1, 3, 5, seed=4)[None, 0], 1.0)  # turns, adds nothing visible
    torch.testing.assert_close(dense_precision(memory), before, rtol=1e-6, atol=1e-6)


def test_process_noise_adds_to_the_covariance_and_forgetting_relaxes_to_the_prior():
    memory = new_memory(3, 6, 6)
    for draw in draws(5, 3, 6):
        KroneckerMemory.update(memory, draw[None], 1.0)
    before = dense_precision(memory)
    KroneckerMemory.predict(memory, 1.0, 0.2)
    expected = torch.linalg.inv(torch.linalg.inv(before) + 0.2 * torch.eye(18, **F64))
    torch.testing.assert_close(dense_precision(memory), expected)
    KroneckerMemory.predict(memory, 0.7, 0.0)
    torch.testing.assert_close(dense_precision(memory), 0.7 * expected + 0.3 * 0.5 * torch.eye(18, **F64))


def test_predict_without_noise_is_the_identity():
    for kind in (KroneckerMemory, DiagonalMemory):
        memory = (
            new_memory(3, 6, 6)
            if kind is KroneckerMemory
            else DiagonalMemory.create(torch.Size((1, 4)), torch.zeros(()))
        )
        before = {k: v.clone() for k, v in memory.items()}
        kind.predict(memory, 1.0, 0.0)
        assert all(torch.equal(memory[k], v) for k, v in before.items())


def test_diagonal_information_enters_as_its_diagonal_in_the_basis():
    memory = new_memory(3, 6, 6)
    for draw in draws(5, 3, 6):
        KroneckerMemory.update(memory, draw[None], 1.0)
    before = memory["precision"].clone()
    f = torch.rand(1, 3, 6, generator=torch.Generator().manual_seed(0), **F64)
    KroneckerMemory.add_diagonal(memory, f)
    basis = torch.kron(memory["left"][0].contiguous(), memory["right"][0].contiguous())
    expected = (basis.T @ torch.diag(f.reshape(-1)) @ basis).diagonal().view(3, 6)
    torch.testing.assert_close((memory["precision"] - before)[0, :, :-1], expected)


def test_diagonal_memory_is_the_diagonal_of_the_dense_update_and_stays_positive():
    memory = DiagonalMemory.create(torch.Size((1, 7)), torch.zeros(()))
    DiagonalMemory.set_prior(memory, torch.tensor([2.0]))
    generator = torch.Generator().manual_seed(0)
    dense = 2.0 * torch.eye(7)
    for _ in range(50):
        c = torch.randn(1, 1, 7, generator=generator)
        DiagonalMemory.update(memory, c, 1.0)
        dense += torch.outer(c[0, 0], c[0, 0])
    torch.testing.assert_close(memory["precision"][0], dense.diagonal())
    g = torch.randn(1, 7, generator=generator)
    torch.testing.assert_close(DiagonalMemory.gain(memory, g)[0], g / dense.diagonal())


@pytest.mark.parametrize("kind", ["kronecker", "diagonal"])
def test_precision_stays_positive_and_finite_over_many_float32_steps(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "kronecker":
        memory, owner = KroneckerMemory.create(torch.Size((2, 4, 20)), torch.zeros(()), 6), KroneckerMemory
    else:
        memory, owner = DiagonalMemory.create(torch.Size((2, 4, 20)), torch.zeros(())), DiagonalMemory
    owner.set_prior(memory, torch.tensor([1e-3, 1e3]))
    for step in range(1500):
        scale = 10.0 ** torch.randint(-4, 4, (1,), generator=generator).item()
        owner.predict(memory, 0.999, 1e-6)
        owner.update(memory, scale * torch.randn(1, 2, 4, 20, generator=generator).bfloat16().float(), 1.0)
        if step % 100 == 0:
            owner.update(memory, torch.zeros(1, 2, 4, 20), 1.0)
    assert (memory["precision"] > 0).all() and torch.isfinite(memory["precision"]).all()
    step, _ = owner.gain(memory, torch.randn(2, 4, 20, generator=generator))
    assert torch.isfinite(step).all()
