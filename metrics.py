"""Scores with their uncertainty, on plain numpy.

Two habits hold throughout. Every mean carries a bootstrap interval that resamples whole *images*:
the texts of one image are right or wrong together, and an interval that takes them for independent
is too narrow. And ties go against the model: a collapsed encoder gives equal scores everywhere, and
must come out worst, not first.

Scores are fractions from 0 to 1 (papers print percent). Arguments may be lists, numpy arrays or
torch tensors of any device and float type. What cannot be scored (wrong shape, NaN, an index out of
range, nothing at all) raises a `ValueError` that says which argument and why.
"""

import math
import re
import unicodedata
from bisect import bisect_left
from collections import Counter

import numpy as np

TIE = 1e-6  # cosines closer than this are equal: one float32 product gave equal columns up to 4e-7 apart
BLOCK = 1 << 24  # scores held at once: 64 MiB of float32, so 50k x 10k never exists as a whole


def _array(value, name: str, ndim: int, kind: str = "float") -> np.ndarray:
    """`value` as a checked float array, or (`kind="index"`) as int64, or (`kind="any"`) as it is."""
    if hasattr(value, "detach"):  # a torch tensor; numpy has no bfloat16 and sees no GPU
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    array = np.asarray(value)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name}: expected a non-empty array of {ndim} dimension(s), got shape {array.shape}")
    if kind == "index":
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected integers, got {array.dtype}")
        return array.astype(np.int64)
    if kind == "float":
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name}: expected numbers, got {array.dtype}")
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite")
    return array


# ---------------------------------------------------------------------------------------------
# Uncertainty


def _resampled_means(sums: np.ndarray, counts: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Cluster bootstrap of C means at once (Davison & Hinkley 1997, section 3.8).

    `sums`, `counts` (G, C): what each of G clusters adds to each mean. Draws G clusters with
    replacement, `samples` times; -> (samples, C). Each draw is a row of weights (how often each
    cluster came up), so a chunk of draws is one matrix product. A mean that counts nothing in a
    draw is NaN there.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    total, rng, means = len(sums), np.random.default_rng(seed), []
    chunk = max(1, (BLOCK >> 2) // total)
    for start in range(0, samples, chunk):
        rows = min(chunk, samples - start)
        drawn = rng.integers(0, total, (rows, total)) + total * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * total).reshape(rows, total).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((weights @ sums) / (weights @ counts))
    return np.concatenate(means)


def _by_group(values: np.ndarray, groups) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts), each (G, C), as `_resampled_means` takes them, of rows (N, C) and the group of each; None: every row is
    a group."""
    if groups is None:
        return values, np.ones_like(values)
    group = np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(group, column) for column in values.T], 1)
    return sums, np.broadcast_to(np.bincount(group).astype(np.float64)[:, None], sums.shape)


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a fraction between 0 and 1, got {level}")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(values, groups=None, *, samples=1000, level=0.95, seed=0) -> tuple[float, float]:
    """Percentile bootstrap interval of `values.mean()`.

    values: (M,). groups: (M,) image id of each value (numbers or names); images are then drawn
    whole, with all their values. Without it each value is its own group. One group, or values that
    are all equal, give an interval of no width: it then says nothing about what was not seen.
    """
    values = _array(values, "values", 1)
    if groups is not None:
        groups = _array(groups, "groups", 1, "any")
        if len(groups) != len(values):
            raise ValueError(f"groups: expected one per value ({len(values)}), got {len(groups)}")
    return _percentiles(_resampled_means(*_by_group(values[:, None], groups), samples, seed), level)


# ---------------------------------------------------------------------------------------------
# Triplets


def triplet_accuracy(positive, negative, *, margin=0.0, image=None, seed=0) -> dict:
    """How often an image scores higher with its own text than with the wrong one.

    positive, negative: (M,) cosines of image and text. image: (M,) image id, for the interval.
    `accuracy` = mean[p > n], a tie being wrong; `accuracy_margin` = mean[p - n > margin], the share
    of triplets whose loss max(0, margin - p + n) has reached zero with room to spare; `mean_gap` =
    mean[p - n]; `interval`: 95% of `accuracy`, by image.
    """
    positive, negative = _array(positive, "positive", 1), _array(negative, "negative", 1)
    if positive.shape != negative.shape:
        raise ValueError(f"positive and negative: expected equal lengths, got {len(positive)} and {len(negative)}")
    right = positive > negative
    return {
        "accuracy": float(right.mean()),
        "accuracy_margin": float((positive - negative > margin).mean()),
        "mean_gap": float((positive - negative).mean()),
        "count": len(right),
        "interval": bootstrap_interval(right, image, seed=seed),
    }


# ---------------------------------------------------------------------------------------------
# Retrieval


def _groups(keys: np.ndarray, values: np.ndarray, count: int) -> list[np.ndarray]:
    """`values` sorted into lists by key 0..count-1."""
    order = np.argsort(keys, kind="stable")
    return np.split(values[order], np.cumsum(np.bincount(keys, minlength=count))[:-1])


def _relation(key: np.ndarray, text_image: np.ndarray, images: int):
    """-> two functions: the correct texts of an image, the correct images of a text (index arrays).

    Texts of equal `key` (T,) are one text: right for every image that any of them belongs to.
    """
    image, text_key = np.unique(np.stack([text_image, key]), axis=1)
    kinds = int(key.max()) + 1
    texts_of_key, images_of_key = _groups(key, np.arange(len(key)), kinds), _groups(text_key, image, kinds)
    keys_of_image = _groups(image, text_key, images)
    return (
        lambda i: np.concatenate([texts_of_key[k] for k in keys_of_image[i]]),
        lambda t: images_of_key[key[t]],
    )


def _ranks(queries: np.ndarray, ids: np.ndarray, gallery: np.ndarray, relations: list) -> list[tuple]:
    """Rank of the best correct item of each query, under each of several nested relations.

    queries (Q, D) and gallery (G, D) of unit length; ids (Q,): what to ask a relation about.
    rank = 1 + #{wrong g: score(q, g) >= best correct score - TIE}. Each relation contains the one
    before it, so items already struck out stay so and one score matrix serves all.
    -> for each relation (ranks (Q,), number of correct items (Q,)).
    """
    out = [(np.empty(len(queries), np.int64), np.empty(len(queries), np.int64)) for _ in relations]
    block = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        scores = queries[part] @ gallery.T  # (B, G)
        best = np.full(len(scores), -np.inf, scores.dtype)
        for correct, (ranks, counts) in zip(relations, out):
            found = [correct(i) for i in ids[part]]
            counts[part] = [len(f) for f in found]
            rows, columns = np.repeat(np.arange(len(scores)), counts[part]), np.concatenate(found)
            np.maximum.at(best, rows, scores[rows, columns])
            scores[rows, columns] = -np.inf
            ranks[part] = 1 + np.count_nonzero(scores >= best[:, None] - scores.dtype.type(TIE), axis=1)
    return out


def _chance(counts: np.ndarray, gallery: int, k: int) -> float:
    """E[R@k] when all orders of the gallery are equally likely: mean of 1 - C(G - c, k) / C(G, k),
    the hypergeometric chance that k draws hold at least one of a query's c correct items."""
    miss = np.ones(len(counts))
    for j in range(min(k, gallery)):
        miss *= np.maximum(gallery - counts - j, 0) / (gallery - j)
    return float(1 - miss.mean())


def _directions(value, name: str, rows: int = 1024) -> np.ndarray:
    """Rows of length 1, float32. Made in float64, some `rows` at a time: of a wide bag of words all would be gigabytes."""
    made = np.empty(np.shape(value), np.float32)
    for start in range(0, max(1, len(value)), rows):
        array = _array(value[start : start + rows], name, 2)
        length = np.linalg.norm(array, axis=1, keepdims=True)
        if (length == 0).any():
            raise ValueError(f"{name}: row {start + int(np.argmin(length))} is all zeros and has no direction")
        made[start : start + rows] = array / length
    return made


def retrieval(image_embeddings, text_embeddings, text_image, *, texts=None, ks=(1, 5, 10), seed=0) -> dict:
    """Image-to-text and text-to-image retrieval by cosine, each query against the whole other side.

    image_embeddings (N, D), text_embeddings (T, D), of any length but zero; text_image (T,): index
    of each text's image, several texts per image allowed. An image without a text stays in the
    gallery and is not a query.

    R@k: the share of queries with a correct item among the first k (VSE++, Faghri et al. 2018,
    arXiv:1707.05612: for an image the best ranked of its captions counts). mR: the mean of R@1, 5,
    10 in both directions (Yuan et al. 2022, AMFMN / RSITMD, arXiv:2204.09868). `median_rank`
    counts from 1. `mR_interval`: 95%, query images resampled with their texts, gallery fixed.

    texts (T,) strings: remote-sensing captions repeat word for word ("many buildings are in ..."),
    and a text equal to a caption of image i (after strip, casefold, single spaces) describes i
    wherever it is listed. The plain numbers count it as correct, in both directions;
    `duplicate_texts` says how many texts also belong to another image; the `strict_` numbers use
    `text_image` alone. Published tables do so, too, but let the order of the list decide between equal
    texts, where all of them count here: from image to text, strict is a lower bound of what they say.
    Without `texts` the two agree.

    `chance_mR` is the exact expectation for a random order. Equal texts score equally and so come
    out together, ties against the model: with duplicates a model of no skill lies at or below it.
    """
    images, captions = (
        _directions(image_embeddings, "image_embeddings"),
        _directions(text_embeddings, "text_embeddings"),
    )
    if images.shape[1] != captions.shape[1]:
        raise ValueError(f"embeddings: images have {images.shape[1]} dimensions, texts {captions.shape[1]}")
    text_image = _array(text_image, "text_image", 1, "index")
    if len(text_image) != len(captions) or text_image.min() < 0 or text_image.max() >= len(images):
        raise ValueError(f"text_image: expected {len(captions)} indexes from 0 to {len(images) - 1}")
    if texts is not None and len(texts) != len(captions):
        raise ValueError(f"texts: expected {len(captions)}, got {len(texts)}")
    ks = tuple(ks)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected positive ranks, got {ks}")

    relations, duplicates = [_relation(np.arange(len(captions)), text_image, len(images))], 0
    if texts is not None:
        key = np.unique([" ".join(str(t).casefold().split()) for t in texts], return_inverse=True)[1]
        relations.append(_relation(key, text_image, len(images)))
        duplicates = sum(len(relations[1][1](t)) > 1 for t in range(len(captions)))
    queries, texts_per_query = np.unique(text_image, return_counts=True)  # images that have a text
    i2t = _ranks(images[queries], queries, captions, [r[0] for r in relations])
    t2i = _ranks(captions, np.arange(len(captions)), images, [r[1] for r in relations])

    result, owner = {}, np.searchsorted(queries, text_image)  # owner (T,): each text's query image
    for prefix, relation in (("", -1), ("strict_", 0)):
        sums, counts, chance = [], [], []
        for way, (ranks, correct), gallery in (("i2t", i2t[relation], captions), ("t2i", t2i[relation], images)):
            for k in ks:
                hit = (ranks <= k).astype(np.float64)
                result[f"{prefix}{way}_R@{k}"] = float(hit.mean())
                sums.append(hit if way == "i2t" else np.bincount(owner, hit))
                counts.append(np.ones(len(queries)) if way == "i2t" else texts_per_query.astype(np.float64))
                chance.append(_chance(correct, len(gallery), k))
            result[f"{prefix}{way}_median_rank"] = float(np.median(ranks))
        sums, counts = np.stack(sums, 1), np.stack(counts, 1)
        result[f"{prefix}mR"] = float(np.mean(sums.sum(0) / counts.sum(0)))
        result[f"{prefix}mR_interval"] = _percentiles(_resampled_means(sums, counts, 1000, seed).mean(1), 0.95)
        result[f"{prefix}chance_mR"] = float(np.mean(chance))
    return result | {"duplicate_texts": int(duplicates), "images": len(images), "texts": len(captions)}


# ---------------------------------------------------------------------------------------------
# RSVQA

OPEN = ("count", "area")  # question types whose answers are numbers; the others choose between two words
# Of RSVQA: the types whose answers are compared by `bucket`.
PROTOCOLS = {"exact": (), "areas": ("area",), "bucketed": OPEN}
EDGES = (10, 100, 1000)

_TO_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_WORDS = {word: str(n) for n, word in enumerate(_TO_TWENTY.split())}
_TO_TWENTY_CHINESE = "零 一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八 十九 二十"
_CHINESE = {word: str(n) for n, word in enumerate(_TO_TWENTY_CHINESE.split())} | {"〇": "0", "两": "2", "兩": "2"}
_NUMBERS = _WORDS | _CHINESE
_COUNTED = re.compile(rf"([0-9]+|{'|'.join(_CHINESE)})\s*[个架艘辆条栋座幢幅片块棵株颗处所间只口台道]")
_LARGE = re.compile("(?:thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|[mb]illion|dozen|half|percent")
_LIMIT = re.compile(
    "than|over|under|above|below|upto|least|most|exceed(?:s|ing)|no|not|minus|[<>≤≥]=?"
)  # "more than 4" is not 4
_QUOTES = " \"'`*“”‘’«»"
# What NFKC would misread: 10² as 102, № and nº as "no".
_MISREAD = {ord(c): f"^{n}" for n, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {0x2116: "#", 0xBA: "°"}

_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])")
_UNIT = re.compile(
    rf"([0-9]|\b(?:{'|'.join(_WORDS)})|(?<![{''.join(_CHINESE)}百千万])(?:{'|'.join(_CHINESE)}))\s*"
    r"(?:m\^?2|sq\.? ?m(?:et(?:er|re)s?)?|square[ -]met(?:er|re)s?|met(?:er|re)s? squared|平方米)(?!\w)"
)
# "yes" or "no" and then a new word: neither "nothing", "no-one" and "no idea", nor "yes or no" and "no. 5".
_YES_NO = re.compile(
    r"(yes|no)(?!\w|['’-]\w| ?/| (?:or|and) (?:yes|no)\b|\.? ?(?:#?[0-9]|of\b)"
    r"| (?:one|idea|clue|doubt|way|answer|comment|information|data)\b)"
)
_RURAL_URBAN = re.compile(r"(?<![\w-])(?:rural|urban)(?![\w-])")  # not "suburban", not "semi-urban"
_DENIAL = re.compile(r"\b(?:no|not|non|never|neither|nor|cannot)\b|n['’]t\b")


def _classes(unit: str, step: int) -> tuple[list[str], dict[str, str]]:
    """-> the five names in order; every spelling of a class -> its name."""
    names, spelled = [f"0{unit}"], {}
    for low, high in zip((0, *EDGES), EDGES):
        names.append(f"between {low + step}{unit} and {high}{unit}")
        for start in (low, low + 1):  # the authors' code writes "between 10 and 100", others "11"
            spelled |= {f"between {start}{u} and {high}{unit}": names[-1] for u in (unit, "")}
    names.append(f"more than {EDGES[-1]}{unit}")
    return names, spelled | {name: name for name in names}


_CLASSES = {"count": _classes("", 1), "area": _classes("m2", 0)}


def _only_number(text: str, unit: str) -> str | None:
    """The one number (with `unit`) that a sentence says, once or repeated; else None.

    Every word with a digit, or of a number word, that is not plainly such a number makes the
    sentence unreadable: "3-4", "20k", "50%", "one hundred", "more than 10", "4 or more".
    """
    said = set()
    words = [w.strip(_QUOTES + ".,!?~≈") for w in re.split(r"[\s()\[\]{}:;/]+", text.replace("up to", "upto"))]
    for before, word, after in zip(["", *words], words, [*words[1:], ""]):
        match = re.fullmatch(rf"([0-9]+)(\.[0-9]+)?{unit}", word if unit else _WORDS.get(word, word))
        if match:
            whole, part = match[1].lstrip("0") or "0", (match[2] or "").rstrip("0").rstrip(".")
            if _LIMIT.fullmatch(before) or after in ("or", "+", "plus") or (part and not unit):  # a count is whole
                return None
            said.add(whole + part + unit)
        elif any(c.isdigit() for c in word) or any(w in _WORDS or _LARGE.fullmatch(w) for w in word.split("-")):
            return None
    return said.pop() if len(said) == 1 else None


def _spelled(text: str) -> str:
    """`normalise_answer` without its reading by type."""
    text = " ".join(unicodedata.normalize("NFKC", text.translate(_MISREAD)).casefold().split())
    text = text.strip(_QUOTES).rstrip(_QUOTES + ".,;:!?。")
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    text = _UNIT.sub(lambda m: _NUMBERS.get(m[1], m[1]) + "m2", text)
    if counted := _COUNTED.fullmatch(text):
        text = counted[1]
    return _NUMBERS.get(text, text)


def _says_more(truth: str, kind: str | None) -> bool:
    """Whether a truth begins with "yes" or "no" and goes on, "no damage", "no trees": an answer must say all of it."""
    if kind in OPEN or kind == "rural_urban":
        return False
    text = _spelled(truth)
    return text not in ("yes", "no") and bool(_YES_NO.match(text))


def normalise_answer(text, kind=None) -> str:
    """What an answer says, in the one spelling that answers are compared in.

    text: a string. kind: the question's type in RSVQA (presence, comp, count, rural_urban, area),
    or None; other types are read like None. NFKC, lower case, single spaces, no surrounding quotes
    or trailing punctuation; "1,234" is "1234"; "34 m²", "34 m^2", "34 square meters" and "34平方米" are "34m2";
    zero to twenty, 零 to 二十, "十二架" as the whole answer are digits. Then, by type:

    - rural_urban: a sentence with one of the two words, and no denial, says that word;
    - count: a sentence with one whole number (digits, zero to twenty) says that number;
    - area: a sentence with one number, and that in square metres, says that area;
    - else: a leading "yes" or "no" that is a whole word says yes or no.

    What is none of these stays a text, and is wrong where the truth is another: nothing is guessed.
    "No buildings" is not 0, "none" and "no idea" are not "no", "more than 10" is not 10.
    Raises ValueError where `text` is not a string. Idempotent for a given `kind`.
    """
    if not isinstance(text, str):
        raise ValueError(f"text: expected a string, got {type(text).__name__}")
    text = _spelled(text)
    if kind == "rural_urban":
        said = set(_RURAL_URBAN.findall(text))
        return said.pop() if len(said) == 1 and not _DENIAL.search(text) else text
    if kind in OPEN:
        return _only_number(text, "m2" if kind == "area" else "") or text
    said = _YES_NO.match(text)
    return said[1] if said else text


def bucket(answer, kind) -> str:
    """The class of a count or an area in RSVQA (Lobry et al. 2020, arXiv:2003.07333).

    answer: a string; kind: the question's type. Each class holds its upper edge and not its lower
    one, as in the authors' code (github.com/syvlo/RSVQA, VocabEncoder): 0; (0, 10]; (10, 100];
    (100, 1000]; above. count: "0", "between 1 and 10", "between 11 and 100", "between 101 and 1000",
    "more than 1000", whole numbers only. area: "0m2", "between 0m2 and 10m2", "between 10m2 and
    100m2", "between 100m2 and 1000m2", "more than 1000m2", so 10.5m2 lies in the third.

    A class stays what it is; one with its lower end spelled the other way ("between 10 and 100",
    "between 11m2 and 100m2") gets the name above. What cannot be read, and any other type, comes
    back unchanged. Raises ValueError where `answer` is not a string.
    """
    text = normalise_answer(answer, kind)
    if kind not in OPEN:
        return answer
    names, spelled = _CLASSES[kind]
    number = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)m2" if kind == "area" else "([0-9]+)", text)
    if not number:
        return spelled.get(text, answer)
    value = float(number[1])
    return names[1 + bisect_left(EDGES, value) if value else 0]


def _strings(value, name: str) -> list[str]:
    value = list(value)
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected strings, got {type(text).__name__} at {i}")
    return value


def _same_length(**arguments):
    lengths = [len(value) for value in arguments.values()]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(f"{', '.join(arguments)}: expected equal lengths of at least 1, got {lengths}")


def _image_codes(images) -> np.ndarray:
    """Ids of any kind -> 0..G-1. numpy and torch scalars by value: a tensor's own hash is its identity."""
    ids = [i.item() if hasattr(i, "item") else i for i in images]
    try:
        code = {image: n for n, image in enumerate(dict.fromkeys(ids))}
    except TypeError as error:
        raise ValueError(f"images: expected ids that can be keys of a dictionary ({error})") from None
    return np.array([code[i] for i in ids], np.int64)


def is_right(answer: str, truth: str, kind: str | None = None, protocol: str = "exact") -> bool:
    """Whether an answer, normalised, equals the truth, under one of PROTOCOLS (see `rsvqa_scores`). Where the truth is not
    "yes" or "no" but begins so ("no damage"), the answer must say all of it."""
    if _says_more(truth, kind):
        return _spelled(answer) == _spelled(truth)
    said, true = (normalise_answer(text, kind) for text in (answer, truth))
    return bucket(said, kind) == bucket(true, kind) if kind in PROTOCOLS[protocol] else said == true


def rsvqa_scores(answers, truths, kinds, images, *, seed=0, samples=1000) -> dict:
    """Accuracy by question type, over all questions (micro) and over types (macro), with intervals.

    answers, truths, kinds: M strings each; images: M ids (names, numbers, tuples). The truth may be
    a number or a class. Three protocols: `exact` compares `normalise_answer`; `areas` compares areas
    by `bucket` and the rest as `exact`; `bucketed` counts, too. The paper's figures (overall and average
    accuracy: micro and macro) are `bucketed` on the low-resolution set and `areas` on the
    high-resolution set, where its code groups areas only.

    Each protocol has `micro`, `macro` (mean of the accuracies per type), `micro_closed` and
    `macro_closed` (the same without count and area; None where nothing else was asked), each with
    its `_interval`, and `types`: {kind: {"accuracy", "interval", "count"}}, in alphabetical order.
    `count_mae`: mean |answer - truth| of the count questions where both are whole numbers (at most
    15 digits: a longer answer is a model that does not stop, and one would be the whole mean);
    `count_mae_share`: those as a share of the count questions whose truth is a number, for an error
    is easily small where only the sure are answered. Each is None where it would be a mean of
    nothing. `questions`, `images`: how many.

    Intervals are 95%, by image, all from the same `samples` resamplings. A type that no drawn image
    asks about is left out of that resample's macro mean, and the resample out of that type's
    interval; if no resample has it, its interval has no width. Raises ValueError for unequal or no
    lengths, for anything but strings, and for ids that are not hashable.
    """
    answers, truths, kinds = _strings(answers, "answers"), _strings(truths, "truths"), _strings(kinds, "kinds")
    images = list(images)
    _same_length(answers=answers, truths=truths, kinds=kinds, images=images)
    image, types = _image_codes(images), sorted(set(kinds))
    groups, width = int(image.max()) + 1, len(types)
    code = {kind: n for n, kind in enumerate(types)}
    cell = image * width + np.array([code[kind] for kind in kinds])  # (M,): image and type in one number
    asked = np.bincount(cell, minlength=groups * width).reshape(groups, width).astype(np.float64)
    closed = np.array([kind not in OPEN for kind in types])

    pairs = [list(zip(texts, kinds)) for texts in (answers, truths)]
    reading = {pair: normalise_answer(*pair) for pair in {*pairs[0], *pairs[1]}}  # few answers, said many times
    more = {pair: _spelled(pair[0]) for pair in {*pairs[1]} if _says_more(*pair)}
    sums, counts = [], []
    for classed in PROTOCOLS.values():
        table = {pair: bucket(text, pair[1]) if pair[1] in classed else text for pair, text in reading.items()}
        same = (_spelled(a[0]) == more[t] if t in more else table[a] == table[t] for a, t in zip(*pairs))
        right = np.fromiter(same, np.float64, len(kinds))
        right = np.bincount(cell, right, groups * width).reshape(groups, width)
        for part, out in ((right, sums), (asked, counts)):  # columns: each type, all, all closed
            out += [part, part.sum(1, keepdims=True), part[:, closed].sum(1, keepdims=True)]

    said = [[reading[pair] for pair in side] for side in pairs]
    number = [np.array([bool(re.fullmatch("[0-9]{1,15}", text)) for text in side]) for side in said]
    numeric_truth = number[1] & np.array([kind == "count" for kind in kinds])
    both = np.flatnonzero(number[0] & numeric_truth)
    errors = np.array([abs(float(said[0][i]) - float(said[1][i])) for i in both])
    sums.append(np.bincount(image[both], errors, groups)[:, None])
    counts.append(np.bincount(image[both], minlength=groups)[:, None])

    sums, counts = np.concatenate(sums, 1), np.concatenate(counts, 1)
    drawn = _resampled_means(sums, counts, samples, seed)
    with np.errstate(invalid="ignore"):
        means = np.vstack([sums.sum(0) / counts.sum(0), drawn])  # row 0: the data as they are

    def mean_of_types(part):
        with np.errstate(invalid="ignore"):
            return np.nansum(part, 1) / (~np.isnan(part)).sum(1)

    def value_and_interval(column):
        if np.isnan(column[0]):
            return None, None
        seen = column[1:][~np.isnan(column[1:])]
        return float(column[0]), _percentiles(seen if seen.size else column[:1], 0.95)

    result = {}
    for protocol, part in zip(PROTOCOLS, np.split(means[:, :-1], len(PROTOCOLS), axis=1)):
        by_type, scores = part[:, :width], {}
        for name, column in {
            "micro": part[:, width],
            "macro": mean_of_types(by_type),
            "micro_closed": part[:, width + 1],
            "macro_closed": mean_of_types(by_type[:, closed]),
        }.items():
            scores[name], scores[f"{name}_interval"] = value_and_interval(column)
        scores["types"] = {}
        for n, kind in enumerate(types):
            accuracy, interval = value_and_interval(by_type[:, n])
            scores["types"][kind] = {"accuracy": accuracy, "interval": interval, "count": int(asked[:, n].sum())}
        result[protocol] = scores
    result["count_mae"], result["count_mae_interval"] = value_and_interval(means[:, -1])
    result["count_mae_share"] = len(both) / int(numeric_truth.sum()) if numeric_truth.any() else None
    return result | {"questions": len(answers), "images": groups}


def mcnemar(before, after, images=None, seed=0) -> dict:
    """Whether a second model answers the same questions better than a first (McNemar 1947).

    before, after: (M,) true where each was right; images: M ids, or None: every question alone.
    `gained`: wrong before and right after; `lost`: the reverse. `p`: exact two-sided binomial test
    that both are equally likely, 2 P[X <= min(gained, lost)] with X ~ B(gained + lost, 1/2), at most
    1; below 1e-308 it is 0. `difference`: accuracy after minus before, -1 to 1;
    `difference_interval`: 95%, by image.

    The p-value takes the questions as independent, which those of one image are not, and is then
    too small; the interval resamples images. Where the two disagree, believe the interval.
    Raises ValueError for unequal or no lengths and for values other than true and false.
    """
    right = []
    for name, value in (("before", before), ("after", after)):
        array = _array(value, name, 1)
        if not np.isin(array, (0, 1)).all():
            raise ValueError(f"{name}: expected true or false, got {array[~np.isin(array, (0, 1))][0]}")
        right.append(array)
    before, after = right
    images = range(len(before)) if images is None else list(images)
    _same_length(before=before, after=after, images=images)
    change = after - before
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    total, fewer = gained + lost, min(gained, lost)
    i = np.arange(1, fewer + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((total - i + 1) / i))])  # log C(total, 0..fewer)
    tail = float(np.exp(log_choose - total * math.log(2)).sum())  # in logarithms: C(1e5, 5e4) has 30,000 digits
    return {
        "gained": gained,
        "lost": lost,
        "p": min(1.0, 2 * tail),
        "difference": float(change.mean()),
        "difference_interval": bootstrap_interval(change, _image_codes(images), seed=seed),
    }


def majority_answers(answers, kinds) -> dict:
    """The most frequent answer to each type of question: what a model scores that sees no image.

    answers, kinds: M strings each, of the *training* split. -> {kind: normalised answer}, ties by
    alphabetical order, and under the key None the most frequent answer of all, for a type that
    training never asked: `majority.get(kind, majority[None])`. The majority of numbers is not that of
    classes (0 is the most frequent count, "between 1 and 10" the most frequent class): for the
    `bucketed` protocol pass `bucket(answer, kind)` as answers. Raises ValueError for unequal or no
    lengths and for anything but strings.
    """
    answers, kinds = _strings(answers, "answers"), _strings(kinds, "kinds")
    _same_length(answers=answers, kinds=kinds)
    counts = {}
    for pair, times in Counter(zip(answers, kinds)).items():
        for kind in (pair[1], None):
            said = _spelled(pair[0]) if _says_more(*pair) else normalise_answer(*pair)
            counts.setdefault(kind, Counter())[said] += times
    return {kind: min(said, key=lambda text: (-said[text], text)) for kind, said in counts.items()}


# ---------------------------------------------------------------------------------------------
# Objects that captions name


def object_mentions(captions, present, words: dict[str, list[str]], ignore=(), *, samples=1000, seed=0) -> dict:
    """Whether captions name the objects that are there: CHAIR (Rohrbach et al. 2018, "Object hallucination in image
    captioning"), turned round, and recall.

    captions (N texts); present (N lists of the objects in each image); words: {object: words that name it}; ignore: phrases
    taken out of a caption first ("no road", "parking lot"). A word counts once a caption, whole words in scripts that have
    spaces. Returns precision (1 - CHAIR_i: named objects that are there), recall (objects that are named), hallucinating
    (CHAIR_s: captions that name one that is not there), named and present (counts), and the intervals of precision and
    recall over images; precision is None where nothing is named. Raises ValueError: other lengths, an object without words.
    """
    captions = _strings(captions, "captions")
    if len(captions) != len(present):
        raise ValueError(f"object_mentions: {len(captions)} captions, {len(present)} lists of objects")
    if unknown := {name for row in present for name in row} - words.keys():
        raise ValueError(f"object_mentions: no words for {sorted(unknown)}")

    def pattern(phrases):
        ordered = sorted(phrases, key=len, reverse=True)  # "storage tank" before "tank"
        bounded = (rf"\b{re.escape(p)}\b" if p.isascii() else re.escape(p) for p in ordered)
        return re.compile("|".join(bounded) or r"(?!)", re.IGNORECASE)

    owner = {word.lower(): name for name, listed in words.items() for word in listed}
    dropped, wanted = pattern(ignore), pattern(owner)
    counts = []  # right, named, present of each image
    for text, there in zip(captions, present):
        named = {owner.get(word.lower()) for word in wanted.findall(dropped.sub(" | ", text))} - {None}  # None: "shıps"
        counts.append((len(named & set(there)), len(named), len(set(there))))
    right, named, there = np.array(counts, dtype=float).reshape(-1, 3).T
    drawn = _resampled_means(np.stack([right, right], 1), np.stack([named, there], 1), samples, seed)

    def share(total, means):
        if not total.sum():
            return None, None
        return float(right.sum() / total.sum()), _percentiles(means[~np.isnan(means)], 0.95)

    (precision, precision_interval), (recall, recall_interval) = map(share, (named, there), drawn.T)
    return {
        "precision": precision, "precision_interval": precision_interval, "recall": recall, "recall_interval": recall_interval,
        "hallucinating": float((named > right).mean()), "named": int(named.sum()), "present": int(there.sum()),
    }  # fmt: skip
