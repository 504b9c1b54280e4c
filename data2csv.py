"""RSVQA questions and answers to one CSV: image_path, question, answer, type, img_id, split.

    python data2csv.py                                # rsvqa_questions.json, rsvqa_answers.json, rsvqa_images/ here
    python data2csv.py --data_dir RSVQA_LR            # or the official LR_split_*.json / USGS_split_*.json in a folder
    python data2csv.py --questions q.json --answers a.json --images tiles --output mine.csv
    python data2csv.py --preset demo                  # what demo_data.py drew

Questions without an answer or an image, and repeats, are left out and counted by reason. `csv2json.py` comes next.
"""

import argparse
import json
import os
import re
from collections import Counter
from pathlib import Path

from config import NO_CHARACTER, InputError, places_beside, user_errors
from report import csv_text, write_atomic
from scenes import load_json

COLUMNS = ("image_path", "question", "answer", "type", "img_id", "split")
SPLITS = ("train", "val", "test", "test_phili")  # test_phili: the second test set of RSVQA-HR, in another city
PREFIXES = ("LR", "USGS", "RSVQAxBEN")  # of the files for each split
WHOLE = ("rsvqa_questions.json", "all_questions.json", "USGSquestions.json", "LRBENquestions.json")
IMAGE_FOLDERS = ("rsvqa_images", "images", "Images_LR", "Data", "Images")  # but the first two: as the archives unpack
SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
REASONS = {
    "inactive": "switched off, or of another split",
    "empty question": "no text in it",
    "image missing": "no file of that img_id",
    "unanswered": "no active answer",
    "duplicate": "same image, question and answer",
    "contradicting": "same image and question, another answer: the first is kept",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["full", "demo"], default="full", help="demo: read and write in data/demo")
    parser.add_argument("--data_dir", help="folder the files are looked for in (default: the current one)")
    parser.add_argument("--questions", help="questions file, in place of those in --data_dir")
    parser.add_argument("--answers", help="its answers file")
    parser.add_argument("--images", help=f"folder of {{img_id}}.tif (default: the first of {', '.join(IMAGE_FOLDERS)})")
    parser.add_argument("--output", help="CSV to write (default: rsvqa-dataset.csv; demo: in data/demo)")
    return parser


# ----------------------------------------------------------------------------------------------------
# What is read


def find_questions(folder: Path, hint: str) -> list[Path]:
    """The questions files of a folder: one, or one for each split. Raises InputError."""
    if (folder / WHOLE[0]).is_file():
        return [folder / WHOLE[0]]
    found = {
        name: [path for split in SPLITS if (path := folder / f"{name}_split_{split}_questions.json").is_file()]
        for name in PREFIXES
    }
    found = {name: files for name, files in found.items() if files}
    if len(found) > 1:
        raise InputError(
            f"{folder}: holds both {' and '.join(f'{n}_split_*' for n in found)} files; keep one data set in a folder"
        )
    if found:
        return next(iter(found.values()))
    if whole := [folder / name for name in WHOLE if (folder / name).is_file()]:
        return whole[:1]
    names = [WHOLE[0], *(f"{name}_split_*_questions.json" for name in PREFIXES), *WHOLE[1:]]
    raise InputError(f"{folder}: holds no {', '.join(names)}; {hint}")


def find_images(folder: Path) -> Path:
    for name in IMAGE_FOLDERS:
        if (folder / name).is_dir():
            return folder / name
    raise InputError(f"{folder}: holds no image folder ({', '.join(IMAGE_FOLDERS)}); give --images")


def list_images(folder: Path) -> dict[str, str]:
    """{name without suffix: path}; of two files with one name the suffix that stands first in SUFFIXES counts."""
    try:
        files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    except OSError as error:
        raise InputError(f"{folder}: the image folder cannot be read: {error.strerror}") from None
    files.sort(key=lambda path: (-SUFFIXES.index(path.suffix.lower()), path.name))
    return {path.stem: str(path) for path in files}


def read_rows(path: Path, key: str) -> list:
    """The list under `key` of a JSON file. Raises InputError with line and column."""
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise InputError(f'{path}: expected {{"{key}": [...]}} at the top level')
    return content[key]


def field(row: dict, name: str, *kinds: type):
    """A field of one of the kinds, texts stripped. Raises InputError."""
    if name not in row:
        raise InputError(f"field {name!r} is missing (the row has {', '.join(row)})")
    value = row[name]
    if type(value) not in kinds or value != value:  # not isinstance: true is no number; and NaN is none
        expected = " or ".join(KINDS[kind] for kind in kinds)
        raise InputError(f"field {name!r}: expected {expected}, found {type(value).__name__} {json.dumps(value)[:60]}")
    if not isinstance(value, str):
        return value
    if NO_CHARACTER.search(value):
        raise InputError(f"field {name!r} holds what is no character: {value[:60]!a}")
    return value.strip()


def is_active(row) -> bool:
    if not isinstance(row, dict):
        raise InputError(f"expected an object, found {type(row).__name__}")
    return "active" not in row or field(row, "active", bool)


def read_answers(path: Path) -> dict:
    """{answer id: (question id, text)} of the active answers. Raises InputError naming file, index and field."""
    answers = {}
    for index, row in enumerate(read_rows(path, "answers")):
        try:
            if not is_active(row):
                continue
            number = str(field(row, "id", int, str))  # as text: "7" and 7 are one id
            if number in answers:
                raise InputError(f"field 'id': {number} is the id of an earlier answer too")
            answers[number] = str(field(row, "question_id", int, str)), str(field(row, "answer", str, int, float))
        except InputError as error:
            raise InputError(f"{path}: answers[{index}]: {error}") from None
    return answers


# ----------------------------------------------------------------------------------------------------
# Questions -> rows


class Table:
    """Rows of the CSV in the order of the files, and what was left out of it."""

    def __init__(self, images: dict[str, str]):
        self.images = images
        self.rows: list[dict] = []
        self.left_out: Counter = Counter()
        self.first: dict[str, str] = {}
        """{reason: the first question that was left out for it}"""
        self._answer_to: dict[tuple[str, str], str] = {}

    def add_file(self, questions: Path, answers: Path) -> None:
        """Raises InputError naming file, index and field."""
        in_name = re.search(r"_split_(train|val|test_phili|test)_", questions.name)
        answer_of = read_answers(answers)
        for index, row in enumerate(read_rows(questions, "questions")):
            try:
                reason = self._add(row, answer_of, in_name and in_name[1])
            except InputError as error:
                raise InputError(f"{questions}: questions[{index}]: {error}") from None
            if reason:
                self.left_out[reason] += 1
                self.first.setdefault(reason, f"questions[{index}] of {questions.name}")

    def _add(self, row, answer_of: dict, split: str | None) -> str | None:
        """Append a row, or return the reason why not."""
        if not is_active(row):
            return "inactive"
        number, img_id = str(field(row, "id", int, str)), field(row, "img_id", int, str)
        kind, question = field(row, "type", str), field(row, "question", str)
        if split is None:
            split = field(row, "split", str) if row.get("split") is not None else ""
        answer = ""
        for answer_id in field(row, "answers_ids", list):
            if type(answer_id) not in (int, str):
                raise InputError(f"field 'answers_ids': expected ids, found {json.dumps(answer_id)[:60]}")
            owner, text = answer_of.get(str(answer_id).strip(), (number, ""))
            if owner != number:
                raise InputError(f"field 'answers_ids': answer {answer_id} belongs to question {owner}")
            answer = answer or text
        if not question:
            return "empty question"
        if not (image := self.images.get(str(img_id))):
            return "image missing"
        if not answer:
            return "unanswered"
        if (image, question) in self._answer_to:
            return "duplicate" if self._answer_to[image, question] == answer else "contradicting"
        self._answer_to[image, question] = answer
        self.rows.append(dict(zip(COLUMNS, (image, question, answer, kind, img_id, split))))

    def what_was_left_out(self) -> list[str]:
        return [
            f"{self.left_out[reason]} {reason} ({REASONS[reason]}), first {self.first[reason]}"
            for reason in REASONS
            if self.left_out[reason]
        ]


def counts(values) -> str:
    return ", ".join(f"{value} {count}" for value, count in Counter(values).items())


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    demo = args.preset == "demo"
    folder = Path(args.data_dir or ("data/demo" if demo else "."))
    output = Path(args.output or ("data/demo/rsvqa-dataset.csv" if demo else "rsvqa-dataset.csv"))
    if bool(args.questions) != bool(args.answers):
        raise InputError("give --questions and --answers together")
    if args.questions:
        pairs = [(Path(args.questions), Path(args.answers))]
    else:
        hint = "give --questions and --answers" if args.data_dir else "give --data_dir, or --questions and --answers"
        hint = "run `python demo_data.py` first" if demo else hint
        files = find_questions(folder, hint)
        pairs = [(path, path.with_name(path.name.replace("questions", "answers"))) for path in files]
    images = Path(args.images) if args.images else find_images(folder)
    places_beside(output, (), ())
    if output.resolve() in {path.resolve() for pair in pairs for path in pair}:
        raise InputError(f"--output {output}: is one of the files that are read")

    # As csv2json.py, which may run elsewhere, finds them: from the CSV's folder, or wherever it lies.
    base = output.absolute().parent
    found = {name: Path(os.path.abspath(path)) for name, path in list_images(images).items()}
    table = Table(
        {
            name: (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()
            for name, path in found.items()
        }
    )
    for questions, answers in pairs:
        table.add_file(questions, answers)
    left_out = table.what_was_left_out()
    if not table.rows:
        why = "".join(f"\n  {line}" for line in left_out) or "\n  no question in the file"
        raise InputError(f"{pairs[0][0]}: no row remains (images in {images}):{why}")

    try:
        write_atomic(output, csv_text(table.rows).encode())
    except (OSError, UnicodeError) as error:
        raise InputError(f"--output {output}: cannot be written: {error}") from None
    pictures, kinds, splits = ([row[name] for row in table.rows] for name in ("image_path", "type", "split"))
    print(f"{output}: {len(table.rows)} rows of {len(set(pictures))} images")
    print(f"types: {counts(kinds)}")
    if any(splits):
        print(f"splits: {counts(splits)}")
    for line in left_out:
        print(f"left out: {line}")


if __name__ == "__main__":
    with user_errors():
        main()
