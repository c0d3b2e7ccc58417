"""The image's own edge: what it sees, when it refuses, when it is asked, and that it can be fooled."""
from pathlib import Path

import numpy as np
import pytest
import torch

from calidiff_nb.calidiff.edge import LEVELS, edge_profile, edge_witness, highest
from calidiff_nb.calidiff.expertness import contradiction, expertness, gauge, quarrelling, refined
from calidiff_nb.calidiff.model import CaliDiffConfig
from calidiff_nb.raters.distance import signed_distance
from calidiff_nb.raters.metrics import dice
from calidiff_nb.raters.simulate import REGIMES, draw_masks, draw_scenes

DATA = Path(__file__).parents[2] / "shared" / "data"


def asked(regime, edge="true", absolute=False, n=150, seed=0):
    """Expertness with and without the witness, with the image's answer as a perfect network would give it."""
    g = torch.Generator().manual_seed(seed)
    scene = draw_scenes(n, edge=edge, ambiguous=0.0, generator=g)
    raters = REGIMES[regime]
    masks = draw_masks(scene.truth, scene, raters, g)
    S, marked = signed_distance(masks), masks.bool().flatten(3).any(-1)
    Q = torch.stack([(scene.visible[:, 0] - r.offset).clamp(-8, 8) for r in raters], 1)
    here = torch.ones(n, len(raters), dtype=torch.bool)
    witness = edge_witness(scene.images[:, None], Q, marked, generator=torch.Generator().manual_seed(1))
    find = lambda w: expertness(S, Q, marked, here, rater_names=tuple(r.name for r in raters), edge=w, absolute=absolute, resamples=50, generator=torch.Generator().manual_seed(1))
    return find(None), find(witness), scene, Q


def test_the_peak_of_a_parabola_is_found_between_levels():
    curve = 5 - (LEVELS - 1.3) ** 2
    assert abs(float(highest(curve)) - 1.3) < 1e-5


def test_an_edge_of_either_contrast_is_found_where_it_is():
    disc = signed_distance((torch.hypot(*torch.meshgrid(torch.arange(64.0) - 32, torch.arange(64.0) - 32, indexing="ij")) < 14)[None, None].to(torch.uint8), 24.0)
    image = torch.sigmoid(-(disc + 1.5) / 0.8)                       # the image changes 1.5 px inside
    Q, seen = disc.clamp(-8, 8)[:, None].expand(6, 2, -1, -1, -1), torch.ones(6, 2, 1, dtype=torch.bool)
    for picture in (image, 1 - image):
        w = edge_witness(picture.expand(6, -1, -1, -1), Q, seen, generator=torch.Generator().manual_seed(0))
        assert w.clear.all() and (w.peak + 1.5).abs().max() < 0.3


def test_absent_and_empty_annotations_say_nothing():
    g = torch.Generator().manual_seed(0)
    scene = draw_scenes(20, ambiguous=0.0, generator=g)
    Q = scene.visible[:, :1].clamp(-8, 8).expand(-1, 2, -1, -1, -1).clone()
    seen = torch.ones(20, 2, 1, dtype=torch.bool)
    seen[10:, 1] = False
    before = edge_witness(scene.images[:, None], Q, seen, generator=torch.Generator().manual_seed(0))
    Q[10:, 1] = torch.randn(Q[10:, 1].shape, generator=g)
    after = edge_witness(scene.images[:, None], Q, seen, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before.peak, after.peak) and torch.equal(before.profile, after.profile)


def test_levels_hold_every_pixel_in_the_band_once():
    scene = draw_scenes(3, generator=torch.Generator().manual_seed(0))
    Q = scene.visible[:, :1].clamp(-8, 8)
    _, pixels = edge_profile(scene.images[:, None], Q)
    dy, dx = torch.gradient(Q, dim=(-2, -1))
    inside = (Q > -6) & (Q < 6) & (torch.hypot(dy, dx) > 0.25)
    assert torch.allclose(pixels.sum(-1), inside.flatten(3).sum(-1).float(), rtol=1e-4)


def test_a_consistent_pair_is_overruled_by_the_edge_and_the_reason_is_said():
    alone, found, scene, Q = asked("collusion")
    assert alone.weights[:2].sum() > 0.5 and any("masks cannot say" in w for w in alone.warnings)
    assert found.weights[2] > 0.8 and any("right only if" in w for w in found.warnings)
    frame = lambda e: dice((gauge(Q, e.weights) < 0).to(torch.uint8), scene.truth).mean()
    assert frame(found) > frame(alone) + 0.08


@pytest.mark.parametrize("regime", ["unequal", "adversary"])
def test_where_no_trusted_raters_quarrel_it_is_not_asked(regime):
    alone, found, *_ = asked(regime)
    assert torch.equal(alone.weights, found.weights)


def test_an_answer_that_masks_had_already_changes_little():
    alone, found, *_ = asked("together")
    assert any("right only if" in w for w in found.warnings)         # a consistent pair is asked to account for itself
    assert alone.weights[2] > 0.8 and 0 < float((alone.weights - found.weights).abs().max()) < 0.01


def test_a_habit_of_all_is_only_cured_by_the_absolute_edge_and_said_by_both():
    _, tie, _, _ = asked("common_bias")
    assert float(tie.shift) == 0 and any("Every rater draws at least" in w for w in tie.warnings)
    _, moved, scene, Q = asked("common_bias", absolute=True)
    C = gauge(Q, moved.weights) - moved.shift[:, None, None]
    assert abs(float(moved.shift) + 2) < 0.6
    assert dice((C < 0).to(torch.uint8), scene.truth).mean() > dice((gauge(Q, tie.weights) < 0).to(torch.uint8), scene.truth).mean() + 0.05


def test_it_can_be_fooled():
    _, found, *_ = asked("halo", edge="halo")
    assert found.weights[2] < 0.5                                    # the accurate rater loses to a bright rim


def test_two_edges_are_refused_and_nothing_changes():
    g = torch.Generator().manual_seed(0)
    scene = draw_scenes(80, ambiguous=0.0, generator=g)
    Q = scene.visible[:, :1].clamp(-8, 8)
    rim = 0.5 * torch.sigmoid(-Q[:, 0] / 0.7) + 0.5 * torch.sigmoid(-(Q[:, 0] - 5) / 0.7)
    assert not edge_witness(rim, Q, torch.ones(80, 1, 1, dtype=torch.bool), generator=torch.Generator().manual_seed(0)).clear.any()


def test_the_switch_refuses_words_it_does_not_know():
    with pytest.raises(ValueError, match="edge must be .*; got 'maybe'"):
        CaliDiffConfig(edge="maybe")


@pytest.mark.skipif(not (DATA / "bubil_3.npz").exists(), reason="the development data are not here")
def test_real_annotations_one_clear_edge_and_one_halo():
    def gold(name):
        z = np.load(DATA / f"bubil_{name}.npz", allow_pickle=False)
        mask = torch.from_numpy(np.unpackbits(z["gold_packed"][:, None, None], axis=-1, count=128))
        image = torch.from_numpy(z["image"].astype(np.float32))[:, None] / 255
        return edge_witness(image, signed_distance(mask), mask.bool().flatten(3).any(-1), generator=torch.Generator().manual_seed(0))
    clear, halo = gold("1"), gold("3")
    assert clear.clear.all() and -1.5 < clear.peak < 0               # drawn a little outside the steepest change
    assert not halo.clear.any()


def test_the_frame_follows_the_edge_only_as_far_as_habits_leave_it_unsure():
    column = lambda *x: torch.tensor(x)[:, None]
    weights, habits = column(0.1, 0.1, 0.4, 0.4), column(1.5, -1.5, 0.3, -0.3)  # their weighted mean is the frame
    move = lambda s, w=weights, o=habits: float(refined(w, o + s, o, o + s - 0.05, o + s + 0.05))
    assert 0.08 < move(0.1) < 0.1 and move(-0.1) == pytest.approx(-move(0.1), abs=1e-6)   # nearly all the way, either way
    assert move(0.9) < move(0.4) and move(1.01) == 0                                      # a contradiction is followed less, another opinion not at all
    assert abs(move(0.1, o=0 * habits)) < 1e-6                                            # people of one habit leave nothing open
    deaf = (habits + 0.1).masked_fill(column(False, False, True, True), torch.nan)        # no clear edge for four fifths of the frame
    assert float(refined(weights, deaf, habits, habits, habits)) == 0


def test_steadiness_decides_no_contradiction_up_to_twice_the_deviation():
    """Figures such as a cup inside a disc gave: two draw 1.3 px inside and 1.6 px outside, and one of them is steadier."""
    noise, places = torch.tensor([0.8, 0.25, 2.5, 3.0]), torch.tensor([1.3, -1.6, 0.4, 0.0])
    ask = lambda noise=noise, places=places: contradiction(noise.diag(), places)
    assert ask().alone and (ask().gap, {ask().one, ask().other}) == (pytest.approx(2.9), {0, 1})
    assert ask(noise * torch.tensor([1.0, 0.5, 1.0, 1.0]))[::3] == (0, False)            # more than twice the deviation: the steadier is believed
    near = ask(places=torch.tensor([1.3, -1.6, 0.9, 0.0]))
    assert near.gap == pytest.approx(2.9) and not near.alone                              # still a contradiction, but one of them has company
    assert not ask(places=places / 4).alone                                               # less than a pixel apart nobody contradicts anybody
    assert ask(noise[:1], places[:1]) == (0, 0, 0, False)
    sees = torch.tensor([1.3, -1.6, torch.nan, torch.nan])
    assert quarrelling(noise.diag(), places, sees) and not quarrelling(noise.diag(), places, sees.roll(1))


def test_a_pair_in_company_whom_a_hurried_network_finds_half_as_steady_is_asked():
    """Figures such as 295 steps on `together` gave: the rounds had believed the pair, who draw 2 px outside."""
    noise, places, sees = torch.tensor([1.12, 1.19, 0.45, 3.0]), torch.tensor([-0.25, 0.23, 1.85, 1.7]), torch.tensor([-2.2, -1.7, -0.1, torch.nan])
    two = contradiction(noise.diag(), places)
    assert not two.alone and {two.one, two.other} == {0, 2} and quarrelling(noise.diag(), places, sees)
