"""One version, one name, one list of pages, one front page."""
import configparser
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import calidiff_nb

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MUST_MIRROR = {  # what an nbdev that reads only pyproject.toml must find there to do the same
    "lib_name", "lib_path", "version", "title", "branch", "nbs_path", "doc_path", "readme_nb", "recursive", "tst_flags", "update_pyproject",
    "allowed_cell_metadata_keys", "allowed_metadata_keys", "custom_sidebar", "put_version_in_init", "clean_ids", "clear_all", "jupyter_hooks",
}


def settings():
    c = configparser.ConfigParser()
    c.read(ROOT / "settings.ini")
    return c["DEFAULT"]


def loaded(name, path):
    """A script outside the package, as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(requirements):
    return {re.split(r"[\[=<>~! ]", d)[0].lower() for d in requirements}


def test_one_version():
    cff = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    news = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    versions = {"settings.ini": settings()["version"], "[tool.nbdev]": PROJECT["tool"]["nbdev"]["version"], "__version__": calidiff_nb.__version__, "CITATION.cff": cff, "CHANGELOG.md": news}
    assert len(set(versions.values())) == 1, f"versions differ: {versions}"


def test_settings_are_mirrored():
    mirror = PROJECT["tool"]["nbdev"]
    assert MUST_MIRROR <= set(mirror), f"[tool.nbdev] lacks {MUST_MIRROR - set(mirror)}"
    for key, value in mirror.items():
        assert settings().get(key) == str(value), f"{key} is {settings().get(key)!r} in settings.ini and {value!r} in [tool.nbdev]"


def test_project_and_settings_agree():
    project, ini = PROJECT["project"], settings()
    assert project["name"] == ini["lib_name"] and project["description"] == ini["description"]
    assert project["keywords"] == ini["keywords"].split()
    assert project["requires-python"] == f">={ini['min_python']}"
    assert project["urls"]["Repository"] == ini["git_url"]
    assert project["urls"]["Documentation"] == ini["doc_host"] + ini["doc_baseurl"]


def test_entry_points_exist():
    module, name = PROJECT["project"]["scripts"]["calidiff"].split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
    assert PROJECT["project"]["entry-points"]["nbdev"] == {"calidiff_nb": "calidiff_nb._modidx:d"}


def test_every_direct_dependency_has_a_tested_version():
    pinned = names(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = names(PROJECT["project"]["dependencies"]) | names(d for extra in extras.values() for d in extra) - {"calidiff_nb"}
    assert wanted <= pinned, f"add to constraints.txt: {sorted(wanted - pinned)}"
    assert pinned - wanted <= {"setuptools"}, f"nothing asks for {sorted(pinned - wanted)}: take it out of constraints.txt"


def test_pins_do_not_contradict_each_other():
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
    tested = {k.lower(): v for k, v in tested.items()}
    run = loaded("run_script", ROOT / "run.py")
    hard = [d for extra in PROJECT["project"]["optional-dependencies"].values() for d in extra if "==" in d] + [run.PYLIDC]
    for name, version in (d.split("==") for d in hard):
        assert tested[name.lower()] == version, f"{name}: {version} is asked for, {tested[name.lower()]} was tested"
    assert f"torch>={run.OLDEST_TORCH[0]}.{run.OLDEST_TORCH[1]}" in PROJECT["project"]["dependencies"]


def test_site_lists_exactly_what_exists():
    listed = re.findall(r"(?:nbs|tutorials)/[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text())
    exist = {p.relative_to(ROOT).as_posix() for f in ("nbs", "tutorials") for p in (ROOT / f).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert len(listed) == len(set(listed)), "_quarto.yml lists a page twice"
    assert set(listed) >= exist, f"add to _quarto.yml: {sorted(exist - set(listed))}"
    assert set(listed) <= exist, f"listed in _quarto.yml but not there: {sorted(set(listed) - exist)}"


def test_readme_is_the_index():
    pytest.importorskip("nbconvert")
    builder = loaded("site_builder", ROOT / ".ci" / "site.py")
    assert (ROOT / "README.md").read_text(encoding="utf-8") == builder.readme(), "README.md is not nbs/index.ipynb: run make readme"


def test_readme_maps_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    unmapped = [p.name for p in sorted((ROOT / "nbs").glob("*/[0-9]*.ipynb")) if p.relative_to(ROOT).as_posix() not in text]
    assert not unmapped, f"the map in nbs/index.ipynb lacks {unmapped}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [x for x in links if not (ROOT / x).exists()]
