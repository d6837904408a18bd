"""One Kalman step: predict, take in columns, move the weights by the gain within the trust region, forget.

For a step that is iterated, all linearisations are taken from one prediction, and the memory takes in the last.
"""

from typing import Any

import torch
from torch import Tensor

from .harvest import Evidence
from .memories import Joint, Memory
from .noise import process_noise
from .planning import interval, is_joint
from .prior import BeliefPrior, Pull
from .signals import Signals
from .tempering import temper, track_misfit
from .trust import decrease_factor, divergence, kl_factor
from .views import write_all


_EARLY = ("settled", "belief_counted", "variance", "variance_weight")  # progress made before a step ends


class KalmanUpdate:
    """The steps of one filter.

    Args:
        group (`dict[str, Any]`): Options and progress of the filter.
        memories (`list[Memory]`): Of the filter.
        prior (`BeliefPrior`): Of the filter.
        in_nats (`bool`): Whether the loss is known up to a constant only, see `trust`.

    Attributes:
        signals (`Signals`): What the last step reports.
        noise (`list[Tensor | None]`): Process noise, (n,) per view.
        anchor (`list[Tensor]`, *optional*): Weights before an iterated step.
        prepared (`bool`): Whether the step has begun: noise and belief are in.
    """

    def __init__(self, group: dict[str, Any], memories: list[Memory], prior: BeliefPrior, in_nats: bool):
        self._group, self._memories, self._prior, self._in_nats = group, memories, prior, in_nats
        self._views = [memory.view for memory in memories]
        self.signals = Signals()
        self.read_noise()
        self.reset()

    def read_noise(self) -> None:
        """Take the process noise from the options."""
        self.noise = [process_noise(view, self._group["process_noise"]) for view in self._views]

    def reset(self) -> None:
        """The step is over."""
        self.anchor: list[Tensor] | None = None
        self._pull: Pull | None = None
        self.prepared = False
        self._progress: dict[str, Any] = {}  # as before an iterated step, where that may change it
        self._kept: list[dict[str, Tensor]] = []

    def begin(self) -> None:
        """Keep what an iterated step changes before its end: noise, belief and prior come in first."""
        if self.prepared:
            return
        group = self._group
        self._progress = {name: group[name] for name in _EARLY}
        noisy = any(noise is not None for noise in self.noise)
        if noisy or self._prior.adds_information or not group["settled"]:
            self._kept = [{k: t.clone() for k, t in memory.tensors.items()} for memory in self._memories]

    @torch.no_grad()
    def abandon(self) -> None:
        """The step is not to be: weights and memory as before it."""
        if self.anchor is not None:
            write_all(self._views, self.anchor)
        self._group.update(self._progress)
        for memory, kept in zip(self._memories, self._kept, strict=False):  # none where nothing changed
            for name, tensor in kept.items():
                memory.tensors[name].copy_(tensor)
        self.reset()

    def advance(self, evidence: Evidence, final: bool) -> None:
        """Take in what was observed, and move the weights by the gain within the trust region.

        Args:
            evidence (`Evidence`): Overwritten.
            final (`bool`): Whether the memory is to take it in; else this is an inner linearisation.
        """
        group = self._group
        power, first = temper(group, evidence), not self.prepared
        if first:
            self._predict(evidence.count * power)
            self.signals.loss = evidence.loss / evidence.count
        if final:
            group["tokens"] += evidence.count
        total = [s.mul_(power) for s in evidence.scores] if power != 1 else evidence.scores
        energy = None
        if evidence.columns is not None or self._pull is not None:  # else the step's own product is the same
            energy = self._energy([t[None] for t in total])
        if self._pull is not None:
            total = [t.sub_(g) for t, g in zip(total, self._pull.gradient, strict=True)]
        joint = None
        if evidence.columns is not None:
            joint = self._take_in(evidence.columns, evidence, power * (interval(group) if final else 1))
        if joint is not None and self.anchor is not None:
            total = self._recentred(total, joint)
        steps = [m.gain(t) for m, t in zip(self._memories, total, strict=True)]
        if joint is not None:
            steps = joint.gain(total, steps)
        product = _dot(total, steps)
        decrease = product / (power * evidence.count)
        lengths = [view.norms(s) for view, s in zip(self._views, steps, strict=True)]
        kl = divergence(self._gathered(product, lengths), group["tokens"])
        scale = self._trusted(decrease, kl)
        if joint is not None and final:
            self._remember(joint, float(scale) * group["lr"])
        self._move(steps, float(scale) * group["lr"], final)
        if first:
            energy = (product if energy is None else energy) / power**2
            self.signals.report_fit(energy, group["expected_energy"] * evidence.count)
        if final and group["adaptive_noise"] > 0 and self.signals.fit[1] > 0:
            track_misfit(group, *self.signals.fit)  # last, as all linearisations of a step are tempered alike
        scores = [view.norms(t) for view, t in zip(self._views, total, strict=True)]
        self.signals.report_step(scale, kl, decrease, lengths, scores)

    def forget(self, start: list[Tensor]) -> None:
        """Relax mean and precision to the prior; after the step, as the next batch is linearised at the moved mean.

        Args:
            start (`list[Tensor]`): The prior's mean, per view.
        """
        forgetting = self._group["forgetting"]
        for memory, mean in zip(self._memories, start, strict=True):
            memory.relax(forgetting)
            view = memory.view
            view.add(memory.gain((1 - forgetting) * view.expand(memory.prior) * (mean - view.read())))
        self._group["tokens"] *= forgetting

    def inflate(self, factor: float) -> None:
        """What was learned counts 1 / factor."""
        for memory in self._memories:
            memory.relax(1 / factor)
        self._group["tokens"] /= factor

    def _predict(self, weight: float) -> None:
        """Process noise, and the share of a belief that goes with `weight` labels."""
        for memory, noise in zip(self._memories, self.noise, strict=True):
            if noise is not None:
                memory.diffuse(noise)
        self._pull = self._prior.pull(weight)
        if self._pull is not None:
            for memory, information in zip(self._memories, self._pull.information or [], strict=False):
                memory.add_diagonal(information)
            energy = self._pull.energy
            self.signals.values |= {"drift": energy, "penalty": self._prior.strength * energy}
        self.prepared = True

    def _take_in(self, columns: list[Tensor], evidence: Evidence, weight: float) -> Joint | None:
        """Columns, counting `weight` times, into the memories; or how they couple all weights, for a joint gain."""
        columns = [c.mul_(weight**0.5) for c in columns]
        joint = None
        if is_joint(self._group["gain"], evidence.plan, self._memories):
            joint = Joint(columns, self._memories)
        expected = self._energy(columns) if joint is None else joint.energy
        self._group["expected_energy"] = float(expected / weight / evidence.count) * evidence.undamped
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

    def _trusted(self, decrease: Tensor, kl: Tensor) -> Tensor:
        """Factor of the trust region on the step."""
        group = self._group
        scale = decrease_factor(
            decrease,
            max_decrease=group["max_decrease"],
            loss=None if self._in_nats else self.signals.loss,
            trust_decay=group["trust_decay"],
            prior_tokens=group["prior_tokens"],
            tokens=group["tokens"],
            misfit=group["misfit"],
        )
        return scale if group["max_kl"] is None else torch.minimum(scale, kl_factor(kl, group["max_kl"]))

    def _recentred(self, total: list[Tensor], joint: Joint) -> list[Tensor]:
        """Score for a step from the anchor, where the linearisation is at the present weights."""
        assert self.anchor is not None
        offset = [view.read() - start for view, start in zip(self._views, self.anchor, strict=True)]
        return joint.add(total, joint.project(offset))

    def _remember(self, joint: Joint, scale: float) -> None:
        """Update the memories; where only a part of the step is taken, a covariance shrinks less (Joseph's form)."""
        kept = 2 * scale - scale**2
        for j, memory in enumerate(self._memories):
            explained = joint.explained(j).mul_(kept) if memory.needs_joint else None
            memory.update(joint.columns[j], explained)

    def _move(self, steps: list[Tensor], scale: float, final: bool) -> None:
        if self.anchor is None and not final:
            self.anchor = [view.read() for view in self._views]
        if self.anchor is not None:
            write_all(self._views, [start + scale * step for start, step in zip(self.anchor, steps, strict=True)])
            return
        for view, step in zip(self._views, steps, strict=True):
            view.add(step, scale)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]).sum()
