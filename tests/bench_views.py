"""How fast views are: MultiCrop against torchvision's PIL transforms, an image at a time, in one run.

    python tests/bench_views.py

The two SimSiam views of 32 px images, on one thread, in views a CPU-second; and 2 x 224 + 6 x 96 px by SwAV's recipe
from 256 px images, wall time on all cores: MultiCrop's threads against a DataLoader with a worker a core. Images are in
memory already. The two take turns, and the figure is the median over rounds of the ratio within a round, so that a busy
machine slows both alike. Then what a Stream decodes: JPEG files of 400 x 300 px to 224 px.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Stream, in_turn, make_shapes
from views import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, View


def one_by_one(view: View) -> transforms.Compose:
    """torchvision's transforms of a PIL image for the same view."""
    mode = InterpolationMode.BICUBIC if view.bicubic else InterpolationMode.BILINEAR
    kernel = 2 * max(1, view.size // 20) + 1
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(view.size, view.scale, interpolation=mode),
            transforms.RandomHorizontalFlip(view.flip),
            transforms.RandomApply([transforms.ColorJitter(*view.jitter)], view.jitter_p),
            transforms.RandomGrayscale(view.grey),
            transforms.RandomApply([transforms.GaussianBlur(kernel, view.sigma)], view.blur),
            transforms.RandomSolarize(128, view.solarize),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class Views(Dataset):
    """All views of PIL images, for a DataLoader."""

    def __init__(self, images: list, views: list[View]):
        self.images, self.transforms = images, [one_by_one(v) for v in views]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return [transform(self.images[i]) for transform in self.transforms]


def race(unit: str, count: int, clock: Callable, rounds: int, **makers: Callable) -> None:
    """Prints the makers' rates and each one's ratio to the last's: medians over rounds in which they take turns."""
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for i in range(rounds + 1):
        for name, make in makers.items():
            start = clock()
            make()
            if i:  # the first round warms up
                rates[name].append(count / (clock() - start))
    for name, values in rates.items():
        print(f"{name:12} {statistics.median(values):8,.0f} {unit} ({min(values):,.0f} to {max(values):,.0f})")
    *others, last = rates
    for name in others:
        print(f"{name} / {last}: {statistics.median(a / b for a, b in zip(rates[name], rates[last])):.2f}")


def small(batch: int = 256, rounds: int = 15) -> None:
    torch.set_num_threads(1)
    pixels, crop, rng = make_shapes(batch).pixels, MultiCrop("simsiam", 32), np.random.default_rng(0)
    peer = Views([to_pil_image(p) for p in pixels], crop.views)
    print("two SimSiam views of 32 px, one thread")
    race(
        "views a CPU-second",
        2 * batch,
        time.process_time,
        rounds,
        MultiCrop=lambda: crop(pixels, rng),
        torchvision=lambda: [peer[i] for i in range(batch)],
    )


def multi_crop(batch: int = 32, batches: int = 6, rounds: int = 5) -> None:
    cores = os.cpu_count()
    torch.set_num_threads(cores)
    pixels, crop, rng = make_shapes(batch, 256).pixels, MultiCrop("swav", 224), np.random.default_rng(0)
    peer = Views([to_pil_image(p) for p in pixels] * batches, crop.views)
    loader = iter_forever(DataLoader(peer, batch, num_workers=cores, persistent_workers=True))
    print(f"\nSwAV's 2 x 224 + 6 x 96 px of 256 px images, {cores} cores")
    race(
        "images a second",
        batch * batches,
        time.perf_counter,
        rounds,
        MultiCrop=lambda: [crop(pixels, rng) for _ in range(batches)],
        torchvision=lambda: next(loader),
    )


def iter_forever(loader: DataLoader):
    """One item is a whole pass; workers stay."""
    while True:
        for _ in loader:
            pass
        yield


def decoding(count: int = 256) -> None:
    print("\nJPEG files of 400 x 300 px, decoded to 224 px")
    with tempfile.TemporaryDirectory() as folder:
        for i, p in enumerate(make_shapes(count, 400).pixels):
            to_pil_image(p[:, :300]).save(f"{folder}/{i}.jpg", quality=90)
        for threads in (1, os.cpu_count()):
            stream = Stream([f"{folder}/{i}.jpg" for i in range(count)], 224, threads)
            batches = torch.arange(count).split(32)
            start, cpu = time.perf_counter(), time.process_time()
            for _ in in_turn(stream, batches):
                pass
            rate, per_cpu = count / (time.perf_counter() - start), count / (time.process_time() - cpu)
            print(f"{threads} threads: {rate:,.0f} images a second, {per_cpu:,.0f} a CPU-second")


if __name__ == "__main__":
    small()
    multi_crop()
    decoding()
