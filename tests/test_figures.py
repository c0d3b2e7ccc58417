"""Pictures: pure, for every shape of input, with one style and honest words."""
import base64
import io
import json

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text
from PIL import Image, ImageFilter

from calidiff_nb.diffusion.training import History
from calidiff_nb.explore import figures as F

SIZE = 32
yy, xx = torch.meshgrid(torch.arange(SIZE).float(), torch.arange(SIZE).float(), indexing="ij")


def disc(radius: float) -> torch.Tensor:
    return (torch.hypot(yy - 16, xx - 15) < radius).to(torch.uint8)


def case(r: int = 4, k: int = 1, empty: bool = False, missing: bool = False, channels: int = 1) -> dict:
    g = torch.Generator().manual_seed(0)
    masks = torch.stack([torch.stack([disc(0 if empty else 7 + i % 4 - 2 * j) for j in range(k)]) for i in range(r)])
    present = torch.ones(r, dtype=torch.bool)
    if missing:
        present[0] = False
        masks[0] = 0
    return {"image": torch.rand(channels, SIZE, SIZE, generator=g), "masks": masks, "present": present}


def distances(c: dict) -> torch.Tensor:
    return torch.where(c["masks"] > 0, -2.0, 2.0) + 0.01 * xx


SHAPES = {"plain": {}, "one rater": {"r": 1}, "seven raters": {"r": 7}, "two structures": {"k": 2}, "empty masks": {"empty": True}, "a rater missing": {"missing": True},
          "colour image": {"channels": 3}}


@pytest.fixture(params=SHAPES, name="c")
def each_shape(request):
    return case(**SHAPES[request.param])


def per_case_pictures(c: dict, theme: str = "light") -> list[F.Picture]:
    image, masks, present = c["image"], c["masks"], c["present"]
    d, k, r = distances(c), masks.shape[1], len(masks)
    p = masks.float().mean(0)
    attention = torch.full((r + 1, k, SIZE, SIZE), 1 / (r + 1))
    s = k - 1
    return [F.show_raters(image, masks, present, truth=masks[-1], theme=theme),
            F.show_votes(image, masks, present, structure=s, theme=theme),
            F.show_calibration(image, masks, d, d, d[0], torch.ones(k), present, truth=masks[-1], structure=s, theme=theme),
            F.show_calibration(image, masks, d, d, d[0], torch.ones(k, SIZE, SIZE), present, structure=s, theme=theme),
            F.show_attention(image, attention, masks, present, structure=s, theme=theme),
            F.show_attention(image, attention, structure=s, theme=theme),
            F.show_pseudo_truth(image, p, torch.ones(k, SIZE, SIZE), masks[-1], structure=s, theme=theme),
            F.show_pseudo_truth(image, p, torch.ones(k), structure=s, theme=theme),
            F.show_samples(image, masks, p, structure=s, theme=theme)]


def other_pictures(theme: str = "light") -> list[F.Picture]:
    n = 5
    g = torch.Generator().manual_seed(0)
    walk = torch.randn(n, SIZE, SIZE, generator=g)
    t = torch.arange(n).flip(0) * 200
    w = torch.tensor([0.5, 0.3, 0.2])
    x = torch.linspace(0.05, 0.95, 10)[None]
    return [F.show_agreement_matrix(torch.tensor([[1.0, 0.8, torch.nan], [0.8, 1.0, 0.6], [torch.nan, 0.6, 1.0]]), theme=theme),
            F.show_disagreement_by_size(torch.linspace(10, 500, 40), torch.linspace(0.5, 0.9, 40), theme=theme),
            F.show_schedule({"a": torch.linspace(0.99, 0.01, 50, dtype=torch.float64)}, theme=theme),
            F.filmstrip(walk, theme=theme), F.show_trajectory(walk, walk * 0.5, t, torch.rand(1, SIZE, SIZE, generator=g), theme=theme),
            F.show_step(walk[0], walk[1], torch.rand(1, SIZE, SIZE, generator=g), walk[1], "t = 3", theme=theme),
            F.show_effective_raters(t, {"x": torch.linspace(4, 1, n)}, 4, theme=theme),
            F.show_retention(torch.tensor([0.2, 0.8]), {"one call": torch.tensor([0.3, 0.9])}, 2.0, theme=theme),
            F.show_expertness(w, w - 0.1, w + 0.1, torch.eye(3), theme=theme), F.show_monitors(histories(), theme=theme),
            F.show_reliability(x, x**1.2, torch.full((1, 10), 50.0), x**1.2 - 0.05, x**1.2 + 0.05, theme=theme),
            F.show_benchmark(["a", "b", "c"], w, w - 0.05, w + 0.05, "b", w - 0.3, w - 0.35, w - 0.25, theme=theme),
            F.show_learning(torch.arange(50), {"loss": torch.exp(-torch.arange(50) / 9)}, {"Dice": torch.linspace(0, 1, 50)}, theme=theme),
            F.quality_vs_steps(torch.tensor([1, 5, 25]), {"DDIM": torch.tensor([0.5, 0.2, 0.19])}, theme=theme)]


def test_every_picture_of_a_case_can_be_drawn(c):
    for picture in per_case_pictures(c):
        picture.draw_without_rendering()
        assert picture.title_text and picture.caption and picture.caption[0].upper() == picture.caption[0]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_other_picture_can_be_drawn(theme):
    for picture in other_pictures(theme):
        picture.draw_without_rendering()
        assert to_hex(picture.get_facecolor()) == F.theme_of(theme).page
        assert picture.title_text in picture.alt and picture.caption in picture.alt


def charts(r: int, missing: bool = False) -> list[F.Picture]:
    """The charts about r raters (or methods), one of them without numbers where `missing`."""
    w = torch.linspace(2, 1, r) / torch.linspace(2, 1, r).sum()
    pairs = torch.full((r, r), 0.7).fill_diagonal_(1.0)
    x = torch.linspace(0.05, 0.95, 6).expand(r, 6).clone()
    count = torch.full((r, 6), 50.0)
    t = torch.arange(5) * 200
    if missing:
        pairs[0, 1:] = pairs[1:, 0] = torch.nan
        x[0], count[0] = torch.nan, 0
    names = [f"method {i}" for i in range(r)]
    return [F.show_agreement_matrix(pairs), F.show_expertness(w, w - 0.05, w + 0.05, torch.eye(r)), F.show_expertness(w), F.show_reliability(x, x, count, names=names), F.show_benchmark(names, w, w - 0.05, w + 0.05, names[0], w - w[0], w - w[0] - 0.01, w - w[0] + 0.01),
            F.show_effective_raters(t, {n: torch.linspace(r, 1, 5) for n in names}, r), F.quality_vs_steps(torch.tensor([5]), {n: torch.tensor([0.2]) for n in names}), F.show_learning(torch.arange(3), {n: torch.tensor([1.0, 0.5, torch.nan]) for n in names}),
            F.show_disagreement_by_size(torch.tensor([0.0] if missing else [30.0]), torch.tensor([0.5]), bands=r)]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("r", [1, 2, 7])
def test_every_chart_can_be_drawn_for(r, missing, recwarn):
    for picture in charts(r, missing):
        picture.draw_without_rendering()
        assert picture.title_text and picture.caption and "nan" not in picture.alt, picture.alt
    assert not [w for w in recwarn if "figures.py" in str(w.filename)]


# charts that answer to the mouse


def numbers_in(chart: dict) -> list[float]:
    """Everything that plotly is told, without words."""
    return [v for trace in chart["data"] for letter in "xy" for v in trace.get(letter, []) if isinstance(v, float)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_chart_answers_to_the_mouse_and_plotly_knows_it(theme):
    seen = 0
    for picture in other_pictures(theme):
        if all(ax.images for ax in picture.axes) and "agrees" not in picture.title_text:
            continue  # scans and noise
        told = F.hover(picture)
        made = told.plotly()                                       # plotly's own validators read every field
        assert len(made.data) == len(told.chart["data"]) > 0 and made.layout.paper_bgcolor == F.theme_of(theme).page
        words = json.dumps(told.chart, allow_nan=False)
        assert "http" not in words and len(words) < 200_000 and numbers_in(told.chart) or "agrees" in picture.title_text
        assert any(picture.title_text in note["text"] for note in told.chart["layout"]["annotations"])
        seen += 1
    assert seen >= 9


@pytest.mark.parametrize("r", [1, 7])
@pytest.mark.parametrize("missing", [False, True])
def test_charts_of_anybody_answer(r, missing):
    for picture in charts(r, missing):
        json.dumps(F.hover(picture).chart, allow_nan=False)        # plain JSON: no nan reaches a browser
        F.hover(picture).plotly()


def test_a_chart_says_the_numbers_it_was_given():
    w, low, high = torch.tensor([0.7, 0.3]), torch.tensor([0.6, 0.1]), torch.tensor([0.75, 0.45])
    told = F.hover(F.show_expertness(w, low, high, names=["Ann <1>", "Bob"]))
    ann, bob = (t for t in told.chart["data"] if "error_x" in t)
    assert ann["x"] == [pytest.approx(0.7)] and ann["text"] == ["<b>Ann &lt;1&gt;</b><br>weight (share of the trust): 0.7 [0.6, 0.75]"]
    assert "Ann &lt;1&gt;" in "".join(ann["text"]) and "<1>" not in json.dumps(told.chart)   # names are words, not markup
    assert bob["error_x"]["array"] == [pytest.approx(0.15)] and bob["error_x"]["arrayminus"] == [pytest.approx(0.2)]
    bars = [t for t in told.chart["data"] if t["type"] == "bar"]
    assert [b["x"][0] for b in bars] == pytest.approx([0.7, 0.3])


def test_a_chart_has_a_still_twin_in_the_same_output():
    told = F.hover(F.show_agreement_matrix(torch.eye(2), ["A", "B"]))
    bundle = told._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/png", "text/plain"}
    assert base64.b64decode(bundle["image/png"])[:4] == b"\x89PNG" and bundle["text/plain"] == told.picture.alt
    assert "<b>A</b> and <b>B</b><br>0" in str(told.chart["data"])


def test_a_static_page_shows_the_twin_and_loads_nothing():
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert")
    bundle = F.hover(F.show_agreement_matrix(torch.eye(2), ["A", "B"]))._repr_mimebundle_()
    cell = nbformat.v4.new_code_cell("hover(picture)", outputs=[nbformat.v4.new_output("execute_result", bundle, execution_count=1)])
    page, _ = nbconvert.HTMLExporter(template_name="basic").from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert "data:image/png;base64," in page and "cdn.plot.ly" not in page and "Plotly" not in page


def test_points_can_have_names():
    picture = F.show_disagreement_by_size(torch.tensor([10.0, 20.0, 40.0]), torch.tensor([0.5, 0.6, 0.7]))
    cloud = next(t for t in F.hover(picture, ["a", "b", "c"]).chart["data"] if "opacity" in t.get("marker", {}))
    assert [text.split("<br>")[0] for text in cloud["text"]] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="tips must name each of the 3 points; got 2"):
        F.hover(picture, ["a", "b"])


def test_a_picture_of_scans_has_nothing_to_hover_over():
    for picture in (F.show_notice("Nothing here."), F.filmstrip(torch.randn(3, 8, 8))):
        with pytest.raises(ValueError, match="picture must be a chart with axes"):
            F.hover(picture)


def test_pictures_leave_matplotlib_as_it_was(recwarn):
    import sys
    before = dict(matplotlib.rcParams)
    had = "matplotlib.pyplot" in sys.modules
    for picture in per_case_pictures(case(empty=True)) + other_pictures():
        picture.png(40)
    assert dict(matplotlib.rcParams) == before
    assert had == ("matplotlib.pyplot" in sys.modules)
    assert not [w for w in recwarn if "figures.py" in str(w.filename)]


def test_pictures_do_not_change_their_input():
    c = case(missing=True)
    copies = {n: x.clone() for n, x in c.items()}
    per_case_pictures(c)
    assert all(torch.equal(copies[n], x) for n, x in c.items())


def test_axes_say_their_units():
    for picture in other_pictures():
        for ax in picture.axes:
            if ax.get_xticks().size and not ax.images and ax.axison:
                assert ax.get_ylabel() or ax.get_xlabel() or ax.get_shared_y_axes().get_siblings(ax) != [ax]


def test_each_rater_keeps_colour_line_and_label():
    seen = {(s["color"], str(s["linestyle"])) for s in map(F.rater_style, range(49))}
    assert len(seen) == 49
    c = case(r=3)
    legends = [{t.get_text(): (h.get_color(), h.get_linestyle()) for h, t in zip(p.legends[0].legend_handles, p.legends[0].texts, strict=True)}
               for p in (F.show_raters(c["image"], c["masks"]), F.show_calibration(c["image"], c["masks"], distances(c), distances(c), distances(c)[0], torch.ones(1)))]
    for name in ("rater A", "rater B", "rater C"):
        assert legends[0][name] == legends[1][name]


def luminance(colour: str) -> float:
    return float(np.dot([v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)], (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_ink_can_be_read_on_its_page(theme):
    look = F.theme_of(theme)
    for colour in (look.ink, look.quiet):
        a, b = sorted((luminance(colour), luminance(look.page)))
        assert (b + 0.05) / (a + 0.05) > 4.5


def test_missing_rater_equals_rater_removed():
    c = case(missing=True)
    with_gap = F.show_votes(c["image"], c["masks"], c["present"])
    without = F.show_votes(c["image"], c["masks"][1:])
    assert with_gap.caption == without.caption
    for a, b in zip(with_gap.axes[1:4], without.axes[1:4], strict=True):
        assert np.allclose(a.images[0].get_array(), b.images[0].get_array())


def test_the_legend_says_who_is_absent_and_who_marked_nothing():
    c = case(missing=True)
    c["masks"][1] = 0
    labels = [t.get_text() for t in F.show_raters(c["image"], c["masks"], c["present"]).legends[0].texts]
    assert {"rater A (absent)", "rater B (marked nothing)", "rater C"} < set(labels)


def test_the_window_contains_what_was_marked():
    marked = np.zeros((64, 64), bool)
    marked[1:4, 50:63] = True
    left, right, bottom, top = F._window(marked, 6)
    assert left <= 50 and right >= 62 and top <= 1 and bottom >= 3 and -0.5 <= left and right <= 63.5 and top >= -0.5
    assert right - left >= 23 and bottom - top >= 8
    assert F._window(np.zeros((8, 9), bool), 6) == (-0.5, 8.5, 7.5, -0.5)


def test_a_disc_is_outlined_where_it_ends():
    c = case(r=1)
    paths = [p for coll in F.show_raters(c["image"], c["masks"]).axes[1].collections for p in coll.get_paths()]
    radii = np.hypot(*(np.concatenate([p.vertices for p in paths]) - (15, 16)).T)
    assert abs(radii.mean() - 7) < 0.6


def test_votes_refuse_a_case_that_nobody_saw():
    c = case()
    with pytest.raises(ValueError, match="no rater"):
        F.show_votes(c["image"], c["masks"], torch.zeros(4, dtype=torch.bool))


def test_words_come_from_the_numbers():
    w = torch.tensor([0.7, 0.2, 0.1])
    c = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 1.8], [0.0, 1.8, 2.0]])
    caption = F.show_expertness(w, covariance=c, names=["Ann", "Bob", "Cy"]).caption
    assert "Ann (70\u00a0%)" in caption and "Bob and Cy err together (correlation 0.90)" in caption
    assert "No two raters" in F.show_expertness(w, covariance=torch.eye(3)).caption
    assert "Only by test." in F.show_expertness(w, warnings=["Only by test."]).caption


def test_retention_caption_names_the_law_that_fits():
    a = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    k = a * 2 / (a * 2 + 1 - a)
    caption = F.show_retention(a, {"one call": k, "DDIM": k.sqrt()}, 2.0).caption
    assert "One call follows k to within 0.00" in caption and "DDIM follows √k" in caption
    with pytest.raises(ValueError, match="variance must be positive"):
        F.show_retention(a, {}, 0.0)


@pytest.mark.parametrize("low, high, up, word", [(0.1, 0.2, True, "wins"), (0.1, 0.2, False, "loses"), (-0.2, -0.1, True, "loses"), (-0.1, 0.1, True, "undecided"), (0.0, 0.1, True, "undecided")])
def test_verdict(low, high, up, word):
    assert F.verdict(low, high, up) == word


def test_benchmark_shows_wins_and_losses_by_shape_too():
    d = torch.tensor([0.1, 0.0, -0.1])
    picture = F.show_benchmark(["up", "base", "down"], d + 0.8, d + 0.79, d + 0.81, "base", d, d - 0.01, d + 0.01)
    markers = {line.get_marker() for line in picture.axes[0].get_lines()}
    assert {"^", "v", "D"} <= markers
    assert "Up beats base" in picture.caption and "down falls behind" in picture.caption


def test_nobody_is_believed_most_without_a_lead():
    c = case(r=3)
    even = torch.full((4, 1, SIZE, SIZE), 0.25)
    picture = F.show_attention(c["image"], even, c["masks"])
    assert "trusted alike (25\u00a0% each)" in picture.caption and not picture.axes[4].texts
    even[1] += 0.1
    even[0] -= 0.1
    picture = F.show_attention(c["image"], even, c["masks"])
    assert "most trust goes to rater B" in picture.caption and [t.get_text() for t in picture.axes[4].texts] == ["B"]


def test_filmstrip_keeps_the_ends():
    picture = F.filmstrip(torch.randn(30, 8, 8), [f"{i}" for i in range(30)], most=5)
    titles = [ax.get_title() for ax in picture.axes]
    assert titles[0] == "0" and titles[-1] == "29" and len(titles) == 5


@pytest.mark.parametrize("wrong", ["blue", ""])
def test_unknown_theme(wrong):
    with pytest.raises(ValueError, match="theme must be one of light, dark"):
        F.show_schedule({"a": torch.rand(3)}, theme=wrong)


def test_names_must_fit():
    c = case()
    with pytest.raises(ValueError, match="names must name each of the 4 raters; got 1"):
        F.show_raters(c["image"], c["masks"], names=["A"])


def test_png_is_small_and_keeps_the_raters_colour():
    c = case(r=1)
    data = F.show_raters(c["image"], c["masks"]).png(80)
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1, 3).astype(int)
    gap = np.abs(picture - np.array([round(255 * v) for v in to_rgb(F.RATER_COLOURS[0])])).sum(1).min()
    assert len(data) < 60_000 and gap < 12


def test_without_words_keeps_alt_and_shrinks():
    picture = other_pictures()[1]
    alt, height = picture.alt, picture.get_figheight()
    bare = picture.without_words()
    assert bare.alt == alt and bare.get_figheight() < height and not bare.texts
    bare.png(40)


def test_to_theme_equals_drawing_in_that_theme():
    for changed, drawn in zip(other_pictures("light"), other_pictures("dark"), strict=True):
        a, b = (np.asarray(Image.open(io.BytesIO(p.png(100))).convert("RGB")).astype(int) for p in (changed.to_theme("dark"), drawn))
        assert (np.abs(a - b).sum(-1) > 60).mean() < 0.02, drawn.title_text


FRAMES = [F.show_schedule({"a": torch.linspace(0.9, 0.1, 9)}).png(30) for _ in range(3)]


def test_player_holds_everything():
    page = F.player_html(FRAMES, ["a", "b", "c"], "A walk", "It ends.", first=1)
    assert page.count("data:image/png;base64,") == 3 and "://" not in page
    for word in ('aria-label="A walk: frame"', 'type="range"', 'max="2"', "ArrowRight", "It ends.", "Frame 2 of 3: b"):
        assert word in page


def test_player_escapes_words():
    page = F.player_html(FRAMES[:1], ["</script><b>"], "<i>", "<u>")
    assert "</script><b>" not in page and "<i>" not in page and "<u>" not in page


def test_player_takes_figures():
    assert F.player_html([other_pictures()[0], matplotlib.figure.Figure(figsize=(1, 1))]).count("base64,") == 2


@pytest.mark.parametrize("kw, message", [({"frames": []}, "at least one"), ({"labels": ["a"]}, "labels must name each of the 3"), ({"first": 3}, "first must be a frame from 0 to 2"),
                                         ({"limit": 100}, "use fewer frames"), ({"theme": "x"}, "theme must be")])
def test_player_refuses(kw, message):
    with pytest.raises(ValueError, match=message):
        F.player_html(**({"frames": FRAMES} | kw))


def boards(c: dict, theme: str = "light") -> list[tuple[F.Board, dict]]:
    """The quick pictures of a case, with the numbers behind them."""
    image, masks, present = c["image"], c["masks"], c["present"]
    d, r, k = distances(c), len(masks), masks.shape[1] - 1
    marks, truth, t = masks[:, k], masks[-1, k], torch.tensor([900, 400, 0])
    names, soft = tuple(f"rater {i}" for i in range(r)), masks[:, k].float().mean(0)
    walk = F.Walk(image, torch.stack([d[0]] * 4) / 8, torch.stack([d[0]] * 3) / 8, t, torch.tensor([0.1, 0.5, 0.99]), masks[-1], "known truth", masks[0], 0, torch.tensor([3.0, 2.0, 1.0]))
    curve = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
    view = F.ScheduleView(curve, curve, t, torch.stack([d[0, k]] * 3), d[0, k], torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 5, 10]), torch.rand(3), torch.rand(3))
    room = F.Room(image, marks, present, names, d[:, k], torch.full((r + 1, SIZE, SIZE), 1 / (r + 1)), d[0, k], 0.6, soft, d[0, k], 0.7, truth)
    drawn = F.Drawn(image, torch.cat([marks, marks[-1:]]), torch.cat([present, torch.tensor([True])]), (*names, "you"), d[0, k], soft, d[0, k], (1 / (r + 1),) * (r + 1), truth)
    asked = [(F.show_denoising, F.DenoiseState(frame=2, structure=k), walk), (F.show_denoising, F.DenoiseState(frame=3, structure=k), walk),
             (F.show_opinions, F.ExploreState(), F.Opinions(image, marks, present, names, soft, soft, soft, truth, (1 / r,) * r)), (F.show_opinions, F.ExploreState(), F.Opinions(image, marks, present, names, soft, soft)),
             (F.show_schedule_lab, F.ScheduleState(), view), (F.show_room, F.RoomState(), room), (F.show_drawn, F.DrawState(), drawn),
             (F.show_drawn, F.DrawState(), F.Drawn(image, torch.cat([marks, 0 * marks[-1:]]), torch.cat([present, torch.tensor([False])]), (*names, "you")))]
    return [(show(state, data, theme), data.numbers(state)) for show, state, data in asked]


def test_every_board_of_a_case_can_be_drawn(c):
    for board, numbers in boards(c):
        board.draw_without_rendering()
        assert board.title_text and board.caption in board.alt and all(np.isfinite(v) for v in numbers.values())


def test_boards_know_both_themes():
    for board, _ in boards(case(), "dark"):
        board.draw_without_rendering()
        assert to_hex(board.get_facecolor()) == F.theme_of("dark").page


def test_nothing_on_a_board_is_cut_off():
    for board, _ in boards(case(r=7)):
        board.without_words().png(50)
        width, height = board.get_size_inches() * board.dpi
        for text in board.findobj(matplotlib.text.Text):
            box = text.get_window_extent()
            if text.get_visible() and text.get_text().strip() and text.axes is board.axes[0]:
                assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, (board.title_text, text.get_text())


def test_words_go_and_the_drawing_stays():
    with_words, without = boards(case())[0][0], boards(case())[0][0].without_words()
    top, bottom = np.asarray(Image.open(io.BytesIO(with_words.png(50)))).shape, np.asarray(Image.open(io.BytesIO(without.png(50)))).shape
    assert bottom[0] < top[0] and bottom[1] == top[1] and bottom[0] == round(with_words.body[1] * 50)


def test_a_walk_refuses_a_frame_beyond_its_end():
    c = case()
    walk = F.Walk(c["image"], torch.zeros(2, 1, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE), torch.tensor([9]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"frame must lie in 0..1 for a walk of 1 steps; got 2"):
        F.show_denoising(F.DenoiseState(frame=2), walk)


def test_numbers_are_those_of_the_masks():
    image, a, b = torch.rand(1, SIZE, SIZE), disc(8), disc(6)
    opinions = F.Opinions(image, torch.stack([a, b]), torch.ones(2, dtype=torch.bool), ("A", "B"), (a + b) / 2, b.float(), None, b)
    numbers = opinions.numbers(F.ExploreState(threshold=0.5))
    assert numbers["majority"] == 1.0 and numbers["STAPLE"] == 1.0            # only B's disc has more than half of the votes
    assert abs(numbers["vote ≥ 50%"] - 2 * float(b.sum()) / float(a.sum() + b.sum())) < 1e-6   # a tie counts here
    assert abs(numbers["disputed"] - float((a != b).sum() / a.sum())) < 1e-6


def test_a_drawing_can_be_taken_back():
    state = F.DrawState(case=2).with_mask(bytes([1, 0]))
    assert state.mask == bytes([1, 0]) and F.DrawState(case=1, drawings=state.drawings).mask == b""
    assert state.with_mask(bytes(2)).drawings == ()


def test_others_are_hidden_until_you_have_drawn():
    shown, numbers = boards(case())[-1]
    assert not shown.legends and list(numbers) == ["your area (px)"] and "Nothing drawn yet" in shown.alt


def test_a_player_with_sets_and_sentences():
    page = F.player_html({"one": FRAMES, "two": FRAMES}, captions={"one": ["a", "b", "c"], "two": ["d", "e", "f"]})
    assert page.count("data:image/png;base64,") == 6 and '<option value="two">' in page and "<p aria-live" in page   # the first frame stands once
    with pytest.raises(ValueError, match="captions must hold a sentence for each of the 3 frames of 2 set"):
        F.player_html({"one": FRAMES, "two": FRAMES}, captions={"one": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="labels must name each of the 3 frames"):
        F.player_html({"one": FRAMES, "two": FRAMES[:2]})


def test_webp_is_smaller_and_is_known_for_what_it_is():
    picture = boards(case())[0][0].without_words()
    assert len(picture.webp(80, 30)) < len(picture.webp(80, 90)) and len(picture.png(80)) < len(picture.png(80, None))
    assert F.data_uri(picture.webp(80)).startswith("data:image/webp")


def test_house_colours_survive_in_stored_pictures():
    stored = np.asarray(Image.open(io.BytesIO(F.show_raters(**{k: v for k, v in case(r=4).items()})._repr_png_())).convert("RGB")).reshape(-1, 3)
    for r in range(4):
        assert (stored == [round(255 * v) for v in to_rgb(F.RATER_COLOURS[r])]).all(1).sum() > 10


@pytest.mark.parametrize("theme", F.THEMES)
@pytest.mark.parametrize("r", [1, 4, 8])
def test_numbers_of_expertness_stand_clear_of_each_other(r, theme):
    g = torch.Generator().manual_seed(r)
    w, a = torch.rand(r, generator=g), 3 * torch.randn(r, r, generator=g)
    picture = F.show_expertness(w / w.sum(), covariance=a @ a.T, names=[f"radiologist {i}" for i in range(r)], theme=theme)
    picture.draw_without_rendering()
    boxes = [text.get_window_extent() for text in picture.axes[1].texts]
    assert len(boxes) == r * r
    assert not any(p.overlaps(q) for i, p in enumerate(boxes) for q in boxes[:i])
    if r > 4:                                                              # the names stand once, and each bar beside its row of the matrix
        rows = [text.get_window_extent().y0 + text.get_window_extent().height / 2 for text in picture.axes[1].texts[::r]]
        bars = [bar.get_window_extent().y0 + bar.get_window_extent().height / 2 for bar in picture.axes[0].patches]
        assert np.allclose(rows, bars, atol=3)


def test_the_expertness_of_one_rater_says_nothing_of_pairs():
    assert "together" not in F.show_expertness(torch.ones(1), covariance=torch.ones(1, 1)).caption


def histories(stages: int = 2, **signs) -> dict:
    """As `CaliDiff.fit` hands them over after some stages, all healthy unless told otherwise."""
    healthy = {"collapse": 0.9, "spread": 0.4, "outside": 0.0, "gap": 0.1, "drift": 0.05, "empty drawn": 0.1, "empty concluded": 0.12, "recognised drawn": 0.7, "recognised normalised": 0.4} | signs
    losses = {name: History({"loss": torch.linspace(3, 1, 40).tolist()}) for name in ("image", "joint", "committee 1", "committee 2")[: stages + 1]}
    return losses | {"monitors": History({name: [value] * stages for name, value in healthy.items()})}


@pytest.mark.parametrize("theme", F.THEMES)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_monitors_have_a_panel_each_and_a_sentence_each(stages, theme, recwarn):
    picture = F.show_monitors(histories(stages), 4, theme=theme)
    picture.png(40)
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in picture.axes if ax.axison]
    assert titles[: len(F.SIGNS)] == [sign.says for sign in F.SIGNS]
    assert len(titles) == len(F.SIGNS) + stages + 1 and "joint" in titles[len(F.SIGNS) + 1]
    assert picture.caption == f"After {stages} stage{'s' if stages > 1 else ''} all 7 signs are healthy."
    assert not recwarn.list


@pytest.mark.parametrize("name,value,word", [("collapse", 0.3, "collapse"), ("spread", 1.4, "spread"), ("spread", 0.0, "spread"), ("outside", 0.2, "outside"), ("gap", -0.5, "gap"), ("drift", 0.4, "drift"),
                                             ("empty concluded", 0.9, "empty"), ("recognised normalised", 0.8, "recognised")])
def test_an_unhealthy_sign_is_named_and_crossed(name, value, word):
    picture = F.show_monitors(histories(**{name: value}), 4)
    assert f"look at {word} ({value:.2g}); 6 of 7" in picture.caption
    crossed = [ax.get_title(loc="left") for ax in picture.axes for line in ax.get_lines() if line.get_marker() == "X"]
    assert len(crossed) == 1 and crossed[0].replace("\n", " ") == next(s.says for s in F.SIGNS if s.name == word)


def test_monitors_before_the_first_stage_of_one_rater_and_without_measurements():
    assert "No stage is finished" in F.show_monitors({}).alt and "No stage is finished" in F.show_monitors({"monitors": History()}).alt
    alone = histories(1, spread=torch.nan)
    for key in ("recognised drawn", "recognised normalised"):
        del alone["monitors"].values[key]
    picture = F.show_monitors(alone, 1)                                    # one rater has no spread, and nobody to be told from
    assert "all 5 signs" in picture.caption and picture.png(40)
    unwatched = {"joint": History({"loss": [2.0, torch.nan, 1.0]}, stopped="stopped by hand"), "committee 1": History(), "monitors": History()}
    picture = F.show_monitors(unwatched)
    assert "were not measured" in picture.caption and "stopped by hand" in picture.axes[0].get_title(loc="left") and picture.png(40)


def test_words_of_a_board_are_laid_down_again_as_they_were():
    """The canvas that keeps words draws what matplotlib's own draws."""
    board = boards(case())[0][0]
    softly = lambda: np.asarray(board._pixels(100).filter(ImageFilter.BoxBlur(2)), dtype=float)   # a letter may lie less than a pixel beside itself
    kept, sharp = softly(), np.asarray(board._pixels(100), dtype=float)
    board._canvas = lambda: F.FigureCanvasAgg(board)
    plain, sharp_plain = softly(), np.asarray(board._pixels(100), dtype=float)
    for text in board.findobj(Text): text.set_visible(False)
    bare = softly()
    assert kept.shape == plain.shape and np.abs(kept - plain).mean() < 0.15 * np.abs(bare - plain).mean()
    assert (np.abs(sharp - sharp_plain).max(-1) > 0).mean() < 0.05 and F._word.cache_info().currsize > 0
