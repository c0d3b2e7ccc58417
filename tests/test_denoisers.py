"""Guards of 12_denoisers: exact answers by brute force, symmetries of the network, clear refusals."""

import math

import pytest
import torch

from calidiff_nb.diffusion.denoisers import (
    ExactDenoiser, ExactGaussian, ImageEncoder, Prediction, RaterAttention, RaterTokens, UNet,
    borrowed_denoiser, effective_atoms, pad_to_eight, pieces, time_embedding,
)
from calidiff_nb.diffusion.schedules import cosine_schedule

T = 1000
SCHEDULE = cosine_schedule(T)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(net, seed=0):
    """Weights that are not at their silent start, so that a symmetry cannot hold by accident."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1 * torch.randn(p.shape, generator=g))
    return net.eval()


def small(**changes):
    return awake(UNet(**({"n_raters": 4, "widths": (8, 16, 24)} | changes)))


def inputs(b=2, r=3, k=1, c=1, h=16, w=16):
    steps = torch.randint(0, T, (b, r), generator=torch.Generator().manual_seed(1))
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(2)), draw(b, r, k, h, w), steps, torch.arange(r).expand(b, r)


def gap(a: Prediction, b: Prediction):
    return max((a.distance - b.distance).abs().max().item(), (a.logit - b.logit).abs().max().item())


# --- exact denoisers

@pytest.mark.parametrize("step", [0, 10, 500, T - 1])
def test_exact_denoiser_is_bayes_rule_term_by_term(step):
    atoms, x_t, log_w = draw(3, 2, 4, 5).double(), draw(2, 2, 4, 5, seed=1).double(), torch.tensor([0.0, -1.0, 2.0])
    t = torch.full((2,), step)
    got = ExactDenoiser(atoms, SCHEDULE, log_w)
    ab = float(SCHEDULE.alphas_cumprod[step])
    for b in range(2):
        logs = [float(log_w[m]) - float((x_t[b] - math.sqrt(ab) * atoms[m]).square().sum()) / (2 * (1 - ab)) for m in range(3)]
        p = [math.exp(v - max(logs)) for v in logs]
        p = [v / sum(p) for v in p]
        assert torch.allclose(got.posterior(x_t, t)[b], torch.tensor(p, dtype=torch.float64), atol=1e-9)
        assert torch.allclose(got(x_t, t)[b], sum(p[m] * atoms[m] for m in range(3)), atol=1e-9)


def test_exact_denoiser_limits():
    atoms = draw(5, 1, 8, 8)
    exact = ExactDenoiser(atoms, SCHEDULE)
    first, last = torch.zeros(5, dtype=torch.long), torch.full((5,), T - 1)
    assert torch.allclose(exact(atoms, first), atoms, atol=1e-5)                               # hardly any noise: the atom itself
    assert torch.allclose(exact(draw(5, 1, 8, 8, seed=3), last), atoms.mean(0).expand_as(atoms), atol=0.15)   # nothing but noise: the prior mean
    assert ExactDenoiser(atoms[:1], SCHEDULE)(atoms, last).sub(atoms[:1]).abs().max() < 1e-6


def test_exact_denoiser_survives_huge_maps_and_keeps_dtype():
    atoms = draw(4, 1, 256, 256)
    exact = ExactDenoiser(atoms, SCHEDULE)
    for step in (0, T - 1):
        out = exact(100 * draw(2, 1, 256, 256, seed=2), torch.full((2,), step))
        assert out.dtype == torch.float32 and out.isfinite().all()


def test_exact_denoiser_refuses():
    with pytest.raises(ValueError, match="at least|hold at least one"):
        ExactDenoiser(torch.zeros(0, 1, 4, 4), SCHEDULE)
    with pytest.raises(ValueError, match="one entry per atom, 2; got 3"):
        ExactDenoiser(torch.zeros(2, 1, 4, 4), SCHEDULE, torch.zeros(3))
    exact = ExactDenoiser(torch.zeros(2, 1, 4, 4), SCHEDULE)
    for bad in (-1, T):
        with pytest.raises(IndexError, match=rf"{T - 1}.*got {bad}"):
            exact(torch.zeros(1, 1, 4, 4), torch.tensor([bad]))


def test_effective_atoms_counts():
    assert torch.allclose(effective_atoms(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3] * 3])), torch.tensor([1.0, 2.0, 3.0]), atol=1e-5)


@pytest.mark.parametrize("step", [50, 400, 800])
def test_exact_gaussian_is_the_limit_of_many_atoms(step):
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    atoms, prior = (0.3 + 0.7 * grid)[:, None, None, None], -grid.square() / 2
    x_t, t = draw(6, 1, 1, 1).double(), torch.full((6,), step)
    dense = ExactDenoiser(atoms, SCHEDULE, prior)(x_t, t)
    assert torch.allclose(ExactGaussian(0.3, 0.49, SCHEDULE)(x_t, t), dense, atol=1e-6)


def test_exact_gaussian_edges():
    x_t, t, mean = draw(3, 1, 4, 4), torch.tensor([0, 500, T - 1]), draw(1, 4, 4, seed=5)
    assert torch.allclose(ExactGaussian(mean, 0.0, SCHEDULE)(x_t, t), mean.expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="variance must be >= 0"):
        ExactGaussian(0.0, -1.0, SCHEDULE)


# --- the network

@pytest.mark.parametrize("size", [(8, 8), (16, 24), (13, 30), (33, 16)])
@pytest.mark.parametrize("k,c", [(1, 1), (2, 3)])
def test_any_size_comes_back_as_it_went_in(size, k, c):
    net = small(structures=k, channels=c)
    image, x_t, t, tokens = inputs(2, 3, k, c, *size)
    features = net.encode(image)
    out = net(x_t, t, features, tokens)
    assert out.distance.shape == out.logit.shape == x_t.shape
    assert out.distance.isfinite().all() and out.logit.isfinite().all()
    assert [f.shape[-1] for f in features] == [-(-size[1] // 8) * s for s in (4, 2, 1)]
    assert net.presence(features, tokens).shape == (2, 3, k)


def test_padding_is_what_a_person_would_do():
    net = small()
    image, x_t, t, tokens = inputs(1, 2, 1, 1, 13, 14)
    bigger = torch.nn.functional.pad(image, (0, 2, 0, 3), mode="replicate")
    whole = net(torch.nn.functional.pad(x_t, (0, 2, 0, 3), value=1.0), t, net.encode(bigger), tokens)
    part = net(x_t, t, net.encode(image), tokens)
    assert torch.equal(part.distance, whole.distance[..., :13, :14])
    assert pad_to_eight(bigger) is bigger


@pytest.mark.parametrize("b,m,r,most", [(6, 1, 2, 4), (6, 2, 2, 2), (6, 3, 3, 4), (6, 6, 2, 1), (5, 5, 1, 2)])
def test_a_batch_in_pieces_gives_the_same_answers(monkeypatch, b, m, r, most):
    net = small()
    image, x_t, t, tokens = inputs(b, r)
    features = net.encode(image[:m])
    present = torch.ones(b, r, dtype=torch.bool).index_fill(1, torch.tensor([r - 1]), r == 1)
    whole = net(x_t, t, features, tokens, present)
    monkeypatch.setattr("calidiff_nb.diffusion.denoisers.CACHE_PIXELS", most * r * 16 * 16)
    with torch.no_grad():
        assert gap(net(x_t, t, features, tokens, present), whole) < 1e-5
    assert (whole.distance[0] - whole.distance[1]).abs().max() > 0.05   # a mixed-up order would show


@pytest.mark.parametrize("b,m", [(1, 1), (7, 1), (8, 4), (12, 3), (6, 6)])
def test_pieces_hold_every_case_once_with_its_own_image(b, m):
    for most in (1, 2, 3, 5, 100):
        seen = []
        for cases, images in pieces(b, m, most):
            inside, shown = list(range(b))[cases], list(range(m))[images]
            assert 0 < len(inside) <= most and len(inside) % len(shown) == 0
            seen += [(c, shown[i // (len(inside) // len(shown))]) for i, c in enumerate(inside)]
        assert seen == [(c, c // (b // m)) for c in range(b)]


def test_default_size():
    assert 450_000 < sum(p.numel() for p in UNet(4).parameters()) < 850_000


def test_order_of_raters_does_not_matter():
    net = small()
    image, x_t, t, tokens = inputs(2, 4)
    order = torch.tensor([2, 0, 3, 1])
    straight, shuffled = net(x_t, t, net.encode(image), tokens), net(x_t[:, order], t[:, order], net.encode(image), tokens[:, order])
    assert gap(Prediction(straight.distance[:, order], straight.logit[:, order]), shuffled) < 1e-5


def test_raters_do_look_at_each_other_and_a_missing_one_is_removed():
    net = small()
    image, x_t, t, tokens = inputs(2, 4)
    features = net.encode(image)
    all_four = net(x_t, t, features, tokens)
    three = net(x_t[:, :3], t[:, :3], features, tokens[:, :3])
    present = torch.tensor([True, True, True, False]).expand(2, 4)
    masked = net(x_t, t, features, tokens, present)
    assert (all_four.distance[:, :3] - three.distance).abs().max() > 1e-4
    assert gap(Prediction(masked.distance[:, :3], masked.logit[:, :3]), three) < 1e-5
    changed = x_t.clone()
    changed[:, 3] = 7.0
    again = net(changed, t, features, tokens, present)
    assert torch.equal(again.distance[:, :3], masked.distance[:, :3])


def test_absent_slots_are_alone():
    net = small()
    image, x_t, t, tokens = inputs(2, 3)
    features = net.encode(image)
    nobody = net(x_t, t, features, tokens, torch.zeros(2, 3, dtype=torch.bool))
    for r in range(3):
        alone = net(x_t[:, r : r + 1], t[:, r : r + 1], features, tokens[:, r : r + 1])
        assert (nobody.distance[:, r] - alone.distance[:, 0]).abs().max() < 1e-5


def test_new_attention_and_new_network_change_nothing():
    h = draw(6, 16, 4, 4)
    assert torch.equal(RaterAttention(16)(h, torch.ones(2, 3, dtype=torch.bool)), h)
    fresh = UNet(4, widths=(8, 16, 24))
    image, x_t, t, tokens = inputs()
    out = fresh(x_t, t, fresh.encode(image), tokens)
    assert out.distance.abs().max() == 0 and out.logit.abs().max() == 0


def test_one_image_serves_several_items():
    net = small()
    image, x_t, t, tokens = inputs(6, 2)
    features = net.encode(image[:2])
    repeated = tuple(f.repeat_interleave(3, 0) for f in features)
    assert gap(net(x_t, t, features, tokens), net(x_t, t, repeated, tokens)) < 1e-5


def test_step_rater_and_image_are_all_heard():
    net = small()
    image, x_t, t, tokens = inputs(2, 3)
    base = net(x_t, t, net.encode(image), tokens).distance
    others = [net(x_t, (t + 300) % T, net.encode(image), tokens), net(x_t, t, net.encode(1 - image), tokens), net(x_t, t, net.encode(image), tokens + 1)]
    assert all((o.distance - base).abs().max() > 1e-3 for o in others)


def test_denoiser_is_the_folded_forward():
    net = small()
    image, x_t, t, tokens = inputs(2, 3)
    features = net.encode(image)
    folded = net.denoiser(features, tokens)(x_t.flatten(0, 1), t.flatten())
    assert torch.equal(folded, net(x_t, t, features, tokens).distance.clamp(-1, 1).flatten(0, 1))
    far = net.denoiser(features, tokens)(100 * x_t.flatten(0, 1), t.flatten())
    assert net(100 * x_t, t, features, tokens).distance.abs().max() > 1 and far.abs().max() <= 1


def test_every_weight_learns():
    net = small().train()
    image, x_t, t, tokens = inputs(2, 3)
    features = net.encode(image)
    out = net(x_t, t, features, tokens)
    (out.distance.square().mean() + out.logit.square().mean() + net.presence(features, tokens).square().mean()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_inference_equals_training_mode():
    net = small()
    image, x_t, t, tokens = inputs()
    with_grad = net(x_t, t, net.encode(image), tokens)
    with torch.inference_mode():
        without = net(x_t, t, net.encode(image), tokens)
    assert gap(with_grad, without) < 1e-6


def test_weights_travel():
    a, b = small(), UNet(4, widths=(8, 16, 24)).eval()
    b.load_state_dict(a.state_dict())
    image, x_t, t, tokens = inputs()
    assert gap(a(x_t, t, a.encode(image), tokens), b(x_t, t, b.encode(image), tokens)) == 0


def test_network_refuses_with_a_sentence():
    net = small()
    image, x_t, t, tokens = inputs(2, 3)
    with pytest.raises(ValueError, match=r"1 channel\(s\); got 3"):
        net.encode(image.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="encode the image at the size of the maps"):
        net(x_t, t, net.encode(torch.rand(2, 1, 32, 32)), tokens)
    with pytest.raises(ValueError, match="whole number of cases for each image"):
        net(x_t, t, net.encode(torch.rand(3, 1, 16, 16)), tokens)
    with pytest.raises(IndexError, match=r"0\.\.5 \(4 raters, null, consensus\)"):
        net.tokens(torch.tensor([6]))
    with pytest.raises(ValueError, match="multiples of 8"):
        UNet(4, widths=(10, 16, 24))


def test_tokens_know_their_rows():
    tokens = RaterTokens(4, 8)
    assert (tokens.null, tokens.consensus) == (4, 5) and tokens(torch.tensor([[0, 4, 5]])).shape == (1, 3, 8)


def test_time_embedding_tells_all_steps_apart():
    codes = time_embedding(torch.arange(T), T)
    assert codes.shape == (T, 64) and torch.cdist(codes, codes).add(torch.eye(T) * 9).min() > 0.01
    assert torch.allclose(time_embedding(torch.tensor([5]), 10), time_embedding(torch.tensor([500]), 1000))


def test_encoder_alone():
    assert [tuple(f.shape) for f in ImageEncoder(1, (8, 16, 24))(torch.rand(2, 1, 32, 32))] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 24, 4, 4)]


# --- other people's networks

def test_diffusers_network_fits():
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(sample_size=16, in_channels=2, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")).eval()
    image, x_t, t = torch.rand(2, 1, 16, 16), draw(4, 1, 16, 16), torch.tensor([0, 5, 500, 999])
    out = borrowed_denoiser(net, image)(x_t, t)
    direct = net(torch.cat([x_t, image.repeat_interleave(2, 0)], 1), t).sample.clamp(-1, 1)
    assert torch.equal(out, direct) and out.shape == x_t.shape


def test_monai_network_fits():
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.DiffusionModelUNet(spatial_dims=2, in_channels=2, out_channels=1, channels=(8, 16), attention_levels=(False, False), num_res_blocks=1, norm_num_groups=4, num_head_channels=8).eval()
    image, x_t, t = torch.rand(2, 1, 16, 16), draw(2, 1, 16, 16), torch.tensor([3, 999])
    out = borrowed_denoiser(net, image)(x_t, t)
    assert torch.equal(out, net(torch.cat([x_t, image], 1), t).clamp(-1, 1))
