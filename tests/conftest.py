"""What several test files share: small runs of the scripts, what they are built of, and commands that are refused."""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small lose by more, and two test processes run

import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import pretrain
import search
from candidates import task_of

multiprocessing.set_forkserver_preload(["conftest"])
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

ROOT = Path(__file__).parent.parent
TINY = "--max-images 160 --width 0.0625 --batch-size 16 --epochs 3 --held-out 0.2 --knn-every 2 --device cpu --no-amp"
TINY = TINY.split()
BOTH = ["--space", "heads", "resnet", "--image-size", "16", "--target-macs", "0.5xresnet18", "--strategy", "gradient"]
SVG = "{http://www.w3.org/2000/svg}"


def call(script, *flags):
    """The script's main with these flags, in this process."""
    return script.main(script.get_parser().parse_args(list(map(str, flags))))


def arguments(script, folder, *more):
    return script.get_parser().parse_args([*TINY, "--output-dir", str(folder), *map(str, more)])


def run(script, folder, *more):
    return call(script, *TINY, "--output-dir", folder, *more)


def log_of(folder):
    """(first line, the epochs' lines) of a run's log."""
    first, *lines = map(json.loads, (folder / "log.txt").read_text().splitlines())
    return first, lines


def save_png(image, path):
    """An image (3, H, W) of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def make_search(folder, *more):
    return search.Search(task_of(*pretrain.start(search.check_flags(arguments(search, folder, *more)))))


class Built(Exception):
    pass


def build(script, folder, *more):
    """What main() hands to train(), by name; nothing is trained."""

    def train(*values):
        names = script_train.__code__.co_varnames
        raise Built(SimpleNamespace(**dict(zip(names, values))))

    script_train = script.train
    with patch.object(script, "train", train), pytest.raises(Built) as built:
        run(script, folder, *more)
    return built.value.args[0]


def load(path):
    return torch.load(path, weights_only=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank, world, port, function, args):
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, world, rank, "127.0.0.1", port))))
    function(rank, *args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads end before the process does, which else may abort


def spawn(function, *args, world=2, port=None):
    """function(rank, *args) as so many ranks at once, forked of a process that has imported the scripts already."""
    args = world, port or free_port(), function, args
    torch.multiprocessing.start_processes(as_rank, args, world, start_method="forkserver")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run(pretrain, folder)
    return folder


def refused(capsys, script, *flags):
    """(message, status) of a command that must end in one line, before anything is written."""
    with pytest.raises(SystemExit) as stop:
        call(script, *flags)
    said = capsys.readouterr().err
    message, status = (stop.value.code, 1) if isinstance(stop.value.code, str) else (said, stop.value.code)
    assert message.strip().count("\n") == 0 and "Traceback" not in message
    return message, status


def all_refused(capsys, script, base, table, status=1):
    """Every (flags, part of the message) of a table, with that status."""
    for flags, part in table:
        message, code = refused(capsys, script, *base, *flags)
        assert part in message and code == status, (flags, message)
