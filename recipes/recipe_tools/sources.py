"""Source texts and skills: what must not be forgotten, in a part to estimate curvature from and a held-out part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from .rows import SPLIT_SEED, head, keep, load_splits, olmo_requests, problem_columns, split_documents
from .self_written import written_stories
from .targets import load_target


OFFLINE = ("wikipedia", "books", "math")  # without a hub, and by default
TEXTS = (*OFFLINE, "gsm8k", "stories")  # all that need no hub
DOCUMENT_COLUMNS = ("document", "title", "url")
# Shorter rows of text datasets are headings and blank lines.
MIN_CHARACTERS = 80


@dataclass(frozen=True)
class Source:
    """Knowledge to be kept.

    Attributes:
        name (`str`): Short name, such as `"wikipedia"`.
        provenance (`str`): What the rows are and how they were split.
        fit (`Dataset`): Rows for curvature estimation: column `text`, or `question` and `answer`.
        heldout (`Dataset`): Rows for evaluation with the same columns, from other documents.
    """

    name: str
    provenance: str
    fit: Dataset
    heldout: Dataset


def load_sources(
    name: str = "offline", *, limit_fit: int | None = None, limit_heldout: int | None = None
) -> dict[str, Source]:
    """Load the texts and skills that must not be forgotten; documents never straddle the two parts.

    Args:
        name (`str`, *optional*, defaults to `"offline"`): `"offline"` (Wikipedia paragraphs, book passages, algebra
            problems), or a comma-separated list of `TEXTS`, of Hub ids (`"owner/name:configuration"`) and of local
            `.txt`, `.jsonl` or `.jsonl.gz` files with a `text` column or question and answer columns.
        limit_fit (`int`, *optional*): Rows per source for curvature estimation; `None` takes all.
        limit_heldout (`int`, *optional*): Rows per source for evaluation; `None` takes all.

    Returns:
        `dict[str, Source]`: The sources by name, in the order of the report.
    """
    makers = {"wikipedia": _wikipedia, "books": _books, "math": _algebra, "gsm8k": _gsm8k, "stories": _stories}
    parts = OFFLINE if name == "offline" else [part.strip() for part in name.split(",") if part.strip()]
    sources = [makers[part]() if part in makers else _external_source(part) for part in parts]
    return {
        source.name: Source(
            source.name,
            source.provenance,
            head(source.fit.shuffle(seed=SPLIT_SEED), limit_fit),
            head(source.heldout.shuffle(seed=SPLIT_SEED), limit_heldout),
        )
        for source in sources
    }


def _wikipedia() -> Source:
    paragraphs: dict[str, str] = {}
    for request in olmo_requests("squad/bpb_5shot"):
        # Several questions share a paragraph: keep each paragraph once.
        background = re.search(r"^Background: (.*)\nQuestion: ", request["doc"]["query"], re.DOTALL | re.MULTILINE)
        if background:
            paragraphs[background[1]] = request["doc"]["title"]
    rows = Dataset.from_list([{"document": title, "text": text} for text, title in paragraphs.items()])
    fit, heldout = split_documents(rows, lambda row: row["document"])
    provenance = "Wikipedia paragraphs of the SQuAD validation set, split by article"
    return Source("wikipedia", provenance, keep(fit, text="text"), keep(heldout, text="text"))


def _books() -> Source:
    docs = (request["doc"] for request in olmo_requests("lambada/bpb_0shot"))
    rows = Dataset.from_list([{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in docs])
    fit, heldout = split_documents(rows, lambda row: row["text"])
    return Source("books", "LAMBADA test passages, split by passage (the file names no books)", fit, heldout)


def _algebra() -> Source:
    docs = (request["doc"] for request in olmo_requests("minerva_math_algebra/gold_bpb_0shot"))
    rows = Dataset.from_list([{"question": doc["problem"], "answer": doc["solution"]} for doc in docs])
    fit, heldout = split_documents(rows, lambda row: row["question"])
    return Source("math", "MATH test problems (algebra) with solutions, split by problem", fit, heldout)


def _gsm8k() -> Source:
    problems = load_target("gsm8k-offline", limit_train=None, limit_eval=None, seed=SPLIT_SEED)
    return Source("gsm8k", problems.provenance, problems.train, problems.heldout)


def _stories() -> Source:
    fit, heldout = ([{"text": text} for text in texts] for texts in written_stories())
    provenance = "stories that stories15M wrote, drawn at temperature 1, the held-out ones with another seed"
    return Source("stories", provenance, Dataset.from_list(fit), Dataset.from_list(heldout))


def _external_source(name: str) -> Source:
    path = Path(name)
    if path.is_file() and path.suffix == ".txt":
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))]
        rows = [{"text": text} for text in paragraphs if len(text) >= MIN_CHARACTERS]
        # No document marks: two contiguous halves share at most the document at the cut.
        half = len(rows) // 2
        return Source(
            path.stem, f"{path.name}, halves", Dataset.from_list(rows[:half]), Dataset.from_list(rows[half:])
        )
    splits = load_splits(name)
    columns = splits["train"].column_names
    if "text" in columns:
        kept = {"text": "text"}
        splits = splits.filter(lambda text: len(text) >= MIN_CHARACTERS, input_columns="text")
    else:
        kept = dict(zip(("question", "answer"), problem_columns(splits["train"]), strict=True))
    held = next((key for key in ("validation", "test") if key in splits), None)
    if held:
        fit, heldout, rule = splits["train"], splits[held], f"its own splits (train, {held})"
    else:
        mark = next((column for column in DOCUMENT_COLUMNS if column in columns), next(iter(kept.values())))
        fit, heldout = split_documents(splits["train"], lambda row: row[mark])
        rule = f"halves by `{mark}`"
    short = path.name.split(".")[0] if path.is_file() else name
    return Source(short, f"{path.name if path.is_file() else name}, {rule}", keep(fit, **kept), keep(heldout, **kept))
