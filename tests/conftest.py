"""Every annotated shape and dtype of the package is checked while the tests run."""
import os

from jaxtyping import install_import_hook

install_import_hook("calidiff_nb", "beartype.beartype").__enter__()  # before anything of the package is imported

import pytest  # noqa: E402
import torch  # noqa: E402

os.environ.setdefault("CALIDIFF_FAST", "1")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
