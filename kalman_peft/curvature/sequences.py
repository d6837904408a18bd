"""Which rows of a tap belong to which sequence, and which of them can carry a gradient.

Packed and padding-free batches hold several sequences in one row. transformers keeps them apart in attention only if
- `position_ids` of shape (batch, time) restart at every sequence,
- there is no `attention_mask` of shape (batch, time), not even one of ones, and
- no cache is used (which `estimate_curvature` and the Trainer see to).
That is what `DataCollatorWithFlattening` and TRL's padding-free collators return, and what is asked of a packed batch
here: its `seq_idx` and `cu_seq_lens_q`, if any, have to say the same. An attention mask of four dimensions is taken as
the caller's own way of keeping sequences apart; `seq_idx`, `cu_seq_lens_q` or `position_ids` then name them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterState
from ..observations import Observation


@dataclass(frozen=True)
class Packing:
    """Where the rows of packed sequences go: row source[i] of (batch * time) to row target[i] of (count * length)."""

    shape: torch.Size  # (batch, time)
    length: int  # of the longest sequence
    source: Tensor  # (rows kept,)
    target: Tensor  # (rows kept,)


@dataclass(frozen=True)
class Sequences:
    """The sequences of one batch.

    Args:
        count (`int`):
            Number of sequences. Packed ones are counted one by one, those without a label that counts left out, since
            padding at the end of a packed row looks like them and no gradient reaches them.
        batch_size (`int`): Number of rows of the batch; equals `count` unless sequences are packed.
        times (`tuple[int, ...]`, *optional*):
            Positions per row, the decoder's and the encoder's. Tells layers that see (batch * time, d) flattened, in
            whole, from those that see some of the tokens.
        pooled (`bool`, *optional*, defaults to `True`): Whether layers may see one row per sequence, (batch, d).
        mask (`Tensor`, *optional*):
            Boolean of shape (batch, time) or (batch,): what can carry a gradient; `None` if everything can.
        encoder_mask (`Tensor`, *optional*): The same for the encoder's positions of an encoder-decoder.
        segments (`Tensor`, *optional*): Shape (batch, time), which packed sequence a position belongs to.
        packing (`Packing`, *optional*): How `split` takes packed rows apart.
    """

    count: int
    batch_size: int
    times: tuple[int, ...] = ()
    pooled: bool = True
    mask: Tensor | None = None
    encoder_mask: Tensor | None = None
    segments: Tensor | None = None
    packing: Packing | None = None

    @classmethod
    def from_batch(
        cls, batch: Mapping[str, Any], labels: Tensor, observation: Observation, model: nn.Module | None = None
    ) -> "Sequences":
        """Read the sequences off a batch.

        Args:
            batch (`Mapping[str, Any]`): As the model takes it.
            labels (`Tensor`): Shape (batch, time) or (batch, ...).
            observation (`Observation`): How labels meet logits.
            model (`nn.Module`, *optional*): Lets packed rows be refused where the model's attention would mix them.

        Returns:
            `Sequences`: On the labels' device.

        Raises:
            ValueError: Sequences are packed in a way in which they would see each other, see [`find_segments`].
        """
        segments = find_segments(batch, labels, observation, model)
        mask = _padding(batch.get("attention_mask"))
        times = _times(batch, labels, observation)
        if observation.layout == "seq2seq":
            reached = observation.observed(labels).any(-1)  # the encoder of a sequence without labels gets no gradient
            whole = None if reached.all() else reached
            encoder = whole if mask is None else mask & reached.to(mask.device)[:, None]
            decoder = observation.positions(labels, _padding(batch.get("decoder_attention_mask")))
            return cls(len(labels), len(labels), times, False, decoder, encoder)
        positions = observation.positions(labels, mask, segments)
        if segments is None:
            return cls(len(labels), len(labels), times, observation.layout == "full", positions)
        packing, count = _unpack(segments, labels, observation)
        return cls(count, len(labels), times, False, positions, segments=segments, packing=packing)

    def _unflattened(self, x: Tensor) -> Tensor:
        """Rows of whole batches that a layer flattened, as (batch, time, d) again."""
        if x.dim() == 2:
            for time in self.times:
                if len(x) == self.batch_size * time:
                    return x.view(self.batch_size, time, -1)
        return x

    def split(self, x: Tensor, name: str) -> Tensor:
        """One sequence per entry of dimension 0.

        A batched product over it, `split(g).mT @ split(x)`, gives the scores of all sequences. Packed sequences are
        padded with zeros to the longest one, which adds nothing to such products.

        Args:
            x (`Tensor`): Input or output gradient of a layer, shape (batch, time, d) or (batch, d).
            name (`str`): Of the layer, for the error.

        Returns:
            `Tensor`: Shape (count, length, d); a view of `x` unless sequences are packed.

        Raises:
            ValueError: The layer's rows are not the batch's sequences.
        """
        x = self._unflattened(x)
        expected = (self.batch_size,) if self.packing is None else tuple(self.packing.shape)
        foreign = x.dim() == 2 and bool(self.times) and not self.pooled  # as many tokens as there are sequences
        if foreign or x.shape[: len(expected)] != expected or x.dim() <= len(expected):
            seen = (
                f"{x.shape[0]} rows for a batch of {self.batch_size}"
                if self.packing is None
                else f"rows of shape {tuple(x.shape[:-1])} for a batch of packed shape {expected}, {self.count}"
            )
            raise ValueError(
                f"{name} sees {seen} sequences; the exact Fisher per sequence needs the batch as first dimension. Use "
                "structure='kronecker'."
            )
        if self.packing is None:
            return x.reshape(self.batch_size, -1, x.shape[-1])
        rows = x.reshape(-1, x.shape[-1])  # (batch * time, d)
        out = x.new_zeros(self.count * self.packing.length, x.shape[-1])
        out.index_copy_(0, self.packing.target.to(x.device), rows[self.packing.source.to(x.device)])
        return out.view(self.count, -1, x.shape[-1])

    def real(self, x: Tensor, encoder: bool = False) -> Tensor:
        """The rows that can carry a gradient, for second moments of inputs.

        Padding has zero gradient but non-zero activations, and so have, in causal models, the last label of a sequence
        and what follows it. Where the rows are not (batch, time), as in experts that see some of the tokens, all are
        kept.

        Args:
            x (`Tensor`): Input or output gradient of a layer, shape (..., d).
            encoder (`bool`, *optional*, defaults to `False`):
                Whether the layer sees the encoder's positions, see [`encoder_inputs`]. Where that contradicts the
                shape of `x`, the shape decides.

        Returns:
            `Tensor`: Shape (N, d).
        """
        x = self._unflattened(x)
        mask, other = (self.encoder_mask, self.mask) if encoder else (self.mask, self.encoder_mask)
        if mask is not None and not _fits(mask, x) and other is not None:
            mask = other
        if mask is not None and _fits(mask, x):
            x = x[mask.to(x.device)]
        return x.reshape(-1, x.shape[-1])


def find_segments(
    batch: Mapping[str, Any], labels: Tensor, observation: Observation, model: nn.Module | None = None
) -> Tensor | None:
    """Which sequence each position of a packed batch belongs to.

    Args:
        batch (`Mapping[str, Any]`): As the model takes it.
        labels (`Tensor`): Shape (batch, time) or (batch, ...).
        observation (`Observation`): How labels meet logits.
        model (`nn.Module`, *optional*): To check its attention implementation.

    Returns:
        `Tensor` or `None`: Numbers of sequences, int64 of shape (batch, time), not decreasing and distinct over the
        batch; `None` if every row is one sequence.

    Raises:
        ValueError: Several sequences share a row, and the model is no causal one, is not told by `position_ids`, is
            given an `attention_mask` that makes it overlook them, or its attention splits single rows only.
    """
    mask = batch.get("attention_mask")
    padding = _padding(mask)
    found = _starts(batch, len(labels), padding)
    if not any(start.any() for start in found.values()):
        return None
    if observation.layout != "causal":
        raise ValueError(
            f"{_named(found)} put several sequences into one row, which is supported for causal language models only; "
            "pad the batch instead."
        )
    if padding is not None:
        raise ValueError(
            f"{_named(found)} put several sequences into one row, but attention_mask of shape {tuple(padding.shape)} "
            "makes the model overlook that: they would see each other. Leave attention_mask out of packed batches."
        )
    if mask is None:
        if "position_ids" not in found:
            raise ValueError(
                f"{_named(found)} put several sequences into one row, but the model keeps them apart only if it is "
                "given position_ids of shape (batch, time) that restart at each of them."
            )
        if not all(torch.equal(start, found["position_ids"]) for start in found.values()):
            raise ValueError(
                f"{_named(found)} disagree on where sequences start; position_ids must restart exactly there."
            )
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
        if len(labels) > 1 and "flash" in attention:
            raise ValueError(
                f"attention {attention!r} keeps packed sequences apart in batches of one row only, and this one has "
                f"{len(labels)}; flatten the batch (DataCollatorWithFlattening) or use attn_implementation='sdpa'."
            )
    first = next(iter(found.values())).clone()
    first[:, 0] = True
    return (first.reshape(-1).cumsum(0) - 1).view_as(first)


def encoder_inputs(state: AdapterState) -> list[bool]:
    """Which pairs of an adapter see the encoder's positions: the encoder, and keys and values of cross attention.

    Args:
        state (`AdapterState`): The adapter.

    Returns:
        `list[bool]`: One per pair; all `False` if the model is no encoder-decoder.
    """
    base: Any = state.model.get_base_model()  # type: ignore[operator]
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return [False] * len(state)
    inside = {id(module) for module in base.get_encoder().modules()}
    return [id(pair.linear_a) in inside or _is_cross_attention(pair.name) for pair in state]


def _is_cross_attention(name: str) -> bool:
    """Whether the name is that of keys or values of a cross attention (encoder_attn, EncDecAttention, cross_attn)."""
    *path, leaf = name.lower().split(".")
    crossing = any(re.search(r"cross|enc\w*att", part) for part in path)
    return crossing and re.fullmatch(r"(k|v|kv|key|value|c)(_?(proj|attn))?", leaf) is not None


def _times(batch: Mapping[str, Any], labels: Tensor, observation: Observation) -> tuple[int, ...]:
    """Positions per row, as labels and inputs have them."""
    found = [labels.shape[1]] if labels.dim() == 2 and observation.observed(labels).dim() == 2 else []
    for name in ("input_ids", "inputs_embeds", "attention_mask"):
        x = batch.get(name)
        if isinstance(x, Tensor) and x.dim() >= 2 and len(x) == len(labels):
            found.append(x.shape[1])
            break
    return tuple(dict.fromkeys(found))


def _padding(mask: Any) -> Tensor | None:
    """The attention mask, if it says which tokens are real: boolean of shape (batch, time)."""
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _fits(mask: Tensor, x: Tensor) -> bool:
    return x.dim() > mask.dim() and (mask.dim() == 1 or x.dim() == 3) and x.shape[: mask.dim()] == mask.shape


def _starts(batch: Mapping[str, Any], rows: int, padding: Tensor | None) -> dict[str, Tensor]:
    """Where sequences start behind others in a row, (batch, time), according to each tensor that says so."""
    ids, order = batch.get("seq_idx"), batch.get("position_ids")
    lengths = batch.get("cu_seq_lens_q")
    found: dict[str, Tensor] = {}
    if isinstance(ids, Tensor) and ids.dim() == 2:
        found["seq_idx"] = _changes(ids.diff(dim=-1) != 0)
    if isinstance(lengths, Tensor) and lengths.dim() == 1 and rows == 1 and len(lengths):
        start = torch.zeros(1, int(lengths[-1]) + 1, dtype=torch.bool, device=lengths.device)
        start[0, lengths.long()] = True
        found["cu_seq_lens_q"] = _changes(start[:, 1:-1])
    if isinstance(order, Tensor) and order.dim() == 2:
        step = order.expand(rows, -1).diff(dim=-1)
        # Without a mask, transformers separates wherever positions do not go on by one. With one it never does, and
        # positions of padding mean nothing: only real tokens that do not advance tell of packing.
        found["position_ids"] = _changes(step != 1 if padding is None else step <= 0)
    if padding is not None:
        both = _changes(padding[:, 1:] & padding[:, :-1])
        found = {name: start & both.to(start.device) for name, start in found.items() if start.shape == both.shape}
    return found


def _changes(inner: Tensor) -> Tensor:
    """Prepend the first column, at which no sequence starts behind another."""
    return nn.functional.pad(inner, (1, 0))


def _named(found: Mapping[str, Tensor]) -> str:
    return " and ".join(found)


def _unpack(segments: Tensor, labels: Tensor, observation: Observation) -> tuple[Packing, int]:
    """Number the sequences with labels that count, and find where each of their rows goes."""
    flat = segments.reshape(-1)
    total = int(flat[-1]) + 1
    counts = observation.observed(labels) & _changes(segments.diff(dim=-1) == 0)  # a first label is never explained
    kept = torch.zeros(total, dtype=torch.bool, device=flat.device)
    kept[flat[counts.reshape(-1)]] = True
    number = kept.cumsum(0) - 1  # (total,)
    lengths = torch.bincount(flat, minlength=total)
    offset = torch.arange(len(flat), device=flat.device) - (lengths.cumsum(0) - lengths)[flat]
    length = int(lengths[kept].max()) if kept.any() else 0
    source = kept[flat].nonzero().squeeze(-1)
    target = number[flat[source]] * length + offset[source]
    return Packing(segments.shape, length, source, target), int(kept.sum())
