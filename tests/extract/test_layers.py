"""Layer names, what they select, and hooks that take them."""

from __future__ import annotations

import pytest

from mer.cache.errors import UsageError
from mer.extract.layers import LayerTap, blocks_needed, layers_tag, parse_layers


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("final", ("final",)),
        ("all", ("layer_0", "layer_1", "layer_2", "final")),
        ("2,0", ("layer_0", "layer_2")),
        ("final, 1,1", ("layer_1", "final")),
        ("layer_2", ("layer_2",)),
    ],
)
def test_layers_option_selects_lowest_first(text: str, names: tuple[str, ...]) -> None:
    assert parse_layers(text, 2) == names


@pytest.mark.parametrize("text", ["-1", "last", "1,,2", "", "1.5", "²"])
def test_what_is_no_layer_is_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match="is not a layer. Expected 'final', 'all' or numbers from 0 to 12"
    ):
        parse_layers(text, 12)


def test_a_layer_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="layers 0 to 12, there is no layer 13"):
        parse_layers("6,13", 12)


@pytest.mark.parametrize(
    ("text", "tag", "blocks"),
    [
        ("final", "final", 12),
        ("all", "all", 12),
        ("6,9,12", "L6-9-12", 12),
        ("9,final", "L9-final", 12),
        ("0,1,2,3,4", "5-layers", 4),
        ("0", "L0", 1),
    ],
)
def test_tag_and_blocks_follow_from_the_names(text: str, tag: str, blocks: int) -> None:
    names = parse_layers(text, 12)
    assert (layers_tag(names, 12), blocks_needed(names, 12)) == (tag, blocks)


def test_tap_takes_block_inputs_and_outputs_and_leaves_no_hook() -> None:
    import torch
    from torch import nn

    class Block(nn.Module):
        """Adds a constant; answers with a tuple, as attention blocks may."""

        def __init__(self, step: float) -> None:
            super().__init__()
            self.step = step

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
            return hidden_states + self.step, None

    blocks = nn.ModuleList([Block(1.0), Block(10.0)])
    x = torch.zeros(1, 2, 3)
    with LayerTap(blocks, ("layer_0", "layer_1", "layer_2", "final")) as taken:
        blocks[1](hidden_states=blocks[0](hidden_states=x)[0])
    assert {name: values.max().item() for name, values in taken.items()} == {
        "layer_0": 0.0,
        "layer_1": 1.0,
        "layer_2": 11.0,
    }
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)
