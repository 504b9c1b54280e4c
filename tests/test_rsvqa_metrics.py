"""The RSVQA part of metrics.py: readings by table, scores by an independent slow implementation."""

import json
import math
import random
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import metrics
from metrics import bucket, majority_answers, mcnemar, normalise_answer, rsvqa_scores

DATA = Path(__file__).parents[2] / "shared" / "data"
KINDS = ("presence", "comp", "count", "rural_urban", "area", None)

# ---------------------------------------------------------------------------------------------
# What an answer says

ANY = {  # of every type
    "  Rural\n": "rural",
    "ＹＥＳ": "yes",
    '"Yes."': "yes",
    "“no”": "no",
    "**no**": "no",
    "No!": "no",
    "1,234": "1234",
    "1,234,567": "1234567",
    "12,34": "12,34",
    "1,2345": "1,2345",
    "34 m²": "34m2",
    "34m^2": "34m2",
    "34 M2.": "34m2",
    "34 ㎡": "34m2",
    "34 square meters": "34m2",
    "1 square metre": "1m2",
    "34 sq. m": "34m2",
    "1,234 sqm": "1234m2",
    "zero square meters": "0m2",
    "zero": "0",
    "Twelve.": "12",
    "twenty": "20",
    "twenty-one": "twenty-one",
    "十二": "12",
    "两架。": "2",
    "12 座": "12",
    "37平方米": "37m2",
    "十二平方米": "12m2",
    "二十一平方米": "二十一平方米",
    "三只": "3",
    "三到四个": "三到四个",
    "一百个": "一百个",
    "3²": "3^2",  # NFKC alone would say 32
    "between 11 and 100": "between 11 and 100",
    "More than 1,000": "more than 1000",
    "Between 10 m² and 100 m²": "between 10m2 and 100m2",
    "more than 1000 m2": "more than 1000m2",
    "urban": "urban",
    "none": "none",
    "None.": "none",
    "nothing": "nothing",
    "not sure": "not sure",
    "Not rural, not urban": "not rural, not urban",
    "north": "north",
    "unknown": "unknown",
    "nope": "nope",
    "no-one": "no-one",
    "no one": "no one",
    "no idea": "no idea",
    "yesterday": "yesterday",
    "yes or no": "yes or no",
    "yes/no": "yes/no",
    "№": "#",  # NFKC alone would say no
    "nº": "n°",
    "eyes": "eyes",
    "": "",
    " ?! ": "",
}
BY_KIND = {
    (None, "presence", "comp", "some new type"): {
        "Yes, there is a road.": "yes",
        "yes there is": "yes",
        "No, there are no roads": "no",
        "No - it is a field": "no",
        "no water area": "no",
        "No. 5": "no. 5",
        "No. of roads: 5": "no. of roads: 5",
        "There is no road": "there is no road",
        "Nothing, no": "nothing, no",
    },
    ("rural_urban",): {
        "It is an Urban area.": "urban",
        "Rural, a rural area": "rural",
        "It is a rural area with urban parts": "it is a rural area with urban parts",
        "It is not urban": "it is not urban",
        "It isn’t rural.": "it isn’t rural",
        "suburban": "suburban",
        "semi-urban": "semi-urban",
        "urbanised": "urbanised",
        "Yes.": "yes",
        "yes, certainly": "yes, certainly",
    },
    ("count",): {
        "There are 4 buildings.": "4",
        "There are four buildings.": "4",
        "Four (4)": "4",
        "Yes, about 1,204 of them": "1204",
        "Number of roads:12": "12",
        "The count is equal to 0.": "0",
        "007": "7",
        "000": "0",
        "4.0": "4",
        "There are no buildings": "there are no buildings",
        "no buildings": "no buildings",
        "0 buildings": "0",
        "4 buildings and 3 roads": "4 buildings and 3 roads",
        "3-4 roads": "3-4 roads",
        "-5": "-5",
        "There are 4.5 roads": "there are 4.5 roads",
        "20k": "20k",
        "50%": "50%",
        "10+": "10+",
        "5 +": "5 +",
        "> 1000": "> 1000",
        "≥ 10 roads": "≥ 10 roads",
        "minus 5": "minus 5",
        "<4": "<4",
        "more than 10 roads": "more than 10 roads",
        "at least four": "at least four",
        "up to 9 roads": "up to 9 roads",
        "4 or more": "4 or more",
        "no one is here": "no one is here",
        "There are one hundred roads": "there are one hundred roads",
        "twenty-one roads": "twenty-one roads",
        "1.2.3": "1.2.3",
        "1,5 roads": "1,5 roads",
        "between 11 and 100 roads": "between 11 and 100 roads",
        "34 m2": "34m2",
        "several": "several",
    },
    ("area",): {
        "The area is 34 m².": "34m2",
        "About 1,234.50 square meters": "1234.5m2",
        "0034m2": "34m2",
        "34": "34",
        "34 m": "34 m",
        "34 km2": "34 km2",
        "34 km²": "34 km^2",
        "10² m²": "10^2m2",
        "The 4 buildings cover 34 m2": "the 4 buildings cover 34m2",
        "10 m2 to 20 m2": "10m2 to 20m2",
        "one hundred square meters": "one hundred square meters",
        "twenty one square meters": "twenty 1m2",  # two numbers, so neither is read
        "more than 10 m2 of water": "more than 10m2 of water",
        "1 234 m2": "1 234m2",
        "-5 m2": "-5m2",
    },
}
ROWS = [(kind, text, said) for text, said in ANY.items() for kind in KINDS]
ROWS += [(kind, text, said) for kinds, table in BY_KIND.items() for kind in kinds for text, said in table.items()]


@pytest.mark.parametrize("kind", [*KINDS, "some new type"])
def test_normalise_answer_by_table(kind):
    wrong = {text: normalise_answer(text, kind) for k, text, said in ROWS if k == kind}
    assert wrong == {text: said for k, text, said in ROWS if k == kind}


def test_kind_is_optional_and_only_text_is_read():
    assert normalise_answer("Yes, there is a road.") == "yes"
    for bad in (None, 4, True, b"yes", ["yes"]):
        with pytest.raises(ValueError, match="text: expected a string, got"):
            normalise_answer(bad)
        with pytest.raises(ValueError, match="text: expected a string, got"):
            bucket(bad, "count")


PLAIN = (
    "yes no not none urban rural zero four twenty-one hundred between and more than 1000 10 0 007 1,234 1,23 3.50 or"
)
ODD = """. , ; ? ! - – ' " ’ “ ( ) / % + ^ ² ½ № ㎡ ｍ２ m2 m^2 m square meters sq. of İ ß ﬁ ¨ ٣ 四 😀"""
PIECES = [*PLAIN.split(), *ODD.split(), "", " ", "\t", "\n", "\0", "\u0308", "\u00a0", "\u2028", "\u200b", "\ud800"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_never_crash_and_are_read_the_same_twice(kind):
    rng = random.Random(str(kind))
    for trial in range(1500):
        if trial % 3:
            text = "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randrange(8)))
        else:
            text = "".join(chr(rng.randrange(0x3000 if trial % 2 else 0x110000)) for _ in range(rng.randrange(12)))
        said = normalise_answer(text, kind)
        assert normalise_answer(said, kind) == said, repr(text)
        group = bucket(text, kind)
        assert group == text or kind in ("count", "area"), repr(text)
        assert bucket(group, kind) == group, repr(text)
    for long in ("9" * 100_000, "0" * 100_000 + "x", "1,111" * 20_000, "no " * 30_000, "m2 " * 30_000):
        bucket(long, kind)


# ---------------------------------------------------------------------------------------------
# The paper's classes


def test_bucket_edges_of_counts():
    edges = {0: "0", 1: 1, 10: 1, 11: 2, 100: 2, 101: 3, 1000: 3, 1001: 4, 10**400: 4}
    names = ["0", "between 1 and 10", "between 11 and 100", "between 101 and 1000", "more than 1000"]
    for value, place in edges.items():
        assert bucket(str(value), "count") == (names[place] if isinstance(place, int) else place), value
    assert bucket("There are 1,200 roads.", "count") == "more than 1000"
    assert [bucket(name.upper(), "count") for name in names] == names
    assert [bucket(f"between {r}", "count") for r in ("0 and 10", "10 and 100", "100 and 1000")] == names[1:4]


def test_bucket_edges_of_areas():
    names = ["0m2", "between 0m2 and 10m2", "between 10m2 and 100m2", "between 100m2 and 1000m2", "more than 1000m2"]
    edges = {
        "0": 0,
        "0.0": 0,
        "0.5": 1,
        "1": 1,
        "10": 1,
        "10.5": 2,
        "11": 2,
        "100": 2,
        "101": 3,
        "1000": 3,
        "1000.1": 4,
    }
    for value, place in edges.items():
        assert bucket(f"{value} m²", "area") == names[place], value
    assert [bucket(name, "area") for name in names] == names
    assert bucket("between 11m2 and 100m2", "area") == bucket("between 10 and 100 m2", "area") == names[2]


def test_bucket_leaves_the_rest_unchanged():
    for kind, text in [
        ("presence", "Yes, 4."),
        ("comp", "12"),
        (None, "12"),
        ("rural_urban", "It is urban"),
        ("count", "Many."),
        ("count", "12m2"),
        ("count", "4.5"),
        ("count", "between 12 and 100"),
        ("count", "between 10m2 and 100m2"),
        ("count", "more than 100"),
        ("area", "12"),
        ("area", "between 10 and 100"),
        ("area", "-3m2"),
    ]:
        assert bucket(text, kind) == text


# ---------------------------------------------------------------------------------------------
# Scores


def drawn_answers(seed, images=12, kinds=("presence", "count", "area", "rural_urban", "comp")):
    """Random questions of plain spelling, right about half the time; the first image asks of one type only."""
    rng = random.Random(seed)
    choices = {
        "presence": ["yes", "no"],
        "comp": ["yes", "no"],
        "rural_urban": ["rural", "urban"],
        "count": ["0", "1", "9", "11", "57", "101", "more than 1000", "2078", "many"],
        "area": ["0m2", "3m2", "28m2", "30m2", "10623m2", "10632m2", "between 10m2 and 100m2"],
    }
    rows = []
    for i in range(images):
        for _ in range(rng.randrange(1, 9)):
            kind = rng.choice(kinds if i else kinds[:1])
            truth = rng.choice([c for c in choices[kind] if c != "many"])
            rows.append((truth if rng.random() < 0.4 else rng.choice(choices[kind]), truth, kind, ("image", i)))
    return [list(column) for column in zip(*rows)]


def slow_class(text, kind):
    number, unit = text.removesuffix("m2"), "m2" * (kind == "area")
    if kind not in ("count", "area") or not number.isdigit():
        return text
    value, step = int(number), kind == "count"
    if value == 0:
        return f"0{unit}"
    for low, high in ((0, 10), (10, 100), (100, 1000)):
        if value <= high:
            return f"between {low + step}{unit} and {high}{unit}"
    return f"more than 1000{unit}"


def slow_scores(rows):
    """Independent: plain Python over (answer, truth, kind, image) rows. -> {(protocol, name): value}"""
    out = {}

    def areas(text, kind):
        return slow_class(text, kind) if kind == "area" else text

    for protocol, read in (("exact", lambda text, kind: text), ("areas", areas), ("bucketed", slow_class)):
        right = [(kind, read(a, kind) == read(t, kind)) for a, t, kind, _ in rows]
        for suffix, part in (("", right), ("_closed", [r for r in right if r[0] not in ("count", "area")])):
            by_type = {k: [r for kind, r in part if kind == k] for k in {kind for kind, _ in part}}
            means = {k: sum(v) / len(v) for k, v in by_type.items()}
            if part:
                out[protocol, f"micro{suffix}"] = sum(r for _, r in part) / len(part)
                out[protocol, f"macro{suffix}"] = sum(means.values()) / len(means)
            if not suffix:
                out |= {(protocol, k): v for k, v in means.items()}
    errors = [abs(int(a) - int(t)) for a, t, kind, _ in rows if kind == "count" and a.isdigit() and t.isdigit()]
    if errors:
        out["count_mae"] = sum(errors) / len(errors)
        out["count_mae_share"] = len(errors) / sum(kind == "count" and t.isdigit() for _, t, kind, _ in rows)
    return out


def flat(scores):
    """The result in the keys of `slow_scores`: -> values, intervals."""
    values, intervals = {}, {}
    for protocol in metrics.PROTOCOLS:
        for name in ("micro", "macro", "micro_closed", "macro_closed"):
            values[protocol, name] = scores[protocol][name]
            intervals[protocol, name] = scores[protocol][f"{name}_interval"]
        for kind, entry in scores[protocol]["types"].items():
            values[protocol, kind], intervals[protocol, kind] = entry["accuracy"], entry["interval"]
    values |= {name: scores[name] for name in ("count_mae", "count_mae_share")}
    return values, intervals | {"count_mae": scores["count_mae_interval"]}


@pytest.mark.parametrize("seed", range(10))
def test_scores_equal_an_independent_implementation(seed):
    columns = drawn_answers(seed, images=30)
    rows = list(zip(*columns))
    got = rsvqa_scores(*columns, samples=20)
    assert flat(got)[0] == pytest.approx(slow_scores(rows))
    assert (got["questions"], got["images"]) == (len(rows), 30)
    for protocol in metrics.PROTOCOLS:
        kinds = zip(*columns[:3])
        right = [metrics.is_right(answer, truth, kind, protocol) for answer, truth, kind in kinds]
        assert sum(right) / len(right) == pytest.approx(got[protocol]["micro"])
        assert {k: e["count"] for k, e in got[protocol]["types"].items()} == Counter(columns[2])
        assert list(got[protocol]["types"]) == sorted(set(columns[2]))
    assert got["exact"]["micro"] <= got["areas"]["micro"] <= got["bucketed"]["micro"]
    assert got["exact"]["micro_closed"] == got["bucketed"]["micro_closed"]


def test_a_truth_that_says_more_than_no_is_asked_for_whole():
    """Classes of other sets: "no damage" is not "no trees", nor "Yes, 5 ships" "Yes, 2 ships", and "no" says no class."""
    truths = ["no damage"] * 4 + ["no"] * 2 + ["Yes, 5 ships."] * 2
    answers = ["No damage.", "no", "no trees", "damage", "No trees", "no, none", "yes, 5 ships", "Yes, 2 ships"]
    right = [True, False, False, False, True, True, True, False]
    for kind in ("presence", "damage", "comp"):
        assert [metrics.is_right(a, t, kind) for a, t in zip(answers, truths)] == right
        assert rsvqa_scores(answers, truths, [kind] * 8, range(8), samples=9)["exact"]["micro"] == 0.5
    known = metrics.majority_answers(["no damage", "no damage", "no trees", "yes"], ["state"] * 4)
    assert known["state"] == "no damage" and metrics.is_right(known["state"], "No damage", "state")


def test_intervals_equal_a_plain_resampling_of_images():
    """With 10 images a type is often absent from a resample: both leave it out of that macro mean."""
    columns = drawn_answers(3, images=10)
    rows = list(zip(*columns))
    by_image = [[r for r in rows if r[3] == image] for image in dict.fromkeys(columns[3])]
    rng, draws = random.Random(0), []
    for _ in range(2500):
        draws.append(slow_scores([r for part in rng.choices(by_image, k=len(by_image)) for r in part]))
    _, intervals = flat(rsvqa_scores(*columns, samples=2500))
    for name, interval in intervals.items():
        seen = np.array([draw[name] for draw in draws if name in draw])
        for bound, level in zip(interval, (0.025, 0.975)):  # few values are possible, so compare shares, not bounds
            below, up_to = (seen < bound - 1e-9).mean(), (seen <= bound + 1e-9).mean()
            assert below - 0.012 <= level <= up_to + 0.012, (name, bound)
        assert interval[0] < interval[1], name


@pytest.mark.parametrize("answers, value", [("right", 1.0), ("wrong", 0.0)])
def test_all_right_and_all_wrong(answers, value):
    _, truths, kinds, images = drawn_answers(1)
    got = rsvqa_scores(truths if answers == "right" else ["nothing"] * len(truths), truths, kinds, images, samples=50)
    values, intervals = flat(got)
    maes = {name: values.pop(name) for name in ("count_mae", "count_mae_share")}
    mae_interval = intervals.pop("count_mae")
    assert set(values.values()) == {value} and set(intervals.values()) == {(value, value)}
    if answers == "right":
        assert maes == {"count_mae": 0.0, "count_mae_share": 1.0} and mae_interval == (0.0, 0.0)
    else:
        assert maes == {"count_mae": None, "count_mae_share": 0.0} and mae_interval is None


def test_one_image_has_intervals_of_no_width():
    answers, truths, kinds, _ = drawn_answers(2)
    values, intervals = flat(rsvqa_scores(answers, truths, kinds, [0] * len(answers), samples=50))
    for name, (low, high) in intervals.items():
        assert low == high == pytest.approx(values[name]), name


def test_answers_are_read_before_they_are_compared_and_a_truth_may_be_a_class():
    got = rsvqa_scores(
        ["Yes, there is.", "There are 57 of them.", "28 m²", "None", "It is urban."],
        ["yes", "between 10 and 100", "between 10m2 and 100m2", "no", "urban"],
        ["presence", "count", "area", "comp", "rural_urban"],
        [0, 0, 1, 1, 1],
    )
    right = {p: {k: e["accuracy"] for k, e in got[p]["types"].items()} for p in ("exact", "bucketed")}
    assert right["exact"] == {"presence": 1, "count": 0, "area": 0, "comp": 0, "rural_urban": 1}
    assert right["bucketed"] == {"presence": 1, "count": 1, "area": 1, "comp": 0, "rural_urban": 1}
    assert got["count_mae"] is got["count_mae_share"] is got["count_mae_interval"] is None


def test_without_closed_questions_the_closed_scores_are_none():
    got = rsvqa_scores(["1", "2m2"], ["1", "3m2"], ["count", "area"], ["a", "b"])
    for protocol, area in (("exact", 0.0), ("bucketed", 1.0)):
        for name in ("micro_closed", "macro_closed", "micro_closed_interval", "macro_closed_interval"):
            assert got[protocol][name] is None
        assert got[protocol]["macro"] == (1 + area) / 2
    assert got["exact"]["types"]["count"]["interval"] == (1.0, 1.0)


def test_count_mae_by_hand():
    answers = ["3", "There are 10.", "many", "7", "1" * 16, "5", "4"]
    truths = ["5", "10", "2", "between 1 and 10", "11", "9", "1"]
    kinds = ["count"] * 5 + ["presence", "count"]
    got = rsvqa_scores(answers, truths, kinds, ["a", "a", "b", "b", "c", "c", "d"])
    assert got["count_mae"] == (2 + 0 + 3) / 3  # "many" and a number of 16 digits are no numbers
    assert got["count_mae_share"] == 3 / 5  # the class is no number and presence is no count
    assert got["count_mae_interval"] == (1.0, 3.0)  # a (2 + 0 of 2) and d (3 of 1) are the extremes


def test_a_type_on_one_image_of_many_gives_no_nan():
    """rural_urban is absent from 1/e of the resamples: left out there, and its interval has no width."""
    answers, truths = ["yes", "no", "no", "yes"] * 10, ["yes"] * 40
    kinds, images = ["presence"] * 39 + ["rural_urban"], list(range(40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = rsvqa_scores(answers, truths, kinds, images)["exact"]
        rare = rsvqa_scores(answers[-2:], truths[-2:], kinds[-2:], [0, 1], samples=1, seed=0)["exact"]
    assert got["types"]["rural_urban"]["interval"] == (1.0, 1.0)
    low, high = got["macro_interval"]
    assert low < 0.5 and 0.75 < high < 0.9 and got["macro"] == pytest.approx((19 / 39 + 1) / 2)
    assert {rare["types"][k]["interval"] for k in rare["types"]} == {(0.0, 0.0), (1.0, 1.0)}  # one has no resample


def test_intervals_cover_a_known_truth_as_often_as_they_say():
    """60 images, each with its own difficulty; the truth is the mean over difficulties."""
    rng = np.random.default_rng(0)
    kinds, names, trials = ["presence", "presence", "presence", "comp", "count"], ["micro", "macro"], 250
    truth = {"micro": (3 * 0.6 + 0.6 + 0.3) / 5, "macro": (0.6 + 0.6 + 0.3) / 3}
    covered = Counter()
    for trial in range(trials):
        easy = rng.beta(1.2, 0.8, (60, 1))  # mean 0.6; the counts are right half as often
        right = rng.random((60, 5)) < easy * [1, 1, 1, 1, 0.5]
        answers = ["1" if r else "0" for r in right.ravel()]
        got = rsvqa_scores(answers, ["1"] * 300, kinds * 60, np.repeat(np.arange(60), 5), seed=trial, samples=300)
        for name in names:
            low, high = got["exact"][f"{name}_interval"]
            covered[name] += low <= truth[name] <= high
    for name in names:
        assert 0.90 <= covered[name] / trials <= 0.985, covered


def test_scores_are_repeatable_and_ids_go_by_value():
    columns = drawn_answers(5)
    assert rsvqa_scores(*columns, seed=1) == rsvqa_scores(*columns, seed=1)
    assert rsvqa_scores(*columns, seed=1) != rsvqa_scores(*columns, seed=2)
    numbers = [i for _, i in columns[3]]
    want = rsvqa_scores(*columns)
    torch = pytest.importorskip("torch")
    for ids in (numbers, np.array(numbers), torch.tensor(numbers), list(torch.tensor(numbers))):
        assert rsvqa_scores(*columns[:3], ids) == want


def test_what_cannot_be_scored_is_refused_with_a_reason():
    for pattern, call in {
        r"answers, truths, kinds, images: expected equal lengths of at least 1, got \[0, 0, 0, 0\]": (
            lambda: rsvqa_scores([], [], [], [])
        ),
        r"got \[2, 1, 1, 1\]": lambda: rsvqa_scores(["a", "b"], ["a"], ["comp"], [0]),
        r"got \[1, 1, 1, 2\]": lambda: rsvqa_scores(["a"], ["a"], ["comp"], [0, 1]),
        "answers: expected strings, got int at 1": lambda: rsvqa_scores(["a", 4], ["a", "4"], ["comp"] * 2, [0, 1]),
        "truths: expected strings, got NoneType at 0": lambda: rsvqa_scores(["a"], [None], ["comp"], [0]),
        "kinds: expected strings, got NoneType at 0": lambda: rsvqa_scores(["a"], ["a"], [None], [0]),
        "images: expected ids": lambda: rsvqa_scores(["a"], ["a"], ["comp"], [[0]]),
        "samples:": lambda: rsvqa_scores(["a"], ["a"], ["comp"], [0], samples=0),
        "before: expected true or false, got 2": lambda: mcnemar([2], [1]),
        "after: expected a non-empty": lambda: mcnemar([1], []),
        r"before, after, images: expected equal lengths of at least 1, got \[1, 2, 1\]": lambda: mcnemar([1], [1, 0]),
        r"got \[1, 1, 2\]": lambda: mcnemar([1], [1], [0, 1]),
        "answers, kinds: expected equal lengths": lambda: majority_answers([], []),
        r"got \[1, 2\]": lambda: majority_answers(["a"], ["b", "c"]),
        "answers: expected strings, got float at 0": lambda: majority_answers([1.0], ["count"]),
    }.items():
        with pytest.raises(ValueError, match=pattern):
            call()


# ---------------------------------------------------------------------------------------------
# Before and after


def pairs(gained, lost, both=0, neither=0):
    return [0] * gained + [1] * lost + [1] * both + [0] * neither, [1] * gained + [0] * lost + [1] * both + [
        0
    ] * neither


@pytest.mark.parametrize(
    "gained, lost, p",
    [
        (10, 2, 0.03857421875),  # 2 (1 + 12 + 66) / 4096
        (2, 10, 0.03857421875),
        (5, 0, 0.0625),
        (0, 6, 0.03125),
        (3, 1, 0.625),  # 2 (1 + 4) / 16
        (4, 4, 1.0),
        (1, 0, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_by_hand(gained, lost, p):
    got = mcnemar(*pairs(gained, lost, both=7, neither=4))
    assert (got["gained"], got["lost"]) == (gained, lost)
    assert got["p"] == pytest.approx(p, rel=1e-12)
    assert got["difference"] == pytest.approx((gained - lost) / (gained + lost + 11))


@pytest.mark.parametrize("gained, lost", [(1033, 967), (700, 1300), (40, 2)])
def test_mcnemar_equals_whole_numbers(gained, lost):
    total, fewer = gained + lost, min(gained, lost)
    exact = Fraction(2 * sum(math.comb(total, i) for i in range(fewer + 1)), 2**total)
    assert mcnemar(*pairs(gained, lost))["p"] == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("gained, lost", [(50_000, 50_000), (50_300, 49_700), (51_000, 49_000), (100_000, 0)])
def test_mcnemar_of_many_pairs_follows_the_normal_law(gained, lost):
    got = mcnemar(*pairs(gained, lost), images=[i % 50 for i in range(gained + lost)])
    z = max(0, abs(gained - lost) - 1) / math.sqrt(gained + lost)  # with the continuity correction
    assert got["p"] == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01, abs=1e-300)


def test_mcnemar_interval_resamples_images():
    """50 images of 20 equal questions, of which 15 gain and 5 lose: 50 facts, not 1000."""
    before, after = (np.repeat(np.array(x, bool), 20) for x in pairs(15, 5, both=20, neither=10))
    image = [("image", i // 20) for i in range(1000)]
    by_image, by_question = mcnemar(before, after, image), mcnemar(before, after)
    assert by_image["difference"] == by_question["difference"] == pytest.approx(0.2)
    spread = math.sqrt(20 / 50 - 0.2**2)
    for got, facts in ((by_image, 50), (by_question, 1000)):
        low, high = got["difference_interval"]
        assert high - low == pytest.approx(2 * 1.96 * spread / math.sqrt(facts), rel=0.15)
    assert by_image["p"] == by_question["p"] < 1e-9
    assert mcnemar(before, after, image, seed=1)["difference_interval"] != by_image["difference_interval"]


# ---------------------------------------------------------------------------------------------
# The majority


def test_majority_answers():
    answers = ["Yes.", "no", "yes", "yes, a road", "0", "zero", "3", "urban", "rural", "No", "no"]
    kinds = ["presence"] * 4 + ["count"] * 3 + ["rural_urban"] * 2 + ["comp"] * 2
    got = majority_answers(answers, kinds)
    assert got == {"presence": "yes", "count": "0", "rural_urban": "rural", "comp": "no", None: "no"}
    assert got.get("area", got[None]) == "no"
    counts = ["0", "0", "0", "3", "4", "5", "6"]
    assert majority_answers(counts, ["count"] * 7)["count"] == "0"
    assert majority_answers([bucket(c, "count") for c in counts], ["count"] * 7)["count"] == "between 1 and 10"
    assert majority_answers(["b", "a", "b", "a"], ["comp"] * 4) == {"comp": "a", None: "a"}


# ---------------------------------------------------------------------------------------------
# Real answers


@pytest.mark.parametrize("name", ["rsvqa_lr", "rsvqa_hr"])
def test_real_answers_are_their_own_reading(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"real data ../shared/data/{name} is not here")
    questions = json.loads((DATA / name / "rsvqa_questions.json").read_text())["questions"]
    answers = {a["id"]: a["answer"] for a in json.loads((DATA / name / "rsvqa_answers.json").read_text())["answers"]}
    truths = [answers[q["answers_ids"][0]] for q in questions]
    kinds, images = [q["type"] for q in questions], [q["img_id"] for q in questions]
    assert [normalise_answer(t, k) for t, k in zip(truths, kinds)] == truths
    groups = Counter((k, bucket(t, k)) for t, k in zip(truths, kinds))
    assert groups == Counter((k, slow_class(t, k)) for t, k in zip(truths, kinds))
    assert rsvqa_scores(truths, truths, kinds, images, samples=50)["exact"]["micro_interval"] == (1.0, 1.0)

    majority = majority_answers(truths, kinds)
    got = rsvqa_scores([majority[k] for k in kinds], truths, kinds, images, samples=50)
    for kind, entry in got["exact"]["types"].items():
        asked = [t for t, k in zip(truths, kinds) if k == kind]
        assert entry["accuracy"] == max(Counter(asked).values()) / len(asked)
    assert got["bucketed"]["micro"] == got["exact"]["micro"]  # the majority is 0, and 0 is its own class
