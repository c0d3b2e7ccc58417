"""Votes, kappa, alpha and STAPLE: edges, identities, the reference filter, messages."""
import itertools

import numpy as np
import pytest
import torch

from calidiff_nb.raters.agreement import (bootstrap_weights, disagreement_map, dispute_band, em_step, fleiss_kappa, given_votes, krippendorff_alpha,
                                          majority_vote, pairwise_dice, soft_vote, staple, staple_intervals, vote_entropy, vote_patterns)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def discs(n, r, k=1, size=32, seed=0):
    g = rng(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    c = size / 2 + 2 * torch.randn(2, n, r, k, 1, 1, generator=g)
    radius = size / 4 + 1.5 * torch.randn(n, r, k, 1, 1, generator=g)
    return ((y - c[0]) ** 2 + (x - c[1]) ** 2 < radius**2).to(torch.uint8)


def panel(seed=0, n=6, r=4, k=2):
    masks, present = discs(n, r, k, seed=seed), torch.ones(n, r, dtype=torch.bool)
    present[0, 1] = present[2, 3] = present[3, 0] = False
    return masks * present[:, :, None, None, None], present


ON_MAPS = [soft_vote, majority_vote, disagreement_map, vote_entropy]


@pytest.mark.parametrize("f", ON_MAPS + [fleiss_kappa, krippendorff_alpha])
def test_absent_equals_removed_and_what_his_slot_holds_is_never_read(f):
    masks, present = panel()
    junk = torch.where(present[:, :, None, None, None], masks, (torch.rand(masks.shape, generator=rng(1)) < 0.5).to(torch.uint8))
    assert torch.equal(f(masks, present), f(junk, present))
    one = present.clone()
    one[:] = torch.tensor([True, False, True, True])
    assert torch.allclose(f(masks, one).double(), f(masks[:, [0, 2, 3]]).double())


@pytest.mark.parametrize("f", ON_MAPS + [fleiss_kappa, krippendorff_alpha])
def test_order_of_raters_is_irrelevant(f):
    masks, present = panel()
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(f(masks, present).double(), f(masks[:, order], present[:, order]).double(), atol=1e-7)


def test_tie_rules_differ_on_ties_only():
    masks = discs(5, 4)
    fg, bg = majority_vote(masks, ties="foreground"), majority_vote(masks, ties="background")
    assert torch.equal(fg != bg, soft_vote(masks) == 0.5) and (fg != bg).any()


def test_a_tie_depends_on_who_is_present():
    masks = torch.tensor([1, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    assert majority_vote(masks).item() == 0
    assert majority_vote(masks, torch.tensor([[True, True, False]])).item() == 1


def test_disagreement_is_the_share_of_differing_pairs():
    masks = (torch.rand(2, 5, 1, 6, 6, generator=rng()) < 0.5).to(torch.uint8)
    pairs = [(masks[:, i] != masks[:, j]).float() for i, j in itertools.combinations(range(5), 2)]
    assert torch.allclose(disagreement_map(masks), torch.stack(pairs).mean(0))


def test_float_and_bool_masks_are_accepted():
    masks = discs(2, 3)
    for other in (masks.float(), masks.bool(), masks.long()):
        assert torch.equal(soft_vote(other), soft_vote(masks))


@pytest.mark.parametrize("f", [given_votes, soft_vote, majority_vote, staple, pairwise_dice, fleiss_kappa])
@pytest.mark.parametrize("bad", [lambda m: m * 255, lambda m: m * 0.5, lambda m: m.float() - 1, lambda m: m * float("nan"), lambda m: -m.long(), lambda m: m.long() * 256])
def test_wrong_values_are_refused(f, bad):
    with pytest.raises(ValueError, match="only 0 and 1"):
        f(bad(discs(2, 3)))


def test_nobody_present_is_refused_and_the_case_is_named():
    present = torch.ones(3, 2, dtype=torch.bool)
    present[1] = False
    with pytest.raises(ValueError, match=r"cases \[1\]"):
        staple(discs(3, 2), present)


def test_unknown_tie_rule_is_refused():
    with pytest.raises(ValueError, match="'foreground' or 'background'"):
        majority_vote(discs(1, 2), ties="coin")


def test_pairwise_dice_empty_policy_and_absent_rater():
    masks = torch.zeros(1, 3, 1, 4, 4, dtype=torch.uint8)
    masks[0, 0, 0, 0, 0] = 1
    d = pairwise_dice(masks, empty=0.25)[0, :, :, 0]
    assert d[1, 2] == 0.25 and d[0, 1] == 0 and d[0, 0] == 1
    present = torch.tensor([[True, True, False]])
    d = pairwise_dice(masks, present)[0, :, :, 0]
    assert d[2].isnan().all() and d[:, 2].isnan().all() and not d[:2, :2].isnan().any()


# kappa and alpha against the slow definitions

def slow_alpha(values):
    """Krippendorff by his coincidence matrix; values: (raters, units) with NaN for missing."""
    o = np.zeros((2, 2))
    for unit in values.T:
        v = unit[~np.isnan(unit)].astype(int)
        if len(v) < 2:
            continue
        for i, j in itertools.permutations(range(len(v)), 2):
            o[v[i], v[j]] += 1 / (len(v) - 1)
    n = o.sum(0)
    return 1 - (n.sum() - 1) * o[0, 1] / (n[0] * n[1])


def test_alpha_equals_the_coincidence_matrix_with_missing_answers():
    masks, present = panel(seed=3, n=5, k=1)
    values = torch.where(present[:, :, None, None, None], masks.float(), torch.nan)
    flat = values.permute(1, 0, 2, 3, 4).reshape(4, -1).numpy()
    assert abs(krippendorff_alpha(masks, present).item() - slow_alpha(flat)) < 1e-6


def test_alpha_of_krippendorffs_own_example():
    a, b = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert abs(krippendorff_alpha(torch.tensor([a, b]).view(1, 2, 1, 1, 10)).item() - (1 - 19 * 4 / 84)) < 1e-6


def test_kappa_equals_fleiss_by_counts():
    masks = (torch.rand(1, 6, 1, 5, 8, generator=rng()) < 0.4).to(torch.uint8)
    yes = masks.sum(1).flatten().double()
    agree = ((yes**2 + (6 - yes) ** 2 - 6) / 30).mean()
    p = yes.sum() / (6 * 40)
    chance = p**2 + (1 - p) ** 2
    assert abs(fleiss_kappa(masks).item() - ((agree - chance) / (1 - chance)).item()) < 1e-6


def test_kappa_and_alpha_say_nan_where_nothing_varies_and_skip_single_raters():
    empty = torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8)
    assert fleiss_kappa(empty).isnan().all() and krippendorff_alpha(empty, per_image=True).isnan().all()
    masks = discs(3, 3)
    present = torch.ones(3, 3, dtype=torch.bool)
    present[1, 1:] = False
    keep = [0, 2]
    assert torch.allclose(fleiss_kappa(masks, present), fleiss_kappa(masks[keep]))
    per_image = fleiss_kappa(masks, present, per_image=True)
    assert per_image.shape == (3, 1) and per_image.isnan().flatten().tolist() == [False, True, False]


# patterns and band

@pytest.mark.parametrize("r", [1, 4, 12, 13, 30, 70])
def test_patterns_rebuild_the_masks_for_any_number_of_raters(r):
    votes = (torch.rand(2, r, 2, 7, 5, generator=rng(r)) < 0.5).to(torch.uint8)
    patterns, codes = vote_patterns(votes)
    assert torch.equal(patterns[codes].movedim(-1, 1), votes)
    assert len(patterns) == len(patterns.unique(dim=0)) == codes.unique().numel()


def test_band_is_empty_where_nobody_marked_and_covers_what_a_lapse_disputes():
    everybody = torch.ones(1, 2, dtype=torch.bool)
    assert not dispute_band(torch.zeros(1, 2, 1, 9, 9, dtype=torch.uint8), everybody).any()
    masks = torch.zeros(1, 2, 1, 20, 20, dtype=torch.uint8)
    masks[0, 0, 0, 5:15, 5:15] = 1
    assert (dispute_band(masks, everybody, 1)[0, 0] >= masks[0, 0, 0].bool()).all()
    assert not dispute_band(masks, torch.tensor([[True, False]]), 1)[0, 0, 8, 8]       # alone he disputes only his border


@pytest.mark.parametrize("width", [0, 1, 2, 3, 5, 8, 40])
def test_band_grows_by_a_square_of_any_width(width):
    votes = (torch.rand(3, 2, 2, 21, 13, generator=rng(width)) < 0.02).to(torch.uint8)
    pool = torch.nn.functional.max_pool2d
    union, outside = votes.amax(1).float(), 1 - votes.amin(1).float()
    want = (pool(union, 2 * width + 1, 1, width) > 0) & (pool(outside, 2 * width + 1, 1, width) > 0) if width < 40 else union.amax((2, 3), keepdim=True).expand_as(union) > 0
    assert torch.equal(dispute_band(votes, torch.ones(3, 2, dtype=torch.bool), width), want)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_band_shrinks_the_intersection_by_as_much(width):
    votes = torch.ones(1, 2, 1, 25, 25, dtype=torch.uint8)
    votes[..., 12, 12] = 0                                                 # one hole, seen by both
    band = dispute_band(votes, torch.ones(1, 2, dtype=torch.bool), width)[0, 0]
    assert band.sum() == (2 * width + 1) ** 2 and band[12 - width, 12 + width]


# STAPLE

def itk(masks):
    sitk = pytest.importorskip("SimpleITK")
    f = sitk.STAPLEImageFilter()
    f.SetForegroundValue(1)
    q = sitk.GetArrayFromImage(f.Execute([sitk.GetImageFromArray(m) for m in masks.numpy()]))
    return q, np.array(f.GetSensitivity()), np.array(f.GetSpecificity())


@pytest.mark.parametrize("r", [2, 3, 4, 7])
def test_staple_equals_simpleitk(r):
    masks = discs(12, r, seed=r)
    ours = staple(masks, per_image=True, beta=None, band=None)
    for i in range(12):
        q, a, b = itk(masks[i, :, 0])
        assert np.abs(q - ours.probability[i, 0].numpy()).max() < 1e-5
        assert np.abs(a - ours.sensitivity[i, :, 0].numpy()).max() < 1e-5
        assert np.abs(b - ours.specificity[i, :, 0].numpy()).max() < 1e-5


def drawn(alpha, beta, pixels=(320, 320), share=0.3, seed=0):
    g = rng(seed)
    truth = torch.rand(1, 1, *pixels, generator=g) < share
    a, b = (torch.tensor(x).view(-1, 1, 1, 1) for x in (alpha, beta))
    return truth, (torch.rand(1, len(alpha), 1, *pixels, generator=g) < torch.where(truth, a, 1 - b)).to(torch.uint8)


@pytest.mark.parametrize("alpha,beta", [([0.95, 0.85, 0.7], [0.98, 0.9, 0.8]), ([0.6, 0.7, 0.8, 0.9, 0.75], [0.9, 0.9, 0.8, 0.95, 0.7])])
def test_staple_recovers_the_rates_put_in(alpha, beta):
    truth, masks = drawn(alpha, beta)
    found = staple(masks, band=None, learn_prior=True)
    assert (found.sensitivity[:, 0] - torch.tensor(alpha)).abs().max() < 0.02
    assert (found.specificity[:, 0] - torch.tensor(beta)).abs().max() < 0.02
    errors = ((found.probability > 0.5) != truth).float().mean()
    assert errors < ((majority_vote(masks) == 1) != truth).float().mean()


def test_staple_handles_structures_apart():
    masks, present = panel(seed=5)
    both = staple(masks, present)
    for k in range(2):
        one = staple(masks[:, :, [k]], present)
        assert torch.allclose(both.probability[:, [k]], one.probability, atol=1e-5)
        assert torch.allclose(both.youden[:, [k]], one.youden, atol=1e-5)


@pytest.mark.parametrize("per_image", [False, True])
def test_staple_absent_equals_removed(per_image):
    masks = discs(6, 4, seed=2)
    present = torch.ones(6, 4, dtype=torch.bool)
    present[:, 2] = False
    junk = masks.clone()
    junk[:, 2] = 1
    a, b = staple(junk, present, per_image=per_image), staple(masks[:, [0, 1, 3]], per_image=per_image)
    assert torch.allclose(a.probability, b.probability, atol=1e-6)
    assert torch.allclose(a.sensitivity[..., [0, 1, 3], :], b.sensitivity, atol=1e-6)
    assert a.sensitivity[..., 2, :].isnan().all()


def test_staple_per_image_does_not_depend_on_the_neighbours():
    masks = discs(8, 3, seed=9)
    together = staple(masks, per_image=True)
    for i in range(8):
        assert torch.equal(staple(masks[[i]], per_image=True).probability[0], together.probability[i])


def test_staple_many_raters_and_order():
    masks = discs(3, 15, seed=4)
    order = torch.randperm(15, generator=rng())
    a, b = staple(masks), staple(masks[:, order])
    assert torch.allclose(a.probability, b.probability, atol=1e-5) and torch.allclose(a.youden[order], b.youden, atol=1e-5)


def test_staple_turn_never_lowers_the_likelihood():
    _, masks = drawn([0.9, 0.8, 0.6], [0.9, 0.7, 0.8], pixels=(40, 40))
    patterns, codes = vote_patterns(masks)
    y = patterns.double()
    counts = torch.bincount(codes.flatten(), minlength=len(patterns)).double().view(1, 1, 1, -1)
    a, b = torch.full((2, 1, 3, 1), 0.7).double()
    prior, present, last = torch.full((1, 1, 1), 0.4).double(), torch.ones(1, 1, 3, dtype=torch.bool), -torch.inf
    for _ in range(20):
        inside = (torch.where(y == 1, a[0, :, 0], 1 - a[0, :, 0])).prod(1) * 0.4
        outside = (torch.where(y == 1, 1 - b[0, :, 0], b[0, :, 0])).prod(1) * 0.6
        now = (counts.flatten() * (inside + outside).log()).sum()
        assert now >= last - 1e-9
        last = now
        q, a, b = em_step(counts, prior, y, present, a, b)
        assert torch.allclose(q.flatten(), inside / (inside + outside))


def test_staple_one_two_and_no_marks_warn():
    masks = discs(4, 3)
    assert "one rater" in staple(masks[:, :1]).warnings[0]
    assert torch.equal((staple(masks[:, :1]).probability > 0.5).to(torch.uint8), masks[:, 0])
    assert any("two raters" in w for w in staple(masks[:, :2]).warnings)
    empty = staple(masks * 0)
    assert any("nobody marked" in w for w in empty.warnings) and empty.probability.max() == 0 and not empty.sensitivity.isnan().any()
    assert staple(masks * 0, beta=None).sensitivity.isnan().all()
    assert staple(masks).warnings == ()


def test_staple_all_full_without_band_is_full():
    full = staple(torch.ones(1, 3, 1, 6, 6, dtype=torch.uint8), band=None, beta=None)
    assert full.probability.min() > 0.999 and not full.probability.isnan().any()


def test_adversarial_majority_is_clipped_and_said():
    _, masks = drawn([0.95, 0.9, 0.9], [0.95, 0.9, 0.9])
    liars = torch.cat([masks[:, :1], 1 - masks[:, 1:]], 1)
    result = staple(liars, band=None)
    assert result.youden[0, 0] == 0 and result.sensitivity[0, 0] + result.specificity[0, 0] < 1
    assert any("raters [0]" in w and "worse than chance" in w for w in result.warnings)


def test_staple_stops_and_says_so():
    result = staple(discs(3, 3), max_iterations=1, tolerance=0.0)
    assert not result.converged and result.iterations == 1 and any("still moving" in w for w in result.warnings)


def test_staple_prior_pulls_towards_its_mode_and_is_refused_below_one():
    masks = discs(2, 3)
    for beta, mode in [((1e9, 1e9), 0.5), ((9e8 + 1, 1e8 + 1), 0.9)]:
        strong = staple(masks, beta=beta)
        assert (strong.sensitivity - mode).abs().max() < 1e-4 and (strong.specificity - mode).abs().max() < 1e-4
    with pytest.raises(ValueError, match="beta"):
        staple(masks, beta=(0.5, 2.0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        staple(masks, foreground=torch.zeros(2, 1))


def test_outside_the_band_the_unanimous_answer_stands():
    masks = discs(3, 3)
    result = staple(masks, band=1)
    calm = ~dispute_band(masks, torch.ones(3, 3, dtype=torch.bool), 1)
    assert torch.equal(result.probability[calm], masks[:, 0].float()[calm])


# intervals

def test_weights_keep_patients_together_and_repeat_with_the_seed():
    w = bootstrap_weights(30, ["a", "b", "a", "c"], rng(1))
    assert torch.equal(w[:, 0], w[:, 2]) and (w[:, [0, 1, 3]].sum(1) == 3).all()
    assert torch.equal(w, bootstrap_weights(30, ["a", "b", "a", "c"], rng(1)))
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_weights(10, [])


def test_a_replicate_equals_staple_on_the_repeated_cases():
    masks = discs(5, 3, seed=8)
    w = bootstrap_weights(1, 5, rng(3))[0].long()
    once = staple_intervals(masks, n=1, generator=rng(3), tolerance=1e-9)
    again = staple(masks.repeat_interleave(w, 0), tolerance=1e-9)
    assert torch.allclose(once.sensitivity.low, again.sensitivity, atol=1e-5)
    assert torch.equal(once.youden.low, once.youden.high)


def test_intervals_hold_the_estimate_and_shrink():
    masks = discs(60, 3, seed=8)
    wide, narrow = (staple_intervals(m, n=60, generator=rng()) for m in (masks[:6], masks))
    whole = staple(masks).sensitivity
    assert ((narrow.sensitivity.low <= whole) & (whole <= narrow.sensitivity.high)).all()
    assert (wide.youden.high - wide.youden.low).mean() > (narrow.youden.high - narrow.youden.low).mean()
    with pytest.raises(ValueError, match="level"):
        staple_intervals(masks, level=95.0)
