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

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import linear_eval
import pretrain
from checkpoint import load_backbone
from data import Images, load_images
from linear_eval import measure
from models import build_backbone
from views import IMAGENET_MEAN, IMAGENET_STD

METHODS = ("simsiam", "simclr", "moco", "swav", "dino")


class Views(Dataset):
    """Views of PIL images by one of lightly's transforms."""

    def __init__(self, pixels: torch.Tensor, transform):
        self.images, self.transform = [to_pil_image(p) for p in pixels], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


def their_method(name: str, encoder: nn.Module, n_images: int):
    """(network to optimise, (views, epoch) -> loss, transform, optimiser of parameters)"""
    from lightly import loss, transforms
    from lightly.models import utils
    from lightly.models.modules import heads

    f, no_blur = encoder.feature_dim, {"gaussian_blur": 0.0}

    def sgd(parameters):
        return torch.optim.SGD(parameters, 0.06, momentum=0.9, weight_decay=5e-4)

    def adam(parameters):
        return torch.optim.Adam(parameters, 1e-3, weight_decay=1e-6)

    if name == "simclr":
        net = nn.Sequential(encoder, heads.SimCLRProjectionHead(f, f, 128))
        criterion = loss.NTXentLoss()
        return (
            net,
            lambda v, _: criterion(net(v[0]), net(v[1])),
            transforms.SimCLRTransform(32, cj_strength=0.5, **no_blur),
            sgd,
        )
    if name == "simsiam":
        projector = heads.ProjectionHead(
            [(f, 4 * f, nn.BatchNorm1d(4 * f), nn.ReLU()), (4 * f, 4 * f, nn.BatchNorm1d(4 * f), None)]
        )
        net = nn.ModuleList([encoder, projector, heads.SimSiamPredictionHead(4 * f, f, 4 * f)])
        criterion = loss.NegativeCosineSimilarity()

        def simsiam(views, epoch):
            z = [projector(encoder(v)) for v in views]
            p = [net[2](x) for x in z]
            return 0.5 * (criterion(z[0].detach(), p[1]) + criterion(z[1].detach(), p[0]))

        return net, simsiam, transforms.SimSiamTransform(32, **no_blur), sgd
    if name == "moco":
        net = nn.Sequential(encoder, heads.MoCoProjectionHead(f, f, 128))
        momentum = copy.deepcopy(net)
        utils.deactivate_requires_grad(momentum)
        bank = min(4096, 2 ** max(4, (n_images // 8).bit_length() - 1))
        criterion = loss.NTXentLoss(temperature=0.1, memory_bank_size=(bank, 128))

        def moco(views, epoch):
            utils.update_momentum(net, momentum, 0.99)
            terms = []
            for q, k in (views, views[::-1]):
                with torch.no_grad():
                    key = momentum(k)
                terms.append(criterion(net(q), key))
            return 0.5 * sum(terms)

        return net, moco, transforms.SimCLRTransform(32, cj_strength=0.5, **no_blur), sgd
    if name == "swav":
        net = nn.ModuleList([encoder, heads.SwaVProjectionHead(f, f, 128), heads.SwaVPrototypes(128, 512)])
        criterion = loss.SwaVLoss()

        def swav(views, epoch):
            net[2].normalize()
            scores = [net[2](nn.functional.normalize(net[1](encoder(v)), dim=1)) for v in views]
            return criterion(scores, [])

        transform = transforms.SwaVTransform(
            (32,), (2,), crop_min_scales=(0.14,), crop_max_scales=(1.0,), cj_strength=0.5, gaussian_blur=0
        )
        return net, swav, transform, adam

    def dino_head():
        head = heads.DINOProjectionHead(f, 4 * f, 256, 2048, batch_norm=True)
        layers = [(f, 4 * f, nn.BatchNorm1d(4 * f), nn.GELU()), (4 * f, 256, None, None)]
        head.layers = heads.ProjectionHead(layers).layers
        return head

    net = nn.Sequential(encoder, dino_head())
    teacher = nn.Sequential(copy.deepcopy(encoder), dino_head())  # whose head is no copy there either
    utils.deactivate_requires_grad(teacher)
    criterion = loss.DINOLoss(output_dim=2048)

    def dino(views, epoch):
        utils.update_momentum(net, teacher, 0.99)
        with torch.no_grad():
            targets = [teacher(v) for v in views[:2]]
        return criterion(targets, [net(v) for v in views], epoch=epoch)

    transform = transforms.DINOTransform(global_crop_size=32, n_local_views=0, cj_strength=0.5, gaussian_blur=(0, 0, 0))
    return net, dino, transform, sgd


def theirs(name: str, seed: int, images: Images, args: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(seed)
    encoder, _ = build_backbone("resnet18", "small", args.width)
    net, loss_of, transform, optimizer_of = their_method(name, encoder, len(images.pixels))
    net.train().to(memory_format=torch.channels_last)
    optimizer = optimizer_of([p for p in net.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    loader = DataLoader(Views(images.pixels, transform), args.batch_size, shuffle=True, drop_last=True)
    for epoch in range(args.epochs):
        losses = []
        for views in loader:
            loss = loss_of([v.contiguous(memory_format=torch.channels_last) for v in views], epoch)
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


def main(args: argparse.Namespace) -> None:
    torch.set_flush_denormal(True)
    train = load_images(args.data, "train", limit=args.max_images)
    test = load_images(args.data, "test")
    measuring = linear_eval.get_parser().parse_args(["--weights", ""])
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
                row = measure(backbone, facts, train, test, torch.device("cpu"), measuring)[0]
                (folder / "scores.json").write_text(json.dumps({k: row[k] for k in ("knn", "linear")}))
                print(folder.name, f"kNN {100 * row['knn']:.2f} linear {100 * row['linear']:.2f}", flush=True)
    table(args.output_dir)


def table(folder: Path) -> None:
    """Mean and standard deviation over seeds, of all that is there."""
    scores: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(folder.glob("*/scores.json")):
        side, name, _ = path.parent.name.rsplit("-", 2)
        scores.setdefault((name, side), []).append(json.loads(path.read_text()))
    print("| method | side | seeds | kNN | linear |\n|---|---|---|---|---|")
    for (name, side), rows in sorted(scores.items()):
        cells = []
        for key in ("knn", "linear"):
            values = [100 * row[key] for row in rows]
            cells.append(f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if rows[1:] else ""))
        print(f"| {name} | {side} | {len(rows)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--peers", default="runs/peers", help="folder that bench_peers.py installs lightly into")
    parser.add_argument("--sides", nargs="+", default=["ours", "lightly"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--max-images", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--more", default="", help="flags of pretrain.py for our side")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/accuracy"))
    args = parser.parse_args()
    sys.path.append(args.peers)
    main(args)
