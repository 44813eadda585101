"""Which machine this is, as far as the speed of a network depends on it."""

from __future__ import annotations

import os
import platform
from functools import cache

INSTRUCTIONS = "avx avx2 avx512f avx512_vnni avx_vnni amx_int8 amx_bf16 asimd asimddp i8mm sve sme".split()
"""The vector and matrix instructions that decide how fast a convolution can be, by the kernel's names for them."""


@cache
def processor() -> str:
    """The processor's name as it gives it itself, or as good a one as there is."""
    return _from_cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def instructions() -> frozenset[str]:
    """Those of ``INSTRUCTIONS`` that this processor has; empty where the system does not tell."""
    told = (_from_cpuinfo("flags") or _from_cpuinfo("Features")).split()
    return frozenset(INSTRUCTIONS).intersection(told)


@cache
def machine() -> str:
    """``AMD EPYC (x86_64, 2 cores, avx avx2)``: machines that tell the same are taken to be as fast as each other."""
    known = [name for name in INSTRUCTIONS if name in instructions()]
    cores = f"{os.cpu_count()} cores"
    return f"{processor()} ({', '.join([platform.machine(), cores, *([' '.join(known)] if known else [])])})"


def _from_cpuinfo(field: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), ""
            )
    except OSError:
        return ""
