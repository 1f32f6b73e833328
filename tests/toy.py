"""A small extractor whose numbers are known in advance, for tests of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile
import torch

from mer.cache.spec import FeatureSpec, OutputSpec
from mer.extract.contract import BatchPolicy, Extractor, RaggedBatch, Source

HOP = 160


class Toy(Extractor):
    """Mean and largest value of every 10 ms; fails, or answers NaN, where a sample says so."""

    FAIL, NAN = 0.75, 0.5

    def __init__(
        self, slug="toy", *, policy=BatchPolicy.MASK, window=None, dtype="float32", scale=1.0
    ):
        self.policy, self.window, self.scale = policy, window, scale
        self.batches: list[list[int]] = []
        self.loads = 0
        output = OutputSpec(name="level", dim=2, rate_hz=100.0, dtype=dtype)
        identity = {"extractor": slug, "version": 1, "options": {"scale": scale}}
        self.spec = FeatureSpec(slug=slug, identity=identity, outputs=(output,))

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, str]):
        return cls(name)

    def load(self, device: str) -> None:
        self.loads += 1

    def prepare(self, source):
        if len(source) < HOP:
            source = np.pad(source, (0, HOP - len(source)))
        return torch.from_numpy(source)

    def num_frames(self, num_steps: int) -> dict[str, int]:
        return {"level": num_steps // HOP}

    def forward(self, batch: RaggedBatch) -> dict[str, RaggedBatch]:
        self.batches.append(batch.lengths.tolist())
        if torch.isclose(batch.data, torch.tensor(self.FAIL), atol=1e-4).any():
            raise RuntimeError("the model does not like this one")
        frames = batch.data[:, : batch.data.shape[1] // HOP * HOP].unflatten(1, (-1, HOP))
        level = torch.stack([frames.mean(-1), frames.amax(-1)], dim=-1) * self.scale
        level[torch.isclose(level, torch.tensor(self.NAN), atol=1e-4)] = torch.nan
        return {"level": RaggedBatch(level, batch.lengths // HOP)}


class ToyText(Toy):
    """Code points of a transcript."""

    modality = "text"

    def prepare(self, source):
        return torch.tensor([ord(c) for c in source], dtype=torch.float32).repeat_interleave(HOP)


def expected(samples: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Return what ``Toy`` yields for ``samples``, (T, 2)."""
    frames = samples[: len(samples) // HOP * HOP].reshape(-1, HOP)
    return np.stack([frames.mean(-1), frames.max(-1)], -1) * scale


def write_corpus(folder: Path, lengths_s: list[float], *, seed: int = 0) -> list[Source]:
    """Write noise at 16 kHz, one float wav a length; return the sources."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for i, seconds in enumerate(lengths_s):
        path = folder / f"u{i:03d}.wav"
        samples = rng.uniform(-0.3, 0.3, round(seconds * 16_000)).astype(np.float32)
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
        sources.append(Source(id=path.stem, path=path, text=f"text {i}"))
    return sources
