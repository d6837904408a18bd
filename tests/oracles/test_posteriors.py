"""posteriors: its Laplace approximations by torch.func, per sequence."""

import warnings

import pytest
import torch
from oracle_models import empirical, make_data, make_model

from kalman_peft import AdapterState


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    posteriors = pytest.importorskip("posteriors", exc_type=ImportError)


def test_diagonal_is_that_of_the_diagonal_fisher_laplace():
    model = make_model()
    batch, inputs, targets = make_data()
    ours, tokens = empirical(model, batch, "diagonal")
    names = {id(p): name for name, p in model.named_parameters()}

    def log_likelihood(parameters, data):  # one value per sequence: the unit of both
        ids, labels = data
        logits = torch.func.functional_call(model, parameters, kwargs={"input_ids": ids, "use_cache": False}).logits
        return logits.log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2)), torch.tensor([])

    state = AdapterState(model).parameters()
    transform = posteriors.laplace.diag_fisher.build(log_likelihood, per_sample=True)
    fitted = transform.init({names[id(p)]: p.detach() for p in state.values()})
    fitted, _ = transform.update(fitted, (inputs, targets))  # a sum over sequences
    for key, p in state.items():
        torch.testing.assert_close(ours.entries[key] * tokens, fitted.prec_diag[names[id(p)]], rtol=1e-9, atol=1e-12)
