"""Measures a frozen backbone: weighted kNN and a linear probe, beside the same network untrained.

    torchrun linear_eval.py --weights runs/pretrain/backbone.pth               # on the data it was trained on
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --data cifar10 cifar100
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --data my/images --augment
    torchrun linear_eval.py --weights resnet50.pth --arch resnet50 --data my/images --image-size 224    # torchvision's

Everything that has to be chosen (the probe's learning rate and weight decay) is chosen on held-out training images;
the test images are looked at once. The table goes to the terminal and to linear_eval-<data>.md beside the weights.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models import ARCHS, build_backbone, describe
from views import CROP_AND_FLIP, IMAGENET_MEAN, IMAGENET_STD, Images, MultiCrop, load_images

# ---- what every script needs at its start ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One line for a wrong flag; - and _ are the same in a flag's name."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        return super().parse_args([re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in argv])


def data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data and machine")
    group.add_argument("--data-root", default="data", help="where torchvision's data sets are downloaded to")
    group.add_argument("--image-size", type=int, default=None, help="edge in pixels; None keeps the images' own")
    group.add_argument("--max-images", type=int, default=None, help="so many training images, always the same ones")
    group.add_argument("--resident-gb", type=float, default=16.0, help="the most memory that a split's pixels may take")
    group.add_argument("--workers", type=int, default=None, help="processes that decode files; None is one a core")
    group.add_argument("--device", default="auto", help="auto (cuda where there is one, else cpu), cpu, cuda, mps")
    group.add_argument("--seed", type=int, default=0)


@contextmanager
def user_errors():
    """What a person can mend (a wrong path, flag or file) ends the script with one line and status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        rank = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
        sys.exit(f"{os.path.basename(sys.argv[0])}: error{rank}: {error}")


def setup(device: str) -> tuple[int, int, torch.device]:
    """(rank, world, device): torchrun's where it started us, else 0 and 1. A second call changes nothing."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device} is none that torch knows: use auto, cpu, cuda or mps") from error
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch sees no GPU: use --device cpu, or a CUDA build of torch")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)  # momenta of dead features decay to denormals, which made the probe 5 times slower
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return rank, world, torch.device(device, local) if device == "cuda" else torch.device(device)


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last on CUDA; on a CPU its backward corrupts memory (torch 2.11, 2.15: ResNet18, 4 channels, 64 px)."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def barrier() -> None:
    """Ranks wait for each other here, if there are several."""
    if dist.is_initialized():
        dist.barrier()


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


# ---- measures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract(
    backbone: nn.Module,
    pixels: Tensor,
    mean,
    std,
    device: torch.device,
    batch_size: int = 512,
    rows: Tensor | None = None,
) -> Tensor:
    """Features (N, F) in fp32 of uint8 (N, 3, H, W), or of some rows of it, in eval mode; ranks share the work."""
    training = backbone.training
    backbone.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = torch.arange(len(pixels), device=pixels.device) if rows is None else rows
    share = -(-len(rows) // world)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
    h = []
    for batch in rows[rank * share : (rank + 1) * share].split(batch_size):
        x = pixels[batch].to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
        h.append(backbone(x.contiguous(memory_format=memory_format(device))).float())
    backbone.train(training)
    h = torch.cat(h) if h else torch.empty(0, backbone.feature_dim, device=device)
    if world > 1:
        h = F.pad(h, (0, 0, 0, share - len(h)))
        parts = [torch.empty_like(h) for _ in range(world)]
        dist.all_gather(parts, h)
        h = torch.cat(parts)[: len(rows)]
    return h


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    query: Tensor,
    labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> float:
    """Share of queries (M, F) that their k nearest of the bank (N, F) vote right, by cosine, with weights exp(cos / T)
    (1805.01978 section 3.4). M x N is never held whole."""
    bank, query = F.normalize(bank, dim=1), F.normalize(query, dim=1)
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    classes, k, right = int(max(bank_labels.max(), labels.max())) + 1, min(k, len(bank)), 0
    for q, y in zip(query.split(chunk), labels.split(chunk)):
        similarity, nearest = (q @ bank.T).topk(k)
        votes = q.new_zeros(len(q), classes)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        right += (votes.argmax(1) == y).sum().item()
    return right / len(query)


LEARNING_RATES, WEIGHT_DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 1e-4, 1e-3)  # the probe's grid


def fit_probes(
    features: Tensor | Callable[[], Tensor],
    labels: Tensor,
    classes: int,
    grid: list[tuple[float, float]],
    epochs: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Softmax regression by SGD (momentum .9, cosine, batch 256), once for each (learning rate, weight decay) of the
    grid.

    All G probes see the same batches, so a step is one product (B, F) x (F, G C). features: a tensor (N, F), or a
    function that gives a fresh one each epoch. Returns weights (F, G, C) and biases (G, C).
    """
    g = torch.Generator().manual_seed(seed)
    x = features if isinstance(features, Tensor) else features()
    labels, batch = labels.to(x.device), min(256, len(x))
    lr, decay = (torch.tensor(v, device=x.device)[:, None] for v in zip(*grid))  # (G, 1)
    weight = torch.zeros(x.shape[1], len(grid), classes, device=x.device)
    bias = torch.zeros(len(grid), classes, device=x.device)
    weight_m, bias_m = torch.zeros_like(weight), torch.zeros_like(bias)
    steps = len(x) // batch
    for epoch in range(epochs):
        if epoch > 0 and not isinstance(features, Tensor):
            x = features()
        order = torch.randperm(len(x), generator=g).to(x.device)
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            xb = x[rows]
            error = ((xb @ weight.flatten(1)).view(batch, len(grid), classes) + bias).softmax(2)
            error -= F.one_hot(labels[rows], classes)[:, None]  # d CE / d logits, (B, G, C)
            error /= batch
            weight_m.mul_(0.9).add_((xb.T @ error.flatten(1)).view_as(weight)).add_(decay * weight)
            bias_m.mul_(0.9).add_(error.sum(0))
            now = lr * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            weight -= now * weight_m  # (G, 1) x (F, G, C)
            bias -= now * bias_m
    return weight, bias


def probe_accuracy(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> list[float]:
    """One accuracy for each of the G probes."""
    prediction = torch.cat(
        [(x @ weight.flatten(1)).view(len(x), *bias.shape).add_(bias).argmax(2) for x in features.split(4096)]
    )
    return (prediction == labels.to(features.device)[:, None]).double().mean(0).tolist()


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    augmented: Callable[[Tensor], Tensor] | None = None,
    epochs: int = 100,
    held_out: float = 0.1,
    seed: int = 0,
) -> dict[str, float]:
    """Test accuracy of a linear classifier on frozen features, standardised by the training features' mean and
    deviation.

    (learning rate, weight decay) are those of the best accuracy on held-out training images; the winner is trained
    anew on all of them. augmented: rows (n,) of the training images -> their features (n, F) under fresh
    augmentation, computed every epoch.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    mean, std = train.mean(0), train.std(0)
    std = std.clamp(min=1e-3 * std.max().item() + 1e-12)  # a dead feature stays small
    train, test = (train - mean) / std, (test - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    out, rest = order.tensor_split([max(1, int(held_out * len(order)))])

    def source(rows):
        if augmented is None:
            return train[rows.to(train.device)]
        return lambda: (augmented(rows) - mean) / std

    grid = [(lr, decay) for lr in LEARNING_RATES for decay in WEIGHT_DECAYS]
    probes = fit_probes(source(rest), train_labels[rest], classes, grid, epochs, seed)
    scores = probe_accuracy(*probes, train[out.to(train.device)], train_labels[out])
    best = max(range(len(grid)), key=scores.__getitem__)
    everything = torch.arange(len(train))
    probe = fit_probes(source(everything), train_labels, classes, [grid[best]], epochs, seed)
    accuracy = probe_accuracy(*probe, test, test_labels)[0]
    return {"linear": accuracy, "held_out": scores[best], "lr": grid[best][0], "weight_decay": grid[best][1]}


# ---- backbones on disk ----------------------------------------------------------------------------------------------


def load_backbone(
    weights: str, arch: str | None = None, width: float | None = None, stem: str | None = None
) -> tuple[nn.Module, dict]:
    """(backbone, facts) of backbone.pth with its backbone.json, or of a plain torchvision state dict with its arch
    named.

    facts: arch, width, stem, mean, std and what else backbone.json holds. Raises FileNotFoundError or ValueError,
    naming what does not fit.
    """
    path, beside = Path(weights), Path(weights).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"no weights at '{weights}'")
    facts = {"width": 1.0, "stem": "imagenet", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if beside.is_file():
        try:
            facts |= json.loads(beside.read_text())
        except (ValueError, TypeError) as error:
            raise ValueError(f"'{beside}' is not JSON that describes a backbone ({error})") from error
    elif arch is None:
        raise ValueError(f"'{beside}' is missing, so what network is in '{weights}' is not known: name it with --arch")
    facts |= {k: v for k, v in (("arch", arch), ("width", width), ("stem", stem)) if v is not None}
    if "arch" not in facts:
        raise ValueError(f"'{beside}' does not say what \"arch\" is in '{weights}': name it with --arch")
    try:
        backbone, _ = build_backbone(facts["arch"], facts["stem"], facts["width"])
    except ValueError as error:
        raise ValueError(f"'{beside}': {error}") from error
    load_weights(backbone, weights, f"{describe(facts['arch'])} x{facts['width']:g} with the {facts['stem']} stem")
    return backbone, facts


def load_weights(backbone: nn.Module, weights: str, name: str) -> None:
    """Fills a backbone, which `name` describes, from a state dict on disk. Keys must match to the last one; only a
    torchvision classifier (fc.*, classifier.*) is left out. Raises FileNotFoundError or ValueError."""
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no weights at '{weights}'")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in zipfile, pickle or torch
        raise ValueError(
            f"'{weights}' cannot be read as a state dict ({type(error).__name__}): damaged, or not torch's"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"'{weights}' holds a {type(state).__name__}, not a state dict")
    state = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    expected = backbone.state_dict()
    wrong = [f"{k} is missing" for k in expected if k not in state] + [
        f"{k} is unknown" for k in state if k not in expected
    ]
    wrong += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    if wrong:
        raise ValueError(
            f"'{weights}' is no {name}: {wrong[0]}" + (f", and {len(wrong) - 1} more keys differ" if wrong[1:] else "")
        )
    backbone.load_state_dict(state)


def measure(
    backbone: nn.Module, facts: dict, train: Images, test: Images, device: torch.device, args: argparse.Namespace
) -> dict:
    """kNN and linear accuracy on the test images."""
    mean, std = facts["mean"], facts["std"]
    backbone = backbone.to(device, memory_format=memory_format(device))
    h, h_test = (extract(backbone, images.pixels, mean, std, device, args.batch_size) for images in (train, test))
    augmented = None
    if args.augment:
        views, g = (
            MultiCrop(CROP_AND_FLIP, train.pixels.shape[-1], mean, std, device),
            torch.Generator().manual_seed(args.seed),
        )
        backbone.eval()

        @torch.no_grad()
        def augmented(rows):
            chunks = rows.split(args.batch_size)
            return torch.cat([backbone(views(train.pixels[r].to(device), g)[0]).float() for r in chunks])

    row = {"knn": knn_accuracy(h, train.labels, h_test, test.labels, args.knn_k, args.knn_t)}
    probe = linear_probe(h, train.labels, h_test, test.labels, augmented=augmented, epochs=args.epochs, seed=args.seed)
    return row | probe


def get_parser() -> Parser:
    on_off = argparse.BooleanOptionalAction
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", required=True, help="backbone.pth, or torchvision's state dict and --arch")
    parser.add_argument("--data", nargs="+", default=None, help="shapes, names or folders; None is backbone.json's")
    parser.add_argument("--arch", choices=ARCHS, default=None, help="only where backbone.json is missing")
    parser.add_argument("--width", type=float, default=None, help="only where backbone.json is missing")
    parser.add_argument("--stem", choices=["imagenet", "small"], default=None, help="as --width")
    parser.add_argument("--augment", action=on_off, default=False, help="the probe trains on crops and flips")
    parser.add_argument("--untrained", action=on_off, default=True, help="measure the untrained network too")
    parser.add_argument("--epochs", type=int, default=100, help="of the probe")
    parser.add_argument("--batch-size", type=int, default=512, help="images a forward pass")
    parser.add_argument("--knn-k", type=int, default=200, help="neighbours")
    parser.add_argument("--knn-t", type=float, default=0.1, help="temperature of the neighbours' weights")
    parser.add_argument("--output-dir", default=None, help="where the tables go; None is beside the weights")
    data_flags(parser)
    return parser


def main(args: argparse.Namespace) -> dict[str, list[dict]]:
    """One table a data set: {data: [{"network", "knn", "linear", ...}, ...]}"""
    with user_errors():
        rank, _, device = setup(args.device)
        backbone, facts = load_backbone(args.weights, args.arch, args.width, args.stem)
        args.image_size = args.image_size or facts.get("resized_to")
        sources = args.data or [facts[k] for k in ["data"] if k in facts]
        if not sources:
            raise ValueError("which images? --data shapes, a torchvision data set's name or a folder")
        folder = Path(args.output_dir or Path(args.weights).parent)
        folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for source in sources:
        with user_errors():
            train, test = (load_data(args, source, split) for split in ("train", "test"))
            if not train.labelled:
                raise ValueError(
                    f"'{source}' has no labels to measure with: it needs train/ and test/ or val/, a folder a class"
                )
        rows, networks = [], [("pre-trained", backbone)]
        if args.untrained:
            torch.manual_seed(args.seed)
            networks.append(("untrained", build_backbone(facts["arch"], facts["stem"], facts["width"])[0]))
        for name, network in networks:
            start = time.time()
            rows.append(
                {"network": name}
                | measure(network, facts, train, test, device, args)
                | {"seconds": time.time() - start}
            )
        tables[source] = rows
        lines = [
            f"{describe(facts['arch'])} x{facts['width']:g} ({args.weights}) on {source}: {len(train.pixels):,} "
            f"training images, {len(test.pixels):,} test images",
            "",
            f"| network | kNN (k {args.knn_k}, T {args.knn_t:g}, cosine) | linear{' (augmented)' * args.augment} "
            "| chosen on held-out training images | s |",
            "|---|---|---|---|---|",
        ]
        for r in rows:
            chosen = f"lr {r['lr']:g}, decay {r['weight_decay']:g}: {100 * r['held_out']:.2f}"
            lines.append(
                f"| {r['network']} | {100 * r['knn']:.2f} | {100 * r['linear']:.2f} | {chosen} | {r['seconds']:.0f} |"
            )
        if rank == 0:
            print("\n".join(lines), flush=True)
            (folder / f"linear_eval-{Path(source).name}.md").write_text("\n".join(lines) + "\n")
    return tables


if __name__ == "__main__":
    main(get_parser().parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()
