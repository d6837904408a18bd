"""What is back-propagated for a Fisher.

The Fisher of a batch is sum_i J_i^T H_i J_i over its labels i, with J_i the Jacobian of the outputs that explain label
i and H_i the curvature of its negative log-likelihood in them (`observations`). It is the expected square of
c = sum_i J_i^T v_i for independent cotangents v_i of mean zero and covariance H_i, because the products of different
labels vanish in expectation: one backward pass for all labels at once.
- "sampled": v = residual of a label drawn from the model.
- "rademacher": v = R w with R R^T = H and random signs w.
- "exact": no randomness. One backward per output c with v = R e_c, the columns of R. Labels of different sequences go
  together, as their scores meet in no product; labels of one sequence go one by one.
- "empirical": v = residual of the true label; not the Fisher (biased away from a perfect fit), but no draw is needed.
  Its square is taken per sequence, (sum_i J_i^T v_i)^2, or per token, sum_i (J_i^T v_i)^2. The latter is the expected
  square of sum_i w_i J_i^T v_i with independent random signs w_i, as E[w_i w_j] = 0 for i != j: again one backward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters import AdapterState, unwrap
from ..observations import Observation
from ..sampling import random_signs


FISHERS = ("sampled", "rademacher", "exact", "empirical")
REDUCTIONS = ("sequence", "token")
EXACT_LIMIT = 4096  # backward passes per batch


def resolve_reduction(fisher: str, reduction: str | None = None) -> str:
    """What the Fisher is summed over.

    Args:
        fisher (`str`): One of `FISHERS`.
        reduction (`str`, *optional*):
            "token" for the sum of every label's own Fisher, "sequence" for that of the scores summed over a sequence.
            Defaults to "sequence" for the empirical Fisher and to "token" for all others.

    Returns:
        `str`: "sequence" or "token".

    Raises:
        ValueError: An unknown name, or "sequence" with a Fisher for which it would be the same as "token".
    """
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {FISHERS}, got {fisher!r}.")
    if reduction not in (None, *REDUCTIONS):
        raise ValueError(f"reduction must be one of {REDUCTIONS} or None, got {reduction!r}.")
    if fisher == "empirical":
        return reduction or "sequence"
    if reduction == "sequence":
        raise ValueError(
            f"reduction='sequence' means nothing for fisher={fisher!r}: scores of labels drawn from the model are "
            "uncorrelated between tokens, so that the Fisher of a sequence is the sum of those of its tokens. Leave "
            "reduction out, or use fisher='empirical'."
        )
    return "token"


def kinds_for(fisher: str, reduction: str, num_samples: int = 1) -> tuple[list[str], float]:
    """The kinds of cotangents that make up a Fisher, and the weight of each of their squares.

    Args:
        fisher (`str`): One of `FISHERS`.
        reduction (`str`): From `resolve_reduction`.
        num_samples (`int`, *optional*, defaults to 1): Draws per label, averaged.

    Returns:
        `tuple[list[str], float]`: For `score_cotangents`; squares of the cotangents' scores are to be summed with the
        weight.

    Raises:
        ValueError: Several samples of something that is not drawn.
    """
    drawn = fisher in ("sampled", "rademacher") or (fisher, reduction) == ("empirical", "token")
    if num_samples < 1 or (num_samples > 1 and not drawn):
        raise ValueError(
            f"num_samples must be >= 1, and 1 where nothing is drawn (fisher={fisher!r}, reduction={reduction!r}); "
            f"got {num_samples}."
        )
    kind = "empirical_token" if (fisher, reduction) == ("empirical", "token") else fisher
    return [kind] * num_samples, 1 / num_samples


@dataclass(frozen=True, eq=False)
class Cotangents:
    """The cotangents of one batch, made one at a time as they are iterated over; `len` is their number.

    Args:
        logits (`Tensor`): Detached; gives shape, dtype and device.
        rows (`Tensor`): Observed rows of the flattened logits, shape (N,).
        expected (`Tensor`): From `Observation.expect`, shape (N, V).
        targets (`Tensor`): True targets of the observed rows.
        slots (`Tensor`, *optional*): Number of each row within its sequence, shape (N,); for "exact".
        observation (`Observation`): How labels meet logits.
        kinds (`Sequence[str]`): See `score_cotangents`.
        generator (`torch.Generator`, *optional*): Source of the draws.
    """

    logits: Tensor
    rows: Tensor
    expected: Tensor
    targets: Tensor
    slots: Tensor | None
    observation: Observation
    kinds: Sequence[str]
    generator: torch.Generator | None

    def __len__(self) -> int:
        if not len(self.rows):
            return 0
        exact = _passes(self.slots, self.logits) if self.slots is not None else 0
        return sum(exact if kind == "exact" else 1 for kind in self.kinds)

    def __iter__(self) -> Iterator[Tensor]:
        if not len(self.rows):
            return
        for kind in self.kinds:
            if kind == "exact":
                yield from self._exact()
            elif kind == "rademacher":
                signs = random_signs(self.expected.shape, self.expected, self.generator)
                yield self._place(self.observation.root(self.expected, signs), self.rows)
            else:
                yield self._residual(kind)

    def _residual(self, kind: str) -> Tensor:
        flat = self._zeros()
        drawn = kind == "sampled"
        targets = self.observation.draw(self.expected, self.generator) if drawn else self.targets
        self.observation.residual(self.expected, targets, flat, self.rows)
        if kind == "empirical_token":
            flat.mul_(random_signs((len(flat), 1), flat, self.generator))
        return flat.view_as(self.logits)

    def _exact(self) -> Iterator[Tensor]:
        assert self.slots is not None
        for slot in range(int(self.slots.max()) + 1):
            chosen = self.slots == slot  # one label of every sequence that has so many
            expected, rows = self.expected[chosen], self.rows[chosen]
            for output in range(expected.shape[-1]):
                direction = torch.zeros_like(expected)
                direction[:, output] = 1
                yield self._place(self.observation.root(expected, direction), rows)

    def _zeros(self) -> Tensor:
        return torch.zeros_like(self.logits).view(-1, self.logits.shape[-1])

    def _place(self, values: Tensor, rows: Tensor) -> Tensor:
        return self._zeros().index_copy_(0, rows, values.to(self.logits.dtype)).view_as(self.logits)


def score_cotangents(
    logits: Tensor,
    labels: Tensor,
    observation: Observation,
    kinds: Sequence[str],
    generator: torch.Generator | None = None,
    segments: Tensor | None = None,
    exact_limit: int = EXACT_LIMIT,
) -> tuple[Cotangents, int, Tensor]:
    """Cotangents of the logits whose scores, squared and summed, give a Fisher over all labels that count.

    Args:
        logits (`Tensor`): Shape (..., V).
        labels (`Tensor`): As the model takes them.
        observation (`Observation`): How labels meet logits.
        kinds (`Sequence[str]`):
            "sampled", "rademacher", "empirical" (the negative log-likelihood's own cotangent) and "empirical_token"
            stand for one cotangent each, "exact" for `exact_count` of them.
        generator (`torch.Generator`, *optional*): Source of the draws, which are made while iterating.
        segments (`Tensor`, *optional*): See [`Observation.targets`].
        exact_limit (`int`, *optional*, defaults to 4096): Largest number of cotangents of the exact Fisher.

    Returns:
        `tuple[Cotangents, int, Tensor]`: Cotangents of the logits' shape and dtype, the number of labels observed,
        and the mean negative log-likelihood of the true labels.

    Raises:
        ValueError: The logits are not finite, a label does not fit them, or the exact Fisher takes too many passes.
    """
    targets = observation.targets(logits, labels, segments)
    rows = observation.observed(targets).nonzero().squeeze(-1)  # (N,)
    outputs = logits.detach().reshape(-1, logits.shape[-1])[rows]
    targets = targets[rows]
    expected = observation.expect(outputs)  # (N, V)
    if not torch.isfinite(expected.sum()):
        raise ValueError("The model's logits contain NaN or Inf; no score can be read from them.")
    loss = observation.loss(outputs, expected, targets).mean() if len(rows) else expected.new_zeros(())
    slots = None
    if "exact" in kinds:
        slots = number_labels(rows, logits, segments)
        passes = _passes(slots, logits)
        if passes > exact_limit:
            outputs = logits.shape[-1]
            raise ValueError(
                f"fisher='exact' takes {passes} backward passes for this batch ({passes // outputs} labels in a "
                f"sequence, {outputs} outputs each), more than {exact_limit}; use fisher='sampled'."
            )
    cotangents = Cotangents(logits.detach(), rows, expected, targets, slots, observation, kinds, generator)
    return cotangents, len(rows), loss


def exact_count(logits: Tensor, labels: Tensor, observation: Observation, segments: Tensor | None = None) -> int:
    """Backward passes that the exact Fisher of a batch takes: most labels in one sequence times number of outputs.

    Args:
        logits (`Tensor`): Shape (..., V); only the shape is read.
        labels (`Tensor`): As the model takes them.
        observation (`Observation`): How labels meet logits.
        segments (`Tensor`, *optional*): See [`Observation.targets`].

    Returns:
        `int`: 0 if nothing is observed.
    """
    targets = observation.targets(logits, labels, segments)
    return _passes(number_labels(observation.observed(targets).nonzero().squeeze(-1), logits, segments), logits)


def number_labels(rows: Tensor, logits: Tensor, segments: Tensor | None = None) -> Tensor:
    """How many observed rows of the same sequence come before each.

    Args:
        rows (`Tensor`): Observed rows of the flattened logits, ascending, shape (N,).
        logits (`Tensor`): Shape (B, ..., V); only the shape is read.
        segments (`Tensor`, *optional*): See [`Observation.targets`]; by default the first dimension is the sequence.

    Returns:
        `Tensor`: Shape (N,), int64.
    """
    per_sequence = logits.shape[1:-1].numel()
    owner = rows // per_sequence if segments is None else segments.to(rows.device).reshape(-1)[rows]
    own = torch.arange(len(rows), device=rows.device)
    first = torch.ones_like(own, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    return own - own.where(first, 0).cummax(0).values


def _passes(slots: Tensor, logits: Tensor) -> int:
    """Cotangents of the exact Fisher: one per slot and output."""
    return (int(slots.max()) + 1) * logits.shape[-1] if len(slots) else 0


def backward_scores(
    logits: Tensor,
    cotangents: Cotangents,
    begin: Callable[[int], None] = lambda number: None,
    end: Callable[[], None] = lambda: None,
) -> None:
    """Run one backward pass per cotangent, keeping the graph until the last.

    Args:
        logits (`Tensor`): With a graph to the adapter.
        cotangents (`Cotangents`): Of the logits.
        begin (`Callable`, *optional*): Called with the number of each pass before it.
        end (`Callable`, *optional*): Called after each pass.
    """
    count = len(cotangents)
    for k, cotangent in enumerate(cotangents):
        begin(k)
        logits.backward(cotangent, retain_graph=k < count - 1)
        end()


@contextmanager
def scoring(state: AdapterState) -> Iterator[None]:
    """Put the model in the condition in which scores are taken, and everything back on exit.

    Evaluation mode (no dropout), gradients on for activations (the taps see to that) but for no parameter. Layers that
    checkpoint their activations stay flagged as training, since they checkpoint in no other mode; their children do
    not, and the dropout that such a layer applies by itself is set to zero meanwhile.

    Args:
        state (`AdapterState`): The adapter whose scores are taken.

    Yields:
        None: The model may be run forward and backward inside.
    """
    model = state.model
    modes = {module: module.training for module in model.modules()}
    dropouts: list[tuple[nn.Module, str, float]] = []
    flags = {p: p.requires_grad for p in model.parameters()}
    cache = _switch_off_cache(model)
    try:
        model.eval()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
                own = [(name, p) for name, p in vars(module).items() if "drop" in name and isinstance(p, float)]
                dropouts += [(module, name, p) for name, p in own]
                for name, _ in own:
                    setattr(module, name, 0.0)
        for p in model.parameters():
            p.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, name, p in dropouts:
            setattr(module, name, p)
        for p, flag in flags.items():
            p.requires_grad_(flag)
        cache()


def _switch_off_cache(model: nn.Module):
    """Turn the generation cache off in all parts of the model; returns the function that restores it."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in found.values() if getattr(config, "use_cache", None)]
    for config in caching:
        config.use_cache = False

    def restore() -> None:
        for config in caching:
            config.use_cache = True

    return restore


def default_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a transformers model.

    The labels are held back, since no loss is needed, except from encoder-decoders that are given no decoder inputs:
    they make them from the labels.
    """
    labels = batch.get("labels")
    held_back = {"num_items_in_batch", "labels"}
    config = getattr(unwrap(model), "config", None)
    if (
        getattr(config, "is_encoder_decoder", False)
        and not batch.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
        and labels is not None
        and labels.dim() == 2
        and not labels.is_floating_point()
    ):
        held_back.remove("labels")
    output = model(**{key: value for key, value in batch.items() if key not in held_back})
    logits = output["logits"] if isinstance(output, Mapping) else output.logits
    if not isinstance(logits, Tensor):
        raise ValueError("The model returned no logits; pass `forward_fn(model, batch) -> logits`.")
    return logits
