"""Beliefs of several parties over one prior: equal to learning from the data of all."""

import pytest
import torch
from conftest import make_lora_llama
from state_space import F64, LAYOUT, SHAPES, STRUCTURES, D, check, curvature, rand, root, start_state

from kalman_peft import Belief, BeliefError, Transition, initial_belief, merge_beliefs, predict, update
from kalman_peft.filtering import increment_of
from kalman_peft.filtering.merging import conjugate_gradients


def parties(structure, prior, seeds, labels=20, rank=None):
    """What each has learnt from data of its own; also the increments, and the dense sums of information and score."""
    beliefs, increments = [], []
    precision, score = prior.precision.to_dense(), torch.zeros(D, dtype=F64)
    m0, before = LAYOUT.flatten(prior.mean), prior.precision.to_dense()
    for seed in seeds:
        task = curvature(structure, seed)
        h = root(labels * task.to_dense())
        residual = rand(len(h), seed=seed + 300)
        mode = m0 + torch.linalg.solve(before + h.T @ h, h.T @ residual)
        beliefs.append(update(prior, LAYOUT.unflatten(mode), task, labels, rank))
        increments.append(increment_of(prior, task, labels))
        precision, score = precision + h.T @ h, score + h.T @ residual
    return beliefs, increments, m0 + torch.linalg.solve(precision, score), torch.linalg.inv(precision)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_merging_is_learning_from_the_data_of_all(structure):
    prior = initial_belief(start_state(), 0.5, structure, dtype=F64)
    beliefs, increments, mean, covariance = parties(structure, prior, [1, 20, 40])
    for given in (None, increments):
        merged = merge_beliefs(beliefs, prior, given)
        check(merged, mean, covariance)
        assert (
            merged.info["filtering"].items()
            >= {"kind": "filtered", "num_labels": 60.0, "tasks": 3, "merged": 3}.items()
        )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_shared_prior_may_be_a_state_that_has_learnt(structure):
    start = initial_belief(start_state(), 0.5, structure, dtype=F64)
    prior = predict(update(start, start_state(3), curvature(structure, 70), 10), Transition(0.1))
    beliefs, increments, mean, covariance = parties(structure, prior, [1, 20])
    check(merge_beliefs(beliefs, prior, increments), mean, covariance)
    if structure in ("diagonal", "dense"):
        check(merge_beliefs(beliefs, prior), mean, covariance)
    else:
        with pytest.raises(BeliefError, match="Pass increments="):
            merge_beliefs(beliefs, prior)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_belief_and_those_that_learnt_nothing(structure):
    prior = initial_belief(start_state(), 0.5, structure, dtype=F64)
    (one,), _, mean, covariance = parties(structure, prior, [1])
    check(merge_beliefs([one], prior), mean, covariance)
    check(merge_beliefs([prior, one, prior], prior), mean, covariance)
    nothing = merge_beliefs([prior, prior], prior)
    check(nothing, LAYOUT.flatten(prior.mean), torch.eye(D, dtype=F64) / 0.5)


def test_order_does_not_matter_and_the_prior_counts_once():
    prior = initial_belief(start_state(), 0.5, "diagonal", dtype=F64)
    beliefs, _, _, _ = parties("diagonal", prior, [1, 20, 40])
    one, other = merge_beliefs(beliefs, prior), merge_beliefs(beliefs[::-1], prior)
    check(one, LAYOUT.flatten(other.mean), torch.linalg.inv(other.precision.to_dense()))
    # Two that agree are surer together: further from the prior than each, on the line from it.
    twice = merge_beliefs([beliefs[0], beliefs[0]], prior)
    step = LAYOUT.flatten(beliefs[0].mean) - LAYOUT.flatten(prior.mean)
    further = LAYOUT.flatten(twice.mean) - LAYOUT.flatten(prior.mean)
    assert (further.abs() >= step.abs() - 1e-12).all() and (further * step >= 0).all()
    assert further.norm() > step.norm()


def test_the_mean_is_exact_though_the_precision_is_cut():
    prior = initial_belief(start_state(), 0.5, "low_rank", dtype=F64)
    beliefs, _, mean, covariance = parties("low_rank", prior, [1, 20, 40])
    merged = merge_beliefs(beliefs, prior, rank=2)
    assert merged.precision.rank == 2
    torch.testing.assert_close(LAYOUT.flatten(merged.mean), mean, rtol=1e-8, atol=1e-8)
    diagonal = torch.linalg.inv(covariance).diagonal()
    torch.testing.assert_close(merged.precision.to_dense().diagonal(), diagonal)


def test_kronecker_bases_that_differ():
    from test_filtering_states import kronecker

    prior = initial_belief(start_state(), 0.5, "ekfac", dtype=F64)
    beliefs, total, pull = [], prior.precision.to_dense(), torch.zeros(D, dtype=F64)
    for seed in (0, 10, 20):
        mode = start_state(seed)
        beliefs.append(update(prior, mode, kronecker(seed), 20))
        total = total + 20 * kronecker(seed).to_dense()
        offset = LAYOUT.flatten(mode) - LAYOUT.flatten(prior.mean)
        pull = pull + beliefs[-1].precision.to_dense() @ offset
    merged = merge_beliefs(beliefs, prior)
    expected = LAYOUT.flatten(prior.mean) + torch.linalg.solve(total, pull)
    torch.testing.assert_close(LAYOUT.flatten(merged.mean), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(merged.precision.to_dense().trace(), total.trace())


def test_conjugate_gradients_solve():
    x = rand(D, 2 * D)
    matrix, right = x @ x.T / D, rand(D, seed=1)
    solve = {"matvec": lambda v: {"x": matrix @ v["x"]}, "right": {"x": right}, "precondition": dict}
    torch.testing.assert_close(conjugate_gradients(**solve)["x"], torch.linalg.solve(matrix, right))
    assert conjugate_gradients(**(solve | {"right": {"x": 0 * right}}))["x"].abs().max() == 0
    with pytest.raises(BeliefError, match="did not converge"):
        conjugate_gradients(**solve, steps=2)
    with pytest.raises(BeliefError, match="not positive definite"):
        conjugate_gradients(**(solve | {"matvec": lambda v: {"x": -matrix @ v["x"]}}))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_raises_when_a_belief_knows_less_than_the_prior(structure):
    prior = initial_belief(start_state(), 2.0, structure, dtype=F64)
    with pytest.raises(BeliefError, match="knows less than the prior"):
        merge_beliefs([initial_belief(start_state(), 1.0, structure, dtype=F64)], prior)


def test_raises_when_beliefs_do_not_belong_together():
    prior = initial_belief(start_state(), 0.5, "diagonal", dtype=F64)
    with pytest.raises(BeliefError, match="no beliefs"):
        merge_beliefs([], prior)
    with pytest.raises(BeliefError, match="2 increments for 1 beliefs"):
        merge_beliefs([prior], prior, [prior.precision] * 2)
    fewer = initial_belief({k: start_state()[k] for k in list(SHAPES)[:2]}, 0.5, "diagonal", dtype=F64)
    with pytest.raises(BeliefError, match="other weights"):
        merge_beliefs([fewer], prior)
    with pytest.raises(BeliefError, match="structure 'dense'"):
        merge_beliefs([initial_belief(start_state(), 0.5, "dense", dtype=F64)], prior)


def test_raises_when_a_party_started_elsewhere():
    prior = initial_belief(start_state(), 0.5, "diagonal", dtype=F64)
    elsewhere = initial_belief(start_state(8), 0.5, "diagonal", dtype=F64)
    again = initial_belief(start_state(), 0.5, "diagonal", dtype=F64)
    merge_beliefs([again], prior)
    with pytest.raises(BeliefError, match="Belief 1 did not start from this prior"):
        merge_beliefs([again, elsewhere], prior)


def test_the_lineage_names_the_data_of_all_parties():
    prior = initial_belief(start_state(), 0.5, "diagonal", dtype=F64)
    past = [{"name": name} for name in ("old", "mine", "yours")]
    known = [Belief(prior.mean, prior.precision, prior.info | {"lineage": found}) for found in
             ([past[0]], [past[0], past[1]], [past[0], past[2]])]  # fmt: skip
    assert merge_beliefs(known[1:], known[0]).info["lineage"] == past
    assert "lineage" not in merge_beliefs([prior], prior).info


def test_raises_when_base_or_scaling_differ():
    model = make_lora_llama(torch.float32)
    prior = initial_belief(model, 1.0, "diagonal")
    merge_beliefs([initial_belief(model, 2.0, "diagonal")], prior)
    other = initial_belief(make_lora_llama(torch.float32, lora_alpha=5), 1.0, "diagonal")
    with pytest.raises(BeliefError, match="another LoRA scaling"):
        merge_beliefs([other], prior)
    adapter = prior.info["adapter"] | {"base_fingerprint": "0" * 64, "base_model": "elsewhere"}
    foreign = Belief(prior.mean, prior.precision, prior.info | {"adapter": adapter})
    with pytest.raises(BeliefError, match=r"'elsewhere'.*different base models"):
        merge_beliefs([foreign], prior)
