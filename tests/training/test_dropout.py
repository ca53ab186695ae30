"""The CPU's dropout has the distribution and the gradient of `nn.Dropout`."""

import pytest
import torch

from ttt_harness.training.dropout import CPUDropout


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_elements_are_dropped_with_probability_p_and_the_mean_is_kept(p):
    out = CPUDropout(p)(torch.ones(1000, 1000))
    # Within five standard deviations of a binomial count.
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - p)), rtol=1e-4)


def test_masks_of_neighbours_rows_and_calls_are_independent():
    dropout = CPUDropout(0.5)
    first, second = (dropout(torch.ones(512, 512)) == 0 for _ in range(2))
    for one, other in [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, second)]:
        assert (one & other).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_gradient_passes_through_what_was_kept():
    x = torch.randn(40, 30, dtype=torch.float64, requires_grad=True)
    out = CPUDropout(0.3)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out / x).detach())


def test_masks_follow_torchs_seed():
    x = torch.ones(100)
    torch.manual_seed(5)
    first, other = CPUDropout(0.5)(x), CPUDropout(0.5)(x)
    torch.manual_seed(5)
    assert torch.equal(first, CPUDropout(0.5)(x))
    assert not torch.equal(first, other)


def test_nothing_is_dropped_in_evaluation():
    x = torch.randn(3, 5)
    assert CPUDropout(0.5).eval()(x) is x
    assert CPUDropout(0.0)(x) is x
