"""metrics.py against hand-worked cases, an independent slow implementation and known statistics."""

import math
import random
import statistics

import numpy as np
import pytest

import metrics
from metrics import bootstrap_interval, object_mentions, retrieval, triplet_accuracy

# ---------------------------------------------------------------------------------------------
# Uncertainty


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(3.0, 2.0, 100), samples=300, seed=trial)
        covered += low <= 3.0 <= high
        widths.append(high - low)
    assert 0.90 <= covered / 200 <= 0.985
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(100), rel=0.05)  # normal theory


def test_bootstrap_by_image_is_as_wide_as_independent_images():
    """100 images of 20 equal answers hold 100 facts, not 2000: the width follows sqrt(p q / 100)."""
    right = np.repeat(np.random.default_rng(1).random(100) < 0.7, 20)
    image = np.repeat([f"image {i}" for i in range(100)], 20)
    p = right.mean()
    low, high = bootstrap_interval(right, image, samples=4000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 100), rel=0.08)
    low, high = bootstrap_interval(right, samples=4000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 2000), rel=0.08)


def test_bootstrap_is_repeatable_and_bounded_in_memory(monkeypatch):
    values = np.random.default_rng(2).random(50)
    whole = bootstrap_interval(values, seed=5)
    assert whole == bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)
    monkeypatch.setattr(metrics, "BLOCK", 1000)  # 5 draws at a time, where it was all 1000
    assert bootstrap_interval(values, seed=5) == pytest.approx(whole, abs=0.02)
    assert bootstrap_interval([0.25] * 8) == (0.25, 0.25)


# ---------------------------------------------------------------------------------------------
# Triplets


def test_triplet_accuracy_by_hand():
    got = triplet_accuracy([0.9, 0.5, 0.5, 0.25], [0.1, 0.5, 0.25, 0.75], margin=0.25, image=[0, 0, 1, 1])
    assert got["accuracy"] == 0.5  # 0.9 > 0.1 and 0.5 > 0.25; the tie is wrong
    assert got["accuracy_margin"] == 0.25  # 0.25 > 0.25 is not
    assert got["mean_gap"] == pytest.approx((0.8 + 0.0 + 0.25 - 0.5) / 4)
    assert got["count"] == 4
    assert got["interval"] == (0.5, 0.5)  # each image has one right of two
    assert triplet_accuracy([0.3] * 5, [0.3] * 5)["accuracy"] == 0.0


def test_triplet_accuracy_takes_torch_tensors():
    torch = pytest.importorskip("torch")
    got = triplet_accuracy(
        torch.tensor([0.5, 1.0], dtype=torch.bfloat16, requires_grad=True), torch.tensor([0.25, 2.0])
    )
    assert got["accuracy"] == 0.5


# ---------------------------------------------------------------------------------------------
# Retrieval


def unit(*degrees):
    return [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]


def test_retrieval_by_hand():
    """Three images at 0, 40 and 90 degrees; the smaller the angle, the better the score.

    texts 0, 1 -> image 0 at 5 and 50 degrees; text 2 -> image 1 at 85; text 3 -> image 2 at 60.
    image 0: best text at 5 -> rank 1. image 1 (40): 10 to text 1, 20 to text 3, 35 to text 0, 45 to
    its own -> rank 4. image 2 (90): 5 to text 2, 30 to its own -> rank 2.
    text 0 -> rank 1. text 1 (50): 10, 40, then its own at 50 -> rank 3. text 2 (85): 5 to image 2,
    45 to its own -> rank 2. text 3 (60): 20 to image 1, 30 to its own -> rank 2.
    """
    got = retrieval(unit(0, 40, 90), unit(5, 50, 85, 60), [0, 0, 1, 2], ks=(1, 2))
    assert (got["i2t_R@1"], got["i2t_R@2"]) == pytest.approx((1 / 3, 2 / 3))
    assert (got["t2i_R@1"], got["t2i_R@2"]) == pytest.approx((1 / 4, 3 / 4))
    assert got["mR"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 4 + 3 / 4) / 4)
    assert (got["i2t_median_rank"], got["t2i_median_rank"]) == (2, 2)
    # Chance, by counting: image 0 has 2 of 4 texts: R@1 1/2, R@2 1 - 1/6; the others 1/4 and 1/2.
    i2t = ((1 / 2 + 1 / 4 + 1 / 4) / 3, (5 / 6 + 1 / 2 + 1 / 2) / 3)
    assert got["chance_mR"] == pytest.approx((sum(i2t) + 1 / 3 + 2 / 3) / 4)
    assert (got["images"], got["texts"], got["duplicate_texts"]) == (3, 4, 0)
    assert got["mR_interval"][0] <= got["mR"] <= got["mR_interval"][1]
    for name in [n for n in got if n.startswith("strict_")]:
        assert got[name] == got[name.removeprefix("strict_")], name


def test_a_text_repeated_under_another_image_is_correct_unless_strict():
    images, captions = unit(0, 90), unit(0, 0)  # both captions read the same and lie on image 0
    got = retrieval(images, captions, [0, 1], texts=["Many  trees ", "many trees"], ks=(1,))
    assert (got["i2t_R@1"], got["t2i_R@1"], got["mR"], got["chance_mR"]) == (1, 1, 1, 1)
    assert got["duplicate_texts"] == 2
    # Strict: each image finds two equally good texts, one wrong; text 1 is nearer to image 0.
    assert (got["strict_i2t_R@1"], got["strict_t2i_R@1"], got["strict_mR"]) == (0, 0.5, 0.25)
    assert got["strict_chance_mR"] == 0.5
    assert retrieval(images, captions, [0, 0], texts=["a", "a"], ks=(1,))["duplicate_texts"] == 0  # same image


@pytest.mark.parametrize("block", [1, 3 * 60, 1 << 24])
def test_constant_scores_give_the_worst_rank(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    rng = np.random.default_rng(0)
    one = rng.normal(size=(1, 77))  # a width at which BLAS rounds equal columns differently
    got = retrieval(np.repeat(one, 20, 0), np.repeat(one, 60, 0) * rng.uniform(0.1, 9, (60, 1)), np.arange(60) // 3)
    assert got["mR"] == 0.0
    assert (got["i2t_median_rank"], got["t2i_median_rank"]) == (60 - 3 + 1, 20)


def slow_retrieval(images, captions, text_image, texts, ks):
    """Independent: pure Python, one full sorted ranking per query, wrong items first among equals."""

    def cosine(a, b):
        dot = math.fsum(x * y for x, y in zip(a, b))
        return round(dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b)), 6)

    def same(a, b):
        return texts is not None and " ".join(texts[a].lower().split()) == " ".join(texts[b].lower().split())

    own = [[t for t in range(len(captions)) if text_image[t] == i] for i in range(len(images))]
    strict = {(i, t) for i in range(len(images)) for t in own[i]}
    lenient = {(i, t) for i in range(len(images)) for t in range(len(captions)) if any(same(t, u) for u in own[i])}
    out = {}
    for prefix, pairs in (("", lenient | strict), ("strict_", strict)):
        ranks = {"i2t": [], "t2i": []}
        for i in range(len(images)):
            ranking = sorted((-cosine(images[i], captions[t]), (i, t) in pairs) for t in range(len(captions)))
            if own[i]:
                ranks["i2t"].append([right for _, right in ranking].index(True) + 1)
        for t in range(len(captions)):
            ranking = sorted((-cosine(images[i], captions[t]), (i, t) in pairs) for i in range(len(images)))
            ranks["t2i"].append([right for _, right in ranking].index(True) + 1)
        recalls = {f"{prefix}{w}_R@{k}": sum(r <= k for r in ranks[w]) / len(ranks[w]) for w in ranks for k in ks}
        out |= recalls | {f"{prefix}mR": statistics.fmean(recalls.values())}
        out |= {f"{prefix}{w}_median_rank": statistics.median(ranks[w]) for w in ranks}
    return out


@pytest.mark.parametrize("seed", range(8))
def test_retrieval_equals_an_independent_implementation(seed, monkeypatch):
    """Even seeds: coordinates from {-1, 0, 1}, so ties abound; odd seeds: continuous, half aligned."""
    monkeypatch.setattr(metrics, "BLOCK", 100)  # a few queries at a time
    rng = random.Random(seed)
    count, wide, dim = 12, 35, 4
    text_image = [rng.randrange(count - 1) for _ in range(wide)]  # the last image has no text
    if seed % 2:
        images = [[rng.gauss(0, 1) for _ in range(dim)] for _ in range(count)]
        captions = [[x + rng.gauss(0, 0.7) for x in images[i]] for i in text_image]
    else:
        images = [[1] + [rng.choice([-1, 0, 1]) for _ in range(dim)] for _ in range(count)]
        captions = [[1] + [rng.choice([-1, 0, 1]) for _ in range(dim)] for _ in range(wide)]
    texts = [rng.choice([f"text {n}", f" TEXT  {n}"]) for n in (rng.randrange(20) for _ in range(wide))]
    for wording in (None, texts):
        got = retrieval(images, captions, text_image, texts=wording)
        want = slow_retrieval(images, captions, text_image, wording, (1, 5, 10))
        assert {name: got[name] for name in want} == pytest.approx(want)
    assert got["duplicate_texts"] > 0 and got["mR"] > got["strict_mR"]


def test_chance_is_the_mean_of_random_embeddings():
    rng = np.random.default_rng(3)
    text_image = np.array([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 14])
    texts = [f"text {i % 16}" for i in range(20)]  # scored as 20 separate vectors: only the relation repeats
    runs = [retrieval(rng.normal(size=(15, 8)), rng.normal(size=(20, 8)), text_image, texts=texts) for _ in range(400)]
    for name in ("mR", "strict_mR"):
        values = [run[name] for run in runs]
        error = np.std(values) / math.sqrt(len(values))
        assert np.mean(values) == pytest.approx(runs[0][name.replace("mR", "chance_mR")], abs=4 * error)
    assert runs[0]["chance_mR"] > runs[0]["strict_chance_mR"]


def test_mr_interval_matches_a_plain_resampling_of_images():
    rng = np.random.default_rng(4)
    images, text_image = rng.normal(size=(40, 6)), np.repeat(np.arange(40), 2)
    captions = images[text_image] + rng.normal(0, 1.2, (80, 6))
    low, high = retrieval(images, captions, text_image)["mR_interval"]

    def hits(query, gallery, right):
        scores = query @ gallery.T / np.linalg.norm(gallery, axis=1)
        best = np.where(right, scores, -np.inf).max(1, keepdims=True)
        rank = 1 + ((scores >= best) & ~right).sum(1)
        return np.mean([rank <= k for k in (1, 5, 10)], axis=0)

    right = np.arange(40)[:, None] == text_image
    by_image, by_text = hits(images, captions, right), hits(captions, images, right.T).reshape(40, 2)
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 40, 40)
        means.append((by_image[drawn].mean() + by_text[drawn].mean()) / 2)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    for outside in (np.array(means) < low, np.array(means) > high):
        assert outside.mean() == pytest.approx(0.025, abs=0.012)


def test_what_cannot_be_scored_is_refused_with_a_reason():
    eye = np.eye(3)
    bad = eye.copy()
    bad[1, 1] = np.nan
    for pattern, call in {
        "image_embeddings: 1 of 9": lambda: retrieval(bad, eye, [0, 1, 2]),
        "text_embeddings: row 2": lambda: retrieval(eye, eye * [[1], [1], [0]], [0, 1, 2]),
        "text_embeddings: expected": lambda: retrieval(eye, [1.0, 2.0], [0, 1]),
        "3 dimensions, texts 2": lambda: retrieval(eye, np.ones((3, 2)), [0, 1, 2]),
        "text_image: expected 3 indexes": lambda: retrieval(eye, eye, [0, 1, 3]),
        "text_image: expected integers": lambda: retrieval(eye, eye, [0.0, 1.0, 2.0]),
        "texts: expected 3": lambda: retrieval(eye, eye, [0, 1, 2], texts=["a"]),
        "ks:": lambda: retrieval(eye, eye, [0, 1, 2], ks=(0,)),
        "values: expected a non-empty": lambda: bootstrap_interval([]),
        "values: expected numbers": lambda: bootstrap_interval(["a"]),
        "groups: expected one per value": lambda: bootstrap_interval([1, 2], [0]),
        "level:": lambda: bootstrap_interval([1, 2], level=95),
        "samples:": lambda: bootstrap_interval([1, 2], samples=0),
        "equal lengths": lambda: triplet_accuracy([1, 2], [1]),
        "negative: 1 of 1": lambda: triplet_accuracy([1], [float("nan")]),
    }.items():
        with pytest.raises(ValueError, match=pattern):
            call()


def test_objects_named_by_captions():
    words = {
        "ship": ["ship", "ships", "船"],
        "tank": ["storage tank", "storage tanks"],
        "road": ["road", "公路"],
        "car": ["车"],
    }
    captions = ["Two ships and a ship, no road.", "A storage tank beside a railroad", "公路上有一辆车", "停车场", ""]
    present = [["ship"], ["tank", "road"], ["road", "car"], [], ["ship"]]
    found = object_mentions(captions, present, words, ["no road", "停车场"])
    # named: {ship}, {tank} ("railroad" is no road), {road, car}, {}, {}: 4, all there; present 6
    assert (found["precision"], found["recall"], found["hallucinating"]) == (1.0, 4 / 6, 0.0)
    assert found["named"] == 4 and found["present"] == 6
    loose = object_mentions(captions, present, words)
    assert loose["precision"] == 4 / 6 and loose["hallucinating"] == 2 / 5
    low, high = loose["precision_interval"]
    assert 0 <= low <= loose["precision"] <= high <= 1
    assert object_mentions(["nothing"], [["ship"]], words)["precision"] is None
    assert object_mentions(["two shıps, ſhips"], [["ship"]], words)["named"] == 0  # equal but for case to re alone
    rare = object_mentions(["a ship"] * 3 + ["nothing"] * 97, [["ship"]] * 100, words)
    assert rare["precision_interval"] == (1.0, 1.0), "a draw of images in which none is named has no precision"
    with pytest.raises(ValueError, match="no words for"):
        object_mentions(["x"], [["plane"]], words)


def test_the_interval_of_recall_is_its_own():
    there = [["ship", "tank", "road"]] * 10 + [["ship"]] * 10
    found = object_mentions(["a ship"] * 20, there, {name: [name] for name in ("ship", "tank", "road")})
    low, high = found["recall_interval"]
    assert found["precision_interval"] == (1.0, 1.0) and low < found["recall"] < high < 1
