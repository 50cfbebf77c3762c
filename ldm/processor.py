"""What the CPU is, in its own words: who made it, and which instructions it has."""

import platform
from functools import cache


@cache
def vendor() -> str:
    """Return who made it, such as AuthenticAMD or GenuineIntel; "" where the system doesn't say."""
    words = _words("vendor_id")
    if words:
        return words
    said = platform.processor()  # of Windows: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD"
    return said.rpartition(", ")[2] if "," in said else ""


@cache
def has(instructions: str) -> bool:
    """Return whether it has them, by Linux's name, such as avx512_bf16; False where the system doesn't say."""
    return instructions in _words("flags").split()


def multiplies_bfloat16() -> bool:
    """Return whether it has instructions for products of bfloat16; without, they take longer than float32's."""
    return has("avx512_bf16") or has("amx_bf16")


def _words(name: str) -> str:
    """What Linux says of the first processor under a name, else ""."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
    except OSError:
        return ""
