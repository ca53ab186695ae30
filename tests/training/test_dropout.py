"""Dropout has the distribution and the gradient of `nn.Dropout`, on a CPU too."""

import pytest
import torch

from ttt_harness.training.dropout import dropout_with_mask, undo_dropout


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_elements_are_dropped_with_probability_p_and_the_mean_is_kept(p):
    out, kept = dropout_with_mask(torch.ones(1000, 1000), p)
    assert torch.equal(kept, out != 0)
    # Within five standard deviations of a binomial count.
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - p)), rtol=1e-4)


def test_masks_of_neighbours_rows_and_calls_are_independent():
    first, second = (~dropout_with_mask(torch.ones(512, 512), 0.5)[1] for _ in range(2))
    for one, other in [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, second)]:
        assert (one & other).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_gradient_passes_through_what_was_kept():
    x = torch.randn(40, 30, dtype=torch.float64)
    out, kept = dropout_with_mask(x, 0.3)
    torch.testing.assert_close(undo_dropout(torch.ones_like(x), kept, 0.3), out / x)


def test_masks_follow_torchs_seed():
    def mask():
        return dropout_with_mask(torch.ones(100), 0.5)[1]

    torch.manual_seed(5)
    first, other = mask(), mask()
    torch.manual_seed(5)
    assert torch.equal(first, mask())
    assert not torch.equal(first, other)
