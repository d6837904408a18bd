"""Cost of a curvature pass, as ratios to one plain forward and backward; beside it what peers take for the same.

`measuring` says how ratios are taken. The plain run is `model(**batch).loss.backward(); model.zero_grad()` with the
cache off, over the same batches, which are fully labelled, for peers know no masks. B is random, as after training.
Seconds within the loops over batches are "per batch" (averaged over `batches` of them); all that a pass does outside
(hooks, test matrices of the sketches, eigendecompositions) is "once per pass"; 16 batches make up a whole pass.

    python recipes/benchmarks/curvature_cost.py --rounds 5
    python recipes/benchmarks/curvature_cost.py --rounds 5 --scaling --output curvature_cost.json
    python recipes/benchmarks/curvature_cost.py --peers none
"""

import json
import logging
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import HfArgumentParser

from kalman_peft import AdapterState, estimate_curvature

from curvature_peers import PEERS, Found, Peer
from curvature_runs import EVERY_SIDE, PASS, PLAIN, Variant, bytes_of, measure_curvatures, misfits, randomise_b
from curvature_scaling import scale
from curvature_tables import show
from measuring import Options, Samples, add_adapter, load_base, make_batch


TOLERANCE = 1e-3  # relative, in float32
CHECK_BATCH, CHECK_TOKENS = 2, 33
DENSE = Variant("kronecker", dense=True)
VARIANTS = (
    *(Variant("diagonal", fisher) for fisher in ("empirical", "sampled", "rademacher")),
    *(Variant("kronecker", fisher) for fisher in ("empirical", "sampled", "rademacher")),
    Variant("kronecker", space="delta_w"),
    Variant("block_tridiagonal"),
    Variant("ekfac"),
    Variant("ekfac", space="delta_w"),
    Variant("low_rank"),
    Variant("diagonal", space="delta_w"),
    DENSE,
)
TARGETS = (  # variant, what it is compared with, limit
    (Variant("diagonal"), PLAIN, 1.15),
    (Variant("kronecker"), PLAIN, 1.15),
    (Variant("kronecker", space="delta_w"), PLAIN, 1.15),
    (Variant("diagonal", "sampled"), PLAIN, 1.45),
    (Variant("kronecker", "sampled"), PLAIN, 1.45),
    (Variant("block_tridiagonal"), Variant("kronecker").name, 1.25),
)
# Ours that is held against the peers of a quantity, like for like, and as it is by default.
RIVALS = {"diagonal": (Variant("diagonal"),), "kronecker": (DENSE, Variant("kronecker"))}


@dataclass
class CurvatureOptions(Options):
    """What is measured, and on what."""

    rounds: int = field(default=5, metadata={"help": "Counted rounds, after one of warm-up."})
    batches: int = field(default=4, metadata={"help": "Batches of a measured pass."})
    peers: list[str] = field(
        default_factory=lambda: sorted({peer.library for peer in PEERS}), metadata={"help": "Libraries, or 'none'."}
    )
    scaling: bool = field(default=False, metadata={"help": "Also over ranks and model sizes, with Llama-3.1-8B."})
    scaling_rounds: int = field(default=3, metadata={"help": "Counted rounds of each setting of the scaling."})


def chosen_peers(names: list[str]) -> list[Peer]:
    """Peers of the named libraries.

    Raises:
        ValueError: A name that no peer has.
    """
    known = {peer.library for peer in PEERS}
    if unknown := set(names) - known - {"none"}:
        raise ValueError(f"peers must be among {sorted(known)}, or 'none'; got {sorted(unknown)}.")
    return [peer for peer in PEERS if peer.library in names]


def check_peers(options: CurvatureOptions) -> list[dict[str, Any]]:
    """Whether ours and theirs are equal, in float32 on one small batch.

    The diagonal over the whole adapter; the Kronecker factors, with every side in full, on the smallest layer.
    """
    rows = []
    for quantity in ("diagonal", "kronecker"):
        peers = [peer for peer in chosen_peers(options.peers) if peer.quantity == quantity and peer.is_installed]
        if not peers:
            continue
        model = add_adapter(load_base(options.model, "float32"), options.r)
        if quantity == "kronecker":
            smallest = min(AdapterState(model), key=lambda pair: pair.a.shape[1] + pair.b.shape[0])
            model = add_adapter(model.unload(), options.r, [smallest.name.removeprefix("base_model.model.")])
        randomise_b(model)
        batch = make_batch(model, CHECK_BATCH, min(options.tokens, CHECK_TOKENS))
        ours = _ours(model, batch, quantity)
        for peer in peers:
            row: dict[str, Any] = {"peer": peer.name, "quantity": quantity, "equal": False}
            try:
                row["difference"] = _difference(ours, peer.prepare(model)([batch]))
                row["equal"] = row["difference"] <= TOLERANCE
            except Exception as error:  # a peer that fails is no reason to lose the other figures
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
    return rows


def _ours(model: Any, batch: dict[str, Tensor], quantity: str) -> Found:
    """What `Peer` runs return, from our precision per token."""
    precision: Any
    precision, record = estimate_curvature(
        model, [batch], quantity, "empirical", space="adapter", dense_limit=EVERY_SIDE, progress_bar=False
    )
    tokens = record["num_tokens"]  # as many as positions that count
    if quantity == "diagonal":
        return {key: entries * tokens for key, entries in precision.entries.items()}
    return {key: tuple(side.to_dense() * tokens for side in sides) for key, sides in precision.blocks.items().items()}


def _difference(ours: Found, theirs: Found) -> float:
    """Largest over the factors of |ours - theirs| / |theirs|, Frobenius norms."""

    def distance(a: Any, b: Any) -> float:
        if isinstance(a, tuple):
            return max(map(distance, a, b))
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        return float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))

    return max(distance(value, theirs[key]) for key, value in ours.items())


def judge(samples: dict[str, Samples], checks: list[dict[str, Any]], batches: int) -> list[dict[str, Any]]:
    """One row per target, `passed` being None where it could not be measured."""
    rows = []
    for variant, reference, limit in TARGETS:
        rows.append(_judged(samples, variant.name, reference, limit, PASS / batches))
    for quantity, variants in RIVALS.items():
        peers = [c["peer"] for c in checks if c["quantity"] == quantity and c["equal"] and c["peer"] in samples]
        if peers:
            fastest = min(peers, key=lambda name: statistics.median(samples[name].repeated))
            rows += [_judged(samples, variant.name, fastest, 1.0, None) for variant in variants]
    return rows


def _judged(samples: dict[str, Samples], name: str, reference: str, limit: float, once_in: float | None) -> dict:
    row: dict[str, Any] = {"what": name, "over": reference, "limit": limit, "value": None, "passed": None}
    if name in samples and reference in samples:
        row["value"] = samples[name].over(samples[reference])
        row["passed"] = row["value"] <= limit
        if once_in is not None:
            row["whole_pass"] = samples[name].over(samples[reference], once_in)
    return row


def summarise(model: Any, samples: dict[str, Samples], batches: int) -> dict[str, dict[str, Any]]:
    """Figures of every row of the table."""
    sizes = {variant.name: bytes_of(model, variant) for variant in VARIANTS if variant.name in samples}
    unfinished = {DENSE.name, *(peer.name for peer in PEERS)}
    plain = samples[PLAIN]
    return {
        name: {
            "seconds_per_batch": statistics.median(sample.repeated) / batches,
            "per_batch": sample.over(plain),
            "once_seconds": None if name in unfinished else statistics.median(sample.once),
            "whole_pass": None if name in unfinished else sample.over(plain, PASS / batches),
            "peak_mib": statistics.median(sample.mebibytes),
            "curvature_bytes": sizes.get(name),
        }
        for name, sample in samples.items()
    }


def measure_all(
    options: CurvatureOptions, say: Callable[[str], None]
) -> tuple[dict[str, Samples], dict[str, dict[str, Any]], dict[str, str]]:
    """Our variants and the peers in turn: samples, figures, and what was left out for which reason."""
    model = add_adapter(load_base(options.model, options.dtype), options.r)
    model.config.use_cache = False
    randomise_b(model)
    batches = [make_batch(model, options.batch, options.tokens)] * options.batches
    others, skipped = {}, {}
    for peer in chosen_peers(options.peers):
        if not peer.is_installed:
            skipped[peer.name] = f"`{peer.library}` or what it needs is not installed"
            continue
        try:
            run = peer.prepare(model)
            run(batches[:1])
        except Exception as error:  # not every peer takes every dtype
            skipped[peer.name] = f"{type(error).__name__}: {error}"
        else:
            others[peer.name] = _discarding(run, batches)
    skipped |= misfits(model, VARIANTS)
    variants = [variant for variant in VARIANTS if variant.name not in skipped]
    say(f"measuring {1 + len(variants) + len(others)} rows over {options.rounds} rounds and one of warm-up")
    samples = measure_curvatures(model, batches, variants, options.rounds, others)
    return samples, summarise(model, samples, options.batches), skipped


def _discarding(run: Callable[[Any], Any], batches: list[Any]) -> Callable[[], None]:
    def discarding() -> None:
        run(batches)

    return discarding


def benchmark(options: CurvatureOptions, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Check, measure, and judge.

    Args:
        options (`CurvatureOptions`): What is measured, and on what.
        say (`Callable`, *optional*): Told what is under way.

    Returns:
        `dict`: "options", "machine", "checks", "skipped" (row -> reason), "figures" (row -> figures), "targets", and
        with `options.scaling` the tables of `scale` under "scaling".
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    say("checking against peers")
    checks = check_peers(options)
    samples, figures, skipped = measure_all(options, say)
    result: dict[str, Any] = {
        "options": asdict(options),
        "machine": {
            "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "torch": torch.__version__,
        },
        "checks": checks,
        "skipped": skipped,
        "figures": figures,
        "targets": judge(samples, checks, options.batches),
    }
    if options.scaling:
        result["scaling"] = scale(options, say)
    return result


def main() -> None:
    """Measure, print tables, write JSON."""
    warnings.simplefilter("ignore", FutureWarning)  # peers' and transformers' own
    logging.getLogger("kalman_peft").setLevel(logging.ERROR)  # tells of large curvatures, which the table does
    (options,) = HfArgumentParser(CurvatureOptions, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    result = benchmark(options, lambda line: print(line, file=sys.stderr, flush=True))
    show(result, Console(width=165))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
