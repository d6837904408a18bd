"""Kalman Bayesian Transformer: moments forward, layer-wise Kalman updates backward, in closed form."""

from .adapters import KalmanAdapter
from .decision import KalmanDecisionTransformer
from .layers import KalmanFeedforward, make_gaussians
from .moments import Moments, softmax_moments
from .network import KalmanNetwork


__all__ = [
    "KalmanAdapter",
    "KalmanDecisionTransformer",
    "KalmanFeedforward",
    "KalmanNetwork",
    "Moments",
    "make_gaussians",
    "softmax_moments",
]
