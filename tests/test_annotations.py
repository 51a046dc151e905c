"""Annotated images as they are read, and AP by COCO's rules, beside pycocotools."""

import contextlib
import io
import json
import random

import numpy as np
import pytest
from PIL import Image

import annotations
from annotations import Annotated, Precision, read

# ---- AP -------------------------------------------------------------------------------------------------------------


def made_up(rng, masks, classes=3, images=6):
    """([Annotated, ...], [detections, ...]) with ties, crowds, small and large objects, and images without any."""
    truth, found = [], []
    for number in range(images):
        w, h = rng.integers(60, 160, 2).tolist()
        n, d = rng.integers(0, 7), rng.integers(0, 14)

        def boxes(k, w=w, h=h):
            corner = rng.random((k, 2)) * [w - 9, h - 9]
            return np.hstack([corner, corner + 1 + rng.random((k, 2)) * ([w, h] - corner - 2)])

        true = boxes(n).round(1)
        near = true[rng.integers(0, max(1, n), d)] + rng.normal(0, 4, (d, 4)) if n else boxes(d)
        near = np.hstack([near[:, :2].clip(0), np.maximum(near[:, 2:], near[:, :2].clip(0) + 1)]).clip(0, [w, h] * 2)
        drawn = [filled(box, h, w) for box in true]
        areas = [mask.sum() for mask in drawn] if masks else (true[:, 2:] - true[:, :2]).prod(1)
        crowd, labels = rng.random(n) < 0.2, rng.integers(0, classes, n)
        image = Annotated(f"{number}.png", w, h, true, labels, np.array(areas, float), crowd, crowd, [])
        if masks:
            image = image._replace(masks=[lambda mask=mask: mask for mask in drawn])
        scores = rng.integers(0, 6, d) / 5
        detections = [near, rng.integers(0, classes, d), scores]
        detections.append(np.array([filled(box, h, w) for box in near], bool).reshape(d, h, w) if masks else None)
        truth.append(image)
        found.append(detections)
    return truth, found


def filled(box, height, width):
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = box.astype(int)
    mask[y0:y1, x0:x1] = True
    return mask


def ours(truth, found, classes=3, most=100):
    precision = Precision(classes, most)
    for number, (image, detections) in enumerate(zip(truth, found)):
        precision.add(number, image, *detections)
    return precision


def theirs(truth, found, masks, classes=3, most=100):
    """pycocotools' precision (10, 101, C, 4)."""
    coco, evaluate = (pytest.importorskip(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    encode = pytest.importorskip("pycocotools.mask").encode
    table = {"images": [], "annotations": [], "categories": [{"id": k, "name": str(k)} for k in range(classes)]}
    results = []
    for number, (image, (boxes, labels, scores, drawn)) in enumerate(zip(truth, found)):
        table["images"].append({"id": number, "width": image.width, "height": image.height})
        for k, (box, label) in enumerate(zip(image.boxes, image.labels)):
            a = {"id": len(table["annotations"]) + 1, "image_id": number, "category_id": int(label)}
            a |= {"bbox": [*box[:2], *(box[2:] - box[:2])], "area": image.areas[k], "iscrowd": int(image.crowd[k])}
            if masks:
                a["segmentation"] = encode(np.asfortranarray(image.masks[k]().astype(np.uint8)))
            table["annotations"].append(a)
        for k, (box, label, score) in enumerate(zip(boxes, labels, scores)):
            r = {"image_id": number, "category_id": int(label), "score": float(score)}
            if masks:
                r["segmentation"] = encode(np.asfortranarray(drawn[k].astype(np.uint8)))
            else:
                r["bbox"] = [*box[:2], *(box[2:] - box[:2])]
            results.append(r)
    with contextlib.redirect_stdout(io.StringIO()):
        whole = coco.COCO()
        whole.dataset = table
        whole.createIndex()
        run = evaluate.COCOeval(whole, whole.loadRes(results), "segm" if masks else "bbox")
        run.params.maxDets = [1, 2, most]
        run.evaluate()
        run.accumulate()
    return run.eval["precision"][..., 2]


@pytest.mark.parametrize("masks", [False, True])
def test_ap_is_pycocotools(masks):
    compared = 0
    for seed in range(12 if masks else 30):
        rng = np.random.default_rng(seed)
        truth, found = made_up(rng, masks)
        most = [100, 4][seed % 2]
        precision = ours(truth, found, most=most)
        expected = theirs(truth, found, masks, most=most).transpose(0, 3, 2, 1)  # (10, 4, C, 101)
        expected = np.ma.masked_less(expected, 0)  # -1 where a class has no objects
        np.testing.assert_allclose(precision.curves()[0], expected.filled(np.nan), atol=1e-9)
        compared += expected.count()
        means = {"AP": expected[:, 0], "AP50": expected[0, 0], "AP75": expected[5, 0]}
        means |= {"small": expected[:, 1], "medium": expected[:, 2], "large": expected[:, 3]}
        for name, values in means.items():
            mean = 100 * values.mean() if values.count() else None
            assert precision.summary()[name] == (mean and pytest.approx(mean)), name
    assert compared > 10_000


def test_ap_without_objects_or_detections():
    truth = made_up(np.random.default_rng(0), False)[0]
    nothing = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), None
    assert Precision(3).summary()["AP"] is None and ours(truth, [nothing] * len(truth)).summary()["AP"] == 0


def test_vocs_rule_takes_the_nearest_object_whatever_has_been_found():
    """11 points, by another way of counting; a second detection of an object is wrong, of a difficult one nothing."""
    no = np.zeros(2, bool)
    boxes = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    truth = Annotated("x", 40, 40, boxes, np.zeros(2, int), np.full(2, 100.0), no, np.array([False, True]), [])
    found = np.array([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [30, 30, 40, 40]])
    precision = ours([truth], [(found, np.zeros(4, int), np.array([0.6, 0.9, 0.8, 0.7]), None)], 1)
    assert precision.matches[0, 0].voc[0].tolist() == [1, -1, 0, 0]
    assert precision.summary()["VOC07 AP50"] == pytest.approx(100)
    assert precision.matches[0, 0].voc[-1].tolist() == [0, -1, 0, 1]  # IoU .9 is not above .95
    assert precision.curves()[1][-1, 0] == pytest.approx(1 / 3)


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_polygons_and_run_lengths_are_cocos():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(300):
        h, w = rng.integers(5, 60, 2).tolist()
        corners = rng.uniform(-0.3, 1.3, (rng.integers(3, 9), 2)) * [w, h]
        corners = corners.round(rng.integers(0, 3))
        polygon = corners.flatten().tolist()
        (runs,) = mask.frPyObjects([polygon], h, w)
        expected = mask.decode(runs).astype(bool)
        assert np.array_equal(annotations.polygon_mask(polygon, h, w), expected), polygon
        assert np.array_equal(annotations.run_length_mask(runs["counts"].decode(), h, w), expected)
        flat = expected.T.flatten()
        ends = np.flatnonzero(np.diff(np.concatenate([[False], flat, [not flat[-1]]])))
        assert np.array_equal(annotations.run_length_mask(np.diff([0, *ends]).tolist(), h, w), expected)


# ---- files ----------------------------------------------------------------------------------------------------------

BOX = (3, 4, 19, 12)  # of the object in each image of 32 x 24


def write_image(path, size=(32, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 40)).save(path)


def make_coco(root, change=lambda table, split: None, polygon=True):
    x0, y0, x1, y1 = BOX
    for split in ("train2017", "val2017"):
        table = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]}
        for number in range(3):
            write_image(root / split / f"{number}.png")
            table["images"].append({"id": number, "file_name": f"{number}.png", "width": 32, "height": 24})
            a = {"id": number, "image_id": number, "category_id": [3, 7][number % 2], "iscrowd": 0, "area": 100}
            a["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            runs = [y0 + 24 * x0, *[y1 - y0, 24 - y1 + y0] * (x1 - x0 - 1), y1 - y0]
            runs.append(32 * 24 - sum(runs))
            corners = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            a["segmentation"] = corners if polygon else {"counts": runs, "size": [24, 32]}
            table["annotations"].append(a)
        change(table, split)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(table))
    return root


XML = """<annotation><size><width>32</width><height>24</height></size>
<object><name>{name}</name><difficult>{hard}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object></annotation>"""


def make_voc(root, box=(4, 5, 19, 12), names=("dog", "cat"), splits=("trainval", "test")):
    for split in splits:
        for number in range(2):
            write_image(root / "JPEGImages" / f"{split}{number}.jpg")
            (root / "Annotations").mkdir(exist_ok=True)
            text = XML.format(*box, name=names[number], hard=int(split == "test" and number == 1))
            (root / "Annotations" / f"{split}{number}.xml").write_text(text)
        lists = root / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text(f"{split}0\n{split}1\n")
    return root


def make_masks(root, one=True):
    x0, y0, x1, y1 = BOX
    for split in ("train", "test"):
        write_image(root / split / "images" / "a.png")
        values = np.zeros((24, 32), np.uint8)
        values[y0:y1, x0:x1] = 9
        path = root / split / "masks" / ("a.png" if one else "a/1.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    return root


def test_three_layouts_say_the_same_of_the_same_object(tmp_path):
    folders = {
        "polygons": make_coco(tmp_path / "polygons"),
        "run lengths": make_coco(tmp_path / "runs", polygon=False),
        "voc": make_voc(tmp_path / "voc"),
        "one png": make_masks(tmp_path / "one"),
        "a png each": make_masks(tmp_path / "each", one=False),
    }
    expected = np.zeros((24, 32), bool)
    expected[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    for what, folder in folders.items():
        splits, classes = read(str(folder), masks=what != "voc")
        assert classes == (["object"] if "png" in what else ["cat", "dog"])
        for image in (image for split in splits.values() for image in split):
            assert image.boxes.tolist() == [list(BOX)] and (image.width, image.height) == (32, 24)
            assert all(np.array_equal(draw(), expected) for draw in image.masks) and (image.masks or what == "voc")
        assert [i.labels.tolist() for i in splits["test"][:2]] == (
            [[0]] if "png" in what else [[1], [0]] if what == "voc" else [[0], [1]]
        )
    assert read(str(folders["voc"]))[0]["test"][1].ignored.tolist() == [True]


def test_boxes_are_cut_and_counted(tmp_path, capsys):
    def change(table, split):
        if split == "train2017":
            a, b, c = table["annotations"]
            a["bbox"], b["bbox"], c["bbox"] = [-5, 10, 20, 10], [5, 5, 0, 9], [40, 5, 9, 9]
            table["annotations"].append({**a, "id": 0, "iscrowd": 1, "bbox": [1, 1, 8, 8]})

    splits, _ = read(str(make_coco(tmp_path, change)))
    assert [i.boxes.tolist() for i in splits["train"]] == [[[0, 10, 15, 20], [1, 1, 9, 9]], [], []]
    assert splits["train"][0].crowd.tolist() == splits["train"][0].ignored.tolist() == [False, True]
    said = capsys.readouterr().out
    assert "1 cut at the image's edge, 2 smaller than a pixel or outside, left out, 1 crowds, 2 objects" in said
    assert "2 images without objects" in said


def test_both_years_of_voc_are_trained_on_and_the_first_tested(tmp_path):
    make_voc(tmp_path / "VOC2007")
    make_voc(tmp_path / "VOC2012", splits=("trainval",))
    splits, _ = read(str(tmp_path))
    assert len(splits["train"]) == 4 and [i.file.parts[-3] for i in splits["test"]] == ["VOC2007"] * 2
    make_voc(tmp_path / "own", splits=("train", "val"))
    assert [len(s) for s in read(str(tmp_path / "own"))[0].values()] == [2, 2]


def test_what_is_missing_or_wrong_is_counted_and_named(tmp_path):
    def refuse(folder, text, masks=False):
        with pytest.raises((ValueError, OSError), match=text):
            read(str(folder), masks)

    refuse(tmp_path / "nowhere", "is no folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "COCO's, VOC's or masks' layout")
    folder = make_coco(tmp_path / "gone")
    (folder / "train2017" / "1.png").unlink()
    refuse(folder, r"1 images are missing or wrong, the first .*1\.png': missing")
    folder = make_coco(tmp_path / "size")
    write_image(folder / "val2017" / "2.png", (20, 20))
    refuse(folder, "20 x 20 pixels, not as annotated")
    folder = make_coco(tmp_path / "maskless", lambda table, split: table["annotations"][0].pop("segmentation"))
    refuse(folder, "images have objects without masks", masks=True)
    assert read(str(folder))[1] == ["cat", "dog"]


def test_mutated_annotations_are_legal_or_one_line(tmp_path):
    """Whatever a file says: it is read, or a ValueError or OSError says in a line why not."""
    rng = random.Random(0)
    coco, voc, png = make_coco(tmp_path / "coco"), make_voc(tmp_path / "voc"), make_masks(tmp_path / "masks")
    files = [coco / "annotations" / "instances_train2017.json", voc / "Annotations" / "trainval0.xml"]
    files.append(png / "train" / "masks" / "a.png")
    odd = [b"null", b"-1", b"1e999", b"[]", b"{}", b'"x"', b"true", b"\xff", b"\x00", b"nan", b"9" * 40]
    legal = 0
    for k in range(150):
        file = files[k % 3]
        whole = file.read_bytes()
        at = rng.randrange(len(whole))
        ways = [
            whole[:at] + whole[at + 1 + rng.randrange(9) :],
            whole[:at] + rng.choice(odd) + whole[at + 1 :],
            whole[:at],
        ]
        file.write_bytes(rng.choice(ways))
        try:
            read(str([coco, voc, png][k % 3]), masks=k % 6 < 3)
            legal += 1
        except (ValueError, OSError) as error:
            assert str(error)
        file.write_bytes(whole)
    assert 5 < legal < 145
