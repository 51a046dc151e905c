"""The three scripts: search, resume, measures, and what they say to a wrong command."""

import argparse
import copy
import json
import math
import os
import re
import socket
import subprocess
import sys
import xml.etree.ElementTree
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, arguments, load, refused, run
from PIL import Image
from torch import nn
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode

import compare
import data
import launch
import linear_eval
import optim
import pretrain
import search
from checkpoint import Keeper, load_backbone
from data import make_shapes
from linear_eval import extract
from losses import METHODS
from models import BACKBONES, OPS, PRESETS, SPACES, SearchHead, build_backbone, head_dims, macs, true_name
from search import Search, alpha_gradients

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    run(search, folder)
    return folder


# ---- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.classifies_instances])
def test_an_alpha_step_moves_alphas_alone_and_a_weight_step_never(method, tmp_path):
    s = Search(arguments(search, tmp_path, "--method", method))
    views, index = s.run.batch(s.run.parts[1], 0, (0,))
    before = copy.deepcopy(s.method.state_dict())
    _, cheap = alpha_gradients(s.method, s.method, views, index, s.alphas, s.weights)
    for a in s.alphas:
        a.requires_grad_(True)
    full = torch.autograd.grad(s.method(views, index), [*s.alphas, *s.weights])
    assert all(torch.equal(a, b) for a, b in zip(cheap, full)) and all(g.abs().sum() > 0 for g in cheap)
    s.method.load_state_dict(before)
    for a in s.alphas:
        a.requires_grad_(False)

    def changed(step):
        old = copy.deepcopy(s.method.state_dict())
        step()
        return {k for k, v in s.method.state_dict().items() if not torch.equal(v, old[k])}

    alphas = {k for k in before if k.endswith("alpha")}
    assert changed(lambda: s.alpha_step(s.run.parts[1], 0)) == alphas
    moved = changed(lambda: s.weight_step(s.run.parts[0], 0, 0.5))
    assert moved and not moved & alphas and "encoder.conv1.weight" in moved and "encoder.bn1.running_mean" in moved


@pytest.mark.parametrize("more", [["--method", "simclr"], ["--method", "diet", "--space", "resnet"]])
def test_alphas_learn_in_fp32_whatever_the_weights_do(more, tmp_path):
    steps = []
    for amp in ("--amp", "--no-amp"):
        s = Search(arguments(search, tmp_path, amp, *more))
        assert s.run.amp == (amp == "--amp")
        loss = s.alpha_step(s.parts[-1], 0, s.warmup)
        steps.append([loss, *s.gradients, *(alpha.detach() for alpha in s.alphas)])
    assert all(torch.equal(a, b) for a, b in zip(*steps)) and all(x.dtype == torch.float32 for x in steps[0])


def test_the_halves_are_disjoint_and_as_large_as_the_papers():
    held_out, a, b = data.split_images(50_000, 0.0, 2)
    assert len(held_out) == 0 and len(a) == len(b) == 25_000 and len(a) // 512 == 48
    assert len(torch.cat([a, b]).unique()) == 50_000
    held_out, a, b = data.split_images(1000, 0.1, 2)
    assert [len(held_out), len(a), len(b)] == [100, 450, 450] and len(torch.cat([held_out, a, b]).unique()) == 1000


def test_a_search_leaves_its_record(searched):
    found = json.loads((searched / "arch.json").read_text())
    assert {n: len(ops) for n, ops in found["heads"].items()} == {"projector": 6, "predictor": 4}
    lines = [json.loads(line) for line in (searched / "log.txt").read_text().splitlines()][1:]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3] and lines[-1]["ops"] == found["heads"]
    assert np.ptp(lines[0]["alphas"]["projector"]) == 0 and np.ptp(lines[-1]["alphas"]["projector"]) > 1e-3
    assert lines[0]["entropy"]["predictor"] == pytest.approx([1] * 4) and max(lines[-1]["entropy"]["predictor"]) < 1
    assert (
        {"loss", "alpha_loss", "lr", "z_std", "rankme"} <= lines[-1].keys() and "knn" in lines[0] and "knn" in lines[-1]
    )
    svg = xml.etree.ElementTree.parse(searched / "search.svg").getroot()
    texts = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    dims = {name: head_dims(*space) for name, space in METHODS["simsiam"].heads(32).items()}
    shown = [true_name(op, *io) for name, ops in found["heads"].items() for op, io in zip(ops, pairwise(dims[name]))]
    assert all(texts.count(op) == shown.count(op) + (op in OPS) for op in shown)  # once in the legend
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}polyline"))) == 7 * 10


def test_what_was_found_pretrains_by_the_printed_command(searched, capsys):
    run(search, searched)  # finished: says again what it found
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert command[:2] == ["torchrun", "pretrain.py"] and command[command.index("--heads") + 1] == str(
        searched / "arch.json"
    )
    args = pretrain.get_parser().parse_args(command[2:])
    assert pretrain.Run(args).method.projector[0][0] is not None
    assert (args.width, args.batch_size, args.max_images, args.epochs) == (0.0625, 16, 160, 3)


def test_compare_puts_found_beside_handcrafted_and_random(searched):
    flags = ["--compare", 2, "--compare-seeds", 1, "--compare-epochs", 1]
    run(search, searched, *flags)
    table = (searched / "compare" / "compare.md").read_text()
    rows = {
        r.split("|")[1].strip(): [c.strip() for c in r.split("|")[2:-1]] for r in table.splitlines() if r[:2] == "| "
    }
    told = ["what may tell", "training loss", "RankMe", "held-out kNN (needs labels)"]
    assert list(rows) == ["network", "found", "handcrafted", "random (2 of them)", *told]
    files = sorted((searched / "compare").glob("*/scores.json"))
    score = {p.parent.name: 100 * json.loads(p.read_text())["shapes"]["linear"] for p in files}
    assert list(score) == ["found-seed0", "handcrafted-seed0", "random-1-seed0", "random-2-seed0"]
    randoms = [score["random-1-seed0"], score["random-2-seed0"]]
    base = np.mean(randoms)
    assert rows["random (2 of them)"][2:] == [f"{base:.2f} ± {np.std(randoms, ddof=1):.2f}", "+0.00"]
    found = score["found-seed0"]
    assert rows["found"][2:] == [f"{found:.2f}", f"{100 * (found - base) / base:+.2f}"]
    ends = [json.loads((p.parent / "log.txt").read_text().splitlines()[-1]) for p in files]
    for what, key, sign in (("training loss", "loss", -1), ("RankMe", "rankme", 1)):
        tau = compare.kendall_tau([sign * end[key] for end in ends], list(score.values()))
        assert rows[what] == [f"{tau:+.2f}"]
    written = [p.stat().st_mtime_ns for p in files]
    run(search, searched, *flags)
    assert [p.stat().st_mtime_ns for p in files] == written  # what is there is not done again


@pytest.mark.parametrize("space", [[], ["--space", "resnet", "heads"]])
def test_benches_report(space, tmp_path, capsys):
    if not space:
        file = tmp_path / "bench.json"
        figures = run(pretrain, tmp_path / "run", "--bench", "--bench-json", file)
        assert figures["memory"] >= figures["memory_before"] > 2**20 and min(figures["seconds"].values()) > 0
        said, written = capsys.readouterr().out, json.loads(file.read_text())
        assert "views, loss and optimiser add" in said and "peak memory" in said
        assert written.items() >= figures.items() and written["command"].startswith("torchrun pretrain.py --width")
        file.unlink()
    assert run(search, tmp_path, "--bench", *space) == {}
    said = capsys.readouterr().out
    assert "largest difference 0\n" in said and "an iteration is" in said
    assert ("plain step of the largest: " in said) == bool(space) and not list(tmp_path.iterdir())


# ---- the search of a backbone ---------------------------------------------------------------------------------------

BOTH = ["--space", "heads", "resnet", "--image-size", "16", "--target-macs", "0.5xresnet18"]


@pytest.fixture(scope="module")
def found_both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return folder, run(search, folder, *BOTH)


def test_heads_and_backbone_are_found_together_and_the_usual_commands_go_on(found_both, tmp_path, capsys):
    folder, found = found_both
    capsys.readouterr()
    assert json.loads((folder / "arch.json").read_text()) == found and found["space"] == ["heads", "resnet"]
    assert {n: len(ops) for n, ops in found["heads"].items()} == {"projector": 6, "predictor": 4}
    facts = found["backbone"]
    network, _ = build_backbone(facts["arch"], facts["stem"], facts["width"])
    cost = macs(facts["arch"], facts["width"], facts["stem"], 16)
    assert 0.95 * facts["target_macs"] <= cost == facts["macs"] <= facts["target_macs"]
    assert facts["target_macs"] == macs(BACKBONES["resnet18"], 0.0625, "small", 16) / 2
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    for picture in ("search.svg", "backbone.svg"):
        svg = xml.etree.ElementTree.parse(folder / picture).getroot()
    boxes = [r for r in svg.iter("{http://www.w3.org/2000/svg}rect") if r.get("rx") == "3"]
    assert len(boxes) == sum(facts["arch"]["depth"]) + 8
    facts = load_backbone(str(folder / "backbone.pth"))[1]
    assert facts["arch"] == found["backbone"]["arch"]
    run(search, folder, *BOTH)  # finished: says again what it found
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert [command[command.index(f) + 1] for f in ("--arch", "--heads")] == [str(folder / "arch.json")] * 2
    command[command.index("--output-dir") + 1] = str(tmp_path)
    pretrain.main(pretrain.get_parser().parse_args([*command[2:], "--weights", str(folder / "backbone.pth")]))
    assert f"--weights {tmp_path / 'backbone.pth'}" in capsys.readouterr().out
    flags = ["--weights", str(tmp_path / "backbone.pth"), "--max-images", "200", "--epochs", "2"]
    assert linear_eval.main(linear_eval.get_parser().parse_args(flags))[0]["linear"] > 0
    assert "basic " in (tmp_path / "linear_eval-shapes.md").read_text()


def test_weights_are_where_pretraining_starts(found_both, tmp_path):
    folder, _ = found_both
    flags = ["--arch", folder / "arch.json", "--weights", folder / "backbone.pth", "--image-size", 16]
    method = pretrain.Run(arguments(pretrain, tmp_path, *flags, "--method", "moco")).method
    for key, value in load(folder / "backbone.pth").items():
        assert torch.equal(method.encoder.state_dict()[key], value)
        assert torch.equal(method.momentum_encoder.state_dict()[key], value)


@pytest.mark.parametrize("method", METHODS)
def test_a_backbones_alpha_step_moves_all_alphas_and_nothing_else(method, tmp_path):
    flags = ["--method", method, "--space", "mobilenet", "--image-size", 16, "--cost-weight", 0, "--width", 0.0625]
    s = Search(arguments(search, tmp_path, *flags, "--arch-warmup", 0))
    s.weight_step(s.run.parts[0], 0, 0.1, 0)
    before = copy.deepcopy(s.method.state_dict())
    s.alpha_step(s.parts[1], 0, 1)
    after = copy.deepcopy(s.method.state_dict())
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.endswith("alpha")}
    assert all((alpha.abs().sum(1) > 0).all() for alpha in s.choices.alphas())
    assert torch.cat([a.sum(1) for a in s.choices.alphas()]).abs().max() < 1.0  # Adam's, of gradients that sum to 0
    s.weight_step(s.run.parts[0], 1, 0.2, 1)
    changed = {k for k, v in s.method.state_dict().items() if not torch.equal(v, after[k])}
    assert changed and not any(k.endswith("alpha") for k in changed)
    assert not any(g.requires_grad for g in s.choices.gates)


def test_the_warm_up_takes_uniform_and_largest_networks_in_turn(tmp_path):
    s = Search(arguments(search, tmp_path, "--space", "resnet", "--image-size", 16, "--epochs", 8))
    assert s.warmup == 8 * s.run.steps_per_epoch // 4 == 8
    largest = []
    for step in range(s.warmup + 4):
        s.sample(step, alphas=False)
        largest.append(s.choices.choice() == s.choices.largest)
    assert largest == [step % 2 == 1 and step < s.warmup for step in range(s.warmup + 4)]


@pytest.mark.parametrize("space", ["resnet", "mobilenet"])
def test_the_target_is_met(space, tmp_path):
    for target in (0.6, 1.0, 1.4):
        for seed in range(5):
            name = SPACES[space].handcrafted
            flags = ["--space", space, "--target-macs", f"{target}x{name}", "--seed", seed, "--image-size", 16]
            s = Search(arguments(search, tmp_path, *flags, "--arch-lr", 0.3))
            s.alpha_optimizer.zero_grad()
            for alpha in s.alphas:
                alpha.grad = torch.randn(alpha.shape)
            s.alpha_optimizer.step()
            choice = s.derive()
            cost = macs(s.space.arch(choice), 0.0625, "small", 16)
            assert cost == s.macs(choice)
            assert 0.95 <= cost / (target * macs(BACKBONES[name], 0.0625, "small", 16)) <= 1


@pytest.mark.parametrize("share", [0.3, 0.6, 1.6, 4.0])
def test_alphas_start_at_the_target_with_the_least_change(share, tmp_path):
    flags = ["--space", "resnet", "--image-size", 16, "--target-macs", f"{share}xresnet18"]
    s = Search(arguments(search, tmp_path, *flags))
    s.meet_target()
    assert 0.95 <= s.state()["expected_macs"] / s.target <= 1
    moved = [a.clone() for a in s.alphas]
    s.meet_target()
    assert all(torch.equal(a, b) for a, b in zip(s.alphas, moved))  # nothing to do
    assert all((a.diff(dim=1) * (1 if share > 1.5 else -1) > 0).all() for a in s.alphas)  # all to the same side
    assert (max(a.abs().max() for a in s.alphas) < 1.2) == (share in (0.6, 1.6))


def test_the_cost_pulls_the_expectation_to_the_target(tmp_path):
    flags = ["--space", "resnet", "--image-size", 16, "--target-macs", "0.7xresnet18"]
    s = Search(arguments(search, tmp_path, *flags))
    for group in s.alpha_optimizer.param_groups:
        group["lr"] = 0.03
    for _ in range(150):
        for alpha in s.alphas:
            alpha.grad = torch.randn(alpha.shape)
        own = torch.cat([a.grad.flatten() for a in s.alphas])
        gradients = s.cost_gradients()
        cost = torch.cat([g.flatten() for g in gradients])
        assert cost.norm().item() == pytest.approx(s.args.cost_weight * own.norm().item(), rel=1e-4)
        for alpha, gradient in zip(s.alphas, gradients):
            alpha.grad += gradient
        s.alpha_optimizer.step()
    assert s.state()["expected_macs"] == pytest.approx(s.target, rel=0.1)


@pytest.mark.parametrize("strategy", ["random", "supernet-random"])
def test_baselines_choose_by_the_held_out_loss_at_the_gradient_searchs_cost(strategy, tmp_path, capsys):
    flags = ["--space", "resnet", "--image-size", 16, "--strategy", strategy, "--candidates", 2, "--epochs", 4]
    found = run(search, tmp_path, *flags, "--recalibrate-batches", 2, "--method", "simclr")
    said = capsys.readouterr().out
    epochs = int(re.search(r"2 candidates, (\d+) epochs", said)[1])
    s = Search(arguments(search, tmp_path / "g", *flags, "--strategy", "gradient"))
    mean, most = s.state()["expected_macs"], s.macs(s.choices.largest)
    steps = 4 * 4  # of a half of 64 images
    budget = steps / 4 * (mean + most) / 2 + steps * 3 / 4 * (most + (mean + s.target) / 2)
    if strategy == "random":
        spent = 2 * epochs * 8 * s.target
        losses = [float(x) for x in re.findall(r"held-out loss ([\d.]+)", said)]
        assert len(losses) == 2 and found["held_out_loss"] == pytest.approx(min(losses), abs=1e-4)
    else:
        spent = epochs * 8 * (mean + most) / 2 + 2 * (2 + 2) * s.target / 3
    assert abs(spent - budget) <= 0.6 * (2 if strategy == "random" else 1) * 8 * max(s.target, (mean + most) / 2)
    assert found["strategy"] == strategy and (tmp_path / "backbone.pth").exists()
    assert 0.95 <= found["backbone"]["macs"] / s.target <= 1


def test_compare_trains_a_found_backbone_beside_random_ones(found_both, tmp_path):
    folder = tmp_path / "run"
    flags = ["--space", "resnet", "--image-size", 16, "--method", "simclr", "--epochs", 1, "--recalibrate-batches", 2]
    run(search, folder, *flags)
    more = ["--compare", 2, "--compare-seeds", 2, "--compare-epochs", 1, "--compare-with", found_both[0] / "arch.json"]
    run(search, folder, *flags, *more, "--compare-data", "shapes", "shapes")
    table = (folder / "compare" / "compare.md").read_text()
    rows = {
        r.split("|")[1].strip(): [c.strip() for c in r.split("|")[2:-1]] for r in table.splitlines() if r[0:2] == "| "
    }
    names = ["found", "found, trained on", "found, inherited", "handcrafted", found_both[0].name, "random (2 of them)"]
    assert list(rows)[1:7] == names and [rows[n][2] for n in names] == ["2", "2", "1", "2", "2", "4"]
    assert "Kendall's tau with the linear accuracy from scratch, over 5 networks (by chance 0 ± 0.41)" in table
    inherited = [f"held-out {what}, inherited weights, 4 networks" for what in ("loss", "kNN (needs labels)")]
    told = ["training loss", "RankMe", "held-out kNN (needs labels)", "MACs", *inherited]
    assert list(rows)[8:] == told and all(-1 <= float(rows[what][0]) <= 1 for what in told)
    target = macs(BACKBONES["resnet18"], 0.0625, "small", 16) / 1e6
    assert all(0.94 * target <= float(rows[n][0]) <= 1.01 * target for n in names if n != found_both[0].name)
    svg = xml.etree.ElementTree.parse(folder / "compare" / "compare.svg").getroot()
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) == 13


def test_the_alphas_signal_is_the_mean_gradient_in_units_of_its_noise(tmp_path):
    s, g = Search(arguments(search, tmp_path)), torch.Generator().manual_seed(0)
    for share in (0.5, 0.0):
        s.gradients = list(3 * (torch.randn(4000, 70, generator=g) + share))
        assert s.signal() == pytest.approx(share, abs=0.02) and s.gradients == []


def test_spreads_between_networks_and_between_seeds():
    rng = np.random.default_rng(0)
    runs = rng.normal(0, 2, (4000, 1)) + rng.normal(0, 3, (4000, 3))
    assert compare.spreads(runs.tolist()) == pytest.approx([2, 3], rel=0.05)
    assert compare.spreads([[1.0, 3.0], [3.0, 1.0]]) == pytest.approx((0, 2**0.5))


def test_kendalls_tau():
    assert compare.kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert compare.kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert compare.kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert compare.kendall_tau([1, 2], [5, 5]) == 0


def test_wrong_searches_are_told_in_one_line(tmp_path, capsys):
    for flags, message in [
        (["--space", "resnet", "mobilenet"], "one backbone space at the most"),
        (["--space", "heads", "heads"], "nothing twice"),
        (["--space", "resnet", "--arch", "resnet50"], "--arch means nothing where a backbone is searched"),
        (["--heads", "simsiam_cifar10_resnet18"], "--heads means nothing where heads are searched"),
        (["--target-macs", "1e6"], "--target-macs means nothing to --space heads"),
        (["--strategy", "random"], "--strategy random is for a backbone alone"),
        (["--space", "resnet", "--target-macs", "0.5*resnet18"], "is neither a number nor like 0.5xresnet18"),
        (["--space", "resnet", "--target-macs", "1e12"], "no network of the space has"),
        (["--space", "resnet", "--tau", 0, 1], "must be above 0"),
        (
            ["--space", "resnet", "--compare", 1, "--compare-with", "none.json"],
            "'none.json' is neither a readable file",
        ),
        (["--compare", 1, "--compare-data", tmp_path.parent / "none"], "neither a folder nor a data set's name"),
        (["--space", "resnet", "--arch-warmup", 1], "must be a share"),
        (["--space", "resnet", "--strategy", "random", "--held-out", 0], "do not fill a batch"),
        (["--space", "resnet", "--strategy", "random", "--candidates", 999], "leave no epoch"),
        (["--method", "diet"], "--method diet has no heads to search"),
    ]:
        said, status = refused(capsys, search, *TINY, "--output-dir", tmp_path, *flags)
        assert message in said and status == 1, (flags, said)
    assert not list(tmp_path.iterdir())


# ---- pretrain -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_record(pretrained):
    lines = [json.loads(line) for line in (pretrained / "log.txt").read_text().splitlines()][1:]
    assert [line["epoch"] for line in lines] == [1, 2, 3] and ["knn" in line for line in lines] == [False, True, True]
    facts = json.loads((pretrained / "backbone.json").read_text())
    assert (facts["arch"], facts["width"], facts["stem"], facts["data"]) == ("resnet18", 0.0625, "small", "shapes")
    assert "--max-images 160" in facts["command"] and facts["versions"]["torch"] == torch.__version__
    assert Image.open(pretrained / "views.png").size[0] > 32 * 8


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "simclr", "--optimizer", "adamw"],
        ["--method", "moco", "--queue-size", 32],
        ["--heads", "simsiam_cifar10_resnet18"],
        ["--projector", "none", "--teacher", "ema"],
        ["--method", "diet", "--projector", "mlp", "--views-per-image", 2, "--recipe", "diet-2"],
    ],
)
def test_methods_optimisers_and_presets_train(more, tmp_path):
    facts = run(pretrain, tmp_path, "--epochs", 1, *more)
    assert math.isfinite(facts["loss"]) and ("normalised" in facts) == ("diet" in more)
    if "diet" in more:  # of the 128 images that are trained on; the classifier stays in the checkpoint
        assert load(tmp_path / "checkpoint.pth")["method"]["classifier.weight"].shape == (128, 32)
        assert not any("classifier" in key for key in load(tmp_path / "backbone.pth"))
        floor, chance = METHODS["diet"].floor.fget(argparse.Namespace(smoothing=0.8, n=128)), math.log(128)
        assert facts["normalised"] == pytest.approx((chance - facts["loss"]) / (chance - floor))


def test_the_flop_of_a_step_are_counted(tmp_path):
    """SimSiam's and MoCo's, beside torch's own count of a whole step: ResNet has no grouped convolutions, and the first
    layer's gradient to the images is not needed."""
    for method in ("simsiam", "moco"):
        r = pretrain.Run(arguments(pretrain, tmp_path, "--method", method))
        views, index = r.batch(r.parts[0], 0, (0,))
        with FlopCounterMode(display=False) as counter:
            sum(o.sum() for o in r.method.outputs(views, index) if o.requires_grad).backward()
        first = 2 * 2 * 16 * 32 * 32 * 3 * 9 * 4  # 2 MAC; two views of 16 images of 32 px, 3x3, 3 to 4 channels
        assert pretrain.step_flop(r, views, index) == counter.get_total_flops() + first


def test_a_profile_is_a_trace_of_three_steps(tmp_path):
    run(pretrain, tmp_path, "--profile", "--epochs", 1)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(str(e.get("name")).startswith("ProfilerStep#") and e.get("ph") == "X" for e in events) == 3
    assert any("aten::convolution" in str(e.get("name")) for e in events)


def test_an_epoch_visits_every_image_that_is_trained_on_once(tmp_path):
    r = pretrain.Run(arguments(pretrain, tmp_path, "--method", "diet"))
    order = r.shuffled(r.parts[0], 1)
    index = torch.cat([r.batch(order, step, (0, step))[1] for step in range(r.steps_per_epoch)])
    assert index.sort().values.tolist() == list(range(r.method.n)) and r.method.n == 128
    assert r.images.pixels[order].equal(r.images.pixels[r.parts[0]][index])  # the same row is the same image


def test_lars_is_what_its_formula_says():
    rng = np.random.default_rng(0)
    start = [rng.normal(size=(4, 3)), np.zeros((2, 2)), rng.normal(size=5)]
    grads = [[rng.normal(size=s.shape) for s in start] for _ in range(3)]
    params = [nn.Parameter(torch.tensor(s)) for s in start]
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "scale": False}]
    lars = optim.LARS(groups, lr=0.5)
    want, momenta = [s.copy() for s in start], [np.zeros_like(s) for s in start]
    for step in grads:
        for k, (p, g) in enumerate(zip(params, step)):
            p.grad = torch.tensor(g)
            d = g + (0.1 * want[k] if k < 2 else 0)
            norms = np.linalg.norm(want[k]), np.linalg.norm(d)
            q = 1e-3 * norms[0] / norms[1] if k < 2 and min(norms) > 0 else 1.0
            momenta[k] = 0.9 * momenta[k] + q * d
            want[k] = want[k] - 0.5 * momenta[k]
        lars.step()
    for p, w in zip(params, want):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12)


def test_groups_and_schedules_of_the_papers(tmp_path):
    flags = ["--method", "dino", "--arch", "mobilenet_v2", "--width", 1, "--optimizer", "lars", "--batch-size", 1024]
    args = arguments(pretrain, tmp_path, *flags, "--final-lr", 0.0012, "--final-weight-decay", 1e-4)
    encoder, _ = build_backbone("mobilenet_v2")
    method = METHODS["dino"](encoder)
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    optimizer = optim.optimizer_of(named, method, args)
    kinds = {(g["scale"], g["decays"]): g for g in optimizer.param_groups}
    sizes = {k: len(g["params"]) for k, g in kinds.items()}
    assert sizes == {(True, True): 39, (True, False): 17, (False, False): 111 - 2}  # no biases ahead of BN here
    lrs = [optim.set_lr(optimizer, step, 10, 100) for step in range(101)]
    assert lrs[9] == pytest.approx(1.92) and max(lrs) == lrs[9] and lrs[100] == pytest.approx(0.0048)
    assert lrs[0] == pytest.approx(0.192) and lrs[55] == pytest.approx((1.92 + 0.0048) / 2, rel=1e-6)
    assert kinds[True, True]["weight_decay"] == pytest.approx(1e-4) and kinds[True, False]["weight_decay"] == 0
    adamw = optim.optimizer_of(named, method, arguments(pretrain, tmp_path, "--optimizer", "adamw"))
    assert [(len(g["params"]), g["weight_decay"]) for g in adamw.param_groups] == [(56, 0.05), (109, 0.0)]


def test_the_last_layer_is_frozen_in_the_first_epoch(tmp_path):
    for method in ("swav", "dino"):
        r = pretrain.Run(arguments(pretrain, tmp_path, "--method", method))
        for done, frozen in [(0, True), (r.steps_per_epoch - 1, True), (r.steps_per_epoch, False)]:
            views, index = r.batch(r.parts[0], 0, (0,))
            r.method(views, index).backward()
            r.after_backward(done)
            assert all((p.grad is None) == frozen for p in r.method.last_layer.parameters() if p.requires_grad)
            assert r.method.encoder.conv1.weight.grad is not None
            r.method.zero_grad()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", [search, pretrain])
def test_a_gpu_trains_compiled_and_in_bf16(script, tmp_path):
    flags = ["--max-images", "160", "--batch-size", "16", "--epochs", "1", "--output-dir", str(tmp_path)]
    script.main(script.get_parser().parse_args(flags))
    line = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert math.isfinite(line["loss"]) and line["z_std"] > 0


def test_images_without_labels_are_enough(tmp_path, capsys):
    for i, image in enumerate(make_shapes(60).pixels):
        place = tmp_path / "images" / str(i % 3)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    last = run(pretrain, tmp_path / "run", "--data", tmp_path / "images", "--image-size", 16, "--epochs", 1)
    assert "knn" not in last and "no labels" in capsys.readouterr().out
    flags = ["--data", tmp_path / "images", "--image-size", 16, "--epochs", 1, "--resident-gb", 1e-9]
    run(pretrain, tmp_path / "stream", *flags)  # decoded as they are needed: the same run
    whole, stream = (load(tmp_path / name / "backbone.pth") for name in ("run", "stream"))
    assert whole.keys() == stream.keys() and all(whole[k].equal(stream[k]) for k in whole)
    with pytest.raises(SystemExit, match="train/ and test/ or val/"):
        linear_eval.main(linear_eval.get_parser().parse_args(["--weights", str(tmp_path / "run" / "backbone.pth")]))


def test_schedule_warms_up_and_follows_the_cosine():
    ends = {"peak": 1.92, "final_lr": 0.0, "final_decay": None}
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "constant": c} | ends for c in (False, True)]
    optimizer = torch.optim.SGD(groups, 1.92)
    lr = [optim.set_lr(optimizer, s, 10, 100) for s in range(100)]
    assert lr[0] == pytest.approx(0.192) and lr[9] == lr[10] == pytest.approx(1.92)
    assert lr[55] == pytest.approx(0.96) and 0 < lr[99] < 0.001 and sorted(lr[10:], reverse=True) == lr[10:]
    assert optimizer.param_groups[1]["lr"] == 1.92


def test_simsiams_predictor_keeps_its_learning_rate(tmp_path):
    args = arguments(pretrain, tmp_path, "--lr", 0.1, "--batch-size", 32)
    method = pretrain.Run(args).method
    optimizer = optim.optimizer_of([(n, p) for n, p in method.named_parameters() if p.requires_grad], method, args)
    constant = [g for g in optimizer.param_groups if g["constant"]]
    assert len(constant) == 1 and {id(p) for p in constant[0]["params"]} == {
        id(p) for p in method.predictor.parameters()
    }
    assert optimizer.param_groups[0]["peak"] == pytest.approx(0.1 * 32 / 256)
    everything = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(everything) == len([p for p in method.parameters() if p.requires_grad])


def settings(tmp_path, *flags):
    args = arguments(pretrain, tmp_path, *flags)
    encoder, _ = build_backbone(args.arch, "small", args.width)
    return optim.settings_of(METHODS[args.method](encoder), args)


def test_defaults_are_the_fields(tmp_path):
    assert settings(tmp_path, "--batch-size", 512)[:3] == ("sgd", pytest.approx(0.03), 5e-4)  # 2011.10566 on CIFAR
    assert settings(tmp_path, "--batch-size", 128)[1] * 128 / 256 == pytest.approx(0.06)
    assert settings(tmp_path, "--method", "swav")[:3] == ("adamw", 2e-3, 1e-6)
    assert settings(tmp_path, "--method", "simclr", "--lr", 1)[:2] == ("sgd", 1)
    assert settings(tmp_path, "--method", "simclr", "--optimizer", "adamw")[:3] == ("adamw", 1e-3, 0.05)
    vit = "--method", "dino", "--arch", "vit_tiny"
    assert settings(tmp_path, *vit) == ("adamw", 5e-4, 0.04, 2.5e-6, 0.4)
    assert settings(tmp_path, *vit, "--optimizer", "sgd").optimizer == "sgd"
    assert settings(tmp_path, "--method", "diet", "--arch", "vit_tiny")[:3] == ("adamw", 1e-3, 0.05)


def test_a_vit_by_default_decays_its_products_and_not_its_norms(tmp_path):
    args = arguments(pretrain, tmp_path, "--method", "dino", "--arch", "vit_tiny")
    method = METHODS["dino"](build_backbone("vit_tiny", "small", 0.0625)[0])
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    optimizer = optim.optimizer_of(named, method, args)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert all(decays[id(p)] == (0.04 if p.ndim > 1 else 0) for _, p in named)
    optim.set_lr(optimizer, 100, 10, 100)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.4, 0}


def test_all_momenta_are_there_before_the_first_step(tmp_path):
    """Fused SGD fails where some are and others are not: a last layer that thaws, a block that was left out."""
    method = METHODS["dino"](build_backbone("resnet18", "small", 0.0625)[0])
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    with torch.no_grad():
        fused = torch.optim.SGD([p for _, p in named], 0.1, momentum=0.9, fused=True)
    optimizer = optim.optimizer_of(named, method, arguments(pretrain, tmp_path, "--optimizer", "sgd"))
    fused.load_state_dict(fused.state_dict() | {"state": optimizer.state_dict()["state"]})
    for frozen in (True, False):
        for n, p in named:
            p.grad = None if frozen and n.startswith("last_layer") else torch.ones_like(p)
        fused.step()
    assert all(fused.state[p]["momentum_buffer"].abs().max() > 0 for _, p in named)


def test_views_are_the_same_whatever_autocast_is_on(tmp_path):
    flags = ["--method", "diet", "--global-size", 96, "--max-images", 40, "--batch-size", 8]
    run_ = pretrain.Run(arguments(pretrain, tmp_path, *flags, "--amp"))
    plain = run_.batch(run_.parts[0], 0, (0,))[0]
    with torch.autocast("cpu", torch.bfloat16):
        views = run_.batch(run_.parts[0], 0, (0,))[0]
    assert torch.equal(views[0], plain[0]) and views[0].dtype == torch.float32 and views[0].shape[-1] == 96
    run(pretrain, tmp_path / "run", *flags, "--amp", "--epochs", 1)  # its monitor's views too


def test_small_images_get_no_local_views_unless_asked(tmp_path):
    for method in ("swav", "dino"):
        assert len(pretrain.Run(arguments(pretrain, tmp_path, "--method", method)).views.views) == 2
        asked = arguments(pretrain, tmp_path, "--method", method, "--locals", 2)
        assert len(pretrain.Run(asked).views.views) == 4
        large = arguments(pretrain, tmp_path, "--method", method, "--global-size", 72, "--max-images", 40)
        assert len(pretrain.Run(large).views.views) == 8


def spins(command, **more):
    """What libgomp says of each process that loads it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)} | more
    said = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said.stdout + said.stderr)


def test_threads_spin_shortly_however_a_script_is_started():
    python, short = [sys.executable], "1000"
    assert spins([*python, "pretrain.py", "--help"]) == [short]
    assert spins([*python, "-c", "import search"]) == [short] == spins([*python, "-c", "import linear_eval"])
    assert spins([*python, "-c", "import pretrain"], GOMP_SPINCOUNT="77") == ["77"]
    passive = spins([*python, "-c", "import pretrain"], OMP_WAIT_POLICY="passive")
    assert passive and passive != [short]
    two = spins([*python, "-m", "torch.distributed.run", "--nproc-per-node", "2", "pretrain.py", "--help"])
    assert two.count(short) == 2  # and torchrun itself


def test_rankme_and_the_warning_of_collapse():
    eye = torch.eye(16).repeat(4, 1)
    assert pretrain.rankme(eye) == pytest.approx(16, rel=1e-3) and pretrain.rankme(torch.ones(64, 16)) == pytest.approx(
        1, abs=1e-3
    )
    assert pretrain.collapsed({"z_std": 0.98, "rankme": 20.0}, 500) is None
    assert pretrain.collapsed({"z_std": 0.01, "rankme": 20.0}, 10) is None
    assert "collapsed" in pretrain.collapsed({"z_std": 0.01, "rankme": 20.0}, 500)
    assert "collapsed" in pretrain.collapsed({"z_std": 0.98, "rankme": 1.1}, 500)


def test_a_loss_at_chance_is_said_in_words():
    assert "a faster teacher" in pretrain.plateau(math.log(256) * 1.001, math.log(256), 500)
    for loss, chance, steps in ((math.log(256) * 0.99, math.log(256), 500), (1.0, None, 500), (1.0, 1.0, 10)):
        assert pretrain.plateau(loss, chance, steps) is None


def test_a_collapse_is_said_in_words_though_the_loss_looks_fine(tmp_path, capsys):
    flags = ["--epochs", 14, "--knn-every", 0, "--weight-decay", 1, "--lr", 4]  # decay drives the weights to zero
    last = run(pretrain, tmp_path, *flags)
    assert last["loss"] < -0.2 and last["rankme"] < 1.5
    assert "the embedding has collapsed" in capsys.readouterr().out


# ---- two ranks ------------------------------------------------------------------------------------------------------


def rank_main(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for method in METHODS:
        space = {"moco": ["heads", "resnet"], "diet": ["resnet"]}.get(method)
        more = ["--space", *space, "--image-size", "16"] if space else []
        s = Search(arguments(search, folder, "--method", method, "--arch-lr", 0.1, *more))
        gates = []
        for step in range(3):
            s.alpha_step(s.parts[1], step, step)
            s.weight_step(s.parts[0], step, 0.5, s.warmup + step)
            gates.append(s.choices.choice() if more else None)
        h = extract(s.method.encoder, s.run.pixels[:33], s.run.mean, s.run.std, s.run.device)
        state = {k: v for k, v in s.method.state_dict().items() if "running" not in k and "num_batches" not in k}
        views = s.run.batch(s.run.parts[0], 0, (7, 0))[0]
        rows = [state.pop(name) for name in s.method.sharded]
        torch.save(
            {"state": state, "h": h, "views": views, "gates": gates, "rows": rows}, f"{folder}/{method}-{rank}.pth"
        )
        if method == "diet":  # the checkpoint has all rows; each rank gets its own back
            keeper = Keeper(s.run, [s.optimizer], "")
            keeper.save()
            before = copy.deepcopy([s.method.state_dict(), s.optimizer.state_dict()["state"]])
            with torch.no_grad():
                for p in s.weights:
                    p.zero_()
            launch.barrier()
            keeper.load()
            after = [s.method.state_dict(), s.optimizer.state_dict()["state"]]
            assert torch.equal(after[0]["classifier.weight"], rows[0])
            for i, moments in before[1].items():
                assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[1][i][k])) for k, v in moments.items())
    torch.distributed.destroy_process_group()


def test_two_ranks_keep_equal_alphas_weights_and_queues(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, (port, str(tmp_path)), nprocs=2)
    for method in METHODS:
        a, b = (load(tmp_path / f"{method}-{r}.pth") for r in range(2))
        for key in a["state"]:
            assert torch.equal(a["state"][key], b["state"][key]), f"{method} {key}"
        assert any(v.abs().max() > 0.05 for k, v in a["state"].items() if k.endswith("alpha"))
        assert a["h"].shape == (33, 32) and torch.equal(a["h"], b["h"]) and a["gates"] == b["gates"]
        if method == "diet":
            whole = load(tmp_path / "checkpoint.pth")["method"]["classifier.weight"]
            assert torch.equal(torch.cat([a["rows"][0], b["rows"][0]]), whole) and whole.shape == (128, 32)
        if a["gates"][0]:
            assert len(set(map(str, a["gates"]))) == 3
            continue
        one = Search(arguments(search, tmp_path / "one", "--method", method))
        for view, x, y in zip(one.run.batch(one.run.parts[0], 0, (7, 0))[0], a["views"], b["views"]):
            torch.testing.assert_close(torch.cat([x, y]), view, atol=1e-5, rtol=1e-5)


# ---- what a wrong command is told -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [pretrain, search])
def test_a_wrong_command_is_told_in_one_line(script, tmp_path, capsys):
    out = ["--output-dir", tmp_path / "out", "--device", "cpu"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for i in range(3):
        (tmp_path / "three").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "three" / f"{i}.png")
    for flags, message, status in [
        (["--method", "simsiem"], "invalid choice: 'simsiem'", 2),
        (["--arch", "resnet19"], "'resnet19' is neither a readable file nor one of resnet18", 1),
        (["--bacth-size", 3], "unrecognized arguments: --bacth-size", 2),
        (["--data", tmp_path / "none"], "neither a folder nor a data set's name", 1),
        (["--data", tmp_path / "empty"], "no image below", 1),
        (["--data", tmp_path / "three", "--batch-size", 256], "do not fill one batch of 256: lower --batch-size", 1),
        (["--batch-size", 0], "--batch-size 0: must be above 0", 1),
        (["--held-out", 1], "must be a share", 1),
        (["--seed", -1], "--seed -1: must be 0 or above", 1),
        (["--queue-size", 64], "--queue-size means nothing to --method simsiam", 1),
        (["--smoothing", 0.5], "--smoothing means nothing to --method simsiam", 1),
        (["--bench-json", "b.json"], "give both", 1),
        (["--bench", "--bench-json", "no/where/b.json"], "there is no such folder", 1),
        (["--recipe", "diet"], "--method simsiam compares two views of an image, and the recipe has one", 1),
        (["--projector", "none", "--out-dim", 64], "without a projector", 1),
        (["--method", "moco", "--queue-size", 10**6], "larger than the", 1),
        (["--method", "swav", "--queue-size", 10**6], "larger than the", 1),
        (["--clip-grad", 0], "--clip-grad 0.0: must be above 0", 1),
        (["--checkpoint-minutes", -1], "--checkpoint-minutes -1.0: must be above 0, or 0 for never", 1),
        (["--profile", "--max-images", 150, "--held-out", 0, "--epochs", 2], "and this run has", 1),
        (["--output-dir", tmp_path / "file"], "File exists", 1),
        (["--output-dir", "/proc/run"], "/proc/run", 1),
    ]:
        said, code = refused(capsys, script, *out, *flags)
        assert message in said and code == status, (flags, said)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_heads_that_cannot_be_built_are_refused(tmp_path, capsys):
    path = tmp_path / "arch.json"
    heads = {**PRESETS["simsiam_cifar10_resnet18"]}
    for text, message in [
        ("no json", "is not JSON"),
        (json.dumps({"heads": heads | {"predictor": ["linear_gelu"]}}), "unknown operation 'linear_gelu'"),
        (json.dumps({"heads": {"projector": heads["projector"]}}), "for another method"),
    ]:
        path.write_text(text)
        said, status = refused(capsys, pretrain, *TINY, "--output-dir", tmp_path / "out", "--heads", path)
        assert message in said and status == 1
    assert (
        "neither a readable file nor one of default" in refused(capsys, pretrain, *TINY, "--heads", "simsiam_cifar")[0]
    )


def test_weights_that_do_not_fit_are_refused(pretrained, tmp_path, capsys):
    weights = tmp_path / "backbone.pth"
    weights.write_bytes((pretrained / "backbone.pth").read_bytes())
    facts = json.loads((pretrained / "backbone.json").read_text())
    assert "name it with --arch" in refused(capsys, linear_eval, "--weights", weights)[0]
    assert "no weights at" in refused(capsys, linear_eval, "--weights", tmp_path / "none.pth")[0]
    for wrong, message in [
        ({"arch": "mobilenet_v2"}, "is missing"),
        ({"width": 0.125}, "is (4, 3, 3, 3), not (8, 3, 3, 3)"),
    ]:
        (tmp_path / "backbone.json").write_text(json.dumps(facts | wrong))
        said, status = refused(capsys, linear_eval, "--weights", weights)
        assert "backbone.pth' is no" in said and message in said and status == 1
    (tmp_path / "backbone.json").write_text("{")
    assert "is not JSON" in refused(capsys, linear_eval, "--weights", weights)[0]
    (tmp_path / "backbone.json").write_text("[1]")
    assert "a list, where a JSON object should be" in refused(capsys, linear_eval, "--weights", weights)[0]
    (tmp_path / "backbone.json").write_text("{}")
    assert 'does not say what "arch"' in refused(capsys, linear_eval, "--weights", weights)[0]
    (tmp_path / "backbone.json").write_text(json.dumps(facts))
    weights.write_bytes(b"PK\x03\x04 cut")
    assert "damaged" in refused(capsys, linear_eval, "--weights", weights)[0]


@pytest.mark.parametrize("script", [search, pretrain, linear_eval])
def test_flags_take_underscores_and_none_is_a_prefix_of_torchruns(script):
    flags = [o for a in script.get_parser()._actions for o in a.option_strings if o not in ("-h", "--help")]
    theirs = list(get_args_parser()._option_string_actions)
    assert not [(f, t) for f in flags for t in theirs if t.startswith(f)]
    args = script.get_parser().parse_args(
        ["--knn_k=7", "--batch_size", "3", *(["--weights", "a_b"] if script is not search else [])]
    )
    assert args.knn_k == 7 and args.batch_size == 3 and getattr(args, "weights", "a_b") == "a_b"


def test_searched_heads_are_the_searchable_modules(tmp_path):
    s = Search(arguments(search, tmp_path))
    assert all(isinstance(h, SearchHead) for h in s.heads.values()) and set(s.heads) == {"projector", "predictor"}
    assert not any(n.endswith("alpha") for n, p in s.method.named_parameters() if p.requires_grad)
