"""What a run survives: signals, kills, a full disk, a vanished folder, damaged files, a loss that is not finite."""

import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chaos import chaos
from conftest import BOTH, ROOT, TINY, build, load, log_of, refused, run, save_png

import pretrain
import search
from checkpoint import lock
from data import Batches, make_shapes
from models import PRESETS


def saved(folder):
    return json.loads(load(folder / "checkpoint.pth")["facts"])


def same_run(a, b):
    """Weights, alphas and queues of two folders are equal to the last bit, and so is the log but for its first line,
    seconds and memory."""
    x, y = (load(folder / "checkpoint.pth")["states"]["method"] for folder in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    for line, other in zip(log_of(a)[1], log_of(b)[1], strict=True):
        changing = {k: other[k] for k in ("seconds", "peak_mib") if k in line}
        assert line | changing == other


def at_batch(monkeypatch, number, act):
    """act() before that batch of views, counted from 1."""
    calls, batch = iter(range(1, 10**6)), Batches.__call__

    def counted(*args):
        if next(calls) == number:
            act()
        return batch(*args)

    monkeypatch.setattr(Batches, "__call__", counted)


def stop(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folders = {}

    def of(script, *more):
        if (script, more) not in folders:
            folders[script, more] = tmp_path_factory.mktemp("whole")
            run(script, folders[script, more], *more)
        return folders[script, more]

    return of


# ---- signals and kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, more, at, number",
    [
        (pretrain, ["--method", "moco"], 13, signal.SIGTERM),
        (pretrain, ["--method", "diet"], 16, signal.SIGINT),
        (search, [], 13, signal.SIGINT),
        (search, BOTH, 41, signal.SIGTERM),
    ],
)
def test_a_signal_saves_in_the_middle_of_an_epoch(script, more, at, number, tmp_path, monkeypatch, whole, capsys):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        at_batch(patch, at, stop(number))
        run(script, tmp_path, *more)
    assert end.value.code == 128 + number and signal.getsignal(number) is before
    said = f"stopped by {signal.Signals(number).name}, saved {tmp_path / 'checkpoint.pth'} after"
    assert said in capsys.readouterr().out
    per_epoch = 8 if script is pretrain else 4
    step = saved(tmp_path)["step"]
    assert per_epoch < step < 3 * per_epoch and (step % per_epoch or "diet" in more)  # diet: at an epoch's last batch
    if more == BOTH:
        assert load(tmp_path / "checkpoint.pth")["states"]["gradients"]["steps"].ndim == 2
    run(script, tmp_path, *more)
    assert f"goes on after {step} of {3 * per_epoch} steps" in capsys.readouterr().out
    same_run(tmp_path, whole(script, *more))


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import {script} as script
from test_checkpoint import at_batch, stop
class Patch:
    setattr = staticmethod(setattr)
at_batch(Patch, {at}, stop(signal.SIGKILL))
script.main(script.get_parser().parse_args())
"""


@pytest.mark.parametrize("script, more, at, minutes", [(pretrain, ["--method", "moco"], 13, 0), (search, [], 13, 1e-9)])
def test_a_killed_run_ends_with_the_uninterrupted_runs_weights(script, more, at, minutes, tmp_path, whole):
    code = KILLED.format(root=str(ROOT), script=script.__name__, at=at)
    flags = [*TINY, *more, "--output-dir", str(tmp_path), "--checkpoint-minutes", str(minutes)]
    killed = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert log_of(tmp_path)[1]  # it has been written after the first epoch
    step = saved(tmp_path)["step"] if minutes else None  # else it has none yet, and begins again
    run(script, tmp_path, *more)
    same_run(tmp_path, whole(script, *more))
    assert [start["after"] for start in log_of(tmp_path)[0].get("resumed", [])] == ([step] if step else [])


def test_a_random_kill_of_two_ranks_changes_nothing(tmp_path):
    """The short form of tests/chaos.py."""
    assert chaos(tmp_path, kills=1, seed=10, runs=["pretrain-moco-2"]) >= 1  # which compares the weights


def test_a_finished_run_is_not_run_again(pretrained, capsys):
    before = (pretrained / "checkpoint.pth").stat().st_mtime_ns
    run(pretrain, pretrained)
    assert (pretrained / "checkpoint.pth").stat().st_mtime_ns == before and "epoch 1/3" not in capsys.readouterr().out


def test_two_processes_do_not_share_a_folder(tmp_path, capsys):
    handle = lock(tmp_path / ".lock")
    message, status = refused(capsys, pretrain, *TINY, "--output-dir", tmp_path)
    assert "another process is at work" in message and status == 1 and not list(tmp_path.glob("[!.]*"))
    os.close(handle)
    run(pretrain, tmp_path, "--epochs", 1)


# ---- the disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch, whole, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_batch(patch, 10, stop(signal.SIGTERM))
        run(pretrain, tmp_path)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # less than a checkpoint takes
        with pytest.raises(SystemExit) as end:
            run(pretrain, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = rf"could not write '{tmp_path}/checkpoint.pth' \(the one there is as it was\): .*File too large"
    assert re.search(said, end.value.code) and "\n" not in end.value.code
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    run(pretrain, tmp_path)
    same_run(tmp_path, whole(pretrain))


def test_a_folder_that_vanishes_ends_the_run(tmp_path, monkeypatch):
    at_batch(monkeypatch, 10, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(SystemExit, match=r"could not write '.*log.txt': No such file or directory"):
        run(pretrain, tmp_path / "run")


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_fit_is_left_alone(pretrained, tmp_path, capsys, monkeypatch):
    for file in pretrained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    said, status = refused(capsys, pretrain, *TINY, "--output-dir", tmp_path, "--seed", 1)
    assert "made with --seed 0, not 1: choose another --output-dir" in said and status == 1
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    monkeypatch.setattr(pretrain, "SCRIPT", "my_pretrain.py")  # a copy with another loop
    said, _ = refused(capsys, pretrain, *TINY, "--output-dir", tmp_path)
    assert "made with script pretrain.py, not my_pretrain.py" in said
    monkeypatch.undo()
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(whole[: len(whole) // 2])
    said, status = refused(capsys, pretrain, *TINY, "--output-dir", tmp_path)
    assert "is damaged, or of another version" in said and "--no-resume" in said and status == 1
    assert (tmp_path / "checkpoint.pth").stat().st_size == len(whole) // 2
    facts = json.dumps({"flags": {}, "epoch": 3, "step": 0})  # of a version before this one
    torch.save({"facts": facts, "crc": zlib.crc32(facts.encode())}, tmp_path / "checkpoint.pth")
    assert "of another version" in refused(capsys, pretrain, *TINY, "--output-dir", tmp_path)[0]
    run(pretrain, tmp_path, "--no-resume")
    assert saved(tmp_path)["step"] == 24


def test_other_heads_or_images_under_the_same_name_are_noticed(tmp_path, capsys):
    heads, images = tmp_path / "arch.json", tmp_path / "images"
    for i, image in enumerate(make_shapes(40).pixels):
        save_png(image, images / f"{i}.png")
    flags = ["--output-dir", tmp_path / "run", "--data", images, "--heads", heads, "--epochs", 1, "--held-out", 0]
    heads.write_text(json.dumps({"heads": PRESETS["simsiam_cifar10_resnet18"]}))
    run(pretrain, tmp_path, *flags)
    heads.write_text(json.dumps({"heads": PRESETS["simsiam_cifar10_resnet50"]}))
    assert "another set of heads (--heads)" in refused(capsys, pretrain, *TINY, *flags)[0]
    heads.write_text(json.dumps({"heads": PRESETS["simsiam_cifar10_resnet18"]}))
    (images / "0.png").unlink()
    assert "made with another set of images (--data)" in refused(capsys, pretrain, *TINY, *flags)[0]


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_batch(tmp_path, monkeypatch):
    flags = ["--method", "simclr", "--lr", 1e30, "--warmup-epochs", 0, "--print-every", 3]
    with pytest.raises(SystemExit, match=r"the loss is (nan|inf) at epoch 1, step 2 \(lr .*lower --lr") as end:
        run(pretrain, tmp_path, *flags)
    assert "\n" not in end.value.code and not (tmp_path / "checkpoint.pth").exists()
    bad = json.loads((tmp_path / "not-finite.json").read_text())
    assert (bad["what"], bad["epoch"], bad["step"]) == ("loss", 1, 2) and math.isfinite(bad["last_finite"])
    rows = build(pretrain, tmp_path / "again", *flags).batches.rows_of(1).tolist()
    assert bad["rows"] == rows and bad["images"] == [str(i) for i in rows]
    assert bad["lr"] == pytest.approx(1e30 * 16 / 256 * (1 + math.cos(math.pi / 24)) / 2)


def test_a_deterministic_run_is_the_same_run_and_says_what_cannot_be(tmp_path, whole):
    run(pretrain, tmp_path, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    a, b = (load(folder / "backbone.pth") for folder in (tmp_path, whole(pretrain)))
    assert all(torch.equal(a[k], b[k]) for k in a)
    build(pretrain, tmp_path / "again")
    assert not torch.are_deterministic_algorithms_enabled()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    after_step = pretrain.METHODS["simsiam"].after_step

    def poison(method, progress):
        if progress == 1:  # after the last step, so that no loss sees it
            method.encoder.conv1.weight.data[0, 0, 0, 0] = math.nan
        after_step(method, progress)

    monkeypatch.setattr(pretrain.METHODS["simsiam"], "after_step", poison)
    with pytest.raises(SystemExit, match=r"after 8 steps method.encoder.conv1.weight is not finite any more"):
        run(pretrain, tmp_path, "--epochs", 1)
    assert not (tmp_path / "checkpoint.pth").exists()


# ---- the log --------------------------------------------------------------------------------------------------------


def test_the_logs_first_line_says_what_made_it(pretrained):
    first, _ = log_of(pretrained)
    assert first["command"].startswith("torchrun pretrain.py --width 0.0625") and first["host"] == platform.node()
    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    assert first["versions"].items() >= versions.items() and "resumed" not in first
    git = ["git", "-C", ROOT, "cat-file", "commit", first["commit"].removesuffix("-dirty")]
    assert len(git[-1]) == 40 and subprocess.run(git, capture_output=True).returncode == 0


def test_memory_does_not_grow_after_the_first_epochs(tmp_path):
    """The short form of tests/soak.py."""
    flags = [*TINY, "--max-images", "96", "--epochs", "24", "--output-dir", str(tmp_path)]
    subprocess.run([sys.executable, ROOT / "pretrain.py", *flags], check=True, capture_output=True)
    peaks = [line["peak_mib"] for line in log_of(tmp_path)[1]]
    assert len(peaks) == 24 and peaks[-1] - peaks[7] < 8


def test_the_logs_numbers_go_to_tensorboard_where_it_is_installed(tmp_path, capsys, monkeypatch):
    boards = []

    class Board:
        def __init__(self, folder):
            self.folder, self.seen = folder, []
            boards.append(self)

        def add_scalar(self, name, value, step):
            self.seen.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    run(pretrain, tmp_path / "a", "--tensorboard")
    lines = log_of(tmp_path / "a")[1]
    (board,) = boards
    assert board.folder == str(tmp_path / "a" / "tensorboard")
    assert [x for x in board.seen if x[0] == "loss"] == [("loss", line["loss"], line["epoch"]) for line in lines]
    assert {name for name, *_ in board.seen} == {k for line in lines for k in line} - {"epoch"}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message, _ = refused(capsys, pretrain, *TINY, "--output-dir", tmp_path / "b", "--tensorboard")
    assert "pip install tensorboard" in message
