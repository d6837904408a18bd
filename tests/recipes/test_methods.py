"""Methods of fine-tuning by name: each trains, and is what it says it is."""

import copy
import gc
import time

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM

from kalman_peft import AdapterState, KalmanConfig, sample_source
from recipe_tools.evaluate import kl_from_base, text_loss
from recipe_tools.meters import PeakMemory
from recipe_tools.methods import KINDS, Job, canonical, inits, ours, penalties, plain, points, train
from recipe_tools.methods.masked_kl import MaskedKLTrainer, masked_kl
from recipe_tools.methods.replay import with_source
from recipe_tools.methods.training import Run, row_bytes


STEPS = 6
MODULES = ["q_proj", "v_proj", "down_proj"]


def make_base(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for p in model.parameters():  # tokens should differ visibly in likelihood
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype)


def rows(first, last, n, seed):
    """Random sequences over the tokens first..last-1, of which the first two carry no label."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        length = int(torch.randint(5, 10, (1,), generator=generator))
        ids = torch.randint(first, last, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100] * 2 + ids[2:]})
    return Dataset.from_list(found)


class Recorder(DataCollatorForSeq2Seq):
    """A collator that remembers the rows it saw."""

    def __call__(self, features, return_tensors=None):
        self.seen.extend(tuple(f["input_ids"]) for f in features)
        return super().__call__(features, return_tensors)


TARGET, SOURCE, VALIDATION = rows(3, 12, 24, 1), rows(12, 24, 30, 2), rows(3, 12, 8, 3)


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Every run collects garbage: what was imported long before need not be looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def make_job(tmp_path_factory, tokenizer):
    def make(steps=STEPS, dtype=torch.float32, fixed=None, **overrides):
        def config(**changes):
            given = {
                "learning_rate": 2e-2, "max_steps": steps, "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4, "seed": 5, "report_to": [], "disable_tqdm": True, "use_cpu": True,
            }  # fmt: skip
            return KalmanConfig(**(given | changes | (fixed or {})))

        collator = Recorder(tokenizer, label_pad_token_id=-100)
        collator.seen = []
        given = {
            "base": lambda: make_base(dtype),
            "lora": LoraConfig(r=2, lora_alpha=4, target_modules=MODULES, task_type="CAUSAL_LM"),
            "config": config,
            "target": TARGET,
            "source": SOURCE,
            "self_source": written,
            "validation": VALIDATION,
            "trainer_options": {"data_collator": collator, "processing_class": tokenizer},
            "folder": tmp_path_factory.mktemp("scratch"),
            "seed": 5,
            "steps": steps,
        }
        return Job(**(given | overrides))

    return make


def written(n):
    """Rows that the base model writes."""
    return Dataset.from_list(sample_source(make_base(), None, n, 8, progress_bar=False))


@torch.no_grad()
def logits(model, data=SOURCE, count=6):
    model.eval()
    return torch.cat([model(input_ids=torch.tensor([data[i]["input_ids"]])).logits[0].float() for i in range(count)])


def one(method, job):
    ((name, trained),) = train(method, job)
    assert name == canonical(method)
    return trained


def weights(trained):
    return AdapterState(trained.model, warn_excluded=False).flatten().clone()


def distance(trained, data=SOURCE):
    """How far the outputs are from the base model's."""
    return float((logits(trained.model, data) - logits(make_base(), data)).square().mean())


def target_rows(job):
    """Rows of the target in the order of their reading."""
    known = {tuple(row["input_ids"]) for row in TARGET}
    return [ids for ids in job.trainer_options["data_collator"].seen if ids in known]


@pytest.fixture(scope="module")
def plain_run(make_job):
    job = make_job()
    return one("lora", job), target_rows(job)


# Every kind, and the options that take another path.
METHODS = {
    "lora:lr=1e-3": {}, "lora:schedule=constant": {}, "lora:schedule=inverse": {}, "lora_plus": {}, "lora_fa": {},
    "l2:strength=1": {}, "ewc:strength=1,samples=8": {}, "ewc_dw:strength=1,samples=8": {}, "kl:strength=3": {},
    "ima:weight=0.1": {}, "ima:weight=0.1,factors=b": {},
    "init:weights=pissa": {}, "init:weights=pissa_niter_2": {}, "init:weights=olora": {}, "init:weights=mica": {},
    "init:weights=orthogonal": {}, "init:weights=gaussian": {}, "init:weights=eva,samples=12": {},
    "osf": {}, "osf:keep=rank": {},
    "laplace:samples=8": {}, "laplace:structure=diagonal,samples=8": {}, "laplace:structure=ekfac,samples=8": {},
    "laplace:structure=low_rank,space=adapter,rank=4,samples=8": {},
    "laplace:structure=block_tridiagonal,space=adapter,samples=8": {},
    "laplace:structure=diagonal,space=adapter,fisher=empirical,samples=8,strength=1": {},
    "laplace:fisher=rademacher,samples=8": {}, "laplace:form=proximal,samples=8": {},
    "laplace:refit=2,samples=8": {}, "laplace:warmup=1,samples=8": {}, "laplace:budget=0.01,samples=8": {},
    "laplace:source=self,samples=8": {},
    "laplace:strength=evidence,space=adapter,structure=diagonal,samples=8": {},
    "loko": {}, "loko:memory=diagonal,max_decrease=0.2": {}, "loko:prior=10,samples=8": {},
    "loko:prior=10,mode=prior,space=adapter,samples=8": {},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_trains_in_the_same_order_and_differs_from_plain_lora(method, make_job, plain_run):
    job = make_job()
    trained, (plainly, order) = one(method, job), plain_run
    assert torch.isfinite(logits(trained.model)).all()
    assert text_loss(trained.model, TARGET)["loss"] < text_loss(make_base(), TARGET)["loss"]
    assert not torch.equal(logits(trained.model), logits(plainly.model))
    assert trained.seconds > 0 and trained.setup_seconds > 0 and trained.peak_bytes >= 0
    assert trained.figures["train/loss"] > 0
    if "evidence" not in method:  # which reads the target between steps, too
        found, before = target_rows(job), "eva" in method or "mode=prior" in method
        assert found[-len(order) :] == order and len(order) == 4 * STEPS and (len(found) > len(order)) == before
    believes = method.startswith(("laplace", "ewc", "loko:prior"))
    # As a prior that counts once, at the start, a belief has no strength later.
    held = (believes or method.startswith("l2")) and "mode=prior" not in method
    assert held == ("laplace/strength" in trained.figures)
    assert (trained.extra_bytes > 0) == (
        believes or method.startswith(("l2", "osf")) or any(name in method for name in inits.SUBTRACTED)
    )
    assert ("kalman/trust" in trained.figures) == method.startswith("loko")
    assert ("ima/contrast" in trained.figures) == method.startswith("ima")
    assert ("rank/effective" in trained.figures) != method.startswith("osf")


def test_all_kinds_are_tested():
    here = {method.partition(":")[0] for method in METHODS}
    assert KINDS.keys() - here == {"wise", "replay", "joint"}  # below


ZERO = [
    "l2:strength=0", "ewc:strength=0,samples=8", "ewc_dw:strength=0,samples=8", "kl:strength=0", "lora:stop=1",
    "laplace:strength=0,samples=8", "laplace:strength=0,structure=diagonal,space=adapter,form=proximal,samples=8",
    "laplace:strength=0,source=self,samples=8", "laplace:strength=0,source=proxy,samples=8,refit=2",
    "wise:alpha=1",
]  # fmt: skip


@pytest.mark.parametrize("method", ZERO)
def test_without_strength_is_plain_lora(method, make_job, plain_run):
    assert torch.equal(weights(one(method, make_job())), weights(plain_run[0]))


STRONG = [
    "l2:strength=1e6", "ewc:strength=1e6,samples=30", "ewc_dw:strength=1e6,samples=30",
    "laplace:strength=1e6,samples=30", "laplace:strength=1e6,form=proximal,samples=30", "loko:prior=1e6,samples=30",
]  # fmt: skip


@pytest.mark.parametrize("method", STRONG)
def test_with_much_strength_keeps_the_base_model(method, make_job):
    without = "loko" if method.startswith("loko") else "lora"
    held, free = one(method, make_job(steps=12)), one(without, make_job(steps=12))
    assert distance(held) < 0.1 * distance(free)


# -- early stopping, schedules, interpolation -----------------------------------------------------------------------


def test_stops_along_one_training(make_job, plain_run):
    path = train("lora:schedule=constant,stop=0.5/1", make_job())
    assert [name for name, _ in path] == ["lora:schedule=constant,stop=0.5", "lora:schedule=constant"]
    half, whole = (trained for _, trained in path)
    shorter = one("lora:schedule=constant", make_job(steps=STEPS // 2))
    assert torch.equal(weights(half), weights(shorter)) and 0 < half.seconds < whole.seconds
    assert torch.equal(weights(whole), weights(one("lora:schedule=constant", make_job())))
    assert torch.equal(weights(one("lora:schedule=constant,stop=0.5", make_job())), weights(shorter))
    assert half.figures["stop/step"] == 3
    # The schedule is that of the whole run.
    assert not torch.equal(weights(one("lora:stop=0.5", make_job())), weights(one("lora", make_job(steps=STEPS // 2))))
    assert half.model is not whole.model
    assert half.model.base_model.model.lm_head.weight is whole.model.base_model.model.lm_head.weight


@pytest.mark.parametrize("best", [0, 4, 6])
def test_best_stop_is_the_least_validation_loss(best, make_job, monkeypatch):
    calls = []

    def loss(model, data, **options):
        assert data is VALIDATION
        calls.append(len(calls))
        return {"loss": 1 + abs(calls[-1] - best)}

    with monkeypatch.context() as patched:
        patched.setattr(plain, "text_loss", loss)
        found = one("lora:schedule=constant,stop=best", make_job())
    assert len(calls) == STEPS + 1 and found.figures["stop/step"] == best
    if best:
        assert torch.equal(weights(found), weights(one("lora:schedule=constant", make_job(steps=best))))
    else:
        assert distance(found) == 0


def test_best_stop_with_real_losses(make_job):
    # At this rate other texts become worse and worse.
    kept, last = (one(f"lora:lr=0.3{stop}", make_job(validation=SOURCE)) for stop in (",stop=best", ""))
    base = text_loss(make_base(), SOURCE)["loss"]
    assert kept.figures["stop/validation_loss"] <= base < text_loss(last.model, SOURCE)["loss"]
    assert kept.figures["stop/validation_loss"] == pytest.approx(text_loss(kept.model, SOURCE)["loss"])
    learnt = one("lora:stop=best", make_job())
    assert learnt.figures["stop/step"] > 0
    assert learnt.figures["stop/validation_loss"] == pytest.approx(text_loss(learnt.model, VALIDATION)["loss"])
    assert learnt.figures["stop/validation_loss"] < text_loss(make_base(), VALIDATION)["loss"]


def test_inverse_time_schedule(make_job):
    job = make_job(steps=20, fixed={"warmup_steps": 2})
    _, trainer = Run(job).fit(Run(job).adapt(), trainer=plain.InverseTimeTrainer)
    trainer.lr_scheduler = None
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler, rates = trainer.create_scheduler(20, optimizer), []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0.15] + [0.3 / (1 + t / 2) for t in range(6)])


def test_wise_scales_the_update(make_job, plain_run):
    path = dict(train("wise:alpha=0/0.25/1", make_job()))
    assert list(path) == ["wise:alpha=0", "wise:alpha=0.25", "wise:alpha=1"] == points("wise:alpha=0/0.25/1")
    none, quarter, whole = path.values()
    assert distance(none) == 0 and torch.equal(weights(whole), weights(plain_run[0]))
    for part, full in zip(AdapterState(quarter.model), AdapterState(plain_run[0].model), strict=True):
        torch.testing.assert_close(part.scaling * part.b @ part.a, 0.25 * full.scaling * full.b @ full.a)
    assert 0 < distance(quarter) < distance(whole)


def test_optimizers_of_peft(make_job, plain_run):
    start = AdapterState(Run(make_job()).adapt()).snapshot()
    alike = one("lora_plus:ratio=1", make_job())
    torch.testing.assert_close(weights(alike), weights(plain_run[0]), atol=1e-6, rtol=1e-5)
    b_of = {name: AdapterState(one(name, make_job()).model).snapshot() for name in ("lora_plus:ratio=4", "lora_fa")}
    for key, value in b_of["lora_fa"].items():
        assert torch.equal(value, start[key]) == key.endswith("lora_A.weight")
    slow, fast = (
        torch.cat([v.flatten() for k, v in snapshot.items() if "lora_B" in k]).norm()
        for snapshot in (AdapterState(alike.model).snapshot(), b_of["lora_plus:ratio=4"])
    )
    assert fast > 2 * slow


# -- penalties and divergence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["adapter", "delta_w"])
def test_ewc_has_the_squared_scores_of_sequences(space, make_job, monkeypatch):
    found = []
    monkeypatch.setattr(penalties, "belief_bytes", lambda trainer: found.append(trainer.belief) or 1)
    one("ewc:samples=7" if space == "adapter" else "ewc_dw:samples=7", make_job())
    (belief,) = found
    model = Run(make_job()).adapt().eval()
    name, tokens, reference = "base_model.model.model.layers.1.mlp.down_proj", 0, 0.0
    layer = model.get_submodule(name)
    weight = layer.lora_B["default"].weight if space == "adapter" else layer.base_layer.weight.requires_grad_(True)
    for row in SOURCE.select(range(7)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        loss = model(input_ids=ids, labels=labels).loss * count
        reference, tokens = reference + torch.autograd.grad(loss, weight)[0] ** 2, tokens + count
    given = belief.precision.tensors()
    chosen = [t for key, t in given.items() if name in key and t.shape == weight.shape]
    assert len(chosen) == 1
    torch.testing.assert_close(chosen[0], reference / tokens, rtol=1e-4, atol=1e-9)


def masked_reference(base, tuned, labels):
    total = 0.0
    for p, q, y in zip(base.double().softmax(-1), tuned.double().softmax(-1), labels.tolist(), strict=True):
        others = [v for v in range(len(p)) if v != y]
        p, q = p[others] / (1 - p[y]), q[others] / (1 - q[y])
        total = total + (p * (p.log() - q.log())).sum()
    return total


def test_masked_kl_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    base, tuned = (3 * torch.randn(9, 13, generator=generator) for _ in range(2))
    labels = torch.randint(0, 13, (9,), generator=generator)
    tuned.requires_grad_(True)
    found, reference = masked_kl(base, tuned, labels), masked_reference(base, tuned, labels)
    assert float(found) == pytest.approx(float(reference), rel=1e-5)
    (gradient,), (expected,) = torch.autograd.grad(found, tuned), torch.autograd.grad(reference, tuned)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not gradient.gather(1, labels[:, None]).any() and gradient.abs().max() > 0.1
    raised = base.scatter_add(1, labels[:, None], torch.full((9, 1), 50.0))
    assert abs(float(masked_kl(base, raised, labels))) < 1e-4
    assert abs(float(masked_kl(raised, base, labels))) < 1e-4


@pytest.mark.parametrize("count", [None, 40])
def test_masked_kl_in_the_trainer(count, make_job):
    job = make_job()
    run = Run(job)
    model = run.adapt()
    for pair in AdapterState(model):
        torch.nn.init.normal_(pair.b, std=0.3)
    trainer = MaskedKLTrainer(model, run.arguments(), train_dataset=TARGET, strength=2.5, **job.trainer_options)
    batch = job.trainer_options["data_collator"]([TARGET[i] for i in range(3)])
    model.train()
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    assert model.training and all(p.requires_grad for p in AdapterState(model).parameters().values())
    scored = batch["labels"][:, 1:] != -100
    tuned, labels = (
        model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1][scored],
        batch["labels"][:, 1:][scored],
    )
    base = make_base()(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1][scored]
    total = torch.nn.functional.cross_entropy(tuned.double(), labels, reduction="sum")
    total = total + 2.5 * masked_reference(base, tuned, labels)
    assert float(loss) == pytest.approx(float(total) / (count or len(labels)), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in AdapterState(model).parameters().values())


def test_masked_kl_holds_the_target_texts(make_job, plain_run):
    held = one("kl:strength=10", make_job())

    def divergence(trained):
        base, tuned = make_base(), trained.model.eval()
        with torch.no_grad():
            return sum(
                float(masked_kl(base(i).logits[0, :-1], tuned(i).logits[0, :-1], i[0, 1:]))
                for i in (torch.tensor([row["input_ids"]]) for row in TARGET)
            )

    assert divergence(held) < 0.5 * divergence(plain_run[0])
    assert held.figures["kl/last"] > 0 and held.extra_bytes == 0


# -- replay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 6), (0.9, 22)])
def test_replay_replaces_a_share(share, count, make_job):
    job = make_job()
    mixed, stored, figures = with_source(Run(job), share)
    known = {tuple(row["input_ids"]): row for row in SOURCE}
    replayed = [tuple(ids) for ids in mixed["input_ids"] if tuple(ids) in known]
    assert len(mixed) == len(TARGET) and len(replayed) == len(set(replayed)) == count
    assert mixed["input_ids"][: len(TARGET) - count] == TARGET["input_ids"][: len(TARGET) - count]
    assert figures == {"replay/rows": count, "replay/distinct": count}
    assert (
        stored == sum(8 * len(ids) for ids in replayed) == row_bytes(Dataset.from_list([known[i] for i in replayed]))
    )


def test_replay_of_few_rows_repeats_them(make_job):
    mixed, stored, figures = with_source(Run(make_job(source=SOURCE.select(range(4)))), 0.5)
    few = [tuple(ids) for ids in SOURCE["input_ids"][:4]]
    found = [tuple(ids) for ids in mixed["input_ids"]]
    assert [found.count(ids) for ids in few] == [3, 3, 3, 3]
    assert figures == {"replay/rows": 12, "replay/distinct": 4} and stored == 8 * sum(map(len, few))


@pytest.mark.parametrize("method", ["replay:share=0.25", "joint", "laplace:replay=0.25,samples=8", "loko:replay=0.25"])
def test_replay_trains_on_the_rest_in_the_same_order(method, make_job, plain_run):
    job = make_job()
    trained, kept = one(method, job), 12 if method == "joint" else 18
    first = {tuple(ids) for ids in TARGET["input_ids"][:kept]}
    assert target_rows(job) == [ids for ids in plain_run[1] if ids in first]
    assert trained.figures["replay/rows"] == 24 - kept and trained.extra_bytes > 0
    alone = plain_run[0] if "loko" not in method else one("loko", make_job())
    assert text_loss(trained.model, SOURCE)["loss"] < text_loss(alone.model, SOURCE)["loss"]


# -- other starts, and subspaces ------------------------------------------------------------------------------------


def check_start(weights_option, make_job, dtype, tolerance):
    still = one(f"init:weights={weights_option},lr=1e-30", make_job(dtype=dtype))
    torch.testing.assert_close(logits(still.model), logits(make_base(dtype)), **tolerance)
    subtracted = weights_option.startswith(inits.SUBTRACTED)
    with still.model.disable_adapter():
        assert torch.equal(logits(still.model), logits(make_base(dtype))) != subtracted
    if subtracted:
        assert still.extra_bytes == 4 * AdapterState(still.model).num_parameters
    return still


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora", "eva", "mica", "orthogonal", "gaussian"])
def test_starts_at_the_base_model(start, make_job):
    still = check_start(start, make_job, torch.float32, {"rtol": 1e-4, "atol": 1e-4})
    pair = AdapterState(still.model, warn_excluded=False).pairs[0]
    weight = make_base().model.layers[0].self_attn.q_proj.weight
    u, s, vh = torch.linalg.svd(weight)
    update = (pair.scaling * pair.b @ pair.a).detach()
    if start == "pissa_niter_8":
        assert 0.95 * s[:2].norm() < update.norm() < 1.05 * s[:2].norm()
    elif start == "pissa":
        torch.testing.assert_close(update, u[:, :2] * s[:2] @ vh[:2], rtol=1e-3, atol=1e-3)
    elif start == "olora":
        q, r = torch.linalg.qr(weight)
        torch.testing.assert_close(update, pair.scaling * q[:, :2] @ r[:2], rtol=1e-4, atol=1e-4)
    else:
        assert update.abs().max() < 1e-6
    if start == "eva":  # orthonormal directions of the activations
        torch.testing.assert_close(pair.a @ pair.a.mT, torch.eye(2), rtol=1e-4, atol=1e-4)
    if start == "mica":
        assert torch.allclose(pair.b.mT @ u[:, :-2], torch.zeros(2, 14), atol=1e-5) and not pair.b.requires_grad


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_near_the_base_model_in_bf16(start, make_job):
    check_start(start, make_job, torch.bfloat16, {"rtol": 0.05, "atol": 0.15})


def test_corda_takes_what_its_texts_need_least_or_most(make_job):
    pytest.importorskip("attr")
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    job = make_job(lora=lora)
    still = {mode: one(f"init:weights=corda,mode={mode},samples=20,lr=1e-30", job) for mode in ("kpm", "ipm")}
    for trained in still.values():
        torch.testing.assert_close(logits(trained.model), logits(make_base()), rtol=1e-3, atol=1e-3)
        assert trained.extra_bytes == 4 * AdapterState(trained.model).num_parameters
    # Without its part the base model hardly changes on the source (kpm), or changes much on the target (ipm).
    harm = {}
    for mode, trained in still.items():
        data = SOURCE if mode == "kpm" else TARGET
        with trained.model.disable_adapter():
            harm[mode] = float((logits(trained.model, data) - logits(make_base(), data)).square().mean())
    assert harm["kpm"] < 0.1 * harm["ipm"]
    assert (
        text_loss(one("init:weights=corda,samples=20", job).model, TARGET)["loss"]
        < text_loss(make_base(), TARGET)["loss"]
    )


def test_corda_without_its_package(make_job, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft.tuners.lora.corda", None)
    with pytest.raises(ModuleNotFoundError, match="pip install attrs"):
        train("init:weights=corda,samples=8", make_job())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_osf_keeps_the_largest_directions(dtype, make_job):
    # Steps along the gradient itself stay in the subspace; Adam's leave it.
    sgd = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1.0}
    trained = one("osf:keep=0.5", make_job(dtype=dtype, fixed=sgd))
    assert distance(trained, TARGET) > 0 and trained.figures["osf/leak"] < (1e-3 if dtype == torch.float32 else 0.05)
    layer = trained.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.osf_svd_params["default"]["U_low"].dtype == torch.float32
    before = make_base(dtype).model.layers[0].self_attn.q_proj.weight
    u = torch.linalg.svd(before.float())[0][:, :8]
    change = layer.get_delta_weight("default").float().detach()
    assert change.norm() > 1e-3
    assert (u.mT @ change @ torch.linalg.svd(before.float())[2][:8].mT).norm() < 0.02 * change.norm()
    with trained.model.disable_adapter():
        assert torch.equal(logits(trained.model), logits(make_base(dtype)))
    assert one("osf", make_job()).figures["osf/leak"] > 0.01


def test_osf_of_the_rank_of_lora(make_job):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = one("osf:keep=rank,lr=1e-30", make_job(lora=lora))
    torch.testing.assert_close(logits(trained.model), logits(make_base()), rtol=1e-5, atol=1e-5)
    sizes = [p.shape for n, p in make_base().named_parameters() if "proj" in n]
    assert trained.figures["osf/parameters"] == sum(2 * (a + b + 1) for a, b in sizes)
    assert trained.extra_bytes == 4 * 2 * len(sizes)
    with pytest.raises(ValueError, match="rank_pattern"):
        train("osf", make_job(lora=LoraConfig(r=2, target_modules=MODULES, rank_pattern={"q_proj": 3})))


# -- ours -----------------------------------------------------------------------------------------------------------


def test_sources_of_a_belief_differ(make_job):
    asked = []

    def write(n):
        asked.append(n)
        return written(n)

    found = [
        weights(one(f"laplace:source={kind},samples=8", make_job(self_source=write)))
        for kind in ("true", "self", "proxy")
    ]
    assert asked == [8] and not any(torch.equal(a, b) for a, b in zip(found, [*found[1:], found[0]], strict=True))
    # The held-out rows of a budget come on top.
    one("laplace:source=self,samples=8,budget=0.1", make_job(self_source=write))
    assert asked == [8, 8 + ours.HELDOUT]


def test_budget_moves_the_strength(make_job):
    fixed = {"budget_steps": 1}
    tight, loose = (
        one(f"laplace:source=self,samples=8,budget={b}", make_job(fixed=fixed)).figures for b in ("1e-4", "10")
    )
    assert tight["laplace/strength"] > 1 > loose["laplace/strength"] and "source/rise" in tight
    assert "source/rise" not in one("laplace:samples=8", make_job()).figures


def test_refit_takes_the_curvature_again(make_job):
    once, again = (one(f"laplace:samples=8{more}", make_job()) for more in ("", ",refit=2"))
    assert not torch.equal(weights(once), weights(again))
    with pytest.raises(ValueError, match="refit=6 is never due in 6 steps"):
        train("laplace:samples=8,refit=6", make_job())


def test_bytes_of_a_belief(make_job):
    trained = one("laplace:structure=diagonal,space=adapter,samples=8", make_job())
    assert trained.extra_bytes == 8 * AdapterState(trained.model).num_parameters
    assert one("l2", make_job()).extra_bytes == 4 * AdapterState(trained.model).num_parameters


def test_too_few_rows(make_job):
    with pytest.raises(
        ValueError, match="samples=64 with 0 rows held out needs 64 rows of the true source; it has 30"
    ):
        train("laplace", make_job())
    with pytest.raises(ValueError, match="samples=20 with 16 rows held out needs 36"):
        train("laplace:samples=20,budget=1", make_job())


def test_the_prior_of_loko_holds(make_job):
    free, held = (one(f"loko:prior={s},samples=30", make_job()) if s else one("loko", make_job()) for s in (0, 1000))
    assert distance(held) < distance(free)
    assert kl_from_base(held.model, SOURCE)["kl"] < kl_from_base(free.model, SOURCE)["kl"]


def test_set_up_is_not_training(make_job):
    def write(n):
        time.sleep(0.3)
        return written(n)

    began = time.perf_counter()
    trained = one("laplace:source=self,samples=8", make_job(self_source=write))
    assert trained.setup_seconds > 0.3 and trained.seconds + trained.setup_seconds < time.perf_counter() - began


def test_peak_of_memory():
    peak = PeakMemory(torch.device("cpu"))
    block = torch.ones(2**24)  # 64 MiB
    del block
    found, kind = peak.read()
    assert kind != "resident set" or 60 * 2**20 < found < 200 * 2**20


def test_the_job_is_left_as_it_was(make_job):
    job = make_job()
    before = copy.deepcopy(job.lora)
    one("init:weights=eva,samples=12", job)
    assert job.lora == before and job.target is TARGET
