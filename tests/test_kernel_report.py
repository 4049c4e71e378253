"""The machine code of every kernel: no spills, and a main path of 128-bit accesses that moves no byte too many."""

from __future__ import annotations

import pytest

from benchmarks import kernel_report
from fastrm.kernels._dispatch import triton
from tests.interpreted import INTERPRETED

if triton is None or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

CASES = {case.name: case for cases in kernel_report.CASES for case in cases()}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel(name: str, arch: int) -> None:
    case = CASES[name]
    if case.archs and arch not in case.archs:
        pytest.skip(f"{name} is not launched there")
    reading = kernel_report.read(case, arch)
    assert (reading.stack, reading.local) == (0, 0), reading
    assert reading.load_bits >= 128, reading
    if "sweep" in name and "f32" not in name:
        assert reading.product == ("HGMMA" if arch == 90 else "HMMA"), reading
    if reading.bytes_per_element is not None:
        assert reading.store_bits >= 128, reading
        assert reading.bytes_per_element == reading.floor, reading


def test_a_narrow_path_and_a_spill_are_seen() -> None:
    case = CASES["ema f32 <- f32"]
    unaligned = kernel_report.replace(case, constants={**case.constants, "BLOCK": 128})
    assert kernel_report.read(unaligned, 90).load_bits < 128
    tight = CASES["adamw f32 + teacher f32"]
    spilled = kernel_report.read(kernel_report.replace(tight, options={**tight.options, "maxnreg": 32}), 90)
    assert spilled.local > 0
    assert "| 90 |" in kernel_report.table([spilled])


def test_an_argument_that_the_case_forgot() -> None:
    case = CASES["ema f32 <- f32"]
    with pytest.raises(ValueError, match="BLOCK"):
        kernel_report.read(kernel_report.replace(case, constants={}), 90)
