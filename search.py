"""Searches an architecture without labels: the heads of a Siamese method, its backbone, or both together.

    torchrun search.py                                                            # heads, made-up images, a laptop
    torchrun search.py --space resnet --target-macs 0.5xresnet18 --method simclr  # a backbone of half the MACs
    torchrun search.py --space heads mobilenet --method simclr                    # both together
    torchrun search.py --data cifar10 --width 1 --epochs 100 --batch-size 512     # one GPU
    torchrun search.py --bench                            # what an iteration costs
    torchrun study.py --search runs/search --networks resnet:8    # what was found beside handcrafted and random ones

Heads (NASiam, arXiv 2302.00059): every layer mixes seven operations by its alphas. Backbones (SSA, 2203.08130; the
design is ours): one largest network in which every choice is a mask; a step samples one network for all its views, and
the alphas learn by straight-through gradients of the loss, to which those of |E[MACs] / target - 1| are added. Either
way first-order and alternating: the training images are cut into two disjoint halves; every iteration takes one step of
the alphas on a batch of the second half, then one of the weights on a batch of the first. A backbone search begins with
a quarter of its steps on weights alone, uniform samples and the largest network taking turns, and ends with the
likeliest network among all whose MACs lie in [.95, 1] of the target. A contrastive method (simclr, moco) is the better
judge of backbones: a loss that can collapse lets the alphas choose networks that help it collapse. (MoCo's queue holds
keys of the networks that were sampled before.)

--strategy supernet-random is a baseline of a backbone search, of the same cost in multiply-accumulates: it trains the
largest network with uniform samples, and finds the best of random networks that inherit from it by the loss on held-out
training images. (Random networks that are trained alone: study.py.)

The output folder gets log.txt (a JSON line an epoch: alphas and what they choose so far), checkpoint.pth, arch.json
(what was found, as plain data), search.svg (alphas of heads) and backbone.svg; of a backbone also backbone.pth, with
the weights that it inherits, BN recalibrated.
"""

import launch  # noqa: F401  # ahead of torch: it says how threads wait

# isort: split

import argparse
import copy
import math
import re
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
import pretrain
from checkpoint import Checkpoint, load_arch, save_backbone, versions, write_atomic, write_json
from data import ALPHAS, GATES, RECALIBRATION, Batches, channel_stats
from launch import Meter, Parser, command_line, is_main, mean_over_ranks, say, user_errors
from losses import METHODS, Method
from models import BACKBONES, BAND, OPS, SPACES, Choices, SearchBackbone, SearchHead
from optim import clip_gradients, distributed, optimizer_of, set_lr, warmup_steps, with_state
from pictures import draw_backbone, draw_heads
from pretrain import Monitor, autocast, clock, compile_options

# The paper steps its alphas by 1e-3 (AdamW) 4,800 times. Adam moves an alpha by about lr a step, so a shorter search
# with the same lr decides nothing; --arch-lr's default keeps lr x steps at the paper's value, for a backbone's alphas
# between 0.01 and 0.1.
TRAVEL = 4.8


def get_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    pretrain.training_flags(parser)
    group = parser.add_argument_group("search")
    group.add_argument("--space", nargs="+", choices=["heads", *SPACES], default=["heads"], help="what is searched")
    group.add_argument("--target-macs", help="40e6, resnet18 or 0.5xresnet18; left out, the handcrafted's")
    group.add_argument("--strategy", choices=["gradient", "supernet-random"], default="gradient")
    group.add_argument("--candidates", type=int, help="of supernet-random; left out, what fits")
    group.add_argument("--arch-lr", type=float, help=f"of the alphas; left out, about {TRAVEL} / their steps")
    group.add_argument("--arch-weight-decay", type=float, default=1e-3, help="of the heads' alphas")
    group.add_argument("--arch-warmup", type=float, help="share of steps without; left out: .25, heads 0")
    group.add_argument("--cost-weight", type=float, default=1.0, help="of the MACs in the alphas' gradient, by norm")
    group.add_argument("--tau", type=float, nargs=2, default=[5.0, 0.5], help="of the gates, at first and at last")
    group.add_argument("--recalibrate-batches", type=int, default=50, help="for the BN statistics of what was found")
    parser.add_argument("--output-dir", default="runs/search")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict each other."""
    backbones = [name for name in args.space if name != "heads"]
    if len(set(args.space)) < len(args.space) or len(backbones) > 1:
        raise ValueError(f"--space {' '.join(args.space)}: name one backbone space at the most, and nothing twice")
    if backbones and args.arch != get_parser().get_default("arch"):
        raise ValueError(f"--arch means nothing where a backbone is searched (--space {backbones[0]}): leave it out")
    if "heads" in args.space and args.heads != "default":
        raise ValueError("--heads means nothing where heads are searched: leave it out, or heads out of --space")
    if not backbones and args.target_macs is not None:
        raise ValueError("--target-macs means nothing to --space heads: name a backbone space too")
    if args.strategy != "gradient" and (not backbones or "heads" in args.space):
        raise ValueError(f"--strategy {args.strategy} is for a backbone alone: --space {' or '.join(SPACES)}")
    if "heads" in args.space and METHODS[args.method].classifies_instances:
        raise ValueError(f"--method {args.method} has no heads to search: choose --space {' or '.join(SPACES)}")
    if min(args.tau) <= 0:
        raise ValueError(f"--tau {args.tau[0]:g} {args.tau[1]:g}: must be above 0")
    if args.arch_warmup is not None and not 0 <= args.arch_warmup < 1:
        raise ValueError(f"--arch-warmup {args.arch_warmup:g}: must be a share, 0 up to 1")


def parse_target(text: str, width: float, stem: str, size: int) -> float:
    """MACs of --target-macs: a number, a network's name, or a multiple of one as in 0.5xresnet18, of that width."""
    match = re.fullmatch(rf"(?:([\d.]+)x)?({'|'.join(BACKBONES)})", text)
    try:
        if match:
            return float(match[1] or 1) * models.macs(BACKBONES[match[2]], width, stem, size)
        return float(text)
    except ValueError as error:
        raise ValueError(f"--target-macs '{text}' is neither a number nor like 0.5xresnet18") from error


def alpha_gradients(
    method: nn.Module, model: Callable, views: list[Tensor], index: Tensor, alphas: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """(loss, its gradient to each alpha) of one batch, first order; weights and buffers of the method stay as they are.
    model: what gives the loss, the method or its compiled form.

    In fp32: in bf16 these gradients are 6 to 20 % off, and one had the opposite sign. With the weights held constant
    nothing below the first choice needs a graph: where heads alone are searched, the encoder runs forward only. The
    gradients are those of a full backward to the last bit.
    """
    for p in weights:
        p.requires_grad_(False)
    for a in alphas:
        a.requires_grad_(True)
    before = [b.clone() for b in method.buffers()]
    try:
        loss = model(views, index)
        return loss.detach(), list(torch.autograd.grad(loss, alphas))
    finally:
        with torch.no_grad():
            for b, old in zip(method.buffers(), before):
                b.copy_(old)
        for a in alphas:
            a.requires_grad_(False)
        for p in weights:
            p.requires_grad_(True)


# ---- what a backbone costs ------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """MACs of a space's networks: base, and what each option of a stage adds to it."""

    base: int
    table: Tensor  # (S, O), float64 on the CPU
    device_table: Tensor  # the same, fp32 on the device
    target: float

    def macs(self, choice: list[int]) -> int:
        return int(self.base + sum(self.table[s, o].item() for s, o in enumerate(choice)))

    def expected(self, choices: Choices) -> Tensor:
        """E[MACs] / target under the alphas, differentiable."""
        return choices.expected_macs(self.base, self.device_table) / self.target

    def derive(self, choices: Choices) -> list[int]:
        """The likeliest network among those whose MACs are in BAND of the target."""
        return models.derive(choices.log_probabilities(), self.base, self.table, self.target)

    def random(self, n: int, seed: int) -> list[list[int]]:
        """n of those, drawn evenly."""
        generator = torch.Generator().manual_seed(seed)
        return [models.random_choice(self.base, self.table, self.target, generator) for _ in range(n)]


def gradients_of(f: Callable[[], Tensor], alphas: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(value, gradients) of a function of the alphas, which want a gradient here alone."""
    for alpha in alphas:
        alpha.requires_grad_(True)
    value = f()
    gradients = torch.autograd.grad(value, alphas)
    for alpha in alphas:
        alpha.requires_grad_(False)
    return value.detach(), list(gradients)


def cost_gradients(choices: Choices, cost: Cost, weight: float) -> list[Tensor]:
    """Of |E[MACs] / target - 1| to the alphas, at `weight` times the norm of their own gradients.

    The cost is added, since a factor would change its sense with the loss's sign. Without the norms it would drown
    the loss, whose gradient to an alpha is hundreds of times smaller: then the alphas of all stages go where MACs
    alone send them.
    """
    alphas = list(choices.alphas().values())
    _, gradients = gradients_of(lambda: (cost.expected(choices) - 1).abs(), alphas)
    own = torch.cat([a.grad.flatten() for a in alphas]).norm()
    its = torch.cat([g.flatten() for g in gradients]).norm()
    return [weight * own / its.clamp(min=1e-12) * g for g in gradients]


@torch.no_grad()
def meet_target(choices: Choices, cost: Cost) -> None:
    """Moves the alphas, as little as it takes, to where E[MACs] is in BAND of the target.

    Left to the cost's gradient and Adam, which moves all alphas by the same amount, the way from uniform alphas to
    the target would take dozens of steps and decide for the smaller options of every stage alike.
    """
    alphas = list(choices.alphas().values())
    for _ in range(100):
        with torch.enable_grad():
            expected, gradients = gradients_of(lambda: cost.expected(choices), alphas)
        if BAND[0] <= expected <= BAND[1]:
            return
        newton = (expected - statistics.mean(BAND)) / sum(g.square().sum() for g in gradients)
        largest = newton.abs() * max(g.abs().max() for g in gradients)
        for alpha, gradient in zip(alphas, gradients):
            alpha -= newton / largest.clamp(min=1) * gradient  # by 1 at the most: softmax saturates


# ---- the searchable network and its steps ---------------------------------------------------------------------------


class AlphaGradients:
    """The loss's gradients to all alphas, one (A,) for each alpha step of the epoch."""

    def __init__(self, device: torch.device):
        self.device, self.steps = device, []

    def add(self, gradients: list[Tensor]) -> None:
        self.steps.append(torch.cat([g.flatten() for g in gradients]))

    def signal(self) -> float:
        """In units of its noise, a step: root mean square of mean / standard deviation, less what chance adds. At s,
        some 1 / s^2 steps tell an alpha's direction; a search with fewer moves its alphas at random."""
        gradients = torch.stack(self.steps).double()
        t2 = gradients.mean(0) ** 2 / (gradients.var(0) / len(gradients)).clamp(min=1e-30)
        return math.sqrt(max(0.0, t2.mean().item() - 1) / len(gradients))

    def dead(self, names: list[str]) -> list[str]:
        """Those of the alphas that no step had a gradient for, which so stay as they are."""
        moved = torch.stack(self.steps).abs().amax(0) > 0
        return [name for name, got in zip(names, moved.tolist(), strict=True) if not got]

    def state_dict(self) -> dict[str, Tensor]:
        return {"steps": torch.stack(self.steps)} if self.steps else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = list(state["steps"].to(self.device)) if state else []


class Search:
    """The searchable network, its weights and alphas, and an optimiser for each.

    Alphas and weights learn from disjoint halves of the images, so that alphas cannot fit what the weights have
    memorised. A method that classifies instances (DIET) has no class for an image that the weights have not seen: on
    the other half its loss would end above chance. There both learn from all images, each step with its own order
    and its own augmentation, so what the alphas see is new views of known classes: what generalises is still preferred
    to what memorises pixels, and unlike in a single-level search the alphas do not share the weights' batch.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        """args: as pretrain.start gives them. Raises ValueError for what cannot be searched."""
        self.args, self.device, learns = args, device, args.strategy == "gradient"
        self.images = pretrain.load_training_images(args, device, None)
        parts = 1 if METHODS[args.method].classifies_instances else 2
        self.held_out, *self.rows = pretrain.split(self.images, args, parts if learns else 1)
        self.stem, self.size = pretrain.stem_of(args, self.images), self.images.pixels.shape[-1]
        self.stats = channel_stats(self.images.pixels)
        self.multi_crop = pretrain.build_multi_crop(args, self.images, self.stats, device)

        torch.manual_seed(args.seed)
        self.space = next((SPACES[name] for name in args.space if name in SPACES), None)
        self.arch = self.space.handcrafted if self.space else load_arch(args.arch)
        if self.space:
            encoder = SearchBackbone(self.space, args.width, self.stem)
        else:
            encoder = pretrain.build_encoder(args, self.arch, self.stem)
        if "heads" in args.space:
            spaces = METHODS[args.method].heads(encoder.feature_dim, args.out_dim)
            self.dims = {name: models.head_dims(*head) for name, head in spaces.items()}
            self.operations, heads = None, {name: SearchHead(dims) for name, dims in self.dims.items()}
            self.heads = heads
        else:
            self.dims, self.heads = {}, {}
            self.operations, heads = pretrain.build_heads(args, encoder.feature_dim)
        n_images = min(map(len, self.rows))  # a queue is for a part
        self.method = pretrain.build_method(args, encoder, heads, n_images, self.multi_crop, device)
        self.choices = encoder.choices if self.space else None
        self.cost = self.cost_of_space() if self.space else None
        self.candidates = 0
        if not learns:
            self.candidates, args.epochs = plan_baseline(
                args, self.choices, self.cost, parts, n_images, len(self.held_out)
            )
        self.batches = self.batches_of(self.rows[0])
        self.alpha_batches = self.batches_of(self.rows[-1], purpose=ALPHAS)
        self.total = args.epochs * self.batches.steps_per_epoch
        share = args.arch_warmup if args.arch_warmup is not None else 0.25 if self.space else 0.0
        self.warmup = round(share * self.total) if learns else self.total  # steps on weights alone

        named = [(n, p) for n, p in self.method.named_parameters() if p.requires_grad and not n.endswith("alpha")]
        self.weights = [p for _, p in named]
        self.optimizer = optimizer_of(named, self.method, args)
        self.alpha_optimizer = alpha_optimizer_of(self)
        self.alphas = [alpha for group in self.alpha_optimizer.param_groups for alpha in group["params"]]
        for alpha in self.alphas:
            alpha.requires_grad_(False)
        self.gradients = AlphaGradients(device)
        # a sampled network leaves weights without gradients
        self.model = distributed(self.method, find_unused_parameters=self.space is not None)
        torch.backends.cudnn.benchmark = device.type == "cuda" and not self.space and not args.deterministic
        self.alpha_model = self.method
        if args.compile and self.space:  # alphas see the masked network, whose shapes stay, and weights the sampled one
            self.alpha_model = torch.compile(self.method, **compile_options(args))
        elif args.compile:
            self.method.compile(**compile_options(args))

    def cost_of_space(self) -> Cost:
        """Raises ValueError where no network of the space meets --target-macs."""
        where = self.args.width, self.stem, self.size
        base, table = self.space.costs(*where)
        target = parse_target(self.args.target_macs or self.space.handcrafted, *where)
        cost = Cost(base, table, table.float().to(self.device), target)
        cost.derive(self.choices)
        return cost

    def batches_of(self, rows: Tensor, **options) -> Batches:
        args = self.args
        return Batches(
            self.images.pixels, rows, self.multi_crop, args.batch_size, self.device, **{"seed": args.seed, **options}
        )

    def sample(self, step: int, alphas: bool) -> None:
        """Gates for one step, with gradients to the alphas or without; in the warm-up every other is the largest."""
        if not self.space:
            return
        for alpha in self.alphas:
            alpha.requires_grad_(alphas)
        if step < self.warmup and step % 2:
            self.choices.set_largest()
            return
        first, last = self.args.tau
        progress = max(0.0, (step - self.warmup) / max(1, self.total - self.warmup))
        rng = np.random.default_rng((self.args.seed, GATES, int(alphas), step))
        self.choices.sample(first * (last / first) ** progress, rng)

    def alpha_step(self, step: int) -> Tensor:
        """Returns the loss on the alphas' batch."""
        if self.space and step <= self.warmup:
            meet_target(self.choices, self.cost)
        views, index = self.alpha_batches(step)
        self.sample(max(step, self.warmup), alphas=True)
        loss, gradients = alpha_gradients(self.method, self.alpha_model, views, index, self.alphas, self.weights)
        for alpha, gradient in zip(self.alphas, gradients):
            alpha.grad = mean_over_ranks(gradient)
        self.gradients.add([alpha.grad for alpha in self.alphas])
        if self.space:
            extra = cost_gradients(self.choices, self.cost, self.args.cost_weight)
            for alpha, gradient in zip(self.choices.alphas().values(), extra):
                alpha.grad += gradient
        self.alpha_optimizer.step()
        self.alpha_optimizer.zero_grad()
        return loss

    def weight_step(self, step: int) -> Tensor:
        """Returns the loss on the weights' batch."""
        views, index = self.batches(step)
        self.sample(step, alphas=False)
        with autocast(self.args, self.device):
            loss = self.model(views, index)
        loss.backward()
        if step < self.args.freeze_last_layer * self.batches.steps_per_epoch:
            self.method.drop_last_layer_grad()
        if self.args.clip_grad:
            clip_gradients(self.method, self.args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step((step + 1) / self.total)
        return loss

    # ---- what is found

    def alpha_names(self) -> list[str]:
        """Of all alphas' entries, in the order of their gradients."""
        names = []
        for head_name, head in self.heads.items():
            names += [f"{head_name} {layer + 1} {op}" for layer in range(len(head.alpha)) for op in OPS]
        for kind, alpha in (self.choices.alphas() if self.space else {}).items():
            stages, options = alpha.shape
            names += [f"stage {s + 1}'s {kind} {o + 1}" for s in range(stages) for o in range(options)]
        return names

    def state(self) -> dict:
        """Alphas, their entropy and what they choose so far, by head and of the backbone."""
        state = {
            "alphas": {name: head.alpha.detach().softmax(1).tolist() for name, head in self.heads.items()},
            "entropy": {name: head.entropy() for name, head in self.heads.items()},
            "ops": {name: head.discretise() for name, head in self.heads.items()},
        }
        if self.space:
            for kind, alpha in self.choices.alphas().items():
                p = alpha.detach().double().softmax(1)
                state["alphas"][kind] = p.tolist()
                state["entropy"][kind] = (torch.special.entr(p).sum(1) / math.log(p.shape[1])).tolist()
            state["expected_macs"] = self.choices.expected_macs(self.cost.base, self.cost.device_table).item()
            state["arch"] = self.space.arch(self.cost.derive(self.choices))
        return state

    def standalone(self, choice: list[int], n_batches: int) -> Method:
        """The method with a copy of that network's weights in place of the searchable one, BN recalibrated."""
        method = copy.deepcopy(self.method)
        for name, child in method.named_children():
            if isinstance(child, SearchBackbone):
                setattr(method, name, child.subnet(choice))
        batches = self.batches_of(self.rows[0], purpose=RECALIBRATION, shuffle=False)

        def forward(batch: tuple[list[Tensor], Tensor]) -> None:
            with autocast(self.args, self.device):
                method.outputs(*batch)

        return models.recalibrate(method, (batches(i) for i in range(n_batches)), forward)


def alpha_optimizer_of(search: Search) -> torch.optim.Optimizer:
    """AdamW: a group for the heads' alphas and one for the backbone's."""
    args, groups = search.args, []
    steps = max(1, search.total - search.warmup)
    if search.heads:
        lr = max(1e-3, TRAVEL / steps) if args.arch_lr is None else args.arch_lr
        alphas = [head.alpha for head in search.heads.values()]
        groups.append({"params": alphas, "lr": lr, "weight_decay": args.arch_weight_decay})
    if search.space:
        lr = min(0.1, max(1e-2, TRAVEL / steps)) if args.arch_lr is None else args.arch_lr
        alphas = list(search.choices.alphas().values())
        groups.append({"params": alphas, "lr": lr, "weight_decay": 0.0, "betas": (0.5, 0.999)})
    for group in groups:
        group["fused"] = False
    return with_state(torch.optim.AdamW(groups), ("exp_avg", "exp_avg_sq"), search.method)


# ---- a baseline of the same cost ------------------------------------------------------------------------------------


def plan_baseline(
    args: argparse.Namespace, choices: Choices, cost: Cost, parts: int, n_images: int, n_held_out: int
) -> tuple[int, int]:
    """(candidates, epochs) so that supernet-random costs what --epochs of gradient search would.

    Costs are MACs x steps; a forward pass alone counts a third. A gradient search has its images in `parts` and so
    many fewer steps an epoch, each with a step of the largest network for the alphas, after a warm-up of one and a
    half. E[MACs] is taken to go from the uniform mean to the target. Raises ValueError where it cannot be.
    """
    if n_held_out < args.batch_size:
        raise ValueError(
            f"--strategy {args.strategy} chooses by the loss on held-out images, and {n_held_out} do "
            "not fill a batch: raise --held-out or lower --batch-size"
        )
    per_epoch = n_images // args.batch_size
    steps = args.epochs * (n_images // parts // args.batch_size)
    warmup = (0.25 if args.arch_warmup is None else args.arch_warmup) * steps
    largest = cost.macs(choices.largest)
    mean = choices.expected_macs(cost.base, cost.device_table).item()
    both = (mean + largest) / 2
    budget = warmup * both + (steps - warmup) * (largest + (mean + cost.target) / 2)
    one = (args.recalibrate_batches + n_held_out // args.batch_size) * cost.target / 3
    candidates = args.candidates or int(min(1000, max(8, budget / 4 / one)))
    epochs = round((budget - candidates * one) / (both * per_epoch))
    if epochs < 1:
        raise ValueError(f"{candidates} candidates leave no epoch of training each: lower --candidates")
    say(f"{args.strategy}: {candidates} candidates, {epochs} epochs, to cost what the gradient search does")
    return candidates, epochs


def best_candidate(search: Search, monitor: Monitor) -> list[int]:
    """The choice of the lowest held-out loss among random networks that inherit from the largest."""
    losses = []
    choices = search.cost.random(search.candidates, search.args.seed)
    for choice in choices:
        method = search.standalone(choice, search.args.recalibrate_batches)
        losses.append(monitor.held_out_loss(method)["held_out_loss"])
    return choices[losses.index(min(losses))]


# ---- what it costs --------------------------------------------------------------------------------------------------


def bench(search: Search, steps: int = 15, warm_up: int = 3) -> dict:
    """What an iteration (alpha and weight step) costs, and its ratio: of heads to the weight step alone, of a backbone
    to a plain step of the largest network. Prints and returns them."""
    args, device = search.args, search.device
    variants = {
        "alpha step": lambda step: search.alpha_step(search.warmup + step),
        "weight step": lambda step: search.weight_step(search.warmup + step),
    }
    base = "weight step"
    if search.space:
        base = "plain step of the largest"
        plain = search.standalone(search.choices.largest, 1)
        optimizer = optimizer_of(list(plain.named_parameters()), plain, args)

        def largest(step):
            views, index = search.batches(step)
            with autocast(args, device):
                loss = plain(views, index)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        variants[base] = largest
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(warm_up + steps):
        for name, variant in variants.items():
            begun = clock(device)
            variant(step)
            if step >= warm_up:
                seconds[name].append(clock(device) - begun)
    average = statistics.mean if search.space else statistics.median  # sampled networks differ in size
    took = {name: average(times) for name, times in seconds.items()}
    for name, seconds_a_step in took.items():
        say(f"{name}: {1e3 * seconds_a_step:.1f} ms")
    iteration = took["alpha step"] + took["weight step"]
    ratio = iteration / took[base]
    say(f"an iteration is {ratio:.3f} times a {base}" + (" network" if search.space else ""))
    return {"seconds": took, "ratio": ratio, "images_per_s": args.batch_size / iteration}


# ---- the script -----------------------------------------------------------------------------------------------------


def train(search: Search, monitor: Monitor, meter: Meter, checkpoint: Checkpoint) -> None:
    """The loop: an alpha step and a weight step in turn. A line of checkpoint.history an epoch."""
    args, total, per_epoch = search.args, search.total, search.batches.steps_per_epoch
    warmup = warmup_steps(args, search.optimizer, per_epoch)
    profiler = pretrain.profiler_of(args, checkpoint.folder)

    def look(knn: bool) -> dict:
        if not search.space:
            return monitor(search.method, knn)
        choice = search.cost.derive(search.choices)
        return monitor(search.standalone(choice, min(10, args.recalibrate_batches)), knn)

    if not checkpoint.history:
        checkpoint.history.append({"epoch": 0, **search.state(), **look(args.knn_every > 0)})
    with checkpoint:
        begun = time.time()
        for step in range(checkpoint.step, total):
            pretrain.seed_step(args.seed, step)
            lr = set_lr(search.optimizer, step, warmup, total)
            losses = {"alpha_loss": search.alpha_step(step)} if step >= search.warmup else {}
            losses["loss"] = search.weight_step(step)
            meter.add(step, lr, **losses)
            meter.print(step)
            if (step + 1) % per_epoch == 0:
                epoch, means, state = (step + 1) // per_epoch, meter.end_epoch(), search.state()
                facts = look(args.knn_every > 0) if monitor.due(epoch) else {}
                more = alpha_facts(search, state, facts)
                more += pretrain.in_words(facts)
                say(f"epoch {epoch}/{args.epochs}  loss {means['loss']:.4f}{meter.speed(step)}{more}")
                pretrain.warn(search.method, facts, means["loss"], args.batch_size, step + 1)
                line = {"epoch": epoch, **means, "lr": lr, **facts, **state, **pretrain.resources(begun, search.device)}
                checkpoint.log(line)
                begun = time.time()
                meter.restart()
            checkpoint.after_step(step + 1)
            if profiler:
                profiler.step()


def alpha_facts(search: Search, state: dict, facts: dict) -> str:
    """What a line on the console says of the alphas; adds their signal to the epoch's facts."""
    more = f"  alpha entropy {statistics.mean(e for layers in state['entropy'].values() for e in layers):.3f}"
    if len(search.gradients.steps) > 1:
        if dead := search.gradients.dead(search.alpha_names()):
            say(f"warning: no gradient in this epoch for the alphas of {', '.join(dead)}")
        facts["alpha_signal"] = search.gradients.signal()
        more += f"  signal {facts['alpha_signal']:.2f}"
    search.gradients.steps = []
    if search.space:
        more += f"  E[MACs] {state['expected_macs'] / search.cost.target:.3f} of the target"
    return more


def main(args: argparse.Namespace) -> dict:
    """Returns what it writes as arch.json; {} after --bench."""
    command = command_line(Path(__file__).name, get_parser(), args)
    asked = args
    with user_errors():
        check_flags(args)
        args, device = pretrain.start(args)
        search = Search(args, device)
        space, folder = search.space, Path(args.output_dir)
        announce(search)
        if args.bench:
            pretrain.write_bench(args, bench(search), device, command)
            return {}
        monitor = monitor_of(search)
        checkpoint, meter = checkpoint_of(search, asked, command)
    train(search, monitor, meter, checkpoint)
    history, choice, encoder = checkpoint.history, None, None
    if not space:
        facts = history[-1]
    else:
        choice = search.cost.derive(search.choices)
        if args.strategy == "supernet-random":
            choice = best_candidate(search, monitor)
        method = search.standalone(choice, args.recalibrate_batches)
        facts, encoder = monitor(method, args.knn_every > 0), method.encoder

    found = {
        "space": args.space,
        "strategy": args.strategy,
        "method": args.method,
        "data": args.data,
        "seed": args.seed,
        "command": command,
        "versions": versions(),
        "backbone": {"arch": search.arch, "width": args.width, "stem": search.stem},
    }
    if history:
        found["alphas"] = history[-1]["alphas"]
    if search.heads:
        found["heads"] = history[-1]["ops"]
    if space:
        found["backbone"] = describe_backbone(search, choice)
        found.update({k: facts[k] for k in ("held_out_loss", "knn") if k in facts})
    with user_errors():
        write_results(search, found, history, encoder)
    for name, ops in found.get("heads", {}).items():
        say(f"{name}: {' '.join(models.true_name(o, *io) for o, io in zip(ops, pairwise(search.dims[name])))}")
    if "knn" in facts and history and "knn" in history[0]:
        with_what = "the inherited weights" if space else "the search network's encoder"
        say(
            f"kNN on {len(search.held_out):,} held-out images: {100 * facts['knn']:.2f} % with {with_what}, "
            f"{100 * history[0]['knn']:.2f} % untrained"
        )
    path = folder / "arch.json"
    say(f"wrote {path}; next:\n{next_command(search, asked, path)}")
    return found


def next_command(search: Search, asked: argparse.Namespace, path: Path) -> str:
    """That pre-trains with what was found."""
    parser = pretrain.get_parser()
    flags = {name: getattr(asked, name, default) for name, default in vars(parser.parse_args([])).items()}
    flags["output_dir"] = str(path.parent.parent / "pretrain")
    for flag, is_found in (("arch", search.space), ("heads", search.heads)):
        if is_found:
            flags[flag] = str(path)
    return command_line("pretrain.py", parser, argparse.Namespace(**flags))


def announce(search: Search) -> None:
    """On the console: what is searched, how many of them there are, and at what rates."""
    args = search.args
    say(
        f"{args.method}, {' and '.join(args.space)}, x{args.width:g}, "
        f"{' + '.join(f'{len(rows):,}' for rows in search.rows)} images of {search.size} px "
        f"({len(search.held_out):,} held out), {pretrain.machine(args, search.device)}"
    )
    if search.heads:
        names, kinds, functions = (math.prod(c) for c in zip(*map(models.count_heads, search.dims.values())))
        say(f"{names:,} heads by name, {kinds:,} that differ layer by layer, {functions:,} as functions")
    if search.space:
        cost, most = search.cost, search.cost.macs(search.choices.largest)
        say(
            f"{len(search.space.options) ** len(search.space.stages):,} backbones of {cost.base / 1e6:.4g} to "
            f"{most / 1e6:.4g} MMACs; the target is {cost.target / 1e6:.4g} MMACs"
        )
    pretrain.announce(args, search.optimizer, search.total)
    if args.strategy == "gradient":
        say("alpha lr " + " and ".join(f"{group['lr']:.2g}" for group in search.alpha_optimizer.param_groups))


def monitor_of(search: Search) -> Monitor:
    rows = torch.cat(search.rows)
    return Monitor(search.args, search.images, search.stats, search.held_out, rows, search.multi_crop, search.device)


def checkpoint_of(search: Search, asked: argparse.Namespace, command: str) -> tuple[Checkpoint, Meter]:
    """asked: the flags as they were given."""
    args, folder = search.args, Path(search.args.output_dir)
    batches = {"loss": search.batches, "alpha_loss": search.alpha_batches}
    meter = Meter(search.total, batches, search.images.names, folder, args.print_every)
    things = {
        "method": search.method,
        "optimizer": search.optimizer,
        "alpha_optimizer": search.alpha_optimizer,
        "meter": meter,
        "gradients": search.gradients,
    }
    facts = pretrain.facts_of(
        Path(__file__).name, asked, search.arch, search.operations, search.images, pretrain.FREE_FLAGS
    )
    how = command, search.device, search.total, args.checkpoint_minutes, args.resume
    return Checkpoint(folder, things, facts, *how), meter


def describe_backbone(search: Search, choice: list[int]) -> dict:
    """What arch.json says of what was found; on the console too."""
    arch = search.space.arch(choice)
    cost, parameters = models.size_of(arch, search.args.width, search.stem, search.size)
    target = search.cost.target
    say(
        f"backbone: {models.describe(arch)}, {cost / 1e6:.4g} of {target / 1e6:.4g} MMACs ({100 * cost / target:.1f} %)"
    )
    return {
        "arch": arch,
        "width": search.args.width,
        "stem": search.stem,
        "image_size": search.size,
        "macs": cost,
        "parameters": parameters,
        "target_macs": target,
    }


def write_results(search: Search, found: dict, history: list[dict], encoder: nn.Module | None) -> None:
    """arch.json and the pictures; of a backbone also its weights."""
    args, folder, space = search.args, Path(search.args.output_dir), search.space
    write_json(found, folder / "arch.json")
    if not is_main():
        return
    where = f"{args.method} on {Path(args.data).name}, x{args.width:g}, seed {args.seed}"
    if search.heads:
        write_atomic(draw_heads(history, search.dims, f"Heads found with {where}"), folder / "search.svg")
    if encoder:
        arch = found["backbone"]["arch"]
        archs = {"found": arch, space.handcrafted: BACKBONES[space.handcrafted]}
        where = args.width, search.stem, search.size
        networks = {name: (arch, models.size_of(arch, *where)[1]) for name, arch in archs.items()}
        title = f"Backbone found with {where}: {BAND[0]:g} to {BAND[1]:g} of {search.cost.target / 1e6:,.4g} MMACs"
        write_atomic(draw_backbone(networks, args.width, search.stem, search.size, title), folder / "backbone.svg")
        save_backbone(encoder, pretrain.backbone_facts(args, arch, search.stem, search.stats, found["command"]), folder)


if __name__ == "__main__":
    main(get_parser().parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()
