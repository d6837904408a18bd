"""KalmanAdapter: the layer-wise update for LoRA factors of a frozen transformer.

The factors A and B of an adapted layer are two linear layers, one after the other; each row of A and of B is a neuron.
Moments are not propagated through the frozen layers: these are linear around the mean, so that messages pass them as
vector-Jacobian products of the unmodified model (autograd), and the outputs' variance is sum G C G^T.
"""

from typing import Any

import torch
from torch import nn

from ..adapters import AdapterState
from .moments import Moments
from .network import Inputs, KalmanNetwork
from .rows import DIAGONAL, FULL, RowGaussian


class KalmanAdapter(KalmanNetwork):
    """Learns a LoRA adapter of a classifier (or regressor) from single samples.

    What is approximated: the network is linear in the factors around their means (an extended Kalman filter; exact in
    the mean of B A x, as A and B are independent), and rows are independent of each other. Everything else is exact:
    the covariance within each row, samples' several positions and outputs, the categorical noise.

    Args:
        model (`PeftModel`): With `logits` (B, C) among its outputs, in evaluation mode; the factors are changed in
        place.
        variance_a (`float`, *optional*):
            Prior variance of every entry of A; by default the mean square of that A, its initialisation's.
        variance_b (`float`, *optional*, defaults to 1e-3): Of every entry of B, which starts at 0.
        full_limit (`int`, *optional*, defaults to 256):
            Rows of at most so many entries have a full covariance: those of B always do in practice (r), those of A
            (as wide as the layer's input) in small models.
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        **options: See [`KalmanNetwork`]; `likelihood` is "categorical" by default.

    Raises:
        ValueError: A variance is negative, or the model is in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        variance_a: float | None = None,
        variance_b: float = 1e-3,
        full_limit: int = 256,
        adapter_name: str | None = None,
        **options: Any,
    ):
        for name, value in (("variance_a", variance_a), ("variance_b", variance_b)):
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be >= 0 and finite, got {value}.")
        if model.training:
            raise ValueError("The model is in training mode, in which dropout is on; call model.eval().")
        gaussians = {}
        for pair in AdapterState(model, adapter_name, warn_excluded=False):
            own = float(pair.a.detach().float().square().mean()) if variance_a is None else variance_a
            for key, p, value in ((pair.key_a, pair.a, own), (pair.key_b, pair.b, variance_b)):
                structure = FULL if p.shape[1] <= full_limit else DIAGONAL
                gaussians[key] = RowGaussian(p, None, value, structure)
        chosen: dict[str, Any] = {"likelihood": "categorical"} | options
        super().__init__(model, gaussians, **chosen)

    def forward(self, inputs: Inputs) -> Moments:
        """The model's own logits; their variance is left to the slopes."""
        logits = self.model(**inputs).logits
        return Moments(logits, torch.zeros_like(logits))

    def predict(self, inputs: Inputs) -> Moments:
        """See [`KalmanNetwork.predict`]; the variance of the logits is that of the linearised model."""
        outputs = self.forward(inputs)
        scaled = self._scaled_slopes(outputs.mean)
        variance = torch.stack([v.square().sum((1, 2)) for v in scaled.values()]).sum(0)
        return self._predicted(Moments(outputs.mean.detach(), variance.reshape(outputs.mean.shape)))
