"""Toy models and dense algebra that filters are compared with, all in float64."""

import torch
from torch import nn


F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Toy:
    """Named parameters, and outputs as a function of them; also of all of them as one vector."""

    def __init__(self, shapes, forward, scale=0.5, dtype=F64):
        self.shapes, self.forward = shapes, forward
        start = {name: scale * rand(*shape, seed=j) for j, (name, shape) in enumerate(shapes.items())}
        self.params = {name: nn.Parameter(value.to(dtype)) for name, value in start.items()}

    def __call__(self, x):
        return self.forward(self.params, x)

    @property
    def theta(self):
        return torch.cat([p.detach().reshape(-1) for p in self.params.values()])

    def at(self, theta, x):
        sizes = [p.numel() for p in self.params.values()]
        parts = theta.split(sizes)
        named = {n: part.view(self.shapes[n]) for n, part in zip(self.params, parts, strict=True)}
        return self.forward(named, x)

    def jacobian(self, x):
        """Of all outputs, (rows, V, D), at the present parameters."""
        found = torch.func.jacrev(self.at)(self.theta, x)
        return found.reshape(-1, found.shape[-2], found.shape[-1])

    def spread(self, values):
        """One value per parameter, as a vector (D,)."""
        return torch.cat([torch.full((p.numel(),), values[n], dtype=F64) for n, p in self.params.items()])


def linear(outputs=2, inputs=3, bias=True, **kwargs):
    """y = W x + b."""
    if not bias:
        return Toy({"w": (outputs, inputs)}, lambda p, x: x @ p["w"].mT, **kwargs)
    return Toy({"w": (outputs, inputs), "b": (outputs,)}, lambda p, x: x @ p["w"].mT + p["b"], **kwargs)


def two_layers(outputs=2, inputs=5, hidden=3, **kwargs):
    """A wide matrix, a tall one (kept transposed) and a vector."""
    shapes = {"a": (hidden, inputs), "b": (outputs + 2, hidden), "c": (outputs + 2,)}
    return Toy(shapes, lambda p, x: (torch.tanh(x @ p["a"].mT) @ p["b"].mT + p["c"])[..., :outputs], **kwargs)


def covariance(optimizer, toy):
    """P over all parameters in the toy's order, (D, D), read through the memories' gains on unit vectors."""
    places, begin = {}, 0
    for name, p in toy.params.items():
        places[name] = torch.arange(begin, begin + p.numel()).view(p.shape)
        begin += p.numel()
    result = torch.zeros(begin, begin, dtype=F64)
    for memory in optimizer._memories:
        view = memory.view
        own = view.gather([places[name] for name in view.names]).reshape(-1).long()
        units = torch.eye(len(own)).to(view.like).view(-1, *view.shape)
        result[own[:, None], own] = memory.gain(units).reshape(len(own), -1).double()
    return result


def gaussian_evidence(toy, x, y, variance):
    """Score and information of y = f(x) + noise, at the present parameters."""
    jacobian = toy.jacobian(x).flatten(0, 1)
    error = (y - toy(x).detach()).reshape(-1)
    return jacobian.T @ error / variance, jacobian.T @ jacobian / variance


def softmax_evidence(toy, x, labels):
    """Score and information of labels under softmax(f(x)); -100 does not count."""
    jacobian, p = toy.jacobian(x), toy(x).detach().flatten(0, -2).softmax(-1)
    labels = labels.reshape(-1)
    seen = labels >= 0
    jacobian, p, labels = jacobian[seen], p[seen], labels[seen]
    error = nn.functional.one_hot(labels, p.shape[-1]) - p
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    score = torch.einsum("nvd,nv->d", jacobian, error)
    return score, torch.einsum("nvd,nvw,nwe->de", jacobian, middle, jacobian)


def close(found, expected, tol=1e-8):
    """Equal up to `tol` of the largest entry: entries that cancel are not held to their own size."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=tol, atol=tol * max(scale, 1e-300))
