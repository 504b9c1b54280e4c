"""What the benchmarks share. Imports nothing of the project at the top: swift_worker.py runs in a venv of its own."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch


class KeepsLosses:
    """Mixed into either side's trainer: the loss of every micro-batch."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.detach().float()]
        return loss


def say(line: str) -> None:
    print(line, flush=True)


def check_options(options, *positive: str) -> None:
    """Raises InputError: one of `positive` below 1, a device that is not there."""
    from config import InputError

    for name in positive:
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here")


def read_words(tokenizer: Path) -> tuple[dict, list[tuple[str, str]]]:
    """(vocabulary, merges) of a folder with Qwen2's tokenizer."""
    merges = [tuple(line.split(" ")) for line in (tokenizer / "merges.txt").read_text().splitlines() if " " in line]
    merges = merges[1:] if merges[0][0].startswith("#version") else merges
    return json.loads((tokenizer / "vocab.json").read_text()), merges


def measured_apart(script: str, argv: list[str], side: str) -> dict:
    """What `script --measure side` prints at its end, in a process of its own."""
    command = [sys.executable, script, *argv, "--measure", side]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"{side!r} failed in a process of its own:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.strip().splitlines()[-1])


def peak_memory(device: str) -> int:
    """Highest memory of this process so far, in bytes: resident on a CPU (Linux: VmHWM, because ru_maxrss of a child
    starts at its parent's), allocated by torch on CUDA."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
