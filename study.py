"""Trains many networks alike over seeds and measures each on many data sets: one table, which report.py sums up.

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
import json
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Iterable
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

import linear_eval
import models
import pretrain
from candidates import head_spaces, parse_target, random_heads
from checkpoint import load_arch, load_backbone, load_heads, load_json, lock, versions, write_json
from data import Images, load_data
from launch import Parser, say, user_errors
from models import ARCHS, BACKBONES, SPACES, Space, describe
from report import INHERITED, PREDICTORS, TRAINED_ON, dataset, write_report
from report import key as key  # study.lookup(path)[study.key(arch, width)]
from report import lookup as lookup

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
                write_report(folder, GRIDS)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    launch.run(main, get_parser())
