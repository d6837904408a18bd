"""The same curvatures from other libraries, where they are installed: empirical Fisher, summed over the data.

Peers know no masks. They are given the inputs before the last token and the targets that follow them, one position per
sequence less than ours reads. Each works on a copy of the model, as some change it for good.

Not run by itself: part of `curvature_cost.py`.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalman_peft import AdapterState


Batches = Sequence[Mapping[str, Tensor]]
# By adapter key: the diagonal, shaped like the factor; or (second moment of gradients, of inputs), each a sum.
Found = dict[str, Any]
Run = Callable[[Batches], Found]


@dataclass(frozen=True)
class Peer:
    """One quantity of one library.

    Args:
        library (`str`): Name of the module.
        quantity (`str`): "diagonal", exact per sequence; or "kronecker", second moments of inputs and gradients.
        build (`Callable`): Model -> run. It may alter the model.
        note (`str`, *optional*, defaults to `""`): What differs from ours.
    """

    library: str
    quantity: str
    build: Callable[[Any], Run]
    note: str = ""

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.library}, {self.quantity}{self.note}"

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                import_module(self.library)
            except ImportError:
                return False
        return True

    def prepare(self, model: Any) -> Run:
        """Function that runs the peer on a copy of the model."""
        return self.build(copy.deepcopy(model).eval())


class _Logits(nn.Module):
    """ids (batch, time) -> logits (batch, time, classes), or with the classes before time."""

    def __init__(self, model: nn.Module, classes_last: bool):
        super().__init__()
        self.model, self.classes_last = model, classes_last

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits if self.classes_last else logits.mT


def _split(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"]
    return ids[:, :-1], ids[:, 1:]


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def _add(total: Found, key: str, value: Tensor) -> None:
    total[key] = total[key] + value if key in total else value


def _opacus(model: Any) -> Run:
    opacus: Any = import_module("opacus")
    parameters: dict[str, Any] = dict(AdapterState(model, warn_excluded=False).parameters())
    wrapped = opacus.GradSampleModule(_Logits(model, True), loss_reduction="sum").train()  # records in this mode only

    def run(batches: Batches) -> Found:
        total: Found = {}
        for batch in batches:
            inputs, targets = _split(batch)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of hooks on inputs without a gradient
                _loss(wrapped(inputs), targets).backward()
            for key, p in parameters.items():
                _add(total, key, p.grad_sample.square().sum(0))
                p.grad = p.grad_sample = None
        return total

    return run


def _posteriors(model: Any) -> Run:
    diag_fisher: Any = import_module("posteriors.laplace.diag_fisher")
    model.get_base_model().set_attn_implementation("eager")  # torch.func cannot look into the fused kernel
    state = AdapterState(model, warn_excluded=False).parameters()
    names = {id(p): name for name, p in model.named_parameters()}

    def log_likelihood(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ids, targets = data
        output = torch.func.functional_call(model, parameters, kwargs={"input_ids": ids, "use_cache": False})
        log_p = output.logits.float().log_softmax(-1)
        return log_p.gather(-1, targets[..., None]).sum((1, 2)), torch.tensor([])  # one value per sequence

    transform = diag_fisher.build(log_likelihood, per_sample=True)
    start = transform.init({names[id(p)]: p.detach() for p in state.values()})

    def run(batches: Batches) -> Found:
        fitted = start
        for batch in batches:
            fitted, _ = transform.update(fitted, _split(batch))
        return {key: fitted.prec_diag[names[id(p)]] for key, p in state.items()}

    return run


def _module(key: str, state: AdapterState) -> str:
    return f"{key.removesuffix('.weight')}.{state.adapter_name}"


def _curvlinops(model: Any) -> Run:
    curvlinops: Any = import_module("curvlinops")
    state = AdapterState(model, warn_excluded=False)
    parameters = list(state.parameters().values())

    def run(batches: Batches) -> Found:
        data = [_split(batch) for batch in batches]
        operator = curvlinops.KFACLinearOperator(
            _Logits(model, False), nn.CrossEntropyLoss(reduction="sum"), parameters, data, fisher_type="empirical",
            kfac_approx="expand", check_deterministic=False, num_data=sum(len(inputs) for inputs, _ in data),
            num_per_example_loss_terms=data[0][1].shape[1],
        )  # fmt: skip
        operator.compute_kronecker_factors()
        count = sum(targets.numel() for _, targets in data)  # inputs are averaged, gradients summed
        names = {key: f"model.{_module(key, state)}" for key in state.parameters()}
        left, right = operator._gradient_covariances, operator._input_covariances
        return {key: (left[name], right[name] * count) for key, name in names.items()}

    return run


def _kronfluence(model: Any, strategy: str) -> Run:
    covariance: Any = import_module("kronfluence.factor.covariance")
    eigen: Any = import_module("kronfluence.factor.eigen")
    task_type: Any = import_module("kronfluence.task").Task
    state = AdapterState(model, warn_excluded=False)
    modules = {key: _module(key, state) for key in state.parameters()}

    class Sequences(task_type):
        def get_influence_tracked_modules(self) -> list[str]:
            return list(modules.values())

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return _loss(model(input_ids=batch["inputs"], use_cache=False).logits, batch["targets"])

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            raise NotImplementedError

    for p in model.parameters():  # it needs no gradient of the weights
        p.requires_grad_(False)
    task = Sequences()
    common: dict[str, Any] = {
        "model": import_module("kronfluence.module.utils").wrap_tracked_modules(model, task),
        "state": import_module("kronfluence.utils.state").State(cpu=not torch.cuda.is_available()),
        "task": task,
        "factor_args": import_module("kronfluence.arguments").FactorArguments(strategy, use_empirical_fisher=True),
        "disable_tqdm": True,
    }

    def run(batches: Batches) -> Found:
        loader: Any = [dict(zip(("inputs", "targets"), _split(batch), strict=True)) for batch in batches]
        if strategy == "diagonal":
            found = eigen.fit_lambda_matrices_with_loader(loader=loader, **common)[1]["lambda_matrix"]
            return {key: found[name] for key, name in modules.items()}
        found = covariance.fit_covariance_matrices_with_loader(loader=loader, **common)[1]
        left, right = found["gradient_covariance"], found["activation_covariance"]
        return {key: (left[name], right[name]) for key, name in modules.items()}

    return run


PEERS = (
    Peer("opacus", "diagonal", _opacus),
    Peer("kronfluence", "diagonal", lambda model: _kronfluence(model, "diagonal")),
    Peer("posteriors", "diagonal", _posteriors, " (eager attention)"),
    Peer("curvlinops", "kronecker", _curvlinops),
    Peer("kronfluence", "kronecker", lambda model: _kronfluence(model, "ekfac")),
)
