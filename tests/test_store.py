"""The search index: both engines against plain numpy, filters, refusals, and kills at any moment.

No Qdrant server can be had from a package registry, so the server's engine runs on qdrant-client's local mode, whose
calls and models are those a server takes.
"""

import dataclasses
import errno
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import store
from config import InputError
from store import Filter, Point

# What the local mode says of itself: it has no payload indexes and no graph.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact"),
]
ROOT = Path(__file__).parents[1]
DIM = 16
RECORD = {"model": "demo", "fingerprint": "abc", "image": {"stretch": "auto", "bands": "auto"}, "tile": 256}


def unit(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def made(count, seed=0):
    """Points all over the Earth, some across the antimeridian, some without place or time; four tiles a file."""
    rng, vectors, points = np.random.default_rng(seed), unit(count, DIM, seed=seed), []
    for i in range(count):
        west, south = float(rng.uniform(-180, 180)), float(rng.uniform(-85, 80))
        width, height = rng.uniform(0.1, 20), rng.uniform(0.1, 5)
        east = (west + width + 180) % 360 - 180
        points.append(
            Point(
                f"region {i // 4 % 3}/scene_{i // 4}.tif", vectors[i], window=(i % 4 * 64, 0, 64, 64),
                footprint=None if i % 10 == 9 else (west, south, east, south + height),
                time=[None, f"20{10 + i % 13}-0{1 + i % 9}-15", f"2020-06-{1 + i % 28:02d}T10:30:00" + "+00:00" * (i % 2)][i % 3],
                attributes={"label": f"class {i % 5}", "split": "train" if i % 2 else "test"}, hash=f"h{i // 4}",
                size=1000 + i // 4, mtime_ns=1_700_000_000_000_000_000 + i // 4, last=i % 4 == 3 or i == count - 1,
                extra={"crs": "EPSG:32633"},
            )
        )  # fmt: skip
    return points


@pytest.fixture(params=["edge", "server"])
def opened(request, tmp_path):
    """Makes or opens the test's index: `opened(record=..., dim=...)` or `opened()`."""
    if request.param == "edge":
        yield lambda **new: store.create(tmp_path / "x.index", **new) if new else store.open(tmp_path / "x.index")
        return
    from qdrant_client import QdrantClient

    client = QdrantClient(":memory:")
    client.close, close = lambda: None, client.close

    def server(**new):
        url = "http://qdrant.invalid:6333/library"
        return store.create(url, client=client, **new) if new else store.open(url, client=client)

    yield server
    close()


def overlaps(a, b):
    """Two intervals on a circle meet where one begins inside the other."""
    if a is None or a[1] > b[3] or a[3] < b[1]:
        return False

    def begins_in(x, y):
        return (x[0] - y[0]) % 360 <= (y[2] - y[0]) % 360 or y[2] - y[0] == 360

    return begins_in(a, b) or begins_in(b, a)


# ----------------------------------------------------------------------------------------------------
# Both engines


def test_what_is_known_of_a_file_changes_without_its_vectors(opened):
    points = made(40)
    path = points[3].path
    with opened(record=RECORD, dim=DIM) as index:
        index.upsert(points)
        before = dict(index.scroll())
        index.amend([(path, {"attributes": {"season": "wet"}, "hash": "new", "size": 7, "mtime_ns": 9})])
        changed = {"attributes": {"season": "wet"}, "hash": "new", "size": 7, "mtime_ns": 9}
        after = dict(index.scroll())
        of_file = {point.id for point in points if point.path == path}
        assert after == {id: known | changed if id in of_file else known for id, known in before.items()}
        assert np.array_equal(index.vectors([p.id for p in points]), np.stack([p.vector for p in points]))
        found = index.search(points[0].vector, 40, filter=Filter(attributes={"season": "wet"}))
        assert {hit.id for hit in found} == of_file
        with pytest.raises(InputError, match="two words"):
            index.amend([(path, {"attributes": {"two words": "x"}})])


def test_search_is_numpys(opened):
    points = made(300)
    with opened(record=RECORD, dim=DIM) as index:
        index.upsert(points[:100])
        index.upsert(points[100:])
        matrix, queries = np.stack([p.vector for p in points]), unit(7, DIM, seed=5)
        for exact in (False, True):
            answers = index.search(3 * queries, 5, exact=exact)  # any length will do
            for query, hits in zip(queries, answers):
                best = np.argsort(-(matrix @ query))[:5]
                assert [hit.id for hit in hits] == [points[i].id for i in best]
                assert np.allclose([hit.score for hit in hits], (matrix @ query)[best], atol=1e-6)
                found = hits[0].payload
                point = points[best[0]]
                assert (found["path"], tuple(found["window"]), found["time"]) == (point.path, point.window, point.time)
                # Edge reads its JSON with an error of up to one unit in the last place.
                assert (found["footprint"] or []) == pytest.approx(list(point.footprint or []), abs=1e-12)
                assert found["extra"] == point.extra and found["attributes"] == point.attributes
        assert [h.id for h in index.search(queries[0], 5)] == [h.id for h in answers[0]]
        assert index.search(queries[0], 2, with_payload=["path"])[0].payload.keys() == {"path"}
        assert index.search(queries[0], 1, with_payload=False)[0].payload in (None, {})
        assert index.search(queries[:0]) == [] and index.recall(queries) == 1.0
        ids = [p.id for p in points[:250:7]]
        assert np.array_equal(index.vectors(ids), matrix[:250:7]) and index.vectors([]).shape == (0, DIM)
        assert index.count() == 300 and {i for i, _ in index.scroll()} == {p.id for p in points}


def test_filters(opened):
    points = made(400, seed=1)
    with opened(record=RECORD, dim=DIM) as index:
        index.upsert(points)

        def check(filter, wanted):
            wanted = {p.id for p in points if wanted(p)}
            assert {i for i, _ in index.scroll(filter, payload=["path"])} == wanted
            assert index.count(filter) == len(wanted)
            for exact in (True, False):
                assert {h.id for h in index.search(unit(DIM), 400, filter=filter, exact=exact)} == wanted
            return len(wanted)

        boxes = [(-20, -30, 45, 30), (170, -60, -170, 60), (150, -90, -30, 90), (-180, -90, 180, 90), (179.9, 0, 180, 90),
                 (-180, -90, -179.5, 90), (10, 10, 10, 10), (1, -90, 0.9, 90)]  # fmt: skip
        rng = np.random.default_rng(4)
        for _ in range(60):
            west, south = float(rng.uniform(-180, 180)), float(rng.uniform(-90, 90))
            east, north = west + 10 ** rng.uniform(-2, 2.5), min(90, south + 10 ** rng.uniform(-2, 2))
            box = (west, south, (east + 180) % 360 - 180, north)
            assert {i for i, _ in index.scroll(Filter(bbox=box), payload=False)} == {
                p.id for p in points if overlaps(p.footprint, box)
            }
        sizes = [check(Filter(bbox=box), lambda p, box=box: overlaps(p.footprint, box)) for box in boxes]
        assert sizes[3] == sum(p.footprint is not None for p in points) and min(sizes[:6]) > 0
        assert check(
            Filter(start="2020-06-10", end="2020-06-12"), lambda p: p.time and "2020-06-10" <= p.time < "2020-06-13"
        )
        assert check(Filter(end="2012-12-31"), lambda p: p.time and p.time < "2013")
        assert check(Filter(start="2020-06-05T10:30:00Z"), lambda p: p.time and p.time >= "2020-06-05T10:30")
        assert check(Filter(attributes={"label": "class 3"}), lambda p: p.attributes["label"] == "class 3")
        several = {"label": ["class 1", "class 4"], "split": "train"}
        assert check(
            Filter(attributes=several, bbox=boxes[2], start="2011-01-01"),
            lambda p: p.attributes["label"] in several["label"] and p.attributes["split"] == "train"
            and overlaps(p.footprint, boxes[2]) and (p.time or "") >= "2011",
        )  # fmt: skip
        assert check(Filter(path=points[8].path), lambda p: p.path == points[8].path) == 4
        assert not check(Filter(path="no such.tif"), lambda p: False)
        for bad in (Filter(bbox=(0, 10, 1, 5)), Filter(bbox=(0, 0, 200, 5)), Filter(bbox=(0, 0, float("nan"), 5)),
                    Filter(bbox=(0, 0)), Filter(start="last year")):  # fmt: skip
            with pytest.raises(InputError):
                index.count(bad)


def test_second_run_changes_only_what_changed(opened):
    points = made(12)
    with opened(record=RECORD, dim=DIM) as index:
        index.upsert(points[:6])  # the second file's last tile is missing
        assert index.files() == {points[0].path: (1000, 1_700_000_000_000_000_000, "h0")}
        index.upsert(points[4:])
        assert index.count() == 12 and set(index.files()) == {p.path for p in points}
        again = made(12, seed=3)[:4]
        for point in again:
            point.hash, point.attributes = "changed", {"sensor": "S2"}
        index.upsert(again)
        assert index.count() == 12 and index.files()[points[0].path][2] == "changed"
        assert np.array_equal(index.vectors([p.id for p in again]), np.stack([p.vector for p in again]))
        assert index.count(Filter(attributes={"sensor": "S2"})) == 4
        assert index.count(Filter(attributes={"label": "class 0"})) == 2  # of 5 and 10; 0 lost the attribute
        index.remove(path=[points[0].path, "no such.tif"])
        index.remove([points[4].id, "00000000-0000-0000-0000-000000000000"])
        index.remove([])
        index.remove(path=[])
        assert index.count() == 7 and points[0].path not in index.files()
        index.upsert([])
        spaced = Point("spaced.tif", unit(DIM), time="2024-02-29 23:30")
        index.upsert([spaced])
        for limits in (
            {"end": "2024-02-29", "start": "2024-02-29"},
            {"start": "2024-03-01T01:30+02:00", "end": "2024-02-29T23:30Z"},
            {"start": "2024", "end": "2024-02"},
            {"start": "2024-02", "end": "2024"},
            {"start": "2024", "end": "9999-12-31"},
        ):
            assert [p["time"] for _, p in index.scroll(Filter(**limits))] == ["2024-02-29T23:30:00"]
        assert not index.count(Filter(start="2024-03")) and index.count(Filter(end="2024-01")) == sum(
            payload["time"] is not None for id, payload in index.scroll() if id != spaced.id
        )
        index.remove([spaced.id])
    with opened() as index:
        assert index.count() == 7 and index.record == RECORD and index.dim == DIM
        assert index.count(Filter(attributes={"sensor": "S2"})) == 0
        assert index.build() in (True, False) and index.count() == 7


def test_large_footprint_added_later_is_found(opened):
    """The geographic prefilter widens the box by the largest footprint so far."""
    with opened(record=RECORD, dim=DIM) as index:
        small, large = (
            Point("a", unit(DIM), footprint=(10, 10, 10.1, 10.1)),
            Point("b", unit(DIM), footprint=(-60, -50, 80, 70)),
        )
        index.upsert([small])
        assert index.count(Filter(bbox=(30, 30, 31, 31))) == 0
        index.upsert([large])
        assert index.count(Filter(bbox=(30, 30, 31, 31))) == 1
        assert index.count(Filter(bbox=(79, 60, -100, 80))) == 1
        assert index.count(Filter(bbox=(100, 60, -100, 80))) == 0


def test_refusals(opened):
    with opened(record=RECORD, dim=DIM) as index:
        index.check({"fingerprint": "abc", "image": {"bands": "auto", "stretch": "auto"}, "model": "another folder"})
        with pytest.raises(
            InputError, match=r"demo \(fingerprint abc\), so other \(fingerprint xyz\) cannot.*--model demo"
        ):
            index.check({"fingerprint": "xyz", "model": "other", "image": {}})
        with pytest.raises(InputError, match=r"'none' here\); index the library again"):
            index.check({"fingerprint": "abc", "image": "none"})
        for bad in (unit(DIM + 1), unit(2, DIM - 1)):
            with pytest.raises(InputError, match="holds vectors of 16"):
                index.search(bad)
        with pytest.raises(InputError, match="holds vectors of 16"):
            index.upsert([Point("a", unit(DIM + 1))])
        for bad in (unit(DIM) * 2, unit(DIM) * np.nan):
            with pytest.raises(ValueError, match="unit length"):
                index.upsert([Point("a", bad)])
        with pytest.raises(ValueError, match="zero"):
            index.search(np.zeros(DIM))
        for wrong in (
            {"footprint": (0, 0, 1, 91)},
            {"time": "yesterday"},
            {"attributes": {"a b": "c"}},
            {"attributes": {"n": 3}},
        ):
            with pytest.raises(InputError, match=r"tile\.tif"):
                index.upsert([Point("tile.tif", unit(DIM), **wrong)])
        with pytest.raises(InputError, match="not in the index"):
            index.vectors([Point("a", unit(DIM)).id])
        assert index.count() == 0
    with pytest.raises(InputError, match="already"):
        opened(record=RECORD, dim=DIM)


# ----------------------------------------------------------------------------------------------------
# The server


def test_a_server_that_could_optimize_is_made_to(monkeypatch):
    """Grey is how a collection comes back after a restart: it may be optimized, but nothing begins it, and nobody need wait."""
    from qdrant_client import QdrantClient

    client, asked = QdrantClient(":memory:"), []
    index = store.create("http://qdrant.invalid:6333/library", record={}, dim=4, client=client)
    monkeypatch.setattr(client, "get_collection", lambda name: SimpleNamespace(status="grey"))
    monkeypatch.setattr(client, "update_collection", lambda name, **changes: asked.append(changes))
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    assert index.build() and list(asked[0]) == ["optimizers_config"] and len(asked) == 1


def test_server_addresses(monkeypatch):
    from qdrant_client import QdrantClient

    with pytest.raises(InputError, match="no Qdrant server answers"):
        store.open("http://127.0.0.1:1/library")
    with pytest.raises(InputError, match="names no collection"):
        store.open("http://127.0.0.1:6333/")
    client = QdrantClient(":memory:")
    with pytest.raises(InputError, match="no collection library"):
        store.open("https://host/library", client=client)
    from qdrant_client import models

    client.create_collection("library", vectors_config=models.VectorParams(size=4, distance=models.Distance.COSINE))
    with pytest.raises(InputError, match="not a search index of this project"):
        store.open("https://host/library", client=client)
    made = client.create_collection
    monkeypatch.setattr(client, "create_collection", lambda *words, metadata, **more: made(*words, **more))
    with pytest.raises(InputError, match=r"1\.16 or newer is needed"):  # a server that does not know the field
        store.create("https://host/older", record={}, dim=4, client=client)
    assert not client.collection_exists("older")


def test_server_refuses(monkeypatch):
    """What a user sees of a server that wants a key, over a real connection."""
    asked = []

    class Forbidding(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("api-key")))
            self.send_response(403)
            self.end_headers()
            self.wfile.write(b'{"status": {"error": "Must provide an API key"}}')

        def log_message(self, *_):
            pass

    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    with http.server.HTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a key over plain http
            with pytest.raises(InputError, match=r"answered 403 .*Must provide an API key.*QDRANT_API_KEY"):
                store.open(f"http://127.0.0.1:{server.server_port}/behind/proxy/library")
        server.shutdown()
    assert asked == [("/behind/proxy/collections/library/exists", "secret")]


# ----------------------------------------------------------------------------------------------------
# The folder


def test_folders_that_are_no_index(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        store.open(tmp_path / "none")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(InputError, match="holds no search index"):
        store.open(tmp_path)
    with pytest.raises(InputError, match="no empty folder"):
        store.create(tmp_path, record={}, dim=4)
    with pytest.raises(InputError, match="cannot be made"):
        store.create(tmp_path / "photo.jpg" / "x", record={}, dim=4)
    place = tmp_path / "x"
    store.create(place, record={}, dim=4).close()
    header = json.loads((place / "index.json").read_text())
    for number, advice in ((store.FORMAT + 1, "update the project"), (store.FORMAT - 1, "index the library again")):
        (place / "index.json").write_text(json.dumps(header | {"format": number}))
        with pytest.raises(InputError, match=f"format {number}.*{advice}"):
            store.open(place)
    (place / "index.json").write_text('{"format"')
    with pytest.raises(InputError, match="cannot be read"):
        store.open(place)
    (place / "index.json").unlink()  # as a kill during `create` leaves it
    with pytest.raises(InputError, match="holds no search index"):
        store.open(place)
    store.create(place, record={"n": 1}, dim=8).close()
    with store.open(place) as index:
        assert index.dim == 8 and index.record == {"n": 1}
    with pytest.raises(ValueError, match="closed"):
        index.count()


def child(code: str, *arguments) -> subprocess.Popen:
    """A process of its own that runs `code` with numpy and store imported, and prints as it goes."""
    start = "import sys, time, numpy as np, store\nfrom store import Point\n"
    return subprocess.Popen(
        [sys.executable, "-u", "-c", start + code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_one_process_at_a_time(tmp_path):
    store.create(tmp_path / "x", record={}, dim=4).close()
    other = child("index = store.open(sys.argv[1]); print('open'); time.sleep(60)", tmp_path / "x")
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match=rf"in use by another process \(pid {other.pid}\)"):
            store.open(tmp_path / "x")
    finally:
        other.kill()
        other.wait()
    with store.open(tmp_path / "x") as index:  # the lock died with it
        assert index.count() == 0
        with pytest.raises(InputError, match=f"pid {os.getpid()}"):
            store.open(tmp_path / "x")


def test_a_refused_opener_leaves_the_writer_alone(tmp_path):
    """Edge's own lock comes after it has rewritten files of the segments; the writer's next flush then fails."""
    code = """
rows = np.eye(64, dtype=np.float32)
with store.create(sys.argv[1], record={}, dim=64) as index:
    for b in range(8):
        index.upsert([Point(f"{b}.tif", row, window=(n, 0, 1, 1), attributes={"label": "a"}) for n, row in enumerate(rows)])
        print(b, flush=True)
        time.sleep(0.2)
    print(index.count())
"""
    writer = child(code, tmp_path / "x")
    for _ in range(2):
        writer.stdout.readline()
    for _ in range(3):
        with pytest.raises(InputError, match="in use by another process"):
            store.open(tmp_path / "x")
    assert writer.communicate(timeout=60)[0].split()[-1] == "512" and writer.returncode == 0


def test_a_folder_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    store.create(tmp_path / "x", record={}, dim=4).close()
    opened = Path.open

    def read_only(path, mode="r", *rest, **options):
        if mode != "r":
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(InputError, match=r"Read-only file system.*copy it to a folder that you may write"):
        store.open(tmp_path / "x")


def test_a_disk_that_is_nearly_full_is_an_error_and_no_signal(tmp_path, monkeypatch):
    with store.create(tmp_path / "x", record={}, dim=DIM) as index:
        index.upsert([Point("a", unit(DIM))])
        full = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(InputError, match="disk full: 5 MB are left"):
            index.upsert([Point("b", unit(DIM))])
        assert index.count() == 1


def test_unknown_attribute_is_named(tmp_path):
    with store.create(tmp_path / "x", record={}, dim=DIM) as index:
        index.upsert([Point("a", unit(DIM), attributes={"label": "river"})])
        with pytest.raises(InputError, match="no point has the attribute 'lable'; there are: label"):
            index.search(unit(DIM), filter=Filter(attributes={"lable": "river"}))


def test_threads_search_at_once(tmp_path):
    points = made(200)
    with store.create(tmp_path / "x", record={}, dim=DIM) as index, ThreadPoolExecutor(8) as pool:
        index.upsert(points)
        best = pool.map(lambda p: index.search(p.vector, 1, filter=Filter(path=p.path))[0].id, points * 2)
        assert list(best) == [p.id for p in points * 2]


WRITER = """
store.GRAPH_FROM_KB = store.SCAN_BELOW_KB = 1
def batch(b, version):  # one file of 60 tiles; the vector says which version it is
    rows = np.random.default_rng([b, version]).standard_normal((60, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return [Point(f"{b}", row, window=(i, 0, 1, 1), hash=str(version), last=i == 59) for i, row in enumerate(rows)]
"""
WRITE = (
    WRITER
    + """
place, what, held = sys.argv[1], sys.argv[2], int(sys.argv[3])
if what == "create":
    print("go"); index = store.create(place, record={}, dim=32); print(0); time.sleep(60)
index = store.open(place)
work = [(what, batch(b, 1) if what == "upsert" else str(b)) for b in range(held if what == "remove" else 2 * held)]
print("go")
if what == "build":
    index.build(); print(0)
for n, (what, item) in enumerate(work if what != "build" else ()):
    index.upsert(item) if what == "upsert" else index.remove(path=item)
    print(n)
time.sleep(60)
"""
)


def test_a_walk_over_8_bit_vectors_gives_exact_scores(tmp_path, monkeypatch):
    """Beside one another in a wide span of values, where 8 bits alone would change places."""
    monkeypatch.setattr(store, "GRAPH_FROM_KB", 1)
    monkeypatch.setattr(store, "SCAN_BELOW_KB", 1)
    monkeypatch.setattr(store, "SCAN_FEW", 0)
    rng = np.random.default_rng(0)
    centre = unit(64)
    near = centre + 0.15 * rng.standard_normal((2000, 64), np.float32)
    vectors = near / np.linalg.norm(near, axis=1, keepdims=True)
    with store.create(tmp_path / "x.index", record={}, dim=64) as index:
        index.upsert(Point(f"{i}", v, footprint=(i / 50, 0, i / 50 + 0.01, 0.01)) for i, v in enumerate(vectors))
        assert index.build()
        assert any("quantiz" in path.name for path in (tmp_path / "x.index").rglob("*"))
        queries = vectors[::100] + 0.05 * rng.standard_normal((20, 64), np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        truth = queries @ vectors.T
        for filter, among in ((None, 2000), (Filter(bbox=(0, -1, 19.985, 1)), 1000)):
            found = index.search(queries, 10, filter=filter, ef=400)
            share = []
            for scores, hits in zip(truth[:, :among], found):
                assert np.allclose(
                    [hit.score for hit in hits], scores[[int(h.payload["path"]) for h in hits]], atol=1e-6
                )
                share.append(len({int(h.payload["path"]) for h in hits} & set(np.argsort(-scores)[:10].tolist())) / 10)
            assert np.mean(share) > 0.95, share


@pytest.mark.parametrize("wanted", ["near", "far"])
def test_a_filter_that_leaves_many_is_asked_of_the_best_of_all(opened, monkeypatch, wanted):
    """And of all, where the filter leaves what is far from the query: the answer is the exact one in any case."""
    monkeypatch.setattr(store, "SCAN_FEW", 0)
    queries = unit(3, DIM, seed=5)
    points = made(400)
    order = np.argsort(-(queries[0] @ np.stack([p.vector for p in points]).T))
    for rank, n in enumerate(order.tolist()):
        chosen = rank % 3 == 0 if wanted == "near" else rank >= 260
        points[n] = dataclasses.replace(points[n], attributes={"kind": "this" if chosen else "other"})
    with opened(record=RECORD, dim=DIM) as index:
        index.upsert(points)
        asked, ask = [], index._ask
        monkeypatch.setattr(index, "_ask", lambda *args: asked.append((len(args[0]), args[1])) or ask(*args))
        filter = Filter(attributes={"kind": "this"})
        quick = index.search(queries, 5, filter=filter, with_payload=["path"])
        if wanted == "near":  # 2.5 x 3 x 5 of all, then 5 of these
            assert len(asked) == 2 and asked[0][0] == 3 and 35 <= asked[0][1] <= 40
        else:  # twice in vain for the first query, then with the filter on the way
            assert [count for count, _ in asked][-1] >= 1 and len(asked) == 5
        exact = index.search(queries, 5, filter=filter, exact=True)
        assert [[h.id for h in hits] for hits in quick] == [[h.id for h in hits] for hits in exact]
        assert all(h.payload.keys() == {"path"} for hits in quick for h in hits)


def test_more_is_looked_at_in_a_large_index(opened, monkeypatch):
    monkeypatch.setattr(store, "GROWS_FROM", 10)
    with opened(record=RECORD, dim=DIM) as index:
        asked, ask = [], index._ask
        monkeypatch.setattr(index, "_ask", lambda *args: asked.append(args[3]) or ask(*args))
        points = made(40)
        for some, ef in ((points[:10], store.EF), (points[10:], 2 * store.EF)):
            index.upsert(some)
            index.search(unit(DIM), 1)
            assert asked[-1] == ef
        index.search(unit(DIM), 1, ef=7)
        index.search(unit(DIM), 1, filter=Filter(bbox=(-180, -90, 180, 90)))
        index.remove([point.id for point in points[10:]])
        index.search(unit(DIM), 1)
        assert asked[-3:] == [7, 2 * store.EF_FILTERED, store.EF]


@pytest.mark.parametrize("what", ["upsert", "remove", "build"])
def test_killed_at_any_moment(tmp_path, what):
    """A writer over an index of some files replaces them and adds more, removes them, or builds the graph; SIGKILL.
    What had been confirmed is there, a file in flight is there whole in one version or as it was, and work goes on."""
    names = {"np": np, "store": store, "Point": Point}
    before = store.GRAPH_FROM_KB, store.SCAN_BELOW_KB
    exec(WRITER, names)  # sets the thresholds low here too, so that 480 points make a graph
    try:
        held = 8
        with store.create(tmp_path / "0", record={}, dim=32) as index:
            index.upsert([point for b in range(held) for point in names["batch"](b, 0)])
            if what != "build":
                index.build()
        for moment in (0.001, 0.02, 0.1):
            place = shutil.copytree(tmp_path / "0", tmp_path / f"{moment}")
            writer = child(WRITE, place, what, held)
            assert writer.stdout.readline() == "go\n"
            time.sleep(moment)
            writer.send_signal(signal.SIGKILL)
            confirmed = len(writer.communicate()[0].split())
            with store.open(place) as index:
                assert not (place / "shard" / "temp_segments").exists()
                seen = {}
                for id, payload in index.scroll():
                    seen.setdefault(payload["path"], {})[payload["window"][0]] = (payload["hash"], id)
                assert sum(map(len, seen.values())) == index.count()
                for b in range(2 * held):
                    tiles = seen.get(str(b), {})
                    versions = {version for version, _ in tiles.values()}
                    if what == "upsert":
                        wanted = (
                            [{"1"}] if b < confirmed else [set() if b >= held else {"0"}] + [{"1"}] * (b == confirmed)
                        )
                    elif what == "remove":
                        wanted = [set()] if b < confirmed or b >= held else [{"0"}] + [set()] * (b == confirmed)
                    else:
                        wanted = [{"0"}] if b < held else [set()]
                    assert versions in wanted and len(tiles) == 60 * bool(versions)
                    if tiles:  # vector and payload of the same version
                        points = names["batch"](b, int(*versions))
                        kept = index.vectors([tiles[i][1] for i in range(60)])
                        assert np.array_equal(kept, np.stack([p.vector for p in points]))
                        assert index.count(Filter(path=str(b))) == 60
                        assert index.search(points[7].vector, 1)[0].id == points[7].id
                assert set(index.files()) == set(seen)
                total = index.count()
                index.upsert(names["batch"](99, 0))
                index.build()
                assert index.count() == total + 60
                assert index.recall(unit(20, 32), 10) > 0.9
    finally:
        store.GRAPH_FROM_KB, store.SCAN_BELOW_KB = before


def test_killed_in_create(tmp_path):
    for moment in (0.0, 0.02, 0.1):
        place = tmp_path / f"{moment}"
        writer = child(WRITE, place, "create", 0)
        assert writer.stdout.readline() == "go\n"
        time.sleep(moment)
        writer.send_signal(signal.SIGKILL)
        confirmed = writer.communicate()[0]
        if not (place / "index.json").exists():
            assert not confirmed
            with pytest.raises(InputError, match=r"holds no search index|does not exist"):
                store.open(place)
            store.create(place, record={}, dim=32).close()
        with store.open(place) as index:
            index.upsert([Point("a", unit(32))])
            assert index.count() == 1


def test_a_footprint_across_the_antimeridian_is_found_at_its_end(opened):
    with opened(record=RECORD, dim=DIM) as index:
        index.upsert([Point("a", unit(DIM), footprint=(175, -18, -165, -17))])
        assert index.count(Filter(bbox=(-166, -18, -165.5, -17))) == 1


def test_recall_in_an_index_of_few(opened):
    with opened(record=RECORD, dim=DIM) as index:
        index.upsert(made(3))
        assert index.recall(unit(2, DIM), 10) == 1.0


def test_a_month_ends_with_its_last_day():
    assert [store.last_moment(text, "").day for text in ("2024-01", "2024-02", "2023")] == [31, 29, 31]
