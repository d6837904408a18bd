"""One pass over source data: forward, backward of the scores, taps into an accumulator, counts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapters import AdapterState
from ..distributed import all_sum_, any_process, world
from ..observations import Observation
from .accumulators import Accumulator
from .fisher import backward_scores, score_cotangents, scoring
from .sequences import Sequences
from .sharing import SharedInputs
from .taps import Side, tapped


NOT_REACHED = (
    "No gradient reaches adapter {!r}, so that there is no curvature to measure. It may be merged (call "
    "`unmerge_adapter()`), disabled, or not the active one (call `set_adapter`); with reentrant gradient "
    "checkpointing call `enable_input_require_grads()` first."
)

FAILED_ELSEWHERE = "Curvature estimation failed on another process; its error is in its output."


@dataclass
class Source:
    """One set of source data, with its share of the curvature.

    Args:
        name (`str`): For the progress bar and the record.
        batches (`Iterable`): Mappings with `labels`.
        share (`float`): Weight, all adding up to 1.
        counts (`Tensor`): Labels, sequences and batches seen, over all processes once the pass is over.
    """

    name: str
    batches: Any
    share: float
    counts: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))


@dataclass
class Scorer:
    """What is done with every batch, the same in each pass.

    Args:
        state (`AdapterState`): The adapter.
        observation (`Observation`): What the labels say about the logits.
        kinds (`list[str]`): Cotangents, see `score_cotangents`.
        weight (`float`): Of the square of each cotangent's scores.
        forward_fn (`Callable`): (model, batch) -> logits.
        max_batches (`int`, *optional*): Per source.
        max_samples (`int`, *optional*): Sequences per source; the last batch is cut.
        seed (`int`): Of the draws.
        progress_bar (`bool`): On the first process.
        description (`str`): Of the progress bar.
        inputs (`SharedInputs`): Finds layers that share an input.
        in_step (`bool`): Processes must run their passes together (sharded models).
    """

    state: AdapterState
    observation: Observation
    kinds: list[str]
    weight: float
    forward_fn: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    max_batches: int | None
    max_samples: int | None
    seed: int
    progress_bar: bool
    description: str
    inputs: SharedInputs
    in_step: bool

    def run(self, sources: list[Source], accumulator: Accumulator, keep: list[list] | None = None) -> Tensor:
        """Feed every source to the accumulator, close it, and add up over processes.

        Args:
            sources (`list[Source]`): Their counts are filled in.
            accumulator (`Accumulator`): Its sums are over all processes and sources afterwards.
            keep (`list[list]`, *optional*): Takes the batches of this process, for another pass over the same data.

        Returns:
            `Tensor`: How often each layer was tapped.

        Raises:
            ValueError: A source without labels, or what the batches give cause for.
            RuntimeError: Another process failed.
        """
        device = self.state.pairs[0].a.device
        fired = torch.zeros(len(self.state), device=device)
        accumulator.weight = self.weight

        def handle(index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
            if accumulator.skipping:
                return
            fired[index] += 1
            accumulator.handle(index, side, inputs, grads)

        for place, source in enumerate(sources):
            failure: Exception | None = None
            kept: list | None = [] if keep is not None else None
            with scoring(self.state), self.inputs.watching(), tapped(self.state, handle):
                try:
                    self._pass(source, place, accumulator, fired, kept)
                except Exception as error:  # raised below, after the other processes know
                    failure = error
            if any_process(failure is not None, device):
                raise failure or RuntimeError(FAILED_ELSEWHERE)
            if keep is not None:
                keep.append(kept or [])
            counts = source.counts.to(device, torch.float32 if device.type == "mps" else torch.float64)
            all_sum_([counts, *accumulator.counts()])
            source.counts = counts.cpu()
            if counts[0] == 0:
                raise ValueError(
                    f"The dataloader for the curvature{_named(source)} held no labels: it is empty, or all labels "
                    "are -100. Give batches with `labels`; supervised data need sequences longer than the prompt."
                )
            accumulator.close_source(source.share, float(counts[0]), last=place == len(sources) - 1)
        all_sum_([fired, *accumulator.sums()])
        if not all(torch.isfinite(t.sum()) for t in accumulator.sums()):
            raise ValueError("The curvature contains NaN or Inf; check the source data and the model's dtype.")
        return fired

    def _pass(self, source: Source, place: int, accumulator: Accumulator, fired: Tensor, kept: list | None) -> None:
        device = fired.device
        mine = self._mine(source.batches)
        batches = tqdm(
            mine,
            total=_length(source.batches, self.max_batches),
            desc=self.description + _named(source),
            disable=not (self.progress_bar and world()[0] == 0),
        )
        for index, batch, counted, draw in batches:
            if kept is not None:
                kept.append((index, batch, counted, draw))
            # Drawn anew in every pass with the same seed: another pass sees the same labels.
            generator = torch.Generator().manual_seed(
                ((self.seed * 1_000_003 + place * 7919 + index) * 4099 + draw) % 2**63
            )
            batch, accumulator.sequences = self._together(lambda b=batch: self._read(b, device), device)
            logits = self.forward_fn(self.state.model, batch)
            segments = accumulator.sequences.segments
            cotangents, observed, _ = self._together(
                lambda z=logits, b=batch, s=segments, g=generator: score_cotangents(
                    z, b["labels"], self.observation, self.kinds, g, s
                ),
                device,
            )
            if observed and not logits.requires_grad:
                raise ValueError(NOT_REACHED.format(self.state.adapter_name))
            with _full_precision(device):  # a caller's autocast is for the forward pass, not for our sums
                if counted and observed:
                    backward_scores(logits, cotangents, accumulator.begin_backward, accumulator.end_backward)
                elif self.in_step:  # the other processes wait in their backward passes
                    accumulator.skipping = True
                    for k in range(len(self.kinds)):
                        logits.backward(torch.zeros_like(logits), retain_graph=k < len(self.kinds) - 1)
                    accumulator.skipping = False
            if counted and observed:
                source.counts += torch.tensor([observed, accumulator.sequences.count, 1.0], dtype=torch.float64)
                batches.set_postfix(tokens=int(source.counts[0]), refresh=False)

    def _read(self, batch: Any, device: torch.device) -> tuple[dict[str, Any], Sequences]:
        batch = _to_device(batch, device)
        return batch, Sequences.from_batch(batch, batch["labels"], self.observation, self.state.model)

    def _together(self, function: Callable[[], Any], device: torch.device) -> Any:
        """Call it; where processes run in step, a failure of one is raised in all before they wait for each other."""
        if not self.in_step:
            return function()
        result, failure = None, None
        try:
            result = function()
        except Exception as error:
            failure = error
        if any_process(failure is not None, device):
            raise failure or RuntimeError(FAILED_ELSEWHERE)
        return result

    def _mine(self, dataloader: Iterable) -> Iterator[tuple[int, Any, bool, int]]:
        """Batches of this process.

        Yields:
            tuple: Number of the batch, the batch, whether it counts, and a number for its draws.
        """
        if isinstance(dataloader, Kept):
            yield from dataloader.batches
            return
        rank, size = world()
        if _is_prepared(dataloader):  # each process already sees its own batches
            if self.in_step and size > 1:
                raise ValueError(
                    "A dataloader prepared by accelerate is not supported with a sharded model, whose processes must "
                    "take equally many batches; pass the plain one, which is shared out here."
                )
            yield from ((i, b, True, rank) for i, b in enumerate(self._limited(dataloader)))
            return
        numbered = enumerate(self._limited(dataloader))
        if not self.in_step:
            yield from ((index, batch, True, 0) for index, batch in numbered if index % size == rank)
            return
        while round_ := list(islice(numbered, size)):
            index, batch = round_[min(rank, len(round_) - 1)]
            yield index, batch, rank < len(round_), 0

    def _limited(self, dataloader: Iterable) -> Iterator[Any]:
        seen = 0
        for batch in islice(dataloader, self.max_batches):
            if self.max_samples is not None:
                batch = _cut(batch, self.max_samples - seen)
                seen += _rows(batch)
            yield batch
            if self.max_samples is not None and seen >= self.max_samples:
                return


@dataclass(frozen=True)
class Kept:
    """Batches of an earlier pass of this process, with their numbers."""

    batches: list


def _named(source: Source) -> str:
    return f" [{source.name}]" if source.name else ""


def _rows(batch: Any) -> int:
    return len(batch["labels"]) if isinstance(batch, Mapping) and batch.get("labels") is not None else 0


def _cut(batch: Any, rows: int) -> Any:
    size = _rows(batch)
    if size <= rows:
        return batch
    return {k: v[:rows] if isinstance(v, Tensor) and v.dim() and len(v) == size else v for k, v in batch.items()}


def _full_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _is_prepared(dataloader: Iterable) -> bool:
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    return isinstance(dataloader, DataLoaderShard | DataLoaderDispatcher)


def _length(dataloader: Iterable, max_batches: int | None) -> int | None:
    if isinstance(dataloader, Kept):
        return len(dataloader.batches)
    try:
        length = len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        return max_batches
    return length if max_batches is None else min(length, max_batches)


def _to_device(batch: Any, device: torch.device) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(f"Batches must be mappings with `labels`, got {type(batch).__name__}.")
    if batch.get("labels") is None:
        raise ValueError(f"A batch has no `labels` (keys: {sorted(batch)}); curvature needs to know what is observed.")
    if not isinstance(batch["labels"], Tensor):
        raise TypeError(
            f"`labels` must be a tensor, got {type(batch['labels']).__name__}; collate the batch to tensors."
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
