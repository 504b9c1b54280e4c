"""Processes of their own for what a test must kill, pair with another or talk to.

Importing torch, transformers and peft takes longer than most of what is tested, so these are forks of a process that has
only imported them (the standard library's forkserver): autograd, which does not survive a fork, was never used in it. What
is about a fresh interpreter (its encoding, its exit code, torchrun) is tested in real ones."""

import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from tests.conftest import free_port

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")  # Windows has no fork
FORKS.set_forkserver_preload(["peft", "datasets", "train_match", "train_vqa", "train_caption", "library", "openai"])


@contextmanager
def forked(function, *args, log: Path | None = None, folder: Path = ROOT, **environment: str):
    """`function(*args)` in a process in `folder` that is killed at the end; what it says goes to `log`."""
    process = FORKS.Process(target=_call, args=(function, args, log, folder, environment))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _call(function, args, log, folder, environment):
    multiprocessing.set_start_method(None, force=True)  # the platform's own again, for what this process starts
    os.environ.update(environment)
    os.chdir(folder)
    _redirect(os.devnull, *[log or os.devnull] * 2)
    function(*args)


def _redirect(*places) -> None:
    """Standard input, output and errors come from and go to the ends of these files."""
    for number, (name, place) in enumerate(zip(("stdin", "stdout", "stderr"), places)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY), number)
        stream = io.TextIOWrapper(io.FileIO(number, "w" if number else "r", closefd=False), "utf-8", write_through=True)
        setattr(sys, name, stream)


def run_on_two(function, *args) -> None:
    """`function(*args)` in each of two processes that torchrun might have started; fails with what they said."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        log, left = Path(folder) / "log", {}
        for rank in "01":
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = stack.enter_context(forked(function, *args, log=log, **places))
            left[process.sentinel] = process
        while left:
            over = wait(left, timeout=240)
            assert over, log.read_text()[-3000:]
            for process in map(left.pop, over):
                process.join()
                assert process.exitcode == 0, log.read_text()[-3000:]


def run_on_two_processes(*words) -> None:
    """`torchrun --nproc_per_node 2 words...`; fails with what the processes said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert made.returncode == 0, made.stderr[-3000:]


def run_script(command: list, *, input: str = "") -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, script, *words], input=..., capture_output=True, text=True)`."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("in", "out", "err")]
        places[0].write_text(input, encoding="utf-8")
        with forked(_script, [str(word) for word in command[1:]], places) as process:
            process.join(240)
            assert process.exitcode is not None, f"{command}: not over after 240 s"
        out, err = (place.read_text(encoding="utf-8") for place in places[1:])
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _script(argv, places):
    _redirect(*places)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def _serve(words) -> None:
    """`transformers words...`. Qwen-VL's processor has a part for videos, which needs torchvision. Where that is absent the
    server starts without the part: nobody asks about a video, and images go through the Pillow processor, as in this project."""
    from transformers import ProcessorMixin
    from transformers.cli.transformers import main
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        check = ProcessorMixin.check_argument_for_proper_class
        AutoVideoProcessor.from_pretrained = lambda *_, **__: None
        ProcessorMixin.check_argument_for_proper_class = lambda self, name, given: (
            given is None or check(self, name, given)
        )
    sys.argv = ["transformers", *words]
    sys.exit(main())


@contextmanager
def transformers_serve(name: str, folder: Path):
    """`transformers serve NAME` in `folder`; gives the address, ends the server whatever happens."""
    port, log = free_port(), folder / "log"
    words = ["serve", name, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with forked(_serve, words, log=log, folder=folder, HF_HUB_OFFLINE="1") as running:
        end = time.monotonic() + 180
        while True:
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert running.is_alive() and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
