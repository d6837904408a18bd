"""Random draws for scores: labels from rows of probabilities, signs, and noise."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RowRandom:
    """Random numbers that belong to their row, not to the order in which rows are asked for.

    A counter-based generator: words are splitmix64 hashes (Steele, Lea and Flood, 2014) of seed, row key and column.
    However rows are spread over processes or micro-batches, each gets the same numbers.

    Args:
        keys (`Tensor`): One int64 key per row, shape (N,), different for different rows.
        seed (`int`): Of all rows.
    """

    def __init__(self, keys: Tensor, seed: int):
        self.state = _mix(_mix(keys.long()) ^ _signed(seed * 0x9E3779B97F4A7C15))

    def words(self, count: int) -> Tensor:
        """`count` random 64-bit words per row, (N, count), int64."""
        columns = torch.arange(1, count + 1, device=self.state.device) * _GOLDEN
        return _mix(self.state[:, None] + columns)

    def uniform(self, count: int) -> Tensor:
        """Uniform on [0, 1), (N, count), float64."""
        return _shift(self.words(count), 11).double() * 2.0**-53

    def normal(self, count: int) -> Tensor:
        """Standard normal by Box and Muller, (N, count), float64."""
        radius, angle = self.uniform(2 * count).chunk(2, dim=1)
        return (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()

    def signs(self, count: int) -> Tensor:
        """+1 or -1, (N, count), int8: one bit each."""
        octets = self.words(-(-count // 64)).view(torch.uint8)  # (N, 8 * words)
        bits = (octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
        return bits.flatten(1)[:, :count].to(torch.int8) * 2 - 1


Random = torch.Generator | RowRandom | None


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(words: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's own copies the sign bit."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _mix(words: Tensor) -> Tensor:
    words = words + _GOLDEN
    words = (words ^ _shift(words, 30)) * _FIRST
    words = (words ^ _shift(words, 27)) * _SECOND
    return words ^ _shift(words, 31)


def normal_noise(shape: Sequence[int], like: Tensor, random: Random = None) -> Tensor:
    """Standard normal noise in the dtype and on the device of `like`.

    Args:
        shape (`Sequence[int]`): Of the result, (N, ...).
        like (`Tensor`): Gives dtype and device.
        random (`torch.Generator` or `RowRandom`, *optional*): Where it comes from.

    Returns:
        `Tensor`: Of the given shape.
    """
    if isinstance(random, RowRandom):
        return random.normal(math.prod(shape[1:])).to(like).view(*shape)
    device = random.device if random is not None else like.device
    return torch.randn(*shape, generator=random, device=device, dtype=like.dtype).to(like.device)


def invert_cdf(probabilities: Tensor, random: Random = None, block: int = 256) -> Tensor:
    """Draw one index per row of probabilities, by inversion of a two-level cumulative sum.

    `torch.multinomial` needs a random number per entry of the vocabulary, this one per row.

    Args:
        probabilities (`Tensor`): Float32 rows that sum to one, shape (N, V).
        random (`torch.Generator` or `RowRandom`, *optional*): A generator on the CPU or the probabilities' device.
        block (`int`, *optional*, defaults to 256): Width of the lower level.

    Returns:
        `Tensor`: Indices, shape (N,), int64; none without probability.
    """
    rows, width = probabilities.shape
    if isinstance(random, RowRandom):
        u = random.uniform(1)[:, 0].to(probabilities)
    else:
        device = random.device if random is not None else probabilities.device
        u = torch.rand(rows, generator=random, device=device, dtype=probabilities.dtype).to(probabilities.device)
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


def random_signs(shape: Sequence[int], like: Tensor, random: Random = None) -> Tensor:
    """Independent signs, +1 or -1 with equal probability.

    Args:
        shape (`Sequence[int]`): Of the result.
        like (`Tensor`): Gives dtype and device.
        random (`torch.Generator` or `RowRandom`, *optional*): A generator on the CPU or the device of `like`.

    Returns:
        `Tensor`: Of the given shape.
    """
    if isinstance(random, RowRandom):
        return random.signs(math.prod(shape[1:])).to(like).view(*shape)
    device = random.device if random is not None else like.device
    count = math.prod(shape)
    # Eight signs from each random number: the lowest bits of its bytes, all below the 63 bits that are random.
    numbers = torch.empty(-(-count // 8), dtype=torch.int64, device=device).random_(generator=random)
    bits = numbers.view(torch.int8)[:count].bitwise_and_(1)
    return bits.mul_(2).sub_(1).to(like.device, like.dtype).view(*shape)
