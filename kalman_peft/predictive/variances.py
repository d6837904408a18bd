"""From a belief to the variance of every LoRA weight: the diagonal of its covariance."""

from collections.abc import Mapping

from torch import Tensor

from ..belief import Belief, BeliefError
from ..filtering.algebra import variances
from .posterior import posterior


def weight_variances(
    belief: Belief,
    *,
    num_labels: float | None = None,
    prior_precision: float | Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Marginal variances of the adapter's weights.

    Three kinds of belief are told apart. A state of a filter says all itself. A [`LoKO`] belief is counted per label
    and holds its prior: `num_labels` is by default the number that it records. A curvature ([`Belief.fit`]) is counted
    per label too and is singular: its posterior is (num_labels * curvature + prior_precision)^-1, for which both
    numbers must be given. Correlations between weights are left out.

    Args:
        belief (`Belief`): In the space of the adapter's weights; of any structure but "block_tridiagonal".
        num_labels (`float`, *optional*): Labels behind the posterior, > 0.
        prior_precision (`float` or `Mapping[str, float]`, *optional*):
            Of a curvature's prior, > 0, for all weights or by pattern as in [`initial_belief`].

    Returns:
        `dict[str, Tensor]`: One tensor per key, of the factor's shape.

    Raises:
        BeliefError: The belief is over DW, of a structure whose variances are not known, or lacks a number.
        ValueError: A number is out of range, or given to a belief that does not take it.
    """
    state = posterior(belief, num_labels, prior_precision)
    try:
        return variances(state.precision)
    except ValueError as error:
        raise BeliefError(f"{error} Use structure 'diagonal', 'low_rank', 'ekfac' or 'dense'.") from error
