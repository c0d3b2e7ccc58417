"""Every control moves state and picture, without a browser; every widget says what is missing."""
import dataclasses

import ipywidgets as W
import pytest

from calidiff_nb.calidiff.model import CaliDiff
from calidiff_nb.explore.widgets import (
    CommitteeRoom,
    DenoisePlayer,
    DrawAsRater,
    RaterExplorer,
    ScheduleLab,
)
from calidiff_nb.raters.simulate import make_cohort


@pytest.fixture(scope="module")
def model():
    return CaliDiff.from_pretrained("simulated-64")


@pytest.fixture(scope="module")
def cohort():
    return make_cohort("together", 12, seed=3)


@pytest.fixture(params=[DenoisePlayer, RaterExplorer, ScheduleLab, CommitteeRoom, DrawAsRater], ids=lambda k: k.__name__)
def widget(request, cohort, model):
    kind = request.param
    made = kind(cohort) if kind is ScheduleLab else kind(cohort, model)
    made.view  # noqa: B018  built when first asked for
    return made


def another(control):
    """Some other value that this control can take."""
    if isinstance(control, W.Checkbox) or isinstance(control.value, bool):
        return not control.value
    if hasattr(control, "options"):
        values = [o[1] if isinstance(o, tuple) else o for o in control.options]
        return next((v for v in values if v != control.value), control.value)
    low, high = getattr(control, "min", None), getattr(control, "max", None)
    if low is not None and high is not None:
        return type(control.value)(high if control.value != high else low)
    return control.value


def test_every_control_moves_the_state_and_is_drawn(widget):
    moved = drawn = 0
    for name, control in widget._controls.items():
        if hasattr(control, "on_click"):
            continue
        value = another(control)
        if value == control.value:
            continue
        before, picture, words = widget.state, bytes(widget._screen.png), widget._words.value
        control.value = value
        assert widget.state != before, f"{name} changes nothing in the state"
        moved, drawn = moved + 1, drawn + (bytes(widget._screen.png) != picture or widget._words.value != words)
    assert moved >= (1 if isinstance(widget, DrawAsRater) else 3) and drawn >= moved // 2


def test_arrow_keys_walk(widget):
    before, (low, high) = widget.state, widget.span()
    assert high > low
    widget.step(1)
    widget.step(-1) if getattr(before, widget.along) == high else None
    assert getattr(widget.state, widget.along) != getattr(before, widget.along) or getattr(before, widget.along) in (low, high)


def test_a_state_is_frozen_and_numbers_are_finite(widget):
    assert dataclasses.is_dataclass(widget.state)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(widget.state, dataclasses.fields(widget.state)[0].name, 0)
    with pytest.raises(TypeError):
        widget.set(no_such_field=1)
    assert widget.numbers and all(v == v for v in widget.numbers.values())


def test_the_twin_needs_no_kernel_and_no_network(widget):
    page = widget.to_html()
    assert len(page) < 1_000_000 and "http" not in page and "<script" in page and page.count("data:image/webp") > 3


def test_the_picture_can_be_saved(widget):
    assert widget.figure().png().startswith(b"\x89PNG")


def test_silencing_the_best_member_costs_certainty(cohort, model):
    room = CommitteeRoom(cohort, model)
    before = room.numbers["sd (px)"]
    assert room.set(silenced=(2,)).numbers["sd (px)"] > before


def test_a_drawing_becomes_a_rater(cohort, model):
    artist = DrawAsRater(cohort, model)
    for i in range(len(cohort)):
        artist.set(case=i).sketch(cohort.truth[i, 0])
    assert artist.set(case=0).numbers["your weight"] > 0.2


def test_without_weights_it_says_what_to_do(cohort):
    player = DenoisePlayer(cohort, None)
    assert player.figure().png().startswith(b"\x89PNG")
