"""Self-supervised losses, and methods: modules with the heads, EMA teacher or queue that a loss needs.

Losses are pure functions of (N, D) tensors, computed in fp32 even under autocast. A method is a module:

    method(views, index) -> scalar loss          views: V tensors (B, 3, S, S); index (B,) of the training images
    method.after_step(progress)                  to be called after optimizer.step(); progress of the run, 0..1

`forward` is two calls, which a benchmark or a notebook can make separately:

    outputs = method.outputs(views, index)       a tuple of tensors, from the networks
    loss = method.loss(*outputs)                 the loss computed from them

Symbols follow the papers: features h (B, F), projections z (B, D), predictions p, queries q and keys k. The first two
views are global, the others local, and only global views are targets. A loss is the mean over all pairs of views or,
with `method.balance = (lambda_gg, lambda_gl)`, weighs global-global and global-local pairs (SSLight, 2210.02808).

Under torch.distributed each rank has a share of the batch, and losses gather the embeddings that they need from all
ranks. The mean gradient over ranks is that of one process with the whole batch, except for BN's per-rank statistics.

To add a method, write a loss function, a class and a line in METHODS. Keywords of __init__ become flags, with their
annotations as help texts. The class must set `projector`, with which the monitor computes z. `Class.heads(F, out_dim)`
names the heads that can be searched. tests/test_losses.py runs over METHODS.
"""

import copy
import math
from collections.abc import Callable
from functools import wraps
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import StochasticDepth

# ---- ranks ----------------------------------------------------------------------------------------------------------


def ranks() -> tuple[int, int]:
    """Returns (rank, world size): (0, 1) in a single process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _Gather(torch.autograd.Function):
    """all_gather with the sum of all ranks' gradients as backward. The name of torch's own differs between versions."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # all_reduce is in-place
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """(...) -> (world, ...), differentiable."""
    return _Gather.apply(x) if ranks()[1] > 1 else x[None]


def reduced(x: Tensor, operation: "dist.ReduceOp" = dist.ReduceOp.SUM) -> Tensor:
    """The sum over ranks, or another reduction; not differentiable."""
    if ranks()[1] > 1:
        x = x.clone()
        dist.all_reduce(x, operation)
    return x


def shard(n: int, rank: int | None = None) -> tuple[int, int]:
    """Returns (first, end): a rank's rows out of n, by default this rank's. Sizes differ by at most one row."""
    own_rank, world = ranks()
    rank = own_rank if rank is None else rank
    return n * rank // world, n * (rank + 1) // world


def own_rows(x: Tensor, n: int) -> Tensor:
    """This rank's rows of x: (n, ...) -> (about n / world, ...). Raises ValueError if x does not have n rows."""
    if len(x) != n:
        raise ValueError(f"{len(x)} rows, a row an image, are not those of {n} images")
    return x[slice(*shard(n))]


def whole_rows(x: Tensor, n: int) -> Tensor:
    """The rows of all ranks: (about n / world, ...) -> (n, ...). All ranks must call it.

    With several ranks the result is on the CPU, so that a GPU holds the rows of at most one other rank.
    """
    own_rank, world = ranks()
    if world == 1:
        return x
    parts = []
    for rank in range(world):
        first, end = shard(n, rank)
        part = x.clone() if rank == own_rank else x.new_empty(end - first, *x.shape[1:])
        dist.broadcast(part, rank)
        parts.append(part.cpu())
    return torch.cat(parts)


# ---- losses ---------------------------------------------------------------------------------------------------------


def no_autocast(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def fp32(x):
    """Casts half-precision tensors to fp32 and returns anything else unchanged."""
    return x.float() if torch.is_tensor(x) and x.dtype in (torch.bfloat16, torch.float16) else x


def in_fp32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator: the loss runs on fp32 inputs with autocast off, which would compute products in bf16."""

    @wraps(loss)
    def wrapped(x: Tensor, *args, **kwargs) -> Tensor:
        with no_autocast(x):
            return loss(fp32(x), *[fp32(a) for a in args], **{name: fp32(a) for name, a in kwargs.items()})

    return wrapped


@in_fp32
def neg_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean of -cos(p_n, z_n) over (N, D), with no gradient to the target z. SimSiam, 2011.10566 eq. 1-2."""
    assert p.shape == z.shape
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


@in_fp32
def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent, SimCLR's loss (2002.05709 eq. 1), of two views (N, D) of N images: the mean over 2N anchors.

    An anchor is compared with all other embeddings, also of other ranks. At full collapse the loss is ln(2N - 1).
    """
    assert z1.shape == z2.shape
    n = len(z1)
    z = F.normalize(torch.stack([z1, z2]), dim=2)  # (2, N, D)
    candidates = gather(z).flatten(0, 2)  # (W, 2, N, D) -> (2 W N, D)
    anchors = z.flatten(0, 1)  # (2N, D)
    logits = anchors @ candidates.T / temperature  # (2N, 2 W N)
    offset = ranks()[0] * 2 * n  # of this rank's anchors among the candidates
    row = torch.arange(2 * n, device=z.device)
    logits = logits.scatter(1, (row + offset)[:, None], float("-inf"))
    return F.cross_entropy(logits, (row + n) % (2 * n) + offset)


@in_fp32
def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE, MoCo's loss (1911.05722 eq. 1), of queries q (N, D), their positive keys k (N, D) and a queue (K, D) of
    negative keys of unit length. No gradient flows through keys."""
    assert q.shape == k.shape
    q = F.normalize(q, dim=1)
    k = F.normalize(k.detach(), dim=1)
    positive = (q * k).sum(1, keepdim=True)  # (N, 1)
    logits = torch.cat([positive, q @ queue.T.to(q.dtype)], 1) / temperature  # (N, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@torch.no_grad()
@in_fp32
def sinkhorn(
    scores: Tensor, epsilon: float = 0.05, iterations: int = 3, queue: Tensor | None = None, weight: Tensor | float = 1
) -> Tensor:
    """Codes (N, K) of scores (N, K): rows sum to 1, and all prototypes are used equally. SwAV, 2006.09882 section 3.1.

    Samples are those of all ranks and, each counted `weight` times, of a queue with scores (Q, K), the same on all
    ranks. No gradient flows through codes.
    """
    n = len(scores)
    logits = scores / epsilon
    highest = reduced(logits.max(), dist.ReduceOp.MAX)
    if queue is not None:
        logits = torch.cat([logits, queue / epsilon])  # (N + Q, K)
        highest = torch.maximum(highest, logits[n:].max())
    q = torch.exp(logits - highest)  # normalisation removes the common factor exp(highest)
    for _ in range(iterations):
        per_prototype = reduced(q[:n].sum(0)) + weight * q[n:].sum(0)  # (K,)
        q = q / per_prototype.clamp(min=1e-30)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)
    return q[:n]


@in_fp32
def swav_loss(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy between codes (N, K) and the softmax of another view's scores (N, K). SwAV, 2006.09882 eq. 2."""
    assert scores.shape == codes.shape
    return -(codes.detach() * F.log_softmax(scores / temperature, 1)).sum(1).mean()


@in_fp32
def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, temperature: float = 0.1, teacher_temperature: float = 0.07
) -> Tensor:
    """Cross-entropy between the centred, sharpened teacher (N, K) and the student (N, K). DINO, 2104.14294 eq. 1."""
    assert student.shape == teacher.shape
    target = ((teacher.detach() - center) / teacher_temperature).softmax(1)
    return -(target * F.log_softmax(student / temperature, 1)).sum(1).mean()


@in_fp32
def diet_loss(
    h: Tensor, weight: Tensor, index: Tensor, smoothing: float = 0.8, n: int | None = None, chunk: int | None = None
) -> Tensor:
    """Cross-entropy with label smoothing of a linear classifier weight (N, K) on features h (B, K), where an image's
    class is its index (B,) in 0..N-1. DIET, 2406.10743. Raises IndexError for any other index.

    L = LSE(z) - (1 - eps) z_n - eps mean_j z_j, z = h weight^T, in fp32. Logits are computed in chunks of rows, and
    again in backward, so that all B x N are never in memory. It takes 8 B chunk bytes, by default 64 MiB, beside h and
    weight, and 4 N K for the gradient of weight.

    With several ranks, n is required: weight holds this rank's rows (`shard`) of (n, K), and the loss and the gradient
    of h are those of this rank's images. Ranks exchange features and partial sums, never logits or weights. The
    gradient of weight is already that of the mean over ranks; it must not be averaged again.
    """
    n = n or len(weight)
    checked = index.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would have to synchronise
    if checked and not ((index >= 0) & (index < n)).all():
        raise IndexError(f"an image's index must be 0 to {n - 1}: {index.tolist()}")
    return _DietLoss.apply(h, weight, index, smoothing, n, chunk)


class _DietLoss(torch.autograd.Function):
    """diet_loss. The gradient of logit j is (softmax_j - (1 - eps) [j = n] - eps / N) / B."""

    @staticmethod
    def forward(ctx, h, weight, index, smoothing, n, chunk):
        rank, world = ranks()
        all_h = gather(h.detach()).flatten(0, 1)  # (W, B, K) -> (W B, K)
        first, end = shard(n)
        assert len(weight) == end - first
        row = gather(index).flatten(0, 1) - first  # of weight, where this rank owns the image's class
        owned = (row >= 0) & (row < len(weight))
        chunk = chunk or max(1024, 2**23 // len(all_h))
        lse = all_h.new_full((len(all_h),), -math.inf)
        for rows in weight.split(chunk):
            lse = torch.logaddexp(lse, (all_h @ rows.T).logsumexp(1))  # of (W B, chunk)
        at_target = torch.where(owned, (all_h * weight[row.clamp(0, len(weight) - 1)]).sum(1), 0.0)
        linear = (1 - smoothing) * at_target + smoothing / n * (all_h @ weight.sum(0))
        lse = gather(lse).logsumexp(0)  # (W, W B) -> (W B,)
        linear = reduced(linear)
        own = slice(rank * len(h), (rank + 1) * len(h))  # this rank's images
        ctx.save_for_backward(all_h, weight, row[:, None], lse[:, None])
        ctx.constants = smoothing, n, chunk, world, own
        return (lse - linear)[own].mean()

    @staticmethod
    def backward(ctx, gradient):
        all_h, weight, row, lse = ctx.saved_tensors
        smoothing, n, chunk, world, own = ctx.constants
        to_h = torch.zeros_like(all_h)
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        with no_autocast(gradient):  # torch.compile traces backward under the forward pass's autocast
            for start in range(0, len(weight), chunk):
                rows = weight[start : start + chunk]
                at = row - start
                here = (at >= 0) & (at < len(rows))
                to_z = (all_h @ rows.T).sub_(lse).exp_().sub_(smoothing / n)  # (W B, chunk)
                to_z.scatter_add_(1, at.clamp(0, len(rows) - 1), here.to(to_z.dtype) * (smoothing - 1))
                to_z.mul_(gradient / (own.stop - own.start))
                to_h.addmm_(to_z, rows)
                if to_weight is not None:
                    torch.mm(to_z.T, all_h, out=to_weight[start : start + chunk])
        if world > 1 and to_weight is not None:
            to_weight /= world
        return reduced(to_h)[own], to_weight, None, None, None, None


# ---- what methods are made of ---------------------------------------------------------------------------------------

# Keywords that several methods share: type and help text of the flag.
OutDim = Annotated[int | None, "dimensions of z, of dino outputs of its last layer; left out, the method's own"]
Projector = Annotated[Literal["none", "mlp"], "none: the loss takes the features, to see what a projector adds"]
Teacher = Annotated[Literal["none", "ema"], "where targets come from: the network itself, or its steadier average"]
MomentumTeacher = Annotated[float, "EMA momentum of the teacher; closer to 1 for long runs and small batches"]
Temperature = Annotated[float, "divides similarities or scores ahead of the softmax; lower makes hard cases count more"]
QueueSize = Annotated[int | None, "past embeddings to keep; more for small batches; default: by the number of images"]

Heads = dict[str, nn.Module] | None


class HeadSpace(NamedTuple):
    """A searchable head: number of layers, and of features at the input, between layers and at the output."""

    layers: int
    in_dim: int
    hidden: int
    out_dim: int


def mlp(*dims: int, bn: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear BN ReLU ... Linear. Without BN, hidden layers have biases."""
    layers: list[nn.Module] = []
    for in_dim, out_dim in pairwise(dims[:-1]):
        layers.append(nn.Linear(in_dim, out_dim, bias=not bn))
        if bn:
            layers.append(nn.BatchNorm1d(out_dim))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))


def head_width(feature_dim: int, published: int) -> int:
    """Hidden units of a head: the published number, or 4 x feature_dim for encoders with fewer features than ViT-Ti
    (192), so that the head does not outgrow the encoder."""
    return published if feature_dim >= 192 else 4 * feature_dim


def no_projector(heads: Heads, out_dim: int | None) -> nn.Module:
    """The identity in place of a projector. Raises ValueError if heads or their dimensions were asked for."""
    if heads or out_dim:
        raise ValueError("without a projector there are neither searched heads nor output dimensions to choose")
    return nn.Identity()


def queue_length(size: int | None, default: int, n_images: int) -> int:
    """The given size or the default. Raises ValueError if an image could meet itself in the queue."""
    size = default if size is None else size
    if not 1 <= size <= max(16, n_images):
        raise ValueError(f"a queue of {size} is empty or larger than the {n_images} images: give it 1 to {n_images}")
    return size


def encode(encoder: nn.Module, views: list[Tensor]) -> Tensor:
    """V views (B, 3, S, S) -> (V B, F), in order. Adjacent views of equal resolution share a forward pass."""
    h = [encoder(torch.cat(list(same))) for _, same in groupby(views, key=attrgetter("shape"))]
    return torch.cat(h) if len(h) > 1 else h[0]


def embed(encoder: nn.Module, head: nn.Module, views: list[Tensor], separate: bool) -> Tensor:
    """V views (B, 3, S, S) -> (V B, D), in order. separate: BN takes each view as a batch of its own."""
    if separate:
        return torch.cat([head(encoder(view)) for view in views])
    return head(encode(encoder, views))


def mean_over_pairs(loss, targets, views, balance: tuple[float, float] | None, symmetric=False, **options) -> Tensor:
    """Mean of loss(view, target, **options) over all pairs of a view and the target of another view.

    targets belong to the first views, in order; the first two views are global. With a balance and local views:
    lambda_gg times the mean over global-global pairs plus lambda_gl times the mean over global-local pairs. symmetric:
    loss(a, b) equals loss(b, a), so the two global views are one pair.
    """
    gg, gl = [], []
    for v, view in enumerate(views):
        for t, target in enumerate(targets):
            if v >= 2:
                gl.append(loss(view, target, **options))
            elif v < t or (v > t and not symmetric):
                gg.append(loss(view, target, **options))
    if balance is None or not gl:
        return torch.stack(gg + gl).mean()
    lambda_gg, lambda_gl = balance
    return lambda_gg * torch.stack(gg).mean() + lambda_gl * torch.stack(gl).mean()


def momentum_copy(module: nn.Module) -> nn.Module:
    """An EMA teacher: a copy without gradients. Alphas stay shared, so that it has the student's architecture."""
    alphas = {id(p): p for name, p in module.named_parameters() if name.endswith("alpha")}
    teacher = copy.deepcopy(module, dict(alphas))
    for m in teacher.modules():
        if isinstance(m, StochasticDepth):
            m.p = 0.0  # a teacher skips nothing
    for p in teacher.parameters():
        if id(p) not in alphas:
            p.requires_grad_(False)
    return teacher


@torch.no_grad()
def momentum_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for parameters. The teacher's BN buffers follow its own
    inputs."""
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if t is not s]
    if pairs:
        torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - momentum)


class Method(nn.Module):
    """Base class. A subclass implements outputs(views, index), loss(*outputs) and

        __init__(encoder, heads=None, n_images=50_000, *, <hyper-parameters>)

    heads: modules by the names in `Class.heads`, or None for the handcrafted ones. n_images: number of training images.
    """

    recipe: str  # a name in views.RECIPES
    small_recipe: str | None = None  # the recipe for images up to 64 px, if different
    optimizer, lr, weight_decay = "sgd", 0.12, 5e-4  # for CIFAR; lr is for batch size 256 and scales with it
    fixed_lr: float | None = None  # replaces lr if it does not scale with the batch size
    constant_lr: tuple[str, ...] = ()  # prefixes of the names of parameters whose learning rate is constant
    balance: tuple[float, float] | None = None  # lambda_gg, lambda_gl
    classifies_instances = False  # whether every training image is a class
    sharded: tuple[str, ...] = ()  # parameters of which each rank holds its own rows

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        """The heads that can be searched."""
        return {}

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> Tensor:
        return self.loss(*self.outputs(views, index))

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """The inputs of `loss`: by default z (B, D) of each view."""
        return embed(self.encoder, self.projector, views, self.separate(views)).chunk(len(views))

    def separate(self, views: list[Tensor]) -> bool:
        """Whether each view is a separate batch with its own BN statistics. Two views are, as in the code of SimSiam,
        MoCo and lightly. Of more views, the encoder takes all of one resolution as a batch, and the head takes all
        views as a batch, as in 2210.02808."""
        return len(views) == 2

    def add_teacher(self, *names: str) -> None:
        """Adds a `momentum_copy` of these modules as momentum_<name>."""
        for name in names:
            setattr(self, f"momentum_{name}", momentum_copy(getattr(self, name)))

    def update_teacher(self, momentum: float) -> None:
        """A `momentum_update` of all momentum_<name> modules."""
        for name, teacher in self.named_children():
            if name.startswith("momentum_"):
                momentum_update(teacher, getattr(self, name.removeprefix("momentum_")), momentum)

    def drop_last_layer_grad(self) -> None:
        """Freezes the last_layer, if there is one. Called after backward in the first epochs."""
        if hasattr(self, "last_layer"):
            self.last_layer.zero_grad()

    def after_step(self, progress: float) -> None:
        """Called after the optimiser's step; progress of the run in 0..1."""

    def chance(self, batch: int) -> float | None:
        """The loss at chance, ln K for a cross-entropy over K classes; batch is the batch size over all ranks."""
        return None


# ---- methods --------------------------------------------------------------------------------------------------------


class SimSiam(Method):
    """2011.10566 section 3: loss 1/2 [-cos(p1, sg z2) - cos(p2, sg z1)]; the predictor's learning rate is constant.

    D is 4 F, at most 2048 as for ResNet18; the predictor's hidden layer has D / 4 units. With an EMA teacher, targets
    are those of BYOL (2006.07733).
    """

    recipe = "simsiam"
    fixed_lr = 0.06  # the paper's .03 B / 256 at its CIFAR batch size B = 512; scaled down it learns less
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
        heads: Heads = None,
        n_images: int = 50_000,
        *,
        out_dim: OutDim = None,
        projector: Projector = "mlp",
        teacher: Teacher = "none",
        momentum_teacher: MomentumTeacher = 0.99,
    ):
        super().__init__(encoder)
        self.teacher = teacher
        self.momentum_teacher = momentum_teacher
        f = encoder.feature_dim
        d = self.heads(f, out_dim)["predictor"].out_dim
        if projector == "none":
            d = f
            self.projector = no_projector(heads, out_dim)
        else:
            self.projector = nn.Sequential(heads["projector"], nn.Linear(f, d)) if heads else mlp(f, f, f, d)
            self.projector[-1].bias.requires_grad_(False)  # BN follows
            self.projector.append(nn.BatchNorm1d(d, affine=False))
        self.predictor = heads["predictor"] if heads else mlp(d, d // 4, d)
        if teacher == "ema":
            self.add_teacher("encoder", "projector")

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """p of every view, then z of the two globals, each (B, D)."""
        separate = self.separate(views)
        z = embed(self.encoder, self.projector, views, separate)  # (V B, D)
        batches = z.chunk(len(views)) if separate else [z]
        p = torch.cat([self.predictor(batch) for batch in batches])  # (V B, D)
        targets = z.detach().chunk(len(views))[:2]
        if self.teacher == "ema":
            with torch.no_grad():
                targets = embed(self.momentum_encoder, self.momentum_projector, views[:2], separate).chunk(2)
        return *p.chunk(len(views)), *targets

    def loss(self, *outputs: Tensor) -> Tensor:
        *p, z1, z2 = outputs
        return mean_over_pairs(neg_cosine, [z1, z2], p, self.balance)

    def after_step(self, progress: float) -> None:
        self.update_teacher(self.momentum_teacher)


class SimCLR(Method):
    """2002.05709 section 2: NT-Xent between the projections of two views. Images of other ranks are negatives too.
    Local views are paired with both global views.

    The handcrafted projector is Linear BN ReLU Linear. A searched one is the whole head, and its last operation may
    have BN and an activation (2302.00059).
    """

    recipe = "simclr"

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        return {"projector": HeadSpace(6, feature_dim, min(feature_dim, 512), out_dim or 128)}

    def __init__(
        self,
        encoder: nn.Module,
        heads: Heads = None,
        n_images: int = 50_000,
        *,
        out_dim: OutDim = None,
        temperature: Temperature = 0.5,
        projector: Projector = "mlp",
    ):
        super().__init__(encoder)
        self.temperature = temperature
        f = encoder.feature_dim
        if projector == "none":
            self.projector = no_projector(heads, out_dim)
        else:
            self.projector = heads["projector"] if heads else mlp(f, f, out_dim or 128)

    def loss(self, *z: Tensor) -> Tensor:
        return mean_over_pairs(nt_xent, z[:2], z, self.balance, symmetric=True, temperature=self.temperature)

    def chance(self, batch: int) -> float:
        return math.log(2 * batch - 1)


class MoCo(Method):
    """1911.05722 section 3; v2: 2003.04297. symmetric, as on CIFAR: both global views give keys, and every view is a
    query for the keys of other views. Otherwise only the first global view gives keys, and all other views are queries
    (2210.02808).

    The queue (K, D) holds the last K keys of all ranks. By default K is the largest power of two up to an eighth of the
    images, at most 65,536, so that a key has left the queue before its image returns. Deviations: the mean of the two
    terms, which 2302.00059 adds up; no shuffling BN.
    """

    recipe = "moco"

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        """The searched head has F features throughout and is followed by Linear(F, D)."""
        return {"projector": HeadSpace(4, feature_dim, feature_dim, feature_dim)}

    def __init__(
        self,
        encoder: nn.Module,
        heads: Heads = None,
        n_images: int = 50_000,
        *,
        out_dim: OutDim = None,
        queue_size: QueueSize = None,
        momentum_teacher: MomentumTeacher = 0.99,
        temperature: Temperature = 0.1,
        symmetric: Annotated[bool, "keys of both global views; --no-symmetric, of the first alone, is cheaper"] = True,
        projector: Projector = "mlp",
        teacher: Teacher = "ema",
    ):
        super().__init__(encoder)
        self.temperature = temperature
        self.momentum_teacher = momentum_teacher if teacher == "ema" else 0.0
        self.n_keys = 2 if symmetric else 1
        f = encoder.feature_dim
        d = out_dim or 128
        if projector == "none":
            d = f
            self.projector = no_projector(heads, out_dim)
        else:
            self.projector = nn.Sequential(heads["projector"], nn.Linear(f, d)) if heads else mlp(f, f, d, bn=False)
        self.add_teacher("encoder", "projector")
        power = max(4, (n_images // 8).bit_length() - 1)
        size = queue_length(queue_size, min(65_536, 2**power), n_images)
        self.register_buffer("queue", F.normalize(torch.randn(size, d), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.keys: Tensor | None = None  # (1 or 2, B, D) of the last batch

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """q of every query view, then the keys, each (B, D)."""
        separate = self.separate(views)
        queries = views if self.n_keys == 2 else views[1:]
        q = embed(self.encoder, self.projector, queries, separate)  # (V B, D)
        with torch.no_grad():
            k = embed(self.momentum_encoder, self.momentum_projector, views[: self.n_keys], separate)
            k = F.normalize(fp32(k), dim=1)
        return *q.chunk(len(queries)), *k.chunk(self.n_keys)

    def loss(self, *outputs: Tensor) -> Tensor:
        q, k = outputs[: -self.n_keys], outputs[-self.n_keys :]
        self.keys = torch.stack(k)  # queued in after_step: backward still needs the queue as it is
        if self.n_keys == 1:
            q = (None, *q)  # the first view is no query
        return mean_over_pairs(info_nce, k, q, self.balance, queue=self.queue, temperature=self.temperature)

    def chance(self, batch: int) -> float:
        return math.log(1 + len(self.queue))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Appends the keys to the queue, in the order of a single process, and updates the momentum networks."""
        keys = gather(self.keys).transpose(0, 1).flatten(0, 2)  # (W, 2, B, D) -> (2 W B, D)
        keys = keys[-len(self.queue) :]
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.pointer.add_(len(keys)).remainder_(len(self.queue))
        self.update_teacher(self.momentum_teacher)


class SwAV(Method):
    """2006.09882 section 3: the prototype scores of a view predict the codes of the other global views, which are
    computed by Sinkhorn's algorithm over the whole batch.

    Prototypes have unit length. A queue of past embeddings of both global views is used for the codes once it is full
    and `queue_from` of the run has passed (epoch 15 of 200 in 2210.02808). Deviation: at most as many prototypes as a
    tenth of the images, and a queue of at most an eighth, for small data sets.
    """

    recipe, small_recipe = "swav", "swav-small"
    optimizer, lr, weight_decay = "adamw", 2e-3, 1e-6

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        return {"projector": HeadSpace(4, feature_dim, feature_dim, out_dim or 128)}

    def __init__(
        self,
        encoder: nn.Module,
        heads: Heads = None,
        n_images: int = 50_000,
        *,
        out_dim: OutDim = None,
        prototypes: Annotated[int | None, "more than classes; left out: 3000, at most a tenth of the images"] = None,
        queue_size: QueueSize = None,
        temperature: Temperature = 0.1,
        epsilon: Annotated[float, "of Sinkhorn: lower makes codes harder; try .03 where the loss stays at ln K"] = 0.05,
        queue_from: Annotated[float, "share of the run without the queue; more while features still move fast"] = 0.075,
    ):
        super().__init__(encoder)
        self.temperature = temperature
        self.epsilon = epsilon
        self.queue_from = queue_from
        f = encoder.feature_dim
        d = out_dim or 128
        self.projector = heads["projector"] if heads else mlp(f, head_width(f, 4096), d)
        k = prototypes or max(2, min(3000, n_images // 10))
        self.prototypes = nn.Linear(d, k, bias=False)
        self.prototypes.weight.data = F.normalize(torch.randn(k, d), dim=1)
        size = queue_length(queue_size, min(3840, max(1, n_images // 8)), n_images)
        self.register_buffer("queue", torch.zeros(2, size, d))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("queue_counts", torch.zeros(()))  # weight of the queue: 0, then 1
        self.embeddings: Tensor | None = None  # (2, B, D) of the last batch's globals

    @property
    def last_layer(self) -> nn.Module:
        return self.prototypes

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """Scores (B, K) of every view, then unit-length embeddings (B, D) of the two global views."""
        z = embed(self.encoder, self.projector, views, self.separate(views))  # (V B, D)
        z = F.normalize(fp32(z), dim=1)
        with no_autocast(z):
            scores = self.prototypes(z)  # (V B, K)
        return *scores.chunk(len(views)), *z.detach().chunk(len(views))[:2]

    def loss(self, *outputs: Tensor) -> Tensor:
        *scores, z1, z2 = outputs
        self.embeddings = torch.stack([z1, z2])
        weight = self.prototypes.weight.detach()
        with no_autocast(weight):
            queue_scores = self.queue.to(weight.dtype) @ weight.T  # (2, Q, D) -> (2, Q, K)
        codes = [sinkhorn(s, self.epsilon, queue=q, weight=self.queue_counts) for s, q in zip(scores, queue_scores)]
        return mean_over_pairs(swav_loss, codes, scores, self.balance, temperature=self.temperature)

    def chance(self, batch: int) -> float:
        return math.log(self.prototypes.out_features)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Normalises the prototypes and prepends the embeddings of all ranks to the queue."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        size = self.queue.shape[1]
        new = gather(self.embeddings).transpose(0, 1).flatten(1, 2)[:, :size]  # (W, 2, B, D) -> (2, W B, D)
        self.queue.copy_(torch.cat([new.to(self.queue.dtype), self.queue], 1)[:, :size])
        self.filled.add_(new.shape[1])
        self.queue_counts.copy_((self.filled >= size) & (progress >= self.queue_from))


class DINO(Method):
    """2104.14294 section 3.1: the student's softmax on every view predicts the momentum teacher's centred and sharpened
    softmax on the other global views.

    The teacher's momentum rises from .99, for CIFAR (.996 on ImageNet), to 1 by a cosine; its BN is in train mode. The
    centre is averaged over all ranks. The last layer is weight-normalised, with norms fixed at 1 if the head has BN.
    Deviations: no biases before BN; fewer hidden units and outputs for encoders narrower than ViT-Ti.
    """

    recipe, small_recipe = "dino", "dino-small"

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        """The searched head replaces the hidden layers and the bottleneck, not the last layer."""
        return {"projector": HeadSpace(4, feature_dim, feature_dim, 256)}

    def __init__(
        self,
        encoder: nn.Module,
        heads: Heads = None,
        n_images: int = 50_000,
        *,
        out_dim: OutDim = None,
        momentum_teacher: MomentumTeacher = 0.99,
        temperature: Temperature = 0.1,
        teacher_temperature: Annotated[tuple[float, float], "first, last; .04 safe, above .07 unstable"] = (0.04, 0.07),
        teacher_warmup: Annotated[float | None, "share of the run; left out: .25, without BN .15"] = None,
        center_momentum: Annotated[float, "EMA momentum of the centre; higher for small batches"] = 0.9,
        head_bn: Annotated[bool | None, "BN in the projector; left out, as in the encoder, so a ViT's has none"] = None,
    ):
        super().__init__(encoder)
        if head_bn is None:
            head_bn = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
        if teacher_warmup is None:
            teacher_warmup = 0.25 if head_bn else 0.15
        self.temperature = temperature
        self.momentum_teacher = momentum_teacher
        self.center_momentum = center_momentum
        self.teacher_temperatures = teacher_temperature
        self.teacher_warmup = teacher_warmup
        f = encoder.feature_dim
        k = out_dim or (1024 if f < 192 else 4096 if head_bn else 65_536)
        hidden = head_width(f, 2048)
        self.projector = heads["projector"] if heads else mlp(f, hidden, hidden, 256, bn=head_bn, activation=nn.GELU)
        self.last_layer = weight_norm(nn.Linear(256, k, bias=False))
        norm = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(norm).requires_grad_(not head_bn)
        self.add_teacher("encoder", "projector", "last_layer")
        self.register_buffer("center", torch.zeros(k))
        self.register_buffer("teacher_temperature", torch.tensor(teacher_temperature[0]))
        self.teacher_outputs: Tensor | None = None  # (2, B, K) of the last batch

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """Student outputs (B, K) of every view, then teacher outputs of the two global views."""
        separate = self.separate(views)
        z = embed(self.encoder, self.projector, views, separate)  # (V B, 256)
        with torch.no_grad():
            t = embed(self.momentum_encoder, self.momentum_projector, views[:2], separate)  # (2 B, 256)
        with no_autocast(z):  # bf16 is too coarse for a temperature of .04
            student = self.last_layer(F.normalize(fp32(z), dim=1, eps=1e-6))
            with torch.no_grad():
                teacher = self.momentum_last_layer(F.normalize(fp32(t), dim=1, eps=1e-6))
        return *student.chunk(len(views)), *teacher.chunk(2)

    def loss(self, *outputs: Tensor) -> Tensor:
        *student, t1, t2 = outputs
        self.teacher_outputs = torch.stack([t1, t2])
        temperatures = {"temperature": self.temperature, "teacher_temperature": self.teacher_temperature}
        return mean_over_pairs(dino_loss, [t1, t2], student, self.balance, center=self.center, **temperatures)

    def chance(self, batch: int) -> float:
        return math.log(self.last_layer.out_features)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Updates the centre, the teacher and the teacher's temperature."""
        mean = gather(fp32(self.teacher_outputs).mean((0, 1))).mean(0)  # (2, B, K) -> (K,)
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)
        self.update_teacher(1 - (1 - self.momentum_teacher) * (math.cos(math.pi * progress) + 1) / 2)
        first, last = self.teacher_temperatures
        ramp = min(1.0, progress / self.teacher_warmup) if self.teacher_warmup else 1.0
        self.teacher_temperature.fill_(first + (last - first) * ramp)


class DIET(Method):
    """2406.10743: every training image is a class of its own, predicted by a linear classifier on the features. There
    are no pairs, no teacher and, by default, no projector. With several views the loss is their mean.

    For N images and K features, the classifier's weight (N, K), its gradient and AdamW's moments take 16 N K bytes, 410
    MB for CIFAR-10 at K = 512. Each rank holds its `shard` of the rows. state_dict(), which all ranks must call, has
    the whole weight, and load_state_dict() takes it.
    """

    recipe, optimizer, lr, weight_decay = "diet", "adamw", 1e-3, 0.05
    classifies_instances = True
    sharded = ("classifier.weight",)

    def __init__(
        self,
        encoder: nn.Module,
        heads: Heads = None,
        n_images: int = 50_000,
        *,
        out_dim: OutDim = None,
        smoothing: Annotated[float, "of the labels; high, as each class has one image; lower it for large N"] = 0.8,
        projector: Projector = "none",
    ):
        super().__init__(encoder)
        if not 0 <= smoothing < 1:
            raise ValueError(f"--smoothing {smoothing}: must be 0 or above and below 1")
        self.n = n_images
        self.smoothing = smoothing
        f = encoder.feature_dim
        k = out_dim or f
        self.projector = no_projector(heads, out_dim) if projector == "none" else mlp(f, f, k)
        own_rank, world = ranks()
        for rank in range(world):  # every rank draws all rows, so that they do not depend on the number of ranks
            first, end = shard(n_images, rank)
            rows = nn.Linear(k, end - first, bias=False)
            if rank == own_rank:
                self.classifier = rows
        self.register_state_dict_post_hook(_whole_classifier)
        self.register_load_state_dict_pre_hook(_own_classifier)

    @property
    def floor(self) -> float:
        """The minimum of the loss: the entropy of a smoothed target."""
        low = self.smoothing / self.n
        high = 1 - self.smoothing + low
        return -high * math.log(high) - ((self.n - 1) * low * math.log(low) if low else 0)

    def normalised(self, loss: float) -> float:
        """(log N - L) / (log N - floor): 0 at chance, 1 at the minimum."""
        chance = self.chance(1)
        return (chance - loss) / (chance - self.floor)

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """h (V B, K) and index (V B,)."""
        if index is None:
            raise ValueError("DIET's target is the image's index: outputs(views, index)")
        return self.projector(encode(self.encoder, views)), index.repeat(len(views))

    def loss(self, *outputs: Tensor) -> Tensor:
        h, index = outputs
        return diet_loss(h, self.classifier.weight, index, self.smoothing, self.n)

    def chance(self, batch: int) -> float:
        return math.log(self.n)


def _whole_classifier(method: DIET, state: dict, prefix: str, metadata) -> None:
    for name in method.sharded:
        state[prefix + name] = whole_rows(state[prefix + name], method.n)


def _own_classifier(method: DIET, state: dict, prefix: str, *others) -> None:
    for name in method.sharded:
        if prefix + name in state:  # otherwise torch reports a missing key
            state[prefix + name] = own_rows(state[prefix + name], method.n)


METHODS = {  # a line each
    "simsiam": SimSiam,
    "simclr": SimCLR,
    "moco": MoCo,
    "swav": SwAV,
    "dino": DINO,
    "diet": DIET,
}
