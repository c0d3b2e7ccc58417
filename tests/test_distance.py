"""Signed distance: exact against SciPy, the half pixel, the truncation, the edges."""
import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter

from calidiff_nb.raters.distance import from_network, inside, signed_distance, to_network


def outside_oracle(mask, reach):
    """What SciPy says of one mask."""
    m = mask.numpy().astype(bool)
    if not m.any() or m.all():
        return torch.full(mask.shape, -reach if m.all() else reach)
    d = np.where(m, 0.5 - distance_transform_edt(m), distance_transform_edt(~m) - 0.5)
    return torch.from_numpy(d.clip(-reach, reach)).float()


def blobs(n, h, w, share, seed=0):
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(n, h, w)), (0, 2, 2))
    return torch.from_numpy(noise > np.quantile(noise, 1 - share))


@pytest.mark.parametrize("reach", [0.5, 1.0, 3.7, 8.0, 24.0, 64.0])
@pytest.mark.parametrize("h, w", [(40, 40), (17, 33), (1, 20), (20, 1), (3, 5)])
def test_equals_scipy(h, w, reach):
    for share in (0.02, 0.5, 0.97):
        masks = blobs(6, h, w, share)
        wanted = torch.stack([outside_oracle(m, reach) for m in masks])
        assert (signed_distance(masks, reach) - wanted).abs().max() <= 1e-6 * max(1, reach)


def test_a_lonely_pixel_by_hand():
    m = torch.zeros(5, 5)
    m[2, 2] = 1
    d = signed_distance(m)
    assert d[2, 2] == -0.5 and d[2, 3] == 0.5 and d[2, 4] == 1.5
    assert d[0, 0] == pytest.approx(8**0.5 - 0.5)


def test_image_border_is_no_boundary():
    m = torch.zeros(12, 12)
    m[:, :6] = 1
    d = signed_distance(m)
    assert torch.equal(d, (torch.arange(12.0) - 5.5).expand(12, 12))          # the left border pulls nothing towards zero


def test_turning_the_mask_round_turns_the_sign():
    m = blobs(8, 30, 30, 0.4)
    assert torch.equal(signed_distance(~m), -signed_distance(m))


def test_symmetries_of_the_grid():
    m = blobs(4, 30, 22, 0.3)
    d = signed_distance(m)
    assert torch.equal(signed_distance(m.flip(1)), d.flip(1)) and torch.equal(signed_distance(m.transpose(1, 2)), d.transpose(1, 2))


def test_neighbours_differ_by_one_pixel_at_most():
    d = signed_distance(blobs(8, 30, 30, 0.3))
    assert d.diff(dim=1).abs().max() <= 1 + 1e-5 and d.diff(dim=2).abs().max() <= 1 + 1e-5


def test_empty_full_and_batches_side_by_side():
    m = torch.zeros(2, 3, 4, 9, 9, dtype=torch.uint8)
    m[0, 1, 2] = 1
    m[1, 2, 3, 4, 4] = 1
    d = signed_distance(m, 3.0)
    assert d.shape == m.shape and (d[0, 1, 2] == -3).all() and (d[0, 0, 0] == 3).all()
    assert torch.equal(d[1, 2, 3], signed_distance(m[1, 2, 3], 3.0))          # a neighbour in the batch changes nothing


def test_no_mask_at_all():
    assert signed_distance(torch.zeros(0, 4, 6, 6)).shape == (0, 4, 6, 6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64])
def test_any_dtype_in_float32_out(dtype):
    m = blobs(2, 20, 20, 0.4)
    d = signed_distance(m.to(dtype))
    assert d.dtype == torch.float32 and torch.equal(d, signed_distance(m)) and torch.equal(inside(d), m)


def test_a_strided_mask_is_read_and_left_alone():
    m = blobs(2, 20, 24, 0.4).to(torch.uint8)
    strided, before = m[:, ::2, ::3], m.clone()
    assert torch.equal(signed_distance(strided), signed_distance(strided.contiguous())) and torch.equal(m, before)


@pytest.mark.parametrize("reach", [2.0, 5.0])
def test_reach_only_truncates(reach):
    m = blobs(4, 40, 40, 0.2)
    assert torch.equal(signed_distance(m, reach), signed_distance(m, 30.0).clamp(-reach, reach))


def test_two_pixels_larger_is_two_less():
    y, x = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    true, larger = (signed_distance(torch.hypot(y, x) < r) for r in (14, 16))
    band = true.abs() < 4
    assert ((larger - (true - 2))[band]).abs().max() < 1 and abs((larger - true)[band].mean() + 2) < 0.1


@pytest.mark.parametrize("wrong", [torch.full((2, 4, 4), 255), torch.full((4, 4), 0.5), torch.full((4, 4), -1), torch.full((4, 4), float("nan"))])
def test_grey_masks_are_refused(wrong):
    with pytest.raises(ValueError, match="masks must be 0 or 1; got values from"):
        signed_distance(wrong)


@pytest.mark.parametrize("reach", [0.0, -1.0, 65.0, float("nan")])
def test_reach_has_bounds(reach):
    with pytest.raises(ValueError, match="reach must be 0.5 to 64 px"):
        signed_distance(torch.zeros(4, 4), reach)


@pytest.mark.parametrize("reach", [8.0, 5.0])
def test_network_range_and_back(reach):
    disc = torch.hypot(*torch.meshgrid(torch.arange(-30.0, 30), torch.arange(-30.0, 30), indexing="ij")) < 12
    d = signed_distance(disc, reach)
    x = to_network(d, reach)
    assert x.min() == -1 and x.max() == 1 and torch.allclose(from_network(x, reach), d)


@pytest.mark.gpu
def test_the_gpu_says_the_same():
    m = blobs(20, 64, 64, 0.2)
    there = signed_distance(m.cuda())
    assert there.is_cuda and torch.allclose(there.cpu(), signed_distance(m), atol=1e-6)
