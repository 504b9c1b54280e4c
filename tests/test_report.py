"""report.py: what it writes is escaped, whole, self-contained and lined up."""

import base64
import io
import os
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from report import curves_figure, figure_html, gallery_html, page, table_html, table_text, thumbnail, write_atomic

EVIL = '<script>alert("x")</script>&\'"'
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
HISTORY = [{"step": s, "loss": 2.0 / (s + 1), "learning_rate": 1e-4 * (1 - s / 100)} for s in range(100)]
HISTORY += [{"step": s, "eval_loss": 1.0, "eval_mR": s / 200} for s in range(0, 100, 25)]


class Checker(HTMLParser):
    """Collects open tags, text and every reference; a tag closed out of order is an error."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.references, self.words = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        assert not [name for name, _ in attributes if name.startswith("on")], "an inline script"
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data):
        self.words += data


def parse(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open, checker.open
    return checker


def test_page_is_balanced_escaped_and_refers_to_nothing_outside(tmp_path):
    png = curves_figure(HISTORY, {"loss": "loss", "eval_mR": "mR"})
    item = {"image": thumbnail(PICTURE), "title": EVIL, "good": False, "lines": [(EVIL, 0.5, True), ("b", -0.1, False)]}
    other = {"image": "pictures/a #1?.jpg", "title": "二", "good": None, "lines": [("没有分数", None, None)]}
    sections = [
        (EVIL, table_html([{"a": EVIL, "b": 1.5}], {"a": EVIL, "b": "分数"})),
        ("plots", figure_html(png, EVIL) + figure_html("plot.png", "beside")),
        ("gallery", gallery_html([item, other])),
    ]
    path = page(EVIL, sections, tmp_path / "new" / "folder" / "index.html", subtitle=EVIL)
    text = path.read_text("utf-8")
    checker = parse(text)
    assert "script" not in checker.seen and "<script" not in text
    assert checker.words.count(EVIL) == 8  # both titles, subtitle, heading, column, cell, card title, line
    assert "分数" in checker.words and "没有分数" in checker.words
    assert len(checker.references) == 4
    for reference in checker.references:
        assert reference.startswith("data:image/") or reference in ("pictures/a%20%231%3F.jpg", "plot.png")
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"https?:|url\(|@import", style)
    assert "prefers-color-scheme: dark" in style and 'name="viewport"' in text


@pytest.mark.parametrize(
    "image", ["http://a/b.png", "https://a/b.png", "//a/b.png", "/home/x.png", "C:\\x.png", "data:text/html,x"]
)
def test_a_picture_that_would_not_travel_with_the_page_is_refused(image):
    with pytest.raises(ValueError, match="relative to the page"):
        gallery_html([{"image": image, "title": "", "lines": []}])


def test_gallery_marks_right_and_wrong_by_sign_and_scales_bars():
    lines = [("a", 0.4, True), ("b", 0.0, False), ("c", -0.1, None), ("d", float("nan"), False)]
    text = gallery_html([{"image": "a.jpg", "title": "t", "good": True, "lines": lines}])
    words = parse(text).words
    assert "✓ right" in words and words.count("✗") == 2 and words.count("✓") == 2
    assert 'aria-label="wrong"' in text
    assert re.findall(r"margin-left:([\d.]+)%;width:([\d.]+)%", text) == [
        ("20.0", "80.0"),
        ("20.0", "0.0"),
        ("0.0", "20.0"),
    ]
    assert "0.400" in words and "-0.100" in words and "nan" in words
    parse(gallery_html([]))


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "a" / "page.html", "旧")
    assert path.read_text("utf-8") == "旧"

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "replace", fail)
        write_atomic(path, "new")
    assert path.read_text("utf-8") == "旧"
    write_atomic(path, "lone \ud800 surrogate")
    assert path.read_text("utf-8") == "lone ? surrogate"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_table_marks_the_best_of_a_column_and_ties():
    rows = [{"m": "a", "acc": 0.9, "rank": 3}, {"m": "b", "acc": 0.9, "rank": 1}, {"m": "c", "acc": float("nan")}]
    text = table_html(rows, {"m": "model", "acc": "accuracy", "rank": "rank"}, best={"acc": "max", "rank": "min"})
    assert re.findall("<strong>(.*?)</strong>", text) == ["0.9000", "0.9000", "1"]
    parse(text)
    assert "strong" not in table_html([{"a": None}], {"a": "a"}, best={"a": "max"})
    with pytest.raises(ValueError, match='"max" or "min"'):
        table_html(rows, {"m": "m"}, best={"m": "highest"})


def test_numbers_of_a_column_share_their_decimals():
    rows = [{"a": 1, "b": 0.51234, "c": (0.1, 0.25), "d": 1e-4, "e": 84.234, "f": True, "g": 0.0}]
    rows += [{"a": 1200, "b": np.float32(0.5), "c": None, "d": 2e-5, "e": 3.0, "f": None, "g": 1e-7}]
    lines = table_text(rows, {key: key for key in "abcdefg"}).splitlines()
    assert lines[2].split() == ["1", "0.5123", "[0.1000,", "0.2500]", "1.00e-04", "84.23", "yes", "0.00e+00"]
    assert lines[3].split() == ["1200", "0.5000", "–", "2.00e-05", "3.00", "–", "1.00e-07"]


def test_terminal_table_lines_up_with_chinese():
    rows = [
        {"m": "微调后", "s": 0.5, "t": "x"},
        {"m": "e\u0301tat", "s": 10.25, "t": "y"},
        {"m": "a\x1b[31m\nb", "t": "z"},
    ]
    lines = table_text(rows, {"m": "模型", "s": "score", "t": "end"}).splitlines()
    # 微调后 is six columns wide, é (two code points) one, the escape and newline one space each.
    assert lines == [
        "模型      score  end",
        "--------  -----  ---",
        "微调后     0.50  x",
        "e\u0301tat      10.25  y",
        "a [31m b      –  z",
    ]
    assert table_text([], {"m": "模型"}) == "模型\n----"


def test_thumbnail_is_a_small_jpeg():
    uri = thumbnail(np.zeros((500, 250, 3), np.uint8), side=100)
    assert uri.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (50, 100))
    for bad in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), np.zeros((5, 5, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            thumbnail(bad)


def test_curves_are_a_png_with_lines_in_it(tmp_path):
    keys = {"loss": "training loss", "eval_loss": "eval $loss", "eval_mR": "mR", "absent": "absent"}
    path = tmp_path / "plots" / "run.png"
    assert curves_figure(HISTORY, keys, path) == path
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(1 << 20)
        assert len(colours) > 20
        assert {(0x25, 0x63, 0xA8), (0xC2, 0x56, 0x2D)} <= {colour for _, colour in colours}  # two curves drawn
    width = Image.open(io.BytesIO(curves_figure(HISTORY, {"loss": "loss"}))).width
    assert width < Image.open(path).width  # one panel, not two
    assert f"width:{width * 0.65:.0f}px" in figure_html(curves_figure(HISTORY, {"loss": "loss"}), "a")


def test_curves_take_what_a_resumed_or_broken_run_left():
    once = curves_figure([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}], {"loss": "loss"})
    rows = [{"step": 2, "loss": 9.0}, {"step": 1, "loss": 0.5}, {"step": 3, "loss": float("nan")}, {"loss": 1.0}]
    rows += [{"step": 2, "loss": 0.25}, {"step": 4, "loss": None}, {"step": 4, "note": "end"}]
    assert curves_figure(rows, {"loss": "loss"}) == once
    with pytest.raises(ValueError, match="eval_mR"):
        curves_figure(rows, {"eval_mR": "mR"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no Chinese font here: boxes, and matplotlib says so
        assert curves_figure(rows, {"loss": "损失"})[:4] == b"\x89PNG"
