"""README.md from nbs/index.ipynb, and the site: python .ci/site.py [readme|docs]."""
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

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


def outside_brackets(text: str, mark: str) -> int:
    """Where a mark stands outside brackets and quotes; -1: nowhere."""
    depth, quote = 0, ""
    for i, c in enumerate(text):
        if quote or c in "'\"":
            quote = c if not quote else "" if c == quote else quote
        elif c == mark and depth == 0:
            return i
        else:
            depth += (c in "([{") - (c in ")]}")
    return -1


def as_table(markdown: str) -> str:
    """The reference of a function, as nbdev writes it, with its parameters in a table."""
    block = re.search(r"```python\n(?:@\w+\n)*(?:def|class) (\w+)\(\n(.*?)\n\)(?:->(.*?))?:?(?: # (.*?))?\n```", markdown, re.S)
    if not block:
        return markdown
    plain = lambda t: "`" + re.sub(r"\b(jaxtyping|torch\._C|collections\.abc|typing|pathlib)\.", "", t.strip()).replace("`", "").replace(" | ", " or ").replace("|", "∣") + "`" if t.strip() else ""
    words = lambda t: re.sub(r"(?<!\\)\|", "∣", t.strip())
    rows, given = [], []
    for line in block[2].split("\n"):
        code, _, said = line.strip().partition(" # ")
        code = code.rstrip().removesuffix(",")
        at = outside_brackets(code, "=")
        left, default = (code, "") if at < 0 else (code[:at], code[at + 1:])
        name, _, kind = left.partition(":")
        rows.append(f"| `{name.strip()}` | {plain(kind)} | {plain(default)} | {words(said)} |")
        given.append(name.strip() + (f"={default.strip()}" if default else ""))
    if block[3] and block[3].strip() not in ("None", ""):
        rows.append(f"| *returns* | {plain(block[3])} | | {words(block[4] or '')} |")
    table = "\n".join(["| parameter | type | default | what it is |", "|---|---|---|---|", *rows])
    rest = markdown[block.end():].strip()
    return markdown[: block.start()] + f"```python\n{block[1]}({', '.join(given)})\n```\n\n{rest}\n\n{table}\n"


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
        for output in cell.get("outputs", []) if "show_doc(" in cell.source else ():
            told = output.get("data", {}).get("text/markdown")
            if told:
                output["data"]["text/markdown"] = as_table("".join(told)).splitlines(keepends=True)
    nb["metadata"].pop("widgets", None)  # preprocessing adds an empty one
    target.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, target)
    return [f"{source.relative_to(ROOT)}: {t}" for t in troubles]


def without_answers() -> None:
    """The exercises as a student gets them: whoever reads the site shall not stumble over the solutions."""
    from calidiff_nb.explore.course import notebook_text, read_notebook, student_version

    for path in (SITE / "tutorials" / "exercises").glob("*.ipynb"):
        path.write_text(notebook_text(student_version(read_notebook(path), "ada")), encoding="utf-8")


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
        without_answers()
    for name in ("CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "styles.css"):
        shutil.copy(ROOT / name, SITE / name)
    (SITE / "_quarto.yml").write_text((ROOT / "_quarto.yml").read_text().replace("nbs/index.ipynb", "index.ipynb"))
    front_page(SITE / "nbs" / "index.ipynb")
    return troubles


def broken_links(folder: Path) -> list[str]:
    """Links, pictures and scripts of rendered pages that lead to no file or to no heading of this site."""
    pages = {p.resolve(): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.html"))}
    anchors = {p: set(re.findall(r"""\b(?:id|name)=["']([^"']+)["']""", text)) for p, text in pages.items()}
    broken = []
    for page, text in pages.items():
        text = re.sub(r"<(script|style)\b[^>]*>.*?</\1>|srcdoc=\"[^\"]*\"", "", text, flags=re.S)
        for link in sorted(set(re.findall(r"""<(?:a|img|link|script|source)\b[^>]*?\b(?:href|src)=["']([^"']*)["']""", text))):
            if re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.I):
                continue
            place, _, anchor = unquote(unescape(link)).partition("#")
            target = (page.parent / place.partition("?")[0]).resolve() if place else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                broken.append(f"{page.relative_to(folder.resolve())}: {link} leads nowhere")
            elif anchor and target in anchors and anchor not in anchors[target] | {"top"}:
                broken.append(f"{page.relative_to(folder.resolve())}: {link} has no such heading")
    return broken


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
    broken = broken_links(SITE / "_docs")
    for link in broken:
        print(f"broken link: {link}")
    print(f"{len(pages)} pages; start at {(SITE / '_docs' / 'index.html').relative_to(ROOT)}")
    return code or int(not pages or bool(broken))


if __name__ == "__main__":
    if sys.argv[1:] == ["readme"]:
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    elif sys.argv[1:] == ["docs"]:
        sys.exit(docs())
    else:
        sys.exit(__doc__)
