"""
What torch.compile makes of fused._chunk for an H100, without one: how often a token's logits are
read, and what is written, in the Triton code.

    python tests/gpu/kernels_for_h100.py

The logits of a chunk are two matrices of 1.2 GB, far more than any cache holds, so this count is
the time between the products. Fake tensors stand for real ones, and what Inductor asks the driver
is answered here; it stops when the code is written.
"""

import re
import sys
import types
from pathlib import Path

import torch
import torch._inductor.config
import torch._inductor.fx_passes.fuse_attention as fuse_attention
import torch._inductor.fx_passes.misc_patterns as misc_patterns
import torch._inductor.fx_passes.pad_mm as pad_mm
import torch._subclasses.fake_tensor as fake_tensor
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parents[2]))
import fused

H100 = types.SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65_536,
    warp_size=32,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    max_threads_per_block=1024,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=False,
)
ROWS, VOCAB, OTHER = (
    (2048, 128),
    151_936,
    151_643,
)  # tokens of the first chunk; the student's words, and another teacher's
CASES = {
    "L_top + L_SFT, one vocabulary": {},
    "L_top + L_SFT, a shared vocabulary": {"shared": True},
    "L_tok": {"beta": 1.0, "entropy": True},
    "L_seq": {"alone": True},
}


class Written(Exception):
    pass


def stop(graph):
    code = graph.codegen()[0]
    raise Written(getattr(code, "value", code))


def pretend():
    answer = lambda value: lambda *_, **__: value
    for name, value in dict(
        is_available=True,
        _lazy_init=None,
        current_device=0,
        device_count=1,
        get_device_capability=(9, 0),
        get_device_properties=H100,
        synchronize=None,
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        set_rng_state=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
        is_current_stream_capturing=False,
    ).items():
        setattr(torch.cuda, name, answer(value))
    for name, value in dict(
        get_device_properties=H100,
        is_available=True,
        get_compute_capability=90,
        is_triton_capable=True,
        raise_if_triton_unavailable=None,
    ).items():
        setattr(CudaInterface, name, staticmethod(answer(value)))
    CudaInterface.Worker.get_device_properties, CudaInterface.Worker.current_device = map(
        staticmethod, (answer(H100), answer(0))
    )
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._cuda_getDevice = answer(0)
    fake_tensor.init_gpu_context = fuse_attention._sfdp_init = misc_patterns._misc_patterns_init = (
        pad_mm._pad_mm_init
    ) = answer(None)  # these would compute on it
    torch._inductor.config.joint_graph_constant_folding = False
    torch._inductor.config.fx_graph_cache = False
    triton.runtime.driver.set_active(
        types.SimpleNamespace(get_current_target=answer(GPUTarget("cuda", 90, 32)))
    )
    GraphLowering.compile_to_module = stop


def kernels(n, beta=0.5, entropy=False, shared=False, alone=False):
    """-> the Triton code for chunks of which the first has n tokens."""
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        make = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="cuda")
        rows = [
            make(n, VOCAB),
            None if alone else make(n, OTHER if shared else VOCAB),
            make(n, dtype=torch.int64),
            make(n),
            make(n),
            make(n) if alone else None,
        ]
        for x in rows:
            if x is not None:
                fused._any_rows(x)
        try:
            fused._compiled(fused._chunk)(
                *rows,
                beta=beta,
                shared=(make(VOCAB, dtype=torch.int64), make(VOCAB)) if shared else None,
                entropy=entropy,
                dtype=torch.bfloat16,
            )
        except Exception as error:  # dynamo wraps it
            if "triton" not in str(error):
                raise
            return str(error)


if __name__ == "__main__":
    pretend()
    print(
        "| case | tokens of the first chunk | matrices read | written |\n| --- | --- | --- | --- |"
    )
    for name, how in CASES.items():
        for n in ROWS:
            torch._dynamo.reset()
            code = kernels(n, **how)
            whole = lambda what: re.findall(
                rf"tl\.{what}\((\w+) \+ \(\w+ \+ (?:{VOCAB}|{OTHER})\*x\d\), [^\n]*r0_mask", code
            )
            print(f"| {name} | {n:,} | {len(whole('load'))} | {len(whole('store'))} |")
