"""search.py: its steps, what it finds at which cost, and what it leaves."""

import copy
import json
import re
import xml.etree.ElementTree
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import BOTH, TINY, arguments, build, load, refused, run
from torchvision.ops import StochasticDepth

import linear_eval
import pretrain
import search
from checkpoint import load_backbone
from losses import METHODS
from models import BACKBONES, OPS, SPACES, build_backbone, head_dims, macs, true_name
from search import AlphaGradients, Search, alpha_gradients, cost_gradients, meet_target

SVG = "{http://www.w3.org/2000/svg}"
SMALL = ["--space", "resnet", "--image-size", 16]


def make(folder, *more):
    return Search(*pretrain.start(arguments(search, folder, *more)))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    run(search, folder)
    return folder


@pytest.fixture(scope="module")
def found_both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return folder, run(search, folder, *BOTH)


# ---- steps ----------------------------------------------------------------------------------------------------------


def changed_by(method, step):
    old = copy.deepcopy(method.state_dict())
    step()
    return {k for k, v in method.state_dict().items() if not torch.equal(v, old[k])}


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.classifies_instances])
def test_an_alpha_step_of_heads_moves_alphas_alone_by_the_gradients_of_a_full_backward(method, tmp_path):
    s = make(tmp_path, "--method", method)
    views, index = s.alpha_batches(0)
    before = copy.deepcopy(s.method.state_dict())
    _, cheap = alpha_gradients(s.method, s.method, views, index, s.alphas, s.weights)
    for a in s.alphas:
        a.requires_grad_(True)
    full = torch.autograd.grad(s.method(views, index), [*s.alphas, *s.weights])
    assert all(torch.equal(a, b) for a, b in zip(cheap, full)) and all(g.abs().sum() > 0 for g in cheap)
    s.method.load_state_dict(before)
    for a in s.alphas:
        a.requires_grad_(False)
    alphas = {k for k in before if k.endswith("alpha")}
    assert changed_by(s.method, lambda: s.alpha_step(0)) == alphas
    moved = changed_by(s.method, lambda: s.weight_step(0))
    assert moved and not moved & alphas and "encoder.conv1.weight" in moved and "encoder.bn1.running_mean" in moved


@pytest.mark.parametrize("method", METHODS)
def test_an_alpha_step_of_a_backbone_moves_all_alphas_and_nothing_else(method, tmp_path):
    flags = ["--method", method, "--space", "mobilenet", "--image-size", 16, "--cost-weight", 0]
    s = make(tmp_path, *flags, "--arch-warmup", 0)
    s.weight_step(0)
    alphas = {k for k in s.method.state_dict() if k.endswith("alpha")}
    assert changed_by(s.method, lambda: s.alpha_step(1)) == alphas
    assert all((alpha.abs().sum(1) > 0).all() for alpha in s.alphas)
    assert torch.cat([a.sum(1) for a in s.alphas]).abs().max() < 1.0  # Adam's, of gradients that sum to 0
    moved = changed_by(s.method, lambda: s.weight_step(1))
    assert moved and not moved & alphas and not any(g.requires_grad for g in s.choices.gates.values())


@pytest.mark.parametrize("more", [["--method", "simclr"], ["--method", "diet", "--space", "resnet"]])
def test_alphas_learn_in_fp32_whatever_the_weights_do(more, tmp_path):
    steps = []
    for amp in ("--amp", "--no-amp"):
        s = make(tmp_path, amp, *more)
        assert s.args.amp == (amp == "--amp")
        loss = s.alpha_step(s.warmup)
        steps.append([loss, *s.gradients.steps, *(alpha.detach() for alpha in s.alphas)])
    assert all(torch.equal(a, b) for a, b in zip(*steps)) and all(x.dtype == torch.float32 for x in steps[0])


def test_the_warm_up_takes_uniform_and_largest_networks_in_turn(tmp_path):
    s = make(tmp_path, *SMALL, "--epochs", 8)
    assert s.warmup == 8 * s.batches.steps_per_epoch // 4 == 8
    largest = []
    for step in range(s.warmup + 4):
        s.sample(step, alphas=False)
        largest.append(s.choices.choice() == s.choices.largest)
    assert largest == [step % 2 == 1 and step < s.warmup for step in range(s.warmup + 4)]


def test_the_alphas_signal_is_the_mean_gradient_in_units_of_its_noise():
    gradients, g = AlphaGradients(torch.device("cpu")), torch.Generator().manual_seed(0)
    for share in (0.5, 0.0):
        gradients.steps = list(3 * (torch.randn(4000, 70, generator=g) + share))
        assert gradients.signal() == pytest.approx(share, abs=0.02)


def test_dead_alphas_are_named(tmp_path):
    s = make(tmp_path)
    s.gradients.steps = [torch.ones(70), torch.ones(70)]
    assert s.gradients.dead(s.alpha_names()) == []
    for g in s.gradients.steps:
        g[[0, 69]] = 0
    s.gradients.steps[0][5] = 0
    assert s.gradients.dead(s.alpha_names()) == [f"projector 1 {next(iter(OPS))}", f"predictor 4 {list(OPS)[-1]}"]


def test_a_search_has_the_encoder_that_its_flags_name_and_counts_a_step_once(tmp_path):
    s = make(tmp_path, "--arch", "vit_tiny", "--drop-path", 0.3)
    rates = [m.p for m in s.method.encoder.modules() if isinstance(m, StochasticDepth)]
    assert max(rates) == pytest.approx(0.3) and len(set(rates)) == 11
    built, counted = build(search, tmp_path / "run"), []
    built.meter.restart = lambda: counted.append(built.meter.steps)  # at an epoch's end
    search.train(**vars(built))
    assert counted == [4, 8, 12]


# ---- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["resnet", "mobilenet"])
def test_the_target_is_met(space, tmp_path):
    name = SPACES[space].handcrafted
    for target in (0.6, 1.0, 1.4):
        flags = ["--space", space, "--target-macs", f"{target}x{name}", "--image-size", 16]
        s = make(tmp_path, *flags)
        for seed in range(5):
            g = torch.Generator().manual_seed(seed)
            for alpha in s.alphas:
                alpha.data = torch.randn(alpha.shape, generator=g)
            choice = s.cost.derive(s.choices)
            cost = macs(s.space.arch(choice), 0.0625, "small", 16)
            assert cost == s.cost.macs(choice)
            assert 0.95 <= cost / (target * macs(BACKBONES[name], 0.0625, "small", 16)) <= 1


@pytest.mark.parametrize("share", [0.3, 0.6, 1.6, 4.0])
def test_alphas_start_at_the_target_with_the_least_change(share, tmp_path):
    s = make(tmp_path, *SMALL, "--target-macs", f"{share}xresnet18")
    meet_target(s.choices, s.cost)
    assert 0.95 <= s.cost.expected(s.choices) <= 1
    moved = [a.clone() for a in s.alphas]
    meet_target(s.choices, s.cost)
    assert all(torch.equal(a, b) for a, b in zip(s.alphas, moved))  # nothing to do
    assert all((a.diff(dim=1) * (1 if share > 1.5 else -1) > 0).all() for a in s.alphas)  # all to the same side
    assert (max(a.abs().max() for a in s.alphas) < 1.2) == (share in (0.6, 1.6))


def test_the_cost_pulls_the_expectation_to_the_target(tmp_path):
    s = make(tmp_path, *SMALL, "--target-macs", "0.7xresnet18")
    for group in s.alpha_optimizer.param_groups:
        group["lr"] = 0.03
    for _ in range(150):
        for alpha in s.alphas:
            alpha.grad = torch.randn(alpha.shape)
        own = torch.cat([a.grad.flatten() for a in s.alphas])
        gradients = cost_gradients(s.choices, s.cost, 1.0)
        cost = torch.cat([g.flatten() for g in gradients])
        assert cost.norm().item() == pytest.approx(own.norm().item(), rel=1e-4)
        for alpha, gradient in zip(s.alphas, gradients):
            alpha.grad += gradient
        s.alpha_optimizer.step()
    assert s.cost.expected(s.choices).item() == pytest.approx(1, rel=0.1)


def test_the_baseline_costs_what_the_gradient_search_does(tmp_path, capsys):
    flags = [*SMALL, "--strategy", "supernet-random", "--candidates", 2, "--epochs", 4]
    found = run(search, tmp_path, *flags, "--recalibrate-batches", 2, "--method", "simclr")
    epochs = int(re.search(r"2 candidates, (\d+) epochs", capsys.readouterr().out)[1])
    s = make(tmp_path / "g", *flags, "--strategy", "gradient")
    mean, most = s.state()["expected_macs"], s.cost.macs(s.choices.largest)
    steps = 4 * 4  # of a half of 64 images
    budget = steps / 4 * (mean + most) / 2 + steps * 3 / 4 * (most + (mean + s.cost.target) / 2)
    spent = epochs * 8 * (mean + most) / 2 + 2 * (2 + 2) * s.cost.target / 3
    assert abs(spent - budget) <= 0.6 * 8 * max(s.cost.target, (mean + most) / 2)
    assert found["strategy"] == "supernet-random" and (tmp_path / "backbone.pth").exists()
    assert 0.95 <= found["backbone"]["macs"] / s.cost.target <= 1


# ---- what it leaves -------------------------------------------------------------------------------------------------


def test_a_search_of_heads_leaves_its_record(searched):
    found = json.loads((searched / "arch.json").read_text())
    assert {n: len(ops) for n, ops in found["heads"].items()} == {"projector": 6, "predictor": 4}
    lines = [json.loads(line) for line in (searched / "log.txt").read_text().splitlines()][1:]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3] and lines[-1]["ops"] == found["heads"]
    assert np.ptp(lines[0]["alphas"]["projector"]) == 0 and np.ptp(lines[-1]["alphas"]["projector"]) > 1e-3
    assert lines[0]["entropy"]["predictor"] == pytest.approx([1] * 4) and max(lines[-1]["entropy"]["predictor"]) < 1
    assert {"loss", "alpha_loss", "lr", "z_std", "rankme", "knn"} <= lines[-1].keys() and "knn" in lines[0]
    svg = xml.etree.ElementTree.parse(searched / "search.svg").getroot()
    texts = [t.text for t in svg.iter(f"{SVG}text")]
    dims = {name: head_dims(*space) for name, space in METHODS["simsiam"].heads(32).items()}
    shown = [true_name(op, *io) for name, ops in found["heads"].items() for op, io in zip(ops, pairwise(dims[name]))]
    assert all(texts.count(op) == shown.count(op) + (op in OPS) for op in shown)  # once in the legend
    assert len(list(svg.iter(f"{SVG}polyline"))) == 7 * 10


def test_heads_and_backbone_are_found_together_and_the_printed_command_goes_on(found_both, tmp_path, capsys):
    folder, found = found_both
    assert json.loads((folder / "arch.json").read_text()) == found and found["space"] == ["heads", "resnet"]
    facts = found["backbone"]
    network, _ = build_backbone(facts["arch"], facts["stem"], facts["width"])
    assert 0.95 * facts["target_macs"] <= facts["macs"] <= facts["target_macs"]
    assert facts["macs"] == macs(facts["arch"], facts["width"], facts["stem"], 16)
    assert facts["target_macs"] == macs(BACKBONES["resnet18"], 0.0625, "small", 16) / 2
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    svg = xml.etree.ElementTree.parse(folder / "backbone.svg").getroot()
    boxes = [r for r in svg.iter(f"{SVG}rect") if r.get("rx") == "3"]
    assert len(boxes) == sum(facts["arch"]["depth"]) + 8 and (folder / "search.svg").exists()
    assert load_backbone(str(folder / "backbone.pth"))[1]["arch"] == facts["arch"]
    capsys.readouterr()
    run(search, folder, *BOTH)  # finished: says again what it found
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert [command[command.index(f) + 1] for f in ("--arch", "--heads")] == [str(folder / "arch.json")] * 2
    command[command.index("--output-dir") + 1] = str(tmp_path)
    pretrain.main(pretrain.get_parser().parse_args([*command[2:], "--weights", str(folder / "backbone.pth")]))
    assert f"--weights {tmp_path / 'backbone.pth'}" in capsys.readouterr().out
    flags = ["--weights", str(tmp_path / "backbone.pth"), "--max-images", "200"]
    assert linear_eval.main(linear_eval.get_parser().parse_args(flags))[0]["linear"] > 0
    assert "basic " in (tmp_path / "linear_eval-shapes.md").read_text()


def test_a_bench_reports_and_leaves_nothing(tmp_path, capsys):
    for space in ([], ["--space", "resnet", "heads"]):
        assert run(search, tmp_path, "--bench", *space) == {}
        said = capsys.readouterr().out
        assert "an iteration is" in said and ("plain step of the largest: " in said) == bool(space)
    assert not list(tmp_path.iterdir())


def test_wrong_searches_are_told_in_one_line(tmp_path, capsys):
    for flags, message in [
        (["--space", "resnet", "mobilenet"], "one backbone space at the most"),
        (["--space", "heads", "heads"], "nothing twice"),
        (["--space", "resnet", "--arch", "resnet50"], "--arch means nothing where a backbone is searched"),
        (["--heads", "simsiam_cifar10_resnet18"], "--heads means nothing where heads are searched"),
        (["--target-macs", "1e6"], "--target-macs means nothing to --space heads"),
        (["--strategy", "supernet-random"], "--strategy supernet-random is for a backbone alone"),
        (["--space", "resnet", "--target-macs", "0.5*resnet18"], "is neither a number nor like 0.5xresnet18"),
        (["--space", "resnet", "--target-macs", "1e12"], "no network of the space has"),
        (["--space", "resnet", "--tau", 0, 1], "must be above 0"),
        (["--space", "resnet", "--arch-warmup", 1], "must be a share"),
        (["--space", "resnet", "--strategy", "supernet-random", "--held-out", 0], "do not fill a batch"),
        (["--space", "resnet", "--strategy", "supernet-random", "--candidates", 999], "leave no epoch"),
        (["--method", "diet"], "--method diet has no heads to search"),
    ]:
        said, status = refused(capsys, search, *TINY, "--output-dir", tmp_path, *flags)
        assert message in said and status == 1, (flags, said)
    assert not list(tmp_path.iterdir())


def test_weights_are_where_pretraining_starts(found_both, tmp_path):
    folder, _ = found_both
    flags = ["--arch", folder / "arch.json", "--weights", folder / "backbone.pth", "--image-size", 16]
    method = build(pretrain, tmp_path, *flags, "--method", "moco").method
    for key, value in load(folder / "backbone.pth").items():
        assert torch.equal(method.encoder.state_dict()[key], value)
        assert torch.equal(method.momentum_encoder.state_dict()[key], value)
