"""Tiny random checkpoints in the layout of real ones, written with `save_pretrained`.

Every norm, bias and table is perturbed, so that no test passes because a parameter is 0 or 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# 16 channels per group of the position convolution: with 8, oneDNN 3.x gives wrong bfloat16 sums on
# CPU (torch 2.13).
WIDTH = 32
SPEECH = ("wavlm", "hubert", "wav2vec2")
SPEECH_VARIANTS = (
    "group",
    "layer",
    "stable",
)  # base; layer norm in front; layer norm in front and pre-norm blocks (large)


def transformers() -> Any:
    from mer.extract.checkpoint import import_transformers

    return import_transformers()


def perturb(model: Any, seed: int = 0) -> Any:
    """Move every parameter off its initial value, by a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write a model without the progress bars of `save_pretrained`."""
    from mer.extract.checkpoint import quiet_transformers

    with quiet_transformers():
        model.save_pretrained(folder, **options)
    return folder


def speech_config(model_type: str, variant: str, **changes: Any) -> Any:
    library = transformers()
    cls = {
        "wavlm": library.WavLMConfig,
        "hubert": library.HubertConfig,
        "wav2vec2": library.Wav2Vec2Config,
    }[model_type]
    settings = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
        "conv_dim": [8] * 7,
        "conv_bias": variant != "group",
        "feat_extract_norm": "group" if variant == "group" else "layer",
        "do_stable_layer_norm": variant == "stable",
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 12,
    }
    return cls(**{**settings, **changes})


def speech(
    folder: Path,
    model_type: str,
    variant: str = "group",
    *,
    seed: int = 0,
    cls: str = "Model",
    **changes: Any,
) -> Path:
    """Write a WavLM, HuBERT or Wav2Vec2 with two blocks; ``cls="ForCTC"`` adds a task head."""
    import torch

    torch.manual_seed(seed)
    name = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2"}[model_type] + cls
    model = getattr(transformers(), name)(speech_config(model_type, variant, **changes))
    save(perturb(model, seed), folder)
    settings = {
        "do_normalize": variant != "group",
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "sampling_rate": 16000,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def whisper(
    folder: Path,
    *,
    seed: int = 0,
    bands: int = 80,
    positions: int = 100,
    cls: str = "WhisperModel",
    **options: Any,
) -> Path:
    """Write a Whisper with two encoder blocks and a window of ``positions`` frames (2 s)."""
    import torch

    torch.manual_seed(seed)
    library = transformers()
    config = library.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        vocab_size=40,
        num_mel_bins=bands,
        max_source_positions=positions,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = getattr(library, cls)(config)
    return save(perturb(model, seed), folder, **options)


WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "it", "was", "sad")


def text(
    folder: Path,
    model_type: str = "roberta",
    *,
    seed: int = 0,
    positions: int = 40,
    cls: str = "Model",
) -> Path:
    """Write a RoBERTa (byte-level BPE) or BERT (word pieces) with two blocks and its tokenizer."""
    import torch

    torch.manual_seed(seed)
    library = transformers()
    settings: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": positions,
        "type_vocab_size": 1 if model_type == "roberta" else 2,
    }
    if model_type == "roberta":
        from tokenizers.pre_tokenizers import ByteLevel

        letters = sorted(ByteLevel.alphabet())
        merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "a"), ("o", "w")]
        pieces = [
            "<s>",
            "<pad>",
            "</s>",
            "<unk>",
            *letters,
            *("".join(pair) for pair in merges),
            "<mask>",
        ]
        tokenizer = library.RobertaTokenizer(
            vocab={p: i for i, p in enumerate(pieces)}, merges=merges
        )
        config = library.RobertaConfig(
            vocab_size=len(pieces), pad_token_id=1, bos_token_id=0, eos_token_id=2, **settings
        )
        model = getattr(library, "Roberta" + cls)(config)
    else:
        pieces = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *WORDS,
            *(chr(c) for c in range(97, 123) if chr(c) != "a"),
        ]
        tokenizer = library.BertTokenizer(vocab={p: i for i, p in enumerate(pieces)})
        model = getattr(library, "Bert" + cls)(
            library.BertConfig(vocab_size=len(pieces), pad_token_id=0, **settings)
        )
    save(perturb(model, seed), folder)
    tokenizer.save_pretrained(folder)
    return folder
