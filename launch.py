"""Start-up and console: threads, ranks, flags, error messages, the meter of a run.

    import launch  # ahead of torch, then # isort: split

On a CPU, torch's threads wait for each other after every operation, and libgomp makes them spin while they wait. Beside
another busy program, a spinning thread takes the core from the thread it waits for, and the run nearly stops. A short
spin costs little on an idle machine (results/README.md). libgomp reads its settings when torch loads it, so this file
is imported first.
"""

import os

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # unless the user has set them
    os.environ["GOMP_SPINCOUNT"] = "1000"  # iterations, some microseconds

# isort: split

import argparse
import difflib
import gc
import inspect
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.distributed.rendezvous import rendezvous

# ---- flags ----------------------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults in the help, except None, which the text explains."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number(text: str) -> float:
    """As float, without "nan", which would pass any check of a range."""
    if math.isnan(value := float(text)):
        raise ValueError(text)
    return value


class Parser(argparse.ArgumentParser):
    """A wrong flag gets a message of one line; flags may be written with - or _."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)
        self.register("type", float, number)

    def error(self, message):
        wrong = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        near = difflib.get_close_matches(wrong[1], self._option_string_actions, n=1) if wrong else []
        meant = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{meant}; --help lists the flags\n")

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        return super().parse_args([re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in argv])


def dashed(name: str) -> str:
    """The flag of a keyword or attribute."""
    return "--" + name.replace("_", "-")


def data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data and machine")
    group.add_argument("--data-root", default="data", help="where torchvision's data sets are downloaded to")
    group.add_argument("--cache", default="auto", help="folder for decoded images, or none; auto: DATA_ROOT/decoded")
    group.add_argument("--image-size", type=int, help="edge in pixels; default: the images' own")
    group.add_argument("--max-images", type=int, help="use only that many training images, always the same ones")
    group.add_argument("--resident-gb", type=float, default=16.0, help="a split with more pixels is streamed")
    machine_flags(group)


def machine_flags(group) -> None:
    group.add_argument("--workers", type=int, help="threads that decode; default: the cores, shared among local ranks")
    devices = ["auto", "cpu", "cuda", "mps"]
    group.add_argument("--device", choices=devices, default="auto", help="auto: cuda where there is one, else cpu")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--deterministic", action="store_true", help="repeatable bit for bit on a GPU too; slower")
    group.add_argument("--rank-timeout", type=float, default=30.0, help="minutes that a rank waits for the others")


def keywords(function: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function or class, annotated with their help: Annotated[type, "help"]."""
    parameters = inspect.signature(function).parameters.values()
    own = {p.name: p for p in parameters if p.kind == p.KEYWORD_ONLY}
    for name, parameter in own.items():
        if not hasattr(parameter.annotation, "__metadata__"):
            raise TypeError(f'{function.__name__}: the keyword {name} becomes a flag: Annotated[type, "help"]')
    return own


def keyword_flags(group, functions: dict[str, Callable]) -> None:
    """Adds a flag for every keyword of these functions, which may share some. The default None stands for the
    function's own default, which the help shows."""
    uses: dict[str, dict[str, inspect.Parameter]] = {}
    for name, function in functions.items():
        for flag, parameter in keywords(function).items():
            uses.setdefault(flag, {})[name] = parameter
    for flag, by_function in uses.items():
        kind, text = get_args(next(iter(by_function.values())).annotation)
        defaults = ", ".join(f"{name} {p.default}".strip() for name, p in by_function.items() if p.default is not None)
        names = ", ".join(filter(None, by_function))
        also = f" ({defaults or names})" if defaults or names else ""
        group.add_argument(dashed(flag), help=(text + also).replace("%", "%%"), **argument_type(kind))


def argument_type(kind: type) -> dict:
    """What add_argument needs for a value of this annotated type."""
    if NoneType in get_args(kind):  # X | None
        kind = next(k for k in get_args(kind) if k is not NoneType)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return {"type": get_args(kind)[0], "nargs": len(get_args(kind))}
    return {"type": kind}


def given(args: argparse.Namespace, function: Callable) -> dict:
    """The keywords of a function that are given on the command line."""
    values = {name: getattr(args, name) for name in keywords(function)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v is not None}


def refuse_others(args: argparse.Namespace, functions: dict[str, Callable], name: str) -> None:
    """Raises ValueError for a keyword on the command line that another function has, but functions[name] lacks."""
    for other in functions.values():
        for keyword in keywords(other).keys() - keywords(functions[name]).keys():
            if getattr(args, keyword) is not None:
                raise ValueError(f"{dashed(keyword)} means nothing to --method {name}: leave it out")


def command_line(script: str, parser: Parser, args: argparse.Namespace) -> str:
    """The command for these flags, without those that have their default."""
    words = ["torchrun", script]
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default:
            continue
        name = action.option_strings[0]
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        else:
            words += [name, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


# ---- process and ranks ----------------------------------------------------------------------------------------------


@contextmanager
def user_errors():
    """Ends the script with one line and status 1 on errors that the user can fix: a wrong path, flag or file. Under
    `python -X dev` they keep their traceback, to find errors that are the code's own."""
    try:
        yield
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        rank = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
        sys.exit(f"{os.path.basename(sys.argv[0])}: error{rank}: {' '.join(str(error).split())}")


def setup(device: str, deterministic: bool = False, rank_timeout: float = 30.0) -> torch.device:
    """Returns the device (under torchrun, this rank's GPU) and joins the other ranks, unless that is done already.

    deterministic: torch's deterministic algorithms, which are slower; an operation without one gives a warning.
    rank_timeout: minutes that a rank waits for the others, one of which may be downloading, before it gives up.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
        inductor.deterministic = True  # else torch.compile chooses some kernels by their time
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch sees no GPU: use --device cpu, or a CUDA build of torch")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)  # momenta of dead features decay to denormals, which made the probe 5 times slower
    if world > 1 and not dist.is_initialized():
        if rank_timeout <= 0:
            raise ValueError(f"--rank-timeout {rank_timeout:g}: must be above 0")
        join("nccl" if device == "cuda" else "gloo", timedelta(minutes=rank_timeout))
    return torch.device(device, local) if device == "cuda" else torch.device(device)


peer_timeout: timedelta | None = None  # what join was given, for further groups


def join(backend: str, timeout: timedelta) -> None:
    """dist.init_process_group, with a part of the store for each of torchrun's attempts. When --max-restarts restarts
    all ranks, the store still holds the addresses of the last attempt; a rank that reads a peer's old address waits for
    it without end (seen in torch 2.14). Several machines may number attempts differently, so they share one part."""
    store, rank, world = next(rendezvous("env://"))
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    global peer_timeout
    peer_timeout = timeout


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last, which is faster for convolutions on CUDA and CPUs; not on mps, where it is untested."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def synced(module: nn.Module, device: torch.device) -> nn.Module:
    """Replaces BN by SyncBatchNorm, which torch has for CUDA only, if there are several ranks."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if several and device.type == "cuda" else module


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 autocast is on by default: on a GPU that does not emulate it, and on a CPU with AMX. (AVX512-BF16
    alone makes a step 1.4 to 1.6 times as fast, but a short run learned less: results/README.md.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def forget(device: torch.device) -> None:
    """Between two runs of a process: torch compiles a class for at most eight networks, then runs eager; and reference
    cycles of the last run's optimiser hold GPU memory, which the garbage collector does not see."""
    torch._dynamo.reset()
    if device.type == "cuda":
        gc.collect()


def traceable(module: nn.Module) -> bool:
    """Whether torch.compile gets it as one graph. A SyncBatchNorm breaks it: pieces, and soon no compilation at all."""
    return not any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())


def barrier() -> None:
    """Waits for all ranks, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean; in place if there are several ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def from_main(value: object) -> object:
    """Rank 0's value, broadcast to all ranks, so that decisions that depend on it are the same everywhere."""
    if not dist.is_initialized():
        return value
    told = [value]
    dist.broadcast_object_list(told)
    return told[0]


def run(main: Callable, parser: Parser) -> None:
    """Runs a script: main() with the flags of the command line. A rank that has lost the others ends with one line;
    under NCCL, torch's watchdog may end it first, with a longer message."""
    args = parser.parse_args()
    try:
        main(args)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):  # gloo raises plain RuntimeErrors
            raise
        rank = os.environ.get("RANK", "0")
        print(
            f"{parser.prog}: error on rank {rank}: it has lost the other ranks: one of them has ended, or could not be "
            f"reached for {args.rank_timeout:g} minutes (--rank-timeout). If no other message says why, look at the "
            f"network. The same command on all machines goes on from the last checkpoint. ({error})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # leaving the group properly would wait for the others again
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- console --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Prints a line, on rank 0 alone."""
    if is_main():
        print(text, flush=True)


class Meter:
    """Losses and speed of an epoch. The losses stay on the device until a line, a checkpoint or the epoch's end is due.

    batches: {name of a loss: the data.Batches that it is computed on}. names: of the images. folder: gets a file that
    lists the batch of a loss that is not finite. The state dict holds the losses of the epoch so far.
    """

    def __init__(self, total: int, batches: dict, names: list[str], folder: Path, print_every: int):
        self.total, self.batches, self.names = total, batches, names
        self.folder, self.print_every = folder, print_every
        self.steps_per_epoch = batches["loss"].steps_per_epoch
        self.known: dict[str, list[float]] = {}
        self.waiting: dict[str, list[tuple[int, float, Tensor]]] = {}
        self.lr = math.nan
        self.restart()

    def restart(self) -> None:
        """Restarts the clock by which the speed of the next steps is measured."""
        self.start, self.steps = time.time(), 0

    def add(self, step: int, lr: float, **losses: Tensor) -> None:
        """The losses of this rank after a step of the run, counted from 0."""
        for name, loss in losses.items():
            self.waiting.setdefault(name, []).append((step, lr, loss.detach().clone()))  # CUDA graphs overwrite theirs
        self.lr = lr
        self.steps += 1

    def read(self) -> dict[str, list[float]]:
        """The epoch's losses so far, means over ranks. One that is not finite stops the run."""
        for name, entries in self.waiting.items():
            steps, lrs, losses = zip(*entries)
            known = self.known.setdefault(name, [])
            for step, lr, loss in zip(steps, lrs, mean_over_ranks(torch.stack(losses).float()).tolist()):
                if not math.isfinite(loss):
                    self.stop(name, loss, step, lr, known[-1] if known else None)
                known.append(loss)
        self.waiting.clear()
        return self.known

    def stop(self, name: str, loss: float, step: int, lr: float, last: float | None) -> None:
        """Ends the script with one line, and writes the batch of the loss to not-finite.json."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        path = self.folder / "not-finite.json"
        facts = {"what": name, "value": str(loss), "epoch": epoch + 1, "step": step_of_epoch + 1, "lr": lr}
        facts["last_finite"] = last
        facts["rows"] = self.batches[name].rows_of(step).tolist()
        facts["images"] = [self.names[row] for row in facts["rows"]]
        with user_errors():
            if is_main():
                path.write_text(json.dumps(facts, indent=2) + "\n")
            barrier()
            raise ValueError(
                f"the {name.replace('_', ' ')} is {loss} at epoch {epoch + 1}, step {step_of_epoch + 1} (lr {lr:.3g}, "
                f"last finite value {last}): stopped. The batch is listed in '{path}'; any checkpoint is from an "
                "earlier step. Try a lower --lr, longer --warmup-epochs or --clip-grad"
            )

    def print(self, step: int) -> None:
        """A line every `print_every` steps of an epoch."""
        done = (step + 1) % self.steps_per_epoch
        if done and done % self.print_every == 0:
            loss = self.read()["loss"]
            epoch = f"epoch {step // self.steps_per_epoch + 1}/{-(-self.total // self.steps_per_epoch)}"
            say(f"{epoch} step {done}/{self.steps_per_epoch}  loss {sum(loss) / len(loss):.4f}{self.speed(step)}")

    def end_epoch(self) -> dict[str, float]:
        """Ends the epoch; returns the mean of each loss over it."""
        means = {name: sum(losses) / len(losses) for name, losses in self.read().items() if losses}
        self.known = {}
        return means

    def speed(self, step: int) -> str:
        """Learning rate, time per step since `restart`, images/s and the time left."""
        seconds = (time.time() - self.start) / self.steps
        eta = timedelta(seconds=round((self.total - step - 1) * seconds))
        rate = self.batches["loss"].batch_size / seconds
        return f"  lr {self.lr:.4f}  step {1e3 * seconds:.0f} ms  {rate:,.0f} images/s  ETA {eta}"

    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.tensor(losses, dtype=torch.float64) for name, losses in self.read().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.known = {name: losses.tolist() for name, losses in state.items() if name != "lr"}  # older ones have it
