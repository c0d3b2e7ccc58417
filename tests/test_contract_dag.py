"""Imports go downward only: a notebook knows nothing of those with a higher number."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))
LEVEL = {f"{p.parent.name}.{p.stem.split('_', 1)[1]}": int(p.stem[:2]) for p in NOTEBOOKS}
OUTSIDE = {"nbdev", "fastcore", "fastai", "execnb"}


def imports(path):
    """Module names imported by any code cell, exported or not."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(line for line in cell["source"] if not re.match(r"\s*[%!]", line))
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom):
                    yield node.module or ""
                elif isinstance(node, ast.Import):
                    yield from (a.name for a in node.names)


def test_two_cases_never_share_a_module():
    assert len(LEVEL) == len(NOTEBOOKS), "two notebooks export the same module"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_imports_go_down(path):
    mine = int(path.stem[:2])
    for name in imports(path):
        if name.startswith("calidiff_nb."):
            parent = ".".join(name.split(".")[1:3])
            assert parent in LEVEL, f"{path.name} imports {name}, which has no notebook"
            itself = parent == f"{path.parent.name}.{path.stem.split('_', 1)[1]}"
            assert LEVEL[parent] < mine or itself, f"{path.name} imports {name}, which does not stand below it"
        assert name.split(".")[0] not in OUTSIDE, f"{path.name} imports {name}: the library must not need it"


@pytest.mark.parametrize("path", sorted((ROOT / "calidiff_nb").rglob("*.py")), ids=lambda p: p.stem)
def test_no_star_imports(path):
    assert not re.search(r"import \*", path.read_text())
