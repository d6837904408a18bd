"""From a belief to the variance of every LoRA weight, and to the covariance of every LoRA factor."""

from collections.abc import Mapping

from torch import Tensor

from ..belief import Belief, BeliefError
from ..filtering.algebra import variances
from ..filtering.state import INFO, absolute, initial_belief, update
from ..precision.ekfac import EigenKroneckerPrecision
from .covariances import FactorCovariance


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
    return _variances(_state(belief, num_labels, prior_precision))


def factor_covariances(
    belief: Belief,
    *,
    num_labels: float | None = None,
    prior_precision: float | Mapping[str, float] | None = None,
    correlated: bool = True,
) -> dict[str, FactorCovariance]:
    """Covariance of every factor A and B, as far as single passes can use it.

    Args:
        belief (`Belief`): See [`weight_variances`].
        num_labels (`float`, *optional*): See [`weight_variances`].
        prior_precision (`float` or `Mapping[str, float]`, *optional*): See [`weight_variances`].
        correlated (`bool`, *optional*, defaults to `True`):
            Keep correlations within a factor where the belief is "kronecker" or "ekfac"; of other structures, and with
            `False`, the diagonal counts.

    Returns:
        `dict[str, FactorCovariance]`: By key.

    Raises:
        BeliefError: See [`weight_variances`].
        ValueError: See [`weight_variances`].
    """
    state = _state(belief, num_labels, prior_precision)
    precision = state.precision
    if correlated and isinstance(precision, EigenKroneckerPrecision):
        sides = precision.blocks.items()
        return {key: FactorCovariance.from_precision(*sides[key], cells) for key, cells in precision.cells.items()}
    return {key: FactorCovariance(v) for key, v in _variances(state).items()}


def _variances(state: Belief) -> dict[str, Tensor]:
    try:
        return variances(state.precision)
    except ValueError as error:
        raise BeliefError(f"{error} Use structure 'diagonal', 'low_rank', 'ekfac' or 'dense'.") from error


def _state(belief: Belief, num_labels: float | None, prior_precision: float | Mapping[str, float] | None) -> Belief:
    """The belief with its prior in it, counted absolutely."""
    if belief.precision.space != "adapter":
        raise BeliefError(
            f"A belief over {belief.precision.space} gives no variances of the factors A and B; fit it with "
            "space='adapter'."
        )
    if INFO in belief.info:
        if num_labels is not None or prior_precision is not None:
            raise ValueError(
                "num_labels and prior_precision are for beliefs counted per label; this one is a state of a filter, "
                "which holds both. Leave them out."
            )
        return belief
    if "curvature" not in belief.info and "num_labels" in belief.info:
        if prior_precision is not None:
            raise ValueError("prior_precision is for a curvature; a LoKO belief holds its prior. Leave it out.")
        return absolute(belief, num_labels)
    if num_labels is None or prior_precision is None:
        raise BeliefError(
            "The belief is a curvature per label, without a prior. Pass `num_labels`, the labels behind the "
            "posterior, and `prior_precision`, for the variances of (num_labels * curvature + prior_precision)^-1."
        )
    prior = initial_belief(belief.mean, prior_precision, belief.precision.structure, dtype=belief.precision.dtype)
    return update(prior, prior.mean, belief.precision, num_labels)
