"""Penalties on the factors: pulls towards the start (L2, elastic weight consolidation, arXiv:1612.00796), and a shape.

Loss + strength * R(theta), R = 1/2 (theta - theta_0)^T Lambda (theta - theta_0), theta all factors A and B:
- l2: Lambda = I.
- ewc: Lambda = diagonal empirical Fisher of A and B: squared scores of source sequences with their true labels,
  per token. With B = 0 at the start that of A is 0.
- ewc_dw: the same Fisher of the merged updates scaling * B A (EWC-LoRA), R = 1/2 sum F_oi (update_oi)^2.

ima: loss + weight * sum of the independent-mechanism contrast of the columns of B and the rows of A, which knows no
start: it spreads an update over the ranks that it has.
"""

from __future__ import annotations

from kalman_peft import AdapterState, initial_belief
from kalman_peft.ima import FACTORS

from .options import RATE, Kind, Name, Number, Options
from .sources import belief_bytes, source_rows
from .training import Run, Trained, tensor_bytes


def _l2(run: Run, options: Options) -> list[tuple[Options, Trained]]:
    model = run.adapt()
    with run.setting_up():
        belief = initial_belief(AdapterState(model), 1.0, "diagonal")
    trained, _ = run.fit(model, belief=belief, laplace_strength=options["strength"], learning_rate=options["lr"])
    trained.extra_bytes = tensor_bytes(belief.mean)  # the identity need not be kept
    return [({}, trained)]


def _ewc(run: Run, options: Options, space: str = "adapter") -> list[tuple[Options, Trained]]:
    trained, trainer = run.fit(
        run.adapt(),
        source=source_rows(run, options["samples"]),
        laplace_strength=options["strength"],
        laplace_structure="diagonal",
        laplace_space=space,
        laplace_fisher="empirical",
        laplace_reduction="sequence",
        source_samples=options["samples"],
        source_heldout=0,
        learning_rate=options["lr"],
    )
    trained.extra_bytes = belief_bytes(trainer)
    return [({}, trained)]


def _ewc_dw(run: Run, options: Options) -> list[tuple[Options, Trained]]:
    return _ewc(run, options, "delta_w")


def _ima(run: Run, options: Options) -> list[tuple[Options, Trained]]:
    changes = {"ima_weight": options["weight"], "ima_factors": options["factors"]}
    return [({}, run.fit(run.adapt(), learning_rate=options["lr"], **changes)[0])]


def _check_ima(given: Options, options: Options) -> None:
    if "factors" in given and not options["weight"]:
        raise ValueError("factors= has no effect with weight=0")


EWC = {"strength": Number(1.0), "samples": Number(64, low=1, whole=True)} | RATE
KINDS = {
    "l2": Kind({"strength": Number(1e-3)} | RATE, _l2, "strength"),
    "ewc": Kind(EWC, _ewc, "strength"),
    "ewc_dw": Kind(EWC, _ewc_dw, "strength"),
    "ima": Kind({"weight": Number(0.01), "factors": Name("both", FACTORS)} | RATE, _ima, "weight", _check_ima),
}
