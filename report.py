"""What a person looks at: curves, tables, galleries, and the HTML page that holds them.

A page is one file that opens anywhere: styles inside, pictures inside, no script, no font, no address on the network. All text
that comes from data is escaped. Functions that return `str` of HTML return a fragment for a section of `page`.
"""

import base64
import contextlib
import csv
import html
import io
import itertools
import json
import math
import numbers
import os
import random
import sys
import tempfile
import unicodedata
import warnings
from pathlib import Path

import numpy as np

from config import is_stream

try:
    Path.home()
except RuntimeError:  # a user without an entry, as in a container: matplotlib would look there for a folder of its own
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(tempfile.gettempdir(), "matplotlib"))


def json_to_print(value, indent: int = 2) -> str:
    """JSON for standard output: characters as they are, or escaped where the output's encoding lacks one."""
    text = json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "replace").decode()
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), indent=indent)
    return text


def write_atomic(path, data: str | bytes) -> Path:
    """Write beside `path` and rename: a reader sees the old file or the new one, never half of it."""
    data = data.encode("utf-8", "replace") if isinstance(data, str) else data
    path = Path(path)
    if is_stream(path):
        with open(path, "ab") as stream:
            stream.write(data)
        return path
    target = Path(os.path.realpath(path))  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, value) -> None:
    """Write JSON whole or not at all."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_list(rows: list[dict]) -> str:
    """A JSON list with one row on each line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV; the header is the keys of all of them, and what a row lacks stays empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------
# Curves

COLOURS = ["#2563a8", "#c2562d", "#2f7d4f", "#7a4fa3", "#9a7b1c", "#3d8a94"]  # dark enough on white
CJK_FONTS = [
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # matplotlib reads the first face of Noto's collection alone; it holds the Chinese characters too
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
]


def _panel(key: str) -> str:
    """Which axes a curve shares: losses with losses, scores with scores, other units alone."""
    if "loss" in key:
        return "loss"
    return key if any(word in key for word in ("learning_rate", "grad_norm", "second", "rank", "memory")) else "score"


def _smooth(values: np.ndarray, spread: float) -> np.ndarray:
    """Gaussian mean over some `spread` points to either side: centred, as an exponential mean lags."""
    offsets = np.arange(-int(3 * spread), int(3 * spread) + 1)
    kernel = np.exp(-0.5 * (offsets / spread) ** 2)
    padded = [np.pad(row, int(3 * spread)) for row in (values, np.ones_like(values))]
    total, weight = (np.convolve(row, kernel, "valid") for row in padded)
    return total / weight


def _chinese_fonts() -> list[str]:
    """Those of CJK_FONTS that are installed. matplotlib keeps the list of its first start: a font that was installed since,
    as `save_figure` advises, is looked for anew."""
    from matplotlib import font_manager

    fonts = font_manager.fontManager
    installed = {font.name for font in fonts.ttflist}
    if not installed.intersection(CJK_FONTS):
        for path in set(font_manager.findSystemFonts()) - {font.fname for font in fonts.ttflist}:
            with contextlib.suppress(OSError, RuntimeError):  # a font that matplotlib cannot read
                fonts.addfont(path)
        installed = {font.name for font in fonts.ttflist}
    return [name for name in CJK_FONTS if name in installed]


def plot_style():
    """Context in which every plot is drawn: fonts that have Chinese where some are installed, pale lines."""
    from matplotlib import rc_context

    fonts = ["DejaVu Sans", *_chinese_fonts()]
    style = {"font.family": fonts, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    grey = {"text.color": "#333", "axes.edgecolor": "#999", "xtick.color": "#555", "ytick.color": "#555"}
    return rc_context(style | grey)


def save_figure(figure, path=None, **options) -> bytes | Path:
    """A matplotlib figure as PNG: bytes, or written to `path`, which is returned. options: of `Figure.savefig`."""
    png = io.BytesIO()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure.savefig(png, format="png", dpi=160, **options)
    if any("missing from font" in str(warning.message) for warning in said):
        print(
            "a plot holds characters of no installed font; for Chinese install one such as Noto Sans CJK",
            file=sys.stderr,
        )
    return png.getvalue() if path is None else write_atomic(path, png.getvalue())


def plain(text: str) -> str:
    """A text that matplotlib draws as it stands: a dollar sign would start a formula, control characters are boxes."""
    return "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")


def curves_figure(history: list[dict], keys: dict[str, str], path=None) -> bytes | Path:
    """Curves of a run as PNG: bytes, or written to `path`, which is returned.

    history: rows of metrics.jsonl, each with "step" and any of the keys; keys: {key: label}. After
    a resume a step may stand twice: the later row counts. Sparse curves (evaluations) get a marker
    per point, dense ones (training loss) a smoothed line over the pale raw one. Raises ValueError
    where no row has any of the keys.
    """
    from matplotlib.figure import Figure  # draws with Agg and keeps no global state, unlike pyplot

    panels: dict[str, list] = {}
    for key, label in keys.items():
        rows = [row for row in history if row.get("step") is not None and _is_number(row.get(key))]
        points = {row["step"]: row[key] for row in rows if math.isfinite(row[key])}
        if points:
            panels.setdefault(_panel(key), []).append((label, *np.array(sorted(points.items()), float).T))
    if not panels:
        raise ValueError(f"no row of the history has a number for any of {', '.join(keys)}")

    with plot_style():
        across = len(panels) if len(panels) <= 3 else 2
        down, width = -(-len(panels) // across), 3.4 if across == 3 else 4.4
        figure = Figure(figsize=(1 + width * across, 3.2 * down), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for place, (name, curves) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(down, across, place)
            for colour, (label, steps, values) in zip(COLOURS * len(curves), curves):
                label = plain(label)
                if len(values) <= 40:
                    axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
                    continue
                noisy = "learning_rate" not in name
                axes.plot(steps, values, color=colour, alpha=0.25 if noisy else 1, linewidth=0.8 if noisy else 1.6)
                shown = _smooth(values, max(2, len(values) / 50)) if noisy else values
                axes.plot(steps, shown, color=colour, linewidth=1.8, label=label)
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
            axes.set_xlabel("step", color="#555")
            axes.set_title(plain(curves[0][0]) if len(curves) == 1 else name, loc="left", fontsize=11)
            if len(curves) > 1:
                axes.legend(frameon=False, fontsize=9)
        return save_figure(figure, path)


def confusion_figure(counts: np.ndarray, labels: list[str], path=None, title: str = "") -> bytes | Path:
    """Confusion matrix (C, C), rows the truth and columns the answer, as PNG; shades are shares of a row."""
    from matplotlib.figure import Figure

    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.2, 0.34 * len(labels) + 2.2)
    with plot_style():
        figure = Figure(figsize=(side + 0.6, side), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.argwhere(counts > 0):
            dark = shares[row, column] > 0.55
            axes.text(
                column, row, counts[row, column], ha="center", va="center", fontsize=7, color="w" if dark else "#333"
            )
        names = [plain(label) for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(labels)), names, fontsize=8)
        axes.tick_params(length=0)
        axes.set_xlabel("answer", color="#555")
        axes.set_ylabel("truth", color="#555")
        axes.set_title(plain(title), loc="left", fontsize=11)
        figure.colorbar(drawn, ax=axes, fraction=0.04, label="share of the row")
        return save_figure(figure, path)


def contact_sheet(rows: list[tuple[str, list[dict]]], path=None) -> bytes | Path:
    """Pictures with a few lines below each, under headings, as one PNG.

    rows: [(heading, [{"rgb": (H, W, 3) uint8 or None, "lines": [text]}])]; more than five pictures run on below."""
    from matplotlib.figure import Figure

    columns = max(1, min(5, max((len(items) for _, items in rows), default=1)))
    lines = []  # (heading or "", up to `columns` items)
    for heading, items in rows:
        parts = [items[start : start + columns] for start in range(0, len(items), columns)] or [[]]
        lines += [(heading if n == 0 else "", part) for n, part in enumerate(parts)]
    with plot_style():
        height = 2.75 * len(lines) + 0.1  # inches
        figure = Figure(figsize=(2.1 * columns + 0.2, height), facecolor="white")
        grid = {"left": 0.02, "right": 0.98, "top": 1 - 0.32 / height, "bottom": 0.5 / height}
        places = figure.subplots(
            len(lines), columns, squeeze=False, gridspec_kw=grid | {"wspace": 0.06, "hspace": 0.38}
        )
        for axes_row, (heading, items) in zip(places, lines):
            for axes in axes_row:
                axes.set_axis_off()
                axes.set_anchor("N")
            axes_row[0].set_title(plain(_cut(heading, 30 * columns)), fontsize=10.5, loc="left", pad=7)
            for axes, item in zip(axes_row, items):
                if item["rgb"] is not None:
                    axes.imshow(item["rgb"], aspect="equal")
                text = "\n".join(plain(_cut(line, 34, start=n > 0)) for n, line in enumerate(item["lines"]))
                axes.text(
                    0, -0.03, text, transform=axes.transAxes, va="top", fontsize=7.5, linespacing=1.4, color="#555"
                )
        return save_figure(figure, path)


def curves_section(history: list[dict], keys: dict[str, str]) -> list[tuple[str, str]]:
    """`curves_figure` as a section of a page; none where no row has any of the keys."""
    if not any(key in row for row in history for key in keys):
        return []
    return [("Curves", figure_html(curves_figure(history, keys), "training curves"))]


def figure_html(png: bytes, alt: str) -> str:
    """A plot for a section, from PNG bytes. All share one scale, and on a phone they scroll sideways before their text gets
    too small to read."""
    width = int.from_bytes(png[16:20], "big")  # pixels, from the PNG header
    size = f'style="width:{width * 0.65:.0f}px;min-width:{width * 0.4:.0f}px"'
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return f'<div class="scroll"><img class="plot" src="{source}" alt="{html.escape(alt)}" {size}></div>'


# ---------------------------------------------------------------------------------------------
# Tables


def _formatter(values: list):
    """-> a function from a value of this column to text. One number of decimals for the whole
    column, so that the points line up: four significant digits of its largest value."""
    parts = [v for value in values for v in (value if isinstance(value, tuple | list) else [value])]
    sizes = [abs(v) for v in parts if _is_number(v) and math.isfinite(v)]
    largest = max(sizes, default=0)
    digits = min(4, max(1, 3 - math.floor(math.log10(max(largest, 0.1)))))
    form = ".2e" if 0 < largest < 1e-3 else f".{digits}f"

    def text(value) -> str:
        if value is None:
            return "–"
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        if isinstance(value, tuple | list):
            return "[" + ", ".join(text(v) for v in value) + "]"
        if not _is_number(value) or isinstance(value, numbers.Integral) or not math.isfinite(value):
            return str(value)
        return format(value, ".2e" if 0 < abs(value) < 0.5 * 10**-digits else form)

    return text


def _cells(rows: list[dict], columns: dict[str, str]) -> dict[str, tuple[list[str], bool]]:
    """{key: (text of each row, whether the column reads as numbers)}"""
    cells = {}
    for key in columns:
        values = [row.get(key) for row in rows]
        text = _formatter(values)
        numeric = [all(map(_is_number, v if isinstance(v, tuple | list) else [v])) for v in values if v is not None]
        cells[key] = ([text(value) for value in values], bool(numeric) and all(numeric))
    return cells


def table_html(rows: list[dict], columns: dict[str, str], best: dict[str, str] | None = None) -> str:
    """columns: {key: heading}, in order. best: {key: "max" or "min"}: the best number of that column
    is bold, all of them where they tie. A missing value is a dash; (low, high) reads [low, high]."""
    winners = {}
    for key, way in (best or {}).items():
        if way not in ("max", "min"):
            raise ValueError(f'best[{key!r}]: expected "max" or "min", got {way!r}')
        values = [row[key] for row in rows if _is_number(row.get(key)) and not math.isnan(row[key])]
        if values:
            winners[key] = max(values) if way == "max" else min(values)
    cells = _cells(rows, columns)
    kind = {key: ' class="n"' if numeric else "" for key, (_, numeric) in cells.items()}
    lines = ["".join(f"<th{kind[key]}>{html.escape(str(heading))}</th>" for key, heading in columns.items())]
    for index, row in enumerate(rows):
        line = ""
        for key in columns:
            text = html.escape(cells[key][0][index])
            wins = key in winners and _is_number(row.get(key)) and row[key] == winners[key]
            line += f"<td{kind[key]}>{f'<strong>{text}</strong>' if wins else text}</td>"
        lines.append(line)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines[1:])
    return f'<div class="scroll"><table><thead><tr>{lines[0]}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _width(text: str) -> int:
    """Terminal columns: Chinese characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def span_text(low_high) -> str:
    """An interval of scores: "0.712 to 0.755"."""
    return f"{low_high[0]:.3f} to {low_high[1]:.3f}"


def p_text(p: float) -> str:
    """A p value: "= 0.031", "< 0.0001"."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"


def table_text(rows: list[dict], columns: dict[str, str]) -> str:
    """The same table for a terminal. Control characters (a caption may hold any) become spaces."""
    lines: list[list[str]] = [[] for _ in range(len(rows) + 2)]
    for key, (texts, numeric) in _cells(rows, columns).items():
        column = ["".join(c if c.isprintable() else " " for c in text) for text in [str(columns[key]), *texts]]
        width = max(map(_width, column))
        column = [" " * (width - _width(t)) + t if numeric else t + " " * (width - _width(t)) for t in column]
        for line, text in zip(lines, [column[0], "-" * width, *column[1:]]):
            line.append(text)
    return "\n".join("  ".join(line).rstrip() for line in lines)


# ---------------------------------------------------------------------------------------------
# Pictures


def thumbnail(rgb: np.ndarray, side: int = 224) -> str:
    """(H, W, 3) uint8 -> data URI of a JPEG whose longer side is at most `side` pixels."""
    from PIL import Image

    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"thumbnail: expected (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")
    picture, jpeg = Image.fromarray(rgb), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(jpeg, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def _source(image: str) -> str:
    """An `src` that keeps the page self-contained: a picture as data URI."""
    if not image.startswith("data:image/"):
        raise ValueError(f"image {image[:80]!r}: expected a data URI (see `thumbnail`)")
    return html.escape(image)


def _mark(right: bool | None) -> str:
    """Right and wrong differ by sign and spoken label too, not by colour alone."""
    if right is None:
        return '<span class="mark"></span>'
    sign, word = ("✓", "right") if right else ("✗", "wrong")
    return f'<span class="mark {word}" role="img" aria-label="{word}">{sign}</span>'


def gallery_html(items: list[dict]) -> str:
    """Cards with a picture and its ranked texts.

    item: `image` (data URI or path relative to the page), `title`, `good` (True, False or None),
    `lines`: [(text, score or None, is_correct: True, False or None)]. Bars share one scale over the
    gallery and start at zero: a negative score's bar grows to the left of it.
    """
    scores = [line[1] for item in items for line in item.get("lines", ()) if line[1] is not None]
    scores = [float(score) for score in scores if math.isfinite(score)]
    low, high = min([0.0, *scores]), max([0.0, *scores])
    span = (high - low) or 1.0
    cards = []
    for item in items:
        lines = ""
        for text, score, correct in item.get("lines", ()):
            number = bar = ""
            if score is not None:
                number = f'<span class="score">{score:.3f}</span>'
            if score is not None and math.isfinite(score):
                left, width = (min(score, 0.0) - low) / span, abs(score) / span
                bar = f'<span class="bar"><i style="margin-left:{left:.1%};width:{width:.1%}"></i></span>'
            kind = ' class="correct"' if correct else ""
            lines += f'<li{kind}>{_mark(correct)}<span class="text">{html.escape(str(text))}</span>{number}{bar}</li>\n'
        badge = ""
        if item.get("good") is not None:
            badge = (
                '<span class="badge right">✓ right</span>'
                if item["good"]
                else '<span class="badge wrong">✗ wrong</span>'
            )
        title = html.escape(str(item.get("title", "")))
        cards.append(
            f'<figure class="card"><img src="{_source(item["image"])}" alt="{title}" loading="lazy">'
            f'<figcaption><div class="title"><b>{title}</b>{badge}</div>\n<ol>{lines}</ol></figcaption></figure>'
        )
    return f'<div class="gallery">{"".join(cards)}</div>'


# ---------------------------------------------------------------------------------------------
# Answers before and after

FLIPS = {"gained": "wrong before, right after", "lost": "right before, wrong after",
         "wrong": "wrong both times", "right": "right both times"}  # fmt: skip
_FLIP_LABELS = {flip: flip if flip in ("gained", "lost") else f"{flip} twice" for flip in FLIPS}


def sample_rows(scenes, right, **answers: list[list[str]]) -> list[dict]:
    """One row per question: id, image, type, question, truth, what was said before it, and of each model its answer and
    whether it is right.

    scenes: objects with `image` and `questions` (`scenes.QuestionScene`); answers: {name: answers to each scene's
    questions}; right(answer, truth, type) -> bool (`metrics.is_right`)."""
    listed = [(scene.image, question) for scene in scenes for question in scene.questions]
    rows = [
        {"id": q.id, "image_path": image, "type": q.kind or "question", "question": q.text, "truth": q.answer}
        | ({"history": history} if (history := getattr(q, "history", ())) else {})
        for image, q in listed
    ]
    for name, made in answers.items():
        for row, (_, question), said in zip(rows, listed, [text for texts in made for text in texts]):
            row[name], row[f"{name}_right"] = said, right(said, question.answer, question.kind)
    return rows


def flip_of(sample: dict) -> str:
    """Which of `FLIPS` a sample with `before_right` and `after_right` is."""
    if sample["before_right"] == sample["after_right"]:
        return "right" if sample["after_right"] else "wrong"
    return "gained" if sample["after_right"] else "lost"


def flips_by_type(samples: list[dict]) -> tuple[list[dict], dict[str, str]]:
    """(rows, columns) of a table: samples of each type by flip, and accuracy before and after; of several types the
    last row is all of them."""
    columns = {"type": "type", "questions": "questions", "before": "before", "after": "after"} | _FLIP_LABELS
    kinds = {kind: [sample for sample in samples if sample["type"] == kind] for kind in _kinds(samples)}
    rows = []
    for name, chosen in [*kinds.items(), *([("all", samples)] if len(kinds) > 1 else [])]:
        counts = {flip: sum(flip_of(sample) == flip for sample in chosen) for flip in FLIPS}
        shares = {key: sum(sample[f"{key}_right"] for sample in chosen) / len(chosen) for key in ("before", "after")}
        rows.append({"type": name, "questions": len(chosen)} | shares | counts)
    return rows, columns


def _kinds(samples: list[dict]) -> list[str]:
    return sorted({sample["type"] for sample in samples})


def in_turn(items: list, group, image, seed: int = 0) -> list:
    """The items in a seeded random order that takes one of each group in turn, and of a group one of each image before
    a second of any: the start of it shows much. group(item), image(item): what an item belongs to."""
    groups: dict = {}
    for item in random.Random(seed).sample(items, len(items)):
        groups.setdefault(group(item), {}).setdefault(image(item), []).append(item)

    def turns(queues):
        return [item for turn in itertools.zip_longest(*queues, fillvalue=turns) for item in turn if item is not turns]

    return turns([turns(images.values()) for images in groups.values()])


def varied(samples: list[dict], number: int) -> list[dict]:
    """At most `number` samples, in the order given, of every type and every flip and of many images."""
    order = in_turn(
        range(len(samples)), lambda i: (samples[i]["type"], flip_of(samples[i])), lambda i: samples[i]["image_path"]
    )
    return [samples[i] for i in sorted(order[:number])]


def samples_text(samples: list[dict], width: int = 120) -> str:
    """A table of samples for a terminal of `width` columns: the longest texts are cut, an image's name at its start."""
    columns = {key: key for key in ("image", "type", "question", "truth", "before", "after")}
    rows = []
    for sample in samples:
        row = {"image": Path(sample["image_path"]).name}
        row |= {key: str(sample[key]) or "–" for key in ("type", "question", "truth")}
        row |= {key: f"{'✓' if sample[f'{key}_right'] else '✗'} {sample[key] or '–'}" for key in ("before", "after")}
        rows.append({key: "".join(c if c.isprintable() else " " for c in text) for key, text in row.items()})
    widths = {key: max(_width(text) for text in [key, *(row[key] for row in rows)]) for key in columns}
    while sum(widths.values()) + 2 * (len(columns) - 1) > width and max(widths.values()) > 6:
        widths[max(widths, key=widths.get)] -= 1
    rows = [{key: _cut(text, widths[key], key == "image") for key, text in row.items()} for row in rows]
    return table_text(rows, {key: _cut(key, widths[key]) for key in columns})


def _cut(text: str, width: int, start: bool = False) -> str:
    """`text` in at most `width` terminal columns, with a … where it was cut: at its end, or at its start."""
    if _width(text) <= width:
        return text
    kept = ""
    for c in reversed(text) if start else text:
        if _width(kept + c) > width - 1:
            break
        kept += c
    return f"…{kept[::-1]}" if start else f"{kept}…"


def samples_html(samples: list[dict], picture) -> str:
    """Pictures with the questions about them, the truth, and the answers before and after, with buttons that choose by
    type and by flip. picture(path) -> (H, W, 3) uint8, or a data URI of `thumbnail`; it is called once an image. The
    choice is made by style rules, without a script."""
    if not samples:
        return "<p>No samples.</p>"
    # A type may be any text: its number names the style class. Flips are classes of the page's own.
    number = {kind: f"k{i}" for i, kind in enumerate(_kinds(samples))}
    place = [(number[sample["type"]], f"f-{flip_of(sample)}") for sample in samples]
    groups = {
        "kind": ("type", {key: (kind, "") for kind, key in number.items()}),
        "flip": ("answers", {f"f-{flip}": (_FLIP_LABELS[flip], text) for flip, text in FLIPS.items()}),
    }
    rules, choices = [], ""
    for group, (title, options) in groups.items():
        buttons = ""
        for key, (label, hint) in [("all", ("all", "")), *options.items()]:
            count = len(place) if key == "all" else sum(key in keys for keys in place)
            if not count:
                continue
            buttons += (
                f'<label{f" title={_quoted(hint)}" if hint else ""}><input type="radio" name="{group}" '
                f'id="{group}-{key}"{" checked" if key == "all" else ""}>{html.escape(str(label))} <i>{count}</i></label>'
            )
            if key != "all":
                hidden = f"li.qa:not(.{key}),.card:not(:has(.qa.{key}))"
                rules.append(f"body:has(#{group}-{key}:checked) :is({hidden}){{display:none}}")
        choices += f'<div class="choose" role="radiogroup" aria-label="{title}"><b>{title}</b>{buttons}</div>'
    for kind in number.values():  # a card may have both, but not in one question
        for flip in sorted({flip for _, flip in place}):
            both = f"body:has(#kind-{kind}:checked):has(#flip-{flip}:checked)"
            rules.append(f"{both} .card:not(:has(.qa.{kind}.{flip})){{display:none}}")
            if (kind, flip) not in place:
                rules.append(f"{both} .none{{display:block}}")
    cards: dict[str, str] = {}
    for sample, (kind, flip) in zip(samples, place):
        said = f"<dt>truth</dt><dd>{_mark(None)}<b>{html.escape(str(sample['truth']))}</b></dd>"
        for key in ("before", "after", "blind"):
            if key in sample:
                text = html.escape(str(sample[key])) or "–"
                said += f"<dt>{key}</dt><dd>{_mark(sample[f'{key}_right'])}<span>{text}</span></dd>"
        tag = flip[2:] if flip in ("f-gained", "f-lost") else ""
        tags = f'<span class="kind">{html.escape(str(sample["type"]))}</span>'
        tags += f'<span class="badge {tag}">{tag}</span>' if tag else ""
        before = "".join(f"{question} {answer} → " for question, answer in sample.get("history", ()))
        asked = html.escape(before + str(sample["question"]))
        cards.setdefault(sample["image_path"], "")
        cards[sample["image_path"]] += (
            f'<li class="qa {kind} {flip}"><div class="tags">{tags}</div><p>{asked}</p><dl>{said}</dl></li>\n'
        )
    figures = ""
    for path, lines in cards.items():
        shown, name = picture(path), html.escape(Path(path).name)
        source = _source(shown if isinstance(shown, str) else thumbnail(shown, 320))
        figures += (
            f'<figure class="card"><img src="{source}" alt="{name}" loading="lazy"><figcaption>'
            f'<div class="title"><b title={_quoted(path)}>{name}</b></div>\n<ol>{lines}</ol></figcaption></figure>'
        )
    none = '<p class="none">No sample of this type has such answers.</p>'
    return f'<style>{"".join(rules)}</style>{choices}{none}<div class="gallery answers">{figures}</div>'


# ---------------------------------------------------------------------------------------------
# Captions


def caption_sections(rows: list[dict], picture, number: int = 12) -> list[tuple[str, str]]:
    """Sections of a page: the `number` best and worst captions by CIDEr, or the first ones where there is no score.

    row: image, caption, and references and CIDEr where they are known; of a dialogue also prompt, history and before, the
    answer without training, and then an image is shown once among the best and once among the worst.
    picture(path) -> (H, W, 3) uint8."""

    def cards(chosen):
        items = []
        for row in chosen:
            lines = [(Path(row["image"]).name, row.get("CIDEr"), None)]
            if "history" in row:
                turns = [*row["history"], (row["prompt"], "?")]
                lines += [(f"{question} … {answer}", None, None) for question, answer in turns]
                lines.append((f"adapter off: {row['before']}", None, None))
            lines += [(text, None, None) for text in row.get("references", ())]
            items.append({"image": thumbnail(picture(row["image"])), "title": row["caption"], "lines": lines})
        return gallery_html(items)

    if not rows or "CIDEr" not in rows[0]:
        return [("Captions", cards(rows[: 2 * number]))]
    ranked = sorted(rows, key=lambda row: -row["CIDEr"])
    best = _first_of_each_image(ranked)[:number]
    worst = [row for row in _first_of_each_image(ranked[::-1]) if row not in best][:number]
    note = "<p>The caption; the file and the caption's CIDEr; the references.</p>"
    if "history" in rows[0]:
        note = (
            "<p>The answer; the file and the answer's CIDEr; the turns before it; without the adapter; the truth.</p>"
        )
    return [("Best", note + cards(best))] + ([("Worst", note + cards(worst))] if worst else [])


def _first_of_each_image(rows: list[dict]) -> list[dict]:
    found: dict[str, dict] = {}
    for row in rows:
        found.setdefault(row["image"], row)
    return list(found.values())


def _quoted(text: str) -> str:
    return f'"{html.escape(str(text))}"'


# ---------------------------------------------------------------------------------------------
# Pages

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --dim: #646b75; --line: #dfe2e6; --paper: #fff; --card: #f7f8f9;
  --bar: #88a5c4; --right: #1d7044; --wrong: #b03a2e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --dim: #9aa2ad; --line: #343a42; --paper: #16191d;
  --card: #1e2227; --bar: #5f83a8; --right: #63c48d; --wrong: #ef8a7d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
  sans-serif; overflow-wrap: break-word; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; font-weight: 650; }
h2 { margin: 2.75rem 0 .9rem; font-size: 1.15rem; font-weight: 650; }
p { max-width: 44rem; } .subtitle { margin: .4rem 0 0; color: var(--dim); }
code, pre { font: .875em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; } pre { overflow-x: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .4rem 1.4rem .4rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 500; vertical-align: bottom; } th:last-child, td:last-child { padding-right: 0; }
td:first-child { min-width: 9rem; } .n { text-align: right; } td.n { white-space: nowrap; }
.plot { display: block; max-width: 100%; height: auto; margin: .5rem 0; background: #fff; border-radius: 6px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18.5rem), 1fr)); gap: 1.25rem; }
.card { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; background: var(--card); }
.card img { display: block; width: 100%; aspect-ratio: 4 / 3; object-fit: contain; background: var(--line); }
figcaption { padding: .7rem .9rem .9rem; font-size: .875rem; line-height: 1.4; }
.title { display: flex; justify-content: space-between; align-items: baseline; gap: .75rem; margin-bottom: .5rem; }
.title b { font-weight: 600; min-width: 0; } .badge { white-space: nowrap; font-weight: 600; font-size: .8rem; }
ol { list-style: none; margin: 0; padding: 0; }
li { display: grid; grid-template-columns: 1.3em 1fr auto; column-gap: .3em; padding: .28rem 0; color: var(--dim); }
li.correct { color: var(--ink); font-weight: 550; } .text { min-width: 0; }
.score { padding-left: .6em; font-variant-numeric: tabular-nums; }
.bar { grid-column: 2 / -1; height: 3px; margin-top: .25rem; border-radius: 2px; background: var(--line); }
.bar i { display: block; height: 100%; min-width: 1px; border-radius: 2px; background: var(--bar); }
.choose { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem; margin: .5rem 0; font-size: .875rem; }
.choose b { min-width: 4.5rem; font-weight: 500; color: var(--dim); } .choose i { font-style: normal; opacity: .65; }
.choose label { position: relative; padding: .15rem .7rem; border: 1px solid var(--line); border-radius: 1rem; cursor: pointer; }
.choose input { position: absolute; opacity: 0; } .choose label:hover { border-color: var(--dim); }
.choose label:has(:checked) { border-color: var(--ink); background: var(--ink); color: var(--paper); }
.choose label:has(:focus-visible) { outline: 2px solid var(--bar); outline-offset: 2px; }
.answers { align-items: start; margin-top: 1.25rem; } .none { display: none; color: var(--dim); }
.answers img { aspect-ratio: 1; }
li.qa { display: block; color: var(--ink); padding: .6rem 0; border-top: 1px solid var(--line); }
li.qa:last-child { padding-bottom: 0; } .qa p { margin: .1rem 0 .3rem; font-weight: 550; }
.tags { display: flex; justify-content: space-between; color: var(--dim); font-size: .8rem; }
.badge.gained { color: var(--right); } .badge.lost, .qa .mark.wrong { color: var(--wrong); }
.qa dl { display: grid; grid-template-columns: 3.6em 1fr; margin: 0; } .qa dt { color: var(--dim); }
.qa dd { display: grid; grid-template-columns: 1.3em minmax(0, 1fr); margin: 0; min-width: 0; } .qa b { font-weight: 550; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; } .two img { aspect-ratio: 1; }
.two small { display: block; padding: .3rem .9rem 0; color: var(--dim); }
.correct .bar i { background: var(--right); } .right { color: var(--right); } .badge.wrong { color: var(--wrong); }
"""


def page(title: str, sections: list[tuple[str, str]], path, subtitle: str = "") -> Path:
    """Write an HTML page. sections: [(heading, HTML fragment)]: headings are escaped, fragments are
    taken as they are, from the functions above or with data passed through `html.escape`."""
    body = "\n".join(f"<section>\n<h2>{html.escape(heading)}</h2>\n{part}\n</section>" for heading, part in sections)
    under = f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else ""
    return write_atomic(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1>{under}</header>\n{body}\n</body>\n</html>\n",
    )
