"""Candidates of a search: their cost in MACs or milliseconds, how they are drawn, and successive halving, which trains
each of them alone and keeps the better half.

    task = task_of(args, device)                     # what is searched, from search.py's flags
    task.cost.random(generator)                      # the choice of a backbone whose cost meets the target
    winner, folder, seen = halving(task, random_candidates(task, 16), Path("runs/search"))
"""

import argparse
import math
import random
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import launch
import models
import pretrain
from checkpoint import load_arch, load_json, write_json
from data import Images
from launch import from_main, is_main, say
from losses import METHODS, HeadSpace
from models import BACKBONES, BAND, BLOCKS, SPACES, Choices, Space, build_backbone
from pretrain import SCORES, clock
from views import VIEW_SPACE

# ---- what a backbone costs ------------------------------------------------------------------------------------------


class Cost:
    """The cost of a space's networks, in MACs or milliseconds: a base and what each option of a stage adds to it. It is
    kept in the checkpoint, since a second measurement would give other times."""

    def __init__(self, base: float, table: Tensor, target: float, unit: str, device: torch.device):
        self.base, self.table, self.target, self.unit = base, table, target, unit  # table: (S, O), float64 on the CPU
        self.device_table = table.float().to(device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"base": torch.tensor(self.base, dtype=torch.float64), "table": self.table}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.base, self.table = state["base"].item(), state["table"]
        self.device_table.copy_(self.table)

    def of(self, choice: list[int]) -> float:
        return self.base + sum(self.table[s, o].item() for s, o in enumerate(choice))

    def text(self, cost: float) -> str:
        return f"{cost:.4g} ms" if self.unit == "ms" else models.in_mmacs(cost)

    def expected(self, choices: Choices) -> Tensor:
        """E[cost] / target under the alphas, differentiable."""
        return choices.expected_cost(self.base, self.device_table) / self.target

    def derive(self, scores: Tensor, share: float = 1.0) -> list[int]:
        """The network with the highest total score (S, O) among those whose cost is in BAND of share x target."""
        return models.derive(scores, self.base, self.table, share * self.target, self.text)

    def random(self, generator: torch.Generator, band: tuple[float, float] = BAND) -> list[int]:
        return models.random_choice(self.base, self.table, self.target, generator, band)


def cost_of(space: Space, args: argparse.Namespace, stem: str, size: int, device: torch.device) -> Cost:
    """Raises ValueError where no network of the space meets the target."""
    where = args.width, stem, size
    if args.target_ms is None:
        base, table = space.costs(*where)
        target, unit = parse_target(args.target_macs or space.handcrafted, *where), "MACs"
    else:
        measured = latencies(space, *where, args.latency_batch, device) if is_main() else None
        base, table = from_main(measured)
        target, unit = args.target_ms, "ms"
    cost = Cost(base, table, target, unit, device)
    cost.derive(table)  # raises
    return cost


@torch.no_grad()
def milliseconds(
    modules: list[nn.Module], inputs: list[Tensor], device: torch.device, rounds: int = 21, warm_up: int = 3
) -> list[float]:
    """Each module's median forward time in eval mode. They take turns, so that other load affects all alike."""
    calls = 10 if device.type == "cuda" else 2  # ten per synchronisation: inside a network a block has none of its own
    # once glibc has freed memory of this size it keeps smaller pieces; else a block timed alone would return its memory
    # to the system after each pass and wait for new pages at the next, which does not happen within a network
    torch.empty(30 * 2**20, dtype=torch.uint8)
    times: list[list[float]] = [[] for _ in modules]
    for module in modules:
        module.to(device, memory_format=launch.memory_format(device)).eval()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # whatever has run before
    for turn in range(warm_up + rounds):
        for module, x, of_module in zip(modules, inputs, times):
            module(x)  # warms the caches: inside a network a block finds its inputs there
            begun = clock(device)
            for _ in range(calls):
                module(x)
            if turn >= warm_up:
                of_module.append(1e3 * (clock(device) - begun) / calls)
    torch.backends.cudnn.benchmark = benchmark
    return [statistics.median(of_module) for of_module in times]


def latencies(
    space: Space, width: float, stem: str, size: int, batch: int, device: torch.device
) -> tuple[float, Tensor]:
    """(base, table (S, O)) as of Space.costs, in ms on this device: sums of the times of single blocks, scaled by the
    factor that a few whole networks take of such a sum."""
    n_options, jobs, blocks_of = len(space.options), {}, {}
    for row, stage in enumerate(space.stages):
        for option in range(n_options):
            arch = space.arch([option] * len(space.stages))
            plan = models.plan(arch, width, stem)
            side = math.ceil(math.ceil(size / plan.stride) / plan.pool)
            blocks_of[row, option] = []
            for spec in plan.blocks:
                if spec.stage == stage:
                    key = row, spec._replace(index=min(spec.index, 1))
                    blocks_of[row, option].append(key)
                    if key not in jobs:
                        jobs[key] = BLOCKS[arch["block"]](spec), noise(batch, spec.c_in, side, device)
                side = spec.strided(side)
    times = dict(zip(jobs, milliseconds(*zip(*jobs.values()), device)))
    table = torch.zeros(len(space.stages), n_options, dtype=torch.float64)
    for (row, option), blocks in blocks_of.items():
        table[row, option] = sum(times[key] for key in blocks)
    table -= table[:, :1].clone()

    generator = torch.Generator().manual_seed(0)
    sample = torch.randint(n_options, (8, len(space.stages)), generator=generator).tolist()
    choices = [[0] * len(space.stages), *sample]
    networks = [build_backbone(space.arch(choice), stem, width)[0] for choice in choices]
    base, *measured = milliseconds(networks, [noise(batch, 3, size, device)] * len(networks), device)
    sums = [sum(table[s, o].item() for s, o in enumerate(choice)) for choice in sample]
    slope = sum(s * (m - base) for s, m in zip(sums, measured)) / sum(s * s for s in sums)
    return base, table * max(slope, 0.0)


def noise(batch: int, channels: int, side: int, device: torch.device) -> Tensor:
    """(batch, channels, side, side), to time a module on."""
    return torch.randn(batch, channels, side, side).to(device, memory_format=launch.memory_format(device))


def parse_target(text: str, width: float, stem: str, size: int) -> float:
    """MACs of --target-macs: a number, a network's name, or a multiple of one, as in 0.5xresnet18."""
    match = re.fullmatch(rf"(?:([\d.]+)x)?({'|'.join(BACKBONES)})", text)
    try:
        if match:
            return float(match[1] or 1) * models.macs(BACKBONES[match[2]], width, stem, size)
        return float(text)
    except ValueError as error:
        raise ValueError(f"--target-macs '{text}' is neither a number nor like 0.5xresnet18") from error


# ---- what is searched ---------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What is searched, and on which images: all that the strategies share."""

    args: argparse.Namespace
    device: torch.device
    images: Images
    stem: str
    size: int
    space: Space | None  # of backbones
    arch: str | dict  # the handcrafted one, or that of --arch
    cost: Cost | None
    asked: argparse.Namespace  # the flags as given; in args, check_flags and pretrain.start have filled in defaults


def task_of(args: argparse.Namespace, device: torch.device, asked: argparse.Namespace | None = None) -> Task:
    """args: of check_flags and pretrain.start. Raises ValueError or OSError for what cannot be searched."""
    images = pretrain.load_training_images(args, device, None)
    stem, size = pretrain.stem_of(args, images), images.pixels.shape[-1]
    space = next((SPACES[name] for name in args.space if name in SPACES), None)
    cost = cost_of(space, args, stem, size, device) if space else None
    arch = space.handcrafted if space else load_arch(args.arch)
    if args.strategy != "gradient":
        held_out = pretrain.split(images, args)[0]
        if len(held_out) < 16:  # half of them for a score, which wants 8
            raise ValueError(f"--strategy {args.strategy} judges by held-out images, {len(held_out)}: raise --held-out")
        if args.score == "knn" and not images.labelled:
            raise ValueError(f"--score knn needs labels, and {args.data} has none")
        if args.score == "held_out_loss" and len(held_out) // 2 < args.batch_size:
            raise ValueError("--score held_out_loss: halves of the held-out images do not fill a batch: see --held-out")
    for path in args.join:
        macs = models.size_of(load_arch(path), args.width, stem, size)[0]  # None: a ViT's
        if macs is None or (cost.unit == "MACs" and macs > cost.target):
            raise ValueError(f"--join {path}: not a network of at most {cost.text(cost.target)}")
    return Task(args, device, images, stem, size, space, arch, cost, asked or args)


def drawn(cost: Cost, n: int, seed: int) -> list[list[int]]:
    """n different networks, uniform in the band; fewer if it does not hold so many."""
    generator = torch.Generator().manual_seed(seed)
    band = models.choices_in(cost.base, cost.table, cost.target)
    if len(band) < 20 * n:
        return band[torch.randperm(len(band), generator=generator)[:n]].tolist()
    found: list[list[int]] = []
    while len(found) < n:
        choice = cost.random(generator)
        if choice not in found:
            found.append(choice)
    return found


class Candidate(NamedTuple):
    """A network to train alone. Heads or views that are None are those of the flags."""

    name: str
    arch: str | dict
    heads: dict[str, list[str]] | None = None
    views: dict[str, float] | None = None  # keywords of views.adjust

    def text(self) -> str:
        parts = [models.describe(self.arch)] if isinstance(self.arch, dict) else []
        parts += [f"{name} {' '.join(ops)}" for name, ops in (self.heads or {}).items()]
        parts += [f"{name} {value:g}" for name, value in (self.views or {}).items()]
        return f"{self.name}{': ' * bool(parts)}{', '.join(parts)}"


def head_spaces(args: argparse.Namespace, arch: str | dict) -> dict[str, HeadSpace]:
    """The method's heads on this backbone. Raises ValueError where it has none."""
    with torch.device("meta"):
        feature_dim = build_backbone(arch, width=args.width)[1]
    spaces = METHODS[args.method].heads(feature_dim, args.out_dim)
    if not spaces:
        raise ValueError(f"--method {args.method} has no heads to choose")
    return spaces


def random_heads(args: argparse.Namespace, arch: str | dict, rng: random.Random) -> dict[str, list[str]]:
    return {name: models.random_head(head.layers, rng) for name, head in head_spaces(args, arch).items()}


def random_rest(task: Task, arch: str | dict, rng: random.Random) -> tuple[dict | None, dict | None]:
    """(heads, views): uniform random draws of what --space searches, None for what it does not."""
    heads = random_heads(task.args, arch, rng) if "heads" in task.args.space else None
    views = None
    if "views" in task.args.space:
        views = {name: rng.choice(values) for name, values in VIEW_SPACE.items()}
    return heads, views


def measured_ms(task: Task, arch: dict) -> float:
    """Measured milliseconds of a forward pass of --latency-batch images."""
    network, _ = build_backbone(arch, task.stem, task.args.width)
    return milliseconds([network], [noise(task.args.latency_batch, 3, task.size, task.device)], task.device)[0]


def fits(task: Task, arch: dict) -> bool:
    """Whether its measured time is within --target-ms; always True for a target in MACs, which are exact."""
    if task.cost.unit == "MACs":
        return True
    measured = from_main(measured_ms(task, arch))
    if measured > task.cost.target:
        say(f"too slow, {measured:.4g} ms measured: {models.describe(arch)}")
    return measured <= task.cost.target


def fitting(task: Task, scores: Tensor) -> dict:
    """The best architecture by scores (S, O). A target in ms is lowered by 3 % until the measured time meets it."""
    for k in range(6):
        arch = task.space.arch(task.cost.derive(scores, 0.97**k))
        if fits(task, arch):
            return arch
    raise ValueError(
        f"networks that should take {task.cost.text(task.cost.target)} take longer when measured: is another program "
        "at work on this device?"
    )


def handcrafted(task: Task) -> Candidate:
    """The handcrafted candidate. If a backbone is searched, it is scaled to the band of the target."""
    arch = fitting(task, models.handcrafted_scores(task.space)) if task.space else task.arch
    return Candidate("handcrafted", arch)


def random_candidates(task: Task, n: int) -> list[Candidate]:
    """The handcrafted one and n - 1 random ones."""
    seed = task.args.seed + 10**6  # study.py draws its baseline of random networks from --seed itself
    rng = random.Random(seed)
    archs = [task.arch] * (n - 1)
    if task.space:
        archs = [task.space.arch(choice) for choice in drawn(task.cost, n - 1, seed)]
        archs = [arch for arch in archs if fits(task, arch)]
    rest = [Candidate(f"random {k + 1}", arch, *random_rest(task, arch, rng)) for k, arch in enumerate(archs)]
    return [handcrafted(task), *rest]


# ---- successive halving -------------------------------------------------------------------------------------------


SEEDS = 2  # runs of each candidate: more average out luck, at as many times the cost


def rungs(n: int) -> list[tuple[int, float]]:
    """(candidates, share of their training after which the worse half is dropped): of 8, (8, 1/3), (4, 2/3), (2, 1)."""
    sizes = [n]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    return [(size, (k + 1) / len(sizes)) for k, size in enumerate(sizes)]


def halving_epochs(n: int, epochs: int, proposed: int) -> int:
    """The most epochs that halving n candidates takes in all, where `proposed` ones join after the first rung, the last
    ones train for `epochs`, and the handcrafted one too if it was dropped in the first rung."""
    ends = [until(share, epochs) for _, share in rungs(n)]
    total, done = epochs - ends[0] + proposed * ends[0], 0
    for (size, _), end in zip(rungs(n), ends):
        total, done = total + size * (end - done), end
    return SEEDS * total


def until(share: float, epochs: int) -> int:
    """The epoch at which a rung ends."""
    return max(1, round(share * epochs))


def view_cost(task: Task, views: dict | None) -> float:
    """The relative cost of a step with these views: pixels of an image's views over those of the flags' views."""
    areas = []
    for more in (views or {}, {}):
        args = argparse.Namespace(**{**vars(task.args), **more, "compile": False})
        multi_crop = pretrain.build_multi_crop(args, task.images, ((0.5,) * 3, (0.5,) * 3), torch.device("cpu"))
        areas.append(sum(view.size**2 for view in multi_crop.views))
    return areas[0] / areas[1]


def remembered(folder: Path, name: str, draw: Callable[[], list[Candidate]]) -> list[Candidate]:
    """The candidates that an earlier start of this search saved under the name; else those of draw(), which are saved.
    (Drawn again they could be others, since times are measured.)"""
    path = folder / "finalists" / f"{name}.json"
    known = from_main(load_json(str(path))["candidates"] if path.exists() else None)
    if known is not None:
        return [Candidate(**facts) for facts in known]
    candidates = draw()
    write_json({"candidates": [candidate._asdict() for candidate in candidates]}, path)
    return candidates


def proposals_of(n: int) -> int:
    """How many backbones are proposed after the first rung of n candidates: fewer than 6 scores say too little."""
    return n // 4 if n >= 6 else 0


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """(weights, their standard errors) of the regression of y on centred columns of x."""
    centred = x - x.mean(0)
    inverse = np.linalg.inv(centred.T @ centred + penalty * np.eye(x.shape[1]))
    weights = inverse @ centred.T @ (y - y.mean())
    residual = y - y.mean() - centred @ weights
    freedom = max(1.0, len(y) - 1 - np.trace(inverse @ centred.T @ centred))
    covariance = inverse @ centred.T @ centred @ inverse * (residual @ residual / freedom)
    return weights, np.sqrt(np.diag(covariance))


def proposals(task: Task, tried: list[Candidate], scores: list[float]) -> list[Candidate]:
    """New backbones that the scores of a few trained ones favour; heads and views are those of the best one.

    A dozen noisy scores cannot tell what each option of each stage is worth, but they can tell whether networks should
    be deep, wide or of large kernels: a ridge regression on the sums over stages of depth, log width and log kernel.
    The first proposal is the best network of the band by these slopes, the others are the best of 200 random ones."""
    space, best = task.space, tried[np.argmax(scores)]
    choices = [space.choice(c.arch) for c in tried]
    inside = [k for k, choice in enumerate(choices) if choice]  # others join from elsewhere
    n, known = proposals_of(len(inside)), [choices[k] for k in inside]
    if not n:
        return []
    # a 0 counts as a half, as in models.handcrafted_scores
    sizes = [[v if name == "depth" else math.log(v or 0.5) for name, v in zip(space.choices, o)] for o in space.options]
    sizes = np.array(sizes)  # (O, choices)
    x, y = sizes[known].sum(1), np.array(scores)[inside]  # (N, choices), (N,)
    deviation = x.std(0)
    scale = np.where(deviation > 1e-6, deviation, np.inf)  # what does not vary has no slope
    slopes, _ = ridge(x / scale, y, penalty=2.0)
    worth = from_main(sizes / scale @ slopes)  # (O,); else another CPU's last digit could make ranks differ
    others = drawn(task.cost, 200, task.args.seed + 3 * 10**6)
    others.sort(key=lambda choice: -worth[choice].sum())
    found = []
    # with a target in ms each is measured, so that there must be an end
    for choice in [task.cost.derive(torch.from_numpy(worth).expand(len(space.stages), -1)), *others[: 4 * n]]:
        if choice not in known and len(found) < n and fits(task, space.arch(choice)):
            found.append(best._replace(name=f"proposal {len(found) + 1}", arch=space.arch(choice)))
            known.append(choice)
    return found


def halving(task: Task, candidates: list[Candidate], folder: Path) -> tuple[Candidate, Path, dict]:
    """Successive halving: (winner, folder of its run, facts for arch.json). At every rung the candidates are trained up
    to a share of their steps, with SEEDS seeds on the same views, and the better half goes on. Where backbones are
    searched, proposals join after the first rung. Candidates with dearer views get fewer epochs, so that all cost the
    same. Each run is one of pretrain.py in a folder of its own and resumes from its checkpoint. A candidate that fails
    is reported and left out.

    The handcrafted candidate, the first, wins unless another leads it by more than a standard error. If it was dropped
    on the way it is trained to its end for this, since what learns fast at first need not be better in the end. Raises
    ValueError if all fail."""
    everyone, alive, ratio = list(candidates), candidates, None
    seen: dict[str, list[tuple[float, list[float]]]] = {}

    def train(some: list[Candidate], share: float) -> dict[str, list[float]]:
        scores = train_each(task, some, [everyone.index(c) for c in some], share, folder)
        for c in some:
            if c.name in scores:
                own = [SCORES[task.args.score] * x for x in scores[c.name]]
                seen.setdefault(c.text(), []).append((share, own))
        return scores

    for rung, (size, share) in enumerate(rungs(len(candidates))):
        alive = alive[:size]
        scores = train(alive, share)
        alive = [c for c in alive if c.name in scores]
        if rung == 0 and task.space and alive:
            means = [statistics.mean(scores[c.name]) for c in alive]
            proposed = remembered(folder, "proposals", partial(proposals, task, alive, means))
            everyone += proposed
            scores |= train(proposed, share)
            alive += [c for c in proposed if c.name in scores]
        if not alive:
            raise ValueError("all candidates failed (see above): if their loss was not finite, try a lower --lr")
        if len(scores) > 2:
            between, within = spreads(np.array(list(scores.values())))
            now = between / max(within, 1e-30)
            say(f"candidates differ by {between:.3g} (standard deviation), seeds by {within:.3g}: ratio {now:.2f}")
            ratio = now if ratio is None else ratio  # of all: those that are left are alike, being the best
        alive.sort(key=lambda c: -statistics.mean(scores[c.name]))
    if ratio is not None and ratio < 0.5:
        say("warning: candidates differ less than seeds do: there may be nothing to find here")
    best, reference = alive[0], candidates[0]
    if reference.name not in scores:
        scores |= train([reference], 1.0)
    winner = best if leads(best, reference, scores) else reference
    facts = {"score": task.args.score, "ratio": ratio, "rounds": seen}
    return winner, folder / "finalists" / f"{everyone.index(winner)}-seed{task.args.seed}", facts


def leads(best: Candidate, reference: Candidate, scores: dict[str, list[float]]) -> bool:
    """Whether the best of the last rung leads the handcrafted candidate by more than a standard error. A handcrafted
    one that has no scores, since it failed, is not gone back to."""
    if best == reference or reference.name not in scores:
        return True
    _, within = spreads(np.array(list(scores.values())))
    lead = statistics.mean(scores[best.name]) - statistics.mean(scores[reference.name])
    if lead > within * math.sqrt(2 / SEEDS):
        return True
    say(f"{best.name} is {lead:+.3g} beside the handcrafted one, which is no clear lead: keeping the handcrafted one")
    return False


def beside_handcrafted(task: Task, found: Candidate, folder: Path) -> dict:
    """Compares what a gradient search found with the handcrafted network or heads, each trained alone: {"score",
    "found", "handcrafted": a score for each seed, "said"}. The score is kNN accuracy if there are labels."""
    score = "knn" if task.images.labelled else task.args.score
    task = task._replace(args=argparse.Namespace(**{**vars(task.args), "score": score}))
    ours, theirs = (train_alone(task, c, k, 1.0, folder) for k, c in enumerate((found, handcrafted(task))))
    epochs = task.args.final_epochs
    said = f"trained alone for {epochs} epoch{'s' * (epochs > 1)}, {SEEDS} seeds"
    for name, scores in (("what was found", ours), ("the handcrafted", theirs)):
        if isinstance(scores, str):
            return {"said": f"{said}: {name} failed: {scores}"}
    verdict = "better" if min(ours) > max(theirs) else "worse" if max(ours) < min(theirs) else "no better"
    ours, theirs = ([SCORES[score] * x for x in scores] for scores in (ours, theirs))
    if score == "knn":
        shown = ["kNN " + " and ".join(f"{100 * x:.2f} %" for x in scores) for scores in (ours, theirs)]
    else:
        shown = [f"{score} " + " and ".join(f"{x:.4g}" for x in scores) for scores in (ours, theirs)]
    said = f"{said}: {shown[0]} with what was found, {shown[1]} handcrafted: {verdict}"
    return {"score": score, "found": ours, "handcrafted": theirs, "said": said}


def train_each(
    task: Task, some: list[Candidate], numbers: list[int], share: float, folder: Path
) -> dict[str, list[float]]:
    """{name: scores} by train_alone of those candidates that do not fail. Prints the progress."""
    scores: dict[str, list[float]] = {}
    for done, (candidate, k) in enumerate(zip(some, numbers), 1):
        own = train_alone(task, candidate, k, share, folder)
        text = f"{done} of {len(some)} at {100 * share:.0f} %: {candidate.text()}"
        if isinstance(own, str):
            say(f"{text}: left out, training failed: {own}")
            continue
        scores[candidate.name] = own
        best = max(scores, key=lambda name: statistics.mean(scores[name]))
        more = f"; best of these: {best}" if len(some) > 1 else ""
        say(f"{text}: {task.args.score} {SCORES[task.args.score] * statistics.mean(own):.4g}{more}")
    return scores


def train_alone(task: Task, candidate: Candidate, k: int, share: float, folder: Path) -> list[float] | str:
    """The candidate's scores after that share of its training, one for each seed; or why a run failed."""
    args, scores = task.args, []
    epochs = max(1, round(args.final_epochs / view_cost(task, candidate.views)))
    flags = {"epochs": epochs, "knn_every": epochs * (args.score == "knn"), "resume": True, **(candidate.views or {})}
    flags |= {name: getattr(task.asked, name) for name in ("amp", "compile", "sync_bn")}  # as a later machine wants it
    if args.warmup_epochs is not None:
        flags["warmup_epochs"] = args.warmup_epochs * epochs / args.epochs
    what = args, task.images, candidate.arch, candidate.heads, until(share, epochs)
    for seed in range(args.seed, args.seed + SEEDS):
        run = folder / "finalists" / f"{k}-seed{seed}"
        last = pretrain.run_in(run, *what, seed=seed, profile=False, **flags)
        value = from_main(SCORES[args.score] * last.get(args.score, math.nan))
        if "error" in last or not math.isfinite(value):
            return last.get("error", f"its {args.score} is not finite")
        scores.append(value)
    return scores


def spreads(y: np.ndarray) -> tuple[float, float]:
    """Standard deviations (between networks, residual) of accuracies (K networks, S seeds), by two-way ANOVA. What
    a seed adds to all networks alike is removed, and the residual's share is subtracted from the variance between
    networks. If the first is near 0 or far below the second, no search can beat random choice."""
    networks, seeds = y.shape
    means = y.mean(1)
    residual = y - means[:, None] - y.mean(0) + y.mean()
    within = (residual**2).sum() / ((networks - 1) * (seeds - 1))
    return math.sqrt(max(0.0, means.var(ddof=1) - within / seeds)), math.sqrt(within)
