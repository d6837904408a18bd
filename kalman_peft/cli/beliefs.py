"""`kalman-peft curvature`, `smooth` and `merge`: beliefs from data, from tasks, from several parties."""

from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from ..belief import BELIEF_CONFIG, Belief
from ..config import KalmanArguments
from ..continual.files import ADAPTER, fill, write_moved_adapter
from ..continual.history import History
from ..filtering import merge_beliefs
from ..lineage import LINEAGE, fit_lineage
from ..sources import SINGLE
from .loading import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    TextOptions,
    collator,
    load_adapter,
    load_base,
    load_data,
    load_tokenizer,
    tokenized,
)
from .parsing import Command


_OF_CURVATURE = ("structure", "space", "fisher", "reduction", "rank", "num_samples", "dense_limit", "offload")

# The same fields as in the trainer's arguments, so that there is one text and one default for each.
CurvatureOptions = make_dataclass(
    "CurvatureOptions",
    [
        (f.name, f.type, field(default=f.default, metadata=f.metadata))
        for f in fields(KalmanArguments)
        if f.name.removeprefix("laplace_") in _OF_CURVATURE
    ],
)
CurvatureOptions.__doc__ = "Which curvature."


@dataclass
class FitOptions(LoraOptions):
    """What is measured, and where it goes."""

    output_dir: str = field(default="belief", metadata={"help": "Where the adapter and its belief are written."})
    samples: int = field(default=64, metadata={"help": "Sequences of the data that are looked at, from the first."})
    batch_size: int = field(default=4, metadata={"help": "Sequences at a time."})
    seed: int = field(default=42, metadata={"help": "Of a new adapter, and of the labels that are drawn."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")


def fit(model: ModelOptions, data: DataOptions, options: FitOptions, text: TextOptions, curvature: Any) -> None:
    """Fit a belief over an adapter, and save both.

    Args:
        model (`ModelOptions`): The base model.
        data (`DataOptions`): What must not be forgotten.
        options (`FitOptions`): The adapter, and where it goes.
        text (`TextOptions`): How raw data become tokens.
        curvature (`CurvatureOptions`): Which curvature.
    """
    from accelerate import PartialState
    from torch.utils.data import DataLoader

    from ..trainer import with_adapter

    state = PartialState()
    tokenizer, base = load_tokenizer(model.model), load_base(model)
    rows = tokenized(load_data(data.dataset, data.split), tokenizer, text.max_length)
    rows = rows.select(range(min(options.samples, len(rows))))
    if options.adapter is None:
        peft_model = with_adapter(base, options.config(), options.seed)
    else:
        peft_model = load_adapter(base, options.adapter, trainable=True)
    peft_model.to(state.device)
    loader = DataLoader(
        rows.select_columns(["input_ids", "attention_mask", "labels"]),
        options.batch_size,
        collate_fn=collator(tokenizer),
    )
    chosen = {f.name.removeprefix("laplace_"): getattr(curvature, f.name) for f in fields(curvature)}
    belief = Belief.fit(peft_model, loader, seed=options.seed, **chosen)
    belief.info[LINEAGE] = fit_lineage(belief.info, {SINGLE: rows})
    if state.is_main_process:
        peft_model.save_pretrained(options.output_dir)
        belief.save_pretrained(options.output_dir)
        record = belief.info["curvature"]
        print(
            f"Wrote adapter and belief to {options.output_dir}: {record['structure']} in {record['space']} space, "
            f"from {record['num_sequences']} sequences, {record['num_tokens']} tokens."
        )


@dataclass
class SmoothOptions:
    """A learner's folder."""

    folder: str = field(metadata={"help": "Of a ContinualLearner (its output_dir)."})
    means_only: bool = field(
        default=False, metadata={"help": "Smooth the means alone, as tasks learnt with LoKO may need."}
    )


def smooth(options: SmoothOptions) -> None:
    """Smooth all tasks of a learner.

    Args:
        options (`SmoothOptions`): Its folder.
    """
    history = History.from_folder(options.folder)
    for name in history.smooth(covariance=not options.means_only):
        print(f"Wrote {history.store.smoothed(name)}.")


@dataclass
class MergeOptions:
    """Whose beliefs."""

    beliefs: list[str] = field(metadata={"help": "Folders or names of the beliefs."})
    prior: str = field(metadata={"help": "Folder or name of the belief that they all started from."})
    output_dir: str = field(default="merged", metadata={"help": "Where the merged belief is written."})
    rank: int | None = field(default=None, metadata={"help": "Of the result, for structure 'low_rank'."})


def merge(options: MergeOptions) -> None:
    """Merge beliefs; where the first of them lies beside its adapter, also write the merged adapter.

    Args:
        options (`MergeOptions`): Whose, and where the result goes.

    Raises:
        ValueError: `output_dir` holds another belief already.
    """
    output = Path(options.output_dir)
    if (output / BELIEF_CONFIG).exists():
        raise ValueError(f"--output_dir {output} holds a belief already; give another folder.")
    beliefs = [Belief.from_pretrained(name) for name in options.beliefs]
    merged = merge_beliefs(beliefs, Belief.from_pretrained(options.prior), rank=options.rank)
    first = Path(options.beliefs[0])
    with_adapter = (first / ADAPTER).is_file()

    def write(folder: Path) -> None:
        if with_adapter:
            write_moved_adapter(first, folder, merged.mean, None)
        merged.save_pretrained(folder)

    fill(output, write)
    print(f"Wrote {'adapter and belief' if with_adapter else 'belief'} of {len(beliefs)} to {output}.")


COMMANDS = {
    "curvature": Command(
        fit,
        (ModelOptions, DataOptions, FitOptions, TextOptions, CurvatureOptions),
        """Fit a belief over an adapter from data, and save both in --output_dir.

examples:
  kalman-peft curvature --model HuggingFaceTB/SmolLM2-135M --dataset keep.jsonl --output_dir start
  kalman-peft curvature --model m --adapter out --dataset keep.jsonl --laplace_structure diagonal --output_dir kept
  kalman-peft train --model m --adapter start --belief start --dataset maths.jsonl --output_dir out
""",
        launches=True,
    ),
    "smooth": Command(
        smooth,
        (SmoothOptions,),
        """Smooth the beliefs of a ContinualLearner's folder over all its tasks, into FOLDER/smoothed/<task>.

examples:
  kalman-peft smooth out
  kalman-peft smooth out --means_only
""",
        first="folder",
    ),
    "merge": Command(
        merge,
        (MergeOptions,),
        """Merge beliefs of a filter (of a ContinualLearner's tasks) that several parties made from one prior.

examples:
  kalman-peft merge a/tasks/000-x b/tasks/000-y --prior a/initial --output_dir both
""",
        first="beliefs",
    ),
}
