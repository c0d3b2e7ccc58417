"""Guards of 32_speed: equal work, fair turns, honest sums. Never a time."""
import dataclasses
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calidiff_nb.compare import speed
from calidiff_nb.compare.speed import (
    AIMS, KINDS, Contestant, Lap, Roofline, Row, SpeedReport, Task, borrowed_contestant, contestants, count_flops, count_parameters, equal_flop_ratio,
    fit_exponent, ged_by_loops, kind_of, measure_growth, measure_raters, measure_speed, our_contestant, profile_shares, race, ratio,
    roofline, speed_report, staple_by_itk, typical, widget_step,
)
from calidiff_nb.diffusion.denoisers import borrowed_denoiser
from calidiff_nb.diffusion.samplers import sample
from calidiff_nb.diffusion.schedules import cosine_schedule
from calidiff_nb.raters.agreement import staple
from calidiff_nb.raters.metrics import ged
from calidiff_nb.raters.simulate import make_cohort

SMALL = Task(size=16, raters=2, samples=2, images=1)
needs = {name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed") for name in ("diffusers", "monai", "SimpleITK")}


# --- the stopwatch

def test_race_takes_turns_and_a_long_first_lap_counts(monkeypatch):
    order = []
    laps = race({name: lambda name=name: order.append(name) for name in "ABC"}, 3)
    assert order == list("ABC") * 4 and {len(x) for x in laps.values()} == {3}
    monkeypatch.setattr(speed, "LONG", -1.0)
    order.clear()
    race({name: lambda name=name: order.append(name) for name in "AB"}, 3)
    assert order == list("AB") * 3


def test_a_job_out_of_memory_does_not_stop_the_race():
    def greedy():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    laps = race({"greedy": greedy, "modest": lambda: None}, 2)
    assert len(laps["greedy"]) == 2 and math.isnan(typical(laps["greedy"]).wall) and typical(laps["modest"]).wall >= 0
    with pytest.raises(RuntimeError, match="other"):
        race({"broken": lambda: (_ for _ in ()).throw(RuntimeError("some other reason"))}, 1)


def test_typical_is_the_median_of_each_clock():
    assert typical([Lap(1.0, 30.0), Lap(9.0, 10.0), Lap(2.0, 20.0)]) == Lap(2.0, 20.0)


def test_the_two_clocks_differ_while_we_sleep():
    import time
    lap = speed.one_lap(lambda: time.sleep(0.05))
    assert lap.wall > lap.cpu      # sleeping is no work


@pytest.mark.parametrize("rounds", [0, -1])
def test_race_refuses_no_rounds(rounds):
    with pytest.raises(ValueError, match=f"rounds must be at least 1; got {rounds}"):
        race({"a": lambda: None}, rounds)


# --- equal work

@pytest.mark.parametrize("wrong,words", [({"size": 60}, "multiple of 8.*60"), ({"size": 0}, "multiple of 8.*0"), ({"samples": 0}, "at least 1; got 4, 0, 8")])
def test_task_refuses(wrong, words):
    with pytest.raises(ValueError, match=words):
        Task(**wrong)


def test_contestants_are_of_equal_size_and_answer_the_same_question():
    found, missing = contestants(SMALL)
    assert found[0].name == "ours" and len({c.name for c in found}) == len(found)
    expected = {n for n, lib in (("diffusers", "diffusers"), ("diffusers, lean", "diffusers"), ("MONAI", "monai")) if importlib.util.find_spec(lib)}
    assert expected <= {c.name for c in found}
    for c in found:
        assert 0.9 <= c.parameters / found[0].parameters <= 1.1, c.name
        assert c.call().shape == (4, 1, 16, 16) and c.call().isfinite().all() and c.flops > 0
    assert all("cannot be imported" in m or "left out" in m for m in missing)


@pytest.mark.parametrize("size,samples", [(16, 4), (32, 2)])
def test_operations_are_counted_for_the_whole_batch(size, samples):
    here, there = (our_contestant(dataclasses.replace(SMALL, **{"size": size, "samples": n})) for n in (samples, 3 * samples))
    assert there.flops == 3 * here.flops
    bigger = our_contestant(dataclasses.replace(SMALL, size=2 * size, samples=samples))
    assert 3.5 < bigger.flops / here.flops < 4.5     # four times the pixels


def test_count_flops_by_hand():
    net = nn.Conv2d(3, 5, 3, padding=1)
    assert count_flops(lambda: net(torch.ones(2, 3, 8, 8))) == 2 * 2 * 8 * 8 * 5 * 3 * 9
    assert count_flops(lambda: torch.ones(4) + 1) == 0 and count_parameters(net) == 5 * 3 * 9 + 5


@needs["diffusers"]
def test_the_lean_one_cut_in_pieces_says_the_same(monkeypatch):
    torch.manual_seed(0)
    net = nn.Conv2d(2, 1, 3, padding=1)

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    monkeypatch.setattr(speed, "CACHE_PIXELS", 3 * 16 * 16)
    whole, cut = (borrowed_contestant("x", Steps(), lambda a, b: a, dataclasses.replace(SMALL, samples=4), cut=c).call() for c in (False, True))
    assert whole.shape == (8, 1, 16, 16) and torch.allclose(whole, cut, atol=1e-6)


@pytest.mark.parametrize("make", [pytest.param("diffusers", marks=needs["diffusers"]), pytest.param("monai", marks=needs["monai"])])
def test_training_steps_learn_something(make, monkeypatch):
    kept = []
    original = speed.borrowed_contestant
    monkeypatch.setattr(speed, "borrowed_contestant", lambda name, net, *a, **k: kept.append(net) or original(name, net, *a, **k))
    c = getattr(speed, f"{make}_contestant")(SMALL)
    before = [p.clone() for p in kept[0].parameters()]
    c.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, kept[0].parameters()))


@pytest.mark.parametrize("lib", [pytest.param("diffusers", marks=needs["diffusers"]), pytest.param("monai", marks=needs["monai"])])
def test_sample_runs_through_their_networks(lib):
    """The adapter is all that is needed to walk with a network of another library."""
    if lib == "diffusers":
        net = speed._library("diffusers").UNet2DModel(in_channels=2, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                                                      down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, attention_head_dim=8)
    else:
        net = speed._library("monai.networks.nets").DiffusionModelUNet(2, 2, 1, channels=(8, 16), attention_levels=(False, False), num_res_blocks=1, norm_num_groups=4, num_head_channels=8)
    image, g = torch.rand(1, 1, 16, 16), torch.Generator().manual_seed(0)
    with torch.no_grad():
        walk = sample(borrowed_denoiser(net, image), cosine_schedule(100), (3, 1, 16, 16), steps=3, generator=g, keep=True)
    assert len(walk) == 3 and walk.x0.shape == (3, 1, 16, 16) and all(p.abs().max() <= 1 for p in walk.predictions)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch):
    real = importlib.import_module

    def gone(name, *rest, **more):
        if name.split(".")[0] in ("diffusers", "monai", "SimpleITK", "med_seg_diff_pytorch"):
            raise ImportError("No module named " + name)
        return real(name, *rest, **more)

    monkeypatch.setattr(speed.importlib, "import_module", gone)
    found, missing = contestants(SMALL)
    assert [c.name for c in found] == ["ours"]
    assert any("diffusers cannot be imported" in m and "calidiff_nb[test]" in m for m in missing) and any("med_seg_diff_pytorch" in m and "torchvision" in m for m in missing)
    counted, absent = measure_raters(4, 32, 4, 1)
    assert [c.name for c in counted] == ["ged"] and "SimpleITK" in absent[0]


def test_a_network_of_another_size_is_left_out_with_a_reason(monkeypatch):
    tiny = Contestant("tiny", 10, *[lambda: None] * 3, 1, 50, lambda: None)
    monkeypatch.setattr(speed, "diffusers_contestant", lambda task, lean=False: tiny)
    monkeypatch.setattr(speed, "monai_contestant", lambda task: tiny)
    found, missing = contestants(SMALL, lean=False)
    assert "tiny" not in {c.name for c in found} and any("tiny left out at 16²" in m for m in missing)


# --- sums

def row(name="ours", size=64, call=1.0, train=1.0, sampling=5.0, gflops=1.0, calls=5):
    call, train, sampling = float(call), float(train), float(sampling)
    return Row(name, size, 600_000, float(gflops), 64, Lap(call, 2 * call), Lap(train, train), Lap(sampling, sampling), calls, name == "ours")


def test_ratios_and_equal_flops():
    ours, theirs = row(), row("MONAI", call=6.0, gflops=4.0, sampling=300.0)
    assert ratio(theirs, ours) == 6 and ratio(theirs, ours, "sampling") == 60 and ratio(ours, ours, "train", "cpu") == 1
    assert equal_flop_ratio(theirs, ours) == 1.5 and ours.per_mask == 5 / 64


def test_borrowed_sampling_is_calls_times_one_step(monkeypatch):
    laps = {"call": Lap(2.0, 3.0), "move": Lap(0.5, 1.0), "once": Lap(0.0, 0.0), "train": Lap(1.0, 1.0), "walk": Lap(9.0, 9.0)}
    jobs = {kind: (lambda kind=kind: kind) for kind in laps}
    ours = Contestant("ours", 1, jobs["call"], jobs["move"], jobs["train"], 10**9, 5, jobs["once"], jobs["walk"])
    other = Contestant("other", 1, jobs["call"], jobs["move"], jobs["train"], 10**9, 50, jobs["once"])
    monkeypatch.setattr(speed, "contestants", lambda *a, **k: ([ours, other], []))
    monkeypatch.setattr(speed, "race", lambda jobs, *a: {name: [laps[job()]] for name, job in jobs.items()})
    (a, b), _ = measure_speed(SMALL)
    assert a.sampling == Lap(9.0, 9.0) and a.walked and b.sampling == Lap(125.0, 200.0) and not b.walked


@pytest.mark.parametrize("e", [0.5, 1.0, 2.0])
def test_exponents_of_exact_powers(e):
    n = (1, 2, 4, 8)
    assert fit_exponent(n, [3 * x**e for x in n]) == pytest.approx(e)


@pytest.mark.parametrize("n,s", [((1, 1), (1, 2)), ((1, 2), (0, 1)), ((1, 2, 3), (1, 2)), ((0, 2), (1, 1))])
def test_exponents_refuse(n, s):
    with pytest.raises(ValueError, match="n and seconds must be"):
        fit_exponent(n, s)


def test_growth_varies_one_thing_at_a_time():
    found = measure_growth(SMALL, {"raters": (1, 2), "steps": (1, 3)}, 1)
    assert {k: v[0] for k, v in found.items()} == {"raters": (1, 2), "steps": (1, 3)} and all(s > 0 for v in found.values() for s in v[1])


# --- profile, roofline, memory, raters, widget

@pytest.mark.parametrize("name,kind", [("aten::mkldnn_convolution", "convolution"), ("aten::addmm", "convolution"), ("aten::cudnn_convolution", "convolution"), ("aten::native_group_norm", "norm"),
                                       ("aten::silu_", "activation"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::_softmax", "attention"),
                                       ("aten::add_", "element-wise"), ("aten::addcmul", "element-wise"), ("aten::copy_", "moving"), ("aten::upsample_nearest2d", "moving"),
                                       ("aten::pixel_shuffle", "moving"), ("aten::item", "other")])
def test_operations_are_sorted_by_what_they_do(name, kind):
    assert kind_of(name) == kind


def test_profile_finds_the_convolution():
    x, net = torch.ones(8, 32, 64, 64), nn.Conv2d(32, 32, 3)
    shares = profile_shares(lambda: net(x))
    assert sum(shares.values()) == pytest.approx(1) and set(shares) == {*KINDS, "other"} and max(shares, key=shares.get) == "convolution"


def test_roofline_is_positive_and_takes_the_better():
    roof = roofline(rounds=1, n=64)
    assert min(dataclasses.astuple(roof)) > 0 and roof.best == max(roof.gemm, roof.conv)


def peaks_in_a_young_process(*jobs):
    """MiB of each job. A process that has run for long keeps freed pages and loses idle ones to the system, so that less would seem to be needed."""
    code = f"import torch; from calidiff_nb.compare.speed import Task, our_contestant, peak_memory; print(*[max(peak_memory(job) for _ in range(3)) for job in ({', '.join(jobs)},)])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return [float(word) for word in said.stdout.split()]


def test_peak_memory_sees_what_is_freed_again():
    need, = peaks_in_a_young_process("lambda: torch.ones(40 * 2**20 // 4).sum()")
    assert math.isnan(need) or 35 < need < 60


def test_our_memory_does_not_grow_with_the_batch():
    few, many = peaks_in_a_young_process(*(f"our_contestant(Task(size=64, samples={n})).call" for n in (16, 64)))
    assert math.isnan(few) or 1 < many < 3 * few + 20     # four times the maps, in pieces


def test_ged_by_loops_is_ged():
    masks, samples = (make_cohort("unequal", n=5, size=32, seed=s).masks for s in (0, 1))
    samples[0] = 0
    assert (ged(samples, masks) - ged_by_loops(samples, masks)).abs().max() < 1e-6


@needs["SimpleITK"]
def test_staple_by_itk_is_staple():
    masks = make_cohort("balanced", n=5, size=32, seed=0).masks
    assert (staple(masks, per_image=True, beta=None, band=None).probability - staple_by_itk(masks)).abs().max() < 1e-4


def test_widget_hands_over_arrays():
    x, guess, moved, edge = widget_step(Task(size=16, samples=1))()
    assert x.shape == guess.shape == moved.shape == edge.shape == (4, 1, 16, 16) and edge.dtype == bool


# --- the report

def report(rows):
    return SpeedReport("cpu, 1 threads", "precision fp32", Roofline(50.0, 40.0, 10.0, 30.0), rows, {"ours": {"convolution": 0.6, "norm": 0.4}}, {"raters": ((1, 2), (1.0, 2.0))},
                       {64: 100.0, 128: math.nan}, (speed.Counted("ged", 10, Lap(1.0, 1.0), Lap(20.0, 20.0), 0.0),), Lap(0.01, 0.01), ("nobody",))


def test_aims_are_judged_and_a_missed_one_says_what_binds():
    told = report((row(), row("diffusers", call=7, train=2, sampling=100, gflops=8), row("diffusers, lean", call=1)))
    aims = {a.what: a for a in told.aims}
    assert aims["denoiser call at 64², diffusers"].met and aims["denoiser call at 64², diffusers"].binds == ""
    missed = aims["training step at 64², diffusers"]
    assert not missed.met and missed.got == 2 and "convolution 60%" in missed.binds and "8.0 × the operations" in missed.binds
    gone = report((row(), row("MONAI", call=math.nan, train=math.nan, sampling=math.nan)))
    assert not any("MONAI" in a.what for a in gone.aims) and "MONAI ran out of memory at 64²" in str(gone)
    busy = dataclasses.replace(row("MONAI", call=70, train=70, sampling=7000, calls=50), call=Lap(70.0, 8.0))     # the wall says 70 times, the processor 4 times
    assert not next(a for a in report((row(), busy)).aims if a.what == "denoiser call at 64², MONAI").met
    assert not any("lean" in what for what in aims) and aims["widget step at 64², milliseconds"].met and aims["ged, 10 cases, against a loop"].got == 20
    assert "memory of our sampling at 64², MiB" in aims and "memory of our sampling at 128², MiB" not in aims
    text = str(told)
    assert "MISSED training step" in text and "left out: nobody" in text and "1.00 of raters" in text


def test_aims_are_known_for_each_discipline():
    assert {job for job, _ in AIMS} == {"call", "train", "sampling"} and AIMS["call", 64] == 6 and AIMS["call", 128] == 8


def test_quick_report_runs_the_whole_path():
    told = []
    got = speed_report(sizes=(16, 32), quick=True, progress=lambda *a: told.append(a[0]))
    assert {r.size for r in got.rows} == {16} and got.precision.startswith("precision") and set(told) >= {"sizes", "raters"}
    assert all(math.isfinite(ratio(r, got.ours(16), job, clock)) for r in got.rows for job in ("call", "train", "sampling") for clock in ("wall", "cpu"))
    assert set(got.shares) == {r.name for r in got.rows} and str(got).count("\n") > 10
    for words in ("threads", "torch", "roofline", "ratios", "grows"):
        assert words in str(got)


def test_report_refuses_an_unknown_precision():
    with pytest.raises(ValueError, match="precision must be 'auto', 'fp32' or 'bf16'; got 'fp16'"):
        speed_report(precision="fp16")


@pytest.mark.gpu
def test_gpu_runs_the_same_table_and_agrees():
    device = torch.device("cuda")
    got = speed_report(sizes=(64,), quick=True, device=device)
    assert got.rows[0].name == "ours" and got.memory[64] > 0 and str(got).startswith("cuda")
    here, there = (our_contestant(dataclasses.replace(SMALL, device=d)).call().float().cpu() for d in (torch.device("cpu"), device))
    assert here.shape == there.shape and F.mse_loss(here, there).isfinite()
