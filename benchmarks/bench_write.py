"""Writing: stored megabytes per second and per CPU second, ours and what peers do.

    python benchmarks/bench_write.py [--small] [--folder /dev/shm]

The same utterances, given as float32 (rounded on the way) and as float16, go into stores of one and
of 25 outputs, and into one .npy per utterance, one flat file, one HDF5 dataset per utterance and a
sharded array of zarr-python. Ours computes mean and standard deviation, checks values, checksums
every byte and is on the disk when it returns; the peers do none of that. Rounds are interleaved and
the best of each taken. Then, as a forward pass sees it: how long a producer of a given pace waits
in ``add``, and how far memory grows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
import zarr

from mer.cache.home import Cache
from mer.cache.spec import FeatureSpec, OutputSpec

DIM = 1024
FRAMES = 250
Utterance = list[np.ndarray]
Write = Callable[[Path, "Source"], None]


class Source:
    """Utterances of ``outputs`` arrays (T, D), made from a few megabytes again and again."""

    def __init__(self, outputs: int, dtype: str, megabytes: float) -> None:
        rng = np.random.default_rng(0)
        self.outputs = outputs
        self.lengths = rng.gamma(4.0, FRAMES / 4.0, 10_000).astype(int) + 1
        self.pool = rng.standard_normal((20 * FRAMES, DIM), dtype=np.float32).astype(dtype)
        self.bytes = 0
        self.count = 0
        while self.bytes < megabytes * 1e6:
            self.bytes += int(self.lengths[self.count]) * DIM * 2 * outputs
            self.count += 1
        self.frames = int(self.lengths[: self.count].sum())

    def utterance(self, number: int) -> Utterance:
        """Return one array per output."""
        length = int(self.lengths[number])
        room = len(self.pool) - length
        starts = [(number * 7919 + k * 104_729) % room for k in range(self.outputs)]
        return [self.pool[start : start + length] for start in starts]

    def __iter__(self):
        return (self.utterance(number) for number in range(self.count))


def names(outputs: int) -> list[str]:
    return [f"layer_{k}" for k in range(outputs)]


def new_store(folder: Path, outputs: int):
    specs = tuple(OutputSpec(name=name, dim=DIM, rate_hz=50.0) for name in names(outputs))
    spec = FeatureSpec(slug="bench", identity={"name": "bench", "version": 1}, outputs=specs)
    return Cache(folder / "cache").open(spec, create=True)


def write_mer(folder: Path, source: Source) -> None:
    with new_store(folder, source.outputs).writer() as writer:
        for number, arrays in enumerate(source):
            named = dict(zip(names(source.outputs), arrays, strict=True))
            writer.add(number.to_bytes(16, "big"), 320 * len(arrays[0]), named)


def write_npy(folder: Path, source: Source) -> None:
    for k in range(source.outputs):
        (folder / f"{k}").mkdir()
    for number, arrays in enumerate(source):
        for k, array in enumerate(arrays):
            np.save(folder / f"{k}" / f"{number}.npy", array.astype(np.float16))


def write_flat(folder: Path, source: Source) -> None:
    files = [(folder / f"{k}.f16").open("wb", buffering=0) for k in range(source.outputs)]
    for arrays in source:
        for file, array in zip(files, arrays, strict=True):
            array.astype(np.float16).tofile(file)
    for file in files:
        file.close()


def write_hdf5(folder: Path, source: Source) -> None:
    with h5py.File(folder / "all.h5", "w") as file:
        groups = [file.create_group(name) for name in names(source.outputs)]
        for number, arrays in enumerate(source):
            for group, array in zip(groups, arrays, strict=True):
                group.create_dataset(str(number), data=array.astype(np.float16))


def write_zarr(folder: Path, source: Source) -> None:
    """Write shards of the size of our parts, chunks and checksums as in ours."""
    rows = max(1, (64 << 20) // (DIM * 2 * source.outputs * 512)) * 512
    root = zarr.open_group(folder / "all.zarr", mode="w")
    arrays = [
        root.create_array(
            name,
            shape=(source.frames, DIM),
            shards=(rows, DIM),
            chunks=(512, DIM),
            dtype="float16",
            compressors=[{"name": "crc32c"}],
        )
        for name in names(source.outputs)
    ]
    waiting: list[Utterance] = [[] for _ in arrays]
    done = held = 0
    for utterance in source:
        for of_output, array in zip(waiting, utterance, strict=True):
            of_output.append(array.astype(np.float16))
        held += len(utterance[0])
        while held >= rows:
            for target, of_output in zip(arrays, waiting, strict=True):
                together = np.concatenate(of_output)
                target[done : done + rows] = together[:rows]
                of_output[:] = [together[rows:]]
            done, held = done + rows, held - rows
    for target, of_output in zip(arrays, waiting, strict=True):
        if held:
            target[done:] = np.concatenate(of_output)


WRITERS: dict[str, Write] = {
    "mer": write_mer,
    "one .npy per utterance": write_npy,
    "one flat file": write_flat,
    "HDF5 dataset per utterance": write_hdf5,
    "zarr-python, sharded": write_zarr,
}


def measure(root: Path, source: Source, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the best megabytes per second and per CPU second of each."""
    best = {name: (0.0, 0.0) for name in WRITERS}
    for _ in range(rounds):
        for name, write in WRITERS.items():
            folder = root / "data"
            folder.mkdir()
            os.sync()  # nobody pays for what another left behind
            cpu, wall = time.process_time(), time.perf_counter()
            write(folder, source)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            found = source.bytes / 1e6 / wall, source.bytes / 1e6 / cpu
            best[name] = tuple(map(max, best[name], found))
            shutil.rmtree(folder)
    return best


def peak_mb() -> float:
    """Return the most memory this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def produce(root: Path, outputs: int, megabytes: float, pace: float) -> dict[str, float]:
    """Add at ``pace`` MB/s, as a device would yield; say how long that was held up."""
    source = Source(outputs, "float32", megabytes)
    store = new_store(root / "data", outputs)
    waits = []
    with store.writer() as writer:  # what is allocated once is not growth
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = peak_mb()
        begin = time.perf_counter()
        produced = 0
        for number, arrays in enumerate(source):
            produced += sum(array.size for array in arrays) * 2
            time.sleep(max(0.0, begin + produced / 1e6 / pace - time.perf_counter()))
            started = time.perf_counter()
            named = dict(zip(names(outputs), arrays, strict=True))
            writer.add(number.to_bytes(16, "big"), 1, named)
            waits.append(time.perf_counter() - started)
        grown = peak_mb() - before
    wall = time.perf_counter() - begin
    shutil.rmtree(root / "data")
    return {
        "seconds": wall,
        "in_add": sum(waits),
        "worst_ms": max(waits) * 1e3,
        "median_ms": float(np.median(waits)) * 1e3,
        "grown_mb": grown,
        "parts_mb": 2 * 64 * 1.048576,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tenth of the data")
    parser.add_argument("--megabytes", type=float, default=1000, help="stored bytes of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--pace", type=float, default=300, help="MB/s of the emulated producer")
    parser.add_argument("--folder", type=Path, help="where to write (default: temporary)")
    parser.add_argument("--produce", type=int, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    torch.set_num_threads(1)
    megabytes = options.megabytes / (10 if options.small else 1)
    root = Path(tempfile.mkdtemp(prefix="bench_write.", dir=options.folder))
    try:
        if options.produce:
            print(json.dumps(produce(root, options.produce, 2 * megabytes, options.pace)))
            return
        for outputs in (1, 25):
            for dtype in ("float32", "float16"):
                source = Source(outputs, dtype, megabytes)
                print(f"{outputs} × {DIM} from {dtype}, {source.bytes / 1e6:.0f} MB, {root.parent}")
                results = measure(root, source, options.rounds)
                ours = results["mer"]
                for name, (wall, cpu) in results.items():
                    print(
                        f"  {name:28s} {wall:6.0f} MB/s {cpu:6.0f} MB per CPU s"
                        f"   mer ÷ this {ours[0] / wall:5.2f} {ours[1] / cpu:5.2f}",
                        flush=True,
                    )
        for outputs in (1, 25):
            again = [sys.executable, __file__, *sys.argv[1:], "--produce", str(outputs)]
            found = json.loads(subprocess.run(again, capture_output=True, check=True).stdout)
            print(
                f"{outputs} × {DIM} at {options.pace:.0f} MB/s, {2 * megabytes:.0f} MB: "
                f"{found['in_add']:.2f} s of {found['seconds']:.2f} s in add, median "
                f"{found['median_ms']:.1f} ms, worst {found['worst_ms']:.0f} ms; memory grew by "
                f"{found['grown_mb']:.0f} MB (two parts: {found['parts_mb']:.0f} MB)"
            )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
