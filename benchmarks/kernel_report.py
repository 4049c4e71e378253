"""Reads compiled kernels, without a GPU: registers, spills, width of the memory accesses, bytes per element.

    python -m benchmarks.kernel_report [--arch 80 90 100 120] [--json FILE]

The kernels and their arguments are in benchmarks/kernel_cases.py.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.kernel_cases import CASES, Case

ARCHS = (80, 90, 100, 120)


@dataclass(frozen=True)
class Reading:
    """Values read from the machine code of a case. Widths are in bits; ``bytes_per_element`` counts 128-bit accesses
    only.

    ``product`` is the instruction of the matrix products: HGMMA is Hopper's wgmma, UTC…MMA Blackwell's tcgen05.
    """

    name: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    load_bits: int
    store_bits: int
    product: str
    bytes_per_element: float | None
    floor: float | None


def read(case: Case, arch: int) -> Reading:
    """Compile ``case`` for compute capability ``arch`` (90 is sm_90) and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = {name: i for i, name in enumerate(case.kernel.arg_names)}
    unknown = (case.types.keys() | case.constants.keys()) ^ order.keys()
    if unknown:
        raise ValueError(f"{case.name}: arguments {sorted(unknown)} are missing or unknown")
    pointers = [name for name, type_ in case.types.items() if type_.startswith("*")]
    aligned = (*(pointers if case.aligned is None else case.aligned), *case.even)
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in order},
        constexprs={(order[name],): value for name, value in case.constants.items()},
        attrs={(order[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    usage, code = _disassemble(compiled.asm["cubin"])
    accesses = [(kind, _bits(suffix)) for kind, suffix in re.findall(r"\b(LDG|LDGSTS|STG)\b(\.[\w.]+)?", code)]
    loads = [bits for kind, bits in accesses if kind != "STG"]
    stores = [bits for kind, bits in accesses if kind == "STG"]
    wide = sum(bits >= 128 and bits for _, bits in accesses) // 8
    threads = 32 * case.options.get("num_warps", 4)
    return Reading(
        name=case.name,
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        # LDL and STL are spills, which the usage line does not always count.
        local=usage["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        load_bits=max(loads, default=0),
        store_bits=max(stores, default=0),
        product=max(re.findall(r"\b(?:UTC)?[HQ]G?MMA\b", code), key=len, default="-"),
        bytes_per_element=wide * threads / case.elements if case.elements else None,
        floor=case.floor,
    )


def _bits(suffix: str) -> int:
    match = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", suffix)
    return int(match.group(1)) if match else 32


def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = [
            subprocess.run([tools / tool, *flags, path], capture_output=True, text=True, check=True).stdout
            for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm",))
        ]
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run[0])}, run[1]


def report(archs: Iterable[int] = ARCHS) -> list[Reading]:
    """Readings of all cases."""
    every = [(case, arch) for cases in CASES for case in cases() for arch in archs]
    return [read(case, arch) for case, arch in every if case.archs is None or arch in case.archs]


def table(readings: Iterable[Reading]) -> str:
    """The readings as Markdown."""
    lines = [
        "| kernel | sm | registers | stack | local | shared | load bits | store bits | product | bytes/element "
        "| floor |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in readings:
        moved, floor = (f"{x:g}" if x is not None else "-" for x in (r.bytes_per_element, r.floor))
        lines.append(
            f"| {r.name} | {r.arch} | {r.registers} | {r.stack} | {r.local} | {r.shared} "
            f"| {r.load_bits} | {r.store_bits} | {r.product} | {moved} | {floor} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities, 90 for sm_90")
    parser.add_argument("--json", type=Path, help="also write the readings to this file")
    args = parser.parse_args()
    readings = report(args.arch)
    print(table(readings))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in readings], indent=1))


if __name__ == "__main__":
    main()
