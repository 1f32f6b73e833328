"""Layers of an encoder, named once and for all, and taken by our own hooks.

Layer 0 is the input of the first block, layer i the output of block i, ``final`` what the model
returns after its last norm. transformers renumbered its ``output_hidden_states`` lists between
releases and moved the last entry across the final norm; forward hooks on the blocks mean the same
in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mer.cache.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

FINAL = "final"


def layer_name(index: int) -> str:
    """Return the output name of layer ``index``."""
    return f"layer_{index}"


def parse_layers(text: str, num_layers: int) -> tuple[str, ...]:
    """Return the output names that a ``layers=`` option selects, lowest first, ``final`` last.

    Parameters
    ----------
    text : str
        ``final``, ``all`` (0 to L and final), or a list such as ``6,9,12`` or ``0,12,final``.
    num_layers : int
        L, the model's number of blocks.

    Raises
    ------
    UsageError
        Not a layer, or one that the model does not have.

    Examples
    --------
    >>> parse_layers("9,6,final", 12)
    ('layer_6', 'layer_9', 'final')
    """
    if text.strip() == "all":
        return (*map(layer_name, range(num_layers + 1)), FINAL)
    numbers, final = set(), False
    for piece in text.split(","):
        item = piece.strip().removeprefix("layer_")
        if item == FINAL:
            final = True
        elif not (item.isascii() and item.isdigit()):
            raise UsageError(
                f"layers={text}: {piece.strip()!r} is not a layer. Expected 'final', 'all' or "
                "numbers from 0 to "
                f"{num_layers}, e.g. layers={num_layers // 2},{num_layers}."
            )
        elif int(item) > num_layers:
            raise UsageError(
                f"layers={text}: the model has layers 0 to {num_layers}, there is no layer {item}."
            )
        else:
            numbers.add(int(item))
    return (*map(layer_name, sorted(numbers)), *([FINAL] if final else []))


def layers_tag(names: Sequence[str], num_layers: int) -> str:
    """Return a short form for a store's name: ``final``, ``all``, ``L6-9-12``, ``17-layers``."""
    if len(names) == num_layers + 2:
        return "all"
    numbers = [name.removeprefix("layer_") for name in names if name != FINAL]
    if len(numbers) > 4:
        return f"{len(names)}-layers"
    tag = "L" + "-".join(numbers) if numbers else ""
    return "-".join(part for part in (tag, FINAL if FINAL in names else "") if part)


def blocks_needed(names: Sequence[str], num_layers: int) -> int:
    """Return how many blocks must run: all for ``final``, else up to the highest layer.

    Layer k does not depend on the blocks after it, so a model cut there yields it bit for bit.
    """
    if FINAL in names:
        return num_layers
    return max(1, *(int(name.removeprefix("layer_")) for name in names))


class LayerTap:
    """Context that collects chosen layers of one forward pass.

    Parameters
    ----------
    blocks : sequence of Module
        The encoder's blocks in order; each takes hidden states (B, T, D) first and returns them
        (first).
    names : sequence of str
        From `parse_layers`; ``final`` is the caller's to add.

    Examples
    --------
    ::

        with LayerTap(model.encoder.layers, ("layer_0", "layer_6")) as taken:
            model(x)
        taken["layer_6"]  # (B, T, D)
    """

    def __init__(self, blocks: Sequence[nn.Module], names: Sequence[str]) -> None:
        self.blocks = blocks
        self.indices = [int(name.removeprefix("layer_")) for name in names if name != FINAL]
        self.taken: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> dict[str, Tensor]:
        for index in self.indices:
            if index == 0:
                hook = self.blocks[0].register_forward_pre_hook(self._take_input, with_kwargs=True)
            else:
                hook = self.blocks[index - 1].register_forward_hook(self._taker(layer_name(index)))
            self._handles.append(hook)
        return self.taken

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _take_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.taken[layer_name(0)] = args[0] if args else kwargs["hidden_states"]

    def _taker(self, name: str) -> Any:
        def take(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self.taken[name] = output[0] if isinstance(output, tuple) else output

        return take
