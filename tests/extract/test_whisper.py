"""Whisper's encoder: its mel spectrogram, its window, and parity with plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch

from mer.cache.errors import AudioError, CheckpointError, UsageError
from mer.extract import registry
from mer.extract.checkpoint import quiet_transformers
from mer.extract.contract import RaggedBatch
from mer.extract.whisper import WhisperEncoder, log_mel, slaney_mel_filters
from mer.extract.windows import cut

WINDOW = 32_000  # the tiny model's 100 positions


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A Whisper that a test may change."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def sound(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(samples) + 0.05).astype(np.float32)


def create(folder: Path, options: str = "") -> WhisperEncoder:
    extractor = registry.create(f"whisper:model={folder},overlap_s=0.4{options}")
    assert isinstance(extractor, WhisperEncoder)
    return extractor


def frames(extractor: WhisperEncoder, samples: np.ndarray) -> dict[str, np.ndarray]:
    extractor.load("cpu")
    data = extractor.prepare(samples)
    out = extractor.forward(RaggedBatch(data[None], torch.tensor([len(data)])))
    return {name: ragged.unpad()[0].numpy() for name, ragged in out.items()}


def front_end(bands: int, seconds: int) -> Any:
    with quiet_transformers() as transformers:
        return transformers.WhisperFeatureExtractor(feature_size=bands, chunk_length=seconds)


@pytest.mark.parametrize("bands", [80, 128])
def test_mel_filters_equal_the_published_ones(bands: int) -> None:
    np.testing.assert_allclose(
        slaney_mel_filters(bands), front_end(bands, 30).mel_filters, atol=1e-7
    )


@pytest.mark.parametrize("bands", [80, 128])
@pytest.mark.parametrize("samples", [1, 400, 50_001, 479_999, 480_000])
def test_log_mel_equals_the_published_front_end(bands: int, samples: int) -> None:
    theirs = front_end(bands, 30)(sound(samples), sampling_rate=16000, return_tensors="np")
    audio = torch.zeros(1, 480_000)
    audio[0, :samples] = torch.from_numpy(sound(samples))
    ours = log_mel(audio, torch.from_numpy(slaney_mel_filters(bands)))
    np.testing.assert_allclose(ours.numpy(), theirs.input_features, atol=1e-5)


def test_the_mel_floor_is_each_clips_own() -> None:
    filters = torch.from_numpy(slaney_mel_filters(80))
    loud, quiet = torch.from_numpy(sound(WINDOW)), torch.from_numpy(sound(WINDOW, 1)) * 1e-3
    together = log_mel(torch.stack([loud, quiet]), filters)
    np.testing.assert_array_equal(together[1].numpy(), log_mel(quiet[None], filters)[0].numpy())


@pytest.mark.parametrize("samples", [400, 9_001, WINDOW])
def test_layers_and_final_equal_plain_transformers(published: Path, samples: int) -> None:
    with quiet_transformers() as transformers:
        model = transformers.WhisperModel.from_pretrained(published).eval()
    features = front_end(80, 2)(sound(samples), sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        out = model.encoder(features.input_features, output_hidden_states=True)
        last_block = model.encoder.layer_norm
        ours = frames(create(published, ",layers=all"), sound(samples))
        n = max(1, samples // 320)
        for i, state in enumerate(out.hidden_states[:-1]):
            np.testing.assert_allclose(ours[f"layer_{i}"], state[0, :n].numpy(), atol=2e-5)
        np.testing.assert_allclose(ours["final"], out.last_hidden_state[0, :n].numpy(), atol=2e-5)
        normed = last_block(torch.from_numpy(ours["layer_2"])).numpy()
    np.testing.assert_allclose(normed, ours["final"], atol=2e-5)


@pytest.mark.parametrize(
    ("samples", "expected"), [(1, 1), (319, 1), (320, 1), (640, 2), (31_999, 99), (WINDOW, 100)]
)
def test_states_are_cut_to_the_clips_own_frames(
    published: Path, samples: int, expected: int
) -> None:
    extractor = create(published)
    assert extractor.num_frames(samples) == {"final": expected}
    assert len(frames(extractor, sound(samples))["final"]) == expected


def test_clips_beyond_the_window_run_in_overlapping_windows(published: Path) -> None:
    extractor = create(published)
    extractor.load("cpu")
    assert extractor.window is not None
    assert (extractor.window.size, extractor.window.overlap) == (WINDOW, 6_400)
    data = extractor.prepare(sound(80_001))
    rows = []
    for window in cut(len(data), extractor.window, lambda n: extractor.num_frames(n)["final"]):
        piece = data[window.start : window.stop]
        out = extractor.forward(RaggedBatch(piece[None], torch.tensor([len(piece)])))["final"]
        rows.append(out.unpad()[0][window.keep_from : window.keep_to])
    assert len(rows) == 3
    joined = torch.cat(rows).numpy()
    assert len(joined) == 250 == extractor.num_frames(80_001)["final"]
    np.testing.assert_array_equal(
        joined[:90], frames(extractor, sound(80_001)[:WINDOW])["final"][:90]
    )


def test_nothing_beyond_the_window_is_cut_silently(published: Path) -> None:
    extractor = create(published)
    extractor.load("cpu")
    batch = RaggedBatch(torch.zeros(1, WINDOW + 1), torch.tensor([WINDOW + 1]))
    with pytest.raises(ValueError, match="32001 samples are more than the window of 32000"):
        extractor.forward(batch)


def test_half_precision_computes_the_mel_in_float32(published: Path) -> None:
    full = frames(create(published), sound(9_001))["final"]
    half = frames(create(published, ",precision=bfloat16"), sound(9_001))["final"]
    assert half.dtype == np.float32
    assert 0 < np.linalg.norm(full - half) / np.linalg.norm(full) < 0.05


def test_an_empty_clip_is_refused(published: Path) -> None:
    with pytest.raises(AudioError, match="no samples"):
        create(published).prepare(np.zeros(0, np.float32))


# Checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls", ["WhisperForConditionalGeneration", "WhisperForAudioClassification"]
)
def test_checkpoints_with_decoder_or_head_give_their_encoders_features(
    cls: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoints.whisper(tmp_path / cls, cls=cls)
    with quiet_transformers() as transformers:
        model = getattr(transformers, cls).from_pretrained(folder).eval()
    encoder = model.encoder if hasattr(model, "encoder") else model.model.encoder
    features = front_end(80, 2)(sound(9_001), sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        theirs = encoder(features.input_features).last_hidden_state[0, :28].numpy()
    np.testing.assert_allclose(frames(create(folder), sound(9_001))["final"], theirs, atol=2e-5)


def test_shards_and_bin_give_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    expected = frames(create(folder), sound(3_000))["final"]
    shards = tiny_checkpoints.whisper(tmp_path / "shards", max_shard_size="60KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(frames(create(shards), sound(3_000))["final"], expected)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(frames(create(folder), sound(3_000))["final"], expected)


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_a_missing_encoder_key_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop("encoder.layers.0.fc1.weight"))
    with pytest.raises(CheckpointError, match=r"missing key layers\.0\.fc1\.weight"):
        create(folder).load("cpu")


def test_an_unexpected_encoder_key_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"encoder.adapter.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"unexpected key encoder\.adapter\.weight"):
        create(folder).load("cpu")


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"encoder.conv1.bias": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"do not fit its configuration.*conv1\.bias"):
        create(folder).load("cpu")


def test_weights_that_are_no_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as weights"):
        create(folder).load("cpu")


def test_another_model_type_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoints.speech(tmp_path / "hubert", "hubert")
    with pytest.raises(CheckpointError, match="is a 'hubert' model, not 'whisper'"):
        create(folder)


def test_another_front_end_is_refused(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"feature_size": 80, "hop_length": 320})
    )
    with pytest.raises(CheckpointError, match="hop_length = 320, a Whisper front end has 160"):
        create(folder)


def test_an_overlap_beyond_half_a_window_is_refused(published: Path) -> None:
    with pytest.raises(UsageError, match="more than half of the window of 32000 samples"):
        registry.create(f"whisper:model={published},overlap_s=1.5")


def test_an_unknown_window_is_refused(published: Path) -> None:
    with pytest.raises(UsageError, match="window=20s is not known; expected 30s"):
        create(published, ",window=20s")
