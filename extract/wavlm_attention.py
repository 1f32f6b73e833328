"""WavLM's gated relative-position attention by a fused kernel.

transformers runs WavLM through a function that materialises and averages the attention weights of
every block, only to drop them. The same softmax with the same additive bias through
``scaled_dot_product_attention`` differs by float32 rounding (about 3e-6) and needs a quarter less
time.

B clips, T frames, D width, H heads.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

_UPSTREAM = "torch_multi_head_self_attention"


def use_fused_attention(model: nn.Module) -> int:
    """Replace the attention product in every WavLM block of ``model``; return in how many.

    Blocks of a release that arranges its attention in another way are left as they are: slower, and
    right.
    """
    replaced = 0
    for module in model.modules():
        if hasattr(module, _UPSTREAM) and hasattr(module, "q_proj"):
            setattr(module, _UPSTREAM, MethodType(_attend, module))
            replaced += 1
    return replaced


def _attend(
    self: Any, hidden_BTD: Tensor, mask_BT: Tensor | None, bias: Tensor
) -> tuple[Tensor, None]:
    """Return attended states (B, T, D); ``bias`` is gated (B·H, T, T), the mask true where real."""
    B, T, D = hidden_BTD.shape
    bias = bias.view(B, self.num_heads, T, T)
    if mask_BT is not None:
        bias = bias.masked_fill(mask_BT[:, None, None].ne(1), -math.inf)

    def heads(projection: nn.Linear) -> Tensor:
        states_BTD: Tensor = projection(hidden_BTD)
        return states_BTD.view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, H, T, D/H)

    attended = F.scaled_dot_product_attention(
        heads(self.q_proj), heads(self.k_proj), heads(self.v_proj), attn_mask=bias
    )
    out_BTD: Tensor = self.out_proj(attended.transpose(1, 2).reshape(B, T, D))
    return out_BTD, None
