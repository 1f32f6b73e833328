import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from audio_fixtures import voice

from mer.cache.errors import MissingDependencyError, ModelOutputError, UsageError
from mer.extract.contract import RaggedBatch
from mer.extract.opensmile import FUNCTIONAL_COLUMNS, LLD_COLUMNS, Egemaps

opensmile = pytest.importorskip("opensmile")


@pytest.fixture(scope="module", params=["functionals", "lld"])
def extractor(request) -> Egemaps:
    loaded = Egemaps.from_options("egemaps", {"level": request.param})
    loaded.load("cpu")
    return loaded


def run(extractor: Egemaps, clips: list[np.ndarray]) -> list[np.ndarray]:
    inputs = [extractor.prepare(clip) for clip in clips]
    data = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    output = extractor.forward(RaggedBatch(data, torch.tensor([len(x) for x in inputs])))
    return [row.numpy() for row in output[extractor.level].unpad()]


@pytest.mark.parametrize(
    ("level", "columns"),
    [("Functionals", FUNCTIONAL_COLUMNS), ("LowLevelDescriptors", LLD_COLUMNS)],
)
def test_columns_are_those_of_the_package(level, columns):
    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, getattr(opensmile.FeatureLevel, level))
    assert list(columns) == smile.feature_names


def test_values_are_those_of_the_package(extractor):
    level = "Functionals" if extractor.level == "functionals" else "LowLevelDescriptors"
    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, getattr(opensmile.FeatureLevel, level))
    clip = voice(1.0)
    expected = smile.process_signal(clip, 16_000).to_numpy()
    np.testing.assert_array_equal(run(extractor, [clip])[0], expected)


def test_a_batch_equals_each_clip_alone(extractor):
    clips = [voice(s, seed=i) for i, s in enumerate((0.5, 1.3, 0.02))]
    for clip, batched in zip(clips, run(extractor, clips), strict=True):
        np.testing.assert_array_equal(batched, run(extractor, [clip])[0])


def test_worker_threads_do_not_disturb_each_other(extractor):
    clips = [voice(0.4 + 0.1 * i, seed=i) for i in range(8)]
    alone = [extractor.prepare(clip).numpy() for clip in clips]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(extractor.prepare, clips))
    for expected, found in zip(alone, together, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("n", [1, 320, 959, 960, 1119, 1120, 16_000, 16_159])
def test_frames_are_as_many_as_declared(extractor, n):
    rows = extractor.prepare(voice(2.0)[:n])
    expected = 1 if extractor.level == "functionals" else max(n, 960) // 160 - 4
    assert rows.shape == (expected, extractor.outputs[0].dim)
    assert extractor.num_frames(len(rows)) == {extractor.level: len(rows)}
    assert bool(rows.isfinite().all())


def test_silence_yields_finite_features(extractor):
    assert bool(extractor.prepare(np.zeros(16_000, np.float32)).isfinite().all())


def test_samples_beyond_full_scale_are_clipped_not_wrapped(extractor):
    clip = voice(0.5)
    clip /= np.abs(clip).max()
    clip[1000:1010] = 1.0
    below = np.minimum(clip, 32767 / 32768)
    loud = clip.copy()
    loud[1000:1010] = 3.0
    expected = extractor.prepare(below).numpy()
    np.testing.assert_array_equal(extractor.prepare(clip).numpy(), expected)
    np.testing.assert_array_equal(extractor.prepare(loud).numpy(), expected)


def test_an_answer_that_is_not_finite_is_refused_by_column(extractor, monkeypatch):
    answer = np.zeros((1, extractor.outputs[0].dim, 1), np.float32)
    answer[0, 1] = np.nan
    monkeypatch.setattr(extractor, "_smile", lambda *_: answer)
    with pytest.raises(ModelOutputError, match=extractor.outputs[0].columns[1]):
        extractor.prepare(voice(0.1))


def test_declared_outputs():
    functionals = Egemaps().outputs[0]
    assert (functionals.name, functionals.kind, functionals.dim) == ("functionals", "pooled", 88)
    assert functionals.rate_hz is None
    lld = Egemaps(level="lld").outputs[0]
    assert (lld.name, lld.kind, lld.dim, lld.rate_hz) == ("lld", "frames", 25, 100)


def test_a_bad_level_is_refused():
    with pytest.raises(UsageError, match="level=llds is not known; expected functionals or lld"):
        Egemaps.from_options("egemaps", {"level": "llds"})


def test_without_opensmile_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mer\[smile\]'"):
        Egemaps()


def test_construction_imports_neither_torch_nor_opensmile():
    code = (
        "import sys; from mer.extract.opensmile import Egemaps; Egemaps();"
        "assert not {'torch', 'opensmile', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.real_data
def test_real_speech_yields_plausible_voice(shared_data):
    from mer.extract.audio import decode

    extractor = Egemaps()
    clips = sorted((shared_data / "RAVDESS").rglob("*-12.wav"))[:2]  # actor 12, a woman
    pitch = [float(extractor.prepare(decode(path))[0, 0]) for path in clips]
    assert all(27 < semitones < 46 for semitones in pitch)  # 130 to 390 Hz
