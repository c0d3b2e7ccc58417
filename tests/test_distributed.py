"""Guards of 14_training under torchrun: many processes train as one, stop as one and go on as one.

Run by torchrun, this file is also the training script that the tests start.
"""
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__" and sys.argv[1] == "slopes":      # shapes are checked in the started processes too
    from jaxtyping import install_import_hook

    install_import_hook("calidiff_nb", "beartype.beartype").__enter__()

import pytest
import torch
from torch import nn

from calidiff_nb.diffusion.training import Run, Team, TrainConfig, each_tensor, fit, load_checkpoint, run_rows, spread

PLAN = TrainConfig(steps=20, warmup=3, checkpoint_every=3, clip=0.0, amp="off")


# ---------------------------------------------------------------- what is trained (in the test's process and under torchrun alike)

def network(norm=nn.GroupNorm):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), norm(2, 8) if norm is nn.GroupNorm else norm(8), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))


def masked_mean(model, step, generator):
    """Five cases, most of the pixels that count in the first: a mean of means would be wrong."""
    x = torch.randn(5, 1, 6, 6, generator=generator)
    counts = torch.rand(5, 1, 6, 6, generator=generator) < torch.tensor([0.9, 0.1, 0.1, 0.1, 0.2])[:, None, None, None]
    error = (model(x) - x.flip(-1)).square()
    return {"loss": (error * counts).sum() / counts.sum() + model[0].weight.square().mean(), "size": error.mean()}


def even_mean(model, step, generator):
    x = torch.randn(6, 1, 6, 6, generator=generator)
    return {"loss": (model(x) - x.flip(-1)).square().mean()}


def calidiff(stage):
    """A small model with an opinion in every layer, and cases of which the first half has one rater and the second four."""
    from calidiff_nb.calidiff.model import CaliDiff, CaliDiffConfig, committee_step, conclude, joint_step
    from calidiff_nb.raters.simulate import make_cohort

    cohort = make_cohort("balanced", 10, size=32, seed=1)
    cohort.present[:5, 1:] = False
    cohort.masks[:5, 1:] = 0
    config = CaliDiffConfig(widths=(8, 8, 8), batch=5)
    model, g = CaliDiff.for_cohort(cohort, config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    model.measure(make_cohort("balanced", 6, size=32, seed=2))
    step = joint_step(cohort, config) if stage == "joint" else committee_step(cohort, conclude(model, cohort), config)
    return slopes(model.train(), step, shared=(model.net.encoder, model.net))


def slopes(model, loss_step, config=PLAN, shared=()):
    """Gradients of one step, by name."""
    run = Run(model, config, shared=shared)
    loss = run.advance(loss_step)["loss"]
    return {"loss": torch.tensor(loss)} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def all_slopes():
    found = {"masked": slopes(network(), masked_mean), "accumulated": slopes(network(), masked_mean, TrainConfig(accumulate=3, clip=0.0, amp="off"))}
    found["even"] = slopes(network(), even_mean)
    one = lambda model, step, g: {"loss": model(torch.randn(1, 1, 6, 6, generator=g)).square().mean()}  # noqa: E731
    found["a batch of one"] = slopes(network(), one)
    found |= {stage: calidiff(stage) for stage in ("joint", "committee")}
    return found


def theirs():
    """torch's own: rows by hand, the mean of the processes' means. Right where all rows count alike."""
    team, model = Team(), network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(PLAN.seed))[3 * team.rank:][:3]
    (wrapped(x) - x.flip(-1)).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def refusals(folder):
    """What each process says to calls that cannot work."""
    def astray(model, step, generator):
        return masked_mean(model, step, torch.Generator().manual_seed(Team().rank))

    (folder / "short.pt").write_bytes(b"half")
    calls = {
        "astray": lambda: fit(network(), astray, PLAN, progress=False),
        "batchnorm": lambda: fit(network(nn.BatchNorm2d), masked_mean, PLAN, progress=False),
        "short": lambda: fit(network(), masked_mean, PLAN, folder / "short.pt", progress=False),
        "axes": lambda: run_rows(Team(), lambda a, b: a, torch.ones(4, 1), torch.ones(6, 1)),
        "elsewhere": lambda: Team(torch.device("cuda", 0)),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as problem:
            said[name] = f"{type(problem).__name__}: {problem}"
    return said


def knocked(folder, wish):
    """A loss whose process `rank` gets a signal at `step`, once."""
    rank, step_of, number = (int(v) for v in wish.split(":"))

    def loss_step(model, step, generator):
        parts = masked_mean(model, step, generator)
        mark = folder / "knocked"
        if step == step_of and Team().rank == rank and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), number)
        return parts

    return loss_step


def whole_training(folder, wish="9:9:0"):
    model = network()
    model[0].weight.data += Team().rank           # built differently: the first process's weights count
    told = []
    history = fit(model, knocked(folder, wish), PLAN, folder / "run.pt", lambda m: m(torch.ones(3, 1, 6, 6)).mean().item(), lambda s, p: told.append(s), progress=True)
    torch.save({"weights": model.state_dict(), "loss": history.values["loss"], "validation": history.validation, "told": told}, folder / f"end{Team().rank}.pt")


def main(act, folder, *rest):
    folder, team = Path(folder), Team()
    if act == "slopes":
        torch.save(all_slopes() | {"theirs": theirs()}, folder / f"slopes{team.rank}.pt")
        torch.save(refusals(folder), folder / f"said{team.rank}.pt")
    else:
        whole_training(folder, *rest)


# ---------------------------------------------------------------- the tests

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(act, folder, *rest, restarts=0, machines=1, each=2, port=None):
    """Start this file in several processes, and do not wait."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("several processes need accelerate: pip install calidiff_nb[dist]")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(machines), "--nproc_per_node", str(each), "--max_restarts", str(restarts), "--monitor_interval", "0.2",
               "--rdzv_backend", "c10d", "--rdzv_id", "test", "--rdzv_endpoint", f"127.0.0.1:{port or free_port()}", "--local_addr", "127.0.0.1", __file__, act, str(folder), *rest]
    place = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=place)


def finish(launcher):
    """Wait for it; returns exit code and what it said."""
    try:
        return launcher.communicate(timeout=500)[1], launcher.returncode
    finally:
        launcher.kill()


def torchrun(*args, **how):
    said, code = finish(launch(*args, **how))
    return code, said


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """One start for everything that needs no second."""
    folder = tmp_path_factory.mktemp("slopes")
    code, said = torchrun("slopes", folder)
    assert code == 0, said[-3000:]
    return [{"slopes": torch.load(folder / f"slopes{r}.pt", weights_only=True), "said": torch.load(folder / f"said{r}.pt", weights_only=True)} for r in (0, 1)]


def apart(a, b):
    """Largest difference, relative to the largest number."""
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a) / max(b[n].abs().max().item() for n in b if n != "loss")


def test_two_processes_have_the_gradients_of_one(two):
    alone = all_slopes()
    for name, wanted in alone.items():
        for process in two:
            assert apart(process["slopes"][name], wanted) < 1e-5, name


def test_gradients_are_those_of_torch_where_all_rows_count_alike(two):
    ours = {n: g for n, g in two[0]["slopes"]["even"].items() if n != "loss"}
    assert apart(ours, two[0]["slopes"]["theirs"]) < 1e-5


def test_wrong_calls_get_a_sentence_in_every_process(two):
    for process in two:
        said = process["said"]
        assert "see different losses" in said["astray"] and "draw everything in loss_step from its generator" in said["astray"]
        assert "BatchNorm" in said["batchnorm"] and "shared" in said["batchnorm"]
        assert "short.pt is cut short" in said["short"]
        assert "batch first" in said["axes"] and "[4, 6]" in said["axes"]
        assert "call Team first" in said["elsewhere"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = torchrun("train", folder)
    assert code == 0, said[-3000:]
    return folder, said


def end(folder, rank=0):
    return torch.load(folder / f"end{rank}.pt", weights_only=True)


def same(a, b):
    return a["loss"] == b["loss"] and a["validation"] == b["validation"] and all(torch.equal(x, y) for x, y in zip(a["weights"].values(), b["weights"].values(), strict=True))


def test_a_whole_training(undisturbed, tmp_path):
    folder, said = undisturbed
    one, other = end(folder), end(folder, 1)
    assert same(one, other) and one["told"] == list(range(1, 21)) and other["told"] == []       # one process talks
    assert said.count("| 0/20") == 1
    assert load_checkpoint(folder / "run.pt")["step"] == 20
    whole_training(tmp_path)
    assert one["loss"] == pytest.approx(end(tmp_path)["loss"], abs=1e-4)


def test_one_is_told_to_stop_and_all_do(undisturbed, tmp_path):
    code, said = torchrun("train", tmp_path, f"1:7:{int(signal.SIGTERM)}")
    assert code != 0 and "stopped after step 8 of 20" in said and said.count("call fit again") == 1
    assert load_checkpoint(tmp_path / "run.pt")["step"] == 8 and not (tmp_path / "end0.pt").exists()
    assert torchrun("train", tmp_path)[0] == 0
    assert same(end(tmp_path), end(undisturbed[0])) and same(end(tmp_path, 1), end(undisturbed[0]))


@pytest.mark.slow
def test_a_process_dies_and_all_are_started_again(undisturbed, tmp_path):
    code, said = torchrun("train", tmp_path, f"1:10:{int(signal.SIGKILL)}", restarts=1)
    assert code == 0, said[-3000:]
    assert (tmp_path / "knocked").exists() and same(end(tmp_path), end(undisturbed[0]))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_is_told_to_stop_and_tells_all(undisturbed, tmp_path, number):
    """What a scheduler or Ctrl-C does: the signal reaches torchrun, not the processes."""
    launcher = launch("train", tmp_path)
    while not (tmp_path / "run.pt").exists() and launcher.poll() is None:
        time.sleep(0.02)
    launcher.send_signal(number)
    said, code = finish(launcher)
    step = load_checkpoint(tmp_path / "run.pt")["step"]
    assert code != 0 and 3 <= step <= 20 and f"stopped after step {step} of 20" in said
    assert torchrun("train", tmp_path)[0] == 0 and same(end(tmp_path), end(undisturbed[0]))


@pytest.mark.slow
def test_two_machines(undisturbed, tmp_path):
    """Two launchers that find each other, as on a cluster."""
    port = free_port()
    both = [launch("train", tmp_path, machines=2, each=1, port=port) for _ in range(2)]
    said = [finish(one) for one in both]
    assert [code for _, code in said] == [0, 0], said[0][0][-2000:] + said[1][0][-2000:]
    assert same(end(tmp_path), end(undisturbed[0])) and same(end(tmp_path, 1), end(undisturbed[0]))


@pytest.mark.slow
def test_stop_with_two_and_go_on_with_one(undisturbed, tmp_path):
    assert torchrun("train", tmp_path, f"0:10:{int(signal.SIGTERM)}")[0] != 0
    whole_training(tmp_path)
    assert end(tmp_path)["loss"] == pytest.approx(end(undisturbed[0])["loss"], abs=1e-4)


# ---------------------------------------------------------------- without starting anything

def played(rank, size, call, *args, **kwargs):
    """A process of several, before they add up."""
    team = Team()
    team.size, team.rank, team.sum = size, rank, lambda x: x
    return run_rows(team, call, *args, **kwargs)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_rows_are_divided_without_gap_or_overlap(size):
    x, features = torch.randn(12, 2, 4, 4), torch.randn(6, 3)
    call = lambda x, pair, scale, flag: (scale * x.flatten(1) + pair["f"].repeat_interleave(2, 0).sum(1, keepdim=True), pair["f"])  # noqa: E731
    whole = call(x, {"f": features}, 2, flag=None)
    got = [played(r, size, call, x, {"f": features}, 2, flag=None) for r in range(size)]
    for i in (0, 1):
        assert torch.equal(sum(part[i] for part in got), whole[i])
        rows = torch.stack([part[i].abs().sum(1) > 0 for part in got])
        assert (rows.sum(0) == 1).all() and rows.any(1).all()


def test_memory_layout_survives():
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    assert played(1, 2, lambda x: 2 * x, x).is_contiguous(memory_format=torch.channels_last)


def test_too_few_rows_are_done_by_everybody():
    assert torch.equal(played(1, 4, lambda x: x + 1, torch.zeros(3, 1)), torch.ones(3, 1))


def test_each_tensor_keeps_the_shape_of_things():
    from calidiff_nb.diffusion.denoisers import Prediction

    x = torch.ones(1, 1, 1, 2, 2)
    got = each_tensor(lambda y: y + 1, ([x, 3], {"a": Prediction(x, x)}, None, torch.Size([4])))
    assert got[0][1] == 3 and (got[1]["a"].logit == 2).all() and got[2:] == (None, torch.Size([4]))


def test_a_step_alone_leaves_no_trace():
    model = network()
    with contextlib.suppress(ZeroDivisionError), spread([model], Team()):
        raise ZeroDivisionError
    team = Team()
    team.size, team.sum = 2, lambda x: x
    with contextlib.suppress(ZeroDivisionError), spread([model, model[0]], team):
        assert "forward" in vars(model) and "forward" in vars(model[0])
        raise ZeroDivisionError
    assert "forward" not in vars(model) and "forward" not in vars(model[0])


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"calidiff_nb\[dist\]"):
        Team()


def test_one_process_never_asks_for_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert len(fit(network(), masked_mean, PLAN, progress=False).values["loss"]) == 20
    monkeypatch.setenv("WORLD_SIZE", "2")           # left over from somebody else: without LOCAL_RANK it is not torchrun
    assert Team().size == 1


if __name__ == "__main__":
    main(*sys.argv[1:])
