"""Every setting of the project, with its unit and the reason for its default.

One dataclass per task. The command line of a script is derived from its dataclass: a field is a
flag, the docstring under a field is that flag's help. Every flag of `transformers.TrainingArguments`
works beside them. Nothing heavy is imported at the top, so `--help` and a mistyped path answer at once.

A value is taken from the first of these that has it: the command line, the run that is resumed, the
preset, the default written here.
"""

import ast
import atexit
import contextlib
import dataclasses
import errno
import gc
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Literal

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair; also how Python reads bytes that are no UTF-8
NO_CHARACTER = re.compile("[\0\ud800-\udfff]")


class InputError(ValueError):
    """Something the user gave cannot be used: the message says which file, row or field, what was
    expected and what to do. Scripts print it without a traceback and exit with code 2."""


def _leave_group() -> None:
    """Where this was one of several processes: else its threads may end it with SIGABRT, all done, on its way out."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextlib.contextmanager
def user_errors():
    """Wrap a script's `main()`: an `InputError` becomes one readable line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict":  # an output in GBK or Latin-1 shows "?", and the work is not lost
            stream.reconfigure(errors="replace")
    atexit.register(gc.freeze)  # or the last collection looks through all that torch and transformers made, for 1.5 s
    try:
        yield
        _leave_group()
    except SystemExit as ending:
        if ending.code in (None, 0, 1):
            _leave_group()
        raise
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `... | head` closed our output
        raise SystemExit(141) from None
    except Exception as error:
        if reason := _of_the_machine(error):
            print(f"error: {reason}", file=sys.stderr)
            raise SystemExit(2) from None
        raise


# What torch and numpy say of a file that they could not write whole, without the system's reason.
CUT_SHORT = re.compile(r"inline_container\S* *\. unexpected pos|PytorchStreamWriter|requested and \d+ written")


def _of_the_machine(error: Exception) -> str | None:
    """What an error says that is neither the input's nor the program's."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
    if full or CUT_SHORT.search(str(error)):
        what = "the disk is full" if full else "a file could not be written whole, mostly because the disk is full"
        return f"{what} ({error}); make room, and go on from the last whole checkpoint or run the same command again"
    if isinstance(error, RuntimeError) and re.match(
        r"DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)
    ):
        return (
            "a process that read images was killed, mostly for want of memory: give it fewer (--dataloader_num_workers 0;"
            " search.py: --workers 0)"
        )
    return None


def processors() -> int:
    """How many processors this process may use: a cluster's or a container's share of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------
# Settings


@dataclass
class DataConfig:
    """Where scenes come from and how pixels reach a model; shared by every task."""

    preset: Literal["full", "demo"] = "full"
    """`full`: the real bases, settings for one CUDA device. `demo`: small models of the same classes on drawn
    scenes, for two CPU cores; run `python demo_data.py` and `python load.py --preset demo` first."""

    train_file: str | None = None
    """Training data: triplets, captions in any form of the README (rows, Karpathy, COCO, NWPU-Captions, scenes), or a
    folder with images/ and captions.json. A file with a `split` on its rows brings its own validation and test split."""

    val_file: str | None = None
    """Validation data. Default: the `val` rows of train_file, else val_fraction of its images."""

    test_file: str | None = None
    """Test data, scored once with the best model. Default: the `test` rows of train_file, if it has any."""

    test_split: str = "test"
    """Which `split` of the data is scored as test; RSVQA HR has a second one, `test_phili` (another city). Rows of others
    whose name begins with test are left out."""

    image_root: str | None = None
    """Folder that image names are relative to; several are parted by a colon, as in PATH. Default: the data file's folder, or its
    `images/`. An image that lies in a folder below, and in no second one, is found too."""

    language: Literal["all", "en", "zh"] = "all"
    """Texts to use: all of them, those without Chinese characters, or those with."""

    val_fraction: float = 0.1
    """Share of images (not of rows: rows of one image never part) held out when no validation split is given."""

    max_samples: int | None = None
    """Use at most this many scenes of each split (a seeded sample), for a quick try."""

    max_rejected: float = 0.01
    """Share of rows, 0 to 1, that may be unusable before the run stops. Fewer are listed in rejected.jsonl."""

    allow_leak: bool = False
    """Go on although the same image (same bytes) is in two splits. Scores are then too high."""

    bands: str = "auto"
    """Bands that become RGB: `auto` (colour interpretation, else the first three), `4,3,2` (1-based), or a sensor
    preset such as `sentinel2`. Recorded in the checkpoint, so that training and use agree."""

    stretch: Literal["auto", "percentile", "reflectance", "none"] = "auto"
    """How values become 8-bit: `auto` keeps 8-bit files and stretches others between percentiles."""

    percentiles: list[float] = field(default_factory=lambda: [2.0, 98.0])
    """Percentiles of a scene's valid pixels that become black and full brightness (`auto`, `percentile`)."""

    reflectance: list[float] = field(default_factory=lambda: [0.0, 3000.0])
    """Values that become black and full brightness with `--stretch reflectance`, in the file's own units (Sentinel-2:
    reflectance x 10000). The same for every scene, so brightness keeps its meaning."""

    nodata: float | None = None
    """A value that holds no data although the files do not tag it."""

    cache_dir: str | None = ".cache"
    """Folder of resized images and frozen-tower features, reused by later runs. `none` turns it off."""


@dataclass
class QwenConfig(DataConfig):
    """What the tasks on a Qwen-VL share: it takes images of any size."""

    min_pixels: int = 56 * 56
    """Images below this area (pixels) are enlarged. The processor's own lower bound for Qwen-VL."""

    max_pixels: int = 448 * 448
    """Images above this area (pixels) are shrunk. 448x448 is 256 merged tokens; a 256x256 scene stays as it is."""


@dataclass
class MatchConfig(QwenConfig):
    """train_match.py: a dual encoder that scores image-text pairs."""

    base_model: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Folder of the Qwen2.5-VL or Qwen2-VL base (`python load.py` brings it)."""

    image_tower: Literal["frozen", "lora", "full"] = "lora"
    """What is trained in the vision encoder. LoRA keeps the optimizer state under 1% of a full fine-tune."""

    text_tower: Literal["frozen", "lora", "full"] = "lora"
    """What is trained in the language model. A frozen tower runs once per text and is cached on disk."""

    lora_rank: int = 16
    """Rank of the LoRA matrices (Hu et al. 2021)."""

    lora_alpha: int = 32
    """LoRA scale: updates are multiplied by alpha / rank."""

    lora_dropout: float = 0.05
    """Dropout on the LoRA input, 0 to 1."""

    projection_dim: int = 512
    """Length of an embedding. 512 is CLIP's; a million of them take 2 GB in fp32."""

    projection_hidden: int = 0
    """Width of a hidden layer in both projection heads; 0 for one linear layer, which needs the least data."""

    projection_dropout: float = 0.0
    """Dropout before the projection, 0 to 1."""

    whiten_init: bool = True
    """Start each projection as a PCA whitening of its tower's features on up to 512 training scenes (not on resume). Raw
    features lie within a few degrees of one another, and training from a random projection first has to spread them."""

    max_text_tokens: int = 128
    """Longer texts are cut to this many tokens (the end-of-text token is kept); those of training are counted and said."""

    loss: Literal["triplet", "infonce", "sigmoid"] = "triplet"
    """`triplet`: max(0, margin + d(image, positive) - d(image, negative)) with cosine distance; `infonce`:
    multi-positive, false negatives masked; `sigmoid`: SigLIP's pairwise loss."""

    margin: float = 0.2
    """Margin of the triplet loss, in cosine distance (0 to 2), and of `accuracy_margin` in results.json."""

    in_batch_negatives: Literal["none", "semi_hard", "hardest"] = "semi_hard"
    """Negatives the triplet loss adds from the batch, in both directions: none; semi-hard (further than the positive
    but within the margin, FaceNet eq. 4); hardest (VSE++). Semi-hard does not collapse from a cold start."""

    temperature: float = 0.07
    """Initial temperature of infonce (0.01 or more; learnt; CLIP's value). sigmoid starts at 0.1 with bias -10, as SigLIP
    does."""

    texts_per_scene: int = 5
    """Rows of each scene drawn per epoch (0: all). The image is encoded once for all of them."""

    grad_cache_chunk: int = 0
    """Encode the batch in chunks of this many images (and a like share of texts), with the loss over the whole batch
    (GradCache, Gao et al. 2021): batch 2048 in the memory of one chunk, one more forward pass. Chunks are larger where a batch
    has fewer distinct texts than chunks. 0: off."""

    mine_negatives: bool = False
    """Before training, give every row the most similar text of another image. A resumed run keeps its negatives."""

    mine_model: str | None = None
    """Checkpoint of a trained matcher that mines, by image-text score. Default: the base's text tower, by similarity to
    the image's own texts, since images and texts of a base do not share a space yet."""

    mine_margin: float = 0.05
    """A mined negative must score at least this much (cosine) below the positive, else it is taken for a true text of
    the image (a false negative) and left out."""

    image_learning_rate: float | None = None
    """Learning rate of the vision encoder. Default: --learning_rate."""

    text_learning_rate: float | None = None
    """Learning rate of the language model. Default: --learning_rate."""

    head_learning_rate: float | None = None
    """Learning rate of the projection heads and the temperature. Default: 10 x --learning_rate with LoRA or frozen
    towers (the heads start from nothing), else --learning_rate."""

    early_stopping_patience: int = 0
    """Stop after this many evaluations without a better metric_for_best_model. 0: off."""

    eval_only: str | None = None
    """Score this checkpoint on the test split (else the validation split) and stop; nothing is trained."""

    max_eval_scenes: int = 2000
    """Scenes scored at each evaluation during training (a fixed sample); the final test uses all."""


@dataclass
class VQAConfig(QwenConfig):
    """train_vqa.py: LoRA fine-tuning of Qwen2-VL or Qwen2.5-VL on questions about images."""

    task: Literal["rsvqa", "chat"] = "rsvqa"
    """rsvqa: short answers, scored as right or wrong. chat: free text, scored by held-out loss and as captions are; longer
    limits, the question alone as prompt, no blind baseline."""

    train_file: str | None = None
    """Training data: what csv2json.py writes, rows of image, question and answer (JSON, JSONL, CSV), conversations or `messages`;
    with --task chat also captions in any form of the README. A `split` on its rows makes its validation and test split."""

    base_model: str = "Qwen/Qwen2-VL-2B-Instruct"
    """Folder of the Qwen2-VL or Qwen2.5-VL base (`python load.py` brings it)."""

    lora: str | None = None
    """Adapter folder (best_model/, checkpoint-N/, or one another tool saved): with --eval_only the one to score, else the
    one training starts from."""

    eval_only: bool = False
    """Score --lora on the test split (else the validation split), before and after, and stop; nothing is trained."""

    lora_rank: int = 64
    """Rank of the LoRA matrices (Hu et al. 2021)."""

    lora_alpha: int = 128
    """LoRA scale: updates are multiplied by alpha / rank (by alpha / sqrt(rank) with --use_rslora)."""

    lora_dropout: float = 0.05
    """Dropout on the LoRA input, 0 to 1."""

    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers of the language model that get LoRA."""

    use_dora: bool = False
    """DoRA (Liu et al. 2024): magnitude and direction apart. Better at low rank, slower."""

    use_rslora: bool = False
    """rsLoRA (Kalajdzievski 2023): scale by alpha / sqrt(rank), for high ranks."""

    quantize: Literal["none", "4", "8"] = "none"
    """Load the base in 4 bits (QLoRA, Dettmers et al. 2023) or 8 bits. CUDA and bitsandbytes only."""

    vision_tower: Literal["frozen", "lora", "full"] = "frozen"
    """What is trained in the vision encoder. Frozen: every image is encoded once and its tokens are kept in the cache."""

    merger: Literal["frozen", "full"] = "frozen"
    """Whether the layer between vision encoder and language model is trained. `--vision_tower full` includes it."""

    prompt: str = "Answer with one word, one number or a short phrase.\n{question}"
    """What the model is asked, before and after training alike. What stands before {question} is encoded once an image."""

    max_question_tokens: int = 128
    """Longer questions are left out and listed in rejected.jsonl."""

    max_answer_tokens: int = 16
    """Longer answers are left out of training and listed; generation stops after as many."""

    packing: bool = True
    """One sequence per image: the image once, each question as its own branch. `--no_packing` runs every question as a row
    of its own with its own image: the same loss and gradient, many times slower (for comparison)."""

    texts_per_scene: int = 0
    """Questions of each image drawn per epoch (0: all)."""

    pack_tokens: int = 16384
    """Tokens of one forward pass. A batch that needs more runs in several, with the gradient of the whole; so does a scene."""

    compile_layers: bool = False
    """Compile the language model's layers for training (torch.compile). On an H100 the shape of Qwen2-VL-2B trains 1.5 times as
    fast (docs/results.md), after a minute of compiling: for runs that take longer than a few minutes. CUDA."""

    eval_pack_tokens: int = 16384
    """Tokens of one forward pass in evaluation, where nothing is kept for a backward pass."""

    decode: Literal["generate", "candidates"] = "generate"
    """How answers are made: greedy generation, or the most probable of the training split's answers of that type."""

    blind_baseline: bool = True
    """Train the same model again with the images removed: what it scores, questions give away by themselves. About as long
    again as training where an image has few questions; `--no_blind_baseline` leaves it out."""

    vision_learning_rate: float | None = None
    """Learning rate of the vision encoder. Default: --learning_rate."""

    merger_learning_rate: float | None = None
    """Learning rate of the merger. Default: --learning_rate."""

    early_stopping_patience: int = 0
    """Stop after this many evaluations without a better metric_for_best_model. 0: off."""

    max_eval_questions: int = 2000
    """Validation questions answered at each evaluation during training (whole images, a fixed sample)."""

    max_test_scenes: int | None = None
    """Images of the test split that are scored (a fixed sample, whatever the seed). Default: all."""


@dataclass
class CaptionConfig(DataConfig):
    """train_caption.py: a vision encoder, a projector and a language model that describes images."""

    vision_model_name: str = "openai/clip-vit-base-patch16"
    """Folder of the CLIP or SigLIP model whose vision encoder sees (`python load.py` brings it)."""

    language_model_name: str = "Qwen/Qwen3-0.6B"
    """Folder of the causal language model that writes: any of transformers."""

    vision_layer: int = -2
    """Layer of the vision encoder whose patch tokens are read; -2, the last but one, as LLaVA does: CLIP's last layer
    serves its class token. -1 is SigLIP's usual choice. The class token is dropped."""

    image_fit: Literal["crop", "squash"] = "crop"
    """How an oblong image becomes square: the base's own way (CLIP: shrink, then cut the centre out; SigLIP squashes), or
    squashed, so that nothing at its ends is lost."""

    projector: Literal["linear", "mlp", "pixel_shuffle"] = "mlp"
    """From vision to language: one layer; two with GELU (LLaVA-1.5); or 2 x 2 neighbouring patches joined first, a quarter
    of the tokens (Shi et al. 2016; InternVL 1.5)."""

    freeze_vision_model: bool = True
    """Leave the vision encoder as it is: every image is encoded once and its features are kept in the cache.
    `--no_freeze_vision_model` trains it in the second stage."""

    freeze_language_model_except_layers: int = 2
    """The last N layers of the language model are trained in the second stage, the others stay frozen. 0: none."""

    lora_rank: int = 0
    """Above 0: LoRA of this rank on every layer of the language model in the second stage, instead of its last layers."""

    lora_alpha: int = 32
    """LoRA scale: updates are multiplied by alpha / rank."""

    lora_dropout: float = 0.05
    """Dropout on the LoRA input, 0 to 1."""

    projector_epochs: float = 1.0
    """Epochs of the first stage, in which the projector alone is trained (LLaVA, Liu et al. 2023, section 4.2); the second
    takes --num_epochs. 0: no first stage."""

    projector_stage_learning_rate: float = 1e-3
    """Learning rate of the first stage."""

    projector_learning_rate: float | None = None
    """Learning rate of the projector in the second stage. Default: --learning_rate."""

    vision_learning_rate: float | None = None
    """Learning rate of the vision encoder where it is trained. Default: --learning_rate."""

    prompt: str = "Describe the image."
    """What the model is asked for an English caption; a row may bring its own `prompt`."""

    prompt_zh: str = "描述这幅图像。"
    """What the model is asked for a Chinese caption."""

    max_caption_tokens: int = 96
    """Longer captions are left out of training and listed in rejected.jsonl; generation stops after as many tokens."""

    packing: bool = True
    """One sequence per image: the image once, each caption as its own branch. `--no_packing` runs every caption as a row of
    its own with its own image: the same loss and gradient, several times slower (for comparison)."""

    texts_per_scene: int = 0
    """Captions of each image drawn per epoch (0: all), of its different prompts in turn."""

    pack_tokens: int = 16384
    """Tokens of one forward pass. A batch that needs more runs in several, with the gradient of the whole."""

    compile_layers: bool = False
    """Compile the language model's layers for training (torch.compile), after a minute of compiling. CUDA."""

    early_stopping_patience: int = 0
    """Stop after this many evaluations without a better metric_for_best_model. 0: off."""

    max_eval_scenes: int = 500
    """Validation images captioned at each evaluation during training (a fixed sample); the final test uses all."""


WHOLE_MODELS = (
    "every GPU holds a whole model (accelerate/ddp.yaml); LoRA, --gradient_checkpointing and, of train_vqa.py, --quantize 4 save"
    " memory"
)
# Flags of TrainingArguments that would change nothing here, or break.
USELESS = {
    "neftune_noise_alpha": "these models' losses know nothing of it",
    "label_smoothing_factor": "these models' losses know nothing of it",
    "use_liger_kernel": "the Trainer does not know these models; --torch_compile of train_vqa.py and of train_caption.py fuses"
    " the same operations",
    "train_sampling_strategy": "scenes are drawn at random, and a batch has no padding that groups would save",
    "remove_unused_columns": "batches are made of scenes, not of columns",
    "dataloader_drop_last": "an epoch of scenes is filled up to whole batches",
    "fsdp": WHOLE_MODELS,
    "deepspeed": WHOLE_MODELS,
    "save_on_each_node": "checkpoints are written once, into an --output_dir that all machines see",
    "push_to_hub": "nothing is uploaded while training; afterwards: hf upload NAME RUN/best_model",
}
# TrainingArguments whose default we change, with the reason.
TRAINING_DEFAULTS = {
    "output_dir": None,  # output/training_YYYYMMDD_HHMMSS_PROCESS, or the run that is resumed
    "remove_unused_columns": False,  # our batches are made by our collator
    "logging_nan_inf_filter": False,  # it hides NaN in the log, and waits for the GPU at every step
    "report_to": "tensorboard",
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,  # the best and the last
    "load_best_model_at_end": True,
    "metric_for_best_model": "mR",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "ddp_find_unused_parameters": False,
    "ddp_broadcast_buffers": False,  # no buffer of these models changes in training
    "ddp_timeout": 86_400,  # seconds; the others wait while one process reads, answers or writes
}

READERS = min(4, processors())  # more than there are processors only wait for each other
PRESETS: dict[str, dict[str, dict]] = {
    "MatchConfig": {
        "full": {
            "per_device_train_batch_size": 32,  # scenes; with texts_per_scene 5 that is 160 pairs
            "per_device_eval_batch_size": 32,
            "learning_rate": 1e-4,
            "num_train_epochs": 5,
            "gradient_checkpointing": True,
            "dataloader_num_workers": READERS,
        },
        "demo": {
            "base_model": "models/demo/qwen2_5_vl",
            "train_file": "data/demo/triplets_train.json",
            "val_file": "data/demo/triplets_val.json",
            "test_file": "data/demo/triplets_test.json",
            "image_root": "data/demo/images",
            # Every drawn scene becomes 112 x 112, which the base knows; 112 * 112 would make most 112 x 84 (mR 0.446, not 0.535).
            "max_pixels": 128 * 128,
            "stretch": "percentile",  # drawn haze and light differ from scene to scene
            "image_tower": "full",  # towers of 2 M parameters: LoRA would save nothing
            "text_tower": "full",
            "projection_dim": 128,
            "loss": "infonce",
            "texts_per_scene": 2,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "learning_rate": 5e-4,
            "num_train_epochs": 7,
            "eval_strategy": "steps",
            "eval_steps": 120,
            "save_strategy": "steps",
            "save_steps": 120,
            "dataloader_num_workers": 0,
            "use_cpu": True,
        },
    },
    "VQAConfig": {
        "full": {
            "train_file": "data_vl_train.json",
            "test_file": "data_vl_test.json",
            "per_device_train_batch_size": 4,  # scenes: some 400 questions of RSVQA LR
            "per_device_eval_batch_size": 16,
            "learning_rate": 1e-4,
            "num_train_epochs": 5,
            "gradient_checkpointing": True,
            "dataloader_num_workers": READERS,
            "metric_for_best_model": "accuracy",
        },
        "demo": {
            "base_model": "models/demo/qwen2_5_vl",
            "train_file": "data/demo/data_vl_train.json",
            "test_file": "data/demo/data_vl_test.json",
            "max_pixels": 128 * 128,  # every drawn scene becomes 112 x 112: 16 tokens
            "stretch": "percentile",  # drawn haze and light differ from scene to scene
            "lora_rank": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.0,
            "prompt": "{question}",  # the small base knows no instructions
            "per_device_train_batch_size": 2,  # many small steps: a fresh adapter needs steps, not questions per step
            "per_device_eval_batch_size": 64,
            "learning_rate": 2e-3,
            "num_train_epochs": 1.25,  # bucketed 0.861 instead of 0.843; 1.5: 0.863
            "logging_steps": 50,
            "metric_for_best_model": "accuracy",
            "dataloader_num_workers": 0,
            "use_cpu": True,
        },
    },
    "CaptionConfig": {
        "full": {
            "train_file": "data/captions.json",
            "per_device_train_batch_size": 8,  # images; with 5 captions each that is 40 rows
            "per_device_eval_batch_size": 32,
            "learning_rate": 2e-5,
            "num_train_epochs": 3,
            "dataloader_num_workers": READERS,
            "metric_for_best_model": "CIDEr",
        },
        "demo": {
            "vision_model_name": "models/demo/clip",
            "language_model_name": "models/demo/qwen3",
            "train_file": "data/demo/captions_en.json",
            "image_root": "data/demo/images",
            "stretch": "percentile",  # drawn haze and light differ from scene to scene
            "freeze_language_model_except_layers": 4,  # all of them: the small base knows words, not images
            "projector_epochs": 0.5,
            "projector_stage_learning_rate": 1e-2,  # 0.46 nats at its end instead of 0.65: more goes through a new projector
            "per_device_train_batch_size": 8,  # 60 images a second instead of the 38 at 4, which 16 does not raise
            "per_device_eval_batch_size": 64,
            "max_eval_scenes": 100,
            "texts_per_scene": 2,  # of five: the one in detail and one of four that say much the same, in two thirds of the time
            "learning_rate": 3e-3,
            "num_train_epochs": 3,  # its base reads tables of words already (demo_bases.py)
            "logging_steps": 50,
            "metric_for_best_model": "loss",  # CIDEr of 100 images is too rough to choose by
            "dataloader_num_workers": 0,
            "use_cpu": True,
        },
    },
}


# What `--task chat` changes in train_vqa.py's presets.
CHAT_DEFAULTS = {
    "prompt": "{question}",
    "max_question_tokens": 512,
    "max_answer_tokens": 512,
    "blind_baseline": False,
    "metric_for_best_model": "loss",
}
CHAT_PRESETS = {  # where the user names no --data
    "full": {"train_file": "captions_zh.json", "test_file": None},  # as the README's translation writes it
    "demo": {
        "train_file": "data/demo/chat_zh.json",
        "test_file": None,
        "max_answer_tokens": 12,
        "texts_per_scene": 3,
        "num_train_epochs": 1,
        "max_test_scenes": 100,  # answering 300, before and after, takes as long as training
    },
}

# What sets call their splits, in lower case -> what we do; "restval" is COCO's name for the extra training part. Others,
# such as RSVQA HR's test_phili, keep theirs.
SPLITS = {
    "train": "train", "training": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

# Short names of flags, by task.
ALIASES = {
    "VQAConfig": {"--data": "--train_file", "--torch_compile": "--compile_layers"},
    "CaptionConfig": {
        "--data_path": "--train_file",
        "--batch_size": "--per_device_train_batch_size",
        "--num_epochs": "--num_train_epochs",
        "--torch_compile": "--compile_layers",
    },
}

# What a run says it is -> who made it.
SCRIPTS = {
    "match": ("MatchConfig", "train_match.py"), "vqa": ("VQAConfig", "train_vqa.py"), "chat": ("VQAConfig", "train_vqa.py"),
    "caption": ("CaptionConfig", "train_caption.py"),
}  # fmt: skip

PROJECTOR_STAGE = "projector"  # folder, in a captioner's run, of its first stage


# ----------------------------------------------------------------------------------------------------
# Command line


def add_device_flags(parser) -> None:
    """`--device` and `--dtype` of a script that uses a trained model; `model.pick_device` reads them."""
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 on CUDA, float32 on a CPU",
    )  # fmt: skip


def field_help(cls: type) -> dict[str, str]:
    """`{field name: docstring under that field}` of a dataclass and its bases."""
    help_of = {}
    for base in reversed(cls.__mro__):
        if base.__module__ != cls.__module__:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for node, after in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                help_of[node.target.id] = " ".join(str(after.value.value).split())
    return help_of


def _parser(classes: list[type], description: str):
    """-> (a parser of the classes' fields, {setting: its library's default})."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        classes, description=description, usage="%(prog)s [--setting value ...]",
        allow_abbrev=False,  # `flag_value` would miss a flag cut short
    )  # fmt: skip
    base, help_of = {}, field_help(classes[0])
    for action in parser._actions:  # a flag's `--no_` twin follows it with another default: the first is meant
        base.setdefault(action.dest, action.default)
        if action.dest in help_of:
            action.help = help_of[action.dest].replace("%", "%%")
        if action.option_strings[-1] in (f"--no_{action.dest}", f"--no-{action.dest.replace('_', '-')}"):
            action.help = f"turns --{action.dest} off"
    base.pop("help", None)
    return parser, base


def _defaults(config_class: type, argv: list[str]) -> dict:
    """What holds where the command line says nothing, by preset and task."""
    preset = flag_value("--preset", argv) or "full"
    defaults = TRAINING_DEFAULTS | PRESETS[config_class.__name__].get(preset, {}) | {"preset": preset}
    if flag_value("--task", argv) == "chat":
        defaults |= CHAT_DEFAULTS
        if not flag_value("--train_file", argv):
            defaults |= CHAT_PRESETS.get(preset, {})
    if flag_value("--train_file", argv):  # the preset's own data does not go with the user's
        defaults = {k: v for k, v in defaults.items() if k not in ("val_file", "test_file", "image_root")}
    return defaults


class _Begun:
    """The run that `--resume_from_checkpoint` names. Raises InputError.

    checkpoint: the folder to go on from, `step` its optimizer step; recorded: the settings of its config.json;
    run: the folder of the whole run; own: that of the checkpoint's stage.
    """

    def __init__(self, given: str, config_class: type):
        checkpoint = resolve_checkpoint(given)
        self.checkpoint = checkpoint if checkpoint.parent.name else checkpoint.absolute()  # "." has no parent
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            record = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
            self.step, self.recorded = state.get("global_step"), dict(record["settings"])
            script = SCRIPTS.get(record.get("task"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{checkpoint}: cannot resume, not a whole checkpoint ({reason}); give an earlier one"
            ) from None
        if script and script[0] != config_class.__name__:
            raise InputError(f"{given}: a run of {script[1]}, which goes on with it")
        self.own = self.checkpoint.parent
        self.run = self.own.parent if self.own.name == PROJECTOR_STAGE else self.own

    def say_changes(self, changed: dict, base: dict, run: Path) -> None:
        """What is not as it was; and what will be gone, where the run stays in its folder."""
        for key in sorted((set(self.recorded) | set(changed)) - {"resume_from_checkpoint", "output_dir", "preset"}):
            before, now = (values.get(key, base.get(key)) for values in (self.recorded, changed))
            if before != now:
                print(f"resumed with a change: {key} {before} -> {now}")
        own = run / PROJECTOR_STAGE if self.own.name == PROJECTOR_STAGE else run
        there = whole_checkpoints(own) if own == self.own else {}
        if later := [
            path.name for number, path in sorted(there.items()) if self.step is not None and number > self.step
        ]:
            print(
                f"resumed from {self.checkpoint.name}: {', '.join(later)} will be removed when the first new checkpoint is saved"
            )


def _leave_out_useless(values, base: dict, argv: list[str]) -> None:
    """Flags of transformers that would do nothing, or harm, are refused. Raises InputError."""
    for name, reason in USELESS.items():
        plain = TRAINING_DEFAULTS.get(name, base[name])
        if getattr(values, name) != plain and flag_given(f"--{name}", argv):
            raise InputError(f"--{name}: {reason}; leave it out")
        setattr(values, name, plain)  # of a resumed run that an earlier version let begin with it


def _leave_out_frozen_rates(values, argv: list[str]) -> None:
    """Learning rates of parts that learn nothing are refused, and dropped where a resumed run recorded one. Raises
    InputError."""
    towers = {"image": "image_tower", "text": "text_tower", "vision": "vision_tower", "merger": "merger"}
    frozen = {name: f"--{flag}" for name, flag in towers.items() if getattr(values, flag, None) == "frozen"}
    if getattr(values, "vision_tower", None) == "full":  # which includes it
        frozen.pop("merger", None)
    if getattr(values, "freeze_vision_model", False):
        frozen["vision"] = "--no_freeze_vision_model"
    for name, flag in frozen.items():
        rate, own = f"{name}_learning_rate", getattr(values, "lora", None) and not flag_given(flag, argv)
        if getattr(values, rate, None) is None or own:  # an adapter that goes on says itself what is trained
            continue
        if flag_given(f"--{rate}", argv):
            raise InputError(f"--{rate}: that part is frozen, and learns nothing; leave it out, or train it ({flag})")
        setattr(values, rate, None)


def _choose_precision(values, argv: list[str]) -> None:
    """bf16 and TF32 where the card has them and nothing else is asked for."""
    import torch

    cuda = torch.cuda.is_available() and not values.use_cpu
    if not flag_given("--bf16", argv) and not values.fp16:
        # bf16 products are several times slower than fp32 on a CPU, so they are for CUDA alone.
        values.bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if not flag_given("--tf32", argv):
        values.tf32 = True if cuda and torch.cuda.get_device_capability()[0] >= 8 else None


def _refuse_run_folder(values, resumes: bool, writes: bool) -> None:
    run = Path(values.output_dir)
    if run.name == PROJECTOR_STAGE and not resumes:
        raise InputError(
            f"--output_dir {run}: {PROJECTOR_STAGE} is what a captioner's first stage is called; give another"
        )
    if writes and not resumes and holds_run(run):
        raise InputError(
            f"{run}: holds a run already; go on with it by --resume_from_checkpoint {run}, or give another --output_dir"
        )
    if writes and os.environ.get("RANK", "0") == "0":
        refuse_unwritable(run, "--output_dir")


def _refuse_values(values, argv: list[str]) -> None:
    many = (1, 10**9)
    refuse_outside(
        values, learning_rate=(0, 1e3), num_train_epochs=(0, 10**6), per_device_train_batch_size=many,
        per_device_eval_batch_size=many, gradient_accumulation_steps=many, seed=(0, 2**32 - 1),
        dataloader_num_workers=(0, 1024), weight_decay=(0, 1e3), max_grad_norm=(0, 1e9), data_seed=(0, 2**32 - 1),
        adam_beta1=(0, 0.9999), adam_beta2=(0, 0.99999), adam_epsilon=(0, 1), dataloader_prefetch_factor=many,
    )  # fmt: skip
    if values.max_steps == 0:
        raise InputError("--max_steps 0: nothing would be trained")
    if values.fp16 and flag_given("--fp16", argv):
        import torch

        if values.use_cpu or not torch.cuda.is_available():
            raise InputError("--fp16: needs a CUDA device, and there is none; leave it out")
    trains = values.max_steps > 0 or values.num_train_epochs or getattr(values, "projector_epochs", 0)
    if not trains and not getattr(values, "eval_only", None):
        raise InputError("--num_train_epochs 0: nothing would be trained")


def _print_help(parser, aliases: dict[str, str]) -> None:
    parser.epilog = (
        "Every flag of transformers.TrainingArguments works too (--learning_rate, --num_train_epochs, "
        "--per_device_train_batch_size, --resume_from_checkpoint, --output_dir, --report_to ...): --help_all lists them."
        + "".join(f" {short} is short for {flag}." for short, flag in aliases.items())
    )
    parser.print_help()


def _filled(part: type, values):
    """A dataclass of settings with what was parsed. Raises InputError."""
    names = {field.name for field in dataclasses.fields(part) if field.init}
    try:
        return part(**{key: value for key, value in vars(values).items() if key in names})
    # NotImplementedError is accelerate's, for GPUs that need an NCCL setting; ImportError of packages that are not there.
    except (ValueError, NotImplementedError, ImportError) as error:
        raise InputError(f"these settings do not go together: {error}") from None


def parse(config_class: type, argv: list[str] | None = None, description: str = ""):
    """Read a training script's command line.

    Returns `(config, training_args, changed)`: the task's dataclass, `transformers.TrainingArguments`, and every
    setting of either that differs from its library default (what `config.json` records and a resumed run starts from).
    Raises InputError where TrainingArguments refuses a combination.
    """
    aliases = ALIASES.get(config_class.__name__, {})
    argv = [_renamed(word, aliases) for word in (sys.argv[1:] if argv is None else argv)]
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our DataLoader workers fork
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)

    classes, wants_help = [config_class], {"-h", "--help", "--help_all"} & set(argv)
    if "--help_all" in argv or not wants_help:
        from transformers import TrainingArguments

        classes.append(TrainingArguments)
    parser, base = _parser(classes, description)
    parser.set_defaults(**_defaults(config_class, argv))
    if wants_help:
        _print_help(parser, aliases)
        raise SystemExit(0)

    given, begun = flag_value("--resume_from_checkpoint", argv), None
    if given:
        begun = _Begun(given, config_class)
        known = {key: value for key, value in begun.recorded.items() if key in base}
        # What a run does not record had the library's default, whatever the presets say.
        parser.set_defaults(**(base | known | {"output_dir": str(begun.run)}))
    values = parser.parse_args(argv)
    _leave_out_useless(values, base, argv)
    _leave_out_frozen_rates(values, argv)
    if flag_given("--temperature", argv) and values.temperature < 0.01:
        raise InputError(f"--temperature {values.temperature}: expected 0.01 or more, where the loss cuts it off")
    if begun:
        if getattr(values, "task", None) != known.get("task", base.get("task")):
            raise InputError(f"{given}: a run of --task {known.get('task', base['task'])}, which it goes on with")
        values.resume_from_checkpoint = str(begun.checkpoint)
    if values.output_dir is None:
        from datetime import datetime

        # With the process, since the runs of a sweep may begin in one second.
        values.output_dir = f"output/training_{datetime.now():%Y%m%d_%H%M%S}_{os.getpid()}"
    eval_only = getattr(values, "eval_only", None)
    writes = not eval_only or keeps_scores(argv)
    _refuse_run_folder(values, bool(begun), writes)
    if values.preset == "full" and not begun:
        _choose_precision(values, argv)
    _refuse_values(values, argv)
    if isinstance(values.report_to, str) and "," in values.report_to:
        values.report_to = [name.strip() for name in values.report_to.split(",")]
    refuse_unknown_trackers(values.report_to)
    changed = {key: value for key, value in vars(values).items() if key in base and value != base[key]}
    changed = {key: value for key, value in changed.items() if not key.endswith("_token")}  # runs are given to others

    if "LOCAL_RANK" not in os.environ:  # one process, which may go on with a run of several, has no group to make
        values.ddp_backend = None
    if not eval_only:
        refuse_other_parallelism(values)
    config, training_args = (_filled(part, values) for part in classes)
    if not eval_only:
        refuse_schedule(training_args)
    if training_args.world_size > 1 and not begun and not flag_value("--output_dir", argv):
        from accelerate.utils import broadcast_object_list

        (training_args.output_dir,) = broadcast_object_list([training_args.output_dir])  # each has its own clock
    if writes and training_args.world_size > int(os.environ.get("LOCAL_WORLD_SIZE", training_args.world_size)):
        refuse_apart(Path(training_args.output_dir))
    if getattr(config, "early_stopping_patience", 0) and not training_args.load_best_model_at_end:
        raise InputError("--early_stopping_patience: needs evaluations and --load_best_model_at_end")
    if begun:
        begun.say_changes(changed, base, Path(values.output_dir))
    check(config)
    return config, training_args, changed


def refuse_apart(folder: Path, patience: float = 60) -> None:
    """Raises InputError, on all machines of a run, where one of them does not see what the first writes into the run's folder:
    it could load no checkpoint, which would come out after the training. patience: seconds until a network disk shows it."""
    from accelerate.utils import broadcast_object_list, gather_object

    first = os.environ.get("RANK", "0") == "0"
    (name,) = broadcast_object_list([f".seen_by_all_{os.getpid()}_{time.time_ns()}"])
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    until = time.monotonic() + patience
    broadcast_object_list([None])  # it is written now
    while not (seen := (folder / name).exists()) and time.monotonic() < until:
        time.sleep(1)
    all_see = all(gather_object([seen]))
    if first:
        (folder / name).unlink()
    if not all_see:
        raise InputError(
            f"--output_dir {folder}: not the same folder on all machines of this run; give one on a disk that they share"
        )


def refuse_schedule(args) -> None:
    """Try the optimizer and the schedule of learning rates on one number: the Trainer makes them when all is read and answered.
    Raises InputError."""
    import torch
    from transformers import Trainer, get_scheduler

    try:
        flag = f"--optim {args.optim.value}"
        module = torch.nn.Linear(1, 1)
        made, options = Trainer.get_optimizer_cls_and_kwargs(args, module)
        optimizer = made([{"params": list(module.parameters()), "lr": args.learning_rate}], **options)
        if callable(getattr(optimizer, "eval", None)):  # schedule-free: it would have to know when a model is used
            raise ValueError("its weights are an average that is made outside the model; choose another")
        flag = f"--lr_scheduler_type {args.lr_scheduler_type.value}, --lr_scheduler_kwargs"
        steps = {"num_warmup_steps": args.get_warmup_steps(10), "num_training_steps": 10}
        get_scheduler(args.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    # A value that does not do, an argument that is missing or unknown, an optimizer's package that is not there.
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"{flag}: {error}") from None


def refuse_other_parallelism(args) -> None:
    """Every process trains a whole model on scenes of its own (DDP). Raises InputError where it is started for another way."""
    import torch

    alone = "LOCAL_RANK" not in os.environ and not args.use_cpu and torch.cuda.is_available()
    if alone and (count := torch.cuda.device_count()) > 1:  # the Trainer would split scene batches with DataParallel
        raise InputError(
            f"{count} GPUs are visible to one process: start it with `accelerate launch --config_file accelerate/ddp.yaml`,"
            " or choose one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise InputError(f"started for {name}, and {WHOLE_MODELS}")


def refuse_unknown_trackers(report_to) -> None:
    """Raises InputError for a name in --report_to that transformers does not know."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    named = [report_to] if isinstance(report_to, str) else report_to or []
    if unknown := [name for name in named if name not in (*INTEGRATION_TO_CALLBACK, "none", "all")]:
        raise InputError(
            f"--report_to {unknown[0]}: expected one of none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
        )
    packages = {"swanlab", "wandb", "mlflow", "comet_ml", "clearml", "neptune", "dvclive", "trackio"}
    if absent := [name for name in named if name in packages and importlib.util.find_spec(name) is None]:
        wanted = {"swanlab": '"swanlab<0.7"'}.get(absent[0], absent[0])  # this transformers does not know a later one
        raise InputError(f"--report_to {absent[0]}: is not installed: pip install {wanted}")


def refuse_outside(values, **bounds: tuple[float, float]) -> None:
    """Refuse flags outside their bounds, {name: (low, high)}, both included; one that is absent or None is not looked at.
    Raises InputError."""
    for name, (low, high) in bounds.items():
        value = getattr(values, name, None)
        if value is not None and not low <= value <= high:
            raise InputError(f"-{'-' * (len(name) > 1)}{name} {value}: expected a number from {low} to {high}")


def refuse_unwritable(folder: str | Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written into, before hours of work are to end in it. Leaves nothing behind.
    Raises InputError."""
    folder = Path(folder)
    missing: list[Path] = []
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = "is a file, expected a folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise InputError(f"{flag} {folder}: {reason}; give another folder") from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def refuse_unwritable_file(path: str | Path, flag: str) -> None:
    """Refuse a file that could not be written, before the work that is to end in it. Raises InputError."""
    if Path(path).is_dir():
        raise InputError(f"{flag} {path}: is a folder, expected a file")
    if not is_stream(path):
        refuse_unwritable(Path(os.path.realpath(path)).parent, f"{flag}: its folder")


def places_beside(output: Path, names, sources) -> list[Path]:
    """Files of these names beside `output`. Raises InputError where one of them or `output` could not be written, or is among
    `sources`, which are read."""
    if not output.name or output.is_dir():
        raise InputError(f"--output {output}: is a folder; give a file in it")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: its folder does not exist")
    beside, read = [output.with_name(name) for name in names], {Path(source).resolve() for source in sources}
    for path in (output, *beside):
        if path.is_dir():
            raise InputError(f"--output {output}: would write {path}, which is a folder")
        if path.resolve() in read:
            raise InputError(f"--output {output}: would write over {path}, which is read")
    return beside


def is_stream(path: str | Path) -> bool:
    """Whether what is written to a path goes on elsewhere: a pipe, or a device such as /dev/stdout, whatever that is now."""
    return os.path.abspath(path).startswith(("/dev/", "/proc/self/fd/")) or (
        os.path.exists(path) and not os.path.isfile(path)
    )


def keeps_scores(argv: list[str] | None) -> bool:
    """Whether an evaluation alone is to leave files: only where the command line names a folder for them."""
    return bool(flag_value("--output_dir", sys.argv[1:] if argv is None else argv))


def cache_folder(given: str | None) -> str | None:
    """The value of a --cache_dir, None where it is "none". Raises InputError for a file."""
    if str(given).lower() == "none":
        return None
    if Path(given).exists() and not Path(given).is_dir():
        raise InputError(f"--cache_dir {given}: is a file, expected a folder")
    return given


PARTIAL, DOOMED = ".partial", ".deleted"  # end the names of folders that are being written, and being removed


def put_in_place(partial: Path, folder: Path) -> None:
    """Give what lies in `partial` its name. Whenever the process is killed `folder` is the old one or the new one, whole; for the
    moment between two renames there is none, and the old one lies beside it."""
    for path in partial.rglob("*"):  # on disk before it gets its name: a rename may outlive its content
        if path.is_file():
            with open(path, "rb+") as file:  # Windows brings only what is open for writing to the disk
                os.fsync(file.fileno())
    if not folder.exists():
        os.replace(partial, folder)
        return
    doomed = f"{folder}{DOOMED}"
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        os.replace(folder, doomed)
        os.replace(partial, folder)
    except BaseException:  # Ctrl-C may come when either of the two is done
        if folder.exists():
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            os.replace(doomed, folder)
        raise
    shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(folder: Path):
    """Gives a new folder to fill, which takes the place of `folder` at the end: whole or not at all, and nothing is left of what
    failed. Raises InputError where another process is at it."""
    folder = folder.resolve()  # a link, perhaps to a larger disk, stays
    busy = f"{folder}: another process is writing it; wait for its end"
    with fresh_folder(Path(f"{folder}{PARTIAL}"), busy) as partial:
        new = partial / "new"  # what is held keeps its name: at the end another's would be removed
        new.mkdir()
        yield new
        put_in_place(new, folder)


@contextlib.contextmanager
def fresh_folder(folder: Path, busy: str):
    """Gives `folder`, empty and held by this process, and removes it at the end; what a killed process left in it goes at the
    next beginning. Raises InputError: another process holds it (`busy`), something in its place that is not ours to remove."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: is in the way of what is written; move it")
    folder.mkdir(parents=True, exist_ok=True)
    with held_folder(folder, busy):
        if not folder.is_dir():  # the other was done while this one waited
            raise InputError(busy)
        try:
            try:
                for leftover in folder.iterdir():
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            except OSError as error:  # another user's
                raise InputError(
                    f"{folder}: a killed run left it, and it cannot be emptied: {error.strerror}"
                ) from None
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def held_folder(folder: Path, busy: str):
    """Hold a folder, which goes free with this process, whatever ends it. Raises InputError(busy) where another holds it."""
    held = None
    with contextlib.suppress(OSError):  # Windows opens no folder
        held = os.open(folder, os.O_RDONLY)
    if held is None:
        yield
        return
    try:
        if not take_lock(held):
            raise InputError(busy)
        try:
            yield
        finally:
            flock(held, free=True)  # closing would leave it to processes that have it open too
    finally:
        os.close(held)


def flock(file, free: bool = False) -> None:
    """Lock a file, or a folder by its descriptor, for this process, or free it; nothing where there are no locks. Raises
    BlockingIOError where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_UN if free else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks, as on some clusters
        return


def take_lock(file, stale: Callable[[], bool] = lambda: True) -> bool:
    """`flock`, tried for 6 s while `stale()`: of an owner that was killed, the processes that read for it hold the lock until
    they notice, in 5 s. False: another has it."""
    for _ in range(30):
        try:
            flock(file)
            return True
        except BlockingIOError:
            if not stale():
                return False
        time.sleep(0.2)
    return False


def in_workers(function, jobs: list, workers: int, chunksize: int = 1) -> list:
    """`function` of each job, in order, in so many processes (1: in this one)."""
    if workers == 1:
        return [function(job) for job in jobs]
    # Spawned, not forked: a caller may already hold threads.
    with ProcessPoolExecutor(workers, get_context("spawn"), _die_with_parent) as pool:
        try:
            with _interrupted_later():
                parts = [pool.submit(_each, function, jobs[i : i + chunksize]) for i in range(0, len(jobs), chunksize)]
            return [made for part in parts for made in part.result()]
        except BaseException:  # the rest is of no use; a pool that cancels what waits may trip over workers that ended
            for process in active_children():
                process.terminate()
            raise


def _each(function, jobs: list) -> list:
    return [function(job) for job in jobs]


@contextlib.contextmanager
def _interrupted_later():
    """Ctrl-C waits for the end: Python cannot close a pool that is half made, and a worker that begins would print where it
    was."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent() -> None:
    """In a worker: end when the main process is killed, which a worker that waits for jobs would not notice; and without a
    word at Ctrl-C, of which the main process tells."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):  # blocked where it was made
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def by_content(paths) -> dict[str, str]:
    """{path: the first path with the same bytes}. Only files of one length can be equal, and tiles of one size are all of one
    length, so beginnings are compared before whole files are read. Raises InputError."""
    groups = [list(paths)]
    try:
        for key in (os.path.getsize, beginning, digest):
            finer: list[list[str]] = []
            for group in groups:
                found: dict = {}
                for path in group:
                    found.setdefault(key(path) if len(group) > 1 else None, []).append(path)
                finer += found.values()
            groups = finer
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    first = {path: group[0] for group in groups for path in group}
    return {path: first[path] for path in paths}


def beginning(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(1 << 16)).digest()


def digest(path: str) -> bytes:
    made = hashlib.blake2b()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            made.update(chunk)
    return made.digest()


def read_text(path: str, flag: str) -> str:
    """The UTF-8 text of a file that `flag` named. Raises InputError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"{flag} {path}: cannot be read: {why}") from None


def read_lines(path: str, flag: str, what: str) -> list[str]:
    """The distinct lines of such a file, without empty ones and those behind a #. Raises InputError where there is none."""
    lines = [line.strip() for line in read_text(path, flag).splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not lines:
        raise InputError(f"{flag} {path}: no {what} in it; expected one a line")
    return lines


def check(config: DataConfig) -> None:
    """Refuse values that no run can use. Raises InputError."""
    if getattr(config, "task", None) == "chat" and config.decode == "candidates":
        raise InputError("--decode candidates: chooses among short answers; --task chat writes text")
    if getattr(config, "mine_model", None) and not config.mine_negatives:
        raise InputError("--mine_model: mines only with --mine_negatives; give both")
    rates = [field.name for field in dataclasses.fields(config) if field.name.endswith("_learning_rate")]
    bounds = dict.fromkeys(rates, (0, 1e3)) | {
        "val_fraction": (0, 0.9), "max_rejected": (0, 1), "lora_dropout": (0, 1), "projection_dropout": (0, 1),
        "margin": (0, 2), "mine_margin": (0, 2), "max_samples": (1, 10**9), "projection_dim": (1, 65536),
        "lora_rank": (0 if isinstance(config, CaptionConfig) else 1, 4096),
        "projection_hidden": (0, 65536), "max_text_tokens": (2, 32768), "texts_per_scene": (0, 10**6),
        "grad_cache_chunk": (0, 10**9), "min_pixels": (1, 10**9), "max_pixels": (28 * 28, 10**9), "temperature": (1e-4, 10),
        "max_eval_scenes": (1, 10**9), "max_eval_questions": (1, 10**9), "pack_tokens": (64, 10**9),
        "eval_pack_tokens": (64, 10**9), "max_question_tokens": (1, 32768), "max_answer_tokens": (1, 4096),
        "early_stopping_patience": (0, 10**9), "lora_alpha": (1, 10**6), "max_caption_tokens": (1, 4096),
        "projector_epochs": (0, 10**6), "max_test_scenes": (1, 10**9), "freeze_language_model_except_layers": (0, 10**6),
    }  # fmt: skip
    refuse_outside(config, **bounds)
    if isinstance(config, QwenConfig) and config.min_pixels > config.max_pixels:
        raise InputError(f"--min_pixels {config.min_pixels} is above --max_pixels {config.max_pixels}")
    config.cache_dir = cache_folder(config.cache_dir)


def record_of(folder: str | Path) -> dict:
    """What a run wrote beside its weights: "task", "settings" and more; {} beside another tool's."""
    try:
        record = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return record if "settings" in record and isinstance(record, dict) else {}
    except (OSError, ValueError, TypeError):
        return {}


def was_trained_on(record: dict, file: str) -> bool:
    """Whether a run's `record_of` names this file as its training data."""
    return os.path.abspath(record.get("settings", {}).get("train_file", "")) == os.path.abspath(file)


def use_files_of_training(config, args, argv: list[str], folder: str | Path, more: tuple[str, ...] = ()) -> str | None:
    """Score a checkpoint with the files and the split it was trained with where the command line names no others: a baseline
    is made of the training texts, and those of another data set would flatter or shame it; an image that was trained on must
    not be held out now. `more`: other settings to take over. Returns where the training's images are looked for, None: where
    --image_root says. Raises InputError where it was trained for another task."""
    record = record_of(folder)
    if not record:
        return None
    recorded = record["settings"]
    task = "rsvqa" if record.get("task") == "vqa" else record.get("task")
    if task in ("rsvqa", "chat") and task != getattr(config, "task", None):
        raise InputError(f"{folder}: was trained with --task {task}: give that")
    given = flag_value("--train_file", argv) or flag_value("--data", argv)
    if given and not was_trained_on(record, given):
        return None
    defaults = {field.name: field.default for part in (type(config), type(args)) for field in dataclasses.fields(part)}
    names = "train_file val_file test_file image_root val_fraction test_split language max_samples seed allow_leak max_rejected"
    # What a run does not record had the library's default, whatever the presets say.
    for name in (*names.split(), *more):
        if not flag_given(f"--{name}", argv):
            setattr(config if hasattr(config, name) else args, name, recorded.get(name, defaults[name]))

    def beside(file: str) -> list[str]:
        folder = Path(file) if Path(file).is_dir() else Path(file).parent
        return [str(folder), str(folder / "images")]

    # Names may be the same in two data sets: each file's images are looked for in its own place first.
    theirs = [recorded["image_root"]] if recorded.get("image_root") else beside(config.train_file)
    if flag_given("--image_root", argv):
        return os.pathsep.join([*theirs, config.image_root])
    if config.test_file and config.test_file != recorded.get("test_file") and config.image_root:
        config.image_root = os.pathsep.join([*beside(config.test_file), config.image_root])
        return os.pathsep.join(theirs)
    return None


def whole_checkpoints(run: Path) -> dict[int, Path]:
    """{step: folder} of a run's checkpoints, without what a killed process left half written."""
    states = [state for state in run.glob("checkpoint-*/trainer_state.json") if state.parent.name[11:].isdigit()]
    found = {}
    for state in states:
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # cut short: the one before it counts
            found[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = state.parent
    return found


def holds_run(run: Path) -> bool:
    """Whether a run was started in this folder and left something that a new one would overwrite."""
    finished = any((run / name).exists() for name in ("best_model", "final"))
    return finished or bool(whole_checkpoints(run) or whole_checkpoints(run / PROJECTOR_STAGE))


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder as given, or the newest whole checkpoint of a run folder. Raises InputError."""
    path = Path(path)
    if (path / "trainer_state.json").is_file():
        return path
    for folder in (path, path / PROJECTOR_STAGE):
        if found := whole_checkpoints(folder):
            return found[max(found)]
    why = "does not exist" if not path.exists() else "holds no whole checkpoint (checkpoint-N/trainer_state.json)"
    raise InputError(f"{path}: cannot resume, the folder {why}; start without --resume_from_checkpoint")


def _flag_in(word: str) -> str:
    """`--lora-rank=4` or `--lora-rank`: --lora_rank."""
    return word.partition("=")[0].replace("-", "_").replace("__", "--", 1)


def _renamed(word: str, aliases: dict[str, str]) -> str:
    """`--batch_size` or `--batch_size=4` by the flag's own name."""
    flag, equals, value = word.partition("=")
    return aliases.get(_flag_in(word), flag) + equals + value


def flag_value(flag: str, argv: list[str]) -> str | None:
    """What a command line itself gives `--flag`, the last time as argparse has it; None: the flag is not on it."""
    for word, after in reversed(list(itertools.zip_longest(argv, argv[1:]))):
        if _flag_in(word) == flag:
            return word.partition("=")[2] if "=" in word else after
    return None


def flag_given(flag: str, argv: list[str]) -> bool:
    """Whether `--flag` is on a command line, with a value or, as a switch, without."""
    return any(_flag_in(word) == flag for word in argv)
