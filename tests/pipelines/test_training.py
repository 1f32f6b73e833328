from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mer.cache.errors import CheckpointError, DivergedError, RecipeError, UsageError
from mer.heads.contract import StreamShape
from mer.pipelines import batching, training
from mer.pipelines.metrics import classification
from mer.pipelines.training import (
    FeatureSet,
    TrainConfig,
    TrainResult,
    learning_rate,
    load_head,
    predict,
    save_head,
    train,
)

CLASSES = ("angry", "calm", "sad")
SMALL = {"width": 16, "hidden": 16, "code_dim": 8}
FAST = TrainConfig(epochs=4, lr_max=3e-3, warmup_share=0.1)


def features(count: int = 48, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> FeatureSet:
    """Return utterances whose speech leans towards a direction of their class."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % len(classes)
    towards = np.random.default_rng(99).normal(size=(len(classes), 10))
    speech = [
        (20 + towards[c] + draw.normal(size=(draw.integers(3, 12), 10))).astype(np.float16)
        for c in labels
    ]
    text = [draw.normal(size=(draw.integers(1, 6), 6)).astype(np.float32) for _ in labels]
    f0 = [draw.integers(1, 256, (draw.integers(3, 9), 1)).astype(np.uint8) for _ in labels]
    return FeatureSet(
        streams={"speech": speech, "text": text, "f0": f0},
        ids=[f"u{i:03d}" for i in range(count)],
        classes=classes,
        labels=labels,
        speakers=[f"s{i % 4}" for i in range(count)],
    )


def parts(data: FeatureSet) -> tuple[FeatureSet, FeatureSet, FeatureSet]:
    ids = list(data.ids)
    third = len(ids) // 3
    return (
        data.select(ids[:third]),
        data.select(ids[third : 2 * third]),
        data.select(ids[2 * third :]),
    )


def fit(
    config: TrainConfig = FAST, head: str = "mdat", seed: int = 1, **options: Any
) -> TrainResult:
    learn, check, _ = parts(features())
    return train(head, SMALL | options, learn, check, config, seed=seed)


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["simple", "mdat"])
def test_training_learns_what_can_be_learnt(head: str) -> None:
    learn, check, test = parts(features(90))
    result = train(
        head, SMALL, learn, check, dataclasses.replace(FAST, epochs=15, lr_max=1e-2), seed=1
    )
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert test.labels is not None
    found = classification(test.labels, predict(result.head, test).argmax(1), CLASSES)
    assert found["UA"] > 0.8


@pytest.mark.parametrize("head", ["simple", "mdat"])
def test_same_seed_gives_the_same_bits_whatever_ran_before(head: str) -> None:
    first = fit(head=head)
    torch.manual_seed(12345)
    torch.rand(17)
    fit(head=head, seed=2)
    again = fit(head=head)
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    assert first.head.state.keys() == again.head.state.keys()
    for name, tensor in first.head.state.items():
        assert torch.equal(tensor, again.head.state[name]), name

    def timeless(result: TrainResult) -> list[dict[str, Any]]:
        return [{k: v for k, v in e.items() if k != "seconds"} for e in result.history]

    assert timeless(first) == timeless(again)


def test_another_seed_gives_another_head() -> None:
    assert not np.array_equal(fit(seed=1).probabilities, fit(seed=2).probabilities)


def test_training_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit()
    assert torch.equal(torch.rand(3), expected)


def test_history_tells_every_epoch_and_progress_hears_it() -> None:
    learn, check, _ = parts(features())
    heard: list[Any] = []
    result = train("simple", SMALL, learn, check, FAST, seed=1, progress=heard.append)
    assert tuple(heard) == result.history
    assert [e["epoch"] for e in heard] == [1, 2, 3, 4]
    assert heard[0].keys() == {
        "epoch",
        "epochs",
        "lr",
        "loss",
        "validation_loss",
        "validation_UA",
        "validation_WA",
        "validation_WF1",
        "validation_macro_F1",
        "seconds",
        "best",
    }


@pytest.mark.parametrize("select", ["macro_F1", "UA", "WA", "WF1", "loss"])
def test_the_best_epoch_on_validation_is_kept_the_earlier_of_equals(select: Any) -> None:
    learn, check, _ = parts(features())
    config = dataclasses.replace(FAST, epochs=8, select=select)
    result = train("simple", SMALL, learn, check, config, seed=1)
    values = [e[f"validation_{select}"] for e in result.history]
    best = min(values) if select == "loss" else max(values)
    assert result.best_epoch == 1 + values.index(best)
    assert [e["best"] for e in result.history].count(True) >= 1
    assert check.labels is not None
    expected = classification(check.labels, result.probabilities.argmax(1), CLASSES)
    assert result.metrics == expected
    if select != "loss":
        assert result.metrics[select] == best
    np.testing.assert_allclose(predict(result.head, check), result.probabilities, atol=1e-6)


def test_of_epochs_that_are_all_equal_the_first_is_kept() -> None:
    frozen = TrainConfig(epochs=3, lr_max=0.0, lr_min=0.0)
    result = fit(frozen)
    assert result.best_epoch == 1
    assert [e["best"] for e in result.history] == [True, False, False]


def test_the_last_epoch_can_be_kept_and_needs_no_validation() -> None:
    learn, check, _ = parts(features())
    config = dataclasses.replace(FAST, select="last")
    assert train("simple", SMALL, learn, check, config, seed=1).best_epoch == 4
    alone = train("simple", SMALL, learn, None, config, seed=1)
    assert alone.best_epoch == 4
    assert alone.probabilities.shape == (0, 3)
    assert alone.metrics == {}
    assert "validation_loss" not in alone.history[0]


def test_validation_does_not_change_what_is_learnt() -> None:
    learn, check, test = parts(features())
    config = dataclasses.replace(FAST, select="last")
    one = train("mdat", SMALL, learn, check, config, seed=1)
    other = train("mdat", SMALL, learn, test, config, seed=1)
    for name, tensor in one.head.state.items():
        assert torch.equal(tensor, other.head.state[name]), name


def test_patience_stops_after_epochs_without_a_better_one() -> None:
    frozen = TrainConfig(epochs=20, lr_max=0.0, lr_min=0.0, patience=3)
    assert len(fit(frozen).history) == 4


def test_bfloat16_trains_and_stays_near_float32() -> None:
    exact, mixed = fit(), fit(dataclasses.replace(FAST, precision="bfloat16"))
    assert all(t.dtype == torch.float32 for t in mixed.head.state.values())
    assert mixed.history[0]["loss"] == pytest.approx(exact.history[0]["loss"], rel=0.05)


@pytest.mark.parametrize("count", [4, 5])
def test_batches_of_one_utterance_train(count: int) -> None:
    learn, check, _ = parts(features())
    few = learn.select(list(learn.ids)[:count])
    result = train("mdat", SMALL, few, check, dataclasses.replace(FAST, batch_size=4), seed=1)
    assert all(np.isfinite(e["loss"]) for e in result.history)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("head", ["simple", "mdat"])
@pytest.mark.parametrize("fits", [True, False])
def test_training_on_cuda_comes_close_to_cpu(
    head: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_fits", lambda data, device: fits)
    learn, check, test = parts(features())
    options = SMALL | {"dropout": 0.0}  # the devices draw other numbers
    on_cpu = train(head, options, learn, check, FAST, seed=1)
    on_cuda = train(head, options, learn, check, FAST, seed=1, device="cuda")
    assert on_cuda.history[0]["loss"] == pytest.approx(on_cpu.history[0]["loss"], rel=0.05)
    np.testing.assert_allclose(
        predict(on_cpu.head, test, device="cuda"), predict(on_cpu.head, test), atol=1e-3
    )
    assert all(t.device.type == "cpu" for t in on_cuda.head.state.values())


# -- classes ---------------------------------------------------------------------------------------


def test_cross_entropy_is_weighted_by_inverse_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = training.Head.loss

    def spy(self: Any, output: Any, target: Any, weight: Any, smoothing: float) -> Any:
        seen.append(weight)
        return original(self, output, target, weight, smoothing)

    monkeypatch.setattr(training.Head, "loss", spy)
    learn, check, _ = parts(features())
    labels = np.array([0] * 8 + [1] * 4 + [2] * 4)
    learn = dataclasses.replace(learn, labels=labels)
    train("simple", SMALL, learn, check, FAST, seed=1)
    assert seen[0].tolist() == [2.0, 4.0, 4.0]
    train("simple", SMALL, learn, check, dataclasses.replace(FAST, class_weights=False), seed=1)
    assert seen[-1] is None


def test_a_class_without_training_utterances_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    learn, check, _ = parts(features())
    learn = dataclasses.replace(learn, labels=np.zeros(len(learn), dtype=np.int64))
    with caplog.at_level(logging.WARNING):
        result = train("simple", SMALL, learn, check, FAST, seed=1)
    assert result.notes == ("No training utterance of: calm, sad.",)
    assert "No training utterance of: calm, sad." in caplog.text
    assert np.isfinite(result.probabilities).all()


def test_validation_loss_without_any_known_class_is_none() -> None:
    learn, check, _ = parts(features())
    learn = dataclasses.replace(learn, labels=np.zeros(len(learn), dtype=np.int64))
    check = dataclasses.replace(check, labels=np.ones(len(check), dtype=np.int64))
    result = train("simple", SMALL, learn, check, FAST, seed=1)
    assert result.history[0]["validation_loss"] is None
    with pytest.raises(UsageError, match="weighted loss is undefined"):
        train("simple", SMALL, learn, check, dataclasses.replace(FAST, select="loss"), seed=1)


# -- learning rate ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-5),
        (1, 1.008e-5),
        (250, 3e-5),
        (500, 5e-5),
        (2875, 4.41421e-5),
        (5250, 3e-5),
        (10000, 1e-5),
    ],
)
def test_learning_rate_has_the_published_check_values(step: int, rate: float) -> None:
    assert learning_rate(step, 10000, TrainConfig()) == pytest.approx(rate, rel=1e-6)


def test_warm_up_may_be_a_share_of_all_steps() -> None:
    config = TrainConfig(warmup_share=0.25, lr_min=0.0, lr_max=1.0)
    rates = [learning_rate(n, 100, config) for n in range(101)]
    assert rates[0] == 0
    assert max(rates) == rates[25] == 1
    assert rates[100] == pytest.approx(0)
    no_warm_up = dataclasses.replace(config, warmup_share=0.0)
    assert learning_rate(0, 100, no_warm_up) == 1


def test_a_run_shorter_than_the_warm_up_only_warms_up() -> None:
    rates = [learning_rate(n, 100, TrainConfig()) for n in range(101)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(1.8e-5)


# -- standardisation -------------------------------------------------------------------------------


def test_standardisation_comes_from_the_training_part_alone() -> None:
    learn, check, _ = parts(features())
    result = train("mdat", SMALL, learn, check, FAST, seed=1)
    frames = np.concatenate([a.astype(np.float64) for a in learn.streams["speech"]])
    shift = result.head.state["standardise.speech.shift"].numpy()
    scale = result.head.state["standardise.speech.scale"].numpy()
    np.testing.assert_allclose(shift, frames.mean(0), rtol=1e-6)
    np.testing.assert_allclose(scale, 1 / frames.std(0), rtol=1e-5)
    assert "standardise.f0.shift" not in result.head.state


def test_a_stream_averaged_first_is_standardised_over_averages() -> None:
    learn, check, _ = parts(features())
    result = train("simple", SMALL, learn, check, FAST, seed=1)
    means = np.stack([a.mean(0, dtype=np.float64) for a in learn.streams["speech"]])
    scale = result.head.state["standardise.speech.scale"].numpy()
    np.testing.assert_allclose(scale, 1 / means.std(0), rtol=1e-4)


def test_standardisation_can_be_left_out() -> None:
    result = fit(dataclasses.replace(FAST, standardise=False))
    assert not [name for name in result.head.state if name.startswith("standardise")]


@pytest.mark.parametrize("head", ["simple", "mdat"])
def test_scale_and_offset_of_a_feature_do_not_matter(head: str) -> None:
    learn, check, _ = parts(features())

    def stretched(data: FeatureSet) -> FeatureSet:
        speech = [(a.astype(np.float32) * 64 - 5) for a in data.streams["speech"]]
        return dataclasses.replace(data, streams={**data.streams, "speech": speech})

    config = dataclasses.replace(FAST, epochs=1)
    plain = train(head, SMALL, learn, check, config, seed=1)
    other = train(head, SMALL, stretched(learn), stretched(check), config, seed=1)
    np.testing.assert_allclose(plain.probabilities, other.probabilities, atol=1e-4)


# -- prediction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["simple", "mdat"])
def test_batch_size_does_not_change_a_prediction(head: str) -> None:
    result = fit(head=head)
    _, _, test = parts(features())
    alone = predict(result.head, test, batch_size=1)
    np.testing.assert_allclose(predict(result.head, test, batch_size=7), alone, atol=1e-6)
    np.testing.assert_allclose(alone.sum(1), 1, atol=1e-6)


def test_a_head_that_lets_padding_in_is_evaluated_one_by_one() -> None:
    result = fit(parity=True)
    _, _, test = parts(features())
    np.testing.assert_array_equal(
        predict(result.head, test, batch_size=1), predict(result.head, test, batch_size=7)
    )


def test_prediction_needs_no_labels_and_may_be_of_nothing() -> None:
    result = fit()
    _, _, test = parts(features())
    unlabelled = dataclasses.replace(test, labels=None)
    np.testing.assert_array_equal(predict(result.head, unlabelled), predict(result.head, test))
    assert predict(result.head, test.select([])).shape == (0, 3)


def test_prediction_refuses_features_of_another_width() -> None:
    result = fit()
    _, _, test = parts(features())
    other = {**test.streams, "text": [a[:, :4] for a in test.streams["text"]]}
    with pytest.raises(UsageError, match="'text' is 4 frames wide; .* trained on 6 frames"):
        predict(result.head, dataclasses.replace(test, streams=other))
    del other["text"]
    with pytest.raises(UsageError, match="Stream 'text' is missing; "):
        predict(result.head, dataclasses.replace(test, streams=other))
    with pytest.raises(UsageError, match="Classes differ: a, b, c; trained on angry, calm, sad"):
        predict(result.head, dataclasses.replace(test, classes=("a", "b", "c")))


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["simple", "mdat"])
def test_a_saved_head_predicts_the_same_bits(head: str, tmp_path: Path) -> None:
    fitted = fit(head=head).head
    path = tmp_path / "head.safetensors"
    save_head(fitted, path)
    loaded = load_head(path)
    _, _, test = parts(features())
    np.testing.assert_array_equal(predict(loaded, test), predict(fitted, test))
    assert dataclasses.replace(loaded, state={}) == dataclasses.replace(fitted, state={})
    assert [p.name for p in tmp_path.iterdir()] == ["head.safetensors"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    missing, text, foreign = (tmp_path / n for n in ("missing", "text", "foreign"))
    text.write_text("not a checkpoint")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match="missing cannot be read"):
        load_head(missing)
    with pytest.raises(CheckpointError, match="text cannot be read"):
        load_head(text)
    with pytest.raises(CheckpointError, match="foreign was not written by mer"):
        load_head(foreign)


# -- refusals --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_epoch_batch_and_utterances() -> None:
    learn, check, _ = parts(features())
    config = TrainConfig(epochs=3, lr_max=1e30, warmup_steps=0, clip_norm=1e30, batch_size=5)
    with pytest.raises(
        DivergedError, match=r"epoch \d, batch \d of 4 \('u0\d\d'.*Lower training.lr_max"
    ):
        train("mdat", SMALL, learn, check, config, seed=1)


@pytest.mark.parametrize("head", ["simple", "mdat"])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_features_that_are_not_finite_are_named(head: str, part: str) -> None:
    learn, check, _ = parts(features())
    spoilt = learn if part == "training" else check
    spoilt.streams["speech"][2][1, 0] = np.nan
    with pytest.raises(UsageError, match=f"'speech' of '{spoilt.ids[2]}' holds NaN or Inf"):
        train(head, SMALL, learn, check, FAST, seed=1)


def test_codes_out_of_range_are_refused() -> None:
    learn, check, _ = parts(features())
    small = {"num_codes": {"f0": 10}}
    with pytest.raises(UsageError, match=r"Stream 'f0' must hold codes in 0 … 9. Got \d+ … 2\d\d"):
        train(
            "mdat",
            SMALL,
            dataclasses.replace(learn, **small),
            dataclasses.replace(check, **small),
            FAST,
            seed=1,
        )


def test_parts_that_cannot_be_used_are_refused() -> None:
    learn, check, _ = parts(features())
    none = learn.select([])
    with pytest.raises(UsageError, match="training part has no utterances"):
        train("simple", SMALL, none, check, FAST, seed=1)
    with pytest.raises(UsageError, match="validation part has no utterances.*select to 'last'"):
        train("simple", SMALL, learn, none, FAST, seed=1)
    with pytest.raises(UsageError, match="16 utterances are in training and validation.*'u000'"):
        train("simple", SMALL, learn, learn, FAST, seed=1)
    with pytest.raises(UsageError, match="training part has no labels"):
        train("simple", SMALL, dataclasses.replace(learn, labels=None), check, FAST, seed=1)
    with pytest.raises(UsageError, match="validation part has no labels"):
        train("simple", SMALL, learn, dataclasses.replace(check, labels=None), FAST, seed=1)


def test_bad_head_settings_are_faults_of_the_recipe() -> None:
    learn, check, _ = parts(features())
    with pytest.raises(RecipeError, match="unknown key 'widht'. Did you mean 'width'"):
        train("simple", {"widht": 3}, learn, check, FAST, seed=1)
    with pytest.raises(RecipeError, match="Unknown head 'mdta'. Did you mean 'mdat'"):
        train("mdta", {}, learn, check, FAST, seed=1)
    alone = {"speech": learn.streams["speech"]}
    with pytest.raises(RecipeError, match="Stream 'text' is missing. Mdat reads"):
        train("mdat", {}, dataclasses.replace(learn, streams=alone), check, FAST, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "training: unknown key 'epoch'. Did you mean 'epochs'?"),
        ({"epochs": "many"}, "training: epochs must be an integer. Got 'many'."),
        ({"epochs": 0}, "epochs must be at least 1. Got 0."),
        ({"lr_max": 1e-6}, "lr_max must be at least lr_min. Got 1e-06."),
        ({"warmup_share": 2}, "warmup_share must be between 0 and 1. Got 2.0."),
        ({"select": "accuracy"}, "select must be 'macro_F1' or 'UA'"),
        ({"patience": 0, "beta1": 1.0}, "beta1 must be at least 0 and below 1. Got 1.0. patience"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be at least 0 and below 1"),
        ({"clip_norm": -1}, "clip_norm must be above 0. Got -1.0."),
    ],
)
def test_bad_training_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        TrainConfig.from_settings(settings)


# -- feature sets ----------------------------------------------------------------------------------


def test_shapes_follow_from_the_arrays() -> None:
    assert features().shapes == {
        "speech": StreamShape(10),
        "text": StreamShape(6),
        "f0": StreamShape(256, "codes"),
    }


def test_a_selection_keeps_the_order_asked_for_and_copies_nothing() -> None:
    data = features()
    chosen = data.select(["u007", "u002"])
    assert tuple(chosen.ids) == ("u007", "u002")
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [1, 2]
    assert chosen.speakers == ["s3", "s2"]
    assert chosen.streams["speech"][0] is data.streams["speech"][7]
    with pytest.raises(UsageError, match="2 utterances are not .*, the first 'x'"):
        data.select(["u001", "x", "y"])


def test_means_are_computed_once_for_all_selections() -> None:
    data = features()
    first = data.select(["u003", "u001"]).means("speech")
    again = data.select(["u001"]).means("speech")
    assert again[0] is first[1]
    expected = data.streams["speech"][1].mean(0, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(again[0], expected, rtol=1e-6)
    doubled = {**data.streams, "speech": [2 * a for a in data.streams["speech"]]}
    other = dataclasses.replace(data, streams=doubled).means("speech")
    np.testing.assert_allclose(other[1], 2 * expected, rtol=1e-3)


ONE = np.zeros((2, 3), dtype=np.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": ["a", "a"]}, "Utterance 'a' is in the set twice"),
        ({"streams": {}}, "at least one stream"),
        ({"streams": {"speech": [ONE]}}, "stream 'speech' has 1 entries for 2 utterances"),
        ({"labels": np.array([0])}, "labels has 1 entries for 2 utterances"),
        ({"labels": np.array([0, 3])}, r"Labels must lie in 0 … 2. Got 0 … 3"),
        ({"streams": {"speech": [ONE, ONE[:0]]}}, "'speech' of 'b' has no frames"),
        ({"streams": {"speech": [ONE, ONE[:, :2]]}}, r"'speech' of 'b' has shape \(2, 2\)"),
        ({"streams": {"speech": [ONE, ONE[0]]}}, r"'speech' of 'b' has shape \(3,\)"),
        ({"streams": {"speech": [ONE, ONE.astype(int)]}}, "of 'b' is int64, that of 'a' float32"),
        ({"streams": {"f0": [ONE.astype(int)] * 2}}, r"must be \(T,\) or \(T, 1\) codes"),
        ({"streams": {"f0": [np.array([1])] * 2}}, "holds int64 codes: num_codes must say"),
    ],
)
def test_feature_sets_that_do_not_add_up_are_refused(fields: dict[str, Any], message: str) -> None:
    sound: dict[str, Any] = {
        "streams": {"speech": [ONE, ONE]},
        "ids": ["a", "b"],
        "classes": CLASSES,
        "labels": np.array([0, 1]),
    }
    with pytest.raises(UsageError, match=message):
        FeatureSet(**(sound | fields))
