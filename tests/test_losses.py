"""Losses against numpy in float64, methods against themselves on two ranks."""

import copy
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from launch import synced
from losses import (
    DIET,
    DINO,
    METHODS,
    MoCo,
    SimCLR,
    SimSiam,
    balanced,
    diet_loss,
    dino_loss,
    encode,
    info_nce,
    momentum_copy,
    momentum_update,
    neg_cosine,
    nt_xent,
    pairs,
    sinkhorn,
    swav_loss,
)
from models import SearchHead, build_backbone, head_dims
from optim import clip_gradients, distributed


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def numpy_neg_cosine(p, z):
    return -np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(p, z)])


def numpy_nt_xent(z1, z2, t):
    z, n, total = unit(np.concatenate([z1, z2])), len(z1), 0.0
    for i in range(2 * n):
        others = [z[i] @ z[j] / t for j in range(2 * n) if j != i]
        total += np.log(np.sum(np.exp(others))) - z[i] @ z[(i + n) % (2 * n)] / t
    return total / (2 * n)


def numpy_info_nce(q, k, queue, t):
    q, k = unit(q), unit(k)
    return np.mean([np.log(np.sum(np.exp([a @ b / t, *(queue @ a / t)]))) - a @ b / t for a, b in zip(q, k)])


def numpy_sinkhorn(scores, epsilon, iterations, queue=None):
    q = np.exp(np.concatenate([scores] + ([queue] if queue is not None else [])) / epsilon).T  # (K, N), as published
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T[: len(scores)]


def numpy_softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.normal(size=(12, 7)), rng.normal(size=(12, 7)), unit(rng.normal(size=(20, 7)))


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float32) for a in arrays]


def test_losses_agree_with_numpy(pair):
    a, b, queue = pair
    x, y, k = tensors(*pair)
    assert neg_cosine(x, y).item() == pytest.approx(numpy_neg_cosine(a, b), abs=1e-6)
    for t in (0.1, 0.5):
        assert nt_xent(x, y, t).item() == pytest.approx(numpy_nt_xent(a, b, t), abs=1e-5)
        assert info_nce(x, y, k, t).item() == pytest.approx(numpy_info_nce(a, b, queue, t), abs=1e-5)


def test_sinkhorn_agrees_with_numpy_and_shares_out_evenly(pair):
    rng = np.random.default_rng(1)
    scores, queue = unit(rng.normal(size=(24, 6))), unit(rng.normal(size=(10, 6)))
    s, old = (torch.tensor(x) for x in (scores, queue))
    for n in (1, 3):
        torch.testing.assert_close(sinkhorn(s, 0.05, n), torch.tensor(numpy_sinkhorn(scores, 0.05, n)))
    both = numpy_sinkhorn(scores, 0.05, 3, queue)
    torch.testing.assert_close(sinkhorn(s, queue=old), torch.tensor(both))
    torch.testing.assert_close(sinkhorn(s, queue=old, weight=torch.tensor(0.0)), sinkhorn(s))
    codes = sinkhorn(s, 0.05, 200)
    torch.testing.assert_close(codes.sum(1), torch.ones(24, dtype=torch.double))
    torch.testing.assert_close(codes.sum(0), torch.full((6,), 4.0, dtype=torch.double))
    assert sinkhorn((1000 * s).bfloat16()).isfinite().all() and sinkhorn(s.bfloat16()).dtype == torch.float32


def test_swav_and_dino_losses_agree_with_numpy(pair):
    a, b, _ = pair
    x, y = (torch.tensor(v, requires_grad=True) for v in (a, b))
    codes = numpy_sinkhorn(b, 0.5, 3)
    expected = -np.mean(np.sum(codes * np.log(numpy_softmax(a / 0.1)), 1))
    assert swav_loss(x, torch.tensor(codes), 0.1).item() == pytest.approx(expected, rel=1e-9)
    center = np.linspace(-1, 1, 7)
    target = numpy_softmax((b - center) / 0.04)
    expected = -np.mean(np.sum(target * np.log(numpy_softmax(a / 0.1)), 1))
    loss = dino_loss(x, y, torch.tensor(center), 0.1, 0.04)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    (loss + swav_loss(x, sinkhorn(y))).backward()
    assert x.grad.abs().sum() > 0 and y.grad is None


def test_losses_keep_their_symmetries(pair):
    x, y, queue = tensors(*pair)
    rows, keys = torch.randperm(len(x)), torch.randperm(len(queue))
    close = torch.testing.assert_close
    close(neg_cosine(x, y), neg_cosine(y, x))
    close(nt_xent(x, y), nt_xent(y, x))
    for f in (neg_cosine, nt_xent, lambda a, b: info_nce(a, b, queue)):
        close(f(x, y), f(x[rows], y[rows]))
        close(f(x, y), f(3 * x, 0.5 * y))  # only directions count
    close(info_nce(x, y, queue), info_nce(x, y, queue[keys]))


def test_known_values():
    n = 512
    same = torch.ones(n, 16)
    assert nt_xent(same, same).item() == pytest.approx(math.log(2 * n - 1), abs=1e-4) == pytest.approx(6.9305, abs=1e-4)
    orthogonal = torch.eye(n)
    assert nt_xent(orthogonal, orthogonal, 0.5).item() == pytest.approx(4.9367, abs=1e-4)
    assert neg_cosine(same, same).item() == pytest.approx(-1)


def test_targets_carry_no_gradient(pair):
    for f in (neg_cosine, lambda q, k: info_nce(q, k, tensors(pair[2])[0])):
        x, y = (t.requires_grad_() for t in tensors(*pair[:2]))
        f(x, y).backward()
        assert x.grad.abs().sum() > 0 and y.grad is None


def test_losses_are_fp32_inside(pair):
    x, y, queue = tensors(*pair)
    for f in (neg_cosine, nt_xent, lambda a, b: info_nce(a, b, queue)):
        assert f(x.bfloat16(), y.bfloat16()).dtype == torch.float32


# ---- methods --------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Without BN, so that ranks can be compared."""

    feature_dim = 8

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x):
        return self.net(x)


def build(name, heads=None, **options):
    torch.manual_seed(0)
    options |= {"bn": True} if name == "dino" else {"n_images": 11} if name == "diet" else {}
    method = METHODS[name](Encoder(), heads, **options)
    for parent in list(method.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.BatchNorm1d):
                setattr(parent, child, nn.Identity())
    return method.double()


def some_views(n=8, seed=1, views=2):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 4, 4, generator=g, dtype=torch.double) for _ in range(views)]


def test_views_of_one_resolution_share_a_call():
    calls = []

    class Spy(nn.Module):
        def forward(self, x):
            calls.append(tuple(x.shape))
            return x.mean((2, 3))

    views = [torch.randn(2, 3, s, s) for s in (8, 8, 4, 4, 4)]
    torch.testing.assert_close(encode(Spy(), views), torch.cat([v.mean((2, 3)) for v in views]))
    assert calls == [(4, 3, 8, 8), (6, 3, 4, 4)]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_networks_and_then_its_loss(name):
    method, views = build(name), some_views()
    loss = method(views, torch.arange(8))
    torch.testing.assert_close(loss, method.loss(*method.outputs(views, torch.arange(8))))
    swapped = method(views[::-1], torch.arange(8))
    torch.testing.assert_close(loss, swapped)  # both views play both parts


PAIRS = {
    "simsiam": (2, 12),
    "simclr": (1, 12),
    "moco": (2, 12),
    "moco, one key": (1, 6),
    "swav": (2, 12),
    "dino": (2, 12),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_loss_is_the_mean_over_pairs_of_views_unless_balanced(name):
    method = build(name.split(",")[0], **({"symmetric": False} if "one" in name else {}))
    outputs = method.outputs(some_views(views=8))
    loss = {}
    for balance in [(1.0, 0.0), (0.0, 1.0), (0.4, 0.6), None]:
        method.balance = balance
        loss[balance] = method.loss(*outputs)
    gg, gl = loss[1.0, 0.0], loss[0.0, 1.0]
    assert gg != gl
    torch.testing.assert_close(loss[0.4, 0.6], 0.4 * gg + 0.6 * gl)
    n_gg, n_gl = PAIRS[name]
    torch.testing.assert_close(loss[None], (n_gg * gg + n_gl * gl) / (n_gg + n_gl))


def test_no_view_is_paired_with_itself_and_without_locals_the_globals_are_all():
    assert pairs(2, 4) == [(1, 0), (0, 1), (0, 2), (1, 2), (0, 3), (1, 3)] and pairs(1, 3) == [(0, 1), (0, 2)]
    assert set(METHODS) == {name.split(",")[0] for name in PAIRS} | {"diet"}  # which has no pairs
    terms = list(torch.tensor([[1.0, 3.0], [10.0, 20.0]]))
    assert balanced(list(terms[0]), list(terms[1]), (0.4, 0.6)) == 0.4 * 2 + 0.6 * 15
    assert balanced(list(terms[0]), [], (0.4, 0.6)) == 2


@pytest.mark.parametrize("name", METHODS)
def test_two_resolutions_are_two_calls_of_the_encoder_and_one_of_the_head(name):
    calls = []

    class Spy(nn.Module):
        feature_dim = 8

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            calls.append(("student" if self.scale.requires_grad else "teacher", *x.shape))
            return x.mean((2, 3)).repeat(1, 3)[:, :8] * self.scale

    method = METHODS[name](Spy())
    method.projector.register_forward_hook(lambda _, i, __: calls.append(("head", len(i[0]))))
    method([torch.randn(4, 3, s, s) for s in (8, 8, 4, 4, 4)], torch.arange(4))
    assert [c for c in calls if c[0] == "student"] == [("student", 8, 3, 8, 8), ("student", 12, 3, 4, 4)]
    assert [c for c in calls if c[0] == "head"] == [("head", 20)]
    assert [c for c in calls if c[0] == "teacher"] == [("teacher", 8, 3, 8, 8)] * (name in ("moco", "dino"))


def test_moco_with_one_key_takes_it_from_the_first_view():
    method = build("moco", symmetric=False, queue_size=64, n_images=1000)
    views = some_views(4, views=8)
    *q, k = method.outputs(views)
    assert len(q) == 7 and q[0].shape == k.shape == (4, 128)
    torch.testing.assert_close(k, F.normalize(method.momentum_projector(method.momentum_encoder(views[0])), dim=1))
    method(views)
    method.after_step(0.5)
    assert method.pointer == 4
    torch.testing.assert_close(method.queue[:4], k)


def test_swav_prototypes_have_unit_rows_and_the_queue_counts_once_full_and_due():
    method = build("swav", queue_size=12, prototypes=5, queue_from=0.5)
    views = some_views(8)
    s1, _, z1, z2 = method.outputs(views)
    assert method.prototypes.weight.norm(dim=1).sub(1).abs().max() < 1e-6
    torch.testing.assert_close(s1, z1 @ method.prototypes.weight.T)
    counts = []
    for progress in (0.1, 0.2, 0.5):
        method(views)
        with torch.no_grad():
            method.prototypes.weight.mul_(3)
        method.after_step(progress)
        assert method.prototypes.weight.norm(dim=1).sub(1).abs().max() < 1e-6
        counts.append(method.queue_counts.item())
    assert counts == [0, 0, 1]
    torch.testing.assert_close(method.queue[:, :8], torch.stack([z1, z2]))
    torch.testing.assert_close(method.queue[:, 8:], torch.stack([z1, z2])[:, :4])


def test_dino_moves_centre_temperature_and_teacher_after_the_step():
    method, views = build("dino", teacher_warmup=0.25), some_views()
    assert method.teacher_temperature == pytest.approx(0.04)
    teacher = torch.cat(method.outputs(views)[-2:])
    method(views)
    assert (method.center == 0).all()
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1.0)
    old = [p.clone() for p in method.momentum_encoder.parameters()]
    method.after_step(0.0)
    torch.testing.assert_close(method.center, 0.1 * teacher.mean(0))
    for t, o, s in zip(method.momentum_encoder.parameters(), old, method.encoder.parameters()):
        torch.testing.assert_close(t, 0.99 * o + 0.01 * s)
    temperatures = []
    for progress in (0.125, 0.25, 1.0):
        method.after_step(progress)
        temperatures.append(round(method.teacher_temperature.item(), 6))
    assert temperatures == [0.055, 0.07, 0.07]
    for t, s in zip(method.momentum_encoder.parameters(), method.encoder.parameters()):
        frozen = t.clone()
        method.after_step(1.0)
        assert torch.equal(t, frozen) and not torch.equal(t, s)  # its momentum has come to 1


def test_dinos_head_has_the_papers_parameters():
    class Features(nn.Module):
        def __init__(self, feature_dim):
            super().__init__()
            self.feature_dim = feature_dim

    def count(f, **options):
        method = DINO(Features(f), **{"bn": True} | options)
        assert method.last_layer.weight.norm(dim=1).sub(1).abs().max() < 1e-5
        return sum(p.numel() for m in (method.projector, method.last_layer) for p in m.parameters())

    biases = 2 * 2048  # ahead of BN: the authors have them, to no effect
    assert count(1280) + biases == 8_405_248 and count(512) + biases == 6_832_384
    assert count(192, bn=False) == 21_958_912


@pytest.mark.parametrize("name", METHODS)
def test_a_step_lowers_the_loss(name):
    method, views = build(name), some_views()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    before = method(views, torch.arange(8))
    before.backward()
    optimizer.step()
    assert method(views, torch.arange(8)) < before


def test_both_heads_get_a_gradient_for_their_alphas():
    heads = {n: SearchHead([s.i] + [s.hidden] * (s.layers - 1) + [s.o]) for n, s in SimSiam.heads(8).items()}
    method = SimSiam(Encoder(), heads)
    method([v.float() for v in some_views()]).backward()
    for head in heads.values():
        assert (head.alpha.grad.abs().sum(1) > 0).all()


def test_healthy_simsiam_embeddings_have_a_std_of_one_over_sqrt_d():
    torch.manual_seed(0)
    method = SimSiam(Encoder())
    z = method.outputs([v.float() for v in some_views(256)])[2]
    d = z.shape[1]
    assert F.normalize(z, dim=1).std(0).mean().item() == pytest.approx(1 / math.sqrt(d), rel=0.05)
    assert F.normalize(torch.ones(256, d), dim=1).std(0).mean() == 0


def test_moco_queue_takes_keys_in_order_and_wraps():
    method = build("moco", queue_size=24, n_images=100)
    before = method.queue.clone()
    views = some_views(8)
    _, _, k1, k2 = method.outputs(views)
    method(views, None)
    assert torch.equal(method.queue, before)  # the loss sees the queue from before
    method.after_step(0.5)
    torch.testing.assert_close(method.queue[:16], torch.cat([k1, k2]))
    assert torch.equal(method.queue[16:], before[16:]) and method.pointer == 16
    method(views, None)
    keys = method.keys.flatten(0, 1)
    method.after_step(0.5)
    torch.testing.assert_close(method.queue[torch.arange(16, 32) % 24], keys)
    assert method.pointer == 8


@pytest.mark.parametrize("name", ["simclr", "moco", "swav", "dino", "diet"])
def test_a_network_that_tells_nothing_apart_is_at_chance(name):
    """Equal embeddings of every image, in the queue too; of DINO and DIET equal scores."""
    method = METHODS[name](Encoder(), **({"n_images": 64} if name in ("moco", "swav", "diet") else {}))
    same = torch.ones(8, 16)
    if name == "moco":
        method.queue.copy_(F.normalize(torch.ones_like(method.queue), dim=1))
        same = torch.ones(8, method.queue.shape[1])
    outputs = {
        "simclr": [same] * 2,
        "moco": [same] * 2 + [F.normalize(same, dim=1)] * 2,
        "swav": [torch.zeros(8, method.prototypes.out_features)] * 2 + [torch.zeros(8, 128)] * 2
        if name == "swav"
        else [],
        "dino": [torch.zeros(8, method.last_layer.out_features)] * 4 if name == "dino" else [],
        "diet": [torch.zeros(8, 8), torch.arange(8)],
    }[name]
    assert method.loss(*outputs).item() == pytest.approx(method.chance(8), rel=1e-5)


def test_moco_queue_fits_the_data():
    sizes = [len(MoCo(Encoder(), n_images=n).queue) for n in (300, 50_000, 10**7)]
    assert sizes == [32, 4096, 65_536]
    with pytest.raises(ValueError, match="larger than the 100 images"):
        MoCo(Encoder(), n_images=100, queue_size=101)


def test_momentum_networks_follow_and_share_the_architecture():
    head = SearchHead([4, 4])
    twin = momentum_copy(head)
    assert twin.alpha is head.alpha and twin.alpha.requires_grad
    old = copy.deepcopy(list(twin.parameters()))
    with torch.no_grad():
        for p in head.parameters():
            p.add_(1.0)
    momentum_update(twin, head, 0.9)
    for t, o, s in zip(twin.parameters(), old, head.parameters()):
        if t is not s:
            torch.testing.assert_close(t, 0.9 * o + 0.1 * s)
            assert not t.requires_grad
    assert twin.alpha is head.alpha
    method = build("moco", n_images=100)
    assert not any(p.requires_grad for p in method.momentum_projector.parameters())


def test_temperature_is_used():
    views = some_views()
    assert build("simclr", temperature=0.1)(views) != build("simclr", temperature=0.5)(views)
    assert isinstance(build("simclr"), SimCLR)


@pytest.mark.parametrize("name", ["simsiam", "simclr", "moco", "diet"])
def test_a_projector_can_be_left_out(name):
    method, views = build(name, projector="none"), some_views()
    assert isinstance(method.projector, nn.Identity)
    torch.testing.assert_close(method.outputs(views, torch.arange(8))[-1].shape[-1], {"diet": 16}.get(name, 8))
    method(views, torch.arange(8)).backward()
    assert all(p.grad.abs().sum() > 0 for p in method.encoder.parameters())
    with pytest.raises(ValueError, match="without a projector"):
        build(name, projector="none", out_dim=4)
    with_one = build(name, projector="mlp")
    assert [m.out_features for m in with_one.projector if isinstance(m, nn.Linear)][:1] == [8]


def test_simsiams_teacher_gives_its_targets_and_follows():
    views = some_views()
    method = build("simsiam", teacher="ema", momentum=0.9)
    assert not any(p.requires_grad for p in method.momentum_encoder.parameters())
    torch.testing.assert_close(method(views), build("simsiam")(views))  # at first it is the network itself
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.mul_(2)
    before = [p.clone() for p in method.momentum_encoder.parameters()]
    z = method.momentum_projector(method.momentum_encoder(views[1]))
    torch.testing.assert_close(method.outputs(views)[-1], z)
    method.after_step(0.5)
    for p, old in zip(method.momentum_encoder.parameters(), before):
        torch.testing.assert_close(p, old + 0.1 * old)


def test_mocos_keys_are_the_networks_own_without_a_teacher():
    method = build("moco", teacher="none")
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.mul_(2)
    method(some_views())
    method.after_step(0.5)
    for p, q in zip(method.momentum_encoder.parameters(), method.encoder.parameters()):
        assert torch.equal(p, q)


# ---- DIET: the facts of 2406.10743 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 7, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.8, 1.0])
def test_diet_loss_and_its_gradients_are_cross_entropys(chunk, smoothing):
    h, weight = (torch.randn(n, 5, dtype=torch.double, requires_grad=True) for n in (9, 23))
    index = torch.randint(23, (9,))
    loss, want = (
        diet_loss(h, weight, index, smoothing, chunk=chunk),
        F.cross_entropy(h @ weight.T, index, label_smoothing=smoothing),
    )
    torch.testing.assert_close(loss, want)
    for a, b in zip(*(torch.autograd.grad(3 * x, [h, weight]) for x in (loss, want))):
        torch.testing.assert_close(a, b)
        assert a.abs().amax(1).min() > 0  # every row of both has one
    p = numpy_softmax((h @ weight.T).detach().numpy())
    target = smoothing / 23 + (1 - smoothing) * np.eye(23)[index]
    assert loss.item() == pytest.approx(-(target * np.log(p)).sum(1).mean())


def test_diet_loss_where_nothing_or_everything_is_known():
    n, method = 50_000, DIET(Encoder(), n_images=50_000)
    for smoothing in (0.0, 0.5, 0.8):
        loss = diet_loss(torch.zeros(3, 8), method.classifier.weight, torch.arange(3), smoothing)
        assert loss.item() == pytest.approx(math.log(n), abs=1e-5)
    assert method.floor == pytest.approx(9.1561, abs=1e-4)
    assert method.normalised(math.log(n)) == 0 and method.normalised(method.floor) == 1
    few = DIET(Encoder(), n_images=4)
    ideal = torch.log(torch.full((4, 4), 0.2) + 0.2 * torch.eye(4))  # logits of the smoothed targets, .8 / 4 and .4
    torch.testing.assert_close(diet_loss(torch.eye(4), ideal, torch.arange(4)).item(), few.floor)
    assert [tuple(p.shape) for n, p in method.named_parameters() if "encoder" not in n] == [(n, 8)]  # and no bias


def test_diet_loss_keeps_its_symmetries():
    h, weight = torch.randn(6, 5, dtype=torch.double), torch.randn(23, 5, dtype=torch.double, requires_grad=True)
    index, order = torch.randint(23, (6,)), torch.randperm(23)
    loss = diet_loss(h, weight, index)
    torch.testing.assert_close(loss, diet_loss(h, weight[order], order.argsort()[index]))
    gradient = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(gradient.sum(0), torch.zeros(5, dtype=torch.double))
    flat = torch.zeros_like(weight, requires_grad=True)  # uniform logits: smoothing scales the gradient
    half, none = (torch.autograd.grad(diet_loss(h, flat, index, s), flat)[0] for s in (0.5, 0.0))
    torch.testing.assert_close(half, 0.5 * none)


def test_diet_is_fp32_inside_and_holds_no_logits():
    h, weight, index = torch.randn(64, 8), torch.randn(1000, 8, requires_grad=True), torch.arange(64)
    want, held = diet_loss(h, weight, index), []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t),
    ):
        loss = diet_loss(h, weight, index, chunk=100)
    torch.testing.assert_close(loss, want)
    assert loss.dtype == torch.float32 and max(held) == weight.numel() < 64 * 1000


MILLION = """
import re, torch
from pathlib import Path
from losses import DIET
torch.manual_seed(0)
encoder = torch.nn.Flatten()
encoder.feature_dim = 64
def peak_after_training(n):
    method, x = DIET(encoder, n_images=n), torch.randn(16, 1, 8, 8)
    optimizer, losses = torch.optim.AdamW(method.parameters(), 1e-3, fused=True), []
    for step in range(2):
        losses.append(method([x], torch.arange(16) * (n // 16)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0], losses
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(-peak_after_training(1000) + peak_after_training(1_000_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_million_images_train_in_the_memory_that_the_formula_gives():
    here = Path(__file__).parent.parent
    took = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=True, cwd=here).stdout
    formula = 16 * 1_000_000 * 64 + 2**26  # DIET's docstring, and a chunk of logits as diet_loss's says
    assert 0.9 * formula < int(took) < 1.1 * formula


def test_what_is_no_image_is_no_class():
    for index in ([0, 5], [0, -1]):
        with pytest.raises(IndexError, match="must be 0 to 4"):
            diet_loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor(index))
    with pytest.raises(ValueError, match="the image's index"):
        DIET(Encoder(), n_images=5).outputs(some_views())
    with pytest.raises(ValueError, match="without a projector"):
        DIET(Encoder(), n_images=5, out_dim=4)
    assert DIET(Encoder(), n_images=5, projector="mlp", out_dim=4).classifier.weight.shape == (5, 4)


# ---- two ranks ------------------------------------------------------------------------------------------------------


def one_step(method, clipped, views, index, wrap):
    """(mean loss over ranks, gradients, buffers after the step)"""
    model = wrap(method)  # kept: without it DDP would be gone before backward
    loss = model(views, index)
    loss.backward()
    if clipped:
        clip_gradients(method, 0.01)
    method.after_step(0.5)
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(method.named_buffers())


INDEX = torch.tensor([3, 10, 0, 7, 5, 6, 1, 2])


CASES = [*METHODS, *(f"{name}, searched" for name in METHODS if name != "diet"), "diet, clipped"]


def case(name):
    """(method, whether its gradients are clipped)"""
    method, what = [*name.split(", "), None][:2]
    heads = {n: SearchHead(head_dims(*space)) for n, space in METHODS[method].heads(8, None).items()}
    return build(method, heads if what == "searched" else None), what == "clipped"


def rank_main(rank, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(path["port"])}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for name in CASES:
        views = [v.chunk(2)[rank] for v in some_views(views=3)]
        loss, gradients, buffers = one_step(*case(name), views, INDEX.chunk(2)[rank], distributed)
        dist.all_reduce(loss)
        results[name] = (loss / 2, gradients, buffers)
    torch.save(results, f"{path['folder']}/{rank}.pth")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_give_one_process_loss_gradients_and_buffers(tmp_path):
    """Alphas, queues, centre and Sinkhorn's codes included; to 1e-7 in fp64, without BN."""
    torch.multiprocessing.spawn(rank_main, ({"port": free_port(), "folder": str(tmp_path)},), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pth", weights_only=True) for r in range(2)]
    for name in CASES:
        loss, gradients, buffers = one_step(*case(name), some_views(views=3), INDEX, lambda m: m)
        if "diet" in name:  # every rank has its own rows
            rows = [rank[name][1].pop("classifier.weight") for rank in ranks]
            assert [len(r) for r in rows] == [5, 6]
            torch.testing.assert_close(torch.cat(rows), gradients.pop("classifier.weight"))
        assert any(key.endswith("alpha") for key in gradients) == ("searched" in name)
        for rank in ranks:
            torch.testing.assert_close(rank[name][0], loss)
            assert rank[name][1].keys() == gradients.keys() and len(gradients) > 3
            for key, gradient in gradients.items():
                torch.testing.assert_close(rank[name][1][key], gradient, msg=f"{name} {key}")
            for key, buffer in buffers.items():
                torch.testing.assert_close(rank[name][2][key], buffer, msg=f"{name} {key}")


def synced_step(name, views, index, wrap):
    """one_step of a small ResNet with BN, in fp32 on the first GPU."""
    torch.manual_seed(0)
    options = {"n_images": 11} if name in ("diet", "moco") else {}
    method = METHODS[name](build_backbone("resnet18", "small", 1 / 16)[0], **options)
    method = synced(method, torch.device("cuda")).to("cuda")
    loss, gradients, buffers = one_step(method, False, [v.float().cuda() for v in views], index.cuda(), wrap)
    return loss.cpu(), *({k: v.cpu() for k, v in d.items()} for d in (gradients, buffers))


def synced_main(rank, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(path["port"])}
    dist.init_process_group("gloo", rank=rank, world_size=2)  # nccl wants a GPU a rank
    torch.backends.cudnn.allow_tf32 = False
    results = {}
    for name in METHODS:
        views = [v.chunk(2)[rank] for v in larger_views()]
        loss, gradients, buffers = synced_step(name, views, INDEX.chunk(2)[rank], distributed)
        dist.all_reduce(loss)
        results[name] = (loss / 2, gradients, buffers)
    torch.save(results, f"{path['folder']}/{rank}.pth")
    dist.destroy_process_group()


def larger_views():
    g = torch.Generator().manual_seed(3)
    return [torch.randn(8, 3, 16, 16, generator=g) for _ in range(2)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_with_synced_bn_give_one_process_loss_gradients_and_buffers(tmp_path):
    torch.backends.cudnn.allow_tf32 = False
    torch.multiprocessing.spawn(synced_main, ({"port": free_port(), "folder": str(tmp_path)},), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pth", weights_only=True) for r in range(2)]
    for name in METHODS:
        loss, gradients, buffers = synced_step(name, larger_views(), INDEX, lambda m: m)
        gradients.pop("classifier.weight", None)
        for rank in ranks:
            torch.testing.assert_close(rank[name][0], loss, rtol=1e-4, atol=1e-4, msg=name)
            for key, gradient in gradients.items():
                error = (rank[name][1][key] - gradient).norm() / gradient.norm().clamp(min=1e-6)
                assert error < 0.02, f"{name} {key}: {error}"
            for key, buffer in buffers.items():
                torch.testing.assert_close(rank[name][2][key], buffer, rtol=1e-3, atol=1e-3, msg=f"{name} {key}")


# ---- bf16 -----------------------------------------------------------------------------------------------------------


def loss_cases():
    """{name: (loss of (x, y) under which all else is fixed, x, y)}, x and y with numbers that bf16 has."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(32, 48, generator=g).bfloat16() for _ in range(2))
    queue = F.normalize(torch.randn(64, 48, generator=g), dim=1)
    index = torch.arange(32)
    return {
        "neg_cosine": (neg_cosine, x, y),
        "nt_xent": (nt_xent, x, y),
        "info_nce": (lambda a, b: info_nce(a, b, queue), x, y),
        "swav": (lambda a, b: swav_loss(a, sinkhorn(b)), x, y),
        "dino": (lambda a, b: dino_loss(a, b, torch.zeros(48)), x, y),
        "diet": (lambda a, b: diet_loss(a, b, index), x, y),
    }


@pytest.mark.parametrize("name", list(loss_cases()))
def test_a_loss_under_autocast_differs_by_its_inputs_rounding_alone(name):
    loss, *rounded = loss_cases()[name]
    results = []
    for inputs, amp in ((rounded, True), ([v.float() for v in rounded], False)):
        leaves = [v.clone().requires_grad_() for v in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            value = loss(*leaves)
        value.backward()
        results.append([value.detach(), *(v.grad.float() for v in leaves if v.grad is not None)])
    for low, high in zip(*results, strict=True):
        torch.testing.assert_close(low, high, rtol=2**-8, atol=1e-7)  # gradients of bf16 inputs come back as bf16
    assert torch.equal(results[0][0], results[1][0]) and results[0][0].dtype == torch.float32


@pytest.mark.parametrize("method", ["swav", "dino"])
def test_scores_of_prototypes_are_products_in_fp32(method):
    torch.manual_seed(0)
    m = METHODS[method](build_backbone("resnet18", "small", 1 / 16)[0])
    last, seen = m.last_layer, []
    last.register_forward_hook(lambda _, x, y: seen.append((x[0].detach(), y.detach())))
    with torch.autocast("cpu", torch.bfloat16):
        loss = m([torch.randn(8, 3, 16, 16) for _ in range(2)])
    (z, scores), *_ = seen
    assert torch.equal(scores, z @ last.weight.T) and z.dtype == scores.dtype == loss.dtype == torch.float32


# ---- BN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.classifies_instances])
def test_two_views_are_two_batches_to_bn_and_more_are_one_of_each_resolution(method):
    torch.manual_seed(0)
    m = METHODS[method](build_backbone("resnet18", "small", 1 / 16)[0])
    g = torch.Generator().manual_seed(0)
    views = [torch.randn(8, 3, 16, 16, generator=g) + k for k in range(2)] + [torch.randn(8, 3, 8, 8, generator=g)] * 2
    seen = []
    m.encoder.bn1.register_forward_hook(lambda module, x, y: seen.append(x[0].detach()))
    for some, batches in ((views[:2], [8, 8]), (views, [16, 16])):
        seen.clear()
        m(some)
        assert [len(x) for x in seen] == batches
    m.separate_views = False
    seen.clear()
    m(views[:2])
    assert [len(x) for x in seen] == [16]
