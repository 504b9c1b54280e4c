"""losses.py: every loss against loops in plain Python, gradient caching against autograd, mining by brute force."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from losses import (
    Relations,
    backward_through_embeddings,
    count_terms,
    infonce_loss,
    match_loss,
    mine_negatives,
    sigmoid_loss,
    triplet_loss,
)  # fmt: skip
from train_match import first_of_each, split_batch

# ----------------------------------------------------------------------------------------------------
# A batch: 5 images, 9 texts; text 100 is true of two images, some triplets have no negative

SCENE_TEXTS = {7: [100, 101], 3: [102, 103, 104], 9: [100, 105], 1: [106], 4: [107]}
TRIPLETS = [(7, 100, 102), (7, 101, -1), (3, 103, 106), (3, 102, 107), (9, 105, 108), (9, 100, -1), (1, 106, 101)]
TRIPLETS += [(4, 107, 100)]
TEXT_IDS = [100, 101, 102, 106, 103, 107, 105, 108, 104]  # 108 is nobody's, in the batch as a negative


def relations() -> Relations:
    width = max(map(len, SCENE_TEXTS.values()))
    table = [[*texts, *[-1] * (width - len(texts))] for texts in SCENE_TEXTS.values()]
    return Relations(
        torch.tensor(list(SCENE_TEXTS)), torch.tensor(table), torch.tensor(TEXT_IDS), torch.tensor(TRIPLETS)
    )


def embeddings(seed: int, dim: int = 6, spread: float = 1.0):
    """Unit rows in double precision, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(dim, generator=generator, dtype=torch.double)
    made = []
    for count in (len(SCENE_TEXTS), len(TEXT_IDS)):
        rows = centre + spread * torch.randn(count, dim, generator=generator, dtype=torch.double)
        made.append(F.normalize(rows, dim=-1).requires_grad_())
    return made


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b))


def true_of(scene, text) -> bool:
    return text in SCENE_TEXTS[scene]


def slow_triplet(image, text, margin, in_batch):
    vector = dict(zip(SCENE_TEXTS, image)) | {("t", t): row for t, row in zip(TEXT_IDS, text)}
    total = torch.zeros((), dtype=torch.double)
    for scene, positive, negative in TRIPLETS:
        a, p = vector[scene], vector["t", positive]
        if negative >= 0:
            total = total + (margin + (1 - cosine(a, p)) - (1 - cosine(a, vector["t", negative]))).clamp(min=0)
        if in_batch == "none":
            continue
        other_texts = [cosine(a, vector["t", t]) for t in TEXT_IDS if not true_of(scene, t)]
        other_images = [cosine(vector[s], p) for s in SCENE_TEXTS if not true_of(s, positive)]
        for candidates in (other_texts, other_images):
            if in_batch == "hardest":
                chosen = max(candidates, key=lambda c: c.item())
            else:
                further = [c for c in candidates if bool(c < cosine(a, p))]
                chosen = max(further, key=lambda c: c.item()) if further else min(candidates, key=lambda c: c.item())
            total = total + (margin - cosine(a, p) + chosen).clamp(min=0)
    return total


def slow_infonce(image, text, scale):
    vector = dict(zip(SCENE_TEXTS, image)) | {("t", t): row for t, row in zip(TEXT_IDS, text)}
    total = torch.zeros((), dtype=torch.double)
    for scene, positive, _ in TRIPLETS:
        a, p = vector[scene], vector["t", positive]
        s = scale * cosine(a, p)
        texts = [scale * cosine(a, vector["t", t]) for t in TEXT_IDS if not true_of(scene, t)]
        images = [scale * cosine(vector[i], p) for i in SCENE_TEXTS if not true_of(i, positive)]
        for others in (texts, images):
            total = total - torch.log(s.exp() / (s.exp() + sum(o.exp() for o in others))) / 2
    return total


def slow_sigmoid(image, text, scale, bias):
    total = torch.zeros((), dtype=torch.double)
    for scene, a in zip(SCENE_TEXTS, image):
        for t, row in zip(TEXT_IDS, text):
            z = 1 if true_of(scene, t) else -1
            total = total - torch.log(1 / (1 + torch.exp(-z * (scale * cosine(a, row) + bias))))
    return total


def same(fast, slow, *inputs):
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), rel=1e-10, abs=1e-12)
    for a, b in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_relations():
    found = relations()
    expected = [[true_of(s, t) for t in TEXT_IDS] for s in SCENE_TEXTS]
    assert found.positive.tolist() == expected
    assert [list(SCENE_TEXTS)[i] for i in found.image_row] == [s for s, _, _ in TRIPLETS]
    assert [TEXT_IDS[i] for i in found.text_row] == [p for _, p, _ in TRIPLETS]
    assert [-1 if i < 0 else TEXT_IDS[i] for i in found.negative_row] == [n for _, _, n in TRIPLETS]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("in_batch", ["none", "semi_hard", "hardest"])
@pytest.mark.parametrize("spread", [0.05, 1.0])  # close together, as at a cold start, and spread
def test_triplet_loss(seed, in_batch, spread):
    image, text = embeddings(seed, spread=spread)
    fast = triplet_loss(image, text, relations(), margin=0.2, in_batch=in_batch)
    same(fast, slow_triplet(image, text, 0.2, in_batch), image, text)


@pytest.mark.parametrize("seed", range(4))
def test_infonce_loss(seed):
    image, text = embeddings(seed)
    scale = torch.tensor(8.0, dtype=torch.double, requires_grad=True)
    same(infonce_loss(image, text, relations(), scale=scale), slow_infonce(image, text, scale), image, text, scale)


@pytest.mark.parametrize("seed", range(4))
def test_sigmoid_loss(seed):
    image, text = embeddings(seed)
    scale = torch.tensor(5.0, dtype=torch.double, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.double, requires_grad=True)
    fast = sigmoid_loss(image, text, relations(), scale=scale, bias=bias)
    same(fast, slow_sigmoid(image, text, scale, bias), image, text, scale, bias)


def pair_batch(scores):
    """Image i with text i, and a score matrix by choice: image = identity, text = columns of the scores."""
    n = len(scores)
    ids = torch.arange(n)
    found = Relations(ids, ids[:, None], ids, torch.stack([ids, ids, torch.full((n,), -1)], 1))
    return torch.eye(n), torch.tensor(scores).T.contiguous(), found


def test_semi_hard_and_hardest_picks():
    # Image 0: positive 0.6; texts at 0.9 (harder), 0.55 (semi-hard), 0.1. Every other row and column is far apart.
    scores = [[0.6, 0.9, 0.55, 0.1], [-1, 2, -1, -1], [-1, -1, 2, -1], [-1, -1, -1, 2]]
    image, text, found = pair_batch([[float(s) for s in row] for row in scores])
    margin = 0.2
    assert float(triplet_loss(image, text, found, margin=margin)) == 0
    semi = float(triplet_loss(image, text, found, margin=margin, in_batch="semi_hard"))
    assert semi == pytest.approx(margin - 0.6 + 0.55)
    hardest = float(triplet_loss(image, text, found, margin=margin, in_batch="hardest"))
    assert hardest == pytest.approx(margin - 0.6 + 0.9)
    # No negative is further than the positive: the easiest of them.
    image, text, found = pair_batch([[0.1, 0.9, 0.3], [-1.0, 2, -1], [-1.0, -1, 2]])
    semi = float(triplet_loss(image, text, found, margin=margin, in_batch="semi_hard"))
    assert semi == pytest.approx(margin - 0.1 + 0.3)


def test_false_negatives_have_no_part():
    """A text that is true of both images, and another caption of the same image, change nothing where they are."""
    scene_ids, texts = torch.tensor([0, 1]), torch.tensor([10, 11, 12])
    triplets = torch.tensor([[0, 10, -1], [1, 12, -1]])
    shared = Relations(scene_ids, torch.tensor([[10, 11], [11, 12]]), texts, triplets)
    torch.manual_seed(0)
    image = F.normalize(torch.randn(2, 4), dim=-1)
    text = F.normalize(torch.randn(3, 4), dim=-1).requires_grad_()
    for loss in (
        infonce_loss(image, text, shared, scale=torch.tensor(10.0)),
        triplet_loss(image, text, shared, margin=2.0, in_batch="hardest"),
        triplet_loss(image, text, shared, margin=2.0, in_batch="semi_hard"),
    ):
        (gradient,) = torch.autograd.grad(loss, text)
        assert (gradient[1] == 0).all() and (gradient[0] != 0).any()
    # Where every text is true of every image there is no negative at all: no loss, no gradient, no NaN.
    one = Relations(scene_ids, torch.tensor([[10, 11, 12]] * 2), texts, triplets)
    for loss in (
        infonce_loss(image, text, one, scale=torch.tensor(10.0)),
        triplet_loss(image, text, one, margin=1.0, in_batch="semi_hard"),
    ):
        assert float(loss.detach()) == 0
        assert (torch.autograd.grad(loss, text)[0] == 0).all()


def config(**changed):
    known = {"loss": "triplet", "margin": 0.2, "in_batch_negatives": "none"}
    return SimpleNamespace(**known | changed)


def test_match_loss_names_bound_and_terms():
    image, text = embeddings(0)
    out = {"image": image, "text": text, "logit_scale": torch.tensor(9.0), "logit_bias": torch.tensor(-2.0)}
    found = relations()
    high = torch.tensor(100.0)  # CLIP's bound on the inverse temperature: e^9 is above it
    pairs = [
        (config(), triplet_loss(image, text, found, margin=0.2)),
        (
            config(in_batch_negatives="hardest"),
            triplet_loss(image, text, found, margin=0.2, in_batch="hardest"),
        ),
        (config(loss="infonce"), infonce_loss(image, text, found, scale=high)),
        (config(loss="sigmoid"), sigmoid_loss(image, text, found, scale=high, bias=out["logit_bias"])),
    ]
    for settings, expected in pairs:
        assert float(match_loss(out, found, settings).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    batch = {"triplets": torch.tensor(TRIPLETS), "scene_ids": torch.tensor(list(SCENE_TEXTS))}
    counts = [count_terms(batch, settings) for settings, _ in pairs]
    assert counts == [6, 6 + 2 * 8, 8, 5]


# ----------------------------------------------------------------------------------------------------
# Gradient caching, on the real model


@pytest.fixture(scope="module")
def batch(encoder):
    """8 images of three sizes and 20 texts (one of them of two images, 4 extra negatives), as a collator makes it."""
    from data import pixel_batch, token_batch

    model = encoder()
    rng = np.random.default_rng(0)
    sizes = [(56, 56), (28, 84), (84, 56)]
    images = [rng.integers(0, 255, (*sizes[i % 3], 3), dtype=np.uint8) for i in range(8)]
    words = ["a", "farm", "field", "next", "to", "road", "with", "two", "vehicles", "river", "农田", "buildings"]
    texts = [" ".join(rng.choice(words, int(rng.integers(1, 12)))) + f" {i}" for i in range(20)]
    scene_texts = [[2 * i, 2 * i + 1] for i in range(8)]
    scene_texts[5][1] = 0  # equal texts share an id
    triplets = [(i, t, 16 + i % 4 if t % 2 else -1) for i, own in enumerate(scene_texts) for t in own]
    return {
        "scene_ids": torch.arange(8),
        "scene_texts": torch.tensor(scene_texts),
        "text_ids": torch.arange(20),
        "triplets": torch.tensor(triplets),
        **pixel_batch(images, model.processor),
        **token_batch(model.tokenize(texts)[0], model.tokenizer.pad_token_id),
    }


LOSSES = {
    "triplet": {"loss": "triplet", "in_batch_negatives": "semi_hard"},
    "infonce": {"loss": "infonce"},
    "sigmoid": {"loss": "sigmoid"},
}
MODES = {"full": {"image_tower": "full", "text_tower": "full"}, "lora": {}}


def run(model, batch, settings, chunk, seed=5):
    """(loss, {name: gradient}) of a step with gradient caching."""
    found = Relations(*(batch[name] for name in ("scene_ids", "scene_texts", "text_ids", "triplets")))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = backward_through_embeddings(
        model, split_batch(batch, chunk), lambda out: match_loss(out, found, settings), lambda value: value.backward()
    )
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model, batch, settings, chunk, seed=5):
    """The same with one graph over all chunks: what autograd says of it."""
    found = Relations(*(batch[name] for name in ("scene_ids", "scene_texts", "text_ids", "triplets")))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    outs = [model(**part) for part in split_batch(batch, chunk)]
    out = outs[0] | {name: torch.cat([o[name] for o in outs]) for name in ("image", "text")}
    loss = match_loss(out, found, settings)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one, other, tolerance=1e-5):
    # Under DDP a parameter may have a zero where the plain run has none, never the other way round.
    assert set(other[1]) <= set(one[1])
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for name, gradient in one[1].items():
        expected = other[1].get(name, torch.zeros_like(gradient))
        scale = max(float(expected.abs().max()), 1e-3 * max(float(g.abs().max()) for g in other[1].values()))
        assert float((gradient - expected).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_caching_equals_one_chunk(encoder, batch, loss, mode):
    settings = config(**LOSSES[loss])
    model = encoder(**LOSSES[loss], **MODES[mode], lora_dropout=0.0)
    model.train()
    assert len(split_batch(batch, 3)) == 3
    whole = plain(model, batch, settings, 0)
    assert whole[1] and any(float(g.abs().max()) > 0 for g in whole[1].values())
    for chunk in (0, 3, 1):
        assert_same_gradients(run(model, batch, settings, chunk), whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_caching_repeats_dropout(encoder, batch, loss):
    settings = config(**LOSSES[loss])
    model = encoder(**LOSSES[loss], lora_dropout=0.3, projection_dropout=0.2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: LoRA's dropout would change nothing
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    whole = plain(model, batch, settings, 3)
    assert plain(model, batch, settings, 3, seed=6)[0] != pytest.approx(whole[0], rel=1e-4)  # dropout is at work
    assert_same_gradients(run(model, batch, settings, 3), whole)
    assert_same_gradients(run(model, batch, settings, 0), plain(model, batch, settings, 0))


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of activations that autograd holds at once, at most."""

    def __init__(self):
        self.now = self.most = 0
        super().__init__(self.pack, lambda box: box.tensor)

    def pack(self, tensor):
        saved, size = self, tensor.numel() * tensor.element_size() if tensor.grad_fn is not None else 0
        saved.now += size
        saved.most = max(saved.most, saved.now)

        class Box:
            def __init__(self):
                self.tensor = tensor

            def __del__(self):
                saved.now -= size

        return Box()


def test_gradient_caching_holds_fewer_activations(encoder, batch):
    model = encoder(image_tower="full", text_tower="full").train()
    settings = config(loss="infonce")
    peaks = {}
    for chunk in (0, 4, 1):
        saved = Saved()
        with saved:
            run(model, batch, settings, chunk)
        peaks[chunk] = saved.most
    assert peaks[4] < 0.7 * peaks[0] and peaks[1] < 0.3 * peaks[0], peaks


def test_split_batch_keeps_everything_in_order(batch):
    for chunk in (0, 1, 3, 5, 8, 100):
        parts = split_batch(batch, chunk)
        assert len(parts) == (1 if not chunk else math.ceil(8 / chunk))
        assert torch.equal(torch.cat([p["pixel_values"] for p in parts]), batch["pixel_values"])
        assert torch.equal(torch.cat([p["image_grid_thw"] for p in parts]), batch["image_grid_thw"])
        assert torch.equal(torch.cat([p["text_lengths"] for p in parts]), batch["text_lengths"])
        for part in parts:
            assert len(part["pixel_values"]) == int(part["image_grid_thw"].prod(1).sum())
            assert part["input_ids"].shape == (len(part["text_lengths"]), int(part["text_lengths"].max()))
    few = {"scene_ids": torch.arange(6), "text_ids": torch.arange(2)}
    few |= {"image_features": torch.arange(6.0)[:, None], "text_features": torch.arange(2.0)[:, None]}
    assert [len(part["text_features"]) for part in split_batch(few, 1)] == [1, 1]  # no chunk without a text


def test_two_micro_batches_equal_one_batch(encoder, batch):
    """Sums over terms of the whole step, so unequal halves (here 5 and 3 images) weigh as their terms do."""
    settings = config()
    model = encoder(image_tower="full", text_tower="full").train()
    total = count_terms(batch, settings)

    def part_of(i0, i1):
        chosen = (batch["triplets"][:, 0] >= i0) & (batch["triplets"][:, 0] < i1)
        triplets = batch["triplets"][chosen]
        ids = triplets[:, 1:].unique()
        ids = ids[ids >= 0]
        patches = batch["image_grid_thw"].prod(1)
        p0, p1 = int(patches[:i0].sum()), int(patches[:i1].sum())
        return {
            "scene_ids": batch["scene_ids"][i0:i1],
            "scene_texts": batch["scene_texts"][i0:i1],
            "text_ids": ids,
            "triplets": triplets,
            "pixel_values": batch["pixel_values"][p0:p1],
            "image_grid_thw": batch["image_grid_thw"][i0:i1],
            "input_ids": batch["input_ids"][ids],
            "text_lengths": batch["text_lengths"][ids],
        }

    halves = [part_of(0, 5), part_of(5, 8)]
    assert sum(count_terms(half, settings) for half in halves) == total
    loss, gradients = run(model, batch, settings, 0)
    sums = [run(model, half, settings, 0) for half in halves]
    added = {name: sums[0][1].get(name, 0) + sums[1][1].get(name, 0) for name in gradients}
    assert_same_gradients((sums[0][0] + sums[1][0], added), (loss, gradients))
    assert loss / total > 0


def test_first_of_each():
    assert first_of_each(torch.tensor([5, 3, 5, 9, 3, 1])).tolist() == [0, 1, 3, 5]


# ----------------------------------------------------------------------------------------------------
# Mining


@pytest.mark.parametrize("kinds", [None, np.arange(20) % 3])
@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 2.0])
def test_mine_negatives_by_brute_force(margin, kinds):
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(7, 4)), rng.normal(size=(20, 4))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    scene_texts = [rng.choice(20, 3, replace=False) for _ in range(7)]
    rows = [(i, int(t)) for i, own in enumerate(scene_texts) for t in own]
    expected = []
    for i, t in rows:
        positive = image[i] @ text[t]
        best, chosen = -np.inf, -1
        for candidate in range(20):
            score = image[i] @ text[candidate]
            other = kinds is not None and kinds[candidate] != kinds[t]
            if not other and candidate not in scene_texts[i] and score <= positive - margin and score > best:
                best, chosen = score, candidate
        expected.append(chosen)
    found = mine_negatives(image, text, scene_texts, rows, margin=margin, kinds=kinds)
    assert found.tolist() == expected
    assert (margin < 2) == (found >= 0).any()


def test_a_candidate_within_the_margin_is_taken_for_true():
    image = np.array([[1.0, 0.0]])
    text = np.array([[0.8, 0.6], [0.79, 0.61], [0.7, 0.71], [0.9, 0.43]])  # 0 is the positive
    assert mine_negatives(image, text, [np.array([0])], [(0, 0)], margin=0.05).tolist() == [2]
    assert mine_negatives(image, text, [np.array([0])], [(0, 0)], margin=0.0).tolist() == [1]
    assert mine_negatives(image, text, [np.array([0])], [(0, 0)], margin=0.2).tolist() == [-1]


def test_what_is_true_of_an_image_is_mined_for_none_of_its_rows():
    image, text = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    assert mine_negatives(image, text, [np.array([0, 1])], [(0, 0)], margin=0.0).tolist() == [2]


def test_a_candidate_just_at_the_margin_is_taken():
    image, text = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [0.5, 0.75**0.5]])
    assert mine_negatives(image, text, [np.array([0])], [(0, 0)], margin=0.5).tolist() == [1]
