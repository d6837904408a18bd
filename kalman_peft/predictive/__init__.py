"""Predictive uncertainty of a model whose adapter is a belief: means and variances through its own forward."""

from .modules import register_rule, slope_rule
from .moments import probit_probabilities
from .streamlined import streamlined
from .tensor import MomentTensor, NoMomentRule, mean_of, variance_of, with_variance
from .variances import weight_variances


__all__ = [
    "MomentTensor",
    "NoMomentRule",
    "mean_of",
    "probit_probabilities",
    "register_rule",
    "slope_rule",
    "streamlined",
    "variance_of",
    "weight_variances",
    "with_variance",
]
