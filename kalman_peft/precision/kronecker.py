"""Kronecker-factored precision, one block per LoRA factor (LaLoRA's "B-KFAC").

For a factor M of shape (o, i) the block is L (x) R in row-major vec order: vec(X)^T (L (x) R) vec(X) = tr(X^T L X R).
L is the second moment of the factor's output gradients, R of its inputs (Martens and Grosse, 2015, eq. 5).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .base import (
    AdapterPrecision,
    Precision,
    State,
    check_damping,
    check_factor,
    check_invertible,
    diffuse,
    noise_by_block,
    normal,
    stack,
)
from .factor import EigenFactor, apply_cells


class Group(NamedTuple):
    """Blocks whose factors have equal shapes, stacked."""

    names: list[str]
    left: EigenFactor
    right: EigenFactor


class KroneckerBlocks:
    """Named pairs of factors, stored stacked by signature so that a step makes few, large products.

    A right factor that several names share (the inputs of q, k and v, or of gate and up) is held once, in memory and
    in files; it is shared if it is the same object.

    Args:
        blocks (`Mapping[str, tuple[EigenFactor, EigenFactor]]`): (left, right) per name.
    """

    def __init__(self, blocks: Mapping[str, tuple[EigenFactor, EigenFactor]]):
        names: dict[tuple, list[str]] = {}
        for name, (left, right) in blocks.items():
            names.setdefault(left.signature + right.signature, []).append(name)
        self.order = list(blocks)
        unique: dict[tuple[int, int], dict[int, EigenFactor]] = {}
        for _, right in blocks.values():
            unique.setdefault(right.signature, {})[id(right)] = right
        self._rights = {s: EigenFactor.stack(list(found.values())) for s, found in unique.items()}
        places = {key: j for found in unique.values() for j, key in enumerate(found)}
        self._groups = [
            (
                group,
                EigenFactor.stack([blocks[n][0] for n in group]),
                signature[2:],
                [places[id(blocks[n][1])] for n in group],
            )
            for signature, group in names.items()
        ]

    @property
    def groups(self) -> Iterator[Group]:
        """Walk over the stacks; shared right factors are repeated for the time of use.

        Yields:
            Group: names, left and right factors, stacked along the first dimension.
        """
        for names, left, signature, places in self._groups:
            rights = self._rights[signature]
            whole = places == list(range(rights.values.shape[0]))
            yield Group(names, left, rights if whole else rights[places])

    def items(self) -> dict[str, tuple[EigenFactor, EigenFactor]]:
        """The blocks as views, in the order they were given; a shared factor is one object."""
        rights = {s: [stacked[j] for j in range(len(stacked.values))] for s, stacked in self._rights.items()}
        found = {
            name: (left[j], rights[signature][place])
            for names, left, signature, places in self._groups
            for j, (name, place) in enumerate(zip(names, places, strict=True))
        }
        return {name: found[name] for name in self.order}

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors for a file; a shared right factor is written once, others name its owner."""
        result: dict[str, Tensor] = {}
        owners: dict[int, str] = {}
        for name, (left, right) in self.items().items():
            result |= left.tensors(f"{name}:left")
            owner = owners.setdefault(id(right), name)
            if owner == name:
                result |= right.tensors(f"{name}:right")
            else:  # the owner's name in UTF-8
                result[f"{name}:right.owner"] = torch.tensor(list(owner.encode()), dtype=torch.uint8)
        return result

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Inverse of `tensors`; raises KeyError where one is missing."""
        names = dict.fromkeys(key.rsplit(":", 1)[0] for key in tensors)
        rights = {
            name: EigenFactor.from_tensors(tensors, f"{name}:right")
            for name in names
            if f"{name}:right.owner" not in tensors
        }
        owner = {
            name: bytes(tensors[f"{name}:right.owner"].tolist()).decode() if name not in rights else name
            for name in names
        }
        return cls({n: (EigenFactor.from_tensors(tensors, f"{n}:left"), rights[owner[n]]) for n in names})

    def to(self, device: torch.device | str) -> Self:
        """The blocks on `device`."""
        return self._map(lambda f: f.to(device), lambda f: f.to(device))

    def scale(self, factor: float) -> Self:
        """factor * L (x) R."""
        return self._map(lambda f: f.scale(factor), lambda f: f)

    def merge(self, other: "KroneckerBlocks", weight: float, other_weight: float) -> Self:
        """Pool both sides of every block, see `KroneckerAlgebra.merge`."""
        total = weight + other_weight
        mine, theirs = self.items(), other.items()
        shared: dict[tuple[int, int], EigenFactor] = {}
        merged = {}
        for name, (left, right) in mine.items():
            key = (id(right), id(theirs[name][1]))
            if key not in shared:
                shared[key] = right.merge(theirs[name][1], weight / total, other_weight / total)
            merged[name] = (left.merge(theirs[name][0], weight, other_weight), shared[key])
        return type(self)(merged)

    def _map(self, left: Any, right: Any) -> Self:
        items = self.items()
        rights = {id(r): right(r) for _, r in items.values()}
        return type(self)({name: (left(mine), rights[id(r)]) for name, (mine, r) in items.items()})


class EigenbasisAlgebra(Precision):
    """The linear algebra of blocks that are diagonal in a Kronecker-factored eigenbasis (L and R's, or E itself)."""

    blocks: KroneckerBlocks

    def _cells(self) -> Iterator[tuple[Group, Tensor]]:
        """Walk over the stacks.

        Yields:
            tuple: The stack, and its eigenvalues (n, k_left + 1, k_right + 1), complements last.
        """
        raise NotImplementedError

    @property
    def like(self) -> Tensor:
        """See `Precision.like`."""
        return self.blocks._groups[0][1].values

    def coordinates(self) -> dict[str, torch.Size]:
        """See `Precision.coordinates`."""
        return {name: torch.Size((left.size, right.size)) for name, (left, right) in self.blocks.items().items()}

    def matvec(self, x: State) -> dict[str, Tensor]:
        """See `Precision.matvec`."""
        return self._apply(x, lambda cells: cells)

    def solve(self, x: State, damping: float = 0.0, scale: float = 1.0) -> dict[str, Tensor]:
        """See `Precision.solve`."""
        check_damping(damping)
        self._check_invertible(damping)
        return self._apply(x, lambda cells: 1 / (scale * cells + damping))

    def logdet(self, damping: float = 0.0, scale: float = 1.0) -> Tensor:
        """See `Precision.logdet`."""
        check_damping(damping)
        total = []
        for group, cells in self._cells():
            times = group.left.multiplicity[:, None] * group.right.multiplicity
            # xlogy-like: a complement of no dimension counts nothing, whatever its eigenvalue
            logs = torch.where(times > 0, (scale * cells + damping).log(), 0.0)
            total.append((times * logs).sum())
        return torch.stack(total).sum()

    def sample(self, damping: float = 0.0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """See `Precision.sample`."""
        check_damping(damping)
        self._check_invertible(damping)
        like = self.like
        noise = {name: normal(shape, like, generator) for name, shape in self.coordinates().items()}
        return self._apply(noise, lambda cells: (cells + damping).rsqrt())

    def _apply(self, x: State, function: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for group, cells in self._cells():
            stacked = stack(x, group.names, group.left.values)  # (n, o, i)
            y = apply_cells(group.left, group.right, function(cells), stacked)
            result.update(zip(group.names, y.unbind(0), strict=True))
        return result

    def _check_invertible(self, damping: float) -> None:
        if damping > 0:
            return
        for group, cells in self._cells():
            real = (group.left.multiplicity[:, None] * group.right.multiplicity) > 0
            for block in cells[:, real]:
                check_invertible(block.min(), block.max())

    def named_cells(self) -> dict[str, Tensor]:
        """Eigenvalues by name, (k_left + 1, k_right + 1); complements last."""
        return {n: c for group, cells in self._cells() for n, c in zip(group.names, cells.unbind(0), strict=True)}

    def _cell_diagonals(self) -> dict[str, Tensor]:
        """Diagonal of every block in its own coordinates."""
        result: dict[str, Tensor] = {}
        for group, cells in self._cells():
            y = squares(group.left) @ cells @ squares(group.right).mT  # (n, o, i)
            result.update(zip(group.names, y.unbind(0), strict=True))
        return result


class KroneckerAlgebra(EigenbasisAlgebra):
    """Blocks L (x) R."""

    structure = "kronecker"

    def __init__(self, blocks: KroneckerBlocks):
        self.blocks = blocks

    def _with(self, blocks: KroneckerBlocks) -> Any:
        return type(self)(blocks)

    def _cells(self) -> Iterator[tuple[Group, Tensor]]:
        for group in self.blocks.groups:
            yield group, group.left.extended[..., :, None] * group.right.extended[..., None, :]

    def matvec(self, x: State) -> dict[str, Tensor]:
        """L x R, see `Precision.matvec`."""
        result: dict[str, Tensor] = {}
        for names, left, right in self.blocks.groups:
            y = right.matmul(left.matmul(stack(x, names, left.values)).mT).mT
            result.update(zip(names, y.unbind(0), strict=True))
        return result

    def scale(self, factor: float) -> Self:
        """See `Precision.scale`."""
        check_factor(factor)
        return self._with(self.blocks.scale(factor))

    def merge(self, other: Precision, weight: float = 1.0, other_weight: float = 1.0) -> Self:
        """Pool the factors: (w L + w' L') (x) (w R + w' R') / (w + w'), what data of both would have given.

        Equal to the weighted sum where either side agrees; long sides are cut to their rank again, with their trace.
        """
        self._check_mergeable(other, weight, other_weight)
        assert isinstance(other, KroneckerAlgebra)
        return self._with(self.blocks.merge(other.blocks, weight, other_weight))

    def predict(self, process_noise: float | Mapping[str, float | Tensor]) -> Precision:
        """Exact, elementwise in the joint eigenbasis: no Kronecker product any more, but eigenvalue-corrected.

        Args:
            process_noise (`float` or `Mapping[str, float | Tensor]`): Variance q, for all weights or by block.

        Returns:
            `Precision`: Eigenvalue-corrected, in the same bases.
        """
        noise = noise_by_block(process_noise, self.blocks.order)
        return self._corrected({name: diffuse(cell, noise[name]) for name, cell in self.named_cells().items()})

    def _corrected(self, cells: dict[str, Tensor]) -> Precision:
        """The eigenvalue-corrected precision in the same basis."""
        raise NotImplementedError


class KroneckerPrecision(KroneckerAlgebra, AdapterPrecision):
    """R = 1/2 sum_M tr[(M - M_0)^T L (M - M_0) R].

    Args:
        blocks (`KroneckerBlocks`): One block per adapter key.
    """

    def _corrected(self, cells: dict[str, Tensor]) -> Precision:
        from .ekfac import EigenKroneckerPrecision

        return EigenKroneckerPrecision(self.blocks, cells)

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """diag(L) diag(R)^T per factor."""
        return self._cell_diagonals()

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        return self.blocks.tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        return cls(KroneckerBlocks.from_tensors(tensors))

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        return type(self)(self.blocks.to(device))


def squares(factor: EigenFactor) -> Tensor:
    """Squared entries of the basis and, last, the diagonal of the complement's projector; (n, size, k + 1)."""
    inside = factor.vectors.square()
    return torch.cat([inside, (1 - inside.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
