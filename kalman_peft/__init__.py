"""Fine-tuning with a Gaussian belief over LoRA adapters: LaLoRA, LoKO, and the curvature behind both.

Public names are imported on first use, so that `import kalman_peft` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

_MODULE_OF = {
    "AdapterState": "adapters",
    "Belief": "belief",
    "BeliefError": "belief",
    "CategoricalObservation": "observations",
    "ForgettingBudget": "laplace",
    "KalmanConfig": "config",
    "KalmanMixin": "trainer",
    "KalmanTrainer": "trainer",
    "LaplaceCallback": "callbacks",
    "LoKO": "loko",
    "create_loko_optimizer": "loko",
    "estimate_curvature": "curvature",
}

__all__ = [
    "AdapterState",
    "Belief",
    "BeliefError",
    "CategoricalObservation",
    "ForgettingBudget",
    "KalmanConfig",
    "KalmanMixin",
    "KalmanTrainer",
    "LaplaceCallback",
    "LoKO",
    "__version__",
    "create_loko_optimizer",
    "estimate_curvature",
]

if TYPE_CHECKING:
    from .adapters import AdapterState
    from .belief import Belief, BeliefError
    from .callbacks import LaplaceCallback
    from .config import KalmanConfig
    from .curvature import estimate_curvature
    from .laplace import ForgettingBudget
    from .loko import LoKO, create_loko_optimizer
    from .observations import CategoricalObservation
    from .trainer import KalmanMixin, KalmanTrainer


def __getattr__(name: str):
    if name in _MODULE_OF:
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
