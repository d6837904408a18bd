"""kronfluence: covariances, and eigenvalues measured in their eigenbasis (EKFAC) or in none (diagonal)."""

import copy

import pytest
import torch
from oracle_models import TARGETS, empirical, make_data, make_model
from torch.nn import functional as F

from kalman_peft import AdapterState
from kalman_peft.curvature.memory import STRUCTURES


pytest.importorskip("kronfluence", exc_type=ImportError)

from kronfluence.arguments import FactorArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
from kronfluence.module.utils import wrap_tracked_modules
from kronfluence.task import Task
from kronfluence.utils.state import State


class Sequences(Task):
    """The true labels' negative log-likelihood, summed, so that nothing is to be rescaled."""

    def __init__(self, names):
        self.names = names

    def get_influence_tracked_modules(self):
        return self.names

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(input_ids=batch["inputs"], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")

    def compute_measurement(self, batch, model):
        raise NotImplementedError


def module_name(key):
    return key.removesuffix(".weight") + ".default"


@pytest.fixture
def peer():
    """Model and our batch before kronfluence replaces the model's layers, and a function that runs it."""
    model = make_model()
    # More positions than any side is long: eigenbases are then unique up to signs.
    batch, inputs, targets = make_data(sequences=5, length=7)
    names = [n for n, _ in model.named_modules() if n.endswith((".lora_A.default", ".lora_B.default"))]

    def fit(strategy):
        task = Sequences(names)
        doubles = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
        arguments = FactorArguments(
            strategy, use_empirical_fisher=True, **{f"{name}_dtype": torch.float64 for name in doubles}
        )
        common = {"model": wrap_tracked_modules(model, task), "state": State(cpu=True), "disable_tqdm": True}
        data = {"task": task, "loader": [{"inputs": inputs, "targets": targets}], "factor_args": arguments}
        if strategy == "diagonal":
            return fit_lambda_matrices_with_loader(**common, **data)[1]
        _, covariances = fit_covariance_matrices_with_loader(**common, **data)
        sums = copy.deepcopy(covariances)  # the next step turns them into means in place
        eigen = perform_eigendecomposition(covariances, factor_args=arguments, **common)
        _, lambdas = fit_lambda_matrices_with_loader(**common, **data, eigen_factors=eigen)
        return sums | eigen | lambdas

    return model, batch, fit


def test_kronecker_factors_are_the_covariances(peer):
    model, batch, fit = peer
    ours, tokens = empirical(model, batch, "kronecker")
    theirs = fit("ekfac")
    assert len(theirs["activation_covariance"]) == 2 * 2 * len(TARGETS)
    for key, (left, right) in ours.blocks.items().items():
        name = module_name(key)
        count = theirs["num_activation_covariance_processed"][name]  # positions; all of them are observed tokens
        assert count == tokens == 30
        torch.testing.assert_close(right.to_dense() * count, theirs["activation_covariance"][name])
        torch.testing.assert_close(left.to_dense() * tokens, theirs["gradient_covariance"][name])


def test_diagonal_is_the_lambda_matrix_without_a_basis(peer):
    model, batch, fit = peer
    ours, tokens = empirical(model, batch, "diagonal")
    theirs = fit("diagonal")["lambda_matrix"]
    for key, f in ours.entries.items():
        torch.testing.assert_close(f * tokens, theirs[module_name(key)], rtol=1e-9, atol=1e-12)


def test_eigenvalue_correction(peer):
    model, batch, fit = peer
    parameters = {key: p.detach() for key, p in AdapterState(model).parameters().items()}
    diagonal, tokens = empirical(model, batch, "diagonal")
    ours = None
    if "ekfac" in STRUCTURES:
        ours, _ = empirical(model, batch, "ekfac")
    theirs = fit("ekfac")
    generator = torch.Generator().manual_seed(0)
    offset = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in parameters.items()}
    product = (
        ours.energy_and_gradient(offset, {k: torch.zeros_like(p) for k, p in parameters.items()})[1] if ours else {}
    )
    for key, f in diagonal.entries.items():
        name = module_name(key)
        corrected = theirs["lambda_matrix"][name] / tokens  # (o, i)
        # A rotation keeps the trace of the Fisher information of each factor.
        torch.testing.assert_close(corrected.sum(), f.sum())
        if ours:
            left, right = theirs["gradient_eigenvectors"][name], theirs["activation_eigenvectors"][name]
            expected = left @ ((left.mT @ offset[key] @ right) * corrected) @ right.mT
            torch.testing.assert_close(product[key], expected, rtol=1e-6, atol=1e-9)
