"""LoRA with AdamW or a relative of it, where it stops, and how much of its update is kept.

- lora: a schedule of its own, and early stopping: after a share of the steps, or where the validation loss is least.
- wise: W + alpha * (update) after plain training, an interpolation in weight space (WiSE-FT, arXiv:2109.01903).
- lora_plus, lora_fa: PEFT's optimizers (arXiv:2402.12354, arXiv:2308.03303).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from kalman_peft import AdapterState, KalmanConfig, KalmanTrainer

from ..evaluate import text_loss
from ..meters import now
from .options import RATE, Kind, Name, Number, Options
from .training import Clock, Run, Trained, copied


BEST = "best"
MEASUREMENTS = 10  # of the validation loss, evenly over the steps, after one at the start
Points = list[tuple[Options, Trained]]


class InverseTimeTrainer(KalmanTrainer):
    """Trains at the rate lr / (1 + t / t0), t the steps done and t0 a tenth of all, after a linear warm-up if any."""

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """See the Trainer."""
        warmup, t0 = self.args.get_warmup_steps(num_training_steps), max(num_training_steps / 10, 1)

        def factor(step: int) -> float:
            return step / warmup if step < warmup else 1 / (1 + (step - warmup) / t0)

        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


class StopAt(TrainerCallback):
    """Keeps the adapter after given steps, and ends the training at the last of them.

    Args:
        steps (`set[int]`): At least 1 each.
    """

    def __init__(self, steps: set[int]):
        self.steps = steps
        self.kept: dict[int, tuple[dict[str, torch.Tensor], float]] = {}  # adapter, when

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep, or stop."""
        if state.global_step in self.steps:
            self.kept[state.global_step] = AdapterState(model).snapshot(), now(args.device)
        if state.global_step >= max(self.steps):
            control.should_training_stop = True


class KeepBest(TrainerCallback):
    """Keeps the adapter where the validation loss is least: the start, or one of ten evenly spaced steps.

    Args:
        rows (`Dataset`): To validate on.
        steps (`int`): Of the training.
    """

    def __init__(self, rows: Any, steps: int):
        self.rows = rows
        self.steps = {max(1, round(steps * k / MEASUREMENTS)) for k in range(1, MEASUREMENTS + 1)}
        self.losses: dict[int, float] = {}
        self.best: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure the start."""
        self._measure(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure where it is due."""
        if state.global_step in self.steps:
            self._measure(model, state.global_step)

    def _measure(self, model: Any, step: int) -> None:
        self.losses[step] = text_loss(model, self.rows, description="validation")["loss"]
        if self.losses[step] <= min(self.losses.values()):
            self.best = AdapterState(model).snapshot()

    @property
    def step(self) -> int:
        """The first one of least loss; a loss that is not a number is none."""
        return min(self.losses, key=lambda step: (self.losses[step] != self.losses[step], self.losses[step]))


def _lora(run: Run, options: Options) -> Points:
    changes: dict[str, Any] = {"learning_rate": options["lr"]}
    if options["schedule"] in ("linear", "constant"):
        changes["lr_scheduler_type"] = options["schedule"]
    chosen: dict[str, Any] = {"trainer": InverseTimeTrainer} if options["schedule"] == "inverse" else {}
    if options["stop"] == BEST:
        keeper = KeepBest(run.job.validation, run.job.steps)
        trained, _ = run.fit(run.adapt(), callbacks=[keeper], **chosen, **changes)
        AdapterState(trained.model).load(keeper.best)
        trained.figures |= {"stop/step": keeper.step, "stop/validation_loss": keeper.losses[keeper.step]}
        return [({}, trained)]
    shares = options["stop"] if isinstance(options["stop"], tuple) else (options["stop"],)
    if shares == (1.0,):
        return [({}, run.fit(run.adapt(), **chosen, **changes)[0])]
    return _stopped(run, shares, chosen | changes)


def _stopped(run: Run, shares: tuple[float, ...], chosen: dict[str, Any]) -> Points:
    """One training, and the adapter after each share of the steps, with the seconds until then."""
    steps = {share: max(1, round(share * run.job.steps)) for share in shares}
    keeper = StopAt(set(steps.values()))
    clock = Clock(run.device)
    trained, _ = run.fit(run.adapt(), callbacks=[clock, keeper], **chosen)
    points: Points = []
    for share, step in steps.items():
        adapter, when = keeper.kept[step]
        model = trained.model if share == shares[-1] else copied(trained.model)
        AdapterState(model).load(adapter)
        points.append(({"stop": share}, _like(trained, model, when - clock.began, {"stop/step": step})))
    return points


def _like(trained: Trained, model: Any, seconds: float, figures: dict[str, float]) -> Trained:
    return Trained(
        model, seconds, trained.setup_seconds, trained.peak_bytes, trained.peak_kind, figures=trained.figures | figures
    )


def _wise(run: Run, options: Options) -> Points:
    trained, _ = run.fit(run.adapt(), learning_rate=options["lr"])
    alphas = options["alpha"] if isinstance(options["alpha"], tuple) else (options["alpha"],)
    models = [trained.model if alpha == alphas[-1] else copied(trained.model) for alpha in alphas]
    points: Points = []
    for alpha, model in zip(alphas, models, strict=True):
        with torch.no_grad():
            for pair in AdapterState(model):
                pair.b.mul_(alpha)  # B starts at 0, so that the update of W is scaled * B A
        points.append(({"alpha": alpha}, _like(trained, model, trained.seconds, {})))
    return points


def _lora_plus(run: Run, options: Options) -> Points:
    def optimizer(model: Any, args: KalmanConfig) -> torch.optim.Optimizer:
        kind, given = KalmanTrainer.get_optimizer_cls_and_kwargs(args, model)
        rates = {"lr": args.learning_rate, "loraplus_lr_ratio": options["ratio"]}
        return create_loraplus_optimizer(model, kind, **(given | rates), loraplus_weight_decay=args.weight_decay)

    return [({}, run.fit(run.adapt(), make_optimizer=optimizer, learning_rate=options["lr"])[0])]


def _lora_fa(run: Run, options: Options) -> Points:
    def optimizer(model: Any, args: KalmanConfig) -> torch.optim.Optimizer:
        rate: Any = args.learning_rate
        config = model.peft_config["default"]
        return create_lorafa_optimizer(model, config.r, config.lora_alpha, rate, args.weight_decay)

    return [({}, run.fit(run.adapt(), make_optimizer=optimizer, learning_rate=options["lr"])[0])]


KINDS = {
    "lora": Kind(
        RATE
        | {
            "schedule": Name(None, ("linear", "constant", "inverse")),
            "stop": Number(1.0, above=True, high=1.0, several=True, names=(BEST,)),
        },
        _lora,
    ),
    "wise": Kind({"alpha": Number(0.5, high=1.0, several=True)} | RATE, _wise, "alpha"),
    "lora_plus": Kind({"ratio": Number(16.0, low=1.0)} | RATE, _lora_plus, "ratio"),
    "lora_fa": Kind(dict(RATE), _lora_fa),
}
