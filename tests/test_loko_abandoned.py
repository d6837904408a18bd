"""An iterated step that comes to nothing leaves weights and memory as they were before it."""

import pytest
import torch
from conftest import make_batch, make_lora_llama
from toys import Linear

from kalman_peft import Belief, GaussianObservation, LoKO, create_loko_optimizer


ITERATED = {"gain": "joint", "curvature_every": 1}


def everything(optimizer):
    """Copies of weights, memory, and the progress that observing can change."""
    tensors = [t.clone() for m in optimizer._memories for t in (m.view.read(), *m.tensors.values())]
    group = optimizer.param_groups[0]
    return tensors, {k: group[k] for k in ("settled", "belief_counted", "variance", "variance_weight", "tokens")}


def assert_same(found, expected):
    assert found[1] == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


def abandon(way, optimizer, observe):
    """Move to the posterior mean, then let the step come to nothing."""
    observe(1.0)
    optimizer.relinearise()
    if way == "skipped":
        observe(float("nan"))
        optimizer.step()
    elif way == "refused":
        optimizer.param_groups[0]["max_skipped"] = 0
        observe(float("nan"))
        with pytest.raises(FloatingPointError, match="batches in a row"):
            optimizer.step()
    else:
        observe(1.0)
        optimizer.discard()


@pytest.mark.parametrize("way", ["skipped", "refused", "discarded"])
@pytest.mark.parametrize("memory", ["diagonal", "diagonal_covariance", "kronecker", "low_rank", "dense"])
@pytest.mark.parametrize("steps", [0, 2])
def test_process_noise_and_prior_of_an_abandoned_step_are_undone(way, memory, steps):
    toy = Linear(memory=memory, process_noise=1e-2, **ITERATED).run(steps)
    x, labels = toy.batch(7)
    before = everything(toy.optimizer)
    abandon(way, toy.optimizer, lambda factor: toy.optimizer.observe(factor * toy(x), labels))
    assert_same(everything(toy.optimizer), before)


@pytest.mark.parametrize("mode", ["factor", "penalty", "prior"])
def test_a_beliefs_pull_on_an_abandoned_step_is_undone(mode):
    model, batch = make_lora_llama(), make_batch()
    belief = Belief.fit(model, [make_batch(seed=3)], space="adapter", progress_bar=False)
    optimizer = create_loko_optimizer(
        model, belief=belief, belief_mode=mode, belief_labels=50.0 if mode == "prior" else None, **ITERATED
    )

    def observe(factor):
        optimizer.observe(factor * model(input_ids=batch["input_ids"]).logits, batch["labels"])

    if mode != "prior":
        observe(1.0)
        optimizer.step()
    before = everything(optimizer)
    abandon("skipped", optimizer, observe)
    assert_same(everything(optimizer), before)


def test_the_noise_estimate_of_an_abandoned_step_is_undone():
    weight = torch.nn.Parameter(torch.ones(1, 3, dtype=torch.float64))
    optimizer = LoKO([("w", weight)], GaussianObservation(), estimate_noise=True, **ITERATED)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def observe(factor):
        optimizer.observe(factor * x @ weight.mT, torch.arange(4.0).double())

    observe(1.0)
    optimizer.step()
    before = everything(optimizer)
    abandon("skipped", optimizer, observe)
    assert_same(everything(optimizer), before)


def test_a_step_after_an_abandoned_one_is_as_without_it():
    toys = [Linear(process_noise=1e-2, **ITERATED).run(2) for _ in range(2)]
    x, labels = toys[0].batch(7)
    abandon("discarded", toys[0].optimizer, lambda factor: toys[0].optimizer.observe(factor * toys[0](x), labels))
    for toy in toys:
        toy.step(8)
    assert torch.equal(toys[0].theta, toys[1].theta)
