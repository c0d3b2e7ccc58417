"""Every layout is built in miniature, read, and damaged in six ways; nothing that lies on a disk is ever executed."""
import codecs
import os
import pickle
import pickletools
import tracemalloc
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from calidiff_nb.raters import folders
from calidiff_nb.raters.cases import Cohort
from calidiff_nb.raters.folders import (
    OPENERS,
    SIGNS,
    Collection,
    DataReport,
    StoredArray,
    Tally,
    as_image,
    as_mask,
    by_stem,
    check_data,
    cut_window,
    detect_layout,
    disc_and_cup,
    find_window,
    gleason_grades,
    iter_cohorts,
    load_cohort,
    load_folder,
    load_lidc_hdf5,
    load_lidc_pickle,
    load_lidc_slices,
    load_npc170,
    load_qubiq,
    load_riga,
    natural,
    need,
    open_cohort,
    open_folder,
    open_lidc_slices,
    open_qubiq,
    outline_to_masks,
    put_back,
    read_array,
    read_cohort,
    read_pickle,
    save_cohort,
    save_masks,
    shrink_by,
    stem,
    window_start,
)

h5py = pytest.importorskip("h5py")
nibabel = pytest.importorskip("nibabel")
SHARED = Path(__file__).resolve().parents[2] / "shared/data"
sample = pytest.mark.skipif(not SHARED.is_dir(), reason="no real samples here")


class Bomb:
    """Whoever executes this leaves a trace."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


# --- the layouts in miniature ------------------------------------------------------------------------------------------------------------


def disc(size=32, row=16, column=16, radius=8, value=255):
    return ((np.hypot(*(np.indices((size, size)) - np.array([row, column])[:, None, None])) < radius) * value).astype(np.uint8)


def grey(size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def nifti(path, array, zooms=(0.5, 0.7, 2.0)):
    """(row, column[, slice]) as a file that counts columns first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.swapaxes(array, 0, 1), np.diag([*zooms[: 3], 1.0])), path)
    return path


def arrays_h5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        for name, value in arrays.items():
            f[name] = value
    return path


@dataclass
class Stand:
    """A small data set and the places where it can be damaged."""

    path: Path  # what is opened
    shape: tuple  # cases, raters, structures
    image: Path  # one image file
    mask: Path  # one mask file of that image
    layout: str
    many: bool = True  # more files than these two


def make_folder(root):
    for n in ("a", "b", "c"):
        put(root / f"images/{n}.png", grey())
        for i, r in enumerate(("anna", "boris")):
            put(root / f"masks/{r}/{n}.png", disc(radius=7 + i))
    return Stand(root, (3, 2, 1), root / "images/b.png", root / "masks/anna/b.png", "folder")


def make_experts(root):
    for n in ("a", "b", "c"):
        put(root / f"images/{n}.png", grey())
        for i in (1, 2, 3):
            put(root / f"expert{i}/{n}.png", disc(radius=6 + i))
    return Stand(root, (3, 3, 1), root / "images/b.png", root / "expert1/b.png", "experts")


def make_lidc(root):
    for nodule, readers in (("LIDC-IDRI-0001/nodule-0", 4), ("LIDC-IDRI-0001/nodule-1", 2), ("LIDC-IDRI-0007/nodule-0", 1)):
        for s in range(3):
            put(root / nodule / f"images/slice-{s}.png", grey(128, s))
            for i in range(4):
                put(root / nodule / f"mask-{i}/slice-{s}.png", disc(128, 64, 64, 5 + s + i) * (i < readers and (s < 2 or i != 1)))
    first = root / "LIDC-IDRI-0001/nodule-0"
    return Stand(root, (3, 4, 1), first / "images/slice-1.png", first / "mask-0/slice-1.png", "lidc-slices")


def pickled(n=4, size=32, top=1.0, uid="1.2.{}"):
    return {f"k{i}": {"image": grey(size, i).astype(float) / 255 * top, "masks": [disc(size, radius=5 + r, value=1) for r in range(4)], "series_uid": uid.format(i // 2)} for i in range(n)}


def make_pickle(root):
    root.mkdir(exist_ok=True)
    (root / "d.pickle").write_bytes(pickle.dumps(pickled()))
    return Stand(root / "d.pickle", (4, 4, 1), root / "d.pickle", root / "d.pickle", "lidc-pickle", many=False)


def make_hdf5(root, last=True):
    root.mkdir(exist_ok=True)
    with h5py.File(root / "data_lidc.hdf5", "w") as f:
        for split, n in (("train", 3), ("val", 1), ("test", 1)):
            masks = np.stack([np.stack([disc(radius=5 + r + i, value=1) for r in range(4)]) for i in range(n)])
            g = f.create_group(split)
            g["images"], g["uids"] = np.stack([grey(32, i) / 255 - 0.5 for i in range(n)]), np.arange(n)
            g["labels"] = np.moveaxis(masks, 1, -1) if last else masks
    return Stand(root / "data_lidc.hdf5", (5, 4, 1), root / "data_lidc.hdf5", root / "data_lidc.hdf5", "lidc-hdf5", many=False)


def make_packed(root):
    root.mkdir(exist_ok=True)
    masks = np.stack([np.stack([disc(radius=5 + r + i, value=1) for r in range(3)]) for i in range(4)])
    np.savez(root / "bubil.npz", image=np.stack([grey(32, i) for i in range(4)]), masks_packed=np.packbits(masks, -1), raters=np.array(["P1", "P2", "P3"]), ids=np.array(list("abcd")), same_as_gold=np.array([0.0, 1.0, 0.0]))
    return Stand(root / "bubil.npz", (4, 2, 1), root / "bubil.npz", root / "bubil.npz", "packed", many=False)


def make_cimd(root):
    for n in range(3):
        put(root / f"p{n}/s0/image_{n}.png", grey())
        for i in range(4):
            put(root / f"p{n}/s0/label{i}_{n}.png", disc(radius=5 + i))
    return Stand(root, (3, 4, 1), root / "p1/s0/image_1.png", root / "p1/s0/label0_1.png", "cimd")


def make_mrnet(root):
    rows = ["imgName,maskName,label,rater"]
    for n in range(3):
        put(root / f"DiscRegion/{n}.png", np.stack([grey(32, c) for c in range(3)], -1))
        for r in range(1, 7):
            put(root / f"DiscMask/Rater{r}/{n}.png", np.maximum(disc(radius=9 + r % 2, value=128), disc(radius=4)))
        rows.append(f"DiscRegion\\{n}.png,DiscMask\\FinalLabel\\{n}.png,青,0")
    (root / "Glaucoma_multirater_train.csv").write_bytes("\n".join(rows).encode("gbk"))
    return Stand(root, (3, 6, 2), root / "DiscRegion/1.png", root / "DiscMask/Rater1/1.png", "riga-mrnet")


def photograph(radius=30, cup=14, width=3):
    plain = (np.indices((96, 96)).sum(0)[..., None] / 3 + [60, 30, 10]).astype(np.uint8)
    drawn = Image.fromarray(plain)
    for r in (radius, cup):
        ImageDraw.Draw(drawn).ellipse((48 - r, 48 - r, 48 + r, 48 + r), outline=(20, 230, 250), width=width)
    return plain, np.asarray(drawn)


def make_riga_raw(root):
    for n in (1, 2):
        put(root / f"MESSIDOR/image{n}prime.tif", photograph()[0])
        for i in range(1, 7):
            put(root / f"MESSIDOR/image{n}-{i}.tif", photograph(25 + i, 10 + i)[1])
    return Stand(root, (2, 6, 2), root / "MESSIDOR/image1prime.tif", root / "MESSIDOR/image1-1.tif", "riga-raw")


def make_refuge(root):
    for n in ("T0001", "T0002"):
        put(root / f"{n}/{n}_ci.png", np.stack([grey(32, c) for c in range(3)], -1))
        for r in range(1, 8):
            put(root / f"{n}/{n}_seg_disc_c_{r}.png", disc(radius=8 + r % 3))
            put(root / f"{n}/{n}_seg_cup_c_{r}.png", disc(radius=3 + r % 3))
    return Stand(root, (2, 7, 2), root / "T0001/T0001_ci.png", root / "T0001/T0001_seg_cup_c_1.png", "refuge")


def make_qubiq(root):
    for split, n in (("Training", 1), ("Training", 2), ("Validation", 3)):
        case = root / f"brain-tumor/{split}/case0{n}"
        nifti(case / "image.nii.gz", np.random.default_rng(n).normal(size=(24, 32, 1, 4)).astype(np.float32))
        for t in (1, 2):
            for r in (1, 2, 3):
                nifti(case / f"task0{t}_seg0{r}.nii.gz", disc(32, radius=4 + t + r, value=1)[:24, :, None])
    case = root / "brain-tumor/Training/case01"
    return Stand(root / "brain-tumor", (3, 3, 2), case / "image.nii.gz", case / "task01_seg01.nii.gz", "qubiq")


def make_npc(root):
    def one(n, *more):
        shape = (*more, 32, 32)
        return {c: np.random.default_rng(n).random(shape) * 900 for c in ("t1", "t1c", "t2")} | {f"label_a{i}": np.broadcast_to(disc(radius=5 + i, value=1), shape).copy() for i in range(1, 5)}

    arrays_h5(root / "training_2d/Sample_0_slice_3.h5", **one(0))
    arrays_h5(root / "training_2d/Sample_0_slice_4.h5", **one(1))
    volume = one(2, 3)
    for i in range(1, 5):
        volume[f"label_a{i}"][0] = 0  # nobody marks the first slice
    arrays_h5(root / "validation/Sample_7.h5", **volume)
    first = root / "training_2d/Sample_0_slice_3.h5"
    return Stand(root, (4, 4, 1), first, first, "npc170")


def make_drive(root):
    for n in (21, 22):
        put(root / f"training/images/{n}_training.tif", np.stack([grey(32, c) for c in range(3)], -1))
        put(root / f"training/1st_manual/{n}_manual1.gif", disc())
        put(root / f"training/mask/{n}_training_mask.gif", disc(radius=15))
    put(root / "test/images/01_test.tif", np.stack([grey(32, c) for c in range(3)], -1))
    put(root / "test/1st_manual/01_manual1.gif", disc())
    put(root / "test/2nd_manual/01_manual2.gif", disc(radius=7))
    return Stand(root, (3, 2, 1), root / "test/images/01_test.tif", root / "test/2nd_manual/01_manual2.gif", "vessels")


def make_gleason(root):
    for n in ("slide001_core003", "slide001_core004", "slide002_core001"):
        put(root / f"Train Imgs/{n}.png", np.stack([grey(32, c) for c in range(3)], -1))
        for m in (1, 2, 3):
            if (n, m) != ("slide001_core004", 2):
                put(root / f"Maps{m}_T/{n}_classimg_nonconvex.png", np.maximum(disc(radius=9, value=3), disc(radius=4, value=4 + m % 2)))
    return Stand(root, (3, 3, 3), root / "Train Imgs/slide001_core003.png", root / "Maps1_T/slide001_core003_classimg_nonconvex.png", "gleason")


def make_cimd_as_published(root):
    """The examples in the authors' repository: data/{training,testing}/N/, masks as JPEG."""
    for split, n in (("training", 0), ("training", 13), ("testing", 7)):
        put(root / f"{split}/{n}/image_{n + 1}.jpg", grey())
        for i in range(4):
            put(root / f"{split}/{n}/label{i}_.jpg", disc(radius=6 + i))
    return Stand(root, (3, 4, 1), root / "training/13/image_14.jpg", root / "training/13/label0_.jpg", "cimd")


def make_folder_npy(root):
    for n in "abc":
        for folder, x in (("images", grey() / 255), ("masks/anna", disc(value=1)), ("masks/boris", disc(radius=7, value=1))):
            (root / folder).mkdir(parents=True, exist_ok=True)
            np.save(root / folder / f"{n}.npy", x)
    return Stand(root, (3, 2, 1), root / "images/b.npy", root / "masks/anna/b.npy", "folder")


def make_folder_nifti(root):
    for n in "abc":
        nifti(root / f"images/{n}.nii.gz", np.random.default_rng(0).normal(size=(24, 32)).astype(np.float32))
        for r in ("anna", "boris"):
            nifti(root / f"masks/{r}/{n}.nii.gz", disc(32, value=1)[:24])
    return Stand(root, (3, 2, 1), root / "images/b.nii.gz", root / "masks/anna/b.nii.gz", "folder")


def make_folder_tiff(root):
    for n in "abc":
        put(root / f"images/{n}.tif", grey().astype(np.uint16) * 257)
        for r in ("anna", "boris"):
            put(root / f"masks/{r}/{n}.tiff", disc())
    return Stand(root, (3, 2, 1), root / "images/b.tif", root / "masks/anna/b.tiff", "folder")


def make_chase(root):
    for eye in ("01L", "01R", "02L"):
        put(root / f"Image_{eye}.jpg", np.stack([grey()] * 3, -1))
        for ho in ("1stHO", "2ndHO"):
            put(root / f"Image_{eye}_{ho}.png", disc())
    return Stand(root, (3, 2, 1), root / "Image_01R.jpg", root / "Image_01R_1stHO.png", "vessels")


def make_stare(root):
    for n in (1, 2, 3):
        put(root / f"images/im000{n}.ppm", np.stack([grey()] * 3, -1))
        for who in ("ah", "vk"):
            put(root / f"labels-{who}/im000{n}.{who}.ppm", np.stack([disc()] * 3, -1))
    return Stand(root, (3, 2, 1), root / "images/im0002.ppm", root / "labels-ah/im0002.ah.ppm", "vessels")


def make_hdf5_raters_first(root):
    return make_hdf5(root, last=False)


def make_packed_lidc(root):
    root.mkdir(exist_ok=True)
    masks = np.stack([np.stack([disc(radius=5 + r + i, value=1) for r in range(4)]) for i in range(4)])
    masks[2, 2:] = 0
    np.savez(root / "lidc.npz", image=np.stack([grey(32, i) for i in range(4)]), masks_packed=np.packbits(masks, -1), patient=np.array([1, 1, 2, 3]), nodule=np.zeros(4, int), slice=np.arange(4), n_raters_nodule=np.array([4, 4, 2, 4]), spacing=np.array([0.7, 0.7, np.nan, 0.5]))
    return Stand(root / "lidc.npz", (4, 4, 1), root / "lidc.npz", root / "lidc.npz", "packed", many=False)


def matting():
    held = pickled(top=255.0, uid="{}_slice3")
    for v in held.values():
        v["alpha"] = v["image"].astype(np.uint8)
    return held


def make_matting(root):
    root.mkdir(exist_ok=True)
    (root / "lidc_attributes.pkl").write_bytes(pickle.dumps(matting()))
    return Stand(root / "lidc_attributes.pkl", (4, 4, 1), root / "lidc_attributes.pkl", root / "lidc_attributes.pkl", "lidc-pickle", many=False)


MAKERS = {f.__name__[5:]: f for f in (make_folder, make_experts, make_lidc, make_pickle, make_hdf5, make_packed, make_cimd, make_mrnet, make_riga_raw, make_refuge, make_qubiq, make_npc, make_drive, make_gleason)}
MAKERS |= {f.__name__[5:]: f for f in (make_cimd_as_published, make_folder_npy, make_folder_nifti, make_folder_tiff, make_chase, make_stare, make_hdf5_raters_first, make_packed_lidc, make_matting)}


@pytest.fixture(params=MAKERS)
def stand(request, tmp_path):
    return MAKERS[request.param](tmp_path / "data")


def test_every_layout_is_here(tmp_path):
    assert {make(tmp_path / name).layout for name, make in MAKERS.items()} == set(OPENERS)
    assert set(SIGNS) <= set(OPENERS)


def test_recognised_and_read(stand):
    assert detect_layout(stand.path) == stand.layout
    c = load_cohort(stand.path)
    assert (len(c), c.n_raters, c.n_structures) == stand.shape
    assert c.masks[c.present].flatten(2).any() and c.source and len(set(c.case_ids)) == len(c)
    assert "lidc" not in stand.layout or not c.raters_identified


def test_piece_by_piece_is_the_same(stand):
    whole, pieces = load_cohort(stand.path), list(iter_cohorts(stand.path, batch=2))
    assert all(len(p) <= 2 for p in pieces) and sum((p.case_ids for p in pieces), ()) == whole.case_ids
    assert torch.equal(torch.cat([p.masks for p in pieces]), whole.masks) and torch.equal(torch.cat([p.images for p in pieces]), whole.images)


def test_report_of_a_healthy_set(stand):
    report = check_data(stand.path)
    assert report.layout == stand.layout and not report.refused and report.cases >= stand.shape[0] and len(report.raters) == stand.shape[1]
    assert "refused" not in str(report) and "x" in report.facts[0]


def test_size_and_shrink(stand):
    c = load_cohort(stand.path, size=24)
    assert c.size == (24, 24)
    half = open_cohort(stand.path).cohort(size=16, shrink=2)
    assert half.size == (16, 16) and torch.allclose(half.spacing, 2 * c.spacing)


# --- six kinds of damage, in every layout ------------------------------------------------------------------------------------------------


def damage_inside(s: Stand, kind: str, trace: Path):
    """Damage a set that is one file of arrays."""
    if s.layout == "lidc-pickle":
        d = matting() if s.path.suffix == ".pkl" else pickled()
        broken = d["k1"]
        if kind == "shape":
            broken["masks"][2] = broken["masks"][2][:20]
        elif kind == "missing":
            del broken["masks"][3]
        elif kind == "labels":
            broken["masks"][2] = broken["masks"][2] * 7
        elif kind == "nan":
            broken["image"][3, 3] = np.nan
        elif kind == "bomb":
            broken["alpha"] = Bomb(trace)
        s.path.write_bytes(pickle.dumps(d))
    elif s.layout == "packed":
        with np.load(s.path) as z:
            d = {k: z[k] for k in z.files}
        if kind == "shape":
            d["masks_packed"] = d["masks_packed"][:, :, :20]
        elif kind == "missing":
            del d["raters" if "raters" in d else "n_raters_nodule"]
        elif kind == "labels":
            d["masks_packed"] = d["masks_packed"].astype(np.uint16)
        elif kind == "nan":
            d["image"] = np.full(d["image"].shape, np.nan)
        elif kind == "bomb":
            d["raters" if "raters" in d else "patient"] = np.array([Bomb(trace)] * 4, dtype=object)
        with open(s.path, "wb") as f:
            np.savez(f, **d)
    else:  # HDF5
        with h5py.File(s.image, "a") as f:
            g, image, label = (f["train"], "images", "labels") if s.layout == "lidc-hdf5" else (f, "t1", "label_a1")
            held, masks = g[image][()].astype(np.float64), g[label][()]
            if kind == "shape":
                masks = masks[:, :, :20] if s.layout == "lidc-hdf5" else masks[:20]
            elif kind == "labels":
                masks = masks * 7
            elif kind == "nan":
                held[..., 3, 3] = np.nan
            del g[image], g[label]
            g[image] = held
            if kind != "missing":
                g[label] = masks


def damage(s: Stand, kind: str, trace: Path):
    """Plant one defect; "... image" plants it into the image file instead of the mask file."""
    file, ending = (s.image if kind.endswith("image") else s.mask), ".nii.gz" if s.mask.name.endswith(".nii.gz") else s.mask.suffix
    kind = kind.removesuffix(" image")
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[: max(len(file.read_bytes()) // 2, 12)])
    elif kind == "bomb" and ending == ".npy":
        np.save(file, np.array([Bomb(trace)], dtype=object))
    elif kind == "bomb" and s.layout not in ("lidc-pickle", "packed"):
        file.write_bytes(pickle.dumps(Bomb(trace)))
    elif s.layout in ("lidc-pickle", "packed", "lidc-hdf5", "npc170"):
        damage_inside(s, kind, trace)
    elif kind == "missing":
        s.mask.unlink()
    elif ending == ".nii.gz":
        shape = nibabel.load(s.image).shape
        if kind == "nan":
            nibabel.save(nibabel.Nifti1Image(np.full(shape, np.nan, np.float32), np.eye(4)), s.image)
        else:
            nifti(s.mask, disc(32, value=1)[:20] if kind == "shape" else disc(32, value=7)[:24])
    elif ending == ".npy":
        old = np.load(s.mask)
        np.save(*((s.image, np.full(old.shape, np.nan)) if kind == "nan" else (s.mask, old[:20] if kind == "shape" else old * 7)))
    elif kind == "nan":
        Image.fromarray(np.full(np.asarray(Image.open(s.image)).shape[:2], np.nan, np.float32)).save(s.image, format="TIFF")
    else:
        old = np.asarray(Image.open(s.mask))
        new = old[:20] if kind == "shape" else np.where(old > 0, old // 2 + 30 + np.arange(old.shape[1]).reshape(-1, *[1] * (old.ndim - 2)) % 9, 0).astype(np.uint8)
        Image.fromarray(new).save(s.mask)


def one_sentence(text: str) -> bool:
    return 20 < len(text) < 500 and "\n" not in text and "Traceback" not in text


@pytest.mark.parametrize("kind", ["truncated", "truncated image", "shape", "labels", "nan", "bomb", "bomb image"])
def test_damage_is_refused_in_one_sentence(stand, kind, tmp_path):
    if stand.image == stand.mask and kind.endswith("image"):
        pytest.skip("one file holds both")
    if stand.layout == "riga-raw" and kind == "labels":
        pytest.skip("a photograph has no label values; see test_unreadable_outlines")
    trace = tmp_path / "executed"
    damage(stand, kind, trace)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as e:
            load_cohort(stand.path)
        report = check_data(stand.path)
    assert one_sentence(str(e.value)) and (stand.path.name in str(e.value) or stand.mask.name in str(e.value) or stand.image.name in str(e.value))
    assert report.refused and all(one_sentence(r) for r in report.refused)
    assert report.cases > 0 or not stand.many or stand.layout == "lidc-slices"  # the healthy cases are still counted
    assert not trace.exists()


def test_a_missing_rater_is_said(stand, tmp_path):
    damage(stand, "missing", tmp_path)
    if not stand.many:  # one file for all: not there is not readable, or one slot less in one slice
        if stand.layout == "lidc-pickle":
            c = load_cohort(stand.path)
            assert c.present.sum() == 15 and any("missing" in n for n in c.notes)
        else:
            assert one_sentence(check_data(stand.path).refused[0])
        return
    c = load_cohort(stand.path)
    assert len(c) == stand.shape[0] and (~c.present).any()
    assert any("absent" in n for n in c.notes) and "absent" in str(check_data(stand.path))


def test_the_bomb_is_real(tmp_path):
    """A test of the test: the file does ask for a command to be run."""
    asked = [(op.name, arg) for op, arg, _ in pickletools.genops(pickle.dumps(Bomb(tmp_path / "t")))]
    assert ("REDUCE", None) in asked and any(arg == "system" for _, arg in asked) and any(str(arg).startswith("touch ") for _, arg in asked)


# --- single files ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "tif", "bmp", "gif", "ppm", "npy", "nii", "nii.gz", "ppm.gz"])
def test_every_kind_of_file(tmp_path, ending):
    x, file = disc(32, 10, 20, 6), tmp_path / f"x.{ending}"
    if ending == "npy":
        np.save(file, x)
    elif ending.startswith("nii"):
        nifti(file, x)
    elif ending == "ppm.gz":
        import gzip

        Image.fromarray(x).save(tmp_path / "y.ppm")
        file.write_bytes(gzip.compress((tmp_path / "y.ppm").read_bytes()))
    else:
        Image.fromarray(x).save(file)
    assert np.array_equal(as_mask(read_array(file), file), x // 255) and stem(file) == "x"


def test_modes_of_pictures(tmp_path):
    x = disc()
    Image.fromarray(x > 0).save(tmp_path / "one.png")
    Image.fromarray(x).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(x).convert("P").save(tmp_path / "palette.png")
    assert all(np.array_equal(as_mask(read_array(tmp_path / f"{n}.png"), n), x // 255) for n in ("one", "rgba", "palette"))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: p.write_text("hello"), "cannot be read"),
        (lambda p: Image.fromarray(disc()).save(p, format="TIFF", save_all=True, append_images=[Image.fromarray(disc())]), "holds more than one"),
        (lambda p: Image.fromarray(np.full((4, 4), np.inf, np.float32)).save(p, format="TIFF"), "NaN or infinite"),
    ],
)
def test_files_that_are_no_picture(tmp_path, make, words):
    make(tmp_path / "x.png")
    with pytest.raises(ValueError, match=words):
        read_array(tmp_path / "x.png")


def test_an_object_array_is_not_executed(tmp_path):
    np.save(tmp_path / "x.npy", np.array([Bomb(tmp_path / "t")], dtype=object))
    with pytest.raises(ValueError, match="cannot be read"):
        read_array(tmp_path / "x.npy")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("values", [[0, 1], [0, 255], [0, 0], [1, 1], [255, 255], [0.0, 1.0], [False, True]])
def test_masks_that_are_masks(values):
    assert as_mask(np.array([values]), "m").tolist() == [[int(bool(v)) for v in values]]


@pytest.mark.parametrize("values", [[0, 2], [0, 128], [1, 255], [0, 1, 255], [0.0, 0.5], [-1, 0]])
def test_masks_that_are_not(values):
    with pytest.raises(ValueError, match="must hold 0 and 1, or 0 and 255"):
        as_mask(np.array([values]), "m")


def test_intensities():
    assert as_image(np.array([[0, 65535]], np.uint16)).tolist() == [[0, 1]]
    assert as_image(np.array([[0.25, 0.5]])).tolist() == [[0.25, 0.5]]
    assert as_image(np.array([[7.0, 7.0]])).tolist() == [[0, 0]]


def test_a_package_that_is_not_there(monkeypatch, tmp_path):
    nifti(tmp_path / "x.nii", disc())

    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(folders.importlib, "import_module", gone)
    with pytest.raises(ImportError, match=r"needs nibabel: pip install calidiff_nb\[data\]"):
        read_array(tmp_path / "x.nii")
    with pytest.raises(ImportError, match="h5py"):
        need("h5py")


@pytest.mark.parametrize("quality", [95, 75])
def test_masks_stored_as_jpeg(tmp_path, quality):
    s = make_folder(tmp_path)
    for file in (s.path / "masks/anna").iterdir():
        Image.fromarray(np.asarray(Image.open(file))).save(file.with_suffix(".jpg"), quality=quality)
        file.unlink()
    c = load_folder(s.path)
    assert all(np.array_equal(c.masks[i, 0, 0].numpy(), disc(radius=7, value=1)) for i in range(3))  # JPEG left traces, and none is left
    assert any("stored as JPEG" in n for n in c.notes)
    three = np.maximum(disc(radius=9, value=128), disc(radius=4))  # not two values that JPEG blurred, but three
    Image.fromarray(three).save(s.path / "masks/anna/a.jpg", quality=quality)
    with pytest.raises(ValueError, match="a.jpg must hold 0 and 1, or 0 and 255"):
        load_folder(s.path)


def test_natural_order():
    assert sorted(["case10", "case2", "b", "case1"], key=natural) == ["b", "case1", "case2", "case10"]


# --- pickles -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_harmless_pickles(tmp_path, protocol):
    held = {"a": np.arange(6).reshape(2, 3), "b": [np.float32(2.5), None, True, "text", b"bytes", {1, 2}, (1, 2)], "c": np.array(["x", "yy"]), "d": np.asfortranarray(np.eye(3)), 1: np.zeros(0)}
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(held, protocol=protocol))
    again = read_pickle(tmp_path / "x.pickle")
    assert again.keys() == held.keys() and all(np.array_equal(again[k], held[k]) for k in ("a", "c", "d", 1)) and again["b"] == held["b"]


def reduce_to(function, *args):
    class Trick:
        def __reduce__(self):
            return function, args

    return Trick()


@pytest.mark.parametrize("trick", [(eval, "1"), (exec, "1"), (getattr, "a", "upper"), (__import__, "os"), (open, "x"), (np.load, "x"), (np.fromfile, "x"), (torch.zeros, 1), (Path, "x"), (codecs.lookup, "latin1"), (codecs.escape_decode, b"x")], ids=lambda t: str(t[0])[:30])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_tricks_in_pickles(tmp_path, trick, protocol):
    (tmp_path / "x.pickle").write_bytes(pickle.dumps([np.zeros(3), reduce_to(*trick)], protocol=protocol))
    with pytest.raises(ValueError, match="was not read: it wants to run"):
        read_pickle(tmp_path / "x.pickle")


@pytest.mark.parametrize("raw", [b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.", b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.tofile\x93.", b"c_codecs\nencode\n(Vx\nVbz2\ntR.", b"\x80\x02K\x01K\x02.garbage"[:5], b"", b"hello", b"Pid\n."])
def test_hand_made_pickles(tmp_path, raw):
    (tmp_path / "x.pickle").write_bytes(raw)
    with pytest.raises(ValueError):
        read_pickle(tmp_path / "x.pickle")


def test_pixels_stay_in_the_file(tmp_path):
    held = {f"k{i}": {"image": np.random.default_rng(i).random((96, 96)), "masks": [disc(96, value=1)] * 4} for i in range(60)}
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(held, protocol=4))
    del held
    tracemalloc.start()
    again = read_pickle(tmp_path / "x.pickle")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.2 * (tmp_path / "x.pickle").stat().st_size  # 5 MB of pixels
    image = again["k7"]["image"]
    assert isinstance(image, StoredArray) and len(image) == 96 and len(list(image)) == 96
    assert np.array_equal(np.asarray(image), np.random.default_rng(7).random((96, 96))) and np.asarray(image, np.float32).dtype == np.float32
    (tmp_path / "x.pickle").write_bytes((tmp_path / "x.pickle").read_bytes()[:4000])
    with pytest.raises(ValueError, match="has changed since it was opened"):
        np.asarray(again["k50"]["image"])


def test_a_pickle_of_python_2(tmp_path):
    """Written by hand as Python 2 did: protocol 2, pixels in a BINSTRING."""
    for n in (32, 80):  # short strings are read at once, long ones when somebody looks
        x = disc(n, n // 2, n // 2, 8, value=1)
        raw = b"\x80\x02}U\x01a" + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        raw += b"(K\x01" + b"K" + bytes([n]) + b"K" + bytes([n]) + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        raw += b"T" + (n * n).to_bytes(4, "little") + x.tobytes() + b"tbs."
        (tmp_path / "x.pickle").write_bytes(raw)
        assert np.array_equal(read_pickle(tmp_path / "x.pickle")["a"], x)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_cut_pickle_is_never_half_read(tmp_path, protocol):
    raw = pickle.dumps(pickled(2, 80), protocol=protocol)
    for cut in range(1, len(raw) - 1, len(raw) // 25):
        (tmp_path / "x.pickle").write_bytes(raw[:cut])
        with pytest.raises(ValueError, match="cut short|was not read"):
            load_lidc_pickle(tmp_path / "x.pickle")


@pytest.mark.parametrize("shape, dtype", [((64, 65), "f8"), ((-64, -64), "f8"), ((64, 64), "f4"), ((64, 64), "O")])
def test_an_array_that_claims_another_length(tmp_path, shape, dtype):
    class Liar:
        def __reduce__(self):
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(dtype), False, bytes(64 * 64 * 8))

    (tmp_path / "x.pickle").write_bytes(pickle.dumps(Liar()))
    with pytest.raises(ValueError):
        np.asarray(read_pickle(tmp_path / "x.pickle"))


def test_nothing_but_arrays_is_changed(tmp_path):
    """BUILD may set attributes of whatever was named before it: of our own functions too."""
    raw = b"\x80\x02c_codecs\nencode\nN}U\x0c__defaults__U\x05rot13\x85s\x86b."
    (tmp_path / "x.pickle").write_bytes(raw)
    before = folders._latin1.__defaults__
    with pytest.raises(ValueError, match="wants to change something"):
        read_pickle(tmp_path / "x.pickle")
    assert folders._latin1.__defaults__ == before


def test_bytes_as_intensities_and_patients_of_a_pickle(tmp_path):
    held = pickled(top=255.0, uid="77_slice{}")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(held))
    c = load_lidc_pickle(tmp_path / "x.pkl", size=16)
    assert set(c.patient_ids) == {"77"} and torch.allclose(c.images[0, 0], torch.from_numpy(held["k0"]["image"][8:24, 8:24] / 255).float(), atol=1e-6)
    (tmp_path / "y.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="must hold a dict"):
        load_lidc_pickle(tmp_path / "y.pkl")


# --- one layout at a time ----------------------------------------------------------------------------------------------------------------


def test_both_orders_of_hdf5_are_the_same(tmp_path):
    a, b = (load_lidc_hdf5(make_hdf5(tmp_path / str(last), last).path) for last in (True, False))
    assert torch.equal(a.masks, b.masks) and torch.equal(a.images, b.images) and a.images.min() >= 0
    assert a.masks[0].sum((1, 2, 3)).diff().min() > 0 and a.masks[0, 3, 0].sum() == disc(radius=8, value=1).sum()


def test_lidc_padding_becomes_absence(tmp_path):
    root = make_lidc(tmp_path).path
    c = load_lidc_slices(root)
    assert c.present.sum(1).tolist() == [4, 2, 1] and c.patient_ids == ("LIDC-IDRI-0001",) * 2 + ("LIDC-IDRI-0007",)
    assert c.case_ids[0].endswith("slice-1")  # the largest on which everybody marked something: slot 2 left slice 2 out
    assert len(load_lidc_slices(root, readers=2)) == 2 and len(load_lidc_slices(root, slices="all")) == 9
    every = load_lidc_slices(root, slices="all")
    last = every.case_ids.index("LIDC-IDRI-0001/nodule-0/slice-2")
    assert every.present[last].all() and not every.masks[last, 1].any()  # saw it and marked nothing there
    report = check_data(root)
    assert "1 nodules with 1, 1 nodules with 2, 1 nodules with 4" in str(report) and "look like padding" in str(report)
    with pytest.raises(ValueError, match="slices must be"):
        open_lidc_slices(root, "some")


def test_lidc_is_cropped_around_the_middle(tmp_path):
    root = make_lidc(tmp_path).path
    for mask in root.glob("*/*/mask-*/*.png"):
        put(mask, np.roll(np.asarray(Image.open(mask)), (9, -7), (0, 1)))  # off the middle
    c = load_lidc_slices(root, size=40)
    whole = open_lidc_slices(root).cohort(size=128)
    assert torch.equal(c.images, whole.images[..., 44:84, 44:84]) and torch.equal(c.masks, whole.masks[..., 44:84, 44:84])


def test_own_folder_with_volumes_goes_there_and_back(tmp_path):
    volume, mask = np.random.default_rng(0).normal(size=(20, 26, 5)).astype(np.float32), np.zeros((20, 26, 5), np.uint8)
    mask[4:9, 15:24, 1:4] = 1
    affine = np.array([[-0.7, 0, 0, 10], [0, 0.5, 0, 20], [0, 0, 2.0, 30], [0, 0, 0, 1.0]])
    (tmp_path / "d/images").mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(np.swapaxes(volume, 0, 1), affine), tmp_path / "d/images/p.nii.gz")
    for r in ("a", "b"):
        (tmp_path / "d/masks" / r).mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(np.swapaxes(mask, 0, 1), affine), tmp_path / "d/masks" / r / "p.nii.gz")
    c = load_folder(tmp_path / "d", size=12)
    assert c.case_ids == ("p/z001", "p/z002", "p/z003") and set(c.patient_ids) == {"p"} and c.spacing[0].tolist() == pytest.approx([0.5, 0.7])
    (file,) = save_masks(c.masks[:, 0], c.case_ids, tmp_path / "out", like=open_folder(tmp_path / "d"))
    again = nibabel.load(file)
    assert np.array_equal(np.asarray(again.dataobj), np.swapaxes(mask, 0, 1)) and np.allclose(again.affine, affine) and np.allclose(again.header.get_zooms(), (0.7, 0.5, 2.0))


def test_masks_back_as_pictures(tmp_path):
    root = make_folder(tmp_path / "d").path
    c = load_folder(root, size=20)
    files = save_masks(c.masks[:, 1], c.case_ids, tmp_path / "out", like=open_folder(root))
    assert [f.name for f in files] == ["a.png", "b.png", "c.png"]
    assert all(np.array_equal(read_array(f), read_array(root / "masks/boris" / f.name)) for f in files)
    assert not list((tmp_path / "out").glob("*.part*"))
    plain = save_masks(c.masks[:, 1], c.case_ids, tmp_path / "plain")
    assert read_array(plain[0]).shape == (20, 20) and set(np.unique(read_array(plain[0]))) == {0, 255}
    half = open_folder(root).cohort(size=10, shrink=2)
    back = save_masks(half.masks[:, 1], half.case_ids, tmp_path / "half", like=open_folder(root), shrink=2)
    assert read_array(back[0]).shape == (32, 32) and abs((read_array(back[0]) > 0).sum() / (disc(radius=8) > 0).sum() - 1) < 0.1
    with pytest.raises(ValueError, match="is not among the cases"):
        save_masks(c.masks[:, 1], ("a", "b", "z"), tmp_path / "o2", like=open_folder(root))
    with pytest.raises(ValueError, match="need 3 names"):
        save_masks(c.masks[:, 1], ("a",), tmp_path / "o2")


def test_qubiq_nifti_comes_back_like_its_image(tmp_path):
    root = make_qubiq(tmp_path).path
    c = load_qubiq(root)
    assert c.images.shape == (3, 4, 24, 32) and c.structure_names == ("task 1", "task 2") and c.spacing[0].tolist() == pytest.approx([0.7, 0.5])
    files = save_masks(c.masks[:, 0], c.case_ids, tmp_path / "out", c.structure_names, like=open_qubiq(root))
    assert len(files) == 6 and nibabel.load(files[0]).shape == (32, 24, 1)
    assert np.array_equal(read_array(files[0]), read_array(root / "Training/case01/task01_seg01.nii.gz"))
    assert load_qubiq(root, task=2).n_structures == 1
    with pytest.raises(FileNotFoundError, match="task 9"):
        load_qubiq(root, task=9)
    nifti(tmp_path / "kidney/Training/case01/image.nii.gz", np.zeros((8, 8)))
    with pytest.raises(ValueError, match="several data sets"):
        load_qubiq(root.parent)


def test_npc_volumes_are_read_slice_by_slice(tmp_path):
    c = load_npc170(make_npc(tmp_path).path)
    assert [n.split("/")[-1] for n in c.case_ids] == ["Sample_0_slice_3", "Sample_0_slice_4", "z001", "z002"]
    assert c.patient_ids == ("Sample_0", "Sample_0", "Sample_7", "Sample_7") and c.images.shape[1] == 3


def test_riga_cup_lies_in_disc(tmp_path):
    for make in (make_mrnet, make_riga_raw):
        c = load_riga(make(tmp_path / make.__name__).path)
        assert c.structure_names == ("disc", "cup") and c.raters_identified
        assert (c.masks[:, :, 1] <= c.masks[:, :, 0]).all() and (c.masks[:, :, 1].sum((2, 3)) < c.masks[:, :, 0].sum((2, 3))).all()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_outlines_become_masks(width):
    plain, drawn = photograph(30, 14, width)
    masks = outline_to_masks(drawn, plain)
    for mask, radius in zip(masks, (30, 14)):
        assert mask.sum() == pytest.approx(np.pi * (radius + 0.5 - width / 2) ** 2, rel=0.06)


def test_unreadable_outlines(tmp_path):
    plain, _ = photograph()
    with pytest.raises(ValueError, match=r"found 0 outline\(s\) with another one within"):
        outline_to_masks(plain, plain)
    s = make_riga_raw(tmp_path)
    put(s.mask, plain)  # one rater drew nothing
    c = load_riga(s.path)
    assert not c.present[0, 0] and c.present.sum() == 11 and any("image1-1.tif: found 0 outline" in n for n in c.notes)


def test_grey_masks_and_grades():
    assert disc_and_cup(np.array([[0, 128, 255]]), "m").tolist() == [[[0, 1, 1]], [[0, 0, 1]]]
    with pytest.raises(ValueError, match="one grey"):
        disc_and_cup(np.array([[0, 100, 128, 255]]), "m")
    assert gleason_grades(np.array([[0, 1, 3, 4, 5, 6]]), "m").sum((1, 2)).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="grades 0 to 5"):
        gleason_grades(np.array([[30]]), "m")


def test_chase_and_stare(tmp_path):
    for eye in ("01L", "01R", "02L"):
        put(tmp_path / f"chase/Image_{eye}.jpg", np.stack([grey()] * 3, -1))
        for ho in ("1stHO", "2ndHO"):
            put(tmp_path / f"chase/Image_{eye}_{ho}.png", disc() > 0)
    c = load_cohort(tmp_path / "chase")
    assert c.present.all() and c.patient_ids == ("Image_01", "Image_01", "Image_02")
    put(tmp_path / "stare/images/im0001.ppm", np.stack([grey()] * 3, -1))
    for who in ("ah", "vk"):
        put(tmp_path / f"stare/labels-{who}/im0001.{who}.ppm", np.stack([disc()] * 3, -1))
    c = load_cohort(tmp_path / "stare")
    assert len(c) == 1 and c.present.all() and c.masks[0, 0].sum() == disc(value=1).sum()


def test_experts_without_images_are_told_what_to_do(tmp_path):
    for e in ("expert1", "expert2"):
        put(tmp_path / e / "m.png", disc())
    with pytest.raises(FileNotFoundError, match="put them into"):
        load_cohort(tmp_path)


# --- the reader's own folder, in detail --------------------------------------------------------------------------------------------------


def test_own_folder_notes(tmp_path):
    s = make_folder(tmp_path)
    put(tmp_path / "masks/anna/stray.png", disc())
    (tmp_path / "masks/carl").mkdir()
    (s.path / "masks/boris/a.png").unlink()
    put(tmp_path / "images/alone.png", grey())
    c = load_folder(tmp_path)
    said = " ".join(c.notes)
    assert c.rater_names == ("anna", "boris") and c.present.tolist() == [[True, False], [True, True], [True, True]]
    assert "1 masks without an image" in said and "carl: no mask at all" in said and "1 images without any mask" in said and "0 and 255 were read as 0 and 1" in said


def test_one_rater_is_a_warning_only(tmp_path):
    put(tmp_path / "images/a.png", grey())
    put(tmp_path / "masks/anna/a.png", disc())
    assert load_folder(tmp_path).n_raters == 1
    report = check_data(tmp_path)
    assert not report.refused and "only one rater" in str(report)


def test_sizes_that_differ(tmp_path):
    for n, (h, w) in {"a": (20, 40), "b": (32, 24)}.items():
        m = np.zeros((h, w), np.uint8)
        m[10:14, 12:18] = 255
        put(tmp_path / f"images/{n}.png", np.full((h, w), 77, np.uint8))
        put(tmp_path / f"masks/x/{n}.png", m)
    c = load_folder(tmp_path)
    assert c.size == (32, 40) and c.masks.sum((1, 2, 3, 4)).tolist() == [24, 24] and any("2 of 2 cases were cropped or filled up to 32x40" in n for n in c.notes)
    assert (c.images - 77 / 255).abs().max() < 1e-6  # the border is repeated, not black
    small = load_folder(tmp_path, size=4)
    assert any("cuts marks off" in n for n in small.notes)
    with pytest.raises(ValueError, match="give `size`"):
        list(iter_cohorts(tmp_path, batch=1))
    assert [len(p) for p in iter_cohorts(tmp_path, batch=1, size=16)] == [1, 1]


def test_grey_and_colour_do_not_mix(tmp_path):
    put(tmp_path / "images/a.png", grey())
    put(tmp_path / "images/b.png", np.stack([grey()] * 3, -1))
    for n in "ab":
        put(tmp_path / f"masks/x/{n}.png", disc())
    with pytest.raises(ValueError, match="same number of channels"):
        load_folder(tmp_path)


def test_two_files_of_one_name(tmp_path):
    s = make_folder(tmp_path)
    put(tmp_path / "images/a.tif", grey())
    with pytest.raises(ValueError, match="two files called a"):
        load_folder(s.path)
    assert by_stem(tmp_path / "none") == {}


@pytest.mark.parametrize(
    "prepare, error, words",
    [
        (lambda p: None, FileNotFoundError, "there is nothing at"),
        (lambda p: p.mkdir(), ValueError, "is empty"),
        (lambda p: put(p / "scan.png", grey()), ValueError, "laid out in no way known here"),
        (lambda p: p.write_text("x"), ValueError, "a file of an unknown kind"),
        (lambda p: (put(p / "images/a.png", grey()), (p / "masks").mkdir()), FileNotFoundError, "found 1 images and 0 raters"),
        (lambda p: (put(p / "images/a.png", grey()), put(p / "masks/x/b.png", disc())), ValueError, "must have the names of their images"),
    ],
)
def test_wrong_paths(tmp_path, prepare, error, words):
    prepare(tmp_path / "data")
    with pytest.raises(error, match=words):
        load_cohort(tmp_path / "data")
    report = check_data(tmp_path / "data")
    assert isinstance(report, DataReport) and report.refused and one_sentence(report.refused[0])


# --- windows -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("have, want", [(40, 16), (16, 40), (15, 40), (33, 16), (20, 20)])
@pytest.mark.parametrize("centre", [0.0, 7.5, 15.0])
def test_windows_go_there_and_back(have, want, centre):
    start = window_start(have, want, centre)
    assert -(want - have) <= start <= 0 if want >= have else 0 <= start <= have - want
    x = np.random.default_rng(0).integers(1, 9, (2, have, have))
    cut = cut_window(x, (start, start), (want, want))
    assert cut.shape == (2, want, want)
    back = put_back(cut, (start, start), (have, have))
    assert back.shape == x.shape and np.array_equal(back[back > 0], x[back > 0]) and (back > 0).sum() == (cut > 0).sum()


def test_window_around_marks_or_middle():
    marked = np.zeros((40, 40), bool)
    marked[2:6, 30:38] = True
    assert find_window(marked, (8, 8)) == (0, 30) and find_window(marked, (8, 8), False) == (16, 16)
    assert find_window(np.zeros((40, 40), bool), (8, 8)) == (16, 16)


def test_shrinking_by_blocks():
    x = np.array([[0, 1], [1, 1]], np.uint8)
    assert shrink_by(x, 2, True).tolist() == [[1]] and shrink_by(np.array([[0, 1], [1, 0]], np.uint8), 2, True).tolist() == [[1]]
    assert shrink_by(x * 100, 2).tolist() == [[75]] and shrink_by(np.ones((5, 5), np.float32), 2).shape == (2, 2)
    with pytest.raises(ValueError, match="at least one pixel"):
        shrink_by(x, 3)


# --- saved cohorts -----------------------------------------------------------------------------------------------------------------------


def random_cohort(n=5, exact=True, truth=False):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(n, 1, 12, 10, generator=g)
    masks, present = (torch.rand(n, 3, 2, 12, 10, generator=g) < 0.3).to(torch.uint8), torch.rand(n, 3, generator=g) < 0.8
    present[0] = True
    extra = {"truth": masks[:, 0], "truth_prob": torch.rand(n, 2, 12, 10, generator=g)} if truth else {}
    masks = masks * present[:, :, None, None, None]
    return Cohort((images * 255).round() / 255 if exact else images, masks, present, tuple(f"é{i}" for i in range(n)), tuple("pqrst"[i % 5] for i in range(n)), torch.rand(n, 2, generator=g) + 0.1, ("a", "b", "c"), ("x", "y"), False, source="s", notes=("n",), **extra)


def test_saved_and_read_again(tmp_path):
    for i, c in enumerate((random_cohort(), random_cohort(truth=True))):
        save_cohort(c, tmp_path / f"{i}.npz")
        again = read_cohort(tmp_path / f"{i}.npz")
        assert again.content_hash() == c.content_hash() and (again.source, again.notes) == (c.source, c.notes)
        assert load_cohort(tmp_path / f"{i}.npz").content_hash() == c.content_hash()
    c = random_cohort(exact=False)
    save_cohort(c, tmp_path / "c.npz")
    again = read_cohort(tmp_path / "c.npz")
    assert (again.images - c.images).abs().max() < 1e-5 and torch.equal(again.masks, c.masks)


def test_pieces_are_joined(tmp_path):
    c = random_cohort(1030)
    save_cohort(c, tmp_path / "c.npz")
    assert read_cohort(tmp_path / "c.npz").content_hash() == c.content_hash()
    pieces = list(iter_cohorts(tmp_path / "c.npz", batch=400))
    assert [len(p) for p in pieces] == [400, 112, 400, 112, 6]
    save_cohort(iter(pieces), tmp_path / "d.npz")
    assert read_cohort(tmp_path / "d.npz").content_hash() == c.content_hash()
    with pytest.raises(ValueError, match="pieces of a cohort must have"):
        save_cohort([c, replace(c, rater_names=("u", "v", "w"))], tmp_path / "e.npz")
    with pytest.raises(ValueError, match="no case to save"):
        save_cohort([], tmp_path / "e.npz")
    with pytest.raises(ValueError, match="path must end in .npz; got study"):  # nobody could read it again
        save_cohort(c, tmp_path / "study")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.npz", "d.npz"]
    with pytest.raises(ValueError, match="batch must be"):
        next(iter_cohorts(tmp_path / "c.npz", batch=0))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_a_file_is_never_left(tmp_path, monkeypatch, error):
    save_cohort(random_cohort(), tmp_path / "c.npz")
    before = (tmp_path / "c.npz").read_bytes()

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(folders.np.lib.format, "write_array", stop)
    with pytest.raises(type(error)):
        save_cohort(random_cohort(7), tmp_path / "c.npz")
    assert (tmp_path / "c.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_renamed_into_place(tmp_path, monkeypatch):
    def stop(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(folders.os, "replace", stop)
    for write in (lambda: save_cohort(random_cohort(), tmp_path / "c.npz"), lambda: save_masks(random_cohort().masks[:, 0], tuple("abcde"), tmp_path, ("x", "y"))):
        with pytest.raises(OSError):
            write()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("cut", [0.5, 0.98])
def test_a_cut_cohort_is_named(tmp_path, cut):
    save_cohort(random_cohort(), tmp_path / "c.npz")
    raw = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "c.npz").write_bytes(raw[: int(len(raw) * cut)])
    with pytest.raises(ValueError, match="cut short"):
        load_cohort(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="cut short"):
        read_cohort(tmp_path / "c.npz")
    assert check_data(tmp_path / "c.npz").refused


@pytest.mark.parametrize("kind", ["shape", "missing", "labels", "nan", "bomb"])
def test_a_damaged_cohort_is_refused(tmp_path, kind):
    file, trace = tmp_path / "c.npz", tmp_path / "executed"
    save_cohort(random_cohort(truth=True), file)
    with np.load(file) as z:
        d = {k: z[k] for k in z.files}
    if kind == "shape":
        d["masks/0"] = d["masks/0"][:, :, :, :7]
    elif kind == "missing":
        del d["present/0"]
    elif kind == "labels":
        d["masks/0"] = d["masks/0"].astype(np.uint16)
    elif kind == "nan":
        d["truth_prob/0"] = d["truth_prob/0"] * np.nan
    else:
        d["case_ids/0"] = np.array([Bomb(trace)] * 5, dtype=object)
    np.savez(file, **d)
    for read in (load_cohort, lambda p: list(iter_cohorts(p))):
        with pytest.raises(ValueError) as e:
            read(file)
        assert one_sentence(str(e.value)) and "c.npz" in str(e.value)
    assert one_sentence(check_data(file).refused[0]) and not trace.exists()


@pytest.mark.parametrize("raw, words", [(b"imgName,maskName\nDiscRegion/0.png", "cut short"), (b"a,b\n1,2\n", "columns imgName, maskName"), (b"", "columns imgName, maskName")])
def test_a_damaged_table_is_refused(tmp_path, raw, words):
    s = make_mrnet(tmp_path)
    next(s.path.glob("*.csv")).write_bytes(raw)
    with pytest.raises(ValueError, match=words):
        load_cohort(s.path)
    assert check_data(s.path).refused


def test_a_flipped_bit_is_noticed(tmp_path):
    save_cohort(random_cohort(40), tmp_path / "c.npz")
    raw = bytearray((tmp_path / "c.npz").read_bytes())
    raw[len(raw) // 3] ^= 255
    (tmp_path / "c.npz").write_bytes(raw)
    with pytest.raises(ValueError, match="cut short"):
        load_cohort(tmp_path / "c.npz")


def test_report_of_a_saved_cohort(tmp_path):
    save_cohort(random_cohort(), tmp_path / "c.npz")
    report = check_data(tmp_path / "c.npz")
    assert report.layout == "cohort" and report.cases == 5 and report.raters == ("a", "b", "c")
    with pytest.raises(ValueError, match="load_cohort or iter_cohorts"):
        open_cohort(tmp_path / "c.npz")


# --- the report --------------------------------------------------------------------------------------------------------------------------


def test_copies_and_silence_are_noticed(tmp_path):
    s = make_folder(tmp_path)
    for n in "abc":
        put(tmp_path / f"masks/clara/{n}.png", disc(radius=7))
        put(tmp_path / f"masks/dora/{n}.png", disc() * 0)
    text = str(check_data(s.path))
    assert "anna and clara drew the very same mask in 3 of 3" in text and "dora marks nothing in 100% of the cases" in text
    assert "padding" not in text  # named persons who mark less and less are persons
    assert "anna and boris" not in text and "boris and clara" not in text


def test_padding_that_cannot_be_told_apart_is_noticed(tmp_path):
    held = pickled(10)
    for i, v in enumerate(held.values()):
        v["masks"] = [m * (r < 1 + i % 4) for r, m in enumerate(v["masks"])]
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(held))
    assert "slots look like padding" in str(check_data(tmp_path / "x.pickle")) and "shuffle the slots" in str(check_data(tmp_path / "x.pickle"))


def test_tally_counts():
    t = Tally()
    case = next(iter(Collection("x", [0], lambda _: [folders.Case("g/1", "p", grey()[None], np.stack([disc(value=1)[None]] * 2 + [disc(value=0)[None]]), np.array([True, True, True]))], ("a", "b", "c"))))
    t.add(case)
    t.add(case)
    assert t.cases == 2 and t.here.tolist() == [2, 2, 2] and t.empty.tolist() == [0, 0, 2] and t.twins[0, 1] == 2 and t.pairs[0, 2] == 0 and t.groups == {"g": 3}


# --- real samples ------------------------------------------------------------------------------------------------------------------------


@sample
def test_real_lidc_slices():
    root = SHARED / "LIDC-IDRI-slices"
    report = check_data(root)
    assert not report.refused and report.cases == 399 and report.patients == 24
    assert "true readers: 17 nodules with 1, 12 nodules with 2, 13 nodules with 3, 32 nodules with 4" in str(report) and "look like padding" in str(report)
    c = load_cohort(root)
    assert c.size == (64, 64) and not c.raters_identified and len(set(c.patient_ids)) == 24
    four = c.subset(torch.nonzero(c.present.all(1)).flatten())
    assert len(four) == 32 and four.masks.flatten(2).any(2).float().mean() > 0.97


@sample
@pytest.mark.parametrize("part, cases, raters", [("1", 35, 8), ("2A", 34, 9), ("2B", 35, 8), ("3", 47, 9), ("4", 61, 3)])
def test_real_bubil(part, cases, raters):
    c = load_cohort(SHARED / f"bubil_{part}.npz")
    assert (len(c), c.n_raters) == (cases, raters) and c.raters_identified and c.size == (128, 128)
    assert raters in (3, 10) or any("copies of the gold" in n for n in c.notes)


@sample
def test_real_crops_stream():
    first = next(iter_cohorts(SHARED / "lidc_all64_dev.npz", batch=64))
    assert len(first) == 64 and not first.raters_identified and (first.spacing > 0.4).all()
