"""Talk about an image in the terminal, in Chinese or English.

    python cli_demo.py --from_pretrained output/training_.../best_model
    python cli_demo.py --from_pretrained output/.../best_model --image_path scene.tif --language zh
    python cli_demo.py --from_pretrained output/.../best_model --quant 4                  # CUDA, bitsandbytes
    printf 'scene.tif\\n图中有什么？\\nstop\\n' | python cli_demo.py --from_pretrained ...

Type the path of an image, then ask; the turns before stay with the image. `image PATH` takes another one, `clear` forgets the
turns, `before` asks the last question again without the adapter, `stop` ends. Ctrl-C stops the answer, not the program.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from pathlib import Path

from config import SURROGATE, InputError, add_device_flags, refuse_outside, user_errors
from scenes import IMAGE_SUFFIXES, path_of

SAY = {
    "image": ("Image (path, or empty for none): ", "图像路径（留空则无图像）："),
    "ask": ("You: ", "提问："),
    "answer": ("Model: ", "回答："),
    "before": ("Without the adapter: ", "未加适配器："),
    "hello": (
        "Commands: image PATH, clear, before, stop. Ctrl-C stops an answer.",
        "命令：image 路径（换图）、clear（清空对话）、before（不用适配器再答）、stop（退出）。Ctrl-C 中断当前回答。",
    ),
    "cleared": ("The turns are forgotten.", "对话已清空。"),
    "stopped": (" [stopped]", " [已中断]"),
    "bytes": ("The line is not UTF-8: set the terminal's encoding.", "该行不是 UTF-8 编码：请设置终端编码。"),
    "path": ("image PATH: give the path of an image.", "image 路径：请给出图像路径。"),
    "nothing": ("There is no question yet.", "还没有问题。"),
    "cut": ("The earliest turns are left out: the conversation is too long.", "对话过长，最早的几轮已省略。"),
}
COMMANDS = {"stop": "stop", "exit": "stop", "quit": "stop", "退出": "stop", "clear": "clear", "清空": "clear",
            "before": "before"}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from_pretrained", required=True, help="adapter: best_model/ or checkpoint-N/ of train_vqa.py"
    )
    parser.add_argument("--base_model", help="folder of the base, if it is not where it was in training")
    parser.add_argument("--quant", choices=["4", "8"], help="load the base in 4 or 8 bits (CUDA and bitsandbytes)")
    parser.add_argument(
        "--language", choices=["zh", "en"], default="zh", help="language of the program's own words (default: zh)"
    )
    parser.add_argument("--image_path", help="the first image")
    parser.add_argument("--max_length", type=int, default=512, help="most tokens of an answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: draw words; 0: the likeliest ones")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="with --temperature: draw from the likeliest words of this total share"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other words")
    parser.add_argument("--max_turns", type=int, default=20, help="turns that are remembered (default: 20)")
    add_device_flags(parser)
    return parser


class Talk:
    """One conversation: an image, the turns about it, and how answers are made."""

    def __init__(self, model, args, say):
        self.model, self.args, self.say = model, args, say
        self.image: str | None = None
        self.pixels: dict = {}
        self.turns: list[tuple[str, str]] = []
        self.asked: tuple[str, list] | None = None
        self.stopped = False

    def take(self, path: str | None) -> None:
        """Another image; the turns about the one before go. Raises imagery.ImageError."""
        from model import pixel_store

        # Read once for all turns; an unreadable file is said now, and the old image stays.
        self.pixels = {path: pixel_store(self.model)[path]} if path else {}
        self.image, self.turns, self.asked = path or None, [], None

    def answer(self, question: str, history, label: str) -> str | None:
        """Ask, and write the answer as it comes. Ctrl-C ends it where it is. None for a question longer than the base reads."""
        from transformers import TextStreamer

        class Shown(TextStreamer):
            def on_finalized_text(self, text, stream_end=False):
                """A model may say anything: what would move the cursor or colour the terminal is left out."""
                print(
                    "".join(c for c in text if c.isprintable() or c in "\n\t"),
                    end="\n" if stream_end else "",
                    flush=True,
                )

        print(self.say(label), end="", flush=True)
        self.stopped = False
        old = signal.signal(signal.SIGINT, lambda *_: setattr(self, "stopped", True))
        try:
            said = self.model.chat(
                self.image, question, history, max_tokens=self.args.max_length, temperature=self.args.temperature,
                top_p=self.args.top_p, stop=lambda: self.stopped, store=self.pixels,
                cut=lambda _: print(f"{self.say('cut')}\n{self.say(label)}", end="", flush=True),
                streamer=Shown(self.model.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )  # fmt: skip
        except InputError as error:
            print(f"\n{error}")
            return None
        finally:
            signal.signal(signal.SIGINT, old)
        if self.stopped:
            print(self.say("stopped"))
        return said

    def line(self, text: str) -> bool:
        """One line of the user's; False when it ends the conversation."""
        from imagery import ImageError

        text = text.strip()
        if SURROGATE.search(text):  # bytes that were no UTF-8
            print(self.say("bytes"))
            return True
        word, (first, *rest) = COMMANDS.get(text.lower()), text.split(maxsplit=1)
        path = file_named(text)  # a file's name alone is no question: it was dragged here
        if not os.path.isfile(path):
            if first.lower() in ("image", "图像", "换图"):
                path = file_named("".join(rest))
                if path and not os.path.isfile(path) and not re.search(r"[/\\]|\.\w+$", path):
                    path = None  # "image quality?" is a question
            elif not named_like_a_picture(path):
                path = None
        if word == "stop":
            return False
        if word == "clear":
            self.turns, self.asked = [], None
            print(self.say("cleared"))
        elif word == "before":
            if not self.asked:
                print(self.say("nothing"))
            else:
                with self.model.before():
                    self.answer(*self.asked, "before")
        elif path is not None:
            try:
                if path:
                    self.take(path)
                print(Path(path).name if path else self.say("path"))
            except ImageError as error:
                print(error)
        else:
            self.asked = text, [*self.turns]
            said = self.answer(*self.asked, "answer")
            if said is None:
                self.asked = None
                return True
            self.turns.append((text, said or "…"))
            if len(self.turns) > self.args.max_turns:
                self.turns = self.turns[-self.args.max_turns :]
                print(self.say("cut"))
        return True


def named_like_a_picture(text: str) -> bool:
    """Whether a line that names no file was meant to: a wrong path is no question about the image before."""
    return Path(text).suffix.lower() in IMAGE_SUFFIXES and (" " not in text or bool(re.search(r"[/\\]", text)))


def file_named(text: str) -> str:
    """The path that a user typed, pasted or dragged here: there is no shell to take its quotes, ~ and \\ away."""
    if os.path.isfile(text.strip()):
        return text.strip()
    path = os.path.expanduser(path_of(text.strip().strip("\"'“”‘’")))
    if os.path.exists(path):
        return path
    with contextlib.suppress(ValueError):  # as a terminal writes what is dropped on it: it\'s.tif, a\(1\).tif
        parts = shlex.split(text)
        if len(parts) == 1 and os.path.exists(parts[0]):
            return parts[0]
    return path.replace("\\ ", " ")


def reader():
    """A function that asks for a line; prompt_toolkit in a terminal, for it edits wide characters rightly and keeps a
    history; plain lines from a pipe. Raises EOFError at the end."""
    if not sys.stdin.isatty():
        for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
            if hasattr(stream, "reconfigure"):  # bytes that are no UTF-8 are told, not a traceback
                stream.reconfigure(errors=errors)

        def read(prompt):
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            line = line.rstrip("\n").removeprefix("\ufeff")  # Windows' editor begins a file so
            print(prompt + line)  # so that what is kept of the output reads as a conversation
            return line

        return read
    from prompt_toolkit import PromptSession

    session = PromptSession()
    return session.prompt


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    refuse_outside(
        args, max_length=(1, 8192), temperature=(0, 100), top_p=(0.01, 1), max_turns=(1, 1000), seed=(0, 2**32 - 1)
    )
    from transformers import set_seed
    from transformers.utils import logging

    from imagery import ImageError
    from model import VQA, pick_device

    logging.disable_progress_bar()
    device, dtype = pick_device(args.device, args.dtype)
    model = VQA.from_pretrained(
        args.from_pretrained, base_model=args.base_model, device=device, dtype=dtype, quantize=args.quant or "none"
    )
    set_seed(args.seed)
    talk = Talk(model, args, lambda key: SAY[key][args.language == "zh"])
    read = reader()
    print(talk.say("hello"))
    path = args.image_path
    if path:
        talk.take(path)
    while path is None:
        try:
            said = read(talk.say("image"))
            path = file_named(said)
            if not os.path.isfile(path):
                path = file_named(re.sub(r"^\s*(image|图像|换图)\s+", "", said, flags=re.IGNORECASE))
            if COMMANDS.get(path.lower()) == "stop":
                return 0
            talk.take(path)
        except (EOFError, KeyboardInterrupt):
            return 0
        except ImageError as error:
            print(error)
            path = None
    if talk.image:
        print(Path(talk.image).name)
    while True:
        try:
            text = read(talk.say("ask"))
        except EOFError:
            return 0
        except KeyboardInterrupt:
            continue  # at the prompt: drops the line, as in a shell
        if text.strip() and not talk.line(text):
            return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
