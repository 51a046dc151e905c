"""Searches the projector and predictor heads of a Siamese method without labels (NASiam, arXiv 2302.00059).

    torchrun search.py                                                            # made-up images, a laptop
    torchrun search.py --data cifar10 --width 1 --epochs 100 --batch-size 512     # one GPU
    torchrun search.py --data my/images --image-size 64 --method moco
    torchrun search.py --compare 8                        # found heads against handcrafted and 8 random ones
    torchrun search.py --bench                            # what an iteration costs beside its weight step

First-order alternating search: the training images are cut into two disjoint halves; every iteration takes one step
of the alphas on a batch of the second half, then one of the weights on a batch of the first. Where the paper's code
differs between methods (alphas once an epoch for SimCLR, never saved, never synchronised), here all do the same.

The output folder gets log.txt (alphas, entropy and the operations chosen so far, an epoch a line), checkpoint.pth,
arch.json (what was found, as plain data) and search.svg (the alphas over time, and the head).
"""

import argparse
import json
import math
import random
import statistics
import time
from itertools import cycle
from pathlib import Path
from xml.sax.saxutils import escape

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import linear_eval
import pretrain
from linear_eval import Parser, barrier, load_backbone, load_data, measure, user_errors
from models import OPS, SearchHead, count_heads, head_dims, random_head, true_name
from pretrain import (
    Console,
    Run,
    clock,
    collapsed,
    command_line,
    is_main,
    load_checkpoint,
    optimizer_of,
    save_checkpoint,
    say,
    set_lr,
    write_atomic,
)

# The paper steps its alphas by 1e-3 (AdamW) 4,800 times. Adam moves an alpha by about lr a step, so a shorter search
# with the same lr decides nothing; --arch-lr's default keeps lr x steps at the paper's value.
PAPER_TRAVEL = 4.8


def get_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    pretrain.training_flags(parser)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--arch-lr",
        type=float,
        default=None,
        help=f"of the alphas (AdamW); None is {PAPER_TRAVEL} / steps, 1e-3 at least",
    )
    group.add_argument("--arch-weight-decay", type=float, default=1e-3, help="of the alphas")
    group.add_argument(
        "--compare",
        type=int,
        default=0,
        metavar="K",
        help="afterwards train the found, the handcrafted and K random heads",
    )
    group.add_argument("--compare-seeds", type=int, default=3, help="runs of each head")
    group.add_argument("--compare-epochs", type=int, default=None, help="of each run; None is --epochs")
    parser.add_argument("--output-dir", default="runs/search")
    return parser


def alpha_gradients(
    method: nn.Module, views: list[Tensor], index: Tensor, alphas: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """(loss, its gradient to each alpha) of one batch, first order; weights and buffers stay as they are.

    With the weights held constant nothing below the first mixture needs a graph: the encoder runs forward only, and
    the gradients are those of a full backward to the last bit.
    """
    for p in weights:
        p.requires_grad_(False)
    for a in alphas:
        a.requires_grad_(True)
    before = [b.clone() for b in method.buffers()]
    try:
        loss = method(views, index)
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
    """The searchable network, its weights and alphas, and an optimiser for each."""

    def __init__(self, args: argparse.Namespace):
        self.run = Run(args, SearchHead, parts=2)
        self.method, self.heads = self.run.method, self.run.heads
        self.alphas = [head.alpha for head in self.heads.values()]
        named = [(n, p) for n, p in self.method.named_parameters() if p.requires_grad and not n.endswith("alpha")]
        for alpha in self.alphas:
            alpha.requires_grad_(False)
        self.weights = [p for _, p in named]
        self.optimizer = optimizer_of(named, self.method, args)
        self.base_lr = self.optimizer.param_groups[0]["peak"] * 256 / args.batch_size
        self.total = args.epochs * self.run.steps_per_epoch
        lr = args.arch_lr if args.arch_lr is not None else max(1e-3, PAPER_TRAVEL / self.total)
        self.alpha_optimizer = torch.optim.AdamW(self.alphas, lr, weight_decay=args.arch_weight_decay)
        ddp = self.run.world > 1
        self.model = DistributedDataParallel(self.method) if ddp else self.method

    def alpha_step(self, order: Tensor, step: int) -> Tensor:
        views, index = self.run.batch(order, step)
        with self.run.autocast():
            loss, gradients = alpha_gradients(self.method, views, index, self.alphas, self.weights)
        for alpha, gradient in zip(self.alphas, gradients):
            if dist.is_initialized():
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            alpha.grad = gradient
        self.alpha_optimizer.step()
        self.alpha_optimizer.zero_grad()
        return loss

    def weight_step(self, order: Tensor, step: int, progress: float) -> tuple[Tensor, float]:
        start = time.time()
        views, index = self.run.batch(order, step)
        views_s = time.time() - start
        with self.run.autocast():
            loss = self.model(views, index)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step(progress)
        return loss, views_s

    def state(self) -> dict:
        """Alphas, their entropy and the operations chosen so far, by head."""
        return {
            "alphas": {n: h.alpha.detach().softmax(1).tolist() for n, h in self.heads.items()},
            "entropy": {n: h.entropy() for n, h in self.heads.items()},
            "ops": {n: h.discretise() for n, h in self.heads.items()},
        }


def bench(search: Search, steps: int = 15, warm_up: int = 3) -> float:
    """Prints what an iteration (alpha and weight step) costs beside its weight step alone, and returns the ratio."""
    run, seconds = search.run, {"alpha": [], "weight": []}
    orders = [part[torch.randperm(len(part), generator=run.generator)] for part in run.parts]

    for step in range(warm_up + steps):
        t0 = clock(run.device)
        search.alpha_step(orders[1], step % run.steps_per_epoch)
        t1 = clock(run.device)
        search.weight_step(orders[0], step % run.steps_per_epoch, 0.0)
        t2 = clock(run.device)
        if step >= warm_up:
            seconds["alpha"].append(t1 - t0)
            seconds["weight"].append(t2 - t1)
    alpha, weight = (statistics.median(s) for s in seconds.values())
    ratio = (alpha + weight) / weight
    say(f"alpha step {1e3 * alpha:.1f} ms, weight step {1e3 * weight:.1f} ms: an iteration is {ratio:.3f} weight steps")

    views, index = run.batch(orders[1], 0)
    _, cheap = alpha_gradients(search.method, views, index, search.alphas, search.weights)
    for a in search.alphas:
        a.requires_grad_(True)
    full = torch.autograd.grad(search.method(views, index), [*search.alphas, *search.weights])
    worst = max((a - b).abs().max().item() for a, b in zip(cheap, full))
    say(f"alpha gradients beside those of a full backward: largest difference {worst:.3g}")
    return ratio


# ---- the picture ----------------------------------------------------------------------------------------------------

COLOURS = dict(zip(OPS, cycle(["#000000", "#999999", "#CC79A7", "#D55E00", "#0072B2", "#009E73", "#E69F00"])))


def draw(history: list[dict], dims: dict[str, list[int]], title: str) -> str:
    """SVG: softmax(alpha) of each layer over the epochs, and under it what it chose, by true_name; dims by head."""
    cell, plot, row = 150, (126, 84), 168
    heads = history[-1]["ops"]
    width = 40 + cell * max(map(len, heads.values()))
    svg = [f'<text x="20" y="26" font-size="15">{escape(title)}</text>']
    for k, (op, colour) in enumerate(COLOURS.items()):
        x, y = 20 + 150 * (k % (width // 150)), 50 + 18 * (k // (width // 150))
        svg.append(f'<line x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
        svg.append(f'<text x="{x + 22}" y="{y}">{op}</text>')
    top = 68 + 18 * (-(-len(OPS) // (width // 150)))
    for head, ops in heads.items():
        curves = [line["alphas"][head] for line in history]  # (epochs + 1, L, 7)
        peak = max(0.3, max(p for line in curves for layer in line for p in layer))
        svg.append(f'<text x="20" y="{top}" font-weight="bold">{head}</text>')
        svg.append(
            f'<text x="90" y="{top}" fill="#666">softmax(alpha), 0 to {peak:.2f}, over {len(history) - 1} epochs; '
            "chosen below</text>"
        )
        for layer, op in enumerate(ops):
            label = true_name(op, dims[head][layer], dims[head][layer + 1])
            x0, y0 = 20 + cell * layer, top + 10
            svg.append(f'<rect x="{x0}" y="{y0}" width="{plot[0]}" height="{plot[1]}" fill="none" stroke="#bbb"/>')
            for k, (name, colour) in enumerate(COLOURS.items()):
                points = " ".join(
                    f"{x0 + plot[0] * t / max(1, len(curves) - 1):.1f},{y0 + plot[1] * (1 - line[layer][k] / peak):.1f}"
                    for t, line in enumerate(curves)
                )
                thick = 2.5 if name == op else 1.2
                svg.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
            y1 = y0 + plot[1] + 8
            svg.append(
                f'<rect x="{x0}" y="{y1}" width="{plot[0]}" height="24" rx="4" fill="{COLOURS[op]}" '
                f'fill-opacity="0.18" stroke="{COLOURS[op]}"/>'
            )
            svg.append(f'<text x="{x0 + plot[0] / 2}" y="{y1 + 16}" text-anchor="middle">{label}</text>')
            if layer + 1 < len(ops):
                x1 = x0 + plot[0]
                svg.append(
                    f'<path d="M{x1} {y1 + 12} h{cell - plot[0] - 7} m-5 -4 l5 4 l-5 4" fill="none" stroke="#666"/>'
                )
        top += row
    height = top - 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "\n".join(svg)
        + "</svg>\n"
    )


# ---- found against handcrafted and random ---------------------------------------------------------------------------


def compare(run: Run, arch: Path) -> dict[str, list[dict]]:
    """Trains the found, the handcrafted and K random heads alike, --compare-seeds times each, and writes a table.

    Every run is one of pretrain.py in a folder of its own below compare/, so a cut comparison goes on where it was.
    Accuracies are on the test images, of which nothing was chosen.
    """
    args, folder = run.args, run.output / "compare"
    with user_errors():
        train, test = (load_data(args, args.data, split) for split in ("train", "test"))
        if not train.labelled:
            raise ValueError(f"--compare needs labels to measure with, and '{args.data}' has none")
    folder.mkdir(exist_ok=True)
    rng = random.Random(args.seed)
    candidates = {"found": str(arch), "handcrafted": "default"}
    for k in range(args.compare):
        candidates[f"random {k + 1}"] = str(folder / f"random-{k + 1}.json")
        heads = {name: random_head(space.layers, rng) for name, space in run.spaces.items()}
        if is_main():
            write_atomic(
                json.dumps({"method": args.method, "heads": heads}) + "\n", Path(candidates[f"random {k + 1}"])
            )
    barrier()
    shared = {k: v for k, v in vars(args).items() if k in vars(pretrain.get_parser().parse_args([]))}
    shared |= {"epochs": args.compare_epochs or args.epochs}
    measuring = linear_eval.get_parser().parse_args(["--weights", "", f"--knn-k={args.knn_k}", f"--knn-t={args.knn_t}"])
    results: dict[str, list[dict]] = {name: [] for name in candidates}
    for seed in range(args.compare_seeds):
        for name, heads in candidates.items():
            output = folder / f"{name.replace(' ', '-')}-seed{seed}"
            say(f"\n{name}, seed {seed}: {output}")
            pretrain.main(argparse.Namespace(**shared | {"heads": heads, "output_dir": str(output), "seed": seed}))
            scores, trained = output / "scores.json", output / "checkpoint.pth"
            missing = not scores.exists() or scores.stat().st_mtime < trained.stat().st_mtime
            barrier()  # all ranks have looked before one writes
            if missing:
                backbone, facts = load_backbone(str(output / "backbone.pth"))
                row = measure(backbone, facts, train, test, run.device, measuring)
                if is_main():
                    write_atomic(json.dumps(row) + "\n", scores)
                barrier()
            results[name].append(json.loads(scores.read_text()))
    lines = table(args, results)
    say("\n" + "\n".join(lines))
    if is_main():
        write_atomic("\n".join(lines) + "\n", folder / "compare.md")
    return results


def table(args: argparse.Namespace, results: dict[str, list[dict]]) -> list[str]:
    """Markdown: found, handcrafted and random heads; mean and standard deviation over runs."""
    randoms = [name for name in results if name.startswith("random")]
    base = statistics.mean(r["linear"] for name in randoms for r in results[name])
    lines = [
        f"{args.method}, {args.arch} x{args.width:g}, {args.data}, {args.compare_seeds} seeds: test accuracy, mean and "
        "standard deviation over runs; RI: the linear accuracy's relative improvement over the random heads' mean",
        "",
        f"| heads | kNN (k {args.knn_k}, T {args.knn_t:g}) | linear | RI, % |",
        "|---|---|---|---|",
    ]
    groups = {"found": ["found"], "handcrafted": ["handcrafted"], f"random ({args.compare} heads)": randoms}
    for group, names in groups.items():
        rows = [r for name in names for r in results[name]]
        cells = []
        for key in ("knn", "linear"):
            values = [100 * r[key] for r in rows]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        gain = 100 * (statistics.mean(r["linear"] for r in rows) / base - 1)
        lines.append(f"| {group} | {cells[0]} | {cells[1]} | {gain:+.2f} |")
    one_by_one = sorted(100 * statistics.mean(r["linear"] for r in results[name]) for name in randoms)
    return lines + [
        "",
        f"random heads one by one, linear, mean over seeds: {', '.join(f'{v:.2f}' for v in one_by_one)}",
    ]


# ---- the script -----------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> dict[str, list[str]]:
    with user_errors():
        search = Search(args)
        run = search.run
        optimizers = [search.optimizer, search.alpha_optimizer]
        first, history = (0, []) if args.bench else load_checkpoint(run, optimizers)
    dims = {name: head_dims(*space) for name, space in run.spaces.items()}
    names, choices, functions = (math.prod(c) for c in zip(*map(count_heads, dims.values())))
    say(
        f"{args.method}, {args.arch} x{args.width:g}, {len(run.parts[0]):,} + {len(run.parts[1]):,} images of "
        f"{run.size} px ({len(run.held_out):,} held out), {run.world} x {run.device.type}"
    )
    say(f"{names:,} heads by name, {choices:,} that differ layer by layer, {functions:,} as functions")
    alpha_lr = search.alpha_optimizer.param_groups[0]["lr"]
    say(f"base lr {search.base_lr:g} x {args.batch_size}/256, alpha lr {alpha_lr:.2g}")
    if args.bench:
        bench(search)
        return {}
    if first:
        say(f"goes on after epoch {first} of {run.output / 'checkpoint.pth'}")
    if not history:
        history.append({"epoch": 0} | search.state() | run.monitor(knn=args.knn_every > 0))

    warmup = pretrain.warmup_steps(args, run.steps_per_epoch)
    console, done, lr = Console(run, search.total), first * run.steps_per_epoch, 0.0
    for epoch in range(first, args.epochs):
        orders = [part[torch.randperm(len(part), generator=run.generator)] for part in run.parts]
        alpha_losses = []
        console.begin()
        for step in range(run.steps_per_epoch):
            lr = set_lr(search.optimizer, done, warmup, search.total)
            alpha_losses.append(search.alpha_step(orders[1], step))
            done += 1
            loss, views_s = search.weight_step(orders[0], step, done / search.total)
            console.add(loss, views_s)
            console.line(epoch, done, lr)
        loss = console.mean_loss(f"epoch {epoch + 1}", lr)
        facts = run.monitor(run.knn_due(epoch + 1))
        state = search.state()
        entropy = statistics.mean(e for layers in state["entropy"].values() for e in layers)
        knn = f"  kNN {100 * facts['knn']:.2f} (held-out)" if "knn" in facts else ""
        console.text(f"epoch {epoch + 1}/{args.epochs}", loss, done, lr, f"  alpha entropy {entropy:.3f}{knn}")
        if warning := collapsed(facts, done):
            say(f"warning: {warning}")
        line = {"epoch": epoch + 1, "loss": loss, "alpha_loss": torch.stack(alpha_losses).mean().item(), "lr": lr}
        history.append(line | facts | state | {"seconds": time.time() - console.start})
        save_checkpoint(run, epoch + 1, history, optimizers)

    heads, arch = history[-1]["ops"], run.output / "arch.json"
    found = {
        "method": args.method,
        "heads": heads,
        "backbone": {"arch": args.arch, "width": args.width, "stem": run.stem},
        "alphas": history[-1]["alphas"],
        "data": args.data,
        "seed": args.seed,
        "command": command_line("search.py", get_parser(), args),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    if run.rank == 0:
        write_atomic(json.dumps(found, indent=2) + "\n", arch)
        title = f"{args.method} heads found on {Path(args.data).name}, {args.arch} x{args.width:g}, seed {args.seed}"
        write_atomic(draw(history, dims, title), run.output / "search.svg")
    for name, ops in heads.items():
        say(f"{name}: {' '.join(true_name(*layer) for layer in zip(ops, dims[name], dims[name][1:]))}")
    if "knn" in history[-1] and "knn" in history[0]:
        say(
            f"kNN on {len(run.held_out):,} held-out images: {100 * history[-1]['knn']:.2f} % with the search network's "
            f"encoder, {100 * history[0]['knn']:.2f} % untrained"
        )
    parser = pretrain.get_parser()
    shared = {k: v for k, v in vars(args).items() if k in vars(parser.parse_args([])) and k != "output_dir"}
    next_run = argparse.Namespace(**shared | {"heads": str(arch), "output_dir": str(run.output.parent / "pretrain")})
    say(f"wrote {arch} and {run.output / 'search.svg'}; next:\n{command_line('pretrain.py', parser, next_run)}")
    if args.compare:
        compare(run, arch)
    return heads


if __name__ == "__main__":
    main(get_parser().parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()
