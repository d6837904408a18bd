"""What this library adds: a Laplace belief that holds the adapter, a Kalman filter that trains it, and both.

- laplace: AdamW, and the penalty of a belief fitted on source data (LaLoRA).
- loko: the LoKO filter; with prior > 0 a belief of that strength is its prior.
Both may replay a share of source rows besides.
"""

from __future__ import annotations

from typing import Any

from kalman_peft import LoKOOptions
from kalman_peft.config import EVIDENCE, KalmanArguments
from kalman_peft.curvature.fisher import FISHERS
from kalman_peft.curvature.memory import DEFAULT_RANK, SPACES, STRUCTURES
from kalman_peft.laplace import FORMS
from kalman_peft.loko import BELIEF_MODES, MEMORIES

from .options import RATE, Kind, Name, Number, Options
from .replay import with_source
from .sources import SOURCES, belief_bytes, source_rows
from .training import Run, Trained


# Rows whose loss a forgetting budget is held against.
HELDOUT = 16
CURVATURE = {
    "structure": Name("kronecker", tuple(s for s in STRUCTURES if s != "dense")),
    "space": Name("delta_w", SPACES),
    "fisher": Name("sampled", FISHERS),
    "rank": Number(DEFAULT_RANK, low=1, whole=True),
    "samples": Number(64, low=1, whole=True),
    "source": Name("true", SOURCES),
}
REPLAY = {"replay": Number(0.0, high=1.0, below=True)}


def changes_of(options: Options) -> dict[str, Any]:
    """Fields of [`KalmanConfig`] for the curvature's options."""
    changes = {f"laplace_{name}": options[name] for name in ("structure", "space", "fisher", "rank")}
    return changes | {"source_samples": options["samples"]}


def _laplace_changes(options: Options) -> dict[str, Any]:
    changes = changes_of(options) | {"laplace_form": options["form"]}
    changes |= {f"laplace_{name}_steps": options[name] for name in ("warmup", "refit")}
    budget = options["budget"]
    held = {"source_heldout": 0} if budget is None else {"source_heldout": HELDOUT, "forgetting_budget": budget}
    return changes | held | {"laplace_strength": options["strength"]}


def _check_curvature(options: Options) -> None:
    if options["source"] == "proxy" and options["fisher"] == "empirical":
        raise ValueError("fisher=empirical would hold on to the target's own labels with source=proxy; use sampled")
    if options["rank"] != CURVATURE["rank"].default and options["structure"] == "diagonal":
        raise ValueError(f"rank={options['rank']} has no effect with structure=diagonal")


def _check_laplace(given: Options, options: Options) -> None:
    if options["budget"] is not None:
        if "strength" in given:
            raise ValueError("budget= chooses the strength; give one of strength= and budget=")
        if options["source"] == "proxy":
            raise ValueError("budget= bounds the rise of the source loss, which source=proxy does not show")
        options["strength"] = None
    _check_curvature(options)
    KalmanArguments(**_laplace_changes(options))  # refuses what does not go together


def _laplace(run: Run, options: Options) -> list[tuple[Options, Trained]]:
    if options["refit"] >= run.job.steps:
        raise ValueError(f"refit={options['refit']} is never due in {run.job.steps} steps; give a smaller one.")
    heldout = 0 if options["budget"] is None else HELDOUT
    return _fit(run, options, heldout, learning_rate=options["lr"], **_laplace_changes(options))


def _check_loko(given: Options, options: Options) -> None:
    LoKOOptions(**_loko_options(options))
    if not options["prior"]:
        unused = [name for name in given if name in CURVATURE or name == "mode"]
        if unused:
            raise ValueError(f"{', '.join(unused)}: no effect with prior=0, which has no belief; give prior= above 0")
        return
    if options["mode"] == "prior" and options["space"] != "adapter":
        raise ValueError(f"mode=prior needs space=adapter, a Gaussian over A and B; got space={options['space']}")
    _check_curvature(options)
    KalmanArguments(**changes_of(options))


def _loko_options(options: Options) -> dict[str, Any]:
    chosen = {name: options[name] for name in ("memory", "max_decrease", "curvature_every")}
    return chosen | {"prior_tokens": options["tokens"]}


def _loko(run: Run, options: Options) -> list[tuple[Options, Trained]]:
    changes: dict[str, Any] = {f"loko_{name}": value for name, value in _loko_options(options).items()}
    # The filter has a rate, a schedule and a bound of its own, not the scenario's.
    changes |= {"learning_rate": None, "lr_scheduler_type": None, "max_grad_norm": None, "weight_decay": 0.0}
    changes |= {"optimizer": "loko", "warmup_steps": 0}
    if options["prior"]:
        changes |= changes_of(options) | {"loko_belief_mode": options["mode"], "source_heldout": 0}
        changes["laplace_strength"] = options["prior"]
    return _fit(run, options, 0, bool(options["prior"]), **changes)


def _fit(
    run: Run, options: Options, heldout: int, believes: bool = True, **changes: Any
) -> list[tuple[Options, Trained]]:
    """Train with a belief, and with replay if asked for."""
    rows, extra, figures = with_source(run, options["replay"]) if options["replay"] else (None, 0, {})
    source = source_rows(run, options["samples"], heldout, options["source"]) if believes else None
    trained, trainer = run.fit(run.adapt(), rows, source=source, **changes)
    trained.extra_bytes = extra + belief_bytes(trainer)
    trained.figures |= figures
    return [({}, trained)]


KINDS = {
    "laplace": Kind(
        {"strength": Number(100.0, names=(EVIDENCE,))}
        | CURVATURE
        | {
            "form": Name("gradient", FORMS),
            "warmup": Number(0, whole=True),
            "refit": Number(0, whole=True),
            "budget": Number(None, above=True),
        }
        | REPLAY
        | RATE,
        _laplace,
        "strength",
        _check_laplace,
    ),
    "loko": Kind(
        {
            "prior": Number(0.0),
            "memory": Name("kronecker", MEMORIES),
            "max_decrease": Number(0.5, above=True),
            "tokens": Number(None, above=True),
            "curvature_every": Number(None, low=1, whole=True),
            "mode": Name("factor", BELIEF_MODES),
        }
        | CURVATURE
        | REPLAY,
        _loko,
        "prior",
        _check_loko,
    ),
}
