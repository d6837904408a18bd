"""Learning task after task with a Gaussian filter: a driver around [`KalmanTrainer`], and its files."""

from .learner import ContinualLearner


__all__ = ["ContinualLearner"]
