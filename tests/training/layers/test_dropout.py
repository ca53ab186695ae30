"""Dropout has the distribution and the gradient of `nn.Dropout`, on a CPU too."""

import pytest
import torch

from ttt_harness.training.layers.dropout import dropout_gradient, dropout_with_mask


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def dropped(shape, p):
    """1 where dropout with probability `p` drops an element."""
    return (dropout_with_mask(torch.ones(shape), p)[0] == 0).float()


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_elements_are_dropped_with_probability_p_and_the_mean_is_kept(p):
    x = torch.randn(1000, 1000)
    out, _, factor = dropout_with_mask(x, p)
    gone = out == 0
    assert torch.equal(out[~gone], x[~gone])
    # Within five standard deviations of a binomial count.
    assert gone.float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
    assert factor == pytest.approx(1 / (1 - p))


def test_every_place_is_as_likely():
    shares = torch.stack([dropped(20, 0.3) for _ in range(4000)]).mean(0)
    assert (shares - 0.3).abs().max() < 5 * (0.3 * 0.7 / 4000) ** 0.5


def test_masks_of_neighbours_rows_and_calls_are_independent():
    first, second = (dropped((512, 512), 0.5) for _ in range(2))
    for one, other in [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, second)]:
        assert (one * other).mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_gradient_passes_through_what_was_kept():
    x = torch.randn(40, 30, dtype=torch.float64)
    out, mask, _ = dropout_with_mask(x, 0.3)
    torch.testing.assert_close(dropout_gradient(torch.ones_like(x), mask, 0.3), out / x)


def test_masks_follow_torchs_seed():
    torch.manual_seed(5)
    first, other = dropped(100, 0.5), dropped(100, 0.5)
    torch.manual_seed(5)
    assert torch.equal(first, dropped(100, 0.5))
    assert not torch.equal(first, other)
