"""Quantised base models: what they need to be trained through."""

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit layers on the CPU.

    On CPUs with AVX512-BF16, the first evaluation repacks a 4-bit layer for good, and no gradient passes through a
    packed one: adapters below it would be trained on a part of theirs, without an error.

    Args:
        model (`nn.Module`): Changed in place; left alone without such layers.

    Raises:
        ValueError: A layer is packed already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"bitsandbytes packed the 4-bit weights of {name} when the model was evaluated on the CPU, and no "
                    "gradient passes through them any more; call `model.state_dict()`, which unpacks them, or load "
                    "the model again."
                )
