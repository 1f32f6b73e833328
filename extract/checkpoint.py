"""Where weights come from: a hub id pinned to a commit or a local folder; how they are loaded.

Resolving reads configuration and checksums and imports neither torch nor transformers. Weights are
identified by content (sha256), so a moved folder is the same model and a changed file is another
one. Code from a checkpoint is never run, and a checkpoint that does not fill its model exactly is
refused by the names of the keys.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from mer.cache.errors import CheckpointError, UsageError
from mer.extract.contract import ModelIdentity

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# In transformers' own order of preference, so that what is hashed is what is loaded.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What would make transformers load other weights than these, or more, unseen by the identity.
ADAPTER = "adapter_config.json"
EXPLICIT_WEIGHTS = "transformers_weights"
# Keys of config.json that say how a file was written, not what the model computes.
BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOCAL_HINT = "To use a copy of your own, give its folder: model=FOLDER (config.json and weights)."


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A resolved model.

    Parameters
    ----------
    folder : Path
        Holds config.json, the weights and what came with them.
    identity : ModelIdentity
        What goes into the fingerprint.
    config : mapping
        config.json as read.
    weights : tuple of Path
        The weight files that will be loaded: one, or all shards.
    also : tuple of str
        Names of the further files that were hashed where they exist.
    """

    folder: Path
    identity: ModelIdentity
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        local = self.identity.revision is None
        return str(self.folder) if local else f"{self.identity.id}@{self.identity.revision}"

    @property
    def short_name(self) -> str | None:
        """Last part of a hub id; None for a local folder, whose name is no part of its identity."""
        return None if self.identity.revision is None else self.identity.id.rpartition("/")[2]

    def licence(self, notes: Mapping[str, str]) -> str | None:
        """Return the note of the hub id's prefix, if ``notes`` has one."""
        return next((v for k, v in notes.items() if self.identity.id.startswith(k)), None)

    def check_unchanged(self) -> None:
        """Check, after loading, that the files are still those that the identity was made of.

        Raises
        ------
        CheckpointError
            A training or a download wrote to the folder meanwhile.
        """
        model = self.identity.id
        if _identify(self.folder, model, self.identity.revision, self.also) != self:
            raise CheckpointError(
                f"{self.folder} changed while it was being loaded; nothing was computed with it. "
                "Run the same command again when it is complete."
            )

    def need(self, key: str) -> Any:
        """Return a value of config.json.

        Raises
        ------
        CheckpointError
            The key is not there.
        """
        if key not in self.config:
            raise CheckpointError(
                f"{self.folder / CONFIG} has no {key!r}; it is not the configuration of a model we "
                "know."
            )
        return self.config[key]

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return another JSON file of the folder, or None if it is absent."""
        path = self.folder / name
        return _read_json(path) if path.is_file() else None


def requested(name: str, options: Mapping[str, str], *, also: Sequence[str] = ()) -> Checkpoint:
    """Resolve the ``model`` and ``revision`` options of feature ``name``.

    Raises
    ------
    UsageError
        No model is named.
    CheckpointError
        See ``resolve``.
    """
    if not options["model"]:
        raise UsageError(f"Feature {name!r} needs a model: {name}:model=FOLDER_OR_HUB_ID.")
    return resolve(options["model"], options["revision"] or None, also=also)


def resolve(model: str, revision: str | None = None, *, also: Sequence[str] = ()) -> Checkpoint:
    """Find a checkpoint and identify it.

    Parameters
    ----------
    model : str
        A local folder, or a hub id such as ``microsoft/wavlm-large``. A folder of that name wins.
    revision : str, optional
        Branch, tag or commit of a hub id; the default branch if None. It is pinned to its commit. A
        full commit that is already in the hub's cache needs no network; anything else asks the hub
        first and falls back to the cache when the hub cannot be reached (or ``HF_HUB_OFFLINE=1``).
    also : sequence of str
        Further files that determine values, such as `TOKENIZER_FILES`; fetched and hashed where
        they exist.

    Raises
    ------
    CheckpointError
        Unknown, gated, unreachable or damaged; no configuration, or no weights in a format we read.
    """
    try:
        local = Path(model).expanduser()
    except RuntimeError:  # ~ of somebody who does not exist
        local = Path(model)
    if model and local.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision={revision} was given, but {model} is a local folder, which has no "
                "revisions."
            )
        return _identify(local, "local", None, also)
    if model and local.exists():
        raise CheckpointError(
            f"{model} is a file. Give the folder that holds config.json and the weights."
        )
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"There is no folder {model!r}, and that is no hub id (such as "
            "'microsoft/wavlm-large') "
            "either."
        )
    folder, commit = _fetch(model, revision, also)
    return _identify(folder, model, commit, also)


# Identity -----------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}). Fetch the checkpoint again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. Fetch the checkpoint again.")
    return content


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of ``folder`` in the order transformers would prefer them.

    Raises
    ------
    CheckpointError
        None there, or a shard that the index names is missing.
    """
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return (path,)
        shards = tuple(folder / shard for shard in _shards(_read_json(path), path))
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise CheckpointError(
                f"{path} names shards that are not there: {', '.join(missing)}. Fetch them again."
            )
        return shards
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    raise CheckpointError(
        f"{folder} holds no weights: expected {' or '.join(WEIGHT_FILES[::2])}, found {there}."
    )


def _shards(index: Mapping[str, Any], path: Path) -> list[str]:
    try:
        names = sorted(set(index["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no index of weight shards. Fetch the checkpoint again."
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{path} names the shard {name!r}, which is not a plain file name. Refused."
            )
    return names


def _identify(folder: Path, model_id: str, commit: str | None, also: Sequence[str]) -> Checkpoint:
    config_path = folder / CONFIG
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder} holds no {CONFIG}, so it is no checkpoint in the Hugging Face layout."
        )
    config = _read_json(config_path)
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}) beside the model. Merge it into the weights, "
            "or move it elsewhere."
        )
    if EXPLICIT_WEIGHTS in config:
        raise CheckpointError(
            f"{config_path} names its own weight file ({EXPLICIT_WEIGHTS} = "
            f"{config[EXPLICIT_WEIGHTS]!r}). Name that file {WEIGHT_FILES[0]} and remove the key."
        )
    weights = _weight_files(folder)
    relevant = {key: value for key, value in config.items() if key not in BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode())
    for path in (*weights, *(folder / name for name in sorted(also) if (folder / name).is_file())):
        digest.update(f"\n{path.name} {sha256_of(path)}".encode())
    return Checkpoint(
        folder,
        ModelIdentity(id=model_id, revision=commit, weights=digest.hexdigest()),
        config,
        weights,
        tuple(also),
    )


# Checksums, remembered ----------------------------------------------------------------------------

MEMO_BYTES = (
    16 * 2**20
)  # smaller files are hashed again: that is faster than a look-up on some file systems
# A file changed within this time of being hashed may change again without its time moving: not
# remembered.
RACY_NS = 2_000_000_000
_hashed: dict[str, str] = {}


def _memo_path() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("mer")) / "weights-sha256.json"


def _read_memo(path: Path) -> dict[str, str]:
    try:
        memo = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) else {}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file; of a large one that did not change, from a memo.

    Raises
    ------
    CheckpointError
        Unreadable; a Git LFS pointer instead of weights; not the content that the hub announced.
    """
    real = path.resolve()  # in the hub's cache a snapshot's files are links to blobs
    try:
        stat = real.stat()
        # All checkpoints of a model have one size, and copying tools set the time of modification.
        key = f"{real}\t{stat.st_size}\t{stat.st_mtime_ns}\t{stat.st_ctime_ns}"
        if stat.st_size >= MEMO_BYTES:
            if key not in _hashed:
                _hashed.update(_read_memo(_memo_path()))
            if _SHA256.fullmatch(_hashed.get(key, "")):
                return _hashed[key]
        with real.open("rb") as file:
            if file.read(42) == b"version https://git-lfs.github.com/spec/v1":
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in its "
                    "folder."
                )
            file.seek(0)
            value = hashlib.file_digest(file, "sha256").hexdigest()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name) and real.name != value:
        raise CheckpointError(
            f"{path} is damaged: its content does not have the checksum that the hub announced. "
            f"Delete {real}."
        )
    if stat.st_size >= MEMO_BYTES and time.time_ns() - stat.st_mtime_ns > RACY_NS:
        _hashed[key] = value
        _save_memo(key, value)
    return value


def _save_memo(key: str, value: str) -> None:
    memo = _memo_path()
    temporary = memo.with_name(f"{memo.name}.{uuid4().hex}")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read_memo(memo), key: value}))
        temporary.replace(memo)
    except OSError as error:
        logger.info("the checksum memo %s was not saved: %s", memo, error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


# The hub ------------------------------------------------------------------------------------------


def _fetch(model: str, revision: str | None, also: Sequence[str]) -> tuple[Path, str]:
    """Bring a hub model into the hub's own cache; return its snapshot folder and commit."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cached = _cached_snapshot(model, revision)
    pinned = revision is not None and _COMMIT.fullmatch(revision) is not None
    if cached and pinned and (not also or any((cached / name).is_file() for name in also)):
        return cached, cached.name
    at = f"{model}@{revision}" if revision else model
    try:
        info = HfApi().model_info(model, revision=revision)
        there = [file.rfilename for file in info.siblings or ()]
        chosen = [name for name in there if name in (CONFIG, PREPROCESSOR, *also)]
        if cached and cached.name == info.sha and all((cached / c).is_file() for c in chosen):
            return cached, cached.name
        index = [name for name in WEIGHT_FILES if name in there][:1]
        if not index:
            raise CheckpointError(
                f"{at} on the hub holds no weights that we read ({' or '.join(WEIGHT_FILES[::2])})."
            )
        if index[0].endswith(".index.json"):
            path = (
                Path(snapshot_download(model, revision=revision, allow_patterns=index)) / index[0]
            )
            index += _shards(_read_json(path), path)
        # by the revision as given, so that the cache remembers its commit: offline needs that
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=chosen + index))
        return folder, folder.name
    except CheckpointError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated: accept its conditions at its page on the hub, then log in with `hf "
            f"auth login`. {_LOCAL_HINT}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"The hub has {model}, but no revision {revision!r} of it."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The hub has no model {model!r}, or not for you (private: `hf auth login`). "
            f"{_LOCAL_HINT}"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{model!r} is no hub id: {error}") from error
    except Exception as error:  # no network, offline mode, a server's failure: classes vary
        offline = isinstance(error, OfflineModeIsEnabled)
        if cached:
            level = logging.INFO if offline else logging.WARNING
            logger.log(level, "hub not reached, using the cached commit %s of %s", cached.name, at)
            return cached, cached.name
        if offline:
            raise CheckpointError(
                f"{at} is not in the local hub cache, and HF_HUB_OFFLINE forbids to fetch it. "
                f"Unset it, or fetch the model first. {_LOCAL_HINT}"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{at} is not in the local hub cache and could not be fetched "
            f"({type(error).__name__}: {reason}). Check the network, then run again: a download "
            f"resumes. {_LOCAL_HINT}"
        ) from error


def _cached_snapshot(model: str, revision: str | None) -> Path | None:
    """Return the snapshot folder of a model that can be used from the hub's cache, else None."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # a malformed id is reported by the hub call that follows
        config = try_to_load_from_cache(model, CONFIG, revision=revision)
        if isinstance(config, str) and Path(config).is_file():
            folder = Path(config).parent
            with suppress(CheckpointError):
                _weight_files(folder)
                return folder
    return None


# Loading ------------------------------------------------------------------------------------------


def import_transformers() -> ModuleType:
    """Return transformers, imported in a way that a broken torchaudio beside it cannot break."""
    from mer.extract.torchaudio_guard import neutralise_broken_torchaudio

    neutralise_broken_torchaudio()
    import transformers

    return transformers


@contextmanager
def quiet_transformers() -> Iterator[ModuleType]:
    """Silence transformers' bars and reports: what matters of them is raised as an error here."""
    transformers = import_transformers()
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield transformers
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(re.match(pattern, key) for pattern in patterns)


def refuse_misfits(
    checkpoint: Checkpoint,
    missing: Sequence[str],
    unexpected: Sequence[str],
    *,
    droppable: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> None:
    """Check that a checkpoint fills its model exactly.

    Parameters
    ----------
    droppable : sequence of str
        Patterns (matched from the start) of keys that published checkpoints carry beside the
        encoder: task heads.
    optional : sequence of str
        Patterns of parameters that play no part at inference.

    Raises
    ------
    CheckpointError
        Anything else is missing or unexpected.
    """
    faults = []
    for what, keys, allowed in (
        ("missing", missing, optional),
        ("unexpected", unexpected, droppable),
    ):
        bad = sorted(key for key in keys if not _matches(key, allowed))
        if bad:
            shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            faults.append(f"{what} {'key' if len(bad) == 1 else 'keys'} {shown}")
    if faults:
        raise CheckpointError(
            f"The weights of {checkpoint} do not fit its configuration: {'; '.join(faults)}. "
            "Nothing was computed; "
            "use a complete checkpoint of this model."
        )


def load_pretrained(
    checkpoint: Checkpoint,
    class_name: str,
    *,
    dtype: torch.dtype,
    droppable: Sequence[str],
    optional: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Load a transformers model from a resolved folder, in evaluation mode, on the CPU.

    Parameters
    ----------
    class_name : str
        Name of the model class in transformers.
    droppable, optional : sequence of str
        See `refuse_misfits`.
    **options
        Passed on to ``from_pretrained``.

    Raises
    ------
    CheckpointError
        Keys missing, unexpected or of another shape; a damaged file; a format that could run code;
        files that changed since they were identified.
    """
    with quiet_transformers() as transformers:
        try:
            model, info = getattr(transformers, class_name).from_pretrained(
                checkpoint.folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=checkpoint.weights[0].suffix == ".safetensors",
                output_loading_info=True,
                dtype=dtype,
                **options,
            )
        except MemoryError:
            raise
        except Exception as error:  # safetensors, torch and transformers each raise their own
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"The weights of {checkpoint} cannot be loaded: {reason}"
            ) from error
    if info.get("mismatched_keys"):
        names = ", ".join(
            str(row[0] if isinstance(row, tuple) else row)
            for row in sorted(info["mismatched_keys"])[:5]
        )
        raise CheckpointError(
            f"The weights of {checkpoint} have other shapes than its configuration says: {names}."
        )
    refuse_misfits(
        checkpoint,
        info["missing_keys"],
        info["unexpected_keys"],
        droppable=droppable,
        optional=optional,
    )
    checkpoint.check_unchanged()
    encoder: nn.Module = model.eval().requires_grad_(False)
    return encoder


def read_tensors(checkpoint: Checkpoint, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Read chosen tensors of a checkpoint without building a whole model.

    Parameters
    ----------
    rename : callable
        Maps a key of the file to the name wanted, or to None to leave it out.

    Raises
    ------
    CheckpointError
        A damaged file, one that holds more than tensors, or one that changed since it was
        identified.
    """
    import torch
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for path in checkpoint.weights:
        try:
            if path.suffix == ".safetensors":
                with safe_open(os.fspath(path), framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - not a mapping
                        if (name := rename(key)) is not None:
                            tensors[name] = file.get_tensor(key)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
                tensors.update(
                    {name: t for key, t in state.items() if (name := rename(key)) is not None}
                )
        except Exception as error:  # each reader raises its own
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} cannot be read as weights: {reason}") from error
    checkpoint.check_unchanged()
    return tensors
