"""SIGKILL at any moment costs time and nothing else.

Commands are killed at random moments (seeded, spread over what the command takes) and just before
calls that change the file system (which reaches every step of the protocol, however short). After
each kill whoever reads the cache sees sound utterances only; after the last one the same command
runs to its end, and its stores equal those of a run that nobody interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from victims import Victims

from mer.cache.home import Cache
from mer.cache.verify import verify

RATE_HZ = 16_000
FEATURE = "logmel:n_mels=20"
KILLS = 30  # at random moments, per command
AT_CALLS = 15  # before a call, per command

Content = dict[str, dict[bytes, tuple[bytes, ...]]]


def content_of(root: Path | str) -> Content:
    """Return all that a cache holds: per store and key the stored bytes of everything."""
    found: Content = {}
    for store in Cache(root).stores():
        info = store.info()
        assert not info.damage, info.damage
        keys = store.keys()
        lengths = store.input_length(keys)
        rows: dict[bytes, tuple[bytes, ...]] = {}
        for key, length in zip(keys, lengths.tolist(), strict=True):
            values = [str(length).encode()]
            for output in store.spec.outputs:
                frames = store.frames(key, output.name)
                values += [str((frames.shape, frames.dtype)).encode(), frames.tobytes()]
                if output.kind == "frames":
                    values.append(store.pooled(output.name, [key]).tobytes())
            rows[key] = tuple(values)
        found[store.name] = rows
    return found


def stored_twice(root: Path | str) -> int:
    """Return how many utterances of a cache are stored more than once."""
    return sum(sum(p.utterances for p in s.parts()) - len(s.keys()) for s in Cache(root).stores())


def leftovers(root: Path) -> list[str]:
    """Return what unfinished work has left beside the stores."""
    return sorted(p.name for p in root.glob("*.tmp/*"))


@dataclass(frozen=True)
class Scenario:
    """A command, what it starts from, and what it makes.

    Parameters
    ----------
    do : str
        Name in `victims.COMMANDS`.
    start : callable
        Prepares a fresh cache folder.
    arguments : dict
        Of the command; ``cache`` is added.
    grows : bool
        Whether utterances are added; else the cache holds all of them at every moment.
    """

    do: str
    start: Callable[[Path], None]
    arguments: dict[str, object]
    grows: bool = True


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    with Victims() as process:
        yield process


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = ["id,path"]
    for i in range(24):
        samples = rng.uniform(-0.3, 0.3, 1_600 + 100 * i).astype(np.float32)
        soundfile.write(folder / f"u{i}.wav", samples, RATE_HZ)
        rows.append(f"u{i},u{i}.wav")
    path = folder / "corpus.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(victims: Victims, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that nobody interrupted, of many small parts."""
    root = tmp_path_factory.mktemp("finished") / "cache"
    done = victims.run("extract", manifest=manifest, cache=root, feature=FEATURE)
    assert done["status"] == 0
    (store,) = Cache(root).stores()
    assert len(store.parts()) > 4
    return root


@pytest.fixture(scope="module")
def doubled(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished cache with half of its utterances stored a second time, in other parts."""
    root = tmp_path_factory.mktemp("doubled") / "cache"
    shutil.copytree(finished, root)
    (store,) = Cache(root).stores()
    (output,) = store.spec.outputs
    writers = [Cache(root).stores()[0].writer() for _ in range(3)]
    for number, writer in enumerate(writers):  # none of them sees what another has not committed
        writer.__enter__()
        writer._known = lambda key: False
        for key in store.keys()[number * 4 : number * 4 + 8]:
            writer.add_stored(
                key,
                int(store.input_length([key])[0]),
                {output.name: store.frames(key, output.name)},
                {output.name: store.pooled(output.name, [key])[0]},
            )
    for writer in writers:
        writer.__exit__(None, None, None)
    assert stored_twice(root) == 24
    return root


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of another tool, one .npy per utterance."""
    folder = tmp_path_factory.mktemp("theirs") / "model-FRA"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        np.save(folder / f"u{i}.npy", rng.standard_normal((10 + i, 20)).astype(np.float16))
    return folder


def copying(source: Path) -> Callable[[Path], None]:
    return lambda root: shutil.copytree(source, root) and None


@pytest.fixture(scope="module", params=["extract", "gc", "cp", "import"])
def scenario(
    request: pytest.FixtureRequest, manifest: Path, doubled: Path, theirs: Path
) -> Scenario:
    scenarios = {
        "extract": Scenario(
            "extract", lambda root: None, {"manifest": manifest, "feature": FEATURE}
        ),
        "gc": Scenario("gc", copying(doubled), {}, grows=False),
        "cp": Scenario("cp", lambda root: None, {"source": doubled}),
        "import": Scenario("import", lambda root: None, {"source": theirs, "format": "npy"}),
    }
    return scenarios[request.param]


@pytest.fixture(scope="module")
def reference(
    scenario: Scenario, victims: Victims, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Content, float, int]:
    """What an uninterrupted run makes, how long it takes and how many calls it has."""
    root = tmp_path_factory.mktemp("reference") / "cache"
    scenario.start(root)
    done = victims.run(scenario.do, cache=root, **scenario.arguments)
    assert done["status"] == 0
    assert stored_twice(root) == 0
    assert leftovers(root) == []
    assert not list(root.glob("*.quarantine"))
    return content_of(root), done["seconds"], done["calls"]


class Series:
    """One cache that a command is killed at, again and again, and then finished."""

    def __init__(
        self, scenario: Scenario, victims: Victims, reference: Content, root: Path
    ) -> None:
        self.scenario, self.victims, self.reference, self.root = scenario, victims, reference, root
        scenario.start(root)
        self.seen = content_of(root)

    def kill(self, **moment: float) -> bool:
        """Run the command to be killed; tell whether it was, or finished before."""
        scenario = self.scenario
        done = self.victims.run(scenario.do, kill=moment, cache=self.root, **scenario.arguments)
        assert done["status"] in (0, -9)
        now = content_of(self.root)
        for name, rows in now.items():
            assert rows.items() <= self.reference[name].items(), "something else than was written"
        for name, rows in self.seen.items():
            assert rows.items() <= now[name].items(), "something is lost"
        if not scenario.grows:
            assert now == self.reference
        self.seen = now
        return done["status"] == -9

    def finish(self) -> None:
        """Run the command to its end, tidy up, and compare after both."""
        done = self.victims.run(self.scenario.do, cache=self.root, **self.scenario.arguments)
        assert done["status"] == 0
        assert content_of(self.root) == self.reference
        assert stored_twice(self.root) == 0
        # A command that finds nothing to do sweeps nothing.
        assert self.victims.run("gc", cache=self.root)["status"] == 0
        assert content_of(self.root) == self.reference
        assert leftovers(self.root) == []
        found = verify(Cache(self.root).stores())
        assert not found.corrupt
        assert found.utterances == sum(map(len, self.reference.values()))


def test_kills_at_random_moments_lose_nothing(
    scenario: Scenario,
    victims: Victims,
    reference: tuple[Content, float, int],
    tmp_path: Path,
) -> None:
    content, seconds, _ = reference
    rng = np.random.default_rng(len(scenario.do))
    killed = number = 0
    while killed < KILLS:
        series = Series(scenario, victims, content, tmp_path / f"{number}")
        for fraction in rng.uniform(0, 1, 4):
            hit = series.kill(after_s=fraction * seconds)
            killed += hit
            seconds *= 1.1 if hit else 0.8  # how fast this machine is at the moment
        series.finish()
        shutil.rmtree(series.root)
        number += 1
        assert number < 2 * KILLS, "most runs end before they are killed"


@pytest.mark.parametrize(
    "all_of_them", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_kills_before_calls_to_the_file_system_lose_nothing(
    scenario: Scenario,
    victims: Victims,
    reference: tuple[Content, float, int],
    tmp_path: Path,
    all_of_them: bool,
) -> None:
    content, _, calls = reference
    chosen = np.random.default_rng(1).permutation(calls) + 1
    for number in chosen[: None if all_of_them else AT_CALLS].tolist():
        series = Series(scenario, victims, content, tmp_path / f"{number}")
        series.kill(call=number)
        series.finish()
        shutil.rmtree(series.root)


CROWDS = 3


def test_commands_that_run_and_die_at_the_same_time_lose_nothing(
    victims: Victims, manifest: Path, finished: Path, doubled: Path, tmp_path: Path
) -> None:
    """Two extractions, a copy and a gc on one cache, each killed at its own moment or not."""
    reference = content_of(finished)
    wanted = {"manifest": manifest, "feature": FEATURE}
    commands: list[tuple[str, dict[str, object]]] = [
        ("extract", wanted),
        ("gc", {}),
        ("extract", wanted),
        ("cp", {"source": doubled}),
    ]
    rng = np.random.default_rng(2)
    with (
        Victims() as first,
        Victims() as second,
        Victims() as third,
        ThreadPoolExecutor(len(commands)) as pool,
    ):
        for crowd in range(CROWDS):
            root = tmp_path / f"{crowd}"
            seen: Content = {}
            for latest in (0.1, 0.3, 60.0):  # at last, nobody is killed
                running = [
                    pool.submit(process.run, do, {"after_s": delay}, cache=root, **arguments)
                    for process, (do, arguments), delay in zip(
                        (victims, first, second, third),
                        commands,
                        rng.uniform(latest / 10, latest, len(commands)),
                        strict=True,
                    )
                ]
                assert {future.result()["status"] for future in running} <= {0, -9}
                now = content_of(root)
                for name, rows in now.items():
                    assert rows.items() <= reference[name].items()
                for name, rows in seen.items():
                    assert rows.items() <= now[name].items(), "something is lost"
                seen = now
            assert now == reference
            assert victims.run("gc", cache=root)["status"] == 0
            assert content_of(root) == reference
            assert stored_twice(root) == 0
            assert leftovers(root) == []
            assert not verify(Cache(root).stores()).corrupt
            shutil.rmtree(root)


def test_kills_while_copying_to_a_bucket_lose_nothing(
    doubled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    from s3_server import s3, settings

    from mer.cache import remote

    reference = content_of(doubled)
    rng = np.random.default_rng(3)
    monkeypatch.setenv("MER_LOCAL_COPY", "off")
    with s3() as bucket:
        for name, value in settings(bucket.gateway.url).items():
            monkeypatch.setenv(name, value)
        with Victims() as victims:
            first = victims.run("cp", source=doubled, cache=f"{bucket.url}/whole")
            assert first["status"] == 0
            killed = 0
            for series in range(2):
                root = f"{bucket.url}/{series}"
                seen: Content = {}
                for fraction in rng.uniform(0.1, 1, 4):
                    delay = {"after_s": fraction * first["seconds"]}
                    done = victims.run("cp", delay, source=doubled, cache=root)
                    assert done["status"] in (0, -9)
                    killed += done["status"] == -9
                    remote.memory.clear()
                    now = content_of(root)
                    for name, rows in now.items():
                        assert rows.items() <= reference[name].items()
                    for name, rows in seen.items():
                        assert rows.items() <= now[name].items(), "something is lost"
                    seen = now
                for command in ("cp", "gc"):
                    arguments = {"source": doubled} if command == "cp" else {}
                    assert victims.run(command, cache=root, **arguments)["status"] == 0
                    remote.memory.clear()
                    assert content_of(root) == reference
                assert stored_twice(root) == 0
                assert not verify(Cache(root).stores()).corrupt
            assert killed
