"""Metrics of two masks and of two sets: golden values, identities, empty masks, absent raters, outside oracles, messages."""
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from calidiff_nb.raters.agreement import soft_vote
from calidiff_nb.raters.metrics import (Score, bootstrap_ci, ci_parts, ci_score, dice, dice_match, dice_max, diversity, ged, hm_iou, iou, mean_over_pairs, ncc,
                                        overlap_matrix, paired_ci, score, soft_dice, surface_distance)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(b, n, k=1, size=8, seed=0, share=0.5):
    return (torch.rand(b, n, k, size, size, generator=rng(seed)) < share).to(torch.uint8)


def tiny(*masks):
    """One case of 2 x 2 masks, row by row."""
    return torch.tensor(masks, dtype=torch.uint8).view(1, len(masks), 1, 2, 2)


ON_SETS = [ged, lambda s, m, p=None: ged(s, m, p, estimator="u"), hm_iou, lambda s, m, p=None: hm_iou(s, m, p, replicate=False), dice_match,
           dice_max, lambda s, m, p=None: dice_max(s, m, p, direction="raters"), lambda s, m, p=None: dice_max(s, m, p, direction="both"), ncc,
           ci_score, lambda s, m, p=None: ci_score(s, m, p, combine="harmonic"), lambda s, m, p=None: torch.cat(ci_parts(s, m, p), 1)]


# golden 2 x 2 values

@pytest.mark.parametrize("a,b,d,j", [([1, 1, 1, 0], [1, 1, 0, 0], 4 / 5, 2 / 3), ([1, 0, 0, 0], [0, 1, 0, 0], 0, 0), ([1, 1, 1, 1], [1, 1, 1, 1], 1, 1), ([1, 0, 0, 1], [0, 0, 0, 0], 0, 0)])
def test_golden_dice_and_iou(a, b, d, j):
    a, b = (torch.tensor(x).view(2, 2) for x in (a, b))
    assert abs(dice(a, b).item() - d) < 1e-6 and abs(iou(a, b).item() - j) < 1e-6
    assert abs(overlap_matrix(a[None, None, None], b[None, None, None], "dice").item() - d) < 1e-6


def test_golden_sets():
    s, y = tiny([1, 0, 0, 0], [1, 1, 0, 0]), tiny([1, 1, 0, 0], [0, 0, 0, 0])
    assert abs(ged(s, y).item() - 0.5) < 1e-6
    assert abs(ged(s, y, estimator="u").item() + 0.25) < 1e-6
    assert abs(ged(s, y, kind="dice").item() - (2 * (1 / 3 + 0 + 1 + 1) / 4 - (1 / 3) / 2 - 1 / 2)) < 1e-6
    assert hm_iou(s, y).item() == 0.5
    assert abs(dice_max(s, y).item() - (2 / 3 + 1) / 2) < 1e-6
    assert dice_max(s, y, direction="raters").item() == 0.5
    assert abs(dice_max(s, y, direction="both").item() - (5 / 6 + 1 / 2) / 2) < 1e-6
    assert dice_match(s, y).item() == 0.5
    assert diversity(y).item() == 1 and diversity(y, estimator="v").item() == 0.5


def test_golden_hungarian_with_replication():
    s, y = tiny([1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]), tiny([1, 1, 0, 0], [0, 0, 0, 0])
    assert abs(hm_iou(s, y).item() - 2.5 / 6) < 1e-6
    assert hm_iou(s, y, replicate=False).item() == 0.5


def test_matching_equals_trying_every_permutation():
    s, m = noise(4, 4, seed=1), noise(4, 4, seed=2)
    table = overlap_matrix(s, m)[:, 0]
    best = torch.stack([torch.stack([table[:, list(range(4)), list(p)].mean(-1) for p in itertools.permutations(range(4))]).amax(0)])
    assert torch.allclose(hm_iou(s, m)[:, 0], best[0], atol=1e-6)


# identities

@pytest.mark.parametrize("f", ON_SETS)
def test_order_is_irrelevant(f):
    s, m = noise(3, 6, 2, seed=1), noise(3, 4, 2, seed=2)
    assert torch.allclose(f(s, m), f(s[:, torch.randperm(6, generator=rng())], m[:, [2, 0, 3, 1]]), atol=1e-6)


@pytest.mark.parametrize("f", ON_SETS)
def test_absent_equals_removed_and_his_slot_is_never_read(f):
    s, m = noise(3, 6, 2, seed=1), noise(3, 4, 2, seed=2)
    present = torch.tensor([[True, False, True, True]]).expand(3, 4)
    m[:, 1] = 1
    assert torch.allclose(f(s, m, present), f(s, m[:, [0, 2, 3]]), atol=1e-6)


def test_absence_may_differ_between_cases():
    s, m = noise(2, 5, seed=1), noise(2, 4, seed=2)
    present = torch.tensor([[True, True, False, False], [True, True, True, True]])
    for f in ON_SETS:
        both = f(s, m, present)
        assert torch.allclose(both[0], f(s[:1], m[:1, :2])[0], atol=1e-6) and torch.allclose(both[1], f(s[1:], m[1:])[0], atol=1e-6)


def test_ged_v_is_never_negative_symmetric_and_zero_on_itself():
    s, m = noise(40, 5, seed=1), noise(40, 3, seed=2)
    assert ged(s, m).min() >= -1e-6 and torch.allclose(ged(s, m), ged(m, s), atol=1e-6) and ged(s, s).abs().max() < 1e-6


def test_ged_u_is_unbiased_and_v_is_off_by_the_two_shares():
    s, m = noise(3000, 3, size=4, seed=1), noise(3000, 4, size=4, seed=2)
    u, v = ged(s, m, estimator="u"), ged(s, m)
    assert u.mean().abs() < 4 * u.std() / math.sqrt(3000)
    assert torch.allclose(v - u, diversity(s) / 3 + diversity(m) / 4, atol=1e-5)


def test_ged_equals_the_double_loop():
    s, m = noise(20, 6, size=16, seed=1, share=0.2), noise(20, 4, size=16, seed=2, share=0.2)
    s[3], m[3], m[4, :2] = 0, 0, 0

    def d(a, b):
        union = np.logical_or(a, b).sum()
        return 1 - (np.logical_and(a, b).sum() / union if union else 1.0)

    def mean(x, y):
        return np.mean([d(a, b) for a in x for b in y])

    loop = [2 * mean(a, b) - mean(a, a) - mean(b, b) for a, b in zip(s[:, :, 0].numpy(), m[:, :, 0].numpy())]
    assert np.abs(ged(s, m)[:, 0].numpy() - loop).max() < 1e-6


def test_chunks_change_nothing():
    from calidiff_nb.raters import metrics
    a, b = noise(7, 3, seed=1), noise(7, 4, seed=2)
    whole, pieces = metrics._products(a, b, ("ab", "bb")), metrics._products(a, b, ("ab", "bb"), chunk=1)
    for x, y in zip(whole, pieces):
        assert all(torch.equal(x[n], y[n]) for n in x)


def test_large_areas_are_counted_exactly():
    a = torch.ones(1, 1, 1, 4096, 4097, dtype=torch.uint8)                # more pixels than float32 counts
    b = a.clone()
    b[..., 0, 0] = 0
    assert overlap_matrix(a, b, "dice").item() == dice(a, b).item()
    assert abs((1 - iou(a, b).double().item()) * 4096 * 4097 - 1) < 1.1    # float32 result, integer count


# empty masks

def test_empty_policy():
    e, f = torch.zeros(2, 2), torch.ones(2, 2)
    for metric in (dice, iou):
        assert metric(e, e) == 1 and metric(e, e, empty=0.0) == 0 and metric(e, e, empty=math.nan).isnan() and metric(e, f) == 0


def test_a_model_that_never_sees_empties_is_wrong_by_exactly_twice_the_epsilon_value():
    lesion = tiny([1, 1, 0, 0])
    for silent in (1, 2, 3):
        panel = torch.cat([lesion.expand(-1, 4 - silent, -1, -1, -1), lesion.expand(-1, silent, -1, -1, -1) * 0], 1)
        assert abs(ged(lesion, panel).item() - silent**2 / 8) < 1e-6
        assert abs(ged(lesion, panel, empty=0.0).item() - silent**2 / 16) < 1e-6


def test_all_empty_sets_agree():
    e = noise(2, 3) * 0
    assert ged(e, e).abs().max() == 0 and hm_iou(e, e).min() == dice_match(e, e).min() == dice_max(e, e).min() == 1 and ncc(e, e).isnan().all()


# the other measures

def test_soft_dice_thresholds_and_ties():
    vote, model = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.4, 1.0]])
    assert soft_dice(model, vote, (0.5,)).item() == 1
    assert abs(soft_dice(model, vote, (0.5,), inclusive=True).item() - 2 / 3) < 1e-6
    with pytest.raises(ValueError, match="at least one level"):
        soft_dice(model, vote, ())


def test_ncc_is_the_pearson_correlation():
    s, m = noise(2, 7, size=10, seed=1), noise(2, 5, size=10, seed=2)
    p, v = soft_vote(s).double(), soft_vote(m).double()
    for i in range(2):
        r = np.corrcoef((p * (1 - p))[i].flatten(), (v * (1 - v))[i].flatten())[0, 1]
        assert abs(ncc(s, m)[i].item() - r) < 1e-6


def test_golden_ci():
    s, y = tiny([1, 0, 0, 0], [1, 1, 0, 0]), tiny([1, 1, 0, 0], [0, 0, 0, 0])
    assert [x.item() for x in ci_parts(s, y)] == [1, 0.5, 15 / 16]
    assert abs(ci_score(s, y).item() - 15 / 26) < 1e-6 and abs(ci_score(s, y, combine="harmonic").item() - 45 / 61) < 1e-6
    s, y = tiny([1, 0, 0, 0], [0, 0, 0, 1]), tiny([1, 1, 0, 0], [0, 1, 0, 0])      # half of the union; Dice 2/3 and 0; 1/2 - 0 against 1/4 - 1/16
    assert [round(x.item(), 6) for x in ci_parts(s, y)] == [0.5, 0.333333, 1 - 5 / 16]
    assert ci_score(y, y).item() == 1 and ci_score(y, y, combine="harmonic").item() == 1


def test_ci_equals_its_formula_pair_by_pair():
    s, y = noise(3, 5, 2, seed=1, share=0.3), noise(3, 4, 2, seed=2, share=0.4)
    present = torch.tensor([[True] * 4, [True, False, True, True], [False, True, True, False]])

    def extremes(masks):
        v = [np.var(a.astype(int) - b.astype(int)) for a, b in itertools.combinations(masks, 2)]
        return min(v), max(v)

    parts, score_ = ci_parts(s, y, present), ci_score(s, y, present)
    for b, k in itertools.product(range(3), range(2)):
        mine, theirs = s[b, :, k].numpy(), y[b, present[b], k].numpy()
        covered = (mine.any(0) & theirs.any(0)).sum() / theirs.any(0).sum()
        best = np.mean([max(2 * (a & t).sum() / (a.sum() + t.sum()) for a in mine) for t in theirs])
        agree = 1 - sum(abs(i - j) for i, j in zip(extremes(mine), extremes(theirs))) / 2
        assert np.allclose([x[b, k].item() for x in parts], [covered, best, agree], atol=1e-6)
        assert abs(score_[b, k].item() - 3 * covered * best * agree / (covered + best + agree)) < 1e-6


def test_ci_where_little_is_marked():
    none, one = tiny([0, 0, 0, 0], [0, 0, 0, 0]), tiny([1, 0, 0, 0], [1, 0, 0, 0])
    assert ci_score(none, none).item() == 1 and ci_parts(none, none, empty=0.0).matching.item() == 0
    assert ci_parts(one, none).sensitivity.item() == 1 and ci_parts(one, none).matching.item() == 0     # nothing to find; something invented
    assert ci_score(one, none).item() == 0 and ci_score(one, none, combine="harmonic").item() == 0
    assert ci_score(one, one, torch.tensor([[True, False]])).isnan().all()                          # one rater present makes no pair
    for s, y in ((one[:, :1], one), (one, one[:, :1])):
        with pytest.raises(ValueError, match="at least two samples and two raters"):
            ci_score(s, y)
    with pytest.raises(ValueError, match="'product' or 'harmonic'"):
        ci_score(one, one, combine="geometric")


def test_ci_agreement_grows_with_the_canvas_and_ged_does_not():
    s, y = noise(4, 6, seed=3), noise(4, 4, seed=4)
    wide = [torch.nn.functional.pad(m, (20, 20, 20, 20)) for m in (s, y)]
    assert (ci_parts(*wide).agreement > ci_parts(s, y).agreement).all() and torch.allclose(ged(*wide), ged(s, y))


def test_dice_max_is_blind_in_one_direction_each():
    m = noise(5, 4, seed=2)
    parrot = m[:, :1].expand(-1, 8, -1, -1, -1)
    assert dice_max(parrot, m).min() == 1 and dice_max(parrot, m, direction="raters").max() < 1
    spray = torch.cat([m, noise(5, 50, seed=3)], 1)
    assert dice_max(spray, m, direction="raters").min() == 1 and dice_max(spray, m).max() < 1


def test_matching_many_unrepeated_samples_only_ever_gains():
    s, m = noise(10, 40, seed=1), noise(10, 4, seed=2)
    assert (hm_iou(s, m, replicate=False) >= hm_iou(s[:, :4], m, replicate=False) - 1e-6).all()
    assert (hm_iou(s, m, replicate=False) > hm_iou(s, m)).all()


# borders

def test_surface_distance_in_mm_and_empty_masks():
    a, b = torch.zeros(2, 1, 1, 7, 7, dtype=torch.uint8)
    a[..., 1, 1] = b[..., 5, 4] = 1
    mm = torch.tensor([[0.5, 2.0]])
    for s in ("assd", "hd95", "hd"):
        assert abs(surface_distance(a, b, mm, s).item() - math.hypot(2, 6)) < 1e-6
    assert surface_distance(a * 0, b * 0, mm).item() == 0
    assert surface_distance(a, b * 0, mm).item() == math.inf and surface_distance(a, b * 0, mm, missed=9.0).item() == 9
    with pytest.raises(ValueError, match="'assd', 'hd95' or 'hd'"):
        surface_distance(a, b, mm, "mean")


def blobs(n, seed):
    g = rng(seed)
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    c, r = 16 + 3 * torch.randn(2, n, 1, 1, 1, generator=g), 7 + 2 * torch.randn(n, 1, 1, 1, generator=g)
    return ((y - c[0]) ** 2 + (x - c[1]) ** 2 < r**2).to(torch.uint8)


def test_surface_distance_and_dice_equal_monai():
    monai = pytest.importorskip("monai.metrics")
    a, b, mm = blobs(12, 1), blobs(12, 2), [1.0, 0.5]
    spacing = torch.tensor([mm]).expand(12, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd95 = monai.compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=mm)
        assd = monai.compute_average_surface_distance(a, b, include_background=True, symmetric=True, spacing=mm)
    assert (surface_distance(a, b, spacing, "hd95") - hd95).abs().max() < 1e-4
    assert (surface_distance(a, b, spacing, "assd") - assd).abs().max() < 1e-4
    assert (dice(a, b) - monai.compute_dice(a, b, include_background=True)).abs().max() < 1e-6


def test_dice_equals_torchmetrics():
    binary_f1_score = pytest.importorskip("torchmetrics.functional.classification").binary_f1_score
    a, b = blobs(6, 1), blobs(6, 2)
    assert abs(dice(a.view(1, 1, -1), b.view(1, 1, -1)).item() - binary_f1_score(a.flatten(), b.flatten()).item()) < 1e-6


# messages

@pytest.mark.parametrize("f", ON_SETS)
def test_wrong_sets_are_refused(f):
    s, m = noise(3, 4), noise(3, 4)
    with pytest.raises(ValueError, match="only 0 and 1"):
        f(s * 255, m)
    with pytest.raises(ValueError, match="only 0 and 1"):
        f(s, m * 0.5)
    with pytest.raises((ValueError, TypeError), match="must share|parameter"):       # the shape hook may speak first
        f(s[:2], m)


@pytest.mark.parametrize("metric", [dice, iou])
@pytest.mark.parametrize("bad", [255.0, 0.5, -1.0, math.nan])
def test_wrong_masks_are_refused(metric, bad):
    with pytest.raises(ValueError, match="only 0 and 1"):
        metric(torch.full((2, 2), bad), torch.ones(2, 2))


def test_unknown_words_are_refused():
    s, m = noise(2, 3), noise(2, 3)
    for call in (lambda: ged(s, m, estimator="w"), lambda: ged(s, m, kind="f1"), lambda: dice_max(s, m, direction="up"), lambda: diversity(s, estimator="x")):
        with pytest.raises(ValueError, match="must be"):
            call()
    with pytest.raises(ValueError, match="at least two"):
        ged(s[:, :1], m, estimator="u")


# intervals and scores

def test_bootstrap_repeats_covers_and_skips_nan():
    x = torch.randn(200, 2, generator=rng())
    low, high = bootstrap_ci(x, generator=rng(1))
    assert torch.equal(low, bootstrap_ci(x, generator=rng(1)).low) and low.shape == (2,)
    assert torch.allclose((high - low) / 2, 1.96 * x.std(0) / math.sqrt(200), rtol=0.12)
    y = torch.cat([x, torch.full((100, 2), math.nan)])
    assert not torch.stack(bootstrap_ci(y, generator=rng(1))).isnan().any()
    whole, gone = bootstrap_ci(torch.full((5,), 2.0)), bootstrap_ci(torch.full((5,), math.nan))
    assert whole.low == whole.high == 2 and gone.low.isnan()


def test_bootstrap_over_patients_is_wider_and_checks_its_input():
    x = torch.randn(20, generator=rng()).repeat_interleave(10)
    names = [f"p{i // 10}" for i in range(200)]
    apart, together = bootstrap_ci(x, generator=rng()), bootstrap_ci(x, generator=rng(), groups=names)
    assert together.high - together.low > 2 * (apart.high - apart.low)
    with pytest.raises(ValueError, match="one patient per case"):
        bootstrap_ci(x, groups=names[:3])
    with pytest.raises(ValueError, match="level"):
        bootstrap_ci(x, level=95.0)


def test_paired_interval_sees_what_unpaired_ones_do_not():
    hard = torch.rand(80, generator=rng())
    a, b = hard + 0.01, hard
    assert paired_ci(a, b).low > 0 and bootstrap_ci(a).low < bootstrap_ci(b).high


def test_score_carries_the_convention_it_was_computed_with():
    s, m = noise(6, 16, seed=1), noise(6, 4, seed=2)
    assert repr(score(ged, s, m)).startswith("ged[v, iou, empty=1, N=16, R=4] = ")
    assert repr(score(ged, s, m, estimator="u", kind="dice", empty=0.0)).startswith("ged[u, dice, empty=0, N=16, R=4] = ")
    assert repr(score(hm_iou, s, m, replicate=False)).startswith("hm_iou[replicate=no, empty=1, N=16, R=4] = ")
    present = torch.ones(6, 4, dtype=torch.bool)
    present[0, 0] = False
    assert "R=3-4]" in repr(score(ged, s, m, present))
    assert torch.equal(score(ged, s, m).values, ged(s, m)) and repr(score(ged, s, m)) == repr(score(ged, s, m))
    assert "thresholds=0.5, inclusive=yes" in repr(score(soft_dice, soft_vote(s), soft_vote(m), (0.5,), inclusive=True))


def test_score_counts_the_undefined_and_shows_every_structure():
    value = Score("ncc", torch.tensor([[0.5, 0.1], [math.nan, 0.3]]), ("N=2",))
    assert value.mean.tolist() == pytest.approx([0.5, 0.2]) and "(1 of 2 cases undefined)" in repr(value) and " | " in repr(value)
    assert "undefined" not in repr(Score("dice", torch.tensor([0.5, 0.7]), ()))


def test_mean_over_pairs_without_a_pair_is_nan():
    assert mean_over_pairs(torch.ones(1, 1, 2, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), skip_equal=True).isnan().all()
