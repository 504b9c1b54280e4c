"""A library of images as a search index: plan, read and encode, keep; then find, look at and score what is in it.

    model = DualEncoder.from_pretrained("lcybuaa/Git-RSCLIP")
    report = index_library(model, "./library", "./library.index")
    with Library.open("./library.index") as library:
        for hit in library.search(library.query(["a river winding through farmland"]), 10):
            print(hit.score, hit.payload["path"], hit.payload["window"])

Reading runs in worker processes ahead of the model. Every FLUSH tiles go to disk while the next are encoded, so a kill
loses seconds of work, and the next run takes up where it stopped, in the middle of a file too.
"""

import contextlib
import dataclasses
import datetime
import fnmatch
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import store
from config import InputError
from data import fitting_workers, is_blank, normalised, over_files, stacked
from imagery import (
    ONE_BAND,
    RENDERING,
    ImageError,
    ImageSettings,
    band_files,
    file_state,
    guessed_bands,
    has_place,
    image_size,
    is_joined,
    join_bands,
    opened,
    read_image,
    tile_windows,
)
from model import DualEncoder, Encoder, pixel_store
from places import box_ring, change_scores, common_share, feature_collection, match_footprints
from scenes import IMAGE_COLUMNS, IMAGE_SUFFIXES, Rejected, files_below, image_files, is_chinese, load_json, read_table
from store import Filter, Hit, Point

WHOLE = 1.5  # an image up to this many tiles long and wide is not cut: scenes "of 256 pixels" have 253 or 280 too
CHECKED = 256  # files that a process looks at before it reports
FLUSH, FLUSH_SECONDS = 1024, 20.0  # tiles, or time, after which what is encoded goes to disk
HASHED = 64 * 2**20  # bytes of a file's content that are hashed: all of most, 64 pieces spread over a larger one
DATE_IN_NAME = re.compile(
    r"(?<!\d)((?:19|20)\d\d)([-_.]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])"
    r"(?=(?:(?:[01]\d|2[0-3])[0-5]\d(?:[0-5]\d\d{0,3})?)?(?!\d))"  # and a clock: 102830, Airbus' 1028301, DJI's 1028
)
DATE_IN_CHINESE = re.compile(r"(?<!\d)((?:19|20)\d\d)年(\d{1,2})月(\d{1,2})日")
DAY_OF_YEAR_IN_NAME = re.compile(r"^L[A-Z]\d{7}((?:19|20)\d{5})|\.A?((?:19|20)\d{5})(?=[.T])")
# Ensembles of prompts (Radford et al. 2021, section 3.1.4) in the words of the captions that remote-sensing models see.
TEMPLATES = {
    "en": ("{}", "{}.", "a satellite image of {}.", "an aerial image of {}.", "a remote sensing image of {}."),
    "zh": ("{}", "{}。", "{}的卫星影像。", "一幅{}的遥感图像。"),
}
CHANGE = 3.0  # spreads of the unchanged from which a change is one
MIN_VALID = 0.5  # share of a tile that must hold data before it is compared with another date's
# Words for all that a picture from above may show: what their scores do on average from one date to another is light, season
# and sensor.
REFERENCE = {
    "en": "airport, beach, bridge, commercial area, desert, farmland, forest, harbour, highway, industrial area, lake, meadow,"
    " mountain, park, parking lot, pond, railway, residential area, river, stadium, storage tanks",
    "zh": "机场，海滩，桥梁，商业区，沙漠，农田，森林，港口，公路，工业区，湖泊，草地，山地，公园，停车场，池塘，铁路，住宅区，"
    "河流，体育场，储罐",
}
# What is said of every hit, beside its attributes.
RESULT = ("query", "rank", "score", "path", "window", "where", "time")
OTHER_RASTERS = {
    ".img", ".vrt", ".nc", ".nc4", ".hdf", ".h5", ".he5", ".grib", ".grib2", ".ecw", ".sid", ".ntf", ".nitf", ".bil", ".bsq",
    ".dat", ".pix", ".asc", ".dem", ".dng", ".heic", ".avif", ".gpkg", ".mbtiles", ".zip", ".tar", ".tgz", ".gz", ".7z", ".rar",
}  # fmt: skip
MASK = re.compile(  # and previews, beside the pictures of Planet, Landsat, HLS and Sentinel-2
    r"^MSK_.*|(?:^|[._])(?:udm2?(?:_(?:clip|reproject|file_format|composite|harmonize|coregister|bandmath|toar))*|B?QA(?:_PIXEL|_RADSAT|_AEROSOL)?|SCL|AOT|WVP|Fmask|CLD(?:PRB)?|SNW(?:PRB)?|PVI|S[AZ]A|V[AZ]A"
    r"|ST_(?:ATRAN|CDIST|DRAD|EMIS|EMSD|TRAD|URAD)|SR_ATMOS_OPACITY)(?:_\d+m)?(?:_clip)?\.(?:tiff?|jp2)$"
    r"|^(?:GF|ZY|CB|HJ|SV)\d.*-(?:MSS|PAN|MUX|PMS|NAD|FWD|BWD)\d*(?:_thumb)?\.jpe?g$"
    r"|^(?:GF|ZY|CB|HJ|SV)\d.*_L\d[A-Z](?:_[A-Z]+_L\d+|\d+(?:-[A-Z]+\d*)?)(?:[._-]thumb)?\.jpe?g$"
    r"|-QL_(?:VNIR|SWIR|QUALITY_\w+|PIXELMASK_\w+)\.tiff?$|^(?:PREVIEW|ICON)_.*\.jpe?g$|-BROWSE\.jpe?g$|^BROWSE\..*\.jpe?g$"
    r"|^S2.*-ql\.jpg$|^L[A-Z]\d\d_.*_thumb_(?:large|small)\.jpe?g$|^S2.*_reference_map\.tif$"
    r"|^S1[A-D]_.*_(?:ls_map|inc_map|dem|area)\.tif$"
    r"|^(?:SENTINEL2|VENUS).*_(?:(?:CLM|EDG|MG2|SAT|IAB|ATB|FLG|IAO|DTS|WGT)_(?:R\d|XS)\.tif|QKL_ALL\.jpg)$",
    re.IGNORECASE,
)
SAFE_PAGE = re.compile(r"\.SAFE/(?:HTML|preview)/", re.IGNORECASE)  # what a Sentinel product shows of itself
CLASS_LISTS = Path(__file__).parent / "classes"
NEIGHBOURS = 0.2  # share of the smaller of two tiles that the other covers, above which both show one place


# ----------------------------------------------------------------------------------------------------
# Plan: which tiles are to be encoded


@dataclass
class PlannedFile:
    """A file of which tiles are to be encoded."""

    path: str
    """Below the library's root, with `/`."""
    size: int
    mtime_ns: int
    hash: str
    windows: list
    """(col, row, width, height), or None for the whole image. Empty where the content is as the index has it, and only the
    attributes or the time of change are not."""
    attributes: dict[str, str]
    image: tuple[int, int] | None = None
    """Width and height in pixels; None where no tile is to be encoded."""

    @property
    def known(self) -> dict:
        """What each of its points says of it."""
        return {name: getattr(self, name) for name in ("attributes", "hash", "size", "mtime_ns")}


@dataclass
class Plan:
    """What a run has to do."""

    files: list[PlannedFile]
    amended: list[PlannedFile]
    """Files whose vectors stay."""
    renamed: dict[str, PlannedFile]
    """{path in the index: the file there is now}, whose vectors stay, too."""
    stale: list[str]
    """Paths whose points are to be removed: gone, or changed since."""
    unchanged: int
    rejected: list[Rejected]
    attributes: dict[str, dict[str, str]]
    """{path: {name: value}} as given, or as the index knew them; those of files that cannot be read too."""
    unknown: list[str]
    """Paths with attributes that are not there."""
    notes: list[str]
    """What to say of the bands."""


def windows_of(height: int, width: int, tile: int, stride: int) -> list:
    """The windows an image is cut into; [None], the whole, where it is at most WHOLE tiles long and wide, or `tile` is 0."""
    if not tile or max(height, width) <= WHOLE * tile:
        return [None]
    return list(tile_windows(height, width, tile, stride))


def content_hash(*paths: str | Path) -> str:
    """16 hex digits of the bytes of a file, or of several; of one above 64 MiB, of its length and 64 pieces of 1 MiB spread
    over it."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= HASHED:
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                digest.update(str(size).encode())
                for start in np.linspace(0, size - (1 << 20), HASHED >> 20).astype(int):
                    file.seek(start)
                    digest.update(file.read(1 << 20))
    return digest.hexdigest()


def time_in_name(path: str) -> str | None:
    """The date that a file's name holds, as 2020-06-30: names of Sentinel and Landsat scenes begin with theirs; those of MODIS,
    HLS and old Landsat scenes hold the day of the year. One that is still to come is a number like any other."""
    name, found = Path(path).name, []
    if ONE_BAND.match(name):  # of a folder that is the scene: S2A_32TLT_20220715_0_L2A/B04.tif
        name = Path(path).parent.name
    dates = [(year, month, day) for year, _, month, day in DATE_IN_NAME.findall(name)]
    for year, month, day in dates + DATE_IN_CHINESE.findall(name):
        with contextlib.suppress(ValueError):
            found.append(datetime.date(int(year), int(month), int(day)))
    for text in filter(None, sum(DAY_OF_YEAR_IN_NAME.findall(name), ())):
        with contextlib.suppress(ValueError):
            found.append(datetime.datetime.strptime(text, "%Y%j").date())
    latest = datetime.date.today() + datetime.timedelta(days=1)
    return next((day.isoformat() for day in found if day <= latest), None)


def read_attributes(path: str | Path) -> dict[str, dict[str, str]]:
    """`read_by_image` of columns that results can have. Raises InputError."""
    names, found = read_by_image(path)
    if bad := [name for name in names if not re.fullmatch(r"\w+", name)]:
        raise InputError(f"{path}: column {bad[0]!r}: expected one word of letters, digits and _")
    if taken := [name for name in names if name in RESULT]:
        raise InputError(f"{path}: column {taken[0]!r}: results have a field of that name already; rename the column")
    return found


def read_by_image(path: str | Path, one_of: tuple[str, ...] = ()) -> tuple[list[str], dict[str, dict[str, str]]]:
    """(names of columns, {path of an image: {name: value}}) from a CSV with the path below the library in a column of that name
    (path, image_path, filepath ...), else in the first. Empty cells are left out. one_of: of the other columns that of such a
    name alone, or the only one. Raises InputError, also where two rows of an image differ."""
    names, rows = read_table(path)
    # Columns without a name are a spreadsheet's empty ones, or pandas' numbers.
    kept = [n for n, name in enumerate(names) if name]
    names, rows = [names[n] for n in kept], [[row[n] for n in kept] for row in rows]
    if len(names) < 2:
        raise InputError(f"{path}: expected a header such as `path,label` with the image's path first")
    at = next((n for n, name in enumerate(names) if name.lower() in IMAGE_COLUMNS), 0)
    if Path(names[at]).suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{path}: line 1: {names[at]!r} is an image; expected a header above it, such as `path,label`")
    others = names[:at] + names[at + 1 :]
    if one_of:
        others = [name for wanted in one_of for name in others if name.lower() == wanted][:1] or others
        if len(others) > 1:
            raise InputError(f"{path}: line 1: expected a column `{one_of[0]}` beside the image's path, found {others}")
    found = {}
    for row in ([cell.strip() for cell in row] for row in rows):
        known = {name: value for n, (name, value) in enumerate(zip(names, row)) if value and n != at and name in others}
        if not row[at] and not known:  # a spreadsheet's blank row
            continue
        if found.setdefault(row[at], known) != known:
            raise InputError(f"{path}: {row[at]} stands in two rows, once with {found[row[at]]} and once with {known}")
    return others, found


def below_library(name: str, known: Container[str]) -> str:
    """A path as a table gives it, as the library has it: without ./, and on Windows written with backslashes."""
    return name if name in known else name.replace("\\", "/").removeprefix("./")


def marks_of(attributes: dict[str, str]) -> str:
    """8 hex digits of them: what follows the content's hash in an index, for other attributes to be noticed."""
    return hashlib.blake2b(repr(sorted(attributes.items())).encode(), digest_size=4).hexdigest()


def ends_of(path: str) -> list[str]:
    """The last parts of a path, the longest first; at last "", the end of all."""
    parts = path.split("/")
    return ["/".join(parts[n:]) for n in range(len(parts) + 1)]


def renamed_files(files: list[PlannedFile], done: dict, found: dict, kept: dict) -> dict[str, PlannedFile]:
    """{path in the index (`done`): the one of `files` that it is now}: a path that is not among those `found` any more, and a
    new file of the same content whose name says the same date. They take their attributes along (`kept`). Files that changed
    places are new: each path is there still."""
    gone: dict[tuple, dict[str, deque[str]]] = {}  # by content, the paths with each end

    def key(path: str, size: int, mtime_ns: int, digest: str) -> tuple:
        # Of a larger file the hash did not see every byte.
        return digest.partition(".")[0], size, mtime_ns if size > HASHED else 0, time_in_name(path)

    for path, known in done.items():
        if path not in found:
            for end in ends_of(path):
                gone.setdefault(key(path, *known), defaultdict(deque))[end].append(path)
    renamed: dict[str, PlannedFile] = {}
    for file in files:
        same = {} if file.path in done else gone.get(key(file.path, file.size, file.mtime_ns, file.hash), {})
        before = None
        for waiting in (same[end] for end in ends_of(file.path) if end in same):  # of copies the likeliest
            while waiting and waiting[0] in renamed:
                waiting.popleft()
            if waiting:
                before = waiting[0]
                break
        if before is None:
            continue
        file.attributes = {k: v for k, v in kept.get(before, {}).items() if k != "folder"} | file.attributes
        file.hash = f"{file.hash.partition('.')[0]}.{marks_of(file.attributes)}"
        renamed[before] = file
    return renamed


class FileChecks:
    """What is to be done with a file: a PlannedFile, Rejected, or None for one that is in the index as it is."""

    def __init__(
        self, found: dict[str, Path], done: dict, attributes: dict, tile: int, stride: int, settings: ImageSettings
    ):
        self.found, self.done, self.attributes, self.cut = found, done, attributes, (tile, stride)
        self.settings = settings
        self.there = {os.path.abspath(path) for path in found.values()}

    def check(self, name: str) -> PlannedFile | Rejected | None:
        path = self.found[name]
        try:
            name.encode()
        except UnicodeEncodeError:  # neither JSON nor the index could hold it
            shown = name.encode(errors="replace").decode()
            return Rejected(shown, -1, f"{shown}: the name is not UTF-8; rename the file")
        try:
            size, mtime_ns = file_state(path, self.settings.bands)
            mine = {"folder": name.rpartition("/")[0]} if "/" in name else {}
            mine |= self.attributes.get(name, {})
            marks = marks_of(mine)
            old = self.done.get(name)
            files = band_files(path, self.settings.bands)
            known, _, known_marks = old[2].partition(".") if old else ("", "", "")
            untouched = old is not None and old[:2] == (size, mtime_ns)
            if untouched and known_marks == marks:
                return None
            if not os.path.isfile(path):  # it may have no end
                return Rejected(name, -1, f"{path}: no file but a pipe, a socket or a device")
            content = known if untouched else content_hash(*files)
            digest = f"{content}.{marks}"
            if content == known and (untouched or size <= HASHED):  # of a larger file the hash did not see every byte
                return PlannedFile(name, size, mtime_ns, digest, [], mine)
            size_of_image = image_size(path)
            windows = windows_of(*size_of_image, *self.cut)
            stands_for_all = len(files) > 1 and not any(file in self.there for file in files[1:])
            if stands_for_all and not is_joined(path, self.settings):
                what = "the files of green and blue beside it are of another grid or type, or have no CRS"
                return Rejected(name, -1, f"{path}: {what}; join them first")
        except OSError as error:
            return Rejected(name, -1, f"{path}: cannot be read: {error.strerror}")
        except ImageError as error:
            return Rejected(name, -1, str(error))
        return PlannedFile(name, size, mtime_ns, digest, windows, mine, size_of_image)


def plan_index(
    root: Path, index, *, tile: int, stride: int, settings: ImageSettings,
    only: Iterable[str] = ("*",), attributes: dict[str, dict[str, str]] | None = None, workers: int = 0,
) -> Plan:  # fmt: skip
    """Compare the images below `root` with what `index` holds (None: nothing), in `workers` processes where there are many.
    `only`: patterns of which a file's name, or its path below `root`, matches one. `attributes` None: files keep those they
    have. Raises InputError: no image below `root`, attributes of an image that is not there."""
    below = files_below(root)
    try:
        every = image_files(root, below)
    except InputError as error:
        raise InputError("; ".join(filter(None, (str(error), passed_over(below))))) from None
    images, masks = _chosen(root, every, only)
    images, bands = join_bands(images, settings)
    found = {path.relative_to(root).as_posix(): path for path in images}
    kept = {}
    if attributes is None:
        kept = index.attributes() | index.record.get("waiting", {}) if index is not None else {}
        attributes = {name: values for name, values in kept.items() if name in found}
    attributes = {below_library(name, found): values for name, values in attributes.items()}
    unknown = sorted(set(attributes) - set(found))
    if unknown and len(unknown) == len(attributes):
        raise InputError(
            f"attributes: none of the {len(unknown)} images is below {root}, first {unknown[0]!r}; expected a column `path` with"
            " each image's path below that folder"
        )
    attributes = {name: values for name, values in attributes.items() if name in found}
    done = index.files() if index is not None else {}
    partial = _cut_short(index, done) if index is not None and index.count() else {}
    checks = FileChecks(found, done, attributes, tile, stride, settings)
    bar = {"desc": "files", "unit": "file", "disable": len(found) < 2 * CHECKED}
    results = over_files(checks.check, found, workers, CHECKED, **bar)
    planned = [result for result in results if isinstance(result, PlannedFile)]
    files, amended = ([file for file in planned if bool(file.windows) == new] for new in (True, False))
    renamed = renamed_files([file for file in files if file.path not in partial], done, found, kept)
    here = {file.path for file in renamed.values()}
    files = [file for file in files if file.path not in here]
    rejected = [result for result in results if isinstance(result, Rejected)]
    stale = [name for name in {*done, *partial} if name not in found and name not in renamed]
    stale += [bad.file for bad in rejected if bad.file in done or bad.file in partial]
    for file in files:
        if file.path in done:
            stale.append(file.path)
        elif file.path in partial:
            digest, mtime, windows = partial[file.path]
            same = digest == file.hash and (file.size <= HASHED or mtime == file.mtime_ns)
            if same and windows <= set(file.windows):
                # One is made again, so that there is a point to carry the mark of a finished file.
                file.windows = [w for w in file.windows if w not in windows] + [next(iter(windows))]
            else:
                stale.append(file.path)
    told = (
        guessed_bands(images, settings),
        bands,
        masks_left_out(masks),
        places_beside(images, below),
        passed_over(below),
    )
    notes = [note for note in told if note]
    unchanged = results.count(None) + len(amended)
    return Plan(files, amended, renamed, sorted(stale), unchanged, rejected, attributes, unknown, notes)


def _chosen(root: Path, every: list[Path], only: Iterable[str]) -> tuple[list[Path], set[Path]]:
    """(the images whose name or path matches a pattern, the masks and previews that did too and are left out). A pattern that
    only such have means them. Raises InputError where there is no image."""
    groups = [{path for path in every if _matches(path, root, pattern)} for pattern in only]
    images = [path for path in every if any(path in group for group in groups)]
    if not images:
        raise InputError(f"{root}: no image in it has a name such as {' or '.join(only)} (--only)")
    meant = {path for group in groups if all(map(_is_mask, group)) for path in group}
    masks = set(filter(_is_mask, images)) - meant
    if len(masks) == len(images):
        return images, set()
    return [path for path in images if path not in masks], masks


def _cut_short(index, done: dict) -> dict[str, tuple[str, int, set]]:
    """{path: (hash, mtime, windows that are in)} of files that a kill cut short."""
    found: dict[str, tuple[str, int, set]] = {}
    for _, payload in index.scroll(payload=["path", "window", "hash", "mtime_ns"]):
        if payload["path"] not in done:
            known = (payload["hash"], payload["mtime_ns"], set())
            found.setdefault(payload["path"], known)[2].add(payload["window"] and tuple(payload["window"]))
    return found


def _matches(path: Path, root: Path, pattern: str) -> bool:
    return fnmatch.fnmatch(path.name, pattern) or fnmatch.fnmatch(path.relative_to(root).as_posix(), pattern)


def _is_mask(path: Path) -> bool:
    return bool(MASK.search(path.name) or SAFE_PAGE.search(path.as_posix()))


def masks_left_out(masks: set[Path]) -> str | None:
    if not masks:
        return None
    return f"masks, quality layers and previews left out: {len(masks)}, such as {min(masks)} (--only PATTERN takes files by name)"


def places_beside(images: list[Path], files: list[Path]) -> str | None:
    """What to say of images whose place only a file beside them tells; looks at some sixteen of them."""
    told = [path for path in files if path.suffix.lower() in (".xml", ".wld") or path.suffix[-1:] in ("w", "W")]
    there = {str(path).lower(): path for path in told}

    def beside(path: Path) -> Path | None:
        stem, _, suffix = str(path).lower().rpartition(".")
        ends = (f".{suffix}w", f".{suffix[:1]}{suffix[-1:]}w", ".wld", f".{suffix}.aux.xml")
        return next((there[stem + end] for end in ends if stem + end in there), None)

    found = [path for path in images if beside(path)] if there else []
    for path in found[:: max(1, len(found) // 16)]:
        with contextlib.suppress(ImageError, OSError):
            told = beside(path)
            is_place = told.suffix.lower() != ".xml" or re.search(rb"<(GeoTransform|SRS|GCPList)", told.read_bytes())
            if is_place and not has_place(path):
                return (
                    f"images with a world file or .aux.xml beside them: {len(found)}, such as {path}, which says itself not where"
                    " it lies; those files are not read: `gdal_translate -a_srs EPSG:... IN OUT.tif` makes one of both"
                )
    return None


def passed_over(files: list[Path]) -> str | None:
    """What to say of rasters and archives that are not read; None where there are none."""
    kinds = Counter(path.suffix.lower() for path in files if path.suffix.lower() in OTHER_RASTERS)
    if not kinds:
        return None
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"not read: {listed}; `gdal_translate IN OUT.tif` makes GeoTIFFs of rasters, archives need to be unpacked"


# ----------------------------------------------------------------------------------------------------
# Read and encode


@dataclass
class TileBatch:
    """What a reading process sends."""

    pixels: dict | None
    """What `normalised` takes; None where no tile could be read."""
    tiles: list[tuple]
    """(file number, window, facts for the payload) of each picture in `pixels`."""
    broken: dict[int, str]
    """{file number: reason}"""
    empty: int
    """Tiles without data."""
    blank: int
    """Tiles that are all black or all white."""
    files: list[int]
    """File number of every tile, of those that could not be read too."""

    def pin_memory(self) -> "TileBatch":
        """For the DataLoader, which would look through every dict and list for tensors."""
        pixels = self.pixels and {name: value.pin_memory() for name, value in self.pixels.items()}
        return dataclasses.replace(self, pixels=pixels)


class TileBatches(torch.utils.data.Dataset):
    """Batches of tiles, read and prepared for a tower; made in DataLoader workers."""

    def __init__(
        self, root: Path, files: list[PlannedFile], batch_size: int, model: Encoder, settings: ImageSettings,
        share: slice = slice(None),
    ):  # fmt: skip
        """share: which of the batches; each of several processes takes its own."""
        self.root, self.files, self.settings = root, files, settings
        self.store, self.processor = pixel_store(model), model.processor
        self.current, self.file = -1, contextlib.ExitStack()
        tiles = [(number, window) for number, file in enumerate(files) for window in file.windows]
        self.batches = [tiles[start : start + batch_size] for start in range(0, len(tiles), batch_size)][share]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> TileBatch:
        pixels, tiles, broken, empty, blank = [], [], {}, 0, 0
        for number, group in itertools.groupby(self.batches[index], key=lambda tile: tile[0]):
            try:
                for _, window in group:
                    picture = self._file(number)(window)
                    if not picture.valid:
                        empty += 1
                        continue
                    pixels.append(self.store.resized(self.files[number].path, picture.rgb))
                    blank += is_blank(pixels[-1])
                    tiles.append((number, window, facts(picture)))
            except ImageError as error:
                broken[number] = str(error)
        made = stacked(pixels, self.processor) if pixels else None
        return TileBatch(made, tiles, broken, empty, blank, [number for number, _ in self.batches[index]])

    def first_pixels(self) -> dict | None:
        """Those of the first batch; leaves no file open, which processes to come would share."""
        made = self[0].pixels
        self.file.close()
        self.current, self.read = -1, None  # processes that are spawned get a copy of this
        return made

    def _file(self, number: int):
        """What reads a window of a file. It stays open: its tiles come in several batches, and to open it anew for each made
        the tiles of a JPEG 2000 of 10980 x 2048 three times slower."""
        if number != self.current:
            self.file.close()
            self.current = -1
            self.read = self.file.enter_context(opened(self.root / self.files[number].path, self.settings))
            self.current = number
        return self.read


def facts(picture) -> dict:
    """Where and when of a picture, as `Point` takes them, in metres and degrees; written: as `imagery.Picture.written`."""
    place, extra = picture.footprint, {"valid": round(picture.valid, 4)}
    if place is not None:
        extra |= {
            "crs": place.crs, "bounds": list(place.bounds), "polygon": [list(corner) for corner in place.polygon],
            "pixel_size_m": list(place.pixel_size_m),
        }  # fmt: skip
    if picture.window and picture.limits:  # of a tile: the whole scene's
        extra["limits"] = [[float(end) for end in ends] for ends in picture.limits]
    box = place and place.lonlat_bounds
    return {"footprint": box, "time": picture.acquired, "written": picture.written, "extra": extra}


def time_of(known: dict, path: str) -> str | None:
    """The time of a picture of which `known` are the facts. A date in the file's name counts more than when it was written."""
    named = time_in_name(path)
    processed = named and known["written"] and not known["time"].startswith(named)
    return named if processed else known["time"] or named


def loader_of(batches: TileBatches, workers: int, device: str = "cpu"):
    """The batches in their order, made ahead in `workers` processes."""
    ahead = 4
    if len(batches):
        workers = fitting_workers(workers, batches.first_pixels, ahead)
    more = {"prefetch_factor": ahead} if workers else {}
    return torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=workers, pin_memory=device.startswith("cuda"), **more
    )


@dataclass
class Vectors:
    """Vectors on their way from the model's device: who asked for them at once would let a GPU run out of work."""

    copied: torch.Tensor
    done: torch.cuda.Event | None

    @classmethod
    def of(cls, vectors: torch.Tensor) -> "Vectors":
        made = cls(vectors.float().to("cpu", non_blocking=vectors.is_cuda), None)
        if vectors.is_cuda:
            made.done = torch.cuda.current_stream(vectors.device).record_event()  # of its card, not of the current one
        return made

    def numpy(self) -> np.ndarray:
        """(n, D) float32, when they are here."""
        if self.done:
            self.done.synchronize()
            self.done = None
        return self.copied.numpy()


@torch.inference_mode()
def encode(model: Encoder, loader) -> Iterable[tuple[Vectors | None, TileBatch]]:
    """(unit vectors (n, D) or None, the batch) for each of a `loader_of`."""
    for made in loader:
        vectors = None
        if made.pixels is not None:
            vectors = Vectors.of(model.encode_image(**normalised(made.pixels, model.processor, model.device)))
            made.pixels = None
        yield vectors, made


@dataclass
class IndexReport:
    """What `index_library` did."""

    added: int = 0
    """Points written."""
    files: int = 0
    updated: int = 0
    """Of the files, those that were in the index before, with other content."""
    removed: int = 0
    """Files taken out: gone from the folder, or no longer readable."""
    unchanged: int = 0
    amended: int = 0
    """Of these, files with other attributes than before."""
    renamed: int = 0
    """Files that were in the index under another path."""
    empty: int = 0
    """Tiles without data, left out."""
    blank: int = 0
    """Tiles that are all black or all white."""
    unknown: list[str] = field(default_factory=list)
    """Paths with attributes that are not there."""
    notes: list[str] = field(default_factory=list)
    """What to say of the bands."""
    total: int = 0
    """Points in the index now."""
    seconds: float = 0.0
    rejected: list[Rejected] = field(default_factory=list)


def index_library(
    model: Encoder, root: str | Path, location: str, *, tile: int | None = None, stride: int | None = None,
    settings: ImageSettings | dict | None = None, only: list[str] | None = None, attributes: dict | None = None,
    workers: int = 1, batch_size: int = 32, moved: bool = False, progress: bool = False,
) -> IndexReport | None:  # fmt: skip
    """Bring the index at `location` in line with the images below `root`; make it if it is not there.

    tile, stride: pixels of the file; tile 0 never cuts (default: as in an index that holds images, else 256 and 3/4 of the
    tile). settings: bands and stretch, or {name: value} of some (default: so, too, else those of the model's training).
    only: patterns such as "*_TCI_10m.jp2" of which a file's name, or its path below `root`, matches one; ["*"]: all (default:
    as in the index). attributes: {path: {name: value}} beside "folder", which every image below a folder has. moved: the
    library is the same in another place. Under `accelerate launch` each process encodes its share and the first writes; the
    others return None. Raises InputError: no images, an index of another model, tiling or library, nothing readable.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    from accelerate import PartialState

    state, root, began = PartialState(cpu=model.device.type == "cpu"), Path(root), time.monotonic()
    if not root.is_dir():
        raise InputError(f"{root}: no such folder of images")
    index = plan = None
    if state.is_main_process:
        asked = {"tile": tile, "stride": stride, "settings": settings, "only": only}
        plan, index = _open_for_writing(model, root, location, asked, attributes, moved, workers)
        settings = ImageSettings.from_dict(index.record["image"])
    if state.num_processes > 1:
        plan, settings = broadcast_object_list([plan, settings])
    report = IndexReport(unchanged=plan.unchanged, rejected=plan.rejected, unknown=plan.unknown, notes=plan.notes)
    writer = _Writer(index, plan, report) if index is not None else None
    share = slice(state.process_index, None, state.num_processes)
    batches = TileBatches(root, plan.files, batch_size, model, settings, share)
    bar = tqdm(
        total=sum(map(len, batches.batches)), desc="index", unit="picture", smoothing=0.05,
        disable=not progress or not state.is_main_process or not batches.batches,
    )  # fmt: skip
    encoded = encode(model, loader_of(batches, workers, str(model.device)))
    background = ThreadPoolExecutor(1)  # writes what is encoded while more is encoded
    try:
        more, written = True, None
        while more:
            turn, count, more, until = [], 0, False, time.monotonic() + FLUSH_SECONDS
            for vectors, made in encoded:
                turn.append((vectors, made))
                count += len(made.files)
                bar.update(len(made.files))
                if count >= FLUSH or time.monotonic() > until:
                    more = True
                    break
            if state.num_processes > 1:
                for vectors, _ in turn:
                    if vectors:
                        vectors.numpy()  # what is on its way cannot be sent on
                gathered = gather_object([(turn, more)])
                turn = [pair for part, _ in gathered for pair in part]
                more = any(unfinished for _, unfinished in gathered)
            if written:
                written.result()
            if writer:
                written = background.submit(writer.write, turn)
        if written:
            written.result()
        bar.close()  # before anything is printed
        if writer is None:
            return None
        writer.finish()
        if index.count() == 0:
            raise InputError(
                f"{root}: none of its {len({file.path for file in plan.files} | {bad.file for bad in report.rejected})} images"
                " can be read" + (f"; the first: {report.rejected[0].reason}" if report.rejected else "")
            )
        changed = report.added or report.removed or report.renamed or report.amended
        if progress and changed and index.count() * index.dim * 4 > 1024 * store.GRAPH_FROM_KB:
            print("building the search graph; the index may be used without, only slower", file=sys.stderr)
        index.build()
        report.total, report.seconds = index.count(), time.monotonic() - began
        return report
    finally:
        bar.close()
        background.shutdown()
        if index is not None:
            index.close()


def _about(model, asked: dict, known: dict) -> dict:
    """What an index is made with: what is asked for, else what the record of an index says (`known`). Raises InputError."""
    tile, stride, settings = asked["tile"], asked["stride"], asked["settings"] or {}
    if tile is None:
        tile = known.get("tile", 256)
    if stride is None:
        stride = known["stride"] if tile == known.get("tile") else tile * 3 // 4
    if tile and not 1 <= stride <= tile:
        raise InputError(f"--tile {tile} --stride {stride}: expected 1 <= stride <= tile, or pixels would be left out")
    settings = settings.to_dict() if isinstance(settings, ImageSettings) else settings
    image = ImageSettings.from_dict(model.settings.images | known.get("image", {}) | settings)
    return {"fingerprint": model.fingerprint, "image": image.to_dict(), "tile": tile, "stride": stride if tile else 0}


def _open_for_writing(model, root, location, asked, attributes, moved, workers):
    """(the plan, the open index), made where there is none."""

    def made_with(known: dict) -> tuple[dict, dict, dict]:
        """(what the index is made with, its record, how images are looked for)"""
        about = _about(model, asked, known)
        created = datetime.datetime.now().isoformat(timespec="seconds")
        only = asked["only"] or known.get("only", ["*"])
        record = {"model": model.source, **about, "only": only, "library": str(root.resolve()), "created": created}
        record["rendering"] = RENDERING
        how = {"tile": about["tile"], "stride": about["stride"], "attributes": attributes, "workers": workers}
        return about, record, how | {"only": only, "settings": ImageSettings.from_dict(about["image"])}

    try:
        index = store.open(location)
    except store.Missing:
        _, record, how = made_with({})
        plan = plan_index(root, None, **how)  # before anything is made: a wrong folder leaves nothing behind
        if not plan.files:
            reasons = "; ".join(bad.reason for bad in plan.rejected[:3])
            raise InputError(f"{root}: none of its {len(plan.rejected)} images can be read: {reasons}") from None
        return plan, store.create(location, record=record, dim=model.settings.projection_dim)
    try:
        about, record, how = made_with(index.record if index.count() else {})
        # Of a run that could read nothing, or that was killed at its start.
        if not index.count() and index.dim == model.settings.projection_dim:
            index.annotate(**record)
        # A limit of what is read, which changes no picture; the largest stays, for all that is in to be shown again.
        known = index.record.get("image", {})
        most = max(about["image"]["max_pixels"], known.get("max_pixels", 0))
        index.check(
            {"model": record["model"], **about, "image": about["image"] | {"max_pixels": known.get("max_pixels")}}
        )
        if most != known["max_pixels"]:
            index.annotate(image=known | {"max_pixels": most})
        if index.record.get("library") != record["library"]:
            if not moved:
                raise InputError(
                    f"{location}: an index of {index.record.get('library')}, not of {record['library']}: give another"
                    " --store, or --moved if it is the same library in another place"
                )
            index.annotate(library=record["library"])
        if index.record["model"] != record["model"]:  # the same weights in another place
            index.annotate(model=record["model"])
        plan = plan_index(root, index, **how)
        if index.record.get("rendering", 1) != RENDERING and plan.files:
            plan.notes.append(
                f"{location}: of an earlier version, which stretched some files otherwise (overviews, -9999 without a tag) and"
                " took a date of processing for theirs: index into another --store to have all alike"
            )
        if index.record.get("only") != record["only"]:
            index.annotate(only=record["only"])
        return plan, index
    except BaseException:
        index.close()
        raise


class _Writer:
    """Turns what was encoded into points. The last point of each open file is held back: once all of the file is done, it
    carries the mark by which the next run knows that the file is whole."""

    def __init__(self, index, plan: Plan, report: IndexReport):
        self.index, self.plan, self.report = index, plan, report
        self.left = [len(file.windows) for file in plan.files]
        self.held: dict[int, Point] = {}
        self.ready: list[Point] = []
        self.broken: dict[int, str] = {}
        self.written: Counter = Counter()  # points of each path
        self.stale = set(plan.stale)
        # A killed run goes on without them on its command line: they wait in the record for the files they are of.
        planned = {file.path: file.attributes for file in (*plan.files, *plan.amended, *plan.renamed.values())}
        planned |= {bad.file: plan.attributes.get(bad.file, {}) for bad in plan.rejected}
        waiting, before = _own_attributes(planned), index.attributes() if planned else {}
        waiting |= {path: {} for path in planned if before.get(path, {}).keys() - {"folder"} and path not in waiting}
        if waiting != index.record.get("waiting", {}):
            index.annotate(waiting=waiting)
        if plan.amended:
            report.amended = sum(before[file.path] != file.attributes for file in plan.amended)
            bar = tqdm(plan.amended, desc="attributes", unit="file", leave=False, disable=len(plan.amended) < 1000)
            index.amend((file.path, file.known) for file in bar)
        self._rename()

    def _rename(self) -> None:
        """Give the points of files that lie elsewhere now their new path. A kill leaves some under both, and the next run
        takes the old ones out."""
        part, tiles = {}, 0
        for path, file in self.plan.renamed.items():
            part[path], tiles = file, tiles + len(file.windows)
            if tiles >= FLUSH:
                self._copy(part)
                part, tiles = {}, 0
        self._copy(part)
        self.index.remove(path=list(self.plan.renamed))
        self.report.renamed = len(self.plan.renamed)

    def _copy(self, files: dict[str, PlannedFile]) -> None:
        """Add the points of these paths under those of the files, the last of a file after its others."""
        known = sorted(self.index.scroll(Filter(path=list(files))), key=lambda row: "last" in row[1]) if files else []
        for start in range(0, len(known), FLUSH):
            rows, points = known[start : start + FLUSH], []
            for (_, payload), vector in zip(rows, self.index.vectors(id for id, _ in rows)):
                file = files[payload["path"]]
                points.append(Point(
                    file.path, vector, window=payload["window"] and tuple(payload["window"]),
                    footprint=payload["footprint"] and tuple(payload["footprint"]), time=payload["time"],
                    last="last" in payload, extra=payload["extra"], **file.known,
                ))  # fmt: skip
            self.index.upsert(points)

    def write(self, turn: list[tuple[Vectors | None, TileBatch]]) -> None:
        """Bring to disk what `encode` gave, in any order of tiles."""
        for vectors, made in turn:
            self._add(() if vectors is None else vectors.numpy(), made)
        self._flush()

    def _add(self, vectors: Iterable[np.ndarray], made: TileBatch) -> None:
        self.report.empty += made.empty
        self.report.blank += made.blank
        self.broken |= made.broken
        for (number, window, known), vector in zip(made.tiles, vectors):
            file = self.plan.files[number]
            if number in self.held:
                self.ready.append(self.held[number])
            extra = known["extra"] | ({"image": list(file.image)} if window else {})
            self.held[number] = Point(
                file.path, vector, window=window, footprint=known["footprint"], last=False, extra=extra,
                time=time_of(known, file.path), **file.known,
            )  # fmt: skip
        for number in made.files:
            self.left[number] -= 1
        for number in set(made.files) - set(self.broken):
            if self.left[number]:
                continue
            if number in self.held:
                point = self.held.pop(number)
                point.last = True
                self.ready.append(point)
                self.report.files += 1
            else:
                self.broken[number] = f"{self.plan.files[number].path}: no pixel of it holds data"

    def _flush(self) -> None:
        """Write what is ready; of a file that has changed the old version goes when the new one comes."""
        if changed := {point.path for point in self.ready} & self.stale:
            self.index.remove(path=sorted(changed))
            self.stale -= changed
            self.report.updated += len(changed)
        self.index.upsert(self.ready)
        self.written.update(point.path for point in self.ready)
        self.report.added += len(self.ready)
        self.ready = []

    def finish(self) -> None:
        """Take out what is gone, and all of a file of which some part could not be read."""
        broken = {self.plan.files[number].path: reason for number, reason in self.broken.items()}
        self.report.rejected += [Rejected(path, -1, reason) for path, reason in sorted(broken.items())]
        self.report.added -= sum(self.written[path] for path in broken)
        self.report.removed += len(self.stale)
        # Attributes live on the points, and these files have none; written before their points go.
        waiting = _own_attributes({bad.file: self.plan.attributes.get(bad.file, {}) for bad in self.report.rejected})
        if waiting != self.index.record.get("waiting", {}):
            self.index.annotate(waiting=waiting)
        self.index.remove(path=sorted({*self.stale, *broken}))


# ----------------------------------------------------------------------------------------------------
# Classes


def labels_in(text: str) -> dict[str, list[str]]:
    """{label: [label]} of labels between commas."""
    return {label: [label] for label in map(str.strip, re.split("[,，、]", text)) if label}


def read_classes(source: str) -> dict[str, list[str]]:
    """{label: phrases that say it} from the name of a list in classes/ (ucm, aid, eurosat, resisc45), a JSON file of
    {label: phrase or [phrases]} or ["label", ...], or labels between commas. Raises InputError."""
    known = sorted(path.stem for path in CLASS_LISTS.glob("*.json"))
    path = CLASS_LISTS / f"{source}.json" if source in known else Path(source)
    if path.suffix.lower() == ".json":
        content = load_json(path)
        if isinstance(content, list):
            if strange := [label for label in content if not isinstance(label, str)]:
                raise InputError(f"{path}: expected a list of labels, each a text, found {strange[0]!r} in it")
            content = {label: label for label in content}
        found = {}
        for label, phrases in content.items() if isinstance(content, dict) else ():
            phrases = [phrases] if isinstance(phrases, str) else phrases
            good = isinstance(phrases, list) and all(isinstance(p, str) and p.strip() for p in phrases)
            if not good or not phrases:
                raise InputError(f"{path}: class {label!r}: expected a phrase or a list of phrases, found {phrases!r}")
            found[label] = phrases
    else:
        found = labels_in(source)
    if len(found) < 2:
        raise InputError(
            f"{source}: expected two classes or more: labels between commas, a JSON file of {{label: [phrases]}},"
            f" or one of {', '.join(known)}"
        )
    return found


# ----------------------------------------------------------------------------------------------------
# Use


class Library:
    """An index opened together with the model that made it: what search.py and web_demo.py ask."""

    def __init__(self, index, model: Encoder, root: str | Path):
        self.index, self.model, self.root = index, model, Path(root)
        self.reference: dict[str, np.ndarray] = {}  # language -> `reference_vectors` of it, some 100 prompts
        self.settings = ImageSettings.from_dict(index.record["image"])

    @classmethod
    def open(
        cls, location: str, *, model: str | None = None, encoder: Encoder | None = None, root: str | Path | None = None,
        base_model: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> "Library":  # fmt: skip
        """model: where the index's model is now, if it has moved; encoder: one loaded already; root: where the images are
        now. Raises InputError: no index there, another model than the one it was made with."""
        index = store.open(location)
        try:
            if encoder is None:
                name = model or index.record["model"]
                encoder = DualEncoder.from_pretrained(name, base_model=base_model, device=device, dtype=dtype)
            index.check({"model": encoder.source, "fingerprint": encoder.fingerprint})
            if not index.count():
                raise InputError(f"{location}: no image is in this index yet; index the library again")
            return cls(index, encoder, root or index.record["library"])
        except BaseException:
            index.close()
            raise

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_) -> None:
        self.index.close()

    # -- queries

    def text_vectors(self, texts: list[str], *, template: str | None = None, context: str = "") -> np.ndarray:
        """(N, D) unit vectors; each the mean over the prompts of its text: of TEMPLATES, or the text alone where it is a
        sentence with its full stop. template: one prompt with {} for the text, instead. context: season, weather and the
        like, put behind the text."""
        if template is not None and template.count("{}") != 1:
            raise InputError(f"--template {template!r}: expected one {{}} where the text goes")
        prompts, owner = [], []
        for number, text in enumerate(texts):
            text, chinese = text.strip(), is_chinese(text)
            forms = [template] if template is not None else TEMPLATES["zh" if chinese else "en"]
            if template is None and text.endswith((".", "。", "!", "！", "?", "？")):
                forms = ["{}"]
            if context:
                text = f"{text.rstrip('.。')}{'，' if chinese else ', '}{context}"
            prompts += [form.replace("{}", text) for form in forms]
            owner += [number] * len(forms)
        made = self.model.embed_texts(prompts).numpy()
        mean = np.zeros((len(texts), made.shape[1]), np.float32)
        np.add.at(mean, owner, made)
        return unit(mean)

    def reference_vectors(self, texts: list[str]) -> np.ndarray:
        """(N, D): for each text the mean vector of the words of REFERENCE in its language."""
        spoken = ["zh" if is_chinese(text) else "en" for text in texts]
        for name in set(spoken) - set(self.reference):
            self.reference[name] = self.text_vectors(re.split("[,，] *", REFERENCE[name])).mean(0)
        return np.stack([self.reference[name] for name in spoken])

    def picture_vector(self, rgb: np.ndarray) -> np.ndarray:
        """(D,) unit vector of an (H, W, 3) uint8 picture."""
        return self.model.embed_images([pixel_store(self.model).resize(rgb)]).numpy()[0]

    def query(
        self, words: list[str] = (), *, without: list[str] = (), like: list[np.ndarray] = (), like_weight: float = 0.5,
        without_weight: float = 0.5, template: str | None = None, context: str = "",
    ) -> np.ndarray:  # fmt: skip
        """(D,) unit vector of a query. Words, and pictures `like` (H, W, 3) uint8, each averaged; where there are both, mixed
        by `like_weight`, 0 to 1; then less `without_weight` times the mean of what is not wanted. Raises InputError."""
        if not words and not like:
            raise InputError("a query needs words, a picture (--like), or both")
        parts = []
        if words:
            said = self.text_vectors(list(words), template=template, context=context)
            parts.append((1 - like_weight if like else 1.0, said))
        if like:
            pictures = np.stack([self.picture_vector(rgb) for rgb in like])
            parts.append((like_weight if words else 1.0, pictures))
        vector = sum(weight * unit(made.mean(0)) for weight, made in parts)
        if without:
            vector = unit(vector) - without_weight * unit(self.text_vectors(list(without), template=template).mean(0))
        if not np.linalg.norm(vector) > 1e-6:
            raise InputError("the query cancels itself out: what is wanted and what is not are the same")
        return unit(vector)

    def search(
        self, vector: np.ndarray, k: int = 10, *, filter: Filter | None = None, exact: bool = False,
        neighbours: bool = False,
    ) -> list[Hit]:  # fmt: skip
        """The k best, best first. A tile that shows the place of a better one, at the same time, is left out unless
        `neighbours`: of overlapping tiles one would do."""
        if neighbours:
            return self.index.search(vector, k, filter=filter, exact=exact)
        fetch = 4 * k
        while True:
            found = self.index.search(vector, fetch, filter=filter, exact=exact)
            kept = _places_once(found, k)
            if len(kept) == k or len(found) < fetch or fetch >= 256 * k:
                return kept
            fetch *= 4

    def picture(self, payload: dict, max_side: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8 of a hit, stretched as it was indexed. Raises ImageError."""
        root = os.path.abspath(self.root)
        path = Path(os.path.normpath(os.path.join(root, payload["path"])))  # the name alone: the library may hold links
        if not path.is_relative_to(root):  # a record on a shared server may say anything
            raise ImageError(f"{payload['path']}: is not below the library {self.root}")
        return read_image(path, self.settings, window=payload["window"], max_side=max_side).rgb

    # -- all of it

    def everything(self, filter: Filter | None = None) -> tuple[list[dict], np.ndarray]:
        """(payloads, unit vectors (N, D)) of all points, ordered by path and window."""
        rows = sorted(self.index.scroll(filter), key=lambda row: (row[1]["path"], row[1]["window"] or []))
        return [payload for _, payload in rows], self.index.vectors([name for name, _ in rows])

    def class_vectors(self, classes: dict[str, list[str]], template: str | None = None) -> np.ndarray:
        """(C, D) unit vectors, each the mean over the phrases and prompts of a class."""
        phrases = [phrase for group in classes.values() for phrase in group]
        made = self.text_vectors(phrases, template=template)
        ends = np.cumsum([len(group) for group in classes.values()])
        return unit(np.stack([part.mean(0) for part in np.split(made, ends[:-1])]))

    def classify(self, vectors: np.ndarray, classes: dict[str, list[str]], template: str | None = None) -> np.ndarray:
        """Zero-shot probabilities (N, C) of images by their unit vectors (N, D); softmax or sigmoid, as trained."""
        cosines = torch.from_numpy(vectors @ self.class_vectors(classes, template).T)
        with torch.inference_mode():
            return self.model.probabilities(cosines).float().cpu().numpy()


def _own_attributes(of_file: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Without the folder, which every file's place tells, and without files that have no other."""
    listed = {
        path: {name: value for name, value in known.items() if name != "folder"} for path, known in of_file.items()
    }
    return {path: known for path, known in listed.items() if known}


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) brought to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _places_once(hits: list[Hit], k: int) -> list[Hit]:
    """The first k hits that show no place of an earlier one. `same_place` is asked of those alone that may be one."""
    boxes = np.array([hit.payload["footprint"] or [np.nan] * 4 for hit in hits]).reshape(-1, 4)
    boxes[:, 2] += 360 * (boxes[:, 2] < boxes[:, 0])  # across the antimeridian
    windows = np.array([hit.payload["window"] or [np.nan] * 4 for hit in hits], float).reshape(-1, 4)
    windows[:, 2:] += windows[:, :2]
    files: dict[str, int] = {}
    owner = np.array([files.setdefault(hit.payload["path"], len(files)) for hit in hits], int)
    kept, count = np.empty(len(hits), int), 0
    for n, hit in enumerate(hits):
        known = kept[:count]
        box, others, window, cut = boxes[n], boxes[known], windows[n], windows[known]
        turn = 360 * np.round((box[0] + box[2] - others[:, 0] - others[:, 2]) / 720)
        meet = (others[:, 0] + turn < box[2]) & (others[:, 2] + turn > box[0])
        meet &= (others[:, 1] < box[3]) & (others[:, 3] > box[1])
        apart = (cut[:, :2] >= window[2:]) | (cut[:, 2:] <= window[:2])  # never, where one of them is a whole file
        meet |= (owner[known] == owner[n]) & ~apart.any(1)
        if not any(same_place(hit.payload, hits[m].payload) for m in known[meet]):
            kept[count] = n
            count += 1
            if count == k:
                break
    return [hits[n] for n in kept[:count]]


def same_place(a: dict, b: dict) -> bool:
    """Whether two points show one place at one time: windows of one file, or outlines on the ground (footprints, where one has
    no outline), of which the smaller is covered by more than NEIGHBOURS. Files without a time are of one time where they are
    in one folder."""
    if a["path"] == b["path"]:
        if a["window"] is None or b["window"] is None:
            return True
        (c1, r1, w1, h1), (c2, r2, w2, h2) = a["window"], b["window"]
        wide, high = min(c1 + w1, c2 + w2) - max(c1, c2), min(r1 + h1, r2 + h2) - max(r1, r2)
        return max(0, wide) * max(0, high) > NEIGHBOURS * min(w1 * h1, w2 * h2)
    if (
        a["footprint"]
        and b["footprint"]
        and a["time"] == b["time"]
        and (a["time"] or a["path"].rpartition("/")[0] == b["path"].rpartition("/")[0])
    ):
        # Not the boxes round them: those of tiles that are turned, as in polar projections, overlap where the tiles do not.
        first, second = (p["extra"].get("polygon") or box_ring(p["footprint"]) for p in (a, b))
        return len(first) == len(second) and common_share(first, second) > NEIGHBOURS
    return False


def geojson(payloads: list[dict], properties: list[dict]) -> str:
    """The footprints of points, with what is said of each, as GeoJSON (RFC 7946)."""
    rows = [
        {"polygon": payload["extra"].get("polygon"), "footprint": payload["footprint"], "properties": said}
        for payload, said in zip(payloads, properties)
    ]
    return json.dumps(feature_collection(rows), ensure_ascii=False) + "\n"


def result_row(rank: int, hit: Hit) -> dict:
    """What a table, JSON, CSV or GeoJSON says of a hit; `where` is the latitude and longitude of its middle, in degrees."""
    payload = hit.payload
    where = None
    if payload["footprint"]:
        west, south, east, north = payload["footprint"]
        middle = (west + east + 360 * (east < west)) / 2
        where = f"{(south + north) / 2:.5f}, {middle - 360 * (middle > 180):.5f}"
    return {
        "rank": rank, "score": round(hit.score, 4), "path": payload["path"],
        "window": payload["window"] and ",".join(map(str, payload["window"])), "where": where, "time": payload["time"],
        **{name: value for name, value in payload["attributes"].items() if name not in RESULT},
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Two dates


FEW = 8  # places: the spread of fewer says little, that of one or two nothing
PAIR_NOTES = {
    "no_place": "{date}: {n} of {all} images have no georeference, left out",
    "by_name": "no image has a georeference: images of one path and size are taken as one place",
    "repeated": "{date}: {n} of {all} images have the outline of another, as several dates of a place would: index one date alone"
    " (--only)",
    "alone": "{date}: {n} of {all} places have no counterpart, left out",
    "empty": "{date}: {n} of {all} matched places hold data on less than {share:.0%} of their area, left out",
    "settings": "the two indexes differ in how they show pictures ({listed}): part of the change may be that",
    "resolution": "{n} of {all} places differ in resolution (a median of {first:.2f} m and {second:.2f} m a pixel): part of"
    " their change may be that",
    "stretch": "{n} of {all} places were stretched by other values on the two dates, as a cloud anywhere in a large scene brings"
    " about: part of their change may be that; index both with --stretch reflectance",
    "few": "only {n} places match, too few to tell what is usual: compare the scores themselves",
    "grid": "matched tiles overlap by {share:.0%} on average: index both dates on one grid for better results",
}


class PairNote(str):
    """A sentence of `PAIR_NOTES`, and what it was made of, so that the page can say it in another language."""

    def __new__(cls, key: str, **values):
        note = super().__new__(cls, PAIR_NOTES[key].format(**values))
        note.key, note.values = key, values
        return note


@dataclass
class Pairs:
    """Tiles of two libraries that show the same places; row n of each belongs to place n."""

    before: list[dict]
    after: list[dict]
    before_vectors: np.ndarray
    """(N, D)"""
    after_vectors: np.ndarray
    notes: list[PairNote]
    """What was left out, and why."""

    def changes(
        self, words: np.ndarray, alike: int = 32, reference: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores before and after, (Q, N) each, under queries (Q, D), and by how many spreads of the unchanged they differ,
        as `places.change_scores` counts: against the `alike` places most alike, or against all places (0).

        reference: (Q, D) of `Library.reference_vectors`; what is judged is then the change of a query's score less the mean
        change of those words' scores: a light or a sensor that moves the scores of all words is no change of any."""
        before, after = words @ self.before_vectors.T, words @ self.after_vectors.T
        told = words if reference is None else words - reference
        judged = told @ self.before_vectors.T, told @ self.after_vectors.T
        return before, after, change_scores(*judged, self.before_vectors if alike else None, alike or 1)


def match_places(before: Library, after: Library, min_overlap: float = 0.5) -> Pairs:
    """Match tiles by footprint; by path and window where no image of either library has one, as in the A/ and B/ folders
    of change detection data. Raises InputError, with the reason, where no two show the same place."""
    notes, sides = [], [library.everything() for library in (before, after)]
    placed = [np.array([bool(p["extra"].get("polygon")) for p in payloads], bool) for payloads, _ in sides]
    by_place = placed[0].any() or placed[1].any()
    for side, (name, library) in enumerate((("before", before), ("after", after))):
        payloads, vectors = sides[side]
        if not by_place or placed[side].all():
            continue
        if not placed[side].any():
            raise InputError(
                f"{library.index.location}: none of its {len(payloads)} images has a georeference, those of the other index"
                " have; monitor matches images by their place on Earth: give GeoTIFFs"
            )
        notes.append(PairNote("no_place", date=name, n=int((~placed[side]).sum()), all=len(payloads)))
        sides[side] = [p for p, there in zip(payloads, placed[side]) if there], vectors[placed[side]]
    (first, first_vectors), (second, second_vectors) = sides
    if by_place:
        polygons = [[payload["extra"]["polygon"] for payload in payloads] for payloads, _ in sides]
        found = match_footprints(*polygons, min_overlap)
        for name, side in zip(("before", "after"), polygons):
            outlines = Counter(tuple(np.round(polygon, 6).ravel()) for polygon in side)
            if repeated := sum(count for count in outlines.values() if count > 1):
                notes.append(PairNote("repeated", date=name, n=repeated, all=len(side)))
        boxes = [_bounds_text(payloads) for payloads, _ in sides]
        remedy = f"overlaps by {min_overlap:.0%}: other places, or tiles of another size or grid"
        one, two = (np.median(_metres(side)) for side in (first, second))
        if before.index.record["tile"] and not 0.8 < one / two < 1.25:
            tile = round(before.index.record["tile"] * one / two)
            remedy += f"; their pixels are {one:.2f} m and {two:.2f} m: index the later images with --tile {tile}"
    else:
        notes.append(PairNote("by_name"))
        found = _match_names(first, second)
        boxes = [f"{first[0]['path']}, ..." for first, _ in sides]
        remedy = (
            "has the same path and size: without a georeference, index a folder of each date by itself, with a place under one"
            " name in both"
        )
    if not found:
        raise InputError(
            f"of {before.index.location} ({boxes[0]}) and {after.index.location} ({boxes[1]}) no pair of tiles {remedy}"
        )
    i, j = (np.array(side) for side in list(zip(*found))[:2])
    for name, payloads, used in (("before", first, i), ("after", second, j)):
        if len(used) < len(payloads):
            notes.append(PairNote("alone", date=name, n=len(payloads) - len(used), all=len(payloads)))
    valid = [np.array([p["extra"].get("valid", 1) for p in side]) for side in (first, second)]
    empty = {"before": valid[0][i] < MIN_VALID, "after": valid[1][j] < MIN_VALID}
    for name, side in empty.items():
        if side.any():
            notes.append(PairNote("empty", date=name, n=int(side.sum()), all=len(side), share=MIN_VALID))
    kept = ~(empty["before"] | empty["after"])
    if not kept.any():
        raise InputError(f"none of the matched places can be compared: {'; '.join(notes)}")
    found, i, j = [pair for pair, good in zip(found, kept) if good], i[kept], j[kept]
    ours, theirs = before.settings.to_dict(), after.settings.to_dict()
    if other := [name for name in ours if name != "max_pixels" and ours[name] != theirs[name]]:
        listed = ", ".join(f"{name} {ours[name]} and {theirs[name]}" for name in other)
        notes.append(PairNote("settings", listed=listed))
    elif apart := _stretched_apart([first[n] for n in i], [second[n] for n in j]):
        notes.append(PairNote("stretch", n=apart, all=len(i)))
    if len(found) < FEW:
        notes.append(PairNote("few", n=len(found)))
    if by_place:
        notes += _grid_notes([first[n] for n in i], [second[n] for n in j], [overlap for _, _, overlap in found])
    return Pairs([first[n] for n in i], [second[n] for n in j], first_vectors[i], second_vectors[j], notes)


def _metres(payloads: list[dict]) -> np.ndarray:
    """(N,): the side of a pixel of each, the root mean square of its two."""
    return np.array([np.hypot(*payload["extra"]["pixel_size_m"]) for payload in payloads]) / 2**0.5


def _stretched_apart(before: list[dict], after: list[dict]) -> int:
    """Of how many places a black or a white differs by more than a tenth of what lies between them. Tiles alone bring the
    values of their scene; a whole picture's are its own, and even out a season."""
    apart = 0
    for one, two in zip(before, after):
        first, second = (payload["extra"].get("limits", ()) for payload in (one, two))
        if len(first) == len(second):
            apart += any(
                max(abs(low - low2), abs(high - high2)) > 0.1 * max(high - low, high2 - low2)
                for (low, high), (low2, high2) in zip(first, second)
            )
    return apart


def _grid_notes(before: list[dict], after: list[dict], overlaps: list[float]) -> list[PairNote]:
    """What of the matched tiles' pixels and grids may look like a change."""
    notes = []
    sizes = [_metres(side) for side in (before, after)]
    if (off := np.abs(np.log(sizes[1] / sizes[0])) > np.log(1.25)).any():
        medians = [np.median(side[off]) for side in sizes]
        notes.append(PairNote("resolution", n=int(off.sum()), all=len(off), first=medians[0], second=medians[1]))
    if (mean := float(np.mean(overlaps))) < 0.9:
        notes.append(PairNote("grid", share=mean))
    return notes


def _match_names(before: list[dict], after: list[dict]) -> list[tuple[int, int, float]]:
    """As `match_footprints` finds them, where path and window are all that is known of a place. Tiles of one window show
    one place only where their images are of one size."""

    def key(payload):
        return payload["path"], tuple(payload["window"] or ())

    known = {key(payload): n for n, payload in enumerate(after)}
    found = [(n, known[key(payload)], 1.0) for n, payload in enumerate(before) if key(payload) in known]
    sizes = [[payload["extra"].get("image") for payload in side] for side in (before, after)]  # None in older indexes
    return [(n, m, 1.0) for n, m, _ in found if None in (sizes[0][n], sizes[1][m]) or sizes[0][n] == sizes[1][m]]


def _bounds_text(payloads: list[dict]) -> str:
    boxes = np.array([payload["footprint"] for payload in payloads])
    west, south, east, north = boxes[:, 0].min(), boxes[:, 1].min(), boxes[:, 2].max(), boxes[:, 3].max()
    return f"longitude {west:.3f} to {east:.3f}, latitude {south:.3f} to {north:.3f}"
