"""How well `search.py monitor` finds known changes: average precision beside simpler rankings, and false alarms.

    python benchmarks/bench_monitor.py --before output/demo_search/library.index --after output/demo_search/after.index

The demo's second dates (demo_data.py) have another season, light and sensor gain everywhere; in three of five places objects
or a road also came or went (data/demo/changes.json). Three questions:

    any      which places changed at all? Each place is ranked by its largest score over all queries.
    kind     which (place, query) pairs changed, such as ships where ships came or went? Ranked by size.
    signed   the same, and in the right direction: more or less of it.

Rankings: monitor (the change, less that of reference words, against that of the places most alike before, in spreads), monitor
--alike 0 (against all places), monitor --no_reference (the whole change), raw (the difference of the scores), embedding (1 -
cosine of the two pictures), pixels (their mean absolute difference); the last two know no query. Chance is the share of what is
to be found. Besides: the mean over queries of the average precision of each ("by query"). A false alarm is a query with an
absolute score of 3 or more in a place that did not change. Intervals: bootstrap over places.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import InputError, user_errors
from library import CHANGE, Library, match_places
from report import span_text, table_text, write_json

QUERIES = {
    "building": "buildings", "vehicle": "vehicles", "aircraft": "aircraft", "ship": "ships", "tank": "storage tanks",
    "field": "sports fields", "pond": "ponds", "road": "a road",
}  # fmt: skip


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the precision at each true row, rows sorted by falling score; nan without a true row."""
    hits = labels[np.argsort(-scores, kind="stable")] > 0
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean()) if hits.any() else float("nan")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="output/demo_search/library.index", help="index of the first dates")
    parser.add_argument("--after", default="output/demo_search/after.index", help="index of the second dates")
    parser.add_argument("--changes", default="data/demo/changes.json", help="what changed, as demo_data.py writes it")
    parser.add_argument("--threshold", type=float, default=CHANGE, help="spreads above which it is an alarm")
    parser.add_argument("--samples", type=int, default=500, help="bootstrap samples")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    if not Path(args.changes).is_file():
        raise InputError(f"{args.changes}: no such file; run `make demo` first")
    known = {
        Path(row["image"]).name: row["changes"] for row in json.loads(Path(args.changes).read_text(encoding="utf-8"))
    }
    with Library.open(args.before) as before, Library.open(args.after, encoder=before.model) as after:
        pairs = match_places(before, after)
        words = before.text_vectors(list(QUERIES.values()))
        reference = before.reference_vectors(list(QUERIES.values()))
        first, second, judged = pairs.changes(words, reference=reference)  # (Q, N) each
        pictures = [(before.picture(a), after.picture(b)) for a, b in zip(pairs.before, pairs.after)]
    truth = np.zeros(first.shape)
    for n, payload in enumerate(pairs.before):
        for change in known[payload["path"]]:
            kind, _, what = change["kind"].rpartition("_")
            if kind in QUERIES:
                truth[list(QUERIES).index(kind), n] = -1 if what == "removed" else 1
    changed = np.array([bool(known[payload["path"]]) for payload in pairs.before])
    no_query = np.ones((len(QUERIES), 1))
    rankings = {
        "monitor": judged,
        "monitor --alike 0": pairs.changes(words, 0, reference)[2],
        "monitor --no_reference": pairs.changes(words)[2],
        "raw": second - first,
        "embedding": no_query * (1 - (pairs.before_vectors * pairs.after_vectors).sum(1)),
        "pixels": no_query * [np.abs(a.astype(float) - b).mean() for a, b in pictures],
    }

    def figures(scores, chosen):
        s, t = scores[:, chosen], truth[:, chosen]
        return {
            "any": average_precision(np.abs(s).max(0), changed[chosen]),
            "kind": average_precision(np.abs(s).ravel(), t.ravel() != 0),
            "query": np.nanmean([average_precision(np.abs(row), true != 0) for row, true in zip(s, t)]),
            "signed": average_precision(np.concatenate([s, -s]).ravel(), np.concatenate([t > 0, t < 0]).ravel()),
        }

    everyone, rng = np.arange(len(changed)), np.random.default_rng(0)
    draws = [rng.integers(0, len(changed), len(changed)) for _ in range(args.samples)]
    rows = []
    for name, scores in rankings.items():
        row = {"ranking": name, **figures(scores, everyone)}
        sampled = [figures(scores, chosen) for chosen in draws]
        for key in ("any", "kind", "query", "signed"):
            row[f"{key}_interval"] = np.nanpercentile([sample[key] for sample in sampled], [2.5, 97.5]).tolist()
        if name.startswith("monitor"):
            row["alarms"] = float((np.abs(scores[:, ~changed]) >= args.threshold).mean())
            row["found"] = float((np.abs(scores)[truth != 0] >= args.threshold).mean())
        if name in ("embedding", "pixels"):
            row |= {"signed": None, "signed_interval": None}
        rows.append(row)
    chance = {
        "any": changed.mean(), "kind": (truth != 0).mean(), "query": (truth != 0).mean(), "signed": (truth != 0).mean() / 2,
    }  # fmt: skip
    rows.append({"ranking": "chance"} | {key: float(value) for key, value in chance.items()})
    print(
        f"{len(changed)} places, {int(changed.sum())} changed; {int((truth != 0).sum())} of {truth.size} queries and places"
    )
    shown = [
        {**r, **{f"{k}_interval": span_text(r[f"{k}_interval"]) for k in chance if r.get(f"{k}_interval")}}
        for r in rows
    ]
    heads = {"ranking": "ranking", "any": "AP any", "any_interval": "95%", "kind": "AP kind", "kind_interval": "95%",
             "query": "by query", "query_interval": "95%",
             "signed": "AP signed", "signed_interval": "95%", "alarms": "false alarms", "found": "changes at 3"}  # fmt: skip
    print(table_text(shown, heads))
    if args.json:
        write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
