"""Uncertain weights of a module's layers, and moments through each layer by its class."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .moments import Moments, activation_moments, layer_norm_moments, relu_moments
from .network import Inputs, KalmanNetwork
from .rows import DIAGONAL, FULL, RowGaussian


Variances = float | Mapping[str, float]


def make_gaussians(
    modules: Mapping[str, nn.Module], variance: Variances = 0.01, full_limit: int = 256
) -> dict[str, RowGaussian]:
    """A Gaussian around the weights of linear layers, Conv1D and embeddings.

    Args:
        modules (`Mapping[str, nn.Module]`): By name.
        variance (`float` or `Mapping[str, float]`, *optional*, defaults to 0.01):
            Prior variance of a neuron's output for inputs of unit power: each of its d' weights (with the bias) has
            this over d', entries of embeddings have it as it is. For all layers, or by pattern such as "*.mlp.*", of
            which the first that fits counts; layers that no pattern fits are known. 0: uncertain in name only.
        full_limit (`int`, *optional*, defaults to 256):
            Rows of at most so many entries have a full covariance, longer ones (and embeddings) variances.

    Returns:
        `dict[str, RowGaussian]`: By name of the layer.

    Raises:
        ValueError: A variance is negative or not finite, or a pattern fits no layer.
        TypeError: A layer of another kind.
    """
    patterns = {"*": variance} if isinstance(variance, int | float) else dict(variance)
    for pattern, value in patterns.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"variance must be >= 0 and finite, got {value} for {pattern!r}.")
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"variance: no layer fits the pattern {pattern!r}; there are {sorted(modules)}.")
    found = {}
    for name, module in modules.items():
        value = next((v for pattern, v in patterns.items() if fnmatchcase(name, pattern)), None)
        if value is None:
            continue
        weight, bias = cast(Tensor, module.weight), cast(Any, getattr(module, "bias", None))
        if isinstance(module, nn.Embedding):
            found[name] = RowGaussian(weight, None, value, DIAGONAL)
        elif isinstance(module, nn.Linear | Conv1D):
            transposed = isinstance(module, Conv1D)
            width = weight.shape[0 if transposed else 1] + (bias is not None)
            structure = FULL if width <= full_limit else DIAGONAL
            found[name] = RowGaussian(weight, bias, value / width, structure, transposed)
        else:
            raise TypeError(
                f"{name} is a {type(module).__name__}; weights of Linear, Conv1D and Embedding are learned."
            )
    return found


def linear_moments(module: nn.Module, x: Moments, gaussian: RowGaussian | None) -> Moments:
    """Of a linear layer, with the module's own forward for the mean.

    Args:
        module (`nn.Module`): `nn.Linear` or `Conv1D`.
        x (`Moments`): Of the input, (..., d).
        gaussian (`RowGaussian`, *optional*): Its weights; `None` if they are known.

    Returns:
        `Moments`: (..., N).
    """
    mean = module(x.mean)
    if gaussian is not None:
        return Moments(mean, gaussian.output_variance(x.mean, x.variance))
    with torch.no_grad():
        weight = cast(Tensor, module.weight).detach()
        return Moments(mean, x.variance @ (weight if isinstance(module, Conv1D) else weight.mT).square())


def embedding_moments(module: nn.Embedding, index: Tensor, gaussian: RowGaussian | None) -> Moments:
    """Of rows of a table."""
    mean = module(index)
    with torch.no_grad():
        variance = torch.zeros_like(mean) if gaussian is None else gaussian.variances()[index]
    return Moments(mean, variance)


def layer_moments(module: nn.Module, x: Moments, gaussian: RowGaussian | None = None) -> Moments:
    """Of any layer that is known here; an unknown one raises TypeError.

    Args:
        module (`nn.Module`):
            Linear, Conv1D, LayerNorm, ReLU, another elementwise activation of torch or transformers, Identity, or
            Dropout (not in training).
        x (`Moments`): Of the input.
        gaussian (`RowGaussian`, *optional*): Weights of a linear layer.

    Returns:
        `Moments`: Of the output.

    Raises:
        TypeError: No rule for this layer.
    """
    if isinstance(module, nn.Linear | Conv1D):
        return linear_moments(module, x, gaussian)
    if isinstance(module, nn.LayerNorm):
        weight, bias = cast(Any, module.weight), cast(Any, module.bias)
        width = len(module.normalized_shape)
        return layer_norm_moments(x, width, _frozen(weight), _frozen(bias), module.eps)
    if isinstance(module, nn.ReLU):
        return relu_moments(x)
    if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training):
        return x
    if type(module).__name__ in _SMOOTH:
        return activation_moments(x, module)
    raise TypeError(
        f"No moments are known for {type(module).__name__}; use Linear, LayerNorm, ReLU, GELU, SiLU or Tanh."
    )


_SMOOTH = {
    "GELU",
    "SiLU",
    "Tanh",
    "Sigmoid",
    "GELUActivation",
    "NewGELUActivation",
    "FastGELUActivation",
    "SiLUActivation",
}


def _frozen(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.detach()


class KalmanFeedforward(KalmanNetwork):
    """A stack of layers, `nn.Sequential` of what [`layer_moments`] knows; its inputs are `{"x": (B, d)}`.

    Args:
        model (`nn.Sequential`): Pre-trained; its weights become the mean, and are changed in place.
        variance (`float` or `Mapping[str, float]`, *optional*, defaults to 0.01): See [`make_gaussians`].
        full_limit (`int`, *optional*, defaults to 256): See [`make_gaussians`].
        **options: See [`KalmanNetwork`].
    """

    def __init__(self, model: nn.Sequential, variance: Variances = 0.01, *, full_limit: int = 256, **options: Any):
        layers = {name: module for name, module in model.named_children() if isinstance(module, nn.Linear)}
        super().__init__(model, make_gaussians(layers, variance, full_limit), **options)

    def forward(self, inputs: Inputs) -> Moments:
        """See [`KalmanNetwork.forward`]."""
        x = inputs["x"]
        moments = Moments(x, torch.zeros_like(x))
        for name, module in self.model.named_children():
            moments = layer_moments(module, moments, self.gaussians.get(name))
        return moments
