"""Belief: mean and precision of the adapter's weights, with its files.

`belief.safetensors` holds the tensors, `belief_config.json` what they are over: base model, adapted layers, ranks,
structure, and how the curvature was taken. Loading checks all of it; writing is atomic.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import AdapterState
from .curvature.estimate import estimate_curvature, refuse_nonlinear_merge
from .distributed import broadcast_, world
from .lineage import describe
from .precision import Precision, precision_from_tensors


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

BELIEF_WEIGHTS = "belief.safetensors"
BELIEF_CONFIG = "belief_config.json"
_FORMAT = 1


class BeliefError(ValueError):
    """A belief's files are damaged or foreign, or it is over another adapter or base model."""


class Belief:
    """A Gaussian over the weights of one LoRA adapter: the Laplace approximation around `mean`.

    Args:
        mean (`Mapping[str, Tensor]`): One float32 tensor per adapter key, see [`AdapterState`].
        precision (`Precision`): Precision per observed token, in nats.
        info (`Mapping[str, Any]`, *optional*): Base model, adapter and provenance; JSON-serialisable.
        source (`Mapping[str, Tensor]`, *optional*):
            Source data that exist nowhere else, because the base model wrote them (see [`sample_source`]); kept on the
            CPU and saved with the belief.
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        precision: Precision,
        info: Mapping[str, Any] | None = None,
        source: Mapping[str, Tensor] | None = None,
    ):
        self.mean = dict(mean)
        self.precision = precision
        self.info = dict(info or {})
        self.source = {name: t.cpu() for name, t in (source or {}).items()}

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        dataloader: Iterable[Mapping[str, Tensor]],
        *,
        adapter_name: str | None = None,
        **options: Any,
    ) -> Self:
        """Laplace approximation at the adapter's present weights, from source data.

        In a process group all processes take part, and the first one's adapter weights are given to all.

        Args:
            model (`PeftModel`): Model with a LoRA adapter.
            dataloader (`Iterable`): Batches of source data with `labels`.
            adapter_name (`str`, *optional*): Defaults to the active adapter.
            **options: See [`estimate_curvature`].

        Returns:
            `Belief`: With `mean` a float32 copy of the adapter's weights.
        """
        state = AdapterState(model, adapter_name)
        broadcast_(state.tensors().values())
        precision, record = estimate_curvature(model, dataloader, adapter_name=state.adapter_name, **options)
        return cls(state.snapshot(), precision, {"adapter": describe(state), "curvature": record})

    # -- energy ----------------------------------------------------------------------------------------------------

    def energy_and_gradient(self, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """R = 1/2 (state - mean)^T precision (state - mean), in nats per token, and its gradient.

        Args:
            state (`Mapping[str, Tensor]`): Adapter weights by key, as from `AdapterState.parameters`.

        Returns:
            `tuple[Tensor, dict[str, Tensor]]`: A float32 scalar, and one tensor per key.
        """
        return self.precision.energy_and_gradient(state, self.mean)

    def energy(self, state: Mapping[str, Tensor]) -> Tensor:
        """R alone, see `energy_and_gradient`."""
        return self.precision.energy(state, self.mean)

    def proximal(self, state: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
        """Minimise step * R(x) + 1/2 ||x - state||^2.

        Args:
            state (`Mapping[str, Tensor]`): Adapter weights by key.
            step (`float`): Strength times learning rate, >= 0.

        Returns:
            `dict[str, Tensor]`: The minimiser, one tensor per covered key.

        Raises:
            ValueError: The precision's structure has no proximal form.
        """
        return self.precision.proximal(state, self.mean, step)

    def to(self, device: torch.device | str) -> Self:
        """The belief with all tensors on `device`."""
        mean = {k: m.to(device) for k, m in self.mean.items()}
        return type(self)(mean, self.precision.to(device), self.info, self.source)

    # -- fit with a model ------------------------------------------------------------------------------------------

    def check(self, model: nn.Module, adapter_name: str | None = None) -> AdapterState:
        """Make sure that this belief is over the model's adapter.

        Args:
            model (`PeftModel`): The model to be trained or measured.
            adapter_name (`str`, *optional*): Defaults to the active adapter.

        Returns:
            `AdapterState`: View of that adapter.

        Raises:
            BeliefError: Another set of layers, another rank or scaling, or another base model.
        """
        state = AdapterState(model, adapter_name, warn_excluded=False)
        parameters = state.parameters()
        if parameters.keys() != self.mean.keys():
            extra, missing = sorted(parameters.keys() - self.mean.keys()), sorted(self.mean.keys() - parameters.keys())
            raise BeliefError(
                "The belief is over other layers than this adapter: "
                + (f"it lacks {extra[:2]} ({len(extra)} in all). " if extra else "")
                + (f"It has {missing[:2]} ({len(missing)} in all) that the adapter lacks. " if missing else "")
                + "Use the `target_modules` it was made with, or fit a new one."
            )
        for key, p in parameters.items():
            if p.shape != self.mean[key].shape:
                raise BeliefError(
                    f"{key} has shape {tuple(p.shape)} in the adapter, {tuple(self.mean[key].shape)} in the belief; "
                    "use the rank `r` it was made with."
                )
        if self.precision.space == "delta_w":
            refuse_nonlinear_merge(state)
            expected = {pair.name: torch.Size((pair.b.shape[0], pair.a.shape[1])) for pair in state}
        else:
            expected = {key: p.shape for key, p in parameters.items()}
        covered = self.precision.coordinates()
        if covered != expected:
            differing = sorted(k for k in covered.keys() | expected.keys() if covered.get(k) != expected.get(k))
            raise BeliefError(
                f"The belief's precision does not cover the adapter: it differs at {differing[:2]} ({len(differing)} "
                "in all), which would be left unprotected. Fit a new one."
            )
        mine, theirs = self.info.get("adapter"), describe(state)
        if mine:
            changed = [n for n, s in theirs["scaling"].items() if abs(mine["scaling"].get(n, s) - s) > 1e-6 * s]
            if changed:
                raise BeliefError(
                    f"The belief was made with scaling {mine['scaling'][changed[0]]} at {changed[0]}, the adapter has "
                    f"{theirs['scaling'][changed[0]]}; use its `lora_alpha` and `use_rslora`."
                )
            a, b = mine["base_fingerprint"], theirs["base_fingerprint"]
            if a and b and a != b:
                raise BeliefError(
                    f"The belief was made on base model {mine['base_model']!r} (fingerprint {a[:12]}), but "
                    f"this model's base weights differ ({theirs['base_model']!r}, {b[:12]}). Load that base model, or "
                    "fit a new belief."
                )
        return state

    # -- files -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `belief.safetensors` and `belief_config.json`, each atomically.

        Args:
            save_directory (`str` or `os.PathLike`): Created if missing; the adapter's own folder is the usual place.

        Raises:
            BeliefError: The belief contains NaN or Inf.
        """
        tensors = self._tensors()
        bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
        if bad:
            raise BeliefError(f"The belief contains NaN or Inf ({bad[0]}) and is not written.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = tensors_fingerprint(tensors)
        config = {
            "format": _FORMAT,
            "structure": self.precision.structure,
            "space": self.precision.space,
            "fingerprint": fingerprint,
            **self.info,
        }
        text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
        # The weights carry the config too: whatever interrupts the two writes, the weights can be read.
        write_atomically(folder / BELIEF_WEIGHTS, lambda p: save_file(tensors, p, {"config": text}))
        write_atomically(folder / BELIEF_CONFIG, lambda p: p.write_text(text + "\n"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> "CommitInfo | None":
        """Upload the two files in one commit; the repository and the branch are created if missing.

        In a process group all may call; the first process pushes. Source data that the belief carries go with it.

        Args:
            repo_id (`str`): Usually the adapter's repository; its other files stay as they are.
            commit_message (`str`, *optional*, defaults to `"Upload belief"`): First line of the commit.
            commit_description (`str`, *optional*): Its further text.
            private (`bool`, *optional*): Of a repository that is created; one that exists stays as it is.
            token (`str` or `bool`, *optional*): With the right to write; by default what `hf auth login` stored.
            revision (`str`, *optional*): Branch; the main one by default.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request rather than commit.
            subfolder (`str`, *optional*): Folder inside the repository.

        Returns:
            `CommitInfo`: With `commit_url`, `oid` and `pr_url`; `None` on other processes than the first.

        Raises:
            HubError: The Hub refuses or cannot be reached.
            BeliefError: The belief contains NaN or Inf.
            ValueError: `create_pr` together with `revision`.
        """
        from .hub import push_belief

        return push_belief(
            self,
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            subfolder=subfolder,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | os.PathLike,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Read a belief from a folder or from a repository on the Hub.

        Args:
            pretrained (`str` or `os.PathLike`): Folder with the two files, or a repository id.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the tensors go.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*): For private repositories.
            subfolder (`str`, *optional*): Folder inside, as "last-checkpoint" of `hub_strategy="checkpoint"`.
            cache_dir (`str` or `os.PathLike`, *optional*): Where downloads are kept; the Hub's cache by default.
            force_download (`bool`, *optional*, defaults to `False`): Download again what the cache has.
            local_files_only (`bool`, *optional*, defaults to `False`): Use what the cache has, and no network.

        Returns:
            `Belief`: As saved.

        Raises:
            FileNotFoundError: The folder or the repository has no belief.
            HubError: No such repository or revision, no right to read it, or no way to reach the Hub.
            BeliefError: A file is truncated, of an unknown format, or does not belong to the other.
        """
        from .hub import resolve

        weights, config_file, downloaded = resolve(
            pretrained,
            revision=revision,
            token=token,
            subfolder=subfolder,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        try:
            return cls._read(weights, config_file, device)
        except BeliefError as error:
            if not downloaded:
                raise
            raise BeliefError(f"{error} Pass `force_download=True` in case the download went wrong.") from error

    @classmethod
    def _read(cls, weights: Path, config_file: Path, device: torch.device | str) -> Self:
        beside = _read_config(config_file.read_bytes(), config_file)
        try:
            # Processes on CPUs are on "cpu:0" and so on, which safetensors does not know.
            place = "cpu" if torch.device(device).type == "cpu" else str(device)
            with safe_open(weights, framework="pt", device=place) as file:
                own = (file.metadata() or {}).get("config", "")
                # Copies: a file's tensors may be aligned otherwise than new memory, and products then round otherwise.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise BeliefError(
                f"{weights} cannot be read; it is truncated or no safetensors file ({error})."
            ) from error
        config = _read_config(own.encode(), weights)
        if config["fingerprint"] != tensors_fingerprint(tensors):
            raise BeliefError(f"{weights} was altered: its tensors do not have the fingerprint it states.")
        if config["fingerprint"] != beside["fingerprint"]:
            logger.warning("%s is of another save than %s, which is used with its own config.", config_file, weights)
        structure, space = config.pop("structure"), config.pop("space")
        config = {key: value for key, value in config.items() if key not in ("format", "fingerprint")}
        mean = {n.removeprefix("mean/"): t for n, t in tensors.items() if n.startswith("mean/")}
        rest = {n.removeprefix("precision/"): t for n, t in tensors.items() if n.startswith("precision/")}
        source = {n.removeprefix("source/"): t for n, t in tensors.items() if n.startswith("source/")}
        try:
            precision = precision_from_tensors(structure, space, rest)
            precision.coordinates()
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise BeliefError(
                f"{weights} holds no complete {structure} precision in {space} space: {error}"
            ) from error
        return cls(mean, precision, config, source)

    def fingerprint(self) -> str:
        """Hash of all its tensors, as `belief_config.json` states it."""
        return tensors_fingerprint(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"mean/{k}": m for k, m in self.mean.items()}
        named |= {f"precision/{k}": t for k, t in self.precision.tensors().items()}
        named |= {f"source/{k}": t for k, t in self.source.items()}
        return {name: t.detach().cpu().contiguous().clone() for name, t in named.items()}


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy or torch, for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"Belief.info holds a {type(value).__name__}, which JSON cannot; use numbers, strings, lists.")


def _read_config(text: bytes, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
        missing = {"structure", "space", "fingerprint", "format"} - config.keys()
    except (ValueError, AttributeError) as error:
        raise BeliefError(f"{path} has no belief config, or is truncated ({error}).") from error
    if missing:
        raise BeliefError(f"{path} has no belief config: {sorted(missing)} are missing.")
    if config["format"] != _FORMAT:
        raise BeliefError(f"{path} has format {config['format']}; this version reads {_FORMAT}. Update kalman_peft.")
    return config


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes, dtypes and bytes, hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(t.shape)}|{t.dtype}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: Path, write: Any) -> None:
    """Write beside `path`, then replace it: a reader or a crash sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{world()[0]}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors writes for the owner only, whatever the umask
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
