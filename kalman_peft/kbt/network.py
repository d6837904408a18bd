"""KalmanNetwork: a network whose weights are learned by layer-wise Kalman updates, one sample after the other.

A Kalman Bayesian neural network [KBNN; Wagner, Wu, Huber, 2022] updates each layer's outputs z' by a Kalman smoother,
k = Cov(a, z') / Var z', mu_a+ = mu_a + k (mu_z'+ - mu_z'), and each neuron's weights by w+ = w + C mu_z / Var a
(mu_a+ - mu_a), C+ = C + L L^T (Var a+ - Var a). Here the smoother is in its adjoint form (Bryson and Frazier): a
message is lambda = (mu+ - mu) / Var, so that lambda_a = E f'(a) lambda_z' and w+ = w + C mu_z lambda_a. The messages
of all layers are then one backward pass through the forward means, with the slopes of statistical linearisation, and
no variance is divided by; layers without uncertainty pass them on.

With G_n the slopes of M outputs in the weights of neuron n, summed over the positions that share them,
S = sum_n G_n C_n G_n^T + Omega + R,   w_n+ = w_n + C_n G_n^T S^-1 e,   C_n+ = C_n - C_n G_n^T S^-1 G_n C_n.
Omega = (propagated output variance - diag(sum G C G^T))+ is what the layers' moments have beyond the slopes. For one
output of a feedforward network S is the propagated variance plus noise, and the update of the means is KBNN's; that of
the covariances too, up to one hidden layer. Where messages that meet are correlated (deeper layers, several outputs,
and in transformers the positions that share weights) KBNN counts them as independent, and here they are kept together;
that part is this project's. As S exceeds every G_n C_n G_n^T, covariances stay positive. Neurons are independent of
each other before and after.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .files import read_state, write_state
from .moments import Moments, softmax_moments
from .rows import RowGaussian


LIKELIHOODS = ("gaussian", "categorical")
Inputs = Mapping[str, Tensor]
_NOT_FINITE = "The update is not finite, and was not made; scale the inputs, raise `noise` or lower the variances."


class KalmanNetwork:
    """A module whose parameters are the mean of a Gaussian; subclasses say how moments go through it.

    Args:
        model (`nn.Module`): Its parameters hold the mean; they are changed in place.
        gaussians (`Mapping[str, RowGaussian]`): The uncertain weights, by name.
        likelihood (`str`, *optional*, defaults to `"gaussian"`):
            "gaussian": targets (B, O) with noise. "categorical": targets are classes (B,), outputs are logits.
        noise (`float`, *optional*, defaults to 0.1): Variance of Gaussian targets, > 0.
        damping (`float`, *optional*, defaults to 0.05):
            Variance added to the observed probabilities of categorical targets, >= 0: bounds the step where the model
            is surely wrong.
        relaxation (`float`, *optional*, defaults to 0.0):
            Before each update, covariances go this share of the way back to the prior's, in [0, 1]: what was learned
            stays, and can be learned anew. For data that drift.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        gaussians: Mapping[str, RowGaussian],
        *,
        likelihood: str = "gaussian",
        noise: float = 0.1,
        damping: float = 0.05,
        relaxation: float = 0.0,
    ):
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {LIKELIHOODS}, got {likelihood!r}.")
        if not 0 < noise < math.inf:
            raise ValueError(f"noise must be > 0 and finite, got {noise}.")
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping must be >= 0 and finite, got {damping}.")
        if not 0 <= relaxation <= 1:
            raise ValueError(f"relaxation must be in [0, 1], got {relaxation}.")
        self.model, self.gaussians = model, dict(gaussians)
        self.likelihood, self.noise, self.damping, self.relaxation = likelihood, noise, damping, relaxation
        self.updates = 0  # samples learned from

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs) -> Moments:
        """Moments of the outputs (B, O); for categorical targets, of the logits. With a graph to the parameters.

        Args:
            inputs (`Mapping[str, Tensor]`): Batch first.

        Returns:
            `Moments`: To be given by subclasses.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how moments go through it.")

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> Moments:
        """Mean and variance of the outputs; for categorical targets, of the probabilities (to second order).

        Args:
            inputs (`Mapping[str, Tensor]`): Batch first.

        Returns:
            `Moments`: (B, O); without the noise of targets.
        """
        return self._predicted(self.forward(inputs))

    def _predicted(self, outputs: Moments) -> Moments:
        return softmax_moments(outputs) if self.likelihood == "categorical" else outputs

    # -- update ----------------------------------------------------------------------------------------------------

    def update(self, inputs: Inputs, targets: Tensor, *, sequential: bool = True) -> dict[str, float]:
        """Learn from a batch.

        Args:
            inputs (`Mapping[str, Tensor]`): Batch first.
            targets (`Tensor`): (B, O), or classes (B,).
            sequential (`bool`, *optional*, defaults to `True`):
                One sample after the other, each linearised where the one before left the weights: the published
                method. `False`: all at once, from one linearisation; the same for one linear layer with Gaussian
                targets.

        Returns:
            `dict[str, float]`: "innovation": e^T S^-1 e per observed number, near 1 if all is as expected, mean over
            the samples; "loss": squared error, or negative log-likelihood in nats, per sample, before it was learned.

        Raises:
            ValueError: Inputs or targets are not finite or do not fit; nothing has changed then.
        """
        self._check(inputs, targets)
        size = len(targets)
        step = 1 if sequential else size
        with self._all_or_nothing():
            seen = [
                self._learn({name: x[i : i + step] for name, x in inputs.items()}, targets[i : i + step])
                for i in range(0, size, step)
            ]
        self.updates += size
        return {key: sum(one[key] for one in seen) / len(seen) for key in seen[0]}

    def condition(self, inputs: Inputs) -> None:
        """Let samples tighten the covariances and leave the mean: what pre-training on their like has fixed.

        Args:
            inputs (`Mapping[str, Tensor]`): Batch first; taken one by one.

        Raises:
            ValueError: Inputs are not finite.
        """
        self._check(inputs, None)
        with self._all_or_nothing():
            for i in range(len(next(iter(inputs.values())))):
                self._learn({name: x[i : i + 1] for name, x in inputs.items()}, None)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put back all weights and covariances if anything fails."""
        before = {name: (g.rows(), g.factor) for name, g in self.gaussians.items()}
        try:
            yield
        except BaseException:
            for name, state in before.items():
                self.gaussians[name].write(*state)
            raise

    def _check(self, inputs: Inputs, targets: Tensor | None) -> None:
        named = dict(inputs) | ({} if targets is None else {"targets": targets})
        sizes = {name: len(x) for name, x in named.items()}
        if len(set(sizes.values())) > 1 or not all(sizes.values()):
            raise ValueError(f"Inputs and targets need the same number of samples, at least one; got {sizes}.")
        for name, x in named.items():
            if x.is_floating_point() and not torch.isfinite(x).all():
                raise ValueError(f"`{name}` has NaN or Inf; nothing was learned from this batch. Clean the data.")
        if targets is not None and targets.is_floating_point() == (self.likelihood == "categorical"):
            raise ValueError(f"likelihood={self.likelihood!r} does not go with targets of dtype {targets.dtype}.")

    def _learn(self, inputs: Inputs, targets: Tensor | None) -> dict[str, float]:
        """One update from all rows; without targets the mean stays."""
        for gaussian in self.gaussians.values():
            gaussian.factor = gaussian.relaxed(self.relaxation if targets is not None else 0.0)
        outputs = self.forward(inputs)
        scaled = self._scaled_slopes(outputs.mean)  # by name (M, N, d'), M = B * O
        with torch.no_grad():
            flat = [v.flatten(1) for v in scaled.values()]
            spread = cast(Tensor, sum(v @ v.mT for v in flat))
            extra = (outputs.variance.reshape(-1) - spread.diagonal()).clamp(min=0)
            spread = spread + torch.diag(extra)  # covariance of the outputs, (M, M)
            gain, residual, seen = self._observe(outputs.mean.detach(), spread, targets)
            changes = {}
            for name, gaussian in self.gaussians.items():
                v = scaled[name]
                whitened, rows = torch.einsum("km,mni->kni", gain, v), gaussian.rows()
                if residual is not None:
                    rows = rows + gaussian.shifted(v, gain.mT @ residual)
                # What is taken off a factor is finite if these are.
                if not (torch.isfinite(whitened).all() and torch.isfinite(rows).all()):
                    raise ValueError(_NOT_FINITE)
                changes[name] = (rows, gaussian.reduced(whitened))
            for name, (rows, factor) in changes.items():
                self.gaussians[name].write(rows, factor)
        return seen

    def _scaled_slopes(self, mean: Tensor) -> dict[str, Tensor]:
        parameters = [p for g in self.gaussians.values() for p in g.parameters]
        flat = mean.reshape(-1)
        if len(flat) == 1:
            found = [
                None if g is None else g[None] for g in torch.autograd.grad(flat[0], parameters, allow_unused=True)
            ]
        else:
            rows = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
            found = list(torch.autograd.grad(flat, parameters, rows, is_grads_batched=True, allow_unused=True))
        zero = ((len(flat), *p.shape) for p in parameters)
        gradients = iter([mean.new_zeros(shape) if g is None else g for g, shape in zip(found, zero, strict=True)])
        return {
            name: gaussian.scaled(gaussian.slopes([next(gradients) for _ in gaussian.parameters]))
            for name, gaussian in self.gaussians.items()
        }

    def _observe(
        self, mean: Tensor, spread: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """A = L^-1 H with S = L L^T = H spread H^T + R, the whitened innovation L^-1 e, and what to report."""
        if self.likelihood == "gaussian":
            predicted, slopes = mean.reshape(-1), torch.eye(len(spread), dtype=mean.dtype, device=mean.device)
            noise = self.noise * slopes
            if targets is not None and targets.shape != mean.shape:
                raise ValueError(f"Targets are {tuple(targets.shape)}, but outputs {tuple(mean.shape)}; reshape them.")
            observed = None if targets is None else targets.to(mean).reshape(-1)
        else:
            predicted, slopes, noise = self._probabilities(mean, spread.diagonal().reshape(mean.shape))
            observed = None
            if targets is not None:
                if targets.dim() != 1 or not 0 <= int(targets.min()) <= int(targets.max()) < mean.shape[-1]:
                    raise ValueError(f"Classes must be (B,), in [0, {mean.shape[-1]}), got {tuple(targets.shape)}.")
                hot = torch.nn.functional.one_hot(targets, mean.shape[-1])[:, :-1]
                observed = hot.to(mean).reshape(-1)
        root, failed = torch.linalg.cholesky_ex(slopes @ spread @ slopes.mT + noise)
        if failed or not torch.isfinite(root).all():
            raise ValueError(_NOT_FINITE)
        gain = torch.linalg.solve_triangular(root, slopes, upper=False)  # (K, M)
        if observed is None:
            return gain, None, {}
        error = observed - predicted
        residual = torch.linalg.solve_triangular(root, error[:, None], upper=False)[:, 0]
        loss = error.square().sum() / len(mean)
        if self.likelihood == "categorical":
            loss = torch.nn.functional.cross_entropy(mean, cast(Tensor, targets))
        return gain, residual, {"innovation": float(residual.square().mean()), "loss": float(loss)}

    def _probabilities(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E softmax without the last class (B (C - 1),), its slopes in the logits, and the noise of one draw.

        The noise is the categorical covariance diag(p) - p p^T, damped; leaving out a class makes it regular, and
        which one is left out does not matter.
        """

        def average(z: Tensor, v: Tensor) -> Tensor:
            return softmax_moments(Moments(z, v)).mean

        p = average(mean, variance)
        slopes = torch.func.vmap(torch.func.jacfwd(average))(mean, variance)[:, :-1]  # (B, C - 1, C)
        classes = mean.shape[-1]
        centred = torch.eye(classes, dtype=p.dtype, device=p.device) - 1 / classes
        noise = torch.diag_embed(p) - p[:, :, None] * p[:, None, :] + self.damping * centred
        noise = noise[:, :-1, :-1]
        return p[:, :-1].reshape(-1), torch.block_diag(*slopes), torch.block_diag(*noise)

    # -- files -----------------------------------------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the constructor."""
        names = ("likelihood", "noise", "damping", "relaxation")
        return {name: getattr(self, name) for name in names}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write means, covariances and options to `kbt.safetensors` and `kbt_config.json`, each atomically.

        Args:
            folder (`str` or `Path`): Created if missing.
        """
        tensors = {f"mean/{name}": g.rows() for name, g in self.gaussians.items()}
        tensors |= {f"factor/{name}": g.factor for name, g in self.gaussians.items()}
        priors = {name: g.prior_variance for name, g in self.gaussians.items()}
        write_state(Path(folder), tensors, {"options": self.options, "updates": self.updates, "priors": priors})

    def load(self, folder: str | Path) -> None:
        """Go on from what `save_pretrained` wrote, bit for bit; nothing changes if it does not fit.

        Args:
            folder (`str` or `Path`): With both files.

        Raises:
            ValueError: The files are damaged, or of other weights.
        """
        tensors, config = read_state(Path(folder))
        for name, gaussian in self.gaussians.items():
            for kind, own in (("mean", gaussian.rows()), ("factor", gaussian.factor)):
                saved = tensors.get(f"{kind}/{name}")
                if saved is None or (saved.shape, saved.dtype) != (own.shape, own.dtype):
                    found = "nothing" if saved is None else f"{tuple(saved.shape)} in {saved.dtype}"
                    raise ValueError(
                        f"{folder} does not fit: {kind} of {name} is {found}, not {tuple(own.shape)} in {own.dtype}."
                    )
        unknown = config["priors"].keys() - self.gaussians.keys()
        if unknown:
            raise ValueError(f"{folder} does not fit: it has weights that are not uncertain here: {sorted(unknown)}.")
        for name, gaussian in self.gaussians.items():
            like = gaussian.weight.device
            gaussian.write(tensors[f"mean/{name}"].to(like), tensors[f"factor/{name}"].to(like))
            gaussian.prior_variance = config["priors"][name]
        self.updates = config["updates"]
        for name, value in config["options"].items():
            setattr(self, name, value)
