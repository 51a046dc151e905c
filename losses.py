"""Self-supervised losses, and the methods that hold what each needs: heads, an EMA teacher, a queue.

Losses are pure functions of (N, D) tensors, computed in fp32 even under autocast. A method is a module:

    method(views, index) -> scalar loss          views: V tensors (B, 3, S, S); index (B,): of the training images
    method.after_step(progress)                  after the optimiser's step; progress of the run, 0..1

`forward` consists of two calls, which a benchmark or a notebook can make separately:

    outputs = method.outputs(views, index)       the networks: a tuple of tensors
    loss = method.loss(*outputs)                 the loss computed from them

Letters are as in the papers: h (B, F) features, z (B, D) projections, p predictions; q, k queries and keys. The first
two views are global, the others local; only globals serve as targets. A loss is the mean over all pairs of views or,
with `method.balance = (lambda_gg, lambda_gl)`, weighs global-global and global-local pairs (SSLight, 2210.02808).

Under torch.distributed each rank has its share of the batch, and losses gather what they compare it with. The mean of
the ranks' gradients is then that of one process with the whole batch, except for BN, whose statistics are per rank.

To add a method, write a loss function, a class and a line in METHODS. Each keyword of __init__ becomes a flag, with its
annotation as the help. The class sets `projector`, which gives the monitor its z; `Class.heads(F, out_dim)` names the
heads that a search may fill. tests/test_losses.py runs over METHODS and says what it needs to know of a new one.
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
    """(rank, world): 0 and 1 where nothing is distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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
    return _Gather.apply(x) if ranks()[1] > 1 else x[None]


def reduced(x: Tensor, operation: "dist.ReduceOp" = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or another reduction, over ranks; without gradient."""
    if ranks()[1] > 1:
        x = x.clone()
        dist.all_reduce(x, operation)
    return x


def shard(n: int, rank: int | None = None) -> tuple[int, int]:
    """(first, end): a rank's rows of n, by default this one's; ranks have equally many, but for one."""
    own_rank, world = ranks()
    rank = own_rank if rank is None else rank
    return n * rank // world, n * (rank + 1) // world


def own_rows(x: Tensor, n: int) -> Tensor:
    """This rank's rows of x: (n, ...) -> (about n / world, ...). Raises ValueError where x has not n rows."""
    if len(x) != n:
        raise ValueError(f"{len(x)} rows, a row an image, are not those of {n} images")
    return x[slice(*shard(n))]


def whole_rows(x: Tensor, n: int) -> Tensor:
    """The rows of all ranks, one rank after another: (about n / world, ...) -> (n, ...). All ranks call it.

    Of several ranks it is on the CPU, so a GPU holds one other rank's rows at most. On one rank it is x itself.
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
    """A context in which operations on x's device keep their inputs' precision."""
    return torch.autocast(x.device.type, enabled=False)


def fp32(x):
    """Half-precision tensors, as autocast gives them, in fp32; anything else, fp64 too, as it is."""
    return x.float() if torch.is_tensor(x) and x.dtype in (torch.bfloat16, torch.float16) else x


def in_fp32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of its inputs in fp32, with autocast off, which would round the products inside to bf16 again."""

    @wraps(loss)
    def wrapped(x: Tensor, *args, **kwargs) -> Tensor:
        with no_autocast(x):
            return loss(fp32(x), *[fp32(a) for a in args], **{name: fp32(a) for name, a in kwargs.items()})

    return wrapped


@in_fp32
def neg_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean of -cos(p_n, z_n) over (N, D); z is a target and carries no gradient. SimSiam, 2011.10566 eq. 1-2."""
    assert p.shape == z.shape
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


@in_fp32
def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss (2002.05709 eq. 1) over two views (N, D) of N images: mean over the 2N anchors.

    An anchor's candidates are all 2N embeddings but itself, those of other ranks included; it is ln(2N - 1) at full
    collapse.
    """
    assert z1.shape == z2.shape
    n = len(z1)
    z = F.normalize(torch.stack([z1, z2]), dim=2)  # (2, N, D)
    candidates = gather(z).flatten(0, 2)  # (W, 2, N, D) -> (2 W N, D), a rank's two views after another
    anchors = z.flatten(0, 1)  # (2N, D)
    logits = anchors @ candidates.T / temperature  # (2N, 2 W N)
    offset = ranks()[0] * 2 * n  # where this rank's anchors stand among the candidates
    row = torch.arange(2 * n, device=z.device)
    logits = logits.scatter(1, (row + offset)[:, None], float("-inf"))
    return F.cross_entropy(logits, (row + n) % (2 * n) + offset)


@in_fp32
def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """MoCo's loss (1911.05722 eq. 1): query q (N, D), its positive key k (N, D), negatives queue (K, D).

    Keys carry no gradient.
    """
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
    """Codes (N, K) of scores (N, K): rows that sum to 1, prototypes used evenly. SwAV, 2006.09882 section 3.1.

    Prototypes share out the samples of all ranks together, and, each counted `weight` times, those of a queue (Q, K)
    that is the same on every rank. No gradient flows through codes.
    """
    n = len(scores)
    logits = scores / epsilon
    highest = reduced(logits.max(), dist.ReduceOp.MAX)
    if queue is not None:
        logits = torch.cat([logits, queue / epsilon])  # (N + Q, K)
        highest = torch.maximum(highest, logits[n:].max())
    q = torch.exp(logits - highest)  # exp(highest) is a common factor, which the normalisation takes out
    for _ in range(iterations):
        per_prototype = reduced(q[:n].sum(0)) + weight * q[n:].sum(0)  # (K,)
        q = q / per_prototype.clamp(min=1e-30)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)
    return q[:n]


@in_fp32
def swav_loss(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of codes (N, K) and the softmax of another view's scores (N, K). 2006.09882 eq. 2."""
    assert scores.shape == codes.shape
    return -(codes.detach() * F.log_softmax(scores / temperature, 1)).sum(1).mean()


@in_fp32
def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, temperature: float = 0.1, teacher_temperature: float = 0.07
) -> Tensor:
    """Cross-entropy of the centred, sharpened teacher (N, K) and the student (N, K); center (K,). 2104.14294 eq. 1."""
    assert student.shape == teacher.shape
    target = ((teacher.detach() - center) / teacher_temperature).softmax(1)
    return -(target * F.log_softmax(student / temperature, 1)).sum(1).mean()


@in_fp32
def diet_loss(
    h: Tensor, weight: Tensor, index: Tensor, smoothing: float = 0.8, n: int | None = None, chunk: int | None = None
) -> Tensor:
    """Cross-entropy, with label smoothing, of the classifier weight (N, K) on features h (B, K); the class of an image
    is its index (B,) in 0..N-1. DIET, 2406.10743. Raises IndexError for one that is not.

    L = LSE(z) - (1 - eps) z_n - eps mean_j z_j, z = h weight^T, in fp32. Logits are made a chunk of rows at a time, and
    again for the gradient, so B x N of them are never held: beside h and weight it takes 8 B chunk bytes, and 4 N K for
    weight's gradient. chunk: None is as many rows as make 64 MiB.

    On several ranks, n is required: weight holds this rank's rows (`shard`) of (n, K), and the loss and the gradient of
    h are those of this rank's images. Ranks exchange features and partial sums, never logits or weights. The gradient
    of weight is already that of the mean over ranks; it must not be averaged again.
    """
    n = n or len(weight)
    checked = index.device.type == "cpu" and not torch.compiler.is_compiling()  # on a GPU it would be a wait
    if checked and not ((index >= 0) & (index < n)).all():
        raise IndexError(f"an image's index must be 0 to {n - 1}: {index.tolist()}")
    return _DietLoss.apply(h, weight, index, smoothing, n, chunk)


class _DietLoss(torch.autograd.Function):
    """diet_loss; its gradient to a logit is (softmax_j - (1 - eps) [j = n] - eps / N) / B."""

    @staticmethod
    def forward(ctx, h, weight, index, smoothing, n, chunk):
        rank, world = ranks()
        all_h = gather(h.detach()).flatten(0, 1)  # (W, B, K) -> (W B, K)
        first, _ = shard(n)
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
        with no_autocast(gradient):  # torch.compile traces this under the autocast of the forward pass
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

# Keywords of several methods: type and help. Each keyword of a method's __init__ is a flag of the scripts.
OutDim = Annotated[int | None, "dimensions of z, of dino outputs of its last layer; left out, the method's own"]
Projector = Annotated[Literal["none", "mlp"], "none: the loss takes the features, to see what a projector adds"]
Teacher = Annotated[Literal["none", "ema"], "where targets come from: the network itself, or its steadier average"]
MomentumTeacher = Annotated[float, "EMA momentum of the teacher; closer to 1 for long runs and small batches"]
Temperature = Annotated[float, "divides similarities or scores ahead of the softmax; lower makes hard cases count more"]
QueueSize = Annotated[int | None, "past embeddings to keep; more for small batches; default: by the number of images"]

Heads = dict[str, nn.Module] | None


class HeadSpace(NamedTuple):
    """A head before its operations are chosen: the layers that a search fills; features in, between and out."""

    layers: int
    in_dim: int
    hidden: int
    out_dim: int


def mlp(*dims: int, bn: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear BN ReLU ... Linear: hidden layers with BN (and then no bias) or without, a bare Linear at the end."""
    layers: list[nn.Module] = []
    for in_dim, out_dim in pairwise(dims[:-1]):
        layers.append(nn.Linear(in_dim, out_dim, bias=not bn))
        if bn:
            layers.append(nn.BatchNorm1d(out_dim))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))


def head_width(feature_dim: int, published: int) -> int:
    """Hidden units of a head: the published number, but 4 x feature_dim for encoders with fewer features than ViT-Ti's
    192, so that the head does not outgrow the encoder."""
    return published if feature_dim >= 192 else 4 * feature_dim


def no_projector(heads: Heads, out_dim: int | None) -> nn.Module:
    """What stands in place of a projector where z is h. Raises ValueError for heads or dimensions of one."""
    if heads or out_dim:
        raise ValueError("without a projector there are neither searched heads nor output dimensions to choose")
    return nn.Identity()


def queue_length(size: int | None, default: int, n_images: int) -> int:
    """The size asked for, or the default. Raises ValueError for one in which an image would meet itself."""
    size = default if size is None else size
    if not 1 <= size <= max(16, n_images):
        raise ValueError(f"a queue of {size} is empty or larger than the {n_images} images: give it 1 to {n_images}")
    return size


def encode(encoder: nn.Module, views: list[Tensor]) -> Tensor:
    """V views (B, 3, S, S) -> (V B, F), in their order; neighbours of one resolution share a call."""
    h = [encoder(torch.cat(list(same))) for _, same in groupby(views, key=attrgetter("shape"))]
    return torch.cat(h) if len(h) > 1 else h[0]


def embed(encoder: nn.Module, head: nn.Module, views: list[Tensor], separate: bool) -> Tensor:
    """V views (B, 3, S, S) -> (V B, D), in their order; each is a batch of its own to BN, or all are one."""
    if separate:
        return torch.cat([head(encoder(view)) for view in views])
    return head(encode(encoder, views))


def mean_over_pairs(loss, targets, views, balance: tuple[float, float] | None, symmetric=False, **options) -> Tensor:
    """Mean of loss(view, target, **options) over the pairs of a view and a target that is not of the same view.

    targets are of the first views, in their order; of the views the first two are global. With a balance and locals:
    lambda_gg times the mean over global-global pairs plus lambda_gl times that over global-local ones. symmetric:
    loss(a, b) is loss(b, a), so the two globals are one pair.
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
    """A copy without gradients, for a moving average; alphas stay shared: it takes the student's architecture."""
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
    """teacher <- momentum * teacher + (1 - momentum) * student: parameters only, for BN buffers are of the teacher's
    own inputs."""
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if t is not s]
    if pairs:
        torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - momentum)


class Method(nn.Module):
    """What all methods have. A subclass adds outputs(views, index), loss(*outputs) and

        __init__(encoder, heads=None, n_images=50_000, *, <hyper-parameters>)

    heads: modules for the names of `Class.heads`; None builds the handcrafted ones. n_images: that are trained on.
    """

    recipe: str  # of views, in views.RECIPES
    small_recipe: str | None = None  # that of images up to 64 px, where it is another one
    optimizer, lr, weight_decay = "sgd", 0.12, 5e-4  # on CIFAR; lr at batch 256, with which it is scaled
    fixed_lr: float | None = None  # in place of lr, where it is the same at any batch
    constant_lr: tuple[str, ...] = ()  # parameters, by the start of their name, whose learning rate stays
    balance: tuple[float, float] | None = None  # lambda_gg, lambda_gl
    classifies_instances = False  # whether every training image is a class, and so has weights of its own
    sharded: tuple[str, ...] = ()  # parameters of which every rank holds its own rows

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
        """What the loss takes: z (B, D) of each view, where a method has nothing else."""
        return embed(self.encoder, self.projector, views, self.separate(views)).chunk(len(views))

    def separate(self, views: list[Tensor]) -> bool:
        """Whether each view is a separate batch, with BN statistics of its own: yes for two views, as in SimSiam's,
        MoCo's and lightly's code. With more, the encoder takes all views of one resolution as one batch, and the head
        takes all views as one, as in 2210.02808."""
        return len(views) == 2

    def add_teacher(self, *names: str) -> None:
        """A `momentum_copy` of each of these modules, as momentum_<name>."""
        for name in names:
            setattr(self, f"momentum_{name}", momentum_copy(getattr(self, name)))

    def update_teacher(self, momentum: float) -> None:
        """A `momentum_update` of each of these copies."""
        for name, teacher in self.named_children():
            if name.startswith("momentum_"):
                momentum_update(teacher, getattr(self, name.removeprefix("momentum_")), momentum)

    def drop_last_layer_grad(self) -> None:
        """Called after backward in the first epochs: the last_layer, where a method has one, takes no step."""
        if hasattr(self, "last_layer"):
            self.last_layer.zero_grad()

    def after_step(self, progress: float) -> None:
        """After the optimiser's step; progress in 0..1 of the run."""

    def chance(self, batch: int) -> float | None:
        """The loss at chance, with that many images over all ranks: ln K where it is a cross-entropy over K things."""
        return None


# ---- methods --------------------------------------------------------------------------------------------------------


class SimSiam(Method):
    """2011.10566 section 3: loss 1/2 [-cos(p1, sg z2) - cos(p2, sg z1)]; the predictor's learning rate stays constant.

    D is 4 F up to 2048, as for ResNet18; the predictor's hidden layer has D / 4. With the EMA teacher the targets are
    BYOL's (2006.07733).
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
    """2002.05709 section 2: NT-Xent between the projections of two views; other ranks' images are negatives too. Local
    views are paired with each of the globals.

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
    """1911.05722 section 3 (2003.04297: v2). symmetric, as on CIFAR: both global views have keys, and every view is a
    query to those of the others; else the first global view alone has, and every other is a query (2210.02808).

    The momentum encoder has a momentum head of its own. The queue (K, D) holds the last K keys of all ranks; by
    default K is the largest power of two up to an eighth of the images, 65,536 at most, so that a key has left before
    its image returns. Deviations: the mean of the two terms where 2302.00059 adds them; no shuffling of BN over ranks.
    """

    recipe = "moco"

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        """The searched cell keeps F features; Linear(F, D) follows."""
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
        """q of every view that is a query, then the keys, each (B, D)."""
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
        """Queue the step's keys, in the order that one process would have them in; move the momentum networks."""
        keys = gather(self.keys).transpose(0, 1).flatten(0, 2)  # (W, 2, B, D) -> (2 W B, D)
        keys = keys[-len(self.queue) :]
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.pointer.add_(len(keys)).remainder_(len(self.queue))
        self.update_teacher(self.momentum_teacher)


class SwAV(Method):
    """2006.09882 section 3: a view's prototype scores predict the codes of the global views, Sinkhorn's over the whole
    batch.

    Prototypes have rows of unit length. A queue of the last embeddings of both global views joins the batch for the
    codes, once it is full and `queue_from` of the run is done (epoch 15 of 200 in 2210.02808). Deviation: a tenth of
    the images at the most for the prototypes and an eighth for the queue, so that small data sets fill them.
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
        self.register_buffer("queue_counts", torch.zeros(()))  # 1 once it does
        self.embeddings: Tensor | None = None  # (2, B, D) of the last batch's globals

    @property
    def last_layer(self) -> nn.Module:
        return self.prototypes

    def outputs(self, views: list[Tensor], index: Tensor | None = None) -> tuple[Tensor, ...]:
        """Scores (B, K) of every view, then the embeddings (B, D) of the two globals, of unit length."""
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
        """Bring the prototypes back to unit length; queue the embeddings of all ranks, the newest first."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        size = self.queue.shape[1]
        new = gather(self.embeddings).transpose(0, 1).flatten(1, 2)[:, :size]  # (W, 2, B, D) -> (2, W B, D)
        self.queue.copy_(torch.cat([new.to(self.queue.dtype), self.queue], 1)[:, :size])
        self.filled.add_(new.shape[1])
        self.queue_counts.copy_((self.filled >= size) & (progress >= self.queue_from))


class DINO(Method):
    """2104.14294 section 3.1: the student's softmax on every view predicts the momentum teacher's, centred and
    sharpened, on the globals.

    The teacher's momentum goes from .99, as on CIFAR (.996 on ImageNet), to 1 by a cosine; BN is in its own train mode.
    The centre is an average over all ranks. The last layer has weights of unit norm, which a CNN's keeps. Deviation: no
    biases ahead of BN; in networks narrower than ViT-Ti fewer hidden units and outputs.
    """

    recipe, small_recipe = "dino", "dino-small"

    @staticmethod
    def heads(feature_dim: int, out_dim: int | None = None) -> dict[str, HeadSpace]:
        """The searched head replaces the hidden layers and the bottleneck; the weight-normed last layer follows."""
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
        """(B, K) of the student for every view, then of the teacher for the two globals."""
        separate = self.separate(views)
        z = embed(self.encoder, self.projector, views, separate)  # (V B, 256)
        with torch.no_grad():
            t = embed(self.momentum_encoder, self.momentum_projector, views[:2], separate)  # (2 B, 256)
        with no_autocast(z):  # products of K things, to a temperature of .04: bf16 is too coarse
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
        """Move centre, teacher and the teacher's temperature."""
        mean = gather(fp32(self.teacher_outputs).mean((0, 1))).mean(0)  # (2, B, K) -> (K,)
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)
        self.update_teacher(1 - (1 - self.momentum_teacher) * (math.cos(math.pi * progress) + 1) / 2)
        first, last = self.teacher_temperatures
        ramp = min(1.0, progress / self.teacher_warmup) if self.teacher_warmup else 1.0
        self.teacher_temperature.fill_(first + (last - first) * ramp)


class DIET(Method):
    """2406.10743: every training image is a class of its own, and a linear classifier on the features tells them apart;
    no pairs, no teacher, and by default no projector.

    The classifier (N, K) has no bias; for N images and K features its weights, gradient and AdamW's two moments take
    16 N K bytes, 410 MB for CIFAR-10 at K = 512, so each rank holds its `shard` of the rows. state_dict() has the whole
    on every rank (all ranks call it), and load_state_dict takes the whole. With several views the loss is their mean.
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
        """The least that the loss can be: the entropy of a smoothed target."""
        low = self.smoothing / self.n
        high = 1 - self.smoothing + low
        return -high * math.log(high) - ((self.n - 1) * low * math.log(low) if low else 0)

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


def _whole_classifier(method: DIET, state: dict, prefix: str, metadata) -> None:
    for name in method.sharded:
        state[prefix + name] = whole_rows(state[prefix + name], method.n)


def _own_classifier(method: DIET, state: dict, prefix: str, *others) -> None:
    for name in method.sharded:
        if prefix + name in state:  # else torch says that it is missing
            state[prefix + name] = own_rows(state[prefix + name], method.n)


METHODS = {  # a line each
    "simsiam": SimSiam,
    "simclr": SimCLR,
    "moco": MoCo,
    "swav": SwAV,
    "dino": DINO,
    "diet": DIET,
}
