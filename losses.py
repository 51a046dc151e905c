"""Self-supervised losses, and the methods that hold what each needs: heads, momentum networks, a queue.

Losses are pure functions, computed in fp32 whatever autocast is on and normalised by the tensor's own N. A method is a
module,

    method(views, index) -> scalar loss          views: list of (B, 3, S, S); index (B,): which of the N training images
    method.after_step(progress)                  after the optimiser's step; progress in 0..1 of the run
    method.last_layer                            of some: takes no gradient in the first epoch

and `forward` is the composition of two, which a benchmark or a notebook can call apart:

    outputs = method.outputs(views, index)       the networks: a tuple of tensors
    loss = method.loss(*outputs)                 the mathematics on them

The first two views are global, the others local: only globals are ever a target. A method's loss is the mean over all
its pairs of views; with `method.balance = (lambda_gg, lambda_gl)` it is lambda_gg times the mean over global-global
pairs plus lambda_gl times that over global-local ones (SSLight, 2210.02808).

Under torch.distributed each rank gives its share of the batch; losses gather what they compare with, so that the mean
of the ranks' gradients is the gradient of one process with the whole batch (for networks without BN: BN statistics
are the rank's).

To add a method: a loss function, a class, a line in METHODS. `Class.heads(F, out_dim)` says which heads it wants, as
data: their names with in, hidden, out and the number of layers to search over. Without any it builds the handcrafted
ones.
"""

import copy
import math
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import StochasticDepth

# ---- losses ---------------------------------------------------------------------------------------------------------


def full(x: Tensor) -> Tensor:
    """At least fp32: bf16 from autocast is widened, fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which operations on x's device keep their inputs' precision."""
    return torch.autocast(x.device.type, enabled=False)


def in_fp32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss with autocast off: it would round the products inside to bf16, after `full` has widened what goes in."""

    @wraps(loss)
    def wrapped(x: Tensor, *args, **kwargs) -> Tensor:
        with no_autocast(x):
            return loss(x, *args, **kwargs)

    return wrapped


@in_fp32
def neg_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean of -cos(p_n, z_n) over (N, D); z is a target and carries no gradient. SimSiam, 2011.10566 eq. 1-2."""
    assert p.shape == z.shape
    return -F.cosine_similarity(full(p), full(z.detach()), dim=1).mean()


@in_fp32
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


@in_fp32
def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """MoCo's loss (1911.05722 eq. 1): query q (N, D), its positive key k (N, D), negatives queue (K, D).

    Keys carry no gradient.
    """
    assert q.shape == k.shape
    q, k = F.normalize(full(q), dim=1), F.normalize(full(k.detach()), dim=1)
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.T.to(q.dtype)], 1) / temperature  # (N, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@torch.no_grad()
@in_fp32
def sinkhorn(
    scores: Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue: Tensor | None = None,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Codes (N, K) of scores (N, K): rows that sum to 1, prototypes used evenly. SwAV, 2006.09882 section 3.1.

    Prototypes share out the samples of all ranks together, and, each counted `weight` times, those of a queue (Q, K)
    that is the same on every rank. No gradient flows through codes.
    """
    n, q = len(scores), full(scores) / epsilon
    top = reduced(q.max(), dist.ReduceOp.MAX)
    if queue is not None:
        old = full(queue) / epsilon
        q, top = torch.cat([q, old]), torch.maximum(top, old.max())
    q = torch.exp(q - top)  # a common factor, which the normalisation takes out
    for _ in range(iterations):
        q = q / (reduced(q[:n].sum(0)) + weight * q[n:].sum(0)).clamp(min=1e-30)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)
    return q[:n]


def reduced(x: Tensor, operation: "dist.ReduceOp" = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or another reduction, over ranks; without gradient."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, operation)
    return x


@in_fp32
def swav_loss(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of codes (N, K) and the softmax of another view's scores (N, K). 2006.09882 eq. 2."""
    assert scores.shape == codes.shape
    return -(codes.detach() * F.log_softmax(full(scores) / temperature, 1)).sum(1).mean()


@in_fp32
def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.07,
) -> Tensor:
    """Cross-entropy of the centred, sharpened teacher (N, K) and the student (N, K); center (K,). 2104.14294 eq. 1."""
    assert student.shape == teacher.shape
    target = ((full(teacher.detach()) - center) / teacher_temperature).softmax(1)
    return -(target * F.log_softmax(full(student) / student_temperature, 1)).sum(1).mean()


@in_fp32
def diet_loss(
    h: Tensor, weight: Tensor, index: Tensor, smoothing: float = 0.8, n: int | None = None, chunk: int | None = None
) -> Tensor:
    """Cross-entropy, with label smoothing, of the classifier weight (N, K) on features h (B, K); the class of an image
    is its index (B,) in 0..N-1. DIET, 2406.10743. Raises IndexError for one that is not.

    L = LSE(z) - (1 - eps) z_n - eps mean_j z_j, z = h weight^T, in fp32. Logits are made a chunk of rows at a time, and
    again for the gradient, so B x N of them are never held: beside h and weight it takes 4 B chunk bytes, and 4 N K for
    weight's gradient. chunk: None is as many rows as make 64 MiB.

    With n, weight holds this rank's rows (`shard`) of (n, K), and the loss and gradients of h are those of this rank's
    images among all ranks' together: ranks exchange features and partial sums, never logits or weights. The gradient of
    weight is that of the mean over ranks, so it is not to be averaged again.
    """
    total = n or len(weight)
    checked = index.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would be a wait
    if checked and not ((index >= 0) & (index < total)).all():
        raise IndexError(f"an image's index must be 0 to {total - 1}: {index.tolist()}")
    return _Diet.apply(full(h), full(weight), index, smoothing, total, chunk)


def shard(n: int) -> tuple[int, int]:
    """(first, end): this rank's rows of n, as many as another's but for one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return n * rank // world, n * (rank + 1) // world


class _Diet(torch.autograd.Function):
    """diet_loss; its gradient to a logit is (softmax_j - (1 - eps) [j = n] - eps / N) / B."""

    @staticmethod
    def forward(ctx, h, weight, index, smoothing, total, chunk):
        own, sharded = len(h), len(weight) < total
        world, first = (dist.get_world_size(), shard(total)[0]) if sharded else (1, 0)
        everyone, target = (gather(x).flatten(0, 1) if world > 1 else x for x in (h.detach(), index))
        chunk = chunk or max(1024, 2**24 // len(everyone))
        place = target - first
        mine = (place >= 0) & (place < len(weight))
        top = everyone.new_full((len(everyone),), -math.inf)
        total_exp = torch.zeros_like(top)
        for rows in weight.split(chunk):
            z = everyone @ rows.T
            higher = torch.maximum(top, z.amax(1))
            total_exp = total_exp * (top - higher).exp() + z.sub_(higher[:, None]).exp_().sum(1)
            top = higher
        at_target = torch.where(mine, (everyone * weight[place.clamp(0, len(weight) - 1)]).sum(1), 0.0)
        mean = everyone @ weight.sum(0) / total
        if world > 1:
            highest = reduced(top, dist.ReduceOp.MAX)
            total_exp = reduced(total_exp * (top - highest).exp())
            top, at_target, mean = highest, reduced(at_target), reduced(mean)
        lse = top + total_exp.log()
        losses = lse - (1 - smoothing) * at_target - smoothing * mean
        ctx.save_for_backward(everyone, weight, place[:, None], mine[:, None], lse)
        ctx.facts = smoothing, total, chunk, world, own
        rank = dist.get_rank() if world > 1 else 0
        return losses[rank * own : (rank + 1) * own].mean()

    @staticmethod
    def backward(ctx, gradient):
        with no_autocast(gradient):  # torch.compile traces this under the autocast of the forward pass
            return _Diet.gradients(ctx, gradient)

    @staticmethod
    def gradients(ctx, gradient):
        everyone, weight, place, mine, lse = ctx.saved_tensors
        smoothing, total, chunk, world, own = ctx.facts
        to_h, to_weight = torch.zeros_like(everyone), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight), chunk):
            rows = weight[start : start + chunk]
            p = (everyone @ rows.T).sub_(lse[:, None]).exp_().sub_(smoothing / total)
            here = mine & (place >= start) & (place < start + len(rows))
            p.scatter_add_(1, (place - start).clamp(0, len(rows) - 1), here.to(p.dtype) * (smoothing - 1))
            p.mul_(gradient / own)
            to_h.addmm_(p, rows)
            if to_weight is not None:
                torch.mm(p.T, everyone, out=to_weight[start : start + chunk])
        if world > 1:
            dist.all_reduce(to_h)
            rank = dist.get_rank()
            to_h = to_h[rank * own : (rank + 1) * own]
            if to_weight is not None:
                to_weight /= world
        return to_h, to_weight, None, None, None, None


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


def encode(encoder: nn.Module, views: list[Tensor], apart: bool = False) -> Tensor:
    """All views through the encoder, those of one resolution in one call, or each `apart`: (V B, F), in the views'
    order."""
    h, start = [], 0
    for end in range(1, len(views) + 1):
        if apart or end == len(views) or views[end].shape != views[start].shape:
            h.append(encoder(torch.cat(views[start:end])))
            start = end
    return torch.cat(h) if len(h) > 1 else h[0]


def in_parts(module: nn.Module, x: Tensor, n: int) -> Tensor:
    """(n B, F) through a module as n batches, each with BN statistics of its own."""
    return torch.cat([module(part) for part in x.chunk(n)]) if n > 1 else module(x)


def embed(encoder: nn.Module, head: nn.Module, views: list[Tensor], apart: bool) -> Tensor:
    """Views through the encoder and a head, each view apart or not: (V B, D), in the views' order."""
    return in_parts(head, encode(encoder, views, apart), len(views) if apart else 1)


def balanced(gg: list[Tensor], gl: list[Tensor], weights: tuple[float, float] | None) -> Tensor:
    """The mean of all terms, or lambda_gg mean(global-global) + lambda_gl mean(global-local); without locals the
    former alone."""
    if weights is None or not gl:
        return torch.stack(gg + gl).mean()
    return weights[0] * torch.stack(gg).mean() + weights[1] * torch.stack(gl).mean()


def pairs(targets: int, views: int) -> list[tuple[int, int]]:
    """(target, view) for all views but the target itself."""
    return [(t, v) for v in range(views) for t in range(targets) if v != t]


def paired(term, targets: list[Tensor], views: list[Tensor], weights: tuple[float, float] | None) -> Tensor:
    """`balanced` over term(view, target) of all `pairs`: the first two views are global, targets are the first ones."""
    terms = [(v, term(views[v], targets[t])) for t, v in pairs(len(targets), len(views))]
    return balanced([x for v, x in terms if v < 2], [x for v, x in terms if v >= 2], weights)


def wide(feature_dim: int, units: int) -> int:
    """Hidden units of a published head; in a network narrower than ViT-Ti's 192 features four times these, not to
    have more head than network."""
    return units if feature_dim >= 192 else 4 * feature_dim


def mlp(*dims: int, bn: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear BN ReLU ... Linear: hidden layers with BN (and then no bias) or without, a bare Linear at the end."""
    layers: list[nn.Module] = []
    for i, o in pairwise(dims[:-1]):
        layers += [nn.Linear(i, o, bias=not bn), *([nn.BatchNorm1d(o)] if bn else []), activation()]
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))


def fitting_queue(size: int, n_images: int) -> int:
    """The size of a queue. Raises ValueError where it is larger than the data."""
    if size > max(16, n_images):
        raise ValueError(f"a queue of {size} is larger than the {n_images} images: one would meet itself in it")
    return size


def no_projector(heads: dict[str, nn.Module] | None, out_dim: int | None) -> nn.Module:
    """What stands in place of a projector where z is h. Raises ValueError for heads or dimensions of one."""
    if heads or out_dim:
        raise ValueError("without a projector there are neither searched heads nor output dimensions to choose")
    return nn.Identity()


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy without gradients, for a moving average; alphas stay shared: it takes the student's architecture."""
    alphas = {id(p): p for name, p in module.named_parameters() if name.endswith("alpha")}
    twin = copy.deepcopy(module, dict(alphas))
    for m in twin.modules():
        if isinstance(m, StochasticDepth):
            m.p = 0.0  # a teacher skips nothing
    for p in twin.parameters():
        if id(p) not in alphas:
            p.requires_grad_(False)
    return twin


@torch.no_grad()
def momentum_update(twin: nn.Module, module: nn.Module, momentum: float) -> None:
    """twin <- momentum * twin + (1 - momentum) * module: parameters only, BN buffers are of the twin's own inputs."""
    both = [(t, s) for t, s in zip(twin.parameters(), module.parameters(), strict=True) if t is not s]
    if both:
        torch._foreach_lerp_([t for t, _ in both], [s for _, s in both], 1 - momentum)


class Method(nn.Module):
    """What all methods have; a subclass adds `heads`, `__init__`, outputs(views, index) and loss(*outputs)."""

    recipe: str  # of views, in views.RECIPES
    small_recipe: str | None = None  # that of images up to 64 px, where it is another one
    optimizer, lr, weight_decay = "sgd", 0.12, 5e-4  # on CIFAR; lr at batch 256, with which it is scaled
    fixed_lr: float | None = None  # in place of lr, where it is the same at any batch
    constant_lr: tuple[str, ...] = ()  # parameters, by the start of their name, whose learning rate stays
    balance: tuple[float, float] | None = None  # lambda_gg, lambda_gl
    separate_views = True  # two views are two batches to BN, see `apart`
    classifies_instances = False  # whether every training image is a class, and so has weights of its own
    sharded: tuple[str, ...] = ()  # parameters of which every rank holds its own rows

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> Tensor:
        return self.loss(*self.outputs(views, index))

    def apart(self, views: list[Tensor]) -> bool:
        """Whether each view is a batch of its own to BN: two views are, as in SimSiam's and MoCo's own code and in
        lightly's. Of more, those of one resolution are one to the encoder, and all to a head, as in 2210.02808."""
        return self.separate_views and len(views) == 2

    def after_step(self, progress: float) -> None:
        """After the optimiser's step; progress in 0..1 of the run."""

    def chance(self, batch: int) -> float | None:
        """The loss, with that many images over all ranks, of a network that tells nothing apart: ln K where the loss is
        a cross-entropy over K things."""
        return None


class SimSiam(Method):
    """2011.10566: loss 1/2 [-cos(p1, sg z2) - cos(p2, sg z1)]; the predictor's learning rate stays constant.

    out_dim D is 4 F up to 2048, as for ResNet18; the predictor's hidden layer has D / 4. To ask what they add:
    projector "none" predicts features, teacher "ema" takes the targets from a momentum network (as BYOL, 2006.07733,
    does).
    """

    recipe = "simsiam"
    fixed_lr = 0.06  # the paper's .03 B / 256 at its batch of 512 on CIFAR; scaled down it learns less
    constant_lr = ("predictor",)

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        d = out_dim or min(2048, 4 * feature_dim)
        return {
            "projector": HeadSpace(6, feature_dim, feature_dim, feature_dim),
            "predictor": HeadSpace(4, d, d // 4, d),
        }

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, nn.Module] | None = None,
        out_dim: int | None = None,
        projector: str = "mlp",
        teacher: str = "none",
        momentum: float = 0.99,
    ):
        super().__init__()
        f, d = encoder.feature_dim, self.heads(encoder.feature_dim, out_dim)["predictor"].o
        self.encoder, self.teacher, self.momentum = encoder, teacher, momentum
        if projector == "none":
            d, self.projector = f, no_projector(heads, out_dim)
        else:
            self.projector = nn.Sequential(heads["projector"], nn.Linear(f, d)) if heads else mlp(f, f, f, d)
            self.projector[-1].bias.requires_grad_(False)  # BN follows
            self.projector.append(nn.BatchNorm1d(d, affine=False))
        self.predictor = heads["predictor"] if heads else mlp(d, d // 4, d)
        if teacher == "ema":
            self.momentum_encoder, self.momentum_projector = momentum_copy(encoder), momentum_copy(self.projector)

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """p of every view, then z of the two globals, each (B, D)."""
        apart = self.apart(views)
        z = embed(self.encoder, self.projector, views, apart)  # (V B, D)
        p = in_parts(self.predictor, z, len(views) if apart else 1)
        if self.teacher == "ema":
            with torch.no_grad():
                targets = embed(self.momentum_encoder, self.momentum_projector, views[:2], apart).chunk(2)
        else:
            targets = z.detach().chunk(len(views))[:2]
        return *p.chunk(len(views)), *targets

    def loss(self, *outputs: Tensor) -> Tensor:
        return paired(neg_cosine, outputs[-2:], outputs[:-2], self.balance)

    def after_step(self, progress: float) -> None:
        if self.teacher == "ema":
            momentum_update(self.momentum_encoder, self.encoder, self.momentum)
            momentum_update(self.momentum_projector, self.projector, self.momentum)


class SimCLR(Method):
    """2002.05709: NT-Xent between the projections of two views; other ranks' images are negatives too. Local views are
    paired with each of the globals.

    The handcrafted projector is Linear BN ReLU Linear; a searched one is the whole head, its last operation with BN and
    activation (2302.00059).
    """

    recipe = "simclr"

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        return {"projector": HeadSpace(6, feature_dim, min(feature_dim, 512), out_dim or 128)}

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, nn.Module] | None = None,
        out_dim: int | None = None,
        temperature: float = 0.5,
        projector: str = "mlp",
    ):
        super().__init__()
        f = encoder.feature_dim
        self.encoder, self.temperature = encoder, temperature
        if projector == "none":
            self.projector = no_projector(heads, out_dim)
        else:
            self.projector = heads["projector"] if heads else mlp(f, f, out_dim or 128)

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        z = embed(self.encoder, self.projector, views, self.apart(views))
        return z.chunk(len(views))  # (V B, D) -> V times (B, D)

    def loss(self, *z: Tensor) -> Tensor:
        def term(a, b):
            return nt_xent(a, b, self.temperature)

        return balanced([term(z[0], z[1])], [term(local, g) for local in z[2:] for g in z[:2]], self.balance)

    def chance(self, batch: int) -> float:
        return math.log(2 * batch - 1)


class MoCo(Method):
    """1911.05722 and 2003.04297. symmetric, as on CIFAR: both global views have keys, and every view is a query to
    those of the others; else the first global view alone has, and every other view is a query (2210.02808).

    The momentum encoder has a momentum head of its own. The queue (K, D) holds the last K keys of all ranks; by
    default K is the largest power of two up to an eighth of the images, 65,536 at most, so that a key has left before
    its image returns. To ask what they add: teacher "none" makes the keys with the network as it is, projector "none"
    compares features. Deviations: the mean of the two terms where 2302.00059 adds them; no shuffling of BN over ranks.
    """

    recipe = "moco"

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
        symmetric: bool = True,
        projector: str = "mlp",
        teacher: str = "ema",
    ):
        super().__init__()
        f, d = encoder.feature_dim, out_dim or 128
        self.momentum = momentum if teacher == "ema" else 0.0
        self.temperature, self.keyed = temperature, 2 if symmetric else 1
        self.encoder = encoder
        if projector == "none":
            d, self.projector = f, no_projector(heads, out_dim)
        else:
            self.projector = nn.Sequential(heads["projector"], nn.Linear(f, d)) if heads else mlp(f, f, d, bn=False)
        self.momentum_encoder, self.momentum_projector = momentum_copy(encoder), momentum_copy(self.projector)
        size = fitting_queue(queue_size or min(65_536, 2 ** max(4, (n_images // 8).bit_length() - 1)), n_images)
        self.register_buffer("queue", F.normalize(torch.randn(size, d), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.keys: Tensor | None = None

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """q of every view that is a query, then the keys, each (B, D)."""
        queries = views if self.keyed == 2 else views[1:]
        apart = self.apart(views)
        q = embed(self.encoder, self.projector, queries, apart)
        with torch.no_grad():
            k = embed(self.momentum_encoder, self.momentum_projector, views[: self.keyed], apart)
            k = F.normalize(full(k), dim=1)
        return *q.chunk(len(queries)), *k.chunk(self.keyed)

    def loss(self, *outputs: Tensor) -> Tensor:
        q, k = outputs[: -self.keyed], outputs[-self.keyed :]
        self.keys = torch.stack(k)  # (1 or 2, B, D), queued in after_step: backward still needs the queue as it is
        if self.keyed == 1:
            q = (k[0], *q)  # stands for the first view, which is no query of its own
        return paired(lambda a, b: info_nce(a, b, self.queue, self.temperature), k, q, self.balance)

    def chance(self, batch: int) -> float:
        return math.log(1 + len(self.queue))

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


class SwAV(Method):
    """2006.09882: a view's prototype scores predict the codes of the global views, Sinkhorn's over the whole batch.

    Prototypes have rows of unit length. A queue of the last embeddings of both global views joins the batch
    for the codes, once it is full and `queue_from` of the run is done (epoch 15 of 200 in 2210.02808). Deviation: a
    tenth of the images at the most for the prototypes and an eighth for the queue, so that small data sets fill them.
    """

    recipe, small_recipe = "swav", "swav-small"
    optimizer, lr, weight_decay = "adamw", 2e-3, 1e-6

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        return {"projector": HeadSpace(4, feature_dim, feature_dim, out_dim or 128)}

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, nn.Module] | None = None,
        out_dim: int | None = None,
        n_images: int = 50_000,
        prototypes: int | None = None,
        queue_size: int | None = None,
        temperature: float = 0.1,
        queue_from: float = 0.075,
    ):
        super().__init__()
        f, d = encoder.feature_dim, out_dim or 128
        self.temperature, self.queue_from = temperature, queue_from
        self.encoder = encoder
        self.projector = heads["projector"] if heads else mlp(f, wide(f, 4096), d)
        self.prototypes = nn.Linear(d, prototypes or max(2, min(3000, n_images // 10)), bias=False)
        nn.init.normal_(self.prototypes.weight).data.copy_(F.normalize(self.prototypes.weight.data, dim=1))
        size = fitting_queue(queue_size or min(3840, max(1, n_images // 8)), n_images)
        self.register_buffer("queue", torch.zeros(2, size, d))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("queue_counts", torch.zeros(()))  # 1 once it does
        self.embeddings: Tensor | None = None

    @property
    def last_layer(self) -> nn.Module:
        return self.prototypes

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """Scores (B, K) of every view, then the embeddings (B, D) of the two globals, of unit length."""
        z = F.normalize(full(embed(self.encoder, self.projector, views, self.apart(views))), dim=1)
        with no_autocast(z):
            scores = self.prototypes(z)
        return *scores.chunk(len(views)), *z.detach().chunk(len(views))[:2]

    def loss(self, *outputs: Tensor) -> Tensor:
        scores, self.embeddings = outputs[:-2], torch.stack(outputs[-2:])
        with no_autocast(self.queue):
            old = self.queue.to(self.prototypes.weight.dtype) @ self.prototypes.weight.detach().T  # (2, Q, K)
        codes = [sinkhorn(s.detach(), queue=q, weight=self.queue_counts) for s, q in zip(scores, old)]
        return paired(lambda s, c: swav_loss(s, c, self.temperature), codes, scores, self.balance)

    def chance(self, batch: int) -> float:
        return math.log(self.prototypes.out_features)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Bring the prototypes back to unit length; queue the embeddings of all ranks, the newest first."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        size = self.queue.shape[1]
        new = gather(self.embeddings).transpose(0, 1).flatten(1, 2)[:, :size]  # (W, 2, B, D) -> (2, W B, D)
        self.queue.copy_(torch.cat([new.to(self.queue.dtype), self.queue], 1)[:, :size])
        self.filled.add_(new.shape[1])
        self.queue_counts.copy_((self.filled >= size) & (progress >= self.queue_from))


class DINO(Method):
    """2104.14294: the student's softmax on every view predicts the momentum teacher's, centred and sharpened, on the
    globals.

    The teacher's temperature goes from .04 to .07 over the first teacher_warmup of the run (None is .25 for CNNs, .15
    for ViTs), its momentum from .99, as on CIFAR (.996 on ImageNet), to 1 by a cosine, its centre by an average over
    all ranks; BN in its own train mode. The last layer has weights of unit norm, which a CNN's keeps. bn: in the head;
    None is as in the encoder, so a ViT's has none. Deviation: no biases ahead of BN; in networks narrower than ViT-Ti
    fewer hidden units and outputs.
    """

    recipe, small_recipe = "dino", "dino-small"

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        """The searched head replaces the hidden layers and the bottleneck; the weight-normed last layer follows."""
        return {"projector": HeadSpace(4, feature_dim, feature_dim, 256)}

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, nn.Module] | None = None,
        out_dim: int | None = None,
        momentum: float = 0.99,
        temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        teacher_warmup: float | None = None,
        center_momentum: float = 0.9,
        bn: bool | None = None,
    ):
        super().__init__()
        if bn is None:
            bn = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
        if teacher_warmup is None:
            teacher_warmup = 0.25 if bn else 0.15
        f = encoder.feature_dim
        k = out_dim or (1024 if f < 192 else 4096 if bn else 65_536)
        self.momentum, self.temperature, self.center_momentum = momentum, temperature, center_momentum
        self.teacher_temperatures, self.teacher_warmup = teacher_temperature, teacher_warmup
        self.encoder = encoder
        hidden = wide(f, 2048)
        self.projector = heads["projector"] if heads else mlp(f, hidden, hidden, 256, bn=bn, activation=nn.GELU)
        self.last_layer = weight_norm(nn.Linear(256, k, bias=False))  # frozen at first
        norm = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(norm).requires_grad_(not bn)
        self.momentum_encoder, self.momentum_projector = momentum_copy(encoder), momentum_copy(self.projector)
        self.momentum_last_layer = momentum_copy(self.last_layer)
        self.register_buffer("center", torch.zeros(k))
        self.register_buffer("teacher_temperature", torch.tensor(teacher_temperature[0]))
        self.teacher: Tensor | None = None

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, K) of the student for every view, then of the teacher for the two globals."""
        apart = self.apart(views)
        z = embed(self.encoder, self.projector, views, apart)
        with torch.no_grad():
            t = embed(self.momentum_encoder, self.momentum_projector, views[:2], apart)
        with no_autocast(z):  # products of K things, to a temperature of .04: bf16 is too coarse
            student = self.last_layer(F.normalize(full(z), dim=1, eps=1e-6))
            with torch.no_grad():
                teacher = self.momentum_last_layer(F.normalize(full(t), dim=1, eps=1e-6))
        return *student.chunk(len(views)), *teacher.chunk(2)

    def loss(self, *outputs: Tensor) -> Tensor:
        student, self.teacher = outputs[:-2], torch.stack(outputs[-2:])

        def term(s, t):
            return dino_loss(s, t, self.center, self.temperature, self.teacher_temperature)

        return paired(term, outputs[-2:], student, self.balance)

    def chance(self, batch: int) -> float:
        return math.log(self.last_layer.out_features)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move centre, teacher and the teacher's temperature."""
        mean = gather(full(self.teacher).mean((0, 1))).mean(0)
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)
        momentum = 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
        for twin, module in (
            (self.momentum_encoder, self.encoder),
            (self.momentum_projector, self.projector),
            (self.momentum_last_layer, self.last_layer),
        ):
            momentum_update(twin, module, momentum)
        first, last = self.teacher_temperatures
        ramp = min(1.0, progress / self.teacher_warmup) if self.teacher_warmup else 1.0
        self.teacher_temperature.fill_(first + (last - first) * ramp)


class DIET(Method):
    """2406.10743: every training image is a class of its own, and a linear classifier on the features tells them apart;
    no pairs, no teacher, and by default no projector.

    The classifier (N, K) has no bias; for N images and K features its weights, gradient and AdamW's two moments take
    16 N K bytes, 410 MB for CIFAR-10 at K = 512, shared out over the ranks by rows. Rows start as nn.Linear's. With
    several views the loss is their mean.

    projector: "none", or "mlp" (Linear BN ReLU Linear, as wide as the features) between the
    features and the classifier, to ask what it adds.
    """

    recipe, optimizer, lr, weight_decay = "diet", "adamw", 1e-3, 0.05
    classifies_instances = True
    sharded = ("classifier.weight",)

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        return {}

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, nn.Module] | None = None,
        out_dim: int | None = None,
        n_images: int = 50_000,
        smoothing: float = 0.8,
        projector: str = "none",
    ):
        super().__init__()
        f = encoder.feature_dim
        k = out_dim or f
        self.encoder, self.n, self.smoothing = encoder, n_images, smoothing
        self.projector = no_projector(heads, out_dim) if projector == "none" else mlp(f, f, k)
        first, end = shard(n_images)
        self.classifier = skip_init(nn.Linear, k, end - first, bias=False)
        rows = self.classifier.weight.data
        for start in range(0, n_images, 65_536):  # the same numbers however many ranks there are
            block = torch.empty(min(65_536, n_images - start), k).uniform_(-(k**-0.5), k**-0.5)
            low, high = max(first, start), min(end, start + len(block))
            if low < high:
                rows[low - first : high - first] = block[low - start : high - start]

    @property
    def floor(self) -> float:
        """The least that the loss can be: the entropy of a smoothed target."""
        low = self.smoothing / self.n
        high = 1 - self.smoothing + low
        return -(high * math.log(high) if high else 0) - ((self.n - 1) * low * math.log(low) if low else 0)

    def normalised(self, loss: float) -> float:
        """(log N - L) / (log N - floor): 0 at chance, 1 at best."""
        chance = self.chance(1)
        return (chance - loss) / (chance - self.floor)

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """h (V B, K), then the index of each, (V B,)."""
        if index is None:
            raise ValueError("DIET's target is the image's index: outputs(views, index)")
        return self.projector(encode(self.encoder, views)), index.repeat(len(views))

    def loss(self, *outputs: Tensor) -> Tensor:
        h, index = outputs
        return diet_loss(h, self.classifier.weight, index, self.smoothing, self.n)

    def chance(self, batch: int) -> float:
        return math.log(self.n)


METHODS = {"simsiam": SimSiam, "simclr": SimCLR, "moco": MoCo, "swav": SwAV, "dino": DINO, "diet": DIET}
