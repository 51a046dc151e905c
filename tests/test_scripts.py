"""The three scripts: search, resume, measures, and what they say to a wrong command."""

import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.distributed.run import get_args_parser

import linear_eval
import pretrain
import search
from linear_eval import extract, knn_accuracy, linear_probe, load_backbone
from losses import METHODS
from models import OPS, PRESETS, SearchHead, build_backbone
from search import Search, alpha_gradients
from views import make_shapes

ROOT = Path(__file__).parent.parent
TINY = ["--max-images", "160", "--width", "0.0625", "--batch-size", "16", "--epochs", "3", "--held-out", "0.2"]
TINY += ["--knn-every", "2", "--device", "cpu"]


def arguments(script, folder, *more):
    return script.get_parser().parse_args([*TINY, "--output-dir", str(folder), *map(str, more)])


def run(script, folder, *more):
    return script.main(arguments(script, folder, *more))


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run(pretrain, folder)
    return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    run(search, folder)
    return folder


# ---- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_alpha_step_moves_alphas_alone_and_a_weight_step_never(method, tmp_path):
    s = Search(arguments(search, tmp_path, "--method", method))
    views, index = s.run.batch(s.run.parts[1], 0)
    before = copy.deepcopy(s.method.state_dict())
    _, cheap = alpha_gradients(s.method, views, index, s.alphas, s.weights)
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


def test_the_halves_are_disjoint_and_as_large_as_the_papers():
    held_out, a, b = pretrain.split_images(50_000, 0.0, 2)
    assert len(held_out) == 0 and len(a) == len(b) == 25_000 and len(a) // 512 == 48
    assert len(torch.cat([a, b]).unique()) == 50_000
    held_out, a, b = pretrain.split_images(1000, 0.1, 2)
    assert [len(held_out), len(a), len(b)] == [100, 450, 450] and len(torch.cat([held_out, a, b]).unique()) == 1000


def test_a_search_leaves_its_record(searched):
    found = json.loads((searched / "arch.json").read_text())
    assert {n: len(ops) for n, ops in found["heads"].items()} == {"projector": 6, "predictor": 4}
    lines = [json.loads(line) for line in (searched / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3] and lines[-1]["ops"] == found["heads"]
    assert np.ptp(lines[0]["alphas"]["projector"]) == 0 and np.ptp(lines[-1]["alphas"]["projector"]) > 1e-3
    assert lines[0]["entropy"]["predictor"] == pytest.approx([1] * 4) and max(lines[-1]["entropy"]["predictor"]) < 1
    assert (
        {"loss", "alpha_loss", "lr", "z_std", "rankme"} <= lines[-1].keys() and "knn" in lines[0] and "knn" in lines[-1]
    )
    svg = xml.etree.ElementTree.parse(searched / "search.svg").getroot()
    texts = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    shown = [op for head in found["heads"].values() for op in head][:-1] + ["linear"]  # the last layer widens
    if found["heads"]["predictor"][-1].endswith("pool_3x3"):
        shown[-1] = found["heads"]["predictor"][-1]
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
    assert list(rows) == ["heads", "found", "handcrafted", "random (2 heads)"]
    files = sorted((searched / "compare").glob("*/scores.json"))
    score = {p.parent.name: 100 * json.loads(p.read_text())["linear"] for p in files}
    assert list(score) == ["found-seed0", "handcrafted-seed0", "random-1-seed0", "random-2-seed0"]
    randoms = [score["random-1-seed0"], score["random-2-seed0"]]
    base = np.mean(randoms)
    assert rows["random (2 heads)"][1:] == [f"{base:.2f} ± {np.std(randoms, ddof=1):.2f}", "+0.00"]
    found = score["found-seed0"]
    assert rows["found"][1:] == [f"{found:.2f}", f"{100 * (found - base) / base:+.2f}"]
    written = [p.stat().st_mtime_ns for p in files]
    run(search, searched, *flags)
    assert [p.stat().st_mtime_ns for p in files] == written  # what is there is not done again


def test_benches_report(tmp_path, capsys):
    assert run(pretrain, tmp_path / "a", "--bench")["network"] > 0
    assert run(search, tmp_path / "b", "--bench") == {}
    said = capsys.readouterr().out
    assert "views, loss and optimiser add" in said and "largest difference 0\n" in said
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


# ---- resume ---------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import {script} as script
from pretrain import Run
calls, batch = 0, Run.batch
def deadly(*args):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(*args)
Run.batch = deadly
script.main(script.get_parser().parse_args())
"""


@pytest.mark.parametrize("script, more", [(pretrain, ["--method", "moco"]), (search, [])])
def test_a_killed_run_ends_with_the_uninterrupted_runs_weights(script, more, tmp_path):
    at = 8 + 3 if script is pretrain else 2 * (4 + 2)  # in the second epoch
    code = KILLED.format(root=str(ROOT), script=script.__name__, at=at)
    flags = [*TINY, *more, "--output-dir", str(tmp_path / "cut")]
    killed = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load(tmp_path / "cut" / "checkpoint.pth")["epoch"] == 1
    run(script, tmp_path / "cut", *more)
    run(script, tmp_path / "whole", *more)
    cut, whole = (load(tmp_path / f / "checkpoint.pth") for f in ("cut", "whole"))
    assert cut["epoch"] == 3 and cut["method"].keys() == whole["method"].keys()
    for key, value in whole["method"].items():
        assert torch.equal(cut["method"][key], value), key
    for a, b in zip(cut["history"], whole["history"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_a_finished_run_is_not_run_again(pretrained, capsys):
    before = (pretrained / "checkpoint.pth").stat().st_mtime_ns
    run(pretrain, pretrained)
    assert (pretrained / "checkpoint.pth").stat().st_mtime_ns == before and "epoch 1/3" not in capsys.readouterr().out


# ---- pretrain -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_record(pretrained):
    lines = [json.loads(line) for line in (pretrained / "log.txt").read_text().splitlines()]
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
    ],
)
def test_methods_optimisers_and_presets_train(more, tmp_path):
    assert math.isfinite(run(pretrain, tmp_path, "--epochs", 1, *more)["loss"])


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
    with pytest.raises(SystemExit, match="train/ and test/ or val/"):
        linear_eval.main(linear_eval.get_parser().parse_args(["--weights", str(tmp_path / "run" / "backbone.pth")]))


def test_schedule_warms_up_and_follows_the_cosine():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "peak": 1.92, "constant": c} for c in (False, True)]
    optimizer = torch.optim.SGD(groups, 1.92)
    lr = [pretrain.set_lr(optimizer, s, 10, 100) for s in range(100)]
    assert lr[0] == pytest.approx(0.192) and lr[9] == lr[10] == pytest.approx(1.92)
    assert lr[55] == pytest.approx(0.96) and 0 < lr[99] < 0.001 and sorted(lr[10:], reverse=True) == lr[10:]
    assert optimizer.param_groups[1]["lr"] == 1.92


def test_simsiams_predictor_keeps_its_learning_rate(tmp_path):
    args = arguments(pretrain, tmp_path, "--lr", 0.1, "--batch-size", 32)
    method = pretrain.Run(args).method
    optimizer = pretrain.optimizer_of([(n, p) for n, p in method.named_parameters() if p.requires_grad], method, args)
    constant = [g for g in optimizer.param_groups if g["constant"]]
    assert len(constant) == 1 and {id(p) for p in constant[0]["params"]} == {
        id(p) for p in method.predictor.parameters()
    }
    assert optimizer.param_groups[0]["peak"] == pytest.approx(0.1 * 32 / 256)
    everything = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(everything) == len([p for p in method.parameters() if p.requires_grad])


def test_rankme_and_the_warning_of_collapse():
    eye = torch.eye(16).repeat(4, 1)
    assert pretrain.rankme(eye) == pytest.approx(16, rel=1e-3) and pretrain.rankme(torch.ones(64, 16)) == pytest.approx(
        1, abs=1e-3
    )
    assert pretrain.collapsed({"z_std": 0.98, "rankme": 20.0}, 500) is None
    assert pretrain.collapsed({"z_std": 0.01, "rankme": 20.0}, 10) is None
    assert "collapsed" in pretrain.collapsed({"z_std": 0.01, "rankme": 20.0}, 500)
    assert "collapsed" in pretrain.collapsed({"z_std": 0.98, "rankme": 1.1}, 500)


def test_a_collapse_is_said_in_words_though_the_loss_looks_fine(tmp_path, capsys):
    flags = ["--epochs", 14, "--knn-every", 0, "--weight-decay", 1, "--lr", 4]  # decay drives the weights to zero
    last = run(pretrain, tmp_path, *flags)
    assert last["loss"] < -0.2 and last["rankme"] < 1.5
    assert "the embedding has collapsed" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(SystemExit, match=r"loss is nan at epoch 1 .*lower --lr"):
        run(pretrain, tmp_path, "--method", "simclr", "--lr", 1e30, "--warmup-epochs", 0)
    assert not (tmp_path / "checkpoint.pth").exists()


# ---- two ranks ------------------------------------------------------------------------------------------------------


def rank_main(rank, port, folder):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for method in METHODS:
        s = Search(arguments(search, folder, "--method", method, "--arch-lr", 0.1))
        for step in range(3):
            s.alpha_step(s.run.parts[1], step)
            s.weight_step(s.run.parts[0], step, 0.5)
        h = extract(s.method.encoder, s.run.pixels[:33], s.run.mean, s.run.std, s.run.device)
        state = {k: v for k, v in s.method.state_dict().items() if "running" not in k and "num_batches" not in k}
        torch.save(
            {"state": state, "h": h, "views": s.run.batch(s.run.parts[0], 0)[0]}, f"{folder}/{method}-{rank}.pth"
        )
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
        assert a["h"].shape == (33, 32) and torch.equal(a["h"], b["h"])
        one = Search(arguments(search, tmp_path / "one", "--method", method))
        for _ in range(6):  # the draws before
            one.run.batch(one.run.parts[0], 0)
        for view, x, y in zip(one.run.batch(one.run.parts[0], 0)[0], a["views"], b["views"]):
            torch.testing.assert_close(torch.cat([x, y]), view, atol=1e-5, rtol=1e-5)


# ---- measures -------------------------------------------------------------------------------------------------------


def test_knn_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    bank, query = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 40)
    right = 0
    for q, y in zip(query, truth):
        cosine = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
        votes = np.zeros(4)
        for i in np.argsort(-cosine)[:7]:
            votes[labels[i]] += np.exp(cosine[i] / 0.1)
        right += votes.argmax() == y
    t = [torch.tensor(a) for a in (bank, labels, query, truth)]
    assert knn_accuracy(*t, k=7, temperature=0.1, chunk=16) == pytest.approx(right / 40)
    assert knn_accuracy(*t, k=200) == knn_accuracy(*t, k=60)


def test_probe_separates_what_is_separable_and_is_blind_to_noise():
    g = torch.Generator().manual_seed(0)
    y, y_test = torch.arange(600) % 3, torch.arange(300) % 3
    centres = torch.randn(3, 8, generator=g) * 4
    x, x_test = (centres[t] + torch.randn(len(t), 8, generator=g) for t in (y, y_test))
    good = linear_probe(x * 100 + 7, y, x_test * 100 + 7, y_test, epochs=20)
    assert good["linear"] > 0.98 and good["held_out"] > 0.95
    noise = linear_probe(torch.randn(600, 8, generator=g), y, torch.randn(300, 8, generator=g), y_test, epochs=20)
    assert 0.2 < noise["linear"] < 0.47


def test_probe_gradient_is_that_of_cross_entropy():
    x, y = torch.randn(32, 5, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    weight, bias = linear_eval.fit_probes(x, y, 3, [(0.5, 0.0), (0.1, 0.01)], epochs=1, seed=0)
    layer = nn.Linear(5, 3)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    nn.functional.cross_entropy(layer(x), y).backward()
    for g, lr in enumerate((0.5, 0.1)):
        torch.testing.assert_close(weight[:, g].T, -lr * layer.weight.grad)
        torch.testing.assert_close(bias[g], -lr * layer.bias.grad)


@pytest.mark.parametrize("augment", ["--augment", "--no-augment"])
def test_evaluation_prints_and_writes_one_table_and_leaves_the_file_alone(augment, pretrained, capsys):
    before = (pretrained / "backbone.pth").read_bytes()
    flags = ["--weights", str(pretrained / "backbone.pth"), "--max-images", "200", "--epochs", "2", augment]
    rows = linear_eval.main(linear_eval.get_parser().parse_args(flags))["shapes"]
    assert [r["network"] for r in rows] == ["pre-trained", "untrained"] and all(0 <= r["linear"] <= 1 for r in rows)
    table = (pretrained / "linear_eval-shapes.md").read_text()
    assert table in capsys.readouterr().out and f"{100 * rows[0]['knn']:.2f}" in table
    assert (pretrained / "backbone.pth").read_bytes() == before


def test_features_leave_the_batch_norm_statistics_alone():
    backbone = build_backbone("resnet18", "small", 0.0625)[0].train()
    before = copy.deepcopy(backbone.state_dict())
    h = extract(backbone, make_shapes(10).pixels, (0.5,) * 3, (0.2,) * 3, torch.device("cpu"), batch_size=4)
    assert h.shape == (10, 32) and backbone.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_a_plain_torchvision_file_is_measured_too(tmp_path):
    theirs = torchvision.models.mobilenet_v2()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, facts = load_backbone(str(tmp_path / "theirs.pth"), "mobilenet_v2")
    assert facts["stem"] == "imagenet" and facts["mean"] == (0.485, 0.456, 0.406)
    theirs.classifier = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


# ---- what a wrong command is told -----------------------------------------------------------------------------------


def refused(capsys, script, *flags):
    """(message, status) of a command that must end in one line, before anything is written."""
    with pytest.raises(SystemExit) as stop:
        script.main(script.get_parser().parse_args(list(map(str, flags))))
    said = capsys.readouterr().err
    message, status = (stop.value.code, 1) if isinstance(stop.value.code, str) else (said, stop.value.code)
    assert message.strip().count("\n") == 0 and "Traceback" not in message
    return message, status


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
        (["--arch", "resnet19"], "invalid choice: 'resnet19'", 2),
        (["--bacth-size", 3], "unrecognized arguments: --bacth-size", 2),
        (["--data", tmp_path / "none"], "neither a folder nor a data set's name", 1),
        (["--data", tmp_path / "empty"], "no image below", 1),
        (["--data", tmp_path / "three", "--batch-size", 256], "do not fill one batch of 256: lower --batch-size", 1),
        (["--batch-size", 0], "--batch-size 0: must be above 0", 1),
        (["--held-out", 1], "must be a share", 1),
        (["--queue-size", 64], "--queue-size means nothing to --method simsiam", 1),
        (["--method", "moco", "--queue-size", 10**6], "larger than the", 1),
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
        ("no json", "is not an arch.json"),
        (json.dumps({"heads": heads | {"predictor": ["linear_gelu"]}}), "unknown operation 'linear_gelu'"),
        (json.dumps({"heads": {"projector": heads["projector"]}}), "for another method"),
    ]:
        path.write_text(text)
        said, status = refused(capsys, pretrain, *TINY, "--output-dir", tmp_path / "out", "--heads", path)
        assert message in said and status == 1
    assert (
        "neither a readable file nor one of default" in refused(capsys, pretrain, *TINY, "--heads", "simsiam_cifar")[0]
    )


def test_a_checkpoint_that_does_not_fit_is_left_alone(pretrained, tmp_path, capsys):
    for file in pretrained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    said, status = refused(capsys, pretrain, *TINY, "--output-dir", tmp_path, "--seed", 1)
    assert "made with --seed 0, not 1: choose another --output-dir" in said and status == 1
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(whole[: len(whole) // 2])
    said, status = refused(capsys, pretrain, *TINY, "--output-dir", tmp_path)
    assert "is damaged" in said and "--no-resume" in said and status == 1
    assert (tmp_path / "checkpoint.pth").stat().st_size == len(whole) // 2
    run(pretrain, tmp_path, "--no-resume")
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 3


def test_other_heads_or_images_under_the_same_name_are_noticed(tmp_path, capsys):
    heads, images = tmp_path / "arch.json", tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(make_shapes(40).pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(images / f"{i}.png")
    flags = ["--output-dir", tmp_path / "run", "--data", images, "--heads", heads, "--epochs", 1, "--held-out", 0]
    heads.write_text(json.dumps({"heads": PRESETS["simsiam_cifar10_resnet18"]}))
    run(pretrain, tmp_path, *flags)
    heads.write_text(json.dumps({"heads": PRESETS["simsiam_cifar10_resnet50"]}))
    assert "made with other heads" in refused(capsys, pretrain, *TINY, *flags)[0]
    heads.write_text(json.dumps({"heads": PRESETS["simsiam_cifar10_resnet18"]}))
    (images / "0.png").unlink()
    assert "made with other images" in refused(capsys, pretrain, *TINY, *flags)[0]


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
    assert "is not JSON that describes" in refused(capsys, linear_eval, "--weights", weights)[0]
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
        ["--knn_k=7", "--batch_size", "3", *(["--weights", "a_b"] if script is linear_eval else [])]
    )
    assert args.knn_k == 7 and args.batch_size == 3 and getattr(args, "weights", "a_b") == "a_b"


def test_searched_heads_are_the_searchable_modules(tmp_path):
    s = Search(arguments(search, tmp_path))
    assert all(isinstance(h, SearchHead) for h in s.heads.values()) and set(s.heads) == {"projector", "predictor"}
    assert not any(n.endswith("alpha") for n, p in s.method.named_parameters() if p.requires_grad)
