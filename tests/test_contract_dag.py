"""Imports go downward only: a notebook knows nothing of those with its own number or a higher one."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*/[0-9]*.ipynb"))
TUTORIALS = sorted(p for p in (ROOT / "tutorials").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "calidiff_nb").glob("*/*.py") if p.name != "__init__.py")
LEVEL = {f"{p.parent.name}.{p.stem.split('_', 1)[1]}": int(p.stem[:2]) for p in NOTEBOOKS}
SHELVES = {"raters": 0, "diffusion": 1, "calidiff": 2, "compare": 3, "explore": 4}
OUTSIDE = {"nbdev", "fastcore", "fastai", "execnb"}
NETWORK = {"requests", "httpx", "urllib.request", "http.client", "aiohttp", "huggingface_hub", "torch.hub"}


def name_of(path):
    return f"{path.parent.name}.{path.stem.split('_', 1)[1]}"


def code_of(path):
    """The source of each code cell, without magics."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "\n".join(line for line in "".join(cell["source"]).splitlines() if not re.match(r"\s*[%!]", line))


def imports(tree, package=""):
    """(module, names) of every import in a tree, also inside functions; relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names)


def parents(found):
    """The modules of this package among imports, as shelf.name."""
    for module, names in found:
        parts = module.split(".")
        if parts[0] == "calidiff_nb" and len(parts) > 2:
            yield ".".join(parts[1:3])
        elif parts[0] == "calidiff_nb" and len(parts) == 2:  # from calidiff_nb.raters import cases
            yield from (f"{parts[1]}.{n}" for n in names)


def check_down(mine, level, found, where):
    for parent in parents(found):
        assert parent in LEVEL, f"{where} imports calidiff_nb.{parent}, which has no notebook"
        assert parent == mine or LEVEL[parent] < level, f"{where} (level {level}) imports {parent} (level {LEVEL[parent]}): only lower numbers may be used"
    for module, names in found:
        assert module.split(".")[0] not in OUTSIDE, f"{where} imports {module}: the library must not need it"
        assert not {module, *(f"{module}.{n}" for n in names)} & NETWORK, f"{where} imports {module}: nothing here uses the network"
        assert "*" not in names, f"{where} imports * from {module}: name what is used"


def test_no_two_notebooks_share_a_module():
    assert len(LEVEL) == len(NOTEBOOKS), "two notebooks export the same module"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_number_and_shelf_agree(path):
    assert re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", path.stem), f"{path.name}: NN_name.ipynb, lower case"
    assert path.parent.name in SHELVES, f"{path.parent.name} is not a shelf; shelves are {', '.join(SHELVES)}"
    assert int(path.stem[0]) == SHELVES[path.parent.name], f"{path.name} stands on shelf {path.parent.name}, whose numbers begin with {SHELVES[path.parent.name]}"
    assert path.stem.split("_", 1)[1] not in {"utils", "helpers", "common", "misc"}, "code with no natural place means that the plan is wrong"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_imports_go_down(path):
    found = [i for code in code_of(path) for i in imports(ast.parse(code))]
    check_down(name_of(path), int(path.stem[:2]), found, path.name)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_module_imports_go_down(path):
    mine = f"{path.parent.name}.{path.stem}"
    assert mine in LEVEL, f"calidiff_nb/{path.parent.name}/{path.name} has no notebook"
    check_down(mine, LEVEL[mine], list(imports(ast.parse(path.read_text()), f"calidiff_nb.{path.parent.name}")), f"{mine}.py")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_import_cells_hold_only_imports(path):
    """Otherwise the site cannot run them, and the exported module imports what a demo needs."""
    for code in code_of(path):
        body = ast.parse(code).body
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in body}
        assert kinds != {True, False}, f"{path.name}: this cell mixes imports with other code:\n{code[:300]}"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorials_use_the_public_names_only(path):
    for code in code_of(path):
        assert not re.search(r"^#\|\s*(default_exp|exports?\b)", code, re.M), f"{path.name} exports code: that belongs in nbs/"
        for module, names in imports(ast.parse(code)):
            if module.startswith("calidiff_nb"):
                assert not [n for n in [*module.split("."), *names] if n.startswith("_")], f"{path.name} uses a private name of {module}"
                assert ".".join(module.split(".")[1:3]) in LEVEL or module == "calidiff_nb", f"{path.name} imports {module}, which has no notebook"
