"""Opacus: its gradient per sample, squared and summed, is the diagonal empirical Fisher per sequence."""

import pytest
import torch
from oracle_models import Logits, empirical, make_data, make_model

from kalman_peft import AdapterState


pytest.importorskip("opacus", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 3}}])
def test_diagonal_is_the_sum_of_squared_gradients_per_sample(lora):
    from opacus import GradSampleModule

    model = make_model(**lora)
    batch, inputs, targets = make_data()
    ours, tokens = empirical(model, batch, "diagonal")
    # The loss is summed over positions and sequences; "sum" keeps Opacus from multiplying by the batch size. It
    # records in training mode only; the model has no dropout.
    wrapped = GradSampleModule(Logits(model).train(), loss_reduction="sum")
    torch.nn.functional.cross_entropy(wrapped(inputs), targets, reduction="sum").backward()
    for key, p in AdapterState(model).parameters().items():
        assert p.grad_sample.shape == (3, *p.shape)
        torch.testing.assert_close(ours.entries[key] * tokens, p.grad_sample.square().sum(0), rtol=1e-9, atol=1e-12)
    wrapped.remove_hooks()
