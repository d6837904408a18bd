"""From data to a precision: what is back-propagated, what is tapped, what is summed."""

from .estimate import estimate_curvature
from .fisher import backward_scores
from .memory import CurvatureMemory, curvature_memory
from .taps import tapped


__all__ = ["CurvatureMemory", "backward_scores", "curvature_memory", "estimate_curvature", "tapped"]
