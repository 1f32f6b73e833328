"""WavLM, HuBERT and Wav2Vec2: parity with plain transformers, and their checkpoints."""

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
from mer.extract.speech_ssl import SpeechSsl
from mer.extract.windows import cut

MODELS = [(m, v) for m in tiny_checkpoints.SPEECH for v in tiny_checkpoints.SPEECH_VARIANTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("speech")
    return {(m, v): tiny_checkpoints.speech(root / f"{m}-{v}", m, v) for m, v in MODELS}


@pytest.fixture
def wavlm(folders: dict[tuple[str, str], Path], tmp_path: Path) -> Path:
    """A WavLM base that a test may change."""
    return Path(shutil.copytree(folders["wavlm", "group"], tmp_path / "model"))


def sound(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(samples) + 0.05).astype(np.float32)


def frames(extractor: SpeechSsl, samples: np.ndarray) -> dict[str, np.ndarray]:
    extractor.load("cpu")
    data = extractor.prepare(samples)
    out = extractor.forward(RaggedBatch(data[None], torch.tensor([len(data)])))
    return {name: ragged.unpad()[0].numpy() for name, ragged in out.items()}


def in_windows(extractor: SpeechSsl, samples: np.ndarray) -> np.ndarray:
    """Return the final frames of a clip beyond the window, joined as the engine joins them."""
    data = extractor.prepare(samples)
    kept = []
    for window in cut(len(data), extractor.window, lambda n: extractor.num_frames(n)["final"]):
        piece = data[window.start : window.stop]
        out = extractor.forward(RaggedBatch(piece[None], torch.tensor([len(piece)])))["final"]
        kept.append(out.unpad()[0][window.keep_from : window.keep_to].numpy())
    assert len(kept) > 1
    return np.concatenate(kept)


def create(feature: str) -> SpeechSsl:
    extractor = registry.create(feature)
    assert isinstance(extractor, SpeechSsl)
    return extractor


def upstream(folder: Path, samples: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return all hidden states and the last one of a clip, as its model card computes them."""
    with quiet_transformers() as transformers:
        model = transformers.AutoModel.from_pretrained(folder)
        normalise = json.loads((folder / "preprocessor_config.json").read_text())["do_normalize"]
        front = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise)
        values = front(samples, sampling_rate=16000, return_tensors="pt").input_values
        with torch.inference_mode():
            out = model.eval()(values, output_hidden_states=True)
    return [state[0].numpy() for state in out.hidden_states], out.last_hidden_state[0].numpy()


@pytest.mark.parametrize(("model_type", "variant"), MODELS)
def test_layers_and_final_equal_plain_transformers(
    model_type: str, variant: str, folders: dict[tuple[str, str], Path]
) -> None:
    folder = folders[model_type, variant]
    states, last = upstream(folder, sound(9_001))
    ours = frames(create(f"{model_type}:model={folder},layers=all"), sound(9_001))
    assert list(ours) == ["layer_0", "layer_1", "layer_2", "final"]
    for i, state in enumerate(states):
        np.testing.assert_allclose(ours[f"layer_{i}"], state, atol=2e-5)
    np.testing.assert_allclose(ours["final"], last, atol=2e-5)


def test_final_differs_from_the_last_block_only_in_pre_norm_models(
    folders: dict[tuple[str, str], Path],
) -> None:
    for variant, differs in (("group", False), ("layer", False), ("stable", True)):
        ours = frames(
            create(f"hubert:model={folders['hubert', variant]},layers=2,final"), sound(5_000)
        )
        assert np.allclose(ours["layer_2"], ours["final"]) is not differs


def test_a_model_cut_at_a_layer_yields_it_bit_for_bit(folders: dict[tuple[str, str], Path]) -> None:
    folder = folders["wavlm", "stable"]
    whole = frames(create(f"wavlm:model={folder},layers=all"), sound(5_000))
    cut = create(f"wavlm:model={folder},layers=1")
    np.testing.assert_array_equal(frames(cut, sound(5_000))["layer_1"], whole["layer_1"])
    model: Any = cut._model
    assert len(model.encoder.layers) == 1


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
@pytest.mark.parametrize(("model_type", "variant"), [("wavlm", "group"), ("hubert", "stable")])
def test_half_precision_stays_near_float32_and_is_another_feature(
    precision: str,
    tolerance: float,
    model_type: str,
    variant: str,
    folders: dict[tuple[str, str], Path],
) -> None:
    """Relative rms; measured here 2 % and 0.3 %, 1.5 % in bfloat16 for models of full size."""
    feature = f"{model_type}:model={folders[model_type, variant]}"
    full, half = create(feature), create(f"{feature},precision={precision}")
    assert full.spec.identity != half.spec.identity
    a, b = frames(full, sound(9_001))["final"], frames(half, sound(9_001))["final"]
    assert b.dtype == np.float32
    assert 0 < np.linalg.norm(a - b) / np.linalg.norm(a) < tolerance


# Input ------------------------------------------------------------------------------------------


def test_normalisation_equals_the_published_feature_extractor(
    folders: dict[tuple[str, str], Path],
) -> None:
    extractor = create(f"hubert:model={folders['hubert', 'layer']}")
    with quiet_transformers() as transformers:
        front = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
        theirs = front(sound(5_000), sampling_rate=16000, return_tensors="np").input_values[0]
    np.testing.assert_allclose(extractor.prepare(sound(5_000)).numpy(), theirs, atol=1e-5)


def test_normalisation_follows_file_then_family_then_option(wavlm: Path) -> None:
    assert create(f"wavlm:model={wavlm}").normalise is False
    settings = wavlm / "preprocessor_config.json"
    settings.write_text('{"do_normalize": true}')
    assert create(f"wavlm:model={wavlm}").normalise is True
    settings.write_text("{}")
    assert create(f"wavlm:model={wavlm}").normalise is True, "transformers' own default"
    settings.unlink()
    assert create(f"wavlm:model={wavlm}").normalise is False, "WavLM base"
    forced = create(f"wavlm:model={wavlm},normalise=yes")
    assert forced.normalise is True
    assert forced.spec.identity["options"]["normalise"] is True


@pytest.mark.parametrize("samples", [1, 10, 399])
def test_a_clip_below_the_minimum_is_padded_to_one_frame(
    samples: int, folders: dict[tuple[str, str], Path]
) -> None:
    extractor = create(f"wav2vec2:model={folders['wav2vec2', 'layer']}")
    data = extractor.prepare(sound(samples))
    assert len(data) == 400
    assert not data[samples:].any()
    assert frames(extractor, sound(samples))["final"].shape == (1, tiny_checkpoints.WIDTH)


def test_an_empty_clip_is_refused(folders: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(AudioError, match="no samples"):
        create(f"wavlm:model={folders['wavlm', 'group']}").prepare(np.zeros(0, np.float32))


@pytest.mark.parametrize(("samples", "expected"), [(400, 1), (719, 1), (720, 2), (160_000, 499)])
def test_frame_count_is_the_convolutions_own(
    samples: int, expected: int, folders: dict[tuple[str, str], Path]
) -> None:
    assert create(f"hubert:model={folders['hubert', 'group']}").num_frames(samples) == {
        "final": expected
    }


def test_long_clips_run_in_windows_and_lose_no_frame(folders: dict[tuple[str, str], Path]) -> None:
    extractor = create(f"wavlm:model={folders['wavlm', 'group']},window_s=1,overlap_s=0.2")
    extractor.load("cpu")
    assert extractor.window is not None
    assert (extractor.window.size, extractor.window.overlap, extractor.window.hop) == (
        16_000,
        3_200,
        320,
    )
    samples = sound(50_001)
    joined = in_windows(extractor, samples)
    assert len(joined) == extractor.num_frames(50_001)["final"]
    first = frames(extractor, samples[:16_000])["final"]
    np.testing.assert_allclose(joined[:40], first[:40], atol=1e-4)


def test_without_overlap_the_windows_still_meet(folders: dict[tuple[str, str], Path]) -> None:
    extractor = create(f"wavlm:model={folders['wavlm', 'group']},window_s=1,overlap_s=0")
    extractor.load("cpu")
    assert len(in_windows(extractor, sound(40_000))) == extractor.num_frames(40_000)["final"]


# Checkpoints ------------------------------------------------------------------------------------


def test_a_moved_folder_is_the_same_feature(wavlm: Path, tmp_path: Path) -> None:
    before = create(f"wavlm:model={wavlm}").spec
    moved = wavlm.rename(tmp_path / "elsewhere")
    assert create(f"wavlm:model={moved}").spec == before


def test_other_weights_are_another_feature(wavlm: Path, tmp_path: Path) -> None:
    other = tiny_checkpoints.speech(tmp_path / "other", "wavlm", seed=1)
    ours, theirs = (create(f"wavlm:model={folder}").spec for folder in (wavlm, other))
    assert ours.slug == theirs.slug
    assert ours.identity != theirs.identity


def test_a_model_of_another_family_is_refused(folders: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(CheckpointError, match="is a 'hubert' model, not 'wavlm'"):
        create(f"wavlm:model={folders['hubert', 'group']}")


def test_a_generic_name_needs_a_model() -> None:
    with pytest.raises(UsageError, match="needs a model: wavlm:model=FOLDER_OR_HUB_ID"):
        create("wavlm")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("precision=int8", "precision=int8 is not known; expected float32 or bfloat16 or float16"),
        ("dtype=bfloat16", "dtype=bfloat16 is not known; expected float16 or float32"),
        ("window_s=long", "window_s=long, expected a number from 1 to 36000"),
        ("window_s=0.1", "a number from 1 to 36000"),
        ("window_s=nan", "a number from 1 to 36000"),
        ("overlap_s=25", "a number from 0 to 20"),
        ("layers=3", "there is no layer 3"),
    ],
)
def test_options_out_of_range_are_refused(
    option: str, message: str, folders: dict[tuple[str, str], Path]
) -> None:
    with pytest.raises(UsageError, match=message):
        create(f"wavlm:model={folders['wavlm', 'group']},{option}")


@pytest.mark.parametrize("model_type", tiny_checkpoints.SPEECH)
def test_a_checkpoint_with_a_task_head_gives_its_encoders_features(
    model_type: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoints.speech(tmp_path / "ctc", model_type, cls="ForCTC")
    states, last = upstream(folder, sound(3_000))
    ours = frames(create(f"{model_type}:model={folder}"), sound(3_000))
    np.testing.assert_allclose(ours["final"], last, atol=2e-5)


def rewrite(folder: Path, change: Any) -> None:
    """Apply ``change`` to the state dict of a safetensors checkpoint."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_key_is_refused_by_name(wavlm: Path) -> None:
    rewrite(wavlm, lambda state: state.pop("encoder.layers.1.attention.k_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"missing key encoder\.layers\.1\.attention\.k_proj\.weight"
    ):
        create(f"wavlm:model={wavlm}").load("cpu")


def test_many_missing_keys_are_counted(wavlm: Path) -> None:
    def drop_blocks(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.startswith("encoder.layers.")]:
            del state[key]

    rewrite(wavlm, drop_blocks)
    with pytest.raises(CheckpointError, match=r"missing keys encoder\.layers\.0.* and \d+ more"):
        create(f"wavlm:model={wavlm}").load("cpu")


def test_an_unexpected_key_is_refused_by_name(wavlm: Path) -> None:
    rewrite(wavlm, lambda state: state.update({"encoder.layers.7.extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected key encoder\.layers\.7\.extra"):
        create(f"wavlm:model={wavlm}").load("cpu")


def test_a_tensor_of_another_shape_is_refused(wavlm: Path) -> None:
    rewrite(wavlm, lambda state: state.update({"encoder.layer_norm.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"encoder\.layer_norm\.weight|size mismatch|shape"):
        create(f"wavlm:model={wavlm}").load("cpu")


def test_the_pretraining_mask_vector_may_be_missing(wavlm: Path) -> None:
    before = frames(create(f"wavlm:model={wavlm}"), sound(3_000))["final"]
    rewrite(wavlm, lambda state: state.pop("masked_spec_embed"))
    np.testing.assert_array_equal(
        frames(create(f"wavlm:model={wavlm}"), sound(3_000))["final"], before
    )


def test_bin_weights_and_shards_give_the_same_numbers(wavlm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    expected = frames(create(f"wavlm:model={wavlm}"), sound(3_000))["final"]
    with quiet_transformers() as transformers:
        model = transformers.AutoModel.from_pretrained(wavlm)
    shards = tiny_checkpoints.save(model, tmp_path / "shards", max_shard_size="20KB")
    shutil.copy(wavlm / "preprocessor_config.json", shards)
    assert len(list(shards.glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(
        frames(create(f"wavlm:model={shards}"), sound(3_000))["final"], expected
    )

    torch.save(load_file(wavlm / "model.safetensors"), wavlm / "pytorch_model.bin")
    (wavlm / "model.safetensors").unlink()
    np.testing.assert_array_equal(
        frames(create(f"wavlm:model={wavlm}"), sound(3_000))["final"], expected
    )


def test_bin_weights_that_run_code_are_refused_and_not_run(wavlm: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (tmp_path / "ran",)

    (wavlm / "model.safetensors").unlink()
    torch.save({"weight": Attack()}, wavlm / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        create(f"wavlm:model={wavlm}").load("cpu")
    assert not (tmp_path / "ran").exists()


def test_loading_prints_nothing(wavlm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    create(f"wavlm:model={wavlm}").load("cpu")
    assert capfd.readouterr() == ("", "")
