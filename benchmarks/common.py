"""What the benchmarks share. Without imports of the project: swift_worker.py runs in a venv of its own."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch


def peak_memory(device: str) -> int:
    """Highest memory of this process so far, in bytes: resident on a CPU (Linux: VmHWM, because ru_maxrss of a child
    starts at its parent's), allocated by torch on CUDA."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_own_process(script: str, argv: list[str]) -> dict:
    """The JSON that `script argv` prints last, in a process whose peak of memory is its own."""
    child = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"{' '.join(argv)} failed in a process of its own:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.strip().splitlines()[-1])
