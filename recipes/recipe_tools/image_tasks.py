"""Sequences of image tasks, permuted or slowly rotating, and an MLP that learns them through LoRA factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from .images import CLASSES, Images, rotate


KINDS = ("permuted", "rotated")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class ImageTask:
    """One task.

    Attributes:
        name (`str`): Of the task.
        train (`Batch`): "pixel_values" of shape (n, pixels) and "labels" (n,).
        test (`Batch`): The same, of other images.
    """

    name: str
    train: Batch
    test: Batch


class Mlp(nn.Module):
    """Linear layers with ReLU between them; answers as the models of transformers do.

    Args:
        pixels (`int`): Inputs.
        hidden (`int`): Width of the hidden layers.
        layers (`int`): Number of them.
    """

    def __init__(self, pixels: int, hidden: int, layers: int):
        super().__init__()
        sizes = [pixels, *[hidden] * layers, CLASSES]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, pixel_values: Tensor, **ignored: Any) -> SimpleNamespace:
        """Logits (n, 10) of images (n, pixels)."""
        x = pixel_values
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return SimpleNamespace(logits=self.layers[-1](x))


def make_mlp(pixels: int, hidden: int, layers: int, r: int, seed: int) -> Any:
    """A frozen random MLP with LoRA on every layer.

    The base is random on purpose: no layer pre-trained on upright images helps with permuted pixels. Random features
    with factors of rank r in every layer are the paper's MLP with a bound on what a task may change.

    Args:
        pixels (`int`): Inputs.
        hidden (`int`): Width.
        layers (`int`): Hidden layers.
        r (`int`): Rank of the factors; for the last layer at most the number of classes.
        seed (`int`): Of base and factors.

    Returns:
        `PeftModel`: Without dropout.
    """
    torch.manual_seed(seed)
    base = Mlp(pixels, hidden, layers)
    names = [f"layers.{i}" for i in range(layers + 1)]
    pattern = {names[-1]: min(r, CLASSES)}
    config = LoraConfig(
        r=r, lora_alpha=r, target_modules=names, rank_pattern=pattern, alpha_pattern=pattern, lora_dropout=0.0
    )
    return get_peft_model(base, config)  # type: ignore[arg-type]


def make_tasks(
    kind: str, train: Images, test: Images, number: int, samples: int, heldout: int, seed: int
) -> list[ImageTask]:
    """A sequence of tasks, each of images of its own.

    Args:
        kind (`str`): "permuted": the pixels of task t in a random order of its own, the first as they are. "rotated":
            task t turned by t * 90 / (number - 1) degrees, a drift.
        train (`Images`): To draw training images from.
        test (`Images`): To draw test images from; the same ones for every task.
        number (`int`): Of tasks.
        samples (`int`): Training images per task; drawn anew for each task, again where there are too few.
        heldout (`int`): Test images.
        seed (`int`): Of draws and permutations.

    Returns:
        `list[ImageTask]`: In order.

    Raises:
        ValueError: Unknown kind, or no task or image.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    if min(number, samples, heldout) < 1:
        raise ValueError(f"Tasks and images must be at least 1, got {number}, {samples} and {heldout}.")
    generator = torch.Generator().manual_seed(seed)
    chosen = _chosen(test, heldout, generator)
    pool = torch.cat(
        [
            torch.randperm(len(train.labels), generator=generator)
            for _ in range(-(-number * samples // len(train.labels)))
        ]
    )
    tasks = []
    for t in range(number):
        own = train.select(pool[t * samples : (t + 1) * samples])
        if kind == "rotated":
            tasks.append(ImageTask(f"{kind}-{t}", _turned(own, t, number), _turned(chosen, t, number)))
            continue
        size = math.prod(own.pixels.shape[1:])
        order = torch.randperm(size, generator=generator) if t else torch.arange(size)
        tasks.append(
            ImageTask(f"{kind}-{t}", *(_batch(part, part.pixels.flatten(1)[:, order]) for part in (own, chosen)))
        )
    return tasks


def between_rotations(test: Images, number: int, heldout: int, seed: int) -> list[Batch]:
    """Test images turned half-way between the tasks of [`make_tasks`]: what no task shows.

    Args:
        test (`Images`): To draw from.
        number (`int`): Of tasks.
        heldout (`int`): Test images, the same ones as those of the tasks.
        seed (`int`): As for the tasks.

    Returns:
        `list[Batch]`: One fewer than there are tasks.
    """
    chosen = _chosen(test, heldout, torch.Generator().manual_seed(seed))
    return [_turned(chosen, t + 0.5, number) for t in range(number - 1)]


def _chosen(test: Images, heldout: int, generator: torch.Generator) -> Images:
    return test.select(torch.randperm(len(test.labels), generator=generator)[:heldout])


def _turned(images: Images, place: float, number: int) -> Batch:
    degrees = 90.0 * place / max(number - 1, 1)
    return _batch(images, rotate(images.pixels, torch.full((len(images.pixels),), degrees)))


def _batch(images: Images, pixels: Tensor) -> Batch:
    return {"pixel_values": 2 * pixels.flatten(1) - 1, "labels": images.labels}


def batches(data: Mapping[str, Tensor], size: int, epochs: int, generator: torch.Generator) -> Iterator[Batch]:
    """Shuffled batches over several passes.

    Args:
        data (`Mapping[str, Tensor]`): A task's part.
        size (`int`): Rows per batch.
        epochs (`int`): Passes.
        generator (`torch.Generator`): Of the order.

    Yields:
        `Batch`: Rows of the data.
    """
    for _ in range(epochs):
        for rows in torch.randperm(len(data["labels"]), generator=generator).split(size):
            yield {key: value[rows] for key, value in data.items()}


def joined(*parts: Mapping[str, Tensor]) -> Batch:
    """All rows of several parts."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@torch.no_grad()
def accuracy(model: nn.Module, data: Mapping[str, Tensor]) -> float:
    """Share of images that a model names rightly."""
    return float((model(**data).logits.argmax(-1) == data["labels"]).float().mean())
