"""Random draws for scores: labels from rows of probabilities, and signs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def invert_cdf(probabilities: Tensor, generator: torch.Generator | None = None, block: int = 256) -> Tensor:
    """Draw one index per row of probabilities, by inversion of a two-level cumulative sum.

    `torch.multinomial` needs a random number per entry of the vocabulary, this one per row.

    Args:
        probabilities (`Tensor`): Float32 rows that sum to one, shape (N, V).
        generator (`torch.Generator`, *optional*): On the CPU or the device of the probabilities.
        block (`int`, *optional*, defaults to 256): Width of the lower level.

    Returns:
        `Tensor`: Indices, shape (N,), int64; none without probability.
    """
    rows, width = probabilities.shape
    device = generator.device if generator is not None else probabilities.device
    u = torch.rand(rows, generator=generator, device=device, dtype=probabilities.dtype).to(probabilities.device)
    padded = nn.functional.pad(probabilities, (0, -width % block)) if width % block else probabilities
    blocks = padded.view(rows, -1, block)
    mass = blocks.sum(-1)  # (N, V / block)
    chosen, left = _invert(mass, u * mass.sum(-1))
    inner = blocks[torch.arange(rows, device=blocks.device), chosen]  # (N, block)
    offset, _ = _invert(inner, left)
    return (chosen * block + offset).clamp_(max=width - 1)


def _invert(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index at which the cumulative mass exceeds `target`, and what is left of the target inside it."""
    cumulative = mass.cumsum(-1)  # (N, n)
    # Rounding may leave the target at or above the total: stay below, so that no entry without mass is drawn.
    target = torch.minimum(target, torch.nextafter(cumulative[:, -1], torch.zeros_like(target)))
    index = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1).clamp_(max=mass.shape[-1] - 1)
    start = cumulative.gather(1, index[:, None]).squeeze(1) - mass.gather(1, index[:, None]).squeeze(1)
    return index, (target - start).clamp_(min=0)


def random_signs(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent signs, +1 or -1 with equal probability.

    Args:
        shape (`Sequence[int]`): Of the result.
        like (`Tensor`): Gives dtype and device.
        generator (`torch.Generator`, *optional*): On the CPU or the device of `like`.

    Returns:
        `Tensor`: Of the given shape.
    """
    device = generator.device if generator is not None else like.device
    count = math.prod(shape)
    # Eight signs from each random number: the lowest bits of its bytes, all below the 63 bits that are random.
    numbers = torch.empty(-(-count // 8), dtype=torch.int64, device=device).random_(generator=generator)
    bits = numbers.view(torch.int8)[:count].bitwise_and_(1)
    return bits.mul_(2).sub_(1).to(like.device, like.dtype).view(*shape)
