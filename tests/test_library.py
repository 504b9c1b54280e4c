"""library.py: what goes into an index, what a second run changes, what a kill leaves, and what a query finds."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds

import library as module
import search
import store
from config import InputError
from imagery import ImageSettings, read_image, tile_windows
from library import (
    TEMPLATES,
    Library,
    content_hash,
    index_library,
    match_places,
    passed_over,
    read_attributes,
    read_classes,
    result_row,
    same_place,
    time_in_name,
    time_of,
    unit,
    windows_of,
)
from model import DualEncoder, pixel_store
from scenes import files_below
from store import Filter, Hit
from tests.official_layout import write_clip
from tests.processes import FORKS, forked, run_on_two

ROOT = Path(__file__).parents[1]
GEOTIFFS = ROOT.parent / "shared/data/geotiff"


@pytest.fixture(scope="session")
def model(matcher) -> DualEncoder:
    return DualEncoder.from_pretrained(matcher)


def write_tif(
    path, height, width, *, seed=0, origin=(500000, 4600000), pixel=10.0, crs="EPSG:32633", when="2020:06:30 10:15:00"
):
    """A georeferenced picture; None as crs: without a place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(0, 255, (3, height // 4 + 1, width // 4 + 1), dtype=np.uint8)
    data = data.repeat(4, 1).repeat(4, 2)[:, :height, :width]
    place = {"crs": crs, "transform": from_origin(*origin, pixel, pixel)} if crs else {}
    with rasterio.open(path, "w", driver="GTiff", height=height, width=width, count=3, dtype="uint8", **place) as out:
        out.write(data)
        if when:
            out.update_tags(TIFFTAG_DATETIME=when)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A library of a large raster, small pictures in folders, and what is no image."""
    root = tmp_path / "library"
    write_tif(root / "large.tif", 150, 200)
    for n in range(4):
        path = root / ("harbour" if n % 2 else "farm") / f"S2A_2021063{n % 2}_{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (60, 64, 3), dtype=np.uint8)).save(path)
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"0" * 50)
    (root / "notes.txt").write_text("no image")
    return root


SMALL = {"tile": 64, "stride": 48, "workers": 0, "batch_size": 3}


def test_a_shift_of_all_words_is_no_change_of_any():
    """A light that moves every picture along what all texts have in common, more in some places; in place 3 ships came."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((200, 32)).astype(np.float32) * 0.1
    shared, ship = np.eye(32, dtype=np.float32)[:2]
    after = before + np.outer(rng.uniform(0, 1, 200), shared).astype(np.float32)
    after[3] += 0.3 * ship
    pairs = module.Pairs([{}] * 200, [{}] * 200, before, after, [])
    word, reference = (0.8 * shared + 0.6 * ship)[None], (0.8 * shared)[None]
    first, second, judged = pairs.changes(word, reference=reference)
    assert np.argmax(judged[0]) == 3 and judged[0, 3] > 10 and abs(np.delete(judged[0], 3)).max() < 3
    plain = pairs.changes(word)
    assert (np.array(plain[:2]) == [first, second]).all() and plain[2][0, 3] < 3


def test_words_of_reference_are_those_of_the_query_s_language(model, tmp_path, folder):
    index_library(model, folder, tmp_path / "x.index", settings=ImageSettings(), **SMALL)
    with Library.open(tmp_path / "x.index", encoder=model) as opened:
        english, chinese, again = opened.reference_vectors(["ships", "船", "a lake"])
        words = module.REFERENCE["en"].split(", ")
        np.testing.assert_allclose(english, opened.text_vectors(words).mean(0), atol=1e-6)
        assert len(words) == len(module.REFERENCE["zh"].split("，")) == 21
        assert (english == again).all() and abs(english - chinese).max() > 1e-3


def test_rasters_of_other_kinds_are_not_passed_over_in_silence(folder):
    assert passed_over(files_below(folder)) is None
    for name in ("a.img", "farm/b.IMG", "c.vrt"):
        (folder / name).touch()
    assert passed_over(files_below(folder)).startswith("not read: 2 .img, 1 .vrt; `gdal_translate")
    plan = module.plan_index(folder, None, tile=64, stride=48, settings=ImageSettings())
    assert passed_over(files_below(folder)) in plan.notes


def test_masks_beside_the_pictures_are_left_out(folder):
    masks = ["20200615_1_3B_udm2.tif", "LC08_L2SP_1_QA_PIXEL.TIF", "T33UUP_20200615_SCL_20m.jp2", "MSK_CLDPRB_20m.jp2",
             "HLS.S30.T32TQM.2020166.v2.0.Fmask.tif", "LC08_L2SP_1_ST_EMIS.TIF", "AOT.tif",
             "T33UUP_20200615T101559_PVI.jp2",
             "S2A_MSIL2A_20200615T101559_N0214_R022_T33UUP_20200615T130153-ql.jpg",
             "LC08_L2SP_1_02_T1_thumb_large.jpeg", "GF2_PMS1_E113.8_N22.5_20200615_L1A0004530123-MSS1_thumb.jpg",
             "GF1_WFV2_E113.8_N22.5_20200615_L1A0001738184.jpg", "IMG_PHR1A-BROWSE.JPG", "ENMAP01-QL_QUALITY_CLOUD.TIF",
             "PREVIEW_PHR1A_P.JPG", "GF3_MYN_WAV_E113.8_L1A_HH_L10003992720.jpg", "20200615_1_3B_udm2_clip_reproject.tif",
             "20200615_1_3B_udm2_file_format.tif", "S2A_MSIL2A_45_reference_map.tif", "S1A_IW_RTC10_ls_map.tif",
             "SENTINEL2A_20200615_L2A_T31TCJ_D_CLM_R1.tif"]  # fmt: skip
    tiles = ["GF2_PMS1__L1A0000564539-MSS1_0_1024.jpg", "GF2_PMS1_E113.8_L1A0004530123_tile_12.jpg",
             "GF3_SAY_QPSI_L1A_HH_L10002188179__1__4320___10368.jpg", "road_map.tif",
             "udm_campus.tif", "park_ls_map.tif", "city_reference_map.tif"]  # fmt: skip
    assert not any(module.MASK.search(name) for name in tiles)
    for name in [*masks, "scl.png", "aqua_1.tif"]:
        write_tif(folder / "farm" / name, 60, 60)
    (page := folder / "farm/S2A_MSIL2A_20200615T101559_N0214_R022_T33UUP_20200615T130153.SAFE/HTML").mkdir(parents=True)
    (page / "banner_1.png").write_bytes((folder / "farm/scl.png").read_bytes())

    def planned(*only):
        plan = module.plan_index(folder, None, tile=64, stride=48, settings=ImageSettings(), only=only or ("*",))
        return {file.path for file in plan.files}, plan.notes

    names, notes = planned()
    assert names & {f"farm/{name}" for name in [*masks, "scl.png", "aqua_1.tif"]} == {"farm/scl.png", "farm/aqua_1.tif"}
    assert [note for note in notes if note.startswith("masks, quality layers and previews left out: 22, such as")]
    assert not any("banner" in name for name in names)
    shutil.rmtree(page.parent)
    assert planned("*_SCL_20m.jp2") == ({"farm/T33UUP_20200615_SCL_20m.jp2"}, [])
    write_tif(folder / "farm/T33UUP_20200615.tif", 60, 60)
    names, notes = planned("*20200615*")
    assert names == {"farm/T33UUP_20200615.tif"} and "previews left out" in notes[0], "a date names no mask"
    both = planned("*20200615*", "*_SCL_20m.jp2")[0]
    assert both == names | {"farm/T33UUP_20200615_SCL_20m.jp2"}
    for path in folder.rglob("*.*"):
        if path.name not in masks:
            path.unlink()
    names, notes = planned()
    assert len(names) == 21 and notes == [], "a folder of masks is meant"


def test_cells_that_are_numbered_like_bands_all_come_in(folder):
    for n in range(1, 7):
        write_tif(folder / "cells" / f"dem_B{n:02}.tif", 60, 60, origin=(500000 + 600 * n, 4600000))
    plan = module.plan_index(folder / "cells", None, tile=64, stride=48, settings=ImageSettings())
    assert len(plan.files) == 6 and not plan.rejected


def test_a_place_that_a_file_beside_tells_is_said(folder):
    def notes():
        plan = module.plan_index(folder, None, tile=64, stride=48, settings=ImageSettings())
        return [note for note in plan.notes if "world file" in note]

    (folder / "large.tfw").write_text("10\n0\n0\n-10\n500005\n4599995\n")
    assert notes() == [], "the image says it, too"
    (folder / "farm" / "S2A_20210630_0.pgw").write_text("10\n0\n0\n-10\n500005\n4599995\n")
    (note,) = notes()
    assert "them: 2," in note and "S2A_20210630_0.png, which says itself not" in note


def test_a_file_of_many_tiles_is_opened_once(model, folder, tmp_path, monkeypatch):
    opened, made = [], module.opened
    monkeypatch.setattr(module, "opened", lambda path, settings: opened.append(path.name) or made(path, settings))
    index_library(model, folder, tmp_path / "x", **SMALL)
    assert sorted(opened) == sorted(set(opened)) and "large.tif" in opened


def contents(location) -> dict:
    """{(path, window): (vector, payload)} of an index."""
    with store.open(location) as index:
        rows = list(index.scroll())
        vectors = index.vectors([name for name, _ in rows])
    return {(p["path"], tuple(p["window"] or ())): (v, p) for (_, p), v in zip(rows, vectors)}


def same_contents(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key][0], b[key][0], atol=2e-6)
        assert {k: v for k, v in a[key][1].items() if k not in ("extra", "last")} == {
            k: v for k, v in b[key][1].items() if k not in ("extra", "last")
        }


# ----------------------------------------------------------------------------------------------------
# What goes in


def test_small_pieces(tmp_path):
    assert windows_of(96, 90, 64, 48) == [None] and windows_of(5000, 90, 0, 0) == [None]
    assert windows_of(97, 90, 64, 48) == list(tile_windows(97, 90, 64, 48))
    assert time_in_name("a/S2A_MSIL1C_20200630T101031_N02.tif") == "2020-06-30"
    clocks = ("IMG_PHR1A_PMS_202006301028190_ORT_1.TIF", "DJI_202006301230_001.JPG", "DJI_20200630123000_1.JPG")
    for name in ("影像_2020年06月30日.tif", "影像2020年6月30日.tif", "x_2020.06.30.tif", *clocks):
        assert time_in_name(name) == "2020-06-30"
    for name in ("S2A_32TLT_20200630_0_L2A/B04.tif", "20190101/LC08_L2SP_195026_20200630_20200823_02_T1/SR_B4.TIF"):
        assert time_in_name(name) == "2020-06-30", "a band's name says nothing of its scene"
    assert time_in_name("x_2019-02-28.png") == "2019-02-28" and time_in_name("1999_12_31/a.png") is None
    for name in (
        "LC81930242020182LGN00_B4.TIF",
        "HLS.S30.T32UQD.2020182T101031.v2.0.tif",
        "MOD09GA.A2020182.h18v03.tif",
    ):
        assert time_in_name(name) == "2020-06-30"
    assert (
        time_in_name("tile_20481024.tif") is None
        and time_in_name("id_202006309912.tif") is None
        and time_in_name("x.2020400.tif") is None
    )
    assert [time_in_name(name) for name in ("20200231.tif", "120200630.tif", "2020-0630.tif", "scene_01042.tif")] == [
        None
    ] * 4
    known = {"time": "2021-11-03T17:02:11", "written": True}
    assert time_of(known, "s1a-iw-grd-vv-20200614t053318.tiff") == "2020-06-14", "not the day of its processing"
    assert time_of(known | {"written": False}, "x_20200614.tif") == known["time"] == time_of(known, "x_20211103.tif")
    assert time_of(known, "x.tif") == known["time"] and time_of({"time": None, "written": False}, "x.tif") is None
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20) * 70)
    first = content_hash(big)
    assert first == content_hash(big) and len(first) == 16
    with big.open("r+b") as file:
        file.seek(0)
        file.write(b"changed")
    assert content_hash(big) != first


def test_index_holds_every_tile_with_its_place(model, folder, tmp_path):
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert (report.files, report.added, report.total, report.removed) == (5, 16, 16, 0)
    (bad,) = report.rejected
    assert bad.file == "broken.jpg" and "broken.jpg" in bad.reason
    made = contents(tmp_path / "x")
    windows = list(tile_windows(150, 200, 64, 48))
    assert {window for path, window in made if path == "large.tif"} == set(windows)
    with rasterio.open(folder / "large.tif") as source:
        for window in windows:
            vector, payload = made["large.tif", window]
            column, row, width, height = window
            bounds = rasterio.windows.bounds(rasterio.windows.Window(column, row, width, height), source.transform)
            np.testing.assert_allclose(payload["extra"]["bounds"], bounds)
            np.testing.assert_allclose(
                payload["footprint"], transform_bounds(source.crs, "EPSG:4326", *bounds), atol=1e-6
            )
            assert payload["time"] == "2020-06-30T10:15:00"
            rgb = read_image(folder / "large.tif", window=window).rgb
            alone = model.embed_images([pixel_store(model).resize(rgb)]).numpy()[0]
            np.testing.assert_allclose(vector, alone, atol=2e-6)
    _, payload = made["harbour/S2A_20210631_1.png", ()]
    assert payload["time"] is None and payload["attributes"] == {"folder": "harbour"} and payload["footprint"] is None
    assert made["farm/S2A_20210630_0.png", ()][1]["time"] == "2021-06-30"


def test_second_run_changes_only_what_changed(model, folder, tmp_path, monkeypatch):
    index_library(model, folder, tmp_path / "x", **SMALL)
    before = contents(tmp_path / "x")
    encoded = []
    real = DualEncoder.encode_image
    monkeypatch.setattr(DualEncoder, "encode_image", lambda *a, **k: encoded.append(1) or real(*a, **k))
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert (report.files, report.added, report.unchanged, report.total) == (0, 0, 5, 16) and not encoded
    # One gone, one changed to fewer tiles, one touched, one new.
    (folder / "farm/S2A_20210630_0.png").unlink()
    write_tif(folder / "large.tif", 100, 100, seed=3)
    os.utime(folder / "farm/S2A_20210630_2.png", (1, 1))
    write_tif(folder / "new/one.tif", 40, 40, crs=None, when=None)
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert (report.files, report.updated, report.removed, report.unchanged) == (2, 1, 1, 3)
    after = contents(tmp_path / "x")
    assert {window for path, window in after if path == "large.tif"} == set(tile_windows(100, 100, 64, 48))
    assert "farm/S2A_20210630_0.png" not in {path for path, _ in after} and ("new/one.tif", ()) in after
    kept = ("harbour/S2A_20210631_1.png", ())
    assert np.array_equal(before[kept][0], after[kept][0])
    # The whole is what a fresh index of the folder would be.
    index_library(model, folder, tmp_path / "fresh", **SMALL)
    fresh = contents(tmp_path / "fresh")
    fresh["farm/S2A_20210630_2.png", ()][1]["mtime_ns"] = after["farm/S2A_20210630_2.png", ()][1]["mtime_ns"]
    same_contents(after, fresh)
    # A file that can no longer be read goes, and is listed.
    (folder / "large.tif").write_bytes(b"II*\0" + b"\0" * 20)
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert report.removed == 1 and sorted(bad.file for bad in report.rejected) == ["broken.jpg", "large.tif"]
    assert not any(path == "large.tif" for path, _ in contents(tmp_path / "x"))


def test_renamed_files_keep_their_vectors(model, folder, tmp_path, monkeypatch):
    """But not where the name says another date; and attributes go along, those of equal files to the one of the same end."""
    for label in "ab":
        (folder / label).mkdir()
        shutil.copy(folder / "farm/S2A_20210630_0.png", folder / label / "copy.png")
    given = {f"{label}/copy.png": {"label": label} for label in "ab"} | {"large.tif": {"label": "large"}}
    index_library(model, folder, tmp_path / "x", attributes=given, **SMALL)
    (folder / "2020").mkdir()
    for before, after in (("large.tif", "2020/great.tif"), ("a", "2020/a"), ("b", "2020/b"), ("farm", "field"),
                          ("harbour/S2A_20210631_1.png", "harbour/S2A_20220630_1.png")):  # fmt: skip
        (folder / before).rename(folder / after)
    read = []
    monkeypatch.setattr(module, "read_image", lambda *words, **more: pytest.fail("read again"))
    opened = module.opened
    monkeypatch.setattr(module, "opened", lambda path, *more: read.append(path.name) or opened(path, *more))
    with monkeypatch.context() as killed:
        killed.setattr(store.Store, "remove", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index_library(model, folder, tmp_path / "x", **SMALL)
    assert not read
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert read == ["S2A_20220630_1.png"] and (report.renamed, report.files, report.removed) == (0, 1, 6)
    assert index_library(model, folder, tmp_path / "x", **SMALL).unchanged == 7
    (folder / "2020/great.tif").rename(folder / "huge.tif")
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert (report.renamed, report.files, report.removed, report.unchanged) == (1, 0, 0, 6) and len(read) == 1
    with store.open(tmp_path / "x") as index:
        labels = {path: known.get("label") for path, known in index.attributes().items()}
    assert {path: label for path, label in labels.items() if label} == {
        "huge.tif": "large", "2020/a/copy.png": "a", "2020/b/copy.png": "b"
    }  # fmt: skip
    monkeypatch.undo()
    index_library(
        model, folder, tmp_path / "fresh", attributes={p: {"label": v} for p, v in labels.items() if v}, **SMALL
    )
    moved, fresh = contents(tmp_path / "x"), contents(tmp_path / "fresh")
    assert moved.keys() == fresh.keys()
    for key, (vector, payload) in moved.items():
        assert np.abs(vector - fresh[key][0]).max() < 2e-6
        assert (payload["footprint"] or []) == pytest.approx(fresh[key][1]["footprint"] or [], rel=1e-14)
        for name in ("time", "attributes", "window", "hash", "size", "mtime_ns"):
            assert payload[name] == fresh[key][1][name]


def test_a_name_that_is_not_utf8_is_rejected(model, folder, tmp_path):
    shutil.copy(folder / "large.tif", os.fsencode(folder) + b"/caf\xe9.tif")
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert [bad.file for bad in report.rejected] == ["broken.jpg", "caf?.tif"] and report.files == 5
    assert report.rejected[1].reason == "caf?.tif: the name is not UTF-8; rename the file"
    os.mkfifo(folder / "pipe.png")  # which has no end
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert [bad.file for bad in report.rejected] == ["broken.jpg", "caf?.tif", "pipe.png"] and report.unchanged == 5


def test_a_large_file_with_a_new_time_is_read_again(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HASHED", 1 << 20)
    for name, size in (("a", 700), ("b", 500)):  # 1.5 MB, of which one piece of 1 MiB is hashed, and 0.75 MB
        path = write_tif(tmp_path / "library" / f"{name}.tif", size, size, seed=1)
    index_library(model, folder, tmp_path / "x", **SMALL)
    with (folder / "a.tif").open("r+b") as file:
        file.seek(1_300_000)
        file.write(bytes(1000))
    path.touch()
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert (report.updated, report.unchanged) == (1, 6)


def test_workers_make_the_same_index(model, folder, tmp_path, monkeypatch):
    one = index_library(model, folder, tmp_path / "one", **SMALL)
    monkeypatch.setattr(module, "CHECKED", 2)  # so that the files are looked at in processes too
    two = index_library(model, folder, tmp_path / "two", **(SMALL | {"workers": 2, "batch_size": 5}))
    same_contents(contents(tmp_path / "one"), contents(tmp_path / "two"))
    assert one.rejected == two.rejected


def test_scenes_with_a_file_for_each_band(model, tmp_path):
    """Red, green and blue are one picture under red's name, whichever of them changes; `only` chooses among the rest."""
    root, location = tmp_path / "library", tmp_path / "index"
    data = np.random.default_rng(0).integers(1, 3000, (4, 60, 60), dtype=np.uint16)

    def write(scene, band, data):
        path = root / scene / f"{scene}_B{band:02}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 46e5, 10, 10)}
        with rasterio.open(path, "w", driver="GTiff", height=60, width=60, count=1, dtype="uint16", **place) as out:
            out.write(data, 1)
        return path

    def index(**more):
        report = index_library(model, root, location, **SMALL | more)
        return report, contents(location)

    for scene in ("S2A_1", "S2A_2"):
        for band in (2, 3, 4, 8):
            write(scene, band, data[band % 4])
    green = root / "S2A_2/S2A_2_B03.tif"
    green.rename(tmp_path / "later.tif")
    write_tif(root / "S2A_1/S2A_1_photo.tif", 40, 40)
    report, first = index()
    assert [note for note in report.notes if note.startswith("scenes with a file for each band: 1;")]
    assert {path for path, _ in first} == {
        "S2A_1/S2A_1_B04.tif",
        "S2A_1/S2A_1_photo.tif",
        *(f"S2A_2/S2A_2_B{n}.tif" for n in ("02", "04", "08")),
    }
    shutil.move(tmp_path / "later.tif", green)
    report, second = index()
    assert (report.files, report.updated, report.removed, report.unchanged) == (1, 1, 2, 2)
    assert {path for path, _ in second} == {f"S2A_{n}/S2A_{n}_B04.tif" for n in (1, 2)} | {"S2A_1/S2A_1_photo.tif"}
    with Library.open(location, encoder=model) as library:
        shown = {p["path"]: library.picture(p) for _, p in second.values()}
    both = [read_image(root / f"S2A_{n}/S2A_{n}_B04.tif", module.ImageSettings()).rgb for n in (1, 2)]
    assert all(np.array_equal(shown[f"S2A_{n}/S2A_{n}_B04.tif"], rgb) for n, rgb in zip((1, 2), both))
    assert (both[0][..., 0] != both[0][..., 1]).any()

    write("S2A_1", 3, data[0])
    report, _ = index()
    assert (report.files, report.updated, report.unchanged) == (1, 1, 2)
    report, third = index(only=["*_B04.tif", "nothing/*"])
    assert (report.files, report.removed, report.unchanged) == (0, 1, 2) and len(third) == 2
    report, again = index()  # a later run keeps it
    assert report.unchanged == 2 and again.keys() == third.keys()
    with pytest.raises(InputError, match=r"no image in it has a name such as \*\.jp2 \(--only\)"):
        index(only=["*.jp2"])
    report, _ = index(only=["*"])
    assert (report.files, report.unchanged) == (1, 2)
    with rasterio.open(root / "S2A_2/S2A_2_B02.tif", "r+") as blue:
        blue.transform = from_origin(6e5, 46e5, 10, 10)
    report, _ = index()
    assert "green and blue beside it are of another grid" in report.rejected[0].reason and report.removed == 1


def test_what_cannot_be_written_ends_the_run(model, folder, tmp_path, monkeypatch):
    """The disk is full at the second write, in the thread that writes; what the first wrote stays."""
    monkeypatch.setattr(module, "FLUSH", 6)
    real, calls = store.Store.upsert, []

    def upsert(self, points):
        calls.append(len(points))
        if len(calls) == 2:
            raise InputError("no space left on the disk")
        real(self, points)

    monkeypatch.setattr(store.Store, "upsert", upsert)
    with pytest.raises(InputError, match="no space left"):
        index_library(model, folder, tmp_path / "x", **SMALL)
    assert len(calls) < 4
    monkeypatch.undo()
    assert len(contents(tmp_path / "x")) == calls[0]
    assert index_library(model, folder, tmp_path / "x", **SMALL).total == 4 + 12


def test_what_workers_get_can_be_sent_to_them(model, folder):
    """Where processes are spawned, as on macOS and, from Python 3.14, on Linux; also once the first batch was read."""
    settings = ImageSettings()
    plan = module.plan_index(folder, None, tile=64, stride=48, settings=settings)
    batches = module.TileBatches(folder, plan.files, 4, model, settings, slice(None))
    first = batches.first_pixels()["pixel_values"]
    again = pickle.loads(pickle.dumps(batches))[0].pixels["pixel_values"]
    assert torch.equal(first, again)


def test_two_processes_share_the_work(matcher, model, folder, tmp_path):
    (folder / "broken.jpg").unlink()
    words = ["index", folder, "--store", tmp_path / "two", "--model", matcher, "--device", "cpu",
             "--tile", 64, "--stride", 48, "--workers", 0, "--batch_size", 3]  # fmt: skip
    run_on_two(search.main, [str(word) for word in words])
    index_library(model, folder, tmp_path / "one", **SMALL)
    same_contents(contents(tmp_path / "one"), contents(tmp_path / "two"))
    with store.open(tmp_path / "two") as index:
        assert len(index.files()) == 5


def index_slowly(matcher, folder, place, told):
    """Index `folder`, saying after each write how much has been added."""
    module.FLUSH, write = 6, module._Writer.write

    def write_and_tell(self, turns):
        write(self, turns)
        told.send(self.report.added)
        time.sleep(0.05)

    module._Writer.write = write_and_tell
    index_library(DualEncoder.from_pretrained(matcher), folder, place, **SMALL)


def test_a_kill_loses_only_what_was_in_flight(model, matcher, folder, tmp_path):
    """SIGKILL in the middle of a large file, three times; then a run to the end."""
    for n in range(12):
        write_tif(folder / f"more_{n}.tif", 150, 200, seed=10 + n)
    held = 0
    for _ in range(3):
        said, told = FORKS.Pipe(duplex=False)
        with forked(index_slowly, matcher, folder, tmp_path / "x", told):
            told.close()
            added = [said.poll(120) and said.recv() for _ in range(5)]
        with store.open(tmp_path / "x") as index:
            assert index.count() >= held + added[-1] - 1, "what was written is there"  # one tile is made again
            held = index.count()
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert 0 < report.added < 13 * 12 + 4 - held + 13
    index_library(model, folder, tmp_path / "fresh", **SMALL)
    same_contents(contents(tmp_path / "x"), contents(tmp_path / "fresh"))
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert report.added == 0 and report.unchanged == 17


def test_a_file_cut_short_leaves_no_tiles_of_it(model, folder, tmp_path):
    whole = (folder / "large.tif").read_bytes()
    (folder / "large.tif").write_bytes(whole[: len(whole) * 2 // 3])
    report = index_library(model, folder, tmp_path / "x", **SMALL)
    assert sorted(bad.file for bad in report.rejected) == ["broken.jpg", "large.tif"]
    assert report.total == 4 and not any(path == "large.tif" for path, _ in contents(tmp_path / "x"))


def test_tiles_without_data_are_left_out(model, tmp_path):
    root = tmp_path / "library"
    path = write_tif(root / "half.tif", 64, 256)
    with rasterio.open(path, "r+") as file:
        file.nodata = 0
        data = np.maximum(file.read(), 1)
        data[:, :, 128:] = 0
        file.write(data)
    write_tif(root / "none.tif", 64, 64)
    with rasterio.open(root / "none.tif", "r+") as file:
        file.nodata = 0
        file.write(np.zeros((3, 64, 64), np.uint8))
    report = index_library(model, root, tmp_path / "x", tile=64, stride=64, workers=0)
    assert (report.added, report.empty, report.files) == (2, 3, 1)
    assert [bad.file for bad in report.rejected] == ["none.tif"] and "no pixel" in report.rejected[0].reason
    assert index_library(model, root, tmp_path / "x", tile=64, stride=64, workers=0).unchanged == 1


def test_attributes(model, folder, tmp_path, monkeypatch):
    table = tmp_path / "labels.csv"
    table.write_text("path,split,sensor\nlarge.tif,test,S2\nfarm/S2A_20210630_0.png,train,\n")
    rows = read_attributes(table)
    index_library(model, folder, tmp_path / "x", attributes=rows, **SMALL)
    with Library.open(tmp_path / "x", encoder=model) as library:
        query = library.text_vectors(["a farm"])[0]
        hits = library.search(query, 50, filter=Filter(attributes={"split": "train"}))
        assert [hit.payload["path"] for hit in hits] == ["farm/S2A_20210630_0.png"]
        assert hits[0].payload["attributes"] == {"folder": "farm", "split": "train"}
    rows["large.tif"]["sensor"] = "L8"  # a changed label reaches the index although the image did not change

    def vectors():
        return {key: vector.tobytes() for key, (vector, _) in contents(tmp_path / "x").items()}

    before = vectors()
    report = index_library(model, folder, tmp_path / "x", attributes=rows, **SMALL)
    assert (report.amended, report.unchanged, report.added, report.removed) == (1, 5, 0, 0) and vectors() == before
    assert {p["attributes"].get("sensor") for _, p in contents(tmp_path / "x").values()} == {"L8", None}
    # A later run that names none keeps them, and encodes nothing anew; an empty table takes them away.
    assert index_library(model, folder, tmp_path / "x", **SMALL).amended == 0
    touched = folder / "farm" / "S2A_20210630_0.png"
    os.utime(touched, ns=(10**18, 10**18))
    assert index_library(model, folder, tmp_path / "x", **SMALL).added == 0
    read = []
    monkeypatch.setattr(module, "content_hash", lambda *paths: read.append(paths) or content_hash(*paths))
    index_library(model, folder, tmp_path / "x", **SMALL)
    assert [Path(path).name for paths in read for path in paths] == ["broken.jpg"], (
        "the time of the touched one is known now"
    )
    kept = {p["attributes"].get("split") for _, p in contents(tmp_path / "x").values()}
    assert kept == {"test", "train", None}
    report = index_library(model, folder, tmp_path / "x", attributes={}, **SMALL)
    assert (report.amended, report.added) == (2, 0)
    assert {p["attributes"].get("split") for _, p in contents(tmp_path / "x").values()} == {None}
    wrong = [("path\nx\n", "header"), ("path,a b\nx,1\n", "a b"), ("path,a\nx\n", "line 2")]
    for text, word in [*wrong, ("path,time\nx,1\n", "'time'.*rename")]:
        table.write_text(text)
        with pytest.raises(InputError, match=word):
            read_attributes(table)
    table.write_text("path,label,,\nfarm\\S2A_20210630_0.png,port,,\nlarge.tif,sea,,\nlarge.tif,sea,,\n,,,\n")
    made = index_library(model, folder, tmp_path / "z", attributes=read_attributes(table), **SMALL)
    assert made.unknown == [], "a spreadsheet's empty columns, and a path of Windows"
    table.write_text("path,label\nlarge.tif,sea\nlarge.tif,port\n")
    with pytest.raises(InputError, match=r"large\.tif stands in two rows"):
        read_attributes(table)
    with pytest.raises(InputError, match="none of the 1 images"):
        index_library(model, folder, tmp_path / "y", attributes={"nowhere.tif": {"a": "b"}}, **SMALL)
    assert not (tmp_path / "y").exists()
    # Of a catalogue the images that are there count; its column of paths may stand anywhere.
    table.write_text("label,image_path\nport,farm/S2A_20210630_0.png\nport,farm/nowhere.png\n")
    made = index_library(model, folder, tmp_path / "y", attributes=read_attributes(table), **SMALL)
    assert made.unknown == ["farm/nowhere.png"] and made.blank == 0
    assert (
        next(p for _, p in contents(tmp_path / "y").values() if "S2A_20210630_0" in p["path"])["attributes"]["label"]
        == "port"
    )


def test_attributes_wait_for_a_file_that_cannot_be_read(model, folder, tmp_path):
    rows = {"large.tif": {"split": "test"}, "broken.jpg": {"split": "val"}}
    index_library(model, folder, tmp_path / "x", attributes=rows, **SMALL)

    def waiting():
        with store.open(tmp_path / "x") as index:
            return index.record["waiting"]

    assert waiting() == {"broken.jpg": {"split": "val"}}
    whole = (folder / "large.tif").read_bytes()
    for cut in (20, len(whole) * 2 // 3):  # seen when planning, and when reading
        (folder / "large.tif").write_bytes(whole[:cut])
        index_library(model, folder, tmp_path / "x", **SMALL)
        assert waiting() == rows
    (folder / "large.tif").write_bytes(whole)
    (folder / "broken.jpg").unlink()
    index_library(model, folder, tmp_path / "x", **SMALL)
    assert waiting() == {}
    assert {
        p["attributes"].get("split") for (path, _), (_, p) in contents(tmp_path / "x").items() if path == "large.tif"
    } == {"test"}


def test_attributes_outlive_a_kill(model, folder, tmp_path, monkeypatch):
    rows = {"large.tif": {"split": "test"}, "farm/S2A_20210630_0.png": {"split": "val"}}

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Writer, "finish", killed)
        patch.setattr(module._Writer, "write", lambda self, turn: None)
        index_library(model, folder, tmp_path / "x", attributes=rows, **SMALL)
    index_library(model, folder, tmp_path / "x", **SMALL)
    found = {path: p["attributes"].get("split") for (path, _), (_, p) in contents(tmp_path / "x").items()}
    assert found["large.tif"] == "test" and found["farm/S2A_20210630_0.png"] == "val"
    # A row that the next table has no more loses its values, though the run that was to take them is killed before.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.Store, "amend", lambda *_: killed(None))
        index_library(model, folder, tmp_path / "x", attributes={"large.tif": {"split": "new"}}, **SMALL)
    index_library(model, folder, tmp_path / "x", **SMALL)
    found = {path: p["attributes"].get("split") for (path, _), (_, p) in contents(tmp_path / "x").items()}
    assert {path: split for path, split in found.items() if split} == {"large.tif": "new"}
    with store.open(tmp_path / "x") as index:
        assert not index.record["waiting"]
    (tmp_path / "t.csv").write_text("path, sensor\na.tif , S2\n")
    assert read_attributes(tmp_path / "t.csv") == {"a.tif": {"sensor": "S2"}}


def test_another_limit_of_pixels_is_the_same_index(model, folder, tmp_path):
    index_library(model, folder, tmp_path / "x", **SMALL)
    for limit in (2**27, 2**26):
        settings = ImageSettings(max_pixels=limit)
        assert index_library(model, folder, tmp_path / "x", settings=settings, **SMALL).unchanged == 5
        with Library.open(tmp_path / "x", encoder=model) as library:
            assert library.settings.max_pixels == 2**27, "the largest, so that every picture can be shown again"
    with pytest.raises(InputError, match="other settings"):
        index_library(model, folder, tmp_path / "x", settings=ImageSettings(bands="bgr", max_pixels=2**28), **SMALL)


def test_refusals_leave_all_as_it_was(model, encoder, folder, tmp_path):
    index_library(model, folder, tmp_path / "x", **SMALL)
    before = contents(tmp_path / "x")
    other = encoder(image_tower="full", seed=5)
    other.save_pretrained(tmp_path / "other")
    cases = [
        (dict(model=DualEncoder.from_pretrained(tmp_path / "other")), "fingerprint"),
        (dict(tile=32, stride=32), "tile"),
        (dict(settings=ImageSettings(stretch="percentile")), "other settings"),
        (dict(root=shutil.copytree(folder, tmp_path / "copy")), "--moved"),
        (dict(root=tmp_path / "nowhere"), "no such folder"),
        (dict(stride=65), "--stride"),
    ]
    for changed, word in cases:
        given = {"model": model, "root": folder, **SMALL} | changed
        with pytest.raises(InputError, match=word):
            index_library(given.pop("model"), given.pop("root"), tmp_path / "x", **given)
    same_contents(before, contents(tmp_path / "x"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of its 1 images"):
        index_library(model, empty, tmp_path / "y", **SMALL)
    assert not (tmp_path / "y").exists()
    index_library(model, tmp_path / "copy", tmp_path / "x", moved=True, **SMALL)
    with Library.open(tmp_path / "x", encoder=model) as library:
        assert library.root == (tmp_path / "copy").resolve()


@pytest.mark.skipif(not GEOTIFFS.is_dir(), reason="the real rasters of ../shared/data are not here")
def test_real_rasters_land_where_rasterio_says(model, tmp_path):
    report = index_library(model, GEOTIFFS, tmp_path / "x", tile=128, stride=96, workers=0)
    assert report.rejected == [] and report.files == len(list(GEOTIFFS.glob("*.tif")))
    checked = 0
    for (path, window), (_, payload) in contents(tmp_path / "x").items():
        with rasterio.open(GEOTIFFS / path) as source:
            if source.crs is None or source.gcps[0]:
                continue
            column, row, width, height = window or (0, 0, source.width, source.height)
            bounds = rasterio.windows.bounds(rasterio.windows.Window(column, row, width, height), source.transform)
            np.testing.assert_allclose(payload["extra"]["bounds"], bounds)
            box = transform_bounds(source.crs, "EPSG:4326", *bounds)
            np.testing.assert_allclose(payload["footprint"], box, atol=2e-5)
            checked += 1
    assert checked > 20


# ----------------------------------------------------------------------------------------------------
# Use


@pytest.fixture
def library(model, folder, tmp_path):
    index_library(model, folder, tmp_path / "x", **SMALL)
    with Library.open(tmp_path / "x", encoder=model) as opened:
        yield opened


def test_queries(library):
    words = library.text_vectors(["a farm", "一片农田"])
    for text, made, language in zip(("a farm", "一片农田"), words, ("en", "zh")):
        prompts = library.model.embed_texts([form.format(text) for form in TEMPLATES[language]]).numpy()
        np.testing.assert_allclose(made, unit(prompts.mean(0)), atol=1e-6)
    sentence = library.text_vectors(["There is a farm ."])
    np.testing.assert_allclose(sentence, library.model.embed_texts(["There is a farm ."]).numpy(), atol=1e-6)
    both = library.text_vectors(["a farm"], template="an aerial image of {}", context="in winter")
    np.testing.assert_allclose(
        both, library.model.embed_texts(["an aerial image of a farm, in winter"]).numpy(), atol=1e-6
    )
    np.testing.assert_allclose(library.query(["a farm", "一片农田"]), unit(words.mean(0)), atol=1e-6)
    np.testing.assert_allclose(
        library.query(["a farm"], without=["一片农田"]), unit(words[0] - 0.5 * words[1]), atol=1e-6
    )
    path = library.root / "farm/S2A_20210630_0.png"
    rgb = read_image(path).rgb
    picture = library.query(like=[rgb])
    hit = library.search(picture, 1)[0]
    assert hit.payload["path"] == "farm/S2A_20210630_0.png" and hit.score == pytest.approx(1, abs=1e-5)
    assert np.array_equal(library.picture(hit.payload), rgb)
    mixed = library.query(["a farm"], like=[rgb], like_weight=0.3)
    np.testing.assert_allclose(mixed, unit(0.7 * words[0] + 0.3 * picture), atol=1e-6)
    for call, word in (
        (lambda: library.query(), "words"),
        (lambda: library.query(["a farm"], without=["a farm"], without_weight=1.0), "cancels"),
        (lambda: library.text_vectors(["a"], template="no place"), "template"),
    ):
        with pytest.raises(InputError, match=word):
            call()


def test_neighbours_of_one_place_are_left_out(library):
    query = library.text_vectors(["a farm"])[0]
    every = library.search(query, 16, neighbours=True)
    assert len(every) == 16
    kept = library.search(query, 16)
    for n, hit in enumerate(kept):
        assert not any(same_place(hit.payload, other.payload) for other in kept[:n])
    assert 4 < len(kept) < 16
    best = [hit for n, hit in enumerate(every) if not any(same_place(hit.payload, o.payload) for o in every[:n])]
    assert (
        kept[0].id == every[0].id and {hit.id for hit in kept} <= {hit.id for hit in every} and len(best) <= len(kept)
    )

    def point(**changed):
        return {"path": "a", "window": None, "footprint": [0, 0, 1, 1], "time": "2020", "extra": {}} | changed

    assert same_place(point(), point(path="b", footprint=[0.5, 0, 1.5, 1]))
    assert not same_place(point(), point(path="b", time="2021")), "another date is another answer"
    assert not same_place(point(), point(path="b", footprint=[0.9, 0, 1.9, 1]))
    assert same_place(point(footprint=[179.5, 0, -179.5, 1]), point(path="b", footprint=[179.6, 0, -179.4, 1]))
    assert same_place(point(footprint=[179.9, 0, -179.9, 0.2]), point(path="b", footprint=[-179.99, 0, -179.8, 0.2]))
    diamond = [[1, 0], [2, 1], [1, 2], [0, 1], [1, 0]]  # a tile that is turned by 45 degrees, and its neighbour
    beside = [[x + 1, y + 1] for x, y in diamond]
    one = point(footprint=[0, 0, 2, 2], extra={"polygon": diamond})
    assert not same_place(one, point(path="b", footprint=[1, 1, 3, 3], extra={"polygon": beside}))
    assert same_place(one, point(path="b", footprint=[0, 0, 2, 2], extra={"polygon": diamond}))
    polar = [[lon, 89.5] for lon in (-135, -45, 45, 135, -135)]  # round a pole
    pole = point(footprint=[-180, 89.5, 180, 90], extra={"polygon": polar})
    assert same_place(pole, pole | {"path": "b"})
    assert same_place(point(window=[0, 0, 10, 10]), point(window=[5, 0, 10, 10]))
    assert not same_place(point(window=[0, 0, 10, 10]), point(window=[9, 0, 10, 10]))
    assert not same_place(point(footprint=None), point(path="b", footprint=None))
    assert same_place(point(path="x/a", time=None), point(path="x/b", time=None))
    assert not same_place(point(path="2020/a", time=None), point(path="2023/a", time=None)), "folders may be dates"


def test_a_picture_outside_the_library_is_refused(library):
    with pytest.raises(InputError, match="not below"):
        library.picture({"path": "../../etc/passwd", "window": None})
    for path in ("/etc/passwd", "farm/../../x.png", "../library2/a.png"):
        with pytest.raises(InputError, match="not below"):
            library.picture({"path": path, "window": None})


def test_a_linked_file_is_shown(library, tmp_path, monkeypatch):
    (library.root / "large.tif").rename(tmp_path / "elsewhere.tif")
    (library.root / "large.tif").symlink_to(tmp_path / "elsewhere.tif")
    assert library.picture({"path": "large.tif", "window": (0, 0, 9, 9)}).shape == (9, 9, 3)
    monkeypatch.chdir(library.root)
    library.root = Path(".")
    assert library.picture({"path": "large.tif", "window": (0, 0, 9, 9)}).shape == (9, 9, 3)
    with pytest.raises(InputError, match="not below"):
        library.picture({"path": "../elsewhere.tif", "window": None})


def test_attributes_do_not_overwrite_a_result():
    payload = {"path": "a.tif", "window": None, "footprint": None, "time": "2020-06-30", "extra": {}}
    payload["attributes"] = {"time": "late", "query": "x", "path": "b", "score": "9", "sensor": "S2"}
    row = result_row(1, store.Hit("id", 0.5, payload))
    assert (row["time"], row["path"], row["score"], row["sensor"]) == ("2020-06-30", "a.tif", 0.5, "S2")
    assert "query" not in row


def test_sigmoid_gives_its_own_probabilities(folder, tmp_path):
    clip = DualEncoder.from_pretrained(write_clip(tmp_path / "siglip", "siglip"))
    index_library(clip, folder, tmp_path / "x", **SMALL)
    with Library.open(tmp_path / "x") as library:
        made = clip.embed_texts([form.format("a farm") for form in TEMPLATES["en"]]).numpy()
        np.testing.assert_allclose(library.text_vectors(["a farm"])[0], unit(made.mean(0)), atol=1e-6)
        payloads, vectors = library.everything()
        assert len(payloads) == 16 and [p["path"] for p in payloads] == sorted(p["path"] for p in payloads)
        classes = {"farm": ["a farm", "a field"], "harbour": ["a harbour"]}
        scores = library.classify(vectors, classes)
        words = np.stack([unit(library.text_vectors(phrases).mean(0)) for phrases in classes.values()])
        logits = torch.from_numpy(vectors @ words.T) * clip.logit_scale.exp() + clip.logit_bias
        np.testing.assert_allclose(scores, torch.sigmoid(logits).detach().numpy(), atol=1e-5)
    shutil.move(tmp_path / "siglip", tmp_path / "moved")
    with pytest.raises(InputError, match="no model here"):
        Library.open(tmp_path / "x")
    with Library.open(tmp_path / "x", model=str(tmp_path / "moved")) as library:
        assert library.index.count() == 16


def test_classes(tmp_path):
    sizes = {"ucm": 21, "aid": 30, "eurosat": 10, "resisc45": 45}
    assert {name: len(read_classes(name)) for name in sizes} == sizes
    assert read_classes("residential, park，工业区") == {name: [name] for name in ("residential", "park", "工业区")}
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"a": "an a", "b": ["b", "bee"]}))
    assert read_classes(str(path)) == {"a": ["an a"], "b": ["b", "bee"]}
    for text in ('{"a": []}', '{"a": 1, "b": 2}', "[]", '"x"', '["one"]'):
        path.write_text(text)
        with pytest.raises(InputError):
            read_classes(str(path))
    path.write_text('["a", "b", {"c": "a c"}]')
    with pytest.raises(InputError, match="a c"):
        read_classes(str(path))
    with pytest.raises(InputError, match="two classes"):
        read_classes("forest")


# ----------------------------------------------------------------------------------------------------
# Two dates


def test_places_of_two_dates_are_matched(model, tmp_path):
    for date, count in (("before", 4), ("after", 3)):
        for n in range(count):
            write_tif(tmp_path / date / f"{date}_{n}.tif", 64, 64, seed=n, origin=(500000 + 2000 * n, 4600000))
        index_library(model, tmp_path / date, tmp_path / f"{date}.index", **SMALL)
    write_tif(tmp_path / "far/a.tif", 64, 64, origin=(300000, 4600000))
    write_tif(tmp_path / "photo/a.tif", 64, 64, crs=None)
    write_tif(tmp_path / "coarse/a.tif", 32, 32, pixel=20.0)
    write_tif(tmp_path / "fine/a.tif", 64, 64, pixel=5.0)
    for n in range(2):
        write_tif(tmp_path / f"twice/{n}.tif", 64, 64, seed=n, when=f"202{n}:06:30 10:15:00")
    for name in ("far", "photo", "coarse", "fine", "twice"):
        index_library(model, tmp_path / name, tmp_path / f"{name}.index", **SMALL)
    opened = {
        name: Library.open(tmp_path / f"{name}.index", encoder=model)
        for name in ("before", "after", "far", "photo", "coarse", "fine", "twice")
    }
    notes = match_places(opened["twice"], opened["after"]).notes
    assert any("before: 2 of 2 images have the outline of another" in note for note in notes)
    assert not any("outline" in note and "after" in note for note in notes)
    pairs = match_places(opened["before"], opened["after"])
    assert [p["path"] for p in pairs.before] == [f"before_{n}.tif" for n in range(3)]
    assert [p["path"] for p in pairs.after] == [f"after_{n}.tif" for n in range(3)]
    np.testing.assert_allclose(pairs.before_vectors, pairs.after_vectors, atol=1e-6)
    assert any("1 of 4 places have no counterpart" in note for note in pairs.notes)
    assert any("only 3 places match, too few" in note for note in pairs.notes)
    notes = match_places(opened["before"], opened["coarse"]).notes
    assert any("differ in resolution" in note and "10.00 m" in note and "20.00 m" in note for note in notes)
    # Half of a picture missing is no change of its place.
    for side, n, columns in (("before", 1, 40), ("after", 2, 30)):
        with rasterio.open(tmp_path / side / f"{side}_{n}.tif", "r+") as file:
            file.nodata = 0
            data = np.maximum(file.read(), 1)
            data[:, :, :columns] = 0
            file.write(data)
        opened[side].index.close()
        again = {"settings": ImageSettings(bands="bgr")} if side == "after" else {}
        location = tmp_path / f"{side}_again.index"
        index_library(model, tmp_path / side, location, **SMALL, **again)
        opened[side] = Library.open(location, encoder=model)
    pairs = match_places(opened["before"], opened["after"])
    assert [p["path"] for p in pairs.before] == ["before_0.tif", "before_2.tif"], "40 of 64 columns are over half"
    assert len(pairs.before_vectors) == len(pairs.after_vectors) == 2
    assert any("before: 1 of 3 matched places hold data on less than 50%" in note for note in pairs.notes)
    assert not any("after: 1 of 3 matched" in note for note in pairs.notes)
    assert any("bands auto and bgr" in note for note in pairs.notes)
    for other, word in (
        ("far", "no pair of tiles overlaps by 50%"),
        ("fine", f"pixels are 10.00 m and 5.00 m: index the later images with --tile {2 * SMALL['tile']}"),
        ("photo", "photo.index: none of its 1 images has a geo"),
    ):
        with pytest.raises(InputError, match=word):
            match_places(opened["before"], opened[other])
    for library in opened.values():
        library.index.close()


def test_tiles_that_a_cloud_elsewhere_in_their_scene_changed_are_told_of(model, tmp_path):
    land = np.random.default_rng(0).integers(500, 1500, (3, 128, 128))
    for date, cloudy in (("before", False), ("after", True)):
        (tmp_path / date).mkdir()
        for n in range(2):
            data = land.copy()
            if cloudy and n:
                data[:, :64, :64] = 9000
            with rasterio.open(
                tmp_path / date / f"{n}.tif", "w", driver="GTiff", width=128, height=128, count=3, dtype="uint16",
                crs="EPSG:32633", transform=from_origin(500000 + 3000 * n, 4600000, 10, 10),
            ) as file:  # fmt: skip
                file.write(data.astype(np.uint16))
        for stretch in ("auto", "reflectance"):
            how = {"settings": ImageSettings(stretch=stretch)}
            index_library(model, tmp_path / date, tmp_path / f"{date}_{stretch}", tile=64, stride=64, workers=0, **how)
    for stretch, told_of in (("auto", ["4 of 8 places were stretched by other values"]), ("reflectance", [])):
        opened = [Library.open(tmp_path / f"{date}_{stretch}", encoder=model) for date in ("before", "after")]
        notes = [note for note in match_places(*opened).notes if note.key == "stretch"]
        assert [note[: len(said)] for note, said in zip(notes, told_of)] == told_of and len(notes) == len(told_of)
        for library in opened:
            library.index.close()


def test_places_without_a_georeference_are_matched_by_name(model, tmp_path):
    """LEVIR-CD, SECOND, S2Looking and others: A/ and B/ (or im1/ and im2/) of pictures with the same names."""
    sizes = {
        "A": {"train_1.png": 64, "train_2.png": 64, "big.png": 160, "grown.png": 64, "finer.png": 224},
        "B": {"train_2.png": 64, "big.png": 160, "grown.png": 160, "train_3.png": 64, "finer.png": 160},
        "C": {"other.png": 64},
    }
    opened = {}
    for folder, pictures in sizes.items():
        for name, side in pictures.items():
            (tmp_path / folder / "deep").mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(side).integers(1, 255, (side, side, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / folder / "deep" / name)
        index_library(model, tmp_path / folder, tmp_path / f"{folder}.index", **SMALL)
        opened[folder] = Library.open(tmp_path / f"{folder}.index", encoder=model)
    pairs = match_places(opened["A"], opened["B"])
    assert [(p["path"], p["window"]) for p in pairs.before] == [(p["path"], p["window"]) for p in pairs.after]
    assert {p["path"] for p in pairs.before} == {"deep/big.png", "deep/train_2.png"}
    assert sum(p["path"] == "deep/big.png" for p in pairs.before) > 1, "every tile of it"
    np.testing.assert_allclose(pairs.before_vectors, pairs.after_vectors, atol=1e-6)
    assert "no image has a georeference: images of one path and size" in pairs.notes[0]
    # A window of a picture of another size is other ground.
    alone = 2 + sum(p["path"] == "deep/finer.png" for p in opened["A"].everything()[0])
    assert any(f"before: {alone} of" in note and "no counterpart" in note for note in pairs.notes) and alone > 6
    with pytest.raises(
        InputError, match=r"C.index \(deep/other.png, ...\) no pair of tiles has the same path and size"
    ):
        match_places(opened["A"], opened["C"])
    for library in opened.values():
        library.index.close()


def test_a_table_without_a_header_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("101.jpg,airplane\n102.jpg,harbour\n")
    with pytest.raises(InputError, match=r"labels\.csv: line 1: '101\.jpg' is an image; expected a header"):
        read_attributes(tmp_path / "labels.csv")


def a_hit(name, path, footprint=None, window=None):
    return Hit(name, 1.0, {"path": path, "window": window, "footprint": footprint, "time": "2020", "extra": {}})


def test_more_is_asked_for_where_the_best_show_one_place():
    hits = [a_hit(str(n), "a" if n < 9 else f"b{n}") for n in range(12)]
    library = Library.__new__(Library)
    library.index = SimpleNamespace(search=lambda vector, k, filter, exact: hits[:k])
    assert [hit.id for hit in library.search(None, 2)] == ["0", "9"]


def test_neighbours_across_the_antimeridian_are_left_out():
    hits = [a_hit("0", "a", [179.9, 0, -179.9, 0.2]), a_hit("1", "b", [-179.99, 0, -179.8, 0.2])]
    assert [hit.id for hit in module._places_once(hits, 2)] == ["0"]


def test_places_shown_once_are_those_of_every_pair_looked_at():
    rng = np.random.default_rng(0)
    hits = []
    for n in range(300):
        c, r = rng.integers(0, 12, 2) * 8
        lon, lat = 179.9 + 0.02 * rng.integers(0, 10), 0.02 * rng.integers(0, 10)
        place = [lon - 360 * (lon > 180), lat, lon + 0.025 - 360 * (lon + 0.025 > 180), lat + 0.025]
        hits.append(
            a_hit(str(n), f"{n % 9}", place if n % 4 else None, [int(c), int(r), 16, 16] if n % 9 < 7 else None)
        )
    kept: list[Hit] = []
    for hit in hits:
        if not any(module.same_place(hit.payload, other.payload) for other in kept):
            kept.append(hit)
    assert module._places_once(hits, 300) == kept and 20 < len(kept) < 200
    assert module._places_once(hits, 20) == kept[:20]


def test_of_equal_files_the_one_with_the_longest_same_end_was_renamed():
    def planned(path):
        return module.PlannedFile(path, 1, 0, "x", [], {})

    done = {f"old/{side}/{n}.png": (1, 0, "x") for side in "ab" for n in range(3)}
    files = [planned(f"new/{side}/{n}.png") for side in "ba" for n in (2, 0, 1)] + [planned("new/c/9.png")]
    renamed = module.renamed_files(files, done, dict.fromkeys(file.path for file in files), {})
    assert {before: file.path for before, file in renamed.items()} == {
        path: path.replace("old", "new") for path in done
    }  # and nothing is left for the last one


def test_where_is_latitude_and_longitude():
    hit = a_hit("0", "a", [179.0, -18.0, -179.5, -17.0])
    hit.payload["attributes"] = {}
    assert result_row(1, hit)["where"] == "-17.50000, 179.75000"


def test_the_hash_of_a_large_file_sees_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HASHED", 4 << 20)
    path, seen = tmp_path / "large", set()
    for change in (b"", b"x"):
        path.write_bytes(bytes((6 << 20) - len(change)) + change)
        seen.add(module.content_hash(path))
    assert len(seen) == 2
