"""Loss functions of the matcher, hard-negative mining, and gradient caching.

Every loss takes embeddings and *relations between ids*, so that it is the same on one process and over the
gathered batch of many, and returns a sum with the number of terms in it: the trainer divides by the terms of
the whole optimizer step, since a mean of micro-batch means is not the mean.
"""

from contextlib import nullcontext

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import get_device_states, set_device_states

LOG_SCALE_MOST = float(np.log(100))  # CLIP's bound (Radford et al. 2021, section 2.5)

# ----------------------------------------------------------------------------------------------------
# Relations


class Relations:
    """Who belongs to whom in a batch of B images and T texts.

    positive (B, T): the text is true of the image, whether it was listed under it or a listed text says the same
    (equal texts share an id). image_row, text_row, negative_row (M,): rows of each triplet; -1 for no negative.
    """

    def __init__(self, scene_ids, scene_texts, text_ids, triplets):
        self.positive = (scene_texts[:, :, None] == text_ids[None, None, :]).any(1)
        self.image_row = _rows(scene_ids, triplets[:, 0])
        self.text_row = _rows(text_ids, triplets[:, 1])
        self.negative_row = torch.where(triplets[:, 2] >= 0, _rows(text_ids, triplets[:, 2].clamp(min=0)), -1)


def _rows(ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Position in `ids` of each wanted id (a wanted id that is absent gives some position)."""
    order = torch.argsort(ids)
    place = torch.searchsorted(ids[order], wanted.contiguous()).clamp(max=len(ids) - 1)
    return order[place]


# ----------------------------------------------------------------------------------------------------
# Losses: (sum over terms, number of terms)


def triplet_loss(image, text, relations: Relations, *, margin: float, in_batch: str = "none") -> torch.Tensor:
    """Sum of max(0, margin + d(a, p) - d(a, n)) with cosine distance d = 1 - cos (Schroff et al. 2015, eq. 1).

    image (B, D), text (T, D): unit embeddings. Terms: each triplet's own negative; and, where `in_batch` is
    "semi_hard" or "hardest", one mined text for the image and one mined image for the text of each triplet. Semi-hard:
    the hardest of those further away than the positive (FaceNet, eq. 4), or the easiest where none is; hardest: VSE++
    (Faghri et al. 2018, eq. 6).
    """
    scores = image @ text.T  # (B, T)
    positive = scores[relations.image_row, relations.text_row]  # (M,)
    has = relations.negative_row >= 0
    own = scores[relations.image_row, relations.negative_row.clamp(min=0)]
    total = F.relu(margin - positive + own)[has].sum()
    if in_batch == "none":
        return total
    views = (
        (scores[relations.image_row], ~relations.positive[relations.image_row]),  # other texts for the image: (M, T)
        (scores.T[relations.text_row], ~relations.positive.T[relations.text_row]),  # other images for the text: (M, B)
    )
    for candidates, allowed in views:
        negative = _mine(candidates, allowed, positive, in_batch)
        total = total + F.relu(margin - positive + negative)[allowed.any(1)].sum()
    return total


def _mine(candidates, allowed, positive, how) -> torch.Tensor:
    """Score of the mined negative of each row: candidates, allowed (M, N), positive (M,) -> (M,)."""
    low = torch.finfo(candidates.dtype).min
    with torch.no_grad():
        legal = candidates.masked_fill(~allowed, low)
        pick = legal.argmax(1)
        if how == "semi_hard":
            easier = legal.masked_fill(legal >= positive[:, None], low)
            # Where every negative beats the positive there is no semi-hard one: the easiest pulls without collapse.
            easiest = candidates.masked_fill(~allowed, -low).argmin(1)
            pick = torch.where((easier > low).any(1), easier.argmax(1), easiest)
    return candidates.gather(1, pick[:, None]).squeeze(1)


def infonce_loss(image, text, relations: Relations, *, scale: torch.Tensor) -> torch.Tensor:
    """Sum over pairs of the symmetric multi-positive InfoNCE (van den Oord et al. 2018; Radford et al. 2021).

    For pair (i, p): -log e^{s_ip} / (e^{s_ip} + sum over texts not true of i e^{s_it}), and the same over images for the
    text, halved. Other positives of i are left out of the denominator: another caption of the image, or an equal
    text under another image, is no negative. `scale`: inverse temperature.
    """
    logits = scale * image @ text.T
    positive = logits[relations.image_row, relations.text_row]
    masked = logits.masked_fill(relations.positive, -torch.inf)
    texts = torch.cat([positive[:, None], masked[relations.image_row]], 1)  # (M, 1 + T)
    images = torch.cat([positive[:, None], masked.T[relations.text_row]], 1)  # (M, 1 + B)
    return ((texts.logsumexp(1) - positive) + (images.logsumexp(1) - positive)).sum() / 2


def sigmoid_loss(image, text, relations: Relations, *, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sum over all pairs of -log sigmoid(z (scale cos + bias)), z = 1 for true pairs, else -1 (SigLIP, Zhai et al. 2023)."""
    logits = scale * image @ text.T + bias
    return -F.logsigmoid(torch.where(relations.positive, logits, -logits)).sum()


def match_loss(out: dict[str, torch.Tensor], relations: Relations, config) -> torch.Tensor:
    """The loss `config.loss` names, summed over its terms; `out`: image, text, logit_scale (log), logit_bias."""
    if config.loss == "triplet":
        return triplet_loss(
            out["image"], out["text"], relations, margin=config.margin, in_batch=config.in_batch_negatives
        )
    scale = out["logit_scale"].clamp(max=LOG_SCALE_MOST).exp()
    if config.loss == "infonce":
        return infonce_loss(out["image"], out["text"], relations, scale=scale)
    return sigmoid_loss(out["image"], out["text"], relations, scale=scale, bias=out["logit_bias"])


def count_terms(batch: dict[str, torch.Tensor], config) -> int:
    """Number of terms `match_loss` sums over this batch, known before the forward pass."""
    triplets = batch["triplets"]
    if config.loss == "triplet":
        given = int((triplets[:, 2] >= 0).sum())
        return given + (0 if config.in_batch_negatives == "none" else 2 * len(triplets))
    return len(triplets) if config.loss == "infonce" else len(batch["scene_ids"])


# ----------------------------------------------------------------------------------------------------
# Gradient caching


class RandomState:
    """The random state of a forward pass, to run it again with the same dropout (as torch's checkpointing does)."""

    def __init__(self, *tensors):
        self.cpu = torch.get_rng_state()
        # torch asks for torch.mps.device, which there is not.
        self.devices, self.states = get_device_states(*[tensor for tensor in tensors if tensor.is_cuda])
        self.mps = torch.mps.get_rng_state() if any(tensor.is_mps for tensor in tensors) else None

    def __enter__(self):
        self.fork = torch.random.fork_rng(devices=self.devices, enabled=True)
        self.fork.__enter__()
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)

    def __exit__(self, *error):
        self.fork.__exit__(*error)


def backward_through_embeddings(model, chunks: list[dict], loss_of, backward, no_sync=nullcontext) -> torch.Tensor:
    """Gradient of a loss over the embeddings of all chunks, in the memory of one (GradCache, Gao et al. 2021, alg. 1).

    Each chunk is encoded without a graph, the loss is differentiated at the embeddings, then each chunk is encoded
    again, with the same dropout, and the cached gradient is sent through it: the gradient of the whole batch. One chunk
    keeps its graph and is encoded once.

    `model(**chunk)` -> dict of tensors (the first axis of "image" and "text" is theirs to concatenate, the others are
    shared); `loss_of(dict)` -> scalar; `backward(scalar)`; `no_sync()`: context in which gradients are not exchanged.
    Returns the loss, detached.
    """
    outs, states = [], []
    for chunk in chunks:
        states.append(RandomState(*[value for value in chunk.values() if torch.is_tensor(value)]))
        with torch.set_grad_enabled(len(chunks) == 1):
            outs.append(model(**chunk))
    leaves = [{key: value.detach().requires_grad_() for key, value in out.items()} for out in outs]
    whole = {
        key: torch.cat([leaf[key] for leaf in leaves]) if key in ("image", "text") else leaves[0][key]
        for key in leaves[0]
    }
    loss = loss_of(whole)
    loss.backward()
    for number, (chunk, state, leaf) in enumerate(zip(chunks, states, leaves)):
        last = number == len(chunks) - 1
        with nullcontext() if last else no_sync():
            if len(chunks) == 1:
                out = outs[0]
            else:
                with state:
                    out = model(**chunk)
            # Every output takes part, with weight zero where the loss does not use it: under DDP a parameter
            # without a gradient would leave the exchange of gradients waiting.
            parts = [(out[key] * (leaf[key].grad if leaf[key].grad is not None else 0)).sum() for key in out]
            backward(sum(part for part in parts if part.requires_grad))
    return loss.detach()


# ----------------------------------------------------------------------------------------------------
# Offline hard negatives


def mine_negatives(
    image: np.ndarray, text: np.ndarray, scene_texts: list[np.ndarray], rows: list[tuple[int, int]], *, margin: float,
    kinds: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """For each (scene, text) row the most similar text that is not of the scene.

    image (N, D), text (T, D): unit embeddings; `scene_texts[i]`: indices of the texts of scene i. A candidate must score
    at least `margin` (cosine) below the row's positive, else it is taken for a false negative ("positive-aware" mining,
    NV-Retriever, Moreira et al. 2024). kinds (T,): a negative is of the kind (the language) of the row's text. Returns
    (len(rows),) text indices, -1 where no text qualifies.
    """
    picked = np.full(len(rows), -1)
    kinds = np.zeros(len(text)) if kinds is None else kinds
    groups: dict[tuple, list[int]] = {}
    for number, (scene, own) in enumerate(rows):
        groups.setdefault((scene, kinds[own]), []).append(number)
    for (scene, kind), numbers in groups.items():
        scores = text @ image[scene]  # (T,)
        positives = scores[[rows[n][1] for n in numbers]]
        scores[scene_texts[scene]] = scores[kinds != kind] = -np.inf
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        for number, positive in zip(numbers, positives):
            place = np.searchsorted(-ranked, margin - positive)  # first score <= positive - margin
            if place < len(ranked) and np.isfinite(ranked[place]):
                picked[number] = order[place]
    return picked
