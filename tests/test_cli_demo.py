"""cli_demo.py: turns, another image, clear, before, and Ctrl-C, through a pipe and in-process."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import cli_demo
from config import InputError
from model import VQA
from tests.conftest import draw
from tests.processes import run_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("场景 图")  # a Chinese name with a space
    draw(root / "a.png", 1, (60, 84), (40, 120, 60))
    draw(root / "b.tif", 2, (84, 60), (150, 120, 60))
    return root


def talk(chat_adapter, lines, *flags) -> subprocess.CompletedProcess:
    words = ["cli_demo.py", "--from_pretrained", chat_adapter, "--max_length", "6", "--device", "cpu", *flags]
    return run_script([sys.executable, *words], input="\n".join(map(str, lines)) + "\n")


def test_a_conversation_through_a_pipe(chat_adapter, pictures):
    lines = [f"\ufeff{pictures / 'none.png'}", pictures / "a.png", "How many buildings?", "And now?", "before", "clear", "before",
             f"image {pictures / 'b.tif'}", "图中有什么？", "image nowhere.tif", "gone/else.TIF", "stop",
             "never reached"]  # fmt: skip
    made = talk(chat_adapter, lines, "--language", "en")
    assert made.returncode == 0, made.stderr
    out = made.stdout
    assert "no such file" in out and "\ufeff" not in out  # a file of Windows' editor begins with the mark
    assert "The turns are forgotten." in out and "There is no question yet." in out
    assert (
        out.count("Model: ") == 3
        and out.count("Without the adapter: ") == 1
        and "nowhere.tif" in out
        and "gone/else.TIF: no such" in out
    )
    assert "\nb.tif\n" in out.replace("You: ", "\n")
    # The answers are those of `chat`, and the second has the first as its history.
    model = VQA.from_pretrained(chat_adapter)
    a, b = str(pictures / "a.png"), str(pictures / "b.tif")
    first = model.chat(a, "How many buildings?", max_tokens=6)
    second = model.chat(a, "And now?", [("How many buildings?", first)], max_tokens=6)
    third = model.chat(b, "图中有什么？", max_tokens=6)
    with model.before():
        base = model.chat(a, "And now?", [("How many buildings?", first)], max_tokens=6)

    def shown(label):
        return [part.split("You: ")[0].strip() for part in out.replace("Without", "You: Without").split(label)[1:]]

    assert shown("Model: ") == [printable(text) for text in (first, second, third)]
    assert shown("Without the adapter: ")[0].split("\nThe turns")[0].strip() == printable(base)


def printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c in "\n\t").strip()


def test_a_question_that_is_too_long_ends_nothing(capsys):
    class Model:
        tokenizer = None

        def before(self):
            return contextlib.nullcontext()

        def chat(self, *words, **options):
            raise InputError("longer than the base reads")

    talk = cli_demo.Talk(Model(), cli_demo.build_parser().parse_args(["--from_pretrained", "x"]), lambda key: key)
    assert talk.line("river " * 9) and not talk.turns and talk.asked is None
    talk.asked = "Where?", []
    assert talk.line("before")
    assert capsys.readouterr().out.count("\nlonger than the base reads\n") == 2


def test_bytes_that_are_no_utf8_are_said_and_the_talk_goes_on(chat_adapter, pictures):
    words = ["cli_demo.py", "--from_pretrained", str(chat_adapter), "--max_length", "4", "--device", "cpu",
             "--image_path", str(pictures / "a.png"), "--language", "en"]  # fmt: skip
    said = "大\n".encode("gbk") + b'image\nimage ""\nWhat?\nstop\n'
    made = subprocess.run([sys.executable, *words], input=said, capture_output=True, timeout=120, cwd=ROOT)
    out = made.stdout.decode(errors="replace")
    assert made.returncode == 0 and "not UTF-8" in out and out.count("give the path") == 2 and out.count("Model: ") == 1


def test_chinese_words_of_its_own(chat_adapter, pictures):
    made = talk(chat_adapter, ["图中有什么？", "退出"], "--image_path", pictures / "a.png", "--language", "zh")
    assert made.returncode == 0 and "回答：" in made.stdout and "命令" in made.stdout


def test_ctrl_c_stops_the_answer_not_the_program(capsys):
    """A model that would talk for ever, and a Ctrl-C while it does."""

    class Endless:
        tokenizer = None

        def chat(self, image, question, history, *, stop, **_):
            timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            end = time.monotonic() + 20
            while not stop():
                assert time.monotonic() < end, "Ctrl-C did not reach the answer"
                time.sleep(0.01)
            return "so far"

    before = signal.getsignal(signal.SIGINT)
    args = cli_demo.build_parser().parse_args(["--from_pretrained", "x", "--language", "en"])
    talk = cli_demo.Talk(Endless(), args, lambda key: cli_demo.SAY[key][0])
    assert talk.line("What is there?") and talk.turns == [("What is there?", "so far")]
    assert "[stopped]" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before, "at the prompt Ctrl-C is what it was"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_length", 0], "--max_length 0"),
        (["--top_p", 0], "--top_p"),
        (["--quant", 4, "--device", "cpu"], "needs CUDA"),
        (["--image_path", "nowhere.tif"], "nowhere.tif"),
    ],
)
def test_refusals(chat_adapter, call_main, flags, said):
    code, _, err = call_main(cli_demo.main, "--from_pretrained", chat_adapter, *flags)
    assert code == 2 and said in err and "Traceback" not in err
    code, _, err = call_main(cli_demo.main, "--from_pretrained", "nowhere")
    assert code == 2 and "nowhere" in err


def test_paths_as_a_terminal_gives_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "my dir" / "图 1.png"
    path.parent.mkdir()
    path.write_bytes(b"")
    for said in ("~/my dir/图 1.png", str(path).replace(" ", "\\ "), f"'{path}'", path.as_uri(), f" {path} "):
        assert cli_demo.file_named(said) == str(path), said
    assert cli_demo.file_named("Is there a lake?") == "Is there a lake?"
    odd = tmp_path / "it's (1).tif"
    odd.write_bytes(b"")
    for said in (
        shlex.quote(str(odd)),
        str(odd).replace("'", "\\'").replace(" ", "\\ ").replace("(", "\\(").replace(")", "\\)"),
    ):
        assert cli_demo.file_named(said) == str(odd), said
    assert cli_demo.file_named("it's a lake") == "it's a lake"
    quoted = tmp_path / "“a b” c.tif"
    quoted.write_bytes(b"")
    assert cli_demo.file_named(str(quoted)) == str(quoted) and cli_demo.file_named(f"“{odd}”") == str(odd)
