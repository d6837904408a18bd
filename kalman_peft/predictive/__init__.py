"""Predictive uncertainty of a model whose adapter is a belief: in one pass, linearised, or by averages of adapters."""

from .linearized import linearized
from .methods import posterior_predictive
from .modules import register_rule, slope_rule
from .moments import pairwise_probabilities, probit_probabilities
from .result import Predictive, select
from .sampled import ensembled, sampled
from .scale import FittedScale, fit_scale
from .streamlined import streamlined
from .tensor import MomentTensor, NoMomentRule, mean_of, variance_of, with_variance
from .variances import weight_variances


__all__ = [
    "FittedScale",
    "MomentTensor",
    "NoMomentRule",
    "Predictive",
    "ensembled",
    "fit_scale",
    "linearized",
    "mean_of",
    "pairwise_probabilities",
    "posterior_predictive",
    "probit_probabilities",
    "register_rule",
    "sampled",
    "select",
    "slope_rule",
    "streamlined",
    "variance_of",
    "weight_variances",
    "with_variance",
]
