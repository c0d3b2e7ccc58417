"""Tables that everything else trusts: ends, precision, refusals, and the same numbers elsewhere."""
import math

import pytest
import torch

from calidiff_nb.diffusion.schedules import (
    NoiseSchedule,
    cosine_schedule,
    linear_schedule,
    schedule_from_alpha_bar,
    sigmoid_schedule,
    to_diffusers,
)

MAKERS = [linear_schedule, cosine_schedule, sigmoid_schedule]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("T", [25, 50, 100, 1000, 4000])
def test_both_ends(make, T):
    s = make(T)
    assert s.T == len(s.betas) == len(s.alphas) == len(s.alphas_cumprod) == T
    assert s.alpha_bar(-1) == 1 and s.alpha_bar(torch.tensor([-1])) == 1
    assert s.alpha_bar(0) == 1 - s.betas[0] and s.alpha_bar(T - 1) == s.alphas_cumprod[-1]
    assert 0 < s.alpha_bar(T - 1) < 1e-3 and 1 - 25 / T < s.alpha_bar(0) < 1
    assert (s.alphas_cumprod.diff() < 0).all() and (s.half_log_snr.diff() < 0).all()


@pytest.mark.parametrize("make", MAKERS)
def test_tables_are_float64_and_agree(make):
    s = make()
    for table in (s.betas, s.alphas, s.alphas_cumprod, s.snr, s.half_log_snr):
        assert table.dtype == torch.float64 and table.shape == (1000,)
    assert torch.allclose(s.alphas.log().cumsum(0), s.alphas_cumprod.log(), atol=1e-12)
    assert torch.allclose(s.half_log_snr, (s.alphas_cumprod / (1 - s.alphas_cumprod)).log() / 2, atol=1e-12)


def test_one_step_schedules_work():
    for make in (cosine_schedule, sigmoid_schedule):
        s = make(1)
        assert s.T == 1 and s.alpha_bar(-1) == 1 and 0 < s.alpha_bar(0) < 0.01


def test_cosine_is_its_formula_away_from_the_cap():
    s = cosine_schedule(1000)
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    for t in (0, 1, 500, 998):
        assert s.alphas_cumprod[t].item() == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-9)


def test_linear_is_stretched():
    assert torch.allclose(linear_schedule(500).betas[[0, -1]], torch.tensor([2e-4, 0.04], dtype=torch.float64))
    for T in (50, 250, 2000):
        assert linear_schedule(T).alphas_cumprod[-1] < 1e-4


def test_lookup_shapes_and_values():
    s, x = cosine_schedule(10), torch.zeros(3, 2, 4, 4)
    t = torch.tensor([0, 9, -1])
    assert torch.equal(s.alpha_bar(t), torch.stack([s.alpha_bar(0), s.alpha_bar(9), s.alpha_bar(-1)]))
    assert s.alpha_bar(t, x).shape == (3, 1, 1, 1)
    assert s.alpha_bar(4, x).ndim == s.alpha_bar(torch.tensor(4), x).ndim == 0
    assert s.alpha_bar(torch.tensor([[1, 2], [3, 4]])).shape == (2, 2)
    assert s.alpha_bar(torch.tensor([1], dtype=torch.int32)) == s.alpha_bar(1)
    assert s.alpha_bar(torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("t", [-2, 10, torch.tensor([0, 10]), torch.tensor([-2, 3]), torch.tensor(10)])
def test_steps_outside_the_table(t):
    with pytest.raises(IndexError, match=r"t must lie in -1\.\.9"):
        cosine_schedule(10).alpha_bar(t)


def test_one_step_per_item():
    with pytest.raises(ValueError, match="one step per item, 2; got 3"):
        cosine_schedule(10).alpha_bar(torch.tensor([1, 2, 3]), torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("make", MAKERS)
def test_nearest_is_nearest(make):
    s = make(200)
    wanted = torch.linspace(0, 1, 77, dtype=torch.float64)
    gap = (s.alpha_bar(s.nearest_t(wanted)) - wanted).abs()
    assert torch.equal(gap, (wanted[:, None] - s.alphas_cumprod).abs().min(1).values)
    assert torch.equal(s.nearest_t(s.alphas_cumprod), torch.arange(200))
    assert int(s.nearest_t(1.0)) == 0 and int(s.nearest_t(0.0)) == 199


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_nearest_wants_a_share(share):
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        cosine_schedule(10).nearest_t(share)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("betas, error, words", [
    (f64(0.1, 0.2).float(), TypeError, "float64"),
    (f64(0.1, 1.0), ValueError, "strictly between"),
    (f64(0.0, 0.5), ValueError, "strictly between"),
    (f64(0.1, float("nan")), ValueError, "strictly between"),
    (f64(), ValueError, "one number per step"),
])
def test_what_is_no_schedule(betas, error, words):
    with pytest.raises(error, match=words):
        NoiseSchedule(betas)


def test_refusals_of_the_makers():
    with pytest.raises(ValueError, match="T must be above 20"):
        linear_schedule(20)
    with pytest.raises(ValueError, match="at least 1 step"):
        cosine_schedule(0)
    with pytest.raises(ValueError, match="end must be above start"):
        sigmoid_schedule(start=3.0, end=-3.0)
    with pytest.raises(ValueError, match="must fall"):
        schedule_from_alpha_bar(lambda u: 0.5 + u / 2, 10)
    with pytest.raises(ValueError, match="must fall"):
        schedule_from_alpha_bar(lambda u: torch.where(u < 0.5, 1 - u, 0.5 - 0 * u), 10)


def test_frozen_and_movable():
    s = cosine_schedule(10)
    with pytest.raises(AttributeError):
        s.betas = s.betas * 2
    moved = s.to("cpu")
    assert moved is not s and moved.name == "cosine" and torch.equal(moved.alphas_cumprod, s.alphas_cumprod)
    assert "cosine" in repr(s) and "T=10" in repr(s) and len(repr(s)) < 120


@pytest.mark.gpu
def test_lookup_goes_where_the_question_is():
    s = cosine_schedule(10)
    for table in (s, s.to("cuda")):
        found = table.alpha_bar(torch.tensor([3, -1], device="cuda"))
        assert found.device.type == "cuda" and torch.equal(found.cpu(), s.alpha_bar(torch.tensor([3, -1])))


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpm", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("make", MAKERS)
def test_bridge_hands_over_the_table(kind, make):
    pytest.importorskip("diffusers")
    s = make()
    shipped, exact = to_diffusers(s, kind), to_diffusers(s, kind, exact=True)
    assert shipped.config.prediction_type == "sample"
    assert (shipped.alphas_cumprod.double() - s.alphas_cumprod).abs().max() < 1e-5
    assert torch.equal(exact.alphas_cumprod, s.alphas_cumprod) and torch.equal(exact.betas, s.betas)


def test_bridge_settings_and_refusals():
    pytest.importorskip("diffusers")
    made = to_diffusers(cosine_schedule(), timestep_spacing="trailing", clip_sample=True)
    assert made.config.timestep_spacing == "trailing" and made.config.clip_sample
    with pytest.raises(ValueError, match="kind must be"):
        to_diffusers(cosine_schedule(), "magic")


def test_tables_of_diffusers():
    theirs = pytest.importorskip("diffusers").DDPMScheduler
    curved = NoiseSchedule(1e-4 + torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid() * (0.02 - 1e-4))
    for name, ours in {"linear": linear_schedule(), "squaredcos_cap_v2": cosine_schedule(), "sigmoid": curved}.items():
        made = theirs(1000, beta_schedule=name)
        assert (made.betas.double() - ours.betas).abs().max() < 1e-5, name
        assert (made.alphas_cumprod.double() - ours.alphas_cumprod).abs().max() < 1e-5, name


def test_tables_of_monai():
    theirs = pytest.importorskip("monai.networks.schedulers").DDPMScheduler
    for name, ours in {"linear_beta": linear_schedule(), "cosine": cosine_schedule()}.items():
        made = theirs(num_train_timesteps=1000, schedule=name)
        assert (made.alphas_cumprod.double() - ours.alphas_cumprod).abs().max() < 1e-5, name
