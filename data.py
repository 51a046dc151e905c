"""Images: from disk into memory or as a stream, their splits, and the batches of a run."""

import argparse
import itertools
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from launch import barrier


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


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor there; to a GPU from pinned memory, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def load_data(args: argparse.Namespace, source: str, split: str) -> Images:
    """load_images by the flags; one rank goes first, so that a download happens once."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for turn in (True, False):
        if (rank == 0) == turn:
            images = load_images(
                source,
                split,
                args.image_size,
                root=args.data_root,
                limit=args.max_images if split == "train" else None,
                budget_gb=args.resident_gb,
                workers=args.workers,
            )
        barrier()
    return images


def decoded(pixels: Tensor | Stream, rows: Tensor) -> Tensor:
    """Which of the rows (n,) show their own image: not those whose file, on any rank, a stream could not decode."""
    if not isinstance(pixels, Stream):
        return torch.ones(len(rows), dtype=torch.bool)
    broken = torch.zeros(len(pixels), dtype=torch.int32)
    broken[list(pixels.broken)] = 1
    if dist.is_initialized():
        place = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        broken = broken.to(place)
        dist.all_reduce(broken, dist.ReduceOp.MAX)
    return broken.cpu()[rows.cpu()] == 0


def split_images(n: int, held_out: float, parts: int) -> list[Tensor]:
    """[held-out, part, ...]: disjoint index tensors of one shuffle, the same for every seed; equal parts."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    out, rest = order[: int(n * held_out)], order[int(n * held_out) :]
    size = len(rest) // parts
    return [out, *(rest[i * size : (i + 1) * size] for i in range(parts))]


def fingerprint(images: Images) -> list[int | None]:
    """Of the images and of their order: shape, a checksum of their names, and one over a row of pixels of each, None
    for a stream."""
    names = zlib.crc32("\n".join(images.names).encode())
    if isinstance(images.pixels, Stream):
        return [*images.pixels.shape, names, None]
    row = images.pixels[:, :, images.pixels.shape[2] // 2]
    return [*images.pixels.shape, names, zlib.crc32(row.contiguous().numpy())]
