"""A run killed at random moments and resumed each time ends bit by bit as one that nothing stopped.

    python benchmarks/kill_and_resume.py                     # ten SIGKILLs; needs `make demo` (data and models)
    python benchmarks/kill_and_resume.py --kills 3 --seed 1 -- --image_tower lora --text_tower lora

Words after `--` go to train_match.py. Prints one line per kill (where the run was, what it had to resume from) and
exits with 1 if any tensor of best_model/ or of the last checkpoint, its optimizer included, differs.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import InputError, resolve_checkpoint  # noqa: E402
from trainer import read_history  # noqa: E402

# Small, with all that a resumed run could get wrong: dropout, drawn texts, micro-batches, checkpoints inside an epoch.
SMALL = """
    --preset demo --image_tower lora --text_tower lora --lora_dropout 0.1 --projection_dropout 0.1 --texts_per_scene 2
    --max_samples 60 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_train_epochs 6
    --eval_strategy steps --save_strategy steps --eval_steps 5 --save_steps 5 --logging_steps 1 --report_to none
    --disable_tqdm true""".split()  # noqa: SIM905


def start(flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train_match.py"), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def await_training(process: subprocess.Popen, run: Path) -> None:
    """Return when the process begins to train, or ends: metrics.jsonl is written anew. A kill before that is none."""
    history = run / "metrics.jsonl"
    stale = history.stat().st_mtime_ns if history.exists() else 0
    while process.poll() is None and (not history.exists() or history.stat().st_mtime_ns == stale):
        time.sleep(0.02)


def finish(flags: list[str], run: Path) -> float:
    """Run to the end; the seconds from the first training step to the last log row."""
    process = start(flags)
    await_training(process, run)
    began = time.time()
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"train_match.py failed ({process.returncode}):\n{errors[-3000:]}")
    return (run / "metrics.jsonl").stat().st_mtime - began


def whole_checkpoints(run: Path) -> list[int]:
    """Steps of the folders named checkpoint-N; each of them must load."""
    steps = []
    for folder in run.glob("checkpoint-*"):
        if folder.name[11:].isdigit():
            load_file(folder / "model.safetensors")
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(folder / name, weights_only=True)
            steps.append(int(folder.name[11:]))
    return sorted(steps)


def differences(one, other, where: str) -> list[str]:
    if torch.is_tensor(one):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if set(one) != set(other):
            return [f"{where} (keys)"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where} (length)"]
        return [d for i, (a, b) in enumerate(zip(one, other)) for d in differences(a, b, f"{where}[{i}]")]
    return [] if one == other else [where]


def main() -> int:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; timing varies all the same")
    parser.add_argument("--output", type=Path, help="folder of both runs (default: a temporary one)")
    args = parser.parse_args(argv[:cut])
    moments = random.Random(args.seed)
    folder = args.output or Path(tempfile.mkdtemp(prefix="kill_and_resume_"))
    whole, killed = folder / "uninterrupted", folder / "killed"
    flags = [*SMALL, *argv[cut + 1 :]]

    seconds = finish([*flags, f"--output_dir={whole}"], whole)
    last = max(whole_checkpoints(whole))
    print(f"uninterrupted: {last} steps in {seconds:.1f} s, checkpoints {whole_checkpoints(whole)}\n")
    print(f"{'kill':>4}  {'after s':>7}  {'at step':>7}  {'while':<24}  resumes from")
    kills, reached = 0, 0
    while kills < args.kills:
        try:
            words = ["--resume_from_checkpoint", str(resolve_checkpoint(killed))]
        except InputError:  # killed before the first checkpoint: from the start again
            words = [*flags, f"--output_dir={killed}"]
        began = time.perf_counter()
        process = start(words)
        await_training(process, killed)
        # On average the run's length in all; what is lost since the last checkpoint comes on top, so the run lasts.
        time.sleep(moments.uniform(0, 2 * seconds / (args.kills + 1)))
        if process.poll() is not None:
            print(f"      the run ended before kill {kills + 1}")
            break
        process.kill()
        process.communicate()
        kills += 1
        partial = [path.name for path in killed.iterdir() if path.suffix in (".partial", ".deleted")]
        rows = read_history(killed)
        reached = rows[-1]["step"] if rows else 0
        steps = whole_checkpoints(killed)
        what = f"writing {partial[0]}" if partial else "training or evaluating"
        resumes = resolve_checkpoint(killed).name if steps else "the start"
        print(f"{kills:>4}  {time.perf_counter() - began:>7.1f}  {reached:>7}  {what:<24}  {resumes}", flush=True)
    try:
        words = ["--resume_from_checkpoint", str(resolve_checkpoint(killed))]
    except InputError:
        words = [*flags, f"--output_dir={killed}"]
    finish(words, killed)

    found, tensors = [], 0
    for name in ("best_model", f"checkpoint-{last}"):
        one, other = (load_file(run / name / "model.safetensors") for run in (whole, killed))
        tensors += len(one)
        found += differences(one, other, name)
    one, other = (torch.load(run / f"checkpoint-{last}" / "optimizer.pt", weights_only=True) for run in (whole, killed))
    tensors += sum(len(state) for state in one["state"].values())
    found += differences(one, other, "optimizer")
    print(f"\n{kills} kills; {tensors} tensors of best_model, checkpoint-{last} and its optimizer compared: ", end="")
    print("all equal bit by bit" if not found else f"{len(found)} differ, e.g. {found[:3]}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
