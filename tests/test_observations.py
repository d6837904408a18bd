"""Observations against torch's own losses and their derivatives, alignment of labels, and refusals."""

import pytest
import torch
from conftest import make_lora_bert, make_lora_llama
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from kalman_peft import CategoricalObservation, GaussianObservation
from kalman_peft.observations import infer_observation, negative_log_likelihood
from kalman_peft.sampling import random_signs


CAUSAL, PLAIN = CategoricalObservation(shift=True), CategoricalObservation(shift=False)
SEQ2SEQ = CategoricalObservation(shift=False, seq2seq=True)


def make_rows(observation, n=5, v=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, v, generator=generator, dtype=dtype).mul(2)
    if isinstance(observation, GaussianObservation):
        return outputs, torch.randn(n, v, generator=generator, dtype=dtype)
    return outputs, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("observation", [CAUSAL, PLAIN, SEQ2SEQ, GaussianObservation(0.3)])
def test_residual_and_root_are_the_derivatives_of_the_loss(observation):
    outputs, targets = make_rows(observation)
    outputs.requires_grad_(True)
    loss = observation.loss(outputs, observation.expect(outputs), targets)
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    expected = observation.expect(outputs.detach())
    rows = torch.tensor([0, 2, 3, 4, 6])
    out = torch.zeros(8, 7, dtype=torch.float64)
    observation.residual(expected, targets, out, rows)
    torch.testing.assert_close(out[rows], gradient)
    assert out[[1, 5, 7]].abs().max() == 0
    for n in range(5):
        one, target = outputs[n : n + 1].detach(), targets[n : n + 1]
        hessian = torch.autograd.functional.hessian(
            lambda z, y=target: observation.loss(z, observation.expect(z), y).sum(), one
        ).reshape(7, 7)
        columns = torch.stack([observation.root(expected[n : n + 1], e[None])[0] for e in torch.eye(7).double()])
        torch.testing.assert_close(columns.T @ columns, hessian)


def test_categorical_loss_is_the_cross_entropy_also_where_probabilities_underflow():
    logits = torch.tensor([[300.0, 0.0, -5.0], [0.0, 1.0, 2.0], [-400.0, 0.0, 1.0]])
    labels = torch.tensor([1, -100, 0])
    total, count = negative_log_likelihood(logits, labels, PLAIN)
    torch.testing.assert_close(total, F.cross_entropy(logits, labels, reduction="sum"))
    assert count == 2
    half = logits.bfloat16()
    torch.testing.assert_close(
        negative_log_likelihood(half, labels, PLAIN)[0], F.cross_entropy(half.float(), labels, reduction="sum")
    )


def test_residual_keeps_its_precision_in_bfloat16():
    # p = 0.999 rounds to 1 in bfloat16, where p - 1 would vanish.
    logits = torch.tensor([[7.0, 0.0, -20.0]], dtype=torch.bfloat16)
    out = torch.zeros_like(logits)
    PLAIN.residual(PLAIN.expect(logits), torch.tensor([0]), out, torch.tensor([0]))
    exact = logits.double().softmax(-1)[0, 0] - 1
    assert abs(out[0, 0].item() / exact.item() - 1) < 0.01


@pytest.mark.parametrize("variance", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_gaussian_likelihood(variance, shape):
    outputs, labels = torch.randn(4, shape[-1] if len(shape) == 2 else 1).double(), torch.randn(shape)
    total, count = negative_log_likelihood(outputs, labels, GaussianObservation(variance))
    y = labels.reshape(outputs.shape).double()
    normal = torch.distributions.Normal(outputs, variance**0.5)
    constant = normal.log_prob(outputs).sum()
    torch.testing.assert_close(total, constant - normal.log_prob(y).sum())
    assert count == 4
    # The mean squared error that transformers trains on has this likelihood's gradient for variance = C / 2.
    mse = F.mse_loss(outputs, y) * 4
    matched = negative_log_likelihood(outputs, labels, GaussianObservation(outputs.shape[1] / 2))[0]
    torch.testing.assert_close(matched, mse)


def test_targets_do_not_cross_a_boundary_between_packed_sequences():
    labels = torch.tensor([[3, 4, 5, 6, 7, 1]])
    segments = torch.tensor([[0, 0, 0, 1, 2, 2]])
    logits = torch.zeros(1, 6, 9)
    assert CAUSAL.targets(logits, labels).tolist() == [4, 5, 6, 7, 1, -100]
    assert CAUSAL.targets(logits, labels, segments).tolist() == [4, 5, -100, -100, 1, -100]
    assert negative_log_likelihood(logits, labels, CAUSAL, segments)[1] == 3


def test_positions_reach_the_last_label_of_each_sequence():
    labels = torch.tensor([[-100, 3, 4, -100, -100], [-100, -100, -100, -100, -100], [2, -100, -100, 3, 5]])
    assert CAUSAL.positions(labels, None).int().tolist() == [[1, 1, 0, 0, 0], [0] * 5, [1, 1, 1, 1, 0]]
    assert SEQ2SEQ.positions(labels, None).int().tolist() == [[1, 1, 1, 0, 0], [0] * 5, [1, 1, 1, 1, 1]]
    assert PLAIN.positions(labels, None).tolist() == [True, False, True]
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])
    assert PLAIN.positions(labels, mask).int().tolist() == [[1, 1, 1, 1, 0], [0] * 5, [0, 1, 1, 1, 1]]
    assert CAUSAL.positions(labels, mask).int().tolist() == [[1, 1, 0, 0, 0], [0] * 5, [0, 1, 1, 1, 0]]
    segments = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, 2], [3, 3, 4, 4, 4]])
    assert CAUSAL.positions(labels, None, segments).int().tolist() == [[1, 1, 0, 0, 0], [0] * 5, [0, 0, 1, 1, 0]]
    assert GaussianObservation().positions(torch.zeros(3, 1), mask).equal(mask.bool())
    assert GaussianObservation().positions(torch.zeros(3, 1), None) is None


def small_bert(cls, **overrides):
    return cls(
        BertConfig(
            vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, **overrides
        )
    )


def small_t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=17, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def small_bart():
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=17, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
            decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "make,expected",
    [
        (make_lora_llama, CAUSAL),
        (make_lora_bert, PLAIN),
        (small_t5, SEQ2SEQ),
        (small_bart, SEQ2SEQ),
        (lambda: small_bert(BertForTokenClassification), PLAIN),
        (lambda: small_bert(BertForSequenceClassification, num_labels=3), PLAIN),
        (lambda: small_bert(BertForSequenceClassification, num_labels=1), GaussianObservation(1.0)),
        (lambda: small_bert(BertForSequenceClassification, num_labels=3, problem_type="regression"), GaussianObservation(1.0)),
    ],
)  # fmt: skip
def test_observation_is_inferred_from_the_model(make, expected):
    assert infer_observation(make()) == expected


def test_signs_are_independent_and_balanced():
    signs = random_signs((20_000, 13), torch.zeros(()).double(), torch.Generator().manual_seed(0))
    assert signs.dtype == torch.float64 and signs.abs().eq(1).all()
    second_moment = signs.T @ signs / len(signs)
    assert (second_moment - torch.eye(13)).abs().max() < 4.5 / 20_000**0.5
    assert signs.mean(0).abs().max() < 4.5 / 20_000**0.5


def test_raises_when_the_classification_has_several_labels():
    with pytest.raises(ValueError, match=r"multi_label_classification.*single-label classification"):
        infer_observation(small_bert(BertForSequenceClassification, problem_type="multi_label_classification"))


def test_raises_when_the_task_is_unknown():
    with pytest.raises(ValueError, match="Cannot tell what BertForMaskedLM observes"):
        infer_observation(small_bert(BertForMaskedLM))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_raises_when_a_regression_label_is_not_finite(bad):
    with pytest.raises(ValueError, match="NaN or Inf"):
        GaussianObservation().targets(torch.zeros(2, 1), torch.tensor([0.0, bad]))


@pytest.mark.parametrize("logits,labels", [((3, 2), (3,)), ((3, 2), (3, 1)), ((3, 1), (2,)), ((3, 4, 2), (3, 4, 2))])
def test_raises_when_regression_labels_do_not_fit(logits, labels):
    with pytest.raises(ValueError, match="do not fit outputs"):
        GaussianObservation().targets(torch.zeros(logits), torch.zeros(labels))


@pytest.mark.parametrize("variance", [0.0, -1.0, float("inf"), float("nan")])
def test_raises_when_the_variance_is_not_positive(variance):
    with pytest.raises(ValueError, match="variance must be positive"):
        GaussianObservation(variance)


def test_raises_when_shift_and_seq2seq_are_both_set():
    with pytest.raises(ValueError, match="exclude each other"):
        CategoricalObservation(shift=True, seq2seq=True)


def test_raises_when_class_labels_are_real_numbers():
    with pytest.raises(ValueError, match="problem_type='regression'"):
        PLAIN.targets(torch.zeros(2, 3), torch.zeros(2))


def test_raises_when_segments_do_not_fit():
    with pytest.raises(ValueError, match="segments of shape"):
        CAUSAL.targets(torch.zeros(1, 4, 3), torch.zeros(1, 4).long(), torch.zeros(1, 5).long())
    with pytest.raises(ValueError, match="not supported for regression"):
        GaussianObservation().targets(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 1).long())
