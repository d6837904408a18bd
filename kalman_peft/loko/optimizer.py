"""LoKO: a Kalman filter over the adapter's weights as a torch optimizer; no learning rate.

For observations with residual covariance H_i the extended Kalman update in information form is
    P+^-1 = P^-1 + sum_i J_i^T H_i J_i,    theta+ = theta + P+ g,
with g the gradient of the summed log-likelihood. The output Jacobian J is never formed: a few columns C with
E[C C^T] = sum_i J_i^T H_i J_i stand for it, e.g. the gradient of the summed log-likelihood of labels *sampled* from
the model. A memory (see `memories`) keeps what fits of P^-1.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..observations import GaussianObservation, LikelihoodObservation, Observation
from .columns import ColumnTaps
from .harvest import Evidence, Harvest, Plan
from .memories import Joint, create_memories
from .memories.base import TINY
from .options import LoKODefaults, LoKOOptions, check, plan_columns
from .paper import PaperHarvest, update_noise, whiten
from .prior import BeliefPrior, Pull, belief_of
from .rows import linearise


if TYPE_CHECKING:
    from ..belief import Belief


logger = logging.getLogger(__name__)


class LoKO(torch.optim.Optimizer):
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

    `lr` scales the Kalman step and is 1; learning rate schedules act on it.

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
        progress = {
            "settled": False, "steps": 0, "tokens": 0.0, "skipped": 0, "averaged": 0, "evaluating": False,
            "variance": None, "variance_weight": 0.0, "misfit": 1.0, "expected_energy": 0.0, "score_energy": 0.0,
            "column_energy": 0.0, "belief_counted": False,
        }  # fmt: skip
        super().__init__(named, {"lr": 1.0} | defaults | progress)
        self.observation = GaussianObservation() if estimate_noise else observation
        self.estimates_noise = estimate_noise
        group = self.param_groups[0]
        self._memories = create_memories(
            named, group["memory"], rank=group["rank"], dense_limit=group["dense_limit"],
            block_limit=group["block_limit"],
        )  # fmt: skip
        self._views = [memory.view for memory in self._memories]
        self._extras: list[dict[str, Tensor]] = [{} for _ in self._views]
        if group["forgetting"] < 1:
            self._add_extra("start")
        if group["averaging"]:
            self._add_extra("average")
            self._add_extra("live")
        self._noise = [_noise_of(view.names, group["process_noise"], view.like) for view in self._views]
        _check_patterns(group["process_noise"], [name for view in self._views for name in view.names])
        self._set_priors(prior_precision or {})
        self._show_state()
        self._prior = BeliefPrior(self)
        self._harvest = (PaperHarvest if group["mode"] == "paper" else Harvest)(self._views, taps)
        self._plan: Plan | None = None
        self._anchor: list[Tensor] | None = None  # weights before an iterated update
        self._pull: Pull | None = None
        self._prepared = False
        self._drawn = False  # whether the weights are a draw at present
        self._start_loss = 0.0  # mean, at the weights before the step
        self._fit = 0.0, 0.0  # score energy and its expectation, at the weights before the step
        self._diagnostics: dict[str, Any] = {}
        self._gains: list[Tensor] = []

    def _add_extra(self, name: str) -> None:
        for view, extra in zip(self._views, self._extras, strict=True):
            extra[name] = view.read()

    def _set_priors(self, prior_precision: Mapping[str, float | None]) -> None:
        group = self.param_groups[0]
        if group["mode"] == "paper":
            generator = torch.Generator().manual_seed(group["seed"])
            bound = group["initial_bound"]
            for memory in self._memories:
                memory.set_prior(torch.full_like(memory.prior, 2 / bound))
                drawn = torch.rand(memory.view.shape, generator=generator) * bound
                memory.tensors["variance"].copy_(drawn.clamp_min(bound * 1e-6))
            group["settled"] = True
            return
        for memory in self._memories:  # a prior of 0 stands for one that the first columns will settle
            own = torch.tensor([prior_precision.get(name) or 0.0 for name in memory.view.names], dtype=torch.float64)
            memory.set_prior(own.to(memory.prior))
        group["settled"] = all(bool((memory.prior > 0).all()) for memory in self._memories)

    # -- observing -------------------------------------------------------------------------------------------------

    @property
    def draws_curvature(self) -> bool:
        """Whether the coming step takes columns of information, as a rule with one more backward pass."""
        group = self.param_groups[0]
        return not group["settled"] or self._is_drawing(group["steps"])

    def _is_drawing(self, step: int) -> bool:
        group = self.param_groups[0]
        return step < group["first_draws"] or step % group["curvature_every"] == 0

    def _interval(self) -> int:
        """Steps that columns at the step just counted stand for: until the next ones."""
        group = self.param_groups[0]
        step = group["steps"] - 1
        every = group["curvature_every"]
        return 1 if step + 1 < group["first_draws"] else every - step % every

    def observe(self, logits: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
        """Take the scores of a batch, by one or more backward passes through `logits`; calls accumulate until `step`.

        Neither `.grad` nor the hooks of a distributed wrapper are touched: `step` sums over processes by itself. Draws
        belong to a sequence's place in the joined batch of all calls and processes: however a batch is split, the same
        labels are drawn. All processes must call it equally often.

        Args:
            logits (`Tensor`): Shape (B, ..., V), with a graph to the parameters.
            labels (`Tensor`): As the observation takes them; -100 where nothing is observed.
            segments (`Tensor`, *optional*):
                Which sequence each position belongs to, of the labels' shape, where several share a row (packing): the
                first label of a sequence is not explained by the one before.

        Returns:
            `Tensor`: Mean negative log-likelihood of this batch, detached; zero if no label counts. NaN or infinite
            where the logits are: the step then leaves everything as it is.

        Raises:
            RuntimeError: The optimizer is in evaluation mode.
            ValueError: Labels that do not fit, or reentrant gradient checkpointing, which hides the graph.
        """
        group = self.param_groups[0]
        self._check_training("observe")
        _check_inputs(logits, labels)
        rows = linearise(logits, labels, self.observation, segments, options=group, variance=group["variance"])
        if self._plan is None:
            self._plan = self._plan_step(logits)
        self._harvest.add(logits, rows, self._plan, rows.squares() if self.estimates_noise else 0.0)
        return rows.loss.mean() if len(rows) else rows.loss.new_zeros(())

    def _plan_step(self, logits: Tensor) -> Plan:
        group = self.param_groups[0]
        one_each = logits.dim() == 2
        kind, per_sequence = plan_columns(group, self.observation, logits.shape[-1], one_each)
        if not self.draws_curvature:
            kind, per_sequence = "none", False
        seed = group["seed"] * 1_000_003 + group["steps"]
        return Plan(kind, per_sequence, group["num_columns"], group["top_k"], seed)

    def _check_training(self, verb: str) -> None:
        if self._drawn:
            raise RuntimeError(f"LoKO.{verb}() inside sample(), where the weights are drawn ones.")
        if self.param_groups[0]["evaluating"]:
            raise RuntimeError(f"LoKO.{verb}() in evaluation mode; call optimizer.train() first.")

    # -- stepping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One Kalman step from what was observed since the last one.

        A batch whose scores are not finite, or that has no label, is skipped with a warning: weights and memory stay
        as they are.

        Args:
            closure (`Any`, *optional*): Refused; a filter does not re-evaluate.

        Raises:
            RuntimeError: Nothing was observed, or the optimizer is in evaluation mode.
            FloatingPointError: More than `max_skipped` batches in a row were not finite.
            ValueError: A closure is given.
        """
        if closure is not None:
            raise ValueError("LoKO.step takes no closure; call observe(logits, labels) before step().")
        evidence = self._take_evidence()
        self.param_groups[0]["steps"] += 1
        if evidence is not None:
            self._advance(evidence, final=True)
            self._average()
            self._forget()
        else:
            self._diagnostics = {}  # they would be those of another step
            if self._anchor is not None:
                self._write(self._anchor)
        self._anchor, self._pull, self._prepared = None, None, False

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
        if group["curvature_every"] > 1 or (self._plan is not None and not self._is_joint(self._plan)):
            raise ValueError(
                "relinearise() needs the joint gain and columns at every step: set gain='joint', curvature_every=1."
            )
        evidence = self._take_evidence()
        if evidence is not None:
            self._advance(evidence, final=False)

    def _take_evidence(self) -> Evidence | None:
        """What was observed by all processes; `None` if there is nothing to learn from it."""
        self._check_training("step")
        if not self._harvest.observed or self._plan is None:
            raise RuntimeError("LoKO.step() without an observation; call observe(logits, labels) first.")
        plan, group = self._plan, self.param_groups[0]
        evidence = self._harvest.reduce(plan, group["max_columns"])
        usable = self._is_usable(evidence)
        if usable and isinstance(self._harvest, PaperHarvest):
            evidence = self._whitened(evidence, self._harvest.residuals())
        self._harvest.clear()
        self._plan = None
        if not usable:
            return None
        if self.estimates_noise:
            evidence = self._scaled_by_noise(evidence)
        if evidence.columns is not None:
            self._settle_priors(evidence.columns, evidence.count)
        if not group["settled"]:
            return None
        self._prior.count_once()
        return evidence

    def _is_usable(self, evidence: Evidence) -> bool:
        group = self.param_groups[0]
        if evidence.is_finite:
            group["skipped"] = 0
            if evidence.count == 0:
                logger.warning("LoKO saw no label in this step (all -100); weights and memory stay as they are.")
            return evidence.count > 0
        group["skipped"] += 1
        logger.warning(
            "LoKO skipped a batch whose logits or scores overflow or contain NaN or Inf (%d in a row); weights and "
            "memory stay as they are.", group["skipped"],
        )  # fmt: skip
        if group["skipped"] > group["max_skipped"]:
            self._harvest.clear()
            self._plan = None
            raise FloatingPointError(
                f"{group['skipped']} batches in a row contained NaN or Inf. Weights and memory are those before the "
                "first of them; check the data and the model's dtype, or raise max_skipped."
            )
        return False

    def _advance(self, evidence: Evidence, final: bool) -> None:
        """Take in what was observed, and move the weights by the gain within the trust region."""
        group = self.param_groups[0]
        temper, first = self._temper(evidence), not self._prepared
        if first:
            self._predict(evidence.count * temper)
            self._start_loss = evidence.loss / evidence.count
        if final:
            group["tokens"] += evidence.count
        total = [s.mul_(temper) for s in evidence.scores] if temper != 1 else evidence.scores
        energy = None
        if evidence.columns is not None or self._pull is not None:  # else the step's own product is the same
            energy = self._energy([t[None] for t in total])
        if self._pull is not None:
            total = [t.sub_(g) for t, g in zip(total, self._pull.gradient, strict=True)]
        joint = None
        if evidence.columns is not None:
            joint = self._take_in(evidence.columns, evidence, temper * (self._interval() if final else 1))
        if joint is not None and self._anchor is not None:
            total = self._recentred(total, joint)
        steps = [m.gain(t) for m, t in zip(self._memories, total, strict=True)]
        if joint is not None:
            steps = joint.gain(total, steps)
        product = _dot(total, steps)
        scale = self._trust_decrease(product / (temper * evidence.count))
        lengths = [view.norms(s) for view, s in zip(self._views, steps, strict=True)]
        kl = self._gathered(product, lengths) / (2 * max(group["tokens"], 1.0))
        if group["max_kl"] is not None:
            scale = torch.minimum(scale, (group["max_kl"] / kl.clamp_min(TINY)).sqrt())
        if joint is not None and final:
            self._remember(joint, float(scale) * group["lr"])
        self._move(steps, float(scale), final)
        scores = [view.norms(t) for view, t in zip(self._views, total, strict=True)]
        self._gains = [s / t.clamp_min(TINY) for s, t in zip(lengths, scores, strict=True)]
        energy = (product if energy is None else energy) / temper**2
        decrease = product / (temper * evidence.count)
        if first:
            self._report_fit(energy, group["expected_energy"] * evidence.count)
        if final and group["adaptive_noise"] > 0 and self._fit[1] > 0:
            self._track_misfit(*self._fit)  # last, as all linearisations of a step are tempered alike
        self._report(scale, kl, decrease, _norm(lengths) / _norm(scores).clamp_min(TINY))

    def _take_in(self, columns: list[Tensor], evidence: Evidence, weight: float) -> Joint | None:
        """Columns, counting `weight` times, into the memories; or how they couple all weights, for a joint gain."""
        columns = [c.mul_(weight**0.5) for c in columns]
        joint = Joint(columns, self._memories) if self._is_joint(evidence.plan) else None
        expected = self._energy(columns) if joint is None else joint.energy
        self.param_groups[0]["expected_energy"] = float(expected / weight / evidence.count)
        if joint is None:
            for memory, c in zip(self._memories, columns, strict=True):
                memory.update(c)
        return joint

    def _energy(self, columns: list[Tensor]) -> Tensor:
        """Sum over columns of c^T P c."""
        grams = [m.gram(c) for m, c in zip(self._memories, columns, strict=True)]
        return torch.stack([gram.diagonal().sum() for gram in grams]).sum()

    def _gathered(self, product: Tensor, lengths: list[Tensor]) -> Tensor:
        """s^T (P^-1 - prior) s along the step s = P t: the information gathered since the prior, from t^T s."""
        prior = [(m.prior * norm.square()).sum() for m, norm in zip(self._memories, lengths, strict=True)]
        return (product - torch.stack(prior).sum()).clamp_min(0)

    def _is_joint(self, plan: Plan) -> bool:
        if plan.kind == "none":
            return False
        gain = self.param_groups[0]["gain"]
        needed = any(m.needs_joint for m in self._memories)
        return needed or gain == "joint" or (gain == "auto" and plan.per_sequence)

    def _temper(self, evidence: Evidence) -> float:
        """Power on this step's likelihood."""
        group = self.param_groups[0]
        length = evidence.count / max(evidence.sequences, 1.0)
        return group["tempering"] * length ** -group["correlation"] / max(1.0, group["misfit"])

    def _forget(self) -> None:
        """Relax mean and precision to the prior; after the step, as the next batch is linearised at the moved mean."""
        group = self.param_groups[0]
        forgetting = group["forgetting"]
        if forgetting == 1:
            return
        for memory, extra in zip(self._memories, self._extras, strict=True):
            memory.relax(forgetting)
            view = memory.view
            view.add(memory.gain((1 - forgetting) * view.expand(memory.prior) * (extra["start"] - view.read())))
        group["tokens"] *= forgetting

    def _predict(self, weight: float) -> None:
        """Process noise, and the share of a belief that goes with `weight` labels."""
        for memory, noise in zip(self._memories, self._noise, strict=True):
            if noise is not None:
                memory.diffuse(noise)
        self._pull = self._prior.pull(weight)
        if self._pull is not None:
            for memory, information in zip(self._memories, self._pull.information or [], strict=False):
                memory.add_diagonal(information)
            self._diagnostics |= {"drift": self._pull.energy, "penalty": self._prior.strength * self._pull.energy}
        self._prepared = True

    def _recentred(self, total: list[Tensor], joint: Joint) -> list[Tensor]:
        """Score for a step from the anchor, where the linearisation is at the present weights."""
        assert self._anchor is not None
        offset = [view.read() - start for view, start in zip(self._views, self._anchor, strict=True)]
        return joint.add(total, joint.project(offset))

    def _remember(self, joint: Joint, scale: float) -> None:
        """Update the memories; where only a part of the step is taken, a covariance shrinks less (Joseph's form)."""
        kept = 2 * scale - scale**2
        for j, memory in enumerate(self._memories):
            explained = joint.explained(j).mul_(kept) if memory.needs_joint else None
            memory.update(joint.columns[j], explained)

    def _move(self, steps: list[Tensor], scale: float, final: bool) -> None:
        scale *= self.param_groups[0]["lr"]
        if self._anchor is None and not final:
            self._anchor = [view.read() for view in self._views]
        if self._anchor is not None:
            self._write([start + scale * step for start, step in zip(self._anchor, steps, strict=True)])
            return
        for view, step in zip(self._views, steps, strict=True):
            view.add(step, scale)

    def _write(self, values: list[Tensor]) -> None:
        for view, value in zip(self._views, values, strict=True):
            view.write(value)

    def _trust_decrease(self, decrease: Tensor) -> Tensor:
        """Factor on the step that bounds the predicted decrease of the loss by a share of it, nats per label.

        An iterated step is measured from the weights before it, and so is the loss. A likelihood known up to a
        constant only has no such share: there the bound itself is in nats.
        """
        group = self.param_groups[0]
        if group["max_decrease"] is None:
            return torch.ones_like(decrease)
        gained = group["prior_tokens"] / (group["prior_tokens"] + group["tokens"])
        most = group["max_decrease"] * gained ** group["trust_decay"] / max(1.0, group["misfit"])
        if not isinstance(self.observation, LikelihoodObservation):
            most *= self._start_loss
        return (most / decrease.clamp_min(TINY)).clamp_max(1.0)

    def _settle_priors(self, columns: list[Tensor], count: float) -> None:
        """Priors from the first columns: prior_tokens * mean Fisher per label, of all weights or of the parameter's.

        A parameter that (almost) no gradient reached yet gets that of one with a thousandth of the average Fisher.
        """
        group = self.param_groups[0]
        if group["settled"]:
            return
        sums = [view.per_parameter(c.square().sum(0)) / count for view, c in zip(self._views, columns, strict=True)]
        sizes = [
            torch.tensor([p.numel() for p in view.params]).to(f) for view, f in zip(self._views, sums, strict=True)
        ]
        fisher = [f / size for f, size in zip(sums, sizes, strict=True)]
        floor = 1e-3 * torch.cat([f.to(fisher[0]) for f in fisher]).mean()
        if floor == 0:
            logger.warning(
                "The first columns hold no information at all: no gradient, or a likelihood without positive "
                "curvature (for which there is columns='empirical'). The prior is settled at a later step."
            )
            return
        if group["prior"] == "pooled":
            floor = sum(float(f.sum()) for f in sums) / sum(float(size.sum()) for size in sizes)
            fisher = [torch.full_like(f, floor) for f in fisher]
        for memory, own in zip(self._memories, fisher, strict=True):
            known = memory.prior > 0
            unit = group["prior_tokens"] * own.clamp_min(float(floor))
            memory.set_prior(torch.where(known, memory.prior, unit))
        group["settled"] = True

    # -- noise -----------------------------------------------------------------------------------------------------

    def _scaled_by_noise(self, evidence: Evidence) -> Evidence:
        """Scores and columns in units of the estimated noise: the running mean of squared residuals, this step's too.

        Residuals are those before the step, so that the estimate errs on the side of too much noise.
        """
        group = self.param_groups[0]
        if not self._prepared:  # the later linearisations of an iterated step see the same labels
            decay, weight = group["noise_decay"], group["variance_weight"]
            fresh = evidence.squares / evidence.count
            group["variance_weight"] = decay * weight + 1 - decay
            held = decay * weight * (group["variance"] or 0.0)
            group["variance"] = max((held + (1 - decay) * fresh) / group["variance_weight"], 1e-12)
        variance = group["variance"]
        columns = evidence.columns and [c.div_(variance**0.5) for c in evidence.columns]
        scores = [s.div_(variance) for s in evidence.scores]
        return replace(evidence, scores=scores, columns=columns, loss=evidence.loss / variance)

    def _whitened(self, evidence: Evidence, residuals: Tensor) -> Evidence:
        """With `mode="paper"`: rows and residuals as columns and a score, see `paper`."""
        assert evidence.columns is not None
        held = self.state[self._views[0].params[0]]
        noise = update_noise(
            held.get("observation_noise"), evidence.columns, residuals, self._memories,
            self.param_groups[0]["noise_decay"],
        )  # fmt: skip
        held["observation_noise"] = noise
        scores, columns = whiten(noise, evidence.columns, residuals)
        return replace(evidence, scores=scores, columns=columns)

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

    def belief(self, model: Any) -> "Belief":
        """What the filter knows, as a belief over the adapter: its mean, and its precision per observed label.

        Args:
            model (`PeftModel`): The model whose adapter is filtered.

        Returns:
            `Belief`: With structure "ekfac" (Kronecker memory), "diagonal", "low_rank" or "dense"; the number of
            labels by which the precision was divided is `info["num_labels"]`.

        Raises:
            RuntimeError: Inside `sample`.
            ValueError: The prior is not settled yet, or memories of several structures.
        """
        if self._drawn:
            raise RuntimeError("LoKO.belief() inside sample(), where the weights are drawn ones.")
        return belief_of(self, model)

    # -- signals ---------------------------------------------------------------------------------------------------

    @property
    def diagnostics(self) -> dict[str, Any]:
        """Of the last step.

        `loss`; `innovation`: score energy g^T P g over what the model expects, 1 if it fits, large at surprises;
        `kl` and `decrease` of the step, nats per label; `trust`: factor on the step; `gain_norm`: step over score;
        `trace_p`; `effective_observations`: labels that still count; `effective_parameters`: how many weights the data
        have determined, D - sum of prior * variance; with a belief `drift` and `penalty`.
        """
        if not self._diagnostics:
            return {}
        group = self.param_groups[0]
        traces = [m.traces() for m in self._memories]
        left = sum(float((t * m.prior).sum()) for t, m in zip(traces, self._memories, strict=True))
        return self._diagnostics | {
            "trace_p": sum(float(t.sum()) for t in traces),
            "effective_observations": group["tokens"] * group["tempering"] / max(1.0, group["misfit"]),
            # Process noise can make a variance larger than the prior's.
            "effective_parameters": max(0.0, sum(p.numel() for v in self._views for p in v.params) - left),
        }

    def gains(self) -> dict[str, float]:
        """Gain of each parameter at the last step, norm of its step over norm of its score."""
        return {
            name: float(value)
            for view, gain in zip(self._views, self._gains, strict=False)
            for name, value in zip(view.names, gain, strict=True)
        }

    @property
    def innovation(self) -> float | None:
        """That of `diagnostics`, without the cost of the rest; `None` if the last step had none."""
        found = self._diagnostics.get("innovation")
        return None if found is None else float(found)

    def _report_fit(self, energy: Tensor, expected: float) -> None:
        """How well the data fit, at the weights before the step."""
        self._fit = float(energy), expected
        self._diagnostics["loss"] = self._start_loss
        if expected > 0:
            self._diagnostics["innovation"] = energy / expected

    def _report(self, scale: Tensor, kl: Tensor, decrease: Tensor, gain: Tensor) -> None:
        self._diagnostics |= {
            "kl": kl * scale.square(),
            "gain_norm": gain,
            "trust": scale,
            "decrease": decrease * scale,
        }
        if self.estimates_noise:
            self._diagnostics["variance"] = self.param_groups[0]["variance"]

    def _track_misfit(self, energy: float, expected: float) -> None:
        """Ratio of running means, from 1; a mean of ratios would be lost to one batch that expects next to nothing."""
        group = self.param_groups[0]
        decay = group["adaptive_noise"]
        if group["column_energy"] == 0:
            group["score_energy"] = group["column_energy"] = expected
        group["score_energy"] = decay * group["score_energy"] + (1 - decay) * energy
        group["column_energy"] = decay * group["column_energy"] + (1 - decay) * expected
        group["misfit"] = group["score_energy"] / group["column_energy"]

    @torch.no_grad()
    def inflate(self, factor: float) -> None:
        """Widen the belief after a drift: what was learned counts 1 / factor, and the trust region opens again.

        Args:
            factor (`float`): > 1.

        Raises:
            ValueError: It is not.
        """
        check(1 < factor < math.inf, f"factor must be > 1 and finite, got {factor}")
        for memory in self._memories:
            memory.relax(1 / factor)
        self.param_groups[0]["tokens"] /= factor

    # -- evaluating ------------------------------------------------------------------------------------------------

    def eval(self) -> None:
        """Put the averaged weights in place (with `averaging=True`), and refuse to step until `train`."""
        group = self.param_groups[0]
        if not group["evaluating"] and group["averaging"]:
            self._keep_live()
            with torch.no_grad():
                self._write([extra["average"] for extra in self._extras])
        group["evaluating"] = True

    def train(self) -> None:
        """Put the filter's own weights back in place after `eval`."""
        group = self.param_groups[0]
        if group["evaluating"] and group["averaging"]:
            with torch.no_grad():
                self._write([extra["live"] for extra in self._extras])
        group["evaluating"] = False

    @contextmanager
    def posterior_mean(self) -> Iterator[None]:
        """Evaluate at the posterior mean: the filter's weights, or their average with `averaging=True`.

        Yields:
            None: Inside, the model has these weights, and the optimizer is in evaluation mode.
        """
        was = self.param_groups[0]["evaluating"]
        self.eval()
        try:
            yield
        finally:
            if not was:
                self.train()

    @contextmanager
    def sample(self, generator: torch.Generator | None = None, scale: float = 1.0) -> Iterator[None]:
        """Evaluate an adapter drawn from the filter's belief, N(theta, scale^2 P).

        Args:
            generator (`torch.Generator`, *optional*): Source of the draw, on the parameters' device.
            scale (`float`, *optional*, defaults to 1.0): Factor on the standard deviations.

        Yields:
            None: Inside, the model has the drawn weights.

        Raises:
            RuntimeError: The prior is not settled yet.
            ValueError: The scale is negative or not finite.
        """
        check(0 <= scale < math.inf, f"scale must be >= 0 and finite, got {scale}")
        if not self.param_groups[0]["settled"]:
            raise RuntimeError("The prior is not settled; take a step before drawing from the belief.")
        was, self._drawn = self._drawn, True
        kept = [p.detach().clone() for view in self._views for p in view.params]
        try:
            with torch.no_grad():
                for memory in self._memories:
                    memory.view.add(memory.sample(generator), scale)
            yield
        finally:
            with torch.no_grad():
                for p, value in zip((p for view in self._views for p in view.params), kept, strict=True):
                    p.copy_(value)
            self._drawn = was

    def _average(self) -> None:
        """Polynomial-decay average (Shamir and Zhang, 2013): the t-th iterate comes in with weight 9 / (t + 8)."""
        group = self.param_groups[0]
        if group["averaging"]:
            group["averaged"] += 1
            for view, extra in zip(self._views, self._extras, strict=True):
                extra["average"].lerp_(view.read(), 9 / (group["averaged"] + 8))

    # -- state -----------------------------------------------------------------------------------------------------

    def _entries(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """The filter's state by parameter.

        Yields:
            tuple: Parameter, name, and a tensor that shares memory with the state.
        """
        for memory, extra in zip(self._memories, self._extras, strict=True):
            for p, parts in memory.view.shared_state(memory.tensors):
                yield from ((p, key, part) for key, part in parts.items())
            for key, tensor in extra.items():
                for p, part in zip(memory.view.params, memory.view.slices(tensor), strict=True):
                    yield p, key, part

    def _show_state(self) -> None:
        for p, key, part in self._entries():
            self.state[p][key] = part

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only from the constructor: the memory is laid out once.

        Args:
            param_group (`dict[str, Any]`): From the constructor.

        Raises:
            ValueError: Called later.
        """
        if self.param_groups:
            raise ValueError("LoKO has one parameter group; create a new optimizer for other parameters.")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("LoKO cannot be copied or pickled as an object; use state_dict() and load_state_dict().")

    def state_dict(self) -> dict[str, Any]:
        """As of torch; with an average, which may be in the model's place, the filter's own weights are part of it."""
        if self.param_groups[0]["averaging"] and not self.param_groups[0]["evaluating"]:
            self._keep_live()
        return super().state_dict()

    def _keep_live(self) -> None:
        for view, extra in zip(self._views, self._extras, strict=True):
            extra["live"].copy_(view.read())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved filter bit for bit; torch would cast the state to the parameters' dtype.

        A filter saved in evaluation mode comes back in training mode, with its own weights in place.

        Args:
            state_dict (`dict`): From `state_dict()` of a filter over the same parameters.

        Raises:
            ValueError: The saved filter has another memory, or other shapes.
        """
        saved, own = state_dict["param_groups"][0], self.param_groups[0]
        if "memory" not in saved:
            raise ValueError("The saved optimizer state is not one of LoKO; resume with the optimizer that wrote it.")
        for name in ("mode", "memory", "rank", "averaging", "forgetting"):
            same = saved.get(name) == own[name]
            if name == "forgetting":  # its value may change, but with 1 the start is not kept
                same = (saved.get(name, 1) < 1) == (own[name] < 1)
            if not same:
                raise ValueError(
                    f"The saved filter has {name}={saved.get(name)!r}, this one {own[name]!r}; resume with the same."
                )
        slots = saved["params"]
        if len(own["params"]) != len(slots):
            raise ValueError(f"The saved filter has {len(slots)} parameters, this one {len(own['params'])}.")
        for name, other in zip(own["param_names"], saved.get("param_names", own["param_names"]), strict=True):
            check(name == other, f"The saved filter is over {other!r} where this one has {name!r}")
        entries = {
            id(p): (name, state_dict["state"].get(slot, {}))
            for p, slot, name in zip(own["params"], slots, own["param_names"], strict=True)
        }
        for p, key, part in self._entries():
            name, found = entries[id(p)]
            if key not in found or found[key].shape != part.shape:
                raise ValueError(f"The saved filter does not fit: {key!r} of {name} is missing or of another shape.")
        for p, key, part in self._entries():
            part.copy_(entries[id(p)][1][key])
        first = self._views[0].params[0]
        noise = entries[id(first)][1].get("observation_noise")
        if noise is not None:
            self.state[first]["observation_noise"] = noise.to(first.device, copy=True)
        changed = {k: (own[k], v) for k, v in saved.items() if k in LoKODefaults and own[k] != v}
        if changed:
            logger.warning(
                "LoKO goes on with the saved options: %s", {k: f"{v[1]}, not {v[0]}" for k, v in changed.items()}
            )
        own.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
        own["evaluating"] = own["averaging"]  # so that `train` puts the filter's own weights in place
        self._noise = [_noise_of(view.names, own["process_noise"], view.like) for view in self._views]
        self.train()
        self.discard()

    def discard(self) -> None:
        """Drop what was observed since the last step, as if it had not been."""
        self._harvest.clear()
        self._plan, self._anchor, self._pull, self._prepared = None, None, None, False


def _check_inputs(logits: Any, labels: Any) -> None:
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}; pass `model(**inputs).logits`.")
    if not logits.requires_grad:
        raise ValueError(
            "logits have no graph to the weights: run the model with gradients enabled and its adapter active, and do "
            "not detach them."
        )


def _noise_of(names: list[str], noise: float | Mapping[str, float], like: Tensor) -> Tensor | None:
    """Process noise per parameter (n,), or `None` if there is none."""
    if isinstance(noise, Mapping):
        found = [[q for pattern, q in noise.items() if re.search(pattern, name)] for name in names]
        values = [matches[-1] if matches else 0.0 for matches in found]
    else:
        values = [noise] * len(names)
    return torch.tensor(values, dtype=torch.float64).to(like) if any(values) else None


def _check_patterns(noise: float | Mapping[str, float], names: list[str]) -> None:
    if isinstance(noise, Mapping):
        unused = [pattern for pattern in noise if not any(re.search(pattern, name) for name in names)]
        check(not unused, f"process_noise: patterns {unused} match no parameter; there are {names[:3]} and others")


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]).sum()


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()
