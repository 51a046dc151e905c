"""The path of a GPU, without one: the scripts whole on a stand-in, and every method's graphs."""

import pytest
import torch
from conftest import build, call, make_search
from fake_cuda import a_gpu
from test_detect_eval import make_rectangles
from torch import nn
from torch._dynamo.utils import counters

import detect_eval
import linear_eval
import pretrain
import search
import study
from losses import METHODS
from models import BACKBONES

TINY = "--max-images 48 --width 0.0625 --image-size 16 --batch-size 8 --epochs 1 --held-out 0.2 --no-compile"
MULTI = "--recipe sslight-cnn --locals 2 --blur 1 0.1 0.5 --solarize 0 0.2 0 --clip-grad 1 --optimizer"
SIMCLR = "--method simclr --recalibrate-batches 1"
GRADIENT = "--recalibrate-batches 1 --strategy gradient --method"
FEW = "--held-out 0.4 --final-epochs 1"
CASES = [
    (pretrain, "--method simsiam"),
    (pretrain, "--method simsiam --teacher ema --recipe diet-2 --views-per-image 2 --global-size 96"),
    (pretrain, f"--method simclr {MULTI} adamw"),
    (pretrain, "--method moco --no-symmetric"),
    (pretrain, f"--method moco {MULTI} sgd"),
    (pretrain, "--method swav --optimizer sgd --epochs 2"),
    (pretrain, f"--method swav {MULTI} lars"),
    (pretrain, f"--method dino {MULTI} sgd --epochs 2"),
    (pretrain, "--method dino --arch vit_tiny --recipe sslight-vit --locals 1 --local-size 20"),
    (pretrain, "--method diet"),
    (pretrain, "--bench"),
    (search, SIMCLR),
    (search, f"--space heads resnet {GRADIENT} simclr"),
    (search, f"--space bottleneck {GRADIENT} moco"),
    (search, f"--space mobilenet {GRADIENT} diet"),
    (search, f"--space heads resnet {SIMCLR} {FEW} --finalists 2 --candidates 20"),
    (search, f"--space views {SIMCLR} {FEW} --candidates 2"),
    (search, f"--space heads resnet {GRADIENT} simclr --bench"),
    (search, f"--space resnet {SIMCLR} {FEW} --bench"),
    (study, "--networks resnetk1:1 --seeds 1 --method simclr"),
    (detect_eval, "--masks --iterations 2 --image-size 64 --batch-size 2 --rois 8 --fpn-channels 8 --seeds 1"),
    (
        linear_eval,
        "--no-compile --max-images 48 --shots 1 --augment 2 --finetune --finetune-lr 0.1 --finetune-epochs 1",
    ),
]


@pytest.mark.parametrize("script, flags", CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_script_runs_on_a_gpu_and_waits_for_it_in_no_step(script, flags, tmp_path, request, monkeypatch):
    """But for a sampled network's shape, in a gradient search's weight step; losses are read when a line is due."""
    flags = [*flags.split(), "--device", "cuda", "--output-dir", tmp_path / "run"]
    measures = script in (linear_eval, detect_eval)
    if measures:
        flags += ["--no-untrained", "--weights", request.getfixturevalue("pretrained") / "backbone.pth"]
    else:
        flags = [*TINY.split(), *flags]
    if script is detect_eval:
        flags += ["--data", make_rectangles(tmp_path / "rectangles", (4, 2), 64)]
    monkeypatch.setattr(linear_eval, "DECAYS", linear_eval.DECAYS[:1])  # each is a fit
    with a_gpu() as steps:
        call(script, *flags)
        if list(tmp_path.rglob("checkpoint.pth")):
            call(script, *flags)  # restores it
    if measures or "--bench" in flags:
        return
    samples = "--space" in flags and "gradient" in flags
    assert set(steps.waits) <= ({"models.py:choice"} if samples else set()) and steps.waits.total() <= steps.count
    copies = 4 if script is search else 2  # a batch's index and its views' parameters, for alphas and for weights
    if samples:
        copies += 3  # two networks for the alphas, one for the weights
    assert 0 < steps.copies.total() <= copies * steps.count


def compiled(function):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, backend="aot_eager", dynamic=False)


def gradients_of(loss, parameters):
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


LOCALS = ["--recipe", "sslight-cnn", "--locals", 1]


@pytest.fixture
def shallow(monkeypatch):
    """ResNet10 in place of ResNet18, of which half as much is compiled."""
    monkeypatch.setitem(BACKBONES, "resnet18", {**BACKBONES["resnet18"], "depth": [1] * 4})


@pytest.mark.parametrize("method, more", [*((m, []) for m in METHODS), ("moco", LOCALS), ("dino", LOCALS)])
def test_every_method_is_one_graph_with_autocast_and_has_the_eager_gradients(method, more, tmp_path, shallow):
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


@torch._dynamo.config.patch(recompile_limit=2)
def test_one_process_compiles_any_number_of_runs(tmp_path, shallow):
    for k in range(4):  # two more than dynamo compiles of one function
        built = build(pretrain, tmp_path, "--method", "simclr", "--width", 0.05 + 0.01 * k)
        counters.clear()
        built.method.compile(backend="eager")
        built.method(*built.batches(0))
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], k
