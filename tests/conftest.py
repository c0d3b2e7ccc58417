"""Every annotated shape and dtype of the package is checked while the tests run."""
import os

from jaxtyping import install_import_hook

hook = install_import_hook("calidiff_nb", "typecheck.check")  # before anything of the package is imported
hook.__enter__()

import shutil  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

os.environ.setdefault("CALIDIFF_FAST", "1")  # tutorials and demos in their small form
os.environ.setdefault("MPLBACKEND", "Agg")  # no windows


TOOK = pytest.StashKey()  # tutorial -> (declared, measured) seconds of the processor


def pytest_configure(config):
    config.stash[TOOK] = {}


@pytest.fixture
def took(request):
    """Where a tutorial writes down what it took."""
    return request.config.stash[TOOK]


def pytest_terminal_summary(terminalreporter, config):
    """What each tutorial declares, and what it took here."""
    rows = config.stash[TOOK]
    if rows:
        terminalreporter.section("tutorials: seconds of the processor")
        for name, (declared, measured) in sorted(rows.items()):
            terminalreporter.write_line(f"{name:18} declared {declared:4d}  measured {measured:6.1f}")
        terminalreporter.write_line(f"{'together':18} declared {sum(d for d, _ in rows.values()):4d}  measured {sum(m for _, m in rows.values()):6.1f}")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config, items):
    chromium = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    reasons = {
        "slow": None if config.getoption("--slow") else "takes minutes: run with --slow",
        "gpu": None if torch.cuda.is_available() else "no GPU here",
        "browser": None if chromium else "no Chromium here: apt-get install chromium",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
