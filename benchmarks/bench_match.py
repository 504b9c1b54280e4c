"""Matcher training against sentence-transformers: samples a second, peak memory, and where the time goes.

    python benchmarks/bench_match.py                                    # demo base, demo triplets, CPU
    python benchmarks/bench_match.py --loss infonce
    python benchmarks/bench_match.py --data captions.jsonl --texts 5    # captions get a seeded negative each
    python benchmarks/bench_match.py --device cuda --dtype bfloat16 --shape 3b --data captions.jsonl --workers 8 --scenes 8

A sample is one (image, positive, negative) row. Ours is the real SceneTrainer with MatchTask, the peer the real
SentenceTransformerTrainer with its collator and loss. Both train the same module object, put back to the same weights
before every round, on the same rows in the same order and the same number of rows a step, with the same optimizer,
learning rate, threads and dtype. That this is the same work is shown first: one step of each, equal loss and gradient.

What differs is the way of working, and that is what is measured. The peer opens, processes and encodes the image of
every row and every text of every row. We read resized pixels from the cache (one round is run cold), encode an image
once for its rows of the step, and a text once. The peer is given some of our house: our padding by length in the text
tower, our batched tokenizer, and plain Pillow for every file that it reads right.

Rounds are interleaved and the median of their ratios is reported. Set-up and the first step of a round are not timed.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads would slow the neighbour, ours or the peer's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from common import KeepsLosses, check_options, measured_apart, peak_memory, say
from PIL import Image
from transformers import PrinterCallback, Qwen2_5_VLConfig, TrainerCallback, TrainingArguments

from config import InputError, MatchConfig, user_errors
from data import MatchCollator, MatchDataset, PixelStore, SceneSampler, image_settings
from data import token_batch as pad_tokens
from imagery import ImageSettings, read_image
from model import TOWERS, DualEncoder, DualEncoderSettings, load_processor, pixel_store, same_fields
from scenes import Scene, read_scenes
from train_match import MatchTask
from trainer import SceneTrainer

PEER = "sentence-transformers==6.2.0"
SEED = 0
PARTS = ("reading", "processor", "forward, images", "forward, texts", "backward", "optimizer", "rest")

# Random weights in these shapes; the tokenizer is that of --base. 3b: the config.json of Qwen2.5-VL-3B-Instruct.
SHAPES = {
    "3b": {
        "text": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                 "num_key_value_heads": 2, "vocab_size": 151936},
        "vision": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 2048,
                   "fullatt_block_indexes": [7, 15, 23, 31]},
        "mrope_section": [16, 24, 24], "max_pixels": 448 * 448,
    },
    "tiny": {
        "text": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 4096},
        "vision": {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
                   "fullatt_block_indexes": [1]},
        "mrope_section": [2, 3, 3], "max_pixels": 56 * 56,
    },
}  # fmt: skip


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="interleaved rounds of each side")
    add("--steps", type=int, default=6, help="timed optimizer steps of a round")
    add("--data", default="data/demo/triplets_train.json", help="triplets or captions; its train split is used")
    add("--image_root", help="folder that image names are relative to")
    add("--base", default="models/demo/qwen2_5_vl", help="folder of a Qwen2.5-VL or Qwen2-VL base")
    add(
        "--shape",
        choices=sorted(SHAPES),
        help="random weights in this shape instead of --base's (its tokenizer is kept)",
    )
    add("--towers", choices=["full", "lora"], help="what is trained (default: lora with --shape 3b, else full)")
    add("--loss", choices=["triplet", "infonce", "cached"], default="triplet")
    add("--scenes", type=int, default=32, help="images of a step")
    add("--texts", type=int, default=5, help="rows of each image in a step")
    add("--mini_batch", type=int, default=32, help="rows of a chunk with --loss cached, on both sides")
    add("--max_pixels", type=int, help="largest image area (default: the base's, or 448x448 with --shape 3b)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast, and LoRA's base in it")
    add("--gradient_checkpointing", action="store_true", help="on both sides")
    add("--threads", type=int, default=2, help="torch threads on both sides")
    add("--workers", type=int, default=0, help="DataLoader workers on both sides (the profile always has 0)")
    add("--json", help="write every number here")
    add("--measure", choices=["ours", "theirs"], help=argparse.SUPPRESS)  # a child that prints its peak memory
    options = parser.parse_args(argv)
    check_options(options, "rounds", "steps", "scenes", "texts", "mini_batch", "threads")
    if importlib.util.find_spec("sentence_transformers") is None:
        raise InputError(f"sentence-transformers is not installed; run `pip install {PEER}`")
    if options.data == "data/demo/triplets_train.json" and not options.image_root:
        options.image_root = "data/demo/images"
    options.towers = options.towers or ("lora" if options.shape == "3b" else "full")
    return options


# ----------------------------------------------------------------------------------------------------
# The same model and the same rows for both


def build_model(options) -> tuple[DualEncoder, MatchConfig]:
    """A dual encoder on `--base`, or with random weights in `--shape`; no dropout, so that both sides can be equal."""
    limits = {"min_pixels": 56 * 56, "max_pixels": options.max_pixels}
    if not options.max_pixels:
        own = load_processor(options.base)[0].size["longest_edge"]
        limits["max_pixels"] = SHAPES[options.shape]["max_pixels"] if options.shape else own
    config = MatchConfig(
        base_model=options.base,
        image_tower=options.towers,
        text_tower=options.towers,
        lora_dropout=0.0,
        projection_dim=512 if options.shape == "3b" else 128,
        loss="triplet" if options.loss == "triplet" else "infonce",
        in_batch_negatives="none",  # what the peer's triplet loss does
        texts_per_scene=options.texts,
        grad_cache_chunk=max(1, options.mini_batch // options.texts) if options.loss == "cached" else 0,
        **limits,
    )
    dtype = getattr(torch, options.dtype if options.towers == "lora" else "float32")
    if options.shape is None:
        model = DualEncoder.from_base(config, seed=SEED, dtype=dtype)
    else:
        model = random_model(config, SHAPES[options.shape], torch.device(options.device), dtype)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.to(options.device), config


def random_model(config: MatchConfig, shape: dict, device: torch.device, dtype: torch.dtype) -> DualEncoder:
    processor, tokenizer = load_processor(config.base_model, config.min_pixels, config.max_pixels)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["mrope_section"]}
    base = Qwen2_5_VLConfig(text_config=shape["text"] | {"rope_parameters": rope}, vision_config=shape["vision"])
    known = {"base_model": "random", "base_fingerprint": "", "logit_bias": 0.0}
    known |= {"logit_scale": float(np.log(1 / config.temperature)), "images": image_settings(config).to_dict()}
    settings = DualEncoderSettings(**same_fields(DualEncoderSettings, config) | known)
    torch.manual_seed(SEED)
    with device:  # billions of random numbers are drawn where they are used
        parts = (base.vision_config, base.text_config)
        towers = [tower._from_config(part, dtype=dtype) for tower, part in zip(TOWERS["qwen2_5_vl"], parts)]
        return DualEncoder(settings, *towers, tokenizer, processor, base)


def read_rows(options) -> list[Scene]:
    """Scenes with at least `--texts` rows, each row with a negative: the file's, or a seeded text of another image."""
    scenes = read_scenes(options.data, image_root=options.image_root).scenes
    scenes = [scene for scene in scenes if scene.split in (None, "train")]
    enough = [scene for scene in scenes if len(scene.rows) >= options.texts]
    if len(enough) < 2:
        raise InputError(f"{options.data}: {len(enough)} images have {options.texts} rows; lower --texts")
    draw = random.Random(SEED)
    for scene in enough:
        rows = []
        for text, negative in scene.rows:
            while negative is None:
                candidate = draw.choice(draw.choice(enough).texts)
                negative = None if candidate in scene.texts else candidate
            rows.append((text, negative))
        scene.rows = rows
    return enough


class Work:
    """`steps` steps of `batch` scenes with `texts` rows each, for both sides: the same rows in the same order."""

    def __init__(
        self, model: DualEncoder, scenes: list[Scene], store: PixelStore, *, batch: int, texts: int, steps: int
    ):
        batches = steps + 3  # one warm-up step, and two more because the loader runs ahead
        scenes = (scenes * -(-batches * batch // len(scenes)))[: max(len(scenes), batches * batch)]
        self.batch, self.texts, self.steps, self.rows = batch, texts, steps, batch * texts
        self.dataset = MatchDataset(scenes, model.tokenize, store, texts_per_scene=texts, seed=SEED)
        self.collator = MatchCollator(self.dataset, model.processor, model.tokenizer.pad_token_id)
        keys = list(SceneSampler(len(scenes), batch, SEED))[: batches * batch]
        drawn = [self.dataset[key] for key in keys]  # fills the pixel cache too
        assert all(len(example["rows"]) == texts for example in drawn)
        words = self.dataset.texts
        self.triplets = [(scenes[e["scene"]].image, words[p], words[n]) for e in drawn for p, n in e["rows"]]
        steps_of = [self.triplets[i : i + self.rows] for i in range(0, len(self.triplets), self.rows)]
        self.encoded = {
            "ours": {
                "images": batch,
                "texts": statistics.mean(len({t for row in s for t in row[1:]}) for s in steps_of),
            },
            "theirs": {"images": self.rows, "texts": 2 * self.rows},
        }


def one_row_scenes(scenes: list[Scene]) -> list[Scene]:
    """One row of each scene, with no text twice: there the losses of all frameworks must agree."""
    seen, kept = set(), []
    for scene in scenes:
        for row in scene.rows:
            if not seen & set(row):
                seen.update(row)
                kept.append(Scene(scene.image, [row[0]], [row]))
                break
    return kept


# ----------------------------------------------------------------------------------------------------
# Clock


class Clock:
    """Seconds by part, each moment counted once: for the innermost part that is open."""

    def __init__(self, device: str):
        self.device, self.on, self.total, self.open = device, False, Counter(), []

    def _count(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self.open:
            self.total[self.open[-1]] += now - self.mark
        self.mark = now

    def start(self, part: str) -> None:
        if self.on:
            self._count()
            self.open.append(part)

    def stop(self) -> None:
        if self.on and self.open:
            self._count()
            self.open.pop()

    def timed(self, function, part: str):
        @functools.wraps(function)
        def run(*args, **kwargs):
            self.start(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return run

    @contextlib.contextmanager
    def watching(self, peer_module=None):
        """Time the parts of both sides while this is open."""
        places = [
            (PixelStore, "__getitem__", "reading"),
            (MatchCollator, "__call__", "processor"),
            *((DualEncoder, f"{verb}_image", "forward, images") for verb in ("pool", "project")),
            *((DualEncoder, f"{verb}_text", "forward, texts") for verb in ("pool", "project")),
            (torch.Tensor, "backward", "backward"),
        ]
        if peer_module is not None:
            places += [(peer_module, "open_image", "reading"), (peer_module, "preprocess", "processor")]
        with contextlib.ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name), part)))
            self.on, self.total = True, Counter()
            yield
            self.on, self.open = False, []


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class StepEnds(TrainerCallback):
    """When each step ended; and, while the clock runs, the optimizer's part, which is timed between two events."""

    def __init__(self, clock: Clock):
        self.clock, self.ends, self.gradient = clock, [], None
        self.keep_gradient = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self.keep_gradient:
            found = [p.grad.detach().float().flatten().cpu() for p in model.parameters() if p.grad is not None]
            self.gradient = torch.cat(found)
        self.clock.start("optimizer")

    def on_optimizer_step(self, *_, **__):
        self.clock.stop()

    def on_step_end(self, *_, **__):
        synchronize(self.clock.device)
        self.ends.append(time.perf_counter())
        if len(self.ends) == 1:
            self.clock.total.clear()  # the warm-up step


# ----------------------------------------------------------------------------------------------------
# Ours and theirs


class Bench:
    """The model, its starting weights and a trainer of either side."""

    def __init__(self, options):
        self.options, self.clock = options, Clock(options.device)
        self.model, self.config = build_model(options)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        self.folder = tempfile.TemporaryDirectory()
        self.settings = ImageSettings.from_dict(self.model.settings.images)
        self.store = self.pixel_store("warm")
        self.peer = None

    def pixel_store(self, name: str) -> PixelStore:
        return pixel_store(self.model, f"{self.folder.name}/{name}")

    def common(self, steps: int, batch: int) -> dict:
        options = self.options
        return dict(
            output_dir=f"{self.folder.name}/run", max_steps=steps, per_device_train_batch_size=batch,
            learning_rate=1e-4, weight_decay=0.0, bf16=options.dtype == "bfloat16", use_cpu=options.device == "cpu",
            seed=SEED, dataloader_num_workers=0 if self.clock.on else options.workers, remove_unused_columns=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            logging_nan_inf_filter=False,  # as config.py has it: no side waits for the GPU at every step
        )  # fmt: skip

    def ours(self, work: Work, steps: int, callback):
        trainer = type("Ours", (KeepsLosses, SceneTrainer), {})(
            model=self.model,
            task=MatchTask(self.config, evaluate=None),
            args=TrainingArguments(**self.common(steps, work.batch)),
            train_dataset=work.dataset,
            collator=work.collator,
            settings={},
            rates={},
        )
        trainer.add_callback(callback)
        return trainer

    def theirs(self, work: Work, steps: int, callback):
        from datasets import Dataset
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from sentence_transformers.base.sampler import DefaultBatchSampler

        if self.peer is None:
            self.peer = make_peer(self.model, self.settings, self.options.device)
        self.peer[0].look_at({path for path, _, _ in work.triplets})
        columns = {name: [row[i] for row in work.triplets] for i, name in enumerate(("anchor", "positive", "negative"))}
        columns["anchor"] = [{"image": path} for path in columns["anchor"]]  # a .tif path alone is taken for a text
        trainer = type("Theirs", (KeepsLosses, SentenceTransformerTrainer), {})(
            model=self.peer,
            args=SentenceTransformerTrainingArguments(
                **self.common(steps, work.rows),
                # In the order given: the same rows a step as ours.
                batch_sampler=lambda rows, **kwargs: DefaultBatchSampler(
                    torch.utils.data.SequentialSampler(rows), **kwargs
                ),
            ),
            train_dataset=Dataset.from_dict(columns),
            loss=peer_loss(self.peer, self.config, self.options),
            callbacks=[callback],
        )
        return trainer

    def run(self, side: str, work: Work, steps: int | None = None, keep_gradient: bool = False) -> dict:
        """Train from the starting weights; seconds of `steps` steps after one that is not timed, and all losses."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.start:
                    parameter.copy_(self.start[name])
                parameter.grad = None
        steps = work.steps + 1 if steps is None else steps
        callback = StepEnds(self.clock)
        callback.keep_gradient = keep_gradient
        gc.collect()
        trainer = getattr(self, side)(work, steps, callback)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [float(loss) for loss in trainer.losses]
        return {"seconds": callback.ends[-1] - callback.ends[0], "losses": losses, "gradient": callback.gradient}


def make_peer(model: DualEncoder, settings: ImageSettings, device: str):
    """A SentenceTransformer whose one module wraps the towers and heads of `model`, as its documentation describes a
    custom input module: a column holds images (`{"image": path}`) or texts, `preprocess` batches one column."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modality import infer_modality
    from sentence_transformers.base.modules import InputModule

    class Towers(InputModule):
        def __init__(self, model: DualEncoder):
            super().__init__()
            self.model, self.plain = model, {}

        @property
        def modalities(self):
            return ["text", "image"]

        def look_at(self, paths) -> None:
            """Find, before any timing, the files whose pixels Pillow alone reads as `imagery` does (8-bit RGB)."""
            for path in paths - set(self.plain):
                with Image.open(path) as picture:
                    same = np.array_equal(np.asarray(picture.convert("RGB")), read_image(path, settings).rgb)
                self.plain[path] = same

        def open_image(self, path: str):
            if self.plain.get(path):
                with Image.open(path) as picture:
                    return picture.convert("RGB")
            return Image.fromarray(read_image(path, settings).rgb)

        def preprocess(self, inputs, prompt=None, **_):
            if infer_modality(inputs[0]) == "image":
                pictures = [self.open_image(row["image"]) for row in inputs]
                made = self.model.processor(images=pictures, return_tensors="pt")
                # The grid first: the cached loss takes the batch size from the first tensor.
                return {"image_grid_thw": made["image_grid_thw"], "pixel_values": made["pixel_values"]}
            return pad_tokens(self.model.tokenize(list(inputs))[0], self.model.tokenizer.pad_token_id)

        def forward(self, features, **_):
            if "pixel_values" in features:
                made = self.model.encode_image(features["pixel_values"], features["image_grid_thw"])
            else:
                made = self.model.encode_text(features["input_ids"], features["text_lengths"])
            return features | {"sentence_embedding": made}

        def save(self, output_path, *args, **kwargs):
            raise NotImplementedError("a benchmark saves nothing")  # abstract in the base class: it must be there

    return SentenceTransformer(modules=[Towers(model)], device=device)


def peer_loss(peer, config: MatchConfig, options):
    from sentence_transformers.sentence_transformer import losses

    if options.loss == "triplet":
        cosine = losses.TripletDistanceMetric.COSINE
        return losses.TripletLoss(peer, distance_metric=cosine, triplet_margin=config.margin)
    symmetric = {
        "scale": 1 / config.temperature,
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    }
    if options.loss == "infonce":
        return losses.MultipleNegativesRankingLoss(peer, **symmetric)
    return losses.CachedMultipleNegativesRankingLoss(peer, mini_batch_size=options.mini_batch, **symmetric)


# ----------------------------------------------------------------------------------------------------
# Measurements


def check_equal(bench: Bench, scenes: list[Scene], work: Work) -> dict:
    """One step of each side on the same rows from the same weights: the loss and the gradient must agree.

    Triplet: on a whole step. InfoNCE: on rows of different images with no text twice, since elsewhere the losses differ
    on purpose (the peer takes an image's other captions for negatives, ours leaves them out).
    """
    if bench.options.loss != "triplet":
        own = one_row_scenes(scenes)
        batch = min(bench.options.scenes, len(own))
        work = Work(bench.model, own, bench.store, batch=batch, texts=1, steps=1)
    found = {side: bench.run(side, work, steps=1, keep_gradient=True) for side in ("ours", "theirs")}
    ours, theirs = found["ours"], found["theirs"]
    difference = abs(ours["losses"][0] - theirs["losses"][0])
    size = len(theirs["gradient"])  # ours has a learnt temperature at its front, of which the peer's loss knows nothing
    first, second = ours["gradient"][-size:], theirs["gradient"]
    result = {
        "rows": work.rows,
        "loss_ours": ours["losses"][0],
        "loss_theirs": theirs["losses"][0],
        "loss_difference": difference,
        "gradient_difference": float((first - second).norm() / second.norm()),
    }
    # The loss alone would not tell: embeddings that all lie close give nearly the margin, whatever is encoded.
    allowed = (1e-4, 1e-2) if bench.options.dtype == "float32" else (2e-2, 2e-1)
    if not (
        difference <= allowed[0] * max(1.0, abs(theirs["losses"][0])) and result["gradient_difference"] <= allowed[1]
    ):
        raise SystemExit(f"the two sides do not do the same work (allowed {allowed}): {json.dumps(result)}")
    return result


def compare(bench: Bench, work: Work, rounds: int) -> dict:
    """Interleaved rounds; samples a second of each side, the ratio of each round and their median."""
    seconds, ratios, drift = {"ours": [], "theirs": []}, [], 0.0
    for number in range(rounds):
        done = {side: bench.run(side, work) for side in ("ours", "theirs")}
        for side, run in done.items():
            seconds[side].append(run["seconds"])
        ratios.append(done["theirs"]["seconds"] / done["ours"]["seconds"])
        pairs = zip(done["ours"]["losses"], done["theirs"]["losses"])
        drift = max(drift, *(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs))
        say(f"  round {number + 1} of {rounds}: {ratios[-1]:.2f} times")
    rate = {side: work.rows * work.steps / statistics.median(times) for side, times in seconds.items()}
    return {
        "rows_per_step": work.rows,
        "scenes_per_step": work.batch,
        "texts_per_scene": work.texts,
        "encoded_per_step": work.encoded,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "samples_per_second": rate,
        "seconds": seconds,
        "losses": {side: run["losses"] for side, run in done.items()},  # of the last round; each starts anew
        "largest_relative_loss_difference": drift,
    }


def profile(bench: Bench, work: Work) -> dict:
    """Seconds of a step by part, for each side, in a run of its own (without DataLoader workers: reading is seen)."""
    result = {}
    for side in ("ours", "theirs"):
        with bench.clock.watching(type(bench.peer[0])):
            seconds = bench.run(side, work)["seconds"]
            spent = {part: bench.clock.total[part] / work.steps for part in PARTS[:-1]}
        result[side] = spent | {"rest": max(0.0, seconds / work.steps - sum(spent.values()))}
    return result


def measure_child(options) -> None:
    """In a fresh process: train a few steps of one side and print the peak."""
    bench = Bench(options)
    work = Work(bench.model, read_rows(options), bench.store, batch=options.scenes, texts=options.texts, steps=2)
    before = peak_memory(options.device)
    bench.run(options.measure, work)
    print(json.dumps({"loaded": before, "peak": peak_memory(options.device)}))


# ----------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    if options.measure:
        measure_child(options)
        return {}
    import sentence_transformers

    bench = Bench(options)
    scenes = read_rows(options)
    work = Work(bench.model, scenes, bench.store, batch=options.scenes, texts=options.texts, steps=options.steps)
    results = {
        "settings": vars(options) | {"max_pixels": bench.config.max_pixels},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentence_transformers": sentence_transformers.__version__,
        },
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "scenes": len(scenes),
    }
    say(
        f"{results['scenes']} scenes of {options.data}; {results['parameters'] / 1e6:.1f} M parameters, "
        f"towers {options.towers}"
    )
    results["equal"] = check_equal(bench, scenes, work)
    say(equal_line(results["equal"]))

    say(f"{work.batch} images x {work.texts} rows a step:")
    results["scene"] = compare(bench, work, options.rounds)
    cold = Work(bench.model, scenes, bench.store, batch=options.scenes, texts=options.texts, steps=options.steps)
    cold.dataset.store = bench.pixel_store("cold")
    theirs = statistics.median(results["scene"]["seconds"]["theirs"])
    results["scene"]["cold_ratio"] = theirs / bench.run("ours", cold)["seconds"]

    # Where every image has one row, the scene cannot help: what is left is the cache of resized pixels.
    batch = options.scenes if options.loss != "cached" else max(options.scenes, 2 * options.mini_batch)  # two chunks
    batch = max(2, min(batch, len(scenes) // (options.steps + 3)))
    one = Work(bench.model, scenes, bench.store, batch=batch, texts=1, steps=options.steps)
    bench.config.grad_cache_chunk = options.mini_batch if options.loss == "cached" else 0
    say(f"{one.batch} images x 1 row a step:")
    results["one_row"] = compare(bench, one, options.rounds)
    bench.config.grad_cache_chunk = max(1, options.mini_batch // options.texts) if options.loss == "cached" else 0

    results["profile"] = profile(bench, work)
    results["memory"] = {side: measured_apart(__file__, argv, side) for side in ("ours", "theirs")}
    say(table(results))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
        say(f"written: {options.json}")
    return results


def equal_line(equal: dict) -> str:
    return (
        f"same work: loss {equal['loss_ours']:.6f} and {equal['loss_theirs']:.6f} on {equal['rows']} rows "
        f"(difference {equal['loss_difference']:.1e}), gradient difference {equal['gradient_difference']:.1e} relative"
    )


def table(results: dict) -> str:
    settings, scene, one = results["settings"], results["scene"], results["one_row"]
    base = f"random weights, shape {settings['shape']}" if settings["shape"] else settings["base"]
    peer = f"sentence-transformers {results['versions']['sentence_transformers']}"
    lines = [
        "",
        f"ours against {peer}: loss {settings['loss']}, {base}, {settings['towers']} training, {settings['dtype']}, "
        f"{settings['device']}, {settings['threads']} threads, {settings['workers']} loader workers",
        equal_line(results["equal"]),
    ]
    if settings["loss"] == "triplet":
        drift = max(scene["largest_relative_loss_difference"], one["largest_relative_loss_difference"])
        lines.append(f"           losses of all timed steps agree within {drift:.1e} relative")
    lines += ["", f"{'':34}{'ours':>10}{'theirs':>10}{'ratio':>9}   rounds"]

    def row(label, ours, theirs, ratio, rounds=""):
        lines.append(f"{label:34}{ours:>10}{theirs:>10}{ratio:>9}   {rounds}".rstrip())

    for label, part in ((f"{scene['texts_per_scene']} rows an image", scene), ("1 row an image", one)):
        rate = part["samples_per_second"]
        rounds = " ".join(f"{ratio:.2f}" for ratio in part["ratios"])
        row(f"samples/s, {label}", f"{rate['ours']:.0f}", f"{rate['theirs']:.0f}", f"{part['ratio']:.2f}", rounds)
        encoded = part["encoded_per_step"]
        for kind in ("images", "texts"):
            ours, theirs = encoded["ours"][kind], encoded["theirs"][kind]
            row(f"  {kind} encoded a step", f"{ours:.0f}", f"{theirs:.0f}", f"{theirs / ours:.2f}")
        if part is scene:
            row("  first epoch (cold pixel cache)", "", "", f"{scene['cold_ratio']:.2f}")
    memory = results["memory"]
    mega = {side: {kind: value / 2**20 for kind, value in found.items()} for side, found in memory.items()}
    peak = {side: found["peak"] for side, found in mega.items()}
    grown = {side: found["peak"] - found["loaded"] for side, found in mega.items()}
    for label, found in (("peak memory, MiB", peak), ("  of it in training, MiB", grown)):
        ratio = found["theirs"] / max(found["ours"], 1)
        row(label, f"{found['ours']:.0f}", f"{found['theirs']:.0f}", f"{ratio:.2f}")
    lines += ["", f"{'share of a step':34}{'ours':>10}{'theirs':>10}{'ratio':>9}"]
    ours, theirs = results["profile"]["ours"], results["profile"]["theirs"]
    for part in PARTS:
        shares = (f"{100 * side[part] / sum(side.values()):.1f}%" for side in (ours, theirs))
        ratio = f"{theirs[part] / ours[part]:.2f}" if ours[part] > 0 else "-"
        row(part, *shares, ratio)
    lines += [
        "",
        "ratio: theirs / ours, in time or memory; the first line's is the median of its interleaved rounds.",
        "Equal: weights, rows and their order, rows a step, optimizer, threads, dtype, text padding by length.",
        "Not equal, on purpose: ours reads resized pixels from its cache and encodes an image and a text once a step;",
        "the peer opens, processes and encodes them for every row.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with user_errors():
        main()
