"""A reader with no knowledge of the code finds any concept of the abstract from README in two clicks: a page, then a heading on it; and no link leads nowhere."""
import importlib.util
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLICKS = {  # words of the abstract -> page linked from README, heading on it
    "joint distribution": ("nbs/calidiff/20_inverse.ipynb", "The joint loss"),
    "shared-parameter inverse diffusion": ("nbs/calidiff/20_inverse.ipynb", "Folding: many raters, one network"),
    "normalises initial biases": ("nbs/calidiff/20_inverse.ipynb", "Normalising an annotation"),
    "expertness": ("nbs/calidiff/21_expertness.ipynb", "Expertness, with intervals"),
    "Expertness Consistent Alignment": ("nbs/calidiff/22_alignment.ipynb", "Whereto, and who: the point of balance"),
    "where confidence is high": ("nbs/calidiff/22_alignment.ipynb", "Where: confidence of the others"),
    "Committee-based Endogenous Knowledge Learning": ("nbs/calidiff/25_adversary.ipynb", "Committee-based Endogenous Knowledge Learning: the critic and its game"),
    "Cross-Expert Fusion": ("nbs/calidiff/23_fusion.ipynb", "Cross-Expert Fusion: attention that starts there"),
    "Implicit Consensus Inference": ("nbs/calidiff/24_consensus.ipynb", "Implicit Consensus Inference: the committee's own conclusion"),
    "adversarial soft supervision": ("nbs/calidiff/25_adversary.ipynb", "Soft targets"),
    "pseudo-ground truth": ("nbs/calidiff/25_adversary.ipynb", "Pseudo-ground truth"),
}


@pytest.mark.parametrize("words", CLICKS)
def test_two_clicks(words):
    page, heading = CLICKS[words]
    readme = (ROOT / "README.md").read_text()
    assert words.lower() in readme.lower(), f"README does not say «{words}»"
    assert re.search(rf"\]\({re.escape(page)}\)", readme), f"README has no link to {page}"
    headings = [line.lstrip("# ") for c in json.loads((ROOT / page).read_text())["cells"] if c["cell_type"] == "markdown" for line in "".join(c["source"]).splitlines() if line.startswith("## ")]
    assert heading in headings, f"{page} has no heading «{heading}»; it has: {', '.join(headings)}"


def prose(path):
    """The Markdown of a page or of a notebook's cells, without code."""
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def headings(path):
    """What a link may name after `#`, as Jupyter, GitHub and Quarto write it."""
    lines = [line.lstrip("# ").strip() for line in prose(path).splitlines() if line.startswith("#")]
    return {form for t in lines for form in (t.replace(" ", "-"), re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-"))}


PAGES = sorted(p for p in [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "tutorials").rglob("*.ipynb"), *ROOT.glob("*.md"), *(ROOT / "calidiff_nb").rglob("*.md")] if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^()\s]+(?:\([^()]*\))?)[^)]*\)", prose(path)):
        if re.match(r"[a-z][a-z0-9+.-]*:", link, re.I):
            continue
        place, _, anchor = unquote(link).partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), f"{path.name} links to {link}, which does not exist"
        assert not anchor or target.suffix not in (".md", ".ipynb") or anchor in headings(target), f"{path.name} links to {link}; {target.name} has no such heading"


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_of_the_project", ROOT / ".ci" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_tells_its_broken_links(site, tmp_path):
    (tmp_path / "a.html").write_text('<h2 id="here">x</h2><a href="#here">1</a><a href="b.html#there">2</a><a href="https://example.org">3</a><img src="b.html">')
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    assert site.broken_links(tmp_path) == []
    (tmp_path / "b.html").write_text('<a href="c.html">1</a><a href="a.html#nobody">2</a>')
    assert [b.split(": ")[1] for b in site.broken_links(tmp_path)] == ["b.html#there has no such heading", "a.html#nobody has no such heading", "c.html leads nowhere"]


def test_the_reference_is_a_table(site):
    told = site.as_table("### f\n\n```python\ndef f(\n    x:Float[Tensor, 'b *rest'], # clean\n    eps:jaxtyping.Float[Tensor, 'b h=1'] | None=None, # a|b\n)->int: # how many\n```\n\n*Do it.*")
    assert "f(x, eps=None)" in told and "| `eps` | `Float[Tensor, 'b h=1'] or None` | `None` | a∣b |" in told and "| *returns* | `int` | | how many |" in told and "*Do it.*" in told
    assert site.as_table("no function") == "no function"


def test_the_site_shows_no_solutions(site, tmp_path, monkeypatch):
    place = tmp_path / "tutorials" / "exercises"
    place.mkdir(parents=True)
    source = ROOT / "tutorials" / "exercises" / "E1_forward.ipynb"
    (place / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(site, "SITE", tmp_path)
    site.without_answers()
    text = (place / source.name).read_text(encoding="utf-8")
    assert "BEGIN SOLUTION" in source.read_text(encoding="utf-8") and "BEGIN SOLUTION" not in text and "BEGIN HIDDEN" not in text and "YOUR CODE HERE" in text
