"""Walking back: the steps against diffusers and MONAI, against exact laws, and at their edges."""
from functools import partial

import pytest
import torch

from calidiff_nb.diffusion.denoisers import ExactDenoiser, ExactGaussian
from calidiff_nb.diffusion.forward import q_posterior, q_sample
from calidiff_nb.diffusion.samplers import (
    Trajectory, ddim_step, ddpm_step, dpmpp_2m_step, heun_step, invert, sample, step_extras, timestep_grid,
)
from calidiff_nb.diffusion.schedules import cosine_schedule, linear_schedule, sigmoid_schedule, to_diffusers
from calidiff_nb.raters.cases import draw_like

SCHEDULES = {"linear": linear_schedule(), "cosine": cosine_schedule(), "sigmoid": sigmoid_schedule()}
COSINE = SCHEDULES["cosine"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float64):
    return draw_like(torch.zeros(shape, dtype=dtype), seeded(seed))


def some_masks(schedule, dtype=torch.float64):
    """An exact denoiser over five blobs."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centres = [(6, 6, 3), (7, 7, 5), (8, 9, 4), (9, 6, 2), (5, 9, 6)]
    blobs = torch.stack([((x - a) ** 2 + (y - b) ** 2).sqrt() - r for a, b, r in centres])
    return ExactDenoiser((blobs / 8).clamp(-1, 1)[:, None].to(dtype), schedule)


def apart(a, b):
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------- the grid

@pytest.mark.parametrize("T", [1, 2, 7, 50])
def test_every_number_of_steps(T):
    for start in range(T):
        for steps in range(1, start + 2):
            grid = timestep_grid(T, steps, start)
            assert len(grid) == steps and grid[0] == start and (grid.diff() < 0).all()
            assert steps == 1 or grid[-1] == 0


@pytest.mark.parametrize("bend", [0.3, 1.0, 2.0, 3.0, 6.0])
def test_bent_grids_never_repeat(bend):
    for start in (0, 3, 49):
        for steps in range(1, start + 2):
            grid = timestep_grid(50, steps, start, bend)
            assert len(grid) == steps and grid[0] == start and (grid.diff() < 0).all()
            assert steps == 1 or grid[-1] == 0
    assert timestep_grid(1000, 5, bend=2.0).tolist() == [999, 937, 749, 437, 0]


def test_few_even_steps_forget_the_rare():
    """Shares of four readers, one of whom sees nothing: early questions decide, so a bent grid is fairer."""
    denoiser = some_masks(COSINE)
    four = ExactDenoiser(torch.cat([denoiser.atoms[:3], torch.ones_like(denoiser.atoms[:1])]), COSINE)
    start = noise(400, 1, 16, 16)
    def empties(grid):
        ends = sample(four, COSINE, start=start, steps=grid, step=dpmpp_2m_step).x0
        return (torch.cdist(ends.flatten(1), four.atoms.flatten(1)).argmin(1) == 3).double().mean().item()
    even, bent, fine = (empties(g) for g in (timestep_grid(1000, 5), timestep_grid(1000, 5, bend=3.0), timestep_grid(1000, 200)))
    assert abs(fine - 0.25) < 0.07 and abs(bent - fine) < 0.5 * abs(even - fine)


def test_grid_is_as_in_monai():
    monai = pytest.importorskip("monai.networks.schedulers").DDIMScheduler(1000)
    for steps in (2, 5, 10, 25, 50, 250):
        monai.set_timesteps(steps)
        assert (monai.timesteps - timestep_grid(1000, steps)).abs().max() <= 1     # they round in float32


def test_grid_for_each_item():
    grid = timestep_grid(100, 5, torch.tensor([99, 40, 2]))
    assert grid.shape == (5, 3) and grid[0].tolist() == [99, 40, 2] and not grid[-1].any()
    assert (grid.diff(dim=0) <= 0).all()


@pytest.mark.parametrize("steps, start", [(0, None), (101, None), (-1, None), (2.5, None), (5, 3), (1, 100), (1, -1)])
def test_grid_refuses(steps, start):
    with pytest.raises((ValueError, TypeError)):
        timestep_grid(100, steps, start)


# ---------------------------------------------------------------- one step

@pytest.mark.parametrize("step", [ddim_step, ddpm_step, dpmpp_2m_step, partial(ddim_step, eta=0.7),
                                  partial(heun_step, denoiser=some_masks(COSINE))])
def test_last_step_is_the_guess(step):
    x, guess = noise(2, 1, 16, 16), noise(2, 1, 16, 16, seed=1)
    assert torch.equal(step(x, guess, torch.tensor([0, 700]), torch.tensor([-1, -1]), COSINE), guess)


@pytest.mark.parametrize("step", [ddim_step, ddpm_step, partial(ddim_step, eta=1.0)])
def test_standing_still_changes_nothing(step):
    x, t = noise(2, 1, 4, 4), torch.tensor([5, 700])
    assert (step(x, noise(2, 1, 4, 4, seed=1), t, t, COSINE) - x).abs().max() < 1e-12


@pytest.mark.parametrize("t, t_prev", [(999, 998), (999, 0), (500, 100), (1, 0), (0, -1)])
def test_ddim_with_eta_one_is_ddpm(t, t_prev):
    x, guess = noise(3, 1, 8, 8), noise(3, 1, 8, 8, seed=1)
    args = x, guess, torch.full((3,), t), torch.full((3,), t_prev), COSINE
    assert (ddim_step(*args, eta=1.0, generator=seeded()) - ddpm_step(*args, generator=seeded())).abs().max() < 1e-11


def test_ddpm_spreads_as_the_posterior_says():
    x, guess = torch.full((50_000, 1), 0.3, dtype=torch.float64), torch.full((50_000, 1), -0.5, dtype=torch.float64)
    t, t_prev = torch.full((50_000,), 600), torch.full((50_000,), 300)
    mean, variance = q_posterior(guess, x, t, COSINE, t_prev)
    drawn = ddpm_step(x, guess, t, t_prev, COSINE, seeded())
    assert (drawn.mean() - mean.mean()).abs() < 4 * (variance.mean() / 50_000).sqrt()
    assert (drawn.var() / variance.mean() - 1).abs() < 0.03


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_is_refused(eta):
    with pytest.raises(ValueError, match="eta must be 0"):
        ddim_step(noise(1, 1), noise(1, 1), 999, 500, COSINE, eta=eta)


def test_ddpm_refuses_to_walk_up():
    with pytest.raises(ValueError, match="must not come after"):
        ddpm_step(noise(1, 1), noise(1, 1), 10, 20, COSINE)


def test_ddim_up_and_down_again():
    x, guess = noise(1, 1, 4, 4), noise(1, 1, 4, 4, seed=1)
    up = ddim_step(x, guess, 100, 800, COSINE)
    assert (ddim_step(up, guess, 800, 100, COSINE) - x).abs().max() < 1e-10


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("step", [ddim_step, dpmpp_2m_step])
def test_precision_follows_the_input(step, dtype, tolerance):
    x, guess, was = (noise(2, 1, 8, 8, seed=s) for s in range(3))
    t, t_prev, when = torch.tensor([400, 900]), torch.tensor([200, 600]), torch.tensor([600, 950])
    extra = (lambda d: {"earlier": (was.to(d), when)}) if step is dpmpp_2m_step else lambda d: {}
    low = step(x.to(dtype), guess.to(dtype), t, t_prev, COSINE, **extra(dtype))
    assert low.dtype == dtype
    assert apart(low.double(), step(x, guess, t, t_prev, COSINE, **extra(torch.float64))) < tolerance


def test_one_number_for_all_equals_one_per_item():
    x, guess = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    each = ddim_step(x, guess, torch.full((3,), 500), torch.full((3,), 200), COSINE)
    assert torch.equal(ddim_step(x, guess, 500, 200, COSINE), each)


# ---------------------------------------------------------------- diffusers, first tier: as shipped; second: with our tables

def gaussian(schedule):
    """A denoiser whose walk never forgets where it began, so that no difference can hide."""
    mean, variance = noise(16, 16, seed=7).tanh(), noise(16, 16, seed=8).square() / 2
    return ExactGaussian(mean, variance, schedule)


def their_walk(theirs, denoiser, x):
    states = [x]
    for t in theirs.timesteps:
        states.append(theirs.step(denoiser(states[-1], torch.full((len(x),), int(t))), t, states[-1]).prev_sample)
    return states


def worst(ours, theirs):
    """The largest relative difference anywhere on the walk."""
    return max(apart(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [5, 20, 100])
@pytest.mark.parametrize("exact, dtype, bound", [(False, torch.float32, 1e-5), (True, torch.float64, 1e-13)])
def test_ddim_walk_is_as_in_diffusers(name, steps, exact, dtype, bound):
    pytest.importorskip("diffusers")
    schedule = SCHEDULES[name]
    theirs, denoiser, x = to_diffusers(schedule, "ddim", exact=exact), gaussian(schedule), noise(3, 1, 16, 16, dtype=dtype)
    theirs.set_timesteps(steps)
    ours = sample(denoiser, schedule, start=x, steps=theirs.timesteps, keep=True).states
    assert worst(ours, their_walk(theirs, denoiser, x)) < bound


@pytest.mark.parametrize("exact, bound", [(False, 2e-4), (True, 1e-12)])   # 1 - ᾱ of a float32 ᾱ near 1 has few digits
@pytest.mark.parametrize("kind, step", [("ddim", partial(ddim_step, eta=0.5)), ("ddim", partial(ddim_step, eta=1.0)), ("ddpm", ddpm_step)])
def test_noisy_step_is_as_in_diffusers(kind, step, exact, bound):
    pytest.importorskip("diffusers")
    theirs, guess, x = to_diffusers(COSINE, kind, exact=exact), noise(3, 1, 16, 16, seed=1), noise(3, 1, 16, 16)
    theirs.set_timesteps(50)
    extra = {"eta": step.keywords["eta"]} if kind == "ddim" else {}
    for t in (20, 200, 500, 980):
        wanted = theirs.step(guess, t, x, generator=seeded(), **extra).prev_sample
        found = step(x, guess, torch.full((3,), t), torch.full((3,), t - 20), COSINE, generator=seeded())
        assert apart(found, wanted) < bound


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_walk_is_as_in_diffusers(name, steps):
    pytest.importorskip("diffusers")
    schedule = SCHEDULES[name]
    theirs, denoiser, x = to_diffusers(schedule, "dpm"), gaussian(schedule), noise(3, 1, 16, 16, dtype=torch.float32)
    theirs.set_timesteps(steps)
    ours = sample(denoiser, schedule, start=x, steps=theirs.timesteps, step=dpmpp_2m_step, keep=True).states
    assert worst(ours, their_walk(theirs, denoiser, x)) < 1e-5


def test_dpmpp_step_with_our_tables():
    pytest.importorskip("diffusers")
    theirs, grid = to_diffusers(COSINE, "dpm", exact=True), [900, 600, 350, 100]
    x, guess, was = (noise(2, 1, 8, 8, seed=s) for s in range(3))
    theirs.set_timesteps(timesteps=grid)
    abar = COSINE.alphas_cumprod[grid]
    theirs.sigmas = torch.cat([(1 / abar - 1).sqrt(), abar.new_zeros(1)])
    for i in (1, 2):
        theirs._step_index = i
        wanted = theirs.multistep_dpm_solver_second_order_update([was, guess], sample=x)
        found = dpmpp_2m_step(x, guess, grid[i], grid[i + 1], COSINE, earlier=(was, grid[i - 1]))
        assert apart(found, wanted) < 1e-13


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_step_is_as_in_monai(eta):
    monai = pytest.importorskip("monai.networks.schedulers")
    theirs = monai.DDIMScheduler(1000, schedule="cosine", prediction_type="sample", clip_sample=False)
    guess, x = noise(3, 1, 16, 16, seed=1), noise(3, 1, 16, 16)
    for exact, bound in ((False, 2e-4), (True, 1e-12)):
        if exact:
            theirs.alphas_cumprod, theirs.final_alpha_cumprod = COSINE.alphas_cumprod, torch.ones((), dtype=torch.float64)
        theirs.set_timesteps(50)
        for t in (20, 500, 980):
            wanted, _ = theirs.step(guess, t, x, eta=eta, generator=seeded())
            assert apart(ddim_step(x, guess, t, t - 20, COSINE, eta, seeded()), wanted) < bound


@pytest.mark.parametrize("t", [1, 20, 500, 980, 999])
def test_ddpm_step_is_as_in_monai(t):
    monai = pytest.importorskip("monai.networks.schedulers")
    theirs = monai.DDPMScheduler(1000, schedule="cosine", prediction_type="sample", clip_sample=False)
    guess, x = noise(3, 1, 16, 16, seed=1), noise(3, 1, 16, 16)
    for exact, bound in ((False, 1e-3), (True, 1e-12)):     # their float32 1 - ᾱ has few digits at t = 1
        if exact:
            theirs.betas, theirs.alphas, theirs.alphas_cumprod = COSINE.betas, COSINE.alphas, COSINE.alphas_cumprod
            theirs.one = torch.ones((), dtype=torch.float64)
        wanted, _ = theirs.step(guess, t, x, generator=seeded())
        assert apart(ddpm_step(x, guess, t, t - 1, COSINE, seeded()), wanted) < bound


# ---------------------------------------------------------------- the walk

def test_trajectory_keeps_what_was_seen():
    denoiser, seen = some_masks(COSINE), []
    walk = sample(denoiser, COSINE, start=noise(2, 1, 16, 16), steps=4, keep=True, callback=lambda *a: seen.append(a))
    assert isinstance(walk, Trajectory) and len(walk) == 4 and len(walk.states) == 5 and len(walk.predictions) == 4
    assert torch.equal(walk.states[-1], walk.x0) and torch.equal(walk.states[0], noise(2, 1, 16, 16))
    for i, (n, t, x, guess) in enumerate(seen):
        assert n == i and (t == walk.timesteps[i]).all()
        assert torch.equal(x, walk.states[i]) and torch.equal(guess, walk.predictions[i])
        assert torch.equal(denoiser(x, t), guess)


def test_nothing_is_kept_unasked():
    walk = sample(some_masks(COSINE), COSINE, (2, 1, 16, 16), steps=3, generator=seeded())
    assert walk.states == () and walk.predictions == () and walk.x0.dtype == torch.float32


@pytest.mark.parametrize("step", [ddim_step, ddpm_step, dpmpp_2m_step, heun_step])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_any_number_of_steps_walks(step, steps):
    schedule = cosine_schedule(20)
    x0 = sample(some_masks(schedule), schedule, (2, 1, 16, 16), steps=steps, step=step, generator=seeded()).x0
    assert x0.isfinite().all()
    if steps == 20:     # a fine walk ends on one of the atoms
        assert torch.cdist(x0.flatten(1).double(), some_masks(schedule).atoms.flatten(1)).min(1).values.max() < 0.5


def test_same_generator_same_walk():
    walk = lambda seed: sample(some_masks(COSINE), COSINE, (2, 1, 16, 16), step=ddpm_step, generator=seeded(seed)).x0   # noqa: E731
    assert torch.equal(walk(1), walk(1)) and not torch.equal(walk(1), walk(2))


def test_each_item_from_its_own_level():
    schedule, denoiser = COSINE, ExactGaussian(0.0, 0.5, COSINE)
    x, starts = noise(3, 1, 2, 2), torch.tensor([999, 600, 2])
    together = sample(denoiser, schedule, start=x, start_t=starts, steps=3).x0
    alone = torch.cat([sample(denoiser, schedule, start=x[i:i + 1], start_t=int(t), steps=3).x0 for i, t in enumerate(starts)])
    assert (together - alone).abs().max() < 1e-12
    still = sample(denoiser, schedule, start=x, start_t=starts, steps=10, step=dpmpp_2m_step).x0    # item 2 has only 3 steps to go
    assert still.isfinite().all()
    assert sample(denoiser, schedule, start=x, start_t=starts, steps=10, step=heun_step).x0.isfinite().all()


def test_a_step_gets_what_it_names():
    offered = {"generator": 1, "earlier": 2, "denoiser": 3}
    assert step_extras(ddim_step, **offered) == {"generator": 1}
    assert step_extras(partial(ddim_step, generator=7), **offered) == {}
    assert step_extras(dpmpp_2m_step, **offered) == {"earlier": 2}
    assert step_extras(heun_step, **offered) == {"denoiser": 3}
    assert step_extras(lambda x_t, x0_hat, t, t_prev, schedule: x0_hat, **offered) == {}


@pytest.mark.parametrize("kwargs, words", [
    ({}, "give either shape"),
    ({"shape": (1, 1, 16, 16), "start": noise(1, 1, 16, 16)}, "give either shape"),
    ({"shape": (1, 1, 16, 16), "start_t": 100}, "give either shape"),
    ({"shape": (1, 1, 16, 16), "steps": 1001}, "steps must be"),
    ({"start": noise(1, 1, 16, 16), "start_t": 3, "steps": 5}, "start must lie"),
    ({"shape": (1, 1, 16, 16), "steps": torch.tensor([0, 5])}, "one falling line"),
    ({"start": noise(1, 1, 16, 16), "start_t": 5, "steps": torch.tensor([5, 0])}, "leave start_t alone"),
])
def test_sample_refuses(kwargs, words):
    with pytest.raises(ValueError, match=words):
        sample(some_masks(COSINE), COSINE, **kwargs)


# ---------------------------------------------------------------- laws: one Gaussian offset, V = 2

V = 2.0
GAUSS = ExactGaussian(0.5, V, COSINE)


def kept_share(level, walk):
    """What is left of a deviation of 1 when two raters are noised alike and walked back alike."""
    t, y = int(COSINE.nearest_t(level)), torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    out = [walk(q_sample(one, t, COSINE, noise(1, 1, 1, 1)), t).item() for one in y.split(1)]
    a = COSINE.alpha_bar(t)
    return out[1] - out[0], (a * V / (a * V + 1 - a)).item()


@pytest.mark.parametrize("level", [0.9, 0.5, 0.3, 0.1])
def test_retention(level):
    """k for one call and for ancestral sampling, the root of k for DDIM and its relatives."""
    walk = lambda step, steps: lambda x, t: sample(GAUSS, COSINE, start=x, start_t=t, steps=steps or t + 1, step=step, generator=seeded(1)).x0   # noqa: E731
    once, k = kept_share(level, lambda x, t: GAUSS(x, torch.tensor([t])))
    assert abs(once - k) < 1e-9
    assert abs(kept_share(level, walk(ddpm_step, None))[0] - k) < 1e-2
    for step, steps in ((ddim_step, 50), (heun_step, 20), (dpmpp_2m_step, 50)):
        assert abs(kept_share(level, walk(step, steps))[0] - k**0.5) < 1e-2


def test_spread_of_the_population():
    n, t = 40_000, int(COSINE.nearest_t(0.5))
    y = 0.5 + V**0.5 * noise(n, 1, 1, 1, seed=2)
    x, k = q_sample(y, t, COSINE, generator=seeded(3)), 2 / 3
    walk = lambda step, steps: sample(GAUSS, COSINE, start=x, start_t=t, steps=steps, step=step, generator=seeded(4)).x0   # noqa: E731
    assert abs(GAUSS(x, torch.full((n,), t)).var() / (k * V) - 1) < 0.03         # one call shrinks
    for found in (walk(ddim_step, 50), walk(ddpm_step, t + 1)):                  # a walk keeps the population
        assert abs(found.var() / V - 1) < 0.03 and abs(found.mean() - 0.5) < 0.03


@pytest.mark.parametrize("step, order", [(ddim_step, 1), (dpmpp_2m_step, 2), (heun_step, 2)])
def test_order_of_convergence(step, order):
    """Twice the steps: half the error for DDIM, a quarter for the second-order ones."""
    start, z = 900, noise(1, 1, 1, 1, seed=5)
    walk = lambda steps, step: sample(GAUSS, COSINE, start=z, start_t=start, steps=steps, step=step).x0.item()   # noqa: E731
    finest = walk(start + 1, heun_step)
    ratio = abs(walk(20, step) - finest) / abs(walk(80, step) - finest)
    assert 4**order / 1.6 < ratio < 4**order * 2


def test_heun_finds_the_exact_flow():
    """The flow of a Gaussian is known: it scales the deviation from the mean."""
    start, z = 900, noise(5, 1, 1, 1, seed=5)
    a = COSINE.alpha_bar(start)
    exact = 0.5 + (V / (a * V + 1 - a)).sqrt() * (z - a.sqrt() * 0.5)
    assert (sample(GAUSS, COSINE, start=z, start_t=start, steps=200, step=heun_step).x0 - exact).abs().max() < 1e-3


# ---------------------------------------------------------------- inversion

@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("end_t", [None, 400])
def test_inversion_returns_the_input(steps, end_t):
    prior = ExactGaussian(0.0, torch.linspace(0.01, 3, 64, dtype=torch.float64).reshape(1, 1, 8, 8), COSINE)
    y = noise(3, 1, 8, 8, seed=6) * prior.variance.sqrt()
    back = sample(prior, COSINE, start=invert(prior, y, COSINE, steps, end_t), start_t=end_t, steps=steps).x0
    assert (back - y).abs().max() < 1e-6


def test_inversion_of_masks():
    denoiser = some_masks(COSINE)
    y = denoiser.atoms[:3]
    hidden = invert(denoiser, y, COSINE)
    assert (sample(denoiser, COSINE, start=hidden, steps=50).x0 - y).abs().max() < 1e-6
    assert hidden.isfinite().all()


def test_quick_inversion_gets_better_with_steps():
    y = torch.tensor([2.3, -1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    off = [(sample(GAUSS, COSINE, start=invert(GAUSS, y, COSINE, n, rounds=1), steps=n).x0 - y).abs().max().item() for n in (20, 50, 200)]
    assert off[0] > 2 * off[1] > 4 * off[2] and off[2] < 0.05


def test_invert_refuses():
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        invert(GAUSS, noise(1, 1, 1, 1), COSINE, rounds=0)


def test_levels_from_nearest_t():
    """nearest_t answers one wish with a 0-dim tensor: it may be passed on as it is."""
    denoiser, t = ExactGaussian(0.0, 1.0, COSINE), COSINE.nearest_t(0.5)
    x = noise(2, 1, 4, 4)
    assert torch.equal(sample(denoiser, COSINE, start=x, start_t=t).x0, sample(denoiser, COSINE, start=x, start_t=int(t)).x0)
    assert torch.equal(timestep_grid(1000, 5, t), timestep_grid(1000, 5, int(t)))
    assert torch.equal(invert(denoiser, x, COSINE, steps=5, end_t=t), invert(denoiser, x, COSINE, steps=5, end_t=int(t)))


def test_a_trajectory_can_be_made_by_hand():
    maps = [noise(1, 1, 4, 4, seed=s) for s in range(3)]
    assert len(Trajectory(maps[-1], maps, maps[1:], torch.tensor([999, 0]))) == 2
