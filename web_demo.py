"""A web page for a library of images and for trained models: search, match, classify, monitor, describe, ask, converse.

    python web_demo.py --store ./library.index                             # http://127.0.0.1:7860
    python web_demo.py --store ./2020.index --after ./2023.index           # adds the Monitor tab
    python web_demo.py --captioner outputs/final --vqa output/.../best_model      # adds Describe and Ask
    python web_demo.py --from_pretrained output/.../best_model             # Converse: an adapter of train_vqa.py --task chat
    python web_demo.py --preset demo

Models are loaded once. The page needs no internet: no font, script or map comes from elsewhere (a map's tiles do where
--tile_url names their server). Pictures leave the library only as search results; uploads are read by content, within
limits of size and pixels. Behind a proxy, or for others than yourself, read deploy/README.md first.
"""

import argparse
import contextlib
import html
import math
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import numpy as np

import store
from config import InputError, add_device_flags, refuse_outside, user_errors
from places import stretch_of
from store import Filter, attributes_of, checked_box, first_moment, in_utc, last_moment

DEMO = {
    "store": "output/demo_search/library.index",
    "after": "output/demo_search/after.index",
    "captioner": "output/demo_caption/final",
    "vqa": "output/demo_vqa/best_model",
    "from_pretrained": "output/demo_chat/best_model",
}
MOST_TEXT = 2000  # characters of a text that is encoded
MOST_TURNS = 20  # of a conversation, that the model reads again for the next answer
FRAME = 0.1  # seconds between two looks at an answer that grows: a browser draws the whole talk anew each time
SIDE = 384  # pixels of pictures in the gallery

# Every text of the page: English, Chinese.
DATES_ZH = {"before": "前期", "after": "后期"}
PAIR_NOTES_ZH = {  # library.PAIR_NOTES
    "no_place": "{date}：{all} 幅图像中有 {n} 幅没有地理参考，未参与比较",
    "by_name": "所有图像都没有地理参考：路径与尺寸相同的图像视为同一地点",
    "repeated": "{date}：{all} 幅图像中有 {n} 幅与另一幅范围相同（例如同一地点的多个日期）：请只用一个日期建立索引（--only）",
    "alone": "{date}：{all} 个地点中有 {n} 个没有对应图像，未参与比较",
    "empty": "{date}：{all} 个已匹配地点中有 {n} 个的有效数据不足面积的 {share:.0%}，未参与比较",
    "settings": "两个索引显示图像的设置不同（{listed}）：部分变化可能由此而来",
    "resolution": "{all} 个地点中有 {n} 个的分辨率不同（每像素中位数 {first:.2f} 米与 {second:.2f} 米）：部分变化可能由此而来",
    "stretch": "{all} 个地点中有 {n} 个在两个时期按不同的数值拉伸（大幅影像中任一处的云都会如此）：部分变化可能由此而来；"
    "两个时期都请用 --stretch reflectance 建立索引",
    "few": "只有 {n} 个地点可以匹配，不足以判断何为正常波动：请比较分数本身",
    "grid": "匹配的切片平均重叠 {share:.0%}：两个时期用同一网格建立索引，结果会更好",
}
TEXT = {
    "title": ("Remote-sensing images in plain words", "用自然语言检索和理解遥感图像"),
    "language": ("Language", "语言"),
    "search": ("Search", "检索"),
    "match": ("Match", "匹配"),
    "classify": ("Classify", "分类"),
    "monitor": ("Monitor", "变化监测"),
    "describe": ("Describe", "描述"),
    "ask": ("Ask", "问答"),
    "words": ("What to look for", "要找什么"),
    "words_hint": ("a river winding through farmland", "一条河流穿过农田"),
    "without": ("Without", "不要"),
    "without_hint": ("clouds", "云"),
    "picture": ("Picture (also GeoTIFF, 16 bits)", "图片（支持 GeoTIFF、16 位）"),
    "like": ("Weight of the picture against the words", "图片相对文字的权重"),
    "k": ("Results", "结果数"),
    "filters": ("Place, time, attributes", "地点、时间、属性"),
    "bbox": ("Box in degrees: west, south, east, north", "经纬度范围：西, 南, 东, 北"),
    "start": ("From", "起始日期"),
    "end": ("To", "截止日期"),
    "where": ("Attributes, such as folder=harbour", "属性，例如 folder=harbour"),
    "go_search": ("Search", "检索"),
    "results": ("Results", "结果"),
    "geojson": ("Download GeoJSON", "下载 GeoJSON"),
    "found": ("{n} of {total} images, best first", "共 {total} 幅图像，按相似度列出 {n} 幅"),
    "nothing": ("Nothing passes these filters.", "没有符合条件的图像。"),
    "no_place": ("None of these images has a georeference.", "这些图像没有地理坐标。"),
    "texts": ("Descriptions, one a line", "描述，每行一条"),
    "texts_hint": ("two ships in a harbour\nfarmland beside a river", "港口里的两艘船\n河边的农田"),
    "go_match": ("Score", "评分"),
    "scores": ("Cosine, -1 to 1; higher is a better match", "余弦相似度，-1 到 1，越高越匹配"),
    "classes": ("Classes", "类别"),
    "own": ("Your own, between commas", "自定义，用逗号分隔"),
    "go_classify": ("Classify", "分类"),
    "probability": ("Probability", "概率"),
    "queries": ("What to watch for, one a line", "关注的内容，每行一条"),
    "queries_hint": ("new buildings\nships in the harbour", "新建的建筑物\n港口里的船只"),
    "go_monitor": ("Compare", "比较"),
    "go_describe": ("Describe", "描述"),
    "prompt": ("Prompt", "提示词"),
    "question": ("Questions, one a line", "问题，每行一个"),
    "question_hint": ("Is there a river?\nHow many ships are there?", "图中有河流吗？\n有多少艘船？"),
    "go_ask": ("Ask", "提问"),
    "converse": ("Converse", "对话"),
    "talk": ("Conversation", "对话"),
    "plain": ("The same without the adapter", "同样的问题，未加适配器"),
    "message": ("Your question", "你的问题"),
    "message_hint": ("Are there any ships in the image?", "图中有船吗？"),
    "send": ("Send", "发送"),
    "halt": ("Stop", "停止"),
    "retry": ("Again", "重答"),
    "clear": ("Clear", "清空"),
    "cut": ("The earliest turns are left out: the conversation is too long.", "对话过长，最早的几轮已省略。"),
    "compare": ("Answer without the adapter too", "同时显示未加适配器的回答"),
    "how": ("Sampling", "采样"),
    "temperature": ("Temperature (0: the likeliest words)", "温度（0：最可能的词）"),
    "top_p": ("Top-p", "Top-p"),
    "length": ("Most tokens", "最大词元数"),
    "need_words": ("Enter words, or give a picture.", "请输入文字或上传图片。"),
    "need_picture": ("Give a picture first.", "请先上传图片。"),
    "need_text": ("Enter a text first.", "请先输入文字。"),
    "box_form": (
        "Box: expected four numbers in degrees, west, south, east, north, south not above north.",
        "范围：需要四个以度为单位的数：西, 南, 东, 北，南不大于北。",
    ),
    "time_form": (
        "{text!r} is no ISO 8601 date or time such as 2020-06-30 or 2020-06-30T10:15.",
        "{text!r} 不是 2020-06-30 或 2020-06-30T10:15 这样的日期或时间。",
    ),
    "time_order": ("From is after To.", "起始时间晚于结束时间。"),
    "bad_picture": ("{reason}", "无法读取，请上传 PNG、JPEG、WebP、TIFF 或 GeoTIFF：{reason}"),
    "where_form": ("Attributes: expected NAME=VALUE.", "属性：格式为 名称=值。"),
    "too_long": ("At most 50 lines of {n} characters.", "最多 50 行，每行 {n} 个字符。"),
    "own_form": (
        "Classes: labels between commas; a file is for the command line.",
        "类别：用逗号分隔的名称；文件请在命令行中使用。",
    ),
    "large": (
        "{name}: {width} x {height}, too many pixels for this page.",
        "{name}：{width} x {height} 像素超出此处限制。",
    ),
    "about": (
        "{total} images, or tiles of them, of {library}, indexed with {model}. Scores are cosines.",
        "{library} 中的 {total} 幅图像（或切片），模型 {model}。分数为余弦相似度。",
    ),
    "steady": ("No change beyond what is usual.", "没有超出正常波动的变化。"),
    "more": ("more", "增多"),
    "less": ("less", "减少"),
    "change_note": (
        "{n} places of both dates. Numbers are spreads of the unchanged places; 3 or more is a change. They count what a score"
        " changed beyond the mean of other words.",
        "两个时相共有 {n} 处。数值以未变化地点的离散度为单位，达到 3 即为变化；计的是得分变化超出其他词平均变化的部分。",
    ),
}
CSS = """
footer { display: none !important; }
/* A notice says what is wrong: no "Error" above it, nor over what was found before, whatever the language. */
.toast-title, [data-testid="status-tracker"]:has(> .error) { display: none !important; }
.talk .top-panel { display: none; } /* its bin empties one of two; ours forgets the turns, too */
.gradio-container h1 { overflow-wrap: normal; word-break: normal; }
.gradio-container .caption-label { max-width: 100%; font-size: .78rem; }
.gradio-container .grid-wrap { max-height: none; }
.gradio-container .grid-container { grid-template-columns: repeat(auto-fill, minmax(max(8rem, 22%), 1fr)) !important; }
.bars { display: grid; gap: .55rem; font-size: .95rem; } 
.bars div { display: grid; grid-template-columns: 1fr auto; gap: .1rem .8rem; }
.bars i { grid-column: 1 / -1; height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.bars i b { display: block; height: 100%; background: var(--color-accent); } .bars span { font-variant-numeric: tabular-nums; }
.footprints { width: 100%; height: auto; border-radius: 6px; background: #e9eef2; }
.footprints text { font: 11px system-ui, sans-serif; fill: #33414d; }
.footprints .shape { fill: #2563a8; fill-opacity: .22; stroke: #2563a8; stroke-width: 1.4; }
.footprints .rank { fill: #fff; font-weight: 600; text-anchor: middle; } .footprints .dot { fill: #2563a8; }
@media (max-width: 600px) { .footprints text { font-size: 20px; } .footprints .dot { r: 16px; } }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; margin-bottom: 1.5rem; }
.pairs figure { margin: 0; } .pairs div { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; }
.pairs img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px; } .pairs figcaption { font-size: .85rem; }
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="full", choices=["full", "demo"], help="demo: what make demo made")
    parser.add_argument("--store", help="index of search.py: Search, Match and Classify")
    parser.add_argument("--after", help="index of later images: Monitor compares --store with it")
    parser.add_argument("--captioner", help="final/ of a train_caption.py run: Describe")
    parser.add_argument("--vqa", help="best_model/ of a train_vqa.py run: Ask")
    parser.add_argument("--from_pretrained", help="best_model/ of a train_vqa.py --task chat run: Converse")
    parser.add_argument("--model", help="towers of the index, if they have moved")
    parser.add_argument(
        "--base_model", help="base of the index's matcher, or without --store of the adapters, if it has moved"
    )
    parser.add_argument("--library", help="folder of the index's images, if it has moved")
    add_device_flags(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1; 0.0.0.0: reachable from other machines"
    )
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default: 7860)")
    parser.add_argument("--language", default="auto", choices=["auto", "en", "zh"], help="auto: the browser's")
    parser.add_argument("--tile_url", help="map tiles, such as https://host/{z}/{x}/{y}.png (default: a plain grid)")
    parser.add_argument("--max_upload_mb", type=int, default=64, help="largest file a visitor may give (default: 64)")
    parser.add_argument("--max_pixels", type=int, default=2**25, help="most pixels of it that are decoded")
    parser.add_argument(
        "--share", action="store_true", help="a public address for up to a week, through gradio's servers"
    )
    return parser


# ----------------------------------------------------------------------------------------------------
# Fragments of the page


def bars_html(rows: list[tuple[str, float]], low: float = 0.0, high: float = 1.0) -> str:
    """Texts with a number and a bar each, best first; bars run from `low` to `high`."""
    made = []
    for text, value in sorted(rows, key=lambda row: -row[1]):
        width = 100 * min(1.0, max(0.0, (value - low) / (high - low)))
        made.append(f'<div>{html.escape(text)}<span>{value:.3f}</span><i><b style="width:{width:.1f}%"></b></i></div>')
    return f'<div class="bars">{"".join(made)}</div>'


def map_svg(payloads: list[dict], tile_url: str | None = None) -> str:
    """Numbered footprints in Web Mercator, with a grid of degrees; over map tiles where there is a `tile_url`. Without, places
    beyond its 85 degrees are drawn in equal degrees instead. Empty where no payload has a place."""
    placed = [(rank, p["footprint"]) for rank, p in enumerate(payloads, 1) if p["footprint"]]
    if not placed:
        return ""

    polar = not tile_url and max(abs(lat) for _, place in placed for lat in place[1::2]) > 85
    rim = 90 if polar else 85

    def project(lon, lat):
        """To x and y in 0 to 1 (EPSG:3857, or EPSG:4326 for places at a pole); y grows southward."""
        if polar:
            return lon / 360 + 0.5, 0.5 - lat / 360
        lat = max(-85.0, min(85.0, lat))
        return lon / 360 + 0.5, 0.5 - math.log(math.tan(math.pi / 4 + math.radians(lat) / 2)) / (2 * math.pi)

    corners = [(west, south, east + 360 * (east < west), north) for _, (west, south, east, north) in placed]
    start = stretch_of(np.array(corners))[0]  # neighbours across the antimeridian lie side by side
    boxes = []
    for (rank, _), (west, south, east, north) in zip(placed, corners):
        turn = 360 * (west < start)
        boxes.append((rank, *project(west + turn, north), *project(east + turn, south)))
    left, top = min(b[1] for b in boxes), min(b[2] for b in boxes)
    right, bottom = max(b[3] for b in boxes), max(b[4] for b in boxes)
    width, height, margin = 640, 420, 36
    scale = min((width - 2 * margin) / max(right - left, 1e-7), (height - 2 * margin) / max(bottom - top, 1e-7))
    zoom = min(18, max(0, math.floor(math.log2(scale / 256))))
    if tile_url:
        scale = 256 * 2**zoom  # tiles at their own size stay sharp
    middle_x, middle_y, half_x, half_y = (left + right) / 2, (top + bottom) / 2, width / 2 / scale, height / 2 / scale
    view = middle_x - half_x, middle_x + half_x, middle_y - half_y, middle_y + half_y
    parts = []

    def x_of(x):
        return (x - middle_x) * scale + width / 2

    def y_of(y):
        return (y - middle_y) * scale + height / 2

    if tile_url:
        count = 2**zoom
        for i in range(math.floor(view[0] * count), math.floor(view[1] * count) + 1):
            for j in range(max(0, math.floor(view[2] * count)), min(count - 1, math.floor(view[3] * count)) + 1):
                address = tile_url.replace("{z}", str(zoom)).replace("{x}", str(i % count)).replace("{y}", str(j))
                place = f'x="{x_of(i / count):.1f}" y="{y_of(j / count):.1f}" width="256.5" height="256.5"'
                parts.append(f'<image href="{html.escape(address)}" {place}/>')
    steps = [m * 10.0**e for e in range(-6, 1) for m in (1, 2, 5)] + [10, 20, 45]
    step = next((s for s in steps if s / 360 * scale > (90 if s > 0.01 else 120)), 90)  # more digits, more room
    digits = max(0, -math.floor(math.log10(step)))
    line = 'stroke="#9fb0bd" stroke-width=".7"'
    for n in range(math.ceil((view[0] - 0.5) * 360 / step), math.floor((view[1] - 0.5) * 360 / step) + 1):
        x, lon = x_of(n * step / 360 + 0.5), (n * step + 180) % 360 - 180
        name = f"{lon:.{digits}f}°"
        fits = x + 3 + 11.5 * len(name) < width  # on a phone, where letters are larger
        said = f'<text x="{x + 3:.1f}" y="{height - 5}">{name}</text>' if fits else ""
        parts.append(f'<path d="M{x:.1f} 0V{height}" {line}/>{said}')

    def latitude(y):
        return (0.5 - y) * 360 if polar else math.degrees(2 * math.atan(math.exp((0.5 - y) * 2 * math.pi))) - 90

    south, north = latitude(view[3]), latitude(view[2])
    for n in range(math.ceil(max(-rim, south) / step), math.floor(min(rim, north) / step) + 1):
        y = y_of(project(0, n * step)[1])
        if 14 < y < height - 16:
            parts.append(
                f'<path d="M0 {y:.1f}H{width}" {line}/><text x="4" y="{y - 3:.1f}">{n * step:.{digits}f}°</text>'
            )
    for rank, x0, y0, x1, y1 in reversed(boxes):
        name = f"<title>{rank}. {html.escape(payloads[rank - 1]['path'])}</title>"
        w, h = max((x1 - x0) * scale, 5), max((y1 - y0) * scale, 5)
        cx, cy = x_of((x0 + x1) / 2), y_of((y0 + y1) / 2)
        parts.append(
            f'<g>{name}<rect class="shape" x="{cx - w / 2:.1f}" y="{cy - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}"/>'
            f'<circle class="dot" cx="{cx:.1f}" cy="{cy:.1f}" r="9"/>'
            f'<text class="rank" x="{cx:.1f}" y="{cy + 4:.1f}">{rank}</text></g>'
        )
    return f'<svg class="footprints" viewBox="0 0 {width} {height}" role="img" aria-label="map">{"".join(parts)}</svg>'


# ----------------------------------------------------------------------------------------------------
# The page


class Page:
    """The models, and what the page's buttons do. Every method may run in several threads at once."""

    def __init__(self, args, *, library=None, after=None, captioner=None, vqa=None, chatter=None):
        from imagery import ImageSettings

        self.args, self.library, self.after, self.captioner, self.vqa = args, library, after, captioner, vqa
        self.chatter = chatter
        self.lock = threading.Lock()  # the generating models keep state while they run
        self.settings = library.settings if library else ImageSettings()
        self.folder = Path(tempfile.mkdtemp(prefix="web_demo_"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.pairs = None

    def read(self, path: str | None, language: str = "en", model=None):
        """(H, W, 3) uint8 of an upload, by its content, with the bands and the stretch of `model` (default: of the library).
        Raises InputError with what a visitor should know: without our paths."""
        from imagery import ImageSettings, image_size, read_rgb

        settings = model.settings.images if model else self.settings.to_dict()
        if not path:
            return None
        with self.own_name(path, language):
            height, width = image_size(path)
            if height * width > 4 * self.args.max_pixels:  # read block by block, but 2 s and 1 GB for a file of 20 kB
                raise InputError(self.say("large", language, name=Path(path).name, width=width, height=height))
            bounded = ImageSettings.from_dict(settings | {"max_pixels": self.args.max_pixels})
            return read_rgb(path, bounded, max_side=2048)

    def pixels(self, model, path: str | None, language: str) -> dict:
        """{path: pixels as the vision tower of `model` takes them}; empty without a picture. Raises InputError."""
        from model import pixel_store

        rgb = self.read(path, language, model)
        if rgb is None:
            return {}
        with self.own_name(path, language):
            return {path: pixel_store(model).resized(path, rgb)}

    @contextlib.contextmanager
    def own_name(self, path: str | None, language: str = "en"):
        """What is wrong with a visitor's picture is said of the name it was given, not of where we keep it."""
        from imagery import ImageError

        try:
            yield
        except ImageError as error:
            reason = str(error).replace(str(path), Path(path).name) if path else str(error)
            raise InputError(self.say("bad_picture", language, reason=reason)) from None

    def without_paths(self, text: str) -> str:
        """A message without the paths of our indexes and images, which are no visitor's business."""
        for opened in (self.library, self.after):
            for path in (opened.index.location, opened.root.resolve(), os.path.abspath(opened.root)) if opened else ():
                text = text.replace(str(path), Path(path).name or str(path))
        return text

    def keep(self, name: str, content: str) -> str:
        """The path of a new file for a visitor to download; files of an hour ago are dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)  # what cleans /tmp may have taken it
        for old in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another visitor's search may have dropped it just now
                if old.stat().st_mtime < time.time() - 3600:
                    shutil.rmtree(old, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=self.folder)) / name
        path.write_text(content, encoding="utf-8")
        return str(path)

    def say(self, key: str, language: str, **values) -> str:
        return TEXT[key][language == "zh"].format(**values)

    def texts(self, text: str | None, language: str) -> list[str]:
        """Lines of a text box. Raises InputError."""
        lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
        if not lines:
            raise InputError(self.say("need_text", language))
        if len(lines) > 50 or any(len(line) > MOST_TEXT for line in lines):
            raise InputError(self.say("too_long", language, n=MOST_TEXT))
        return lines

    def filter(self, bbox, start, end, where, language):
        """The `store.Filter` of the fields, or None. Raises InputError."""
        box = None
        if (bbox or "").strip():
            try:
                box = checked_box(bbox.replace("，", ",").replace(",", " ").split(), "")
            except InputError:
                raise InputError(self.say("box_form", language)) from None
        start, end = (start or "").strip() or None, (end or "").strip() or None
        times = []
        for text, read in ((start, first_moment), (end, last_moment)):
            try:
                times.append(text and in_utc(read(text, "")))
            except InputError:
                raise InputError(self.say("time_form", language, text=text)) from None
        if all(times) and times[0] > times[1]:
            raise InputError(self.say("time_order", language))
        try:
            attributes = attributes_of(pair for pair in (where or "").replace("，", ",").split(",") if pair.strip())
        except InputError:
            raise InputError(self.say("where_form", language)) from None
        made = Filter(bbox=box, start=start, end=end, attributes=attributes)
        return None if made == Filter() else made

    def search(self, words, without, picture, like_weight, k, bbox, start, end, where, language):
        """-> (status, [(picture, caption)], map, path of the GeoJSON or None)"""
        from imagery import ImageError
        from library import geojson, result_row

        rgb = self.read(picture, language)
        if not (words or "").strip() and rgb is None:
            raise InputError(self.say("need_words", language))
        asked = self.texts(words, language) if (words or "").strip() else []
        vector = self.library.query(
            asked, without=self.texts(without, language) if (without or "").strip() else [],
            like=[] if rgb is None else [rgb], like_weight=like_weight,
        )  # fmt: skip
        hits = self.library.search(vector, int(k), filter=self.filter(bbox, start, end, where, language))
        if not hits:
            return self.say("nothing", language), [], "", None
        shown, rows = [], [result_row(rank, hit) for rank, hit in enumerate(hits, 1)]
        for hit, row in zip(hits, rows):
            try:
                image = self.library.picture(hit.payload, SIDE)
            except ImageError:
                image = np.full((64, 64, 3), 200, np.uint8)  # its file is gone since
            caption = f"{row['rank']}. {hit.score:.3f} {Path(row['path']).name}"
            shown.append((image, caption + (f" · {row['time'][:10]}" if row["time"] else "")))
        path = self.keep("results.geojson", geojson([hit.payload for hit in hits], rows))
        drawn = map_svg([hit.payload for hit in hits], self.args.tile_url) or f"<p>{self.say('no_place', language)}</p>"
        status = self.say("found", language, n=len(hits), total=self.library.index.count())
        return status, shown, drawn, path

    def match(self, picture, texts, language):
        rgb = self.read(picture, language)
        if rgb is None:
            raise InputError(self.say("need_picture", language))
        lines = self.texts(texts, language)
        scores = self.library.text_vectors(lines, template="{}") @ self.library.picture_vector(rgb)
        rows = list(zip(lines, scores.tolist()))
        return f"<p>{self.say('scores', language)}</p>" + bars_html(
            rows, min(0.0, *scores.tolist()), max(0.5, *scores.tolist())
        )

    def classify(self, picture, classes, own, language):
        from library import labels_in, read_classes

        rgb = self.read(picture, language)
        if rgb is None:
            raise InputError(self.say("need_picture", language))
        if (own or "").strip():
            table = labels_in(self.texts(",".join(own.splitlines()), language)[0])
            if len(table) < 2:  # or a path, which is for the command line
                raise InputError(self.say("own_form", language))
        else:
            table = read_classes(classes)
        scores = self.library.classify(self.library.picture_vector(rgb)[None], table)[0]
        rows = sorted(zip(table, scores.tolist()), key=lambda row: -row[1])[:12]
        return f"<p>{self.say('probability', language)}</p>" + bars_html(rows)

    def monitor(self, queries, language):
        from imagery import ImageError
        from library import CHANGE, match_places
        from report import thumbnail

        lines = self.texts(queries, language)
        with self.lock:
            if self.pairs is None:
                self.pairs = match_places(self.library, self.after)
        pairs = self.pairs
        _, _, z = pairs.changes(self.library.text_vectors(lines), reference=self.library.reference_vectors(lines))
        parts = [f"<p>{self.say('change_note', language, n=len(pairs.before))}</p>"]
        for note in pairs.notes:
            if language == "zh":
                note = PAIR_NOTES_ZH[note.key].format(**note.values | {"date": DATES_ZH.get(note.values.get("date"))})
            parts.append(f"<p>{html.escape(note)}</p>")
        for line, row in zip(lines, z):
            parts.append(f"<h3>{html.escape(line)}</h3>")
            found = [n for n in np.argsort(-np.abs(row), kind="stable")[:8] if abs(row[n]) >= CHANGE]
            cards = []
            for n in found:
                images = []
                for library, payload in ((self.library, pairs.before[n]), (self.after, pairs.after[n])):
                    try:
                        images.append(
                            f'<img src="{thumbnail(library.picture(payload, SIDE))}" alt="{(payload["time"] or "")[:10]}">'
                        )
                    except ImageError as error:
                        images.append(html.escape(self.without_paths(str(error))))
                word = self.say("more" if row[n] > 0 else "less", language)
                days = " → ".join((p["time"] or "?")[:10] for p in (pairs.before[n], pairs.after[n]))
                said = f"{html.escape(pairs.before[n]['path'])} · {word} {row[n]:+.1f} · {days}"
                cards.append(f"<figure><div>{''.join(images)}</div><figcaption>{said}</figcaption></figure>")
            parts.append(
                f'<div class="pairs">{"".join(cards)}</div>' if cards else f"<p>{self.say('steady', language)}</p>"
            )
        return "".join(parts)

    def describe(self, picture, prompt, language):
        pixels = self.pixels(self.captioner, picture, language)
        if not pixels:
            raise InputError(self.say("need_picture", language))
        prompt = (prompt or "").strip()[:MOST_TEXT] or None
        with self.lock:
            caption = self.captioner.caption([picture], prompt=prompt, store=pixels)[0]
        return f"<p>{html.escape(caption)}</p>"

    def ask(self, picture, questions, language):
        pixels = self.pixels(self.vqa, picture, language)
        if not pixels:
            raise InputError(self.say("need_picture", language))
        lines = self.texts(questions, language)
        with self.lock:
            answers = self.vqa.answer([(picture, lines)], store=pixels)[0]
        return "".join(f"<p><b>{html.escape(q)}</b><br>{html.escape(a)}</p>" for q, a in zip(lines, answers))

    def talk(self, pixels, question, history, *, adapter=True, temperature=0.0, top_p=1.0, max_tokens=256, cut=None):
        """The answer to a question after [(question, answer)] turns about the picture of `pixels`, as it grows: a generator
        of texts. Closing it stops the model. cut: as in `VQA.chat`."""
        from transformers import TextIteratorStreamer

        halt, failed = threading.Event(), []
        streamer = TextIteratorStreamer(self.chatter.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def run():
            try:
                with self.lock, contextlib.nullcontext() if adapter else self.chatter.before():
                    self.chatter.chat(
                        next(iter(pixels), None), question, history, temperature=temperature, top_p=top_p,
                        max_tokens=max_tokens, streamer=streamer, stop=halt.is_set, store=pixels, cut=cut,
                    )  # fmt: skip
            except Exception as error:  # the reader below must not wait for ever
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        said, shown, due = "", "", 0.0
        try:
            for piece in streamer:
                said += piece
                if said != shown and (now := time.monotonic()) >= due:
                    yield said
                    shown, due = said, now + FRAME
            if failed:
                raise failed[0]
            if said != shown:
                yield said
        finally:
            halt.set()
            thread.join()

    def converse(self, picture, message, told, plain, compare, temperature, top_p, length, language, cut=None):
        """One turn. told, plain: the chatbots' messages, with and without the adapter. Yields both as they grow. `cut()` is
        called where the first turns are left out, for there are too many."""
        question = (message or "").strip()
        if not question:
            raise InputError(self.say("need_text", language))
        if len(question) > MOST_TEXT:
            raise InputError(self.say("too_long", language, n=MOST_TEXT))
        pixels = self.pixels(self.chatter, picture, language)  # none is allowed: a question about no image
        told, plain = list(told or []), list(plain or [])
        turns = turns_of(told)  # for both: without the adapter the same question is asked at the same place
        left_out = [len(turns) - MOST_TURNS] if len(turns) > MOST_TURNS else []
        how = {"temperature": temperature, "top_p": top_p, "max_tokens": int(length), "cut": left_out.append}
        for messages, adapter in ((told, True), (plain, False)):
            if not adapter and not compare:
                continue
            # The chatbot puts what it is given into the page as HTML, without Markdown too: <ref> would be gone, <img> fetched.
            messages += [
                {"role": "user", "content": html.escape(question, False)},
                {"role": "assistant", "content": ""},
            ]
            yield told, plain
            try:
                for text in self.talk(pixels, question, turns[-MOST_TURNS:], adapter=adapter, **how):
                    if left_out and cut:
                        cut()
                        cut = None
                    messages[-1]["content"] = html.escape(text, False)
                    yield told, plain
            except Exception:  # a question without an answer would be part of what is asked next
                del messages[-2:]
                yield told, plain
                raise


def turns_of(messages: list[dict]) -> list[tuple[str, str]]:
    """[(question, answer)] of a chatbot's messages, whose content is a text, escaped for HTML, or a list of parts with such."""
    texts = []
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, list) else [content]
        shown = "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)
        texts.append(html.unescape(shown).strip())
    return [(q, a or "…") for q, a in zip(texts[::2], texts[1::2])]


def build(page: Page):
    """The gradio app of a `Page`."""
    import gradio as gr

    from library import CLASS_LISTS

    first = "zh" if page.args.language == "zh" else "en"
    translated = []  # (component, {property: key of TEXT})

    def put(component, texts: dict[str, str], **more):
        """A component whose `texts`, {property: key of TEXT}, follow the page's language."""
        made = component(**{name: page.say(key, first) for name, key in texts.items()}, **more)
        translated.append((made, texts))
        return made

    def notice(error: InputError):
        said = html.escape(page.without_paths(str(error)), quote=False)  # a notice is HTML
        return gr.Error(said, print_exception=False, title=" ")  # "" would be "Error", on the Chinese page too

    def kind(action):
        """A user's mistake becomes a notice on the page."""

        def run(*values):
            try:
                return action(*values)
            except InputError as error:
                raise notice(error) from None

        return run

    def upload(model=None):
        """A field for a picture, read by content as `model` reads it, with a preview of what was read."""
        file = put(gr.File, {"label": "picture"}, type="filepath", height=150)
        shown = gr.Image(show_label=False, visible=False, interactive=False, height=240, buttons=[])

        def preview(path, language):
            return gr.update(value=page.read(path, language, model), visible=path is not None)

        file.change(kind(preview), [file, choice], shown, show_progress="hidden", api_visibility="private")
        return file

    def button(key, action, inputs, outputs, also=()):
        """A button that runs `action`, under the API name `key`; events of `also` run it too."""
        made = put(gr.Button, {"value": f"go_{key}"}, variant="primary")
        made.click(kind(action), inputs, outputs, api_name=key)
        for event in also:
            event(kind(action), inputs, outputs, api_visibility="private")

    def search_tab():
        described = gr.Markdown(page.say("about", first, **about))
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                texts = {"label": "words", "placeholder": "words_hint"}
                words = put(gr.Textbox, texts, max_length=MOST_TEXT)
                texts = {"label": "without", "placeholder": "without_hint"}
                without = put(gr.Textbox, texts, max_length=MOST_TEXT)
                picture = upload()
                like = put(gr.Slider, {"label": "like"}, minimum=0, maximum=1, value=0.5, step=0.05)
                k = put(gr.Slider, {"label": "k"}, minimum=1, maximum=50, value=12, step=1)
                with put(gr.Accordion, {"label": "filters"}, open=False):
                    bbox = put(gr.Textbox, {"label": "bbox"}, placeholder="5.0, 51.0, 7.5, 52.5")
                    with gr.Row():
                        start = put(gr.Textbox, {"label": "start"}, placeholder="2020-01-01")
                        end = put(gr.Textbox, {"label": "end"}, placeholder="2020-12-31")
                    where = put(gr.Textbox, {"label": "where"})
                place = gr.Column()
            with gr.Column(scale=2, min_width=420):
                status = gr.Markdown()
                look = {"columns": 4, "height": "auto", "object_fit": "contain", "buttons": ["fullscreen"]}
                gallery = put(gr.Gallery, {"label": "results"}, interactive=False, **look)
                drawn = gr.HTML(padding=False)
                saved = put(gr.DownloadButton, {"label": "geojson"}, interactive=False)

        def run(*values):
            said, shown, figure, path = page.search(*values)
            return said, shown, figure, gr.update(value=path, interactive=path is not None)

        inputs = [words, without, picture, like, k, bbox, start, end, where, choice]
        with place:
            button("search", run, inputs, [status, gallery, drawn, saved], (words.submit, without.submit))
        return described

    def picture_tab(name, action, *fields, model=None):
        """A picture and fields at the left, what comes of them at the right."""
        with put(gr.Tab, {"label": name}), gr.Row():
            with gr.Column():
                picture = upload(model)
                given = [make() for make in fields]
                place = gr.Column()
            out = gr.HTML(padding=False)
            with place:
                button(name, action, [picture, *given, choice], out)

    def converse_tab():
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                picture = upload(page.chatter)
                compare = put(gr.Checkbox, {"label": "compare"})
                with put(gr.Accordion, {"label": "how"}, open=False):
                    temperature = put(gr.Slider, {"label": "temperature"}, minimum=0, maximum=2, value=0, step=0.05)
                    top_p = put(gr.Slider, {"label": "top_p"}, minimum=0.05, maximum=1, value=1, step=0.05)
                    length = put(gr.Slider, {"label": "length"}, minimum=8, maximum=1024, value=256, step=8)
            with gr.Column(scale=2, min_width=420):
                # What a model says is no page.
                look = {"height": 420, "render_markdown": False, "buttons": ["copy"], "elem_classes": "talk"}
                with gr.Row():
                    told = put(gr.Chatbot, {"label": "talk"}, **look)
                    plain = put(gr.Chatbot, {"label": "plain"}, visible=False, **look)
                message = put(gr.Textbox, {"label": "message", "placeholder": "message_hint"}, max_length=MOST_TEXT)
                with gr.Row():
                    send = put(gr.Button, {"value": "send"}, variant="primary")
                    names = ("halt", "retry", "clear")
                    halt, again, clear = (put(gr.Button, {"value": name}, elem_id=name) for name in names)

        def run(event: gr.EventData, picture, question, words, others, *values):
            retry = event.target.elem_id == "retry"  # a visitor whose language has changed has buttons of their own
            if retry:
                if not words:
                    return
                question = turns_of(words)[-1][0]
                if others and turns_of(others)[-1][0] == question:
                    others = others[:-2]
                words = words[:-2]

            def cut():
                gr.Info(page.say("cut", values[-1]), title=" ")

            try:
                for n, told in enumerate(page.converse(picture, question, words, others, *values, cut)):
                    yield *told, gr.skip() if n or retry else ""  # what is typed meanwhile stays
            except InputError as error:
                raise notice(error) from None

        inputs = [picture, message, told, plain, compare, temperature, top_p, length, choice]
        # One event: of several each would run beside the others, and write its own conversation over theirs.
        asked = [send.click, message.submit, again.click]
        answer = gr.on(asked, run, inputs, [told, plain, message], api_visibility="private")
        halt.click(None, cancels=answer, api_visibility="private")
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        for event in (clear.click, picture.change):  # another image begins another conversation
            # In two steps, or the last piece of the answer that is cancelled might come behind.
            event(None, cancels=answer, **quiet).then(lambda: ([], []), None, [told, plain], **quiet)
        compare.change(lambda both: gr.update(visible=both, value=[]), compare, plain, **quiet)

    with gr.Blocks(title=page.say("title", first), analytics_enabled=False, delete_cache=(3600, 86400)) as app:
        with gr.Row():
            with gr.Column(scale=1, min_width=320):  # on a phone the language goes below the title
                heading = gr.Markdown(f"# {page.say('title', first)}")
            languages = [("English", "en"), ("中文", "zh")]
            choice = put(gr.Radio, {"label": "language"}, choices=languages, value=first, scale=0, min_width=220)
        described = gr.Markdown(visible=False)
        with gr.Tabs():
            if page.library:
                about = {"total": page.library.index.count(), "library": "/".join(page.library.root.parts[-2:])}
                about["model"] = Path(page.library.index.record["model"]).name
                with put(gr.Tab, {"label": "search"}):
                    described = search_tab()
                texts = {"label": "texts", "placeholder": "texts_hint"}
                picture_tab("match", page.match, lambda: put(gr.Textbox, texts, lines=5))
                lists = sorted(path.stem for path in CLASS_LISTS.glob("*.json"))
                picture_tab(
                    "classify", page.classify,
                    lambda: put(gr.Dropdown, {"label": "classes"}, choices=lists, value="ucm"),
                    lambda: put(gr.Textbox, {"label": "own"}),
                )  # fmt: skip
            if page.after:
                with put(gr.Tab, {"label": "monitor"}):
                    lines = put(gr.Textbox, {"label": "queries", "placeholder": "queries_hint"}, lines=3)
                    place, out = gr.Column(), gr.HTML(padding=False)
                    with place:
                        button("monitor", page.monitor, [lines, choice], out)
            if page.captioner:
                first_prompt = page.captioner.default_prompt()
                picture_tab(
                    "describe", page.describe, lambda: put(gr.Textbox, {"label": "prompt"}, value=first_prompt),
                    model=page.captioner,
                )  # fmt: skip
            if page.vqa:
                picture_tab(
                    "ask",
                    page.ask,
                    lambda: put(gr.Textbox, {"label": "question", "placeholder": "question_hint"}, lines=3),
                    model=page.vqa,
                )
            if page.chatter:
                with put(gr.Tab, {"label": "converse"}):
                    converse_tab()

        def translate(language):
            said = [gr.update(**{n: page.say(key, language) for n, key in texts.items()}) for _, texts in translated]
            title = f"# {page.say('title', language)}"
            return [title, page.say("about", language, **about) if page.library else "", *said]

        shown = [heading, described, *(component for component, _ in translated)]
        choice.change(translate, choice, shown, show_progress="hidden", api_visibility="private")
        if page.args.language == "auto":
            # Asked in the browser: an answer of a busy server could come after the visitor has chosen, and undo it.
            browsers = "() => navigator.language.toLowerCase().startsWith('zh') ? 'zh' : 'en'"
            app.load(None, None, choice, js=browsers, show_progress="hidden", api_visibility="private")
    app.queue(max_size=256, default_concurrency_limit=4)
    return app


def checked(args) -> None:
    """Fill in the demo's defaults and refuse what cannot be shown, before models are loaded. Raises InputError."""
    if args.preset == "demo":
        for name, path in DEMO.items():
            ours = name != "after" or args.store == DEMO["store"]  # another index has other models and places
            if ours and getattr(args, name) is None and Path(path).exists():
                setattr(args, name, path)
    refuse_outside(args, port=(1, 65535), max_upload_mb=(1, 10**6), max_pixels=(1, 2**40))
    if not (args.store or args.captioner or args.vqa or args.from_pretrained):
        hint = "; run `make demo` first" if args.preset == "demo" else ""
        raise InputError(f"nothing to show: give --store, --captioner, --vqa or --from_pretrained{hint}")
    if args.after and not args.store:
        raise InputError("--after needs --store, the index of the earlier images")
    if args.after and os.path.realpath(args.after) == os.path.realpath(args.store):
        raise InputError("--store and --after are the same index: Monitor compares two")
    if args.tile_url and not all(part in args.tile_url for part in ("{z}", "{x}", "{y}")):
        raise InputError(f"--tile_url {args.tile_url}: expected {{z}}, {{x}} and {{y}} in it")
    # A mistyped path is said at once, not after the models' loading: a service would be taken for one that runs.
    for location in filter(None, (args.store, args.after)):
        store.refuse_absent(location)
    for name in ("captioner", "vqa", "from_pretrained", "library"):
        if getattr(args, name) and not Path(getattr(args, name)).is_dir():
            raise InputError(f"--{name} {getattr(args, name)}: no such folder")


def explained(error: OSError, args) -> InputError:
    """What is wrong with the address that gradio could not open."""
    try:
        socket.create_server((args.host, 0), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET).close()
    except OSError as wrong:
        return InputError(f"--host {args.host}: no address of this machine ({wrong.strerror})")
    taken = "Cannot find empty port" in str(error)  # gradio's words, which name a flag that is not ours
    what = "is in use by another program; give another --port" if taken else error
    return InputError(f"--port {args.port}: {what}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    checked(args)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gradio as gr
    from transformers.utils import logging

    from library import Library
    from model import VQA, Captioner, pick_device

    logging.disable_progress_bar()
    device, dtype = pick_device(args.device, args.dtype)
    options = {"device": device, "dtype": dtype}
    library = after = captioner = vqa = None
    if args.store:
        library = Library.open(args.store, model=args.model, base_model=args.base_model, root=args.library, **options)
    if args.after:
        after = Library.open(args.after, encoder=library.model)
    moved = f"; python search.py index FOLDER --store {args.after} --moved"
    for opened, hint in ((library, "; give --library"), (after, moved)):
        if opened and not opened.root.is_dir():
            print(
                f"warning: {opened.root}: no such folder, so that its pictures cannot be shown{hint}", file=sys.stderr
            )
    if args.captioner:
        captioner = Captioner.from_pretrained(args.captioner, **options)
    base = {} if args.store else {"base_model": args.base_model}
    if args.vqa:
        vqa = VQA.from_pretrained(args.vqa, **base, **options)
    chatter = None
    if args.from_pretrained:
        same = args.vqa and os.path.realpath(args.vqa) == os.path.realpath(args.from_pretrained)
        chatter = vqa if same else VQA.from_pretrained(args.from_pretrained, **base, **options)
    page = Page(args, library=library, after=after, captioner=captioner, vqa=vqa, chatter=chatter)
    app = build(page)
    fonts = [
        "system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif",
    ]  # fmt: skip
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"])
    try:
        app.launch(
            server_name=args.host, server_port=args.port, share=args.share, max_file_size=f"{args.max_upload_mb}mb",
            theme=theme, css=CSS, footer_links=[], quiet=True, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise explained(error, args) from None
    print(f"http://{args.host}:{args.port}  (Ctrl-C stops it)", flush=True)
    try:
        app.block_thread()
    finally:
        shutil.rmtree(page.folder, ignore_errors=True)
        for opened in (library, after):
            if opened:
                opened.index.close()
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
