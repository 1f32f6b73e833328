"""Group norm over time that sees only the real frames of each clip.

B clips, C channels, T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MaskedGroupNorm(nn.Module):
    """Drop-in for an ``nn.GroupNorm`` over (B, C, T) whose statistics leave the padding out.

    The first convolution of wav2vec2-type base models is followed by a norm over all of time; in a
    padded batch its mean and variance would depend on the padding (features off by more than two
    standard deviations). Each clip is normalised by the very call upstream makes for it alone, so
    the values are upstream's.

    Parameters
    ----------
    norm : GroupNorm
        The norm to replace; its parameters are shared.

    Attributes
    ----------
    lengths : list of int
        Real frames of each clip; set before every forward pass.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm
        self.lengths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, T); frames beyond a clip's length become zero."""
        if len(self.lengths) != len(x):
            raise ValueError(f"{len(x)} clips in the batch, but lengths of {len(self.lengths)}")
        norm = self.norm
        out = torch.zeros_like(x)
        for row, (clip, length) in enumerate(zip(x, self.lengths, strict=True)):
            real = clip[None, :, :length]
            out[row, :, :length] = F.group_norm(
                real, norm.num_groups, norm.weight, norm.bias, norm.eps
            )[0]
        return out
