"""Runs the scripts whole on a GPU that is not there, with real numbers: a `Gpu` tensor says that it is on cuda:0 and
holds its numbers in a CPU tensor.

    python tests/fake_cuda.py                       # every case of CASES
    python tests/fake_cuda.py -v search resnet      # those with both words in their names; waits and copies by place

What CUDA refuses fails here too: tensors of two devices in one operation, a CPU generator on a GPU tensor, numpy() of
one, fused SGD where some momentum buffers are missing. Every time that the host waits for the GPU, and every copy to
it, is counted by the line it is on; those of training steps apart. What it cannot see: missing kernels, Triton, NCCL,
compile. It patches torch, so it wants a process of its own; the exit status is the number of cases that failed, and
--json FILE gets {case: {"error", "steps", "waits": {place: a step}, "copies": a step}}.
"""

import argparse
import collections
import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
aten, CUDA, CPU = torch.ops.aten, torch.device("cuda:0"), torch.device("cpu")
PINNED: set[int] = set()  # addresses
WAITS = {  # the host has to know a number that the GPU computes
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.repeat_interleave,
}
INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}  # a CPU index is copied


class Record:
    """What has been counted, whether a training step is under way, and how many there were."""

    def __init__(self):
        self.counts: collections.Counter[tuple[str, str, bool]] = collections.Counter()  # (what, place, in a step)
        self.in_step, self.steps = False, 0

    def note(self, what: str) -> None:
        frame = sys._getframe(2)
        while frame and not (frame.f_code.co_filename.startswith(str(ROOT)) and frame.f_code.co_filename != __file__):
            frame = frame.f_back
        place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}" if frame else "?"
        self.counts[what, place, self.in_step] += 1

    def a_step(self, word: str) -> dict[str, float]:
        """{place: times a step} of what has the word in it."""
        found: dict[str, float] = collections.defaultdict(float)
        for (what, place, in_step), times in self.counts.items():
            if in_step and word in what:
                found[place] += times / self.steps
        return dict(found)


RECORD = Record()


def pinned(x: torch.Tensor) -> bool:
    return x.untyped_storage().data_ptr() in PINNED


def pin(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    PINNED.add(out.untyped_storage().data_ptr())
    return out


def is_cuda(x: object) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.startswith("cuda"))


class Gpu(torch.Tensor):
    device, is_cuda, is_cpu = property(lambda self: CUDA), property(lambda self: True), property(lambda self: False)

    @staticmethod
    def __new__(cls, cpu):
        make = torch.Tensor._make_wrapper_subclass
        self = make(cls, cpu.shape, cpu.stride(), cpu.storage_offset(), dtype=cpu.dtype, device="cpu")
        self.cpu_ = cpu.detach()
        return self

    def __repr__(self):
        return f"Gpu({self.cpu_})"

    def __reduce_ex__(self, protocol):  # for torch.save
        RECORD.note("wait: to the host")
        return self.cpu_.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_cpu = [t for t in tensors if not isinstance(t, Gpu)]
        if torch._C._current_autograd_node() is not None:  # C++ formulas make zeros of their own
            on_cpu = [t for t in on_cpu if t.any()]
        scalars = torch.Tag.pointwise in func.tags and all(t.dim() == 0 for t in on_cpu)
        if packet is aten.copy_ and on_cpu:
            if on_cpu[0] is args[0]:
                RECORD.note("wait: to the host")
            else:
                RECORD.note(f"copy to the GPU{', pageable: a wait' * (not pinned(on_cpu[0]))}")
        elif packet in INDEXING and isinstance(args[0], Gpu):
            if any(t.dim() for t in on_cpu):
                RECORD.note("copy to the GPU, of an index: a wait")
        elif on_cpu and not scalars and packet is not aten.detach:
            devices = ", ".join("cuda:0" if isinstance(t, Gpu) else f"cpu {tuple(t.shape)}" for t in tensors)
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {devices}")
        if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")
        masked = packet is aten.index and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if packet in WAITS or masked:
            RECORD.note(f"wait: {packet.__name__}")
        args_, kwargs_ = tree_map_only(Gpu, lambda t: t.cpu_, (args, kwargs))
        out = func(*args_, **kwargs_)
        if packet is aten.copy_ and not isinstance(args[0], Gpu):
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, Gpu, out))


class Devices(TorchFunctionMode):
    """Devices that are named: where a tensor goes, comes from or is made."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        x = args[0] if args else None
        if name in ("to", "cpu", "cuda"):
            return self.move(func, name, x, args, kwargs)
        if name in ("tolist", "numpy", "__array__") and isinstance(x, Gpu):
            if name != "tolist":
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            RECORD.note("wait: tolist")
            return x.cpu_.tolist()
        if name == "one_hot" and isinstance(x, Gpu):  # which makes a tensor of its own, in C++
            return Gpu(func(x.cpu_, *args[1:], **kwargs))
        if is_cuda(kwargs.get("device")) or (name == "new_tensor" and isinstance(x, Gpu)):
            if name in ("tensor", "as_tensor", "new_tensor"):
                RECORD.note("copy to the GPU, pageable: a wait")
            if isinstance(kwargs.get("generator"), torch.Generator):
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            args, kwargs = tree_map_only(Gpu, lambda t: t.cpu_, (args, kwargs | {"device": CPU}))
            return Gpu(func(*args, **kwargs))
        pin_memory = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        return pin(out) if pin_memory else out

    def move(self, func, name, x, args, kwargs):
        places = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, (torch.device, str, torch.Tensor))]
        place = {"cpu": CPU, "cuda": CUDA}.get(name) or (places[0] if places else x.device)
        to_gpu = place.device.type == "cuda" if isinstance(place, torch.Tensor) else is_cuda(place)
        if to_gpu != isinstance(x, Gpu) and str(place) != "meta":
            waits = not kwargs.pop("non_blocking", False) or not pinned(x)
            if to_gpu:
                RECORD.note(f"copy to the GPU{': a wait' * waits}")
            else:
                RECORD.note("wait: to the host")
            kinds = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)]
            kind = kinds[0] if kinds else getattr(place, "dtype", None) or x.dtype
            layout = kwargs.get("memory_format", torch.preserve_format)
            out = (x.cpu_ if isinstance(x, Gpu) else x.detach()).to(dtype=kind, memory_format=layout, copy=True)
            return Gpu(out) if to_gpu else out
        if to_gpu:  # it is there already
            args = [getattr(a, "dtype", a) for a in args[1:] if isinstance(a, (torch.Tensor, torch.dtype))]
            kwargs = {k: v for k, v in kwargs.items() if not is_cuda(v)}
            changes = args or kwargs.keys() - {"non_blocking", "copy"}
            return func(x, *args, **kwargs) if name == "to" and changes else x
        return func(x, *args[1:], **kwargs)


def apply(module, function, recurse=True, known={}):  # noqa: B006
    """nn.Module._apply: a parameter cannot become a Gpu in place, so what is shared is made once and stays shared."""
    for m in module.modules():
        for kind in (m._parameters, m._buffers):
            for name, t in list(kind.items()):
                if t is not None and not isinstance(t, Gpu) and id(t) in known:
                    kind[name] = known[id(t)][1]
                elif t is not None:
                    with torch.no_grad():
                        new = function(t)
                    if new is not t:
                        is_parameter = isinstance(t, torch.nn.Parameter)
                        kind[name] = torch.nn.Parameter(new, t.requires_grad) if is_parameter else new
                        known[id(t)] = t, kind[name]
    return module


@contextlib.contextmanager
def a_gpu():
    """A machine with one GPU."""
    autocast, to = torch.autocast, torch.nn.Module.to
    clip_grad = torch.nn.utils.clip_grad
    group = clip_grad._group_tensors_by_device_and_dtype
    facts = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_device_name": "none",
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }

    def module_to(self, *args, **kwargs):  # torch's own asks a tensor for its device in C++
        tensors = [(a.device, a.dtype) if isinstance(a, torch.Tensor) else (a,) for a in args]
        return to(self, *(a for pair in tensors for a in pair), **kwargs)

    def autocast_on_cpu(kind, *args, **kwargs):
        return autocast("cpu" if kind == "cuda" else kind, *args, **kwargs)

    def grouped(lists, *args):  # by the device that C++ sees
        return {(lists[0][0].device, kind): tensors for (_, kind), tensors in group(lists, *args).items()}

    with contextlib.ExitStack() as stack:
        for name, value in facts.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *a, value=value, **k: value))
        stack.enter_context(patch.object(torch, "autocast", autocast_on_cpu))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", pin))
        stack.enter_context(patch.object(torch.nn.Module, "_apply", apply))
        stack.enter_context(patch.object(clip_grad, "_group_tensors_by_device_and_dtype", grouped))
        stack.enter_context(patch.object(torch.nn.Module, "to", module_to))
        optimizer = torch.optim.Optimizer
        stack.enter_context(
            patch.object(optimizer, "_accelerator_graph_capture_health_check", lambda _: None, create=True)
        )
        stack.enter_context(Devices())
        yield


@contextlib.contextmanager
def steps_marked():
    """RECORD.in_step between the drawing of a training batch and the end of what follows on it; short benchmarks."""
    import pretrain
    import search
    from data import ALPHAS, WEIGHTS, Batches
    from launch import Meter

    draw, add, save = Batches.__call__, Meter.add, pretrain.save_views

    def drawn(batches, step):
        RECORD.in_step = batches.purpose in (WEIGHTS, ALPHAS)
        return draw(batches, step)

    def added(meter, step, lr, **losses):
        add(meter, step, lr, **losses)
        RECORD.in_step = False
        RECORD.steps += "loss" in losses

    def saved(*args):  # once a run
        RECORD.in_step = False
        save(*args)
        RECORD.in_step = True

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Batches, "__call__", drawn))
        stack.enter_context(patch.object(Meter, "add", added))
        stack.enter_context(patch.object(pretrain, "save_views", saved))
        stack.enter_context(patch.object(pretrain, "product_peak", lambda *_: 1.0))  # it is of a GPU's size
        for script in (pretrain, search):
            stack.enter_context(patch.object(script.bench, "__defaults__", (3, 1)))
        yield


TINY = (
    "--max-images 48 --width 0.0625 --image-size 16 --batch-size 8 --epochs 2 --held-out 0.2 --no-compile --device cuda"
)
MULTI = "--recipe sslight-cnn --locals 2 --blur 1 0.1 0.5 --solarize 0 0.2 0 --clip-grad 1 --optimizer"
SMALL = "--method simclr --recalibrate-batches 1"
FEW = "--held-out 0.4 --final-epochs 1"
DETECTOR = "--iterations 2 --image-size 64 --batch-size 2 --rois 8 --fpn-channels 8 --seeds 1 --no-untrained"
CASES = {f"pretrain {m}": ("pretrain", f"--method {m}") for m in ("simsiam", "simclr", "moco", "swav", "dino", "diet")}
CASES |= {
    f"pretrain {method} multi-crop {optimizer}": ("pretrain", f"--method {method} {MULTI} {optimizer}")
    for method, optimizer in (("simclr", "adamw"), ("moco", "sgd"), ("swav", "lars"), ("dino", "sgd"))
}
CASES |= {
    "pretrain swav sgd": ("pretrain", "--method swav --optimizer sgd"),
    "pretrain moco one key": ("pretrain", "--method moco --no-symmetric"),
    "pretrain simsiam teacher": ("pretrain", "--teacher ema --recipe diet-2 --views-per-image 2"),
    "pretrain dino vit": (
        "pretrain",
        "--method dino --arch vit_tiny --width 0.25 --recipe sslight-vit --locals 1 --local-size 20",
    ),
    "pretrain 96 px": ("pretrain", "--global-size 96 --max-images 16 --batch-size 4"),
    "pretrain bench": ("pretrain", "--bench"),
    "search heads": ("search", SMALL),
    "search resnet": ("search", f"--space resnet {SMALL} --strategy gradient"),
    "search bottleneck": ("search", f"--space bottleneck {SMALL} --strategy gradient"),
    "search mobilenet": ("search", f"--space mobilenet {SMALL} --strategy gradient"),
    "search heads resnet": ("search", f"--space heads resnet {SMALL} --strategy gradient"),
    "search moco resnet": ("search", f"--space resnet {SMALL} --strategy gradient --method moco"),
    "search diet resnet": ("search", f"--space resnet {SMALL} --strategy gradient --method diet"),
    "search supernet": ("search", f"--space heads resnet {SMALL} {FEW} --finalists 2 --candidates 20"),
    "search views": ("search", f"--space views {SMALL} {FEW} --candidates 2"),
    "search bench": ("search", f"--space heads resnet {SMALL} --strategy gradient --bench"),
    "search supernet bench": ("search", f"--space resnet {SMALL} {FEW} --bench"),
    "study": ("study", "--networks resnetk1:1 --seeds 1 --method simclr"),
    "detect_eval": ("detect_eval", f"--masks {DETECTOR}"),
    "linear_eval": ("linear_eval", "--shots 1 --augment 2 --finetune --finetune-lr 0.1 --finetune-epochs 1"),
}


def run(name: str, folder: Path) -> None:
    """One case: the script's main(), and where it leaves a checkpoint once more, which restores it."""
    script, flags = CASES[name]
    module, output = __import__(script), folder / name.replace(" ", "-")

    def main(script, *flags):
        script.main(script.get_parser().parse_args([*map(str, flags), "--output-dir", str(output)]))

    if script == "linear_eval":
        main(__import__("pretrain"), *TINY.split())
        flags = f"{flags} --max-images 48 --no-compile --device cuda --weights"
        main(module, *flags.split(), output / "backbone.pth")
        return
    if script == "detect_eval":
        from test_detect_eval import make_rectangles

        main(__import__("pretrain"), *TINY.split())
        flags = [*flags.split(), "--device", "cuda", "--data", make_rectangles(folder / "rectangles", (4, 2), 64)]
        for _ in range(2):
            main(module, *flags, "--weights", output / "backbone.pth")
        return
    main(module, *TINY.split(), *flags.split())
    if "--bench" not in flags:
        main(module, *TINY.split(), *flags.split())


def report(words: list[str], verbose: bool) -> dict[str, dict]:
    results = {}
    with tempfile.TemporaryDirectory() as folder, a_gpu(), steps_marked():
        for name in CASES:
            if not set(words) <= set(name.split()):
                continue
            RECORD.__init__()
            start, error = time.time(), None
            try:
                with contextlib.redirect_stdout(None if verbose else open(os.devnull, "w")):
                    run(name, Path(folder))
            except (Exception, SystemExit) as stop:
                where = [f for f in traceback.extract_tb(stop.__traceback__) if Path(f.filename).parent == ROOT]
                place = f"{os.path.basename(where[-1].filename)}:{where[-1].lineno}" if where else "?"
                error = f"{type(stop).__name__} at {place}: {str(stop)[:300]}"
            waits = RECORD.a_step("wait") if RECORD.steps else {}
            copies = sum(RECORD.a_step("copy").values()) if RECORD.steps else 0.0
            results[name] = {"error": error, "steps": RECORD.steps, "waits": waits, "copies": copies}
            took = f"{time.time() - start:.0f} s"
            print(f"{name}: {error or 'ok'} ({took}; a step: {copies:.2f} copies, waits {waits})", file=sys.stderr)
            for (what, place, in_step), times in sorted(RECORD.counts.items(), key=lambda item: -item[1]):
                if verbose:
                    print(f"    {times:6} {what:40} {place}{' in a step' * in_step}", file=sys.stderr)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = report(args.words, args.verbose)
    if args.json:
        args.json.write_text(json.dumps(results))
    sys.exit(sum(result["error"] is not None for result in results.values()))
