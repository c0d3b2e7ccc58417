"""The package is what the notebooks say, word for word, and the notebooks are clean."""
import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*/[0-9]*.ipynb"))
ALL = sorted(p for folder in ("nbs", "tutorials") for p in (ROOT / folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BIN = Path(sys.executable).parent


def cells(path):
    return json.loads(path.read_text())["cells"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A copy of the project, exported and cleaned anew."""
    if not (BIN / "nbdev_export").exists():
        pytest.skip("nbdev is not installed here")
    copy = tmp_path_factory.mktemp("project")
    for name in ("nbs", "tutorials", "settings.ini", "pyproject.toml"):
        source = ROOT / name
        if source.is_file():
            shutil.copy(source, copy / name)
        elif source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        else:
            (copy / name).mkdir()  # a folder without any file is not in a clone
    (copy / "calidiff_nb").mkdir()
    shutil.copy(ROOT / "calidiff_nb" / "__init__.py", copy / "calidiff_nb" / "__init__.py")
    for command in (["nbdev_export"], ["nbdev_clean"], ["nbdev_clean", "--fname", "tutorials"]):
        done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def test_package_is_the_export(exported):
    def modules(top):
        return {p.relative_to(top).as_posix() for p in (top / "calidiff_nb").rglob("*.py")} - {"calidiff_nb/_modidx.py"}

    here, there = modules(ROOT), modules(exported)
    assert not here - there, f"modules that no notebook exports: {sorted(here - there)}"
    assert not there - here, f"notebooks that were not exported (run nbdev_export): {sorted(there - here)}"
    changed = [p for p in sorted(here) if not filecmp.cmp(ROOT / p, exported / p, shallow=False)]
    assert not changed, f"edit the notebook, run nbdev_export and commit both: {changed}"


def test_index_of_names_is_current(exported):
    """`_modidx` holds the address of each name; it is compared by name, as its order and addresses may vary."""
    def known(path):
        scope = {}
        exec(path.read_text(), scope)  # a file of this package, one dict
        return {module: set(names) for module, names in scope["d"]["syms"].items()}

    path = ROOT / "calidiff_nb" / "_modidx.py"
    assert path.exists(), "calidiff_nb/_modidx.py is missing: run nbdev_export"
    assert known(path) == known(exported / "calidiff_nb" / "_modidx.py"), "calidiff_nb/_modidx.py is old: run nbdev_export"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_notebook_is_clean(exported, path):
    assert (exported / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), f"run nbdev_clean (and nbdev_clean --fname tutorials): {path.name} changes"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_cell_ids_are_stable_unique_readable(path):
    nb = json.loads(path.read_text())
    assert (nb["nbformat"], nb["nbformat_minor"]) >= (4, 5), "below nbformat 4.5 cells have no ids, and each export is a difference"
    ids = [c.get("id", "") for c in nb["cells"]]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    assert not twice, f"ids used twice: {twice}"
    random = [i for i in ids if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*", i) or re.fullmatch(r"[0-9a-f]{8}", i)]
    assert not random, f"ids that say nothing: {random}; give words such as export-dice or why-noise"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_notebook_is_fit_to_commit(path):
    nb = json.loads(path.read_text())
    assert path.stat().st_size < 1_000_000, f"{path.stat().st_size / 1e6:.1f} MB: fewer or smaller figures"
    assert "widgets" not in nb["metadata"], "widget state is stored: execute with store_widget_state=False"
    outputs = [(c["id"], o) for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [i for i, o in outputs if o["output_type"] == "error"], "an error is stored as output: mend the cell and execute again"
    assert not [i for i, o in outputs if o.get("name") == "stderr"], f"a warning or a progress bar is stored as output: {[i for i, o in outputs if o.get('name') == 'stderr']}"
    assert not [i for i, o in outputs if any("widget" in kind for kind in o.get("data", {}))], "a widget is stored as output: it is blank without a kernel"
    blank = [i for i, o in outputs if any("plotly" in kind for kind in o.get("data", {})) and not any(kind.startswith("image/") for kind in o["data"])]
    assert not blank, f"a figure is stored as plotly data alone, blank on a static page: {blank}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_its_module(path):
    shelf, name = path.parent.name, path.stem.split("_", 1)[1]
    code = ["".join(c["source"]) for c in cells(path) if c["cell_type"] == "code"]
    assert code and code[0].strip() == f"#| default_exp {shelf}.{name}", f"the first code cell of {path.name} must be `#| default_exp {shelf}.{name}`, alone"
    assert (ROOT / "calidiff_nb" / shelf / f"{name}.py").exists(), f"{path.name} is not exported: run nbdev_export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_exported_cells_only_define(path):
    """What a notebook shows or measures stays in the notebook; the module has no side effects."""
    for cell in cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.match(r"#\|\s*exports?\b", source):
            for node in ast.parse(source).body:
                fine = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign))
                words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring
                assert fine or words, f"{path.name}, cell {cell['id']}: an exported cell holds definitions only, not `{ast.unparse(node)[:80]}`"
