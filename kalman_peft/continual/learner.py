"""ContinualLearner: task after task, predict, train, update, and keep what that leaves. No mathematics."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from transformers.utils import logging

from ..adapters import AdapterState
from ..belief import Belief
from ..callbacks import DriftCallback
from ..distributed import broadcast_, from_first
from ..filtering import (
    Transition,
    belief_figures,
    initial_belief,
    predict,
    transition_figures,
)
from ..lineage import lineage_entry
from ..trainer import with_adapter
from .checks import check_dataset, check_evaluation, check_filter, check_motion, fingerprint
from .files import ADAPTER, ADAPTER_CONFIG, fill, link, load_adapter, read_json, save_adapter, with_remedy, write_json
from .options import (
    carried_over,
    check_arguments,
    check_numbers,
    decisive_arguments,
    of_model,
    of_motion,
    structure_of,
)
from .runs import MODE, TaskRuns
from .sharing import fetch, saved_in_full
from .store import START_FILE, TASK_FILE, Entry, check_name, check_task, folder_name


logger = logging.get_logger(__name__)


class ContinualLearner(TaskRuns):
    """Learns task after task with a Gaussian filter over the adapter's weights.

    ```python
    learner = ContinualLearner(model, KalmanConfig("out", learning_rate=1e-3), process_noise=1e-6,
                               data_collator=collator, processing_class=tokenizer)
    for name, data in tasks.items():
        learner.learn(name, data)      # at once, if out/ says that it is done
    learner.smooth()                   # out/smoothed/<name>/: adapters that plain PEFT loads
    print(learner.metrics())
    ```

    For each task the belief is predicted; the adapter trained on mean loss + strength / (2 N) (theta - m)^T Lambda
    (theta - m), N the task's labels, with any optimizer; and the belief updated by the curvature at the mode that was
    found (Low-Rank Filtering and Smoothing, arXiv:2410.06800). With `optimizer="loko"` the optimizer is the filter,
    and its own belief is carried over.

    What is done lies in `args.output_dir`. After a kill at any point the same script goes on, and ends where it would
    have ended. Several processes (DistributedDataParallel) share the folder; the first one writes.

    Args:
        model (`PeftModel`): With one LoRA adapter, or a plain model with `peft_config`. Weights outside the adapter's
            factors (`modules_to_save`) are trained and kept with each task, but not filtered.
        args (`KalmanConfig`): Of the run of every task; task t has the seed `seed` + t.
        structure (`str`, *optional*): Of the state: "diagonal", "low_rank" (default), "ekfac" or "dense"; with LoKO
            that of its memory.
        rank (`int`, *optional*): Columns of a state of structure "low_rank"; `args.laplace_rank` by default.
        prior_precision (`float` or `Mapping[str, float]`, *optional*): See [`initial_belief`]; 1.0 by default. LoKO
            has a prior of its own.
        process_noise (`float` or `Mapping`, *optional*, defaults to 0.0): Between tasks, see [`Transition`].
        decay (`float`, *optional*, defaults to 1.0): Between tasks, see [`Transition`].
        strength (`float`, *optional*, defaults to 1.0): Factor on the penalty; 1 is the filter's. Not with LoKO.
        curvature_samples (`int`, *optional*, defaults to 256): Sequences of a task from which its curvature is taken,
            by `args.laplace_fisher` and the like.
        eval_datasets (`Mapping[str, Dataset]`, *optional*): By task; all are measured before the first task and after
            each, which forward transfer needs.
        metric (`str`, *optional*): Of the evaluation; by default "eval_accuracy" if `compute_metrics` gives it, else
            "eval_loss". Names that end in "loss" count the other way.
        peft_config (`LoraConfig`, *optional*): Adapter to put on a plain model.
        **trainer_options: For [`KalmanTrainer`]: `data_collator`, `processing_class`, `compute_metrics`, `callbacks`
            (copied for each task), `observation` and so on.

    Raises:
        TypeError: `args` is no KalmanConfig, or an argument of another kind than above.
        ValueError: An option that the learner sets itself, that does not fit the adapter, or that its folder was begun
            with another value of.
        BeliefError: The folder is of another adapter or base model, or a file in it is damaged or missing.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        structure: str | None = None,
        rank: int | None = None,
        prior_precision: float | Mapping[str, float] | None = None,
        process_noise: Any = 0.0,
        decay: float = 1.0,
        strength: float = 1.0,
        curvature_samples: int = 256,
        eval_datasets: Mapping[str, Any] | None = None,
        metric: str | None = None,
        peft_config: Any = None,
        **trainer_options: Any,
    ):
        check_arguments(args, trainer_options)
        super().__init__(Path(args.output_dir), metric)
        self.transition = check_motion(process_noise, decay)
        self.structure = structure_of(args, structure)
        check_numbers(args, strength, prior_precision, rank, self.structure, curvature_samples)
        self.rank = (args.laplace_rank if rank is None else rank) if self.structure == "low_rank" else None
        self.prior_precision = 1.0 if prior_precision is None else prior_precision
        self.strength, self.curvature_samples = strength, curvature_samples
        self.args, self.trainer_options = args, trainer_options
        self.eval_datasets = check_evaluation(eval_datasets)
        self.model = model if peft_config is None else with_adapter(model, peft_config, args.seed)
        self.state = AdapterState(self.model)
        if args.uses_loko and self.state.excluded:
            raise ValueError(
                f"optimizer='loko' carries over no belief on {sorted(self.state.excluded)[:2]}, which are outside the "
                "adapter's factors; train LoRA factors only (`target_modules`, no `modules_to_save`)."
            )
        check_filter(self.state, self.prior_precision, self.structure, self.transition)
        _ = args.device  # starts the process group, if the launcher made several processes
        self.store.open(self._options(), self.transition.describe()[1])
        if self.store.start is not None:
            self.start().check(self.model)
            load_adapter(self.model, *self.store.last())

    # -- learning --------------------------------------------------------------------------------------------------

    def learn(self, name: str, train_dataset: Any, eval_dataset: Any = None) -> Entry:
        """Learn one task; if the folder has it already, only see that its data are the same.

        Args:
            name (`str`): Of the task, and of its folder.
            train_dataset (`Dataset`): Prepared as for the Trainer; not streaming.
            eval_dataset (`Dataset`, *optional*): Measured after this and all later tasks.

        Returns:
            `dict`: See `tasks`.

        Raises:
            TypeError: No dataset.
            ValueError: No name for a folder, no data, no labels, or other data than when the task was learnt.
            FloatingPointError: The adapter holds NaN or Inf after training.
        """
        check_name(name)
        mark = fingerprint(name, train_dataset, "train_dataset")
        if eval_dataset is not None:
            check_dataset("eval_dataset", eval_dataset)
            self.eval_datasets.setdefault(name, eval_dataset)
        for entry in self.store.entries:
            if entry["name"] == name:
                if entry["data"] != mark:
                    raise ValueError(
                        f"Task {name!r} was learnt from other data ({entry['data']}, now {mark}). Give the same data, "
                        "or the task another name."
                    )
                return dict(entry)
        return self._learn(name, train_dataset, mark)

    def learn_stream(self, name: str, stream: Any, detect: DriftCallback | None = None) -> list[Entry]:
        """Learn a stream whose tasks are not marked: a task ends where LoKO's innovation raises an alarm.

        The stream is read once, in its order. The alarm comes up to `window` steps after the shift; these steps count
        for the task before.

        Args:
            name (`str`): The tasks are called `name`-0, `name`-1, ...
            stream (`Dataset`): All of it; not streaming.
            detect (`DriftCallback`, *optional*): Its options; a new one watches each task. Default
                `DriftCallback(action="stop")`.

        Returns:
            `list[dict]`: The tasks found, see `tasks`; "rows" are their first row and the one after their last.

        Raises:
            ValueError: Another optimizer, an alarm that does not stop, no data, or other data than before.
        """
        check_name(f"{name}-0")
        options = (detect or DriftCallback(action="stop")).state()["args"]
        if not self.args.uses_loko:
            raise ValueError("learn_stream watches LoKO's innovation; set KalmanConfig(optimizer='loko').")
        if options["action"] != "stop":
            raise ValueError(f"detect has action={options['action']!r}; a task's end needs action='stop'.")
        if self.args.dataloader_drop_last:
            raise ValueError("dataloader_drop_last=True would leave the end of a stream unread; set it to False.")
        mark = fingerprint(name, stream, "stream")
        while True:
            found = [entry for entry in self.store.entries if entry.get("stream") == name]
            if any(entry["data"] != mark for entry in found):
                raise ValueError(f"Stream {name!r} was learnt from other data ({found[0]['data']}, now {mark}).")
            if any(entry["detect"] != options for entry in found):
                raise ValueError(f"Stream {name!r} was begun with other options of detect: {found[0]['detect']}.")
            start = found[-1]["rows"][1] if found else 0
            if start >= len(stream):
                return [dict(entry) for entry in found]
            rest = _rows(stream, start, len(stream))
            self._learn(f"{name}-{len(found)}", rest, mark, (name, start), DriftCallback(**options))

    def _learn(
        self,
        name: str,
        data: Any,
        mark: str,
        stream: tuple[str, int] | None = None,
        alarm: DriftCallback | None = None,
    ) -> Entry:
        if any(entry["name"] == name for entry in self.store.entries):
            raise ValueError(f"There is a task {name!r} already; give this one another name.")
        with self.store.locked():
            return self._learn_alone(name, data, mark, stream, alarm)

    def _learn_alone(
        self, name: str, data: Any, mark: str, stream: tuple[str, int] | None, alarm: DriftCallback | None
    ) -> Entry:
        self._begin()
        index = len(self.store.entries)
        work = self.store.work(index, name)
        before, start = self._belief(index - 1), self.start(self.args.device)
        transition = self.transition if index else Transition()
        predicted = predict(before, transition, start.mean)
        figures = transition_figures(before, predicted)
        logger.info(f"Task {name!r}: stability {figures['stability']:.4g}, plasticity {figures['plasticity']:.4g}.")
        load_adapter(self.model, *self.store.last())
        self.state.load(predicted.mean)
        found = self._mode(work, mark)
        if found is None:
            found = self._train(name, work, index, predicted, data, mark, figures, alarm)
        load_adapter(self.model, work / MODE, found["adapter"])
        if stream is not None:
            seen = min(found["rows"], len(data))
            data = _rows(data, 0, seen)
        lineage = lineage_entry(
            name, data, start.info.get("adapter", {}), num_labels=found["num_labels"], num_sequences=len(data)
        )
        record = self._update(name, predicted, transition, data, found, work, index, lineage)
        entry = {
            "name": name, "index": index, "folder": folder_name(index, name), "data": mark,
            "num_labels": found["num_labels"], "seed": self.args.seed + index,
            "figures": figures | belief_figures(record.belief), "scores": self._evaluate(work),
            "increment": record.increment is not None, "adapter": found["adapter"], "previous": self.store.chain,
            "chain": link(self.store.chain, name, mark, found["adapter"], record.belief.fingerprint()),
        }  # fmt: skip
        if stream is not None:
            entry |= {"stream": stream[0], "rows": [stream[1], stream[1] + len(data)]}
            entry["detect"] = alarm.state()["args"] if alarm is not None else None

        def write(folder: Path) -> None:
            for name in (ADAPTER, ADAPTER_CONFIG):
                shutil.copy(work / MODE / name, folder / name)
            record.save_pretrained(folder)
            write_json(folder / TASK_FILE, entry)
            check_task(folder)

        fill(self.store.folder / "tasks" / entry["folder"], write)
        return dict(self.store.add(entry))

    @classmethod
    def from_pretrained(
        cls, pretrained: Any, model: Any, args: Any, *, revision: str | None = None, token: Any = None, **options: Any
    ) -> Self:
        """Go on from a learner's folder, or from a repository that one was pushed to, in `args.output_dir`.

        Args:
            pretrained (`str` or `os.PathLike`): Folder or repository id.
            model (`PreTrainedModel` or `PeftModel`): The base model, or with an adapter of the same shape.
            args (`KalmanConfig`): Of the runs to come; its `output_dir` gets a copy, and may hold an earlier one.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*): For private repositories.
            **options: As for the constructor. Structure, rank and prior are those of the learner that is gone on from,
                as are process noise and decay unless they are given anew.

        Returns:
            `ContinualLearner`: With all its tasks.

        Raises:
            FileNotFoundError: There is no learner in that place.
            HubError: See [`Belief.from_pretrained`].
            ValueError: `args.output_dir` holds a learner that was not begun from this one, or an option cannot change.
        """
        folder = Path(args.output_dir)
        check_arguments(args, options)
        _ = args.device  # see the constructor
        kept, motion = fetch(pretrained, folder, revision=revision, token=token)
        options = carried_over(args, kept, motion, options)
        from peft import PeftModel

        if not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(
                model, str(folder / "initial"), is_trainable=True,
                autocast_adapter_dtype=saved_in_full(folder / "initial"),
            )  # fmt: skip
        return cls(model, args, **options)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Once: keep the start, and measure it."""
        if self.store.start is not None:
            return
        broadcast_(self.state.tensors().values())
        belief = initial_belief(self.state, self.prior_precision, self.structure)
        scores = self._evaluate(self.store.folder / "work")

        def write(folder: Path) -> None:
            adapter = save_adapter(self.model, folder)
            belief.save_pretrained(folder)
            chain = link(adapter, belief.fingerprint())
            write_json(folder / START_FILE, {"scores": scores, "adapter": adapter, "chain": chain})

        fill(self.store.initial, write)
        self.store.start = from_first(lambda: read_json(self.store.initial / START_FILE))

    def _belief(self, index: int) -> Belief:
        if index < 0:
            return self.start(self.args.device)
        read = with_remedy(lambda folder: Belief.from_pretrained(folder, device=self.args.device))
        return read(self.store.task(index))

    def _options(self) -> dict[str, Any]:
        return {
            "structure": self.structure, "rank": self.rank,
            "prior_precision": None if self.args.uses_loko else self.prior_precision,
            "strength": self.strength, "curvature_samples": self.curvature_samples, **of_motion(self.transition),
            **decisive_arguments(self.args), **of_model(self.state),
        }  # fmt: skip


def _rows(data: Any, start: int, stop: int) -> Any:
    if hasattr(data, "select"):
        return data.select(range(start, stop))
    return torch.utils.data.Subset(data, range(start, stop))
