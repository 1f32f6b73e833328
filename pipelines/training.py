"""Training a head on cached features: a compact loop, and nothing that could see the test part.

``train`` takes a training and a validation set and returns a fitted head; only ``predict`` can be
given test utterances. Everything a run depends on is in its arguments: the same ones give the same
numbers, bit for bit on CPU, whatever ran before.

N utterances, C classes, T frames, D feature width.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mer.cache.errors import CheckpointError, DivergedError, RecipeError, UsageError
from mer.heads.contract import Head, StreamShape
from mer.heads.registry import configure, create
from mer.heads.settings import build
from mer.pipelines.batching import (
    FlatStream,
    epoch_batches,
    first_not_finite,
    flatten,
    moments,
    sorted_batches,
)
from mer.pipelines.metrics import classification

logger = logging.getLogger(__name__)

Progress = Callable[[Mapping[str, Any]], None]
"""Called after every epoch with its entry of ``TrainResult.history``."""


# -- data ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features and targets of some utterances, in memory.

    Parameters
    ----------
    streams : mapping of str to sequence of ndarray
        By stream name, one array per utterance: (T, D) float, or codes as (T,) or (T, 1) integers.
        T is at least 1 and need not agree between streams.
    ids : sequence of str
        (N,) unique utterance ids.
    classes : sequence of str
        (C,) class names.
    labels : ndarray, optional
        (N,) int, class index per utterance; not needed to predict.
    speakers : sequence of str or None, optional
        (N,) speakers.
    num_codes : mapping of str to int
        Codes of a stream lie below it. May be left out for ``uint8`` streams: 256.

    Raises
    ------
    UsageError
        Unequal lengths, repeated ids, labels out of range, empty or misshapen arrays.
    """

    streams: Mapping[str, Sequence[np.ndarray]]
    ids: Sequence[str]
    classes: Sequence[str]
    labels: np.ndarray | None = None
    speakers: Sequence[str | None] | None = None
    num_codes: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, StreamShape] = field(init=False)
    _means: dict[tuple[str, str], np.ndarray] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        count = len(self.ids)
        if len(set(self.ids)) < count:
            seen: set[str] = set()
            twice = next(i for i in self.ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            raise UsageError(f"Utterance {twice!r} is in the set twice.")
        if not self.streams:
            raise UsageError("A feature set needs at least one stream.")
        sizes = {f"stream {name!r}": len(arrays) for name, arrays in self.streams.items()}
        if self.labels is not None:
            sizes["labels"] = len(self.labels)
        if self.speakers is not None:
            sizes["speakers"] = len(self.speakers)
        for name, size in sizes.items():
            if size != count:
                raise UsageError(f"{name} has {size} entries for {count} utterances.")
        if self.labels is not None:
            labels = np.asarray(self.labels, dtype=np.int64)
            object.__setattr__(self, "labels", labels)
            if count and not 0 <= labels.min() <= labels.max() < len(self.classes):
                raise UsageError(
                    f"Labels must lie in 0 … {len(self.classes) - 1}. "
                    f"Got {labels.min()} … {labels.max()}."
                )
        shapes = {name: self._shape(name) for name in self.streams} if count else {}
        object.__setattr__(self, "shapes", shapes)

    def _shape(self, name: str) -> StreamShape:
        arrays = self.streams[name]
        first = arrays[0]
        codes = np.issubdtype(first.dtype, np.integer)
        for identity, array in zip(self.ids, arrays, strict=True):
            where = f"Stream {name!r} of {identity!r}"
            if array.ndim == 0 or len(array) == 0:
                raise UsageError(f"{where} has no frames.")
            if np.issubdtype(array.dtype, np.integer) != codes:
                raise UsageError(
                    f"{where} is {array.dtype}, that of {self.ids[0]!r} {first.dtype}."
                )
            width = array.shape[1:]
            if codes and width not in ((), (1,)):
                raise UsageError(f"{where} must be (T,) or (T, 1) codes. Got shape {array.shape}.")
            if not codes and (len(width) != 1 or width != first.shape[1:]):
                raise UsageError(
                    f"{where} has shape {array.shape}, expected (T, D) with the D of "
                    f"{self.ids[0]!r}, whose shape is {first.shape}."
                )
        if not codes:
            return StreamShape(int(first.shape[1]))
        if name in self.num_codes:
            return StreamShape(self.num_codes[name], "codes")
        if first.dtype == np.uint8:
            return StreamShape(256, "codes")
        raise UsageError(f"Stream {name!r} holds {first.dtype} codes: num_codes must say how many.")

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, ids: Sequence[str]) -> FeatureSet:
        """Return the utterances called ``ids``, in that order, without copying an array.

        Raises
        ------
        UsageError
            An id that the set does not have.
        """
        rows_by_id = {identity: row for row, identity in enumerate(self.ids)}
        missing = [i for i in ids if i not in rows_by_id]
        if missing:
            raise UsageError(
                f"{len(missing)} utterances are not in the feature set, the first {missing[0]!r}."
            )
        rows = [rows_by_id[i] for i in ids]
        chosen = dataclasses.replace(
            self,
            ids=tuple(ids),
            streams={name: [a[r] for r in rows] for name, a in self.streams.items()},
            labels=None if self.labels is None else self.labels[rows],
            speakers=None if self.speakers is None else [self.speakers[r] for r in rows],
        )
        object.__setattr__(chosen, "_means", self._means)  # the same utterances, the same means
        return chosen

    def means(self, stream: str) -> list[np.ndarray]:
        """Return the mean over time of every utterance as one frame, (1, D) float32 each.

        They are computed once for this set and all selections of it.
        """
        found = []
        for identity, array in zip(self.ids, self.streams[stream], strict=True):
            key = (stream, identity)
            if key not in self._means:
                mean = array.mean(0, keepdims=True, dtype=np.float64)
                self._means[key] = mean.astype(np.float32)
            found.append(self._means[key])
        return found


# -- settings --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a head is trained, by default as MDAT-SER (arXiv 2506.02088 §4) is.

    Where the paper and its authors' code differ, the code counts.

    Parameters
    ----------
    epochs : int, default=20
        Passes over the training part (paper).
    batch_size : int, default=8
        Utterances per step (paper).
    lr_max, lr_min : float, default=5e-5 and 1e-5
        Peak, and start and end, of the learning rate (code; the paper prints them swapped).
    warmup_steps : int, default=500
        Steps of linear warm-up, before half a cosine (paper).
    warmup_share : float, optional
        Share of all steps instead of ``warmup_steps``, for corpora of a few hundred utterances.
    weight_decay : float, default=1e-3
        Of AdamW (code; paper 1e-6).
    beta1, beta2, eps : float, default=0.9, 0.98 and 1e-8
        Of AdamW (paper).
    clip_norm : float, default=10.0
        Largest norm of the gradient (paper).
    class_weights : bool, default=True
        Cross-entropy weighted by N/N_c of the training part (code). A class that the training part
        lacks has weight 0.
    label_smoothing : float, default=0.0
        Share of the target spread over all classes (ours).
    standardise : bool, default=True
        Shift and scale every dimension to zero mean and unit variance over the frames of the
        training part; kept with the checkpoint (ours). A stream that the head averages over time
        first is standardised over those averages.
    bucketing : bool, default=True
        Batches of similar length (ours).
    select : {"macro_F1", "UA", "WA", "WF1", "loss", "last"}, default="macro_F1"
        Validation metric whose best epoch is kept, the earlier one of equals (code). ``last`` keeps
        the last epoch and needs no validation part.
    patience : int, optional
        Stop after so many epochs without a better one (ours; paper: never).
    precision : {"float32", "bfloat16"}, default="float32"
        ``bfloat16`` computes the head under autocast; weights stay float32.
    threads : int, default=1
        CPU threads of the computation (ours). The steps of small heads are too short to share: on a
        busy machine two threads were measured 20 times slower than one. And a rerun is
        bit-identical whatever number of cores a machine has.
    """

    epochs: int = 20
    batch_size: int = 8
    lr_max: float = 5e-5
    lr_min: float = 1e-5
    warmup_steps: int = 500
    warmup_share: float | None = None
    weight_decay: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip_norm: float = 10.0
    class_weights: bool = True
    label_smoothing: float = 0.0
    standardise: bool = True
    bucketing: bool = True
    select: Literal["macro_F1", "UA", "WA", "WF1", "loss", "last"] = "macro_F1"
    patience: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        rules: list[tuple[str, Any, bool, str]] = [
            ("epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("lr_min", self.lr_min, self.lr_min >= 0, "at least 0"),
            ("lr_max", self.lr_max, self.lr_max >= self.lr_min, "at least lr_min"),
            ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0"),
            (
                "warmup_share",
                self.warmup_share,
                self.warmup_share is None or 0 <= self.warmup_share <= 1,
                "between 0 and 1",
            ),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
            ("beta1", self.beta1, 0 <= self.beta1 < 1, "at least 0 and below 1"),
            ("beta2", self.beta2, 0 <= self.beta2 < 1, "at least 0 and below 1"),
            ("eps", self.eps, self.eps > 0, "above 0"),
            ("clip_norm", self.clip_norm, self.clip_norm > 0, "above 0"),
            (
                "label_smoothing",
                self.label_smoothing,
                0 <= self.label_smoothing < 1,
                "at least 0 and below 1",
            ),
            ("patience", self.patience, self.patience is None or self.patience >= 1, "at least 1"),
            ("threads", self.threads, self.threads >= 1, "at least 1"),
        ]
        faults = [f"{n} must be {rule}. Got {v}." for n, v, holds, rule in rules if not holds]
        if faults:
            raise UsageError(" ".join(faults))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of a recipe's ``training`` group over the defaults.

        Raises
        ------
        RecipeError
            Unknown keys (with the nearest known), wrong types or values.
        """
        try:
            return build(cls, settings)
        except ValueError as error:
            raise RecipeError(f"training: {error}") from error


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of update ``step``, counted from 0.

    Linear from ``lr_min`` to ``lr_max`` over the warm-up, then half a cosine back to ``lr_min`` at
    ``total_steps``.
    """
    low, high = config.lr_min, config.lr_max
    warmup: float = config.warmup_steps
    if config.warmup_share is not None:
        warmup = round(config.warmup_share * total_steps)
    if step <= warmup and warmup > 0:
        return low + (high - low) * step / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(1.0, done)))


# -- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedHead:
    """A trained head, complete: what ``predict`` and a checkpoint need.

    Parameters
    ----------
    name : str
        Head, as registered.
    config : mapping
        Its settings, all of them, as JSON types.
    shapes : mapping of str to StreamShape
        Streams it reads.
    classes : tuple of str
        Names of the columns of its probabilities.
    state : mapping of str to Tensor
        On CPU: the head's weights under ``head.``, ``standardise.STREAM.shift`` and ``….scale``.
    """

    name: str
    config: Mapping[str, Any]
    shapes: Mapping[str, StreamShape]
    classes: tuple[str, ...]
    state: Mapping[str, Tensor]

    def build(self, device: torch.device | str = "cpu") -> Head:
        """Return the head with its weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            head = create(self.name, self.config, self.shapes, len(self.classes))
        weights = {k.removeprefix("head."): v for k, v in self.state.items() if k[:5] == "head."}
        head.load_state_dict(weights)
        return head.to(device).eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What training one head yields.

    Parameters
    ----------
    head : FittedHead
        Of the best epoch.
    probabilities : ndarray
        (N, C) float32 of the validation part at the best epoch; (0, C) without one.
    metrics : mapping
        ``classification`` of the validation part at the best epoch; empty without one.
    history : tuple of mapping
        Per epoch: ``epoch`` (from 1), ``epochs``, ``lr`` (of its last step), ``loss`` (mean over
        its batches), ``seconds``, ``best`` (so far), and with a validation part
        ``validation_loss`` (None if all its classes have weight 0), ``validation_UA``, ``_WA``,
        ``_WF1``, ``_macro_F1``.
    best_epoch : int
        From 1.
    seconds : float
        Wall time.
    notes : tuple of str
        What a reader should know, e.g. classes without training utterances.
    """

    head: FittedHead
    probabilities: np.ndarray
    metrics: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    best_epoch: int
    seconds: float
    notes: tuple[str, ...] = ()


# -- training --------------------------------------------------------------------------------------


def train(
    head_name: str,
    head_config: Mapping[str, Any],
    training: FeatureSet,
    validation: FeatureSet | None,
    config: TrainConfig | None = None,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> TrainResult:
    """Train a head and keep its best epoch on the validation part.

    Parameters
    ----------
    head_name, head_config
        As in ``mer.heads.registry.create``.
    training : FeatureSet
        With labels. All its streams are read.
    validation : FeatureSet or None
        With labels; chooses the epoch. Optional with ``select="last"``.
    config : TrainConfig, optional
        Settings.
    seed : int
        Of weights, dropout and order; torch's global state is left as it was.
    device : torch.device or str
        Where to compute, and where features live if half of the free memory holds them.
    progress : callable, optional
        Called after every epoch.

    Raises
    ------
    RecipeError
        Unknown head, bad head settings, streams that the head does not take.
    UsageError
        Empty parts, utterances in both parts, missing labels, features that are not finite.
    DivergedError
        The loss is no longer finite; names epoch, batch and utterances.
    """
    config = config or TrainConfig()
    device = torch.device(device)
    began = time.perf_counter()
    _check_parts(training, validation, config)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), _threads(config.threads):
        torch.manual_seed(seed)
        head = _create(head_name, head_config, training, device)
        loop = _Loop(head, training, validation, config, seed, device)
        history: list[dict[str, Any]] = []
        best = _Best(config)
        for epoch in range(1, config.epochs + 1):
            entry, probabilities = loop.epoch(epoch)
            entry["best"] = best.offer(entry, head, probabilities)
            history.append(entry)
            if progress is not None:
                progress(entry)
            if config.patience is not None and epoch - best.epoch >= config.patience:
                logger.info("No better epoch since %d: stopped after %d.", best.epoch, epoch)
                break
    state = {f"head.{k}": v for k, v in best.state.items()} | loop.standardisation()
    fitted = FittedHead(
        name=head_name,
        config=dataclasses.asdict(configure(head_name, head_config)),
        shapes=dict(training.shapes),
        classes=tuple(training.classes),
        state=state,
    )
    return TrainResult(
        head=fitted,
        probabilities=best.probabilities,
        metrics=_measure(validation, best.probabilities),
        history=tuple(history),
        best_epoch=best.epoch,
        seconds=time.perf_counter() - began,
        notes=tuple(loop.notes),
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _create(name: str, settings: Mapping[str, Any], data: FeatureSet, device: torch.device) -> Head:
    try:
        return create(name, settings, data.shapes, len(data.classes)).to(device)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _check_parts(training: FeatureSet, validation: FeatureSet | None, config: TrainConfig) -> None:
    if not len(training):
        raise UsageError("The training part has no utterances.")
    if validation is None or not len(validation):
        if config.select != "last":
            raise UsageError(
                f"The validation part has no utterances, so that select={config.select!r} has "
                "nothing to choose by. Give it some, or set training.select to 'last'."
            )
    else:
        both = set(training.ids) & set(validation.ids)
        if both:
            raise UsageError(
                f"{len(both)} utterances are in training and validation, one is {min(both)!r}."
            )
        if validation.labels is None:
            raise UsageError("The validation part has no labels.")
        _check_like(validation, training.shapes, training.classes)
    if training.labels is None:
        raise UsageError("The training part has no labels.")


def _check_like(
    data: FeatureSet, shapes: Mapping[str, StreamShape], classes: Sequence[str]
) -> None:
    if tuple(data.classes) != tuple(classes):
        raise UsageError(
            f"Classes differ: {', '.join(data.classes)}; trained on {', '.join(classes)}."
        )
    for name, shape in shapes.items():
        found = data.shapes.get(name)
        if found != shape:
            given = "is missing" if found is None else f"is {found.dim} {found.kind} wide"
            raise UsageError(
                f"Stream {name!r} {given}; the head was trained on {shape.dim} {shape.kind}."
            )


class _Loop:
    """One run's tensors, optimiser and order of batches."""

    def __init__(
        self,
        head: Head,
        training: FeatureSet,
        validation: FeatureSet | None,
        config: TrainConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        assert training.labels is not None
        self.head, self.config, self.seed, self.device = head, config, seed, device
        self.notes: list[str] = []
        self.ids, self.classes = training.ids, training.classes
        self.streams = _pack(training, training.shapes, head, device)
        if config.standardise:
            for name, stream in self.streams.items():
                if training.shapes[name].kind == "frames":
                    shift, scale = (x.to(device) for x in moments(stream))
                    self.streams[name] = dataclasses.replace(stream, shift=shift, scale=scale)
        self.labels = torch.from_numpy(training.labels).to(device)
        self.weight = self._class_weight(training)
        self.validation = None
        if validation is not None and len(validation):
            assert validation.labels is not None
            packed = _pack(validation, training.shapes, head, device)
            self.validation = {
                name: dataclasses.replace(
                    s, shift=self.streams[name].shift, scale=self.streams[name].scale
                )
                for name, s in packed.items()
            }
            self.validation_labels = torch.from_numpy(validation.labels).to(device)
            self.validation_set = validation
        self.lengths = _lengths(self.streams)
        self.optimiser = torch.optim.AdamW(
            head.parameters(),
            lr=config.lr_min,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.steps_per_epoch = -(-len(training) // config.batch_size)
        self.step = 0

    def _class_weight(self, training: FeatureSet) -> Tensor | None:
        assert training.labels is not None
        counts = np.bincount(training.labels, minlength=len(training.classes))
        absent = [name for name, n in zip(training.classes, counts, strict=True) if n == 0]
        if absent:
            self.notes.append("No training utterance of: " + ", ".join(absent) + ".")
            logger.warning(self.notes[-1])
        if not self.config.class_weights:
            return None
        weight = np.divide(len(training), counts, out=np.zeros(len(counts)), where=counts > 0)
        return torch.tensor(weight, dtype=torch.float32, device=self.device)

    def epoch(self, epoch: int) -> tuple[dict[str, Any], np.ndarray]:
        """Train for one epoch; return its entry in the history and validation probabilities."""
        began = time.perf_counter()
        # seeded by epoch, not only at the start: a resumed run draws what an uninterrupted one does
        generator = np.random.default_rng([self.seed, epoch])
        torch.manual_seed(int(generator.integers(2**62)))
        batches = epoch_batches(
            self.lengths, self.config.batch_size, generator, bucketing=self.config.bucketing
        )
        self.head.train()
        losses = [self._update(rows) for rows in batches]
        values = torch.stack(losses).cpu()  # one transfer per epoch, not a stop at every step
        finite = torch.isfinite(values)
        if not finite.all():
            self._diverged(epoch, int(finite.int().argmin()), batches)
        entry = {
            "epoch": epoch,
            "epochs": self.config.epochs,
            "lr": self.optimiser.param_groups[0]["lr"],
            "loss": float(values.mean()),
        }
        probabilities = np.zeros((0, len(self.classes)), dtype=np.float32)
        if self.validation is not None:
            logits = _logits(self.head, self.validation, self.config, self.device)
            probabilities = logits.softmax(-1).numpy()
            if not np.isfinite(probabilities).all():
                self._diverged(epoch, len(batches) - 1, batches)
            entry["validation_loss"] = self._validation_loss(logits)
            measured = _measure(self.validation_set, probabilities)
            for name in ("UA", "WA", "WF1", "macro_F1"):
                entry[f"validation_{name}"] = measured[name]
        entry["seconds"] = time.perf_counter() - began
        return entry, probabilities

    def _update(self, rows: np.ndarray) -> Tensor:
        rate = learning_rate(self.step, self.steps_per_epoch * self.config.epochs, self.config)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        streams = {name: stream.batch(rows) for name, stream in self.streams.items()}
        target = self.labels[torch.from_numpy(rows).to(self.device)]
        with _autocast(self.config, self.device):
            output = self.head(streams)
            loss = self.head.loss(output, target, self.weight, self.config.label_smoothing)["total"]
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip_norm)
        self.optimiser.step()
        self.step += 1
        return loss.detach()

    def _validation_loss(self, logits: Tensor) -> float | None:
        target = self.validation_labels.cpu()
        weight = None if self.weight is None else self.weight.cpu()
        if weight is not None and not weight[target].any():
            return None
        return float(nn.functional.cross_entropy(logits, target, weight))

    def _diverged(self, epoch: int, batch: int, batches: Sequence[np.ndarray]) -> None:
        ids = ", ".join(repr(self.ids[row]) for row in batches[batch][:8])
        raise DivergedError(
            f"The loss is not finite in epoch {epoch}, batch {batch + 1} of {len(batches)} "
            f"({ids}{', …' if len(batches[batch]) > 8 else ''}); features are. "
            "Lower training.lr_max or training.clip_norm."
        )

    def standardisation(self) -> dict[str, Tensor]:
        """Return shift and scale per stream, as they stand in a checkpoint."""
        found = {}
        for name, stream in self.streams.items():
            if stream.shift is not None and stream.scale is not None:
                found[f"standardise.{name}.shift"] = stream.shift.cpu()
                found[f"standardise.{name}.scale"] = stream.scale.cpu()
        return found


class _Best:
    """The best epoch so far, by the rule of the settings; of equals the earlier."""

    def __init__(self, config: TrainConfig) -> None:
        self.key = f"validation_{config.select}"
        self.last = config.select == "last"
        self.sign = -1.0 if config.select == "loss" else 1.0
        self.score = -math.inf
        self.epoch = 0
        self.state: dict[str, Tensor] = {}
        self.probabilities = np.zeros((0, 0), dtype=np.float32)

    def offer(self, entry: Mapping[str, Any], head: Head, probabilities: np.ndarray) -> bool:
        """Keep the epoch if it is the best, and say so."""
        if not self.last:
            value = entry[self.key]
            if value is None:
                raise UsageError(
                    "No class of the validation part occurs in training, so that its weighted loss "
                    "is undefined. Choose another training.select."
                )
            if self.epoch and self.sign * value <= self.score:
                return False
            self.score = self.sign * value
        self.epoch = entry["epoch"]
        self.state = {k: v.detach().cpu().clone() for k, v in head.state_dict().items()}
        self.probabilities = probabilities
        return True


# -- prediction ------------------------------------------------------------------------------------


def predict(
    fitted: FittedHead,
    data: FeatureSet,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    config: TrainConfig | None = None,
) -> np.ndarray:
    """Return class probabilities (N, C) float32, columns as in ``fitted.classes``.

    Parameters
    ----------
    fitted : FittedHead
        From ``train`` or ``load_head``.
    data : FeatureSet
        With the streams that the head was trained on; labels are not looked at.
    batch_size : int, default=32
        Utterances at a time; it does not change a result.
    config : TrainConfig, optional
        Precision and threads are taken from it, so that test is computed as validation was.

    Raises
    ------
    UsageError
        A missing stream, one of another width, other classes, or features that are not finite.
    """
    device = torch.device(device)
    if not len(data):
        return np.zeros((0, len(fitted.classes)), dtype=np.float32)
    _check_like(data, fitted.shapes, fitted.classes)
    head = fitted.build(device)
    streams = {}
    for name, stream in _pack(data, fitted.shapes, head, device).items():
        shift, scale = (fitted.state.get(f"standardise.{name}.{k}") for k in ("shift", "scale"))
        if shift is not None and scale is not None:
            stream = dataclasses.replace(stream, shift=shift.to(device), scale=scale.to(device))
        streams[name] = stream
    config = dataclasses.replace(config or TrainConfig(), batch_size=batch_size)
    with _threads(config.threads):
        logits = _logits(head, streams, config, device)
    return logits.softmax(-1).numpy()


def _pack(
    data: FeatureSet, shapes: Mapping[str, StreamShape], head: Head, device: torch.device
) -> dict[str, FlatStream]:
    streams = {}
    for name, shape in shapes.items():
        once = shape.kind == "frames" and name in head.mean_first
        stream = flatten(data.means(name) if once else data.streams[name], shape.kind, device)
        bad = first_not_finite(stream)
        if bad is not None:
            raise UsageError(f"Stream {name!r} of {data.ids[bad]!r} holds NaN or Inf.")
        if shape.kind == "codes" and not 0 <= stream.data.min() <= stream.data.max() < shape.dim:
            raise UsageError(
                f"Stream {name!r} must hold codes in 0 … {shape.dim - 1}. "
                f"Got {int(stream.data.min())} … {int(stream.data.max())}."
            )
        streams[name] = stream
    return streams


def _lengths(streams: Mapping[str, FlatStream]) -> np.ndarray:
    """Return the lengths to sort by: those of the stream with the most frames."""
    return max((s.longest for s in streams.values()), key=lambda lengths: int(lengths.sum()))


@torch.no_grad()
def _logits(
    head: Head, streams: Mapping[str, FlatStream], config: TrainConfig, device: torch.device
) -> Tensor:
    """Return logits (N, C) float32 on CPU."""
    head.eval()
    lengths = _lengths(streams)
    # a head that lets padding in must not meet any: as its authors do, one utterance at a time
    batches = sorted_batches(lengths, config.batch_size if head.masked else 1)
    parts = []
    for rows in batches:
        with _autocast(config, device):
            parts.append(head({n: s.batch(rows) for n, s in streams.items()}).logits.float())
    order = torch.from_numpy(np.concatenate(batches))
    logits = torch.cat(parts).cpu()
    return torch.empty_like(logits).index_copy_(0, order, logits)


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def _measure(data: FeatureSet | None, probabilities: np.ndarray) -> dict[str, Any]:
    if data is None or not len(data) or data.labels is None:
        return {}
    return classification(data.labels, probabilities.argmax(1), data.classes)


# -- checkpoints -----------------------------------------------------------------------------------

CHECKPOINT_VERSION = 1


def save_head(fitted: FittedHead, path: Path) -> None:
    """Write a fitted head as one safetensors file, complete or not at all."""
    described = {
        "version": CHECKPOINT_VERSION,
        "head": fitted.name,
        "config": dict(fitted.config),
        "streams": {name: dataclasses.asdict(shape) for name, shape in fitted.shapes.items()},
        "classes": list(fitted.classes),
    }
    partial = path.with_name(path.name + ".part")
    tensors = {name: tensor.contiguous() for name, tensor in fitted.state.items()}
    save_file(tensors, partial, metadata={"mer": json.dumps(described, sort_keys=True)})
    os.replace(partial, path)


def load_head(path: Path) -> FittedHead:
    """Return the fitted head that ``save_head`` wrote.

    Raises
    ------
    CheckpointError
        Missing, damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Checkpoint {path} cannot be read: {error}") from error
    try:
        described = json.loads(metadata["mer"])
        if described["version"] != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"Checkpoint {path} has version {described['version']}, "
                f"this release reads {CHECKPOINT_VERSION}."
            )
        return FittedHead(
            name=described["head"],
            config=described["config"],
            shapes={name: StreamShape(**shape) for name, shape in described["streams"].items()},
            classes=tuple(described["classes"]),
            state=state,
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"Checkpoint {path} was not written by mer train-head.") from error
