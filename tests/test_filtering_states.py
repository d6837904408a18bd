"""Structures of the filter's state: what each holds exactly, what compression does, what is refused."""

from itertools import pairwise

import pytest
import torch
from conftest import make_batch, make_lora_llama
from state_space import F64, LAYOUT, SHAPES, STRUCTURES, D, curvature, rand, run, spd, start_state

from kalman_peft import (
    AdapterState,
    Belief,
    BeliefError,
    TaskRecord,
    Transition,
    compress,
    create_loko_optimizer,
    estimate_curvature,
    initial_belief,
    merge_beliefs,
    predict,
    smooth,
    update,
)
from kalman_peft.filtering import absolute, belief_figures, draw, increment_of, transition_figures
from kalman_peft.filtering.algebra import add, constant, variances
from kalman_peft.precision import (
    EigenFactor,
    EigenKroneckerPrecision,
    KroneckerBlocks,
    KroneckerPrecision,
    precision_from_tensors,
)


def kronecker(seed, rank=None, shared=False):
    """Random Kronecker curvature, with bases of its own."""
    rights = {n: EigenFactor.from_dense(spd(n, seed + 50), rank) for n in (2, 3)}
    blocks = {}
    for j, (key, (rows, cols)) in enumerate(SHAPES.items()):
        right = rights[cols] if shared else EigenFactor.from_dense(spd(cols, seed + j), rank)
        blocks[key] = (EigenFactor.from_dense(spd(rows, seed + 20 + j), rank), right)
    return KroneckerPrecision(KroneckerBlocks(blocks))


# -- the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [*STRUCTURES, "kronecker"])
def test_start_is_the_prior(structure):
    deltas = {"lora_A": 3.0, r"1\..*lora_B": 0.5, r"0\..*lora_B": 7.0}
    belief = initial_belief(start_state(), deltas, structure, dtype=F64)
    expected = torch.tensor([3.0] * 6 + [7.0] * 8 + [3.0] * 6 + [0.5] * 8, dtype=F64)
    torch.testing.assert_close(belief.precision.to_dense(), expected.diag())
    x = rand(D)
    torch.testing.assert_close(LAYOUT.flatten(belief.precision.solve(LAYOUT.unflatten(x))), x / expected)
    torch.testing.assert_close(belief.precision.logdet(), expected.log().sum())
    torch.testing.assert_close(LAYOUT.flatten(variances(belief.precision)), 1 / expected)
    record = dict(belief.info["filtering"])
    assert len(record.pop("origin")) == 16 and record == {"kind": "prior", "num_labels": 0.0, "tasks": 0}


def test_start_from_a_model():
    model = make_lora_llama(torch.float32)
    belief = initial_belief(model, 2.0)
    belief.check(model)
    assert belief.precision.structure == "low_rank" and belief.info["adapter"]["base_fingerprint"]
    state = AdapterState(model).snapshot()
    assert all(torch.equal(belief.mean[k], p) for k, p in state.items())
    next(iter(belief.mean.values())).add_(1)
    assert not torch.equal(next(iter(belief.mean.values())), AdapterState(model).pairs[0].a)  # a copy


# -- Kronecker -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 1])
def test_kronecker_curvature_is_added_to_the_prior_exactly(rank):
    belief = initial_belief(start_state(), 0.5, "ekfac", dtype=F64)
    task = kronecker(1, rank)
    updated = update(belief, belief.mean, task, 20)
    expected = 0.5 * torch.eye(D, dtype=F64) + 20 * task.to_dense()
    torch.testing.assert_close(updated.precision.to_dense(), expected)
    predicted = predict(updated, Transition({"lora_A": 0.1, "lora_B": 0.7}))
    noise = LAYOUT.flatten({k: torch.full(s, 0.1 if "lora_A" in k else 0.7, dtype=F64) for k, s in SHAPES.items()})
    torch.testing.assert_close(
        predicted.precision.to_dense(), torch.linalg.inv(torch.linalg.inv(expected) + noise.diag())
    )


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_sum_over_two_bases_keeps_the_trace_and_stays_definite(rank):
    belief = initial_belief(start_state(), 0.5, "ekfac", dtype=F64)
    expected = 0.5 * torch.eye(D, dtype=F64)
    for seed in range(5):
        task = kronecker(10 * seed, rank)
        belief, expected = update(belief, belief.mean, task, 20), expected + 20 * task.to_dense()
        found = belief.precision.to_dense()
        torch.testing.assert_close(found.trace(), expected.trace())
        assert torch.linalg.eigvalsh(found).min() >= 0.5 - 1e-10
    ranks = {f.signature[1] for pair in belief.precision.blocks.items().values() for f in pair}
    assert max(ranks) <= (rank or 4)


def test_sum_is_the_diagonal_of_the_exact_sum_in_its_basis():
    a, b = kronecker(1).predict(0.0), kronecker(2).predict(0.0)
    found = add(a, b)
    exact, at = a.to_dense() + b.to_dense(), 0
    for key, (left, right) in found.blocks.items().items():
        size = SHAPES[key].numel()
        basis = torch.kron(left.vectors, right.vectors)
        block = exact[at : at + size, at : at + size]
        expected = (basis.T @ block @ basis).diagonal().view(SHAPES[key])
        torch.testing.assert_close(found.cells[key][:-1, :-1], expected)
        at += size
    # The basis is that of the sum's partial traces.
    key, at = next(iter(SHAPES)), 0
    block = exact[:6, :6].view(2, 3, 2, 3)
    left = found.blocks.items()[key][0]
    turned = left.vectors.T @ torch.einsum("iaka->ik", block) @ left.vectors
    torch.testing.assert_close(turned, turned.diagonal().diag(), atol=1e-10, rtol=0)


def test_inputs_that_blocks_share_stay_shared():
    belief = initial_belief(start_state(), 0.5, "ekfac", dtype=F64)
    for seed in (1, 2):
        belief = update(belief, belief.mean, kronecker(seed, shared=True), 20)
    blocks = belief.precision.blocks.items()
    a0, _, a1, _ = SHAPES
    assert blocks[a0][1] is blocks[a1][1]


def test_kronecker_smoothing_over_different_bases_is_definite_and_near():
    tasks = [kronecker(10 * t) for t in range(4)]
    records, chain, nodes, prior = run("ekfac", [Transition(0.05)] * 4, curvatures=tasks)
    means, _ = chain.posterior()
    for record, belief, node in zip(records, smooth(records, start=prior.mean), nodes, strict=True):
        more = belief.precision.to_dense() - record.belief.precision.to_dense()
        # Seen in the pooled basis; the trace is kept exactly.
        assert more.trace() >= -1e-9 and torch.linalg.eigvalsh(belief.precision.to_dense()).min() > 0
        filtered = (LAYOUT.flatten(record.belief.mean) - means[node]).norm()
        if record is not records[-1]:
            assert (LAYOUT.flatten(belief.mean) - means[node]).norm() < filtered


# -- low rank ------------------------------------------------------------------------------------------------------


def test_compression_keeps_the_diagonal_or_only_shrinks():
    records, _, _, _ = run("low_rank", [Transition(0.1)] * 4)
    belief = records[-1].belief
    dense = belief.precision.to_dense()
    for rank in (0, 1, 5):
        kept, cut = compress(belief, rank).precision, compress(belief, rank, keep_discarded=False).precision
        assert kept.rank == cut.rank == rank
        torch.testing.assert_close(kept.to_dense().diagonal(), dense.diagonal())
        assert torch.linalg.eigvalsh(dense - cut.to_dense()).min() > -1e-9
        assert (LAYOUT.flatten(variances(cut)) >= torch.linalg.inv(dense).diagonal() - 1e-10).all()
    torch.testing.assert_close(compress(belief, 12).precision.to_dense(), dense)


@pytest.mark.parametrize("keep", [True, False])
def test_long_sequences_stay_bounded_and_settle(keep):
    step = Transition(0.1)
    records, _, _, _ = run("low_rank", [step] * 25, rank=4, keep_discarded=keep)
    exact, _, _, _ = run("dense", [step] * 25, curvatures=[curvature("low_rank", 10 * t + 20) for t in range(25)])
    traces = []
    for record, reference in zip(records, exact, strict=True):
        precision = record.belief.precision
        assert precision.rank <= 4
        traces.append(belief_figures(record.belief)["covariance_trace"])
        if not keep:  # never below the exact filter's, for every weight
            found = LAYOUT.flatten(variances(precision))
            assert (found >= LAYOUT.flatten(variances(reference.belief.precision)) * (1 - 1e-9)).all()
    late = torch.tensor(traces[10:])
    assert late.max() < 1.5 * late.min() and traces[-1] < traces[0]
    smoothed = smooth(records)
    assert max(b.precision.rank for b in smoothed) <= 4
    assert all(torch.linalg.eigvalsh(b.precision.to_dense()).min() > 0 for b in smoothed)
    with_less = [v.belief.precision.to_dense().trace() for v in records]
    assert max(with_less[15:]) < 2 * min(with_less[15:])  # no creeping overconfidence


@pytest.mark.parametrize("structure", ["diagonal", "ekfac"])
def test_long_sequences_in_other_structures(structure):
    tasks = [curvature("diagonal", 10 * t) if structure == "diagonal" else kronecker(10 * t, 2) for t in range(25)]
    most = max(float(torch.linalg.eigvalsh(20 * t.to_dense()).max()) for t in tasks)

    def learn(noise):
        belief, traces, held = initial_belief(start_state(), 0.5, structure, dtype=F64), [], []
        for task in tasks:
            belief = update(predict(belief, Transition(noise)), belief.mean, task, 20)
            figures = belief_figures(belief)
            traces.append(figures["covariance_trace"])
            held.append(sum(t.numel() for t in belief.precision.tensors().values()))
            if noise:  # whatever the data say: what noise and one task leave
                assert figures["least_variance"] >= noise / (1 + noise * most) * (1 - 1e-9)
        assert max(held[1:]) == held[1]
        return sum(traces[-5:]) / sum(traces[5:10])

    assert 0.5 < learn(0.1) < 2
    assert learn(0.0) < 0.5


def test_without_noise_precision_grows_with_every_task():
    records, _, _, _ = run("low_rank", [Transition()] * 6, rank=4)
    traces = [belief_figures(r.belief)["covariance_trace"] for r in records]
    assert all(b < a for a, b in pairwise(traces))


@pytest.mark.parametrize("rank", [0, 3])
def test_one_update_keeps_the_exact_diagonal(rank):
    belief = initial_belief(start_state(), 0.5, "low_rank", dtype=F64)
    task = curvature("low_rank", 4, rank=6)
    updated = update(belief, belief.mean, task, 20, rank=rank)
    expected = 0.5 + 20 * task.to_dense().diagonal()
    torch.testing.assert_close(updated.precision.to_dense().diagonal(), expected)


def test_float32_follows_float64_over_a_wide_spectrum():
    results = []
    for dtype in (F64, torch.float32):
        belief = initial_belief(start_state(), 1.0, "low_rank", dtype=dtype)
        task = curvature("low_rank", 4)
        task = type(task)(task.entries.to(dtype), task.columns.to(dtype), SHAPES)
        for _ in range(3):
            belief = update(predict(belief, Transition(1e-4)), belief.mean, task, 1e6)
        results.append(predict(belief, Transition(1e-4)).precision.to_dense().double())
    scale = results[0].abs().max()
    assert (results[0] - results[1]).abs().max() < 1e-4 * scale
    assert torch.linalg.eigvalsh(results[1]).min() > 0


@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "ekfac"])
@pytest.mark.parametrize("decay", [1.0, 0.05])
def test_float32_smooths_and_merges_over_a_wide_spectrum(structure, decay):
    def cast(precision):
        return precision_from_tensors(structure, "adapter", {k: t.float() if t.is_floating_point() else t for k, t in precision.tensors().items()})  # fmt: skip

    records, _, _, prior = run(structure, [Transition(0.3, decay)] * 3, labels=1e7)
    single = [
        TaskRecord(r.name, Belief({k: m.float() for k, m in r.belief.mean.items()}, cast(r.belief.precision), r.belief.info), r.transition, cast(r.increment))
        for r in records
    ]  # fmt: skip
    start = {k: m.float() for k, m in prior.mean.items()}
    for one, other in zip(smooth(records, start=prior.mean), smooth(single, start=start), strict=True):
        torch.testing.assert_close(LAYOUT.flatten(other.mean).double(), LAYOUT.flatten(one.mean), rtol=1e-4, atol=1e-5)
        x = LAYOUT.unflatten(rand(D))
        a, b = (
            LAYOUT.flatten(p.matvec({k: v.to(p.like) for k, v in x.items()})) for p in (one.precision, other.precision)
        )
        assert (b.double() - a).norm() < 1e-5 * a.norm()
        assert all(v.isfinite().all() for v in draw(other, torch.Generator().manual_seed(0)).values())
    given = ([records[0].increment], [single[0].increment])
    first = merge_beliefs([update(prior, records[0].belief.mean, given[0][0], 1)], prior, given[0])
    narrow = initial_belief(start, 0.5, structure)
    second = merge_beliefs([update(narrow, single[0].belief.mean, given[1][0], 1)], narrow, given[1])
    torch.testing.assert_close(LAYOUT.flatten(second.mean).double(), LAYOUT.flatten(first.mean), rtol=1e-4, atol=1e-5)


def test_diagonal_curvature_joins_a_low_rank_state():
    belief = initial_belief(start_state(), 0.5, "low_rank", dtype=F64)
    task = curvature("diagonal", 4)
    updated = update(belief, belief.mean, task, 20)
    torch.testing.assert_close(updated.precision.to_dense(), 0.5 * torch.eye(D, dtype=F64) + 20 * task.to_dense())
    assert updated.precision.rank == 0


# -- with a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "fitted"),
    [("diagonal", "diagonal"), ("low_rank", "low_rank"), ("ekfac", "kronecker"), ("ekfac", "ekfac")],
)
def test_curvature_of_a_model_updates_its_belief(structure, fitted):
    model = make_lora_llama(torch.float32)
    belief = initial_belief(model, 1.0, structure)
    task, _ = estimate_curvature(model, [make_batch()], structure=fitted, space="adapter", progress_bar=False)
    updated = update(predict(belief, Transition(0.01)), AdapterState(model).tensors(), task, 9)
    expected = torch.eye(task.to_dense().shape[0]) / 1.01 + 9 * task.to_dense()
    torch.testing.assert_close(updated.precision.to_dense(), expected, rtol=1e-3, atol=1e-4)
    assert updated.info["filtering"].items() >= {"kind": "filtered", "num_labels": 9.0, "tasks": 1}.items()
    updated.check(model)


@pytest.mark.parametrize(
    ("memory", "structure"), [("kronecker", "ekfac"), ("diagonal", "diagonal"), ("low_rank", "low_rank")]
)
def test_the_belief_of_a_loko_optimizer_is_carried_over(memory, structure):
    model = make_lora_llama()
    optimizer = create_loko_optimizer(model, memory=memory)
    for seed in range(3):
        batch = make_batch(seed=seed)
        labels = batch.pop("labels")
        optimizer.observe(model(**batch).logits, labels)
        optimizer.step()
    belief = optimizer.belief(model)
    state = absolute(belief)
    assert state.precision.structure == structure and state.info["filtering"]["num_labels"] == 27
    torch.testing.assert_close(state.precision.to_dense(), 27 * belief.precision.to_dense())
    predicted = predict(state, Transition(1e-3))
    assert 0 < transition_figures(state, predicted)["stability"] < 1
    task, _ = estimate_curvature(model, [make_batch()], structure={"ekfac": "kronecker"}.get(structure, structure),
                                 space="adapter", progress_bar=False)  # fmt: skip
    updated = update(predicted, AdapterState(model).tensors(), task, 9)
    expected = predicted.precision.to_dense().trace() + 9 * task.to_dense().trace()
    torch.testing.assert_close(updated.precision.to_dense().trace().double(), expected.double(), rtol=1e-4, atol=0)


def test_figures():
    records, _, _, _ = run("low_rank", [Transition()] * 2)
    belief = records[-1].belief
    dense = belief.precision.to_dense()
    found = belief_figures(belief)
    inverse = torch.linalg.inv(dense)
    assert found["covariance_trace"] == pytest.approx(float(inverse.trace()))
    assert found["least_variance"] == pytest.approx(float(inverse.diagonal().min()))
    assert found["precision_trace"] == pytest.approx(float(dense.trace()))
    moved = predict(belief, Transition(0.25))
    figures = transition_figures(belief, moved)
    assert figures["plasticity"] == pytest.approx(0.25)
    assert figures["stability"] == pytest.approx(float(moved.precision.to_dense().trace() / dense.trace()))
    same = transition_figures(belief, predict(belief, Transition()))
    assert same == {"stability": 1.0, "plasticity": 0.0}


# -- what is refused -----------------------------------------------------------------------------------------------


def test_raises_when_the_structure_cannot_start():
    with pytest.raises(BeliefError, match="cannot start from structure 'block_tridiagonal'"):
        initial_belief(start_state(), 1.0, "block_tridiagonal")


def test_raises_when_a_weight_has_no_prior():
    with pytest.raises(ValueError, match="without a prior"):
        initial_belief(start_state(), {"lora_A": 1.0})
    with pytest.raises(ValueError, match="prior_precision must be > 0"):
        initial_belief(start_state(), 0.0)


def test_raises_when_a_belief_is_no_state():
    model = make_lora_llama(torch.float32)
    merged = Belief.fit(model, [make_batch()], progress_bar=False, structure="diagonal", space="delta_w")
    with pytest.raises(BeliefError, match="space='adapter'"):
        predict(merged, Transition(0.1))
    fitted = Belief.fit(model, [make_batch()], progress_bar=False, structure="diagonal", space="adapter")
    with pytest.raises(BeliefError, match="per label"):
        predict(fitted, Transition(0.1))
    with pytest.raises(BeliefError, match="without a prior"):
        absolute(fitted)


def test_a_per_label_belief_becomes_a_state():
    precision = constant("diagonal", SHAPES, dict.fromkeys(SHAPES, 0.1), torch.zeros((), dtype=F64))
    loko = Belief(start_state(), precision, {"filter": {}, "num_labels": 30})
    state = absolute(loko)
    torch.testing.assert_close(state.precision.to_dense(), 3 * torch.eye(D, dtype=F64))
    assert (
        absolute(loko, predicted=state).info["filtering"].items()
        >= {"kind": "filtered", "num_labels": 60.0, "tasks": 2}.items()
    )
    with pytest.raises(BeliefError, match="already"):
        absolute(state)
    with pytest.raises(BeliefError, match="num_labels"):
        absolute(Belief(start_state(), precision))


def test_block_tridiagonal_moves_by_one_noise_only_and_is_not_updated():
    model = make_lora_llama(torch.float64)
    fitted = Belief.fit(model, [make_batch()], progress_bar=False, structure="block_tridiagonal", space="adapter")
    belief = Belief(fitted.mean, fitted.precision, {"filtering": {"kind": "filtered", "num_labels": 9, "tasks": 1}})
    dense = fitted.precision.to_dense()
    eye = torch.eye(len(dense), dtype=dense.dtype)
    found = predict(belief, Transition(0.3, decay=0.8), belief.mean).precision.to_dense()
    expected = torch.linalg.solve(0.64 * eye + 0.3 * dense, dense)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(BeliefError, match="block_tridiagonal precision stays exact only under one process noise"):
        predict(belief, Transition({"lora_A": 0.3}))
    with pytest.raises(BeliefError, match="can be predicted but not updated"):
        update(belief, belief.mean, fitted.precision, 9)


def test_raises_when_noise_differs_within_a_kronecker_block():
    belief = initial_belief(start_state(), 1.0, "ekfac", dtype=F64)
    key = next(iter(SHAPES))
    with pytest.raises(ValueError, match="one variance per matrix"):
        predict(belief, Transition({key: rand(*SHAPES[key]).square()}))


def test_raises_when_a_full_reset_has_no_noise():
    belief = initial_belief(start_state(), 1.0, "diagonal", dtype=F64)
    with pytest.raises(BeliefError, match="infinite precision"):
        predict(belief, Transition({"lora_A": 1.0}, decay=0.0), belief.mean)


@pytest.mark.parametrize(("state", "given"), [("diagonal", "low_rank"), ("low_rank", "ekfac"), ("ekfac", "low_rank")])
def test_raises_when_a_curvature_does_not_fit_the_state(state, given):
    belief = initial_belief(start_state(), 1.0, state, dtype=F64)
    with pytest.raises(BeliefError, match=f"'{given}' cannot be added to a state of structure '{state}'"):
        update(belief, belief.mean, curvature(given, 1), 10)


@pytest.mark.parametrize("structure", ["diagonal", "ekfac", "dense"])
def test_raises_when_there_is_no_rank_to_cut(structure):
    belief = initial_belief(start_state(), 1.0, structure, dtype=F64)
    with pytest.raises(ValueError, match="rank= is for structure 'low_rank'"):
        update(belief, belief.mean, curvature(structure, 1), 10, rank=3)
    with pytest.raises(ValueError, match="rank= is for structure 'low_rank'"):
        compress(belief, 3)


def test_raises_when_numbers_or_weights_are_off():
    belief = initial_belief(start_state(), 1.0, "low_rank", dtype=F64)
    task = curvature("low_rank", 1)
    with pytest.raises(ValueError, match="num_labels must be > 0"):
        increment_of(belief, task, 0)
    with pytest.raises(ValueError, match="rank must be >= 0"):
        update(belief, belief.mean, task, 10, rank=-1)
    with pytest.raises(BeliefError, match="other weights"):
        update(belief, {}, task, 10)
    fewer = dict(list(SHAPES.items())[:2])
    other = initial_belief({k: start_state()[k] for k in fewer}, 1.0, "low_rank", dtype=F64)
    with pytest.raises(BeliefError, match="other weights than the belief"):
        update(other, other.mean, task, 10)


def test_raises_when_a_delta_w_curvature_is_given():
    model = make_lora_llama(torch.float32)
    belief = initial_belief(model, 1.0, "diagonal")
    task, _ = estimate_curvature(model, [make_batch()], structure="diagonal", space="delta_w", progress_bar=False)
    with pytest.raises(BeliefError, match="space='adapter'"):
        update(belief, belief.mean, task, 9)


def test_ekfac_and_kronecker_add_alike():
    task = kronecker(3)
    belief = initial_belief(start_state(), 1.0, "ekfac", dtype=F64)
    one, other = update(belief, belief.mean, task, 5), update(belief, belief.mean, task.predict(0.0), 5)
    assert isinstance(one.precision, EigenKroneckerPrecision)
    torch.testing.assert_close(one.precision.to_dense(), other.precision.to_dense())
