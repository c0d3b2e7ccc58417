"""Reliability: golden values, identities, absent raters, strata, temperature, torchmetrics, messages."""
import math

import pytest
import torch

from calidiff_nb.raters.agreement import soft_vote
from calidiff_nb.raters.reliability import (apply_temperature, bin_edges, bin_table, brier, brier_parts, ece, fit_temperature, lesion_area, mr_ece,
                                            reliability_curve, stratify_by_area)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(b=20, r=4, k=2, size=16, seed=0):
    """Claims that are true by construction: each rater marks each pixel with that probability."""
    g = rng(seed)
    p = torch.rand(b, k, size, size, generator=g)
    return p, (torch.rand(b, r, k, size, size, generator=g) < p[:, None]).to(torch.uint8)


def test_golden_ece_on_four_pixels():
    p = torch.tensor([0.05, 0.15, 0.15, 1.0]).view(1, 1, 2, 2)
    masks = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]).view(1, 2, 1, 2, 2)
    assert abs(mr_ece(p, masks).item() - (2 * 0.05 + 4 * 0.1) / 8) < 1e-6
    assert abs(ece(p, masks[:, 0]).item() - (0.05 + 2 * 0.35) / 4) < 1e-6
    assert abs(brier(p, masks).item() - (2 * 0.05**2 + 3 * 0.15**2 + 0.85**2) / 8) < 1e-6


def test_perfect_and_worst_claims():
    _, masks = scene(r=1)
    truth = masks[:, 0].float()
    assert ece(truth, masks[:, 0]).max() == 0 and brier(truth, masks).max() == 0
    assert ece(1 - truth, masks[:, 0]).min() == 1 and brier(1 - truth, masks).min() == 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_honest_claims_are_reliable_and_sharpened_ones_are_not(adaptive):
    p, masks = scene(b=60)
    assert mr_ece(p, masks, adaptive=adaptive).max() < 0.01
    assert mr_ece(torch.sigmoid(3 * torch.logit(p)), masks, adaptive=adaptive).min() > 0.1


@pytest.mark.parametrize("label", [0, 1])
def test_ece_equals_torchmetrics(label):
    tm = pytest.importorskip("torchmetrics.functional.classification")
    p, masks = scene(k=1)
    p = torch.sigmoid(2 * torch.logit(p)).clamp(max=1 - 1e-6)              # a claim of 1 has its own bin there
    for bins in (5, 10, 15):
        theirs = tm.binary_calibration_error(p.flatten(), masks[:, label].flatten().int(), n_bins=bins, norm="l1")
        assert abs(theirs.item() - ece(p, masks[:, label], bins).item()) < 1e-5


def test_stacked_labels_equal_the_repeated_map():
    p, masks = scene()
    flat = p[:, None].expand_as(masks).transpose(1, 2).flatten(2, 3)
    assert torch.allclose(mr_ece(p, masks), ece(flat, masks.transpose(1, 2).flatten(2, 3)))


@pytest.mark.parametrize("f", [mr_ece, brier, lambda p, m, a=None: brier_parts(p, m, a).floor, lambda p, m, a=None: reliability_curve(p, m, a, n=5, generator=rng()).frequency, fit_temperature])
def test_absent_equals_removed_order_is_irrelevant_and_the_slot_is_not_read(f):
    p, masks = scene()
    present = torch.tensor([[True, False, True, True]]).expand(20, 4)
    junk = masks.clone()
    junk[:, 1] = 1
    assert torch.allclose(f(p, junk, present), f(p, masks[:, [0, 2, 3]]), atol=1e-6)
    assert torch.allclose(f(p, masks), f(p, masks[:, [3, 1, 0, 2]]), atol=1e-6)


def test_where_equals_cutting_the_pixels_out():
    p, masks = scene(k=1)
    where = torch.zeros_like(p, dtype=torch.bool)
    where[..., 3:9, :] = True
    assert torch.allclose(mr_ece(p, masks, where=where), mr_ece(p[..., 3:9, :], masks[..., 3:9, :]))
    assert torch.allclose(brier(p, masks, where=where), brier(p[..., 3:9, :], masks[..., 3:9, :]))
    a, b = brier_parts(p, masks, where=where), brier_parts(p[..., 3:9, :], masks[..., 3:9, :])
    assert all(torch.allclose(getattr(a, n), getattr(b, n)) for n in ("brier", "reliability", "resolution", "within", "floor"))
    assert torch.allclose(fit_temperature(p, masks, where=where), fit_temperature(p[..., 3:9, :], masks[..., 3:9, :]), rtol=1e-4)
    assert brier(p, masks, where=where & False).isnan().all()


def test_bins_hold_their_left_edge_and_the_last_holds_one():
    p = torch.tensor([0.0, 0.5, 0.5, 1.0]).view(1, 1, 1, 4)
    edges = torch.tensor([0.0, 0.5, 1.0])
    assert bin_table(p, torch.ones(1, 1, 1, 1, 4), edges=edges)[0, 0, :, 0].tolist() == [1, 3]


def test_adaptive_bins_are_balanced_and_never_split_equal_claims():
    p, _ = scene()
    edges = bin_edges(p, 8, adaptive=True)
    held = torch.histogram(p.flatten().double(), edges).hist
    assert len(edges) == 9 and held.max() - held.min() <= 2
    few = bin_edges((p > 0.7).float(), 8, adaptive=True)
    assert few.tolist() == [0, 1] and (few.diff() > 0).all()


def test_brier_is_proper():
    p, masks = scene(b=60)
    base = brier(p, masks).mean()
    for wrong in (p.sqrt(), p**2, torch.sigmoid(2 * torch.logit(p)), torch.sigmoid(torch.logit(p) / 2), torch.full_like(p, 0.5)):
        assert brier(wrong, masks).mean() > base


def test_murphys_identity_with_the_remainder_computed_apart():
    p, masks = scene(k=1)
    q = brier_parts(p, masks, bins=7)
    index = (p.double() * 7).floor().clamp(max=6)
    y, n = masks.double(), masks.numel()
    within = 0.0
    for m in range(7):
        inside = index == m
        gap = p.double()[inside] - p.double()[inside].mean()
        answers = y.transpose(0, 1)[:, inside]
        within += (4 * (gap**2).sum() - 2 * (gap * (answers - answers.mean())).sum()) / n
    assert abs(q.within.item() - within.item()) < 1e-6
    assert torch.allclose(q.brier, q.reliability - q.resolution + q.uncertainty + q.within)
    assert torch.allclose(q.brier, ((p[:, None] - masks) ** 2).double().mean(), atol=1e-6)


def test_nothing_gets_below_the_floor_and_the_vote_is_on_it():
    p, masks = scene()
    present = torch.ones(20, 4, dtype=torch.bool)
    present[::3, 2] = False
    vote = brier_parts(soft_vote(masks, present), masks, present)
    assert torch.allclose(vote.brier, vote.floor, atol=1e-6)
    assert (brier_parts(p, masks, present).brier > vote.floor).all()


def test_curve_holds_ece_intervals_and_empty_bins():
    p, masks = scene(k=1)
    c = reliability_curve(p * 0.5, masks, n=200, generator=rng())
    assert c.answers[0, 5:].sum() == 0 and c.frequency[0, 6:].isnan().all()
    gap = (c.claim - c.frequency).abs().nan_to_num(0)
    assert torch.allclose(c.ece, (gap * c.answers).sum(1) / c.answers.sum(1))
    full = c.answers[0] > 0
    assert ((c.low <= c.frequency) & (c.frequency <= c.high))[0, full].all()
    again = reliability_curve(p * 0.5, masks, n=200, generator=rng())
    assert torch.equal(c.low[0, full], again.low[0, full])


def test_curve_interval_respects_patients():
    p, masks = scene(b=8, k=1)
    p, masks = p.repeat_interleave(6, 0), masks.repeat_interleave(6, 0)      # six copies of each patient's slice
    names = [f"p{i // 6}" for i in range(48)]
    apart, together = (reliability_curve(p, masks, n=200, generator=rng(), groups=g) for g in (None, names))
    assert (together.high - together.low).mean() > 1.5 * (apart.high - apart.low).mean()


@pytest.mark.parametrize("factor", [3.0, 0.4])
def test_temperature_takes_back_what_was_multiplied(factor):
    p, masks = scene(b=60)
    bent = torch.sigmoid(factor * torch.logit(p, eps=1e-6))
    t = fit_temperature(bent, masks)
    assert ((t / factor - 1).abs() < 0.05).all()
    assert torch.allclose(apply_temperature(bent, t), p, atol=0.02)


def test_temperature_is_where_the_likelihood_peaks():
    p, masks = scene(k=1)
    bent = torch.sigmoid(2 * torch.logit(p, eps=1e-6)).double()
    t = fit_temperature(bent, masks)

    def loss(x):
        q = apply_temperature(bent, t * x)
        return -(masks * q[:, None].log() + (1 - masks.double()) * (1 - q[:, None]).log()).mean()

    assert loss(1.0) < loss(0.98) and loss(1.0) < loss(1.02)


def test_temperature_stays_in_bounds_and_checks_its_input():
    _, masks = scene(k=1, r=1)
    sure = masks[:, 0].float() * 0.8 + 0.1
    assert 1 / 50 * 0.99 < fit_temperature(sure, masks).item() < 0.03
    with pytest.raises(ValueError, match="no pixel is left"):
        fit_temperature(sure, masks, where=sure > 2)
    with pytest.raises(ValueError, match="positive"):
        apply_temperature(sure, torch.tensor([-1.0]))


def test_area_counts_present_raters_in_mm():
    masks = torch.zeros(2, 2, 1, 4, 4, dtype=torch.uint8)
    masks[0, 0, 0, :2, :2] = 1
    masks[1, 0, 0] = masks[1, 1, 0] = 1
    spacing = torch.tensor([[0.5, 3.0], [1.0, 2.0]])
    assert lesion_area(masks, None, spacing).flatten().tolist() == [3, 32]
    assert lesion_area(masks, torch.tensor([[True, False], [True, True]]), spacing).flatten().tolist() == [6, 32]


def test_strata_part_the_cases():
    areas = torch.tensor([0.0, 5.0, 10.0, 10.1, 99.0])
    strata = stratify_by_area(areas, (10, 50))
    assert {n: s.nonzero().flatten().tolist() for n, s in strata.items()} == {"empty": [0], "up to 10 mm²": [1, 2], "10-50 mm²": [3], "over 50 mm²": [4]}
    assert torch.stack(list(strata.values())).sum(0).tolist() == [1] * 5
    for bad in ((50, 10), (0, 10), (10, 10)):
        with pytest.raises(ValueError, match="rise"):
            stratify_by_area(areas, bad)


@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan, math.inf])
def test_claims_outside_the_range_are_refused(bad):
    p, masks = scene(b=2, k=1)
    p[0, 0, 0, 0] = bad
    for f in (mr_ece, brier, brier_parts, reliability_curve):
        with pytest.raises(ValueError, match="within"):
            f(p, masks)


def test_other_messages():
    p, masks = scene(b=2, k=1)
    with pytest.raises(ValueError, match="bins"):
        mr_ece(p, masks, bins=0)
    with pytest.raises(ValueError, match="only 0 and 1"):
        mr_ece(p, masks * 3)
    with pytest.raises(ValueError, match="level"):
        reliability_curve(p, masks, level=95.0)
    with pytest.raises(ValueError, match="no pixel"):
        bin_edges(p, adaptive=True, where=p > 2)
