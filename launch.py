"""What happens before the first step: threads, ranks, flags, messages. Import it ahead of torch.

    import launch  # then # isort: split

torch's threads on a CPU wait for each other at the end of each operation, and libgomp lets them spin meanwhile. Beside
another busy program a spinning thread takes the core away from the one that it waits for, and a run nearly stops. A
short spin costs an idle machine little (results/README.md). libgomp reads its settings when it is loaded.
"""

import os

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # the user's own word stands
    os.environ["GOMP_SPINCOUNT"] = "1000"  # times around the loop, some microseconds

# isort: split

import argparse
import re
import shlex
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Parser(argparse.ArgumentParser):
    """One line for a wrong flag; - and _ are the same in a flag's name."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        return super().parse_args([re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in argv])


def data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data and machine")
    group.add_argument("--data-root", default="data", help="where torchvision's data sets are downloaded to")
    group.add_argument("--image-size", type=int, default=None, help="edge in pixels; None keeps the images' own")
    group.add_argument("--max-images", type=int, default=None, help="so many training images, always the same ones")
    group.add_argument("--resident-gb", type=float, default=16.0, help="for a split's pixels; larger ones are streamed")
    group.add_argument(
        "--workers", type=int, default=None, help="that decode; None: one a core, over a machine's ranks"
    )
    group.add_argument("--device", default="auto", help="auto (cuda where there is one, else cpu), cpu, cuda, mps")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--deterministic", action="store_true", help="the same bits in every run on a GPU too; slower")


@contextmanager
def user_errors():
    """What a person can mend (a wrong path, flag or file) ends the script with one line and status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        rank = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
        sys.exit(f"{os.path.basename(sys.argv[0])}: error{rank}: {' '.join(str(error).split())}")


def setup(device: str, deterministic: bool = False) -> tuple[int, int, torch.device]:
    """(rank, world, device): torchrun's where it started us, else 0 and 1. A second call changes nothing.

    deterministic: the same bits in every run on a GPU too, slower; an operation that cannot says so, in a warning.
    """
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device} is none that torch knows: use auto, cpu, cuda or mps") from error
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is asked for
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch sees no GPU: use --device cpu, or a CUDA build of torch")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)  # momenta of dead features decay to denormals, which made the probe 5 times slower
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return rank, world, torch.device(device, local) if device == "cuda" else torch.device(device)


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last, faster for convolutions on CUDA and on a CPU; not on mps, for which nobody has tried it."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def synced(module: nn.Module, device: torch.device) -> nn.Module:
    """The same with BN over all ranks, on several GPUs; torch has it for CUDA alone."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if several and device.type == "cuda" else module


def barrier() -> None:
    """Ranks wait for each other here, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def is_main() -> bool:
    """Whether this is the rank that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """A line on the console, once."""
    if is_main():
        print(text, flush=True)


def command_line(script: str, parser: Parser, args: argparse.Namespace) -> str:
    """The command that gives these flags: what differs from the defaults."""
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


def mean_over_ranks(x: Tensor) -> Tensor:
    """In place, where there are several."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
