"""study.py: its networks, its runs shared out and taken over."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections import Counter

import conftest
import numpy as np
import pytest
import torch
from conftest import BOTH, ROOT, SVG, TINY, all_refused, run, save_png

import report
import search
import study
from checkpoint import lock
from models import BACKBONES, SPACES, macs, size_of

STUDY = ["--image-size", "16", "--epochs", "1"]


def arguments(folder, *more):
    return conftest.arguments(study, folder, *STUDY, *more)


def run_study(folder, *more):
    run(study, folder, *STUDY, *more)


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
    lines = report.read_table(folder / "study.csv")
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
    line = report.read_table(tmp_path / "study.csv")[0]
    assert line["shapes linear"] > 0 and line["more linear"] >= 0 and line["torch"] == torch.__version__
    shown = f"| resnet18 | 1 | {line['shapes linear']:.2f} | {line['more linear']:.2f} |"
    assert shown in (tmp_path / "study.md").read_text()
    table = study.lookup(tmp_path / "study.csv")
    mean, deviation, seeds = table[report.key(BACKBONES["resnet18"], 0.0625)]["shapes linear"]
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
    lines = {(line["network"], line["seed"]): line for line in report.read_table(tmp_path / "study.csv")}
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
    lines = report.read_table(tmp_path / "study" / "study.csv")
    found = "found (searched)"
    counts = {found: 2, f"{found}, trained on": 2, f"{found}, inherited": 1, "handcrafted": 2, "random heads+resnet": 4}
    counts["handcrafted, scaled"] = 2
    assert Counter(line["family"] for line in lines) == counts
    arch = json.loads((tmp_path / "searched" / "arch.json").read_text())
    by_family = {line["family"]: line for line in lines}
    assert by_family[found]["arch"] == arch["backbone"]["arch"] and by_family[found]["heads"] == arch["heads"]
    assert by_family[found]["macs"] == arch["backbone"]["macs"] and by_family["handcrafted"]["network"] == "resnet18"
    assert by_family["handcrafted, scaled"]["macs"] == pytest.approx(0.975 * arch["backbone"]["target_macs"], rel=0.026)
    text = (tmp_path / "study" / "study.md").read_text()
    value = np.array([line["shapes linear"] for line in lines if line["family"] == found])
    random = np.array([line["shapes linear"] for line in lines if line["family"].startswith("random")])
    assert f"{value.mean():.2f} ± {value.std(ddof=1):.2f}; {100 * (value.mean() / random.mean() - 1):+.1f} (" in text
    assert "| the one of random heads+resnet with the least held-out loss (2 runs) |" in text
    svg = xml.etree.ElementTree.parse(tmp_path / "study" / "study-found.svg").getroot()
    assert len(list(svg.iter(f"{SVG}circle"))) == len(lines) + 2  # that one's dots are shown again


def test_a_search_that_kept_the_handcrafted_heads_has_found_these(tmp_path):
    (tmp_path / "arch.json").write_text(json.dumps({"space": ["heads"], "backbone": {"arch": "resnet18", "width": 1}}))
    (network,) = study.found_by(str(tmp_path), arguments(tmp_path))
    assert (network.family, network.arch, network.heads) == ("handcrafted", "resnet18", None)
