"""The MDAT-SER heads against the paper's numbers and, block by block, against its equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mer.heads.contract import Ragged, StreamShape
from mer.heads.mdat_ser import (
    CoAttention,
    CodeEmbedding,
    Encoder,
    GraphAttention,
    SwiGluClassifier,
    VectorAttentivePooling,
)
from mer.heads.registry import create

WHISPER_ROBERTA = {"speech": 1280, "text": 1024}
WITH_F0 = {**WHISPER_ROBERTA, "f0": 256}
LENGTHS = torch.tensor([5, 2, 7])
MASK = torch.arange(7) < LENGTHS[:, None]  # (3, 7)


@pytest.mark.parametrize(
    ("name", "config", "dims", "parameters"),
    [
        ("simple", {"classifier": "relu"}, WHISPER_ROBERTA, 1_974_024),
        ("mdat", {"classifier": "relu"}, WHISPER_ROBERTA, 9_854_728),
        ("mdat", {"classifier": "swiglu"}, WHISPER_ROBERTA, 10_641_928),
        ("mdat", {"classifier": "swiglu"}, WITH_F0, 11_822_600),
        ("mdat", {"classifier": "swiglu", "code_dim": 256}, WITH_F0, 11_625_736),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, config: dict[str, Any], dims: dict[str, int], parameters: int
) -> None:
    head = create(name, config, dims, num_classes=8)
    assert sum(p.numel() for p in head.parameters()) == parameters


def test_graph_attention_is_the_score_of_joined_pairs() -> None:
    torch.manual_seed(0)
    block = GraphAttention(6, slope=0.2).double()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    u, v = block.edge
    out = block(x, MASK)
    for b, length in enumerate(LENGTHS.tolist()):
        h = x[b] @ block.node.weight.T
        for i in range(length):
            scores = torch.stack(
                [torch.cat([u, v]) @ torch.cat([h[i], h[j]]) for j in range(length)]
            )
            alpha = nn.functional.leaky_relu(scores, 0.2).softmax(0)
            expected = sum(alpha[j] * h[j] for j in range(length))
            torch.testing.assert_close(out[b, i], expected, atol=1e-12, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_graph_attention_never_allocates_a_vector_per_pair() -> None:
    block, batch, frames, dim = GraphAttention(32, slope=0.2), 2, 40, 32
    x = torch.randn(batch, frames, dim, requires_grad=True)
    with LargestTensor() as seen:
        block(x, torch.ones(batch, frames, dtype=torch.bool)).sum().backward()
    assert seen.numel == batch * frames * frames


def test_co_attention_follows_its_equations() -> None:
    torch.manual_seed(0)
    block = CoAttention(6).double()
    speech = torch.randn(3, 7, 6, dtype=torch.float64)
    text = torch.randn(3, 4, 6, dtype=torch.float64)
    text_lengths = torch.tensor([4, 1, 3])
    text_mask = torch.arange(4) < text_lengths[:, None]
    to_speech, to_text = block(speech, text, MASK, text_mask)
    for b, (a, t) in enumerate(zip(LENGTHS.tolist(), text_lengths.tolist(), strict=True)):
        g_a, g_t = speech[b, :a], text[b, :t]
        m = (g_a @ block.speech.weight.T) @ (g_t @ block.text.weight.T).T  # unscaled
        torch.testing.assert_close(to_speech[b, :a], m.softmax(1) @ g_t, atol=1e-12, rtol=0)
        torch.testing.assert_close(to_text[b, :t], m.T.softmax(1) @ g_a, atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_encoder_is_the_layer_of_torch(training: bool) -> None:
    torch.manual_seed(0)
    ours = Encoder(16, num_heads=4, feedforward=64, dropout=0.0).double().train(training)
    theirs = nn.TransformerEncoderLayer(16, 4, 64, 0.0, batch_first=True).double().train(training)
    theirs.load_state_dict(
        {
            "self_attn.in_proj_weight": ours.query_key_value.weight,
            "self_attn.in_proj_bias": ours.query_key_value.bias,
            "self_attn.out_proj.weight": ours.out.weight,
            "self_attn.out_proj.bias": ours.out.bias,
            "linear1.weight": ours.inner.weight,
            "linear1.bias": ours.inner.bias,
            "linear2.weight": ours.outer.weight,
            "linear2.bias": ours.outer.bias,
            "norm1.weight": ours.norm_attention.weight,
            "norm1.bias": ours.norm_attention.bias,
            "norm2.weight": ours.norm_feedforward.weight,
            "norm2.bias": ours.norm_feedforward.bias,
        }
    )
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    expected = theirs(x, src_key_padding_mask=~MASK)
    torch.testing.assert_close(ours(x, MASK)[MASK], expected[MASK], atol=1e-12, rtol=0)


def test_attentive_pooling_weighs_every_channel_over_time() -> None:
    torch.manual_seed(0)
    block = VectorAttentivePooling(6).double()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    pooled = block(x, MASK)
    for b, length in enumerate(LENGTHS.tolist()):
        real = x[b, :length]
        expected = (block.score(real).softmax(0) * real).sum(0)
        torch.testing.assert_close(pooled[b], expected, atol=1e-12, rtol=0)


def test_swiglu_follows_its_equation() -> None:
    torch.manual_seed(0)
    block = SwiGluClassifier(5, 6, 3, dropout=0.5).double().eval()
    x = torch.randn(2, 5, dtype=torch.float64)
    gate = x @ block.gate.weight.T + block.gate.bias
    inner = gate * torch.sigmoid(gate) * (x @ block.value.weight.T + block.value.bias)
    expected = inner @ block.out.weight.T + block.out.bias
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)


def test_padding_of_codes_reads_the_last_row_whatever_stands_there() -> None:
    block = CodeEmbedding(257, 4)
    vectors = block(torch.tensor([[3, 999, -1]]), torch.tensor([[True, False, False]]))
    assert torch.equal(vectors[0], block.table.weight[[3, 256, 256]])


def batch(dims: dict[str, int], extra: int) -> dict[str, Ragged]:
    """Return two utterances of 6 and 4 frames, padded by ``extra`` more frames than needed."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 4])
    made = {}
    for name, dim in dims.items():
        real = torch.arange(6 + extra) < lengths[:, None]
        if name == "f0":
            data = torch.zeros(2, 6 + extra, dtype=torch.int64)
            data[real] = torch.randint(1, 256, (10,), generator=draw)
        else:
            data = torch.full((2, 6 + extra, dim), 7.0)
            data[real] = torch.randn(10, dim, generator=draw)
        made[name] = Ragged(data, lengths)
    return made


def zero_extended(streams: dict[str, Ragged]) -> dict[str, Ragged]:
    """Return the batch with its padding made real: zero frames, and code 256."""
    made = {}
    for name, stream in streams.items():
        real = stream.mask if name == "f0" else stream.mask[..., None]
        data = stream.data.masked_fill(~real, 256 if name == "f0" else 0)
        made[name] = Ragged(data, torch.full((2,), data.shape[1]))
    return made


@pytest.mark.parametrize("name", ["simple", "mdat"])
@pytest.mark.parametrize("off", [{"mask": False}, {"parity": True}], ids=str)
def test_without_masks_padding_counts_as_zero_frames(name: str, off: dict[str, bool]) -> None:
    dims = {"speech": 6, "text": 5, "f0": 256}
    shapes = {n: StreamShape(d, "codes" if n == "f0" else "frames") for n, d in dims.items()}
    small = {"width": 16, "hidden": 8}
    torch.manual_seed(0)
    masked = create(name, small, shapes, 4).eval()
    unmasked = create(name, small | off, shapes, 4).eval()
    unmasked.load_state_dict(masked.state_dict())
    streams = batch(dims, extra=5)
    assert masked.masked
    assert not unmasked.masked
    assert not unmasked.mean_first
    padded = unmasked(streams).logits
    torch.testing.assert_close(padded, masked(zero_extended(streams)).logits, atol=1e-6, rtol=0)
    assert (padded - masked(streams).logits).abs().max() > 1e-4


def test_statistics_pooling_appends_the_standard_deviation() -> None:
    head = create("simple", {"width": 8, "hidden": 8, "pooling": "mean_std"}, {"speech": 3}, 2)
    assert head.project["speech"][0].in_features == 6  # type: ignore[index, union-attr]
    assert not head.mean_first


@pytest.mark.parametrize(
    ("name", "dims", "message"),
    [
        ("mdat", {"speech": 4}, "Stream 'text' is missing"),
        ("mdat", {"speech": 4, "text": 4, "video": 4}, "Unknown stream 'video'. Mdat reads"),
        ("mdat", {"speech": StreamShape(9, "codes"), "text": 4}, "takes frames, given codes"),
        ("mdat", {"speech": 4, "text": 4, "f0": 300}, "300 codes, Mdat takes at most 257"),
        ("mdat", {"speech": 0, "text": 4}, "'speech' has width 0"),
        ("simple", {"my stream": 4}, "'my stream' is not an identifier"),
    ],
)
def test_unfit_streams_are_refused_by_name(name: str, dims: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, {}, dims, 4)
