"""Search a library of satellite and aerial images in plain words: index it once, then ask.

    python search.py index ./library --store ./library.index
    python search.py query --store ./library.index "a river winding through farmland" -k 10 --sheet out.png
    python search.py query --store ./library.index --like chip.tif --bbox 5 50 7 52 --from 2020-01-01 --geojson out.geojson
    python search.py classify --store ./library.index --labels ucm --truth folders --out classified/
    python search.py monitor --before ./2020.index --after ./2023.index --queries queries.txt --out change/
    python search.py landuse --store ./library.index --classes eurosat --regions districts.geojson --out landuse/
    python search.py recall --store ./library.index

A store is a folder, or the URL of a collection on a Qdrant server: http://host:6333/my_library. `--preset demo` uses the
scenes and the matcher of `make demo`. Exit code 0: done; 1: done, but some images could not be read; 2: nothing was done.
"""

import argparse
import colorsys
import contextlib
import html
import json
import os
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

import store
from config import (
    InputError,
    add_device_flags,
    processors,
    read_lines,
    refuse_outside,
    refuse_unwritable,
    refuse_unwritable_file,
    user_errors,
)
from store import Filter, attributes_of, first_moment, in_utc, last_moment

MODEL = "lcybuaa/Git-RSCLIP"
SHEET_MOST = 500  # pictures of a contact sheet: 17,000 pixels high, and 0.5 GB to draw
DEMO = {
    "model": "output/demo/best_model",
    "store": "output/demo_search/library.index",
    "library": "data/demo/images",
    "before": "output/demo_search/library.index",
    "after": "output/demo_search/after.index",
}
PALETTE = [  # apart from one another in hue and in lightness
    "#2563a8", "#e0a030", "#2f7d4f", "#c2562d", "#7a4fa3", "#3d8a94", "#b23a5e", "#8aa63a", "#6b5b4b", "#5aa9e6",
    "#f28e8e", "#1d4d4f", "#c9b1e0", "#9a7b1c", "#47b39c", "#d46ad4", "#7f7f7f", "#264027", "#ffcf56", "#88305f",
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# The command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="index|query|classify|monitor|landuse|recall"
    )

    def command(name, run, help, store=True):
        made = commands.add_parser(name, help=help, description=run.__doc__)
        made.set_defaults(run=run)
        made.add_argument(
            "--preset", default="full", choices=["full", "demo"], help="demo: the scenes and matcher of make demo"
        )
        if store:
            made.add_argument("--store", help="folder of the index, or URL of a collection on a Qdrant server")
        made.add_argument("--model", help=f"towers (default: those of the index; of a new one {MODEL})")
        made.add_argument("--base_model", help="folder of a matcher's base, if it is not where it was in training")
        add_device_flags(made)
        return made

    def limits(made):
        made.add_argument(
            "--bbox", nargs=4, type=float, metavar=("W", "S", "E", "N"),
            help="box in degrees, which the box around an image's footprint touches",
        )  # fmt: skip
        made.add_argument(
            "--from", dest="start", metavar="DATE", help="taken then or later: 2020-01-01, 2020-01 or 2020"
        )
        made.add_argument(
            "--to", dest="end", metavar="DATE", help="taken then or earlier: to the end of a day, month or year"
        )
        made.add_argument(
            "--where", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
            help="attributes, such as folder=harbour",
        )  # fmt: skip
        made.add_argument("--library", help="folder of the images, if it has moved since")

    make = command("index", run_index, "make an index, or bring it up to date")
    make.add_argument("library", nargs="?", help="folder of images, of any depth")
    make.add_argument(
        "--only", nargs="+", metavar="PATTERN",
        help="only images whose name, or path below the folder, is such as '*_TCI_10m.jp2'; later runs keep it ('*': all)",
    )  # fmt: skip
    make.add_argument("--tile", type=int, help="pixels; larger images are cut into such tiles (0: never; default: 256)")
    make.add_argument("--stride", type=int, help="pixels from tile to tile (default: 3/4 of a tile)")
    # An index that is there keeps its tiles, bands and stretch: they need not be given again.
    make.add_argument("--bands", help="red, green and blue: auto, numbers such as 4,3,2, or a sensor such as sentinel2")
    make.add_argument(
        "--stretch", choices=["auto", "percentile", "reflectance", "none"], help="how values become 8 bits"
    )
    make.add_argument(
        "--reflectance", type=float, nargs=2, metavar=("BLACK", "WHITE"), help="values of --stretch reflectance"
    )
    make.add_argument("--nodata", type=float, help="value without data that a file does not tag")
    make.add_argument(
        "--max_pixels",
        type=int,
        help="most pixels of a trusted file decoded at once (default: 67 million); an index keeps the largest it was given",
    )
    make.add_argument(
        "--attributes",
        metavar="CSV",
        help="image's path below the library first, then columns to filter by; a later run without it keeps them",
    )
    make.add_argument("--workers", type=int, help="processes that read ahead (default: all cores but one, at most 16)")
    make.add_argument("--batch_size", type=int, default=32, help="tiles encoded at once (default: 32)")
    make.add_argument("--moved", action="store_true", help="the library is the same as before in another place")

    ask = command("query", run_query, "find images by words, by a picture, or both")
    ask.add_argument("words", nargs="*", help="what to look for; several ways to say it are averaged")
    ask.add_argument("-k", type=int, default=10, help="how many to find (default: 10)")
    ask.add_argument("--each", action="store_true", help="each of the words is a query of its own")
    ask.add_argument(
        "--not", dest="without", nargs="+", action="extend", default=[], metavar="WORDS", help="what it should not look like",
    )  # fmt: skip
    ask.add_argument("--not_weight", type=float, default=0.5, help="how much that counts (default: 0.5)")
    ask.add_argument(
        "--like", nargs="+", action="extend", default=[], metavar="IMAGE", help="pictures of what to look for"
    )
    ask.add_argument("--like_weight", type=float, default=0.5, help="0: words alone, 1: pictures alone (default: 0.5)")
    ask.add_argument("--template", help='prompt around the words, such as "a satellite image of {}" (default: several)')
    ask.add_argument("--season", choices=["spring", "summer", "autumn", "winter"], help="added to the words")
    ask.add_argument("--weather", choices=["clear", "cloudy", "hazy", "snowy"], help="added to the words")
    limits(ask)
    ask.add_argument("--exact", action="store_true", help="compare with every vector instead of walking the graph")
    ask.add_argument("--neighbours", action="store_true", help="keep tiles that overlap a better one")
    for kind, what in (("json", "results"), ("csv", "results"), ("geojson", "footprints, for QGIS")):
        ask.add_argument(f"--{kind}", metavar="FILE", help=f"{what} as {kind}; - for standard output")
    ask.add_argument("--sheet", metavar="PNG", help="contact sheet of the pictures found")

    sort = command("classify", run_classify, "zero-shot classes of all images")
    sort.add_argument(
        "--labels", help="labels between commas, ucm, aid, eurosat, resisc45, or JSON of {label: [phrases]}"
    )
    sort.add_argument("--truth", help="CSV of path,label, or `folders`: each image's folder is its class")
    sort.add_argument("--template", help="prompt around each phrase (default: several)")
    sort.add_argument("--out", help="folder for predictions.csv, scores.json and confusion.png")
    limits(sort)

    watch = command("monitor", run_monitor, "what changed between two dates", store=False)
    watch.add_argument("--before", help="index of the earlier images")
    watch.add_argument("--after", help="index of the later images, by the same model")
    watch.add_argument("--queries", help="text file, what to watch for, one a line")
    watch.add_argument("--out", help="folder for changes.csv, changes.geojson and a page with pictures")
    watch.add_argument("-k", type=int, default=8, help="places shown for each query (default: 8)")
    watch.add_argument("--threshold", type=float, help="spreads of the unchanged that make a change (default: 3)")
    watch.add_argument(
        "--alike", type=int, default=32, help="like places that judge a change (default: 32; 0: all places)"
    )
    watch.add_argument(
        "--no_reference", action="store_true",
        help="judge the whole change of a query's score, not what exceeds the mean change of 21 other words (airport, beach ...)",
    )  # fmt: skip
    watch.add_argument("--min_overlap", type=float, default=0.5, help="least intersection over union of matched tiles")

    use = command("landuse", run_landuse, "shares of classes by count and by ground area")
    use.add_argument("--classes", help="as --labels of classify")
    use.add_argument("--regions", help="GeoJSON of polygons: also by region")
    use.add_argument("--template", help="prompt around each phrase (default: several)")
    use.add_argument("--out", help="folder for landuse.json, .csv, .geojson, plots and page")
    limits(use)

    check = command("recall", run_recall, "how much the graph finds of what is there")
    check.add_argument("-k", type=int, default=10, help="how many nearest are compared (default: 10)")
    check.add_argument("--queries", help="text file of queries, one a line (default: pictures of the index)")
    check.add_argument("--number", type=int, default=200, help="pictures tried (default: 200)")
    return parser


def need(args, *names: str) -> None:
    """Fill in the demo's defaults. Raises InputError where one of `names` was not given."""
    for name in names:
        if args.preset == "demo" and getattr(args, name) is None and name in DEMO:
            setattr(args, name, DEMO[name])
        if getattr(args, name) is None:
            raise InputError(f"{args.command} needs {'the folder of images' if name == 'library' else '--' + name}")


def open_library(args, location: str | None = None, encoder=None):
    store.refuse_absent(location or args.store)  # before torch is loaded
    from transformers.utils import logging

    from library import Library
    from model import pick_device

    logging.disable_progress_bar()
    device, dtype = pick_device(args.device, args.dtype)
    return Library.open(
        location or args.store, model=args.model, encoder=encoder, root=getattr(args, "library", None),
        base_model=args.base_model, device=device, dtype=dtype,
    )  # fmt: skip


def filter_of(args):
    """The `store.Filter` of the flags, or None."""
    attributes = attributes_of(args.where)
    first = args.start and in_utc(first_moment(args.start, "--from"))
    last = args.end and in_utc(last_moment(args.end, "--to"))
    if first and last and first > last:
        raise InputError(f"--from {args.start} is after --to {args.end}")
    made = Filter(bbox=args.bbox and tuple(args.bbox), start=args.start, end=args.end, attributes=attributes)
    return None if made == Filter() else made


def nothing_passes(library, limit) -> str:
    """What to say where `filter_of`'s filter lets nothing through: how much passes each part of it."""
    parts = {f"--where {name}": Filter(attributes={name: limit.attributes[name]}) for name in limit.attributes}
    if limit.bbox:
        parts["--bbox"] = Filter(bbox=limit.bbox)
    if limit.start or limit.end:
        parts["a date at all"] = Filter(start="1000-01-01")
        parts["--from/--to"] = Filter(start=limit.start, end=limit.end)
    counts = ", ".join(f"{name} {library.index.count(part)}" for name, part in parts.items())
    return f"no image of the index passes the filters (of {library.index.count()} vectors: {counts})"


def output_folder(path: str) -> Path:
    refuse_unwritable(path, "--out")
    return Path(path)


def put(target: str, text: str) -> None:
    """Write a text to a file, or to standard output for `-`."""
    from report import write_atomic

    if target == "-":
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"standard output is in {sys.stdout.encoding}, which has no {text[error.start]!a}: write to a file, or set"
                " PYTHONIOENCODING=utf-8"
            ) from None
        sys.stdout.write(text)
    else:
        write_atomic(target, text)
        print(f"-> {target}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------
# index


def run_index(args) -> int:
    """Encode the images of a folder and keep their vectors with place, time, path and window. A second run reads what is
    new or changed and takes out what is gone; a run that was cut short goes on."""
    need(args, "library", "store")
    refuse_outside(args, batch_size=(1, 4096), tile=(0, 1 << 16), workers=(0, 1024))
    each = processors() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of several GPUs
    workers = args.workers if args.workers is not None else max(1, min(16, each - 1))
    from transformers.utils import logging

    from accelerate import PartialState
    from library import index_library, read_attributes
    from model import DualEncoder, pick_device

    if not Path(args.library).is_dir():
        raise InputError(f"{args.library}: no such folder of images")
    if not store.is_url(args.store) and os.environ.get("RANK", "0") == "0":
        refuse_unwritable(args.store, "--store")
    attributes = read_attributes(args.attributes) if args.attributes else None
    if args.model is None:
        args.model = recorded_model(args.store) or (DEMO["model"] if args.preset == "demo" else MODEL)
    logging.disable_progress_bar()
    device, dtype = pick_device(args.device, args.dtype)
    # The first process plans, which takes as long as reading all files; NCCL would give up on it after ten minutes.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=1))
    if state.num_processes > 1:
        device = str(state.device)
    model = DualEncoder.from_pretrained(args.model, base_model=args.base_model, device=device, dtype=dtype)
    given = {name: getattr(args, name) for name in ("bands", "stretch", "reflectance", "nodata", "max_pixels")}
    changed = {name: value for name, value in given.items() if value is not None}
    report = index_library(
        model, args.library, args.store, tile=args.tile, stride=args.stride, settings=changed, only=args.only,
        attributes=attributes, workers=workers, batch_size=args.batch_size, moved=args.moved, progress=True,
    )  # fmt: skip
    if report is None:
        return 0
    say_indexed(report, args)
    list_unreadable(report.rejected, args.store)
    return 1 if report.rejected else 0


def say_indexed(report, args) -> None:
    cut = f" as {report.added} tiles" if report.added != report.files else ""
    speed = report.added / max(report.seconds, 1e-9)
    rate = f", {speed:.{0 if speed >= 10 else 1}f} {'tiles' if cut else 'images'}/s" if report.added else ""
    amended = f" ({report.amended} with other attributes)" if report.amended else ""
    renamed = f" {report.renamed} under a new name," if report.renamed else ""
    print(
        f"{report.files} files indexed{cut} ({report.updated} of them changed), {report.unchanged} unchanged{amended},"
        f"{renamed} {report.removed} removed; {report.total} vectors in {args.store} ({report.seconds:.1f} s{rate})"
    )
    if report.empty:
        print(f"{report.empty} tiles without data left out")
    for note in report.notes:
        print(note, file=sys.stderr)
    if report.blank:
        image = store.record_of(args.store)["image"]
        told = f"{report.blank} of {report.added} pictures are all black or white"
        if report.blank > report.added / 2:
            stretch = f"--stretch {image['stretch']}: give --stretch percentile, or a model trained on such files"
            print(f"{told} under {stretch}", file=sys.stderr)
        elif image["nodata"] is None:
            print(f"{told}: give --nodata 0 (or 255) if that is where a file holds no data", file=sys.stderr)
    if report.unknown:
        print(
            f"{args.attributes}: {len(report.unknown)} rows name no image there, first {report.unknown[0]!r}",
            file=sys.stderr,
        )


def list_unreadable(rejected: list, location: str) -> None:
    """Leave the files that could not be read in rejected.jsonl, and say how many there are."""
    from scenes import list_rejected

    listed = Path(location) / "rejected.jsonl"
    if store.is_url(location):  # in the current folder, under a name that is nobody else's
        listed = Path(f"{urlsplit(location).path.rstrip('/').rpartition('/')[2]}.rejected.jsonl")
    listed.unlink(missing_ok=True)  # an earlier run's
    if rejected:
        list_rejected(listed, rejected)
        print(f"{len(rejected)} files could not be read, listed in {listed}:", file=sys.stderr)
        for bad in rejected[:3]:
            print(f"  {bad.reason}", file=sys.stderr)


def recorded_model(location: str) -> str | None:
    """The towers that an index was made with; None where there is no index yet."""
    try:
        return store.record_of(location)["model"]
    except store.Missing:
        return None


# ----------------------------------------------------------------------------------------------------
# query


def run_query(args) -> int:
    """Find images by words, by pictures, or by both; less what is unwanted; within a box, a time, attributes."""
    need(args, "store")
    refuse_outside(args, k=(1, 10_000), like_weight=(0, 1), not_weight=(0, 10))
    if args.each and args.like:
        raise InputError("--each takes words alone, not --like")
    if not args.words and not args.like:
        raise InputError("query needs words, or --like with a picture")
    if any(not words.strip() for words in [*args.words, *args.without]):
        raise InputError("query: an empty text")
    limit = filter_of(args)
    for flag in ("json", "csv", "geojson", "sheet"):
        if getattr(args, flag) not in (None, "-"):
            refuse_unwritable_file(getattr(args, flag), f"--{flag}")
    if args.sheet == "-":
        raise InputError("--sheet -: a picture is no text; give a file")
    from imagery import read_rgb
    from library import RESULT, geojson, result_row
    from report import csv_text, json_to_print, table_text

    context = (args.season and f"in {args.season}", args.weather and f"{args.weather} weather")
    context = ", ".join(filter(None, context))
    with open_library(args) as library:
        like = [read_rgb(path, library.settings) for path in args.like]
        asked = [[words] for words in dict.fromkeys(args.words)] if args.each else [args.words]
        results = []
        for words in asked:
            vector = library.query(
                words, without=args.without, like=like, like_weight=args.like_weight, without_weight=args.not_weight,
                template=args.template, context=context,
            )  # fmt: skip
            hits = library.search(vector, args.k, filter=limit, exact=args.exact, neighbours=args.neighbours)
            title = " + ".join([*words, *(f"like {Path(path).name}" for path in args.like)])
            title += "".join(f" - {text}" for text in args.without)
            results.append((title, hits))
        if not any(hits for _, hits in results):
            print(f"nothing found: {nothing_passes(library, limit)}", file=sys.stderr)
        rows = [{"query": title} | result_row(rank, hit) for title, hits in results for rank, hit in enumerate(hits, 1)]
        quiet = "-" in (args.json, args.csv, args.geojson)
        if not quiet:
            columns = {
                "rank": "", "score": "score", "path": "image", "window": "window", "where": "lat, lon", "time": "time",
            }  # fmt: skip
            for title, _ in results:
                mine = [row for row in rows if row["query"] == title]
                filled = {key: name for key, name in columns.items() if any(row[key] is not None for row in mine)}
                print(f"{title}\n{table_text(mine, filled)}\n" if mine else f"{title}\n")
        if args.json:
            printed = args.json == "-"
            text = json_to_print(rows, 1) if printed else json.dumps(rows, ensure_ascii=False, indent=1)
            put(args.json, text + "\n")
        if args.csv:
            put(args.csv, csv_text(rows) if rows else ",".join(RESULT) + "\n")
        if args.geojson:
            put(args.geojson, geojson([hit.payload for _, hits in results for hit in hits], rows))
        if args.sheet:
            write_sheet(results, library, args.sheet)
    return 0


def write_sheet(results: list[tuple[str, list]], library, path: str) -> None:
    """A contact sheet of [(title, hits)]."""
    from report import contact_sheet

    most = max(1, SHEET_MOST // max(1, len(results)))
    if any(len(hits) > most for _, hits in results):
        print(f"the sheet shows the first {most}", file=sys.stderr)

    def item(rank, hit):
        lines = [f"{rank}. {hit.score:.3f}", label_of(hit.payload)]
        return {"rgb": picture_or_none(library, hit.payload), "lines": lines}

    contact_sheet([(title, [item(*ranked) for ranked in enumerate(hits[:most], 1)]) for title, hits in results], path)
    print(f"-> {path}", file=sys.stderr)


def label_of(payload: dict) -> str:
    return payload["path"] + (f" {tuple(payload['window'][:2])}" if payload["window"] else "")


def picture_or_none(library, payload: dict):
    """The picture of a hit; None, with a word on standard error, where its file is gone."""
    from imagery import ImageError

    try:
        return library.picture(payload, 384)
    except ImageError as error:
        print(f"no picture: {error}", file=sys.stderr)
        return None


# ----------------------------------------------------------------------------------------------------
# classify


def run_classify(args) -> int:
    """Give every image the class whose words fit best, without training (zero-shot). Tiles of one file are averaged. With
    --truth also accuracy and a confusion matrix."""
    need(args, "store", "labels")
    limit = filter_of(args)
    out = output_folder(args.out) if args.out else None
    from library import read_classes
    from report import csv_text, table_text, write_atomic, write_json

    classes = read_classes(args.labels)
    labels = list(classes)
    payloads, tile_scores = classified(args, classes, limit)
    names = list(dict.fromkeys(payload["path"] for payload in payloads))
    truth = read_truth(args.truth, labels, names) if args.truth else {}
    number = {name: n for n, name in enumerate(names)}
    owner = np.array([number[payload["path"]] for payload in payloads])
    scores = np.zeros((len(names), len(labels)))
    np.add.at(scores, owner, tile_scores)
    scores /= np.bincount(owner)[:, None]
    best = scores.argmax(1)
    counts = Counter(best.tolist())
    rows = [{"class": labels[c], "images": n, "share": n / len(names)} for c, n in counts.most_common()]
    print(f"{len(names)} images, {len(labels)} classes")
    print(table_text(rows, {"class": "class", "images": "images", "share": "share"}))
    result = {"images": len(names), "classes": {row["class"]: row["images"] for row in rows}}
    # A class may be called as a column is.
    columns = [f"{label} (class)" if label in ("path", "truth", "answer", "score") else label for label in labels]
    table = [
        {"path": name, "answer": labels[best[n]], "score": round(float(scores[n, best[n]]), 6)}
        | {column: round(float(scores[n, c]), 6) for c, column in enumerate(columns)}
        for n, name in enumerate(names)
    ]
    if args.truth:
        known = [n for n, name in enumerate(names) if name in truth]
        right = np.array([best[n] == truth[names[n]] for n in known])
        result |= accuracy(right, np.array([truth[names[n]] for n in known]), best[known], labels)
        low, high = result["interval"]
        print(
            f"\ntop-1 accuracy {result['top1']:.3f} ({low:.3f} to {high:.3f}) on {len(known)} images with a truth;"
            f" mean of the classes {result['macro']:.3f}"
        )
        for n, row in enumerate(table):
            table[n] = {"path": row["path"], "truth": labels[truth[row["path"]]] if row["path"] in truth else "", **row}
    if out:
        write_atomic(out / "predictions.csv", csv_text(table))
        if args.truth:
            from report import confusion_figure

            title = f"zero-shot classes: top-1 {result['top1']:.3f} of {result['with_truth']} images"
            confusion_figure(np.array(result["confusion"]), labels, out / "confusion.png", title)
        write_json(out / "scores.json", result)
        print(f"-> {out}", file=sys.stderr)
    return 0


def classified(args, classes: dict[str, list[str]], limit) -> tuple[list[dict], np.ndarray]:
    """(payloads, probabilities (N, C)) of all points that pass the filter. Raises InputError where none does."""
    with open_library(args) as library:
        payloads, vectors = library.everything(limit)
        if not payloads:
            raise InputError(f"{args.store}: {nothing_passes(library, limit)}")
        return payloads, library.classify(vectors, classes, args.template)


def read_truth(source: str, labels: list[str], names: list[str]) -> dict[str, int]:
    """{path: number of its class}; labels are compared without case, spaces, - and _. Raises InputError."""
    from library import below_library, read_by_image

    def key(label):
        return label.lower().replace(" ", "").replace("_", "").replace("-", "")

    number: dict[str, int] = {}
    for n, label in enumerate(labels):
        if (first := number.setdefault(key(label), n)) != n:
            raise InputError(f"--labels: {labels[first]!r} and {label!r} are one class to --truth; leave one out")
    known = set(names)
    if source == "folders":
        folders = {name: name.split("/")[-2::-1] for name in names if "/" in name}  # the nearest first
        # fMoW: airport/airport_0/airport_0_0_rgb.jpg
        pairs = [(name, next((f for f in above if key(f) in number), above[0])) for name, above in folders.items()]
        where = "the folders of the library"
    else:
        where = source
        (column,), rows = read_by_image(source, one_of=("label", "class", "category"))
        if not any(key(row.get(column, "")) in number for row in rows.values()):  # EuroSAT: Label 3, ClassName Highway
            with contextlib.suppress(InputError):
                (column,), rows = read_by_image(source, one_of=("classname", "class_name", "class"))
        pairs = [(below_library(name, known), row[column]) for name, row in rows.items() if column in row]
    truth, strange, elsewhere = {}, Counter(), []
    for name, label in pairs:
        if name not in known:
            elsewhere.append(name)
        elif key(label) in number:
            if truth.setdefault(name, number[key(label)]) != number[key(label)]:
                raise InputError(f"{where}: {name} has two labels, {labels[truth[name]]!r} and {label!r}")
        else:
            strange[label] += 1
    other = []
    if strange:
        other.append(f"{sum(strange.values())} images have a truth that is no label: {', '.join(sorted(strange)[:5])}")
    if elsewhere:
        other.append(
            f"{len(elsewhere)} rows name images that are not among those classified: {', '.join(elsewhere[:3])}; the index has"
            f" such as {names[0]}"
        )
    if not truth:
        found = f"no image of the index has a truth among {', '.join(labels[:5])} ..."
        raise InputError("; ".join([f"{where}: {found}", *other]))
    for line in other:
        print(f"{where}: {line}", file=sys.stderr)
    return truth


def accuracy(right: np.ndarray, truth: np.ndarray, answers: np.ndarray, labels: list[str]) -> dict:
    from metrics import bootstrap_interval

    confusion = np.zeros((len(labels), len(labels)), int)
    np.add.at(confusion, (truth, answers), 1)
    total = confusion.sum(1)
    recall = {label: float(confusion[n, n] / total[n]) for n, label in enumerate(labels) if total[n]}
    return {
        "with_truth": len(right), "top1": float(right.mean()), "interval": bootstrap_interval(right.astype(float)),
        "macro": float(np.mean(list(recall.values()))), "recall": recall, "confusion": confusion.tolist(),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# monitor


def run_monitor(args) -> int:
    """Compare two dates of the same places: for each query, where its score rose or fell by more than the season, the
    sensor and the light explain, which move the scores of like places alike."""
    need(args, "before", "after", "queries", "out")
    refuse_outside(args, k=(1, 1000), threshold=(0, 100), alike=(0, 100_000), min_overlap=(0.01, 1))
    out = output_folder(args.out)
    queries = read_lines(args.queries, "--queries", "queries")
    from library import CHANGE, geojson, match_places
    from report import csv_text, page, table_html, table_text, write_atomic

    threshold = CHANGE if args.threshold is None else args.threshold
    if Path(args.before).resolve() == Path(args.after).resolve():
        raise InputError(f"--before and --after are the same index: {args.before}")
    store.refuse_absent(args.before)
    store.refuse_absent(args.after)  # before the first one's model is loaded
    with open_library(args, args.before) as before, open_library(args, args.after, before.model) as after:
        pairs = match_places(before, after, args.min_overlap)
        for note in pairs.notes:
            print(f"note: {note}", file=sys.stderr)
        reference = None if args.no_reference else before.reference_vectors(queries)
        first, second, z = pairs.changes(before.text_vectors(queries), args.alike, reference)  # (Q, N) each
        rows = []
        for q, query in enumerate(queries):
            for n in np.argsort(-np.abs(z[q]), kind="stable"):
                a, b = pairs.before[n], pairs.after[n]
                rows.append(
                    {"query": query, "change": round(float(z[q, n]), 2), "before": round(float(first[q, n]), 4),
                     "after": round(float(second[q, n]), 4), "is_change": bool(abs(z[q, n]) >= threshold),
                     "path_before": a["path"], "path_after": b["path"], "window": a["window"] and ",".join(map(str, a["window"])),
                     "time_before": a["time"], "time_after": b["time"], "valid_before": a["extra"].get("valid", 1),
                     "valid_after": b["extra"].get("valid", 1), "pair": int(n)}
                )  # fmt: skip
        summary = []
        for q, query in enumerate(queries):
            up, down = int((z[q] >= threshold).sum()), int((z[q] <= -threshold).sum())
            summary.append({"query": query, "places": len(pairs.before), "more": up, "less": down})
        heads = {"query": "query", "places": "places", "more": "more of it", "less": "less of it"}
        print(table_text(summary, heads))
        shown = [row for row in rows if row["is_change"]]
        plain = [{key: value for key, value in row.items() if key != "pair"} for row in rows]
        changed = [row for row in plain if row["is_change"]]
        write_atomic(out / "changes.csv", csv_text(plain))
        write_atomic(out / "changes.geojson", geojson([pairs.before[row["pair"]] for row in shown], changed))
        sections = [("Summary", table_html(summary, heads) + "".join(f"<p>{html.escape(n)}</p>" for n in pairs.notes))]
        for query in queries:
            top = [row for row in shown if row["query"] == query][: args.k]
            sections.append((query, pairs_html(top, pairs, before, after) if top else "<p>No change.</p>"))
        under = f"{args.before} to {args.after}; numbers are spreads of unchanged places"
        if reference is not None:
            under += ", of what a score changed beyond the mean of other words: it may fall and still be more"
        page("Change", sections, out / "index.html", under)
    print(f"-> {out / 'index.html'}, changes.csv, changes.geojson", file=sys.stderr)
    return 0


def pairs_html(rows: list[dict], pairs, before, after) -> str:
    """Cards of before and after pictures side by side."""
    from report import thumbnail

    cards = []
    for row in rows:
        shown = []
        n = row["pair"]
        for library, payload in ((before, pairs.before[n]), (after, pairs.after[n])):
            rgb = picture_or_none(library, payload)
            image = f'<img src="{thumbnail(rgb)}" alt="{html.escape(label_of(payload))}">' if rgb is not None else ""
            shown.append(f"<div>{image}<small>{html.escape((payload['time'] or '')[:10])}</small></div>")
        sign = "more" if row["change"] > 0 else "less"
        cards.append(
            f'<figure class="card pair"><div class="two">{"".join(shown)}</div><figcaption><div class="title">'
            f"<b>{html.escape(label_of(pairs.before[n]))}</b>"
            f'<span class="badge">{sign}, {row["change"]:+.1f}</span></div>'
            f"score {row['before']:.3f} to {row['after']:.3f}</figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(cards)}</div>'


# ----------------------------------------------------------------------------------------------------
# landuse


def palette(number: int) -> list[str]:
    """That many different colours: PALETTE, then of many hues and lightnesses each time the one farthest from all before."""
    made = [[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in PALETTE[:number]]
    if number > len(PALETTE):
        hues = max(36, number)
        tones = [(0.3, 0.9), (0.4, 0.5), (0.5, 0.9), (0.6, 0.5), (0.7, 0.9), (0.8, 0.6)]  # lightness, saturation
        pool = np.array([colorsys.hls_to_rgb(n / hues, *tone) for n in range(hues) for tone in tones])
        pool = np.rint(255 * pool).astype(int)
        near = np.min([((pool - colour) ** 2).sum(1) for colour in made], axis=0)
        while len(made) < number:
            made.append(pool[near.argmax()].tolist())
            near = np.minimum(near, ((pool - made[-1]) ** 2).sum(1))
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in made]


def run_landuse(args) -> int:
    """Shares of classes over a library: of its images, and of the ground they cover in square kilometres, where
    overlapping tiles count once; map, chart and table, also by region."""
    need(args, "store", "classes", "out")
    limit = filter_of(args)
    out = output_folder(args.out)
    from library import geojson, read_classes
    from places import land_use_areas, map_figure, read_regions, shares_figure
    from report import csv_text, figure_html, page, table_html, table_text, write_atomic, write_json

    classes = read_classes(args.classes)
    labels = list(classes)
    regions = read_regions(args.regions) if args.regions else []
    for name in ("region", "all"):  # columns of the table by region
        if regions and name in labels:
            raise InputError(f"--classes {args.classes}: a class named {name!r} does not go with --regions; rename it")
    payloads, scores = classified(args, classes, limit)
    best = scores.argmax(1)
    counts = np.bincount(best, minlength=len(labels))
    placed = [n for n, payload in enumerate(payloads) if payload["extra"].get("polygon")]
    polygons = [payloads[n]["extra"]["polygon"] for n in placed]
    if regions and not placed:
        raise InputError(f"{args.store}: none of its images has a place, so there is nothing to cut by --regions")
    land = land_use_areas(polygons, scores[placed], [shape for _, shape in regions])
    total = land.areas.sum()
    rows = [
        {"class": label, "images": int(counts[c]), "share_of_images": counts[c] / counts.sum(), "km2": float(land.areas[c]),
         "share_of_area": float(land.areas[c] / total) if total else None}
        for c, label in enumerate(labels)
    ]  # fmt: skip
    rows.sort(key=lambda row: (-row["km2"], -row["images"]))
    heads = {"class": "class", "images": "images", "share_of_images": "share"}
    if placed:
        heads |= {"km2": "km2", "share_of_area": "share of area"}
    print(table_text(rows, heads))
    notes = [f"{len(payloads)} images or tiles, {total:.3f} km2 of ground"]
    if len(placed) < len(payloads):
        notes.append(f"{len(payloads) - len(placed)} of them have no georeference: they count as images, not as area")
    if partly := sum(payloads[n]["extra"].get("valid", 1) < 0.9 for n in placed):
        notes.append(f"{partly} tiles hold data on less than 90% of their area, which is counted whole")
    if land.lost:
        notes.append(
            f"{land.lost} tiles are too small beside a far larger one to count on its grid; index them apart (--only)"
        )
    print("; ".join(notes))
    by_region = [
        {"region": name, **dict(zip(labels, areas.tolist())), "all": float(areas.sum())}
        for (name, _), areas in zip(regions, land.by_region)
    ]
    used = [row["class"] for row in rows if row["images"]]
    region_heads = {"region": "region", **{label: label for label in used}, "all": "all"}
    if by_region and not any(row["all"] for row in by_region):
        print("no region meets an image: GeoJSON has longitude first, then latitude", file=sys.stderr)
    if by_region:
        print(f"\nkm2 by region\n{table_text(by_region, region_heads)}")
    colours = dict(zip(labels, palette(len(labels))))
    shares = shares_figure(counts, land.areas if placed else None, colours, out / "shares.png")
    said = f"<p>{html.escape('; '.join(notes))}</p>"
    sections = [("Shares", table_html(rows, heads) + said + figure_html(shares.read_bytes(), "shares"))]
    if placed:
        drawn = map_figure(polygons, [labels[best[n]] for n in placed], colours, out / "map.png")
        under = "<p>Every tile in the colour of its own class; where tiles lie over one another, the table takes their mean.</p>"
        sections.append(("Map", figure_html(drawn.read_bytes(), "map") + under))
    if by_region:
        sections.append(("Square kilometres by region", table_html(by_region, region_heads)))
    said = [
        {"path": payload["path"], "class": labels[best[n]], "score": round(float(scores[n, best[n]]), 4)}
        for n, payload in enumerate(payloads)
    ]
    write_atomic(out / "landuse.geojson", geojson(payloads, said))
    write_atomic(out / "landuse.csv", csv_text(rows))
    write_json(out / "landuse.json", {"classes": rows, "regions": by_region, "notes": notes})
    page("Land use", sections, out / "index.html", args.store)
    drawings = "map.png, shares.png" if placed else "shares.png"
    print(f"-> {out / 'index.html'}, landuse.csv, landuse.geojson, {drawings}", file=sys.stderr)
    return 0


# ----------------------------------------------------------------------------------------------------
# recall


def run_recall(args) -> int:
    """How much of the exact k nearest the graph finds, on this index: with pictures of it, or with your queries."""
    need(args, "store")
    refuse_outside(args, k=(1, 1000), number=(1, 100_000))
    if args.queries:
        with open_library(args) as library:
            vectors = library.text_vectors(read_lines(args.queries, "--queries", "queries"))
            value = library.index.recall(vectors, args.k)
    else:
        with store.open(args.store) as index:
            names = [name for name, _ in index.scroll(payload=["path"])]
            if not names:
                raise InputError(f"{args.store}: no image is in this index yet; run `python search.py index` again")
            chosen = np.random.default_rng(0).permutation(len(names))[: args.number]
            vectors = index.vectors([names[n] for n in chosen])
            value = index.recall(vectors, args.k)
    print(f"recall@{args.k} of the graph against exact search: {value:.4f} over {len(vectors)} queries")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
