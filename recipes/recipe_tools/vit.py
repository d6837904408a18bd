"""A small Vision Transformer, trained here on upright images: no pre-trained one of its size is published."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup, set_seed

from .images import CLASSES, Images
from .offline import build_once, default_cache_dir


# Pixels per side of a patch, by pixels per side of an image: 16 or 64 patches.
PATCHES = {8: 2, 28: 7, 32: 4}


@dataclass(frozen=True)
class Pretraining:
    """How the model is made and trained; a change of any of these trains another one.

    Attributes:
        images (`int`): At most so many of the training images.
        epochs (`int`): Passes over them.
        hidden_size (`int`): Width; four heads, the MLP is twice as wide.
        layers (`int`): Blocks.
        batch_size (`int`): Images per step.
        learning_rate (`float`): Peak of AdamW's, with warm-up and cosine decay.
        seed (`int`): Of weights and order.
    """

    images: int = 20_000
    epochs: int = 6
    hidden_size: int = 96
    layers: int = 4
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


def normalise(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] to [-1, 1], as the model takes them."""
    return 2 * pixels - 1


def pretrained_vit(task: str, images: Images, how: Pretraining, cache_dir: Path | None = None) -> Path:
    """Return a ViT trained on upright images, from the cache if it is there.

    Args:
        task (`str`): Names the images in the cache.
        images (`Images`): To train on; square, of 8, 28 or 32 pixels per side.
        how (`Pretraining`): Model and training.
        cache_dir (`Path`, *optional*): Parent of the checkpoint; by default [`default_cache_dir`].

    Returns:
        `Path`: A folder for `from_pretrained`.

    Raises:
        ValueError: The images are of another size.
    """
    images = images.select(torch.arange(min(how.images, len(images.labels))))
    size = images.pixels.shape[-1]
    if size not in PATCHES or images.pixels.shape[-2] != size:
        raise ValueError(f"Images of shape {tuple(images.pixels.shape[1:])}; expected squares of {list(PATCHES)}.")
    # The images' own mark is part of the name: another source of the same task trains another model.
    marks = [float(images.pixels.double().sum()), images.labels.tolist()]
    key = hashlib.sha256(json.dumps([asdict(how), marks]).encode()).hexdigest()[:12]
    return build_once(
        (cache_dir or default_cache_dir()) / f"vit-{task}-{key}", lambda folder: _train(images, how, folder)
    )


def _train(images: Images, how: Pretraining, folder: Path) -> None:
    set_seed(how.seed)
    size = images.pixels.shape[-1]
    config = ViTConfig(
        image_size=size,
        patch_size=PATCHES[size],
        num_channels=images.pixels.shape[1],
        hidden_size=how.hidden_size,
        num_hidden_layers=how.layers,
        num_attention_heads=4,
        intermediate_size=2 * how.hidden_size,
    )
    config.num_labels = CLASSES
    model = ViTForImageClassification(config).train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=0.05)
    steps = -(-len(images.labels) // how.batch_size) * how.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    order = torch.Generator().manual_seed(how.seed)
    bar = tqdm(total=steps, desc="pre-training on upright images")
    for _ in range(how.epochs):
        for part in torch.randperm(len(images.labels), generator=order).split(how.batch_size):
            batch = images.select(part)
            logits = model(pixel_values=normalise(batch.pixels).to(device)).logits
            loss = cross_entropy(logits, batch.labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()
    model.save_pretrained(folder)
