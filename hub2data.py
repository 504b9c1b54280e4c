"""A dataset of the Hugging Face Hub, or a folder of its parquet files, to images and the files that the other scripts read.

    python hub2data.py arampacha/rsicd                     # -> data/rsicd: images/ and captions.json
    python hub2data.py ./eurosat --output data/eurosat     # parquet files that are here
    python hub2data.py ORG/NAME --question q --answer a    # where a column is not found by its name

What a dataset has beside its images says what is written next to images/:

    captions                captions.json         train_match.py, train_caption.py, caption.py eval
    questions and answers   rsvqa-dataset.csv     csv2json.py, then train_vqa.py
    class labels            labels.csv            search.py index --attributes, classify --truth labels.csv

Images keep their bytes: nothing is decoded and compressed again. One that stands in several rows is written once; one that
stands in several splits stays in the one that is held out (test, then val), and its rows of the others are left out. A
dataset of one split has none: the other scripts hold images out by themselves.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow

from config import PARTIAL, SPLITS, InputError, fresh_folder, user_errors
from imagery import ImageError, image_format, image_size
from report import csv_text
from scenes import ANSWER_FIELDS, TEXT_FIELDS, TYPE_FIELDS, refuse_choice

NAMES = {  # what is looked for, and the names of columns that hold it, best first
    "image": ("image", "img", "picture", "jpg", "png", "tif"),
    "name": ("filename", "file_name", "image_name", "image_id", "img_id", "name", "__key__"),
    "question": ("question", "questions"),
    "answer": ("answer", "answers", *ANSWER_FIELDS[1:-1]),  # "label" is a class here
    "caption": (*TEXT_FIELDS, "raw", "txt"),
    "type": (*TYPE_FIELDS, "category"),
    "label": ("label", "labels", "class", "class_name", "scene"),
}
ENDINGS = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}  # of the others: their name


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="ORG/NAME on the hub, or a folder of parquet files or of tar shards")
    parser.add_argument("--output", help="new folder to write (default: data/NAME)")
    parser.add_argument("--config", help="configuration of a dataset that has several")
    for what, names in NAMES.items():
        parser.add_argument(f"--{what}", metavar="COLUMN", help=f"column of it (default: {', '.join(names)})")
    return parser


def read_splits(source: str, config: str | None) -> dict:
    """{split as the dataset calls it: its rows}. A folder is read as it lies; from the hub all is fetched first, and a
    second run takes what is there. Raises InputError."""
    import datasets

    if not watched():
        datasets.disable_progress_bars()
    local = Path(source).is_dir()
    if local and not any(path.suffix in (".parquet", ".tar") for path in Path(source).rglob("*")):
        raise InputError(f"{source}: no parquet file or tar shard in this folder; images in folders need no conversion")
    if not local and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):  # ./folder, when it is not there
        raise InputError(f"{source}: neither a folder nor ORG/NAME of a dataset")
    try:
        return dict(datasets.load_dataset(source, config, streaming=local))
    except Exception as error:  # for a user's mistakes: its own, the hub client's, ValueError and RuntimeError
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, PermissionError):
            reason += "; set HF_HOME to a folder that you may write to"
        raise InputError(f"{source}: cannot be loaded as a dataset: {type(error).__name__}: {reason}") from None


def watched() -> bool:
    """Whether somebody sees a progress bar."""
    return bool(sys.stderr and sys.stderr.isatty())


def split_names(splits) -> dict[str, str | None]:
    """{split as the dataset calls it: ours, or None where it is none of train, val and tests}. All are "", and what is written
    has no split, where there is only one (the hub calls all of a dataset "train") or none is known."""
    ours = {}
    for split in splits:
        name = SPLITS.get(split.lower(), split)
        if name not in SPLITS.values():  # RSVQA HR has two tests
            name = "test_" + re.sub(r"\W", "_", name[4:]).lstrip("_") if name.lower().startswith("test") else None
        ours[split] = name
    return ours if len(ours) > 1 and any(ours.values()) else dict.fromkeys(ours, "")


def find_columns(features: dict, given: dict[str, str | None]) -> dict[str, str]:
    """{"image": column, ...} of what there is. Raises InputError: no image, nothing to learn, a column that is not there."""
    listed = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    found = {}
    for what, names in NAMES.items():
        if given.get(what):
            if given[what] not in features:
                raise InputError(f"--{what} {given[what]}: no such column; there are: {listed}")
            found[what] = given[what]
            continue
        if what == "answer" and "question" not in found:
            names = names[:2]  # "ground_truth" is a caption then
        taken = {*found.values(), *given.values()}
        column = next((name for name in names if name in features and name not in taken), None)
        if what == "caption" and column is None:  # caption_1, caption_2 ...
            column = next((name for name in features if _base(name) in names and name not in taken), None)
        if column:
            found[what] = column
    pictures = [name for name, kind in features.items() if _holds_pictures(kind)]
    if not given.get("image") and found.get("image") not in pictures:
        if len(pictures) != 1:
            what = f"{len(pictures)} columns of images" if pictures else "no column of images"
            raise InputError(f"{what}; give one with --image. There are: {listed}")
        found["image"] = pictures[0]
    elif found["image"] not in pictures:
        raise InputError(f"--image {given['image']}: not a column of images; there are: {listed}")
    if found.get("name") and not _holds_texts(features[found["name"]]):
        del found["name"]  # a number is no file name
    if ("question" in found) != ("answer" in found):
        missing = "answer" if "question" in found else "question"
        raise InputError(
            f"no column of {missing}s; give --{missing}, the same as the other where one column holds both. There are: {listed}"
        )
    if "label" in found and _holds_lists(features[found["label"]]):
        raise InputError(
            f"column {found['label']!r} holds several labels an image, and one is needed; give another --label, or --caption."
            f" There are: {listed}"
        )
    if not {"caption", "question", "label"} & set(found):
        raise InputError(
            f"no captions, questions or labels; give --caption, --question and --answer, or --label. There are: {listed}"
        )
    return found


def _base(column: str) -> str:
    """A column's name without its number: of caption_2 caption."""
    return re.sub(r"[_ -]?\d{1,2}$", "", column)


def caption_columns(features: dict, columns: dict[str, str], given: str | None) -> list[str]:
    """The column of captions and those that are it but for a number, raw and raw_1 to raw_4 of NWPU-Captions."""
    first = columns.get("caption")
    if given or sum(map(_holds_pictures, features.values())) > 1:  # one that was asked for; image_0 has caption_0 alone
        return [first] if first else []
    return [name for name in features if first and _base(name) == _base(first) and name not in
            {column for what, column in columns.items() if what != "caption"}]  # fmt: skip


def _holds_pictures(kind) -> bool:
    """An image as the hub declares it, or its bytes, alone or with its path, as other writers of parquet leave them."""
    import datasets

    held = kind.get("bytes") if isinstance(kind, dict) else kind
    return isinstance(held, datasets.Image) or "binary" in getattr(held, "dtype", "")


def _holds_lists(kind) -> bool:
    import datasets

    return isinstance(kind, list | datasets.List | datasets.LargeList)


def _holds_texts(kind) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string")


class Folder:
    """The images of a dataset, each under one name in `root`."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True)
        self.names: dict[bytes, str] = {}  # hash of the content -> name
        self.taken: set[str] = set()  # in lower case: some file systems know no other

    def put(self, image: dict, wanted: str) -> str:
        """The name in `root` of this image, {"bytes", "path"}, written if it is new. Raises ImageError."""
        if image.get("bytes") is None and not os.path.isfile(image.get("path") or ""):
            raise ImageError("there is no image in it")
        data = image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in self.names:
            return self.names[digest]
        stem = os.path.splitext(re.split(r"[/\\]", wanted)[-1])[0]
        stem = re.sub(r"[^\w.-]", "_", stem).lstrip(".")[:60] or "image"
        new = self.root / f"{stem}.new"
        new.write_bytes(data)
        try:
            form = image_format(new)
            image_size(new)
        except ImageError as error:  # it names the file, which was never there for the user
            new.unlink()
            raise ImageError(str(error).replace(str(new), wanted)) from None
        ending = ENDINGS.get(form, f".{form.lower()}")
        name = f"{stem}{ending}"
        if name.lower() in self.taken:
            name = f"{stem}_{digest.hex()[:8]}{ending}"
        new.rename(self.root / name)
        self.names[digest] = name
        self.taken.add(name.lower())
        return name


def texts_of(value) -> list[str]:
    """The texts of a caption's column: a text, a list of them, or COCO's [{"raw": text}]."""
    values = value if isinstance(value, list) else [value]
    values = [v.get("raw", v.get("caption")) if isinstance(v, dict) else v for v in values]
    return [" ".join(v.split()) for v in values if isinstance(v, str) and v.strip()]


def collect(
    splits: dict, ours: dict[str, str], columns: dict[str, str], told: list[str], folder: Folder
) -> tuple[dict[str, dict], list[str]]:
    """({image: {"captions", "questions", "label", "split"}}, reasons why rows were left out) of {split: rows} and {split: our
    name for it}, which may be fewer."""
    import datasets
    from tqdm import tqdm

    images, refused = {}, []
    for split, name_of_split in ours.items():
        rows = splits[split].cast_column(columns["image"], datasets.Image(decode=False))
        label, *kinds = (rows.features.get(columns.get(what)) for what in ("label", "type", "answer"))
        kinds = [getattr(kind, "feature", kind) for kind in kinds]  # of a list: what it is a list of
        bar = tqdm(rows, desc=split, unit="row", leave=False, disable=not watched())
        for number, row in enumerate(bar):
            image = row[columns["image"]] or {}
            wanted = row.get(columns.get("name")) or image.get("path") or f"{split}_{number:06d}"
            captions = [text for column in told for text in texts_of(row[column])]
            value, questions = row.get(columns.get("label")), []
            for what, kind in zip(("type", "answer"), kinds):
                if isinstance(kind, datasets.ClassLabel):
                    row = row | {columns[what]: _named(kind, row[columns[what]])}
            try:
                questions = questions_of(row, columns) if "question" in columns else []
                if "question" in columns and not questions and not captions and value is None:
                    raise InputError("nothing is asked")
            except InputError as error:
                refused.append(f"{split}, row {number}: {error}")
                if not captions and value is None:
                    continue
            try:
                name = folder.put(image, wanted)
            except ImageError as error:
                refused.append(f"{split}, row {number}: {error}")
                continue
            found = {"split": name_of_split, "captions": [], "questions": [], "label": None, "rows": 0}
            known = images.setdefault(name, found)
            if known["split"] != found["split"]:
                first, last = sorted((known, found), key=_held_out)
                reason = f"{name}: a row of split {last['split'] or split}: the image is in {first['split']} too"
                if first is known:
                    refused.append(reason)
                    continue
                refused += [reason] * known["rows"]
                known = images[name] = found
            known["rows"] += 1
            known["captions"] += captions
            known["questions"] += questions
            if isinstance(label, datasets.ClassLabel):
                value = _named(label, value)
            if isinstance(value, (str, int)) and (value := str(value).strip()):
                if (first := known["label"] or value) != value:
                    refused.append(f"{split}, row {number}: {name} has the label {first!r} already, and here {value!r}")
                known["label"] = first
    return images, refused


def _named(label, value):
    """The name of a ClassLabel's number, or of each of a list; None for the hub's -1: not labelled."""
    if isinstance(value, list):
        return [_named(label, each) for each in value]
    return (label.int2str(value) if value >= 0 else None) if isinstance(value, int) else value


def _held_out(found: dict) -> tuple[bool, bool]:
    """Orders splits by what an image that is in several belongs to: a test, then val."""
    return not found["split"].startswith("test"), found["split"] != "val"


def questions_of(row: dict, columns: dict[str, str]) -> list[dict]:
    """A row's questions: one, a list with a list of as many answers, or a list of objects with both; [] where nothing is asked.
    Raises InputError, also where no question has an answer."""
    asked, answers = row[columns["question"]], row[columns["answer"]]
    if isinstance(answers, dict):  # a list of objects, as older versions of the hub's library give it
        answers = answers.get("answer", [])
    if isinstance(asked, dict):
        asked = asked.get("question", [])
    asked, answers = ([v] if not isinstance(v, list) else v for v in (asked, answers))
    if odd := [v for v in answers if isinstance(v, dict) and "answer" not in v]:
        raise InputError(f"an answer that is an object of {sorted(odd[0])}, without 'answer'")
    answers = [v["answer"] if isinstance(v, dict) else v for v in answers]  # VQAv2's
    own = [next((v[name] for name in NAMES["type"] if name in v), None) if isinstance(v, dict) else None for v in asked]
    asked = [v.get("question") if isinstance(v, dict) else v for v in asked]
    if odd := [v for v in asked if not isinstance(v, str | None)]:
        raise InputError(f"a question that is no text: {str(odd[0])[:60]}")
    if not any(q and q.strip() for q in asked):
        return []
    if len(answers) > len(asked) == 1:  # several people's: the most frequent, the first of equals
        given = [text for answer in answers if (text := _as_text(answer))]
        answers = [Counter(given).most_common(1)[0][0] if given else None]
    if len(answers) != len(asked):
        raise InputError(f"{len(asked)} questions and {len(answers)} answers")
    kinds = row.get(columns.get("type"))
    if not isinstance(kinds, list) or len(kinds) != len(asked):
        kinds = own if kinds in (None, "") else [kinds] * len(asked)
    kinds = [str(kind).strip() if isinstance(kind, (str, int)) else "" for kind in kinds]
    for q, a in zip(asked, answers):
        refuse_choice(row, q or "", a)
    said = [
        {"question": (q or "").strip(), "answer": _as_text(a), "type": kind}
        for q, a, kind in zip(asked, answers, kinds)
    ]
    if not (whole := [row for row in said if row["question"] and row["answer"]]):
        raise InputError("no question with an answer")
    return whole


def _as_text(answer) -> str:
    """An answer in words: a table keeps counts as 3.0 where some are missing, and yes as true."""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    if isinstance(answer, float):
        answer = None if answer != answer else int(answer) if answer.is_integer() else answer
    return "" if answer is None else str(answer).strip()


def files_of(images: dict[str, dict]) -> dict[str, tuple[str, str]]:
    """{file name: (text, what is in it)} for what the images have."""
    files, split = {}, {name: {"split": found["split"]} if found["split"] else {} for name, found in images.items()}
    scenes = [{"image": name, "captions": found["captions"]} | split[name] | ({"class": found["label"]} if found["label"] else {})
              for name, found in images.items() if found["captions"]]  # fmt: skip
    if scenes:
        count = sum(len(scene["captions"]) for scene in scenes)
        files["captions.json"] = (json.dumps(scenes, ensure_ascii=False, indent=1) + "\n", f"{count} captions")
    asked = [{"image_path": f"images/{name}"} | question | split[name]
             for name, found in images.items() for question in found["questions"]]  # fmt: skip
    if asked:
        if not all("split" in row for row in asked):  # then csv2json.py splits by image
            asked = [{key: value for key, value in row.items() if key != "split"} for row in asked]
        files["rsvqa-dataset.csv"] = (csv_text(asked), f"{len(asked)} questions")
    labels = [{"path": name, "label": found["label"] or ""} | split[name] for name, found in images.items()]
    if count := sum(bool(row["label"]) for row in labels):
        files["labels.csv"] = (csv_text(labels), f"{count} labels")
    return files


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    output = Path(args.output or Path("data") / Path(args.dataset).resolve().name)
    empty = output.exists()  # if not refused; perhaps a link, or where a disk is mounted: it stays, and is filled
    place = Path(os.path.abspath(output))
    partial = output / PARTIAL if empty else place.with_name(f".{place.name}{PARTIAL}")
    nothing = {"lost+found", partial.name}  # a disk's own, and what a killed run left
    if empty and not (output.is_dir() and nothing.issuperset(os.listdir(output))):
        cut = ", cut short by a kill" if partial.exists() else ""
        raise InputError(f"{output}: is there already{cut}; give another --output, or remove it")
    splits = read_splits(args.dataset, args.config)
    features = next(iter(splits.values())).features
    if features is None:
        raise InputError(f"{args.dataset}: its files do not say what their columns are")
    columns = find_columns(features, {what: getattr(args, what) for what in NAMES})
    told = caption_columns(features, columns, args.caption)
    shown = columns | ({"caption": " and ".join(told)} if told else {})
    print("columns: " + ", ".join(f"{what} = {column}" for what, column in shown.items()))
    if unread := [name for name in features if name not in (*columns.values(), *told, "__url__")]:
        print(f"not read: {', '.join(unread)}")
    ours = split_names(splits)
    for split in [split for split, name in ours.items() if name is None]:
        print(f"split {split}: left out, it is none of train, val and test")
        del ours[split]
    try:
        with fresh_folder(partial, f"{output}: another process is writing it; wait for its end") as folder:
            made = folder / "made"
            try:
                images, refused = collect(splits, ours, columns, told, Folder(made / "images"))
            except (InputError, pyarrow.ArrowException):
                raise
            except (ValueError, TypeError) as error:  # datasets' own, of files with other columns
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"{args.dataset}: its files are no one table: {reason}; convert them apart") from None
            files = files_of(images)
            if not files:
                raise InputError(
                    f"{args.dataset}: no row has an image with a text" + (f"; {refused[0]}" if refused else "")
                )
            for name, (text, _) in files.items():
                (made / name).write_text(text, encoding="utf-8")
            if refused:
                (made / "rejected.txt").write_text("\n".join(refused) + "\n", encoding="utf-8")
            if empty:
                # The images last: without them what a killed run left is seen to be no data set.
                for child in sorted(made.iterdir(), key=lambda child: child.name == "images"):
                    child.rename(output / child.name)
            else:
                made.rename(output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{args.dataset}: a parquet file of it is not whole: {str(error).rstrip('.')}; fetch it again"
        ) from None
    count = Counter(found["split"] or "no split" for found in images.values())
    print(f"{output / 'images'}: {len(images)} images ({', '.join(f'{split} {n}' for split, n in count.items())})")
    for name, (_, said) in files.items():
        print(f"{output / name}: {said}")
    if refused:
        print(f"left out: {len(refused)} rows, listed in {output / 'rejected.txt'}; the first: {refused[0]}")


if __name__ == "__main__":
    with user_errors():
        main()
