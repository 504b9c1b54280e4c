"""Files to scenes, and scenes to splits.

A scene is one image and all of its texts: rows that share an image are gathered when a file is read, so that the image is
decoded, resized and encoded once, however many texts hang on it. Nothing here needs torch: what converts files starts at once.
"""

import csv
import filecmp
import functools
import io
import json
import math
import os
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from config import SPLITS, SURROGATE, DataConfig, InputError, by_content
from imagery import ImageError, image_size

# ----------------------------------------------------------------------------------------------------
# Files -> scenes


@dataclass
class Scene:
    """One image and all of its texts."""

    image: str
    """Path of the image."""
    texts: list[str] = field(default_factory=list)
    """Texts that are true of the image, without repeats, in file order."""
    rows: list[tuple[str, str | None]] = field(default_factory=list)
    """(text, text that is false of the image or None): what a training step draws from."""
    split: str | None = None
    label: str | None = None
    """Class of the scene, where the file names one: evaluation then takes negatives from other classes."""
    prompts: dict[str, str] = field(default_factory=dict)
    """{text: what it answers}, where a row says so (`prompt`, or `zh_prompt` for a `zh_answer`)."""
    listed: list[str] = field(default_factory=list)
    """The texts with the repeats within one entry of the file, as RSICD has them: what published scores count."""
    name: str = ""
    """The image as the file calls it."""


@dataclass
class Rejected:
    """A row that cannot be used: where it stands and why."""

    file: str
    row: int | str | None
    """Place in the file; of a question its id; -1: an image."""
    reason: str


def list_rejected(report: Path | None, rows: list[Rejected]) -> None:
    """Append rows to a run's rejected.jsonl, where it has one."""
    if report and rows:
        report.parent.mkdir(parents=True, exist_ok=True)
        with report.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(bad), ensure_ascii=False) + "\n" for bad in rows)


@dataclass
class SceneFile:
    """Scenes of one file and what was left out of it."""

    scenes: list[Scene]
    rejected: list[Rejected]
    duplicates: int = 0
    rows: int = 0
    left_out: list[Rejected] = field(default_factory=list)
    """Single texts that say nothing, of rows that have others, or belong to no image: listed, but no reason to stop."""
    elsewhere: dict[str, str | None] = field(default_factory=dict)
    """{image as the file calls it: split} of those that are not among the images asked for."""


def load_json(path: str | Path):
    """Parse a .json or .jsonl file. Raises InputError with the file, the line and the column."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path (now in {Path.cwd().name}/)") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, expected a .json or .jsonl file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); {_remedy(path)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 inside a text
            if line.strip():
                rows.append(parse_json(line, str(path), number))
        return rows
    kinds = "" if path.suffix.lower() == ".json" else "; what is read are .json, .jsonl, .csv and .tsv files"
    return parse_json(text, str(path), more=kinds)


def _remedy(path: Path) -> str:
    """What to do with a file that is no text."""
    kind = path.suffix.lower()
    if kind in (".xlsx", ".xls", ".ods"):
        return "a spreadsheet: export it as CSV UTF-8"
    if kind in (".parquet", ".tar"):
        return f"python hub2data.py {path.parent} makes images and captions, questions or labels of {kind} files"
    return "save the file as UTF-8" + (" (Excel: as CSV UTF-8)" if kind in (".csv", ".tsv", ".txt") else "")


def parse_json(text: str, source: str, line: int | None = None, more: str = ""):
    """json.loads; raises InputError with the place. line: of the source, where the text is one of its lines."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {line or error.lineno}, column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists in lists
        at = f"line {line}: {error}" if line else str(error)
    raise InputError(f"{source}: not JSON: {at}{more}")


IMAGE_COLUMNS = (
    "image", "image_name", "image_path", "filepath", "file_path", "filename", "file_name", "path", "img_name",
)  # fmt: skip
IMAGE_FIELDS = (*IMAGE_COLUMNS, "img", "image_id")
TEXT_FIELDS = (
    "caption", "captions", "sentences", "sentence", "title", "text", "description", "text_output", "ground_truth",
)  # fmt: skip
NEGATIVE_FIELDS = ("negative", "negatives")
QUESTION_FIELDS = ("question", "prompt", "query", "instruction")
ANSWER_FIELDS = ("answer", "ground_truth", "response", "output", "label")
TYPE_FIELDS = ("type", "question_type")
# One of a question's choices in a field of its own.
CHOICE = re.compile(r"(option|choice)[_ -]?[a-h\d]|[a-h]", re.IGNORECASE)
NUMBERED = re.compile(rf"({'|'.join(TEXT_FIELDS)})([_ -]?\d+)?", re.IGNORECASE)  # caption_1, caption_2 ...
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)  # texts in a list as Python writes it


def read_table(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows of as many cells) of a CSV file, or of one whose first line is parted by tabs; empty lines
    are passed over. Raises InputError with the line: not UTF-8, an open quote, a row that is shorter or longer."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path (now in {Path.cwd().name}/)") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not UTF-8 text; {_remedy(Path(path))}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise InputError(f"{path}: line {text.count(chr(10), 0, text.index(chr(0))) + 1}: holds a NUL byte")
    first = text.split("\n", 1)[0]
    lines, rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in first else ",", strict=True), []
    try:
        names = [name.strip() for name in next(lines, [])]
        if names and ";" in names[0]:
            raise InputError(f"{path}: its columns are parted by semicolons; save it with commas, or as .tsv with tabs")
        for row in lines:
            if not any(map(str.strip, row)):  # a spreadsheet writes an empty row as commas
                continue
            if len(row) < len(names) or any(map(str.strip, row[len(names) :])):
                raise InputError(
                    f"{path}: line {lines.line_num}: {len(row)} fields, expected {len(names)} ({', '.join(names)}); a field"
                    " with a comma needs quotes"
                )
            rows.append(row[: len(names)])
    except csv.Error as error:
        raise InputError(f"{path}: line {lines.line_num}: not a whole CSV, is a quote open? ({error})") from None
    if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise InputError(f"{path}: line 1: a column name stands twice: {twice[0]}")
    return names, rows


def load_rows(path: Path):
    """What `load_json` gives; of a CSV or TSV file its rows by the names in its first line. Raises InputError."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        return load_json(path)
    names, rows = read_table(path)
    made = [
        {
            name: _unlisted(cell) if name.lower() in (*TEXT_FIELDS, *NEGATIVE_FIELDS) else cell
            for name, cell in zip(names, row)
        }
        for row in rows
    ]
    split = _field(made[0], ("split",)) if made else None
    filled = sum(bool(row[split].strip()) for row in made) if split else 0
    if 0 < filled < len(made):
        raise InputError(
            f"{path}: column {split!r} is filled in {filled} of {len(made)} rows: fill it everywhere or nowhere"
        )
    return made


def _unlisted(cell: str) -> str | list[str]:
    """A cell's text; its texts, where pandas wrote a list or an array as `['one' 'two']`, as in RSICD's tables."""
    if not re.fullmatch(r"\s*\[\s*['\"].*['\"]\s*\]\s*", cell, re.DOTALL):
        return cell
    return [re.sub(r"\\(['\"\\])", r"\1", found[0][1:-1]) for found in QUOTED.finditer(cell)]


def _field(row: dict, known: tuple[str, ...], kinds=str) -> str | None:
    """Which name in `row` is one of `known`, in whatever case: the first that holds one of `kinds`, else the first."""
    names = {str(name).lower(): name for name in row}
    found = [names[name] for name in known if name in names]
    return next((name for name in found if isinstance(row[name], kinds)), found[0] if found else None)


def read_scenes(
    path: str | Path, *, image_root: str | None = None, more_roots: tuple[str, ...] = (), language: str = "all",
    max_rejected: float = 0.01, among: list[str] | None = None,
):  # fmt: skip
    """Read a text-image file and gather its rows by image.

    Forms: triplets `[{"image_name", "positive", "negative"}]`; captions `[{"image", "caption"}]`; Karpathy `{"images":
    [{"filename", "split", "sentences": [{"raw"}]}]}`; COCO `{"images": [{"id", "file_name"}], "annotations": [{"image_id",
    "caption"}]}`; `{image: its captions}`; NWPU-Captions `{class: [{"filename", "raw", "raw_1", ...}]}`, its images in a
    folder for each class or in one; scenes `[{"image", "captions": [...]}]`, with an optional Chinese `zh_answer` to a
    `zh_prompt`; CSV, TSV and rows of an image and its text or texts under any of `IMAGE_FIELDS` and `TEXT_FIELDS`, or in
    caption_1, caption_2 and so on. Rows may have a `split`, captions the `prompt` they answer. `path` may also be a folder
    with images/ and captions.json. Images are looked for in `image_root`, else beside the file, in its images/ and in
    `more_roots`. `among`: of these images alone, found by their path or else by their file name, where only one of them has
    it; rows of others are passed over.

    Returns a `SceneFile`. Raises InputError when the file is of no known form, or when more than `max_rejected` of its
    rows are bad: a missing field, a wrong type, an empty text, an image that is missing or not readable.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "captions.json"
        if not path.exists():
            raise InputError(
                f"{path}: no such file; texts are read from it or from a file of another name that you give. Folders of classes"
                " are for `search.py index` and `classify`; a CSV of filename,text makes captions of them"
            )
    content = load_rows(path)
    roots = _roots(image_root) or [path.parent, path.parent / "images", *map(Path, more_roots)]
    look = functools.partial(_find_image, before={} if image_root else None)
    result = SceneFile([], [])
    form, entries, fields = _form_of(path, content, roots, result.left_out)
    result.rows = len(entries)
    scenes: dict[str, Scene] = {}
    found: dict[str, str | ImageError] = {}  # image name -> path, or why there is none
    seen: dict[tuple, int] = {}  # (image, text, negative) -> its row
    find = look if among is None else _Among(among)
    for number, entry in enumerate(entries):
        try:
            name, rows, split, empty = _rows_of(form, entry, fields)
            _look_for(name, roots, found, find)
        except InputError as error:
            result.rejected.append(Rejected(str(path), number, str(error)))
            continue
        if found[name] == _Among.OTHER:
            result.rows -= 1
            result.elsewhere[name] = split
            continue
        if empty:
            reason = f"{empty} texts of {name} hold no word and are left out"
            result.left_out.append(Rejected(str(path), number, reason))
        scene = scenes.setdefault(found[name], Scene(found[name], split=split, label=_label(entry), name=name))
        if scene.split != split:
            raise InputError(f"{path}: row {number}: image {name!r} is in split {split!r} and in {scene.split!r}")
        rows = [row for row in rows if language == "all" or (language == "zh") == is_chinese(row[0])]
        result.duplicates += _add_rows(scene, rows, entry, number, seen)
    for scene in scenes.values():
        scene.texts = list(dict.fromkeys(text for text, _ in scene.rows))
        if form == "triplets":  # a text stands there once for each of its negatives
            scene.listed = list(scene.texts)
        for text, negative in _drop_true_negatives(scene):
            reason = f"field 'negative': {negative!r} is also a positive of {scene.image}"
            result.rejected.append(Rejected(str(path), seen[scene.image, text, negative], reason))
        if scene.rows:
            result.scenes.append(scene)
    _refuse_rejected(path, result, max_rejected)
    if not result.scenes:
        what = "usable row" if among is None else f"row of the {len(among)} images"
        raise InputError(f"{path}: no {what}" + (f" with --language {language}" if language != "all" else ""))
    return result


def _add_rows(
    scene: Scene, rows: list[tuple[str, str | None]], entry: dict, number: int, seen: dict[tuple, int]
) -> int:
    """Give a scene the texts of entry `number` of its file; how many of them it has already."""
    duplicates = 0
    for text, negative in rows:
        key = (scene.image, text, negative)
        if seen.get(key, number) == number:
            scene.listed.append(text)
        if key in seen:
            duplicates += 1
            continue
        seen[key] = number
        scene.rows.append((text, negative))
        prompt = entry.get("zh_prompt" if text == str(entry.get("zh_answer")).strip() else "prompt")
        if isinstance(prompt, str) and prompt.strip():
            scene.prompts[text] = prompt.strip()
    return duplicates


def _drop_true_negatives(scene: Scene) -> list[tuple[str, str]]:
    """Take out the rows of a scene whose negative is one of its own texts, and return them."""
    true = set(scene.texts)
    wrong = [row for row in scene.rows if row[1] in true]
    scene.rows = [row for row in scene.rows if row[1] not in true]
    return wrong


class _Among:
    """Finds names of a file among given images, in place of `_find_image`."""

    OTHER = ""

    def __init__(self, images: list[str]):
        self.paths = {os.path.realpath(image): image for image in images}
        self.taken: dict[str, str] = {}  # file name -> the image of the file that was found by it
        names = Counter(os.path.basename(image) for image in images)
        self.names = {name: image for image in images if names[name := os.path.basename(image)] == 1}

    def __call__(self, name: str, roots: list[Path]) -> str:
        name = name.replace("\\", "/")
        for root in roots:
            if image := self.paths.get(os.path.realpath(root / name)):
                return image
        base = os.path.basename(name)
        image, own = self.names.get(base), next((root / name for root in roots if os.path.isfile(root / name)), None)
        if image is None or (own and not filecmp.cmp(own, image, shallow=False)):  # another picture of that name
            return self.OTHER
        if not own and self.taken.setdefault(base, name) != name:
            raise ImageError(f"{name}: {image} may be this image or {self.taken[base]}: both end in {base}")
        return image


def _refuse_rejected(path: Path, result: SceneFile, max_rejected: float) -> None:
    if len(result.rejected) > max_rejected * result.rows:
        shown = "".join(f"\n  row {bad.row}: {bad.reason}" for bad in result.rejected[:5])
        more = len(result.rejected) - 5
        raise InputError(
            f"{path}: {len(result.rejected)} of {result.rows} rows cannot be used"
            f" (allowed: --max_rejected {max_rejected:g}):{shown}" + (f"\n  and {more} more" if more > 0 else "")
        )


NO_IMAGE = "field 'image_id': no image of that id in 'images'"


def _form_of(path: Path, content, roots: list[Path], left_out: list[Rejected]) -> tuple[str, list, tuple[str, str]]:
    """The form of a file, its entries, one for each row or image, and the fields of image and texts in them. Texts of no image
    of the file are added to `left_out`."""
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if not isinstance(content.get("annotations"), list):
            return "karpathy", content["images"], ("filename", "sentences")
        listed = [image if isinstance(image, dict) else {} for image in content["images"]]
        # Some converters list an image once for each of its annotations.
        keys = [json.dumps(image, sort_keys=True) if "id" in image else n for n, image in enumerate(listed)]
        entries = [{**image, "captions": []} for image in dict(zip(keys, listed)).values()]
        named = Counter(str(entry["id"]) for entry in entries if "id" in entry)
        if twice := [number for number, count in named.items() if count > 1]:
            raise InputError(f"{path}: field 'images': id {twice[0]} stands for {named[twice[0]]} images")
        captions = {str(entry["id"]): entry["captions"] for entry in entries if "id" in entry}
        for number, row in enumerate(content["annotations"]):
            known = captions.get(str(row.get("image_id"))) if isinstance(row, dict) else None
            if known is None:
                left_out.append(Rejected(str(path), number, NO_IMAGE))
            else:
                known.append(row.get("caption"))
        return "coco", entries, ("file_name", "captions")
    if isinstance(content, dict) and content and all(map(_is_nwpu, content.values())):
        entries = []
        for label, rows in content.items():
            places = [*roots, *(below for root in roots for below in _folders_in(root))]
            folder = any(os.path.isfile(place / label / rows[0]["filename"]) for place in places)
            for row in rows:
                row = row if isinstance(row, dict) else {}
                keys = [key for key in row if re.fullmatch(r"raw(_\d+)?", key)] or ["raw"]
                texts = [{"raw": row.get(key)} for key in keys]
                entries.append({**row, "class": label, "filepath": label if folder else "", "sentences": texts})
        return "karpathy", entries, ("filename", "sentences")
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]
    if isinstance(content, dict) and content and all(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in content):
        content = [
            {"image": name} | (known if isinstance(known, dict) else {"captions": known})
            for name, known in content.items()
        ]
    if isinstance(content, list):
        content = _gathered(content)
        first = next((entry for entry in content if isinstance(entry, dict)), {})
        image, text = _field(first, IMAGE_FIELDS), _field(first, TEXT_FIELDS, (str, list))
        # VRSBench has answers and boxes in files of this form, too.
        asked = text == "ground_truth" and "caption" not in str(first.get("type", "caption"))
        asked |= text is not None and text == _question_in(first)  # LLaVA's and GeoChat-Bench's
        if image and (positive := _field(first, ("positive",))):
            return "triplets", content, (image, positive)
        folder = image == "filepath" and Path(str(first[image])).suffix.lower() not in IMAGE_SUFFIXES
        if folder and text == "sentences" and isinstance(first.get("filename"), str):
            return "karpathy", content, ("filename", "sentences")
        if image and text and not asked:
            return "captions", content, (image, text)
        if not content:
            raise InputError(f"{path}: the list is empty")
        have = f"its first row has {sorted(first)}" if first else "its rows are not objects"
        if "conversations" in first or _question_in(first):
            have += (
                " (questions and conversations are for train_vqa.py, with their answers, the latter with --task chat)"
            )
    else:
        have = f"its top level is {type(content).__name__}"
        if isinstance(content, dict):
            have += f" with {list(content)[:5]}"
    raise InputError(
        f"{path}: expected rows of an image ({', '.join(IMAGE_FIELDS)}) and its text or texts ({', '.join(TEXT_FIELDS)}) or of"
        f' {{image_name, positive, negative}}; or {{"images": [...]}} of Karpathy or COCO, or {{class: [...]}} of NWPU-Captions;'
        f" {have}"
    )


def _gathered(rows: list) -> list:
    """The rows; where the texts of one stand in columns of their own, as caption_1 to caption_5, all with a list of theirs as
    "captions"."""
    columns = [
        [found for found in map(NUMBERED.fullmatch, row) if found] if isinstance(row, dict) else [] for row in rows
    ]

    def base_of(found: list) -> str | None:
        """What columns of a row are numbers of, where there are two or more."""
        names = Counter(column[1] for column in found)
        return next((column[1] for column in found if column[2] and names[column[1]] > 1), None)

    if (base := next(filter(None, map(base_of, columns)), None)) is None:
        return rows
    gathered = []
    for row, found in zip(rows, columns):
        if names := [column[0] for column in found if column[1] == base or column[0] == "captions"]:
            listed = [value if isinstance(value, list) else [value] for value in (row[name] for name in names)]
            texts = [text for part in listed for text in part if text is not None and str(text).strip()]
            row = {name: value for name, value in row.items() if name not in names} | {"captions": texts}
        gathered.append(row)
    return gathered


def _is_nwpu(rows) -> bool:
    """Whether a list begins as those of NWPU-Captions do."""
    first = rows[0] if isinstance(rows, list) and rows else None
    return isinstance(first, dict) and isinstance(first.get("filename"), str) and "raw" in first


def _rows_of(form: str, entry, fields: tuple[str, str]) -> tuple[str, list[tuple[str, str | None]], str | None, int]:
    """One entry as (image name, [(text, negative)], split, how many of its texts say nothing and are left out). Raises
    InputError naming the field."""
    if not isinstance(entry, dict):
        raise InputError(f"expected an object, found {type(entry).__name__}")
    (image, field), split = fields, _split_in(entry)
    if entry.get("changeflag") is not None:  # LEVIR-CC, SECOND-CC
        raise InputError(
            "field 'changeflag': a caption of what changed between two images, and a row is read with one; where an image shows"
            " both dates, leave the field out"
        )
    if form == "triplets":
        own = _field(entry, NEGATIVE_FIELDS, (str, list))
        given = entry.get(own)  # one, or several; a table has an empty cell where there is none
        listed = given if isinstance(given, list) else [given]
        negatives = [_text({own: text}, own) for text in listed if text not in (None, "")] or [None]
        name, positive = _text(entry, image), _text(entry, field)
        for text in (positive, *negatives):
            if text and not has_word(text):
                raise InputError(f"{text!r} holds no word")
        return name, [(positive, negative) for negative in negatives], split, 0
    texts = entry.get(field)
    if form == "captions" and not isinstance(texts, list):
        name, text, more = _text(entry, image), _text(entry, field), _chinese_beside(entry)
        return name, [(one, None) for one in (text, *more) if has_word(one)], split, int(not has_word(text))
    if not isinstance(texts, list) or (form == "karpathy" and not texts):
        raise InputError(f'field {field!r}: expected a list with at least one {{"raw": text}}')
    texts = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in texts]
    name = _text(entry, image)
    if form == "karpathy" and isinstance(entry.get("filepath"), str):
        name = str(Path(entry["filepath"]) / name)
    said = [_text({field: text}, field) for text in texts if not _says_nothing(text)]
    empty = len(texts) - len(said)
    if form == "captions":
        said += _chinese_beside(entry)
    if not said:
        raise InputError(
            f"field {field!r}: none of them holds a word" if texts else f"field {field!r}: there is no text"
        )
    return name, [(text, None) for text in said], split, empty


def _chinese_beside(entry: dict) -> list[str]:
    """The `zh_answer` of a row of captions, where it has one with words."""
    own = isinstance(entry.get("zh_answer"), str) and not _says_nothing(entry["zh_answer"])
    return [_text(entry, "zh_answer")] if own else []


def _split_in(entry: dict):
    """The split that a row names, under our name for it; None where it names none. Raises InputError: no text."""
    split = entry.get(_field(entry, ("split",)))
    if not isinstance(split, str | None):
        raise InputError(f"field 'split': expected a text, found {type(split).__name__} {json.dumps(split)[:60]}")
    return SPLITS.get(split.strip().lower(), split.strip()) or None if split else None


def _says_nothing(text) -> bool:
    return isinstance(text, str) and not has_word(text)


def _label(entry: dict) -> str | None:
    label = entry.get("class")
    return label if isinstance(label, str) else None


def _text(entry: dict, name: str) -> str:
    value = entry.get(name)
    if name not in entry:
        raise InputError(f"field {name!r} is missing (the row has {sorted(entry)})")
    if not isinstance(value, str):
        raise InputError(f"field {name!r}: expected a text, found {type(value).__name__} {json.dumps(value)[:60]}")
    if not value.strip():
        raise InputError(f"field {name!r} is empty")
    if SURROGATE.search(value):
        raise InputError(f"field {name!r}: half of a surrogate pair, not a character: {value[:60]!a}")
    return value.strip()


def _roots(image_root: str | None) -> list[Path]:
    """The folders of an --image_root, which are parted as in PATH."""
    return [Path(root) for root in (image_root or "").split(os.pathsep) if root]


@functools.cache
def _read_header(path: str, size: int, mtime_ns: int) -> None:
    """Once, where references, training data and a list of objects are about the same images. Raises ImageError."""
    image_size(path)


def _look_for(name: str, roots: list[Path], found: dict[str, str | ImageError], find) -> None:
    """Note in `found` where the image of a name is, once for all of its rows. Raises ImageError: it is not there or cannot be
    read."""
    if name not in found:
        try:
            found[name] = find(name, roots)
            if found[name] != _Among.OTHER:
                state = os.stat(found[name])
                _read_header(found[name], state.st_size, state.st_mtime_ns)
        except ImageError as error:
            found[name] = error
    if isinstance(found[name], ImageError):
        raise found[name].with_traceback(None)  # or it would grow by every row


def path_of(address: str) -> str:
    """The path that a file:// address names; another text as it is."""
    return unquote(urlsplit(address).path) if address.startswith("file://") else address


def _find_image(name: str, roots: list[Path], before: dict[Path, str] | None = None) -> str:
    """The path of an image. before: where the images below each root were, as far as is known; one that is named by its whole
    path may have moved with them. None: nothing has moved. Raises ImageError."""
    # é is one character or two: names of a folder that was packed on a Mac are not those of the file beside it.
    forms = dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))))
    for path in (root / form for root in roots for form in forms):
        if os.path.isfile(path):  # Path's own raises where a name is too long or a folder is locked
            return str(path)
    if name.startswith("file://"):  # as in Qwen's own examples
        return _find_image(path_of(name), roots, before)
    if "\\" in name:  # written on Windows
        return _find_image(name.replace("\\", "/"), roots, before)
    if before is not None and re.match(r"/|[A-Za-z]:/", name):
        parts = name.split("/")[1:]
        for tail in ("/".join(parts[n:]) for n in range(len(parts))):
            head = name.removesuffix(tail)
            for root in roots:  # A/1.png must not be found as B/1.png is
                if before.get(root, head) == head and os.path.isfile(root / tail):
                    before[root] = head
                    return str(root / tail)
    if before is not None and "/" in name:  # the rows may name the root's own folder, too
        there = [str(root.parent / name) for root in roots if os.path.isfile(root.parent / name)]
        if there:
            return there[0]
    below = [
        str(folder / name)
        for folder in dict.fromkeys(f for root in roots for f in _folders_in(root))
        if os.path.isfile(folder / name)
    ]
    # images_png/, not masks_png/
    pictures = [path for path in below if Path(path).parent.name.lower().startswith("image")]
    if len(below) == 1 or len(pictures) == 1:  # RSICD_images/ beside the file, train2017/ and val2017/ in the root
        return (pictures or below)[0]
    other = next((there for root in roots if (there := _in_other_case(root / name))), None)
    if below:
        remedy = f"it may be {below[0]} or {below[1]}: set --image_root"
    elif other:
        remedy = f"there is {other}: capitals count, write its name as it is"
    else:
        remedy = "set --image_root; several folders are parted by a colon"
    shown = name if len(name) <= 200 else f"{name[:60]}... ({len(name)} characters)"
    raise ImageError(f"{shown}: no such image in {' or '.join(str(root) for root in roots)} ({remedy})")


@functools.lru_cache(maxsize=8)
def _folders_in(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return []


@functools.lru_cache(maxsize=8)
def _names_in(folder: Path) -> dict[str, str]:
    """{a file's name in small letters: its name}"""
    try:
        return {name.lower(): name for name in os.listdir(folder)}
    except (OSError, ValueError):  # a NUL byte in its name
        return {}


def _in_other_case(path: Path) -> Path | None:
    """A file beside `path` whose name is the same but for capitals."""
    name = _names_in(path.parent).get(path.name.lower())
    return path.with_name(name) if name not in (None, path.name) else None


# ----------------------------------------------------------------------------------------------------
# Questions about images

VISION = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
SPECIAL_TOKEN = re.compile(r"<\|[^|]*\|>")  # a mark of a chat template
# Where the image stands in a question: ours, LLaVA's, MiniGPT's.
MARK = re.compile(rf" *(?:{VISION.pattern}|<image>|(?:<Img>)?<ImageHere>(?:</Img>)?) *", re.DOTALL)


@dataclass
class Question:
    """A question about an image and its answer."""

    text: str
    answer: str
    kind: str | None = None
    """Type of the question: RSVQA's presence, comp, count, rural_urban, area; another data set's own, or None."""
    id: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns of the same conversation, (question, answer) each."""
    times: int = 1
    """How often the file gives this answer to the image: a repeated caption counts as often among the references."""


@dataclass
class QuestionScene:
    """One image and all questions about it."""

    image: str
    questions: list[Question] = field(default_factory=list)
    split: str | None = None

    @property
    def rows(self) -> list[Question]:
        return self.questions


OTHER_QUESTIONS = "other sets: make rows of image, question, answer (and type, split), as JSON, JSONL or CSV"


def read_conversations(
    path: str | Path, *, image_root: str | None = None, language: str = "all", max_rejected: float = 0.01
) -> SceneFile:
    """Read questions and answers and gather them by image.

    Forms: conversations `[{"id", "conversations": [{"from": "user", "value": "Q <|vision_start|>image<|vision_end|>"},
    {"from": "assistant", "value": "A"}], "type", "split"}]` (csv2json.py writes them), the same with LLaVA's names (`"image"`,
    `"from": "human"` and `"gpt"`, `<image>` in the first value), messages as ms-swift, LLaMA-Factory and TRL have them
    `[{"messages": [{"role", "content"}], "images": ["image"]}]` (a system message is left out: `--prompt` says how to
    answer), and rows of one question, `[{"image", "question", "answer", "type", "split"}]`, also as CSV, also under the names
    of chat rows (`img`, `prompt`, `label`), of ms-swift and LLaMA-Factory without messages (`{"query", "response", "images"}`,
    `{"instruction", "input", "output", "images"}`), of VRSBench (`image_id`, `ground_truth`), of EarthVQA (`{image: [{"Question",
    "Answer", "Type"}]}`) and of FloodNet (`{"0": {"Image_ID", "Question", "Ground_Truth", "Question_Type"}}`).
    A conversation may go on, user and assistant by turns: each answer makes a question of its own, with what was said
    before as its `history`; a chat row may bring `"history": [[question, answer], ...]`.

    Returns a `SceneFile` of `QuestionScene`s. Raises InputError as `read_scenes` does.
    """
    path = Path(path)
    content = load_rows(path)
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        remedy = "run data2csv.py and csv2json.py on their folder"
        if any(
            isinstance(row, dict) and "question_id" in row for row in content["questions"][:1]
        ):  # VQAv2's form: HRVQA
            remedy = "join them with the answers by question_id, into rows of image, question, answer"
        raise InputError(f"{path}: questions without their answers: {remedy}")
    content = _listed(content)
    if not isinstance(content, list) or not content:
        have = f"an object with {list(content)[:5]}" if isinstance(content, dict) else f"{json.dumps(content)[:20]}"
        raise InputError(
            f"{path}: expected a list of conversations with at least one in it, found {have}; {OTHER_QUESTIONS}"
        )
    # EarthVQA has the pictures of Train.json in Train/images_png.
    roots = _roots(image_root) or [path.parent, path.parent / "images", path.with_suffix("")]
    find = functools.partial(_find_image, before={} if image_root else None)
    result, scenes = SceneFile([], [], rows=len(content)), {}
    found: dict[str, str | ImageError] = {}
    seen = set()
    for number, entry in enumerate(content):
        try:
            (name, questions), split = _questions_of(entry), _split_in(entry)
            _look_for(name, roots, found, find)
        except InputError as error:
            result.rejected.append(Rejected(str(path), number, str(error)))
            continue
        scene = scenes.setdefault(found[name], QuestionScene(found[name], split=split))
        if scene.split != split:
            raise InputError(f"{path}: row {number}: image {name!r} is in split {split!r} and in {scene.split!r}")
        for question in questions:
            if language != "all" and (language == "zh") != is_chinese(question.text):
                continue
            key = (scene.image, question.text, question.answer, question.history)
            result.duplicates += key in seen
            if key not in seen:
                seen.add(key)
                scene.questions.append(question)
    result.scenes = [scene for scene in scenes.values() if scene.questions]
    _refuse_rejected(path, result, max_rejected)
    if not result.scenes:
        raise InputError(f"{path}: no usable row" + (f" with --language {language}" if language != "all" else ""))
    return result


def read_chat(path: str | Path, **options) -> SceneFile:
    """`read_conversations` without answers that hold no word, which cannot be scored; or a file of captions in any form of
    `read_scenes`, as answers to their own prompts or to a request for a description. options: those of both."""
    rows = _listed(load_rows(Path(path))) if Path(path).is_file() else None
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    del rows  # the file is read again below, and is not to be held twice
    asked, answered = _question_in(first), _field(first, ANSWER_FIELDS)  # a label beside captions is a class
    one = (
        asked
        and answered
        and ({asked, answered} == {"question", "answer"} or not _field(first, ("caption", "captions")))
    )
    if one or any(form[0] in first for form in CONVERSATIONS):
        found = read_conversations(path, **options)
        for scene in found.scenes:
            silent = [question for question in scene.questions if not has_word(question.answer)]
            found.left_out += [
                Rejected(str(path), q.id, f"{q.answer!r} of {scene.image} holds no word") for q in silent
            ]
            scene.questions = [question for question in scene.questions if has_word(question.answer)]
        found.scenes = [scene for scene in found.scenes if scene.questions]
        if not found.scenes:
            raise InputError(f"{path}: no answer in it holds a word")
        return found
    found = read_scenes(path, **options)
    found.scenes = captions_as_answers(found.scenes, "Describe the image.", "描述这幅图像。")
    return found


def _listed(content):
    """Rows of questions that stand under their image (EarthVQA) or a number (FloodNet), as a list; others as they are."""
    if not isinstance(content, dict) or not content:
        return content
    lists = all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows[:1]) for rows in content.values())
    if lists and any(content.values()):  # an image may have no question
        if len(content) == 1 and not any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in content):
            return next(iter(content.values()))  # {"data": [...]}
        return [{"image": image, **row} for image, rows in content.items() for row in rows if isinstance(row, dict)]
    return list(content.values()) if all(isinstance(row, dict) for row in content.values()) else content


# (list of turns, who speaks, what is said): ours and LLaVA's; that of chat templates, as ms-swift and others train on.
CONVERSATIONS = (("conversations", "from", "value"), ("messages", "role", "content"))


def _questions_of(entry) -> tuple[str, list[Question]]:
    """One row as (image name, a question for each of its answers). Raises InputError naming the field."""
    if not isinstance(entry, dict):
        raise InputError(f"expected an object, found {type(entry).__name__}")
    kind, number = entry.get(_field(entry, TYPE_FIELDS)), entry.get("id")
    if not (kind is None or isinstance(kind, str)):
        raise InputError(f"field 'type': expected a text, found {type(kind).__name__}")
    for name in ("question type", "category"):  # elsewhere a number
        if not kind and isinstance(other := entry.get(_field(entry, (name,))), str):
            kind = other
    number = None if number is None else str(number)
    form = next((form for form in CONVERSATIONS if form[0] in entry), None)
    if form is None:
        return _asked(entry, kind, number)
    listed, role, content = form
    turns = entry[listed]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get(role) == "system":
        turns = turns[1:]
    if not isinstance(turns, list) or not turns or len(turns) % 2 or not all(isinstance(turn, dict) for turn in turns):
        have = f"found {len(turns)}" if isinstance(turns, list) else f"found {type(turns).__name__}"
        raise InputError(f"field {listed!r}: expected turns of the user and the assistant by turns, {have}")
    roles = [turn.get(role) for turn in turns]
    if roles not in (["user", "assistant"] * (len(turns) // 2), ["human", "gpt"] * (len(turns) // 2)):
        raise InputError(f"field {role!r}: expected 'user' and then 'assistant'")
    parts = [_said(turn, content) for turn in turns]
    said = [text for text, _ in parts]
    images = VISION.findall(" ".join(said))
    said[::2] = [_words_of(text) for text in said[::2]]
    if not images:
        images = _listed_images(entry) or [image for _, found in parts for image in found]
    one = len(images) == 1 and isinstance(images[0], str) and images[0].strip()
    said[1::2] = [_sayable(text) for text in said[1::2]]
    if entry.get("objects") and re.search("<bbox>|<ref-object>", " ".join(said)):
        raise InputError("field 'objects': <bbox> and <ref-object> are not filled in; write the boxes into the text")
    if "" in said[2:]:
        raise InputError(f"field {content!r}: turn {said.index('', 2) + 1} has no words")
    if not one or not said[0] or not said[1] or any(VISION.search(text) for text in said):
        raise InputError(
            f"field {content!r}: expected a question and one <|vision_start|>image path<|vision_end|> (or a field 'image'),"
            f" found {len(images)} images and {str(turns[0].get(content))[:80]!r}"
        )
    pairs = tuple(zip(said[::2], said[1::2]))
    # "loss": ms-swift's mark of answers that are only said.
    learnt = [n for n, turn in enumerate(turns[1::2]) if turn.get("loss") not in (False, 0)]
    if not learnt:
        raise InputError(f'field {listed!r}: no answer in it is to be learnt, each has "loss": false')
    return images[0].strip(), [Question(*pairs[n], kind, number, pairs[:n]) for n in learnt]


def _question_in(row: dict) -> str | None:
    """The name of a row's question; `text` where it is numbered as a question, as LLaVA's and GeoChat-Bench's are."""
    name, text = _field(row, QUESTION_FIELDS), _field(row, ("text",))
    numbered = _field(row, ("question_id",)) and not _field(row, ("answer_id", "label"))
    return text if name is None and numbered and isinstance(row.get(text), str) else name


def refuse_choice(row: dict, question: str, answer) -> None:
    """Raises InputError where the answer is the letter or the number of one of several choices that stand beside the question
    and not in it: what is read has the question alone."""
    choices = row.get(_field(row, ("options", "choices", "candidates")))
    if isinstance(choices, dict):
        choices = list(choices.values())
    value = str(answer).strip()
    letter = re.fullmatch(r"\(?[A-Za-z][.)]?", value)
    if not choices:  # columns r, g and b are none where the answer is a number
        fields = [name for name in row if CHOICE.fullmatch(str(name)) and (letter or len(str(name)) > 1)]
        choices = [row[name] for name in fields if row[name] not in (None, "")]
    listed = choices if isinstance(choices, list) else [choices]
    told = [re.sub(r"^\(?[A-Z][.):]\s*", "", str(choice)).strip() for choice in listed]
    if not choices or value in map(str, listed) or all(choice in question for choice in told):
        return
    number = value.isdigit() and int(value) <= len(listed) > 1
    if number or letter:
        raise InputError(
            f"the answer {value!r} names one of several choices, which are not read: write them into the question"
        )


def _listed_images(entry: dict) -> list:
    """The images of a row: the list of ms-swift and others, of names or of {"path"}, or LLaVA's one."""
    named = entry.get("images") or entry.get("image") or []
    named = named if isinstance(named, list) else [named]
    return [image.get("path") if isinstance(image, dict) else image for image in named]


def _words_of(question: str) -> str:
    """A question without the mark of the image, which stands before the first one whatever the file says."""
    return MARK.sub(" ", question).strip()


def _sayable(answer: str) -> str:
    """An answer without marks of a chat template, which a model's tokens lose when they are made text."""
    return re.sub(rf"(?: *{SPECIAL_TOKEN.pattern} *)+", " ", answer).strip()


def _said(turn: dict, content: str) -> tuple[str, list]:
    """The text of a turn, and the images in it where it comes in parts, as transformers' chat templates take them."""
    if not isinstance(turn.get(content), list):
        return _text(turn, content), []
    parts = [part for part in turn[content] if isinstance(part, dict)]
    text = " ".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    named = [part.get("image") or part.get("path") or part.get("url") for part in parts if part.get("type") == "image"]
    images = list(filter(None, named))
    return _text({content: text}, content), images


def _asked(entry: dict, kind: str | None, number: str | None) -> tuple[str, list[Question]]:
    """`_questions_of` a row that is one question and its answer."""
    if not _field(entry, IMAGE_FIELDS) and "images" in entry:
        if len(images := _listed_images(entry)) != 1:
            raise InputError(f"field 'images': expected one image, found {len(images)}")
        entry = {**entry, "image": images[0]}
    image, question, answer = _field(entry, IMAGE_FIELDS), _question_in(entry), _field(entry, ANSWER_FIELDS)
    if question and question.lower() == "instruction" and isinstance(more := entry.get("input"), str) and more.strip():
        entry = {**entry, question: f"{_text(entry, question)}\n{more.strip()}"}
    if not (image and question and answer):
        what = "an image" if not image else "a question" if not question else "an answer"
        raise InputError(
            f"there is neither 'conversations' nor {what} (the row has {', '.join(entry)}); {OTHER_QUESTIONS}"
        )
    value = entry[answer]
    refuse_choice(entry, str(entry[question]), value)
    if type(value) in (int, float) and math.isfinite(value):  # a count, perhaps out of a table that made it 3.0
        entry = {**entry, answer: str(int(value) if value == int(value) else value)}
    history = entry.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise InputError("field 'history': expected a list of [question, answer]")
    history = tuple((_words_of(q), a.strip()) for q, a in history)
    if not all(text for pair in history for text in pair):
        raise InputError("field 'history': a question or an answer is empty")
    words = _text({**entry, question: _words_of(_text(entry, question))}, question)  # the mark alone is no question
    said = _text({**entry, answer: _sayable(_text(entry, answer))}, answer)
    return _text(entry, image), [Question(words, said, kind, number, history)]


IMAGE_SUFFIXES = {".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".webp", ".bmp", ".gif"}


def files_below(folder: str | Path) -> list[Path]:
    """All files below a folder but hidden ones. Raises InputError: no such folder, one that cannot be listed."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images")

    def refuse(error: OSError):  # what cannot be listed must not pass for what is gone
        raise InputError(f"{error.filename}: the folder cannot be read: {error.strerror}") from None

    found, visited, tops = [], set(), [folder]
    for top in tops:  # folders before links to them: what a link names keeps the name of its own place
        for where, folders, names in os.walk(top, onerror=refuse):
            real = os.path.realpath(where)
            if real in visited:  # a link to what has been seen, or back up
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if name[0] != ".")
            tops += [path for name in folders if (path := Path(where, name)).is_symlink()]
            for name in names:
                path = Path(where, name)
                if not path.suffix and path.is_symlink() and not path.exists():
                    # To a disk that is not mounted, most likely.
                    led = os.readlink(path)
                    raise InputError(f"{path}: the link leads nowhere ({led}); mount it, or remove the link")
                if name[0] != ".":
                    found.append(path)
    return found


def image_files(folder: str | Path, files: list[Path] | None = None) -> list[Path]:
    """Images below a folder, sorted by path; hidden files are left out. files: what `files_below` found there. Raises
    InputError: no such folder, no image."""
    files = files_below(folder) if files is None else files
    found = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"{folder}: no image in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def is_chinese(text: str) -> bool:
    """Whether there is a Chinese character in a text."""
    return bool(re.search(r"[\u4e00-\u9fff]", text))


def has_word(text: str) -> bool:
    """Whether a text says anything: a caption of "..." cannot be scored."""
    return bool(re.search(r"\w", text))


def captions_as_answers(scenes: list[Scene], prompt: str, prompt_zh: str) -> list[QuestionScene]:
    """A scene's captions as answers to the prompt of their row, else to the one of their language (`kind`: en or zh)."""
    made = []
    for scene in scenes:
        answers, times = [], Counter(scene.listed)
        for text in filter(has_word, scene.texts):
            default, kind = (prompt_zh, "zh") if is_chinese(text) else (prompt, "en")
            answers.append(Question(scene.prompts.get(text, default), text, kind, times=max(1, times[text])))
        if answers:
            made.append(QuestionScene(scene.image, answers, scene.split))
    return made


# ----------------------------------------------------------------------------------------------------
# Splits, always by image


def sample_scenes(scenes: list, most: int, seed: int = 0) -> list:
    """At most so many of them, in their order."""
    picked = random.Random(seed).sample(range(len(scenes)), min(most, len(scenes)))
    return [scenes[i] for i in sorted(picked)]


def load_splits(
    config: DataConfig, seed: int = 0, report: Path | None = None, read=read_scenes, train_root: str | None = None
) -> dict[str, list]:
    """`{"train", "val", "test"}` scenes of a configuration; "test" may be empty. `read`: `read_scenes` (texts) or
    `read_conversations` (questions). `train_root`: in place of `config.image_root` for all but the test file.

    A file's own `split` fields are used where no file is named for that split; else `val_fraction` of the training
    images is held out. Bad rows are appended to `report` (rejected.jsonl). Raises InputError, also when an image (the
    same bytes, whatever its name) is in two splits and `allow_leak` is off.
    """
    if not config.train_file:
        raise InputError("no training data: give --train_file (or --preset demo)")
    options = {"language": config.language, "max_rejected": config.max_rejected}
    root = config.image_root if train_root is None else train_root
    found = read(config.train_file, image_root=root, **options)
    rejected, duplicates, left_out = found.rejected, found.duplicates, found.left_out
    splits, others = _by_split(found.scenes, config)
    named = {scene.split for scene in found.scenes}
    for name in ("val", "test"):
        if file := getattr(config, f"{name}_file"):
            found = read(file, image_root=config.image_root if name == "test" else root, **options)
            rejected, duplicates = rejected + found.rejected, duplicates + found.duplicates
            left_out = left_out + found.left_out
            own = [scene for scene in found.scenes if scene.split and _split_of(scene, config) == name]
            here = {scene.split for scene in found.scenes}
            if name == "test" and not own and any(_split_of(scene, config) == OTHER_TEST for scene in found.scenes):
                refuse_absent_split(config.test_split, here)
            named |= here
            if own:
                others.update(scene.split for scene in found.scenes if _split_of(scene, config) == OTHER_TEST)
            splits[name] = own or found.scenes
    if not splits["train"]:
        raise InputError(f"{config.train_file}: no row of split 'train'")
    if config.test_split != "test":
        refuse_absent_split(config.test_split, named)
    content = by_content(images_of(splits))
    if not splits["val"]:
        splits["train"], splits["val"] = _hold_out(splits["train"], content, config.val_fraction, seed)
        if not splits["train"]:
            raise InputError(
                f"{config.train_file}: --val_fraction {config.val_fraction:g} of {len(splits['val'])} images leaves none to"
                " train on"
            )
    _refuse_leaks(find_leaks(splits, content), config.allow_leak)
    if config.max_samples:
        splits = {name: sample_scenes(scenes, config.max_samples, seed) for name, scenes in splits.items()}
    if report:
        report.unlink(missing_ok=True)  # what an earlier start listed
    list_rejected(report, rejected + left_out)
    if others:
        found = ", ".join(f"{count} of {name}" for name, count in others.items())
        print(
            f"data: images of other test splits are left out ({found}); --test_split {next(iter(others))} scores those"
        )
    _say_left_out(report, rejected, left_out, duplicates)
    return splits


def _by_split(scenes: list, config: DataConfig) -> tuple[dict[str, list], Counter]:
    """({"train", "val", "test": scenes of the training file}, how many are of each other test split). Raises InputError."""
    bare = [scene.image for scene in scenes if scene.split is None]
    if bare and len(bare) < len(scenes):
        raise InputError(
            f"{config.train_file}: {len(bare)} of {len(scenes)} images have no split, first {bare[0]}: give it to all or to none"
        )
    splits, others = {"train": [], "val": [], "test": []}, Counter()
    for scene in scenes:
        name = _split_of(scene, config)
        if name == OTHER_TEST:
            others[scene.split] += 1
        elif name not in splits:
            raise InputError(
                f"{config.train_file}: split {scene.split!r} of {scene.image}: expected train, val or test"
            )
        else:
            splits[name].append(scene)
    return splits, others


def _say_left_out(report: Path | None, rejected: list[Rejected], left_out: list[Rejected], duplicates: int) -> None:
    lost = sum(one.reason == NO_IMAGE for one in left_out)
    for what, count in (
        ("texts without a word", len(left_out) - lost),
        ("texts of images that are not in the file", lost),
    ):
        if count:
            print(f"data: {what} left out of {count} rows" + (f", listed in {report}" if report else ""))
    if rejected or duplicates:
        where = f", listed in {report}" if report and rejected else ""
        print(f"data: {len(rejected)} bad rows left out{where}; {duplicates} duplicate rows dropped")


def _hold_out(scenes: list, content: dict[str, str], fraction: float, seed: int) -> tuple[list, list]:
    """(the scenes to train on, those held out), at least one; `content`: of `by_content`."""
    copies = Counter(content[scene.image] for scene in scenes)  # of a picture: they go the same way
    wanted, held = max(1, round(fraction * len(scenes))), set()
    for picture in random.Random(seed).sample(list(copies), len(copies)):
        if wanted > 0:
            held.add(picture)
            wanted -= copies[picture]
    train, val = ([scene for scene in scenes if (content[scene.image] in held) == out] for out in (False, True))
    return train, val


def _refuse_leaks(leaks: list[tuple], allowed: bool) -> None:
    """Raises InputError where there are any of `find_leaks`; where they are `allowed`, says so."""
    if leaks:
        first = "; ".join(f"{a} ({x}) = {b} ({y})" for a, x, b, y in leaks[:3])
        message = f"{len(leaks)} images are in more than one split, e.g. {first}"
        if not allowed:
            raise InputError(message + "; split by image, or go on with --allow_leak")
        print("warning: " + message)


OTHER_TEST = "other test"


def _split_of(scene, config: DataConfig) -> str:
    """Which of train, val and test a scene belongs to; RSVQA HR has two test splits, of which --test_split is scored."""
    split = scene.split or "train"
    if split == config.test_split:
        return "test"
    return OTHER_TEST if split.startswith("test") else split


def refuse_absent_split(wanted: str, named: set[str | None]) -> None:
    """Raises InputError where --test_split is none of the splits that rows name."""
    if wanted not in named:
        there = sorted(name for name in named if name and name.startswith("test"))
        raise InputError(f"--test_split {wanted}: no row is of that split; expected {' or '.join(there) or 'test'}")


def find_leaks(splits: dict[str, list[Scene]], content: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """Images of one split that are in another too: [(path, split, path, split)]. content: what `by_content` says of them."""
    first: dict[str, tuple[str, str]] = {}
    leaks = []
    for split, scenes in splits.items():
        for scene in scenes:
            other = first.setdefault(content[scene.image], (scene.image, split))
            if other[1] != split:
                leaks.append((*other, scene.image, split))
    return leaks


def images_of(splits: dict[str, list[Scene]]) -> list[str]:
    """Paths of all images, each once."""
    return list(dict.fromkeys(scene.image for scenes in splits.values() for scene in scenes))


def describe(splits: dict[str, list[Scene]]) -> str:
    """One line on what was read, for the terminal."""
    parts = []
    for name, scenes in splits.items():
        if scenes:
            texts = Counter("zh" if is_chinese(text) else "en" for scene in scenes for text in scene.texts)
            kinds = " + ".join(f"{count} {language}" for language, count in sorted(texts.items()))
            parts.append(f"{name} {len(scenes)} images, {kinds} texts")
    return "; ".join(parts)
