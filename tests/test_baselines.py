"""Votes that ignore who is absent, segmenters that learn, repeat themselves and refuse clearly."""
import dataclasses
import math
import re
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from calidiff_nb.compare import baselines
from calidiff_nb.compare.baselines import (
    SEGMENTERS,
    VOTES,
    Budget,
    CategoricalDiffusion,
    ConfusionNet,
    Diffusion,
    LatentNet,
    OneCall,
    ProbUNet,
    Segmenter,
    ask,
    backbone,
    crowd_kit_em,
    seen_through,
    simpleitk_staple,
    vote_levels,
    why_not,
)
from calidiff_nb.raters.agreement import majority_vote, soft_vote
from calidiff_nb.raters.simulate import make_cohort

TINY = Budget(steps=3, batch=4, widths=(8, 16, 16))
PERSONS = ("per-rater heads", "per-rater heads, weighted", "confusion matrices")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def cohort():
    return make_cohort("together", 24, size=32, seed=1)


@pytest.fixture(scope="module")
def valid():
    return make_cohort("together", 8, size=32, seed=2)


def absent(cohort, rater):
    """The same cohort with one rater blanked in every case but not removed."""
    present = cohort.present.clone()
    present[:, rater] = False
    return dataclasses.replace(cohort, masks=cohort.masks * present[:, :, None, None, None].to(torch.uint8), present=present)


def permuted(cohort, order):
    names = tuple(cohort.rater_names[i] for i in order)
    return dataclasses.replace(cohort, masks=cohort.masks[:, order], present=cohort.present[:, order], rater_names=names)


# --- the given masks -------------------------------------------------------


@pytest.mark.parametrize("name", VOTES)
def test_votes_are_probabilities(name, cohort):
    p = VOTES[name](cohort)
    assert p.shape == cohort.truth.shape and p.dtype == torch.float32
    assert p.min() >= 0 and p.max() <= 1 and p.max() > 0.5
    assert (p[cohort.masks.amin(1) == 1] > 0.5).all() and (p[cohort.masks.amax(1) == 0] < 0.5).all()


@pytest.mark.parametrize("name", VOTES)
def test_an_absent_rater_is_a_removed_one(name, cohort):
    for rater in (0, 3):
        assert torch.allclose(VOTES[name](absent(cohort, rater)), VOTES[name](cohort.without_rater(rater)), atol=1e-6)


@pytest.mark.parametrize("name", VOTES)
def test_the_order_of_raters_does_not_matter(name, cohort):
    assert torch.allclose(VOTES[name](permuted(cohort, [2, 0, 3, 1])), VOTES[name](cohort), atol=1e-4)


@pytest.mark.parametrize("name", VOTES)
def test_votes_never_read_the_truth(name, cohort):
    blind = dataclasses.replace(cohort, truth=None, truth_prob=None)
    assert torch.equal(VOTES[name](blind), VOTES[name](cohort))


@pytest.mark.parametrize("name", VOTES)
def test_votes_with_gaps_and_several_structures(name):
    gaps = make_cohort("missing60", 10, size=32, seed=4)
    assert VOTES[name](gaps).shape == gaps.truth.shape
    two = make_cohort("two_structures", 4, size=32, seed=4)
    p = VOTES[name](two)
    assert p.shape == two.truth.shape
    if name != "STAPLE pooled":  # structures do not see each other anywhere; pooled rates are per structure too
        one = dataclasses.replace(two, masks=two.masks[:, :, 1:], structure_names=two.structure_names[1:], truth=None, truth_prob=None)
        assert torch.allclose(VOTES[name](one), p[:, 1:], atol=1e-6)


@pytest.mark.parametrize("name", VOTES)
def test_nobody_marked_anything(name, cohort):
    empty = dataclasses.replace(cohort.subset([0, 1]), masks=torch.zeros_like(cohort.masks[:2]))
    assert VOTES[name](empty).max() < 0.5


def test_the_two_majorities_differ_at_ties_only(cohort):
    fg, bg = VOTES["majority (ties fg)"](cohort), VOTES["majority (ties bg)"](cohort)
    tie = soft_vote(cohort.masks, cohort.present) == 0.5
    assert tie.any() and torch.equal(fg != bg, tie)


def test_staple_equals_simpleitk(cohort):
    pytest.importorskip("SimpleITK")
    assert (VOTES["STAPLE per image"](cohort) - simpleitk_staple(cohort)).abs().max() < 1e-5
    gaps = make_cohort("missing30", 12, size=32, seed=5)
    ours, theirs = VOTES["STAPLE per image"](gaps), simpleitk_staple(gaps)
    assert (ours - theirs).abs().max() < 1e-5


def test_crowd_kit_stays_between_intersection_and_union(cohort):
    pytest.importorskip("crowdkit")
    p = crowd_kit_em(cohort)
    assert set(p.unique().tolist()) <= {0.0, 1.0}
    agreed, anybody = cohort.masks.amin(1).bool(), cohort.masks.amax(1).bool()
    assert (p[agreed] == 1).all() and (p[~anybody] == 0).all()


def test_pooled_staple_needs_persons(cohort):
    with pytest.raises(ValueError, match="pooled STAPLE needs raters that are the same person"):
        VOTES["STAPLE pooled"](cohort.shuffle_slots(rng()))


def test_what_is_absent_has_a_reason(monkeypatch):
    for name, reason in why_not().items():
        assert name not in VOTES and reason.endswith(".")
    assert {"SimpleITK STAPLE", "Crowd-Kit EM"} <= set(VOTES) | set(why_not())
    monkeypatch.setattr(baselines, "VOTES", {})
    assert "pip install" in why_not()["SimpleITK STAPLE"] and "crowd-kit" in why_not()["Crowd-Kit EM"]


@pytest.mark.parametrize("function, module, words", [(simpleitk_staple, "SimpleITK", r"calidiff_nb\[data\]"), (crowd_kit_em, "crowdkit.aggregation", "crowd-kit")])
def test_missing_packages_are_named(function, module, words, cohort, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=words):
        function(cohort)


# --- segmenters ------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(cohort, valid):
    """Every segmenter after three steps."""
    out = {}
    for name, make in SEGMENTERS.items():
        out[name] = make()
        out[name].fit(cohort, valid, TINY)
    return out


@pytest.mark.parametrize("name", SEGMENTERS)
def test_shapes_and_ranges(name, trained, valid):
    m = trained[name]
    assert isinstance(m, Segmenter) and m.name == name
    p = m.segment(valid.images, n=5, generator=rng())
    assert p.probability.shape == valid.truth.shape and p.samples.shape == (len(valid), 5, 1, 32, 32)
    assert p.probability.min() >= 0 and p.probability.max() <= 1 and p.samples.max() <= 1
    assert (p.per_rater is None) == (name not in PERSONS)
    if p.per_rater is not None:
        assert p.per_rater.shape == (len(valid), 4, 1, 32, 32) and p.per_rater.min() >= 0 and p.per_rater.max() <= 1


@pytest.mark.parametrize("name", SEGMENTERS)
def test_sizes_that_are_no_multiple_of_eight(name, trained):
    images = torch.rand(2, 1, 37, 30, generator=rng())
    p = trained[name].segment(images, n=1, generator=rng())
    assert p.probability.shape == (2, 1, 37, 30) and p.samples.shape == (2, 1, 1, 37, 30)
    assert p.probability.isfinite().all()


@pytest.mark.parametrize("name", SEGMENTERS)
def test_same_seed_same_answer_and_nobody_else_is_disturbed(name, cohort, valid, trained):
    before = torch.get_rng_state()
    again = SEGMENTERS[name]()
    again.fit(cohort, valid, TINY)
    assert torch.equal(torch.get_rng_state(), before)
    a, b = (m.segment(valid.images[:2], n=4, generator=rng(3)) for m in (trained[name], again))
    assert torch.equal(a.probability, b.probability) and torch.equal(a.samples, b.samples)
    other = SEGMENTERS[name]()
    other.fit(cohort, valid, dataclasses.replace(TINY, seed=1))
    assert not torch.equal(other.segment(valid.images[:2], n=4, generator=rng(3)).probability, a.probability)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_images_do_not_see_each_other(name, trained, valid):
    """A batch of images gets the answers of its members, whatever stands beside them."""
    m = trained[name]
    if name in ("Probabilistic U-Net", "categorical diffusion"):  # their probability is a mean over draws, which go on through the batch
        pytest.skip("answers depend on the draws")
    both = m.segment(valid.images[:2], n=2, generator=rng()).probability
    assert torch.allclose(both[1:], m.segment(valid.images[1:2], n=2, generator=rng()).probability, atol=1e-5)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_several_structures_and_absent_raters(name):
    two, gaps = make_cohort("two_structures", 10, size=32, seed=6), make_cohort("missing60", 10, size=32, seed=7)
    for data in (two, gaps):
        m = SEGMENTERS[name]()
        m.fit(data, data, dataclasses.replace(TINY, steps=2))
        p = m.segment(data.images[:2], n=3, generator=rng())
        assert p.samples.shape == (2, 3, data.n_structures, 32, 32) and p.probability.isfinite().all()


@pytest.mark.parametrize("name", [n for n in SEGMENTERS if n != "truth U-Net"])
def test_the_truth_is_never_looked_at(name, cohort, valid, trained):
    blind = [dataclasses.replace(c, truth=None, truth_prob=None) for c in (cohort, valid)]
    m = SEGMENTERS[name]()
    m.fit(*blind, TINY)
    a, b = (x.segment(valid.images[:2], n=4, generator=rng(3)) for x in (m, trained[name]))
    assert torch.equal(a.probability, b.probability) and torch.equal(a.samples, b.samples)


@pytest.mark.parametrize("name", [n for n in SEGMENTERS if n not in PERSONS])
def test_an_absent_rater_is_never_read(name, cohort, valid):
    """Marks that a masked slot would bring in cannot be built (Cohort refuses them), so compare with another absent slot's name only."""
    gone = absent(cohort, 0)
    m = SEGMENTERS[name]()
    m.fit(gone, valid, TINY)
    if isinstance(m, OneCall):
        fewer = SEGMENTERS[name]()
        fewer.fit(cohort.without_rater(0), valid, TINY)
        assert torch.allclose(m.segment(valid.images[:2]).probability, fewer.segment(valid.images[:2]).probability, atol=1e-5)
    assert m.segment(valid.images[:2], n=2, generator=rng()).probability.isfinite().all()


@pytest.mark.parametrize("name", SEGMENTERS)
def test_slots_that_are_not_persons(name, cohort, valid):
    m, slots = SEGMENTERS[name](), cohort.shuffle_slots(rng())
    if name in PERSONS:
        with pytest.raises(ValueError, match="needs raters that are the same person in every case"):
            m.fit(slots, valid, TINY)
    else:
        m.fit(slots, valid.shuffle_slots(rng()), dataclasses.replace(TINY, steps=1))
        assert m.segment(valid.images[:1], n=2, generator=rng()).per_rater is None


@pytest.mark.parametrize("name", SEGMENTERS)
def test_refusals(name, trained, valid):
    with pytest.raises(ValueError, match="untrained: call fit"):
        SEGMENTERS[name]().segment(valid.images)
    with pytest.raises(ValueError, match=r"1 channel\(s\), as in training; got 3"):
        trained[name].segment(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        trained[name].segment(valid.images[:1], n=0)


def test_the_ceiling_needs_a_truth(cohort, valid):
    with pytest.raises(ValueError, match="only simulated cohorts have"):
        SEGMENTERS["truth U-Net"]().fit(dataclasses.replace(cohort, truth=None), valid, TINY)


def test_cases_without_annotations_are_left_out(cohort, valid):
    present = cohort.present.clone()
    present[0] = False
    gaps = dataclasses.replace(cohort, masks=cohort.masks * present[:, :, None, None, None].to(torch.uint8), present=present)
    for name in ("U-Net on soft labels", "plain diffusion", "per-rater heads"):
        a, b = SEGMENTERS[name](), SEGMENTERS[name]()
        a.fit(gaps, valid, TINY)
        b.fit(cohort.subset(range(1, len(cohort))), valid, TINY)
        assert torch.equal(a.segment(valid.images[:2], n=2, generator=rng()).probability, b.segment(valid.images[:2], n=2, generator=rng()).probability)


# --- the ideas -------------------------------------------------------------


def test_everybody_has_the_same_network(cohort):
    sizes = {n: sum(p.numel() for p in m.net.parameters()) for n, m in ((n, make()) for n, make in SEGMENTERS.items()) if not m.fit(cohort, cohort, dataclasses.replace(TINY, steps=1))}
    tokens = 4 * TINY.widths[-1]  # a learned vector for each further answer
    assert max(sizes.values()) - min(sizes.values()) <= tokens


def test_asking_is_deterministic_and_slots_do_not_see_each_other(cohort):
    net = backbone(cohort, TINY, 4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=rng())
    features = net.encode(cohort.images[:2])
    tokens = torch.arange(4).expand(2, -1)
    both = ask(net, features, tokens, cohort.size)[1]
    assert torch.allclose(ask(net, features, tokens[:, 1:2], cohort.size)[1], both[:, 1:2], atol=1e-5)
    assert not torch.allclose(both[:, 0], both[:, 1])


def test_confusion_recovers_known_rates():
    """Given the truth, the likelihood's maximum is each rater's own rates."""
    g = rng(1)
    truth = torch.rand(1, 1, 200, 200, generator=g) < 0.3
    alpha, beta = torch.tensor([0.95, 0.8, 0.6]).view(-1, 1, 1, 1), torch.tensor([0.9, 0.97, 0.75]).view(-1, 1, 1, 1)
    said = torch.rand(3, 1, 200, 200, generator=g) < torch.where(truth, alpha, 1 - beta)
    a, b = (torch.zeros(3, 1, 1, 1, requires_grad=True) for _ in range(2))
    logit = (40.0 * truth.float() - 20).expand(3, -1, -1, -1)
    optimiser = torch.optim.Adam([a, b], lr=0.1)
    for _ in range(200):
        yes, no = seen_through(logit, a.expand_as(logit), b.expand_as(logit))
        loss = -torch.where(said, yes, no).mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    hit = (said & truth).sum((1, 2, 3)) / truth.sum()
    rest = (~said & ~truth).sum((1, 2, 3)) / (~truth).sum()
    assert (a.detach().sigmoid().flatten() - hit).abs().max() < 2e-3
    assert (b.detach().sigmoid().flatten() - rest).abs().max() < 2e-3


def test_confusion_likelihood_in_plain_numbers():
    p, a, b = torch.tensor([0.3]), torch.tensor([0.9]), torch.tensor([0.8])
    yes, no = seen_through(p.logit(), a.logit(), b.logit())
    assert yes.exp().item() == pytest.approx(0.3 * 0.9 + 0.7 * 0.2, abs=1e-6)
    assert (yes.exp() + no.exp()).item() == pytest.approx(1, abs=1e-6)
    far = torch.tensor([80.0])
    yes, no = seen_through(far, far, far)
    assert yes.item() == pytest.approx(0, abs=1e-6) and no.isfinite().all()  # a perfect rater costs nothing, and no logarithm of zero


def test_a_kinder_prior_keeps_raters_reliable(cohort, valid):
    """The trace prior makes matrices less reliable than its reverse does."""
    diagonals = []
    for warmup in (0.0, 1.0):
        m = ConfusionNet(trace=5.0, warmup=warmup)
        m.fit(cohort, valid, dataclasses.replace(TINY, steps=30))
        with torch.no_grad():
            _, a, b = m._readings(m.net, m.net.encode(valid.images), valid.size)
        diagonals.append(float((a.sigmoid() + b.sigmoid()).mean()))
    assert diagonals[0] < diagonals[1] - 0.1


def test_vote_levels_are_nested_shares(cohort):
    maps, here = vote_levels(cohort.masks, cohort.present)
    assert here.all() and (maps[:, :-1] >= maps[:, 1:]).all()
    assert torch.equal(maps[:, 0], cohort.masks.amax(1)) and torch.equal(maps[:, -1], cohort.masks.amin(1))
    assert torch.equal(maps[:, 1], majority_vote(cohort.masks, cohort.present)) and torch.allclose(maps.float().mean(1), soft_vote(cohort.masks, cohort.present))
    some = absent(cohort, 1)
    fewer, _ = vote_levels(some.masks, some.present)
    assert torch.equal(fewer[:, -1], cohort.without_rater(1).masks.amin(1)) and torch.equal(fewer[:, 0], cohort.without_rater(1).masks.amax(1))


def test_level_sets_are_shared_out_evenly(trained, valid):
    p = trained["per-rater heads"].segment(valid.images[:2], n=16)
    quarter = p.samples.unflatten(1, (4, 4)).float().mean(2)
    assert (quarter - p.per_rater).abs().max() <= 1 / 8 + 1e-6


def test_majority_repeats_one_mask_and_soft_labels_do_not_cross(trained, valid):
    one = trained["U-Net on majority"].segment(valid.images[:2], n=3)
    assert (one.samples == (one.probability > 0.5)[:, None]).all()
    many = trained["U-Net on soft labels"].segment(valid.images[:2], n=16).samples
    assert (many[:, :-1] >= many[:, 1:]).all()


def test_half_a_pixel_of_reach_is_mask_space(cohort, valid):
    """Truncated at half a pixel, a distance is the mask itself: -1 inside, +1 outside."""
    from calidiff_nb.raters.distance import signed_distance, to_network

    assert torch.equal(to_network(signed_distance(cohort.masks, 0.5), 0.5), 1 - 2 * cohort.masks.float())
    m = Diffusion("masks", reach=0.5, signal=0.25, presence=False)
    m.fit(cohort, valid, TINY)
    assert m.segment(valid.images[:1], n=2, generator=rng()).samples.shape == (1, 2, 1, 32, 32)


def test_latent_explains_and_prior_differs_between_images(cohort):
    net = LatentNet(backbone(cohort, TINY), TINY.widths)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=rng())
    features = net.net.encode(cohort.images[:2])
    mean, log_sd = net.believed(features, net.prior)
    assert mean.shape == log_sd.shape == (2, 6) and not torch.allclose(mean[0], mean[1])
    z = torch.randn(2, 3, 6, generator=rng())
    drawn = net.draw(features, z, cohort.size)
    assert drawn.shape == (2, 3, 1, 32, 32) and not torch.allclose(drawn[:, 0], drawn[:, 1])
    assert torch.allclose(net.draw(features, z[:, 1:2], cohort.size), drawn[:, 1:2], atol=1e-4)


@pytest.mark.parametrize("make", [ProbUNet, CategoricalDiffusion, Diffusion])
def test_samples_follow_the_generator(make, cohort, valid):
    m = make()
    m.fit(cohort, valid, dataclasses.replace(TINY, steps=20, batch=6))
    images = valid.images[:1]
    a, b, c = (m.segment(images, n=6, generator=rng(s)).samples for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_loss_falls_for_everybody():
    """Twenty steps on four cases: whoever does not learn at all has a broken gradient."""
    four = make_cohort("balanced", 4, size=32, seed=8)
    target = soft_vote(four.masks, four.present)
    flat = F.binary_cross_entropy(target.mean().expand_as(target), target)
    for name, make in SEGMENTERS.items():
        m = make()
        m.fit(four, four, Budget(steps=40, batch=4, widths=(16, 24, 32)))
        p = m.segment(four.images, n=8, generator=rng()).probability.clamp(1e-4, 1 - 1e-4)
        assert F.binary_cross_entropy(p, target) < 0.9 * flat, f"{name} says no more than the mean"


def test_budget_is_the_same_for_everybody():
    budget = Budget()
    assert (budget.steps, budget.batch, budget.lr, budget.seed, budget.widths) == (400, 12, 2e-3, 0, (32, 64, 96))
    assert all(re.match(r"\S", name) and make().name == name for name, make in SEGMENTERS.items())
    assert math.isclose(budget.lr, 0.002) and isinstance(SEGMENTERS["plain diffusion"], (partial, type))
