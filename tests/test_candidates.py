"""candidates.py: what networks cost, how they are drawn, and which of them halving keeps."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, all_refused, arguments, run
from torch import nn

import candidates
import pretrain
import search
import study
from candidates import Candidate, halving, halving_epochs, handcrafted, random_candidates, rungs, task_of, view_cost
from models import BACKBONES, OPS, SPACES, build_backbone, derive, handcrafted_scores, macs, use_batch_statistics
from views import VIEW_SPACE

HALVING = ["--strategy", "halving", "--candidates", 4, "--final-epochs", 2, "--image-size", 16]


def a_task(folder, *more):
    return task_of(*pretrain.start(search.check_flags(arguments(search, folder, *HALVING, *more))))


# ---- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_the_handcrafted_network_scaled_is_itself_at_its_own_cost_and_the_nearest_below(space):
    space = SPACES[space]
    base, table = space.costs(0.25, "small", 16)
    own = space.choice(space.handcrafted)
    handcrafted_macs = macs(BACKBONES[space.handcrafted], 0.25, "small", 16)
    if own:
        assert derive(handcrafted_scores(space), base, table, handcrafted_macs) == own
    choice = derive(handcrafted_scores(space), base, table, 0.5 * handcrafted_macs)
    assert 0.95 <= macs(space.arch(choice), 0.25, "small", 16) / (0.5 * handcrafted_macs) <= 1

    def distance(choice):
        arch, of = space.arch(choice), BACKBONES[space.handcrafted]
        return sum(math.log(a / b) ** 2 for name in space.choices for a, b in zip(arch[name], of[name]))

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = candidates.models.random_choice(base, table, 0.5 * handcrafted_macs, generator)
        assert distance(choice) <= distance(other) + 1e-9


def test_all_networks_of_a_thin_band_are_drawn_soon():
    space = SPACES["mobilenet"]
    base, table = space.costs(0.25, "small", 16)
    cost = candidates.Cost(base, table, 1.03 * base, "MACs", torch.device("cpu"))
    found = candidates.drawn(cost, 200, seed=0)
    one_stage_up = [[0] * s + [o] + [0] * (4 - s) for s in range(5) for o in range(1, 36)]
    known = [choice for choice in one_stage_up if cost.of(choice) <= cost.target]
    assert 0 < len(known) < len(found) < 200 and all(choice in found for choice in [[0] * 5, *known])
    assert len({tuple(choice) for choice in found}) == len(found)
    assert all(0.95 <= cost.of(choice) / cost.target <= 1 for choice in found)
    picked = candidates.drawn(cost, 8, seed=0)
    assert len({tuple(choice) for choice in picked}) == 8 and all(choice in found for choice in picked)
    assert picked != candidates.drawn(cost, 8, seed=1)
    assert cost.random(torch.Generator().manual_seed(0)) in found


def macs_as_time(modules, inputs, device):
    """Of a device whose time is a block's MACs of all images, and half as much again where it is part of a network."""
    times = []
    for module, x in zip(modules, inputs):
        counted = []

        def count(m, _, y, counted=counted):
            counted.append(m.weight[0].numel() * y.numel())

        hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            module.eval()(x)
        for hook in hooks:
            hook.remove()
        times.append(sum(counted) * (1.5 if x.shape[1] == 3 else 1.0))
    return times


@pytest.mark.parametrize("space", ["resnetk1", "mobilenet"])
def test_predicted_times_add_up(space, monkeypatch):
    space = SPACES[space]
    monkeypatch.setattr(candidates, "milliseconds", macs_as_time)
    base, table = candidates.latencies(space, 0.125, "small", 16, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for choice in torch.randint(len(space.options), (20, len(space.stages)), generator=generator).tolist():
        predicted = base + sum(table[s, o].item() for s, o in enumerate(choice))
        assert predicted == pytest.approx(1.5 * macs(space.arch(choice), 0.125, "small", 16), rel=1e-9)


def test_times_are_milliseconds_of_what_takes_longer():
    x = torch.randn(4, 8, 32, 32)
    short, long = (nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(n))) for n in (1, 12))
    a, b = candidates.milliseconds([short, long], [x, x], torch.device("cpu"), rounds=9)
    assert 0 < a < b < 1e4


def test_a_network_of_a_time_is_found_or_none_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(candidates, "milliseconds", macs_as_time)
    target = 2 * 1.5 * 0.5 * macs(BACKBONES["resnet18"], 0.0625, "small", 16)
    flags = ["--space", "resnetk1", *HALVING, "--candidates", 2, "--latency-batch", 2, "--method", "simclr"]
    said = "no network of the space has 0.95 to 1 of 1e+09 ms: they go from"
    all_refused(capsys, search, [*TINY, "--output-dir", tmp_path / "none", *flags], [(["--target-ms", 1e9], said)])
    found = run(search, tmp_path, *flags, "--target-ms", target)["backbone"]
    assert 0.95 * target <= found["predicted_ms"] <= target and found["target_ms"] == target
    assert found["ms"] == pytest.approx(found["predicted_ms"], rel=1e-6)
    assert found["ms"] == pytest.approx(2 * 1.5 * macs(found["arch"], 0.0625, "small", 16), rel=1e-6)


def test_batch_statistics_are_the_batchs_own_in_eval_mode_too():
    network, _ = build_backbone("resnet18", "small", 0.125)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.ones_(m.weight)
    x = torch.randn(16, 3, 16, 16)
    wanted = network.train()(x)
    assert torch.allclose(use_batch_statistics(network).eval()(x), wanted, atol=1e-5)


# ---- halving --------------------------------------------------------------------------------------------------------


def test_a_search_starts_with_the_handcrafted_and_different_random_candidates(tmp_path):
    task = a_task(tmp_path, "--space", "heads", "resnetk1", "views", "--target-macs", "0.25xresnet18")
    all_of_them = random_candidates(task, 8)
    assert all_of_them == random_candidates(task, 8) and all_of_them[0] == handcrafted(task)
    assert len({json.dumps(c.arch) for c in all_of_them[1:]}) == 7
    baseline = study.random_networks(["resnetk1"], 48, task.args, "small", 16)
    assert not any(c.arch == network.arch for c in all_of_them for network in baseline)
    for c in all_of_them:
        share = macs(c.arch, 0.0625, "small", 16) / task.cost.target
        assert 0.95 <= share <= 1
    for c in all_of_them[1:]:
        assert {len(ops) for ops in c.heads.values()} == {4, 6}
        assert all(set(ops) <= set(OPS) for ops in c.heads.values())
        assert all(c.views[name] in values for name, values in VIEW_SPACE.items()) and len(c.views) == len(VIEW_SPACE)


def test_rungs_halve_until_two_are_left():
    assert rungs(16) == [(16, 0.25), (8, 0.5), (4, 0.75), (2, 1.0)]
    assert rungs(5) == [(5, 1 / 3), (3, 2 / 3), (2, 1.0)] and rungs(2) == [(2, 1.0)] and rungs(1) == [(1, 1.0)]
    assert halving_epochs(8, 3, 0) == 2 * (8 + 4 + 2 + 2)  # the last 2: the handcrafted one's, were it dropped at first
    assert halving_epochs(16, 8, 4) == 2 * (2 * (16 + 4 + 8 + 4 + 2) + 6)
    assert halving_epochs(8, 1, 2) == 2 * (8 + 2)  # all are at their end after the first rung


@pytest.mark.parametrize("space, target", [("resnetk1", "0.25xresnet18"), ("mobilenet", "0.6xmobilenet_v2")])
def test_proposals_are_what_noisy_scores_of_a_dozen_networks_favour(space, target, tmp_path, monkeypatch):
    task = a_task(tmp_path, "--space", space, "--target-macs", target, "--candidates", 12)
    tried, pool = random_candidates(task, 12), candidates.drawn(task.cost, 400, seed=1)
    rng = np.random.default_rng(0)

    def worth(arch):  # shallow ones, with wide blocks in the searched stages
        return -sum(arch["depth"]) + 2 * np.log(np.array(arch["inner"])[list(task.space.stages)]).sum()

    noise = 0.2 * np.std([worth(c.arch) for c in tried])
    elsewhere = Candidate("joined", "resnet50")  # of another space, and with a score that would spoil the slopes
    scores = [worth(c.arch) + noise * rng.normal() for c in tried] + [-100.0]
    proposed = candidates.proposals(task, [*tried, elsewhere], scores)
    assert [c.name for c in proposed] == ["proposal 1", "proposal 2", "proposal 3"]
    assert all(0.95 <= macs(c.arch, 0.0625, "small", 16) / task.cost.target <= 1 for c in proposed)
    assert len({json.dumps(c.arch) for c in [*tried, *proposed]}) == 15
    best, *others = (worth(c.arch) for c in proposed)
    known = [worth(task.space.arch(choice)) for choice in pool]
    assert best >= np.quantile(known, 0.99) and min(others) >= np.quantile(known, 0.9)
    assert candidates.proposals(task, tried[:5], scores[:5]) == []  # too few to say anything
    foreign = [elsewhere._replace(name=f"joined {k}") for k in range(7)]
    assert candidates.proposals(task, foreign, [0.0] * 7) == []  # nothing known of this space
    equal = candidates.proposals(task, tried, [1.0] * 12)
    assert len(equal) == 3 and not any(c.arch in [t.arch for t in tried] for c in equal)
    monkeypatch.setattr(candidates, "fits", lambda task, arch: arch != proposed[0].arch)
    again = candidates.proposals(task, [*tried, elsewhere], scores)
    assert [c.arch for c in again][:2] == [c.arch for c in proposed[1:]]


def test_proposals_join_after_the_first_rung_and_can_win(tmp_path, monkeypatch):
    flags = ["--space", "resnetk1", "heads", "--target-macs", "0.25xresnet18", "--candidates", 16]
    task, trained = a_task(tmp_path, *flags), []

    def train_alone(task, candidate, k, share, folder):
        trained.append((k, candidate.name, share))
        score = -sum(candidate.arch["depth"]) - 10 * (candidate.name == "handcrafted") + 0.01 * k
        return [score, score + 0.001]

    monkeypatch.setattr(candidates, "train_alone", train_alone)
    several = random_candidates(task, 16)
    winner, run, seen = halving(task, several, tmp_path)
    assert [(k, name) for k, name, _ in trained[16:20]] == [(16 + k, f"proposal {k + 1}") for k in range(4)]
    counts = [sum(share == at for *_, share in trained) for at in (0.25, 0.5, 0.75, 1.0)]
    assert counts == [20, 8, 4, 3]  # the last with the handcrafted one
    assert winner.name.startswith("proposal") and run.name in [f"{k}-seed0" for k in range(16, 20)]
    assert sum(winner.arch["depth"]) <= min(sum(c.arch["depth"]) for c in several[1:])
    best = min(several[1:], key=lambda c: sum(c.arch["depth"]) - 0.01 * several.index(c))
    assert winner.heads == best.heads and winner.heads is not None
    monkeypatch.setattr(candidates, "proposals", lambda *_: [])  # a search that goes on does not propose again
    assert halving(task, several, tmp_path) == (winner, run, seen)


@pytest.mark.parametrize("strategy", ["halving", "supernet"])
def test_the_cost_that_a_search_announces_counts_all_that_it_trains(strategy, tmp_path, capsys, monkeypatch):
    flags = ["--space", "resnetk1", "--target-macs", "0.25xresnet18", "--strategy", strategy, "--finalists", 8]
    task = a_task(tmp_path, *flags, "--candidates", 20 if strategy == "supernet" else 8, "--final-epochs", 3)
    ends: dict[int, int] = {}

    def train_alone(task, candidate, k, share, folder):
        ends[k] = max(ends.get(k, 0), candidates.until(share, 3))
        return [0.01 * k, 0.01 * k]

    monkeypatch.setattr(candidates, "train_alone", train_alone)
    halving(task, random_candidates(task, 8), tmp_path)
    search.announce_cost(task, 24 if strategy == "supernet" else 0)
    said = capsys.readouterr().out.splitlines()[-1]
    announced = int(re.search(r"halving ([\d,]+)", said)[1].replace(",", ""))
    assert len(ends) == 10 and announced == 2 * sum(ends.values()) * (128 // 16)  # two seeds; batches of 16


NAMES = ["handcrafted", *"abcdefg"]
CLEAR = {name: [k * 1.0, k + 0.1] for k, name in enumerate(NAMES)}  # scores of two seeds
NOISY = {name: [(-1) ** k + 0.01 * k, 0.01 * k - (-1) ** k] for k, name in enumerate(NAMES)}


def halved(scores, monkeypatch, folder):
    """Of trainings whose scores are known: {candidate, or (candidate, share): score of each seed, or why it broke}."""
    trained = []

    def train_alone(task, candidate, k, share, folder):
        trained.append((candidate.name, share))
        return scores.get((candidate.name, share), scores[candidate.name])

    monkeypatch.setattr(candidates, "train_alone", train_alone)
    task = a_task(folder, "--space", "views")
    winner, run, seen = halving(task, [Candidate(name, "resnet18") for name in NAMES], folder)
    return winner.name, trained, seen, run


def test_the_better_half_goes_on(tmp_path, monkeypatch):
    winner, trained, seen, run = halved(CLEAR, monkeypatch, tmp_path)
    assert winner == "g" and [name for name, share in trained if share == 1.0] == ["g", "f", "handcrafted"]
    assert sorted(name for name, share in trained if share == pytest.approx(2 / 3)) == ["d", "e", "f", "g"]
    assert len(trained) == 8 + 4 + 2 + 1 and seen["ratio"] > 5 and run == tmp_path / "finalists" / "7-seed0"
    thirds = [pytest.approx(k / 3) for k in (1, 2, 3)]
    assert seen["rounds"]["g"] == [(share, [-7.0, -7.1]) for share in thirds]  # infonce: less is better
    assert [share for share, _ in seen["rounds"]["handcrafted"]] == [thirds[0], 1.0]


def test_broken_candidates_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    assert halved(CLEAR | {"g": "no memory"}, monkeypatch, tmp_path)[0] == "f"
    assert "g: left out, training failed: no memory" in capsys.readouterr().out
    with pytest.raises(ValueError, match="all candidates failed"):
        halved(dict.fromkeys(NAMES, "no memory"), monkeypatch, tmp_path)


@pytest.mark.parametrize("found, verdict", [([0.3, 0.31], "better"), ([0.1, 0.15], "worse"), ([0.3, 0.2], "no better")])
def test_what_a_gradient_search_finds_is_compared_with_the_handcrafted(found, verdict, tmp_path, monkeypatch):
    def planted(task, candidate, k, share, folder):
        assert task.args.score == "knn" and share == 1.0
        return found if candidate.name == "found" else [0.25, 0.2]

    monkeypatch.setattr(candidates, "train_alone", planted)
    seen = candidates.beside_handcrafted(a_task(tmp_path), Candidate("found", "resnet18"), tmp_path)
    assert seen["found"] == found and seen["handcrafted"] == [0.25, 0.2]
    assert seen["said"].endswith(f"handcrafted: {verdict}")
    assert f"kNN {100 * found[0]:.2f} %" in seen["said"]
    monkeypatch.setattr(candidates, "train_alone", lambda *_: "no memory")
    seen = candidates.beside_handcrafted(a_task(tmp_path), Candidate("found", "resnet18"), tmp_path)
    assert seen.keys() == {"said"} and "what was found failed: no memory" in seen["said"]


def test_where_seeds_differ_more_than_candidates_the_handcrafted_stays(tmp_path, monkeypatch, capsys):
    winner, trained, seen, _ = halved(NOISY, monkeypatch, tmp_path)
    assert seen["ratio"] < 0.5 and winner == "handcrafted" and trained[-1] == ("handcrafted", 1.0)
    said = capsys.readouterr().out
    assert (
        "candidates differ less than seeds do" in said and "beside the handcrafted one, which is no clear lead" in said
    )


def test_a_handcrafted_network_that_breaks_at_the_end_is_not_gone_back_to(tmp_path, monkeypatch):
    breaks = {("handcrafted", 1.0): "no memory"}
    assert halved(NOISY | breaks, monkeypatch, tmp_path)[0] == "g"


def test_a_run_that_has_gone_further_is_scored_where_the_rung_is(tmp_path):
    task = a_task(tmp_path, "--space", "views", "--final-epochs", 3)
    candidate = Candidate("handcrafted", "resnet18")
    first = candidates.train_alone(task, candidate, 0, 1 / 3, tmp_path)
    last = candidates.train_alone(task, candidate, 0, 1.0, tmp_path)
    assert first != last and candidates.train_alone(task, candidate, 0, 1 / 3, tmp_path) == first


def test_the_winner_and_the_handcrafted_are_compared_at_their_ends(tmp_path, monkeypatch):
    assert (
        halved(CLEAR | {("handcrafted", 1.0): [9.0, 9.2]}, monkeypatch, tmp_path)[0] == "handcrafted"
    )  # slow at first
    assert halved(CLEAR | {("handcrafted", 1.0): [6.0, 6.2]}, monkeypatch, tmp_path)[0] == "g"
    assert halved(NOISY | {("handcrafted", 1.0): [-9.0, -11.0]}, monkeypatch, tmp_path)[0] == "g"


def test_dearer_views_get_fewer_epochs(tmp_path, monkeypatch):
    task = a_task(tmp_path, "--space", "views", "--final-epochs", 10)
    assert view_cost(task, None) == 1
    views = {"locals": 6, "local_share": 0.5, "boundary": 0.3, "colour": 1.0}
    assert view_cost(task, views) == pytest.approx(1 + 6 * 0.25 / 2)
    seen = []
    monkeypatch.setattr(pretrain, "run_in", lambda *a, **k: seen.append((a[5], k["epochs"])) or {"infonce": 1.0})
    assert candidates.train_alone(task, Candidate("a", "resnet18", None, views), 0, 0.5, tmp_path) == [-1.0, -1.0]
    assert seen == [(3, 6), (3, 6)]  # half of 10 / 1.75 epochs


def test_a_search_of_views_leaves_flags_for_pretraining(tmp_path, capsys):
    flags = [*HALVING, "--space", "views", "heads", "--held-out", 0.4]
    found = run(search, tmp_path, *flags)
    assert found["strategy"] == "halving" and len(found["halving"]["rounds"]) == 4
    said = capsys.readouterr().out
    command = said.strip().splitlines()[-1].split()
    for name, value in found.get("views", {}).items():
        assert float(command[command.index("--" + name.replace("_", "-")) + 1]) == value
    assert ("--heads" in command) == ("heads" in found) == ("views" in found)
    runs = sorted(path.parent.name for path in Path(tmp_path).glob("finalists/*/backbone.pth"))
    assert len(runs) in (4, 6)  # the last two, with two seeds each; and the handcrafted, where it stays with that
    assert (tmp_path / "backbone.pth").exists() and (tmp_path / "halving.svg").exists()
    another = [(["--seed", 1], "made with --seed 0, not 1")]  # command in the folder
    all_refused(capsys, search, [*TINY, "--output-dir", tmp_path, *flags], another)
