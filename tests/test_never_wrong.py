"""What may change a number is a miss; what may not is a hit.

First on identities and keys, for every option of every registered extractor, then through
`mer.pipelines.extraction` on a small corpus, where `computed` and `reused` tell.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import soundfile
import tiny_checkpoints
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mer.cache.errors import CheckpointError, MissingDependencyError, UnknownNameError, UsageError
from mer.cache.home import Cache
from mer.cache.identity import canonical_json, fingerprint
from mer.extract import audio, pitch, registry
from mer.extract.contract import Extractor, Source
from mer.extract.inputs import resolve
from mer.extract.logmel import LogMel
from mer.pipelines.extraction import extract, plan_features
from mer.pipelines.manifest import Manifest, Utterance

# Options of extractors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How to build an extractor of one class, and another value for each of its options.

    Parameters
    ----------
    name : str
        A registered name without presets.
    base : callable
        From a folder to the options that the extractor cannot do without.
    another : mapping
        Option to a value that changes what is computed; ``MODEL`` is another checkpoint.
    only : mapping
        Option to its only value.
    same : tuple of mapping
        Options that spell the base in other words.
    ours : bool
        Whether our code computes the numbers, so that its version counts.
    """

    name: str
    base: Callable[[Path], dict[str, str]] = lambda _: {}
    another: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, str] = field(default_factory=dict)
    same: tuple[Mapping[str, str], ...] = ()
    ours: bool = True


MODEL = "another checkpoint"
REVISION = "another commit"


def _speech(folder: Path, seed: int = 0) -> dict[str, str]:
    return {"model": str(tiny_checkpoints.speech(folder, "wavlm", seed=seed))}


def _whisper(folder: Path, seed: int = 0) -> dict[str, str]:
    made = tiny_checkpoints.whisper(folder, seed=seed)
    return {"model": str(made), "overlap_s": "0.4"}


def _text(folder: Path, seed: int = 0) -> dict[str, str]:
    return {"model": str(tiny_checkpoints.text(folder, seed=seed))}


CHECKPOINTS: dict[str, Callable[..., dict[str, str]]] = {
    registry.SPEECH_SSL: _speech,
    registry.WHISPER: _whisper,
    registry.TEXT: _text,
}
FAMILIES: dict[str, Family] = {
    "mer.extract.logmel:LogMel": Family(
        "logmel",
        another={
            "n_mels": "81",
            "window_ms": "25.0625",  # one sample
            "hop_ms": "10.0625",
            "fmin": "20.001",
            "fmax": "7599.999",
            "floor": "1.0000001e-10",
            "dtype": "float32",
        },
        same=(
            {"n_mels": "80.0", "window_ms": "25.00", "fmin": "2e1", "floor": "0.0000000001"},
            {"dtype": "float16", "hop_ms": "10"},
        ),
    ),
    "mer.extract.pitch:Crepe": Family(
        "crepe",
        lambda _: {"model": "tiny"},
        another={
            "model": "full",
            "decoder": "argmax",
            "voicing": "0.5000001",
            "fmin": "60",
            "fmax": "1000",
            "unvoiced": "token",
            "dtype": "float32",
        },
        same=({"voicing": "0.50", "fmin": "50.0"}, {"unvoiced": "interpolate"}),
    ),
    "mer.extract.opensmile:Egemaps": Family(
        "egemaps",
        another={"level": "lld", "dtype": "float16"},
        same=({"level": "functionals", "dtype": "float32"},),
    ),
    registry.SPEECH_SSL: Family(
        "wavlm",
        _speech,
        another={
            "model": MODEL,
            "revision": REVISION,
            "layers": "0,final",
            "normalise": "yes",
            "window_s": "40.02",  # one hop
            "overlap_s": "4.03",
            "precision": "bfloat16",
            "dtype": "float32",
        },
        same=(
            {"layers": "final", "normalise": "no", "window_s": "40.0"},
            {"overlap_s": "4.00", "precision": "float32"},
        ),
    ),
    registry.WHISPER: Family(
        "whisper",
        _whisper,
        another={
            "model": MODEL,
            "revision": REVISION,
            "layers": "1",
            "overlap_s": "0.42",
            "precision": "float16",
            "dtype": "float32",
        },
        only={"window": "30s"},
        same=({"window": "30s", "layers": "final", "overlap_s": "0.40"},),
    ),
    registry.TEXT: Family(
        "roberta",
        _text,
        another={
            "model": MODEL,
            "revision": REVISION,
            "layers": "all",
            "special": "drop",
            "pooled": "mean",
            "long": "truncate",
            "precision": "bfloat16",
            "dtype": "float32",
        },
        same=({"special": "keep", "pooled": "none", "long": "refuse"},),
    ),
}
# "imported" computes nothing: tests/extract/test_imported.py.
COMPUTED = sorted(set(registry.EXTRACTORS) - {"imported"})
TARGETS = sorted({registry.EXTRACTORS[name][0] for name in COMPUTED})


def identity(extractor: Extractor) -> str:
    return fingerprint(extractor.spec.identity)


def options_of(name: str) -> set[str]:
    """Return what an extractor says it has, as the message about an unknown option does."""
    cls, _ = registry.extractor_class(name)
    with pytest.raises(UnknownNameError, match="'no-such-option'") as caught:
        cls.from_options(name, {"no-such-option": "1"})
    return set(caught.value.known)


def create(name: str, options: Mapping[str, str]) -> Extractor:
    try:
        return registry.create(registry.FeatureRequest(name, options))
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.partition(":")[2])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def family(target: str) -> Family:
    assert target in FAMILIES, f"add {target} and its options to FAMILIES"
    return FAMILIES[target]


@pytest.fixture(scope="module")
def base(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return family.base(tmp_path_factory.mktemp(family.name) / "model")


def test_every_option_of_every_extractor_is_listed_here(family: Family) -> None:
    spelt = {option for same in family.same for option in same}
    listed = {*family.another, *family.only, *spelt}
    assert options_of(family.name) == listed, "give FAMILIES another value for each new option"


@pytest.mark.parametrize("name", COMPUTED)
def test_a_name_presets_options_only(name: str) -> None:
    target, preset = registry.EXTRACTORS[name]
    assert set(preset) <= {*FAMILIES[target].another, *FAMILIES[target].only}


def another_model(target: str, folder: Path) -> str:
    return CHECKPOINTS[target](folder / "another", seed=1)["model"]


def test_another_value_of_any_option_is_a_miss(
    target: str, family: Family, base: dict[str, str], tmp_path: Path
) -> None:
    seen = {"as it is": identity(create(family.name, base))}
    for option, value in family.another.items():
        if value == REVISION:
            continue  # of a hub model only: see below
        chosen = another_model(target, tmp_path) if value == MODEL else value
        made = identity(create(family.name, {**base, option: chosen}))
        assert made not in seen.values(), f"{option}={chosen} changes nothing"
        seen[option] = made


def test_an_option_with_one_value_takes_no_other(family: Family, base: dict[str, str]) -> None:
    for option, value in family.only.items():
        create(family.name, {**base, option: value})
        with pytest.raises(UsageError, match=f"{option}=10s is not known"):
            create(family.name, {**base, option: "10s"})


def test_defaults_order_and_spelling_of_options_are_a_hit(
    family: Family, base: dict[str, str]
) -> None:
    made = identity(create(family.name, base))
    assert family.same
    for same in family.same:
        spelt = {**base, **same}
        assert identity(create(family.name, spelt)) == made, same
        backwards = dict(reversed(spelt.items()))
        text = f"{family.name}: " + " , ".join(f"{k} = {v}" for k, v in backwards.items())
        assert identity(registry.create(text)) == made, text


def test_another_version_of_the_extractor_is_a_miss(
    family: Family, base: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = create(family.name, base)
    monkeypatch.setattr(type(before), "version", before.version + 1)
    assert (identity(create(family.name, base)) != identity(before)) == family.ours


@pytest.mark.parametrize("rule", sorted(audio.FRONT_END))
def test_another_rule_of_the_front_end_is_a_miss_for_sound_and_a_hit_for_text(
    rule: str, family: Family, base: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = create(family.name, base)
    was = identity(before)
    changed = {"rate_hz": 8_000, "version": 2}.get(rule, "another")
    monkeypatch.setitem(audio.FRONT_END, rule, changed)
    touched = family.ours and before.modality == "audio"
    assert (identity(create(family.name, base)) != was) == touched


def test_the_front_end_in_the_identity_is_the_one_that_runs() -> None:
    rules = audio.FRONT_END
    assert rules["rate_hz"] == audio.SAMPLE_RATE_HZ == audio.decode.__defaults__[-1]
    assert rules["resampler"].split()[-1] == audio.RESAMPLER_QUALITY
    assert rules["downmix"] == audio.DEFAULT_DOWNMIX


NUMBERS = {
    "n_mels": st.integers(1, 90),
    "window_ms": st.floats(2, 60),
    "hop_ms": st.floats(1, 60),
    "fmin": st.floats(0, 100),
    "fmax": st.floats(4000, 8000),
    "floor": st.floats(1e-30, 1),
    "dtype": st.sampled_from(["float16", "float32"]),
}


@given(st.fixed_dictionaries({}, optional=NUMBERS), st.data())
@settings(max_examples=60, deadline=None)
def test_two_settings_of_logmel_share_a_store_exactly_if_they_compute_the_same(
    options: dict[str, Any], data: st.DataObject
) -> None:
    changed = data.draw(st.sampled_from(sorted(NUMBERS)))
    other = {**options, changed: data.draw(NUMBERS[changed])}
    try:
        one, two = (
            LogMel.from_options("logmel", {k: str(v) for k, v in chosen.items()})
            for chosen in (options, other)
        )
    except UsageError:  # bands too narrow for the spectrum
        return

    def computed(made: LogMel) -> tuple[Any, ...]:
        bank = made._filters.tobytes()
        return made.window_steps, made.hop_steps, made.floor, bank, made.outputs[0].dtype

    if computed(one) != computed(two):
        assert identity(one) != identity(two)
    if options.get(changed) == other[changed]:
        assert identity(one) == identity(two)


# Weights ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS), ids=lambda t: t.partition(":")[2])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """The name of a family and the options of a checkpoint that a test may change."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    return FAMILIES[request.param].name, CHECKPOINTS[request.param](folder)


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Any:
    """Change one bit of a file for a while."""
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[byte] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(content)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_weights_and_tokenizers_that_differ_by_one_bit_are_a_miss(
    checkpoint: tuple[str, dict[str, str]], place: float, bit: int, data: st.DataObject
) -> None:
    name, options = checkpoint
    before = identity(create(name, options))
    folder = Path(options["model"])
    names = [p.name for p in folder.iterdir() if p.suffix == ".safetensors"]
    if name == "roberta":
        names += ["tokenizer.json"]
    path = folder / data.draw(st.sampled_from(sorted(names)))
    with flipped(path, int(place * path.stat().st_size), bit):
        assert identity(create(name, options)) != before
    assert identity(create(name, options)) == before


def test_every_setting_of_a_checkpoint_is_a_miss_and_its_bookkeeping_is_not(
    checkpoint: tuple[str, dict[str, str]],
) -> None:
    name, options = checkpoint
    before = identity(create(name, options))
    path = Path(options["model"]) / "config.json"
    text = path.read_text()
    config = json.loads(text)
    notes = {"transformers_version": "0", "architectures": ["X"], "_name_or_path": "elsewhere"}
    path.write_text(json.dumps({**dict(reversed(config.items())), **notes}, indent=7))
    assert identity(create(name, options)) == before
    for key, value in config.items():
        if key in {*notes, "dtype", "model_type"}:
            continue
        changed = not value if isinstance(value, bool) else f"{value}x"
        if isinstance(value, int | float) and not isinstance(value, bool):
            changed = value + 1
        path.write_text(json.dumps({**config, key: changed}))
        refused = (CheckpointError, UsageError, ValueError, TypeError, AttributeError)
        with suppress(*refused):  # as good as a miss
            assert identity(create(name, options)) != before, key
    path.write_text(text)


def test_weights_in_a_moved_folder_are_a_hit(
    checkpoint: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    name, options = checkpoint
    moved = shutil.copytree(options["model"], tmp_path / "another name")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    assert identity(create(name, {**options, "model": str(moved)})) == identity(
        create(name, options)
    )


def test_one_bit_of_the_pitch_network_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = create("crepe", {"model": "tiny"})
    assert isinstance(extractor, pitch.Crepe)
    copy = Path(shutil.copy(extractor.path, tmp_path / "tiny.pth"))
    monkeypatch.setattr(pitch, "weight_file", lambda _: copy)
    assert identity(create("crepe", {"model": "tiny"})) == identity(extractor)
    with flipped(copy, copy.stat().st_size // 2, 0):
        assert identity(create("crepe", {"model": "tiny"})) != identity(extractor)
        extractor.path = copy
        with pytest.raises(CheckpointError, match=r"tiny\.pth changed while|not CREPE's 'tiny'"):
            extractor.load("cpu")


def test_weights_that_change_before_they_are_loaded_are_refused(
    checkpoint: tuple[str, dict[str, str]],
) -> None:
    name, options = checkpoint
    extractor = create(name, options)
    path = Path(options["model"]) / "model.safetensors"
    with (
        flipped(path, -4, 0),
        pytest.raises(CheckpointError, match="changed while it was being loaded"),
    ):
        extractor.load("cpu")
    extractor.load("cpu")


def test_another_commit_with_the_same_weights_is_a_miss_and_a_branch_at_it_a_hit(
    checkpoint: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = checkpoint
    one, two = "1" * 40, "2" * 40
    repository = tmp_path / "models--org--model"
    for commit in (one, two):
        shutil.copytree(options["model"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(one)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def at(**changes: str) -> str:
        return identity(create(name, {**options, "model": "org/model", **changes}))

    assert at(revision=one) == at(revision="main") == at()
    assert at(revision=two) != at(revision=one)
    assert at() != identity(create(name, options)), "a folder's weights have no commit"


# Sound and words ----------------------------------------------------------------------------------

RATES_HZ = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000)


def key_of(folder: Path, **fields: Any) -> bytes:
    resolved = resolve([Source(id="x", **fields)], folder, text=False)
    return resolved.audio_keys["x"]


@given(
    rate_hz=st.sampled_from(RATES_HZ),
    start=st.integers(0, 3600 * 8_000),
    length=st.integers(2, 3600 * 8_000),
    digits=st.sampled_from([6, 9, 17]),
)
@settings(max_examples=300)
def test_bounds_that_differ_by_one_sample_are_a_miss_and_each_key_is_one_stretch(
    rate_hz: int, start: int, length: int, digits: int
) -> None:
    """Bounds as a manifest may write them: to the microsecond, or with all their digits."""

    def written(sample: int) -> float:
        return float(f"{sample / rate_hz:.{digits}f}")

    from mer.cache.identity import audio_key

    stretches = [
        (start, start + length),
        (start + 1, start + length),
        (start, start + length - 1),
        (start, start + length + 1),
    ]
    keys = [audio_key(bytes(16), written(a), written(b), None) for a, b in stretches]
    assert len(set(keys)) == len(stretches)
    for a, b in stretches:
        nearest = [audio._nearest_sample(written(bound), rate_hz) for bound in (a, b)]
        assert nearest == [a, b], "what is decoded is what the key says"


@given(
    start=st.floats(0, 100),
    other=st.floats(-3e-6, 3e-6),
    rate_hz=st.sampled_from([*RATES_HZ, 384_000]),
)
@settings(max_examples=300)
def test_bounds_with_one_key_are_the_same_samples(start: float, other: float, rate_hz: int) -> None:
    from mer.cache.identity import audio_key

    near = max(0.0, start + other)
    if audio_key(bytes(16), start, None, None) == audio_key(bytes(16), near, None, None):
        assert audio._nearest_sample(start, rate_hz) == audio._nearest_sample(near, rate_hz)


@given(
    place=st.floats(0, 1, exclude_max=True),
    rate_hz=st.sampled_from(RATES_HZ),
    subtype=st.sampled_from(["PCM_U8", "PCM_16", "PCM_24", "FLOAT"]),
    container=st.sampled_from(["wav", "flac"]),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_one_sample_that_differs_in_its_last_bit_is_a_miss(
    tmp_path: Path, place: float, rate_hz: int, subtype: str, container: str
) -> None:
    if container == "flac" and subtype in ("FLOAT", "PCM_U8"):
        subtype = "PCM_16"
    bits = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "FLOAT": 32}[subtype]
    samples = np.random.default_rng(0).integers(-(2**6), 2**6, 400) << 24
    path = tmp_path / f"one.{container}"
    keys = []
    for change in (0, 1 << (32 - bits)):
        samples[int(place * len(samples))] += change
        data = samples.astype(np.int32) if bits < 32 else (samples / 2**31).astype(np.float32)
        if change and bits == 32:
            at = int(place * len(samples))
            data[at] = np.nextafter(data[at], np.float32(1))
        soundfile.write(path, data, rate_hz, subtype=subtype)
        keys.append(key_of(tmp_path, path=path))
    assert keys[0] != keys[1]


# Through an extraction ----------------------------------------------------------------------------

RATE_HZ = 16_000
FEATURE = "logmel:n_mels=20,dtype=float32"
LENGTHS = (1_600, 2_000, 2_777, 3_001)


@dataclass
class Corpus:
    """A folder of stereo recordings and what the manifest says of them."""

    folder: Path
    utterances: list[Utterance]
    name: str = "corpus"
    feature: str = FEATURE
    options: dict[str, Any] = field(default_factory=dict)

    def manifest(self) -> Manifest:
        return Manifest(self.name, tuple(self.utterances))

    def run(self, cache: Cache) -> tuple[int, int]:
        """Extract; return how many were computed and reused."""
        result = extract(
            self.manifest(), [self.feature], cache, **{"device": "cpu", "workers": 2} | self.options
        )
        assert not result.report.failures
        return result.report.computed, result.report.reused

    def stored(self, cache: Cache) -> list[bytes]:
        """Return the stored values of all utterances."""
        (planned,) = plan_features(self.manifest(), [self.feature], cache).features
        store = cache.open(planned.extractor.spec)
        assert store is not None
        assert not planned.missing
        keys = plan_features(self.manifest(), [self.feature], cache).keys["audio"]
        output = planned.extractor.outputs[0].name
        return [store.frames(keys[u.id], output).tobytes() for u in self.utterances]


def samples_of(length: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-9_000, 9_000, (length, 2))
    return noise.astype(np.int16)


def make(folder: Path) -> Corpus:
    folder.mkdir(parents=True)
    utterances = []
    for i, length in enumerate(LENGTHS):
        path = folder / f"u{i}.wav"
        soundfile.write(path, samples_of(length, i), RATE_HZ, subtype="PCM_16")
        utterances.append(Utterance(id=f"u{i}", path=path, text=f"text {i}", label="sad"))
    whole = utterances[-1]
    parts = [
        dataclasses.replace(whole, id="part", start_s=0.05, end_s=0.15),
        dataclasses.replace(whole, id="right", channel=1),
    ]
    return Corpus(folder, [*utterances, *parts])


def _replaced(corpus: Corpus, **changes: Callable[[Utterance, int], Any]) -> None:
    corpus.utterances = [
        dataclasses.replace(u, **{name: change(u, i) for name, change in changes.items()})
        for i, u in enumerate(corpus.utterances)
    ]


def move(corpus: Corpus) -> None:
    moved = corpus.folder.with_name(corpus.folder.name + "-moved")
    moved.mkdir()
    for path in corpus.folder.iterdir():
        path.rename(moved / f"renamed-{path.stem}.WAV")
    corpus.folder.rmdir()
    corpus.folder = moved
    _replaced(corpus, path=lambda u, i: moved / f"renamed-{u.path.stem}.WAV")


def touch(corpus: Corpus) -> None:
    for n, path in enumerate(sorted(corpus.folder.iterdir())):
        os.utime(path, (1_000_000 + n, 1_000_000 + n))


def link(corpus: Corpus) -> None:
    other = corpus.folder.with_name(corpus.folder.name + "-link")
    other.symlink_to(corpus.folder, target_is_directory=True)
    _replaced(corpus, path=lambda u, i: other / u.path.name)


def relabel(corpus: Corpus) -> None:
    _replaced(
        corpus,
        label=lambda u, i: f"label {i}",
        speaker=lambda u, i: f"speaker {i}",
        split=lambda u, i: "test",
        labels=lambda u, i: {"voice": "calm"},
        votes=lambda u, i: {"sad": 2.0},
    )


def reword(corpus: Corpus) -> None:
    """Another transcript is no other sound."""
    _replaced(corpus, text=lambda u, i: f"other words {i}")


NEUTRAL: dict[str, Callable[[Corpus], None]] = {
    "path": move,
    "time of modification": touch,
    "symbolic link": link,
    "order": lambda corpus: corpus.utterances.reverse(),
    "utterance ids": lambda corpus: _replaced(corpus, id=lambda u, i: f"another/{i}"),
    "labels, speakers, splits": relabel,
    "transcript": reword,
    "corpus": lambda corpus: setattr(corpus, "name", "another corpus"),
    "a start of 0": lambda corpus: _replaced(corpus, start_s=lambda u, i: u.start_s or 0.0),
    "a tenth of a microsecond": lambda corpus: _replaced(
        corpus, end_s=lambda u, i: u.end_s and u.end_s + 1e-7
    ),
    "batch size": lambda corpus: corpus.options.update(batch_seconds=0.1),
    "workers": lambda corpus: corpus.options.update(workers=1),
    "device": lambda corpus: corpus.options.update(device="auto"),
    "order of options": lambda corpus: setattr(corpus, "feature", "logmel:dtype=float32,n_mels=20"),
    "spelling of options": lambda corpus: setattr(
        corpus, "feature", " logmel: n_mels = 20.0, dtype=float32 , fmin=2e1 #logmel"
    ),
}


@given(st.sets(st.sampled_from(sorted(NEUTRAL)), min_size=1))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_cannot_change_a_number_computes_nothing(
    tmp_path_factory: pytest.TempPathFactory, changes: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("neutral")
    corpus = make(folder / "corpus")
    cache = Cache(folder / "cache")
    count = len(corpus.utterances)
    assert corpus.run(cache) == (count, 0)
    before = sorted(corpus.stored(cache))
    for change in sorted(changes):
        NEUTRAL[change](corpus)
    assert corpus.run(cache) == (0, count)
    assert sorted(corpus.stored(cache)) == before
    assert len(cache.stores()) == 1


@pytest.mark.parametrize("change", sorted(NEUTRAL))
def test_each_of_them_alone_computes_nothing(tmp_path: Path, change: str) -> None:
    corpus, cache = make(tmp_path / "corpus"), Cache(tmp_path / "cache")
    corpus.run(cache)
    NEUTRAL[change](corpus)
    assert corpus.run(cache) == (0, len(corpus.utterances))


@dataclass(frozen=True)
class Edit:
    """A change of utterance ``number`` of `make`'s corpus that makes another sound."""

    number: int
    change: Callable[[Corpus, int], None]
    also: int = 0  # utterances that share the recording


def rewrite(edit: Callable[[np.ndarray], np.ndarray], rate_hz: int = RATE_HZ) -> Any:
    def change(corpus: Corpus, number: int) -> None:
        path = corpus.utterances[number].path
        stat = path.stat()
        samples, _ = soundfile.read(path, dtype="int16")
        soundfile.write(path, edit(samples), rate_hz, subtype="PCM_16")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as an unpacking tool might

    return change


def bound(name: str, samples: int) -> Any:
    def change(corpus: Corpus, number: int) -> None:
        utterance = corpus.utterances[number]
        value = (getattr(utterance, name) or 0.0) + samples / RATE_HZ
        corpus.utterances[number] = dataclasses.replace(utterance, **{name: value})

    return change


def channel(value: int | None) -> Any:
    def change(corpus: Corpus, number: int) -> None:
        corpus.utterances[number] = dataclasses.replace(corpus.utterances[number], channel=value)

    return change


def louder(samples: np.ndarray) -> np.ndarray:
    samples = samples.copy()
    samples[777, 1] += 1
    return samples


EDITS = {
    "one sample by its last bit": Edit(0, rewrite(louder)),
    "one sample fewer": Edit(1, rewrite(lambda samples: samples[:-1])),
    "one sample more": Edit(1, rewrite(lambda samples: np.pad(samples, ((0, 1), (0, 0))))),
    "channels exchanged": Edit(2, rewrite(lambda samples: samples[:, ::-1])),
    "sample rate": Edit(0, rewrite(lambda samples: samples, 15_999)),
    "a recording that three share": Edit(3, rewrite(louder), also=2),
    "start by one sample": Edit(4, bound("start_s", 1)),
    "start by one sample of a whole": Edit(2, bound("start_s", 1)),
    "end by one sample": Edit(4, bound("end_s", -1)),
    "left instead of right": Edit(5, channel(0)),
    "mean instead of right": Edit(5, channel(None), also=-1),  # as utterance 3 has it: a hit
    "right instead of mean": Edit(0, channel(1)),
}


@pytest.mark.parametrize("name", sorted(EDITS))
def test_what_changes_a_sound_is_computed_and_what_it_does_not_touch_is_kept(
    tmp_path: Path, name: str
) -> None:
    edit = EDITS[name]
    corpus, cache = make(tmp_path / "corpus"), Cache(tmp_path / "cache")
    corpus.run(cache)
    edit.change(corpus, edit.number)
    touched = 1 + edit.also
    assert corpus.run(cache) == (touched, len(corpus.utterances) - touched)
    fresh = Cache(tmp_path / "fresh")
    corpus.run(fresh)
    assert corpus.stored(cache) == corpus.stored(fresh), "what was reused would be computed"


@pytest.mark.parametrize("feature", ["logmel:n_mels=21,dtype=float32", "logmel:n_mels=20"])
def test_another_option_computes_everything_into_a_store_of_its_own(
    tmp_path: Path, feature: str
) -> None:
    corpus, cache = make(tmp_path / "corpus"), Cache(tmp_path / "cache")
    corpus.run(cache)
    before = corpus.stored(cache)
    other = dataclasses.replace(corpus, feature=feature)
    assert other.run(cache) == (len(corpus.utterances), 0)
    assert corpus.run(cache) == (0, len(corpus.utterances))
    assert corpus.stored(cache) == before
    assert len(cache.stores()) == 2


def test_another_version_computes_everything_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, cache = make(tmp_path / "corpus"), Cache(tmp_path / "cache")
    corpus.run(cache)
    monkeypatch.setattr(LogMel, "version", LogMel.version + 1)
    assert corpus.run(cache) == (len(corpus.utterances), 0)


def test_a_cache_that_moved_is_the_same_cache(tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus")
    corpus.run(Cache(tmp_path / "cache"))
    (tmp_path / "cache").rename(tmp_path / "moved")
    for cache in (Cache(tmp_path / "moved"), Cache.from_url((tmp_path / "moved").as_uri())):
        assert corpus.run(cache) == (0, len(corpus.utterances))


def test_a_recording_edited_between_planning_and_decoding_is_not_stored_under_its_old_key(
    tmp_path: Path,
) -> None:
    corpus, cache = make(tmp_path / "corpus"), Cache(tmp_path / "cache")

    class Editing:
        """The first thing that happens after planning."""

        def start(self, utterances: int, seconds: float) -> None:
            EDITS["one sample by its last bit"].change(corpus, 0)

        def advance(self, utterances: int, seconds: float) -> None:
            pass

    result = extract(corpus.manifest(), [FEATURE], cache, device="cpu", progress=Editing())
    (failure,) = result.report.failures
    assert failure.utterance == "u0"
    assert "changed while" in failure.reason
    assert corpus.run(cache) == (1, len(corpus.utterances) - 1)
    fresh = Cache(tmp_path / "fresh")
    corpus.run(fresh)
    assert corpus.stored(cache) == corpus.stored(fresh)


# With a model -------------------------------------------------------------------------------------


def run(corpus: Corpus, feature: str, cache: Cache) -> tuple[int, int]:
    return dataclasses.replace(corpus, feature=feature).run(cache)


def test_a_bit_of_the_weights_computes_everything_and_a_moved_folder_nothing(
    tmp_path: Path,
) -> None:
    corpus, cache = make(tmp_path / "corpus"), Cache(tmp_path / "cache")
    count = len(corpus.utterances)
    model = Path(_speech(tmp_path / "model")["model"])
    assert run(corpus, f"wavlm:model={model}", cache) == (count, 0)
    moved = model.rename(tmp_path / "moved")
    assert run(corpus, f"wavlm:model={moved}", cache) == (0, count)
    with flipped(moved / "model.safetensors", -4, 0):
        assert run(corpus, f"wavlm:model={moved}", cache) == (count, 0)
    assert run(corpus, f"wavlm:model={moved},normalise=no", cache) == (0, count)
    assert run(corpus, f"wavlm:model={moved},layers=1", cache) == (count, 0)
    assert run(corpus, f"wavlm:model={moved},window_s=20", cache) == (count, 0)


def test_words_by_one_character_are_computed_and_their_white_space_is_not(tmp_path: Path) -> None:
    model = _text(tmp_path / "model")["model"]
    feature, cache = f"roberta:model={model}", Cache(tmp_path / "cache")
    corpus = Corpus(
        tmp_path, [Utterance(id=f"u{i}", text=f"the café number {i}") for i in range(3)]
    )
    assert run(corpus, feature, cache) == (3, 0)
    _replaced(
        corpus,
        text=lambda u, i: f"  {u.text} \n".replace(" ", "\t ").replace("é", "e\u0301"),
        path=lambda u, i: tmp_path / "no such recording.wav",
    )
    assert run(corpus, feature, cache) == (0, 3)
    _replaced(corpus, text=lambda u, i: u.text.replace("the", "The") if i == 1 else u.text)
    assert run(corpus, feature, cache) == (1, 2)
    _replaced(corpus, text=lambda u, i: u.text.strip() + "." if i == 2 else u.text)
    assert run(corpus, feature, cache) == (1, 2)


def test_identities_hold_no_path_of_this_machine(
    family: Family, base: dict[str, str], tmp_path: Path
) -> None:
    text = canonical_json(create(family.name, base).spec.identity)
    for folder in (tmp_path.parent, Path.home(), Path(__file__).parent):
        assert str(folder) not in text
