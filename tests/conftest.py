"""Tiny models on which dense references are affordable."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM


torch.set_num_threads(1)


def make_llama(dtype=torch.float64, attn="eager", **overrides):
    torch.manual_seed(0)
    options = {
        "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    config = LlamaConfig(**(options | overrides))
    model = LlamaForCausalLM._from_config(config, attn_implementation=attn)
    # Larger weights than the default initialisation: the curvature should differ visibly between directions.
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model.to(dtype)


def make_lora_llama(dtype=torch.float64, attn="eager", random_b=True, model_overrides=None, **lora):
    model = make_llama(dtype, attn, **(model_overrides or {}))
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(model, LoraConfig(**(options | lora)), autocast_adapter_dtype=False)
    if random_b:
        randomise_b(peft_model)
    return peft_model


def randomise_b(model, std=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(std * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def make_lora_bert(dtype=torch.float64, num_labels=3, **lora):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, num_labels=num_labels, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification._from_config(config, attn_implementation="eager").to(dtype)
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return get_peft_model(model, LoraConfig(**(options | lora)), autocast_adapter_dtype=False)


def make_batch(lengths=(6, 4, 5), prompt=2, vocab=17, seed=3, side="right"):
    """Padded causal batch; the first `prompt` labels of each sequence are masked."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, n in enumerate(lengths):
        tokens = torch.randint(3, vocab, (n,), generator=generator)
        span = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, span], mask[row, span] = tokens, 1
        labels[row, span] = tokens
        labels[row, span.start : span.start + prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def batch():
    return make_batch()
