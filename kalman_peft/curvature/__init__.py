"""From data to a precision: what is back-propagated, what is tapped, what is summed."""

from .estimate import estimate_curvature
from .fisher import backward_scores
from .taps import tapped


__all__ = ["backward_scores", "estimate_curvature", "tapped"]
