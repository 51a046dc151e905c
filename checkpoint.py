"""Files that a run writes, and how it survives a kill: atomic writes, backbones, architectures, checkpoints, signals.

    checkpoint = Checkpoint(folder, {"method": method, "optimizer": optimizer}, facts, command, device, total)
    with checkpoint:                                      # SIGTERM and SIGINT save, and then stop
        for step in range(checkpoint.step, total):        # a batch is a function of (seed, step)
            ...
            checkpoint.after_step(step + 1)

A run that is stopped at any point and resumed ends with the uninterrupted run's weights, bit for bit on a CPU.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

import launch
from launch import barrier, is_main, say, user_errors
from models import ARCHS, OPS, PRESETS, build_backbone, check_arch, describe
from views import IMAGENET_MEAN, IMAGENET_STD

# ---- atomic files ---------------------------------------------------------------------------------------------------


@contextmanager
def written(path: Path, sync: bool = True):
    """A temporary file that replaces `path` once it is complete (and, with `sync`, on the disk). If anything goes
    wrong, an existing file stays as it is. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        first = error if isinstance(error, OSError) else error.__context__
        why = getattr(first, "strerror", None) or error
        temporary.unlink(missing_ok=True)
        older = " (the one there is as it was)" if path.exists() else ""
        raise OSError(f"could not write '{path}'{older}: {why}. Make room, and give the same command again") from error


def save_atomic(state: dict, path: Path) -> None:
    with written(path) as file:
        torch.save(state, file)


def write_atomic(text: str, path: Path, sync: bool = True) -> None:
    with written(path, sync) as file:
        file.write(text.encode())


def lock(path: Path, wait: bool = False) -> int | None:
    """Takes an exclusive lock on a file (created if missing), across all machines that see it; returns its descriptor.

    The lock is released when the descriptor is closed or the process ends. If another process holds it, returns None
    or, with `wait`, waits. If the file system has no locks, prints that to stderr; then every process gets a
    descriptor."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl  # not on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    except (ImportError, OSError) as error:
        print(f"no file locks at '{path}' ({error}): run one process there at a time", file=sys.stderr)
    return handle


def read_tensors(path: str | Path) -> object:
    """Loads tensors and plain values that torch.save has written; runs no code in the file. Raises ValueError for a
    damaged file; torch itself does not notice changed bytes of a tensor."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if sum(part.file_size for part in file.infolist()) > os.path.getsize(path):
                    raise ValueError("compressed, which torch's own files are not")
                if bad := file.testzip():
                    raise ValueError(f"the checksum of {bad} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file fails in zipfile, pickle or torch
        why = type(error).__name__
        raise ValueError(f"'{path}' cannot be read as tensors ({why}): damaged, or not torch's") from error


def load_json(path: str) -> dict:
    """The JSON object in a file. Raises OSError or ValueError."""
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not JSON ({error})") from error
    if not isinstance(facts, dict):
        raise ValueError(f"'{path}': a {type(facts).__name__}, where a JSON object should be")
    return facts


def write_json(facts: dict, path: Path) -> None:
    """Rank 0 writes; the others wait."""
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(json.dumps(facts, indent=2) + "\n", path)
    barrier()


# ---- architectures and backbones ------------------------------------------------------------------------------------


def load_arch(source: str) -> str | dict:
    """--arch, a name in ARCHS or the path of an arch.json -> the name, or the architecture, checked."""
    if source in ARCHS:
        return source
    try:
        backbone = load_json(source).get("backbone")
    except OSError as error:
        known = ", ".join(ARCHS)
        raise FileNotFoundError(f"--arch '{source}' is neither a readable file nor one of {known}") from error
    if not isinstance(backbone, dict) or "arch" not in backbone:
        raise ValueError(f"'{source}' has no backbone with an \"arch\" in it")
    arch = backbone["arch"]
    return arch if isinstance(arch, str) and arch in ARCHS else check_arch(arch, f"'{source}'")


def load_heads(source: str, expected: Sequence[str]) -> dict[str, list[str]] | None:
    """--heads, a preset's name or the path of an arch.json -> {head: operations}; `default` -> None (handcrafted).

    Raises FileNotFoundError or ValueError if the heads are not those `expected`, or cannot be built.
    """
    if source == "default":
        return None
    if source in PRESETS:
        heads = PRESETS[source]
    else:
        try:
            heads = load_json(source).get("heads")
        except OSError as error:
            known = ", ".join(["default", *PRESETS])
            raise FileNotFoundError(f"--heads '{source}' is neither a readable file nor one of {known}") from error
        if not isinstance(heads, dict):
            raise ValueError(f"'{source}' has no \"heads\" in it, operations by the head's name")
    if sorted(heads) != sorted(expected):
        raise ValueError(
            f"'{source}' holds heads for another method: it has {', '.join(heads)}; this one needs "
            f"{', '.join(expected)}"
        )
    for head, ops in heads.items():
        if not isinstance(ops, list) or not 0 < len(ops) <= 64:
            raise ValueError(f"'{source}': {head} must be a list of 1 to 64 operations")
        unknown = [op for op in ops if not isinstance(op, str) or op not in OPS]
        if unknown:
            raise ValueError(f"'{source}': {head} has the unknown operation {unknown[0]!r}; known: {', '.join(OPS)}")
    return heads


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "torchvision": torchvision.__version__}


def save_backbone(encoder: nn.Module, facts: dict, folder: Path) -> None:
    """backbone.pth, a plain state dict, and backbone.json: the facts, which describe it, and the versions used."""
    state = {name: x.detach().cpu().contiguous() for name, x in encoder.state_dict().items()}
    save_atomic(state, folder / "backbone.pth")
    write_atomic(json.dumps({**facts, "versions": versions()}, indent=2) + "\n", folder / "backbone.json")


def load_backbone(
    weights: str, arch: str | None = None, width: float | None = None, stem: str | None = None
) -> tuple[nn.Module, dict]:
    """(backbone, facts) from backbone.pth and the backbone.json beside it, or from a torchvision state dict and `arch`.

    facts: arch, width, stem, mean, std, and what else of BACKBONE_FACTS is known. Raises FileNotFoundError or
    ValueError.
    """
    path, beside = Path(weights), Path(weights).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"no weights at '{weights}'")
    facts = {"width": 1.0, "stem": "imagenet", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if beside.is_file():
        facts |= load_facts(str(beside))
    elif arch is None:
        raise ValueError(f"'{beside}' is missing, so what network is in '{weights}' is not known: name it with --arch")
    facts |= {k: v for k, v in (("arch", arch), ("width", width), ("stem", stem)) if v is not None}
    if "arch" not in facts:
        raise ValueError(f"'{beside}' does not say what \"arch\" is in '{weights}': name it with --arch")
    try:
        backbone, _ = build_backbone(facts["arch"], facts["stem"], facts["width"])
    except ValueError as error:
        raise ValueError(f"'{beside}': {error}") from error
    load_weights(backbone, weights, f"{describe(facts['arch'])} x{facts['width']:g} with the {facts['stem']} stem")
    return backbone, facts


def is_number(x: object, low: float, high: float) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and low <= x <= high


def are_numbers(x: object, low: float) -> bool:
    return isinstance(x, list) and len(x) == 3 and all(is_number(v, low, 1) for v in x)


BACKBONE_FACTS = {  # the keys of backbone.json that are read: whether a value is valid, and what it should be
    "arch": (lambda x: isinstance(x, (str, dict)), "a name or an architecture"),
    "width": (lambda x: is_number(x, 1e-9, 64), "above 0, up to 64"),
    "stem": (lambda x: x in ("small", "imagenet"), "small or imagenet"),
    "resized_to": (lambda x: x is None or (isinstance(x, int) and is_number(x, 8, 4096)), "8 to 4096 pixels"),
    "mean": (lambda x: are_numbers(x, 0), "3 numbers of 0 to 1"),
    "std": (lambda x: are_numbers(x, 1e-6), "3 numbers above 0, up to 1"),
    "data": (lambda x: isinstance(x, str), "a name or a folder"),
}


def load_facts(path: str) -> dict:
    """The BACKBONE_FACTS in a backbone.json. Raises OSError or ValueError."""
    facts = load_json(path)
    for key, (right, wanted) in BACKBONE_FACTS.items():
        if key in facts and not right(facts[key]):
            raise ValueError(f"'{path}': {key!r} must be {wanted}, not {str(facts[key])[:80]}")
    return {key: facts[key] for key in BACKBONE_FACTS if key in facts}


def load_weights(backbone: nn.Module, weights: str, name: str) -> None:
    """Loads a state dict from disk into a backbone, which `name` describes in messages. All keys must match, except
    that a torchvision classifier (fc.*, classifier.*) is left out. Raises FileNotFoundError or ValueError."""
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no weights at '{weights}'")
    state = read_tensors(weights)
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise ValueError(f"'{weights}' is not a state dict, of tensors by name")
    state = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise ValueError(f"'{weights}' holds numbers that are not finite, the first in {broken[0]}")
    expected = backbone.state_dict()
    wrong = [f"{k} is missing" for k in expected if k not in state]
    wrong += [f"{k} is unknown" for k in state if k not in expected]
    shapes = [(k, tuple(state[k].shape), tuple(x.shape)) for k, x in expected.items() if k in state]
    wrong += [f"{k} is {have}, not {want}" for k, have, want in shapes if have != want]
    if wrong:
        raise ValueError(
            f"'{weights}' is no {name}: {wrong[0]}" + (f", and {len(wrong) - 1} more keys differ" if wrong[1:] else "")
        )
    backbone.load_state_dict(state)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def start_facts(command: str, device: torch.device) -> dict:
    """Command, commit, versions, machine and time of a start. commit: None if the scripts are not in a git clone."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    packages = {"python": platform.python_version(), "numpy": np.__version__, **versions()}
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    where = {"host": platform.node(), "device": what, "ranks": dist.get_world_size() if dist.is_initialized() else 1}
    return {"command": command, "commit": commit, "versions": packages, **where, "time": time.strftime("%F %T%z")}


def tensors(state: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in nested dicts."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{name}.{key}" if name else str(key))
    elif torch.is_tensor(state):
        yield name, state


def board(folder: Path):
    """A SummaryWriter in folder/tensorboard. Raises ValueError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"))


GO_ON, SAVE, STOP = range(3)
UNKNOWN = "unknown"  # a fact that equals any other


def differences(have: dict, want: dict) -> list[str]:
    """In words, where the facts of a checkpoint are not those wanted."""
    words = []
    for what in sorted({*have, *want}):
        old, new = have.get(what), want.get(what)
        if old == new or UNKNOWN in (old, new):
            continue
        if isinstance(new, (list, dict)):
            words.append(f"another {what}")
        else:
            old, new = ("its default" if value is None else value for value in (old, new))
            words.append(f"{what} {old}, not {new}")
    return words


@lru_cache
def control_group():
    """All ranks, communicating on the CPU: no GPU has to wait."""
    return dist.new_group(backend="gloo", timeout=launch.peer_timeout)


class Checkpoint:
    """The progress of a run and its checkpoint.pth, which is read at the start and written every `minutes`, after the
    last step, and before a signal stops the run. `log` writes log.txt, one JSON line per epoch.

    things: {name: object with a state dict}; the rest of the run depends on these and the step alone. facts: {name in
    error messages: plain data} that define the run; a checkpoint with other facts is refused. total: steps of the run.
    until: step at which to save and stop for now. tensorboard: write the numbers of the log there too.

    All ranks call every method, and rank 0 writes. State dicts do not depend on the number of ranks, so a run may be
    resumed with another. Raises ValueError for a damaged checkpoint or one of another run, and does not change it.
    """

    def __init__(
        self,
        folder: Path,
        things: dict[str, object],
        facts: dict,
        command: str,
        device: torch.device,
        total: int,
        minutes: float = 5.0,
        resume: bool = True,
        until: int | None = None,
        tensorboard: bool = False,
    ):
        self.folder, self.things, self.total, self.minutes = folder, things, total, minutes
        self.path = folder / "checkpoint.pth"
        self.facts = json.loads(json.dumps(facts))
        self.handle = None  # of the lock on the folder
        self.step = 0  # steps done
        self.until = total if until is None else min(until, total)
        self.history: list[dict] = []  # the lines of log.txt after the first
        self.starts: list[dict] = []
        self.signal: int | None = None
        self.agreement = None  # (request, its all_reduce) of the last step
        # with --no-resume too, a run that torchrun's --max-restarts has restarted continues from its own checkpoint
        self.resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if self.resume and self.path.exists():
            self.load()
        self.starts.append(start_facts(command, device) | {"after": self.step})
        self.saved = time.monotonic()
        self.board = board(folder) if tensorboard and is_main() else None

    # ---- the loop's side

    def __enter__(self) -> "Checkpoint":
        if is_main():
            with user_errors():
                self.handle = lock(self.folder / ".lock")
                if self.handle is None:
                    who = (self.folder / ".lock").read_text()
                    raise ValueError(f"another process is at work in '{self.folder}' ({who}): wait, or choose another")
                os.ftruncate(self.handle, 0)
                os.write(self.handle, f"process {os.getpid()} on {platform.node()}".encode())
                if not self.resume:
                    self.path.unlink(missing_ok=True)
        if self.step:
            done = "is finished" if self.step == self.total else "goes on"
            say(f"{done} after {self.step:,} of {self.total:,} steps, as {self.path} has them")
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if self.handle is not None:
            os.close(self.handle)
        if self.signal and kind is None:  # it came after the last step
            self.leave()

    def note(self, number: int, frame) -> None:
        """The signal handler. Ctrl-C arrives twice, from the terminal and from torchrun: the second changes nothing."""
        if self.signal is None:  # os.write: a handler may interrupt a print, which must not be entered again
            os.write(2, f"\n{signal.Signals(number).name}: saves after this step and stops\n".encode())
        self.signal = number

    def log(self, line: dict) -> None:
        """Adds a line to log.txt, whose first line describes the starts of the run."""
        self.history.append(line)
        if self.board:
            for name, value in line.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, line.get("epoch", line.get("step")))
            self.board.flush()
        if is_main():
            first, *resumed = self.starts
            first = {**first, "resumed": resumed} if resumed else first
            lines = "".join(json.dumps(line) + "\n" for line in (first, *self.history))
            with user_errors():
                write_atomic(lines, self.folder / "log.txt", sync=False)

    def after_step(self, step: int) -> None:
        """After `step` steps: saves if that is due, and stops if a signal has asked for it."""
        call = self.agreed()
        self.step = step
        if call != GO_ON or step == self.until:
            self.save()
        if call == STOP:
            self.leave()

    def agreed(self) -> int:
        """GO_ON, SAVE or STOP, the same on all ranks: the highest that one of several ranks requested a step ago, so
        that the exchange runs beside a step; on one rank, its request now."""
        call = GO_ON
        if self.agreement:
            asked, exchange = self.agreement
            exchange.wait()
            call = int(asked)
        due = self.minutes and call == GO_ON and is_main() and time.monotonic() - self.saved >= 60 * self.minutes
        own = SAVE if due else GO_ON
        if self.signal:
            own = STOP
        if not dist.is_initialized():
            return own
        asked = torch.tensor(own)
        self.agreement = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, group=control_group(), async_op=True)
        return call

    def leave(self) -> None:
        """Exits with status 128 + signal, like a program that the signal has killed: the run is not finished."""
        barrier()  # rank 0 has written
        number = self.signal or signal.SIGTERM
        say(
            f"stopped by {signal.Signals(number).name}, saved {self.path} after {self.step:,} of {self.total:,} steps: "
            "the same command goes on"
        )
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(128 + number)

    # ---- the file's side

    def save(self) -> None:
        """Values that are not finite are not saved; they stop the run."""
        self.saved = time.monotonic()
        states = {name: thing.state_dict() for name, thing in self.things.items()}  # on all ranks: rows may be sharded
        if not is_main():
            return
        with user_errors():
            for name, x in tensors(states):
                if x.is_floating_point() and not x.isfinite().all():
                    raise ValueError(
                        f"after {self.step:,} steps {name} is not finite any more: stopped without saving; any "
                        "checkpoint is from an earlier step. Try a lower --lr, longer --warmup-epochs or --clip-grad"
                    )
            told = {"facts": self.facts, "step": self.step, "history": self.history, "starts": self.starts}
            text = json.dumps(told)
            save_atomic({"facts": text, "crc": zlib.crc32(text.encode()), "states": states}, self.path)

    def load(self) -> None:
        try:
            state = read_tensors(self.path)
            if zlib.crc32(state["facts"].encode()) != state["crc"]:
                raise ValueError("its facts were changed")
            told = json.loads(state["facts"])
            others = differences(told["facts"], self.facts)
            if not others:
                if state["states"].keys() != self.things.keys():
                    raise ValueError("other things are in it")
                for name, thing in self.things.items():
                    thing.load_state_dict(state["states"][name])
                self.step, self.history, self.starts = told["step"], told["history"], told["starts"]
        except Exception as error:  # a damaged file fails in zipfile, pickle, json, torch or a load_state_dict
            raise ValueError(
                f"'{self.path}' is damaged, or of another version ({type(error).__name__}): delete it or pass "
                "--no-resume to start over, or choose another --output-dir"
            ) from error
        if others:
            raise ValueError(
                f"'{self.path}' was made with {'; '.join(others)}: choose another --output-dir, or start over with "
                "--no-resume"
            )
