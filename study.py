"""Trains many networks alike over seeds and measures each on many data sets: one table, its statistics, pictures.

    torchrun study.py --networks ssa --data cifar10 --method simclr --measure-on cifar10 cifar100 svhn flowers102
    torchrun study.py --networks resnet:64 --target-macs 0.25xresnet18        # 64 random ones of a space, in a band
    torchrun study.py --search runs/search --networks resnet:8 --seeds 3      # what a search found, beside chance
    torchrun study.py --networks mobilenet_v2 a.json b.json                   # any networks
    torchrun study.py --report --output-dir runs/study                        # only the table and pictures

This is the study of SSA (arXiv 2203.08130), which claims that no backbone is the best everywhere. `--networks ssa` is
its grids of ResNets and MobileNets (GRIDS), without grouped convolutions, which our architectures lack.

To share the work, start the same command again on any machine that sees the folder: each run (a network and a seed) has
a folder that one process at a time locks. When a process dies its lock is released at once, or, on a network drive, as
the server notices. Under torchrun each rank is a worker of its own, for many small trainings instead of one large one.
Networks, seeds and data sets can be added later; nothing is trained or measured twice. All networks of a seed see the
same batches and views.
"""

import launch  # ahead of torch: it says how threads wait

# isort: split

import argparse
import csv
import io
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import linear_eval
import models
import pretrain
from candidates import head_spaces, parse_target, random_heads, spreads
from checkpoint import load_arch, load_backbone, load_heads, load_json, lock, versions, write_atomic, write_json
from data import Images, load_data
from launch import Parser, say, user_errors
from models import ARCHS, BACKBONES, SPACES, Space, describe
from pictures import draw_costs, draw_matrices, draw_scores

# ---- networks -------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A network that is trained with each seed and measured."""

    family: str  # the group in the report: a grid, "handcrafted", "random resnet", ...
    arch: str | dict
    width: float = 1.0  # factor on top of --width
    heads: dict | None = None
    weights: str | None = None  # path of the weights to start from; None: random initialisation
    trained: bool = True  # False: measured with `weights` as they are

    @property
    def name(self) -> str:
        """Unique, since it names the folders of the runs."""
        text = describe(self.arch)
        if isinstance(self.arch, dict):
            base = next(arch for arch in BACKBONES.values() if arch["block"] == self.arch["block"])
            if self.arch == {**base, "depth": self.arch["depth"]}:
                text = f"{self.arch['block']} {'-'.join(map(str, self.arch['depth']))}"
            text = next((name for name, arch in BACKBONES.items() if arch == self.arch), text)
        if self.width != 1:
            text += f" x{self.width:g}"
        if self.heads:
            text += f" heads {crc(json.dumps(self.heads).encode())}"
        if self.weights:
            text += f" {'from' if self.trained else 'is'} {crc(Path(self.weights).read_bytes())}"
        return text


def crc(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def grid(base: str, *depths: tuple, widths: tuple = (1.0,), inner: tuple = (1,)) -> list[tuple[dict, float]]:
    """(architecture, width) of all variants of a handcrafted network: depths to choose from in each stage, widths,
    factors of the inner widths."""
    arch = BACKBONES[base]
    depths = depths or [(d,) for d in arch["depth"]]
    variants = []
    for depth, width, factor in product(product(*depths), widths, inner):
        variants.append(({**arch, "depth": list(depth), "inner": [factor * x for x in arch["inner"]]}, width))
    return variants


ANY = (2, 3, 4)
MOBILENET = ((1,), (2, 3), (3, 4), (4, 5))  # the depths of its first stages
# the variants in 2203.08130's code, without its ResNets of 2 to 8 groups: our blocks have no groups
GRIDS = {
    "resnet-basic": [
        *grid("resnet18", ANY, ANY, ANY, ANY),
        *grid("resnet34"),
        *grid("resnet18", (2,), (3,), (4,), (5,)),
    ],
    "resnet-bottleneck": grid("resnet50", ANY, ANY, ANY, ANY),
    "resnet-bottleneck-deep": grid("resnet50", (5, 6), (5, 6), ANY, ANY),
    "resnet-width": grid("resnet50", inner=(0.5, 1.0, 2.0, 4.0)),  # width_per_group 32 to 256
    "mobilenet-width": grid("mobilenet_v2", widths=tuple(k / 5 for k in range(5, 16))),
    "mobilenet-depth": grid("mobilenet_v2", *MOBILENET, (3, 4), (3, 4), (1,)),
    "mobilenet-deep-wide": grid("mobilenet_v2", *MOBILENET, (5, 6), (5, 6), (1,), widths=(1.2, 1.4, 1.6, 1.8)),
    "mobilenet-very-deep": grid("mobilenet_v2", *MOBILENET, (8, 10, 14, 20), (8, 10, 14, 20), (1,)),
}


def networks_of(word: str, args: argparse.Namespace, stem: str, size: int) -> list[Network]:
    """The networks that a word of --networks names. Raises ValueError or OSError."""
    name, _, number = word.partition(":")
    if number and not (number.isdigit() and int(number)):
        raise ValueError(f"--networks {word}: a number above 0 is wanted behind the colon")
    spaces = name.split("+")
    if all(space in SPACES or space == "heads" for space in spaces) and len(spaces) - ("heads" in spaces) <= 1:
        if not number:
            raise ValueError(f"--networks {word}: how many random ones? {word}:8, say")
        return random_networks(spaces, int(number), args, stem, size)
    if name == "ssa" or name in GRIDS:
        grids = GRIDS if name == "ssa" else {name: GRIDS[name]}
        return of_grids(grids, int(number) if number else None)
    if number or not (word in ARCHS or Path(word).is_file()):
        known = ", ".join(["ssa", *GRIDS, *ARCHS])
        raise ValueError(
            f"--networks {word}: neither an arch.json nor one of {known}, nor random ones as heads:8 or "
            f"{next(iter(SPACES))}:8 ({', '.join(SPACES)})"
        )
    if word in ARCHS:
        return [Network(word, word)]
    found = load_json(word)
    return [Network(Path(word).stem, load_arch(word) if "backbone" in found else args.arch, heads=heads_in(word, args))]


def of_grids(grids: dict[str, list[tuple[dict, float]]], number: int | None) -> list[Network]:
    """All networks of the grids, or `number` of them: from each grid in turn, in a random but fixed order."""
    queues = [[Network(family, *entry) for entry in entries] for family, entries in grids.items()]
    if number is None:
        return [network for queue in queues for network in queue]
    rng, chosen = random.Random(0), []
    for queue in queues:
        rng.shuffle(queue)
    while len(chosen) < number and any(queues):
        chosen += [queue.pop() for queue in queues if queue]
    return chosen[:number]


def random_networks(spaces: list[str], number: int, args: argparse.Namespace, stem: str, size: int) -> list[Network]:
    """Different random networks: backbones uniform among those that meet --target-macs, heads uniform in each layer's
    operation. A longer list begins with the shorter one."""
    generator, rng = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    space = next((SPACES[name] for name in spaces if name in SPACES), None)
    if space:
        base, table = space.costs(args.width, stem, size)
        target = parse_target(args.target_macs or space.handcrafted, args.width, stem, size)
        models.derive(table, base, table, target)  # raises where no network meets the target
    found: dict[str, Network] = {}
    for _ in range(100 * number):
        arch = space.arch(models.random_choice(base, table, target, generator)) if space else args.arch
        heads = random_heads(args, arch, rng) if "heads" in spaces else None
        network = Network("random " + "+".join(spaces), arch, heads=heads)
        found.setdefault(network.name, network)
        if len(found) == number:
            return list(found.values())
    raise ValueError(f"--networks {'+'.join(spaces)}:{number}: there are not so many different ones in the band")


def heads_in(path: str, args: argparse.Namespace) -> dict | None:
    """The heads of an arch.json; None if it has none."""
    return load_heads(path, list(head_spaces(args, args.arch))) if "heads" in load_json(path) else None


TRAINED_ON, INHERITED = ", trained on", ", inherited"  # ends of the families of networks that have a search's weights


def scaled(space: Space, found: dict) -> dict:
    """The handcrafted architecture scaled to the MACs at which the backbone of an arch.json was found."""
    base, table = space.costs(found["width"], found["stem"], found["image_size"])
    target = found.get("target_macs") or found["macs"]
    return space.arch(models.derive(models.handcrafted_scores(space), base, table, target))


def found_by(folder: str, args: argparse.Namespace) -> list[Network]:
    """What search.py has found, trained from scratch, and the handcrafted network. A found backbone also with the
    weights that the search left, trained further and as they are, and beside the handcrafted one scaled to its cost.
    Raises ValueError or OSError."""
    path, weights = str(Path(folder) / "arch.json"), str(Path(folder) / "backbone.pth")
    family = f"found ({Path(folder).name})"
    found, heads = load_json(path), heads_in(path, args)
    searched = found.get("space", [])
    space = next((SPACES[name] for name in searched if name in SPACES), None)
    if space:
        arch, width = load_arch(path), found["backbone"].get("width")
        if width != args.width:
            raise ValueError(f"--search {folder}: searched at --width {width}, not {args.width}")
        return [
            Network(family, arch, heads=heads),
            Network(family + TRAINED_ON, arch, heads=heads, weights=weights),
            Network(family + INHERITED, arch, heads=heads, weights=weights, trained=False),
            Network("handcrafted", space.handcrafted),
            Network("handcrafted, scaled", scaled(space, found["backbone"])),
        ]
    if "heads" in searched:
        own = [Network(family, args.arch, heads=heads)] if heads else []  # none: the search kept the handcrafted heads
        return [*own, Network("handcrafted", args.arch)]
    raise ValueError(
        f"--search {folder}: '{path}' has no heads or backbone that a search found (views are pretrain.py's flags)"
    )


# ---- runs -----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A network and a seed. Its folder holds what pretrain.py writes, and row.json with the run's part of the table."""

    network: Network
    seed: int
    folder: Path

    def row(self) -> dict:
        """The content of row.json; {} before the run is trained."""
        path = self.folder / "row.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def missing(self, sources: Iterable[str]) -> list[str]:
        """The `sources` that are not measured yet; none for a run that failed."""
        row = self.row()
        return [] if "error" in row else [s for s in sources if dataset(s) not in row.get("scores", {})]


def dataset(source: str) -> str:
    """Its name in the table."""
    return Path(source).name


def runs_of(networks: list[Network], seeds: int, folder: Path) -> list[Run]:
    """A run for each network and seed, or only one if it is not trained. A network that is given twice is run once."""
    unique: dict[str, Network] = {}
    for network in networks:
        unique.setdefault(network.name, network)
    runs = []
    for name, network in unique.items():
        for seed in range(seeds if network.trained else 1):
            slug = re.sub(r"[^a-z0-9.]+", "-", name.lower())
            runs.append(Run(network, seed, folder / "runs" / f"{slug}-seed{seed}"))
    return runs


def facts_of(run: Run, args: argparse.Namespace) -> dict:
    """The part of row.json that describes the run. A ViT's architecture is its name."""
    network, arch = run.network, run.network.arch
    arch = BACKBONES.get(arch, arch) if isinstance(arch, str) else arch
    facts = {"network": network.name, "family": network.family, "arch": arch, "heads": network.heads}
    return {**facts, "width": args.width * network.width, "seed": run.seed}


# figures in the last line of a run's log that may predict accuracy: (name in the report, sign that makes larger better)
PREDICTORS = {
    "loss": ("training loss", -1),
    "held_out_loss": ("held-out loss", -1),
    "infonce": ("InfoNCE of h", -1),
    "rankme": ("RankMe", 1),
    "z_std": ("std of z", 1),
    "knn": ("held-out kNN (needs labels)", 1),
}


def carry_out(run: Run, args: argparse.Namespace, study: "Study") -> None:
    """Trains the network and measures it on each data set, unless that is done. A failure is recorded in row.json."""
    path, row = run.folder / "row.json", run.row()
    if not row:
        row = train(run, args, study)
        write_json(row, path)
        if "error" not in row:
            (run.folder / "checkpoint.pth").unlink(missing_ok=True)  # most of the folder, and no longer needed
    weights = run.folder / "backbone.pth" if run.network.trained else run.network.weights
    for source in run.missing(study.measured):
        backbone, facts = load_backbone(str(weights))
        begun = time.time()
        how = {"knn_k": args.knn_k, "knn_t": args.knn_t, "compiled": args.compile}
        try:
            scores = linear_eval.measure(backbone, facts, *study.measured[source], study.device, **how)[0]
        except RuntimeError as error:
            write_json({**row, "error": f"measured on {source}: {error}"}, path)
            return
        row["scores"][dataset(source)] = {name: scores[name] for name in ("knn", "linear")}
        row["seconds"][dataset(source)] = time.time() - begun
        write_json(row, path)


def train(run: Run, args: argparse.Namespace, study: "Study") -> dict:
    """The row of a trained run, or of one that failed, which has an "error" in it."""
    network, row, last = run.network, facts_of(run, args), {}
    try:
        row["macs"], row["parameters"] = models.size_of(row["arch"], row["width"], study.stem, study.size)
        if network.trained:
            flags = {"width": row["width"], "weights": network.weights, "seed": run.seed}
            last = pretrain.run_in(run.folder, args, study.images, network.arch, network.heads, **flags)
    except ValueError as error:
        last = {"error": str(error)}
    if "error" in last:
        return {**row, "error": last["error"]}
    log = run.folder / "log.txt"
    lines = log.read_text().splitlines()[1:] if network.trained else []
    row |= {name: last[name] for name in PREDICTORS if name in last}
    row |= {"scores": {}, "seconds": {"train": sum(json.loads(line)["seconds"] for line in lines)}}
    return {**row, "versions": versions()}


# ---- workers --------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """What all runs share."""

    images: Images  # to train on
    measured: dict[str, list[Images]]  # by source: [training images, test images]
    stem: str
    size: int
    device: torch.device


POLL = 10  # seconds after which a worker that found all runs locked looks again


def work(runs: list[Run], args: argparse.Namespace, study: Study) -> None:
    """A worker's loop: carries out runs that no other worker has locked, until all are done."""
    begun, before = time.time(), len(unfinished(runs, study))
    while pending := unfinished(runs, study):
        idle = True
        for run in pending:
            run.folder.mkdir(parents=True, exist_ok=True)
            claim = lock(run.folder / ".claim")
            if claim is None:
                continue
            with os.fdopen(claim):  # held until the block ends
                if run.missing(study.measured):  # another may have done it meanwhile
                    idle = False
                    carry_out(run, args, study)
                    progress(run, runs, study, begun, before)
        if idle:
            time.sleep(POLL)


def unfinished(runs: list[Run], study: Study) -> list[Run]:
    return [run for run in runs if run.missing(study.measured)]


def progress(run: Run, runs: list[Run], study: Study, begun: float, before: int) -> None:
    """Prints a run's accuracies and the time that is left at the rate of all workers. before: runs that were unfinished
    when this worker began."""
    row, left = run.row(), len(unfinished(runs, study))
    seconds_left = (time.time() - begun) / max(1, before - left) * left
    line = f"{len(runs) - left} of {len(runs)}: {run.network.name}, seed {run.seed}"
    if "error" in row:
        line += f": broken: {row['error']}"
    else:
        seconds = dict(row["seconds"])
        linear = "  ".join(f"{name} {100 * score['linear']:.1f}" for name, score in row["scores"].items())
        line += f", {seconds.pop('train'):.0f} s to train, {sum(seconds.values()):.0f} to measure: {linear}"
    say(f"{line}; {timedelta(seconds=round(seconds_left))} left")


# ---- the table ------------------------------------------------------------------------------------------------------


def write_table(folder: Path) -> Path:
    """Writes study.csv, one line for each run: facts, PREDICTORS, and accuracies in % as '<data set> knn' and '<data
    set> linear'. Without runs, the study.csv that is there stays."""
    path = folder / "study.csv"
    rows = [json.loads(file.read_text()) for file in sorted((folder / "runs").glob("*/row.json"))]
    if not rows and path.exists():
        return path
    if not rows:
        raise FileNotFoundError(f"there is nothing to report in '{folder}'")
    facts = ("network", "family", "arch", "width", "heads", "parameters", "macs", "seed", *PREDICTORS, "error")
    sets = sorted({name for row in rows for name in row.get("scores", {})})
    lines = []
    for row in sorted(rows, key=lambda row: (row["family"], row["network"], row["seed"])):
        seconds = dict(row.get("seconds", {}))
        line = {name: row.get(name) for name in facts}
        line["arch"], line["heads"] = json.dumps(row["arch"]), json.dumps(row["heads"])
        line["train s"], line["measure s"] = seconds.pop("train", None), sum(seconds.values())
        line["torch"] = row.get("versions", {}).get("torch")
        for name, measure in product(sets, ("knn", "linear")):
            score = row.get("scores", {}).get(name, {}).get(measure)
            line[f"{name} {measure}"] = None if score is None else round(100 * score, 4)
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(text.getvalue(), path)
    return path


def read_table(path: str | Path) -> list[dict]:
    """The lines of a study.csv: numbers as such, architectures as plain data, None where there is nothing."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        for name, text in line.items():
            if name in ("arch", "heads"):
                line[name] = json.loads(text)
            elif name not in ("network", "family", "error", "torch"):
                line[name] = float(text) if text else None
    return lines


def lookup(path: str | Path) -> dict[str, dict[str, tuple[float, float, int]]]:
    """A study.csv as a tabular benchmark, to try a search strategy on in seconds: {key(arch, width): {column: (mean,
    standard deviation over seeds, seeds)}}, with arch and width as in the table, for all columns of numbers. Runs with
    other heads than the handcrafted or from a search's weights are left out."""
    others = (TRAINED_ON, INHERITED)
    lines = [line for line in read_table(path) if line["heads"] is None and not line["family"].endswith(others)]
    table = {}
    for name, runs in grouped(lines, lambda line: key(line["arch"], line["width"])).items():
        table[name] = {}
        for column in runs[0]:
            x = [run[column] for run in runs if isinstance(run[column], float)]
            if x and column != "seed":
                table[name][column] = np.mean(x), np.std(x, ddof=1) if len(x) > 1 else math.nan, len(x)
    return table


def key(arch: str | dict, width: float) -> str:
    return json.dumps([arch, width])


def grouped(lines: list[dict], name_of: Callable[[dict], str]) -> dict[str, list[dict]]:
    """{name_of(line): lines}, in their order."""
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(name_of(line), []).append(line)
    return groups


def accuracies(lines: list[dict], scenarios: list[str]) -> np.ndarray:
    """Of linear probes, in %: (lines, scenarios), nan where one is not measured yet."""
    return np.array([[line[f"{scenario} linear"] for scenario in scenarios] for line in lines], float)


# ---- statistics: x, y (n,), float64, n > 4 --------------------------------------------------------------------------

Z = 1.959964  # half a normal distribution's 95 % interval, in standard deviations


def ranks_of(x: np.ndarray) -> np.ndarray:
    """1 for the least; ties share their mean rank."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[where]


def interval(r: float, variance: float) -> tuple[float, float, float]:
    """(r, low, high): a correlation and its 95 % interval; variance: of atanh(r)."""
    half = Z * math.sqrt(variance)
    centre = math.atanh(min(max(r, -0.999999), 0.999999))
    return r, min(r, math.tanh(centre - half)), max(r, math.tanh(centre + half))


def pearson(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """With Fisher's interval; nan where one of them is constant."""
    r = np.corrcoef(x, y)[0, 1] if np.ptp(x) > 0 and np.ptp(y) > 0 else math.nan
    return interval(r, 1 / (len(x) - 3))


def spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """With Bonett and Wright's interval (Psychometrika 65, 2000)."""
    r, *_ = pearson(ranks_of(x), ranks_of(y))
    return interval(r, (1 + r**2 / 2) / (len(x) - 3))


def kendall(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """tau-b with Fieller's interval (Biometrika 44, 1957)."""
    a, b = (np.sign(v[:, None] - v) for v in (x, y))
    pairs = math.sqrt((a * a).sum() * (b * b).sum())
    return interval((a * b).sum() / pairs if pairs else math.nan, 0.437 / (len(x) - 4))


def improvement(found: np.ndarray, random: np.ndarray) -> tuple[float, float, float]:
    """Relative improvement in % of a network's accuracies (S,) over the mean of K random networks' (K, S), with a 95 %
    interval over seeds and random networks; variance: within^2 / S + between^2 / K + within^2 / (K S).

    Both must have the same seeds, since the interval leaves out the variation that all networks of a seed share."""
    between, within = spreads(random)
    networks, seeds = random.shape
    variance = within**2 / len(found) + between**2 / networks + within**2 / (networks * seeds)
    ri, half = 100 * (found.mean() / random.mean() - 1), 100 * Z * math.sqrt(variance) / random.mean()
    return ri, ri - half, ri + half


def regrets(y: np.ndarray, samples: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(regret (D, D), its standard error (D, D), regret of a random choice (D,)) of accuracies (K networks, S seeds, D
    scenarios). regret[a, b]: points lost on scenario b by choosing the network on a instead of on b.

    A network is chosen by the mean over all seeds but one and scored by the seed left out, in turn, since the best of
    many noisy scores is not as good as it looks. The standard error is the deviation over samples of K networks and S
    seeds from normal distributions with the covariances observed. (A bootstrap over networks gives 70 % of it: most
    resamples have the same best network.)
    """
    networks, seeds, scenarios = y.shape

    def choose(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(regret (D, D), accuracy (D,) of the network chosen by a scenario itself)"""
        regret, own = 0, 0
        for out in range(seeds):
            chosen = np.delete(y, out, 1).mean(1).argmax(0)  # (D,)
            scores = y[chosen, out]  # (D that chose, D)
            regret = regret + scores.diagonal() - scores
            own = own + scores.diagonal()
        return regret / seeds, own / seeds

    def root(covariance: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(covariance)
        return (vectors * values.clip(0) ** 0.5).T

    means = y.mean(1)  # (K, D)
    residual = (y - means[:, None] - y.mean(0) + means.mean(0)).reshape(-1, scenarios)
    within = residual.T @ residual / ((networks - 1) * (seeds - 1))
    between = np.cov(means.T).reshape(scenarios, scenarios) - within / seeds
    of_networks, of_runs = root(between), root(within)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        true = rng.normal(size=(networks, 1, scenarios)) @ of_networks
        drawn.append(choose(true + rng.normal(size=y.shape) @ of_runs)[0])
    regret, own = choose(y)
    return regret, np.std(drawn, 0), own - y.mean((0, 1))


def effects(columns: dict[str, np.ndarray], y: np.ndarray) -> dict[str, tuple[float, float]]:
    """(points a step, standard error) of each choice: least squares of accuracy y (K,) on all choices that vary. A step
    is the mean distance between neighbouring values of a choice."""
    together: dict[tuple, list[str]] = {}  # by rank: choices that always change together are one
    for name, x in columns.items():
        if np.ptp(x) > 0:
            together.setdefault(tuple(np.unique(x, return_inverse=True)[1]), []).append(name)
    columns = {", ".join(names): columns[names[0]] for names in together.values()}
    steps = {name: np.diff(np.unique(x)).mean() for name, x in columns.items()}
    x = np.stack([np.ones(len(y)), *(v / steps[name] for name, v in columns.items())], 1)
    fit, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    free = len(y) - x.shape[1]
    if rank < x.shape[1] or free < 1:
        return {}
    error = np.sqrt(((y - x @ fit) ** 2).sum() / free * np.diag(np.linalg.inv(x.T @ x)))
    return dict(zip(columns, zip(fit[1:], error[1:])))


# ---- the report -----------------------------------------------------------------------------------------------------


class Population(NamedTuple):
    """K networks that are compared with each other: ResNets, MobileNets, the random ones of a space."""

    runs: list[list[dict]]  # the lines of each network, one for each of S seeds
    accuracy: np.ndarray  # (K, S, D scenarios), in %

    @property
    def means(self) -> np.ndarray:  # (K, D), over seeds
        return self.accuracy.mean(1)

    @property
    def overall(self) -> np.ndarray:  # (K,): the mean over scenarios
        return self.means.mean(1)

    @property
    def ranks(self) -> np.ndarray:  # (K, D), 1 the best
        return np.stack([ranks_of(-column) for column in self.means.T], 1)

    @property
    def names(self) -> list[str]:
        return [runs[0]["network"] for runs in self.runs]

    def facts(self, name: str) -> np.ndarray:
        """A column of the table: (K,), means over seeds, nan where it is missing."""
        return np.array([[run.get(name) for run in runs] for runs in self.runs], float).mean(1)

    def choices(self) -> dict[str, np.ndarray]:
        """What each network has chosen, numbers (K,) by name."""
        archs = [runs[0]["arch"] for runs in self.runs]
        if any(isinstance(arch, str) for arch in archs):  # a ViT
            return {}
        blocks = [arch["block"] for arch in archs]
        columns = {f"{block} blocks": np.array([b == block for b in blocks], float) for block in sorted({*blocks})[1:]}
        columns["width"] = self.facts("width")
        for field in models.FIELDS:
            for stage, values in enumerate(zip(*(arch[field] for arch in archs))):
                columns[f"{field} of stage {stage + 1}"] = np.array(values, float)
        return columns


def populations(table: list[dict], scenarios: list[str]) -> dict[str, Population]:
    """By name, of the networks that are measured on all scenarios with all seeds; those of fewer than eight are left
    out."""
    found = {}
    for name, lines in grouped(table, population_of).items():
        networks = grouped(lines, itemgetter("network")).values()
        seeds = max(map(len, networks))
        whole = [runs for runs in networks if len(runs) == seeds and not np.isnan(accuracies(runs, scenarios)).any()]
        if len(whole) >= 8 and seeds > 1:
            found[name] = Population(whole, np.stack([accuracies(runs, scenarios) for runs in whole]))
    return found


def population_of(line: dict) -> str:
    if line["family"].startswith(("random", "found", "handcrafted")):
        return line["family"]
    block = line["arch"] if isinstance(line["arch"], str) else line["arch"]["block"]
    return {"basic": "ResNets", "bottleneck": "ResNets", "inverted": "MobileNets"}.get(block, block)


def rounded(figure: tuple[float, float, float], digits: int = 2) -> str:
    """A figure with its 95 % interval."""
    value, low, high = figure
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def markdown(rows: list[dict[str, str]]) -> str:
    return "\n".join(linear_eval.markdown(rows)) if rows else ""


def scenario_table(p: Population, scenarios: list[str], regret: np.ndarray, error: np.ndarray) -> str:
    """A line for each scenario, which is compared with the first."""
    rows = []
    for d, scenario in enumerate(scenarios):
        best = p.means[:, d].argmax()
        between, within = spreads(p.accuracy[:, :, d])
        row = {"scenario": scenario, "mean": f"{p.means[:, d].mean():.1f}"}
        row["best network"] = f"{p.names[best]}: {p.means[best, d]:.1f}"
        row["deviation between networks, residual"] = f"{between:.2f}, {within:.2f}"
        row[f"Pearson with {scenarios[0]}"] = rounded(pearson(p.means[:, 0], p.means[:, d])) if d else ""
        row["Spearman"] = rounded(spearman(p.means[:, 0], p.means[:, d])) if d else ""
        row[f"choosing by {scenarios[0]} costs"] = f"{regret[0, d]:+.2f} ± {error[0, d]:.2f}" if d else ""
        rows.append(row)
    return markdown(rows)


def in_short(p: Population, scenarios: list[str], regret: np.ndarray, drawn: np.ndarray) -> str:
    """Whether one network is the best everywhere, and what a wrong choice costs."""
    ranks, bests = p.ranks.mean(1), p.means.argmax(0)
    first = ranks.argmin()
    residual = np.array([spreads(p.accuracy[:, :, d])[1] for d in range(len(scenarios))])
    equal = (p.means.max(0) - p.means[first] < Z * residual * math.sqrt(2 / p.accuracy.shape[1])).sum()
    text = (
        f"{len(set(bests))} networks are the best on one or more of {len(scenarios)} scenarios. The one of the best "
        f"mean rank, {p.names[first]} (rank {ranks[first]:.1f} of {len(p.names)}), is within noise of the best on "
        f"{equal} of them."
    )
    if len(scenarios) > 1:
        text += (
            f" On the other scenarios, choosing a network by {scenarios[0]} costs {regret[0, 1:].mean():.2f} points "
            f"compared with choosing by the scenario itself; drawing one at random costs {drawn[1:].mean():.2f}. "
            "(Chosen by all seeds but one, scored by that one. A noisy scenario chooses badly for itself, so a cost "
            "can be negative.)"
        )
    return text


def predictors(p: Population) -> dict[str, np.ndarray]:
    """What may predict accuracy, {name: (K,)}, larger being better. Left out is what is the same for all networks, or
    unknown (nan) for some."""
    values = {name: sign * p.facts(column) for column, (name, sign) in PREDICTORS.items()}
    values["parameters"], values["MACs"] = p.facts("parameters"), p.facts("macs")
    if choices := p.choices():
        values["blocks"] = sum(x for name, x in choices.items() if name.startswith("depth"))
    return {name: x for name, x in values.items() if np.ptp(x) > 0}


def predictor_table(groups: dict[str, Population], scenarios: list[str]) -> str:
    rows: dict[str, dict[str, str]] = {}
    for group, p in groups.items():
        for name, x in predictors(p).items():
            row = rows.setdefault(name, {"predictor": name})
            row[f"{group}: mean of all"] = rounded(kendall(x, p.overall))
            row[f"{group}: {scenarios[0]}"] = rounded(kendall(x, p.means[:, 0]))
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    return markdown([{c: row.get(c, "") for c in columns} for row in rows.values()])


def choice_table(p: Population, scenarios: list[str]) -> str:
    """The effect of each choice on accuracy."""
    on_all, on_first = effects(p.choices(), p.overall), effects(p.choices(), p.means[:, 0])
    rows = []
    for name, (points, error) in on_all.items():
        row = {"choice": name, "mean of all, points a step": f"{points:+.2f} ± {error:.2f}"}
        row[scenarios[0]] = "{:+.2f} ± {:.2f}".format(*on_first[name])
        rows.append(row)
    return markdown(rows)


def network_table(table: list[dict], scenarios: list[str]) -> str:
    """Each network's mean accuracy over its seeds."""
    rows = []
    for name, runs in grouped(table, itemgetter("network")).items():
        row = {"network": name, "runs": str(len(runs))}
        for scenario, y in zip(scenarios, accuracies(runs, scenarios).T):
            y = y[~np.isnan(y)]
            row[scenario] = f"{y.mean():.2f}" if len(y) else ""
        rows.append(row)
    return markdown(rows)


def found_table(table: list[dict], scenarios: list[str]) -> tuple[str, dict]:
    """(table, {scenario: {family: accuracies}}) of networks outside the paper's grids, as those that searches found:
    mean, deviation over runs, relative improvement over the mean of random networks, if there are any."""
    families = {}
    for name, lines in grouped([line for line in table if line["family"] not in GRIDS], itemgetter("family")).items():
        networks = grouped(lines, itemgetter("network"))
        if name.startswith("random") or len(networks) == 1:
            families[name] = lines
        else:  # files or searches of one name
            families |= {f"{name}: {network}": runs for network, runs in networks.items()}
    for name, lines in list(families.items()):
        if name.startswith("random") and all(line["held_out_loss"] is not None for line in lines):
            networks = grouped(lines, itemgetter("network")).values()
            chosen = min(networks, key=lambda runs: np.mean([run["held_out_loss"] for run in runs]))
            families[f"the one of {name} with the least held-out loss"] = chosen
    names = sorted(families, key=lambda name: (name.startswith("random"), not name.startswith("found")))
    columns = {f"{name} ({len(families[name])} runs)": families[name] for name in names}
    rows = [{"": "MMACs"}]
    for name, lines in columns.items():
        rows[0][name] = f"{np.mean([line['macs'] or math.nan for line in lines]) / 1e6:.3g}"
    dots = {}
    for scenario in scenarios:
        row = {"": scenario}
        random = random_accuracies(families, scenario)
        for name, lines in columns.items():
            measured = [line for line in lines if line[f"{scenario} linear"] is not None]
            row[name] = ""
            if not measured:
                continue
            y = accuracies(measured, [scenario])[:, 0]
            dots.setdefault(scenario, {})[name] = y.tolist()
            row[name] = f"{y.mean():.2f}" + (f" ± {y.std(ddof=1):.2f}" if len(y) > 1 else "")
            if random is None or name.startswith("random"):
                continue
            shared = [line["seed"] < random.shape[1] for line in measured]  # seeds are 0, 1, ...
            if sum(shared) == random.shape[1]:
                row[name] += f"; {rounded(improvement(y[shared], random), 1)} %"
        rows.append(row)
    return markdown(rows) if columns else "", dots


def random_accuracies(families: dict[str, list[dict]], scenario: str) -> np.ndarray | None:
    """(K networks, S seeds) of the random networks; None where they are of several families, or are too few."""
    randoms = [lines for name, lines in families.items() if name.startswith("random")]
    if len(randoms) != 1:
        return None
    measured = [line for line in randoms[0] if line[f"{scenario} linear"] is not None]
    networks = grouped(measured, itemgetter("network")).values()
    seeds = max(map(len, networks), default=0)
    whole = [accuracies(runs, [scenario])[:, 0] for runs in networks if len(runs) == seeds]
    return np.stack(whole) if len(whole) > 1 and seeds > 1 else None


def report(folder: Path) -> None:
    """Writes study.md and its pictures, of the accuracies of linear probes, from study.csv."""
    table = read_table(write_table(folder))
    facts = load_json(str(folder / "study.json")) if (folder / "study.json").exists() else {}
    scenarios = [name.removesuffix(" linear") for name in table[0] if name.endswith(" linear")]
    if not scenarios:
        raise ValueError(f"nothing in '{folder}' is measured yet")
    scenarios.sort(key=lambda name: name != dataset(facts.get("--data", "")))  # what all are trained on is the first
    broken = [line for line in table if line["error"]]
    finished = [line for line in table if not line["error"]]
    groups = populations(finished, scenarios)
    said = ("--data", "--method", "--epochs", "--max-images", "--image-size", "--width", "--batch-size", "--lr")
    setting = " ".join(f"{flag} {facts[flag]}" for flag in said if facts.get(flag) is not None)
    paragraphs = [
        "# One network, everywhere?",
        f"{len({line['network'] for line in table})} networks, {len(table)} runs (`{setting}`), {len(scenarios)} data "
        "sets; linear accuracy on test images in %, means over seeds. In brackets 95 % intervals, after ± standard "
        "errors. All of this holds for runs of this length: networks that learn fast need not be the best in the end.",
    ]
    if broken:
        said = (f"{line['network']} seed {line['seed']:.0f}: {line['error']}" for line in broken)
        paragraphs.append("Broken: " + "; ".join(said))
    for group, p in groups.items():
        paragraphs.append(f"## {group}: {len(p.names)}, {p.accuracy.shape[1]} seeds")
        regret, error, drawn = regrets(p.accuracy)
        paragraphs += [in_short(p, scenarios, regret, drawn), scenario_table(p, scenarios, regret, error)]
        if choices := choice_table(p, scenarios):
            paragraphs += ["What a choice does, one step of it, all else equal:", choices]
    if groups:
        paragraphs.append("## Which network is good, and can one know?")
        paragraphs.append("Kendall's tau with the accuracy: 0 by chance, 1 where the order is the same.")
        paragraphs.append(predictor_table(groups, scenarios))
    else:
        needed = "Ranks, correlations and what choices do need eight networks of a family, with two seeds each."
        paragraphs += [needed, network_table(finished, scenarios)]
    found, dots = found_table(finished, scenarios)
    if found:
        paragraphs.append("## Found and random networks")
        paragraphs.append("After the semicolon: relative improvement over the random networks' mean, 95 % interval.")
        paragraphs.append(found)
        write_atomic(draw_scores(dots, "linear accuracy: each run, and the mean"), folder / "study-found.svg")
    for name, picture in pictures_of(groups, scenarios).items():
        write_atomic(picture, folder / f"study-{name}.svg")
        paragraphs.append(f"![{name}](study-{name}.svg)")
    write_atomic("\n\n".join(filter(None, paragraphs)) + "\n", folder / "study.md")
    for group, p in groups.items():
        between, within = spreads(p.accuracy[:, :, 0])
        ratio = between / max(within, 1e-9)
        said = f"networks differ by {between:.2f} points, seeds by {within:.2f}, ratio {ratio:.2f}"
        say(f"{group}, {scenarios[0]}: {said}" + (": hardly anything for a search to find" if ratio < 0.5 else ""))
    say(f"wrote {folder / 'study.md'}, study.csv and pictures: {len(table)} runs")


def pictures_of(groups: dict[str, Population], scenarios: list[str]) -> dict[str, str]:
    """SVG by name: correlations between scenarios, accuracy against cost, and ranks over scenarios."""
    if not groups:
        return {}
    correlations, costs, ranks = {}, {}, {}
    for group, p in groups.items():
        r = [[spearman(a, b)[0] for b in p.means.T] for a in p.means.T]
        correlations[f"{group} ({len(p.names)})"] = (scenarios, scenarios, r)
        if not np.isnan(p.facts("macs")).any():  # a ViT's are not counted
            costs[group] = [(x / 1e6, y) for x, y in zip(p.facts("macs"), p.overall)]
        order = p.ranks.mean(1).argsort(kind="stable")
        shown = sorted({*order[:3], *p.means.argmax(0), order[-1]}, key=list(order).index)
        names = [p.names[k] for k in shown]
        ranks[f"{group} ({len(p.names)})"] = (names, scenarios, p.ranks[shown].tolist())
    title = "Do scenarios agree? Spearman's correlation"
    pictures = {"correlations": draw_matrices(correlations, title, (-1, 1), 2)}
    if costs:
        title = "Accuracy against cost: means over scenarios and seeds, and the Pareto front"
        pictures["costs"] = draw_costs(costs, title)
    title = "The rank of the best and of the worst networks in each scenario"
    pictures["ranks"] = draw_matrices(ranks, title, None, 0)
    return pictures


# ---- the script -----------------------------------------------------------------------------------------------------


def get_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    pretrain.training_flags(parser)
    group = parser.add_argument_group("study (--seed draws the random networks; runs have seeds 0, 1, ...)")
    text = f"ssa, {', '.join(GRIDS)}, all or :K of them; names; arch.json files; heads:K or resnet:K, random ones"
    group.add_argument("--networks", nargs="+", default=[], help=text)
    group.add_argument("--search", nargs="+", default=[], metavar="FOLDER", help="of search.py: what it found")
    group.add_argument("--seeds", type=int, default=2, help="runs of each network")
    group.add_argument("--target-macs", help="of random backbones: 40e6 or 0.5xresnet18; left out, the handcrafted's")
    group.add_argument("--measure-on", nargs="+", help="data sets with labels; left out, --data")
    group.add_argument("--report", action="store_true", help="only the table and pictures of what is there")
    parser.add_argument("--output-dir", default="runs/study")
    return parser


# flags that may differ between calls: they choose what is run, not how it is trained
FREE_FLAGS = pretrain.FREE_FLAGS | {"networks", "search", "seeds", "seed", "target_macs", "measure_on", "report"}


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[list[Run], Study]:
    """Loads the data and checks all flags before the first run. Raises ValueError or OSError."""
    if not args.networks and not args.search:
        raise ValueError("which networks? --networks ssa, resnet:8, a name or an arch.json, or --search FOLDER")
    if args.seeds <= 0:
        raise ValueError(f"--seeds {args.seeds}: must be above 0")
    if args.bench or args.profile:
        raise ValueError("--bench and --profile are for one run: give them to pretrain.py")
    folder, sources = Path(args.output_dir), args.measure_on or [args.data]
    if len({dataset(source) for source in sources}) < len(sources):
        raise ValueError(f"--measure-on {' '.join(sources)}: two of them have one name")
    args.arch = load_arch(args.arch)
    with os.fdopen(lock(folder / ".lock", wait=True)):  # one worker at a time downloads and decodes; the next finds it
        images = pretrain.load_training_images(args, device, None)
    pretrain.split(images, args)
    stem, size = pretrain.stem_of(args, images), images.pixels.shape[-1]
    networks = [network for word in args.networks for network in networks_of(word, args, stem, size)]
    found = [network for path in args.search for network in found_by(path, args)]
    for name in sorted({network.name for network in networks} & {network.name for network in found}):
        say(f"{name} is a result of --search and among --networks too: the report lists it under the latter")
    networks += found
    measured = {}
    for source in sources:
        with os.fdopen(lock(folder / ".lock", wait=True)):
            measured[source] = [load_data(args, source, split) for split in ("train", "test")]
        if not measured[source][0].labelled:
            raise ValueError(f"--measure-on {source}: there are no labels to measure with")
    with os.fdopen(lock(folder / ".lock", wait=True)):
        heads = None if args.heads == "default" else load_heads(args.heads, list(head_spaces(args, args.arch)))
        facts = pretrain.facts_of(Path(__file__).name, args, args.arch, heads, images, FREE_FLAGS)
        facts = {what: fact for what, fact in json.loads(json.dumps(facts)).items() if fact is not None}
        path = folder / "study.json"
        known = load_json(str(path)) if path.exists() else facts
        for what in sorted({*known, *facts}):
            if known.get(what) != facts.get(what):
                has = f"{what} {known.get(what)}, not {facts.get(what)}"
                raise ValueError(f"'{path}' says that this study has {has}: choose another --output-dir")
        write_json(facts, path)
    return runs_of(networks, args.seeds, folder), Study(images, measured, stem, size, device)


def main(args: argparse.Namespace) -> None:
    for name in ("RANK", "WORLD_SIZE"):  # each of torchrun's ranks is a worker of its own, on the GPU of LOCAL_RANK
        os.environ.pop(name, None)
    folder = Path(args.output_dir)
    try:
        with user_errors():
            if not args.report:
                pretrain.check(args)
                device = launch.setup(args.device, args.deterministic, args.rank_timeout)
                args.knn_every = args.epochs  # the monitor runs once, at the end
                runs, study = prepare(args, device)
                say(f"{len(runs)} runs, {len(study.measured)} data sets to measure on: {folder}")
                work(runs, args, study)
            if not folder.is_dir():
                raise FileNotFoundError(f"there is nothing to report in '{folder}'")
            with os.fdopen(lock(folder / ".lock", wait=True)):  # several workers end at once
                report(folder)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    launch.run(main, get_parser())
