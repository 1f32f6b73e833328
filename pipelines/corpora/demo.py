"""The demo corpus: synthetic speech with four "emotions", made on the spot.

It stands in for a real corpus where none is at hand: the same kind of files, the same steps. Its
numbers say nothing about emotion recognition. Speakers differ in pitch, tract length, level, tempo
and in how strongly they express themselves; every utterance varies around its emotion, so that
classes overlap and a speaker-independent classifier makes mistakes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mer.cache.errors import ManifestError, UsageError
from mer.pipelines.corpora.corpus import Corpus, Published, differences
from mer.pipelines.manifest import Manifest, Utterance, read_manifest, write_manifest

if TYPE_CHECKING:
    import numpy as np

    from mer.pipelines.corpora.voice import Manner, Speaker

logger = logging.getLogger(__name__)

VERSION = 1  # raised whenever the sound of an utterance changes
MARKER = "mer-demo.json"
EMOTIONS = ("angry", "happy", "neutral", "sad")
SENTENCES = (
    ("The train leaves at seven.", "DH AH T R EY N L IY V Z AE T S EH V AH N"),
    ("My keys are on the table.", "M AY K IY Z AA R AA N DH AH T EY B AH L"),
    ("We will meet near the river.", "W IY W IH L M IY T N IH R DH AH R IH V ER"),
    ("There is some soup on the stove.", "DH EH R IH Z S AH M S UW P AA N DH AH S T OW V"),
    ("He opened the window.", "HH IY OW P AH N D DH AH W IH N D OW"),
    ("The shop is around the corner.", "DH AH SH AA P IH Z ER AW N D DH AH K AO R N ER"),
    ("They painted the door blue.", "DH EY P EY N T IH D DH AH D AO R B L UW"),
    ("A letter came this morning.", "AH L EH T ER K EY M DH IH S M AO R N IH NG"),
    ("You can leave it in the garden.", "Y UW K AE N L IY V IH T IH N DH AH G AA R D AH N"),
    ("Four birds sat on the roof.", "F AO R B ER D Z S AE T AA N DH AH R UW F"),
)
README = """\
This folder is SYNTHETIC. Nobody spoke these sentences and nobody felt anything.

A small source-filter synthesiser (mer/pipelines/corpora/voice.py) made the recordings, and the
"emotions" are settings of pitch, tempo, loudness and voice quality. The folder shows how mer works
and lets its tests run without a download. Scores on it say nothing about emotion recognition.

  SPEAKER/SPEAKER_EMOTION_NN.wav   16 kHz, 16 bit, mono
  manifest.csv                     path, transcript, speaker, gender, label of every recording
  {marker}                    what was made, to tell whether it is complete

Version {version}, seed {seed}:
{speakers} speakers x {emotions} emotions x {sentences} sentences.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What to synthesise; the same config gives the same bytes.

    Parameters
    ----------
    num_speakers : int, default=6
        Women and men in turn.
    num_sentences : int, default=6
        At most ``len(SENTENCES)``.
    seed : int, default=1
        Draws speakers and utterances.
    """

    num_speakers: int = 6
    num_sentences: int = 6
    seed: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_speakers <= 99:
            raise UsageError(f"num_speakers must be 1 to 99, got {self.num_speakers}.")
        if not 1 <= self.num_sentences <= len(SENTENCES):
            raise UsageError(
                f"num_sentences must be 1 to {len(SENTENCES)}, got {self.num_sentences}."
            )


def synthesise(
    root: Path | str,
    config: DemoConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Make the corpus in ``root``, or what is missing of it; an intact one is reused.

    Parameters
    ----------
    root : Path or str
        Folder that is absent, empty, or holds a demo corpus.
    config : DemoConfig, optional
        Size and seed.
    progress : callable, optional
        Called with utterances done and utterances in total.

    Raises
    ------
    ManifestError
        The folder holds something else.
    """
    config = config or DemoConfig()
    root = Path(os.path.abspath(root))
    state = _state(root)
    wanted = {
        "corpus": "demo",
        "version": VERSION,
        "num_speakers": config.num_speakers,
        "num_sentences": config.num_sentences,
        "seed": config.seed,
    }
    if state is not None and {k: state.get(k) for k in wanted} != wanted:
        logger.info("The demo corpus in %s is of another version or size: making it anew.", root)
        _clear(root, state)
        state = None
    known = dict(state.get("files", {})) if state is not None else {}
    utterances = list(_utterances(root, config))
    root.mkdir(parents=True, exist_ok=True)
    if state is None:
        _write(root / MARKER, _json(wanted))  # first: an interrupted run is continued, not refused
    files: dict[str, str] = {}
    for done, utterance in enumerate(utterances, start=1):
        assert utterance.path is not None
        name = utterance.path.relative_to(root).as_posix()
        digest = _digest(utterance.path)
        if digest is None or known.get(name) != digest:
            content = _wav(render(utterance.id, config))
            utterance.path.parent.mkdir(exist_ok=True)
            _write(utterance.path, content)
            digest = hashlib.sha256(content).hexdigest()
        files[name] = digest
        if progress is not None:
            progress(done, len(utterances))
    if files != known or not (root / "manifest.csv").is_file():
        manifest = Manifest("demo", tuple(utterances))
        write_manifest(manifest, root / "manifest.csv")
        text = README.format(
            marker=MARKER,
            version=VERSION,
            seed=config.seed,
            speakers=config.num_speakers,
            emotions=len(EMOTIONS),
            sentences=config.num_sentences,
        )
        _write(root / "README.txt", text.encode())
        _write(root / MARKER, _json({**wanted, "files": files}))
    return Manifest("demo", read_manifest(root / "manifest.csv").utterances, (SYNTHETIC,))


SYNTHETIC = "The recordings are synthetic: scores on them say nothing about emotion recognition."


def read(root: Path) -> Manifest:
    """Return the corpus in ``root``, whatever its size; make the default one if absent."""
    root = Path(os.path.abspath(root))
    state = _state(root)
    if state is None or state.get("version") != VERSION:
        config = DemoConfig()
    else:
        config = DemoConfig(**{k: state[k] for k in ("num_speakers", "num_sentences", "seed")})
    manifest = synthesise(root, config)
    notes = manifest.notes
    if config == DemoConfig():
        assert DEMO.published is not None
        notes = (*notes, *differences(manifest.utterances, DEMO.published))
    return Manifest(manifest.name, manifest.utterances, notes)


def render(utterance_id: str, config: DemoConfig) -> np.ndarray:
    """Return the samples of one utterance, (N,) float64 at 16 kHz."""
    from mer.pipelines.corpora.voice import speak

    speaker_name, emotion, number = utterance_id.split("_")
    rng = _generator(config.seed, utterance_id)
    speaker, habit = _speaker(speaker_name, config.seed)
    phones = tuple(SENTENCES[int(number) - 1][1].split())
    return speak(phones, speaker, _manner(emotion, habit, rng), rng)


def _utterances(root: Path, config: DemoConfig) -> list[Utterance]:
    return [
        Utterance(
            id=(name := f"{speaker}_{emotion}_{number:02d}"),
            path=root / speaker / f"{name}.wav",
            text=SENTENCES[number - 1][0],
            speaker=speaker,
            gender="female" if index % 2 == 0 else "male",
            label=emotion,
        )
        for index in range(config.num_speakers)
        for speaker in [f"s{index + 1:02d}"]
        for emotion in EMOTIONS
        for number in range(1, config.num_sentences + 1)
    ]


@dataclass(frozen=True, slots=True)
class _Habit:
    """What a speaker does in every emotion."""

    expression: float
    level_db: float
    rate: float
    tilt: float
    breath: float
    jitter: float


def _generator(seed: int, name: str) -> np.random.Generator:
    import numpy as np

    digest = hashlib.sha256(f"{VERSION}|{seed}|{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def _speaker(name: str, seed: int) -> tuple[Speaker, _Habit]:
    from mer.pipelines.corpora.voice import Speaker

    rng = _generator(seed, name)
    woman = int(name[1:]) % 2 == 1
    speaker = Speaker(
        f0_hz=float(rng.uniform(175, 225) if woman else rng.uniform(95, 135)),
        tract=float(rng.uniform(1.12, 1.2) if woman else rng.uniform(0.96, 1.04)),
    )
    habit = _Habit(
        expression=float(rng.uniform(0.85, 1.15)),
        level_db=float(rng.normal(-25, 2.0)),
        rate=float(rng.normal(1.0, 0.06)),
        tilt=float(rng.uniform(0.48, 0.62)),
        breath=float(rng.uniform(0.01, 0.05)),
        jitter=float(rng.uniform(0.004, 0.012)),
    )
    return speaker, habit


# Full-strength changes from neutral: log pitch, log span, final (octaves), log rate, level (dB),
# tilt, open quotient, log breath, log jitter, log formants. Directions follow Scherer (2003),
# "Vocal communication of emotion", table 3; sizes are ours.
_CHANGES = {
    "angry": (0.24, 0.30, -0.25, 0.12, 6.5, -0.34, -0.16, -0.4, 0.6, 0.005),
    "happy": (0.36, 0.60, 0.40, 0.08, 3.0, -0.12, 0.0, 0.1, -0.2, 0.050),
    "neutral": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "sad": (-0.08, -0.60, -0.05, -0.20, -4.5, 0.16, 0.12, 1.0, 0.3, -0.010),
}
_SPREADS = (0.06, 0.16, 0.12, 0.06, 1.6, 0.05, 0.035, 0.3, 0.3, 0.008)


def _manner(emotion: str, habit: _Habit, rng: np.random.Generator) -> Manner:
    """Draw how one utterance is spoken: strength varies, and so does everything else a little."""
    import numpy as np

    from mer.pipelines.corpora.voice import Manner

    strength = habit.expression * float(np.clip(rng.normal(1.0, 0.2), 0.4, 1.5))
    change = np.array(_CHANGES[emotion]) * strength
    change += rng.normal(0.0, 1.0, len(_SPREADS)) * np.array(_SPREADS)
    pitch, span, final, rate, level, tilt, quotient, breath, jitter, formants = map(float, change)
    return Manner(
        pitch=float(np.exp(pitch)),
        span=float(np.exp(span)),
        final=-0.25 + final,
        rate=habit.rate * float(np.exp(rate)),
        level_db=habit.level_db + level,
        tilt=float(np.clip(habit.tilt + tilt, 0.05, 0.9)),
        open_quotient=float(np.clip(0.6 + quotient, 0.35, 0.85)),
        breath=habit.breath * float(np.exp(breath)),
        jitter=habit.jitter * float(np.exp(jitter)),
        smile=float(np.exp(formants)),
    )


def _wav(samples: np.ndarray) -> bytes:
    import numpy as np

    from mer.pipelines.corpora.voice import RATE_HZ

    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def _state(root: Path) -> dict[str, Any] | None:
    """Return what the marker says, None where the folder is absent or empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        state = json.loads((root / MARKER).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("corpus") != "demo":
            raise ValueError
    except (OSError, ValueError):
        raise ManifestError(
            f"{root} is not empty and holds no demo corpus ({MARKER} is absent or damaged). "
            "Name another folder for the demo."
        ) from None
    return state


def _clear(root: Path, state: dict[str, Any]) -> None:
    """Remove the recordings that an older demo corpus lists, and nothing else."""
    for name in state.get("files", {}):
        path = root / name
        if path.resolve().is_relative_to(root.resolve()):
            path.unlink(missing_ok=True)
            if path.parent != root and path.parent.is_dir() and not any(path.parent.iterdir()):
                shutil.rmtree(path.parent)


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _json(state: dict[str, Any]) -> bytes:
    return (json.dumps(state, indent=1) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


DEMO = Corpus(
    name="demo",
    title="Synthetic demo corpus: 6 speakers, 4 emotions, made on the spot",
    licence="CC0",
    layout="an empty folder, or a demo corpus made before",
    read=read,
    published=Published(
        total=144,
        labels=dict.fromkeys(EMOTIONS, 36),
        speakers={f"s{index:02d}": 24 for index in range(1, 7)},
        rate_hz=16_000,
        channels=1,
    ),
    scheme="demo-4",
    protocol="demo-loso",
)
