"""LoKO: a Kalman filter over the adapter's weights as a torch optimizer; no learning rate.

For observations with residual covariance H_i the extended Kalman update in information form is
    P+^-1 = P^-1 + sum_i J_i^T H_i J_i,    theta+ = theta + P+ g,
with g the gradient of the summed log-likelihood. The output Jacobian J is never formed: a few columns C with
E[C C^T] = sum_i J_i^T H_i J_i stand for it, e.g. the gradient of the summed log-likelihood of labels *sampled* from
the model. A memory (see `memories`) keeps what fits of P^-1; `update` is the step itself.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..observations import GaussianObservation, LikelihoodObservation, Observation
from .columns import ColumnTaps
from .filter import GaussianFilter
from .harvest import Evidence
from .idle import warn_at_start
from .intake import Intake
from .options import LoKOOptions, check
from .planning import draws_columns, is_joint
from .update import KalmanUpdate


if TYPE_CHECKING:
    from ..belief import Belief


class LoKO(GaussianFilter):
    """Kalman filter over named parameters. Whatever their dtype, its state is float32 (float64 in dense matrices).

    Use [`create_loko_optimizer`], which reads the prior off the model. In a hand-written loop:

    ```python
    logits = model(**inputs).logits
    loss = optimizer.observe(logits, labels)  # backward passes; several calls accumulate
    optimizer.step()
    ```

    For tiny batches the update may be iterated, each time linearised at the newest weights:

    ```python
    for _ in range(2):
        optimizer.observe(model(**inputs).logits, labels)
        optimizer.relinearise()
    optimizer.observe(model(**inputs).logits, labels)
    optimizer.step()
    ```

    `lr` scales the Kalman step and is 1; learning rate schedules act on it. Where it or the trust region allow only a
    part a of the step, memories differ: those that hold a precision count the data seen, and take in all of a batch's
    information, also at `lr=0`; "diagonal_covariance" holds the covariance of the weights' error, which such a step
    leaves at P - (2 a - a^2) (P - P+) (Joseph's form): at `lr=0` it does not shrink.

    Args:
        params (`Iterable[tuple[str, Tensor]]`): Named trainable parameters.
        observation (`Observation`): How labels meet logits.
        prior_precision (`dict[str, float | None]`, *optional*):
            Prior precision per parameter name; `None` stands for the unit-information prior.
        estimate_noise (`bool`, *optional*, defaults to `False`):
            Estimate the variance of Gaussian labels while training, rather than take the observation's.
        taps (`ColumnTaps`, *optional*): On the model's linear layers, for columns of single sequences.
        **options: See [`LoKOOptions`].

    Raises:
        ValueError: An option is out of its range, or there is no parameter.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        observation: Observation,
        *,
        prior_precision: Mapping[str, float | None] | None = None,
        estimate_noise: bool = False,
        taps: ColumnTaps | None = None,
        **options: Any,
    ):
        defaults = LoKOOptions(**options).resolve(observation)
        params = list(params)
        check(
            all(isinstance(entry, tuple) and len(entry) == 2 for entry in params),
            "params must be (name, parameter) pairs, as from model.named_parameters()",
        )
        named = [(n, p) for n, p in params if p.requires_grad]
        check(bool(named), "There is no trainable parameter; was the adapter loaded with `is_trainable=True`?")
        if estimate_noise and not isinstance(observation, GaussianObservation):
            raise ValueError(f"estimate_noise=True needs a GaussianObservation, got {type(observation).__name__}.")
        check(
            not estimate_noise or defaults["mode"] != "paper",
            "estimate_noise=True is not possible with mode='paper', which has a noise estimate of its own",
        )
        warn_at_start(defaults, estimate_noise)
        super().__init__(named, defaults, prior_precision or {})
        self.observation = GaussianObservation() if estimate_noise else observation
        self.estimates_noise = estimate_noise
        group = self.param_groups[0]
        in_nats = isinstance(self.observation, LikelihoodObservation)
        self._update = KalmanUpdate(group, self._memories, self._prior, in_nats)
        self._intake = Intake(
            group, self._memories, self.observation, taps=taps, estimate_noise=estimate_noise,
            state=self.state[self._views[0].params[0]],
        )  # fmt: skip
        self._harvest = self._intake.harvest

    # -- observing -------------------------------------------------------------------------------------------------

    @property
    def draws_curvature(self) -> bool:
        """Whether the coming step takes columns of information, as a rule with one more backward pass."""
        return draws_columns(self.param_groups[0])

    def observe(self, logits: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
        """Take the scores of a batch, by one or more backward passes through `logits`; calls accumulate until `step`.

        Neither `.grad` nor the hooks of a distributed wrapper are touched: `step` sums over processes by itself. Draws
        belong to a sequence's place in the joined batch of all calls and processes: however a batch is split, the same
        labels are drawn. All processes must call it equally often; an error on one of several is kept for `step`,
        which raises it on all of them.

        Args:
            logits (`Tensor`): Shape (B, ..., V), with a graph to the parameters.
            labels (`Tensor`): As the observation takes them; -100 where nothing is observed.
            segments (`Tensor`, *optional*):
                Which sequence each position belongs to, of the labels' shape, where several share a row (packing): the
                first label of a sequence is not explained by the one before.

        Returns:
            `Tensor`: Mean negative log-likelihood of this batch, detached; zero if no label counts. NaN or infinite
            where the logits are: the step then leaves everything as it is. NaN where an error waits for `step`.

        Raises:
            RuntimeError: The optimizer is in evaluation mode.
            ValueError: With one process: labels that do not fit, or reentrant gradient checkpointing, which hides the
                graph.
        """
        self._check_training("observe")
        return self._intake.add(logits, labels, segments)

    @property
    def has_failed(self) -> bool:
        """Whether an error of `observe` waits for `step`; with several processes only."""
        return self._harvest.has_failed

    # -- stepping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One Kalman step from what was observed since the last one.

        A batch whose scores are not finite, or that has no label, is skipped with a warning: weights and memory stay
        as they are.

        Args:
            closure (`Any`, *optional*): Refused; a filter does not re-evaluate.

        Raises:
            RuntimeError: Nothing was observed, the optimizer is in evaluation mode, or `observe` failed on another
                process (where it failed, its own error).
            FloatingPointError: More than `max_skipped` batches in a row were not finite.
            ValueError: A closure is given.
        """
        if closure is not None:
            raise ValueError("LoKO.step takes no closure; call observe(logits, labels) before step().")
        group = self.param_groups[0]
        drawing = self.draws_curvature
        evidence = self._take_evidence()
        group["steps"] += 1
        group["draw_due"] = drawing and evidence is None  # what a skipped batch did not tell, the next one does
        if evidence is None:
            self._update.signals.values = {}  # they would be those of another step
            self._update.abandon()
            return
        self._advance(evidence, final=True)
        self._update.reset()
        self._average.update()
        if group["forgetting"] < 1:
            self._update.forget([extra["start"] for extra in self._extras])

    @torch.no_grad()
    def relinearise(self) -> None:
        """An inner step of the iterated update: move to the posterior mean under the present linearisation.

        The memory takes nothing in until `step`. Observe the same batch again afterwards. (The iterated Kalman update
        is Gauss-Newton on the posterior: Bell and Cathey, 1993.)

        Raises:
            RuntimeError: Nothing was observed.
            ValueError: The gain is not the joint one, or `mode="paper"`.
        """
        group = self.param_groups[0]
        check(group["mode"] != "paper", "mode='paper' knows no relinearise(); use mode='kalman'")
        plan = self._intake.plan
        if group["curvature_every"] > 1 or (plan is not None and not is_joint(group["gain"], plan, self._memories)):
            raise ValueError(
                "relinearise() needs the joint gain and columns at every step: set gain='joint', curvature_every=1."
            )
        self._update.begin()
        evidence = self._take_evidence()
        if evidence is not None:
            self._advance(evidence, final=False)

    def discard(self) -> None:
        """Drop what was observed since the last step, as if it had not been."""
        self._intake.clear()
        self._update.abandon()

    def release(self) -> None:
        """Take the optimizer's taps off the model, after its last step: another optimizer may follow."""
        if self._harvest.taps is not None:
            self._harvest.taps.remove()
            self._harvest.taps = None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See [`GaussianFilter.load_state_dict`]; what was observed since the last step is dropped.

        Args:
            state_dict (`dict`): From `state_dict()` of a filter over the same parameters.
        """
        super().load_state_dict(state_dict)
        self._update.read_noise()
        self._intake.clear()
        self._update.reset()

    def _take_evidence(self) -> Evidence | None:
        """What was observed by all processes, with the prior settled; `None` if there is nothing to learn from it."""
        self._check_training("step")
        if self._intake.is_empty:
            raise RuntimeError("LoKO.step() without an observation; call observe(logits, labels) first.")
        try:
            evidence = self._intake.take(fresh=not self._update.prepared)
        except Exception:
            self._update.abandon()
            raise
        if evidence is not None:
            self._prior.count_once()
        return evidence

    def _advance(self, evidence: Evidence, final: bool) -> None:
        self._update.advance(evidence, final)
        if self.estimates_noise:
            self._update.signals.values["variance"] = self.param_groups[0]["variance"]

    # -- prior belief ----------------------------------------------------------------------------------------------

    def set_belief(
        self, belief: "Belief", strength: float = 1.0, mode: str = "factor", num_labels: float | None = None
    ) -> None:
        """Take a belief (Laplace approximation on source data) as prior, weighed by `strength` per target label.

        Args:
            belief (`Belief`): Over the same adapter.
            strength (`float`, *optional*, defaults to 1.0): lambda.
            mode (`str`, *optional*, defaults to `"factor"`):
                "factor": each step adds its labels' share of the penalty's gradient and of its Gauss-Newton diagonal,
                which any belief allows. "penalty": the gradient only. "prior": the whole of it at once, as the
                filter's initial precision lambda N Lambda + delta I, for a belief over A and B (space "adapter").
            num_labels (`float`, *optional*): N, the target labels of the whole run; needed for "prior".

        Raises:
            ValueError: Unknown mode, negative strength, a belief over other weights, or one that would count twice.
        """
        self._prior.set(belief, strength, mode, num_labels)

    @property
    def belief_strength(self) -> float:
        """Strength of the prior belief; settable while training, as a forgetting budget does."""
        return self._prior.strength

    @belief_strength.setter
    def belief_strength(self, value: float) -> None:
        self._prior.change_strength(value)

    # -- signals ---------------------------------------------------------------------------------------------------

    @property
    def diagnostics(self) -> dict[str, float]:
        """Of the last step.

        `loss`; `innovation`: score energy g^T P g over what the model expects, 1 if it fits, large at surprises;
        `kl` and `decrease` of the step, nats per label; `trust`: factor on the step; `gain_norm`: step over score;
        `trace_p`; `effective_observations`: labels that still count; `effective_parameters`: how many weights the data
        (and the damping, which counts as data here and in `belief`) have determined, D - sum of prior * variance; with
        a belief `drift` and `penalty`.
        """
        return self._update.signals.all(self.param_groups[0], self._memories)

    def gains(self) -> dict[str, float]:
        """Gain of each parameter at the last step, norm of its step over norm of its score."""
        return self._update.signals.gains_by_name(self._views)

    @property
    def innovation(self) -> float | None:
        """That of `diagnostics`, without the cost of the rest; `None` if the last step had none."""
        return self._update.signals.innovation

    @torch.no_grad()
    def inflate(self, factor: float) -> None:
        """Widen the belief after a drift: what was learned counts 1 / factor, and the trust region opens again.

        Args:
            factor (`float`): > 1.

        Raises:
            ValueError: It is not.
        """
        check(1 < factor < math.inf, f"factor must be > 1 and finite, got {factor}")
        self._update.inflate(factor)
