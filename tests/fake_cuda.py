"""A GPU that is not there, with real numbers: a `Gpu` tensor says that it is on cuda:0 and holds its numbers in a CPU
tensor. test_cuda.py runs the scripts on it.

What CUDA refuses fails here too: tensors of two devices in one operation, a CPU generator on a GPU tensor, numpy() of
one, fused SGD where some momentum buffers are missing. In training steps, every wait of the host for the GPU and every
copy to it is counted by the function it is in. What it cannot see: missing kernels, Triton, NCCL, compile.
"""

import collections
import contextlib
import os
import sys
from unittest.mock import patch

import torch
from conftest import ROOT
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import pretrain
import search
from data import ALPHAS, WEIGHTS, Batches
from launch import Meter

aten, CUDA, CPU = torch.ops.aten, torch.device("cuda:0"), torch.device("cpu")
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
KNOWN: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id: a parameter or buffer, what `apply` has made of it


class Steps:
    """How many training steps there were, and their waits and copies: {"file.py:function": times}."""

    def __init__(self):
        self.count, self.under_way = 0, False
        self.waits, self.copies = collections.Counter(), collections.Counter()

    def note(self, copy: bool = False, wait: bool = True) -> None:
        if not self.under_way:
            return
        frame = sys._getframe(2)
        while not frame.f_code.co_filename.startswith(str(ROOT)) or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}"
        if copy:
            self.copies[place] += 1
        if wait:
            self.waits[place] += 1


STEPS = Steps()


def pin(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out.is_pinned_ = True
    return out


def pinned(x: torch.Tensor) -> bool:
    return getattr(x, "is_pinned_", False)


def is_cuda(x: object) -> bool:
    return isinstance(x, (torch.device, str)) and str(x).startswith("cuda")


def no_cpu_generator(values) -> None:
    if any(isinstance(x, torch.Generator) for x in values):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


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
        STEPS.note()
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
            to_host = on_cpu[0] is args[0]
            STEPS.note(copy=not to_host, wait=to_host or not pinned(on_cpu[0]))
        elif packet in INDEXING and isinstance(args[0], Gpu):
            if any(t.dim() for t in on_cpu):
                STEPS.note(copy=True)
        elif on_cpu and not scalars and packet is not aten.detach:
            devices = ", ".join("cuda:0" if isinstance(t, Gpu) else f"cpu {tuple(t.shape)}" for t in tensors)
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {devices}")
        no_cpu_generator((*args, *kwargs.values()))
        masked = packet is aten.index and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if packet in WAITS or masked:
            STEPS.note()
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
        if name in ("to", "cpu"):
            return self.move(x, "cpu" if name == "cpu" else None, [*args[1:], *kwargs.values()], kwargs)
        if name in ("numpy", "__array__") and isinstance(x, Gpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "tolist" and isinstance(x, Gpu):
            STEPS.note()
            return x.cpu_.tolist()
        if name == "one_hot" and isinstance(x, Gpu):  # which makes a tensor of its own, in C++
            return Gpu(func(x.cpu_, *args[1:], **kwargs))
        if is_cuda(kwargs.get("device")):
            if name in ("tensor", "as_tensor"):
                STEPS.note(copy=True)
            no_cpu_generator(kwargs.values())
            args = tree_map_only(Gpu, lambda t: t.cpu_, args)  # of full_like
            return Gpu(func(*args, **kwargs | {"device": CPU}))
        pin_memory = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        return pin(out) if pin_memory else out

    def move(self, x, device, values, kwargs):
        """Tensor.to and Tensor.cpu."""
        dtype = x.dtype
        for value in values:
            if isinstance(value, (torch.device, str)):
                device = value
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, torch.Tensor):
                device, dtype = value.device, value.dtype
        to_gpu = isinstance(x, Gpu) if device is None or str(device) == "meta" else is_cuda(device)
        how = {"dtype": dtype, "memory_format": kwargs.get("memory_format", torch.preserve_format)}
        if to_gpu == isinstance(x, Gpu):  # it is there already
            return x.to(**how) if to_gpu or device is None else x.to(device, **how)
        STEPS.note(copy=to_gpu, wait=not (to_gpu and kwargs.get("non_blocking") and pinned(x)))
        out = (x.detach() if to_gpu else x.cpu_).to(copy=True, **how)
        return Gpu(out) if to_gpu else out


def apply(module, function, recurse=True):
    """nn.Module._apply: a parameter cannot become a Gpu in place, so what is shared is made once and stays shared."""
    for m in module.modules():
        for tensors in (m._parameters, m._buffers):
            for name, t in tensors.items():
                if t is None:
                    continue
                if id(t) not in KNOWN:
                    with torch.no_grad():
                        new = function(t)
                    if new is t:
                        continue
                    is_parameter = isinstance(t, torch.nn.Parameter)
                    KNOWN[id(t)] = t, torch.nn.Parameter(new, t.requires_grad) if is_parameter else new
                tensors[name] = KNOWN[id(t)][1]
    return module


def module_to(self, *args, to=torch.nn.Module.to, **kwargs):
    """nn.Module.to, which asks a tensor for its device in C++."""
    tensors = [(a.device, a.dtype) if isinstance(a, torch.Tensor) else (a,) for a in args]
    return to(self, *(a for pair in tensors for a in pair), **kwargs)


def autocast_on_cpu(kind, *args, autocast=torch.autocast, **kwargs):
    return autocast("cpu" if kind == "cuda" else kind, *args, **kwargs)


def grouped(lists, *args, group=torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype):
    """By the device that a tensor says it is on, not by the one that C++ sees."""
    return {(lists[0][0].device, kind): tensors for (_, kind), tensors in group(lists, *args).items()}


def drawn(batches, step, draw=Batches.__call__):
    """A training step begins with its batch, ..."""
    STEPS.under_way = batches.purpose in (WEIGHTS, ALPHAS)
    return draw(batches, step)


def added(meter, step, lr, add=Meter.add, **losses):
    """... and ends once its loss has been noted."""
    add(meter, step, lr, **losses)
    STEPS.under_way = False
    STEPS.count += "loss" in losses


def saved(*args, save=pretrain.save_views):
    """Once a run, in its first step."""
    STEPS.under_way = False
    save(*args)
    STEPS.under_way = True


@contextlib.contextmanager
def a_gpu():
    """A machine with one GPU, whose Steps this yields. Benchmarks are short there."""
    of_cuda = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "is_bf16_supported": True,
        "synchronize": None,
        "get_device_name": "none",
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    patches = [patch.object(torch.cuda, name, lambda *_, v=value, **__: v) for name, value in of_cuda.items()]
    health_check = "_accelerator_graph_capture_health_check"
    patches += [
        patch.object(torch, "autocast", autocast_on_cpu),
        patch.object(torch.Tensor, "pin_memory", pin),
        patch.object(torch.nn.Module, "_apply", apply),
        patch.object(torch.nn.Module, "to", module_to),
        patch.object(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", grouped),
        patch.object(torch.optim.Optimizer, health_check, lambda _: None, create=True),
        patch.object(Batches, "__call__", drawn),
        patch.object(Meter, "add", added),
        patch.object(pretrain, "save_views", saved),
        patch.object(pretrain, "product_peak", lambda *_: 1.0),  # it is of a GPU's size
        patch.object(pretrain.bench, "__defaults__", (3, 1)),
        patch.object(search.bench, "__defaults__", (3, 1)),
    ]
    STEPS.__init__()
    KNOWN.clear()
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.enter_context(Devices())
        yield STEPS
