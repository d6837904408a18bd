"""Joint Gaussian over the states of all tasks, in covariance form: the reference of filter and smoother."""

import math

import torch

from kalman_peft.filtering import TaskRecord, increment_of, initial_belief, predict, update
from kalman_peft.precision import (
    DensePrecision,
    DiagonalPrecision,
    EigenFactor,
    EigenKroneckerPrecision,
    KroneckerBlocks,
    LowRankPrecision,
)
from kalman_peft.precision.base import Layout


F64 = torch.float64
SHAPES = {
    "model.layers.0.q_proj.lora_A.weight": torch.Size((2, 3)),
    "model.layers.0.q_proj.lora_B.weight": torch.Size((4, 2)),
    "model.layers.1.q_proj.lora_A.weight": torch.Size((2, 3)),
    "model.layers.1.q_proj.lora_B.weight": torch.Size((4, 2)),
}
LAYOUT = Layout(SHAPES)
D = LAYOUT.size
STRUCTURES = ("diagonal", "low_rank", "ekfac", "dense")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def start_state(seed=7):
    return {k: v.clone() for k, v in LAYOUT.unflatten(rand(D, seed=seed)).items()}


class Chain:
    """x_0 ~ N(start, P_0); x_j = start + c (x_{j-1} - start) + w_j; y_j = H_j x_j + noise of variance 1, or none."""

    def __init__(self, start, covariance):
        self.start, self.means, self.covariance = start, [start], covariance
        self.rows, self.values = [], []

    def move(self, decay, noise):
        size, last = len(self.covariance), slice(-D, None)
        cross = decay * self.covariance[last]  # (D, size)
        corner = decay**2 * self.covariance[last, last] + torch.diag(noise)
        self.covariance = torch.cat([torch.cat([self.covariance, cross.T], 1), torch.cat([cross, corner], 1)])
        self.means.append(self.start + decay * (self.means[-1] - self.start))
        return size // D

    def observe(self, h, y):
        node = len(self.means) - 1
        self.rows.append((node, h))
        self.values.append(y)

    def posterior(self):
        """Mean and covariance of every node given all observations."""
        n = len(self.means)
        mean = torch.cat(self.means)
        h = torch.cat(
            [torch.cat([m if j == node else torch.zeros_like(m) for j in range(n)], 1) for node, m in self.rows]
        )
        gain = torch.linalg.solve(h @ self.covariance @ h.T + torch.eye(len(h), dtype=F64), h @ self.covariance).T
        mean = mean + gain @ (torch.cat(self.values) - h @ mean)
        covariance = self.covariance - gain @ h @ self.covariance
        blocks = [slice(j * D, (j + 1) * D) for j in range(n)]
        return [mean[b] for b in blocks], [covariance[b, b] for b in blocks]


def curvature(structure, seed, rank=3, scale=1.0):
    """A random singular curvature in the structure, per label; Kronecker bases are the same for all seeds."""
    if structure == "diagonal":
        entries = scale * rand(D, seed=seed).square() * (rand(D, seed=seed + 1) > 0)
        return DiagonalPrecision({k: v.clone() for k, v in LAYOUT.unflatten(entries).items()})
    columns = math.sqrt(scale) * rand(D, rank, seed=seed)
    if structure == "low_rank":
        return LowRankPrecision(
            0.1 * scale * rand(D, seed=seed + 1).square() * (rand(D, seed=seed) > 0), columns, SHAPES
        )
    if structure == "dense":
        return DensePrecision(columns @ columns.T, SHAPES)
    sides = {n: EigenFactor.from_dense(spd(n)) for n in (2, 3, 4)}
    blocks = KroneckerBlocks({k: (sides[s[0]], sides[s[1]]) for k, s in SHAPES.items()})
    cells = {}
    for j, (key, (rows, cols)) in enumerate(SHAPES.items()):
        cells[key] = torch.zeros(rows + 1, cols + 1, dtype=F64)
        cells[key][:rows, :cols] = (
            scale * rand(rows, cols, seed=seed + j).square() * (rand(rows, cols, seed=seed) > -0.5)
        )
    return EigenKroneckerPrecision(blocks, cells)


def spd(n, seed=0):
    x = rand(n, 2 * n, seed=seed + n)
    return x @ x.T / n


def root(matrix):
    """H with H^T H = matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()).T


def run(structure, transitions, delta=0.5, labels=20, rank=None, keep_discarded=True, curvatures=None):
    """A linear-Gaussian filter over tasks: the library's records, the joint reference, and its node per task.

    The mode is found by a dense solve under the library's predicted precision, as training would.
    """
    start = start_state()
    belief = initial_belief(start, delta, structure, dtype=F64)
    prior = belief
    chain = Chain(LAYOUT.flatten(start), torch.eye(D, dtype=F64) / delta)
    records, nodes = [], []
    for t, transition in enumerate(transitions):
        predicted = predict(belief, transition, prior.mean)
        noise = transition.noise(SHAPES, prior.precision.like)
        full = {k: torch.as_tensor(noise[k], dtype=F64).expand(s) for k, s in SHAPES.items()}
        nodes.append(chain.move(transition.decay, LAYOUT.flatten(full)))
        task = curvature(structure, 10 * t + 20) if curvatures is None else curvatures[t]
        h = root(labels * task.to_dense())
        y = rand(D, seed=500 + t) + h @ LAYOUT.flatten(start)
        chain.observe(h, y)
        dense, mean = predicted.precision.to_dense(), LAYOUT.flatten(predicted.mean)
        mode = mean + torch.linalg.solve(dense + h.T @ h, h.T @ (y - h @ mean))
        increment = increment_of(predicted, task, labels)
        belief = update(predicted, LAYOUT.unflatten(mode), task, labels, rank, keep_discarded)
        records.append(TaskRecord(f"task {t}", belief, transition, increment))
    return records, chain, nodes, prior


def check(belief, mean, covariance, tol=1e-8):
    """Mean and precision of a belief against a dense Gaussian."""
    torch.testing.assert_close(LAYOUT.flatten(belief.mean), mean, rtol=tol, atol=tol)
    found = torch.linalg.inv(belief.precision.to_dense())
    torch.testing.assert_close(found, covariance, rtol=tol, atol=tol * float(covariance.abs().max()))
