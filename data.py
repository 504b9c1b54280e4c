"""Files to scenes, scenes to tensors.

A scene is one image and all of its texts: rows that share an image are gathered when a file is read, so
that the image is decoded, resized and encoded once, however many texts hang on it.
"""

import csv
import filecmp
import functools
import hashlib
import json
import os
import random
import re
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from config import SPLITS, SURROGATE, DataConfig, InputError, by_content
from imagery import ImageError, ImageSettings, guessed_bands, image_size, read_image

CHINESE = re.compile(r"[\u4e00-\u9fff]")


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
    """Single texts that say nothing, of rows that have others: listed, but no reason to stop."""


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
        kind = path.suffix.lower()
        remedy = "save the file as UTF-8"
        if kind in (".xlsx", ".xls", ".ods"):
            remedy = "a spreadsheet: export it as CSV"
        elif kind == ".parquet":
            remedy = f"python hub2data.py {path.parent} makes images and captions, questions or labels of parquet files"
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); {remedy}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 inside a text
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}: not JSON: line {number}, column {error.colno}: {error.msg}") from None
        return rows
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None


IMAGE_COLUMNS = ("image", "image_name", "image_path", "filepath", "file_path", "filename", "file_name", "path")
IMAGE_FIELDS = (*IMAGE_COLUMNS, "img", "image_id")
TEXT_FIELDS = (
    "caption", "captions", "sentences", "sentence", "title", "text", "description", "text_output", "ground_truth",
)  # fmt: skip
QUESTION_FIELDS = ("question", "prompt")
ANSWER_FIELDS = ("answer", "ground_truth", "label")
TYPE_FIELDS = ("type", "question_type")
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)  # texts in a list as Python writes it


def read_table(path: str | Path, delimiter: str | None = ",") -> list[list[str]]:
    """The rows of a CSV file; delimiter None: a tab where the first line holds one, else a comma. Raises InputError."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            if delimiter is None:
                delimiter = "\t" if "\t" in file.readline() else ","
                file.seek(0)
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            return list(rows)
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: not a whole CSV, is a quote open? ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from None


def load_rows(path: Path):
    """What `load_json` gives; of a CSV or TSV file its rows by the names in its first line. Raises InputError."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        return load_json(path)
    header, *rows = read_table(path, delimiter=None) or [[]]
    header = [name.strip() for name in header]
    if len(header) == 1 and ";" in header[0]:
        raise InputError(f"{path}: its columns are parted by semicolons; save it with commas, or as .tsv with tabs")
    made = []
    for number, row in enumerate(rows):
        if not row:
            continue
        if len(row) < len(header) or any(map(str.strip, row[len(header) :])):
            raise InputError(
                f"{path}: row {number}: {len(row)} fields, expected {len(header)} ({', '.join(header)}); a field with a"
                " comma needs quotes"
            )
        made.append({name: _unlisted(cell) if name.lower() in TEXT_FIELDS else cell for name, cell in zip(header, row)})
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

    Forms: triplets `[{"image_name", "positive", "negative"}]`; captions `[{"image", "caption"}]`; Karpathy
    `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`; COCO `{"images": [{"id", "file_name"}], "annotations":
    [{"image_id", "caption"}]}`; NWPU-Captions `{class: [{"filename", "raw", "raw_1", ...}]}`, its images in a folder for each
    class or in one; scenes `[{"image", "captions": [...]}]`, with an optional Chinese `zh_answer` to a `zh_prompt`; CSV, TSV
    and rows of an image and its text or texts under any of `IMAGE_FIELDS` and `TEXT_FIELDS`. Rows may have a `split`, captions
    the `prompt` they answer. `path` may also be a folder with images/ and captions.json. Images are looked for in
    `image_root`, else beside the file, in its images/ and in `more_roots`. `among`: of these images alone, found by their
    path or else by their file name, where only one of them has it; rows of others are passed over.

    Returns a `SceneFile`. Raises InputError when the file is of no known form, or when more than `max_rejected` of its
    rows are bad: a missing field, a wrong type, an empty text, an image that is missing or not readable.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "captions.json"
    content = load_rows(path)
    roots = _roots(image_root) or [path.parent, path.parent / "images", *map(Path, more_roots)]
    form, entries, fields = _form_of(path, content, roots)
    result = SceneFile([], [], rows=len(entries))
    scenes: dict[str, Scene] = {}
    found: dict[str, str | None] = {}  # image name -> path, or None with its reason in `bad`
    bad: dict[str, str] = {}
    seen: dict[tuple, int] = {}  # (image, text, negative) -> its row
    find = _find_image if among is None else _Among(among)
    for number, entry in enumerate(entries):
        try:
            name, rows, split, empty = _rows_of(form, entry, fields)
            if name not in found:
                found[name] = None
                try:
                    found[name] = find(name, roots)
                    if found[name] != _Among.OTHER:
                        image_size(found[name])
                except ImageError as error:
                    found[name], bad[name] = None, str(error)
            if found[name] is None:
                raise InputError(bad[name])
        except InputError as error:
            result.rejected.append(Rejected(str(path), number, str(error)))
            continue
        if found[name] == _Among.OTHER:
            result.rows -= 1
            continue
        if empty:
            reason = f"{empty} texts of {name} hold no word and are left out"
            result.left_out.append(Rejected(str(path), number, reason))
        scene = scenes.setdefault(found[name], Scene(found[name], split=split, label=_label(entry), name=name))
        if scene.split != split:
            raise InputError(f"{path}: row {number}: image {name!r} is in split {split!r} and in {scene.split!r}")
        for text, negative in rows:
            if language != "all" and (language == "zh") != bool(CHINESE.search(text)):
                continue
            key = (scene.image, text, negative)
            if seen.get(key, number) == number:
                scene.listed.append(text)
            if key in seen:
                result.duplicates += 1
                continue
            seen[key] = number
            scene.rows.append((text, negative))
            prompt = entry.get("zh_prompt" if text == str(entry.get("zh_answer")).strip() else "prompt")
            if isinstance(prompt, str) and prompt.strip():
                scene.prompts[text] = prompt.strip()
    for scene in scenes.values():
        scene.texts = list(dict.fromkeys(text for text, _ in scene.rows))
        if form == "triplets":  # a text stands there once for each of its negatives
            scene.listed = list(scene.texts)
        true = set(scene.texts)
        wrong = [row for row in scene.rows if row[1] in true]
        for row in wrong:
            reason = f"field 'negative': {row[1]!r} is also a positive of {scene.image}"
            result.rejected.append(Rejected(str(path), seen[(scene.image, *row)], reason))
        scene.rows = [row for row in scene.rows if row not in set(wrong)]
        if scene.rows:
            result.scenes.append(scene)
    _refuse_rejected(path, result, max_rejected)
    if not result.scenes:
        what = "usable row" if among is None else f"row of the {len(among)} images"
        raise InputError(f"{path}: no {what}" + (f" with --language {language}" if language != "all" else ""))
    return result


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
        image, own = self.names.get(base), next((root / name for root in roots if (root / name).is_file()), None)
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


def _form_of(path: Path, content, roots: list[Path]) -> tuple[str, list, tuple[str, str]]:
    """The form of a file, its entries, one for each row or image, and the fields of image and texts in them."""
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if not isinstance(content.get("annotations"), list):
            return "karpathy", content["images"], ("filename", "sentences")
        captions: dict[str, list] = {}
        for row in content["annotations"]:
            if isinstance(row, dict):
                captions.setdefault(str(row.get("image_id")), []).append(row.get("caption"))
        images = [image if isinstance(image, dict) else {} for image in content["images"]]
        entries = [{**image, "captions": captions.get(str(image.get("id")), [])} for image in images]
        return "coco", entries, ("file_name", "captions")
    if isinstance(content, dict) and content and all(map(_is_nwpu, content.values())):
        entries = []
        for label, rows in content.items():
            folder = any((root / label / rows[0]["filename"]).is_file() for root in roots)
            for row in rows:
                row = row if isinstance(row, dict) else {}
                keys = [key for key in row if re.fullmatch(r"raw(_\d+)?", key)] or ["raw"]
                texts = [{"raw": row.get(key)} for key in keys]
                entries.append({**row, "class": label, "filepath": label if folder else "", "sentences": texts})
        return "karpathy", entries, ("filename", "sentences")
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]
    if isinstance(content, list):
        first = next((entry for entry in content if isinstance(entry, dict)), {})
        image, text = _field(first, IMAGE_FIELDS), _field(first, TEXT_FIELDS, (str, list))
        # VRSBench has answers and boxes in files of this form, too.
        asked = text == "ground_truth" and "caption" not in str(first.get("type", "caption"))
        if image and "positive" in first:
            return "triplets", content, (image, "positive")
        if image and text and not asked:
            return "captions", content, (image, text)
        if not content:
            raise InputError(f"{path}: the list is empty")
        have = f"its first row has {sorted(first)}" if first else "its rows are not objects"
        if "conversations" in first or "question" in first:
            have += " (questions and conversations are for train_vqa.py, the latter with --task chat)"
    else:
        have = f"its top level is {type(content).__name__}"
        if isinstance(content, dict):
            have += f" with {list(content)[:5]}"
    raise InputError(
        f"{path}: expected rows of an image ({', '.join(IMAGE_FIELDS)}) and its text or texts ({', '.join(TEXT_FIELDS)}) or of"
        f' {{image_name, positive, negative}}; or {{"images": [...]}} of Karpathy or COCO, or {{class: [...]}} of NWPU-Captions;'
        f" {have}"
    )


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
    if form == "triplets":
        negative = _text(entry, "negative") if entry.get("negative") is not None else None
        return _text(entry, image), [(_text(entry, field), negative)], split, 0
    texts = entry.get(field)
    if form == "captions" and not isinstance(texts, list):
        name, text = _text(entry, image), _text(entry, field)
        return (name, [(text, None)], split, 0) if has_word(text) else (name, [], split, 1)
    if not isinstance(texts, list) or (form == "karpathy" and not texts):
        raise InputError(f'field {field!r}: expected a list with at least one {{"raw": text}}')
    texts = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in texts]
    name = _text(entry, image)
    if form == "karpathy" and isinstance(entry.get("filepath"), str):
        name = str(Path(entry["filepath"]) / name)
    said = [_text({field: text}, field) for text in texts if not _says_nothing(text)]
    empty = len(texts) - len(said)
    if form == "captions" and isinstance(entry.get("zh_answer"), str) and not _says_nothing(entry["zh_answer"]):
        said.append(_text(entry, "zh_answer"))
    if not said:
        raise InputError(
            f"field {field!r}: none of them holds a word" if texts else f"field {field!r}: there is no text"
        )
    return name, [(text, None) for text in said], split, empty


def _split_in(entry: dict):
    """The split that a row names, under our name for it; None where it names none."""
    split = entry.get(_field(entry, ("split",)))
    return (SPLITS.get(split.strip().lower(), split.strip()) if isinstance(split, str) else split) or None


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


def _find_image(name: str, roots: list[Path]) -> str:
    for root in roots:
        if (root / name).is_file():
            return str(root / name)
    if "\\" in name:  # written on Windows
        return _find_image(name.replace("\\", "/"), roots)
    below = [
        str(folder / name)
        for folder in dict.fromkeys(f for root in roots for f in _folders_in(root))
        if (folder / name).is_file()
    ]
    if len(below) == 1:  # RSICD_images/ beside the file, train2017/ and val2017/ in the root
        return below[0]
    remedy = f"it may be {below[0]} or {below[1]}: set --image_root" if below else "set --image_root"
    raise ImageError(f"{name}: no such image in {' or '.join(str(root) for root in roots)} ({remedy})")


@functools.lru_cache(maxsize=8)
def _folders_in(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return []


# ----------------------------------------------------------------------------------------------------
# Questions about images

VISION = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)


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
    of chat rows (`img`, `prompt`, `label`), of VRSBench (`image_id`, `ground_truth`), of EarthVQA (`{image: [{"Question",
    "Answer", "Type"}]}`) and of FloodNet (`{"0": {"Image_ID", "Question", "Ground_Truth", "Question_Type"}}`).
    A conversation may go on, user and assistant by turns: each answer makes a question of its own, with what was said
    before as its `history`; a chat row may bring `"history": [[question, answer], ...]`.

    Returns a `SceneFile` of `QuestionScene`s. Raises InputError as `read_scenes` does.
    """
    path = Path(path)
    content = load_rows(path)
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        raise InputError(
            f"{path}: questions of RSVQA without their answers: run data2csv.py and csv2json.py on their folder"
        )
    content = _listed(content)
    if not isinstance(content, list) or not content:
        have = f"an object with {list(content)[:5]}" if isinstance(content, dict) else f"{json.dumps(content)[:20]}"
        raise InputError(
            f"{path}: expected a list of conversations with at least one in it, found {have}; {OTHER_QUESTIONS}"
        )
    roots = _roots(image_root) or [path.parent, path.parent / "images"]
    result, scenes = SceneFile([], [], rows=len(content)), {}
    found: dict[str, str | InputError] = {}
    seen = set()
    for number, entry in enumerate(content):
        try:
            name, questions = _questions_of(entry)
            if name not in found:
                try:
                    found[name] = _find_image(name, roots)
                    image_size(found[name])
                except ImageError as error:
                    found[name] = InputError(str(error))
            if isinstance(found[name], InputError):
                raise found[name]
        except InputError as error:
            result.rejected.append(Rejected(str(path), number, str(error)))
            continue
        split = _split_in(entry)
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
    """`read_conversations`; or a file of captions in any form of `read_scenes`, as answers to their own prompts or to a
    request for a description. options: those of both."""
    rows = _listed(load_rows(Path(path))) if Path(path).is_file() else None
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    one = _field(first, QUESTION_FIELDS) and _field(first, ANSWER_FIELDS) and not _field(first, ("caption", "captions"))
    if one or any(form[0] in first for form in CONVERSATIONS):
        return read_conversations(path, **options)
    found = read_scenes(path, **options)
    found.scenes = captions_as_answers(found.scenes, "Describe the image.", "描述这幅图像。")
    return found


def _listed(content):
    """Rows of questions that stand under their image (EarthVQA) or a number (FloodNet), as a list; others as they are."""
    if not isinstance(content, dict) or not content:
        return content
    if all(isinstance(rows, list) and rows and isinstance(rows[0], dict) for rows in content.values()):
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
    if not images:
        said[0] = said[0].replace("<image>", " ")
        named = entry.get("images") or entry.get("image") or []  # the list of ms-swift and others, LLaVA's one
        images = [image for _, found in parts for image in found] or (named if isinstance(named, list) else [named])
        images = [image.get("path") if isinstance(image, dict) else image for image in images]
    said[0] = re.sub(" {2,}", " ", VISION.sub(" ", said[0]).strip())
    one = len(images) == 1 and isinstance(images[0], str) and images[0].strip()
    if not one or not said[0] or any(VISION.search(text) for text in said):
        raise InputError(
            f"field {content!r}: expected a question and one <|vision_start|>image path<|vision_end|> (or a field 'image'),"
            f" found {len(images)} images and {str(turns[0].get(content))[:80]!r}"
        )
    pairs = tuple(zip(said[::2], said[1::2]))
    return images[0].strip(), [Question(q, a, kind, number, pairs[:n]) for n, (q, a) in enumerate(pairs)]


def _said(turn: dict, content: str) -> tuple[str, list]:
    """The text of a turn, and the images in it where it comes in parts, as transformers' chat templates take them."""
    if not isinstance(turn.get(content), list):
        return _text(turn, content), []
    parts = [part for part in turn[content] if isinstance(part, dict)]
    text = " ".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    images = [part["image"] for part in parts if part.get("type") == "image" and part.get("image")]
    return _text({content: text}, content), images


def _asked(entry: dict, kind: str | None, number: str | None) -> tuple[str, list[Question]]:
    """`_questions_of` a row that is one question and its answer."""
    image, question, answer = (_field(entry, known) for known in (IMAGE_FIELDS, QUESTION_FIELDS, ANSWER_FIELDS))
    if not (image and question and answer):
        what = "an image" if not image else "a question" if not question else "an answer"
        raise InputError(
            f"there is neither 'conversations' nor {what} (the row has {', '.join(entry)}); {OTHER_QUESTIONS}"
        )
    if type(entry[answer]) is int:  # a count
        entry = {**entry, answer: str(entry[answer])}
    history = entry.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) and text.strip() for pair in history for text in pair):
        raise InputError("field 'history': expected a list of [question, answer]")
    history = tuple(tuple(text.strip() for text in pair) for pair in history)
    return _text(entry, image), [Question(_text(entry, question), _text(entry, answer), kind, number, history)]


IMAGE_SUFFIXES = {".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".webp", ".bmp", ".gif"}


def files_below(folder: str | Path) -> list[Path]:
    """All files below a folder but hidden ones. Raises InputError: no such folder, one that cannot be listed."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images")

    def refuse(error: OSError):  # what cannot be listed must not pass for what is gone
        raise InputError(f"{error.filename}: the folder cannot be read: {error.strerror}") from None

    found, visited = [], set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(where, name) for name in names if name[0] != "."]
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
    return bool(CHINESE.search(text))


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


def load_splits(config: DataConfig, seed: int = 0, report: Path | None = None, read=read_scenes) -> dict[str, list]:
    """`{"train", "val", "test"}` scenes of a configuration; "test" may be empty. `read`: `read_scenes` (texts) or
    `read_conversations` (questions).

    A file's own `split` fields are used where no file is named for that split; else `val_fraction` of the training
    images is held out. Bad rows are appended to `report` (rejected.jsonl). Raises InputError, also when an image (the
    same bytes, whatever its name) is in two splits and `allow_leak` is off.
    """
    if not config.train_file:
        raise InputError("no training data: give --train_file (or --preset demo)")
    options = {
        "image_root": config.image_root,
        "language": config.language,
        "max_rejected": config.max_rejected,
    }
    splits: dict[str, list] = {"train": [], "val": [], "test": []}
    found = read(config.train_file, **options)
    rejected, duplicates, left_out = found.rejected, found.duplicates, found.left_out
    others: Counter = Counter()
    for scene in found.scenes:
        name = _split_of(scene, config)
        if name == OTHER_TEST:
            others[scene.split] += 1
        elif name not in splits:
            raise InputError(
                f"{config.train_file}: split {scene.split!r} of {scene.image}: expected train, val or test"
            )
        else:
            splits[name].append(scene)
    for name in ("val", "test"):
        if file := getattr(config, f"{name}_file"):
            found = read(file, **options)
            rejected, duplicates = rejected + found.rejected, duplicates + found.duplicates
            left_out = left_out + found.left_out
            own = [scene for scene in found.scenes if scene.split and _split_of(scene, config) == name]
            if own:
                others.update(scene.split for scene in found.scenes if _split_of(scene, config) == OTHER_TEST)
            splits[name] = own or found.scenes
    if not splits["train"]:
        raise InputError(f"{config.train_file}: no row of split 'train'")
    content = by_content(images_of(splits))
    if not splits["val"]:
        scenes = splits["train"]
        copies = Counter(content[scene.image] for scene in scenes)  # of a picture: they go the same way
        wanted, held = max(1, round(config.val_fraction * len(scenes))), set()
        for picture in random.Random(seed).sample(list(copies), len(copies)):
            if wanted > 0:
                held.add(picture)
                wanted -= copies[picture]
        splits["val"] = [scene for scene in scenes if content[scene.image] in held]
        splits["train"] = [scene for scene in scenes if content[scene.image] not in held]
        if not splits["train"]:
            raise InputError(
                f"{config.train_file}: {len(splits['val'])} image is too few to hold one out for validation"
            )
    leaks = find_leaks(splits, content)
    if leaks:
        first = "; ".join(f"{a} ({x}) = {b} ({y})" for a, x, b, y in leaks[:3])
        message = f"{len(leaks)} images are in more than one split, e.g. {first}"
        if not config.allow_leak:
            raise InputError(message + "; split by image, or go on with --allow_leak")
        print("warning: " + message)
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
    if left_out:
        print(
            f"data: texts without a word left out of {len(left_out)} rows" + (f", listed in {report}" if report else "")
        )
    if rejected or duplicates:
        where = f", listed in {report}" if report and rejected else ""
        print(f"data: {len(rejected)} bad rows left out{where}; {duplicates} duplicate rows dropped")
    return splits


OTHER_TEST = "other test"


def _split_of(scene, config: DataConfig) -> str:
    """Which of train, val and test a scene belongs to; RSVQA HR has two test splits, of which --test_split is scored."""
    split = scene.split or "train"
    if split == config.test_split:
        return "test"
    return OTHER_TEST if split.startswith("test") else split


def find_leaks(
    splits: dict[str, list[Scene]], content: dict[str, str] | None = None
) -> list[tuple[str, str, str, str]]:
    """Images of one split that are in another too, by content: [(path, split, path, split)]. content: what `by_content` says
    of the images, where that is known."""
    content = content or by_content(images_of(splits))
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


# ----------------------------------------------------------------------------------------------------
# Pixels: every image is decoded and resized once


def image_settings(config: DataConfig) -> ImageSettings:
    """The `ImageSettings` a configuration asks for. Raises InputError."""
    return ImageSettings(
        bands=config.bands,
        stretch=config.stretch,
        percentiles=tuple(config.percentiles),
        reflectance=tuple(config.reflectance),
        nodata=config.nodata,
    )


def digest_of(text: str) -> str:
    """32 hex digits, by which caches name what belongs to a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _refuse_thin(rgb: np.ndarray) -> None:
    """Qwen-VL's processor takes no picture longer than 200 times its width, and no model sees anything in one."""
    height, width = rgb.shape[:2]
    if max(height, width) > 200 * min(height, width):
        raise ImageError(f"{width} x {height} pixels: longer than 200 times its width; cut it into pieces")


class QwenResize:
    """Bring an RGB image to the size the Qwen-VL processor would, by the same Pillow resize.

    Sides become multiples of patch_size * merge_size, area between the processor's limits (Qwen2-VL, section 2.1).
    """

    def __init__(self, processor):
        self.factor = processor.patch_size * processor.merge_size
        self.low, self.high = processor.size["shortest_edge"], processor.size["longest_edge"]
        self.resample = Image.Resampling(processor.resample)
        self.key = f"qwen-{self.factor}-{self.low}-{self.high}-{int(self.resample)}"

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (H', W', 3) uint8."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        _refuse_thin(rgb)
        h, w = smart_resize(*rgb.shape[:2], self.factor, self.low, self.high)
        return np.asarray(Image.fromarray(rgb).resize((w, h), self.resample))


TORCH_MODES = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers; what else there is goes through the processor


class SquareResize:
    """Bring an RGB image to the square that a CLIP or SigLIP processor makes of it.

    By torch's resize of bytes, as transformers' own processors do where torchvision is installed. It takes a fifth of
    Pillow's time. Of photographs one byte in 250 differs, by 2 of 255 at most; a test compares them.
    """

    def __init__(self, processor):
        self.processor, self.size = processor, dict(processor.size)
        self.crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
        how = [self.size, self.crop and dict(self.crop), int(processor.resample)]
        self.key = f"square-torch-{json.dumps(how, sort_keys=True)}"

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (S, S, 3) uint8."""
        from transformers.image_transforms import get_resize_output_image_size

        _refuse_thin(rgb)
        mode, shortest = TORCH_MODES.get(int(self.processor.resample)), self.size.get("shortest_edge")
        if mode is None or not self.processor.do_resize or self.size.get("longest_edge"):
            made = self.processor(
                images=[rgb], do_rescale=False, do_normalize=False, input_data_format="channels_last"
            )["pixel_values"][0]  # fmt: skip
            return np.ascontiguousarray(np.asarray(made).transpose(1, 2, 0))
        if shortest:
            sides = get_resize_output_image_size(rgb, shortest, False, input_data_format="channels_last")
        else:
            sides = (self.size["height"], self.size["width"])
        made = torch.from_numpy(np.require(rgb, requirements="CW"))  # torch warns of what may not be written
        made = made[None].permute(0, 3, 1, 2)  # in the order of channels_last, which is fastest
        made = torch.nn.functional.interpolate(made, sides, mode=mode, antialias=True)[0].numpy()
        if self.crop:
            made = self.processor.center_crop(made, self.crop)
        return np.ascontiguousarray(made.transpose(1, 2, 0))


class PixelStore:
    """Resized RGB pixels by image path, made once and kept on disk under `cache_dir/pixels`.

    An entry is found again while path, size and time of change of the file, the image settings and the resize are the
    same. Without a cache folder each call decodes anew.
    """

    def __init__(self, resize, settings: ImageSettings, cache_dir: str | None = None):
        self.resize, self.settings = resize, settings
        self.folder = Path(cache_dir) / "pixels" if cache_dir else None
        self.recipe = json.dumps([resize.key, settings.to_dict()], sort_keys=True)

    def __getitem__(self, path: str) -> np.ndarray:
        """(H, W, 3) uint8. Raises ImageError."""
        entry = self._entry(path)
        if entry is not None:
            try:
                return np.load(entry)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile):
                entry.unlink(missing_ok=True)  # cut short by a full disk: make it anew
        pixels = self.resized(path, read_image(path, self.settings).rgb)
        if entry is not None:
            temporary = entry.with_suffix(f".{os.getpid()}.{id(pixels)}.tmp")
            try:
                entry.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "wb") as file:
                    np.save(file, pixels)
                os.replace(temporary, entry)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise InputError(
                    f"{entry.parent}: cannot keep resized images: {error.strerror}; see --cache_dir"
                ) from None
        return pixels

    def resized(self, path: str, rgb: np.ndarray) -> np.ndarray:
        """The picture (H, W, 3) of a file as the vision tower takes it. Raises ImageError, naming the file."""
        try:
            return self.resize(rgb)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None

    @staticmethod
    def identity(path: str) -> str:
        """A text that changes when the file at `path` does, the same through links to it. Raises ImageError."""
        try:
            stat = os.stat(path)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
        return f"{os.path.realpath(path)}|{stat.st_size}|{stat.st_mtime_ns}"

    def _entry(self, path: str) -> Path | None:
        if self.folder is None:
            return None
        digest = digest_of(f"{self.identity(path)}|{self.recipe}")
        return self.folder / digest[:2] / f"{digest}.npy"

    def prepare(self, paths: list[str], desc: str = "images") -> dict[str, str]:
        """Decode every image once, in threads; returns {path: reason} of those that fail.

        A truncated file is found here, before training, not in the middle of an epoch.
        """

        def attempt(path):
            try:
                self[path]
            except ImageError as error:
                return str(error)

        paths = list(dict.fromkeys(paths))
        missing = [path for path in paths if (entry := self._entry(path)) is None or not entry.exists()]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # Pillow and GDAL release the GIL
            reasons = list(
                tqdm(pool.map(attempt, missing), total=len(missing), desc=desc, disable=not missing, leave=False)
            )
        return {path: reason for path, reason in zip(missing, reasons) if reason}


def is_blank(rgb: np.ndarray) -> bool:
    """Whether a picture is all black or all white, as under a stretch that does not fit the file."""
    return rgb.max(initial=0) == 0 or rgb.min(initial=255) == 255


def drop_unreadable(
    splits: dict[str, list[Scene]], store: PixelStore, max_rejected: float, report: Path | None = None
) -> dict[str, list[Scene]]:
    """Decode all images; scenes whose image fails are listed in `report` and left out.

    Raises InputError when more than `max_rejected` of the images fail, or a split would be empty.
    """
    bad = store.prepare([scene.image for scenes in splits.values() for scene in scenes], "reading images")
    if bad:
        total = sum(len(scenes) for scenes in splits.values())
        if len(bad) > max_rejected * total:
            raise InputError(
                f"{len(bad)} of {total} images cannot be decoded (allowed: --max_rejected {max_rejected:g}):"
                + "".join(f"\n  {reason}" for reason in list(bad.values())[:5])
            )
        print(
            f"data: {len(bad)} images cannot be decoded and are left out" + (f", listed in {report}" if report else "")
        )
        list_rejected(report, [Rejected(path, -1, reason) for path, reason in bad.items()])
    kept = {name: [scene for scene in scenes if scene.image not in bad] for name, scenes in splits.items()}
    images = [scene.image for scenes in kept.values() for scene in scenes]
    if note := guessed_bands(images, store.settings):
        print(f"data: {note}")
    looked = images[:: max(1, len(images) // 32)]
    if len(looked) > 1 and all(is_blank(store[image]) for image in looked):
        raise InputError(
            f"all of {len(looked)} pictures looked at are black or white, with --stretch {store.settings.stretch}: it does not"
            f" fit the values in the files, such as {looked[0]}; give --stretch percentile, or --reflectance in the files' own"
            " units"
        )
    for name in splits:
        if splits[name] and not kept[name]:
            raise InputError(f"no image of the {name} split can be decoded")
    return kept


def token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without marks around it. Equal texts are split once: a million questions of RSVQA HR are few
    different ones."""
    known = list(dict.fromkeys(texts))
    ids = dict(zip(known, tokenizer(known, add_special_tokens=False)["input_ids"])) if known else {}
    return [ids[text] for text in texts]


def drop_too_long(
    splits: dict[str, list[QuestionScene]], tokenizer, max_rejected: float, report: Path | None = None,
    advice: str = "", **limits: tuple[str, int],
) -> dict[str, list[QuestionScene]]:  # fmt: skip
    """Splits without the questions and, except in the test split, the answers that are too long: listed in `report` and
    counted. A test answer that is too long stays: no model can be right on it, and that is part of the score.

    limits: question=(flag, tokens), answer=(flag, tokens). Raises InputError when more than `max_rejected` would go, with
    `advice` where answers are what is too long."""
    rejected, kept = [], {}
    for name, scenes in splits.items():
        listed = [question for scene in scenes for question in scene.questions]
        reasons: dict[int, str] = {}
        for part, (flag, limit) in limits.items():
            if (part == "answer" and name == "test") or not listed:
                continue
            texts = [q.text if part == "question" else q.answer for q in listed]
            for question, ids in zip(listed, token_ids(tokenizer, texts)):
                if len(ids) > limit:
                    reasons.setdefault(id(question), f"{part} of {len(ids)} tokens: above {flag} {limit}")
        kept[name] = []
        for scene in scenes:
            long = [question for question in scene.questions if id(question) in reasons]
            rejected += [Rejected(scene.image, q.id, reasons[id(q)]) for q in long]
            if len(long) < len(scene.questions):
                chosen = [question for question in scene.questions if id(question) not in reasons]
                kept[name].append(QuestionScene(scene.image, chosen, scene.split))
    total = sum(len(scene.questions) for scenes in splits.values() for scene in scenes)
    if len(rejected) > max_rejected * total:
        raise InputError(
            f"{len(rejected)} of {total} texts are too long (allowed: --max_rejected {max_rejected:g}),"
            f" e.g. of {rejected[0].file}: {rejected[0].reason}"
            + (f"; {advice}" if advice and any(row.reason.startswith("answer") for row in rejected) else "")
        )
    if rejected:
        print(f"data: {len(rejected)} texts left out as too long" + (f", listed in {report}" if report else ""))
        list_rejected(report, rejected)
    return kept


# ----------------------------------------------------------------------------------------------------
# Features of frozen towers: constants, kept on disk


class FeatureStore:
    """Arrays by key in one folder per `recipe` (tower fingerprint, image settings, ...), written atomically."""

    def __init__(self, cache_dir: str, recipe: str):
        self.folder = Path(cache_dir) / "features" / digest_of(recipe)

    def get(self, keys: list[str], compute, desc: str = "features", batch: int = 256) -> np.ndarray:
        """(len(keys), D) float32, row by row from disk where present; `compute(list of keys) -> (n, D)` for the rest."""
        table: dict[str, np.ndarray] = {}
        for shard in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(shard) as stored:
                    table.update(zip(stored["digests"].tolist(), stored["features"]))
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
                shard.unlink(missing_ok=True)  # cut short by a full disk: make it anew
        name_of = {key: digest_of(key) for key in dict.fromkeys(keys)}
        missing = [key for key, name in name_of.items() if name not in table]
        made = [
            compute(missing[i : i + batch]) for i in tqdm(range(0, len(missing), batch), desc=desc, disable=not missing)
        ]
        if missing:
            features = np.concatenate(made)
            # Not the keys: one may be a long text, and an array is as wide as its longest entry.
            digests = [name_of[key] for key in missing]
            table.update(zip(digests, features))
            self.folder.mkdir(parents=True, exist_ok=True)
            name = digest_of("\n".join(digests))
            temporary = self.folder / f"{name}.{os.getpid()}.tmp"
            with open(temporary, "wb") as file:
                np.savez(file, digests=np.array(digests), features=features)
            os.replace(temporary, self.folder / f"{name}.npz")
        return np.stack([table[name_of[key]] for key in keys])


class TokenStore:
    """Image tokens (N, D) of a frozen vision tower, one file per image, in one folder per `recipe` (the tower's
    fingerprint and the pixel recipe). N may differ from image to image."""

    def __init__(self, cache_dir: str, recipe: str):
        self.folder = Path(cache_dir) / "tokens" / digest_of(recipe)

    def _entry(self, path: str) -> Path:
        digest = digest_of(PixelStore.identity(path))
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def __getitem__(self, path: str) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """(N, D) tokens and the image's grid (t, h, w) in patches; KeyError when they were not prepared."""
        try:
            stored = load_file(self._entry(path))
        except FileNotFoundError:
            raise KeyError(path) from None
        return stored["tokens"], tuple(stored["grid"].tolist())

    def prepare(self, paths: list[str], encode, batch: int = 32) -> None:
        """Make what is missing: `encode(list of paths)` -> [(tokens (N, D), grid)]. Files cut short are made anew."""
        missing = [path for path in dict.fromkeys(paths) if not _whole_safetensors(self._entry(path))]
        for start in tqdm(range(0, len(missing), batch), desc="encoding images", disable=not missing, leave=False):
            chunk = missing[start : start + batch]
            for path, (tokens, grid) in zip(chunk, encode(chunk)):
                entry = self._entry(path)
                temporary = entry.with_suffix(f".{os.getpid()}.tmp")
                try:
                    entry.parent.mkdir(parents=True, exist_ok=True)
                    save_file({"tokens": tokens.contiguous().cpu(), "grid": torch.tensor(grid)}, temporary)
                    os.replace(temporary, entry)
                except (OSError, SafetensorError) as error:
                    temporary.unlink(missing_ok=True)
                    raise InputError(f"{entry.parent}: cannot keep image tokens: {error}; see --cache_dir") from None


def _whole_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:  # checks the header against the file's length
            return "tokens" in file.keys()  # noqa: SIM118 - a safe_open handle is no mapping
    except (OSError, SafetensorError):
        return False


# ----------------------------------------------------------------------------------------------------
# Scenes -> batches


class SceneSampler(Sampler):
    """Scenes in a shuffled order that depends on (seed, epoch) alone, as (epoch, index) pairs.

    The epoch travels with the index, so worker processes draw the same texts wherever they run, and a resumed run needs
    no hidden state. An epoch is filled up to whole global batches from the start of its own order, so every step has the
    same size on any number of processes.
    """

    def __init__(self, size: int, global_batch: int, seed: int = 0):
        self.size, self.seed, self.epoch = size, seed, 0
        self.length = size if size < global_batch else -(-size // global_batch) * global_batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        for position in range(self.length):
            yield self.epoch, int(order[position % self.size])


class MatchDataset(Dataset):
    """Scenes of the matcher: (epoch, index) -> the image and `texts_per_scene` of its rows, as token ids.

    All texts are tokenized once, when the dataset is made; `text_ids` numbers them, equal texts once.
    """

    def __init__(
        self, scenes: list[Scene], tokenize, store: PixelStore | None, *, texts_per_scene: int = 0, seed: int = 0
    ):
        self.scenes, self.store, self.seed, self.texts_per_scene = scenes, store, seed, texts_per_scene
        texts = dict.fromkeys(t for s in scenes for row in s.rows for t in row if t is not None)
        texts.update(dict.fromkeys(t for s in scenes for t in s.texts))
        self.text_ids = {text: i for i, text in enumerate(texts)}
        self.tokens, self.cut = tokenize(list(texts))
        self.texts = list(texts)
        self.scene_texts = [np.array([self.text_ids[t] for t in s.texts]) for s in scenes]
        self.image_features = self.text_features = None  # of frozen towers: (scenes, D), (texts, D)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        scene = self.scenes[index]
        rows = scene.rows
        if self.texts_per_scene and len(rows) > self.texts_per_scene:
            pick = np.random.default_rng((self.seed, epoch, index)).permutation(len(rows))[: self.texts_per_scene]
            rows = [rows[i] for i in sorted(pick)]
        return {
            "scene": index,
            "pixels": self.store[scene.image] if self.image_features is None else None,
            "rows": [
                (self.text_ids[text], -1 if negative is None else self.text_ids[negative]) for text, negative in rows
            ],
        }


class MatchCollator:
    """Examples of `MatchDataset` -> one batch, each image and each text in it once.

    scene_ids (B,); scene_texts (B, K): ids of every text true of the image, -1 filled; text_ids (T,);
    triplets (M, 3): scene id, text id, negative's id or -1; pixel_values (P, C), image_grid_thw (B, 3), input_ids (T, L),
    text_lengths (T,); or image_features (B, D), text_features (T, D) of a frozen tower.
    """

    def __init__(self, dataset: MatchDataset, processor, pad_id: int):
        self.dataset, self.processor, self.pad_id = dataset, processor, pad_id

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        data = self.dataset
        triplets = np.array([(e["scene"], p, n) for e in examples for p, n in e["rows"]], dtype=np.int64)
        examples = list({e["scene"]: e for e in examples}.values())  # a scene drawn twice is encoded once
        scene_ids = np.array([e["scene"] for e in examples])
        text_ids = np.array(list(dict.fromkeys(t for t in triplets[:, 1:].ravel().tolist() if t >= 0)))
        batch = {
            "scene_ids": torch.from_numpy(scene_ids),
            "scene_texts": pad_rows([data.scene_texts[i] for i in scene_ids], -1),
            "text_ids": torch.from_numpy(text_ids),
            "triplets": torch.from_numpy(triplets),
        }
        if data.image_features is None:
            batch |= pixel_batch([e["pixels"] for e in examples], self.processor)
        else:
            batch["image_features"] = torch.from_numpy(data.image_features[scene_ids])
        if data.text_features is None:
            batch |= token_batch([data.tokens[i] for i in text_ids], self.pad_id)
        else:
            batch["text_features"] = torch.from_numpy(data.text_features[text_ids])
        return batch


# ----------------------------------------------------------------------------------------------------
# Packing: one image and its texts as one sequence


class ChatPrompt:
    """Token ids of a conversation about an image, in the two parts that packing needs.

    The *prefix* is all that questions about one image share (system text, image tokens, the prompt template up to the
    question); a *branch* is one question and, in training, its answer with the token that ends it.
    """

    def __init__(self, tokenizer, template: str, image_token: int, merge: int):
        if template.count("{question}") != 1:
            raise InputError(f"--prompt {template!r}: expected {{question}} in it, once")
        if not tokenizer.chat_template:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
        before, after = template.split("{question}")
        self.tokenizer, self.image_token, self.merge = tokenizer, image_token, merge
        mark = "\u2063"  # stands for the question while the chat template is rendered
        self.heads = {}
        for image in (True, False):
            content = [{"type": "image"}] * image + [{"type": "text", "text": f"{before}{mark}{after}"}]
            whole = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            head, self.after = whole.split(mark)
            ids = tokenizer(head, add_special_tokens=False)["input_ids"]
            self.heads[image] = ids
            if ids.count(image_token) != image:
                raise InputError(f"{tokenizer.name_or_path}: the chat template puts no image into a message")
        self.end = tokenizer.eos_token_id
        # From an answer to the next question, rendered once: the template's own words between two turns.
        turns = [{"role": "user", "content": f"{before}x{after}"}, {"role": "assistant", "content": mark},
                 {"role": "user", "content": f"{before}{mark}{after}"}]  # fmt: skip
        self.between = tokenizer.apply_chat_template(turns, tokenize=False).split(mark)[1]
        self.marks = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))

    def asked(self, question: "Question") -> str:
        """A question behind the turns before it, as `branches` takes it. The template's marks are cut out of what people
        say, so that nobody speaks for another."""
        said = [self.marks.sub(" ", text) for pair in question.history for text in pair]
        turns = [f"{q}{self.after}{a}{self.between}" for q, a in zip(said[::2], said[1::2])]
        return "".join([*turns, self.marks.sub(" ", question.text)])

    def prefix(self, grid: tuple[int, int, int] | None) -> tuple[np.ndarray, np.ndarray]:
        """Prefix of an image with `grid` (t, h, w) patches (None: no image): ids (P,) and rotary positions (3, P).

        Text counts up in all three rows; an image's tokens have the place of their cell as height and width, and text
        goes on after the largest of them (M-RoPE, Wang et al. 2024, arXiv:2409.12191, section 2.1).
        """
        if grid is None:
            ids = np.array(self.heads[False], dtype=np.int64)
            return ids, np.tile(np.arange(len(ids)), (3, 1))
        t, h, w = grid[0], grid[1] // self.merge, grid[2] // self.merge
        place = self.heads[True].index(self.image_token)
        head, tail = self.heads[True][:place], self.heads[True][place + 1 :]
        ids = np.array([*head, *[self.image_token] * (t * h * w), *tail], dtype=np.int64)
        cells = np.indices((t, h, w)).reshape(3, -1) + place
        rest = np.tile(np.arange(len(tail)), (3, 1)) + place + max(t, h, w)
        return ids, np.concatenate([np.tile(np.arange(place), (3, 1)), cells, rest], axis=1)

    def branches(self, questions: list[str], answers: list[str] | None = None) -> list[tuple[np.ndarray, int]]:
        """For each question its ids and how many at their end are to be predicted (0 without an answer)."""
        asked = token_ids(self.tokenizer, [question + self.after for question in questions])
        if answers is None:
            return [(np.array(ids), 0) for ids in asked]
        said = token_ids(self.tokenizer, answers)
        return [(np.array([*q, *a, self.end]), len(a) + 1) for q, a in zip(asked, said)]


class CaptionPrompt:
    """Token ids of "describe this image" and its captions, for a language model that takes image tokens in place of words.

    As `ChatPrompt`: the prefix ends where the image ends, a branch is a prompt and, in training, the caption that answers
    it with the token that ends it. The chat template is the model's own, with thinking turned off where it can be; a model
    without one reads the prompt as a line of its own.
    """

    image_token = -1  # no word of the vocabulary: `model.Captioner` puts the image's tokens there

    def __init__(self, tokenizer, image_tokens: int):
        self.tokenizer, self.image_tokens, self.end = tokenizer, image_tokens, tokenizer.eos_token_id
        image, prompt = "\u2063", "\u2064"  # stand for both while the chat template is rendered
        if tokenizer.chat_template:
            whole = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{image}\n{prompt}"}],
                tokenize=False, add_generation_prompt=True, enable_thinking=False,
            )  # fmt: skip
        else:
            begin = tokenizer.bos_token if tokenizer("")["input_ids"] else ""
            whole = f"{begin}{image}\n{prompt}\n"
        head, rest = whole.split(image)
        self.before, self.after = rest.split(prompt)
        self.head = tokenizer(head, add_special_tokens=False)["input_ids"]

    @staticmethod
    def asked(question: "Question") -> str:
        """The prompt; captions have no turns before them."""
        return question.text

    def prefix(self, grid=None) -> tuple[np.ndarray, np.ndarray]:
        """ids (P,), -1 at the image's tokens, and positions (3, P), the three rows alike."""
        ids = np.array([*self.head, *[self.image_token] * self.image_tokens], dtype=np.int64)
        return ids, np.tile(np.arange(len(ids)), (3, 1))

    def branches(self, prompts: list[str], captions: list[str] | None = None) -> list[tuple[np.ndarray, int]]:
        """For each prompt its ids, with those of its caption, and how many at their end are to be predicted."""
        asked = token_ids(self.tokenizer, [f"{self.before}{prompt}{self.after}" for prompt in prompts])
        if captions is None:
            return [(np.array(ids), 0) for ids in asked]
        said = token_ids(self.tokenizer, captions)
        return [(np.array([*q, *ids, self.end]), len(ids) + 1) for q, ids in zip(asked, said)]


def split_work(prefixes: list[int], branches: list[list[int]], budget: int) -> list[list[tuple[int, list[int]]]]:
    """Cut scenes into pieces of at most `budget` tokens: [[(scene, its branches in this piece)]].

    prefixes: length of each scene's prefix; branches: lengths of its branches. Scenes stay together where they fit; the
    prefix of one that is cut is in each of its pieces. A piece has at least one branch, however long."""
    pieces, used = [[]], 0
    for scene, (prefix, lengths) in enumerate(zip(prefixes, branches)):
        if pieces[-1] and used + prefix + sum(lengths) > budget:
            pieces.append([])
            used = 0
        chosen: list[int] = []
        used += prefix
        for branch, length in enumerate(lengths):
            if chosen and used + length > budget:
                pieces[-1].append((scene, chosen))
                pieces.append([])
                chosen, used = [], prefix
            chosen.append(branch)
            used += length
        pieces[-1].append((scene, chosen))
    return pieces


def row_align(device) -> int:
    """What to round the widths of a packed row's tables to: tensor cores take 16-bit products in eights, and other widths fall
    back to slow kernels (5% of a step on an H100). A CPU does not care, and would only compute the filling."""
    return 8 if torch.device(device).type == "cuda" else 1


def pack(scenes: list[dict], align: int = 1, split: bool = False) -> dict[str, torch.Tensor]:
    """Scenes -> one row of L tokens: each scene's prefix, then its branches; every token stands there once.

    A scene: {"prefix": (ids (P,), positions (3, P)), "branches": [(ids (T,), number of targets)], and of its image
    "tokens" (N, D) or "pixel_values" + "grid", or neither}. Returns

    - input_ids (1, L); position_ids (3, 1, L): a branch goes on where its prefix ends;
    - prefix_rows (S, P), prefix_lengths (S,); branch_rows (S, Q, T), branch_lengths (S, Q): where a scene's tokens stand
      in the row, filled with 0 on the right to a multiple of `align`; long_rows (S, Q', T'): with `split`, the branches that
      are so long that in one table the others would be mostly filling (else empty, Q' = 0);
    - order (L,): where each token of the row stands in [prefix_rows, branch_rows, long_rows] laid flat;
    - label_rows (M,), labels (M,): the row positions that predict something, and what; a branch that is predicted from its
      first token on begins at the last position of its prefix;
    - image_rows (N,) with image_tokens (N, D), or with pixel_values and image_grid_thw (S, 3).
    """
    first = max(len(scene["prefix"][0]) for scene in scenes)
    lengths = [np.array([len(ids) for ids, _ in scene["branches"]], dtype=np.int64) for scene in scenes]
    most, longest = max(map(len, lengths), default=0), max((max(own, default=0) for own in lengths), default=0)
    tables = _two_tables(lengths, first) if split and most else [(most, longest)]
    first, *widths = (-(-width // align) * align for width in (first, *(width for _, width in tables)))
    prefix_rows = np.zeros((len(scenes), first), dtype=np.int64)
    rows = [np.zeros((len(scenes), count, width), dtype=np.int64) for (count, _), width in zip(tables, widths)]
    starts = np.cumsum([prefix_rows.size, *(table.size for table in rows)])
    prefix_lengths = np.array([len(scene["prefix"][0]) for scene in scenes])
    branch_lengths = np.zeros(rows[0].shape[:2], dtype=np.int64)
    ids, positions, order, label_rows, labels = [], [], [], [], []
    at = 0
    for s, scene in enumerate(scenes):
        own, places = scene["prefix"]
        prefix_rows[s, : len(own)] = np.arange(at, at + len(own))
        ids.append(own), positions.append(places), order.append(s * first + np.arange(len(own)))
        at += len(own)
        last, start, used = at - 1, int(places.max()) + 1, [0] * len(rows)
        for branch, targets in scene["branches"]:
            n = len(branch)
            table = int(n > tables[0][1])
            b, used[table] = used[table], used[table] + 1
            rows[table][s, b, :n] = np.arange(at, at + n)
            if not table:
                branch_lengths[s, b] = n
            ids.append(branch), positions.append(np.tile(start + np.arange(n), (3, 1)))
            _, count, width = rows[table].shape
            order.append(starts[table] + (s * count + b) * width + np.arange(n))
            if targets:
                label_rows.append(np.r_[last, at : at + n - 1][n - targets :])
                labels.append(branch[n - targets :])
            at += n
    none = np.zeros(0, dtype=np.int64)
    made = {
        "input_ids": np.concatenate(ids)[None],
        "position_ids": np.concatenate(positions, axis=1)[:, None],
        "prefix_rows": prefix_rows, "prefix_lengths": prefix_lengths,
        "branch_rows": rows[0], "branch_lengths": branch_lengths,
        "long_rows": rows[1] if len(rows) > 1 else np.zeros((len(scenes), 0, 0), dtype=np.int64),
        "order": np.concatenate(order),
        "label_rows": np.concatenate([none, *label_rows]), "labels": np.concatenate([none, *labels]),
    }  # fmt: skip
    result = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in made.items()}
    return result | _image_part(scenes, made["input_ids"][0])


def _two_tables(lengths: list[np.ndarray], prefix: int) -> list[tuple[int, int]]:
    """[(branches of a scene, longest)] of one table for all branches, or of two, the short and the long, where that makes
    attention over (branches, tokens, prefix + tokens) at least a third smaller: a caption among short phrases."""
    ends = np.unique(np.concatenate(lengths))
    counts = np.stack([np.searchsorted(np.sort(own), ends, side="right") for own in lengths])  # (S, ends)
    short, long = counts.max(0), (counts[:, -1:] - counts).max(0)
    work = short * ends * (prefix + ends) + long * ends[-1] * (prefix + ends[-1])
    best = int(work.argmin())
    if work[best] > 2 / 3 * work[-1]:
        return [(int(short[-1]), int(ends[-1]))]
    return [(int(short[best]), int(ends[best])), (int(long[best]), int(ends[-1]))]


def pad_questions(scenes: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """Scenes (as for `pack`) -> a padded row of each question with its own copy of the image: the plain form.

    input_ids, attention_mask, labels (B, L), filled on the right, -100 where nothing is predicted; pixel_values and
    image_grid_thw (B, 3)."""
    rows, targets, copies = [], [], []
    for scene in scenes:
        for branch, count in scene["branches"]:
            rows.append(np.concatenate([scene["prefix"][0], branch]))
            targets.append(np.where(np.arange(len(rows[-1])) < len(rows[-1]) - count, -100, rows[-1]))
            copies.append(scene)
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_rows(rows, pad_id)
    result = {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1])[None] < lengths[:, None]).long(),
        "labels": pad_rows(targets, -100),
    }
    if "pixel_values" in scenes[0]:
        result["pixel_values"] = torch.cat([scene["pixel_values"] for scene in copies])
        result["image_grid_thw"] = torch.tensor([scene["grid"] for scene in copies])
    return result


def _image_part(scenes: list[dict], input_ids: np.ndarray) -> dict[str, torch.Tensor]:
    if not any("image_token" in scene for scene in scenes):
        return {}
    image_token = scenes[0]["image_token"]
    part = {"image_rows": torch.from_numpy(np.flatnonzero(input_ids == image_token))}
    if "tokens" in scenes[0]:
        return part | {"image_tokens": torch.cat([scene["tokens"] for scene in scenes])}
    return part | {
        "pixel_values": torch.cat([scene["pixel_values"] for scene in scenes]),
        "image_grid_thw": torch.tensor([scene["grid"] for scene in scenes]),
    }


class QuestionDataset(Dataset):
    """Scenes of questions: (epoch, index) -> the image and `texts_per_scene` of its questions, as token ids.

    tokens: a prepared `TokenStore` (frozen vision tower); else store: a `PixelStore`, and `processor`. `blind`: no image.
    `share`: what all of a scene's branches begin with (captions: their one prompt) becomes part of the prefix.
    """

    def __init__(
        self, scenes: list[QuestionScene], prompt: "ChatPrompt | CaptionPrompt", *, processor=None,
        store: PixelStore | None = None, tokens: TokenStore | None = None, texts_per_scene: int = 0, seed: int = 0,
        blind: bool = False, answers: bool = True, share: bool = False,
    ):  # fmt: skip
        self.scenes, self.prompt, self.processor, self.store, self.tokens = scenes, prompt, processor, store, tokens
        self.texts_per_scene, self.seed, self.blind, self.share = texts_per_scene, seed, blind, share
        listed = [question for scene in scenes for question in scene.questions]
        made = iter(prompt.branches([prompt.asked(q) for q in listed], [q.answer for q in listed] if answers else None))
        self.branches = [[next(made) for _ in scene.questions] for scene in scenes]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        branches = self.branches[index]
        if self.texts_per_scene and len(branches) > self.texts_per_scene:
            pick = np.random.default_rng((self.seed, epoch, index)).permutation(len(branches))[: self.texts_per_scene]
            branches = [branches[i] for i in sorted(pick)]
        example = {"scene": index, "branches": branches} | self.image(self.scenes[index].image)
        return share_beginning(example) if self.share else example

    def image(self, path: str) -> dict:
        """What a scene needs of its image: the prefix with room for it, and its tokens or its patches."""
        if self.blind:
            return {"prefix": self.prompt.prefix(None)}
        part = {"image_token": self.prompt.image_token}
        if self.tokens is not None:
            part["tokens"], part["grid"] = self.tokens[path]
        else:
            made = pixel_batch([self.store[path]], self.processor)
            part["pixel_values"], part["grid"] = made["pixel_values"], tuple(made["image_grid_thw"][0].tolist())
        return part | {"prefix": self.prompt.prefix(part["grid"])}


def share_beginning(scene: dict) -> dict:
    """A scene (as for `pack`) with the tokens that all of its branches begin with, as far as none is a target, moved to the
    end of its prefix: they are then run once."""
    branches = scene["branches"]
    room = min(len(ids) - targets for ids, targets in branches)
    same = np.all([ids[:room] == branches[0][0][:room] for ids, _ in branches], axis=0)
    count = room if same.all() else int(same.argmin())
    ids, positions = scene["prefix"]
    more = np.tile(positions.max() + 1 + np.arange(count), (3, 1))
    return scene | {
        "prefix": (np.concatenate([ids, branches[0][0][:count]]), np.concatenate([positions, more], axis=1)),
        "branches": [(ids[count:], targets) for ids, targets in branches],
    }


class QuestionCollator:
    """Examples of `QuestionDataset` -> {"pieces": [pack, ...], "targets": number of tokens to predict}: packed, each piece
    within `budget` tokens; with `packing=False` as padded rows, as many at once as the budget holds."""

    def __init__(self, budget: int, *, packing: bool = True, pad_id: int = 0, align: int = 1):
        self.budget, self.packing, self.pad_id, self.align = budget, packing, pad_id, align

    def __call__(self, examples: list[dict]) -> dict:
        targets = sum(count for example in examples for _, count in example["branches"])
        if not self.packing:
            rows = [example | {"branches": [branch]} for example in examples for branch in example["branches"]]
            pieces, longest = [[]], 0
            for row in rows:
                length = len(row["prefix"][0]) + len(row["branches"][0][0])
                if pieces[-1] and max(longest, length) * (len(pieces[-1]) + 1) > self.budget:
                    pieces.append([])
                    longest = 0
                longest = max(longest, length)
                pieces[-1].append(row)
            return {"pieces": [pad_questions(piece, self.pad_id) for piece in pieces], "targets": targets}
        prefixes = [len(example["prefix"][0]) for example in examples]
        lengths = [[len(ids) for ids, _ in example["branches"]] for example in examples]
        pieces = [
            pack(
                [examples[s] | {"branches": [examples[s]["branches"][b] for b in chosen]} for s, chosen in piece],
                self.align,
                split=self.align == 1,  # a GPU pays for launches more than for filling
            )
            for piece in split_work(prefixes, lengths, self.budget)
        ]
        return {"pieces": pieces, "targets": targets}


def pixel_batch(images: list[np.ndarray], processor, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Resized (H, W, 3) uint8 images -> what a vision tower takes, on `device`. Qwen-VL: pixel_values (P, C) float32 and
    image_grid_thw (B, 3) int64; CLIP, SigLIP: pixel_values (B, 3, S, S) float32, and a grid that says one image each."""
    return normalised(stacked(images, processor), processor, device)


def stacked(images: list[np.ndarray], processor) -> dict[str, torch.Tensor]:
    """The first half of `pixel_batch`, for a reading process to send: squares are still (B, S, S, 3) uint8."""
    if hasattr(processor, "merge_size"):
        made = processor(images=images, do_resize=False, return_tensors="pt")
        return {name: made[name] for name in ("pixel_values", "image_grid_thw")}
    return {
        "pixel_values": torch.from_numpy(np.stack(images)),
        "image_grid_thw": torch.ones(len(images), 3, dtype=torch.long),
    }


def normalised(
    batch: dict[str, torch.Tensor], processor, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """The second half of `pixel_batch`: bring to the device, and scale squares there as their processor would."""
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if batch["pixel_values"].dtype == torch.uint8:
        # What the processor makes of black and of white says it all: a line for each channel.
        ends = [np.full((2, 2, 3), value, np.uint8) for value in (0, 255)]
        made = processor(images=ends, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        low, high = made[..., :1, :1].to(device, non_blocking=True)  # (3, 1, 1) each; waiting would empty a GPU's queue
        pixels = batch["pixel_values"].permute(0, 3, 1, 2).contiguous().float()
        batch["pixel_values"] = pixels.mul_((high - low) / 255).add_(low)
    return batch


def token_batch(rows: list[np.ndarray], pad_id: int) -> dict[str, torch.Tensor]:
    """Token ids of each text -> input_ids (T, L), filled on the right, and text_lengths (T,)."""
    return {
        "input_ids": pad_rows(rows, pad_id),
        "text_lengths": torch.tensor([len(row) for row in rows]),
    }


def pad_rows(rows: list[np.ndarray], fill: int) -> torch.Tensor:
    """Integer rows of different lengths -> (N, longest) int64, filled on the right."""
    table = np.full((len(rows), max(len(row) for row in rows)), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)


def describe(splits: dict[str, list[Scene]]) -> str:
    """One line on what was read, for the terminal."""
    parts = []
    for name, scenes in splits.items():
        if scenes:
            texts = Counter("zh" if CHINESE.search(text) else "en" for scene in scenes for text in scene.texts)
            kinds = " + ".join(f"{count} {language}" for language, count in sorted(texts.items()))
            parts.append(f"{name} {len(scenes)} images, {kinds} texts")
    return "; ".join(parts)
