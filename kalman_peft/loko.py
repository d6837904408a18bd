"""LoKO: a Kalman filter over the adapter's weights as a torch optimizer; no learning rate.

For categorical observations the extended Kalman update in information form is
    P+^-1 = P^-1 + sum_i J_i^T (diag p_i - p_i p_i^T) J_i,    theta+ = theta + P+ g,
with g the gradient of the summed log-likelihood. The output Jacobian J is never formed: the gradient of the summed
log-likelihood of labels *sampled* from the model has mean zero and that very information as its covariance, so that
one more backward pass gives an unbiased rank-one draw of it. A memory (see `memories`) keeps what fits.

Prior: every lora_A, which starts at random, keeps the precision of its own initialisation; every lora_B, which starts
at zero, and whatever else is trained (a classification head) get a unit-information prior, `prior_tokens` times the
mean Fisher of that matrix per token.
"""

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import all_sum_, broadcast_, world
from .memories import Memory
from .observations import CategoricalObservation, Observation, infer_observation
from .stacks import Stack, plan_stacks


if TYPE_CHECKING:
    from .belief import Belief


logger = logging.getLogger(__name__)

MEMORIES = ("kronecker", "diagonal")
_TINY = 1e-30


class LoKO(torch.optim.Optimizer):
    """Kalman filter over named parameters, with the state kept in float32 whatever the parameters' dtype.

    Use [`create_loko_optimizer`], which reads the prior off the model. In a hand-written loop:

    ```python
    logits = model(**inputs).logits
    loss = optimizer.observe(logits, labels)  # backward passes; several calls accumulate
    optimizer.step()
    ```

    `lr` scales the Kalman step and is 1; learning rate schedules act on it.

    Args:
        params (`Iterable[tuple[str, Tensor]]`): Named trainable parameters.
        observation (`CategoricalObservation`): How labels meet logits; no other kind is supported.
        memory (`str`, *optional*, defaults to `"kronecker"`):
            "kronecker" for matrices whose shorter side is at most `dense_limit` (others fall back to diagonal), or
            "diagonal".
        rank (`int`, *optional*, defaults to 16): Eigenpairs kept on the long side of the Kronecker memory.
        dense_limit (`int`, *optional*, defaults to 128): See `memory`.
        curvature_every (`int`, *optional*, defaults to 4):
            Draw labels, at the price of one more backward pass, at every n-th step; a draw counts for the steps until
            the next one.
        first_draws (`int`, *optional*, defaults to 6): Draw at each of the first steps, to settle the eigenbasis.
        prior_tokens (`float`, *optional*):
            Strength of the unit-information prior, in observed labels; defaults to 1e4 tokens for causal language
            models and encoder-decoders and to 30 labels otherwise.
        prior_precision (`dict[str, float | None]`, *optional*):
            Prior precision per parameter name; `None` stands for the unit-information prior.
        tempering (`float`, *optional*, defaults to 1.0):
            Power on the likelihood, below 1 for correlated tokens or repeated epochs.
        forgetting (`float`, *optional*, defaults to 1.0):
            Factor in (0, 1] on what was learned, per step; below 1 the precision (not the mean) relaxes towards
            the prior.
        process_noise (`float`, *optional*, defaults to 0.0): Variance added to every weight, per step.
        max_decrease (`float`, *optional*, defaults to 1.0):
            Trust region: largest predicted decrease of the loss per step, g^T step, in nats per token.
        trust_decay (`float`, *optional*, defaults to 1.0):
            Power with which `max_decrease` shrinks as n_0 / (n_0 + tokens seen), n_0 = `prior_tokens`: with 1 it
            follows the filter's own gain, with 0 it stays.
        max_kl (`float`, *optional*):
            Trust region: largest KL divergence of the step under the information gathered so far, in nats per token.
        seed (`int`, *optional*, defaults to 0): Of the label draws.

    Raises:
        ValueError: An option is out of its range, there is no parameter, or the observation is not categorical.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        observation: Observation,
        *,
        memory: str = "kronecker",
        rank: int = 16,
        dense_limit: int = 128,
        curvature_every: int = 4,
        first_draws: int = 6,
        prior_tokens: float | None = None,
        prior_precision: dict[str, float | None] | None = None,
        tempering: float = 1.0,
        forgetting: float = 1.0,
        process_noise: float = 0.0,
        max_decrease: float | None = 1.0,
        trust_decay: float = 1.0,
        max_kl: float | None = None,
        seed: int = 0,
    ):
        if not isinstance(observation, CategoricalObservation):
            raise ValueError(
                f"LoKO supports categorical observations only, got {type(observation).__name__}. Train a regression "
                "with another optimizer."
            )
        if prior_tokens is None:
            prior_tokens = 1e4 if observation.shift or observation.seq2seq else 30.0
        defaults = {
            "lr": 1.0,
            "memory": memory,
            "rank": rank,
            "curvature_every": curvature_every,
            "first_draws": first_draws,
            "prior_tokens": prior_tokens,
            "tempering": tempering,
            "forgetting": forgetting,
            "process_noise": process_noise,
            "max_decrease": max_decrease,
            "trust_decay": trust_decay,
            "max_kl": max_kl,
            "seed": seed,
        }
        check_options(defaults)
        params = list(params)
        _check(
            all(isinstance(entry, tuple) and len(entry) == 2 for entry in params),
            "params must be (name, parameter) pairs, as from model.named_parameters()",
        )
        named = [(n, p) for n, p in params if p.requires_grad]
        _check(bool(named), "There is no trainable parameter; was the adapter loaded with `is_trainable=True`?")
        progress = {"settled": False, "steps": 0, "tokens": 0.0}
        super().__init__(named, defaults | progress)
        self.observation = observation
        self.diagnostics: dict[str, Tensor | float] = {}
        self._stacks = plan_stacks(self.param_groups[0], memory, dense_limit)
        prior_precision = prior_precision or {}
        for stack in self._stacks:
            memory_state = stack.create(rank)  # a prior of 0 stands for one that the first draw will settle
            own = torch.tensor([prior_precision.get(name) or 0.0 for name in stack.names])
            stack.set_prior(memory_state, own.to(stack.like))
            self._adopt(stack, memory_state)
        self.param_groups[0]["settled"] = all(bool((stack.memory["prior"] > 0).all()) for stack in self._stacks)
        self._belief: tuple[Belief, str, float] | None = None
        self._clear()

    # -- observing -------------------------------------------------------------------------------------------------

    @property
    def draws_curvature(self) -> bool:
        """Whether the coming step samples labels, with one more backward pass."""
        group = self.param_groups[0]
        return not group["settled"] or self._is_drawing(group["steps"])

    def _is_drawing(self, step: int) -> bool:
        group = self.param_groups[0]
        return step < group["first_draws"] or step % group["curvature_every"] == 0

    def _interval(self) -> int:
        """Steps that a draw at the step just counted stands for: until the next one."""
        group = self.param_groups[0]
        step = group["steps"] - 1
        every = group["curvature_every"]
        return 1 if step + 1 < group["first_draws"] else every - step % every

    def observe(self, logits: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
        """Take the scores of a batch, by one or two backward passes through `logits`; calls accumulate until `step`.

        Neither `.grad` nor the hooks of a distributed wrapper are touched: `step` sums over processes by itself.

        Args:
            logits (`Tensor`): Shape (..., V), with a graph to the parameters.
            labels (`Tensor`): Shape (...), -100 where nothing is observed.
            segments (`Tensor`, *optional*):
                Shape (...), which sequence each position belongs to, where several share a row (packing): the first
                label of a sequence is not explained by the one before.

        Returns:
            `Tensor`: Mean negative log-likelihood of this batch, detached; zero if no label counts.

        Raises:
            ValueError: Logits or gradients are not finite, labels outside the vocabulary, or reentrant gradient
                checkpointing, which hides the graph.
        """
        loss, count, score, draw = self._scores(logits, labels, segments)
        if count:
            self._score = [a.add_(b) for a, b in zip(self._score, score, strict=True)] if self._score else score
            if draw:
                self._draw = [a.add_(b) for a, b in zip(self._draw, draw, strict=True)] if self._draw else draw
        self._count += count
        self._loss += float(loss) * count
        self._observed = True
        return loss

    def _scores(
        self, logits: Tensor, labels: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, int, list[Tensor], list[Tensor]]:
        from .curvature.fisher import score_cotangents

        group = self.param_groups[0]
        seed = ((group["seed"] * 1_000_003 + group["steps"]) * 65_537 + self._micro) * 4_099 + world()[0]
        self._micro += 1
        kinds = ("empirical", "sampled") if self.draws_curvature else ("empirical",)
        cotangents, count, loss = score_cotangents(
            logits, labels, self.observation, kinds, torch.Generator().manual_seed(seed % 2**63), segments
        )
        parts = [self._backward(logits, c, retain_graph=k < len(kinds) - 1) for k, c in enumerate(cotangents)]
        return loss, count, parts[0] if parts else [], parts[1] if len(parts) == 2 else []

    def _backward(self, logits: Tensor, cotangent: Tensor, retain_graph: bool) -> list[Tensor]:
        params = [p for stack in self._stacks for p in stack.params]
        grads = torch.autograd.grad(logits, params, cotangent, retain_graph=retain_graph, allow_unused=True)
        factors = [g for g, name in zip(grads, self._names(), strict=True) if ".lora_" in name]
        if all(g is None for g in factors or grads):
            raise ValueError(
                "No gradient reaches the adapter. Either the adapter is not active, or gradient checkpointing is "
                "reentrant, which hides the graph: set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        found = dict(zip(map(id, params), grads, strict=True))
        # The cotangent is that of the negative log-likelihood; scores are gradients of the log-likelihood.
        return [stack.gather([found[id(p)] for p in stack.params]).neg_() for stack in self._stacks]

    def _names(self) -> list[str]:
        return [name for stack in self._stacks for name in stack.names]

    def _clear(self) -> None:
        self._score: list[Tensor] = []
        self._draw: list[Tensor] = []
        self._count, self._loss, self._micro, self._observed = 0, 0.0, 0, False

    # -- stepping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One Kalman step from what was observed since the last one.

        Args:
            closure (`Any`, *optional*): Refused; a filter does not re-evaluate.

        Raises:
            RuntimeError: Nothing was observed.
            ValueError: A closure is given, or the summed scores are not finite.
        """
        if closure is not None:
            raise ValueError("LoKO.step takes no closure; call observe(logits, labels) before step().")
        if not self._observed:
            raise RuntimeError("LoKO.step() without an observation; call observe(logits, labels) first.")
        group = self.param_groups[0]
        drew = self.draws_curvature
        scores = self._score or [stack.zeros() for stack in self._stacks]
        draws = (self._draw or [stack.zeros() for stack in self._stacks]) if drew else []
        sums = torch.tensor([self._count, self._loss], dtype=torch.float64, device=scores[0].device)
        all_sum_([sums, *scores, *draws])
        count, loss = sums.tolist()
        self._clear()
        group["steps"] += 1
        if count == 0:
            logger.warning("LoKO saw no label in this step (all -100); the belief and the weights stay as they are.")
            return
        if not all(torch.isfinite(t.sum()) for t in (*scores, *draws)):
            raise ValueError("Scores contain NaN or Inf; the step is not taken and the belief is as before it.")
        group["tokens"] = group["forgetting"] * group["tokens"] + count
        if drew:
            self._settle_priors(draws, count)
        self._update(scores, draws, count, self._prior_pull(count))
        self.diagnostics["loss"] = loss / count

    def _update(self, scores: list[Tensor], draws: list[Tensor], count: float, pull: "_Pull | None") -> None:
        """Predict, take in what was observed, and move the weights by the gain within the trust region."""
        group = self.param_groups[0]
        temper, interval = group["tempering"], self._interval()
        total = {name: scores[0].new_zeros(()) for name in ("decrease", "energy", "trace", "innovation", "expected")}
        steps = []
        for j, stack in enumerate(self._stacks):
            memory, score = stack.memory, temper * scores[j]
            stack.kind.predict(memory, group["forgetting"], group["process_noise"])
            if draws:  # g^T P g before the data are taken in, and its expectation, which one draw estimates
                total["innovation"] += (scores[j] * stack.kind.gain(memory, scores[j])[0]).sum()
                total["expected"] += (draws[j] * stack.kind.gain(memory, draws[j])[0]).sum()
                stack.kind.update(memory, draws[j][None], temper * interval)
            if pull is not None:
                score -= stack.gather([pull.gradient.get(n) for n in stack.names])
                if pull.information:
                    stack.kind.add_diagonal(memory, stack.gather([pull.information.get(n) for n in stack.names]))
            step, energy = stack.kind.gain(memory, score)
            steps.append(step)
            total["decrease"] += (score * step).sum() / temper
            total["energy"] += energy / temper
            total["trace"] += stack.kind.trace(memory)
        scale, kl = self._trust(total["decrease"] / count, total["energy"] / (2 * group["tokens"]))
        for stack, step in zip(self._stacks, steps, strict=True):
            stack.add_to_params(step.mul_(scale * group["lr"]))
        self.diagnostics.update(
            {
                "kl": kl * scale.square(),
                "trace_p": total["trace"],
                "gain_norm": _norm(steps) / _norm(scores).clamp_min(_TINY),
                "trust": scale,
                "decrease": total["decrease"] * scale / count,
            }
        )
        if draws:
            self.diagnostics["innovation"] = total["innovation"] / total["expected"].clamp_min(_TINY)

    def _trust(self, decrease: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
        """Factor on the step that keeps both bounds (nats per token), and the KL divergence of the whole step."""
        group = self.param_groups[0]
        scale = torch.ones_like(decrease)
        if group["max_decrease"] is not None:
            gained = group["prior_tokens"] / (group["prior_tokens"] + group["tokens"])
            most = group["max_decrease"] * gained ** group["trust_decay"]
            scale = torch.minimum(scale, most / decrease.clamp_min(_TINY))
        if group["max_kl"] is not None:
            scale = torch.minimum(scale, (group["max_kl"] / kl.clamp_min(_TINY)).sqrt())
        return scale, kl

    def _settle_priors(self, draws: list[Tensor], count: float) -> None:
        """Unit-information priors from the first draw: prior_tokens * mean Fisher of the matrix per token.

        A matrix that (almost) no gradient reached yet gets the prior of one with a thousandth of the average Fisher.
        """
        group = self.param_groups[0]
        if group["settled"]:
            return
        fisher = [draw.flatten(1).square().mean(-1) / count for draw in draws]  # (n,) each
        floor = 1e-3 * torch.cat(fisher).mean()
        if floor == 0:
            logger.warning("The first draw of labels gave no gradient at all; the prior is settled at a later draw.")
            return
        for stack, own in zip(self._stacks, fisher, strict=True):
            known = stack.memory["prior"] > 0
            stack.set_prior(
                stack.memory,
                torch.where(known, stack.memory["prior"], group["prior_tokens"] * torch.maximum(own, floor)),
            )
        group["settled"] = True

    # -- prior belief ----------------------------------------------------------------------------------------------

    def set_belief(self, belief: "Belief", strength: float = 1.0, mode: str = "factor") -> None:
        """Take a belief (Laplace approximation on source data) as prior, weighed by `strength` per target token.

        Args:
            belief (`Belief`): Over the same adapter.
            strength (`float`, *optional*, defaults to 1.0): lambda.
            mode (`str`, *optional*, defaults to `"factor"`):
                "factor": each step adds its tokens' share of the penalty's gradient and of its Gauss-Newton diagonal,
                which any belief allows. "penalty": the gradient only.

        Raises:
            ValueError: Unknown mode, negative strength, or a belief over other weights.
        """
        _check(mode in ("factor", "penalty"), f"mode must be 'factor' or 'penalty', got {mode!r}")
        _check(0 <= strength < math.inf, f"strength must be >= 0 and finite, got {strength}")
        missing = belief.mean.keys() - set(self._names())
        _check(not missing, f"The belief covers weights that are not optimised: {sorted(missing)[:3]}")
        self._belief = (belief, mode, strength)

    @property
    def belief_strength(self) -> float:
        """Strength of the prior belief; settable while training, as a forgetting budget does."""
        return self._belief[2] if self._belief else 0.0

    @belief_strength.setter
    def belief_strength(self, value: float) -> None:
        if self._belief is None:
            raise ValueError("There is no belief whose strength could be set; call set_belief(belief) first.")
        self._belief = (*self._belief[:2], value)

    def _prior_pull(self, count: float) -> "_Pull | None":
        """The belief's share of this step: `count` tokens' worth of its gradient and information."""
        if self._belief is None or self._belief[2] == 0:
            return None
        belief, mode, strength = self._belief
        weight = strength * count * self.param_groups[0]["tempering"]
        state = {n: p for stack in self._stacks for n, p in zip(stack.names, stack.params, strict=True)}
        energy, gradient = belief.energy_and_gradient(state)
        self.diagnostics["penalty"], self.diagnostics["drift"] = strength * energy, energy
        information = belief.precision.diagonal(state) if mode == "factor" else {}
        return _Pull({k: g * weight for k, g in gradient.items()}, {k: f * weight for k, f in information.items()})

    # -- state -----------------------------------------------------------------------------------------------------

    def _adopt(self, stack: "Stack", memory: Memory) -> None:
        """Keep the stacked tensors, and show each parameter its slice of them in `state`."""
        stack.memory = memory
        for j, p in enumerate(stack.params):
            self.state[p].update({key: tensor[j] for key, tensor in memory.items()})

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved filter bit for bit; torch would cast the state to the parameters' dtype.

        Args:
            state_dict (`dict`): From `state_dict()` of a filter over the same parameters.

        Raises:
            ValueError: The saved filter has another memory, or other shapes.
        """
        saved = state_dict["param_groups"][0]
        if "memory" not in saved:
            raise ValueError("The saved optimizer state is not one of LoKO; resume with the optimizer that wrote it.")
        if saved["memory"] != self.param_groups[0]["memory"] or saved["rank"] != self.param_groups[0]["rank"]:
            raise ValueError(
                f"The saved filter has memory {saved['memory']!r} of rank {saved['rank']}, this one "
                f"{self.param_groups[0]['memory']!r} of rank {self.param_groups[0]['rank']}."
            )
        params, slots = self.param_groups[0]["params"], saved["params"]
        if len(params) != len(slots):
            raise ValueError(f"The saved filter has {len(slots)} parameters, this one {len(params)}.")
        entries = {id(p): state_dict["state"].get(slot, {}) for p, slot in zip(params, slots, strict=True)}
        for stack in self._stacks:
            for key, tensor in stack.memory.items():
                for j, p in enumerate(stack.params):
                    value = entries[id(p)].get(key)
                    if value is None or value.shape != tensor[j].shape:
                        raise ValueError(
                            f"The saved filter does not fit: {key!r} of {stack.names[j]} is missing or of another "
                            "shape."
                        )
        for stack in self._stacks:
            for key, tensor in stack.memory.items():
                tensor.copy_(torch.stack([entries[id(p)][key].to(tensor) for p in stack.params]))
        own = self.param_groups[0]
        moving = ("params", "param_names", "lr", "initial_lr", "settled", "steps", "tokens")
        changed = {k: (own.get(k), v) for k, v in saved.items() if k not in moving and own.get(k) != v}
        if changed:
            logger.warning(
                "LoKO goes on with the saved options: %s", {k: f"{v[1]}, not {v[0]}" for k, v in changed.items()}
            )
        own.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
        self._clear()


class _Pull(NamedTuple):
    """What a belief adds to a step: gradient of the penalty and its Gauss-Newton diagonal, by parameter name."""

    gradient: dict[str, Tensor]
    information: dict[str, Tensor]


def create_loko_optimizer(
    model: nn.Module,
    *,
    adapter_name: str | None = None,
    belief: "Belief | None" = None,
    belief_strength: float = 1.0,
    belief_mode: str = "factor",
    observation: Observation | None = None,
    **options: Any,
) -> LoKO:
    """A LoKO optimizer over all trainable weights of a PEFT model, with priors from their initialisation.

    Args:
        model (`PeftModel`): Model with a LoRA adapter; `modules_to_save` and other trainable tensors are filtered too.
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        belief (`Belief`, *optional*): Prior belief over the adapter, see [`LoKO.set_belief`].
        belief_strength (`float`, *optional*, defaults to 1.0): See [`LoKO.set_belief`].
        belief_mode (`str`, *optional*, defaults to `"factor"`): See [`LoKO.set_belief`].
        observation (`CategoricalObservation`, *optional*): Inferred from the model's class by default.
        **options: Further options of [`LoKO`].

    Returns:
        `LoKO`: Usable in a hand-written loop and in `KalmanTrainer`.

    Raises:
        TypeError: The model has no PEFT adapter.
        ValueError: An option is out of range, or the task is no categorical one.
    """
    from .adapters import AdapterState

    state = AdapterState(model, adapter_name, warn_excluded=False)
    broadcast_(p.detach() for p in state.model.parameters() if p.requires_grad)  # one start for all processes
    factors = {id(p): key for key, p in state.parameters().items()}
    random_start = {id(pair.a) for pair in state}
    named, prior = [], {}
    for name, p in state.model.named_parameters():
        if p.requires_grad:
            key = factors.get(id(p), name)
            named.append((key, p))
            spread = float(p.detach().float().square().mean()) if id(p) in random_start else 0.0
            prior[key] = 1 / spread if spread > 0 else None
    optimizer = LoKO(named, observation or infer_observation(state.model), prior_precision=prior, **options)
    if belief is not None:
        belief.check(model, state.adapter_name)
        optimizer.set_belief(belief, belief_strength, belief_mode)
    return optimizer


def check_options(options: dict[str, Any], prefix: str = "") -> None:
    """Raise ValueError for the first option of LoKO that is out of its range.

    Args:
        options (`dict[str, Any]`): By name, as in [`LoKO`].
        prefix (`str`, *optional*, defaults to `""`): Put before the name in the message.
    """
    whole = {"rank": 1, "curvature_every": 1, "first_draws": 0}
    for name, value in options.items():
        shown = f"{prefix}{name}"
        if name == "memory":
            _check(value in MEMORIES, f"{shown} must be one of {MEMORIES}, got {value!r}")
        elif name in whole:
            _check(value >= whole[name], f"{shown} must be >= {whole[name]}, got {value}")
        elif name == "forgetting":
            _check(0 < value <= 1, f"{shown} must be in (0, 1], got {value}")
        elif name in ("process_noise", "trust_decay"):
            _check(0 <= value < math.inf, f"{shown} must be >= 0 and finite, got {value}")
        elif name in ("max_decrease", "max_kl", "prior_tokens", "tempering") and value is not None:
            _check(0 < value < math.inf, f"{shown} must be positive and finite, got {value}")


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"{message}.")
