"""The container of every case: what it refuses, and what its methods must never change."""
import importlib.util
import re
import sys
from dataclasses import replace

import pytest
import torch

from calidiff_nb.raters import cases
from calidiff_nb.raters.cases import Cohort, draw_like, pick_device, to_signed, to_unit


def as_users_have_it():
    """The module without the shape hook of the tests, which would speak before our own sentences do."""
    spec = importlib.util.spec_from_file_location("cases_without_hook", cases.__file__)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAIN = as_users_have_it()


def cohort(b=6, r=4, k=1, size=8, kind=Cohort, **changes):
    g = torch.Generator().manual_seed(0)
    present = torch.ones(b, r, dtype=torch.bool)
    present[0, -1] = r == 1
    masks = torch.randint(2, (b, r, k, size, size), generator=g, dtype=torch.uint8) * present[:, :, None, None, None]
    held = dict(
        images=torch.rand(b, 1, size, size, generator=g), masks=masks, present=present,
        case_ids=tuple(f"c{i}" for i in range(b)), patient_ids=tuple(f"p{i // 2}" for i in range(b)), spacing=torch.ones(b, 2),
        rater_names=tuple(f"r{i}" for i in range(r)), structure_names=tuple(f"s{i}" for i in range(k)),
        truth=masks[:, 1 % r].clone(), truth_prob=torch.rand(b, k, size, size, generator=g),
    )
    return kind(**(held | changes))


def changed(**changes):
    return lambda: replace(cohort(kind=PLAIN.Cohort), **changes)


WRONG = {
    "masks of 255": (changed(masks=cohort().masks * 255), "masks must be 0 or 1; got values up to 255"),
    "masks as floats": (changed(masks=cohort().masks.float()), "masks must be uint8 .*got torch.float32"),
    "masks without structures": (changed(masks=cohort().masks[:, :, 0]), r"masks must be uint8 \(b, r, k, h, w\); got shape"),
    "images of another size": (changed(images=torch.rand(6, 1, 9, 8)), "images and masks must agree"),
    "fewer images": (changed(images=torch.rand(5, 1, 8, 8)), "images and masks must agree"),
    "images of 255": (changed(images=cohort().images * 255), r"images must be finite and in \[0, 1\]"),
    "images with NaN": (changed(images=cohort().images.index_fill(0, torch.tensor([2]), float("nan"))), "images must be finite"),
    "negative images": (changed(images=cohort().images - 1), "images must be finite"),
    "nobody there": (changed(present=torch.zeros(6, 4, dtype=torch.bool), masks=cohort().masks * 0), "no rater saw any case"),
    "marks of the absent": (changed(masks=torch.ones(6, 4, 1, 8, 8, dtype=torch.uint8)), "masks of absent raters must be zero"),
    "present as numbers": (changed(present=torch.ones(6, 4)), "present must be bool"),
    "present of others": (changed(present=torch.ones(6, 3, dtype=torch.bool)), r"present must have shape \(6, 4\)"),
    "too few names": (changed(rater_names=("a", "b")), "rater_names must hold 4 names"),
    "a name twice": (changed(rater_names=("a", "b", "c", "a")), "rater_names must differ"),
    "a case twice": (changed(case_ids=("c",) * 6), "case_ids must differ"),
    "pixels of no size": (changed(spacing=torch.zeros(6, 2)), "spacing must be positive"),
    "pixels of endless size": (changed(spacing=torch.full((6, 2), float("inf"))), "spacing must be positive"),
    "pixels of unknown size": (changed(spacing=torch.full((6, 2), float("nan"))), "spacing must be positive"),
    "truth of another shape": (changed(truth=torch.zeros(6, 2, 8, 8, dtype=torch.uint8)), r"truth must have shape \(6, 1, 8, 8\)"),
    "truth of label values": (changed(truth=torch.full((6, 1, 8, 8), 2, dtype=torch.uint8)), "truth must be 0 or 1"),
    "improbable truth": (changed(truth_prob=torch.full((6, 1, 8, 8), 1.5)), "truth_prob must be finite"),
    "no case at all": (lambda: cohort(b=1).subset([]), "indices must be one or more"),
    "case out of range": (lambda: cohort().subset([6]), r"positions in 0\.\.5"),
    "nobody by that name": (lambda: cohort().without_rater("Zoe"), "rater must be a position"),
    "rater out of range": (lambda: cohort().without_rater(4), "rater must be a position"),
    "the only rater": (lambda: cohort(r=1).without_rater(0), "is the only one"),
    "shares above one": (lambda: cohort().split((0.8, 0.4)), "fractions must be positive"),
    "no share": (lambda: cohort().split((1.0, 0.0)), "fractions must be positive"),
    "more parts than patients": (lambda: cohort().split((0.25,) * 4), "at least one patient per part"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refuses_with_one_sentence(wrong):
    act, said = WRONG[wrong]
    with pytest.raises(ValueError, match=said) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_arrays_of_others_are_refused_before_anything_else():
    with pytest.raises(TypeError, match="images must be a torch tensor.*ndarray"):
        replace(cohort(kind=PLAIN.Cohort), images=cohort().images.numpy())


def test_accepts_what_is_merely_unusual():
    alone = cohort(r=1)
    assert any("Only one rater" in w for w in alone.warnings)
    nobody = cohort()
    present = nobody.present.clone()
    present[1] = False
    lonely = replace(nobody, present=present, masks=nobody.masks * present[:, :, None, None, None])
    assert any("1 case(s) have no rater" in w for w in lonely.warnings)
    assert cohort().warnings == ()


def test_checking_copies_nothing():
    c = cohort()
    again = replace(c, notes=("x",))
    assert again.masks.data_ptr() == c.masks.data_ptr() and again.images.data_ptr() == c.images.data_ptr()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fractions", [(0.7, 0.15, 0.15), (0.5, 0.5), (0.34, 0.33, 0.33), (1.0,)])
def test_split_keeps_patients_whole(seed, fractions):
    c = cohort(b=40)
    parts = c.split(fractions, seed)
    patients = [set(p.patient_ids) for p in parts]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 20 and all(patients)
    assert sorted(sum((p.case_ids for p in parts), ())) == sorted(c.case_ids)
    assert [p.content_hash() for p in parts] == [p.content_hash() for p in c.split(fractions, seed)]
    assert all(abs(len(p) / 40 - f) <= 0.05 for p, f in zip(patients, [f / 2 for f in fractions]))


def test_split_depends_on_names_and_seed_only():
    c = cohort(b=40)
    forth, back = c.split((0.6, 0.4), 3)[0], c.subset(list(range(39, -1, -1))).split((0.6, 0.4), 3)[0]
    assert set(forth.case_ids) == set(back.case_ids)
    assert len({c.split((0.6, 0.4), seed)[0].case_ids for seed in range(6)}) > 1


@pytest.mark.parametrize("fractions", [(0.9, 0.05, 0.05), (0.05, 0.9, 0.05), (0.05, 0.05, 0.9)])
def test_no_part_is_left_without_a_patient(fractions):
    assert [len(set(p.patient_ids)) for p in cohort(b=6).split(fractions)] == [1, 1, 1]


def test_a_part_may_be_left_out():
    half, = cohort(b=40).split((0.5,))
    assert len(set(half.patient_ids)) == 10


def test_subset_takes_everything_along():
    c = cohort()
    some = c.subset(torch.tensor([4, 1, -1]))
    for name in ("images", "masks", "present", "spacing", "truth", "truth_prob"):
        assert torch.equal(getattr(some, name), getattr(c, name)[[4, 1, 5]]), name
    assert some.case_ids == ("c4", "c1", "c5") and some.patient_ids == ("p2", "p0", "p2")


def test_rater_by_name_or_position():
    c = cohort()
    assert c.without_rater("r2").content_hash() == c.without_rater(2).content_hash()
    assert c.without_rater(2).rater_names == ("r0", "r1", "r3")
    assert torch.equal(c.without_rater(0).masks, c.masks[:, 1:]) and torch.equal(c.without_rater(0).present, c.present[:, 1:])


def test_absent_raters_leave_a_note():
    c = cohort()
    first = c.subset([0])
    assert first.warnings[0].startswith("r3 saw no case")
    kept = first.drop_absent_raters()
    assert kept.rater_names == ("r0", "r1", "r2") and kept.notes == ("Dropped raters who saw no case: r3.",)
    assert c.drop_absent_raters() is c


def test_shuffled_slots_keep_opinions_and_forget_persons():
    c = cohort(b=40)
    mixed = c.shuffle_slots(torch.Generator().manual_seed(1))
    for b in range(len(c)):
        before = sorted((bool(p), m.flatten().tolist()) for p, m in zip(c.present[b], c.masks[b]))
        assert before == sorted((bool(p), m.flatten().tolist()) for p, m in zip(mixed.present[b], mixed.masks[b]))
    assert torch.equal(mixed.masks, c.shuffle_slots(torch.Generator().manual_seed(1)).masks)
    where = (mixed.masks[:, :, None] == c.masks[:, None]).flatten(3).all(3).float().argmax(2)
    assert all(len(where[:, r].unique()) == 4 for r in range(4))              # every slot has met every rater
    assert torch.equal(mixed.truth, c.truth) and not mixed.raters_identified and c.raters_identified


def test_persons_are_refused_where_slots_are_not_persons():
    c = cohort()
    c.require_identified("expertness")
    with pytest.raises(ValueError, match="^expertness needs raters that are the same person.*LIDC"):
        c.shuffle_slots().require_identified("expertness")


def test_fingerprint_sees_data_and_nothing_else():
    c = cohort()
    same = [replace(c, source="elsewhere"), replace(c, notes=("n",)), c.to("cpu"), c.subset(range(6))]
    pixel = c.images.clone()
    pixel[3, 0, 2, 2] = 1 - pixel[3, 0, 2, 2]
    others = [replace(c, images=pixel), c.subset([1, 0, 2, 3, 4, 5]), replace(c, rater_names=tuple("abcd")), replace(c, truth=None), c.shuffle_slots()]
    prints = [x.content_hash() for x in others]
    assert {x.content_hash() for x in same} == {c.content_hash()} and len(set(prints) - {c.content_hash()}) == len(others)
    assert re.fullmatch("[0-9a-f]{64}", c.content_hash())


def test_fingerprint_of_a_view_is_that_of_its_values():
    c = cohort()
    view = c.images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert not view.is_contiguous() and replace(c, images=view).content_hash() == c.content_hash()


def test_summary_counts_absence_and_silence_apart():
    c = cohort()
    masks = c.masks.clone()
    masks[2, 1] = 0
    said = replace(c, masks=masks).summary()
    assert "r1: saw 6 of 6, marked nothing in 1" in said and "r3: saw 5 of 6, marked nothing in 0" in said
    assert repr(c) == "Cohort(6 cases, 4 raters, 1 structures, 8x8 px)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_signed_and_back(dtype):
    p = torch.linspace(0, 1, 5, dtype=dtype)
    assert to_signed(p).dtype == dtype and torch.equal(to_unit(to_signed(p)), p)
    assert to_signed(p)[[0, 2, 4]].tolist() == [-1, 0, 1]


@pytest.mark.parametrize("bridge, name", [(PLAIN.to_signed, "p"), (PLAIN.to_unit, "u")])
def test_unsigned_integers_never_reach_the_formula(bridge, name):
    with pytest.raises(TypeError, match=f"^{name} must be floating point; got torch.uint8"):
        bridge(torch.tensor([0, 1], dtype=torch.uint8))


def test_noise_follows_shape_dtype_and_generator():
    x = torch.zeros(3, 2, dtype=torch.float64)
    one, two = (draw_like(x, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, two) and one.dtype == x.dtype and one.shape == x.shape
    state = torch.get_rng_state()
    draw_like(x, torch.Generator())
    assert torch.equal(state, torch.get_rng_state())                          # torch's own generator is left alone
    assert not torch.equal(draw_like(x), draw_like(x))


def test_device_is_one_this_machine_has():
    assert torch.zeros(1, device=pick_device()).device.type == pick_device().type


@pytest.mark.gpu
def test_same_noise_and_fingerprint_on_the_gpu():
    x = torch.zeros(50)
    there = draw_like(x.cuda(), torch.Generator().manual_seed(0))
    assert there.is_cuda and torch.equal(there.cpu(), draw_like(x, torch.Generator().manual_seed(0)))
    c = cohort()
    assert c.to("cuda").content_hash() == c.content_hash() and c.to("cuda").subset([1, 0]).images.is_cuda
    mixed = c.to("cuda").shuffle_slots(torch.Generator().manual_seed(0))
    assert torch.equal(mixed.masks.cpu(), c.shuffle_slots(torch.Generator().manual_seed(0)).masks)
