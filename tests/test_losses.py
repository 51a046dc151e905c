"""Losses against numpy in float64, methods against their papers' facts, and two ranks against one process."""

import copy
import inspect
import math
import subprocess
import sys
from typing import Annotated, get_origin

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, load, spawn
from torch import nn

import losses
from launch import synced
from losses import METHODS
from models import SPACES, SearchBackbone, SearchHead, build_backbone, head_dims
from optim import clip_gradients, distributed

close = torch.testing.assert_close

# ---- losses ---------------------------------------------------------------------------------------------------------


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(target, logits):
    return -np.mean(np.sum(target * np.log(softmax(logits)), 1))


def numpy_nt_xent(z1, z2):
    z, n, total = unit(np.concatenate([z1, z2])), len(z1), 0.0
    for i in range(2 * n):
        others = [z[i] @ z[j] / 0.3 for j in range(2 * n) if j != i]
        total += np.log(np.sum(np.exp(others))) - z[i] @ z[(i + n) % (2 * n)] / 0.3
    return total / (2 * n)


def numpy_info_nce(q, k):
    similarities = np.column_stack([np.sum(unit(q) * unit(k), 1), unit(q) @ QUEUE.T])
    return cross_entropy(np.eye(1 + len(QUEUE))[0], similarities / T)


def numpy_sinkhorn(scores, iterations=3, queue=None):
    q = np.exp(np.concatenate([scores] if queue is None else [scores, queue]) / 0.05).T  # (K, N), as published
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T[: len(scores)]


T = np.float64(0.1)
rng = np.random.default_rng(0)
X, Y, QUEUE = rng.normal(size=(12, 7)), rng.normal(size=(12, 7)), unit(rng.normal(size=(20, 7)))
CENTER, INDEX = np.linspace(-1, 1, 7), rng.integers(0, 12, 12)
queue, center, index = torch.tensor(QUEUE).float(), torch.tensor(CENTER).float(), torch.tensor(INDEX)
LOSSES = {  # loss of (x, y), its reference
    "neg_cosine": (losses.neg_cosine, lambda p, z: -np.mean(np.sum(unit(p) * unit(z), 1))),
    "nt_xent": (lambda x, y: losses.nt_xent(x, y, 0.3), numpy_nt_xent),
    "info_nce": (lambda x, y: losses.info_nce(x, y, queue, 0.1), numpy_info_nce),
    "swav": (
        lambda x, y: losses.swav_loss(x, losses.fp32(y).softmax(1), 0.1),
        lambda x, y: cross_entropy(softmax(y), x / T),
    ),
    "dino": (
        lambda x, y: losses.dino_loss(x, y, center, 0.1, 0.04),
        lambda x, y: cross_entropy(softmax((y - CENTER) / 0.04), x / T),
    ),
    "diet": (
        lambda h, weight: losses.diet_loss(h, weight, index),
        lambda h, weight: cross_entropy(0.8 / 12 + 0.2 * np.eye(12)[INDEX], h @ weight.T),
    ),
}
BOTH = ("nt_xent", "diet")  # whose second argument is no target


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula_and_its_target_carries_no_gradient(name):
    loss, reference = LOSSES[name]
    x, y = (torch.tensor(v, requires_grad=True) for v in (X, Y))
    value = loss(x, y)
    assert value.item() == pytest.approx(reference(X, Y), rel=1e-6)  # queue and centre are fp32
    value.backward()
    assert x.grad.abs().amax(1).min() > 0
    assert (y.grad is not None) == (name in BOTH) and (y.grad is None or y.grad.abs().amax(1).min() > 0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_under_autocast_is_that_of_its_rounded_inputs_in_fp32(name):
    results = []
    for amp in (True, False):
        x, y = (torch.tensor(v, dtype=torch.bfloat16) for v in (X, Y))
        x, y = ((v if amp else v.float()).requires_grad_() for v in (x, y))
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            value = LOSSES[name][0](x, y)
        value.backward()
        results.append((value, x.grad.float()))
    (low, low_grad), (high, high_grad) = results
    assert torch.equal(low, high) and low.dtype == torch.float32
    close(low_grad, high_grad, rtol=2**-8, atol=1e-7)  # gradients of bf16 inputs come back as bf16


def test_sinkhorn_agrees_with_numpy_and_shares_out_evenly():
    scores, old = unit(rng.normal(size=(24, 6))), unit(rng.normal(size=(10, 6)))
    s, o = torch.tensor(scores), torch.tensor(old)
    for n in (1, 3):
        close(losses.sinkhorn(s, iterations=n), torch.tensor(numpy_sinkhorn(scores, n)))
    close(losses.sinkhorn(s, queue=o), torch.tensor(numpy_sinkhorn(scores, queue=old)))
    close(losses.sinkhorn(s, queue=o, weight=torch.tensor(0.0)), losses.sinkhorn(s))
    codes = losses.sinkhorn(s, iterations=200)
    close(codes.sum(1), torch.ones(24, dtype=torch.double))
    close(codes.sum(0), torch.full((6,), 4.0, dtype=torch.double))
    assert losses.sinkhorn((1000 * s).bfloat16()).isfinite().all()
    assert not losses.sinkhorn(s.requires_grad_()).requires_grad


# ---- methods --------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Without BN, so that ranks can be compared; it notes its calls."""

    feature_dim = 8

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 8))
        self.calls = []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return self.net(F.adaptive_avg_pool2d(x, 4).flatten(1))


def build(name, heads=None, **options):
    torch.manual_seed(0)
    options.setdefault("n_images", 11 if name == "diet" else 300)
    if name == "dino":
        options["head_bn"] = True
    method = METHODS[name](Encoder(), heads, **options)
    for parent in list(method.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.BatchNorm1d):
                setattr(parent, child, nn.Identity())
    return method.double()


def some_views(n=8, views=2, size=4):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, size, size, generator=g, dtype=torch.double) for _ in range(views)]


def doubled(module):
    """The module with all its weights twice as large."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)


OTHER_VALUES = {  # where .95 or 9 will not do
    "projector": "none",
    "teacher": "none",
    "symmetric": False,
    "teacher_temperature": (0.02, 0.03),
    "head_bn": False,
}
BESIDE = {"simsiam": {"teacher": "ema"}, "diet": {"projector": "mlp"}}  # what gives some of them a meaning
KEYWORDS = [
    (name, keyword, parameter)
    for name, method in METHODS.items()
    for keyword, parameter in inspect.signature(method).parameters.items()
    if parameter.kind == parameter.KEYWORD_ONLY
]


@pytest.mark.parametrize("name, keyword, parameter", KEYWORDS, ids=lambda v: v if isinstance(v, str) else "")
def test_each_keyword_has_a_type_and_help_and_counts(name, keyword, parameter):
    assert get_origin(parameter.annotation) is Annotated and len(parameter.annotation.__metadata__[0]) > 20
    other, runs = 0.95 if isinstance(parameter.default, float) else 9, []
    for options in ({}, {keyword: OTHER_VALUES.get(keyword, other)}):
        torch.manual_seed(0)
        encoder = build_backbone("resnet18", "small", 1 / 16)[0]
        method = METHODS[name](encoder, None, 100, **BESIDE.get(name, {}) | options)
        found = []
        for step in range(3):
            found.append(method([v.float() for v in some_views(size=8)], torch.arange(8)).detach())
            doubled(encoder.layer4)
            method.after_step((step + 1) / 3)
        runs.append([*found, *method.state_dict().values()])
    a, b = runs
    assert len(a) != len(b) or not all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", METHODS)
def test_a_resolution_is_a_call_of_the_encoder_but_two_views_are_two(name):
    method, heads = METHODS[name](Encoder(), n_images=300), []
    views, index = [torch.randn(4, 3, s, s) for s in (8, 8, 4, 4, 4)], torch.arange(4)
    method.projector.register_forward_hook(lambda _, x, __: heads.append(len(x[0])))
    method(views, index)
    assert method.encoder.calls == [(8, 3, 8, 8), (12, 3, 4, 4)] and heads == [20]
    if name in ("moco", "dino"):
        assert method.momentum_encoder.calls == [(8, 3, 8, 8)]
    close(losses.encode(method.encoder, views), torch.cat([method.encoder(v) for v in views]))
    method.encoder.calls.clear()
    method(views[:2], index)
    apart = [8] if method.classifies_instances else [4, 4]
    assert [shape[0] for shape in method.encoder.calls] == apart == heads[1:]


@pytest.mark.parametrize("name", METHODS)
def test_both_views_play_both_parts_and_a_step_lowers_the_loss(name):
    method, (x1, x2), index = build(name), some_views(), torch.arange(8)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    before = method([x1, x2], index)
    close(before, method([x2, x1], index))
    before.backward()
    optimizer.step()
    assert method([x1, x2], index) < before


PAIRS = [(name, {}, 1 if name == "simclr" else 2, 12) for name, m in METHODS.items() if not m.classifies_instances]


@pytest.mark.parametrize("name, options, n_gg, n_gl", [*PAIRS, ("moco", {"symmetric": False}, 1, 6)])
def test_the_loss_is_the_mean_over_pairs_of_views_unless_balanced(name, options, n_gg, n_gl):
    method = build(name, **options)
    outputs = method.outputs(some_views(views=8))
    loss = {}
    for balance in [(1.0, 0.0), (0.0, 1.0), (0.4, 0.6), None]:
        method.balance = balance
        loss[balance] = method.loss(*outputs)
    gg, gl = loss[1.0, 0.0], loss[0.0, 1.0]
    assert gg != gl
    close(loss[0.4, 0.6], 0.4 * gg + 0.6 * gl)
    close(loss[None], (n_gg * gg + n_gl * gl) / (n_gg + n_gl))


def test_no_view_is_paired_with_itself_and_without_locals_the_globals_are_all():
    views, targets = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0])
    pairs = []
    losses.mean_over_pairs(lambda v, t: pairs.append((v.item(), t.item())) or v + t, targets, views, None)
    assert pairs == [(1, 20), (2, 10), (3, 10), (3, 20), (4, 10), (4, 20)]
    assert losses.mean_over_pairs(torch.add, targets, views[:2], (0.4, 0.6)) == (21 + 12) / 2


@pytest.mark.parametrize("name", ["simclr", "moco", "swav", "dino", "diet"])
def test_equal_embeddings_of_every_image_are_at_chance(name):
    """In the queue too; of DINO and DIET equal scores."""
    method = METHODS[name](Encoder(), n_images=64)
    if name == "moco":
        method.queue.copy_(F.normalize(torch.ones_like(method.queue), dim=1))
    outputs = [torch.ones_like(o) for o in method.outputs([v.float() for v in some_views()], torch.arange(8))]
    if name == "diet":
        outputs = [torch.zeros(16, 8), torch.arange(16)]
    assert method.loss(*outputs).item() == pytest.approx(method.chance(8), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_last_layer_alone_loses_its_gradient(name):
    method = build(name)
    method(some_views(), torch.arange(8)).backward()
    had = {n for n, p in method.named_parameters() if p.grad is not None}
    method.drop_last_layer_grad()
    lost = had - {n for n, p in method.named_parameters() if p.grad is not None}
    frozen = {"swav": "prototypes.weight", "dino": "last_layer.parametrizations.weight.original1"}
    assert lost == ({frozen[name]} if name in frozen else set())


@pytest.mark.parametrize("name", ["simsiam", "simclr", "moco", "diet"])
def test_a_projector_can_be_left_out(name):
    assert isinstance(build(name, projector="none").projector, nn.Identity)
    with pytest.raises(ValueError, match="without a projector"):
        build(name, projector="none", out_dim=4)


# ---- what each method's paper says ----------------------------------------------------------------------------------


def test_simsiams_z_is_normalised_over_the_batch():
    method = losses.SimSiam(Encoder())
    z = method.outputs([v.float() for v in some_views(256)])[-1]
    close(z.std(0, correction=0), torch.ones(z.shape[1]), atol=0.05, rtol=0)
    assert not method.projector[-2].bias.requires_grad


@pytest.mark.parametrize("name, teacher, kept", [("simsiam", "ema", 0.9), ("moco", "ema", 0.9), ("moco", "none", 0.0)])
def test_a_teacher_gives_the_targets_and_follows_the_network(name, teacher, kept):
    method, views = build(name, teacher=teacher, momentum_teacher=0.9), some_views()
    doubled(method.encoder)
    before = [p.clone() for p in method.momentum_encoder.parameters()]
    target = method.momentum_projector(method.momentum_encoder(views[1]))
    close(method.outputs(views)[-1], F.normalize(target, dim=1) if name == "moco" else target)
    method(views)
    method.after_step(0.5)
    for p, old in zip(method.momentum_encoder.parameters(), before):
        close(p, (2 - kept) * old)
        assert not p.requires_grad


@pytest.mark.parametrize("student", [SearchHead([4, 4]), SearchBackbone(SPACES["resnet"], 1 / 16)], ids=["head", "net"])
def test_a_teacher_shares_the_architecture_and_follows_the_weights(student):
    teacher = losses.momentum_copy(student)
    old = copy.deepcopy(list(teacher.parameters()))
    doubled(student)
    losses.momentum_update(teacher, student, 0.9)
    assert getattr(teacher, "choices", None) is getattr(student, "choices", None)  # the gates
    for (name, t), o, s in zip(teacher.named_parameters(), old, student.parameters()):
        assert (t is s) == t.requires_grad == name.endswith("alpha")
        if t is not s:
            close(t, 0.9 * o + 0.1 * s)


def test_mocos_queue_fits_the_data():
    assert [len(losses.MoCo(Encoder(), n_images=n).queue) for n in (300, 50_000, 10**7)] == [32, 4096, 65_536]
    for size in (0, 101):
        with pytest.raises(ValueError, match="larger than the 100 images"):
            losses.MoCo(Encoder(), n_images=100, queue_size=size)


@pytest.mark.parametrize("n_keys", [1, 2])
def test_mocos_queue_takes_the_keys_after_the_step_in_order_and_wraps(n_keys):
    method = build("moco", queue_size=12 * n_keys, n_images=100, symmetric=n_keys == 2)
    views, expected = some_views(views=4), method.queue.clone()
    for step in range(3):
        *q, _ = outputs = method.outputs(views)
        assert len(q) == (5 if n_keys == 2 else 3)
        own = [method.momentum_projector(method.momentum_encoder(v)) for v in views[:n_keys]]
        keys = F.normalize(torch.cat(own), dim=1)
        close(torch.cat(outputs[-n_keys:]), keys)
        method(views)
        close(method.queue, expected)  # the loss sees the queue from before
        method.after_step(0.5)
        expected[torch.arange(len(keys)).add(step * len(keys)) % len(expected)] = keys
        close(method.queue, expected)


def test_swav_prototypes_have_unit_rows_and_the_queue_counts_once_full_and_due():
    method, views = build("swav", queue_size=12, prototypes=5, queue_from=0.5), some_views()
    s1, _, z1, z2 = method.outputs(views)
    close(s1, z1 @ method.prototypes.weight.T)
    counts = []
    for progress in (0.1, 0.2, 0.5):
        method(views)
        doubled(method.prototypes)
        method.after_step(progress)
        close(method.prototypes.weight.norm(dim=1), torch.ones(5, dtype=torch.double))
        counts.append(method.queue_counts.item())
    assert counts == [0, 0, 1]
    close(method.queue, torch.stack([z1, z2]).repeat(1, 2, 1)[:, :12])


def test_dino_moves_centre_temperature_and_teacher_after_the_step():
    method, views = build("dino", teacher_warmup=0.25), some_views()
    assert method.teacher_temperature == pytest.approx(0.04)
    teacher = torch.cat(method.outputs(views)[-2:])
    method(views)
    assert (method.center == 0).all()
    doubled(method.encoder)
    old = [p.clone() for p in method.momentum_encoder.parameters()]
    method.after_step(0.0)
    close(method.center, 0.1 * teacher.mean(0))
    for t, o in zip(method.momentum_encoder.parameters(), old):
        close(t, 1.01 * o)
    temperatures = []
    for progress in (0.125, 0.25, 1.0):
        old = [p.clone() for p in method.momentum_encoder.parameters()]
        method.after_step(progress)
        temperatures.append(round(method.teacher_temperature.item(), 6))
    assert temperatures == [0.055, 0.07, 0.07]
    assert all(map(torch.equal, old, method.momentum_encoder.parameters()))  # its momentum has come to 1


@pytest.mark.parametrize(
    "f, bn, published", [(1280, True, 8_405_248), (512, True, 6_832_384), (192, False, 21_958_912)]
)
def test_dinos_head_has_the_papers_parameters(f, bn, published):
    encoder = nn.Identity()
    encoder.feature_dim = f
    method = losses.DINO(encoder, head_bn=bn)
    found = sum(p.numel() for m in (method.projector, method.last_layer) for p in m.parameters())
    assert found + bn * 2 * 2048 == published  # biases ahead of BN: the authors have them, to no effect
    assert method.last_layer.weight.norm(dim=1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["swav", "dino"])
def test_scores_of_prototypes_are_products_in_fp32(name):
    method, seen = METHODS[name](build_backbone("resnet18", "small", 1 / 16)[0], n_images=300), []
    method.last_layer.register_forward_hook(lambda _, x, y: seen.append((x[0].detach(), y.detach())))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method([torch.randn(8, 3, 16, 16) for _ in range(2)])
    z, scores = seen[0]
    assert torch.equal(scores, z @ method.last_layer.weight.T) and z.dtype == loss.dtype == torch.float32


# ---- DIET: the facts of 2406.10743 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 7, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.8, 1.0])
def test_diet_loss_and_its_gradients_are_cross_entropys(chunk, smoothing):
    h, weight = (torch.randn(n, 5, dtype=torch.double, requires_grad=True) for n in (9, 23))
    index = torch.randint(23, (9,))
    loss = losses.diet_loss(h, weight, index, smoothing, chunk=chunk)
    want = F.cross_entropy(h @ weight.T, index, label_smoothing=smoothing)
    close(loss, want)
    for a, b in zip(*(torch.autograd.grad(3 * x, [h, weight]) for x in (loss, want))):
        close(a, b)
        assert a.abs().amax(1).min() > 0  # every row of both has one


def test_diet_loss_where_nothing_or_everything_is_known():
    method = losses.DIET(Encoder(), n_images=50_000)
    assert method.floor == pytest.approx(9.1561, abs=1e-4)
    assert method.normalised(math.log(50_000)) == 0 and method.normalised(method.floor) == 1
    assert [tuple(p.shape) for n, p in method.named_parameters() if "encoder" not in n] == [(50_000, 8)]  # and no bias
    ideal = torch.log(torch.full((4, 4), 0.2) + 0.2 * torch.eye(4))  # logits of the smoothed targets, .8 / 4 and .4
    close(losses.diet_loss(torch.eye(4), ideal, torch.arange(4)).item(), losses.DIET(Encoder(), n_images=4).floor)


PEAK = """
import re, torch
from losses import DIET
encoder = torch.nn.Flatten()
encoder.feature_dim = 64
def peak_after_training(n):
    method = DIET(encoder, n_images=n)
    optimizer = torch.optim.AdamW(method.parameters(), fused=True)
    for step in range(2):
        method([torch.randn(256, 1, 8, 8)], torch.arange(256)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(-peak_after_training(1000) + peak_after_training(200_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_many_images_train_in_the_memory_that_the_formula_gives():
    took = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    formula = 16 * 200_000 * 64 + 2**26  # DIET's docstring, and a chunk of logits as diet_loss's says
    assert 0.9 * formula < int(took) < 1.1 * formula


def test_what_is_no_image_is_no_class():
    for index in ([0, 5], [0, -1]):
        with pytest.raises(IndexError, match="must be 0 to 4"):
            losses.diet_loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor(index))
    with pytest.raises(ValueError, match="the image's index"):
        losses.DIET(Encoder(), n_images=5).outputs(some_views())
    with pytest.raises(ValueError, match=r"11 rows.* are not those of 5 images"):
        build("diet", n_images=5).load_state_dict(build("diet").state_dict())


# ---- several ranks --------------------------------------------------------------------------------------------------

INDICES = torch.tensor([3, 10, 0, 7, 5, 6, 1, 2])
CASES = {
    "cpu": [*METHODS, *(f"{name}, searched" for name in METHODS if name != "diet"), "diet, clipped"],
    "cuda": list(METHODS),
}


def method_of(case, device):
    """In fp64 without BN; on a GPU, where BN can be of all ranks, a small ResNet in fp32."""
    name, *what = case.split(", ")
    if device == "cuda":
        torch.manual_seed(0)
        method = METHODS[name](build_backbone("resnet18", "small", 1 / 16)[0], n_images=11 if name == "diet" else 300)
        return synced(method, torch.device("cuda")).to("cuda")
    spaces = METHODS[name].heads(8) if what == ["searched"] else {}
    return build(name, {head: SearchHead(head_dims(*space)) for head, space in spaces.items()})


def one_step(case, device, rank=0, world=1):
    """(mean loss over ranks, gradients, state after the step) with this rank's share of the batch."""
    method = method_of(case, device)
    dtype = torch.float if device == "cuda" else torch.double
    size, views = (16, 2) if device == "cuda" else (4, 3)
    views = [v.chunk(world)[rank].to(device, dtype) for v in some_views(views=views, size=size)]
    model = distributed(method)  # kept: without it DDP would be gone before backward
    loss = model(views, INDICES.chunk(world)[rank].to(device))
    loss.backward()
    if "clipped" in case:
        clip_gradients(method, 0.01)
    method.after_step(0.5)
    gradients = {n: p.grad.cpu() for n, p in method.named_parameters() if p.grad is not None}
    state = {k: v.cpu() for k, v in method.state_dict().items()}
    if case == "diet":  # whose rows in the state are those of all ranks
        assert torch.equal(losses.own_rows(state["classifier.weight"], 11), method.classifier.weight.detach().cpu())
    return (losses.reduced(loss.detach()) / world).cpu(), gradients, state


def rank_main(rank, world, folder, device):
    dist.init_process_group("gloo")  # nccl wants a GPU a rank
    torch.backends.cudnn.allow_tf32 = False
    torch.save({case: one_step(case, device, rank, world) for case in CASES[device]}, f"{folder}/{rank}.pth")


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("world, device, tolerance", [(4, "cpu", 1e-7), pytest.param(2, "cuda", 0.02, marks=NEEDS_GPU)])
def test_several_ranks_give_one_process_loss_gradients_and_state(world, device, tolerance, tmp_path):
    """Alphas, queues, centre and Sinkhorn's codes included."""
    torch.backends.cudnn.allow_tf32 = False
    spawn(rank_main, world, tmp_path, device, world=world)
    ranks = [load(tmp_path / f"{rank}.pth") for rank in range(world)]
    for case in CASES[device]:
        loss, gradients, state = one_step(case, device)
        if "diet" in case:  # every rank has its own rows
            rows = [rank[case][1].pop("classifier.weight") for rank in ranks]
            assert [len(r) for r in rows] == {2: [5, 6], 4: [2, 3, 3, 3]}[world]
            close(torch.cat(rows), gradients.pop("classifier.weight"), atol=tolerance, rtol=tolerance)
        assert any(key.endswith("alpha") for key in gradients) == ("searched" in case) and len(gradients) > 3
        for rank in ranks:
            close(rank[case][0], loss, atol=tolerance, rtol=tolerance)
            close(rank[case][2], state, atol=tolerance, rtol=tolerance)
            for key, gradient in gradients.items():
                error = (rank[case][1][key] - gradient).norm() / gradient.norm().clamp(min=1e-6)
                assert error < tolerance, f"{case} {key}: {error}"
