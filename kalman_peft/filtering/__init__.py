"""A Gaussian filter over tasks, and its smoother: plain functions over beliefs."""

from .figures import belief_figures, transition_figures
from .merging import merge_beliefs
from .records import TaskRecord
from .shift import noise_by_module, noise_from_gradients, noise_from_shift
from .smoothing import interpolate, smooth, smooth_each, smooth_means
from .state import absolute, compress, draw, increment_of, initial_belief, predict, update
from .transition import Transition


__all__ = [
    "TaskRecord",
    "Transition",
    "absolute",
    "belief_figures",
    "compress",
    "draw",
    "increment_of",
    "initial_belief",
    "interpolate",
    "merge_beliefs",
    "noise_by_module",
    "noise_from_gradients",
    "noise_from_shift",
    "predict",
    "smooth",
    "smooth_each",
    "smooth_means",
    "transition_figures",
    "update",
]
