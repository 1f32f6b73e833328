"""Cutting inputs beyond a model's limit into overlapping windows, and joining their frames again.

Every output frame is taken from exactly one window; in an overlap the earlier window gives the
first half, the later one the second, so that each frame is seen with context on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mer.extract.contract import WindowRule


@dataclass(frozen=True, slots=True)
class Window:
    """Steps ``start:stop`` of an input; of their frames, ``keep_from:keep_to`` are taken."""

    start: int
    stop: int
    keep_from: int
    keep_to: int


def cut(num_steps: int, rule: WindowRule | None, num_frames: Callable[[int], int]) -> list[Window]:
    """Plan the windows over an input of ``num_steps``.

    Parameters
    ----------
    num_frames : callable
        Frames that an input of so many steps yields.

    Returns
    -------
    list of Window
        One for the whole input where the rule is None or the input fits. The kept frames add up to
        ``num_frames(num_steps)``.
    """
    if rule is None or num_steps <= rule.size:
        return [Window(0, num_steps, 0, num_frames(num_steps))]
    stride = rule.size - rule.overlap
    if stride <= 0 or stride % rule.hop:
        raise ValueError(f"a window must advance by a positive multiple of its hop, got {rule}")
    starts = list(range(0, num_steps - rule.size, stride))
    last = (
        -(-(num_steps - rule.size) // rule.hop) * rule.hop
    )  # rounded up, so that it never exceeds the size
    if not starts or last > starts[-1]:
        starts.append(last)
    stops = [*(start + rule.size for start in starts[:-1]), num_steps]
    first = [start // rule.hop for start in starts]
    beyond = [
        f + num_frames(stop - start) for f, start, stop in zip(first, starts, stops, strict=True)
    ]
    cuts = [
        0,
        *((a + b) // 2 for a, b in zip(first[1:], beyond[:-1], strict=True)),
        num_frames(num_steps),
    ]
    return [
        Window(start, stop, cuts[i] - first[i], cuts[i + 1] - first[i])
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]
