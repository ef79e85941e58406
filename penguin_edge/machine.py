"""What this machine has: memory, processor, bandwidth, installed engines."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penguin_edge.errors import MemoryLimitError

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "f16c", "asimd", "asimddp", "i8mm", "sve", "fphp")
"""Processor features that decide which kernels an engine picks."""
PACKAGES = (
    "penguin-edge",
    "numpy",
    "pillow",
    "av",
    "opencv-python-headless",
    "tokenizers",
    "safetensors",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "executorch",
    "torchao",
    "tensorrt",
    "transformers",
    "huggingface-hub",
    "matplotlib",
)
"""Distributions whose versions say most about a machine; those of the engines are among them."""


@dataclass(frozen=True)
class Package:
    """A distribution that is installed on demand, and the line for a shell that installs it."""

    name: str
    install: str

    @property
    def version(self) -> str | None:
        """The version that is installed; None where it is absent."""
        return version_of(self.name)


TORCH = Package("torch", "pip install torch==2.13.0")
EXPORTERS = f"{TORCH.install} && pip install 'penguin-edge[export]'"
"""What installs the reference model and the exporters of all targets."""

MADV_PAGEOUT = 21
"""Advice number of `madvise` (Linux 5.4 and newer): write dirty pages, drop clean ones."""
M_MMAP_THRESHOLD, LARGE = -3, 1 << 18
"""Parameter number of glibc's `mallopt`, and bytes of a block that does not come from the heap."""


def human_bytes(count: float) -> str:
    """Bytes in GB, MB or kB, powers of ten."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def int8_overflows() -> bool:
    """Whether products of uint8 and int8 may overflow here: on x86 without VNNI, or where that cannot be told."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(processor()[1])


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's limit if that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        total = min(total, limit)
    return total


def require_memory(need: int, what: str, advice: str, limit: int | None = None) -> None:
    """Refuse work before it starts when it can never fit.

    Raises:
        MemoryLimitError: `need` bytes are more than `limit` (default: what the machine has); `what` begins the
            message, `advice` ends it.
    """
    limit = total_memory() if limit is None else limit
    if need > limit:
        raise MemoryLimitError(
            f"{what} needs about {human_bytes(need)} of memory, this machine offers {human_bytes(limit)}; {advice}"
        )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def page_out(path: Path) -> None:
    """Give back the memory in which this process has `path` mapped; what is read again comes from the file.

    Meant for a runtime that has copied what it needs and keeps the file mapped. Does nothing but on Linux and Android.
    """
    name = str(path.resolve())
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] == name:
                begin, end = (int(address, 16) for address in fields[0].split("-"))
                # Not MADV_DONTNEED, which would throw away what has been written to a private mapping.
                madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_heap_compact() -> None:
    """Take large blocks from the system and give them back to it, for a program that runs for days. glibc only.

    Left alone, glibc raises that limit to the largest block that was ever freed: pictures then lie in the heap between
    small arrays that stay, and leave holes that the next, larger one does not fit into.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def peak_mb() -> float:
    """Peak resident memory of this process, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def resident_mb(process: int | str = "self") -> float:
    """Resident memory of a process, by default this one, in MB; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor() -> tuple[str, list[str]]:
    """Name of the processor, and the features of `FEATURES` that it has."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass
    return name, [feature for feature in FEATURES if feature in flags]


def version_of(distribution: str) -> str | None:
    """The version that is installed; None where it is absent. Nothing is imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> dict[str, str | None]:
    """Installed versions of `PACKAGES`."""
    return {name: version_of(name) for name in PACKAGES}


def describe() -> dict[str, Any]:
    """Everything above, as JSON."""
    name, features = processor()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": name,
        "features": features,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": total_memory(),
        "available_bytes": available_memory(),
        "packages": packages(),
    }
