"""What each of the two processes runs; also run in one process, for comparison. Usage: worker.py TASK OUT."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import make_batch, make_lora_llama
from datasets import Dataset
from transformers import default_data_collator

from kalman_peft import AdapterState, Belief, KalmanConfig, KalmanTrainer, create_loko_optimizer
from kalman_peft.distributed import world


def loader():
    """Five batches of unequal size and length: uneven shards for two processes."""
    return [make_batch(lengths=lengths, seed=s) for s, lengths in enumerate([(6, 4), (5,), (7, 3, 4), (4,), (6, 5)])]


def curvature(out):
    result = {}
    for structure, space in (("diagonal", "adapter"), ("kronecker", "delta_w"), ("kronecker", "adapter")):
        model = make_lora_llama()
        if world()[0] == 1:  # an adapter that this process initialised by itself
            for p in AdapterState(model).parameters().values():
                p.data.add_(0.3)
        belief = Belief.fit(model, loader(), structure=structure, space=space, fisher="sampled", progress_bar=False)
        result |= {f"{structure}-{space}-{k}": v for k, v in AdapterState(model).snapshot().items()}
        state = {k: v.double() + 0.1 for k, v in belief.mean.items()}
        energy, gradient = belief.energy_and_gradient(state)
        result |= {f"{structure}-{space}-g-{k}": v for k, v in gradient.items()}
        result[f"{structure}-{space}-energy"] = energy
        counts = belief.info["curvature"]
        result[f"{structure}-{space}-counts"] = torch.tensor([counts["num_tokens"], counts["num_sequences"]])
    return result


def failure(out):
    """One process meets a bad batch: both must raise, neither may hang."""
    data = loader()
    data[1]["labels"][0, 3] = 99  # the second process's
    try:
        Belief.fit(make_lora_llama(), data, progress_bar=False)
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


def train(out, optimizer, accumulation=1, budget=None):
    size = 8 // (world()[1] * accumulation)
    model = make_lora_llama(torch.float32, attn="sdpa", random_b=False)
    config = KalmanConfig(
        str(out / f"run{world()[1]}"), optimizer=optimizer, max_steps=4, per_device_train_batch_size=size,
        per_device_eval_batch_size=4, gradient_accumulation_steps=accumulation, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_steps=1, save_strategy="no", source_heldout=6, forgetting_budget=budget,
        budget_steps=1, learning_rate=None if optimizer == "loko" else 1e-2, laplace_fisher="empirical",
        laplace_strength=20.0 if budget is None else None,
    )  # fmt: skip
    run = KalmanTrainer(
        model=model, args=config, train_dataset=rows(40, 0), source_dataset=rows(14, 1),
        data_collator=default_data_collator,
    )  # fmt: skip
    assert run.accelerator.num_processes == world()[1]
    if optimizer == "loko":  # label draws differ between splits; without them the steps must agree
        kalman = run.create_optimizer()
        for stack in kalman._stacks:
            stack.set_prior(stack.memory, torch.full((stack.shape[0],), 200.0))
        kalman.param_groups[0].update(steps=1, curvature_every=1000, first_draws=0, tokens=1.0, settled=True)
    run.train()
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    result = AdapterState(run.model).snapshot()
    return result | {"losses": torch.tensor(losses), "strength": torch.tensor(run.laplace_strength)}


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
    return result | {f"{i}-{k}": v for i, s in enumerate(optimizer._stacks) for k, v in s.memory.items()}


def main(task, out):
    if "RANK" in __import__("os").environ:
        dist.init_process_group("gloo")
    tasks = {
        "curvature": curvature,
        "failure": failure,
        "adamw": lambda o: train(o, "adamw_torch"),
        "adamw_accumulated": lambda o: train(o, "adamw_torch", 2),
        "budget": lambda o: train(o, "adamw_torch", budget=1e-3),
        "loko": lambda o: train(o, "loko"),
        "loko_accumulated": lambda o: train(o, "loko", 2),
        "loko_draws": loko_draws,
    }
    for name in task.split(","):
        result = tasks[name](out)
        result["world_size"] = torch.tensor(world()[1])
        torch.save(result, out / f"{name}-{world()[1]}-{world()[0]}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
