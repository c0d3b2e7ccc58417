"""A real browser, and real servers on the loopback interface, each with folders of its own."""
import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from PIL import Image, ImageColor

ROOT = Path(__file__).resolve().parents[2]
SCREENS = Path(os.environ.get("CALIDIFF_SCREENS") or ROOT / "build" / "screens")   # the screenshots stay here, to be looked at
GALLERY = ROOT / "nbs" / "explore" / "gallery"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage"]
PATIENCE = 180  # seconds; a loaded machine is slow, and nothing is slept away: every wait ends when what it waits for is there
WIDGETS = {"DenoisePlayer": "cohort, model, DenoiseState(denoiser='exact')", "RaterExplorer": "cohort, model", "ScheduleLab": "cohort", "CommitteeRoom": "cohort, model",
           "DrawAsRater": "cohort, model", "TrainingBoard": "4"}
TRAINING = ("learners, judges = make_cohort('together', 40, 32, seed=1).split((0.7, 0.3))\n"
            "plan = CaliDiffConfig(widths=(8, 16, 16), image_steps=10, joint_steps=30, committee_steps=8, batch=8, lr=4e-3)\n"
            "CaliDiff.for_cohort(learners, plan).fit(learners, judges, progress=False, on_stage=board.on_stage);")   # the board is one cell above
CELLS = {name: f"{name}({given})" for name, given in WIDGETS.items()} | {"TrainingBoard": "board = TrainingBoard(4)\nboard"} | {"Chart": "hover(show_expertness(*(w[:, 0] for w in (model.expertness.weights, model.expertness.weights_low, model.expertness.weights_high)), model.expertness.covariance[..., 0], model.rater_names))"}
SETUP = ["from calidiff_nb.explore.figures import DenoiseState, hover, show_expertness", "from calidiff_nb.explore.widgets import CommitteeRoom, DenoisePlayer, DrawAsRater, RaterExplorer, ScheduleLab, TrainingBoard",
         "from calidiff_nb.calidiff.model import CaliDiff, CaliDiffConfig", "from calidiff_nb.raters.simulate import make_cohort",
         "cohort, model = make_cohort('together', 8, 64, seed=5), CaliDiff.from_pretrained('simulated-64')"]


def notebook(path: Path, names) -> None:
    """Write a tiny notebook: a cell that imports, and a cell for each widget or chart."""
    cells = [nbformat.v4.new_code_cell("\n".join(SETUP)), *(nbformat.v4.new_code_cell(CELLS[name]) for name in names), *(nbformat.v4.new_code_cell(TRAINING) for name in names if name == "TrainingBoard")]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with the tiny notebooks; Lab saves into it."""
    folder = tmp_path_factory.mktemp("notebooks")
    for name in CELLS:
        notebook(folder / f"{name}.ipynb", [name])
    notebook(folder / "all.ipynb", WIDGETS)
    return folder


@pytest.fixture(scope="session")
def surroundings(tmp_path_factory):
    """An environment that reads nobody's settings and leaves none behind."""
    home = tmp_path_factory.mktemp("home")
    private = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR",
                                                            "JUPYTERLAB_WORKSPACES_DIR")}
    settings = Path(private["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"fetchNews": "false"}))
    env = {k: v for k, v in os.environ.items() if k != "CALIDIFF_FAST"} | private
    return env | {"HOME": str(home), "PYTHONPATH": str(ROOT), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


@contextlib.contextmanager
def serving(command: list[str], url: str, env: dict[str, str], log: Path):
    """Run a server until it answers; end it, and only it, afterwards."""
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(url, timeout=10)
                break
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, f"the server did not come up in {PATIENCE} s: {log.read_text()[-3000:]}"
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # the server, and the kernels it started
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session", name="serving")
def _serving():
    """`serving`, for tests that start a server of their own."""
    return serving


@pytest.fixture(scope="session", name="free_port")
def _free_port():
    """`free_port`, for the same."""
    return free_port


@pytest.fixture(scope="session")
def lab(place, surroundings, tmp_path_factory):
    """JupyterLab; gives the address of a notebook."""
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={place}", "--allow-root", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with serving(command, f"http://127.0.0.1:{port}/api?token={token}", surroundings, tmp_path_factory.mktemp("lab") / "log"):
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}.ipynb?token={token}&reset"


@pytest.fixture(scope="session")
def voila(place, surroundings, tmp_path_factory):
    """Voilà, showing the notebook with all widgets."""
    port = free_port()
    command = [sys.executable, "-m", "voila", str(place / "all.ipynb"), "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}"]
    with serving(command, f"http://127.0.0.1:{port}/voila/static/favicon.ico", surroundings, tmp_path_factory.mktemp("voila") / "log"):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="session")
def chromium():
    """One headless Chromium for all tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A fresh page that remembers its errors."""
    context = chromium.new_context(viewport={"width": 1100, "height": 1050})
    fresh = context.new_page()
    fresh.problems = []
    fresh.on("pageerror", lambda e: fresh.problems.append(str(e)))
    fresh.set_default_timeout(1000 * PATIENCE)
    yield fresh
    context.close()


@pytest.fixture(scope="session")
def screens():
    """Where screenshots are kept."""
    SCREENS.mkdir(parents=True, exist_ok=True)
    return SCREENS


@pytest.fixture(scope="session")
def keep(screens):
    """Keep a small picture of one part of a page; for the gallery too, if CALIDIFF_GALLERY is set."""
    from calidiff_nb.explore.figures import RATER_COLOURS, VERDICT_LINE

    def save(part, name: str) -> None:
        picture = Image.open(io.BytesIO(part.screenshot(animations="disabled"))).convert("RGB")
        lines = [v for colour in (*RATER_COLOURS, VERDICT_LINE["color"]) for v in ImageColor.getrgb(colour)]  # thin, so that no palette would find them by itself
        palette = Image.new("P", (1, 1))
        palette.putpalette([0, 0, 0, 255, 255, 255, *lines, *picture.quantize(220, dither=Image.Dither.NONE).getpalette()[:660]])
        for folder in (screens, *([GALLERY] if os.environ.get("CALIDIFF_GALLERY") else [])):
            picture.quantize(palette=palette, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)
    return save
