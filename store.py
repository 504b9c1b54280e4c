"""The search index: vectors of images and tiles with where, when and from which file they come.

    with store.create("library.index", record={"model": "...", "fingerprint": "..."}, dim=512) as index:
        index.upsert([Point("a/scene.tif", vector, footprint=(13.0, 52.3, 13.2, 52.5), hash="...", size=..., ...)])
        index.build()
    with store.open("library.index") as index:
        index.check({"fingerprint": "..."})
        hits = index.search(vector, 10, filter=Filter(bbox=(13, 52, 14, 53), start="2020-01-01"))

Two engines of one family behind it. A folder is Qdrant Edge, inside this process; an http(s) URL is a collection of
a Qdrant server or cluster. Filters, payload and search parameters are the same calls with the same meaning.

What a kill leaves behind, at any moment: an index that opens and holds every batch whose `upsert` had returned, and of
the batch in flight all or nothing. Edge keeps a write-ahead log and applies it again on opening; without it, 25 kills
while points were replaced left 2265 of them with the new vector under the old payload, with it none (tests/test_store.py
kills a writer for real).
"""

import contextlib
import json
import math
import os
import re
import shutil
import time
import uuid
from calendar import monthrange
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from config import InputError, flock, take_lock

FORMAT = 1  # of the payload and of index.json; an index of another number is refused
# The graph (HNSW, Malkov & Yashunin 2018). On 100,000 x 512 in 1000 clusters, one core: a build takes 100 s of CPU and
# 422 MB; scanning all takes 12 ms a query. Queries are image-like (drawn as the points are) or text-like (cosine 0.3 to
# their cluster, as texts are to images, and harder). Links within indexed values (payload_m) are left out: for all fields
# a build was not done after 470 s of CPU; for the centre alone recall under a box of 17% rose from 0.56 to 0.65 only.
M, EF_CONSTRUCT = 16, 100
# The walk reads vectors of 8-bit numbers; the OVERSAMPLING x k best are scored again with the real ones, so scores are
# exact. Without it a build took 189 s of CPU and a query 2.5 instead of 1.1 ms at the same recall; oversampling 1: 0.966.
OVERSAMPLING = 2.0
EF = 224  # candidates kept while walking the graph: recall@10 1.000 in 1.1 ms, image-like and text-like; 96: 0.990
EF_FILTERED = 96  # with ACORN, under a box of 20% and a time span of 30%: recall 0.990 to 1.000 in 6 to 13 ms
GRAPH_FROM_KB = 10_000  # fewer vectors than this (5000 of 512) are scanned: under 2 ms, and exact
SCAN_BELOW_KB = 20_000  # what a filter leaves is scanned too, below about 10,000 of 512
# A scan too, where the engine guesses that a filter leaves fewer points: a box of 5% (guess 1,600, true 5,000) takes 9 ms at
# a recall of 1.000, the walk 8 ms at 0.98; a box of 20% with a time span (guess 3,100, true 6,000) 12 ms, the walk 11 ms at
# 0.97. Most of all four is the filter.
SCAN_FEW = 6000
# The k best that pass are the first k that pass among the best of all. Where a filter leaves many, a walk without it for
# MARGIN / (share it leaves) x k points, and a look which of them pass, take 3 ms where a walk that asks the filter of every
# point it meets takes 12 (box of 20%) and 7 (time span of 30%). Up to four times as many if k did not pass, and that walk
# after all where filter and query want different things. The 300 best of all are found less surely than the 100 best: where
# a filter left 6% and AMONG was 300, recall was 0.971.
MARGIN, AMONG = 2.5, 150
# Points. In larger indexes EF and EF_FILTERED grow with the square root of the size (with those of 100,000 points recall@10 at
# 1,000,000 was 0.90), SCAN_FEW with the size: there a walk under a filter that leaves 5% finds 0.92 to 0.97 in a scan's time.
GROWS_FROM = 100_000
RIM = 1e-3  # degrees; see `_inside`
ROOM = 64 * 2**20  # bytes that are to be free on the disk before points are added: a shard of few takes 25 MB
DAY, SPAN = r"\d{4}-\d\d-\d\d", r"\d{4}(-\d\d)?"
PAGE = 10_000  # points a scroll reads at once
RANGES = ("west", "south", "east", "north", "half_width", "half_height")
INDEXED = dict.fromkeys(RANGES, "float") | {
    "center": "geo", "time": "datetime", "path": "keyword", "last": "integer"
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# What goes in, what comes out


@dataclass
class Point:
    """One image, or one tile of it."""

    path: str
    """Relative to the library's root, with `/`: the library may move."""
    vector: np.ndarray
    """(D,) float, unit length."""
    window: tuple[int, int, int, int] | None = None
    """(col, row, width, height) in pixels of the file; None for the whole."""
    footprint: tuple[float, float, float, float] | None = None
    """west, south, east, north in degrees (WGS 84); west > east where it crosses the antimeridian, as in
    `imagery.Footprint.lonlat_bounds`."""
    time: str | None = None
    """ISO 8601 date or time; without a zone it is UTC."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Label, split, sensor ...: what `Filter.attributes` asks for."""
    hash: str = ""
    """Hash of the file's content."""
    size: int = 0
    """Bytes of the file."""
    mtime_ns: int = 0
    last: bool = True
    """The last tile of its file. `files` lists a file once this one is in, so upsert the tiles of a file in order."""
    extra: dict = field(default_factory=dict)
    """Anything else in JSON, given back with a hit: width and height, crs, transform, polygon. Edge gives floats back with
    an error of up to one unit in the last place."""

    @property
    def id(self) -> str:
        """The same for the same path and window, so that a second run overwrites instead of adding."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([self.path, self.window and list(map(int, self.window))])))

    def payload(self) -> dict:
        """What the engine stores and filters. Raises InputError on a footprint, time or attribute it could not."""
        what = f"{self.path} {self.window or ''}".strip()
        payload = {
            "path": self.path, "window": self.window and list(map(int, self.window)), "time": None,
            "attributes": self.attributes, "hash": self.hash, "size": self.size, "mtime_ns": self.mtime_ns,
            "footprint": None, "extra": self.extra,
        }  # fmt: skip
        if self.last:
            payload["last"] = 1  # Edge 0.9 matches no booleans
        if self.time is not None:
            exact = moment(self.time, what).isoformat()
            payload["time"] = self.time if re.fullmatch(DAY, self.time) else exact  # forms the engine reads too
        check_attributes(self.attributes, what)
        if self.footprint is not None:
            west, south, east, north = box = checked_box(self.footprint, what)
            payload["footprint"] = list(box)
            east += 360 * (east < west)  # runs on past 180, so that west <= east in every stored range
            middle = (west + east) / 2
            payload |= {
                "west": west, "south": south, "east": east, "north": north,
                "half_width": (east - west) / 2, "half_height": (north - south) / 2,
                "center": _inside(middle - 360 * (middle > 180), (south + north) / 2, RIM),
            }  # fmt: skip
        return payload


@dataclass(frozen=True)
class Filter:
    """Which points a search, count or scroll sees; all that is given must hold. Raises InputError when used."""

    bbox: tuple[float, float, float, float] | None = None
    """west, south, east, north in degrees: footprints that touch or overlap this box; west > east crosses the
    antimeridian. Points without a place are left out."""
    start: str | None = None
    """ISO 8601 time, date, month or year, inclusive. Points without a time are left out."""
    end: str | None = None
    """Likewise; a date, a month or a year means to its end."""
    attributes: dict[str, str | list[str]] = field(default_factory=dict)
    """{name: value, or values of which any will do}."""
    path: str | list[str] | None = None
    """All tiles of this file, or of these."""


@dataclass(frozen=True)
class Hit:
    """A point found."""

    id: str
    score: float
    """Cosine, -1 to 1."""
    payload: dict | None
    """path, window, footprint [west, south, east, north], time, attributes, hash, size, mtime_ns, extra ..."""


def attributes_of(pairs: Iterable[str]) -> dict[str, list[str]]:
    """`Filter.attributes` from texts such as folder=harbour; several values of a name may be given. Raises InputError."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not name:
            raise InputError(f"{pair}: expected NAME=VALUE, such as folder=harbour")
        found.setdefault(name, []).append(value)
    return found


def check_attributes(attributes: dict[str, str], what: str) -> None:
    """Raise InputError unless an index can hold them."""
    for name, value in attributes.items():
        if not re.fullmatch(r"\w+", name) or not isinstance(value, str):
            raise InputError(f"{what}: attribute {name}={value!r}; expected a word and a text")


def checked_box(box, what: str) -> tuple[float, float, float, float]:
    try:
        west, south, east, north = map(float, box)
    except (TypeError, ValueError):
        west = math.nan
    if math.isnan(west) or not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise InputError(
            f"{what}: {box!r} is no box; expected west south east north in degrees, -180 to 180 and -90 to 90, south <= north"
        )
    return west, south, east, north


def _inside(lon: float, lat: float, rim: float) -> dict:
    """The point, but off the poles and the antimeridian: Edge's geographic index loses boxes that end exactly there."""
    return {"lon": max(rim - 180, min(lon, 180 - rim)), "lat": max(rim - 90, min(lat, 90 - rim))}


def moment(text: str, what: str) -> datetime:
    try:
        # Newer Pythons read 20200630 and 2020-W26, too, which `last_moment` would take for midnight; 3.10 knows no Z.
        if not re.match(rf"{DAY}(T|\s|$)", text):
            raise ValueError(text)
        return datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    except (TypeError, ValueError):
        raise InputError(
            f"{what}: {text!r} is no ISO 8601 date or time such as 2020-06-30 or 2020-06-30T10:15"
        ) from None


def in_utc(time: datetime) -> datetime:
    """A time without a zone is taken for UTC."""
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def first_moment(text: str, what: str) -> datetime:
    """The begin of a span of time: a year or a month means from its first day. Raises InputError."""
    return moment(text + "-01-01"[: 10 - len(text)] if re.fullmatch(SPAN, str(text)) else text, what)


def last_moment(text: str, what: str) -> datetime:
    """The end of a span of time: a year, a month or a date means to the end of its last day. Raises InputError."""
    if not re.fullmatch(rf"{SPAN}|{DAY}", str(text)):
        return moment(text, what)
    end = first_moment(text, what)
    if len(text) < 7:
        end = end.replace(month=12)
    if len(text) < 10:
        end = end.replace(day=monthrange(end.year, end.month)[1])
    return end.replace(hour=23, minute=59, second=59, microsecond=999_999)


# ----------------------------------------------------------------------------------------------------
# Opening


class Missing(InputError):
    """There is no index at a location."""


def create(location: str | os.PathLike, *, record: dict, dim: int, client=None) -> "Store":
    """A new, empty index at `location`: a folder, or `http(s)://host[:port]/collection`.

    record: JSON object kept with the index and given back as `.record`: model, fingerprint, image settings, tiling,
    version, date. dim: length D of a vector. client: see `open`. Raises InputError if there is one already.
    """
    if not isinstance(dim, int) or not 1 <= dim <= 65536:
        raise ValueError(f"dim: expected a whole number from 1 to 65536, got {dim!r}")
    header = {"format": FORMAT, "dim": dim, "record": json.loads(json.dumps(record))}
    if client is not None or is_url(location):
        return _Server(location, client, create=header)
    return _Edge(Path(location), create=header)


def open(location: str | os.PathLike, *, client=None) -> "Store":
    """The index at `location`, as `create` takes it. A folder is open in one process at a time.

    client: a `qdrant_client.QdrantClient` to use instead of a new one. The API key of a server comes from the environment
    variable QDRANT_API_KEY.
    Raises Missing where there is no index, InputError for another format, one in use, a server that does not answer.
    """
    if client is not None or is_url(location):
        return _Server(location, client)
    return _Edge(Path(location))


def record_of(location: str | os.PathLike) -> dict:
    """The `record` of an index, without loading its vectors: 50,000 take half a second. Raises as `open` does."""
    if is_url(location):
        with open(location) as index:
            return index.record
    return _header_in(Path(location))["record"]


def refuse_absent(location: str | os.PathLike) -> None:
    """Say of a mistyped path that no index is there, before minutes of loading models. What a server holds, it is asked later.
    Raises as `open` does."""
    if not is_url(location):
        _header_in(Path(location))


def is_url(location) -> bool:
    return str(location).lower().startswith(("http://", "https://"))


def _header_in(folder: Path) -> dict:
    """The header of an index in a folder. Raises Missing, InputError."""
    header = folder / "index.json"
    if not header.is_file():
        what = "does not exist" if not folder.exists() else "holds no search index (no index.json)"
        raise Missing(f"{folder}: {what}; make one with `python search.py index`")
    try:
        text = json.loads(header.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{header}: cannot be read ({error}); index the library again") from None
    return _header(text, str(folder))


def _header(text: dict, where: str) -> dict:
    """A header that this version reads, else InputError."""
    if not isinstance(text, dict) or not {"format", "dim", "record"} <= set(text):
        raise InputError(f"{where}: not a search index of this project; make one with `python search.py index`")
    if text["format"] != FORMAT:
        newer = text["format"] > FORMAT
        raise InputError(
            f"{where}: an index of format {text['format']}, and this version reads format {FORMAT}; "
            + ("update the project" if newer else "index the library again into another --store")
        )
    return text


# ----------------------------------------------------------------------------------------------------
# What both engines share


class Store:
    """An open index; a context manager. Both engines have the same methods; `create` and `open` choose.

    Threads may search at once. Engine errors come as InputError where the user can act on them."""

    location: str
    record: dict
    """What `create` was given."""
    dim: int
    """D, the length of a vector."""
    _points: int | None = None
    """How many there are, once counted; None after a change."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def check(self, model: dict) -> None:
        """Refuse a query by another model: every key of `model` ("fingerprint", "image" settings ...) must equal the
        record's; "model" is only its name. Raises InputError."""
        mine, yours = self.record, json.loads(json.dumps(model))
        wrong = [key for key in yours if key != "model" and mine.get(key) != yours[key]]
        if not wrong:
            return
        if "fingerprint" in wrong:
            raise InputError(
                f"{self.location}: indexed with {mine.get('model')} (fingerprint {mine.get('fingerprint')}), so"
                f" {yours.get('model')} (fingerprint {yours['fingerprint']}) cannot search it: give --model"
                f" {mine.get('model')}, or index the library again into another --store"
            )
        listed = []
        for key in wrong:
            there, here = mine.get(key), yours[key]
            if isinstance(there, dict) and isinstance(here, dict):
                other = [name for name in here if there.get(name) != here[name]]
                listed += [f"{name}: {there.get(name)!r} there, {here[name]!r} here" for name in other]
            else:
                listed.append(f"{key}: {there!r} there, {here!r} here")
        raise InputError(
            f"{self.location}: indexed with other settings ({'; '.join(listed)}); index the library again into another --store"
        )

    def annotate(self, **changes) -> None:
        """Change entries of the record, on disk too."""
        self.record = self.record | json.loads(json.dumps(changes))
        with self._errors():
            self._keep({"format": FORMAT, "dim": self.dim, "record": self.record})

    def upsert(self, points: Iterable[Point]) -> None:
        """Add points, or replace those of the same path and window. When it returns they are on disk, all of them.

        A call costs one flush: 1000 points take 0.3 s of CPU and 0.8 s in all. A kill during it leaves all or none of them
        (on a server, of each 500). Raises InputError on a wrong length, footprint, time or attribute.
        """
        points = list(points)
        if not points:
            return
        matrix = np.asarray([point.vector for point in points], np.float32)  # (N, D)
        if matrix.shape[1:] != (self.dim,):
            raise InputError(
                f"{self.location}: holds vectors of {self.dim}, got {matrix.shape[1:]}; is this another model?"
            )
        lengths = np.linalg.norm(matrix, axis=1)
        if (wrong := ~(np.abs(lengths - 1) < 1e-3)).any():  # NaN too
            n = int(np.argmax(wrong))
            raise ValueError(f"{points[n].path}: expected a vector of unit length, got {lengths[n]}")
        payloads = [point.payload() for point in points]
        with self._errors():
            self._index_attributes({name for point in points for name in point.attributes})
            self._write([point.id for point in points], matrix, payloads)
        self._points = None

    def amend(self, files: Iterable[tuple[str, dict]]) -> None:
        """Change what is known of files whose vectors stay: (path, {"attributes", "hash", "size", "mtime_ns", of which any}).
        A file takes 5 ms; a kill leaves some changed and the others as they were. Raises InputError on a wrong attribute."""
        with self._errors():
            for path, known in files:
                check_attributes(known.get("attributes", {}), path)
                self._index_attributes(set(known.get("attributes", {})))
                self._set(self._filter(Filter(path=path)), known)
            self._flush()

    def _index_attributes(self, names: set[str]) -> None:
        for name in sorted(names - self._attributes):
            # Without an index of its own an attribute took 24 ms a query and gave a recall of 0.17.
            self._index(f"attributes.{name}", "keyword")
            self._attributes.add(name)

    def remove(self, ids: Iterable[str] | None = None, *, path: str | list[str] | None = None) -> None:
        """Remove points by id, or all of a file or of several. Unknown ones are no error. A call takes 0.5 s at 100,000
        points, however much it removes."""
        if (ids is None) == (path is None):
            raise ValueError("remove: expected ids or a path")
        what = path if isinstance(path, str) else list(ids if path is None else path)
        if what:
            with self._errors():
                self._delete(what if path is None else self._filter(Filter(path=what)))
            self._points = None

    def files(self) -> dict[str, tuple[int, int, str]]:
        """{path: (bytes, mtime_ns, hash)} of every file whose last tile is in: what a second run need not read again.

        Only points marked `last` are read, 24 us each: 0.12 s for the 5000 files of 100,000 tiles.
        """
        marks = self._marks(["path", "size", "mtime_ns", "hash"])
        return {p["path"]: (p["size"], p["mtime_ns"], p["hash"]) for p in marks}

    def attributes(self) -> dict[str, dict[str, str]]:
        """{path: attributes} of the same files."""
        return {p["path"]: p["attributes"] for p in self._marks(["path", "attributes"])}

    def _marks(self, fields: list[str]) -> list[dict]:
        """These fields of the last point of every file that is in."""
        last = self._m.Filter(must=[self._m.FieldCondition(key="last", match=self._m.MatchValue(value=1))])
        return [payload for _, payload in self._scroll(last, fields)]

    def count(self, filter: Filter | None = None) -> int:
        """Points in the index, or those that the filter lets through."""
        with self._errors():
            return self._count(self._filter(filter))

    def scroll(self, filter: Filter | None = None, *, payload: bool | list[str] = True) -> Iterator[tuple[str, dict]]:
        """(id, payload) of all points, or of those that the filter lets through, in the order of ids."""
        with self._errors():
            return self._scroll(self._filter(filter), payload)

    def vectors(self, ids: Iterable[str]) -> np.ndarray:
        """(N, D) float32, bit for bit what was upserted. Raises InputError if one is not in the index."""
        ids, found = [str(id) for id in ids], {}
        for start in range(0, len(ids), PAGE):
            with self._errors():
                for record in self._retrieve(ids[start : start + PAGE]):  # lists of Python floats: 12 times the memory
                    found[str(record.id)] = np.asarray(record.vector, np.float32)
        if missing := [id for id in ids if id not in found]:
            raise InputError(f"{self.location}: {len(missing)} points are not in the index, first {missing[0]}")
        return np.stack([found[id] for id in ids]) if ids else np.empty((0, self.dim), np.float32)

    def search(self, vectors, k: int = 10, *, filter: Filter | None = None, exact: bool = False, ef: int | None = None,
               with_payload: bool | list[str] = True) -> list:  # fmt: skip
        """The k nearest points: best first, a list of `Hit` for one vector (D,), a list of such lists for (Q, D).

        Queries of any length above 0 are brought to unit length. exact: score every point that the filter lets through
        instead of walking the graph. ef: candidates kept on the way (default EF or EF_FILTERED); more is slower and
        finds more.
        """
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != self.dim:
            raise InputError(
                f"{self.location}: holds vectors of {self.dim}, the query has shape {vectors.shape}; is this another model?"
            )
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise ValueError("search: a query vector is zero or not finite")
        queries = (vectors / norms).reshape(-1, self.dim)
        if not len(queries):
            return []
        with self._errors():
            limit = self._filter(filter)
            found = self._search(queries, k, limit, exact, ef, with_payload)
        return found if vectors.ndim == 2 else found[0]

    def _search(self, queries, k, limit, exact, ef, with_payload):
        growth = max(1.0, self._size() / GROWS_FROM)
        wide, narrow = (max(k, ef or round(least * growth**0.5)) for least in (EF, EF_FILTERED))
        if limit is None or exact:
            return self._ask([(query, limit) for query in queries], k, exact, wide, with_payload)
        found: list[list[Hit]] = [[] for _ in queries]
        scan = self._count(limit, exact=False) < SCAN_FEW * growth
        among = 0 if scan else MARGIN * k * self._size() / max(1, self._count(self._loose(limit), exact=False))
        tries = [round(among), round(min(4 * among, AMONG))] if 0 < among < AMONG else []
        for number in [*tries, None]:
            if not (todo := [n for n, hits in enumerate(found) if len(hits) < k]):
                break
            if number:
                best = self._ask([(queries[n], None) for n in todo], number, False, max(wide, number), False)
                limits = [self._m.Filter(must=[self._ids({hit.id for hit in hits}), *limit.must]) for hits in best]
                new = self._ask([(queries[n], few) for n, few in zip(todo, limits)], k, True, wide, with_payload)
            else:
                new = self._ask([(queries[n], limit) for n in todo], k, scan, narrow, with_payload)
            for n, hits in zip(todo, new):
                found[n] = hits
        return found

    def _ask(self, asked, k, exact, ef, with_payload) -> list[list[Hit]]:
        """The k nearest of each (query, filter), of which there is at least one."""
        requests = [
            self._m.QueryRequest(
                query=self._nearest(query), filter=limit, limit=k, with_payload=with_payload,
                params=self._params(limit, exact, ef),
            )
            for query, limit in asked
        ]  # fmt: skip
        return [[Hit(str(hit.id), hit.score, hit.payload) for hit in hits] for hits in self._query(requests)]

    def _size(self) -> int:
        if self._points is None:
            self._points = self._count(None)
        return self._points

    def recall(self, queries, k: int = 10) -> float:
        """Share, 0 to 1, of the k exact nearest that the graph finds, over queries (Q, D)."""
        queries = np.atleast_2d(np.asarray(queries, np.float32))
        quick = self.search(queries, k, with_payload=False)
        exact = self.search(queries, k, exact=True, with_payload=False)
        total = sum(map(len, exact))
        both = sum(len({hit.id for hit in a} & {hit.id for hit in b}) for a, b in zip(quick, exact))
        return both / total if total else 1.0

    # The engines' classes have the same names, but for the two ranges; `_m` is the module that holds them.

    def _filter(self, filter: Filter | None):
        """The engine's filter, or None where there is nothing to filter by."""
        m, must = self._m, []

        def between(key, kind=self._range, **limits):
            return m.FieldCondition(key=key, range=kind(**limits))

        def one_of(value):
            return m.MatchValue(value=value) if isinstance(value, str) else m.MatchAny(any=list(value))

        filter = filter or Filter()
        if filter.path is not None:
            must.append(m.FieldCondition(key="path", match=one_of(filter.path)))
        for name, value in filter.attributes.items():
            if name not in self._attributes:
                schema = self._schema()  # another client of a server may have added it; the local mode has none
                self._attributes |= {key.split(".", 1)[1] for key in schema if key.startswith("attributes.")}
                if schema and name not in self._attributes:
                    known = ", ".join(sorted(self._attributes)) or "none"
                    raise InputError(f"{self.location}: no point has the attribute {name!r}; there are: {known}")
            must.append(m.FieldCondition(key=f"attributes.{name}", match=one_of(value)))
        if filter.start is not None or filter.end is not None:
            limits = {}
            if filter.start is not None:
                limits["gte"] = first_moment(filter.start, "start").isoformat()
            if filter.end is not None:
                limits["lte"] = last_moment(filter.end, "end").isoformat()
            must.append(between("time", self._date_range, **limits))
        if filter.bbox is not None:
            west, south, east, north = checked_box(filter.bbox, "bbox")
            east += 360 * (east < west)
            # Footprints run from west in [-180, 180] to an east of up to 540. A turn of the Earth brings the box to
            # those that pass 180, and a box that passes 180 to those that do not.
            reach_x, reach_y, reach_east = self._reach()
            turns = [-360] * (east > 180) + [0] + [360] * (reach_east > 180)
            overlap = [[between("west", lte=east + turn), between("east", gte=west + turn)] for turn in turns]
            must += [between("south", lte=north), between("north", gte=south)]
            # What turns nothing needs no choice, whose check is half of the time of a walk under a filter.
            must += overlap[0] if len(turns) == 1 else [m.Filter(should=[m.Filter(must=pair) for pair in overlap])]
            # Four ranges alone make the engine look at half of all points (8 ms for a box with 0.6% of 100,000). The
            # centres of all that can overlap lie in the box widened by half the largest footprint, and a geographic
            # index finds those at once (1 ms).
            reach_x, reach_y = reach_x + 2 * RIM, reach_y + 2 * RIM
            width = east - west + 2 * reach_x
            if width < 360:
                west = (west - reach_x + 180) % 360 - 180
                spans = [(west, west + width)] if west + width <= 180 else [(west, 180), (-180, west + width - 360)]
                near = []
                for left, right in spans:
                    corners = {"top_left": (left, north + reach_y), "bottom_right": (right, south - reach_y)}
                    corners = {name: m.GeoPoint(**_inside(*corner, RIM / 2)) for name, corner in corners.items()}
                    near.append(m.FieldCondition(key="center", geo_bounding_box=m.GeoBoundingBox(**corners)))
                must.append(m.Filter(should=near))
        return m.Filter(must=must) if must else None

    def _loose(self, filter):
        """The filter without the ranges of the footprint. The engine guesses how many points pass as if conditions had nothing
        to do with each other, and where the centre is already says most of where the footprint is."""
        return self._m.Filter(must=[part for part in filter.must if getattr(part, "key", None) not in RANGES[:4]])

    def _scroll(self, filter, payload):
        offset = None
        while True:
            with self._errors():
                records, offset = self._page(filter, payload, offset)
            yield from ((str(record.id), record.payload) for record in records)
            if offset is None:
                return

    def _largest(self, direction) -> tuple[float, float, float]:
        """Half the width and half the height, in degrees, of the largest footprint, and the easternmost end of one; 0 where
        there is none."""
        found = []
        for key in ("half_width", "half_height", "east"):
            records, _ = self._page(None, [key], None, 1, self._m.OrderBy(key=key, direction=direction))
            found.append(records[0].payload[key] if records else 0.0)
        return tuple(found)

    def _params(self, filter, exact, ef):
        # ACORN (Patel et al. 2024) walks on over points that the filter cuts out. Without it recall fell to 0.56.
        acorn = filter and self._m.AcornSearchParams(enable=True, max_selectivity=1.0)
        again = self._m.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING)
        return self._m.SearchParams(hnsw_ef=ef, exact=exact, acorn=acorn, quantization=again)


# ----------------------------------------------------------------------------------------------------
# Qdrant Edge: a folder, in this process


class _Edge(Store):
    """index.json (format, dim, record), shard/ (Edge's own files), in_use (pid of who has it open, who holds a lock on it).

    One process at a time, reading or writing; the lock dies with its process. Edge's own lock, on its log, is no help: by the
    time it refuses, opening has rewritten files of the segments, and the process that writes them fails at its next flush."""

    def __init__(self, folder: Path, create: dict | None = None):
        import qdrant_edge as m

        self._m, self._range, self._date_range = m, m.RangeFloat, m.RangeDateTime
        self.location, self._folder, self._shard, self._lock = str(folder), folder, None, None
        shard = folder / "shard"
        if create:
            if folder.exists() and (
                not folder.is_dir() or {f.name for f in folder.iterdir()} - {"shard", "in_use", "index.json.partial"}
            ):
                if (folder / "index.json").exists():
                    raise InputError(f"{folder}: is an index already, which another run may just have made; run again")
                raise InputError(f"{folder}: is no empty folder; give another --store")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._take()
                shutil.rmtree(shard, ignore_errors=True)  # a `create` that was killed: index.json is written last
                shard.mkdir()
            except OSError as error:
                raise InputError(f"{folder}: cannot be made ({error.strerror}); give another --store") from None
            self._refuse_full_disk()
            self._shard = self._start(lambda: m.EdgeShard.create(str(shard), _edge_config(m, create["dim"])))
            for name, kind in INDEXED.items():
                self._index(name, kind)
            self._shard.flush()
            self._keep(create)
        else:
            create = _header_in(folder)
            self._take()
            self._shard = self._start(lambda: m.EdgeShard.load(str(shard)))
            # A killed `build` leaves its half-made segment here, which nothing reads: as large as the index, at worst.
            shutil.rmtree(shard / "temp_segments", ignore_errors=True)
        self.dim, self.record = create["dim"], create["record"]
        self._attributes, self._reach_now = set(), None

    def _keep(self, header: dict) -> None:
        partial = self._folder / "index.json.partial"
        partial.write_text(json.dumps(header, indent=1), encoding="utf-8")
        os.replace(partial, self._folder / "index.json")

    def _take(self) -> None:
        """Lock the folder. Raises InputError where another process has it open or it cannot be written."""
        note = self._folder / "in_use"
        try:
            self._lock = note.open("a+", encoding="ascii")
        except OSError as error:
            what = f"cannot be written ({error.strerror}), and an index is written to even to be read"
            raise InputError(f"{self.location}: {what}: copy it to a folder that you may write") from None

        def owner() -> str:
            return note.read_text(encoding="ascii") or "unknown"

        if take_lock(self._lock, lambda: Path("/proc").exists() and not Path(f"/proc/{owner()}").exists()):
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
            return
        self._lock.close()
        raise InputError(
            f"{self.location}: in use by another process (pid {owner()}); close that, or keep the index on a Qdrant server"
            " (--store http://...), which many may use at once"
        )

    def _release(self) -> None:
        self._lock.truncate(0)
        flock(self._lock, free=True)  # closing would leave it to worker processes that have the file open too
        self._lock.close()

    def _start(self, load):
        """`load()`, with a clear error where that fails."""
        try:
            return load()
        except Exception as error:  # Edge raises nothing narrower
            self._release()
            what = f"the index cannot be opened ({error}); index the library again into another --store"
            raise InputError(f"{self.location}: {what}") from None

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()  # flushes
            self._shard = None
            self._release()

    def build(self) -> bool:
        """Put all vectors into one graph and drop what was removed; False if there was nothing to do. Searches are
        right without it, only slower. A kill in between leaves the index as it was."""
        with self._errors():
            changed = self._shard.optimize()
            self._shard.flush()
        return changed

    @contextlib.contextmanager
    def _errors(self):
        if self._shard is None:
            raise ValueError(f"{self.location}: the index is closed")
        try:
            yield
        except (InputError, ValueError, TypeError):
            raise
        except Exception as error:
            raise InputError(f"{self.location}: {error}") from error

    def _index(self, name, kind):
        # In memory: out of mapped files, the default, counting what a filter leaves takes up to half as long again.
        schema = getattr(self._m, f"{kind.capitalize()}IndexParams")(memory=self._m.Memory.Pinned)
        self._shard.update(self._m.UpdateOperation.create_field_index(name, schema))

    def _schema(self):
        return self._shard.info().payload_schema

    def _refuse_full_disk(self, needed: int = 0):
        # Edge maps its files: a disk that fills up ends the process with SIGBUS.
        if (free := shutil.disk_usage(self._folder).free) < max(ROOM, needed):
            raise InputError(
                f"{self.location}: disk full: {free / 1e6:.0f} MB are left on it, too few to go on; make room and run the"
                " same command again, what is written is kept"
            )

    def _write(self, ids, matrix, payloads):
        self._refuse_full_disk(4 * matrix.nbytes)
        points = [self._m.Point(*point) for point in zip(ids, matrix.tolist(), payloads)]  # rows cost twice as much
        self._shard.update(self._m.UpdateOperation.upsert_points(points))  # one entry of the log: all or nothing
        self._shard.flush()
        self._reach_now = None

    def _delete(self, which):
        update = self._m.UpdateOperation
        which = update.delete_points(which) if isinstance(which, list) else update.delete_points_by_filter(which)
        self._shard.update(which)
        self._shard.flush()

    def _set(self, filter, payload):
        self._shard.update(self._m.UpdateOperation.set_payload_by_filter(filter, payload))

    def _flush(self):
        self._shard.flush()

    def _count(self, filter, exact=True):
        return self._shard.count(self._m.CountRequest(exact=exact, filter=filter))

    def _page(self, filter, payload, offset, limit=PAGE, order_by=None):
        return self._shard.scroll(
            self._m.ScrollRequest(
                filter=filter, with_payload=payload, with_vector=False, offset=offset, limit=limit, order_by=order_by
            )
        )

    def _reach(self):
        if self._reach_now is None:
            self._reach_now = self._largest(self._m.Direction.Desc)
        return self._reach_now

    def _retrieve(self, ids):
        return self._shard.retrieve(ids, with_payload=False, with_vector=True)

    def _ids(self, ids):
        return self._m.HasIdCondition(ids)

    def _nearest(self, query):
        return self._m.Query.Nearest(query)

    def _query(self, requests):
        return self._shard.query_batch(self._m.QueryBatchRequest(requests))


def _edge_config(m, dim: int):
    """Dot product of unit vectors is their cosine and leaves the stored bits alone. One segment, so that a query walks
    one graph."""
    return m.EdgeConfig(
        vectors=m.EdgeVectorParams(size=dim, distance=m.Distance.Dot),
        payload_memory=m.Memory.Cold,
        wal_enabled=True,
        hnsw_config=m.HnswIndexConfig(m=M, ef_construct=EF_CONSTRUCT, full_scan_threshold=SCAN_BELOW_KB, payload_m=0),
        quantization_config=m.ScalarQuantizationConfig(type=m.ScalarType.Int8, memory=m.Memory.Pinned),
        optimizers=m.EdgeOptimizersConfig(
            default_segment_number=1, max_segment_size=10**9, indexing_threshold=GRAPH_FROM_KB
        ),
    )


# ----------------------------------------------------------------------------------------------------
# A Qdrant server or cluster: a URL


class _Server(Store):
    """The header is the collection's metadata (servers from 1.16 on). Any number of processes may use it at once."""

    def __init__(self, location, client, create: dict | None = None):
        from qdrant_client import models as m

        self._m, self._range, self._date_range = m, m.Range, m.DatetimeRange
        self.location = str(location)
        parts = urlsplit(self.location)
        path = [part for part in parts.path.split("/") if part] if is_url(location) else []
        if not path:
            raise InputError(f"{location}: names no collection; write it behind the host: http://host:6333/my_library")
        self._name = path.pop()
        if client is None:
            from qdrant_client import QdrantClient

            client = QdrantClient(
                url=f"{parts.scheme}://{parts.netloc}", prefix="/".join(path) or None, timeout=60,
                api_key=os.environ.get("QDRANT_API_KEY"), check_compatibility=False,
            )  # fmt: skip
        self._client = client
        with self._errors():
            exists = client.collection_exists(self._name)
            if create and exists:
                raise InputError(f"{location}: the collection {self._name} exists already; give another name")
            if create:
                client.create_collection(
                    self._name,
                    vectors_config=m.VectorParams(size=create["dim"], distance=m.Distance.DOT),
                    hnsw_config=m.HnswConfigDiff(
                        m=M, ef_construct=EF_CONSTRUCT, full_scan_threshold=SCAN_BELOW_KB, payload_m=0
                    ),
                    quantization_config=m.ScalarQuantization(
                        scalar=m.ScalarQuantizationConfig(type=m.ScalarType.INT8, always_ram=True)
                    ),
                    optimizers_config=m.OptimizersConfigDiff(indexing_threshold=GRAPH_FROM_KB),
                    on_disk_payload=True,
                    metadata=create,
                )
                for name, kind in INDEXED.items():
                    self._index(name, kind)
            elif not exists:
                raise Missing(f"{location}: no collection {self._name} there; make one with `python search.py index`")
            info = client.get_collection(self._name)
        if create and not info.config.metadata:
            client.delete_collection(self._name)
            raise InputError(
                f"{location}: this server keeps no metadata of a collection; Qdrant 1.16 or newer is needed"
            )
        create = _header(info.config.metadata, self.location)
        self.dim, self.record = create["dim"], create["record"]
        self._attributes = set()

    def close(self) -> None:
        self._client.close()

    def _keep(self, header: dict) -> None:
        self._client.update_collection(self._name, metadata=header)

    def build(self) -> bool:
        """Wait until the server, which builds its graph by itself, has built it."""
        waited = begun = False
        while True:
            with self._errors():
                status = self._client.get_collection(self._name).status
            if status == "red":
                raise InputError(f"{self.location}: the server reports a failed optimization; see its log")
            if status == "green" or (status == "grey" and begun):  # grey: it could do more, but not by itself
                return waited
            if status == "grey":  # as after a restart; any change makes it begin
                with self._errors():
                    self._client.update_collection(self._name, optimizers_config=self._m.OptimizersConfigDiff())
                begun = True
            waited = True
            time.sleep(0.5)

    @contextlib.contextmanager
    def _errors(self):
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            yield
        except ResponseHandlingException as error:
            raise InputError(f"{self.location}: no Qdrant server answers there ({error}); is it running?") from None
        except UnexpectedResponse as error:
            hint = "; set QDRANT_API_KEY" if error.status_code in (401, 403) else ""
            reason = error.content.decode(errors="replace")[:300] if error.content else error.reason_phrase
            raise InputError(f"{self.location}: the server answered {error.status_code} ({reason}){hint}") from None

    def _index(self, name, kind):
        self._client.create_payload_index(self._name, name, getattr(self._m.PayloadSchemaType, kind.upper()))

    def _schema(self):
        return self._client.get_collection(self._name).payload_schema or {}

    def _write(self, ids, matrix, payloads):
        points = [self._m.PointStruct(id=i, vector=v.tolist(), payload=p) for i, v, p in zip(ids, matrix, payloads)]
        for start in range(0, len(points), 500):  # a request of 500 x 512 is 6 MB of JSON; the server takes 32
            self._client.upsert(self._name, points[start : start + 500], wait=True)

    def _delete(self, which):
        which = self._m.PointIdsList(points=which) if isinstance(which, list) else self._m.FilterSelector(filter=which)
        self._client.delete(self._name, which, wait=True)

    def _set(self, filter, payload):
        self._client.set_payload(self._name, payload, filter, wait=True)

    def _flush(self):
        """A server has written what it has answered."""

    def _count(self, filter, exact=True):
        return self._client.count(self._name, count_filter=filter, exact=exact).count

    def _page(self, filter, payload, offset, limit=PAGE, order_by=None):
        return self._client.scroll(
            self._name, filter, with_payload=payload, with_vectors=False, offset=offset, limit=limit, order_by=order_by
        )

    def _reach(self):  # asked anew each time: others may have added a larger footprint
        return self._largest(self._m.Direction.DESC)

    def _retrieve(self, ids):
        return self._client.retrieve(self._name, ids, with_payload=False, with_vectors=True)

    def _ids(self, ids):
        return self._m.HasIdCondition(has_id=list(ids))

    def _nearest(self, query):
        return query.tolist()

    def _query(self, requests):
        return [answer.points for answer in self._client.query_batch_points(self._name, requests)]
