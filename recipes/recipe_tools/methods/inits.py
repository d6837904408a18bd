"""Adapters that start elsewhere, and orthogonal subspace fine-tuning, both as PEFT has them.

- init: LoRA with another start of its factors. "pissa" and "olora" take the base weights' largest directions, "corda"
  those that matter least (mode=kpm, for texts of the source) or most (mode=ipm, for texts of the target); they
  subtract what they take from the base weights. "eva" starts A at the directions of the target's activations, "mica"
  trains A alone against the base weights' smallest directions; "gaussian" and "orthogonal" look at no data.
- osf: the largest singular directions of every weight are kept, the others are trained (arXiv:2504.07097).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from peft import EvaConfig, LoraConfig, OSFConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.osf.layer import OSFLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch.utils.data import DataLoader

from kalman_peft import AdapterState

from .options import RATE, Kind, Name, Number, Options
from .sources import source_rows
from .training import Run, Trained, tensor_bytes


INITS = ("pissa", "pissa_niter_N", "olora", "corda", "eva", "mica", "orthogonal", "gaussian")
# These take their factors out of the base weights: who keeps only the adapter needs its start too.
SUBTRACTED = ("pissa", "olora", "corda")
COLUMNS = ("input_ids", "attention_mask", "labels")
SAMPLES = 64


def _check_init(given: Options, options: Options) -> None:
    needs = {"mode": ("corda",), "samples": ("corda", "eva")}
    for name, kinds in needs.items():
        if name in given and options["weights"] not in kinds:
            raise ValueError(f"{name}= goes with weights={' or '.join(kinds)}, got weights={options['weights']}")


def _init(run: Run, options: Options) -> list[tuple[Options, Trained]]:
    weights, config = options["weights"], copy.deepcopy(run.job.lora)
    config.init_lora_weights = weights
    with run.setting_up():
        if weights == "corda":
            rows = run.job.target if options["mode"] == "ipm" else source_rows(run, options["samples"])
            _prepare_corda(run, config, rows.select(range(min(options["samples"], len(rows)))), options["mode"])
        if weights == "eva":
            config.eva_config = EvaConfig(rho=1.0)  # the ranks of all layers stay those of plain LoRA
        model = run.adapt(config)
        if weights == "eva":
            _start_eva(run, model, options["samples"])
    extra = tensor_bytes(AdapterState(model).snapshot()) if weights.startswith(SUBTRACTED) else 0
    trained, _ = run.fit(model, learning_rate=options["lr"])
    trained.extra_bytes = extra
    return [({}, trained)]


def _prepare_corda(run: Run, config: LoraConfig, rows: Dataset, mode: str) -> None:
    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"weights=corda: PEFT needs a package for it ({error}); `pip install attrs`"
        ) from error
    # PEFT resolves "all-linear" only when it makes the adapter, which is later.
    _maybe_include_all_linear_layers(config, run.base)
    config.corda_config = CordaConfig(corda_method=mode)  # type: ignore[arg-type]

    def read() -> None:
        for ids in rows["input_ids"]:  # one by one: its hooks know neither batches nor padding
            run.base(input_ids=torch.tensor([ids], device=run.device), use_cache=False)

    preprocess_corda(run.base, config, run_model=read)


def _start_eva(run: Run, model: Any, samples: int) -> None:
    from peft import initialize_lora_eva_weights

    rows = run.job.target.select(range(min(samples, len(run.job.target))))
    rows = rows.select_columns([name for name in COLUMNS if name in rows.column_names])
    collate = run.job.trainer_options["data_collator"]
    loader = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=run.arguments().per_device_train_batch_size,
        collate_fn=lambda batch: dict(collate(batch)),  # EVA takes no other mapping
    )
    initialize_lora_eva_weights(model, loader, show_progress_bar=False)


def _osf(run: Run, options: Options) -> list[tuple[Options, Trained]]:
    lora = run.job.lora
    for name in ("exclude_modules", "layers_to_transform", "rank_pattern", "modules_to_save"):
        if getattr(lora, name, None):
            raise ValueError(f"osf does not know LoraConfig({name}=...); leave it out, or leave out osf.")
    config = OSFConfig(target_modules=lora.target_modules, task_type=lora.task_type)
    if options["keep"] == "rank":
        resolved = cast(Any, _maybe_include_all_linear_layers(copy.deepcopy(config), run.base)).target_modules
        config.rank_pattern = {
            f"{re.escape(name)}$": max(min(module.weight.shape) - lora.r, 1)
            for name, module in run.base.named_modules()
            if isinstance(module, torch.nn.Linear) and _is_target(name, resolved)
        }
    else:
        config.effective_rank = options["keep"]
    with run.setting_up():
        model = run.adapt(config)
        layers: list[Any] = [module for module in model.modules() if isinstance(module, OSFLayer)]
        for layer in layers:
            # PEFT casts the parameters of a bf16 model after it put the projection of gradients on them, and so loses
            # it: put it on again.
            layer._detach_hooks()
            layer._attach_hooks("default")
    trained, _ = run.fit(model, learning_rate=options["lr"])
    kept = sum(tensor_bytes(dict(layer.osf_svd_params["default"].items())) for layer in layers)  # type: ignore[arg-type]
    ordinary = sum(4 * lora.r * (layer.in_features + layer.out_features) for layer in layers)
    trained.extra_bytes = max(kept - ordinary, 0)
    trained.figures |= {"osf/leak": _leak(layers), "osf/parameters": float(kept // 4)}
    return [({}, trained)]


def _is_target(name: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


@torch.no_grad()
def _leak(layers: Sequence[Any]) -> float:
    """Share of the change of U and V that lies in the directions to be kept: projected gradients, but Adam's step."""
    inside = total = 0.0
    for layer in layers:
        now = layer.osf_svd_params["default"]
        for change, start, high in (
            (now["U_low"] - layer._osf_U_low_init["default"], layer._osf_U_low_init["default"], layer._osf_U_high),
            (
                (now["V_low"] - layer._osf_V_low_init["default"]).mT,
                layer._osf_V_low_init["default"].mT,
                layer._osf_V_high,
            ),
        ):
            size = float(change.square().sum())
            if "default" in high:
                basis = high["default"] if high is layer._osf_U_high else high["default"].mT
                inside += float((basis.mT @ change).square().sum())
            else:  # square: what the trained directions do not span
                inside += max(size - float((start.mT @ change).square().sum()), 0.0)
            total += size
    return (inside / total) ** 0.5 if total else 0.0


KINDS = {
    "init": Kind(
        {
            "weights": Name("pissa", INITS),
            "mode": Name("kpm", ("kpm", "ipm")),
            "samples": Number(SAMPLES, low=1, whole=True),
        }
        | RATE,
        _init,
        "weights",
        _check_init,
    ),
    "osf": Kind({"keep": Number(0.5, above=True, high=1.0, below=True, names=("rank",))} | RATE, _osf, "keep"),
}
