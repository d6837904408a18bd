"""The run of one task of a [`ContinualLearner`]: find the mode, take the curvature there, measure."""

from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..adapters import AdapterState
from ..belief import Belief, BeliefError
from ..curvature import estimate_curvature
from ..distributed import from_first
from ..filtering import TaskRecord, Transition, absolute, increment_of, update
from ..lineage import LINEAGE, join_lineages
from ..trainer import KalmanTrainer
from .checks import check_trained
from .evaluation import evaluate
from .files import discard, fill, read_adapter, read_json, save_adapter, write_json
from .history import History
from .options import own_callbacks, plain_arguments, task_arguments
from .store import Entry
from .task import TaskTrainer, WholeCheckpoints, last_checkpoint, let_go


logger = logging.get_logger(__name__)

MODE, MODE_FILE = "mode", "mode.json"  # where training leaves the adapter
_BEGUN = "data.json"  # says with what data work was begun


class TaskRuns(History):
    """Trains, measures and evaluates for a [`ContinualLearner`], whose attributes these are."""

    model: Any
    args: Any
    state: AdapterState
    structure: str
    strength: float
    curvature_samples: int
    eval_datasets: dict[str, Any]
    trainer_options: dict[str, Any]

    def _train(
        self, name: str, work: Path, index: int, predicted: Belief, data: Any, mark: str, figures: Any, alarm: Any
    ) -> Entry:
        """Find the mode, from the last whole checkpoint if there is one, and keep it in `work`; see `_mode`."""
        loko = self.args.uses_loko
        belief = None if loko and index == 0 else predicted  # LoKO begins with a prior of its own
        args = task_arguments(self.args, work, index, in_order=alarm is not None)
        options = own_callbacks(self.trainer_options)
        options["callbacks"] = [*(options.get("callbacks") or []), WholeCheckpoints(), *([alarm] if alarm else [])]
        trainer = TaskTrainer(
            self.model, args, train_dataset=data, eval_dataset=self._eval_in_training(args), belief=belief,
            strength=self.strength, figures=figures, **options,
        )  # fmt: skip
        num_labels = trainer.num_labels
        checkpoint = last_checkpoint(work)
        if checkpoint is None:
            self._mark(work, mark)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        found = trainer.filter_belief() if loko else None
        let_go(trainer)
        self._refuse_diverged(name, work)
        if found is not None:
            num_labels = found.info["num_labels"]
        record = {"data": mark, "num_labels": num_labels, "rows": trainer.rows_seen()}

        def write(folder: Path) -> None:
            adapter = save_adapter(self.model, folder)
            if found is not None:
                found.save_pretrained(folder)
            write_json(folder / MODE_FILE, record | {"adapter": adapter})

        fill(work / MODE, write)
        return from_first(lambda: read_json(work / MODE / MODE_FILE))

    def _refuse_diverged(self, name: str, work: Path) -> None:
        from peft import get_peft_model_state_dict

        try:
            tensors = get_peft_model_state_dict(self.model, adapter_name=self.state.adapter_name)
            check_trained(tensors, name, self.args.device)
        except FloatingPointError:
            from_first(lambda: discard(work))  # its checkpoints lead there again
            raise

    def _update(
        self, name: str, predicted: Belief, transition: Transition, data: Any, found: Any, work: Path, index: int,
        lineage: Entry,
    ) -> TaskRecord:  # fmt: skip
        """The filtered belief at the mode, and what the smoother needs of this task."""
        info: dict[str, Any] = {"num_labels": found["num_labels"]}
        increment = None
        if self.args.uses_loko:
            before = predicted if index else None
            belief = absolute(Belief.from_pretrained(work / MODE), predicted=before)
        else:
            args, seed = plain_arguments(self.args, work), self.args.seed + index
            trainer = TaskTrainer(
                self.model, args, train_dataset=data, belief=predicted, **own_callbacks(self.trainer_options)
            )
            options = args.curvature_options() | {"structure": self.structure, "space": "adapter"}
            loader = trainer.sample_loader(self.curvature_samples, seed)
            precision, info["curvature"] = estimate_curvature(
                self.model, loader, **options, seed=seed, progress_bar=not args.disable_tqdm
            )
            increment = increment_of(predicted, precision, found["num_labels"])
            belief = update(predicted, self.state.snapshot(), precision, found["num_labels"], rank=self.rank)
        past = join_lineages(predicted.info, [lineage])
        belief = Belief(belief.mean, belief.precision, belief.info | {LINEAGE: past})
        return TaskRecord(name, belief, transition, increment, info)

    # -- files -----------------------------------------------------------------------------------------------------

    def _mode(self, work: Path, mark: str) -> Entry | None:
        """What training has left, if it is done; what was begun with other data, or is damaged, is thrown away.

        Args:
            work (`Path`): Of the task.
            mark (`str`): Fingerprint of its data.

        Returns:
            `dict`, *optional*: "num_labels", "rows" that were seen, and the fingerprint of the "adapter".
        """

        def look() -> Entry | None:
            if not work.exists():
                return None
            if not work.is_dir():
                raise BeliefError(f"{work} is a file, where the task's work belongs; remove it.")
            if (work / _BEGUN).exists():  # else a kill before anything was begun, or while it was thrown away
                try:
                    if read_json(work / _BEGUN, "data")["data"] == mark:
                        return self._whole_mode(work)
                    logger.warning(f"{work} was begun with other data; it is begun anew.")
                except BeliefError as error:
                    logger.warning(f"{error} The task is begun anew.")
            discard(work)
            return None

        return from_first(look)

    def _whole_mode(self, work: Path) -> Entry | None:
        """Its record, if nothing is missing of it; the first process calls."""
        folder = work / MODE
        if not folder.exists():
            return None
        try:
            found = read_json(folder / MODE_FILE, "num_labels", "rows", "adapter")
            read_adapter(folder, found["adapter"])
            if self.args.uses_loko:
                Belief.from_pretrained(folder)
            return found
        except (BeliefError, FileNotFoundError) as error:
            logger.warning(f"Training is repeated from the last checkpoint, or the start: {error}")
            if folder.is_dir():
                discard(folder)
            else:
                folder.unlink()
            return None

    def _mark(self, work: Path, mark: str) -> None:
        def write() -> None:
            work.mkdir(parents=True, exist_ok=True)
            write_json(work / _BEGUN, {"data": mark})

        from_first(write)

    def _evaluate(self, folder: Path) -> dict[str, dict[str, float]]:
        args = plain_arguments(self.args, folder)
        found = {}
        for name, data in self.eval_datasets.items():
            trainer = KalmanTrainer(self.model, args, **own_callbacks(self.trainer_options))
            found[name] = evaluate(trainer, data)
            let_go(trainer)
        return found

    def _eval_in_training(self, args: Any) -> Any:
        return self.eval_datasets if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" else None
