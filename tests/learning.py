"""A tiny ContinualLearner and its tasks, shared by the tests of learning task after task."""

import torch
from conftest import make_lora_llama
from datasets import Dataset
from training import dataset, make_tokenizer
from transformers import DataCollatorForSeq2Seq

from kalman_peft import ContinualLearner, KalmanConfig


NAMES = ("a", "b", "c")
TASKS = {name: dataset(12, seed) for seed, name in enumerate(NAMES)}
EVALS = {name: dataset(8, 50 + seed) for seed, name in enumerate(NAMES)}
TOKENIZER = make_tokenizer()
CONFIG = {
    "max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "use_cpu": True, "report_to": [],
    "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
}  # fmt: skip


def model(**options):
    return make_lora_llama(torch.float32, attn="sdpa", **({"random_b": False} | options))


def config(folder, **options):
    if options.get("optimizer") == "loko":
        options.setdefault("learning_rate", None)
    return KalmanConfig(str(folder), **(CONFIG | options))


def learner(folder, made=None, configured=None, **options):
    options = {
        "structure": None if (configured or {}).get("optimizer") == "loko" else "diagonal", "process_noise": 1e-3,
        "processing_class": TOKENIZER, "data_collator": DataCollatorForSeq2Seq(TOKENIZER, label_pad_token_id=-100),
    } | options  # fmt: skip
    return ContinualLearner(made or model(), config(folder, **(configured or {})), **options)


def ramps(n, step, seed):
    """Sequences that go up by `step`, so that each token follows from the last two."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 14, (n,), generator=generator).tolist()
    rows = [[3 + (start + step * i) % 14 for i in range(8)] for start in starts]
    return [{"input_ids": ids, "attention_mask": [1] * 8, "labels": ids} for ids in rows]


def stream(*parts):
    return Dataset.from_list([row for part in parts for row in part])


def contents(folder):
    """All bytes that a learner leaves, by file."""
    kept = [folder / "continual.json", *(p for part in ("initial", "tasks") for p in (folder / part).rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if path.is_file()}
