"""Columns of single sequences: by taps, by batched backward passes, and by each sequence alone."""

import pytest
import torch
from conftest import make_batch, make_lora_bert, make_lora_llama
from torch import nn

from kalman_peft import AdapterState, CategoricalObservation, GaussianObservation, LoKO, create_loko_optimizer
from kalman_peft.loko.columns import ColumnTaps
from kalman_peft.loko.planning import plan_step
from kalman_peft.loko.rows import linearise


F64 = torch.float64


def classification(**kwargs):
    model = make_lora_bert(kwargs.pop("dtype", F64), **kwargs).eval()
    data = make_batch(lengths=(5, 3, 4, 6), prompt=0)
    data["labels"] = torch.tensor([2, 0, 1, 2])
    return model, data


def language(**kwargs):
    return make_lora_llama(kwargs.pop("dtype", F64), **kwargs), make_batch()


def train_norms(model):
    for name, p in model.named_parameters():
        if "norm" in name.lower():
            p.requires_grad_(True)


def logits_of(model, data):
    return model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits


def columns_by(optimizer, model, data):
    """What was harvested for one batch: per parameter name (sequences, *shape)."""
    optimizer.observe(logits_of(model, data), data["labels"])
    (found,) = optimizer._harvest._columns
    result = {}
    for view, c in zip(optimizer._views, found, strict=True):
        result |= dict(zip(view.names, view.slices(c), strict=True))
    return result


def columns_alone(optimizer, model, data):
    """One forward and one backward pass per sequence, with the joined batch's cotangents."""
    group = optimizer.param_groups[0]
    logits = logits_of(model, data)
    rows = linearise(logits, data["labels"], optimizer.observation, options=group)
    plan = plan_step(optimizer.param_groups[0], optimizer.observation, logits)
    empirical = plan.kind == "empirical"
    cotangent = rows.score() if empirical else rows.draw(plan.kind, rows.random(0, plan.seed * 1009))
    params = {name: p for view in optimizer._views for name, p in zip(view.names, view.params, strict=True)}
    found = []
    for i in range(len(logits)):
        alone = logits_of(model, {key: value[i : i + 1] for key, value in data.items()})
        grads = torch.autograd.grad(alone, list(params.values()), cotangent[i : i + 1], allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), grads, strict=True)])
    return {name: torch.stack(each) for name, each in zip(params, zip(*found, strict=True), strict=True)}


def check(model, data, tapped=True, tolerance=1e-10, **options):
    optimizer = create_loko_optimizer(model, per_sequence=True, **options)
    assert (optimizer._harvest.taps.uncovered == 0) == tapped
    found = columns_by(optimizer, model, data)
    optimizer._harvest.clear()
    expected = columns_alone(optimizer, model, data)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        error = float((found[name].double() - value.double()).abs().max())
        assert error <= tolerance * max(scale, 1e-3), (name, error, scale)
    assert any(float(v.abs().max()) > 1e-3 for v in expected.values())


@pytest.mark.parametrize("columns", ["sampled", "rademacher", "empirical"])
def test_tapped_columns_of_a_classifier_are_those_of_each_sequence(columns):
    model, data = classification()
    check(model, data, columns=columns)


@pytest.mark.parametrize("columns", ["sampled", "rademacher", "empirical"])
def test_tapped_columns_of_a_language_model_are_those_of_each_sequence(columns):
    model, data = language()
    check(model, data, columns=columns)


@pytest.mark.parametrize("make", [classification, language])
def test_batched_backward_gives_the_same_columns(make):
    model, data = make()
    optimizer = create_loko_optimizer(model, per_sequence=True, columns="sampled")
    tapped = columns_by(optimizer, model, data)
    optimizer._harvest.clear()
    optimizer._harvest.taps = None
    batched = columns_by(optimizer, model, data)
    for name, value in tapped.items():
        torch.testing.assert_close(batched[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("make,kwargs", [(classification, {}), (language, {"attn": "sdpa"})])
def test_columns_under_gradient_checkpointing(make, kwargs, norms):
    model, data = make(**kwargs)
    if norms:
        train_norms(model)
    plain = create_loko_optimizer(model, per_sequence=True, columns="sampled")
    model.eval()
    expected = columns_by(plain, model, data)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = columns_by(create_loko_optimizer(model, per_sequence=True, columns="sampled"), model, data)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [classification, language])
def test_columns_in_bf16_are_kept_in_float32(make):
    model, data = make(dtype=torch.bfloat16)
    optimizer = create_loko_optimizer(model, per_sequence=True, columns="sampled")
    found = columns_by(optimizer, model, data)
    assert all(value.dtype == torch.float32 for value in found.values())
    optimizer._harvest.clear()
    expected = columns_alone(optimizer, model, data)
    for name, value in expected.items():
        error = (found[name] - value.float()).norm() / value.float().norm().clamp_min(1e-3)
        assert error < 0.05, (name, error)


def test_trained_norms_fall_back_to_batched_passes(caplog):
    model, data = classification()
    train_norms(model)
    check(model, data, tapped=False, columns="sampled")
    assert "belong to no linear layer" in caplog.text


def test_empirical_columns_sum_to_the_score():
    model, data = language()
    optimizer = create_loko_optimizer(model, columns="empirical")
    optimizer.observe(logits_of(model, data), data["labels"])
    (columns,) = optimizer._harvest._columns
    for c, score in zip(columns, optimizer._harvest._score, strict=True):
        torch.testing.assert_close(-c.sum(0), score)


def test_sequences_without_labels_have_no_column():
    model, data = language()
    data["labels"][1] = -100
    for columns in ("sampled", "empirical"):
        optimizer = create_loko_optimizer(model, per_sequence=True, columns=columns)
        found = columns_by(optimizer, model, data)
        assert all(len(c) == 2 for c in found.values())


class Twice(nn.Module):
    """A linear layer used twice, a layer that sees other rows than sequences, and one tied to an embedding."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 3, bias=False).double()
        self.tied = nn.Embedding(3, 4).double() if kind == "tied" else None
        if self.tied is not None:
            self.tied.weight = self.head.weight

    def forward(self, x):
        if self.kind == "folded":
            return self.head(torch.tanh(self.first(x.flatten(0, 1))).view(x.shape).sum(1))
        if self.tied is not None:
            x = x + self.tied((x[..., 0] > 0).long())
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.first(x)).sum(1))


def twice(kind, taps=True, **options):
    model = Twice(kind)
    named = list(model.named_parameters())
    found = ColumnTaps(model, [p for _, p in named]) if taps else None
    optimizer = LoKO(named, CategoricalObservation(shift=False), taps=found, **options)
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    return model, optimizer, x, torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize("kind", ["twice", "tied"])
def test_columns_of_shared_weights(kind):
    results = []
    for taps in (True, False):
        model, optimizer, x, labels = twice(kind, taps, columns="empirical")
        optimizer.observe(model(x), labels)
        results.append(optimizer._harvest._columns[0])
    loss = [torch.nn.functional.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]) for i in range(5)]
    for view, tapped, batched in zip(optimizer._views, *results, strict=True):
        torch.testing.assert_close(tapped, batched)
        alone = [torch.autograd.grad(value, view.params, retain_graph=True) for value in loss]
        for i in range(5):
            for part, g in zip(view.slices(tapped[i]), alone[i], strict=True):
                torch.testing.assert_close(part, g)


def test_raises_when_a_layer_sees_other_rows_than_sequences():
    model, optimizer, x, labels = twice("folded", columns="empirical")
    with pytest.raises(ValueError, match=r"first sees 10 rows for a batch of 5 sequences.*per_sequence=False"):
        optimizer.observe(model(x), labels)
    model, optimizer, x, labels = twice("folded", columns="sampled", per_sequence=False)
    before = model.head.weight.detach().clone()
    optimizer.observe(model(x), labels)
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


def test_one_column_for_the_batch_is_the_sum_of_its_sequences():
    sums = []
    for per_sequence in (True, False):
        model, data = classification()
        optimizer = create_loko_optimizer(model, columns="rademacher", per_sequence=per_sequence)
        optimizer.observe(logits_of(model, data), data["labels"])
        harvest = optimizer._harvest
        sums.append([c.sum(0) for c in harvest._columns[0]] if per_sequence else harvest._draws[0])
    for a, b in zip(*sums, strict=True):
        torch.testing.assert_close(a, b)


def test_regression_columns_do_not_depend_on_the_labels():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    w = nn.Parameter(torch.zeros(2, 3, dtype=F64))
    optimizer = LoKO([("w", w)], GaussianObservation(0.5), columns="exact")
    optimizer.observe(x @ w.T, torch.ones(4, 2, dtype=F64))
    columns = torch.cat([part[0] for part in optimizer._harvest._columns])[:, 0].flatten(1)
    expected = torch.kron(torch.eye(2, dtype=F64), x.T @ x / 0.5)
    torch.testing.assert_close(columns.T @ columns, expected)
    assert len(AdapterState(language()[0])) == 6
