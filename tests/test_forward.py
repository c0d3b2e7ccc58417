"""The forward process: identities, Bayes by brute force, refusals, and the same numbers elsewhere."""
import pytest
import torch

from calidiff_nb.diffusion.forward import (
    as_factor,
    bernoulli_posterior,
    bernoulli_step_posterior,
    categorical_posterior,
    eps_to_x0,
    from_v,
    q_bernoulli,
    q_posterior,
    q_sample,
    q_step,
    to_v,
    x0_to_eps,
)
from calidiff_nb.diffusion.schedules import cosine_schedule, linear_schedule, sigmoid_schedule, to_diffusers

COSINE = cosine_schedule(1000)


def maps(seed=0, b=3, dtype=torch.float64):
    return torch.randn(b, 1, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def per_item(call, t):
    """The same call, one item at a time."""
    return torch.cat([call(i, int(s)) for i, s in enumerate(t)])


@pytest.mark.parametrize("schedule", [linear_schedule(), COSINE, sigmoid_schedule()], ids=lambda s: s.name)
def test_walking_is_jumping(schedule):
    """In distribution: q_step is linear in the map and in the noise, so factor and variance say all."""
    one, variance = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for t in range(schedule.T):
        unit = q_step(torch.zeros(1, dtype=torch.float64), t, schedule, torch.ones(1, dtype=torch.float64))
        keep = q_step(torch.ones(1, dtype=torch.float64), t, schedule, torch.zeros(1, dtype=torch.float64))
        one, variance = keep * one, keep**2 * variance + unit**2
        signal = q_sample(torch.ones(1, dtype=torch.float64), t, schedule, torch.zeros(1, dtype=torch.float64))
        noise = q_sample(torch.zeros(1, dtype=torch.float64), t, schedule, torch.ones(1, dtype=torch.float64))
        assert torch.allclose(one, signal, rtol=1e-10, atol=0) and torch.allclose(variance, noise**2, rtol=1e-10)
        assert signal**2 + noise**2 == pytest.approx(1, abs=1e-14)


def test_moments_of_a_jump():
    drawn = q_sample(torch.full((40_000,), 0.6), 400, COSINE, generator=torch.Generator().manual_seed(3))
    abar = COSINE.alpha_bar(400)
    assert drawn.mean() == pytest.approx(float(abar.sqrt() * 0.6), abs=0.015)
    assert drawn.var() == pytest.approx(float(1 - abar), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_follows_the_map(dtype):
    x0, eps, t = maps(dtype=dtype), maps(1, dtype=dtype), torch.tensor([0, 500, 999])
    for step in (t, 500, torch.tensor(500)):
        x_t = q_sample(x0, step, COSINE, eps)
        mean, variance = q_posterior(x0, x_t, step, COSINE)
        results = [x_t, q_step(x0, step, COSINE, eps), mean, variance, eps_to_x0(x_t, eps, step, COSINE), x0_to_eps(x_t, x0, step, COSINE),
                   to_v(x0, eps, step, COSINE), *from_v(x_t, eps, step, COSINE), q_bernoulli(x0.sigmoid(), step, COSINE)]
        assert {r.dtype for r in results} == {dtype}


def test_small_noise_survives_float32():
    """1 - ᾱ at t = 0 is 4e-5: a float32 table would lose three digits of it."""
    x_t = q_sample(torch.zeros(1), 0, COSINE, torch.ones(1))
    assert x_t.item() == pytest.approx(float((1 - COSINE.alpha_bar(0)).sqrt()), rel=1e-6)


def test_noise_comes_from_the_generator():
    x0 = maps()
    g = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    assert torch.equal(q_sample(x0, 500, COSINE, generator=g()), q_sample(x0, 500, COSINE, generator=g()))
    assert torch.equal(q_step(x0, 500, COSINE, generator=g()), q_step(x0, 500, COSINE, generator=g()))
    assert not torch.equal(q_sample(x0, 500, COSINE), q_sample(x0, 500, COSINE))


def test_each_item_at_its_own_step():
    x0, eps, x_t, t = maps(), maps(1), maps(2), torch.tensor([1, 400, 999])
    assert torch.allclose(q_sample(x0, t, COSINE, eps), per_item(lambda i, s: q_sample(x0[i:i + 1], s, COSINE, eps[i:i + 1]), t))
    assert torch.allclose(q_step(x0, t, COSINE, eps), per_item(lambda i, s: q_step(x0[i:i + 1], s, COSINE, eps[i:i + 1]), t))
    assert torch.allclose(to_v(x0, eps, t, COSINE), per_item(lambda i, s: to_v(x0[i:i + 1], eps[i:i + 1], s, COSINE), t))
    mean, variance = q_posterior(x0, x_t, t, COSINE, torch.tensor([-1, 20, 998]))
    assert variance.shape == (3, 1, 1, 1) and variance[0] == 0 and torch.equal(mean[0], x0[0])
    alone = q_posterior(x0[1:2], x_t[1:2], 400, COSINE, 20)
    assert torch.allclose(mean[1], alone[0][0]) and torch.allclose(variance[1].squeeze(), alone[1])


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 5, 6)])
def test_other_axes_are_free(shape):
    x0, t = torch.zeros(shape), torch.tensor([0, 1, 500, 999])
    assert q_sample(x0, t, COSINE).shape == q_step(x0, t, COSINE).shape == q_posterior(x0, x0, t, COSINE)[0].shape == shape


def test_an_empty_batch_passes():
    assert q_sample(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long), COSINE).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("t, s", [(1, 0), (500, 499), (500, 0), (999, 998), (999, 10), (300, 299)])
def test_posterior_is_bayes_on_a_grid(t, s):
    z = torch.linspace(-9, 9, 60_001, dtype=torch.float64)
    before, now = COSINE.alpha_bar(s), COSINE.alpha_bar(t)
    x0, x_t = maps(0, 2).flatten()[:4], maps(1, 2).flatten()[:4]
    log = -(z - before.sqrt() * x0[:, None]) ** 2 / (2 * (1 - before)) - (x_t[:, None] - (now / before).sqrt() * z) ** 2 / (2 * (1 - now / before))
    weight = log.softmax(1)
    by_grid = (weight * z).sum(1)
    mean, variance = q_posterior(x0, x_t, t, COSINE, s)
    assert torch.allclose(mean, by_grid, atol=1e-7)
    assert torch.allclose(variance.expand(4), (weight * (z - by_grid[:, None]) ** 2).sum(1), atol=1e-7)


def test_posterior_of_the_textbook():
    """Ho et al. write it with β and α of the single step."""
    x0, x_t = maps(), maps(1)
    for t in (1, 400, 999):
        now, before, beta = COSINE.alpha_bar(t), COSINE.alpha_bar(t - 1), COSINE.betas[t]
        mean, variance = q_posterior(x0, x_t, t, COSINE)
        textbook = before.sqrt() * beta / (1 - now) * x0 + COSINE.alphas[t].sqrt() * (1 - before) / (1 - now) * x_t
        assert torch.allclose(mean, textbook, atol=1e-12)
        assert variance.item() == pytest.approx(float((1 - before) / (1 - now) * beta), rel=1e-9)


def test_posterior_marginalises_to_the_jump():
    """Averaged over x_t given x0, the earlier state is distributed as if jumped to."""
    for t, s in [(700, 699), (700, 50)]:
        now, before = COSINE.alpha_bar(t), COSINE.alpha_bar(s)
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        of_x0, variance = q_posterior(one, zero, t, COSINE, s)
        of_xt = q_posterior(zero, one, t, COSINE, s)[0]
        assert torch.allclose(of_x0 + of_xt * now.sqrt(), before.sqrt().expand(1), atol=1e-12)
        assert torch.allclose(of_xt**2 * (1 - now) + variance, (1 - before).expand(1), atol=1e-12)


@pytest.mark.parametrize("t", [0, 3, 500, 990, 998])
def test_three_languages(t):
    x0, eps = maps(), maps(1)
    x_t = q_sample(x0, t, COSINE, eps)
    v = to_v(x0, eps, t, COSINE)
    for found, true in zip((eps_to_x0(x_t, eps, t, COSINE), x0_to_eps(x_t, x0, t, COSINE), *from_v(x_t, v, t, COSINE)), (x0, eps, x0, eps)):
        assert (found - true).abs().max() < 1e-10
    assert torch.allclose(x_t**2 + v**2, x0**2 + eps**2)  # a rotation


def test_coin_tosses_marginal_and_ends():
    p = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(q_bernoulli(p, -1, COSINE), p)
    assert (q_bernoulli(p, 999, COSINE) - 0.5).abs().max() < 1e-6
    assert torch.allclose(q_bernoulli(q_bernoulli(p, 0, COSINE), -1, COSINE), q_bernoulli(p, 0, COSINE))


@pytest.mark.parametrize("t", [0, 200, 600, 999])
def test_one_pixel_formula(t):
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    a = COSINE.alpha_bar(t)
    assert torch.allclose(bernoulli_posterior(p, torch.ones(101), t, COSINE), p * (a + (1 - a) / 2) / (p * a + (1 - a) / 2), atol=1e-12)
    both = bernoulli_posterior(p, torch.ones(101), t, COSINE), bernoulli_posterior(p, torch.zeros(101, dtype=torch.uint8), t, COSINE)
    chance = q_bernoulli(p, t, COSINE)
    assert torch.allclose(chance * both[0] + (1 - chance) * both[1], p)  # beliefs average to the prior


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_categorical_is_bayes(labels):
    prior = torch.rand(7, labels, generator=torch.Generator().manual_seed(labels), dtype=torch.float64)
    prior /= prior.sum(1, keepdim=True)
    kept = torch.tensor(0.3, dtype=torch.float64)
    kernel = kept * torch.eye(labels, dtype=torch.float64) + (1 - kept) / labels  # [from, to]
    for seen in range(labels):
        found = categorical_posterior(prior, torch.full((7,), seen), kept)
        joint = prior * kernel[:, seen]
        assert torch.allclose(found, joint / joint.sum(1, keepdim=True)) and torch.allclose(found.sum(1), torch.ones(7, dtype=torch.float64))


def test_categorical_with_a_share_per_item():
    prior = torch.full((2, 3, 4), 0.25)
    found = categorical_posterior(prior, torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1.0], [0.0]]))
    assert torch.equal(found[0], torch.eye(4)[[0, 0, 0]]) and torch.equal(found[1], prior[1])


@pytest.mark.parametrize("t, s", [(1, 0), (600, 599), (600, 100), (999, -1), (400, 400)])
def test_step_back_among_masks_by_counting(t, s):
    flip = lambda a: torch.stack([torch.stack([1 + a, 1 - a]), torch.stack([1 - a, 1 + a])]) / 2  # noqa: E731
    first, second = flip(COSINE.alpha_bar(s)), flip(COSINE.alpha_bar(t) / COSINE.alpha_bar(s))
    for p in (0.0, 0.3, 1.0):
        start = torch.tensor([1 - p, p], dtype=torch.float64)
        story = start[:, None, None] * first[:, :, None] * second[None]
        for seen in (0, 1):
            found = bernoulli_step_posterior(start[1:], torch.tensor([float(seen)]), t, COSINE, s)
            assert found.item() == pytest.approx(float(story[:, 1, seen].sum() / story[:, :, seen].sum()), abs=1e-12)


def test_a_chain_of_coin_tosses_comes_home():
    """Stepping back with the true mask as guess ends in the mask."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.rand(2, 1, 8, 8, generator=g) < 0.4).double()
    short = cosine_schedule(12)
    y = torch.bernoulli(q_bernoulli(mask, 11, short), generator=g)
    for t in range(11, -1, -1):
        y = torch.bernoulli(bernoulli_step_posterior(mask, y, t, short), generator=g)
    assert torch.equal(y, mask)


def test_refusals():
    x, five = maps(), torch.tensor([5, 5, 5])
    with pytest.raises(ValueError, match="a clean map holds none"):
        x0_to_eps(x, x, -1, COSINE)
    with pytest.raises(ValueError, match="a clean map holds none"):
        x0_to_eps(x, x, torch.tensor([3, -1, 3]), COSINE)
    with pytest.raises(ValueError, match="must not come after"):
        q_posterior(x, x, 5, COSINE, 6)
    with pytest.raises(ValueError, match="must not come after"):
        q_posterior(x, x, five, COSINE, torch.tensor([4, 6, 4]))
    with pytest.raises(ValueError, match="must not come after"):
        bernoulli_step_posterior(x.sigmoid(), torch.ones_like(x), 5, COSINE, 6)
    for call in (q_sample, q_step):
        with pytest.raises(IndexError, match="t must lie in"):
            call(x, 1000, COSINE)
    with pytest.raises(IndexError, match="t must lie in"):
        q_step(x, -1, COSINE)
    with pytest.raises(ValueError, match="mask of 0 and 1"):
        bernoulli_posterior(x.sigmoid(), x, 5, COSINE)
    with pytest.raises(ValueError, match=r"labels 0\.\.2"):
        categorical_posterior(torch.full((1, 3), 1 / 3), torch.tensor([3]), torch.tensor(0.5))


def test_posterior_before_the_first_step_is_refused():
    with pytest.raises(ValueError, match="t must be at least 0"):
        q_posterior(maps(), maps(), -1, COSINE, -1)


def test_factor_keeps_lone_numbers():
    value = torch.tensor(0.5, dtype=torch.float64)
    assert as_factor(value, maps()) is value
    assert as_factor(value.reshape(1), maps(dtype=torch.float32)).dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    x0, eps, t = maps(), maps(1), torch.tensor([0, 500, 999])
    there = q_sample(x0.cuda(), t.cuda(), COSINE, eps.cuda())
    assert there.is_cuda and torch.allclose(there.cpu(), q_sample(x0, t, COSINE, eps))
    assert torch.allclose(q_sample(x0.cuda(), 500, COSINE.to("cuda"), eps.cuda()).cpu(), q_sample(x0, 500, COSINE, eps))
    mean, variance = q_posterior(x0.cuda(), there, t.cuda(), COSINE)
    assert mean.is_cuda and variance.is_cuda


@pytest.mark.parametrize("exact, tolerance", [(False, 1e-5), (True, 1e-13)])
def test_noising_of_diffusers(exact, tolerance):
    pytest.importorskip("diffusers")
    theirs = to_diffusers(COSINE, "ddpm", exact=exact)
    x0, eps, t = maps(), maps(1), torch.tensor([0, 500, 995])
    assert (theirs.add_noise(x0, eps, t) - q_sample(x0, t, COSINE, eps)).abs().max() < tolerance
    assert (theirs.get_velocity(x0, eps, t) - to_v(x0, eps, t, COSINE)).abs().max() < tolerance


def test_noising_of_monai():
    made = pytest.importorskip("monai.networks.schedulers").DDPMScheduler(num_train_timesteps=1000, schedule="cosine")
    x0, eps, t = maps(), maps(1), torch.tensor([0, 500, 995])
    assert (made.add_noise(x0, eps, t) - q_sample(x0, t, COSINE, eps)).abs().max() < 3e-5
    assert (made.get_velocity(x0, eps, t) - to_v(x0, eps, t, COSINE)).abs().max() < 3e-5
