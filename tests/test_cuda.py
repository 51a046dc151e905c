"""The path of a GPU, without one: the scripts whole on a stand-in, and every method's graphs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, make_search
from torch import nn
from torch._dynamo.utils import counters

import pretrain
from losses import METHODS

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{case: what fake_cuda.py says of it}"""
    file = tmp_path_factory.mktemp("fake") / "cases.json"
    command = [sys.executable, str(TESTS / "fake_cuda.py"), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert file.exists(), done.stderr
    return json.loads(file.read_text())


def test_every_script_runs_on_a_gpu(cases):
    assert len(cases) > 24 and {name: c["error"] for name, c in cases.items() if c["error"]} == {}


def test_the_host_does_not_wait_in_a_step(cases):
    """But for a sampled network's shape, in a gradient search's weight step; losses are read when a line is due."""
    trained = {name: c for name, c in cases.items() if c["steps"]}
    assert len(trained) > 20
    for name, case in trained.items():
        sampled = name.startswith("search") and name not in ("search heads", "search supernet", "search views")
        assert set(case["waits"]) <= ({"models.py:choice"} if sampled else set()), name
        assert sum(case["waits"].values()) <= 1, name
        batches = 2 if name.startswith("search") else 1  # of alphas, averaged over two gates, and of weights
        assert 0 < case["copies"] <= 3 * batches, name


def compiled(function):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, backend="aot_eager", dynamic=False)


def gradients_of(loss, parameters):
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


LOCALS = ["--recipe", "sslight-cnn", "--locals", 1]


@pytest.mark.parametrize("method, more", [*((m, []) for m in METHODS), ("moco", LOCALS), ("dino", LOCALS)])
def test_every_method_is_one_graph_with_autocast_and_has_the_eager_gradients(method, more, tmp_path):
    built = build(pretrain, tmp_path, "--method", method, "--amp", *more)
    method, (views, index) = built.method, built.batches(0)
    parameters = [p for p in method.parameters() if p.requires_grad]
    state = {k: v.clone() for k, v in method.state_dict().items()}
    results = []
    for forward in (method, compiled(method)):
        method.load_state_dict(state)
        with pretrain.autocast(built.args, built.device):
            loss = forward(views, index)
        results.append((loss.detach(), gradients_of(loss, parameters)))
    (loss, eager), (same_loss, whole) = results
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(same_loss, loss, rtol=1e-3, atol=1e-3)
    assert nn.functional.cosine_similarity(whole, eager, dim=0) > 0.995 and eager.norm() > 0  # bf16 in another order


def test_a_masked_supernet_is_one_graph_whatever_is_sampled(tmp_path):
    flags = ["--space", "heads", "resnet", "--image-size", 16, "--method", "simclr", "--strategy", "gradient"]
    s = make_search(tmp_path, *flags)
    s.alpha_model = compiled(s.method)
    for step in range(3):
        s.alpha_step(s.warmup + step)
        s.weight_step(s.warmup + step)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2


def test_one_process_compiles_any_number_of_runs(tmp_path):
    for k in range(10):  # two more than dynamo compiles of one function
        built = build(pretrain, tmp_path, "--method", "simclr", "--width", 0.05 + 0.01 * k)
        counters.clear()
        built.method.compile(backend="eager")
        built.method(*built.batches(0))
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], k
