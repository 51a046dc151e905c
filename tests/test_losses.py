"""Losses against numpy in float64, methods against themselves on two ranks."""

import copy
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from losses import METHODS, MoCo, SimCLR, SimSiam, encode, info_nce, momentum_copy, momentum_update, neg_cosine, nt_xent
from models import SearchHead


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
    method = METHODS[name](Encoder(), heads, **options)
    for parent in list(method.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.BatchNorm1d):
                setattr(parent, child, nn.Identity())
    return method.double()


def some_views(n=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 4, 4, generator=g, dtype=torch.double) for _ in range(2)]


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
    torch.testing.assert_close(loss, method.loss(*method.outputs(views)))
    swapped = method(views[::-1], torch.arange(8))
    torch.testing.assert_close(loss, swapped)  # both views play both parts


@pytest.mark.parametrize("name", METHODS)
def test_a_step_lowers_the_loss(name):
    method, views = build(name), some_views()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    before = method(views, None)
    before.backward()
    optimizer.step()
    assert method(views, None) < before


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


# ---- two ranks ------------------------------------------------------------------------------------------------------


def one_step(method, views, wrap):
    """(mean loss over ranks, gradients, buffers after the step)"""
    model = wrap(method)  # kept: without it DDP would be gone before backward
    loss = model(views, None)
    loss.backward()
    method.after_step(0.5)
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(method.named_buffers())


def rank_main(rank, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(path["port"])}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for name in METHODS:
        views = [v.chunk(2)[rank] for v in some_views()]
        loss, gradients, buffers = one_step(build(name), views, DistributedDataParallel)
        dist.all_reduce(loss)
        results[name] = (loss / 2, gradients, buffers)
    torch.save(results, f"{path['folder']}/{rank}.pth")
    dist.destroy_process_group()


def test_two_ranks_give_one_process_loss_gradients_and_queue(tmp_path):
    with __import__("socket").socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, ({"port": port, "folder": str(tmp_path)},), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pth", weights_only=True) for r in range(2)]
    for name in METHODS:
        loss, gradients, buffers = one_step(build(name), some_views(), lambda m: m)
        for rank in ranks:
            torch.testing.assert_close(rank[name][0], loss)
            assert rank[name][1].keys() == gradients.keys() and len(gradients) > 3
            for key, gradient in gradients.items():
                torch.testing.assert_close(rank[name][1][key], gradient, msg=f"{name} {key}")
            for key, buffer in buffers.items():
                torch.testing.assert_close(rank[name][2][key], buffer, msg=f"{name} {key}")
