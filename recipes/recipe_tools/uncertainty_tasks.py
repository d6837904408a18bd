"""Tasks on which predicted uncertainty is judged: rows to train, to fit a scale and to test on, and others' rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ViTForImageClassification,
)

from .choices import load_choices
from .images import Images, load_images, shift
from .labelled import TEXT_TASKS, encode_labelled, load_labelled
from .models import load_base, load_tokenizer
from .offline import minilm_checkpoint
from .rows import from_hub
from .vit import Pretraining, normalise, pretrained_vit


IMAGE_TASKS = ("digits", "mnist", "fashion")
CHOICE_TASKS = ("arc_easy", "arc_challenge", "hellaswag", "winogrande")
TURNED, FURTHER = (0.0, 45.0), (60.0, 90.0)  # degrees by which images are turned: the task's, and a shift
LETTERS = "ABCD"


@dataclass(frozen=True)
class Sizes:
    """Rows of each part.

    Attributes:
        train (`int`): To train adapters on.
        validation (`int`): To choose a prior precision and to fit a scale on.
        test (`int`): To judge on.
        outside (`int`): Of another kind, at most.
    """

    train: int
    validation: int
    test: int
    outside: int


@dataclass
class Problem:
    """A task with its model.

    Attributes:
        provenance (`dict[str, str]`): What the data are.
        parts (`dict[str, list]`): Samples of "train", "validation" and "test".
        shifted (`dict[str, list]`): Labelled samples of the task under a shift, by name.
        outside (`dict[str, list]`): Samples of another kind, whose labels mean nothing, by name.
        collate (`Callable`): Samples to a batch with `labels` as the model takes them, and for multiple choice
            `choice`, the index of the answer.
        model (`Callable`): The model without adapter; what is new in it comes from torch's generator.
        targets (`list[str]`): Layers to adapt, as far as the model has them; its head is another.
        select (`dict[str, Any]`): `positions` and `entries` of the logits that are judged.
    """

    provenance: dict[str, str]
    parts: dict[str, list[Any]]
    collate: Callable[[list[Any]], Any]
    model: Callable[[], Any]
    targets: list[str]
    shifted: dict[str, list[Any]] = field(default_factory=dict)
    outside: dict[str, list[Any]] = field(default_factory=dict)
    select: dict[str, Any] = field(default_factory=dict)

    def batches(self, samples: Sequence[Any], size: int) -> list[dict[str, Tensor]]:
        """Batches in order, as the model takes them and with their `choice`."""
        return [dict(self.collate(list(samples[i : i + size]))) for i in range(0, len(samples), size)]


def answers(batch: Mapping[str, Tensor]) -> Tensor:
    """The right class of each row."""
    return batch["choice"] if "choice" in batch else batch["labels"]


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch without the index of the answer, which is no input of a model."""
    return {key: value for key, value in batch.items() if key != "choice"}


def text_problem(
    task: str, model: str, data: str, outside: tuple[str, str], sizes: Sizes, max_length: int, seed: int
) -> Problem:
    """Sentences for an encoder with a new head; outside: the sentences of another task.

    Args:
        task (`str`): A key of `TEXT_TASKS`.
        model (`str`): "minilm", a Hub id or a path.
        data (`str`): See [`load_labelled`].
        outside (`tuple[str, str]`): Another task and its data; of pairs the first sentence is taken.
        sizes (`Sizes`): Rows of each part.
        max_length (`int`): Tokens per row.
        seed (`int`): Of the parts.

    Returns:
        `Problem`: See there.

    Raises:
        ValueError: There are too few rows.
    """
    path = str(minilm_checkpoint() if model == "minilm" else model)
    with from_hub(f"--model {model}", "Give a folder with a model and its tokenizer, or 'minilm'."):
        tokenizer = AutoTokenizer.from_pretrained(path)
    rows, provenance = load_labelled(task, data)
    other, other_provenance = load_labelled(*outside)
    if "pair" in other.column_names and "pair" not in rows.column_names:
        other = other.remove_columns("pair")
    classes = len(TEXT_TASKS[task].labels)

    def encode(part: Dataset) -> list[dict[str, Any]]:
        return encode_labelled(part, tokenizer, max_length)

    def encoder() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=classes, dtype=torch.float32, ignore_mismatched_sizes=True
        )

    spans = _spans(len(rows), sizes, provenance)
    rows, other = rows.shuffle(seed=seed), other.shuffle(seed=seed)
    return Problem(
        {task: provenance, outside[0]: other_provenance},
        {name: encode(rows.select(range(*span))) for name, span in spans.items()},
        DataCollatorWithPadding(tokenizer),
        encoder,
        ["query", "value", "q_proj", "v_proj"],
        outside={outside[0]: encode(other.select(range(min(sizes.outside, len(other)))))},
    )


def image_problem(
    task: str, source: str, outside: tuple[str, str] | None, sizes: Sizes, how: Pretraining, seed: int
) -> Problem:
    """Turned images for a ViT that was trained on upright ones; shifted: turned further; outside: other images.

    Args:
        task (`str`): Of `IMAGE_TASKS`.
        source (`str`): See [`load_images`].
        outside (`tuple[str, str]`, *optional*): Other images and their source; the task's negatives by default.
        sizes (`Sizes`): Rows of each part.
        how (`Pretraining`): Of the ViT.
        seed (`int`): Of parts and angles.

    Returns:
        `Problem`: See there.

    Raises:
        ValueError: There are too few images, or the others are of another size.
    """
    pretrain, images, provenance = load_images(task, source)
    path = pretrained_vit(task, pretrain, how)
    generator = torch.Generator().manual_seed(seed)
    spans = _spans(len(images.labels), sizes, provenance)
    images = images.select(torch.randperm(len(images.labels), generator=generator))
    turned = Images(shift(images.pixels, TURNED, 0.0, generator), images.labels)
    parts = {name: turned.select(torch.arange(*span)) for name, span in spans.items()}
    test = images.select(torch.arange(*spans["test"]))
    further = Images(shift(test.pixels, FURTHER, 0.0, generator), test.labels)
    if outside is None:
        name, other, other_provenance = "negatives", Images(1 - parts["test"].pixels, test.labels), provenance
    else:
        name, (_, other, other_provenance) = outside[0], load_images(*outside)
        if other.pixels.shape[1:] != images.pixels.shape[1:]:
            raise ValueError(
                f"--outside {name}: images of {tuple(other.pixels.shape[1:])}, but {task}'s are of "
                f"{tuple(images.pixels.shape[1:])}."
            )
        other = other.select(torch.randperm(len(other.labels), generator=generator))
    other = other.select(torch.arange(min(sizes.outside, len(other.labels))))
    return Problem(
        {task: provenance, name: other_provenance},
        {name: _image_rows(part) for name, part in parts.items()},
        lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]},
        lambda: ViTForImageClassification.from_pretrained(path),
        ["query", "value", "q_proj", "v_proj"],
        shifted={f"turned by {FURTHER[0]:g} to {FURTHER[1]:g} degrees": _image_rows(further)},
        outside={name: _image_rows(other)},
    )


def choice_problem(task: str, model: str, outside: str, sizes: Sizes, max_length: int, seed: int) -> Problem:
    """Questions with lettered answers for a causal language model, judged at the last token among the letters.

    Args:
        task (`str`): See [`load_choices`]; its rows are split.
        model (`str`): See [`recipe_tools.models`].
        outside (`str`): Another one, whose questions are of another kind.
        sizes (`Sizes`): Rows of each part.
        max_length (`int`): Tokens per row, of which the last are kept.
        seed (`int`): Of the parts.

    Returns:
        `Problem`: Rows with as many answers as most have; of other questions at most so many are listed.

    Raises:
        ValueError: There are too few rows, or a letter is more than one token.
    """
    tokenizer = load_tokenizer(model)
    rows, other = (load_choices(name).shuffle(seed=seed) for name in (task, outside))
    sizes_of = Counter(len(row["continuations"]) for row in rows.to_list())
    count = min(sizes_of.most_common(1)[0][0], len(LETTERS))
    rows = rows.filter(lambda row: len(row["continuations"]) == count)
    letters = LETTERS[:count]
    coded = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in letters]
    if any(len(ids) != 1 for ids in coded):
        raise ValueError(f"--model {model}: its tokenizer splits the letters {letters}, which must be one token each.")
    entries = [ids[0] for ids in coded]

    def encode(row: Any) -> dict[str, Any]:
        listed = zip(letters, row["continuations"], strict=False)
        context = row["contexts"][0].removesuffix("\nAnswer:")
        text = context + "".join(f"\n{letter}.{answer}" for letter, answer in listed) + "\nAnswer:"
        answer = min(row["label"], count - 1)
        return {"ids": tokenizer(text)["input_ids"][-max_length:], "choice": answer}

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The letter of the answer is appended as a label, but masked: the last attended token is the prompt's."""
        width = max(len(sample["ids"]) for sample in samples)
        shape = (len(samples), width + 1)
        ids = torch.full(shape, int(tokenizer.pad_token_id))
        mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, sample in enumerate(samples):
            tokens = torch.tensor(sample["ids"])
            ids[row, width - len(tokens) : width], mask[row, width - len(tokens) : width] = tokens, 1
            ids[row, width] = labels[row, width] = entries[sample["choice"]]
        choice = torch.tensor([sample["choice"] for sample in samples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "choice": choice}

    spans = _spans(len(rows), sizes, task)
    return Problem(
        {task: f"{task}, validation rows, {len(rows)} with {count} answers", outside: f"{outside}, validation rows"},
        {name: [encode(row) for row in rows.select(range(*span))] for name, span in spans.items()},
        collate,
        lambda: load_base(model, torch.float32),
        ["q_proj", "v_proj"],
        outside={outside: [encode(row) for row in other.select(range(min(sizes.outside, len(other))))]},
        select={"positions": "last", "entries": entries},
    )


def _image_rows(images: Images) -> list[dict[str, Tensor]]:
    return [{"pixel_values": p, "labels": y} for p, y in zip(normalise(images.pixels), images.labels, strict=True)]


def _spans(rows: int, sizes: Sizes, provenance: str) -> dict[str, tuple[int, int]]:
    needed = sizes.train + sizes.validation + sizes.test
    if rows < needed:
        raise ValueError(
            f"--train, --validation and --test need {needed} rows, there are {rows} ({provenance}); ask for fewer."
        )
    first, second = sizes.train, sizes.train + sizes.validation
    return {"train": (0, first), "validation": (first, second), "test": (second, needed)}
