"""Beliefs to and from other libraries: the state of a laplace-torch posterior, and plain diagonal Fisher files.

Only units and names change hands: laplace-torch sums curvature over the data, a belief is a mean per token; EWC-style
files name tensors as `model.named_parameters()` does, a belief as the saved adapter does.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import AdapterState
from .belief import Belief, BeliefError, write_atomically
from .lineage import describe
from .precision import DiagonalPrecision, EigenFactor


_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_PICKLE_STARTS = (b"PK", b"\x80")  # torch.save's zip archive, and a bare pickle of protocol 2 or later
_PEFT_PREFIX = "base_model.model."
# "<path>.lora_A.default.weight" of `named_parameters()`, or "<path>.lora_A.weight" of a saved adapter.
_FACTOR_NAME = re.compile(r"\.lora_([AB])(?:\.(?!weight$)([^.]+))?\.weight$")


def to_laplace_torch(
    belief: Belief,
    model: nn.Module,
    *,
    structure: str | None = None,
    prior_precision: float | Tensor = 1.0,
    prior_mean: float | Tensor = 0.0,
    likelihood: str = "classification",
    temperature: float = 1.0,
    num_outputs: int | None = None,
    num_tokens: int | None = None,
    loss: float = 0.0,
    dense_limit: int = 4096,
    adapter_name: str | None = None,
) -> dict[str, Any]:
    """The dictionary that laplace-torch's `DiagLaplace.load_state_dict` or `KronLaplace.load_state_dict` takes.

    laplace-torch's curvature H is a sum over the data, in the order of the model's trainable parameters: a diagonal
    vector, or one pair (L, R) per parameter with H = L (x) R on its row-major vec, L summed and R averaged over the
    data. A belief's precision is a mean per token, so H (its left factors) is num_tokens times that. Its posterior is
    N(mean, (H / temperature + prior_precision)^-1).

    Args:
        belief (`Belief`): In the space of the adapter's weights, of diagonal or Kronecker structure.
        model (`PeftModel`):
            The model that the posterior will be built on. Its trainable tensors must be the LoRA factors, all of them
            and nothing else, since laplace-torch covers every parameter with `requires_grad`.
        structure (`str`, *optional*):
            "diagonal" or "kronecker"; the belief's own by default. "diagonal" takes the diagonal of any belief, in any
            space, at its mean.
        prior_precision (`float` or `Tensor`, *optional*, defaults to 1.0):
            Scalar, or one entry per parameter tensor, or (diagonal only) per weight.
        prior_mean (`float` or `Tensor`, *optional*, defaults to 0.0): Scalar or one entry per weight.
        likelihood (`str`, *optional*, defaults to `"classification"`): As given to the laplace-torch class.
        temperature (`float`, *optional*, defaults to 1.0): As given to the laplace-torch class.
        num_outputs (`int`, *optional*): Number of logits; by default the vocabulary, or `num_labels` of a classifier.
        num_tokens (`int`, *optional*): Observed source tokens; by default those the belief was made from.
        loss (`float`, *optional*, defaults to 0.0):
            Summed negative log-likelihood of the source data at the mean. It only shifts laplace-torch's log marginal
            likelihood by a constant.
        dense_limit (`int`, *optional*, defaults to 4096):
            Longest side of a truncated Kronecker factor (top eigenpairs and tail) that is written out in full, n x n.
        adapter_name (`str`, *optional*): Defaults to the active adapter.

    Returns:
        `dict[str, Any]`: Tensors on the model's device, float32 (float64 if the belief is); not yet a file.

    Raises:
        BeliefError: The belief is over another adapter.
        ValueError: The belief cannot be expressed, the trainable parameters are not its own, or num_tokens is unknown.
    """
    state = belief.check(model, adapter_name)
    keys = _trainable_keys(state)
    tokens = num_tokens if num_tokens is not None else belief.info.get("curvature", {}).get("num_tokens")
    if not tokens or tokens < 0:
        raise ValueError(
            f"num_tokens must be positive, got {tokens}: laplace-torch's curvature is a sum over the data, and the "
            "belief does not say how many tokens it was made from. Pass `num_tokens`."
        )
    device = state.pairs[0].a.device
    structure = _export_structure(belief, structure)
    if structure == "diagonal":
        entries = belief.precision.diagonal(belief.mean)
        curvature: Any = torch.cat([entries[key].reshape(-1) for key in keys]).to(device) * tokens  # (D,)
        dtype = curvature.dtype
    else:
        blocks = belief.precision.blocks.items()  # type: ignore[attr-defined]
        curvature = [[_dense(factor, key, dense_limit).to(device) for factor in blocks[key]] for key in keys]
        for left, _ in curvature:
            left.mul_(tokens)
        dtype = curvature[0][0].dtype
    return {
        "cls_name": "DiagLaplace" if structure == "diagonal" else "KronLaplace",
        "mean": torch.cat([belief.mean[key].reshape(-1) for key in keys]).to(device, dtype),  # (D,)
        "H": curvature,
        "loss": loss,
        "prior_mean": prior_mean,
        "prior_precision": prior_precision,
        "sigma_noise": 1.0,
        "n_data": int(tokens),
        "n_outputs": num_outputs if num_outputs is not None else _num_outputs(state.model),
        "likelihood": likelihood,
        "temperature": temperature,
        "enable_backprop": False,
    }


def belief_from_fisher(
    model: nn.Module,
    fisher: str | os.PathLike | Mapping[str, Tensor],
    *,
    mean: str | os.PathLike | Mapping[str, Tensor] | None = None,
    prefix: str | None = None,
    mean_prefix: str | None = None,
    reduction: str = "mean",
    num_tokens: int | None = None,
    scale: float = 1.0,
    adapter_name: str | None = None,
) -> Belief:
    """A belief from a diagonal Fisher information of EWC: one tensor per LoRA factor, of the factor's shape.

    Names may be those of `model.named_parameters()` ("base_model.model.<layer>.lora_A.default.weight") or of a saved
    adapter ("base_model.model.<layer>.lora_A.weight"), without "base_model.model.", under another adapter's name, and
    behind one common prefix, such as "fisher." or the "module." of DistributedDataParallel.

    A belief is in nats per observed token. Entries that are already means over tokens need nothing; sums over tokens
    need `reduction="sum"`. `scale` serves every other unit: 1 / T for means over sequences of T tokens of squared
    summed scores; T for means over batches of squared gradients of the mean loss of T tokens, the usual EWC loop.

    Args:
        model (`PeftModel`): Model with the LoRA adapter that the Fisher information is over.
        fisher (`str`, `os.PathLike` or `Mapping[str, Tensor]`): A safetensors file, or the tensors by name.
        mean (`str`, `os.PathLike` or `Mapping[str, Tensor]`, *optional*):
            The weights at which it was taken, likewise; the adapter's present weights by default.
        prefix (`str`, *optional*):
            Use only the names that start with it, for a file that holds more. Found by itself by default.
        mean_prefix (`str`, *optional*): The same for `mean`.
        reduction (`str`, *optional*, defaults to `"mean"`):
            "mean": entries are means per token. "sum": sums over `num_tokens` tokens.
        num_tokens (`int`, *optional*): Number of observed tokens; needed for "sum", otherwise only recorded.
        scale (`float`, *optional*, defaults to 1.0): Further factor on all entries, > 0.
        adapter_name (`str`, *optional*): Defaults to the active adapter.

    Returns:
        `Belief`: With a diagonal precision; `info["curvature"]` says where it came from.

    Raises:
        FileNotFoundError: There is no such file.
        BeliefError: The file is a pickle or no safetensors file; names, shapes or values do not fit the adapter.
        ValueError: `reduction`, `num_tokens` or `scale` is not usable.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    if not (0 < scale < math.inf):
        raise ValueError(f"scale must be positive and finite, got {scale}.")
    state = AdapterState(model, adapter_name)
    found, source, metadata = _read(fisher, "fisher")
    if num_tokens is None and metadata.get("num_tokens", "").isdigit():
        num_tokens = int(metadata["num_tokens"])
    if (num_tokens is None and reduction == "sum") or (num_tokens is not None and num_tokens <= 0):
        raise ValueError(
            f"num_tokens must be positive, got {num_tokens}: reduction='sum' is divided by the number of tokens that "
            "were summed over. Pass `num_tokens`, or reduction='mean' if the entries are means per token already."
        )
    factor = scale / num_tokens if reduction == "sum" and num_tokens else scale
    entries = {key: f * factor for key, f in _fit(found, state, prefix, f"fisher ({source})").items()}
    negative = next((key for key, f in entries.items() if (f < 0).any()), None)
    if negative is not None:
        raise BeliefError(
            f"fisher ({source}) has negative entries at {negative} (lowest {entries[negative].min().item():.3g}), but "
            "a Fisher information is a mean of squares. Is it a gradient, or the mean of the weights?"
        )
    center, center_source = state.snapshot(), "the adapter's weights"
    if mean is not None:
        given, center_source, _ = _read(mean, "mean")
        center = {key: m.float() for key, m in _fit(given, state, mean_prefix, f"mean ({center_source})").items()}
    record = {
        "structure": "diagonal",
        "space": "adapter",
        "fisher": "imported",
        "source": source,
        "mean": center_source,
        "reduction": reduction,
        "scale": scale,
        "num_tokens": num_tokens,
    }
    return Belief(center, DiagonalPrecision(entries), {"adapter": describe(state), "curvature": record})


def save_fisher(
    belief: Belief,
    fisher_file: str | os.PathLike,
    mean_file: str | os.PathLike | None = None,
    *,
    adapter_name: str = "default",
) -> None:
    """Write the diagonal of a belief as a plain safetensors file, for EWC code that knows nothing of beliefs.

    Names are those of `named_parameters()` of a PeftModel; entries are means per token, their number is in the file's
    metadata. [`belief_from_fisher`] reads it back.

    Args:
        belief (`Belief`): Of any structure; its diagonal is taken at its mean.
        fisher_file (`str` or `os.PathLike`): Where the diagonal goes.
        mean_file (`str` or `os.PathLike`, *optional*): Where the mean goes, under the same names.
        adapter_name (`str`, *optional*, defaults to `"default"`): Stands in the names.
    """
    tokens = belief.info.get("curvature", {}).get("num_tokens")
    metadata = {"format": "pt", "reduction": "mean"} | ({"num_tokens": str(tokens)} if tokens else {})
    files = [(fisher_file, belief.precision.diagonal(belief.mean), metadata)]
    if mean_file is not None:
        files.append((mean_file, belief.mean, {"format": "pt"}))
    for path, tensors, about in files:
        named = {
            key.removesuffix("weight") + f"{adapter_name}.weight": t.detach().cpu().contiguous()
            for key, t in tensors.items()
        }
        write_atomically(Path(path), lambda p, named=named, about=about: save_file(named, p, about))


# -- laplace-torch ----------------------------------------------------------------------------------------------------


def _trainable_keys(state: AdapterState) -> list[str]:
    """State keys in the order of the model's trainable parameters, which must be the same set."""
    keys = {id(p): key for key, p in state.parameters().items()}
    trainable = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    foreign = [name for name, p in trainable.items() if id(p) not in keys]
    if foreign:
        raise ValueError(
            f"laplace-torch covers every parameter with requires_grad, but {len(foreign)} of them are not in the "
            f"belief ({foreign[0]}). Call `requires_grad_(False)` on them first."
        )
    order = [keys[id(p)] for p in trainable.values()]
    if len(order) < len(keys):
        frozen = sorted(set(keys.values()) - set(order))
        raise ValueError(
            f"{len(frozen)} factors of the belief are frozen in the model ({frozen[0]}), and laplace-torch covers "
            "only parameters with requires_grad. Load the adapter with `is_trainable=True`."
        )
    return order


def _export_structure(belief: Belief, structure: str | None) -> str:
    own, space = belief.precision.structure, belief.precision.space
    if structure == "diagonal" or (structure is None and (own, space) == ("diagonal", "adapter")):
        return "diagonal"
    if structure not in (None, "kronecker"):
        raise ValueError(f"structure must be 'diagonal' or 'kronecker', got {structure!r}.")
    if (own, space) != ("kronecker", "adapter"):
        raise ValueError(
            f"laplace-torch has no posterior of structure {own!r} in {space} space. Pass structure='diagonal' for the "
            "diagonal at the mean, or fit the belief with space='adapter' and structure 'diagonal' or 'kronecker'."
        )
    return "kronecker"


def _dense(factor: EigenFactor, key: str, dense_limit: int) -> Tensor:
    if not factor.is_complete and factor.size > dense_limit:
        size = factor.values.element_size() * factor.size**2 / 2**20
        raise ValueError(
            f"{key} has a Kronecker side of {factor.size}, of which {factor.values.shape[-1]} eigenpairs are kept; "
            f"laplace-torch needs it in full ({size:.0f} MiB), and dense_limit is {dense_limit}. Pass a larger "
            "`dense_limit`, or structure='diagonal'."
        )
    return factor.to_dense()


def _num_outputs(model: Any) -> int:
    base = model.get_base_model()
    if "Classification" in type(base).__name__:
        return base.config.num_labels
    config: Any = getattr(base, "config", None)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    if vocabulary is None:
        raise ValueError(f"Cannot tell how many outputs {type(base).__name__} has. Pass `num_outputs`.")
    return vocabulary


# -- Fisher files -----------------------------------------------------------------------------------------------------


def _read(source: str | os.PathLike | Mapping[str, Tensor], argument: str) -> tuple[Mapping, str, dict[str, str]]:
    """Tensors by name, what to call their source, and the file's metadata."""
    if isinstance(source, Mapping):
        return source, "mapping", {}
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {path} is no file.")
    with path.open("rb") as file:
        start = file.read(2)
    if path.suffix in _PICKLES or start.startswith(_PICKLE_STARTS):
        raise BeliefError(
            f"{argument}: {path.name} is a pickle, which may run code when it is read. Where you trust it, convert it "
            "once: `safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)`."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, path.name, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BeliefError(f"{argument}: {path} is no safetensors file, or truncated ({error}).") from error


def _fit(named: Mapping[str, Any], state: AdapterState, prefix: str | None, what: str) -> dict[str, Tensor]:
    """The tensors under the adapter's keys, on its device, in float32 or better; anything else is refused."""
    names = _match(named, state, prefix, what)
    result = {}
    for key, parameter in state.parameters().items():
        t = named[names[key]]
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise BeliefError(
                f"{what}: {names[key]} must be a floating-point tensor, got {getattr(t, 'dtype', type(t))}."
            )
        if t.shape != parameter.shape:
            raise BeliefError(
                f"{what}: {names[key]} has shape {tuple(t.shape)}, the adapter's factor {tuple(parameter.shape)}; use "
                "the rank `r` it was made with."
            )
        t = t.detach().to(parameter.device, torch.promote_types(t.dtype, torch.float32))
        if not torch.isfinite(t).all():
            raise BeliefError(f"{what}: {names[key]} contains NaN or Inf.")
        result[key] = t
    return result


def _match(named: Mapping[str, Any], state: AdapterState, prefix: str | None, what: str) -> dict[str, str]:
    """Which name in the file stands for which key of the adapter."""
    keys = {key.removeprefix(_PEFT_PREFIX): key for key in state.parameters()}
    matched: dict[str, str] = {}
    prefixes, adapters, foreign = set(), set(), []
    for name in named:
        if prefix is not None and not name.startswith(prefix):
            continue
        canonical = _FACTOR_NAME.sub(r".lora_\1.weight", name if prefix is None else name[len(prefix) :])
        short, before = _strip(canonical, keys) if prefix is None else (canonical.removeprefix(_PEFT_PREFIX), prefix)
        if short not in keys:
            foreign.append(name)
            continue
        match = _FACTOR_NAME.search(name)
        adapters.add(match[2] if match else None)
        prefixes.add(before)
        matched.setdefault(keys[short], name)
    remedy = "Select the tensors of this adapter and pass them as a mapping"
    if len(prefixes) > 1:
        raise BeliefError(f"{what} has names with different prefixes {sorted(prefixes)}; choose one with `prefix`.")
    if len(adapters) > 1:
        raise BeliefError(f"{what} has tensors of several adapters {sorted(map(str, adapters))}. {remedy}.")
    missing = [key for key in state.parameters() if key not in matched]
    if missing or foreign:
        raise BeliefError(
            f"{what} does not fit adapter {state.adapter_name!r}: "
            + (f"{len(missing)} of {len(keys)} factors are missing ({missing[0]}). " if missing else "")
            + (f"{len(foreign)} names are of no factor ({foreign[0]}). " if foreign else "")
            + f"{remedy}, or use the `target_modules` it was made with."
        )
    return matched


def _strip(name: str, keys: Mapping[str, str]) -> tuple[str, str]:
    """Split a name into the longest ending that is a key, and what stands before it."""
    start = 0
    while start >= 0:
        if name[start:] in keys:
            return name[start:], name[:start].removesuffix(_PEFT_PREFIX)
        dot = name.find(".", start)
        start = dot + 1 if dot >= 0 else -1
    return name, ""
