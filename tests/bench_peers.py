"""How fast this is beside lightly (1.5 or newer) and kornia, in one run.

    python tests/bench_peers.py

Installs both with pip into a folder of their own (runs/peers; they are no dependency of anything here), and lets them
and us take turns; a figure is the median over rounds of the ratio within a round. Images are in memory already:

1. two SimSiam views of 32 px: MultiCrop on all cores, eager and compiled, against lightly's transform in a DataLoader
   with two workers, wall time; and against kornia, on one thread, CPU time
2. SwAV's 2 x 224 + 6 x 96 px of 256 px images against lightly's transform, on one thread, CPU time; and the part of it
   on bytes alone, crop and resize, which is all that a GPU could leave to a CPU
3. a whole SimSiam step, ResNet18 of a quarter of the width, batch 128: views, network, loss, optimiser, as pretrain.py
   does it, eager, compiled, and compiled in bf16, against the same network in lightly's way: its transform and loss, a
   DataLoader with two workers, a forward pass for each view, eager, fp32; whole epochs, so that no worker decodes ahead
   while the others are timed
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from bench_views import iter_forever, race
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import pretrain
import views
from data import make_shapes
from losses import SimSiam
from models import build_backbone
from views import IMAGENET_MEAN, IMAGENET_STD, MultiCrop

PEERS = ["lightly", "lightly_utils", "lightning_utilities", "packaging", "kornia", "kornia_rs"]


def install(folder: Path) -> None:
    """Without dependencies: torch and torchvision are here, and these few are all that is imported."""
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PEERS]
        subprocess.run(command, check=True)
    sys.path.append(str(folder))


class Transformed(Dataset):
    def __init__(self, images: list, transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


def small_views(batch: int = 512, batches: int = 8, rounds: int = 7) -> None:
    import kornia.augmentation as K
    from lightly.transforms import SimSiamTransform

    torch.set_num_threads(os.cpu_count())
    images, rng = make_shapes(batch), np.random.default_rng(0)
    crop, compiled = MultiCrop("simsiam", 32), MultiCrop("simsiam", 32)
    compiled.compile()
    peer = [to_pil_image(p) for p in images.pixels] * batches
    loader = iter_forever(
        DataLoader(
            Transformed(peer, SimSiamTransform(32, gaussian_blur=0.0)), batch, num_workers=2, persistent_workers=True
        )
    )
    for name, ours in (("eager", crop), ("compiled", compiled)):
        print(f"\ntwo SimSiam views of 32 px, {os.cpu_count()} cores, {name}")
        race(
            "views a second",
            2 * batch * batches,
            time.perf_counter,
            rounds,
            MultiCrop=lambda ours=ours: [ours(images.pixels, rng) for _ in range(batches)],
            lightly=lambda: next(loader),
        )
    torch.set_num_threads(1)
    augment = nn.Sequential(
        K.RandomResizedCrop((32, 32), scale=(0.2, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
    )
    print("\nthe same on one thread, eager, beside kornia")
    race(
        "views a CPU-second",
        2 * batch,
        time.process_time,
        rounds,
        MultiCrop=lambda: crop(images.pixels, rng),
        kornia=lambda: [augment(images.pixels.float() / 255) for _ in range(2)],
    )


def multi_crop(batch: int = 32, rounds: int = 5) -> None:
    from lightly.transforms import SwaVTransform

    torch.set_num_threads(1)
    images, rng, crop = make_shapes(batch, 256), np.random.default_rng(0), MultiCrop("swav", 224)
    peer, transform = [to_pil_image(p) for p in images.pixels], SwaVTransform()

    def crops_alone():
        for view, p in zip(crop.views, map(views.named, crop.sample(batch, 256, 256, rng))):
            views.crop_bytes(images.pixels, p["box"], p["flip"], view.size, view.bicubic)

    for name, ours in (("whole", lambda: crop(images.pixels, rng)), ("the crops, as bytes", crops_alone)):
        print(f"\nSwAV's 2 x 224 + 6 x 96 px of 256 px images, one thread: {name}")
        race(
            "images a CPU-second",
            batch,
            time.process_time,
            rounds,
            MultiCrop=ours,
            lightly=lambda: [transform(image) for image in peer],
        )


def whole_step(batch: int = 128, steps: int = 30, rounds: int = 5) -> None:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.transforms import SimSiamTransform

    torch.set_num_threads(os.cpu_count())
    count = batch * steps
    flags = f"--data shapes --max-images {count} --held-out 0 --batch-size {batch} --output-dir runs/bench_peers"
    peer = [to_pil_image(p) for p in make_shapes(count).pixels]
    theirs = SimSiam(build_backbone("resnet18", "small", 0.25)[0])
    optimizer = torch.optim.SGD(theirs.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    criterion, transformed = NegativeCosineSimilarity(), Transformed(peer, SimSiamTransform(32, gaussian_blur=0.0))
    loader = DataLoader(transformed, batch, shuffle=True, num_workers=2, persistent_workers=True)

    def their_steps():
        for x0, x1 in loader:
            z0, z1 = (theirs.projector(theirs.encoder(x)) for x in (x0, x1))
            p0, p1 = (theirs.predictor(z) for z in (z0, z1))
            loss = 0.5 * (criterion(z0.detach(), p1) + criterion(z1.detach(), p0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def our_steps(*more: str) -> Callable[[], None]:
        args = pretrain.get_parser().parse_args([*flags.split(), "--no-resume", *more])
        with patch.object(pretrain, "train", side_effect=StopIteration) as train, contextlib.suppress(StopIteration):
            pretrain.main(args)
        args, method, batches, ours, *_, device = train.call_args.args  # what the loop would have had

        def take():
            for step in range(steps):
                images, index = batches(step)
                with pretrain.autocast(args, device):
                    loss = method(images, index)
                loss.backward()
                ours.step()
                ours.zero_grad()
                method.after_step(0.0)

        return take

    print(f"\na SimSiam step, ResNet18 x0.25, batch {batch}, {os.cpu_count()} cores")
    race(
        "images a second",
        count,
        time.perf_counter,
        rounds,
        eager=our_steps("--no-amp"),
        compiled=our_steps("--no-amp", "--compile"),
        bf16=our_steps("--compile", "--amp"),
        lightly=their_steps,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peers", type=Path, default=Path("runs/peers"), help="folder that they are installed into")
    parser.add_argument("--only", choices=["small_views", "multi_crop", "whole_step"], default=None)
    args = parser.parse_args()
    install(args.peers)
    for part in (small_views, multi_crop, whole_step):
        if args.only in (None, part.__name__):
            part()
