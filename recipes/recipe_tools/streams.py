"""Streams of labelled samples and the models that learn from them: sentences, and images that shift half-way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ViTForImageClassification,
)

from .images import load_images, shift
from .labelled import TEXT_TASKS, encode_labelled, load_labelled
from .offline import minilm_checkpoint
from .rows import from_hub
from .vit import Pretraining, normalise, pretrained_vit


@dataclass(frozen=True)
class Stream:
    """A task's samples and model.

    Attributes:
        provenance (`str`): What the data are.
        length (`int`): Samples in the stream.
        samples (`Callable[[int], list[dict]]`): The samples of a seed, in order.
        collate (`Callable`): A list of samples to a batch of tensors with `labels`.
        model (`Callable[[], Any]`): The model without adapter; what is new in it comes from torch's generator.
        windows (`dict[str, tuple[int, int]]`): Parts of the stream to report on, the whole first.
        shift_at (`int`, *optional*): First sample after the shift.
    """

    provenance: str
    length: int
    samples: Callable[[int], list[dict[str, Any]]]
    collate: Callable[[list[dict[str, Any]]], Any]
    model: Callable[[], Any]
    windows: dict[str, tuple[int, int]]
    shift_at: int | None = None


def text_stream(task: str, model: str, data: str, samples: int | None, max_length: int) -> Stream:
    """Sentences or pairs in a seeded order, and an encoder with a new head.

    Args:
        task (`str`): A key of `TEXT_TASKS`.
        model (`str`): "minilm", a Hub id or a path.
        data (`str`): See [`load_labelled`].
        samples (`int`, *optional*): Length of the stream; defaults to 1000, or all there are if these are fewer.
        max_length (`int`): Tokens per sample.

    Returns:
        `Stream`: Reported on as a whole and over its last half.

    Raises:
        ValueError: There are fewer rows than samples.
        OSError: The model or the data are neither here nor on a hub that is reached.
    """
    path = str(minilm_checkpoint() if model == "minilm" else model)
    remedy = "Give a folder with a model and its tokenizer, or 'minilm', which needs no hub."
    with from_hub(f"--model {model}", remedy):
        tokenizer = AutoTokenizer.from_pretrained(path)
    rows, provenance = load_labelled(task, data)
    length = _length(len(rows), samples, provenance)
    classes = len(TEXT_TASKS[task].labels)

    def encoder() -> Any:
        # A head for another number of classes, of a checkpoint that was fine-tuned, gives way to a new one.
        with from_hub(f"--model {model}", remedy):
            return AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=classes, dtype=torch.float32, ignore_mismatched_sizes=True
            )

    return Stream(
        provenance,
        length,
        lambda seed: encode_labelled(rows.shuffle(seed=seed).select(range(length)), tokenizer, max_length),
        DataCollatorWithPadding(tokenizer),
        encoder,
        {"all": (0, length), "last half": (length // 2, length)},
    )


def image_stream(
    task: str, source: str, samples: int | None, angles: tuple[float, float], jitter: float, how: Pretraining
) -> Stream:
    """Images of which the second half is rotated and jittered, and a ViT trained on other, upright ones.

    Args:
        task (`str`): See [`load_images`].
        source (`str`): See [`load_images`].
        samples (`int`, *optional*): Length of the stream; defaults to 1000, or all there are if these are fewer.
        angles (`tuple[float, float]`): Bounds of the rotations, degrees.
        jitter (`float`): See [`shift`].
        how (`Pretraining`): Of the ViT.

    Returns:
        `Stream`: Reported on as a whole, before and after the shift.

    Raises:
        ValueError: There are fewer images than samples.
    """
    pretrain, images, provenance = load_images(task, source)
    length = _length(len(images.labels), samples, provenance)
    path = pretrained_vit(task, pretrain, how)
    half = length // 2

    def ordered(seed: int) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        chosen = images.select(torch.randperm(len(images.labels), generator=generator)[:length])
        later = shift(chosen.pixels[half:], angles, jitter, generator)
        pixels = normalise(torch.cat([chosen.pixels[:half], later]))
        return [{"pixel_values": p, "labels": y} for p, y in zip(pixels, chosen.labels, strict=True)]

    windows = {"all": (0, length), "before the shift": (0, half), "after the shift": (half, length)}
    return Stream(
        provenance, length, ordered, _stack, lambda: ViTForImageClassification.from_pretrained(path), windows, half
    )


def _stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def _length(rows: int, samples: int | None, provenance: str) -> int:
    if samples is not None and rows < samples:
        raise ValueError(f"--samples {samples}: there are {rows} only ({provenance}).")
    return min(rows, 1000) if samples is None else samples
