"""Places on Earth: outlines as GeoJSON, pairs of outlines, changes between two dates, ground area by class, maps.

An outline is a closed ring [(lon, lat), ...] in degrees (WGS 84) of one number of points in a list, five for an image,
as in `imagery.Footprint.polygon`: where it crosses the antimeridian its longitudes run on past 180. Such rings become
polygons in the plane of longitude and latitude (`_outlines`), which every function here begins with.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import shapely
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import rasterize
from rasterio.transform import from_origin
from shapely.affinity import translate
from shapely.geometry import shape

from config import InputError
from report import plain, plot_style, save_figure

MAX_CELLS = 2**22  # of one place's grid: some seconds for 20 classes
STRIP_VALUES = 2**25  # cells times classes held at once, 128 MB of float32
POLAR = 80  # degrees of latitude, beyond which images come in polar projections, with edges straight in these
FLOOR = 0.005  # of a score: a change too small to mean anything
POOL = 10_000  # places among which the alike ones are sought: 50,000 places of 512 take seconds, not minutes


# ------------------------------------------------------------------------------------------------------------
# Outlines in the plane


def _rings(polygons) -> np.ndarray:
    """(N, P, 2) float64; ValueError where they are not rings of one length."""
    rings = np.asarray(polygons, float)
    if rings.size == 0:
        return np.zeros((0, 5, 2))
    if rings.ndim != 3 or rings.shape[1] < 4 or rings.shape[2] != 2:
        raise ValueError(f"outlines: expected (N, P, 2) longitudes and latitudes, got {rings.shape}")
    return rings


def box_ring(box) -> list[list[float]]:
    """The outline of west, south, east, north; west > east crosses the antimeridian."""
    west, south, east, north = box
    east += 360 * (east < west)
    return [[west, south], [east, south], [east, north], [west, north], [west, south]]


def _outlines(rings: np.ndarray) -> np.ndarray:
    """(N, P, 2) rings to (N,) polygons of longitude and latitude, whose middle lies in -180 to 180.

    A ring that goes once around a pole (its steps, each the short way, add up to 360) holds the pole: it becomes all
    that lies between the ring and the pole's edge of the plane.
    """
    steps = np.diff(rings[..., 0])
    steps = steps - 360 * np.round(steps / 360)
    middle = (rings[..., 0].min(1) + rings[..., 0].max(1)) / 2
    moved = rings.copy()
    moved[..., 0] -= 360 * np.floor((middle + 180) / 360)[:, None]
    made = shapely.polygons(moved)
    for i in np.flatnonzero(abs(steps.sum(1)) > 180):
        lon, lat = rings[i, 0, 0] + np.append(0, np.cumsum(steps[i])), rings[i, :, 1]
        pole = math.copysign(90, lat.mean())
        made[i] = shapely.union_all(_cut(shapely.Polygon([*zip(lon, lat), (lon[-1], pole), (lon[0], pole)])))
    return np.where(shapely.is_valid(made), made, shapely.make_valid(made))


def _polygons_of(geometry) -> list:
    """The polygons with an area in a geometry of any kind, such as `make_valid` and clipping leave."""
    parts = shapely.get_parts(shapely.get_parts(geometry))
    return [part for part in parts if part.geom_type == "Polygon" and part.area > 0]


def _cut(outline) -> list:
    """Polygons within -180 to 180 that cover what `outline` does."""
    west, _, east, _ = outline.bounds
    parts = []
    for turn in range(math.floor((west + 180) / 360), math.ceil((east - 180) / 360) + 1):
        world = shapely.box(360 * turn - 180, -90, 360 * turn + 180, 90)
        parts += _polygons_of(translate(shapely.intersection(outline, world), -360 * turn))
    return parts


def common_share(first, second) -> float:
    """Share of the smaller of two outlines (rings of longitude and latitude, of one length) that the other covers, 0 to 1."""
    one, two = _outlines(_rings([first, second]))
    if turns := round((one.bounds[0] + one.bounds[2] - two.bounds[0] - two.bounds[2]) / 720):  # across the antimeridian
        two = shapely.transform(two, lambda at: np.add(at, (360 * turns, 0)))
    return float(shapely.area(shapely.intersection(one, two)) / min(one.area, two.area))


def _on_both_sides(outlines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(outlines and, moved by 360 degrees, once more those that cross the antimeridian; the number of each)."""
    bounds = shapely.bounds(outlines)
    number, more = [np.arange(len(outlines))], [outlines]
    for crossing, turn in ((bounds[:, 2] > 180, -360), (bounds[:, 0] < -180, 360)):
        chosen = np.flatnonzero(crossing)
        number.append(chosen)
        more.append(shapely.transform(outlines[chosen], lambda at, turn=turn: np.add(at, (turn, 0))))
    return np.concatenate(more), np.concatenate(number)


def _groups(outlines: np.ndarray) -> np.ndarray:
    """(N,) the number of the connected group of outlines each belongs to, counted from 0. Outlines that touch connect."""
    shapes, number = _on_both_sides(outlines)
    tree, parent = shapely.STRtree(shapes), np.arange(len(outlines))

    for start in range(0, len(shapes), 100):
        left, right = tree.query(shapes[start : start + 100])
        left += start
        news = parent[number[left]] != parent[number[right]]  # the pairs of a pile of images are many, and say the same
        left, right = left[news], right[news]
        meet = shapely.intersects(shapes[left], shapes[right])
        while True:  # every group takes the lowest number among those it meets, until none meets another
            i, j = parent[number[left[meet]]], parent[number[right[meet]]]
            if (i == j).all():
                break
            np.minimum.at(parent, np.maximum(i, j), np.minimum(i, j))
            while (parent != parent[parent]).any():
                parent = parent[parent]
    return np.unique(parent, return_inverse=True)[1]


def stretch_of(bounds: np.ndarray) -> tuple[float, float]:
    """The shortest stretch of longitude (west, east >= west) that holds all of (N, 4) bounds; west in -180 to 180."""
    west = bounds[:, 0]  # as it is where it can be: what is turned is also rounded, and would lie before itself
    west = np.where((west >= -180) & (west < 180), west, (west + 180) % 360 - 180)
    order = np.argsort(west)
    west, width = west[order], (bounds[:, 2] - bounds[:, 0])[order]
    reach = np.maximum.accumulate(west + width)
    reach = np.maximum(reach, reach[-1] - 360)  # what crosses the antimeridian lies before the first too
    gaps = np.append(west[1:], west[0] + 360) - reach
    widest = int(gaps.argmax())
    if gaps[widest] <= 0:
        return -180.0, 180.0
    start = float(west[(widest + 1) % len(west)])
    return start, start + 360 - float(gaps[widest])


# ------------------------------------------------------------------------------------------------------------
# GeoJSON


def feature_collection(rows: list[dict]) -> dict:
    """A GeoJSON FeatureCollection (RFC 7946) of rows with `polygon` (an outline) or else `footprint` [west, south, east,
    north], either of which may be None, and `properties`.

    Rings are counter-clockwise (section 3.1.6) and cut at the antimeridian (3.1.9), coordinates have seven decimals
    (1 cm); without a place the geometry is null (3.2). The bbox, absent where no row has a place, is the smallest
    that holds all; its west > east where it crosses the antimeridian (5.2).
    """
    features, bounds = [], []
    for row in rows:
        ring, geometry = row.get("polygon"), None
        if ring is None and row.get("footprint") is not None:
            ring = box_ring(row["footprint"])
        if ring is not None:
            (outline,) = _outlines(_rings([ring]))
            parts = shapely.orient_polygons(_cut(outline))
            if len(parts):
                bounds.append(outline.bounds)
                whole = parts[0] if len(parts) == 1 else shapely.MultiPolygon(list(parts))
                geometry = json.loads(shapely.to_geojson(shapely.transform(whole, lambda at: at.round(7))))
        features.append({"type": "Feature", "geometry": geometry, "properties": row.get("properties", {})})
    made = {"type": "FeatureCollection", "features": features}
    if bounds:
        bounds = np.array(bounds)
        west, east = stretch_of(bounds)
        box = (west, bounds[:, 1].min(), east - 360 * (east > 180), bounds[:, 3].max())
        made["bbox"] = [round(float(x), 7) for x in box]
    return made


def read_regions(path) -> list[tuple[str, shapely.Geometry]]:
    """(name, Polygon or MultiPolygon in lon / lat) of a GeoJSON FeatureCollection, Feature or geometry.

    The name is the property "name", "NAME_4" to "NAME_1" (GADM), "NUTS_NAME" (in any case) or "id", else the feature's id,
    else "region N", from 1. Features without a geometry are passed over; rings that cross themselves are repaired. Raises
    InputError.
    """

    def wrong(what, remedy):
        return InputError(f"{path}: {what}; {remedy}")

    export = "export the layer as GeoJSON in WGS 84 (EPSG:4326), longitude first"
    try:
        with open(path, encoding="utf-8-sig") as file:
            top = json.load(file)
    except OSError as error:
        raise wrong(f"cannot be read ({error.strerror})", "give the path of a GeoJSON file") from None
    except UnicodeDecodeError:
        raise wrong("is no GeoJSON but another kind of file", export) from None
    except (ValueError, RecursionError) as error:
        raise wrong(f"is not JSON ({error})", "export the regions as GeoJSON") from None
    kind = top.get("type") if isinstance(top, dict) else None
    if kind == "FeatureCollection":
        features = top.get("features")
    else:
        features = [top if kind == "Feature" else {"type": "Feature", "geometry": top}]
    if kind is None or not isinstance(features, list):
        raise wrong("is not a GeoJSON FeatureCollection, Feature or geometry", "export the regions as GeoJSON")
    if _no_lonlat(top.get("crs")):
        raise wrong("its crs is not one of longitude and latitude in degrees from Greenwich", export)

    regions = []
    for i, feature in enumerate(features):
        at = f"feature {i}"
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            raise wrong(f"{at} is not a GeoJSON Feature", "export the regions as GeoJSON")
        geometry = feature.get("geometry")
        if geometry is None:
            continue
        kind = geometry.get("type") if isinstance(geometry, dict) else None
        if kind not in ("Polygon", "MultiPolygon"):
            raise wrong(f"{at} is {kind or 'no geometry'}, not a Polygon or MultiPolygon", "leave it out of the file")
        coordinates = geometry.get("coordinates")
        polygons = [coordinates] if kind == "Polygon" else coordinates
        if problem := _problem(polygons):
            raise wrong(f"{at} has {problem}", export)
        flat = [[[position[:2] for position in ring] for ring in rings] for rings in polygons]  # without heights
        # Of parts that overlap, such as buffers that were not dissolved, the union: the default cuts out what they share.
        whole = shapely.make_valid(shape({"type": "MultiPolygon", "coordinates": flat}), method="structure")
        parts = _polygons_of(whole)
        if not parts:
            raise wrong(f"{at} encloses no area", "draw it anew or leave it out of the file")
        properties = feature.get("properties")
        named = {str(k).lower(): v for k, v in (properties if isinstance(properties, dict) else {}).items()}
        usual = ("name", *(f"name_{level}" for level in (4, 3, 2, 1)), "nuts_name", "id")
        names = [*map(named.get, usual), feature.get("id"), f"region {i + 1}"]
        name = next(str(n).strip() for n in names if isinstance(n, str | int | float) and str(n).strip())
        regions.append((name, parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)))
    if not regions:
        raise wrong("holds no polygons", "draw at least one region")
    return regions


def _no_lonlat(crs) -> bool:
    """Whether the `crs` member of older GeoJSON names a system that is projected, counts from Paris or in grads. That a datum
    differs (NAD27 by 200 m at most) is let pass."""
    try:
        found = CRS.from_user_input(crs["properties"]["name"])
        text = found.to_wkt()
        return found.is_projected or 'PRIMEM["Greenwich"' not in text or 'UNIT["degree"' not in text
    except (TypeError, KeyError, CRSError):  # absent or unknown: coordinates tell
        return False


def _problem(polygons) -> str | None:
    """What is wrong with the coordinates of a MultiPolygon, if anything."""
    if not (isinstance(polygons, list) and polygons and all(isinstance(p, list) and p for p in polygons)):
        return "no list of rings as coordinates"
    for ring in (ring for polygon in polygons for ring in polygon):
        try:
            points = np.array([[float(x) for x in position[:2]] for position in ring])
        except (TypeError, ValueError, OverflowError):
            points = np.zeros(0)
        if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
            return "a ring that is no list of [longitude, latitude]"
        if len(points) < 4 or (points[0] != points[-1]).any():
            return "a ring that is not closed (four positions or more, the last as the first)"
        lon, lat = abs(points).max(0)
        if lon > 360 or lat > 90:
            return f"coordinates up to {lon:.9g}, {lat:.9g}, which are no longitude and latitude in degrees"
    return None


# ------------------------------------------------------------------------------------------------------------
# Two dates


def match_footprints(before, after, min_iou: float = 0.5) -> list[tuple[int, int, float]]:
    """[(i, j, intersection over union)]: each outline of `before` with at most one of `after`, sorted by i.

    Greedy: of all pairs with at least `min_iou` the one with the greatest is taken first (of equals the one that
    comes first), and so on. Areas are measured in longitude and latitude: near one place that scales both alike.
    """
    first, second = (_outlines(_rings(polygons)) for polygons in (before, after))
    if not len(first) or not len(second):
        return []
    (left, i_of), (right, j_of) = _on_both_sides(first), _on_both_sides(second)
    areas, boxes = [shapely.area(s) for s in (left, right)], [shapely.bounds(s) for s in (left, right)]
    tree, found = shapely.STRtree(right), []
    for start in range(0, len(left), 1000):
        i, j = tree.query(left[start : start + 1000])
        i += start
        both = areas[0][i] + areas[1][j]
        low, high = np.maximum(boxes[0][i], boxes[1][j]), np.minimum(boxes[0][i], boxes[1][j])
        bound = np.minimum(np.prod(high[:, 2:] - low[:, :2], axis=1), np.minimum(areas[0][i], areas[1][j]))
        kept = (bound > 0) & (bound >= min_iou * (both - bound) * (1 - 1e-9))  # others cannot reach it
        i, j, both = i[kept], j[kept], both[kept]
        common = shapely.area(shapely.intersection(left[i], right[j]))
        iou = common / (both - common)
        kept = (common > 0) & (iou >= min_iou)
        found.append(np.stack([i_of[i[kept]], j_of[j[kept]], iou[kept]]))
    i, j, iou = np.concatenate(found, axis=1)
    pairs, taken = [], (set(), set())
    for k in np.lexsort((j, i, -np.round(iou, 9))):
        a, b = int(i[k]), int(j[k])
        if a not in taken[0] and b not in taken[1]:
            taken[0].add(a)
            taken[1].add(b)
            pairs.append((a, b, float(iou[k])))
    return sorted(pairs)


def change_scores(before, after, vectors=None, neighbours: int = 32) -> np.ndarray:
    """How unusual the change of each place is, (Q, N) float64, in robust standard deviations: above 3 or so is rare.

    before, after: (Q, N) scores of N places under Q queries. With d = after - before, for each query

        z = (d - e) / max(1.4826 MAD(d - e) n / (n - 0.8), FLOOR)

    where MAD is the median absolute deviation from the median and 1.4826 makes it a normal standard deviation; the
    factor for small n is of Croux & Rousseeuw, Time-Efficient Algorithms for Two Highly Robust Estimators of Scale,
    1992. Without FLOOR any difference would be an alarm where most places did not change at all. What is expected, e, is

    - without `vectors` the median of d over all places: a season or a sensor that moves all scores is no change;
    - with `vectors`, (N, D) unit vectors of the places before, the median of d over the `neighbours` places most alike
      (by cosine, not the place itself), for a season changes forests otherwise than deserts. The median of d - e
      is then subtracted as well. Half of a place's neighbours must be unchanged.

    Of 20,000 places or more the alike ones are sought among 10,000 spread evenly.
    """
    before, after = (np.asarray(scores, float) for scores in (before, after))
    if before.ndim != 2 or before.shape != after.shape:
        raise ValueError(f"change_scores: expected twice (Q, N) scores, got {before.shape} and {after.shape}")
    change, number = after - before, before.shape[1]
    if number == 0:
        return change
    if vectors is not None and number > 1:
        change = change - _expected(change, np.asarray(vectors, np.float32), neighbours)
    change = change - np.median(change, axis=1, keepdims=True)
    spread = 1.4826 * np.median(abs(change), axis=1, keepdims=True) * number / (number - 0.8)
    return change / np.maximum(spread, FLOOR)


def _expected(change: np.ndarray, vectors: np.ndarray, neighbours: int) -> np.ndarray:
    """(Q, N): the median change of the places most alike."""
    number = change.shape[1]
    if vectors.ndim != 2 or len(vectors) != number or neighbours < 1:
        raise ValueError(f"change_scores: {number} places, vectors {vectors.shape}, {neighbours} neighbours")
    pool = np.arange(number) if number < 2 * POOL else np.linspace(0, number - 1, POOL).astype(int)
    k, expected = min(neighbours, len(pool) - 1), np.empty_like(change)
    for start in range(0, number, 512):
        rows = np.arange(start, min(start + 512, number))
        alike = vectors[rows] @ vectors[pool].T
        alike[rows[:, None] == pool] = -np.inf
        nearest = pool[np.argpartition(-alike, k - 1, axis=1)[:, :k]]
        expected[:, rows] = np.median(change[:, nearest], axis=2)
    return expected


# ------------------------------------------------------------------------------------------------------------
# Ground area

# WGS 84 and its authalic sphere, of the same surface (Snyder, Map Projections: A Working Manual, USGS Professional Paper
# 1395, 1987, equations 3-11 to 3-13).
_E = 0.00669437999014**0.5


def _q(sine):
    return (1 - _E**2) * (sine / (1 - (_E * sine) ** 2) + np.arctanh(_E * sine) / _E)


RADIUS = 6378137.0 * math.sqrt(_q(1.0) / 2)


def _project(lonlat: np.ndarray, centre) -> np.ndarray:
    """(P, 2) degrees to (P, 2) metres, areas kept exactly.

    centre: (lon, lat) of a Lambert azimuthal equal-area projection of the authalic sphere (Snyder, equations 24-2 to
    24-4), which knows no antimeridian and no pole; or None for the cylindrical one (10-1, 10-2), for places so wide
    that the azimuthal one would tear.
    """
    lon, sine = np.radians(lonlat[:, 0]), _q(np.sin(np.radians(lonlat[:, 1]))) / _q(1.0)
    if centre is None:
        return RADIUS * np.stack([lon, sine], axis=1)
    lon, cosine = lon - math.radians(centre[0]), np.sqrt(np.maximum(1 - sine**2, 0))
    sine0 = _q(math.sin(math.radians(centre[1]))) / _q(1.0)
    cosine0 = math.sqrt(max(1 - sine0**2, 0))
    k = RADIUS * np.sqrt(2 / (1 + sine0 * sine + cosine0 * cosine * np.cos(lon)))
    return np.stack([k * cosine * np.sin(lon), k * (cosine0 * sine - sine0 * cosine * np.cos(lon))], axis=1)


@dataclass(frozen=True)
class LandUse:
    """Ground area by class."""

    areas: np.ndarray
    """(C,) km2 over all places."""
    by_region: np.ndarray
    """(R, C) km2 within each region."""
    lost: int = 0
    """Tiles narrower than two cells of the grid, which a far larger tile of their place makes coarse: cells miss them."""


def land_use_areas(polygons, scores, regions=()) -> LandUse:
    """Ground area by class from tiles that may overlap: ground under several tiles counts once.

    polygons: N outlines; scores: (N, C) class probabilities; regions: geometries in lon / lat, of shapely or GeoJSON.

    Tiles that touch form a place. On a grid in an equal-area projection centred there, of 1/64 of the narrowest tile (coarser
    where it would have over 4 million cells), each cell takes the mean scores of the tiles that cover its centre, and its
    class is the highest of them (of equals the first). A cell counts as the exact area of the place divided by its cells, in
    a region as the exact area of what it holds of the place divided by the cells there, so totals do not depend on how the
    grid meets edges; where it holds no cell, it has one class.
    Edges are straight in longitude and latitude, and within 10 degrees of a pole in the projection.
    """
    rings, scores = _rings(polygons), np.asarray(scores, np.float32)
    if scores.ndim != 2 or len(scores) != len(rings) or not scores.shape[1]:
        raise ValueError(f"land_use_areas: expected ({len(rings)}, C) scores, got {scores.shape}")
    regions = [shape(region) for region in regions]
    areas, by_region = np.zeros(scores.shape[1]), np.zeros((len(regions), scores.shape[1]))
    if not len(rings):
        return LandUse(areas, by_region)
    # The images of a time series have one outline: their cells are the same, and for the mean a sum will do.
    _, kept, same = np.unique(rings.round(7), axis=0, return_index=True, return_inverse=True)
    rings, totals = rings[kept], np.zeros((len(kept), scores.shape[1]), np.float32)
    np.add.at(totals, same.reshape(-1), scores)
    outlines = _outlines(rings)
    places, lost = _groups(outlines), 0
    whole = shapely.area(outlines) > 0  # a picture of one line or none covers no ground
    moved = [translate(region, turn) for turn in (-360, 0, 360) for region in regions]
    shapely.prepare(moved)
    tree = shapely.STRtree(moved)

    order = np.argsort(places, kind="stable")
    order = order[whole[order]]
    for tiles in np.split(order, np.flatnonzero(np.diff(places[order])) + 1):
        centre, flat = _flat(rings[tiles], outlines[tiles])
        box = _around(outlines[tiles], centre is None)
        masks = []  # (number of the region, its part here)
        for index in tree.query(box, predicate="intersects"):
            mask = _clipped(moved[index], box, centre)
            if mask is None or mask.area:
                masks.append((index % len(regions), mask))
        counts, within, missed = _count(flat, totals[tiles], [geometry for _, geometry in masks])
        lost += missed
        ground = shapely.union_all(flat)
        areas += ground.area / 1e6 * counts / max(counts.sum(), 1)
        for (index, mask), counted in zip(masks, within):
            part = ground if mask is None else shapely.intersection(ground, shapely.make_valid(mask))
            if part.area and not counted.any():  # no cell has its centre in it
                under = shapely.intersects(flat, shapely.point_on_surface(part))
                counted[totals[tiles][under].sum(0).argmax()] = 1
            by_region[index] += part.area / 1e6 * counted / max(counted.sum(), 1)
    return LandUse(areas, by_region, lost)


def _flat(rings: np.ndarray, outlines: np.ndarray):
    """(centre of the projection or None, (N,) polygons in metres) of the tiles of one place."""
    lon, lat = np.radians(rings.reshape(-1, 2)).T
    points = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    x, y, z = mean = points.mean(0)
    centre = (math.degrees(math.atan2(y, x)), math.degrees(math.atan2(z, math.hypot(x, y))))
    if (points @ mean).min() < 0.5 * np.linalg.norm(mean):  # over 60 degrees from the centre
        centre, flat = None, np.array([shapely.MultiPolygon(_cut(outline)) for outline in outlines])
    else:
        flat = np.where(abs(rings[..., 1]).max(1) > POLAR, shapely.polygons(rings), shapely.segmentize(outlines, 1.0))
    flat = shapely.transform(flat, lambda at: _project(at, centre))
    return centre, np.where(shapely.is_valid(flat), flat, shapely.make_valid(flat))


def _around(outlines: np.ndarray, wide: bool):
    """The box of lon / lat around a place, with room for what edges bulge in the projection; all longitudes where the
    place is `wide` or near a pole."""
    bounds = shapely.bounds(outlines)
    west, east = stretch_of(bounds)
    south, north = bounds[:, 1].min(), bounds[:, 3].max()
    room = 0.01 * max(east - west, north - south)
    west, south, east, north = west - room, south - room, east + room, north + room
    if wide or max(-south, north) > POLAR:
        west, east = -180, 180
        south, north = -90 if south < -POLAR else south, 90 if north > POLAR else north
    return shapely.box(west, max(south, -90), east, min(north, 90))


def _clipped(region, box, centre):
    """The part of a region within a box, in metres; None where it holds all of the box."""
    if region.covers(box):
        return None
    part = shapely.MultiPolygon(_polygons_of(shapely.clip_by_rect(region, *box.bounds)))
    return shapely.transform(shapely.segmentize(part, box.length / 512), lambda at: _project(at, centre))


def _count(flat: np.ndarray, scores: np.ndarray, masks: list):
    """((C,) cells of each class, (M, C) those within each mask, number of polygons narrower than two cells) of N polygons in
    metres with (N, C) scores; a mask None holds all, the others are MultiPolygons."""
    boxes = shapely.bounds(flat)
    (x0, y0), (x1, y1) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    # The narrow side of the rectangle of that area and perimeter, slanted or not.
    area, half = shapely.area(flat), shapely.length(flat) / 2
    narrow = area * 2 / (half + np.sqrt(np.maximum(half**2 - 4 * area, 0)))
    cell = max(narrow.min() / 64, math.sqrt((x1 - x0) * (y1 - y0) / MAX_CELLS))
    width, height = math.ceil((x1 - x0) / cell), math.ceil((y1 - y0) / cell)
    columns = np.stack([(boxes[:, 0] - x0) // cell, (boxes[:, 2] - x0) // cell + 1], axis=1).astype(int).clip(0, width)
    lines = np.stack([(y1 - boxes[:, 3]) // cell, (y1 - boxes[:, 1]) // cell + 1], axis=1).astype(int)

    def burnt(geometry, left, top, w, h):
        corner = from_origin(x0 + left * cell, y1 - top * cell, cell, cell)
        return rasterize([geometry], (h, w), transform=corner, dtype="uint8")

    def by_class(chosen):
        return np.bincount(chosen, minlength=scores.shape[1])

    cells, within = (np.zeros(n, int) for n in (scores.shape[1], (len(masks), scores.shape[1])))
    step = max(1, STRIP_VALUES // (width * scores.shape[1]))
    for top in range(0, height, step):
        bottom = min(top + step, height)
        sums = np.zeros((scores.shape[1], bottom - top, width), np.float32)
        covered = np.zeros((bottom - top, width), bool)
        for i in np.flatnonzero((lines[:, 0] < bottom) & (lines[:, 1] > top)):
            a, b = max(lines[i, 0], top), min(lines[i, 1], bottom)
            left, right = columns[i]
            mask = burnt(flat[i], left, a, right - left, b - a)
            sums[:, a - top : b - top, left:right] += scores[i, :, None, None] * mask
            covered[a - top : b - top, left:right] |= mask > 0
        winners = sums.argmax(0)
        cells += by_class(winners[covered])
        for n, geometry in enumerate(masks):
            inside = covered if geometry is None else covered & (burnt(geometry, 0, top, width, bottom - top) > 0)
            within[n] += by_class(winners[inside])
    return cells, within, int((narrow < 2 * cell).sum())


# ------------------------------------------------------------------------------------------------------------
# Figures

GRID = dict(color="#e6e6e6", linewidth=0.8)
LEGEND = dict(frameon=False, fontsize=9, handlelength=1, handleheight=1)


TIGHT = {"bbox_inches": "tight", "pad_inches": 0.15}  # shapes keep their proportions


def _degrees(value: float, names: str, digits: int) -> str:
    value = (value + 180) % 360 - 180 if names == "EW" else value
    side = names[value < 0] if round(abs(value), digits) % 180 else ""
    return f"{abs(value):.{digits}f}°{side}"


def map_figure(polygons, labels, colours: dict[str, str], path=None, title: str = ""):
    """Tiles coloured by class as PNG: bytes, or written to `path`, which is returned.

    polygons: N outlines; labels: the class of each; colours: {class: colour}, in the legend's order. Where tiles would be
    under 3 pixels and lie far apart, they are squares of a fixed size on an overview, and up to six groups of
    neighbouring tiles are enlarged below it. Raises ValueError without polygons.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rings, labels = _rings(polygons), np.array(labels)
    if not len(rings) or len(rings) != len(labels):
        raise ValueError(f"map_figure: {len(rings)} outlines, {len(labels)} labels")
    outlines = _outlines(rings)
    west, east = stretch_of(shapely.bounds(outlines))
    middles = shapely.bounds(outlines)[:, [0, 2]].mean(1)
    turns = 360 * np.floor((middles - west) / 360)  # all within one stretch
    outlines = np.array([translate(outline, -turn) for outline, turn in zip(outlines, turns)])
    bounds = shapely.bounds(outlines)
    cosine = max(0.1, math.cos(math.radians((bounds[:, 1].min() + bounds[:, 3].max()) / 2)))
    per_degree = min(1100 / max((east - west) * cosine, 1e-9), 900 / max(np.ptp(bounds[:, [1, 3]]), 1e-9))
    sizes = per_degree * np.sqrt((bounds[:, 2] - bounds[:, 0]) * cosine * (bounds[:, 3] - bounds[:, 1]))
    room = 0.25 * (bounds[:, 2:] - bounds[:, :2])
    groups = _groups(shapely.box(*np.hstack([bounds[:, :2] - room, bounds[:, 2:] + room]).T))
    scattered = np.median(sizes) < 3 and groups.max() > 0
    counts = np.bincount(groups)
    shown = [g for g in np.argsort(-counts, kind="stable")[:6] if counts[g] >= 4] if scattered else []

    with plot_style():
        down = -(-len(shown) // 3)
        height, width = np.ptp(bounds[:, [1, 3]]), (east - west) * cosine
        tall = float(np.clip(7.2 * height / max(width, 1e-9), 2.6, 7))
        # Placed by hand, in inches: layout engines fail on rows of fixed proportions. What stays empty is cut off.
        size = (9.6, tall + 0.9 + 3.1 * down)
        figure = Figure(figsize=size, facecolor="white")

        def place(left, top, width, height):
            rectangle = (left / size[0], 1 - (top + height) / size[1], width / size[0], height / size[1])
            return figure.add_axes(rectangle, anchor="NW")

        axes = place(0.8, 0.4, 7.2, tall)
        _draw(axes, outlines, labels, colours, markers=scattered)
        for n, group in enumerate(shown):
            inside, letter = groups == group, chr(ord("A") + n)
            box = shapely.total_bounds(outlines[inside])
            lon, lat = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            axes.annotate(letter, (lon, lat), (7, 7), textcoords="offset points", fontsize=11, fontweight="bold")
            panel = place(0.8 + 3.05 * (n % 3), tall + 1.2 + 3.1 * (n // 3), 2.3, 2.3)
            _draw(panel, outlines[inside], labels[inside], colours, enlarged=True)
            where = f"{_degrees(lat, 'NS', 1)} {_degrees(lon, 'EW', 1)}, {counts[group]} tiles"
            panel.set_title(f"$\\bf{{{letter}}}$  {where}", loc="left", fontsize=10)
        number = {name: int((labels == name).sum()) for name in colours}
        keys = [Patch(color=c, label=f"{plain(n)}  {number[n]:,}") for n, c in colours.items() if number[n]]
        axes.legend(handles=keys, loc="upper left", bbox_to_anchor=(1.01, 1), **LEGEND)
        axes.set_title(plain(title), loc="left", fontsize=12)
        return save_figure(figure, path, **TIGHT)


def _draw(axes, outlines, labels, colours, markers=False, enlarged=False) -> None:
    """Tiles on axes of longitude and latitude, or a square of a fixed size for each."""
    from matplotlib.collections import PolyCollection
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    colour = [colours[label] for label in labels]
    bounds = shapely.bounds(outlines)
    low, high = bounds[:, :2].min(0), bounds[:, 2:].max(0)
    if markers:
        at = (bounds[:, :2] + bounds[:, 2:]) / 2
        axes.scatter(*at.T, s=30, c=colour, marker="s", edgecolors="white", linewidths=0.5, zorder=2)
    else:
        parts, number = shapely.get_parts(outlines, return_index=True)
        rings = [shapely.get_coordinates(part) for part in parts]
        # Lines of the tile's own colour close the hairlines between neighbours and let the smallest be seen.
        own = [colour[i] for i in number]
        axes.add_collection(PolyCollection(rings, facecolors=own, edgecolors=own, linewidths=0.6, zorder=2))
    room = 0.05 * np.maximum(high - low, 0.1 * (high - low).max())
    axes.set_xlim(low[0] - room[0], high[0] + room[0])
    axes.set_ylim(low[1] - room[1], high[1] + room[1])
    axes.set_aspect(1 / max(0.1, math.cos(math.radians((low[1] + high[1]) / 2))))
    for axis, names, side in ((axes.xaxis, "EW", 0), (axes.yaxis, "NS", 1)):
        extent = float((high - low)[side])
        digits = int(np.clip(math.ceil(-math.log10(max(extent, 1e-6) / 4)), 0, 6))
        axis.set_major_locator(MaxNLocator(3 if enlarged else 6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda v, _, names=names, digits=digits: _degrees(v, names, digits)))
    axes.grid(**GRID)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def shares_figure(counts, areas, colours: dict[str, str], path=None, title: str = ""):
    """Shares of the classes as PNG: bytes, or written to `path`, which is returned.

    counts: (C,) tiles of each class; areas: (C,) km2, or None; colours: {class: colour} in the same order. Classes are
    sorted by area (else by count); those with neither are left out. Raises ValueError where nothing is left.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    rows = [("tiles", np.asarray(counts, float), "{:,.0f}".format)]
    if areas is not None:
        rows.insert(0, ("area", np.asarray(areas, float), lambda km2: f"{km2:,.{'4g' if km2 < 1000 else '0f'}} km²"))
    if any(len(values) != len(colours) for _, values, _ in rows):
        raise ValueError(f"shares_figure: {len(colours)} classes, but {[len(values) for _, values, _ in rows]} values")
    order = [i for i in np.argsort(-rows[0][1], kind="stable") if any(values[i] for _, values, _ in rows)]
    if not order:
        raise ValueError("shares_figure: no class has a tile or an area")
    names, tints = list(colours), list(colours.values())
    with plot_style():
        figure = Figure(figsize=(7.6, 0.9 + 0.52 * len(order)), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        thick = 0.76 / len(rows)
        for r, (_, values, form) in enumerate(rows):
            share = 100 * values / max(values.sum(), 1e-12)
            y = np.arange(len(order)) + (r - (len(rows) - 1) / 2) * thick
            bars = axes.barh(y, share[order], 0.9 * thick, color=[tints[i] for i in order], alpha=0.45 if r else 1)
            texts = [f"{share[i]:.1f}%  {form(values[i])}" for i in order]
            axes.bar_label(bars, texts, padding=4, fontsize=8, color="#555")
        axes.set_yticks(range(len(order)), [plain(names[i]) for i in order])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(x=0.28, y=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:.0f}%")
        axes.grid(axis="x", **GRID)
        axes.set_axisbelow(True)
        axes.set_title(plain(title), loc="left", fontsize=12)
        if len(rows) > 1:
            keys = [Patch(color="#555", label="by area"), Patch(color="#555", alpha=0.45, label="by tiles")]
            axes.legend(handles=keys, loc="lower right", **LEGEND)
        return save_figure(figure, path, **TIGHT)
