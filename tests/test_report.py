"""The page: everything inside, words computed from numbers, never half-written."""
import errno
import os
import re
from html.parser import HTMLParser

import pytest
import torch

from calidiff_nb.calidiff.expertness import Expertness
from calidiff_nb.calidiff.model import Calibration, Segmentation
from calidiff_nb.diffusion.samplers import Trajectory
from calidiff_nb.explore import report
from calidiff_nb.explore.report import (
    Comparison,
    Evidence,
    Provenance,
    Section,
    calibration_report,
    calibration_section,
    case_agreement,
    cohort_section,
    compare,
    compare_masks,
    compare_probabilities,
    disagreement_section,
    expertness_html,
    headline,
    honesty_section,
    known_spacing,
    note_html,
    origin_section,
    page_html,
    probabilities,
    provenance,
    reliability_points,
    segmentation_section,
    showcase,
    table_html,
    truth_section,
    walk_section,
    write_at_once,
    write_page,
)
from calidiff_nb.raters.cases import Cohort
from calidiff_nb.raters.distance import signed_distance


def make_evidence(b: int = 6, r: int = 4, k: int = 1, size: int = 32, identified: bool = True, truth: bool = True, lost: bool = True) -> Evidence:
    """Discs whose raters draw -2, +2, +2.5, 0.2 px off, and a calibration that undoes it."""
    g = torch.Generator().manual_seed(0)
    yy, xx = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    radius = 6 + 3 * torch.rand(b, 1, k, 1, 1, generator=g)
    wobble = (xx / 3 + torch.arange(b)[:, None, None, None, None]).sin()
    offsets = torch.tensor([-2.0, 2.0, 2.5, 0.2, 0.0, 1.0, -1.0])[:r].view(1, r, 1, 1, 1)
    field = torch.hypot(yy - size / 2, xx - size / 2) - radius - 0.5 * wobble
    true = (field[:, 0] < 0).to(torch.uint8)
    masks = (field - offsets < 0).to(torch.uint8)
    present = torch.ones(b, r, dtype=torch.bool)
    if lost and b > 1 and r > 1:
        present[1, 0] = False
    masks = masks * present[:, :, None, None, None]
    images = (0.4 + 0.3 * torch.sigmoid(-field[:, 0].amin(1, keepdim=True)) + 0.05 * torch.randn(b, 1, size, size, generator=g)).clamp(0, 1)
    cohort = Cohort(images=images, masks=masks, present=present, case_ids=tuple(f"case-{i}" for i in range(b)), patient_ids=tuple(f"p{i // 2}" for i in range(b)),
                    spacing=torch.full((b, 2), 0.7), rater_names=tuple("ABCDEFG"[:r]), structure_names=tuple(("lesion", "core")[:k]), raters_identified=identified,
                    truth=true if truth else None, source="Discs, drawn by a test.", notes=("The scans are rendered behind the contours.",))
    S = signed_distance(masks)
    verdict_ = signed_distance(true) * 0.98
    attention = torch.full((b, r + 1, k, size, size), 1 / (r + 1))
    weights, eye = torch.full((r, k), 1 / r), torch.eye(r)[..., None].expand(r, r, k).clone()
    who = Expertness(weights=weights, weights_low=weights * 0.8, weights_high=weights * 1.2, covariance=eye, shared=torch.ones(k), total=eye + 1, bias=torch.zeros(r, k),
                     lapse=torch.zeros(r, k), invent=torch.zeros(r, k), collusion=eye, collusion_low=eye * 0.5, cases=b, identified=identified, warnings=())
    p = torch.special.ndtr(-verdict_)
    calibration = Calibration(unbiased=S, normalised=S * 0.9, aligned=S * 0.5 + 0.5 * verdict_[:, None], fused=verdict_, consensus=verdict_, pseudo_truth=p,
                              pseudo_distance=verdict_, pseudo_sd=torch.full((b, k), 0.6), attention=attention, expertness=who, present=present, warnings=("Beware of the test.",))
    samples = torch.stack([(verdict_ + 0.7 * s - 2 < 0) for s in range(6)], 1).to(torch.uint8)
    entropy = torch.zeros_like(p)
    segmentation = Segmentation(consensus=torch.special.ndtr(-verdict_ * 0.5), consensus_distance=verdict_, per_rater=p[:, None].expand(b, r, k, size, size),
                                samples=samples, uncertainty=entropy)
    beliefs = [verdict_[:1] / 8 for _ in range(4)]
    states = [torch.randn(1, k, size, size, generator=g) * (1 - i / 4) + verdict_[:1] / 8 for i in range(5)]
    walk = Trajectory(states[-1], states, beliefs, torch.tensor([999, 666, 333, 0]))
    return Evidence(cohort, calibration, segmentation, walk, 0)


def make_origin(found: Evidence) -> Provenance:
    return provenance("calidiff demo", {"seed": 0}, {"test": found.cohort}, {"model": "nowhere"}, 0)


@pytest.fixture(scope="module")
def page() -> str:
    found = make_evidence()
    return calibration_report(found, make_origin(found), simulated=found)


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.void = [], [], {"img", "meta", "link", "input", "br"}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_page_is_well_formed_and_asks_for_nothing_outside(page):
    reader = read(page)
    assert reader.open == []
    for tag, attrs in reader.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert name not in attrs or attrs[name].startswith(("data:", "#")), (tag, attrs[name][:60])
    assert "@import" not in page and not re.search(r"url\(", page)


def test_each_picture_has_words_and_both_themes(page):
    images = [a for t, a in read(page).tags if t == "img"]
    assert len(images) > 15
    assert all(len(a["alt"]) > 20 for a in images)
    kinds = [a.get("class") for a in images]
    assert kinds.count("for-light") == kinds.count("for-dark") > 5


def test_contents_list_points_at_every_heading(page):
    tags = read(page).tags
    ids = {a["id"] for t, a in tags if t == "h2"}
    links = {a["href"][1:] for t, a in tags if t == "a" and a.get("href", "").startswith("#")} - {"content"}
    assert ids == links and len(ids) >= 7
    assert sum(t == "h1" for t, _ in tags) == 1


def test_page_says_what_is_not_what_it_seems(quick_pictures):
    found = make_evidence(identified=False)
    page = calibration_report(found, make_origin(found))
    assert "Slots are not persons" in page and "Only its abstract is public" in page
    assert "The scans are rendered behind the contours." in page and "Beware of the test." in page
    assert "Whom to believe" not in page and "Where the truth is known" not in page


def test_page_tells_how_to_make_it_again(page):
    found = make_evidence()
    origin = make_origin(found)
    for word in (origin.config_hash, found.cohort.content_hash()[:12], "torch", "calidiff demo"):
        assert word in page


def test_provenance_changes_with_the_settings():
    found = make_evidence()
    a, b = (provenance("x", {"seed": s}, {}, {}, s).config_hash for s in (0, 1))
    assert a != b and make_origin(found).config_hash == a


@pytest.fixture
def quick_pictures(monkeypatch):
    """Lay pictures out without painting them."""
    monkeypatch.setattr(report, "picture_html", lambda picture: picture.draw_without_rendering() or "")
    monkeypatch.setattr(report.Picture, "png", lambda *_: b"")


@pytest.mark.parametrize("shape", [dict(r=1), dict(r=2, k=2), dict(r=7), dict(b=1), dict(identified=False)])
def test_report_copes_with_few_many_and_two(shape, quick_pictures):
    found = make_evidence(**({"b": 3} | shape))
    assert "</html>" in calibration_report(found, make_origin(found), simulated=found)


def test_report_copes_with_empty_masks(quick_pictures):
    found = make_evidence(b=3)
    c = found.cohort
    masks = c.masks.clone()
    masks[0] = 0
    empty = Cohort(**{f: getattr(c, f) for f in c.__dataclass_fields__} | {"masks": masks})
    found = Evidence(empty, found.calibration, found.segmentation)
    assert "</html>" in calibration_report(found, make_origin(found), simulated=found)


def test_user_words_are_escaped():
    page = page_html("<b>T</b>", "<script>", [("<1>", "<2>")], [Section("a", "<h>", note_html("<img onerror=x>") + table_html(("<",), [("&",)], "<c>"))])
    assert "<b>T</b>" not in page and "<img onerror" not in page and "&lt;c&gt;" in page


def scores(*rows: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(row, dtype=torch.float64) for name, row in zip("abc", rows, strict=False)}


def test_compare_finds_a_win_a_loss_and_a_tie():
    base = [0.5 + 0.01 * i for i in range(20)]
    found = compare(scores(base, [x + 0.1 for x in base], [x - 0.1 for x in base]), "a")
    assert found.verdicts() == ("reference", "wins", "loses")
    assert "does better than a (+0.100" in found.sentences()[0] and "does worse than a (-0.100" in found.sentences()[1]
    same = compare(scores(base, [x + (0.1 if i % 2 else -0.1) for i, x in enumerate(base)]), "a")
    assert same.verdicts()[1] == "undecided" and "cannot be told from" in same.sentences()[0]
    assert "closer to the truth than a; further" not in headline(found, "b") and "closer to the truth than a, c" in headline(found, "b")
    assert "further from it than a, b" in headline(found, "c")


def test_compare_turns_round_for_errors():
    base = [0.5 + 0.01 * i for i in range(20)]
    assert compare(scores(base, [x + 0.1 for x in base]), "a", higher_is_better=False).verdicts()[1] == "loses"


def test_compare_refuses_an_unknown_reference():
    with pytest.raises(ValueError, match="reference must be one of"):
        compare(scores([1.0, 2.0]), "z")
    with pytest.raises(ValueError, match="name must be one of"):
        compare(scores([1.0, 2.0]), "a").row("z")


def test_intervals_resample_patients_not_cases():
    x = torch.tensor([0.0, 1.0] * 10, dtype=torch.float64).sort().values
    alone = compare({"a": x}, "a")
    grouped = compare({"a": x}, "a", groups=["p"] * 10 + ["q"] * 10)
    assert float(grouped.high - grouped.low) > 1.5 * float(alone.high - alone.low)


def test_compare_masks_knows_who_is_closest():
    found = make_evidence()
    table = compare_masks(found.cohort, found.calibration, found.segmentation)
    best = table.names[int(table.mean.argmax())]
    assert best in ("pseudo-truth", "consensus (image alone)") and table.mean[table.row("pseudo-truth")] > 0.99
    r = [float(x) for x in table.values[table.row("best single rater")]]
    assert table.mean[table.row("majority (ties in)")] < sum(r) / len(r)      # three of four draw too large
    soft = compare_probabilities(found.cohort, found.calibration, found.segmentation)
    assert not soft.higher_is_better and soft.names[int(soft.mean.argmin())] in ("pseudo-truth", "consensus (image alone)")


def test_comparison_needs_a_truth():
    found = make_evidence(truth=False)
    with pytest.raises(ValueError, match="known truth"):
        compare_masks(found.cohort, found.calibration, found.segmentation)


def test_missing_rater_equals_rater_removed():
    found = make_evidence(lost=False)
    c = found.cohort
    present = c.present.clone()
    present[:, 2] = False
    masks = c.masks.clone()
    masks[:, 2] = 0
    gone = Cohort(**{f: getattr(c, f) for f in c.__dataclass_fields__} | {"masks": masks, "present": present})
    less = c.without_rater(2)
    assert torch.allclose(case_agreement(gone), case_agreement(less))
    a, b = (probabilities(x, found.calibration, found.segmentation)["soft vote"] for x in (gone, less))
    assert torch.equal(a, b)


def test_showcase_goes_by_disagreement():
    found = make_evidence(b=6, lost=False)
    agreement = case_agreement(found.cohort)
    low, high = showcase(found.cohort, (0.0, 1.0))
    assert agreement[low] == agreement.max() and agreement[high] == agreement.min()
    assert showcase(found.cohort.subset([0]), (0.1, 0.9)) == [0]


def test_reliability_points_count_every_answer():
    found = make_evidence(lost=False)
    p = found.calibration.pseudo_truth
    points = reliability_points({"x": p}, found.cohort.truth[:, None])
    assert int(points["counts"].sum()) == p.numel()
    seen = points["counts"] > 0
    assert (points["low"][seen] <= points["observed"][seen] + 1e-9).all() and (points["observed"][seen] <= points["high"][seen] + 1e-9).all()


def test_millimetres_are_shown_only_where_somebody_measured_them(quick_pictures):
    c = make_evidence().cohort
    assert torch.equal(known_spacing(c, 0), c.spacing[0])
    blind = Cohort(**{f: getattr(c, f) for f in c.__dataclass_fields__} | {"spacing": torch.ones(len(c), 2)})
    assert known_spacing(blind, 0) is None and "size of a pixel not known" in cohort_section(blind, blind).body


def test_each_section_stands_alone(quick_pictures):
    found = make_evidence(b=4)
    sections = [cohort_section(found.cohort, found.cohort), disagreement_section(found.cohort, found.cohort), calibration_section(found), walk_section(found),
                segmentation_section(found), truth_section(found), honesty_section(), origin_section(make_origin(found))]
    assert len({s.anchor for s in sections}) == 8 and all(s.title and read(s.body).open == [] for s in sections)


def test_no_expertness_where_slots_are_not_persons(quick_pictures):
    assert "no expertness is reported" in expertness_html(make_evidence(identified=False)) and expertness_html(make_evidence()) == ""


def test_write_at_once_takes_any_writer(tmp_path):
    assert write_at_once(tmp_path / "x.bin", lambda part: part.write_bytes(b"1")).read_bytes() == b"1"


def test_walk_section_needs_a_walk():
    found = make_evidence()
    with pytest.raises(ValueError, match="model.trajectory"):
        walk_section(Evidence(found.cohort, found.calibration, found.segmentation))


def test_write_page_replaces_at_once(tmp_path):
    place = tmp_path / "a" / "index.html"
    assert write_page("one", place) == place and write_page("two", place).read_text() == "two"
    assert [p.name for p in place.parent.iterdir()] == ["index.html"]


def test_write_page_leaves_the_old_page_when_the_disk_is_full(tmp_path, monkeypatch):
    place = tmp_path / "index.html"
    write_page("old", place)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_page("new", place)
    assert place.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_write_page_cleans_up_after_ctrl_c(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_page("new", tmp_path / "index.html")
    assert list(tmp_path.iterdir()) == []


def test_comparison_is_frozen():
    found = compare(scores([1.0, 2.0]), "a")
    assert isinstance(found, Comparison)
    with pytest.raises(AttributeError):
        found.names = ()
