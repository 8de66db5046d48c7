import torch

from revnet.flows import Logistic


def test_density_integrates_to_one_and_is_that_of_the_samples():
    prior = Logistic(torch.tensor(0.0, dtype=torch.float64))
    z = torch.linspace(-40, 40, 100_001, dtype=torch.float64)
    assert abs(torch.trapezoid(prior.log_prob(z).exp(), z) - 1) < 1e-6
    samples = prior.sample((100_000,))
    assert abs(samples.mean()) < 0.03
    assert abs(samples.var() / prior.variance - 1) < 0.03
    assert abs((samples < 1).double().mean() - torch.tensor(1.0).sigmoid()) < 0.01


def test_density_far_out_is_finite():
    prior = Logistic(torch.zeros(2))
    assert torch.equal(prior.log_prob(torch.tensor([-1e4, 1e4])), torch.tensor([-1e4, -1e4]))


def test_expanding_and_sampling():
    prior = Logistic(torch.zeros(3)).expand((2, 3))
    assert prior.rsample((4,)).shape == (4, 2, 3)
    assert prior.rsample().isfinite().all()
