"""One LoRA adapter of a PEFT model, seen as an ordered, named state vector.

The state of every filter in this library is the list of LoRA factors A (r, d_in) and B (d_out, r) of one adapter.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import whole


A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one adapted linear layer: W x + scaling * B A x.

    Args:
        name (`str`): Path of the adapted module, as in the keys of the saved adapter.
        linear_a (`nn.Linear`): The factor A, weight of shape (r, d_in).
        linear_b (`nn.Linear`): The factor B, weight of shape (d_out, r).
        scaling (`float`): alpha / r, or alpha / sqrt(r) for rsLoRA.
        merges_linearly (`bool`): Whether the layer's update is scaling * B A (false for DoRA).
    """

    name: str
    linear_a: nn.Module
    linear_b: nn.Module
    scaling: float
    merges_linearly: bool = True

    @property
    def key_a(self) -> str:
        """State key of A."""
        return self.name + A_SUFFIX

    @property
    def key_b(self) -> str:
        """State key of B."""
        return self.name + B_SUFFIX

    @property
    def a(self) -> nn.Parameter:
        """A, shape (r, d_in)."""
        return self.linear_a.weight  # type: ignore[return-value]

    @property
    def b(self) -> nn.Parameter:
        """B, shape (d_out, r)."""
        return self.linear_b.weight  # type: ignore[return-value]

    def key(self, side: str) -> str:
        """State key of A (side "a") or B (side "b")."""
        return self.key_a if side == "a" else self.key_b

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


class AdapterState:
    """Ordered view of the LoRA factors of one adapter; holds no copies.

    Keys are those of the saved adapter (`adapter_model.safetensors`), without the adapter's name, so that a belief
    over one adapter can be read back for another of the same shape.

    Supported: LoRA and rsLoRA on linear layers, any target modules, several ranks in one adapter, several adapters in
    one model (only the named one is seen). DoRA's factors are seen, its magnitude is not. Refused by name: LoRA on
    embeddings, convolutions, attention in-projections and bare parameters, and every other PEFT method.

    Args:
        model (`PeftModel`): A model with a LoRA adapter; wrappers such as DistributedDataParallel are looked through.
        adapter_name (`str`, *optional*): Defaults to the active adapter, of which there must be one.
        warn_excluded (`bool`, *optional*, defaults to `True`):
            Warn of trainable tensors that are no LoRA factor (DoRA magnitudes, `modules_to_save`, biases).

    Attributes:
        pairs (`list[LoraPair]`): One entry per adapted linear layer, in the order of the model's modules.
        excluded (`dict[str, str]`): Trainable tensors that are not part of the state, each with the reason.

    Raises:
        TypeError: The model is no PEFT model.
        ValueError: The adapter is missing, not LoRA, or sits on a layer that is not linear.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None, *, warn_excluded: bool = True):
        peft_model: Any = unwrap(model)
        self.model = peft_model
        self.adapter_name = _resolve_adapter(peft_model, adapter_name)
        self.config = peft_model.peft_config[self.adapter_name]
        self.pairs = _find_pairs(peft_model, self.adapter_name)
        self.excluded = _excluded(peft_model, self)
        if self.excluded and warn_excluded:
            listed = "; ".join(f"{name} ({why})" for name, why in list(self.excluded.items())[:6])
            more = f" and {len(self.excluded) - 6} more" if len(self.excluded) > 6 else ""
            warnings.warn(
                f"The belief over adapter {self.adapter_name!r} leaves out {len(self.excluded)} trainable tensors, "
                f"which are trained without its protection: {listed}{more}.",
                stacklevel=2,
            )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Named factors in state order: for each pair A, then B."""
        return {key: p for pair in self.pairs for key, p in ((pair.key_a, pair.a), (pair.key_b, pair.b))}

    def tensors(self) -> dict[str, Tensor]:
        """The factors as detached tensors that share storage with the model."""
        return {key: p.detach() for key, p in self.parameters().items()}

    def snapshot(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """A copy of the factors, in full where the model is sharded."""
        return {key: whole(p.detach()).to(dtype, copy=True) for key, p in self.parameters().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Write `state` into the model's factors.

        Args:
            state (`Mapping[str, Tensor]`): One tensor per key, of the factor's shape; cast to the factor's dtype.

        Raises:
            ValueError: A key is missing or unknown.
        """
        parameters = self.parameters()
        if parameters.keys() != state.keys():
            differing = sorted(parameters.keys() ^ state.keys())
            raise ValueError(f"`state` does not fit adapter {self.adapter_name!r}: differing keys {differing[:4]}.")
        for key, parameter in parameters.items():
            parameter.copy_(state[key])

    def flatten(self, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Concatenate the factors (or a named state of the same shapes) to one vector of shape (D,)."""
        state = self.tensors() if state is None else state
        return torch.cat([state[key].reshape(-1) for key in self.parameters()])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector of shape (D,) into named factors; the inverse of `flatten`."""
        parameters = self.parameters()
        parts = vector.split([p.numel() for p in parameters.values()])
        return {key: part.view_as(p) for (key, p), part in zip(parameters.items(), parts, strict=True)}

    @property
    def num_parameters(self) -> int:
        """D, the number of adapter weights."""
        return sum(p.numel() for p in self.parameters().values())

    def __iter__(self) -> Iterator[LoraPair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


def unwrap(model: nn.Module) -> nn.Module:
    """Look through DistributedDataParallel, torch.compile and accelerate's wrappers."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def _resolve_adapter(model: nn.Module, adapter_name: str | None) -> str:
    from peft import PeftModel, PeftType

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"`model` must be a PeftModel, got {type(model).__name__}. Wrap it with `peft.get_peft_model(model, "
            "LoraConfig(...))`, or pass `peft_config=` to KalmanTrainer."
        )
    if adapter_name is None:
        active = model.active_adapters
        if len(active) != 1:
            raise ValueError(f"Adapters {active} are active; name one of them with `adapter_name`.")
        adapter_name = active[0]
    if adapter_name not in model.peft_config:
        raise ValueError(f"No adapter {adapter_name!r} in the model; it has {sorted(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"Adapter {adapter_name!r} is of type {config.peft_type}, but a belief is over LoRA factors. "
            "Use `peft.LoraConfig` (rsLoRA and DoRA included)."
        )
    return adapter_name


def _find_pairs(model: nn.Module, adapter_name: str) -> list[LoraPair]:
    from peft.tuners.lora import LoraLayer

    pairs = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter_name in module.lora_embedding_A:
            raise ValueError(
                f"{name}: LoRA on an embedding is not supported; remove it from `target_modules` "
                "(or list it in `modules_to_save`, which the belief leaves out)."
            )
        if adapter_name not in module.lora_A:
            continue
        linear_a, linear_b = module.lora_A[adapter_name], module.lora_B[adapter_name]
        if type(module).__name__ in ("ParamWrapper", "MultiheadAttention") or not (
            isinstance(linear_a, nn.Linear) and isinstance(linear_b, nn.Linear)
        ):
            raise ValueError(
                f"{name}: LoRA on {type(module).__name__} is not supported, only on linear layers; remove it from "
                "`target_modules` / `target_parameters`."
            )
        pairs.append(
            LoraPair(
                name=name,
                linear_a=linear_a,
                linear_b=linear_b,
                scaling=float(module.scaling[adapter_name]),
                merges_linearly=adapter_name not in module.lora_variant,
            )
        )
    if not pairs:
        raise ValueError(f"Adapter {adapter_name!r} has no LoRA linear layer; check `target_modules`.")
    return pairs


def _excluded(model: nn.Module, state: AdapterState) -> dict[str, str]:
    covered = {id(p) for p in state.parameters().values()}
    reasons = (
        ("lora_magnitude_vector", "DoRA magnitude"),
        ("modules_to_save", "modules_to_save"),
        ("lora_", "other adapter"),
        ("bias", "bias"),
    )
    excluded = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            excluded[name] = next((why for part, why in reasons if part in name), "not a LoRA factor")
    return excluded
