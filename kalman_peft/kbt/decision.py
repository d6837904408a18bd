"""KalmanDecisionTransformer: a decision transformer of transformers (GPT-2 inside) with Gaussian weights.

Moments go through the same steps as in `DecisionTransformerModel.forward`; with all variances 0 the means are its
outputs, bit for bit (eager attention).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from .layers import Variances, embedding_moments, layer_moments, linear_moments, make_gaussians
from .moments import Moments, attention_moments
from .network import Inputs, KalmanNetwork


LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class KalmanDecisionTransformer(KalmanNetwork):
    """Learns the action after the last state of a context from what an expert does there.

    Inputs are those of `DecisionTransformerModel`: `states` (B, K, state_dim), `actions` (B, K, act_dim),
    `returns_to_go` (B, K, 1), `timesteps` (B, K), and optionally `attention_mask` (B, K), 0 at padding on the left.
    Targets are actions (B, act_dim) for the last state. Uncertain are all embeddings of returns, states, actions and
    time steps, the linear layers of every block and the action head; gains and biases of layer norms are known.

    What is approximated: entries of hidden states are independent in the propagated variances, residual branches too;
    layer norms are linear around the mean; softmax is of second order. Covariances between neurons are not kept.

    Args:
        model (`DecisionTransformerModel`): Pre-trained, in evaluation mode; its weights are changed in place.
        variance (`float` or `Mapping[str, float]`, *optional*, defaults to 0.01):
            See [`make_gaussians`]; names are those of the model's modules, such as "encoder.h.0.mlp.c_fc".
        full_limit (`int`, *optional*, defaults to 256): See [`make_gaussians`].
        **options: See [`KalmanNetwork`].

    Raises:
        ValueError: The model is in training mode, or has cross-attention or upcast attention.
    """

    def __init__(self, model: Any, variance: Variances = 0.01, *, full_limit: int = 256, **options: Any):
        if model.training:
            raise ValueError("The model is in training mode, in which dropout is on; call model.eval().")
        for name in ("add_cross_attention", "reorder_and_upcast_attn"):
            if getattr(model.config, name):
                raise ValueError(f"config.{name}=True is not supported; make the decision transformer without it.")
        modules = {name: getattr(model, name) for name in ("embed_timestep", *_EMBEDDED)}
        for i, block in enumerate(model.encoder.h):
            modules |= {f"encoder.h.{i}.{name}": block.get_submodule(name) for name in LINEAR}
        modules["predict_action.0"] = model.predict_action[0]
        super().__init__(model, make_gaussians(modules, variance, full_limit), **options)

    def forward(self, inputs: Inputs) -> Moments:
        """Moments of the action for the last state, (B, act_dim); see [`KalmanNetwork.forward`]."""
        model = cast(Any, self.model)
        x, mask = self._embedded(inputs)
        x = layer_moments(model.embed_ln, x)
        place = model.encoder.wpe(torch.zeros(x.mean.shape[:2], dtype=torch.long, device=x.mean.device)).detach()
        x = Moments(x.mean + place, x.variance)
        for i, block in enumerate(model.encoder.h):
            x = self._attended(f"encoder.h.{i}.attn", block.attn, layer_moments(block.ln_1, x), mask) + x
            x = x + self._mlp(f"encoder.h.{i}.mlp", block.mlp, layer_moments(block.ln_2, x))
        x = layer_moments(model.encoder.ln_f, x)
        x = x.map(lambda t: t.reshape(t.shape[0], -1, 3, t.shape[-1])[:, :, 1])  # at the states
        x = self._linear("predict_action.0", model.predict_action[0], x)
        for module in model.predict_action[1:]:
            x = layer_moments(module, x)
        return x.map(lambda t: t[:, -1])

    def _linear(self, name: str, module: nn.Module, x: Moments) -> Moments:
        return linear_moments(module, x, self.gaussians.get(name))

    def _embedded(self, inputs: Inputs) -> tuple[Moments, Tensor]:
        """Returns, states and actions in turn, (B, 3 K, width), and what is added to their attention scores."""
        model = cast(Any, self.model)
        steps = inputs["timesteps"]
        time = embedding_moments(model.embed_timestep, steps, self.gaussians.get("embed_timestep"))
        parts = []
        for name, key in _EMBEDDED.items():
            given = inputs[key]
            parts.append(self._linear(name, getattr(model, name), Moments(given, torch.zeros_like(given))) + time)
        length = steps.shape[1]
        stacked = [
            torch.stack(kind, 2).flatten(1, 2) for kind in zip(*((p.mean, p.variance) for p in parts), strict=True)
        ]
        seen = inputs.get("attention_mask", torch.ones_like(steps)).bool().repeat_interleave(3, 1)  # (B, 3 K)
        allowed = seen[:, None, :] & torch.ones(3 * length, 3 * length, dtype=torch.bool, device=steps.device).tril()
        lowest = torch.finfo(stacked[0].dtype).min
        mask = torch.zeros_like(allowed, dtype=stacked[0].dtype).masked_fill(~allowed, lowest)
        return Moments(*stacked), mask[:, None]

    def _attended(self, name: str, attention: Any, x: Moments, mask: Tensor) -> Moments:
        joint = self._linear(f"{name}.c_attn", attention.c_attn, x)
        heads = attention.num_heads

        def split(t: Tensor, part: int) -> Tensor:
            own = t.split(attention.split_size, dim=2)[part]
            return own.view(*own.shape[:-1], heads, -1).transpose(1, 2)

        query, key, value = (joint.map(lambda t, i=i: split(t, i)) for i in range(3))
        mixed = attention_moments(query, key, value, attention.scaling, mask)
        mixed = mixed.map(lambda t: t.transpose(1, 2).flatten(-2).contiguous())
        return self._linear(f"{name}.c_proj", attention.c_proj, mixed)

    def _mlp(self, name: str, mlp: Any, x: Moments) -> Moments:
        hidden = layer_moments(mlp.act, self._linear(f"{name}.c_fc", mlp.c_fc, x))
        return self._linear(f"{name}.c_proj", mlp.c_proj, hidden)


_EMBEDDED = {"embed_return": "returns_to_go", "embed_state": "states", "embed_action": "actions"}
