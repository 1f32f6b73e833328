"""Whisper's encoder, with the 30 s window that it was trained on.

B utterances, N samples at 16 kHz, M mel bands, T frames (50 per second), D model width, L blocks.

Audio is padded to the window *before* the mel spectrogram, as upstream does: silence is not zero
there, and the last real frames see what follows them. The states are then cut to the clip's real
length. Each window's log-mel is clipped 8 (log10) below its own maximum; a longer recording runs in
overlapping windows, each with its own maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from mer.cache.errors import AudioError, CheckpointError, UsageError
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.extract.audio import FRONT_END
from mer.extract.checkpoint import (
    PREPROCESSOR,
    Checkpoint,
    import_transformers,
    read_tensors,
    refuse_misfits,
    requested,
)
from mer.extract.contract import (
    SAMPLE_RATE_HZ,
    BatchPolicy,
    Extractor,
    RaggedBatch,
    WindowRule,
    take,
)
from mer.extract.layers import FINAL, LayerTap, blocks_needed, layers_tag, parse_layers
from mer.extract.options import check_choice, real
from mer.extract.precision import PRECISIONS, STORED, exact_float32, torch_dtype

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

N_FFT = 400  # 25 ms
MEL_HOP = 160  # 10 ms
FRAME_HOP = 2 * MEL_HOP  # the second convolution halves the rate: 20 ms

OPTIONS = {
    "model": "",
    "revision": "",
    "layers": FINAL,
    "window": "30s",
    "overlap_s": "4",
    "precision": "float32",
    "dtype": "float16",
}
LICENCES = {"openai/whisper": "Apache-2.0 (hub) / MIT (repository)"}


def slaney_mel_filters(num_bands: int) -> np.ndarray:
    """Return triangular filters (201, M) float32, 0 to 8 kHz on Slaney's mel scale, of equal area.

    The scale is linear below 1 kHz (3 mel per 200 Hz) and logarithmic above (27 mel per factor of
    6.4).

    Source: M. Slaney, Auditory Toolbox, 1998; the filters of Whisper (Radford et al., 2022, sec.
    2.2).
    """
    import numpy as np

    knee_hz, knee_mel, log_step = 1000.0, 15.0, np.log(6.4) / 27.0

    def to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(
            mel < knee_mel, mel * 200.0 / 3.0, knee_hz * np.exp(log_step * (mel - knee_mel))
        )

    top_mel = knee_mel + np.log(SAMPLE_RATE_HZ / 2 / knee_hz) / log_step
    edges_hz = to_hz(np.linspace(0.0, top_mel, num_bands + 2))
    bins_hz = np.linspace(0.0, SAMPLE_RATE_HZ / 2, N_FFT // 2 + 1)
    width_hz = np.diff(edges_hz)
    rising = (bins_hz[:, None] - edges_hz[None, :-2]) / width_hz[:-1]
    falling = (edges_hz[None, 2:] - bins_hz[:, None]) / width_hz[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    filters: np.ndarray = triangles * (2.0 / (edges_hz[2:] - edges_hz[:-2]))
    return filters.astype(np.float32)


def log_mel(audio: Tensor, filters: Tensor) -> Tensor:
    """Return Whisper's input (B, M, N / 160) of windows (B, N), float32.

    Power spectrum, mel, log10 of at least 1e-10, clipped 8 below the window's own maximum, then (x
    + 4) / 4.
    """
    import torch

    window = torch.hann_window(N_FFT, device=audio.device)
    spectrum = torch.stft(audio, N_FFT, MEL_HOP, window=window, return_complex=True)[
        ..., :-1
    ]  # (B, 201, N / 160)
    logs = (filters.T @ spectrum.abs().square().contiguous()).clamp(min=1e-10).log10()
    floor = logs.amax(dim=(1, 2), keepdim=True) - 8.0
    return (torch.maximum(logs, floor) + 4.0) / 4.0


class WhisperEncoder(Extractor):
    """Frames of Whisper's encoder, any layer, cut to the real length (N // 320, at least one).

    Parameters
    ----------
    checkpoint : Checkpoint
        A resolved model whose ``model_type`` is ``whisper``.
    layers : str, default="final"
        See `mer.extract.layers.parse_layers`.
    overlap_s : float, default=4
        What neighbouring windows of a recording beyond 30 s share, half of it given to each side;
        our choice.
    precision : {"float32", "bfloat16", "float16"}
        What the encoder computes in; the mel spectrogram is always float32.
    dtype : {"float16", "float32"}
        What the store keeps.

    Attributes
    ----------
    cost_steps : int
        Samples that every input costs in a batch, however short it is: the whole window.
    """

    policy = BatchPolicy.ANY

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        layers: str = FINAL,
        overlap_s: float = 4.0,
        precision: str = "float32",
        dtype: str = "float16",
    ) -> None:
        self.checkpoint = checkpoint
        self.precision = precision
        if checkpoint.config.get("model_type") != "whisper":
            raise CheckpointError(
                f"{checkpoint} is a {checkpoint.config.get('model_type')!r} model, not 'whisper'."
            )
        self.num_layers = int(checkpoint.need("encoder_layers"))
        self.num_bands = int(checkpoint.need("num_mel_bins"))
        self._check_preprocessor()
        self.window_samples = int(checkpoint.need("max_source_positions")) * FRAME_HOP
        self.cost_steps = self.window_samples
        overlap = int(overlap_s * SAMPLE_RATE_HZ) // FRAME_HOP * FRAME_HOP
        if 2 * overlap > self.window_samples:
            raise UsageError(
                f"overlap_s={overlap_s:g} is more than half of the window of {self.window_samples} "
                "samples."
            )
        self.window = WindowRule(size=self.window_samples, overlap=overlap, hop=FRAME_HOP)
        self.layers = parse_layers(layers, self.num_layers)
        self._encoder: nn.Module | None = None
        self._device = ""

        identity = {
            "extractor": "whisper",
            "version": self.version,
            "model": asdict(checkpoint.identity),
            "front_end": FRONT_END,
            "options": {
                "window": {
                    **asdict(self.window),
                    "padding": "silence before the mel",
                    "mel_maximum": "per window",
                },
                "layers": list(self.layers),
                "precision": precision,
                "dtype": dtype,
            },
        }
        dim, rate_hz = int(checkpoint.need("d_model")), SAMPLE_RATE_HZ / FRAME_HOP
        self.licence = checkpoint.licence(LICENCES)
        name = checkpoint.short_name or "whisper-local"
        self.spec = FeatureSpec(
            slug=f"{name}-{layers_tag(self.layers, self.num_layers)}",
            identity=identity,
            outputs=tuple(
                OutputSpec(name=n, dim=dim, rate_hz=rate_hz, dtype=dtype) for n in self.layers
            ),
            licence=self.licence,
        )

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, str]) -> Self:
        """See `Extractor.from_options`."""
        o = take(options, name, OPTIONS)
        check_choice(name, "window", o["window"], ("30s",))
        return cls(
            requested(name, o),
            layers=o["layers"],
            overlap_s=real(name, "overlap_s", o["overlap_s"], 0.0, 15.0),
            precision=check_choice(name, "precision", o["precision"], PRECISIONS),
            dtype=check_choice(name, "dtype", o["dtype"], STORED),
        )

    def _check_preprocessor(self) -> None:
        published = self.checkpoint.read_json(PREPROCESSOR) or {}
        ours = {
            "feature_size": self.num_bands,
            "n_fft": N_FFT,
            "hop_length": MEL_HOP,
            "sampling_rate": SAMPLE_RATE_HZ,
            "dither": 0.0,
        }
        for key, value in ours.items():
            if published.get(key, value) != value:
                raise CheckpointError(
                    f"{self.checkpoint.folder / PREPROCESSOR} says {key} = {published[key]}, a "
                    f"Whisper front end has {value}."
                )

    def load(self, device: str) -> None:
        """Bring the encoder onto ``device``, cut after the highest block needed."""
        if self._encoder is not None and self._device == device:
            return
        import torch

        import_transformers()
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Encoder

        dtype = torch_dtype(self.precision)
        config = WhisperConfig(
            **{k: v for k, v in self.checkpoint.config.items() if k not in ("dtype", "torch_dtype")}
        )
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            encoder: Any = Encoder(config)
        unexpected: list[str] = []

        def rename(key: str) -> str | None:
            if key.startswith(
                (
                    "model.decoder.",
                    "decoder.",
                    "proj_out.",
                    "projector.",
                    "classifier.",
                    "layer_weights",
                )
            ):
                return None
            name = key.removeprefix("model.").removeprefix("encoder.")
            if name in expected:
                return name
            unexpected.append(key)
            return None

        expected = set(encoder.state_dict())
        tensors = read_tensors(self.checkpoint, rename)
        refuse_misfits(self.checkpoint, sorted(expected - set(tensors)), unexpected)
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        try:
            encoder.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"The weights of {self.checkpoint} do not fit its configuration: {reason}"
            ) from error
        del encoder.layers[blocks_needed(self.layers, self.num_layers) :]
        self._encoder = encoder.eval().requires_grad_(False).to(device)
        self._filters = torch.from_numpy(slaney_mel_filters(self.num_bands)).to(device)
        self._device = device

    def prepare(self, source: np.ndarray | str) -> Tensor:
        """Return the samples (N,) as they are: padding to the window happens on the model's device.

        Raises
        ------
        AudioError
            There is no sample.
        """
        import numpy as np
        import torch

        samples = np.asarray(source, dtype=np.float32)
        if not samples.size:
            raise AudioError("the recording holds no samples.")
        return torch.from_numpy(samples.copy())

    def num_frames(self, num_steps: int) -> dict[str, int]:
        """Return N // 320 for each layer, at least one."""
        return dict.fromkeys(self.layers, max(1, num_steps // FRAME_HOP))

    def forward(self, batch: RaggedBatch) -> dict[str, RaggedBatch]:
        """Run the encoder on samples (B, N) of at most one window; layers are (B, T, D) float32."""
        import torch
        from torch.nn import functional as F

        if self._encoder is None:
            raise RuntimeError("load() comes before forward()")
        missing = self.window_samples - batch.data.shape[1]
        if missing < 0:
            raise ValueError(
                f"{batch.data.shape[1]} samples are more than the window of {self.window_samples}"
            )
        encoder: Any = self._encoder
        frames = torch.tensor([max(1, n // FRAME_HOP) for n in batch.lengths.tolist()])
        with (
            torch.inference_mode(),
            exact_float32(),
            LayerTap(encoder.layers, self.layers) as taken,
        ):
            mel = log_mel(F.pad(batch.data, (0, missing)), self._filters)
            output = encoder(mel.to(torch_dtype(self.precision)))
        taken[FINAL] = output.last_hidden_state
        longest = int(frames.max())
        return {name: RaggedBatch(taken[name][:, :longest].float(), frames) for name in self.layers}
