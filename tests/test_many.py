"""Large sets: piece by piece, going on where it stopped, one bad file costing itself, also on a cluster."""
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from calidiff_nb.calidiff.many import calibrate_many, open_images, part_file, segment_many
from calidiff_nb.calidiff.model import CaliDiff, CaliDiffConfig, judge_strangers
from calidiff_nb.diffusion.training import load_weights
from calidiff_nb.raters.folders import load_cohort, save_cohort
from calidiff_nb.raters.simulate import make_cohort

TINY = CaliDiffConfig(widths=(8, 16, 16), joint_steps=4, committee_steps=2, batch=4, steps=2, draws=1)


@pytest.fixture(scope="module")
def model():
    train, valid = make_cohort("balanced", 24, 64, seed=1).split((0.6, 0.4))
    m = CaliDiff.for_cohort(train, TINY)
    m.fit(train, valid, progress=False)
    return m


@pytest.fixture
def folder(tmp_path):
    c = make_cohort("unequal", 9, 64, seed=3)
    for i, name in enumerate(c.case_ids):
        for place, a in [("images", c.images[i, 0]), *((f"masks/r{j}", c.masks[i, j, 0]) for j in range(4))]:
            (tmp_path / "set" / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray((a.numpy() * 255).round().astype("uint8")).save(tmp_path / "set" / place / f"{name}.png")
    return tmp_path


def test_pieces_equal_the_whole(model, folder):
    many = calibrate_many(model, folder / "set", folder / "o", batch=4)
    cohort = load_cohort(folder / "set")
    whole = model.calibrate(cohort, judged=judge_strangers(model, cohort))
    parts = torch.cat([load_weights(part_file(folder / "o", i))[0]["pseudo_truth"] for i in range(3)])
    assert many.done == 9 and torch.allclose(parts, whole.pseudo_truth, atol=1e-4)


def test_an_interrupted_run_goes_on(model, folder, monkeypatch):
    done = []

    def stop(n, of):
        done.append(n)
        if n == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_many(model, folder / "set", folder / "o", batch=3, progress=stop)
    again = calibrate_many(model, folder / "set", folder / "o", batch=3)
    assert (again.before, again.done) == (6, 3)
    assert not list((folder / "o" / "parts").glob("*.tmp*")) and len(list((folder / "o" / "parts").iterdir())) == 3


def test_a_bad_case_costs_itself_and_is_remembered(model, folder):
    bad = sorted((folder / "set/images").iterdir())[4]
    bad.write_bytes(bad.read_bytes()[:60])
    first = calibrate_many(model, folder / "set", folder / "o", batch=3)
    assert first.done == 8 and list(first.failed) == [bad.stem] and bad.name in first.failed[bad.stem]
    assert calibrate_many(model, folder / "set", folder / "o", batch=3).failed == first.failed
    assert "1 could not be read" in str(first)


def test_results_of_other_settings_are_not_mixed(model, folder):
    calibrate_many(model, folder / "set", folder / "o", batch=4)
    with pytest.raises(ValueError, match="size: None, now 48"):
        calibrate_many(model, folder / "set", folder / "o", batch=4, size=48)


def test_a_saved_cohort_of_the_models_own_panel_is_not_judged_again(model, tmp_path):
    save_cohort(make_cohort("balanced", 5, 64, seed=8), tmp_path / "c.npz")
    many = calibrate_many(model, tmp_path / "c.npz", tmp_path / "o", full=True)
    tensors, about = load_weights(tmp_path / "o" / "verdict.safetensors")
    assert many.done == 5 and about["known"] and not tensors
    assert load_weights(part_file(tmp_path / "o", 0))[0]["aligned"].shape == (5, 4, 1, 64, 64)


def test_volumes_go_back_as_volumes(model, tmp_path):
    nib = pytest.importorskip("nibabel")
    (tmp_path / "i").mkdir()
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((40, 56, 3), dtype=np.float32), affine), tmp_path / "i" / "v.nii.gz")
    many = segment_many(model, tmp_path / "i", tmp_path / "o", n=2)
    back = nib.load(tmp_path / "o" / "masks" / "v.nii.gz")
    assert many.done == 3 and back.shape == (40, 56, 3) and np.allclose(back.affine, affine)


def test_pictures_of_any_size_and_colour(model, tmp_path):
    for name, shape in (("a", (37, 50)), ("b", (64, 64, 3))):
        Image.fromarray(np.full(shape, 90, np.uint8)).save(tmp_path / f"{name}.png")
    assert segment_many(model, tmp_path, tmp_path / "o", n=2).done == 2
    assert [c.image.shape for c in open_images(tmp_path)] == [(1, 37, 50), (1, 64, 64)]


def test_same_seed_same_samples_whatever_was_done_before(model, tmp_path):
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (48, 48), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    segment_many(model, tmp_path, tmp_path / "o", n=3, sampler="diffusion", batch=1)
    before = load_weights(part_file(tmp_path / "o", 1))[0]["samples/0"]
    part_file(tmp_path / "o", 1).unlink()
    segment_many(model, tmp_path, tmp_path / "o", n=3, sampler="diffusion", batch=1)
    assert torch.equal(load_weights(part_file(tmp_path / "o", 1))[0]["samples/0"], before)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra [dist])")
def test_a_cluster_gives_the_same(model, folder):
    import ray
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, include_dashboard=False, log_to_driver=False)
        told = []
        many = calibrate_many(model, folder / "set", folder / "o", batch=2, progress=lambda n, of: told.append((n, of)), address=cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()
    calibrate_many(model, folder / "set", folder / "p", batch=2)
    assert many.done == 9 and told[-1] == (5, 5)
    for i in range(5):
        a, b = (load_weights(part_file(folder / x, i))[0] for x in "op")
        assert torch.allclose(a["pseudo_truth"], b["pseudo_truth"], atol=1e-4)
