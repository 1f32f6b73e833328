"""An epoch of random ragged batches from the store ÷ the same from one memory-mapped numpy array.

    python benchmarks/bench_epoch.py --small

Both copy the same utterances in the same order into padded arrays and are warm (page cache); rounds
are interleaved and medians taken, because absolute speeds drift on shared machines. Target: ≤ 1.10.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mer.cache.home import Cache
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store

OUTPUT = "final"
Epoch = Callable[[np.ndarray, str, np.ndarray | None], None]


def make_data(folder: Path, count: int, mean_frames: int, dim: int) -> tuple[Store, list[bytes]]:
    """Write the same random utterances into a store and into one flat file."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.gamma(4.0, mean_frames / 4.0, count).astype(np.int64))
    output = OutputSpec(name=OUTPUT, dim=dim, rate_hz=50.0)
    spec = FeatureSpec(slug="bench", identity={"name": "bench", "version": 1}, outputs=(output,))
    store = Cache(folder / "cache").open(spec, create=True)
    assert store is not None
    keys = [rng.bytes(16) for _ in range(count)]
    with (folder / "flat.f16").open("wb") as flat, store.writer() as writer:
        for key, length in zip(keys, lengths.tolist(), strict=True):
            frames = rng.standard_normal((length, dim), dtype=np.float32)
            writer.add(key, length, {OUTPUT: frames})
            flat.write(frames.astype(np.float16).tobytes())
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    return store, keys


def store_epoch(store: Store, keys: list[bytes], size: int) -> Epoch:
    def run(order: np.ndarray, dtype: str, out: np.ndarray | None) -> None:
        for at in range(0, len(order), size):
            store.batch([keys[i] for i in order[at : at + size]], OUTPUT, dtype, out)

    return run


def flat_epoch(folder: Path, dim: int, size: int) -> Epoch:
    offsets = np.load(folder / "offsets.npy")
    flat = np.memmap(folder / "flat.f16", np.float16, "r", shape=(int(offsets[-1]), dim))

    def run(order: np.ndarray, dtype: str, out: np.ndarray | None) -> None:
        for at in range(0, len(order), size):
            rows = order[at : at + size]
            lengths = offsets[rows + 1] - offsets[rows]
            shape = (len(rows), int(lengths.max()), dim)
            if out is None:
                batch = np.zeros(shape, dtype)
            else:
                batch = out[: int(np.prod(shape))].reshape(shape)
            for i, (start, n) in enumerate(
                zip(offsets[rows].tolist(), lengths.tolist(), strict=True)
            ):
                batch[i, :n] = flat[start : start + n]
                if out is not None:
                    batch[i, n:] = 0

    return run


def measure(epochs: dict[str, Epoch], count: int, dtype: str, out: np.ndarray | None, rounds: int):
    """Return the median seconds per epoch and the median of the ratios of the rounds."""
    rng = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(rounds + 1):
        order = rng.permutation(count)
        names = list(epochs) if number % 2 else list(epochs)[::-1]
        for name in names:
            begin = time.perf_counter()
            epochs[name](order, dtype, out)
            if number:  # the first round warms the page cache and verifies every chunk
                seconds[name].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(seconds["store"], seconds["memmap"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians, statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="400 utterances instead of 2000")
    parser.add_argument("--utterances", type=int, help="number of utterances")
    parser.add_argument("--frames", type=int, default=250, help="mean frames per utterance")
    parser.add_argument("--dim", type=int, default=1024, help="width of a frame")
    parser.add_argument("--batch", type=int, default=32, help="utterances per batch")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each kind")
    parser.add_argument("--folder", type=Path, help="where to put the data (default: temporary)")
    options = parser.parse_args()
    count = options.utterances or (400 if options.small else 2000)
    folder = Path(tempfile.mkdtemp(prefix="bench_epoch.", dir=options.folder))
    try:
        store, keys = make_data(folder, count, options.frames, options.dim)
        epochs = {
            "store": store_epoch(store, keys, options.batch),
            "memmap": flat_epoch(folder, options.dim, options.batch),
        }
        size = int(store.num_frames(keys, OUTPUT).max()) * options.batch * options.dim
        result = {"utterances": count, "parts": len(store.parts()), "cpus": os.cpu_count()}
        for dtype in ("float32", "float16"):
            for label, out in (("fresh", None), ("reused", np.zeros(size, dtype))):
                seconds, ratio = measure(epochs, count, dtype, out, options.rounds)
                result[f"{dtype}, {label} array"] = {
                    "store_s": round(seconds["store"], 4),
                    "memmap_s": round(seconds["memmap"], 4),
                    "ratio": round(ratio, 3),
                }
                print(f"{dtype}, {label} array: {ratio:.3f}", file=sys.stderr)
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
