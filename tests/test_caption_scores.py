"""Caption scores against pycocoevalcap called directly; intervals against resampling done slowly."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import caption_scores
import report
from caption_scores import (
    BLEU,
    SCORES,
    caption_stats,
    chinese_characters,
    chinese_words,
    english_tokens,
    most_frequent_caption,
    nearest_captions,
    one_line,
)
from config import InputError

ROOT = Path(__file__).parents[1]
UCM = ROOT.parent / "shared" / "data" / "ucm_captions" / "ucm_captions.jsonl"
REPEATED = ("ROUGE-L", "CIDEr", "BLEU-4")  # with per-image scores, of those that need no Java
WORDS = ("an", "the", "road", "house", "tree", "river", "near", "many", "blue-green", "two", "of", "with")


def works(java) -> bool:
    return bool(java) and subprocess.run([java, "-version"], capture_output=True, timeout=60).returncode == 0


needs_java = pytest.mark.skipif(not works(shutil.which("java")), reason="there is no Java on PATH that works")


def scores(*captions, **options):
    return caption_scores.caption_scores(*captions, **({"samples": 20} | options))


def values(part) -> dict:
    return {name: score["value"] for name, score in part["scores"].items()}


def drawn_captions(number, seed=0, words=WORDS):
    """Captions of random words, 1 to 5 references an image; candidates that are near them, or empty."""
    rng = random.Random(seed)
    candidates, references = [], []
    for _ in range(number):
        first = rng.choices(words, k=rng.randint(1, 12))
        texts = [[w if rng.random() < 0.6 else rng.choice(words) for w in first] for _ in range(rng.randint(1, 5))]
        own = [w for w in first if rng.random() < 0.8][: rng.choice([0, 3, 20, 20, 20])]
        candidates.append(" ".join(own) + rng.choice(["", ".", " ."]))
        references.append([" ".join(text).capitalize() + "." for text in texts])
    return candidates, references


@pytest.fixture(scope="module")
def scenes():
    if not UCM.is_file():
        pytest.skip("real data ../shared/data/ucm_captions is not here")
    return [json.loads(line) for line in UCM.read_text().splitlines()]


def direct(candidates, references, key=str, seed=0) -> tuple[dict, dict]:
    """pycocoevalcap as its own users call it, on token strings: values, and per-image scores in our order."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    order = random.Random(seed).sample(range(len(candidates)), len(candidates))
    gts, res = {key(i): references[i] for i in order}, {key(i): [candidates[i]] for i in order}
    back = np.argsort(order)
    bleu, bleu_each = Bleu(4).compute_score(gts, res, verbose=0)
    values, each = dict(zip(BLEU, bleu)), {"BLEU-4": np.array(bleu_each[3])[back]}
    for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        values[name], images = scorer.compute_score(gts, res)
        each[name] = images[back]
    return values, each


def tokens_of(candidates, references, cut=english_tokens):
    join = lambda text: " ".join(cut(text))  # noqa: E731
    return [join(text) for text in candidates], [[join(text) for text in texts] for texts in references]


def agrees(part, want, each):
    for name, value in want.items():
        assert part["scores"][name]["value"] == pytest.approx(value, abs=1e-9), name
    for name, images in each.items():
        np.testing.assert_allclose(part["per_image"][name], images, atol=1e-9, err_msg=name)


# ---------------------------------------------------------------------------------------------
# The scores are pycocoevalcap's


@pytest.mark.parametrize("key", [str, int, lambda i: f"image {-i}"])
def test_scores_are_those_of_the_package(key):
    captions = drawn_captions(1000)
    part = scores(*captions, java=False)["parts"][0]
    agrees(part, *direct(*tokens_of(*captions), key))
    assert part["images"] == 1000 and part["index"] == list(range(1000)) and part["tokens"] == "words"
    assert part["empty"] == sum(not english_tokens(text) for text in captions[0]) > 100
    assert 0.1 < part["scores"]["BLEU-4"]["value"] < 0.9 and 0.5 < part["scores"]["CIDEr"]["value"] < 9


def test_few_images():
    for seed in range(60):
        captions = drawn_captions(1 + seed % 5, seed)
        agrees(scores(*captions, java=False)["parts"][0], *direct(*tokens_of(*captions)))
    assert values(scores(["a road"], [["a road"]], java=False)["parts"][0])["CIDEr"] == 0  # as documented


def test_scores_of_real_captions(scenes):
    some = scenes[::4]
    captions = [s["captions"][0] for s in some], [s["captions"][1:] for s in some]
    agrees(scores(*captions, java=False)["parts"][0], *direct(*tokens_of(*captions)))
    zh = [s["zh_answer"] for s in scenes[::15]]
    captions = zh[1:] + zh[:1], [[text] for text in zh]
    parts = scores(*captions)["parts"]
    for part, cut in zip(parts, (chinese_words, chinese_characters)):
        agrees(part, *direct(*tokens_of(*captions, cut)))


def test_order_of_images_and_references_does_not_matter():
    candidates, references = drawn_captions(50)
    order = random.Random(1).sample(range(50), 50)
    turned = [candidates[i] for i in order], [references[i][::-1] for i in order]
    first, second = (scores(*given, java=False)["parts"][0] for given in ((candidates, references), turned))
    assert values(first) == pytest.approx(values(second), abs=1e-12)
    for name in REPEATED:
        assert [first["per_image"][name][i] for i in order] == pytest.approx(second["per_image"][name], abs=1e-12)


def test_perfect_and_empty():
    texts = ["Many planes are parked.", "There is a river with green water", "Some houses beside the road ."]
    perfect, empty, none = (
        values(scores(given, [[t, "another text of it"] for t in texts], java=False)["parts"][0])
        for given in (texts, ["", "...", " \n"], ["x y z w v"] * 3)
    )
    assert perfect["BLEU-4"] == pytest.approx(1) and perfect["ROUGE-L"] == pytest.approx(1)
    for score in (*BLEU, "ROUGE-L", "CIDEr"):
        assert empty[score] == 0 and none[score] == pytest.approx(0, abs=1e-3), score


def test_references_without_words_are_left_out():
    given = ["a road", "a house"], [["a road", "..."], ["", "the house"]]
    assert scores(*given, java=False) == scores(given[0], [["a road"], ["the house"]], java=False)


# ---------------------------------------------------------------------------------------------
# Intervals


def test_intervals_are_those_of_slow_resampling():
    captions, samples, seed = drawn_captions(40, seed=3), 30, 5
    part = scores(*captions, java=False, samples=samples, seed=seed)["parts"][0]
    given = tokens_of(*captions)
    _, each = direct(*given)
    made = []
    for draw in np.random.default_rng(seed).integers(0, 40, (samples, 40)):
        bleu, _ = direct([given[0][i] for i in draw], [given[1][i] for i in draw])
        made.append([bleu[name] for name in BLEU] + [each[name][draw].mean() for name in ("ROUGE-L", "CIDEr")])
    for name, column in zip((*BLEU, "ROUGE-L", "CIDEr"), np.array(made).T):
        assert part["scores"][name]["interval"] == pytest.approx(np.quantile(column, [0.025, 0.975]), abs=1e-9), name


def test_texts_of_one_image_are_drawn_together():
    """Of a dialogue: eight answers of an image are not eight images."""
    captions = drawn_captions(12, seed=3)
    many = [[text for text in part for _ in range(8)] for part in captions]
    options = {"java": False, "samples": 60, "seed": 5}
    (alone,) = caption_scores.compare({"x": captions[0]}, captions[1], **options)["x"]["parts"]
    grouped = caption_scores.compare({"x": many[0]}, many[1], groups=[n // 8 for n in range(96)], **options)
    (grouped,) = grouped["x"]["parts"]
    for name, near in {
        **dict.fromkeys((*BLEU, "ROUGE-L"), 1e-6),
        "CIDEr": 0.1,
    }.items():  # what CIDEr is of 12 or 96 texts
        assert grouped["scores"][name]["interval"] == pytest.approx(alone["scores"][name]["interval"], abs=near), name


def test_intervals_at_full_size_take_seconds():
    captions = drawn_captions(300)
    captions = captions[0] * 7, captions[1] * 7
    began = time.perf_counter()
    part = scores(*captions, java=False, samples=1000)["parts"][0]
    assert time.perf_counter() - began < 20
    for name in (*BLEU, "ROUGE-L", "CIDEr"):
        low, high = part["scores"][name]["interval"]
        assert low < part["scores"][name]["value"] < high, name
        assert high - low < 0.2 * part["scores"][name]["value"]


def test_intervals_are_repeatable():
    captions = drawn_captions(30)
    assert scores(*captions, java=False) == scores(*captions, java=False)
    assert scores(*captions, java=False) != scores(*captions, java=False, seed=1)


# ---------------------------------------------------------------------------------------------
# Tokens

PTB = {  # what PTBTokenizer and the list of punctuation leave
    "The blue-green sea .": "the blue-green sea",
    "It's a house's roof; the cars' lot.": "it 's a house 's roof the cars lot",
    "I don't, can't, cannot, won't see 'it' \"there\"": "i do n't ca n't can not wo n't see it there",
    "(north-west side) [a] {b}.": "-lrb- north-west side -rrb- -lsb- a -rsb- -lcb- b -rcb-",
    "1,000 cars, 3.5 km, 10% of $5, 10m x 20m": "1,000 cars 3.5 km 10 % of $ 5 10m x 20m",
    "5th & 6th, 2x2, 12:30, 1/2, and/or": "5th & 6th 2x2 12:30 1/2 and/or",
    "well - known -- yes --- no ... wow.... … — – x–y a--b": "well known yes no wow x y a b",
    "café “quoted” ‘a’ it’s don’t": "café quoted a it 's do n't",
    "Mr. Smith at St. Louis, U.S.A. etc.": "mr. smith at st. louis u.s.a. etc.",
    "No. 5 is no. a. b.": "no. 5 is no a. b",
    "at point A.": "at point a",
    "in the U.S.": "in the u.s.",
    "end?! what?? no! why? a:b": "end ?! what ?? no why a b",
    "-5 degrees word- -word 20-30 m 21st-century": "-5 degrees word word 20-30 m 21st-century",
    "1, 2 a,b 5. 5.5.": "1 2 a b 5 5.5",
    "#tag #1 <unk> a|b 50° m²": "#tag # 1 <unk> a | b 50 ° m ²",
    "gonna gotta '90s 1990s": "gon na got ta '90s 1990s",
    "�tree\U0001f600 \u200b": "tree",
    "": "",
    " ... ": "",
}
BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\t", "\x00", "\xa0"]


def test_english_tokens():
    assert {text: " ".join(english_tokens(text)) for text in PTB} == PTB


@needs_java
def test_the_table_of_tokens_is_ptb():
    given = [one_line(text) for text in PTB if text]
    made, reason = caption_scores._in_child("ptb", texts=given)
    assert made and dict(zip(given, made["texts"])) == {one_line(text): PTB[text] for text in PTB if text}, reason


def test_chinese_tokens():
    text = "图像中有３架ｐｌａｎｅ，停在机场的 2.5 公里 跑道上。"
    assert chinese_characters(text) == [*"图像中有", "3", "架", "plane", *"停在机场的", "2.5", *"公里跑道上"]
    words = chinese_words(text)
    assert "".join(words) == "".join(chinese_characters(text)) and {"机场", "跑道", "plane", "2.5"} <= set(words)


def test_chinese_is_silent_and_leaves_no_file(tmp_path):
    code = (
        "import caption_scores as c\n"
        "r = c.caption_scores(['一条公路', '田'], [['一条公路'], ['农田']])\n"
        "assert [p['tokens'] for p in r['parts']] == ['words', 'chars']"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_line_breaks_do_not_shift_rows():
    candidates, references = drawn_captions(len(BREAKS), words=["road", "house", "tree", "river"])
    spaced = [f"a lake {text}" for text in candidates], [[f"my lake {t}" for t in texts] for texts in references]
    broken = (
        [f"a{b}lake{b}{b}{text}{b}" for b, text in zip(BREAKS, candidates)],
        [[f"{b}my{b}lake {t}" for t in texts] for b, texts in zip(BREAKS, references)],
    )
    assert scores(*broken, java=False) == scores(*spaced, java=False)
    assert one_line("a\ud800b\u2028c") == "a?b c"  # half a character cannot be written to a file


# ---------------------------------------------------------------------------------------------
# Languages


def test_a_mixed_run_has_a_part_for_each_language():
    candidates = ["a road", "一条公路", "", "two houses", "一片农田", ""]
    references = [
        ["a road"],
        ["一条公路"],
        ["the road"],
        ["有两座房屋", "two houses"],
        ["a field"],
        ["农田", "a field"],
    ]
    result = scores(candidates, references, java=False)
    assert result["images"] == 6
    assert [(p["language"], p["tokens"], p["index"], p["empty"]) for p in result["parts"]] == [
        ("en", "words", [0, 2, 3, 4], 1),
        ("zh", "words", [1, 5], 1),
        ("zh", "chars", [1, 5], 1),
    ]
    en, words, chars = result["parts"]
    assert en["per_image"]["ROUGE-L"] == [1, 0, 1, 0] and chars["per_image"]["ROUGE-L"] == [1, 0]
    assert values(words)["METEOR"] is None and "English" in words["absent"]["METEOR"]
    only = scores(candidates[1:2], references[1:2])["parts"]
    assert [p["tokens"] for p in only] == ["words", "chars"] and values(only[0])["BLEU-1"] == pytest.approx(1)
    assert [p["tokens"] for p in scores(candidates[1:2], references[1:2], tokens="chars")["parts"]] == ["chars"]
    assert [p["language"] for p in scores(["a"], [["飞机 plane"]], language="en", java=False)["parts"]] == ["en"]
    assert json.loads(json.dumps(result))["parts"][0]["scores"]["BLEU-1"]["value"] == values(en)["BLEU-1"]


def test_compare_is_the_scores_of_each():
    candidates, references = drawn_captions(20)
    systems = {"model": candidates, "empty": [""] * 20, "copies": [texts[0] for texts in references]}
    found = caption_scores.compare(systems, references, references, java=False, samples=20)
    assert list(found) == list(systems)
    for name, captions in systems.items():
        alone = scores(captions, references, java=False)
        assert found[name] == alone | {"stats": caption_stats(captions, references)}, name
    assert found["copies"]["stats"]["copied_share"] == 1 and found["empty"]["parts"][0]["empty"] == 20
    rows = caption_scores.per_image(found["model"])
    assert [row["CIDEr"] for row in rows] == found["model"]["parts"][0]["per_image"]["CIDEr"]
    short = caption_scores.without_images(found)
    assert short["model"]["parts"][0].keys() == found["model"]["parts"][0].keys() - {"index", "per_image"}
    assert "per_image" in found["model"]["parts"][0]


def test_cider_alone():
    captions = drawn_captions(30)
    assert caption_scores.cider(*captions) == pytest.approx(values(scores(*captions, java=False)["parts"][0])["CIDEr"])
    zh = ["一条公路", "农田", "飞机场"], [["一条公路"], ["一片农田"], ["有一座机场"]]
    both = [*captions[0], *zh[0]], [*captions[1], *zh[1]]
    parts = scores(*both, java=False)["parts"]
    assert caption_scores.cider(*zh, language="zh") == pytest.approx(values(parts[1])["CIDEr"])
    mean = sum(values(part)["CIDEr"] * part["images"] for part in parts[:2]) / 33
    assert caption_scores.cider(*both) == pytest.approx(mean)
    rows = caption_scores.per_image({"images": 33, "parts": parts})
    assert len(rows) == 33 and [row["CIDEr"] for row in rows[30:]] == parts[1]["per_image"]["CIDEr"]


def test_tables():
    captions = ["a road", "一条公路"], [["a road"], ["一条公路"]]
    found = caption_scores.compare(
        {"captioner": captions[0], "nearest": captions[0]}, captions[1], java=False, samples=5
    )
    for results in (found, json.loads(json.dumps(caption_scores.without_images(found)))):
        made = caption_scores.tables(results)
        assert [title for title, *_ in made] == [
            "English, words, 1 images",
            "Chinese, words, 1 images",
            "Chinese, characters, 1 images",
        ]
        for (title, rows, columns, notes), why in zip(made, ("left out (java=False)", *["for English only"] * 2)):
            assert [row["model"] for row in rows] == ["captioner", "caption of the nearest training image"]
            assert columns.keys() == {"model", *SCORES, "distinct", "mean_length"} - {"METEOR", "SPICE"}, title
            assert "ROUGE-L" in report.table_text(rows, columns) and "BLEU-1" in report.table_html(rows, columns)
            assert notes.endswith(f"; METEOR and SPICE absent: {why}") and "captioner 0.000 to 0.000" in notes
    with_training = caption_scores.compare({"x": ["a"]}, [["a"]], ["a"], java=False, samples=5)
    ((_, rows, columns, _),) = caption_scores.tables(with_training)
    assert rows[0]["copied_share"] == 1 and columns["copied_share"] == "copied"
    ((_, rows, columns, _),) = caption_scores.tables({"x": scores(["a"], [["a"]], java=False)})
    assert rows[0]["model"] == "x" and "distinct" not in columns
    # Where no caption has as many words the scorer's BLEU-4 is 0.03.
    three = scores(["a road runs"], [["a road runs"]], java=False)
    assert 0.02 < three["parts"][0]["scores"]["BLEU-4"]["value"] < 0.04
    ((_, rows, _, _),) = caption_scores.tables({"x": three})
    assert rows[0]["BLEU-3"] == 1 and rows[0]["BLEU-4"] == 0
    # No three words in common: the scorer's BLEU-3 is not 0, but next to it.
    apart = {"x": scores(["a b c d", "a b"], [["a c b d"], ["a b"]], java=False)}
    ((_, rows, columns, _),) = caption_scores.tables(apart)
    assert rows[0]["BLEU-3"] == 0 < rows[0]["BLEU-1"]


# ---------------------------------------------------------------------------------------------
# Java: absent, broken, stuck, there


TOKENIZER = """for last; do :; done
while read -r line || [ "$line" ]; do
  case "$line" in '') ;; "The next line.") echo "the next line" ;; *) echo "$line" ;; esac
done < "$last"
"""  # in PTBTokenizer's place: the lines as they are


@pytest.fixture
def java(tmp_path, monkeypatch):
    """`java(script)`: PATH holds this java alone, or none."""

    def put(script: str | None):
        if script is not None:
            (tmp_path / "java").write_text("#!/bin/sh\n" + script)
            (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path

    return put


def without_java(result) -> dict:
    """The one part of an English run that fell back to own tokens -> its reasons."""
    (part,) = result["parts"]
    assert part["tokens"] == "words" and part["absent"].keys() == {"METEOR", "SPICE"}
    for name in SCORES:
        assert (part["scores"][name]["value"] is None) == (name in part["absent"])
        assert (part["scores"][name]["interval"] is None) == (name in part["absent"])
    return part["absent"]


CAPTIONS = (["a road", "two houses"], [["A road."], ["Two houses ."]])


def test_no_java(java, capfd):
    java(None)
    result = scores(*CAPTIONS)
    assert without_java(result) == {"METEOR": "no Java on PATH", "SPICE": "no Java on PATH"}
    assert without_java(scores(*CAPTIONS, tokens="words"))["SPICE"] == "no Java on PATH"
    assert values(result["parts"][0])["BLEU-2"] == pytest.approx(1)
    with pytest.raises(InputError, match="no Java on PATH"):
        scores(*CAPTIONS, tokens="ptb")
    assert capfd.readouterr() == ("", "")


def test_broken_java(java, capfd):
    java('echo "Unable to locate a Java Runtime." >&2; exit 1')
    reasons = without_java(scores(*CAPTIONS))
    assert reasons["METEOR"].startswith("Unable to locate a Java Runtime. / RuntimeError: PTBTokenizer read 8 lines")
    java(TOKENIZER.replace("'') ;;", "'a road') ;;"))
    assert "or shifted them" in without_java(scores(*CAPTIONS))["METEOR"]  # one line too few
    assert capfd.readouterr() == ("", "")


def test_stuck_java(java, monkeypatch, tmp_path):
    import pycocoevalcap.tokenizer.ptbtokenizer as package

    folder, beat = Path(package.__file__).parent, tmp_path / "beat"
    files = set(folder.iterdir())
    java(f'while :; do echo >> "{beat}"; /bin/sleep 0.1; done')
    monkeypatch.setitem(caption_scores.SECONDS, "ptb", 2)
    began = time.perf_counter()
    assert "longer than 2 s" in without_java(scores(*CAPTIONS))["METEOR"]
    assert time.perf_counter() - began < 15
    size = beat.exists() and beat.stat().st_size
    time.sleep(0.5)
    while left := set(folder.iterdir()) - files:  # other tests' own go away
        assert time.perf_counter() - began < 60, f"a temporary file is left: {left}"
        time.sleep(0.1)
    assert size == (beat.exists() and beat.stat().st_size), "Java is still running"


def test_meteor_that_fails_does_not_hang(java, capfd):
    """A java that repeats its lines in the tokenizer's place, and dies in METEOR's."""
    java('[ "$1" = -jar ] && { echo "no memory" >&2; exit 1; }\n' + TOKENIZER)
    began = time.perf_counter()
    (part,) = scores(*CAPTIONS)["parts"]
    assert part["tokens"] == "ptb" and part["absent"]["METEOR"].startswith("no memory / ")
    assert "CoreNLP" in part["absent"]["SPICE"] or not values(part)["SPICE"]
    assert time.perf_counter() - began < 15 and capfd.readouterr() == ("", "")


def test_spice_by_image(monkeypatch):
    """What is made of SPICE's answer; the program itself needs a download."""
    import pycocoevalcap.spice.spice as spice

    class Answers:
        def compute_score(self, gts, res):
            assert res == {0: ["a"], 1: ["b"]} and gts == {0: ["a", "c"], 1: ["b"]}
            return np.float64(0.5), [{"All": {"f": f}, "Color": {"f": np.nan}} for f in (0.25, 0.75)]

    monkeypatch.setattr(spice, "Spice", Answers)
    (made,) = caption_scores._spice([(["a", "b"], [["a", "c"], ["b"]], None)], samples=50, seed=0)["runs"]
    assert made == {"value": 0.5, "per_image": [0.25, 0.75], "interval": (0.25, 0.75)}


@needs_java
def test_with_java(monkeypatch, capfd):
    """PTB and METEOR, through awkward captions, against pycocoevalcap called directly. METEOR takes ten seconds to
    start: ours and the direct call share one, so that ours does not run in a child process here."""
    import pycocoevalcap.meteor.meteor as package
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    candidates, references = drawn_captions(12, seed=4)
    candidates[:4] = ["two\nhouses,\u2028near\x0bit", "", "...", "It's a (white) house's roof"]
    references[3] = ["It is a roof - a white one", "It's a (white) house's roof ||| x", "It's a (white) house's roof."]
    order = random.Random(0).sample(range(12), 12)
    clean = lambda text: {"caption": " ".join(text.split())}  # noqa: E731
    gts = PTBTokenizer().tokenize({f"i{i}": [clean(text) for text in references[i]] for i in order})
    res = PTBTokenizer().tokenize({f"i{i}": [clean(candidates[i])] for i in order})
    meteor = package.Meteor()
    value, each = meteor.compute_score(gts, res)
    want, images = direct([res[f"i{i}"][0] for i in range(12)], [gts[f"i{i}"] for i in range(12)])

    tasks = {"ptb": caption_scores._ptb, "meteor": caption_scores._meteor}
    monkeypatch.setattr(package, "Meteor", lambda: meteor)
    monkeypatch.setattr(
        caption_scores, "_in_child", lambda task, **given: (json.loads(json.dumps(tasks[task](**given))), "")
    )
    one_image = meteor._stat
    systems = {"empty": [""] * 12, "drawn": candidates}  # two runs of one METEOR
    found = caption_scores.compare(systems, references, samples=10, seed=2)
    meteor._stat = one_image
    assert values(found["empty"]["parts"][0])["METEOR"] == 0
    (part,) = found["drawn"]["parts"]
    agrees(part, want | {"METEOR": value}, images | {"METEOR": np.array(each)[np.argsort(order)]})
    assert part["tokens"] == "ptb" and part["absent"].keys() <= {"SPICE"}
    assert part["empty"] == sum(not english_tokens(text) for text in candidates) > 1

    lines = [meteor._stat(res[f"i{i}"][0], gts[f"i{i}"]) for i in range(12)]
    slow = []
    for draw in np.random.default_rng(2).integers(0, 12, (10, 12)):
        meteor.meteor_p.stdin.write(("EVAL ||| " + " ||| ".join(lines[i] for i in draw) + "\n").encode())
        meteor.meteor_p.stdin.flush()
        slow.append([float(meteor.meteor_p.stdout.readline()) for _ in range(13)][-1])
    assert part["scores"]["METEOR"]["interval"] == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=1e-9)

    # Texts of one image are drawn together: two images of equal size are drawn as (a, a), (a, b), (b, a) or (b, b).
    texts = [res[f"i{i}"][0] for i in range(12)], [gts[f"i{i}"] for i in range(12)]
    (made,) = caption_scores._meteor([(*texts, [n // 6 for n in range(12)])], samples=40, seed=2)["runs"]
    halves = []
    for half in (lines[:6], lines[6:]):
        meteor.meteor_p.stdin.write(("EVAL ||| " + " ||| ".join(half) + "\n").encode())
        meteor.meteor_p.stdin.flush()
        halves.append([float(meteor.meteor_p.stdout.readline()) for _ in range(7)][-1])
    assert made["interval"] == pytest.approx(sorted(halves), abs=1e-4) and made["value"] == pytest.approx(value)


@needs_java
def test_java_prints_nothing(capfd):
    made, _ = caption_scores._in_child("ptb", texts=["a road."])
    assert made == {"texts": ["a road"]} and capfd.readouterr() == ("", "")


@needs_java
def test_ptb_where_its_folder_is_not_ours_to_write(monkeypatch, tmp_path):
    from pycocoevalcap.tokenizer import ptbtokenizer

    (tmp_path / "shared").mkdir()
    jar = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    shutil.copyfile(Path(ptbtokenizer.__file__).with_name(jar), tmp_path / "shared" / jar)
    monkeypatch.setattr(ptbtokenizer, "__file__", str(tmp_path / "shared" / "ptbtokenizer.py"))
    (tmp_path / "shared").chmod(0o555)
    monkeypatch.setattr(os, "access", lambda *_: False)  # for root every folder is
    before = (tmp_path / "shared").stat().st_mtime_ns
    assert caption_scores._ptb(["A ship, at sea."])["texts"] == ["a ship at sea"]
    assert (tmp_path / "shared").stat().st_mtime_ns == before and Path(ptbtokenizer.__file__).parent.name == "shared"


@needs_java
def test_own_tokens_against_ptb_on_real_captions(scenes):
    """The numbers of the module's docstring: -s prints them."""
    test = [s for s in scenes if s["split"] == "test"]
    common = {}
    for name in {s["class"] for s in scenes}:
        common[name] = most_frequent_caption(
            [s["captions"] for s in scenes if (s["class"], s["split"]) == (name, "train")]
        )
    runs = {
        "first caption against the other four": ([s["captions"][0] for s in test], [s["captions"][1:] for s in test]),
        "the class's most frequent against five": ([common[s["class"]] for s in test], [s["captions"] for s in test]),
    }
    everything = sorted({one_line(text) for s in scenes for text in s["captions"]})
    table = dict(zip(everything, caption_scores._in_child("ptb", texts=everything)[0]["texts"]))
    different = [text for text in everything if " ".join(english_tokens(text)) != table[text]]
    print(f"\n{len(different)} of {len(everything)} different captions have other tokens")
    for name, captions in runs.items():
        ptb, _ = direct(*tokens_of(*captions, lambda text: table[one_line(text)].split()))
        own, _ = direct(*tokens_of(*captions))
        print(name, {k: f"{ptb[k]:.4f} {own[k] - ptb[k]:+.0e}" for k in ptb})
        assert max(abs(own[k] - ptb[k]) for k in ptb) < 1e-9
    assert not different


# ---------------------------------------------------------------------------------------------
# Variety and baselines


def test_caption_stats():
    made = caption_stats(
        ["A road.", "a road", "two houses", "一条公路。", "", "A  ROAD !"], [["a Road .", "a tree"], ["一条公路"], [""]]
    )
    assert made == {
        "captions": 6,
        "distinct": 4,
        "distinct_share": 4 / 6,
        "copied": 4,
        "copied_share": 4 / 6,
        "mean_length": 12 / 6,
        "empty": 1,
    }
    assert caption_stats(["a b"], ["A B", "c"])["copied_share"] == 1
    assert caption_stats(["a b"])["copied_share"] is None and caption_stats(["a"], [["", "."]])["copied"] is None


def test_caption_stats_of_real_captions(scenes):
    train, test = ([s["captions"] for s in scenes if s["split"] == split] for split in ("train", "test"))
    made = caption_stats([texts[0] for texts in test], train)
    known = {tuple(english_tokens(text)) for texts in train for text in texts}
    assert made["copied"] == sum(tuple(english_tokens(texts[0])) in known for texts in test) > 100
    assert 0 < made["distinct"] < 210 and 5 < made["mean_length"] < 15


def test_most_frequent_caption():
    assert most_frequent_caption([["b", "a"], ["b ", "a"], ["c"]]) == "a"
    assert most_frequent_caption([["b", "a"], ["b\n", ""], ["", "", ""]]) == "b"
    assert most_frequent_caption(["x", "y", "y"]) == "y"


def test_most_frequent_real_caption(scenes):
    train = [s["captions"] for s in scenes if s["split"] == "train"]
    count = Counter(text for texts in train for text in texts)
    assert count[most_frequent_caption(train)] == max(count.values())


def test_nearest_captions(monkeypatch):
    rng = np.random.default_rng(0)
    train, queries = rng.normal(size=(50, 8)), rng.normal(size=(30, 8))
    train[10] = 3 * train[4]  # the same direction: the first is taken
    queries[0] = train[10]
    texts = [[f"first {i}", "second"] for i in range(50)]
    want = []
    for query in queries:
        cosines = [q @ query / math.sqrt((q @ q) * (query @ query)) for q in train]
        want.append(f"first {next(i for i in range(50) if cosines[i] > max(cosines) - 1e-6)}")
    assert want[0] == "first 4" and nearest_captions(queries, train, texts) == want
    monkeypatch.setattr(caption_scores.metrics, "BLOCK", 100)
    assert nearest_captions(queries * 7, train, texts) == want
    assert nearest_captions([[1.0, 0]], [[0, 1], [2, 0.1]], [["no"], ["", "yes"]]) == ["yes"]


# ---------------------------------------------------------------------------------------------
# Errors


def test_what_cannot_be_scored_is_refused_with_a_reason():
    for call, words in {
        lambda: scores([], []): "at least one image; got 0 candidates",
        lambda: scores(["a"], [["a"], ["b"]]): "1 candidates and 2 lists",
        lambda: scores(["a", "b"], [["a"], []]): "image 1 has no reference",
        lambda: scores(["a", "b"], [["a"], [" "]]): "image 1 has no reference",
        lambda: scores(["一", "a"], [["一"], ["..."]], java=False): "image 1 has no reference with a word",
        lambda: scores([None], [["a"]]): "image 0: expected strings, got NoneType",
        lambda: scores(["a"], [[3]]): "expected strings, got int",
        lambda: scores(["a"], [["a"]], language="fr"): "'fr'",
        lambda: scores(["a"], [["a"]], tokens="bpe"): "'bpe'",
        lambda: scores(["a"], [["a"]], tokens="chars"): "'chars' are not for English",
        lambda: scores(["一"], [["一"]], tokens="ptb"): "'ptb' are not for Chinese",
        lambda: caption_stats([], [["a"]]): "at least one candidate",
        lambda: caption_scores.cider(["a"], [["..."]]): "image 0 has no reference with a word",
        lambda: most_frequent_caption([]): "at least one training caption",
        lambda: most_frequent_caption([["a", None]]): "got NoneType",
        lambda: nearest_captions([[1.0, 2]], [[1.0]], [["a"]]): "do not belong together",
        lambda: nearest_captions([[1.0]], [[1.0]], [["a"], ["b"]]): "do not belong together",
        lambda: nearest_captions([[1.0]], [[1.0]], [[" "]]): "image 0 has no caption",
        lambda: nearest_captions([[1.0], [0.0]], [[1.0]], [["a"]]): "features: row 1 is all zeros",
    }.items():
        with pytest.raises(InputError, match=words):
            call()
    with pytest.raises(ValueError, match="samples"):
        scores(["a"], [["a"]], java=False, samples=0)


def test_of_training_images_as_near_as_each_other_the_first_one_speaks():
    assert nearest_captions([[1.0, 0]], [[1, 5e-4], [1, 0]], [["first"], ["second"]]) == ["first"]


def test_an_interval_of_bleu_takes_the_closest_reference_length():
    given = ["a road near a river"] * 3, [["a road near a small river", "a road near"]] * 3
    part = scores(*given, java=False)["parts"][0]
    for name in BLEU:  # all images are one: so is every draw
        assert part["scores"][name]["interval"] == pytest.approx([part["scores"][name]["value"]] * 2), name
