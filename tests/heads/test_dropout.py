from __future__ import annotations

import pytest
import torch

from mer.heads.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_dropped_and_mean_are_those_asked_for(p: float) -> None:
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(1_000_001))
    # five standard deviations of a binomial share
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-3)
    assert y.unique().numel() == 2


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_elements_are_dropped_independently_of_their_neighbours(lag: int) -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(1_000_000)) > 0).float() - 0.5
    correlation = 4 * (kept[lag:] * kept[:-lag]).mean().item()
    assert abs(correlation) < 5e-3  # five standard deviations


def test_gradient_is_that_of_the_kept_elements() -> None:
    torch.manual_seed(0)
    x = torch.ones(7, 3, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_evaluation_and_zero_share_change_nothing() -> None:
    x = torch.randn(5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_same_seed_drops_the_same() -> None:
    x = torch.ones(100)
    torch.manual_seed(1)
    first = Dropout(0.5)(x)
    other = Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first)
    assert not torch.equal(other, first)
