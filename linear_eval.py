"""Measures a backbone and the same network untrained: weighted kNN, a linear probe, few-shot, fine-tuning.

    torchrun linear_eval.py --weights runs/pretrain/backbone.pth               # on the data it was trained on
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --data cifar10 cifar100 my/images       # transfer
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --shots 1 5
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --finetune --label-fraction 0.01 0.1    # few labels
    torchrun linear_eval.py --weights resnet50.pth --arch resnet50 --data my/images --image-size 224    # torchvision's
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --embed my/photos    # features of any folder's images
    torchrun linear_eval.py --weights runs/pretrain/backbone.pth --export backbone.pt2             # a program; or .onnx

The probe's weight decay and learning rates are chosen on held-out training images; test images are used once. The table
is printed and written to linear_eval-<data>.md beside the weights, with neighbours-<data>.png and map-<data>.png, which
need no labels.

Shapes: N training images and M test images, F features, C classes, b rows in a chunk or batch.
"""

import launch  # ahead of torch: it says how threads wait

# isort: split

import argparse
import copy
import csv
import importlib.util
import io
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import load_backbone, write_atomic, written
from data import Images, Stream, decoded, image_files, in_turn, load_data, to_device
from launch import Parser, data_flags, is_main, memory_format, say, setup, synced, user_errors
from losses import gather, ranks
from models import ARCHS, ViT, build_backbone, describe
from views import CROP_AND_FLIP, MultiCrop

# ---- frozen features ------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract(
    backbone, pixels: Tensor | Stream, mean, std, device, batch_size=512, rows=None, forward=None, crop=None
) -> Tensor:
    """uint8 (N, 3, H, W) -> fp32 features (N, F) in eval mode, or (n, F) of rows (n,). Ranks share the work.

    forward: (b, 3, H, W) -> (b, F), by default the backbone. crop: uint8 (b, 3, H, W) -> [view, ...]; the first view
    replaces the whole image normalised by mean and std.
    """
    training = backbone.training
    backbone.eval()
    forward = forward or backbone
    rank, world = ranks()
    if rows is None:
        rows = torch.arange(len(pixels), device=pixels.device)
    share = math.ceil(len(rows) / world)
    # gather needs equal shares, so the last ranks wrap around and repeat some rows
    own = torch.arange(rank * share, (rank + 1) * share, device=rows.device) % len(rows)
    mean = torch.tensor(mean, device=device).view(3, 1, 1)
    std = torch.tensor(std, device=device).view(3, 1, 1)
    parts = []
    for batch in in_turn(pixels, rows[own].split(batch_size)):
        x = batch.to(device, non_blocking=True)
        x = crop(x)[0] if crop else x.float().div_(255).sub_(mean).div_(std)
        parts.append(forward(x.contiguous(memory_format=memory_format(device))).float())
    backbone.train(training)
    return gather(torch.cat(parts)).flatten(0, 1)[: len(rows)]  # (world, share, F) -> (n, F)


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, query: Tensor, labels: Tensor, k=200, temperature=0.1, chunk=1024
) -> float:
    """Accuracy of weighted kNN on queries (M, F): the k nearest in the bank (N, F) by cosine vote with weights
    exp(cos / T) (1805.01978, section 3.4). Works on chunks of queries, to not hold all M x N similarities. Weights are
    relative to the nearest's, as else a small T would make them overflow."""
    bank = F.normalize(bank, dim=1)
    query = F.normalize(query, dim=1)
    bank_labels = bank_labels.to(bank.device)
    labels = labels.to(bank.device)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    k = min(k, len(bank))
    right = torch.zeros((), dtype=torch.long, device=bank.device)
    for q, y in zip(query.split(chunk), labels.split(chunk)):
        cosine, nearest = (q @ bank.T).topk(k)  # (b, F) x (F, N) -> (b, k) of both
        votes = q.new_zeros(len(q), classes)  # (b, C)
        votes.scatter_add_(1, bank_labels[nearest], ((cosine - cosine[:, :1]) / temperature).exp())
        right += (votes.argmax(1) == y).sum()
    return right.item() / len(query)


DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


@contextmanager
def full_precision():
    """fp32 products on a GPU, where the scripts otherwise allow TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fit_logistic(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, decay: float, scale: Tensor) -> tuple:
    """Softmax regression on features (N, F): (weight (F, C), bias (C,)) that minimise mean cross-entropy + decay / 2 *
    |weight|^2, by L-BFGS from those given, in coordinates weight / scale (F, 1), in which curvatures are similar."""
    v = (weight / scale).requires_grad_()
    bias = bias.clone().requires_grad_()
    how = {"max_iter": 100, "tolerance_grad": 1e-5, "tolerance_change": 1e-5, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([v, bias], **how)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = decay / 2 * (scale * v).square().sum()
        total.backward()
        for chunk, y in zip(x.split(65536), labels.split(65536)):  # all logits may need too much memory
            loss = F.cross_entropy(chunk @ (scale * v) + bias, y, reduction="sum") / max(1, len(x))
            loss.backward()
            total = total + loss
        return total.detach()

    optimizer.step(closure)
    return (scale * v).detach(), bias.detach()


@full_precision()
def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seed=0) -> dict[str, float]:
    """Test accuracy of logistic regression on frozen features (N, F) and (M, F), standardised by the training features:
    {"linear", "held_out", "weight_decay"}. train may hold several crops of each image, (K, N, F).

    The weight decay is chosen by accuracy on a tenth of the training images, held out, and fitted again on all. Decays
    are tried from the strongest, each from the weights of the last, until two in a row are no better. L-BFGS and the
    choice on held-out images are CLIP's protocol (2103.00020, appendix A.3). Unlike there, L-BFGS works on the
    features' principal axes, each divided by the root of its curvature, which takes a fraction of the iterations.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    train_labels, test_labels = train_labels.to(train.device), test_labels.to(train.device)
    crops = train.flatten(0, -2)  # (K N, F)
    mean, std = crops.mean(0), crops.std(0)
    std = std.clamp(min=1e-3 * std.max().item() + 1e-12)  # a dead feature would become noise
    crops = (crops - mean) / std
    variance, axes = torch.linalg.eigh(crops.T @ crops / len(crops))  # (F,), (F, F)
    crops = (crops @ axes).view(-1, len(train_labels), len(axes))  # (K, N, F)
    test = ((test - mean) / std) @ axes
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed)).to(train.device)
    out, rest = order.tensor_split([max(1, int(0.1 * len(order)))])

    def of(rows: Tensor) -> tuple[Tensor, Tensor]:  # features and labels of all crops of some images
        return crops[:, rows].flatten(0, 1), train_labels[rows].repeat(len(crops))

    def scale(decay: float) -> Tensor:  # (F, 1); at the start each class has 1 / C
        return (variance.clamp(min=0) / classes + decay).rsqrt()[:, None]

    weight, bias = crops.new_zeros(len(axes), classes), crops.new_zeros(classes)
    scores, fits = [], []
    (x, y), (x_out, y_out) = of(rest), of(out)
    for decay in DECAYS:
        weight, bias = fit_logistic(x, y, weight, bias, decay, scale(decay))
        fits.append((weight, bias))
        scores.append(accuracy(x_out @ weight + bias, y_out))
        if len(scores) - scores.index(max(scores)) > 2:
            break
    best = scores.index(max(scores))
    weight, bias = fit_logistic(*of(order), *fits[best], DECAYS[best], scale(DECAYS[best]))
    linear = accuracy(test @ weight + bias, test_labels)
    return {"linear": linear, "held_out": scores[best], "weight_decay": DECAYS[best]}


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


# ---- few labels -----------------------------------------------------------------------------------------------------


def rows_by_class(labels: Tensor) -> list[Tensor]:
    """The rows of each class of labels (N,), in order."""
    return list(labels.argsort(stable=True).split(labels.bincount().tolist()))


def balanced_rows(labels: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Rows of a class-balanced random fraction of the labels (N,), by the seed. Class sizes differ by one at most, each
    class has at least one row, and too small a class gives all of its rows."""
    generator = torch.Generator().manual_seed(seed)
    by_class = rows_by_class(labels)
    n = max(len(by_class), round(fraction * len(labels)))
    each, left_over = divmod(n, len(by_class))
    order = torch.randperm(len(by_class), generator=generator).tolist()  # the first `left_over` get one more
    counts = [each + (c in order[:left_over]) for c in range(len(by_class))]
    return torch.cat([r[torch.randperm(len(r), generator=generator)[:n]] for r, n in zip(by_class, counts)])


def listed_rows(path: str, images: Images) -> Tensor:
    """Rows of the images that a text file lists, one per line: as in images.names, or the file's name alone, as in
    published lists."""
    lines = Path(path).read_text(errors="replace").split("\n")  # of a binary file, line 1 is no image
    known = defaultdict(list)  # name: rows
    for row, name in enumerate(images.names):
        for key in {name, os.path.basename(name)}:
            known[key].append(row)
    found = []
    for number, name in enumerate(map(str.strip, lines), 1):
        rows = known[name]
        if name and len(rows) != 1:
            what = f"{len(rows)} of them: give the folder too" if rows else "none"
            raise ValueError(f"'{path}' line {number}: '{name}' should be one of the training images, but is {what}")
        found += rows
    if not found:
        raise ValueError(f"'{path}' names no image")
    return torch.tensor(found)


def few_shot(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, shots: int, draws: int = 100, seed: int = 0
) -> tuple[float, float]:
    """(mean accuracy over draws, half of its 95 % confidence interval) of the nearest class mean by cosine. A draw is
    `shots` random images per class. Features are centred and brought to unit length as in SimpleShot (1911.04623), but
    by the mean of the drawn images rather than of other classes."""
    generator = torch.Generator().manual_seed(seed)
    by_class = rows_by_class(train_labels)
    fewest = min(len(rows) for rows in by_class)
    if fewest < shots:
        raise ValueError(f"{shots} shots: the smallest class has {fewest} labelled training images")
    test_labels = test_labels.to(test.device)
    accuracies = []
    for _ in range(draws):
        drawn = [rows[torch.randperm(len(rows), generator=generator)[:shots]] for rows in by_class]
        support = train[torch.stack(drawn).to(train.device)]  # (C, shots, F)
        centre = support.mean((0, 1))
        unit = F.normalize(support - centre, dim=2)
        means = F.normalize(unit.mean(1), dim=1)  # (C, F)
        # a query's own length scales all of its cosines alike
        predicted = torch.cat([((x - centre) @ means.T).argmax(1) for x in test.split(4096)])
        accuracies.append((predicted == test_labels).double().mean())
    accuracies = torch.stack(accuracies)
    half = 1.96 * accuracies.std().item() / math.sqrt(draws) if draws > 1 else math.nan
    return accuracies.mean().item(), half


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


def classifier(backbone, facts, images: Images, rows: Tensor, lr, epochs, device, seed=0, compiled=False) -> nn.Module:
    """A copy of the backbone with a linear classifier, both trained on some rows: crops and flips, SGD with Nesterov
    momentum, no weight decay, cosine (2210.02808). The classifier starts at 0 and has 10 times the learning rate."""
    rng = np.random.default_rng(seed)
    rank, world = ranks()
    head = nn.Linear(backbone.feature_dim, len(images.classes))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    network = synced(nn.Sequential(copy.deepcopy(backbone), head).to(device), device).train()
    if compiled and launch.traceable(network):
        launch.forget(device)
        network.compile()
    model = DistributedDataParallel(network) if world > 1 else network
    views = MultiCrop(CROP_AND_FLIP, images.pixels.shape[-1], facts["mean"], facts["std"], device)
    groups = [{"params": network[0].parameters(), "lr": lr}, {"params": network[1].parameters(), "lr": 10 * lr}]
    cuda = device.type == "cuda"
    bf16 = cuda and launch.bf16_pays(device)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=cuda or None)
    batch = min(64, len(rows))
    own = torch.arange(rank, max(batch, world), world) % batch  # this rank's share of a batch, at least one
    steps = len(rows) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        order = rows[torch.from_numpy(rng.permutation(len(rows)))]
        for step in range(steps):
            index = order[step * batch + own]
            parameters = views.sample(batch, *images.pixels.shape[2:], rng)[:, own]
            x = views.render(to_device(images.pixels[index], device), to_device(parameters, device))[0]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(x.contiguous(memory_format=memory_format(device)))
            F.cross_entropy(logits.float(), to_device(images.labels[index], device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return network.eval()


def network_accuracy(network: nn.Module, facts: dict, images: Images, rows: Tensor, device: torch.device) -> float:
    """Accuracy of a fine-tuned `classifier` on these rows, without files that cannot be decoded."""
    logits = extract(network[0], images.pixels, facts["mean"], facts["std"], device, rows=rows, forward=network)
    right = logits.argmax(1).cpu() == images.labels[rows]
    return right[decoded(images.pixels, rows)].double().mean().item()


def finetune(
    backbone, facts, train: Images, rows, test: Images, device, learning_rates, epochs=None, seed=0, compiled=False
) -> dict[str, float]:
    """Test accuracy of the whole network trained on labelled rows: {"finetuned", "finetune_lr"}. The learning rate is
    chosen on a fifth of the rows, held out, and used to train on all.

    epochs: None means 2210.02808's, 60 if at most 5 % are labelled, else 30, but at least 400 steps.
    """
    if epochs is None:
        published = 60 if len(rows) <= 0.05 * len(train.pixels) else 30
        epochs = max(published, math.ceil(400 / max(1, len(rows) // 64)))
    fit = partial(classifier, backbone, facts, train, epochs=epochs, device=device, seed=seed, compiled=compiled)
    best_lr = learning_rates[0]
    if len(learning_rates) > 1:
        if len(rows) < 2:
            raise ValueError("one labelled image leaves none to choose a learning rate on: give one --finetune-lr")
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        out, rest = order.tensor_split([max(1, len(rows) // 5)])
        scores = [network_accuracy(fit(rest, lr), facts, train, out, device) for lr in learning_rates]
        best_lr = learning_rates[scores.index(max(scores))]
    accuracy = network_accuracy(fit(rows, best_lr), facts, test, torch.arange(len(test.pixels)), device)
    return {"finetuned": accuracy, "finetune_lr": best_lr}


# ---- all of them ----------------------------------------------------------------------------------------------------


def measure(
    backbone: nn.Module,
    facts: dict,
    train: Images,
    test: Images,
    device: torch.device,
    *,
    labelled: Sequence[Tensor | None] = (None,),
    knn_k: int = 200,
    knn_t: float = 0.1,
    batch_size: int = 512,
    augment: int = 0,
    shots: Sequence[int] = (),
    draws: int = 100,
    finetune_lr: Sequence[float] | None = None,
    finetune_epochs: int | None = None,
    vit_blocks: int = 4,
    compiled: bool | None = None,
    seed: int = 0,
) -> list[dict]:
    """Test accuracies of a backbone, which is not changed: a dict for each entry of `labelled`, the rows of training
    images whose labels may be used (None: all).

    A dict has "labels" and "images" (their numbers), "knn", "linear", "held_out", "weight_decay" and "seconds"; for
    each n in shots "<n>-shot": (mean, half of the 95 % interval), None if a class has fewer labels; with finetune_lr
    (one or more to choose from) "finetuned" and "finetune_lr". facts: "mean" and "std" of the channels.
    vit_blocks: the probe of a ViT sees the class tokens of its last blocks (2104.14294), other measures the last one.
    augment: the probe is trained on so many random crops and flips of each image. compiled: None means on CUDA only.
    """
    training = backbone.training
    backbone = backbone.to(device, memory_format=memory_format(device)).eval()
    compiled = device.type == "cuda" if compiled is None else compiled
    launch.forget(device)
    if compiled:
        backbone.compile()
    forward = partial(backbone.last_blocks, n=vit_blocks) if isinstance(backbone, ViT) else backbone
    mean, std = facts["mean"], facts["std"]
    features = partial(extract, backbone, mean=mean, std=std, device=device, batch_size=batch_size, forward=forward)
    views = MultiCrop(CROP_AND_FLIP, train.pixels.shape[-1], mean, std, device)
    h_train, h_test = features(train.pixels), features(test.pixels)
    shown = decoded(test.pixels, torch.arange(len(test.pixels)))  # known only after extraction
    h_test, test_labels = h_test[shown.to(device)], test.labels[shown]

    table = []
    for rows in labelled:
        start = time.time()
        rows = torch.arange(len(train.pixels)) if rows is None else rows
        rows = rows[decoded(train.pixels, rows)]
        h, labels = h_train[rows.to(device)], train.labels[rows]
        bank, query = h[:, -backbone.feature_dim :], h_test[:, -backbone.feature_dim :]  # a ViT's last block
        row = {"labels": len(rows), "images": len(train.pixels)}
        row["knn"] = knn_accuracy(bank, labels, query, test_labels, knn_k, knn_t)
        crop = partial(views, rng=np.random.default_rng(seed + ranks()[0]))  # ranks crop different images
        crops = [features(train.pixels, rows=rows, crop=crop) for _ in range(augment)]
        row.update(linear_probe(torch.stack(crops) if crops else h, labels, h_test, test_labels, seed))
        smallest = labels.bincount(minlength=len(train.classes)).min().item()
        for n in shots:
            enough = n <= smallest
            row[f"{n}-shot"] = few_shot(bank, labels, query, test_labels, n, draws, seed) if enough else None
        if finetune_lr:
            how = {"epochs": finetune_epochs, "seed": seed, "compiled": compiled}
            row.update(finetune(backbone, facts, train, rows, test, device, finetune_lr, **how))
        row["seconds"] = time.time() - start
        table.append(row)
    backbone.train(training)
    return table


# ---- pictures -------------------------------------------------------------------------------------------------------

BANK, QUERIES, NEAREST = 2000, 8, 5  # numbers of training images, test images, and neighbours of each test image


def thumbnail(pixels: Tensor, size: int) -> Image.Image:
    """A uint8 (3, H, W), resized."""
    return Image.fromarray(pixels.cpu().permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.LANCZOS)


def page(width: int, height: int, headings: dict[str, int]) -> Image.Image:
    """A white image with headings at their x positions."""
    image = Image.new("RGB", (width, 30 + height), "white")
    for text, x in headings.items():
        ImageDraw.Draw(image).text((x, 8), text, "black", font_size=15)
    return image


def save_neighbours(bank: Tensor, queries: Tensor, features: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """A row for each query image (uint8 (Q, 3, H, W)): itself, and for each network its nearest images in the bank by
    cosine. features: {network: (of the bank (N, F), of the queries (Q, F))}."""
    size, gap = 56, 18
    block = NEAREST * (size + 2) + gap
    columns = {name: size + 2 * gap + k * block for k, name in enumerate(features)}
    image = page(size + gap + len(features) * block, len(queries) * (size + 4), {"image": 6, **columns})
    for row, query in enumerate(queries):
        image.paste(thumbnail(query, size), (4, 30 + row * (size + 4)))
    for name, (h_bank, h_queries) in features.items():
        similarity = F.normalize(h_queries, dim=1) @ F.normalize(h_bank, dim=1).T
        for row, nearest in enumerate(similarity.topk(min(NEAREST, len(bank))).indices.tolist()):
            for k, place in enumerate(nearest):
                where = columns[name] + k * (size + 2), 30 + row * (size + 4)
                image.paste(thumbnail(bank[place], size), where)
    image.save(path)


def save_map(pixels: Tensor, features: dict[str, Tensor], path: Path) -> None:
    """A map for each network: images (uint8 (N, 3, H, W)) at the ranks of their features' first two principal
    components (ranks, since a few outliers would push the others together)."""
    size, side = 22, 560
    headings = {name: 8 + k * (side + 20) for k, name in enumerate(features)}
    image = page(len(features) * (side + 20), side + 12, headings)
    for name, h in features.items():
        centred = h.double().cpu() - h.double().cpu().mean(0)
        places = centred @ torch.linalg.eigh(centred.T @ centred)[1][:, [-1, -2]]
        ranks_of = places.argsort(0).argsort(0).double() / max(1, len(h) - 1)
        for n, (x, y) in enumerate((ranks_of * (side - size)).round().int().tolist()):
            image.paste(thumbnail(pixels[n], size), (headings[name] + x, 34 + y))
    image.save(path)


def save_pictures(
    networks: dict[str, nn.Module], facts: dict, train: Images, test: Images | None, folder: Path, data: str, device
) -> None:
    """Saves neighbours-<data>.png and map-<data>.png. If test is None, queries are training images."""
    torch.manual_seed(0)
    rows = torch.randperm(len(train.pixels))[: BANK + QUERIES]
    shown = min(QUERIES, len(rows) // 2)
    bank, queries, of = rows[shown:], rows[:shown], train
    if test is not None:
        bank, queries, of = rows[:BANK], torch.randperm(len(test.pixels))[:QUERIES], test
    features, maps = {}, {}
    for name, network in networks.items():
        network.to(device)
        how = partial(extract, network, mean=facts["mean"], std=facts["std"], device=device)
        h = how(train.pixels, rows=bank)
        spread = ((h - h.mean(0)).square().sum(1).mean().sqrt() / h.mean(0).norm()).item()  # near 0: collapsed
        title = f"{name} (features differ by {100 * spread:.2g} %)"
        features[title] = h, how(of.pixels, rows=queries)
        maps[title] = h[:600]
    if is_main():
        save_neighbours(train.pixels[bank], of.pixels[queries], features, folder / f"neighbours-{data}.png")
        save_map(train.pixels[bank[:600]], maps, folder / f"map-{data}.png")


# ---- features and programs for elsewhere ----------------------------------------------------------------------------


def embed(backbone: nn.Module, facts: dict, source: str, args: argparse.Namespace, folder: Path, device) -> Path:
    """Writes the features of all images below a folder to embed-<name>.npz, with "features" (N, F) and relative "paths"
    (N,), and to a .csv with one image per line. Ranks share the work."""
    files = image_files(source)
    stream = Stream(files, args.image_size, args.workers, source)
    h = extract(backbone.to(device), stream, facts["mean"], facts["std"], device, args.batch_size).cpu()
    shown = decoded(stream, torch.arange(len(files)))
    paths = [os.path.relpath(file, source) for file, kept in zip(files, shown.tolist()) if kept]
    place = folder / f"embed-{Path(source).name}.npz"
    if is_main():
        with written(place) as file:
            np.savez(file, features=h[shown].numpy(), paths=np.array(paths))
        with written(place.with_suffix(".csv")) as file:
            text = io.TextIOWrapper(file, newline="")
            lines = csv.writer(text)
            lines.writerow(["path", *(f"f{k}" for k in range(h.shape[1]))])
            lines.writerows([path, *row] for path, row in zip(paths, h[shown].tolist()))
            text.detach()  # flushes; `written` closes the file
    say(f"wrote {place} and .csv: {len(paths):,} images of {len(files):,}, {h.shape[1]} features")
    return place


class Standalone(nn.Module):
    """A backbone that normalises its input, RGB in 0..1 (B, 3, S, S), itself."""

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone((images - self.mean) / self.std)


def export(backbone: nn.Module, facts: dict, size: int, path: Path) -> None:
    """Writes a program that does not need this code, for any number of images of that size, RGB in 0..1: .pt2, for
    torch.export.load, or .onnx. Raises ValueError if the packages for .onnx are missing."""
    network = Standalone(backbone.cpu(), facts["mean"], facts["std"]).eval()
    example, batch = (torch.rand(2, 3, size, size),), ({0: torch.export.Dim("batch")},)
    if path.suffix == ".pt2":
        program = torch.export.export(network, example, dynamic_shapes=batch)
        with written(path) as file:
            torch.export.save(program, file)
    elif path.suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"--export {path}: pip install {' '.join(missing)} first, or export to .pt2")
        names = {"input_names": ["images"], "output_names": ["features"]}
        torch.onnx.export(network, example, str(path), dynamo=True, dynamic_shapes=batch, verbose=False, **names)
    else:
        raise ValueError(f"--export {path}: a file's name that ends in .pt2 or .onnx is needed")
    say(f"wrote {path}: (batch, 3, {size}, {size}) of 0 to 1 -> (batch, {backbone.feature_dim})")


# ---- flags ----------------------------------------------------------------------------------------------------------


def get_parser() -> Parser:
    on_off = argparse.BooleanOptionalAction
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.set_defaults(**measure.__kwdefaults__)  # a flag that is a keyword of measure has its default
    add = parser.add_argument
    add("--weights", required=True, help="backbone.pth, its backbone.json beside it; or torchvision's and --arch")
    add("--data", nargs="+", help="shapes, data sets' names or folders; left out, what it was trained on")
    add("--arch", choices=ARCHS, help="of the network, only where backbone.json is missing")
    add("--width", type=float, help="multiplies the channels; only where backbone.json is missing")
    add("--stem", choices=["imagenet", "small"], help="the first layers; only where backbone.json is missing")
    add("--untrained", action=on_off, default=True, help="the same network untrained too: what training has added")
    add("--output-dir", help="where the table goes; left out, beside the weights")
    add("--pictures", action=on_off, default=True, help="neighbours-<data>.png and map-<data>.png")
    add("--embed", metavar="FOLDER", help="write the features of all its images as .npz and .csv")
    add("--export", metavar="FILE", help="write the network as a program: .pt2 or .onnx")
    add("--knn-k", type=int, help="neighbours that vote; lower it where classes are small")
    add("--knn-t", type=float, help="temperature of the votes; the lower, the more the nearest neighbours decide")
    add("--augment", type=int, help="train the probe on so many random crops of each image instead, such as 10; slow")
    add("--vit-blocks", type=int, help="the probe sees a ViT's class tokens after so many of its last blocks")
    add("--batch-size", type=int, help="images a forward pass; lower it where memory is short")
    add("--compile", dest="compiled", action=on_off, help="torch.compile; left out, on CUDA alone")
    add = parser.add_argument_group("few labels").add_argument
    add("--label-fraction", type=float, nargs="+", default=[1.0], help="shares of the labels to use, a table row each")
    add("--label-list", help="a file that names the labelled training images, one a line, as published splits do")
    add("--shots", type=int, nargs="+", default=[], help="images a class, for the nearest class mean")
    add("--draws", type=int, help="of the --shots images; more draws narrow the interval")
    add("--finetune", action="store_true", help="train the whole network too, anew for each learning rate; slow")
    add("--finetune-lr", type=float, nargs="+", default=[0.01, 0.03, 0.1], help="one, or several to choose from")
    add("--finetune-epochs", type=int, help="left out: 30, 60 for 5 %% of the labels or less, and 400 steps at least")
    data_flags(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    if not all(0 < f <= 1 for f in args.label_fraction):
        raise ValueError("--label-fraction: shares of the labels, above 0 and up to 1")
    if args.label_list and args.label_fraction != [1.0]:
        raise ValueError("--label-list says which labels are known, so --label-fraction cannot: leave one out")
    flags = "batch-size draws knn-k knn-t vit-blocks shots finetune-lr finetune-epochs"
    for flag in flags.split():
        value = getattr(args, flag.replace("-", "_"))
        if any(v is not None and v <= 0 for v in (value if isinstance(value, list) else [value])):
            raise ValueError(f"--{flag} must be above 0")
    for name in ("seed", "augment"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must be 0 or above")


# ---- the table ------------------------------------------------------------------------------------------------------


def caption(args: argparse.Namespace, facts: dict) -> str:
    text = f"{describe(facts['arch'])} x{facts['width']:g} ({args.weights}), seed {args.seed}: test accuracy. "
    text += f"kNN: k {args.knn_k}, T {args.knn_t:g}, cosine; chosen: "
    text += "the probe's weight decay and accuracy with it, on held-out training images"
    if args.shots:
        text += f"; few-shot: mean of {args.draws} draws and its 95 % confidence interval"
    if args.finetune:
        text += "; fine-tuned: the whole network, and its learning rate"
    return text


def cells(args: argparse.Namespace, row: dict) -> dict[str, str]:
    """{column: text} of a row of main's table."""
    texts = {"data": row["data"], "network": row["network"], "labels": f"{row['labels']:,}"}
    if row["labels"] < row["images"]:
        texts["labels"] += f" ({100 * row['labels'] / row['images']:.3g} %)"
    texts["kNN"] = f"{100 * row['knn']:.2f}"
    texts["linear (augmented)" if args.augment else "linear"] = f"{100 * row['linear']:.2f}"
    for n in args.shots:
        score = row[f"{n}-shot"]
        texts[f"{n}-shot"] = f"{100 * score[0]:.2f} ± {100 * score[1]:.2f}" if score else "too few labels"
    if args.finetune:
        texts["fine-tuned"] = f"{100 * row['finetuned']:.2f} (lr {row['finetune_lr']:g})"
    texts["chosen"] = f"decay {row['weight_decay']:g}: {100 * row['held_out']:.2f}"
    texts["s"] = f"{row['seconds']:.0f}"
    return texts


def markdown(rows: list[dict[str, str]]) -> list[str]:
    lines = [f"| {' | '.join(texts)} |" for texts in (rows[0], *(row.values() for row in rows))]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def main(args: argparse.Namespace) -> list[dict]:
    """The table's rows: {"data", "network", "labels", "knn", "linear", ...}"""
    with user_errors():
        check(args)
        device = setup(args.device, args.deterministic, args.rank_timeout)
        backbone, facts = load_backbone(args.weights, args.arch, args.width, args.stem)
        args.image_size = args.image_size or facts.get("resized_to")
        sources = args.data or ([facts["data"]] if "data" in facts else [])
        if args.data is None and (args.embed or args.export):
            sources = []  # nothing else was requested
        elif not sources:
            raise ValueError("which images? --data shapes, a torchvision data set's name or a folder")
        folder = Path(args.output_dir or Path(args.weights).parent)
        folder.mkdir(parents=True, exist_ok=True)
        networks = {"pre-trained": backbone}
        if args.untrained:
            torch.manual_seed(args.seed)
            networks["untrained"], _ = build_backbone(facts["arch"], facts["stem"], facts["width"])
        settings = {name: value for name, value in vars(args).items() if name in measure.__kwdefaults__}
        settings["finetune_lr"] = args.finetune_lr if args.finetune else None

        if args.export and is_main():
            size = args.image_size or (32 if facts["stem"] == "small" else 224)
            export(copy.deepcopy(backbone), facts, size, Path(args.export))
        if args.embed:
            embed(backbone, facts, args.embed, args, folder, device)
        if not sources:
            return []
        text = caption(args, facts) + "\n"
        lines, table, files = [], [], []
        for source in sources:
            name = Path(source).name
            train = load_data(args, source, "train")
            test = load_data(args, source, "test") if train.labelled else None
            if test:
                fractions = [None if f == 1 else balanced_rows(train.labels, f, args.seed) for f in args.label_fraction]
                settings["labelled"] = [listed_rows(args.label_list, train)] if args.label_list else fractions
                if not lines:
                    say(text)
                for network, module in networks.items():
                    rows = measure(module, facts, train, test, device, **settings)
                    table += [{"data": name, "network": network, **row} for row in rows]
                    printed = len(lines)
                    lines = markdown([cells(args, row) for row in table])
                    say("\n".join(lines[printed:]))
            elif args.pictures:
                say(f"'{source}' has no labels to measure with: pictures alone")
            else:
                needed = "it needs train/ and test/ or val/, a folder a class"
                raise ValueError(f"'{source}' has no labels to measure with: {needed}")
            if args.pictures:
                save_pictures(networks, facts, train, test, folder, name, device)
                files += [f"neighbours-{name}.png", f"map-{name}.png"]
        if is_main() and table:
            data = "-".join(dict.fromkeys(row["data"] for row in table))
            write_atomic("\n".join([text, *lines, ""]), folder / f"linear_eval-{data}.md")
            files.append(f"linear_eval-{data}.md")
        if files:
            say(f"wrote to {folder}: {', '.join(files)}")
    return table


if __name__ == "__main__":
    launch.run(main, get_parser())
