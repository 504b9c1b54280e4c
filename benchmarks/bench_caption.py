"""Training on captions, packed by scene, against a padded row per caption: captions a second, memory, time to a loss.

    python benchmarks/bench_caption.py                                        # small shape, real 152k vocabulary, CPU
    python benchmarks/bench_caption.py --target_loss 2.5 --limit 120          # and the time to that held-out loss
    python benchmarks/bench_caption.py --no_freeze_vision_model --projector pixel_shuffle
    python benchmarks/bench_caption.py --device cuda --dtype bfloat16 --shape full --images 32 --rows 20 40 80 --torch_compile

All sides train the same modules (vision tower, projector, language model; stage 2: projector and last --layers layers) from
the same weights, on the same captions in each step, with AdamW, gradient clipping at 1, the same dtype and threads, and the
loss divided by the target tokens of the whole step:

    ours      SceneTrainer, PackedTask, QuestionCollator of this project: an image's tokens once and its captions as branches,
              patch features from the cache of the frozen tower, the head on the positions that predict a word of a caption
    compiled  ours with `train_caption.py --torch_compile` (only with --torch_compile here: a minute of compiling first)
    rows      a plain PyTorch loop with a row for every (image, caption), as captioners are commonly trained
    rows, compiled  the same over layers compiled in the same way (only with --torch_compile)

What "rows" does, and from whom. Both LLaVA and nanoVLM (its first version): open, cut and encode the image of every row, so
that five captions cost five runs of the tower; project; put the patches in front of the words; head and cross entropy over
all positions, image and prompt too (nanoVLM leaves the image out of the loss, after the head). LLaVA: the tower frozen under
no_grad, the last layer but one, rows padded to the longest of the micro-batch (nanoVLM: to a fixed length, which would be
slower). From us, in its favour: our way to resize, in a fifth of the processor's time; patches take their place by one
masked_scatter, as in transformers (LLaVA: a loop over rows); the attention is transformers' "sdpa"; the number of rows in a
micro-batch is tuned (--rows).

The sides of --parts stand in between, to show which part brings how much: rows with our cache, with our head, with both;
and ours with the tower in every step. With --no_freeze_vision_model nothing can be cached: the tower runs once an image in
ours, once a row in the others.

That all sides do the same work is shown first: loss and gradient of the first step are equal. All of a step is timed:
reading, collating, forward, backward, optimizer; on CUDA one step of a round runs before the clock, while workers start.
After one round to warm up, rounds are interleaved; the median of their ratios is reported with the smallest and the largest.

Five captions of one image teach less than captions of five images: the time to a loss (--target_loss) gives the rows the
advantage of a shuffled order, counts what it takes to fill our caches, and tries other shapes of our step with --sweep.

Data: UCM captions (5 an image) at ../shared/data/ucm_captions beside the repository where it is there, else the drawn
scenes of `make demo`; equal captions of an image count once, and images with fewer than --captions are left out.
"""

import argparse
import functools
import itertools
import json
import re
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench_vqa
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from bench_vqa import ROOT, RSVQA, SEED, TOKENIZER, StepWatch, quiet, span, synchronize, warm_steps
from common import check_options, measured_apart, peak_memory, read_words, say
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import demo_bases
from config import CaptionConfig, InputError, user_errors
from data import QuestionCollator, QuestionDataset, SceneSampler, pad_questions, pixel_batch
from imagery import ImageSettings, read_image
from model import Captioner, pixel_store
from scenes import captions_as_answers, read_scenes
from trainer import write_json

UCM = RSVQA.parent / "ucm_captions/ucm_captions.jsonl"
DEMO = ROOT / "data/demo/captions_en.json"

SIDES = {  # name: (packed, features from the cache, head on the predicting positions alone)
    "ours": (True, True, True),
    "compiled": (True, True, True),
    "ours, no cache": (True, False, True),
    "rows": (False, False, False),
    "rows, compiled": (False, False, False),
    "rows, cache": (False, True, False),
    "rows, head": (False, False, True),
    "rows, cache, head": (False, True, True),
}
PARTS = [name for name in SIDES if "compiled" not in name and name not in ("ours", "rows")]

# Random weights in these shapes; full: the config.json of clip-vit-base-patch16 and of Qwen3-0.6B.
SHAPES = {
    "small": (
        {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3},
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "heads": 4, "kv_heads": 2}, 64),
    "full": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "heads": 16, "kv_heads": 8}, 128),
}  # fmt: skip


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="interleaved rounds of all sides (0: none, for --target_loss alone)")
    add("--steps", type=int, default=1, help="timed optimizer steps of a round, of the sides that run rows")
    add("--our_steps", type=int, default=5, help="of the packed sides, for each of theirs: a clock of enough seconds")
    add("--images", type=int, default=2, help="images of an optimizer step")
    add("--captions", type=int, default=5, help="captions of each image in a step")
    add("--rows", type=int, nargs="+", default=[1, 5, 10], help="rows a micro-batch to choose from, for each rows side")
    add("--torch_compile", action="store_true", help="ours with compiled layers too")
    add("--parts", nargs="*", default=PARTS, choices=PARTS, help="sides between rows and ours")
    add("--data", help="captions in any form of README.md (default: UCM captions, else data/demo)")
    add("--train_images", type=int, default=400, help="images to train on (0: all)")
    add("--shape", choices=["demo", *SHAPES], default="small", help="demo: of `make demo`; else random weights")
    add("--bases", nargs=2, metavar="FOLDER", help="a CLIP or SigLIP and a language model instead of --shape's")
    add("--tokenizer", default=str(TOKENIZER), help="folder of Qwen2's vocab.json and merges.txt, for small and full")
    add("--projector", choices=["linear", "mlp", "pixel_shuffle"], default=CaptionConfig.projector)
    add("--freeze_vision_model", action="store_true", default=True, help="the tower stays as it is")
    add("--no_freeze_vision_model", action="store_false", dest="freeze_vision_model", help="it is trained too")
    add("--layers", type=int, default=2, help="layers of the language model that are trained, from the last")
    add("--pack_tokens", type=int, default=CaptionConfig.pack_tokens, help="tokens of a forward pass of ours")
    add("--learning_rate", type=float, default=1e-3)
    add("--target_loss", type=float, help="train both sides till this held-out loss (nats a target token)")
    add("--sweep", nargs="*", default=[], help="images x captions of a step of ours to try as well, e.g. 5x2 10x1")
    add("--limit", type=float, default=120, help="seconds of training after which a side is given up")
    add("--eval_every", type=int, default=5, help="steps between two looks at the held-out loss (not timed)")
    add("--eval_images", type=int, default=24, help="held-out images")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast, what is frozen in it")
    add("--threads", type=int, default=2, help="torch threads on all sides")
    add("--workers", type=int, default=0, help="DataLoader workers on all sides")
    add(
        "--no_memory",
        action="store_false",
        dest="memory",
        help="leave out the peak memory, measured in child processes",
    )
    add("--json", help="write every number here")
    add("--measure", choices=list(SIDES), help=argparse.SUPPRESS)  # a child that prints its peak memory
    add("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    check_options(options, "steps", "our_steps", "images", "captions", "eval_every", "eval_images", "threads")
    if options.data is None:
        options.data = str(UCM if UCM.exists() else DEMO)
        if not UCM.exists():
            say("UCM captions are not at ../shared/data/ucm_captions: the drawn scenes of data/demo are taken")
    if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape) for shape in options.sweep):
        raise InputError(f"--sweep {' '.join(options.sweep)}: expected images x captions, as in 5x2")
    if options.shape in SHAPES and not options.bases and not (Path(options.tokenizer) / "vocab.json").exists():
        raise InputError(f"--tokenizer {options.tokenizer}: no vocab.json of Qwen2 there; or take --shape demo")
    if not options.freeze_vision_model:
        options.parts = [part for part in options.parts if part == "rows, head"]
    return options


# ----------------------------------------------------------------------------------------------------
# The same model and the same captions for all


def write_bases(folder: Path, shape: str, tokenizer: Path, dtype: torch.dtype) -> list[str]:
    """(vision, language) folders with random weights and Qwen2's vocabulary, in the layout of the hubs."""
    vision, text, head_dim = SHAPES[shape]
    torch.manual_seed(SEED)
    vision_config = transformers.CLIPVisionConfig(**vision, image_size=224, patch_size=16)
    transformers.CLIPVisionModel(vision_config).to(dtype).save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224).save_pretrained(folder / "vision")
    language = folder / "language"
    language.mkdir(parents=True)
    made = demo_bases.write_qwen_tokenizer(language, *read_words(tokenizer), "qwen3")
    config = demo_bases.qwen_config(made, "qwen3", text)
    config |= {"head_dim": head_dim, "vocab_size": 151936, "torch_dtype": str(dtype).removeprefix("torch.")}
    demo_bases.write_qwen_settings(language, config)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        settings = transformers.AutoConfig.from_pretrained(language)
        model = transformers.Qwen3ForCausalLM._from_config(settings, dtype=dtype)
    # With the words at their random size and this at 1 no logit could pass 5: the loss would stay above 7 for ever.
    model.model.norm.weight.data.fill_(4.0)
    demo_bases.write_weights(model.cpu(), language)
    return [str(folder / "vision"), str(language)]


class Bench(bench_vqa.Bench):
    """The model, its starting weights, the data, and a run of each side. From bench_vqa.py: our trainer (`ours`), its
    `settings`, and the way back to the starting weights (`reset`)."""

    def __init__(self, options):
        self.options, self.folder = options, tempfile.TemporaryDirectory(prefix="bench_caption_")
        folder, dtype = Path(self.folder.name), getattr(torch, options.dtype)
        self.bases = options.bases or ["models/demo/clip", "models/demo/qwen3"]
        if options.shape in SHAPES and not options.bases:
            self.bases = write_bases(folder, options.shape, Path(options.tokenizer), dtype)
        self.cache = options.cache or str(folder / "cache")
        config = CaptionConfig(
            vision_model_name=self.bases[0], language_model_name=self.bases[1], cache_dir=self.cache,
            projector=options.projector, freeze_vision_model=options.freeze_vision_model,
            freeze_language_model_except_layers=options.layers,
        )  # fmt: skip
        self.model = Captioner.from_base(config, seed=SEED, dtype=dtype).to(options.device).train()
        with self.autocast():
            packs = self.model.can_pack()
        if not packs:
            raise InputError(f"{config.language_model_name}: attention of its own, which cannot be packed")
        if options.torch_compile:
            self.model.compile_layers()
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        self.images = ImageSettings.from_dict(self.model.settings.images)
        self.store = pixel_store(self.model, self.cache)
        self.tokens = self.model.token_store(self.cache, self.store) if options.freeze_vision_model else None
        scenes = captions_as_answers(read_scenes(options.data, language="en").scenes, config.prompt, config.prompt_zh)
        enough = [scene for scene in scenes if len(scene.questions) >= options.captions]
        self.train = [scene for scene in enough if scene.split in (None, "train")][: options.train_images or None]
        self.held = [scene for scene in enough if scene.split == "val"][: options.eval_images]
        if not self.train:
            raise InputError(f"--captions {options.captions}: no training image of {options.data} has as many captions")
        start = time.perf_counter()
        self.prepare(self.train)
        synchronize(options.device)
        self.preparing = time.perf_counter() - start
        self.prepare(self.held)

    def prepare(self, scenes) -> None:
        """Fill the caches: resized pixels, and the features of a frozen tower."""
        paths = [scene.image for scene in scenes]
        self.store.prepare(paths)
        if self.tokens is not None:
            self.model.prepare_tokens(self.tokens, self.store, paths)

    def dataset(self, scenes, cached: bool = True, captions: int = 0, **other) -> QuestionDataset:
        return QuestionDataset(
            scenes, self.model.prompt, processor=self.model.processor, store=self.store, seed=SEED,
            tokens=self.tokens if cached else None, texts_per_scene=captions or self.options.captions, **other,
        )  # fmt: skip

    def work(self, steps: int) -> tuple[list, list]:
        """(scenes, rows) of `steps` steps: what SceneSampler draws of the scenes is what stands in the rows, in order."""
        size = self.options.images
        count = max(len(self.train), steps * size)
        scenes = (self.train * -(-count // len(self.train)))[:count]
        data = self.dataset(scenes, blind=True)
        row = {id(branch): (scene.image, q.text, q.answer) for scene, branches in zip(scenes, data.branches)
               for branch, q in zip(branches, scene.questions)}  # fmt: skip
        keys = list(SceneSampler(len(scenes), size, SEED))[: steps * size]
        return scenes, [row[id(branch)] for key in keys for branch in data[key]["branches"]]

    def autocast(self):
        return torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.dtype == "bfloat16")

    # -- the two ways to train

    def run(self, side: str, steps: int, size: int, *, clip: float = 1.0, after_step=None, shape=None, warm=0) -> dict:
        """Train from the starting weights, `warm` steps off the clock and `steps` on it: seconds, losses, and without `clip`
        the gradient of the last step. With `after_step(step) -> whether to stop` rows are shuffled, as scenes always are;
        shape: (images, captions) of ours."""
        self.reset()
        steps += warm
        packed, cached, head = SIDES[side]
        cached = cached and self.options.freeze_vision_model
        scenes, rows = self.work(steps) if after_step is None else (self.train, None)
        stance = torch.compiler.set_stance("default" if "compiled" in side else "force_eager")
        if packed:
            images, captions = shape or (self.options.images, self.options.captions)
            data = self.dataset(scenes, cached, captions, share=True)
            with stance:
                return self.run_packed(data, self.settings(steps, images, max_grad_norm=clip), after_step, warm)
        if rows is None:
            rows = [(scene.image, q.text, q.answer) for scene in scenes for q in scene.questions]
        attention = self.model.language.set_attn_implementation
        attention("sdpa")  # as transformers makes it; ours comes back after
        try:
            collate = functools.partial(self.collate, size=size, cached=cached)
            with stance:
                return self.run_rows(rows, collate, head, steps, clip, after_step, warm)
        finally:
            attention("scene")

    def run_packed(self, dataset, arguments, after_step, warm: int) -> dict:
        watch = StepWatch(self.options.device)
        trainer = self.ours(dataset, arguments)
        trainer.add_callback(watch)
        if after_step:
            trainer.add_callback(AfterStep(after_step))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [float(loss) for loss in trainer.losses]
        return {"seconds": watch.seconds(warm), "losses": losses, "gradient": watch.gradient}

    def run_rows(self, rows: list, collate, head: bool, steps: int, clip: float, after_step, warm: int) -> dict:
        options = self.options
        per_step = options.images * options.captions
        loader = DataLoader(
            rows, per_step, shuffle=after_step is not None, collate_fn=collate, num_workers=options.workers,
            drop_last=len(rows) >= per_step, generator=torch.Generator().manual_seed(SEED), pin_memory=options.device == "cuda",
        )  # fmt: skip
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
        self.model.train()
        losses, gradient, start = [], None, time.perf_counter()
        for step, batches in zip(range(1, steps + 1), itertools.chain.from_iterable(itertools.repeat(loader))):
            terms = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
            losses.append(0.0)
            for batch in batches:
                batch = {name: value.to(options.device, non_blocking=True) for name, value in batch.items()}
                with self.autocast():
                    loss = self.rows_loss(head=head, terms=terms, **batch)
                loss.backward()
                losses[-1] += loss.detach()
            if clip:
                torch.nn.utils.clip_grad_norm_(trained, clip)
            else:
                gradient = {n: p.grad.float().cpu() for n, p in self.model.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
            if step == warm:
                synchronize(options.device)
                start = time.perf_counter()
            if after_step and after_step(step):
                break
        synchronize(options.device)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "losses": [float(loss) for loss in losses], "gradient": gradient}

    def collate(self, rows: list, *, size: int, cached: bool) -> list[dict]:
        """The rows of a step -> padded micro-batches of `size` rows, each row with its own copy of the image."""
        prompt, pad_id, made = self.model.prompt, self.model.tokenizer.pad_token_id, []
        prefix = prompt.prefix()
        for start in range(0, len(rows), size):
            images, asked, captions = zip(*rows[start : start + size])
            branches = prompt.branches(list(asked), list(captions))
            batch = pad_questions([{"prefix": prefix, "branches": [branch]} for branch in branches], pad_id)
            if cached:
                batch["features"] = torch.stack([self.tokens[path][0] for path in images])
            else:
                pixels = [self.store.resize(np.asarray(self.open_image(path))) for path in images]
                batch["pixel_values"] = pixel_batch(pixels, self.model.processor)["pixel_values"]
            made.append(batch)
        return made

    def open_image(self, path: str):
        if Path(path).suffix.lower() in (".jpg", ".jpeg", ".png"):
            with Image.open(path) as picture:
                return picture.convert("RGB")
        return Image.fromarray(read_image(path, self.images).rgb)  # GeoTIFF: the peer gets our reader

    def rows_loss(self, input_ids, attention_mask, labels, head, terms, features=None, pixel_values=None):
        """Loss of padded rows (B, L); with `head` only the positions before a target meet the vocabulary."""
        model = self.model
        features = model.encode_images(pixel_values) if features is None else features  # (B, N, V)
        embedded = model.embed(input_ids, features)  # (B, L, D)
        inputs = {"inputs_embeds": embedded, "attention_mask": attention_mask, "use_cache": False}
        if not head:
            return model.language(**inputs, labels=labels, num_items_in_batch=terms).loss
        hidden, targets = model.language.base_model(**inputs).last_hidden_state[:, :-1], labels[:, 1:]
        logits = model.language.get_output_embeddings()(hidden[targets >= 0])
        return F.cross_entropy(logits.float(), targets[targets >= 0], reduction="sum") / terms

    @functools.cached_property
    def held_batches(self) -> list[dict]:
        data, collate = self.dataset(self.held, share=True), QuestionCollator(self.options.pack_tokens)
        return [piece for i in range(0, len(data), 8)
                for piece in collate([data[0, k] for k in range(i, min(i + 8, len(data)))])["pieces"]]  # fmt: skip

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Nats a target token of the held-out captions."""
        language, total, count = self.model.eval().language, 0.0, 0
        before = language.config._attn_implementation
        language.set_attn_implementation("scene")
        for piece in self.held_batches:
            with self.autocast():
                total += float(self.model(**{name: value.to(self.options.device) for name, value in piece.items()}))
            count += len(piece["labels"])
        self.model.train()
        language.set_attn_implementation(before)
        return total / count


class AfterStep(TrainerCallback):
    def __init__(self, after_step):
        self.after_step = after_step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = self.after_step(state.global_step)


# ----------------------------------------------------------------------------------------------------
# Measurements


def check_equal(bench: Bench, sides: list[str]) -> dict:
    """Loss and gradient of the first step of each side against those of the rows."""
    found = {side: bench.run(side, 1, bench.options.rows[0], clip=0.0) for side in sides}
    allowed, want, result = 1e-4 if bench.options.dtype == "float32" else 5e-2, found["rows"], {}
    for side, run in found.items():
        if run["gradient"].keys() != want["gradient"].keys():
            raise SystemExit(f"{side} and rows do not train the same tensors")
        mine, theirs = (torch.cat([g[n].flatten() for n in sorted(g)]) for g in (run["gradient"], want["gradient"]))
        loss = abs(run["losses"][0] - want["losses"][0]) / abs(want["losses"][0])
        result[side] = {"loss": run["losses"][0], "loss_difference": loss,
                        "gradient_difference": float((mine - theirs).norm() / theirs.norm())}  # fmt: skip
        if not max(loss, result[side]["gradient_difference"]) <= allowed:
            raise SystemExit(f"the sides do not do the same work (allowed {allowed} relative): {json.dumps(result)}")
    return result


def tune(bench: Bench, sides: list[str]) -> dict[str, dict[int, float]]:
    """{side: {rows a micro-batch: captions a second}} of the sides that run rows."""
    per_step, found = bench.options.images * bench.options.captions, {}
    usable = sorted({min(rows, per_step) for rows in bench.options.rows})
    warm = warm_steps(bench.options.device)
    for side in (side for side in sides if not SIDES[side][0]):
        found[side] = {}
        for size in usable:
            try:
                found[side][size] = per_step / bench.run(side, 1, size, warm=warm)["seconds"]
            except torch.OutOfMemoryError:
                if not found[side]:
                    raise
                say(f"{side}: {size} rows do not fit")
    return found


def compare(bench: Bench, sides: dict[str, int]) -> dict:
    """Interleaved rounds: captions a second of each side, and ours over each other side, round by round."""
    options, rates = bench.options, {side: [] for side in sides}
    for number in range(options.rounds + 1):
        for side, kept in rates.items():
            steps = (options.steps * (options.our_steps if SIDES[side][0] else 1)) if number else 1
            seconds = bench.run(side, steps, sides[side], warm=warm_steps(options.device))["seconds"]
            if number:  # the first is to warm up
                kept.append(steps * options.images * options.captions / seconds)
        if number:
            shown = "; ".join(f"{side} {kept[-1]:.1f}" for side, kept in rates.items())
            say(f"  round {number} of {options.rounds}, captions/s: {shown}")
    ratios = {side: [a / b for a, b in zip(rates["ours"], kept)] for side, kept in rates.items()}
    return {"rates": rates, "ratios": ratios}


def measure_memory(bench: Bench, argv: list[str], sides: dict[str, int]) -> dict:
    """{side: {"loaded", "peak"} bytes}, each in a process of its own that trains two steps."""
    argv = [*argv, "--bases", *bench.bases, "--cache", bench.cache, "--data", bench.options.data]
    return {side: measured_apart(__file__, [*argv, "--rows", str(size)], side) for side, size in sides.items()}


def race(bench: Bench, size: int) -> dict:
    """Both sides from the same weights till the target, each in its own order: ours in shuffled scenes, the rows shuffled.
    Ours pays for its caches first. The clock stands while the held-out loss is measured."""
    options, result = bench.options, {}
    bench.reset()
    say(
        f"\nheld-out loss on {len(bench.held)} images: {bench.held_out_loss():.3f}; till it is {options.target_loss:g}:"
    )
    shapes = [f"{options.images}x{options.captions}", *options.sweep]
    for name in [*(f"ours {shape}" for shape in shapes), "rows"]:
        side, _, shape = name.partition(" ")
        spent, curve, began = (bench.preparing if shape else 0.0), [], time.perf_counter()

        def after_step(step, curve=curve):
            nonlocal spent, began
            if step % options.eval_every and spent + time.perf_counter() - began <= options.limit:
                return False
            synchronize(options.device)
            spent += time.perf_counter() - began
            curve.append({"step": step, "seconds": spent, "loss": bench.held_out_loss()})
            began = time.perf_counter()
            return curve[-1]["loss"] <= options.target_loss or spent > options.limit

        bench.run(side, 10**6, size, after_step=after_step, shape=tuple(map(int, shape.split("x"))) if shape else None)
        last = curve[-1]
        result[name] = last | {"reached": last["loss"] <= options.target_loss, "curve": curve}
        end = "" if result[name]["reached"] else f", not reached in {options.limit:g} s"
        caches = f" ({bench.preparing:.1f} of them to fill the caches)" if shape else ""
        say(f"{name:12}{last['seconds']:8.1f} s{caches}, {last['step']} steps, loss {last['loss']:.3f}{end}")
    theirs = result["rows"]
    for name, run in list(result.items())[:-1]:
        if run["reached"]:
            run["ratio"], least = theirs["seconds"] / run["seconds"], "" if theirs["reached"] else "at least "
            say(f"time to the loss, rows / {name}: {least}{run['ratio']:.1f}")
    return result


# ----------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = arguments(argv)
    quiet(options)
    bench = Bench(options)
    if options.measure:
        loaded = peak_memory(options.device)
        bench.run(options.measure, 2, options.rows[0])
        print(json.dumps({"loaded": loaded, "peak": peak_memory(options.device)}))
        return {}
    if options.target_loss is not None and not bench.held:
        raise InputError(f"{options.data}: no image with {options.captions} captions is held out (split val)")
    sides = ["ours", "compiled", "rows", "rows, compiled"] if options.torch_compile else ["ours", "rows"]
    sides += options.parts
    model, per_step = bench.model, options.images * options.captions
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (False, True))
    say(f"command: python benchmarks/bench_caption.py {shlex.join(argv)}")
    say(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.device}, {options.dtype}, "
        f"{options.threads} threads, {options.workers} loader workers")  # fmt: skip
    say(f"{total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M trained, {model.projector.tokens} tokens an image, vocabulary "
        f"{model.language.get_output_embeddings().out_features}")  # fmt: skip
    say(f"{Path(options.data).name}: {len(bench.train)} training images; caches filled in {bench.preparing:.1f} s; a step: "
        f"{options.images} images x {options.captions} captions")  # fmt: skip
    results = {"settings": vars(options), "preparing_seconds": bench.preparing}
    results["equal"] = check_equal(bench, sides)
    worst = [max(found[f"{part}_difference"] for found in results["equal"].values()) for part in ("loss", "gradient")]
    say(f"same work: loss {results['equal']['rows']['loss']:.6f} on the first {per_step} captions; largest relative difference "
        f"of a side {worst[0]:.1e}, of its gradient {worst[1]:.1e}")  # fmt: skip
    tuned = results["tuned"] = tune(bench, sides if options.rounds else ["rows"])
    best = {side: max(rates, key=rates.get) for side, rates in tuned.items()}
    for side, rates in tuned.items():
        shown = ", ".join(f"{rows}: {rate:.1f}" for rows, rate in rates.items())
        say(f"{side}: captions/s by rows a micro-batch {shown}; taken: {best[side]}")
    if options.rounds:
        sizes = {side: best.get(side, 1) for side in sides}
        results["compare"] = compare(bench, sizes)
        results["memory"] = measure_memory(bench, argv, sizes) if options.memory else {}
        say(table(results))
    if options.target_loss is not None:
        results["race"] = race(bench, best["rows"])
    if options.json:
        write_json(options.json, results)
        say(f"written: {options.json}")
    return results


def table(results: dict) -> str:
    rates, ratios, memory = *results["compare"].values(), results["memory"]
    head = f"{'':20}{'captions/s':>11}   {'ours / it':20}"
    lines = ["", (head + (f"{'peak MiB':>9}{'in training':>12}{'it / ours':>11}" if memory else "")).rstrip()]
    for side in rates:
        line = f"{side:20}{statistics.median(rates[side]):11.1f}   {span(ratios[side]) if side != 'ours' else '':20}"
        if memory:
            peak, loaded = memory[side]["peak"], memory[side]["loaded"]
            line += f"{peak / 2**20:9.0f}{(peak - loaded) / 2**20:12.0f}{peak / memory['ours']['peak']:11.2f}"
        lines.append(line.rstrip())
    return "\n".join([*lines, "captions/s: median of the rounds; ours / it: median of their ratios (least to most)"])


if __name__ == "__main__":
    with user_errors():
        main()
