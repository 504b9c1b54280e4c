"""Draw a georeferenced data set from a seed: nothing to download, and every text true by construction.

    python demo_data.py                                     # 1500 scenes into data/demo, about 45 s on 2 cores
    python demo_data.py --output data/small --scenes 60 --seed 1

A scene is first a *truth* (a JSON dictionary: land cover, lines, every object with its place and size) and only then a
picture, captions and questions, each derived from that truth alone. Facts are shared words put together anew in every
scene, while season, soil, sensor gain, white balance, haze and noise differ from scene to scene: shape and layout carry
the text, colour does not. `imagery.colour_histogram` is the baseline that has to lose.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image, ImageDraw, ImageFilter
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from rasterio.warp import transform as reproject

from config import (
    PARTIAL,
    InputError,
    fresh_folder,
    in_workers,
    processors,
    put_in_place,
    refuse_unwritable,
    user_errors,
)

VERSION = 8  # raise it whenever the same seed gives other bytes: folders of an older version are then not 'done'
MANY = 9  # from nine on, captions say 'many'; seven and eight are never drawn, so no word is ever borderline
PAIRS = 60  # scenes of val and test that get a second date

# ---------------------------------------------------------------- words ----------------------------------------------
# kind: singular, plural, Chinese classifier, Chinese noun, (width, length) in pixels of a 168-pixel scene, height
KINDS = {
    "building": ("building", "buildings", "栋", "建筑物", (17, 24), 7),
    "vehicle": ("vehicle", "vehicles", "辆", "车", (7.5, 13), 1.5),
    "aircraft": ("aircraft", "aircraft", "架", "飞机", (28, 28), 3),
    "ship": ("ship", "ships", "艘", "船", (10, 31), 3),
    "tank": ("storage tank", "storage tanks", "个", "储罐", (18, 18), 7),
    "field": ("sports field", "sports fields", "个", "运动场", (25, 38), 0),
    "pond": ("pond", "ponds", "个", "池塘", (23, 30), 0),
}
# cover: English, Chinese, its classifier, urban?, metres per pixel, kinds it may hold, lines it may hold
COVERS = {
    "farmland": ("farmland", "农田", "一片", 0, (0.6, 1.0), "building tank pond vehicle", "road river railway"),
    "orchard": ("an orchard", "果园", "一片", 0, (0.5, 0.8), "building tank pond vehicle", "road river railway"),
    "forest": ("a forest", "森林", "一片", 0, (0.6, 1.2), "building pond field vehicle", "road river railway"),
    "grassland": ("grassland", "草地", "一片", 0, (0.6, 1.5), "building pond aircraft tank vehicle",
                  "road river railway"),
    "desert": ("a desert", "沙漠", "一片", 0, (0.8, 1.8), "building tank aircraft vehicle", "road river railway"),
    "lake": ("a lake", "湖泊", "一个", 0, (0.8, 1.6), "ship building tank pond", ""),
    "beach": ("a beach", "海滩", "一片", 0, (0.7, 1.4), "ship building vehicle field", "road"),
    "residential": ("a residential area", "居民区", "一片", 1, (0.5, 0.6), "field pond vehicle", "road river"),
    "industrial": ("an industrial area", "工业区", "一片", 1, (0.8, 1.2), "building tank vehicle", "road railway river"),
    "port": ("a port", "港口", "一个", 1, (1.2, 2.0), "ship tank building", "road railway"),
    "airport": ("an airport", "机场", "一座", 1, (1.0, 1.6), "aircraft building tank", "runway"),
    "parking": ("a parking lot", "停车场", "一个", 1, (0.5, 0.6), "vehicle building", "road"),
    "park": ("a park", "公园", "一座", 1, (0.6, 1.0), "field pond building", "road river"),
}  # fmt: skip
ALIKE = [{"grassland", "park"}, {"industrial", "port"}, {"grassland", "airport"}]  # never each other's near miss
OPEN_LAND = ("farmland", "orchard", "forest", "grassland", "desert", "park")  # where a road may be built
LINES = {"road": ("road", "公路", 21), "river": ("river", "河流", 17), "railway": ("railway", "铁路", 9)}
LINES["runway"] = ("runway", "跑道", 27)
NAMES = {kind: words[:2] for kind, words in KINDS.items()} | {kind: (kind, f"{kind}s") for kind in LINES}
AXES = {"ns": ("north to south", "南北向"), "ew": ("east to west", "东西向")}
CROSSES = {"ns": ("west", "centre", "east"), "ew": ("north", "centre", "south")}  # where a line of an axis may lie
# region: English, Chinese, the box that objects of it are put into (x0, y0, x1, y1 as fractions; y grows southward)
REGIONS = {
    "north": ("north", "北部", (0.04, 0.04, 0.96, 0.42)),
    "south": ("south", "南部", (0.04, 0.58, 0.96, 0.96)),
    "west": ("west", "西部", (0.04, 0.04, 0.42, 0.96)),
    "east": ("east", "东部", (0.58, 0.04, 0.96, 0.96)),
    "northwest": ("northwest", "西北部", (0.04, 0.04, 0.46, 0.46)),
    "northeast": ("northeast", "东北部", (0.54, 0.04, 0.96, 0.46)),
    "southwest": ("southwest", "西南部", (0.04, 0.54, 0.46, 0.96)),
    "southeast": ("southeast", "东南部", (0.54, 0.54, 0.96, 0.96)),
    "centre": ("centre", "中部", (0.28, 0.28, 0.72, 0.72)),
}
SIDES = {"north": ("north", "北"), "south": ("south", "南"), "west": ("west", "西"), "east": ("east", "东")}
NUMBERS = dict(zip(range(1, 7), zip(("one", "two", "three", "four", "five", "six"), "一两三四五六")))
PLACES = [  # name, longitude, latitude, what may lie there (the scenes are drawn; only the coordinates are real)
    ("Rotterdam", 4.3, 51.95, "coast"), ("Qingdao", 120.2, 36.1, "coast"), ("Busan", 129.0, 35.2, "coast"),
    ("Valencia", -0.4, 39.45, "coast"), ("Houston", -95.2, 29.6, "coast"), ("Xiamen", 118.1, 24.6, "coast"),
    ("Wuhan", 114.3, 30.6, "inland"), ("Chengdu", 104.0, 30.7, "inland"), ("Munich", 11.6, 48.2, "inland"),
    ("Toulouse", 1.4, 43.6, "inland"), ("Kansas City", -94.6, 39.1, "inland"), ("Harbin", 126.6, 45.8, "inland"),
    ("Dunhuang", 94.7, 40.1, "dry"), ("Turpan", 89.2, 42.9, "dry"), ("Phoenix", -112.1, 33.4, "dry"),
]  # fmt: skip
MONTHS = {"spring": (4, 5), "summer": (6, 8), "autumn": (9, 11), "winter": (12, 12), "snow": (1, 2)}


# ---------------------------------------------------------------- truth ----------------------------------------------
def corners(o: dict, grow: float = 0) -> list[tuple[float, float]]:
    """Corners (x, y) of an object's box: `w` across, `l` along its heading, `angle` degrees clockwise from north."""
    a, w, h = math.radians(o["angle"]), o["w"] / 2 + grow, o["l"] / 2 + grow
    ex, ey = (math.cos(a), math.sin(a)), (math.sin(a), -math.cos(a))  # across, ahead
    return [(o["x"] + i * w * ex[0] + j * h * ey[0], o["y"] + i * w * ex[1] + j * h * ey[1])
            for i, j in ((-1, 1), (1, 1), (1, -1), (-1, -1))]  # fmt: skip


def _mask(size: tuple[int, int], paint) -> np.ndarray:
    """`paint(ImageDraw)` on an empty (W, H) sheet -> bool (H, W)."""
    sheet = Image.new("L", size)
    paint(ImageDraw.Draw(sheet))
    return np.asarray(sheet) > 0


def in_region(region: str, x: float, y: float) -> bool:
    """Whether a point (fractions of width and height) lies in a named part of the scene."""
    if region == "centre":
        return abs(x - 0.5) < 0.25 and abs(y - 0.5) < 0.25
    return not (("north" in region and y >= 0.5) or ("south" in region and y <= 0.5)
                or ("west" in region and x >= 0.5) or ("east" in region and x <= 0.5))  # fmt: skip


def _spots(t: dict, objects: list[dict]) -> list[tuple[float, float]]:
    """Where objects lie, as fractions of width and height."""
    return [(o["x"] / t["width"], o["y"] / t["height"]) for o in objects]


def _of(t: dict, kind: str) -> list[dict]:
    return [o for o in t["objects"] if o["kind"] == kind]


def _unit(t: dict) -> float:
    """Layout is designed on a 168-pixel scene; this is what one of those pixels measures here."""
    return min(t["width"], t["height"]) / 168


def bays(t: dict) -> list[tuple[float, float]]:
    """Centres of a parking lot's bays: rows across the picture, an aisle after every second row."""
    u, out, y, n = _unit(t), [], t["bay_start"][1], 0
    while y < t["height"] - 9 * _unit(t):
        out += [(x, y) for x in np.arange(t["bay_start"][0], t["width"] - 5 * u, 11 * u).round(1).tolist()]
        y, n = round(y + (17 if n % 2 == 0 else 30) * u, 1), n + 1
    return out


def _line(t: dict, rng, kind: str, axis: str, where: str) -> dict:
    """A road, river, railway or runway across the picture; `points` in pixels, `width` in pixels."""
    long, wide = (t["height"], t["width"]) if axis == "ns" else (t["width"], t["height"])
    middle = {"north": 0.2, "west": 0.2, "centre": 0.5, "south": 0.8, "east": 0.8}[where] + rng.uniform(-0.04, 0.04)
    s = np.linspace(-0.06, 1.06, 41)
    bend = {"river": 0.035, "road": 0.012, "railway": 0.012, "runway": 0}[kind]
    drift = bend * np.sin(s * rng.uniform(6, 11) + rng.uniform(0, 6)) + bend * np.sin(s * 3 + rng.uniform(0, 6))
    across, along = ((middle + drift) * wide).round(1).tolist(), (s * long).round(1).tolist()
    points = list(zip(across, along)) if axis == "ns" else list(zip(along, across))
    width = round(LINES[kind][2] * _unit(t) * (rng.uniform(0.85, 1.2) if kind == "river" else 1), 1)
    return {"kind": kind, "axis": axis, "where": where, "width": width, "points": [list(p) for p in points]}


def _water(t: dict, rng) -> dict | None:
    """The sea along one side (port, beach) or a lake, as a polygon in pixels."""
    w, h = t["width"], t["height"]
    if t["cover"] == "lake":
        a = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        r = 1 + sum(rng.uniform(0, 0.11) * np.sin(k * a + rng.uniform(0, 6)) for k in (2, 3, 4, 5))
        cx, cy, rx, ry = *rng.uniform(0.42, 0.58, 2), *rng.uniform(0.28, 0.38, 2)
        points = np.stack([(cx + rx * r * np.cos(a)) * w, (cy + ry * r * np.sin(a)) * h], 1)
        return {"kind": "lake", "side": None, "points": points.round(1).tolist()}
    if t["cover"] not in ("port", "beach"):
        return None
    side, wave = str(rng.choice(list(SIDES))), 0.03 if t["cover"] == "beach" else 0
    s = np.linspace(-0.05, 1.05, 40)
    d = rng.uniform(0.4, 0.48) + wave * np.sin(s * rng.uniform(4, 9) + rng.uniform(0, 6))
    d = d if side in ("north", "west") else 1 - d
    edge = np.stack([d * w, s * h] if side in ("west", "east") else [s * w, d * h], 1)
    far = -0.05 if side in ("north", "west") else 1.05  # the outer edge, just outside the picture
    outer = (
        [[far * w, 1.05 * h], [far * w, -0.05 * h]]
        if side in ("west", "east")
        else [[1.05 * w, far * h], [-0.05 * w, far * h]]
    )
    return {"kind": "sea", "side": side, "points": edge.round(1).tolist() + np.round(outer, 1).tolist()}


class _Ground:
    """Which pixels are taken. Objects are put only where their box, and a margin, is free: nothing hides anything."""

    def __init__(self, t: dict):
        self.t, self.u, self.size = t, _unit(t), (t["width"], t["height"])
        water = t["water"]
        self.water = _mask(self.size, lambda d: water and d.polygon([tuple(p) for p in water["points"]], fill=1))
        self.line_masks = [self.line_mask(line) for line in t["lines"]]
        self.taken = np.zeros(self.size[::-1], bool)
        for o in t["objects"] + t["clouds"]:
            self.take(o)

    def line_mask(self, line: dict) -> np.ndarray:
        points, width = [tuple(p) for p in line["points"]], round(line["width"] + 4 * self.u)
        return _mask(self.size, lambda d: d.line(points, fill=1, width=width, joint="curve"))

    def box(self, o: dict, grow: float) -> tuple[tuple[slice, slice], np.ndarray]:
        """An object's box, `grow` design pixels larger: the window it lies in, and the mask inside that window."""
        points = np.array(corners(o, grow * self.u))
        x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
        x1, y1 = np.maximum(np.minimum(np.ceil(points.max(0)).astype(int) + 2, self.size), (x0 + 1, y0 + 1))
        mask = _mask((int(x1 - x0), int(y1 - y0)), lambda d: d.polygon([tuple(p) for p in points - (x0, y0)], fill=1))
        window = slice(y0, y1), slice(x0, x1)
        return window, mask[: max(0, self.size[1] - y0), : max(0, self.size[0] - x0)]

    def hits(self, o: dict, grow: float, busy: np.ndarray) -> bool:
        if any(busy[int(y), int(x)] for x, y in corners(o)):  # cheaper than the mask, and mostly enough
            return True
        window, mask = self.box(o, grow)
        return bool((busy[window] & mask).any())

    def take(self, o: dict, grow: float = 2):
        window, mask = self.box(o, grow)
        self.taken[window] |= mask

    def fits(self, o: dict) -> bool:
        return all(1 < x < self.size[0] - 1 and 1 < y < self.size[1] - 1 for x, y in corners(o))

    def put(self, rng, kind: str, region: str | None, base_angle: float, tries: int = 40) -> dict | None:
        """One object of a kind in a region, or None where no free place was found."""
        t, u = self.t, self.u
        wide, long = (v * u * rng.uniform(0.92, 1.12) for v in KINDS[kind][4])
        if kind == "building" and t["cover"] in ("industrial", "port", "airport", "parking"):
            wide, long = wide * 1.3, long * rng.uniform(1.2, 1.5)
        if kind in ("aircraft", "tank"):
            long = wide
        roads = [line for line in t["lines"] if line["kind"] == "road"]
        x0, y0, x1, y1 = REGIONS[region][2] if region else (0.03, 0.03, 0.97, 0.97)
        on_road = kind == "vehicle" and t["cover"] != "parking" and bool(roads)
        busy = self.taken
        if not on_road:
            busy = np.any([busy, ~self.water if kind == "ship" else self.water, *self.line_masks], axis=0)
        for _ in range(tries):
            o = {"kind": kind, "x": rng.uniform(x0, x1) * t["width"], "y": rng.uniform(y0, y1) * t["height"],
                 "w": wide, "l": long, "angle": base_angle + rng.uniform(-4, 4),
                 "on": "water" if kind == "ship" else "road" if on_road else "land"}  # fmt: skip
            if kind == "vehicle" and t["cover"] == "parking":
                inside = [(x, y) for x, y in bays(t) if x0 < x / t["width"] < x1 and y0 < y / t["height"] < y1]
                if not inside:
                    return None
                o["x"], o["y"] = inside[rng.integers(len(inside))]
                o["angle"] = 180.0 * rng.integers(2)
            elif on_road:
                road = roads[rng.integers(len(roads))]
                k = int(rng.integers(1, len(road["points"]) - 2))
                (ax, ay), (bx, by) = road["points"][k], road["points"][k + 1]
                lane = int(rng.choice([-1, 1]))  # they keep to the right
                a, f, off = math.atan2(bx - ax, ay - by), rng.uniform(), lane * road["width"] * 0.25
                o["x"], o["y"] = ax + f * (bx - ax) + off * math.cos(a), ay + f * (by - ay) + off * math.sin(a)
                o["angle"] = math.degrees(a) + (0 if lane > 0 else 180)
                if not (x0 < o["x"] / t["width"] < x1 and y0 < o["y"] / t["height"] < y1):
                    continue
            if not (0 < o["x"] < t["width"] and 0 < o["y"] < t["height"]) or busy[int(o["y"]), int(o["x"])]:
                continue  # most misfits show at their centre
            o = {k: round(float(v), 1) if k in ("x", "y", "w", "l", "angle") else v for k, v in o.items()}
            if self.fits(o) and not self.hits(o, 1 if kind == "vehicle" else 3, busy):
                self.take(o)
                return o
        return None

    def group(self, rng, kind: str, count: int) -> list[dict]:
        """`count` objects of a kind, together in one region where that fits, else anywhere, else fewer."""
        aligned = kind in ("building", "field", "tank")
        angle = float(rng.choice([0, 90]) + self.t["grid"] if aligned else rng.uniform(0, 360))
        regions = [str(r) for r in rng.permutation(list(REGIONS))] if count < MANY else []
        while count:
            for region in [*regions, None]:
                before, found = self.taken.copy(), []
                while len(found) < count and (o := self.put(rng, kind, region, angle)):
                    found.append(o)
                if len(found) == count:
                    return found
                self.taken = before
            count = min(count - 1, 6)
        return []


def place_of(t: dict, objects: list[dict]) -> str | None:
    """Where a group is: 'road', a region that holds for every one of it (the smallest such), or None."""
    if objects and all(o.get("on") == "road" for o in objects):
        return "road"
    order = ["centre", "northwest", "northeast", "southwest", "southeast", "north", "south", "west", "east"]
    spots = _spots(t, objects)
    return next((r for r in order if all(in_region(r, *spot) for spot in spots)), None)


def _clouds(t: dict, ground: _Ground, rng) -> list[dict]:
    """One to three clouds with their shadows, where they hide no object."""
    regions, out = [str(r) for r in rng.permutation(list(REGIONS))], []
    want, u = int(rng.integers(1, 4)), _unit(t)
    for region in regions:
        x0, y0, x1, y1 = REGIONS[region][2]
        for _ in range(25):
            x, y = (round(at, 1) for at in (rng.uniform(x0, x1) * t["width"], rng.uniform(y0, y1) * t["height"]))
            c = {"x": x, "y": y, "angle": 0.0}
            c["w"], c["l"] = (round(v, 1) for v in rng.uniform(38, 60, 2) * u)
            dx, dy = shadow(t, 26 * u)
            shade = {**c, "x": c["x"] + dx, "y": c["y"] + dy}
            if all(map(ground.fits, (c, shade))) and not any(ground.hits(o, 4, ground.taken) for o in (c, shade)):
                out.append(c)
                ground.take(c, 4)
                ground.take(shade, 4)
                if len(out) == want:
                    return out
        if out:
            return out
    return out


def shadow(t: dict, height: float) -> tuple[float, float]:
    """The (x, y) pixels by which something this high throws its shadow, away from the sun."""
    a = math.radians(t["sun_azimuth"])
    return -math.sin(a) * height, math.cos(a) * height


def scene_truth(seed: int, index: int) -> dict:
    """Everything there is to know of scene `index`; the same for the same seed, whatever else is generated."""
    rng = np.random.default_rng([seed, index, 0])
    cover = list(COVERS)[(index * 5 + seed) % len(COVERS)]  # balanced in every split: 10 and 13 share no factor
    _, _, _, urban, gsd, *_ = COVERS[cover]
    seasons = ["spring", "summer", "autumn", "winter"] + ["snow"] * (cover not in ("desert", "beach", "lake"))
    season = str(rng.choice(seasons, p=None if len(seasons) == 4 else [0.22, 0.28, 0.22, 0.13, 0.15]))
    need = {"port": "coast", "beach": "coast", "desert": "dry"}.get(cover)
    places = [p for p in PLACES if (p[3] == need if need else p[3] != "dry")]
    name, lon, lat, _ = places[rng.integers(len(places))]
    lon, lat = lon + rng.uniform(-0.15, 0.15), lat + rng.uniform(-0.1, 0.1)
    epsg = 32600 + int((lon + 180) // 6) + 1
    (east,), (north,) = reproject("EPSG:4326", f"EPSG:{epsg}", [lon], [lat])
    month = rng.integers(MONTHS[season][0], MONTHS[season][1] + 1)
    when = datetime(int(rng.integers(2018, 2023)), int(month), int(rng.integers(1, 29)), 10, int(rng.integers(60)))
    width = int(rng.integers(128, 225))
    bits = 16 if rng.random() < 0.125 else 8
    t = {
        "id": f"scene_{index:05d}", "image": f"scene_{index:05d}.tif", "img_id": index, "seed": seed,
        "split": ("train",) * 7 + ("val",) + ("test",) * 2, "place": name, "lon": round(lon, 6), "lat": round(lat, 6),
        "epsg": epsg, "east": round(east, 0), "north": round(north, 0), "gsd_m": round(rng.uniform(*gsd), 2),
        "datetime": when.strftime("%Y:%m:%d %H:%M:%S"), "width": width,
        "height": int(np.clip(width * rng.uniform(0.85, 1.18), 128, 224)), "bits": bits,
        "bands": 4 if bits == 16 and rng.random() < 0.5 else 3, "cover": cover, "season": season,
        "rural_urban": "urban" if urban else "rural", "sun_azimuth": round(rng.uniform(100, 250), 1),
        "grid": round(rng.uniform(-15, 15), 1) if cover not in ("residential", "port", "parking", "airport") else 0.0,
        "bay_start": [round(v, 1) for v in rng.uniform(8, 14, 2)],
        "lines": [], "objects": [], "clouds": [], "clearings": [],
    }  # fmt: skip
    t["split"] = t["split"][index % 10]
    t["water"] = _water(t, rng)
    t["lines"] = _lines(t, rng)
    ground = _Ground(t)
    t["objects"] = _groups(t, ground, rng)
    if cover == "residential":
        t["objects"] += _houses(t, ground, rng)
    if season != "snow" and rng.random() < 0.35:
        t["clouds"] = _clouds(t, ground, rng)
    return _summed(t)


def _lines(t: dict, rng) -> list[dict]:
    """None, one or two, of different kinds; along the shore on the land side where there is a sea."""
    cover, side, lines = t["cover"], t["water"] and t["water"]["side"], []
    kinds = [str(k) for k in rng.permutation(COVERS[cover][6].split())] if COVERS[cover][6] else []
    number = int(rng.choice(3, p=[0.25, 0.5, 0.25]))
    own = {"airport": 1, "residential": max(1, number), "parking": min(number, 1), "beach": min(number, 1)}
    number = own.get(cover, number)
    if cover == "residential":  # a settlement without a road would look odd
        kinds.sort(key=lambda k: k != "road")
    for kind in kinds[: min(number, 1 if side else 2)]:
        axis = {"north": "ew", "south": "ew", "west": "ns", "east": "ns"}.get(side) or str(rng.choice(["ns", "ew"]))
        free = [w for w in CROSSES[axis] if all((line["axis"], line["where"]) != (axis, w) for line in lines)]
        opposite = {"north": "south", "south": "north", "west": "east", "east": "west"}
        lines.append(_line(t, rng, kind, axis, opposite[side] if side else str(rng.choice(free))))
    return lines


def _groups(t: dict, ground: _Ground, rng) -> list[dict]:
    """The objects of one or two groups; what makes the place what it is comes first."""
    cover, objects = t["cover"], []
    own = {"lake": "ship", "industrial": "building", "airport": "aircraft", "parking": "vehicle"}.get(cover)
    pool = [str(k) for k in rng.permutation([k for k in COVERS[cover][5].split() if k != own])]
    for kind in ([own] * (own is not None) + pool)[: 1 + int(rng.random() < 0.45)]:
        top = {"aircraft": 5, "field": 2 if cover == "residential" else 3, "pond": 4, "building": 5}.get(kind, 6)
        count = int(rng.integers(1, top + 1))
        if kind == "vehicle" and cover == "parking" and rng.random() < 0.35:
            count = int(rng.integers(MANY, 16))
        objects += ground.group(rng, kind, count)
    return objects


def _houses(t: dict, ground: _Ground, rng) -> list[dict]:
    """Houses on a lattice of lots, wherever there is room."""
    u, full, houses = ground.u, rng.uniform(0.65, 1), []
    for y in np.arange(14 * u, t["height"] - 10 * u, 32 * u):
        for x in np.arange(12 * u, t["width"] - 10 * u, 27 * u):
            o = {"kind": "building", "x": x + rng.uniform(-2, 2), "y": y + rng.uniform(-2, 2),
                 "w": 15 * u * rng.uniform(0.9, 1.1), "l": 20 * u * rng.uniform(0.85, 1.1),
                 "angle": 90 * rng.integers(2)}  # fmt: skip
            o = {k: v if k == "kind" else round(float(v), 1) for k, v in o.items()} | {"on": "land"}
            busy = np.any([ground.taken, *ground.line_masks], axis=0)
            if rng.random() < full and ground.fits(o) and not ground.hits(o, 2, busy):
                houses.append(o)
                ground.take(o)
    return houses[:6] if len(houses) in (7, 8) else houses  # keep clear of the border of 'many'


def _summed(t: dict) -> dict:
    """Fill in what follows from the objects: counts (zeros too), groups with their place, the place of the clouds."""
    of = {k: _of(t, k) for k in KINDS}
    t["counts"] = {k: len(v) for k, v in of.items()} | {k: sum(x["kind"] == k for x in t["lines"]) for k in LINES}
    t["groups"] = [{"kind": k, "count": len(v), "where": place_of(t, v)} for k, v in of.items() if v]
    t["cloud_where"] = place_of(t, t["clouds"]) if t["clouds"] else None
    return t


def later_truth(truth: dict) -> tuple[dict, list[dict]]:
    """The same place in another season, two months to four years on: (its truth, the changes). Two in five change only that."""
    rng = np.random.default_rng([truth["seed"], truth["img_id"], 1])
    t = json.loads(json.dumps(truth))
    bare = t["cover"] in ("desert", "beach", "lake")  # where no snow lies
    t["season"] = str(rng.choice([s for s in MONTHS if s != t["season"] and not (s == "snow" and bare)]))
    when = datetime.strptime(t["datetime"], "%Y:%m:%d %H:%M:%S") + timedelta(days=365 * int(rng.integers(1, 4)))
    when = when.replace(month=MONTHS[t["season"]][0], day=int(rng.integers(1, 29)))
    t["datetime"] = when.strftime("%Y:%m:%d %H:%M:%S")
    t["sun_azimuth"], t["clouds"], changes = round(rng.uniform(100, 250), 1), [], []
    todo = []
    if rng.random() >= 0.4:
        todo = list(rng.permutation(["add", "remove", "road", "clear"]))[: int(rng.integers(2, 5))]
    ground, touched = _Ground(t), set()  # a kind changes once, so that no change undoes another
    for what in todo:
        if len(changes) == 2:
            break
        if what == "remove" and (left := [g for g in t["groups"] if g["kind"] not in touched]):
            g = left[rng.integers(len(left))]
            touched.add(g["kind"])
            mine = _of(t, g["kind"])
            gone = mine[: int(rng.integers(1, min(len(mine), 6) + 1))]
            t["objects"] = [o for o in t["objects"] if o not in gone]
            n, w = len(gone), place_of(t, gone)
            en = f"{_count_en(g['kind'], n)}{_at_en(w)} {'is' if n == 1 else 'are'} gone"
            zh = f"{_at_zh(w)}{'的' if w else ''}{_count_zh(g['kind'], n)}消失了"
            changes.append({"kind": f"{g['kind']}_removed", "en": en, "zh": zh})
        elif what == "add":
            kind = str(rng.choice([k for k in COVERS[t["cover"]][5].split() if k not in touched] or ["pond"]))
            touched.add(kind)
            new = ground.group(rng, kind, int(rng.integers(1, 4)))
            t["objects"] += new
            if new:
                w = place_of(t, new)
                en = f"{_count_en(kind, len(new), 'new ')}{_at_en(w)}"
                changes.append({"kind": f"{kind}_added", "en": en, "zh": f"{_at_zh(w)}新增{_count_zh(kind, len(new))}"})
        elif what == "road" and not t["counts"]["road"] and t["cover"] in OPEN_LAND:
            spots = [(axis, where) for axis, places in CROSSES.items() for where in places]
            for i in rng.permutation(6):
                line = _line(t, rng, "road", *spots[i])
                clash = any((x["axis"], x["where"]) == spots[i] for x in t["lines"])
                if not clash and not (ground.line_mask(line) & ground.taken).any():
                    t["lines"].append(line)
                    ground.line_masks.append(ground.line_mask(line))
                    fact = ("line", "road", line["axis"], line["where"])
                    en = say_en(fact).replace("a road", "a new road")
                    changes.append({"kind": "road_added", "en": en, "zh": "新增：" + say_zh(fact)})
                    break
        elif what == "clear" and t["cover"] in ("forest", "orchard"):
            r = str(rng.choice(["northwest", "northeast", "southwest", "southeast"]))
            x0, y0, x1, y1 = REGIONS[r][2]
            x, y = (x0 + x1) / 2 * t["width"], (y0 + y1) / 2 * t["height"]
            t["clearings"] = [{"x": round(x, 1), "y": round(y, 1), "r": round(34 * _unit(t), 1)}]
            en, zh = f"trees cleared{_at_en(r)}", f"{_at_zh(r)}的树木被砍伐"
            changes.append({"kind": "trees_cleared", "en": en, "zh": zh})
        t = _summed(t)
    return t, changes


# ---------------------------------------------------------------- texts ----------------------------------------------
# A fact is a tuple: ("cover", c) ("group", kind, count, where) ("line", kind, axis, where) ("side", side)
# ("cloud", where) ("has", what, bool) ("snow", bool). `holds` says whether it is true of a scene.
def holds(t: dict, fact: tuple) -> bool:
    what, *v = fact
    if what == "cover":
        return t["cover"] == v[0]
    if what == "group":
        mine = _of(t, v[0])
        same = len(mine) == v[1] or (v[1] >= MANY and len(mine) >= MANY)
        if v[2] == "road":
            return same and all(o["on"] == "road" for o in mine)
        return same and (v[2] is None or all(in_region(v[2], *spot) for spot in _spots(t, mine)))
    if what == "line":
        return any((x["kind"], x["axis"], x["where"]) == tuple(v) for x in t["lines"])
    if what == "side":
        return bool(t["water"]) and t["water"]["side"] == v[0]
    if what == "cloud":
        return bool(t["clouds"]) and (v[0] is None or all(in_region(v[0], *spot) for spot in _spots(t, t["clouds"])))
    if what == "has":
        return (bool(t["clouds"]) if v[0] == "clouds" else t["counts"][v[0]] > 0) == v[1]
    return (t["season"] == "snow") == v[0]


def _count_en(kind: str, n: int, new: str = "") -> str:
    return f"{'many' if n >= MANY else NUMBERS[n][0]} {new}{KINDS[kind][0 if n == 1 else 1]}"


def _count_zh(kind: str, n: int) -> str:
    return f"许多{KINDS[kind][3]}" if n >= MANY else f"{NUMBERS[n][1]}{KINDS[kind][2]}{KINDS[kind][3]}"


def _at_en(where: str | None) -> str:
    return "" if where is None else " on the road" if where == "road" else f" in the {REGIONS[where][0]}"


def _at_zh(where: str | None) -> str:
    return "" if where is None else "公路上" if where == "road" else REGIONS[where][1]


def one(kind: str) -> str:
    """A kind with its article: a storage tank, an aircraft."""
    return f"{'an' if kind == 'aircraft' else 'a'} {NAMES[kind][0]}"


def say_en(fact: tuple) -> str:
    """A fact as an English noun phrase."""
    what, *v = fact
    if what == "group":
        return _count_en(v[0], v[1]) + _at_en(v[2])
    if what == "line":
        return f"a {LINES[v[0]][0]} running {AXES[v[1]][0]} through the {v[2]}"
    if what == "cloud":
        return "scattered clouds" if v[0] is None else f"clouds over the {v[0]}"
    if what == "has":
        return ("" if v[0] == "clouds" and v[1] else "a " if v[1] else "no ") + v[0]
    return {"cover": lambda: COVERS[v[0]][0], "side": lambda: f"the sea to the {v[0]}",
            "snow": lambda: "snow on the ground" if v[0] else "no snow on the ground"}[what]()  # fmt: skip


def say_zh(fact: tuple, noun: bool = False) -> str:
    """A fact as a Chinese clause, or as a noun phrase."""
    what, *v = fact
    if what == "group":
        at, body = _at_zh(v[2]), _count_zh(v[0], v[1])
        return (f"{at}的{body}" if at else body) if noun else f"{at}有{body}"
    if what == "line":
        body = f"一条{AXES[v[1]][1]}的{LINES[v[0]][1]}"
        return f"{REGIONS[v[2]][1]}的{body}" if noun else f"{body}穿过{REGIONS[v[2]][1]}"
    if what == "cloud":
        at = REGIONS[v[0]][1] + "上空" if v[0] else "空中"
        return f"{at}的云" if noun else f"{at}有云"
    if what == "has":
        return ("有" if v[1] else "没有") + {"clouds": "云"}.get(v[0], LINES.get(v[0], ("", ""))[1])
    return {"cover": lambda: COVERS[v[0]][2] + COVERS[v[0]][1],
            "side": lambda: f"{SIDES[v[0]][1]}侧{'的' if noun else '是'}大海",
            "snow": lambda: f"地面{'' if v[0] else '没'}有积雪"}[what]()  # fmt: skip


def caption_facts(t: dict) -> list[list[tuple]]:
    """The facts of the five captions: the land cover first, then one to five more; both languages tell the same."""
    rng = np.random.default_rng([t["seed"], t["img_id"], 2])
    groups = [("group", g["kind"], g["count"], g["where"]) for g in t["groups"]]
    groups.sort(key=lambda g: g[2] >= MANY)  # a countable group says more than 'many houses'
    lines = [("line", x["kind"], x["axis"], x["where"]) for x in t["lines"]]
    sea = [("side", t["water"]["side"])] if t["water"] and t["water"]["side"] else []
    sky = [("cloud", t["cloud_where"])] if t["clouds"] else []
    snow = [("snow", True)] if t["season"] == "snow" else []
    absent = [("has", k, False) for k in ("road", "river") if not t["counts"][k]] + (
        [] if t["clouds"] else [("has", "clouds", False)]
    )
    one = [absent[rng.integers(len(absent))]] if absent else []
    cover, main = [("cover", t["cover"])], (groups or lines or sea)[:1]
    rest = [f for f in sea + lines + groups if f not in main]
    return [
        cover + main + rest[:1],
        cover + (groups + lines + sea + sky + snow)[:5],
        cover + main + (sky + snow + lines)[:1],
        cover + main + rest[-1:],
        cover + (groups[-1:] or main) + [f for f in sea + lines[:1] if f not in main] + one,
    ]


def phrase(facts: list[tuple], style: int, language: str) -> str:
    """One of five wordings of a land cover and its facts."""
    if language == "zh":
        cover, clauses = say_zh(facts[0]), [say_zh(f) for f in facts[1:]]
        bare, nouns = cover[2:], "和".join(say_zh(f, noun=True) for f in facts[1:])
        return [f"一幅{bare}的航拍图像，{'，'.join(clauses)}。", f"卫星图像中是{cover}，{'，'.join(clauses)}。",
                f"{'，'.join(clauses)}，周围是{cover}。", f"从空中俯瞰{cover}，可以看到{nouns}。",
                f"图中为{cover}。{'，'.join(clauses)}。"][style]  # fmt: skip
    cover, parts = say_en(facts[0]), [say_en(f) for f in facts[1:]]
    joined = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    text = [f"an aerial image of {cover} with {joined}", f"{cover}: {'; '.join(parts)}",
            f"{joined} in a scene of {cover}", f"a satellite view of {cover}, showing {joined}",
            f"this overhead photo shows {cover}, {joined}"][style]  # fmt: skip
    return text[0].upper() + text[1:] + "."


def captions(truth: dict, language: str = "en") -> list[str]:
    """Five captions, one per wording, every one true of the scene."""
    return [phrase(facts, i, language) for i, facts in enumerate(caption_facts(truth))]


# What is asked for the second wording, which lists all there is; for the others it is what every captioner is asked.
DETAIL = {"en": "Describe the image in detail.", "zh": "详细描述这幅图像。"}


def object_words() -> dict:
    """How captions name objects, for `caption.py eval --objects`: {object: words}, and phrases that name none."""
    words = {kind: [*dict.fromkeys(v[:2]), v[3]] for kind, v in KINDS.items()}
    words |= {kind: [v[0], v[1]] for kind, v in LINES.items()}
    covers = [name for v in COVERS.values() for name in v[:2]]
    negated = [f"no {kind}" for kind in LINES] + [f"没有{v[1]}" for v in LINES.values()]
    places = [_at_en("road").strip(), _at_zh("road")]  # vehicles 'on the road': the road is named elsewhere, or not
    return {"words": words, "ignore": [*covers, *negated, *places]}


def _misses(t: dict, fact: tuple) -> list[tuple]:
    """What a fact may be changed into so that it becomes plainly false of the scene."""
    what, *v = fact
    if what == "cover":
        return [("cover", c) for c in COVERS if c != v[0] and {c, v[0]} not in ALIKE]
    if what == "group":
        kind, count, where = v
        out = [("group", kind, n, where) for n in (*NUMBERS, MANY) if n != count and (n < MANY or count < MANY)]
        if where != "road":  # only vehicles stand on roads
            out += [("group", k, count, where) for k in KINDS if not t["counts"][k]] * 2
        if where in REGIONS:
            spots = _spots(t, _of(t, kind))
            out += [("group", kind, count, r) for r in REGIONS if not any(in_region(r, *p) for p in spots)] * 2
        return out
    if what == "line":
        kind, axis, where = v
        out = [("line", k, axis, where) for k in LINES if not t["counts"][k]]
        out += [("line", kind, axis, w) for w in CROSSES[axis]]
        return out + [("line", kind, "ew" if axis == "ns" else "ns", where)] * (2 if where == "centre" else 0)
    if what == "cloud":
        spots = _spots(t, t["clouds"])
        return [("cloud", r) for r in REGIONS if not any(in_region(r, *p) for p in spots)]
    if what == "side":
        return [("side", s) for s in SIDES]
    return [(what, *v[:-1], not v[-1])]  # has, snow


def negatives(truth: dict, language: str = "en") -> list[str]:
    """For each caption the same wording with one fact changed, false of the scene."""
    rng, out = np.random.default_rng([truth["seed"], truth["img_id"], 3 if language == "en" else 4]), []
    for style, facts in enumerate(caption_facts(truth)):
        while True:
            i = int(rng.integers(len(facts)))
            options = [f for f in _misses(truth, facts[i]) if f != facts[i] and not holds(truth, f)]
            if options:
                break
        changed = [*facts[:i], options[rng.integers(len(options))], *facts[i + 1 :]]
        out.append(phrase(changed, style, language))
    return out


def area_m2(t: dict, kind: str) -> int:
    """Ground covered by all objects of a kind, in whole square metres."""
    shape = math.pi / 4 if kind == "tank" else 1
    return round(sum(o["w"] * o["l"] * shape for o in _of(t, kind)) * t["gsd_m"] ** 2)


def questions(truth: dict) -> list[dict]:
    """11 to 21 questions in the manner of RSVQA: [{"type", "question", "answer"}]."""
    rng, t, out = np.random.default_rng([truth["seed"], truth["img_id"], 5]), truth, []
    counts = t["counts"]
    yes, no = ([k for k in counts if (counts[k] > 0) == want] for want in (True, False))
    yn = {True: "yes", False: "no"}

    def ask(kind, question, answer):
        if all(q["question"] != question for q in out):
            out.append({"type": kind, "question": question, "answer": answer})

    for k in [*rng.permutation(yes)[:2], *rng.permutation(no)[:2]]:
        ask("presence", f"Is there {one(k)}?", yn[counts[k] > 0])
    ask("presence", "Are there clouds?", yn[bool(t["clouds"])])
    for k in rng.permutation([g["kind"] for g in t["groups"]])[:2]:
        xs, ys = zip(*_spots(t, _of(t, k)))
        sides = (("north", ys), ("south", [1 - y for y in ys]), ("west", xs), ("east", [1 - x for x in xs]))
        for region, spots in sides:
            if rng.random() < 0.25 and (min(spots) < 0.42 or min(spots) > 0.55):  # nothing that lies on the border
                ask("presence", f"Is there {one(k)} in the {region}?", yn[min(spots) < 0.5])
    here, gone = ([k for k in kinds if k in KINDS] for kinds in (yes, no))
    for k in [*here, *rng.permutation(gone)[:1]]:
        wording = rng.choice(["How many {} are there?", "What is the number of {}?"])
        ask("count", str(wording).format(NAMES[k][1]), str(counts[k]))
    for wanted in (True, False, True, False):  # about as many yes as no, so that a constant answer earns nothing
        for _ in range(8):
            a, b = rng.permutation([*here, *rng.permutation(gone)[:3]])[:2]
            forms = (
                ("Are there more {} than {}?", counts[a] > counts[b]),
                ("Are there less {} than {}?", counts[a] < counts[b]),
                ("Is the number of {} equal to the number of {}?", counts[a] == counts[b]),
            )
            form, true = forms[rng.choice(3, p=[0.4, 0.4, 0.2])]
            if true == wanted:
                ask("comp", form.format(NAMES[a][1], NAMES[b][1]), yn[true])
                break
    ask("rural_urban", "Is it a rural or an urban area?", t["rural_urban"])
    for k in [k for k in ("building", "tank", "field") if counts[k]] or ["building"]:
        ask("area", f"What is the area covered by {NAMES[k][1]}?", f"{area_m2(t, k)}m2")
    return out


def dialogues(truth: dict, language: str = "en") -> list[list[list[str]]]:
    """Conversations of two or three turns about a scene: [[[question, answer], ...], ...]. After the first turn a question
    names nothing ("How many are there?") or a kind alone ("And ships?"): the turns before it say what is meant. (Only the one
    about clouds stands for itself.)"""
    rng, t, zh = np.random.default_rng([truth["seed"], truth["img_id"], 6]), truth, language == "zh"
    groups = t["groups"]
    absent = [kind for kind in KINDS if not t["counts"][kind]]

    def number(kind):
        n = t["counts"][kind]
        return f"{_count_zh(kind, n)}。" if zh else f"{_count_en(kind, n).capitalize()}."

    def there(kind, yes=True):
        """The question after a kind and its answer."""
        name = KINDS[kind][3 if zh else 1]
        if zh:
            return [f"图中有{name}吗？", f"有{name}。" if yes else f"没有{name}。"]
        return [
            f"Are there any {name} in the image?",
            f"Yes, there are {name}." if yes else f"No, there are no {name}.",
        ]

    how_many, where = ("有多少？", "在哪里？") if zh else ("How many are there?", "Where are they?")
    out = []
    for group in groups[:2]:
        kind, place = group["kind"], (_at_zh if zh else _at_en)(group["where"])
        turns = [there(kind), [how_many, number(kind)]]
        if place:
            turns.append([where, f"在{place}。" if zh else f"{place.strip().capitalize()}."])
        out.append(turns)
    asked = [*rng.permutation(absent)[:2], *(group["kind"] for group in groups)]
    first, other = rng.permutation(asked)[:2]
    name = KINDS[other][3 if zh else 1]
    out.append(
        [
            there(first, first not in absent),
            [f"那{name}呢？" if zh else f"And {name}?", there(other, other not in absent)[1]],
        ]
    )
    cover, clouds = say_zh(("cover", t["cover"])) if zh else say_en(("cover", t["cover"])), bool(t["clouds"])
    if zh:
        turns = [["这是什么地方？", f"这是{cover}。"], ["上空有云吗？", "有云。" if clouds else "没有云。"]]
    else:
        turns = [["What kind of place is this?", f"This is {cover}."],
                 ["Are there clouds over it?", "Yes, there are clouds." if clouds else "No, there are no clouds."]]  # fmt: skip
    return [*out, turns]


# ---------------------------------------------------------------- picture --------------------------------------------
GREEN = {
    "spring": [(108, 138, 70), (132, 150, 84), (92, 120, 74)],
    "summer": [(76, 106, 54), (98, 118, 66), (128, 126, 74), (60, 92, 60)],
    "autumn": [(150, 116, 62), (134, 98, 56), (112, 104, 58), (164, 132, 84)],
    "winter": [(122, 112, 88), (102, 100, 80), (136, 126, 104)],
    "snow": [(104, 104, 94), (84, 92, 84), (122, 116, 104)],
}
SOIL = [(168, 136, 98), (196, 170, 134), (146, 98, 72), (126, 112, 100), (208, 196, 174), (110, 88, 70)]
PAVED = [(142, 142, 140), (166, 162, 152), (120, 122, 126), (178, 172, 166), (134, 126, 116)]
WATER = [(42, 72, 96), (62, 96, 92), (78, 92, 80), (30, 46, 58), (92, 122, 138)]
ROOFS = [(176, 84, 62), (150, 72, 60), (96, 100, 108), (214, 210, 202), (120, 134, 156), (190, 150, 110), (70, 74, 82)]
CARS = [(238, 238, 238), (186, 40, 38), (40, 70, 160), (230, 190, 50), (200, 204, 210), (30, 32, 36), (60, 120, 84)]
S = 2  # supersampling: shapes are drawn twice as large and averaged, which smooths their edges


class _Canvas:
    """One picture in the making, (H*S, W*S): coordinate grids, seeded noise, and a PIL sheet once shapes begin."""

    def __init__(self, t: dict, date: int):
        self.t, self.u = t, _unit(t) * S
        self.h, self.w = t["height"] * S, t["width"] * S
        self.layout = np.random.default_rng([t["seed"], t["img_id"], 10])  # the same at every date
        self.look = np.random.default_rng([t["seed"], t["img_id"], 11 + date])  # colours, sensor
        self.y, self.x = np.mgrid[: self.h, : self.w].astype(np.float32)
        self.green, self.soil, self.paved, self.water = (
            self.colour(p) for p in (GREEN[t["season"]], SOIL, PAVED, WATER)
        )
        self.sun = shadow(t, 1)

    def colour(self, palette, jitter: float = 8) -> np.ndarray:
        return np.float32(palette[self.look.integers(len(palette))]) + np.float32(self.look.normal(0, jitter, 3))

    def noise(self, cell: float, rng=None) -> np.ndarray:
        """Smooth noise (H*S, W*S) of about -1 to 1 with features of `cell` design pixels."""
        shape = [max(2, round(v / (cell * self.u))) for v in (self.h, self.w)]
        grid = (rng or self.layout).uniform(-1, 1, shape).astype(np.float32)
        return np.asarray(Image.fromarray(grid).resize((self.w, self.h), Image.Resampling.BICUBIC))

    def turned(self, degrees: float):
        a = math.radians(degrees)
        return self.x * math.cos(a) + self.y * math.sin(a), self.y * math.cos(a) - self.x * math.sin(a)

    def shaded(self, colour, amount) -> np.ndarray:
        """A colour (3,) made lighter or darker by `amount` (H*S, W*S), a fraction."""
        return np.float32(colour) * (1 + amount[..., None])

    def trees(self, image: np.ndarray, number: int, size: tuple[float, float], spots=None) -> np.ndarray:
        """Round crowns with a lit side and a shadow, on an (H*S, W*S, 3) picture."""
        (sheet, d), rng, u = _sheet(image), self.layout, self.u
        spots = rng.uniform(0, 1, (number, 2)) * (self.w, self.h) if spots is None else spots
        tone = self.green * 0.82
        shades = np.float32([[0.42], [0.85], [1.2]])  # dark, middle, lit
        tones = tone * rng.normal(1, 0.13, (len(spots), 1, 1)) * shades
        for (x, y), r, shades in zip(spots.tolist(), (rng.uniform(*size, len(spots)) * u).tolist(), _ink(tones)):
            dark, mid, lit = map(tuple, shades)
            sx, sy = self.sun[0] * r * 0.6, self.sun[1] * r * 0.6
            d.ellipse((x + sx - r, y + sy - r, x + sx + r, y + sy + r), fill=dark)
            d.ellipse((x - r, y - r, x + r, y + r), fill=mid)
            x, y, r = x - sx * 0.5, y - sy * 0.5, r * 0.55
            d.ellipse((x - r, y - r, x + r, y + r), fill=lit)
        return np.asarray(sheet, np.float32)


def _sheet(image: np.ndarray) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An (H, W, 3) picture of 0..255 to draw on, and the pen."""
    sheet = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    return sheet, ImageDraw.Draw(sheet)


def _ink(colour, light: float = 1):
    """A colour (..., 3) as PIL wants it: a tuple, or nested lists of 0..255."""
    whole = np.clip(np.float32(colour) * light, 0, 255).astype(int).tolist()
    return tuple(whole) if isinstance(whole[0], int) else whole


def _fields(c: _Canvas) -> np.ndarray:
    """Farmland: a patchwork cut from a turned rectangle, every piece with its crop and its furrows."""
    p, q = c.turned(c.t["grid"] * 2)
    pieces = [(float(p.min()), float(p.max()), float(q.min()), float(q.max()))]
    while len(pieces) < 22:  # always cut the largest piece, across its longer side
        p0, p1, q0, q1 = pieces.pop(
            max(range(len(pieces)), key=lambda i: (pieces[i][1] - pieces[i][0]) * (pieces[i][3] - pieces[i][2]))
        )
        f = c.layout.uniform(0.36, 0.64)
        if p1 - p0 > q1 - q0:
            pieces += [(p0, p0 + f * (p1 - p0), q0, q1), (p0 + f * (p1 - p0), p1, q0, q1)]
        else:
            pieces += [(p0, p1, q0, q0 + f * (q1 - q0)), (p0, p1, q0 + f * (q1 - q0), q1)]
    out, grain = np.zeros((c.h, c.w, 3), np.float32), c.noise(6) * 0.05
    for p0, p1, q0, q1 in pieces:
        m = (p >= p0) & (p <= p1) & (q >= q0) & (q <= q1)
        if not m.any():
            continue
        colour = c.colour(GREEN[c.t["season"]] + SOIL[:4] if c.look.random() < 0.8 else SOIL, 10)
        wave = (p if c.layout.random() < 0.5 else q)[m] * (2 * np.pi / (c.layout.uniform(4.5, 7.5) * c.u))
        edge = np.minimum(np.minimum(p[m] - p0, p1 - p[m]), np.minimum(q[m] - q0, q1 - q[m])) < 1.1 * c.u
        out[m] = colour * (1 + c.layout.uniform(0.06, 0.2) * np.sin(wave) + grain[m] - 0.3 * edge)[:, None]
    return out


def _orchard(c: _Canvas) -> np.ndarray:
    a, step = c.t["grid"] * 2, 10.5 * c.u
    n = int(max(c.h, c.w) / step) + 4
    i, j = (v.ravel() * step for v in np.mgrid[-n:n, -n:n])
    r = math.radians(a)
    spots = np.stack([i * math.cos(r) - j * math.sin(r) + c.w / 2, i * math.sin(r) + j * math.cos(r) + c.h / 2], 1)
    spots = spots[(spots > -step).all(1) & (spots < (c.w + step, c.h + step)).all(1)]
    return c.trees(c.shaded(c.soil, 0.06 * c.noise(14) + 0.05 * c.noise(2)), 0, (3.1, 3.9), spots)


def _forest(c: _Canvas) -> np.ndarray:
    return c.trees(c.shaded(c.green * 0.5, 0.1 * c.noise(20)), 1300, (2.6, 5.2))


def _grass(c: _Canvas) -> np.ndarray:
    base = c.shaded(c.green, 0.13 * c.noise(34) + 0.08 * c.noise(13) + 0.05 * c.noise(2))
    bare = np.clip(c.noise(30) * 2 - 0.9, 0, 1)[..., None] * 0.6
    return base * (1 - bare) + c.soil * bare


def _desert(c: _Canvas) -> np.ndarray:
    p, _ = c.turned(c.layout.uniform(0, 180))
    phase = (p / (c.layout.uniform(13, 20) * c.u) + 0.9 * c.noise(40) + 0.2 * c.noise(14)) % 1
    dune = np.where(phase < 0.72, phase / 0.72, (1 - phase) / 0.28)  # a long windward and a short lee side
    return c.shaded(c.soil, 0.34 * (dune - 0.55) + 0.03 * c.noise(2))


def _slabs(c: _Canvas) -> np.ndarray:
    """Paved ground with joints and stains: industry, quays."""
    p, q = c.turned(c.t["grid"])
    step = c.layout.uniform(15, 20) * c.u
    joint = ((p % step) < 1.2 * c.u) | ((q % step) < 1.2 * c.u)
    tile = c.layout.normal(0, 0.045, (80, 80))[(p // step).astype(int) % 80, (q // step).astype(int) % 80]
    return c.shaded(c.paved, tile - 0.2 * joint + 0.05 * c.noise(18) + 0.04 * c.noise(2))


def _port(c: _Canvas) -> np.ndarray:
    """Slabs with stacks of containers: long rows of touching boxes (a vehicle stands alone)."""
    (sheet, d), u = _sheet(_slabs(c)), c.u
    horizontal = c.t["water"]["side"] in ("north", "south")
    for a in np.arange(4, 240, 15) * u:
        if c.layout.random() < 0.75:
            start, n = c.layout.uniform(0, 0.6) * 168 * u, int(c.layout.integers(6, 16))
            for k in range(n):
                b, colour = start + k * 4.4 * u, _ink(c.colour(ROOFS + CARS[1:4], 5))
                box = (b, a, b + 4 * u, a + 9 * u) if horizontal else (a, b, a + 9 * u, b + 4 * u)
                d.rectangle(box, fill=colour)
    return np.asarray(sheet, np.float32)


def _lots(c: _Canvas) -> np.ndarray:
    """A settlement's gardens: lots with hedges and scattered trees."""
    u, t = c.u, c.t
    i, j = ((c.x - (12 - 13.5) * u) // (27 * u)).astype(int) % 30, ((c.y - (14 - 16) * u) // (32 * u)).astype(int) % 30
    hedge = ((c.x + 1.5 * u) % (27 * u) < 1.6 * u) | ((c.y + 2 * u) % (32 * u) < 1.6 * u)
    mix = c.layout.uniform(0, 0.7, (30, 30))[i, j][..., None]
    out = c.green * (1 - mix) + c.soil * mix
    out = out * (1 + c.layout.normal(0, 0.07, (30, 30))[i, j] - 0.35 * hedge + 0.06 * c.noise(3))[..., None]
    return c.trees(out.astype(np.float32), int(t["width"] * t["height"] / 700), (2.2, 4))


def _asphalt(c: _Canvas) -> np.ndarray:
    """A parking lot: bays marked in white on dark ground."""
    (sheet, d), u = _sheet(c.shaded(c.paved * 0.66, 0.06 * c.noise(24) + 0.05 * c.noise(2))), c.u
    for x, y in bays(c.t):
        x, y = x * S, y * S
        for k in (-5.5, 5.5):
            d.line([(x + k * u, y - 8 * u), (x + k * u, y + 8 * u)], fill=(216, 214, 204), width=max(1, round(0.9 * u)))
    return np.asarray(sheet, np.float32)


def _park(c: _Canvas) -> np.ndarray:
    """Lawn with winding light paths and single trees."""
    out = c.shaded(c.green * 1.08, 0.06 * c.noise(30) + 0.04 * c.noise(2))
    for _ in range(2):
        ring = np.hypot(c.x - c.layout.uniform(0, c.w), c.y - c.layout.uniform(0, c.h)) + 9 * c.u * c.noise(40)
        path = np.clip(2.2 - np.abs(ring - c.layout.uniform(45, 100) * c.u) / c.u, 0, 1)[..., None]
        out = out * (1 - path) + np.float32((206, 192, 164)) * path
    return c.trees(out, int(c.layout.integers(45, 90)), (3.2, 6))


def _airfield(c: _Canvas) -> np.ndarray:
    """Mown grass in broad bands, and a paved apron under the aircraft."""
    p, _ = c.turned(20)
    out = c.shaded(c.green, 0.05 * np.sign(np.sin(p * 2 * np.pi / (26 * c.u))) + 0.06 * c.noise(26) + 0.04 * c.noise(2))
    stands = [o for o in c.t["objects"] if o["kind"] in ("aircraft", "building")]
    sheet, d = _sheet(out)
    if stands:
        pad = 22 * c.u
        box = [f(o[k] for o in stands) * S + s * pad for f, s in ((min, -1), (max, 1)) for k in ("x", "y")]
        d.rounded_rectangle(box, 8 * c.u, fill=_ink(c.paved))
    return np.asarray(sheet, np.float32)


def _beach(c: _Canvas) -> np.ndarray:
    sand = np.float32([(214, 192, 152), (190, 178, 158), (224, 210, 184), (176, 150, 120)][c.look.integers(4)])
    return c.shaded(sand, 0.05 * c.noise(20) + 0.05 * c.noise(1.6) + 0.04 * c.noise(6))


GROUND = {
    "farmland": _fields, "orchard": _orchard, "forest": _forest, "grassland": _grass, "desert": _desert,
    "lake": lambda c: c.trees(_grass(c), 130, (3, 5)), "beach": _beach, "residential": _lots, "industrial": _slabs,
    "port": _port, "airport": _airfield, "parking": _asphalt, "park": _park,
}  # fmt: skip


def _waves(c: _Canvas) -> np.ndarray:
    p, _ = c.turned(c.layout.uniform(0, 180))
    ripple = np.sin(p * 2 * np.pi / (5 * c.u) + 3 * c.noise(18))
    return c.shaded(c.water, 0.05 * ripple + 0.08 * c.noise(40) + 0.03 * c.noise(2))


def _under(image: np.ndarray, mask: Image.Image, over) -> np.ndarray:
    """Lay `over` on the picture where the mask (PIL 'L') is set."""
    m = np.asarray(mask, np.float32)[..., None] / 255
    return image * (1 - m) + over * m


def _with_water(c: _Canvas, image: np.ndarray) -> np.ndarray:
    shore = Image.new("L", (c.w, c.h))
    points = [(x * S, y * S) for x, y in c.t["water"]["points"]]
    ImageDraw.Draw(shore).polygon(points, fill=255)
    sea = _waves(c)
    if c.t["cover"] == "port":  # a quay wall
        quay = shore.copy()
        ImageDraw.Draw(quay).line(points, fill=255, width=round(4 * c.u))
        return _under(_under(image, quay, c.paved * 0.5), shore, sea)
    soft = np.asarray(shore.filter(ImageFilter.GaussianBlur(5 * c.u)), np.float32) / 255
    image = image * (1 - 0.3 * np.clip(soft * 3, 0, 1))[..., None]  # a wet edge
    if c.t["cover"] == "beach":  # and surf
        near = soft + 0.05 * c.noise(8)
        foam = np.clip(1 - np.abs(near - 0.62) / 0.05, 0, 1)
        foam = foam + 0.7 * np.clip(1 - np.abs(near - 0.85) / 0.03, 0, 1)
        foam = foam[..., None].clip(0, 0.9)
        sea = sea * (1 - foam) + np.float32((236, 240, 240)) * foam
    return _under(image, shore, sea)


def _at(o: dict, points) -> list[tuple[float, float]]:
    """Points in an object's own frame (across, ahead; -0.5 to 0.5 of its width and length) -> supersampled pixels."""
    a = math.radians(o["angle"])
    return [(S * (o["x"] + x * o["w"] * math.cos(a) + y * o["l"] * math.sin(a)),
             S * (o["y"] + x * o["w"] * math.sin(a) - y * o["l"] * math.cos(a))) for x, y in points]  # fmt: skip


BOX = [(-0.5, 0.5), (0.5, 0.5), (0.5, -0.5), (-0.5, -0.5)]
HULL = [(0, 0.5), (0.32, 0.34), (0.5, 0.12), (0.5, -0.42), (0.36, -0.5)]
HULL += [(-x, y) for x, y in HULL[:0:-1]]
PLANE = [(0, 0.5), (0.055, 0.42), (0.06, 0.16), (0.5, -0.1), (0.5, -0.19), (0.06, -0.06), (0.045, -0.34), (0.19, -0.43),
         (0.19, -0.5), (0, -0.46)]  # fmt: skip
PLANE += [(-x, y) for x, y in PLANE[-2:0:-1]]
OVAL = [(0.5 * math.cos(a), 0.5 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 40, endpoint=False)]
OUTLINE = {"ship": HULL, "aircraft": PLANE, "tank": OVAL, "pond": OVAL}


def _object(c: _Canvas, d: ImageDraw.ImageDraw, o: dict, rng):
    """Draw one object; its colours come from its own place, so that it looks the same at both dates."""

    def fill(points, colour, light=1.0):
        d.polygon(_at(o, points), fill=_ink(colour, light))

    thin = max(1, round(0.9 * c.u))
    pick = lambda palette: np.float32(palette[rng.integers(len(palette))]) * rng.uniform(0.9, 1.1)  # noqa: E731
    kind = o["kind"]
    if kind == "building":
        roof = pick(ROOFS)
        fill(BOX, roof, 0.55)
        inner = 0.5 - 0.9 / max(o["w"] / _unit(c.t), 8)
        if o["w"] * o["l"] < 600 * _unit(c.t) ** 2:  # a gable: the half that faces the sun is lighter
            across = math.radians(o["angle"])
            lit = math.cos(across) * c.sun[0] + math.sin(across) * c.sun[1] < 0
            for side, light in ((1, 1.15 if lit else 0.82), (-1, 0.82 if lit else 1.15)):
                fill([(0, inner), (side * inner, inner), (side * inner, -inner), (0, -inner)], roof, light)
        else:  # a flat shed with ribs and vents
            fill([(x * 2 * inner, y * 2 * inner) for x, y in BOX], roof)
            for k in np.arange(-0.4, 0.45, 0.16):
                d.line(_at(o, [(-inner, k), (inner, k)]), fill=_ink(roof, 0.84), width=thin)
            for k in (-0.25, 0.1):
                fill([(x * 0.2, y * 0.12 + k) for x, y in BOX], (226, 226, 222))
    elif kind == "vehicle":
        body = pick(CARS)
        fill(BOX, (40, 40, 42))
        fill([(x * 0.84, y * 0.9) for x, y in BOX], body)
        fill([(x * 0.7, y * 0.16 + 0.17) for x, y in BOX], (34, 40, 48))
        fill([(x * 0.66, y * 0.1 - 0.28) for x, y in BOX], (34, 40, 48))
    elif kind == "aircraft":
        fill(PLANE, pick([(236, 238, 240), (206, 210, 216), (224, 216, 204)]))
        d.line([*_at(o, PLANE), _at(o, PLANE[:1])[0]], fill=(96, 98, 104), width=max(1, thin // 2))
        fill([(x * 0.09, y * 0.84 - 0.02) for x, y in BOX], (250, 250, 250))
        for s in (-0.22, 0.22):
            fill([(x * 0.06 + s, y * 0.12 + 0.04) for x, y in BOX], (110, 114, 122))
    elif kind == "ship":
        fill([(-0.3, -0.5), (0.3, -0.5), (0.75, -0.95), (-0.75, -0.95)], np.clip(c.water * 1.25 + 14, 0, 255))  # wake
        hull = pick([(180, 70, 58), (70, 76, 90), (222, 222, 220), (120, 84, 66)])
        fill(HULL, hull, 0.75)
        fill([(x * 0.76, y * 0.9) for x, y in HULL], pick([(206, 196, 178), (190, 194, 198), (160, 140, 120)]))
        fill([(x * 0.62, y * 0.2 - 0.3) for x, y in BOX], (246, 246, 244))
        fill([(x * 0.5, y * 0.3 + 0.06) for x, y in BOX], hull, 0.95)
    elif kind == "tank":
        shell = pick([(232, 232, 228), (204, 208, 206), (212, 198, 176)])
        fill(OVAL, shell, 0.62)
        for k in np.linspace(0.9, 0.2, 5):  # a dome: lighter toward the sun
            dx, dy = (side * o["w"] * 0.14 * (1 - k) for side in c.sun)
            moved = {**o, "x": o["x"] - dx, "y": o["y"] - dy}
            d.polygon(_at(moved, [(x * k, y * k) for x, y in OVAL]), fill=_ink(shell, 1.08 - 0.24 * k))
        fill([(x * 0.1, y) for x, y in BOX], shell, 0.8)
    elif kind == "field":
        track = rng.random() < 0.6
        fill(BOX, (168, 88, 66) if track else (110, 140, 84))
        for n, k in enumerate(np.linspace(-0.375, 0.375, 6)):
            fill([(x * 0.76, y * 0.15 + k) for x, y in BOX], (96, 146, 80) if n % 2 else (82, 130, 70))
        white = (240, 240, 236)
        d.line([*_at(o, [(x * 0.7, y * 0.84) for x, y in BOX]), _at(o, [(-0.35, 0.42)])[0]], fill=white, width=thin)
        d.line(_at(o, [(-0.35, 0), (0.35, 0)]), fill=white, width=thin)
        r = 0.14 * o["w"]
        ring = [(x * 2 * r / o["w"], y * 2 * r / o["l"]) for x, y in OVAL]
        d.line(_at(o, [*ring, ring[0]]), fill=white, width=thin)
    else:  # pond
        fill(OVAL, c.soil, 0.7)
        fill([(x * 0.9, y * 0.92) for x, y in OVAL], c.water)
        fill([(x * 0.6, y * 0.62) for x, y in OVAL], c.water, 0.9)


def draw(truth: dict, date: int = 0) -> np.ndarray:
    """The picture of a truth: uint8 (H, W, 3), or uint16 (H, W, 3 or 4) with a corner of zeros (no data).

    `date=1` takes the sensor, light and colours of another day; give it the truth of `later_truth`.
    """
    t, c = truth, _Canvas(truth, date)
    image = GROUND[t["cover"]](c)
    for hole in t["clearings"]:
        blob = np.hypot(c.x - hole["x"] * S, c.y - hole["y"] * S) / (hole["r"] * S) + 0.25 * c.noise(14)
        m = np.clip((1 - blob) * 12, 0, 1)[..., None]
        image = image * (1 - m) + c.shaded(c.soil, 0.1 * c.noise(3)) * m
    if t["season"] == "snow":  # snow lies on the ground more than on crowns
        cover = np.clip(c.look.uniform(0.55, 0.75) + 0.25 * c.noise(26), 0, 0.85)[..., None]
        bright = image.mean(-1, keepdims=True) / max(float(image.mean()), 1)
        cover = np.clip(cover * np.clip(bright * 1.5 - 0.55, 0.15, 1.15), 0, 0.92)
        image = image * (1 - cover) + np.float32((232, 236, 242)) * cover
    if t["water"]:
        image = _with_water(c, image)
    sheet, d = _sheet(image)
    for line in sorted(t["lines"], key=lambda x: ["river", "runway", "railway", "road"].index(x["kind"])):
        _draw_line(c, d, line)
    wooded = t["cover"] in ("forest", "orchard", "farmland", "desert")
    for o in t["objects"]:
        if wooded and o["on"] == "land" and o["kind"] in ("building", "tank", "vehicle", "aircraft"):  # in a yard
            d.polygon(corners({k: v * S if k in "xywl" else v for k, v in o.items()}, 4 * c.u), fill=_ink(c.soil, 0.92))
    dark = Image.new("L", sheet.size)
    for o in t["objects"]:  # shadows first: swept footprints, all to the same side
        tall = 1.4 if o["kind"] == "building" and o["w"] > 22 * _unit(t) else 1
        height, outline = KINDS[o["kind"]][5] * _unit(t) * tall, OUTLINE.get(o["kind"], BOX)
        for k in np.linspace(0, 1, 6) if height else []:
            moved = {**o, "x": o["x"] + c.sun[0] * height * k, "y": o["y"] + c.sun[1] * height * k}
            ImageDraw.Draw(dark).polygon(_at(moved, outline), fill=255)
    sheet = Image.composite(sheet.point(lambda v: int(v * 0.42)), sheet, dark)
    d = ImageDraw.Draw(sheet)
    for o in t["objects"]:
        _object(c, d, o, np.random.default_rng([t["seed"], int(o["x"] * 10), int(o["y"] * 10)]))
    small = sheet.reduce(S).filter(ImageFilter.GaussianBlur(max(0, c.look.uniform(-0.4, 0.8))))
    return _sensed(c, np.asarray(small, np.float32) / 255)


def _draw_line(c: _Canvas, d: ImageDraw.ImageDraw, line: dict):
    points, u, w = [(x * S, y * S) for x, y in line["points"]], c.u, line["width"] * S
    stroke = lambda colour, width: d.line(points, fill=colour, width=max(1, round(width)), joint="curve")  # noqa: E731
    step = np.hypot(*np.diff(points, axis=0).T).cumsum()
    at = lambda s: (np.interp(s, [0, *step], [p[0] for p in points]), np.interp(s, [0, *step], [p[1] for p in points]))  # noqa: E731
    if line["kind"] == "river":
        stroke(_ink(c.soil, 0.72), w + 3 * u)
        stroke(_ink(c.water), w)
        stroke(_ink(c.water, 0.9), w * 0.5)
    elif line["kind"] == "railway":
        stroke(_ink((128, 116, 104)), w)
        for s in np.arange(0, step[-1], 3.6 * u):
            (ax, ay), (bx, by) = at(s), at(s + u)
            n = np.hypot(bx - ax, by - ay) or 1
            nx, ny = -(by - ay) / n * w * 0.4, (bx - ax) / n * w * 0.4
            d.line([(ax - nx, ay - ny), (ax + nx, ay + ny)], fill=(70, 60, 54), width=max(1, round(1.3 * u)))
        for k in (-0.2, 0.2):
            moved = [(x + k * w, y) if line["axis"] == "ns" else (x, y + k * w) for x, y in points]
            d.line(moved, fill=(206, 206, 210), width=max(1, round(1.1 * u)), joint="curve")
    else:
        grey = c.paved * (
            0.62 if line["kind"] == "runway" or c.t["cover"] in ("industrial", "port", "parking") else 0.8
        )
        stroke(_ink((222, 220, 210)), w)  # the edge lines are what the narrower surface leaves
        stroke(_ink(grey), w - 2.2 * u)
        dash, gap, wide = (12, 10, 2.4) if line["kind"] == "runway" else (7, 6, 1.6)
        for s in np.arange(0, step[-1], (dash + gap) * u):
            d.line([at(s), at(s + dash * u)], fill=(240, 238, 226), width=max(1, round(wide * u)))
        if line["kind"] == "runway":  # threshold bars
            for k in np.arange(-0.36, 0.4, 0.12):
                for s in (14 * u, step[-1] - 34 * u):
                    shift = (k * w, 0) if line["axis"] == "ns" else (0, k * w)
                    if abs(k) > 0.08:
                        ends = [(x + shift[0], y + shift[1]) for x, y in (at(s), at(s + 18 * u))]
                        d.line(ends, fill=(240, 238, 226), width=max(1, round(1.4 * u)))


def _sensed(c: _Canvas, image: np.ndarray) -> np.ndarray:
    """Clouds, air and sensor: what makes two pictures of the same thing differ in colour. float 0..1 -> pixels."""
    t, rng = c.t, c.look
    y, x = np.mgrid[: t["height"], : t["width"]].astype(np.float32)
    veil = lambda n: np.asarray(Image.fromarray(n).resize((t["width"], t["height"])))  # noqa: E731
    puff = veil(c.noise(9, rng)) * 0.3 + veil(c.noise(4, rng)) * 0.15 if t["clouds"] else 0
    dx, dy = shadow(t, 26 * _unit(t))
    for sx, sy, colour, strength in ((dx, dy, 0.0, 0.45), (0, 0, 0.97, 0.97)):
        for o in t["clouds"]:
            r = np.hypot((x - o["x"] - sx) / (o["w"] / 2), (y - o["y"] - sy) / (o["l"] / 2))
            a = (np.clip((1.02 - r + puff * (r < 1.1)) * 2.2, 0, 1) * (r < 1.15) * strength)[..., None]
            image = image * (1 - a) + (colour + 0.03 * puff[..., None] if colour else 0) * a
    grey = image.mean(-1, keepdims=True)
    image = np.clip(grey + (image - grey) * np.float32(rng.uniform(0.55, 1.1)), 0, 1)
    image = image ** np.float32(rng.uniform(0.85, 1.2))
    image = image * np.float32(np.exp(rng.normal(0, 0.05, 3)) * rng.uniform(0.85, 1.1))  # white balance, exposure
    haze = rng.uniform(0, 0.15)
    image = image * np.float32(1 - haze) + np.float32(haze * rng.uniform(0.7, 1.1) * np.array([0.72, 0.76, 0.82]))
    image = image + np.float32(rng.uniform(0.006, 0.035)) * rng.standard_normal(image.shape, np.float32)
    if t["bits"] == 8:
        return np.clip(image * 255, 0, 255).round().astype(np.uint8)
    red, green, blue = np.moveaxis(np.clip(image, 0, 1.2), -1, 0)
    if t["bands"] == 4:  # near infrared: bright where green exceeds the other two, dark on water
        infrared = np.clip(0.7 * green + 2.2 * (green - 0.5 * red - 0.5 * blue), 0.02, 1.2)
        image = np.stack([red, green, blue, infrared], -1)
    numbers = np.clip(rng.uniform(120, 400) + image * rng.uniform(2200, 5200), 1, 65535).round().astype(np.uint16)
    leg = 0.2 * min(t["width"], t["height"])  # the swath ends in a corner that holds no object
    for cx, cy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        points = [point for o in t["objects"] for point in corners(o, 8)]
        if all(abs(px - cx * t["width"]) + abs(py - cy * t["height"]) > leg + 2 for px, py in points):
            numbers[np.abs(x - cx * (t["width"] - 1)) + np.abs(y - cy * (t["height"] - 1)) < leg] = 0
            break
    return numbers


# ---------------------------------------------------------------- files ----------------------------------------------
def write_geotiff(path: Path, t: dict, pixels: np.ndarray):
    """Pixels (H, W, bands) with their place on Earth and the time of the picture."""
    profile = dict(driver="GTiff", width=t["width"], height=t["height"], count=pixels.shape[2], dtype=pixels.dtype,
                   compress="deflate", zlevel=1, crs=f"EPSG:{t['epsg']}",
                   transform=from_origin(t["east"], t["north"], t["gsd_m"], t["gsd_m"]),
                   photometric="rgb")  # fmt: skip
    with rasterio.open(path, "w", **profile, **({"nodata": 0} if t["bits"] == 16 else {})) as out:
        out.write(np.moveaxis(pixels, -1, 0))
        out.update_tags(TIFFTAG_DATETIME=t["datetime"], TIFFTAG_IMAGEDESCRIPTION="drawn by demo_data.py")
        if pixels.shape[2] == 4:
            out.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined)


def _make(job: tuple[str, int, int, bool]) -> dict:
    """One scene: its picture (and that of its second date) on disk, its texts in the answer."""
    folder, seed, index, pair = Path(job[0]), *job[1:]
    t = scene_truth(seed, index)
    write_geotiff(folder / "images" / t["image"], t, draw(t))
    # A symbolic link, so that what is kept of the picture (`data.PixelStore`) is kept once; not every system has them.
    link = folder / "rsvqa_images" / f"{index}.tif"
    try:
        link.symlink_to(Path("..", "images", t["image"]))
    except OSError:
        shutil.copyfile(folder / "images" / t["image"], link)
    out = {"truth": t, "questions": questions(t)}
    for language in ("en", "zh"):
        out[language] = list(zip(captions(t, language), negatives(t, language)))
        out[f"chat_{language}"] = dialogues(t, language)
    if pair:
        later, changes = later_truth(t)
        write_geotiff(folder / "images_later" / t["image"], later, draw(later, date=1))
        paths = {"image": f"images/{t['image']}", "later": f"images_later/{t['image']}"}
        out["change"] = paths | {"changed": bool(changes), "changes": changes}
    return out


def _listing(folder: Path) -> list[list]:
    """[relative path, size] of every file we wrote but the manifest: a finished folder is recognised by it, in
    milliseconds. data2csv.py and csv2json.py put theirs beside them."""
    others = ("manifest.json", "rsvqa-dataset", "data_vl")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(others))
    return [[p.relative_to(folder).as_posix(), p.stat().st_size] for p in files]


def _manifest(folder: Path) -> dict | None:
    """Our manifest in a folder, or None: the folder is someone else's."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest if manifest.get("made_by") == "demo_data.py" else None
    except (OSError, ValueError, AttributeError):
        return None


def generate(
    output: str | Path, scenes: int = 1500, seed: int = 0, force: bool = False, workers: int | None = None
) -> dict:
    """Write the data set into `output`, whole or not at all, and return its manifest.

    The same scenes and seed give the same bytes whatever the number of workers. A folder that already holds exactly
    this is left as it is, one that an older version of this script left and nobody touched is replaced; any other
    folder is an `InputError`, unless `force` and the folder is one of ours.
    """
    output = Path(os.path.realpath(output))  # a link, perhaps to a larger disk, stays one
    if output == Path.cwd():
        raise InputError(f"--output {output}: is the folder you are in; give a new one")
    if not (isinstance(scenes, int) and 1 <= scenes <= 99999) or not (isinstance(seed, int) and seed >= 0):
        raise InputError(
            f"demo data needs 1 to 99999 scenes and a seed of 0 or more, not scenes={scenes!r}, seed={seed!r}"
        )
    settings, found = {"scenes": scenes, "seed": seed, "version": VERSION}, _manifest(output)
    intact = found and hashlib.sha256(json.dumps(_listing(output)).encode()).hexdigest() == found["listing"]
    if intact and found["settings"] == settings:
        return found | {"fresh": False}
    outdated = intact and found["settings"] | {"version": VERSION} == settings
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not found:
            raise InputError(
                f"{output} exists and was not made by demo_data.py; it is left alone: choose another --output"
            )
        if not (force or outdated):
            raise InputError(
                f"{output} holds other demo data or was altered ({found['settings']}): "
                "--force replaces it, or choose another --output"
            )
    refuse_unwritable(output.parent, "--output: its folder")
    place, busy = Path(os.path.abspath(output)), f"{output}: another process is drawing it; wait for its end"
    with fresh_folder(place.with_name(f".{place.name}{PARTIAL}"), busy) as temp:
        new = temp / "new"
        for name in ("images", "images_later", "rsvqa_images"):
            (new / name).mkdir(parents=True)
        kept = [i for i in range(scenes) if i % 10 >= 7]  # val and test
        pairs = set(kept[:: max(1, len(kept) // PAIRS)][:PAIRS])
        jobs = [(str(new), seed, i, i in pairs) for i in range(scenes)]
        workers = workers or (min(processors(), 8) if scenes >= 100 else 1)
        made = in_workers(_make, jobs, workers, chunksize=8)
        counts = _write_texts(new, made)
        digest = hashlib.sha256()
        for name, _ in (listing := _listing(new)):
            digest.update(name.encode() + (new / name).read_bytes())
        manifest = {"made_by": "demo_data.py", "settings": settings, "sha256": digest.hexdigest(),
                    "listing": hashlib.sha256(json.dumps(listing).encode()).hexdigest(), "counts": counts}  # fmt: skip
        _dump(new / "manifest.json", manifest)
        put_in_place(new, output)
    return manifest | {"fresh": True}


def _dump(path: Path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_texts(folder: Path, made: list[dict]) -> dict:
    """The JSON files of the data set; returns how much of everything there is."""
    triplets = {s: [] for s in ("train", "val", "test")}
    texts, asked, answered, chats = {"en": [], "zh": []}, [], [], {"en": [], "zh": []}
    for m in made:
        t = m["truth"]
        for language in ("en", "zh"):
            rows = [{"image": t["image"], "caption": c, "split": t["split"]} for c, _ in m[language]]
            rows[1]["prompt"] = DETAIL[language]
            texts[language] += rows
            triplets[t["split"]] += [{"image_name": t["image"], "positive": c, "negative": n} for c, n in m[language]]
            for turns in m[f"chat_{language}"]:
                said = [text for turn in turns for text in turn]
                said[0] = f"{said[0]} <|vision_start|>{t['image']}<|vision_end|>"
                said = [{"from": ("user", "assistant")[n % 2], "value": text} for n, text in enumerate(said)]
                chats[language].append(
                    {"id": f"chat_{len(chats[language])}", "conversations": said, "split": t["split"]}
                )
        for q in m["questions"]:
            n = len(asked)
            known = {"answers_ids": [n], "active": True, "split": t["split"]}
            asked.append({"id": n, "img_id": t["img_id"], "type": q["type"], "question": q["question"]} | known)
            answered.append({"id": n, "question_id": n, "answer": q["answer"], "active": True})
    for split, rows in triplets.items():
        _dump(folder / f"triplets_{split}.json", rows)
    for language, rows in texts.items():
        _dump(folder / f"captions_{language}.json", rows)
        _dump(folder / f"chat_{language}.json", chats[language])
    present = {m["truth"]["image"]: sorted(k for k, n in m["truth"]["counts"].items() if n) for m in made}
    _dump(folder / "objects.json", object_words() | {"images": present})
    first = [m for m in made if m["truth"]["split"] == "test"][:20]
    pairs = [(m["truth"]["image"], text) for m in first for language in ("en", "zh") for text in m[language][0]]
    _dump(folder / "pairs_test.json", [{"image_path": f"images/{image}", "text": text} for image, text in pairs])
    _dump(folder / "rsvqa_questions.json", {"questions": asked})
    _dump(folder / "rsvqa_answers.json", {"answers": answered})
    _dump(folder / "changes.json", [m["change"] for m in made if "change" in m])
    with open(folder / "scenes.jsonl", "w", encoding="utf-8") as out:
        out.writelines(json.dumps(m["truth"], ensure_ascii=False) + "\n" for m in made)
    splits = {s: sum(m["truth"]["split"] == s for m in made) for s in triplets}
    return {"scenes": len(made), **splits, "triplets": sum(map(len, triplets.values())), "questions": len(asked),
            "pairs": sum("change" in m for m in made),
            "16-bit": sum(m["truth"]["bits"] == 16 for m in made)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="data/demo", help="folder to write")
    parser.add_argument("--scenes", type=int, default=1500, help="number of scenes (70/10/20 train/val/test)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument("--force", action="store_true", help="replace a folder of other demo data")
    args = parser.parse_args()
    began = time.perf_counter()
    made = generate(args.output, args.scenes, args.seed, args.force)
    print(f"{args.output}: " + ", ".join(f"{v} {k}" for k, v in made["counts"].items()))
    print(
        f"sha256 {made['sha256'][:16]}, "
        + (f"{time.perf_counter() - began:.1f} s" if made["fresh"] else "already there, nothing to do")
    )


if __name__ == "__main__":
    with user_errors():
        main()
