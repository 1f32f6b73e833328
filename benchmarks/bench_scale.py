"""How opening, look-up and planning grow with the number of utterances.

    python benchmarks/bench_scale.py --small
    python benchmarks/bench_scale.py --figure scale.png

The store is simulated: manifests, keys, offsets and lengths are real, shards and pooled statistics
are holes of the right size that nobody reads (10⁶ utterances would fill 500 GB). Parts hold 128
utterances of 250 × 1,024 float16, 64 MiB. Everything is measured in fresh processes, imports left
out, files in the page cache; medians over rounds. Peers keep the same keys in what is at hand: a
dictionary in an .npy file, a table of SQLite, a data set per utterance in HDF5, a file per
utterance in a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import xxhash

from mer.cache import layout
from mer.cache.home import Cache
from mer.cache.spec import FeatureSpec, OutputSpec

PART_UTTERANCES = 128
MEAN_FRAMES = 250
DIM = 1024
LOOKUP = 100_000
PER_FOLDER = 1000  # recordings
MOST_H5_DATASETS = 100_000  # a million take minutes to create
OLD_NS = 1_600_000_000_000_000_000


class Extractor:
    """What planning wants to know of one."""

    modality = "audio"
    outputs = (OutputSpec(name="final", dim=DIM, rate_hz=50.0),)
    spec = FeatureSpec(slug="bench", identity={"name": "bench", "version": 1}, outputs=outputs)


# A store that is all index


def write_store(root: Path, keys: np.ndarray) -> None:
    """Write a store of a million utterances in minutes: no data, and no syncing."""
    store = Cache(root).open(Extractor.spec, create=True)
    assert store is not None
    (output,) = Extractor.outputs
    parts = store.path / layout.PARTS
    count = len(keys)
    rng = np.random.default_rng(0)
    for begin in range(0, count, PART_UTTERANCES):
        some = keys[begin : begin + PART_UTTERANCES]
        lengths = np.maximum(1, rng.gamma(4.0, MEAN_FRAMES / 4.0, len(some)).astype(np.int64))
        part = layout.part_id(key.tobytes() for key in some)
        _write_part(parts / part, part, store.fingerprint, output, some, lengths, rng)


def all_keys(count: int) -> np.ndarray:
    """Return the keys of the recordings of ``write_recordings``, (count, 16) uint8."""
    from mer.cache.identity import audio_key

    keys = (audio_key(_content(i), None, None, None) for i in range(count))
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)


def _content(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def _write_part(
    folder: Path,
    part: str,
    fingerprint: str,
    output: OutputSpec,
    keys: np.ndarray,
    lengths: np.ndarray,
    rng: np.random.Generator,
) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_frames, name = int(offsets[-1]), output.name
    rows = layout.chunk_rows(num_frames)
    num_chunks = -(-num_frames // rows)
    shard = num_chunks * (rows * output.dim * 2 + layout.CRC_BYTES + layout.INDEX_ENTRY_BYTES)
    files: dict[str, dict[str, Any]] = {}
    folder.mkdir()
    _put(folder, files, f"{name}/{layout.METADATA}", layout.to_bytes(layout.group_document()))
    for array, values in {
        layout.KEY: keys,
        layout.INPUT_LENGTH: lengths * 320,
        f"{name}/{layout.OFFSETS}": offsets,
    }.items():
        data = np.ascontiguousarray(values, layout.little(values.dtype.name)).tobytes()
        data += google_crc32c.value(data).to_bytes(layout.CRC_BYTES, "little")
        _put(folder, files, f"{array}/{layout.chunk_file(values.ndim)}", data)
        document = layout.array_document(values.shape, values.dtype.name)
        _put(folder, files, f"{array}/{layout.METADATA}", layout.to_bytes(document))
    pooled = (len(keys), 2, output.dim)
    holes = {
        f"{name}/{layout.FRAMES}/{layout.chunk_file(2)}": shard + layout.CRC_BYTES,
        f"{name}/{layout.POOLED}/{layout.chunk_file(3)}": 4 * int(np.prod(pooled)) + 4,
    }
    for file, size in holes.items():
        path = folder / file
        path.parent.mkdir(parents=True)
        with path.open("xb") as sparse:
            sparse.truncate(size)
        files[file] = {"bytes": size, "xxh3": rng.bytes(16).hex()}
    document = layout.frames_document(num_frames, output.dim, output.dtype, rows)
    _put(folder, files, f"{name}/{layout.FRAMES}/{layout.METADATA}", layout.to_bytes(document))
    document = layout.array_document(pooled, "float32")
    _put(folder, files, f"{name}/{layout.POOLED}/{layout.METADATA}", layout.to_bytes(document))
    crcs = layout.crc_text(rng.integers(0, 2**32, num_chunks).tolist())
    fields = {"frames": num_frames, "dtype": output.dtype, "chunk_frames": rows, "crc32c": crcs}
    mer = {
        "format": layout.FORMAT_VERSION,
        "store": fingerprint,
        "part": part,
        "utterances": len(keys),
        "outputs": {name: fields},
        "files": dict(sorted(files.items())),
    }
    _put(folder, {}, layout.METADATA, layout.to_bytes(layout.group_document(mer)))


def _put(folder: Path, files: dict[str, dict[str, Any]], name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    files[name] = {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}


def recording(root: Path, number: int) -> Path:
    return root / "recordings" / f"{number // PER_FOLDER:04d}" / f"{number:07d}.wav"


def write_recordings(root: Path, count: int) -> None:
    """Create empty files that the memo claims to have read: planning only looks at their state."""
    from mer.extract.inputs import MEMO_NAME, MEMO_VERSION

    files = {}
    for number in range(count):
        path = recording(root, number)
        if number % PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644))
        os.utime(path, ns=(OLD_NS, OLD_NS))
        stat = os.stat(path)
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        files[str(path)] = [*state, _content(number).hex(), 5.0, 16_000, 1]
    text = json.dumps({"version": MEMO_VERSION, "files": files})
    (root / MEMO_NAME).write_text(text)


# What a fresh process does


def rss_peak() -> int:
    """Return the largest resident size so far in bytes, pages of mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def _some(keys: np.ndarray) -> list[bytes]:
    rng = np.random.default_rng(1)
    chosen = keys[rng.integers(0, len(keys), LOOKUP)]
    return [key.tobytes() for key in chosen]


def child_open(root: Path, count: int) -> dict[str, float]:
    """Open the store and look up 100,000 keys."""
    wanted = _some(np.load(root / "keys.npy"))
    cache = Cache(root)
    before = rss_peak()
    begin = time.perf_counter()
    store = cache.open(Extractor.spec)
    assert store is not None
    assert len(store) == count  # the index is there
    opened = time.perf_counter()
    assert store.contains(wanted).all()
    found = time.perf_counter()
    lengths = store.num_frames(wanted)
    done = time.perf_counter()
    assert lengths.min() > 0
    return {
        "open": opened - begin,
        "lookup": found - opened,
        "num_frames": done - found,
        "bytes": rss_peak() - before,
    }


def child_plan(root: Path, count: int) -> dict[str, float]:
    """Plan a corpus of which everything is stored."""
    from mer.extract.contract import Source
    from mer.extract.plan import plan

    sources = [Source(id=f"{i:07d}", path=recording(root, i)) for i in range(count)]
    cache = Cache(root)
    before = rss_peak()
    begin = time.perf_counter()
    planned = plan(sources, [("bench", Extractor())], cache)
    seconds = time.perf_counter() - begin
    (feature,) = planned.features
    assert (feature.reused, feature.missing) == (count, []), (feature.reused, planned.failures)
    return {"plan": seconds, "bytes": rss_peak() - before}


def child_stat(root: Path, count: int) -> dict[str, float]:
    """Look at the state of every recording: less does not tell that nothing changed."""
    paths = [str(recording(root, i)) for i in range(count)]
    begin = time.perf_counter()
    for path in paths:
        os.stat(path)
    return {"plan": time.perf_counter() - begin}


def child_npy_dict(root: Path, count: int) -> dict[str, float]:
    wanted = _some(np.load(root / "keys.npy"))
    begin = time.perf_counter()
    table = np.load(root / "dict.npy", allow_pickle=True).item()
    opened = time.perf_counter()
    assert all(key in table for key in wanted)
    return {"open": opened - begin, "lookup": time.perf_counter() - opened}


def child_sqlite3(root: Path, count: int) -> dict[str, float]:
    wanted = _some(np.load(root / "keys.npy"))
    begin = time.perf_counter()
    table = sqlite3.connect(root / "keys.db")
    (number,) = table.execute("SELECT COUNT(*) FROM keys").fetchone()
    opened = time.perf_counter()
    assert number == count
    cursor = table.cursor()
    for key in wanted:
        cursor.execute("SELECT part, row FROM keys WHERE key = ?", (key,))
        assert cursor.fetchone() is not None
    return {"open": opened - begin, "lookup": time.perf_counter() - opened}


def child_h5py(root: Path, count: int) -> dict[str, float]:
    import h5py

    wanted = [key.hex() for key in _some(np.load(root / "keys.npy"))]
    begin = time.perf_counter()
    file = h5py.File(root / "keys.h5", "r")
    assert len(file) == count
    opened = time.perf_counter()
    assert all(key in file for key in wanted)
    return {"open": opened - begin, "lookup": time.perf_counter() - opened}


def child_files(root: Path, count: int) -> dict[str, float]:
    numbers = np.random.default_rng(1).integers(0, count, LOOKUP).tolist()
    wanted = [str(recording(root, number)) for number in numbers]
    begin = time.perf_counter()
    assert sum(len(names) for _, _, names in os.walk(root / "recordings")) == count
    opened = time.perf_counter()
    assert all(map(os.path.exists, wanted))
    return {"open": opened - begin, "lookup": time.perf_counter() - opened}


CHILDREN: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "open": child_open,
    "plan": child_plan,
    "stat": child_stat,
    "npy dict": child_npy_dict,
    "sqlite3": child_sqlite3,
    "h5py": child_h5py,
    "files": child_files,
}


# All of it


def write_peers(root: Path, keys: np.ndarray) -> list[str]:
    """Keep the keys as others do; return the names of those that are there."""
    names = ["npy dict", "sqlite3", "files"]
    rows = [(key.tobytes(), *divmod(i, PART_UTTERANCES)) for i, key in enumerate(keys)]
    table: Any = {key: (part, row) for key, part, row in rows}
    np.save(root / "dict.npy", table, allow_pickle=True)
    with sqlite3.connect(root / "keys.db") as database:
        columns = "key BLOB PRIMARY KEY, part INTEGER, row INTEGER"
        database.execute(f"CREATE TABLE keys ({columns}) WITHOUT ROWID")
        database.executemany("INSERT INTO keys VALUES (?, ?, ?)", sorted(rows))
    database.close()
    if len(keys) <= MOST_H5_DATASETS:
        import h5py

        with h5py.File(root / "keys.h5", "w", libver="latest") as file:
            for key, _, _ in rows:
                file.create_dataset(key.hex(), shape=(1,), dtype="f2")
        names.append("h5py")
    return names


def run(name: str, root: Path, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, "--folder", str(root)]
    done = subprocess.run(
        [*command, "--utterances", str(count)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def measure(root: Path, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Build everything for ``count`` utterances, measure it, remove it."""
    log(f"{count:,} utterances: building")
    root.mkdir()
    keys = all_keys(count)
    np.save(root / "keys.npy", keys)
    write_store(root, keys)
    write_recordings(root, count)
    peers = write_peers(root, keys)
    log(f"{count:,} utterances: measuring")
    (store,) = Cache(root).stores()
    snapshot = store.path.with_name(store.path.name + layout.INDEX_SUFFIX)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CHILDREN}
    run("plan", root, count)  # the first of all reads from the disk
    for _ in range(rounds):
        snapshot.unlink(missing_ok=True)
        first = run("open", root, count)
        for name in CHILDREN:
            if name in ("open", "plan", "stat", *peers):
                found[name].append(run(name, root, count))
        found["open"][-1] |= {"first": first["open"], "first bytes": first["bytes"]}
    result = {
        name: {key: statistics.median(r[key] for r in values) for key in values[0]}
        for name, values in found.items()
        if values
    }
    planned = result.pop("plan")
    result["mer"] = {**planned, "plan bytes": planned["bytes"], **result.pop("open")}
    shutil.rmtree(root)
    return result


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def table(results: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Iterable[str]:
    yield "| | " + " | ".join(f"{count:,}" for count in results) + " |"
    yield "|---" * (len(results) + 1) + "|"
    rows = [
        ("first open, no snapshot", "mer", "first"),
        ("open, with snapshot", "mer", "open"),
        ("· dictionary in an .npy", "npy dict", "open"),
        ("· SQLite, count", "sqlite3", "open"),
        ("· HDF5, data set per utterance", "h5py", "open"),
        ("· folder of files, listed", "files", "open"),
        ("look up 100,000 keys", "mer", "lookup"),
        ("· dictionary in an .npy", "npy dict", "lookup"),
        ("· SQLite", "sqlite3", "lookup"),
        ("· HDF5", "h5py", "lookup"),
        ("· folder of files", "files", "lookup"),
        ("lengths of 100,000 keys", "mer", "num_frames"),
        ("plan, all stored", "mer", "plan"),
        ("· stat every recording", "stat", "plan"),
    ]
    for label, name, key in rows:
        cells = [seconds(result.get(name, {}).get(key)) for result in results.values()]
        yield f"| {label} | " + " | ".join(cells) + " |"
    for label, key in [
        ("memory, open and look-up", "bytes"),
        ("· without snapshot", "first bytes"),
        ("memory, plan", "plan bytes"),
    ]:
        cells = [f"{result['mer'][key] / 2**20:,.1f} MiB" for result in results.values()]
        yield f"| {label} | " + " | ".join(cells) + " |"


def verdict(results: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Iterable[str]:
    if len(results) > 1:
        (few, small), (many, large) = list(results.items())[-2:]
        grown = (large["mer"]["bytes"] - small["mer"]["bytes"]) / (many - few)
        yield f"memory of open and look-up grows by {grown:,.0f} bytes per utterance"
    ours = results.get(100_000, {}).get("mer")
    if ours is None:
        return
    for key, target in {"open": 0.1, "lookup": 1.0, "plan": 2.0}.items():
        met = "met" if ours[key] <= target else "MISSED"
        yield f"{key} of 100,000: {seconds(ours[key])} (≤ {seconds(target)}: {met})"


def draw(results: Mapping[int, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    counts = list(results)
    lines = [
        (0, "mer, with snapshot", "mer", "open"),
        (0, "mer, first time", "mer", "first"),
        (0, "SQLite, count", "sqlite3", "open"),
        (0, "dictionary in .npy", "npy dict", "open"),
        (0, "HDF5 data sets", "h5py", "open"),
        (0, "list files", "files", "open"),
        (1, "mer", "mer", "lookup"),
        (1, "SQLite", "sqlite3", "lookup"),
        (1, "dictionary in .npy", "npy dict", "lookup"),
        (1, "HDF5 data sets", "h5py", "lookup"),
        (1, "file exists", "files", "lookup"),
        (2, "mer", "mer", "plan"),
        (2, "stat every recording", "stat", "plan"),
    ]
    colours = {"sqlite3": "#4c72b0", "npy dict": "#55a868", "h5py": "#8172b3"}
    for number, label, name, key in lines:
        values = [result.get(name, {}).get(key, np.nan) for result in results.values()]
        colour = "#c1440e" if name == "mer" else colours.get(name, "#7d8ca3")
        style = "o--" if key == "first" else "o-"
        panels[number].plot(counts, values, style, color=colour, label=label, markersize=4)
    targets = {0: 0.1, 1: 1.0, 2: 2.0}
    titles = ["open", "look up 100,000 keys", "plan, everything stored"]
    for number, (axis, title) in enumerate(zip(panels, titles, strict=True)):
        axis.plot([100_000], [targets[number]], "k_", markersize=16, label="target at 100,000")
        axis.set(xscale="log", yscale="log", title=title, xlabel="utterances")
        axis.grid(alpha=0.3)
        axis.legend(
            fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16)
        )
    panels[0].set_ylabel("seconds")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="1,000 and 10,000 in one round")
    parser.add_argument("--sizes", default="10000,100000,1000000", help="numbers of utterances")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--folder", type=Path, help="where to put the data (default: temporary)")
    parser.add_argument("--json", type=Path, help="write everything measured")
    parser.add_argument("--figure", type=Path, help="write a plot (PNG)")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--utterances", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.folder, options.utterances)))
        return
    if options.small:
        options.sizes, options.rounds = "1000,10000", 1
    folder = Path(tempfile.mkdtemp(prefix="bench_scale.", dir=options.folder))
    results = {}
    try:
        for size in map(int, options.sizes.split(",")):
            results[size] = measure(folder / str(size), size, options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join([*table(results), "", *verdict(results)]))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
