"""
A GPU that is not there, so that the branches written for one run at all where there is none:

    python tests/gpu/pretend_gpu.py train_cord.py --dry-run --out runs/pretended

Every tensor that says "cuda" holds its numbers in main memory and computes there, under a GPU's
autocast, beside a GPU's optimizer and FSDP. What a GPU would refuse is refused: an operation
between the two devices, numpy() of a GPU's tensor, NCCL with a CPU's. Not seen: kernels (what
torch.compile would make runs as it is written), streams, memory, speed.

How: a tensor subclass around a CPU tensor, a dispatch mode for what makes tensors, and stand-ins
for what torch.cuda asks the driver. Autograd's engine asks libcuda and c10 themselves: a library of
a few lines answers them, compiled here by g++ and loaded before torch (LD_PRELOAD, so Linux alone).
"""

import contextlib
import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

LOCAL = int(os.environ.get("LOCAL_RANK", 0))
LINKED = (
    Path(importlib.util.find_spec("torch").origin).parent / "lib/libcaffe2_nvrtc.so"
)  # not in a wheel that is for CPUs alone
LIBRARY = """
extern "C" { static int there = 0; void pretend(int n) { there = n; } int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) { *flags = 0, *active = 0; return 0; } }
namespace c10 { namespace cuda { signed char device_count() noexcept { return there; } signed char device_count_ensure_non_zero() { return there; } } }
"""  # noqa: E501


def build(folder):
    """The library: c10::cuda::device_count, and every function of the driver that torch links to
    (none but one is called)."""
    names = {
        line.split()[-1].partition("@")[0]
        for line in subprocess.run(
            ["nm", "-D", LINKED], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        if " U cu" in line
    }
    rest = "".join(
        f'extern "C" int {name}() {{ return 999; }}\n'
        for name in sorted(names - {"cuDevicePrimaryCtxGetState"})
    )
    (folder / "cuda.cpp").write_text(LIBRARY + rest)
    subprocess.run(
        [
            "g++",
            "-nostdlib",
            "-shared",
            "-fPIC",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            folder / "libcuda.so.1",
            folder / "cuda.cpp",
        ],
        check=True,
    )
    return folder / "libcuda.so.1"


def everywhere(folder, first=""):
    """-> environment variables with which every python sees the pretended GPU from its first line
    on. folder: for the library. first: what each does before."""
    library = str(build(folder))
    (folder / "sitecustomize.py").write_text(
        f"{first}\nimport pretend_gpu\npretend_gpu.install()\npretend_gpu.Mode().__enter__()\n"
    )
    here = Path(__file__).parent
    path = [str(folder), str(here), str(here.parent), str(here.parent.parent)]
    return {"LD_PRELOAD": library, "PRETENDED": library, "PYTHONPATH": os.pathsep.join(path)}


if __name__ == "__main__" and "PRETENDED" not in os.environ:
    with tempfile.TemporaryDirectory() as made:
        library = str(build(Path(made)))
        sys.exit(
            subprocess.run(
                [sys.executable, *sys.argv],
                env={
                    **os.environ,
                    "LD_PRELOAD": f"{library} {os.environ.get('LD_PRELOAD', '')}",
                    "PRETENDED": library,
                },
            ).returncode
        )

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param  # noqa: E402
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_param_group  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

aten = torch.ops.aten
COPIES, JOINS = {aten.copy_.default, aten._to_copy.default}, {aten.cat.default, aten.stack.default}
BY_INDEX = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}  # the indices may be a CPU's


class OnGPU(torch.Tensor):
    """A tensor of the GPU; `held` is on the CPU."""

    @staticmethod
    def __new__(cls, tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            tensor.size(),
            strides=tensor.stride(),
            storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype,
            layout=tensor.layout,
            device=torch.device("cuda", LOCAL),
        )
        made.held = tensor.detach()
        return made

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGPU(inner["held"])

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                memo[id(self)] = OnGPU(self.held.clone())
            memo[id(self)].requires_grad_(self.requires_grad)
            vars(memo[id(self)]).update(
                {name: value for name, value in vars(self).items() if name != "held"}
            )
        return memo[id(self)]

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def __repr__(self):
        return f"{self.held!r} on the GPU"

    def numpy(self, **_):
        raise TypeError("numpy() of a tensor on the GPU")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """For what has no tensor yet: zeros(..., device="cuda")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = is_gpu(kwargs.get("device")) or any(
            isinstance(x, OnGPU) for x in tree_leaves((args, kwargs))
        )
        return run(func, args, kwargs) if ours else func(*args, **kwargs)


def is_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def run(func, args, kwargs):
    """The operation on the CPU, if a GPU would do it."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there, here = ([x for x in tensors if isinstance(x, OnGPU) == gpu] for gpu in (True, False))
    if func in BY_INDEX:
        wrong = (
            there
            and not isinstance(args[0], OnGPU)
            or isinstance(args[0], OnGPU)
            and any(x.dim() and not isinstance(x, OnGPU) for x in args[2:3])
        )
    else:  # a single number may come from a CPU, but not to be joined
        wrong = there and any(x.dim() or func in JOINS for x in here) and func not in COPIES
    if wrong:
        raise RuntimeError(
            f"{func} between devices: {', '.join(f'{list(x.shape)} on the {x.device.type}' for x in tensors)}"  # noqa: E501
        )
    to = kwargs.get("device")
    inside = lambda x: (
        x.held
        if isinstance(x, OnGPU)
        else torch.device("cpu")
        if isinstance(x, torch.device) and is_gpu(x)
        else x
    )
    a, k = tree_map(
        inside, (args, {name: value for name, value in kwargs.items() if name != "pin_memory"})
    )
    if func is aten.mm.dtype:  # products of 16 bits with sums of 32: a CPU has none
        out = torch.mm(a[0].float(), a[1].float())
    elif func is aten.addmm.dtype_out:
        if (
            not a[0].dtype == k["out"].dtype == torch.float32
            or not a[1].dtype == a[2].dtype == torch.bfloat16
        ):
            raise TypeError("only float32 + bfloat16 x bfloat16 is one product on a GPU")
        out = k["out"].copy_(torch.addmm(a[0], a[1].float(), a[2].float()))
    else:
        out = func(*a, **k)
    gpu = (
        is_gpu(to)
        if to is not None
        else isinstance(args[0], OnGPU)
        if func is aten.copy_.default
        else bool(there)
    )
    if not gpu:
        return out
    out = tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, out)
    return (
        out
        if func.namespace == "c10d" or to is not None
        else return_and_correct_aliasing(func, args, kwargs, out)
    )


class Anything:
    """A stream or an event."""

    device_type = "cuda"

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: Anything() if name == "record_event" else None


def on_the_gpu(collective):
    def checked(tensor, *more, **how):
        if not isinstance(tensor, OnGPU):
            raise RuntimeError(
                f"NCCL cannot {collective.__name__} a CPU's tensor of {list(tensor.shape)}"
            )
        return collective(tensor, *more, **how)

    return checked


def install():
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing, as long as no device is known
    ctypes.CDLL(os.environ["PRETENDED"]).pretend(
        8
    )  # more than one: the engine counts beyond this process's own
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # no tensor is made on the device itself, but on the CPU, and moved, where we see it
    answers = dict(
        is_available=True,
        is_initialized=True,
        _lazy_init=None,
        set_device=None,
        current_device=LOCAL,
        device_count=LOCAL + 1,
        get_device_name="no GPU",
        synchronize=None,
        get_device_capability=(9, 0),
        empty_cache=None,
        mem_get_info=(70 << 30, 80 << 30),
        memory_allocated=1 << 30,
        memory_reserved=1 << 30,
        max_memory_allocated=1 << 30,
        reset_peak_memory_stats=None,
        manual_seed=None,
        manual_seed_all=None,
        is_current_stream_capturing=False,
        is_bf16_supported=True,
        get_rng_state_all=[],
        set_rng_state_all=None,
        current_stream=Anything(),
        stream=contextlib.nullcontext(),
    )
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Stream = torch.cuda.Event = torch.Stream = torch.Event = Anything
    torch.accelerator.current_stream = torch.cuda.current_stream
    for name in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        getattr(torch.backends.cuda, name)(False)
    torch._C._cuda_getDevice = lambda: LOCAL
    torch.Tensor.is_pinned = lambda *_: False
    torch.compile = lambda work, **_: work
    start = dist.init_process_group
    dist.init_process_group = lambda backend, **how: start({"nccl": "gloo"}[backend], **how)
    dist.get_backend = lambda *_: "nccl"
    dist.all_reduce, dist.broadcast = map(on_the_gpu, (dist.all_reduce, dist.broadcast))
    for module in (fsdp_param, fsdp_param_group):  # nothing is freed between layers
        for name in {"alloc_storage", "free_storage"} & vars(module).keys():
            setattr(module, name, lambda tensor: None)


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    with Mode():
        runpy.run_path(sys.argv[0], run_name="__main__")
