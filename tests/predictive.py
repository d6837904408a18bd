"""Tiny models of each architecture with LoRA, and the linearised variance that a single pass is measured against."""

import torch
from conftest import make_batch, make_llama, randomise_b
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from kalman_peft import AdapterState, Belief
from kalman_peft.filtering.state import INFO
from kalman_peft.precision import DiagonalPrecision


F64 = torch.float64
ENCODER = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3,
}  # fmt: skip
TEXT = ENCODER | {"vocab_size": 17, "max_position_embeddings": 32, "pad_token_id": 0}
TARGETS = {
    "llama": (["q_proj", "v_proj", "down_proj"], "lm_head"),
    "gpt2": (["c_attn", "c_fc"], "lm_head"),
    "bert": (["query", "value", "output.dense"], "classifier"),
    "minilm": (["query", "value"], "pooler.dense"),
    "roberta": (["query", "value"], "classifier.out_proj"),
    "vit": (["q_proj", "v_proj", "fc1"], "classifier"),
}


def make_base(kind, attn):
    torch.manual_seed(0)
    if kind == "llama":
        return make_llama(attn=attn, num_attention_heads=4, num_key_value_heads=2)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel._from_config(config, attn_implementation=attn)
    if kind == "vit":
        config = ViTConfig(**ENCODER, image_size=8, patch_size=4)
        return ViTForImageClassification._from_config(config, attn_implementation=attn)
    if kind == "roberta":
        return RobertaForSequenceClassification._from_config(RobertaConfig(**TEXT), attn_implementation=attn)
    cls = BertModel if kind == "minilm" else BertForSequenceClassification
    return cls._from_config(BertConfig(**TEXT), attn_implementation=attn)


def make_model(kind, attn="sdpa", targets=None):
    base = make_base(kind, attn).to(F64)
    for p in base.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets or TARGETS[kind][0], fan_in_fan_out=kind == "gpt2")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    randomise_b(model)
    return model.eval()


def make_inputs(kind):
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(5))}
    batch = make_batch()
    if kind not in ("llama", "gpt2"):
        batch.pop("labels")
    return batch


def diagonal_belief(model, mean=1e-3, seed=2, zero=()):
    """A filter's state with variances between 0.5 and 1.5 times `mean`; nearly zero for keys that end as in `zero`."""
    generator = torch.Generator().manual_seed(seed)
    state = AdapterState(model, warn_excluded=False).snapshot(F64)
    entries = {}
    for key, value in state.items():
        entries[key] = 1 / (mean * (0.5 + torch.rand(value.shape, generator=generator, dtype=F64)))
        if key.endswith(tuple(zero)) and zero:
            entries[key] = torch.full_like(value, torch.inf)
    return Belief(state, DiagonalPrecision(entries), {INFO: {"kind": "prior", "num_labels": 0.0, "tasks": 0}})


def output_of(out):
    return out.logits if "logits" in out else out.pooler_output


def linearised_variance(model, inputs, variances):
    """diag(J V J^T) of all outputs, by one backward pass per output."""
    parameters = AdapterState(model, warn_excluded=False).parameters()
    for p in parameters.values():
        p.requires_grad_(True)
    output = output_of(model(**inputs))
    flat = output.reshape(-1)
    total = torch.zeros_like(flat)
    rows = torch.autograd.grad(flat, list(parameters.values()), torch.eye(len(flat), dtype=F64), is_grads_batched=True)
    for row, key in zip(rows, parameters, strict=True):
        total = total + (row.square() * variances[key]).flatten(1).sum(1)
    return total.view_as(output).detach()
