"""Reading a store from an object store, against the same store on local disk and zarr-python.

    python benchmarks/bench_remote.py --small
    python benchmarks/bench_remote.py --utterances 2000 --latency 0,5,20

A process of its own serves the folder of the store as an S3 bucket (tests/s3_server.py; moto, which
the tests use, is slower than what is measured here) and adds the latency to every request. Each row
begins with an open store and none of its frames in memory. "cold" fills an empty local copy, "warm"
has one that another run filled, "off" has none. MB/s are those of the frames asked for, as stored;
the ratio is to local disk, page cache warm, same access, same round; medians over the rounds. The
first line of a latency is the ceiling: the same bytes in requests of 8 MiB, 16 at a time, thrown
away.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from s3_server import Gateway, Request, serve_folder, settings

DIM, MEAN_FRAMES, BATCH = 1024, 250, 32
BUCKET = "bench"


def serve(root: Path) -> None:
    """Serve a folder until standard input ends; ``/-/…`` sets latency and tells what was asked."""
    files = serve_folder(root)

    def answer(method: str, path: str, headers: dict[str, str], body: bytes):
        if not path.startswith("/-/"):
            return files(method, path, headers, body)
        if path.startswith("/-/latency/"):
            gateway.latency_s = float(path.rsplit("/", 1)[1]) / 1000
        asked: list[Request] = [r for r in gateway.log if r.bytes and not r.path.startswith("/-/")]
        gateway.forget()
        told = {"requests": len(asked), "bytes": sum(r.bytes for r in asked)}
        return 200, {}, json.dumps(told).encode()

    gateway = Gateway(answer)
    with gateway.running():
        print(gateway.url, flush=True)
        sys.stdin.read()


@dataclass
class Row:
    """One measurement: bytes of frames asked for; requests and bytes that the server saw."""

    name: str
    seconds: float
    bytes: int
    requests: int = 0
    fetched: int = 0

    @property
    def speed(self) -> float:
        """Return MB/s."""
        return self.bytes / self.seconds / 1e6


def make_store(root: Path, utterances: int) -> tuple[str, list[bytes]]:
    from mer.cache.home import Cache
    from mer.cache.spec import FeatureSpec, OutputSpec

    output = OutputSpec(name="final", dim=DIM, rate_hz=50.0)
    spec = FeatureSpec(slug="bench", identity={"benchmark": "remote"}, outputs=(output,))
    store = Cache(root / BUCKET).open(spec, create=True)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4 * MEAN_FRAMES, DIM)).astype(np.float16)
    keys = []
    with store.writer() as writer:
        for _ in range(utterances):
            length = int(np.clip(rng.gamma(4, MEAN_FRAMES / 4), 10, 4 * MEAN_FRAMES))
            keys.append(rng.bytes(16))
            writer.add(keys[-1], 320 * length, {"final": noise[:length]})
    return store.name, keys


def epoch(store, keys: list[bytes]) -> int:
    total = 0
    for _, batch in store.epoch(BATCH, "final", dtype="float16", seed=1):
        total += int(batch.lengths.sum())
    return total * DIM * 2


def random_batches(store, keys: list[bytes]) -> int:
    order = np.random.default_rng(2).permutation(len(keys))
    total = 0
    for start in range(0, len(keys), BATCH):
        some = [keys[i] for i in order[start : start + BATCH]]
        total += int(store.batch(some, "final", dtype="float16").lengths.sum())
    return total * DIM * 2


def zarr_epoch(url: str, shuffled: bool, limit: int = 8 * BATCH) -> int:
    """Read utterances through zarr-python: a batch in storage order at once, or at random."""
    import zarr
    import zarr.storage
    from obstore.store import S3Store

    name = url.rsplit("/", 1)[1]
    store = S3Store(BUCKET, prefix=name, client_options={"allow_http": True})
    group = zarr.open_group(zarr.storage.ObjectStore(store, read_only=True), mode="r")
    spans = []
    for part in sorted(name for name, _ in group["parts"].groups()):
        frames = group[f"parts/{part}/final/frames"]
        offsets = group[f"parts/{part}/final/offsets"][:]
        spans += [(frames, int(a), int(b)) for a, b in zip(offsets, offsets[1:], strict=False)]
    if shuffled:
        order = np.random.default_rng(2).permutation(len(spans))
        spans = [spans[i] for i in order]
    total = 0
    if shuffled:
        for frames, a, b in spans[:limit]:
            total += frames[a:b].size
    else:
        for start in range(0, min(limit, len(spans)), BATCH):
            run = spans[start : start + BATCH]
            run = [span for span in run if span[0].name == run[0][0].name]
            total += run[0][0][run[0][1] : run[-1][2]].size
    return total * 2


def raw(url: str) -> int:
    """All frames, as fast as the library and the server can."""
    from mer.cache.objects import Bucket

    bucket = Bucket(url)
    pieces = []
    for listed in bucket.objects("parts"):
        if "/frames/c/" in listed.name:
            step = 8 << 20
            pieces += [
                (listed.name, a, min(a + step, listed.bytes)) for a in range(0, listed.bytes, step)
            ]
    with ThreadPoolExecutor(16) as pool:
        return sum(len(data) for data in pool.map(lambda p: bucket.get_range(*p), pieces))


def forget() -> None:
    """Empty the memory of this process, and let go of what it has mapped of the local copy."""
    from mer.cache import localcopy
    from mer.cache.nearby import memory

    memory.clear()
    localcopy._copies.clear()


def measure(
    name: str, act: Callable[[], int], tell: Callable[[], dict[str, int]] | None = None
) -> Row:
    if tell is not None:
        tell()
    began = time.perf_counter()
    num_bytes = act()
    seconds = time.perf_counter() - began
    told = {"requests": 0, "bytes": 0} if tell is None else tell()
    return Row(name, seconds, num_bytes, told["requests"], told["bytes"])


def opened(url: str, keys: list[bytes]):
    from mer.cache.store import Store

    store = Store(url)
    store.num_frames(keys, "final")
    return store


def run_round(
    root: Path, url: str, keys: list[bytes], latencies: list[float], endpoint: str
) -> list[list[Row]]:
    """Return one table per latency; the first is local disk."""
    local = opened(str(root / BUCKET / url.rsplit("/", 1)[1]), keys)
    accesses = {"epoch": epoch, "random": random_batches}
    tables = [[measure(name, lambda a=a: a(local, keys)) for name, a in accesses.items()]]
    copies = root / "copies"

    def tell() -> dict[str, int]:
        with urllib.request.urlopen(f"{endpoint}/-/stats") as response:
            return json.load(response)

    def open_with(where: str):
        forget()
        os.environ["MER_LOCAL_COPY"] = where
        return opened(url, keys)

    for latency in latencies:
        urllib.request.urlopen(f"{endpoint}/-/latency/{latency}").read()
        rows = [measure("ceiling", lambda: raw(url), tell)]
        for name, act in accesses.items():
            shutil.rmtree(copies, ignore_errors=True)
            for label, where in (("off", "off"), ("cold", str(copies)), ("warm", str(copies))):
                store = open_with(where)
                rows.append(measure(f"{name} {label}", lambda s=store, a=act: a(s, keys), tell))
        for label, shuffled in (("in order", False), ("random", True)):
            rows.append(
                measure(f"zarr-python, {label}", lambda s=shuffled: zarr_epoch(url, s), tell)
            )
        tables.append(rows)
    shutil.rmtree(copies, ignore_errors=True)
    return tables


def report(rounds: list[list[list[Row]]], latencies: list[float]) -> None:
    local = [{row.name: row.speed for row in tables[0]} for tables in rounds]
    for name in local[0]:
        speed = statistics.median(one[name] for one in local)
        print(f"local disk, {name:<28} {speed:8.0f} MB/s")
    for number, latency in enumerate(latencies, 1):
        print(f"\n+{latency:g} ms{'':<25} {'MB/s':>8} {'ratio':>7} {'requests':>9} {'KiB each':>9}")
        for index, row in enumerate(rounds[0][number]):
            rows = [tables[number][index] for tables in rounds]
            kind = "random" if "random" in row.name else "epoch"
            speed = statistics.median(one.speed for one in rows)
            ratio = statistics.median(
                one.speed / base[kind] for one, base in zip(rows, local, strict=True)
            )
            requests = statistics.median(one.requests for one in rows)
            each = statistics.median(one.fetched / max(1, one.requests) for one in rows) / 1024
            print(f"{row.name:<30} {speed:8.0f} {ratio:7.3f} {requests:9.0f} {each:9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--utterances", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", default="0,5,20", help="milliseconds, separated by commas")
    parser.add_argument("--small", action="store_true", help="250 utterances, one round")
    parser.add_argument("--folder", type=Path, help="where the store and its copy are made")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if options.small:
        options.utterances, options.rounds = 250, 1
    latencies = [float(text) for text in options.latency.split(",")]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        name, keys = make_store(root, options.utterances)
        command = [sys.executable, __file__, "--serve", str(root)]
        with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as server:
            endpoint = server.stdout.readline().strip()
            os.environ.update(settings(endpoint))
            url = f"s3://{BUCKET}/{name}"
            try:
                rounds = [
                    run_round(root, url, keys, latencies, endpoint) for _ in range(options.rounds)
                ]
            finally:
                server.stdin.close()
        frames = rounds[0][0][0].bytes
        print(
            f"{len(keys)} utterances, {frames / 1e6:.0f} MB of float16 frames, batches of {BATCH}"
        )
        report(rounds, latencies)


if __name__ == "__main__":
    main()
