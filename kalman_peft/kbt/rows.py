"""A Gaussian over the rows of one weight: every row, with its bias, is a neuron with a covariance of its own.

The mean is the model's own parameter. Covariances are kept as factors F with F F^T = C, so that no sequence of updates
makes them lose their sign.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


FULL, DIAGONAL = "full", "diagonal"


class RowGaussian:
    """Mean and covariance of the N rows of a weight, independent of each other.

    Args:
        weight (`nn.Parameter`): (N, d), or (d, N) if `transposed`; holds the mean.
        bias (`nn.Parameter`, *optional*): (N,); one more entry of each row.
        prior_variance (`float`): Of every entry, >= 0.
        structure (`str`): "full": a covariance (d', d') per row, d' = d or d + 1. "diagonal": variances only.
        transposed (`bool`): Whether the weight is (d, N), as in GPT-2's Conv1D.

    Attributes:
        factor (`Tensor`): (N, d', d') with C = F F^T, or standard deviations (N, d').
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        prior_variance: float,
        structure: str = FULL,
        transposed: bool = False,
    ):
        self.weight, self.bias, self.transposed, self.structure = weight, bias, transposed, structure
        self.prior_variance = prior_variance
        like = self.rows()
        deviation = torch.full_like(like, prior_variance**0.5)
        self.factor = torch.diag_embed(deviation) if structure == FULL else deviation

    @property
    def parameters(self) -> list[Tensor]:
        """Weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @torch.no_grad()
    def rows(self) -> Tensor:
        """The mean, (N, d'): a copy."""
        weight = self.weight.detach().mT if self.transposed else self.weight.detach()
        return weight.clone() if self.bias is None else torch.cat([weight, self.bias.detach()[:, None]], 1)

    def slopes(self, gradients: Sequence[Tensor]) -> Tensor:
        """Derivatives of M outputs in weight and bias, as rows.

        Args:
            gradients (`Sequence[Tensor]`): For each of `parameters`, (M, *its shape).

        Returns:
            `Tensor`: (M, N, d').
        """
        weight = gradients[0].mT if self.transposed else gradients[0]
        return weight if self.bias is None else torch.cat([weight, gradients[1][..., None]], -1)

    def variances(self) -> Tensor:
        """Diagonal of the covariance, (N, d')."""
        return self.factor.square().sum(-1) if self.structure == FULL else self.factor.square()

    def covariance(self) -> Tensor:
        """(N, d', d')."""
        return self.factor @ self.factor.mT if self.structure == FULL else torch.diag_embed(self.factor.square())

    @torch.no_grad()
    def output_variance(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Variance of every row's product with an independent input: z^T C z + sum_i v_i (w_i^2 + C_ii).

        Args:
            mean (`Tensor`): z, (..., d).
            variance (`Tensor`): v, of the same shape.

        Returns:
            `Tensor`: (..., N).
        """
        z = mean.detach()
        if self.bias is not None:
            z = torch.cat([z, torch.ones_like(z[..., :1])], -1)
        flat = z.reshape(-1, z.shape[-1])  # (P, d')
        if self.structure == FULL:
            own = (flat @ self.factor).square().sum(-1).mT  # (N, P, d') -> (P, N)
        else:
            own = flat.square() @ self.factor.square().mT
        width = variance.shape[-1]
        weight = self.weight.detach().mT if self.transposed else self.weight.detach()
        second = weight.square() + self.variances()[:, :width]
        return own.reshape(*mean.shape[:-1], -1) + variance @ second.mT

    @torch.no_grad()
    def scaled(self, slopes: Tensor) -> Tensor:
        """V = G F, (M, N, d'), so that G C G^T = V V^T."""
        if self.structure == DIAGONAL:
            return slopes * self.factor
        return torch.einsum("mni,nij->mnj", slopes, self.factor)

    @torch.no_grad()
    def shifted(self, scaled: Tensor, message: Tensor) -> Tensor:
        """C G^T x, the change of the mean: (N, d').

        Args:
            scaled (`Tensor`): From [`scaled`].
            message (`Tensor`): x, (M,).
        """
        pull = torch.einsum("mni,m->ni", scaled, message)
        return pull * self.factor if self.structure == DIAGONAL else torch.einsum("nij,nj->ni", self.factor, pull)

    @torch.no_grad()
    def reduced(self, whitened: Tensor) -> Tensor:
        """The factor of C - C G^T S^-1 G C, by a root of I - V^T S^-1 V: no difference of covariances is taken.

        Args:
            whitened (`Tensor`): L^-1 V with S = L L^T, (M, N, d'); the Gram matrix of every row is below 1.

        Returns:
            `Tensor`: Of the factor's shape.
        """
        eps = torch.finfo(whitened.dtype).eps
        rows = whitened.transpose(0, 1)  # (N, M, d')
        if self.structure == DIAGONAL:
            return self.factor * (1 - rows.square().sum(1)).clamp(min=eps).sqrt()
        gram = rows @ rows.mT  # (N, M, M)
        values, vectors = (gram[..., 0], torch.ones_like(gram)) if gram.shape[-1] == 1 else torch.linalg.eigh(gram)
        values = values.clamp(min=0, max=1 - eps)
        # (1 - sqrt(1 - g)) / g, without cancellation
        shrink = 1 / (1 + (1 - values).sqrt())
        turned = vectors.mT @ rows  # (N, M, d')
        return torch.baddbmm(self.factor, self.factor @ turned.mT, shrink[..., None] * turned, alpha=-1)

    @torch.no_grad()
    def relaxed(self, share: float) -> Tensor:
        """The factor of (1 - share) C + share * prior.

        Args:
            share (`float`): In [0, 1]; 0 is no change.

        Returns:
            `Tensor`: Of the factor's shape.
        """
        if not share or not self.prior_variance:
            return self.factor
        if self.structure == DIAGONAL:
            return ((1 - share) * self.factor.square() + share * self.prior_variance).sqrt()
        mixed = (1 - share) * self.covariance()
        mixed.diagonal(dim1=-2, dim2=-1).add_(share * self.prior_variance)
        return torch.linalg.cholesky(mixed)

    @torch.no_grad()
    def write(self, rows: Tensor, factor: Tensor) -> None:
        """Put a new mean (N, d') and a new factor in place."""
        width = rows.shape[-1] - (self.bias is not None)
        weight = rows[:, :width]
        self.weight.copy_(weight.mT if self.transposed else weight)
        if self.bias is not None:
            self.bias.copy_(rows[:, -1])
        self.factor = factor.contiguous()  # as it comes back from a file: products round by layout
