"""A CSV of images, questions and answers to the conversations that a vision-language model is trained on.

    python csv2json.py                                # rsvqa-dataset.csv here -> data_vl.json and its two parts
    python csv2json.py --csv mine.csv --output out/mine.json --val_fraction 0.05 --test_fraction 0.1
    python csv2json.py --preset demo                  # what data2csv.py --preset demo wrote

Columns: image_path, question, answer and, where there are any, type, img_id, split; the first four also under the usual
other names (image, filename, ground_truth, category, ...). Beside data_vl.json stand
data_vl_train.json (train and val) and data_vl_test.json (the rest). A CSV without splits is split by image: all
questions of one image, under whatever names its file lies on the disk, stay in one split; the same picture in another
format is another file.
"""

import argparse
import contextlib
import os
import random
import re
from collections import Counter
from pathlib import Path

from config import SPLITS, InputError, by_content, places_beside, refuse_outside, user_errors
from report import json_lines, json_list
from scenes import (
    ANSWER_FIELDS,
    IMAGE_COLUMNS,
    QUESTION_FIELDS,
    SPECIAL_TOKEN,
    TYPE_FIELDS,
    Scene,
    find_leaks,
    path_of,
    read_table,
    refuse_choice,
)

NEEDED = ("image_path", "question", "answer")
OTHER_NAMES = {  # in whatever case
    "image_path": IMAGE_COLUMNS,
    "question": QUESTION_FIELDS,
    "answer": ANSWER_FIELDS,
    "type": (*TYPE_FIELDS, "question type", "category"),
    "img_id": ("img_id",),
    "split": ("split",),
}
KNOWN_SPLIT = re.compile(r"train|val|test(_\w+)?")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["full", "demo"], default="full", help="demo: read and write in data/demo")
    parser.add_argument("--csv", help="file to read (default: rsvqa-dataset.csv; demo: in data/demo)")
    parser.add_argument("--output", help="file to write (default: data_vl.json; demo: in data/demo)")
    parser.add_argument(
        "--val_fraction", type=float, default=0.1, help="share of images held out for validation (default: 0.1)"
    )
    parser.add_argument(
        "--test_fraction", type=float, default=0.2, help="share of images held out for the test (default: 0.2)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same split of the same file (default: 0)"
    )
    parser.add_argument(
        "--max_rejected", type=float, default=0.01, help="share of rows that may be unusable (default: 0.01)"
    )
    return parser


# ----------------------------------------------------------------------------------------------------
# CSV -> rows


def read_csv(path: Path, hint: str) -> list[dict[str, str]]:
    """Rows by column name, stripped. Raises InputError with the line where the file is not a whole CSV."""
    if not path.exists():
        raise InputError(f"{path}: no such file; {hint}")
    names, rows = read_table(path)
    given = ", ".join(names)
    for ours, known in OTHER_NAMES.items():
        theirs = next((name for other in known for name in names if name.lower() == other), None)
        if theirs and ours not in names:
            names[names.index(theirs)] = ours
    if not names:
        raise InputError(f"{path}: line 1: expected the columns {', '.join(NEEDED)}, found nothing")
    for name in NEEDED:
        if name not in names:
            raise InputError(f"{path}: line 1: column {name!r} is missing (the file has {given})")
    if not rows:
        raise InputError(f"{path}: no row below the column names")
    return [{name: cell.strip() for name, cell in zip(names, row)} for row in rows]


def check_splits(path: Path, rows: list[dict[str, str]]) -> bool:
    """Do the rows bring their splits? Raises InputError where only some do, or where a name is not known."""
    filled = sum(bool(row.get("split")) for row in rows)
    for number, row in enumerate(rows if filled else []):
        if not row["split"]:
            raise InputError(
                f"{path}: row {number}: column 'split' is empty, but {filled} of {len(rows)} rows have one:"
                " fill it everywhere or nowhere"
            )
        row["split"] = SPLITS.get(row["split"].lower(), row["split"])
        if not KNOWN_SPLIT.fullmatch(row["split"]):
            raise InputError(
                f"{path}: row {number}: column 'split': expected train, val, test or test_..., found {row['split']!r}"
            )
    return filled > 0


def take_usable(path: Path, rows: list[dict], max_rejected: float) -> tuple[dict[int, dict], list[dict]]:
    """`({row number: row with an absolute image_path}, [{"file", "row", "reason"} of the rejected])`.

    Raises InputError when more than `max_rejected` of the rows cannot be used, or none can.
    """
    places: dict[str, str | None] = {}
    usable, rejected = {}, []
    for number, row in enumerate(rows):
        name = path_of(row["image_path"])
        if name not in places:  # 100 questions ask about one image
            # Beside the CSV first, where data2csv.py means them: another data set here may have a picture of that name.
            forms = (name, name.replace("\\", "/"))  # Windows writes rsvqa_images\1.tif
            found = [place for form in forms for place in (str(path.parent / form), form) if os.path.isfile(place)]
            places[name] = os.path.abspath(found[0]) if found else None
        if reason := reason_against(row) or (None if places[name] else f"no such image: {name}"):
            rejected.append({"file": str(path), "row": number, "reason": reason})
        else:
            usable[number] = row | {"image_path": places[name]}
    if len(rejected) > max_rejected * len(rows) or not usable:
        shown = "".join(f"\n  row {bad['row']}: {bad['reason']}" for bad in rejected[:5])
        more = f"\n  and {len(rejected) - 5} more" if len(rejected) > 5 else ""
        raise InputError(
            f"{path}: {len(rejected)} of {len(rows)} rows cannot be used (allowed: --max_rejected {max_rejected:g});"
            f" images are looked for from {Path.cwd()} and {path.absolute().parent}:{shown}{more}"
        )
    return usable, rejected


def reason_against(row: dict[str, str]) -> str | None:
    for name in NEEDED:
        if not row[name]:
            return f"column {name!r} is empty"
        if token := SPECIAL_TOKEN.search(row[name]):
            return f"column {name!r} holds {token[0]!r}, which a model reads as a special token"
    try:
        refuse_choice(row, row["question"], row["answer"])
    except InputError as error:
        return str(error)
    return None


# ----------------------------------------------------------------------------------------------------
# Splits, always by image


def draw_splits(images: list[str], val_fraction: float, test_fraction: float, seed: int) -> dict[str, str]:
    """{image: split} by a seeded shuffle; a fraction above 0 holds out one image at least. Raises InputError."""
    order = random.Random(seed).sample(images, len(images))
    n_test, n_val = (max(1, round(share * len(order))) if share else 0 for share in (test_fraction, val_fraction))
    if n_test + n_val >= len(order):
        raise InputError(
            f"{len(order)} different images are too few to hold out {n_val} for validation and {n_test} for the test;"
            " lower --val_fraction and --test_fraction (0: none), or bring a split column"
        )
    return {image: "test" if i < n_test else "val" if i < n_test + n_val else "train" for i, image in enumerate(order)}


# ----------------------------------------------------------------------------------------------------
# Rows -> files


def conversation(number: int, row: dict[str, str]) -> dict:
    user = f"{row['question']} <|vision_start|>{row['image_path']}<|vision_end|>"
    turns = [{"from": "user", "value": user}, {"from": "assistant", "value": row["answer"]}]
    extra = {name: row[name] for name in ("type", "img_id", "split") if row.get(name)}
    return {"id": f"rsvqa_{number}", "conversations": turns, **extra}


def write_together(texts: dict[Path, str]) -> None:
    """Write all files beside their places, then rename them: a failure leaves every old file as it was."""
    places = {path: Path(os.path.realpath(path)) for path in texts}  # a link stays one
    if len(set(places.values())) < len(places):
        raise InputError(f"two of {', '.join(map(str, places))} are one file, by a link; remove the link")
    temporary = {path: place.with_name(f".{place.name}.{os.getpid()}.tmp") for path, place in places.items()}
    try:
        for path, text in texts.items():
            temporary[path].write_text(text, encoding="utf-8")
        for path in texts:
            os.replace(temporary[path], places[path])
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from None
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()


def counts(splits) -> str:
    order = sorted(Counter(splits).items(), key=lambda item: ({"train": 0, "val": 1}.get(item[0], 2), item[0]))
    return ", ".join(f"{split} {count}" for split, count in order)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    folder = Path("data/demo" if args.preset == "demo" else ".")
    source = Path(args.csv or folder / "rsvqa-dataset.csv")
    output = Path(args.output or folder / "data_vl.json")
    refuse_outside(args, val_fraction=(0, 1), test_fraction=(0, 1), max_rejected=(0, 1))
    command = "data2csv.py" + (" --preset demo" if args.preset == "demo" else "")
    rows = read_csv(source, "check --csv" if args.csv else f"run `python {command}` first, or give --csv")
    ends = (f"_train{output.suffix}", f"_test{output.suffix}", "_rejected.jsonl")
    train, test, report = places_beside(output, [f"{output.stem}{end}" for end in ends], [source])
    given = check_splits(source, rows)
    usable, rejected = take_usable(source, rows, args.max_rejected)
    content = by_content(dict.fromkeys(row["image_path"] for row in usable.values()))
    images = list(dict.fromkeys(content.values()))
    if not given:
        split_of = draw_splits(images, args.val_fraction, args.test_fraction, args.seed)
        for row in usable.values():
            row["split"] = split_of[content[row["image_path"]]]

    made = {number: conversation(number, row) for number, row in usable.items()}
    parts = {
        output: list(made.values()),
        train: [row for row in made.values() if row["split"] in ("train", "val")],
        test: [row for row in made.values() if row["split"] not in ("train", "val")],
    }
    texts = {path: json_list(part) for path, part in parts.items()}
    if rejected:
        texts[report] = json_lines(rejected)
    write_together(texts)
    if not rejected:
        report.unlink(missing_ok=True)

    for path, part in parts.items():
        print(f"{path}: {len(part)} rows" + (f" ({counts(row['split'] for row in part)})" if part else ""))
    if not parts[test]:
        print(f"no image is held out for testing: train with `python train_vqa.py --data {train}`")
    pairs = {(content[row["image_path"]], row["split"]) for row in usable.values()}
    how = "as given" if given else f"by image, seed {args.seed}"
    print(f"splits {how}: {len(images)} images ({counts(split for _, split in pairs)})")
    if rejected:
        print(
            f"rejected: {len(rejected)} rows, listed in {report}; first row {rejected[0]['row']}: {rejected[0]['reason']}"
        )
    seen: dict[str, list[Scene]] = {}
    for path, split in dict.fromkeys((row["image_path"], row["split"]) for row in usable.values()):
        seen.setdefault(split, []).append(Scene(path))
    if leaks := find_leaks(seen, content):  # as training will count them
        a, x, b, y = leaks[0]
        print(f"warning: {len(leaks)} images are in two splits, e.g. {a} ({x}) = {b} ({y}); training will refuse this")


if __name__ == "__main__":
    with user_errors():
        main()
