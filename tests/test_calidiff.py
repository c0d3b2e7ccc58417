"""The method end to end on tiny networks: shapes, missing raters, strangers, saving, learning."""
import dataclasses

import pytest
import torch

from calidiff_nb.calidiff.consensus import or_nothing, with_presence
from calidiff_nb.calidiff.expertness import expertness, frame_weights, split_covariance
from calidiff_nb.calidiff.fusion import fuse
from calidiff_nb.calidiff.inverse import distance_schedule, image_loss, joint_diffusion_loss, noised, predict_raters, unfold_raters
from calidiff_nb.calidiff.model import CaliDiff, CaliDiffConfig, gather, judge, pack, spread_evenly
from calidiff_nb.diffusion.training import save_weights
from calidiff_nb.raters.agreement import soft_vote
from calidiff_nb.raters.cases import Cohort
from calidiff_nb.raters.distance import signed_distance, to_network
from calidiff_nb.raters.metrics import dice
from calidiff_nb.raters.simulate import REGIMES, make_cohort

TINY = CaliDiffConfig(widths=(8, 16, 16), joint_steps=6, committee_steps=2, batch=4, steps=2, draws=1)


def trained(regime, config=TINY, n=30, size=64):
    train, valid = make_cohort(regime, n, size, seed=1).split((0.6, 0.4))
    model = CaliDiff.for_cohort(train, config)
    model.fit(train, valid, progress=False)
    return model


@pytest.fixture(scope="module")
def model():
    return trained("balanced")


@pytest.mark.parametrize("regime", ["missing60", "two_structures", "seven", "lapses"])
def test_every_panel_goes_through(regime):
    model, cohort = trained(regime), make_cohort(regime, 5, seed=9)
    found = model.calibrate(cohort)
    r, k = cohort.n_raters, cohort.n_structures
    assert found.aligned.shape == (5, r, k, 64, 64) and found.attention.shape == (5, r + 1, k, 64, 64)
    assert ((found.pseudo_truth >= 0) & (found.pseudo_truth <= 1)).all()
    assert torch.allclose(found.attention.sum(1), torch.ones(5, k, 64, 64), atol=1e-4)
    said = model.segment(cohort.images, n=5, generator=torch.Generator().manual_seed(0))
    assert said.samples.shape == (5, 5, k, 64, 64) and said.per_rater.shape[1] == r


@pytest.mark.parametrize("raters", [1, 2, 3, 8])
def test_any_number_of_strangers(model, raters):
    panel = [dataclasses.replace(REGIMES["unequal"][i % 4], name=f"r{i}") for i in range(raters)]
    found = model.calibrate(make_cohort(panel, 4, seed=3))
    assert found.normalised.shape[1] == raters and torch.isfinite(found.pseudo_distance).all()
    assert found.warnings


@pytest.mark.parametrize("size", [48, 72, 100])
def test_other_sizes(model, size):
    cohort = make_cohort("balanced", 2, size, seed=4)
    assert model.calibrate(cohort).pseudo_truth.shape[-1] == size
    assert model.segment(cohort.images, n=2).consensus.shape[-1] == size


def test_what_stands_in_a_missing_raters_slot_is_never_read(model):
    cohort = make_cohort("balanced", 4, seed=5)
    S, Q, marked = gather(model, cohort, True)
    present = cohort.present.clone()
    present[:, 2] = False
    other = S.clone()
    other[:, 2] = torch.randn(S[:, 2].shape, generator=torch.Generator().manual_seed(0))
    a, b = (judge(x, Q, marked, present, model.expertness).fusion for x in (S, other))
    assert torch.equal(a.distance, b.distance) and torch.equal(a.sd, b.sd) and (a.weights[:, 2] == 0).all()
    absent = dataclasses.replace(cohort, present=present, masks=cohort.masks * present[:, :, None, None, None].to(torch.uint8))
    assert (model.calibrate(absent).attention[:, 2] == 0).all()
    assert not torch.equal(model.calibrate(absent).fused, model.calibrate(cohort).fused)


def test_whoever_never_marks_anything_is_not_believed(model):
    cohort = make_cohort([dataclasses.replace(r, name=f"r{i}") for i, r in enumerate(REGIMES["unequal"])], 12, seed=6)
    masks = cohort.masks.clone()
    masks[:, 1] = 0                                                       # he was there, and saw nothing
    found = model.calibrate(dataclasses.replace(cohort, masks=masks)).expertness
    assert found.weights[1].item() == 0 and found.weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert found.lapse[1].item() > 0.3 > found.lapse[0].item()


@pytest.mark.parametrize("regime", ["seven", "unequal"])
def test_a_stranger_who_never_came_equals_that_stranger_removed(model, regime):
    whole = make_cohort([dataclasses.replace(r, name=f"r{i}") for i, r in enumerate(REGIMES[regime])], 12, seed=6)
    present = whole.present.clone()
    present[:, 1] = False
    empty = dataclasses.replace(whole, present=present, masks=whole.masks * present[..., None, None, None].to(torch.uint8))
    left, gone = model.calibrate(empty), model.calibrate(empty.without_rater(1))
    others = [i for i in range(whole.n_raters) if i != 1]
    assert torch.allclose(left.pseudo_truth, gone.pseudo_truth, atol=1e-4) and torch.allclose(left.aligned[:, others], gone.aligned, atol=1e-3)
    assert torch.allclose(left.expertness.weights[others], gone.expertness.weights, atol=1e-5) and not left.expertness.weights[1].any()
    assert left.expertness.covariance.shape == (whole.n_raters, whole.n_raters, 1) and torch.isfinite(left.pseudo_distance).all()


def test_an_empty_mask_does_not_move_the_boundary_far(model):
    cohort = make_cohort("balanced", 4, seed=6)
    masks = cohort.masks.clone()
    masks[:, 3] = 0
    found, before = model.calibrate(dataclasses.replace(cohort, masks=masks)), model.calibrate(cohort)
    near = before.fused.abs() < 4
    assert (found.fused - before.fused)[near].abs().mean() < 1.0


def test_batches_do_not_matter(model):
    cohort = make_cohort("balanced", 5, seed=7)
    a, b = model.calibrate(cohort, batch=5), model.calibrate(cohort, batch=2)
    assert torch.allclose(a.fused, b.fused, atol=1e-3) and torch.allclose(a.pseudo_truth, b.pseudo_truth, atol=1e-3)


def test_a_sample_asks_as_often_as_configured_and_more_often_towards_the_end(model, monkeypatch):
    asked = []
    denoise = type(model.net).forward
    monkeypatch.setattr(type(model.net), "forward", lambda net, x, t, *rest: (asked.append(int(t.max())), denoise(net, x, t, *rest))[1])
    images = make_cohort("together", 1, seed=3).images
    for steps in (None, 4):
        asked.clear()
        model.segment(images, 2, "diffusion", steps, torch.Generator().manual_seed(0))
        walk = asked[-(steps or model.config.sample_steps):]
        jumps = [a - b for a, b in zip(walk, walk[1:])]
        assert walk[0] == model.config.T - 1 and walk[-1] == 0 and jumps == sorted(jumps, reverse=True)
        assert len([t for t in asked if t < model.config.T - 1]) == (steps or model.config.sample_steps) - 1


def test_slots_that_are_not_persons():
    cohort = make_cohort("balanced", 20, seed=8).shuffle_slots(torch.Generator().manual_seed(0))
    train, valid = cohort.split((0.6, 0.4))
    model = CaliDiff.for_cohort(train, TINY)
    model.fit(train, valid, progress=False)
    found = model.calibrate(valid)
    assert torch.allclose(found.expertness.weights, torch.full((4, 1), 0.25))
    assert model.segment(valid.images, n=3, sampler="levels").per_rater.shape[1] == 0


@pytest.mark.parametrize("what", ["named", "unnamed", "not asked"])
def test_level_sets_are_empty_as_often_as_the_image_says(what):
    """By hand, from what the network answers: each slot's map up to its own presence; with votes in order, their average beside the panel's."""
    cohort = make_cohort("lapses", 30, 32, seed=8)
    cohort = cohort if what == "named" else cohort.shuffle_slots(torch.Generator().manual_seed(0))
    train, valid = cohort.split((0.6, 0.4))
    model = CaliDiff.for_cohort(train, dataclasses.replace(TINY, committee_steps=0, levels=0.0 if what == "not asked" else 2.0))
    model.fit(train, valid, progress=False)
    with torch.no_grad():
        features = model.net.encode(valid.images)
        asked = [(0, 1, 2, 3)] if what == "named" else [(model.net.tokens.null,)] + ([(0, 1, 2, 3)] if what == "unnamed" else [])
        averages = []
        for ids, schedule, reach in zip(asked, (model.schedule, model.walk), (8.0, 0.5)):
            ids = torch.tensor([ids]).expand(len(valid), -1)
            _, logit, there = predict_raters(model.net, features, ids, schedule, (32, 32), reach, model.config.seed)
            p, most = logit.sigmoid(), logit.sigmoid().amax((-2, -1), keepdim=True)
            averages.append((p / most * there.sigmoid()[..., None, None]).mean(1))
        wanted = torch.stack(averages).mean(0)
    drawn = model.segment(valid.images, n=40, sampler="levels").samples
    assert ((drawn.float().mean(1) - wanted).abs() <= 0.5 / 40 + 1e-4).all()
    chance = wanted.flatten(2).amax(-1)
    assert ((drawn.flatten(3).any(-1).float().mean(1) - chance).abs() <= 0.5 / 40 + 1e-4).all() and chance.std() > 0


def test_a_map_is_stretched_to_its_presence():
    p = torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(0)) * 0.3
    there = torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.5, 0.5]])
    out = with_presence(p, there)
    assert torch.allclose(out.amax((-2, -1)), there) and torch.equal(out.flatten(2).argmax(-1)[there > 0], p.flatten(2).argmax(-1)[there > 0])
    assert with_presence(torch.zeros(1, 4, 4), torch.tensor([0.7])).max() == 0  # a map that says nothing has no shape to stretch


def test_a_map_about_nothing_stays_below_one_half_and_others_are_left_alone():
    p = torch.rand(200, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    there = torch.rand(200, 2, generator=torch.Generator().manual_seed(1))
    out, nothing = or_nothing(p, there), there < 0.5
    assert torch.equal(out[~nothing], p[~nothing])
    assert (out[nothing].amax((-2, -1)) <= there[nothing] + 1e-6).all() and (out[nothing].amax((-2, -1)) < 0.5).all()
    assert (out <= p).all()  # nothing is ever raised
    assert or_nothing(torch.zeros(1, 4, 4), torch.tensor([0.2])).max() == 0


@pytest.mark.parametrize("consensus", [True, False])
def test_the_consensus_is_empty_where_the_image_says_there_is_nothing(consensus):
    images, told = make_cohort("balanced", 3, size=64, seed=2).images, CaliDiff.from_pretrained("simulated-64")
    told.config = dataclasses.replace(told.config, consensus=consensus)
    assert (told.segment(images, 1).consensus > 0.5).flatten(1).any(1).all()  # as it was trained, it sees them all
    last = told.net.who_marks[-1]
    with torch.no_grad():
        last.weight.zero_(), last.bias.fill_(-1.0)
    said = told.segment(images, 1).consensus
    assert said.max() <= torch.tensor(-1.0).sigmoid() + 1e-6 and said.max() > 0.2  # lowered, not wiped out


def test_votes_in_order_are_asked_where_nobody_has_a_name(model, tmp_path):
    cohort = make_cohort("balanced", 20, 32, seed=8)
    parts = {}
    for what, data, weight in (("named", cohort, 2.0), ("unnamed", cohort.shuffle_slots(torch.Generator().manual_seed(0)), 2.0), ("not asked", cohort.shuffle_slots(torch.Generator().manual_seed(0)), 0.0)):
        train, valid = data.split((0.6, 0.4))
        net = CaliDiff.for_cohort(train, dataclasses.replace(TINY, levels=weight, committee_steps=0))
        parts[what] = set(net.fit(train, valid, progress=False)["image"].values)
        levels = what == "unnamed"
        assert net.told_levels == levels and net.walk_reach == (0.5 if levels else 8.0)
        assert torch.equal(net.walk.alphas_cumprod, distance_schedule(signal=0.25 if levels else 1.0).alphas_cumprod)
        asked = []
        forward = net.net.forward
        net.net.forward = lambda x, t, features, tokens, present=None, asked=asked, forward=forward: asked.append(tokens) or forward(x, t, features, tokens, present)
        net.segment(cohort.images[:2], 8, "diffusion", 2, torch.Generator().manual_seed(0))
        ids = set(asked[-1].flatten().tolist())
        assert ids == ({4} if what == "not asked" else {0, 1, 2, 3})
        net.trajectory(cohort.images[0], steps=2)
        assert asked[-1].item() == (1 if levels else 4)
        net.save(tmp_path / "now.safetensors")
        assert CaliDiff.load(tmp_path / "now.safetensors").config.levels == weight
    assert parts["named"] == parts["not asked"] and parts["unnamed"] == parts["named"] | {"levels"}
    tensors, facts = pack(model)
    del facts["config"]["levels"]  # as saved before votes were asked
    save_weights(tensors, tmp_path / "old.safetensors", facts)
    assert CaliDiff.load(tmp_path / "old.safetensors").config.levels == 0
    with pytest.raises(ValueError, match="train must have 4 slots, as many as this model was built for; got 3"):
        net.fit(*[c.without_rater(0) for c in (train, valid)], progress=False)
    with pytest.raises(ValueError, match="levels must be a weight of 0 or more; got -1"):
        CaliDiffConfig(levels=-1)


def test_one_loss_for_distances_and_masks():
    cohort = make_cohort("balanced", 3, 32, seed=8)
    net = CaliDiff.for_cohort(cohort, TINY).net
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    t, ids = torch.full((3, 4), 400), torch.arange(4).expand(3, 4)
    for reach in (8.0, 0.5):
        S = signed_distance(cohort.masks, reach)
        u_t = noised(to_network(S, reach), t, distance_schedule(), torch.Generator().manual_seed(1))
        said = net(u_t, t, net.encode(cohort.images), ids).distance
        by_hand = 32 * (said - S / reach).square().mean()
        parts = joint_diffusion_loss(net, cohort.images, cohort.masks, cohort.present, ids, t, distance_schedule(), reach, torch.Generator().manual_seed(1))
        rest = 4 * parts["inside"] + 0.5 * parts["presence"]
        assert torch.isclose(parts["loss"] - rest, by_hand, rtol=1e-4) and torch.isclose(parts["distance"] * 32 / reach**2, by_hand, rtol=1e-4)


def test_saved_is_the_same(model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    again, cohort = CaliDiff.load(tmp_path / "m.safetensors"), make_cohort("balanced", 3, seed=2)
    assert torch.equal(model.calibrate(cohort).pseudo_truth, again.calibrate(cohort).pseudo_truth)
    (tmp_path / "m.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short"):
        CaliDiff.load(tmp_path / "m.safetensors")


def test_a_model_saved_before_the_network_knew_its_schedule_is_refused(model, tmp_path):
    tensors, facts = pack(model)
    old = {n: t for n, t in tensors.items() if n not in ("weights.net.keep", "weights.net.room")}
    assert len(old) == len(tensors) - 2
    save_weights(old, tmp_path / "old.safetensors", facts)
    with pytest.raises(ValueError, match="of this version"):
        CaliDiff.load(tmp_path / "old.safetensors")


def test_training_goes_on_where_it_stopped(tmp_path):
    train, valid = make_cohort("unequal", 20, seed=1).split((0.6, 0.4))
    whole, halves = (CaliDiff.for_cohort(train, TINY) for _ in range(2))
    whole.fit(train, valid, progress=False)
    halves.fit(train, valid, tmp_path, progress=False)
    again = CaliDiff.for_cohort(train, TINY)
    again.fit(train, valid, tmp_path, progress=False)  # everything is done: read back
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("named", [True, False])
def test_what_the_image_says_is_learnt_by_itself(named):
    cohort = make_cohort("unequal", 24, 32, seed=1)
    train, valid = (cohort if named else cohort.shuffle_slots(torch.Generator().manual_seed(0))).split((0.7, 0.3))
    model = CaliDiff.for_cohort(train, dataclasses.replace(TINY, image_steps=80, joint_steps=1, committee_steps=0, lr=4e-3))
    history = model.fit(train, valid, progress=False)
    losses = history["image"].values["loss"]
    assert len(losses) == 40 and sum(losses[-8:]) < 0.7 * sum(losses[:8]) and list(history) == ["monitors", "joint", "image", "inference"]


def test_the_consensus_is_taught_what_was_concluded_and_nobody_else_is():
    cohort = make_cohort("together", 4, 32, seed=0)
    net, schedule = CaliDiff.for_cohort(cohort, TINY).net, distance_schedule()
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():  # an untrained network answers one half everywhere, whatever it should say
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    ask = lambda tokens, said=None: image_loss(net, cohort.images, cohort.masks, cohort.present, torch.tensor(tokens), schedule, concluded=said)
    elsewhere = torch.full((4, 1, 32, 32), 8.0), torch.zeros(4, 1, 32, 32), torch.zeros(4, 1)  # nothing anywhere
    others, agreed = [0, 1, 2, net.tokens.null], [net.tokens.consensus] * 4
    for name, part in ask(others, elsewhere).items():
        assert torch.equal(part, ask(others)[name]), name
    told = ask(agreed, elsewhere)
    assert told["distance"] == 0 and not torch.isclose(told["inside"], ask(agreed)["inside"])  # where nothing is there, there is no distance to learn
    average = soft_vote(cohort.masks, cohort.present)
    S = signed_distance(cohort.masks, 8.0).mean(1)
    same = ask(agreed, (S, average, torch.ones(4, 1)))
    for name, part in same.items():
        assert torch.isclose(part, ask(agreed)[name], atol=1e-6), name  # the panel's average, said aloud


def test_the_committee_trains_only_where_something_must_be_taught():
    steps = lambda **changes: sum(n for name, n in CaliDiffConfig(joint_steps=40, **changes).stages.items() if name.startswith("committee"))
    assert steps() == steps(committee_steps=0, fusion=True) == 0
    assert steps(fusion=True) == steps(adversary=True) == 20 and steps(committee_steps=6) == 6


def test_the_consensus_is_taught_once_the_committee_has_concluded():
    cohort = make_cohort("together", 12, 32, seed=2)
    train, valid = cohort.split((0.6, 0.4))
    seen = []
    model = CaliDiff.for_cohort(train, dataclasses.replace(TINY, image_steps=4, monitor=False))
    history = model.fit(train, valid, progress=False, on_stage=lambda h: seen.append(list(h)[-1]))
    assert seen == ["image", "inference", "committee 1", "committee 2"]  # after the image, expertness is measured for the first time
    assert [len(history[n].values["loss"]) for n in ("image", "inference")] == [2, 2]
    odd = dataclasses.replace(TINY, image_steps=5)
    assert (odd.stages["image"], odd.stages["inference"]) == (3, 2) and "inference" not in dataclasses.replace(TINY, image_steps=1).stages
    assert dataclasses.replace(TINY, joint_steps=7).stages["image"] == dataclasses.replace(TINY, joint_steps=7).stages["inference"] == 14


def test_nobody_is_asked_about_an_image_he_has_not_seen():
    cohort, net = make_cohort("balanced", 2, 32, seed=0), CaliDiff.for_cohort(make_cohort("balanced", 2, 32, seed=0), TINY).net
    present = cohort.present.clone()
    present[0, 1] = False
    with pytest.raises(ValueError, match="absent there"):
        image_loss(net, cohort.images, cohort.masks, present, torch.tensor([1, 1]), distance_schedule())


@pytest.mark.parametrize("part", ["normalise", "align", "fusion", "consensus", "adversary", "cross_rater"])
def test_each_part_is_a_switch(part):
    model = trained("balanced", dataclasses.replace(TINY, **{part: not getattr(TINY, part)}), n=16)
    assert torch.isfinite(model.calibrate(make_cohort("balanced", 2, seed=3)).pseudo_truth).all()


def test_refusals(model):
    with pytest.raises(ValueError, match="neither"):
        CaliDiff()
    with pytest.raises(ValueError, match="structures"):
        model.calibrate(make_cohort("two_structures", 2))
    with pytest.raises(ValueError, match="channel"):
        model.segment(torch.rand(1, 2, 64, 64))
    with pytest.raises(ValueError, match="sampler"):
        model.segment(torch.rand(1, 1, 64, 64), sampler="magic")
    with pytest.raises(ValueError, match="untrained"):
        CaliDiff(raters=3).calibrate(make_cohort("balanced", 2))
    with pytest.raises(FileNotFoundError, match="one of"):
        CaliDiff.from_pretrained("nothing")
    with pytest.raises(ValueError, match="divide"):
        unfold_raters(torch.zeros(5, 1), 2)


def test_covariance_is_split_exactly():
    own = torch.diag(torch.tensor([0.3, 1.0, 2.0, 4.0]))
    shared, found = split_covariance(1.2 + own)
    assert abs(shared - 1.2) < 1e-5 and torch.allclose(found, own, atol=1e-4)
    w = frame_weights(own)
    assert torch.allclose(w, (1 / own.diagonal()) / (1 / own.diagonal()).sum(), atol=1e-5)
    assert frame_weights(own, torch.tensor([0.0, 0.0, 0.0, 9.0]))[3] < 1e-3


def test_one_who_hears_less_of_what_is_hidden_makes_nobody_a_conspirator():
    own = torch.diag(torch.tensor([0.3, 0.7, 1.3, 9.0]))
    ears = torch.tensor([[1.4, 1.3, 1.35, 0.3], [1.0, 0.75, 1.05, 0.95]])  # an adversary; one who leaves the doubtful part out
    shared, found = split_covariance(ears[:, :, None] * ears[:, None] + own)
    assert torch.allclose(found, own.expand(2, 4, 4), atol=0.1)  # medians find it nearly, not exactly
    assert torch.allclose(shared, torch.tensor([1.325, 0.975]) ** 2, atol=0.05)
    pair = own.clone()
    pair[1, 2] = pair[2, 1] = 0.8
    assert torch.allclose(split_covariance(1.2 + pair)[1], pair, atol=1e-3)  # and who does conspire is found
    assert split_covariance(torch.tensor([[[2.0]]]))[0] == 1.0 and split_covariance(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))[0].sub(0.5).abs() < 1e-5


def test_where_two_trusted_raters_contradict_each_other_the_frame_lies_between():
    """Two steady raters, two pixels inside and outside, and nobody else to ask: neither may win by chance."""
    g, (b, h) = torch.Generator().manual_seed(0), (40, 48)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(h), indexing="ij")
    radius = 10 + 3 * torch.rand(b, 1, 1, generator=g)
    truth = ((y - h / 2) ** 2 + (x - h / 2) ** 2).sqrt() - radius
    habit = torch.tensor([2.0, -2.0, 0.3, -0.3])
    Q = (truth[:, None] + habit[:, None, None])[:, :, None]
    tremble = torch.tensor([0.5, 0.5, 1.6, 1.6])[:, None] * torch.randn(b, 4, 1, generator=g) + torch.randn(b, 1, 1, generator=g)
    marked, present = torch.ones(b, 4, 1, dtype=torch.bool), torch.ones(b, 4, dtype=torch.bool)
    who = expertness(Q + tremble[..., None, None], Q, marked, present, generator=g)
    assert abs(float(who.weights[:, 0] @ habit)) < 0.7 and (who.weights[:2, 0] > 0.2).all()
    assert any("the frame lies between them" in w for w in who.warnings)


def test_fusion_of_independent_raters_is_the_precision_weighted_mean():
    g = torch.Generator().manual_seed(0)
    Z, C = torch.randn(2, 3, 1, 8, 8, generator=g), torch.randn(2, 1, 8, 8, generator=g)
    own, shared = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0])
    f = fuse(Z, C, torch.ones(2, 3, 1, dtype=torch.bool), torch.diag(own)[..., None], shared)
    p = 1 / own
    alone = (Z * p[None, :, None, None, None]).sum(1) / p.sum()
    u = torch.exp(-((alone - C) ** 2) / (2 * (1 / p.sum() + 3)))  # (23.3), by hand
    assert torch.allclose(f.distance, (alone * p.sum() + C * u / 3) / (p.sum() + u / 3), atol=1e-5)
    agreed = fuse(C[:, None].expand_as(Z), C, torch.ones(2, 3, 1, dtype=torch.bool), torch.diag(own)[..., None], shared)
    assert torch.allclose(agreed.belief, torch.ones_like(C)) and torch.allclose(agreed.sd, (p.sum() + 1 / 3).rsqrt().expand(2, 1))


def test_an_image_that_sees_nothing_is_no_witness_where_somebody_marked():
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    small = ((y - 12).hypot(x - 12) - 3).expand(3, 2, 2, 24, 24)  # three cases, two raters, two structures
    C = torch.stack([small[0, 0] + 3.4, small[0, 0] + 1.0, small[0, 0] + 3.4])  # encloses nothing, something, nothing
    usable = torch.ones(3, 2, 2, dtype=torch.bool)
    usable[2, :, 1] = False  # and in the last case nobody marked the second structure
    f = fuse(small, C, usable, torch.eye(2)[..., None].expand(2, 2, 2) * 4, torch.ones(2))
    assert torch.allclose(f.distance[0], small[0, 0], atol=1e-5) and torch.allclose(f.sd[0], torch.tensor(2.0).sqrt())  # the raters alone, as sure as two of variance 4 are
    assert (f.distance[1, :, 12, 12] > small[1, 0, :, 12, 12] + 0.2).all()  # who sees something smaller is heard
    assert torch.allclose(f.distance[2, 0], small[2, 0, 0], atol=1e-5) and torch.allclose(f.distance[2, 1], C[2, 1], atol=1e-5)  # structure by structure; with nobody else the image speaks
    assert torch.allclose(f.shares.sum(1), torch.ones(3, 2, 24, 24))


@pytest.mark.parametrize("n, slots", [(16, 4), (7, 3), (2, 4), (9, 1)])
def test_presence_is_spread_evenly_and_every_sample_is_uniform(n, slots):
    u = spread_evenly(3000, n, 2, slots, torch.Generator().manual_seed(0))
    assert u.shape == (3000, n, 2) and u.min() >= 0 and u.max() < 1
    for i in range(n):  # Kolmogorov-Smirnov by hand: one sample in 3000 images
        one = u[:, i, 0].sort().values
        assert (one - (torch.arange(3000) + 0.5) / 3000).abs().max() < 1.95 / 3000**0.5
    for p in (0.15, 0.5, 0.8):
        for r in range(min(slots, n)):
            m = len(range(r, n, slots))
            assert set((u[:, r::slots] < p).sum(1).flatten().tolist()) <= {int(m * p), int(m * p) + 1}
    assert not torch.equal(u[..., 0], u[..., 1])  # structures are drawn apart


def test_stage_one_is_practised_again_lest_the_walk_be_unlearnt():
    train, valid = make_cohort("balanced", 20, 32, seed=8).split((0.6, 0.4))
    histories = {}
    for every in (0, 3):
        plan = dataclasses.replace(TINY, revisit=every, image_steps=16, committee_steps=0)
        histories[every] = CaliDiff.for_cohort(train, plan).fit(train, valid, progress=False)
    assert "revisited" not in histories[0]["image"].values
    for stage in ("image", "inference"):
        again = torch.tensor(histories[3][stage].values["revisited"])
        assert (~again.isnan()).nonzero().flatten().tolist() == [2, 5] and len(histories[3][stage].values["loss"]) == len(histories[0][stage].values["loss"]) == 8
    with pytest.raises(ValueError, match="revisit must be a number of steps, or 0 for never; got -1"):
        CaliDiffConfig(revisit=-1)


def test_two_colluding_raters_count_for_little_more_than_one():
    N = torch.tensor([[1.0, 0.95, 0.0], [0.95, 1.0, 0.0], [0.0, 0.0, 1.0]])[..., None]
    f = fuse(torch.zeros(1, 3, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.ones(1, 3, 1, dtype=torch.bool), N, torch.tensor([100.0]))
    pair, single = f.weights[0, :2, 0].sum(), f.weights[0, 2, 0]
    assert single < pair < 1.1 * single


def test_expertness_needs_marks():
    zeros = torch.zeros(3, 2, 1, 8, 8)
    with pytest.raises(ValueError, match="mark something"):
        expertness(zeros, zeros, torch.zeros(3, 2, 1, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool))


def test_a_short_training_learns():
    """From the image alone, after a minute: far better than an untrained network, and the loss has fallen."""
    cohort = make_cohort("unequal", 160, seed=11)
    train, valid, test = cohort.split((0.7, 0.15, 0.15))
    model = CaliDiff.for_cohort(train, CaliDiffConfig(widths=(16, 24, 32), joint_steps=100, committee_steps=0, consensus=False, batch=8))
    history = model.fit(train, valid, progress=False)["joint"].values["loss"]
    assert sum(history[-10:]) < 0.4 * sum(history[:10])
    said = model.segment(test.images, n=1)
    assert dice((said.consensus > 0.5).to(torch.uint8), test.truth).mean() > 0.75
    found = model.calibrate(test)
    best = max(float(dice(test.masks[:, r], test.truth).mean()) for r in range(4))
    assert dice((found.pseudo_truth > 0.5).to(torch.uint8), test.truth).mean() > best - 0.03
    assert isinstance(test, Cohort)
