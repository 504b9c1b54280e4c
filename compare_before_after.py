"""Show what fine-tuning changed: the same questions about the same images, answered with the adapter off and on.

    python compare_before_after.py --base Qwen/Qwen2-VL-2B-Instruct --lora output/training_.../best_model --num_samples 20
    python compare_before_after.py --lora output/training_.../best_model --only lost --type count area
    python compare_before_after.py --preset demo

Prints the answers, and leaves in compare/ beside the adapter: samples.jsonl, and report.html with the pictures. Both
answers come from one model in memory (`VQA.before`), with one prompt, one reading of each image and one decoding.
"""

import argparse
import dataclasses
import os
import random
import shlex
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report
from config import (
    PRESETS,
    InputError,
    VQAConfig,
    add_device_flags,
    record_of,
    refuse_unwritable,
    user_errors,
    was_trained_on,
)

# What --preset fills in. `full` has no --lora: a run's folder carries its date.
DEFAULTS = {
    "full": {"base": None, "lora": None, "data": "data_vl_test.json"},
    "demo": {
        "base": "models/demo/qwen2_5_vl",
        "lora": "output/demo_vqa/best_model",
        "data": "data/demo/data_vl_test.json",
    },
}
CHUNK = 16  # scenes read and answered at a time: what is in memory does not grow with the data
PRINTED, PICTURED = 100, 500  # most samples in the terminal and on the page, whose pictures take 20 KB each


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="full", choices=list(DEFAULTS), help="demo: small model, drawn scenes, CPU")
    parser.add_argument("--base", help="folder of the base (default: the one the adapter names)")
    parser.add_argument("--lora", help="adapter: best_model/ or checkpoint-N/ of a train_vqa.py run, or another tool's")
    parser.add_argument("--data", help="questions, as for train_vqa.py (default: data_vl_test.json)")
    parser.add_argument("--image_root", help="folder that image names are relative to (default: the data file's)")
    parser.add_argument(
        "--num_samples", type=int, default=20, help="questions to show, of all types in turn (0: all of them)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other questions")
    parser.add_argument("--type", nargs="+", action="extend", help="only questions of these types")
    parser.add_argument(
        "--test_split", default="test", help="which `split` of the data is the test (RSVQA HR: also test_phili)"
    )
    parser.add_argument(
        "--only", nargs="+", action="extend", choices=list(report.FLIPS), metavar="FLIP",
        help="show only these: " + "; ".join(f"{flip} ({text})" for flip, text in report.FLIPS.items())
        + ". Images are searched, with all of their questions, until --num_samples are found",
    )  # fmt: skip
    parser.add_argument(
        "--decode", default="generate", choices=["generate", "candidates"],
        help="greedy generation, or the most probable of the answers the adapter's training split has for the type",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", help="how an adapter of another tool is asked, with {question} in it (ours record it)"
    )
    parser.add_argument("--output", help="folder for samples.jsonl and report.html (default: compare/ beside --lora)")
    add_device_flags(parser)
    parser.add_argument(
        "--max_rejected", type=float, default=0.01, help="share of rows, and of images, that may be unusable (0 to 1)"
    )
    return parser


# ----------------------------------------------------------------------------------------------------
# Questions


def read_questions(
    path: str, *, image_root: str | None, max_rejected: float, types: list[str] | None = None, test_split: str = "test"
):
    """(scenes, one line on them): the test split of a file that names splits, else its validation split, else all of
    it; with `types` only questions of these. Raises InputError."""
    from scenes import QuestionScene, read_conversations, refuse_absent_split

    found = read_conversations(path, image_root=image_root, max_rejected=max_rejected)
    scenes, split = found.scenes, "all splits"
    for name in (test_split, "val"):
        if own := [scene for scene in found.scenes if scene.split == name]:
            scenes, split = own, f"{name} split"
            break
    named = {scene.split for scene in found.scenes}
    others = sorted({name for name in named if name and name.startswith("test")} - {test_split})
    if others or test_split != "test":
        refuse_absent_split(test_split, named)
    if others:
        split += f" (--test_split {others[0]} takes that one)"
    known = sorted({q.kind or "question" for scene in scenes for q in scene.questions})
    if unknown := sorted(set(types or []) - set(known)):
        raise InputError(f"--type {unknown[0]}: no question of {path} is of it; there are {', '.join(known)}")
    if types:
        chosen = [(s, [q for q in s.questions if (q.kind or "question") in types]) for s in scenes]
        scenes = [QuestionScene(s.image, questions, s.split) for s, questions in chosen if questions]
    total = sum(len(scene.questions) for scene in scenes)
    line = f"data: {path}, {split}: {len(scenes)} images, {total} questions"
    line += f" ({', '.join(dict.fromkeys(types) if types else known)})"
    if found.rejected:
        bad = found.rejected[0]
        line += f"; {len(found.rejected)} bad rows left out, e.g. row {bad.row}: {bad.reason}"
    return scenes, line


class Images:
    """What the model sees of each image and a small picture for the page, from one reading of the file.

    `pictures`: {path: data URI}; `bad`: {path: reason} of what cannot be read. More than `allowed` of them raise
    InputError."""

    def __init__(self, model, allowed: float):
        from model import pixel_store

        self.store, self.allowed = pixel_store(model), allowed
        self.pictures: dict[str, str] = {}
        self.bad: dict[str, str] = {}

    def read(self, paths: list[str]) -> dict:
        """{path: (H, W, 3) uint8 as the model takes it} of those that can be read."""
        from imagery import ImageError, read_rgb

        def attempt(path):
            try:
                rgb = read_rgb(path, self.store.settings)
                return self.store.resized(path, rgb), report.thumbnail(rgb, 320)
            except ImageError as error:
                return None, str(error)

        pixels = {}
        with ThreadPoolExecutor(4) as pool:  # Pillow releases the GIL
            for path, (made, text) in zip(paths, pool.map(attempt, paths)):
                if made is None:
                    self.bad[path] = text
                else:
                    pixels[path], self.pictures[path] = made, text
        if len(self.bad) > self.allowed:
            raise InputError(
                f"{len(self.bad)} images cannot be read, and --max_rejected allows {int(self.allowed)}:"
                + "".join(f"\n  {reason}" for reason in list(self.bad.values())[:5])
            )
        return pixels


# ----------------------------------------------------------------------------------------------------
# Answers


def answer_rows(model, scenes: list, pixels: dict, decode: str) -> list[dict]:
    """A sample of each question, with both answers."""
    import metrics

    asked = [(scene.image, scene.questions) for scene in scenes]
    with model.before():
        before = model.answer(asked, store=pixels, decode=decode)
    after = model.answer(asked, store=pixels, decode=decode)
    rows = report.sample_rows(scenes, metrics.is_right, before=before, after=after)
    return [row | {"flip": report.flip_of(row)} for row in rows]


def draw_scenes(scenes: list, number: int, seed: int) -> list:
    """Scenes with `number` questions in all, of all types in turn."""
    from scenes import QuestionScene

    listed = [(scene.image, question) for scene in scenes for question in scene.questions]
    order = report.in_turn(listed, lambda item: item[1].kind or "question", lambda item: item[0], seed)
    drawn: dict[str, list] = {}
    for image, question in order[:number]:
        drawn.setdefault(image, []).append(question)
    return [QuestionScene(image, questions) for image, questions in drawn.items()]


def compare(
    model, scenes: list, images: Images, *, number: int = 20, only: list[str] | None = None, seed: int = 0,
    decode: str = "generate", progress: bool = False,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """(samples of all questions that were asked, those to show).

    Without `only`, the questions asked are those to show: `number` of all types in turn, or all (0). With it, whole
    scenes are asked in a seeded order, since one image with all of its questions costs little more than with one, until
    `number` of those flips are found (more than two of one image count as two, or one image would be the whole page).
    """
    from tqdm import tqdm

    if only:
        scenes = random.Random(seed).sample(scenes, len(scenes))
    elif number:
        scenes = draw_scenes(scenes, number, seed)
    rows, found = [], []
    hidden = None if progress else True  # None: shown in a terminal
    with tqdm(total=len(scenes), desc="answering", unit="image", disable=hidden, leave=False) as bar:
        for start in range(0, len(scenes), CHUNK):
            chunk = scenes[start : start + CHUNK]
            pixels = images.read([scene.image for scene in chunk])
            made = answer_rows(model, [scene for scene in chunk if scene.image in pixels], pixels, decode)
            rows += made
            chosen = [row for row in made if not only or row["flip"] in only]
            for path in pixels.keys() - {row["image_path"] for row in chosen}:
                images.pictures.pop(path, None)  # what is not shown
            found += chosen
            bar.update(len(chunk))
            if only and number:
                counts = Counter(row["image_path"] for row in found)
                if sum(min(2, count) for count in counts.values()) >= number:
                    break
    if not rows:
        raise InputError("no image could be read:" + "".join(f"\n  {bad}" for bad in list(images.bad.values())[:5]))
    if number and only:
        found = report.in_turn(found, lambda row: row["type"], lambda row: row["image_path"], seed)[:number]
    return rows, found


# ----------------------------------------------------------------------------------------------------
# What is shown


def summary_lines(rows: list[dict], shown: list[dict], only: list[str] | None, whole: bool, score: str) -> list[str]:
    """Plain sentences on the outcome, the same for the terminal and the page. `whole`: nothing of the data was left
    out, `score`: the command of the full score."""
    import metrics

    change = metrics.mcnemar(
        [row["before_right"] for row in rows], [row["after_right"] for row in rows], [row["image_path"] for row in rows]
    )
    lines, low_high = [], change["difference_interval"]
    before, after = (sum(row[f"{key}_right"] for row in rows) / len(rows) for key in ("before", "after"))
    lines.append(
        f"accuracy {before:.3f} before, {after:.3f} after: {change['gained']} gained, {change['lost']} lost,"
        f" McNemar p {report.p_text(change['p'])}; difference {change['difference']:+.3f}, 95%"
        f" {low_high[0]:+.3f} to {low_high[1]:+.3f} by image"
    )
    scenes = len({row["image_path"] for row in rows})
    if only:
        number = sum(row["flip"] in only for row in rows)
        lines.append(
            f"searched {len(rows)} questions on {scenes} images: {number} are {' or '.join(only)}, {len(shown)} shown"
        )
    if not whole:
        drawn = f"{len(rows)} questions on {scenes} images" if only else f"{len(rows)} questions, types in turn,"
        lines.append(f"{drawn} are a sample; the full score: {score}")
    return lines


def write_page(path: Path, rows, shown, lines: list[str], score: str, images: Images, subtitle: str, only) -> None:
    import html

    pictured = report.varied(shown, PICTURED)
    text = "".join(f"<p>{html.escape(line[0].upper() + line[1:])}</p>" for line in lines)
    text = text.replace(html.escape(score), f"<code>{html.escape(score)}</code>")
    if len(pictured) < len(shown):
        text += f"<p>The page shows {len(pictured)} of {len(shown)} samples; all are in samples.jsonl.</p>"
    if images.bad:
        reasons = "<br>".join(html.escape(reason) for reason in list(images.bad.values())[:20])
        text += f"<p>{len(images.bad)} images cannot be read and are left out:<br>{reasons}</p>"
    sections = [
        ("Gained and lost", report.table_html(*report.flips_by_type(rows)) + text),
        ("Samples: " + " or ".join(only) if only else "Samples", report.samples_html(pictured, images.pictures.get)),
    ]
    report.page("Before and after fine-tuning", sections, path, subtitle=subtitle)


def checked_output(folder: Path) -> Path:
    """`folder`, where files can be written. Raises InputError before any work is done."""
    refuse_unwritable(folder, "--output")
    for name in ("samples.jsonl", "report.html"):
        if (folder / name).is_dir():
            raise InputError(f"--output {folder}: {name} in it is a folder")
    return folder


def preset_config(preset: str) -> VQAConfig:
    """What another tool's adapter is used with: it records no prompt, no pixel limits and no stretch."""
    known = {field.name for field in dataclasses.fields(VQAConfig)}
    return VQAConfig(**{key: value for key, value in PRESETS["VQAConfig"][preset].items() if key in known})


@dataclasses.dataclass
class Drawn:
    """What of transformers' TrainingArguments the splits of a run depend on."""

    seed: int = 42


def full_score(args, base: str, config: VQAConfig) -> str:
    """The command that scores the adapter on all questions."""
    words = ["python", "train_vqa.py"] + (["--preset", args.preset] if args.preset != "full" else [])
    words += ["--eval_only", "--lora", args.lora]
    known = record_of(args.lora)
    words += ["--task", "chat"] if known.get("task") == "chat" else []
    words += [] if known else ["--train_file", config.train_file]  # another tool's adapter names none
    settings = known.get("settings", {})
    again = (
        known and was_trained_on(known, args.data) and not settings.get("test_file")
    )  # --eval_only finds them by itself
    for flag, value, usual in (  # files have no usual one: --eval_only takes those of the adapter's training
        ("--base_model", base, config.base_model),
        ("--test_file", None if again else args.data, None),
        ("--image_root", args.image_root, None),
        ("--test_split", args.test_split, settings.get("test_split", "test") if again else None),
        ("--decode", args.decode, config.decode),
        ("--prompt", args.prompt, None),
    ):
        words += [flag, value] if value != usual else []
    return shlex.join(words)


def is_foreign(lora: str) -> bool:
    """Whether another tool made an adapter."""
    return not (Path(lora) / "vqa.json").is_file()


def checked(args) -> None:
    """Fill in a preset's defaults and refuse what no run can use. Raises InputError."""
    for name, value in DEFAULTS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.num_samples < 0:
        raise InputError(f"--num_samples {args.num_samples}: expected 0 (all) or more")
    if not 0 <= args.max_rejected <= 1:
        raise InputError(f"--max_rejected {args.max_rejected:g}: expected a share from 0 to 1")
    if not args.lora:
        raise InputError("give the adapter with --lora (best_model/ of a train_vqa.py run), or --preset demo")
    if not Path(args.lora).is_dir():
        train = "train_vqa.py --preset demo --output_dir output/demo_vqa" if args.preset == "demo" else "train_vqa.py"
        raise InputError(f"--lora {args.lora}: no such folder; `python {train}` makes one")
    if args.prompt and not is_foreign(args.lora):
        raise InputError(f"--prompt: {args.lora} records the prompt it was trained with")


def show(rows: list[dict], shown: list[dict], lines: list[str], broken: list[str]) -> None:
    """What the terminal gets: the first samples, the flips by type, `lines` on the outcome, and what could not be read."""
    if shown:
        print("\n" + report.samples_text(shown[:PRINTED], shutil.get_terminal_size((120, 24)).columns))
    if len(shown) > PRINTED:
        print(f"and {len(shown) - PRINTED} more, in samples.jsonl")
    print("\n" + report.table_text(*report.flips_by_type(rows)))
    print("\n".join(lines))
    if broken:
        print(f"{len(broken)} images cannot be read and are left out:", file=sys.stderr)
        print("".join(f"  {reason}\n" for reason in broken[:5]), end="", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    checked(args)
    output = checked_output(Path(args.output or os.path.normpath(Path(args.lora) / ".." / "compare")))
    config = preset_config(args.preset)
    config.prompt = args.prompt or config.prompt

    # ---- data and model
    scenes, line = read_questions(
        args.data,
        image_root=args.image_root,
        max_rejected=args.max_rejected,
        types=args.type,
        test_split=args.test_split,
    )
    print(line)
    from transformers.utils import logging

    from data import refuse_trained_images
    from model import VQA, pick_device

    refuse_trained_images(VQAConfig(), Drawn(), args.lora, scenes, print, warn=True)
    logging.disable_progress_bar()
    device, dtype = pick_device(args.device, args.dtype)
    model = VQA.from_pretrained(args.lora, base_model=args.base, device=device, dtype=dtype, config=config)
    about = f"adapter {args.lora} on {args.base or model.settings.base_model}"
    how = f"{str(dtype).removeprefix('torch.')} on {device}, decode {args.decode}"
    print(f"model: {about}, {how}")
    bits = record_of(args.lora).get("settings", {}).get("quantize", "none")
    if bits != "none":
        print(
            f"warning: trained on its base in {bits} bits, and asked on the whole one: train_vqa.py --eval_only asks the former"
        )
    if is_foreign(args.lora):
        print(
            f"model: no vqa.json in {args.lora}, so it is another tool's: used with the defaults of preset {args.preset}:"
            f" prompt {config.prompt!r}, images of {config.min_pixels} to {config.max_pixels} pixels, bands {config.bands},"
            f" stretch {config.stretch}, answers of at most {config.max_answer_tokens} tokens"
        )

    # ---- answers
    images = Images(model, args.max_rejected * len(scenes))
    rows, shown = compare(
        model, scenes, images, number=args.num_samples, only=args.only, seed=args.seed, decode=args.decode, progress=True
    )  # fmt: skip

    # ---- results
    whole = len(rows) == sum(len(scene.questions) for scene in scenes if scene.image not in images.bad)
    score = full_score(args, args.base or model.settings.base_model, config)
    lines = summary_lines(rows, shown, args.only, whole, score)
    try:
        write_page(output / "report.html", rows, shown, lines, score, images, f"{about}; {args.data}; {how}", args.only)
        report.write_atomic(output / "samples.jsonl", report.json_lines(shown))
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written: {error.strerror}") from None
    show(rows, shown, lines, list(images.bad.values()))
    print(f"samples {output / 'samples.jsonl'}\nreport  {output / 'report.html'}")
    return 0


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a pipe in GBK has no ✓
    with user_errors():
        sys.exit(main())
