"""Searches an architecture without labels: the heads of a Siamese method, its backbone, or both together.

    torchrun search.py                                                            # heads, made-up images, a laptop
    torchrun search.py --space resnet --target-macs 0.5xresnet18 --method simclr  # a backbone of half the MACs
    torchrun search.py --space heads mobilenet --method simclr                    # both together
    torchrun search.py --data cifar10 --width 1 --epochs 100 --batch-size 512     # one GPU
    torchrun search.py --compare 8                        # found against handcrafted and 8 random ones
    torchrun search.py --bench                            # what an iteration costs

Heads (NASiam, arXiv 2302.00059): every layer mixes seven operations by its alphas. Backbones (SSA, 2203.08130; the
design is ours): one largest network in which every choice is a mask; a step samples one network for all its views, and
the alphas learn by straight-through gradients of the loss, to which those of |E[MACs] / target - 1| are added. Either
way first-order and alternating: the training images are cut into two disjoint halves; every iteration takes one step of
the alphas on a batch of the second half, then one of the weights on a batch of the first. A backbone search begins with
a quarter of its steps on weights alone, uniform samples and the largest network taking turns, and ends with the
likeliest network among all whose MACs lie in [.95, 1] of the target. A contrastive method (simclr, moco) is the better
judge of backbones: a loss that can collapse lets the alphas choose networks that help it collapse. (MoCo's queue holds
keys of the networks that were sampled before.)

--strategy random and supernet-random are the baselines of a backbone search, of the same cost in multiply-accumulates:
networks trained alone, or networks that inherit from a largest network trained with uniform samples; the best by the
loss on held-out training images is what they find.

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

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

import optim
import pretrain
from checkpoint import Keeper, load_backbone, save_backbone, write_arch, write_atomic
from compare import compare, facts_of, prepare, searched, shared_flags
from launch import Parser, command_line, is_main, mean_over_ranks, say, user_errors
from models import (
    BACKBONES,
    BAND,
    OPS,
    SPACES,
    SearchBackbone,
    count_heads,
    derive,
    describe,
    head_dims,
    macs,
    random_choice,
    recalibrate,
    true_name,
)
from optim import distributed, optimizer_of, set_lr
from pictures import draw_backbone, draw_heads
from pretrain import (
    ALPHAS,
    GATES,
    RECALIBRATION,
    WEIGHTS,
    Console,
    Run,
    announce,
    clock,
    in_words,
    profiled,
    warn,
    write_bench,
)

# The paper steps its alphas by 1e-3 (AdamW) 4,800 times. Adam moves an alpha by about lr a step, so a shorter search
# with the same lr decides nothing; --arch-lr's default keeps lr x steps at the paper's value, for a backbone's alphas
# between 0.01 and 0.1.
TRAVEL = 4.8


def get_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    pretrain.training_flags(parser)
    group = parser.add_argument_group("search")
    group.add_argument("--space", nargs="+", choices=["heads", *SPACES], default=["heads"], help="what is searched")
    group.add_argument("--target-macs", default=None, help="40e6, resnet18 or 0.5xresnet18; None is the handcrafted's")
    group.add_argument("--strategy", choices=["gradient", "random", "supernet-random"], default="gradient")
    group.add_argument("--candidates", type=int, default=None, help="of the random strategies; None is 8, or what fits")
    group.add_argument(
        "--arch-lr", type=float, default=None, help=f"of the alphas; None is about {TRAVEL} / their steps"
    )
    group.add_argument("--arch-weight-decay", type=float, default=1e-3, help="of the heads' alphas")
    group.add_argument("--arch-warmup", type=float, default=None, help="share of steps without; None: .25, heads 0")
    group.add_argument("--cost-weight", type=float, default=1.0, help="of the MACs in the alphas' gradient, by norm")
    group.add_argument("--tau", type=float, nargs=2, default=[5.0, 0.5], help="of the gates, at first and at last")
    group.add_argument("--recalibrate-batches", type=int, default=50, help="for the BN statistics of what was found")
    group.add_argument("--compare", type=int, default=0, metavar="K", help="afterwards train found and K random alike")
    group.add_argument("--compare-seeds", type=int, default=3, help="runs of each")
    group.add_argument("--compare-epochs", type=int, default=None, help="of each run; None is --epochs")
    group.add_argument("--compare-data", nargs="+", default=None, help="what to measure on; None is --data")
    group.add_argument("--compare-with", nargs="+", default=[], help="more arch.json files, a row each")
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
    if "heads" in args.space and pretrain.METHODS[args.method].classifies_instances:
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
            return float(match[1] or 1) * macs(BACKBONES[match[2]], width, stem, size)
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


class Search:
    """The searchable network, its weights and alphas, and an optimiser for each.

    Alphas and weights learn from disjoint halves of the images, so that alphas cannot fit what the weights have
    memorised. A method that classifies instances (DIET) has no class for an image that the weights have not seen: on
    the other half its loss would end above chance. There both learn from all images, each step with its own order
    and its own augmentation, so what the alphas see is new views of known classes: what generalises is still preferred
    to what memorises pixels, and unlike in a single-level search the alphas do not share the weights' batch.
    """

    def __init__(self, args: argparse.Namespace):
        check_flags(args)
        self.args, learns = args, args.strategy == "gradient"
        self.space = next((SPACES[name] for name in args.space if name in SPACES), None)
        self.halves = 1 if pretrain.METHODS[args.method].classifies_instances else 2
        self.run = Run(args, "heads" in args.space, self.space, parts=self.halves if learns else 1)
        self.parts = [self.run.parts[0], self.run.parts[-1]] if learns else self.run.parts  # of weights, of alphas
        self.method, self.heads = self.run.method, (self.run.heads or {}) if "heads" in args.space else {}
        self.choices = self.method.encoder.choices if self.space else None
        self.total = self.run.epochs * self.run.steps_per_epoch
        share = (0.25 if self.space else 0.0) if args.arch_warmup is None else args.arch_warmup
        self.warmup = round(share * self.total) if learns else self.total  # steps on weights alone
        if self.space:
            where = args.width, self.run.stem, self.run.size
            self.base, self.table = self.space.costs(*where)
            self.device_table = self.table.float().to(self.run.device)
            self.target = parse_target(args.target_macs or self.space.handcrafted, *where)
            derive(self.choices.log_probabilities(), self.base, self.table, self.target)  # raises: nothing meets it
            if not learns:
                self.plan_baseline()

        named = [(n, p) for n, p in self.method.named_parameters() if p.requires_grad and not n.endswith("alpha")]
        self.weights = [p for _, p in named]
        self.optimizer = optimizer_of(named, self.method, args)
        steps, lr = max(1, self.total - self.warmup), args.arch_lr
        groups = []
        if self.heads:
            alphas = {"params": [head.alpha for head in self.heads.values()], "weight_decay": args.arch_weight_decay}
            groups.append(alphas | {"lr": max(1e-3, TRAVEL / steps) if lr is None else lr})
        if self.space:
            alphas = {"params": self.choices.alphas(), "weight_decay": 0.0, "betas": (0.5, 0.999)}
            groups.append(alphas | {"lr": min(0.1, max(1e-2, TRAVEL / steps)) if lr is None else lr})
        self.alpha_optimizer = torch.optim.AdamW(groups)
        self.alphas = [alpha for group in groups for alpha in group["params"]]
        for alpha in self.alphas:
            alpha.requires_grad_(False)
        self.gradients: list[Tensor] = []  # of the loss to all alphas, one for each alpha step since `signal`
        # a sampled network leaves weights without gradients
        self.model = distributed(self.method, find_unused_parameters=bool(self.space))
        # where a backbone is searched alphas see the masked network, whose shapes stay, and weights the sampled one
        compiled = self.space and self.run.compile
        self.alpha_model = torch.compile(self.method, **self.run.compile_options()) if compiled else self.method

    # ---- steps

    def sample(self, step: int, alphas: bool) -> None:
        """Gates for one step, with gradients to the alphas or without; in the warm-up every other is the largest."""
        if not self.space:
            return
        for alpha in self.alphas:
            alpha.requires_grad_(alphas)
        if step < self.warmup and step % 2:
            self.choices.set_largest()
        else:
            first, last = self.args.tau
            progress = (step - self.warmup) / max(1, self.total - self.warmup)
            rng = np.random.default_rng((self.args.seed, GATES, int(alphas), step))
            self.choices.sample(first * (last / first) ** max(0.0, progress), rng)

    def cost_gradients(self) -> list[Tensor]:
        """Of |E[MACs] / target - 1| to the backbone's alphas, at cost_weight times the norm of their own gradients.

        The cost is added, since a factor would change its sense with the loss's sign. Without the norms it would drown
        the loss, whose gradient to an alpha is hundreds of times smaller: then the alphas of all stages go where MACs
        alone send them.
        """
        alphas = self.choices.alphas()
        for alpha in alphas:
            alpha.requires_grad_(True)
        cost = (self.choices.expected_macs(self.base, self.device_table) / self.target - 1).abs()
        gradients = torch.autograd.grad(cost, alphas)
        for alpha in alphas:
            alpha.requires_grad_(False)
        own, its = (torch.cat([g.flatten() for g in gs]).norm() for gs in ([a.grad for a in alphas], gradients))
        return [self.args.cost_weight * own / its.clamp(min=1e-12) * g for g in gradients]

    def meet_target(self) -> None:
        """Moves a backbone's alphas, as little as it takes, to where E[MACs] is in BAND of the target.

        Left to the cost's gradient and Adam, which moves all alphas by the same amount, the way from uniform alphas to
        the target would take dozens of steps and decide for the smaller options of every stage alike.
        """
        alphas = self.choices.alphas()
        for _ in range(100):
            for alpha in alphas:
                alpha.requires_grad_(True)
            expected = self.choices.expected_macs(self.base, self.device_table) / self.target
            gradients = torch.autograd.grad(expected, alphas)
            for alpha in alphas:
                alpha.requires_grad_(False)
            if BAND[0] <= expected <= BAND[1]:
                return
            newton = (expected.detach() - statistics.mean(BAND)) / sum(g.square().sum() for g in gradients)
            largest = newton.abs() * max(g.abs().max() for g in gradients)
            for alpha, gradient in zip(alphas, gradients):
                alpha -= newton / largest.clamp(min=1) * gradient  # by 1 at the most: softmax saturates

    def alpha_step(self, order: Tensor, step: int, done: int = 0) -> Tensor:
        """step: of the epoch, which says what batch; done: of the search, which says what temperature."""
        if self.space and done <= self.warmup:
            self.meet_target()
        views, index = self.run.batch(order, step, (self.args.seed, ALPHAS, done))
        self.sample(max(done, self.warmup), alphas=True)
        parts = self.method, self.alpha_model, views, index, self.alphas, self.weights
        loss, gradients = alpha_gradients(*parts)
        for alpha, gradient in zip(self.alphas, gradients):
            alpha.grad = mean_over_ranks(gradient)
        self.gradients.append(torch.cat([alpha.grad.flatten() for alpha in self.alphas]))
        if self.space:
            for alpha, gradient in zip(self.choices.alphas(), self.cost_gradients()):
                alpha.grad += gradient
        self.alpha_optimizer.step()
        self.alpha_optimizer.zero_grad()
        return loss

    def weight_step(self, order: Tensor, step: int, progress: float, done: int = 0) -> tuple[Tensor, float]:
        start = time.time()
        views, index = self.run.batch(order, step, (self.args.seed, WEIGHTS, done))
        views_s = time.time() - start
        self.sample(done, alphas=False)
        with self.run.autocast():
            loss = self.model(views, index)
        loss.backward()
        self.run.after_backward(done)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step(progress)
        return loss, views_s

    def dead(self) -> list[str]:
        """The alphas that have had no gradient in any step since the last call of `signal`, which so stay as they
        are."""
        names = [f"{n} {k + 1} {op}" for n, head in self.heads.items() for k in range(len(head.alpha)) for op in OPS]
        if self.space:
            for name, alpha in zip(("depth", "inner", "kernel"), self.choices.alphas()):
                names += [f"stage {s + 1}'s {name} {o + 1}" for s in range(len(alpha)) for o in range(alpha.shape[1])]
        got = torch.stack(self.gradients).abs().amax(0) > 0
        return [name for name, moved in zip(names, got.tolist(), strict=True) if not moved]

    def signal(self) -> float:
        """The alphas' gradient in units of its noise, a step: root mean square of mean / standard deviation over the
        steps since the last call, less what chance adds. At s, some 1 / s^2 steps tell an alpha's direction; a search
        with fewer moves its alphas at random.
        """
        gradients, self.gradients = torch.stack(self.gradients).double(), []
        t2 = gradients.mean(0) ** 2 / (gradients.var(0) / len(gradients)).clamp(min=1e-30)
        return math.sqrt(max(0.0, t2.mean().item() - 1) / len(gradients))

    # ---- what is found

    def state(self) -> dict:
        """Alphas, their entropy and what they choose so far, by head and of the backbone."""
        state = {
            "alphas": {n: h.alpha.detach().softmax(1).tolist() for n, h in self.heads.items()},
            "entropy": {n: h.entropy() for n, h in self.heads.items()},
            "ops": {n: h.discretise() for n, h in self.heads.items()},
        }
        if self.space:
            for name, alpha in zip(("depth", "inner", "kernel"), self.choices.alphas()):
                p = alpha.detach().double().softmax(1)
                state["alphas"][name] = p.tolist()
                state["entropy"][name] = (torch.special.entr(p).sum(1) / math.log(p.shape[1])).tolist()
            state["expected_macs"] = self.choices.expected_macs(self.base, self.device_table).item()
            state["arch"] = self.space.arch(self.derive())
        return state

    def derive(self) -> list[int]:
        return derive(self.choices.log_probabilities(), self.base, self.table, self.target)

    def macs(self, choice: list[int]) -> int:
        return int(self.base + sum(self.table[s, o].item() for s, o in enumerate(choice)))

    def standalone(self, choice: list[int], batches: int) -> nn.Module:
        """The method with a copy of that network's weights in place of the searchable one, BN recalibrated."""
        twin = copy.deepcopy(self.method)
        for name, child in twin.named_children():
            if isinstance(child, SearchBackbone):
                setattr(twin, name, child.cut(choice))
        order, seed = self.run.parts[0], (self.args.seed, RECALIBRATION)
        batches = (self.run.batch(order, i % self.run.steps_per_epoch, (*seed, i)) for i in range(batches))

        def forward(batch: tuple[list[Tensor], Tensor]) -> None:
            with self.run.autocast():
                twin.outputs(*batch)

        return recalibrate(twin, batches, forward)

    # ---- baselines of the same cost

    def plan_baseline(self) -> None:
        """Sets epochs and candidates so that a random strategy costs what --epochs of gradient search would.

        Costs are MACs x steps; a forward pass alone counts a third. A gradient search has half the steps an epoch, each
        with a step of the largest network for the alphas, after a warm-up of one and a half. E[MACs] is taken to go
        from the uniform mean to the target.
        """
        args, run = self.args, self.run
        if len(run.held_out) < args.batch_size:
            raise ValueError(
                f"--strategy {args.strategy} chooses by the loss on held-out images, and {len(run.held_out)} do "
                "not fill a batch: raise --held-out or lower --batch-size"
            )
        steps = args.epochs * (len(run.parts[0]) // self.halves // args.batch_size)
        warmup = (0.25 if args.arch_warmup is None else args.arch_warmup) * steps
        largest, mean = self.macs(self.choices.largest), self.choices.expected_macs(self.base, self.device_table).item()
        both = (mean + largest) / 2
        budget = warmup * both + (steps - warmup) * (largest + (mean + self.target) / 2)
        if args.strategy == "random":
            self.candidates = args.candidates or 8
            run.epochs = round(budget / (self.candidates * self.target * run.steps_per_epoch))
        else:
            one = (args.recalibrate_batches + len(run.held_out) // args.batch_size) * self.target / 3
            self.candidates = args.candidates or int(min(1000, max(8, budget / 4 / one)))
            run.epochs = round((budget - self.candidates * one) / (both * run.steps_per_epoch))
        if run.epochs < 1:
            raise ValueError(f"{self.candidates} candidates leave no epoch of training each: lower --candidates")
        self.total = self.warmup = run.epochs * run.steps_per_epoch
        say(
            f"{args.strategy}: {self.candidates} candidates, {run.epochs} epochs, to cost what the gradient search does"
        )

    def best_candidate(self) -> tuple[list[int], nn.Module]:
        """(choice, method) of the lowest held-out loss among random networks that inherit from the largest."""
        best = (math.inf, [], self.method)
        for choice in self.random_choices(self.candidates, self.args.seed):
            twin = self.standalone(choice, self.args.recalibrate_batches)
            loss = self.run.held_out_loss(twin)["held_out_loss"]
            best = min(best, (loss, choice, twin), key=lambda c: c[0])
        return best[1:]

    def random_choices(self, n: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [random_choice(self.base, self.table, self.target, generator) for _ in range(n)]


def random_search(search: Search) -> tuple[dict, list[int], nn.Module]:
    """(facts, choice, backbone) of the lowest held-out loss among networks trained alone, each a run of pretrain.py."""
    run, best = search.run, (math.inf, {}, [], "")
    for k, choice in enumerate(search.random_choices(search.candidates, search.args.seed)):
        folder = run.output / "candidates" / str(k + 1)
        path = folder.with_suffix(".json")
        write_arch(path, {"backbone": {"arch": search.space.arch(choice)}})
        flags = {"arch": str(path), "epochs": run.epochs, "knn_every": run.epochs, "output_dir": str(folder)}
        facts = pretrain.main(argparse.Namespace(**shared_flags(search.args) | flags), run.images)
        say(f"candidate {k + 1}/{search.candidates}: held-out loss {facts['held_out_loss']:.4f}")
        if facts["held_out_loss"] < best[0]:
            best = facts["held_out_loss"], facts, choice, str(folder / "backbone.pth")
    return best[1], best[2], load_backbone(best[3])[0]


# ---- what it costs --------------------------------------------------------------------------------------------------


def bench(search: Search, steps: int = 15, warm_up: int = 3) -> dict:
    """What an iteration (alpha and weight step) costs, and its ratio: of heads to the weight step alone, of a backbone
    to a plain step of the largest network, for which time and memory are given. Prints and returns them."""
    run, orders = search.run, [search.run.shuffled(p, 0, stream) for stream, p in enumerate(search.parts)]
    variants = {"alpha step": lambda step: search.alpha_step(orders[1], step, search.warmup + step)}
    variants["weight step"] = lambda step: search.weight_step(orders[0], step, 0.0, search.warmup + step)
    if search.space:
        plain = search.standalone(search.choices.largest, 1)
        optimizer = optimizer_of(list(plain.named_parameters()), plain, run.args)

        def largest(step):
            views, index = run.batch(orders[0], step, (search.args.seed, WEIGHTS, step))
            with run.autocast():
                loss = plain(views, index)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        variants["plain step of the largest"] = largest
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(warm_up + steps):
        for name, variant in variants.items():
            start = clock(run.device)
            variant(step % run.steps_per_epoch)
            if step >= warm_up:
                seconds[name].append(clock(run.device) - start)
    # the mean: sampled networks differ in size
    took = {name: statistics.mean(s) if search.space else statistics.median(s) for name, s in seconds.items()}
    held = {name: memory(run, lambda v=v: v(0)) for name, v in variants.items()}
    what = "at the peak" if run.device.type == "cuda" else "kept for backward"
    for name in variants:
        say(f"{name}: {1e3 * took[name]:.1f} ms, {held[name] / 2**20:.1f} MiB {what}")
    base = "plain step of the largest" if search.space else "weight step"
    iteration = took["alpha step"], took["weight step"]
    ratio = sum(iteration) / took[base]
    say(f"an iteration is {ratio:.3f} times a {base}" + (" network" if search.space else ""))
    views, index = run.batch(orders[1], 0, (search.args.seed, ALPHAS, 0))
    search.sample(search.warmup, alphas=True)
    _, cheap = alpha_gradients(search.method, search.method, views, index, search.alphas, search.weights)
    search.sample(search.warmup, alphas=True)  # the same gates
    for a in search.alphas:
        a.requires_grad_(True)
    full = torch.autograd.grad(search.method(views, index), [*search.alphas, *search.weights])
    worst = max((a - b).abs().max().item() for a, b in zip(cheap, full))
    say(f"alpha gradients beside those of a full backward: largest difference {worst:.3g}")
    return {"seconds": took, "memory": held, "ratio": ratio, "images_per_s": run.args.batch_size / sum(iteration)}


def memory(run: Run, step) -> int:
    """Bytes of a step: at the peak on CUDA; elsewhere those that its graphs keep for backward, weights left out."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    kept = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step()
    return sum(kept.values())


# ---- the script -----------------------------------------------------------------------------------------------------


def train(search: Search) -> list[dict]:
    """The loop: a line of history an epoch; goes on from a checkpoint."""
    args, run = search.args, search.run
    with user_errors():
        command = command_line("search.py", get_parser(), args)
        keeper = Keeper(run, [search.optimizer, search.alpha_optimizer], command)
    if keeper.epoch or keeper.step:
        say(f"goes on after {keeper} of {keeper.path}")

    def look(knn: bool) -> dict:
        method = search.standalone(search.derive(), min(10, args.recalibrate_batches)) if search.space else run.method
        return run.monitor(knn, method)

    if not keeper.history:
        keeper.history.append({"epoch": 0} | search.state() | look(args.knn_every > 0))
    warmup, tick = optim.warmup_steps(args, search.optimizer, run.steps_per_epoch), profiled(run)
    console, done = Console(run, search.total), keeper.epoch * run.steps_per_epoch + keeper.step

    def collected() -> dict[str, Tensor]:
        gradients = {"gradients": torch.stack(search.gradients)} if search.gradients else {}
        return console.read() | gradients

    with keeper:
        for epoch in range(keeper.epoch, run.epochs):
            start = time.time()
            orders = [run.shuffled(part, epoch, stream) for stream, part in enumerate(search.parts)]
            console.begin(epoch, keeper.partial, loss=orders[0], alpha_loss=orders[-1])
            search.gradients = list(keeper.partial.get("gradients", torch.empty(0)).to(run.device))
            for step in range(keeper.step, run.steps_per_epoch):
                lr = set_lr(search.optimizer, done, warmup, search.total)
                alpha_loss = {"alpha_loss": search.alpha_step(orders[1], step, done)} if done >= search.warmup else {}
                loss, views_s = search.weight_step(orders[0], step, (done + 1) / search.total, done)
                done += 1
                console.add(views_s, lr, loss=loss, **alpha_loss)
                console.line(done)
                keeper.after_step(step + 1, collected)
                tick()
            means = {name: losses.mean().item() for name, losses in console.read().items()}
            state, facts = search.state(), look(args.knn_every > 0) if run.monitor_due(epoch + 1) else {}
            entropy = statistics.mean(e for layers in state["entropy"].values() for e in layers)
            more = f"  alpha entropy {entropy:.3f}"
            if len(search.gradients) > 1:
                if dead := search.dead():
                    say(f"warning: no gradient in this epoch for the alphas of {', '.join(dead)}")
                facts["alpha_signal"] = search.signal()
                more += f"  signal {facts['alpha_signal']:.2f}"
            if search.space:
                more += f"  E[MACs] {state['expected_macs'] / search.target:.3f} of the target"
            console.text(f"epoch {epoch + 1}/{run.epochs}", means["loss"], done, more + in_words(facts))
            warn(run, facts, means["loss"], done)
            keeper.after_epoch({"epoch": epoch + 1} | means | facts | state | run.resources(start))
    return keeper.history


def find(search: Search) -> tuple[list[dict], dict, list[int] | None, nn.Module | None]:
    """(history, facts, choice, encoder) by the strategy; where heads alone are searched the last two are None."""
    args, run = search.args, search.run
    if args.strategy == "random":
        return [], *random_search(search)
    history = train(search)
    if not search.space:
        return history, history[-1], None, None
    if args.strategy == "gradient":
        choice = search.derive()
        twin = search.standalone(choice, args.recalibrate_batches)
    else:
        choice, twin = search.best_candidate()
    return history, run.monitor(args.knn_every > 0, twin), choice, twin.encoder


def main(args: argparse.Namespace) -> dict:
    """Returns what it writes as arch.json; {} after --bench."""
    with user_errors():
        search = Search(args)
    run, target = search.run, ""
    dims = {name: head_dims(*run.spaces[name]) for name in search.heads}
    say(
        f"{args.method}, {' and '.join(args.space)}, x{args.width:g}, {' + '.join(f'{len(p):,}' for p in run.parts)} "
        f"images of {run.size} px ({len(run.held_out):,} held out), {run.world} x {run.device.type}"
        f"{', bf16' * run.amp}{', compiled' * run.compile}"
    )
    if search.heads:
        names, kinds, functions = (math.prod(c) for c in zip(*map(count_heads, dims.values())))
        say(f"{names:,} heads by name, {kinds:,} that differ layer by layer, {functions:,} as functions")
    if search.space:
        target = f"{search.target / 1e6:.4g} MMACs"
        most = search.macs(search.choices.largest) / 1e6
        say(
            f"{len(search.space.options) ** len(search.space.stages):,} backbones of {search.base / 1e6:.4g} to "
            f"{most:.4g} MMACs; the target is {target}"
        )
    announce(args, search.optimizer, search.total)
    if args.strategy == "gradient":
        say("alpha lr " + " and ".join(f"{group['lr']:.2g}" for group in search.alpha_optimizer.param_groups))
    if args.bench:
        write_bench(run, bench(search), command_line("search.py", get_parser(), args))
        return {}

    with user_errors():
        compared = prepare(search) if args.compare else ()
    history, facts, choice, encoder = find(search)
    found = {"space": args.space, "strategy": args.strategy, "method": args.method, "data": args.data}
    found |= {"seed": args.seed, "command": command_line("search.py", get_parser(), args)}
    found["versions"] = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    if history:
        found["alphas"] = history[-1]["alphas"]
    if search.heads:
        found["heads"] = history[-1]["ops"]
    if search.space:
        arch = search.space.arch(choice)
        cost, parameters = facts_of(search, arch)
        found["backbone"] = {"arch": arch, "width": args.width, "stem": run.stem, "image_size": run.size}
        found["backbone"] |= {"macs": cost, "parameters": parameters, "target_macs": search.target}
        found |= {k: facts[k] for k in ("held_out_loss", "knn") if k in facts}
        say(f"backbone: {describe(arch)}, {cost / 1e6:.4g} of {target} ({100 * cost / search.target:.1f} %)")
    else:
        found["backbone"] = {"arch": run.arch, "width": args.width, "stem": run.stem}
    with user_errors():
        write_results(search, found, history, dims, encoder)
    for name, ops in found.get("heads", {}).items():
        say(f"{name}: {' '.join(true_name(o, *io) for o, io in zip(ops, pairwise(dims[name])))}")
    if "knn" in facts and history and "knn" in history[0]:
        with_what = "the inherited weights" if search.space else "the search network's encoder"
        say(
            f"kNN on {len(run.held_out):,} held-out images: {100 * facts['knn']:.2f} % with {with_what}, "
            f"{100 * history[0]['knn']:.2f} % untrained"
        )
    path = run.output / "arch.json"
    flags = shared_flags(args) | {what: str(path) for what in searched(search)}
    flags["output_dir"] = str(run.output.parent / "pretrain")
    say(f"wrote {path}; next:\n{command_line('pretrain.py', pretrain.get_parser(), argparse.Namespace(**flags))}")
    if args.compare:
        with user_errors():
            compare(search, path, *compared)
    return found


def write_results(
    search: Search, found: dict, history: list[dict], dims: dict[str, list[int]], encoder: nn.Module | None
) -> None:
    """arch.json and the pictures; of a backbone also its weights."""
    run, args = search.run, search.args
    write_arch(run.output / "arch.json", found)
    if not is_main():
        return
    where = f"{args.method} on {Path(args.data).name}, x{args.width:g}, seed {args.seed}"
    if search.heads:
        write_atomic(draw_heads(history, dims, f"Heads found with {where}"), run.output / "search.svg")
    if encoder:
        archs = {"found": found["backbone"]["arch"], search.space.handcrafted: BACKBONES[search.space.handcrafted]}
        networks = {name: (arch, facts_of(search, arch)[1]) for name, arch in archs.items()}
        title = f"Backbone found with {where}: {BAND[0]:g} to {BAND[1]:g} of {search.target / 1e6:,.4g} MMACs"
        picture = draw_backbone(networks, args.width, run.stem, run.size, title)
        write_atomic(picture, run.output / "backbone.svg")
        save_backbone(run, encoder, found["command"], run.output, arch=found["backbone"]["arch"])


if __name__ == "__main__":
    main(get_parser().parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()
