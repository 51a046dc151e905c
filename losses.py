"""Self-supervised losses, and the methods that hold what each needs: heads, momentum networks, a queue.

Losses are pure functions, computed in fp32 and normalised by the tensor's own N. A method is a module,

    method(views, index) -> scalar loss          views: list of (B, 3, S, S); index (B,): the images' places in the data
    method.after_step(progress)                  after the optimiser's step; progress in 0..1 of the run

and `forward` is the composition of two, which a benchmark or a notebook can call apart:

    outputs = method.outputs(views)              the networks: a tuple of tensors
    loss = method.loss(*outputs)                 the mathematics on them

Under torch.distributed each rank gives its share of the batch; losses gather what they compare with, so that the mean
of the ranks' gradients is the gradient of one process with the whole batch (for networks without BN: BN statistics
are the rank's).

To add a method: a loss function, a class, a line in METHODS. `Class.heads(F, out_dim)` says which heads it wants, as
data: their names with in, hidden, out and the number of layers to search over. Without any it builds the handcrafted
ones.
"""

import copy
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---- losses ---------------------------------------------------------------------------------------------------------


def full(x: Tensor) -> Tensor:
    """At least fp32: bf16 from autocast is widened, fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def neg_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean of -cos(p_n, z_n) over (N, D); z is a target and carries no gradient. SimSiam, 2011.10566 eq. 1-2."""
    assert p.shape == z.shape
    return -F.cosine_similarity(full(p), full(z.detach()), dim=1).mean()


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss (2002.05709 eq. 1) over two views (N, D) of N images: mean over the 2N anchors.

    An anchor's candidates are all 2N embeddings but itself, those of other ranks included; it is ln(2N - 1) at full
    collapse.
    """
    assert z1.shape == z2.shape
    n, rank = len(z1), dist.get_rank() if dist.is_initialized() else 0
    z = F.normalize(full(torch.stack([z1, z2])), dim=2)  # (2, N, D)
    candidates = gather(z).flatten(0, 2)  # (W, 2, N, D) -> (2 W N, D), a rank's two views after another
    anchors = z.flatten(0, 1)  # (2N, D)
    logits = anchors @ candidates.T / temperature  # (2N, 2 W N)
    own = torch.arange(2 * n, device=z.device)
    logits = logits.scatter(1, (own + rank * 2 * n)[:, None], float("-inf"))
    return F.cross_entropy(logits, (own + n) % (2 * n) + rank * 2 * n)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """MoCo's loss (1911.05722 eq. 1): query q (N, D), its positive key k (N, D), negatives queue (K, D).

    Keys carry no gradient.
    """
    assert q.shape == k.shape
    q, k = F.normalize(full(q), dim=1), F.normalize(full(k.detach()), dim=1)
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.T.to(q.dtype)], 1) / temperature  # (N, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums every rank's gradient: torch's own changes its name between versions."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """(...) -> (world, ...), with gradients back to every rank."""
    return _Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x[None]


# ---- methods --------------------------------------------------------------------------------------------------------


class HeadSpace(NamedTuple):
    """A head before its operations are chosen: the layers that a search fills; features in, between and out."""

    layers: int
    i: int
    hidden: int
    o: int


def encode(encoder: nn.Module, views: list[Tensor]) -> Tensor:
    """All views through the encoder, those of one resolution in one call: (V B, F), in the views' order."""
    h, start = [], 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape != views[start].shape:
            h.append(encoder(torch.cat(views[start:end])))
            start = end
    return torch.cat(h) if len(h) > 1 else h[0]


def mlp(*dims: int, bn: bool = True) -> nn.Sequential:
    """Linear BN ReLU ... Linear: hidden layers with BN (and then no bias) or without, a bare Linear at the end."""
    layers: list[nn.Module] = []
    for i, o in pairwise(dims[:-1]):
        layers += [nn.Linear(i, o, bias=not bn), *([nn.BatchNorm1d(o)] if bn else []), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy without gradients, for a moving average; alphas stay shared: it takes the student's architecture."""
    alphas = {id(p): p for name, p in module.named_parameters() if name.endswith("alpha")}
    twin = copy.deepcopy(module, dict(alphas))
    for p in twin.parameters():
        if id(p) not in alphas:
            p.requires_grad_(False)
    return twin


@torch.no_grad()
def momentum_update(twin: nn.Module, module: nn.Module, momentum: float) -> None:
    """twin <- momentum * twin + (1 - momentum) * module: parameters only, BN buffers are of the twin's own inputs."""
    pairs = [(t, s) for t, s in zip(twin.parameters(), module.parameters(), strict=True) if t is not s]
    if pairs:
        torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - momentum)


class SimSiam(nn.Module):
    """2011.10566: loss 1/2 [-cos(p1, sg z2) - cos(p2, sg z1)]; the predictor's learning rate stays constant.

    Deviation: both views go through the network as one batch, so BN sees them together. out_dim D is 4 F up to 2048,
    as for ResNet18; the predictor's hidden layer has D / 4.
    """

    recipe, lr, weight_decay = "simsiam", 0.12, 5e-4  # defaults for SGD; lr at batch 256
    constant_lr = ("predictor",)

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        d = out_dim or min(2048, 4 * feature_dim)
        return {
            "projector": HeadSpace(6, feature_dim, feature_dim, feature_dim),
            "predictor": HeadSpace(4, d, d // 4, d),
        }

    def __init__(self, encoder: nn.Module, heads: dict[str, nn.Module] | None = None, out_dim: int | None = None):
        super().__init__()
        f, d = encoder.feature_dim, self.heads(encoder.feature_dim, out_dim)["predictor"].o
        self.encoder = encoder
        self.projector = nn.Sequential(heads["projector"], nn.Linear(f, d)) if heads else mlp(f, f, f, d)
        self.projector[-1].bias.requires_grad_(False)  # BN follows
        self.projector.append(nn.BatchNorm1d(d, affine=False))
        self.predictor = heads["predictor"] if heads else mlp(d, d // 4, d)

    def outputs(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        z = self.projector(encode(self.encoder, views))  # (2B, F) -> (2B, D)
        p = self.predictor(z)
        return *p.chunk(2), *z.detach().chunk(2)

    def loss(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        return (neg_cosine(p1, z2) + neg_cosine(p2, z1)) / 2

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> Tensor:
        return self.loss(*self.outputs(views))

    def after_step(self, progress: float) -> None:
        """Nothing: the target is the network itself."""


class SimCLR(nn.Module):
    """2002.05709: NT-Xent between the projections of two views; other ranks' images are negatives too.

    The handcrafted projector is Linear BN ReLU Linear; a searched one is the whole head, its last operation with BN and
    activation (2302.00059).
    """

    recipe, lr, weight_decay = "simclr", 0.12, 5e-4
    constant_lr = ()

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        return {"projector": HeadSpace(6, feature_dim, min(feature_dim, 512), out_dim or 128)}

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, nn.Module] | None = None,
        out_dim: int | None = None,
        temperature: float = 0.5,
    ):
        super().__init__()
        f = encoder.feature_dim
        self.encoder, self.temperature = encoder, temperature
        self.projector = heads["projector"] if heads else mlp(f, f, out_dim or 128)

    def outputs(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        return self.projector(encode(self.encoder, views)).chunk(2)  # (2B, D) -> (B, D), (B, D)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, self.temperature)

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> Tensor:
        return self.loss(*self.outputs(views))

    def after_step(self, progress: float) -> None:
        """Nothing: negatives come from the batch."""


class MoCo(nn.Module):
    """1911.05722 and 2003.04297, symmetric as on CIFAR: mean of info_nce(q1, k2) and info_nce(q2, k1).

    The momentum encoder has a momentum head of its own. The queue (K, D) holds the last K keys of all ranks; by
    default K is the largest power of two up to an eighth of the images, 65,536 at most, so that a key has left before
    its image returns. Deviations: the mean of the two terms where 2302.00059 adds them; no shuffling of BN over ranks.
    """

    recipe, lr, weight_decay = "moco", 0.12, 5e-4
    constant_lr = ()

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        """The searched cell keeps F features; Linear(F, D) follows."""
        return {"projector": HeadSpace(4, feature_dim, feature_dim, feature_dim)}

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, nn.Module] | None = None,
        out_dim: int | None = None,
        n_images: int = 50_000,
        queue_size: int | None = None,
        momentum: float = 0.99,
        temperature: float = 0.1,
    ):
        super().__init__()
        f, d = encoder.feature_dim, out_dim or 128
        self.momentum, self.temperature = momentum, temperature
        self.encoder = encoder
        self.projector = nn.Sequential(heads["projector"], nn.Linear(f, d)) if heads else mlp(f, f, d, bn=False)
        self.momentum_encoder, self.momentum_projector = momentum_copy(encoder), momentum_copy(self.projector)
        size = queue_size or min(65_536, 2 ** max(4, (n_images // 8).bit_length() - 1))
        if queue_size and queue_size > n_images:
            raise ValueError(
                f"a queue of {queue_size} keys is larger than the {n_images} images: a key would meet itself"
            )
        self.register_buffer("queue", F.normalize(torch.randn(size, d), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.keys: Tensor | None = None

    def outputs(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        q = self.projector(encode(self.encoder, views))  # (2B, D)
        with torch.no_grad():
            k = F.normalize(full(self.momentum_projector(encode(self.momentum_encoder, views))), dim=1)
        return *q.chunk(2), *k.chunk(2)

    def loss(self, q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        self.keys = torch.stack([k1, k2])  # (2, B, D), queued in after_step: backward still needs the queue as it is
        queue, t = self.queue, self.temperature
        return (info_nce(q1, k2, queue, t) + info_nce(q2, k1, queue, t)) / 2

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> Tensor:
        return self.loss(*self.outputs(views))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Queue the step's keys, in the order that one process would have them in; move the momentum networks."""
        keys = gather(self.keys).transpose(0, 1).flatten(0, 2)  # (W, 2, B, D) -> (2 W B, D)
        keys = keys[-len(self.queue) :]
        place = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[place] = keys
        self.pointer.add_(len(keys)).remainder_(len(self.queue))
        momentum_update(self.momentum_encoder, self.encoder, self.momentum)
        momentum_update(self.momentum_projector, self.projector, self.momentum)


METHODS = {"simsiam": SimSiam, "simclr": SimCLR, "moco": MoCo}
