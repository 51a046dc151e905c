"""study.py: its statistics against references and simulations, its runs shared out and taken over, its report."""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections import Counter
from itertools import combinations

import conftest
import numpy as np
import pytest
import torch
from conftest import BOTH, ROOT, SVG, TINY, all_refused, run, save_png
from hypothesis import example, given
from hypothesis import strategies as st

import search
import study
from checkpoint import lock
from models import BACKBONES, SPACES, macs, size_of
from pictures import draw_costs, draw_matrices

STUDY = ["--image-size", "16", "--epochs", "1"]


def arguments(folder, *more):
    return conftest.arguments(study, folder, *STUDY, *more)


def run_study(folder, *more):
    run(study, folder, *STUDY, *more)


# ---- statistics -----------------------------------------------------------------------------------------------------

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=5, max_size=12)


@given(pairs)
@example([(i, i) for i in range(8)])
@example([(i, -i) for i in range(8)])
def test_correlations_are_those_of_their_definitions(drawn):
    x, y = np.array(drawn, float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert all(math.isnan(f(x, y)[0]) for f in (study.pearson, study.spearman, study.kendall))
        return
    places = [[1 + sum(v < w for v in z) + (sum(v == w for v in z) - 1) / 2 for w in z] for z in (x, y)]
    assert [study.ranks_of(z).tolist() for z in (x, y)] == places

    def r(a, b):
        a, b = np.array(a) - np.mean(a), np.array(b) - np.mean(b)
        return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())

    assert study.pearson(x, y)[0] == pytest.approx(r(x, y))
    assert study.spearman(x, y)[0] == pytest.approx(r(*places))
    signs = [(np.sign(a - c), np.sign(b - d)) for (a, b), (c, d) in combinations(drawn, 2)]
    untied = math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    assert study.kendall(x, y)[0] == pytest.approx(sum(a * b for a, b in signs) / untied)
    for f in (study.pearson, study.spearman, study.kendall):
        value, low, high = f(x, y)
        assert low <= value <= high and f(y, x)[0] == pytest.approx(value) and f(-x, y)[0] == pytest.approx(-value)


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for _, low, high in intervals])


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_intervals_of_correlations_hold_the_truth_in_95_of_100_samples(rho):
    rng = np.random.default_rng(0)
    samples = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(1000, 40))
    for f, truth in (
        (study.pearson, rho),
        (study.spearman, 6 / math.pi * math.asin(rho / 2)),
        (study.kendall, 2 / math.pi * math.asin(rho)),
    ):
        assert 0.9 < coverage([f(*sample.T) for sample in samples], truth) < 0.98, f.__name__


def accuracies(rng, networks, seeds, between=2.0, within=1.0, common=3.0, mean=50.0):
    """(networks, seeds): what seeds have in common is in them too."""
    shape = (networks, seeds)
    return mean + rng.normal(0, between, (networks, 1)) + rng.normal(0, common, seeds) + rng.normal(0, within, shape)


def test_variance_parts_are_those_that_the_accuracies_were_made_of():
    rng = np.random.default_rng(0)
    assert study.spreads(accuracies(rng, 5000, 3)) == pytest.approx([2, 1], rel=0.05)
    nothing = [study.spreads(accuracies(rng, 20, 2, between=0.0))[0] for _ in range(300)]
    assert min(nothing) == 0 and np.mean(nothing) < 0.5


def test_the_interval_of_an_improvement_holds_the_truth():
    rng, intervals = np.random.default_rng(0), []
    for _ in range(1000):
        common = rng.normal(0, 3, 3)  # the same views for all
        random = 50 + rng.normal(0, 2, (12, 1)) + common + rng.normal(0, 1, (12, 3))
        intervals.append(study.improvement(53 + common + rng.normal(0, 1, 3), random))
    assert 0.9 < coverage(intervals, 6.0) < 0.98


def test_regret_is_what_another_choice_costs_and_is_not_fooled_by_noise():
    rng = np.random.default_rng(0)
    quality = rng.normal(0, 1, (30, 2))
    y = np.repeat(quality[:, None, :], 3, 1)  # without noise
    cost, _, drawn = study.regrets(y, samples=2)
    best, other = quality[:, 1].argmax(), quality[:, 0].argmax()
    assert cost.diagonal().tolist() == [0, 0]
    assert cost[0, 1] == pytest.approx(quality[best, 1] - quality[other, 1])
    assert drawn == pytest.approx(quality.max(0) - quality.mean(0))
    noise = [study.regrets(rng.normal(0, 1, (30, 2, 2)), samples=2)[0][0, 1] for _ in range(400)]
    assert abs(np.mean(noise)) < 0.2  # of one seed alone it would seem to be 2


def test_the_interval_of_a_regret_holds_the_truth():
    rng = np.random.default_rng(0)

    def drawn():  # (40 networks, 2 seeds, 2 scenarios that correlate by .5)
        quality = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], (40, 1))
        return quality + rng.normal(0, 3, (2, 2)) + rng.normal(0, 0.7, (40, 2, 2))

    truth, intervals = np.mean([study.regrets(drawn(), samples=1)[0][0, 1] for _ in range(2000)]), []
    for _ in range(300):
        cost, error, _ = study.regrets(drawn(), samples=60)
        intervals.append((cost, cost[0, 1] - 1.96 * error[0, 1], cost[0, 1] + 1.96 * error[0, 1]))
    assert 0.9 < coverage(intervals, truth) < 0.98


def test_effects_of_choices_and_their_errors():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        depth, kernel = rng.choice([1, 2, 3], 40), rng.choice([1, 3, 5], 40)
        y = 50 + 1.5 * depth - 0.5 * kernel + rng.normal(0, 2, 40)
        found = study.effects({"depth": depth.astype(float), "kernel": kernel.astype(float), "same": np.ones(40)}, y)
        assert list(found) == ["depth", "kernel"]
        inside += abs(found["depth"][0] - 1.5) < study.Z * found["depth"][1]
        inside += abs(found["kernel"][0] + 1) < study.Z * found["kernel"][1]
    assert 0.9 < inside / 600 < 0.98
    assert list(study.effects({"a": depth.astype(float), "b": 2.0 * depth}, y)) == ["a, b"]  # cannot be told apart


# ---- networks -------------------------------------------------------------------------------------------------------


def test_the_papers_grids_are_there(tmp_path):
    args = arguments(tmp_path)
    of = {name: study.networks_of(name, args, "small", 16) for name in study.GRIDS}
    counts = {"resnet-basic": 83, "resnet-bottleneck": 81, "resnet-bottleneck-deep": 36, "resnet-width": 4}
    counts |= {"mobilenet-width": 11, "mobilenet-depth": 32, "mobilenet-deep-wide": 128, "mobilenet-very-deep": 128}
    assert {name: len({n.name for n in networks}) for name, networks in of.items()} == counts
    assert len(study.networks_of("ssa", args, "small", 16)) == sum(counts.values())

    def parameters(network):  # as the paper counts them, at full width
        return size_of(network.arch, network.width, "imagenet", 224)[1] / 1e6

    assert [parameters(n) for n in (of["resnet-bottleneck"][0], of["resnet-bottleneck"][-1])] == pytest.approx(
        [13.95, 25.81], abs=0.01
    )
    assert max(map(parameters, of["resnet-bottleneck-deep"])) < 26.55
    assert parameters(of["mobilenet-width"][-1]) == pytest.approx(19.42, abs=0.01)
    some = study.networks_of("ssa:20", args, "small", 16)
    assert len({n.name for n in some}) == 20 and {n.family for n in some} == set(counts)
    assert [n.name for n in study.networks_of("ssa:12", args, "small", 16)] == [n.name for n in some[:12]]


def test_random_networks_meet_the_target_and_a_longer_list_begins_with_the_shorter(tmp_path):
    args = arguments(tmp_path, "--target-macs", "0.5xresnet18")
    some = study.networks_of("resnetk1:12", args, "small", 16)
    target = macs(BACKBONES["resnet18"], 0.0625, "small", 16) / 2
    assert len({n.name for n in some}) == 12 and all(SPACES["resnetk1"].choice(n.arch) for n in some)
    assert all(0.95 * target <= macs(n.arch, 0.0625, "small", 16) <= target for n in some)
    assert study.networks_of("resnetk1:5", args, "small", 16) == some[:5]
    both = study.networks_of("heads+resnetk1:3", args, "small", 16)
    assert all(len(n.heads["projector"]) == 6 and n.arch["block"] == "basic" for n in both)
    names = [network.name for network in study.networks_of("heads:4", args, "small", 16)]
    assert len(set(names)) == 4 and all(name.startswith("resnet18 heads ") for name in names)


def test_a_network_has_one_name_whatever_names_it():
    basic = study.Network("a", {**BACKBONES["resnet18"]})
    assert basic.name == study.Network("b", "resnet18").name == "resnet18"
    deep = {**BACKBONES["resnet18"], "depth": [3, 2, 2, 2]}
    assert (
        study.Network("a", deep).name == "basic 3-2-2-2" and study.Network("a", deep, 1.5).name == "basic 3-2-2-2 x1.5"
    )
    runs = study.runs_of([basic, study.Network("b", "resnet18"), study.Network("a", deep)], 2, ROOT)
    assert [(r.network.family, r.seed) for r in runs] == [("a", 0), ("a", 1), ("a", 0), ("a", 1)]
    assert len({r.folder for r in runs}) == 4


# ---- runs -----------------------------------------------------------------------------------------------------------


def claims(folder, numbers, done):
    """Tries to claim them all, again and again, and notes what it did while it had one."""
    for number in 3 * numbers:
        handle = lock(folder / f"{number}.claim")
        if handle is None:
            continue
        result = folder / str(number)
        if not result.exists():
            begun = time.monotonic_ns()
            time.sleep(0.001)
            result.write_text("done")
            done.put((number, begun, time.monotonic_ns()))
        os.close(handle)


def test_of_200_claims_by_8_processes_each_is_had_once(tmp_path):
    context = multiprocessing.get_context("fork")
    done = context.SimpleQueue()
    numbers = list(range(200))
    workers = [context.Process(target=claims, args=(tmp_path, numbers[k:] + numbers[:k], done)) for k in range(8)]
    [worker.start() for worker in workers]
    entries = []
    while len(entries) < 200:
        entries.append(done.get())
    [worker.join() for worker in workers]
    assert done.empty() and sorted(number for number, *_ in entries) == numbers


def rows_without_seconds(folder):
    lines = study.read_table(folder / "study.csv")
    return [{k: v for k, v in line.items() if not k.endswith(" s")} for line in lines]


def test_two_workers_of_which_one_is_killed_leave_what_one_alone_does(tmp_path):
    flags = ["--networks", "resnet18", "resnetk1:2", "--method", "simclr", "--seeds", "1"]
    run_study(tmp_path / "alone", *flags)
    command = [sys.executable, ROOT / "study.py", *TINY, *STUDY, *flags, "--output-dir", tmp_path / "shared"]
    command = list(map(str, command))
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("shared/runs/*/log.txt")):  # in the midst of its first run, or at its end
        time.sleep(0.05)
        assert first.poll() is None
    second = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(120) == 0
    assert rows_without_seconds(tmp_path / "shared") == rows_without_seconds(tmp_path / "alone")


def test_what_is_there_is_neither_trained_nor_measured_again(tmp_path, capsys):
    run_study(tmp_path, "--networks", "resnet18", "--seeds", 1)
    place = next(tmp_path.glob("runs/*"))
    before = {name: (place / name).stat().st_mtime_ns for name in ("backbone.pth", "row.json")}
    run_study(tmp_path, "--networks", "resnet18", "--seeds", 1)
    assert {name: (place / name).stat().st_mtime_ns for name in before} == before
    assert not (place / "checkpoint.pth").exists()
    for i in range(30):
        path = tmp_path / "source" / ("test" if i % 3 == 0 else "train") / str(i % 2) / f"{i}.png"
        save_png(torch.full((3, 16, 16), 8 * i, dtype=torch.uint8), path)
    (tmp_path / "more").symlink_to(tmp_path / "source")
    run_study(tmp_path, "--networks", "resnet18", "--seeds", 1, "--measure-on", "shapes", tmp_path / "more")
    assert (place / "backbone.pth").stat().st_mtime_ns == before["backbone.pth"]
    line = study.read_table(tmp_path / "study.csv")[0]
    assert line["shapes linear"] > 0 and line["more linear"] >= 0 and line["torch"] == torch.__version__
    shown = f"| resnet18 | 1 | {line['shapes linear']:.2f} | {line['more linear']:.2f} |"
    assert shown in (tmp_path / "study.md").read_text()
    table = study.lookup(tmp_path / "study.csv")
    mean, deviation, seeds = table[study.key(BACKBONES["resnet18"], 0.0625)]["shapes linear"]
    assert mean == line["shapes linear"] and math.isnan(deviation) and seeds == 1
    table = [
        (["--lr", 1], "says that this study has --lr None, not 1.0: choose another"),
        (["--heads", "simsiam_cifar10_resnet18"], "set of heads (--heads)"),
    ]
    base = [*TINY, *STUDY, "--output-dir", tmp_path, "--networks", "resnet18"]
    all_refused(capsys, study, base, table)


def test_a_broken_run_is_a_row_and_the_study_goes_on(tmp_path, capsys, monkeypatch):
    pretrains = study.pretrain.main

    def breaks(args, images, until):
        if "mobilenet-v2" in args.output_dir:
            raise RuntimeError("CUDA out of memory")
        if args.seed == 0:
            args.lr = 1e30
        return pretrains(args, images, until)

    measure = study.linear_eval.measure

    def breaks_too(backbone, *rest, **how):
        if backbone.feature_dim > 32:  # resnet50's
            raise RuntimeError("no memory to measure")
        return measure(backbone, *rest, **how)

    monkeypatch.setattr(study.pretrain, "main", breaks)
    monkeypatch.setattr(study.linear_eval, "measure", breaks_too)
    run_study(tmp_path, "--networks", "mobilenet_v2", "resnet50", "resnet18", "--epochs", 3)
    lines = {(line["network"], line["seed"]): line for line in study.read_table(tmp_path / "study.csv")}
    assert "out of memory" in lines["mobilenet_v2", 0]["error"]
    assert lines["resnet50", 1]["error"] == "measured on shapes: no memory to measure"
    assert "not finite" in lines["resnet18", 0]["error"] or "is nan" in lines["resnet18", 0]["error"]
    assert not lines["resnet18", 1]["error"] and lines["resnet18", 1]["shapes linear"] > 0
    assert "Broken: mobilenet_v2 seed 0: CUDA out of memory" in (tmp_path / "study.md").read_text()
    assert "broken: CUDA out of memory" in capsys.readouterr().out


def test_wrong_studies_are_told_in_one_line_before_anything_starts(tmp_path, capsys):
    (tmp_path / "closed").write_text("a file")
    table = [
        ([], "which networks?"),
        (["--networks", "resnet19"], "--networks resnet19: neither an arch.json nor one of ssa"),
        (["--networks", "resnet"], "how many random ones? resnet:8"),
        (["--networks", "resnet:0"], "a number above 0"),
        (["--networks", "resnet:8", "--target-macs", "1e12"], "no network of the space has"),
        (["--networks", "heads:2", "--method", "diet"], "has no heads to choose"),
        (["--networks", "resnet18", "--measure-on", "nowhere"], "neither a folder nor a data set's name"),
        (["--networks", "resnet18", "--measure-on", "shapes", "shapes"], "two of them have one name"),
        (["--networks", "resnet18", "--seeds", 0], "--seeds 0: must be above 0"),
        (["--networks", "resnet18", "--bench"], "--bench and --profile are for one run"),
        (["--search", tmp_path / "nothing"], "No such file"),
        (["--report"], "there is nothing to report"),
        (["--networks", "resnet18", "--output-dir", tmp_path / "closed" / "x"], "Not a directory"),
    ]
    all_refused(capsys, study, [*TINY, *STUDY, "--output-dir", tmp_path / "out"], table)
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_what_a_search_found_is_trained_beside_random_ones(tmp_path):
    run(search, tmp_path / "searched", *BOTH, "--epochs", 2, "--method", "simclr", "--recalibrate-batches", 2)
    flags = ["--search", tmp_path / "searched", "--networks", "heads+resnet:2", "--target-macs", "0.5xresnet18"]
    run_study(tmp_path / "study", *flags, "--method", "simclr")
    lines = study.read_table(tmp_path / "study" / "study.csv")
    found = "found (searched)"
    counts = {found: 2, f"{found}, trained on": 2, f"{found}, inherited": 1, "handcrafted": 2, "random heads+resnet": 4}
    counts["handcrafted, scaled"] = 2
    assert Counter(line["family"] for line in lines) == counts
    arch = json.loads((tmp_path / "searched" / "arch.json").read_text())
    by_family = {line["family"]: line for line in lines}
    assert by_family[found]["arch"] == arch["backbone"]["arch"] and by_family[found]["heads"] == arch["heads"]
    assert by_family[found]["macs"] == arch["backbone"]["macs"] and by_family["handcrafted"]["network"] == "resnet18"
    assert by_family["handcrafted, scaled"]["macs"] == pytest.approx(0.975 * arch["backbone"]["target_macs"], rel=0.026)
    report = (tmp_path / "study" / "study.md").read_text()
    value = np.array([line["shapes linear"] for line in lines if line["family"] == found])
    random = np.array([line["shapes linear"] for line in lines if line["family"].startswith("random")])
    assert f"{value.mean():.2f} ± {value.std(ddof=1):.2f}; {100 * (value.mean() / random.mean() - 1):+.1f} (" in report
    assert "| the one of random heads+resnet with the least held-out loss (2 runs) |" in report
    svg = xml.etree.ElementTree.parse(tmp_path / "study" / "study-found.svg").getroot()
    assert len(list(svg.iter(f"{SVG}circle"))) == len(lines) + 2  # that one's dots are shown again


# ---- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path):
    """A study of 24 ResNets and 12 MobileNets in which one quality rules all scenarios but 'other'."""
    args, rng = arguments(tmp_path), np.random.default_rng(0)
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
    run_study(made_up, "--report")
    said = capsys.readouterr().out
    ratio = re.search(r"ResNets, shapes: networks differ by .* points, seeds by .*, ratio ([\d.]+)\n", said)
    assert float(ratio[1]) > 10  # of 5 points and .2
    report = (made_up / "study.md").read_text()
    assert "36 networks, 72 runs (`--data a/shapes --epochs 1`), 3 data sets" in report
    assert "## ResNets: 24, 2 seeds" in report and "## MobileNets: 12, 2 seeds" in report
    cells = {line.split(" | ")[0]: line.split(" | ") for line in report.splitlines() if line.startswith("| ")}
    assert float(cells["| same"][4].split()[0]) > 0.95 and abs(float(cells["| other"][4].split()[0])) < 0.6
    assert abs(float(cells["| same"][6].split()[0])) < 1 < float(cells["| other"][6].split()[0])
    assert float(cells["| training loss"][2].split()[0]) > 0.9 and "| held-out loss" not in cells  # constant
    assert "| depth of stage 1" in cells and "| width" not in cells
    for name in ("correlations", "costs", "ranks"):
        assert xml.etree.ElementTree.parse(made_up / f"study-{name}.svg").getroot().get("width")
    # from the table alone, as others have it
    (made_up / "runs").rename(made_up / "gone")
    (made_up / "study.md").unlink()
    run_study(made_up, "--report")
    assert (made_up / "study.md").read_text() == report


def test_networks_of_one_family_and_weights_of_a_search_are_kept_apart(made_up):
    study.write_table(made_up)
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
    study.write_table(made_up)
    again = study.lookup(made_up / "study.csv")
    key = study.key(a["arch"], a["width"])
    assert again[key]["same linear"][2] == known[key]["same linear"][2] + 1  # that of "arch"
    assert again[key]["same linear"][0] < 90
    text, _ = study.found_table(study.read_table(made_up / "study.csv"), ["same"])
    assert "| arch: network 0 (1 runs) | arch: network 1 (1 runs) |" in text


def test_a_search_that_kept_the_handcrafted_heads_has_found_these(tmp_path):
    (tmp_path / "arch.json").write_text(json.dumps({"space": ["heads"], "backbone": {"arch": "resnet18", "width": 1}}))
    (network,) = study.found_by(str(tmp_path), arguments(tmp_path))
    assert (network.family, network.arch, network.heads) == ("handcrafted", "resnet18", None)


def test_a_study_under_way_has_a_report(made_up):
    files = sorted((made_up / "runs").glob("*/row.json"))
    rows = [json.loads(file.read_text()) for file in files]
    for k, (file, row) in enumerate(zip(files, rows)):
        if k < 3:  # of another family, which one data set is missing for
            row["family"] = f"found {k}"
            del row["scores"]["same"]
        row["macs"] = None  # as of a ViT
        file.write_text(json.dumps(row))
    run_study(made_up, "--report")
    report = (made_up / "study.md").read_text()
    assert "## Found and random networks" in report and "eight networks of a family" not in report
    assert "| nan |" not in report.split("| same |")[-1].split("\n")[0]
    for file, row in zip(files, rows):
        file.write_text(json.dumps({**row, "scores": {}}))
    with pytest.raises(SystemExit, match=r"nothing in .* is measured yet"):
        run_study(made_up, "--report")


def test_pictures_show_every_number_and_the_front():
    svg = draw_matrices({"p": (["a", "b"], ["x", "y"], [[1.0, -0.5], [math.nan, 0.25]])}, "t", (-1, 1), 2)
    root = xml.etree.ElementTree.fromstring(svg)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"1.00", "-.50", ".25", "a", "b", "x", "y", "p"} <= set(texts)
    svg = draw_costs({"s": [(1, 40), (2, 39), (4, 45), (8, 44)]}, "t")
    line = next(xml.etree.ElementTree.fromstring(svg).iter(f"{SVG}polyline"))
    assert len(line.get("points").split()) == 2
