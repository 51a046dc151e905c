"""What is learned here and by lightly's CIFAR-10 benchmark (1.6), at equal epochs of the same images.

    python tests/bench_accuracy.py --data my/cifar10                        # 30 runs and a table, hours on two cores
    python tests/bench_accuracy.py --data my/cifar10 --sides ours --methods simclr --seeds 0

Every run is a folder below --output-dir and is not done twice, so several processes may share the work by --sides,
--methods and --seeds. Both sides train the same backbone, initialised alike, and linear_eval.py measures both.
ours: pretrain.py with no flag but those of the data, the batch and the epochs (and, say, "--more=--lr 0.24"). lightly:
its loss, heads, transforms, optimiser and a schedule that moves once an epoch, as its docs' cifar10_benchmark.py has
them, fp32. Where that has 512 and 2048 units for ResNet18's 512 features, here are F and 4 F; MoCo's memory bank is as
large as ours. Its learning rates are those for its smallest batch, 128; 64 images here take them as they are.
"""

import argparse
import copy
import json
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import pretrain
from checkpoint import load_backbone
from data import Images, load_images
from linear_eval import markdown, measure
from models import build_backbone
from views import IMAGENET_MEAN, IMAGENET_STD

METHODS = ("simsiam", "simclr", "moco", "swav", "dino")


class Theirs(nn.Module):
    """A method of lightly's: `transform` of a PIL image -> views; the function of its name, (views, epoch) -> loss."""

    def __init__(self, name: str, encoder: nn.Module, n_images: int):
        from lightly import loss, transforms
        from lightly.models import utils
        from lightly.models.modules import heads

        super().__init__()
        self.utils = utils
        f, weak = encoder.feature_dim, {"cj_strength": 0.5}
        if name == "simsiam":
            hidden = (f, 4 * f, nn.BatchNorm1d(4 * f), nn.ReLU())
            self.projector = heads.ProjectionHead([hidden, (4 * f, 4 * f, nn.BatchNorm1d(4 * f), None)])
            self.predictor = heads.SimSiamPredictionHead(4 * f, f, 4 * f)
            self.loss = loss.NegativeCosineSimilarity()
            self.transform = transforms.SimSiamTransform(32, gaussian_blur=0.0)
        elif name == "swav":
            self.projector = heads.SwaVProjectionHead(f, f, 128)
            self.prototypes = heads.SwaVPrototypes(128, 512)
            self.loss = loss.SwaVLoss()
            crops = {"crop_sizes": (32,), "crop_counts": (2,), "crop_min_scales": (0.14,), "crop_max_scales": (1.0,)}
            self.transform = transforms.SwaVTransform(**crops, **weak, gaussian_blur=0)
        elif name == "dino":
            self.projector, teacher_head = (dino_head(heads, f) for _ in range(2))  # no copy there either
            self.teacher = nn.Sequential(copy.deepcopy(encoder), teacher_head).requires_grad_(False)
            self.loss = loss.DINOLoss(output_dim=2048)
            none = {"n_local_views": 0, "gaussian_blur": (0, 0, 0)}
            self.transform = transforms.DINOTransform(global_crop_size=32, **none, **weak)
        else:
            self.projector = (heads.SimCLRProjectionHead if name == "simclr" else heads.MoCoProjectionHead)(f, f, 128)
            self.transform = transforms.SimCLRTransform(32, gaussian_blur=0.0, **weak)
            self.loss = loss.NTXentLoss()
        if name == "moco":
            bank = min(4096, 2 ** max(4, (n_images // 8).bit_length() - 1))
            self.loss = loss.NTXentLoss(temperature=0.1, memory_bank_size=(bank, 128))
            self.teacher = copy.deepcopy(nn.Sequential(encoder, self.projector)).requires_grad_(False)
        self.student = nn.Sequential(encoder, self.projector)

    def simclr(self, views, epoch):
        return self.loss(self.student(views[0]), self.student(views[1]))

    def simsiam(self, views, epoch):
        z = [self.student(v) for v in views]
        p = [self.predictor(x) for x in z]
        return 0.5 * (self.loss(z[0].detach(), p[1]) + self.loss(z[1].detach(), p[0]))

    def moco(self, views, epoch):
        self.utils.update_momentum(self.student, self.teacher, 0.99)
        keys = [self.teacher(v) for v in views[::-1]]
        return 0.5 * sum(self.loss(self.student(v), k) for v, k in zip(views, keys))

    def swav(self, views, epoch):
        self.prototypes.normalize()
        z = [nn.functional.normalize(self.student(v), dim=1) for v in views]
        return self.loss([self.prototypes(x) for x in z], [])

    def dino(self, views, epoch):
        self.utils.update_momentum(self.student, self.teacher, 0.99)
        targets = [self.teacher(v) for v in views[:2]]
        return self.loss(targets, [self.student(v) for v in views], epoch=epoch)


def dino_head(heads, f: int) -> nn.Module:
    head = heads.DINOProjectionHead(f, 4 * f, 256, 2048, batch_norm=True)
    layers = [(f, 4 * f, nn.BatchNorm1d(4 * f), nn.GELU()), (4 * f, 256, None, None)]
    head.layers = heads.ProjectionHead(layers).layers  # two layers, as for CIFAR
    return head


def theirs(name: str, seed: int, images: Images, args: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # lightly's solarisation draws from it
    encoder, _ = build_backbone("resnet18", "small", args.width)
    method = Theirs(name, encoder, len(images.pixels)).to(memory_format=torch.channels_last)
    parameters = [p for p in method.parameters() if p.requires_grad]
    if name == "swav":
        optimizer = torch.optim.Adam(parameters, 1e-3, weight_decay=1e-6)
    else:
        optimizer = torch.optim.SGD(parameters, 0.06, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    def collate(batch: list) -> list[torch.Tensor]:
        return default_collate([method.transform(image) for image in batch])

    pictures = [to_pil_image(p) for p in images.pixels]
    loader = DataLoader(pictures, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    for epoch in range(args.epochs):
        losses = []
        for views in loader:
            loss = getattr(method, name)([v.contiguous(memory_format=torch.channels_last) for v in views], epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        print(f"lightly {name} seed {seed} epoch {epoch + 1}: {statistics.mean(losses):.4f}", flush=True)
    torch.save(encoder.state_dict(), folder / "backbone.pth")
    facts = {"arch": "resnet18", "width": args.width, "stem": "small", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    (folder / "backbone.json").write_text(json.dumps(facts))


def ours(name: str, seed: int, args: argparse.Namespace, folder: Path) -> None:
    flags = f"--data {args.data} --max-images {args.max_images} --held-out 0 --knn-every 0 --width {args.width}"
    flags += f" --method {name} --epochs {args.epochs} --batch-size {args.batch_size} --seed {seed} {args.more}"
    pretrain.main(pretrain.get_parser().parse_args([*shlex.split(flags), "--output-dir", str(folder)]))


def table(folder: Path) -> list[str]:
    """Mean and standard deviation over seeds, of all that is there."""
    scores: dict[tuple[str, str], list[dict]] = {}
    for path in folder.glob("*/scores.json"):
        side, name, _ = path.parent.name.rsplit("-", 2)
        scores.setdefault((name, side), []).append(json.loads(path.read_text()))
    lines = []
    for (name, side), runs in sorted(scores.items()):
        line = {"method": name, "side": side, "seeds": str(len(runs))}
        for key, column in ("knn", "kNN"), ("linear", "linear"):
            values = [100 * run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(runs) > 1 else ""
            line[column] = f"{statistics.mean(values):.2f}{spread}"
        lines.append(line)
    return markdown(lines)


def main(args: argparse.Namespace) -> None:
    torch.set_flush_denormal(True)
    train = load_images(args.data, "train", limit=args.max_images)
    test = load_images(args.data, "test")
    for seed in args.seeds:
        for name in args.methods:
            for side in args.sides:
                folder = args.output_dir / f"{side}-{name}-{seed}"
                if (folder / "scores.json").exists():
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                if side == "lightly":
                    theirs(name, seed, train, args, folder)
                else:
                    ours(name, seed, args, folder)
                backbone, facts = load_backbone(str(folder / "backbone.pth"))
                row = measure(backbone, facts, train, test, torch.device("cpu"))[0]
                (folder / "scores.json").write_text(json.dumps({k: row[k] for k in ("knn", "linear")}))
                print(folder.name, f"kNN {100 * row['knn']:.2f} linear {100 * row['linear']:.2f}", flush=True)
    print("\n".join(table(args.output_dir)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", required=True)
    add("--peers", default="runs/peers", help="folder that bench_peers.py installs lightly into")
    add("--sides", nargs="+", default=["ours", "lightly"])
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--width", type=float, default=0.125)
    add("--max-images", type=int, default=5000)
    add("--batch-size", type=int, default=64)
    add("--epochs", type=int, default=12)
    add("--more", default="", help="flags of pretrain.py for our side")
    add("--output-dir", type=Path, default=Path("runs/accuracy"))
    args = parser.parse_args()
    sys.path.append(args.peers)
    main(args)
