"""An inverted pendulum on a motor, its linear-quadratic expert, and what experts show on it.

theta is the angle from upright, omega its rate, u the torque: m l^2 omega' = m g l sin(theta) - b omega + u, in steps
of 0.05 s (semi-implicit Euler). A point mass m (kg) is on a rod of length l (m), with friction b (N m s).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


STEP = 0.05  # seconds
GRAVITY = 9.81
LIMIT = 60.0  # largest torque, N m
TORQUE = 10.0  # N m; actions are torques over this
COST = (1.0, 0.1, 0.01)  # of theta^2, omega^2 and u^2 per step
FALLEN = 1.0  # radians, from which a pendulum counts as fallen
UPRIGHT, LAST = 0.15, 20  # success: |theta| below this over the last steps


@dataclass(frozen=True)
class Pendulum:
    """One dynamics.

    Attributes:
        mass (`float`): kg.
        length (`float`): m.
        friction (`float`): N m s.
    """

    mass: float
    length: float
    friction: float

    def step(self, state: Tensor, torque: Tensor) -> Tensor:
        """The next states.

        Args:
            state (`Tensor`): theta and omega, (N, 2).
            torque (`Tensor`): u, (N,); cut at the limit.

        Returns:
            `Tensor`: (N, 2).
        """
        inertia = self.mass * self.length**2
        theta, omega = state.unbind(-1)
        pull = self.mass * GRAVITY * self.length * theta.sin() - self.friction * omega + torque.clamp(-LIMIT, LIMIT)
        omega = omega + STEP * pull / inertia
        return torch.stack([theta + STEP * omega, omega], -1)

    def gain(self, iterations: int = 2000) -> Tensor:
        """K of the expert u = -K (theta, omega): the linear-quadratic regulator of the linearised dynamics, (2,)."""
        inertia = self.mass * self.length**2
        rate = torch.tensor([GRAVITY / self.length, -self.friction / inertia], dtype=torch.float64)
        low = torch.tensor([0.0, 1.0], dtype=torch.float64) + STEP * rate  # omega after a step
        a = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64) + STEP * low, low])
        b = torch.tensor([STEP**2 / inertia, STEP / inertia], dtype=torch.float64)
        q = torch.diag(torch.tensor(COST[:2], dtype=torch.float64))
        p = q
        for _ in range(iterations):  # the Riccati recursion
            k = (b @ p @ a) / (COST[2] + b @ p @ b)
            p = q + a.T @ p @ (a - torch.outer(b, k))
        return k


def reward(state: Tensor, torque: Tensor) -> Tensor:
    """Minus the cost of a step, (N,)."""
    theta, omega = state.unbind(-1)
    return -(COST[0] * theta**2 + COST[1] * omega**2 + COST[2] * torque**2)


def starts(n: int, generator: torch.Generator) -> Tensor:
    """States to balance from: up to 0.3 rad and 0.3 rad/s off, (N, 2)."""
    return 0.6 * torch.rand(n, 2, generator=generator) - 0.3


@dataclass(frozen=True)
class Episodes:
    """What an expert did; a decision transformer's inputs, in its units.

    Attributes:
        states (`Tensor`): theta and omega before each action, (N, T, 2).
        actions (`Tensor`): Torques taken, over `TORQUE`, (N, T, 1).
        expert (`Tensor`): Torques that the expert would have taken, over `TORQUE`, (N, T, 1).
        returns (`Tensor`): Sum of the rewards from each step on, (N, T, 1).
    """

    states: Tensor
    actions: Tensor
    expert: Tensor
    returns: Tensor


def demonstrate(pendulum: Pendulum, n: int, length: int, noise: float, generator: torch.Generator) -> Episodes:
    """Let the expert balance, with noise on what it does, so that it is seen to recover.

    Args:
        pendulum (`Pendulum`): Which the expert knows.
        n (`int`): Episodes.
        length (`int`): Steps of each.
        noise (`float`): Standard deviation of the noise, as a share of m g l (the torque that holds the rod level).
        generator (`torch.Generator`): Of starts and noise.

    Returns:
        `Episodes`: Of float32 tensors.
    """
    gain = pendulum.gain().float()
    scale = noise * pendulum.mass * GRAVITY * pendulum.length
    state, seen = starts(n, generator), []
    for _ in range(length):
        wanted = (-(state @ gain)).clamp(-LIMIT, LIMIT)
        taken = (wanted + scale * torch.randn(n, generator=generator)).clamp(-LIMIT, LIMIT)
        seen.append((state, taken, wanted, reward(state, taken)))
        state = pendulum.step(state, taken)
    states, taken, wanted, rewards = (torch.stack(part, 1) for part in zip(*seen, strict=True))
    returns = rewards.flip(1).cumsum(1).flip(1)
    return Episodes(states, taken[..., None] / TORQUE, wanted[..., None] / TORQUE, returns[..., None])


def succeeded(angles: Tensor) -> Tensor:
    """Whether each pendulum ended upright without falling.

    Args:
        angles (`Tensor`): theta by step, (N, T).

    Returns:
        `Tensor`: Boolean, (N,).
    """
    steady = angles[:, -LAST:].abs().amax(1) < UPRIGHT
    return steady & (angles.abs().amax(1) < FALLEN)
