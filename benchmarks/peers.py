# ruff: noqa: D102 - what the methods do is said once, at Peer
"""What others keep ragged features in, each used the way its own users would.

A peer writes the utterances of ``Data`` into a folder, opens it in another process and returns
utterances by row. Packages are imported inside the methods: what is not installed is a row less.
B utterances of a batch, T frames, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

OUTPUT = "final"
BLOCK_ROWS = 64  # utterances read or written at once where that is a choice


class Data:
    """Utterances behind each other in one flat float16 file, and where each begins.

    Parameters
    ----------
    folder : Path
        Holds ``flat.f16``, ``offsets.npy`` (N + 1) and ``keys.npy`` (N, 16) uint8.
    """

    def __init__(self, folder: Path) -> None:
        self.offsets = np.load(folder / "offsets.npy")
        self.lengths = np.diff(self.offsets)
        self.keys = [row.tobytes() for row in np.load(folder / "keys.npy")]
        self.path = folder / "flat.f16"
        self.dim = self.path.stat().st_size // 2 // int(self.offsets[-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def map(self) -> np.ndarray:
        """Return all frames, memory-mapped. Private, so that torch takes views without a word."""
        shape = (int(self.offsets[-1]), self.dim)
        return np.asarray(np.memmap(self.path, np.float16, "c", shape=shape))

    def utterances(self) -> Iterator[np.ndarray]:
        """Yield (T, D) float16 arrays in row order."""
        flat = self.map()
        for start, stop in pairwise(self.offsets.tolist()):
            yield flat[start:stop]


def make_data(folder: Path, count: int, mean_frames: int, dim: int) -> Data:
    """Write random utterances: gamma-distributed lengths, values that change slowly in time."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lengths = np.maximum(1, rng.gamma(4.0, mean_frames / 4.0, count).astype(np.int64))
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(folder / "keys.npy", rng.integers(0, 256, (count, 16), np.uint8))
    scale = rng.lognormal(-1.0, 0.5, dim).astype(np.float32)
    with (folder / "flat.f16").open("wb") as flat:
        for length in lengths.tolist():
            noise = rng.standard_normal((length + 2, dim), dtype=np.float32)
            frames = (noise[2:] + 0.8 * noise[1:-1] + 0.5 * noise[:-2]) * scale
            flat.write(frames.astype(np.float16).tobytes())
    return Data(folder)


class Peer:
    """One way to keep utterances.

    Attributes
    ----------
    name, label : str
        On the command line, and in the table.
    lossy : bool
        Whether values come back changed.
    """

    name = ""
    label = ""
    lossy = False

    def __init__(self, folder: Path, data: Data) -> None:
        self.folder = folder
        self.data = data

    def write(self) -> None:
        """Store every utterance below the folder, which is there and empty."""
        raise NotImplementedError

    def open(self) -> None:
        """Prepare for reading what ``write`` left."""
        raise NotImplementedError

    def get(self, row: int) -> np.ndarray:
        """Return an utterance, (T, D), in memory of its own."""
        raise NotImplementedError

    def gather(self, rows: Sequence[int]) -> Sequence[np.ndarray]:
        """Return several utterances."""
        return [self.get(row) for row in rows]

    def copy(self, row: int, out: Any) -> None:
        """Copy an utterance into a (T, D) tensor."""
        import torch

        out.copy_(torch.from_numpy(self.get(row)))

    def pad(self, rows: Sequence[int], lengths: np.ndarray, memory: Any) -> Any:
        """Fill the front of one-dimensional ``memory`` with a zero-padded (B, Tmax, D) tensor."""
        batch = self._front(lengths, memory)
        for i, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            self.copy(row, batch[i, :length])
            batch[i, length:] = 0
        return batch

    def scan(self) -> Iterator[np.ndarray]:
        """Yield all utterances in the order that is best for the store."""
        yield from (self.get(row) for row in range(len(self.data)))

    def _front(self, lengths: np.ndarray, memory: Any) -> Any:
        shape = (len(lengths), int(lengths.max()), self.data.dim)
        return memory[: shape[0] * shape[1] * shape[2]].view(shape)


class Memmap(Peer):
    """The yardstick: one flat file, mapped, and where each utterance begins."""

    name = "memmap"
    label = "memory-mapped numpy"

    def write(self) -> None:
        """Nothing: it is the data itself."""

    def open(self) -> None:
        self.flat = self.data.map()
        self.offsets = self.data.offsets.tolist()

    def view(self, row: int) -> np.ndarray:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    def get(self, row: int) -> np.ndarray:
        return self.view(row).copy()

    def copy(self, row: int, out: Any) -> None:
        import torch

        out.copy_(torch.from_numpy(self.view(row)))


class Mer(Peer):
    """Our store."""

    name = "mer"
    label = "mer"

    def write(self) -> None:
        from mer.cache.home import Cache
        from mer.cache.spec import FeatureSpec, OutputSpec

        output = OutputSpec(name=OUTPUT, dim=self.data.dim, rate_hz=50.0)
        identity = {"name": "bench", "version": 1}
        spec = FeatureSpec(slug="bench", identity=identity, outputs=(output,))
        store = Cache(self.folder).open(spec, create=True)
        assert store is not None
        with store.writer() as writer:
            for key, frames in zip(self.data.keys, self.data.utterances(), strict=True):
                writer.add(key, len(frames), {OUTPUT: frames})

    def open(self) -> None:
        from mer.cache.home import Cache

        (self.store,) = Cache(self.folder).stores()

    def get(self, row: int) -> np.ndarray:
        return self.store.frames(self.data.keys[row], OUTPUT)

    def pad(self, rows: Sequence[int], lengths: np.ndarray, memory: Any) -> Any:
        import torch

        out = memory.numpy()
        data = self.store.batch([self.data.keys[row] for row in rows], OUTPUT, out.dtype, out)[0]
        return torch.from_numpy(data)

    def scan(self) -> Iterator[np.ndarray]:
        for _, frames in self.store.scan(OUTPUT):
            yield frames


class NpyFiles(Peer):
    """As MERTools and emotion2vec leave them."""

    name = "npy"
    label = "one .npy per utterance"

    def write(self) -> None:
        for row, frames in enumerate(self.data.utterances()):
            np.save(self.folder / f"{row:06d}.npy", frames)

    def open(self) -> None:
        self.path = str(self.folder)

    def get(self, row: int) -> np.ndarray:
        return np.load(f"{self.path}/{row:06d}.npy")


class PtFiles(NpyFiles):
    """As many papers' own code leaves them."""

    name = "pt"
    label = "one .pt per utterance"

    def write(self) -> None:
        import torch

        for row, frames in enumerate(self.data.utterances()):
            torch.save(torch.from_numpy(frames.copy()), self.folder / f"{row:06d}.pt")

    def get(self, row: int) -> np.ndarray:
        import torch

        return torch.load(f"{self.path}/{row:06d}.pt", weights_only=True).numpy()


class H5Datasets(Peer):
    """One HDF5 file, a dataset per utterance."""

    name = "h5py"
    label = "h5py, dataset per utterance"

    def write(self) -> None:
        import h5py

        with h5py.File(self.folder / "features.h5", "w", libver="latest") as file:
            for row, frames in enumerate(self.data.utterances()):
                file.create_dataset(f"{row:06d}", data=frames)

    def open(self) -> None:
        import h5py

        self.file = h5py.File(self.folder / "features.h5", "r")

    def get(self, row: int) -> np.ndarray:
        return self.file[f"{row:06d}"][:]

    def copy(self, row: int, out: Any) -> None:
        if out.element_size() == 2:
            self.file[f"{row:06d}"].read_direct(out.numpy())
        else:
            super().copy(row, out)


class H5Flat(Peer):
    """One HDF5 dataset of all frames in chunks of 256, and where each utterance begins."""

    name = "h5py-flat"
    label = "h5py, flat, chunked"

    def write(self) -> None:
        import h5py

        flat = self.data.map()
        with h5py.File(self.folder / "features.h5", "w", libver="latest") as file:
            chunks = (min(256, len(flat)), self.data.dim)
            frames = file.create_dataset("frames", flat.shape, flat.dtype, chunks=chunks)
            step = chunks[0] * 64
            for start in range(0, len(flat), step):
                frames[start : start + step] = flat[start : start + step]
            file["offsets"] = self.data.offsets

    def open(self) -> None:
        import h5py

        self.file = h5py.File(self.folder / "features.h5", "r", rdcc_nbytes=64 << 20)
        self.frames = self.file["frames"]
        self.offsets = self.file["offsets"][:].tolist()

    def get(self, row: int) -> np.ndarray:
        return self.frames[self.offsets[row] : self.offsets[row + 1]]

    def copy(self, row: int, out: Any) -> None:
        if out.element_size() == 2:
            self.frames.read_direct(out.numpy(), np.s_[self.offsets[row] : self.offsets[row + 1]])
        else:
            super().copy(row, out)

    def scan(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self.data), BLOCK_ROWS):
            bounds = self.offsets[first : first + BLOCK_ROWS + 1]
            block = self.frames[bounds[0] : bounds[-1]]
            for start, stop in pairwise(bounds):
                yield block[start - bounds[0] : stop - bounds[0]]


class LhotseLilcom(Peer):
    """The default of lhotse for features; compresses, with loss."""

    name = "lilcom"
    label = "lhotse lilcom_chunky (lossy)"
    lossy = True

    def write(self) -> None:
        from lhotse import LilcomChunkyWriter

        with LilcomChunkyWriter(self.folder / "features") as writer:
            places = [
                writer.write(f"{row:06d}", frames.astype(np.float32))
                for row, frames in enumerate(self.data.utterances())
            ]
            path = str(writer.storage_path)
        (self.folder / "places.json").write_text(json.dumps({"path": path, "places": places}))

    def open(self) -> None:
        from lhotse.features.io import LilcomChunkyReader

        fields = json.loads((self.folder / "places.json").read_text())
        self.reader, self.places = LilcomChunkyReader(fields["path"]), fields["places"]

    def get(self, row: int) -> np.ndarray:
        return self.reader.read(self.places[row])


class LhotseHdf5(Peer):
    """What lhotse writes without compression."""

    name = "lhotse-hdf5"
    label = "lhotse numpy_hdf5"

    def write(self) -> None:
        from lhotse import NumpyHdf5Writer

        with NumpyHdf5Writer(self.folder / "features") as writer:
            for row, frames in enumerate(self.data.utterances()):
                writer.write(f"{row:06d}", frames)
            (self.folder / "path").write_text(str(writer.storage_path))

    def open(self) -> None:
        from lhotse.features.io import NumpyHdf5Reader

        self.reader = NumpyHdf5Reader((self.folder / "path").read_text())

    def get(self, row: int) -> np.ndarray:
        return self.reader.read(f"{row:06d}")


class HuggingFace(Peer):
    """A data set with a two-dimensional column in numpy format."""

    name = "datasets"
    label = "Hugging Face datasets (Arrow)"

    def write(self) -> None:
        from datasets import Array2D, Features, Value
        from datasets.arrow_writer import ArrowWriter

        frames = Array2D((None, self.data.dim), "float16")
        features = Features({"id": Value("string"), "frames": frames})
        path = str(self.folder / "features.arrow")
        with ArrowWriter(features=features, path=path, writer_batch_size=BLOCK_ROWS) as writer:
            for row, values in enumerate(self.data.utterances()):
                writer.write({"id": f"{row:06d}", "frames": values})
            writer.finalize()

    def open(self) -> None:
        from datasets import Dataset

        table = Dataset.from_file(str(self.folder / "features.arrow"))
        # Its numpy format turns everything into float32 unless told not to.
        self.table = table.with_format("numpy", columns=["frames"], dtype=np.float16)

    def get(self, row: int) -> np.ndarray:
        return self.table[row]["frames"].copy()  # a view of the mapped file

    def gather(self, rows: Sequence[int]) -> Sequence[np.ndarray]:
        return [frames.copy() for frames in self.table[list(rows)]["frames"]]

    def pad(self, rows: Sequence[int], lengths: np.ndarray, memory: Any) -> Any:
        import torch

        batch = self._front(lengths, memory)
        for i, frames in enumerate(self.table[list(rows)]["frames"]):
            batch[i, : len(frames)] = torch.from_numpy(frames)
            batch[i, len(frames) :] = 0
        return batch

    def scan(self) -> Iterator[np.ndarray]:
        for some in self.table.iter(batch_size=BLOCK_ROWS):
            yield from (frames.copy() for frames in some["frames"])


class ZarrPython(Peer):
    """zarr-python reading what we wrote."""

    name = "zarr"
    label = "zarr-python on our store"

    def write(self) -> None:
        """Nothing: it is our store."""

    def open(self) -> None:
        import zarr

        (path,) = (p for p in sorted(self.folder.iterdir()) if (p / "zarr.json").is_file())
        group = zarr.open_group(str(path), mode="r", use_consolidated=False)
        where: dict[bytes, tuple[Any, int, int]] = {}
        for part in sorted(p.name for p in (path / "parts").iterdir() if p.is_dir()):
            frames = group[f"parts/{part}/{OUTPUT}/frames"]
            offsets = group[f"parts/{part}/{OUTPUT}/offsets"][:].tolist()
            for number, key in enumerate(group[f"parts/{part}/key"][:]):
                where[key.tobytes()] = frames, offsets[number], offsets[number + 1]
        self.where = [where[key] for key in self.data.keys]

    def get(self, row: int) -> np.ndarray:
        frames, start, stop = self.where[row]
        return frames[start:stop]


class Safetensors(Peer):
    """One file with a tensor per utterance."""

    name = "safetensors"
    label = "safetensors, one file"

    def write(self) -> None:
        from safetensors.numpy import save_file

        tensors = {f"{row:06d}": frames for row, frames in enumerate(self.data.utterances())}
        save_file(tensors, self.folder / "features.safetensors")

    def open(self) -> None:
        from safetensors import safe_open

        self.file = safe_open(self.folder / "features.safetensors", framework="pt")

    def get(self, row: int) -> np.ndarray:
        return self.file.get_tensor(f"{row:06d}").clone().numpy()  # the tensor itself is a view

    def copy(self, row: int, out: Any) -> None:
        out.copy_(self.file.get_tensor(f"{row:06d}"))


class ArrowMapped(Peer):
    """An Arrow file, mapped, one binary cell per utterance."""

    name = "arrow"
    label = "Arrow binary, mapped"

    def write(self) -> None:
        import pyarrow as pa

        schema = pa.schema([("frames", pa.large_binary())])
        with (
            pa.OSFile(str(self.folder / "features.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            cells: list[bytes] = []
            for row, frames in enumerate(self.data.utterances()):
                cells.append(frames.tobytes())
                if len(cells) == BLOCK_ROWS or row == len(self.data) - 1:
                    column = pa.array(cells, pa.large_binary())
                    writer.write(pa.record_batch([column], schema=schema))
                    cells = []

    def open(self) -> None:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.memory_map(str(self.folder / "features.arrow")))
        numbers = range(reader.num_record_batches)
        self.columns = [reader.get_batch(number).column(0) for number in numbers]

    def view(self, row: int) -> np.ndarray:
        cell = self.columns[row // BLOCK_ROWS][row % BLOCK_ROWS].as_buffer()
        return np.frombuffer(cell, np.float16).reshape(-1, self.data.dim)

    def get(self, row: int) -> np.ndarray:
        return self.view(row).copy()

    def copy(self, row: int, out: Any) -> None:
        import torch

        out.copy_(torch.from_numpy(self.view(row)))


PEERS: tuple[type[Peer], ...] = (
    NpyFiles,
    PtFiles,
    H5Datasets,
    H5Flat,
    LhotseLilcom,
    LhotseHdf5,
    HuggingFace,
    ZarrPython,
    Safetensors,
    ArrowMapped,
)

KINDS: dict[str, type[Peer]] = {kind.name: kind for kind in (Memmap, Mer, *PEERS)}


def size_of(folder: Path) -> tuple[int, int]:
    """Return files and bytes below ``folder``."""
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    return len(paths), sum(map(os.path.getsize, paths))
