"""A tiny Trainer and its data, shared by the tests that train."""

import torch
from conftest import make_lora_llama
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from kalman_peft import AdapterState, KalmanConfig, KalmanTrainer


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({f"t{i}": i for i in range(17)}, unk_token="t0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="t0", eos_token="t2", bos_token="t1")


def rows(n=12, seed=0, prompt=2):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        ids = torch.randint(
            3, 17, (int(torch.randint(4, 9, (1,), generator=generator)),), generator=generator
        ).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt + ids[prompt:]})
    return found


def dataset(n=12, seed=0, prompt=2):
    return Dataset.from_list(rows(n, seed, prompt))


def trainer(tmp_path, tokenizer, model=None, source=None, belief=None, train=None, eval_dataset=None, **kwargs):
    options = {
        "max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "save_steps": 2, "disable_tqdm": True, "source_heldout": 4,
        "learning_rate": None if kwargs.get("optimizer") == "loko" else 1e-2,
    }  # fmt: skip
    config = KalmanConfig(str(tmp_path), **(options | kwargs))
    return KalmanTrainer(
        model=model or make_lora_llama(torch.float32, attn="sdpa", random_b=False),
        args=config,
        train_dataset=train or dataset(),
        eval_dataset=eval_dataset,
        source_dataset=source,
        belief=belief,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )


def weights(trainer):
    return AdapterState(trainer.model, warn_excluded=False).flatten().clone()
