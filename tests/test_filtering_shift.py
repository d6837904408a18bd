"""Process noise from the shift between two source sets."""

import pytest
import torch
from conftest import make_batch, make_lora_llama
from state_space import F64, LAYOUT, SHAPES, STRUCTURES, D, curvature, rand, start_state

from kalman_peft import AdapterState, BeliefError, Transition, initial_belief, noise_from_shift, predict, update
from kalman_peft.filtering import noise_by_module, noise_from_gradients


@pytest.mark.parametrize("structure", STRUCTURES)
def test_mean_square_of_the_difference_of_two_newton_steps(structure):
    prior = initial_belief(start_state(), 0.5, structure, dtype=F64)
    belief = update(prior, prior.mean, curvature(structure, 1), 20)
    first, second = rand(D, seed=1), rand(D, seed=2)
    matrix = belief.precision.to_dense() / 20 + 0.1 * torch.eye(D, dtype=F64)
    moved = LAYOUT.unflatten(-torch.linalg.solve(matrix, second) + torch.linalg.solve(matrix, first))
    found = noise_from_gradients(belief, LAYOUT.unflatten(first), LAYOUT.unflatten(second), damping=0.1)
    assert found == pytest.approx({k: float(x.square().mean()) for k, x in moved.items()})
    predict(belief, Transition(found))  # is taken as it is
    by_module = noise_by_module(found, belief.mean)
    a, b = list(SHAPES)[:2]
    assert by_module[a] == by_module[b] == pytest.approx((6 * found[a] + 8 * found[b]) / 14)


def loss_gradient(model, batch):
    """Mean loss per label, by autograd alone."""
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
    gradient = {k: p.grad.clone() for k, p in AdapterState(model).parameters().items()}
    model.zero_grad()
    return gradient


def test_from_a_model_and_two_sets():
    model = make_lora_llama(F64)
    model.eval()
    first, second = make_batch(seed=3), make_batch(seed=4)
    state = AdapterState(model)
    belief = initial_belief(model, 2.0, "diagonal", dtype=F64)
    expected = noise_from_gradients(belief, loss_gradient(model, first), loss_gradient(model, second), num_labels=50)
    with torch.no_grad():  # the belief's mean counts, whatever the model has become
        for p in state.parameters().values():
            p.add_(0.1)
    left = state.snapshot(F64)
    found = noise_from_shift(model, belief, [first], [second], num_labels=50)
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(left[k], p) for k, p in state.parameters().items())
    nothing = noise_from_shift(model, belief, [first], [first], num_labels=50)
    assert set(nothing.values()) == {0.0}


def test_raises_without_labels_or_with_other_weights():
    belief = initial_belief(start_state(), 1.0, "diagonal", dtype=F64)
    gradient = start_state(1)
    with pytest.raises(BeliefError, match=r"Pass num_labels="):
        noise_from_gradients(belief, gradient, gradient)
    with pytest.raises(BeliefError, match="`second` is over other weights"):
        noise_from_gradients(belief, gradient, {}, num_labels=3)
