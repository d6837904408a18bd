"""One factor on all variances, and one temperature, fitted on labelled validation data.

The approximations of a predictive variance are mostly off by a common factor; a single number puts it right, as in
Streamlining Prediction in Bayesian Deep Learning (arXiv:2411.18425). A temperature alone is temperature scaling (Guo,
Pleiss, Sun and Weinberger, 2017).
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..belief import write_atomically
from .result import Predictive


BOUNDS = {"scale": (1e-6, 1e6), "temperature": (0.05, 20.0)}
KINDS = {"scale": ("scale",), "temperature": ("temperature",), "both": ("scale", "temperature")}
GRID = 25
TOLERANCE = 1e-6  # of the logarithm
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class FittedScale:
    """A factor on the variance and a temperature on the logits, for `Predictive.scaled` and `probit_probabilities`.

    Args:
        scale (`float`): s; 1 if it was not fitted.
        temperature (`float`): T; 1 if it was not fitted.
        nll (`float`): Mean negative log-likelihood of the validation labels with both, nats.
        nll_before (`float`): The same without.
        labels (`int`): So many.
        at_bound (`bool`): A number lies at the bound of what is searched: the data do not determine it.
    """

    scale: float
    temperature: float
    nll: float
    nll_before: float
    labels: int
    at_bound: bool

    def apply(self, predictive: Predictive) -> Predictive:
        """The prediction with both, see `Predictive.scaled`."""
        return predictive.scaled(self.scale, self.temperature)

    def save(self, file: str | os.PathLike) -> None:
        """Write as JSON, atomically; the folder must exist."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(Path(file), lambda path: path.write_text(text))

    @classmethod
    def load(cls, file: str | os.PathLike) -> "FittedScale":
        """Inverse of `save`.

        Args:
            file (`str` or `os.PathLike`): As written.

        Returns:
            `FittedScale`: The same.

        Raises:
            ValueError: The file holds no such record.
        """
        try:
            record = json.loads(Path(file).read_text())
            result = cls(**record)
            valid = all(0 < float(v) < math.inf for v in (result.scale, result.temperature))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} holds no fitted scale: {error}") from error
        if not valid:
            raise ValueError(f"{file} holds no fitted scale: scale and temperature must be > 0 and finite.")
        return result


def fit_scale(predictive: Predictive, labels: Tensor, fit: str = "scale") -> FittedScale:
    """Minimise the mean negative log-likelihood of validation labels; the same result for the same data.

    A grid over the logarithm of the number, then a golden-section search about its best point; for both numbers the
    temperature is minimised out for every scale. The scale is searched from 1e-6 to 1e6, the temperature from 0.05 to
    20.

    Args:
        predictive (`Predictive`): Of validation data that trained neither the adapter nor the belief; by a method
            whose probabilities follow from moments ("map" for a temperature alone, "streamlined", "linearized").
        labels (`Tensor`): Classes, (...) for logits (..., C), as they belong to the logits; -100 does not count.
        fit (`str`, *optional*, defaults to `"scale"`): "scale", "temperature" or "both".

    Returns:
        `FittedScale`: With the likelihood before and after.

    Raises:
        ValueError: There are no labels, a label or a moment is not usable, or there is no variance to scale.
    """
    if fit not in KINDS:
        raise ValueError(f"fit must be one of {list(KINDS)}, got {fit!r}.")
    rows, targets = _checked(predictive, labels)
    names = KINDS[fit]
    if "scale" in names and not bool((rows.variance > 0).any()):
        raise ValueError("All variances are zero, which no scale changes; use fit='temperature'.")

    def nll(scale: float = 1.0, temperature: float = 1.0) -> float:
        likelihood = rows.scaled(scale, temperature).probabilities.gather(1, targets[:, None])
        return -float(likelihood.clamp(min=torch.finfo(likelihood.dtype).tiny).log().mean())

    found = {"scale": 1.0, "temperature": 1.0}
    if fit != "both":
        (name,) = names
        found[name], best = _minimise(lambda value: nll(**{name: value}), *BOUNDS[name])
    else:
        found["scale"], _ = _minimise(
            lambda s: _minimise(lambda t: nll(s, t), *BOUNDS["temperature"])[1], *BOUNDS["scale"]
        )
        found["temperature"], best = _minimise(lambda t: nll(found["scale"], t), *BOUNDS["temperature"])
    before = nll()
    if before <= best:  # a minimum at 1 itself, or one that the search cannot tell from it
        found, best = {"scale": 1.0, "temperature": 1.0}, before
    edges = any(min(abs(math.log(found[n] / bound)) for bound in BOUNDS[n]) < 10 * TOLERANCE for n in names)
    return FittedScale(**found, nll=best, nll_before=before, labels=len(targets), at_bound=edges)


def _checked(predictive: Predictive, labels: Tensor) -> tuple[Predictive, Tensor]:
    """The labelled rows in float64 (N, C), and their labels (N,)."""
    if not predictive.gaussian:
        predictive.scaled()  # says why not
    if labels.is_floating_point() or labels.shape != predictive.logits.shape[:-1]:
        raise ValueError(
            f"labels must be whole numbers of shape {tuple(predictive.logits.shape[:-1])}, got {labels.dtype} of "
            f"{tuple(labels.shape)}."
        )
    counted = labels != -100
    if not bool(counted.any()):
        raise ValueError("There are no validation labels: the data are empty, or all labels are -100.")
    targets = labels[counted]
    classes = predictive.logits.shape[-1]
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ValueError(f"labels go from {int(targets.min())} to {int(targets.max())}, for {classes} classes.")
    fields = {name: t[counted].double() for name, t in predictive.fields().items()}
    for name, t in fields.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{name} of the validation data contains NaN or Inf.")
    if bool((fields["variance"] < 0).any()):
        raise ValueError("A variance of the validation data is negative.")
    return Predictive.from_fields(fields), targets


def _minimise(function: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Place and value of the least value in [low, high], over the logarithm."""
    step = (math.log(high) - math.log(low)) / (GRID - 1)
    places = [math.log(low) + step * i for i in range(GRID)]
    values = [function(math.exp(x)) for x in places]
    best = min(range(GRID), key=values.__getitem__)
    a, b = places[max(best - 1, 0)], places[min(best + 1, GRID - 1)]
    c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    at_c, at_d = function(math.exp(c)), function(math.exp(d))
    while b - a > TOLERANCE:
        if at_c <= at_d:
            b, d, at_d = d, c, at_c
            c = b - _GOLDEN * (b - a)
            at_c = function(math.exp(c))
        else:
            a, c, at_c = c, d, at_d
            d = a + _GOLDEN * (b - a)
            at_d = function(math.exp(d))
    middle = (a + b) / 2
    value = function(math.exp(middle))
    # An end of the range is never the middle of an interval.
    return min(((math.exp(middle), value), (math.exp(places[best]), values[best])), key=lambda pair: pair[1])
