import io
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import soxr
from audio_fixtures import (
    keep_half,
    lfs_pointer,
    tone,
    voice,
    with_wav_sizes,
    write,
    write_aac,
)

from mer.cache.errors import AudioError, MissingDependencyError
from mer.extract import containers
from mer.extract.audio import decode, probe


def dominant_hz(samples: np.ndarray, rate_hz: int = 16_000) -> float:
    windowed = samples * np.hanning(len(samples))
    return float(np.argmax(np.abs(np.fft.rfft(windowed))) * rate_hz / len(samples))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "m4a", "mp4"])
def test_every_container_decodes_to_its_tone(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    samples = tone(440, 1.0, 44_100)
    if suffix in ("m4a", "mp4"):
        write_aac(path, samples, 44_100)
    else:
        write(path, samples, 44_100)
    decoded = decode(path)
    assert decoded.dtype == np.float32
    assert decoded.ndim == 1
    assert abs(len(decoded) - 16_000) <= 500  # AAC ends in a whole block of 1024
    assert dominant_hz(decoded[:16_000]) == pytest.approx(440, abs=1.5)
    assert np.sqrt(np.mean(decoded[2000:14_000] ** 2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.02)
    info = probe(path)
    assert (info.rate_hz, info.channels) == (44_100, 1)
    assert info.container == {"m4a": "mp4"}.get(suffix, suffix)
    assert info.duration_s == pytest.approx(1.0, abs=0.03)


def test_a_recording_at_16_khz_passes_through_unchanged(tmp_path):
    samples = voice(0.5)
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    np.testing.assert_array_equal(decode(path), samples)


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_equals_soxr_over_the_whole_recording(tmp_path, rate_hz):
    samples = voice(2.0, rate_hz)
    path = write(tmp_path / "a.wav", samples, rate_hz, subtype="FLOAT")
    decoded = decode(path)
    assert len(decoded) == 32_000
    np.testing.assert_array_equal(decoded, soxr.resample(samples, rate_hz, 16_000, quality="HQ"))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_reading_in_blocks_equals_one_read(tmp_path, monkeypatch, suffix):
    # A sweep at 16 kHz makes mp3 frames lean on earlier ones: lost by any seek in between.
    sweep = np.sin(2 * np.pi * np.cumsum(np.linspace(100, 2000, 16_000 * 8)) / 16_000) * 0.3
    path = write(tmp_path / f"a.{suffix}", sweep)
    monkeypatch.setattr(containers, "BLOCK_FRAMES", 4000)
    whole, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(decode(path), whole, atol=1e-7)  # mp3: the last bit


@pytest.mark.parametrize("suffix", ["wav", "ogg", "mp3", "m4a"])
def test_block_size_does_not_change_a_number(tmp_path, monkeypatch, suffix):
    stereo = np.stack([voice(3.0, 44_100), tone(300, 3.0, 44_100)], axis=1)
    path = tmp_path / f"a.{suffix}"
    write_aac(path, stereo) if suffix == "m4a" else write(path, stereo, 44_100)
    whole, part = decode(path), decode(path, 1.0, 2.0)
    monkeypatch.setattr(containers, "BLOCK_FRAMES", 777)
    np.testing.assert_array_equal(decode(path), whole)
    np.testing.assert_array_equal(decode(path, 1.0, 2.0), part)


def test_channels_are_averaged_unless_one_is_chosen(tmp_path):
    left, right = voice(0.3), tone(500, 0.3)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(decode(path), (left + right) / 2, atol=1e-7)
    np.testing.assert_array_equal(decode(path, channel=1), right)


@pytest.mark.parametrize("channel", [-1, 2])
def test_a_channel_that_is_not_there_is_refused(tmp_path, channel):
    path = write(tmp_path / "a.wav", np.zeros((100, 2)))
    with pytest.raises(AudioError, match=rf"channel {channel} was asked for.*channels 0 to 1"):
        decode(path, channel=channel)


def six_tones(rate_hz: int) -> np.ndarray:
    return np.stack([tone(200 + 100 * i, 0.5, rate_hz, 0.1) for i in range(6)], axis=1)


@pytest.mark.parametrize(
    ("name", "options", "centre_hz"),
    [
        ("a.wav", {}, 400),
        ("a.wav", {"format": "WAVEX"}, 400),
        ("a.flac", {}, 400),
        ("a.ogg", {}, 300),  # Vorbis stores left, centre, right …
    ],
    ids=["wav", "wavex", "flac", "ogg"],
)
def test_5_1_yields_its_front_centre(tmp_path, name, options, centre_hz):
    path = write(tmp_path / name, six_tones(48_000), 48_000, **options)
    assert dominant_hz(decode(path)) == pytest.approx(centre_hz, abs=2)


def test_5_1_aac_yields_its_front_centre(tmp_path):
    path = write_aac(tmp_path / "a.m4a", six_tones(48_000), 48_000)
    assert dominant_hz(decode(path)[:8000]) == pytest.approx(400, abs=2)


def test_six_channels_that_name_no_centre_are_averaged(tmp_path):
    path = write(tmp_path / "a.wav", six_tones(48_000), 48_000, format="WAVEX")
    content = bytearray(path.read_bytes())
    at = content.index(b"fmt ") + 8 + 20
    assert int.from_bytes(content[at : at + 4], "little") == 0x3F
    content[at : at + 4] = (0x6F3 & ~0xC).to_bytes(4, "little")  # neither centre nor bass
    path.write_bytes(content)
    mean = six_tones(48_000).mean(axis=1)
    expected = soxr.resample(mean, 48_000, 16_000, quality="HQ")
    np.testing.assert_allclose(decode(path), expected, atol=1e-4)  # 16-bit steps


@pytest.mark.parametrize(
    ("suffix", "tolerance"),
    [("wav", 0.0), ("flac", 0.0), ("ogg", 0.0), ("mp3", 0.0), ("m4a", 2e-5)],
)
def test_a_segment_is_the_same_stretch_of_the_whole(tmp_path, suffix, tolerance):
    # AAC: a decoder that started in the middle differs by rounding.
    sweep = np.sin(2 * np.pi * np.cumsum(np.linspace(100, 2000, 16_000 * 8)) / 16_000) * 0.3
    path = tmp_path / f"a.{suffix}"
    write_aac(path, sweep, 16_000) if suffix == "m4a" else write(path, sweep, 16_000)
    whole = decode(path)
    for start, end in [(0.0, 1.0), (0.25, 0.3), (2.0, 2.0001), (5.4321, 7.9), (7.85, 8.0)]:
        segment = decode(path, start, end)
        expected = whole[round(start * 16_000) : round(end * 16_000)]
        np.testing.assert_allclose(segment, expected, atol=tolerance, rtol=0)


def test_a_segment_depends_on_its_own_samples_alone(tmp_path):
    samples = voice(2.0, 48_000)
    path = write(tmp_path / "a.wav", samples, 48_000, subtype="FLOAT")
    cut = write(tmp_path / "b.wav", samples[24_000:48_000], 48_000, subtype="FLOAT")
    np.testing.assert_array_equal(decode(path, 0.5, 1.0), decode(cut))


def test_a_seekable_container_is_not_decoded_up_to_the_segment(tmp_path, monkeypatch):
    path = write(tmp_path / "a.flac", voice(4.0, 48_000), 48_000)
    read = []
    original = soundfile.SoundFile.read

    def counting(self, frames, **options):
        block = original(self, frames, **options)
        read.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    decode(path, 3.0, 3.5)
    assert sum(read) == 24_000


def test_bounds_of_one_key_are_one_stretch(tmp_path):
    from mer.cache.identity import audio_key

    path = write(tmp_path / "a.wav", voice(1.0), subtype="FLOAT")
    edge = 0.1 + 0.5 / 16_000  # between two samples, a whole number of quarter microseconds
    starts = [edge - 3e-7, edge, edge + 2e-7]
    for a in starts:
        for b in starts:
            if audio_key(bytes(16), a, None, None) == audio_key(bytes(16), b, None, None):
                np.testing.assert_array_equal(decode(path, a), decode(path, b))
    assert len({audio_key(bytes(16), a, None, None) for a in starts}) < len(starts)


def test_an_end_just_beyond_the_recording_is_its_end(tmp_path):
    path = write(tmp_path / "a.wav", voice(1.0))
    np.testing.assert_array_equal(decode(path, 0.5, 1.09), decode(path, 0.5))


@pytest.mark.parametrize("suffix", ["wav", "mp3", "m4a"])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0.5, 0.5), "starts at 0.5 s and ends at 0.5 s"),
        ((0.8, 0.2), "starts at 0.8 s and ends at 0.2 s"),
        ((-0.1, None), "segment start is -0.1 s"),
        ((float("nan"), None), "segment start is nan s"),
        ((0.2, 1.5), "segment reaches to 1.5 s, the recording lasts 1.0"),
        ((3.0, 4.0), "recording lasts 1.0|ends before 3.000 s"),
        ((0.500001, 0.500002), "holds no sample at 16000 Hz"),
    ],
)
def test_bounds_outside_the_recording_are_refused(tmp_path, suffix, bounds, message):
    path = tmp_path / f"a.{suffix}"
    write_aac(path, voice(1.0), 16_000) if suffix == "m4a" else write(path, voice(1.0))
    with pytest.raises(AudioError, match=message):
        decode(path, *bounds)


def test_20_ms_is_enough(tmp_path):
    path = write(tmp_path / "a.wav", tone(500, 0.02, 48_000), 48_000)
    assert len(decode(path)) == 320


def directory(path):
    path.mkdir()


def html(path):
    path.write_text("<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n" * 50)


def noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(3000))


def header_only(path):
    content = write(path, voice(1.0)).read_bytes()
    path.write_bytes(content[:30])


def half_wav(path):
    keep_half(write(path, voice(1.0)))


def header_and_nothing(path):
    content = write(path, voice(1.0)).read_bytes()
    path.write_bytes(content[:44])


def no_samples(path):
    write(path, np.zeros(0))


REFUSED = [
    (lambda path: None, "no such file"),
    (directory, "is a directory"),
    (lambda path: path.write_bytes(b""), r"empty file \(0 bytes\)"),
    (lfs_pointer, r"Git LFS pointer \(\d{3} bytes of text\).*git lfs pull"),
    (html, "holds text .*DOCTYPE html.*not audio"),
    (noise, "not a recording that libsndfile or FFmpeg knows"),
    (header_only, r"ends within its header \(30 bytes\)"),
    (half_wav, r"truncated. Its header promises 1.00 s, 0.50 s are there"),
    (header_and_nothing, r"truncated. Its header promises 1.00 s, 0.00 s are there"),
]


@pytest.mark.parametrize("reader", [probe, decode], ids=["probe", "decode"])
@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_no_recording_is_refused_with_the_reason(tmp_path, make, message, reader):
    path = tmp_path / "clip.wav"
    make(path)
    with pytest.raises(AudioError, match=message) as caught:
        reader(path)
    assert str(path) in str(caught.value)


def test_a_recording_without_samples_is_refused(tmp_path):
    path = tmp_path / "clip.wav"
    no_samples(path)
    assert probe(path).frames == 0
    with pytest.raises(AudioError, match="no samples in it"):
        decode(path)


@pytest.mark.parametrize("suffix", ["flac", "mp3", "mp4"])
def test_a_truncated_recording_is_refused(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    samples = voice(6.0)
    write_aac(path, samples, 16_000) if suffix == "mp4" else write(path, samples)
    keep_half(path)
    with pytest.raises(AudioError, match="truncated|damaged"):
        decode(path)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_a_wav_written_to_a_pipe_is_read_to_its_end(tmp_path, size):
    path = write(tmp_path / "a.wav", voice(1.0))
    expected = decode(path)
    with_wav_sizes(path, size)
    np.testing.assert_array_equal(decode(path), expected)
    np.testing.assert_array_equal(decode(path, 0.25, 0.5), expected[4000:8000])
    assert probe(path).duration_s == 1.0


def test_a_flac_written_to_a_pipe_is_read_to_its_end(tmp_path):
    path = write(tmp_path / "a.flac", voice(1.0))
    expected = decode(path)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the last 36 bits of rate, channels, depth and count: the count
    content[22:26] = bytes(4)
    path.write_bytes(content)
    np.testing.assert_array_equal(decode(path), expected)
    np.testing.assert_array_equal(decode(path, 0.25, 0.5), expected[4000:8000])
    assert probe(path).duration_s == 1.0


def test_a_matroska_written_to_a_pipe_has_its_length(tmp_path):
    av = pytest.importorskip("av")

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    seekable = write_aac(tmp_path / "a.m4a", tone(440, 1.0, 44_100))
    pipe = Pipe()
    with av.open(seekable) as source, av.open(pipe, "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
        target.close()
        content = pipe.getvalue()
    path = tmp_path / "a.webm"
    path.write_bytes(content)
    assert probe(path).duration_s == pytest.approx(1.0, abs=0.05)
    assert probe(path).duration_s == pytest.approx(len(decode(path)) / 16_000, abs=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused_with_their_place(tmp_path, value):
    samples = voice(1.0)
    samples[4000] = value
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    with pytest.raises(AudioError, match=rf"sample at 0.250 s is {value}"):
        decode(path)
    assert len(decode(path, 0.5, 1.0)) == 8000  # elsewhere the recording is fine


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", voice(0.1))

    def denied(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", denied)  # root would be let through
    with pytest.raises(AudioError, match=r"a.wav: permission denied"):
        decode(path)


def test_a_video_without_sound_is_refused(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="no sound in this file"):
        probe(path)


def test_without_pyav_the_message_names_the_extra(tmp_path, monkeypatch):
    path = write_aac(tmp_path / "a.m4a", voice(0.5), 16_000)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"a.m4a.*pip install 'mer\[media\]'"):
        decode(path)
    noise(tmp_path / "b.wav")
    with pytest.raises(AudioError, match=r"b.wav: not audio that libsndfile knows"):
        decode(tmp_path / "b.wav")


def test_neither_planning_nor_decoding_imports_torch(tmp_path):
    path = write(tmp_path / "a.wav", voice(0.1, 48_000), 48_000)
    code = (
        "import sys; from pathlib import Path; from mer.extract.audio import decode;"
        f"decode(Path({str(path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_an_hour_is_never_held_at_its_own_rate(tmp_path, monkeypatch):
    """Memory beyond the result stays below some blocks, whatever the length."""
    import tracemalloc

    path = tmp_path / "a.wav"
    silence = np.zeros((48_000 * 10, 2), np.int16)
    with soundfile.SoundFile(path, "w", 48_000, 2, "PCM_16") as file:
        for _ in range(12):  # two minutes, 46 MB as float32 at 48 kHz stereo
            file.write(silence)
    tracemalloc.start()
    try:
        decoded = decode(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(decoded) == 120 * 16_000
    assert peak - decoded.nbytes < 8e6


@pytest.mark.real_data
def test_the_real_recordings_decode(shared_data):
    ravdess = sorted((shared_data / "RAVDESS").rglob("*.wav"))
    channels = {probe(path).channels for path in ravdess}
    assert channels == {1, 2}  # one file is stereo
    stereo = next(path for path in ravdess if probe(path).channels == 2)
    files = [
        (stereo, 48_000),
        (next((shared_data / "nEMO" / "samples").glob("*.wav")), 24_000),
        (next((shared_data / "JL-corpus-sample").rglob("*.wav")), 44_100),
        (next((shared_data / "EmoDB" / "wav").glob("*.wav")), 16_000),
        (shared_data / "AV-clips" / "big_buck_bunny_small.mp4", 48_000),
    ]
    for path, rate_hz in files:
        info = probe(path)
        assert info.rate_hz == rate_hz
        assert len(decode(path)) == pytest.approx(info.duration_s * 16_000, abs=1)


@pytest.mark.real_data
def test_real_lfs_pointers_are_named_as_such(shared_data):
    pointers = sorted((shared_data / "CREMA-D" / "AudioWAV").glob("*.wav"))
    assert len(pointers) == 12
    for path in pointers:
        with pytest.raises(AudioError, match="Git LFS pointer"):
            probe(path)
