"""Source data for users who have none: sequences that the base model writes itself.

What the model says by itself is drawn from the distribution that must not be forgotten; its Fisher at the drawn labels
is that of the model, with nothing assumed about its training data.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .adapters import unwrap
from .distributed import all_sum_, any_process, world
from .observations import IGNORE_INDEX


Row = dict[str, list[int]]


def sample_source(
    model: nn.Module,
    tokenizer: Any = None,
    num_sequences: int = 64,
    length: int = 128,
    *,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    batch_size: int = 8,
    progress_bar: bool = True,
) -> list[Row]:
    """Sequences drawn from the base model itself, by ancestral sampling at temperature 1, adapters disabled.

    Every sequence has `length` tokens: sampling goes on behind an end-of-sequence token, as the packed documents of
    pre-training do. The draws are the inverse of the model's cumulative distribution at uniform numbers that the seed
    fixes per sequence; no global random state is read or moved. Modes, flags and generation settings of the model are
    as before afterwards, also after an exception.

    In a process group each process writes its share of the batches and all get all sequences.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Gives the BOS token, and reads `prompts`.
        num_sequences (`int`, *optional*, defaults to 64): N.
        length (`int`, *optional*, defaults to 128): L, tokens per sequence with what it starts from.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same sequences on the same machine.
        prompts (`Sequence[str]`, *optional*):
            What sequences start from, in turn, one per batch. By default that is the BOS token of the tokenizer or the
            model, and where neither has one, a first token drawn uniformly from the vocabulary.
        batch_size (`int`, *optional*, defaults to 8): Sequences written at once.
        progress_bar (`bool`, *optional*, defaults to `True`): On the first process.

    Returns:
        `list[dict[str, list[int]]]`: N rows with `input_ids`, `attention_mask` (all 1) and `labels` (-100 on what the
        sequence starts from), a map-style dataset.

    Raises:
        ValueError: The model is no causal language model, a number is out of range, or a prompt leaves no room.
    """
    base: Any = refuse_other_tasks(model)
    if num_sequences < 1 or length < 2 or batch_size < 1:
        raise ValueError(
            f"num_sequences and batch_size must be >= 1 and length >= 2, got {num_sequences}, {batch_size}, {length}."
        )
    device = base.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(num_sequences, length, generator=generator, dtype=torch.float64)  # (N, L)
    starts = _starts(base, tokenizer, prompts, length, uniforms[:, 0])  # one per sequence or per batch
    ids = torch.zeros(num_sequences, length, dtype=torch.long, device=device)
    rank, size = world()
    batches = range(0, num_sequences, batch_size)
    prompt_lengths = [len(starts[i // batch_size % len(starts)]) if prompts else 1 for i in range(num_sequences)]
    failure: Exception | None = None
    with writing(model, base), torch.no_grad():
        try:
            for index, first in enumerate(
                tqdm(batches, desc="writing source data", disable=not (progress_bar and rank == 0))
            ):
                if index % size == rank:
                    rows = slice(first, min(first + batch_size, num_sequences))
                    if prompts:
                        start = torch.tensor([starts[index % len(starts)]] * (rows.stop - rows.start))
                    else:
                        start = torch.tensor(starts[rows])
                    ids[rows] = _write(base, start.to(device), length, uniforms[rows])
        except Exception as error:  # raised below, after the other processes know
            failure = error
    if any_process(failure is not None, device):
        raise failure or RuntimeError("Writing source data failed on another process; its error is in its output.")
    all_sum_([ids])
    return rows_from_tensors({"input_ids": ids, "prompt_lengths": torch.tensor(prompt_lengths)})


def rows_from_tensors(source: Mapping[str, Tensor]) -> list[Row]:
    """Rows of a dataset from what a belief keeps of self-written source data.

    Args:
        source (`Mapping[str, Tensor]`): `input_ids` (N, L) and `prompt_lengths` (N,), integers.

    Returns:
        `list[dict[str, list[int]]]`: As from [`sample_source`].
    """
    return [
        {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORE_INDEX] * start + ids[start:],
        }
        for ids, start in zip(source["input_ids"].tolist(), source["prompt_lengths"].tolist(), strict=True)
    ]


def tensors_from_rows(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Inverse of `rows_from_tensors`, in int32."""
    starts = [sum(label == IGNORE_INDEX for label in row["labels"]) for row in rows]
    return {
        "input_ids": torch.tensor([list(row["input_ids"]) for row in rows], dtype=torch.int32),
        "prompt_lengths": torch.tensor(starts, dtype=torch.int32),
    }


def refuse_other_tasks(model: nn.Module) -> nn.Module:
    """The base model of a causal language model, for any other raise ValueError."""
    peft_model: Any = unwrap(model)
    base = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model
    name = type(base).__name__
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"source_dataset='self' needs a causal language model that writes sequences, got {name}; pass a dataset."
        )
    return base


@contextmanager
def writing(model: nn.Module, base: Any) -> Iterator[None]:
    """The base model alone, in evaluation mode, with neutral generation settings; everything back on exit.

    Args:
        model (`nn.Module`): With or without adapters.
        base (`PreTrainedModel`): The model inside.

    Yields:
        None: `base.generate` may be called.
    """
    peft_model: Any = unwrap(model)
    modes = {module: module.training for module in peft_model.modules()}
    flags = {p: p.requires_grad for p in peft_model.parameters()}  # PEFT sets some when it enables adapters again
    settings, cache = base.generation_config, base.config.use_cache if hasattr(base.config, "use_cache") else None
    try:
        peft_model.eval()
        base.generation_config = GenerationConfig()  # a repetition penalty or top-k of the model's own would bias
        with peft_model.disable_adapter() if hasattr(peft_model, "disable_adapter") else nullcontext():
            yield
    finally:
        base.generation_config = settings
        if cache is not None:
            base.config.use_cache = cache
        for module, mode in modes.items():
            module.training = mode
        for p, flag in flags.items():
            p.requires_grad_(flag)


class _Draw(LogitsProcessor):
    """Leaves one token per row, drawn by inversion at given uniform numbers, so that greedy decoding must take it."""

    def __init__(self, uniforms: Tensor):
        self.uniforms = uniforms  # (batch, L)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.to(self.uniforms).softmax(-1).cumsum(-1)  # (batch, V)
        point = self.uniforms[:, input_ids.shape[1], None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, point, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _write(base: Any, start: Tensor, length: int, uniforms: Tensor) -> Tensor:
    """Continue `start` (batch, p) to (batch, L)."""
    uniforms = uniforms.to(start.device, torch.float32 if start.device.type == "mps" else torch.float64)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=length - start.shape[1], eos_token_id=None, pad_token_id=0, use_cache=True
    )
    return base.generate(
        start,
        attention_mask=torch.ones_like(start),
        generation_config=config,
        logits_processor=LogitsProcessorList([_Draw(uniforms)]),
    )


def _starts(
    base: Any, tokenizer: Any, prompts: Sequence[str] | None, length: int, uniforms: Tensor
) -> list[list[int]]:
    """Token ids that sequences start from: one per prompt, or one per sequence."""
    if prompts is not None:
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}.")
        if tokenizer is None:
            raise ValueError("prompts need a `tokenizer` (`processing_class=` in the trainer).")
        starts = [list(tokenizer(text)["input_ids"]) for text in prompts]
        for text, start in zip(prompts, starts, strict=True):
            if not 0 < len(start) < length:
                raise ValueError(f"The prompt {text[:40]!r} has {len(start)} tokens, of a length of {length}.")
        return starts
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        bos = base.config.get_text_config().bos_token_id
    if bos is not None:
        return [[int(bos)]] * len(uniforms)
    return [[i] for i in (uniforms * base.config.get_text_config().vocab_size).long().tolist()]
