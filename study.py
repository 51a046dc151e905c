"""Trains many networks alike, over seeds, and measures each on many data sets: one table, its statistics, pictures.

    torchrun study.py --networks ssa --data cifar10 --method simclr --measure-on cifar10 cifar100 svhn flowers102
    torchrun study.py --networks resnet:64 --target-macs 0.25xresnet18        # 64 random ones of a space, in a band
    torchrun study.py --search runs/search --networks resnet:8 --seeds 3      # what a search found, beside chance
    torchrun study.py --networks mobilenet_v2 a.json b.json                   # any
    torchrun study.py --report --output-dir runs/study                        # table and pictures from what is there

The study of SSA (arXiv 2203.08130), which says that no backbone is the best everywhere; `--networks ssa` are its grids
of ResNets and MobileNets (GRIDS), but for those of grouped convolutions, which our architectures have not.

The same command started again, on any machine that sees the folder, shares the work: a run (a network and a seed) is a
folder that one process at a time has the lock of, and a process that dies loses it at once, or on a network drive when
its server notices. Under torchrun each rank is such a worker: many small trainings, not one large one. More networks,
seeds or data sets may be asked for later, and what is there is neither trained nor measured twice. All networks of a
seed see the same batches and views.
"""

import launch  # ahead of torch: it says how threads wait

# isort: split

import argparse
import contextlib
import json
import os
import random
import re
import sys
import time
import zlib
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

import linear_eval
import models
import pretrain
from checkpoint import load_arch, load_backbone, load_heads, load_json, lock, versions, write_atomic
from data import Images, load_data
from launch import Parser, say, user_errors
from losses import METHODS
from models import ARCHS, BACKBONES, SPACES, build_backbone, describe, random_head
from search import parse_target

# ---- networks -------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """What is trained with each seed."""

    family: str  # that it is compared within
    arch: str | dict
    width: float = 1.0  # times --width
    heads: dict | None = None
    weights: str | None = None  # that it starts from
    trained: bool = True  # False: measured with these weights as they are

    @property
    def name(self) -> str:
        """Says all that the network is, so that no two share a folder."""
        handcrafted = [name for name, arch in BACKBONES.items() if arch == self.arch]
        text = describe(self.arch)
        if handcrafted:
            text = handcrafted[0]
        elif isinstance(self.arch, dict):
            base = next(arch for arch in BACKBONES.values() if arch["block"] == self.arch["block"])
            if self.arch == {**base, "depth": self.arch["depth"]}:
                text = f"{self.arch['block']} {'-'.join(map(str, self.arch['depth']))}"
        text += f" x{self.width:g}" * (self.width != 1)
        if self.heads:
            text += f" heads {crc(json.dumps(self.heads).encode())}"
        if self.weights:
            text += f" {'from' if self.trained else 'is'} {crc(Path(self.weights).read_bytes())}"
        return text


def crc(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def grid(base: str, *depths: tuple, widths: tuple = (1.0,), inner: tuple = (1,)) -> list[tuple[dict, float]]:
    """(architecture, width) of a handcrafted network with all combinations of depths (of each stage), widths and
    factors of the inner widths."""
    depths = depths or [(d,) for d in BACKBONES[base]["depth"]]
    grid = []
    for depth, width, factor in product(product(*depths), widths, inner):
        values = [factor * x for x in BACKBONES[base]["inner"]]
        grid.append(({**BACKBONES[base], "depth": list(depth), "inner": values}, width))
    return grid


ANY = (2, 3, 4)
MOBILENET = ((1,), (2, 3), (3, 4), (4, 5))  # the depths of its first stages
# 2203.08130's variants, as its code has them. Its ResNets of 2 to 8 groups are not there: our blocks have no groups.
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
    """What a word of --networks names. Raises ValueError or OSError."""
    name, _, number = word.partition(":")
    if number and not (number.isdigit() and int(number)):
        raise ValueError(f"--networks {word}: a number above 0 is wanted behind the colon")
    spaces = name.split("+")
    if all(space in SPACES or space == "heads" for space in spaces) and len(spaces) - ("heads" in spaces) <= 1:
        if not number:
            raise ValueError(f"--networks {word}: how many random ones? {word}:8, say")
        return random_networks(spaces, int(number), args, stem, size)
    grids = GRIDS if name == "ssa" else {name: GRIDS[name]} if name in GRIDS else None
    if grids:
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
    """All of them, or so many, in turn from each grid, those of a grid in an order that is always the same."""
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
    """Drawn evenly: backbones from those of --target-macs, the operations of heads by name. A longer list begins with
    the shorter one."""
    generator, rng = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    space = next((SPACES[name] for name in spaces if name in SPACES), None)
    if space:
        base, table = space.costs(args.width, stem, size)
        target = parse_target(args.target_macs or space.handcrafted, args.width, stem, size)
        models.derive(table, base, table, target)  # raises where no network meets the target
    found: dict[str, Network] = {}
    for _ in range(100 * number):
        arch = space.arch(models.random_choice(base, table, target, generator)) if space else args.arch
        heads = None
        if "heads" in spaces:
            dims = head_spaces(args, arch)
            heads = {name: random_head(head.layers, rng) for name, head in dims.items()}
        network = Network("random " + "+".join(spaces), arch, heads=heads)
        found.setdefault(network.name, network)
        if len(found) == number:
            return list(found.values())
    raise ValueError(f"--networks {'+'.join(spaces)}:{number}: there are not so many different ones in the band")


def head_spaces(args: argparse.Namespace, arch: str | dict) -> dict:
    with torch.device("meta"):
        feature_dim = build_backbone(arch, width=args.width)[1]
    spaces = METHODS[args.method].heads(feature_dim, args.out_dim)
    if not spaces:
        raise ValueError(f"--method {args.method} has no heads to choose")
    return spaces


def heads_in(path: str, args: argparse.Namespace) -> dict | None:
    """Of an arch.json, if there are any."""
    return load_heads(path, list(head_spaces(args, args.arch))) if "heads" in load_json(path) else None


def found_by(folder: str, args: argparse.Namespace) -> list[Network]:
    """What search.py has found: trained from scratch; of a backbone also with the weights that it inherits, and trained
    on from them; and the handcrafted network. Raises ValueError or OSError."""
    path, weights = Path(folder) / "arch.json", Path(folder) / "backbone.pth"
    found = load_json(str(path))
    heads = heads_in(str(path), args)
    backbone = next((SPACES[name] for name in found.get("space", []) if name in SPACES), None)
    if not backbone and not heads:
        raise ValueError(f"--search {folder}: '{path}' is not what search.py writes")
    family = f"found ({Path(folder).name})"
    if not backbone:
        return [Network(family, args.arch, heads=heads), Network("handcrafted", args.arch)]
    if found["backbone"].get("width") != args.width:
        raise ValueError(f"--search {folder}: searched at --width {found['backbone'].get('width')}, not {args.width}")
    arch = load_arch(str(path))
    return [
        Network(family, arch, heads=heads),
        Network(f"{family}, trained on", arch, heads=heads, weights=str(weights)),
        Network(f"{family}, inherited", arch, heads=heads, weights=str(weights), trained=False),
        Network("handcrafted", backbone.handcrafted),
    ]


# ---- runs -----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A network and a seed. Its folder holds what pretrain.py leaves, and row.json: all that the table says of it."""

    network: Network
    seed: int
    folder: Path

    def row(self) -> dict:
        """{} where nothing is known yet."""
        path = self.folder / "row.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def missing(self, sources: list[str]) -> list[str]:
        """Of these data sets those that it is not measured on; a broken run is not measured."""
        row = self.row()
        return [] if "error" in row else [s for s in sources if dataset(s) not in row.get("scores", {})]

    def done(self, sources: list[str]) -> bool:
        return bool(self.row()) and not self.missing(sources)


def dataset(source: str) -> str:
    """What the table calls it."""
    return Path(source).name


def runs_of(networks: list[Network], seeds: int, folder: Path) -> list[Run]:
    """Each network once, whatever names it; those of one seed together. One that is not trained has no seeds."""
    unique = {network.name: network for network in reversed(networks)}
    names = [name for name in dict.fromkeys(network.name for network in networks)]
    runs = []
    for seed in range(seeds):
        for name in names:
            if unique[name].trained or seed == 0:
                place = re.sub(r"[^a-z0-9.]+", "-", name.lower())
                runs.append(Run(unique[name], seed, folder / "runs" / f"{place}-seed{seed}"))
    return runs


def train(run: Run, args: argparse.Namespace, images: Images) -> dict:
    """The last line of the log of a run of pretrain.py."""
    network = run.network
    if not network.trained:
        return {}
    spec = {"backbone": {"arch": network.arch}} | ({"heads": network.heads} if network.heads else {})
    path = run.folder / "arch.json"
    write_atomic(json.dumps(spec, indent=2) + "\n", path)
    flags = {name: getattr(args, name) for name in vars(pretrain.get_parser().parse_args([])) if hasattr(args, name)}
    flags |= {"arch": str(path), "width": args.width * network.width, "weights": network.weights, "seed": run.seed}
    flags |= {"heads": str(path) if network.heads else args.heads, "output_dir": str(run.folder)}
    with open(run.folder / "console.txt", "a") as console, contextlib.redirect_stdout(console):
        return pretrain.main(argparse.Namespace(**flags), images)


def facts_of(run: Run, args: argparse.Namespace, stem: str, size: int) -> dict:
    """What is known of a run without training."""
    network, width = run.network, args.width * run.network.width
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_backbone(network.arch, stem, width)[0].parameters())
    arch = BACKBONES.get(network.arch, network.arch) if isinstance(network.arch, str) else network.arch
    cost = models.macs(arch, width, stem, size) if isinstance(arch, dict) else None
    facts = {"network": network.name, "family": network.family, "arch": network.arch, "width": width}
    facts |= {"heads": network.heads, "parameters": parameters, "macs": cost, "seed": run.seed}
    return facts


LABEL_FREE = ("loss", "held_out_loss", "rankme", "z_std")  # what a run's log says of it at the end, without labels


def carry_out(run: Run, args: argparse.Namespace, study: "Study") -> None:
    """Trains and measures what of the run is not done. A broken run gets a row that says so."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path, row = run.folder / "row.json", run.row()

    def keep() -> None:
        write_atomic(json.dumps(row, indent=2) + "\n", path)

    if not row:
        row = facts_of(run, args, study.stem, study.size)
        begun = time.time()
        try:
            last = train(run, args, study.images)
        except (SystemExit, RuntimeError) as error:  # RuntimeError: of torch, as for want of memory
            full_disk = isinstance(error.__context__, OSError)
            if isinstance(error, SystemExit) and (not isinstance(error.code, str) or full_disk):
                raise  # stopped by a signal, or nothing could go on
            row["error"] = str(error).split(": error: ")[-1]
            keep()
            return
        row |= {name: last[name] for name in (*LABEL_FREE, "knn") if name in last}
        row |= {"scores": {}, "seconds": {"train": time.time() - begun}, "versions": versions()}
        keep()
        (run.folder / "checkpoint.pth").unlink(missing_ok=True)  # most of the folder, and of no more use
    weights = run.folder / "backbone.pth" if run.network.trained else run.network.weights
    for source in run.missing(list(study.measured)):
        backbone, facts = load_backbone(str(weights))
        begun = time.time()
        how = {"knn_k": args.knn_k, "knn_t": args.knn_t, "compiled": args.compile}
        scores = linear_eval.measure(backbone, facts, *study.measured[source], study.device, **how)[0]
        row["scores"][dataset(source)] = {name: scores[name] for name in ("knn", "linear")}
        row["seconds"][dataset(source)] = time.time() - begun
        keep()


# ---- workers --------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    images: Images  # that all train on
    measured: dict[str, list[Images]]  # by source: [training images, test images]
    stem: str
    size: int
    device: torch.device


POLL = 10  # seconds until a worker that finds all runs taken looks again


def work(runs: list[Run], args: argparse.Namespace, study: Study) -> None:
    """Until all runs are done: carries out one that nobody else has."""
    sources, begun, before = list(study.measured), time.time(), None
    while pending := [run for run in runs if not run.done(sources)]:
        before = len(runs) - len(pending) if before is None else before
        idle = True
        for run in pending:
            run.folder.mkdir(parents=True, exist_ok=True)
            claim = lock(run.folder / ".claim")
            if claim is None:
                continue
            try:
                if not run.done(sources):  # another may have done it meanwhile
                    idle = False
                    carry_out(run, args, study)
                    progress(run, runs, sources, begun, before)
            finally:
                os.close(claim)
        if idle:
            time.sleep(POLL)


def progress(run: Run, runs: list[Run], sources: list[str], begun: float, before: int) -> None:
    """A line on the console, with the time that is left at the rate of all workers since we began."""
    done, row = sum(run.done(sources) for run in runs), run.row()
    left = (time.time() - begun) / max(1, done - before) * (len(runs) - done)
    line = f"{done} of {len(runs)}: {run.network.name}, seed {run.seed}"
    if "error" in row:
        line += f": broken: {row['error']}"
    else:
        seconds = dict(row["seconds"])
        linear = "  ".join(f"{name} {100 * score['linear']:.1f}" for name, score in row["scores"].items())
        line += f", {seconds.pop('train'):.0f} s to train, {sum(seconds.values()):.0f} to measure: {linear}"
    say(f"{line}; {left / 3600:.1f} h left")


# ---- the script -----------------------------------------------------------------------------------------------------


def get_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    pretrain.training_flags(parser)
    group = parser.add_argument_group("study (--seed draws the random networks; runs have seeds 0, 1, ...)")
    group.add_argument(
        "--networks",
        nargs="+",
        default=[],
        help=f"ssa, {', '.join(GRIDS)}, all or :K of them; names; arch.json files; heads:K or resnet:K, random ones",
    )
    group.add_argument("--search", nargs="+", default=[], metavar="FOLDER", help="of search.py: what it found")
    group.add_argument("--seeds", type=int, default=2, help="runs of each network")
    group.add_argument(
        "--target-macs", help="of random backbones: 40e6, resnet18 or 0.5xresnet18; left out, the handcrafted's"
    )
    group.add_argument("--measure-on", nargs="+", help="data sets with labels; left out, --data")
    group.add_argument("--report", action="store_true", help="only the table and pictures of what is there")
    parser.add_argument("--output-dir", default="runs/study")
    return parser


FREE_FLAGS = pretrain.FREE_FLAGS | {"networks", "search", "seeds", "seed", "target_macs", "measure_on", "report"}


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[list[Run], Study]:
    """Checks all there is to check before anything starts. Raises ValueError or OSError."""
    if not args.networks and not args.search:
        raise ValueError("which networks? --networks ssa, resnet:8, a name or an arch.json, or --search FOLDER")
    if args.seeds <= 0:
        raise ValueError(f"--seeds {args.seeds}: must be above 0")
    folder, sources = Path(args.output_dir), args.measure_on or [args.data]
    if len({dataset(source) for source in sources}) < len(sources):
        raise ValueError(f"--measure-on {' '.join(sources)}: two of them have one name")
    args.arch = load_arch(args.arch)
    images = pretrain.load_training_images(args, device, None)
    pretrain.split(images, args)
    stem, size = pretrain.stem_of(args, images), images.pixels.shape[-1]
    networks = [network for word in args.networks for network in networks_of(word, args, stem, size)]
    networks += [network for path in args.search for network in found_by(path, args)]
    measured = {}
    for source in sources:
        measured[source] = [load_data(args, source, split) for split in ("train", "test")]
        if not measured[source][0].labelled:
            raise ValueError(f"--measure-on {source}: there are no labels to measure with")
    handle = lock(folder / ".lock", wait=True)
    try:
        facts = pretrain.facts_of(Path(__file__).name, args, args.arch, None, images, FREE_FLAGS)
        facts, path = json.loads(json.dumps(facts)), folder / "study.json"
        known = load_json(str(path)) if path.exists() else facts
        for what in sorted({*known, *facts}):
            if known.get(what) != facts.get(what):
                was = f"{what} {known.get(what)}, not {facts.get(what)}"
                raise ValueError(f"'{path}' says that this study has {was}: choose another --output-dir")
        write_atomic(json.dumps(facts, indent=2) + "\n", path)
    finally:
        os.close(handle)
    return runs_of(networks, args.seeds, folder), Study(images, measured, stem, size, device)


def main(args: argparse.Namespace) -> None:
    for name in ("RANK", "WORLD_SIZE"):  # each of torchrun's ranks is a worker of its own, on the GPU of LOCAL_RANK
        os.environ.pop(name, None)
    with user_errors():
        if not args.report:
            pretrain.check(args)
            _, _, device = launch.setup(args.device, args.deterministic)
            args.knn_every = args.epochs  # the monitor looks at the end alone
            runs, study = prepare(args, device)
            say(f"{len(runs)} runs, {len(study.measured)} data sets to measure on: {args.output_dir}")
    if not args.report:
        try:
            work(runs, args, study)
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main(get_parser().parse_args())
