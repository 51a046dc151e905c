"""What a run leaves on disk, and how it survives: whole files, checkpoints, signals.

    keeper = Keeper(run, optimizers, command)        # goes on from checkpoint.pth, where there is one
    with keeper:                                     # SIGTERM and SIGINT save, and then stop
        for epoch in range(keeper.epoch, epochs):
            for step in range(keeper.step, steps):   # a batch is a function of the seed and these
                ...
                keeper.after_step(step + 1, lambda: {"loss": losses})
            keeper.after_epoch({"loss": mean})

A run that was stopped anywhere and goes on ends with the uninterrupted run's weights, bit for bit on a CPU.
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
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from data import fingerprint
from launch import barrier, is_main, say, user_errors
from losses import shard
from models import ARCHS, OPS, PRESETS, build_backbone, check_arch, describe
from views import IMAGENET_MEAN, IMAGENET_STD

NUMBER = (int, float)

# flags that change nothing in the result, so a resumed run may have others
FREE_FLAGS = {
    "output_dir",
    "print_every",
    "workers",
    "resume",
    "checkpoint_minutes",
    "bench",
    "bench_json",
    "profile",
    "resident_gb",
    "data_root",
    "device",
    "compare",
    "compare_seeds",
    "compare_epochs",
    "compare_data",
    "compare_with",
}

STATE_KEYS = {"SGD": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}, "LARS": {"momentum"}}

# ---- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def written(path: Path, sync: bool = True):
    """A file to write to, that takes the place of `path` once it is whole (and, unless `sync` is off, on the disk):
    whatever goes wrong, what was there stays. Raises OSError, which says so."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        first = error if isinstance(error, OSError) else error.__context__
        why = first.strerror if isinstance(first, OSError) and first.strerror else error
        if temporary.exists():
            temporary.unlink()
        older = " (the one there is as it was)" if path.exists() else ""
        raise OSError(f"could not write '{path}'{older}: {why}. Make room, and give the same command again") from error


def save_atomic(state: dict, path: Path) -> None:
    """Whole or not at all."""
    with written(path) as file:
        torch.save(state, file)


def write_atomic(text: str, path: Path, sync: bool = True) -> None:
    """Whole or not at all."""
    with written(path, sync) as file:
        file.write(text.encode())


def lock(folder: Path) -> int:
    """A handle on a folder that one process can have at a time; gone with the process, however that ends. Raises
    ValueError where another has it. Where there are no such locks (Windows, some network drives), nothing is held."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(f"another process is at work in '{folder}': wait for it, or choose another folder") from error
    except (ImportError, OSError):
        pass
    return handle


def start_facts(command: str, device: torch.device) -> dict:
    """Where, when and by what a run was started; commit: of the scripts' folder, None where it is no clone."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    versions |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    where = {"host": platform.node(), "device": what, "ranks": dist.get_world_size() if dist.is_initialized() else 1}
    return {"command": command, "commit": commit, "versions": versions, **where, "time": time.strftime("%F %T%z")}


# ---- parameters of which every rank has its own rows ----------------------------------------------------------------


def all_rows(x: Tensor, n: int) -> Tensor:
    """(n, ...) on the CPU of every rank's rows, one rank after another."""
    parts, world = [], dist.get_world_size()
    for rank in range(world):
        rows = n * (rank + 1) // world - n * rank // world
        part = x.clone() if rank == dist.get_rank() else x.new_empty(rows, *x.shape[1:])
        dist.broadcast(part, rank)
        parts.append(part.cpu())
    return torch.cat(parts)


def map_sharded(run, optimizers: list, method: dict, states: list[dict], f: Callable[[Tensor], Tensor]) -> None:
    """f, in place, over what of a method's and its optimisers' states is this rank's rows of something."""
    if run.world == 1:
        return
    sharded = [run.method.get_parameter(name) for name in run.method.sharded]
    for name in run.method.sharded:
        method[name] = f(method[name])
    for optimizer, state in zip(optimizers, states, strict=True):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if any(p is own for own in sharded) and i in state:
                state[i] = {k: f(v) if torch.is_tensor(v) and v.ndim else v for k, v in state[i].items()}


# ---- checkpoints ----------------------------------------------------------------------------------------------------

GO_ON, SAVE, STOP = range(3)


@lru_cache
def control_group():
    """Of all ranks, on the CPU: what they agree on there costs a GPU no wait."""
    return dist.new_group(backend="gloo")


class Keeper:
    """Where a run is, and its checkpoint: read at the start, written every --checkpoint-minutes, at the end, and when a
    signal asks the run to stop. log.txt is written after each epoch, whatever the checkpoint knows.

    `run` is pretrain.Run. All ranks call every method; rank 0 writes. The checkpoint is whole, so a run may go on with
    another number of ranks. Raises ValueError for a checkpoint of another command, or a damaged one, and touches
    nothing then.
    """

    def __init__(self, run, optimizers: Sequence[torch.optim.Optimizer], command: str):
        self.run, self.optimizers, self.path = run, list(optimizers), run.output / "checkpoint.pth"
        self.epoch, self.step = 0, 0  # epochs done; steps done of the next one
        self.history: list[dict] = []  # log.txt's lines, but for the first
        self.partial: dict[str, Tensor] = {}  # what the script collects over the steps of an epoch
        self.starts: list[dict] = []
        self.signal: int | None = None
        self.agreement = None  # (what the ranks ask for, the exchange of it) of the last step
        # after --max-restarts has restarted us, what is there is our own
        self.go_on = run.args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if self.go_on and self.path.exists():
            self.load()
        self.starts.append(start_facts(command, run.device) | {"after": [self.epoch, self.step]})
        self.saved = time.monotonic()

    def __str__(self) -> str:
        return f"epoch {self.epoch}" + f" and {self.step} steps" * (self.step > 0)

    # ---- the loop's side

    def __enter__(self) -> "Keeper":
        if self.run.rank == 0:
            with user_errors():
                self.folder = lock(self.run.output)
                if not self.go_on:
                    self.path.unlink(missing_ok=True)
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if self.run.rank == 0:
            os.close(self.folder)
        if self.signal and kind is None:  # it came after the last step
            self.leave()

    def note(self, number: int, frame) -> None:
        """The signals' handler. torchrun passes on what a terminal has sent us too, so a second one means nothing."""
        if self.signal is None:  # print is not to be interrupted by itself
            os.write(2, f"\n{signal.Signals(number).name}: saves after this step and stops\n".encode())
        self.signal = number

    def after_step(self, step: int, partial: Callable[[], dict[str, Tensor]]) -> None:
        """After `step` steps of an epoch: saves where that is due, together with what `partial` gives, and stops where
        a signal asked for it."""
        call = self.agreed()
        if call != GO_ON:
            self.step, self.partial = step, partial()
            self.save()
        if call == STOP:
            self.leave()

    def after_epoch(self, line: dict) -> None:
        """line: for log.txt."""
        self.history.append(line)
        self.epoch, self.step, self.partial = self.epoch + 1, 0, {}
        if self.epoch == self.run.epochs:
            self.save()
        if self.run.rank == 0:
            first = self.starts[0] | ({"resumed": self.starts[1:]} if self.starts[1:] else {})
            lines = "".join(json.dumps(line) + "\n" for line in (first, *self.history))
            with user_errors():
                write_atomic(lines, self.run.output / "log.txt", sync=False)

    def agreed(self) -> int:
        """GO_ON, SAVE or STOP, the same on all ranks: what any of them asked for one step ago, or, alone, now."""
        call = GO_ON
        if self.agreement:
            asked, exchange = self.agreement
            exchange.wait()
            call = int(asked)
        minutes = self.run.args.checkpoint_minutes
        due = minutes and call == GO_ON and self.run.rank == 0 and time.monotonic() - self.saved >= 60 * minutes
        own = STOP if self.signal else SAVE if due else GO_ON
        if self.run.world == 1:
            return own
        asked = torch.tensor(own)
        self.agreement = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, group=control_group(), async_op=True)
        return call

    def leave(self) -> None:
        """Status 128 + signal, as of a program that the signal has ended: the run is not finished."""
        barrier()  # rank 0 has written
        number = self.signal or signal.SIGTERM
        say(f"stopped by {signal.Signals(number).name}, saved {self.path} after {self}: the same command goes on")
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(128 + number)

    # ---- the file's side

    def save(self) -> None:
        """All that the rest of the run depends on. Weights that are not finite are not saved: they stop the run."""
        run, self.saved = self.run, time.monotonic()
        method, states = run.method.state_dict(), [o.state_dict()["state"] for o in self.optimizers]
        map_sharded(run, self.optimizers, method, states, lambda x: all_rows(x, run.method.n))
        if run.rank > 0:
            return
        floats = {name: x for name, x in method.items() if x.is_floating_point()}
        finite = [x.isfinite().all().to(run.device) for x in floats.values()]
        finite = torch.stack(finite).tolist()  # one wait for a GPU, not one a tensor
        with user_errors():
            if not all(finite):
                bad = list(floats)[finite.index(False)]
                raise ValueError(
                    f"after {self} {bad} is not finite any more: stopped without saving, so a checkpoint is from "
                    "before. Try a lower --lr, longer --warmup-epochs or --clip-grad"
                )
            facts = {
                "flags": {k: v for k, v in vars(run.args).items() if k not in FREE_FLAGS},
                "data": fingerprint(run.images),
                "network": [run.arch, run.specs],
                "epoch": self.epoch,
                "step": self.step,
                "history": self.history,
                "starts": self.starts,
            }
            text = json.dumps(facts)
            state = {
                "facts": text,
                "crc": zlib.crc32(text.encode()),
                "method": method,
                "optimizers": states,
                "partial": self.partial,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if run.device.type == "cuda" else None,
            }
            save_atomic(state, self.path)

    def load(self) -> None:
        run, path = self.run, self.path
        try:
            state = read_tensors(path)
            facts = json.loads(state["facts"])
            if zlib.crc32(state["facts"].encode()) != state["crc"]:
                raise ValueError("its facts were changed")
        except Exception as error:  # a damaged file fails in zipfile, pickle, json or torch
            raise self.damaged(error) from error
        flags, network, data = facts["flags"], facts["network"], facts["data"]
        for flag in sorted(set(flags) | set(vars(run.args)) - FREE_FLAGS):
            have, want = flags.get(flag), getattr(run.args, flag, None)
            if have != want:
                raise ValueError(
                    f"'{path}' was made with --{flag.replace('_', '-')} {have}, not {want}: choose another "
                    "--output-dir, or start over with --no-resume"
                )
        if network != [run.arch, run.specs]:
            flag = "heads" if network[0] == run.arch else "arch"
            raise ValueError(
                f"'{path}' was made with another network than --{flag} now names: choose another --output-dir"
            )
        if any(have != now for have, now in zip(data, fingerprint(run.images)) if None not in (have, now)):
            raise ValueError(
                f"'{path}' was made with other images ({data[0]:,}, now {len(run.images.pixels):,}): choose another "
                "--output-dir"
            )
        try:
            self.restore(state)
        except Exception as error:  # whatever else can be in a file
            raise self.damaged(error) from error
        self.epoch, self.step = facts["epoch"], facts["step"]
        self.history, self.starts = facts["history"], facts["starts"]

    def damaged(self, error: Exception) -> ValueError:
        return ValueError(
            f"'{self.path}' is damaged ({type(error).__name__}): delete it or pass --no-resume to start over, or "
            "choose another --output-dir"
        )

    def restore(self, state: dict) -> None:
        """Tensors where they belong; any exception where one is missing, or is not as it has to be."""
        run, states = self.run, state["optimizers"]
        map_sharded(run, self.optimizers, state["method"], states, lambda x: x[slice(*shard(run.method.n))])
        run.method.load_state_dict(state["method"])
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in saved.items():
                right = values.keys() == STATE_KEYS[type(optimizer).__name__]
                if not right or any(v.ndim and v.shape != params[i].shape for v in values.values()):
                    raise ValueError(f"the optimiser's state of parameter {i}")
            groups = optimizer.state_dict()["param_groups"]  # which follow from the flags
            optimizer.load_state_dict({"state": saved, "param_groups": groups})
        self.partial = dict(state["partial"])
        if not all(torch.is_tensor(x) for x in self.partial.values()):
            raise ValueError("what was collected over the epoch")
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and run.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])


def load_backbone(
    weights: str, arch: str | None = None, width: float | None = None, stem: str | None = None
) -> tuple[nn.Module, dict]:
    """(backbone, facts) of backbone.pth with its backbone.json, or of a plain torchvision state dict with its arch
    named.

    facts: arch, width, stem, mean, std and what else backbone.json holds. Raises FileNotFoundError or ValueError,
    naming what does not fit.
    """
    path, beside = Path(weights), Path(weights).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"no weights at '{weights}'")
    facts = {"width": 1.0, "stem": "imagenet", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if beside.is_file():
        facts |= check_facts(load_json(str(beside), BACKBONE_FACTS), f"'{beside}'")
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


BACKBONE_FACTS = {  # what a backbone.json may say, and of what type
    "arch": (str, dict),
    "width": NUMBER,
    "stem": str,
    "mean": list,
    "std": list,
    "data": str,
    "resized_to": (int, type(None)),
    "method": str,
    "epochs": int,
    "seed": int,
    "command": str,
    "versions": dict,
    "heads": str,
    "knn": NUMBER,
}


def check_facts(facts: dict, source: str) -> dict:
    """A backbone.json's facts, within what can be; else ValueError, which says what is wrong with those of `source`."""
    for key, right, wanted in (
        ("width", lambda x: 0 < x <= 64, "above 0, up to 64"),
        ("stem", lambda x: x in ("small", "imagenet"), "small or imagenet"),
        ("resized_to", lambda x: x is None or 8 <= x <= 4096, "8 to 4096 pixels"),
        ("mean", lambda x: numbers(x, 0), "3 numbers of 0 to 1"),
        ("std", lambda x: numbers(x, 1e-6), "3 numbers above 0, up to 1"),
    ):
        if key in facts and not right(facts[key]):
            raise ValueError(f"{source}: {key!r} must be {wanted}, not {str(facts[key])[:80]}")
    return facts


def numbers(x: list, least: float) -> bool:
    return len(x) == 3 and all(isinstance(v, NUMBER) and least <= v <= 1 for v in x)


def read_tensors(path: str | Path) -> object:
    """What torch.save has written, of tensors and plain values alone: no code in the file is run. Raises ValueError
    where it is damaged, which torch itself does not notice of a tensor's bytes."""
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
        raise ValueError(
            f"'{path}' cannot be read as tensors ({type(error).__name__}): damaged, or not torch's"
        ) from error


def load_weights(backbone: nn.Module, weights: str, name: str) -> None:
    """Fills a backbone, which `name` describes, from a state dict on disk. Keys must match to the last one; only a
    torchvision classifier (fc.*, classifier.*) is left out. Raises FileNotFoundError or ValueError."""
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
    wrong = [f"{k} is missing" for k in expected if k not in state] + [
        f"{k} is unknown" for k in state if k not in expected
    ]
    wrong += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    if wrong:
        raise ValueError(
            f"'{weights}' is no {name}: {wrong[0]}" + (f", and {len(wrong) - 1} more keys differ" if wrong[1:] else "")
        )
    backbone.load_state_dict(state)


FOUND = {  # what an arch.json may say, and of what type
    "space": list,
    "strategy": str,
    "method": str,
    "data": str,
    "seed": int,
    "command": str,
    "versions": dict,
    "alphas": dict,
    "heads": dict,
    "backbone": dict,
    "held_out_loss": NUMBER,
    "knn": NUMBER,
}


FOUND_BACKBONE = {
    "arch": (str, dict),
    "width": NUMBER,
    "stem": str,
    "image_size": int,
    "macs": int,
    "parameters": int,
    "target_macs": NUMBER,
}


def check_json(facts: object, known: dict[str, type | tuple], source: str) -> dict:
    """A JSON object that has no other keys than `known`, of these types; else ValueError, which says what is wrong with
    that of `source`."""
    if not isinstance(facts, dict):
        raise ValueError(f"{source}: a {type(facts).__name__}, where a JSON object should be")
    for key, value in facts.items():
        if key not in known:
            raise ValueError(f"{source}: unknown key {key!r}; known: {', '.join(known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise ValueError(f"{source}: {key!r} is {type(value).__name__}, not {wanted}")
    return facts


def load_json(path: str, known: dict[str, type | tuple]) -> dict:
    """A file's JSON object, checked. Raises OSError or ValueError."""
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not JSON ({error})") from error
    return check_json(facts, known, f"'{path}'")


def load_arch(source: str) -> str | dict:
    """--arch: a name in BACKBONES or VITS, or the path of an arch.json -> its architecture, checked."""
    if source in ARCHS:
        return source
    try:
        backbone = load_json(source, FOUND).get("backbone", {})
    except OSError as error:
        known = ", ".join(ARCHS)
        raise FileNotFoundError(f"--arch '{source}' is neither a readable file nor one of {known}") from error
    if "arch" not in check_json(backbone, FOUND_BACKBONE, f"'{source}', backbone"):
        raise ValueError(f"'{source}' has no backbone with an \"arch\" in it")
    arch = backbone["arch"]
    return arch if isinstance(arch, str) and arch in ARCHS else check_arch(arch, f"'{source}'")


def load_heads(source: str, expected: Sequence[str]) -> dict[str, list[str]] | None:
    """--heads: `default` -> None (handcrafted), a preset's name, or the path of an arch.json -> {head: operations}.

    Raises FileNotFoundError or ValueError, naming what is wrong, where a head of `expected` is missing or cannot be
    built.
    """
    if source == "default":
        return None
    if source in PRESETS:
        heads = PRESETS[source]
    else:
        try:
            found = load_json(source, FOUND)
        except OSError as error:
            known = ", ".join(["default", *PRESETS])
            raise FileNotFoundError(f"--heads '{source}' is neither a readable file nor one of {known}") from error
        if "heads" not in found:
            raise ValueError(f"'{source}' has no \"heads\" in it")
        heads = found["heads"]
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


def save_backbone(run, encoder: nn.Module, command: str, folder: Path, **more) -> None:
    """backbone.pth, a plain state dict, and backbone.json, what it is and where it comes from."""
    args = run.args
    facts = {
        "arch": run.arch,
        "width": args.width,
        "stem": run.stem,
        "mean": run.mean,
        "std": run.std,
        "data": args.data,
        "resized_to": args.image_size,
        "method": args.method,
        "epochs": args.epochs,
        "seed": args.seed,
        "command": command,
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    save_atomic({k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}, folder / "backbone.pth")
    write_atomic(json.dumps(facts | more, indent=2) + "\n", folder / "backbone.json")


def write_arch(path: Path, arch: dict) -> None:
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(json.dumps(arch, indent=2) + "\n", path)
    barrier()
