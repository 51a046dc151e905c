"""Puts what search.py found beside the handcrafted network and K random ones: search.py --compare K calls it.

All are trained alike by pretrain.py and measured by linear_eval.py, over seeds, on one data set or several. `search` is
search.py's Search, once it has found what it looked for.
"""

import argparse
import json
import math
import random
import re
import statistics
import zlib
from itertools import combinations
from pathlib import Path

import torch

import linear_eval
import pretrain
from checkpoint import load_arch, load_backbone, load_heads, write_arch, write_atomic
from data import Images, load_data
from launch import barrier, is_main, say
from linear_eval import measure
from models import BACKBONES, build_backbone, macs, random_head
from pictures import draw_scores


def shared_flags(args: argparse.Namespace) -> dict:
    """Those of pretrain.py, as they are here."""
    defaults = vars(pretrain.get_parser().parse_args([]))
    return defaults | {k: v for k, v in vars(args).items() if k in defaults}


def prepare(search) -> tuple[dict[str, list[Images]], dict[str, str]]:
    """(data, more): the images to measure on, {source: [train, test]}, and the files of --compare-with, {row: path}.

    To be called before the search, so that what is wrong with them is said then. Raises ValueError or OSError.
    """
    args, data = search.args, {}
    for source in args.compare_data or [args.data]:
        data[source] = [load_data(args, source, split) for split in ("train", "test")]
        if not data[source][0].labelled:
            raise ValueError(f"--compare needs labels to measure with, and '{source}' has none")
    for path in args.compare_with:
        if search.space:
            load_arch(path)
        if search.heads:
            load_heads(path, list(search.run.spaces))
    rows = [Path(path).parent.name for path in args.compare_with]
    unique = len(set(rows)) == len(rows) and not [r for r in rows if not r or r.startswith(("found", "handcrafted"))]
    return data, dict(zip(rows if unique else args.compare_with, args.compare_with))


def compare(search, arch: Path, data: dict[str, list[Images]], more: dict[str, str]) -> None:
    """Trains the found, the handcrafted and K random networks alike, --compare-seeds times each: a table, a picture.

    Every run is one of pretrain.py in a folder of its own below compare/, so a cut comparison goes on where it was.
    Accuracies are on test images, of which nothing was chosen. data, more: of `prepare`.
    """
    run, args, folder = search.run, search.args, search.run.output / "compare"
    candidates = {"found": {k: str(arch) for k in ("heads", "arch") if k in searched(search)}}
    inherited = run.output / "backbone.pth"
    if search.space:
        candidates["found, trained on"] = candidates["found"] | {"weights": str(inherited)}
    candidates["handcrafted"] = {"arch": search.space.handcrafted} if search.space else {}
    candidates |= {name: {k: path for k in searched(search)} for name, path in more.items()}
    rng = random.Random(args.seed)
    # other networks than --strategy random drew with this seed
    choices = iter(search.random_choices(args.compare, 10_000 + args.seed) if search.space else [])
    for k in range(args.compare):
        path, spec = folder / f"random-{k + 1}.json", {}
        if search.heads:
            spec["heads"] = {name: random_head(dims.layers, rng) for name, dims in run.spaces.items()}
        if search.space:
            spec["backbone"] = {"arch": search.space.arch(next(choices))}
        write_arch(path, spec)
        candidates[f"random {k + 1}"] = {what: str(path) for what in searched(search)}

    flags = shared_flags(args) | {"epochs": args.compare_epochs or args.epochs}
    measuring = linear_eval.get_parser().parse_args(["--weights", "", f"--knn-k={args.knn_k}", f"--knn-t={args.knn_t}"])

    def scores(weights: Path) -> dict[str, dict]:
        """{data: {"knn", "linear", ...}}, kept beside the weights, as long as these are the same."""
        path, crc = weights.with_name("scores.json"), zlib.crc32(weights.read_bytes())
        known = json.loads(path.read_text()) if path.exists() else {}
        known = known if known.get("crc") == crc else {"crc": crc}
        barrier()  # all ranks have looked before one writes
        for source in [s for s in data if s not in known]:
            backbone, facts = load_backbone(str(weights))
            known[source] = measure(backbone, facts, *data[source], run.device, measuring)[0]
            if is_main():
                write_atomic(json.dumps(known) + "\n", path)
        barrier()
        return {source: known[source] for source in data}

    results: dict[str, list[dict]] = {name: [] for name in candidates}
    ends: dict[str, list[dict]] = {name: [] for name in candidates}  # the last lines of the runs' logs
    for seed in range(args.compare_seeds):
        for name, spec in candidates.items():
            output = folder / f"{re.sub('[^a-z0-9.]+', '-', name)}-seed{seed}"
            say(f"\n{name}, seed {seed}: {output}")
            again = argparse.Namespace(**flags | spec | {"output_dir": str(output), "seed": seed})
            end = pretrain.main(again, run.images)
            ends[name].append(end)
            results[name].append(scores(output / "backbone.pth"))
    costs = {}
    if search.space:
        results["found, inherited"] = [scores(inherited)]
        costs = {name: facts_of(search, load_arch(spec["arch"])) for name, spec in candidates.items()}
        costs["found, inherited"] = costs["found"]
    lines = [*table(args, results, costs), "", *rank_correlations(search, candidates, results, ends, costs)]
    say("\n" + "\n".join(lines))
    if is_main():
        write_atomic("\n".join(lines) + "\n", folder / "compare.md")
        groups = grouped(results)
        dots = {Path(d).name: {g: [100 * r[d]["linear"] for r in rows] for g, rows in groups.items()} for d in data}
        title = f"Linear accuracy, {' and '.join(args.space)}, {args.method}, x{args.width:g}: each run, and the mean"
        write_atomic(draw_scores(dots, title), folder / "compare.svg")


def searched(search) -> list[str]:
    """The flags of pretrain.py that take what is searched."""
    return ["heads"] * bool(search.heads) + ["arch"] * bool(search.space)


def facts_of(search, arch: str | dict) -> tuple[int, int]:
    """(MACs, parameters) of a backbone at this search's width, stem and image size."""
    run = search.run
    with torch.device("meta"):
        network, _ = build_backbone(arch, run.stem, run.args.width)
    spec = BACKBONES[arch] if isinstance(arch, str) else arch
    return macs(spec, run.args.width, run.stem, run.size), sum(p.numel() for p in network.parameters())


def grouped(results: dict[str, list]) -> dict[str, list]:
    """Rows of the table: the random networks as one, last."""
    groups = {name: rows for name, rows in results.items() if not name.startswith("random ")}
    randoms = [rows for name, rows in results.items() if name.startswith("random ")]
    return dict(sorted(groups.items(), key=lambda g: not g[0].startswith("found"))) | {
        f"random ({len(randoms)} of them)": [row for rows in randoms for row in rows]
    }


def table(args: argparse.Namespace, results: dict[str, list[dict]], costs: dict[str, tuple[int, int]]) -> list[str]:
    """Markdown: mean and standard deviation over runs; RI is the relative improvement over the random ones' mean."""
    groups, sources = grouped(results), list(next(iter(results.values()))[0])
    randoms = next(g for g in groups if g.startswith("random ("))
    head = ["network", *(["MMACs", "M parameters"] if costs else []), "runs"]
    for source in sources:
        head += [f"{Path(source).name}: kNN", "linear", "RI, %"]
    lines = [
        f"{args.method}, {args.arch + ' ' if not costs else ''}x{args.width:g}, trained on {Path(args.data).name}, "
        f"{args.compare_epochs or args.epochs} epochs, {args.compare_seeds} seeds: test accuracy, mean and standard "
        f"deviation over runs (kNN: k {args.knn_k}, T {args.knn_t:g}); RI: the linear accuracy's relative improvement "
        "over the random networks' mean",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for group, rows in groups.items():
        cells = [group]
        if costs:
            mine = [costs[n] for n in costs if n == group or (group == randoms and n.startswith("random "))]
            cells += [f"{statistics.mean(c[i] for c in mine) / 1e6:.3g}" for i in (0, 1)]
        cells.append(str(len(rows)))
        for source in sources:
            for key in ("knn", "linear"):
                values = [100 * r[source][key] for r in rows]
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.2f}{spread}")
            base = statistics.mean(r[source]["linear"] for r in groups[randoms])
            cells.append(f"{100 * (statistics.mean(r[source]['linear'] for r in rows) / base - 1):+.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    for source in sources:
        means = (statistics.mean(r[source]["linear"] for r in rows) for n, rows in results.items() if "random " in n)
        one_by_one = ", ".join(f"{100 * v:.2f}" for v in sorted(means))
        lines += ["", f"random networks one by one, {Path(source).name}, linear, mean over seeds: {one_by_one}"]
        runs = [[100 * r[source]["linear"] for r in rows] for n, rows in results.items() if "random " in n]
        if len(runs) > 1 and len(runs[0]) > 1:
            between, within = spreads(runs)
            lines[-1] += f"; standard deviation between networks {between:.2f}, between seeds of one {within:.2f}"
    return lines


def spreads(runs: list[list[float]]) -> tuple[float, float]:
    """Standard deviations between networks and between seeds of one network, the former without what seeds add to it
    (one-way analysis of variance): where it is near 0 no search can find a better network than chance does."""
    within = statistics.mean(statistics.variance(r) for r in runs)
    between = statistics.variance(statistics.mean(r) for r in runs) - within / len(runs[0])
    return math.sqrt(max(0.0, between)), math.sqrt(within)


def rank_correlations(search, candidates: dict[str, dict], results: dict, ends: dict, costs: dict) -> list[str]:
    """Can one know which network is good beforehand, or without labels? Markdown: Kendall's tau of what may tell with
    the linear accuracy, over the networks that were trained from scratch, each the mean over its seeds.

    What may tell: at the end of a run its training loss (for DIET, 2406.10743 says so) and RankMe (2210.02885); before
    it MACs and, of a backbone with the weights that it inherits from the search, held-out loss and kNN. Losses count
    by how low they are.
    """
    scratch = [name for name, spec in candidates.items() if "weights" not in spec]
    tells: dict[str, dict[str, float]] = {}
    for name in scratch:
        told = {"training loss": -statistics.mean(end["loss"] for end in ends[name])}
        told["RankMe"] = statistics.mean(end["rankme"] for end in ends[name])
        if "knn" in ends[name][0]:
            told["held-out kNN (needs labels)"] = statistics.mean(end["knn"] for end in ends[name])
        if search.space:
            told["MACs"] = costs[name][0]
        choice = search.space.choice(load_arch(candidates[name]["arch"])) if search.space else None
        if choice and search.args.strategy != "random" and name != "found":  # which that supernet has favoured
            facts = search.run.monitor(True, search.standalone(choice, search.args.recalibrate_batches))
            for what, key, sign in (("loss", "held_out_loss", -1), ("kNN (needs labels)", "knn", 1)):
                if key in facts:
                    told[f"held-out {what}, inherited weights"] = sign * facts[key]
        for what, value in told.items():
            tells.setdefault(what, {})[name] = value
    n, sources = len(scratch), list(results[scratch[0]][0])
    lines = [
        f"Kendall's tau with the linear accuracy from scratch, over {n} networks (by chance 0 ± "
        f"{tau_by_chance(n):.2f})",
        "",
        f"| what may tell | {' | '.join(Path(source).name for source in sources)} |",
        "|---" * (1 + len(sources)) + "|",
    ]
    for what, values in tells.items():
        what += f", {len(values)} networks" * (len(values) < n)  # one of --compare-with may be none of the space
        accuracies = ([statistics.mean(r[s]["linear"] for r in results[name]) for name in values] for s in sources)
        cells = [f"{kendall_tau([*values.values()], accuracy):+.2f}" for accuracy in accuracies]
        lines.append(f"| {' | '.join([what, *cells])} |")
    return lines


def tau_by_chance(n: int) -> float:
    """Standard deviation of Kendall's tau between two random orders of n."""
    return math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))


def kendall_tau(a: list[float], b: list[float]) -> float:
    """Concordant less discordant pairs, over all pairs (tau-a)."""
    signs = [(x - y) * (v - w) for (x, v), (y, w) in combinations(list(zip(a, b)), 2)]
    return sum((s > 0) - (s < 0) for s in signs) / len(signs)
