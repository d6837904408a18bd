"""Decision transformers that balance pendulums: pre-training, learners that adapt one online, and their trials."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from kalman_peft import GaussianObservation, KalmanDecisionTransformer, create_loko_optimizer

from .pendulum import TORQUE, Episodes, Pendulum, reward, starts, succeeded
from .spelling import parse_options


CONTEXT = 5  # steps that the model sees
EPISODE = 80  # steps of a trial; and of the model's table of time steps
LORA = ("c_attn", "c_proj", "c_fc")

Inputs = dict[str, Tensor]


def contexts(episodes: Episodes) -> tuple[Inputs, Tensor]:
    """Every step of the episodes with the steps before it, and what the expert does there.

    Args:
        episodes (`Episodes`): N of T steps.

    Returns:
        `tuple[dict[str, Tensor], Tensor]`: Inputs of the model, (N T, CONTEXT, ...), step by step within an episode,
        and the expert's actions, (N T, 1). The last action of each context is blank.
    """
    n, length = episodes.states.shape[:2]
    steps = torch.arange(length)[:, None] + torch.arange(1 - CONTEXT, 1)  # (T, CONTEXT), negative before the start
    seen, index = steps >= 0, steps.clamp(min=0)

    def windows(x: Tensor) -> Tensor:
        found = x[:, index] * seen[None, :, :, None]
        return found.reshape(n * length, CONTEXT, -1)

    actions = windows(episodes.actions)
    actions[:, -1] = 0.0
    inputs = {
        "states": windows(episodes.states), "actions": actions, "returns_to_go": windows(episodes.returns),
        "timesteps": index.repeat(n, 1), "attention_mask": seen.long().repeat(n, 1),
    }  # fmt: skip
    return inputs, episodes.expert.reshape(-1, 1)


def pretrain(episodes: Episodes, *, hidden: int, steps: int, rate: float, seed: int) -> Any:
    """A decision transformer that does as the expert does.

    Args:
        episodes (`Episodes`): Of the expert.
        hidden (`int`): Width; two layers of two heads.
        steps (`int`): Of AdamW, with 64 contexts each and linear decay.
        rate (`float`): First learning rate.
        seed (`int`): Of the start and the order.

    Returns:
        `DecisionTransformerModel`: In evaluation mode.
    """
    torch.manual_seed(seed)
    config = DecisionTransformerConfig(
        state_dim=2, act_dim=1, hidden_size=hidden, n_layer=2, n_head=2, max_ep_len=EPISODE, action_tanh=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: Any = DecisionTransformerModel._from_config(config, attn_implementation="eager")
    inputs, targets = contexts(episodes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        rows = torch.randint(len(targets), (64,))
        loss = (model(**{k: v[rows] for k, v in inputs.items()}).action_preds[:, -1] - targets[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


class Frozen:
    """The pre-trained model as it is."""

    def __init__(self, model: Any):
        self.model = model

    @torch.no_grad()
    def act(self, inputs: Inputs) -> Tensor:
        """Actions for the last states, (N, 1)."""
        return self.model(**inputs).action_preds[:, -1]

    def learn(self, inputs: Inputs, targets: Tensor) -> None:
        """Take in one sample."""


class Memory:
    """The newest samples.

    Args:
        size (`int`): Most samples kept, the new one included.
    """

    def __init__(self, size: int):
        self.size = size
        self.rows: list[tuple[Inputs, Tensor]] = []

    def add(self, inputs: Inputs, targets: Tensor) -> tuple[Inputs, Tensor]:
        """Keep a sample, forget the oldest; all that are kept, as a batch."""
        self.rows = [*self.rows, (inputs, targets)][-self.size :]
        kept = {name: torch.cat([row[0][name] for row in self.rows]) for name in inputs}
        return kept, torch.cat([row[1] for row in self.rows])


class Retrained(Frozen):
    """All weights by AdamW from where they are, on the newest samples.

    Args:
        model (`DecisionTransformerModel`): Pre-trained.
        lr (`float`): Learning rate.
        memory (`int`): Samples kept.
        steps (`int`): Of AdamW per sample.
    """

    def __init__(self, model: Any, lr: float = 1e-3, memory: int = 1, steps: int = 1):
        super().__init__(model)
        self.memory, self.steps = Memory(memory), steps
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def learn(self, inputs: Inputs, targets: Tensor) -> None:
        """See [`Frozen.learn`]."""
        kept, wanted = self.memory.add(inputs, targets)
        for _ in range(self.steps):
            loss = (self.model(**kept).action_preds[:, -1] - wanted).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Filtered(Frozen):
    """LoKO over a LoRA of the model's blocks.

    Args:
        model (`DecisionTransformerModel`): Pre-trained.
        memory (`int`): Samples kept; the batch of each step.
        noise (`float`): Variance of the actions.
        r (`int`): Rank.
        **options: Of `create_loko_optimizer`.
    """

    def __init__(self, model: Any, memory: int = 1, noise: float = 0.01, r: int = 8, **options: Any):
        torch.manual_seed(0)
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(LORA), fan_in_fan_out=True)
        super().__init__(get_peft_model(model, config).eval())
        self.memory = Memory(memory)
        self.optimizer = create_loko_optimizer(self.model, observation=GaussianObservation(noise), seed=0, **options)

    def learn(self, inputs: Inputs, targets: Tensor) -> None:
        """See [`Frozen.learn`]."""
        kept, wanted = self.memory.add(inputs, targets)
        self.optimizer.observe(self.model(**kept).action_preds[:, -1], wanted)
        self.optimizer.step()


class Bayesian(Frozen):
    """The Kalman Bayesian Transformer: one update per sample, none kept. It acts by the mean of its weights.

    Args:
        model (`DecisionTransformerModel`): Pre-trained.
        seen (`dict[str, Tensor]`): Contexts of the pre-training, which tighten its covariances.
        variance (`float`): Prior variance, see [`KalmanDecisionTransformer`].
        noise (`float`): Variance of the actions.
        relaxation (`float`): See [`KalmanNetwork`].
        conditioned (`int`): How many of `seen` are used.
    """

    def __init__(
        self, model: Any, seen: Inputs, variance: float = 0.003, noise: float = 0.003, relaxation: float = 0.0,
        conditioned: int = 0,
    ):  # fmt: skip
        super().__init__(model)
        self.net = KalmanDecisionTransformer(model, variance, noise=noise, relaxation=relaxation)
        if conditioned:
            self.net.condition({name: x[:conditioned] for name, x in seen.items()})

    def learn(self, inputs: Inputs, targets: Tensor) -> None:
        """See [`Frozen.learn`]."""
        self.net.update(inputs, targets)


KINDS: dict[str, Callable[..., Frozen]] = {"frozen": Frozen, "adamw": Retrained, "loko": Filtered, "kbt": Bayesian}


def make_learner(method: str, model: Any, seen: Inputs) -> Frozen:
    """A learner by name, on a copy of the model.

    Args:
        method (`str`): KIND or KIND:OPTION=VALUE,..., with the options of the classes above.
        model (`DecisionTransformerModel`): Pre-trained; is not changed.
        seen (`dict[str, Tensor]`): Contexts of the pre-training, in random order.

    Returns:
        `Frozen`: Or a subclass.

    Raises:
        ValueError: An unknown kind, or an option that it does not have.
    """
    kind, _, rest = method.partition(":")
    if kind not in KINDS:
        raise ValueError(f"{method!r}: the kind is none of {', '.join(KINDS)}.")
    own = copy.deepcopy(model)
    given = (own, seen) if kind == "kbt" else (own,)
    try:
        return KINDS[kind](*given, **parse_options(rest))
    except TypeError as error:
        raise ValueError(f"{method!r}: {error}.") from error


def success_rate(learner: Frozen, pendulum: Pendulum, trials: int, target: float, seed: int) -> float:
    """Share of the trials in which the learner keeps the pendulum upright.

    Args:
        learner (`Frozen`): To act.
        pendulum (`Pendulum`): The present dynamics.
        trials (`int`): From random starts, at the same time.
        target (`float`): Return asked for at the start; what is achieved is taken off, step by step.
        seed (`int`): Of the starts.

    Returns:
        `float`: In [0, 1].
    """
    state = starts(trials, torch.Generator().manual_seed(seed))
    left = torch.full((trials,), target)
    states, actions, returns, angles = [], [], [], []
    for step in range(EPISODE):
        states, returns = [*states, state], [*returns, left]
        first = max(0, step + 1 - CONTEXT)
        known = [*actions, torch.zeros(trials, 1)][first:]
        inputs = {
            "states": torch.stack(states[first:], 1), "actions": torch.stack(known, 1),
            "returns_to_go": torch.stack(returns[first:], 1)[..., None],
            "timesteps": torch.arange(first, step + 1).repeat(trials, 1),
        }  # fmt: skip
        action = learner.act(inputs).nan_to_num(0.0, 0.0, 0.0)
        torque = TORQUE * action[:, 0]
        left = left - reward(state, torque)
        state = pendulum.step(state, torque)
        actions.append(action)
        angles.append(state[:, 0])
    return float(succeeded(torch.stack(angles, 1).nan_to_num(torch.inf)).float().mean())
