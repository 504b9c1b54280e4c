"""Scores with their uncertainty, on plain numpy.

Two habits hold throughout. Every mean carries a bootstrap interval that resamples whole *images*:
the texts of one image are right or wrong together, and an interval that takes them for independent
is too narrow. And ties go against the model: a collapsed encoder gives equal scores everywhere, and
must come out worst, not first.

Scores are fractions from 0 to 1 (papers print percent). Arguments may be lists, numpy arrays or
torch tensors of any device and float type. What cannot be scored (wrong shape, NaN, an index out of
range, nothing at all) raises a `ValueError` that says which argument and why.
"""

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
    cluster came up), so a chunk of draws is one matrix product.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    total, rng, means = len(sums), np.random.default_rng(seed), []
    chunk = max(1, (BLOCK >> 2) // total)
    for start in range(0, samples, chunk):
        rows = min(chunk, samples - start)
        drawn = rng.integers(0, total, (rows, total)) + total * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * total).reshape(rows, total).astype(np.float64)
        means.append((weights @ sums) / (weights @ counts))
    return np.concatenate(means)


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
    sums, counts = values, np.ones_like(values)
    if groups is not None:
        groups = _array(groups, "groups", 1, "any")
        if len(groups) != len(values):
            raise ValueError(f"groups: expected one per value ({len(values)}), got {len(groups)}")
        group = np.unique(groups, return_inverse=True)[1]
        sums, counts = np.bincount(group, values), np.bincount(group).astype(np.float64)
    return _percentiles(_resampled_means(sums[:, None], counts[:, None], samples, seed), level)


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
    `text_image` alone, as published tables do. Without `texts` the two agree.

    `chance_mR` is the exact expectation for a random order. Equal texts score equally and so come
    out together, ties against the model: with duplicates a model of no skill lies at or below it.
    """
    sides = []
    for name, value in (("image_embeddings", image_embeddings), ("text_embeddings", text_embeddings)):
        array = _array(value, name, 2)
        length = np.linalg.norm(array, axis=1, keepdims=True)
        if (length == 0).any():
            raise ValueError(f"{name}: row {int(np.argmin(length))} is all zeros and has no direction")
        sides.append((array / length).astype(np.float32))
    images, captions = sides
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
