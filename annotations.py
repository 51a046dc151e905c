"""Reads annotated images (COCO JSON, Pascal VOC, label PNGs) into one format, and computes AP of detections.

    splits, classes = read("my/cells", masks=False)           # {"train": [Annotated, ...], "test": [...]}, ["RBC", ...]
    scores = Precision(len(classes))
    scores.add(0, truth, boxes, labels, confidences)          # one image; its masks are not kept
    scores.summary()                                          # {"AP": ..., "AP50": ..., ...}, as pycocotools gives

A box is x0, y0, x1, y1 in pixels, with x1 - x0 its width. Shapes: n objects and d detections in an image.
"""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import IMG_EXTENSIONS, cores
from launch import say


class Annotated(NamedTuple):
    """An image and its objects."""

    file: Path
    width: int
    height: int
    boxes: np.ndarray  # float64 (n, 4)
    labels: np.ndarray  # int64 (n,), indices in the list of classes
    areas: np.ndarray  # float64 (n,), of the mask if there is one
    crowd: np.ndarray  # bool (n,): one box for many objects; not used in training
    ignored: np.ndarray  # bool (n,): does not count in a test: crowds, and VOC's difficult objects
    masks: list[Callable[[], np.ndarray]]  # n functions that return a bool (height, width); empty without masks

    def keep(self, rows: np.ndarray) -> "Annotated":
        """The image with only some of its objects; rows: bool (n,)."""
        arrays = {name: getattr(self, name)[rows] for name in ("boxes", "labels", "areas", "crowd", "ignored")}
        return self._replace(**arrays, masks=[mask for mask, kept in zip(self.masks, rows) if kept])


# ---- masks ----------------------------------------------------------------------------------------------------------


def polygon_mask(polygon: list[float], height: int, width: int) -> np.ndarray:
    """bool (height, width) of a polygon x, y, x, y, ... as COCO does it: the outline is drawn on a grid five times as
    fine, and a pixel is inside if an odd number of crossings lies above it in its column."""
    corners = np.trunc(5 * np.asarray(polygon, float).reshape(-1, 2) + 0.5).astype(int)
    points = []
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0)):
        dx, dy = abs(x1 - x0), abs(y1 - y0)
        back = x0 > x1 if dx >= dy else y0 > y1  # drawn from the other end: COCO rounds so
        (xs, ys), (xe, ye) = ((x1, y1), (x0, y0)) if back else ((x0, y0), (x1, y1))
        steps = np.arange(max(dx, dy) + 1)
        if dx >= dy:
            line = np.stack([xs + steps, np.trunc(ys + (ye - ys) / max(dx, 1) * steps + 0.5)], 1)
        else:
            line = np.stack([np.trunc(xs + (xe - xs) / dy * steps + 0.5), ys + steps], 1)
        points.append(line[::-1] if back else line)
    before, after = (np.concatenate(points).astype(int)[s].T for s in (slice(None, -1), slice(1, None)))
    x = (np.where(after[0] < before[0], after[0], after[0] - 1) + 0.5) / 5 - 0.5
    y = np.ceil(((np.minimum(before[1], after[1]) + 0.5) / 5 - 0.5).clip(0, height)).astype(int)
    crossing = (after[0] != before[0]) & (x == np.floor(x)) & (x >= 0) & (x <= width - 1)
    starts = x[crossing].astype(int) * height + y[crossing]
    inside = np.bincount(starts, minlength=height * width + 1)[:-1].cumsum() % 2
    return inside.astype(bool).reshape(width, height).T


def run_length_mask(counts: list[int] | str, height: int, width: int) -> np.ndarray:
    """bool (height, width) of COCO's run lengths, column by column, starting outside. In a string, a character holds 5
    bits, and from the fourth run on it is the difference to the run two before."""
    if isinstance(counts, str):
        runs, value, shift = [], 0, 0
        for character in counts.encode():
            bits = character - 48
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                value -= (bits & 16) and 1 << shift
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
        counts = runs
    if sum(counts) != height * width or min(counts, default=0) < 0:
        raise ValueError(f"run lengths of {sum(counts)} pixels for {width} x {height}")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def segmentation_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """bool (height, width) of COCO's polygons or run lengths."""
    if isinstance(segmentation, dict):
        return run_length_mask(segmentation["counts"], height, width)
    return np.any([polygon_mask(polygon, height, width) for polygon in segmentation], 0)


# ---- files ----------------------------------------------------------------------------------------------------------


def read(folder: str, masks: bool = False) -> tuple[dict[str, list[Annotated]], list[str]]:
    """({"train": images, "test": images}, classes) of a folder in one of three layouts:

    COCO      annotations/instances_train*.json and instances_val*.json, images in train*/ and val*/ (such as val2017)
    VOC       Annotations, JPEGImages, ImageSets/Main: trainval and test, or train and val if there is no test; or
              VOC2007 and VOC2012 below the folder: both years' trainval
    masks     train/images/x.png with train/masks/x.png, in which each value above 0 is an object, or with
              train/masks/x/*.png, one object each; test likewise; one class

    Classes are the names in both splits, sorted. Boxes are clipped to the image, and objects smaller than a pixel are
    left out; the numbers are printed. masks: whether all objects need one. Raises ValueError or OSError for invalid
    annotations and for images that are missing or of another size.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder")
    if (root / "annotations").is_dir():
        splits = {"train": read_coco(root, "train", masks), "test": read_coco(root, "val", masks)}
    elif years := [place for place in (root, *sorted(root.glob("VOC20*"))) if (place / "ImageSets" / "Main").is_dir()]:
        splits = read_voc(years)
    elif (root / "train" / "masks").is_dir():
        splits = {split: read_masks(root / split) for split in ("train", "test")}
    else:
        wanted = "annotations/instances_*.json, ImageSets/Main, or train/images and train/masks"
        raise FileNotFoundError(f"'{folder}' has none of {wanted}: COCO's, VOC's or masks' layout is needed")
    classes = sorted({name for images in splits.values() for image in images for name in image.labels})
    index = {name: k for k, name in enumerate(classes)}
    found = {}
    for split, images in splits.items():
        if not images:
            raise ValueError(f"'{folder}' has no images in its {split} split")
        check_files(folder, images)
        images = [image._replace(labels=np.array([index[name] for name in image.labels], int)) for image in images]
        found[split] = clean(f"{folder} ({split})", images)
    if masks and (without := [i for s in found.values() for i in s if len(i.masks) < len(i.boxes)]):
        raise ValueError(f"'{folder}': {len(without)} images have objects without masks, the first '{without[0].file}'")
    unseen = {k for i in found["test"] for k in i.labels} - {k for i in found["train"] for k in i.labels}
    if unseen:
        say(f"{folder}: in the test split alone: {', '.join(classes[k] for k in sorted(unseen))}")
    return found, classes


def check_files(folder: str, images: list[Annotated]) -> None:
    """Raises ValueError if an image is missing or not of the annotated size."""

    def wrong(image: Annotated) -> str | None:
        try:
            with Image.open(image.file) as file:
                size = file.size
        except FileNotFoundError:
            return "missing"
        except Exception:  # PIL's formats fail in their own ways
            return "no image that can be read"
        return None if size == (image.width, image.height) else f"{size[0]} x {size[1]} pixels, not as annotated"

    with ThreadPoolExecutor(cores()) as pool:
        found = [(image, why) for image, why in zip(images, pool.map(wrong, images)) if why]
    if found:
        image, why = found[0]
        raise ValueError(f"'{folder}': {len(found)} images are missing or wrong, the first '{image.file}': {why}")


def clean(what: str, images: list[Annotated]) -> list[Annotated]:
    """Clips boxes to their image, leaves out those smaller than a pixel, and prints how many."""
    counts = Counter()
    cleaned = []
    for image in images:
        inside = image.boxes.clip(0, np.array([image.width, image.height] * 2, float))
        large = (inside[:, 2:] - inside[:, :2] >= 1).all(1)
        counts["cut at the image's edge"] += int((inside != image.boxes).any(1)[large].sum())
        counts["smaller than a pixel or outside, left out"] += int((~large).sum())
        counts["crowds"] += int(image.crowd[large].sum())
        counts["objects"] += int(large.sum())
        counts["images without objects"] += not large.any()
        cleaned.append(image._replace(boxes=inside).keep(large))
    said = ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)
    say(f"{what}: {len(images):,} images, {said}")
    return cleaned


def annotated(file: Path, size: tuple[int, int], objects: list[dict]) -> Annotated:
    """An image of objects {"box", "name", optionally "area", "crowd", "ignored", "mask"}, with class names as labels,
    which `read` replaces by indices."""
    boxes = np.array([o["box"] for o in objects], float).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise ValueError("a box is not of numbers")
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = np.array([o.get("area", side.prod()) for o, side in zip(objects, sides)], float)
    crowd, ignored = (np.array([bool(o.get(k)) for o in objects], bool) for k in ("crowd", "ignored"))
    masks = [o["mask"] for o in objects if "mask" in o]
    names = np.array([o["name"] for o in objects], object)
    return Annotated(file, *size, boxes, names, areas, crowd, ignored | crowd, masks)


def read_coco(root: Path, split: str, masks: bool) -> list[Annotated]:
    files = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if len(files) != 1:
        raise FileNotFoundError(f"'{root}/annotations' has {len(files)} files instances_{split}*.json: one is needed")
    try:
        table = json.loads(files[0].read_text())
        folder = root / files[0].stem.removeprefix("instances_")
        names = {c["id"]: str(c["name"]) for c in table["categories"]}
        objects: dict = {image["id"]: [] for image in table["images"]}
        sizes = {image["id"]: (int(image["width"]), int(image["height"])) for image in table["images"]}
        for a in table["annotations"]:
            objects[a["image_id"]].append(coco_object(a, names, masks, *sizes[a["image_id"]]))
        return [annotated(folder / str(i["file_name"]), sizes[i["id"]], objects[i["id"]]) for i in table["images"]]
    except KeyError as error:
        raise ValueError(f"'{files[0]}': there is no {error} where it is needed") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"'{files[0]}' is not as COCO's are: {error}") from error


def coco_object(a: dict, names: dict, masks: bool, width: int, height: int) -> dict:
    x, y, w, h = map(float, a["bbox"])
    found = {"box": (x, y, x + w, y + h), "name": names[a["category_id"]], "crowd": a.get("iscrowd", 0)}
    if "area" in a:
        found["area"] = float(a["area"])
    if masks and (segmentation := a.get("segmentation")):
        if isinstance(segmentation, dict):
            segmentation_mask(segmentation, height, width)  # raises now rather than in mid-training
        elif not all(len(p) % 2 == 0 and len(p) >= 6 and np.isfinite(np.array(p, float)).all() for p in segmentation):
            raise ValueError("a polygon needs three corners, x, y, x, y, ...")
        found["mask"] = partial(segmentation_mask, segmentation, height, width)
    return found


def read_voc(years: list[Path]) -> dict[str, list[Annotated]]:
    """Reads the splits of one or more years; the first year with a test list alone is tested on."""

    def images(of: list[Path], kind: str) -> list[Annotated]:
        found = []
        for year in of:
            lines = (year / "ImageSets" / "Main" / f"{kind}.txt").read_text().splitlines()
            found += [voc_image(year, line.split()[0]) for line in lines if line.strip()]
        return found

    tests = [year for year in years if (year / "ImageSets" / "Main" / "test.txt").exists()]
    if tests:
        return {"train": images(years, "trainval"), "test": images(tests[:1], "test")}
    return {"train": images(years, "train"), "test": images(years, "val")}


def voc_image(year: Path, name: str) -> Annotated:
    """VOC counts pixels from 1, and the last one belongs to the box."""
    path = year / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
        size = tuple(int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        objects = []
        for o in tree.iter("object"):
            x0, y0, x1, y1 = (float(o.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            difficult = int(o.findtext("difficult") or 0)
            label = o.findtext("name")
            if not label:
                raise ValueError("an object has no name")
            objects.append({"box": (x0 - 1, y0 - 1, x1, y1), "name": label, "ignored": difficult})
        files = [year / "JPEGImages" / (name + ending) for ending in IMG_EXTENSIONS]
        return annotated(next((file for file in files if file.exists()), files[0]), size, objects)
    except (ElementTree.ParseError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"'{path}' is not as VOC's are: {error}") from error


def read_masks(folder: Path) -> list[Annotated]:
    files = sorted(f for f in (folder / "images").glob("*") if f.suffix.lower() in IMG_EXTENSIONS)
    return [masked_image(file, folder / "masks" / file.stem) for file in files]


def masked_image(file: Path, masks: Path) -> Annotated:
    """masks: a folder with a PNG for each object, or the path, without .png, of one PNG with all objects."""
    each = masks.is_dir()
    paths = sorted(masks.glob("*.png")) if each else [masks.with_suffix(".png")]
    if not each and not paths[0].exists():
        raise ValueError(f"'{file}' has no masks: '{paths[0]}' or a folder '{masks}' is needed")
    objects, size = [], None
    for path in paths:
        values = label_image(path, each)
        if size not in (None, values.shape):
            raise ValueError(f"'{path}' is of another size than the masks beside it")
        size = values.shape
        for value in np.unique(values[values > 0]).tolist():
            y, x = (values == value).nonzero()
            box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
            mask = partial(object_mask, path, each, value)
            objects.append({"box": box, "name": "object", "area": len(x), "mask": mask})
    if size is None:  # an empty folder
        with Image.open(file) as image:
            size = image.size[::-1]
    return annotated(file, size[::-1], objects)


def label_image(path: Path, one_object: bool) -> np.ndarray:
    """(height, width) of a PNG with one channel, a palette or 16 bits; with one_object, True where it is above 0."""
    try:
        with Image.open(path) as file:
            values = np.array(file)
    except Exception as error:  # PIL's formats fail in their own ways
        raise ValueError(f"'{path}' is no image that can be read ({type(error).__name__}: {error})") from error
    if values.ndim != 2:
        raise ValueError(f"'{path}' has {values.shape[-1]} channels: a label PNG has one")
    return values > 0 if one_object else values


def object_mask(path: Path, one_object: bool, value: int) -> np.ndarray:
    return label_image(path, one_object) == value


# ---- average precision ----------------------------------------------------------------------------------------------

IOUS = np.linspace(0.5, 0.95, 10)
AREAS = {"": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
RECALLS = np.linspace(0, 1, 101)


def box_overlaps(boxes: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU (d, n) of boxes (d, 4) and (n, 4); for a crowd, the share of the detection inside it."""
    corner = np.maximum(boxes[:, None, :2], truth[:, :2])  # (d, n, 2)
    end = np.minimum(boxes[:, None, 2:], truth[:, 2:])
    both = (end - corner).clip(0).prod(2)
    return overlaps(both, *((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, truth)), crowd)


def mask_overlaps(masks: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """The same for masks, bool (d, h, w) and (n, h, w)."""
    a, b = (m.reshape(len(m), math.prod(m.shape[1:])).astype(np.float32) for m in (masks, truth))
    return overlaps((a @ b.T).astype(float), a.sum(1, dtype=float), b.sum(1, dtype=float), crowd)


def overlaps(both: np.ndarray, of: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    union = np.where(crowd, of[:, None], of[:, None] + truth - both)
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


class Match(NamedTuple):
    """Which detections of one class in one image are right."""

    scores: np.ndarray  # (d,), descending
    right: np.ndarray  # bool (10 IoUs, 4 ranges of area, d): true positives
    ignored: np.ndarray  # bool (10, 4, d): neither true nor false positives
    objects: np.ndarray  # (4,): number of objects that are not ignored
    voc: np.ndarray  # int (10, d), by VOC's rule: 1 true positive, 0 false positive, -1 ignored


def match(overlap: np.ndarray, scores: np.ndarray, sizes: np.ndarray, areas: np.ndarray, ignored, crowd) -> Match:
    """Matches detections, highest score first, to objects as pycocotools does: each takes the free object of largest
    overlap (d, n), the last of equals, and an ignored one only where no other is free. sizes (d,) are the areas of the
    detections. In a range of areas, objects outside it are ignored, and so are unmatched detections outside it."""
    low, high = np.array(list(AREAS.values())).T
    outside = (areas < low[:, None]) | (areas > high[:, None]) | ignored  # (4, n)
    d, n, shape = len(scores), len(areas), (len(IOUS), len(low))
    t, a = np.indices(shape)  # (10, 4): of the IoU, of the range of areas
    right, skipped = np.zeros((*shape, d), bool), np.zeros((*shape, d), bool)
    taken = np.zeros((*shape, n), bool)
    voc, had = np.zeros((len(IOUS), d), int), np.zeros((len(IOUS), n), bool)
    for k in range(d if n else 0):
        free = (~taken | crowd) & (overlap[k] >= np.minimum(IOUS, 1 - 1e-10)[:, None, None])  # (10, 4, n)
        wanted = free & ~outside
        chosen = np.where(wanted.any(2, keepdims=True), wanted, free)
        best = n - 1 - np.where(chosen, overlap[k], -1.0)[..., ::-1].argmax(2)  # (10, 4); the last of equals
        found = chosen.any(2)
        right[..., k] = found & ~outside[a, best]
        skipped[..., k] = found & outside[a, best]
        taken[t, a, best] |= found
        nearest = overlap[k].argmax()
        over = overlap[k, nearest] > IOUS
        voc[:, k] = np.where(over & ignored[nearest], -1, over & ~had[:, nearest])
        had[:, nearest] |= over & ~ignored[nearest]
    skipped |= ~right & ((sizes < low[:, None]) | (sizes > high[:, None]))
    return Match(scores, right, skipped, (~outside).sum(1), voc)


class Precision:
    """AP by COCO's rules. Images are added one by one, and only their matches are kept."""

    def __init__(self, classes: int, most: int = 100):
        self.classes, self.most = classes, most  # `most` detections per image and class count
        self.matches: dict[tuple[int, int], Match] = {}  # by class and image

    def add(self, number: int, truth: Annotated, boxes, labels, scores, masks=None) -> None:
        """Adds an image's detections: boxes (d, 4), labels (d,), scores (d,), and masks, bool (d, height, width), if
        these are to be compared instead. number: the image's index in the split."""
        drawn = np.array([draw() for draw in truth.masks], bool) if masks is not None else None
        for k in range(self.classes):
            found, wanted = (labels == k).nonzero()[0], truth.labels == k  # detections and objects of class k
            found = found[np.argsort(-scores[found], kind="stable")][: self.most]
            if not len(found) and not wanted.any():
                continue
            crowd = truth.crowd[wanted]
            if masks is None:
                overlap = box_overlaps(boxes[found], truth.boxes[wanted], crowd)
                sizes = (boxes[found, 2:] - boxes[found, :2]).prod(1)
            else:
                overlap = mask_overlaps(masks[found], drawn.reshape(-1, *masks.shape[1:])[wanted], crowd)
                sizes = masks[found].sum((1, 2))
            areas, ignored = truth.areas[wanted], truth.ignored[wanted]
            self.matches[k, number] = match(overlap, scores[found], sizes, areas, ignored, crowd)

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision at 101 recalls (10 IoUs, 4 ranges, C, 101) and VOC2007's AP of eleven points (10 IoUs, C); nan for
        classes without objects."""
        precision = np.full((len(IOUS), len(AREAS), self.classes, len(RECALLS)), np.nan)
        voc = np.full((len(IOUS), self.classes), np.nan)
        for k in range(self.classes):
            of = [m for (label, _), m in sorted(self.matches.items()) if label == k]
            if not of:
                continue
            scores = np.concatenate([m.scores for m in of])
            order = np.argsort(-scores, kind="stable")
            right, ignored = (np.concatenate([getattr(m, f) for m in of], 2)[..., order] for f in ("right", "ignored"))
            objects = sum(m.objects for m in of)
            for t, a in product(range(len(IOUS)), objects.nonzero()[0]):
                precision[t, a, k] = precision_at(right[t, a], ~right[t, a] & ~ignored[t, a], objects[a], RECALLS)
            marks = np.concatenate([m.voc for m in of], 1)[:, order]
            if objects[0]:
                eleven = np.linspace(0, 1, 11)
                voc[:, k] = [precision_at(row == 1, row == 0, objects[0], eleven).mean() for row in marks]
        return precision, voc

    def summary(self) -> dict[str, float | list[float | None] | None]:
        """{"AP", "AP50", "AP75", "small", "medium", "large", "VOC07 AP", "VOC07 AP50"} in %, and "classes": the AP of
        each; None without objects."""
        precision, voc = self.curves()
        ap = precision.mean(3)  # (10, 4, C)

        def mean(x: np.ndarray) -> float | None:
            known = x[~np.isnan(x)]
            return 100 * float(known.mean()) if len(known) else None

        found = {"AP": mean(ap[:, 0]), "AP50": mean(ap[0, 0]), "AP75": mean(ap[5, 0])}
        found |= {name: mean(ap[:, a]) for a, name in enumerate(AREAS) if name}
        found |= {"VOC07 AP": mean(voc), "VOC07 AP50": mean(voc[0])}
        return found | {"classes": [mean(ap[:, 0, k]) for k in range(self.classes)]}


def precision_at(right: np.ndarray, wrong: np.ndarray, objects: int, recalls: np.ndarray) -> np.ndarray:
    """The best precision at each recall or above; right and wrong: bool (d,), by descending score."""
    right, wrong = right.cumsum(), wrong.cumsum()
    recall, precision = right / objects, right / (right + wrong + np.spacing(1))
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return precision[np.searchsorted(recall, recalls, side="left")]
