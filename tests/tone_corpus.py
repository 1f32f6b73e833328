"""A corpus that a linear model can learn: tones, high ones "angry" and low ones "sad"."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16_000


def write(folder: Path, *, speakers: int = 4, takes: int = 3) -> Path:
    """Write recordings and ``tones.csv``; utterances last 0.3 to 0.5 s, so that T differs."""
    rng = np.random.default_rng(0)
    rows = ["id,path,speaker,label,label:size"]
    for speaker in range(speakers):
        for label, hz in (("angry", 1500.0), ("sad", 300.0)):
            for take in range(takes):
                seconds = 0.3 + 0.1 * take
                time = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
                tone = 0.3 * np.sin(2 * np.pi * (hz + 20 * speaker) * time)
                name = f"s{speaker}-{label}-{take}"
                samples = tone + 0.01 * rng.normal(size=len(time))
                soundfile.write(folder / f"{name}.wav", samples.astype(np.float32), RATE_HZ)
                rows.append(f"{name},{name}.wav,s{speaker},{label},{'big' if take else 'small'}")
    path = folder / "tones.csv"
    path.write_text("\n".join(rows) + "\n")
    return path
