"""From a belief to the variance of every LoRA weight, and to the covariance of every LoRA factor."""

from collections.abc import Mapping

from torch import Tensor

from ..belief import Belief, BeliefError
from ..filtering.algebra import variances
from ..precision.ekfac import EigenKroneckerPrecision
from .covariances import FactorCovariance
from .posterior import STRUCTURES, posterior


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
    return _variances(posterior(belief, num_labels, prior_precision))


def factor_covariances(
    belief: Belief,
    *,
    num_labels: float | None = None,
    prior_precision: float | Mapping[str, float] | None = None,
    structure: str = "full",
) -> dict[str, FactorCovariance]:
    """Covariance of every factor A and B, as far as single passes can use it.

    Args:
        belief (`Belief`): See [`weight_variances`].
        num_labels (`float`, *optional*): See [`weight_variances`].
        prior_precision (`float` or `Mapping[str, float]`, *optional*): See [`weight_variances`].
        structure (`str`, *optional*, defaults to `"full"`):
            "full" keeps correlations within a factor where the belief is "kronecker" or "ekfac", and of other
            structures the diagonal; "diagonal" the diagonal always.

    Returns:
        `dict[str, FactorCovariance]`: By key.

    Raises:
        BeliefError: See [`weight_variances`].
        ValueError: See [`weight_variances`].
    """
    state = posterior(belief, num_labels, prior_precision)
    precision = state.precision
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {list(STRUCTURES)}, got {structure!r}.")
    if structure == "full" and isinstance(precision, EigenKroneckerPrecision):
        sides = precision.blocks.items()
        return {key: FactorCovariance.from_precision(*sides[key], cells) for key, cells in precision.cells.items()}
    return {key: FactorCovariance(v) for key, v in _variances(state).items()}


def _variances(state: Belief) -> dict[str, Tensor]:
    try:
        return variances(state.precision)
    except ValueError as error:
        raise BeliefError(f"{error} Use structure 'diagonal', 'low_rank', 'ekfac' or 'dense'.") from error
