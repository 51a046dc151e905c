"""The table of a study, one line a run: its statistics, and a report of one page with pictures.

lookup("results/study.csv")[key(arch, width)]["cifar10 linear"]  # (mean, deviation over seeds, seeds)
kendall(x, y)                                                    # (tau, low, high), a 95 % interval
write_report(Path("runs/study"), GRIDS)                          # study.csv, study.md and pictures
"""

import csv
import io
import json
import math
from collections.abc import Callable, Collection
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

import linear_eval
import models
from candidates import spreads
from checkpoint import load_json, write_atomic
from launch import say
from pictures import draw_costs, draw_matrices, draw_scores

# ---- the table ------------------------------------------------------------------------------------------------------

# figures in the last line of a run's log that may predict accuracy: (name in the report, sign that makes larger better)
PREDICTORS = {
    "loss": ("training loss", -1),
    "held_out_loss": ("held-out loss", -1),
    "infonce": ("InfoNCE of h", -1),
    "rankme": ("RankMe", 1),
    "z_std": ("std of z", 1),
    "knn": ("held-out kNN (needs labels)", 1),
}
TRAINED_ON, INHERITED = ", trained on", ", inherited"  # ends of the families of networks that have a search's weights


def dataset(source: str) -> str:
    """Its name in the table."""
    return Path(source).name


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

    def summed_up(self, scenarios: list[str]) -> dict[str, np.ndarray]:
        """Accuracies (K,): the mean over scenarios, if there are several, and that of the first."""
        overall = {"mean of all": self.overall} if len(scenarios) > 1 else {}
        return {**overall, scenarios[0]: self.means[:, 0]}

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
            row |= {f"{group}: {which}": rounded(kendall(x, y)) for which, y in p.summed_up(scenarios).items()}
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    return markdown([{c: row.get(c, "") for c in columns} for row in rows.values()])


def choice_table(p: Population, scenarios: list[str]) -> str:
    """The effect of each choice on accuracy."""
    rows: dict[str, dict[str, str]] = {}
    for which, y in p.summed_up(scenarios).items():
        for name, (points, error) in effects(p.choices(), y).items():
            rows.setdefault(name, {"choice": name})[f"{which}, points a step"] = f"{points:+.2f} ± {error:.2f}"
    return markdown(list(rows.values()))


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


def found_table(table: list[dict], scenarios: list[str], grids: Collection[str]) -> tuple[str, dict]:
    """(table, {scenario: {family: accuracies}}) of networks outside the grids, as those that searches found: mean,
    deviation over runs, relative improvement over the mean of random networks, if there are any."""
    families = {}
    for name, lines in grouped([line for line in table if line["family"] not in grids], itemgetter("family")).items():
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


def write_report(folder: Path, grids: Collection[str]) -> None:
    """Writes study.md and its pictures, of the accuracies of linear probes, from study.csv. grids: the families that
    are not compared with random networks."""
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
    found, dots = found_table(finished, scenarios, grids)
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
