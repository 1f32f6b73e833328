"""What every extractor promises, proved for every family of the registry.

A family is covered by naming it in `CASES`; `test_every_registered_name_has_a_case` fails
otherwise.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints

from mer.cache.errors import MissingDependencyError, UnknownNameError
from mer.cache.identity import canonical_json
from mer.extract import registry
from mer.extract.contract import SAMPLE_RATE_HZ, BatchPolicy, Extractor, RaggedBatch


@dataclass(frozen=True)
class Case:
    """A registered family, and how to write a feature string that needs no download."""

    family: str
    feature: Callable[[Path], str]


def _speech(model_type: str, variant: str) -> Case:
    def feature(folder: Path) -> str:
        return (
            f"{model_type}:model={tiny_checkpoints.speech(folder, model_type, variant)},layers=all"
        )

    return Case(model_type, feature)


def _whisper(bands: int) -> Case:
    def feature(folder: Path) -> str:
        folder = tiny_checkpoints.whisper(folder, bands=bands)
        return f"whisper:model={folder},layers=all,overlap_s=0.4"

    return Case("whisper", feature)


def _roberta(options: str) -> Case:
    return Case("roberta", lambda folder: f"roberta:model={tiny_checkpoints.text(folder)}{options}")


CASES = {
    "logmel": Case("logmel", lambda _: "logmel"),
    "crepe-tiny": Case("crepe", lambda _: "crepe:model=tiny"),
    "egemaps": Case("egemaps", lambda _: "egemaps"),
    **{
        f"{model_type}-{variant}": _speech(model_type, variant)
        for model_type in tiny_checkpoints.SPEECH
        for variant in tiny_checkpoints.SPEECH_VARIANTS
    },
    "whisper-80": _whisper(80),
    "whisper-128": _whisper(128),
    "roberta": _roberta(",layers=all"),
    "roberta-words": _roberta(",special=drop"),
    "roberta-mean": _roberta(",pooled=mean,special=drop"),
    "roberta-first": _roberta(",pooled=first"),
    "bert": Case("bert", lambda folder: f"bert:model={tiny_checkpoints.text(folder, 'bert')}"),
    "text": Case("text", lambda folder: f"text:model={tiny_checkpoints.text(folder)}"),
}
# From one model frame to just below the tiny Whisper's window; odd lengths, so that no hop divides
# them.
LENGTHS = (400, 401, 720, 8_123, 8_123, 20_480, 31_999)
TEXTS = ("a", "the quick brown fox", "the lazy dog, it was sad", "Größe?", "the dog")


def clips() -> list[np.ndarray]:
    """Voice-like sounds of several lengths, half of them with a DC offset that padding lacks."""
    rng = np.random.default_rng(7)
    sounds = []
    for i, length in enumerate(LENGTHS):
        t = np.arange(length) / SAMPLE_RATE_HZ
        tones = sum(np.sin(2 * np.pi * (110 + 13 * i) * k * t) / k for k in range(1, 6))
        offset = 0.2 if i % 2 else 0.0
        noise = 0.02 * rng.standard_normal(length)
        sounds.append((0.15 * tones + noise + offset).astype(np.float32))
    return sounds


Outputs = list[dict[str, Any]]


def run(extractor: Extractor, inputs: list[Any]) -> Outputs:
    """Run prepared inputs in as few batches as the extractor's policy allows; outputs in order."""
    import torch

    groups: dict[int, list[int]] = {}
    for i, data in enumerate(inputs):
        key = {BatchPolicy.SINGLE: i, BatchPolicy.EQUAL_LENGTH: len(data)}.get(extractor.policy, 0)
        groups.setdefault(key, []).append(i)
    results: Outputs = [{} for _ in inputs]
    for members in groups.values():
        rows = [inputs[i] for i in members]
        data = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        outputs = extractor.forward(RaggedBatch(data, torch.tensor([len(row) for row in rows])))
        for name, ragged in outputs.items():
            for i, values in zip(members, ragged.unpad(), strict=True):
                results[i][name] = values.cpu()
    return results


def assert_close(ours: Outputs, theirs: Outputs) -> None:
    """1e-4 of the output's own scale (of 1, where that is smaller); codes are equal."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            x, y = a[name].numpy(), b[name].numpy()
            assert x.shape == y.shape
            if x.dtype.kind == "f":
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * max(1.0, np.abs(y).max()))
            else:
                np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module", params=CASES)
def feature(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return CASES[request.param].feature(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def extractor(feature: str) -> Extractor:
    try:
        made = registry.create(feature)
        made.load("cpu")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return made


@pytest.fixture(scope="module")
def inputs(extractor: Extractor) -> list[Any]:
    return [
        extractor.prepare(source) for source in (TEXTS if extractor.modality == "text" else clips())
    ]


@pytest.fixture(scope="module")
def alone(extractor: Extractor, inputs: list[Any]) -> Outputs:
    return [run(extractor, [data])[0] for data in inputs]


def test_every_registered_name_has_a_case() -> None:
    covered = {case.family for case in CASES.values()}
    covered.add("imported")  # computes nothing: test_imported.py
    uncovered = {
        n for n in registry.EXTRACTORS if n not in covered and n.split("-")[0] not in covered
    }
    assert not uncovered, f"add these families to CASES: {sorted(uncovered)}"


def test_batched_equals_alone(extractor: Extractor, inputs: list[Any], alone: Outputs) -> None:
    assert_close(run(extractor, inputs), alone)


def test_order_in_a_batch_does_not_matter(
    extractor: Extractor, inputs: list[Any], alone: Outputs
) -> None:
    assert_close(run(extractor, inputs[::-1])[::-1], alone)


def test_shapes_are_as_declared_before_running(
    extractor: Extractor, inputs: list[Any], alone: Outputs
) -> None:
    declared = {output.name: output for output in extractor.outputs}
    for data, outputs in zip(inputs, alone, strict=True):
        frames = extractor.num_frames(len(data))
        assert list(outputs) == list(declared) == list(frames)
        for name, values in outputs.items():
            assert values.shape == (frames[name], declared[name].dim)
            if declared[name].kind == "pooled":
                assert len(values) == 1


def test_values_fit_their_declared_kind(extractor: Extractor, alone: Outputs) -> None:
    for outputs in alone:
        for output in extractor.outputs:
            values = outputs[output.name].numpy()
            if output.kind == "codes":
                assert values.dtype.kind in "iu"
                assert values.min() >= 0
                assert output.num_codes is not None
                assert values.max() < output.num_codes
            else:
                assert values.dtype == np.float32
                assert np.isfinite(values).all()


def test_a_second_extractor_gives_the_same_numbers(
    feature: str, extractor: Extractor, inputs: list[Any], alone: Outputs
) -> None:
    again = registry.create(feature)
    assert again.spec == extractor.spec
    again.load("cpu")
    source = TEXTS[1] if extractor.modality == "text" else clips()[3]
    position = 1 if extractor.modality == "text" else 3
    (outputs,) = run(again, [again.prepare(source)])
    for name, values in outputs.items():
        np.testing.assert_array_equal(values.numpy(), alone[position][name].numpy())


def test_loading_twice_is_free(extractor: Extractor, inputs: list[Any], alone: Outputs) -> None:
    extractor.load("cpu")
    (outputs,) = run(extractor, inputs[1:2])
    for name, values in outputs.items():
        np.testing.assert_array_equal(values.numpy(), alone[1][name].numpy())


def test_inputs_are_left_as_they_were(extractor: Extractor) -> None:
    source = TEXTS[0] if extractor.modality == "text" else clips()[3]
    before = source if isinstance(source, str) else source.copy()
    data = extractor.prepare(source)
    kept = data.clone()
    run(extractor, [data])
    np.testing.assert_array_equal(data.numpy(), kept.numpy())
    if not isinstance(source, str):
        np.testing.assert_array_equal(source, before)


def test_identity_is_canonical_and_names_extractor_and_version(extractor: Extractor) -> None:
    identity = dict(extractor.spec.identity)
    assert identity["version"] == extractor.version
    assert isinstance(identity["extractor"], str)
    assert canonical_json(identity)


def test_an_unknown_option_is_refused_with_the_nearest(feature: str) -> None:
    name = feature.partition(":")[0]
    sign = "," if ":" in feature else ":"
    with pytest.raises(UnknownNameError, match=f"option of feature '{name}' 'dtyp'.*'dtype'"):
        registry.create(f"{feature}{sign}dtyp=float32")


def test_constructing_any_extractor_imports_neither_torch_nor_transformers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    features = [case.feature(tmp_path_factory.mktemp(name)) for name, case in CASES.items()]
    program = """
import sys
from mer.cache.errors import MissingDependencyError
from mer.extract import registry
for feature in sys.argv[1:]:
    try:
        registry.create(feature)
    except MissingDependencyError:
        pass
    heavy = {"torch", "transformers", "opensmile", "torchcrepe"} & set(sys.modules)
    assert not heavy, (feature, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *features], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
