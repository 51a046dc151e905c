"""Images in memory, and batches of augmented views of them.

load_images(source, split)   one uint8 tensor (N, 3, H, W): made in memory, a torchvision data set, or a folder; of
                             files that do not fit a Stream, which decodes them as they are needed
MultiCrop(recipe, size)      uint8 batch -> list of float views; each image has its own parameters, from a generator

Drawing (`sample`, in numpy) and computing (`render`) are apart: all parameters of all views are one tensor, so one copy
to a GPU; the same ones give the same views on a CPU, on a GPU, eager or compiled, and a slice of them is one rank's
share. The order is crop, flip, colour jitter, grey, blur, solarize, normalise, each as torchvision's functional
operation on a float image does it.
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ---- images ---------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    pixels: "Tensor | Stream"  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,), -1 where there is none
    classes: list[str]  # empty where there are no labels
    names: list[str]  # of a folder's images the path below it, else the number in the data set

    @property
    def labelled(self) -> bool:
        return bool(self.classes)


# name: (class in torchvision.datasets, arguments of the training split, arguments of the test split)
DATASETS = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "gtsrb": ("GTSRB", {"split": "train"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "aircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "cars": ("StanfordCars", {"split": "train"}, {"split": "test"}),
    "imagenet": ("ImageNet", {"split": "train"}, {"split": "val"}),
    "imagenette": ("Imagenette", {"split": "train"}, {"split": "val"}),
}


BY_HAND = ("cars", "imagenet")  # torchvision does not download these


def load_images(
    source: str,
    split: str = "train",
    size: int | None = None,
    *,
    root: str = "data",
    limit: int | None = None,
    budget_gb: float = 16.0,
    workers: int | None = None,
) -> Images:
    """Loads one split, whole into memory where it fits.

    source  `shapes` (made in memory), a name in DATASETS (downloaded to `root`), or a folder: train/ and test/ or
            val/ with a sub-folder a class; or images in any nesting, which are then a training split without labels
    split   "train" or "test"
    size    edge in pixels: the short side is resized to it, antialiased, and the centre cut out; None keeps the images
            as they are, which then must all have one size
    limit   that many images of a fixed shuffle (the same ones whatever the seed of the run)
    budget_gb  that the pixels may take in memory; files beyond it become a Stream, if there is a size
    workers    processes that decode, and threads of a stream; None is one a core, shared among a machine's ranks

    Everything becomes 8-bit RGB: grey is repeated, alpha dropped, 16 bits scaled to 8. A file that cannot be decoded
    is named on stderr and skipped. Raises FileNotFoundError, ConnectionError or ValueError with what to do.
    """
    if source == "shapes":
        images = make_shapes({"train": 4000, "test": 1000}[split], size or 32, seed={"train": 0, "test": 1}[split])
        pixels, labels, classes, names = images
        return images if limit is None else Images(pixels[:limit], labels[:limit], classes, names[:limit])
    if source in DATASETS:
        items, labels, classes = _torchvision_items(source, split, root)
        names = [str(i) for i in range(len(items))]
    else:
        items, labels, classes = _folder_items(source, split)
        names = [os.path.relpath(path, source) for path in items]
    if limit is not None and limit < len(items):
        keep = np.random.default_rng(0).permutation(len(items))[:limit].tolist()
        items = torch.utils.data.Subset(items, keep) if labels is None else [items[i] for i in keep]
        labels = labels and [labels[i] for i in keep]
        names = [names[i] for i in keep]
    return _decode(items, labels, names, classes, size, budget_gb, workers, f"{source} ({split})")


def channel_stats(pixels: "Tensor | Stream") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, on the scale 0..1, of at most 10,000 evenly spaced images, 1,000 of
    a stream."""
    x = pixels[:: max(1, len(pixels) // (1000 if isinstance(pixels, Stream) else 10_000))]

    def total(f):  # a few at a time: all in double would take more memory than the data set
        return sum(f(part.double().div(255)).sum((0, 2, 3)) for part in x.split(500))

    n = x.numel() / 3
    mean = total(lambda part: part) / n
    variance = total(lambda part: (part - mean.view(3, 1, 1)).square()) / (n - 1)
    std = variance.sqrt().clamp(min=1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def _torchvision_items(name, split, root):
    class_name, train, test = DATASETS[name]
    chosen, place = train if split == "train" else test, getattr(datasets, class_name)
    download = {} if name in BY_HAND else {"download": True}
    try:
        dataset = place(root, **download, **chosen)
    except ImportError as error:
        raise ValueError(f"torchvision's {class_name} needs another package: pip install {error.name}") from error
    except Exception as error:  # urllib, tarfile, hashing: every data set fails in its own way
        if name in BY_HAND:
            raise FileNotFoundError(
                f"{name} cannot be downloaded: put its files into '{root}' as torchvision.datasets.{class_name} says "
                f"({error})"
            ) from error
        command = f"from torchvision import datasets; datasets.{class_name}('{root}', download=True)"
        raise ConnectionError(
            f"could not download {name} into '{root}' ({type(error).__name__}: {error}). Without a network, copy it "
            f'there from a machine that has one, where python -c "{command}" fetches it, or give a folder of images'
        ) from error
    if isinstance(dataset, datasets.ImageFolder):  # imagenet
        files, labels = zip(*dataset.samples)
        return list(files), list(labels), dataset.classes
    return dataset, None, getattr(dataset, "classes", None)  # labels come with the items


def _image_files(folder):
    """Sorted paths of the images below a folder, links followed."""
    files = []
    for place, _, names in os.walk(folder, followlinks=True):
        files += [os.path.join(place, n) for n in names if n.lower().endswith((*IMG_EXTENSIONS, ".gif"))]
    if not files:
        raise FileNotFoundError(f"no image below '{folder}' ({' '.join(IMG_EXTENSIONS)} .gif)")
    return sorted(files)


def _folder_items(source, split):
    if not os.path.isdir(source):
        known = ", ".join(["shapes", *DATASETS])
        raise FileNotFoundError(f"'{source}' is neither a folder nor a data set's name; known names: {known}")
    folders = {name: os.path.join(source, name) for name in ("train", "test", "val")}
    folders = {name: folder for name, folder in folders.items() if os.path.isdir(folder)}
    if "train" not in folders and split == "train":
        files = _image_files(source)
        return files, [-1] * len(files), []
    if "train" not in folders or (split == "test" and len(folders) == 1):
        raise FileNotFoundError(f"'{source}' has no train/ and test/ or val/ inside, so there is no test split to load")
    classes = sorted(entry.name for entry in os.scandir(folders["train"]) if entry.is_dir())
    folder = folders["train"] if split == "train" else folders.get("test", folders.get("val"))
    files, index, labels = _image_files(folder), {name: i for i, name in enumerate(classes)}, []
    for file in files:
        name = os.path.relpath(file, folder).split(os.sep)[0]
        if classes and name not in index:
            some = ", ".join(classes[:5])
            raise ValueError(f"'{file}' is in no class of '{source}/train' ({len(classes)} classes: {some} ...)")
        labels.append(index.get(name, -1))
    return files, labels, classes


def cores() -> int:
    """Those that this process may use, shared out among the ranks that torchrun has started on the machine."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


LEAST_EDGE = 8  # px of an image


def to_pixels(image: Image.Image, size: int | None = None) -> np.ndarray:
    """A PIL image as uint8 RGB (H, W, 3); with a size, its centre square resized to it, antialiased."""
    w, h = image.size
    if min(w, h) < LEAST_EDGE:
        raise ValueError(f"{w} x {h} pixels: an edge of fewer than {LEAST_EDGE} pixels shows nothing")
    if w * h > Image.MAX_IMAGE_PIXELS:  # PIL itself refuses what is twice as large
        raise ValueError(f"{w} x {h} pixels, more than {Image.MAX_IMAGE_PIXELS:,}: a decompression bomb?")
    if size is not None:
        image.draft(None, (size, size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 where that still covers the size
    if image.mode.startswith("I"):  # 16 bits a sample; PIL's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.array(image)


class Stream:
    """Pixels that do not fit into memory: reads by rows like uint8 (N, 3, S, S), decoded by threads when it is asked
    (PIL lets go of Python's lock meanwhile).

    `ahead(rows)` begins with rows that will be asked for next, in the same order. In the place of a file that cannot be
    decoded, which is named on stderr, stands another of the same rows, or a grey square where there is none; `broken`
    has the rows of these files, as far as they are known.
    """

    device = torch.device("cpu")

    def __init__(self, files: Sequence[str], size: int, workers: int | None = None, broken: Sequence[int] = ()):
        self.files, self.shape, self.broken = files, (len(files), 3, size, size), set(broken)
        self.pool = ThreadPoolExecutor(workers or cores())
        self.asked: dict[bytes, tuple[Tensor, list[Future]]] = {}

    def __len__(self) -> int:
        return len(self.files)

    def ahead(self, rows: Tensor) -> None:
        key = rows.numpy().tobytes()
        if key in self.asked:
            return
        if len(self.asked) == 4:  # what nobody came for
            self.asked.pop(next(iter(self.asked)))
        out = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        tasks = zip(out.split(8), rows.split(8))
        self.asked[key] = out, [self.pool.submit(self._decode, *task) for task in tasks]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        rows = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows.cpu()
        self.ahead(rows)
        out, tasks = self.asked.pop(rows.numpy().tobytes())
        bad = torch.cat([task.result() for task in tasks])
        out[bad] = 128 if bad.all() else out[(~bad).nonzero()[0]]
        return out

    def _decode(self, out: Tensor, rows: Tensor) -> Tensor:
        """Fills out (n, 3, S, S); which of the rows could not be decoded, (n,)."""
        bad = torch.zeros(len(rows), dtype=torch.bool)
        for i, row in enumerate(rows.tolist()):
            try:
                with Image.open(self.files[row]) as image:
                    out[i] = torch.from_numpy(to_pixels(image, self.shape[-1])).permute(2, 0, 1)
            except Exception as error:  # a decoder meets a broken file with any exception there is
                bad[i] = True
                if row not in self.broken:
                    self.broken.add(row)
                    print(f"skipped {self.files[row]}: {type(error).__name__}: {error}", file=sys.stderr)
        return bad


def in_turn(pixels: Tensor | Stream, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """pixels[rows] for each batch of rows; a stream decodes the next one meanwhile."""
    for rows, following in zip(batches, [*batches[1:], None]):
        if isinstance(pixels, Stream):
            pixels.ahead(rows.cpu())
            if following is not None and len(following):
                pixels.ahead(following.cpu())
        yield pixels[rows]


class _Decoder(torch.utils.data.Dataset):
    """Rows -> ([(uint8 (n, H, W, 3), labels, rows) for each size], [(row, why)] of what could not be decoded),
    for a DataLoader."""

    def __init__(self, items, labels, size):
        self.items, self.labels, self.size = items, labels, size

    def __len__(self):
        return len(self.items)

    def __getitems__(self, rows):
        groups, broken = {}, []
        for i in rows:
            name = f"item {i}"
            try:
                item = self.items[i]
                if isinstance(item, tuple):  # a torchvision data set
                    pixels, label = to_pixels(item[0], self.size), int(item[1])
                else:
                    name, label = item, self.labels[i]
                    with Image.open(item) as image:
                        pixels = to_pixels(image, self.size)
            except Exception as error:  # a decoder meets a broken file with any exception there is
                broken.append((i, f"{name}: {type(error).__name__}: {error}"))
            else:
                stack, labels, kept = groups.setdefault(pixels.shape, ([], [], []))
                stack.append(pixels)
                labels.append(label)
                kept.append(i)
        # one tensor a batch: to hand over many small ones costs more than to decode them
        return [(torch.from_numpy(np.stack(stack)), *rest) for stack, *rest in groups.values()], broken


def _decode(items, labels, names, classes, size, budget_gb, workers, what):
    n, start = len(items), time.time()
    processes = (cores() if workers is None else workers) if n >= 2000 else 0
    loader = torch.utils.data.DataLoader(_Decoder(items, labels, size), 256, num_workers=processes, collate_fn=tuple)
    pixels, kept, found_names, broken = None, [], [], []
    for groups, errors in loader:
        for row, error in errors:
            broken.append(row)
            print(f"skipped {error}", file=sys.stderr)
        for images, found, rows in groups:
            h, w = images.shape[1:3]
            if pixels is None:
                need = n * 3 * h * w / 1e9
                if need > budget_gb and labels is not None and size is not None:
                    print(f"{what}: {n:,} images, {need:.1f} GB, are decoded as they are needed", file=sys.stderr)
                    return Images(Stream(items, size, workers, broken), torch.tensor(labels), list(classes), names)
                if need > budget_gb:
                    raise ValueError(
                        f"{what}: {n:,} images of {w} x {h} take {need:.1f} GB in memory, more than the {budget_gb:g} "
                        "GB allowed: give an --image-size, with which files are decoded as they are needed; lower it "
                        "or --max-images; or raise --resident-gb"
                    )
                pixels = torch.empty((n, 3, h, w), dtype=torch.uint8)
            if (h, w) != pixels.shape[2:]:
                sizes = f"{pixels.shape[3]} x {pixels.shape[2]}, {w} x {h}, ..."
                raise ValueError(f"{what}: images differ in size ({sizes}): choose one with --image-size")
            pixels[len(kept) : len(kept) + len(images)] = images.permute(0, 3, 1, 2)
            kept += found
            found_names += [names[i] for i in rows]
        seen = len(kept) + len(broken)
        if sys.stderr.isatty() or (seen == n and n >= 2000):
            rate, end = seen / (time.time() - start), "\n" if seen == n else ""
            print(f"\r{what}: {seen:,} of {n:,} images, {rate:,.0f}/s ", end=end, file=sys.stderr, flush=True)
    if not kept:
        raise ValueError(f"{what}: none of the {n:,} files could be decoded as an image")
    if broken:
        print(f"{what}: skipped {len(broken)} of {n:,} files that could not be decoded", file=sys.stderr)
    labels = torch.tensor(kept)
    if classes is None:  # the data set does not name them
        classes = [str(i) for i in range(int(labels.max()) + 1)]
    return Images(pixels[: len(kept)], labels, list(classes), found_names)


# ---- shapes: a data set for a machine without one -------------------------------------------------------------------


def _box(x, y, cx, cy, w, h):
    return torch.maximum((x - cx).abs() - w, (y - cy).abs() - h)


# name: signed distance from the outline, about, for coordinates in which the shape has radius 1
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: torch.hypot(x, y) - 0.9,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.22,
    "square": lambda x, y: _box(x, y, 0, 0, 0.75, 0.75),
    "frame": lambda x, y: (torch.maximum(x.abs(), y.abs()) - 0.65).abs() - 0.2,
    "triangle": lambda x, y: torch.maximum(-y - 0.5, 0.866 * x.abs() + 0.5 * y - 0.5),
    "star": lambda x, y: torch.hypot(x, y) - 0.65 - 0.35 * torch.cos(5 * torch.atan2(y, x)),
    "plus": lambda x, y: torch.minimum(_box(x, y, 0, 0, 1, 0.28), _box(x, y, 0, 0, 0.28, 1)),
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.8 - torch.hypot(x - 0.5, y)),
    "bars": lambda x, y: torch.maximum((x.abs() - 0.55).abs() - 0.25, y.abs() - 0.9),
    "corner": lambda x, y: torch.minimum(_box(x, y, -0.5, 0, 0.28, 0.85), _box(x, y, 0.1, 0.57, 0.85, 0.28)),
}


@lru_cache(maxsize=4)
def make_shapes(n: int, size: int = 32, seed: int = 0) -> Images:
    """n images of 10 balanced classes: about a dozen copies of one shape, strewn over a sloping, noisy ground.

    Place, size and angle are drawn for each copy, colours for each image, all independently of the class: neither a
    colour nor a pixel tells it, while nearly every crop shows it, which is what a method that compares crops can
    learn from.
    """
    rng = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=rng) * (high - low) + low

    grid = 4  # cells a side, one copy in each
    labels = torch.arange(n)[torch.randperm(n, generator=rng)] % len(SHAPES)
    axis = (torch.arange(size) + 0.5) / size * grid
    y0, x0 = axis.view(-1, 1), axis.view(1, -1)
    slope_y, slope_x = uniform(-0.03, 0.03, 2, 1, 1, 1).unbind(1)
    image = uniform(0.35, 0.65, 1, 1, 1) + uniform(-0.04, 0.04, 3, 1, 1) + slope_y * (y0 - 2) + slope_x * (x0 - 2)
    sign = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, 1.0, -1.0)  # lighter or darker than the ground
    contrast = sign * uniform(0.25, 0.4, 1, 1, 1) + uniform(-0.04, 0.04, 3, 1, 1)
    for row, column in itertools.product(range(grid), range(grid)):
        radius, angle = uniform(0.38, 0.55, 1, 1), uniform(0, 2 * math.pi, 1, 1)
        dy, dx = ((d - c - uniform(0.35, 0.65, 1, 1)) / radius for d, c in ((y0, row), (x0, column)))
        y, x = dy * angle.cos() - dx * angle.sin(), dy * angle.sin() + dx * angle.cos()
        distance = torch.empty(n, size, size)
        for k, outline in enumerate(SHAPES.values()):
            distance[labels == k] = outline(x[labels == k], y[labels == k])
        inside = (0.5 - distance * radius * size / grid).clamp(0, 1)  # antialiased over about a pixel
        inside = inside * (uniform(0, 1, 1, 1) < 0.8)  # one in five is missing
        image = image + inside[:, None] * contrast * uniform(0.8, 1.2, 1, 1, 1)
    image = image + 0.03 * torch.randn(image.shape, generator=rng)
    return Images(image.clamp(0, 1).mul(255).round().to(torch.uint8), labels, list(SHAPES), [str(i) for i in range(n)])


# ---- views ----------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """How one view is made; probabilities are per image."""

    scale: tuple[float, float] = (0.2, 1.0)  # of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width : height
    size: int | None = None  # edge in pixels; None is `share` of MultiCrop's, to the nearest multiple of 4
    share: float = 1.0
    bicubic: bool = False  # else bilinear; both antialiased
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    reach: int | None = None  # pixels to either side that the blur takes in; None is a twentieth of the edge
    solarize: float = 0.0
    erase: float = 0.0  # a box of .02 to .33 of the view becomes the mean colour


class Recipe(NamedTuple):
    globals: tuple[View, ...]
    locals: tuple[View, ...] = ()
    balance: tuple[float, float] | None = None  # lambda_gg, lambda_gl; None is the mean over all pairs of views
    blur_above: int = 64  # px of the globals: the published recipes for small images have no blur


def multi_crop(
    boundary: float,
    share: float,
    n: int,
    balance: tuple[float, float] | None = None,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0),
) -> Recipe:
    """Two global views of [boundary, 1] of the area and n local ones of [.05, boundary], 2210.02808.

    share: of a local view's edge in a global one's; blur and solarize: of the first global, the second, the locals.
    """
    first, second, local = (
        View(bicubic=True, jitter=jitter, blur=b, solarize=s) for b, s in zip(blur, solarize, strict=True)
    )
    local = local._replace(scale=(0.05, boundary), share=share)
    return Recipe(tuple(v._replace(scale=(boundary, 1.0)) for v in (first, second)), (local,) * n, balance)


_simclr = View(scale=(0.08, 1.0))
_diet = View(
    (0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.2), jitter_p=0.3, grey=0.2, blur=0.2, sigma=(1, 2), reach=1, erase=0.25
)
_diet_2 = _diet._replace(blur=0.0, erase=0.0)
_diet_1 = _diet_2._replace(jitter_p=0.0, grey=0.0)
_diet_0 = _diet_1._replace(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
RECIPES = {
    "simsiam": Recipe((View(), View())),  # 2011.10566 section 3; 2302.00059 uses the same three on CIFAR
    "simclr": Recipe((_simclr, _simclr)),  # 2002.05709 appendix B.9
    "moco": Recipe((_simclr, _simclr)),  # 2003.04297
    # 2210.02808: baselines for CNNs and ViTs with 96 px to 224, then SSLight's with 128; other sizes in proportion
    "dino": multi_crop(0.14, 96 / 224, 6),
    "dino-vit": multi_crop(0.25, 96 / 224, 10),
    "swav": multi_crop(0.14, 96 / 224, 6, None, (0.8, 0.8, 0.8, 0.2), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    "sslight-cnn": multi_crop(0.3, 128 / 224, 6, (0.4, 0.6)),
    "sslight-vit": multi_crop(0.3, 128 / 224, 10, (0.4, 0.6)),
    "sslight-swav": multi_crop(0.3, 128 / 224, 6, (0.4, 0.6), (0.8, 0.8, 0.8, 0.2), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    # as published CIFAR benchmarks have them: no locals, which would be of 12 px, and SwAV's colours half as strong
    "dino-small": multi_crop(0.14, 1, 0, blur=(0.0, 0.0, 0.0)),
    "swav-small": multi_crop(0.14, 1, 0, None, (0.4, 0.4, 0.4, 0.1), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    # 2406.10743: one view; strengths 0 (none), 1 (crop and flip), 2 (and colours), 3 (and blur and erasing)
    "diet": Recipe((_diet,), blur_above=0),
    "diet-2": Recipe((_diet_2,)),
    "diet-1": Recipe((_diet_1,)),
    "diet-0": Recipe((_diet_0,)),
}
CROP_AND_FLIP = Recipe((View((0.08, 1.0), jitter_p=0.0, grey=0.0, blur=0.0),))  # one view, to train a probe on


def adjust(
    recipe: Recipe,
    boundary: float | None = None,
    global_scale: Sequence[float] | None = None,
    local_scale: Sequence[float] | None = None,
    n_locals: int | None = None,
    global_size: int | None = None,
    local_size: int | None = None,
    blur: Sequence[float] | None = None,
    solarize: Sequence[float] | None = None,
    balance: Sequence[float] | None = None,
    n_globals: int | None = None,
) -> Recipe:
    """The recipe with some knobs turned; None leaves one as it is. boundary s sets both scales, [s, 1] and [.05, s].

    blur and solarize have three probabilities: of the first global view, the second, and the locals. A recipe without
    locals gets them, if n_locals asks for some, from its first global view: areas below that one's, 3/7 of its edge.
    Raises ValueError for what cannot be.
    """
    if boundary is not None:
        if global_scale or local_scale:
            raise ValueError("a boundary sets both scales: give it or them, not both")
        global_scale, local_scale = (boundary, 1.0), (0.05, boundary)
    for name, scale in ("global", global_scale), ("local", local_scale):
        if scale and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"the {name} scale {scale[0]:g} to {scale[1]:g} must be shares of the area, small to large"
            )
    for name, p in ("blur", blur), ("solarize", solarize):
        if p and not all(0 <= x <= 1 for x in p):
            raise ValueError(f"{name}: {' '.join(f'{x:g}' for x in p)} must be probabilities")
    small = any(size is not None and size < 8 for size in (global_size, local_size))
    if (n_locals or 0) < 0 or small or min(balance or [0]) < 0:
        raise ValueError("views need 0 or more locals, edges of 8 pixels or more and weights of 0 or more")
    views, first = list(recipe.globals), recipe.globals[0]
    views = (views * 2)[: n_globals or len(views)]
    local = recipe.locals[0] if recipe.locals else first._replace(scale=(0.05, first.scale[0]), share=96 / 224)
    if global_scale:
        views = [v._replace(scale=tuple(global_scale)) for v in views]
    if local_scale:
        local = local._replace(scale=tuple(local_scale))
    for name, p in ("blur", blur), ("solarize", solarize):
        if p:
            views = [v._replace(**{name: x}) for v, x in zip(views, p)]
            local = local._replace(**{name: p[2]})
    views = [v._replace(size=global_size or v.size) for v in views]
    local = local._replace(size=local_size or local.size)
    n = len(recipe.locals) if n_locals is None else n_locals
    balance = tuple(balance) if balance else recipe.balance
    return Recipe(tuple(views), (local,) * n, balance, 0 if blur else recipe.blur_above)


# What is drawn for a view of an image, and how many numbers each is
PARAMETERS = {
    "box": 4,  # top, left, height, width of the crop
    "flip": 1,  # 0 or 1, as are grey and solarize
    "factor": 3,  # of brightness, contrast, saturation; 1 for none
    "order": 3,  # of the three
    "hue": 1,  # a shift in turns; 0 for none
    "hue_after": 1,  # that many of the three
    "grey": 1,
    "sigma": 1,  # of the blur, in pixels; 0 for none
    "solarize": 1,
    "erased": 4,  # a box like the crop's, but in pixels of the view; empty for none
}
_FIRST = dict(zip(PARAMETERS, itertools.accumulate([0, *PARAMETERS.values()])))
_ORDERS = np.array(list(itertools.permutations(range(3))), np.float32)


def named(parameters: Tensor) -> dict[str, Tensor]:
    """(n, P) -> {name: (n,) or (n, k)}, as PARAMETERS has them; what is 0 or 1 as bool."""
    p = {name: parameters[:, _FIRST[name] : _FIRST[name] + k] for name, k in PARAMETERS.items()}
    p |= {name: p[name][:, 0] for name, k in PARAMETERS.items() if k == 1}
    return p | {name: p[name] > 0.5 for name in ("flip", "grey", "solarize")}


class MultiCrop:
    """uint8 (n, 3, H, W) on `device` -> a list of float32 (n, 3, S, S), globals first, normalised by mean and std."""

    def __init__(self, recipe: str | Recipe, size: int, mean=IMAGENET_MEAN, std=IMAGENET_STD, device="cpu"):
        recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
        size = recipe.globals[0].size or size
        self.views = [
            v._replace(
                size=v.size or (size if v.share == 1 else max(8, 4 * round(v.share * size / 4))),
                blur=v.blur if size > recipe.blur_above else 0.0,
            )
            for v in (*recipe.globals, *recipe.locals)
        ]
        self.n_globals, self.balance = len(recipe.globals), recipe.balance
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
        self._render = self._render_all

    def __call__(self, pixels: Tensor, rng: np.random.Generator) -> list[Tensor]:
        parameters = self.sample(len(pixels), *pixels.shape[2:], rng)
        return self.render(pixels, parameters.to(pixels.device))

    def sample(self, n: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
        """(V, n, P) on the CPU: what PARAMETERS lists, for every view of n images."""
        return torch.from_numpy(sample_views(self.views, n, height, width, rng))

    def render(self, pixels: Tensor, parameters: Tensor) -> list[Tensor]:
        """Pure: the same pixels (n, 3, H, W) and parameters (V, n, P) give the same views; in fp32 whatever autocast is
        on, which would round their colours to bf16."""
        with torch.autocast(pixels.device.type, enabled=False), torch.no_grad():
            return self._render(pixels, parameters)

    def compile(self) -> None:
        self._render = torch.compile(self._render_all, dynamic=False)

    def _render_all(self, pixels: Tensor, parameters: Tensor) -> list[Tensor]:
        out = []
        for view, p in zip(self.views, map(named, parameters.unbind()), strict=True):
            x = render_view(pixels, p, view.size, view.bicubic, view.reach).sub_(self.mean).div_(self.std)
            out.append(erase(x, p["erased"]) if view.erase else x)
        return out


def sample_views(views: Sequence[View], n: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Parameters (V, n, P) of views of n images, distributed as in torchvision's transforms."""
    limits = _limits(tuple(views), height * width)
    u = rng.random((16, len(views), n), np.float32)
    out = np.zeros((len(views), n, sum(PARAMETERS.values())), np.float32)
    p = {name: out[..., _FIRST[name] : _FIRST[name] + k] for name, k in PARAMETERS.items()}

    sample_boxes(views, limits, u[:4], height, width, rng, p["box"])
    on = u[4:9] < limits["chance"]
    for name, row in zip(("flip", "grey", "solarize"), on):
        p[name][..., 0] = row
    change = (2 * u[9:13] - 1) * (limits["jitter"] * on[3])  # (4, V, n)
    p["factor"][:] = np.maximum(1 + change[:3], 0).transpose(1, 2, 0)
    p["hue"][..., 0] = change[3]
    place = (u[13] * 24).astype(np.int64)  # one of the 24 orders of four operations
    p["order"][:] = _ORDERS[place >> 2]
    p["hue_after"][..., 0] = place & 3
    low, high = limits["sigma"]
    p["sigma"][..., 0] = (low + u[14] * (high - low)) * on[4]
    for view, boxes, due in zip(views, p["erased"], u[15]):
        if view.erase:
            boxes[:] = sample_erased(view.size, n, rng) * (due < view.erase)[:, None]
    return out


@lru_cache
def _limits(views: tuple[View, ...], area: int) -> dict[str, np.ndarray]:
    """What the views' numbers are drawn between, (k, V, 1) each; area of the images, in pixels."""
    limits = {
        "chance": [(v.flip, v.grey, v.solarize, v.jitter_p, v.blur) for v in views],
        "jitter": [v.jitter for v in views],
        "sigma": [v.sigma for v in views],
        "area": [(v.scale[0] * area, v.scale[1] * area) for v in views],
        "log_ratio": np.log([v.ratio for v in views]),
    }
    return {name: np.array(rows, np.float32).T[..., None] for name, rows in limits.items()}


def sample_boxes(
    views: Sequence[View],
    limits: dict[str, np.ndarray],
    u: np.ndarray,
    height: int,
    width: int,
    rng: np.random.Generator,
    out: np.ndarray,
) -> None:
    """Fills out (V, n, 4) with crops as RandomResizedCrop draws them: ten tries, the first legal one counts. u (4, V,
    n) is for the first try's area and shape, and for the place; the other tries are drawn where they are needed.
    """
    small, large = limits["area"]
    low, high = limits["log_ratio"]

    def shapes(area: np.ndarray, ratio: np.ndarray, rows=slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        root = np.exp((low[rows] + ratio * (high - low)[rows]) / 2)  # of width : height
        edge = np.sqrt(small[rows] + area * (large - small)[rows])
        h, w = np.rint(edge / root), np.rint(edge * root)
        return h, w, (h > 0) & (h <= height) & (w > 0) & (w <= width)

    h, w, legal = shapes(u[0], u[1])
    if not legal.all():
        view, image = (~legal).nonzero()
        more_h, more_w, fits = shapes(*rng.random((2, len(view), 9), np.float32), rows=view)
        chosen = np.arange(len(view)), fits.argmax(1)
        h[view, image], w[view, image], legal[view, image] = more_h[chosen], more_w[chosen], fits.any(1)
    out[..., 0], out[..., 1] = np.floor(u[2] * (height - h + 1)), np.floor(u[3] * (width - w + 1))
    out[..., 2], out[..., 3] = h, w
    for k in (~legal).any(1).nonzero()[0]:  # none legal: the largest central crop of a legal shape
        ratio = views[k].ratio
        whole_h, whole_w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
        out[k, ~legal[k]] = (height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w


def sample_erased(side: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 4) boxes in a view of that edge as RandomErasing draws them: ten tries, the first that fits counts."""
    u = rng.random((22, n), np.float32)
    area, aspect = side**2 * (0.02 + u[:10] * 0.31), np.exp(math.log(0.3) + u[10:20] * math.log(3.3 / 0.3))
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (h < side) & (w < side)
    chosen = fits.argmax(0), np.arange(n)
    h, w = h[chosen], w[chosen]
    box = np.stack([np.floor(u[20] * (side - h + 1)), np.floor(u[21] * (side - w + 1)), h, w], 1)
    return box * fits.any(0)[:, None]


def erase(x: Tensor, box: Tensor) -> Tensor:
    """(n, 3, S, S), normalised, with the box of each image at zero, the mean colour."""
    top, left, h, w = box[:, :, None].unbind(1)
    place = torch.arange(x.shape[-1], device=x.device)
    rows, columns = (place >= top) & (place < top + h), (place >= left) & (place < left + w)
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.0)


def resize_matrix(
    start: Tensor, length: Tensor, size: int, extent: int, flip: Tensor | None = None, bicubic: bool = False
) -> Tensor:
    """(n, size, extent): row o of image i holds the weights with which the pixels of [start_i, start_i + length_i)
    make pixel o.

    A triangle, or Keys' cubic, as wide as the reduction, cut at the crop's edge and normalised: torchvision's
    antialiased bilinear and bicubic resize, exactly.
    """
    scale = (length / size)[:, None]
    out = torch.arange(size, device=start.device, dtype=torch.float32).expand(len(start), size)
    if flip is not None:
        out = torch.where(flip[:, None], size - 1 - out, out)
    centre = start[:, None] + (out + 0.5) * scale
    x = torch.arange(extent, device=start.device) + 0.5
    away = (x - centre[..., None]).abs() / scale[..., None].clamp(min=1)
    if bicubic:
        near, far = (1.5 * away - 2.5) * away**2 + 1, ((-0.5 * away + 2.5) * away - 4) * away + 2
        weight = torch.where(away < 1, near, torch.where(away < 2, far, 0.0))
    else:
        weight = (1 - away).clamp(min=0)
    inside = (x > start[:, None]) & (x < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(-1, keepdim=True)


def blur_matrix(sigma: Tensor, size: int, reach: int | None = None) -> Tensor:
    """(n, size, size): a Gaussian over `reach` pixels to either side, mirrored at the border; None is a twentieth of
    the edge (2002.05709)."""
    reach = reach or max(1, size // 20)
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel * (kernel > 1e-12)  # products with denormals take 10 times as long on a CPU
    kernel = kernel / kernel.sum(1, keepdim=True)  # (n, K)
    source = torch.arange(size, device=sigma.device)[:, None] + offset  # (size, K)
    source = (size - 1) - ((size - 1) - source.abs()).abs()
    shape = (len(sigma), size, len(offset))
    return sigma.new_zeros(len(sigma), size, size).scatter_add_(2, source.expand(shape), kernel[:, None].expand(shape))


def grey(x: Tensor) -> Tensor:
    """(n, 3, S, S) -> luma (n, 1, S, S)"""
    return (0.2989 * x[:, 0]).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)[:, None]


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """(n, 3, S, S) in 0..1 -> the same with the hue of HSV moved by (n,) turns."""
    r, g, b = x.unbind(1)
    # Hue in sixths of a turn, by ordering the channels, not by asking which is largest: torch.where is slow on a CPU.
    high, low = torch.maximum(g, b), torch.minimum(g, b)
    value, middle = torch.maximum(r, high), torch.minimum(r, high)
    chroma = value - torch.minimum(low, middle)
    hue = (g < b) * -6.0
    hue += (r < high) * (-2 - 2 * hue)
    hue = hue.add_((middle - low).div_(chroma.clamp(min=1e-12))).abs_().add_(6 * turns[:, None, None])
    hue -= (hue / 6).floor_().mul_(6)
    weights = torch.stack([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1)
    return weights.clamp_(0, 1).sub_(1).mul_(chroma[:, None]).add_(value[:, None])


def render_view(
    pixels: Tensor, p: dict[str, Tensor], size: int, bicubic: bool = False, reach: int | None = None
) -> Tensor:
    """uint8 (n, 3, H, W) and `named` parameters -> float32 (n, 3, size, size) in 0..1; reach is the blur's."""
    bytewise = size >= BYTEWISE and not _everywhere(pixels)
    x = (crop_bytes if bytewise else _crop)(pixels, p["box"], p["flip"], size, bicubic)
    for step in range(4):
        x = _where(x, (p["hue"] != 0) & (p["hue_after"] == step), shift_hue, p["hue"])
        if step < 3:
            blend_(x, p["order"][:, step], p["factor"])
    x = _where(x, p["grey"], lambda x: grey(x).expand_as(x))
    x = _where(x, p["sigma"] > 0, partial(_blur, reach=reach), p["sigma"])
    return _where(x, p["solarize"], lambda x: torch.where(x >= 0.5, 1 - x, x))


BYTEWISE = 96  # px of a view; from here on a CPU crops image by image, see crop_bytes


def _crop(pixels: Tensor, box: Tensor, flip: Tensor, size: int, bicubic: bool) -> Tensor:
    """Crop, resize and flip as two products with a matrix of weights an image: exact, and one call for all of them."""
    n, _, height, width = pixels.shape
    top, left, h, w = box.unbind(1)
    y_weights = resize_matrix(top, h, size, height, bicubic=bicubic).div_(255)
    x_weights = resize_matrix(left, w, size, width, flip, bicubic)
    x = pixels.permute(0, 2, 1, 3).float().reshape(n, height, 3 * width)  # rows first: two plain batched products
    x = (y_weights @ x).view(n, size * 3, width) @ x_weights.transpose(1, 2)
    x = x.view(n, size, 3, size).transpose(1, 2).contiguous()
    return x.clamp_(0, 1) if bicubic else x  # which overshoots at edges


def crop_bytes(pixels: Tensor, box: Tensor, flip: Tensor, size: int, bicubic: bool) -> Tensor:
    """The same, an image at a time, by torch's resize of bytes: rounded after each direction, as PIL does, so about
    half a grey level off; 4 times faster than `_crop` for a view of 224 px and 14 times for one of 96."""
    out = torch.empty(len(pixels), 3, size, size, dtype=torch.uint8)
    for image, view, (top, left, h, w), flipped in zip(pixels, out, box.int().tolist(), flip.tolist()):
        part = image[None, :, top : top + h, left : left + w]
        part = F.interpolate(part, (size, size), mode="bicubic" if bicubic else "bilinear", antialias=True)[0]
        view.copy_(part.flip(2) if flipped else part)
    return out.float().div_(255)


BRIGHTNESS, CONTRAST, SATURATION = range(3)


def blend_(x: Tensor, step: Tensor, factor: Tensor) -> None:
    """One of brightness, contrast and saturation, in place; step (n,) says which for each image, factor (n, 3) how
    much.

    All are clamp(f x + (1 - f) reference), the reference being black, the mean luma and the luma: one expression
    serves them all.
    """
    f = factor.gather(1, step[:, None].long()).view(-1, 1, 1, 1)
    to_mean, to_luma = ((1 - f) * (step == k).view(-1, 1, 1, 1) for k in (CONTRAST, SATURATION))
    luma = grey(x)
    mean = luma.mean((2, 3), keepdim=True)
    x.mul_(f).add_(luma.mul_(to_luma).add_(to_mean * mean)).clamp_(0, 1)


def _blur(x, sigma, reach):
    matrix = blur_matrix(sigma, x.shape[-1], reach)[:, None]
    return matrix @ x @ matrix.transpose(2, 3)


def _everywhere(x):
    """Whether to compute on all images and select: on a GPU, or compiled, asking which are due stops the stream."""
    return x.is_cuda or torch.compiler.is_compiling()


def _where(x, mask, function, *arguments):
    """function on the images of the mask."""
    if _everywhere(x):
        return torch.where(mask.view(-1, 1, 1, 1), function(x, *arguments), x)
    rows = mask.nonzero()[:, 0]
    if len(rows):
        x[rows] = function(x[rows], *(a[rows] for a in arguments))
    return x
