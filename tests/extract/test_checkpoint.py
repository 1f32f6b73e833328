"""Finding, fetching and identifying checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import local_hub
import pytest
import tiny_checkpoints

from mer.cache.errors import CheckpointError
from mer.extract import checkpoint
from mer.extract.checkpoint import refuse_misfits, resolve, sha256_of


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.speech(tmp_path_factory.mktemp("published") / "wavlm", "wavlm")


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(published, tmp_path / "model"))


# Local folders ----------------------------------------------------------------------------------


def test_a_local_folder_is_identified_by_content_alone(folder: Path, tmp_path: Path) -> None:
    here = resolve(str(folder)).identity
    assert (here.id, here.revision) == ("local", None)
    assert len(here.weights) == 64
    assert resolve(str(folder.rename(tmp_path / "moved"))).identity == here


def test_bookkeeping_in_the_configuration_does_not_matter_but_settings_do(folder: Path) -> None:
    before = resolve(str(folder)).identity
    config = json.loads((folder / "config.json").read_text())
    noted = {
        **config,
        "transformers_version": "4.0.0",
        "_name_or_path": "x",
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(noted, indent=1))
    assert resolve(str(folder)).identity == before
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    assert resolve(str(folder)).identity != before


def test_one_changed_weight_is_another_model(folder: Path) -> None:
    before = resolve(str(folder)).identity
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert resolve(str(folder)).identity != before


def test_files_that_also_determine_values_are_part_of_the_identity(folder: Path) -> None:
    before = resolve(str(folder), also=("tokenizer.json",)).identity
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("no part of it")
    assert resolve(str(folder), also=("tokenizer.json",)).identity != before
    assert resolve(str(folder)).identity == before


def test_a_folder_in_the_home_directory_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").folder == folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "holds no weights: expected model.safetensors or pytorch_model.bin",
        ),
        (
            lambda f: (f / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
            ),
            "Git LFS pointer.*git lfs pull",
        ),
        (
            lambda f: (
                (f / "model.safetensors")
                .rename(f / "model.safetensors.index.json")
                .write_text('{"weight_map": {"a": "model-1.safetensors"}}')
            ),
            "names shards that are not there: model-1.safetensors",
        ),
        (
            lambda f: (
                (f / "model.safetensors")
                .rename(f / "model.safetensors.index.json")
                .write_text('{"weight_map": {"a": "../outside.safetensors"}}')
            ),
            "not a plain file name",
        ),
        (
            lambda f: (
                (f / "model.safetensors")
                .rename(f / "model.safetensors.index.json")
                .write_text("{}")
            ),
            "no index of weight shards",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text("{}"),
            r"holds an adapter \(adapter_config.json\) beside the model",
        ),
        (
            lambda f: (f / "config.json").write_text('{"transformers_weights": "b.safetensors"}'),
            "transformers_weights = 'b.safetensors'",
        ),
    ],
    ids=[
        "no-config",
        "no-json",
        "no-object",
        "no-weights",
        "lfs",
        "shard-gone",
        "shard-outside",
        "no-index",
        "adapter",
        "explicit-weights",
    ],
)
def test_an_unusable_folder_is_refused_with_the_reason(
    damage: Callable[[Path], object], message: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        resolve(str(folder))


def test_what_is_neither_folder_nor_hub_id_is_refused(folder: Path) -> None:
    for name in ("./nowhere", "/no/such/folder", "a/b/c", "~nobody/x", "org/na me", ""):
        with pytest.raises(CheckpointError, match="no folder .* no hub id"):
            resolve(name)
    with pytest.raises(CheckpointError, match="is a file. Give the folder"):
        resolve(str(folder / "config.json"))


def test_a_local_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="revision=main was given, but .* is a local folder"):
        resolve(str(folder), "main")


# Checksums --------------------------------------------------------------------------------------


@pytest.fixture
def memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty memo that remembers files of any size, and a file old enough to be remembered."""
    path = tmp_path / "memo" / "weights.json"
    monkeypatch.setattr(checkpoint, "MEMO_BYTES", 1)
    monkeypatch.setattr(checkpoint, "_memo_path", lambda: path)
    monkeypatch.setattr(checkpoint, "_hashed", {})
    return path


def age(path: Path, seconds: int = 60) -> None:
    stat = path.stat()
    os.utime(path, (stat.st_atime - seconds, stat.st_mtime - seconds))


def test_checksums_are_remembered_across_processes(
    memo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"weights")
    age(path)
    expected = hashlib.sha256(b"weights").hexdigest()
    assert sha256_of(path) == expected
    monkeypatch.setattr(checkpoint, "_hashed", {})  # as a new process
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert sha256_of(path) == expected


def test_a_changed_file_is_hashed_again(memo: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"weights")
    age(path)
    sha256_of(path)
    path.write_bytes(b"Weights")
    age(path, 30)
    assert sha256_of(path) == hashlib.sha256(b"Weights").hexdigest()


def test_other_weights_of_the_same_size_and_time_are_hashed(memo: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "weights.bin", tmp_path / "other.bin"
    for file, content in ((path, b"weights"), (other, b"Weights")):
        file.write_bytes(content)
        os.utime(file, (1_600_000_000, 1_600_000_000))
    sha256_of(path)
    other.replace(path)
    assert sha256_of(path) == hashlib.sha256(b"Weights").hexdigest()


def test_a_file_too_fresh_to_tell_a_later_change_is_not_remembered(
    memo: Path, tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"weights")
    sha256_of(path)
    assert not memo.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_memo_is_made_anew(content: str, memo: Path, tmp_path: Path) -> None:
    memo.parent.mkdir()
    memo.write_text(content)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"weights")
    age(path)
    assert sha256_of(path) == hashlib.sha256(b"weights").hexdigest()
    assert hashlib.sha256(b"weights").hexdigest() in memo.read_text()


def test_a_memo_that_cannot_be_written_is_no_error(memo: Path, tmp_path: Path) -> None:
    memo.parent.write_text("a file where the folder should be")
    path = tmp_path / "weights.bin"
    path.write_bytes(b"weights")
    age(path)
    assert sha256_of(path) == hashlib.sha256(b"weights").hexdigest()


# Fit --------------------------------------------------------------------------------------------


def test_only_listed_keys_may_be_dropped_or_missing(folder: Path) -> None:
    found = resolve(str(folder))
    lists = {"droppable": (r"lm_head\.",), "optional": (r"mask$",)}
    refuse_misfits(found, ["mask"], ["lm_head.weight"], **lists)
    with pytest.raises(
        CheckpointError, match=r"missing key a; unexpected keys b, encoder\.lm_head\.c"
    ):
        refuse_misfits(found, ["a", "mask"], ["b", "encoder.lm_head.c"], **lists)


# The hub ----------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from mer.cache.errors import CheckpointError
from mer.extract.checkpoint import resolve
try:
    found = resolve(sys.argv[1], sys.argv[2] or None)
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
else:
    identity = found.identity
    files = sorted(path.name for path in found.folder.iterdir())
    print(json.dumps({"id": identity.id, "revision": identity.revision, "weights": identity.weights,
    "files": files}))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.fixture
def hub(published: Path) -> Iterator[local_hub.LocalHub]:
    with local_hub.serve() as served:
        served.repositories["org/wavlm"] = published
        yield served


@pytest.fixture
def ask(hub: local_hub.LocalHub, tmp_path: Path) -> Callable[..., dict]:
    """Resolve in a process of its own, since the hub's address and cache are read at import."""

    def ask(model: str, revision: str = "", *, offline: bool = False) -> dict:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hub-cache"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
        }
        hub.requests.clear()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, model, revision],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_a_hub_model_is_pinned_to_its_commit_and_then_works_offline(
    hub: local_hub.LocalHub, ask: Callable[..., dict], published: Path, tmp_path: Path
) -> None:
    repository = Path(shutil.copytree(published, tmp_path / "repository"))
    (repository / "pytorch_model.bin").write_bytes(b"the same weights in the older format")
    (repository / "tf_model.h5").write_bytes(b"the same weights in another format")
    hub.repositories["org/wavlm"] = repository
    found = ask("org/wavlm")
    assert found["id"] == "org/wavlm"
    assert found["revision"] == local_hub.COMMIT
    assert found["files"] == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert found["weights"] == resolve(str(published)).identity.weights
    assert ask("org/wavlm", offline=True) == found
    assert not hub.requests
    assert ask("org/wavlm", local_hub.COMMIT) == found
    assert not hub.requests, "a pinned commit in the cache needs no network"
    assert ask("org/wavlm", "main") == found
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_shards_named_by_an_index_are_fetched(
    hub: local_hub.LocalHub, ask: Callable[..., dict], tmp_path: Path
) -> None:
    folder = tiny_checkpoints.whisper(tmp_path / "sharded", max_shard_size="60KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    hub.repositories["org/sharded"] = folder
    found = ask("org/sharded")
    assert len(shards) > 1
    assert set(shards) < set(found["files"])
    assert found["weights"] == resolve(str(folder)).identity.weights


def test_each_refusal_of_the_hub_is_one_clear_error(
    hub: local_hub.LocalHub, ask: Callable[..., dict], tmp_path: Path
) -> None:
    hub.gated.add("org/gated")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    hub.repositories["org/empty"] = tmp_path / "empty"
    assert "The hub has no model 'org/none'" in ask("org/none")["error"]
    assert "org/gated is gated: accept its conditions" in ask("org/gated")["error"]
    assert "no revision 'v9'" in ask("org/wavlm", "v9")["error"]
    assert "holds no weights that we read" in ask("org/empty")["error"]
    assert "HF_HUB_OFFLINE forbids" in ask("org/wavlm", offline=True)["error"]
    for name in ("org/none", "org/gated"):
        assert "give its folder: model=FOLDER" in ask(name)["error"]


def test_a_download_with_another_content_than_announced_is_refused(
    hub: local_hub.LocalHub, ask: Callable[..., dict]
) -> None:
    hub.announced["model.safetensors"] = "0" * 64
    assert "is damaged" in ask("org/wavlm")["error"]


def test_an_unreachable_hub_is_named_and_the_cache_still_serves(
    published: Path, ask: Callable[..., dict], hub: local_hub.LocalHub
) -> None:
    found = ask("org/wavlm")
    hub.url = "http://127.0.0.1:9"  # the discard port: nothing listens
    assert ask("org/wavlm") == found
    assert (
        "org/other is not in the local hub cache and could not be fetched"
        in ask("org/other")["error"]
    )
