"""BackPACK knows sequences of plain layers, so that the adapter stands alone there: B A x, over a base weight of zero."""

import copy

import pytest
import torch
from oracle_models import empirical, over_all_labels
from peft import LoraConfig, get_peft_model
from torch import nn

from kalman_peft import AdapterState, CategoricalObservation


backpack = pytest.importorskip("backpack", exc_type=ImportError)
extensions = pytest.importorskip("backpack.extensions", exc_type=ImportError)

OPTIONS = {"observation": CategoricalObservation(shift=False), "forward_fn": lambda model, batch: model(batch["x"])}


@pytest.fixture
def setting():
    """(PEFT model, the same as a sequence of two layers, batch)."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    nn.init.zeros_(base[0].weight)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]), autocast_adapter_dtype=False)
    (pair,) = AdapterState(model)
    nn.init.normal_(pair.b)
    batch = {"x": torch.randn(6, 4, dtype=torch.float64), "labels": torch.tensor([0, 2, 1, 1, 0, 2])}
    return model, nn.Sequential(copy.deepcopy(pair.linear_a), copy.deepcopy(pair.linear_b)), batch


def run(network, batch, *wanted):
    """One backward pass of the summed loss under BackPACK."""
    network, loss = backpack.extend(network), backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack.backpack(*wanted):
        loss(network(batch["x"]), batch["labels"]).backward()
    return network[0].weight, network[1].weight


def test_diagonal_empirical_is_the_sum_of_squared_gradients(setting):
    model, network, batch = setting
    ours, tokens = empirical(model, batch, "diagonal", **OPTIONS)
    a, b = run(network, batch, extensions.SumGradSquared(), extensions.BatchGrad())
    for f, p in zip(ours.entries.values(), (a, b), strict=True):
        torch.testing.assert_close(f * tokens, p.sum_grad_squared)
        torch.testing.assert_close(f * tokens, p.grad_batch.square().sum(0))


def test_over_all_labels_it_is_the_gauss_newton_matrix_and_its_kronecker_factors(setting):
    model, network, batch = setting
    a, b = run(network, batch, extensions.DiagGGNExact(), extensions.KFLR())
    probabilities = network(batch["x"]).softmax(-1)

    def single(structure):
        def ours(row, label):
            one = {"x": batch["x"][row : row + 1], "labels": torch.tensor([label])}
            precision, _ = empirical(model, one, structure, **OPTIONS)
            if structure == "diagonal":
                return precision.entries
            return {key: left.to_dense() for key, (left, _) in precision.blocks.items().items()}

        return over_all_labels(probabilities, ours)

    for f, p in zip(single("diagonal").values(), (a, b), strict=True):
        torch.testing.assert_close(f, p.diag_ggn_exact)
    inputs = [r.to_dense() for _, r in empirical(model, batch, "kronecker", **OPTIONS)[0].blocks.items().values()]
    for left, right, p in zip(single("kronecker").values(), inputs, (a, b), strict=True):
        torch.testing.assert_close(left, p.kflr[0])  # summed over the data
        torch.testing.assert_close(right, p.kflr[1])  # averaged over them
