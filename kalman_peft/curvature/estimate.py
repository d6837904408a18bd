"""estimate_curvature: one pass over a little data, out comes the precision of the adapter's weights."""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapters import AdapterState
from ..distributed import all_sum_, any_process, world
from ..observations import CategoricalObservation, infer_observation
from ..precision import Precision
from .accumulators import accumulator_bytes, make_accumulator
from .fisher import FISHERS, backward_scores, default_forward, score_cotangents, scoring
from .taps import Side, tapped


logger = logging.getLogger(__name__)

STRUCTURES = ("diagonal", "kronecker")
SPACES = ("adapter", "delta_w")
_WARN_BYTES = 2**30
_NOT_REACHED = (
    "No gradient reaches adapter {!r}, so that there is no curvature to measure. It may be merged (call "
    "`unmerge_adapter()`), disabled, or not the active one (call `set_adapter`); with reentrant gradient "
    "checkpointing call `enable_input_require_grads()` first."
)


def estimate_curvature(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Tensor]],
    structure: str = "kronecker",
    fisher: str = "sampled",
    *,
    space: str = "delta_w",
    num_samples: int = 1,
    rank: int = 32,
    dense_limit: int = 256,
    adapter_name: str | None = None,
    observation: CategoricalObservation | None = None,
    forward_fn: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = default_forward,
    max_batches: int | None = None,
    seed: int = 0,
    progress_bar: bool = True,
) -> tuple[Precision, dict[str, Any]]:
    """Curvature of the loss over the adapter's weights, per observed token (Laplace approximation, stage I of LaLoRA).

    Scores are exact per sequence, summed in float32, taken in evaluation mode. Padding and labels of -100 count
    nothing. In a process group every process takes each W-th batch, and one reduction at the end gives the
    single-process answer; a dataloader that accelerate has prepared is already split and is taken as it is.

    Args:
        model (`PeftModel`): Model with a LoRA adapter; a DistributedDataParallel wrapper is looked through.
        dataloader (`Iterable`): Batches (mappings) of tensors with `labels`.
        structure (`str`, *optional*, defaults to `"kronecker"`): "diagonal" or "kronecker".
        fisher (`str`, *optional*, defaults to `"sampled"`):
            "sampled" draws labels from the model, unbiased for the Gauss-Newton matrix; "empirical" uses the true
            ones, which saves the draw.
        space (`str`, *optional*, defaults to `"delta_w"`):
            "delta_w": curvature of the merged update scaling * B A. "adapter": of A and B themselves; there, curvature
            of A is zero while B = 0, PEFT's default start, and a warning says so.
        num_samples (`int`, *optional*, defaults to 1): Draws per sequence of the sampled Fisher, one backward each.
        rank (`int`, *optional*, defaults to 32):
            Eigenpairs kept of Kronecker sides longer than `dense_limit`; the rest of the trace becomes an isotropic
            tail.
        dense_limit (`int`, *optional*, defaults to 256): Longest side summed and kept in full.
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        observation (`CategoricalObservation`, *optional*): Inferred from the model's class by default.
        forward_fn (`Callable`, *optional*): (model, batch) -> logits.
        max_batches (`int`, *optional*): Stop after so many batches.
        seed (`int`, *optional*, defaults to 0): Of the label draws, together with the batch's index.
        progress_bar (`bool`, *optional*, defaults to `True`): On the first process.

    Returns:
        `tuple[Precision, dict]`: The precision, and a record of how it came about: structure, space, fisher,
        num_samples, num_tokens (labels observed), num_sequences, num_batches, seed.

    Raises:
        TypeError: The model has no PEFT adapter, or a batch is no mapping.
        ValueError: An unknown option, an empty or label-free dataloader, NaN or Inf in logits or curvature.
    """
    _check_choice("structure", structure, STRUCTURES)
    _check_choice("fisher", fisher, FISHERS)
    _check_choice("space", space, SPACES)
    if num_samples < 1 or (fisher == "empirical" and num_samples != 1):
        raise ValueError(f"num_samples must be >= 1, and 1 for the empirical Fisher; got {num_samples}.")
    if rank < 1 or dense_limit < 0:
        raise ValueError(f"rank must be >= 1 and dense_limit >= 0; got rank={rank}, dense_limit={dense_limit}.")
    state = AdapterState(model, adapter_name, warn_excluded=False)
    if space == "delta_w":
        refuse_nonlinear_merge(state)
    observation = observation or infer_observation(state.model)
    size = accumulator_bytes(state, structure, space, rank, dense_limit)
    message = f"Curvature sums ({structure}, {space}) take {size / 2**20:.0f} MiB."
    if size > _WARN_BYTES:
        warnings.warn(
            f"{message} structure='kronecker' with a smaller `dense_limit` and `rank` takes less.", stacklevel=2
        )
    else:
        logger.info(message)

    accumulator = make_accumulator(state, structure, space, weight=1 / num_samples, rank=rank, dense_limit=dense_limit)
    device = state.pairs[0].a.device
    counts = torch.zeros(3, dtype=torch.float64)  # tokens, sequences, batches
    fired = torch.zeros(len(state), device=device)  # how often each layer was tapped

    def handle(index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        fired[index] += 1
        accumulator.handle(index, side, inputs, grads)

    process, processes = world()
    if _is_prepared(dataloader):
        process, processes = 0, 1  # each process already sees its own batches
    failure: Exception | None = None
    with scoring(state), tapped(state, handle):
        batches = tqdm(
            islice(enumerate(dataloader), max_batches),
            total=_length(dataloader, max_batches),
            desc=f"curvature ({structure}, {fisher})",
            disable=not (progress_bar and world()[0] == 0),
        )
        try:
            for index, batch in batches:
                if index % processes != process:
                    continue
                generator = torch.Generator().manual_seed(_seed(seed, index, 0 if processes > 1 else world()[0]))
                batch = _to_device(batch, device)
                labels = batch["labels"]
                accumulator.start_batch(len(labels), observation.positions(labels, batch.get("attention_mask")))
                logits = forward_fn(state.model, batch)
                cotangents, observed, _ = score_cotangents(
                    logits, labels, observation, [fisher] * num_samples, generator
                )
                if observed and not logits.requires_grad:
                    raise ValueError(_NOT_REACHED.format(state.adapter_name))
                if observed:
                    with _full_precision(device):  # a caller's autocast is for the forward pass, not for our sums
                        backward_scores(logits, cotangents, num_samples)
                    counts += torch.tensor([observed, len(labels), 1.0], dtype=torch.float64)
                    batches.set_postfix(tokens=int(counts[0]), refresh=False)
        except Exception as error:  # raised below, after the other processes know
            failure = error
    if any_process(failure is not None, device):
        raise failure or RuntimeError("Curvature estimation failed on another process; its error is in its output.")

    counts = counts.to(device, torch.float32 if device.type == "mps" else torch.float64)
    all_sum_([counts, fired, *accumulator.sums()])
    num_tokens, num_sequences, num_batches = counts.tolist()
    if num_tokens == 0:
        raise ValueError(
            "The dataloader for the curvature held no labels: it is empty, or all labels are -100. Give batches with "
            "`labels`; a sequence longer than the prompt is needed for supervised data."
        )
    _check_taps(state, fired)
    if not all(torch.isfinite(t).all() for t in accumulator.sums()):
        raise ValueError("The curvature contains NaN or Inf; check the source data and the model's dtype.")
    with _full_precision(device):
        precision = accumulator.finalize(num_tokens)
    if space == "adapter" and all(not pair.b.any() for pair in state):
        warnings.warn(
            "The curvature of every lora_A is exactly zero, because every lora_B is zero (PEFT's default start): A "
            "would be left unprotected. Use space='delta_w', which has no such blind spot, or train a few steps on "
            "source data first.",
            stacklevel=2,
        )
    record = {
        "structure": structure,
        "space": space,
        "fisher": fisher,
        "num_samples": num_samples,
        "num_tokens": int(num_tokens),
        "num_sequences": int(num_sequences),
        "num_batches": int(num_batches),
        "seed": seed,
    }
    return precision, record


def refuse_nonlinear_merge(state: AdapterState) -> None:
    """Raise ValueError if some layer's update is not scaling * B A (DoRA), for which delta_w is not defined."""
    unmergeable = [pair.name for pair in state if not pair.merges_linearly]
    if unmergeable:
        raise ValueError(
            f"space='delta_w' needs updates of the form scaling * B A, which {unmergeable[0]} is not (a LoRA variant "
            "such as DoRA). Use space='adapter' (laplace_space='adapter' in KalmanConfig)."
        )


def _check_taps(state: AdapterState, fired: Tensor) -> None:
    if not fired.any():
        raise ValueError(_NOT_REACHED.format(state.adapter_name))
    silent = [pair.name for pair, times in zip(state, fired.tolist(), strict=True) if not times]
    if silent:
        warnings.warn(
            f"No gradient passed through {len(silent)} adapted layers ({silent[0]}, ...): their curvature is zero and "
            "they are not protected. Give more source data if they are experts that were not chosen.",
            stacklevel=3,
        )


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {choices}, got {value!r}.")


def _seed(seed: int, index: int, process: int) -> int:
    return (seed * 1_000_003 + index) * 4099 + process


def _full_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _is_prepared(dataloader: Iterable) -> bool:
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    return isinstance(dataloader, DataLoaderShard | DataLoaderDispatcher)


def _length(dataloader: Iterable, max_batches: int | None) -> int | None:
    try:
        length = len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        return max_batches
    return length if max_batches is None else min(length, max_batches)


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(f"Batches must be mappings with `labels`, got {type(batch).__name__}.")
    if batch.get("labels") is None:
        raise ValueError(f"A batch has no `labels` (keys: {sorted(batch)}); curvature needs to know what is observed.")
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
