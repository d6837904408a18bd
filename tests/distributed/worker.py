"""What each of the two processes runs; also run in one process, for comparison. Usage: worker.py TASK OUT."""

import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import make_batch, make_lora_llama
from datasets import Dataset
from splits import CASES, batches, filtered, make, observe, pieces, state_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback, default_data_collator

from kalman_peft import (
    AdapterState,
    Belief,
    ContinualLearner,
    KalmanConfig,
    KalmanTrainer,
    create_loko_optimizer,
    sample_source,
)
from kalman_peft.curvature.memory import STRUCTURES
from kalman_peft.distributed import is_sharded, whole, world
from kalman_peft.laplace import add_penalty_gradient, proximal_step


CURVATURES = [(s, "adapter") for s in STRUCTURES] + [(s, "delta_w") for s in ("diagonal", "kronecker", "ekfac")]


def loader():
    """Five batches of unequal size and length: uneven shards for two processes."""
    return [make_batch(lengths=lengths, seed=s) for s, lengths in enumerate([(6, 4), (5,), (7, 3, 4), (4,), (6, 5)])]


def sharded(model):
    mesh = init_device_mesh("cpu", (world()[1],))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def curvature(out, shard=False):
    """Every structure, from two weighted sources; in process 1 the adapter starts elsewhere, unless it is sharded."""
    result = {}
    for structure, space in CURVATURES:
        model = make_lora_llama(attn="sdpa", target_modules=["q_proj", "v_proj", "down_proj"])
        if world()[0] == 1 and not shard:
            for p in AdapterState(model).parameters().values():
                p.data.add_(0.3)
        if shard and world()[1] > 1:
            sharded(model)
            assert all(is_sharded(p) for p in AdapterState(model).parameters().values())
        sources = {"long": loader(), "short": loader()[1:4]}
        belief = Belief.fit(
            model, sources, structure=structure, space=space, fisher="sampled", weights={"long": 2, "short": 1},
            num_samples=2, rank=3, dense_limit=4, progress_bar=False,
        )  # fmt: skip
        name = f"{structure}-{space}"
        state = AdapterState(model)
        result |= {f"{name}-{k}": v for k, v in state.snapshot().items()}
        moved = {k: v.double() + 0.1 for k, v in belief.mean.items()}
        energy, gradient = belief.energy_and_gradient(moved)
        result |= {f"{name}-g-{k}": v for k, v in gradient.items()}
        result[f"{name}-energy"] = energy
        counts = belief.info["curvature"]
        result[f"{name}-counts"] = torch.tensor([counts["num_tokens"], counts["num_sequences"]])
        for p in state.parameters().values():  # the penalty's gradient at another point
            p.data.mul_(1.5)
        add_penalty_gradient(belief, state, 3.0, 0.1)
        add_penalty_gradient(belief, state, 3.0)
        result |= {f"{name}-penalty-{k}": whole(p.grad).detach() for k, p in state.parameters().items()}
        if belief.precision.supports_proximal:
            proximal_step(belief, state, 0.3, 0.1)
            result |= {f"{name}-proximal-{k}": v for k, v in state.snapshot(torch.float64).items()}
    return result


def failure(out, shard=False):
    """One process meets a bad batch: both must raise, neither may hang."""
    data = loader()
    data[1]["labels"][0, 3] = 99  # the second process's
    try:
        model = make_lora_llama(attn="sdpa")
        Belief.fit(sharded(model) if shard else model, data, progress_bar=False)
    except (ValueError, RuntimeError) as error:
        return {"raised": torch.tensor(1.0), "message": torch.tensor([float(b) for b in str(error).encode()])}
    return {"raised": torch.tensor(0.0)}


def rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 17, (n, 7), generator=generator)
    labels = ids.clone()
    for i in range(n):
        labels[i, : int(torch.randint(1, 4, (1,), generator=generator))] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * 7] * n, "labels": labels.tolist()})


def train(out, optimizer, accumulation=1, source=None, **options):
    size = 8 // (world()[1] * accumulation)
    # In float64 no label's draw hangs on rounding.
    dtype = torch.float64 if optimizer == "loko" else torch.float32
    model = make_lora_llama(dtype, attn="sdpa", random_b=False)
    config = KalmanConfig(
        str(out / f"run{world()[1]}"), optimizer=optimizer, max_steps=4, per_device_train_batch_size=size,
        per_device_eval_batch_size=4, gradient_accumulation_steps=accumulation, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_steps=1, save_strategy="no", source_heldout=6, budget_steps=1,
        learning_rate=None if optimizer == "loko" else 1e-2, laplace_fisher="empirical",
        **{"laplace_strength": None if "forgetting_budget" in options else 20.0} | options,
    )  # fmt: skip
    run = KalmanTrainer(
        model=model, args=config, train_dataset=rows(40, 0), source_dataset=source or rows(14, 1),
        data_collator=default_data_collator,
    )  # fmt: skip
    assert run.accelerator.num_processes == world()[1]
    run.train()
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    result = AdapterState(run.model).snapshot()
    return result | {"losses": torch.tensor(losses), "strength": torch.tensor(run.laplace_strength)}


EVIDENCE = {
    "laplace_strength": "evidence", "laplace_space": "adapter", "laplace_structure": "diagonal",
    "laplace_warmup_steps": 2, "laplace_evidence_steps": 2,
}  # fmt: skip


def sources(out):
    """Two weighted sources of unequal size, a warm start on them, and refits."""
    return train(
        out, "adamw_torch", source={"a": rows(13, 1), "b": rows(9, 2)}, source_weights={"a": 1, "b": 3},
        laplace_warmup_steps=3, laplace_refit_steps=2,
    )  # fmt: skip


def continual(out):
    """Two tasks of a learner, each with its evaluation; its files are read by both processes."""
    config = KalmanConfig(
        str(out / f"learner{world()[1]}"), max_steps=4, per_device_train_batch_size=8 // world()[1],
        per_device_eval_batch_size=8 // world()[1], use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        save_strategy="steps", save_steps=3, learning_rate=1e-2, laplace_fisher="empirical",
    )  # fmt: skip
    learner = ContinualLearner(
        make_lora_llama(torch.float32, attn="sdpa", random_b=False), config, structure="diagonal", process_noise=1e-3,
        eval_datasets={"b": rows(8, 5)}, data_collator=default_data_collator,
    )  # fmt: skip
    for seed, name in enumerate(("a", "b")):
        learner.learn(name, rows(40, seed))
    smoothed = learner.smooth()["a"]
    result = {f"mean-{key}": value for key, value in smoothed.mean.items()}
    result |= {f"precision-{key}": value for key, value in smoothed.precision.tensors().items()}
    return result | {
        "scores": torch.tensor(learner.scores()[0][:, 1]),
        "labels": torch.tensor(learner.tasks[1]["num_labels"]),
    }


def continual_delayed(out):
    """A process that is late after every decision must not find what the first one has made meanwhile."""
    signal.alarm(120)  # where the processes wait for each other for ever
    for module in [m for n, m in sys.modules.items() if n.startswith("kalman_peft.continual.")]:
        for name in ("wait", "from_first"):
            if hasattr(module, name):
                setattr(module, name, late(getattr(module, name)))
    result = {}
    for _ in range(2):  # begun, and gone on with
        config = KalmanConfig(
            str(out / "delayed"), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            disable_tqdm=True, save_strategy="steps", save_steps=2, learning_rate=1e-2,
        )  # fmt: skip
        halt = [Halt()] if not result else []
        made = ContinualLearner(
            make_lora_llama(torch.float32, attn="sdpa", random_b=False), config, structure="diagonal",
            data_collator=default_data_collator, callbacks=halt,
        )  # fmt: skip
        try:
            made.learn("a", rows(40, 0))
        except KeyboardInterrupt:
            result["halted"] = torch.tensor(1)
    signal.alarm(0)
    return result | {key: value for key, value in made.records()[0].belief.mean.items()}


class Halt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def late(function):
    def call(*args):
        found = function(*args)
        time.sleep(0.2 * world()[0])
        return found

    return call


def continual_refused(out):
    """What the first process finds is raised on all."""
    folder = out / "refused"
    if world()[0] == 0:
        (folder / "initial").mkdir(parents=True)
    config = KalmanConfig(str(folder), use_cpu=True, report_to=[], disable_tqdm=True)
    try:
        ContinualLearner(make_lora_llama(torch.float32), config)
    except (ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}".encode()
    return {"message": torch.tensor(list(message))}


def written(out):
    drawn = sample_source(make_lora_llama(torch.float32), None, 7, 6, batch_size=2, progress_bar=False)
    return {"ids": torch.tensor([row["input_ids"] for row in drawn])}


def loko_draws(out):
    """With draws: every process must hold the same weights and the same filter."""
    model = make_lora_llama(torch.float32)
    optimizer = create_loko_optimizer(model)
    data = loader()
    for step in range(3):
        batch = data[(step + world()[0]) % len(data)]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        optimizer.observe(logits, batch["labels"])
        optimizer.step()
    result = AdapterState(model).snapshot()
    return result | {f"{i}-{k}": v for i, m in enumerate(optimizer._memories) for k, v in m.tensors.items()}


def loko_failures(out):
    """Process 1 meets bad labels: `step` raises on both, and leaves the filter as it was."""
    messages, result, unchanged = [], {}, True
    for task, options in (
        ("language", {"first_draws": 2, "curvature_every": 4}),
        ("classification", {"columns": "sampled"}),
        ("classification", {"mode": "paper"}),
    ):
        model = make(task)
        optimizer = create_loko_optimizer(model, **options)
        good, bad = batches(task)
        good, bad = (list(pieces(batch, 2, *world()[::-1])) for batch in (good, bad))
        for where in (0, 1) if task == "classification" else (0, 1, 0):
            for part in good:
                observe(optimizer, model, part)
            optimizer.step()
            before = state_of(optimizer)
            for j, part in enumerate(bad):
                wrong = torch.full_like(part["labels"], 99) if (world()[0], j) == (1, where) else part["labels"]
                observe(optimizer, model, part | {"labels": wrong})
            messages.append(caught(optimizer.step))
            unchanged &= all(torch.equal(value, before[key]) for key, value in state_of(optimizer).items())
        for part in good:
            observe(optimizer, model, part)
        optimizer.step()
        result |= {f"{task}-{len(messages)}-{key}": value for key, value in state_of(optimizer).items()}
    encoded = torch.tensor(list("\n".join(messages).encode()))
    return result | {"messages": encoded, "unchanged": torch.tensor(float(unchanged))}


def trainer_failure(out):
    """One bad row, which is one process's, in a KalmanTrainer with LoKO."""
    data = [dict(row) for row in rows(8, 0)]
    data[3]["labels"] = [-100, -100, -100, 99, 5, 6, 7]
    config = KalmanConfig(
        str(out / "failing"), optimizer="loko", max_steps=2, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    run = KalmanTrainer(
        model=make_lora_llama(attn="sdpa"), args=config, train_dataset=Dataset.from_list(data),
        data_collator=default_data_collator,
    )  # fmt: skip
    return {"messages": torch.tensor(list(caught(run.train).encode()))}


def caught(function):
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def filters(out, accumulation=1):
    """All memories and kinds of columns, with draws; shares of unequal size."""
    rank, size = world()
    return {
        f"{case}-{key}": value
        for case in CASES
        for key, value in filtered(case, accumulation, size, rank).items()
    }  # fmt: skip


def skipped(out):
    """A batch whose last sequence is broken, between two good ones."""
    rank, size = world()
    model = make("language")
    optimizer = create_loko_optimizer(model)
    first, second = batches("language")
    for batch, factor in ((first, 1.0), (second, float("nan")), (second, 1.0)):
        for part in pieces(batch, 1, size, rank):
            observe(optimizer, model, part, factor if rank == size - 1 else 1.0)
        optimizer.step()
    return state_of(optimizer) | {"steps": torch.tensor(optimizer.param_groups[0]["steps"])}


def main(task, out):
    if "RANK" in __import__("os").environ:
        dist.init_process_group("gloo")
    tasks = {
        "curvature": curvature,
        "sharded": lambda o: curvature(o, shard=True),
        "failure": failure,
        "failure_sharded": lambda o: failure(o, shard=True),
        "adamw": lambda o: train(o, "adamw_torch"),
        "adamw_accumulated": lambda o: train(o, "adamw_torch", 2),
        "ima": lambda o: train(o, "adamw_torch", ima_weight=0.3),
        "budget": lambda o: train(o, "adamw_torch", forgetting_budget=1e-3),
        "sources": sources,
        "evidence": lambda o: train(o, "adamw_torch", **EVIDENCE),
        "written": written,
        "continual": continual,
        "continual_delayed": continual_delayed,
        "continual_refused": continual_refused,
        "loko": lambda o: train(o, "loko"),
        "loko_accumulated": lambda o: train(o, "loko", 2),
        "loko_draws": loko_draws,
        "loko_failures": loko_failures,
        "trainer_failure": trainer_failure,
        "filters": filters,
        "filters_accumulated": lambda o: filters(o, 2),
        "skipped": skipped,
    }
    for name in task.split(","):
        result = tasks[name](out)
        result["world_size"] = torch.tensor(world()[1])
        torch.save(result, out / f"{name}-{world()[1]}-{world()[0]}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
