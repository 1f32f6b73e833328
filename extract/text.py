"""Transformer text encoders: RoBERTa and its kin, one vector per token.

B utterances, T tokens, D model width, L blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from mer.cache.errors import CheckpointError, TextError
from mer.cache.spec import FeatureSpec, Kind, OutputSpec
from mer.extract.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    load_pretrained,
    quiet_transformers,
    requested,
)
from mer.extract.contract import BatchPolicy, Extractor, RaggedBatch, take
from mer.extract.layers import FINAL, LayerTap, blocks_needed, layers_tag, parse_layers
from mer.extract.options import check_choice
from mer.extract.precision import PRECISIONS, STORED, exact_float32, torch_dtype

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

# Positions count from the padding id + 1 in the RoBERTa family, from 0 in BERT.
POSITIONS_AFTER_PAD = {"roberta": True, "xlm-roberta": True, "camembert": True, "bert": False}
FAMILIES = {
    "roberta": ("roberta", "xlm-roberta", "camembert"),
    "bert": ("bert",),
    "text": tuple(POSITIONS_AFTER_PAD),
}
# Language-model, classification and sentence heads beside the encoder; the pooler is a task head
# too, and its weights are absent from many checkpoints. Old files carry the position ids, which are
# a constant.
TASK_HEADS = (
    r"lm_head\.",
    r"cls\.",
    r"classifier\.",
    r"qa_outputs\.",
    r"(\w+\.)?pooler\.",
    r"(\w+\.)?embeddings\.position_ids$",
)
# Without one of these transformers makes up an empty vocabulary, in which every word is unknown.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
OPTIONS = {
    "model": "",
    "revision": "",
    "layers": FINAL,
    "special": "keep",
    "pooled": "none",
    "long": "refuse",
    "precision": "float32",
    "dtype": "float16",
}
LICENCES = {"FacebookAI/roberta": "MIT", "intfloat/e5": "MIT"}


class TextEncoder(Extractor):
    """Token vectors of a BERT-like encoder, any of its layers.

    Parameters
    ----------
    checkpoint : Checkpoint
        A resolved model, with its tokenizer in the same folder.
    layers : str, default="final"
        See `mer.extract.layers.parse_layers`.
    special : {"keep", "drop"}
        Whether the vectors of the special tokens (``<s>``, ``</s>``) are kept; the model always
        sees them. Keeping them is what papers do.
    pooled : {"none", "mean", "first"}
        One vector per token, their mean (over what ``special`` keeps), or that of the first special
        token.
    long : {"refuse", "truncate"}
        What happens to a text beyond the model's limit (512 tokens with the special ones): it is
        listed as failed, or cut at the end as many papers do. Nothing is cut unless asked for.
    precision : {"float32", "bfloat16", "float16"}
        What the model computes in.
    dtype : {"float16", "float32"}
        What the store keeps.
    """

    modality = "text"
    policy = BatchPolicy.MASK

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        layers: str = FINAL,
        special: str = "keep",
        pooled: str = "none",
        long: str = "refuse",
        precision: str = "float32",
        dtype: str = "float16",
    ) -> None:
        self.checkpoint = checkpoint
        self.special, self.pooled, self.long, self.precision = special, pooled, long, precision
        model_type = checkpoint.config.get("model_type")
        if model_type not in POSITIONS_AFTER_PAD:
            raise CheckpointError(
                f"{checkpoint} is a {model_type!r} model; text encoders known here: "
                f"{', '.join(POSITIONS_AFTER_PAD)}."
            )
        if checkpoint.config.get("is_decoder"):
            raise CheckpointError(f"{checkpoint} is configured as a decoder; an encoder is needed.")
        if not any((checkpoint.folder / name).is_file() for name in VOCABULARIES):
            raise CheckpointError(
                f"{checkpoint} holds no tokenizer: expected one of {', '.join(VOCABULARIES)}. "
                "Save the model's tokenizer into its folder."
            )
        self.pad_id = int(checkpoint.config.get("pad_token_id") or 0)
        self.max_tokens = int(checkpoint.need("max_position_embeddings"))
        if POSITIONS_AFTER_PAD[model_type]:
            self.max_tokens -= self.pad_id + 1
        self.num_layers = int(checkpoint.need("num_hidden_layers"))
        self.layers = parse_layers(layers, self.num_layers)
        self._model: nn.Module | None = None
        self._device = ""
        self._tokenizer: Any = None
        self._frame_ids: tuple[list[int], list[int]] = ([], [])
        self._around = (0, 0)
        self._lock = (
            threading.Lock()
        )  # tokenizers are not safe to share between the engine's worker threads

        identity = {
            "extractor": "text",
            "version": self.version,
            "model": asdict(checkpoint.identity),
            "options": {
                "layers": list(self.layers),
                "special": special,
                "pooled": pooled,
                "long": long,
                "precision": precision,
                "dtype": dtype,
            },
        }
        dim = int(checkpoint.need("hidden_size"))
        kind: Kind = "frames" if pooled == "none" else "pooled"
        name = checkpoint.short_name or f"{model_type}-local"
        tags = [layers_tag(self.layers, self.num_layers), *([] if pooled == "none" else [pooled])]
        self.licence = checkpoint.licence(LICENCES)
        self.spec = FeatureSpec(
            slug="-".join([name, *tags]),
            identity=identity,
            outputs=tuple(
                OutputSpec(name=n, dim=dim, rate_hz=None, dtype=dtype, kind=kind)
                for n in self.layers
            ),
            licence=self.licence,
        )

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, str]) -> Self:
        """See `Extractor.from_options`."""
        o = take(options, name, OPTIONS)
        checkpoint = requested(name, o, also=TOKENIZER_FILES)
        allowed = FAMILIES.get(name.partition("-")[0], FAMILIES["text"])
        if (model_type := checkpoint.config.get("model_type")) not in allowed:
            raise CheckpointError(
                f"{checkpoint} is a {model_type!r} model; feature {name!r} takes "
                f"{' or '.join(allowed)}."
            )
        return cls(
            checkpoint,
            layers=o["layers"],
            special=check_choice(name, "special", o["special"], ("keep", "drop")),
            pooled=check_choice(name, "pooled", o["pooled"], ("none", "mean", "first")),
            long=check_choice(name, "long", o["long"], ("refuse", "truncate")),
            precision=check_choice(name, "precision", o["precision"], PRECISIONS),
            dtype=check_choice(name, "dtype", o["dtype"], STORED),
        )

    def _tokens(self, text: str) -> list[int]:
        """Return token ids without the special ones."""
        with self._lock:
            return list(self._load_tokenizer()(text, add_special_tokens=False)["input_ids"])

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            with quiet_transformers() as transformers:
                try:
                    self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                        self.checkpoint.folder, local_files_only=True, trust_remote_code=False
                    )
                except Exception as error:  # a missing or damaged tokenizer surfaces in many ways
                    reason = " ".join(str(error).split())[:300]
                    raise CheckpointError(
                        f"{self.checkpoint} holds no tokenizer that can be read: {reason}"
                    ) from error
            self._tokenizer.model_max_length = 10**9  # the limit is ours to report
            self._frame_ids = self._special_around()
            self._around = len(self._frame_ids[0]), len(self._frame_ids[1])
        return self._tokenizer

    def _special_around(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer puts before and after a text."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = self._tokenizer("a")["input_ids"]
        for before in range(len(framed) - len(bare) + 1):
            if bare and framed[before : before + len(bare)] == bare:
                return framed[:before], framed[before + len(bare) :]
        raise CheckpointError(
            f"The tokenizer of {self.checkpoint} does not know the letter 'a'; it is no text "
            "tokenizer."
        )

    def load(self, device: str) -> None:
        """Bring the encoder onto ``device``, cut after the highest block that is needed."""
        if self._model is not None and self._device == device:
            return
        with self._lock:
            self._load_tokenizer()
        model: Any = load_pretrained(
            self.checkpoint,
            "AutoModel",
            dtype=torch_dtype(self.precision),
            droppable=TASK_HEADS,
            add_pooling_layer=False,
            attn_implementation="sdpa",
        )
        del model.encoder.layer[blocks_needed(self.layers, self.num_layers) :]
        self._model, self._device = model.to(device), device

    def prepare(self, source: np.ndarray | str) -> Tensor:
        """Return the token ids (T,) int64 of a normalised transcript, special tokens included.

        Raises
        ------
        TextError
            No text, none that the tokenizer knows, or more than the model can see at once (with
            ``long="refuse"``).
        """
        import torch

        text = str(source)
        tokens = self._tokens(text) if text.strip() else []
        if not tokens:
            raise TextError(f"the transcript {text[:40]!r} holds no token.")
        before, after = self._around
        room = self.max_tokens - before - after
        if len(tokens) > room:
            if self.long == "refuse":
                raise TextError(
                    f"the transcript has {len(tokens)} tokens, the model sees at most {room}. "
                    "Shorten it, or cut it at the "
                    "end with the option long=truncate."
                )
            tokens = tokens[:room]
        first, last = self._frame_ids
        return torch.tensor([*first, *tokens, *last], dtype=torch.int64)

    def num_frames(self, num_steps: int) -> dict[str, int]:
        """Return the vectors of each layer for ``num_steps`` token ids, special ones included."""
        if self.pooled != "none":
            return dict.fromkeys(self.layers, 1)
        if self.special == "keep":
            return dict.fromkeys(self.layers, num_steps)
        with self._lock:
            self._load_tokenizer()
        return dict.fromkeys(self.layers, num_steps - sum(self._around))

    def forward(self, batch: RaggedBatch) -> dict[str, RaggedBatch]:
        """Run the encoder on token ids (B, T); each layer is (B, T', D) float32."""
        import torch

        if self._model is None:
            raise RuntimeError("load() comes before forward()")
        model: Any = self._model
        ids = batch.data
        mask = (
            torch.arange(ids.shape[1], device=ids.device)[None]
            < batch.lengths.to(ids.device)[:, None]
        )
        with (
            torch.inference_mode(),
            exact_float32(),
            LayerTap(model.encoder.layer, self.layers) as taken,
        ):
            output = model(ids.masked_fill(~mask, self.pad_id), attention_mask=mask.long())
            taken[FINAL] = output.last_hidden_state
            return {
                name: self._kept(taken[name].float(), mask, batch.lengths) for name in self.layers
            }

    def _kept(self, states: Tensor, mask: Tensor, lengths: Tensor) -> RaggedBatch:
        """Return what the options keep of the states (B, T, D)."""
        import torch

        if self.pooled == "first":
            return RaggedBatch(states[:, :1], torch.ones_like(lengths))
        if self.special == "drop":
            before, after = self._around
            states, lengths = states[:, before:], lengths - before - after
            mask = (
                torch.arange(states.shape[1], device=states.device)[None]
                < lengths.to(states.device)[:, None]
            )
        if self.pooled == "mean":
            total = states.masked_fill(~mask[:, :, None], 0.0).sum(1, keepdim=True)
            return RaggedBatch(
                total / lengths.to(states.device)[:, None, None], torch.ones_like(lengths)
            )
        return RaggedBatch(states, lengths)
