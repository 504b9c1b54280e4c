"""search.py from the command line: each command on a small library, its files, and what it refuses."""

import csv
import json
import shutil

import numpy as np
import pytest
import rasterio
import shapely
from PIL import Image

import search
import store
from imagery import RENDERING
from library import IndexReport, index_library
from model import DualEncoder
from report import csv_text
from scenes import Rejected
from tests.test_library import SMALL, write_tif


@pytest.fixture(scope="module")
def two_dates(matcher, tmp_path_factory):
    """Folders 2020 and 2023 with the same ten places, three of them changed, and an index of each."""
    root = tmp_path_factory.mktemp("dates")
    model = DualEncoder.from_pretrained(matcher)
    for year in (2020, 2023):
        for n in range(10):
            kind = ("farm", "harbour")[n % 2]
            seed = n + 100 * (year == 2023 and n in (2, 5, 6))
            origin = (500000 + 3000 * n, 4600000)
            write_tif(
                root / str(year) / kind / f"p{n}.tif", 64, 64, seed=seed, origin=origin, when=f"{year}:06:30 10:00:00"
            )
        index_library(model, root / str(year), root / f"{year}.index", **SMALL)
    return root


@pytest.fixture
def ask(call_main, two_dates, monkeypatch, tmp_path):
    """Runs search.py on the index of 2020 from an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(command, *words, store=two_dates / "2020.index"):
        return call_main(search.main, command, *words, *(["--store", store] if store else []), "--device", "cpu")

    return run


def test_index_says_what_it_did(ask, two_dates, matcher, tmp_path):
    words = [two_dates / "2020", "--tile", 48, "--stride", 48, "--workers", 0]
    code, _, err = ask("index", *words, store=tmp_path / "x.index")
    assert code == 2 and "python load.py lcybuaa/Git-RSCLIP" in err and not (tmp_path / "x.index").exists()
    code, out, err = ask("index", *words, "--model", matcher, store=tmp_path / "x.index")  # later runs know the model
    assert code == 0 and "10 files indexed (0 of them changed), 0 unchanged, 0 removed; 10 vectors" in out
    (two_dates / "2020/broken.tif").write_bytes(b"II*\0nothing")
    try:
        code, out, err = ask("index", *words, store=tmp_path / "x.index")
        assert code == 1 and "0 files indexed" in out and "10 unchanged" in out and "broken.tif" in err
        (row,) = map(json.loads, (tmp_path / "x.index/rejected.jsonl").read_text().splitlines())
        assert row["file"] == "broken.tif" and row["reason"]
        (two_dates / "2020/broken.tif").unlink()
        code, _, err = ask("index", *words, "--max_pixels", 2**27, store=tmp_path / "x.index")
        assert code == 0 and not (tmp_path / "x.index/rejected.jsonl").exists(), err
        code, out, err = ask("index", words[0], store=tmp_path / "x.index")  # and its tiles
        assert code == 0 and "10 unchanged" in out, err
        code, _, err = ask("index", words[0], "--tile", 32, store=tmp_path / "x.index")
        assert code == 2 and "tile: 48 there, 32 here" in err
        # A second folder in the same store is a mistake, not a removal of the first.
        code, _, err = ask("index", two_dates / "2023", *words[1:], store=tmp_path / "x.index")
        assert code == 2 and "--moved" in err
    finally:
        (two_dates / "2020/broken.tif").unlink(missing_ok=True)


def test_an_index_that_a_first_run_left_empty_takes_other_settings(ask, two_dates, matcher, tmp_path):
    words = ["index", two_dates / "2020", "--workers", 0, "--model", matcher]
    code, _, err = ask(*words, "--bands", "9,9,9", store=tmp_path / "x.index")
    assert code == 2 and "can be read" in err
    code, _, err = ask("query", "a farm", store=tmp_path / "x.index")
    assert code == 2 and "no image is in this index yet" in err
    code, out, err = ask(*words, store=tmp_path / "x.index")
    assert code == 0 and "10 files indexed" in out, err


def test_an_index_of_an_earlier_version_says_so(ask, two_dates, matcher, tmp_path):
    words = ["index", two_dates / "2020", "--workers", 0]
    assert ask(*words, "--model", matcher, "--only", "p1.tif", store=tmp_path / "x")[0] == 0
    header = json.loads((tmp_path / "x/index.json").read_text())
    assert header["record"].pop("rendering") == RENDERING
    (tmp_path / "x/index.json").write_text(json.dumps(header))
    assert "of an earlier version" not in ask(*words, "--only", "p1.tif", store=tmp_path / "x")[2], "nothing is new"
    assert "of an earlier version" in ask(*words, "--only", "p*.tif", store=tmp_path / "x")[2]


def test_the_range_of_a_stretch_is_kept_in_the_index(ask, two_dates, matcher, tmp_path):
    words = ["index", two_dates / "2020", "--workers", 0, "--model", matcher, "--stretch", "reflectance"]
    code, _, err = ask(*words, "--reflectance", 20, 200, store=tmp_path / "x.index")
    assert code == 0, err
    assert json.loads((tmp_path / "x.index/index.json").read_text())["record"]["image"]["reflectance"] == [20, 200]
    assert ask(*words[:6], store=tmp_path / "x.index")[0] == 0  # it knows its own
    code, _, err = ask(*words, "--reflectance", 0, 300, store=tmp_path / "x.index")
    assert code == 2 and "reflectance" in err


def test_rejected_files_of_a_server_have_a_list_of_their_own(ask, two_dates, matcher, monkeypatch, tmp_path):
    (tmp_path / "rejected.jsonl").write_text("another program's")
    report = IndexReport(rejected=[Rejected("a.tif", -1, "a.tif: broken")])
    monkeypatch.setattr("library.index_library", lambda *_, **__: report)
    words = ["index", two_dates / "2020", "--model", matcher]
    code, _, err = ask(*words, store="http://localhost:6333/my_library/")
    assert code == 1 and "a.tif: broken" in (tmp_path / "my_library.rejected.jsonl").read_text(), err
    assert (tmp_path / "rejected.jsonl").read_text() == "another program's"


def test_pictures_without_data_are_told_of(ask, two_dates, matcher, tmp_path):
    """Sentinel-2's files do not tag the 0 that stands where nothing was seen."""
    shutil.copytree(two_dates / "2020", tmp_path / "black")
    for n in (0, 2):
        with rasterio.open(tmp_path / f"black/farm/p{n}.tif", "r+") as file:
            file.write(np.zeros_like(file.read()))
    words = ["index", tmp_path / "black", "--workers", 0, "--model", matcher]
    told = "2 of 10 pictures are all black or white: give --nodata 0"
    assert told in ask(*words, store=tmp_path / "x")[2]
    assert "2 tiles without data left out" in ask(*words, "--nodata", 0, store=tmp_path / "y")[1]
    assert "black or white" not in ask(*words, "--nodata", 7, store=tmp_path / "z")[2]
    shutil.copy(tmp_path / "black/farm/p0.tif", tmp_path / "black/farm/p10.tif")
    shutil.copy(two_dates / "2020/farm/p4.tif", tmp_path / "black/farm/p12.tif")
    shutil.copy(two_dates / "2020/farm/p6.tif", tmp_path / "black/farm/p14.tif")
    code, out, err = ask(*words, store=tmp_path / "z")  # the index knows its own value
    assert code == 0 and "3 files indexed" in out and "black or white" not in err


def test_rows_of_different_attributes_make_one_table():
    assert csv_text([{"a": 1}, {"a": 2, "b": 3}]) == "a,b\n1,\n2,3\n"


def test_every_class_has_a_colour_of_its_own():
    assert search.palette(7) == search.PALETTE[:7]
    for number in (21, 45, 300):
        made = search.palette(number)
        assert made[:20] == search.PALETTE and len(set(made)) == len(made) == number
    rgb = np.array([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in search.palette(45)])
    apart = np.linalg.norm(rgb[:, None] - rgb, axis=-1) + 999 * np.eye(45)
    assert apart.min() > 25


def test_query_in_every_form(ask, two_dates, tmp_path):
    names = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "geojson")}
    files = [word for kind, path in names.items() for word in (f"--{kind}", path)]
    code, out, err = ask("query", "a farm", "-k", 4, *files, "--sheet", tmp_path / "sheet.png")
    assert code == 0, err
    rows = json.loads(names["json"].read_text())
    assert [row["rank"] for row in rows] == [1, 2, 3, 4] and all(row["path"] in out for row in rows)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    table = list(csv.DictReader(names["csv"].open()))
    assert [row["path"] for row in table] == [row["path"] for row in rows] and table[0]["folder"] in ("farm", "harbour")
    shapes = json.loads(names["geojson"].read_text())
    for row, feature in zip(rows, shapes["features"]):
        assert feature["properties"]["path"] == row["path"]
        with rasterio.open(two_dates / "2020" / row["path"]) as source:
            box = rasterio.warp.transform_bounds(source.crs, "EPSG:4326", *source.bounds)
        np.testing.assert_allclose(shapely.from_geojson(json.dumps(feature["geometry"])).bounds, box, atol=1e-5)
    assert Image.open(tmp_path / "sheet.png").size[0] > 500
    code, out, err = ask("query", "a farm", "-k", 2, "--json", "-")
    assert code == 0 and len(json.loads(out)) == 2, "nothing but JSON on standard output"


def test_query_filters_and_pictures(ask, two_dates, tmp_path):
    def paths(*words):
        code, out, err = ask("query", *words, "--json", "-")
        assert code == 0, err
        return [row["path"] for row in json.loads(out)]

    assert len(paths("a farm", "--where", "folder=farm")) == 5
    assert set(paths("a farm", "--where", "folder=farm", "folder=harbour")) == set(paths("a farm", "-k", 20))
    assert len(paths("a farm", "--from", "2020-06-30T08:00", "--to", "2020-06-30")) == 10
    assert paths("a farm", "--from", "2020-06-30T11:00+01:00", "--to", "2020-06-30T10:00:00Z")
    assert len(paths("a farm", "-k", 20, "--where", "folder=farm", "--where", "folder=harbour")) == 10  # both count
    (tmp_path / "none.csv").write_text("of an earlier query")
    assert ask("query", "a farm", "--from", "2021-01-01", "--csv", tmp_path / "none.csv")[0] == 0
    assert (tmp_path / "none.csv").read_text() == "query,rank,score,path,window,where,time\n"
    assert paths("a farm", "--from", "2021-01-01") == [] and len(paths("a farm", "--to", "2020-06-30")) == 10
    assert len(paths("a farm", "--bbox", 15.0, 41.0, 15.04, 42.0)) == 2
    picture = two_dates / "2020/farm/p4.tif"
    assert paths("--like", picture, "-k", 1) == ["farm/p4.tif"]
    assert paths("a harbour", "--like", picture, "--like_weight", 1, "-k", 1) == ["farm/p4.tif"]
    assert paths("a harbour", "--not", "a farm") and paths(
        "a farm", "--season", "winter", "--weather", "cloudy", "--exact"
    )
    code, out, _ = ask("query", "a farm", "a harbour", "--each", "-k", 3, "--sheet", tmp_path / "each.png")
    assert code == 0 and out.count("score") == 2 and (tmp_path / "each.png").exists()


def test_query_with_a_picture_gone(ask, two_dates, matcher, monkeypatch, tmp_path):
    write_tif(tmp_path / "library/a.tif", 64, 64)
    index_library(DualEncoder.from_pretrained(matcher), tmp_path / "library", tmp_path / "x", **SMALL)
    (tmp_path / "library/a.tif").rename(tmp_path / "library/b.tif")
    code, out, err = ask("query", "a farm", "--sheet", tmp_path / "s.png", store=tmp_path / "x")
    assert code == 0 and "a.tif" in out and "no picture" in err and (tmp_path / "s.png").exists()
    monkeypatch.setattr(search, "SHEET_MOST", 2)
    code, _, err = ask("query", "a farm", "-k", 5, "--sheet", tmp_path / "two.png")
    assert code == 0 and "the sheet shows the first 2" in err
    code, _, err = ask(
        "query", "a farm", "--library", tmp_path / "nowhere", "--sheet", tmp_path / "s.png", store=tmp_path / "x"
    )
    assert code == 0 and "nowhere" in err


def test_classify(ask, two_dates, tmp_path):
    code, out, err = ask("classify", "--labels", "farm,harbour", "--truth", "folders", "--out", tmp_path / "c")
    assert code == 0, err
    scores = json.loads((tmp_path / "c/scores.json").read_text())
    table = list(csv.DictReader((tmp_path / "c/predictions.csv").open()))
    assert len(table) == 10 and {row["truth"] for row in table} == {"farm", "harbour"}
    right = np.mean([row["truth"] == row["answer"] for row in table])
    assert scores["top1"] == pytest.approx(right) and f"top-1 accuracy {right:.3f}" in out
    assert np.sum(scores["confusion"]) == 10
    for row in table:
        assert float(row["farm"]) + float(row["harbour"]) == pytest.approx(1, abs=1e-4)
    assert Image.open(tmp_path / "c/confusion.png").size[0] > 300
    assert ask("classify", "--labels", "path,score", "--out", tmp_path / "names")[0] == 0
    table = list(csv.DictReader((tmp_path / "names/predictions.csv").open()))
    assert table[0]["path"].endswith(".tif") and float(table[0]["path (class)"]) <= float(table[0]["score"]) + 1e-6
    truth = tmp_path / "truth.csv"
    truth.write_text("path,label\nfarm/p0.tif,FARM\nharbour/p1.tif,harbour\nfarm/p2.tif,airport\nelsewhere.tif,farm\n")
    code, out, err = ask("classify", "--labels", "farm,harbour", "--truth", truth)
    assert (
        code == 0 and "on 2 images" in out and "no label: airport" in err and "among those classified: elsewhere" in err
    )
    truth.write_text(
        "Class,Label,Filepath\n1,FARM,./farm/p0.tif\n9,FARM,./farm/p0.tif\n2,harbour,harbour\\p1.tif\n3,,farm/p2.tif\n"
    )
    code, out, err = ask("classify", "--labels", "farm,harbour", "--truth", truth)
    assert code == 0 and "on 2 images" in out and "no label" not in err
    assert search.read_truth("folders", ["farm", "port"], ["a/Farm/farm_0/1.tif", "port/2.tif", "3.tif"]) == {
        "a/Farm/farm_0/1.tif": 0, "port/2.tif": 1
    }  # fmt: skip
    truth.write_text(",Filename,Label,ClassName\n0,farm/p0.tif,0,Farm\n1,harbour/p1.tif,1,Harbour\n")  # EuroSAT's own
    code, out, err = ask("classify", "--labels", "farm,harbour", "--truth", truth)
    assert code == 0 and "on 2 images" in out and "no label" not in err, err
    for table, labels, said in (
        ("path,label\nfarm/p0.tif,farm\nfarm/p0.tif,harbour\n", "farm,harbour", "stands in two rows"),
        ("path,label\nfarm/p0.tif,farm\n./farm/p0.tif,harbour\n", "farm,harbour", "p0.tif has two labels"),
        ("path,label\nfarm/p0.tif,farm\n", "farm,Farm", "'farm' and 'Farm' are one class to --truth"),
        ("path,a,b\nfarm/p0.tif,farm,farm\n", "farm,harbour", "expected a column `label`"),
        ("path;label\nfarm/p0.tif;farm,x\n", "farm,harbour", "parted by semicolons"),
    ):
        truth.write_text(table)
        code, _, err = ask("classify", "--labels", labels, "--truth", truth)
        assert code == 2 and said in err, err


def test_monitor(ask, two_dates, tmp_path):
    queries = tmp_path / "queries.txt"
    queries.write_text("# what to watch\na farm\n\na harbour <b>\n")
    words = ["--before", two_dates / "2020.index", "--after", two_dates / "2023.index", "--queries", queries]
    code, out, err = ask("monitor", *words, "--out", tmp_path / "m", "--alike", 0, store=None)
    assert code == 0 and "places" in out, err
    rows = list(csv.DictReader((tmp_path / "m/changes.csv").open()))
    assert len(rows) == 20 and {row["query"] for row in rows} == {"a farm", "a harbour <b>"}
    changed = {row["path_before"] for row in rows if row["is_change"] == "True"}
    assert changed == {"farm/p2.tif", "harbour/p5.tif", "farm/p6.tif"}, "the three that were drawn anew, and no other"
    assert {(row["time_before"][:4], row["time_after"][:4]) for row in rows} == {("2020", "2023")}
    assert {(float(row["valid_before"]), float(row["valid_after"])) for row in rows} == {(1, 1)}
    shapes = json.loads((tmp_path / "m/changes.geojson").read_text())["features"]
    assert {shape["properties"]["path_before"] for shape in shapes} == changed
    page = (tmp_path / "m/index.html").read_text()
    assert (
        "a harbour &lt;b&gt;" in page
        and "<b>" not in page.split("harbour")[1][:20]
        and page.count("data:image/jpeg") >= 6
    )


def test_landuse(ask, two_dates, tmp_path):
    regions = tmp_path / "regions.geojson"
    west = {"type": "Polygon", "coordinates": [[[14, 41], [15.1, 41], [15.1, 42], [14, 42], [14, 41]]]}
    feature = {"type": "Feature", "properties": {"name": "west"}, "geometry": west}
    regions.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    code, _, err = ask("landuse", "--classes", "farm,harbour", "--regions", regions, "--out", tmp_path / "l")
    assert code == 0, err
    made = json.loads((tmp_path / "l/landuse.json").read_text())
    # Ten scenes of 640 m x 640 m; UTM's scale error on the central meridian is 0.04%.
    assert sum(row["km2"] for row in made["classes"]) == pytest.approx(10 * 0.4096, rel=2e-3)
    assert sum(row["images"] for row in made["classes"]) == 10
    (west,) = made["regions"]
    assert west["region"] == "west" and west["all"] == pytest.approx(west["farm"] + west["harbour"])
    assert west["all"] == pytest.approx(3 * 0.4096, rel=0.02), "three scenes lie west of 15.1 degrees"
    for name in ("map.png", "shares.png", "landuse.csv", "landuse.geojson", "index.html"):
        assert (tmp_path / "l" / name).stat().st_size > 100


def test_landuse_says_what_it_counts_and_draws(ask, matcher, tmp_path):
    path = write_tif(tmp_path / "library/a.tif", 64, 64)
    with rasterio.open(path, "r+") as file:
        file.nodata = 0
        data = np.maximum(file.read(), 1)
        data[:, :, :9] = 0
        file.write(data)
    write_tif(tmp_path / "plain/a.tif", 64, 64, crs=None)
    model = DualEncoder.from_pretrained(matcher)
    for name in ("library", "plain"):
        index_library(model, tmp_path / name, tmp_path / f"{name}.index", **SMALL)
    words = ["landuse", "--classes", "farm,harbour", "--out", tmp_path / "l"]
    code, out, err = ask(*words, store=tmp_path / "library.index")
    assert code == 0 and "1 tiles hold data on less than 90% of their area, which is counted whole" in out
    assert "map.png" in err
    code, out, err = ask(*words[:-1], tmp_path / "p", store=tmp_path / "plain.index")
    assert code == 0 and "map.png" not in err and "less than 90%" not in out
    regions = tmp_path / "regions.geojson"
    shape = {"type": "Polygon", "coordinates": [[[14, 41], [16, 41], [16, 42], [14, 42], [14, 41]]]}
    regions.write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": shape}))
    shape["coordinates"] = [[pair[::-1] for pair in shape["coordinates"][0]]]
    regions.write_text(json.dumps({"type": "Feature", "properties": {"name": "x"}, "geometry": shape}))
    code, _, err = ask("landuse", "--classes", "farm,harbour", "--regions", regions, "--out", tmp_path / "s")
    assert code == 0 and "no region meets an image: GeoJSON has longitude first" in err
    code, _, err = ask("landuse", "--classes", "farm,all", "--regions", regions, "--out", tmp_path / "r")
    assert code == 2 and "'all'" in err and "rename" in err and not (tmp_path / "r").exists()


def test_recall(ask, tmp_path):
    store.create(tmp_path / "empty.index", record={"model": "m"}, dim=8).close()
    code, out, err = ask("recall", store=tmp_path / "empty.index")
    assert code == 2 and "no image is in this index yet" in err and not out
    code, out, _ = ask("recall", "-k", 3)
    assert code == 0 and "recall@3" in out and "1.0000 over 10 queries" in out
    (tmp_path / "q.txt").write_text("a farm\na harbour\n")
    code, out, _ = ask("recall", "--queries", tmp_path / "q.txt")
    assert code == 0 and "over 2 queries" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["query"], "needs words"),
        (["query", " "], "empty text"),
        (["query", "a", "-k", 0], "error: -k 0"),
        (["query", "a", "--where", "folder"], "NAME=VALUE"),
        (["query", "a", "--where", "colour=red"], "no point has the attribute 'colour'"),
        (["query", "a", "--bbox", 10, 0, 20, 95], "no box"),
        (["query", "a", "--from", "June"], "ISO 8601"),
        (["query", "a", "--from", "2020-07-01", "--to", "2020-06-30"], "is after"),
        (["query", "a", "--from", "2020-07", "--to", "2020-06"], "is after"),
        (["query", "a", "--to", "20200630"], "no ISO 8601 date"),
        (["query", "a", "--to", "2020-13"], "no ISO 8601 date"),
        (["classify", "--labels", "a,b", "--to", "1999", "--where", "folder=x"], "a date at all"),
        (["query", "a", "--json", "."], "--json .: is a folder"),
        (["query", "a", "--sheet", f"{__file__}/sheet.png"], "--sheet"),
        (["query", "a", "--csv", f"{__file__}/x/out.csv"], "--csv"),
        (["classify", "--labels", "a,b", "--out", f"{__file__}/x"], "--out"),
        (["landuse", "--classes", "a,b", "--out", __file__], "is a file, expected a folder"),
        (["query", "a", "--like", "nowhere.png"], "nowhere.png"),
        (["query", "a", "--each", "--like", "x.png"], "--each"),
        (["query", "a", "--template", "no place"], "--template"),
        (["classify"], "--labels"),
        (["classify", "--labels", "one"], "two classes"),
        (["classify", "--labels", "a,b", "--truth", "nowhere.csv"], "nowhere.csv"),
        (["classify", "--labels", "a,b", "--truth", "folders"], "no image of the index has a truth"),
        (["landuse", "--classes", "ucm", "--out", "l", "--regions", "nowhere.json"], "nowhere.json"),
        (["recall", "--queries", "nowhere.txt"], "nowhere.txt"),
        (["index", "nowhere"], "no such folder"),
        (["index"], "the folder of images"),
        (["index", "..", "--tile", 64, "--stride", 65], "--stride 65"),
        (["index", "..", "--workers", -1], "--workers -1"),
        (["query", "a", "--sheet", "-"], "--sheet -"),
    ],
)
def test_refusals(ask, words, said, tmp_path):
    code, _, err = ask(*words)
    assert code == 2 and said in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_refusals_of_stores_and_models(ask, encoder, two_dates, tmp_path):
    for command in (
        ["query", "a"],
        ["classify", "--labels", "a,b"],
        ["recall"],
        ["landuse", "--classes", "a,b", "--out", "x"],
    ):
        code, _, err = ask(*command, store=tmp_path / "none")
        assert code == 2 and "python search.py index" in err
        code, _, err = ask(*command, store=None)
        assert code == 2 and "--store" in err
    code, _, err = ask("index", two_dates / "2020", store=f"{__file__}/x")
    assert code == 2 and "--store" in err and "Traceback" not in err
    encoder(image_tower="full", seed=9).save_pretrained(tmp_path / "other")
    code, _, err = ask("query", "a", "--model", tmp_path / "other")
    assert code == 2 and "fingerprint" in err
    (tmp_path / "q.txt").write_text("\n# only a remark\n")
    words = ["--before", two_dates / "2020.index", "--after", two_dates / "2023.index", "--queries", tmp_path / "q.txt"]
    code, _, err = ask("monitor", *words, "--out", tmp_path / "m", store=None)
    assert code == 2 and "no queries" in err and not (tmp_path / "m").exists()
