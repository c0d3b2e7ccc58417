"""A class is released, fills its notebooks well, badly and with malice, and is graded: points as expected, and nothing else touched."""
import csv
import hashlib
import html
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from calidiff_nb.explore import course
from calidiff_nb.explore.course import (
    CellGrade,
    Student,
    check_students,
    cut,
    feedback_html,
    find_lessons,
    first_sentence,
    grade_class,
    grade_notebook,
    lesson_minutes,
    notebook_text,
    pack_package,
    read_lesson,
    read_notebook,
    read_roster,
    release_class,
    role,
    slides_of,
    student_version,
)
from calidiff_nb.explore.sandbox import Limits, Session

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ROOT / "tutorials"
ANSWERS = tomllib.loads((Path(__file__).parent / "exercise_answers.toml").read_text())
EXERCISE = "E3_agreement"
LIMITS = Limits(cell_seconds=6, total_seconds=120, memory_gb=2)
unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="grading needs a Unix")


def fingerprint(*folders):
    """Every file below some folders, with what is in it."""
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for f in folders for p in sorted(f.rglob("*")) if p.is_file() and not p.is_symlink()}


def fill(nb, sources, add=()):
    """Put sources into cells by id, and code cells after others."""
    cells = []
    for c in nb["cells"]:
        cells.append(c | {"source": sources.get(c["id"], c["source"])})
        cells += [{"cell_type": "code", "id": f"mine-{len(cells)}-{i}", "metadata": {}, "source": s, "outputs": [], "execution_count": None} for i, (after, s) in enumerate(add) if after == c["id"]]
    return {**nb, "cells": cells}


def roster(folder, text="id,name\nada,Ada Lovelace\nbob,Bob\neve,Eve <script>\n"):
    path = folder / "roster.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    top = tmp_path_factory.mktemp("course")
    return release_class("Class of 2027", roster(top), top / "class", LESSONS, ["E3"], answers=False)


# ---------------------------------------------------------------- release
def test_release_holds_what_a_class_needs(released):
    here = {p.relative_to(released.folder).as_posix() for p in released.folder.rglob("*") if p.is_file()}
    wanted = {f"students/{s.id}/{f}" for s in released.students for f in (f"{EXERCISE}.ipynb", "data/cohort.npz", "README.txt")}
    wanted |= {f"slides/{p.stem}.html" for p in LESSONS.glob("T*.ipynb")} | {"slides/index.html", "syllabus.md", "requirements.txt", "data/class.npz", "README.md", "class.json", f"instructor/source/{EXERCISE}.ipynb"}
    wanted |= {f"weights/{p.name}" for p in (ROOT / "calidiff_nb" / "weights").glob("*.safetensors")}
    assert wanted <= here, f"missing: {wanted - here}"
    assert not list(released.folder.parent.glob(".class*")), "a half-written folder is left beside it"


@pytest.mark.parametrize("name", [p.stem for p in sorted((LESSONS / "exercises").glob("E*.ipynb"))])
def test_round_trip_keeps_grading_and_gives_nothing_away(name):
    source = read_notebook(LESSONS / "exercises" / f"{name}.ipynb")
    given = json.loads(notebook_text(student_version(source, "o'neil-7")))
    assert [c["id"] for c in given["cells"]] == [c["id"] for c in source["cells"]]
    for before, after in zip(source["cells"], given["cells"], strict=True):
        text, kind = "".join(after["source"]), role(before)
        assert before["metadata"].get("nbgrader") == after["metadata"].get("nbgrader")
        assert "### BEGIN" not in text and "### END" not in text and not after.get("outputs")
        assert (after["metadata"].get("editable") is False) == (kind in ("check", "locked") or before["id"] == "parameters")
        for region in re.findall(r"### BEGIN (?:SOLUTION|HIDDEN TESTS)\n(.*?)### END", before["source"], re.S):
            secrets = [line.strip() for line in region.splitlines() if len(line.strip()) > 12]
            assert not [s for s in secrets if s in text], f"{before['id']} gives something away"
        if kind == "check":
            assert re.search(r"^assert ", text, re.M)
    assert any('STUDENT = "o\'neil-7"' in "".join(c["source"]) for c in given["cells"])


def test_cohorts_differ_and_hide_their_truth(released):
    from calidiff_nb.raters.folders import read_cohort

    first, second = (read_cohort(released.folder / "students" / s / "data" / "cohort.npz") for s in ("ada", "bob"))
    assert first.truth is None and first.truth_prob is None and not (first.masks == second.masks).all()
    assert read_cohort(released.folder / "data" / "class.npz").truth is not None


def test_again_adds_and_changes_nothing(released):
    before = fingerprint(released.folder)
    again = release_class("Class of 2027", released.folder.parent / "roster.csv", released.folder, LESSONS, ["E3_agreement"], answers=False)
    assert again.added == () and fingerprint(released.folder) == before
    lost = released.folder / "syllabus.md"
    text = lost.read_text()
    lost.unlink()
    release_class("Class of 2027", released.folder.parent / "roster.csv", released.folder, LESSONS, ["E3"], answers=False)
    assert lost.read_text() == text and fingerprint(released.folder).keys() == before.keys()


@pytest.mark.parametrize("stop_at", ["writing notebooks", "writing slides and syllabus", "running the answer key"])
def test_interrupted_release_leaves_nothing(tmp_path, stop_at, monkeypatch):
    def interrupt(what, done, of):
        if what == stop_at and (done or what != "writing notebooks"):
            raise KeyboardInterrupt

    monkeypatch.setattr(course, "executed", lambda nb, student: nb)
    monkeypatch.setattr(course, "write_slides", lambda lessons, folder: folder.mkdir())
    path = roster(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        release_class("x", path, tmp_path / "out", LESSONS, ["E3"], progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["roster.csv"]


def test_other_folders_are_refused(released, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    path = roster(tmp_path)
    for name, out, which, says in (("x", tmp_path / "mine", ["E3"], "not a released class"), ("x", released.folder, ["E3"], "holds the class"), ("Class of 2027", released.folder, ["E1"], "other exercises"), ("x", tmp_path / "new", ["E9"], "no exercise E9")):
        with pytest.raises(ValueError, match=says):
            release_class(name, path, out, LESSONS, which, answers=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "roster.csv"] and [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text, says", [
    ("number,name\n1,Ada\n", "id is missing"), ("id\n1\n", "name is missing"), ("", "missing"), ("id,name\n", "lists nobody"), ("id,name\nada,A\nada,B\n", "line 3.*already that of line 2"),
    ("id,name\nAda,A\nada,B\n", "already"), ("id,name\n../x,A\n", "cannot be the name of a folder"), ("id,name\n,A\n", "cannot be"), ("id,name\n/etc,A\n", "cannot be"), ("id,name\na b,A\n", "cannot be"),
    ("id,name\n..,A\n", "cannot be"), ("id,name\n=1+1,A\n", "cannot be"), ("id,name\nx.,A\n", "cannot be"),
])
def test_bad_rosters_are_refused(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        read_roster(roster(tmp_path, text))


def test_rosters_of_spreadsheets_are_read(tmp_path):
    assert read_roster(roster(tmp_path, "\ufeffName; ID\nGrace Hopper; g.h\n\n")) == (Student("g.h", "Grace Hopper"),)
    assert read_roster(roster(tmp_path, 'ID,Name,E-mail\n7,"Hopper, Grace",g@x\n')) == (Student("7", "Hopper, Grace"),)
    check_students([Student("a", ""), Student("b", "")])


# ---------------------------------------------------------------- lessons, slides, package
def test_every_lesson_promises_and_is_timed():
    lessons = find_lessons(LESSONS)
    assert {x.name for x in lessons} == {p.stem for p in LESSONS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert all(x.goals and x.misconceptions and x.discussion and x.minutes_read > 0 for x in lessons)
    times = lesson_minutes(LESSONS, speed=2.0)
    assert times.minutes == pytest.approx(sum(x.cpu_seconds for x in lessons) / 120) and all(x.name in str(times) for x in lessons)


def test_a_lesson_without_promises_is_named(tmp_path):
    nb = {"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# T\n\ngoals: x"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "T1.ipynb").write_text(json.dumps(nb))
    with pytest.raises(ValueError, match="T1.ipynb.*prerequisites, minutes_read"):
        read_lesson(tmp_path / "T1.ipynb")


@pytest.mark.parametrize("path", sorted(LESSONS.glob("T*.ipynb")), ids=lambda p: p.stem)
def test_slides_have_a_sentence_and_need_no_network(path):
    nb = read_notebook(path)
    if not any(c.get("outputs") for c in nb["cells"]):
        pytest.skip("this tutorial was not executed")
    slides = slides_of(nb)
    pictures = sum("<img" in s.picture for s in slides)
    assert pictures >= 3 and len(slides) >= 6, f"{path.stem}: {len(slides)} slides, {pictures} pictures"
    lacking = [s.heading for s in slides if not s.sentence or not s.heading or len(re.findall(r"<img|<iframe|<pre|class=\"formula\"", s.picture)) != 1]
    assert not lacking, f"without a sentence or without one picture: {lacking}"
    assert all(len(s.sentence) < 300 and s.picture.count("\n") < 12 or "<pre" not in s.picture for s in slides), "a wall of text"
    sections = course.deck_html(read_lesson(path), slides).split("<section")[1:]
    assert "To discuss" in sections[-1] and all(x.count("<figure>") == 1 for x in sections)
    assert not any("<pre><code>" in re.sub(r"<details>.*?</details>", "", x, flags=re.S) for x in sections), "code is shown on demand only"
    page = html.unescape(course.deck_html(read_lesson(path), slides))
    assert not re.search(r"(src|href)=[\"'](?!data:|#)|@import|url\((?![\"']?data:)", re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "data:", page)), "a deck must not ask for another file"


def test_formulas_and_short_answers_become_pictures():
    md = lambda source: {"cell_type": "markdown", "id": "m", "metadata": {}, "source": source}
    code = lambda text: {"cell_type": "code", "id": "c", "metadata": {}, "source": "print(1)", "outputs": [{"name": "stdout", "text": [text]}]}
    slides = slides_of({"cells": [md("## Law\n\nIt shrinks.\n\n$$k = \\tfrac{V}{V + 1}, \\quad \\sqrt k$$\n\nand so on."), code("0.5\n"), md("## Bare\n\nNothing but numbers."), code("1\n"), code("2\n"),
                                  md("## Long\n\nA wall."), code("x\n" * 30), md("## Next\n\nMore."), code("3\n")]})
    assert [(s.heading, s.sentence) for s in slides] == [("Law", "It shrinks."), ("Bare", "Nothing but numbers.")]
    assert "<svg" in slides[0].picture and "1" in slides[1].picture


def test_both_ways_to_write_a_promise_are_read(tmp_path):
    keys = {"goals": "a; b", "prerequisites": "none", "minutes_read": "5", "cpu_seconds": "6", "misconceptions": '"m"', "discussion": "Why?"}
    for n, form in enumerate(("{}: {}", "- **{}**: {}")):
        text = "# T\n\n" + "\n".join(form.format(k, v) for k, v in keys.items())
        (tmp_path / f"T{n}.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": text}]}))
        lesson = read_lesson(tmp_path / f"T{n}.ipynb")
        assert lesson.goals == ("a", "b") and lesson.prerequisites == () and (lesson.minutes_read, lesson.cpu_seconds) == (5, 6) and lesson.discussion == "Why?"


def test_first_sentences():
    assert first_sentence("## H\n\nDice is 0.5 here. More.") == "Dice is 0.5 here."
    assert first_sentence("$$x$$\n\n- a\n\nSee *this!* And that.") == "See *this!*"
    assert first_sentence("As in e.g. Dice (Zou et al. 2004). Then.") == "As in e.g. Dice (Zou et al. 2004)."
    assert first_sentence("# only a title") == ""


def test_markers_must_have_partners():
    assert cut("a\n  ### BEGIN X\n  b\n  ### END X\nc", "X", "s\nt") == "a\n  s\n  t\nc"
    for wrong in ("### BEGIN X", "### END X", "### BEGIN X\n### BEGIN X\n### END X"):
        with pytest.raises(ValueError, match="partner|without"):
            cut(wrong, "X")


def test_packed_package_can_be_imported(tmp_path):
    wheel = pack_package(tmp_path)
    code = "import calidiff_nb.raters.cases as m; print(m.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": str(wheel)}, capture_output=True, text=True)
    assert done.returncode == 0 and str(wheel) in done.stdout, done.stderr


# ---------------------------------------------------------------- the sandbox
@unix
def test_a_cell_costs_itself_only():
    with Session(Limits(cell_seconds=2, memory_gb=1, file_mb=2)) as s:
        assert s.run("x = 1").ok
        ends = [s.run(c) for c in ("while True: pass", "import torch\ntorch.ones(5_000_000_000)", "b = bytearray(20 * 10**9)", "import os\nos._exit(0)", "import ctypes\nctypes.string_at(0)", "raise SystemExit",
                                   "def f(): f()\nf()", "open('big', 'wb').write(bytes(3 * 2**20))", "x = 2\nwhile True: pass", "class E(Exception):\n    def __str__(self): raise KeyboardInterrupt\nraise E")]
        assert not any(e.ok for e in ends) and s.run("assert x == 1").ok, ends
        assert "never ends" in ends[0].message and [e.kind for e in ends[:5]] == ["Stopped", "RuntimeError", "MemoryError", "Stopped", "Stopped"]
        assert s.run("print('a' * 10_000)").said == "a" * 4000
        assert s.run("%matplotlib inline\n!ls\nprint(1)").said == "1\n"
        assert s.run("1/0\n", "here").line == 1
    assert not s.folder.exists()


@unix
def test_what_checks_rely_on_is_put_back():
    with Session(Limits(cell_seconds=5)) as s:
        s.run("import math, torch\nfrom calidiff_nb.raters.metrics import dice\ntruth, asked = 1, None", ours=True)
        s.run("import builtins\ntruth, asked, dice = 2, 'mine', None\nmath.sqrt = builtins.abs = torch.allclose = lambda *a, **k: True\nimport calidiff_nb.raters.metrics as m; m.iou = None")
        end = s.run("from calidiff_nb.raters.metrics import iou\nassert truth == 1 and asked == 'mine' and dice and iou and math.sqrt(4) == 2 and abs(-1) == 1 and not torch.allclose(torch.ones(1), torch.zeros(1))", check=True, own=["asked"])
        assert end.ok, end


@unix
def test_who_breaks_the_conversation_ends_only_his_own():
    with Session(Limits(cell_seconds=2)) as s:
        s.run("import os\nfor fd in range(3, 1024):\n    try: os.write(fd, b'\\x00\\x00\\x00\\x05hello')\n    except OSError: pass")
        assert s.run("1").kind == "Ended" and s.run("1").kind == "Ended"


@unix
def test_nothing_outlives_its_session():
    with Session(Limits(cell_seconds=3)) as s:
        process = s.process.pid
        s.run("import ctypes, time\nlibc = ctypes.CDLL(None)\nif libc.fork() == 0:\n    libc.setsid()\n    while True: time.sleep(1)\n")
        assert Path("/proc", str(process)).exists() or sys.platform != "linux"
        below = descendants(process)
    time.sleep(0.3)
    assert not [p for p in below if alive(p)], "a process that a cell started is still there"


def descendants(process):
    """Processes below one, on Linux."""
    parents = {}
    for p in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(p.name)] = int(re.search(r"^PPid:\s+(\d+)", (p / "status").read_text(), re.M)[1])
        except OSError:
            continue
    found, queue = [], [process]
    while queue:
        at = queue.pop()
        queue += (mine := [p for p, parent in parents.items() if parent == at])
        found += mine
    return found


def alive(process):
    try:
        return "zombie" not in Path("/proc", str(process), "status").read_text()
    except OSError:
        return False


# ---------------------------------------------------------------- a class of three
HOSTILE = {
    "answer-predict": "while True: pass",
    "answer-mstep": "import torch\nbig = [torch.ones(5_000_000_000)]\ndef m_step(votes, p): return big",
    "answer-estep": "import os\nos._exit(0)",
    "answer-break": "import sys\nsys.exit(0)",
}


def attacks(port, precious, folder):
    """Cells that a malicious student adds: through Python, and past it through the C library."""
    peer = folder / "submissions" / "ada" / f"{EXERCISE}.ipynb"
    return [
        f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'hello')",
        f"import ctypes, struct\nlibc = ctypes.CDLL(None, use_errno=True)\ns = libc.socket(2, 1, 0)\nlibc.connect(s, struct.pack('<H', 2) + struct.pack('>H', {port}) + bytes([127, 0, 0, 1]) + bytes(8), 16)",
        f"open({str(precious / 'file.txt')!r}, 'w').write('gone')",
        f"import ctypes\nctypes.CDLL(None).unlink({str(precious / 'file.txt').encode()!r})",
        f"import shutil\nshutil.rmtree({str(folder)!r})",
        f"import os\nos.remove({str(peer)!r})",
        f"import ctypes\nlibc = ctypes.CDLL(None)\nfd = libc.open({str(folder / 'grades.csv').encode()!r}, 0o101, 0o644)\nlibc.write(fd, b'eve,all', 7)",
        f"stolen = open({str(peer)!r}).read()\nprint(stolen)",
        "import subprocess\nsubprocess.run(['touch', 'x'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import shutil\nfor name in ('.', '..', '/'): shutil.rmtree(name, ignore_errors=True)",
    ]


@pytest.fixture(scope="module")
def graded(released, tmp_path_factory):
    """Three submissions: right, wrong, hostile; graded once, with a server that waits for a call."""
    precious = tmp_path_factory.mktemp("precious")
    (precious / "file.txt").write_text("dear")
    given = {s: read_notebook(released.folder / "students" / s / f"{EXERCISE}.ipynb") for s in ("ada", "bob", "eve")}
    right = {cell: table["right"][1] for cell, table in ANSWERS[EXERCISE].items()} | {"essay-design": "Three decisions: …"}
    wrong = {cell: table["wrong"][0]["code"] for cell, table in ANSWERS[EXERCISE].items()} | {"check-predict": "assert True", "essay-design": "\ud800 is no letter"}
    calls, server = [], socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)

    def listen():
        while server.fileno() != -1:
            try:
                calls.append(server.accept())
            except TimeoutError:
                continue
            except OSError:
                return

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    eve = fill(given["eve"], HOSTILE, [("check-break", a) for a in attacks(server.getsockname()[1], precious, released.folder)])
    for who, nb in (("ada", fill(given["ada"], right)), ("bob", fill(given["bob"], wrong)), ("eve", eve)):
        (released.folder / "submissions" / who).mkdir(exist_ok=True)
        (released.folder / "submissions" / who / f"{EXERCISE}.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    before = fingerprint(released.folder, precious)
    home = sorted(p.name for p in Path.home().iterdir())
    start = time.monotonic()
    report = grade_class(released.folder, LIMITS)
    took, after = time.monotonic() - start, fingerprint(released.folder, precious)
    server.close()
    listener.join(5)
    return {"report": report, "before": before, "after": after, "calls": calls, "folder": released.folder, "took": took, "home": (home, sorted(p.name for p in Path.home().iterdir()))}


@unix
def test_right_answers_get_all_points(graded):
    points, open_, most = graded["report"].total("ada")
    assert (points, open_, most) == (13, 4, 17), [g for g in graded["report"].grades if g.student == "ada"]


@unix
def test_wrong_answers_get_none_and_are_told_why(graded):
    mine = {g.cell: g for g in graded["report"].grades if g.student == "bob"}
    assert graded["report"].total("bob") == (0, 4, 17) and mine["essay-design"].answer == "? is no letter"
    for cell, table in ANSWERS[EXERCISE].items():
        assert re.search(table["wrong"][0]["says"], mine[cell.replace("answer", "check")].message, re.I)
    assert any("check-predict was changed" in n for g in mine.values() for n in g.notes)


@unix
def test_hostile_notebook_costs_its_own_cells(graded):
    mine = {g.cell: g for g in graded["report"].grades if g.student == "eve"}
    assert graded["report"].total("eve")[0] == 0 and len(mine) == 5
    assert mine["check-predict"].verdict == "stopped" and "never ends" in mine["check-predict"].message
    assert mine["check-estep"].verdict == "stopped" and mine["check-mstep"].verdict == "failed"
    tried = " ".join(n for g in mine.values() for n in g.notes)
    assert all(w in tried for w in ("socket.getaddrinfo", "file.txt", "shutil.rmtree", "os.remove", "subprocess.Popen", "os.kill")), tried


@unix
def test_nothing_else_is_touched(graded):
    new = {p.relative_to(graded["folder"]).parts[0] for p in graded["after"].keys() - graded["before"].keys()}
    assert new == {"grades.csv", "feedback", "graded"}
    assert {p for p, h in graded["before"].items() if graded["after"].get(p) != h} == set()
    assert graded["home"][0] == graded["home"][1]


@unix
def test_network_and_neighbours_are_out_of_reach(graded):
    held = graded["report"].sandbox
    if not (held.network and held.reading):
        pytest.skip("this system offers neither namespaces nor Landlock; the report says so")
    assert graded["calls"] == [] and "The system itself keeps each submission from the network" in str(graded["report"])
    page = (graded["folder"] / "feedback" / "eve" / f"{EXERCISE}.html").read_text(encoding="utf-8")
    assert "Three decisions" not in page


@unix
def test_table_and_feedback(graded):
    with (graded["folder"] / "grades.csv").open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["student", "exercise", "cell", "points", "max", "verdict"] and len(rows) == 15
    assert sum(int(r["points"] or 0) for r in rows if r["student"] == "ada") == 13 and [r["points"] for r in rows if r["verdict"] == "by hand"] == ["", ""]
    page = (graded["folder"] / "feedback" / "eve" / f"{EXERCISE}.html").read_text(encoding="utf-8")
    assert "<script" not in page and "Eve &lt;script&gt;" in page and "Hidden" not in page
    hidden = [line.strip() for c in read_notebook(graded["folder"] / "instructor" / "source" / f"{EXERCISE}.ipynb")["cells"] for line in c["source"].splitlines() if line.startswith("check =")]
    assert hidden and not any(h in p.read_text(encoding="utf-8") for h in hidden for p in (graded["folder"] / "feedback").rglob("*.html"))


@unix
def test_resume_and_trouble(graded):
    folder, told = graded["folder"], []
    bob = folder / "submissions" / "bob" / f"{EXERCISE}.ipynb"
    whole = bob.read_text(encoding="utf-8")
    first = grade_class(folder, LIMITS, progress=lambda *t: told.append(t))
    assert (first.graded, first.kept) == (0, 3) and told[-1] == ("grading", 3, 3) and first.grades == graded["report"].grades
    (folder / "submissions" / "eve" / f"{EXERCISE}.ipynb").unlink()
    (folder / "submissions" / "eve" / f"{EXERCISE}.ipynb").symlink_to(folder / "submissions" / "ada" / f"{EXERCISE}.ipynb")
    bob.write_text(whole[: len(whole) // 2], encoding="utf-8")
    second = grade_class(folder, LIMITS)
    assert len(second.problems) == 2 and second.total("ada")[0] == 13 and second.total("bob") == (0, 0, 17) == second.total("eve")
    assert {g.verdict for g in second.grades if g.student != "ada"} == {"unreadable"} and "link" in str(second)
    bob.unlink()
    third = grade_class(folder, LIMITS)
    assert third.absent == (f"bob/{EXERCISE}",) and third.total("bob") == (0, 0, 17)


@unix
def test_copied_and_scrambled_notebooks(released):
    master = read_notebook(released.folder / "instructor" / "source" / f"{EXERCISE}.ipynb")
    small = {**master, "cells": [c for c in master["cells"] if c["id"] in ("title", "parameters", "imports", "yours", "answer-predict", "check-predict")]}
    nb = student_version(small, "ada")
    answer = next(c for c in nb["cells"] if c["id"] == "answer-predict")
    answer["source"] = "sensitivity, specificity, youden = values()\naccuracy = share"
    helper = [("yours", "values = lambda: (1.0, 0.0, 0.0)")]
    with Session(LIMITS) as s:
        (grade,) = grade_notebook(small, fill({**nb, "cells": [*nb["cells"], answer]}, {}, helper), "bob", EXERCISE, s)
    assert (grade.points, grade.verdict) == (2, "passed") and any("twice" in n for n in grade.notes) and any("STUDENT = 'ada'" in n for n in grade.notes)
    with Session(LIMITS) as s:
        (grade,) = grade_notebook(small, {**nb, "cells": nb["cells"][:2]}, "ada", EXERCISE, s)
    assert (grade.points, grade.verdict) == (0, "missing") and any("check-predict is missing" in n for n in grade.notes)


@pytest.mark.parametrize("data, says", [(b"", "not a whole notebook"), (b"[]", "no list of cells"), (b'{"cells": 3}', "no list of cells"), (b"\xff\xfe", "not a whole notebook"), (b"[" * 100_000, "not a whole notebook")])
def test_what_is_not_a_notebook(tmp_path, data, says):
    (tmp_path / "x.ipynb").write_bytes(data)
    with pytest.raises(ValueError, match=says):
        read_notebook(tmp_path / "x.ipynb")


def test_grading_needs_a_class(tmp_path, released):
    with pytest.raises(FileNotFoundError, match="not a released class"):
        grade_class(tmp_path)
    with pytest.raises(ValueError, match="no exercise E1"):
        grade_class(released.folder, exercises=["E1"])
    source = released.folder / "instructor" / "source" / f"{EXERCISE}.ipynb"
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("0.005", "0.5"), encoding="utf-8")
    with pytest.raises(ValueError, match="not the one that was released"):
        grade_class(released.folder)
    source.write_text(text, encoding="utf-8")


@unix
def test_trouble_with_one_does_not_end_the_run(released, tmp_path, monkeypatch):
    top = release_class("small", roster(tmp_path, "id,name\na,A\nb,B\n"), tmp_path / "small", LESSONS, ["E3"], answers=False).folder
    for who in "ab":
        (top / "submissions" / who).mkdir()
        (top / "submissions" / who / f"{EXERCISE}.ipynb").write_bytes((top / "students" / who / f"{EXERCISE}.ipynb").read_bytes())

    def broken(master, submission, student, exercise, session):
        if student == "a":
            raise RuntimeError("no room")
        return (CellGrade(student, exercise, "check-predict", 2, 2, "passed"),)

    monkeypatch.setattr(course, "grade_notebook", broken)
    report = grade_class(top, LIMITS, workers=2)
    assert report.total("b")[0] == 2 and len(report.problems) == 1 and "a/E3_agreement" in report.problems[0] and "no room" in str(report)
    monkeypatch.setattr(course, "grade_notebook", lambda m, s, student, e, session: (CellGrade(student, e, "check-predict", 1, 2, "passed"),))
    again = grade_class(top, LIMITS)
    assert (again.graded, again.kept, again.problems) == (1, 1, ()) and again.total("a")[0] == 1 and again.total("b")[0] == 2


@unix
def test_stopping_a_grading_stops_its_processes():
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Session(Limits(cell_seconds=100), stop=stop) as s:
        s.run("import time\ntime.sleep(100)")
    assert time.monotonic() - begun < 90 and s.process.poll() is not None and not s.folder.exists()


def test_feedback_is_text():
    page = feedback_html(Student("a", "A"), "E1", "T", [CellGrade("a", "E1", "c", 0, 1, "failed", "<img src=x onerror=y>", "", ("<b>",))])
    assert "<img" not in page and "&lt;b&gt;" in page
