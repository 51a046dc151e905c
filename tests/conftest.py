"""What several test files share: small runs of the scripts, and commands that must be refused."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small lose by more, and pytest.ini starts two processes

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent.parent))
import pretrain

settings.register_profile("quick", deadline=None, derandomize=True, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

TINY = ["--max-images", "160", "--width", "0.0625", "--batch-size", "16", "--epochs", "3", "--held-out", "0.2"]
TINY += ["--knn-every", "2", "--device", "cpu", "--no-amp"]


def arguments(script, folder, *more):
    return script.get_parser().parse_args([*TINY, "--output-dir", str(folder), *map(str, more)])


def run(script, folder, *more):
    return script.main(arguments(script, folder, *more))


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run(pretrain, folder)
    return folder


def refused(capsys, script, *flags):
    """(message, status) of a command that must end in one line, before anything is written."""
    with pytest.raises(SystemExit) as stop:
        script.main(script.get_parser().parse_args(list(map(str, flags))))
    said = capsys.readouterr().err
    message, status = (stop.value.code, 1) if isinstance(stop.value.code, str) else (said, stop.value.code)
    assert message.strip().count("\n") == 0 and "Traceback" not in message
    return message, status
