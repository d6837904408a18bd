"""The options of the LoKO optimizer, and what they may be."""

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..observations import CategoricalObservation, GaussianObservation, LikelihoodObservation, Observation
from .memories import MEMORIES


MODES = ("kalman", "paper")
COLUMNS = ("auto", "sampled", "rademacher", "exact", "empirical")
GAINS = ("auto", "joint", "memory")
FORMS = ("logit", "softmax")
PRIORS = ("auto", "pooled", "initialisation")
_DAMPING = 0.1  # of classifiers


@dataclass(kw_only=True)
class LoKOOptions:
    """Options of [`LoKO`]; the defaults need no tuning.

    Args:
        mode (`str`, *optional*, defaults to `"kalman"`):
            "paper" is our reconstruction of LoKO as published (arXiv:2410.11551), see `kalman_peft.loko.paper`: of the
            options below it knows `initial_bound`, `noise_decay`, `process_noise` and `seed`.
        memory (`str`, *optional*, defaults to `"kronecker"`):
            "kronecker"; "diagonal" (precisions); "diagonal_covariance"; "block" (dense per parameter of at most
            `block_limit` weights, others Kronecker); "low_rank" (diagonal plus `rank` directions over all weights);
            "dense". Where a Kronecker memory does not fit (vectors, and matrices whose shorter side exceeds
            `dense_limit`) it is diagonal.
        rank (`int`, *optional*, defaults to 16):
            Eigenpairs on the long side of "kronecker"; directions of "low_rank".
        dense_limit (`int`, *optional*, defaults to 128): See `memory`.
        block_limit (`int`, *optional*, defaults to 1024): See `memory`.
        columns (`str`, *optional*, defaults to `"auto"`):
            How the information of a batch is taken: "sampled" labels or "rademacher" signs, at one more backward pass
            per draw, unbiased; "exact" columns, at one more backward pass per output (times labels per sequence);
            "empirical", the true labels' scores, at none, biased. "auto": exact up to 3 outputs per sequence, sampled
            (rademacher for regression) above and for language models.
        num_columns (`int`, *optional*, defaults to 1): Draws per step.
        per_sequence (`bool`, *optional*):
            One column for each sequence rather than one for the batch. Defaults to `True` for classification and
            regression, and to `False` for tokens. "exact" and "empirical" are always per sequence.
        top_k (`int`, *optional*):
            With "exact" columns: tell only the k likeliest labels apart (k backward passes instead of one per label).
        max_columns (`int`, *optional*, defaults to 64): More columns are summed in groups, with random signs.
        curvature_every (`int`, *optional*):
            Take columns at every n-th step only; they count for the steps until the next. Defaults to 4 for
            language models, to 1 otherwise.
        first_draws (`int`, *optional*, defaults to 6): Take columns at each of the first steps.
        gain (`str`, *optional*, defaults to `"auto"`):
            "joint": the exact gain for this step's columns on top of the memory, which couples all weights. "memory":
            through the updated memory only, which a few noisy columns disturb less. "auto": joint with columns per
            sequence.
        prior (`str`, *optional*, defaults to `"auto"`):
            Prior precision of the weights. "pooled": one for all, `prior_tokens` times the mean Fisher of a weight per
            label, over all weights. "initialisation": every lora_A, which starts at random, has the precision of its
            initialisation, and any other parameter `prior_tokens` times its own mean Fisher. "auto": pooled, but
            "initialisation" for language models.
        prior_tokens (`float`, *optional*):
            Strength of the prior, in observed labels. Defaults to 1e4 for language models, 1e3 otherwise.
        tempering (`float`, *optional*, defaults to 1.0): Power on the likelihood, e.g. 1 / number of epochs.
        correlation (`float`, *optional*, defaults to 0.0):
            For correlated labels within a sequence: T labels count as T^(1 - correlation); in [0, 1].
        adaptive_noise (`float`, *optional*, defaults to 0.0):
            Decay in [0, 1) of the running misspecification factor, score energy over expected energy; where that
            exceeds 1, likelihood and trust region are divided by it: for data that hold little to be learned. It slows
            the filter after a shift. 0: off.
        forgetting (`float`, *optional*, defaults to 1.0):
            Factor in (0, 1] on what was learned, after each step: mean and precision relax towards the prior.
        process_noise (`float` or `dict[str, float]`, *optional*, defaults to 0.0):
            Variance added to every weight per step; or by regular expression over parameter names (the last match
            counts, others get none).
        damping (`float`, *optional*):
            Information added to each label, spread over the differences of its logits, see `kalman_peft.loko.rows`: a
            label's own (of trace below 1) vanishes where the model is sure, and further labels would then move it by
            full Newton steps. Defaults to 0.1 for classification, to 0 otherwise and with columns="empirical".
        form (`str`, *optional*, defaults to `"logit"`): How `damping` enters: "logit" or "softmax".
        outlier_threshold (`float`, *optional*):
            c of the weighted-likelihood filter, in standard deviations: outlying labels count less. Off by default.
        max_decrease (`float`, *optional*, defaults to 0.5):
            Trust region: largest predicted decrease of the loss per step, g^T step, as a share of the batch's loss
            (with a `LikelihoodObservation`, which is known up to a constant, in nats per label).
        trust_decay (`float`, *optional*, defaults to 0.0):
            Power with which `max_decrease` shrinks as n_0 / (n_0 + labels seen), n_0 = `prior_tokens`.
        max_kl (`float`, *optional*):
            Trust region: largest KL divergence of the step under the information gathered so far, in nats per label.
        noise_decay (`float`, *optional*, defaults to 0.99):
            Decay of the running estimate of the observation noise: of Gaussian labels whose variance is not given, and
            of `mode="paper"`.
        averaging (`bool`, *optional*, defaults to `False`):
            Keep a running average of the weights, the last ones weighing most; `optimizer.eval()` puts it in place,
            `optimizer.train()` takes it back.
        max_skipped (`int`, *optional*, defaults to 10): Batches with NaN or Inf in a row before an error is raised.
        initial_bound (`float`, *optional*, defaults to 1.0):
            With `mode="paper"`: initial variances are uniform in [0, bound].
        seed (`int`, *optional*, defaults to 0): Of all draws.

    Raises:
        ValueError: An option is out of range, or goes with no other that is given; the message says which.
    """

    mode: str = "kalman"
    memory: str = "kronecker"
    rank: int = 16
    dense_limit: int = 128
    block_limit: int = 1024
    columns: str = "auto"
    num_columns: int = 1
    per_sequence: bool | None = None
    top_k: int | None = None
    max_columns: int = 64
    curvature_every: int | None = None
    first_draws: int = 6
    gain: str = "auto"
    prior: str = "auto"
    prior_tokens: float | None = None
    tempering: float = 1.0
    correlation: float = 0.0
    adaptive_noise: float = 0.0
    forgetting: float = 1.0
    process_noise: float | dict[str, float] = 0.0
    damping: float | None = None
    form: str = "logit"
    outlier_threshold: float | None = None
    max_decrease: float | None = 0.5
    trust_decay: float = 0.0
    max_kl: float | None = None
    noise_decay: float = 0.99
    averaging: bool = False
    max_skipped: int = 10
    initial_bound: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(asdict(self))

    def resolve(self, observation: Observation) -> dict[str, Any]:
        """The options as a dictionary, with what depends on the observation.

        Args:
            observation (`Observation`): What the filter will observe.

        Returns:
            `dict[str, Any]`: Numbers and strings only.

        Raises:
            ValueError: An option that the observation does not support.
        """
        options = asdict(self)
        if self.mode == "paper":
            return options | _PAPER
        tokens = observation.layout != "full"
        if self.prior_tokens is None:
            options["prior_tokens"] = 1e4 if tokens else 1e3
        if self.prior == "auto":
            options["prior"] = "initialisation" if tokens else "pooled"
        if self.curvature_every is None:
            options["curvature_every"] = 4 if tokens and self.columns != "empirical" else 1
        if self.damping is None:
            classes = isinstance(observation, CategoricalObservation) and not tokens
            options["damping"] = _DAMPING if classes and self.columns != "empirical" else 0.0
        _check_observation(self, observation)
        if self.form != "logit" and not options["damping"]:
            raise ValueError(f"form={self.form!r} is the same as 'logit' without damping; set damping > 0.")
        return options


# What the published filter is in terms of the others: all information at every step, no trust region.
_PAPER = {
    "memory": "diagonal_covariance", "columns": "exact", "gain": "joint", "per_sequence": True, "curvature_every": 1,
    "max_decrease": None, "prior_tokens": 1.0, "damping": 0.0,
}  # fmt: skip
_OF_PAPER = ("mode", "initial_bound", "noise_decay", "process_noise", "seed", "max_skipped")


def check_options(options: dict[str, Any], prefix: str = "") -> None:
    """Raise ValueError for the first option of LoKO that is out of its range.

    Args:
        options (`dict[str, Any]`): By name, as in [`LoKOOptions`].
        prefix (`str`, *optional*, defaults to `""`): Put before the name in the message.
    """
    choices = {"mode": MODES, "memory": MEMORIES, "columns": COLUMNS, "gain": GAINS, "form": FORMS, "prior": PRIORS}
    whole = {
        "rank": 1, "dense_limit": 1, "block_limit": 1, "num_columns": 1, "max_columns": 1, "top_k": 1,
        "curvature_every": 1, "first_draws": 0, "max_skipped": 0,
    }  # fmt: skip
    positive = ("max_decrease", "max_kl", "prior_tokens", "tempering", "outlier_threshold", "initial_bound")
    for name, value in options.items():
        shown = f"{prefix}{name}"
        if name not in (*choices, "averaging", "per_sequence", "process_noise") and value is not None:
            real = isinstance(value, int | float) and not isinstance(value, bool)
            check(real, f"{shown} must be a number, got {value!r}")
        if name in choices:
            check(value in choices[name], f"{shown} must be one of {choices[name]}, got {value!r}")
        elif name in ("averaging", "per_sequence"):
            optional = name == "per_sequence" and value is None
            check(optional or isinstance(value, bool), f"{shown} must be True or False, got {value!r}")
        elif value is None:
            check(name in _OPTIONAL, f"{shown} must not be None")
        elif name in whole:
            check(
                isinstance(value, int) and value >= whole[name],
                f"{shown} must be a whole number >= {whole[name]}, got {value}",
            )
        elif name == "forgetting":
            check(0 < value <= 1, f"{shown} must be in (0, 1], got {value}")
        elif name == "correlation":
            check(0 <= value <= 1, f"{shown} must be in [0, 1], got {value}")
        elif name in ("adaptive_noise", "noise_decay"):
            check(0 <= value < 1, f"{shown} must be in [0, 1), got {value}")
        elif name == "process_noise":
            for pattern in value if isinstance(value, Mapping) else ():
                _check_pattern(shown, pattern)
            for q in value.values() if isinstance(value, Mapping) else (value,):
                check(isinstance(q, int | float), f"{shown} must hold numbers, got {q!r}")
                check(0 <= q < math.inf, f"{shown} is a variance: it must be >= 0 and finite, got {q}")
        elif name in ("trust_decay", "damping"):
            check(0 <= value < math.inf, f"{shown} must be >= 0 and finite, got {value}")
        elif name in positive:
            check(0 < value < math.inf, f"{shown} must be positive and finite, got {value}")
        elif name == "seed":
            check(isinstance(value, int), f"{shown} must be a whole number, got {value!r}")
    _check_combinations(LoKODefaults | options, prefix)


def _check_pattern(shown: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{shown}: {pattern!r} is no regular expression ({error}).") from error


def parse_noise(value: Any) -> float | dict[str, float]:
    """Process noise from a command line: a number, or JSON from patterns to numbers.

    Args:
        value (`Any`): A number, a mapping, or a string.

    Returns:
        `float` or `dict[str, float]`: The same.

    Raises:
        ValueError: The string is neither.
    """
    if not isinstance(value, str):
        return value
    try:
        found: Any = json.loads(value)
    except json.JSONDecodeError:
        found = None
    numbers = list(found.values()) if isinstance(found, dict) else [found]
    if not all(isinstance(q, int | float) for q in numbers):
        raise ValueError(f"process_noise must be a number or JSON from patterns to numbers, got {value!r}.")
    return found


LoKODefaults = {f.name: f.default for f in fields(LoKOOptions)}
_OPTIONAL = {name for name, value in LoKODefaults.items() if value is None} | {"max_decrease"}


def _check_combinations(o: dict[str, Any], prefix: str) -> None:
    def given(name: str) -> bool:
        return o[name] != LoKODefaults[name]

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"{prefix}{name}={o[name]!r} {why}.")

    if o["mode"] == "paper":
        for name in LoKODefaults:
            if given(name) and name not in _OF_PAPER and o[name] != _PAPER.get(name):
                refuse(name, f"is not an option of {prefix}mode='paper', which knows {', '.join(_OF_PAPER[1:])}")
        return
    if given("initial_bound"):
        refuse("initial_bound", f"needs {prefix}mode='paper'")
    if o["top_k"] is not None and o["columns"] not in ("auto", "exact"):
        refuse("top_k", f"needs {prefix}columns='exact'")
    if o["num_columns"] > 1 and o["columns"] in ("exact", "empirical"):
        refuse("num_columns", f"needs {prefix}columns='sampled' or 'rademacher'")
    if o["per_sequence"] is False and o["columns"] in ("exact", "empirical"):
        refuse("per_sequence", f"is not possible with {prefix}columns={o['columns']!r}")
    if o["form"] == "softmax" and o["damping"] == 0.0:
        refuse("form", f"is the same as 'logit' without {prefix}damping")
    if o["gain"] == "memory" and o["memory"] == "diagonal_covariance":
        refuse("gain", f"is not possible with {prefix}memory='diagonal_covariance'")
    for name, memories in (
        ("rank", ("kronecker", "block", "low_rank")),
        ("dense_limit", ("kronecker", "block")),
        ("block_limit", ("block",)),
    ):
        if given(name) and o["memory"] not in memories:
            warnings.warn(f"{prefix}{name}: no effect with {prefix}memory={o['memory']!r}.", stacklevel=5)
    if given("trust_decay") and o["max_decrease"] is None:
        refuse("trust_decay", f"has no effect with {prefix}max_decrease=None")
    if o["damping"] and o["columns"] == "empirical":
        refuse("damping", f"does not reach {prefix}columns='empirical'")


def _check_observation(options: LoKOOptions, observation: Observation) -> None:
    name = type(observation).__name__
    if isinstance(observation, GaussianObservation):
        check(not options.damping, f"damping={options.damping} has no place in a {name}, whose curvature is constant")
    if not isinstance(observation, CategoricalObservation):
        check(options.top_k is None, f"top_k={options.top_k} needs a categorical observation, got {name}")
        check(options.form == "logit", f"form={options.form!r} needs a categorical observation, got {name}")
    if isinstance(observation, LikelihoodObservation):
        check(options.columns != "sampled", f"columns='sampled' is not supported for {name}; use 'rademacher'")
        check(options.outlier_threshold is None, f"outlier_threshold is not supported for {name}")


def check(condition: bool, message: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{message}.")
