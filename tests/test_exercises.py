"""The checks are checked: each accepts the solution and two other right answers, and refuses every plausible wrong one with words."""
import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = {p.stem: p for p in sorted((ROOT / "tutorials" / "exercises").glob("E*.ipynb"))}
ANSWERS = tomllib.loads((Path(__file__).parent / "exercise_answers.toml").read_text())
CELLS = [(name, cell) for name, cells in ANSWERS.items() for cell in cells]
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION.*?### END SOLUTION[ \t]*$", re.M | re.S)
HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS[ \t]*\n?", re.M | re.S)


def read(name):
    return nbformat.read(EXERCISES[name], 4)


def grading(cell):
    return cell.metadata.get("nbgrader", {})


def is_answer(cell):
    return cell.cell_type == "code" and grading(cell).get("solution", False)


def is_check(cell):
    return cell.cell_type == "code" and grading(cell).get("grade", False)


def blank(source):
    """What nbgrader leaves of a solution."""
    return SOLUTION.sub(r"\1# YOUR CODE HERE\n\1raise NotImplemented" + "Error()", source)


def run(source, space, name):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(source, name, "exec"), space)
    return said.getvalue()


def until(name, stop=None, student=None):
    """Run an exercise with its solutions up to the cell `stop`; what is known then, and all that was printed."""
    space, said = {}, ""
    for cell in read(name).cells:
        if cell.id == stop:
            break
        if cell.cell_type == "code":
            source = cell.source if student is None or cell.id != "parameters" else f"STUDENT = {student!r}"
            said += run(source, space, f"{name}:{cell.id}")
    return space, said


@pytest.fixture(scope="module")
def before():
    """What is known when a student reaches a cell; each place is computed once."""
    known = {}

    def reach(name, cell):
        if (name, cell) not in known:
            known[name, cell] = until(name, cell)[0]
        return dict(known[name, cell])

    return reach


def judge(name, answer, code, space):
    """The complaint about an answer, or None if its check accepts it."""
    cells = read(name).cells
    at = next(i for i, c in enumerate(cells) if c.id == answer)
    check = next(c for c in cells[at:] if is_check(c))
    with contextlib.suppress(Exception):  # a blank answer raises, as nbgrader leaves it
        run(code, space, f"{name}:{answer}")
    try:
        run(check.source, space, f"{name}:{check.id}")
    except Exception as complaint:
        return complaint
    return None


def test_every_answer_cell_has_its_answers():
    asked = {(name, c.id) for name in EXERCISES for c in read(name).cells if is_answer(c)}
    assert asked == set(CELLS), f"tests/exercise_answers.toml and the notebooks differ: {asked ^ set(CELLS)}"
    for name, cell in CELLS:
        table = ANSWERS[name][cell]
        assert len(set(table["right"])) >= 2 and len(table["wrong"]) >= 3, f"{name}:{cell} needs two right and three wrong answers"


@pytest.mark.parametrize("student", ["ada", "4711", "grace hopper"])
@pytest.mark.parametrize("name", EXERCISES)
def test_solution_passes_for_every_student(name, student):
    until(name, student=student)


@pytest.mark.parametrize("name", EXERCISES)
def test_students_get_their_own_numbers(name):
    first, second = (until(name, "predict", student)[1] for student in ("ada", "grace hopper"))
    assert first and first != second


@pytest.mark.parametrize("name,cell", CELLS)
def test_nothing_is_not_an_answer(name, cell, before):
    source = next(c.source for c in read(name).cells if c.id == cell)
    assert judge(name, cell, blank(source), before(name, cell)) is not None


@pytest.mark.parametrize("name,cell,i", [(n, c, i) for n, c in CELLS for i in range(len(ANSWERS[n][c]["right"]))])
def test_right_answers_pass(name, cell, i, before):
    complaint = judge(name, cell, ANSWERS[name][cell]["right"][i], before(name, cell))
    assert complaint is None, f"a right answer is refused: {complaint!r}"


@pytest.mark.parametrize("name,cell,i", [(n, c, i) for n, c in CELLS for i in range(len(ANSWERS[n][c]["wrong"]))])
def test_wrong_answers_are_refused_with_words(name, cell, i, before):
    wrong = ANSWERS[name][cell]["wrong"][i]
    complaint = judge(name, cell, wrong["code"], before(name, cell))
    assert complaint is not None, f"a wrong answer passes:\n{wrong['code']}"
    assert isinstance(complaint, AssertionError), f"a wrong answer ends in {complaint!r}, which helps nobody"
    assert re.search(wrong["says"], str(complaint), re.I), f"the message misses the slip: {complaint}"


@pytest.mark.parametrize("name", EXERCISES)
def test_nbgrader_can_read_it(name):
    cells = read(name).cells
    ids = [grading(c)["grade_id"] for c in cells if grading(c)]
    assert len(ids) == len(set(ids))
    for cell in cells:
        g = grading(cell)
        if not g:
            continue
        assert g["schema_version"] == 3 and g["task"] is False and {"grade", "solution", "locked"} <= g.keys()
        assert g["locked"] != g["solution"], f"{cell.id}: what is not to be changed is locked, and nothing else"
        assert not g["grade"] or g["points"] > 0
        assert ("### BEGIN SOLUTION" in cell.source) == g["solution"]
        if is_check(cell):
            seen = HIDDEN.sub("", cell.source)
            assert re.search(r"^assert .+, f?\"", seen, re.M), f"{cell.id} shows the student no check with a message"
            assert seen != cell.source, f"{cell.id} has no hidden check"
    kinds = {c.id for c in cells}
    assert {"answer-predict", "essay-design"} <= kinds and any("break" in k or "lie" in k for k in kinds)


@pytest.mark.parametrize("name", EXERCISES)
def test_student_version_gives_nothing_away(name):
    for cell in read(name).cells:
        shown = HIDDEN.sub("", blank(cell.source))
        assert "SOLUTION" not in shown and "HIDDEN" not in shown, f"{cell.id}: a marker has no partner"
        for kept in SOLUTION.finditer(cell.source):
            lines = [line.strip() for line in kept[0].splitlines()[1:-1] if len(line.strip()) > 12]
            assert not [line for line in lines if line in shown], f"{cell.id} still shows its solution"
        if cell.cell_type == "code":
            compile(shown, cell.id, "exec")
            assert not cell.get("outputs") or not is_answer(cell), f"{cell.id}: the output of a solution is stored"
