"""report.py: its statistics against references and simulations, and what the report says of tables made up."""

import json
import math
import re
import xml.etree.ElementTree
from itertools import combinations

import numpy as np
import pytest
from conftest import SVG, arguments, run
from hypothesis import example, given
from hypothesis import strategies as st

import report
import study
from candidates import spreads
from models import size_of
from pictures import draw_costs, draw_matrices

# ---- statistics -----------------------------------------------------------------------------------------------------

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=5, max_size=12)


@given(pairs)
@example([(i, i) for i in range(8)])
@example([(i, -i) for i in range(8)])
def test_correlations_are_those_of_their_definitions(drawn):
    x, y = np.array(drawn, float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert all(math.isnan(f(x, y)[0]) for f in (report.pearson, report.spearman, report.kendall))
        return
    places = [[1 + sum(v < w for v in z) + (sum(v == w for v in z) - 1) / 2 for w in z] for z in (x, y)]
    assert [report.ranks_of(z).tolist() for z in (x, y)] == places

    def r(a, b):
        a, b = np.array(a) - np.mean(a), np.array(b) - np.mean(b)
        return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())

    assert report.pearson(x, y)[0] == pytest.approx(r(x, y))
    assert report.spearman(x, y)[0] == pytest.approx(r(*places))
    signs = [(np.sign(a - c), np.sign(b - d)) for (a, b), (c, d) in combinations(drawn, 2)]
    untied = math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    assert report.kendall(x, y)[0] == pytest.approx(sum(a * b for a, b in signs) / untied)
    for f in (report.pearson, report.spearman, report.kendall):
        value, low, high = f(x, y)
        assert low <= value <= high and f(y, x)[0] == pytest.approx(value) and f(-x, y)[0] == pytest.approx(-value)


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for _, low, high in intervals])


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_intervals_of_correlations_hold_the_truth_in_95_of_100_samples(rho):
    rng = np.random.default_rng(0)
    samples = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(1000, 40))
    for f, truth in (
        (report.pearson, rho),
        (report.spearman, 6 / math.pi * math.asin(rho / 2)),
        (report.kendall, 2 / math.pi * math.asin(rho)),
    ):
        assert 0.9 < coverage([f(*sample.T) for sample in samples], truth) < 0.98, f.__name__


def accuracies(rng, networks, seeds, between=2.0, within=1.0, common=3.0, mean=50.0):
    """(networks, seeds): what seeds have in common is in them too."""
    shape = (networks, seeds)
    return mean + rng.normal(0, between, (networks, 1)) + rng.normal(0, common, seeds) + rng.normal(0, within, shape)


def test_variance_parts_are_those_that_the_accuracies_were_made_of():
    rng = np.random.default_rng(0)
    assert spreads(accuracies(rng, 5000, 3)) == pytest.approx([2, 1], rel=0.05)
    nothing = [spreads(accuracies(rng, 20, 2, between=0.0))[0] for _ in range(300)]
    assert min(nothing) == 0 and np.mean(nothing) < 0.5


def test_the_interval_of_an_improvement_holds_the_truth():
    rng, intervals = np.random.default_rng(0), []
    for _ in range(1000):
        common = rng.normal(0, 3, 3)  # the same views for all
        random = 50 + rng.normal(0, 2, (12, 1)) + common + rng.normal(0, 1, (12, 3))
        intervals.append(report.improvement(53 + common + rng.normal(0, 1, 3), random))
    assert 0.9 < coverage(intervals, 6.0) < 0.98


def test_regret_is_what_another_choice_costs_and_is_not_fooled_by_noise():
    rng = np.random.default_rng(0)
    quality = rng.normal(0, 1, (30, 2))
    y = np.repeat(quality[:, None, :], 3, 1)  # without noise
    cost, _, drawn = report.regrets(y, samples=2)
    best, other = quality[:, 1].argmax(), quality[:, 0].argmax()
    assert cost.diagonal().tolist() == [0, 0]
    assert cost[0, 1] == pytest.approx(quality[best, 1] - quality[other, 1])
    assert drawn == pytest.approx(quality.max(0) - quality.mean(0))
    noise = [report.regrets(rng.normal(0, 1, (30, 2, 2)), samples=2)[0][0, 1] for _ in range(400)]
    assert abs(np.mean(noise)) < 0.2  # of one seed alone it would seem to be 2


def test_the_interval_of_a_regret_holds_the_truth():
    rng = np.random.default_rng(0)

    def drawn():  # (40 networks, 2 seeds, 2 scenarios that correlate by .5)
        quality = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], (40, 1))
        return quality + rng.normal(0, 3, (2, 2)) + rng.normal(0, 0.7, (40, 2, 2))

    truth, intervals = np.mean([report.regrets(drawn(), samples=1)[0][0, 1] for _ in range(2000)]), []
    for _ in range(300):
        cost, error, _ = report.regrets(drawn(), samples=60)
        intervals.append((cost, cost[0, 1] - 1.96 * error[0, 1], cost[0, 1] + 1.96 * error[0, 1]))
    assert 0.9 < coverage(intervals, truth) < 0.98


def test_effects_of_choices_and_their_errors():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        depth, kernel = rng.choice([1, 2, 3], 40), rng.choice([1, 3, 5], 40)
        y = 50 + 1.5 * depth - 0.5 * kernel + rng.normal(0, 2, 40)
        found = report.effects({"depth": depth.astype(float), "kernel": kernel.astype(float), "same": np.ones(40)}, y)
        assert list(found) == ["depth", "kernel"]
        inside += abs(found["depth"][0] - 1.5) < report.Z * found["depth"][1]
        inside += abs(found["kernel"][0] + 1) < report.Z * found["kernel"][1]
    assert 0.9 < inside / 600 < 0.98
    assert list(report.effects({"a": depth.astype(float), "b": 2.0 * depth}, y)) == ["a, b"]  # cannot be told apart


# ---- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path):
    """A study of 24 ResNets and 12 MobileNets in which one quality rules all scenarios but 'other'."""
    args, rng = arguments(study, tmp_path), np.random.default_rng(0)
    networks = study.networks_of("resnet-basic:24", args, "small", 16)
    networks += study.networks_of("mobilenet-depth:12", args, "small", 16)
    for network in networks:
        macs_of, parameters = size_of(network.arch, args.width, "small", 16)
        quality, other = rng.normal(size=2)
        for seed in range(2):
            row = study.facts_of(study.Run(network, seed, tmp_path), args) | {"macs": macs_of, "parameters": parameters}
            scores = {"shapes": quality, "same": quality, "other": other}
            row["scores"] = {
                name: {"knn": 0.3, "linear": 0.4 + 0.05 * score + rng.normal(0, 0.002)}
                for name, score in scores.items()
            }
            row |= {"loss": 5 - quality, "held_out_loss": 4.0, "rankme": 30.0, "seconds": {"train": 1, "shapes": 2}}
            folder = tmp_path / "runs" / f"{network.name}-{seed}".replace(" ", "-")
            folder.mkdir(parents=True)
            (folder / "row.json").write_text(json.dumps(row))
    (tmp_path / "study.json").write_text('{"--data": "a/shapes", "--epochs": 1}')
    return tmp_path


def test_a_report_says_what_the_study_shows(made_up, capsys):
    run(study, made_up, "--report")
    said = capsys.readouterr().out
    ratio = re.search(r"ResNets, shapes: networks differ by .* points, seeds by .*, ratio ([\d.]+)\n", said)
    assert float(ratio[1]) > 10  # of 5 points and .2
    text = (made_up / "study.md").read_text()
    assert "36 networks, 72 runs (`--data a/shapes --epochs 1`), 3 data sets" in text
    assert "## ResNets: 24, 2 seeds" in text and "## MobileNets: 12, 2 seeds" in text
    cells = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert float(cells["| same"][4].split()[0]) > 0.95 and abs(float(cells["| other"][4].split()[0])) < 0.6
    assert abs(float(cells["| same"][6].split()[0])) < 1 < float(cells["| other"][6].split()[0])
    assert float(cells["| training loss"][2].split()[0]) > 0.9 and "| held-out loss" not in cells  # constant
    assert "| depth of stage 1" in cells and "| width" not in cells
    for name in ("correlations", "costs", "ranks"):
        assert xml.etree.ElementTree.parse(made_up / f"study-{name}.svg").getroot().get("width")
    # from the table alone, as others have it
    (made_up / "runs").rename(made_up / "gone")
    (made_up / "study.md").unlink()
    run(study, made_up, "--report")
    assert (made_up / "study.md").read_text() == text


def test_one_data_set_has_no_mean_of_all(made_up):
    for file in (made_up / "runs").glob("*/row.json"):
        row = json.loads(file.read_text())
        file.write_text(json.dumps({**row, "scores": {"same": row["scores"]["same"]}}))
    run(study, made_up, "--report")
    text = (made_up / "study.md").read_text()
    assert "| choice | same, points a step |" in text and "ResNets: same |" in text and "mean of all" not in text


def test_networks_of_one_family_and_weights_of_a_search_are_kept_apart(made_up):
    report.write_table(made_up)
    known = study.lookup(made_up / "study.csv")
    a, b = (json.loads(file.read_text()) for file in sorted((made_up / "runs").glob("*-0/row.json"))[:2])
    scores = {name: {"knn": 1.0, "linear": 1.0} for name in a["scores"]}
    others = [
        {**a, "family": f"found{end}", "network": end, "scores": scores} for end in (", inherited", ", trained on")
    ]
    others += [{**row, "family": "arch", "network": f"network {k}"} for k, row in enumerate((a, b))]
    for k, row in enumerate(others):
        (made_up / "runs" / str(k)).mkdir()
        (made_up / "runs" / str(k) / "row.json").write_text(json.dumps(row))
    report.write_table(made_up)
    again = study.lookup(made_up / "study.csv")
    key = report.key(a["arch"], a["width"])
    assert again[key]["same linear"][2] == known[key]["same linear"][2] + 1  # that of "arch"
    assert again[key]["same linear"][0] < 90
    text, _ = report.found_table(report.read_table(made_up / "study.csv"), ["same"], study.GRIDS)
    assert "| arch: network 0 (1 runs) | arch: network 1 (1 runs) |" in text


def test_a_study_under_way_has_a_report(made_up):
    files = sorted((made_up / "runs").glob("*/row.json"))
    rows = [json.loads(file.read_text()) for file in files]
    for k, (file, row) in enumerate(zip(files, rows)):
        if k < 3:  # of another family, which one data set is missing for
            row["family"] = f"found {k}"
            del row["scores"]["same"]
        row["macs"] = None  # as of a ViT
        file.write_text(json.dumps(row))
    run(study, made_up, "--report")
    text = (made_up / "study.md").read_text()
    assert "## Found and random networks" in text and "eight networks of a family" not in text
    assert "| nan |" not in text.split("| same |")[-1].split("\n")[0]
    for file, row in zip(files, rows):
        file.write_text(json.dumps({**row, "scores": {}}))
    with pytest.raises(SystemExit, match=r"nothing in .* is measured yet"):
        run(study, made_up, "--report")


def test_pictures_show_every_number_and_the_front():
    svg = draw_matrices({"p": (["a", "b"], ["x", "y"], [[1.0, -0.5], [math.nan, 0.25]])}, "t", (-1, 1), 2)
    root = xml.etree.ElementTree.fromstring(svg)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"1.00", "-.50", ".25", "a", "b", "x", "y", "p"} <= set(texts)
    svg = draw_costs({"s": [(1, 40), (2, 39), (4, 45), (8, 44)]}, "t")
    line = next(xml.etree.ElementTree.fromstring(svg).iter(f"{SVG}polyline"))
    assert len(line.get("points").split()) == 2
