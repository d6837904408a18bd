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
from kalman_peft.predictive.covariances import FactorCovariance


F64 = torch.float64
TARGETS = {
    "llama": (["q_proj", "v_proj", "down_proj"], "lm_head"),
    "gpt2": (["c_attn", "c_fc"], "lm_head"),
    "bert": (["query", "value", "output.dense"], "classifier"),
    "minilm": (["query", "value"], "pooler.dense"),
    "roberta": (["query", "value"], "classifier.out_proj"),
    "vit": (["q_proj", "v_proj", "fc1"], "classifier"),
}


# The modules that take what attention gives.
AFTER_ATTENTION = ("o_proj", "attn.c_proj", "attention.output.dense")


def make_base(kind, attn, width=8, depth=2, heads=2):
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": width, "intermediate_size": width * 3 // 2, "num_hidden_layers": depth}
        return make_llama(attn=attn, num_attention_heads=2 * heads, num_key_value_heads=heads, **sizes)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=17, n_embd=width, n_layer=depth, n_head=heads, n_positions=128, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel._from_config(config, attn_implementation=attn)
    sizes = {
        "hidden_size": width, "intermediate_size": width * 3 // 2, "num_hidden_layers": depth,
        "num_attention_heads": heads, "num_labels": 3,
    }  # fmt: skip
    text = sizes | {"vocab_size": 17, "max_position_embeddings": 128, "pad_token_id": 0}
    if kind == "vit":
        config = ViTConfig(**sizes, image_size=8, patch_size=4)
        return ViTForImageClassification._from_config(config, attn_implementation=attn)
    if kind == "roberta":
        return RobertaForSequenceClassification._from_config(RobertaConfig(**text), attn_implementation=attn)
    cls = BertModel if kind == "minilm" else BertForSequenceClassification
    return cls._from_config(BertConfig(**text), attn_implementation=attn)


def make_model(kind, attn="sdpa", targets=None, **sizes):
    base = make_base(kind, attn, **sizes).to(F64)
    std = 0.4 * (8 / sizes.get("width", 8)) ** 0.5
    for p in base.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=std)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets or TARGETS[kind][0], fan_in_fan_out=kind == "gpt2")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    randomise_b(model)
    return model.eval()


def make_inputs(kind, length=None):
    generator = torch.Generator().manual_seed(5)
    if kind == "vit":
        size = 8 if length is None else 4 * round((length - 1) ** 0.5)
        options = {} if length is None else {"interpolate_pos_encoding": True}
        return {"pixel_values": torch.randn(3, 3, size, size, dtype=F64, generator=generator)} | options
    if length is not None:
        return {"input_ids": torch.randint(3, 17, (2, length), generator=generator)}
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


def independent(*variances):
    """Covariances of factors whose weights are independent."""
    return tuple(FactorCovariance(v) for v in variances)


def output_of(out):
    return out.logits if "logits" in out else out.pooler_output


def linearised_variance(model, inputs, variances, part=lambda output: output):
    """diag(J V J^T) of all outputs, or of a part of them, by one backward pass per output."""
    for p in AdapterState(model, warn_excluded=False).parameters().values():
        p.requires_grad_(True)
    return linearised_of(part(output_of(model(**inputs))), model, variances)


def linearised_of(output, model, variances):
    """diag(J V J^T) of a tensor that the model has computed."""
    parameters = AdapterState(model, warn_excluded=False).parameters()
    flat = output.reshape(-1)
    total = torch.zeros_like(flat)
    rows = torch.autograd.grad(flat, list(parameters.values()), torch.eye(len(flat), dtype=F64), is_grads_batched=True)
    for row, key in zip(rows, parameters, strict=True):
        total = total + (row.square() * variances[key]).flatten(1).sum(1)
    return total.view_as(output).detach()
