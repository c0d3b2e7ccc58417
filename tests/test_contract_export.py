"""The package is what the notebooks say, word for word, and the notebooks are clean."""
import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))
ALL = sorted(p for folder in ("nbs", "tutorials") for p in (ROOT / folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A copy of the project, exported and cleaned anew."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("nbs", "calidiff_nb", "tutorials", "settings.ini", "pyproject.toml", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        elif source.exists():
            shutil.copy(source, copy / name)
    for module in (copy / "calidiff_nb").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    for command in (["nbdev_export"], ["nbdev_clean"], ["nbdev_clean", "--fname", "tutorials"]):
        done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def test_package_is_the_export(exported):
    here = {p.relative_to(ROOT) for p in (ROOT / "calidiff_nb").rglob("*.py")}
    there = {p.relative_to(exported) for p in (exported / "calidiff_nb").rglob("*.py")}
    assert here == there, f"modules without a notebook or notebooks not exported: {here ^ there}"
    changed = [str(p) for p in here if p.name != "_modidx.py" and not filecmp.cmp(ROOT / p, exported / p, shallow=False)]
    assert not changed, f"run nbdev_export and commit: {changed}"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.name)
def test_notebook_is_clean(exported, path):
    assert (exported / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), f"run nbdev_clean on {path.name}"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.name)
def test_notebook_is_fit_to_commit(path):
    text = path.read_text()
    nb = json.loads(text)
    assert path.stat().st_size < 1_000_000, "over 1 MB: fewer or smaller figures"
    assert "widgets" not in nb["metadata"], "widget state is stored: execute with store_widget_state=False"
    ids = [c.get("id", "") for c in nb["cells"]]
    assert len(set(ids)) == len(ids) and all(ids), "cell ids must be there and differ"
    assert not [i for i in ids if re.fullmatch(r"[0-9a-f]{8}", i)], "cell ids are random: give them readable names"
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"], "an error is stored as output"
    assert not [o for o in outputs if o.get("name") == "stderr"], "a warning or a progress bar is stored as output"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_has_its_module(path):
    module = ROOT / "calidiff_nb" / path.parent.name / (path.stem.split("_", 1)[1] + ".py")
    assert module.exists(), f"{path.name} must export {module.relative_to(ROOT)}"
