"""The app without a browser: what it types, reads, stops, keeps and saves; and a server that lets in only who knows the token."""
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calidiff_nb.calidiff.adversary import entropy
from calidiff_nb.calidiff.many import calibrate_many, segment_many
from calidiff_nb.calidiff.model import CaliDiff
from calidiff_nb.explore import app as the_app
from calidiff_nb.explore.app import (
    STARTED,
    App,
    AppState,
    Job,
    ResultExplorer,
    ResultState,
    Seen,
    correct,
    expertness_table,
    first_answer,
    follow,
    known_models,
    list_places,
    look_at,
    open_results,
    page_notebook,
    progress_sentence,
    results_place,
    save_results,
    serve_app,
    words_for,
    write_server,
)
from calidiff_nb.explore.cli import main
from calidiff_nb.raters.folders import save_cohort
from calidiff_nb.raters.simulate import make_cohort


def write_folder(root: Path, cohort, raters) -> Path:
    """images/NAME.png and masks/RATER/NAME.png."""
    for i in range(len(cohort)):
        for folder, picture in {"images": cohort.images[i, 0] * 255, **{f"masks/{who}": cohort.masks[i, r, 0] * 255.0 for r, who in enumerate(raters)}}.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.round().byte().numpy()).save(root / folder / f"case{i}.png")
    return root


@pytest.fixture(scope="module")
def model():
    return CaliDiff.from_pretrained("simulated-64")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "own", make_cohort("together", 5, 48, seed=3), ("Ann", "Ben", "Cleo", "Dan"))


@pytest.fixture
def results(own, model, tmp_path):
    """What `calibrate` leaves on the disk."""
    calibrate_many(model, own, tmp_path / "found", batch=2)
    return open_results(tmp_path / "found", model)


# ---- what the page knows and types

def test_each_choice_has_a_folder_of_its_own(tmp_path):
    state = AppState(tmp_path, data=tmp_path / "a study", images=tmp_path / "new")
    places = [results_place(s, j) for s in (state, dataclasses.replace(state, size=64), dataclasses.replace(state, model="x.safetensors", samples=4, joint_steps=5)) for j in ("calibrate", "segment", "checkpoint", "model")]
    assert len(set(places)) == len(places) - 1, "only the crop does not matter to images that are segmented whole"
    assert all(tmp_path in p.parents for p in places)
    with pytest.raises(ValueError, match="choose and open a folder first"):
        results_place(AppState(tmp_path), "calibrate")
    with pytest.raises(ValueError, match="job must be one of calibrate, segment"):
        results_place(state, "sing")
    with pytest.raises(ValueError, match="step must be one of Open, Look"):
        AppState(tmp_path, step="Fly")


def test_words_are_those_of_the_command_line(own, tmp_path):
    """Every command that the page types is understood by `calidiff`."""
    import tyro

    from calidiff_nb.explore import cli
    state = AppState(tmp_path, data=own, images=own / "images", size=32, joint_steps=7, committee_steps=2, samples=3)
    read = {job: tyro.cli(cli.Job, args=words_for(state, job), config=(tyro.conf.PositionalRequiredArgs,)) for job in ("check", "calibrate", "segment", "train")}
    assert isinstance(read["check"], cli.CheckJob) and read["check"].path == own
    assert read["calibrate"].out == results_place(state, "calibrate") and read["calibrate"].size == 32
    assert read["segment"].path == own / "images" and read["segment"].samples == 3
    assert (read["train"].joint_steps, read["train"].committee_steps, read["train"].size, read["train"].checkpoint) == (7, 2, 32, results_place(state, "checkpoint"))
    with pytest.raises(ValueError, match="job must be check, calibrate, train or segment"):
        words_for(AppState(tmp_path), "check")


# ---- reading bars

@pytest.mark.parametrize(("line", "what", "done", "of"), [
    ("[1/3] calibrating pieces   0%|                        | 0/3, ? left", "[1/3] calibrating pieces", 0, 3),
    ("[2/3] calibrating cases 100%|████████████████████████| 12/12, 00:00 left", "[2/3] calibrating cases", 12, 12),
    ("[3/3] segmenting cases from the image alone", "[3/3] segmenting cases from the image alone", 0, 0),
    ("  6%|▌         | 11/200 [00:10<02:47,  1.13step/s, loss=18.19]", "training", 11, 200),
    ("100%|██████████| 4/4 [00:00<?, ?step/s]", "training", 4, 4),
])
def test_bars_are_read(line, what, done, of):
    seen = follow(Seen(), line)
    assert (seen.what, seen.done, seen.of) == (what, done, of) and follow(seen, line) == seen


def test_words_that_are_no_bars_are_kept_and_change_nothing_else():
    seen = follow(follow(Seen(), " 10%|█ | 1/10 [00:01<00:09, 1.0step/s, loss=2]"), "calidiff: the disk is full | 3/4 of it [gone]")
    assert (seen.done, seen.of, seen.last) == (1, 10, "calidiff: the disk is full | 3/4 of it [gone]") and follow(seen, "  ").last == seen.last


def test_the_curve_of_a_training_that_was_stopped_and_went_on():
    first = [STARTED, " 50%|█ | 5/10 [00:01<00:09, 1.0step/s, loss=5]", " 60%|█ | 6/10 [00:01<00:09, 1.0step/s, loss=4]"]
    second = [STARTED, " 50%|█ | 5/10 [00:00<?, ?step/s]", " 60%|█ | 6/10 [00:01<00:09, 1.0step/s, loss=4.5]", "100%|█ | 10/10 [00:01<00:09, 1.0step/s, loss=3]",
              "100%|█ | 2/2 [00:01<00:00, 1.0step/s, loss=2]", "  0%| | 0/2 [00:00<?, ?step/s]", "100%|█ | 2/2 [00:01<00:00, 1.0step/s, loss=1]"]
    seen = Seen()
    for line in first + second:
        seen = follow(seen, line)
    assert seen.losses == ((5, 5.0), (6, 4.5), (10, 3.0), (12, 2.0), (14, 1.0))


def test_sentences_tell_the_time_left():
    seen = follow(Seen(), "[1/3] calibrating pieces  33%|███ | 1/3, 00:04 left")
    assert progress_sentence(seen, None, None, False) == "Part 1 of 3: calibrating pieces, 1 of 3."
    assert progress_sentence(seen, None, 200, False).endswith("about 3 min left.") and progress_sentence(Seen(), None, None, False) == "Starting."


# ---- jobs

def test_a_job_that_cannot_be_done_ends_with_one_sentence(tmp_path):
    told = []
    job = Job(["calibrate", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")], told.append).start()
    assert job.wait(180) and job.code == 2 and not job.ok and not job.stopped and not job.running
    assert job.sentence == f"there is nothing at {tmp_path / 'nowhere'}; check the path." and told and not (tmp_path / "out").exists()


def test_a_training_can_be_stopped_and_goes_on(own, tmp_path):
    """Stop keeps the steps so far; the next start begins there, and the curve holds both."""
    app = App(own.parent, tmp_path)
    app.open(own, 32)
    app.set(joint_steps=14, committee_steps=0)
    far = threading.Event()
    job = app.job("train", lambda j: far.set() if len(j.seen.losses) > 2 else None).start()
    assert far.wait(180), job.sentence
    job.stop()
    assert job.wait(120) and job.stopped and "goes on from there" in job.sentence
    kept = torch.load(results_place(app.state, "checkpoint") / "joint.pt", weights_only=True)["step"]
    assert 2 < kept < 14 and not results_place(app.state, "model").exists(), "half a model was written"
    again = app.job("train").start()
    assert again.wait(300) and again.ok, again.sentence
    steps = [s for s, _ in again.seen.losses]
    assert steps == sorted(set(steps)) and steps[0] < kept < steps[-1] == 70 and again.share == 1
    assert (results_place(app.state, "model").stem + " (own, trained here)") in [name for name, _ in known_models(app.state)]
    trained = CaliDiff.from_pretrained(str(results_place(app.state, "model")))
    assert trained.rater_names == ("Ann", "Ben", "Cleo", "Dan") and trained.config.stages == {"joint": 14, "image": 28, "inference": 28}


@pytest.mark.skipif(sys.platform == "win32", reason="processes are asked in the way of POSIX")
def test_two_pages_never_write_to_one_place(own, tmp_path):
    """A job that another page still does is refused in a sentence; the mark of one that died is no obstacle."""
    app = App(own, tmp_path).set(data=own, model="simulated-64")
    place = results_place(app.state, "calibrate")
    first = app.job("calibrate").start()
    with pytest.raises(ValueError, match="this is being done already, in another page"):
        app.job("calibrate").start()
    first.stop()
    assert first.wait(120) and not list(place.glob("*.pid"))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (place / "at-work.pid").write_text(str(gone.pid))
    second = app.job("calibrate").start()
    second.stop()
    assert second.wait(120) and second.stopped


def test_a_model_that_was_trained_stays_chosen(tmp_path):
    app = App(tmp_path, tmp_path)
    assert app.view is not None and len(app._models) == 2
    trained = tmp_path / "own-calidiff" / "zz.safetensors"
    trained.parent.mkdir()
    trained.touch()   # it is only offered here, not read
    app.set(model=str(trained))
    app._offer_models()
    assert app.state.model == str(trained) and [menu.value for menu in app._models] == [str(trained)] * 2
    app._models[0].value = "simulated-64"
    assert app.state.model == "simulated-64" and app._models[1].value == "simulated-64"


def test_a_job_can_be_stopped_at_once(own, tmp_path):
    job = Job(["calibrate", str(own), "--out", str(tmp_path / "out")]).start()
    job.stop()
    assert job.wait(120) and job.stopped and not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.part"))
    job.stop()   # nothing is left to stop


# ---- results

def test_masks_are_those_that_the_command_writes(own, model, tmp_path):
    """The page's button and the command write the same bytes."""
    assert main(["calibrate", str(own), "--model", "simulated-64", "--out", str(tmp_path / "typed"), "--batch", "4", "--page", "3"]) == 0
    app = App(own.parent, tmp_path / "home").set(model="simulated-64")
    app.open(own)
    calibrate_many(model, own, results_place(app.state, "calibrate"), batch=4)   # what the job's command does
    written = save_results(app.results("calibrate"), tmp_path / "final")
    typed = {p.name: p.read_bytes() for p in (tmp_path / "typed" / "masks").glob("*.png")}
    assert len(typed) == 5 and {p.name: p.read_bytes() for p in (tmp_path / "final" / "masks").glob("*.png")} == typed
    assert sorted({p.parent.name for p in written}) == ["final", "masks", "uncertainty"] and all(p.is_file() for p in written)


def test_corrections_are_kept_and_can_be_taken_back(results, own, model):
    before = (results.folder / "masks" / "case1.png").read_bytes()
    mask = torch.zeros_like(look_at(results, 1).mask)
    mask[0, 3:9, 4:8] = 1
    correct(results, 1, mask)
    correct(results, 2, torch.zeros_like(mask))   # nothing is there: a correction like any other
    calibrate_many(model, own, results.folder, batch=2)   # running again leaves them alone
    again = open_results(results.folder, model)
    assert torch.equal(look_at(again, 1).mask, mask) and look_at(again, 2).corrected and look_at(again, 2).mask.sum() == 0 and not look_at(again, 0).corrected
    assert (results.folder / "masks" / "case1.png").read_bytes() == before, "the pseudo-truth stays as it was"
    save_results(again, results.folder / "final")
    assert np.array_equal(np.array(Image.open(results.folder / "final/masks/case1.png")), mask[0].numpy() * 255)
    rows = (results.folder / "final" / "cases.csv").read_text().splitlines()
    assert rows[0].startswith("case,structure,area_px") and rows[2].startswith("case1,lesion,24,") and rows[2].endswith(",yes") and rows[1].endswith(",no")
    correct(again, 1, None)
    assert not look_at(again, 1).corrected and look_at(again, 2).corrected
    with pytest.raises(ValueError, match=r"mask must be \(1, 48, 48\), as the case; got \(1, 2, 2\)"):
        correct(again, 0, mask[:, :2, :2])


def test_maps_of_doubt_are_the_entropy(results, tmp_path):
    save_results(results, tmp_path / "final")
    for i in range(len(results)):
        bits = np.array(Image.open(tmp_path / "final" / "uncertainty" / f"{results.ids[i]}.png"), dtype=float) / 255
        assert np.abs(bits - entropy(look_at(results, i).probability[0]).numpy()).max() <= 0.5 / 255 + 1e-6


def test_nothing_is_half_written(results, tmp_path, monkeypatch):
    """A disk that fills up while maps are written: what is there is whole, and earlier files stay."""
    save_results(results, tmp_path / "final")
    before = {p: p.read_bytes() for p in (tmp_path / "final").rglob("*") if p.is_file()}

    def full(path, values):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(the_app, "_write_grey", full)
    with pytest.raises(OSError, match="No space left"):
        save_results(results, tmp_path / "final")
    assert {p: p.read_bytes() for p in (tmp_path / "final").rglob("*") if p.is_file()} == before


def test_data_that_changed_since_are_noticed(own, model, tmp_path):
    import shutil
    moved = tmp_path / "own"
    shutil.copytree(own, moved)
    calibrate_many(model, moved, tmp_path / "found", batch=8)
    (moved / "images" / "case0.png").rename(moved / "images" / "zero.png")
    with pytest.raises(ValueError, match="the data have changed since found was written"):
        look_at(open_results(tmp_path / "found", model), 0)


def test_no_results_is_one_sentence(own, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no results in"):
        open_results(tmp_path, model)
    app = App(own, tmp_path).set(model="simulated-64", data=own)
    with pytest.raises(FileNotFoundError, match="calibrate or segment first"):
        app.results("calibrate")


def test_a_case_that_cannot_be_read_costs_itself(own, model, tmp_path):
    import shutil
    shutil.copytree(own, tmp_path / "own")
    (tmp_path / "own" / "images" / "case2.png").write_bytes(b"no picture")
    calibrate_many(model, tmp_path / "own", tmp_path / "found", batch=2)
    found = open_results(tmp_path / "found", model)
    assert found.ids == ("case0", "case1", "case3", "case4") and list(found.failed) == ["case2"] and look_at(found, 2).id == "case3"
    assert len(save_results(found, tmp_path / "final")) == 4 + 4 + 2


def test_nifti_goes_back_to_its_geometry(model, tmp_path):
    """Volumes: masks and doubt have the shape and affine of the image, and a corrected slice lies in its place."""
    nibabel = pytest.importorskip("nibabel")
    drawn, affine = make_cohort("together", 3, 32, seed=2), np.diag([0.7, 0.8, 2.5, 1.0])
    volume = lambda slices: nibabel.Nifti1Image(np.stack([np.pad(s, ((4, 0), (0, 0))).T for s in slices], -1), affine)
    for folder, slices in {"images": (drawn.images[:, 0] * 200).numpy().astype(np.int16), **{f"masks/{who}": drawn.masks[:, r, 0].numpy() for r, who in enumerate("ABCD")}}.items():
        (tmp_path / "own" / folder).mkdir(parents=True)
        nibabel.save(volume(slices), tmp_path / "own" / folder / "scan.nii.gz")
    calibrate_many(model, tmp_path / "own", tmp_path / "found", size=32)
    found = open_results(tmp_path / "found", model)
    assert len(found) == 3
    mask = torch.zeros_like(look_at(found, 1).mask)
    mask[0, 10:14, 5:7] = 1
    correct(found, 1, mask)
    save_results(found, tmp_path / "final")
    was, now, bits = (nibabel.load(tmp_path / p / "scan.nii.gz") for p in ("found/masks", "final/masks", "final/uncertainty"))
    assert was.shape == now.shape == bits.shape == (32, 36, 3) and np.allclose(now.affine, affine) and np.allclose(bits.affine, affine) and np.allclose(bits.header.get_zooms(), (0.7, 0.8, 2.5))
    a, b = np.asarray(was.dataobj), np.asarray(now.dataobj)
    assert np.array_equal(a[..., [0, 2]], b[..., [0, 2]]) and b[..., 1].sum() == 8 and not np.array_equal(a[..., 1], b[..., 1])
    doubt, p = np.asarray(bits.dataobj), look_at(found, 0).probability[0]
    assert doubt[..., 0].sum() == pytest.approx(float(entropy(p).sum()), rel=1e-4)
    inside = np.where((doubt[..., 0] > 0) | (a[..., 0] > 0))
    assert np.ptp(inside[0]) < 32 and (doubt[..., 0] > 0.9).sum() == int((entropy(p) > 0.9).sum())


def test_segmented_images_open_the_same_way(own, model, tmp_path):
    Image.fromarray(np.full((40, 56), 90, np.uint8)).save(tmp_path / "flat.png")
    (tmp_path / "new").mkdir()
    for p in (own / "images" / "case0.png", tmp_path / "flat.png"):
        (tmp_path / "new" / p.name).write_bytes(p.read_bytes())
    segment_many(model, tmp_path / "new", tmp_path / "found", n=3, batch=8)
    found = open_results(tmp_path / "found", model)
    case = look_at(found, found.ids.index("flat"))
    assert not found.annotated and found.who is None and case.samples.shape == (3, 1, 40, 56) and case.masks is None
    assert [p.name for p in save_results(found, tmp_path / "final")][-1] == "cases.csv"
    assert Image.open(tmp_path / "final/uncertainty/flat.png").size == (56, 40)


def test_a_saved_cohort_with_two_structures_and_missing_raters(tmp_path):
    drawn = make_cohort("two_structures", 4, 32, seed=1)
    save_cohort(drawn, tmp_path / "study.npz")
    model = CaliDiff.for_cohort(drawn, dataclasses.replace(CaliDiff.from_pretrained("simulated-64").config, widths=(8, 8, 8)))
    model.measure(drawn)
    calibrate_many(model, tmp_path / "study.npz", tmp_path / "found", batch=3)
    found = open_results(tmp_path / "found", model)
    names = {p.relative_to((tmp_path / "final").resolve()).parts[:-1] for p in save_results(found, tmp_path / "final")}
    assert names == {(), *((kind, s) for kind in ("masks", "uncertainty") for s in drawn.structure_names)}
    header, rows = expertness_table(found.who, found.data.raters, found.data.structures)
    assert len(rows) == drawn.n_raters * 2 and all(len(r) == len(header) for r in rows)
    assert all(float(low) <= float(w) + 1e-6 and float(w) <= float(high) + 1e-6 for _, _, w, low, high, *_ in rows)


# ---- the viewer and the page

def test_the_viewer_keeps_strokes(results):
    viewer = ResultExplorer(results)
    before = viewer.view and viewer._screen.png
    stroke = torch.zeros_like(viewer.data().mask[0])
    stroke[5:9, 5:9] = 1
    viewer._canvas.mask = stroke.numpy().tobytes()   # as the browser sends it
    assert look_at(results, 0).mask.sum() == 16 and "corrected by you" in viewer._note.value and viewer._screen.png == before
    viewer.step(1)
    assert viewer.state == ResultState(1, 0, 1) and "the committee" in viewer._note.value and viewer._screen.png != before
    assert viewer._canvas.mask == viewer.data().mask[0].numpy().tobytes() and (viewer._canvas.rows, viewer._canvas.columns) == (48, 48)
    viewer.step(-1)._controls["restore"].click()
    assert not look_at(results, 0).corrected and viewer._canvas.mask == viewer.data().mask[0].numpy().tobytes()
    with pytest.raises(ValueError, match="one byte for each of 2304 pixels; got 3"):
        viewer.edit(b"abc")


def test_opening_a_bad_folder_keeps_the_good_one(own, tmp_path):
    app = App(own.parent, tmp_path)
    assert len(app.open(own)) == 5
    kept = app.cohort
    (tmp_path / "empty").mkdir()
    for bad, words in ((tmp_path / "empty", "is empty"), (tmp_path / "none", "there is nothing at"), (own / "images", "laid out in no way known here")):
        with pytest.raises((ValueError, OSError), match=words):
            app.open(bad)
    assert app.cohort is kept and app.state.data == own


def finished(bar) -> str:
    """Wait for the job of a bar, and give its last words."""
    assert bar.job.wait(240)
    return bar.words.text


def test_the_page_from_opening_to_saving_by_its_buttons(own, tmp_path):
    """Every button as a click would press it; bad input gives a sentence on the page."""
    app = App(own.parent, tmp_path)
    app.view
    app._calibrating.start.click()
    assert app._calibrating.words.bad and "choose and open a folder first" in app._calibrating.words.text and app._calibrating.job is None
    app._opening.start.click()
    assert app._opening.words.bad and "laid out in no way known here" in app._opening.words.text
    app._chooser.list.value = str(own)
    app._chooser.into.click()
    app._opening.start.click()
    assert "Open: 5 cases" in finished(app._opening) and "Ann: saw 5 of 5" in app._report.value and app.cohort is not None
    app._steps["Calibrate"].click()
    assert app.state.step == "Calibrate" and app._pages["Calibrate"].layout.display == "" and app._pages["Open"].layout.display == "none"
    app._models[0].value = "simulated-64"
    assert app.state.model == "simulated-64" == app._models[1].value
    app._calibrating.start.click()
    assert app._calibrating.start.disabled and not app._calibrating.stop.disabled
    assert "5 cases done" in finished(app._calibrating) and not app._calibrating.start.disabled and app._calibrating.stop.disabled
    assert "calidiff calibrate" in app._calibrating.line.value and "Masks and arrays" in app._said["calibrate"].text
    assert len(app.viewers["calibrate"].results) == 5


def test_the_chooser_lists_and_says_what_is_wrong(own, tmp_path):
    app = App(own.parent, tmp_path)
    app.view
    chooser = app._chooser
    assert [label for label, _ in chooser.list.options] == ["own/"]
    chooser.into.click()
    assert chooser.words.text == "Select a folder in the list first."
    chooser.typed.value = str(own / "nowhere")
    assert "there is no folder" in chooser.words.text and not chooser.list.options
    chooser.typed.value = str(own / "masks")
    assert [label for label, _ in chooser.list.options] == ["Ann/", "Ben/", "Cleo/", "Dan/"] and chooser.words.text == ""
    chooser.up.click()
    assert chooser.path == own
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        list_places(own / "images" / "case0.png")


# ---- the server

def ask(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Visit a page; the status, and where one is sent."""
    line = http.client.HTTPConnection(host, port, timeout=20)
    try:
        line.request("GET", path)
        answer = line.getresponse()
        return answer.status, answer.getheader("Location", "")
    finally:
        line.close()


def test_strangers_get_nothing_and_nobody_else_can_reach_it(own, tmp_path):
    """Without the token every page, the kernels and the files are closed; only this machine's loopback is served."""
    seen, enough = {}, threading.Event()

    def visit(address):
        port = int(re.search(r":(\d+)/", address)[1])
        seen["port"], seen["address"] = port, address
        for path in ("/", "/?token=wrong", "/voila/render/CaliDiff.ipynb", "/api/kernels", "/api/contents", "/api/kernels/abc/channels"):
            seen[path] = ask(port, path)
        for path in ("/voila/files/voila.json", "/voila/files/CaliDiff.ipynb", "/files/voila.json"):
            seen[path] = ask(port, path)
        try:
            socket.create_connection(("127.0.0.2", port), 2).close()
            seen["elsewhere"] = "open"
        except OSError:
            seen["elsewhere"] = "closed"
        seen["command"] = [a for p in Path("/proc").glob("[0-9]*/cmdline") if str(port).encode() in (a := readable(p)) or b"CaliDiff.ipynb" in a]
        enough.set()

    def readable(path):
        try:
            return path.read_bytes()
        except OSError:
            return b""

    assert serve_app(own, token="secret-of-this-test", open_browser=False, home=tmp_path, announce=visit, until=enough) == 0
    assert seen["address"] == f"http://127.0.0.1:{seen['port']}/?token=secret-of-this-test"
    closed = {path: said for path, said in seen.items() if path.startswith("/")}
    assert len(closed) == 9 and all(status in (302, 401, 403, 404) and (status != 302 or "/login" in where) for status, where in closed.values()), closed
    if sys.platform == "linux":
        assert seen["elsewhere"] == "closed" and not any(b"secret-of-this-test" in c for c in seen["command"])
    assert first_answer(seen["port"]) == "", "the server is still there"


def test_a_port_that_is_taken_is_one_sentence(own):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.0 200 OK\r\n\r\n"), daemon=True).start()
        with pytest.raises(OSError, match=f"port {port} is taken"):
            serve_app(own, port=port, open_browser=False)
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        serve_app(own / "nowhere", open_browser=False)


def test_a_missing_package_is_named(own, monkeypatch):
    real = the_app.importlib.util.find_spec
    monkeypatch.setattr(the_app.importlib.util, "find_spec", lambda name: None if name == "voila" else real(name))
    with pytest.raises(ImportError, match=r'the app needs voila: pip install "calidiff_nb\[widgets\]"'):
        serve_app(own, open_browser=False)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_command_ends_the_server(own, tmp_path, which):
    code = "import sys; from calidiff_nb.explore.app import serve_app; sys.exit(serve_app(sys.argv[1], home=sys.argv[2], open_browser=False, announce=lambda a: print(a, flush=True)))"
    served = subprocess.Popen([sys.executable, "-c", code, str(own), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+)/\?token=[0-9a-f]{32}$", served.stdout.readline().strip())[1])
    assert " 302 " in first_answer(port)
    served.send_signal(which)
    assert served.wait(40) == 0 and first_answer(port) == ""


def test_the_page_takes_nothing_from_other_servers(tmp_path):
    command = write_server(tmp_path / "s", "t", 9, page_notebook(None, tmp_path))
    page, settings = (tmp_path / "s/voila/templates/calidiff/index.html.j2").read_text(), json.loads((tmp_path / "s/voila.json").read_text())
    assert "http" not in page and settings["Voila"]["ip"] == "127.0.0.1" and settings["VoilaConfiguration"]["file_allowlist"] == [] and "t" not in command
