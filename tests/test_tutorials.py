"""Every tutorial runs from top to bottom in a real kernel, within what it promises."""
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted(p for p in (ROOT / "tutorials").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs(path, monkeypatch):
    monkeypatch.setenv("CALIDIFF_FAST", "1")
    nb = nbformat.read(path, 4)
    promise = int(re.search(r"cpu_seconds:\s*(\d+)", nb.cells[0].source)[1])
    limit = max(60, 3 * promise)  # a kernel alone takes seconds to start on a busy machine
    nbclient.NotebookClient(nb, timeout=limit, kernel_name="python3", store_widget_state=False, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert not [o for c in nb.cells for o in c.get("outputs", []) if o["output_type"] == "error"]


def test_there_are_tutorials():
    assert TUTORIALS
