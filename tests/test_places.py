"""places.py: outlines as GeoJSON, pairs, changes, ground area by class, maps."""

import json
import math

import numpy as np
import pytest
import shapely
from PIL import Image
from rasterio.features import is_valid_geom
from rasterio.warp import transform as warp_points
from shapely.geometry import mapping, shape

import places
from config import InputError
from places import (
    change_scores,
    feature_collection,
    land_use_areas,
    map_figure,
    match_footprints,
    read_regions,
    shares_figure,
)

# rasterio warns of its own use of affine, matplotlib where no font has Chinese characters.
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore:Glyph")
COLOURS = {"forest 林": "#2f7d4f", "water": "#2563a8", "a $ b": "#c2562d"}


def box(west, south, east, north):
    return [[west, north], [west, south], [east, south], [east, north], [west, north]]


def turned(lon, lat, side, degrees):
    """A square of `side` degrees of latitude on the ground, turned."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    square = np.array([[-1, 1], [-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2
    return (square @ [[c, s], [-s, c]] / [math.cos(math.radians(lat)), 1] + [lon, lat]).tolist()


def at_pole(x, y, side):
    """A square of metres in the Antarctic polar stereographic projection, as `imagery` gives its corners."""
    xs, ys = [x - side, x - side, x + side, x + side, x - side], [y + side, y - side, y - side, y + side, y + side]
    return [list(point) for point in zip(*warp_points("EPSG:3031", "EPSG:4326", xs, ys))]


def km2(west, south, east, north):
    """Of a box on the WGS 84 ellipsoid: the integral of M N cos(lat) over latitude, by many small steps."""
    e2, steps = 0.00669437999014, 20000
    lat = np.radians(south + (north - south) * (np.arange(steps) + 0.5) / steps)
    strips = 6378.137**2 * (1 - e2) * np.cos(lat) / (1 - e2 * np.sin(lat) ** 2) ** 2
    return strips.mean() * math.radians(north - south) * math.radians(east - west)


# ---------------------------------------------------------------------------------------------- GeoJSON


def geometries(rows):
    made = json.loads(json.dumps(feature_collection(rows), allow_nan=False))
    for feature in made["features"]:
        if feature["geometry"]:
            assert is_valid_geom(feature["geometry"])
            read = shapely.from_geojson(json.dumps(feature["geometry"]))
            assert read.is_valid and abs(shapely.bounds(read)[[0, 2]]).max() <= 180
            assert all(part.exterior.is_ccw for part in shapely.get_parts(read))
    return made, [feature["geometry"] and shape(feature["geometry"]) for feature in made["features"]]


def test_features_lie_in_their_places():
    slanted = turned(13, 52, 0.1, 30)
    rows = [
        {"polygon": slanted[::-1], "footprint": [0, 0, 1, 1], "properties": {"path": "a"}},
        {"polygon": None, "footprint": [10, 20, 11, 22], "properties": {}},
        {"polygon": None, "footprint": None, "properties": {"path": "photo.jpg"}},
    ]
    made, (first, second, third) = geometries(rows)
    assert first.symmetric_difference(shapely.Polygon(slanted)).area < 1e-7
    assert second.equals(shapely.box(10, 20, 11, 22)) and third is None
    assert made["features"][2] == {"type": "Feature", "geometry": None, "properties": {"path": "photo.jpg"}}
    assert made["bbox"] == pytest.approx([10, 20, *np.max(slanted, axis=0)], abs=1e-6)
    assert feature_collection([]) == {"type": "FeatureCollection", "features": []}
    assert "bbox" not in feature_collection(rows[2:])


@pytest.mark.parametrize(
    "row", [{"polygon": box(179, 1, 182, 2)}, {"polygon": box(-181, 1, -178, 2)}, {"footprint": [179, 1, -178, 2]}]
)
def test_features_are_cut_at_the_antimeridian(row):
    made, (cut,) = geometries([row])
    assert cut.equals(shapely.MultiPolygon([shapely.box(179, 1, 180, 2), shapely.box(-180, 1, -178, 2)]))
    assert made["bbox"] == [179, 1, -178, 2]


def test_a_ring_around_the_pole_holds_it():
    made, (cap,) = geometries([{"polygon": at_pole(0, 0, 100_000)}])
    assert made["bbox"][::2] == [-180, 180] and made["bbox"][1] == -90
    assert all(cap.contains(shapely.Point(lon, -89.9)) for lon in (-170, -60, 1, 100))
    _, (beside,) = geometries([{"polygon": at_pole(300_000, 0, 100_000)}])
    assert not beside.intersects(shapely.Point(0, -90)) and beside.contains(shapely.Point(90, -87.3))
    assert geometries([{"polygon": box(-180, -90, 180, 90)}])[1][0].area == 360 * 180


# ---------------------------------------------------------------------------------------------- regions


def write(tmp_path, data):
    (tmp_path / "r.geojson").write_text(data if isinstance(data, str) else json.dumps(data))
    return tmp_path / "r.geojson"


def feature(geometry, properties=None, **more):
    return {"type": "Feature", "geometry": geometry, "properties": properties, **more}


SQUARE = {"type": "Polygon", "coordinates": [box(0, 0, 2, 2)]}


def test_regions_and_their_names(tmp_path):
    hole = {"type": "Polygon", "coordinates": [box(0, 0, 4, 4), box(1, 1, 2, 2)]}
    two = {"type": "MultiPolygon", "coordinates": [[box(0, 0, 1, 1)], [box(5, 5, 6, 6)]]}
    bow = {"type": "Polygon", "coordinates": [[[0, 0], [2, 2], [2, 0], [0, 2], [0, 0]]]}
    features = [feature(hole, {"NAME": "城东"}), feature(two, {"id": 7}), feature(bow), feature(None, {"name": "none"})]
    features += [feature(SQUARE, {"name": None}, id="x1")]
    features += [
        feature(SQUARE, {"GID_1": "DEU.3_1", "NAME_1": "Berlin", "id": 3}),
        feature(SQUARE, {"NUTS_NAME": "Wien"}),
    ]
    found = read_regions(write(tmp_path, {"type": "FeatureCollection", "features": features}))
    assert [name for name, _ in found] == ["城东", "7", "region 3", "x1", "Berlin", "Wien"]
    assert [region.area for _, region in found] == [15, 2, 2, 4, 4, 4] and all(region.is_valid for _, region in found)
    for parts, area in (
        ([box(0, 0, 2, 2), box(1, 1, 3, 3)], 7),  # as buffers that were not dissolved
        ([box(0, 0, 2, 2), box(0.5, 0.5, 1, 1)], 4),
        ([box(0, 0, 2, 2), box(0, 0, 2, 2)], 4),
    ):
        several = {"type": "MultiPolygon", "coordinates": [[ring] for ring in parts]}
        assert read_regions(write(tmp_path, several))[0][1].area == area
    assert [name for name, _ in read_regions(write(tmp_path, feature(SQUARE, {"name": "a"})))] == ["a"]
    assert read_regions(write(tmp_path, SQUARE))[0][0] == "region 1"
    text = "\ufeff" + json.dumps(
        SQUARE | {"crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::4490"}}}
    )
    assert read_regions(write(tmp_path, text))[0][1].area == 4


UTM = {"type": "Polygon", "coordinates": [box(500000, 4600000, 500100, 4600100)]}
FIRST_GOOD = [feature(SQUARE), feature(UTM)]


def test_heights_and_measures_of_regions_are_passed_over(tmp_path):
    ring = [[0, 0, None], [2, 0, 5, 7], [2, 2], [0, 2, 1], [0, 0]]
    found = read_regions(write(tmp_path, {"type": "Polygon", "coordinates": [ring]}))
    assert found[0][1].area == 4
    ring[1][0] = 10**400
    with pytest.raises(InputError, match="no list of"):
        read_regions(write(tmp_path, {"type": "Polygon", "coordinates": [ring]}))


@pytest.mark.parametrize(
    "data, words",
    [
        ("{", ["not JSON"]),
        ("[1]", ["is not a GeoJSON"]),
        ({"type": "FeatureCollection", "features": {}}, ["is not a GeoJSON"]),
        ({"type": "FeatureCollection", "features": [3]}, ["feature 0"]),
        ({"type": "FeatureCollection", "features": []}, ["no polygons"]),
        ({"type": "FeatureCollection", "features": FIRST_GOOD}, ["feature 1", "4600100", "WGS 84"]),
        (SQUARE | {"crs": {"properties": {"name": "EPSG:32618"}}}, ["crs", "WGS 84"]),
        (SQUARE | {"crs": {"properties": {"name": "EPSG:4807"}}}, ["from Greenwich", "WGS 84"]),  # grads from Paris
        (feature({"type": "LineString", "coordinates": [[0, 0], [1, 1]]}), ["feature 0", "LineString", "Polygon"]),
        (feature({"type": "Polygon", "coordinates": []}), ["no list of rings"]),
        (feature({"type": "Polygon", "coordinates": [[[0, 0], [1, "x"], [1, 1], [0, 0]]]}), ["[longitude, latitude]"]),
        (feature({"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1], [0, 1]]]}), ["not closed"]),
        (feature({"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [2, 0], [0, 0]]]}), ["no area"]),
        (feature({"type": "Polygon"}), ["no list of rings"]),
    ],
)
def test_bad_regions_are_told(tmp_path, data, words):
    path = write(tmp_path, data)
    with pytest.raises(InputError) as error:
        read_regions(path)
    assert all(word in str(error.value) for word in [str(path), *words])


def test_missing_region_file(tmp_path):
    for path in (tmp_path / "none.geojson", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_regions(path)


# ---------------------------------------------------------------------------------------------- two dates


def test_pairs_are_one_to_one_and_the_best():
    before = [box(0, 0, 1, 1), box(0.5, 0, 1.5, 1), box(50, 0, 51, 1)]
    after = [box(0.45, 0, 1.45, 1), box(0.1, 0, 1.1, 1), box(80, 0, 81, 1)]
    pairs = match_footprints(before, after)
    assert [(i, j) for i, j, _ in pairs] == [(0, 1), (1, 0)]
    assert [iou for *_, iou in pairs] == pytest.approx([0.9 / 1.1, 0.95 / 1.05])
    assert match_footprints(before, after, 0.85) == pairs[1:]
    assert match_footprints([], after) == match_footprints(before, []) == []
    assert match_footprints([box(0, 0, 1, 1)], [box(1, 0, 2, 1)], 0.0) == []


@pytest.mark.parametrize("turn", [-360, 0])
def test_pairs_across_the_antimeridian_slanted_and_at_the_pole(turn):
    before = [box(179.0, 0, 180.2, 1), turned(5, 60, 0.1, 0), at_pole(0, 0, 1000), box(-180.1, 5, -179.2, 6)]
    after = [
        box(179.2 + turn, 0, 180.4 + turn, 1),
        turned(5, 60, 0.1, 45),
        at_pole(10, 0, 1000),
        box(-180, 5, -179.2, 6),
    ]
    pairs = match_footprints(before, after)
    assert [(i, j) for i, j, _ in pairs] == [(i, i) for i in range(4)]
    assert pairs[0][2] == pytest.approx(1 / 1.4) and pairs[3][2] == pytest.approx(0.8 / 0.9)
    assert pairs[1][2] == pytest.approx(1 / math.sqrt(2), abs=1e-3)  # of a square and the same turned by 45 degrees


def test_many_pairs_of_overlapping_tiles():
    before = np.array(
        [box(170 + 0.01 * i, 0.01 * j, 170.02 + 0.01 * i, 0.01 * j + 0.02) for i in range(90) for j in range(90)]
    )
    order = np.random.default_rng(0).permutation(len(before))
    pairs = match_footprints(before, before[order] + 1e-4)
    assert [order[j] for _, j, _ in pairs] == list(range(len(before)))


def season(seed=0, n=400, queries=3):
    """(scores before, scores after, unit vectors, kinds): two kinds of land, which a season moves by 0.05 and -0.05."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(n) % 4 == 0
    vectors = rng.normal(0, 0.1, (n, 16)) + np.where(kinds[:, None], np.eye(16)[0], np.eye(16)[1])
    before = rng.uniform(0.1, 0.3, (queries, n))
    after = before + np.where(kinds, 0.05, -0.05) + rng.normal(0, 0.006, before.shape)
    return before, after, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), kinds


def test_a_shift_of_all_is_no_change_and_planted_ones_are():
    rng = np.random.default_rng(1)
    before = rng.uniform(0.1, 0.3, (2, 500))
    after = before + 0.2 + rng.normal(0, 0.01, before.shape)
    z = change_scores(before, after)
    assert abs(z).max() < 5 and z.std() == pytest.approx(1, abs=0.1)
    planted = [3, 77, 400]
    after[1, planted] += 0.15
    z = change_scores(before, after)
    assert set(np.argsort(-z[1])[:3]) == set(planted) and z[1, planted].min() > 8 and abs(z[0]).max() < 5


def test_a_season_of_one_kind_needs_neighbours():
    before, after, vectors, kinds = season()
    assert np.median(change_scores(before, after)[:, kinds]) > 5
    assert abs(change_scores(before, after, vectors)).max() < 6
    after[1, [8, 9]] += [-0.1, 0.1]  # what the season does to the other kind, and back
    z = change_scores(before, after, vectors)
    assert set(np.argsort(-abs(z[1]))[:2]) == {8, 9} and z[1, 8] < -8 and z[1, 9] > 8


def test_change_of_few_places_and_of_none():
    assert change_scores(np.zeros((2, 0)), np.zeros((2, 0))).shape == (2, 0)
    for vectors in (None, np.ones((1, 4))):
        assert (change_scores([[0.1]], [[0.9]], vectors) == 0).all()
    same = np.full((1, 9), 0.2)
    after = same.copy()
    after[0, 4], after[0, 5] = 0.201, 0.3
    z = change_scores(same, after)  # nothing else changed at all: the floor alone tells what matters
    assert z[0, 4] < 1 and z[0, 5] == pytest.approx(20) and not z[0, :4].any()
    with pytest.raises(ValueError, match=r"\(1, 9\)"):
        change_scores(same, after[:, :5])
    with pytest.raises(ValueError, match="vectors"):
        change_scores(same, after, np.ones((3, 2)))


# ---------------------------------------------------------------------------------------------- ground area


@pytest.mark.parametrize(
    "place",
    [(0, 0, 0.1, 0.1), (13, 52, 13.02, 52.01), (179.9, -17, 180.1, -16.8), (30, 84, 31, 84.1), (-60, -50, 60, 50),
     (-180, -90, 180, 90)],
)  # fmt: skip
def test_area_of_one_tile(place):
    found = land_use_areas([box(*place)], [[0.1, 0.7, 0.2]], [shapely.box(-180, -90, 180, 90)])
    assert found.areas == pytest.approx([0, km2(*place), 0], rel=2e-3)
    assert found.by_region == pytest.approx(found.areas[None], rel=1e-3)


def test_area_of_slanted_and_polar_tiles():
    side = 2e-3 * math.pi / 180 * 6371.0  # km
    found = land_use_areas([turned(20, 45, 2e-3, 30)], [[1.0]])
    assert found.areas[0] == pytest.approx(side**2, rel=5e-3)
    for x in (0, 40_000):  # true to scale at 71 degrees south, so larger by k^2 here: (1 + sin 71)^2 / 4 = 1 / k^2
        found = land_use_areas([at_pole(x, 0, 10_000)], [[1.0]], [shapely.box(-180, -90, 180, 0)])
        assert found.areas[0] == pytest.approx(400 / 0.9728**2, rel=1e-2) and found.by_region[0, 0] == pytest.approx(
            found.areas[0]
        )


def test_ground_counts_once():
    whole = km2(179.9, 10, 180.2, 10.1)
    tiles = [box(179.9, 10, 180.1, 10.1), box(-180.0, 10, -179.8, 10.1)]
    found = land_use_areas(tiles, [[1, 0, 0.0], [0, 0.4, 0.6]])  # where both lie, the mean is the first class
    assert found.areas.sum() == pytest.approx(whole, rel=1e-3)
    assert found.areas == pytest.approx([whole * 2 / 3, 0, whole / 3], rel=0.02)
    again = land_use_areas(tiles * 5 + [box(0, 0, 0.1, 0.1)], [[1, 0, 0.0], [0, 0.4, 0.6]] * 5 + [[0, 1, 0]])
    assert again.areas == pytest.approx(np.add(found.areas, [0, km2(0, 0, 0.1, 0.1), 0]), rel=1e-3)


def test_area_within_regions():
    tiles = [box(10 + 0.1 * i, 45 + 0.1 * j, 10.2 + 0.1 * i, 45.2 + 0.1 * j) for i in range(9) for j in range(9)]
    scores = [[1.0, 0.0] if tile[0][0] < 10.45 else [0.0, 1.0] for tile in tiles]
    ring = shapely.box(10, 45, 11, 46) - shapely.box(10.2, 45.2, 10.8, 45.8)
    two = shapely.MultiPolygon([shapely.box(10.1, 45.1, 10.2, 45.3), shapely.box(10.8, 45.5, 12, 45.6)])
    found = land_use_areas(
        tiles, scores, [ring, mapping(two), shapely.box(-50, 0, -49, 1), shapely.box(-20, 0, 100, 80)]
    )
    assert found.areas.sum() == pytest.approx(km2(10, 45, 11, 46), rel=1e-3)
    hole = km2(10, 45, 11, 46) - km2(10.2, 45.2, 10.8, 45.8)
    assert found.by_region.sum(1)[:3] == pytest.approx(
        [hole, km2(10.1, 45.1, 10.2, 45.3) + km2(10.8, 45.5, 11, 45.6), 0], rel=1e-3
    )
    assert found.by_region[3] == pytest.approx(found.areas) and (found.by_region[1] > 0).all()


def test_regions_smaller_than_a_cell():
    tiles, scores = [box(10, 45, 10.1, 45.1), box(10.1, 45, 10.2, 45.1)], [[1.0, 0.0], [0.0, 1.0]]
    parcels = [(x, 45.0501, x + 0.001, 45.0511) for x in (10.0301, 10.0333, 10.0366, 10.1312, 10.199, 10.1995)]
    found = land_use_areas(tiles, scores, [shapely.box(*parcel) for parcel in parcels])
    inside = [km2(*parcel) for parcel in parcels[:5]] + [km2(10.1995, 45.0501, 10.2, 45.0511)]
    assert found.by_region[:3] == pytest.approx(np.array([[area, 0] for area in inside[:3]]), rel=1e-3)
    assert found.by_region[3:] == pytest.approx(np.array([[0, area] for area in inside[3:]]), rel=1e-3)


def test_a_region_on_both_sides_of_the_antimeridian():
    region = shapely.MultiPolygon([shapely.box(179.95, -17, 180, -16), shapely.box(-180, -17, -179.95, -16)])
    for tile in (box(179.9, -16.8, 180.1, -16.6), box(-180.1, -16.8, -179.9, -16.6)):
        found = land_use_areas([tile], [[1.0]], [region, shapely.box(179.95, -17, 180.05, -16)])
        assert found.by_region[:, 0] == pytest.approx([found.areas[0] / 2] * 2, rel=0.02)


def test_a_mosaic_of_the_globe_and_grids_in_strips(monkeypatch):
    tiles = [box(x, y, x + 11, y + 10) for x in range(-180, 180, 10) for y in range(-60, 60, 10)]
    scores = [[1, 0] if tile[1][1] < 0 else [0, 1] for tile in tiles]
    found = land_use_areas(tiles, scores)
    assert found.areas == pytest.approx([km2(-180, 0, 180, 60)] * 2, rel=0.02)
    monkeypatch.setattr("places.STRIP_VALUES", 100_000)  # some twenty rows
    assert land_use_areas(tiles, scores).areas == pytest.approx(found.areas)
    monkeypatch.setattr("places.MAX_CELLS", 2000)
    coarse = land_use_areas(tiles, scores).areas
    assert coarse == pytest.approx(found.areas, rel=0.05)
    monkeypatch.setattr("places.STRIP_VALUES", 1)  # one row
    assert land_use_areas(tiles, scores).areas == pytest.approx(coarse)


def test_area_of_nothing():
    found = land_use_areas([], np.zeros((0, 3)), [shapely.box(0, 0, 1, 1)])
    assert found.areas.tolist() == [0, 0, 0] and found.by_region.shape == (1, 3)
    line = [[0, 0], [1, 0], [1, 0], [0, 0], [0, 0]]
    assert land_use_areas([line, box(5, 5, 5.1, 5.1)], [[1, 0], [0, 1]]).areas[0] == 0
    with pytest.raises(ValueError, match=r"\(1, C\)"):
        land_use_areas([box(0, 0, 1, 1)], np.zeros((2, 3)))


# ---------------------------------------------------------------------------------------------- figures


def coloured(path) -> dict[str, int]:
    """Pixels of each colour of COLOURS."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return {
        name: int((pixels == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum()) for name, c in COLOURS.items()
    }


def test_map_of_one_place(tmp_path):
    tiles = [box(179.9 + 0.1 * i, 10, 180 + 0.1 * i, 10.1) for i in range(3)] + [box(-179.8, 10.1, -179.7, 10.2)]
    path = map_figure(tiles, ["water", "forest 林", "water", "water"], COLOURS, tmp_path / "m.png", "Fiji $1")
    found = coloured(path)
    assert path == tmp_path / "m.png" and found["a $ b"] == 0
    assert found["water"] / found["forest 林"] == pytest.approx(3, rel=0.1) and found["forest 林"] > 20_000
    assert map_figure(tiles[:1], ["water"], COLOURS).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="0 outlines"):
        map_figure([], [], COLOURS)


def test_scattered_tiles_can_be_seen(tmp_path):
    far = [turned(lon, lat, 0.01, 20) for lon in range(-160, 170, 40) for lat in (-70, 10, 60)]
    found = coloured(map_figure(far, ["water"] * 26 + ["a $ b"], COLOURS, tmp_path / "m.png"))
    assert found["a $ b"] > 60 + 100 and found["water"] > 26 * 60  # the square and the legend's
    near = [turned(100 + 0.01 * i, 30 + 0.01 * j, 0.01, 0) for i in range(5) for j in range(5)]
    labels = ["water"] * 27 + ["forest 林"] * 25
    assert coloured(map_figure(far + near, labels, COLOURS, tmp_path / "n.png"))["forest 林"] > 20_000


def test_shares(tmp_path):
    found = coloured(shares_figure([1, 3, 0], [1.0, 1.0, 0], COLOURS, tmp_path / "s.png", "共 4"))
    assert found["forest 林"] == pytest.approx(found["water"], rel=0.05) and found["a $ b"] == 0
    found = coloured(shares_figure([1, 3, 0], None, COLOURS, tmp_path / "s.png"))
    assert found["water"] / found["forest 林"] == pytest.approx(3, rel=0.05)
    with pytest.raises(ValueError, match="no class"):
        shares_figure([0, 0, 0], [0, 0, 0], COLOURS)
    with pytest.raises(ValueError, match="3 classes"):
        shares_figure([1, 2], None, COLOURS)


def test_the_best_pair_is_taken_first():
    before = [box(0, 0, 1, 1), box(0.2, 0, 1.2, 1)]
    assert [(i, j) for i, j, _ in match_footprints(before, [box(0.2, 0, 1.2, 1)])] == [(1, 0)]


def test_a_place_is_not_among_its_own_neighbours():
    z = change_scores(np.zeros((1, 4)), [[0, 0.3, 0, 0]], np.eye(2)[[0, 0, 1, 1]], neighbours=1)
    assert z[0, 1] > 1 and z[0, 0] < -1 and not z[0, 2:].any()


def test_spread_of_few_places_by_hand():
    z = change_scores(np.zeros((1, 5)), [[-0.2, -0.1, 0, 0.1, 0.9]])
    assert z[0, 4] == pytest.approx(0.9 / (1.4826 * 0.1 * 5 / 4.2))


def test_the_images_of_a_time_series_vote_together():
    scores = [[0.1, 0.9], [0.2, 0.8], [0.6, 0.4]]
    made = land_use_areas([box(10, 0, 10.1, 0.1)] * 3, scores)
    assert made.areas == pytest.approx([0, km2(10, 0, 10.1, 0.1)], rel=1e-4)


def test_small_tiles_under_a_far_larger_one_are_told_of():
    small = [box(103 + k * 0.0137, 23.003, 103.0025 + k * 0.0137, 23.0055) for k in range(5)]
    scores = [[0.6, 0.4]] + [[0, 1.0]] * 5
    assert land_use_areas(small, scores[1:]).lost == 0
    assert land_use_areas([box(103, 23, 103.1, 23.1), *small], scores).lost == 0
    assert land_use_areas([box(80, 0, 140, 50), *small], scores).lost == 5


def test_degrees_of_a_map():
    given = ((13.4, "EW", 1), (-70, "EW", 0), (190, "EW", 0), (-33.9, "NS", 1), (48, "NS", 0))
    assert [places._degrees(*one) for one in given] == ["13.4°E", "70°W", "170°W", "33.9°S", "48°N"]


def test_a_box_of_all_holds_what_reaches_furthest_across_the_antimeridian():
    rows = [{"footprint": [-179, 0, -178, 1]}, {"footprint": [100, 0, -175, 1]}]
    assert feature_collection(rows)["bbox"] == [100, 0, -175, 1]


def test_a_region_is_named_by_its_finest_level(tmp_path):
    ring, named = [[0, 0], [1, 0], [1, 1], [0, 0]], {"NAME_0": "Germany", "NAME_1": "Bayern", "NAME_2": "Oberbayern"}
    geometry = {"type": "Polygon", "coordinates": [ring]}
    (tmp_path / "g.json").write_text(json.dumps({"type": "Feature", "properties": named, "geometry": geometry}))
    assert [name for name, _ in read_regions(tmp_path / "g.json")] == ["Oberbayern"]


def test_the_alike_are_sought_among_places_spread_evenly(monkeypatch):
    monkeypatch.setattr(places, "POOL", 12)
    rng, kind = np.random.default_rng(0), np.arange(60) >= 45  # the last are of another kind, whose season is stronger
    vectors = np.eye(2)[kind.astype(int)] + 0.01 * rng.standard_normal((60, 2))
    before = rng.uniform(0, 1, (1, 60))
    after = before + 0.3 * kind + 0.01 * rng.standard_normal((1, 60))
    assert abs(change_scores(before, after, vectors, neighbours=2)).max() < 4


def test_a_pair_of_just_the_least_overlap_is_taken():
    assert match_footprints([box(0, 0, 2, 1)], [box(0, 0, 1, 1)], 0.5) == [(0, 0, 0.5)]
