"""Train the matcher: which text belongs to which satellite image.

    python train_match.py                                   # preset full: Qwen2.5-VL-3B, CUDA
    python train_match.py --preset demo                     # small models on drawn scenes, two CPU cores
    python train_match.py --train_file captions.json --image_root images --num_train_epochs 5
    python train_match.py ... --resume_from_checkpoint output/training_.../checkpoint-200
    accelerate launch --config_file accelerate/ddp.yaml train_match.py ...

Leaves in output/training_YYYYMMDD_HHMMSS/: best_model/, checkpoint-N/, config.json, metrics.jsonl, results.json,
report.html, and TensorBoard events.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

import metrics
import report
from config import (
    InputError,
    MatchConfig,
    flag_value,
    keeps_scores,
    parse,
    use_files_of_training,
    user_errors,
)
from data import (
    FeatureStore,
    MatchCollator,
    MatchDataset,
    drop_unreadable,
    over_files,
    rows_digest,
    say_trained_images,
)
from imagery import ImageSettings, colour_histogram, read_image
from losses import LOG_SCALE_MOST, Relations, backward_through_embeddings, count_terms, match_loss, mine_negatives
from model import DualEncoder, pixel_store
from scenes import Scene, describe, is_chinese, load_json, load_splits, sample_scenes
from trainer import (
    Run,
    SceneTrainer,
    check_best_metric,
    dtype_of,
    gather_rows,
    own_folder,
    parameters_text,
    read_history,
)

IDS = ("scene_ids", "scene_texts", "text_ids", "triplets")
MINED, UNTRAINED = "mined_negatives.json", "untrained.json"  # what a run keeps of its first start


# ----------------------------------------------------------------------------------------------------
# The task


class MatchTask:
    """Loss and metrics of the matcher, for `trainer.SceneTrainer`."""

    def __init__(self, config: MatchConfig, evaluate):
        self.config, self.evaluate = config, evaluate

    def count(self, batch) -> int:
        return count_terms(batch, self.config)

    def step(self, trainer, model, batch, terms) -> torch.Tensor:
        """Forward and backward of one micro-batch: the loss of the batch gathered over all processes, whose gradient
        each process sends through its own embeddings. Equal to one process with the whole batch."""
        accelerator = trainer.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        ids = {name: gather_rows(accelerator, batch[name], -1) for name in IDS}
        scenes, texts = first_of_each(torch.cat(ids["scene_ids"])), first_of_each(torch.cat(ids["text_ids"]))
        relations = Relations(
            torch.cat(ids["scene_ids"])[scenes],
            torch.cat(ids["scene_texts"])[scenes],
            torch.cat(ids["text_ids"])[texts],
            torch.cat(ids["triplets"]),
        )

        def loss_of(out):
            whole = {}
            for name, kept in (("image", scenes), ("text", texts)):
                parts = gather_rows(accelerator, out[name])
                parts[rank] = out[name]  # the one slice that gradients flow to from here
                whole[name] = torch.cat(parts)[kept]
            for name in ("logit_scale", "logit_bias"):
                # DDP averages gradients: embeddings are scaled by the number of processes below, these are whole already.
                whole[name] = out[name] / world + (out[name] * (1 - 1 / world)).detach()
            return match_loss(whole, relations, self.config) / terms

        return backward_through_embeddings(
            model,
            split_batch(batch, self.config.grad_cache_chunk),
            loss_of,
            backward=lambda surrogate: accelerator.backward(surrogate * world),
            no_sync=partial(accelerator.no_sync, model),
        )


class BoundedScale(TrainerCallback):
    """CLIP's bound on the scale of the logits, after every step: the loss's own would end its gradient for good."""

    def on_optimizer_step(self, args, state, control, model=None, **_):
        model.logit_scale.data.clamp_(max=LOG_SCALE_MOST)


def first_of_each(ids: torch.Tensor) -> torch.Tensor:
    """Positions at which each id stands first, in order: (N,) -> (distinct,)."""
    unique, inverse = torch.unique(ids, return_inverse=True)
    first = torch.full((len(unique),), len(ids), device=ids.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(ids), device=ids.device), "amin")
    return first.sort().values


def split_batch(batch: dict[str, torch.Tensor], chunk: int) -> list[dict[str, torch.Tensor]]:
    """The model's part of a batch in pieces of at most `chunk` images and a like share of the texts."""
    images, texts = len(batch["scene_ids"]), len(batch["text_ids"])
    pieces = min(-(-images // chunk), images, texts) if chunk else 1
    result = []
    for k in range(pieces):
        i0, i1 = images * k // pieces, images * (k + 1) // pieces
        t0, t1 = texts * k // pieces, texts * (k + 1) // pieces
        part = {}
        if "image_features" in batch:
            part["image_features"] = batch["image_features"][i0:i1]
        else:
            patches = batch["image_grid_thw"].prod(-1)
            p0, p1 = int(patches[:i0].sum()), int(patches[:i1].sum())
            part |= {"pixel_values": batch["pixel_values"][p0:p1], "image_grid_thw": batch["image_grid_thw"][i0:i1]}
        if "text_features" in batch:
            part["text_features"] = batch["text_features"][t0:t1]
        else:
            lengths = batch["text_lengths"][t0:t1]
            part |= {"input_ids": batch["input_ids"][t0:t1, : int(lengths.max())], "text_lengths": lengths}
        result.append(part)
    return result


# ----------------------------------------------------------------------------------------------------
# Scores


def score_scenes(image: np.ndarray, text: np.ndarray, scenes: list[Scene], texts: list[str], margin: float) -> dict:
    """Metrics of N scenes with embeddings image (N, D) and text (len(texts), D).

    Triplets are scored twice: with the negative the file gives (`hard_accuracy`) and with a text of another image, of
    another class where the file names classes (`accuracy`); retrieval over all texts, and for each language where both
    are there.
    """
    row_of = {t: i for i, t in enumerate(texts)}
    others = np.random.default_rng(0)
    result: dict[str, float] = {}
    pairs, hard = [], []
    own = [set(scene.texts) for scene in scenes]
    for i, scene in enumerate(scenes):
        for positive, negative in scene.rows:
            if negative is not None:
                hard.append((i, row_of[positive], row_of[negative]))
            for _ in range(20):  # a text of another image that is not, word for word, true of this one
                j = int(others.integers(len(scenes)))
                candidate = scenes[j].texts[int(others.integers(len(scenes[j].texts)))]
                same_language = is_chinese(candidate) == is_chinese(positive)
                same_class = scene.label is not None and scenes[j].label == scene.label
                if candidate not in own[i] and same_language and not same_class:
                    pairs.append((i, row_of[positive], row_of[candidate]))
                    break
    for name, triplets in (("", pairs), ("hard_", hard)):
        if triplets:
            i, p, n = np.array(triplets).T
            found = metrics.triplet_accuracy(
                _products(image, i, text, p), _products(image, i, text, n), margin=margin, image=i
            )
            for key in ("accuracy", "accuracy_margin", "interval", "count"):
                result[f"{name}{key}"] = found[key]
    # With the repeats within an image, as published tables count: five captions of an RSICD image are five.
    listed = [(i, t) for i, scene in enumerate(scenes) for t in scene.listed or scene.texts]
    languages = {"": listed}
    chinese = [pair for pair in listed if is_chinese(pair[1])]
    if 0 < len(chinese) < len(listed):
        languages |= {"en_": [pair for pair in listed if not is_chinese(pair[1])], "zh_": chinese}
    for prefix, chosen in languages.items():
        kept = sorted({i for i, _ in chosen})
        place = {i: k for k, i in enumerate(kept)}
        found = metrics.retrieval(
            image[kept],
            text[[row_of[t] for _, t in chosen]],
            np.array([place[i] for i, _ in chosen]),
            texts=[t for _, t in chosen],
        )
        result |= {f"{prefix}{key}": value for key, value in found.items()}
    return result


def _products(image, i, text, j) -> np.ndarray:
    """Of rows `i` (N,) of the one with rows `j` (N,) of the other; never all of these rows at once."""
    parts = [slice(start, start + 1024) for start in range(0, len(i), 1024)]
    return np.concatenate([(image[i[part]] * text[j[part]]).sum(1) for part in parts])


def evaluate_scenes(
    model: DualEncoder, scenes: list[Scene], store, features: dict, config: MatchConfig, batch_size: int
):
    """`score_scenes` with a model's embeddings; returns (metrics, image (N, D), text (T, D), texts)."""
    texts = list(dict.fromkeys([t for s in scenes for t in s.texts] + [n for s in scenes for _, n in s.rows if n]))
    paths = [scene.image for scene in scenes]
    if features.get("image"):
        made = torch.from_numpy(features["image"](paths)).to(model.device)
        with torch.inference_mode():
            image = model.project_image(made).float().cpu()
    else:
        image = model.embed_images(paths, batch_size=batch_size, store=store)
    if features.get("text"):
        made = torch.from_numpy(features["text"](texts)).to(model.device)
        with torch.inference_mode():
            text = model.project_text(made).float().cpu()
    else:
        text = model.embed_texts(texts, batch_size=4 * batch_size)
    image, text = image.numpy(), text.numpy()
    return score_scenes(image, text, scenes, texts, config.margin), image, text, texts


def _histogram(path: str, settings: ImageSettings) -> np.ndarray:
    return colour_histogram(read_image(path, settings, max_side=256).rgb)


def histogram_baseline(train: list[Scene], test: list[Scene], settings: ImageSettings, margin: float) -> dict:
    """The same metrics for a matcher that knows colour alone: a test image is described by the words of the captions of
    its 5 nearest training images by `imagery.colour_histogram` (histogram intersection, Swain & Ballard 1991);
    words, the most frequent 4,096, are weighted by inverse document frequency. What a model adds must lie above this."""

    def words(text):
        return re.findall(r"[a-z]+|\d+", text.lower()) + re.findall(r"(?=([\u4e00-\u9fff]{2}))", text)

    texts = list(dict.fromkeys([t for s in test for t in s.texts] + [n for s in test for _, n in s.rows if n]))
    # Sorted: a set has another order in every run, and so would the last bits of the sums that decide between near texts.
    documents = Counter(w for scene in train for w in sorted({w for t in scene.texts for w in words(t)}))
    frequent = dict(documents.most_common(4096))
    vocabulary = {w: i for i, w in enumerate(word for word in documents if word in frequent)}
    weight = np.log((1 + len(train)) / np.array([documents[w] for w in vocabulary]))

    def add(row, text_list):
        for text in text_list:
            for w in words(text):
                if w in vocabulary:
                    row[vocabulary[w]] += weight[vocabulary[w]]

    histograms = over_files(
        partial(_histogram, settings=settings), [scene.image for scene in (*train, *test)], disable=True
    )
    known, asked = np.stack(histograms[: len(train)]), histograms[len(train) :]
    # The last number gives a text of unknown words a direction: one that is like no image.
    image, text = (np.zeros((size, len(vocabulary) + 1), np.float32) for size in (len(test), len(texts)))
    for row, colours in zip(image, asked):
        for n in np.argsort(-np.minimum(known, colours).sum(1))[:5]:
            own = np.zeros_like(row)
            add(own, train[n].texts)
            row += own
    for row, said in zip(text, texts):
        add(row, [said])
    for table in (image, text):
        table[:, -1] = 1e-6
        table /= np.linalg.norm(table, axis=1, keepdims=True)
    return score_scenes(image, text, test, texts, margin)


# ----------------------------------------------------------------------------------------------------
# The run


class MatchRun(Run):
    """A run: its data, its model, and the scores before and after.

    Raises InputError for data, a base or settings that it cannot use, before anything is trained."""

    name = "match"

    def __init__(self, config: MatchConfig, args, changed: dict):
        super().__init__(config, args, changed)
        splits = self.load_splits()
        self.model = DualEncoder.from_base(config, seed=args.seed, dtype=dtype_of(args))
        self.store = pixel_store(self.model, config.cache_dir)
        self.splits = drop_unreadable(splits, self.store, config.max_rejected, self.rejected)
        self.say(f"data: {describe(self.splits)}")
        towers = f"(image tower {config.image_tower}, text tower {config.text_tower})"
        self.say(f"model: {config.base_model}, {parameters_text(self.model)} {towers}")
        self.model.to(args.device)
        self.features = self.frozen_features()
        self.train_data = self.dataset_of(self.splits["train"])
        if self.train_data.cut:
            limit = f"--max_text_tokens {config.max_text_tokens}"
            self.say(f"data: {self.train_data.cut} texts are longer than {limit} and are cut")
        self.watched = sample_scenes(self.splits["val"], config.max_eval_scenes)
        self.white = not config.whiten_init
        if not args.resume_from_checkpoint:
            self.start_white()
        if config.mine_negatives:
            self.take_mined_negatives()
        refuse_nothing_to_tell_apart(config, args, self.splits["train"])
        check_best_metric(args, ("mR",), lambda: self.evaluate(self.model))

    # -- data and model

    def frozen_features(self) -> dict[str, Callable[[list[str]], np.ndarray]]:
        """{"image", "text": what gives the kept features of files or texts}: those of a frozen tower are constants."""
        config, model, store = self.config, self.model, self.store
        if not config.cache_dir:
            return {}
        features, size = {}, self.args.eval_batch_size
        # "towers": without it, features of bf16 towers lie in caches under the name of float32.
        recipe = (
            f"{model.settings.base_fingerprint} {store.recipe} {config.max_text_tokens} towers {dtype_of(self.args)}"
        )
        if config.image_tower == "frozen":
            compute = partial(model.embed_images, store=store, batch_size=size, pool_only=True)
            kept = FeatureStore(config.cache_dir, f"image {recipe}")
            features["image"] = partial(_stored, kept, compute, name=store.identity)
        if config.text_tower == "frozen":
            compute = partial(model.embed_texts, batch_size=4 * size, pool_only=True)
            features["text"] = partial(_stored, FeatureStore(config.cache_dir, f"text {recipe}"), compute)
        return features

    def dataset_of(self, scenes: list[Scene]) -> MatchDataset:
        made = MatchDataset(
            scenes, self.model.tokenize, self.store, texts_per_scene=self.config.texts_per_scene, seed=self.args.seed
        )
        if "image" in self.features:
            made.image_features = self.features["image"]([scene.image for scene in scenes])
        if "text" in self.features:
            made.text_features = self.features["text"](made.texts)
        return made

    def score(self, model, scenes: list[Scene]):
        return evaluate_scenes(model, scenes, self.store, self.features, self.config, self.args.eval_batch_size)

    def evaluate(self, model) -> dict[str, float]:
        return watched_metrics(self.score(model, self.watched)[0])

    # -- what is made at the first start, and kept: a resumed run has another model in its place

    def start_white(self) -> None:
        """Whiten the projection heads, once, on a fixed sample of training images and texts: the same on every process."""
        if self.white:
            return
        self.white = True
        scenes, known, draw = self.splits["train"], self.train_data.texts, np.random.default_rng(0)
        paths = [scenes[i].image for i in sorted(draw.permutation(len(scenes))[:512])]
        texts = [known[i] for i in sorted(draw.permutation(len(known))[:2048])]
        model, size = self.model.eval(), self.args.eval_batch_size
        pool_images = partial(model.embed_images, store=self.store, batch_size=size, pool_only=True)
        pool_texts = partial(model.embed_texts, batch_size=4 * size, pool_only=True)
        image, text = self.features.get("image", pool_images)(paths), self.features.get("text", pool_texts)(texts)
        if len(paths) > 1 and len(texts) > 1:
            model.whiten_heads(torch.as_tensor(image), torch.as_tensor(text))

    def kept_at_start(self, name: str):
        """What the first start of the run that is resumed left as `name`, and from where; (None, path) where it left nothing."""
        path, resumed = self.folder / name, self.args.resume_from_checkpoint
        if resumed and not path.is_file():  # it goes on in another folder
            path = Path(resumed).parent / name
        return (load_json(path) if resumed and path.is_file() else None), path

    def take_mined_negatives(self) -> None:
        """Give each training row the negative that was mined for it (`mined_negatives`)."""
        scenes, rows = self.splits["train"], rows_digest(self.splits["train"])
        found, path = self.kept_at_start(MINED)
        if found is None:
            self.start_white()
            found = {"rows": rows, "negatives": mined_negatives(self.model, scenes, self.config, self.args)}
            if self.args.world_size > 1:  # another kind of processor may order equals otherwise
                (found,) = broadcast_object_list([found])
        elif isinstance(found, list):  # of an earlier version, which did not say what it was mined for
            fits = [len(row) for row in found] == [len(scene.rows) for scene in scenes]
            found = {"rows": rows if fits else None, "negatives": found}
        if found.get("rows") != rows:
            raise InputError(
                f"{path}: mined for other training rows than these; resume with the files that the run began with, start a"
                " new run, or remove it to mine anew"
            )
        if self.main_process:
            report.write_json(self.folder / MINED, found)
        negatives = found["negatives"]
        for scene, own in zip(scenes, negatives):
            scene.rows = [(text, new or old) for (text, old), new in zip(scene.rows, own)]
        filled = sum(new is not None for own in negatives for new in own)
        self.say(f"data: {filled} of {sum(map(len, negatives))} rows got a mined negative")
        self.train_data = self.dataset_of(scenes)

    def untrained_scores(self) -> dict | None:
        """The scores before training; None where they were kept for other rows than these."""
        rows = rows_digest(self.splits[self.tested])
        found, path = self.kept_at_start(UNTRAINED)
        if found is None:
            self.start_white()
            self.model.eval()
            found = {"rows": rows, "scores": flat(self.score(self.model, self.splits[self.tested])[0])}
        elif found.get("rows", rows) != rows:  # an earlier version wrote the scores alone
            self.say(f"{path}: measured on other rows than these are; the table has no line before training")
            return None
        if self.main_process:
            report.write_json(self.folder / UNTRAINED, found)
        return found.get("scores", found)

    # -- training and results

    def trainer(self) -> SceneTrainer:
        config = self.config
        head_rate = config.head_learning_rate
        if head_rate is None:
            head_rate = self.args.learning_rate * (1 if "full" in (config.image_tower, config.text_tower) else 10)
        trainer = SceneTrainer(
            model=self.model,
            task=MatchTask(config, self.evaluate),
            args=self.args,
            train_dataset=self.train_data,
            collator=MatchCollator(self.train_data, self.model.processor, self.model.tokenizer.pad_token_id),
            settings=self.record,
            watched=self.watched,
            rates={"image": config.image_learning_rate, "text": config.text_learning_rate, "head": head_rate},
            early_stopping=config.early_stopping_patience,
        )
        trainer.add_callback(BoundedScale())
        return trainer

    def train(self) -> dict:
        """Train, score, print, and leave scores and report in the run's folder."""
        trainer = self.trainer()
        results: dict = {"config": self.changed, "images": self.images}
        if self.main_process:
            report.write_json(self.folder / "config.json", trainer.settings)
        if untrained := self.untrained_scores():
            results["untrained"] = untrained
        outcome = trainer.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        best = trainer.save_best()
        self.model.eval()
        held_out = self.splits[self.tested]
        found, image, text, texts = self.score(self.model, held_out)
        results["trained"] = flat(found)
        if self.main_process:
            results |= {"split": self.tested, "steps": outcome.global_step, "best_step": trainer.kept_step}
            report.write_json(self.folder / "results.json", results)  # the baseline reads all images once more
            plain = histogram_baseline(self.splits["train"], held_out, self.store.settings, self.config.margin)
            results["histogram"] = flat(plain)
            results["seconds"] = self.seconds()
            report.write_json(self.folder / "results.json", results)
            write_report(self.folder, results, held_out, image, text, texts, self.store.picture)
            print(summary(results, best))
            print(f"report  {self.folder / 'report.html'}")
        return results


def refuse_nothing_to_tell_apart(config: MatchConfig, args, scenes: list[Scene]) -> None:
    """Raises InputError where no text would ever stand beside a wrong image: every loss would be 0."""
    if any(negative for scene in scenes for _, negative in scene.rows):
        return
    if len(scenes) == 1:
        raise InputError(
            "the training split has one image and no row has a negative: there is no text to tell its own from, and nothing"
            " would be learnt; give more images, or rows with a negative"
        )
    if args.train_batch_size * args.world_size == 1:
        raise InputError(
            "--per_device_train_batch_size 1: the data gives no negatives, and they are taken from the other images of a"
            " batch: nothing would be learnt (--gradient_accumulation_steps does not help); --grad_cache_chunk 1 trains a"
            " large batch in little memory"
        )
    if config.loss == "triplet" and config.in_batch_negatives == "none":
        raise InputError(
            "--in_batch_negatives none: no row has a negative, so nothing would be learnt; leave it out, or give"
            " --mine_negatives"
        )


def _stored(feature_store: FeatureStore, compute, items: list[str], name=str) -> np.ndarray:
    """Features of texts or image files; `name(item)` is what an entry is kept under."""
    item_of = {name(item): item for item in items}

    def made(chunk):
        # In the model's own precision, also within a training's autocast.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return compute([item_of[key] for key in chunk]).float().numpy()

    return feature_store.get([name(item) for item in items], made)


def mined_negatives(model, scenes, config, args) -> list[list[str | None]]:
    """For each scene and each of its rows, the text to tell apart from the row's own (None: none qualifies)."""
    texts = list(dict.fromkeys(t for scene in scenes for t in scene.texts))
    place = {t: i for i, t in enumerate(texts)}
    miner = (
        DualEncoder.from_pretrained(config.mine_model, device=str(args.device), dtype=dtype_of(args))
        if config.mine_model
        else model.eval()
    )
    text = miner.embed_texts(texts, batch_size=4 * args.eval_batch_size).numpy()
    if config.mine_model:
        own_store = pixel_store(miner, config.cache_dir)
        paths = [scene.image for scene in scenes]
        image = miner.embed_images(paths, store=own_store, batch_size=args.eval_batch_size).numpy()
    else:
        image = np.stack([text[[place[t] for t in scene.texts]].mean(0) for scene in scenes])
        image /= np.maximum(np.linalg.norm(image, axis=1, keepdims=True), 1e-9)
    rows = [(i, place[t]) for i, scene in enumerate(scenes) for t, _ in scene.rows]
    own = [np.array([place[t] for t in scene.texts]) for scene in scenes]
    # Of the row's own language: one of the other is told by its script, and the rarer language would be favoured.
    language = np.array([is_chinese(t) for t in texts])
    picked = iter(mine_negatives(image, text, own, rows, margin=config.mine_margin, kinds=language))
    return [[texts[n] if (n := int(next(picked))) >= 0 else None for _ in scene.rows] for scene in scenes]


def evaluate_only(config: MatchConfig, args, argv: list[str], keep: bool) -> dict:
    """`--eval_only`: the table of a checkpoint on the test split (else the validation split), printed and returned, and with
    `keep` left in --output_dir."""
    moved = flag_value("--base_model", argv)
    model = DualEncoder.from_pretrained(
        config.eval_only, base_model=moved, device=str(args.device), dtype=dtype_of(args)
    )
    store = pixel_store(model, config.cache_dir)
    root = use_files_of_training(config, args, argv, config.eval_only, ("margin",))
    splits = load_splits(config, args.seed, train_root=root)
    say_trained_images(config, args, config.eval_only, splits, print)
    splits = drop_unreadable(splits, store, config.max_rejected)
    print(f"data: {describe(splits)}")
    tested = "test" if splits["test"] else "val"
    found, image, text, texts = evaluate_scenes(model, splits[tested], store, {}, config, args.eval_batch_size)
    results = {
        "images": {name: len(scenes) for name, scenes in splits.items()},
        "split": tested,
        "trained": flat(found),
    }
    results["histogram"] = flat(histogram_baseline(splits["train"], splits[tested], store.settings, config.margin))
    print(summary(results, config.eval_only))
    if keep:
        run = Path(args.output_dir)
        report.write_json(run / "results.json", results)
        write_report(run, results, splits[tested], image, text, texts, store.picture)
        print(f"report  {run / 'report.html'}")
    return results


def flat(found: dict) -> dict:
    """Plain floats; an interval as two-element list."""
    return {k: [float(x) for x in v] if isinstance(v, tuple) else float(v) for k, v in found.items()}


WATCHED = ("accuracy", "hard_accuracy", "mR", "en_mR", "zh_mR", "i2t_R@1", "i2t_R@10", "t2i_R@1", "t2i_R@10")


def watched_metrics(found: dict) -> dict:
    """The few numbers an evaluation in mid-training logs; the final results hold them all."""
    return {k: float(found[k]) for k in WATCHED if k in found}


# ----------------------------------------------------------------------------------------------------
# What the user sees at the end

ROWS = (("untrained", "before training"), ("histogram", "colour histogram"), ("trained", "trained"))
COLUMNS = {
    "model": "",
    "accuracy": "triplets: other scene",
    "hard_accuracy": "triplets: given negative",
    "t2i_R@1": "text-image R@1",
    "t2i_R@10": "R@10",
    "i2t_R@1": "image-text R@1",
    "i2t_R@10": "R@10 ",
    "mR": "mR",
}


def table_rows(results: dict) -> list[dict]:
    rows = [
        {"model": label} | {k: results[name].get(k) for k in COLUMNS if k != "model"}
        for name, label in ROWS
        if name in results
    ]
    return [{"model": "chance", "accuracy": 0.5, "hard_accuracy": 0.5, "mR": results["trained"]["chance_mR"]}, *rows]


def shown_columns(results: dict) -> dict[str, str]:
    """Of `COLUMNS` those in which more than chance has a number."""
    return {k: v for k, v in COLUMNS.items() if any(row.get(k) is not None for row in table_rows(results)[1:])}


def summary(results: dict, best) -> str:
    trained, columns = results["trained"], shown_columns(results)
    lines = [
        "",
        f"{results['split']} split, {results['images'][results['split']]} images, {int(trained['texts'])} texts "
        f"({int(trained['duplicate_texts'])} of them equal to another image's, counted right for both; strict mR "
        f"{trained['strict_mR']:.3f})",
        report.table_text(table_rows(results), columns),
        intervals_line(trained),
    ]
    by_language = [f"{k[:2]} {trained[k]:.3f}" for k in ("en_mR", "zh_mR") if k in trained]
    if by_language:
        lines.append(f"mR by language of the text: {', '.join(by_language)}")
    if "steps" in results:
        lines.append(f"best step {results['best_step']} of {results['steps']}, {results['seconds']:.0f} s in all")
    return "\n".join([*lines, f"model   {best}"])


def intervals_line(trained: dict) -> str:
    """Accuracy has none where no text could be taken of another image."""
    spans = {"accuracy": trained.get("interval"), "mR": trained["mR_interval"]}
    return "95% intervals by image: " + ", ".join(f"{name} {report.span_text(x)}" for name, x in spans.items() if x)


def write_report(run, results, scenes, image, text, texts, picture) -> None:
    """`report.html`: the table, curves, and the best and worst retrievals with their pictures (`picture(path)`)."""
    row_of = {t: i for i, t in enumerate(texts)}
    pool = list(dict.fromkeys(t for scene in scenes for t in scene.texts))
    place = {t: k for k, t in enumerate(pool)}
    chosen = text[[row_of[t] for t in pool]].T
    cards = []
    for i, scene in enumerate(scenes):
        scores = image[i] @ chosen  # of one image: those of all are as large as the data squared
        right = min((place[t] for t in scene.texts), key=lambda k: (-scores[k], k))
        rank = int((scores > scores[right]).sum() + (scores[:right] == scores[right]).sum())
        top = min(5, len(scores))
        best = np.flatnonzero(scores >= np.partition(scores, -top)[-top])
        best = best[np.argsort(-scores[best], kind="stable")][:top]
        lines = [(pool[j], float(scores[j]), pool[j] in scene.texts) for j in best]
        if rank >= 5:
            lines.append((pool[right], float(scores[right]), True))
        cards.append((rank, -lines[0][1], i, lines))
    cards.sort(key=lambda card: card[:3])

    def gallery(chosen):
        items = []
        for rank, _, i, lines in chosen:
            title = f"{Path(scenes[i].image).name} · first right text at rank {rank + 1} of {len(pool)}"
            shown = report.thumbnail(picture(scenes[i].image))
            items.append({"image": shown, "title": title, "good": rank == 0, "lines": lines})
        return report.gallery_html(items)

    columns = {k: v.strip() for k, v in shown_columns(results).items()}
    curves = {"loss": "training loss", "eval_mR": "mR", "eval_accuracy": "triplet accuracy"}
    sections = [
        ("Scores", report.table_html(table_rows(results), columns, best={k: "max" for k in COLUMNS if k != "model"})
         + f"<p>{results['split']} split; {intervals_line(results['trained'])}. A text equal to another image's caption "
           f"counts as right for both; strict mR is {results['trained']['strict_mR']:.3f}.</p>"),
        *report.curves_section(read_history(run), curves),
        ("Best retrievals", gallery(cards[:6])),
        ("Worst retrievals", gallery(cards[-6:][::-1])),
    ]  # fmt: skip
    report.page("Matching images and texts", sections, run / "report.html", subtitle=f"{run}")


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    config, args, changed = parse(MatchConfig, argv, description=__doc__.split("\n")[0])
    if config.eval_only:
        return evaluate_only(config, args, argv, keep=args.process_index == 0 and keeps_scores(argv))
    with own_folder(args):
        return MatchRun(config, args, changed).train()


if __name__ == "__main__":
    with user_errors():
        main()
