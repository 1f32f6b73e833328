"""The head contract, run on every registered head in every form listed here.

A new head that reads streams of usual kinds is covered by being registered; forms that matter
(branches, ablations) are added to ``FORMS``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from mer.heads.contract import Head, Ragged, StreamShape
from mer.heads.registry import HEADS, create, names, resolve

SMALL = {"width": 16, "hidden": 16, "code_dim": 8}
NUM_CLASSES = 4
SPEECH, TEXT = StreamShape(12), StreamShape(7)
F0 = StreamShape(256, "codes")


@dataclass(frozen=True)
class Form:
    head: str
    shapes: dict[str, StreamShape]
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.config.items())
        return f"{self.head}({'+'.join(self.shapes)}{';' if options else ''}{options})"

    def create(self, seed: int = 0, **config: Any) -> Head:
        torch.manual_seed(seed)
        return create(self.head, SMALL | self.config | config, self.shapes, NUM_CLASSES)


BOTH = {"speech": SPEECH, "text": TEXT}
ALL = BOTH | {"f0": F0}
FORMS = [
    Form("simple", {"speech": SPEECH}),
    Form("simple", BOTH, {"classifier": "relu"}),
    Form("simple", ALL),
    Form("simple", ALL, {"pooling": "mean_std"}),
    Form("simple", {"egemaps": SPEECH, "pitch": F0}),
    Form("mdat", BOTH),
    Form("mdat", BOTH, {"classifier": "relu"}),
    Form("mdat", ALL),
    Form("mdat", ALL, {"graph_attention": False}),
    Form("mdat", ALL, {"co_attention": False}),
    Form("mdat", ALL, {"encoder": False}),
    Form("mdat", ALL, {"pooling": "mean"}),
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


def utterances(form: Form, count: int = 5, seed: int = 1) -> list[dict[str, Tensor]]:
    """Return unpadded streams; lengths differ between utterances and between streams."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        streams = {}
        for name, shape in form.shapes.items():
            length = int(torch.randint(2, 10, (), generator=draw))
            if shape.kind == "codes":
                streams[name] = torch.randint(0, shape.dim, (length,), generator=draw)
            else:
                streams[name] = torch.randn(length, shape.dim, generator=draw)
        made.append(streams)
    return made


def collate(
    items: list[dict[str, Tensor]], extra: int = 0, garbage: bool = False
) -> dict[str, Ragged]:
    """Pad with zeros, or the worst that may stand there, by ``extra`` frames beyond need."""
    batch = {}
    for name, first in items[0].items():
        lengths = torch.tensor([len(item[name]) for item in items])
        fill = 0 if not garbage else 255 if first.dtype == torch.int64 else float("nan")
        shape = (len(items), int(lengths.max()) + extra, *first.shape[1:])
        data = torch.full(shape, fill, dtype=first.dtype)
        for row, item in enumerate(items):
            data[row, : len(item[name])] = item[name]
        batch[name] = Ragged(data, lengths)
    return batch


def test_every_head_has_a_form() -> None:
    assert {form.head for form in FORMS} >= set(HEADS)


@every_form
def test_logits_have_a_row_per_utterance_and_a_column_per_class(form: Form) -> None:
    output = form.create().eval()(collate(utterances(form)))
    assert output.logits.shape == (5, NUM_CLASSES)
    assert output.logits.isfinite().all()


@every_form
def test_padding_does_not_change_logits(form: Form) -> None:
    head, items = form.create().eval(), utterances(form)
    padded = head(collate(items, extra=9, garbage=True)).logits
    torch.testing.assert_close(padded, head(collate(items)).logits, atol=1e-6, rtol=0)


@every_form
def test_a_batch_equals_its_utterances_alone(form: Form) -> None:
    head, items = form.create().eval(), utterances(form)
    alone = torch.cat([head(collate([item])).logits for item in items])
    torch.testing.assert_close(head(collate(items)).logits, alone, atol=1e-6, rtol=0)


@every_form
def test_order_in_the_batch_does_not_matter(form: Form) -> None:
    head, items = form.create().eval(), utterances(form)
    order = [3, 0, 4, 2, 1]
    shuffled = head(collate([items[i] for i in order])).logits
    torch.testing.assert_close(shuffled, head(collate(items)).logits[order], atol=1e-6, rtol=0)


@every_form
def test_padding_gets_no_gradient_and_spoils_none(form: Form) -> None:
    head = form.create()
    batch = collate(utterances(form), extra=3, garbage=True)
    frames = {n: s.data.requires_grad_() for n, s in batch.items() if s.data.is_floating_point()}
    head.loss(head(batch), torch.tensor([0, 1, 2, 3, 0]))["total"].backward()
    for name, data in frames.items():
        assert data.grad is not None
        assert data.grad.isfinite().all(), name
        assert not data.grad[~batch[name].mask].any(), name
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@every_form
def test_gradient_reaches_every_parameter(form: Form) -> None:
    # in float64: graph attention makes frames so alike at first that some true gradients are 1e-8,
    # while those of inert parameters are rounding, 1e-18
    head = form.create(dropout=0.0).double()
    batch = {
        n: Ragged(s.data.double() if s.data.is_floating_point() else s.data, s.lengths)
        for n, s in collate(utterances(form, 12)).items()
    }
    head.loss(head(batch), torch.arange(12) % NUM_CLASSES)["total"].backward()
    largest = {
        name: p.grad.abs().max() for name, p in head.named_parameters() if p.grad is not None
    }
    unreached = {n for n, _ in head.named_parameters() if n not in largest or largest[n] < 1e-13}
    listed = {n for n in head.inert_parameters if n in dict(head.named_parameters())}
    assert unreached == listed


@every_form
def test_same_seed_same_weights_other_seed_others(form: Form) -> None:
    first, again, other = form.create(3), form.create(3), form.create(4)
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    items = collate(utterances(form))
    assert not torch.equal(first.eval()(items).logits, other.eval()(items).logits)


@every_form
def test_the_order_of_the_streams_does_not_matter(form: Form) -> None:
    backwards = dict(reversed(form.shapes.items()))
    a, b = form.create(), Form(form.head, backwards, form.config).create()
    items = collate(utterances(form))
    torch.testing.assert_close(a.eval()(items).logits, b.eval()(items).logits, atol=0, rtol=0)


@every_form
def test_saved_weights_give_the_same_logits(form: Form) -> None:
    head, items = form.create(0).eval(), collate(utterances(form))
    other = form.create(1).eval()
    other.load_state_dict(load(save(dict(head.state_dict()))))
    assert torch.equal(other(items).logits, head(items).logits)


@every_form
def test_evaluation_is_the_same_with_and_without_gradient(form: Form) -> None:
    head, items = form.create().eval(), collate(utterances(form))
    with torch.no_grad():
        without = head(items).logits
    torch.testing.assert_close(without, head(items).logits, atol=1e-6, rtol=0)


@every_form
def test_single_frames_of_a_single_utterance_pass(form: Form) -> None:
    item = {name: stream[:1] for name, stream in utterances(form, 1)[0].items()}
    head = form.create()
    head.loss(head(collate([item])), torch.tensor([2]))["total"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    assert head.eval()(collate([item], extra=4)).logits.isfinite().all()


@every_form
def test_bfloat16_stays_near_float32(form: Form) -> None:
    head, items = form.create().eval(), collate(utterances(form))
    exact = head(items).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(items).logits.float()
    torch.testing.assert_close(mixed, exact, atol=0.05, rtol=0.05)  # 8 bits of mantissa
    low = {
        n: Ragged(s.data.bfloat16() if s.data.is_floating_point() else s.data, s.lengths)
        for n, s in items.items()
    }
    logits = head.bfloat16()(low).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, atol=0.05, rtol=0.05)


@every_form
def test_learns_eight_utterances_by_heart(form: Form) -> None:
    head = form.create(dropout=0.0)
    batch = collate(utterances(form, 8))
    target = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(150):
        loss = head.loss(head(batch), target)["total"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05
    assert torch.equal(head.eval()(batch).logits.argmax(1), target)


@every_form
def test_a_mean_may_stand_for_the_frames_of_streams_averaged_first(form: Form) -> None:
    head, items = form.create().eval(), utterances(form)
    averaged = [
        {n: s.mean(0, keepdim=True) if n in head.mean_first else s for n, s in item.items()}
        for item in items
    ]
    torch.testing.assert_close(
        head(collate(averaged)).logits, head(collate(items)).logits, atol=1e-6, rtol=0
    )


@every_form
def test_a_batch_without_a_stream_names_it(form: Form) -> None:
    batch = collate(utterances(form))
    name = next(iter(form.shapes))
    del batch[name]
    with pytest.raises(ValueError, match=f"no stream '{name}'"):
        form.create()(batch)


def test_class_weights_and_smoothing_are_those_of_torch() -> None:
    head = FORMS[0].create()
    output = head(collate(utterances(FORMS[0])))
    target, weight = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1.0, 2.0, 0.0, 4.0])
    expected = torch.nn.functional.cross_entropy(
        output.logits, target, weight=weight, label_smoothing=0.1
    )
    assert torch.equal(head.loss(output, target, weight, 0.1)["total"], expected)


@pytest.mark.parametrize("name", names())
def test_a_missing_required_stream_names_it(name: str) -> None:
    required = [n for n, spec in resolve(name).inputs.items() if not spec.optional]
    if not required:
        with pytest.raises(ValueError, match="was given no stream"):
            create(name, {}, {}, 4)
        return
    dims = {n: 8 for n in required[1:]}
    with pytest.raises(ValueError, match=f"Stream '{required[0]}' is missing"):
        create(name, {}, dims, 4)
