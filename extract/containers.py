"""Recordings as files: what a file is, why it cannot be read, and its samples at their own rate.

wav, flac, ogg and mp3 are read by libsndfile; mp4, m4a and whatever else libsndfile refuses by
FFmpeg through PyAV (extra ``media``). A segment is sought where the container locates it to the
sample: uncompressed audio, flac, and streams whose clock is the sample rate (mp4). Seeks into ogg
and mp3 do not (libsndfile 1.2.2: up to half of full scale off), so these are decoded from their
start.

Truncation is noticed where the file says how long it should be: wav, flac, mp3 with a frame count,
mp4. An ogg that was cut reads as a shorter one.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from mer.cache.errors import AudioError, MissingDependencyError

BLOCK_FRAMES = 1 << 16
CHANNELS_OF_5_1 = 6
PREROLL_S = 0.5  # decoded and dropped after a seek, so that lossy decoders have found their state
LFS_POINTER = b"version https://git-lfs"

_TRUNCATED_S = 0.01  # what a wav header may promise beyond the file
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's answer where a header does not say
_SAMPLE_CODES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
_STREAMED_SIZE = 0x7FFFF000  # sizes from here on are placeholders of programs that write to a pipe
_FRONT_CENTRE_BIT = 0x4


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a recording's header says.

    Parameters
    ----------
    frames : int
        Samples per channel; an estimate for mp3 and what FFmpeg reads.
    rate_hz : int
        The recording's own rate.
    channels : int
        Number of channels.
    duration_s : float
        ``frames / rate_hz``.
    container : str
        ``"wav"``, ``"flac"``, ``"ogg"``, ``"mp3"``, ``"mp4"`` …
    """

    frames: int
    rate_hz: int
    channels: int
    duration_s: float
    container: str


class Recording(Protocol):
    """An open recording."""

    info: AudioInfo
    exact: bool  # whether info.frames is a count, not an estimate
    tolerance_frames: int | None  # how far samples may fall short of info.frames; None: any
    front_centre: int | None  # the front-centre channel of a 5.1 recording

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """Yield frames ``start`` to ``stop`` as (n, channels) float32; fewer if it ends before."""
        ...


@contextmanager
def open_recording(path: Path) -> Iterator[Recording]:
    """Open a recording and read its header.

    Raises
    ------
    AudioError
        It cannot be read, or is not audio; the message says which and what to do.
    MissingDependencyError
        It takes PyAV, which is not installed.
    """
    if path.is_dir():
        raise AudioError(f"{path}: is a directory, not a recording.")
    try:
        with path.open("rb") as file, _reader(path, file) as recording:
            yield recording
    except PermissionError as error:
        raise AudioError(f"{path}: permission denied. Make it readable for this user.") from error
    except FileNotFoundError as error:
        raise AudioError(
            f"{path}: no such file. Check the manifest's path or the corpus root."
        ) from error
    except AudioError:
        raise
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _reader(path: Path, file: IO[bytes]) -> _SndfileRecording | _FfmpegRecording:
    """Choose the reader, or refuse the file with the reason."""
    head = file.read(1024)
    if not head:
        raise AudioError(f"{path}: empty file (0 bytes). Fetch it again.")
    if head.startswith(LFS_POINTER):
        raise AudioError(
            f"{path}: Git LFS pointer ({_size(file)} bytes of text), not the recording itself. "
            "Run `git lfs pull` in its repository."
        )
    if _needs_ffmpeg(head):
        return _FfmpegRecording(path, file)
    wav = None
    if head[:4] in (b"RIFF", b"RF64"):
        wav = _WavHeader.read(file)
        if wav is None:
            raise AudioError(
                f"{path}: wav file without audio: it ends within its header "
                f"({_size(file)} bytes). Fetch it again."
            )
        wav.refuse_truncated(path)
    recording = _open_sndfile(path, file, wav)
    if recording is not None:
        return recording
    if _is_text(head):
        start = head[:40].decode("utf-8", "replace").splitlines()[0]
        raise AudioError(
            f"{path}: holds text ({start!r} …), not audio. Replace it by the recording."
        )
    try:
        return _FfmpegRecording(path, file)
    except MissingDependencyError:
        raise AudioError(
            f"{path}: not audio that libsndfile knows (wav, flac, ogg, mp3 …). "
            "For other formats: pip install 'mer[media]'."
        ) from None


def _size(file: IO[bytes]) -> int:
    position = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(position)
    return size


def _needs_ffmpeg(head: bytes) -> bool:
    """Whether these are the first bytes of mp4/mov, Matroska, ASF, AMR, FLV or raw AAC."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return True
    if head.startswith((b"\x1aE\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11", b"#!AMR", b"FLV\x01")):
        return True
    return (
        len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    )  # AAC frames; libsndfile takes them for mp3


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character cut by the end of the sample is fine
            return False
        text = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in text)


@dataclass(frozen=True, slots=True)
class _WavHeader:
    """Sizes of a wav file, as promised by its header and as present."""

    size_offset: int  # where the data chunk's size stands
    promised: int  # bytes of audio
    present: int
    streamed: bool  # the sizes are placeholders: everything up to the end is audio
    byte_rate: int
    channel_mask: int | None

    @classmethod
    def read(cls, file: IO[bytes]) -> _WavHeader | None:
        """Parse the chunks up to the audio; ``None`` if there is none."""
        size = _size(file)
        file.seek(0)
        riff, riff_size, _ = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
        byte_rate, mask, long_size = 0, None, None
        while True:
            head = file.read(8)
            if len(head) < 8:
                return None
            name, length = struct.unpack("<4sI", head)
            if name == b"data":
                break
            body = file.tell()
            if name == b"fmt ":
                fmt = file.read(min(length, 40))
                if len(fmt) < 16:
                    return None
                byte_rate = struct.unpack_from("<I", fmt, 8)[0]
                if struct.unpack_from("<H", fmt)[0] == 0xFFFE and len(fmt) >= 24:
                    mask = struct.unpack_from("<I", fmt, 20)[0]
            elif name == b"ds64":
                sizes = file.read(16)
                long_size = struct.unpack_from("<Q", sizes, 8)[0] if len(sizes) == 16 else None
            file.seek(body + length + length % 2)
        offset = file.tell() - 4
        present = size - file.tell()
        if riff == b"RF64" and long_size:
            length = long_size
        # Recorders put 0 first and the length last; after a crash, or into a pipe, it stays 0.
        ends_at = 8 + riff_size
        unfinished = (
            length == 0 and present > 0 and (riff_size >= _STREAMED_SIZE or ends_at <= file.tell())
        )
        placeholder = riff != b"RF64" and length >= _STREAMED_SIZE and length > present
        return cls(offset, length, present, unfinished or placeholder, byte_rate, mask)

    def refuse_truncated(self, path: Path) -> None:
        missing = self.promised - self.present
        if self.streamed or not self.byte_rate or missing <= _TRUNCATED_S * self.byte_rate:
            return
        raise AudioError(
            f"{path}: truncated. Its header promises {self.promised / self.byte_rate:.2f} s, "
            f"{self.present / self.byte_rate:.2f} s are there. Fetch it again."
        )


class _Patched(io.RawIOBase):
    """A file read as if ``data`` stood at ``offset``."""

    def __init__(self, file: IO[bytes], offset: int, data: bytes) -> None:
        self.file, self.offset, self.data = file, offset, data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        position = self.file.tell()
        chunk = bytearray(self.file.read(len(buffer)))
        for at, byte in enumerate(self.data, self.offset - position):
            if 0 <= at < len(chunk):
                chunk[at] = byte
        buffer[: len(chunk)] = bytes(chunk)
        return len(chunk)


def _open_sndfile(path: Path, file: IO[bytes], wav: _WavHeader | None) -> _SndfileRecording | None:
    """Return the recording, or ``None`` if libsndfile does not know the format."""
    import soundfile

    class SequentialFile(soundfile.SoundFile):  # type: ignore[misc]
        """soundfile seeks to where it is after each read, which damages mp3; not if it cannot."""

        def seekable(self) -> bool:
            return False

    def open_() -> Any:
        if wav is None or wav.promised or not wav.streamed:
            return SequentialFile(str(path))
        file.seek(0)
        length = struct.pack("<I", min(wav.present, 0xFFFFFFFF))
        return SequentialFile(_Patched(file, wav.size_offset, length))

    try:
        sound = open_()
        recording = _SndfileRecording(path, sound, None if wav is None else wav.channel_mask)
        if sound.frames >= _UNKNOWN_FRAMES:  # flac written to a pipe
            recording.count()
            sound.close()
            recording.sound = open_()
    except (soundfile.LibsndfileError, TypeError):  # TypeError: a name that ends in .raw
        return None
    return recording


class _SndfileRecording:
    def __init__(self, path: Path, sound: Any, channel_mask: int | None) -> None:
        self.path, self.sound = path, sound
        container = {"WAVEX": "wav", "RF64": "wav"}.get(sound.format, sound.format.lower())
        self.exact = container != "mp3"
        self.seeks = container != "ogg" and sound.subtype.startswith(_SAMPLE_CODES)
        frames, rate = sound.frames, sound.samplerate
        self.info = AudioInfo(frames, rate, sound.channels, frames / rate, container)
        # mp3 without a frame count is estimated from its bit rate: 0.5 % off where measured.
        self.tolerance_frames = 0 if self.exact else max(rate // 4, frames // 100)
        self.front_centre = None
        if sound.channels == CHANNELS_OF_5_1:
            if channel_mask:
                if channel_mask & _FRONT_CENTRE_BIT:
                    self.front_centre = (channel_mask & (_FRONT_CENTRE_BIT - 1)).bit_count()
            else:  # left, centre, right … in Vorbis; left, right, centre … elsewhere
                self.front_centre = 1 if container == "ogg" else 2

    def count(self) -> None:
        """Set the length by decoding: the header does not say it."""
        self.seeks = False
        frames = sum(len(block) for block in self.blocks(0, None))
        self.info = replace(self.info, frames=frames, duration_s=frames / self.info.rate_hz)

    def __enter__(self) -> _SndfileRecording:
        return self

    def __exit__(self, *_: object) -> None:
        self.sound.close()

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        import soundfile

        position = 0
        try:
            if self.seeks:
                position = self.sound.seek(start)
            while stop is None or position < stop:
                # Up to the start, blocks are decoded and dropped.
                until = start if position < start else stop
                wanted = BLOCK_FRAMES if until is None else min(BLOCK_FRAMES, until - position)
                block = self.sound.read(wanted, dtype="float32", always_2d=True)
                if not len(block):
                    return
                position += len(block)
                if position > start:
                    yield block
        except soundfile.LibsndfileError as error:
            reason = error.error_string.strip(" .") or "unreadable block"
            rate = self.sound.samplerate
            raise AudioError(
                f"{self.path}: damaged or truncated after {position / rate:.2f} s ({reason}). "
                "Fetch it again."
            ) from error


class _FfmpegRecording:
    def __init__(self, path: Path, file: IO[bytes]) -> None:
        av = _import_av(path)
        self.path = path
        file.seek(0)
        try:
            self.container = av.open(file)
        except av.error.FFmpegError as error:
            raise AudioError(
                f"{path}: damaged, or not a recording that libsndfile or FFmpeg knows "
                f"({error.strerror}). Fetch it again."
            ) from error
        audio = self.container.streams.audio
        if not audio:
            self.container.close()
            raise AudioError(f"{path}: no sound in this file.")
        self.stream = audio[0]
        context = self.stream.codec_context
        names = [channel.name for channel in context.layout.channels]
        rate, formats = context.sample_rate, self.container.format.name
        container = "mp4" if "mp4" in formats else formats.partition(",")[0]
        if self.stream.duration is not None:
            seconds = float(self.stream.duration * self.stream.time_base)
        else:
            seconds = (self.container.duration or 0) / av.time_base
        frames = round(seconds * rate)
        self.info = AudioInfo(frames, rate, len(names), frames / rate, container)
        self.exact = False
        # Other containers' durations include the picture, or are guessed from the bit rate.
        reliable = container == "mp4" and self.stream.duration is not None
        self.tolerance_frames = max(rate // 4, frames // 100) if reliable else None
        self.front_centre = None
        if len(names) == CHANNELS_OF_5_1:
            named = any(name != "NONE" for name in names)
            self.front_centre = (names.index("FC") if "FC" in names else None) if named else 2

    def __enter__(self) -> _FfmpegRecording:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        av = _import_av(self.path)
        rate = self.info.rate_hz
        position: int | None = None
        try:
            first = self.stream.start_time or 0
            before = start - round(PREROLL_S * rate)
            if self.stream.time_base * rate == 1 and before > 0:
                self.container.seek(first + before, stream=self.stream)
            else:
                position = 0
            for frame in self.container.decode(self.stream):
                if frame.sample_rate != rate or len(frame.layout.channels) != self.info.channels:
                    raise AudioError(
                        f"{self.path}: changes its rate or channels midway. Re-encode it."
                    )
                if position is None:
                    position = frame.pts - first
                    if position > start:
                        raise AudioError(
                            f"{self.path}: {start / rate:.3f} s cannot be sought to. Re-encode it."
                        )
                block = _float_frames(frame)[max(0, start - position) :]
                position += frame.samples
                if stop is not None and position > stop:
                    block = block[: max(0, len(block) - (position - stop))]
                if len(block):
                    yield block
                if stop is not None and position >= stop:
                    return
        except av.error.FFmpegError as error:
            seconds = (position or 0) / rate
            raise AudioError(
                f"{self.path}: damaged or truncated after {seconds:.2f} s ({error.strerror}). "
                "Fetch it again."
            ) from error


def _import_av(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: reading this format takes PyAV. Install it: pip install 'mer[media]'."
        ) from error
    return av


def _float_frames(frame: Any) -> np.ndarray:
    """Return a decoded frame as (n, channels) float32."""
    data: np.ndarray = frame.to_ndarray()  # (channels, n), or (1, n * channels) if interleaved
    data = data.T if frame.format.is_planar else data.reshape(frame.samples, -1)
    if data.dtype == np.uint8:
        return (data.astype(np.float32) - 128) / 128
    if data.dtype.kind == "i":
        return data.astype(np.float32) / np.float32(1 << (8 * data.dtype.itemsize - 1))
    return data.astype(np.float32)
