"""curvlinops: KFAC factors, the empirical Fisher and the Gauss-Newton matrix as linear operators."""

import pytest
import torch
from oracle_models import Logits, empirical, make_data, make_model, over_all_labels, peer_name
from torch import nn

from kalman_peft import AdapterState


# Forward-mode products: transformers takes softmax and norms in float32, and those roundings differ by direction.
FORWARD_MODE = {"rtol": 1e-5, "atol": 1e-8}

curvlinops = pytest.importorskip("curvlinops", exc_type=ImportError)


def operator(name, model, inputs, targets, last_only=False, **options):
    kind = getattr(curvlinops, name)
    parameters = list(AdapterState(model).parameters().values())
    # reduction="sum" leaves out every normalisation: each operator is then a sum over tokens.
    loss = nn.CrossEntropyLoss(reduction="sum")
    return kind(Logits(model, last_only), loss, parameters, [(inputs, targets)], check_deterministic=False, **options)


def split_diagonal(op, model):
    diagonal = torch.diagonal(op @ torch.eye(op.shape[1], dtype=torch.float64))
    return AdapterState(model).unflatten(diagonal)


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 3}}])
def test_kronecker_factors_are_those_of_kfac_expand(lora):
    model = make_model(**lora)
    batch, inputs, targets = make_data()
    ours, tokens = empirical(model, batch, "kronecker")
    kfac = operator("KFACLinearOperator", model, inputs, targets, fisher_type="empirical", kfac_approx="expand")
    kfac.compute_kronecker_factors()
    for key, (left, right) in ours.blocks.items().items():
        # Both average inputs over positions; gradients are summed there, averaged over tokens here.
        torch.testing.assert_close(right.to_dense(), kfac._input_covariances[peer_name(key)])
        torch.testing.assert_close(left.to_dense() * tokens, kfac._gradient_covariances[peer_name(key)])


def test_diagonal_empirical_is_that_of_the_empirical_fisher():
    # curvlinops takes each token as a datum of its own, ours each sequence: they agree with one label per sequence.
    model = make_model()
    batch, inputs, targets = make_data(sequences=4, last_only=True)
    ours, tokens = empirical(model, batch, "diagonal")
    for key, f in split_diagonal(operator("EFLinearOperator", model, inputs, targets, True), model).items():
        torch.testing.assert_close(ours.entries[key] * tokens, f, **FORWARD_MODE)


def test_diagonal_over_all_labels_is_that_of_the_gauss_newton_matrix():
    model = make_model()
    batch, inputs, targets = make_data(sequences=2, last_only=True)
    theirs = split_diagonal(operator("GGNLinearOperator", model, inputs, targets, True), model)

    def single(row, label):
        one = {k: v[row : row + 1].clone() for k, v in batch.items()}
        one["labels"][0, -1] = label
        return empirical(model, one, "diagonal")[0].entries

    ours = over_all_labels(Logits(model, last_only=True)(inputs).softmax(-1), single)
    for key, f in theirs.items():
        torch.testing.assert_close(ours[key], f, **FORWARD_MODE)
