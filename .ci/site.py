"""README.md from nbs/index.ipynb, and the site: python .ci/site.py [readme|docs]."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def readme() -> str:
    """The front page as Markdown, its links seen from the top level."""
    from nbconvert import MarkdownExporter

    body, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    body = "\n".join(line.rstrip() for line in body.splitlines() if not line.startswith("#|"))
    body = re.sub(r"\]\((?!https?:|#|\.\./)", "](nbs/", body).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def docs() -> None:
    """Render every notebook into build/site/_docs, by Quarto if it is there, else by smalldocs."""
    site = ROOT / "build" / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    for name in ("nbs", "tutorials"):
        shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_*"))
    for name in ("_quarto.yml", "CITATION.cff"):
        shutil.copy(ROOT / name, site / name)
    tool = ["quarto", "render"] if shutil.which("quarto") else [str(Path(sys.executable).parent / "smalldocs"), "render"]
    print(f"rendering with {Path(tool[0]).name}")
    subprocess.run([*tool, "."], cwd=site, check=True)
    pages = sorted((site / "_docs").rglob("*.html"))
    print(f"{len(pages)} pages in {site / '_docs'}")


if __name__ == "__main__":
    if sys.argv[1:] == ["readme"]:
        (ROOT / "README.md").write_text(readme())
    elif sys.argv[1:] == ["docs"]:
        docs()
    else:
        sys.exit(__doc__)
