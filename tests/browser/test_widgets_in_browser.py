"""Each widget in JupyterLab and in Voilà: opened, moved by keyboard and mouse, drawn on; picture and numbers are seen to change."""
import importlib.util
import math
import re
import secrets
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
NAMES = ("DenoisePlayer", "RaterExplorer", "ScheduleLab", "CommitteeRoom", "DrawAsRater", "TrainingBoard")
SEEN = "const i = box.querySelector('.calidiff-screen img'), words = box.querySelector('[role=status]').textContent;"
CHANGED = f"([box, src, said]) => {{ {SEEN} return i.src !== src && i.complete && i.naturalWidth > 300 && words !== said; }}"
QUIET = f"box => {{ {SEEN} const now = i.src + words; if (box.seen !== now || !i.complete) {{ box.seen = now; box.since = performance.now(); }} return performance.now() - box.since > 500; }}"
KERNEL = "(window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status)"


class Seen:
    """One widget on a page: what it shows now, and whether that changes."""

    def __init__(self, page, box):
        self.page, self.box = page, box
        self.box.locator(".calidiff-screen img").wait_for()
        page.wait_for_function("box => box.querySelector('.calidiff-screen img').naturalWidth > 300", arg=box.element_handle())

    def now(self):
        return self.box.locator(".calidiff-screen img").get_attribute("src"), self.box.locator("[role=status]").text_content()

    def changes(self, act):
        """Do something; wait until picture and words are others than before, and stay."""
        src, words = self.now()
        act()
        handle = self.box.element_handle()
        self.page.wait_for_function(CHANGED, arg=[handle, src, words])
        self.page.wait_for_function(QUIET, arg=handle, polling=100)

    def by_slider_key(self):
        self.box.locator(".noUi-handle").first.focus()
        self.page.keyboard.press("ArrowRight")

    def by_picture_key(self):
        self.box.locator(".calidiff-screen").focus()
        self.page.keyboard.press("ArrowRight")

    def by_mouse(self):
        self.drag(self.box.locator(".noUi-handle").first, 45)

    def drag(self, handle, by):
        handle.scroll_into_view_if_needed()
        at = handle.bounding_box()
        x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + by / 2, y)
        self.page.mouse.move(x + by, y)
        self.page.mouse.up()

    def outline(self, wide=0.24, high=0.24, right=0.0, down=0.0):
        """Draw an ellipse with the mouse, all in shares of the canvas."""
        canvas = self.box.locator("canvas")
        canvas.scroll_into_view_if_needed()
        at = canvas.bounding_box()
        points = [(at["x"] + at["width"] * (0.5 + right + wide * math.cos(a)), at["y"] + at["height"] * (0.5 + down + high * math.sin(a))) for a in (2 * math.pi * i / 24 for i in range(24))]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point)
        self.page.mouse.up()


def test_every_widget_is_here():
    """Nobody adds a widget without adding it to these tests."""
    source = (Path(__file__).resolve().parents[2] / "calidiff_nb" / "explore" / "widgets.py").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^class (\w+)\(Explorable\):", source, re.M)) == sorted(NAMES)


def open_in_lab(page, address) -> None:
    """Open a notebook in JupyterLab and run it."""
    page.goto(address)
    page.wait_for_function(f"() => {KERNEL} === 'idle'")
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")


def move(seen: Seen) -> None:
    """What every widget must do: slider by keyboard, picture by keyboard, slider by mouse."""
    for act in (seen.by_slider_key, seen.by_picture_key, seen.by_mouse):
        seen.changes(act)


def keys_on(seen: Seen, slider: int, times: int) -> None:
    """Move one of the sliders by keyboard."""
    seen.box.locator(".noUi-handle").nth(slider).focus()
    for _ in range(times):
        seen.page.keyboard.press("ArrowRight")


# what each of them has besides: a list, a play button, a rater's habit, a bend, a switch
OWN = {
    "DenoisePlayer": [lambda seen: seen.box.locator("select").nth(2).select_option("careless"), lambda seen: seen.box.locator(".widget-play button").first.click(), lambda seen: seen.box.locator(".calidiff-screen").press("Home"),
                      lambda seen: [seen.box.locator(".calidiff-screen").press("ArrowRight") for _ in range(3)]],
    "RaterExplorer": [lambda seen: seen.box.locator("select").first.select_option("most disputed first"), lambda seen: keys_on(seen, 2, 2)],
    "ScheduleLab": [lambda seen: keys_on(seen, 1, 6), lambda seen: seen.box.locator(".calidiff-screen").press("PageDown")],
    "CommitteeRoom": [lambda seen: seen.box.get_by_text("accurate", exact=True).click(), lambda seen: keys_on(seen, 4, 4)],
}


def move_drawing(seen: Seen) -> None:
    """An outline by mouse, strokes by keyboard, eraser, undo and clear; then an outline of the lesion."""
    canvas, says = seen.box.locator("canvas"), seen.box.locator("output")
    marked = lambda: int(says.inner_text().split("; ")[-1].split()[0])
    seen.changes(seen.outline)
    first = marked()
    assert "You marked" in seen.now()[1] and first > 300
    canvas.focus()
    for key in ("b", "ArrowUp", *["Shift+ArrowUp"] * 4):
        seen.page.keyboard.press(key)
    assert seen.box.get_by_role("button", name="Brush").get_attribute("aria-pressed") == "true"

    def strokes():
        for key in ("Enter", "Shift+ArrowUp", "Shift+ArrowLeft", "Enter"):
            seen.page.keyboard.press(key)

    seen.changes(strokes)
    second = marked()
    assert second > first
    seen.box.get_by_role("button", name="Eraser").click()
    seen.changes(lambda: seen.outline(0.05, 0.05))
    assert marked() < second
    canvas.focus()
    seen.changes(lambda: seen.page.keyboard.press("z"))
    assert marked() == second
    seen.changes(lambda: seen.page.keyboard.press("z"))
    assert marked() == first
    seen.changes(lambda: seen.page.keyboard.press("c"))
    assert "Nothing drawn yet" in seen.now()[1] and marked() == 0
    seen.box.get_by_role("button", name="Outline").click()
    seen.changes(lambda: seen.outline(0.23, 0.21, -0.07, 0.04))


def move_training(seen: Seen) -> None:
    """The board redraws while the cell below it trains; then one looks back, by picture, slider and list."""
    seen.page.wait_for_function("box => box.querySelector('[role=status]').textContent.includes('After 4 stages')", arg=seen.box.element_handle())
    seen.changes(lambda: seen.box.locator(".calidiff-screen").press("Home"))
    assert "No stage is finished yet" in seen.now()[1]
    seen.changes(lambda: seen.box.locator(".noUi-handle").first.press("ArrowRight"))
    assert "After 1 stage" in seen.now()[1]
    seen.changes(lambda: seen.box.locator("select").first.select_option("losses"))
    seen.changes(lambda: seen.box.locator("select").first.select_option("everything"))
    seen.changes(lambda: seen.drag(seen.box.locator(".noUi-handle").first, 150))


MOVES = {"DrawAsRater": move_drawing, "TrainingBoard": move_training}


@pytest.mark.parametrize("name", NAMES)
def test_in_jupyterlab(lab, page, screens, keep, name):
    open_in_lab(page, lab(name))
    seen = Seen(page, page.locator(".jp-OutputArea-output", has=page.locator(".calidiff-screen")).first)
    written = page.evaluate("jupyterapp.shell.currentWidget.content.model.cells.length"), page.locator(".jp-InputArea-editor").all_inner_texts()
    MOVES.get(name, move)(seen)
    for act in OWN.get(name, []):
        seen.changes(lambda act=act: act(seen))
    page.wait_for_function(f"() => {KERNEL} === 'idle'")
    page.set_viewport_size({"width": 1100, "height": 1500})  # nothing cut off
    keep(seen.box, name)
    page.set_viewport_size({"width": 1100, "height": 1050})
    seen.box.scroll_into_view_if_needed()
    page.screenshot(path=screens / f"lab-{name}.png")
    if name == "DrawAsRater":
        seen.changes(seen.by_picture_key)  # to a case without a drawing
        assert "Nothing drawn yet" in seen.now()[1]
        seen.changes(lambda: seen.box.locator(".noUi-handle").first.press("ArrowLeft"))
        assert "You marked" in seen.now()[1], "a drawing is kept while one looks at another case"
    assert (page.evaluate("jupyterapp.shell.currentWidget.content.model.cells.length"), page.locator(".jp-InputArea-editor").all_inner_texts()) == written, "a key meant for the widget reached the notebook"
    assert page.locator(".jp-OutputArea-output[data-mime-type*='stderr'], .jp-mod-error").count() == 0
    assert not page.problems


def test_a_chart_answers_to_the_mouse(lab, page, keep):
    """A chart is alive without the network: a point says what it is, a panel can be zoomed and comes back."""
    open_in_lab(page, lab("Chart"))
    still = page.locator(".jp-OutputArea-output img.plot-img")
    still.wait_for()
    size = still.evaluate("i => [i.naturalWidth, i.naturalHeight]")
    still.scroll_into_view_if_needed()
    place = still.bounding_box()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)  # the still twin stands until the mouse comes
    chart = page.locator(".js-plotly-plot")
    chart.locator(".point").first.wait_for()
    alive = chart.locator(".main-svg").first.bounding_box()
    assert abs(alive["width"] - size[0]) < 3 and abs(alive["height"] - size[1]) < 3, "nothing jumps when the chart comes alive"
    at = chart.locator(".scatterlayer .point").nth(2).bounding_box()
    page.mouse.move(at["x"] - 40, at["y"] + 40)
    page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2, steps=4)
    chart.locator(".hovertext").wait_for()
    assert "weight (share of the trust)" in chart.locator(".hovertext").text_content()
    keep(chart, "Chart")
    span = "() => { const [a, b] = document.querySelector('.js-plotly-plot').layout.xaxis.range; return b - a; }"
    wide, panel = page.evaluate(span), chart.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(panel["x"] + 20, panel["y"] + 20)
    page.mouse.down()
    page.mouse.move(panel["x"] + 60, panel["y"] + 60)
    page.mouse.move(panel["x"] + 90, panel["y"] + 90)
    page.mouse.up()
    page.wait_for_function(f"wide => ({span})() < 0.8 * wide", arg=wide)
    page.mouse.dblclick(panel["x"] + 40, panel["y"] + 40)
    page.wait_for_function(f"wide => ({span})() > 0.95 * wide", arg=wide)
    assert not page.problems


def test_in_voila(voila, page, screens):
    """All widgets on one page."""
    page.goto(voila)
    boxes = page.locator(".widget-vbox", has=page.locator(".calidiff-screen"))
    page.wait_for_function(f"() => document.querySelectorAll('.calidiff-screen img').length === {len(NAMES)}")
    for i, name in enumerate(NAMES):
        seen = Seen(page, boxes.nth(i))
        if name == "TrainingBoard":
            move_training(seen)
            continue
        if name == "DrawAsRater":
            seen.changes(seen.outline)
        else:
            seen.changes(seen.by_slider_key)
        seen.changes(seen.by_mouse)
    page.set_viewport_size({"width": 1100, "height": 3000})
    page.screenshot(path=screens / "voila.png")
    assert not page.problems


@pytest.mark.skipif(importlib.util.find_spec("notebook") is None, reason="Notebook 7 is not installed: pip install notebook")
def test_in_notebook(place, surroundings, page, screens, serving, free_port, tmp_path):
    """The classic interface, version 7: one widget of controls, one that is drawn on."""
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "notebook", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={place}", "--allow-root",
               "--JupyterNotebookApp.expose_app_in_browser=True"]
    with serving(command, f"http://127.0.0.1:{port}/api?token={token}", surroundings, tmp_path / "log"):
        for name in ("CommitteeRoom", "DrawAsRater"):
            open_in_lab(page, f"http://127.0.0.1:{port}/notebooks/{name}.ipynb?token={token}")
            seen = Seen(page, page.locator(".jp-OutputArea-output", has=page.locator(".calidiff-screen")).first)
            if name == "DrawAsRater":
                seen.changes(seen.outline)
            else:
                move(seen)
            page.screenshot(path=screens / f"notebook-{name}.png")
    own = "Cannot read properties of undefined (reading 'schema')"   # Notebook 7.6 says this of itself on every notebook, one with a bare slider too
    assert set(page.problems) <= {own}
