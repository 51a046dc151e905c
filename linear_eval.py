"""Measures a backbone, beside the same network untrained: weighted kNN, a linear probe, few-shot, fine-tuning.

    torchrun linear_eval.py --weights runs/pretrain/backbone.pth               # on the data it was trained on
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --data cifar10 cifar100 my/images       # transfer
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --shots 1 5
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --finetune --label-fraction 0.01 0.1    # few labels
    torchrun linear_eval.py --weights resnet50.pth --arch resnet50 --data my/images --image-size 224    # torchvision's

Everything that has to be chosen (learning rates, the probe's weight decay) is chosen on held-out training images; the
test images are looked at once. One table goes to the terminal and to linear_eval-<data>.md beside the weights.
"""

import launch  # noqa: F401  # ahead of torch: it says how threads wait

# isort: split

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import load_backbone
from data import Images, Stream, decoded, in_turn, load_data, to_device
from launch import Parser, data_flags, is_main, memory_format, say, setup, synced, user_errors
from models import ARCHS, ViT, build_backbone, describe
from views import CROP_AND_FLIP, MultiCrop

# ---- what every script needs at its start ---------------------------------------------------------------------------


# ---- measures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract(
    backbone: nn.Module,
    pixels: Tensor | Stream,
    mean,
    std,
    device: torch.device,
    batch_size: int = 512,
    rows: Tensor | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Features (N, F) in fp32 of uint8 (N, 3, H, W), or of some rows of it, in eval mode; ranks share the work.

    forward: what gives the features, by default the backbone itself.
    """
    training = backbone.training
    backbone.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = torch.arange(len(pixels), device=pixels.device) if rows is None else rows
    share = -(-len(rows) // world)
    mine = torch.arange(rank * share, (rank + 1) * share, device=rows.device) % len(rows)  # the last ranks wrap around
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
    h = []
    for batch in in_turn(pixels, rows[mine].split(batch_size)):
        x = batch.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
        h.append((forward or backbone)(x.contiguous(memory_format=memory_format(device))).float())
    backbone.train(training)
    h = torch.cat(h)
    if world > 1:
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


def few_shot(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, shots: int, draws: int = 100, seed: int = 0
) -> tuple[float, float]:
    """(mean accuracy over draws, half of its 95 % confidence interval) of the nearest class mean by cosine, of `shots`
    images a class drawn anew each time. Features are centred by the mean of the drawn ones and brought to unit length
    (SimpleShot, 1911.04623, which centres by other classes' images); nothing is to be chosen.

    Raises ValueError where a class has too few images.
    """
    g = torch.Generator().manual_seed(seed)
    places = rows_by_class(train_labels)
    fewest = min(map(len, places))
    if fewest < shots:
        raise ValueError(f"{shots} shots: the smallest class has {fewest} labelled training images")
    labels, accuracies = test_labels.to(test.device), []
    for _ in range(draws):
        drawn = torch.stack([p[torch.randperm(len(p), generator=g)[:shots]] for p in places])  # (C, n)
        support = train[drawn.to(train.device)]
        centre = support.mean((0, 1))
        means = F.normalize(F.normalize(support - centre, dim=2).mean(1), dim=1)  # (C, F)
        prediction = torch.cat([((q - centre) @ means.T).argmax(1) for q in test.split(4096)])
        accuracies.append((prediction == labels).double().mean())
    spread = torch.stack(accuracies)
    half = 1.96 * spread.std().item() / math.sqrt(draws) if draws > 1 else math.nan
    return spread.mean().item(), half


# ---- labels ---------------------------------------------------------------------------------------------------------


def rows_by_class(labels: Tensor) -> list[Tensor]:
    """The rows of each class, in their order, of labels (N,)."""
    return list(labels.argsort(stable=True).split(labels.bincount().tolist()))


def balanced_rows(labels: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Rows of a share of the labels (N,), as many of every class, to one, and at least one; of a class that has fewer
    all. The same ones for the same seed."""
    g, places = torch.Generator().manual_seed(seed), rows_by_class(labels)
    each, more = divmod(max(len(places), round(fraction * len(labels))), len(places))
    lucky = set(torch.randperm(len(places), generator=g)[:more].tolist())  # have one more
    return torch.cat([p[torch.randperm(len(p), generator=g)[: each + (c in lucky)]] for c, p in enumerate(places)])


def listed_rows(path: str, images: Images) -> Tensor:
    """Rows of the images that a text file names, one a line, as in images.names or by the file's name alone, as
    published lists do. Raises ValueError or OSError."""
    try:
        lines = Path(path).read_text().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not a text file with an image a line") from error
    rows = {name: i for i, name in enumerate(images.names)}
    short: dict[str, list[int]] = {}
    for name, i in rows.items():
        short.setdefault(os.path.basename(name), []).append(i)
    found = []
    for number, line in enumerate(map(str.strip, lines), 1):
        hits = [rows[line]] if line in rows else short.get(line, [])
        if line and len(hits) != 1:
            what = "none" if not hits else f"{len(hits)} of them: give the folder too"
            raise ValueError(f"'{path}' line {number}: '{line}' should be one of the training images, but is {what}")
        found += hits if line else []
    if not found:
        raise ValueError(f"'{path}' names no image")
    return torch.tensor(found)


def classifier(
    backbone: nn.Module,
    facts: dict,
    images: Images,
    rows: Tensor,
    lr: float,
    epochs: int,
    device: torch.device,
    seed: int = 0,
    batch_size: int = 64,
    compiled: bool = False,
) -> nn.Module:
    """A copy of the backbone with a linear classifier, all of it trained on some rows: crops and flips, SGD with
    Nesterov momentum, no weight decay, cosine (2210.02808). The classifier starts at 0 and has 10 times the rate."""
    rng, world = np.random.default_rng(seed), dist.get_world_size() if dist.is_initialized() else 1
    head = nn.Linear(backbone.feature_dim, len(images.classes))
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    network = synced(nn.Sequential(copy.deepcopy(backbone), head).to(device), device).train()
    if compiled:
        torch._dynamo.reset()
        network.compile()
    model = DistributedDataParallel(network) if world > 1 else network
    views = MultiCrop(CROP_AND_FLIP, images.pixels.shape[-1], facts["mean"], facts["std"], device)
    groups = [{"params": part.parameters(), "lr": scale * lr} for part, scale in zip(network, (1, 10))]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=device.type == "cuda" or None)
    batch = min(batch_size, len(rows))
    steps = len(rows) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        order = rows[torch.from_numpy(rng.permutation(len(rows)))]
        for step in range(steps):
            index = order[step * batch : (step + 1) * batch]
            parameters = views.sample(batch, *images.pixels.shape[2:], rng)
            if world > 1:  # every rank has its share of the same batch
                mine = torch.arange(dist.get_rank(), max(batch, world), world) % batch
                index, parameters = index[mine], parameters[:, mine]
            x = views.render(to_device(images.pixels[index], device), to_device(parameters, device))[0]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(x.contiguous(memory_format=memory_format(device)))
            F.cross_entropy(logits.float(), to_device(images.labels[index], device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return network.eval()


def finetune(
    backbone: nn.Module,
    facts: dict,
    train: Images,
    rows: Tensor,
    test: Images,
    device: torch.device,
    learning_rates: list[float],
    epochs: int | None = None,
    seed: int = 0,
    compiled: bool = False,
) -> dict[str, float]:
    """Test accuracy of the whole network trained on some labelled rows. The learning rate is the best on a fifth of
    them, held out; with it the network is trained anew on all. The backbone itself stays as it is.

    epochs: None is 2210.02808's, 60 where at most 5 % are labelled, else 30; but 400 steps at least, since those of a
    few hundred images would be too few.
    """
    steps = max(1, len(rows) // 64)
    epochs = epochs or max(60 if len(rows) <= 0.05 * len(train.pixels) else 30, -(-400 // steps))

    def accuracy(network, images, which=None):
        which = torch.arange(len(images.pixels)) if which is None else which
        h = extract(network[0], images.pixels, facts["mean"], facts["std"], device, rows=which, forward=network)
        right = h.argmax(1).cpu() == images.labels[which]
        return right[decoded(images.pixels, which)].double().mean().item()

    def trained(rows, lr):
        return classifier(backbone, facts, train, rows, lr, epochs, device, seed, compiled=compiled)

    scores = [math.nan]
    if len(learning_rates) > 1:
        if len(rows) < 2:
            raise ValueError("one labelled image leaves none to choose a learning rate on: give one --finetune-lr")
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        out, rest = order.tensor_split([max(1, len(rows) // 5)])
        scores = [accuracy(trained(rest, lr), train, out) for lr in learning_rates]
    lr = learning_rates[max(range(len(scores)), key=scores.__getitem__)]
    return {"finetuned": accuracy(trained(rows, lr), test), "finetune_lr": lr}


# ---- backbones on disk ----------------------------------------------------------------------------------------------


def measure(
    backbone: nn.Module,
    facts: dict,
    train: Images,
    test: Images,
    device: torch.device,
    args: argparse.Namespace,
    labelled: Sequence[Tensor | None] = (None,),
) -> list[dict]:
    """For each of some sets of rows of the training images (None is all): what a network with the labels of these
    scores on the test images, {"knn", "linear", ...}."""
    mean, std, training = facts["mean"], facts["std"], backbone.training
    backbone = backbone.to(device, memory_format=memory_format(device)).eval()
    compiled = device.type == "cuda" if args.compile is None else args.compile
    torch._dynamo.reset()  # a process compiles eight networks of one class at most, and then runs eager
    if compiled:
        backbone.compile()
    forward = partial(backbone.last_blocks, n=args.vit_blocks) if isinstance(backbone, ViT) else backbone
    h, h_test = (
        extract(backbone, images.pixels, mean, std, device, args.batch_size, forward=forward)
        for images in (train, test)
    )
    views = MultiCrop(CROP_AND_FLIP, train.pixels.shape[-1], mean, std, device)
    shown, table = decoded(test.pixels, torch.arange(len(h_test))), []
    h_test, test_labels = h_test[shown.to(device)], test.labels[shown]
    for rows in labelled:
        start, rows = time.time(), torch.arange(len(h)) if rows is None else rows
        rows = rows[decoded(train.pixels, rows)]
        rng, augmented = np.random.default_rng(args.seed), None
        if args.augment:

            @torch.no_grad()
            def augmented(some, rows=rows, rng=rng):
                chunks = rows[some].split(args.batch_size)
                return torch.cat([forward(views(train.pixels[r].to(device), rng)[0]).float() for r in chunks])

        known, labels = h[rows.to(device)], train.labels[rows]
        bank, query = (x[:, -backbone.feature_dim :] for x in (known, h_test))  # of a ViT the last block's alone
        row = {"labels": len(rows), "knn": knn_accuracy(bank, labels, query, test_labels, args.knn_k, args.knn_t)}
        probe = {"epochs": args.epochs, "seed": args.seed, "augmented": augmented}
        row |= linear_probe(known, labels, h_test, test_labels, **probe)
        smallest = min(labels.bincount(minlength=len(train.classes)).tolist())
        for n in args.shots:
            draws = args.draws, args.seed
            row[f"{n}-shot"] = few_shot(bank, labels, query, test_labels, n, *draws) if n <= smallest else None
        if args.finetune:
            how = args.finetune_lr, args.finetune_epochs, args.seed, compiled
            row |= finetune(backbone, facts, train, rows, test, device, *how)
        table.append(row | {"seconds": time.time() - start})
    backbone.train(training)
    return table


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
    parser.add_argument("--compile", action=on_off, default=None, help="torch.compile; None is on CUDA alone")
    parser.add_argument("--knn-k", type=int, default=200, help="neighbours")
    parser.add_argument("--knn-t", type=float, default=0.1, help="temperature of the neighbours' weights")
    parser.add_argument("--vit-blocks", type=int, default=4, help="of a ViT: the probe sees the last n class tokens")
    parser.add_argument("--output-dir", default=None, help="where the table goes; None is beside the weights")
    group = parser.add_argument_group("few labels")
    group.add_argument(
        "--label-fraction", type=float, nargs="+", default=[1.0], help="shares of the labels to do with, a row for each"
    )
    group.add_argument("--label-list", default=None, help="a file that names the labelled training images, one a line")
    group.add_argument("--shots", type=int, nargs="+", default=[], help="images a class, nearest class mean")
    group.add_argument("--draws", type=int, default=100, help="of the --shots images")
    group.add_argument("--finetune", action="store_true", help="train the whole network too")
    group.add_argument("--finetune-lr", type=float, nargs="+", default=[0.01, 0.03, 0.1], help="to choose from")
    group.add_argument(
        "--finetune-epochs",
        type=int,
        default=None,
        help="None is 30, 60 for 5 %% of the labels or less, and 400 steps at least",
    )
    data_flags(parser)
    return parser


def label_sets(args: argparse.Namespace, source: str, train: Images) -> list[Tensor | None]:
    """The rows whose labels are known, for each row of the table. Raises ValueError or OSError."""
    if not train.labelled:
        raise ValueError(
            f"'{source}' has no labels to measure with: it needs train/ and test/ or val/, a folder a class"
        )
    if args.label_list:
        return [listed_rows(args.label_list, train)]
    return [None if f == 1 else balanced_rows(train.labels, f, args.seed) for f in args.label_fraction]


def check(args: argparse.Namespace) -> None:
    """ValueError for flags that cannot be."""
    if not all(0 < f <= 1 for f in args.label_fraction):
        raise ValueError("--label-fraction: shares of the labels, above 0 and up to 1")
    if args.label_list and args.label_fraction != [1.0]:
        raise ValueError("--label-list says which labels are known, so --label-fraction cannot: leave one out")
    for flag in ("epochs", "batch_size", "draws", "knn_k", "knn_t", "vit_blocks", "shots", "finetune_lr"):
        values = getattr(args, flag)
        if min(values if isinstance(values, list) else [values], default=1) <= 0:
            raise ValueError(f"--{flag.replace('_', '-')} must be above 0")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be 0 or above")
    if args.finetune_epochs is not None and args.finetune_epochs <= 0:
        raise ValueError("--finetune-epochs must be above 0")


def main(args: argparse.Namespace) -> list[dict]:
    """The table's rows: {"data", "network", "labels", "knn", "linear", ...}"""
    with user_errors():
        check(args)
        _, _, device = setup(args.device, args.deterministic)
        backbone, facts = load_backbone(args.weights, args.arch, args.width, args.stem)
        args.image_size = args.image_size or facts.get("resized_to")
        sources = args.data or [facts[k] for k in ["data"] if k in facts]
        if not sources:
            raise ValueError("which images? --data shapes, a torchvision data set's name or a folder")
        folder = Path(args.output_dir or Path(args.weights).parent)
        folder.mkdir(parents=True, exist_ok=True)
        networks = [("pre-trained", backbone)]
        if args.untrained:
            torch.manual_seed(args.seed)
            networks.append(("untrained", build_backbone(facts["arch"], facts["stem"], facts["width"])[0]))
        table, lines = [], head_of(args, describe(facts["arch"]), facts["width"])
        for line in lines:
            say(line)
        for source in sources:
            train, test = (load_data(args, source, split) for split in ("train", "test"))
            labelled = label_sets(args, source, train)
            for name, network in networks:
                for row in measure(network, facts, train, test, device, args, labelled):
                    table.append({"data": Path(source).name, "network": name} | row)
                    lines.append(line_of(args, table[-1], len(train.pixels)))
                    say(lines[-1])
        if is_main():
            data = "-".join(dict.fromkeys(row["data"] for row in table))
            (folder / f"linear_eval-{data}.md").write_text("\n".join(lines) + "\n")
    return table


def head_of(args: argparse.Namespace, arch: str, width: float) -> list[str]:
    """The table's first lines."""
    columns = ["data", "network", "labels", "kNN", "linear" + " (augmented)" * args.augment]
    columns += [f"{n}-shot" for n in args.shots] + ["fine-tuned"] * args.finetune + ["chosen", "s"]
    return [
        f"{arch} x{width:g} ({args.weights}), seed {args.seed}: test accuracy. kNN: k {args.knn_k}, T {args.knn_t:g}, "
        "cosine; chosen: the probe's learning rate, weight decay and accuracy with them, on held-out training images"
        + (f"; few-shot: mean of {args.draws} draws and its 95 % confidence interval" if args.shots else "")
        + ("; fine-tuned: the whole network, and its learning rate" if args.finetune else ""),
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]


def line_of(args: argparse.Namespace, row: dict, images: int) -> str:
    """A row of the table."""
    share = "" if row["labels"] == images else f" ({100 * row['labels'] / images:.3g} %)"
    cells = [row["data"], row["network"], f"{row['labels']:,}{share}"]
    cells += [f"{100 * row[key]:.2f}" for key in ("knn", "linear")]
    shots = (row[f"{n}-shot"] for n in args.shots)
    cells += ["too few labels" if s is None else f"{100 * s[0]:.2f} ± {100 * s[1]:.2f}" for s in shots]
    if args.finetune:
        cells.append(f"{100 * row['finetuned']:.2f} (lr {row['finetune_lr']:g})")
    cells.append(f"lr {row['lr']:g}, decay {row['weight_decay']:g}: {100 * row['held_out']:.2f}")
    return f"| {' | '.join(cells)} | {row['seconds']:.0f} |"


if __name__ == "__main__":
    main(get_parser().parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()
