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
    "ContinualLearner": "continual",
    "DriftCallback": "callbacks",
    "ForgettingBudget": "laplace",
    "GaussianObservation": "observations",
    "HubError": "hub",
    "ImaCallback": "ima",
    "KalmanAdapter": "kbt",
    "KalmanConfig": "config",
    "KalmanDecisionTransformer": "kbt",
    "KalmanFeedforward": "kbt",
    "KalmanMixin": "trainer",
    "KalmanSFTConfig": "sft",
    "KalmanSFTTrainer": "sft",
    "KalmanTrainer": "trainer",
    "LaplaceCallback": "callbacks",
    "LikelihoodObservation": "observations",
    "LoKO": "loko",
    "LoKOOptions": "loko",
    "TaskRecord": "filtering",
    "Transition": "filtering",
    "belief_from_fisher": "interchange",
    "compress": "filtering",
    "create_loko_optimizer": "loko",
    "curvature_memory": "curvature",
    "data_fingerprint": "lineage",
    "estimate_curvature": "curvature",
    "fit_scale": "predictive",
    "initial_belief": "filtering",
    "interpolate": "filtering",
    "log_evidence": "evidence",
    "maximise_evidence": "evidence",
    "merge_beliefs": "filtering",
    "noise_from_shift": "filtering",
    "posterior_predictive": "predictive",
    "predict": "filtering",
    "probit_probabilities": "predictive",
    "register_rule": "predictive",
    "sample_source": "self_source",
    "save_fisher": "interchange",
    "smooth": "filtering",
    "streamlined": "predictive",
    "to_laplace_torch": "interchange",
    "update": "filtering",
    "warm_start": "warmup",
    "weight_variances": "predictive",
}

# Without KalmanSFTConfig and KalmanSFTTrainer, so that `from kalman_peft import *` does not need the extra "trl".
__all__ = [
    "AdapterState",
    "Belief",
    "BeliefError",
    "CategoricalObservation",
    "ContinualLearner",
    "DriftCallback",
    "ForgettingBudget",
    "GaussianObservation",
    "HubError",
    "ImaCallback",
    "KalmanAdapter",
    "KalmanConfig",
    "KalmanDecisionTransformer",
    "KalmanFeedforward",
    "KalmanMixin",
    "KalmanTrainer",
    "LaplaceCallback",
    "LikelihoodObservation",
    "LoKO",
    "LoKOOptions",
    "TaskRecord",
    "Transition",
    "__version__",
    "belief_from_fisher",
    "compress",
    "create_loko_optimizer",
    "curvature_memory",
    "data_fingerprint",
    "estimate_curvature",
    "fit_scale",
    "initial_belief",
    "interpolate",
    "log_evidence",
    "maximise_evidence",
    "merge_beliefs",
    "noise_from_shift",
    "posterior_predictive",
    "predict",
    "probit_probabilities",
    "register_rule",
    "sample_source",
    "save_fisher",
    "smooth",
    "streamlined",
    "to_laplace_torch",
    "update",
    "warm_start",
    "weight_variances",
]

if TYPE_CHECKING:
    from .adapters import AdapterState
    from .belief import Belief, BeliefError
    from .callbacks import DriftCallback, LaplaceCallback
    from .config import KalmanConfig
    from .continual import ContinualLearner
    from .curvature import curvature_memory, estimate_curvature
    from .evidence import log_evidence, maximise_evidence
    from .filtering import (
        TaskRecord,
        Transition,
        compress,
        initial_belief,
        interpolate,
        merge_beliefs,
        noise_from_shift,
        predict,
        smooth,
        update,
    )
    from .hub import HubError
    from .ima import ImaCallback
    from .interchange import belief_from_fisher, save_fisher, to_laplace_torch
    from .kbt import KalmanAdapter, KalmanDecisionTransformer, KalmanFeedforward
    from .laplace import ForgettingBudget
    from .lineage import data_fingerprint
    from .loko import LoKO, LoKOOptions, create_loko_optimizer
    from .observations import CategoricalObservation, GaussianObservation, LikelihoodObservation
    from .predictive import (
        fit_scale,
        posterior_predictive,
        probit_probabilities,
        register_rule,
        streamlined,
        weight_variances,
    )
    from .self_source import sample_source
    from .sft import KalmanSFTConfig as KalmanSFTConfig
    from .sft import KalmanSFTTrainer as KalmanSFTTrainer
    from .trainer import KalmanMixin, KalmanTrainer
    from .warmup import warm_start


def __getattr__(name: str):
    if name in _MODULE_OF:
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULE_OF))
