"""Puts what search.py found beside the handcrafted network and K random ones: search.py --compare K calls it.

All are trained alike by pretrain.py and measured by linear_eval.py, over seeds, on one data set or several.
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

import linear_eval
import pretrain
from checkpoint import load_arch, load_backbone, load_heads, write_atomic, write_json
from data import Images, load_data
from launch import barrier, is_main, say
from models import BACKBONES, SPACES, Space, build_backbone, macs, random_head
from pictures import draw_scores

INHERITED = "found, inherited"  # measured with the weights of the search


def shared_flags(args: argparse.Namespace) -> dict:
    """Those of pretrain.py, as they are here."""
    defaults = vars(pretrain.get_parser().parse_args([]))
    return {**defaults, **{k: v for k, v in vars(args).items() if k in defaults}}


def searched(args: argparse.Namespace) -> list[str]:
    """The flags of pretrain.py that take what is searched."""
    return ["heads"] * ("heads" in args.space) + ["arch"] * any(name in SPACES for name in args.space)


def facts_of_network(search, arch: str | dict) -> tuple[int, int]:
    """(MACs, parameters) of a backbone of the search's width, stem and size."""
    network, _ = build_backbone(arch, search.stem, search.args.width)
    spec = BACKBONES[arch] if isinstance(arch, str) else arch
    cost = macs(spec, search.args.width, search.stem, search.size)
    return cost, sum(p.numel() for p in network.parameters())


def prepare(
    args: argparse.Namespace, heads: list[str], space: Space | None
) -> tuple[dict[str, list[Images]], dict[str, str]]:
    """(data, more): the images to measure on, {source: [train, test]}, and the files of --compare-with, {row: path}.

    To be called before the search, so that what is wrong with them is said then. Raises ValueError or OSError.
    """
    data = {}
    for source in args.compare_data or [args.data]:
        data[source] = [load_data(args, source, split) for split in ("train", "test")]
        if not data[source][0].labelled:
            raise ValueError(f"--compare needs labels to measure with, and '{source}' has none")
    for path in args.compare_with:
        if space:
            load_arch(path)
        if heads:
            load_heads(path, heads)
    rows = [Path(path).parent.name for path in args.compare_with]
    unique = len(set(rows)) == len(rows) and not [r for r in rows if not r or r.startswith(("found", "handcrafted"))]
    return data, dict(zip(rows if unique else args.compare_with, args.compare_with))


def candidates_of(args: argparse.Namespace, search, found: Path, more: dict[str, str]) -> dict[str, dict[str, str]]:
    """The flags of pretrain.py that make each network, by the name of its row. Writes random ones below the folder."""
    what, space = searched(args), search.space
    candidates = {"found": {flag: str(found) for flag in what}}
    if space:
        candidates["found, trained on"] = {**candidates["found"], "weights": str(found.with_name("backbone.pth"))}
    candidates["handcrafted"] = {"arch": space.handcrafted} if space else {}
    for name, path in more.items():
        candidates[name] = {flag: path for flag in what}
    rng = random.Random(args.seed)
    # other networks than --strategy random drew with this seed
    choices = search.cost.random(args.compare, 10_000 + args.seed) if space else []
    for k in range(args.compare):
        path, spec = found.parent / "compare" / f"random-{k + 1}.json", {}
        if search.heads:
            spec["heads"] = {name: random_head(len(dims) - 1, rng) for name, dims in search.dims.items()}
        if space:
            spec["backbone"] = {"arch": space.arch(choices[k])}
        write_json(spec, path)
        candidates[f"random {k + 1}"] = {flag: str(path) for flag in what}
    return candidates


def scores_of(weights: Path, data: dict[str, list[Images]], args: argparse.Namespace, device) -> dict[str, dict]:
    """{data: {"knn", "linear", ...}}, kept beside the weights, as long as these are the same."""
    path, crc = weights.with_name("scores.json"), zlib.crc32(weights.read_bytes())
    known = json.loads(path.read_text()) if path.exists() else {}
    known = known if known.get("crc") == crc else {"crc": crc}
    barrier()  # all ranks have looked before one writes
    for source in [s for s in data if s not in known]:
        backbone, facts = load_backbone(str(weights))
        knobs = {"knn_k": args.knn_k, "knn_t": args.knn_t}
        known[source] = linear_eval.measure(backbone, facts, *data[source], device, **knobs)[0]
        if is_main():
            write_atomic(json.dumps(known) + "\n", path)
    barrier()
    return {source: known[source] for source in data}


def compare(
    search, args: argparse.Namespace, monitor, found: Path, data: dict[str, list[Images]], more: dict[str, str]
) -> None:
    """Trains the found, the handcrafted and K random networks alike, --compare-seeds times each: a table, a picture.

    Every run is one of pretrain.py in a folder of its own below compare/, so a cut comparison goes on where it was.
    Accuracies are on test images, of which nothing was chosen. search: search.py's, once it has found what it looked
    for; args: its flags as they were given; found: its arch.json; data, more: of `prepare`.
    """
    folder, inherited = found.parent / "compare", found.with_name("backbone.pth")
    candidates = candidates_of(args, search, found, more)
    flags = {**shared_flags(args), "epochs": args.compare_epochs or args.epochs}
    results: dict[str, list[dict]] = {name: [] for name in candidates}
    ends: dict[str, list[dict]] = {name: [] for name in candidates}  # the last lines of the runs' logs
    for seed in range(args.compare_seeds):
        for name, spec in candidates.items():
            output = folder / f"{re.sub('[^a-z0-9.]+', '-', name)}-seed{seed}"
            say(f"\n{name}, seed {seed}: {output}")
            again = argparse.Namespace(**{**flags, **spec, "output_dir": str(output), "seed": seed})
            ends[name].append(pretrain.main(again, search.images))
            results[name].append(scores_of(output / "backbone.pth", data, args, search.device))
    costs = {}
    if search.space:
        results[INHERITED] = [scores_of(inherited, data, args, search.device)]
        costs = {name: facts_of_network(search, load_arch(spec["arch"])) for name, spec in candidates.items()}
        costs[INHERITED] = costs["found"]
    lines = table(args, results, costs)
    lines += ["", *rank_correlations(search, monitor, candidates, results, ends, costs)]
    say("\n" + "\n".join(lines))
    if is_main():
        write_atomic("\n".join(lines) + "\n", folder / "compare.md")
        groups = grouped(results)
        dots = {Path(d).name: {g: [100 * r[d]["linear"] for r in rows] for g, rows in groups.items()} for d in data}
        title = f"Linear accuracy, {' and '.join(args.space)}, {args.method}, x{args.width:g}: each run, and the mean"
        write_atomic(draw_scores(dots, title), folder / "compare.svg")


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


def rank_correlations(
    search, monitor, candidates: dict[str, dict], results: dict, ends: dict, costs: dict
) -> list[str]:
    """Can one know which network is good beforehand, or without labels? Markdown: Kendall's tau of predictor with
    the linear accuracy, over the networks that were trained from scratch, each the mean over its seeds.

    The predictors: at the end of a run its training loss (for DIET, 2406.10743 says so) and RankMe (2210.02885); before
    it MACs and, of a backbone with the weights that it inherits from the search, held-out loss and kNN. Losses count
    by how low they are.
    """
    scratch = [name for name, spec in candidates.items() if "weights" not in spec]
    predictors: dict[str, dict[str, float]] = {}
    for name in scratch:
        predicted = {"training loss": -statistics.mean(end["loss"] for end in ends[name])}
        predicted["RankMe"] = statistics.mean(end["rankme"] for end in ends[name])
        if "knn" in ends[name][0]:
            predicted["held-out kNN (needs labels)"] = statistics.mean(end["knn"] for end in ends[name])
        if search.space:
            predicted["MACs"] = costs[name][0]
        choice = search.space.choice(load_arch(candidates[name]["arch"])) if search.space else None
        if choice and search.args.strategy != "random" and name != "found":  # which that supernet has favoured
            facts = monitor(search.standalone(choice, search.args.recalibrate_batches))
            for what, key, sign in (("loss", "held_out_loss", -1), ("kNN (needs labels)", "knn", 1)):
                if key in facts:
                    predicted[f"held-out {what}, inherited weights"] = sign * facts[key]
        for what, value in predicted.items():
            predictors.setdefault(what, {})[name] = value
    n, sources = len(scratch), list(results[scratch[0]][0])
    lines = [
        f"Kendall's tau with the linear accuracy from scratch, over {n} networks (by chance 0 ± "
        f"{tau_by_chance(n):.2f})",
        "",
        f"| predictor | {' | '.join(Path(source).name for source in sources)} |",
        "|---" * (1 + len(sources)) + "|",
    ]
    for what, values in predictors.items():
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
