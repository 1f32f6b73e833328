"""Names, keys and bytes on disk are a promise: what one release stored the next one finds.

A difference here makes existing caches misses or unreadable: raise the format version instead.
To write the files anew after such a decision:
``MER_WRITE_GOLDEN=1 pytest tests/cache/test_golden.py``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mer.cache import home as home_module
from mer.cache.home import Cache
from mer.cache.identity import audio_key, fingerprint, normalise_text, store_name, text_key
from mer.cache.spec import FeatureSpec, OutputSpec

GOLDEN = Path(__file__).parent / "golden"

IDENTITIES: list[dict[str, Any]] = [
    {"name": "logmel", "version": 1},
    {"name": "x", "options": {"layers": ["final", "layer_6"], "window_s": 0.025, "pad": None}},
    {"name": "é", "on": True, "size": 1.0, "count": 1, "nested": [[], {}]},
]
SEGMENTS: list[tuple[float | None, float | None, int | None]] = [
    (None, None, None),
    (0.0, None, None),
    (1.5, 3.25, None),
    (1.5, 3.25, 0),
    (1 / 192_000, None, 1),
]
TEXTS = ["", "Kids are talking by the door", "  Dogs\tare  sitting \n", "cafe\u0301", "東京"]
SPEC = FeatureSpec(
    slug="golden",
    identity={"name": "golden", "version": 1},
    outputs=(
        OutputSpec(name="final", dim=3, rate_hz=50.0),
        OutputSpec(name="large", dim=1, rate_hz=None),
        OutputSpec(name="code", dim=1, rate_hz=100.0, dtype="uint8", kind="codes", num_codes=256),
        OutputSpec(
            name="functionals",
            dim=2,
            rate_hz=None,
            dtype="float32",
            kind="pooled",
            columns=("a", "b"),
        ),
    ),
    licence="none",
)


def compare(name: str, found: Any) -> None:
    """Hold ``found`` against a golden file."""
    path = GOLDEN / name
    if os.environ.get("MER_WRITE_GOLDEN"):
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(path.read_text(encoding="utf-8"))


def test_names_and_keys():
    content = bytes(range(16))
    found = {
        "fingerprints": [[identity, fingerprint(identity)] for identity in IDENTITIES],
        "store": store_name(SPEC),
        "audio": [[*segment, audio_key(content, *segment).hex()] for segment in SEGMENTS],
        "text": [[text, normalise_text(text), text_key(text).hex()] for text in TEXTS],
    }
    compare("keys.json", found)


def test_files_of_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(home_module, "_now", lambda: "2025-01-01T00:00:00+00:00")
    store = Cache(tmp_path).open(SPEC, create=True)
    assert store is not None
    with store.writer() as writer:
        for number, length in enumerate((600, 1, 3)):
            steps = np.arange(length, dtype=np.float32)[:, None]
            arrays = {
                "final": steps % 8 + np.array([0, 1, 2], np.float32),
                "large": steps * 0 + 100_000,
                "code": np.arange(length)[:, None] % 256,
                "functionals": np.array([[number, 0.5]], np.float32),
            }
            writer.add(bytes([number]) * 16, 320 * length, arrays)
    found: dict[str, Any] = {}
    for path in sorted(tmp_path.rglob("*")):
        if path.name == "zarr.json":
            found[path.relative_to(tmp_path).as_posix()] = json.loads(path.read_text())
        elif path.is_file():
            data = path.read_bytes()
            record = {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
            found[path.relative_to(tmp_path).as_posix()] = record
    compare("layout.json", found)
