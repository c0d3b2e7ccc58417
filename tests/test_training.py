"""Guards of 14_training: a stopped run goes on as if it had never stopped, and nothing broken is read in silence."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from calidiff_nb.diffusion.denoisers import UNet
from calidiff_nb.diffusion import training
from calidiff_nb.diffusion.training import (
    Average, History, Run, TrainConfig, augment, choose_precision, fit, learning_rate, load_checkpoint, load_weights,
    save_checkpoint, save_weights, write_whole,
)

SHORT = TrainConfig(steps=24, warmup=3, checkpoint_every=5, validate_every=4, amp="off")


def network(seed=1):
    """Small, with dropout: it draws from torch's own stream as well as from the given generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 1))


def loss_step(model, step, generator):
    x = torch.randn(16, 4, generator=generator)
    y = model(x)
    return {"loss": (y - x.sum(1, keepdim=True)).square().mean(), "size": y.abs().mean()}


def validate(model):
    assert not model.training
    return model(torch.eye(4)).sub(1).square().mean().item() + 0 * torch.rand(1).item()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Enough(Exception):
    pass


def until(step):
    def on_step(done, parts):
        if done == step:
            raise Enough
    return on_step


# --- the loop

def test_learning_rate_climbs_and_comes_down():
    config = TrainConfig(steps=100, warmup=10, lr=1.0, floor=0.1)
    rates = [learning_rate(s, config) for s in range(100)]
    assert rates[0] == pytest.approx(0.1, abs=1e-3) and rates[-1] == pytest.approx(0.1) and max(rates) <= 1
    assert all(b > a for a, b in zip(rates[:9], rates[1:10])) and all(b < a for a, b in zip(rates[10:], rates[11:]))
    assert learning_rate(0, TrainConfig(steps=1, warmup=0, lr=0.5)) == 0.5


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0.0}, {"floor": 2.0}, {"ema": 1.0}, {"clip": -1.0}, {"accumulate": 0}, {"amp": "fp8"}, {"validate_every": 0}])
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_same_seed_same_weights_and_the_outer_stream_is_left_alone():
    before = torch.get_rng_state()
    a, b, c = network(), network(), network()
    ha, hb = fit(a, loss_step, SHORT, progress=False), fit(b, loss_step, SHORT, progress=False)
    fit(c, loss_step, replace(SHORT, seed=1), progress=False)
    assert same(a, b) and ha == hb and not same(a, c) and not a.training
    assert torch.equal(torch.get_rng_state(), before)
    assert len(ha.values["loss"]) == len(ha.values["size"]) == 24


def test_it_learns():
    model = network()
    history = fit(model, loss_step, replace(SHORT, steps=300, lr=1e-2, ema=0.9), progress=False)
    assert history.recent(30)["loss"] < 0.5 * sum(history.values["loss"][:10]) / 10


def test_validation_does_not_disturb_training():
    a, b = network(), network()
    fit(a, loss_step, SHORT, progress=False)
    history = fit(b, loss_step, SHORT, validate=validate, progress=False)
    assert same(a, b) and [s for s, _ in history.validation] == [4, 8, 12, 16, 20, 24]


def test_early_stop_leaves_the_best_weights():
    model, calls, seen = network(), [], {}

    def judge(m):
        calls.append(1)
        seen[len(calls)] = m[0].weight.clone()
        return [3.0, 1.0, 2.0, 2.0, 2.0][len(calls) - 1]

    history = fit(model, loss_step, replace(SHORT, steps=1000, patience=2), validate=judge, progress=False)
    assert len(calls) == 4 and "step 8" in history.stopped
    assert torch.equal(model[0].weight, seen[2])


def test_average_is_its_recursion_and_swapping_twice_is_nothing():
    model = nn.Linear(3, 2)
    average, by_hand = Average(model, 0.5), model.weight.detach().clone().double()
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * model.weight.detach().double()
    assert torch.allclose(average.weights[0].double(), by_hand, atol=1e-5)
    kept = model.weight.detach().clone()
    average.swap(model)
    assert torch.allclose(model.weight.double(), by_hand, atol=1e-5)
    average.swap(model)
    assert torch.equal(model.weight, kept)


def test_without_average_the_last_weights_stay():
    a, b = nn.Linear(4, 1), nn.Linear(4, 1)
    b.load_state_dict(a.state_dict())
    seen = []
    fit(a, loss_step, replace(SHORT, ema=0.0), on_step=lambda s, p: seen.append(a.weight.detach().clone()), progress=False)
    assert torch.equal(a.weight, seen[-1])
    fit(b, loss_step, replace(SHORT, ema=0.9), progress=False)
    assert not torch.equal(a.weight, b.weight)


def test_two_halves_make_one_step():
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    whole, halves = nn.Linear(4, 1), nn.Linear(4, 1)
    halves.load_state_dict(whole.state_dict())
    turn = []

    def full(model, step, generator):
        return {"loss": (model(data) - 1).square().mean()}

    def half(model, step, generator):
        turn.append(step)
        return {"loss": (model(data[:8] if len(turn) % 2 else data[8:]) - 1).square().mean()}

    Run(whole, replace(SHORT, clip=0.0)).advance(full), Run(halves, replace(SHORT, accumulate=2, clip=0.0)).advance(half)
    assert torch.allclose(whole.weight.grad, halves.weight.grad, atol=1e-6)
    turn.clear()
    a, b = fit(whole, full, SHORT, progress=False), fit(halves, half, replace(SHORT, accumulate=2), progress=False)
    assert torch.allclose(whole.weight, halves.weight, atol=1e-5) and len(turn) == 48
    assert a.values["loss"] == pytest.approx(b.values["loss"], abs=1e-4)


def test_clipping_bounds_the_gradient():
    model, lengths = nn.Linear(4, 1), []
    clip = nn.utils.clip_grad_norm_

    def steep(m, step, generator):
        return {"loss": 1e4 * m(torch.ones(2, 4)).mean()}

    run = Run(model, replace(SHORT, clip=0.5))
    run.advance(steep)
    lengths.append(clip([p for p in model.parameters()], math.inf))
    assert lengths[0] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_it_reaches_the_weights(tmp_path, where):
    model, path, kept = network(), tmp_path / "run.pt", {}

    def poisoned(m, step, generator):
        parts = loss_step(m, step, generator)
        if step == 12 and where == "loss":
            parts["loss"] = parts["loss"] * math.nan
        if step == 12 and where == "gradient":
            parts["loss"] = parts["loss"] + (m[0].weight * 0).abs().sqrt().sum()      # finite value, infinite slope
        return parts

    with pytest.raises(FloatingPointError, match=f"step 12.*{where}=(nan|inf)"):
        fit(model, poisoned, SHORT, path, on_step=lambda s, p: kept.update({s: model[0].weight.detach().clone()}), progress=False)
    assert torch.equal(model[0].weight, kept[12]) and load_checkpoint(path)["step"] == 10


def test_wrong_calls_get_a_sentence():
    frozen = nn.Linear(4, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(frozen, loss_step, SHORT, progress=False)
    with pytest.raises(ValueError, match="key 'loss'.*error"):
        fit(network(), lambda m, s, g: {"error": m(torch.ones(2, 4)).mean()}, SHORT, progress=False)


def test_history_fills_gaps_with_nan():
    history = History()
    for step, parts in enumerate(({"loss": 1.0}, {"loss": 2.0, "late": 3.0}, {"loss": 4.0})):
        history.record(step, parts)
    assert history.values["loss"] == [1.0, 2.0, 4.0]
    assert [math.isnan(v) for v in history.values["late"]] == [True, False, True]


def test_precision_follows_the_measurement(monkeypatch):
    cpu = torch.device("cpu")
    for gain, choice in ((0.1, "fp32"), (1.2, "fp32"), (6.0, "bf16")):
        monkeypatch.setattr(training, "bf16_gain", lambda device, gain=gain: gain)
        assert choose_precision("auto", cpu) == choice
    assert choose_precision("off", cpu) == "fp32" and choose_precision("bf16", cpu) == "bf16"


def test_mixed_precision_runs():
    model = network()
    assert math.isfinite(fit(model, loss_step, replace(SHORT, amp="bf16"), progress=False).values["loss"][-1])
    assert model[0].weight.dtype == torch.float32


def test_bar_counts_to_the_end(capsys):
    fit(network(), loss_step, SHORT, progress=True)
    assert "24/24" in capsys.readouterr().err


# --- stopping and going on

@pytest.mark.parametrize("stop", [1, 5, 6, 13, 23, 24])
@pytest.mark.parametrize("config", [SHORT, replace(SHORT, accumulate=2, ema=0.0, clip=0.0), replace(SHORT, patience=50, validate_every=3)], ids=["plain", "accumulate", "validate"])
def test_resumed_equals_never_stopped(tmp_path, stop, config):
    path, judge = tmp_path / "run.pt", validate if config.patience else None
    whole = network()
    expected = fit(whole, loss_step, config, validate=judge, progress=False)
    with pytest.raises(Enough):
        fit(network(), loss_step, config, path, judge, until(stop), progress=False)
    later = network(seed=9)                       # other weights: everything must come from the file
    if not path.exists():
        later = network()
    torch.manual_seed(stop)
    assert fit(later, loss_step, config, path, judge, progress=False) == expected
    assert same(later, whole)
    again = network(seed=9)
    assert fit(again, loss_step, config, path, judge, progress=False) == expected and same(again, whole)    # finished: nothing to do


def test_early_stopped_run_stays_stopped(tmp_path):
    config, values = replace(SHORT, steps=200, patience=2, validate_every=2), iter([1.0, 2.0, 3.0])
    a, b = network(), network(seed=3)
    history = fit(a, loss_step, config, tmp_path / "run.pt", lambda m: next(values), progress=False)
    assert fit(b, loss_step, config, tmp_path / "run.pt", lambda m: next(values), progress=False) == history and same(a, b)


@pytest.mark.parametrize("number,raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signals_save_and_say_how_to_go_on(tmp_path, number, raised):
    path, before = tmp_path / "run.pt", signal.getsignal(number)
    whole = network()
    fit(whole, loss_step, SHORT, progress=False)

    def knock(done, parts):
        if done == 7:
            os.kill(os.getpid(), number)

    with warnings.catch_warnings(record=True) as said, pytest.raises(raised) as stopped:
        warnings.simplefilter("always")
        fit(network(), loss_step, SHORT, path, on_step=knock, progress=False)
    message = str(said[0].message) if number == signal.SIGTERM else str(stopped.value)
    assert "step 7 of 24" in message and str(path) in message and "fit again" in message
    assert number != signal.SIGTERM or stopped.value.code == 143
    assert load_checkpoint(path)["step"] == 7 and signal.getsignal(number) is before
    later = network(seed=4)
    fit(later, loss_step, SHORT, path, progress=False)
    assert same(later, whole)


def test_interrupt_without_a_checkpoint_says_so():
    with pytest.raises(KeyboardInterrupt, match="not saved"):
        fit(network(), loss_step, SHORT, on_step=lambda s, p: signal.raise_signal(signal.SIGINT), progress=False)


def test_second_interrupt_stops_at_once():
    def impatient(m, step, generator):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    with pytest.raises(KeyboardInterrupt):
        fit(network(), impatient, SHORT, progress=False)


def test_trains_in_a_thread_too():
    got = []
    worker = threading.Thread(target=lambda: got.append(fit(network(), loss_step, SHORT, progress=False)))
    worker.start(), worker.join()
    assert len(got[0].values["loss"]) == 24


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from torch.nn.functional import mse_loss
from calidiff_nb.diffusion.denoisers import UNet
from calidiff_nb.diffusion.training import TrainConfig, fit, save_weights
torch.set_num_threads(1)
folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
moments = random.Random(seed)

def loss_step(model, step, generator):
    x = torch.rand(2, 3, 1, 8, 8, generator=generator)
    t = torch.randint(0, 1000, (2, 3), generator=generator)
    said = model(x, t, model.encode(x[:, 0]), torch.arange(3).expand(2, 3))
    return {"loss": mse_loss(said.distance, 1 - x) + said.logit.square().mean()}

def life(name, tell=None):
    torch.manual_seed(0)
    model = UNet(3, widths=(8, 8, 8))
    config = TrainConfig(steps=60, warmup=5, checkpoint_every=1, amp="off")
    fit(model, loss_step, config, folder / f"{name}.pt", on_step=tell and (lambda s, p: os.write(tell, b".")), progress=False)
    save_weights(model.state_dict(), folder / f"{name}.safetensors", {})

def child(name, steps_to_live=None):
    ear, mouth = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ear)
        try:
            life(name, mouth)
        finally:
            os._exit(0 if (folder / f"{name}.safetensors").exists() else 1)
    os.close(mouth)
    lived = 0
    while steps_to_live is not None and lived < steps_to_live and os.read(ear, 1):
        lived += 1
    if steps_to_live is not None:
        time.sleep(moments.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
    while os.read(ear, 4096):
        pass
    os.close(ear)
    return os.waitpid(pid, 0)[1]

killed = sum(child("killed", moments.randint(1, 60 // kills - 1)) == signal.SIGKILL for _ in range(kills))
assert child("killed") == 0 and child("whole") == 0
print(killed, (folder / "killed.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tried with fork")
@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(tmp_path, kills):
    out = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path), str(kills), "7"], capture_output=True, text=True, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split() == [str(kills), "True"]


# --- files

def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 2 and load_checkpoint(Path(f"{path}.bak"))["step"] == 1

    def half(p):
        p.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, half, keep=True)
    assert load_checkpoint(path)["step"] == 2 and load_checkpoint(Path(f"{path}.bak"))["step"] == 1

    replace_file, left = os.replace, [0]

    def power_cut(a, b):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("power cut")
        replace_file(a, b)

    monkeypatch.setattr(os, "replace", power_cut)
    for allowed in (0, 1):                             # before the backup is renamed, and between the two renames
        left[0] = allowed
        with pytest.raises(OSError, match="power cut"):
            save_checkpoint(path, {"step": 3})
        assert load_checkpoint(path)["step"] == 2


def content_of(tmp_path):
    with pytest.raises(Enough):
        fit(network(), loss_step, SHORT, tmp_path / "run.pt", on_step=until(11), progress=False)
    return tmp_path / "run.pt"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_cut_short_checkpoint_is_named(tmp_path, share):
    path = content_of(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"run\.pt is cut short or not a checkpoint.*run\.pt\.bak") as problem:
        fit(network(), loss_step, SHORT, path, progress=False)
    assert "\n" not in str(problem.value)
    os.replace(f"{path}.bak", path)                    # do as the message says
    whole_run, later = network(), network(seed=5)
    fit(whole_run, loss_step, SHORT, progress=False)
    fit(later, loss_step, SHORT, path, progress=False)
    assert same(whole_run, later)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def test_foreign_files_are_named_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, other, evil = tmp_path / "notes.txt", tmp_path / "other.pt", tmp_path / "evil.pt"
    text.write_text("not a checkpoint")
    torch.save({"weight": torch.ones(3)}, other)
    torch.save({"format": training.FORMAT, "x": Evil()}, evil)
    for path, said in ((text, "cut short or not a checkpoint"), (other, "some other torch file"), (evil, "cut short or not a checkpoint")):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"{path.name} is .*{said}"):
            fit(network(), loss_step, SHORT, path, progress=False)
        assert path.read_bytes() == before
    assert not (tmp_path / "evil").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent.pt")


def test_checkpoint_of_another_run_is_refused(tmp_path):
    path = content_of(tmp_path)
    with pytest.raises(ValueError, match=r"run\.pt was trained with lr=0\.001, now 0\.5: use the same settings"):
        fit(network(), loss_step, replace(SHORT, lr=0.5), path, progress=False)
    with pytest.raises(ValueError, match=r"run\.pt is a checkpoint of another model"):
        fit(nn.Linear(4, 1), loss_step, SHORT, path, progress=False)
    fit(network(), loss_step, replace(SHORT, checkpoint_every=3), path, progress=False)      # how often to save may change


def test_checkpoint_says_what_it_is(tmp_path):
    content = load_checkpoint(content_of(tmp_path))
    assert content["code_version"] and content["config"]["steps"] == 24 and content["step"] == 10
    assert {"model", "average", "optimiser", "generator", "cpu_rng", "history"} <= content.keys()


def test_weights_travel_with_their_description(tmp_path):
    path, net = tmp_path / "net.safetensors", UNet(2, widths=(8, 16, 24))
    save_weights(net.state_dict(), path, {"raters": ["a", "b"], "version": 1})
    tensors, about = load_weights(path)
    assert about == {"raters": ["a", "b"], "version": 1}
    other = UNet(2, widths=(8, 16, 24))
    other.load_state_dict(tensors)
    assert same(net, other)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"net\.safetensors is cut short"):
            load_weights(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not written by `save_weights`"):
        load_weights(path)
    path.write_text(json.dumps({"about": 1}))
    with pytest.raises(ValueError, match=r"net\.safetensors"):
        load_weights(path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(tmp_path / "absent.safetensors")


# --- augmentation

def test_augment_turns_everything_alike_and_keeps_values():
    g = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 6, 6, generator=g)
    masks = (images > 0.6).to(torch.uint8)
    turned, same_turn = augment(images, torch.cat([masks, 1 - masks], 1), g)
    assert torch.equal(same_turn[:, :1], (turned > 0.6).to(torch.uint8)) and torch.equal(same_turn[:, 1:], 1 - same_turn[:, :1])
    assert same_turn.dtype == torch.uint8 and torch.equal(turned.flatten(1).sort(1).values, images.flatten(1).sort(1).values)


def test_augment_reaches_all_eight_symmetries():
    picture = torch.arange(9.0).reshape(1, 1, 3, 3) / 10
    turned, _ = augment(picture.expand(400, -1, -1, -1), picture.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    square = {tuple(torch.rot90(x, k, (-2, -1)).flatten().tolist()) for k in range(4) for x in (picture[0], picture[0].flip(-1))}
    assert {tuple(x.flatten().tolist()) for x in turned} == square and len(square) == 8


def test_augment_of_oblong_pictures_and_intensity():
    g = torch.Generator().manual_seed(0)
    images, maps = torch.rand(20, 2, 4, 6, generator=g), torch.rand(20, 3, 4, 6, generator=g)
    turned, moved = augment(images, maps, g, intensity=0.2)
    assert turned.shape == images.shape and moved.shape == maps.shape and 0 <= turned.min() and turned.max() <= 1
    assert not torch.equal(turned.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    assert torch.equal(moved.flatten(1).sort(1).values, maps.flatten(1).sort(1).values)
    a, b = (augment(images, maps, torch.Generator().manual_seed(5), 0.1) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_live_curve_draws_once_and_then_updates(monkeypatch):
    import IPython.display

    shown = []

    class Handle:
        def update(self, figure):
            shown.append(("update", figure.axes[0].lines[0].get_ydata().tolist()))

    def display(figure, display_id):
        shown.append(("new", figure.axes[0].lines[0].get_ydata().tolist()))
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    draw = training.live_curve(every=0.0)
    draw(1, {"loss": 3.0}), draw(2, {"loss": 2.0})
    assert shown == [("new", [3.0]), ("update", [3.0, 2.0])]
    patient = training.live_curve(every=1e6)
    patient(1, {"loss": 3.0}), patient(2, {"loss": 2.0})
    assert len(shown) == 3
