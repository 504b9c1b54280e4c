"""web_demo.py: what its pieces make, and what the page itself does for a browser, for a crowd, and for someone hostile."""

import ast
import gc
import json
import os
import shutil
import socket
import string
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import web_demo
from config import InputError
from imagery import ImageSettings
from library import PAIR_NOTES, Library, index_library
from tests.conftest import free_port
from web_demo import TEXT, Page, bars_html, build_parser, map_svg

ROOT = Path(__file__).parents[1]
CHROMIUM = "/usr/bin/chromium"
HOSTILE = "<img src=x onerror=alert(1)>"  # a name that a file may have
PLACES = 12  # of both dates; one changed, which is far from usual among so many


def write_scene(path: Path, place: int, colour, seed: int, when: str) -> Path:
    """A georeferenced picture of 64 x 64 pixels with some blocks in it; places stand 0.02 degrees apart, eastward."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    data = np.array(colour)[:, None, None] + rng.integers(-25, 25, (3, 8, 8)).repeat(8, 1).repeat(8, 2)
    data = (data + rng.integers(-6, 6, (3, 64, 64))).clip(0, 255).astype(np.uint8)
    transform = from_origin(5 + 0.02 * place, 52, 0.0002, 0.0002)
    about = {"height": 64, "width": 64, "count": 3, "dtype": "uint8", "crs": "EPSG:4326", "transform": transform}
    with rasterio.open(path, "w", driver="GTiff", **about) as out:
        out.write(data)
        out.update_tags(TIFFTAG_DATETIME=when)
    return path


@dataclass
class Shown:
    """What the page is to show."""

    root: Path
    images: Path
    store: Path
    after: Path


@pytest.fixture(scope="session")
def shown(matcher, tmp_path_factory) -> Shown:
    """A tiny matcher and its indexes of two dates: twelve places in two folders, the second of which changed by the second
    date; and at the first date a picture without a place, whose name is hostile."""
    from model import DualEncoder

    root = tmp_path_factory.mktemp("shown")
    model = DualEncoder.from_pretrained(matcher)
    for place in range(PLACES):
        folder, colour, day = [("farm", (90, 160, 60), "2020:06:30"), ("harbour", (40, 80, 170), "2020:09:15")][
            place % 2
        ]
        write_scene(root / f"before/{folder}/{place}.tif", place, colour, place, f"{day} 10:00:00")
        later = (230, 40, 30) if place == 1 else colour
        write_scene(root / f"after/{folder}/{place}.tif", place, later, place, "2023:06:30 10:00:00")
    Image.new("RGB", (64, 64), (210, 190, 120)).save(root / "before" / f"{HOSTILE}.png")
    for name in ("before", "after"):
        index_library(model, root / name, str(root / f"{name}.index"), tile=64, stride=64, workers=0)
    return Shown(root, root / "before", root / "before.index", root / "after.index")


@pytest.fixture(scope="session")
def opened(shown):
    before = Library.open(str(shown.store))
    after = Library.open(str(shown.after), encoder=before.model)
    yield before, after
    before.index.close()
    after.index.close()


# ----------------------------------------------------------------------------------------------------
# The page as a server


@dataclass
class Served:
    """The real page in its own process."""

    url: str
    process: subprocess.Popen
    log: Path
    temp: Path


@pytest.fixture(scope="session")
def served(shown, tmp_path_factory):
    temp, port = tmp_path_factory.mktemp("served"), free_port()
    log = temp / "log"
    for index in (shown.store, shown.after):  # a copy: an index is open in one process at a time
        shutil.copytree(index, temp / index.name)
    words = ["--store", temp / shown.store.name, "--after", temp / shown.after.name, "--device", "cpu", "--port", port]
    words += ["--language", "en", "--max_upload_mb", 8]
    command = [sys.executable, "web_demo.py", *map(str, words)]
    with log.open("wb") as file:
        environment = os.environ | {"TMPDIR": str(temp)}
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.monotonic() + 120
        while b"Ctrl-C stops it" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield Served(f"http://127.0.0.1:{port}", process, log, temp)
    finally:
        process.terminate()
        process.wait(20)


class Client(httpx.Client):
    """What any client of the page can do."""

    def __init__(self, served: Served):
        super().__init__(base_url=served.url, timeout=60, trust_env=False)

    def upload(self, name: bytes, content: bytes) -> httpx.Response:
        """The form is written by hand: an honest client would clean the name."""
        head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n' % name
        body = head + b"Content-Type: image/png\r\n\r\n" + content + b"\r\n--edge--\r\n"
        return self.post(
            "/gradio_api/upload", content=body, headers={"Content-Type": "multipart/form-data; boundary=edge"}
        )

    def give(self, name: bytes, content: bytes) -> dict:
        """A file field's value: an upload."""
        (path,) = self.upload(name, content).raise_for_status().json()
        return named(path)

    def call(self, name: str, *values):
        """What a button makes of the fields' values -> (event, its data)."""
        started = self.post(f"/gradio_api/call/{name}", json={"data": values}).raise_for_status().json()
        stream = self.get(f"/gradio_api/call/{name}/{started['event_id']}").text
        # A heartbeat stands before the answer for each 15 seconds that it took.
        event, data = stream.strip().split("\n\n")[-1].split("\n", 1)
        return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def search(self, words="water", without="", picture=None, bbox="", start="", end="", where="", k=12):
        return self.call("search", words, without, picture, 0.5, k, bbox, start, end, where, "en")


def named(path: str, **more) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


@pytest.fixture
def client(served):
    """Whatever a test does to the server, it lives."""
    with Client(served) as made:
        yield made
        assert served.process.poll() is None and made.get("/config").status_code == 200


def kindly(answer) -> str:
    """The text of a refusal: there is one, and it says nothing of the server's inside."""
    event, data = answer
    assert event == "error"
    text = data["error"]
    assert text and not any(word in text for word in ("Traceback", "Error(", "/tmp", "/gradio", str(ROOT.parent)))
    return text


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


# ----------------------------------------------------------------------------------------------------
# Pieces


def placed(*box, path="a.tif") -> dict:
    return {"path": path, "footprint": box or None}


def test_every_text_has_both_languages_and_is_used():
    for key, texts in TEXT.items():
        assert len(texts) == 2 and all(text.strip() for text in texts), key
        fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in texts]
        assert fields[0] == fields[1], key
    tree = ast.parse((ROOT / "web_demo.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    said = [call.args[0] for call in calls if call.func.attr == "say"]
    assert {key.value for key in said if isinstance(key, ast.Constant)} <= set(TEXT)
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "TEXT")
    table.keys.clear()
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {key for key in TEXT if key.removeprefix("go_") not in constants} == set()


def test_bars_are_in_order_within_bounds_and_escaped():
    made = bars_html([("low", -3.0), (HOSTILE, 0.25), ("high", 9.0)])
    assert made.index("high") < made.index("onerror") < made.index("low")
    assert "<img" not in made and "&lt;img" in made
    assert [part.split("%")[0] for part in made.split("width:")[1:]] == ["100.0", "25.0", "0.0"]
    assert "width:50.0%" in bars_html([("a", 0.0)], -1, 1)


def test_map_numbers_what_has_a_place():
    assert map_svg([]) == "" and map_svg([placed()]) == ""
    made = map_svg([placed(), placed(5, 51, 6, 52, path=HOSTILE), placed(7, 51, 8, 52)])
    shapes = ElementTree.fromstring(made).findall("g")
    assert [shape.findtext("text") for shape in shapes] == ["3", "2"]  # the best on top
    assert shapes[1].findtext("title") == f"2. {HOSTILE}" and "href" not in made


@pytest.mark.parametrize("side", [0.00003, 0.0007, 0.02, 1, 40, 300])
def test_map_has_a_grid_at_every_scale(side):
    """From a tile of an aerial photograph to the globe: some lines with names, not a thicket."""
    began = time.monotonic()
    lon, lat = 5.1234567, 10.1234567  # where no grid passes by itself
    made = ElementTree.fromstring(map_svg([placed(lon - side / 2, lat - side / 9, lon + side / 2, lat + side / 9)]))
    names = [text.text for text in made.findall("text")]
    assert 2 <= len(names) <= 20 and time.monotonic() - began < 0.5
    lines = "".join(path.get("d") for path in made.findall("path"))
    assert "V" in lines and "H" in lines


@pytest.mark.parametrize("lon", [8.77, 117.0])
def test_map_of_places_side_by_side_is_no_map_of_the_earth(lon):
    rng = np.random.default_rng(0)
    for west in lon + rng.uniform(0, 1, (50, 12)):
        made = map_svg([placed(x, 53.0, x + 0.002, 53.002) for x in west])
        assert ">-90°<" not in made and ">0°<" not in made


def test_map_tells_places_at_a_pole_apart():
    made = ElementTree.fromstring(map_svg([placed(10, -89.7, 11, -89.6), placed(10, -86.3, 11, -86.2)]))
    near, far = (float(box.get("cy")) for box in made.iterfind("g/circle"))
    assert near < far - 100 or far < near - 100
    assert {"-88°", "-86°"} & {text.text for text in made.findall("text")}
    tiled = map_svg([placed(10, -89.7, 11, -89.6)], "https://x.org/{z}/{x}/{y}.png")  # tiles end at 85 degrees
    assert "-85" in tiled and "-89" not in tiled


def test_map_keeps_the_antimeridian_together():
    made = map_svg([placed(179.7, -17, 179.8, -16.9), placed(-179.8, -17, -179.7, -16.9)])  # side by side
    drawn = sorted(
        (float(box.get("x")), float(box.get("width"))) for box in ElementTree.fromstring(made).iterfind("g/rect")
    )
    assert drawn[1][0] - drawn[0][0] == pytest.approx(5 * drawn[0][1], rel=0.01) and drawn[0][1] > 90
    made = map_svg([placed(179.9, -17, -179.9, -16.9)])
    box = ElementTree.fromstring(made).find("g/rect")
    assert 0 < float(box.get("x")) < 60 and 560 < float(box.get("width")) < 640
    assert "180.00°" in made and "-179.95°" in made and "180.05" not in made


def test_map_tiles_cover_the_view_and_are_escaped():
    made = map_svg([placed(179.9, -17, -179.9, -16.9)], "https://x.org/{z}/{x}/{y}.png?a=1&b=\"'<")
    tiles = ElementTree.fromstring(made).findall("image")
    numbers = [tuple(map(int, tile.get("href")[len("https://x.org/") :].split(".png")[0].split("/"))) for tile in tiles]
    assert {zoom for zoom, _, _ in numbers} == {11}
    assert {0, 2047} <= {x for _, x, _ in numbers} and all(0 <= x < 2048 and 0 <= y < 2048 for _, x, y in numbers)
    assert tiles[0].get("href").endswith("?a=1&b=\"'<")
    left = min(float(tile.get("x")) for tile in tiles)
    assert left <= 0 and max(float(tile.get("x")) + 256 for tile in tiles) >= 640


# ----------------------------------------------------------------------------------------------------
# What the buttons do


def make_page(*flags, **models) -> Page:
    return Page(build_parser().parse_args([*flags]), **models)


@pytest.fixture
def page(opened) -> Page:
    return make_page(library=opened[0], after=opened[1])


def test_filter_reads_what_people_type(page):
    made = page.filter(" 5，51 7.5,52 ", "2020-01-01", " ", "folder=farm, folder=harbour，kind = a=b", "en")
    assert made.bbox == (5, 51, 7.5, 52) and (made.start, made.end) == ("2020-01-01", None)
    assert made.attributes == {"folder": ["farm", "harbour"], "kind": ["a=b"]}
    assert page.filter(None, "", "  ", " , ", "en") is None
    for fields, key in ((("1,2,3", "", "", ""), "box_form"), (("a,b,c,d", "", "", ""), "box_form"),
                        (("", "", "", "farm"), "where_form")):  # fmt: skip
        for language in (0, 1):
            with pytest.raises(InputError) as error:
                page.filter(*fields, ("en", "zh")[language])
            assert str(error.value) == TEXT[key][language]


def test_texts_are_lines_within_limits(page):
    assert page.texts(" a \n\n b\r\n", "en") == ["a", "b"]
    for text, key in (("", "need_text"), (None, "need_text"), ("x" * 2001, "too_long"), ("x\n" * 51, "too_long")):
        with pytest.raises(InputError) as error:
            page.texts(text, "en")
        assert str(error.value) == TEXT[key][0].format(n=2000)


def test_the_weight_of_a_picture_reaches_the_query(page, shown, monkeypatch):
    query, seen = page.library.query, {}
    monkeypatch.setattr(page.library, "query", lambda words, **more: seen.update(more) or query(words, **more))
    page.search("a farm", "", str(shown.images / "farm/0.tif"), 0.9, 1, "", "", "", "", "en")
    assert seen["like_weight"] == 0.9 and len(seen["like"]) == 1


def test_search_fills_gallery_map_and_geojson(page, shown):
    status, pictures, drawn, path = page.search("water", "", None, 0.5, 20, "", "", "", "", "en")
    assert status == "13 of 13 images, best first" and len(pictures) == 13
    assert all(picture.dtype == np.uint8 and picture.shape == (64, 64, 3) for picture, _ in pictures)
    assert drawn.count('class="shape"') == PLACES and "<img" not in drawn
    found = json.loads(Path(path).read_text())["features"]
    assert [row["properties"]["rank"] for row in found] == list(range(1, 14))
    assert sorted(row["geometry"] is None for row in found) == [False] * 12 + [True]
    alike = page.search("", "", str(shown.images / "harbour/3.tif"), 0.5, 3, "", "", "", "", "en")
    assert alike[1][0][1].startswith("1. 1.000 3.tif · 2020-09-15")
    one = page.search("water", "", None, 0.5, 20, "", "2020-07-01", "2020-12-31", "folder=harbour", "en")
    assert len(one[1]) == 6
    assert page.search("a", "", None, 0.5, 9, "100,0,101,1", "", "", "", "zh") == (TEXT["nothing"][1], [], "", None)
    nowhere = page.search("", "", str(shown.images / f"{HOSTILE}.png"), 0.5, 1, "", "", "", "", "en")
    assert HOSTILE in nowhere[1][0][1] and nowhere[2] == f"<p>{TEXT['no_place'][0]}</p>"


def test_pictures_that_are_gone_leave_the_rest(page, monkeypatch, tmp_path):
    """A library on a share may move while the page is up."""
    for opened in (page.library, page.after):
        monkeypatch.setattr(opened, "root", tmp_path)
    _, pictures, _, _ = page.search("water", "", None, 0.5, 4, "", "", "", "", "en")
    assert all((picture == 200).all() for picture, _ in pictures)
    made = page.monitor("fire", "en")
    assert "no such file" in made and str(tmp_path) not in made and "harbour/1.tif" in made


def test_messages_have_no_paths_of_the_server(page, shown, monkeypatch):
    text = f"{shown.store}: a; {shown.images}/x.tif; {shown.images.resolve()}; {shown.after}"
    assert str(shown.root) not in page.without_paths(text)
    with pytest.raises(InputError) as error:
        page.read(str(ROOT / "README.md"))
    assert str(error.value).startswith("README.md: is not an image")
    for root in (Path("."), Path("/")):  # and are not spoiled, wherever the library is
        monkeypatch.setattr(page.library, "root", root)
        assert page.without_paths("a/b.tif: is cut short. See c.") == "a/b.tif: is cut short. See c."


def test_match_and_classify(page, shown):
    picture = str(shown.images / "farm/0.tif")
    made = page.match(picture, f"farmland\n{HOSTILE}", "en")
    assert made.count("<span>") == 2 and "<img" not in made
    assert page.classify(picture, "ucm", "", "en").count("<span>") == 12
    own = page.classify(picture, "ucm", "farm，sea\nroofs", "zh")
    assert own.count("<span>") == 3 and TEXT["probability"][1] in own
    for act in (lambda: page.match(None, "a", "en"), lambda: page.classify("", "ucm", "", "en")):
        with pytest.raises(InputError, match="Give a picture first"):
            act()


@pytest.mark.parametrize("own", ["own.json", "a/b", "../own.JSON ", "own.json\rb", "x\u2028own.json", "own.json\x85b"])
def test_own_classes_are_words_never_a_file(page, shown, own, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("own.json").write_text('["secret", "words"]')
    try:
        made = page.classify(str(shown.images / "farm/0.tif"), "ucm", own, "en")
    except InputError as error:
        made = str(error)
    assert "secret" not in made


def test_monitor_finds_the_place_that_changed(page):
    made = page.monitor("fire\nwater", "en")
    assert made.count("<h3>") == 2 and f"{PLACES} places of both dates" in made
    assert "harbour/1.tif · " in made and "2020-09-15 → 2023-06-30" in made
    assert "1 of 13 images have no georeference" in made
    assert "farm/0.tif" not in made
    made = page.monitor("fire\nwater", "zh")
    assert (
        "后期：13 幅图像中有 1 幅没有地理参考，未参与比较" in made
        or "前期：13 幅图像中有 1 幅没有地理参考，未参与比较" in made
    )
    assert "georeference" not in made


def test_notes_on_pairs_in_both_languages():
    fields = lambda text: {name for _, name, _, _ in string.Formatter().parse(text) if name}  # noqa: E731
    assert {key: fields(text) for key, text in web_demo.PAIR_NOTES_ZH.items()} == {
        key: fields(text) for key, text in PAIR_NOTES.items()
    }


def test_describe_and_ask_escape_what_a_model_says(shown):
    """Generating models stand in: what they say is the business of their own tests."""

    class Says:
        def default_prompt(self):
            return "Describe"

        settings = SimpleNamespace(images=ImageSettings().to_dict())
        processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)

        def caption(self, pictures, prompt, store):
            assert store[pictures[0]].shape == (28, 28, 3)
            return [f"{prompt}: {HOSTILE}"]

        def answer(self, rows, store):
            assert store[rows[0][0]].shape == (28, 28, 3)
            return [[HOSTILE for _ in lines] for _, lines in rows]

    page, picture = make_page(captioner=Says(), vqa=Says()), str(shown.images / "farm/0.tif")
    assert page.describe(picture, " what? ", "en") == "<p>what?: &lt;img src=x onerror=alert(1)&gt;</p>"
    assert page.describe(picture, " ", "en").startswith("<p>None:")
    made = page.ask(picture, f"a?\n{HOSTILE}", "en")
    assert made.count("<b>") == 2 and "<img" not in made
    page.settings = ImageSettings(bands="4,3,2")  # of a library of many bands: an RGB picture is as the models take it
    assert page.describe(picture, " ", "en").startswith("<p>None:") and page.ask(picture, "a?", "en") in made
    page.args.max_pixels = 4
    with pytest.raises(InputError, match=r"0\.tif"):  # the models' own reading is bounded, too
        page.describe(picture, " ", "zh")
    labels = {block["props"].get("label") for block in web_demo.build(page).get_config_file()["components"]}
    assert {"Describe", "Ask", "Prompt"} <= labels and not {"Search", "Monitor"} & labels


def test_downloads_go_after_an_hour_or_with_the_page():
    page = make_page()
    old = Path(page.keep("a.txt", "一"))
    os.utime(old.parent, (1, 1))
    new = Path(page.keep("a.txt", "二"))
    assert not old.exists() and new.read_text(encoding="utf-8") == "二"
    shutil.rmtree(page.folder)  # as what cleans /tmp does
    new = Path(page.keep("a.txt", "三"))
    del page
    gc.collect()
    assert not new.parents[1].exists()


# ----------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "nothing to show: give --store, --captioner, --vqa or --from_pretrained"),
        (["--preset", "demo"], "run `make demo` first"),
        (["--captioner", "x", "--after", "y"], "--after needs --store"),
        (["--store", "x", "--tile_url", "https://x.org/{z}/{x}"], "expected {z}, {x} and {y}"),
        (["--store", "nowhere"], "nowhere"),
        (["--captioner", ".", "--library", "gone"], "--library gone: no such folder"),
    ],
)
def test_refusals_are_one_line(call_main, monkeypatch, tmp_path, words, reason):
    monkeypatch.chdir(tmp_path)
    code, _, err = call_main(web_demo.main, *words)
    assert code == 2 and reason in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_port_in_use_is_a_refusal(call_main, shown, tmp_path):
    store = tmp_path / "copy.index"
    shutil.copytree(shown.store, store)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = call_main(web_demo.main, "--store", store, "--device", "cpu", "--port", port)
    assert code == 2 and f"--port {port}: is in use by another program" in err and "Traceback" not in err


# ----------------------------------------------------------------------------------------------------
# The server, by its own interface


def test_only_the_buttons_are_public(client):
    names = client.get("/gradio_api/info").json()["named_endpoints"]
    assert set(names) == {"/search", "/match", "/classify", "/monitor"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"words": ""}, "Enter words, or give a picture."),
        ({"words": " \n "}, "Enter words"),
        ({"words": "x" * 10**6}, "2000 characters"),
        ({"without": "x" * 10**6}, "2000 characters"),
        ({"where": "nope=1"}, "no point has the attribute 'nope'"),
        ({"where": "<b>=1"}, "'&lt;b&gt;'"),
        ({"where": "farm"}, "NAME=VALUE"),
        ({"start": "yesterday"}, "'yesterday' is no ISO 8601 date"),
        ({"end": "2020-02-31"}, "'2020-02-31' is no ISO 8601 date"),
        ({"start": "2030-01-01", "end": "2020-01-01"}, "From is after To."),
        ({"bbox": "5, 51"}, "four numbers"),
        ({"bbox": "5 60 7 50"}, "south not above north"),
        ({"bbox": "nan,0,0,0"}, "Box: expected four numbers"),
        ({"k": 10**9}, "greater than maximum value 50"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_wrong_fields_are_refused_kindly(client, fields, reason):
    assert reason in kindly(client.search(**fields))


def sparse_tif(path: Path) -> bytes:
    """60,000 x 60,000 pixels in a small file."""
    form = {"count": 3, "dtype": "uint8", "tiled": True, "blockxsize": 16384, "blockysize": 16384, "SPARSE_OK": True}
    with rasterio.open(path, "w", driver="GTiff", height=60000, width=60000, compress="deflate", **form):
        pass
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bomb.png", lambda _: png(60000, 60000, b"\0" * 1000), "too many pixels"),
        ("grows.png", lambda _: png(6000, 6000, b"\0" * 6001 * 6000), "pixels"),
        ("bomb.tif", lambda tmp_path: sparse_tif(tmp_path / "bomb.tif"), "pixels"),
        ("drawing.png", lambda _: b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", "is an SVG drawing"),
        ("program.jpg", lambda _: Path(sys.executable).resolve().read_bytes()[:4096], "is a program, not an image"),
        ("empty.png", lambda _: b"", "is empty (0 bytes)"),
        ("cut.jpg", lambda _: b"\xff\xd8\xff\xe0" + b"0" * 50, "cut short or damaged"),
        ("list.vrt", lambda _: b"<VRTDataset><x>/etc/passwd</x></VRTDataset>", "gdal_translate"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_hostile_pictures_are_refused_kindly(client, tmp_path, name, content, reason):
    picture = client.give(name.encode(), content(tmp_path))
    began = time.monotonic()
    for answer in (client.call("match", picture, "water", "en"), client.search(picture=picture)):
        text = kindly(answer)
        assert text.startswith(f"{name}: ") and reason in text
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "name",
    [
        b"../../x.tif",
        b"..\\..\\x.tif",
        b"/etc/x.tif",
        b"a\0.tif",
        b"..",
        b"<script>.tif",
        b"\xff\xfe.tif",
        b"%2e%2e%2fx",
    ],
)
def test_a_name_puts_no_file_elsewhere(client, served, shown, name):
    made = client.upload(name, (shown.images / "farm/0.tif").read_bytes())
    if made.status_code == 200:
        path = Path(made.json()[0])
        assert path.resolve().is_relative_to(served.temp / "gradio") and path.resolve().is_file()
        assert client.call("match", named(str(path)), "water", "en")[0] == "complete"
    else:
        assert made.status_code == 400 and "Traceback" not in made.text
    assert not list(served.temp.glob("*.tif")) and not list(served.temp.glob("gradio/*.tif"))


def test_a_file_above_the_limit_is_refused_and_not_kept(client, served):
    made = client.upload(b"large.tif", b"\0" * (100 << 20))
    assert made.status_code == 413 and "maximum allowed size" in made.text
    kept = [path for path in served.temp.rglob("*large*") if path.is_file()]
    assert not kept and sum(path.stat().st_size for path in served.temp.glob("tmp*")) < 8 << 20


def test_no_file_of_the_server_can_be_fetched(client, served, shown):
    listed = ["/etc/passwd", "README.md", ROOT / "README.md", ROOT / "web_demo.py", served.log]
    listed += [*sorted(served.temp.glob("*.index")), *[path for path in served.temp.glob("before.index/*")][:3]]
    listed += [shown.images / "farm/0.tif", f"{served.temp}/gradio/../log", f"{served.temp}/gradio/%2e%2e/log"]
    for path in listed:
        for prefix in (
            "/gradio_api/file=",
            "/file=",
            "/gradio_api/file/",
            "/static/",
            "/assets/",
            "/gradio_api/proxy=file://",
        ):
            assert client.get(f"{prefix}{path}").status_code in (400, 403, 404, 405), f"{prefix}{path}"


def test_no_file_or_address_of_the_server_can_be_the_picture(client, served, shown):
    """Each is a real picture where it can be: what is refused is the place."""
    image = shown.images / "farm/0.tif"
    link = f"{served.url}/gradio_api/file={image}"
    listed = [named("/etc/passwd"), named(str(image)), named(os.path.relpath(image, ROOT)), named(f"file://{image}")]
    listed += [named(link), named("x.tif", url=link), named("x.tif", url=f"file://{image}"), {"path": str(image)}]
    for picture in [*listed, str(image), named("http://169.254.169.254/x.png"), named(f"{served.url}/config")]:
        for answer in (client.call("match", picture, "water", "en"), client.search(picture=picture)):
            event, data = answer
            assert event == "error", picture
            assert str(image) not in str(data) and "root:" not in str(data)
    _, data = client.call("classify", None, str(ROOT / "classes/ucm.json"), "", "en")
    assert "not in the list of choices" in data["error"]


def test_fifty_visitors_at_once(served):
    def visit(number):
        with Client(served) as made:
            event, data = made.search(f"water number {number}")
            return event, len(data[1])

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(visit, range(50))) == [("complete", 12)] * 50


# ----------------------------------------------------------------------------------------------------
# The page in a browser


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs a browser at {CHROMIUM}")
    with api.sync_playwright() as made:
        browser = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, served):
    """The page, open. It may not fetch from elsewhere, run a name as a script, or fail on its own."""
    context = chromium.new_context(viewport={"width": 1280, "height": 1000}, locale="en")
    made = context.new_page()
    made.set_default_timeout(60_000)
    foreign, wrong = [], []
    home = (served.url, "data:", "blob:", served.url.replace("http", "ws"))
    made.on("request", lambda request: request.url.startswith(home) or foreign.append(request.url))
    made.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.goto(served.url)
    made.get_by_label("What to look for").wait_for()
    yield made
    context.close()
    assert not foreign and not wrong


def press(tab, name):
    tab.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def open_tab(tab, name):
    tab.get_by_role("tab", name=name).click()


def give(tab, path):
    """Upload in the open tab, and wait for the preview."""
    panel = tab.locator("[role=tabpanel]:visible")
    panel.locator("input[type=file]").first.set_input_files(str(path))
    preview = panel.locator(".image-container img, .image-frame img").first
    preview.wait_for()
    assert loaded(tab, preview)


def loaded(tab, images) -> int:
    """How many there are, once all have pixels."""
    images.first.wait_for()
    tab.wait_for_function("list => list.every(image => image.naturalWidth > 0)", arg=images.element_handles())
    return images.count()


def picture_of(tab, path: Path):
    tab.wait_for_timeout(300)  # motion comes to rest
    tab.screenshot(path=path, full_page=True)


def test_browser_searches_filters_and_downloads(tab, tmp_path):
    tab.get_by_label("What to look for").fill("water")
    press(tab, "Search")
    pictures = tab.locator(".grid-wrap img")
    assert loaded(tab, pictures) == 12 and tab.locator("svg.footprints .shape").count() in (11, 12)
    picture_of(tab, tmp_path / "search.png")
    tab.get_by_text("Place, time, attributes").click()
    tab.get_by_label("Box in degrees").fill("5.0, 51.9, 5.05, 52.1")
    press(tab, "Search")
    tab.get_by_text("3 of 13 images, best first").wait_for()
    assert loaded(tab, pictures) == 3
    picture_of(tab, tmp_path / "filter.png")
    with tab.expect_download() as download:
        tab.get_by_text("Download GeoJSON").click()
    found = json.loads(Path(download.value.path()).read_text())
    assert len(found["features"]) == 3 and found["bbox"][0] == 5
    # A notice shows what was typed, and runs none of it.
    tab.get_by_label("From", exact=True).fill(HOSTILE)
    press(tab, "Search")
    tab.get_by_text(f"'{HOSTILE}' is no ISO 8601 date").wait_for()
    picture_of(tab, tmp_path / "notice.png")


def test_browser_searches_by_picture(tab, shown, tmp_path):
    give(tab, shown.images / "harbour/3.tif")
    press(tab, "Search")
    assert loaded(tab, tab.locator(".grid-wrap img")) == 12
    tab.get_by_text("1. 1.000 3.tif").wait_for()
    picture_of(tab, tmp_path / "like.png")


def test_browser_of_a_phone_shows_every_result(tab, tmp_path):
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.get_by_label("What to look for").fill("water")
    press(tab, "Search")
    assert loaded(tab, tab.locator(".grid-wrap img")) == 12
    picture_of(tab, tmp_path / "phone.png")
    right = tab.locator(".grid-wrap img").evaluate_all("list => list.map(image => image.getBoundingClientRect().right)")
    frame = tab.locator(".grid-wrap").bounding_box()
    assert max(right) <= frame["x"] + frame["width"]


def test_browser_says_what_is_wrong_with_an_upload(tab, tmp_path):
    (tmp_path / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    tab.locator("input[type=file]").first.set_input_files(str(tmp_path / "drawing.png"))
    tab.get_by_text("drawing.png: is an SVG drawing").wait_for()
    (tmp_path / "large.tif").write_bytes(b"\0" * (9 << 20))
    tab.reload()
    tab.locator("input[type=file]").first.set_input_files(str(tmp_path / "large.tif"))
    tab.get_by_text("exceed the maximum allowed size of 8.0 Mb").first.wait_for()
    picture_of(tab, tmp_path / "too_large.png")


def test_browser_changes_language(tab, tmp_path):
    tab.get_by_label("中文").check()
    tab.get_by_label("要找什么").fill("水")
    tab.get_by_role("heading", name="用自然语言检索和理解遥感图像").wait_for()
    press(tab, "检索")
    tab.get_by_text("共 13 幅图像").wait_for()
    assert loaded(tab, tab.locator(".grid-wrap img")) == 12
    picture_of(tab, tmp_path / "chinese.png")
    tab.get_by_label("English").check()
    tab.get_by_label("What to look for").wait_for()


def test_browser_matches_classifies_and_monitors(tab, shown, tmp_path):
    open_tab(tab, "Match")
    give(tab, shown.images / "farm/0.tif")
    tab.get_by_label("Descriptions, one a line").fill("farmland\nopen water")
    press(tab, "Score")
    tab.locator(".bars span").nth(1).wait_for()
    picture_of(tab, tmp_path / "match.png")
    open_tab(tab, "Classify")
    give(tab, shown.images / "farm/0.tif")
    press(tab, "Classify")
    tab.locator(".bars span").locator("visible=true").nth(11).wait_for()
    picture_of(tab, tmp_path / "classify.png")
    open_tab(tab, "Monitor")
    tab.get_by_label("What to watch for").fill("fire\nwater")
    press(tab, "Compare")
    assert loaded(tab, tab.locator(".pairs img")) >= 2
    picture_of(tab, tmp_path / "monitor.png")
