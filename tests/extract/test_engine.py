from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import HOP, Toy, ToyText, expected, write_corpus

from mer.cache.errors import StorageFullError
from mer.cache.home import Cache
from mer.extract import engine
from mer.extract.contract import BatchPolicy, Source, WindowRule
from mer.extract.engine import blocks, run, verify
from mer.extract.plan import plan

LENGTHS = [0.5, 0.02, 1.0, 0.31, 0.31, 0.7, 0.05, 2.0]


def run_toys(sources, cache, *toys, **options):
    planned = plan(sources, [(toy.spec.slug, toy) for toy in toys], cache)
    return run(planned, cache, device="cpu", **options)


def stored(cache, toy, source):
    keys = plan([source], [("toy", toy)], cache).keys[toy.modality]
    return cache.open(toy.spec).frames(keys[source.id], "level")


def samples_of(source):
    return soundfile.read(source.path, dtype="float32")[0]


@pytest.mark.parametrize("policy", BatchPolicy)
@pytest.mark.parametrize("batch_seconds", [0.1, 3.0, 100.0])
def test_every_utterance_is_stored_with_its_own_numbers(tmp_path, policy, batch_seconds):
    sources = write_corpus(tmp_path, LENGTHS)
    cache, toy = Cache(tmp_path / "cache"), Toy(policy=policy)
    report = run_toys(sources, cache, toy, batch_seconds=batch_seconds)
    assert (report.computed, report.reused, report.failed) == (len(LENGTHS), 0, 0)
    for source in sources:
        np.testing.assert_allclose(
            stored(cache, toy, source), expected(samples_of(source)), atol=1e-6
        )


def test_policies_are_obeyed(tmp_path):
    sources = write_corpus(tmp_path, LENGTHS)
    for policy, ok in [
        (BatchPolicy.SINGLE, lambda lengths: len(lengths) == 1),
        (BatchPolicy.EQUAL_LENGTH, lambda lengths: len(set(lengths)) == 1),
    ]:
        toy = Toy(slug=policy.value, policy=policy)
        run_toys(sources, Cache(tmp_path / "cache"), toy)
        assert all(map(ok, toy.batches))
        assert sum(map(len, toy.batches)) == len(LENGTHS)
    assert [4960, 4960] in toy.batches


@pytest.mark.parametrize("policy", [BatchPolicy.MASK, BatchPolicy.EQUAL_LENGTH])
def test_long_inputs_go_through_windows_and_come_out_whole(tmp_path, policy):
    sources = write_corpus(tmp_path, [3.333, 0.2, 1.0])
    toy = Toy(policy=policy, window=WindowRule(size=16_000, overlap=3200, hop=HOP))
    cache = Cache(tmp_path / "cache")
    run_toys(sources, cache, toy)
    assert max(max(lengths) for lengths in toy.batches) <= 16_000
    for source in sources:
        np.testing.assert_allclose(
            stored(cache, toy, source), expected(samples_of(source)), atol=1e-6
        )


def test_a_second_run_computes_nothing_and_loads_no_model(tmp_path):
    sources = write_corpus(tmp_path, LENGTHS)
    cache = Cache(tmp_path / "cache")
    run_toys(sources, cache, Toy())
    again = Toy()
    report = run_toys(sources, cache, again)
    assert (report.computed, report.reused, again.loads) == (0, len(LENGTHS), 0)


def test_only_what_is_new_is_computed(tmp_path):
    sources = write_corpus(tmp_path, LENGTHS)
    cache = Cache(tmp_path / "cache")
    run_toys(sources[:3], cache, Toy())
    report = run_toys(sources, cache, Toy())
    assert (report.computed, report.reused) == (len(LENGTHS) - 3, 3)


def test_identical_recordings_are_computed_once(tmp_path):
    (source,) = write_corpus(tmp_path, [0.4])
    twin = Source(id="twin", path=tmp_path / "copy.wav")
    twin.path.write_bytes(source.path.read_bytes())
    toy = Toy()
    report = run_toys([source, twin], Cache(tmp_path / "cache"), toy)
    assert (report.computed, report.reused, toy.batches) == (1, 1, [[6400]])


def test_one_decode_serves_all_features(tmp_path, monkeypatch):
    import mer.extract.audio as audio

    calls = []
    real = audio.decode
    monkeypatch.setattr(audio, "decode", lambda path, *a: calls.append(path) or real(path, *a))
    sources = write_corpus(tmp_path, [0.3, 0.4])
    cache = Cache(tmp_path / "cache")
    report = run_toys(sources, cache, Toy("one"), Toy("two", scale=2.0), ToyText("three"))
    assert report.computed == 6
    assert len(calls) == 2
    assert stored(cache, ToyText("three"), sources[1])[0].tolist() == [116.0, 116.0]


def test_bad_utterances_cost_only_themselves(tmp_path):
    sources = write_corpus(tmp_path, [0.5] * 6)
    for index, value in [(1, Toy.FAIL), (3, Toy.NAN)]:
        samples = samples_of(sources[index])
        samples[:HOP] = value
        soundfile.write(sources[index].path, samples, 16_000, subtype="FLOAT")
    sources[4].path.write_text("this is no recording")
    cache, toy = Cache(tmp_path / "cache"), Toy()
    report = run_toys(sources, cache, toy)
    assert (report.computed, report.failed) == (3, 3)
    reasons = {failure.utterance: failure.reason for failure in report.failures}
    assert "the model does not like this one" in reasons["u001"]
    assert "'level' is not finite in 1 of 50 frames" in reasons["u003"]
    assert "u004.wav" in reasons["u004"]
    for index in (0, 2, 5):
        assert len(stored(cache, toy, sources[index])) == 50


def test_a_bad_recording_counts_once_per_feature_and_is_listed_once(tmp_path):
    sources = write_corpus(tmp_path, [0.2, 0.2])
    sources[0].path.write_bytes(b"")
    report = run_toys(sources, Cache(tmp_path / "cache"), Toy("a"), Toy("b"))
    assert (report.computed, report.failed, len(report.failures)) == (2, 2, 1)


def test_inputs_need_not_come_in_the_order_of_their_seconds(tmp_path):
    class Words(ToyText):
        def prepare(self, source):  # fewer letters, more steps
            return torch.ones(HOP * len(source.split()))

    texts = ["incomprehensibilities", "a b c", "so it goes on"]
    sources = [Source(id=text, text=text) for text in texts]
    cache = Cache(tmp_path / "cache")
    report = run_toys(sources, cache, Words("words"))
    assert (report.computed, report.failed) == (3, 0)
    frames = [len(stored(cache, Words("words"), source)) for source in sources]
    assert frames == [1, 3, 4]


def test_a_decoder_that_fails_in_a_way_of_its_own_costs_one_utterance(tmp_path, monkeypatch):
    import mer.extract.audio as audio

    def failing(real):
        def call(path, *rest):
            if path.stem == "u001":
                raise TypeError("unsupported operand")
            return real(path, *rest)

        return call

    sources = write_corpus(tmp_path, [0.2] * 3)
    for index, name in enumerate(("probe", "decode")):
        with monkeypatch.context() as patch:
            patch.setattr(audio, name, failing(getattr(audio, name)))
            report = run_toys(sources, Cache(tmp_path / name), Toy())
        assert (report.computed, report.failed) == (2, 1), index
        (failure,) = report.failures
        assert failure.utterance == "u001"
        assert "TypeError: unsupported operand" in failure.reason


def test_what_two_of_three_features_refuse_is_listed_with_both(tmp_path):
    sources = write_corpus(tmp_path, [0.2, 0.2])
    samples = samples_of(sources[0])
    samples[:HOP] = Toy.FAIL
    soundfile.write(sources[0].path, samples, 16_000, subtype="FLOAT")

    class Brave(Toy):
        FAIL = 9.0

    report = run_toys(sources, Cache(tmp_path / "cache"), Toy("a"), Brave("b"), Toy("c"))
    assert (report.computed, report.failed) == (4, 2)
    assert sorted(failure.feature for failure in report.failures) == ["a", "c"]


def test_every_pair_is_counted_once_whatever_becomes_of_it(tmp_path):
    good, bad, empty = write_corpus(tmp_path, [0.2, 0.2, 0.2])
    samples = samples_of(bad)
    samples[:HOP] = Toy.FAIL
    soundfile.write(bad.path, samples, 16_000, subtype="FLOAT")
    empty.path.write_bytes(b"")
    twins = [
        Source(id=f"{s.id}{n}", path=s.path, text=s.text) for s in (good, bad, empty) for n in "bc"
    ]
    sources = [good, bad, empty, *twins, Source(id="mute", path=good.path)]
    toys = (Toy("a"), Toy("b"), ToyText("words"))
    for computed in (2 + 3, 0):
        report = run_toys(sources, Cache(tmp_path / "cache"), *toys)
        # bad and empty thrice in two features, mute in one
        assert (report.computed, report.failed) == (computed, 13)
        assert report.computed + report.reused + report.failed == len(sources) * len(toys)


def test_a_missing_transcript_is_a_listed_failure_of_the_text_feature_only(tmp_path):
    sources = write_corpus(tmp_path, [0.2])
    mute = Source(id=sources[0].id, path=sources[0].path)
    report = run_toys([mute], Cache(tmp_path / "cache"), Toy(), ToyText("words"))
    assert (report.computed, report.failed) == (1, 1)
    assert "has no transcript" in report.failures[0].reason


def test_a_full_disk_stops_the_run_and_keeps_what_was_committed(tmp_path, monkeypatch):
    from mer.cache.store import PartWriter

    sources = write_corpus(tmp_path, [0.2] * 12)
    cache, toy = Cache(tmp_path / "cache"), Toy(policy=BatchPolicy.SINGLE)
    real, added = PartWriter.add, []

    def add(self, key, length, arrays):
        if len(added) == 5:
            raise StorageFullError("no space left")
        real(self, key, length, arrays)
        self.commit()
        added.append(key)

    monkeypatch.setattr(PartWriter, "add", add)
    with pytest.raises(StorageFullError, match="no space left"):
        run_toys(sources, cache, toy)
    monkeypatch.undo()
    report = run_toys(sources, Cache(tmp_path / "cache"), Toy())
    assert (report.computed, report.reused) == (7, 5)


def test_what_waits_to_be_written_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(engine, "BYTES_AHEAD", 100)
    gate, written = threading.Event(), []

    class Disk:
        def add(self, key, length, arrays):
            assert gate.wait(10)
            written.append(length)

    def fill():
        for length in (80, 20, 80, 200):
            sink.put(Disk(), b"", length, {"level": np.zeros((length, 1), np.uint8)})
            handed_over.append(length)

    sink, handed_over = engine._Sink(), []
    filler = threading.Thread(target=fill)
    filler.start()
    filler.join(0.2)
    assert handed_over == [80, 20]
    gate.set()
    filler.join(10)
    sink.close()
    assert written == [80, 20, 80, 200]


def test_verify_sees_what_was_stored_and_what_changed(tmp_path):
    sources = write_corpus(tmp_path, LENGTHS)
    cache, toy = Cache(tmp_path / "cache"), Toy(dtype="float16")
    planned = plan(sources, [("toy", toy)], cache)
    run(planned, cache, device="cpu")
    assert 0.0 < verify(planned, cache, 3)["toy"] < 5e-4
    toy.scale = 1.5
    assert verify(planned, cache, 3)["toy"] > 1e-2


@given(durations=st.lists(st.floats(0.01, 30.0), max_size=60), budget=st.floats(0.1, 60.0))
def test_blocks_hold_everything_once_within_the_budget(durations, budget):
    made = list(blocks(range(len(durations)), durations.__getitem__, budget))
    assert sorted(i for block in made for i in block) == list(range(len(durations)))
    for block in made:
        padded = max(durations[i] for i in block) * len(block)
        assert len(block) == 1 or padded <= budget


KILLED = """
    import select
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from toy import Toy
    from mer.cache.home import Cache
    from mer.cache.store import Store
    from mer.extract.contract import BatchPolicy, Source
    from mer.extract.engine import run
    from mer.extract.plan import plan
    folder = Path({folder!r})
    real = Store.writer
    Store.writer = lambda self, **k: real(self, part_seconds=0.0)
    class Slow(Toy):
        def forward(self, batch):
            print("step", flush=True)
            # Another thread may take the signal: a read that blocks would never notice.
            while not select.select([sys.stdin], [], [], 0.1)[0]:
                pass
            sys.stdin.readline()
            return super().forward(batch)
    sources = [Source(id=p.stem, path=p) for p in sorted(folder.glob("*.wav"))]
    cache = Cache(folder / "cache")
    run(plan(sources, [("toy", Slow(policy=BatchPolicy.SINGLE))], cache), cache, device="cpu")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_killed_run_is_completed_by_the_next_one(tmp_path, how, steps):
    sources = write_corpus(tmp_path, LENGTHS)
    code = textwrap.dedent(KILLED).format(
        tests=os.path.dirname(__file__) + "/..", folder=str(tmp_path)
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as victim:
        for _ in range(steps):
            assert victim.stdout.readline() == "step\n"
            victim.stdin.write("\n")
            victim.stdin.flush()
        assert victim.stdout.readline() == "step\n"
        victim.send_signal(how)
        assert victim.wait(60) != 0
    cache, toy = Cache(tmp_path / "cache"), Toy()
    report = run_toys(sources, cache, toy)
    assert report.computed + report.reused == len(LENGTHS)
    if how == signal.SIGINT:
        assert report.reused == steps
    for source in sources:
        np.testing.assert_allclose(
            stored(cache, toy, source), expected(samples_of(source)), atol=1e-6
        )
