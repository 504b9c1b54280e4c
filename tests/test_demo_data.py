"""The demo data: same seed, same bytes; whole or not at all; every text true by an independent reading of it."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio

import demo_data
from config import InputError, processors
from imagery import colour_histogram
from scenes import read_chat

SCENES, SEED = 30, 3
ROOT = Path(demo_data.__file__).parent

# The reader's own dictionaries: what a word means, written down a second time on purpose.
EN_KIND = {
    "building": "building",
    "vehicle": "vehicle",
    "aircraft": "aircraft",
    "ship": "ship",
    "storage tank": "tank",
    "sports field": "field",
    "pond": "pond",
}
EN_COVER = {"farmland": "farmland", "an orchard": "orchard", "a forest": "forest", "grassland": "grassland",
            "a desert": "desert", "a lake": "lake", "a beach": "beach", "a residential area": "residential",
            "an industrial area": "industrial", "a port": "port", "an airport": "airport", "a parking lot": "parking",
            "a park": "park"}  # fmt: skip
ZH_KIND = {
    "栋建筑物": "building",
    "辆车": "vehicle",
    "架飞机": "aircraft",
    "艘船": "ship",
    "个储罐": "tank",
    "个运动场": "field",
    "个池塘": "pond",
}
ZH_COVER = {"农田": "farmland", "果园": "orchard", "森林": "forest", "草地": "grassland", "沙漠": "desert",
            "湖泊": "lake", "海滩": "beach", "居民区": "residential", "工业区": "industrial", "港口": "port",
            "机场": "airport", "停车场": "parking", "公园": "park"}  # fmt: skip
ZH_WHERE = {"北": "north", "南": "south", "东": "east", "西": "west", "中": "centre",
            "东北": "northeast", "西北": "northwest", "东南": "southeast", "西南": "southwest"}  # fmt: skip
ZH_LINE = {"公路": "road", "河流": "river", "铁路": "railway", "跑道": "runway"}
EN_NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "many": None}
ZH_NUMBER = {"一": 1, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "许多": None}
AT = r"(?: in the (?P<where>\w+)| (?P<road>on the road))?"


def read_en(caption: str) -> list[tuple]:
    """An English caption -> its facts; an unreadable one fails the test."""
    text, facts = caption.rstrip(".").lower(), []
    wordings = [r"an aerial image of (?P<c>.+?) with (?P<f>.+)", r"a satellite view of (?P<c>.+?), showing (?P<f>.+)",
                r"this overhead photo shows (?P<c>.+?), (?P<f>.+)", r"(?P<f>.+) in a scene of (?P<c>.+)",
                r"(?P<c>[^:]+): (?P<f>.+)"]  # fmt: skip
    found = next(m for w in wordings if (m := re.fullmatch(w, text)))
    facts.append(("cover", EN_COVER[found["c"]]))
    for part in re.split(r", | and |; ", found["f"]):
        kinds = "|".join(EN_KIND)
        if m := re.fullmatch(rf"(?P<n>{'|'.join(EN_NUMBER)}) (?P<k>{kinds})s?{AT}", part):
            facts.append(("group", EN_KIND[m["k"]], EN_NUMBER[m["n"]], "road" if m["road"] else m["where"]))
        elif m := re.fullmatch(
            r"a (road|river|railway|runway) running (north to south|east to west) through the (\w+)", part
        ):
            facts.append(("line", m[1], "ns" if m[2][0] == "n" else "ew", m[3]))
        elif m := re.fullmatch(r"the sea to the (\w+)", part):
            facts.append(("side", m[1]))
        elif m := re.fullmatch(r"clouds over the (\w+)|scattered clouds", part):
            facts.append(("cloud", m[1]))
        elif m := re.fullmatch(r"(a|no)? ?(road|river|clouds)", part):
            facts.append(("has", m[2], m[1] != "no"))
        else:
            facts.append(("snow", {"snow on the ground": True, "no snow on the ground": False}[part]))
    return facts


def read_zh(caption: str) -> list[tuple]:
    """A Chinese caption -> its facts."""
    text = caption.rstrip("。")
    covers, kinds = "|".join(ZH_COVER), "|".join(list(ZH_KIND) + [k[1:] for k in ZH_KIND])
    measured = rf"(?:一[片个座])?(?P<c>{covers})"
    wordings = [rf"一幅{measured}的航拍图像，(?P<f>.+)", rf"卫星图像中是{measured}，(?P<f>.+)",
                rf"图中为{measured}。(?P<f>.+)",
                rf"从空中俯瞰{measured}，可以看到(?P<f>.+)", rf"(?P<f>.+)，周围是{measured}"]  # fmt: skip
    found = next(m for w in wordings if (m := re.fullmatch(w, text)))
    facts = [("cover", ZH_COVER[found["c"]])]
    for part in re.split("，|和", found["f"]):
        if m := re.fullmatch(
            rf"(?:(?P<w>\w+?)部|(?P<road>公路上))?(?:有|的)?(?P<n>{'|'.join(ZH_NUMBER)})(?P<k>{kinds})", part
        ):
            kind = next(v for k, v in ZH_KIND.items() if m["k"] in (k, k[1:]))
            facts.append(
                ("group", kind, ZH_NUMBER[m["n"]], "road" if m["road"] else ZH_WHERE[m["w"]] if m["w"] else None)
            )
        elif m := re.fullmatch(r"一条(南北|东西)向的(..)穿过(.)部", part) or re.fullmatch(
            r"(?P<w>.)部的一条(南北|东西)向的(..)", part
        ):
            axis, kind, where = (m[1], m[2], m[3]) if "w" not in m.groupdict() else (m[2], m[3], m[1])
            facts.append(("line", ZH_LINE[kind], "ns" if axis == "南北" else "ew", ZH_WHERE[where]))
        elif m := re.fullmatch(r"(.)侧[是的]大海", part):
            facts.append(("side", ZH_WHERE[m[1]]))
        elif m := re.fullmatch(r"(?:(\w+)部上空|空中)(?:有|的)云", part):
            facts.append(("cloud", ZH_WHERE[m[1]] if m[1] else None))
        elif m := re.fullmatch(r"(没有|有)(公路|河流|云)", part):
            facts.append(("has", {"云": "clouds"}.get(m[2]) or ZH_LINE[m[2]], m[1] == "有"))
        else:
            facts.append(("snow", {"地面有积雪": True, "地面没有积雪": False}[part]))
    return facts


def inside(t: dict, o: dict, where: str) -> bool:
    """Whether an object's centre lies in a named part, from pixels."""
    x, y = o["x"] / t["width"], o["y"] / t["height"]
    parts = {"north": y < 0.5, "south": y > 0.5, "west": x < 0.5, "east": x > 0.5}
    if where == "centre":
        return 0.25 < x < 0.75 and 0.25 < y < 0.75
    return all(v for k, v in parts.items() if k in where)


def true(t: dict, fact: tuple) -> bool:
    """A second judge of a fact: only the lists of objects, lines and clouds, none of the summaries."""
    what, *v = fact
    if what == "group":
        mine = [o for o in t["objects"] if o["kind"] == v[0]]
        if (len(mine) < 9) if v[1] is None else (len(mine) != v[1]):
            return False
        return v[2] is None or all(o["on"] == "road" if v[2] == "road" else inside(t, o, v[2]) for o in mine)
    if what == "line":
        for line in t["lines"]:
            (x0, y0), (x1, y1) = line["points"][0], line["points"][-1]
            axis = "ns" if abs(y1 - y0) > abs(x1 - x0) else "ew"
            middle = np.mean([p[0] / t["width"] if axis == "ns" else p[1] / t["height"] for p in line["points"]])
            names = ("west", "centre", "east") if axis == "ns" else ("north", "centre", "south")
            if (line["kind"], axis, names[int(middle > 0.35) + int(middle > 0.65)]) == tuple(v):
                return True
        return False
    if what == "side":
        if not t["water"] or t["water"]["kind"] != "sea":
            return False
        x, y = np.mean(t["water"]["points"], 0) / (t["width"], t["height"]) - 0.5
        return v[0] == (("west" if x < 0 else "east") if abs(x) > abs(y) else ("north" if y < 0 else "south"))
    if what == "cloud":
        return bool(t["clouds"]) and (v[0] is None or all(inside(t, c, v[0]) for c in t["clouds"]))
    if what == "has":
        return (bool(t["clouds"]) if v[0] == "clouds" else any(x["kind"] == v[0] for x in t["lines"])) == v[1]
    return t["cover"] == v[0] if what == "cover" else (t["season"] == "snow") == v[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    demo_data.generate(folder, SCENES, SEED, workers=1)
    return folder


@pytest.fixture(scope="module")
def truths(data):
    return {t["image"]: t for t in map(json.loads, (data / "scenes.jsonl").read_text(encoding="utf-8").splitlines())}


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def digest(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_same_seed_same_bytes_whatever_the_workers(data, tmp_path):
    demo_data.generate(tmp_path / "two", SCENES, SEED, workers=2)
    assert digest(tmp_path / "two") == digest(data)
    assert demo_data.scene_truth(SEED, 5) == load_line(data, 5)  # a scene does not depend on how many there are


def load_line(folder: Path, index: int) -> dict:
    return json.loads((folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines()[index])


def test_another_seed_is_another_data_set():
    a, b = demo_data.scene_truth(0, 4), demo_data.scene_truth(1, 4)
    assert a != b and demo_data.captions(a) != demo_data.captions(b)
    assert not np.array_equal(demo_data.draw(a)[:100, :100], demo_data.draw(b)[:100, :100])


def test_every_caption_is_true_and_every_negative_false(data, truths):
    kinds_of_miss = set()
    for split in ("train", "val", "test"):
        rows = load(data / f"triplets_{split}.json")
        for row in rows:
            assert set(row) == {"image_name", "positive", "negative"}
            t = truths[row["image_name"]]
            assert t["split"] == split
            read = read_zh if re.search("[一-鿿]", row["positive"]) else read_en
            positive, negative = read(row["positive"]), read(row["negative"])
            assert len(positive) >= 2 and all(true(t, f) for f in positive), (row, t)
            changed = [(p, n) for p, n in zip(positive, negative) if p != n]
            assert len(positive) == len(negative) and len(changed) == 1, row  # one fact, the same wording
            assert not true(t, changed[0][1]), (row, t)
            kinds_of_miss.add(changed[0][0][0])
        assert len(rows) == 10 * sum(t["split"] == split for t in truths.values())
    assert {"cover", "group", "line"} <= kinds_of_miss


def test_many_more_captions_are_true():
    """The texts alone, of many scenes: no drawing needed."""
    for index in range(100, 220):
        t = demo_data.scene_truth(7, index)
        for language, read in (("en", read_en), ("zh", read_zh)):
            for positive, negative in zip(demo_data.captions(t, language), demo_data.negatives(t, language)):
                assert all(true(t, f) for f in read(positive)), (positive, t)
                assert [true(t, f) for f in read(negative)].count(False) == 1, (positive, negative, t)
        assert len(set(demo_data.captions(t, "en"))) == len(set(demo_data.captions(t, "zh"))) == 5


def test_captions_are_the_triplets_positives(data, truths):
    positives = {
        (r["image_name"], r["positive"]) for s in ("train", "val", "test") for r in load(data / f"triplets_{s}.json")
    }
    for language in ("en", "zh"):
        rows = load(data / f"captions_{language}.json")
        assert len(rows) == 5 * SCENES and all(set(r) - {"prompt"} == {"image", "caption", "split"} for r in rows)
        assert [r.get("prompt") for r in rows] == [None, demo_data.DETAIL[language], None, None, None] * SCENES
        assert all((r["image"], r["caption"]) in positives and truths[r["image"]]["split"] == r["split"] for r in rows)


def answer(t: dict, question: str, kind: str) -> str:
    """The answer recomputed from the objects alone."""
    plural = {
        **{k + "s": v for k, v in EN_KIND.items()},
        "aircraft": "aircraft",
        **{k + "s": k for k in ("road", "river", "runway", "railway")},
    }
    named = EN_KIND | {k: k for k in ("road", "river", "runway", "railway")}

    def mine(k):
        return [o for o in t["objects"] + t["lines"] if o["kind"] == k]

    if kind == "rural_urban":
        return "urban" if t["cover"] in ("residential", "industrial", "port", "airport", "parking", "park") else "rural"
    if kind == "area":
        objects = mine(plural[question[len("What is the area covered by ") : -1]])
        pixels = sum(o["w"] * o["l"] * (math.pi / 4 if o["kind"] == "tank" else 1) for o in objects)
        return f"{round(pixels * t['gsd_m'] ** 2)}m2"
    if kind == "count":
        return str(
            len(mine(plural[re.fullmatch(r"(?:How many|What is the number of) (.+?)(?: are there)?\?", question)[1]]))
        )
    if kind == "comp":
        if m := re.fullmatch(r"Is the number of (.+) equal to the number of (.+)\?", question):
            return "yes" if len(mine(plural[m[1]])) == len(mine(plural[m[2]])) else "no"
        m = re.fullmatch(r"Are there (more|less) (.+) than (.+)\?", question)
        a, b = len(mine(plural[m[2]])), len(mine(plural[m[3]]))
        return "yes" if (a > b if m[1] == "more" else a < b) else "no"
    if question == "Are there clouds?":
        return "yes" if t["clouds"] else "no"
    m = re.fullmatch(r"Is there an? (.+?)(?: in the (\w+))?\?", question)
    return "yes" if [o for o in mine(named[m[1]]) if not m[2] or inside(t, o, m[2])] else "no"


def test_questions_have_the_rsvqa_schema_and_true_answers(data, truths):
    asked, answered = load(data / "rsvqa_questions.json")["questions"], load(data / "rsvqa_answers.json")["answers"]
    by_id, of_image = {a["id"]: a for a in answered}, {t["img_id"]: t for t in truths.values()}
    assert len(by_id) == len(answered) == len(asked) == len({q["id"] for q in asked})
    for q in asked:
        assert {"id", "img_id", "type", "question", "answers_ids", "active"} <= set(q) and q["active"] is True
        (reply,) = (by_id[i] for i in q["answers_ids"])
        assert reply["question_id"] == q["id"] and reply["active"] is True
        t = of_image[q["img_id"]]
        assert q["split"] == t["split"] and (data / "rsvqa_images" / f"{q['img_id']}.tif").samefile(
            data / "images" / t["image"]
        )
        assert reply["answer"] == answer(t, q["question"], q["type"]), (q, reply, t)
    assert {q["type"] for q in asked} == {"presence", "count", "comp", "rural_urban", "area"}
    per_image = np.bincount([q["img_id"] for q in asked])
    assert per_image.min() >= 9 and per_image.max() <= 24
    assert len({(q["img_id"], q["question"]) for q in asked}) == len(asked)


def test_dialogues_say_what_the_truth_says(data, truths):
    follow_ups = placed = 0
    for scene in read_chat(data / "chat_zh.json").scenes:
        truth = truths[Path(scene.image).name]
        assert scene.split == truth["split"]
        for question in scene.questions:
            kind = None
            for text, answer in (*question.history, (question.text, question.answer)):
                if found := re.fullmatch("(?:图中有|那)(.+?)(?:吗|呢)？", text):
                    kind = next(k for word, k in ZH_KIND.items() if word.endswith(found[1]))
                    assert answer.startswith("没有") == (not truth["counts"][kind])
                elif text == "有多少？":
                    number, noun = re.fullmatch(rf"({'|'.join(ZH_NUMBER)})(.+)。", answer).groups()
                    noun = noun if ZH_NUMBER[number] else next(word for word in ZH_KIND if word.endswith(noun))
                    assert ZH_KIND[noun] == kind
                    count = truth["counts"][kind]
                    assert ZH_NUMBER[number] == count or (ZH_NUMBER[number] is None and count >= 9)
                elif text == "在哪里？" and (found := re.fullmatch("在(.{1,2})部。", answer)):
                    spots = [o for o in truth["objects"] if o["kind"] == kind]
                    places = [(o["x"] / truth["width"], o["y"] / truth["height"]) for o in spots]
                    assert all(demo_data.in_region(ZH_WHERE[found[1]], *place) for place in places)
                    placed += 1
                elif text == "在哪里？":
                    assert answer == "在公路上。" and all(
                        o["on"] == "road" for o in truth["objects"] if o["kind"] == kind
                    )
                elif text == "这是什么地方？":
                    assert ZH_COVER[re.fullmatch("这是一[片个座](.+)。", answer)[1]] == truth["cover"]
                elif text == "上空有云吗？":
                    assert answer == ("有云。" if truth["clouds"] else "没有云。")
            follow_ups += bool(question.history)
    assert follow_ups > SCENES and placed > SCENES / 3
    zh, en = (json.loads((data / f"chat_{language}.json").read_text()) for language in ("zh", "en"))
    assert [len(row["conversations"]) for row in zh] == [len(row["conversations"]) for row in en]
    assert all(turn["value"].isascii() for row in en for turn in row["conversations"])


def test_objects_neither_overlap_nor_leave_the_picture():
    """What is counted can be seen: footprints drawn one by one cover the sum of their areas."""
    for index in range(60):
        t = demo_data.scene_truth(2, index)
        for scene in (t, demo_data.later_truth(t)[0]):
            size, k = (scene["width"], scene["height"]), 4
            total = np.zeros((size[1] * k, size[0] * k), np.int32)
            for o in scene["objects"]:
                points = [(x * k, y * k) for x, y in demo_data.corners(o)]
                assert all(0 <= x < size[0] * k and 0 <= y < size[1] * k for x, y in points)
                total += demo_data._mask((size[0] * k, size[1] * k), lambda d, p=points: d.polygon(p, fill=1))
            assert total.max(initial=0) <= 1, (index, scene["cover"])
            for cloud in scene["clouds"]:
                y, x = np.mgrid[: size[1] * k, : size[0] * k] / k
                hidden = np.hypot((x - cloud["x"]) / cloud["w"] * 2, (y - cloud["y"]) / cloud["l"] * 2) < 1.1
                assert not (hidden & (total > 0)).any(), (index, scene["cover"])


def test_what_is_stated_is_drawn():
    """Take an object out of the truth and the picture changes there, and hardly anywhere else."""
    t = next(
        t
        for i in range(60)
        if (t := demo_data.scene_truth(5, i))["bits"] == 8 and t["cover"] == "grassland" and len(t["objects"]) > 1
    )
    gone = t["objects"][-1]
    before, after = (demo_data.draw(x).astype(int) for x in (t, {**t, "objects": t["objects"][:-1]}))
    y, x = np.mgrid[: t["height"], : t["width"]]
    near = np.hypot(x - gone["x"], y - gone["y"]) < max(gone["w"], gone["l"]) * 1.2
    difference = np.abs(before - after).max(-1)
    assert difference[near].max() > 20 and difference[~near].max() <= 1


def test_images_are_georeferenced(data, truths):
    widths, bits = set(), set()
    for t in truths.values():
        with rasterio.open(data / "images" / t["image"]) as f:
            assert f.crs.to_epsg() == t["epsg"] and 32600 < t["epsg"] <= 32660
            assert f.transform.a == -f.transform.e == t["gsd_m"] and 0.5 <= t["gsd_m"] <= 2
            (lon,), (lat,) = rasterio.warp.transform(f.crs, "EPSG:4326", [f.transform.c], [f.transform.f])
            assert abs(lon - t["lon"]) < 1e-4 and abs(lat - t["lat"]) < 1e-4
            datetime.strptime(f.tags()["TIFFTAG_DATETIME"], "%Y:%m:%d %H:%M:%S")
            assert 128 <= f.width <= 224 and 128 <= f.height <= 224 and f.count == t["bands"]
            pixels = f.read()
            assert pixels.std() > 2
            if t["bits"] == 16:
                assert f.dtypes[0] == "uint16" and f.nodata == 0 and pixels.max() > 255
            else:
                assert f.dtypes[0] == "uint8" and f.count == 3
            widths.add(f.width)
            bits.add(t["bits"])
        assert (data / "rsvqa_images" / f"{t['img_id']}.tif").read_bytes() == (
            data / "images" / t["image"]
        ).read_bytes()
    assert len(widths) > 10 and bits == {8, 16}


def test_splits_are_by_scene(truths):
    shares = [sum(t["split"] == s for t in truths.values()) for s in ("train", "val", "test")]
    assert shares == [SCENES * 7 // 10, SCENES // 10, SCENES * 2 // 10]


def test_second_dates_have_the_changes_they_state(data, truths):
    rows = load(data / "changes.json")
    assert rows and {p.name for p in (data / "images_later").iterdir()} == {Path(r["later"]).name for r in rows}
    for row in rows:
        t = truths[Path(row["image"]).name]
        assert t["split"] in ("val", "test") and row["changed"] == bool(row["changes"])
        assert all(set(c) == {"kind", "en", "zh"} for c in row["changes"])
        with rasterio.open(data / row["image"]) as a, rasterio.open(data / row["later"]) as b:
            assert a.transform == b.transform and a.crs == b.crs and a.shape == b.shape
            assert a.tags()["TIFFTAG_DATETIME"] < b.tags()["TIFFTAG_DATETIME"]
    stated = unchanged = 0
    for index in range(80):  # the statements, on many scenes
        t = demo_data.scene_truth(4, index)
        later, changes = demo_data.later_truth(t)
        old, new = ({json.dumps(o) for o in s["objects"]} for s in (t, later))
        names = [c["kind"] for c in changes]
        assert len(names) == len(set(names))
        for kind in demo_data.KINDS:
            added = [o for o in map(json.loads, new - old) if o["kind"] == kind]
            removed = [o for o in map(json.loads, old - new) if o["kind"] == kind]
            for objects, verb in ((added, "added"), (removed, "removed")):
                assert bool(objects) == (f"{kind}_{verb}" in names), (changes, t["id"])
                if objects:
                    text = changes[names.index(f"{kind}_{verb}")]["en"]
                    assert EN_NUMBER[text.split()[0]] == len(objects)
                    m = re.search(r" in the (\w+)", text)
                    assert not m or all(inside(t, o, m[1]) for o in objects)
                    stated += 1
        assert (len(later["lines"]) > len(t["lines"])) == ("road_added" in names)
        assert bool(later["clearings"]) == ("trees_cleared" in names)
        unchanged += not changes
    assert stated > 30 and 15 < unchanged < 60


def test_done_is_recognised_and_nothing_else_is_overwritten(data, tmp_path):
    out = tmp_path / "demo"
    first = demo_data.generate(out, 4, 0)
    stamp = (out / "scenes.jsonl").stat().st_mtime_ns
    again = demo_data.generate(out, 4, 0)
    assert first["fresh"] and not again["fresh"] and again["sha256"] == first["sha256"]
    for name in ("rsvqa-dataset.csv", "data_vl_train.json"):  # made from it by the converters
        (out / name).write_text("later")
    assert not demo_data.generate(out, 4, 0)["fresh"]
    assert (out / "scenes.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="--force"):
        demo_data.generate(out, 5, 0)
    (out / "captions_en.json").write_text("[]")  # altered: no longer 'done'
    with pytest.raises(InputError, match="--force"):
        demo_data.generate(out, 4, 0)
    assert demo_data.generate(out, 5, 0, force=True)["counts"]["scenes"] == 5


def test_data_of_an_older_version_is_replaced_where_nobody_touched_it(tmp_path, monkeypatch):
    out = tmp_path / "demo"
    with monkeypatch.context() as older:
        older.setattr(demo_data, "VERSION", demo_data.VERSION - 1)
        demo_data.generate(out, 3, 0)
    assert demo_data.generate(out, 3, 0)["fresh"] and not demo_data.generate(out, 3, 0)["fresh"]
    with monkeypatch.context() as older:
        older.setattr(demo_data, "VERSION", demo_data.VERSION - 1)
        demo_data.generate(out, 3, 0)
    (out / "images/mine.tif").touch()
    with pytest.raises(InputError, match="--force"):
        demo_data.generate(out, 3, 0)
    assert (out / "images/mine.tif").exists()

    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(InputError, match="left alone"):
            demo_data.generate(foreign, 4, 0, force=force)
    assert (foreign / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo", "mine"]  # no temporary folder is left


@pytest.mark.parametrize("bad", [{"scenes": 0}, {"scenes": -3}, {"seed": -1}])
def test_bad_settings_are_input_errors(tmp_path, bad):
    with pytest.raises(InputError):
        demo_data.generate(tmp_path / "demo", **({"scenes": 2, "seed": 0} | bad))
    assert not (tmp_path / "demo").exists()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    real = demo_data.draw

    def fails(truth, date=0):
        if truth["img_id"] == 2:
            raise KeyboardInterrupt
        return real(truth, date)

    demo_data.generate(tmp_path / "demo", 2, 0)
    before = digest(tmp_path)
    monkeypatch.setattr(demo_data, "draw", fails)
    for out, force in (("demo", True), ("other", False)):
        with pytest.raises(KeyboardInterrupt):
            demo_data.generate(tmp_path / out, 4, 0, force=force)
    assert digest(tmp_path) == before  # the old set is whole, nothing else is there


@pytest.mark.parametrize("kill", ["SIGKILL", "SIGINT", "SIGINT at once"])
def test_a_killed_run_leaves_no_half_data_set(kill, tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, str(ROOT / "demo_data.py"), "--output", str(out), "--scenes", "400"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    at_work = 0
    while not (tmp_path / ".demo.partial" / "new").exists():
        assert run.poll() is None
        time.sleep(0.01)
    while at_work < min(processors(), 8) and "at once" not in kill:  # each process draws eight scenes in a row
        assert run.poll() is None
        time.sleep(0.02)
        eights = Counter(int(path.stem[-5:]) // 8 for path in tmp_path.glob(".demo.partial/new/images/*.tif"))
        at_work = sum(count < 8 for count in eights.values())
    if "SIGINT" in kill:
        os.killpg(run.pid, signal.SIGINT)  # Ctrl-C reaches the workers too
    else:
        run.kill()
    _, said = run.communicate(timeout=20)  # its workers, which hold its output too, go with it
    assert not out.exists() and len(list(tmp_path.glob(".demo.partial/new/images/*.tif"))) < 400
    assert kill == "SIGKILL" or said == "interrupted\n"
    assert demo_data.generate(out, 2)["fresh"] and os.listdir(tmp_path) == ["demo"]  # what the killed run left is gone


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "demo_data.py"), "--output", str(tmp_path / "d"), "--scenes", "3"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "3 scenes" in first.stdout
    assert "already there" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    refused = subprocess.run([*command, "--seed", "9"], capture_output=True, text=True)
    assert refused.returncode == 2 and "error:" in refused.stderr and "Traceback" not in refused.stderr


def test_colour_alone_does_not_tell_the_land_cover():
    """Nearest neighbour by colour histogram: above chance (1 in 13), far from an answer."""
    scenes = [demo_data.scene_truth(0, i) for i in range(78)]
    pixels = [demo_data.draw({**t, "bits": 8, "bands": 3}) for t in scenes]
    features = np.sqrt([colour_histogram(p) for p in pixels])  # their products: Bhattacharyya similarity
    assert features.shape == (78, 512) and np.allclose((features**2).sum(1), 1, atol=1e-5)
    similar = features @ features.T - 2 * np.eye(78)
    right = np.mean([scenes[i]["cover"] == scenes[j]["cover"] for i, j in enumerate(similar.argmax(1))])
    assert right < 0.45, right
