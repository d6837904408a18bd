"""Block-tridiagonal Kronecker precision (LaLoRA's "B-Tri-KFAC"): the two factors of an adapter, coupled.

With the blocks in the order A_1, B_1, A_2, B_2, ..., the off-diagonal blocks between A_l and B_l join the diagonal
ones of B-KFAC; adapters stay independent of each other. With S = E[x x^T] the second moment of the layer's input and
Gamma = scaling^2 E[g g^T] that of its output gradient, u = A x and h = B^T g being linear in x and g,

    (A, A): B^T Gamma B (x) S    (A, B): B^T Gamma (x) S A^T    (B, B): Gamma (x) A S A^T

in row-major order, at the A, B of the expansion. All blocks are J^T (Gamma (x) S) J with J: (dA, dB) -> B dA + dB A:
the Kronecker curvature of the merged update, linearised where it was taken. So the matrix is positive semi-definite by
construction, for truncated Gamma and S too, and A_l, B_l and two second moments are all that is stored. Its null space
holds the gauge directions dA = M A, dB = -B M of every adapter: `solve`, `logdet` and `sample` need damping.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ..adapters import A_SUFFIX, B_SUFFIX
from .base import (
    AdapterPrecision,
    Precision,
    State,
    check_damping,
    check_factor,
    check_invertible,
    check_noise,
    normal,
    stack,
)
from .factor import EigenFactor, apply_cells
from .kronecker import KroneckerBlocks


_SYSTEM_BYTES = 2**28
_ILL_CONDITIONED = (
    "({1:.3g} * Lambda + {0:.3g} * I) is too ill-conditioned to be solved: the gauge directions of A and B have no "
    "precision but the damping. Use a larger `damping` (or a smaller step)."
)


class BlockTridiagonalPrecision(AdapterPrecision):
    """R = 1/2 sum_l tr[Gamma D S D^T], D = B dA + dB A, for dA = A_l - mean, dB = B_l - mean.

    Args:
        blocks (`KroneckerBlocks`): (Gamma, S) per module name.
        expansion (`Mapping[str, Tensor]`): The adapter's factors where the curvature was taken, by adapter key.
        process_noise (`float`, *optional*, defaults to 0.0):
            q of a prediction step that this precision has gone through: (Lambda^-1 + q I)^-1, kept as it stands.
    """

    structure = "block_tridiagonal"

    def __init__(self, blocks: KroneckerBlocks, expansion: Mapping[str, Tensor], process_noise: float = 0.0):
        check_noise(process_noise)
        self.blocks, self.process_noise = blocks, process_noise
        self.expansion = {
            name + suffix: expansion[name + suffix] for name in blocks.order for suffix in (A_SUFFIX, B_SUFFIX)
        }
        self._pairs = [_Pairs(names, g, s, self.expansion) for names, g, s in _by_rank(blocks, self.expansion)]

    @property
    def like(self) -> Tensor:
        """See `Precision.like`."""
        return next(iter(self.expansion.values()))

    def coordinates(self) -> dict[str, torch.Size]:
        """See `Precision.coordinates`."""
        return {key: x.shape for key, x in self.expansion.items()}

    def matvec(self, x: State) -> dict[str, Tensor]:
        """See `Precision.matvec`."""
        q = self.process_noise
        if q == 0:
            return self._each(x, lambda pairs, a, b: pairs.matvec(a, b))
        shrunk = self._each(x, lambda pairs, a, b: pairs.solve(a, b, 1.0, q))
        return self._each(shrunk, lambda pairs, a, b: pairs.matvec(a, b))

    def solve(self, x: State, damping: float = 0.0, scale: float = 1.0) -> dict[str, Tensor]:
        """See `Precision.solve`; damping must be positive."""
        check_damping(damping)
        check_invertible(torch.tensor(damping))
        q = self.process_noise
        # s Lambda (I + q Lambda)^-1 + d = ((s + q d) Lambda + d) (I + q Lambda)^-1
        y = self._each(x, lambda pairs, a, b: pairs.solve(a, b, damping, scale + q * damping))
        if q == 0:
            return y
        moved = self._each(y, lambda pairs, a, b: pairs.matvec(a, b))
        return {key: value + q * moved[key] for key, value in y.items()}

    def logdet(self, damping: float = 0.0, scale: float = 1.0) -> Tensor:
        """See `Precision.logdet`; -inf without damping."""
        check_damping(damping)
        if damping == 0:
            return self.like.new_tensor(-torch.inf)
        q = self.process_noise
        total = torch.stack([pairs.logdet(damping, scale + q * damping) for pairs in self._pairs]).sum()
        return total if q == 0 else total - torch.stack([pairs.logdet(1.0, q) for pairs in self._pairs]).sum()

    def sample(self, damping: float = 0.0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A draw from N(0, Lambda + damping I), solved for: its covariance is then the inverse."""
        check_damping(damping)
        check_invertible(torch.tensor(damping))
        noise: dict[str, Tensor] = {}
        for pairs in self._pairs:
            noise |= pairs.named(*pairs.draw(generator))
        # (Lambda (I + q Lambda)^-1 + d)^-1 = (q I + (c Lambda + d)^-1) / c with c = 1 + q d
        q, c = self.process_noise, 1 + self.process_noise * damping
        noise = {k: c**0.5 * x + damping**0.5 * normal(x.shape, x, generator) for k, x in noise.items()}
        draw = self._each(noise, lambda pairs, a, b: pairs.solve(a, b, damping, c))
        return {k: ((q**0.5 * normal(x.shape, x, generator) if q else 0) + x) / c**0.5 for k, x in draw.items()}

    def scale(self, factor: float) -> Self:
        """See `Precision.scale`."""
        check_factor(factor)
        return type(self)(self.blocks.scale(factor), self.expansion, self.process_noise / factor if factor else 0.0)

    def merge(self, other: Precision, weight: float = 1.0, other_weight: float = 1.0) -> Self:
        """Pool Gamma and S as B-KFAC does, for curvature taken at the same adapter weights.

        Raises:
            ValueError: The two were taken at different weights, or one has gone through a prediction step.
        """
        self._check_mergeable(other, weight, other_weight)
        assert isinstance(other, BlockTridiagonalPrecision)
        if self.process_noise or other.process_noise:
            raise ValueError("A block_tridiagonal precision cannot be merged after predict(); merge first.")
        if any(not torch.allclose(x, other.expansion[k].to(x)) for k, x in self.expansion.items()):
            raise ValueError(
                "Cannot merge block_tridiagonal precisions taken at different adapter weights; estimate both at one "
                "point, or use structure='kronecker'."
            )
        return type(self)(self.blocks.merge(other.blocks, weight, other_weight), self.expansion)

    def predict(self, process_noise: float) -> Self:
        """Exact: the noises of several steps add, and the matrix functions are evaluated where they are used."""
        check_noise(process_noise)
        return type(self)(self.blocks, self.expansion, self.process_noise + process_noise)

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """That of B-KFAC: the links are off the diagonal.

        Raises:
            ValueError: After `predict`, which leaves no closed form.
        """
        if self.process_noise:
            raise ValueError("A block_tridiagonal precision has no closed-form diagonal after predict().")
        result: dict[str, Tensor] = {}
        for pairs in self._pairs:
            result |= pairs.named(*pairs.diagonals())
        return result

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        expansion = {f"{key}:expansion": x for key, x in self.expansion.items()}
        return self.blocks.tensors() | expansion | {"process_noise": torch.tensor(self.process_noise).double()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        blocks = KroneckerBlocks.from_tensors({k: t for k, t in tensors.items() if ":left." in k or ":right." in k})
        expansion = {k.removesuffix(":expansion"): t for k, t in tensors.items() if k.endswith(":expansion")}
        return cls(blocks, expansion, tensors["process_noise"].item())

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        expansion = {key: x.to(device) for key, x in self.expansion.items()}
        return type(self)(self.blocks.to(device), expansion, self.process_noise)

    def _each(self, x: State, function: Any) -> dict[str, Tensor]:
        """Apply a function (pairs, dA, dB) -> (dA, dB) to every stack of adapters."""
        result: dict[str, Tensor] = {}
        for pairs in self._pairs:
            result |= pairs.named(*function(pairs, stack(x, pairs.keys_a, pairs.a), stack(x, pairs.keys_b, pairs.b)))
        return result


class _Pairs:
    """Adapters of equal shapes, stacked: n of them, with A (n, r, i) and B (n, o, r) of the expansion."""

    def __init__(self, names: list[str], gamma: EigenFactor, s: EigenFactor, expansion: State):
        self.keys_a, self.keys_b = [n + A_SUFFIX for n in names], [n + B_SUFFIX for n in names]
        self.gamma, self.s = gamma, s
        self.a, self.b = stack(expansion, self.keys_a, gamma.values), stack(expansion, self.keys_b, gamma.values)
        self.sa, self.gb = s.matmul(self.a.mT), gamma.matmul(self.b)  # (n, i, r), (n, o, r)
        self.u, self.h = self.a @ self.sa, self.b.mT @ self.gb  # (n, r, r)

    def named(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Split stacks into tensors by adapter key."""
        return dict(zip(self.keys_a + self.keys_b, [*a.unbind(0), *b.unbind(0)], strict=True))

    def matvec(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(B^T Gamma D S, Gamma D S A^T) for D = B a + b A."""
        from_a = self.h @ self.s.matmul(a.mT).mT + (self.gb.mT @ b) @ self.sa.mT
        from_b = self.gb @ (a @ self.sa) + self.gamma.matmul(b) @ self.u
        return from_a, from_b

    def diagonals(self) -> tuple[Tensor, Tensor]:
        """Diagonals of the (A, A) and (B, B) blocks."""
        a = self.h.diagonal(dim1=-2, dim2=-1)[..., :, None] * self.s.diagonal()[..., None, :]
        return a, self.gamma.diagonal()[..., :, None] * self.u.diagonal(dim1=-2, dim2=-1)[..., None, :]

    def draw(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """J^T (Gamma (x) S)^1/2 eps, from those r rows and r columns of the noise eps (o, i) that reach A and B."""
        left, right = _root(self.gamma), _root(self.s)
        q_left, r_left = torch.linalg.qr(left.matmul(self.b))  # (n, o, r), (n, r, r)
        q_right, r_right = torch.linalg.qr(right.matmul(self.a.mT))
        rows = normal(self.a.shape, self.a, generator)  # q_left^T eps
        columns = normal(self.b.shape, self.b, generator)  # eps q_right, once made to agree with the rows
        columns = columns + q_left @ (rows @ q_right - q_left.mT @ columns)
        return r_left.mT @ right.matmul(rows.mT).mT, left.matmul(columns) @ r_right

    def solve(self, a: Tensor, b: Tensor, damping: float, scale: float) -> tuple[Tensor, Tensor]:
        """(scale * Lambda + damping I)^-1 by the Schur complement of the (B, B) block, in float64.

        That complement is the Kronecker (A, A) block less a matrix of rank r^2: Woodbury once more.
        """
        f = _Factorised(self, damping, scale)
        p, q = a.double(), b.double()
        x, y = f.solve(p, q)
        left_a, left_b = f.residual(p, q, x, y)
        more_x, more_y = f.solve(left_a, left_b)  # one step of refinement
        x, y = x + more_x, y + more_y
        left = torch.stack([r.norm() for r in f.residual(p, q, x, y)]).norm()
        if not left <= 1e-3 * torch.stack([p.norm(), q.norm()]).norm():
            raise ValueError(_ILL_CONDITIONED.format(damping, scale))
        return x.to(a), y.to(b)

    def logdet(self, damping: float, scale: float) -> Tensor:
        """log det(scale * Lambda + damping I), summed over the stack."""
        return _Factorised(self, damping, scale).logdet().to(self.a)


class _Factorised:
    """The parts of (scale * Lambda + damping I)^-1 for one stack, in float64."""

    def __init__(self, pairs: _Pairs, damping: float, scale: float):
        gamma, self.s = _double(pairs.gamma), _double(pairs.s)
        self.gamma, self.a, self.b = gamma.scale(scale), pairs.a.double(), pairs.b.double()
        self.gb, self.sa = gamma.matmul(self.b), self.s.matmul(self.a.mT)
        self.u = EigenFactor.from_dense(self.a @ self.sa)
        self.h = EigenFactor.from_dense(scale * self.b.mT @ self.gb)
        self.damping, self.scale = damping, scale
        self.z = self.sa @ self.u.vectors  # (n, i, r)
        right = scale * self.gb @ self.h.vectors  # (n, o, r)
        # N_j = right^T (u_j Gamma + d)^-1 right, T_k = z^T (h_k S + d)^-1 z; (n, r, r, r) with j, k first
        self.root = _matrix_root(_quadratics(self.gamma, right, self.u.values, damping))
        t = _quadratics(self.s, self.z, self.h.values, damping)
        n, r = self.u.values.shape
        inner = torch.einsum("njka,nkjm,nmkb->njamb", self.root, t, self.root).reshape(n, r * r, r * r)
        self.cholesky, failed = torch.linalg.cholesky_ex(torch.eye(r * r).to(inner) - inner)
        if failed.any():
            raise ValueError(_ILL_CONDITIONED.format(damping, scale))

    def solve(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Solution for right-hand sides over A and B."""
        x = self.divide_complement(a - self.scale * (self.gb.mT @ self.divide_b(b)) @ self.sa.mT)
        return x, self.divide_b(b - self.scale * self.gb @ (x @ self.sa))

    def residual(self, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What (x, y) leaves of the right-hand sides."""
        along_a = self.b.mT @ self.gb @ self.s.matmul(x.mT).mT + (self.gb.mT @ y) @ self.sa.mT
        along_b = self.scale * self.gb @ (x @ self.sa) + self.gamma.matmul(y @ (self.a @ self.sa))
        return a - self.scale * along_a - self.damping * x, b - along_b - self.damping * y

    def divide_b(self, x: Tensor) -> Tensor:
        """(Gamma (x) U + d)^-1 x."""
        cells = 1 / (self.gamma.extended[..., :, None] * self.u.extended[..., None, :] + self.damping)
        return apply_cells(self.gamma, self.u, cells, x)

    def divide_a(self, x: Tensor) -> Tensor:
        """(H (x) S + d)^-1 x."""
        cells = 1 / (self.h.extended[..., :, None] * self.s.extended[..., None, :] + self.damping)
        return apply_cells(self.h, self.s, cells, x)

    def divide_complement(self, x: Tensor) -> Tensor:
        """(H (x) S + d - sum_j N_j (x) z_j z_j^T)^-1 x."""
        y = self.divide_a(x)
        w = torch.einsum("njka,nkj->nja", self.root, self.h.vectors.mT @ y @ self.z)
        w = torch.cholesky_solve(w.flatten(1)[..., None], self.cholesky).view_as(w)
        w = torch.einsum("njka,nja->nkj", self.root, w)
        return y + self.divide_a(self.h.vectors @ w @ self.z.mT)

    def logdet(self) -> Tensor:
        """Of the (B, B) block and of its Schur complement."""
        total = 2 * self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum()
        for left, right in ((self.gamma, self.u), (self.h, self.s)):
            times = left.multiplicity[:, None] * right.multiplicity
            logs = (left.extended[..., :, None] * right.extended[..., None, :] + self.damping).log()
            total = total + (times * logs).sum()
        return total


def _by_rank(blocks: KroneckerBlocks, expansion: State) -> Iterator[tuple[list[str], EigenFactor, EigenFactor]]:
    """Walk over stacks of equal shapes and rank, of which the r^2 x r^2 systems of one stack fit into memory.

    Yields:
        tuple: names, Gamma, S.
    """
    for names, gamma, s in blocks.groups:
        by_rank: dict[int, list[int]] = {}
        for j, name in enumerate(names):
            by_rank.setdefault(expansion[name + A_SUFFIX].shape[0], []).append(j)
        for rank, chosen in by_rank.items():
            most = max(_SYSTEM_BYTES // (8 * rank**4), 1)
            for start in range(0, len(chosen), most):
                part = chosen[start : start + most]
                yield [names[j] for j in part], gamma[part], s[part]


def _double(factor: EigenFactor) -> EigenFactor:
    """The factor in float64, its vectors made orthonormal to that precision."""
    vectors, triangle = torch.linalg.qr(factor.vectors.double())
    vectors = vectors * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return EigenFactor(vectors, factor.values.double(), factor.tail.double())


def _root(factor: EigenFactor) -> EigenFactor:
    return EigenFactor(factor.vectors, factor.values.sqrt(), factor.tail.sqrt())


def _quadratics(factor: EigenFactor, x: Tensor, weights: Tensor, damping: float) -> Tensor:
    """x^T (w_j F + d)^-1 x for every weight; x (n, size, r), weights (n, m) -> (n, m, r, r)."""
    inside = factor.vectors.mT @ x  # (n, k, r)
    kept = 1 / (weights[..., :, None] * factor.values[..., None, :] + damping)  # (n, m, k)
    result = torch.einsum("nkp,nmk,nkq->nmpq", inside, kept, inside)
    if factor.is_complete:
        return result
    outside = x.mT @ x - inside.mT @ inside  # (n, r, r)
    return result + outside[:, None] / (weights * factor.tail[..., None] + damping)[..., None, None]


def _matrix_root(x: Tensor) -> Tensor:
    """R with R R^T = x, for positive semi-definite x."""
    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]
