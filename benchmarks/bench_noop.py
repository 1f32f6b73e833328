"""Re-running a finished extraction of many utterances, as a user does: one `mer extract` process.

    python benchmarks/bench_noop.py [--utterances 100000]

Writes that many short recordings and a manifest, fills the store by hand (their features are not
the point), then times `mer extract` finding nothing to do. The peer is a process that only reads
the manifest and stats every recording: less cannot tell that nothing changed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from mer.cache.home import Cache
from mer.extract.contract import Source
from mer.extract.inputs import resolve
from mer.extract.registry import create

OLD_NS = 1_600_000_000_000_000_000
PEER = """
import csv, os, sys
with open(sys.argv[1], newline="") as file:
    for row in csv.DictReader(file):
        os.stat(row["path"])
"""


def write_corpus(folder: Path, count: int) -> tuple[Path, list[Source]]:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(64, np.int16), 16_000, format="WAV")
    header = buffer.getvalue()[:-128]
    sources = []
    for i in range(count):
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.wav"
        if i % 1000 == 0:
            path.parent.mkdir()
        path.write_bytes(header + i.to_bytes(4, "little") * 32)
        os.utime(path, ns=(OLD_NS, OLD_NS))
        sources.append(Source(id=path.stem, path=path))
    manifest = folder / "manifest.csv"
    lines = [
        "id,path,speaker,label",
        *(f"{s.id},{s.path},s{i % 50},a" for i, s in enumerate(sources)),
    ]
    manifest.write_text("\n".join(lines) + "\n")
    return manifest, sources


def fill(cache: Cache, sources: list[Source]) -> None:
    keys = resolve(sources, cache.root).audio_keys
    extractor = create("logmel")
    store = cache.open(extractor.spec, create=True)
    output = extractor.outputs[0]
    frames = np.zeros((1, output.dim), np.float32)
    with store.writer() as writer:
        for key in keys.values():
            writer.add(key, 64, {output.name: frames})


def best_of(rounds: int, argv: list[str]) -> tuple[float, str]:
    times, out = [], ""
    for _ in range(rounds):
        started = time.perf_counter()
        out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        times.append(time.perf_counter() - started)
    return min(times), out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest, sources = write_corpus(Path(folder), options.utterances)
        cache = Cache(Path(folder) / "cache")
        fill(cache, sources)
        mer = [sys.executable, "-m", "mer.cli", "extract", str(manifest), "-f", "logmel"]
        ours, out = best_of(options.rounds, [*mer, "--cache", str(cache.root), "--json"])
        result = json.loads(out.splitlines()[-1])
        assert (result["computed"], result["reused"]) == (0, options.utterances), result
        peer, _ = best_of(options.rounds, [sys.executable, "-c", PEER, str(manifest)])
    print(f"{options.utterances:,} utterances, all stored")
    print(f"mer extract again       {ours:6.2f} s   (target ≤ 2 s per 100,000)")
    print(f"read manifest and stat  {peer:6.2f} s   ratio {ours / peer:.2f}")


if __name__ == "__main__":
    main()
