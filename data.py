"""Images on disk, in memory or streamed; their splits; the batches of a run.

images = load_images("cifar10")          # uint8 (N, 3, H, W), labels, classes, names
batches = Batches(images.pixels, rows, MultiCrop("simsiam", 32), 512, device)
views, index = batches(step)             # [(B, 3, S, S), ...], (B,)
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from launch import barrier, is_main, memory_format
from losses import ranks
from views import MultiCrop


class Images(NamedTuple):
    pixels: "Tensor | Stream"  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,), -1 where there is none
    classes: list[str]  # empty where there are no labels
    names: list[str]  # paths relative to the folder, or indices in the data set

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
    split: str = "train",  # or "test"
    size: int | None = None,  # edge in pixels; None: as stored, if all images have the same size
    *,
    root: str = "data",
    limit: int | None = None,  # so many images of a fixed shuffle, which does not depend on the seed
    budget_gb: float = 16.0,  # memory for the pixels; beyond it, images with a `size` are decoded on access (Stream)
    workers: int | None = None,  # decoding threads; None: a machine's cores, shared among its ranks
    cache: str | None = None,  # folder in which decoded pixels are kept for later starts
) -> Images:
    """Loads one split as 8-bit RGB, into memory if it fits.

    source: `shapes` (synthetic), a name in DATASETS (downloaded to `root`), or a folder. With train/ and test/ or val/
    in it, their sub-folders are the classes; without, all images below it are a training split without labels. A file
    that cannot be decoded is reported on stderr and skipped. Raises FileNotFoundError, ConnectionError or ValueError.
    """
    if source == "shapes":
        n, seed = {"train": (3000, 0), "test": (1000, 1)}[split]
        return make_shapes(min(n, limit or n), size or 32, seed)
    if source in DATASETS:
        items, labels, classes = _torchvision_items(source, split, root)
        names = [str(i) for i in range(len(items))]
    else:
        items, labels, classes = _folder_items(source, split)
        names = [os.path.relpath(path, source) for path in items]
    if limit is not None and limit < len(items):
        keep = np.random.default_rng(0).permutation(len(items))[:limit].tolist()
        items = [items[i] for i in keep] if isinstance(items, list) else torch.utils.data.Subset(items, keep)
        labels = labels and [labels[i] for i in keep]
        names = [names[i] for i in keep]

    stream = Stream(items, size, workers, f"{source} ({split})")
    n, _, height, width = stream.shape
    need = n * 3 * height * width / 1e9
    if need > budget_gb:
        if size is None or labels is None:
            raise ValueError(
                f"{stream.what}: {n:,} images of {width} x {height} take {need:.1f} GB in memory, more than the "
                f"{budget_gb:g} GB allowed: give an --image-size, with which files are decoded as they are needed; "
                "lower it or --max-images; or raise --resident-gb"
            )
        print(f"{stream.what}: {n:,} images, {need:.1f} GB, are decoded as they are needed", file=sys.stderr)
        return Images(stream, torch.tensor(labels), list(classes), names)
    if cache and len(items) >= CACHED and isinstance(items, list):
        pixels, kept = read_cached(stream, os.path.abspath(source), names, f"{split}-{size}-{limit}", Path(cache))
    else:
        pixels, kept = stream.read_all()
    labels = torch.tensor([(stream.labels if labels is None else labels)[row] for row in kept])
    if classes is None:  # the data set does not name them
        classes = [str(i) for i in range(int(labels.max()) + 1)]
    return Images(pixels, labels, list(classes), [names[row] for row in kept])


def load_data(args: argparse.Namespace, source: str, split: str) -> Images:
    """Calls load_images with the flags. Rank 0 goes first and downloads, then the first rank of each other machine,
    which decodes and caches; then the rest, which map the cache."""
    for flag, value in ("--max-images", args.max_images), ("--image-size", args.image_size):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be 1 or above")
    limit = args.max_images if split == "train" else None
    cache = {"auto": os.path.join(args.data_root, "decoded"), "none": None}.get(args.cache, args.cache)
    where = {"root": args.data_root, "budget_gb": args.resident_gb, "workers": args.workers, "cache": cache}
    own_turn = 0 if is_main() else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    for turn in range(3):
        if turn == own_turn:
            images = load_images(source, split, args.image_size, limit=limit, **where)
        barrier()
    return images


CACHED = 2000  # fewer files than this are decoded so fast that they are not cached


def read_cached(stream: "Stream", source: str, names: list[str], what: str, folder: Path) -> tuple[Tensor, list[int]]:
    """Stream.read_all with a cache: a file of raw pixels, memory-mapped (copy-on-write), so processes share its pages.
    It is rewritten if it is incomplete or an image has changed. If it cannot be written, a warning is printed."""
    stamps = np.array([stamp(file) for file in stream.files], np.int64)
    known = {"names": zlib.crc32("\n".join(names).encode()), "stamps": zlib.crc32(stamps), "shape": list(stream.shape)}
    name = f"{os.path.basename(source)}-{what}-{zlib.crc32(source.encode()):08x}"
    pixels_file, facts_file = folder / f"{name}.pixels", folder / f"{name}.json"
    try:
        facts = json.loads(facts_file.read_text())
        kept, shape = facts.pop("kept"), facts["shape"]
        kept = list(range(shape[0])) if kept is None else kept
        n = len(kept) * math.prod(shape[1:])
        if facts == known and pixels_file.stat().st_size == n:
            return torch.from_file(str(pixels_file), size=n, dtype=torch.uint8).view(-1, *shape[1:]), kept
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or not whole
        pass
    pixels, kept = stream.read_all()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts_file.unlink(missing_ok=True)
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        try:
            pixels.numpy().tofile(temporary)
            os.replace(temporary, pixels_file)
            temporary.write_text(json.dumps({**known, "kept": None if len(kept) == len(stream) else kept}))
            os.replace(temporary, facts_file)
        finally:
            temporary.unlink(missing_ok=True)
        return torch.from_file(str(pixels_file), size=pixels.numel(), dtype=torch.uint8).view(pixels.shape), kept
    except OSError as error:
        print(f"{stream.what}: decoded pixels are not kept in '{folder}': {error}", file=sys.stderr)
        return pixels, kept


def stamp(file: str) -> tuple[int, int]:
    """(size, modification time) of a file; (-1, -1) for a broken link, which decoding will skip."""
    try:
        stat = os.stat(file)
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _torchvision_items(name, split, root):
    """(data set of (PIL image, label), None, class names), or (paths, labels, class names) as from a folder."""
    class_name, train, test = DATASETS[name]
    download = {} if name in BY_HAND else {"download": True}
    try:
        dataset = getattr(datasets, class_name)(root, **download, **(train if split == "train" else test))
    except ImportError as error:
        raise ValueError(f"torchvision's {class_name} needs another package: pip install {error.name}") from error
    except Exception as error:  # from urllib, tarfile, hashing, ...
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
        return [file for file, _ in dataset.samples], dataset.targets, dataset.classes
    return dataset, None, getattr(dataset, "classes", None)


def image_files(folder):
    """Sorted paths of all images below a folder. Links are followed, but no folder is visited twice."""
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # through a link, which may be a cycle
            folders.clear()
            continue
        seen.add(real)
        files += [os.path.join(place, n) for n in names if n.lower().endswith((*IMG_EXTENSIONS, ".gif"))]
    if not files:
        raise FileNotFoundError(f"no image below '{folder}' ({' '.join(IMG_EXTENSIONS)} .gif)")
    return sorted(files)


def _folder_items(source, split):
    """(paths, labels, class names). Without a train/ inside, labels are -1 and there are no class names."""
    if not os.path.isdir(source):
        known = ", ".join(["shapes", *DATASETS])
        raise FileNotFoundError(f"'{source}' is neither a folder nor a data set's name; known names: {known}")
    train, test, val = (os.path.join(source, name) for name in ("train", "test", "val"))
    if not os.path.isdir(train) and split == "train":
        files = image_files(source)
        return files, [-1] * len(files), []
    held = test if os.path.isdir(test) else val
    folder = train if split == "train" else held
    if not os.path.isdir(train) or not os.path.isdir(folder):
        raise FileNotFoundError(f"'{source}' has no train/ and test/ or val/ inside, so there is no test split to load")
    classes = sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    files, index, labels = image_files(folder), {name: i for i, name in enumerate(classes)}, []
    for file in files:
        name = os.path.relpath(file, folder).split(os.sep)[0]
        if classes and name not in index:
            some = ", ".join(classes[:5])
            raise ValueError(f"'{file}' is in no class of '{source}/train' ({len(classes)} classes: {some} ...)")
        labels.append(index.get(name, -1))
    return files, labels, classes


def cores() -> int:
    """The cores that this process may use, divided by the number of ranks on the machine."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def to_pixels(image: Image.Image, size: int | None) -> np.ndarray:
    """uint8 RGB (H, W, 3) of a PIL image. With a size, its centre square is resized to that, antialiased."""
    w, h = image.size
    if min(w, h) < 8:
        raise ValueError(f"{w} x {h} pixels: an edge of fewer than 8 pixels shows nothing")
    if w * h > Image.MAX_IMAGE_PIXELS:  # PIL raises only from twice this on
        raise ValueError(f"{w} x {h} pixels, more than {Image.MAX_IMAGE_PIXELS:,}: a decompression bomb?")
    if size is not None:
        image.draft(None, (size, size))  # decodes a JPEG at 1/2, 1/4 or 1/8 if that still covers the size
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    image.load()  # the mode of a few formats may change here
    if image.mode != "RGB":
        image = image.convert("RGB")  # would copy an RGB image
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.array(image)


class Stream:
    """Images that are decoded on access, indexed by rows like a uint8 tensor (N, 3, H, W).

    files: paths, or a torchvision data set of (image, label). size: as in load_images; H and W are those of the first
    image that can be decoded. workers: decoding threads (PIL releases the GIL), by default one per core. A file that
    cannot be decoded is reported on stderr once and replaced by another image of the same request, or a grey square if
    there is none. `broken` holds the rows of such files found so far.
    """

    device = torch.device("cpu")

    def __init__(self, files: Sequence, size: int | None = None, workers: int | None = None, what: str = "images"):
        self.files, self.size, self.what = files, size, what
        self.pool = ThreadPoolExecutor(workers or cores())
        self.labels: dict[int, int] = {}  # row: label, of a torchvision data set's images, once they are decoded
        self.broken: set[int] = set()
        self.asked: dict[bytes, tuple[Tensor, list[Future]]] = {}
        first = next((x for x in map(self._decode, range(len(self))) if x is not None), None)
        if first is None:
            raise ValueError(f"{self.what}: none of the {len(self):,} files could be decoded as an image")
        self.shape = (len(self), 3, *first.shape[:2])

    def __len__(self) -> int:
        return len(self.files)

    def ahead(self, rows: Tensor) -> None:
        """Starts to decode rows that will be requested next, in this order."""
        key = rows.numpy().tobytes()
        if key in self.asked:
            return
        if len(self.asked) == 4:  # the oldest was never fetched
            self.asked.pop(next(iter(self.asked)))
        out = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.asked[key] = out, self._submit(out, rows, 8)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        rows = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows.cpu()
        self.ahead(rows)
        out, tasks = self.asked.pop(rows.numpy().tobytes())
        for task in tasks:
            task.result()
        bad = torch.tensor([row in self.broken for row in rows.tolist()], dtype=torch.bool)
        if bad.any():
            out[bad] = 128 if bad.all() else out[~bad][0]
        return out

    def read_all(self) -> tuple[Tensor, list[int]]:
        """(pixels (n, 3, H, W), their rows) of all images that can be decoded. The stream cannot be used afterwards."""
        n, start, chunk = len(self), time.time(), 64
        pixels = torch.empty(self.shape, dtype=torch.uint8)
        try:
            for i, task in enumerate(self._submit(pixels, torch.arange(n), chunk)):
                task.result()
                seen = min((i + 1) * chunk, n)
                if sys.stderr.isatty() or (seen == n and n >= 2000):
                    rate, end = seen / (time.time() - start), "\n" if seen == n else ""
                    text = f"\r{self.what}: {seen:,} of {n:,} images, {rate:,.0f}/s "
                    print(text, end=end, file=sys.stderr, flush=True)
        finally:
            self.pool.shutdown(cancel_futures=True)  # otherwise Ctrl-C waits until all are decoded
        kept = [row for row in range(n) if row not in self.broken]
        if self.broken:
            print(f"{self.what}: skipped {n - len(kept)} of {n:,} files that could not be decoded", file=sys.stderr)
            for i in range(0, len(kept), chunk):  # in place: a second copy may not fit into memory
                rows = kept[i : i + chunk]
                pixels[i : i + len(rows)] = pixels[rows]
        return pixels[: len(kept)], kept

    def _submit(self, out: Tensor, rows: Tensor, chunk: int) -> list[Future]:
        """Starts to fill out (n, 3, H, W) with the rows, `chunk` of them in a task."""
        return [self.pool.submit(self._fill, *task) for task in zip(out.split(chunk), rows.split(chunk))]

    def _fill(self, out: Tensor, rows: Tensor) -> None:
        height, width = self.shape[2:]
        for image, row in zip(out.numpy(), rows.tolist()):
            pixels = self._decode(row)
            if pixels is not None and pixels.shape[:2] != (height, width):
                sizes = f"{width} x {height}, {pixels.shape[1]} x {pixels.shape[0]}, ..."
                raise ValueError(f"{self.what}: images differ in size ({sizes}): choose one with --image-size")
            if pixels is not None:
                image[:] = pixels.transpose(2, 0, 1)

    def _decode(self, row: int) -> np.ndarray | None:
        """uint8 RGB (H, W, 3), or None if the file cannot be decoded."""
        name = f"item {row}"
        try:
            item = self.files[row]
            if isinstance(item, tuple):  # of a torchvision data set
                self.labels[row] = int(item[1])
                return to_pixels(item[0], self.size)
            name = item
            with Image.open(item) as image:
                return to_pixels(image, self.size)
        except MemoryError:  # not the file's fault
            raise
        except Exception as error:  # decoders raise anything on a broken file
            if row not in self.broken:
                self.broken.add(row)
                sys.stderr.write(f"skipped {name}: {type(error).__name__}: {error}\n")  # one write, unlike print()
            return None


def in_turn(pixels: Tensor | Stream, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yields pixels[rows] for each batch of rows, while a stream decodes the next one."""
    for n, rows in enumerate(batches):
        if isinstance(pixels, Stream):
            for now_or_next in batches[n : n + 2]:
                pixels.ahead(now_or_next.cpu())
        yield pixels[rows]


def decoded(pixels: Tensor | Stream, rows: Tensor) -> Tensor:
    """bool (n,): whether a row shows its own image. False where a stream, on any rank, could not decode the file."""
    if not isinstance(pixels, Stream):
        return torch.ones(len(rows), dtype=torch.bool)
    broken = torch.zeros(len(pixels), dtype=torch.int32)
    broken[list(pixels.broken)] = 1
    if dist.is_initialized():
        broken = broken.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(broken, dist.ReduceOp.MAX)
    return broken.cpu()[rows.cpu()] == 0


def channel_stats(pixels: Tensor | Stream) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in 0..1, over evenly spaced images."""
    x = pixels[:: max(1, len(pixels) // (1000 if isinstance(pixels, Stream) else 10_000))]
    n = x.numel() / 3
    parts = x.split(500)  # everything as double would need too much memory
    mean = sum(part.double().div(255).sum((0, 2, 3)) for part in parts) / n
    centre = mean.view(3, 1, 1)
    variance = sum((part.double().div(255) - centre).square().sum((0, 2, 3)) for part in parts) / (n - 1)
    std = variance.sqrt().clamp(min=1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def split_images(n: int, held_out: float, parts: int) -> list[Tensor]:
    """[held-out, part, ...]: disjoint index tensors of a fixed shuffle; the parts are equally long."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    out, rest = order.tensor_split([int(n * held_out)])
    return [out, *rest[: len(rest) // parts * parts].tensor_split(parts)]


def fingerprint(images: Images) -> list[int | None]:
    """[*shape, checksum of the names, checksum of each image's middle row of pixels (None for a stream)]."""
    pixels, checksum = images.pixels, None
    if not isinstance(pixels, Stream):
        checksum = zlib.crc32(pixels[:, :, pixels.shape[2] // 2].contiguous().cpu().numpy())
    return [*pixels.shape, zlib.crc32("\n".join(images.names).encode()), checksum]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device; to a GPU from pinned memory, without waiting."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


# All random numbers come from default_rng((seed, purpose, step)), so a run resumes from its step number alone.
WEIGHTS, ALPHAS, GATES, HELD_OUT, RECALIBRATION, ORDER = range(6)


@lru_cache(maxsize=4)  # this epoch and the next, for weights and alphas
def _order(seed: int, purpose: int, epoch: int, n: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, ORDER, purpose, epoch)).permutation(n))


@dataclass(eq=False)
class Batches:
    """batches(step) -> ([(B, 3, S, S), ...], index (B,)) of this rank: a pure function of (seed, step).

    The index counts within the rows and is DIET's class. Each rank draws for all ranks and takes its share, so the
    views do not depend on the number of ranks.
    """

    pixels: Tensor | Stream  # uint8 (N, 3, H, W) on the device
    trained_on: InitVar[Tensor]  # (n,) rows of pixels
    multi_crop: MultiCrop
    batch_size: int  # over all ranks; an epoch has n // batch_size steps
    device: torch.device
    _: KW_ONLY
    seed: int = 0
    purpose: int = WEIGHTS  # WEIGHTS, ALPHAS, ...: batches of different purposes differ
    shuffle: bool = True  # reshuffle every epoch; otherwise the order of the rows
    whole: bool = False  # every rank gets the whole batch, not a share

    def __post_init__(self, trained_on: Tensor):
        rank, world = ranks()
        share = self.batch_size // world
        self.share = slice(None) if self.whole else slice(rank * share, (rank + 1) * share)
        self.steps_per_epoch = len(trained_on) // self.batch_size
        self._rows = trained_on.cpu()
        self._rows_there = trained_on.to(self.device)
        self._ahead: dict[int, Future] = {}  # step: what `draw` returns for it
        self._thread = ThreadPoolExecutor(1)

    def rows_of(self, step: int) -> Tensor:
        """(batch_size,): the batch of all ranks, as rows of pixels."""
        return self._rows[self._index(step)]

    def __call__(self, step: int) -> tuple[list[Tensor], Tensor]:
        if self.device.type == "cuda":  # a thread draws for the next step; on a CPU it would slow the network
            task = self._ahead.get(step) or self._thread.submit(self.draw, step)
            self._ahead = {step + 1: self._thread.submit(self.draw, step + 1)}
        drawn = task.result() if self.device.type == "cuda" else self.draw(step)
        index, parameters = (to_device(x, self.device) for x in drawn)
        if isinstance(self.pixels, Stream):
            batches = [self.rows_of(s)[self.share] for s in (step, step + 1)]
            pixels = to_device(next(in_turn(self.pixels, batches)), self.device)
        else:
            pixels = self.pixels[self._rows_there[index]]
        views = self.multi_crop.render(pixels, parameters)
        return [v.contiguous(memory_format=memory_format(self.device)) for v in views], index

    def _index(self, step: int) -> Tensor:
        """(batch_size,): the batch of all ranks, as indices within the rows."""
        epoch, step = divmod(step, self.steps_per_epoch)
        n = len(self._rows)
        order = _order(self.seed, self.purpose, epoch, n) if self.shuffle else torch.arange(n)
        return order[step * self.batch_size : (step + 1) * self.batch_size]

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """(index (B,), view parameters (V, B, P)) of this rank, on the CPU."""
        rng = np.random.default_rng((self.seed, self.purpose, step))
        parameters = self.multi_crop.sample(self.batch_size, *self.pixels.shape[2:], rng)
        return self._index(step)[self.share], parameters[:, self.share].contiguous()


def _box(x, y, cx, cy, w, h):
    return torch.maximum((x - cx).abs() - w, (y - cy).abs() - h)


# name: approximate signed distance to the outline, in coordinates in which the shape has radius 1
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
    """n images of 10 balanced classes: about a dozen copies of one shape on a noisy gradient.

    Position, size and angle of each copy and colours of each image are independent of the class, so no pixel or colour
    gives it away, but nearly every crop shows it."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=rng) * (high - low) + low

    grid = 4  # cells per side, with one copy in each
    labels = torch.randperm(n, generator=rng) % len(SHAPES)
    axis = (torch.arange(size) + 0.5) / size * grid
    y0, x0 = axis.view(-1, 1), axis.view(1, -1)
    slope_y, slope_x = uniform(-0.03, 0.03, 2, 1, 1, 1).unbind(1)
    image = uniform(0.35, 0.65, 1, 1, 1) + uniform(-0.04, 0.04, 3, 1, 1) + slope_y * (y0 - 2) + slope_x * (x0 - 2)
    sign = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, 1.0, -1.0)  # lighter or darker than the background
    contrast = sign * uniform(0.25, 0.4, 1, 1, 1) + uniform(-0.04, 0.04, 3, 1, 1)
    for row, column in itertools.product(range(grid), range(grid)):
        radius, angle = uniform(0.38, 0.55, 1, 1), uniform(0, 2 * math.pi, 1, 1)
        dy, dx = ((d - c - uniform(0.35, 0.65, 1, 1)) / radius for d, c in ((y0, row), (x0, column)))
        y, x = dy * angle.cos() - dx * angle.sin(), dy * angle.sin() + dx * angle.cos()
        distance = torch.empty(n, size, size)
        for k, outline in enumerate(SHAPES.values()):
            distance[labels == k] = outline(x[labels == k], y[labels == k])
        inside = (0.5 - distance * radius * size / grid).clamp(0, 1)  # antialiased over about one pixel
        inside = inside * (uniform(0, 1, 1, 1) < 0.8)  # one in five is missing
        image = image + inside[:, None] * contrast * uniform(0.8, 1.2, 1, 1, 1)
    image = image + 0.03 * torch.randn(image.shape, generator=rng)
    return Images(image.clamp(0, 1).mul(255).round().to(torch.uint8), labels, list(SHAPES), [str(i) for i in range(n)])
