"""The search index (store.py) against FAISS, LanceDB, scikit-learn and plain numpy: time, recall, memory, disk.

    pip install faiss-cpu==1.15.1 lancedb==0.40.0 scikit-learn==1.9.1
    python benchmarks/bench_search.py --json search_100k.json                                 # 100,000 vectors of 512
    python benchmarks/bench_search.py --points 1000000 --folder search_1m --json search_1m.json
    python benchmarks/bench_search.py --sides "ours,ours exact,numpy" --points 20000 --dim 128  # needs no peer

All sides get the same vectors, queries, filters and CPUs, and give back the same thing: path, footprint and time of the k
nearest, of one query at a time, as a user who waits for an answer asks.

    ours, ours exact   store.py with its defaults: the graph, and scanning all that the filter lets through; one index
    faiss flat         IndexFlatIP, exact. FAISS spreads queries over threads, so that a single one runs on one
    faiss hnsw         IndexHNSWFlat, M=16, efConstruction=100 and efSearch=224 as in store.py. FAISS counts what the filter
                       cuts out among its candidates: efSearch is 96 / (share of the points that the filter leaves), so
                       that about as many of the right ones are kept as in store.py under a filter
    numpy              matrix @ query and argpartition, exact; under a filter that leaves less than 10% only those rows
    lancedb            IVF_PQ, its default index and the one it recommends with filters; sub-vectors of 8, 20 probes,
                       refine_factor 30 (by default, of 16 and none: recall 0.3); BTREE indexes on what is filtered
    lancedb hnsw       IVF_HNSW_SQ in one partition, as it recommends, m=16, ef_construction=100; ef 224, refine_factor 4
    lancedb exact      the table of lancedb with bypass_vector_index
    sklearn            NearestNeighbors, brute; euclidean, which orders unit vectors as cosine does and saves it scaling
                       all of them for every query; under a filter fitted anew to the rows left

FAISS, numpy and sklearn store no payload and cannot filter by it. They do what their users do: columns in memory, a numpy
mask over them for every query, and the rows of the hits from the same columns. That time is counted, and the columns in
memory and on disk too. FAISS takes the mask as IDSelectorArray (flat: faster than a bitmap) or IDSelectorBitmap (hnsw).
LanceDB filters with a `where` before it searches.

Data: unit vectors in --clusters clusters, cosine to their centre 0.6 to 0.8, as image embeddings lie; half the queries are
image-like (drawn as the vectors are), half text-like (cosine 0.3 to a centre: harder). Footprints of 0.02 to 0.2 degrees
anywhere, whatever the vector; dates in three years. Each query has a box and a time span of its own. Boxes do not cross the
antimeridian, which only store.py handles. Real libraries lie in patches; these figures say nothing about that.

Every build and every round of a side is a process of its own, one at a time, on --threads CPUs: its memory is its own and
no idle side is in the way. A round opens the index, brings it into memory, asks some other queries to warm up, and then
times each query. Rounds of the sides are interleaved; the median of the rounds is reported with the smallest and largest.
The machine has to be idle: where another process wants a CPU, OpenMP (FAISS, numpy, sklearn) waits for its other threads,
and a query of FAISS that took 2 ms on one thread took 16 ms on two.
Memory: peak of the process (resident, so with the pages of mapped files, which the system can take back: store.py and
LanceDB), and of it the part that is no file's at the end. Recall counts a hit that scores no less than the k-th exact one
(within 1e-6: ties), and passes the filter.

The bandwidth limit: a scan has to read all vectors once. How fast this machine reads is measured in every round with
numpy's sum and dot over as many bytes, but at least 1 GiB, by one call and by --threads threads over a part each; the
fastest counts.
"""

import abc
import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import store  # noqa: E402
from config import InputError, user_errors  # noqa: E402

SEED = 0
PEERS = {"faiss": "faiss-cpu==1.15.1", "lancedb": "lancedb==0.40.0", "sklearn": "scikit-learn==1.9.1"}
BLOCK = 10_000  # points made, read and added at once
FIRST, DAYS = date(2020, 1, 1), 3 * 365
SPAN = round(0.3 * DAYS)  # days of a query's time span
LONS, LATS = (-180.0, 179.8), (-60.0, 74.8)  # where footprints begin, degrees
# name: (share of the Earth's strip that the box covers, whether there is a time span)
FILTERS = {
    "no filter": (None, False), "box 1%": (0.01, False), "box 5%": (0.05, False), "box 20%": (0.2, False),
    "time 30%": (None, True), "box 20%, time 30%": (0.2, True),
}  # fmt: skip
WARM_UP = 10  # untimed queries of each filter before a round
LEAST = 10  # queries answered however slow a side is
AIM_MS, AIM_RECALL, AIM_SCAN = 3.0, 0.99, 2.0  # p50 and recall@k of ours at 100,000; a scan's time over the limit


# ----------------------------------------------------------------------------------------------------
# The same data for all


def write_data(folder: Path, points: int, dim: int, clusters: int, queries: int) -> None:
    """vectors.f32 (points x dim), columns.npz (footprints, days), queries.npz (and queries to warm up with)."""
    rng = np.random.default_rng(SEED)
    centres = _unit(rng.standard_normal((clusters, dim), np.float32))

    def near(count, cosines, rng):
        cosines = np.broadcast_to(cosines, count).astype(np.float32)[:, None]
        noise = _unit(rng.standard_normal((count, dim), np.float32))
        return _unit(cosines * centres[rng.integers(0, clusters, count)] + np.sqrt(1 - cosines**2) * noise)

    with open(folder / "vectors.f32", "wb") as out:
        for start in range(0, points, BLOCK):
            rng = np.random.default_rng([SEED, start])
            count = min(BLOCK, points - start)
            near(count, rng.uniform(0.6, 0.8, count), rng).tofile(out)
    rng = np.random.default_rng([SEED, 1, 1])
    west, south = rng.uniform(*LONS, points), rng.uniform(*LATS, points)
    east, north = west + rng.uniform(0.02, 0.2, points), south + rng.uniform(0.02, 0.2, points)
    np.savez(folder / "columns.npz", places=np.stack([west, south, east, north]), days=rng.integers(0, DAYS, points))
    for name, count in (("warm_up", WARM_UP), ("queries", queries)):
        # Kinds take turns, so that a side that is cut short has answered as many of both.
        drawn = np.stack([near(count, rng.uniform(0.6, 0.8, count), rng), near(count, 0.3, rng)], 1)
        chosen = {"vectors": drawn.reshape(-1, dim)[:count], "starts": rng.integers(0, DAYS - SPAN + 1, count)}
        for share in {share for share, _ in FILTERS.values() if share}:
            width, height = ((high - low) * share**0.5 for low, high in (LONS, LATS))
            west, south = rng.uniform(LONS[0], LONS[1] - width, count), rng.uniform(LATS[0], LATS[1] - height, count)
            chosen[f"boxes {share}"] = np.stack([west, south, west + width, south + height], 1)
        np.savez(folder / f"{name}.npz", **chosen)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def path_of(i: int) -> str:
    return f"region_{i % 40:02d}/scene_{i:08d}.tif"


def index_of(path: str) -> int:
    return int(path[-12:-4])


def iso(day: int) -> str:
    return (FIRST + timedelta(days=int(day))).isoformat()


class Data:
    """What `write_data` wrote into `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.points, self.dim = (json.loads((folder / "data.json").read_text())[key] for key in ("points", "dim"))
        with np.load(folder / "columns.npz") as columns:
            self.places, self.days = columns["places"], columns["days"]  # (4, N) degrees, (N,)

    def blocks(self) -> Iterator[tuple[range, np.ndarray]]:
        """(numbers, (n, D) vectors); read, not mapped, so that they do not count as a side's memory for longer."""
        for start in range(0, self.points, BLOCK):
            some = range(start, min(start + BLOCK, self.points))
            block = np.fromfile(
                self.folder / "vectors.f32", np.float32, len(some) * self.dim, offset=4 * start * self.dim
            )
            yield some, block.reshape(-1, self.dim)

    def questions(self, name: str, which: str) -> Iterator[tuple[np.ndarray, tuple | None, tuple | None]]:
        """(vector, box, (first day, last day)) of every query under the filter `which`."""
        share, timed = FILTERS[which]
        with np.load(self.folder / f"{name}.npz") as found:
            vectors, starts = found["vectors"], found["starts"].tolist()
            boxes = [tuple(box) for box in found[f"boxes {share}"].tolist()] if share else [None] * len(vectors)
        return zip(vectors, boxes, [(start, start + SPAN - 1) if timed else None for start in starts])

    def mask(self, box, span) -> np.ndarray | None:
        """(N,) bool: what the filter lets through; None for all."""
        mask = None
        if box is not None:
            (west, south, east, north), places = box, self.places
            mask = (places[0] <= east) & (places[2] >= west) & (places[1] <= north) & (places[3] >= south)
        if span is not None:
            inside = (self.days >= span[0]) & (self.days <= span[1])
            mask = inside if mask is None else mask & inside
        return mask


def exact_answers(data: Data, k: int) -> dict[str, list[tuple[float, int, np.ndarray | None]]]:
    """{filter: [(score of the k-th best, how many there are, which may be found)]} of every query: numpy, float32."""
    vectors = np.fromfile(data.folder / "vectors.f32", np.float32).reshape(data.points, data.dim)
    truth = {which: [] for which in FILTERS}
    for questions in zip(*(data.questions("queries", which) for which in FILTERS)):
        scores = vectors @ questions[0][0]
        for which, (_, box, span) in zip(FILTERS, questions):
            mask = data.mask(box, span)
            left = scores if mask is None else scores[mask]
            count = min(k, len(left))
            worst = float(np.partition(left, -count)[-count]) if count else 1.0
            truth[which].append((worst, count, None if mask is None else np.packbits(mask)))
    return truth


# ----------------------------------------------------------------------------------------------------
# The sides


class Side(abc.ABC):
    """A way to search. `build` writes into `folder`; in another process `open` reads it, and `search` answers."""

    index = None
    """The side whose index this one reads too."""

    def __init__(self, name: str, data: Data, folder: Path, k: int):
        self.name, self.data, self.folder, self.k = name, data, folder, k

    @abc.abstractmethod
    def build(self) -> None:
        """Write the index below `folder`."""

    @abc.abstractmethod
    def open(self) -> None:
        """Read it, in another process."""

    def touch(self) -> None:  # noqa: B027 - most sides have nothing to bring or to let go
        """Bring into memory what a process that has run for a while has there."""

    @abc.abstractmethod
    def search(self, query: np.ndarray, box, span) -> list[dict]:
        """Rows of the k nearest, best first: path, footprint or its four numbers, time."""

    def close(self) -> None:  # noqa: B027
        """Let go of what `open` holds, where that is more than memory."""


class Ours(Side):
    exact = False

    def build(self):
        data = self.data
        with store.create(self.folder / "index", record={"model": "drawn"}, dim=data.dim) as index:
            for some, block in data.blocks():
                for at in range(0, len(some), 2000):
                    index.upsert(
                        store.Point(
                            path_of(i), vector, footprint=tuple(data.places[:, i].tolist()), time=iso(data.days[i]),
                            hash=f"{i:016x}", size=1_000_000 + i, mtime_ns=1_700_000_000_000_000_000 + i,
                        )
                        for i, vector in zip(some[at : at + 2000], block[at : at + 2000])
                    )  # fmt: skip
            index.build()

    def open(self):
        self.opened = store.open(self.folder / "index")

    def touch(self):
        self.opened.search(np.ones(self.data.dim), self.k, exact=True)

    def search(self, query, box, span):
        limit = None
        if box or span:
            limit = store.Filter(bbox=box, start=span and iso(span[0]), end=span and iso(span[1]))
        fields = ["path", "footprint", "time"]
        hits = self.opened.search(query, self.k, filter=limit, exact=self.exact, with_payload=fields)
        return [hit.payload for hit in hits]

    def close(self):
        self.opened.close()


class OursExact(Ours):
    index, exact = "ours", True


class Columns(Side):
    """A side without payload: columns in a file and in memory."""

    def build(self):
        paths = [path_of(i) for i in range(self.data.points)]
        (self.folder / "paths.json").write_text(json.dumps(paths))
        np.savez(self.folder / "columns.npz", places=self.data.places, days=self.data.days)
        self.build_vectors()

    def build_vectors(self):
        with open(self.folder / "vectors.f32", "wb") as out:
            for _, block in self.data.blocks():
                block.tofile(out)

    def open(self):
        # Places and days are in memory already: those of `data`, equal to columns.npz.
        self.paths = json.loads((self.folder / "paths.json").read_text())
        self.open_vectors()

    def open_vectors(self):
        self.matrix = np.fromfile(self.folder / "vectors.f32", np.float32).reshape(-1, self.data.dim)

    def search(self, query, box, span):
        found = self.nearest(query, self.data.mask(box, span))
        return [
            {"path": self.paths[i], "footprint": self.data.places[:, i].tolist(), "time": iso(self.data.days[i])}
            for i in found
        ]

    @abc.abstractmethod
    def nearest(self, query, mask) -> list[int]:
        """Numbers of the k nearest points of those that the mask (N,) leaves, best first; None leaves all."""


class Numpy(Columns):
    def nearest(self, query, mask):
        rows = None if mask is None else np.flatnonzero(mask)
        if rows is not None and len(rows) < 0.1 * len(mask):
            scores = self.matrix[rows] @ query
        else:
            scores = self.matrix @ query
            scores = scores if rows is None else scores[rows]
        k = min(self.k, len(scores))
        best = np.argpartition(scores, -k)[-k:] if k else np.arange(0)
        best = best[np.argsort(-scores[best])]
        return (best if rows is None else rows[best]).tolist()


class Sklearn(Columns):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        from sklearn.neighbors import NearestNeighbors

        self.make = functools.partial(NearestNeighbors, algorithm="brute")

    def open_vectors(self):
        super().open_vectors()
        self.all = self.make().fit(self.matrix)

    def nearest(self, query, mask):
        if mask is None:
            return self.all.kneighbors(query[None], self.k, return_distance=False)[0].tolist()
        rows = np.flatnonzero(mask)
        if not len(rows):
            return []
        some = self.make().fit(self.matrix[rows])
        return rows[some.kneighbors(query[None], min(self.k, len(rows)), return_distance=False)[0]].tolist()


class Faiss(Columns):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        import faiss

        self.faiss = faiss

    def build_vectors(self):
        index = self.new()
        for _, block in self.data.blocks():
            index.add(block)
        self.faiss.write_index(index, str(self.folder / "vectors.faiss"))

    def open_vectors(self):
        self.opened = self.faiss.read_index(str(self.folder / "vectors.faiss"))

    def nearest(self, query, mask):
        found = self.opened.search(query[None], self.k, params=self.parameters(mask))[1][0]
        return found[found >= 0].tolist()


class FaissFlat(Faiss):
    def new(self):
        return self.faiss.IndexFlatIP(self.data.dim)

    def parameters(self, mask):
        if mask is None:
            return None
        return self.faiss.SearchParameters(sel=self.faiss.IDSelectorArray(np.flatnonzero(mask)))


class FaissHnsw(Faiss):
    def new(self):
        index = self.faiss.IndexHNSWFlat(self.data.dim, store.M, self.faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = store.EF_CONSTRUCT
        return index

    def parameters(self, mask):
        if mask is None:
            return self.faiss.SearchParametersHNSW(efSearch=store.EF)
        ef = min(len(mask), round(store.EF_FILTERED * len(mask) / max(1, np.count_nonzero(mask))))
        bits = self.faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        return self.faiss.SearchParametersHNSW(efSearch=ef, sel=bits)


class Lance(Side):
    limits = (("nprobes", 20), ("refine_factor", 30))

    def __init__(self, *arguments):
        super().__init__(*arguments)
        import lancedb
        import lancedb.index
        import pyarrow

        self.lancedb, self.arrow = lancedb, pyarrow

    def kind(self):
        dim = self.data.dim
        return self.lancedb.index.IvfPq(distance_type="cosine", num_sub_vectors=None if dim % 8 else dim // 8)

    def build(self):
        arrow, data, names = self.arrow, self.data, ("west", "south", "east", "north")
        schema = arrow.schema([
            ("vector", arrow.list_(arrow.float32(), data.dim)), ("path", arrow.string()),
            *((name, arrow.float64()) for name in names), ("time", arrow.date32()),
        ])  # fmt: skip

        def batches():
            for some, block in data.blocks():
                at = slice(some.start, some.stop)
                days = (data.days[at] + (FIRST - date(1970, 1, 1)).days).astype(np.int32)
                columns = [
                    arrow.FixedSizeListArray.from_arrays(arrow.array(block.ravel()), data.dim),
                    arrow.array([path_of(i) for i in some]), *(arrow.array(row[at]) for row in data.places),
                    arrow.array(days).cast(arrow.date32()),
                ]  # fmt: skip
                yield arrow.RecordBatch.from_arrays(columns, schema=schema)

        table = self.lancedb.connect(self.folder).create_table("points", batches(), schema=schema)
        table.create_index("vector", config=self.kind())
        for name in (*names, "time"):
            table.create_index(name, config=self.lancedb.index.BTree())

    def open(self):
        self.opened = self.lancedb.connect(self.folder).open_table("points")

    def touch(self):
        query = np.ones(self.data.dim, np.float32)
        self.opened.search(query).distance_type("cosine").bypass_vector_index().limit(self.k).to_list()

    def search(self, query, box, span):
        asked = self.limited(self.opened.search(query).distance_type("cosine").limit(self.k))
        terms = []
        if box:
            west, south, east, north = box
            terms = [f"west <= {east}", f"east >= {west}", f"south <= {north}", f"north >= {south}"]
        if span:
            terms += [f"time >= DATE '{iso(span[0])}'", f"time <= DATE '{iso(span[1])}'"]
        if terms:
            asked = asked.where(" AND ".join(terms), prefilter=True)
        return asked.select(["path", "west", "south", "east", "north", "time", "_distance"]).to_list()

    def limited(self, asked):
        for name, value in self.limits:
            asked = getattr(asked, name)(value)
        return asked


class LanceHnsw(Lance):
    limits = (("ef", store.EF), ("refine_factor", 4))

    def kind(self):
        return self.lancedb.index.HnswSq(
            distance_type="cosine", num_partitions=1, m=store.M, ef_construction=store.EF_CONSTRUCT
        )


class LanceExact(Lance):
    index = "lancedb"

    def limited(self, asked):
        return asked.bypass_vector_index()


SIDES = {  # name: (class, the package it needs)
    "ours": (Ours, None), "ours exact": (OursExact, None), "faiss flat": (FaissFlat, "faiss"),
    "faiss hnsw": (FaissHnsw, "faiss"), "numpy": (Numpy, None), "lancedb": (Lance, "lancedb"),
    "lancedb hnsw": (LanceHnsw, "lancedb"), "lancedb exact": (LanceExact, "lancedb"), "sklearn": (Sklearn, "sklearn"),
}  # fmt: skip
EXACT = ("ours exact", "faiss flat", "numpy", "lancedb exact", "sklearn")


# ----------------------------------------------------------------------------------------------------
# In a process of its own


def child(options) -> dict:
    """The work `options.child` on one side, or the machine's read bandwidth."""
    if hasattr(os, "sched_setaffinity"):  # before any library counts the CPUs
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    folder = Path(options.folder)
    if options.child == "bandwidth":
        return {"bytes_per_second": bandwidth(4 * options.points * options.dim, options.threads)}
    kind = SIDES[options.sides[0]][0]
    data = Data(folder)
    side = kind(options.sides[0], data, folder / (kind.index or options.sides[0]).replace(" ", "_"), options.k)
    loaded = memory()["peak"]
    if options.child == "build":
        start = time.perf_counter()
        side.build()
        seconds = time.perf_counter() - start
        disk = sum(
            f.lstat().st_blocks * 512 for f in side.folder.rglob("*") if f.is_file()
        )  # sparse files count as held
        return {"seconds": seconds, "disk": disk, "loaded": loaded, **memory()}
    start = time.perf_counter()
    side.open()
    opening = time.perf_counter() - start
    side.touch()
    answers = {}
    for which in FILTERS:
        for question in data.questions("warm_up", which):
            side.search(*question)
        answers[which], began = {"seconds": [], "found": []}, time.perf_counter()
        for query, box, span in data.questions("queries", which):
            start = time.perf_counter()
            rows = side.search(query, box, span)
            answers[which]["seconds"].append(time.perf_counter() - start)
            answers[which]["found"].append([checked(row, data) for row in rows])
            if time.perf_counter() - began > options.limit and len(answers[which]["found"]) >= LEAST:
                break
    serving = memory()
    side.close()
    return {"opening_seconds": opening, "loaded": loaded, **serving, "answers": answers}


def checked(row: dict, data: Data) -> int:
    """The number of a hit's point, once its footprint and time are found to be that point's."""
    i = index_of(row["path"])
    place = row["footprint"] if "footprint" in row else [row[name] for name in ("west", "south", "east", "north")]
    if not np.allclose(place, data.places[:, i], rtol=0, atol=1e-9) or str(row["time"]) != iso(data.days[i]):
        raise SystemExit(f"wrong payload: {row}")
    return i


def memory() -> dict[str, int]:
    """Bytes: highest resident memory so far, and what no file holds of it now (None where the system does not say). As
    peak_memory of common.py, whose import of torch would count for 200 MB here."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak": peak, "own": None}
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", status.read_text()))
    return {"peak": 1024 * int(found["VmHWM"]), "own": 1024 * int(found["RssAnon"])}


def bandwidth(size: int, threads: int, repeats: int = 3) -> float:
    """Bytes a second that numpy reads from an array of `size` bytes, at least 1 GiB: the fastest of all tries."""
    array = np.ones(max(size, 2**30) // 4, np.float32)
    parts, fastest = np.array_split(array, threads), 0.0
    with ThreadPoolExecutor(threads) as pool:
        tries = [
            lambda: array.sum(), lambda: array @ array,
            lambda: list(pool.map(np.sum, parts)), lambda: list(pool.map(lambda part: part @ part, parts)),
        ]  # fmt: skip
        for attempt in tries * repeats:
            start = time.perf_counter()
            attempt()
            fastest = max(fastest, array.nbytes / (time.perf_counter() - start))
    return fastest


# ----------------------------------------------------------------------------------------------------
# The run


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--points", type=int, default=100_000, help="vectors in the index")
    add("--dim", type=int, default=512, help="length of a vector")
    add("--clusters", type=int, default=1000)
    add("--queries", type=int, default=200, help="of a round under each filter, half image-like, half text-like")
    add("--rounds", type=int, default=3, help="interleaved rounds of all sides")
    add("--k", type=int, default=10, help="hits of a query")
    add("--threads", type=int, default=2, help="CPUs that a side may use, to build and to search")
    add("--limit", type=float, default=20, help="seconds after which a round's queries under a filter are cut short")
    add("--sides", default=",".join(SIDES), help="separated by commas")
    add("--folder", help="keep data and indexes here; what a run of the same data has built there is taken again")
    add("--json", help="write every number here")
    add("--child", choices=["build", "search", "bandwidth"], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name in ("points", "dim", "clusters", "queries", "rounds", "k", "threads"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.points < options.k:
        raise InputError(f"--points {options.points}: expected at least --k {options.k}")
    if hasattr(os, "sched_getaffinity") and not options.child and options.threads > len(os.sched_getaffinity(0)):
        raise InputError(f"--threads {options.threads}: there are {len(os.sched_getaffinity(0))} CPUs")
    options.sides = [name.strip() for name in options.sides.split(",") if name.strip()]
    if not options.sides or (unknown := [name for name in options.sides if name not in SIDES]):
        raise InputError(
            f"--sides: expected some of {', '.join(SIDES)}" + (f"; got {unknown[0]}" if options.sides else "")
        )
    needed = dict.fromkeys(SIDES[name][1] for name in options.sides if SIDES[name][1])
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        are = "is" if len(missing) == 1 else "are"
        raise InputError(
            f"{', '.join(missing)} {are} not installed; run `pip install {' '.join(PEERS[name] for name in missing)}`,"
            f' or leave them out with --sides, e.g. "ours,ours exact,numpy"'
        )
    return options


def ask(options, work: str, side: str, folder: Path) -> dict:
    """`child` in a process of its own, on `options.threads` CPUs and threads; {"error"} if it fails."""
    out = folder / "answer.json"
    out.unlink(missing_ok=True)
    fixed = {name: getattr(options, name) for name in ("points", "dim", "k", "threads", "limit")}
    command = [sys.executable, __file__, "--child", work, "--sides", side, "--folder", str(folder), "--json", str(out)]
    command += [part for name, value in fixed.items() for part in (f"--{name}", str(value))]
    names = ("OMP", "OPENBLAS", "MKL", "RAYON")
    threads = {f"{name}_NUM_THREADS": str(options.threads) for name in names}
    threads |= {"LANCE_CPU_THREADS": str(options.threads), "TOKIO_WORKER_THREADS": str(options.threads)}
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        return {"error": done.stderr.strip()[-2000:] or f"ended with code {done.returncode}"}
    return json.loads(out.read_text())


def prepare(options, folder: Path) -> None:
    wanted = {name: getattr(options, name) for name in ("points", "dim", "clusters", "queries", "threads")}
    note = folder / "data.json"
    if note.exists():
        if json.loads(note.read_text()) != wanted:
            raise InputError(f"--folder {folder}: holds data and builds of {note.read_text()}; give another folder")
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--folder {folder}: holds something else; give an empty or new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, options.points, options.dim, options.clusters, options.queries)
    note.write_text(json.dumps(wanted))


def build(options, side: str, folder: Path) -> dict:
    """Build a side's index, or take the numbers of a build that is done."""
    place = folder / side.replace(" ", "_")
    note = place.with_suffix(".json")
    if note.exists():
        return json.loads(note.read_text())
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    made = ask(options, "build", side, folder)
    if "error" not in made:
        note.write_text(json.dumps(made))
    return made


def rate(answers: dict, truth: dict, data: Data, vectors: np.ndarray) -> dict:
    """{filter: p50_ms, p95_ms, answered, recall, recall_image, recall_text, share} of a round."""
    result = {}
    for which, answer in answers.items():
        right, wanted = [0, 0], [0, 0]
        questions = data.questions("queries", which)
        for number, (found, (worst, count, mask), (query, *_)) in enumerate(
            zip(answer["found"], truth[which], questions)
        ):
            found = np.asarray(sorted(set(found)), np.int64)
            if mask is not None:
                found = found[(mask[found >> 3] >> (7 - (found & 7))) & 1 == 1]
            right[number % 2] += int((vectors[found] @ query >= worst - 1e-6).sum()) if len(found) else 0
            wanted[number % 2] += count
        recall = [min(1.0, a / b) if b else None for a, b in zip([*right, sum(right)], [*wanted, sum(wanted)])]
        milliseconds = 1e3 * np.asarray(answer["seconds"])
        result[which] = {
            "p50_ms": float(np.percentile(milliseconds, 50)), "p95_ms": float(np.percentile(milliseconds, 95)),
            "answered": len(milliseconds), "recall": recall[2], "recall_image": recall[0], "recall_text": recall[1],
        }  # fmt: skip
    return result


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = arguments(argv)
    if options.child:
        Path(options.json).write_text(json.dumps(child(options)))
        return {}
    with contextlib.ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_search_")))
        results = measure(options, argv, folder.resolve())
    if options.json:
        from report import write_json

        write_json(options.json, results)
        say(f"written: {options.json}")
    return results


def measure(options, argv: list[str], folder: Path) -> dict:
    say(f"command: python benchmarks/bench_search.py {shlex.join(argv)}")
    versions = {"numpy": np.__version__, "qdrant-edge-py": importlib.metadata.version("qdrant-edge-py")}
    for name in dict.fromkeys(SIDES[side][1] for side in options.sides if SIDES[side][1]):
        package = PEERS[name].split("==")[0]
        versions[package] = importlib.metadata.version(package)
    say(", ".join(f"{name} {version}" for name, version in versions.items()) + f"; {options.threads} CPUs a side")
    prepare(options, folder)
    data = Data(folder)
    truth = exact_answers(data, options.k)
    shares = {which: share_left(truth[which], data.points) for which in FILTERS}
    say(f"{data.points} vectors of {data.dim} ({4 * data.points * data.dim / 2**20:.0f} MiB), {options.queries} queries; left by "
        + ", ".join(f"{which}: {share:.1%}" for which, share in shares.items() if which != "no filter"))  # fmt: skip
    results = {"settings": vars(options), "versions": versions, "shares": shares, "builds": {}, "absent": {}}
    for side in dict.fromkeys(SIDES[name][0].index or name for name in options.sides):
        made = build(options, side, folder)
        if "error" in made:
            results["absent"][side] = made["error"]
            say(f"  {side}: absent, its build failed: {made['error']}")
        else:
            results["builds"][side] = made
            say(f"  {side}: built in {made['seconds']:.1f} s")
    vectors = np.memmap(folder / "vectors.f32", np.float32, "r", shape=(data.points, data.dim))
    for side in options.sides:
        if (SIDES[side][0].index or side) in results["absent"]:
            results["absent"].setdefault(side, f"no index of {SIDES[side][0].index}")
    live = [side for side in options.sides if side not in results["absent"]]
    rounds, limits = {side: [] for side in live}, []
    for number in range(1, options.rounds + 1):
        speed = ask(options, "bandwidth", options.sides[0], folder)
        if "error" in speed:
            raise SystemExit(f"the bandwidth could not be measured:\n{speed['error']}")
        limits.append(speed["bytes_per_second"])
        for side in [side for side in live if side not in results["absent"]]:
            answered = ask(options, "search", side, folder)
            if "error" in answered:
                results["absent"][side] = answered["error"]
                say(f"  {side}: absent, its search failed: {answered['error']}")
                continue
            rounds[side].append(answered | {"answers": rate(answered["answers"], truth, data, vectors)})
        shown = [f"{side} {kept[-1]['answers']['no filter']['p50_ms']:.2f}" for side, kept in rounds.items() if kept]
        say(f"  round {number} of {options.rounds}, p50 in ms without a filter: {'; '.join(shown)}")
    results |= {"rounds": rounds, "bandwidth": limits}
    results["search"] = {side: summary(kept) for side, kept in rounds.items() if side not in results["absent"]}
    least = [1e3 * 4 * data.points * data.dim / speed for speed in limits]  # ms to read all vectors once
    results["scan"] = {"limit_ms": least, "times_the_limit": {}}
    for side in EXACT:
        if side in results["search"]:
            taken = [kept["answers"]["no filter"]["p50_ms"] for kept in rounds[side]]
            results["scan"]["times_the_limit"][side] = [mine / limit for mine, limit in zip(taken, least)]
    results["aims"] = aims(results)
    say(tables(results))
    return results


def share_left(answers: list[tuple], points: int) -> float:
    """Share of the points that a filter lets through, mean over the queries."""
    counts = [points if mask is None else int(np.unpackbits(mask, count=points).sum()) for _, _, mask in answers]
    return statistics.mean(counts) / points


def summary(kept: list[dict]) -> dict:
    """{filter: {number: its value in each round}}."""
    return {which: {name: [one["answers"][which][name] for one in kept] for name in kept[0]["answers"][which]}
            for which in FILTERS}  # fmt: skip


def aims(results: dict) -> list[dict]:
    """What was aimed at beside what came out."""
    found, scale = [], f"at {results['settings']['points']} x {results['settings']['dim']}"
    for which, numbers in results["search"].get("ours", {}).items():
        p50, recall = statistics.median(numbers["p50_ms"]), statistics.median(numbers["recall"])
        found.append({
            "aim": f"ours, {which}: p50 <= {AIM_MS:g} ms at recall >= {AIM_RECALL} (set for 100000 points)",
            "result": f"{p50:.2f} ms at {recall:.3f} {scale}", "met": p50 <= AIM_MS and recall >= AIM_RECALL,
        })  # fmt: skip
    if ratios := results["scan"]["times_the_limit"].get("ours exact"):
        times = statistics.median(ratios)
        found.append({
            "aim": f"ours exact: a scan within {AIM_SCAN:g} times the bandwidth limit", "result": f"{times:.2f} times {scale}",
            "met": times <= AIM_SCAN,
        })  # fmt: skip
    return found


def say(line: str) -> None:
    print(line, flush=True)


def span(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tables(results: dict) -> str:
    settings, rounds, mib = results["settings"], results["rounds"], 2**20
    raw = 4 * settings["points"] * settings["dim"]
    lines = ["", f"{'':15}{'build s':>9}{'disk MiB':>10}{'/ vectors':>11}{'peak MiB, building':>20}{'open s':>9}"
             f"{'peak MiB, serving':>19}{'no file':>9}"]  # fmt: skip
    for side in results["search"]:
        made, kept = results["builds"].get(side), rounds[side]
        line = f"{side:15}" + (f"{made['seconds']:9.1f}{made['disk'] / mib:10.0f}{made['disk'] / raw:11.2f}"
                               f"{made['peak'] / mib:20.0f}" if made else f"{'as ' + SIDES[side][0].index:>50}")  # fmt: skip
        own = f"{max(one['own'] for one in kept) / mib:9.0f}" if kept[0]["own"] is not None else f"{'–':>9}"
        opening = statistics.median(one["opening_seconds"] for one in kept)
        lines.append(line + f"{opening:9.2f}{max(one['peak'] for one in kept) / mib:19.0f}{own}")
    for which in FILTERS:
        lines += ["", f"{which} ({results['shares'][which]:.1%} of the points)",
                  f"{'':15}{'p50 ms':>27}{'p95 ms':>27}{'recall':>9}{'image':>8}{'text':>8}{'queries':>9}"]  # fmt: skip
        for side, found in results["search"].items():
            numbers = found[which]
            recalls = [[value for value in numbers[name] if value is not None]
                       for name in ("recall", "recall_image", "recall_text")]  # fmt: skip
            recalls = [f"{statistics.median(values):.3f}" if values else "–" for values in recalls]
            lines.append(f"{side:15}{span(numbers['p50_ms']):>27}{span(numbers['p95_ms']):>27}{recalls[0]:>9}{recalls[1]:>8}"
                         f"{recalls[2]:>8}{min(numbers['answered']):9}")  # fmt: skip
    speed = [value / 1e9 for value in results["bandwidth"]]
    lines += [
        "",
        f"read bandwidth {span(speed, 1)} GB/s: reading all vectors once takes {span(results['scan']['limit_ms'])} ms",
    ]
    lines += [f"  {side}: {span(ratios)} times that" for side, ratios in results["scan"]["times_the_limit"].items()]
    lines += [f"absent: {side}" for side in results["absent"]] + [""]
    lines += [f"{'met    ' if one['met'] else 'NOT MET'} {one['aim']}: {one['result']}" for one in results["aims"]]
    lines += ["one query at a time with path, footprint and time of the hits; p50, p95: median of the rounds (least to most);",
              "queries: answered, in the round with the fewest; no file: memory at the end that is no file's"]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    with user_errors():
        main()
