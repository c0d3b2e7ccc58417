"""Every control moves state, picture and numbers, without a browser; every widget lives with any cohort, and says what is missing."""
import dataclasses
import inspect
import re
import sys

import ipywidgets as W
import pytest
import torch

from calidiff_nb.calidiff.model import CaliDiff, CaliDiffConfig, judge_strangers
from calidiff_nb.explore import widgets as X
from calidiff_nb.explore.figures import DenoiseState, DrawState, ExploreState, RoomState, ScheduleState
from calidiff_nb.raters.cases import Cohort
from calidiff_nb.raters.distance import signed_distance
from calidiff_nb.raters.simulate import make_cohort

KINDS = {"DenoisePlayer": DenoiseState(frame=2, steps=5), "RaterExplorer": ExploreState(case=1), "ScheduleLab": ScheduleState(case=1), "CommitteeRoom": RoomState(case=1),
         "DrawAsRater": DrawState(case=1)}


@pytest.fixture(scope="module")
def model():
    return CaliDiff.from_pretrained("simulated-64")


@pytest.fixture(scope="module")
def cohort():
    return make_cohort("together", 8, seed=3)


def make(kind: str, cohort, model, **changes):
    state = dataclasses.replace(KINDS[kind], **changes)
    return X.ScheduleLab(cohort, state) if kind == "ScheduleLab" else getattr(X, kind)(cohort, model, state)


def begin(kind: str, cohort) -> dict:
    """A start from which every control has something to change."""
    if kind == "DenoisePlayer":
        return {"start": cohort.rater_names[-1], "token": cohort.rater_names[0], "frame": 3, "case": 2}
    if kind == "DrawAsRater":
        return {"drawings": tuple((i, cohort.truth[i, 0].numpy().tobytes()) for i in range(len(cohort)))}
    return {}


def another(control):
    """Some other value that a control can take."""
    if isinstance(control, W.Checkbox):
        return not control.value
    if hasattr(control, "options"):
        values = [o[1] if isinstance(o, tuple) else o for o in control.options]
        return next(v for v in values[::-1] if v != control.value)
    if isinstance(control, W.FloatLogSlider):
        return control.base**control.max
    return control.max if control.value != control.max else control.min


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_changes_state_picture_and_numbers(kind, cohort, model):
    widget = make(kind, cohort, model, **begin(kind, cohort))
    assert isinstance(widget.view, W.VBox) and widget._controls
    start = widget.state
    for name, control in widget._controls.items():
        widget.set(**{f.name: getattr(start, f.name) for f in dataclasses.fields(start)})
        state, picture, words, numbers = widget.state, bytes(widget._screen.png), widget._words.value, widget.numbers
        control.value = another(control)
        assert widget.state != state, f"{kind}: {name} leaves the state as it was"
        assert bytes(widget._screen.png) != picture, f"{kind}: {name} leaves the picture as it was"
        assert widget.numbers != numbers or kind == "ScheduleLab" and name == "seed", f"{kind}: {name} leaves the numbers as they were"
        assert widget._words.value != words or name in ("align", "consensus", "adversary", "seed"), f"{kind}: {name} leaves the words as they were"


@pytest.mark.parametrize("kind", KINDS)
def test_controls_follow_the_state(kind, cohort, model):
    widget = make(kind, cohort, model)
    widget.view  # noqa: B018  built when first asked for
    widget.step(2)
    assert widget._controls[widget.along].value == getattr(widget.state, widget.along)
    widget._screen.turns = [1, -1]                                        # the left arrow key on the picture
    assert widget._controls[widget.along].value == getattr(widget.state, widget.along)


@pytest.mark.parametrize("kind", KINDS)
def test_arrow_keys_stop_at_both_ends(kind, cohort, model):
    widget = make(kind, cohort, model)
    low, high = widget.span()
    assert getattr(widget.step(-9999).state, widget.along) == low
    assert getattr(widget.step(9999).state, widget.along) == high > low


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_frozen_and_knows_its_fields(kind, cohort, model):
    widget = make(kind, cohort, model)
    with pytest.raises(dataclasses.FrozenInstanceError):
        widget.state.case = 1
    with pytest.raises(TypeError):
        widget.set(no_such_field=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_state_gives_the_same_picture(kind, cohort, model):
    assert make(kind, cohort, model).figure().png(40) == make(kind, cohort, model).figure().png(40)


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_needs_no_kernel_no_network_and_no_ipywidgets(kind, cohort, model, monkeypatch):
    for name in ("ipywidgets", "anywidget"):
        monkeypatch.setitem(sys.modules, name, None)
    widget = make(kind, cohort, model)
    page = widget._repr_mimebundle_()["text/html"]                        # what a stored notebook holds
    assert len(page) < 1_000_000 and "://" not in page and page.count("data:image/webp") > 4
    with pytest.raises(ImportError, match=r'pip install "calidiff_nb\[widgets\]"'):
        widget.view  # noqa: B018


def test_a_live_notebook_gets_the_controls(cohort, model, monkeypatch):
    monkeypatch.delenv("CALIDIFF_FAST", raising=False)
    assert "application/vnd.jupyter.widget-view+json" in make("ScheduleLab", cohort, model)._repr_mimebundle_()


@pytest.mark.parametrize("kind", KINDS)
def test_any_front_end_can_show_it(kind, cohort, model):
    """Only ipywidgets' own models and anywidget, which JupyterLab, Notebook 7, VS Code, Colab and Voilà all know; and no code from elsewhere."""
    widget = make(kind, cohort, model)
    parts, queue = [], [widget.view]
    while queue:
        part = queue.pop()
        parts.append(part)
        queue += getattr(part, "children", ())
    assert {p._model_module for p in parts} <= {"@jupyter-widgets/base", "@jupyter-widgets/controls", "anywidget"} and len(parts) > 4
    for part in parts:
        if part._model_module == "anywidget":
            assert not re.search(r"https?:|\bimport\b|\bfetch\b|\brequire\b", part._esm.replace("http://www.w3.org", ""))


@pytest.mark.parametrize("kind", KINDS)
def test_controls_are_few_lines_over_a_figure(kind):
    """What is not a picture and not a rule stays small: the controls of each widget."""
    parts = [getattr(X, kind).__dict__.get(name) for name in ("controls", "rows", "surfaces", "tune")]
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts if part is not None) <= 60


@pytest.mark.parametrize("kind", KINDS)
def test_controls_say_what_they_are(kind, cohort, model):
    """A label on each control, a hint on the picture, a text for who does not see it."""
    widget = make(kind, cohort, model)
    widget.view  # noqa: B018
    assert all(control.description.strip() for control in widget._controls.values())
    assert widget._screen.alt and "arrow keys" in widget._screen.hint and 'role="status"' in widget._words.value


# any cohort


def bare(masks: torch.Tensor, present: torch.Tensor | None = None) -> Cohort:
    """A cohort of nobody in particular, without a truth."""
    b, r, k, h, w = masks.shape
    present = torch.ones(b, r, dtype=torch.bool) if present is None else present
    ids = tuple(f"c{i}" for i in range(b))
    return Cohort(torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(0)), masks, present, ids, ids, torch.ones(b, 2), tuple(f"r{i}" for i in range(r)))


def shapes() -> dict[str, Cohort]:
    one = make_cohort("together", 4, seed=1)
    absent = make_cohort("missing60", 5, seed=2)
    nobody = dataclasses.replace(absent, masks=absent.masks * (torch.arange(5) > 0)[:, None, None, None, None].to(torch.uint8), present=absent.present & (torch.arange(5) > 0)[:, None])
    gone = dataclasses.replace(one, masks=one.masks * torch.tensor([1, 1, 1, 0], dtype=torch.uint8)[None, :, None, None, None], present=one.present & torch.tensor([True, True, True, False]))
    return {"empty": bare(torch.zeros(3, 3, 1, 64, 64, dtype=torch.uint8)), "one rater": bare(one.masks[:, 2:3]), "seven raters": make_cohort("seven", 4, seed=1), "missing raters": absent,
            "a case of nobody": nobody, "a rater of no case": gone, "slots, not persons": one.shuffle_slots(torch.Generator().manual_seed(0)), "no truth": bare(one.masks), "not a multiple of eight": bare(one.masks[..., :61, :52].clone())}


@pytest.mark.parametrize("shape", shapes())
@pytest.mark.parametrize("kind", KINDS)
def test_any_cohort(kind, shape, model):
    cohort = shapes()[shape]
    widget = make(kind, cohort, model, case=0)
    for case in (0, len(cohort) - 1):
        widget.set(case=case)
        assert widget.figure().png(40)[:4] == b"\x89PNG"
        assert all(v == v for v in widget.numbers.values())
    if kind == "DrawAsRater":
        mask = torch.zeros(cohort.size, dtype=torch.uint8)
        mask[20:40, 22:36] = 1
        assert "your weight" in widget.sketch(mask).numbers


def test_two_structures():
    cohort = make_cohort("two_structures", 6, seed=1)
    model = CaliDiff.for_cohort(cohort, CaliDiffConfig(widths=(8, 8, 8), joint_steps=2, committee_steps=0, steps=2, draws=1, batch=2))
    model.fit(cohort, cohort, progress=False)
    for kind in KINDS:
        widget = make(kind, cohort, model, structure=1, **({"drawings": ((1, cohort.truth[1, 1].numpy().tobytes()),)} if kind == "DrawAsRater" else {}))
        first = widget.set(structure=0).figure().png(40)
        assert widget.set(structure=1).figure().png(40) != first, kind


# what comes out is what the library says


def test_the_table_is_the_one_of_calibrate(cohort, model):
    bench = X.ask(model, cohort)
    here = X.deliberate(bench, 2, bench.S[2:3], cohort.present[2:3], model.expertness, walk=(model.config.steps, model.config.draws))
    there = model.calibrate(cohort.subset([2]))
    for name in ("pseudo_truth", "attention", "normalised", "aligned", "consensus", "pseudo_sd"):
        assert (here[name] - getattr(there, name)).abs().max() < 1e-3, name


def test_strangers_are_judged_as_by_calibrate(cohort, model):
    other = dataclasses.replace(cohort, rater_names=("a", "b", "c", "d"))
    bench = X.ask(model, other)
    (who, habit), (same, same_habit) = X.weigh(bench, other, bench.S), judge_strangers(model, other)
    assert (who.weights - same.weights).abs().max() < 1e-3 and (habit - same_habit).abs().max() < 1e-3
    here = X.deliberate(bench, 0, bench.S[:1], other.present[:1], who, habit, walk=None)
    assert (here["pseudo_truth"] - model.calibrate(other).pseudo_truth[:1]).abs().max() < 1e-3


def test_a_bias_is_that_many_pixels_for_that_rater_alone(cohort):
    moved, kept = X.heard(cohort, (0.0, 2.0, 0.0, 0.0), ())
    assert kept == (0, 1, 2, 3) and all(moved.masks[:, r].equal(cohort.masks[:, r]) for r in (0, 2, 3))
    S, T = signed_distance(cohort.masks[:, 1]), signed_distance(moved.masks[:, 1])
    near = S.abs() < 3
    assert abs((S - T)[near].mean() - 2) < 0.25


def test_a_hidden_rater_equals_that_rater_removed(cohort, model):
    hidden = X.RaterExplorer(cohort, model, ExploreState(case=1, hidden=(3,)))
    removed = X.RaterExplorer(cohort.without_rater(3), model, ExploreState(case=1))
    a, b = hidden.numbers, removed.numbers
    assert a.keys() == b.keys() and all(abs(a[n] - b[n]) < 1e-4 for n in a)
    assert hidden.data().trust[3] == 0 and "Nobody is heard" in hidden.set(hidden=(0, 1, 2, 3)).figure().alt


def test_a_silenced_rater_does_not_speak(cohort, model):
    room = X.CommitteeRoom(cohort, model)
    sure = room.numbers["sd (px)"]
    quiet = room.set(silenced=(2,))
    assert quiet.numbers["sd (px)"] > sure and float(quiet.data().attention[2].max()) == 0
    alone = room.set(silenced=(0, 1, 2, 3))
    assert alone.numbers["weight of the image"] == pytest.approx(1) and "the image decides alone" in alone.figure().alt


def test_who_is_believed_more_weighs_more(cohort, model):
    weights = X.lean(model.expertness, (1.0, 1.0, 1.0, 8.0), torch.ones(4, dtype=torch.bool)).weights[:, 0]
    assert weights[3] > model.expertness.weights[3, 0] and weights.sum() == pytest.approx(1)
    assert X.lean(model.expertness, (), torch.ones(4, dtype=torch.bool)) is model.expertness
    for wrong in ((1.0,), (1.0, 0.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="trust must hold one positive factor for each of the 4 raters"):
            X.lean(model.expertness, wrong, torch.ones(4, dtype=torch.bool))


def test_the_critic_moves_the_conclusion_by_one_sd_at_most(cohort, model):
    bench = X.ask(model, cohort)
    off, on = (X.deliberate(bench, 0, bench.S[:1], cohort.present[:1], model.expertness, None, RoomState(adversary=a), None) for a in (False, True))
    moved = (on["fused"] - off["fused"]).abs().max()
    assert 0 < moved <= off["pseudo_sd"].max() + 1e-4 and all(p.grad is None for p in model.critic.parameters())


def test_the_exact_denoiser_ends_at_a_rater(cohort):
    player = X.DenoisePlayer(cohort, None, DenoiseState(case=2, steps=20))
    assert player.state.denoiser == "exact"
    end = player.set(frame=20).data().states[-1, 0] < 0
    assert min(int((end != (m > 0)).sum()) for m in cohort.masks[2, :, 0]) == 0


@pytest.mark.parametrize("sampler", X.SAMPLERS)
def test_every_sampler_walks(sampler, cohort, model):
    walk = X.DenoisePlayer(cohort, model, DenoiseState(sampler=sampler, steps=4)).data()
    assert len(walk.states) == 5 and walk.states.isfinite().all() and walk.timesteps[0] == 999


def test_a_walk_from_a_mask_begins_near_it(cohort, model):
    player = X.DenoisePlayer(cohort, model, DenoiseState(start="careless", level=60, steps=3, token="anybody"))
    assert player.data().timesteps[0] == 60 and player.data().begun.equal(cohort.masks[0, 3])
    assert player.set(start="nobody of that name").state.start == "noise"


def test_a_weaker_signal_is_the_methods_schedule(model):
    bent = X.bend("cosine", model.config.signal, 1.0).alphas_cumprod
    assert (bent - model.schedule.alphas_cumprod).abs().max() < 1e-6
    for wrong in (("square", 1.0, 1.0), ("cosine", 0.0, 1.0), ("cosine", 1.0, -1.0)):
        with pytest.raises(ValueError, match="must be"):
            X.bend(*wrong)


def test_cases_are_sorted_by_disagreement(cohort):
    most = X.in_order(cohort, "most disputed first")
    assert sorted(most) == list(range(8)) and X.in_order(cohort, "least disputed first")[0] == most[-1]
    assert X.in_order(cohort, "as stored") == list(range(8))


def test_a_drawing_comes_from_the_canvas_as_bytes(cohort, model):
    artist = X.DrawAsRater(cohort, model)
    artist.view  # noqa: B018
    before = bytes(artist._screen.png)
    artist._canvas.set_state({"mask": memoryview(cohort.truth[0, 0].numpy().tobytes())})   # as the browser sends it
    assert artist.state.mask == cohort.truth[0, 0].numpy().tobytes() and bytes(artist._screen.png) != before
    assert artist.numbers["you and the truth"] == 1.0
    artist.set(case=1)
    assert artist._canvas.mask == b"" and artist.set(case=0)._canvas.mask == cohort.truth[0, 0].numpy().tobytes()
    with pytest.raises(ValueError, match="one byte for each of 64×64 pixels; got 3"):
        X.DrawAsRater(cohort, model, DrawState(drawings=((0, b"\x01\x00\x01"),))).figure()


def test_you_are_weighed_as_a_stranger(cohort, model):
    drawings = {i: cohort.truth[i] for i in range(8)}
    both = X.with_you(cohort, drawings)
    who, _ = judge_strangers(model, both)
    artist = X.DrawAsRater(cohort, model, DrawState(drawings=tuple((i, m[0].numpy().tobytes()) for i, m in drawings.items())))
    assert artist.numbers["your weight"] == pytest.approx(float(who.weights[-1, 0]), abs=1e-3)
    assert both.rater_names[-1] == "you" and X.with_you(both, {}).rater_names[-1] == "you there"


# what is missing


def test_without_weights_it_says_which_there_are(cohort):
    for kind in ("DenoisePlayer", "RaterExplorer", "CommitteeRoom", "DrawAsRater"):
        widget = make(kind, cohort, "no-such-weights")
        assert "simulated-64" in widget.notes[0] and widget.view and "simulated-64" in widget._words.value
    assert "simulated-64" in make("CommitteeRoom", cohort, "no-such-weights").figure().alt


@pytest.mark.parametrize("kind", KINDS)
def test_without_data_it_says_what_to_give(kind, tmp_path):
    widget = make(kind, str(tmp_path / "none"), None)
    assert "There is no data set at" in widget.figure().alt and "together" in widget.figure().alt
    assert widget.numbers == {} and widget.view and widget.to_html() and widget.step(1)


def test_sources(cohort, model, tmp_path):
    assert X.find_cases(cohort)[0] is cohort and len(X.find_cases("seven", 3)[0]) == 3
    (tmp_path / "notes.txt").write_text("no masks here")
    assert X.find_cases(tmp_path)[0] is None and "cannot be read" in X.find_cases(tmp_path)[1]
    assert X.find_model(model, cohort)[0] is model and X.find_model(None)[0] is None
    assert "untrained" in X.find_model(CaliDiff.for_cohort(cohort), cohort)[1]
    assert "structures" in X.find_model(model, make_cohort("two_structures", 2))[1]


# nothing is asked twice


def calls_of(monkeypatch, *names) -> dict[str, int]:
    """Count how often functions of the module are called."""
    counted = dict.fromkeys(names, 0)

    def counting(name, function):
        def counter(*args, **keywords):
            counted[name] += 1
            return function(*args, **keywords)
        return counter

    for name in names:
        monkeypatch.setattr(X, name, counting(name, getattr(X, name)))
    return counted


def test_moving_through_a_walk_calls_the_network_no_more(cohort, model, monkeypatch):
    counted = calls_of(monkeypatch, "sample", "walk_back")
    player = make("DenoisePlayer", cohort, model, denoiser="learned", steps=6)
    assert player.view and counted["sample"] == 1
    for frame in (0, 3, 6, 2):
        player.set(frame=frame)
    assert counted == {"sample": 1, "walk_back": 1}
    player.set(seed=1)
    assert counted["sample"] == 2                                          # another noise is another walk
    player.set(seed=0)
    assert counted["sample"] == 2                                          # and the first one is remembered


def test_an_image_is_encoded_once(cohort, model, monkeypatch):
    player = make("DenoisePlayer", cohort, model, denoiser="learned", steps=2)
    seen, encode = [], model.net.encode
    monkeypatch.setattr(model.net, "encode", lambda images: seen.append(len(images)) or encode(images))
    for changes in ({"seed": 1}, {"sampler": "DDPM"}, {"token": "consensus"}, {"steps": 3}):
        player.set(**changes).figure()
    assert seen == [1]


def test_walking_through_cases_judges_nobody_anew(cohort, model, monkeypatch):
    explorer = make("RaterExplorer", cohort, model, bias=(2.5, 0.0, 0.0, 0.0))
    counted = calls_of(monkeypatch, "staple", "weigh", "in_order")
    for changes in ({"case": 0}, {"case": 3}, {"order": "most disputed first"}, {"threshold": 0.8}):
        explorer.set(**changes).figure()
    assert counted["staple"] == counted["weigh"] == 1                      # all judged over all cases, once
    explorer.set(bias=(-2.5, 0.0, 0.0, 0.0)).figure()
    assert counted["staple"] == counted["weigh"] == 2


def test_a_bench_has_asked_everything(cohort, model, monkeypatch):
    bench = X.ask(model, cohort)
    fresh = {case: X.expected(model, model.net.encode(cohort.images[case : case + 1]), cohort.size, model.raters, True) for case in (0, 5)}
    monkeypatch.setattr(X, "expected", None)
    monkeypatch.setattr(model.net, "encode", None)
    for case, (Q, _, there) in fresh.items():
        assert len(bench.features(case)) and torch.allclose(bench.asked(case, True)[0], Q, atol=1e-3) and torch.allclose(bench.asked(case, True)[1], there.sigmoid().mean(1), atol=1e-4)


def test_a_long_walk_says_at_once_that_it_works(cohort, model):
    player = make("DenoisePlayer", cohort, model, denoiser="learned", steps=3)
    said = []
    player.view  # noqa: B018
    player._words.observe(lambda change: said.append(change["new"]), "value")
    player.set(steps=20)
    assert "Working" in said[0] and "Working" not in said[-1]
    player.set(steps=3, seed=4)
    player.set(steps=20, seed=0)                                           # is remembered
    assert sum("Working" in words for words in said) == 1


def test_swift_leaves_all_as_it_was_even_after_an_error():
    import gc

    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), X.swift():
        assert torch.get_num_threads() == 1 and not gc.isenabled()
        1 / 0
    assert torch.get_num_threads() == threads and gc.isenabled()


# a training


@pytest.fixture(scope="module")
def trained():
    """A board that watched a tiny training, and what it was told."""
    learn, judge = make_cohort("together", 20, 32, seed=1).split((0.6, 0.4))
    board, told = X.TrainingBoard(4), []
    plan = CaliDiffConfig(widths=(8, 8, 8), image_steps=3, joint_steps=4, committee_steps=4, batch=4)
    board.view  # noqa: B018

    def on_stage(histories):
        board.on_stage(histories)
        told.append((board.state.after, bytes(board._screen.png), board._words.value))

    return board, CaliDiff.for_cohort(learn, plan).fit(learn, judge, progress=False, on_stage=on_stage), told


def test_a_training_is_watched_live(trained):
    board, histories, told = trained
    assert [after for after, _, _ in told] == [1, 2, 3, 4] == list(range(1, board.span()[1] + 1))
    assert len({png for _, png, _ in told}) == 4 and "After 2 stages" in told[1][2]
    assert board.numbers == {name: values[-1] for name, values in histories["monitors"].values.items()}
    assert board._controls["after"].max == 4 and not board._controls["after"].disabled


def test_a_board_looks_back(trained):
    board, histories, _ = trained
    early = X.until(board.histories, X.TrainingState(1))
    assert set(early) == {"image", "joint", "monitors"} and all(len(v) == 1 for v in early["monitors"].values.values())
    assert early["joint"].values["loss"] == histories["joint"].values["loss"]
    assert set(X.until(board.histories, X.TrainingState(2, "losses"))) == {"image", "joint", "inference"}
    assert set(X.until(board.histories, X.TrainingState(2, "signs"))) == {"monitors"}
    board._controls["after"].value = 1
    assert board.state.after == 1 and "After 1 stage" in board._words.value
    board._controls["show"].value = "losses"
    assert board.state.show == "losses" and "were not measured" not in board._words.value
    assert board.set(after=99, show="everything").state.after == 4


def test_a_board_keeps_what_it_was_told(trained):
    board, histories, _ = trained
    before = dict(board.numbers)
    histories["monitors"].values["collapse"].append(0.0)                   # fit goes on writing to its own
    assert board.numbers == before
    histories["monitors"].values["collapse"].pop()


def test_a_board_before_the_first_stage(monkeypatch):
    board = X.TrainingBoard()
    assert "No stage is finished" in board.figure().alt and board.numbers == {} and board.span() == (0, 0) and board.step(1).state.after == 0
    assert board.view and board._controls["after"].disabled
    assert "image/webp" in board.to_html()
    with pytest.raises(ValueError, match="everything, signs, losses"):
        board.set(show="nothing")
    with pytest.raises(TypeError):
        board.set(no_such_field=1)


def test_a_board_of_a_training_without_signs():
    board = X.TrainingBoard()
    board.on_stage({"monitors": X.History(), "image": X.History({"loss": [1.0]}), "joint": X.History({"loss": [2.0, 1.0]})})
    assert board.state.after == 1 and board.numbers == {} and "were not measured" in board.figure().caption


def test_the_twin_of_a_board(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    page = trained[0].to_html()
    assert page.count("image/webp") == 4 and "://" not in page and len(page) < 300_000
    parts = [X.TrainingBoard.__dict__.get(name) for name in ("controls", "tune")]
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts) <= 60
