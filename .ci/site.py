"""README.md from nbs/index.ipynb, and the site: python .ci/site.py [readme|docs]."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"


def from_top(markdown: str) -> str:
    """Links written in nbs/, as they are seen from the top level."""
    return re.sub(r"\]\((?!https?:|#|mailto:|\.\./)", "](nbs/", markdown).replace("](../", "](")


def readme() -> str:
    """The front page as Markdown."""
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.metadata["language_info"] = {"name": "python"}  # colours the code
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = "\n".join(line.rstrip() for line in body.splitlines() if not line.startswith("#|"))
    return re.sub(r"\n{3,}", "\n\n", from_top(body)).strip() + "\n"


def title_alone(nb) -> None:
    """The title cell split after its promise: nbdev turns the whole cell into front matter, and the rest would be lost."""
    from execnb.nbio import mk_cell

    for i, cell in enumerate(nb.cells):
        head = re.match(r"# [^\n]*\n+(?:>[^\n]*\n*)*", cell.source) if cell.cell_type == "markdown" else None
        if head:
            rest = cell.source[head.end():].strip()
            cell.source = head[0].strip()
            if rest:
                nb.cells.insert(i + 1, mk_cell(rest, "markdown"))
            return


def lenient(module: str, troubles: list[str]):
    """nbdev's processors, knowing the whole module beforehand and going on where one name cannot be described."""
    from nbdev.processors import FilterDefaults, exec_show_docs

    class Describe(exec_show_docs):
        def begin(self):
            super().begin()
            if hasattr(self, "k") and module:
                self.k.run_cell(f"from {module} import *")  # annotations may name what a later cell defines

        def __call__(self, cell):
            try:
                super().__call__(cell)
            except Exception as e:
                name = re.search(r"show_doc\((\w+(?:\.\w+)*)", cell.source)
                if not name:
                    raise
                troubles.append(f"{name[1]} has no reference: {type(e.__cause__).__name__}: {str(e.__cause__).splitlines()[0]}")
                self.k.exc, cell.source = None, ""

    class Filter(FilterDefaults):
        def base_procs(self):
            return [Describe if p is exec_show_docs else p for p in super().base_procs()]

    return Filter()


def processed(source: Path, target: Path) -> list[str]:
    """One library notebook with the reference of each exported name beside it; what could not be described."""
    from execnb.nbio import read_nb, write_nb

    nb, troubles = read_nb(source), []
    title_alone(nb)
    shelf, name = source.parent.name, source.stem.split("_", 1)[-1]
    lenient(f"calidiff_nb.{shelf}.{name}" if source.stem[0].isdigit() else "", troubles)(nb)
    for cell in nb.cells:
        if cell.cell_type == "raw":  # pages keep the names of their notebooks
            cell.source = re.sub(r"^output-file: .*\n", "", cell.source, flags=re.M)
    nb["metadata"].pop("widgets", None)  # preprocessing adds an empty one
    target.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, target)
    return [f"{source.relative_to(ROOT)}: {t}" for t in troubles]


def front_page(path: Path) -> None:
    """The index at the top of the site, links and all."""
    nb = json.loads(path.read_text())
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = from_top("".join(cell["source"]))
    (SITE / "index.ipynb").write_text(json.dumps(nb))
    path.unlink()


def gather() -> list[str]:
    """Everything the site is made from, in build/site; what could not be prepared."""
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    os.environ.update(IN_TEST="1", MPLBACKEND="Agg")
    os.chdir(ROOT)  # nbdev looks for its settings from here
    books = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    troubles = [t for p in books for t in processed(p, SITE / p.relative_to(ROOT))]
    for p in (ROOT / "nbs").rglob("*.png"):
        if ".ipynb_checkpoints" not in p.parts:
            shutil.copy(p, SITE / p.relative_to(ROOT))
    if (ROOT / "tutorials").is_dir():
        shutil.copytree(ROOT / "tutorials", SITE / "tutorials", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_*"))
    for name in ("CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, SITE / name)
    (SITE / "_quarto.yml").write_text((ROOT / "_quarto.yml").read_text().replace("nbs/index.ipynb", "index.ipynb"))
    front_page(SITE / "nbs" / "index.ipynb")
    return troubles


def docs() -> int:
    """Render the site, by Quarto where it is, else by smalldocs."""
    troubles = gather()
    quarto = shutil.which("quarto")
    tool = [quarto, "render", "--no-execute"] if quarto else [str(Path(sys.executable).parent / "smalldocs"), "render", "--quiet"]
    print(f"rendering with {Path(tool[0]).name}" + ("" if quarto else " (Quarto is not on the PATH)"), flush=True)
    code = subprocess.run([*tool, "."], cwd=SITE).returncode
    pages = sorted((SITE / "_docs").rglob("*.html"))
    for trouble in troubles:
        print(f"note: {trouble}")
    print(f"{len(pages)} pages; start at {(SITE / '_docs' / 'index.html').relative_to(ROOT)}")
    return code or int(not pages)


if __name__ == "__main__":
    if sys.argv[1:] == ["readme"]:
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    elif sys.argv[1:] == ["docs"]:
        sys.exit(docs())
    else:
        sys.exit(__doc__)
