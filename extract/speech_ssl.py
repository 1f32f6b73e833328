"""Self-supervised speech encoders of the wav2vec2 kind: WavLM, HuBERT, Wav2Vec2.

B utterances, N samples at 16 kHz, T frames (50 per second), D model width, L blocks.

What makes a batch equal its members alone:

- each clip is normalised to zero mean and unit variance by itself, before any padding (where the
  model was trained so);
- the attention mask is always given, also for one clip;
- the group norm after the first convolution of the base models runs over real frames only
  (`masked_norm`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from mer.cache.errors import AudioError, CheckpointError
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.extract.audio import FRONT_END
from mer.extract.checkpoint import PREPROCESSOR, Checkpoint, load_pretrained, requested
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

# Pre-training, CTC, classification and speaker heads that published checkpoints carry beside the
# encoder.
TASK_HEADS = (
    r"lm_head\.",
    r"quantizer\.",
    r"project_q\.",
    r"project_hid\.",
    r"projector\.",
    r"classifier\.",
    r"layer_weights$",
    r"tdnn\.",
    r"feature_extractor\.(weight|bias)$",  # the x-vector head's linear layer, not the convolutions
    r"objective\.",
)
# The vector that replaces masked frames in pre-training; several fine-tuned checkpoints were
# published without it.
TRAINING_ONLY = (r"(\w+\.)?masked_spec_embed$",)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Parameters
    ----------
    model_type : str
        As in config.json.
    class_name : str
        The encoder's class in transformers.
    normalise_group, normalise_layer : bool
        Whether waveforms are normalised where the checkpoint brings no preprocessor_config.json,
        for models whose first convolution has a group norm (base) or a layer norm (large).
    """

    model_type: str
    class_name: str
    normalise_group: bool
    normalise_layer: bool = True


FAMILIES = {
    family.model_type: family
    for family in (
        Family("wavlm", "WavLMModel", normalise_group=False),
        Family("hubert", "HubertModel", normalise_group=True),
        Family("wav2vec2", "Wav2Vec2Model", normalise_group=True),
    )
}
LICENCES = {
    "microsoft/wavlm": "CC-BY-SA-3.0 (the code repository's; the hub page names none)",
    "facebook/hubert": "Apache-2.0",
    "facebook/wav2vec2": "Apache-2.0",
}
OPTIONS = {
    "model": "",
    "revision": "",
    "layers": FINAL,
    "normalise": "auto",
    "window_s": "40",
    "overlap_s": "4",
    "precision": "float32",
    "dtype": "float16",
}
# Defaults of the wav2vec2 front end, which configurations may leave out: 7 convolutions, 400
# samples seen, 320 apart.
CONV_KERNEL = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDE = (5, 2, 2, 2, 2, 2, 2)


class SpeechSsl(Extractor):
    """Frames of a wav2vec2-type encoder, any of its layers.

    Parameters
    ----------
    checkpoint : Checkpoint
        A resolved model whose ``model_type`` is ``family``.
    family : str
        Key of `FAMILIES`.
    layers : str, default="final"
        See `mer.extract.layers.parse_layers`.
    normalise : bool or None
        Zero mean and unit variance per utterance; None takes what the checkpoint's
        preprocessor_config.json says.
    window_s : float, default=40
        Longest stretch seen at once; our choice. Longer recordings run in windows that share
        ``overlap_s``, half of it given to each side. A recording is normalised as a whole.
    precision : {"float32", "bfloat16", "float16"}
        What the model computes in.
    dtype : {"float16", "float32"}
        What the store keeps.
    """

    policy = BatchPolicy.MASK

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: str,
        *,
        layers: str = FINAL,
        normalise: bool | None = None,
        window_s: float = 40.0,
        overlap_s: float = 4.0,
        precision: str = "float32",
        dtype: str = "float16",
    ) -> None:
        self.checkpoint = checkpoint
        self.family = FAMILIES[family]
        self.precision = precision
        config = checkpoint.config
        if config.get("model_type") != family:
            raise CheckpointError(
                f"{checkpoint} is a {config.get('model_type')!r} model, not {family!r}. Ask for "
                "the feature of its family "
                f"(known here: {', '.join(FAMILIES)})."
            )
        if config.get("add_adapter"):
            raise CheckpointError(
                f"{checkpoint} ends in an adapter that changes the frame rate; such models are not "
                "supported."
            )
        self.kernel = tuple(config.get("conv_kernel", CONV_KERNEL))
        self.stride = tuple(config.get("conv_stride", CONV_STRIDE))
        self.group_norm = config.get("feat_extract_norm", "group") == "group"
        self.num_layers = int(config.get("num_hidden_layers", 12))
        self.hop, self.min_samples = 1, 1
        for kernel, stride in zip(self.kernel, self.stride, strict=True):
            self.min_samples += (kernel - 1) * self.hop
            self.hop *= stride
        self.normalise = self._published_normalisation() if normalise is None else normalise
        self.layers = parse_layers(layers, self.num_layers)
        self.window = self._window(window_s, overlap_s)
        self._model: nn.Module | None = None
        self._device = ""

        dim = int(config.get("hidden_size", 768))
        rate_hz = SAMPLE_RATE_HZ / self.hop
        identity = {
            "extractor": family,
            "version": self.version,
            "model": asdict(checkpoint.identity),
            "front_end": FRONT_END,
            "options": {
                "normalise": self.normalise,
                "pad_to_samples": self.min_samples,
                "window": asdict(self.window),
                "layers": list(self.layers),
                "precision": precision,
                "dtype": dtype,
            },
        }
        name = checkpoint.short_name or f"{family}-local"
        self.licence = checkpoint.licence(LICENCES)
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
        normalise = check_choice(name, "normalise", o["normalise"], ("auto", "yes", "no"))
        window_s = real(name, "window_s", o["window_s"], 1.0, 36_000.0)
        return cls(
            requested(name, o),
            name.partition("-")[0],
            layers=o["layers"],
            normalise=None if normalise == "auto" else normalise == "yes",
            window_s=window_s,
            overlap_s=real(name, "overlap_s", o["overlap_s"], 0.0, window_s / 2),
            precision=check_choice(name, "precision", o["precision"], PRECISIONS),
            dtype=check_choice(name, "dtype", o["dtype"], STORED),
        )

    def _published_normalisation(self) -> bool:
        published = self.checkpoint.read_json(PREPROCESSOR)
        if published is None:
            return self.family.normalise_group if self.group_norm else self.family.normalise_layer
        return bool(
            published.get("do_normalize", True)
        )  # the default of transformers' feature extractor

    def _window(self, window_s: float, overlap_s: float) -> WindowRule:
        """Return the rule in samples: multiples of the hop, with frames of neighbours meeting."""
        size = int(window_s * SAMPLE_RATE_HZ) // self.hop * self.hop
        # a window's last frames end min_samples - hop before it does, so less overlap than that
        # would leave a gap
        least = -(-(self.min_samples - self.hop) // self.hop) * self.hop
        overlap = max(least, int(overlap_s * SAMPLE_RATE_HZ) // self.hop * self.hop)
        return WindowRule(size=size, overlap=overlap, hop=self.hop)

    def load(self, device: str) -> None:
        """Bring the encoder onto ``device``, cut after the highest block that is needed."""
        if self._model is not None and self._device == device:
            return
        from mer.extract.masked_norm import MaskedGroupNorm
        from mer.extract.wavlm_attention import use_fused_attention

        options: dict[str, Any] = (
            {} if self.family.model_type == "wavlm" else {"attn_implementation": "sdpa"}
        )
        model: Any = load_pretrained(
            self.checkpoint,
            self.family.class_name,
            dtype=torch_dtype(self.precision),
            droppable=TASK_HEADS,
            optional=TRAINING_ONLY,
            **options,
        )
        if self.group_norm:
            first = model.feature_extractor.conv_layers[0]
            first.layer_norm = MaskedGroupNorm(first.layer_norm)
        use_fused_attention(model)
        del model.encoder.layers[blocks_needed(self.layers, self.num_layers) :]
        self._model, self._device = model.to(device), device

    def prepare(self, source: np.ndarray | str) -> Tensor:
        """Normalise samples (N,) and pad them with silence to the least that yields a frame.

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
        if self.normalise:
            # float64, so that the statistics of an hour are as exact as those of a second
            mean = samples.mean(dtype=np.float64)
            deviation = np.sqrt(samples.var(dtype=np.float64) + 1e-7)
            samples = ((samples - mean) / deviation).astype(np.float32)
        padding = max(0, self.min_samples - samples.size)
        return torch.from_numpy(np.pad(samples, (0, padding)))

    def _frames(self, samples: int, convolutions: int | None = None) -> int:
        """Return the frames after the first ``convolutions`` layers (all by default)."""
        for kernel, stride in list(zip(self.kernel, self.stride, strict=True))[:convolutions]:
            samples = (samples - kernel) // stride + 1
        return max(0, samples)

    def num_frames(self, num_steps: int) -> dict[str, int]:
        """Return the frames of each layer, by the model's own convolution arithmetic."""
        return dict.fromkeys(self.layers, self._frames(num_steps))

    def forward(self, batch: RaggedBatch) -> dict[str, RaggedBatch]:
        """Run the encoder on prepared samples (B, N); each layer is (B, T, D) float32."""
        import torch

        if self._model is None:
            raise RuntimeError("load() comes before forward()")
        model: Any = self._model
        lengths = batch.lengths.tolist()
        data = batch.data
        mask = (
            torch.arange(data.shape[1], device=data.device)[None]
            < batch.lengths.to(data.device)[:, None]
        )
        if self.group_norm:
            norm = model.feature_extractor.conv_layers[0].layer_norm
            norm.lengths = [self._frames(n, 1) for n in lengths]
        with (
            torch.inference_mode(),
            exact_float32(),
            LayerTap(model.encoder.layers, self.layers) as taken,
        ):
            output = model(data.to(torch_dtype(self.precision)), attention_mask=mask.long())
        taken[FINAL] = output.last_hidden_state
        frames = torch.tensor([self._frames(n) for n in lengths])
        return {name: RaggedBatch(taken[name].float(), frames) for name in self.layers}
