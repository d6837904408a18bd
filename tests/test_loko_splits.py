"""A step with draws does not depend on how its batch is split."""

import pytest
import torch
from splits import CASES, batches, filtered, make, observe, pieces, state_of

from kalman_peft import create_loko_optimizer


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_give_the_step_of_the_joined_batch(case):
    whole, split = filtered(case), filtered(case, accumulation=3)
    assert whole.keys() == split.keys()
    for key, value in whole.items():
        torch.testing.assert_close(split[key], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_one_broken_micro_batch_skips_the_step(broken, caplog):
    model = make("language")
    optimizer = create_loko_optimizer(model)
    first, second = batches("language")
    observe(optimizer, model, first)
    optimizer.step()
    before = state_of(optimizer)
    for j, part in enumerate(pieces(second, 3)):
        observe(optimizer, model, part, float("nan") if j == broken else 1.0)
    optimizer.step()
    assert "NaN or Inf (1 in a row)" in caplog.text
    for key, value in state_of(optimizer).items():
        assert torch.equal(value, before[key]), key
    observe(optimizer, model, second)  # nothing of the broken batch is left
    optimizer.step()
    other = make("language")
    clean = create_loko_optimizer(other)
    observe(clean, other, first)
    clean.step()
    clean.param_groups[0]["steps"] += 1
    observe(clean, other, second)
    clean.step()
    for key, value in state_of(clean).items():
        torch.testing.assert_close(state_of(optimizer)[key], value, rtol=0, atol=0)
