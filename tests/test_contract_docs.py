"""Each public name says what it is, each parameter what it means, and its notebook shows it at work."""
import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p for p in (ROOT / "calidiff_nb").glob("*/*.py") if p.name != "__init__.py")
NOTEBOOKS = sorted((ROOT / "nbs").glob("*/[0-9]*.ipynb"))
TUTORIALS = sorted(p for p in (ROOT / "tutorials").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
SKIPPED = {".venv", ".git", "build", "dist", "_docs", "_proc", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache", "demo-report", "runs"}
TEXTS = sorted(p for kind in ("*.py", "*.ipynb", "*.md", "*.toml", "*.yml", "*.yaml", "*.ini", "*.cff", "*.txt", "run", "Makefile") for p in ROOT.rglob(kind)
               if p.is_file() and not SKIPPED & set(p.relative_to(ROOT).parts) and ".egg-info" not in str(p))
module_name = {"ids": lambda p: f"{p.parent.name}.{p.stem}"}


def comments(source):
    """Line number -> comment, of every comment in a module."""
    return {t.start[0]: t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}


def exported(tree):
    """The names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [e.value for e in node.value.elts]
    return []


def public(tree):
    """(name, node) of each public function, class, method and constant."""
    names = set(exported(tree))
    for node in tree.body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and node.name in names:
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{m.name}", m) for m in node.body if isinstance(m, FUNCTION) and (not m.name.startswith("_") or m.name == "__init__"))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id in names:
                yield target.id, node


def said(node, name, notes, doc):
    """Does a comment on these lines, or the docstring by name, tell about it?"""
    return any(line in notes for line in range(node.lineno, node.end_lineno + 1)) or re.search(rf"\b{re.escape(name)}\b", doc)


def gaps_of_function(name, node, notes, outer):
    """What the words about a function lack."""
    doc = ast.get_docstring(node) or ""
    overload = any("property" in ast.unparse(d) or ".setter" in ast.unparse(d) for d in node.decorator_list)
    if not doc and not name.endswith(".__init__"):
        yield f"{name}: no docstring"
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    for a in arguments:
        if a.arg in ("self", "cls"):
            continue
        if a.annotation is None:
            yield f"{name}({a.arg}): no annotation"
        if not said(a, a.arg, notes, f"{doc} {outer}"):
            yield f"{name}({a.arg}): no comment behind it"
        if a.annotation is not None and bare_tensor(a.annotation):
            yield f"{name}({a.arg}): a bare Tensor; write its shape, as in Float[Tensor, 'b h w']"
    if node.returns is None and not name.endswith(".__init__"):
        yield f"{name}: no return annotation" if not overload else f"{name}: a property without an annotation"
    elif node.returns is not None and bare_tensor(node.returns):
        yield f"{name}: returns a bare Tensor; write its shape"


def bare_tensor(annotation):
    """Is a Tensor named without a shape, directly, in a union or in a tuple or list? (Not inside dict or Callable.)"""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    match annotation:
        case ast.Name(id="Tensor") | ast.Attribute(attr="Tensor"):
            return True
        case ast.BinOp(left=left, right=right):
            return bare_tensor(left) or bare_tensor(right)
    return False


def gaps(path):
    """Everything the words about a module's public names lack."""
    source = path.read_text()
    tree, notes = ast.parse(source), comments(source)
    notes = {line: text for line, text in notes.items() if not text.startswith("# %%")}  # nbdev's own
    for name, node in public(tree):
        if isinstance(node, FUNCTION):
            owner = next((c for c in tree.body if isinstance(c, ast.ClassDef) and name.startswith(f"{c.name}.")), None)
            yield from gaps_of_function(name, node, notes, (ast.get_docstring(owner) or "") if owner and name.endswith("__init__") else "")
        elif isinstance(node, ast.ClassDef):
            doc = ast.get_docstring(node) or ""
            if not doc:
                yield f"{name}: no docstring"
            for field in (f for f in node.body if isinstance(f, ast.AnnAssign) and not f.target.id.startswith("_")):
                if not said(field, field.target.id, notes, doc):
                    yield f"{name}.{field.target.id}: no comment behind it"
                if bare_tensor(field.annotation):
                    yield f"{name}.{field.target.id}: a bare Tensor; write its shape"
        elif not any(line in notes for line in range(node.lineno - 1, node.end_lineno + 1)):
            yield f"{name}: no comment behind it or on the line above"


@pytest.mark.parametrize("path", MODULES, **module_name)
def test_public_names_are_documented(path):
    missing = list(gaps(path))
    if path.stem == "cli":  # it starts fast because the heavy modules, and so their types, come only when a verb needs them
        missing = [m for m in missing if "annotation" not in m]
    assert not missing, f"{path.parent.name}.{path.stem}, {len(missing)} gaps:\n  " + "\n  ".join(missing)


def shown_code(path):
    """The code cells of a notebook that are not exported."""
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not re.match(r"#\|\s*export", source):
            yield source


@pytest.fixture(scope="module")
def everywhere():
    """All that notebooks and tutorials show."""
    return "\n".join(code for p in [*NOTEBOOKS, *TUTORIALS] for code in shown_code(p))


def at_work(tree, shown):
    """Public names of a module that `shown` text uses, and those that these are made of: their types, constants and parts."""
    names = set(exported(tree))
    parts = {name: names & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | (names & set(re.findall(r"\w+", " ".join(
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isidentifier())))) for name, node in public(tree)}
    seen, queue = set(), [n for n in names if re.search(rf"\b{re.escape(n)}\b", shown)]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += [m for key, found in parts.items() if key.split(".")[0] == name for m in found]
    return seen


@pytest.mark.parametrize("path", MODULES, **module_name)
def test_public_names_are_shown_at_work(path, everywhere):
    """A cell of some notebook uses it, or uses what is made of it: nothing is exported that no reader meets."""
    tree = ast.parse(path.read_text())
    seen = at_work(tree, everywhere)
    if path.stem == "folders":  # readers of other people's layouts are shown at work where a stand-in can be written
        tests = (ROOT / "tests" / "test_folders.py").read_text()
        seen = seen | {n for n in exported(tree) if n.startswith("load_") and re.search(rf"\b{n}\b", tests)}
    idle = [n for n in exported(tree) if n not in seen]
    assert not idle, f"{path.parent.name}.{path.stem}: no notebook puts {', '.join(idle)} to work; show it with an assertion, or begin its name with _"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_reads_as_one(path):
    """A title with its promise, assertions that teach, limits, and the way on."""
    cells = json.loads(path.read_text())["cells"]
    prose = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    assert prose and re.match(r"# \S", prose[0]) and re.search(r"^> \S", prose[0], re.M), f"{path.name} must begin with `# Title` and a promise after `>`"
    text = "\n".join(prose)
    for part in ("## Where it breaks", "## Next"):
        assert re.search(rf"^{part}\b", text, re.M), f"{path.name} has no section `{part}`"
    assert re.search(r"\[(abstract|ours)\]", text) or int(path.stem[:2]) >= 30 or path.parent.name == "raters", f"{path.name} does not say what is [abstract] and what is [ours]"
    assert any(re.search(r"^\s*assert\b", code, re.M) for code in shown_code(path)), f"{path.name} asserts nothing"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_labelled_formulae_are_asserted(path):
    r"""Each formula with a label, \tag{x} or (21.2), has a cell that names the label and asserts."""
    cells = json.loads(path.read_text())["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    labels = []
    for formula in re.findall(r"\$\$(.+?)\$\$", prose, re.S):
        labels += re.findall(r"\\tag\{([^}]*)\}", formula)
        labels += [n for group in re.findall(r"\(((?:\d\d\.\d+)(?:,\s*\d\d\.\d+)*)\)\s*\$*$", formula.strip()) for n in re.split(r",\s*", group)]
    asserting = [code for code in shown_code(path) if re.search(r"^\s*assert\b", code, re.M)]
    open_ones = [label for label in labels if not any(re.search(rf"(?<![\w.]){re.escape(label)}(?!\w)", code) for code in asserting)]
    assert not open_ones, f"{path.name}: no asserting cell names {open_ones}; write `# {open_ones[0]}` beside the assertion that shows it"


def calls(tree):
    return ((ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call))


@pytest.mark.parametrize("path", MODULES, **module_name)
def test_library_has_manners(path):
    """No printing, no global seeds, no device by force, no asserts for the user's input."""
    tree = ast.parse(path.read_text())
    forked = [(n.lineno, n.end_lineno) for n in ast.walk(tree) if isinstance(n, ast.With) and any("fork_rng" in ast.unparse(i) for i in n.items)]
    for name, node in calls(tree):
        where = f"{path.parent.name}.{path.stem}, line {node.lineno}"
        assert name != "print" or path.stem == "cli", f"{where}: the library does not print"
        seeds = name in ("torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed") and not any(a <= node.lineno <= b for a, b in forked)
        assert not seeds, f"{where}: randomness comes in as a generator; a global seed disturbs everybody else's draws, unless inside torch.random.fork_rng"
        assert not name.endswith(".cuda"), f"{where}: .cuda() forces a device; use .to(device)"
    rude = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert not rude, f"{path.parent.name}.{path.stem}, lines {rude}: raise ValueError with a sentence instead of assert"


UNFIT = {  # spelt in pieces, so that this file does not find itself
    r"(?<![\w.])/(?:work|root|home|farm|Users)/": "a path of somebody's machine",
    r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|NotImplemented" + r"Error": "unfinished work",
    r"pickle\.lo" + r"ad\(|pickle\.lo" + r"ads\(|allow_pick" + r"le=True": "a pickle that would be executed",
    r"torch\.lo" + r"ad\((?![^\n]*weights_only=True)": "torch.load without weights_only=True",
}


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_unsafe_or_unfinished(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":  # what is written and what came out, without pictures
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells)
        text += "\n".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for c in cells for o in c.get("outputs", []))
    for pattern, what in UNFIT.items():
        found = re.search(pattern, text)
        assert not found, f"{path.relative_to(ROOT)} holds {what}: …{text[max(0, found.start() - 40):found.end() + 40]!r}…"
