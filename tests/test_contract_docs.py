"""Each public name says what it is, each parameter what it means, and a notebook uses it."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p for p in (ROOT / "calidiff_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
TRACKED = [p for pattern in ("*.py", "*.ipynb", "*.md", "*.toml", "*.yml", "*.ini", "*.cff") for p in ROOT.rglob(pattern) if not {".venv", "build", "_docs", "_proc", ".ipynb_checkpoints", ".git"} & set(p.parts)]


def definitions(path):
    """Public functions and classes of a module, with public methods."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_public_names_are_documented(path):
    lines, missing = path.read_text().splitlines(), []
    for name, node in definitions(path):
        if not ast.get_docstring(node):
            missing.append(f"{name}: docstring")
        if isinstance(node, ast.FunctionDef):
            for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs:
                if a.arg in ("self", "cls"):
                    continue
                if a.annotation is None and path.name != "cli.py":  # the command line imports the heavy modules only when they are needed
                    missing.append(f"{name}({a.arg}): annotation")
                if not name.split(".")[-1].startswith("_") and "#" not in lines[a.end_lineno - 1].split(a.arg, 1)[1]:
                    documented = re.search(rf"\b{a.arg}\b", ast.get_docstring(node) or "")
                    if not documented:
                        missing.append(f"{name}({a.arg}): comment")
    assert not missing, f"{path.name}: " + "; ".join(missing)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_public_names_are_used(path):
    """Outside their own definition, somewhere in a notebook, a test or another module."""
    folders = [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "tutorials").rglob("*.ipynb")]
    text = "\n".join("".join(c["source"]) for p in folders for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "code")
    text += "\n".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    unused = [n for n, _ in definitions(path) if "." not in n and len(re.findall(rf"\b{n}\b", text)) < 2]
    assert not unused, f"{path.name}: nobody uses {unused}"


@pytest.mark.parametrize("path", TRACKED, ids=lambda p: p.name)
def test_nothing_unsafe_or_unfinished(path):
    if path.name in ("test_contract_docs.py",):
        return
    text = path.read_text()
    assert not re.search(r"(?<![A-Za-z0-9_.])/(work|root|home)/", text), "a path of a machine"
    assert not re.search(r"\bTODO\b|\bFIXME\b|NotImplementedError", text), "something is unfinished"
    for call in re.findall(r"torch\.load\([^\n]*", text):
        assert "weights_only=True" in call, call
    assert not re.search(r"pickle\.load\(|allow_pickle=True", text), "a pickle would be executed"
