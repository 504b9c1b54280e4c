"""Training on questions, packed by scene, against one row per question: questions a second, memory, time to accuracy.

    python benchmarks/bench_vqa.py                               # small shape, real 152k vocabulary, RSVQA LR, CPU
    python benchmarks/bench_vqa.py --swift ../venv_swift/bin/python            # and ms-swift, from a venv of its own
    python benchmarks/bench_vqa.py --target_loss 3.2             # and the time to that held-out loss, with the sweep
    python benchmarks/bench_vqa.py --device cuda --dtype bfloat16 --shape 2b --texts 100 --rows 50 --workers 8 --swift ...

Sides, all with the same weights, questions in the same order, questions an optimizer step, LoRA, AdamW, pixels, prompt,
threads and dtype, and a frozen vision tower:

    ours    SceneTrainer, PackedTask, QuestionCollator of this project; image tokens from the cache of the frozen tower
    tower   ours, but the vision tower runs in every step (`--cache_dir none` also decodes anew)
    compiled  ours with `train_vqa.py --torch_compile` (only with --torch_compile here: a minute of compiling first)
    rows    transformers.Trainer with one padded row per question, as popular fine-tuning repositories write it: the
            processor opens and cuts the image of every row, model(**inputs) with labels, logits of every position
    swift   ms-swift `swift sft` in a process of its own (benchmarks/swift_worker.py), stopped between rounds
    swift, flash  the same with flash attention and `--padding_free true`: the rows of a micro-batch one behind the other,
            which is what its `--packing true` does with as many rows as fit (only with --swift_flash, on CUDA)

That ours and rows do the same work is shown first: loss and LoRA gradient of one step are equal. Of ms-swift it is shown
what it trains, what its first rows look like and that their loss is that of our base. Rows a micro-batch are tuned for the
peers (--rows, where several are given); ours takes --pack_tokens. All of a step is timed: reading, collating, forward,
backward, optimizer; on CUDA one step of a round runs before the clock, so that workers are up, memory is there
and kernels are chosen. Rounds are interleaved; the median of their ratios is reported with the smallest and the largest.

Counted work (GFLOP) is that of each side's own algorithm, without padding; all weights but LoRA are frozen and need no
gradient of their own: 4 P a token for the linear layers (forward 2, backward 2), 6 P for LoRA, 4 V D for a position that
meets the vocabulary, 12 H d for a pair of query and key of a layer, 2 P a patch for the vision tower, forward only. Model
FLOP utilisation = that work / seconds / --peak_tflops.

On CUDA ms-swift's process shares the card with the others, and gives back between rounds what it does not need.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads would slow the neighbour, ours or the peer's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import transformers
from common import KeepsLosses, check_options, measured_apart, peak_memory, read_words, say
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import csv2json
import data2csv
import demo_bases
from config import InputError, VQAConfig, user_errors
from data import QuestionCollator, QuestionDataset, SceneSampler, pad_rows, row_align
from model import VQA, SceneTree, pixel_store
from report import write_json
from scenes import QuestionScene, read_conversations
from trainer import PackedTask, SceneTrainer

SEED = 0
ROOT = Path(__file__).resolve().parent.parent
RSVQA = ROOT.parent / "shared/data/rsvqa_lr"
TOKENIZER = ROOT.parent / "shared/data/qwen2_tokenizer"
PARTS = ("vision", "layers", "lora", "attention", "head")

# Random weights in these shapes; 2b and 3b: the config.json of Qwen2-VL-2B-Instruct and Qwen2.5-VL-3B-Instruct.
SHAPES = {
    "small": ("qwen2_5_vl",
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "heads": 4, "kv_heads": 2},
        {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 384, "fullatt": [3]}),
    "0.5b": ("qwen2_5_vl",
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "heads": 14, "kv_heads": 2},
        {"depth": 16, "hidden_size": 640, "num_heads": 8, "intermediate_size": 1710, "fullatt": [3, 7, 11, 15]}),
    "2b": ("qwen2_vl",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "heads": 12, "kv_heads": 2},
        {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 5120, "fullatt": list(range(32))}),
    "3b": ("qwen2_5_vl",
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "heads": 16, "kv_heads": 2},
        {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "fullatt": [7, 15, 23, 31]}),
}  # fmt: skip


def common_arguments(description: str) -> argparse.ArgumentParser:
    """What both VQA benchmarks ask."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="interleaved rounds of each side")
    add("--data", default=str(RSVQA), help="folder of RSVQA files, or a conversations file as csv2json.py writes it")
    add("--shape", choices=list(SHAPES), default="small", help="random weights in this shape")
    add("--base", help="folder of a base instead of --shape")
    add("--tokenizer", default=str(TOKENIZER), help="folder of Qwen2's vocab.json and merges.txt, for --shape")
    add("--lora_rank", type=int, default=64)
    add("--prompt", default=VQAConfig.prompt)
    add("--max_pixels", type=int, default=VQAConfig.max_pixels, help="largest image area")
    add("--learning_rate", type=float, default=1e-3)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast, the base in it")
    add("--threads", type=int, default=2, help="torch threads on all sides")
    add("--json", help="write every number here")
    return parser


def arguments(argv=None) -> argparse.Namespace:
    parser = common_arguments(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--scenes", type=int, default=4, help="images of an optimizer step")
    add("--texts", type=int, default=25, help="questions of each image in a step")
    add("--steps", type=int, default=1, help="timed optimizer steps of a peer's round")
    add("--our_steps", type=int, default=5, help="of ours, for each of theirs: a clock of enough seconds")
    add("--rows", type=int, nargs="+", default=[1, 5, 10, 25], help="rows a micro-batch to choose from, for each peer")
    add("--pack_tokens", type=int, default=VQAConfig.pack_tokens)
    add("--swift", help="python of a venv with ms-swift; without it that side is left out")
    add("--swift_flash", action="store_true", help="ms-swift with flash attention, without padding, too (CUDA)")
    add("--workers", type=int, default=0, help="DataLoader workers on all sides")
    add("--gradient_checkpointing", action="store_true", help="on all sides")
    add("--torch_compile", action="store_true", help="measure ours with compiled layers too")
    add("--peak_tflops", type=float, default=989.0, help="for MFU on CUDA: H100/H200 bf16 dense 989, A100 312")
    add("--target_loss", type=float, help="train till this held-out loss (nats a target token) and report the time")
    add("--target_accuracy", type=float, help="or till this held-out accuracy")
    add("--sweep", nargs="+", default=["1x100", "2x50", "4x25", "8x12", "16x6", "4x100"],
        help="scenes x texts of a step to compare by time to the target")  # fmt: skip
    add("--seeds", type=int, default=3, help="orders of the data, for ours in the sweep")
    add("--limit", type=int, default=8000, help="questions after which a run of ours to the target is given up")
    add("--peer_limit", type=int, default=8000, help="the same for each peer; 0: they do not run")
    add("--eval_images", type=int, default=4, help="held-out images that the target is measured on")
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory (CPU: in child processes)",
    )
    add("--measure", choices=["ours", "tower", "rows"], help=argparse.SUPPRESS)  # a child that prints its peak memory
    options = parser.parse_args(argv)
    check(options, "rounds", "scenes", "texts", "steps", "our_steps", "threads", "seeds")
    if options.swift_flash and (options.device != "cuda" or options.dtype != "bfloat16"):
        raise InputError("--swift_flash: flash attention needs --device cuda and --dtype bfloat16")
    return options


def check(options, *positive: str) -> None:
    check_options(options, *positive)
    if not Path(options.data).exists():
        raise InputError(f"--data {options.data}: not there; give a folder of RSVQA files or a conversations file")
    if not options.base and not (Path(options.tokenizer) / "vocab.json").exists():
        raise InputError(f"--tokenizer {options.tokenizer}: no vocab.json of Qwen2 there; give its folder, or --base")


# ----------------------------------------------------------------------------------------------------
# The same model and the same questions for all


def write_base(folder: Path, shape: str, tokenizer: Path, max_pixels: int, dtype: torch.dtype) -> None:
    """A base with random weights and Qwen2's whole vocabulary, in the layout of the hubs."""
    family, text, vision = SHAPES[shape]
    folder.mkdir(parents=True)
    made = demo_bases.write_qwen_tokenizer(folder, *read_words(tokenizer), family)
    config = demo_bases.qwen_config(made, family, text, vision)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    demo_bases.write_qwen_settings(folder, config, max_pixels)
    torch.manual_seed(SEED)
    settings = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # billions of random numbers
        model = getattr(transformers, config["architectures"][0])._from_config(settings, dtype=dtype)
    # With the words at their random size and this at 1 no logit could pass 5: the loss would stay above 7 for ever.
    model.model.language_model.norm.weight.data.fill_(4.0)
    demo_bases.write_weights(model.cpu(), folder)


def read_questions(source: str, folder: Path) -> tuple[list[QuestionScene], list[QuestionScene]]:
    """(train, held-out) scenes; RSVQA files go through data2csv.py and csv2json.py, split by image."""
    path = Path(source)
    if path.is_dir():
        with contextlib.redirect_stdout(io.StringIO()):
            data2csv.main(["--data_dir", str(path), "--output", str(folder / "questions.csv")])
            csv2json.main(["--csv", str(folder / "questions.csv"), "--output", str(folder / "data_vl.json")])
        path = folder / "data_vl.json"
    scenes = read_conversations(path).scenes
    train = [scene for scene in scenes if scene.split in (None, "train")]
    return train, [scene for scene in scenes if scene.split not in (None, "train")]


class Bench:
    """The model, its starting weights, the data, and a trainer of each side. collator: of the peer's rows (`RowCollator`)."""

    def __init__(self, options, collator=None):
        self.options, self.folder = options, tempfile.TemporaryDirectory(prefix="bench_vqa_")
        self.collator = collator or RowCollator
        folder, dtype = Path(self.folder.name), getattr(torch, options.dtype)
        self.base = options.base or folder / "base"
        if not options.base:
            write_base(self.base, options.shape, Path(options.tokenizer), options.max_pixels, dtype)
        self.config = VQAConfig(
            base_model=str(self.base), lora_rank=options.lora_rank, lora_alpha=2 * options.lora_rank, lora_dropout=0.0,
            prompt=options.prompt, max_pixels=options.max_pixels, cache_dir=str(folder / "cache"),
        )  # fmt: skip
        self.model = VQA.from_base(self.config, seed=SEED, dtype=dtype, device=options.device)
        if getattr(options, "gradient_checkpointing", False):
            self.model.gradient_checkpointing_enable()
        self.packed = ["ours", "tower"]  # the sides that are ours
        if getattr(options, "torch_compile", False):
            self.model.compile_layers()
            self.packed.append("compiled")
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        self.train, self.held = read_questions(options.data, folder)
        self.store = pixel_store(self.model, self.config.cache_dir)
        self.tokens = self.model.token_store(self.config.cache_dir, self.store)
        paths = [scene.image for scene in self.train + self.held]
        self.store.prepare(paths)
        start = time.perf_counter()
        self.model.prepare_tokens(self.tokens, self.store, paths)
        synchronize(options.device)
        self.images, self.encoding = len(paths), time.perf_counter() - start

    def dataset(self, scenes, *, cached: bool = True, texts: int = 0, seed: int = SEED, **other) -> QuestionDataset:
        return QuestionDataset(
            scenes, self.model.prompt, processor=self.model.processor, store=self.store,
            tokens=self.tokens if cached else None, texts_per_scene=texts, seed=seed, **other,
        )  # fmt: skip

    @torch.no_grad()
    def reset(self, strength: float = 0.0) -> None:
        """Back to the starting weights; with `strength`, LoRA's B matrices are random, so that A has a gradient too."""
        draw = torch.Generator().manual_seed(SEED)
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            if name in self.start:
                parameter.copy_(self.start[name])
                if strength and "lora_B" in name:
                    parameter.copy_(strength * torch.randn(parameter.shape, generator=draw))
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def plain_attention(self):
        """The language model as transformers makes it: PyTorch's attention (ours comes back after)."""
        language = self.model.qwen.model.language_model
        language.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            language.set_attn_implementation("scene")

    # -- trainers

    def settings(self, steps: int, batch: int, accumulate: int = 1, **other) -> TrainingArguments:
        options = self.options
        return TrainingArguments(**dict(
            output_dir=f"{self.folder.name}/run", max_steps=steps, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate, learning_rate=options.learning_rate, weight_decay=0.0,
            lr_scheduler_type="constant", optim=optimizer_of(options.device), max_grad_norm=1.0, bf16=options.dtype == "bfloat16",
            use_cpu=options.device == "cpu", seed=SEED, dataloader_num_workers=getattr(options, "workers", 0),
            remove_unused_columns=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            logging_nan_inf_filter=False,  # as config.py has it: no side waits for the GPU at every step
        ) | other)  # fmt: skip

    def ours(self, dataset: QuestionDataset, arguments) -> Trainer:
        budget = getattr(self.options, "pack_tokens", VQAConfig.pack_tokens)
        return type("Ours", (KeepsLosses, SceneTrainer), {})(
            model=self.model, task=PackedTask(None), args=arguments, train_dataset=dataset, settings={}, rates={},
            collator=QuestionCollator(budget, align=row_align(self.options.device)),
        )  # fmt: skip

    def theirs(self, rows: list[dict], arguments, shuffle: bool = False) -> Trainer:
        order = {} if shuffle else {"_get_train_sampler": lambda self, _=None: SequentialSampler(rows)}
        trainer = type("Theirs", (KeepsLosses, Trainer), order)(
            model=self.model.peft, args=arguments, train_dataset=rows, data_collator=self.collator(self.model)
        )
        # transformers has this off for Qwen-VL: it would take the mean of the micro-batches' means, another loss than ours.
        trainer.model_accepts_loss_kwargs = True
        return trainer

    def run(self, side: str, work: "Work", steps: int, rows: int = 1, *, strength: float = 0.0, **settings) -> dict:
        """Train `steps` steps from the starting weights: seconds, losses, the gradient of the first step, and on CUDA the
        memory before and at its peak."""
        self.reset(strength)
        cuda, warm = self.options.device == "cuda", warm_steps(self.options.device)
        steps, watch = steps + warm, StepWatch(self.options.device)
        memory = {"loaded": torch.cuda.memory_allocated()} if cuda else {}
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if side == "rows":
            assert work.per_step % rows == 0
            settings = self.settings(steps, rows, work.per_step // rows, **settings)
            trainer = self.theirs(work.rows[: steps * work.per_step], settings)
        else:
            settings = self.settings(steps, work.scenes, **settings)
            trainer = self.ours(work.tower if side == "tower" else work.dataset, settings)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        stance = torch.compiler.set_stance("default" if side == "compiled" else "force_eager")
        with stance, self.plain_attention() if side == "rows" else contextlib.nullcontext():
            trainer.train()
        losses = torch.stack(trainer.losses).view(steps, -1).sum(1).tolist()
        memory |= {"peak": peak_memory("cuda")} if cuda else {}
        return {"seconds": watch.seconds(warm), "losses": losses, "gradient": watch.gradient, "memory": memory}


class Work:
    """The questions of the first steps, `scenes` images with `texts` questions each: the same for all sides."""

    def __init__(self, bench: Bench, scenes: int, texts: int, steps: int):
        enough = [scene for scene in bench.train if len(scene.questions) >= texts]
        if not enough:
            raise InputError(f"--texts {texts}: no training image has as many questions")
        # Repeated, so that one epoch of the sampler holds all steps and no image twice in a step where there are enough.
        listed = (enough * -(-(steps + 2) * scenes // len(enough)))[: max(len(enough), (steps + 2) * scenes)]
        self.scenes, self.per_step = scenes, scenes * texts
        self.dataset = bench.dataset(listed, texts=texts)
        self.tower = bench.dataset(listed, texts=texts, cached=False)
        keys = list(SceneSampler(len(listed), scenes, SEED))[: steps * scenes]
        question = {
            id(branch): (scene.image, q)
            for scene, branches in zip(listed, self.dataset.branches)
            for branch, q in zip(branches, scene.questions)
        }
        self.examples = [self.dataset[key] for key in keys]
        drawn = [question[id(branch)] for example in self.examples for branch in example["branches"]]
        self.rows = [{"image": image, "question": q.text, "answer": q.answer} for image, q in drawn]


class RowCollator:
    """Rows -> what the model takes, the usual way: open and process each row's image, write the chat, pad on the right."""

    def __init__(self, model: VQA):
        self.tokenizer, self.processor, self.template = model.tokenizer, model.processor, model.settings.prompt
        self.image_token = model.prompt.image_token

    def prompts(self, rows: list[dict]) -> tuple[list[list[int]], dict]:
        """Token ids of each row up to its answer, and the images' patches."""
        pictures = []
        for row in rows:
            with Image.open(row["image"]) as picture:
                pictures.append(picture.convert("RGB"))
        made = self.processor(images=pictures, return_tensors="pt")
        prompts = []
        for row, grid in zip(rows, made["image_grid_thw"]):
            text = self.template.replace("{question}", row["question"])
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            count = int(grid.prod()) // self.processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
            prompts.append(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return prompts, {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}

    def batch(self, rows: list[list[int]], pixels: dict, left: bool = False) -> dict:
        longest = max(map(len, rows))
        pads = [longest - len(row) for row in rows]
        mask = torch.tensor([[0] * p + [1] * (longest - p) if left else [1] * (longest - p) + [0] * p for p in pads])
        fill = [self.tokenizer.pad_token_id]
        ids = torch.tensor([fill * p + row if left else row + fill * p for row, p in zip(rows, pads)])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.image_token).int(),
            **pixels,
        }

    def __call__(self, rows: list[dict]) -> dict:
        prompts, pixels = self.prompts(rows)
        answers = [row["answer"] + self.tokenizer.eos_token for row in rows]
        answers = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
        labels = [[-100] * len(asked) + said for asked, said in zip(prompts, answers)]
        batch = self.batch([asked + said for asked, said in zip(prompts, answers)], pixels)
        return batch | {"labels": pad_rows(labels, -100)}


class StepWatch(TrainerCallback):
    """When training began (before the first batch is read) and each step ended; the gradient of the first step."""

    def __init__(self, device: str):
        self.device, self.ends, self.gradient = device, [], None

    def on_train_begin(self, *_, **__):
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if args.max_grad_norm == 0 and self.gradient is None:  # the run that compares gradients
            grads = {re.sub(r"^(peft|base_model)\.(base_model\.)?", "", n): p.grad for n, p in model.named_parameters()}
            self.gradient = {n: g.detach().float().cpu() for n, g in grads.items() if g is not None}

    def on_step_end(self, *_, **__):
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    def seconds(self, warm: int) -> float:
        """From the end of the `warm` first steps, or where there are none from the start, to the end of the last."""
        return self.ends[-1] - (self.ends[warm - 1] if warm else self.start)


def warm_steps(device: str) -> int:
    """Steps of a round before the clock."""
    return int(device == "cuda")


def swift_steps(options) -> int:
    """Steps that ms-swift is to be ready for: the one of its start, all rounds, and one more, for it not to end."""
    return 2 + options.rounds * (options.steps + warm_steps(options.device))


def optimizer_of(device: str) -> str:
    return "adamw_torch_fused" if device == "cuda" else "adamw_torch"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------
# ms-swift, in a process of its own


def in_language_model(name: str) -> str:
    """A tensor's name from the language model on: what stands before differs between ms-swift's wrappers and ours."""
    return re.sub(r"^.*?(language_model\.)", r"\1", name)


class Swift:
    """`swift sft` on `listed` rows, `per_step` of them a step, held still between rounds (benchmarks/swift_worker.py)."""

    def __init__(self, bench: Bench, listed: list[dict], per_step: int, rows: int, steps: int, *, flash: bool = False):
        options, folder = bench.options, Path(bench.folder.name)
        self.bench, self.warm = bench, warm_steps(options.device)
        bench.reset()  # on a GPU the two processes share its memory
        file = folder / "swift.jsonl"
        with file.open("w") as out:
            for row in listed:
                asked = "<image>" + options.prompt.replace("{question}", row["question"])
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["answer"]}]
                out.write(json.dumps({"messages": turns, "images": [row["image"]]}) + "\n")
        flags = {
            "model": bench.base, "model_type": bench.model.qwen.config.model_type, "dataset": file, "max_steps": steps,
            "template": bench.model.qwen.config.model_type, "tuner_type": "lora", "torch_dtype": options.dtype,
            "attn_impl": "flash_attention_2" if flash else "sdpa", "padding_free": str(flash).lower(),
            "lora_rank": options.lora_rank, "lora_alpha": 2 * options.lora_rank, "lora_dropout": 0,
            "target_modules": "all-linear", "freeze_vit": "true", "freeze_aligner": "true", "max_grad_norm": 1.0,
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": per_step // rows,
            "learning_rate": options.learning_rate, "lr_scheduler_type": "constant", "warmup_ratio": 0, "weight_decay": 0,
            "optim": optimizer_of(options.device), "gradient_checkpointing": str(options.gradient_checkpointing).lower(),
            "dataset_shuffle": "false", "train_dataloader_shuffle": "false", "split_dataset_ratio": 0, "max_length": 4096,
            "dataloader_num_workers": options.workers, "dataset_num_proc": 1, "save_strategy": "no",
            "eval_strategy": "no", "logging_steps": 10**6, "report_to": "none", "output_dir": folder / "swift",
            "use_cpu": str(options.device == "cpu").lower(), "bf16": str(options.dtype == "bfloat16").lower(),
        }  # fmt: skip
        command = [options.swift, str(ROOT / "benchmarks/swift_worker.py")]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads),
            "MAX_PIXELS": str(options.max_pixels), "MIN_PIXELS": str(bench.config.min_pixels), "USE_HF": "1",
            "MODELSCOPE_CACHE": str(folder / "modelscope"), "HF_HOME": str(folder / "hf"),
        }  # fmt: skip
        self.log = (folder / f"swift_{rows}{'_flash' * flash}.log").open("w+")
        self.process = subprocess.Popen(
            command + [part for name, value in flags.items() for part in (f"--{name}", str(value))], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=folder,
        )  # fmt: skip
        self.first = self._read()  # after one step, which is not timed

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@@"):
                return json.loads(line[2:])
            self.log.write(line)
        self.log.flush()
        self.log.seek(0)
        raise SystemExit(f"ms-swift failed:\n{self.log.read()[-3000:]}")

    def run(self, steps: int, weights: Path | None = None) -> float:
        """Seconds of the next steps; then, outside the clock, the LoRA weights go to the file `weights`."""
        self.bench.reset()
        asked = {"steps": steps, "warm": 0 if weights else self.warm, "weights": weights and str(weights)}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        found = self._read()
        self.peak = found["peak"]
        return found["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def check_swift(bench: Bench, work: Work, first: dict) -> dict:
    """What ms-swift trains and reads, and whether that is what we do: a dict of findings for the report."""
    own = sorted(in_language_model(name) for name in bench.start)
    theirs = sorted(in_language_model(name) for name in first["trained"])
    collator = RowCollator(bench.model)
    count = len(first["input_ids"])
    mine = collator(work.rows[:count])
    bench.reset()
    # The loss of our weights on exactly the tokens that ms-swift read.
    ids = torch.tensor(first["input_ids"])
    length = ids.shape[1]  # ms-swift has cut labels and logits to the last columns, where answers are
    labels = torch.tensor([[-100] * (length - len(row)) + row for row in first["labels"]])
    batch = {"input_ids": ids, "attention_mask": (ids != bench.model.tokenizer.pad_token_id).long(), "labels": labels}
    batch |= {"mm_token_type_ids": (ids == collator.image_token).int()}
    batch |= {name: mine[name] for name in ("pixel_values", "image_grid_thw")}

    def loss_of(batch):
        with bench.plain_attention(), torch.no_grad():
            return bench.model.qwen(
                **{k: v.to(bench.model.device) for k, v in batch.items()}, use_cache=False
            ).loss.item()

    rows = [[i for i, m in zip(row.tolist(), real.tolist()) if m] for row, real in zip(ids, batch["attention_mask"])]
    expected = [row[real.bool()].tolist() for row, real in zip(mine["input_ids"], mine["attention_mask"])]
    return {
        "version": first["version"],
        "same_modules": own == theirs,
        "trained": len(theirs),
        "dtypes": first["dtypes"],
        "image_tokens": [int((ids == collator.image_token).sum()), int(mine["mm_token_type_ids"].sum())],
        "same_prompt": all(theirs[: len(row)] == row for theirs, row in zip(rows, expected)),
        "tokens_after_ours": [bench.model.tokenizer.decode(row[len(mine) :]) for row, mine in zip(rows, expected)][:1],
        "loss_swift": first["loss_rows"],
        "loss_ours_on_its_tokens": loss_of(batch),
        "loss_ours": loss_of(mine),
        "logits": f"{first['logits'][:2]} of {list(ids.shape)} positions",
    }


# ----------------------------------------------------------------------------------------------------
# Measurements


def check_equal(bench: Bench, work: Work, rows: int) -> dict:
    """One step of ours (cached tokens, and with the tower) and of the rows side from the same weights."""
    sides = (*bench.packed, "rows")
    found = {side: bench.run(side, work, 1, rows, strength=0.02, max_grad_norm=0) for side in sides}
    targets = sum(n for e in work.examples[: work.scenes] for _, n in e["branches"])
    return {"questions": work.per_step, "targets": targets} | same_work(found, "rows", bench.options.dtype)


def same_work(found: dict[str, dict], reference: str, dtype: str) -> dict:
    """Loss and gradient of one step of each side (`Bench.run`) beside the reference's. Ends the program where they differ."""
    theirs, result = found[reference], {}
    allowed = 1e-4 if dtype == "float32" else 5e-2
    for side, ours in found.items():
        if side == reference:
            continue
        assert {n.split("language_model")[-1] for n in ours["gradient"]} == {
            n.split("language_model")[-1] for n in theirs["gradient"]
        }
        first, second = (torch.cat([g[1].flatten() for g in sorted(
            (n.split("language_model")[-1], g) for n, g in run["gradient"].items())]) for run in (ours, theirs))  # fmt: skip
        result[side] = {
            "loss": ours["losses"][0],
            "loss_difference": abs(ours["losses"][0] - theirs["losses"][0]) / abs(theirs["losses"][0]),
            "gradient_difference": float((first - second).norm() / second.norm()),
        }
        if not max(result[side]["loss_difference"], result[side]["gradient_difference"]) <= allowed:
            raise SystemExit(f"the sides do not do the same work (allowed {allowed} relative): {json.dumps(result)}")
    return result | {f"loss_{reference}": theirs["losses"][0]}


def tune(bench: Bench, work: Work) -> dict:
    """Rows a micro-batch at which each peer is fastest: {side: {rows: questions a second}}."""
    found = {"rows": {}}
    usable = [rows for rows in bench.options.rows if work.per_step % rows == 0]
    if not usable:
        raise InputError(f"--rows {bench.options.rows}: none divides the {work.per_step} questions of a step")
    if len(usable) == 1:
        return {side: {usable[0]: None} for side in ("rows", "swift")[: 1 + bool(bench.options.swift)]}
    for rows in usable:
        found["rows"][rows] = work.per_step / bench.run("rows", work, 1, rows)["seconds"]
    if bench.options.swift:
        found["swift"] = {}
        for rows in usable:
            peer = Swift(bench, work.rows, work.per_step, rows, 3)
            found["swift"][rows] = work.per_step / peer.run(1)
            peer.close()
    return found


def compare(bench: Bench, work: Work, best: dict) -> dict:
    """Interleaved rounds of all sides: questions a second, and the ratio of ours to each peer in each round."""
    options = bench.options
    peers = {}
    if options.swift:
        for side in ("swift", "swift, flash")[: 1 + options.swift_flash]:
            flash = side != "swift"
            peers[side] = Swift(bench, work.rows, work.per_step, best["swift"], swift_steps(options), flash=flash)
    rates, memory = {side: [] for side in (*bench.packed, "rows", *peers)}, {}
    for number in range(options.rounds):
        for side, kept in rates.items():
            steps = options.steps * (options.our_steps if side in bench.packed else 1)
            if side in peers:
                seconds = peers[side].run(steps)
            else:
                made = bench.run(side, work, steps, best["rows"])
                seconds, memory[side] = made["seconds"], made["memory"]
            kept.append(steps * work.per_step / seconds)
        shown = ", ".join(f"{side} {kept[-1]:.1f}" for side, kept in rates.items())
        say(f"  round {number + 1} of {options.rounds}, questions/s: {shown}")
    result = {"rates": rates, "ratios": {}}
    if options.device == "cuda":
        result["memory"] = memory
    for peer in list(rates)[len(bench.packed) :]:
        for side in bench.packed:
            result["ratios"][f"{side}/{peer}"] = [a / b for a, b in zip(rates[side], rates[peer])]
    if peers:
        result["swift"] = check_swift(bench, work, peers["swift"].first) | {
            "peaks": {side: peer.peak for side, peer in peers.items()},
            "first": {side: (peer.first["loss_rows"], sum(map(len, peer.first["input_ids"])))
                      for side, peer in peers.items()},
        }  # fmt: skip
    for peer in peers.values():
        peer.close()
    return result


def counted_work(family: str, text: dict, vision: dict, vocabulary: int, rank: int, work: Work, merge: int = 2) -> dict:
    """GFLOP of a question in a step, by part: {side: {part: GFLOP}}; see the module's docstring."""
    h, f, n = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    d = h // text["heads"]
    kv = text["kv_heads"] * d
    linear = n * (2 * h * h + 2 * h * kv + 3 * h * f)
    lora = n * rank * (4 * h + 2 * (h + kv) + 3 * (h + f))
    w, depth = vision["hidden_size"], vision["depth"]
    gates = 3 if family == "qwen2_5_vl" else 2
    tower = (
        depth * (4 * w * w + gates * w * vision["intermediate_size"]) + w * merge**2 * (w * merge**2 + h) // merge**2
    )
    total = {side: dict.fromkeys(PARTS, 0.0) for side in ("ours", "rows", "swift")}
    step = work.examples[: work.scenes]
    for example in step:
        p, q = len(example["prefix"][0]), [len(ids) for ids, _ in example["branches"]]
        patches = int((example["prefix"][0] == example["image_token"]).sum()) * merge**2
        pairs = len(vision["fullatt"]) * patches + (depth - len(vision["fullatt"])) * min(patches, 64)  # windows: 8 x 8
        seen = 2 * tower * patches + 4 * w * pairs * patches
        tokens = {"ours": p + sum(q), "rows": sum(p + t for t in q)}
        targets = sum(count for _, count in example["branches"])
        heads = {"ours": targets, "rows": tokens["rows"], "swift": targets}
        sums = {"ours": p * (p + 1) / 2 + sum(t * p + t * (t + 1) / 2 for t in q),
                "rows": sum((p + t) * (p + t + 1) / 2 for t in q)}  # fmt: skip
        for side, parts in total.items():
            way = "ours" if side == "ours" else "rows"
            parts["vision"] += 0 if side == "ours" else seen * len(q)
            parts["layers"] += 4 * linear * tokens[way]
            parts["lora"] += 6 * lora * tokens[way]
            parts["attention"] += 12 * h * n * sums[way]
            parts["head"] += 4 * vocabulary * h * heads[side]
    return {side: {part: value / 1e9 / work.per_step for part, value in parts.items()} for side, parts in total.items()}


def work_table(bench: Bench, work: Work) -> dict:
    """Counted work in the shape that is measured, and the ratio it gives in each other shape."""
    config, rank = bench.model.qwen.config, bench.options.lora_rank
    t, v = config.text_config, config.vision_config
    own = (
        config.model_type,
        {"hidden_size": t.hidden_size, "intermediate_size": t.intermediate_size, "heads": t.num_attention_heads,
         "num_hidden_layers": t.num_hidden_layers, "kv_heads": t.num_key_value_heads},
        {"hidden_size": getattr(v, "embed_dim", None) or v.hidden_size, "depth": v.depth,
         "intermediate_size": getattr(v, "intermediate_size", None) or int(v.embed_dim * v.mlp_ratio),
         "fullatt": getattr(v, "fullatt_block_indexes", None) or list(range(v.depth))},
    )  # fmt: skip
    found = {"measured": counted_work(*own, t.vocab_size, rank, work)}
    return found | {name: counted_work(*shape, 151936, rank, work) for name, shape in SHAPES.items()}


def measure_child(options) -> None:
    """In a fresh process: two steps of one side, and the peak."""
    bench = Bench(options)
    work = Work(bench, options.scenes, options.texts, 2)
    before = peak_memory(options.device)
    bench.run(options.measure, work, 2, options.rows[0])
    print(json.dumps({"loaded": before, "peak": peak_memory(options.device)}))


def measure_memory(bench: Bench, argv: list[str], best: dict) -> dict:
    argv = [*argv, "--rows", str(best["rows"]), "--base", str(bench.base)]
    return {side: measured_apart(__file__, argv, side) for side in ("ours", "tower", "rows")}


# ----------------------------------------------------------------------------------------------------
# Time to a held-out target


@torch.no_grad()
def held_out(bench: Bench, batches: list[dict]) -> dict:
    """Loss (nats a target token) and accuracy (all tokens of an answer are the most probable: greedy decoding is right)."""
    model, total, count, right, questions = bench.model.eval(), 0.0, 0, 0, 0
    for pieces in batches:
        for piece in pieces:
            batch = {name: value.to(model.device) for name, value in piece.items()}
            labels, rows = batch.pop("labels"), batch.pop("label_rows")
            tree = SceneTree.of(batch)
            logits = model.qwen.lm_head(model.hidden_states(tree, **batch)[rows]).float()
            total, count = total + F.cross_entropy(logits, labels, reduction="sum").item(), count + len(labels)
            wrong = logits.argmax(-1) != labels
            ends = (labels == model.prompt.end).long()
            owner = torch.cat([ends.new_zeros(1), ends.cumsum(0)[:-1]])  # which question a target belongs to
            misses = torch.zeros(int(ends.sum()), device=wrong.device).index_add(0, owner, wrong.float())
            right, questions = right + int((misses == 0).sum()), questions + len(misses)
    return {"loss": total / count, "accuracy": right / questions}


class Target(TrainerCallback):
    """Stops at the target; evaluation, every `every` steps, is outside the clock."""

    def __init__(self, bench: Bench, batches: list, per_step: int):
        self.bench, self.batches, self.per_step, self.every = bench, batches, per_step, max(1, round(200 / per_step))
        self.seconds, self.curve, self.reached = 0.0, [], False

    def look(self, steps: int) -> bool:
        """Score the model as it is after `steps` steps; whether it has reached the target."""
        options = self.bench.options
        found = held_out(self.bench, self.batches)
        self.curve.append({"seconds": self.seconds, "questions": steps * self.per_step} | found)
        loss, accuracy = options.target_loss, options.target_accuracy
        self.reached = (loss is not None and found["loss"] <= loss) or (
            accuracy is not None and found["accuracy"] >= accuracy
        )
        return self.reached

    def on_train_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        synchronize(self.bench.options.device)
        self.seconds += time.perf_counter() - self.start
        language = self.bench.model.qwen.model.language_model
        before = language.config._attn_implementation
        language.set_attn_implementation("scene")
        control.should_training_stop = self.look(state.global_step)
        language.set_attn_implementation(before)
        self.start = time.perf_counter()


def to_target(bench: Bench, batches: list[dict], side: str, scenes: int, texts: int, seed: int, rows: int = 1) -> dict:
    """Train one side till the target, each in its natural order: ours in shuffled scenes with questions drawn anew each
    epoch, theirs in shuffled rows."""
    bench.reset()
    per_step = scenes * texts
    target = Target(bench, batches, per_step)
    steps = -(-(bench.options.limit if side == "ours" else bench.options.peer_limit) // per_step)
    listed = [{"image": s.image, "question": q.text, "answer": q.answer} for s in bench.train for q in s.questions]
    if side == "swift":
        swift_to_target(bench, listed, target, steps, rows, seed)
    else:
        if side == "rows":
            trainer = bench.theirs(listed, bench.settings(steps, rows, per_step // rows, seed=seed), shuffle=True)
        else:
            enough = [scene for scene in bench.train if len(scene.questions) >= texts] or bench.train
            data = bench.dataset(enough, texts=texts, seed=seed)
            trainer = bench.ours(data, bench.settings(steps, scenes, seed=seed))
        trainer.add_callback(target)
        trainer.remove_callback(PrinterCallback)
        with bench.plain_attention() if side == "rows" else contextlib.nullcontext():
            trainer.train()
    return {
        "side": side,
        "scenes": scenes,
        "texts": texts,
        "reached": target.reached,
        "curve": target.curve,
        **target.curve[-1],
    }


def swift_to_target(bench: Bench, listed: list[dict], target: Target, steps: int, rows: int, seed: int) -> None:
    """ms-swift on shuffled rows, its LoRA weights scored by our model at every stop. Its first step is not on its clock."""
    order, drawn = random.Random(seed), []
    while len(drawn) < (steps + target.every) * target.per_step:
        drawn += order.sample(listed, len(listed))
    peer = Swift(bench, drawn, target.per_step, rows, steps + target.every)
    own = {in_language_model(name): p for name, p in bench.model.named_parameters()}
    done, file = 1, Path(bench.folder.name) / "swift.safetensors"
    try:
        while done < steps and not target.reached:
            ahead = target.every - done % target.every
            target.seconds += peer.run(ahead, file)
            done += ahead
            with torch.no_grad():
                for name, weight in load_file(file).items():
                    own[in_language_model(name)].copy_(weight)
            target.look(done)
    finally:
        peer.close()


def race(bench: Bench, best: dict) -> dict:
    """The sweep of ours, and the peers, to the target."""
    held = bench.held[: bench.options.eval_images]
    data = bench.dataset(held)
    collate = QuestionCollator(VQAConfig.eval_pack_tokens)
    batches = [collate([data[0, i]])["pieces"] for i in range(len(data))]
    bench.reset()
    start = held_out(bench, batches)
    say(f"held out: {len(held)} images, {sum(len(s.questions) for s in held)} questions; "
        f"before training loss {start['loss']:.3f}, accuracy {start['accuracy']:.3f}")  # fmt: skip
    result = {"start": start, "ours": {}}
    say(
        f"{'ours, scenes x texts':26}{'seconds':>9}{'questions':>11}{'loss':>8}{'accuracy':>10}   seconds of each order"
    )
    for name in bench.options.sweep:
        scenes, texts = map(int, name.split("x"))
        runs = [to_target(bench, batches, "ours", scenes, texts, seed) for seed in range(bench.options.seeds)]
        result["ours"][name] = runs
        say(race_line(name, runs))
    if bench.options.peer_limit:
        options = bench.options
        for side in best:
            result[side] = [to_target(bench, batches, side, options.scenes, options.texts, SEED, best[side])]
            say(race_line(f"{side}, shuffled", result[side]))
    done = {n: statistics.median(r["seconds"] for r in runs) for n, runs in result["ours"].items()
            if all(r["reached"] for r in runs)}  # fmt: skip
    if done:
        result["best"] = min(done, key=done.get)
        say(f"fastest of ours to the target: {result['best']}")
        own, result["ratios"] = f"{bench.options.scenes}x{bench.options.texts}", {}
        for side in best:
            for run in result.get(side, []):
                ratios = result["ratios"][side] = {name: run["seconds"] / done[name] for name in done}
                shown = ", ".join(
                    f"{ratios[name]:.1f} ({name})" for name in dict.fromkeys((own, result["best"])) if name in done
                )
                say(f"time to the target, {side} / ours: {'' if run['reached'] else 'more than '}{shown}")
    return result


def race_line(name: str, runs: list[dict]) -> str:
    median = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "questions", "loss", "accuracy")}
    each = " ".join(f"{run['seconds']:.1f}" + ("" if run["reached"] else " (not reached)") for run in runs)
    return (f"{name:26}{median['seconds']:9.1f}{median['questions']:11.0f}{median['loss']:8.3f}{median['accuracy']:10.3f}"
            f"   {each}")  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# The run


def span(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def quiet(options) -> None:
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def opening(bench: Bench) -> str:
    options, model = bench.options, bench.model
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (False, True))
    questions = [sum(len(s.questions) for s in scenes) for scenes in (bench.train, bench.held)]
    return (
        f"{options.data}: {len(bench.train)} training images, {questions[0]} questions; held out {len(bench.held)}, "
        f"{questions[1]}\n{options.base or f'random weights, shape {options.shape}'}: {total / 1e6:.1f} M parameters, "
        f"{trained / 1e6:.2f} M trained (LoRA rank {options.lora_rank}), vocabulary {model.qwen.lm_head.out_features}, "
        f"{options.dtype}, {options.device}, {options.threads} threads\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"cache of the frozen tower: {bench.images} images in {bench.encoding:.2f} s, once "
        f"({1000 * bench.encoding / max(1, bench.images):.1f} ms an image)"
    )


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = arguments(argv)
    quiet(options)
    if options.measure:
        measure_child(options)
        return {}
    if options.swift and not Path(options.swift).exists():
        say(f"ms-swift is left out: no {options.swift}")
        options.swift = None
    elif not options.swift:
        say("ms-swift is left out: give --swift, the python of a venv that has it")
    bench = Bench(options)
    say(opening(bench))
    steps = 1 + max(options.steps * options.our_steps, swift_steps(options))
    work = Work(bench, options.scenes, options.texts, steps)
    results = {"settings": vars(options), "encoding_seconds": bench.encoding}
    lengths = [len(e["prefix"][0]) + len(ids) for e in work.examples for ids, _ in e["branches"]]
    say(f"a step: {options.scenes} images x {options.texts} questions; a row is {statistics.mean(lengths):.0f} tokens, a "
        f"question alone {statistics.mean(len(ids) for e in work.examples for ids, _ in e['branches']):.0f}")  # fmt: skip
    usable = next((rows for rows in reversed(options.rows) if work.per_step % rows == 0), 1)
    equal = results["equal"] = check_equal(bench, work, usable)
    labels = {"ours": "cached image tokens", "tower": "tower in the step", "compiled": "compiled layers"}
    for side in bench.packed:
        say(f"same work ({labels[side]}): loss {equal[side]['loss']:.6f} and {equal['loss_rows']:.6f} on {equal['questions']} "
            f"questions (difference {equal[side]['loss_difference']:.1e} relative), LoRA gradient difference "
            f"{equal[side]['gradient_difference']:.1e} relative")  # fmt: skip
    tuned = results["tuned"] = tune(bench, work)
    best = results["best_rows"] = {side: max(found, key=found.get) for side, found in tuned.items()}
    for side, found in tuned.items():
        shown = ", ".join(f"{rows}: {rate:.1f}" for rows, rate in found.items()) if len(found) > 1 else "not tuned"
        say(f"{side}, questions/s by rows a micro-batch: {shown}; taken: {best[side]}")
    results["compare"] = compare(bench, work, best)
    results["work"] = work_table(bench, work)
    if options.memory:
        results["memory"] = results["compare"].get("memory") or measure_memory(bench, argv, best)
    say(table(results))
    if options.target_loss is not None or options.target_accuracy is not None:
        results["race"] = race(bench, best)
    if options.json:
        write_json(options.json, results)
        say(f"written: {options.json}")
    return results


def table(results: dict) -> str:
    found, settings, work = results["compare"], results["settings"], results["work"]
    lines = ["", f"{'':28}questions/s, median (smallest to largest)"]
    lines += [f"{side:28}{span(rates)}" for side, rates in found["rates"].items()]
    lines += ["", f"{'times as fast':28}median of rounds (smallest to largest)"]
    lines += [f"{name:28}{span(ratios)}" for name, ratios in found["ratios"].items()]
    lines += ["", f"{'counted work, GFLOP a question':34}" + "".join(f"{part:>11}" for part in (*PARTS, "total"))]
    for side, parts in work["measured"].items():
        lines.append(f"{'  ' + side:34}" + "".join(f"{v:11.3f}" for v in (*parts.values(), sum(parts.values()))))
    totals = {name: {side: sum(parts.values()) for side, parts in sides.items()} for name, sides in work.items()}
    for peer in ("rows", "swift"):
        ratios = ", ".join(f"{name} {sides[peer] / sides['ours']:.1f}" for name, sides in totals.items())
        lines.append(f"  {peer} / ours in counted work, by shape: {ratios}")
    if settings["device"] == "cuda":
        for side, done in (("ours", "ours"), ("compiled", "ours"), ("rows", "rows"), ("swift", "swift"),
                           ("swift, flash", "swift")):  # fmt: skip
            if side not in found["rates"]:
                continue
            used = statistics.median(found["rates"][side]) * totals["measured"][done] / 1000 / settings["peak_tflops"]
            lines.append(f"model FLOP utilisation, {side}: {100 * used:.1f}% of {settings['peak_tflops']:g} TFLOP/s")
    for side, memory in results.get("memory", {}).items():
        grown = (memory["peak"] - memory["loaded"]) / 2**20
        lines.append(f"{f'peak memory, {side}':28}{memory['peak'] / 2**20:.0f} MiB, {grown:.0f} of it in training")
    if swift := found.get("swift"):
        lines += [f"{f'peak memory, {side}':28}{peak / 2**20:.0f} MiB" for side, peak in swift["peaks"].items()]
        lines += [
            "",
            f"ms-swift {swift['version']}: trains {swift['trained']} LoRA tensors, the same modules as ours: "
            f"{swift['same_modules']}; dtypes {swift['dtypes']}; logits {swift['logits']}",
            f"  image tokens of its first micro-batch {swift['image_tokens'][0]}, ours {swift['image_tokens'][1]}; its rows "
            f"begin with ours: {swift['same_prompt']}, and go on with {swift['tokens_after_ours'][0]!r}",
            f"  loss of that micro-batch before training: {swift['loss_swift']:.5f}; our weights on its tokens "
            f"{swift['loss_ours_on_its_tokens']:.5f}, on our tokens {swift['loss_ours']:.5f}",
        ]
        if "swift, flash" in swift["first"]:
            loss, length = swift["first"]["swift, flash"]
            lines.append(f"  with flash attention, without padding: loss {loss:.5f}, {length} instead of "
                         f"{swift['first']['swift'][1]} positions")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    with user_errors():
        main()
