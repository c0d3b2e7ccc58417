"""Simulated raters: the posterior is the frequency, each habit does what it says, the same seed is the same cohort."""
from dataclasses import replace

import pytest
import torch

from calidiff_nb.raters.cases import Cohort
from calidiff_nb.raters.distance import signed_distance
from calidiff_nb.raters.simulate import REGIMES, Rater, draw_masks, draw_scenes, make_cohort, nested, panel, random_field, rater_marginal, student_cohort

STILL = Rater("still", jitter=0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(scene, *raters, seed=1):
    return draw_masks(scene.truth, scene, raters, seeded(seed))


def area(masks):
    return masks.flatten(-2).sum(-1).float()


def dice(a, b):
    return 2 * (a & b).sum((-2, -1)) / (area(a) + area(b)).clamp(min=1)


@pytest.fixture(scope="module")
def scene():
    return draw_scenes(40, generator=seeded(3))


@pytest.mark.parametrize("size", [63, 64])
@pytest.mark.parametrize("length", [0.0, 2.0, 5.0])
def test_field_has_unit_variance_and_the_correlation_it_claims(size, length):
    f = random_field(400, size, length, seeded())
    assert abs(f.mean()) < 0.05 and abs(f.std() - 1) < 0.03
    for d in (1, 3, 6):
        wanted = torch.exp(torch.tensor(-(d**2) / (2 * length**2))) if length else torch.tensor(0.0)
        assert abs((f * f.roll(d, 2)).mean() - wanted) < 0.05, d
        assert abs((f * f.roll(d, 1)).mean() - wanted) < 0.05, d


@pytest.mark.parametrize("settings", [{}, {"ambiguous": 1.0}, {"structures": 2}, {"sd": 2.0}, {"size": 48}])
def test_posterior_is_how_often_the_truth_is_there(settings):
    s = draw_scenes(6, generator=seeded(5), **settings)
    n, g = 400, seeded(6)
    often = sum(s.draw_truth(g).float() for _ in range(n)) / n
    said = s.posterior()
    z = (often - said) / (said * (1 - said) / n).sqrt().clamp(min=1 / n)
    assert abs((often - said).mean()) < 0.005 and z.abs().max() < 6 and z.square().mean() < 1.5


def test_posterior_is_sure_far_from_the_boundary(scene):
    said, far = scene.posterior(), scene.visible.abs().amin(1) > 6 * scene.sd
    agreed = far & ((scene.visible[:, 0] < 0) == (scene.visible[:, 1] < 0))
    assert torch.equal(said[agreed] > 0.5, scene.truth[agreed].bool()) and agreed.float().mean() > 0.5
    assert torch.minimum(said, 1 - said)[agreed].max() < 1e-6


def test_the_grey_part_belongs_as_often_as_said():
    s = draw_scenes(1, ambiguous=1.0, generator=seeded(8))
    part, g = (s.visible[0, 1] < -1) & (s.visible[0, 0] > 1.5), seeded(1)
    shares = torch.stack([s.draw_truth(g)[0][part].float().mean() for _ in range(300)])
    assert part.sum() > 5 and 0.3 <= s.chance[0] <= 0.7 and abs(shares.mean() - s.chance[0]) < 0.1
    assert ((shares < 0.3) | (shares > 0.7)).float().mean() > 0.85             # nearly all of it or nearly nothing: one choice


def test_without_habits_he_draws_the_truth(scene):
    assert torch.equal(draw(scene, STILL)[:, 0], scene.truth)


@pytest.mark.parametrize("offset", [-3.0, -1.0, 1.0, 3.0])
def test_offset_moves_the_boundary_by_that_many_pixels(scene, offset):
    drawn = signed_distance(draw(scene, replace(STILL, offset=offset))[:, 0])
    there = signed_distance(scene.truth).abs() < 3
    assert abs((signed_distance(scene.truth) - drawn)[there].mean() - offset) < 0.35


def test_jitter_is_noise_of_that_size(scene):
    for sd in (0.8, 1.6):
        drawn = signed_distance(draw(scene, replace(STILL, jitter=sd))[:, 0], 24.0)
        near = signed_distance(scene.truth, 24.0).abs() < 1
        moved = (drawn - signed_distance(scene.truth, 24.0))[near]
        assert 0.6 * sd < moved.std() < 1.3 * sd and abs(moved.mean()) < 0.4 * sd


def test_offset_varies_from_case_to_case(scene):
    shares = area(draw(scene, replace(STILL, offset_sd=1.5))[:, 0]) / area(scene.truth)
    assert shares.std() > 0.1 and area(draw(scene, STILL)[:, 0]).sub(area(scene.truth)).abs().max() == 0


def test_roughness_is_finer_than_jitter(scene):
    rough, smooth = (draw(scene, replace(STILL, **h))[:, 0] for h in ({"roughness": 1.0}, {"jitter": 1.0}))
    length = lambda m: (m.diff(dim=-1) != 0).sum() + (m.diff(dim=-2) != 0).sum()
    assert length(rough) > 1.15 * length(smooth)


def test_shift_goes_down_and_to_the_right(scene):
    drawn = draw(scene, replace(STILL, shift=(3.0, 2.0)))[:, 0]
    assert torch.equal(drawn, scene.truth.roll((3, 2), (2, 3)))


def test_smoothing_rounds_what_is_small():
    truth = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    truth[..., 20:44, 20:44] = 1
    s = replace(draw_scenes(1, ambiguous=0.0, generator=seeded()), truth=truth)
    drawn = draw(s, replace(STILL, smoothing=3.0))[0, 0, 0]
    assert drawn[20, 20] == 0 and drawn[32, 32] == 1 and drawn[20, 32] == 1


def test_a_group_trembles_together_and_others_do_not(scene):
    together = replace(STILL, group="pair", shared_jitter=1.5)
    masks = draw(scene, replace(together, name="a"), replace(together, name="b"), replace(together, name="c", group="other"))
    moved = (signed_distance(masks) - signed_distance(scene.truth)[:, None])[:, :, 0]
    near = signed_distance(scene.truth)[:, 0].abs() < 1
    a, b, c = (moved[:, r][near] for r in range(3))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.99 and abs(torch.corrcoef(torch.stack([a, c]))[0, 1]) < 0.4


@pytest.mark.parametrize("habit, changes", [("lapse", "empty"), ("blob", "more"), ("misplaced", "elsewhere"), ("careless", "another shape")])
def test_accidents_happen_as_often_as_said(habit, changes):
    s = draw_scenes(200, ambiguous=0.0, generator=seeded(2))
    for share in (0.0, 0.3, 1.0):
        drawn = draw(s, replace(STILL, **{habit: share}))[:, 0]
        hit = (drawn != s.truth).flatten(1).any(1).float().mean()
        assert abs(hit - share) < 0.1 or (habit == "blob" and share > 0.0 and 0.6 * share < hit <= share + 0.08)   # a blob may fall inside
    assert {"empty": area(drawn).max() == 0, "more": (drawn >= s.truth).all(), "elsewhere": dice(drawn, s.truth).mean() < 0.4, "another shape": 0.85 < dice(drawn, s.truth).mean() < 1}[changes]


def test_leaning_changes_the_doubtful_part_only():
    s = draw_scenes(60, ambiguous=1.0, generator=seeded(4))
    doubtful = (s.visible[:, 1] < 0) & (s.visible[:, 0] > 0)
    takes, leaves = (draw(s, replace(STILL, ambiguity=a))[:, 0] for a in (20.0, -20.0))
    assert torch.equal(takes[~doubtful], s.truth[~doubtful]) and torch.equal(leaves[~doubtful], s.truth[~doubtful])
    assert takes[doubtful].float().mean() > 0.99 and leaves[doubtful].float().mean() < 0.01


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_makes_a_cohort(regime):
    c = make_cohort(regime, 6, seed=1)
    assert isinstance(c, Cohort) and c.rater_names == tuple(r.name for r in REGIMES[regime]) and c.raters_identified
    assert c.truth is not None and c.truth_prob is not None and c.present.any(1).all() and c.source
    assert c.truth.flatten(2).any(2).all()                                     # no case without a lesion
    assert c.n_structures == (2 if regime == "two_structures" else 1) and c.n_raters == (7 if regime == "seven" else 4)


@pytest.mark.parametrize("regime", ["balanced", "missing60", "two_structures"])
def test_same_seed_same_cohort_and_no_global_seed(regime):
    state = torch.get_rng_state()
    one, two, other = make_cohort(regime, 5, seed=7), make_cohort(regime, 5, seed=7), make_cohort(regime, 5, seed=8)
    assert one.content_hash() == two.content_hash() != other.content_hash()
    assert not torch.equal(one.truth, other.truth) and torch.equal(state, torch.get_rng_state())


def test_same_seed_same_scenes_whoever_looks_at_them():
    one, two = make_cohort("balanced", 5, seed=7), make_cohort("unequal", 5, seed=7)
    assert torch.equal(one.images, two.images) and torch.equal(one.truth, two.truth) and not torch.equal(one.masks, two.masks)


def test_cup_stays_inside_disc():
    c = make_cohort("two_structures", 30, seed=2)
    assert c.structure_names == ("disc", "cup")
    for masks in (c.truth, c.masks.flatten(0, 1)):
        assert (masks[:, 1] <= masks[:, 0]).all()
    assert (c.truth_prob[:, 1] <= c.truth_prob[:, 0] + 1e-6).all()


def test_what_sticks_out_of_the_outer_structure_is_cut_off():
    x = torch.tensor([1.0, 0.2, 0.7]).view(1, 3, 1, 1)
    assert nested(x).flatten().tolist() == pytest.approx([1.0, 0.2, 0.2])
    s = draw_scenes(20, structures=2, sd=6.0, generator=seeded(1))             # so rough that a cup would leave its disc
    assert (s.truth[:, 1] <= s.truth[:, 0]).all()


@pytest.mark.parametrize("regime, share", [("missing30", 0.3), ("missing60", 0.6)])
def test_absence_is_as_frequent_as_said_and_hides_the_mask(regime, share):
    c = make_cohort(regime, 500, size=32, seed=3)
    alone = share**4                                                           # in these cases one rater is called back
    assert abs((~c.present).float().mean() - (share - alone / 4)) < 0.03 and c.present.any(1).all()
    assert c.masks[~c.present].sum() == 0


@pytest.mark.parametrize("regime, best", [("together", 2), ("collusion", 2), ("unequal", 0)])
def test_one_is_best_and_the_vote_does_not_know(regime, best):
    c = make_cohort(regime, 80, seed=5)
    scores = dice(c.masks, c.truth[:, None]).mean((0, 2))
    votes = c.masks.sum(1)
    assert scores.argmax() == best and max(dice((votes >= v).byte(), c.truth).mean() for v in (2, 3)) < scores[best]


def test_an_adversary_is_worst_and_three_others_outvote_him():
    c = make_cohort("adversary", 80, seed=5)
    scores = dice(c.masks, c.truth[:, None]).mean((0, 2))
    votes = [dice((c.masks.sum(1) >= v).byte(), c.truth).mean() for v in (2, 3)]
    assert scores.argmax() == 0 and scores.argmin() == 3 and scores[3] < 0.4 and max(votes) > scores[1:].max()
    assert votes[0] > votes[1] + 0.02                                          # with one seat lost, two of three suffice


def test_two_together_outvote_the_accurate_one():
    c = make_cohort("together", 80, seed=5)
    fg, bg = (dice((c.masks.sum(1) >= v).byte(), c.truth).mean() for v in (2, 3))
    assert bg - fg > 0.08                                                      # the tie rule alone is worth that much


@pytest.mark.parametrize("regime", ["halo", "shadow"])
def test_strongest_edge_is_not_the_truth(regime):
    def middle_of_the_drop(name):                                              # px from the true boundary
        c = make_cohort(name, 60, seed=4)
        d, at = signed_distance(c.truth, 12.0)[:, 0], torch.arange(-7.0, 8)
        drop = -torch.stack([c.images[:, 0][(d - x).abs() <= 0.5].mean() for x in at]).diff()
        return ((at[1:] - 0.5) * drop).sum() / drop.sum()
    assert abs(middle_of_the_drop("collusion")) < 0.5
    assert middle_of_the_drop(regime) * {"halo": 1, "shadow": -1}[regime] > 0.8


def test_marginal_is_how_often_he_marks():
    s = draw_scenes(2, generator=seeded(9))
    rater = Rater("r", offset=1.0, jitter=0.8, lapse=0.25)
    one, two = rater_marginal(rater, s, 150, seeded(1)), rater_marginal(rater, s, 150, seeded(2))
    assert one.shape == s.truth.shape and 0 <= one.min() and one.max() <= 1
    assert (one - two).abs().max() < 0.3 and abs((one - two).mean()) < 0.03
    assert abs(one[s.visible[:, 0] < -5].mean() - 0.75) < 0.1                 # sure of the middle, but for his lapses
    assert rater_marginal(replace(rater, lapse=1.0), s, 3, seeded()).max() == 0


def test_marginal_of_a_perfect_rater_is_the_posterior():
    s = draw_scenes(4, ambiguous=1.0, generator=seeded(9))
    assert (rater_marginal(STILL, s, 200, seeded(1)) - s.posterior()).abs().mean() < 0.01


def test_each_student_has_his_own():
    ada, again, bob = student_cohort("Ada", n=4), student_cohort("Ada", n=4), student_cohort("Bob", n=4)
    assert ada.content_hash() == again.content_hash() != bob.content_hash() and not torch.equal(ada.truth, bob.truth)


def test_own_panel():
    c = make_cohort([Rater("a"), Rater("b", offset=2.0)], 3)
    assert c.rater_names == ("a", "b") and panel(REGIMES["seven"]) == REGIMES["seven"]


@pytest.mark.parametrize("wrong, said", [
    (lambda: make_cohort("ballanced", 3), "regime must be one of balanced, together"),
    (lambda: make_cohort([], 3), "regime must hold at least one Rater"),
    (lambda: make_cohort("balanced", 0), "n must be at least 1; got 0"),
    (lambda: make_cohort("balanced", 2, size=16), "size must be at least 32 px"),
    (lambda: make_cohort([Rater("a"), Rater("a")], 2), "rater_names must differ"),
    (lambda: draw_scenes(2, edge="glow"), "edge must be"),
    (lambda: Rater("r", lapse=15.0), "lapse of 'r' must be a share between 0 and 1; got 15"),
    (lambda: Rater("r", missing=-0.1), "missing of 'r' must be a share"),
])
def test_refuses_with_one_sentence(wrong, said):
    with pytest.raises(ValueError, match=said) as caught:
        wrong()
    assert "\n" not in str(caught.value)
