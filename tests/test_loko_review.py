"""What LoKO must not do silently: half a batch, a lost draw, damping taken for data, columns that never came."""

import pytest
import torch
from conftest import make_lora_bert
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from toys import F64, Linear

from kalman_peft import (
    CategoricalObservation,
    KalmanConfig,
    KalmanTrainer,
    LikelihoodObservation,
    create_loko_optimizer,
)
from kalman_peft.compiled import whole_batch_columns
from kalman_peft.loko.columns import batched_backward
from kalman_peft.loko.rows import linearise


PLAIN = CategoricalObservation(shift=False)


def many_classes(classes, **options):
    toy = Linear(outputs=classes, per_sequence=False, columns="sampled", **options)
    x = torch.randn(64, toy.inputs, generator=torch.Generator().manual_seed(0), dtype=F64)
    toy.observe(x, torch.arange(64) % classes)
    toy.optimizer.step()
    return float(toy.optimizer._memories[0].prior[0])


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_damping_is_no_part_of_the_prior_of_labels(classes):
    plain, damped = (sum(many_classes(classes, damping=d, seed=seed) for seed in range(20)) / 20 for d in (0.0, None))
    assert damped == pytest.approx(plain, rel=0.25)


def bert_step(model, optimizer, seed=0):
    ids = torch.randint(1, 17, (4, 6), generator=torch.Generator().manual_seed(seed))
    optimizer.observe(model(input_ids=ids).logits, torch.tensor([0, 1, 2, 1]))
    optimizer.step()


def test_columns_that_hooks_missed_are_an_error():
    model = make_lora_bert()
    optimizer = create_loko_optimizer(model)
    for module in model.modules():  # as torch.compile does
        module._forward_hooks.clear()
    with pytest.raises(ValueError, match=r"torch\.compile\) leave hooks out\. Set per_sequence=False"):
        bert_step(model, optimizer)


@pytest.mark.parametrize(
    "options",
    [{"mode": "paper"}, {"columns": "exact"}, {"columns": "empirical"}, {"per_sequence": True}, {"top_k": 2}],
)
def test_compiled_models_refuse_columns_of_sequences(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"loko_{name}=.*torch_compile"):
        whole_batch_columns(options, PLAIN)


def test_an_error_leaves_nothing_of_the_batch_behind():
    toy = Linear(outputs=600, columns="exact")
    x, labels = toy.batch(0)
    with pytest.raises(ValueError, match="takes 1797 backward passes"):
        toy.optimizer.observe(toy(x)[:, None].expand(-1, 3, -1), labels[:, None].expand(-1, 3))
    with pytest.raises(RuntimeError, match="without an observation"):
        toy.optimizer.step()


def test_too_many_roots_are_refused_before_they_are_made():
    options = {"damping": 0.0, "form": "logit", "outlier_threshold": None}
    rows = linearise(torch.zeros(1, 60_000), torch.zeros(1).long(), PLAIN, options=options)
    with pytest.raises(ValueError, match=r"takes 59999 backward passes .* more than 1024; use columns='sampled'"):
        next(rows.roots(None, 1024))  # 60,000^2 float32 would be 13 GiB


def test_traces_of_a_large_vocabulary_need_no_square_of_it():
    toy = Linear(outputs=60_000, inputs=1, columns="sampled", damping=0.1, memory="diagonal")
    toy.step(0)  # 60,000^2 float64 would be 27 GiB
    assert torch.isfinite(toy.theta).all()


def test_a_skipped_draw_is_taken_at_the_next_step():
    toy = Linear(curvature_every=4, first_draws=0, known=1.0)
    taken = []
    for step in range(10):
        x, labels = toy.batch(step)
        draws = toy.optimizer.draws_curvature
        toy.observe(x, torch.full_like(labels, -100) if step in (4, 5) else labels)
        toy.optimizer.step()
        taken.append(draws and step not in (4, 5))
    assert [k for k, was in enumerate(taken) if was] == [0, 6, 8]


def test_a_draw_stays_through_evaluation_and_leaves_the_weights_alone():
    toy = Linear(averaging=True).run(3)
    before = toy.theta
    with toy.optimizer.sample(torch.Generator().manual_seed(0)):
        drawn = toy.theta
        toy.optimizer.eval()
        assert torch.equal(toy.theta, drawn) and not torch.equal(drawn, before)
        toy.optimizer.train()
        with pytest.raises(RuntimeError, match=r"state_dict\(\) inside sample"):
            toy.optimizer.state_dict()
    toy.optimizer.train()
    assert torch.equal(toy.theta, before)


@pytest.mark.parametrize("top_k", [3, None])
def test_innovation_of_coarse_columns_is_near_one(top_k):
    ratios = []
    for seed in range(200):
        toy = Linear(outputs=20, columns="exact", top_k=top_k, known=1.0, memory="diagonal", max_decrease=1e-9)
        x, _ = toy.batch(seed)
        labels = torch.multinomial(toy(x).softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        toy.observe(x, labels)
        toy.optimizer.step()
        ratios.append(toy.optimizer.diagnostics["innovation"])
    assert sum(ratios) / 200 == pytest.approx(1.0, rel=0.15)


def test_diagnostics_are_plain_numbers():
    assert all(type(v) is float for v in Linear().run(1).optimizer.diagnostics.values())


@pytest.mark.parametrize(
    "observation,logits,labels",
    [(CategoricalObservation(shift=True), (4, 7), (4,)), (PLAIN, (7,), ())],
)
def test_logits_without_their_dimensions_are_refused(observation, logits, labels):
    with pytest.raises(ValueError, match="logits must have shape"):
        observation.targets(torch.zeros(logits), torch.zeros(labels).long())


def test_a_likelihood_that_mixes_rows_is_refused():
    observation = LikelihoodObservation(lambda z, y: ((z - y) ** 2).sum(-1) / 2)
    z, y = torch.zeros(5, 1, dtype=F64), torch.arange(5.0, dtype=F64)
    with pytest.raises(ValueError, match="mixes rows"):
        observation.loss(z, z, y)
    torch.testing.assert_close(observation.loss(z, z, y[:, None]), y**2 / 2)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), 1.5])
def test_learning_rates_that_are_no_share_are_refused(rate, tmp_path):
    with pytest.raises(ValueError, match=r"learning_rate=.* is not in \[0, 1\]"):
        KalmanConfig(str(tmp_path), optimizer="loko", learning_rate=rate)


ROWS = [{"input_ids": [3 + (k + j) % 13 for j in range(6)], "labels": k % 3} for k in range(12)]
QUIET = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
}


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_classifier_learns(tmp_path, caplog):
    model = make_lora_bert(dtype=torch.float32)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    args = KalmanConfig(str(tmp_path), optimizer="loko", torch_compile_backend="aot_eager", max_steps=3, **QUIET)
    run = KalmanTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS))
    run.train()
    assert "one column for a batch" in caplog.text
    assert run.optimizer.optimizer.param_groups[0]["settled"]
    after = [p for p in model.parameters() if p.requires_grad]
    assert sum(float((a - b).abs().sum()) for a, b in zip(after, before, strict=True)) > 0


def test_a_loss_of_ones_own_is_refused(tmp_path):
    class Weighted(KalmanTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    args = KalmanConfig(str(tmp_path), optimizer="loko", **QUIET)
    with pytest.raises(ValueError, match=r"Weighted\.compute_loss would not be called"):
        Weighted(model=make_lora_bert(), args=args, train_dataset=Dataset.from_list(ROWS))


def test_a_backward_pass_that_cannot_be_batched_names_the_way_out():
    w = torch.nn.Parameter(torch.ones(3, 2))
    x = torch.ones(4, 3)
    y = checkpoint(lambda z: torch.nn.functional.dropout(z @ w, 0.5), x, use_reentrant=False)
    with pytest.raises(ValueError, match=r"batched backward pass here.* Set per_sequence=False"):
        batched_backward(y, [w], torch.ones_like(y), retain_graph=False)
