"""The LoKO optimizer: a Kalman filter over the adapter's weights."""

from .create import create_loko_optimizer
from .memories import MEMORIES
from .optimizer import LoKO
from .options import LoKOOptions, check_options
from .prior import BELIEF_MODES


__all__ = ["BELIEF_MODES", "MEMORIES", "LoKO", "LoKOOptions", "check_options", "create_loko_optimizer"]
