"""A reader with no knowledge of the code finds any concept of the abstract from README in two clicks: a page, then a heading on it."""
import json
import re
from pathlib import Path

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
