"""search.py: its steps, what it finds at which cost, and what it leaves."""

import copy
import json
import statistics
import xml.etree.ElementTree
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import BOTH, SVG, TINY, all_refused, arguments, build, call, load, log_of, make_search, run
from torchvision.ops import StochasticDepth

import linear_eval
import pretrain
import search
from candidates import task_of
from checkpoint import load_backbone
from losses import METHODS
from models import BACKBONES, OPS, SPACES, build_backbone, derive, head_dims, macs, true_name
from search import AlphaGradients, alpha_gradients, fit, knowledge, meet_target, ridge, values_of

GRADIENT = ["--strategy", "gradient"]
SMALL = ["--space", "resnet", "--image-size", 16, *GRADIENT]
SUPERNET = ["--space", "resnetk1", "--image-size", 16, "--target-macs", "0.25xresnet18", "--method", "simclr"]
SUPERNET += ["--candidates", 20, "--finalists", 3, "--final-epochs", 2, "--recalibrate-batches", 2]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    run(search, folder, "--arch-warmup", 0)
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
    s = make_search(tmp_path, "--method", method)
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
    s = make_search(tmp_path, "--method", method, *SMALL, "--arch-warmup", 0)
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
        s = make_search(tmp_path, amp, *GRADIENT, *more)
        assert s.args.amp == (amp == "--amp")
        loss = s.alpha_step(s.warmup)
        steps.append([loss, *s.gradients.steps, *(alpha.detach() for alpha in s.alphas)])
    assert all(torch.equal(a, b) for a, b in zip(*steps)) and all(x.dtype == torch.float32 for x in steps[0])


def test_the_warm_up_takes_uniform_and_largest_networks_in_turn(tmp_path):
    s = make_search(tmp_path, *SMALL, "--epochs", 8)
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
    t2 = []
    for _ in range(40):  # short epochs of noise look like noise too
        gradients.steps = list(torch.randn(10, 4000, generator=g))
        t2.append(gradients.signal())
    assert statistics.mean(t2) < 0.03


def test_dead_alphas_are_named(tmp_path):
    s = make_search(tmp_path)
    s.gradients.steps = [torch.ones(70), torch.ones(70)]
    assert s.gradients.dead(s.alpha_names()) == []
    for g in s.gradients.steps:
        g[[0, 69]] = 0
    s.gradients.steps[0][5] = 0
    assert s.gradients.dead(s.alpha_names()) == [f"projector 1 {next(iter(OPS))}", f"predictor 4 {list(OPS)[-1]}"]


def test_a_search_has_the_encoder_that_its_flags_name_and_counts_a_step_once(tmp_path):
    s = make_search(tmp_path, "--arch", "vit_tiny", "--drop-path", 0.3)
    rates = [m.p for m in s.method.encoder.modules() if isinstance(m, StochasticDepth)]
    assert max(rates) == pytest.approx(0.3) and len(set(rates)) == 11
    built, counted = build(search, tmp_path / "run"), []
    built.meter.restart = lambda: counted.append(built.meter.steps)  # at an epoch's end
    search.train(**vars(built))
    assert counted == [4, 8, 12]


# ---- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.6, 1.6, 4.0])
def test_alphas_start_at_the_target_with_the_least_change(share, tmp_path):
    s = make_search(tmp_path, *SMALL, "--target-macs", f"{share}xresnet18")
    meet_target(s.choices, s.cost, 100)
    assert 0.95 <= s.cost.expected(s.choices) <= 1
    moved = [a.clone() for a in s.alphas]
    meet_target(s.choices, s.cost, 100)
    assert all(torch.equal(a, b) for a, b in zip(s.alphas, moved))  # nothing to do
    assert all((a.diff(dim=1) * (1 if share > 1.5 else -1) > 0).all() for a in s.alphas)  # all to the same side
    assert (max(a.abs().max() for a in s.alphas) < 1.2) == (share in (0.6, 1.6))


def test_alphas_stay_at_the_target_whatever_their_gradients_are(tmp_path):
    s = make_search(tmp_path, *SMALL, "--target-macs", "0.7xresnet18", "--arch-warmup", 0, "--gates", 1)
    meet_target(s.choices, s.cost, 100)
    for group in s.alpha_optimizer.param_groups:
        group["lr"] = 0.03
    for _ in range(60):
        for alpha in s.alphas:
            alpha.grad = -alpha.new_tensor(range(alpha.shape[1])).expand_as(alpha).clone()  # the largest, everywhere
        s.alpha_optimizer.step()
        meet_target(s.choices, s.cost, 2)
        assert s.cost.expected(s.choices).item() == pytest.approx(0.975, abs=0.03)


def test_an_alpha_step_averages_over_its_gates(tmp_path):
    s = make_search(tmp_path, *SMALL, "--arch-warmup", 0, "--gates", 3, "--method", "simclr")
    s.weight_step(0)  # before it every branch ends in zero
    views, index = s.alpha_batches(0)
    meet_target(s.choices, s.cost, 100)
    gradients = []
    for gate in range(3):
        s.sample(0, alphas=True, gate=gate)
        _, found = alpha_gradients(s.method, s.method, views, index, s.alphas, s.weights)
        gradients.append(torch.cat([g.flatten() for g in found]))
    s.alpha_step(0)
    assert torch.allclose(s.gradients.steps[0], torch.stack(gradients).mean(0), rtol=1e-5, atol=1e-8)
    assert not torch.allclose(gradients[0], gradients[1])


# ---- supernets ------------------------------------------------------------------------------------------------------


def test_a_supernets_steps_are_of_networks_near_the_target(tmp_path):
    s = make_search(tmp_path, *SUPERNET, "--epochs", 40)
    shares = [s.cost.of(s.near_target(step)) / s.cost.target for step in range(s.total)]
    assert shares == [s.cost.of(s.near_target(step)) / s.cost.target for step in range(s.total)]  # of seed and step
    early, late = shares[: s.total // 4], shares[s.total // 2 :]
    assert 0.5 <= min(early) < 0.8 and 1 < max(early) <= 1.05 and min(late) >= 0.95 and max(late) <= 1
    s.weight_step(s.total - 1)
    assert s.choices.choice() == s.near_target(s.total - 1)


def test_the_surrogate_finds_what_choices_are_worth():
    space, rng = SPACES["resnetk1"], np.random.default_rng(0)
    base, table = space.costs(0.25, "small", 16)
    target = 0.25 * macs(BACKBONES["resnet18"], 0.25, "small", 16)
    generator = torch.Generator().manual_seed(0)
    choices = [search.models.random_choice(base, table, target, generator) for _ in range(150)]
    worth = rng.normal(size=4 * (4 + 3 + 3))
    y = 3 + values_of(space, choices) @ worth
    surrogate = fit(space, choices, y + 0.1 * rng.normal(size=150))

    def predict(choices):
        return values_of(space, choices) @ surrogate.worth

    assert surrogate.r2 > 0.98 and np.corrcoef(predict(choices), y)[0, 1] > 0.99
    # options' scores are sums of what their values are worth, so that enumeration finds the best of the band
    scores = surrogate.option_scores()
    for choice in choices[:20]:
        total = sum(scores[s, o].item() for s, o in enumerate(choice))
        assert total == pytest.approx(predict([choice])[0])
    best = derive(scores, base, table, target)
    assert predict([best])[0] >= predict(choices).max() - 1e-9
    assert values_of(space, [best]) @ worth >= np.quantile(values_of(space, choices) @ worth, 0.98)
    # nothing there: that says so
    noise = rng.normal(size=(150, 2))
    unknown, said = knowledge(fit(space, choices, noise.mean(1)), noise)
    assert unknown and "two halves" in said
    halves = np.stack([y, y], 1) + 0.1 * rng.normal(size=(150, 2))
    assert knowledge(fit(space, choices, halves.mean(1)), halves)[0] is None


def test_ridge_is_least_squares_where_there_is_no_penalty_and_its_errors_are_the_spread_of_its_estimates():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5))
    truth, estimates, errors = rng.normal(size=5), [], []
    for _ in range(400):
        y = x @ truth + 2 * rng.normal(size=80)
        weights, error = ridge(x, y, 1e-9)
        estimates.append(weights)
        errors.append(error)
    assert np.allclose(estimates[-1], np.linalg.lstsq(np.c_[x, np.ones(80)], y, rcond=None)[0][:5])
    assert np.allclose(np.mean(errors, 0), np.std(estimates, 0), rtol=0.1)


@pytest.fixture(scope="module")
def by_supernet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supernet")
    return folder, run(search, folder, *SUPERNET, "--space", "heads", "resnetk1")


def test_a_supernet_leaves_a_network_of_the_band_and_says_what_it_knows(by_supernet, capsys):
    folder, found = by_supernet
    backbone = found["backbone"]
    assert 0.95 <= backbone["macs"] / backbone["target_macs"] <= 1
    scored = json.loads((folder / "scores.json").read_text())["scored"]
    assert len(scored) == len({str(row["choice"]) for row in scored}) == 20
    costs = [macs(SPACES["resnetk1"].arch(row["choice"]), 0.0625, "small", 16) for row in scored]
    assert all(0.95 <= cost / backbone["target_macs"] <= 1 for cost in costs)
    assert len(found["supernet"]["worth and standard error"]) == 40 and "correlate" in found["supernet"]["said"]
    rounds = found["halving"]["rounds"]
    assert len(rounds) == 3 and all(seen[0][0] == 0.5 for seen in rounds.values())
    assert sum(seen[-1][0] == 1 for seen in rounds.values()) in (2, 3)  # and the handcrafted one's end
    assert all(len(seeds) == 2 for seen in rounds.values() for _, seeds in seen)
    assert next(iter(rounds)).startswith("handcrafted: basic")
    assert load_backbone(str(folder / "backbone.pth"))[1]["arch"] == backbone["arch"]
    for name in ("surrogate", "halving", "backbone"):
        xml.etree.ElementTree.parse(folder / f"{name}.svg")


def test_a_supernets_search_that_is_cut_goes_on_to_the_same_network(by_supernet, tmp_path, monkeypatch):
    flags = [*SUPERNET, "--space", "heads", "resnetk1"]

    def cut_at(module, name, calls):
        whole, seen = getattr(module, name), []

        def cut(*args, **kwargs):
            seen.append(name)
            if len(seen) > calls:
                raise KeyboardInterrupt
            return whole(*args, **kwargs)

        monkeypatch.setattr(module, name, cut)
        with pytest.raises(KeyboardInterrupt):
            run(search, tmp_path, *flags)
        monkeypatch.undo()

    cut_at(search.Search, "weight_step", 8)
    cut_at(search, "write_json", 7)  # seven candidates are scored
    assert len(json.loads((tmp_path / "scores.json").read_text())["scored"]) == 7
    cut_at(pretrain, "run_in", 3)
    trained = sorted(p.parent.name for p in tmp_path.glob("finalists/*/checkpoint.pth"))
    assert trained == ["0-seed0", "0-seed1", "1-seed0"]
    found = run(search, tmp_path, *flags)
    for name in ("backbone", "halving", "supernet"):
        assert found[name] == by_supernet[1][name]
    for key, value in load(by_supernet[0] / "backbone.pth").items():
        assert torch.equal(value, load(tmp_path / "backbone.pth")[key])


def test_networks_that_join_are_finalists_once(tmp_path):
    small = SPACES["resnetk1"].arch([0] * 4)
    (tmp_path / "small.json").write_text(json.dumps({"backbone": {"arch": small}}))
    flags = [*SUPERNET[:2], "--target-macs", "resnet18", "--join", tmp_path / "small.json", "resnet18"]
    args = arguments(search, tmp_path, *flags, "--image-size", 16)
    task = task_of(*pretrain.start(search.check_flags(args)))
    first, joined, *others = search.finalists_of(task, None, [], None, knows=False)
    assert first.arch == BACKBONES["resnet18"] and joined.arch == small  # resnet18 is the handcrafted one already
    assert all(other.name.startswith("random") for other in others)


def test_a_candidate_whose_score_is_not_finite_is_left_out(tmp_path, monkeypatch, capsys):
    score = pretrain.Monitor.score
    calls = []

    def broken(self, *args):
        calls.append(args)
        return float("nan") if len(calls) == 5 else score(self, *args)

    monkeypatch.setattr(pretrain.Monitor, "score", broken)
    run(search, tmp_path, *SUPERNET, "--finalists", 2, "--epochs", 1, "--final-epochs", 1)
    assert "left out, its infonce is not finite: basic" in capsys.readouterr().out
    assert [row["scores"] for row in json.loads((tmp_path / "scores.json").read_text())["scored"]].count(None) == 1


# ---- what it leaves -------------------------------------------------------------------------------------------------


def test_a_search_of_heads_leaves_its_record(searched):
    found = json.loads((searched / "arch.json").read_text())
    assert {n: len(ops) for n, ops in found["heads"].items()} == {"projector": 6, "predictor": 4}
    _, lines = log_of(searched)
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
    call(pretrain, *command[2:], "--weights", folder / "backbone.pth")
    assert f"--weights {tmp_path / 'backbone.pth'}" in capsys.readouterr().out
    assert call(linear_eval, "--weights", tmp_path / "backbone.pth", "--max-images", 200)[0]["linear"] > 0
    assert "basic " in (tmp_path / "linear_eval-shapes.md").read_text()


def test_a_bench_reports_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search.bench, "__defaults__", (3, 1))  # steps, warm-up
    for flags, base in (
        ([], "weight step: "),
        (["--space", "resnet", "heads", *GRADIENT], "plain step of the largest: "),
        (["--space", "resnet"], "plain step of a network of the target: "),
    ):
        assert run(search, tmp_path, "--bench", *flags) == {}
        said = capsys.readouterr().out
        assert "an iteration is" in said and base in said
    assert not list(tmp_path.iterdir())


def test_wrong_searches_are_told_in_one_line(tmp_path, capsys):
    table = [
        (["--space", "resnet", "mobilenet"], "one backbone space at the most"),
        (["--space", "heads", "heads"], "nothing twice"),
        (["--space", "resnet", "--arch", "resnet50"], "--arch means nothing where a backbone is searched"),
        (["--heads", "simsiam_cifar10_resnet18"], "--heads means nothing where heads are searched"),
        (["--target-macs", "1e6"], "--target-macs means nothing to --space heads"),
        (["--strategy", "supernet"], "--strategy supernet is for backbones"),
        (["--space", "views", *GRADIENT], "has no gradient to views"),
        (["--space", "views", "--locals", 2], "--locals means nothing where views are searched"),
        (["--space", "resnet", "--target-ms", 0], "--target-ms 0: must be above 0"),
        (["--space", "resnet", "--target-ms", 1, "--target-macs", "1e6"], "give one of them"),
        (["--space", "resnet", "--candidates", 19], "--candidates 19: must be 20 or above"),
        (["--space", "resnet", "--held-out", 0], "judges by held-out images, 0: raise --held-out"),
        (["--space", "resnet", "--score", "held_out_loss", "--batch-size", 32], "do not fill a batch"),
        (["--space", "views", "--bench"], "--bench and --profile look at a supernet's steps"),
        (["--space", "views", "--local-size", 8], "--local-size means nothing where views are searched"),
        (["--space", "views", "--score", "held_out_loss"], "--score held_out_loss compares neither views"),
        (["--space", "resnet", "--finalists", 1], "--finalists 1: must be 2 or above"),
        (["--space", "resnet", "--drop-path", 0.1], "--drop-path means nothing where a backbone is searched"),
        (["--space", "resnet", "--join", "nothing.json"], "neither a readable file"),
        (["--space", "resnet", "--target-macs", "0.5xresnet18", "--join", "resnet50"], "not a network of at most"),
        (["--join", "resnet18"], "--join means nothing to --strategy gradient"),
        (["--space", "resnet", "--target-macs", "0.5*resnet18"], "is neither a number nor like 0.5xresnet18"),
        (["--space", "resnet", "--target-macs", "1e12"], "no network of the space has"),
        (["--space", "resnet", "--tau", 0, 1], "must be above 0"),
        (["--space", "resnet", "--arch-warmup", 1], "must be a share"),
        (["--method", "diet"], "--method diet has no heads to search"),
    ]
    all_refused(capsys, search, [*TINY, "--output-dir", tmp_path], table)
    assert not list(tmp_path.iterdir())


def test_weights_are_where_pretraining_starts(found_both, tmp_path):
    folder, _ = found_both
    flags = ["--arch", folder / "arch.json", "--weights", folder / "backbone.pth", "--image-size", 16]
    method = build(pretrain, tmp_path, *flags, "--method", "moco").method
    for key, value in load(folder / "backbone.pth").items():
        assert torch.equal(method.encoder.state_dict()[key], value)
        assert torch.equal(method.momentum_encoder.state_dict()[key], value)
