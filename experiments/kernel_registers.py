"""What the compiler makes of the scan's kernels for a GPU of compute capability 9.0; needs Triton, and no GPU.

    python -m experiments.kernel_registers

Registers a thread, bytes of spilled stores and instructions of each kernel as the 1.3B presets launch it: bf16, heads
of 64, states of 128, packed documents. ptxas and nvdisasm are Triton's own.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __path__ as backend
from triton.compiler import ASTSource

from megatron_taipan.ops.mamba2_triton import STATES_EVERY
from megatron_taipan.ops.ssd_backward_triton import _group_kernel, _reverse_kernel, _token_kernel
from megatron_taipan.ops.ssd_forward_triton import _scan_kernel

HALF = {"x_ptr", "dy_ptr", "B_ptr", "C_ptr", "y_ptr", "states_ptr", "grads_ptr", "dx_ptr", "dB_ptr", "dC_ptr"}
ODD = {"n_segments", "n_groups"}  # 1; the other integers are multiples of 16, by which addresses align
SHAPES = {"CHUNK": 64, "P": 64, "N": 128, "HAS_SEQ": True, "PRECISION": "ieee"}


def main() -> None:
    scan = {
        "HAS_D": True,
        "HAS_INIT": False,
        "OUTPUT": True,
        "KEEP": STATES_EVERY,
        "FINAL": False,
        "STATE": tl.bfloat16,
    }
    for place in (tl.int32, tl.int64):
        shapes = SHAPES | {"PLACE": place}
        report(f"scan, {place}", _scan_kernel, shapes | scan, warps=4, stages=1)
        turned = {"HAS_FINAL": False, "KEEP": True, "TURNED": True}
        report(f"reverse, {place}", _reverse_kernel, shapes | turned, warps=8, stages=3)
        report(f"token, {place}", _token_kernel, shapes | {"SPLITS": 1, "HAS_D": True}, warps=4, stages=3)
        report(f"group, {place}", _group_kernel, shapes | {"SPLITS": 1}, warps=8, stages=3)


def report(name: str, kernel: "triton.JITFunction", constants: dict, warps: int, stages: int) -> None:
    """Compiles a kernel and prints a line."""
    signature, constexprs, aligned = {}, {}, {}
    for at, argument in enumerate(kernel.arg_names):
        if argument in constants or argument in ODD:
            signature[argument], constexprs[(at,)] = "constexpr", constants.get(argument, 1)
            continue
        pointer = "*i32" if argument == "seq_ptr" else "*bf16" if argument in HALF else "*fp32"
        signature[argument] = pointer if argument.endswith("_ptr") else "i32"
        aligned[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
        said = run("ptxas", "-v", "--gpu-name", "sm_90a", ptx, "-o", cubin).stderr
        code = run("nvdisasm", "-c", cubin).stdout
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    count = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?[A-Z]", code, re.M))
    print(f"{name:16} registers {registers[1]}, spilled bytes {spilled[1]}, instructions {count:,}", flush=True)


def run(program: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [str(Path(backend[0], "bin", program)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    main()
