"""What a batch observes: labels on rows of a model's outputs, and how likely they are.

A row of outputs z gives the distribution of its label. With the curvature H of the negative log-likelihood in z, two
kinds of cotangents v have E[v v^T] = H, as in the Fisher literature: residuals of labels drawn from the model, and R w
for a root R R^T = H and any w with E[w w^T] = I.
- Categorical, p = softmax(z): residual p - onehot(y), H = diag(p) - p p^T, R = diag(sqrt(p)) - p sqrt(p)^T.
- Gaussian with variance s: residual (z - y) / s, H = I / s, R = I / sqrt(s).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .sampling import Random, invert_cdf, normal_noise, random_signs


__all__ = [
    "IGNORE_INDEX",
    "CategoricalObservation",
    "GaussianObservation",
    "LikelihoodObservation",
    "Observation",
    "infer_observation",
    "invert_cdf",
    "negative_log_likelihood",
]

IGNORE_INDEX = -100  # transformers' mark for labels that do not count

# Which positions a label's gradient reaches: those before it, those of the decoder up to it, or all of its sequence.
Layout = Literal["causal", "seq2seq", "full"]


class Observation(ABC):
    """Labels that rows of outputs explain. Rows are those of the logits, flattened to (R, V).

    The methods that compute take the N observed rows only, in float32 or float64; `expected` is the parameter of the
    labels' distribution that `expect` returns.
    """

    @property
    def layout(self) -> Layout:
        """Which positions a label's gradient can reach."""
        return "full"

    @abstractmethod
    def targets(self, logits: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
        """Labels aligned with the rows of the logits.

        Args:
            logits (`Tensor`): Shape (..., V).
            labels (`Tensor`): As the model takes them.
            segments (`Tensor`, *optional*):
                Which sequence each position belongs to, of the labels' shape, where several share a row (packing).

        Returns:
            `Tensor`: One entry per row, on the logits' device.

        Raises:
            ValueError: The labels do not fit the logits.
        """

    @abstractmethod
    def observed(self, labels: Tensor) -> Tensor:
        """Which labels (or targets) count; boolean, one per row."""

    @abstractmethod
    def expect(self, outputs: Tensor) -> Tensor:
        """Parameter of the labels' distribution for outputs of shape (N, V), in float32 or float64."""

    @abstractmethod
    def loss(self, outputs: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of the targets in nats, shape (N,)."""

    @abstractmethod
    def draw(self, expected: Tensor, random: Random = None) -> Tensor:
        """Targets drawn from the model."""

    @abstractmethod
    def residual(self, expected: Tensor, targets: Tensor, out: Tensor, rows: Tensor) -> None:
        """Write d loss / d outputs of the targets into `rows` of `out`, which is otherwise zero."""

    @abstractmethod
    def root(self, expected: Tensor, direction: Tensor) -> Tensor:
        """R w for directions w of shape (N, V)."""

    def random_root(self, expected: Tensor, targets: Tensor, random: Random = None) -> Tensor:
        """R w for random signs w, shape (N, V)."""
        return self.root(expected, random_signs(expected.shape, expected, random))

    def roots(self, expected: Tensor, targets: Tensor, damping: float = 0.0, top_k: int | None = None) -> Tensor:
        """Columns r_1..r_K with sum_k r_k r_k^T = H + damping * I (see `damping_noise`).

        Args:
            expected (`Tensor`): From `expect`, shape (N, V).
            targets (`Tensor`): Of the same rows.
            damping (`float`, *optional*, defaults to 0.0): >= 0.
            top_k (`int`, *optional*): Only a categorical observation knows coarse outputs.

        Returns:
            `Tensor`: Shape (N, K, V).
        """
        if top_k is not None:
            raise ValueError(f"top_k={top_k} needs a categorical observation, got {type(self).__name__}.")
        eye = torch.eye(expected.shape[-1], dtype=expected.dtype, device=expected.device)
        columns = torch.stack([self.root(expected, e.expand_as(expected)) for e in eye], dim=1)
        return columns if damping == 0 else symmetric_roots(columns.mT @ columns, damping)

    def trace(self, expected: Tensor, targets: Tensor) -> Tensor:
        """Trace of H, shape (N,)."""
        return self.roots(expected, targets).square().sum((1, 2))

    def directions(self, outputs: int) -> int:
        """How many directions of the outputs labels can tell apart."""
        return outputs

    def num_roots(self, outputs: int, top_k: int | None) -> int:
        """How many columns `roots` has."""
        return outputs

    def damping_noise(self, signs: Tensor) -> Tensor:
        """A random vector with covariance I, on the directions of outputs that labels can tell apart.

        Args:
            signs (`Tensor`): Random signs, shape (N, V).

        Returns:
            `Tensor`: Shape (N, V).
        """
        return signs

    def surprise(self, expected: Tensor, targets: Tensor, damping: float) -> Tensor:
        """Squared residual in units of its own covariance, shape (N,): what weighs outliers down.

        Raises:
            ValueError: Not known for this observation.
        """
        raise ValueError(f"outlier_threshold is not supported for {type(self).__name__}.")

    def soften(self, expected: Tensor, x: Tensor, damping: float) -> Tensor:
        """H (H + damping * I)^-1 x for rows x (N, V): the residual's share of the softmax form.

        Raises:
            ValueError: Not a categorical observation.
        """
        raise ValueError(f"form='softmax' needs a categorical observation, got {type(self).__name__}.")

    def positions(
        self, labels: Tensor, attention_mask: Tensor | None, segments: Tensor | None = None
    ) -> Tensor | None:
        """Positions whose activations can carry a gradient: real tokens that some label that counts depends on.

        Args:
            labels (`Tensor`): Shape (batch, time) or (batch,).
            attention_mask (`Tensor`, *optional*):
                Shape (batch, time), 1 at real tokens; of the decoder, if labels are on its positions.
            segments (`Tensor`, *optional*): Shape (batch, time), which sequence a position belongs to.

        Returns:
            `Tensor` or `None`: Boolean of shape (batch, time), or (batch,) if only whole sequences count nothing;
            `None` if every position counts.
        """
        mask = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask.bool()
        counts = self.observed(labels)
        if self.layout == "full":
            reached = counts.flatten(1).any(-1) if counts.dim() > 1 else counts  # (batch,)
            if reached.all():
                return mask
            return reached if mask is None else mask & reached.to(mask.device)[:, None]
        rows, time = labels.shape
        index = torch.arange(time, device=labels.device).expand(rows, time)
        if segments is None:
            segments = torch.arange(rows, device=labels.device)[:, None].expand(rows, time)
        last = index.new_full((int(segments.max()) + 1,), -1)  # of each sequence, its last label that counts
        last.scatter_reduce_(0, segments.reshape(-1), index.where(counts, -1).reshape(-1), "amax")
        # With the shift a label is explained one position before its own, and the last one explains nothing.
        reached = index < last[segments] if self.layout == "causal" else index <= last[segments]
        return reached if mask is None else reached & mask.to(reached.device)


@dataclass(frozen=True)
class CategoricalObservation(Observation):
    """Labels that a softmax over the last dimension of the logits explains.

    Causal language models: `shift=True`. Encoder-decoders: `seq2seq=True`. Classification of sequences (labels of
    shape (batch,)) or tokens (labels of shape (batch, time)): neither.

    Args:
        shift (`bool`): `True` for causal language models: the logits at position t explain the label at t + 1.
        seq2seq (`bool`, *optional*, defaults to `False`): Labels and logits belong to a decoder's positions.

    Raises:
        ValueError: Both are set.
    """

    shift: bool
    seq2seq: bool = False

    def __post_init__(self) -> None:
        if self.shift and self.seq2seq:
            raise ValueError("shift=True and seq2seq=True exclude each other: a decoder's inputs are already shifted.")

    @property
    def layout(self) -> Layout:
        """See `Observation.layout`."""
        return "causal" if self.shift else "seq2seq" if self.seq2seq else "full"

    def targets(self, logits: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
        """See `Observation.targets`; int64 of shape (R,), -100 where nothing is observed.

        With the shift, the first label of a sequence is explained by nothing, also where another sequence precedes it
        in the same row.
        """
        if logits.dim() < (3 if self.shift else 2):
            wanted = "(batch, positions, vocabulary)" if self.shift else "(batch, ..., classes)"
            raise ValueError(
                f"logits must have shape {wanted}, got {tuple(logits.shape)}; do not flatten or index them."
            )
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; expected "
                f"{tuple(logits.shape[:-1])}."
            )
        if labels.is_floating_point():
            raise ValueError(
                f"labels must be class indices, got dtype {labels.dtype}. Regression needs GaussianObservation (set "
                "config.problem_type='regression'); multi-label classification is not supported."
            )
        if segments is not None and segments.shape != labels.shape:
            raise ValueError(
                f"segments of shape {tuple(segments.shape)} do not fit labels of shape {tuple(labels.shape)}."
            )
        labels = labels.to(logits.device)
        if self.shift:
            following = labels[..., 1:]
            if segments is not None:
                segments = segments.to(logits.device)
                following = following.where(segments[..., 1:] == segments[..., :-1], IGNORE_INDEX)
            labels = torch.cat([following, labels.new_full((*labels.shape[:-1], 1), IGNORE_INDEX)], dim=-1)
        targets = labels.reshape(-1).long()
        seen = targets[targets.ne(IGNORE_INDEX)]
        if len(seen) and (seen.min() < 0 or seen.max() >= logits.shape[-1]):
            raise ValueError(
                f"Labels range over [{seen.min().item()}, {seen.max().item()}], outside the {logits.shape[-1]} "
                "classes of the logits; mark labels that do not count with -100."
            )
        return targets

    def observed(self, labels: Tensor) -> Tensor:
        """See `Observation.observed`."""
        return labels.ne(IGNORE_INDEX)

    def expect(self, outputs: Tensor) -> Tensor:
        """Probabilities, shape (N, V)."""
        return outputs.softmax(-1, dtype=torch.promote_types(outputs.dtype, torch.float32))

    def loss(self, outputs: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
        """See `Observation.loss`."""
        # log p_y = z_y - z_m + log p_m with the likeliest m: exact also where p_y underflows, and no second softmax.
        peak, likeliest = expected.max(-1)
        pair = outputs.gather(1, torch.stack([likeliest, targets], dim=1)).to(peak.dtype)  # (N, 2)
        return pair[:, 0] - pair[:, 1] - peak.log()

    def draw(self, expected: Tensor, random: Random = None) -> Tensor:
        """See `Observation.draw`."""
        return invert_cdf(expected, random)

    def residual(self, expected: Tensor, targets: Tensor, out: Tensor, rows: Tensor) -> None:
        """p - onehot(y)."""
        own = torch.arange(len(rows), device=rows.device)
        out.index_copy_(0, rows, expected.to(out.dtype))
        out[rows, targets] = (expected[own, targets] - 1).to(out.dtype)  # cast last: p - 1 is small where p is not

    def root(self, expected: Tensor, direction: Tensor) -> Tensor:
        """sqrt(p) * w - p (sqrt(p) . w); R R^T = diag(p) - p p^T because p sums to one."""
        scaled = expected.sqrt().mul_(direction)
        return scaled.addcmul_(expected, scaled.sum(-1, keepdim=True), value=-1)

    def roots(self, expected: Tensor, targets: Tensor, damping: float = 0.0, top_k: int | None = None) -> Tensor:
        """See `Observation.roots`; V - 1 columns of H + damping * (I - 1 1^T / V), see `damping_noise`.

        With `top_k` only the k likeliest labels, the target among them, and "any other" are told apart: k columns,
        whose information never exceeds the full one (it is that of a function of the label), damped likewise.
        """
        width = expected.shape[-1]
        if top_k is None or top_k >= width - 1:
            columns = _categorical_roots(expected, damping)  # (N, V - 1, V)
        else:
            preferred = expected.scatter(1, targets[:, None], 2.0)  # the target first
            chosen = preferred.topk(top_k, dim=-1).indices  # (N, k)
            own = expected.gather(1, chosen)
            others = expected.scatter(1, chosen, 0.0)
            rest = others.sum(-1, keepdim=True)  # (N, 1)
            coarse = _categorical_roots(torch.cat([own, rest], dim=-1), damping)  # (N, k, k + 1)
            others = others / rest.clamp_min(torch.finfo(rest.dtype).tiny)
            columns = coarse[..., -1:] * others[:, None, :]
            columns = columns.scatter(-1, chosen[:, None, :].expand(-1, coarse.shape[1], -1), coarse[..., :-1])
        return columns

    def trace(self, expected: Tensor, targets: Tensor) -> Tensor:
        """See `Observation.trace`: 1 - |p|^2."""
        return 1 - expected.square().sum(-1)

    def directions(self, outputs: int) -> int:
        """See `Observation.directions`: V - 1, as a shift of all logits changes no probability."""
        return outputs - 1

    def num_roots(self, outputs: int, top_k: int | None) -> int:
        """See `Observation.num_roots`."""
        return outputs - 1 if top_k is None else min(top_k, outputs - 1)

    def damping_noise(self, signs: Tensor) -> Tensor:
        """See `Observation.damping_noise`; a shift of all logits changes no probability: I - 1 1^T / V."""
        return signs - signs.mean(-1, keepdim=True)

    def surprise(self, expected: Tensor, targets: Tensor, damping: float) -> Tensor:
        """See `Observation.surprise`: e^T (H + damping I)^-1 e with e = onehot - p, by Sherman and Morrison."""
        e = -expected
        e.scatter_add_(1, targets[:, None], torch.ones_like(e[:, :1]))
        return (e * _solve_damped(expected, e, damping)).sum(-1)

    def soften(self, expected: Tensor, x: Tensor, damping: float) -> Tensor:
        """See `Observation.soften`: x - damping (H + damping I)^-1 x."""
        return x - damping * _solve_damped(expected, x, damping) if damping > 0 else x


@dataclass(frozen=True)
class GaussianObservation(Observation):
    """Real labels around the outputs: NLL = |y - f|^2 / (2 variance) nats per sequence, without its constant.

    A model trained on the mean squared error over C outputs, as transformers does, minimises this NLL per sequence
    for variance = C / 2.

    Args:
        variance (`float`, *optional*, defaults to 1.0): Of the noise on each label.

    Raises:
        ValueError: The variance is not positive and finite.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.variance < math.inf:
            raise ValueError(f"variance must be positive and finite, got {self.variance}.")

    def targets(self, logits: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
        """See `Observation.targets`; shape (B, C) for logits of shape (B, C). Labels (B,) do for one output."""
        shape = (*labels.shape, 1) if labels.dim() == 1 else tuple(labels.shape)
        if logits.dim() != 2 or shape != tuple(logits.shape):
            raise ValueError(
                f"Labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(logits.shape)}; regression "
                "needs one label per output, (batch, outputs)."
            )
        if segments is not None:
            raise ValueError("segments (packed sequences) are not supported for regression.")
        targets = labels.reshape(logits.shape).to(logits.device, torch.promote_types(logits.dtype, torch.float32))
        if not torch.isfinite(targets).all():
            raise ValueError("The regression labels contain NaN or Inf; leave such examples out.")
        return targets

    def observed(self, labels: Tensor) -> Tensor:
        """See `Observation.observed`; all of them."""
        return torch.ones(len(labels), dtype=torch.bool, device=labels.device)

    def expect(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def loss(self, outputs: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
        """See `Observation.loss`."""
        return (targets - expected).square().sum(-1) / (2 * self.variance)

    def draw(self, expected: Tensor, random: Random = None) -> Tensor:
        """See `Observation.draw`."""
        return expected + normal_noise(expected.shape, expected, random) * math.sqrt(self.variance)

    def residual(self, expected: Tensor, targets: Tensor, out: Tensor, rows: Tensor) -> None:
        """(f - y) / variance."""
        out.index_copy_(0, rows, ((expected - targets) / self.variance).to(out.dtype))

    def root(self, expected: Tensor, direction: Tensor) -> Tensor:
        """W / sqrt(variance)."""
        return direction / math.sqrt(self.variance)

    def surprise(self, expected: Tensor, targets: Tensor, damping: float) -> Tensor:
        """See `Observation.surprise`: |y - f|^2 / variance; damping has no part in it."""
        return (targets - expected).square().sum(-1) / self.variance


class LikelihoodObservation(Observation):
    """Any likelihood, from a function that gives the negative log-likelihood of each row.

    ```python
    def poisson(outputs, counts):  # (N, 1), (N, 1) -> (N,)
        return (outputs.exp() - counts * outputs).sum(-1)

    optimizer = create_loko_optimizer(model, observation=LikelihoodObservation(poisson))
    ```

    Residuals are its gradients in the outputs, and H its Hessian at the observed labels, its negative eigenvalues cut
    off, both by `torch.func`. For LoKO with `columns` "exact", "rademacher" or "empirical", and up to 512 outputs.

    Args:
        function (`Callable`):
            Takes outputs (N, V) and labels (N, ...), returns nats of shape (N,); row n must depend on row n only.
    """

    _WIDEST = 512

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        if not callable(function):
            raise ValueError(f"function must be callable as f(outputs, labels), got {type(function).__name__}.")
        self.function = function

    def targets(self, logits: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
        """See `Observation.targets`; the labels by row of the logits."""
        leading = logits.shape[:-1]
        if labels.shape[: len(leading)] != leading:
            raise ValueError(
                f"Labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(logits.shape)}; expected "
                f"{tuple(leading)} first."
            )
        return labels.to(logits.device).reshape(-1, *labels.shape[len(leading) :])

    def observed(self, labels: Tensor) -> Tensor:
        """See `Observation.observed`; integer labels of -100 do not count."""
        if labels.is_floating_point():
            return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        return labels.ne(IGNORE_INDEX).flatten(1).all(-1) if labels.dim() > 1 else labels.ne(IGNORE_INDEX)

    def expect(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def loss(self, outputs: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
        """See `Observation.loss`."""
        loss = self.function(expected, targets)
        if loss.shape != expected.shape[:1]:
            raise ValueError(
                f"The likelihood function returned shape {tuple(loss.shape)}, not one value per row, "
                f"{tuple(expected.shape[:1])}."
            )
        if len(loss) > 1:
            alone = self.function(expected[:1], targets[:1])
            if not torch.allclose(alone.to(loss), loss[:1], rtol=1e-3, atol=1e-4, equal_nan=True):
                raise ValueError(
                    "The likelihood function mixes rows: that of the first row alone differs. Labels (N,) beside "
                    "outputs (N, 1) broadcast to (N, N); give labels of the outputs' shape, or index outputs[:, 0]."
                )
        return loss.detach()

    def draw(self, expected: Tensor, random: Random = None) -> Tensor:
        """Refused: a likelihood does not say how to draw from it."""
        raise ValueError(
            "Labels cannot be drawn from a LikelihoodObservation; use columns='exact', 'rademacher' or 'empirical'."
        )

    def residual(self, expected: Tensor, targets: Tensor, out: Tensor, rows: Tensor) -> None:
        """Gradient of the function in the outputs."""
        gradient = torch.func.grad(lambda z: self.function(z, targets).sum())(expected)
        out.index_copy_(0, rows, gradient.to(out.dtype))

    def root(self, expected: Tensor, direction: Tensor) -> Tensor:
        """Refused: the Hessian depends on the labels, see `roots`."""
        raise ValueError("LikelihoodObservation has a curvature only at its labels; use fisher='empirical'.")

    def random_root(self, expected: Tensor, targets: Tensor, random: Random = None) -> Tensor:
        """See `Observation.random_root`."""
        signs = random_signs(expected.shape, expected, random)
        return torch.einsum("nkv,nk->nv", self.roots(expected, targets), signs)

    def roots(self, expected: Tensor, targets: Tensor, damping: float = 0.0, top_k: int | None = None) -> Tensor:
        """See `Observation.roots`."""
        if top_k is not None:
            raise ValueError(f"top_k={top_k} needs a categorical observation, got LikelihoodObservation.")
        if expected.shape[-1] > self._WIDEST:
            raise ValueError(f"LikelihoodObservation supports up to {self._WIDEST} outputs, got {expected.shape[-1]}.")

        def one(z: Tensor, y: Tensor) -> Tensor:
            return self.function(z[None], y[None])[0]

        return symmetric_roots(torch.func.vmap(torch.func.hessian(one))(expected, targets), damping)


def symmetric_roots(matrix: Tensor, damping: float = 0.0) -> Tensor:
    """Rows r with sum r r^T = matrix + damping * I, negative eigenvalues cut off; (N, V, V) -> (N, V, V)."""
    values, vectors = torch.linalg.eigh(matrix)
    return ((values.clamp_min(0) + damping).sqrt()[:, None, :] * vectors).mT


def _categorical_roots(p: Tensor, damping: float) -> Tensor:
    """C - 1 rows r with sum r r^T = diag(p) - p p^T + damping * (I - 1 1^T / C), for p (N, C)."""
    columns = _multinomial_cholesky(p).mT
    if damping == 0:
        return columns
    centred = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device) - 1 / p.shape[-1]
    return symmetric_roots(columns.mT @ columns + damping * centred)[:, 1:]  # the first is that of 1, which is 0


def _multinomial_cholesky(p: Tensor) -> Tensor:
    """L with L L^T = diag(p) - p p^T for rows p (N, C) that sum to one; (N, C, C - 1), lower triangular.

    With s_j = sum of p from j on, L_jj = sqrt(p_j s_{j+1} / s_j) and L_ij = -p_i sqrt(p_j / (s_j s_{j+1})) below.
    """
    tiny = torch.finfo(p.dtype).tiny
    tails = p.flip(-1).cumsum(-1).flip(-1).clamp_min(tiny)  # s_j, summed from the small end
    own, after = tails[:, :-1], tails[:, 1:]
    diagonal = (p[:, :-1] * (after / own)).sqrt()
    below = (p[:, :-1] / own).sqrt() / after.sqrt()  # each at most 1 over sqrt(s_{j+1})
    columns = -p[:, :, None] * below[:, None, :]
    return columns.tril(-1).diagonal_scatter(diagonal, dim1=1, dim2=2)


def _solve_damped(p: Tensor, x: Tensor, damping: float) -> Tensor:
    """(diag(p) - p p^T + damping I)^-1 x for rows (N, V); damping > 0."""
    scale = p + damping
    y, q = x / scale, p / scale
    # 1 - p^T diag(scale)^-1 p, free of cancellation: sum p = 1
    left = (damping * q).sum(-1, keepdim=True)
    return y + q * (p * y).sum(-1, keepdim=True) / left


def infer_observation(model: nn.Module) -> Observation:
    """Choose the observation from the model's class and configuration.

    Args:
        model (`nn.Module`): A transformers model, possibly wrapped by PEFT.

    Returns:
        `Observation`: Categorical for causal language models, encoder-decoders, sequence, token and image
        classification; Gaussian with unit variance for regression.

    Raises:
        ValueError: The task is none of these, or a multi-label classification.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    name = type(base).__name__
    config = getattr(base, "config", None)
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return CategoricalObservation(shift=True)
    if name.endswith(("ForTokenClassification", "ForImageClassification")):
        return CategoricalObservation(shift=False)
    if name.endswith("ForSequenceClassification"):
        problem, outputs = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
        if problem == "regression" or (problem is None and outputs == 1):
            return GaussianObservation()
        if problem == "multi_label_classification":
            raise ValueError(
                f"{name} with problem_type={problem!r} is not supported; supported are single-label classification "
                "and regression."
            )
        return CategoricalObservation(shift=False)
    seq2seq = name.endswith("ForConditionalGeneration") or "EncoderDecoder" in name
    if seq2seq and getattr(config, "is_encoder_decoder", False):
        return CategoricalObservation(shift=False, seq2seq=True)
    raise ValueError(
        f"Cannot tell what {name} observes; supported are causal language models, encoder-decoders for conditional "
        "generation, sequence and token classification, and regression. Pass `observation=CategoricalObservation("
        "shift=...)` if its logits explain integer labels."
    )


def negative_log_likelihood(
    logits: Tensor, labels: Tensor, observation: Observation, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood in nats and number of labels that count.

    Args:
        logits (`Tensor`): Shape (..., V).
        labels (`Tensor`): As the model takes them.
        observation (`Observation`): How labels meet logits.
        segments (`Tensor`, *optional*): See [`Observation.targets`].

    Returns:
        `tuple[Tensor, Tensor]`: Scalars.
    """
    targets = observation.targets(logits, labels, segments)
    rows = observation.observed(targets).nonzero().squeeze(-1)
    outputs = logits.reshape(-1, logits.shape[-1])[rows]
    total = observation.loss(outputs, observation.expect(outputs), targets[rows]).sum()
    return total, torch.tensor(len(rows), device=logits.device)
