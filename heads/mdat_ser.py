"""MDAT-SER (arXiv 2506.02088, Interspeech 2025): the heads ``simple`` and ``mdat``.

B utterances, T frames of a stream (Ta of speech, Tt of text), D width of a stream, d model width, C
classes. "Code" in a docstring is the authors' released code, "ours" a choice where both it and the
paper are silent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mer.heads.contract import Dims, Head, HeadOutput, InputSpec, Ragged, stream_shapes, take
from mer.heads.dropout import Dropout

# ---------------------------------------------------------------------------------------- blocks


class Projection(nn.Sequential):
    """P(x) = Dropout(ReLU(Wx + b)), from any width to d (code)."""

    def __init__(self, dim_in: int, dim: int, dropout: float) -> None:
        super().__init__(nn.Linear(dim_in, dim), nn.ReLU(), Dropout(dropout))


class GraphAttention(nn.Module):
    """One graph-attention layer, one head, over the complete graph of the frames of one stream.

    ``h = xW``, ``e_ij = LeakyReLU(u·h_i + v·h_j)``, ``out_i = Σ_j softmax_j(e_ij) h_j``: no
    residual, no norm, no dropout. The score is written with u and v apart, which allocates B·T²
    floats; joining h_i and h_j first would allocate B·T²·2d.

    With its initial weights it hands nearly the same vector, the mean, to every frame: until the
    scores have grown, hardly any gradient reaches co-attention and attentive pooling.

    Parameters
    ----------
    dim : int
        Model width d.
    slope : float
        Of the LeakyReLU.
    """

    def __init__(self, dim: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.node = nn.Linear(dim, dim, bias=False)
        self.edge = nn.Parameter(torch.empty(2, dim))  # u, v
        bound = 1 / math.sqrt(2 * dim)  # of a Linear(2d, 1), which u and v are the halves of
        nn.init.uniform_(self.edge, -bound, bound)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (B, T, d) for ``x`` (B, T, d) and ``mask`` (B, T)."""
        h = self.node(x)
        receiver, sender = (h @ self.edge.T).unbind(-1)  # (B, T) each: u·h_i and v·h_j
        # masked before the LeakyReLU, which keeps -inf: (B, T) to fill instead of (B, T, T)
        sender = sender.masked_fill(~mask, -math.inf)
        scores = receiver[:, :, None] + sender[:, None, :]  # (B, T, T)
        scores = F.leaky_relu(scores, self.slope, inplace=True)
        out: Tensor = scores.softmax(-1) @ h
        return out


class CoAttention(nn.Module):
    """Each stream gathers from the other by one affinity matrix, single-headed, unscaled (code).

    ``M = (g_a W_1)(g_t W_2)ᵀ``; the values are the inputs themselves.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.speech = nn.Linear(dim, dim, bias=False)
        self.text = nn.Linear(dim, dim, bias=False)

    def forward(
        self, speech: Tensor, text: Tensor, speech_mask: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what speech gathers from text (B, Ta, d) and text from speech (B, Tt, d)."""
        affinity = self.speech(speech) @ self.text(text).transpose(1, 2)  # (B, Ta, Tt)
        to_text = affinity.masked_fill(~text_mask[:, None], -math.inf).softmax(-1)
        to_speech = affinity.mT.masked_fill(~speech_mask[:, None], -math.inf).softmax(-1)
        return to_text @ text, to_speech @ speech


class Encoder(nn.Module):
    """TE_H: one encoder layer with H heads, post-norm, ReLU, without positions.

    In values and initial weights that of ``torch.nn.TransformerEncoderLayer``, which the code uses.

    Parameters
    ----------
    dim : int
        Model width d.
    num_heads : int
        H, a divisor of d.
    feedforward : int
        Width between the two last linear maps.
    dropout : float
        On attention weights, within the feed-forward part and on both residual branches.
    """

    def __init__(self, dim: int, num_heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.inner = nn.Linear(dim, feedforward)
        self.outer = nn.Linear(feedforward, dim)
        self.norm_attention = nn.LayerNorm(dim)
        self.norm_feedforward = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.query_key_value.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (B, T, d) for ``x`` (B, T, d) and ``mask`` (B, T)."""
        x = self.norm_attention(x + self.dropout(self.out(self._attend(x, mask))))
        inner = self.dropout(self.inner(x).relu())
        out: Tensor = self.norm_feedforward(x + self.dropout(self.outer(inner)))
        return out

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        split = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # (B, H, T, d/H) each
        visible = mask[:, None, None]  # (B, 1, 1, T)
        if self.training and x.device.type == "cpu":  # for the sake of our dropout
            scores = q / math.sqrt(q.shape[-1]) @ k.mT  # (B, H, T, T), filled in place: it is large
            weights = scores.masked_fill_(~visible, -math.inf).softmax(-1)
            attended = self.dropout(weights) @ v
        else:
            p = self.dropout.p if self.training else 0.0
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=p)
        joined: Tensor = attended.transpose(1, 2).flatten(2)
        return joined


class VectorAttentivePooling(nn.Module):
    """VP(x) = Σ_t w_t ⊙ x_t; w is the softmax over time, per channel, of a linear map of x.

    The bias of the map is the same at every t and so cancels in the softmax: its gradient is zero.
    It is there because the authors' code has it (checkpoints, parameter counts).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (B, d) for ``x`` (B, T, d) and ``mask`` (B, T)."""
        scores = self.score(x).masked_fill(~mask[..., None], -math.inf)
        pooled: Tensor = (scores.softmax(1) * x).sum(1)
        return pooled


class CodeEmbedding(nn.Module):
    """Integers to vectors; the last row, the padding's, is trained like any other (code)."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_rows, dim)

    def forward(self, codes: Tensor, real: Tensor) -> Tensor:
        """Return (B, T, D) for ``codes`` (B, T), with the padding's row where ``real`` is False."""
        vectors: Tensor = self.table(codes.masked_fill(~real, self.table.num_embeddings - 1))
        return vectors


class SwiGluClassifier(nn.Module):
    """W_2·Dropout(Swish(Wx + b) ⊙ (Vx + c)) + b_2."""

    def __init__(self, dim_in: int, hidden: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(dim_in, hidden)
        self.value = nn.Linear(dim_in, hidden)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C) for ``x`` (B, D)."""
        logits: Tensor = self.out(self.dropout(F.silu(self.gate(x)) * self.value(x)))
        return logits


class ReluClassifier(nn.Sequential):
    """Linear, ReLU, Dropout, Linear; Kaiming-uniform weights and zero biases (code)."""

    def __init__(self, dim_in: int, hidden: int, num_classes: int, dropout: float) -> None:
        inner, outer = nn.Linear(dim_in, hidden), nn.Linear(hidden, num_classes)
        super().__init__(inner, nn.ReLU(), Dropout(dropout), outer)
        for layer in (inner, outer):
            nn.init.kaiming_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


Classifier = Literal["swiglu", "relu"]
CLASSIFIERS: Mapping[str, type[SwiGluClassifier | ReluClassifier]] = {
    "swiglu": SwiGluClassifier,
    "relu": ReluClassifier,
}


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over real frames, (B, D), of ``x`` (B, T, D), finite in the padding too."""
    weight = mask.to(x.dtype)
    return (weight[:, None] @ x).squeeze(1) / weight.sum(1, keepdim=True)


def masked_std(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    """Return the population standard deviation over real frames, (B, D)."""
    variance = masked_mean((x - mean[:, None]).square(), mask)
    return variance.clamp_min(
        1e-8
    ).sqrt()  # the root has no gradient at 0, where T = 1 would put it


def cleared(stream: Ragged) -> Tensor:
    """Return the frames with zeros in the padding, where even NaN may have stood."""
    return stream.data.masked_fill(~stream.mask[..., None], 0)


def attention_mask(stream: Ragged, masked: bool) -> Tensor:
    """Return the mask for softmaxes and means: all True if padding takes part (parity)."""
    return stream.mask if masked else torch.ones_like(stream.mask)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1. Got {value}.")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1. Got {value}.")


# ---------------------------------------------------------------------------------------- simple


@dataclass(frozen=True, slots=True, kw_only=True)
class SimpleConfig:
    """Numbers of ``simple``.

    Parameters
    ----------
    width : int, default=512
        Projection d (paper §3.3, code).
    hidden : int, default=768
        Hidden units of the classifier (code).
    dropout : float, default=0.5
        In projections and classifier (code).
    classifier : {"swiglu", "relu"}, default="swiglu"
        SwiGLU is the better row of table 3.
    pooling : {"mean", "mean_std"}, default="mean"
        Mean over time (paper). ``mean_std`` appends the standard deviation over time (ours).
    code_dim : int, default=512
        Embedding width of code streams (code; paper 256).
    mask : bool, default=True
        False: zero padding takes part in means, as in the authors' code.
    parity : bool, default=False
        Follow the authors' code to the bit where the defaults do not: implies ``mask=False``.
    """

    width: int = 512
    hidden: int = 768
    dropout: float = 0.5
    classifier: Classifier = "swiglu"
    pooling: Literal["mean", "mean_std"] = "mean"
    code_dim: int = 512
    mask: bool = True
    parity: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "code_dim"):
            _check_positive(name, getattr(self, name))
        _check_share("dropout", self.dropout)


class Simple(Head):
    """Mean over time, projection, concatenation, MLP (paper §3.3, table 3 "Simple").

    Any streams, of any names: frames are averaged first and projected then; codes are embedded and
    projected first, as the F0 branch of the paper is (for codes in this head paper and code leave
    the order open). One stream is enough.

    Parameters
    ----------
    config : SimpleConfig
        Numbers.
    dims : mapping of str to int or StreamShape
        Streams given. Codes must be declared as such by a ``StreamShape``.
    num_classes : int
        C.
    """

    Config = SimpleConfig
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "speech": InputSpec(kind="any", optional=True),
        "text": InputSpec(kind="any", optional=True),
        "f0": InputSpec(kind="any", optional=True),
    }
    open_inputs = True

    def __init__(self, config: SimpleConfig, dims: Dims, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.shapes = stream_shapes(type(self), dims)
        self.masked = config.mask and not config.parity
        frames = {name for name, shape in self.shapes.items() if shape.kind == "frames"}
        if config.pooling == "mean" and self.masked:
            self.mean_first = frozenset(frames)
        widths = {n: config.code_dim if n not in frames else s.dim for n, s in self.shapes.items()}
        twice = 2 if config.pooling == "mean_std" else 1
        self.embed = nn.ModuleDict(
            {
                name: CodeEmbedding(shape.dim + 1, config.code_dim)
                for name, shape in self.shapes.items()
                if name not in frames
            }
        )
        self.project = nn.ModuleDict(
            {
                name: Projection(
                    width * (twice if name in frames else 1), config.width, config.dropout
                )
                for name, width in widths.items()
            }
        )
        joint = sum(config.width * (1 if name in frames else twice) for name in self.shapes)
        self.classify = CLASSIFIERS[config.classifier](
            joint, config.hidden, num_classes, config.dropout
        )

    def forward(self, streams: Mapping[str, Ragged]) -> HeadOutput:
        """Return logits (B, C); ``aux["joint"]`` is what the classifier sees."""
        parts = []
        for name, shape in self.shapes.items():
            stream = take(streams, name)
            mask = attention_mask(stream, self.masked)
            if shape.kind == "frames":
                parts.append(self.project[name](self._pool(cleared(stream), mask)))
            else:
                codes = self.embed[name](stream.data, stream.mask)
                parts.append(self._pool(self.project[name](codes), mask))
        joint = torch.cat(parts, -1)
        return HeadOutput(self.classify(joint), {"joint": joint})

    def _pool(self, x: Tensor, mask: Tensor) -> Tensor:
        mean = masked_mean(x, mask)
        if self.config.pooling == "mean":
            return mean
        return torch.cat([mean, masked_std(x, mask, mean)], -1)


# ------------------------------------------------------------------------------------------ mdat


@dataclass(frozen=True, slots=True, kw_only=True)
class MdatConfig:
    """Numbers of ``mdat`` and the switches of its ablations.

    Parameters
    ----------
    width : int, default=512
        Model width d (paper §3.3, code).
    num_heads : int, default=8
        Of the two encoder layers (paper "eight heads"; the code has them there and nowhere else).
    feedforward : int, default=4
        Hidden width of the encoder layers in multiples of d (code).
    gat_slope : float, default=0.2
        LeakyReLU of the graph attention (code).
    hidden : int, default=768
        Hidden units of the classifier (code).
    dropout : float, default=0.5
        In projections, encoder layers and classifier (code); none in graph attention and
        co-attention (code).
    classifier : {"swiglu", "relu"}, default="swiglu"
        SwiGLU is the last row of table 3.
    code_dim : int, default=512
        Embedding width of the F0 codes (code; paper 256).
    graph_attention : bool, default=True
        False: the projections go on as they are.
    co_attention : bool, default=True
        False: the streams meet only in the concatenation.
    encoder : bool, default=True
        False: no encoder layers.
    pooling : {"attentive", "mean"}, default="attentive"
        Vector attentive pooling, or the mean over time.
    mask : bool, default=True
        False: padding attends and pools, as in the authors' code.
    parity : bool, default=False
        Follow the authors' code to the bit where the defaults do not: implies ``mask=False``.
    """

    width: int = 512
    num_heads: int = 8
    feedforward: int = 4
    gat_slope: float = 0.2
    hidden: int = 768
    dropout: float = 0.5
    classifier: Classifier = "swiglu"
    code_dim: int = 512
    graph_attention: bool = True
    co_attention: bool = True
    encoder: bool = True
    pooling: Literal["attentive", "mean"] = "attentive"
    mask: bool = True
    parity: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "num_heads", "feedforward", "hidden", "code_dim"):
            _check_positive(name, getattr(self, name))
        _check_share("dropout", self.dropout)
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads. Got {self.width} and {self.num_heads}."
            )


class Branch(nn.Module):
    """What ``mdat`` does within one stream: project and relate, later encode and pool."""

    def __init__(self, config: MdatConfig, dim_in: int) -> None:
        super().__init__()
        d = config.width
        self.project = Projection(dim_in, d, config.dropout)
        self.graph = GraphAttention(d, config.gat_slope) if config.graph_attention else None
        self.encode = (
            Encoder(d, config.num_heads, config.feedforward * d, config.dropout)
            if config.encoder
            else None
        )
        self.pool = VectorAttentivePooling(d) if config.pooling == "attentive" else None

    def relate(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return g = GAT(P(x)), (B, T, d), for ``x`` (B, T, D)."""
        x = self.project(x)
        if self.graph is None:
            return x
        related: Tensor = self.graph(x, mask)
        return related

    def summarise(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return VP(TE(x)), (B, d), for ``x`` (B, T, d)."""
        if self.encode is not None:
            x = self.encode(x, mask)
        return masked_mean(x, mask) if self.pool is None else self.pool(x, mask)


class Mdat(Head):
    """Graph attention within streams, co-attention between, encoder, pooling, MLP (paper §3.3).

    ``g_a = GAT(P(A))``, ``g_t = GAT(P(T))``; ``c_a, c_t = CoAttention(g_a, g_t)``; ``a =
    VP(TE_8(g_a + c_a))``, ``t = VP(TE_8(g_t + c_t))``; with F0 codes k, ``f = mean_t P(Emb(k))``;
    logits from ``[a; t; f]``. There is no positional encoding anywhere (code).

    Parameters
    ----------
    config : MdatConfig
        Numbers and switches.
    dims : mapping of str to int or StreamShape
        ``speech`` and ``text`` frames, and codes ``f0`` if the branch is wanted.
    num_classes : int
        C.
    """

    Config = MdatConfig
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "speech": InputSpec(),
        "text": InputSpec(),
        "f0": InputSpec(kind="codes", num_codes=257, optional=True),
    }
    inert_parameters = ("speech.pool.score.bias", "text.pool.score.bias")

    def __init__(self, config: MdatConfig, dims: Dims, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.shapes = stream_shapes(type(self), dims)
        self.masked = config.mask and not config.parity
        self.speech = Branch(config, self.shapes["speech"].dim)
        self.text = Branch(config, self.shapes["text"].dim)
        self.co_attention = CoAttention(config.width) if config.co_attention else None
        self.with_f0 = "f0" in self.shapes
        if self.with_f0:
            rows = self.inputs["f0"].num_codes
            assert rows is not None
            self.f0_embed = CodeEmbedding(rows, config.code_dim)
            self.f0_project = Projection(config.code_dim, config.width, config.dropout)
        self.classify = CLASSIFIERS[config.classifier](
            config.width * len(self.shapes), config.hidden, num_classes, config.dropout
        )

    def forward(self, streams: Mapping[str, Ragged]) -> HeadOutput:
        """Return logits (B, C); ``aux["joint"]`` is what the classifier sees."""
        speech, text = take(streams, "speech"), take(streams, "text")
        a_mask, t_mask = attention_mask(speech, self.masked), attention_mask(text, self.masked)
        g_a = self.speech.relate(cleared(speech), a_mask)  # (B, Ta, d)
        g_t = self.text.relate(cleared(text), t_mask)  # (B, Tt, d)
        z_a, z_t = g_a, g_t
        if self.co_attention is not None:
            c_a, c_t = self.co_attention(g_a, g_t, a_mask, t_mask)
            z_a, z_t = g_a + c_a, g_t + c_t
        parts = [self.speech.summarise(z_a, a_mask), self.text.summarise(z_t, t_mask)]
        if self.with_f0:
            f0 = take(streams, "f0")
            codes = self.f0_project(self.f0_embed(f0.data, f0.mask))  # (B, Tf, d)
            parts.append(masked_mean(codes, attention_mask(f0, self.masked)))
        joint = torch.cat(parts, -1)
        return HeadOutput(self.classify(joint), {"joint": joint})
