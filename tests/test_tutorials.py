"""Every tutorial runs from top to bottom in a real kernel, within three times what it promises."""
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted(p for p in (ROOT / "tutorials").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def promise(nb, name):
    """Seconds that the front matter of a tutorial declares, on two cores."""
    found = re.search(r"^\W*cpu_seconds\W*:\W*(\d+)", nb.cells[0].source, re.M)
    assert found, f"{name}: the first cell must declare its time, as in `cpu_seconds: 40`"
    return int(found[1])


def spent():
    """Seconds of the processor that ended child processes took, kernels among them; 0 on Windows."""
    now = os.times()
    return now.children_user + now.children_system


def test_there_are_tutorials():
    assert TUTORIALS, "tutorials/ is empty"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs(path, monkeypatch, took):
    monkeypatch.setenv("CALIDIFF_FAST", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits for its turn on a busy machine is not counted
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures go into the notebook
    nb = nbformat.read(path, 4)
    declared = promise(nb, path.name)
    limit = max(60, 3 * declared)  # a guard against a hang; a kernel alone takes seconds to start
    client = nbclient.NotebookClient(nb, timeout=limit, startup_timeout=120, kernel_name="python3", store_widget_state=False,
                                     resources={"metadata": {"path": str(path.parent)}})
    before = spent()
    client.execute()  # an error in a cell is raised here, with the cell
    took[path.stem] = declared, spent() - before
    assert spent() - before <= 3 * declared, f"{path.name} declares {declared} s of the processor and took {spent() - before:.0f}"
    assert [c for c in nb.cells if c.cell_type == "code"], f"{path.name} holds no code"
    noise = [o.text for c in nb.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert not noise, f"{path.name} warns or shows a progress bar: {noise[0][:300]}"
