"""What the compiler makes of the scan's kernels for a GPU of compute capability 9.0; needs Triton, and no GPU.

    python -m experiments.kernel_registers

Registers a thread, bytes of spilled stores, instructions and a program's shared memory of each kernel as the 1.3B
presets launch it: bf16, heads of 64, states of 128, packed documents; with tiles by the copy engine, without it, and
without it on rows whose offsets need 64 bits. ptxas and nvdisasm are Triton's own.
"""

import re
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __path__ as backend
from triton.compiler import ASTSource

from megatron_taipan.ops.mamba2_triton import STATES_EVERY
from megatron_taipan.ops.ssd_backward_triton import _group_kernel, _reverse_kernel, _token_kernel
from megatron_taipan.ops.ssd_forward_triton import _scan_kernel, launch_options

HALF = {"x", "dy", "B", "C", "y", "states", "grads", "grads_ptr", "dx", "dB", "dC"}
ODD = {"n_segments", "n_groups"}  # 1; the other integers are multiples of 16, by which addresses align
SHARED = 232_448  # bytes that a program may have on an H100 and H200
SHAPES = {"CHUNK": 64, "P": 64, "N": 128, "HAS_SEQ": True, "PRECISION": "ieee"}
TILES = dict.fromkeys(("x", "dy", "y"), (64, 64)) | dict.fromkeys(("B", "C", "states", "grads"), (64, 128))


def main() -> None:
    state = {"STATE": tl.bfloat16}
    scan = state | {"HAS_D": True, "HAS_INIT": False, "OUTPUT": True, "KEEP": STATES_EVERY, "FINAL": True}
    again = state | {"HAS_D": False, "HAS_INIT": True, "OUTPUT": False, "KEEP": 1, "FINAL": False}
    turned = {"HAS_FINAL": False, "KEEP": True, "TURNED": True}
    for name, place, tiled in (("engine", tl.int32, True), ("loads", tl.int32, False), ("64 bits", tl.int64, False)):
        shapes = SHAPES | {"PLACE": place, "TILED": tiled}
        report(f"scan, {name}", _scan_kernel, shapes | scan, "scan", wide=("states",))
        report(f"states, {name}", _scan_kernel, shapes | again, "states", loaded=("states",))
        report(f"reverse, {name}", _reverse_kernel, shapes | turned, "reverse turned")
        report(f"token, {name}", _token_kernel, shapes | {"SPLITS": 1, "HAS_D": True}, "token", loaded=("B", "C"))
        report(f"group, {name}", _group_kernel, shapes | {"SPLITS": 1}, "group", loaded=("B", "C"))


def report(
    name: str, kernel: "triton.JITFunction", constants: dict, launch: str, wide: Collection[str] = (),
    loaded: Collection[str] = (),
) -> None:  # fmt: skip
    """Compiles a kernel as launched by that name and prints a line.

    wide: which tensors are float32, loaded: which never move by the copy engine.
    """
    options = launch_options(launch, torch.bfloat16, constants["TILED"], constants["P"], constants["N"], SHARED)
    constants = constants | {"STAGES": options.pop("STAGES")}
    signature, constexprs, aligned = {}, {}, {}
    for at, argument in enumerate(kernel.arg_names):
        number = "bf16" if argument in HALF and argument not in wide else "i32" if argument == "starts_ptr" else "fp32"
        if argument in constants or argument in ODD:
            signature[argument], constexprs[(at,)] = "constexpr", constants.get(argument, 1)
        elif constants["TILED"] and argument in TILES and argument not in loaded:
            signature[argument] = f"tensordesc<{number}{list(TILES[argument])}>"
        else:
            signature[argument] = f"*{number}" if argument in HALF or argument.endswith("_ptr") else "i32"
            aligned[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
        said = run("ptxas", "-v", "--gpu-name", "sm_90a", ptx, "-o", cubin).stderr
        code = run("nvdisasm", "-c", cubin).stdout
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    count = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?[A-Z]", code, re.M))
    print(
        f"{name:16} registers {registers[1]}, spilled bytes {spilled[1]}, instructions {count:,}, shared memory"
        f" {compiled.metadata.shared:,} bytes",
        flush=True,
    )


def run(program: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [str(Path(backend[0], "bin", program)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    main()
