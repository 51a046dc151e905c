"""pretrain.py, its optimisers and schedules, several ranks, and what all three scripts say to a wrong command."""

import argparse
import copy
import json
import math
import os
import re
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, all_refused, arguments, build, load, log_of, make_search, run, save_png, spawn
from PIL import Image
from torch import nn
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode

import detect_eval
import launch
import linear_eval
import optim
import pretrain
import search
import study
from checkpoint import control_group
from data import make_shapes
from linear_eval import extract
from losses import METHODS
from models import PRESETS, build_backbone, build_head, head_dims

# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_record(pretrained):
    _, lines = log_of(pretrained)
    assert [line["epoch"] for line in lines] == [1, 2, 3] and ["knn" in line for line in lines] == [False, True, True]
    facts = json.loads((pretrained / "backbone.json").read_text())
    assert (facts["arch"], facts["width"], facts["stem"], facts["data"]) == ("resnet18", 0.0625, "small", "shapes")
    assert "--max-images 160" in facts["command"] and facts["versions"]["torch"] == torch.__version__
    assert Image.open(pretrained / "views.png").size[0] > 32 * 8


def test_a_run_of_diet_normalises_its_loss_and_leaves_no_classifier(tmp_path):
    more = ["--method", "diet", "--projector", "mlp", "--views-per-image", 2, "--recipe", "diet-2"]
    facts = run(pretrain, tmp_path, "--epochs", 1, *more)
    # of the 128 images that are trained on; the classifier stays in the checkpoint
    assert load(tmp_path / "checkpoint.pth")["states"]["method"]["classifier.weight"].shape == (128, 32)
    assert not any("classifier" in key for key in load(tmp_path / "backbone.pth"))
    floor, chance = METHODS["diet"].floor.fget(argparse.Namespace(smoothing=0.8, n=128)), math.log(128)
    assert facts["normalised"] == pytest.approx((chance - facts["loss"]) / (chance - floor))


def test_every_keyword_of_a_method_is_a_flag(tmp_path):
    flags = ["--method", "dino", "--teacher-temperature", 0.03, 0.05, "--center-momentum", 0.8, "--no-head-bn"]
    method = build(pretrain, tmp_path, *flags).method
    assert method.teacher_temperatures == (0.03, 0.05) and method.center_momentum == 0.8
    assert not any(isinstance(m, nn.BatchNorm1d) for m in method.projector.modules())
    preset = "simsiam_cifar10_resnet18"
    predictor = build(pretrain, tmp_path, "--heads", preset).method.predictor
    assert str(predictor) == str(build_head(PRESETS[preset]["predictor"], head_dims(4, 128, 32, 128)))
    parser = pretrain.get_parser()
    known = {o for a in parser._actions for o in a.option_strings}
    for name, function in [*METHODS.items(), ("views", pretrain.adjust)]:
        assert {launch.dashed(k) for k in launch.keywords(function)} <= known, name


def test_images_without_labels_are_enough_resident_or_streamed(tmp_path, capsys):
    for i, image in enumerate(make_shapes(60).pixels):
        save_png(image, tmp_path / "images" / str(i % 3) / f"{i}.png")
    flags = ["--data", tmp_path / "images", "--image-size", 16, "--epochs", 1]
    last = run(pretrain, tmp_path / "run", *flags)
    assert "knn" not in last and "no labels" in capsys.readouterr().out
    run(pretrain, tmp_path / "stream", *flags, "--resident-gb", 1e-9)  # decoded as they are needed: the same run
    whole, stream = (load(tmp_path / name / "backbone.pth") for name in ("run", "stream"))
    assert whole.keys() == stream.keys() and all(whole[k].equal(stream[k]) for k in whole)
    weights = ["--no-pictures", "--weights", tmp_path / "run" / "backbone.pth"]
    all_refused(capsys, linear_eval, weights, [([], "train/ and test/ or val/")])


def test_a_bench_reports_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain.bench, "__defaults__", (3, 1))  # steps, warm-up
    file = tmp_path / "bench.json"
    figures = run(pretrain, tmp_path / "run", "--bench", "--bench-json", file)
    assert figures["memory"] >= figures["memory_before"] > 2**20 and min(figures["seconds"].values()) > 0
    said, written = capsys.readouterr().out, json.loads(file.read_text())
    assert "views, loss and optimiser add" in said and "peak memory" in said
    assert written.items() >= figures.items() and written["command"].startswith("torchrun pretrain.py --width")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("method", ["simsiam", "moco"])
def test_the_flop_of_a_step_are_counted(method, tmp_path):
    """Beside torch's own count of a whole step: ResNet has no grouped convolutions, and the first layer's gradient to
    the images is not needed."""
    built = build(pretrain, tmp_path, "--method", method)
    views, index = built.batches(0)
    with FlopCounterMode(display=False) as counter:
        sum(o.sum() for o in built.method.outputs(views, index) if o.requires_grad).backward()
    first = 2 * 2 * 16 * 32 * 32 * 3 * 9 * 4  # 2 MAC; two views of 16 images of 32 px, 3x3, 3 to 4 channels
    assert pretrain.step_flop(built.method, views, index) == counter.get_total_flops() + first


def test_a_profile_is_a_trace_of_three_steps(tmp_path):
    run(pretrain, tmp_path, "--profile", "--epochs", 1)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(str(e.get("name")).startswith("ProfilerStep#") and e.get("ph") == "X" for e in events) == 3
    assert any("aten::convolution" in str(e.get("name")) for e in events)


def test_views_of_the_monitor_under_autocast(tmp_path):
    flags = ["--method", "diet", "--global-size", 96, "--max-images", 40, "--batch-size", 8, "--amp"]
    built = build(pretrain, tmp_path, *flags)
    plain = built.batches(0)[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        view = built.batches(0)[0][0]
    assert torch.equal(view, plain) and view.dtype == torch.float32 and view.shape[-1] == 96
    run(pretrain, tmp_path / "run", *flags, "--epochs", 1)


def test_small_images_get_no_local_views_unless_asked(tmp_path):
    for method in ("swav", "dino"):
        for flags, n in (([], 2), (["--locals", 2], 4), (["--global-size", 72, "--max-images", 40], 8)):
            assert len(build(pretrain, tmp_path, "--method", method, *flags).batches.multi_crop.views) == n


def test_a_run_that_stops_after_an_epoch_goes_on_to_the_uninterrupted_runs_weights(tmp_path, pretrained):
    images = pretrain.load_data(arguments(pretrain, tmp_path), "shapes", "train")
    args = arguments(pretrain, tmp_path)
    first = pretrain.run_in(tmp_path, args, images, "resnet18", until=1)
    assert first["epoch"] == 1 and {"infonce", "rankme", "held_out_loss"} <= first.keys()
    assert not (tmp_path / "backbone.pth").exists()
    again = pretrain.run_in(tmp_path, args, images, "resnet18", until=1)
    assert again == first
    last = pretrain.run_in(tmp_path, args, images, "resnet18")
    assert last["epoch"] == 3
    for key, value in load(pretrained / "backbone.pth").items():
        assert torch.equal(load(tmp_path / "backbone.pth")[key], value)
    error = pretrain.run_in(tmp_path / "broken", args, images, "resnet18", lr=1e30)["error"]
    assert "stopped" in error


def test_infonce_is_the_formula_in_float64():
    rng = np.random.default_rng(0)
    h1, h2 = rng.normal(size=(2, 7, 5))
    h = np.concatenate([h1, h2])
    h = h - h.mean(0)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    similarity = h @ h.T / 0.1
    losses = []
    for i in range(14):
        others = [j for j in range(14) if j != i]
        losses.append(np.log(np.exp(similarity[i, others]).sum()) - similarity[i, (i + 7) % 14])
    ours = pretrain.infonce(torch.from_numpy(h1), torch.from_numpy(h2)).item()
    assert ours == pytest.approx(np.mean(losses), rel=1e-12)
    assert pretrain.infonce(torch.from_numpy(h1), torch.from_numpy(h1)) < ours  # which is easy


def test_rankme_and_the_warnings_in_words(tmp_path, capsys):
    assert pretrain.rankme(torch.eye(16).repeat(4, 1)) == pytest.approx(16, rel=1e-3)
    assert pretrain.rankme(torch.ones(64, 16)) == pytest.approx(1, abs=1e-3)
    assert pretrain.collapsed({"z_std": 0.98, "rankme": 20.0}, 500) is None
    assert pretrain.collapsed({"z_std": 0.01, "rankme": 20.0}, 10) is None
    assert "collapsed" in pretrain.collapsed({"z_std": 1e-5, "rankme": 20.0}, 10)
    assert "collapsed" in pretrain.collapsed({"z_std": 0.98, "rankme": 1.1}, 500)
    assert "a faster teacher" in pretrain.plateau(math.log(256) * 1.001, math.log(256), 500)
    for loss, chance, steps in ((math.log(256) * 0.99, math.log(256), 500), (1.0, None, 500), (1.0, 1.0, 10)):
        assert pretrain.plateau(loss, chance, steps) is None
    flags = ["--epochs", 14, "--knn-every", 0, "--weight-decay", 1, "--lr", 4]  # decay drives the weights to zero
    last = run(pretrain, tmp_path, *flags)
    assert last["loss"] < -0.2 and last["rankme"] < 1.5
    assert "the embedding has collapsed" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", [search, pretrain])
def test_a_gpu_trains_compiled_and_in_bf16(script, tmp_path):
    run(script, tmp_path, "--epochs", 1, "--device", "cuda", "--amp")
    line = log_of(tmp_path)[1][-1]
    assert math.isfinite(line["loss"]) and line["z_std"] > 0


# ---- optimisers and schedules ---------------------------------------------------------------------------------------


def trainable(method):
    return [(n, p) for n, p in method.named_parameters() if p.requires_grad]


def test_lars_is_what_its_formula_says():
    rng = np.random.default_rng(0)
    start = [rng.normal(size=(4, 3)), np.zeros((2, 2)), rng.normal(size=5)]
    grads = [[rng.normal(size=s.shape) for s in start] for _ in range(3)]
    params = [nn.Parameter(torch.tensor(s)) for s in start]
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "scale": False}]
    lars = optim.LARS(groups, lr=0.5)
    for p in params:
        lars.state[p]["momentum"] = torch.zeros_like(p)
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
    method = METHODS["dino"](build_backbone("mobilenet_v2")[0])
    optimizer = optim.optimizer_of(trainable(method), method, args)
    kinds = {(g["scale"], g["decays"]): g for g in optimizer.param_groups}
    sizes = {k: len(g["params"]) for k, g in kinds.items()}
    assert sizes == {(True, True): 39, (True, False): 17, (False, False): 111 - 2}  # no biases ahead of BN here
    lrs = [optim.set_lr(optimizer, step, 10, 100) for step in range(101)]
    assert lrs[9] == pytest.approx(1.92) and max(lrs) == lrs[9] and lrs[100] == pytest.approx(0.0048)
    assert lrs[0] == pytest.approx(0.192) and lrs[55] == pytest.approx((1.92 + 0.0048) / 2, rel=1e-6)
    assert sorted(lrs[10:], reverse=True) == lrs[10:]
    assert kinds[True, True]["weight_decay"] == pytest.approx(1e-4) and kinds[True, False]["weight_decay"] == 0
    adamw = optim.optimizer_of(trainable(method), method, arguments(pretrain, tmp_path, "--optimizer", "adamw"))
    counts: dict = {}
    for g in adamw.param_groups:
        counts[g["weight_decay"]] = counts.get(g["weight_decay"], 0) + len(g["params"])
    assert counts == {0.05: 56, 0.0: 109}


def test_simsiams_predictor_keeps_its_learning_rate(tmp_path):
    built = build(pretrain, tmp_path, "--lr", 0.1, "--batch-size", 32)
    constant = [p for g in built.optimizer.param_groups if g["constant"] for p in g["params"]]
    assert set(map(id, constant)) == set(map(id, built.method.predictor.parameters()))
    everything = [p for g in built.optimizer.param_groups for p in g["params"]]
    assert len(everything) == len(trainable(built.method))
    optim.set_lr(built.optimizer, 50, 0, 100)
    lrs = {g["constant"]: g["lr"] for g in built.optimizer.param_groups}
    assert lrs == {False: pytest.approx(0.1 * 32 / 256 / 2), True: pytest.approx(0.1 * 32 / 256)}


def settings(tmp_path, *flags):
    args = arguments(pretrain, tmp_path, "--batch-size", 256, *flags)
    encoder, _ = build_backbone(args.arch, "small", args.width)
    return optim.settings_of(METHODS[args.method](encoder), args)


def test_defaults_are_the_fields(tmp_path):
    assert settings(tmp_path, "--batch-size", 512)[:3] == ("sgd", pytest.approx(0.03), 5e-4)  # 2011.10566 on CIFAR
    assert settings(tmp_path, "--batch-size", 128)[1] * 128 / 256 == pytest.approx(0.06)
    for batch, rate in ((256, 0.12), (128, 0.06), (64, 0.06), (16, 0.015)):  # lightly's smallest batch is 128
        flags = "--method", "simclr", "--batch-size", batch
        assert settings(tmp_path, *flags)[1] * batch / 256 == pytest.approx(rate)
        assert settings(tmp_path, *flags, "--lr", 1)[:2] == ("sgd", 1)
    assert settings(tmp_path, "--method", "swav")[:3] == ("adamw", 2e-3, 1e-6)
    assert settings(tmp_path, "--method", "simclr", "--optimizer", "adamw")[:3] == ("adamw", 1e-3, 0.05)
    vit = "--method", "dino", "--arch", "vit_tiny"
    assert settings(tmp_path, *vit) == ("adamw", 5e-4, 0.04, 2.5e-6, 0.4)
    assert settings(tmp_path, *vit, "--optimizer", "sgd").optimizer == "sgd"
    assert settings(tmp_path, "--method", "diet", "--arch", "vit_tiny")[:3] == ("adamw", 1e-3, 0.05)


def test_a_vit_by_default_decays_its_products_and_not_its_norms(tmp_path):
    args = arguments(pretrain, tmp_path, "--method", "dino", "--arch", "vit_tiny")
    method = METHODS["dino"](build_backbone("vit_tiny", "small", 0.0625)[0])
    optimizer = optim.optimizer_of(trainable(method), method, args)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert all(decays[id(p)] == (0.04 if p.ndim > 1 else 0) for _, p in trainable(method))
    optim.set_lr(optimizer, 100, 10, 100)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.4, 0}


def test_all_momenta_are_there_before_the_first_step(tmp_path):
    """Fused SGD fails where some are and others are not: a last layer that thaws, a block that was left out."""
    method = METHODS["dino"](build_backbone("resnet18", "small", 0.0625)[0])
    named = trainable(method)
    with torch.no_grad():
        fused = torch.optim.SGD([p for _, p in named], 0.1, momentum=0.9, fused=True)
    optimizer = optim.optimizer_of(named, method, arguments(pretrain, tmp_path, "--optimizer", "sgd"))
    for group in optimizer.param_groups:
        for p in group["params"]:
            fused.state[p] = optimizer.state[p]
    for frozen in (True, False):
        for n, p in named:
            p.grad = None if frozen and n.startswith("last_layer") else torch.ones_like(p)
        fused.step()
    assert all(fused.state[p]["momentum_buffer"].abs().max() > 0 for _, p in named)


def test_gradients_are_clipped_together(tmp_path):
    built = build(pretrain, tmp_path)
    built.method(*built.batches(0)).backward()
    grads = [p.grad for p in built.method.parameters() if p.grad is not None]
    before = [g.double().clone() for g in grads]
    norm = math.sqrt(sum(g.square().sum().item() for g in before))
    assert norm > 0.02
    optim.clip_gradients(built.method, 0.01)
    for g, b in zip(grads, before):
        torch.testing.assert_close(g.double(), b * 0.01 / norm, rtol=1e-4, atol=1e-12)
    optim.clip_gradients(built.method, 1.0)  # nothing to do
    assert math.sqrt(sum(g.square().sum().item() for g in grads)) == pytest.approx(0.01, rel=1e-4)


# ---- two ranks ------------------------------------------------------------------------------------------------------


def rank_main(rank, folder):
    for method in METHODS:
        space = {"moco": ["heads", "resnet"], "diet": ["resnet"]}.get(method)
        more = ["--space", *space, "--image-size", "16", "--strategy", "gradient"] if space else []
        s = make_search(folder, "--method", method, "--arch-lr", 0.1, *more)
        gates = []
        for step in range(3):
            s.alpha_step(step)
            s.weight_step(step)
            gates.append(s.choices.choice() if space else None)
        h = extract(s.method.encoder, s.images.pixels[:33], (0.5,) * 3, (0.2,) * 3, s.device)
        state = {k: v for k, v in s.method.state_dict().items() if "running" not in k and "num_batches" not in k}
        subnet = s.recalibrated_subnet(s.choice(), 2).encoder.state_dict() if space else {}
        facts = {"state": state, "h": h, "views": s.batches(7)[0], "gates": gates, "subnet": subnet}
        torch.save(facts, f"{folder}/{method}-{rank}.pth")
        if method == "diet":  # the checkpoint has all rows; each rank gets its own back
            whole = copy.deepcopy([s.method.state_dict(), s.optimizer.state_dict()])
            rows = s.method.classifier.weight.detach().clone()
            with torch.no_grad():
                for p in s.weights:
                    p.zero_()
            s.method.load_state_dict(whole[0])
            s.optimizer.load_state_dict(whole[1])
            assert torch.equal(s.method.classifier.weight, rows) and len(rows) == 64
            again = s.optimizer.state_dict()["state"]
            for i, moments in whole[1]["state"].items():
                assert all(torch.equal(x, again[i][k]) for k, x in moments.items())


def group_timeouts(rank, folder):
    launch.setup("cpu", rank_timeout=120.0)
    groups = [torch.distributed.group.WORLD, control_group()]
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    torch.save(timeouts, f"{folder}/{rank}.pth")


def test_all_groups_wait_as_long_as_asked(tmp_path):
    spawn(group_timeouts, tmp_path)
    assert load(tmp_path / "1.pth") == [7200, 7200]


def test_two_ranks_keep_equal_alphas_weights_and_queues(tmp_path):
    spawn(rank_main, tmp_path)
    for method in METHODS:
        a, b = (load(tmp_path / f"{method}-{r}.pth") for r in range(2))
        for key in a["state"]:
            assert torch.equal(a["state"][key], b["state"][key]), f"{method} {key}"
        assert any(v.abs().max() > 0.05 for k, v in a["state"].items() if k.endswith("alpha"))
        assert a["h"].shape == (33, 32) and torch.equal(a["h"], b["h"]) and a["gates"] == b["gates"]
        if a["gates"][0]:
            assert len(set(map(str, a["gates"]))) == 3
            assert all(torch.equal(x, b["subnet"][key]) for key, x in a["subnet"].items())  # BN statistics too
            continue
        one = make_search(tmp_path / "one", "--method", method)
        for view, x, y in zip(one.batches(7)[0], a["views"], b["views"]):
            torch.testing.assert_close(torch.cat([x, y]), view, atol=1e-5, rtol=1e-5)


def goes_on(rank, folder, until=None):
    for method in ("moco", "diet"):
        pretrain.main(arguments(pretrain, folder / method, "--method", method), until=until)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """1, then 2, then 1: MoCo's queue and DIET's rows are whole in a checkpoint."""
    goes_on(0, tmp_path, until=1)
    spawn(goes_on, tmp_path, 2)
    goes_on(0, tmp_path)
    for method in ("moco", "diet"):
        first, lines = log_of(tmp_path / method)
        assert [line["epoch"] for line in lines] == [1, 2, 3] and (tmp_path / method / "backbone.pth").exists()
        assert [first["ranks"], *(again["ranks"] for again in first["resumed"])] == [1, 2, 1]
        assert all(math.isfinite(line["loss"]) for line in lines)


def joins(rank, attempt):
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=str(attempt))
    launch.setup("cpu")
    x = torch.ones(1)
    torch.distributed.all_reduce(x)
    assert x == 2


def test_ranks_that_torchrun_restarts_do_not_take_each_other_for_those_of_before():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent
    keys = []
    for attempt in range(2):
        spawn(joins, attempt, port=store.port)
        keys.append(store.num_keys())
    assert keys[1] - 1 == 2 * (keys[0] - 1)  # none is written twice; one is the store's own


# ---- threads --------------------------------------------------------------------------------------------------------


def left_alone(rank, folder):
    """Rank 1 hangs before its first step, as after a network's cut."""
    if rank:
        pretrain.train = lambda *_: time.sleep(60)
    sys.argv = ["pretrain.py", *TINY, "--rank-timeout", "0.05", "--output-dir", str(folder)]
    with open(folder.with_name(f"{rank}.err"), "w") as sys.stderr:
        launch.run(pretrain.main, pretrain.get_parser())


def test_a_rank_that_has_lost_the_others_ends_in_time_with_one_line(tmp_path):
    begun = time.time()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 1"):
        spawn(left_alone, tmp_path / "run")
    message = (tmp_path / "0.err").read_text()
    assert time.time() - begun < 50 and message.count("\n") == 1, message
    assert message.startswith("pretrain.py: error on rank 0: it has lost the other ranks") and "0.05 minutes" in message


def spins(command, **more):
    """What libgomp says of each process that loads it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)} | more
    said = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said.stdout + said.stderr)


def test_threads_spin_shortly_however_a_script_is_started():
    python, short = [sys.executable], "1000"
    assert spins([*python, "-c", "import search"]) == [short]
    assert spins([*python, "linear_eval.py", "--help"], GOMP_SPINCOUNT="77") == ["77"]
    ranks = spins([*python, "-m", "torch.distributed.run", "--nproc-per-node", "1", "pretrain.py", "--help"])
    assert ranks.count(short) == 1 and len(ranks) == 2  # and torchrun itself


# ---- flags ----------------------------------------------------------------------------------------------------------


def test_a_last_layer_that_is_frozen_for_an_epoch_stays(tmp_path):
    def moved(*flags):
        built = build(pretrain, tmp_path / "built", "--method", "dino", "--seed", 3)
        start = [p.clone() for p in built.method.last_layer.parameters()]
        folder = tmp_path / "-".join(map(str, flags))
        pretrain.main(arguments(pretrain, folder, "--method", "dino", "--seed", 3, *flags), until=1)
        state = load(folder / "checkpoint.pth")["states"]["method"]
        names = [name for name, _ in built.method.last_layer.named_parameters()]
        return any(not torch.equal(state[f"last_layer.{name}"], p) for name, p in zip(names, start))

    assert not moved("--freeze-last-layer", 1) and moved("--freeze-last-layer", 0)


def test_flags_reach_what_they_are_for(tmp_path, monkeypatch):
    known = {}

    def notes(name, value=None):
        return lambda *args, **more: known.setdefault(name, (args, more)) and value

    monkeypatch.setattr(pretrain, "knn_accuracy", notes("knn", 0.5))
    built = build(pretrain, tmp_path, "--knn-t", 0.5, "--knn-k", 7)
    built.monitor.knn(built.method, built.monitor.held_out)
    assert known["knn"][0][-2:] == (7, 0.5)
    monkeypatch.setattr(torch.nn.Module, "compile", notes("compiled"))
    build(pretrain, tmp_path, "--compile", "--compile-mode", "reduce-overhead")
    assert known["compiled"][1] == {"mode": "reduce-overhead"}
    monkeypatch.setattr(launch, "synced", lambda method, _: known.update(synced=method) or method)
    known.pop("synced", None)
    assert build(pretrain, tmp_path, "--no-sync-bn") and "synced" not in known
    assert build(pretrain, tmp_path, "--sync-bn").method is known["synced"]
    assert build(pretrain, tmp_path, "--method", "swav", "--epsilon", 0.2).method.epsilon == 0.2
    monkeypatch.setattr(pretrain, "load_data", lambda args, *_: known.setdefault("root", args.data_root) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(pretrain, tmp_path, "--data", "cifar10", "--data-root", tmp_path / "elsewhere")
    assert known["root"] == str(tmp_path / "elsewhere")
    monkeypatch.undo()
    searched = make_search(tmp_path / "search", "--arch-weight-decay", 0.3)
    assert [group["weight_decay"] for group in searched.alpha_optimizer.param_groups] == [0.3]


def test_every_flag_is_used_by_a_test_or_a_command_of_the_readme():
    """As such, or as the keyword that becomes it."""
    text = "\n".join(file.read_text() for file in [*ROOT.glob("tests/*.py"), ROOT / "README.md"])
    used = set(re.findall(r"--[a-z0-9-]+", text))
    used |= {launch.dashed(keyword) for keyword in re.findall(r"[(, ](\w+)=", text)}
    for script in (search, pretrain, linear_eval, detect_eval, study):
        flags = [action.option_strings for action in script.get_parser()._actions]
        assert [names for names in flags if not used & set(names)] == []


# ---- what a wrong command is told -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [pretrain, search])
def test_a_wrong_command_is_told_in_one_line(script, tmp_path, capsys):
    out = ["--output-dir", tmp_path / "out", "--device", "cpu"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for i, image in enumerate(make_shapes(3).pixels):
        save_png(image, tmp_path / "three" / f"{i}.png")
    table = [
        (["--method", "simsiem"], "invalid choice: 'simsiem'"),
        (["--bacth-size", 3], "unrecognized arguments: --bacth-size 3; did you mean --batch-size?"),
        (["--nothing-like-it"], "unrecognized arguments: --nothing-like-it; --help"),
        (["--lr", "nan"], "argument --lr: invalid float value: 'nan'"),
        (["--device", "cuda:1"], "invalid choice: 'cuda:1'"),
    ]
    all_refused(capsys, script, out, table, status=2)
    table = [
        (["--arch", "resnet19"], "'resnet19' is neither a readable file nor one of resnet18"),
        (["--data", tmp_path / "none"], "neither a folder nor a data set's name"),
        (["--data", tmp_path / "empty"], "no image below"),
        (["--data", tmp_path / "three", "--batch-size", 256], "do not fill one batch of 256: lower --batch-size"),
        (["--batch-size", 0], "--batch-size 0: must be above 0"),
        (["--held-out", 1], "must be a share"),
        (["--seed", -1], "--seed -1: must be 0 or above"),
        (["--queue-size", 64], "--queue-size means nothing to --method simsiam"),
        (["--bench-json", "b.json"], "give both"),
        (["--bench", "--bench-json", "no/where/b.json"], "there is no such folder"),
        (["--recipe", "diet"], "--method simsiam compares two views of an image, and the recipe has one"),
        (["--projector", "none", "--out-dim", 64], "without a projector"),
        (["--method", "moco", "--queue-size", 10**6], "larger than the"),
        (["--method", "swav", "--queue-size", 10**6], "larger than the"),
        (["--clip-grad", 0], "--clip-grad 0.0: must be above 0"),
        (["--lr", -1], "--lr -1.0: must be above 0"),
        (["--method", "simclr", "--temperature", 0], "--temperature 0.0: must be above 0"),
        (["--checkpoint-minutes", -1], "--checkpoint-minutes -1.0: must be above 0, or 0: at the end"),
        (["--max-images", -5], "--max-images -5: must be 1 or above"),
        (["--image-size", -8], "--image-size -8: must be 1 or above"),
        (["--knn-k", 0], "--knn-k 0: must be above 0"),
        (["--width", 0.005], "has no channels left"),
        (["--profile", "--max-images", 150, "--held-out", 0, "--epochs", 2], "and this run has"),
        (["--output-dir", tmp_path / "file"], "File exists"),
        (["--output-dir", "/proc/run"], "/proc/run"),
    ]
    all_refused(capsys, script, out, table)
    assert not list(tmp_path.glob("out/*"))


def test_a_network_with_sync_bn_is_not_compiled(tmp_path, monkeypatch):
    assert make_search(tmp_path, "--compile").method._compiled_call_impl
    monkeypatch.setattr(launch, "synced", lambda module, _: nn.SyncBatchNorm.convert_sync_batchnorm(module))
    assert not make_search(tmp_path, "--compile", "--sync-bn").method._compiled_call_impl


def test_dev_mode_shows_tracebacks(monkeypatch):
    for dev_mode, raised in [(False, SystemExit), (True, ValueError)]:
        flags = types.SimpleNamespace(dev_mode=dev_mode)
        monkeypatch.setattr(launch, "sys", types.SimpleNamespace(argv=["a.py"], exit=sys.exit, flags=flags))
        with pytest.raises(raised), launch.user_errors():
            raise ValueError("wrong")


def test_heads_that_cannot_be_built_are_refused(tmp_path, capsys):
    path, heads = tmp_path / "arch.json", PRESETS["simsiam_cifar10_resnet18"]
    base = [*TINY, "--output-dir", tmp_path / "out", "--heads"]
    for text, message in [
        ("no json", "is not JSON"),
        (json.dumps({"heads": heads | {"predictor": ["linear_gelu"]}}), "unknown operation 'linear_gelu'"),
        (json.dumps({"heads": {"projector": heads["projector"]}}), "for another method"),
    ]:
        path.write_text(text)
        all_refused(capsys, pretrain, base, [([path], message)])
    all_refused(capsys, pretrain, base, [(["simsiam_cifar"], "neither a readable file nor one of default")])
    assert not list(tmp_path.glob("out/*"))


def test_weights_that_do_not_fit_are_refused(pretrained, tmp_path, capsys):
    weights = tmp_path / "backbone.pth"
    weights.write_bytes((pretrained / "backbone.pth").read_bytes())
    facts = json.loads((pretrained / "backbone.json").read_text())
    table = [([weights], "name it with --arch"), ([tmp_path / "none.pth"], "no weights at")]
    all_refused(capsys, linear_eval, ["--weights"], table)
    for text, message in [
        (json.dumps(facts | {"arch": "mobilenet_v2"}), "is missing"),
        (json.dumps(facts | {"width": 0.125}), "is (4, 3, 3, 3), not (8, 3, 3, 3)"),
        ("{", "is not JSON"),
        ("[1]", "a list, where a JSON object should be"),
        ("{}", 'does not say what "arch"'),
    ]:
        (tmp_path / "backbone.json").write_text(text)
        all_refused(capsys, linear_eval, ["--weights", weights], [([], message)])
    (tmp_path / "backbone.json").write_text(json.dumps(facts))
    weights.write_bytes(b"PK\x03\x04 cut")
    all_refused(capsys, linear_eval, ["--weights", weights], [([], "damaged")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.json", "backbone.pth"]


@pytest.mark.parametrize("script", [search, pretrain, linear_eval])
def test_flags_take_underscores_and_none_is_a_prefix_of_torchruns(script):
    flags = [o for a in script.get_parser()._actions for o in a.option_strings if o not in ("-h", "--help")]
    theirs = list(get_args_parser()._option_string_actions)
    assert not [(f, t) for f in flags for t in theirs if t.startswith(f)]
    weights = ["--weights", "a_b"] if script is not search else []
    args = script.get_parser().parse_args(["--knn_k=7", "--batch_size", "3", *weights])
    assert args.knn_k == 7 and args.batch_size == 3 and getattr(args, "weights", "a_b") == "a_b"
