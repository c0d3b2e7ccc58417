"""The app in a real browser: from a folder to saved masks with the mouse alone, then by keyboard alone, and looked over by axe."""
import contextlib
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calidiff_nb.calidiff.many import calibrate_many
from calidiff_nb.calidiff.model import CaliDiff
from calidiff_nb.raters.folders import load_cohort
from calidiff_nb.raters.simulate import make_cohort

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SERVE = ("import sys; from calidiff_nb.explore.app import serve_app; "
         "sys.exit(serve_app(sys.argv[1], home=sys.argv[2], open_browser=False, announce=lambda address: print(address, flush=True)))")


def write_folder(root: Path, images, masks, raters, present=None) -> None:
    """Write pictures and masks as a person has them: images/NAME.png, masks/RATER/NAME.png."""
    for i, image in enumerate(images):
        for folder, picture in {"images": image, **{f"masks/{who}": masks[i, r] * 255 for r, who in enumerate(raters)}}.items():
            if present is not None and folder.startswith("masks/") and not present[i, list(raters).index(folder[6:])]:
                continue
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(picture, dtype=np.uint8)).save(root / folder / f"case{i}.png")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A small folder of one's own, in a folder with others."""
    cohort = make_cohort("together", 5, 64, seed=5)
    root = tmp_path_factory.mktemp("studies")
    (root / "another study").mkdir()
    write_folder(root / "own", (cohort.images[:, 0] * 255).round().numpy(), cohort.masks[:, :, 0].numpy(), ("Ann", "Ben", "Cleo", "Dan"))
    return root / "own"


@contextlib.contextmanager
def served(folder: Path, home: Path, env: dict):
    """The app as `calidiff app` starts it; gives its address."""
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(folder), str(home)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), server.stderr.read()[-2000:]
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()

STILL = """canvas => { const b = canvas.getBoundingClientRect(), now = [b.x, b.y, b.width].join(), ready = [...document.images].every(i => i.complete);
  if (canvas.seen !== now || !ready) { canvas.seen = now; canvas.since = performance.now(); } return performance.now() - canvas.since > 700; }"""   # pictures that come late move it
NEUTRAL = r"""() => { const words = document.createTreeWalker(document.querySelector('.calidiff-app'), NodeFilter.SHOW_TEXT);
  while (words.nextNode()) words.currentNode.data = words.currentNode.data.replace(/\S*\/pytest-\d+\/[^\/\s]+/g, '~'); }"""   # a test's own folders, as short as a reader's


class Person:
    """Somebody at the page, with a mouse."""

    def __init__(self, page, address):
        self.page = page
        page.set_default_timeout(150_000)
        page.set_viewport_size({"width": 1240, "height": 900})
        page.strangers = []
        page.on("request", lambda r: page.strangers.append(r.url) if r.url.startswith("http") and "//127.0.0.1:" not in r.url else None)
        page.goto(address)
        page.get_by_role("heading", name="1 Open").wait_for()

    def click(self, name, within=None):
        (within or self.page).get_by_role("button", name=name, exact=True).locator("visible=true").first.click()

    def go(self, step):
        self.page.get_by_role("button", name=re.compile(rf"^\d {step}$|^{step}")).locator("visible=true").first.click()
        self.page.get_by_role("heading", name=re.compile(rf"^\d {step}")).wait_for()

    def says(self, words):
        """Wait for a sentence on the page."""
        self.page.locator("[role=status]:visible", has_text=re.compile(words)).first.wait_for()

    def walk_to(self, *names):
        """Go from folder to folder with the list."""
        for name in names:
            self.page.get_by_label("in this folder").locator("visible=true").select_option(label=f"{name}/")
            self.click("Go into the selected folder")

    def open(self, words="Open: "):
        self.page.locator(".calidiff-main:visible", has_text=re.compile("^Open$")).click()
        self.says(words)

    def tab_through(self):
        """Press Tab from the top of the page; gives the height of each thing that takes the focus."""
        self.page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0); }")
        seen = []
        for _ in range(60):
            self.page.keyboard.press("Tab")
            at = self.page.evaluate("() => { const e = document.activeElement; if (e === document.body) return null; const app = document.querySelector('.calidiff-app'); return app.contains(e) ? [e.getBoundingClientRect().top - app.getBoundingClientRect().top, e.outerHTML.slice(0, 80)] : null; }")
            if at is None:
                break
            seen.append(at[0])
        return seen

    def tab_to(self, found):
        """Press Tab until something has the focus."""
        for _ in range(120):
            if found.evaluate("e => e === document.activeElement"):
                return
            self.page.keyboard.press("Tab")
        pytest.fail(f"the keyboard does not reach {found}")

    def keys_to(self, label, *keys):
        """Go to a field by Tab, then press keys or type."""
        self.tab_to(self.page.get_by_label(label, exact=True).locator("visible=true").first)
        for key in keys:
            if re.fullmatch(r"Control\+a|Enter|Tab|Space", str(key)):
                self.page.keyboard.press(key)
            else:
                self.page.keyboard.type(str(key))

    def keys_to_button(self, name, key):
        """Go to a button by Tab, and press it."""
        button = self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first
        button.wait_for()
        self.page.wait_for_function("b => !b.disabled", arg=button.element_handle())
        self.tab_to(button)
        self.page.keyboard.press(key)

    def draw(self, share=0.12):
        """A small outline with the mouse, in the upper left of the canvas."""
        canvas = self.page.locator("canvas:visible")
        canvas.scroll_into_view_if_needed()
        self.page.wait_for_function(STILL, arg=canvas.element_handle(), polling=100)
        at = canvas.bounding_box()
        points = [(at["x"] + at["width"] * (0.2 + share * math.cos(a)), at["y"] + at["height"] * (0.2 + share * math.sin(a))) for a in (2 * math.pi * i / 20 for i in range(20))]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point)
        self.page.mouse.up()

    def shot(self, screens, name, keep=None):
        """The whole page, which scrolls inside its body; for the gallery too, if `keep` is given."""
        tall = self.page.evaluate("Math.max(700, Math.ceil(document.querySelector('.calidiff-app').getBoundingClientRect().height) + 60)")
        self.page.set_viewport_size({"width": 1240, "height": tall})
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=screens / f"app-{name}.png")
        if keep is not None:
            self.page.evaluate(NEUTRAL)
            keep(self.page.locator(".calidiff-app"), "App")
        self.page.set_viewport_size({"width": 1240, "height": 900})

    def is_accessible(self):
        """What axe finds against WCAG 2.1 A and AA, in words; skips where axe cannot be had."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe here: pip install axe-playwright-python")
        found = axe.Axe().run(self.page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]})
        said = [f"{v['id']}: {v['help']}: " + "; ".join(n["html"][:160] for n in v["nodes"][:4]) for v in found.response["violations"]]
        assert not said, "\n".join(said)


def mask_of(path):
    return np.array(Image.open(path)) > 127


def test_from_opening_to_saved_masks_with_the_mouse_alone(own, surroundings, page, screens, keep, tmp_path):
    with served(own.parent, tmp_path, surroundings) as address:
        person = Person(page, address)
        person.shot(screens, "1-open")
        person.open("laid out in no way known here")
        person.walk_to("own")
        person.open()
        person.shot(screens, "1-opened")
        person.go("Look")
        page.locator(".calidiff-screen img:visible").wait_for()
        page.get_by_label("order").select_option("most disputed first")
        person.says("disputed")
        person.shot(screens, "2-look")
        person.go("Calibrate")
        page.get_by_label("model", exact=True).locator("visible=true").select_option(label="simulated-64 (in the package)")
        person.click("Calibrate")
        person.says("5 cases done")
        person.says("Masks and arrays")
        person.shot(screens, "3-calibrated")
        person.draw()
        person.says("corrected by you")
        person.shot(screens, "3-corrected", keep)
        person.click("Save masks, doubt and tables")
        person.says("files saved in")
        results = tmp_path / "own-calidiff" / "calibrated-simulated-64"
        assert not np.array_equal(mask_of(results / "masks/case0.png"), mask_of(results / "final/masks/case0.png")), "the stroke is not in the saved mask"
        assert mask_of(results / "final/masks/case0.png")[12, 12] and all(np.array_equal(mask_of(results / f"masks/case{i}.png"), mask_of(results / f"final/masks/case{i}.png")) for i in range(1, 5))
        assert "Ann" in (results / "final/expertness.csv").read_text() and (results / "index.html").stat().st_size > 100_000
        person.shot(screens, "3-saved")
        assert not page.problems and not page.strangers, page.strangers


def test_every_part_is_accessible(own, surroundings, page, screens, tmp_path):
    """Names, roles and contrast by axe, in every part of the page; focus goes in the order of reading."""
    calibrate_many(CaliDiff.from_pretrained("simulated-64"), own, tmp_path / "own-calidiff" / "calibrated-simulated-64", batch=4)
    with served(own, tmp_path, surroundings) as address:
        person = Person(page, address)
        person.is_accessible()
        order = person.tab_through()
        assert len(order) > 10 and all(below - above > -8 for above, below in zip(order, order[1:])), order
        person.open()
        for step in ("Look", "Calibrate", "Train", "Segment", "Open"):
            person.go(step)
            person.is_accessible()
        person.go("Calibrate")
        page.get_by_label("model", exact=True).locator("visible=true").select_option(label="simulated-64 (in the package)")
        person.click("Calibrate")
        page.locator("canvas:visible").wait_for()
        person.says("cases done")
        person.is_accessible()
        page.evaluate("document.querySelector('.calidiff-figure img').removeAttribute('alt')")
        with pytest.raises(AssertionError, match="image-alt"):   # axe looks at what is shown here
            person.is_accessible()
        assert not page.problems


def test_training_and_segmenting_by_keyboard_alone(own, surroundings, page, screens, tmp_path):
    """No mouse: a path is typed, a training started, stopped and gone on with, and images are segmented with its model."""
    with served(own.parent, tmp_path, surroundings) as address:
        person = Person(page, address)
        person.keys_to("folder or file", "Control+a", own, "Enter")
        person.keys_to_button("Open", "Enter")
        person.says("Open: 5 cases")
        person.keys_to_button("4 Train", "Space")
        person.keys_to("steps of the diffusion", "Control+a", "16", "Tab")
        person.keys_to("steps of the committee", "Control+a", "0", "Tab")
        person.keys_to_button("Train", "Enter")
        page.locator(".calidiff-figure img:visible").wait_for()
        person.keys_to_button("Stop", "Enter")
        person.says("Stopped by you")
        person.shot(screens, "4-stopped")
        person.keys_to_button("Go on training", "Enter")
        person.says("It is chosen in 3 Calibrate and 5 Segment")
        person.shot(screens, "4-trained")
        person.keys_to_button("5 Segment", "Enter")
        person.keys_to("folder of images", "Control+a", own / "images", "Enter")
        person.keys_to("samples", "Control+a", "6", "Tab")
        person.keys_to_button("Segment", "Enter")
        person.says("5 cases. Masks and arrays")
        person.keys_to_button("Save masks, doubt and tables", "Enter")
        person.says("files saved in")
        person.shot(screens, "5-segmented")
        place = tmp_path / "images-calidiff" / "segmented-own-16+0-6" / "final"
        assert len(list((place / "masks").glob("*.png"))) == len(list((place / "uncertainty").glob("*.png"))) == 5
        canvas = page.locator("canvas:visible")
        canvas.focus()
        for key in ("c", "b", "Enter", "Shift+ArrowUp", "Enter"):   # cleared first: a stroke inside the outline changes nothing
            page.keyboard.press(key)
        person.says("corrected by you")
        assert not page.problems


def lidc_slices(root):
    """Two patients in the layout of LIDC-IDRI-slices."""
    source = SHARED / "LIDC-IDRI-slices"
    if not source.is_dir():
        pytest.skip(f"no LIDC-IDRI-slices beside the project ({source.name})")
    for patient in sorted(source.iterdir())[:2]:
        shutil.copytree(patient, root / "slices" / patient.name)
    return root / "slices"


def bu_bil(root):
    """Six images of a BU-BIL set, exported as a person has them."""
    source = SHARED / "bubil_1.npz"
    if not source.is_file():
        pytest.skip(f"no {source.name} beside the project")
    cohort = load_cohort(source).subset(range(6)).drop_absent_raters()
    write_folder(root / "bubil", (cohort.images[:, 0] * 255).round().numpy(), cohort.masks[:, :, 0].numpy(), [n.replace("/", " ") for n in cohort.rater_names], cohort.present)
    return root / "bubil"


@pytest.mark.parametrize("export", [lidc_slices, bu_bil])
def test_real_annotations_from_opening_to_saved_masks(export, surroundings, page, screens, tmp_path):
    folder = export(tmp_path)
    with served(folder, tmp_path / "home", surroundings) as address:
        person = Person(page, address)
        person.open()
        person.go("Look")
        page.locator(".calidiff-screen img:visible").wait_for()
        person.shot(screens, f"2-look-{folder.name}")
        person.go("Calibrate")
        person.click("Calibrate")
        person.says("cases done")
        person.says("Masks and arrays")
        person.draw(0.08)
        person.says("corrected by you")
        person.click("Save masks, doubt and tables")
        person.says("files saved in")
        person.shot(screens, f"3-saved-{folder.name}")
        results = tmp_path / "home" / f"{folder.name}-calidiff" / "calibrated-lidc-rendered-64"
        typed, saved = (sorted(p.relative_to(place) for p in place.rglob("*.png")) for place in (results / "masks", results / "final" / "masks"))
        assert typed == saved and len(saved) >= 6 and (results / "final" / "expertness.csv").is_file()
        images = {p.stem: Image.open(p).size for p in folder.rglob("images/*.png")}
        assert {Image.open(results / "final" / "masks" / p).size for p in saved} <= set(images.values()), "masks have the size of the originals"
        assert not page.problems
