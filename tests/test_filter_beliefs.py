"""Beliefs in and out of a filter: what a memory absorbs and exports, and beliefs as priors, in float64."""

import logging

import pytest
import torch
from conftest import make_batch, make_lora_llama
from filtering import F64, close, covariance, linear, rand

from kalman_peft import AdapterState, GaussianObservation, LoKO, create_loko_optimizer
from kalman_peft.belief import Belief
from kalman_peft.loko import MEMORIES
from kalman_peft.loko.memories import create_memories, export
from kalman_peft.precision import (
    DensePrecision,
    DiagonalPrecision,
    EigenFactor,
    EigenKroneckerPrecision,
    KroneckerBlocks,
    KroneckerPrecision,
    LowRankPrecision,
)


SHAPES = {"a": torch.Size((3, 7)), "b": torch.Size((7, 3)), "c": torch.Size((3, 5))}  # b is kept transposed
PRIOR, WEIGHT = 0.5, 12.0


def gram(n, seed, rank=None):
    root = rand(n, rank or n + 2, seed=seed)
    return root @ root.T / n


def factors(rank, keys=SHAPES):
    """Left and right factors of each key; the long side cut to `rank`."""
    blocks = {}
    for j, key in enumerate(keys):
        o, i = SHAPES[key]
        left = EigenFactor.from_dense(gram(o, 10 * j + 1), rank if o > i else None)
        blocks[key] = (left, EigenFactor.from_dense(gram(i, 10 * j + 2), rank if i >= o else None))
    return KroneckerBlocks(blocks)


def kronecker(rank):
    return KroneckerPrecision(factors(rank))


def ekfac(rank):
    cells = {}
    for j, (key, (left, right)) in enumerate(factors(rank).items().items()):
        cells[key] = rand(left.signature[1] + 1, right.signature[1] + 1, seed=40 + j).exp()
    return EigenKroneckerPrecision(factors(rank), cells)


def diagonal(rank):
    return DiagonalPrecision({k: rand(*s, seed=j).exp() for j, (k, s) in enumerate(SHAPES.items())})


def low_rank(rank):
    size = sum(s.numel() for s in SHAPES.values())
    return LowRankPrecision(rand(size, seed=1).exp(), rand(size, rank, seed=2), SHAPES)


def dense(rank):
    return DensePrecision(gram(sum(s.numel() for s in SHAPES.values()), 3), SHAPES)


def memories_of(memory, rank=16):
    named = [(k, torch.zeros(s, dtype=F64)) for k, s in SHAPES.items()]
    found = create_memories(named, memory, rank=rank, dense_limit=128, block_limit=1024)
    for m in found:
        m.set_prior(torch.full((len(m.view.params),), PRIOR, dtype=F64))
    return found


# belief, memory: pairs in which nothing is lost
EXACT = [
    (diagonal, "diagonal"), (diagonal, "diagonal_covariance"), (diagonal, "low_rank"), (diagonal, "dense"),
    (low_rank, "low_rank"), (low_rank, "dense"), (dense, "dense"), (kronecker, "kronecker"), (kronecker, "dense"),
    (ekfac, "kronecker"), (ekfac, "dense"),
]  # fmt: skip


@pytest.mark.parametrize("belief,memory", EXACT, ids=lambda v: v if isinstance(v, str) else v.__name__)
@pytest.mark.parametrize("rank", [4, 7])
def test_absorbed_and_exported_precision_is_prior_plus_belief(belief, memory, rank):
    precision, memories = belief(rank), memories_of(memory)
    assert all([m.absorb(precision, WEIGHT) for m in memories])
    exported = export(memories, list(SHAPES))
    assert exported.coordinates() == SHAPES
    close(exported.to_dense(), PRIOR * torch.eye(57, dtype=F64) + WEIGHT * precision.to_dense())
    for m in memories:  # the gain inverts what was absorbed
        x = rand(*m.view.shape, seed=9)
        named = dict(zip(m.view.names, m.view.slices(m.gain(x)), strict=True))
        named |= {k: torch.zeros(s, dtype=F64) for k, s in SHAPES.items() if k not in named}
        back = exported.matvec(named)
        for name, part in zip(m.view.names, m.view.slices(x), strict=True):
            close(back[name], part)


@pytest.mark.parametrize("belief", [kronecker, ekfac, low_rank, dense])
@pytest.mark.parametrize("memory", MEMORIES)
def test_of_other_beliefs_the_diagonal_is_absorbed(belief, memory):
    if (belief, memory) in EXACT:
        return
    precision, memories = belief(4), memories_of(memory)
    assert not any([m.absorb(precision, WEIGHT) for m in memories])
    if memory == "block":
        found = torch.cat([m.tensors["precision"].diagonal(dim1=-2, dim2=-1).sum(-1) for m in memories])
    else:
        found = export(memories, list(SHAPES)).to_dense().diagonal()
    close(found.sum(), PRIOR * 57 + WEIGHT * precision.to_dense().trace())
    if memory in ("diagonal", "diagonal_covariance", "low_rank"):
        close(found, PRIOR + WEIGHT * precision.to_dense().diagonal())


def test_a_kronecker_memory_says_that_it_does_not_hold_a_diagonal_belief():
    assert not any([m.absorb(diagonal(0), WEIGHT) for m in memories_of("kronecker")])


def test_a_low_rank_memory_says_that_it_cuts_a_belief_of_larger_rank():
    (memory,) = memories_of("low_rank", rank=3)
    assert not memory.absorb(low_rank(4), WEIGHT)
    found = export([memory], list(SHAPES)).to_dense()
    close(found.diagonal(), PRIOR + WEIGHT * low_rank(4).to_dense().diagonal())


@pytest.mark.parametrize("descending", [False, True])  # factors from a sketch list the largest eigenvalue first
def test_a_narrower_memory_keeps_the_largest_directions_and_the_trace(descending):
    precision = kronecker(6)
    if descending:
        flipped = {}
        for key, sides in precision.blocks.items().items():
            left, right = (EigenFactor(f.vectors.flip(-1), f.values.flip(-1), f.tail) for f in sides)
            flipped[key] = (left, right)
        precision = KroneckerPrecision(KroneckerBlocks(flipped))
    memories = memories_of("kronecker", rank=2)
    for m in memories:
        m.absorb(precision, WEIGHT)
    found = export(memories, list(SHAPES))
    whole = PRIOR * torch.eye(57, dtype=F64) + WEIGHT * precision.to_dense()
    close(found.to_dense().trace(), whole.trace())
    # along the two largest directions of the long side nothing is lost
    for key, (left, right) in kronecker(6).blocks.items().items():
        wide = left if SHAPES[key][0] > SHAPES[key][1] else right
        top = wide.vectors[:, -1]
        x = {k: torch.zeros(s, dtype=F64) for k, s in SHAPES.items()}
        x[key] = torch.outer(top, rand(3, seed=7)) if wide is left else torch.outer(rand(3, seed=7), top)
        expected = PRIOR * x[key] + WEIGHT * precision.matvec(x)[key]
        close(found.matvec(x)[key], expected)


def test_an_absorbed_belief_weighs_in_the_basis_as_its_data_would():
    # Information of m rows x, absorbed at once or taken in row by row, leaves the same moments and the same basis.
    o, i = SHAPES["a"]
    x = rand(30, i, seed=4)
    blocks = {"a": (EigenFactor.from_dense(torch.eye(o, dtype=F64)), EigenFactor.from_dense(x.T @ x / 30))}
    absorbed, taken = memories_of("kronecker")[0], memories_of("kronecker")[0]
    absorbed.absorb(KroneckerPrecision(KroneckerBlocks(blocks)), 30.0)
    place = taken.view.names.index("a")
    for row in x:
        columns = torch.zeros(o, *taken.view.shape, dtype=F64)
        columns[:, place] = torch.eye(o, dtype=F64)[:, :, None] * row
        taken.update(columns)
    for key in ("right_values", "left_moment"):
        close(absorbed.tensors[key][place], taken.tensors[key][place])
    close(absorbed.tensors["precision"][place, :, :-1], taken.tensors["precision"][place, :, :-1])


# -- beliefs as priors -------------------------------------------------------------------------------------------------

NOISE, STRENGTH, N = 0.3, 0.4, 9


def toy_belief(toy, structure, shift=0.0):
    shapes, size = {k: p.shape for k, p in toy.params.items()}, len(toy.theta)
    mean = {k: p.detach().clone() + shift for k, p in toy.params.items()}
    if structure == "dense":
        return Belief(mean, DensePrecision(gram(size, 5, rank=4), shapes))
    return Belief(mean, DiagonalPrecision({k: rand(*s, seed=8).square() for k, s in shapes.items()}))


def filtered(structure, mode, shift=0.0, sizes=(2, 1, 4, 2), **options):
    """Posterior of the filter after all data, and of the penalised objective."""
    toy = linear()
    belief, start = toy_belief(toy, structure, shift), toy.theta
    optimizer = LoKO(
        toy.params.items(), GaussianObservation(NOISE), memory="dense", columns="exact", max_decrease=None, adaptive_noise=0.0,
        prior_precision=dict.fromkeys(toy.params, PRIOR), **options,
    )  # fmt: skip
    optimizer.set_belief(belief, STRENGTH, mode, num_labels=N)
    x, y = rand(N, 3, seed=5), rand(N, 2, seed=6)
    jacobian = toy.jacobian(x).flatten(0, 1)
    intercept = toy.at(torch.zeros_like(start), x).reshape(-1)
    for part, labels in zip(x.split(sizes), y.split(sizes), strict=True):
        optimizer.observe(toy(part), labels)
        optimizer.step()
    anchor = torch.cat([m.reshape(-1) for m in belief.mean.values()])
    own = STRENGTH * N * belief.precision.to_dense()
    whole = PRIOR * torch.eye(len(start), dtype=F64) + own + jacobian.T @ jacobian / NOISE
    right = PRIOR * start + own @ anchor + jacobian.T @ (y.reshape(-1) - intercept) / NOISE
    return toy.theta, covariance(optimizer, toy), torch.linalg.solve(whole, right), torch.linalg.inv(whole)


@pytest.mark.parametrize("gain", ["joint", "memory"])
@pytest.mark.parametrize(
    "structure,mode,shift", [("dense", "prior", 0.0), ("diagonal", "prior", 0.0), ("diagonal", "factor", 0.3)]
)
def test_filter_with_a_belief_reaches_the_map_of_the_penalised_objective(structure, mode, shift, gain):
    mean, p, expected_mean, expected_p = filtered(structure, mode, shift, gain=gain)
    close(mean, expected_mean)
    close(p, expected_p)


def test_prior_and_factor_agree_for_a_diagonal_belief():
    for a, b in zip(filtered("diagonal", "prior")[:2], filtered("diagonal", "factor")[:2], strict=True):
        close(a, b)


def test_a_belief_that_is_cut_is_said_to_be(caplog):
    toy = linear()
    optimizer = LoKO(
        toy.params.items(), GaussianObservation(NOISE), memory="diagonal", prior_precision={"w": 1.0, "b": 1.0}
    )
    optimizer.set_belief(toy_belief(toy, "dense"), STRENGTH, "prior", num_labels=N)
    with caplog.at_level(logging.INFO, "kalman_peft"):
        optimizer.observe(toy(rand(2, 3, seed=1)), rand(2, 2, seed=2))
        optimizer.step()
    assert "cannot hold all of a dense belief" in caplog.text


@pytest.mark.parametrize("memory", [m for m in MEMORIES if m != "block"])
def test_belief_of_a_filter_survives_its_file(memory, tmp_path):
    model = make_lora_llama()
    optimizer = create_loko_optimizer(model, memory=memory, rank=5)
    for seed in range(3):
        batch = make_batch(seed=seed)
        labels = batch.pop("labels")
        optimizer.observe(model(**batch).logits, labels)
        optimizer.step()
    belief = optimizer.belief(model)
    belief.save_pretrained(tmp_path)
    loaded = Belief.from_pretrained(tmp_path)
    loaded.check(model)
    state = AdapterState(model)
    x = {k: rand(*p.shape, seed=j) for j, (k, p) in enumerate(state.parameters().items())}
    labels = loaded.info["num_labels"]
    assert labels == 3 * 9
    for m in optimizer._memories:  # per label, the filter's own precision
        gained = dict(
            zip(m.view.names, m.view.slices(m.gain(m.view.gather([x[n] for n in m.view.names]))), strict=True)
        )
        zero = {k: torch.zeros_like(v) for k, v in x.items()}
        back = loaded.precision.matvec(zero | gained)
        for name in m.view.names:
            close(labels * back[name], x[name], 1e-6)
    for key, mean in loaded.mean.items():
        close(mean, state.parameters()[key].detach(), 1e-6)
    energy = loaded.energy(state.parameters())
    assert float(energy) == pytest.approx(0.0, abs=1e-6)


def test_a_block_memory_has_no_one_precision():
    model = make_lora_llama()
    optimizer = create_loko_optimizer(model, memory="block")
    batch = make_batch()
    optimizer.observe(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    optimizer.step()
    with pytest.raises(ValueError, match="cannot be given as one precision"):
        optimizer.belief(model)
