"""report.py: what it writes is escaped, whole, self-contained and lined up."""

import base64
import io
import os
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from PIL import Image

import report
from report import (
    CJK_FONTS,
    FLIPS,
    caption_sections,
    curves_figure,
    figure_html,
    flip_of,
    flips_by_type,
    gallery_html,
    in_turn,
    page,
    plot_style,
    sample_rows,
    samples_html,
    samples_text,
    table_html,
    table_text,
    thumbnail,
    varied,
    write_atomic,
)

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
    other = {"image": thumbnail(PICTURE), "title": "二", "good": None, "lines": [("没有分数", None, None)]}
    sections = [
        (EVIL, table_html([{"a": EVIL, "b": 1.5}], {"a": EVIL, "b": "分数"})),
        ("plots", figure_html(png, EVIL)),
        ("gallery", gallery_html([item, other])),
    ]
    path = page(EVIL, sections, tmp_path / "new" / "folder" / "index.html", subtitle=EVIL)
    text = path.read_text("utf-8")
    checker = parse(text)
    assert "script" not in checker.seen and "<script" not in text
    assert checker.words.count(EVIL) == 8  # both titles, subtitle, heading, column, cell, card title, line
    assert "分数" in checker.words and "没有分数" in checker.words
    assert len(checker.references) == 3 and all(reference.startswith("data:image/") for reference in checker.references)
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"https?:|url\(|@import", style)
    assert "prefers-color-scheme: dark" in style and 'name="viewport"' in text


@pytest.mark.parametrize(
    "image", ["http://a/b.png", "//a/b.png", "/home/x.png", "C:\\x.png", "beside.png", "data:text/html,x"]
)
def test_a_picture_that_would_not_travel_with_the_page_is_refused(image):
    with pytest.raises(ValueError, match="expected a data URI"):
        gallery_html([{"image": image, "title": "", "lines": []}])


def test_gallery_marks_right_and_wrong_by_sign_and_scales_bars():
    lines = [("a", 0.4, True), ("b", 0.0, False), ("c", -0.1, None), ("d", float("nan"), False)]
    text = gallery_html([{"image": thumbnail(PICTURE), "title": "t", "good": True, "lines": lines}])
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


def test_a_chinese_font_that_matplotlib_has_not_listed_is_found(monkeypatch):
    """It lists the fonts once; who installs one because we said so has to see Chinese in the next plot."""
    from matplotlib import font_manager

    with plot_style():
        if not set(matplotlib.rcParams["font.family"]) & set(CJK_FONTS):
            pytest.skip("no Chinese font here")
    old = [font for font in font_manager.fontManager.ttflist if font.name not in CJK_FONTS]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", old)
    with plot_style():
        assert set(matplotlib.rcParams["font.family"]) & set(CJK_FONTS)


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


# ---------------------------------------------------------------------------------------------
# Answers before and after

OUTCOMES = {"gained": (False, True), "lost": (True, False), "wrong": (False, False), "right": (True, True)}


def sample(kind="presence", flip="gained", image="a.tif", question="Is there a road?", **more) -> dict:
    before, after = OUTCOMES[flip]
    row = {"id": "1", "image_path": image, "type": kind, "question": question, "truth": "yes"}
    return row | {"before": "no", "before_right": before, "after": "yes", "after_right": after} | more


def test_flips():
    for flip in FLIPS:
        assert flip_of(sample(flip=flip)) == flip
    rows = [sample("count", "gained"), sample("count", "wrong"), sample("all", "lost"), sample("all", "right")]
    made, columns = flips_by_type(rows)  # a type that is named "all" is not the row of all
    assert [(row["type"], row["questions"], row["before"], row["after"]) for row in made] == [
        ("all", 2, 1.0, 0.5), ("count", 2, 0.0, 0.5), ("all", 4, 0.5, 0.5)]  # fmt: skip
    assert [[row[flip] for flip in FLIPS] for row in made] == [[0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]]
    assert set(columns) == set(made[0])
    assert [row["type"] for row in flips_by_type(rows[:2])[0]] == ["count"]  # one type is all of them
    assert flips_by_type([])[0] == []


def test_sample_rows():
    question = lambda *of: SimpleNamespace(**dict(zip(("text", "answer", "kind", "id"), of)))  # noqa: E731
    scenes = [
        SimpleNamespace(
            image="a.tif", questions=[question("A?", "1", "count", "7"), question("B?", "yes", None, None)]
        ),
        SimpleNamespace(image="b.tif", questions=[]),
        SimpleNamespace(image="c.tif", questions=[question("C?", "no", "presence", "9")]),
    ]
    answers = {"before": [["1", "no"], [], ["no"]], "after": [["2", "YES"], [], [""]]}
    rows = sample_rows(scenes, lambda answer, truth, kind: answer.lower() == truth, **answers)
    first = {"id": "7", "image_path": "a.tif", "type": "count", "question": "A?", "truth": "1"}
    assert rows[0] == first | {"before": "1", "before_right": True, "after": "2", "after_right": False}
    assert list(rows[0])[-4:] == ["before", "before_right", "after", "after_right"]
    assert [row["type"] for row in rows] == ["count", "question", "presence"]
    assert [row["image_path"] for row in rows] == ["a.tif", "a.tif", "c.tif"]
    assert [flip_of(row) for row in rows] == ["lost", "gained", "lost"]


def test_varied_covers_every_type_and_flip_and_many_images():
    groups = [(kind, flip) for kind in ("presence", "count", "area") for flip in FLIPS]
    rows = [sample("presence", "right", f"{i % 50}.tif", f"{i}") for i in range(500)]
    rows += [sample(*group, "last.tif", "rare") for group in groups]
    chosen = varied(rows, 2 * len(groups))
    assert len(chosen) == 24 and {(row["type"], flip_of(row)) for row in chosen} == set(groups)
    order = [rows.index(row) for row in chosen]
    assert order == sorted(order) and chosen == varied(rows, 24)
    common = [row["image_path"] for row in varied(rows, 60) if row["image_path"] != "last.tif"]
    assert len(common) == len(set(common)) >= 48  # no image twice while there is another
    assert varied(rows, 0) == [] and varied(rows, 1000) == rows and varied([], 5) == []


def test_in_turn_takes_groups_in_turn_and_images_before_repeats():
    items = [(kind, image, n) for kind in "abc" for image in range(4) for n in range(3)] + [("rare", 0, 0)]
    order = in_turn(items, lambda item: item[0], lambda item: item[1], seed=3)
    assert sorted(order) == sorted(items) and order == in_turn(items, lambda i: i[0], lambda i: i[1], seed=3)
    assert order != in_turn(items, lambda item: item[0], lambda item: item[1], seed=4)
    assert sorted(item[0] for item in order[:4]) == ["a", "b", "c", "rare"]
    for kind in "abc":
        assert sorted([item[1] for item in order if item[0] == kind][:4]) == [0, 1, 2, 3]


def test_samples_fit_a_terminal():
    rows = [
        sample(
            image="/far/away/" + "x" * 90 + "_00123.tif", question="图像中有多少座建筑物？" * 20, after="", truth="是"
        ),
        sample("count", "lost", question="a\x1b[31m\nb " * 30, before="a very long answer " * 9),
    ]
    for width in (80, 100, 120):
        lines = samples_text(rows, width).splitlines()
        columns = [sum(2 if ord(c) > 0x2E80 else 1 for c in line) for line in lines]
        assert len(lines) == 4 and width - 4 < max(columns) <= width, columns
        assert "_00123.tif" in lines[2] and "…" in lines[2] and "✗ no" in lines[2] and "✓ –" in lines[2]
        assert "✓ a very" in lines[3] and "✗ yes" in lines[3] and "\x1b" not in lines[3]
    short = samples_text([sample()], 200).splitlines()
    assert short[2].split() == ["a.tif", "presence", "Is", "there", "a", "road?", "yes", "✗", "no", "✓", "yes"]
    assert samples_text(rows, 10)  # narrower than it can be: as narrow as it can


def test_samples_page_is_balanced_and_escaped(tmp_path):
    rows = [sample(EVIL, flip, f"/data/{EVIL[:30]}.tif", EVIL, truth=EVIL, before=EVIL, after=EVIL) for flip in FLIPS]
    rows.append(sample("计数", "right", "b.tif", blind="2", blind_right=False, truth=3))
    path = page("t", [("s", samples_html(rows, lambda path: PICTURE))], tmp_path / "a.html")
    text = path.read_text("utf-8")
    checker = parse(text)
    assert "script" not in checker.seen and "<script" not in text
    assert checker.words.count(EVIL) == 1 + 4 * 5  # the button; type, question, truth and two answers of four
    assert len(checker.references) == 2 and all(r.startswith("data:image/jpeg") for r in checker.references)
    assert "blind" in checker.words and checker.seen.count("figure") == 2


def test_samples_classes_are_valid_whatever_the_types_are_called():
    kinds = ["a b", "}</style>", "#x{", "计数", "all", "f-lost", "right", "0"]
    rows = [sample(kind, flip, f"{i}.tif") for i, kind in enumerate(kinds) for flip in ("gained", "lost")]
    text = samples_html(rows, lambda path: PICTURE)
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    assert text.count("</style>") == 1 and style.count("{") == style.count("}") > 8
    classes, ids = set(re.findall(r"\.([\w-]+)", style)), re.findall(r'id="([^"]+)"', text)
    assert {c for c in classes if c not in ("qa", "card", "none")} == {f"k{i}" for i in range(8)} | {
        "f-gained",
        "f-lost",
    }
    assert all(re.fullmatch(r"[a-z][\w-]*", name) for name in ids) and len(ids) == len(set(ids)) == 1 + 8 + 1 + 2
    assert set(re.findall(r"#([\w-]+):checked", style)) == set(ids) - {"kind-all", "flip-all"}
    for name, kind in zip([f"k{i}" for i in range(8)], sorted(kinds)):
        assert text.count(f'class="qa {name} f-') == 2 and f"<i>{2}</i>" in text and kind in parse(text).words
    assert text.count(" checked>") == 2


def test_samples_have_one_card_an_image_and_read_it_once():
    read = []

    def picture(path):
        read.append(path)
        return PICTURE if path == "a.tif" else thumbnail(PICTURE)

    rows = [sample(image=image, question=f"{image} {n}") for n in range(3) for image in ("a.tif", "b.tif")]
    text = samples_html(rows, picture)
    assert read == ["a.tif", "b.tif"] and text.count("<figure") == 2 and text.count('class="qa') == 6
    assert parse(text).words.index("a.tif 2") < parse(text).words.index("b.tif 0")
    assert "No samples" in samples_html([], picture) and len(read) == 2


def test_caption_pages_show_best_and_worst_first():
    picture = lambda path: np.zeros((8, 8, 3), np.uint8)  # noqa: E731
    rows = [
        {"image": f"{i}.png", "caption": f"caption <{i}>", "CIDEr": i / 10, "references": [f"truth {i}"]}
        for i in range(5)
    ]
    best, worst = caption_sections(rows, picture, 2)
    assert (best[0], worst[0]) == ("Best", "Worst")
    order = lambda part: re.findall(r"caption &lt;(\d)&gt;</b>", part)  # noqa: E731
    assert order(best[1]) == ["4", "3"] and order(worst[1]) == ["0", "1"] and "truth 4" in best[1]
    assert [name for name, _ in caption_sections(rows[:1], picture, 2)] == ["Best"]
    bare = [{"image": "a.png", "caption": "x"}]
    assert [name for name, _ in caption_sections(bare, picture)] == ["Captions"]


def test_best_and_worst_of_dialogues_show_an_image_once():
    asked = {"references": ["truth"], "prompt": "Where?", "history": [["Ships?", "Yes."]], "before": "off"}
    scores = (("a", 10), ("a", 0), ("b", 5), ("b", 4))
    rows = [asked | {"image": image, "caption": f"{image}{score}", "CIDEr": score} for image, score in scores]
    (best, shown), (worst, others) = caption_sections(rows, lambda _: np.zeros((8, 8, 3), np.uint8), number=1)
    assert (best, worst) == ("Best", "Worst") and "a10" in shown and "b5" not in shown and "a0" in others
    assert "Ships? … Yes." in shown and "Where? … ?" in shown and "adapter off: off" in shown


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to("target.json")
    write_atomic(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").read_text() == "new"
    assert write_atomic("/dev/null", "gone") == Path("/dev/null") and not os.path.isfile("/dev/null")
    code = "import report; print('one', flush=True); report.write_atomic('/dev/stdout', 'two\\n'); print('three')"
    (tmp_path / "log").write_text("zero\n")
    with open(tmp_path / "log", "a") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True, cwd=Path(__file__).parents[1])
    assert (tmp_path / "log").read_text().split() == ["zero", "one", "two", "three"]


def test_a_confusion_matrix_has_the_truth_in_its_rows(monkeypatch):
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figure)
    axes = report.confusion_figure(np.array([[3, 1], [0, 4]]), ["a", "b"]).axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "3", (1, 0): "1", (1, 1): "4"}


def test_a_smoothed_line_keeps_its_ends():
    assert report._smooth(np.ones(60), 2) == pytest.approx(np.ones(60))
