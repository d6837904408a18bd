"""LoKO as published (Abdi et al., 2024, arXiv:2410.11551), as far as we could reconstruct it.

The full text was not at hand; this is what its abstract, reviews and public summaries say, and, where they are
silent, our reading. State theta with identity dynamics and a diagonal covariance p, p_0 ~ U[0, bound] per weight; one
row of H = d y^ / d theta for each output y^ (class probabilities, or values) of each sample; e = y - y^:
    R^ = e e^T + H diag(p) H^T,  R_k = beta R_{k-1} + (1 - beta) R^        (C, C), the mean over a batch
    S = H diag(p) H^T + R,  K = diag(p) H^T S^-1,  theta <- theta + K e,  p <- diag((I - K H) diag(p))
A batch stacks its samples' rows. Ours: R_0 is the first R^; H diag(p) H^T in R^ is taken within each sample.

Whitened by R^-1/2, rows and residuals become columns and a score of the general filter,
C = H^T R^-1/2 and g = H^T R^-1 e.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..distributed import all_rows
from ..observations import CategoricalObservation, GaussianObservation
from .harvest import Evidence, Harvest, Plan
from .memories import Memory
from .rows import Rows


def output_rows(rows: Rows) -> tuple[Tensor, Tensor]:
    """Cotangents of each output of each sample, (C, B, C), and the residuals y - y^, (B, C).

    Raises:
        ValueError: Not one label per sample, or outputs that are neither class probabilities nor values.
    """
    if rows.logits.dim() != 2:
        raise ValueError(
            "mode='paper' needs one label per sequence (classification or regression); use mode='kalman' for tokens."
        )
    p = rows.expected
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    if isinstance(rows.observation, CategoricalObservation):
        cotangents = p.T[:, :, None] * (eye[:, None, :] - p)  # d p_c / d z = p_c (e_c - p)
        return cotangents, eye[rows.targets] - p
    if isinstance(rows.observation, GaussianObservation):
        return eye[:, None, :].expand(-1, len(p), -1), rows.targets - p
    raise ValueError(f"mode='paper' is not supported for {type(rows.observation).__name__}.")


def update_noise(
    noise: Tensor | None, columns: list[Tensor], residuals: Tensor, memories: list[Memory], decay: float
) -> Tensor:
    """R_k, (C, C), float64.

    Args:
        noise (`Tensor`, *optional*): R_{k-1}.
        columns (`list[Tensor]`): H per view, (B * C, *shape), the outputs of a sample in a row.
        residuals (`Tensor`): e, (B, C).
        memories (`list[Memory]`): Of the views.
        decay (`float`): beta.

    Returns:
        `Tensor`: Symmetric, positive semi-definite.
    """
    batch, outputs = residuals.shape
    spread = torch.zeros(outputs, outputs, dtype=torch.float64, device=residuals.device)
    for memory, c in zip(memories, columns, strict=True):
        rows = c.reshape(batch, outputs, -1)
        gained = memory.gain(c).reshape(batch, outputs, -1)
        spread += (rows @ gained.mT).double().mean(0)
    e = residuals.double()
    estimate = e.mT @ e / batch + (spread + spread.mT) / 2
    return estimate if noise is None else decay * noise + (1 - decay) * estimate


def whiten(noise: Tensor, columns: list[Tensor], residuals: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Scores H^T R^-1 e and columns H^T R^-1/2, per view.

    Class probabilities sum to one, which leaves R singular along the ones, where H is zero as well: that direction is
    left out.
    """
    batch, outputs = residuals.shape
    values, vectors = torch.linalg.eigh(noise)
    real = values > values[-1] * 1e-9
    root = vectors * torch.where(
        real, values.clamp_min(1e-300).rsqrt(), torch.zeros_like(values)
    )  # R^-1 = root root^T
    weights = residuals.double() @ root @ root.mT
    scores, whitened = [], []
    for c in columns:
        rows = c.reshape(batch, outputs, *c.shape[1:])
        scores.append(torch.tensordot(weights.to(c), rows, 2))
        whitened.append(torch.einsum("bc...,ck->bk...", rows, root.to(c)).reshape(c.shape))
    return scores, whitened


def whiten_evidence(
    state: dict[str, Tensor], memories: list[Memory], evidence: Evidence, residuals: Tensor, decay: float
) -> Evidence:
    """Rows and residuals as columns and a score.

    Args:
        state (`dict[str, Tensor]`): Holds R_{k-1}, if there is one, as "observation_noise"; takes R_k.
        memories (`list[Memory]`): Of the views.
        evidence (`Evidence`): With H as its columns.
        residuals (`Tensor`): e, (B, C).
        decay (`float`): beta.

    Returns:
        `Evidence`: As the general filter takes it.
    """
    assert evidence.columns is not None
    noise = update_noise(state.get("observation_noise"), evidence.columns, residuals, memories, decay)
    state["observation_noise"] = noise
    scores, columns = whiten(noise, evidence.columns, residuals)
    return replace(evidence, scores=scores, columns=columns)


class PaperHarvest(Harvest):
    """Rows of the output Jacobian and residuals, in place of scores and columns."""

    def clear(self) -> None:
        """See `Harvest.clear`."""
        super().clear()
        self._residuals: list[Tensor] = []

    def residuals(self) -> Tensor:
        """y - y^ of all processes, (B, C)."""
        return all_rows(torch.cat(self._residuals))

    def _joined(self, max_columns: int, seed: int) -> list[Tensor]:
        return self._all_columns()  # in the order of the residuals

    def _take(self, logits: Tensor, rows: Rows, plan: Plan, first: int) -> None:
        cotangents, residuals = output_rows(rows)
        outputs = []
        for k, cotangent in enumerate(cotangents):
            _, columns = self._backward(logits, rows.place(cotangent), k < len(cotangents) - 1, per_sequence=True)
            outputs.append([c[rows.owner] for c in columns])
        # (C, B, ...) to (B * C, ...): the outputs of a sample in a row
        self._columns.append([torch.stack(list(parts), dim=1).flatten(0, 1) for parts in zip(*outputs, strict=True)])
        self._residuals.append(residuals)

    def add(self, logits: Tensor, rows: Rows, plan: Plan, squares: float = 0.0) -> None:
        """See `Harvest.add`."""
        super().add(logits, rows, plan, squares)
        if not self._residuals:  # nothing was observed: an empty share, of the right width
            self._residuals.append(rows.expected.new_zeros(0, logits.shape[-1]))
