"""Compiles the Triton kernels of a decode pass for sm_90, on any machine, and prints what each one uses.

A program of its own: where kernels are interpreted, as in ``test_fused.py``, none can be compiled.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from selfspec.model.kernels import fused

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BF16, F32, I64 = "*bf16", "*fp32", "*i64"
MATRICES = [
    *((960, 576, False), (1536, 576, True), (576, 1536, False), (3072, 2048, False), (8192, 2048, True)),
    *((2048, 8192, False), (6144, 4096, False), (14336, 4096, True), (4096, 14336, False), (128256, 4096, False)),
]
"""Of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B: outputs, inputs, whether it is a gate's."""


def usage(kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: int) -> dict[str, Any]:
    """Registers, stack, local and shared memory. Pointers and strides are taken to be aligned, as torch's are."""
    types = signature | dict.fromkeys(constants, "constexpr")
    even = [name for name, kind in signature.items() if kind[0] == "*" or name.endswith("_step")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        shown = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    return {"kernel": kernel.__name__, **found, "shared": made.metadata.shared, "staged": "cp.async" in made.asm["ptx"]}


def main() -> None:
    """One line of JSON for each kernel."""
    found = []
    for outs, size, gate in MATRICES:
        block, depth, warps, stages = fused.tiling(outs, size, gate)
        inputs = {"x": BF16, "weight": BF16, "out": BF16, "tokens": "i32", "outs": "i32"}
        inputs |= {} if gate else {"residual": BF16}
        constants = {"bias": None, "SIZE": size, "GATED": gate, "BLOCK": block, "DEPTH": depth, "EXACT": "tf32"}
        constants |= {"residual": None} if gate else {}
        found.append(usage(fused._linear, inputs, constants, num_warps=warps, num_stages=stages))
    for heads, groups, size in ((9, 3, 64), (32, 8, 64), (32, 8, 128)):
        pointers = {"qkv": BF16, "cos": BF16, "sin": BF16, "positions": I64, "rows": I64, "slots": I64, "q": BF16}
        steps = dict.fromkeys(("row_step", "group_step", "slot_step"), "i32")
        shape = {"HEADS": heads, "GROUPS": groups, "SIZE": size}
        pointers |= {"keys": BF16, "values": BF16}
        found.append(usage(fused._rotate_append, pointers | steps, shape, num_warps=1))
        pointers = {"q": BF16, "keys": BF16, "values": BF16, "rows": I64, "slots": I64, "seen": I64, "base": I64}
        pointers |= {"mixed": F32, "weight": F32}
        parts = {"SPAN": 64, "PARTS": 8, "BLOCK": 64, "TILE": 16, "WIDE": size, "EXACT": "tf32"}
        shape = {"TOGETHER": heads // groups, "GROUPS": groups, "SLOTS": 512, "SIZE": size, "SCALE": size**-0.5}
        found.append(usage(fused._attend, pointers | steps, shape | parts))
        joined = {"HEADS": heads, "PARTS": 8, "MANY": 8, "SIZE": size, "WIDE": size}
        found.append(usage(fused._join, {"mixed": F32, "weight": F32, "out": BF16}, joined))
        norm = {"x": BF16, "weight": BF16, "out": BF16, "eps": "fp32"}
        found.append(usage(fused._norm, norm, {"SIZE": heads * size, "WIDE": triton.next_power_of_2(heads * size)}))
    largest = {"logits": BF16, "best": F32, "where": "*i32", "size": "i32"}
    found.append(usage(fused._largest, largest, {"SPAN": 2048, "SHARES": 64, "BLOCK": 1024}))
    found.append(usage(fused._largest_of, {"best": F32, "where": "*i32", "out": I64}, {"SHARES": 64}, num_warps=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
