"""Ragged features: our store, memory-mapped numpy and what others use, on identical data.

    python benchmarks/bench_store.py --small
    python benchmarks/bench_store.py --peer-python peers/bin/python --figure store.png

Every peer runs in a process of its own beside our store and a flat memory-mapped file. They take
turns batch by batch on the same random utterances, ratios are formed within a round, and the table
has the median over the rounds; 1.00 is the memory map, more is faster. One thread each. "raw" are
lists of arrays in memory of their own, "f16" and "f32" zero-padded torch tensors whose memory is
used again. Freed memory is kept by the process (MALLOC_TRIM_THRESHOLD_): whoever has to ask the
system for pages anew would otherwise lose by chance.

Warm: both were loaded into the page cache by the same long reads and read once, so that what our
store verifies at first touch is verified. Cold: every file was synced and its pages dropped
(POSIX_FADV_DONTNEED, checked with mincore) before a fresh process opened it; whatever lies behind
the disk may still have them. Batches and scan then include the opening, single utterances do not;
our figures include verifying checksums, which no peer does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import KINDS, PEERS, Data, Memmap, Mer, Peer, ZarrPython, make_data, size_of

# name, heading, utterances per batch, type of the padded tensor (None: a list of arrays)
BATCHES = [
    ("raw 32", 32, None),
    ("raw 128", 128, None),
    ("f16 32", 32, "float16"),
    ("f16 128", 128, "float16"),
    ("f32 32", 32, "float32"),
    ("f32 128", 128, "float32"),
]
WARM = [*(name for name, _, _ in BATCHES), "scan", "latency"]
COLD = ["cold f16 32", "cold scan", "cold latency"]
PACKAGES = ["numpy", "torch", "zarr", "h5py", "pyarrow", "safetensors", "lhotse", "datasets"]
COLD_BATCHES = 4
COLD_SINGLES = 60
COLD_SCANNED = 500
COLD_ROUNDS = 3  # at most; a cold round takes far longer than a warm one
GROUP = 16  # single utterances in a row before it is the next one's turn
PACE_S = 0.5  # a peer gets as many utterances per measurement as it reads in this time
TARGET = 0.95
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}


# The page cache


def files_below(folder: Path) -> Iterator[str]:
    for at, _, names in os.walk(folder):
        yield from (os.path.join(at, name) for name in names)


def drop(folder: Path) -> float:
    """Drop the pages of all files and return the share of them that stayed."""
    resident = pages = 0
    for path in files_below(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            stayed, total = _residency(descriptor)
        finally:
            os.close(descriptor)
        resident, pages = resident + stayed, pages + total
    return resident / max(1, pages)


def _residency(descriptor: int) -> tuple[int, int]:
    size = os.fstat(descriptor).st_size
    if not size:
        return 0, 0
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        anchor = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(anchor))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), flags)
        del anchor  # it keeps the map from being closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return int((np.frombuffer(flags, np.uint8) & 1).sum()), pages


def load(folder: Path) -> None:
    """Bring all files into the page cache by long reads.

    The kernel keeps pages in larger or smaller folios by how they came in, which is up to a fifth
    of the speed of copying: all have to come in the same way.
    """
    drop(folder)
    buffer = bytearray(8 << 20)
    for path in files_below(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# One peer, in its own process


class Bench:
    """Memory map, our store and one peer on the same data; the peer may be one of the first two."""

    def __init__(self, folder: Path, name: str, seed: int) -> None:
        import torch

        self.data = data = Data(folder / "data")
        size = 128 * int(data.lengths.max()) * data.dim
        self.memory = {
            "float16": torch.zeros(size, dtype=torch.float16),
            "float32": torch.zeros(size, dtype=torch.float32),
        }
        self.rng = np.random.default_rng(seed)
        self.folder = folder
        self.kinds: dict[str, type[Peer]] = {"memmap": Memmap, "mer": Mer}
        self.kinds.setdefault(name, KINDS[name])

    def place(self, name: str) -> Path:
        """Return where a peer's files lie."""
        shared = {"memmap": "data", ZarrPython.name: "mer"}
        return self.folder / shared.get(name, name)

    def _make(self, name: str) -> Peer:
        return self.kinds[name](self.place(name), self.data)

    def turns(self, number: int) -> list[str]:
        """Return who is when: everybody is first, second and last equally often."""
        names = list(self.kinds)
        return names[number % len(names) :] + names[: number % len(names)]

    def rows(self, count: int) -> list[int]:
        """Return random distinct rows, again from the start when there are no more."""
        whole, rest = divmod(count, len(self.data))
        orders = [self.rng.permutation(len(self.data)) for _ in range(whole + (rest > 0))]
        return np.concatenate(orders)[:count].tolist()

    def cold_round(self) -> dict[str, dict[str, float]]:
        """Return per measurement and peer the seconds, and the share of pages that stayed."""
        results: dict[str, dict[str, float]] = {name: {} for name in COLD}
        rows = self.rows(min(len(self.data), COLD_BATCHES * 32))
        singles = self.rows(min(len(self.data), COLD_SINGLES))
        scanned = min(len(self.data), COLD_SCANNED)
        share = self.data.offsets[scanned] * self.data.dim * 2 / 2**20
        jobs: dict[str, Callable[[Peer], list[float]]] = {
            "cold f16 32": lambda peer: [_opening(peer) + sum(self._batches(peer, rows))],
            "cold scan": lambda peer: [_opening(peer) / share + _scanning(peer, scanned)],
            "cold latency": lambda peer: [_opening(peer), *_one_by_one(peer, singles)][1:],
        }
        for number, (measurement, job) in enumerate(jobs.items()):
            for name in self.turns(number):
                left = drop(self.place(name))
                seconds = _apart(lambda name=name, job=job: job(self._make(name)))
                found = results[measurement]
                found[f"{name} resident"] = left
                if measurement == "cold latency":
                    found[name], found[f"{name} p95"] = np.percentile(seconds, [50, 95]).tolist()
                else:
                    found[name] = sum(seconds)
        return results

    def warm_up(self) -> None:
        """Open everything and read all of it once; check the values of some utterances."""
        for name in self.kinds:
            load(self.place(name))
        self.peers = {name: self._make(name) for name in self.kinds}
        for peer in self.peers.values():
            peer.open()
        flat = self.data.map()
        for name, peer in self.peers.items():
            for row in self.rows(5):
                expected = flat[self.data.offsets[row] : self.data.offsets[row + 1]]
                _check(peer, peer.get(row), expected, f"{name}, utterance {row}")
        for name in ("memmap", "mer"):
            for _ in self.peers[name].scan():
                pass
        last = list(self.peers)[-1]
        some = self.rows(16)
        begin = time.perf_counter()
        self.peers[last].gather(some)
        pace = (time.perf_counter() - begin) / len(some)
        self.per_measurement = int(np.clip(PACE_S / pace, 128, 1024)) // 128 * 128
        self.scanned = int(np.clip(2 * PACE_S / pace, 128, len(self.data)))

    def warm_round(self) -> dict[str, dict[str, float]]:
        """Return per measurement and peer the seconds for the same utterances."""
        results: dict[str, dict[str, float]] = {}
        for measurement, size, dtype in BATCHES:
            total = dict.fromkeys(self.peers, 0.0)
            order = self.rows(self.per_measurement)
            for number, at in enumerate(range(0, len(order), size)):
                rows = order[at : at + size]
                for name in self.turns(number):
                    total[name] += self._batch(self.peers[name], rows, dtype)
            results[measurement] = total
        results["scan"] = {
            name: _scanning(self.peers[name], self.scanned) for name in self.turns(0)
        }
        results["latency"] = self._latency()
        return results

    def _batches(self, peer: Peer, rows: list[int]) -> list[float]:
        return [self._batch(peer, rows[at : at + 32], "float16") for at in range(0, len(rows), 32)]

    def _batch(self, peer: Peer, rows: list[int], dtype: str | None) -> float:
        if dtype is None:
            begin = time.perf_counter()
            peer.gather(rows)
            return time.perf_counter() - begin
        lengths = self.data.lengths[rows]
        begin = time.perf_counter()
        peer.pad(rows, lengths, self.memory[dtype])
        return time.perf_counter() - begin

    def _latency(self) -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in self.peers}
        order = self.rows(min(self.per_measurement, 512))
        for number, at in enumerate(range(0, len(order), GROUP)):
            for name in self.turns(number):
                seconds[name] += _one_by_one(self.peers[name], order[at : at + GROUP])
        found = {}
        for name, values in seconds.items():
            found[name], found[f"{name} p95"] = np.percentile(values, [50, 95]).tolist()
        return found


def _one_by_one(peer: Peer, rows: list[int]) -> list[float]:
    seconds = []
    for row in rows:
        begin = time.perf_counter()
        peer.get(row)
        seconds.append(time.perf_counter() - begin)
    return seconds


def _opening(peer: Peer) -> float:
    begin = time.perf_counter()
    peer.open()
    return time.perf_counter() - begin


def _scanning(peer: Peer, count: int) -> float:
    """Return the seconds per MiB of the first utterances in the peer's own order."""
    num_bytes = 0
    begin = time.perf_counter()
    for frames in islice(peer.scan(), count):
        num_bytes += frames.size * 2
    return (time.perf_counter() - begin) / num_bytes * 2**20


def _check(peer: Peer, got: np.ndarray, expected: np.ndarray, where: str) -> None:
    if peer.lossy:
        same = got.shape == expected.shape and np.abs(got - expected).max() < 0.05
    else:
        same = got.dtype == expected.dtype and np.array_equal(got, expected)
    if not same:
        raise AssertionError(f"{where}: not what was written.")


def _apart(job: Callable[[], list[float]]) -> list[float]:
    """Run a job in a fork, so that nothing it opens keeps pages in memory afterwards."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as out:
                json.dump(job(), out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as source:
        text = source.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("A cold measurement failed.")
    return json.loads(text)


def measure(folder: Path, name: str, rounds: int, cold: bool, seed: int) -> dict[str, Any]:
    """Return everything measured of one peer, or which package it lacks."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    bench = Bench(folder, name, seed)
    place = bench.place(name)
    begin = time.perf_counter()
    if not place.exists():
        place.mkdir()
        try:
            KINDS[name](place, bench.data).write()
        except ImportError as error:
            shutil.rmtree(place)
            return {"missing": error.name}
    files, num_bytes = size_of(place)
    result: dict[str, Any] = {
        "write_s": time.perf_counter() - begin,
        "files": files,
        "bytes": num_bytes,
    }
    result["cold"] = [bench.cold_round() for _ in range(min(rounds, COLD_ROUNDS) * cold)]
    bench.warm_up()
    bench.warm_round()
    result["warm"] = [bench.warm_round() for _ in range(rounds)]
    if name not in ("mer", ZarrPython.name):
        shutil.rmtree(place)
    return result


# All of them


def run_peer(python: str, folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [python, __file__, "--child", name, "--folder", str(folder)]
    command += ["--rounds", str(options.rounds), *([] if options.cold else ["--no-cold"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "hf"), **KEEP_MEMORY}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return medians over rounds: speed relative to the memory map, latencies in ms."""
    table: dict[str, dict[str, float]] = {}
    both: list[Mapping[str, Mapping[str, float]]] = []  # these two are measured beside everybody
    pooled = {"memmap": both, "mer": both}
    for name, result in results.items():
        if "warm" in result:
            pairs = zip_longest(result["warm"], result["cold"], fillvalue={})
            rounds = [{**warm, **cold} for warm, cold in pairs]
            both += rounds
            if name != "mer":
                pooled[name] = rounds
    for name, rounds in pooled.items():
        row = table.setdefault(name, {})
        for measurement in WARM + COLD:
            found = [r[measurement] for r in rounds if measurement in r]
            if not found:
                continue
            ratios = [f["memmap"] / f[name] for f in found]
            row[measurement] = statistics.median(ratios)
            row[f"{measurement} least"], row[f"{measurement} most"] = min(ratios), max(ratios)
            row[f"{measurement} ours"] = statistics.median(f[name] / f["mer"] for f in found)
            if "latency" in measurement:
                row[f"{measurement} p50 ms"] = 1e3 * statistics.median(f[name] for f in found)
                row[f"{measurement} p95 ms"] = 1e3 * statistics.median(
                    f[f"{name} p95"] for f in found
                )
    return table


def cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def tables(results: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables: warm, cold, and how far ahead we are."""
    batches = [name for name, _, _ in BATCHES]
    times = ["p50 ms", "p95 ms"]
    rest = [name for name in results if name not in ("memmap", "mer")]
    yield "Warm: speed relative to memory-mapped numpy, and the latency of one utterance"
    yield from _head([*batches, "scan", "latency", *times, "files", "MiB"])
    for name in ["memmap", "mer", *rest]:
        result, row = results.get(name, {}), summary.get(name)
        if row is None:
            yield f"| {KINDS[name].label} | {why(result)} |"
            continue
        cells = [cell(row.get(key)) for key in WARM]
        cells += [cell(row[f"latency {p}"], 3) for p in times]
        cells += [f"{result['files']:,}", f"{result['bytes'] / 2**20:,.0f}"] if result else ["", ""]
        yield f"| {KINDS[name].label} | " + " | ".join(cells) + " |"
    if COLD[0] in summary["mer"]:
        yield from ("", "Cold: the same")
        yield from _head(["f16 32", "scan", "latency", *times])
        for name in ["memmap", "mer", *(name for name in rest if name in summary)]:
            row = summary[name]
            cells = [cell(row.get(key)) for key in COLD]
            cells += [cell(row.get(f"cold latency {p}"), 3) for p in times]
            yield f"| {KINDS[name].label} | " + " | ".join(cells) + " |"
    yield from ("", "How many times as fast mer is")
    keys = [key for key in [*WARM, *COLD] if key in summary["mer"]]
    yield from _head(keys)
    for name in ["memmap", *(name for name in rest if name in summary)]:
        cells = [cell(summary[name].get(f"{key} ours")) for key in keys]
        yield f"| {KINDS[name].label} | " + " | ".join(cells) + " |"


def _head(columns: list[str]) -> Iterator[str]:
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" + "|--:" * len(columns) + "|"


def why(result: Mapping[str, Any]) -> str:
    """Return why there are no figures of a peer."""
    return result.get("failed") or f"not installed ({result['missing']})"


def verdict(results: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """Return the targets and whether they are met."""
    ours = summary["mer"]
    lines = []
    stayed = [
        share
        for result in results.values()
        for cold in result.get("cold", [])
        for found in cold.values()
        for key, share in found.items()
        if key.endswith("resident")
    ]
    if stayed:
        lines.append(f"pages that stayed although they were dropped: at most {max(stayed):.1%}")
    for key in ("f16 32", "f16 128", "f32 32", "f32 128"):
        met = "met" if ours[key] >= TARGET else "MISSED"
        spread = f"{ours[f'{key} least']:.2f} to {ours[f'{key} most']:.2f}"
        lines.append(
            f"padded {key}: {ours[key]:.3f} of memmap ({spread} by round; ≥ {TARGET}: {met})"
        )
    peers = {name: row for name, row in summary.items() if name not in ("mer", "memmap")}
    for key in WARM:
        ahead = [name for name, row in peers.items() if row[f"{key} ours"] < 1]
        lines.append(f"{key}: " + (f"BEHIND {', '.join(ahead)}" if ahead else "ahead of all peers"))
    return lines


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Draw speed relative to the memory map, one panel per kind of access."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    panels = [
        ("f16 32", "batches of 32, padded, warm"),
        ("latency", "single utterance, warm"),
        ("scan", "sequential scan, warm"),
        ("cold f16 32", "batches of 32, cold"),
    ]
    panels = [panel for panel in panels if panel[0] in summary["mer"]]
    names = sorted(summary, key=lambda name: summary[name]["f16 32"])
    figure = Figure(
        figsize=(3.4 * len(panels) + 2.2, 0.36 * len(names) + 1.3), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (key, title) in zip(axes, panels, strict=True):
        values = [summary[name].get(key, np.nan) for name in names]
        colours = ["#c1440e" if name == "mer" else "#7d8ca3" for name in names]
        axis.barh([KINDS[name].label for name in names], values, color=colours, height=0.72)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        low = min(0.01, 0.6 * np.nanmin(values))
        axis.set_xlim(low, 4 * max(1, np.nanmax(values)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        for at, value in enumerate(values):
            style = {"va": "center", "fontsize": 8, "bbox": {"color": "white", "pad": 0.6}}
            axis.text(value * 1.08, at, f"{value:.2f}", **style)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("speed relative to memory-mapped numpy (1.00; right is faster)", fontsize=9)
    figure.savefig(path, dpi=150)


def versions(python: str) -> dict[str, str]:
    """Return the versions of what the peers' interpreter has."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, check=True)
    return {"python": sys.version.split()[0], **json.loads(done.stdout)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="300 × 120 × 256 in 2 rounds")
    parser.add_argument("--utterances", type=int, help="number of utterances (2000)")
    parser.add_argument("--frames", type=int, help="mean frames per utterance (250)")
    parser.add_argument("--dim", type=int, help="width of a frame (1024)")
    parser.add_argument("--rounds", type=int, help="measurements of each kind (5)")
    parser.add_argument("--peers", help="comma-separated names; all by default: " + " ".join(KINDS))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with the peers")
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="warm only")
    parser.add_argument("--folder", type=Path, help="where to put the data (default: temporary)")
    parser.add_argument("--json", type=Path, help="write everything measured")
    parser.add_argument("--figure", type=Path, help="write a bar chart (PNG)")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {"utterances": 300, "frames": 120, "dim": 256, "rounds": 2} if options.small else {}
    for key, value in {"utterances": 2000, "frames": 250, "dim": 1024, "rounds": 5}.items():
        if getattr(options, key) is None:
            setattr(options, key, sizes.get(key, value))
    return options


def main() -> int:
    options = parse()
    if options.child:
        seed = list(KINDS).index(options.child)
        print(
            json.dumps(measure(options.folder, options.child, options.rounds, options.cold, seed))
        )
        return 0
    names = options.peers.split(",") if options.peers else [kind.name for kind in PEERS]
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        sys.exit(f"unknown peers {', '.join(unknown)}; there are {', '.join(KINDS)}")
    folder = Path(tempfile.mkdtemp(prefix="bench_store.", dir=options.folder))
    results: dict[str, dict[str, Any]] = {}
    try:
        data = make_data(folder / "data", options.utterances, options.frames, options.dim)
        num_bytes = data.path.stat().st_size
        (folder / "mer").mkdir()
        Mer(folder / "mer", data).write()
        for name in ["mer", *(name for name in names if name not in ("memmap", "mer"))]:
            print(f"measuring {name}", file=sys.stderr, flush=True)
            results[name] = run_peer(options.peer_python, folder, name, options)
            if "failed" in results["mer"]:
                return 1
    finally:
        shutil.rmtree(folder)
    summary = summarise(results)
    about = {
        "utterances": options.utterances,
        "bytes": num_bytes,
        "rounds": options.rounds,
        "cpus": os.cpu_count(),
        "versions": versions(options.peer_python),
    }
    print(
        f"{options.utterances:,} utterances, {options.frames} × {options.dim} float16, "
        f"{num_bytes / 2**20:,.0f} MiB, {options.rounds} rounds"
    )
    print("\n".join([*tables(results, summary), "", *verdict(results, summary)]))
    if options.json:
        text = json.dumps({"about": about, "summary": summary, "results": results}, indent=1)
        options.json.write_text(text + "\n")
    if options.figure:
        draw(summary, options.figure)
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
