"""The models: `DualEncoder` (match, search), `VQA` (questions) and `Captioner` (descriptions).

A checkpoint holds the tensors that were trained and nothing else; it names its base and the base's
fingerprint, and brings tokenizer, image processor and every setting that use must share with training.
Loading is strict: a missing, unexpected or misshapen tensor is an error, never a warning.
"""

import contextlib
import hashlib
import heapq
import json
import re
import shutil
import threading
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel, CLIPVisionModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.modeling_siglip import SiglipModel, SiglipVisionModel
from transformers.pytorch_utils import Conv1D

from config import InputError, whole_folder
from data import (
    CaptionPrompt,
    ChatPrompt,
    PixelStore,
    QuestionDataset,
    QwenResize,
    SquareResize,
    TokenStore,
    image_settings,
    pack,
    pad_questions,
    pixel_batch,
    row_align,
    split_work,
    token_batch,
    token_ids,
)
from imagery import ImageSettings
from scenes import Question, QuestionScene, load_json

WEIGHTS, SETTINGS = "model.safetensors", "dual_encoder.json"

TOWERS = {  # model_type -> (image tower, text tower)
    "qwen2_5_vl": (Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLTextModel),
    "qwen2_vl": (Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel),
}

# Official files have transformers 4.x names (`visual.…`, `model.layers.…`); 5.x saves put both below `model.`.
KEYS = {
    "image": re.compile(r"^(?:model\.)?visual\.(.+)$"),
    "text": re.compile(
        r"^(?:model\.language_model\.|language_model\.model\.|model\.)((?:embed_tokens|layers|norm)\..+)$"
    ),
    "unused": re.compile(r"^(lm_head\.weight)$"),  # a tower that only reads has no use for the output head
}

# Every linear layer inside the blocks; not the patch embedding and not the merger.
LORA_TARGETS = {
    "image": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_proj|up_proj|down_proj|fc1|fc2))",
    "text": r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
}


# ----------------------------------------------------------------------------------------------------
# Bases


def how_to_get(folder: Path) -> str:
    """What to do where the base of a folder is not there."""
    demo = folder.parent.parts[-2:] == ("models", "demo")
    # Of a folder beside this file, load.py knows the name: the last two parts.
    name = "/".join(folder.parts[-2:]) if folder.parent.parent == Path(__file__).parent else folder
    if demo:
        return "run `python load.py --preset demo`"
    if name == folder and folder.is_absolute():  # it was somebody's own, and may be elsewhere now
        return "give the folder where it is (--base_model beside what was trained), or run `python load.py ORG/NAME`"
    return f"run `python load.py {name}{' --source huggingface' if str(name).startswith('lcybuaa/') else ''}`"


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, shards in order. Raises InputError if one is not there."""
    folder = Path(folder)
    command = how_to_get(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no model here (config.json is missing); {command}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: not whole; {command}") from None
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: {', '.join(missing)} is missing; {command}")
    return [folder / name for name in names]


def fingerprint(folder: str | Path) -> str:
    """16 hex digits that change when a base's configuration, tensor names, shapes or values change.

    Values are sampled (the first 1 KiB of every tensor), so that a 7 GB base takes a moment, not half a minute.
    """
    return _digest([Path(folder) / "config.json"], weight_files(folder))


def _digest(settings: list[Path], weights: list[Path]) -> str:
    """16 hex digits of whole settings files and sampled safetensors files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in settings:
        digest.update(path.read_bytes())
    for path in weights:
        with open(path, "rb") as file:
            # No header is longer than its file: the first bytes of a Git LFS pointer would be 10^18.
            header = file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size))
            digest.update(header)
            start = file.tell()
            try:
                offsets = sorted(v["data_offsets"][0] for k, v in json.loads(header).items() if k != "__metadata__")
            except (ValueError, KeyError):
                raise InputError(f"{path}: not a safetensors file, or cut short; load the base again") from None
            for offset in offsets:
                file.seek(start + offset)
                digest.update(file.read(1024))
    return digest.hexdigest()


def read_settings(kind: type, file: Path):
    """The dataclass of settings that a saved model has beside its weights. Raises InputError, FileNotFoundError."""
    try:
        return kind(**json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: not readable: {error}") from None


BASE_FLAGS = {"base": "--base_model", "vision": "--vision_model_name", "language": "--language_model_name"}


def refuse_other_base(root: Path, settings, folder: Path, flag: str) -> None:
    """Raises InputError, naming the `flag` that helps, unless the base in `root` is the one `folder` was trained on."""
    found = fingerprint(root)
    if found != settings.base_fingerprint:
        raise InputError(
            f"{root}: this base (fingerprint {found}) is not the one {folder} was trained on"
            f" ({settings.base_fingerprint}, {settings.base_model}); give the right one with {flag}"
        )


def refuse_other_bases(file: Path, settings) -> None:
    """Raises InputError unless a checkpoint's settings (`file`) name the bases of the model that takes over its tensors."""
    known, own = load_json(file), asdict(settings)
    for side, flag in BASE_FLAGS.items():
        mark, name = f"{side}_fingerprint", f"{side}_model"
        if mark not in own:
            continue
        if not isinstance(known, dict) or not {mark, name} <= known.keys():
            raise InputError(f"{file}: names no {name}; {file.parent} is not whole, give another checkpoint")
        if known[mark] != own[mark]:
            raise InputError(
                f"{own[name]}: this base (fingerprint {own[mark]}) is not the one {file.parent} was trained on ({known[mark]},"
                f" {known[name]}); give the right one with {flag}"
            )


def load_tower(folder: str | Path, side: str, config, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One tower (`side`: "image" or "text") of a Qwen-VL folder, reading only that tower's tensors.

    Raises InputError naming every missing or unexpected key.
    """
    part = config.vision_config if side == "image" else config.text_config
    others = [pattern for name, pattern in KEYS.items() if name != side]
    return _load_part(TOWERS[config.model_type][side == "text"], part, folder, KEYS[side], others, dtype)


def _load_part(
    model_class, config, folder: str | Path, wanted: re.Pattern, unused: list[re.Pattern], dtype: torch.dtype
) -> nn.Module:
    """A model of those tensors of a folder whose keys are `wanted`, by their first group. Raises InputError naming every key
    that is missing, or neither wanted nor `unused`."""
    tensors, strangers = {}, []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                    if any(pattern.match(key) for pattern in unused):
                        continue
                    if match := wanted.match(key):
                        tensors[match[1]] = file.get_tensor(key)
                    else:
                        strangers.append(key)
        except SafetensorError as error:
            raise InputError(f"{path}: cannot be read ({error}); load the base again") from None
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )  # what does not fit is refused below, all of it at once
    _refuse_keys(folder, info["missing_keys"], [*info["unexpected_keys"], *strangers], info["mismatched_keys"])
    return model


def load_exactly(model: nn.Module, path: Path) -> None:
    """Copy a file's tensors into `model`. Raises InputError unless they are those of `model.trained_names()`."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    expected, own = set(model.trained_names()), model.state_dict()
    shapes = [name for name in expected & set(tensors) if tensors[name].shape != own[name].shape]
    _refuse_keys(path, expected - set(tensors), set(tensors) - expected, shapes)
    model.load_state_dict(tensors, strict=False)


def save_trained(folder: Path, tensors: dict[str, torch.Tensor], weights: str, settings, name: str, model) -> None:
    """What a checkpoint of any model holds: its tensors in the file `weights`, its settings in the file `name`, and the model's
    tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: x.detach().contiguous().cpu() for key, x in tensors.items()}, folder / weights, {"format": "pt"})
    write_settings(folder / name, settings)
    open_weights(folder, name)
    model.tokenizer.save_pretrained(folder)
    save_processor(model.processor, folder, model.qwen.config.model_type if hasattr(model, "qwen") else None)


def save_processor(processor, folder: Path, family: str | None) -> None:
    """Write an image processor; of a Qwen-VL also what transformers 4 calls its pixel limits, which knows them by no other
    name and would silently take its own, and the processor that AutoProcessor makes of it."""
    processor.save_pretrained(folder)
    if hasattr(processor, "merge_size"):
        path = folder / "preprocessor_config.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        record["min_pixels"], record["max_pixels"] = (
            record["size"][edge] for edge in ("shortest_edge", "longest_edge")
        )
        if family:
            record["processor_class"] = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[family]
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_settings(path: Path, settings) -> None:
    """A settings dataclass as the JSON file that its `from_pretrained` reads."""
    path.write_text(json.dumps(asdict(settings), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_weights(folder: Path, like: str) -> None:
    """Let whoever reads the file `like` of a folder read the weights in and below it: safetensors makes them for their
    owner alone."""
    for path in folder.rglob("*.safetensors"):
        shutil.copymode(folder / like, path)


def _refuse_keys(where, missing, unexpected, mismatched=()) -> None:
    problems = [
        f"{len(keys)} {what} ({', '.join(str(key) for key in sorted(keys, key=str)[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if keys
    ]
    if problems:
        raise InputError(f"{where}: tensors do not fit the model: {'; '.join(problems)}")


def read_config(folder: str | Path):
    """The configuration of a Qwen-VL folder. Raises InputError when it is missing or of another family."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no model here (config.json is missing); {how_to_get(Path(folder))}")
    config = _config_in(folder)
    if config.model_type not in TOWERS:
        raise InputError(f"{path}: model_type {config.model_type!r}: expected one of {', '.join(TOWERS)}")
    if method := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        raise InputError(
            f"{folder}: its weights are quantised ({method}); give the base they were made of, --base_model or --base where an"
            " adapter names this one, and on CUDA --quantize 4"
        )
    return config


def _config_in(folder: str | Path):
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of SigLIP's own defaults, which nothing here reads
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        path = Path(folder) / "config.json"
        if any((Path(folder) / name).is_file() for name in (SETTINGS, VQA_SETTINGS)):
            what = (
                "holds what a run has trained, not a base; --resume_from_checkpoint goes on with it, on other data too"
            )
            raise InputError(f"{folder}: {what}") from None
        raise InputError(f"{path}: not a model configuration: {str(error).splitlines()[0]}") from None
    finally:
        transformers.logging.set_verbosity(said)


# ----------------------------------------------------------------------------------------------------
# Dual encoder


def same_fields(settings: type, config) -> dict:
    """What a checkpoint records as the configuration has it: fields of the same name."""
    return {field.name: getattr(config, field.name) for field in fields(settings) if hasattr(config, field.name)}


@dataclass
class DualEncoderSettings:
    """What a checkpoint records about a dual encoder; the fields are those of `config.MatchConfig`."""

    base_model: str
    base_fingerprint: str
    image_tower: str
    text_tower: str
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    projection_dim: int
    projection_hidden: int
    projection_dropout: float
    max_text_tokens: int
    loss: str
    logit_scale: float
    logit_bias: float
    images: dict
    """`ImageSettings` of training: bands and stretch."""


class ProjectionHead(nn.Sequential):
    """Tower features (B, D) -> embeddings (B, dim), not normalised; LayerNorm first, as towers differ in scale."""

    def __init__(self, width: int, dim: int, *, hidden: int = 0, dropout: float = 0.0):
        layers = [nn.LayerNorm(width), nn.Dropout(dropout)]
        if hidden:
            layers += [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim)]
        else:
            layers += [nn.Linear(width, dim)]
        super().__init__(*layers)


class Encoder(nn.Module):
    """What every pair of towers offers whose score is a cosine. A subclass brings `settings`, `processor`, `tokenizer`,
    `logit_scale`, `logit_bias`, and `pool_image`, `pool_text`, `project_image`, `project_text`, `tokenize`."""

    def _came_from(self, name: str, fingerprint: str) -> None:
        """Note what an index records: the fingerprint, and the name by which the model is found from any folder."""
        self.fingerprint = fingerprint
        self.source = str(Path(name).resolve()) if Path(name).exists() else name

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_image(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches (P, C) and grids (B, 3) -> unit embeddings (B, projection_dim)."""
        return self.project_image(self.pool_image(pixel_values, image_grid_thw))

    def encode_text(self, input_ids: torch.Tensor, text_lengths: torch.Tensor) -> torch.Tensor:
        """Token ids (T, L) and lengths (T,) -> unit embeddings (T, projection_dim)."""
        return self.project_text(self.pool_text(input_ids, text_lengths))

    def probabilities(self, cosines: torch.Tensor) -> torch.Tensor:
        """Cosines (N, C) of images and C classes -> probabilities (N, C), as the loss of training reads them: each class
        on its own, sigmoid(e^scale cos + bias), for a sigmoid loss (SigLIP, Zhai et al. 2023), else
        softmax(e^scale cos) over the classes (CLIP, Radford et al. 2021)."""
        logits = cosines * self.logit_scale.float().exp().to(cosines.device)
        if self.settings.loss == "sigmoid":
            return torch.sigmoid(logits + self.logit_bias.float().to(cosines.device))
        return logits.softmax(-1)

    @torch.inference_mode()
    def embed_images(
        self, images, *, batch_size: int = 32, store=None, progress: bool = False, pool_only: bool = False
    ) -> torch.Tensor:
        """Paths or resized (H, W, 3) uint8 arrays -> unit embeddings (N, projection_dim) float32 on the CPU.

        Files are read a batch at a time, from `store` (a `data.PixelStore`) where one is given. Raises
        imagery.ImageError for a file that cannot be read.
        `pool_only` stops before the projection (features of a frozen tower).
        """
        store = store or pixel_store(self)
        made = []
        for start in _batches(len(images), batch_size, "images", progress):
            chunk = images[start : start + batch_size]
            pixels = [store[str(image)] if isinstance(image, (str, Path)) else image for image in chunk]
            features = self.pool_image(**pixel_batch(pixels, self.processor, self.device))
            made.append((features if pool_only else self.project_image(features)).cpu())
        return torch.cat(made) if made else torch.zeros(0, self.settings.projection_dim)

    @torch.inference_mode()
    def embed_texts(
        self, texts, *, batch_size: int = 128, progress: bool = False, pool_only: bool = False
    ) -> torch.Tensor:
        """Texts -> unit embeddings (N, projection_dim) float32 on the CPU; batches are sorted by length."""
        rows, _ = self.tokenize(list(texts))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        made = []
        for start in _batches(len(rows), batch_size, "texts", progress):
            batch = token_batch([rows[i] for i in order[start : start + batch_size]], self.tokenizer.pad_token_id)
            features = self.pool_text(**{key: value.to(self.device) for key, value in batch.items()})
            made.append((features if pool_only else self.project_text(features)).cpu())
        return torch.cat(made)[torch.tensor(order).argsort()] if made else torch.zeros(0, self.settings.projection_dim)


class DualEncoder(Encoder):
    """Image tower and text tower of a Qwen-VL base, each with a projection head; score = cosine.

    Image: the vision encoder's merged patch tokens (the ones the language model would read), averaged. Text: the
    language model's last layer at the end-of-text token. Both are projected and L2-normalised to (B, projection_dim).

    ```python
    model = DualEncoder.from_pretrained("output/training_.../best_model")
    images = model.embed_images(["a.tif", "b.png"])          # (2, D)
    texts = model.embed_texts(["a harbour", "一片农田"])       # (2, D)
    scores = images @ texts.T                                # cosine, -1 to 1
    ```
    """

    def __init__(self, settings: DualEncoderSettings, image_tower, text_tower, tokenizer, processor, base_config):
        super().__init__()
        self.settings, self.tokenizer, self.processor, self.base_config = settings, tokenizer, processor, base_config
        self.image_tower, self.text_tower = image_tower, text_tower
        for side, tower in (("image", image_tower), ("text", text_tower)):
            mode = getattr(settings, f"{side}_tower")
            tower.requires_grad_(mode == "full")
            if mode == "lora":
                add_lora(tower, LORA_TARGETS[side], settings)
        options = {"hidden": settings.projection_hidden, "dropout": settings.projection_dropout}
        self.image_width = (
            getattr(base_config.vision_config, "out_hidden_size", None) or base_config.vision_config.hidden_size
        )
        self.image_projection = ProjectionHead(self.image_width, settings.projection_dim, **options)
        self.text_projection = ProjectionHead(base_config.text_config.hidden_size, settings.projection_dim, **options)
        # Learnt, in the log as CLIP does; of no effect on the cosine score and unused by the triplet loss.
        learnt = settings.loss != "triplet"
        self.logit_scale = nn.Parameter(torch.tensor(float(settings.logit_scale)), requires_grad=learnt)
        self.logit_bias = nn.Parameter(
            torch.tensor(float(settings.logit_bias)), requires_grad=settings.loss == "sigmoid"
        )

    # -- making, saving, loading

    @classmethod
    def from_base(cls, config, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> "DualEncoder":
        """A new dual encoder on the towers of `config.base_model` (`config`: `config.MatchConfig`).

        `dtype`: of towers that are frozen or carry LoRA; what is trained is float32 in any case."""
        base = read_config(config.base_model)
        processor, tokenizer = load_processor(config.base_model, config.min_pixels, config.max_pixels)
        settings = DualEncoderSettings(
            base_fingerprint=fingerprint(config.base_model),
            logit_scale=float(np.log(10.0 if config.loss == "sigmoid" else 1 / config.temperature)),
            logit_bias=-10.0 if config.loss == "sigmoid" else 0.0,
            images=image_settings(config).to_dict(),
            **same_fields(DualEncoderSettings, config),
        )
        towers = [
            load_tower(config.base_model, side, base, torch.float32 if mode == "full" else dtype)
            for side, mode in (("image", config.image_tower), ("text", config.text_tower))
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the heads and LoRA start the same whatever was drawn before
            return cls(settings, *towers, tokenizer, processor, base)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained tensors and all that use must share with training into `folder`."""
        state = self.state_dict()
        tensors = {name: state[name] for name in self.trained_names()}
        save_trained(Path(folder), tensors, WEIGHTS, self.settings, SETTINGS, self)
        self.base_config.save_pretrained(Path(folder) / "base_config")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        base_model: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "DualEncoder | ClipEncoder":
        """Load a checkpoint folder; a tower that was trained in full comes from it alone, others from the base. A folder of
        a whole CLIP, Chinese-CLIP or SigLIP gives a `ClipEncoder`, which is used in the same way.

        Raises InputError: not such a folder, base missing or changed since training, tensors that do not fit.
        """
        name, folder = str(folder), base_folder(str(folder))
        if not (folder / SETTINGS).is_file():
            others = {
                "best_model": f"a run's folder; give {folder / 'best_model'}",
                ADAPTER_CONFIG: "an adapter of train_vqa.py, not a matcher",
                CAPTIONER: "a captioner of train_caption.py, not a matcher",
            }
            if found := [what for mark, what in others.items() if (folder / mark).exists()]:
                raise InputError(f"{folder}: {found[0]}")
            if (folder / "config.json").is_file():
                return ClipEncoder.from_pretrained(name, device=device, dtype=dtype)
        try:
            settings = read_settings(DualEncoderSettings, folder / SETTINGS)
        except (FileNotFoundError, NotADirectoryError):
            if not folder.is_dir():
                raise InputError(f"{folder}: no model here; {how_to_get(folder)}, or train one") from None
            raise InputError(f"{folder}: not a matcher's checkpoint ({SETTINGS} is missing)") from None
        base = read_config(folder / "base_config")
        towers = []
        for side, mode in (("image", settings.image_tower), ("text", settings.text_tower)):
            if mode == "full":
                part = base.vision_config if side == "image" else base.text_config
                towers.append(TOWERS[base.model_type][side == "text"]._from_config(part, dtype=dtype))
                continue
            root = base_folder(base_model or settings.base_model)
            refuse_other_base(root, settings, folder, "--base_model")
            towers.append(load_tower(root, side, base, dtype))
        processor, tokenizer = load_processor(folder)
        model = cls(settings, *towers, tokenizer, processor, base)
        model.load_trained(folder)
        model._came_from(name, _digest([folder / SETTINGS, folder / "preprocessor_config.json"], [folder / WEIGHTS]))
        return _in_dtype(model, dtype).to(device).eval()

    def trained_names(self) -> list[str]:
        """Names of the tensors a checkpoint holds: those of towers in training, the heads, scale and bias."""
        heads = ("image_projection.", "text_projection.", "logit_")
        return [name for name, p in self.named_parameters() if p.requires_grad or name.startswith(heads)]

    def load_trained(self, folder: str | Path) -> None:
        """Copy a checkpoint's tensors into this model. Raises InputError unless they are the expected ones, of its base."""
        refuse_other_bases(Path(folder) / SETTINGS, self.settings)
        load_exactly(self, Path(folder) / WEIGHTS)

    def gradient_checkpointing_enable(self, **how) -> None:
        """Recompute activations in the backward pass, in towers that are trained (called by the Trainer)."""
        if self.settings.image_tower != "frozen":
            recompute(self.image_tower, **how)
        if self.settings.text_tower != "frozen":
            recompute(self.text_tower, **how)

    def parameter_groups(self) -> dict[str, list[str]]:
        """{"image", "text", "head": names of trained parameters}: each may have its own learning rate."""
        groups: dict[str, list[str]] = {"image": [], "text": [], "head": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[{"image_tower": "image", "text_tower": "text"}.get(name.split(".")[0], "head")].append(name)
        return groups

    @torch.no_grad()
    def whiten_heads(self, image_features: torch.Tensor, text_features: torch.Tensor) -> None:
        """Start each projection as a whitening of its tower's features (N, D) on a sample of training data.

        Raw features of different texts, or images, lie within a few degrees of one another (cosines above 0.9), and a
        random projection keeps that, so contrastive training begins with many steps that only spread them. PCA
        whitening (Su et al. 2021, "Whitening sentence representations") begins spread.
        """
        for head, features in ((self.image_projection, image_features), (self.text_projection, text_features)):
            norm, linear = head[0], head[2]  # with a hidden layer: its first half
            x = norm(features.to(norm.weight)).double()
            mean = x.mean(0)
            values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / max(1, len(x) - 1))
            values, vectors = values.flip(0), vectors.flip(1)
            rank = min(linear.out_features, linear.in_features, len(x) - 1)
            # Directions below 1% of the largest variance are mostly noise; they are not blown up to full scale.
            # Pictures that are all alike have no directions at all: 1e-12 keeps their scale finite.
            scale = (values[:rank].clamp(min=0) + 0.01 * values[0]).clamp(min=1e-12).rsqrt()
            weight = torch.zeros_like(linear.weight, dtype=torch.double)
            weight[:rank] = (vectors[:, :rank] * scale).T
            linear.weight.copy_(weight)
            linear.bias.copy_(-weight @ mean)

    # -- encoding

    def pool_image(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches (P, C) of B images with grids (B, 3) -> mean merged token of each image, (B, D) float32."""
        tokens = self.image_tower(pixel_values, grid_thw=image_grid_thw).pooler_output
        lengths = image_grid_thw.prod(-1) // self.processor.merge_size**2
        return torch.segment_reduce(tokens.float(), "mean", lengths=lengths)

    def pool_text(self, input_ids: torch.Tensor, text_lengths: torch.Tensor) -> torch.Tensor:
        """Token ids (T, L) filled on the right -> hidden state of each text's last token, (T, D) float32.

        Attention is causal, so what stands right of a text's last token cannot reach it: no mask is needed, and a
        text's embedding does not depend on the texts beside it. Texts of like length run together, so that little is
        computed for padding (caption batches are more than half padding otherwise).
        """
        parts, rows = [], []
        for group in length_groups(text_lengths.tolist()):
            chosen = torch.tensor(group, device=input_ids.device)
            lengths = text_lengths[chosen]
            tokens = input_ids[chosen, : int(lengths.max())]
            hidden = self.text_tower(input_ids=tokens, use_cache=False).last_hidden_state
            parts.append(hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float())
            rows.append(chosen)
        return torch.cat(parts)[torch.argsort(torch.cat(rows))]

    def project_image(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, D) -> unit embeddings (B, projection_dim) float32."""
        return F.normalize(self.image_projection(features.to(self.image_projection[0].weight.dtype)).float(), dim=-1)

    def project_text(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (T, D) -> unit embeddings (T, projection_dim) float32."""
        return F.normalize(self.text_projection(features.to(self.text_projection[0].weight.dtype)).float(), dim=-1)

    def forward(
        self,
        pixel_values=None,
        image_grid_thw=None,
        input_ids=None,
        text_lengths=None,
        image_features=None,
        text_features=None,
    ) -> dict[str, torch.Tensor]:
        """Encode what is given: images (or a frozen tower's features of them) and texts (likewise)."""
        if image_features is None:
            image_features = self.pool_image(pixel_values, image_grid_thw)
        if text_features is None:
            text_features = self.pool_text(input_ids, text_lengths)
        return {
            "image": self.project_image(image_features),
            "text": self.project_text(text_features),
            "logit_scale": self.logit_scale.float() * 1.0,
            "logit_bias": self.logit_bias.float() * 1.0,
        }

    def tokenize(self, texts: list[str]) -> tuple[list[np.ndarray], int]:
        """Token ids of each text, the end-of-text token last; and how many texts were cut to max_text_tokens."""
        limit = self.settings.max_text_tokens - 1
        rows = token_ids(self.tokenizer, texts)
        cut = sum(len(row) > limit for row in rows)
        return [np.append(row[:limit], self.tokenizer.eos_token_id) for row in rows], cut


TOKENIZING = threading.Lock()  # where a tokenizer cuts and how it fills is state of it, which the page's threads share
CLIPS = {  # model_type -> (model, image processor, whether a text is always padded to its full length)
    "clip": (CLIPModel, CLIPImageProcessorPil, False),
    "chinese_clip": (ChineseCLIPModel, ChineseCLIPImageProcessorPil, False),
    "siglip": (SiglipModel, SiglipImageProcessorPil, True),
}


@dataclass
class ClipSettings:
    """What users of an encoder read, by the names of `DualEncoderSettings`."""

    base_model: str
    projection_dim: int
    max_text_tokens: int
    loss: str
    images: dict


class ClipEncoder(Encoder):
    """A whole CLIP (RemoteCLIP, GeoRSCLIP), Chinese-CLIP or SigLIP (Git-RSCLIP) folder of transformers' layout; made by
    `DualEncoder.from_pretrained`. For use, not for training.

    `pool_image` and `pool_text` end behind the model's own projections: `project_*` only normalises.
    """

    def __init__(self, settings: ClipSettings, model, tokenizer, processor, dtype=torch.float32):
        super().__init__()
        self.settings, self.tokenizer, self.processor = settings, tokenizer, processor
        self.fixed_length = CLIPS[model.config.model_type][2]
        self.logit_scale = nn.Parameter(model.logit_scale.float().clone(), requires_grad=False)
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = nn.Parameter(torch.zeros(1) if bias is None else bias.float().clone(), requires_grad=False)
        # Only now: rounded to 16 bits, SigLIP's bias moves a probability by 5 points.
        self.model = model.requires_grad_(False).to(dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device="cpu", dtype=torch.float32) -> "ClipEncoder":
        """Raises InputError: another family, a tensor missing or unexpected, no tokenizer or image processor."""
        name, folder = str(folder), base_folder(str(folder))
        weight_files(folder)
        config = _config_in(folder)
        if config.model_type not in CLIPS:
            known = f"a matcher's checkpoint ({SETTINGS}) or model_type {', '.join(CLIPS)}"
            raise InputError(f"{folder / 'config.json'}: model_type {config.model_type!r}: expected {known}")
        model_class, processor_class, _ = CLIPS[config.model_type]
        buffers = re.compile(r".*\.position_ids$")  # of old files
        model = _load_part(model_class, config, folder, re.compile(r"^(.+)$"), [buffers], torch.float32)
        try:
            processor = processor_class.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            what = "tokenizer or image processor is missing"
            raise InputError(f"{folder}: the {what}: {str(error).splitlines()[0]}; load it again") from None
        width = getattr(config, "projection_dim", None)
        if config.model_type == "siglip":  # no projection behind its pooling
            width = getattr(config.text_config, "projection_size", None) or config.vision_config.hidden_size
        settings = ClipSettings(
            base_model=str(folder),
            projection_dim=width,
            max_text_tokens=config.text_config.max_position_embeddings if config.model_type != "chinese_clip" else 52,
            loss="sigmoid" if config.model_type == "siglip" else "softmax",
            images=ImageSettings().to_dict(),
        )
        made = cls(settings, model, tokenizer, processor, dtype)
        # Of the processor's, transformers writes the last where it saves a whole one.
        names = ("config.json", "preprocessor_config.json", "processor_config.json")
        settings_files = [path for file in names if (path := folder / file).is_file()]
        made._came_from(name, _digest(settings_files, weight_files(folder)))
        return made.to(device=device).eval()

    def pool_image(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels (B, 3, S, S) -> (B, D) float32, behind the projection."""
        return self.model.get_image_features(pixel_values=pixel_values.to(self.model.dtype)).pooler_output.float()

    def pool_text(self, input_ids: torch.Tensor, text_lengths: torch.Tensor) -> torch.Tensor:
        """Token ids (T, L) filled on the right and their lengths (T,) -> (T, D) float32, behind the projection."""
        mask = None  # SigLIP was trained on the filling too, without a mask
        if not self.fixed_length:
            mask = (torch.arange(input_ids.shape[1], device=input_ids.device) < text_lengths[:, None]).long()
        return self.model.get_text_features(input_ids=input_ids, attention_mask=mask).pooler_output.float()

    def project_image(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features, dim=-1)

    project_text = project_image

    def tokenize(self, texts: list[str]) -> tuple[list[np.ndarray], int]:
        """Token ids of each text with the marks its tokenizer sets around it, and how many texts were cut. Raises InputError
        where the folder's tokenizer is another model's, with words that the text tower has not."""
        limit, known = self.settings.max_text_tokens, self.model.config.text_config.vocab_size
        if self.model.config.model_type == "siglip" and "Gemma" in type(self.tokenizer).__name__:
            texts = [text.lower() for text in texts]  # SigLIP 2 was trained so, and its tokenizer does not know
        fill, made, cut = {"padding": "max_length"} if self.fixed_length else {}, [], 0
        for start in range(0, len(texts), 1024):  # some at a time, as in `token_ids`
            part = texts[start : start + 1024]
            with TOKENIZING:  # not verbose: it would warn of what is cut below
                cut += sum(len(row) > limit for row in self.tokenizer(part, verbose=False)["input_ids"])
                rows = self.tokenizer(part, truncation=True, max_length=limit, **fill)["input_ids"]
            made += map(np.array, rows)
        if (largest := max((int(row.max(initial=0)) for row in made), default=0)) >= known:
            raise InputError(
                f"{self.settings.base_model}: its tokenizer knows a token {largest}, its text tower has {known}: they are not"
                " of one model; load it again"
            )
        return made, cut


def length_groups(lengths: list[int], fill: float = 0.8, least: int = 16) -> list[list[int]]:
    """Positions of texts, sorted by length and cut where a group's shortest falls below `fill` of its longest; a group
    has at least `least` texts (a group costs one more pass over the layers), the last maybe fewer."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) < least or lengths[i] >= fill * lengths[groups[-1][0]]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in `dtype`; buffers stay: rotary frequencies in bf16 are wrong by some percent of a score
    at a distance of 200 tokens. So do a matcher's scale and bias, as in `ClipEncoder`."""
    for name, parameter in model.named_parameters():
        if name not in ("logit_scale", "logit_bias"):
            parameter.data = parameter.data.to(dtype)
    return model


def train_in_float32(model: nn.Module) -> None:
    """Bring what is trained to float32, whatever the rest is in: updates of 1e-5 vanish in bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def recompute(part: nn.Module, gradient_checkpointing_kwargs: dict | None = None, **how) -> None:
    """Checkpointing of a transformers model as the Trainer asks for it; torch wants to be told which of its two kinds."""
    part.gradient_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}, **how)


def add_lora(tower: nn.Module, targets: str | list[str], settings) -> None:
    """Inject trainable fp32 LoRA layers (Hu et al. 2021) into the modules that `targets` matches or names, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, target_modules=targets
    )
    inject_adapter_in_model(config, tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train_in_float32(tower)


def load_processor(folder: str | Path, min_pixels: int | None = None, max_pixels: int | None = None):
    """(image processor, tokenizer) of a Qwen-VL folder, with the pixel limits given.

    The Pillow processor is used whether or not torchvision is there, so that pixels are the same on every machine.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        # Where a processor's template lies. Qwen2.5-VL's tokenizer_config.json has one of its own, which takes no images.
        template = Path(folder) / "chat_template.json"
        if template.is_file() and not template.with_suffix(".jinja").is_file():
            tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: tokenizer or image processor is missing: {str(error).splitlines()[0]}") from None
    if min_pixels is not None:
        processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise InputError(f"{folder}: the tokenizer names no end-of-text or no padding token")
    return processor, tokenizer


def end_tokens(language, tokenizer) -> list[int]:
    """The tokens that end what a language model says."""
    ends = language.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends] if ends else [])})


def _batches(total: int, size: int, desc: str, progress: bool):
    from tqdm import tqdm

    return tqdm(range(0, total, size), desc=desc, unit="batch", disable=not progress, leave=False)


# ----------------------------------------------------------------------------------------------------
# Attention over packed scenes


@dataclass
class SceneTree:
    """Where the tokens of a packed row stand (`data.pack`), and in generation what earlier passes left.

    It travels to every attention layer as the keyword `tree`. In a first pass a scene's prefix attends to itself and each
    branch to the prefix and to itself, never to another branch. With `keep`, keys and values stay in `kept`, and a later
    pass attends to them: `continued` (S, Q, T) are the places in its row of the T tokens that come after each branch.
    """

    order: torch.Tensor
    prefix_rows: torch.Tensor
    prefix_lengths: torch.Tensor
    branch_rows: torch.Tensor
    branch_lengths: torch.Tensor
    long_rows: torch.Tensor
    keep: int = 0
    """Free places to leave behind each branch for tokens to come; 0: keep nothing."""
    kept: dict[int, tuple] | None = None
    continued: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: dict, **more) -> "SceneTree":
        """Takes the tables that `data.pack` made out of a batch."""
        names = ("order", "prefix_rows", "prefix_lengths", "branch_rows", "branch_lengths", "long_rows")
        return cls(**{name: batch.pop(name) for name in names}, **more)

    def prefix_hidden(self) -> torch.Tensor:
        """(S, 1, 1, 1, 1, P): True where a short prefix is filled up."""
        places = torch.arange(self.prefix_rows.shape[1], device=self.prefix_lengths.device)
        return (places >= self.prefix_lengths[:, None])[:, None, None, None, None]


def scene_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree=None, **kwargs):
    """Attention of a packed row, (1, H, L, D) -> (1, L, H, D), as `transformers` calls it; without `tree`: plain SDPA.

    The row is taken apart into prefixes and branches, so that the work is that of the tree, not the square of the row:
    for 100 questions of 15 tokens about an image of 80, a sixteenth of what a masked row of 1,580 costs.
    """
    if tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    groups, scaling = query.shape[1] // key.shape[1], scaling or query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, H, D), (L, K, D)
    if tree.continued is not None:
        out = _continue_branches(module.layer_idx, q, k, v, tree, groups, scaling)
        return out.index_select(0, tree.order)[None], None

    scenes, width = tree.prefix_rows.shape
    pq, pk, pv = (_rows(x, tree.prefix_rows).transpose(1, 2) for x in (q, k, v))  # (S, H, P, D)
    out = F.scaled_dot_product_attention(
        pq, pk.repeat_interleave(groups, 1), pv.repeat_interleave(groups, 1), is_causal=True, scale=scaling
    )  # what fills a short prefix stands on its right: causality hides it
    out = [out.transpose(1, 2).reshape(scenes * width, *q.shape[1:])]
    for rows in (tree.branch_rows, tree.long_rows):
        if not rows.numel():
            continue
        bq, bk, bv = (_rows(x, rows) for x in (q, k, v))  # (S, Q, T, H, D)
        bk, bv = (x.permute(0, 3, 1, 2, 4) for x in (bk, bv))  # (S, K, Q, T, D)
        contexts = [(pk, pv, tree.prefix_hidden()), (bk, bv, _later(bq.shape[2], q.device))]
        out.append(_attend(bq, contexts, groups, scaling).reshape(-1, *q.shape[1:]))
        if tree.keep:
            room = (0, 0, 0, tree.keep)
            tree.kept[module.layer_idx] = (pk, pv, F.pad(bk, room), F.pad(bv, room))
    return torch.cat(out).index_select(0, tree.order)[None], None


def _continue_branches(layer: int, q, k, v, tree: SceneTree, groups: int, scaling: float) -> torch.Tensor:
    """Attention of `tree.continued` (S, Q, T) tokens to their scene, their branch and themselves -> (S*Q*T, H, D)."""
    pk, pv, bk, bv = tree.kept[layer]
    nq, nk, nv = (_rows(x, tree.continued) for x in (q, k, v))  # (S, Q, T, H, D)
    nk, nv = (x.permute(0, 3, 1, 2, 4) for x in (nk, nv))  # (S, K, Q, T, D)
    past = torch.arange(bk.shape[3], device=q.device) >= tree.branch_lengths[..., None]
    contexts = [
        (pk, pv, tree.prefix_hidden()),
        (bk, bv, past[:, None, None, :, None, :]),
        (nk, nv, _later(nq.shape[2], q.device)),
    ]
    if tree.keep:  # one token a branch, which the next pass finds behind the branch
        at = tree.branch_lengths[:, None, :, None, None].expand(-1, bk.shape[1], -1, -1, bk.shape[-1])
        tree.kept[layer] = (pk, pv, bk.scatter(3, at, nk), bv.scatter(3, at, nv))
    return _attend(nq, contexts, groups, scaling).reshape(-1, *q.shape[1:])


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (L, ...) at index (...): `x[index]`, whose backward pass took a fifth of a small model's step on a CPU."""
    return x.flatten(1).index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def _later(length: int, device) -> torch.Tensor:
    """(T, T): True where the key stands after the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _attend(q, contexts, groups: int, scaling: float) -> torch.Tensor:
    """One softmax over several contexts: q (S, Q, T, H, D) -> (S, Q, T, H, D).

    A context is keys and values with what is hidden of them (True): one for all branches of a scene (S, K, N, D) or one
    for each (S, K, Q, N, D); K key heads serve G = H / K query heads each.
    """
    s, b, t, heads, d = q.shape
    kinds = heads // groups
    q = q.view(s, b, t, kinds, groups, d).permute(0, 3, 4, 1, 2, 5) * scaling  # (S, K, G, Q, T, D)
    shapes = {4: (s, kinds, groups * b * t), 5: (s, kinds, groups, b, t)}

    def along(x):  # keys and values are the same for the heads of a group
        return x if x.dim() == 4 else x[:, :, None]

    scores = []
    for key, _, hidden in contexts:
        part = q.reshape(*shapes[key.dim()], d) @ along(key).transpose(-1, -2)
        scores.append(part.view(s, kinds, groups, b, t, -1).masked_fill(hidden, float("-inf")))
    weights = torch.cat(scores, -1).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    out = 0
    for part, (_, value, _) in zip(weights.split([x.shape[-1] for x in scores], -1), contexts):
        out = out + (part.reshape(*shapes[value.dim()], -1) @ along(value)).view(s, kinds, groups, b, t, d)
    return out.permute(0, 3, 4, 1, 2, 5).reshape(s, b, t, heads, d)


AttentionInterface.register("scene", scene_attention)
AttentionMaskInterface.register("scene", sdpa_mask)


def packed_states(model, tree: SceneTree, input_ids, position_ids, image_rows=None, image_tokens=None) -> torch.Tensor:
    """Last layer (L, D) of a packed row through a Qwen-VL body (`Qwen2VLModel`, `Qwen2_5_VLModel`) whose language model has
    attention "scene": ids (1, L), positions (3, 1, L), image tokens (N, D) for the rows (N,)."""
    embedded = model.get_input_embeddings()(input_ids)
    if image_rows is not None:
        embedded = embedded.index_copy(1, image_rows, image_tokens.to(embedded.dtype)[None])
    return model.language_model(
        inputs_embeds=embedded, position_ids=position_ids, use_cache=False, tree=tree,
        attention_mask=dict.fromkeys(("full_attention", "sliding_attention")),  # the tree says who sees whom
    ).last_hidden_state[0]  # fmt: skip


def packed_words(body, tree: SceneTree, embedded: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Last layer (L, D) of a packed row of embeddings (1, L, D) at positions (1, L) through the body of a causal language model
    that has attention "scene"."""
    nothing = embedded.new_zeros(1, 1, 1, 1)  # a hand-made mask, which transformers leaves alone: the tree is it
    made = body(inputs_embeds=embedded, position_ids=position_ids, attention_mask=nothing, use_cache=False, tree=tree)
    return made.last_hidden_state[0]


def compile_layers(body: nn.Module, **options) -> None:
    """From now on the decoder layers of a language model's body run compiled (`options` of torch.compile): elementwise work is
    fused, which is most of a step of a small model on a fast GPU. Layers, not the whole, since they are alike and compile
    once."""
    # LoRA's scale is a constant; as a variable it has everything traced twice.
    torch._dynamo.config.specialize_float = True
    for layer in body.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # what transformers makes every decoder layer of
            layer.compile(dynamic=True, **options)  # every step has other lengths


# ----------------------------------------------------------------------------------------------------
# Visual question answering

VQA_SETTINGS = "vqa.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Adapters saved under transformers 4.x before 4.52 have the names on the left.
OLD_ADAPTER_KEYS = {
    r"^base_model\.model\.model\.(layers|embed_tokens|norm)\.": r"base_model.model.model.language_model.\1.",
    r"^base_model\.model\.visual\.": "base_model.model.model.visual.",
}


@dataclass
class VQASettings:
    """What an adapter's folder records beside peft's own files; the fields are those of `config.VQAConfig`."""

    base_model: str
    base_fingerprint: str
    vision_tower: str
    merger: str
    prompt: str
    max_answer_tokens: int
    images: dict
    """`ImageSettings` of training: bands and stretch."""
    answers: dict
    """{type of question: answers of the training split}, the closed set that `--decode candidates` chooses from."""


class VQA(nn.Module):
    """Qwen2-VL or Qwen2.5-VL with a LoRA adapter, answering questions about images; a scene's questions run as branches
    of one sequence.

    ```python
    model = VQA.from_pretrained("output/training_.../best_model")
    model.answer([("a.tif", ["Is there a river?", "How many buildings are there?"])])     # [["yes", "4"]]
    with model.before():                                                                  # the base, adapter off
        model.answer([("a.tif", ["Is there a river?"])])
    ```
    """

    def __init__(self, settings: VQASettings, peft_model, tokenizer, processor):
        super().__init__()
        self.settings, self.peft, self.tokenizer, self.processor = settings, peft_model, tokenizer, processor
        config = self.qwen.config
        self.prompt = ChatPrompt(tokenizer, settings.prompt, config.image_token_id, processor.merge_size)
        self.ends = end_tokens(self.qwen, tokenizer)
        # A base's file brings sampling and a repetition penalty, which would fill what `chat` and a server leave open:
        # other answers than those that are scored.
        self.qwen.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=tokenizer.pad_token_id)

    @property
    def qwen(self) -> nn.Module:
        """The transformers model inside, LoRA layers included."""
        return self.peft.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.qwen.lm_head.weight.device

    # -- making, saving, loading

    @classmethod
    def from_base(
        cls,
        config,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        answers: dict | None = None,
    ) -> "VQA":
        """A new adapter on `config.base_model` (`config`: `config.VQAConfig`); `dtype` is that of the frozen base, what is
        trained is float32. Raises InputError: no such base, tensors that do not fit, quantization without CUDA."""
        from peft import LoraConfig, get_peft_model

        settings = VQASettings(
            base_fingerprint=fingerprint(config.base_model),
            images=image_settings(config).to_dict(),
            answers=answers or {},
            **same_fields(VQASettings, config),
        )
        processor, tokenizer = load_processor(config.base_model, config.min_pixels, config.max_pixels)
        whole_vision = "full" in (config.vision_tower, config.merger)
        base = load_qwen(config.base_model, dtype, config.quantize, device, whole_vision)
        targets = [rf"model\.language_model\.layers\.\d+\..*\.({'|'.join(map(re.escape, config.lora_targets))})"]
        if config.vision_tower == "lora":
            targets.append(rf"model\.visual\.{LORA_TARGETS['image']}")
        whole = ["visual"] if config.vision_tower == "full" else ["merger"] if config.merger == "full" else None
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules="|".join(targets),
            modules_to_save=whole, use_dora=config.use_dora, use_rslora=config.use_rslora, task_type="CAUSAL_LM",
            base_model_name_or_path=str(config.base_model),
        )  # fmt: skip
        names = [name.rpartition(".")[2] for name, _ in base.named_modules() if ".layers." in name]
        if unknown := set(config.lora_targets) - set(names):
            raise InputError(f"--lora_targets {sorted(unknown)[0]}: the language model has no module of that name")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                adapted = get_peft_model(base, lora)
            except ValueError as error:
                raise InputError(f"{config.base_model}: LoRA cannot be added: {str(error).splitlines()[0]}") from None
            model = cls(settings, adapted, tokenizer, processor)
        train_in_float32(model)  # peft sees to LoRA alone: a merger or tower in training is a copy in the base's dtype
        model._measure_magnitudes()
        return model.to(device) if config.quantize == "none" else model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        base_model: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        config=None,
        quantize: str = "none",
        trainable: bool = False,
    ) -> "VQA":
        """Load an adapter folder: one of ours, or any peft LoRA of a Qwen-VL base (then `config`, a `VQAConfig`, says what
        ours would record). The adapter is shown to be alive (`check_alive`).

        Raises InputError: not an adapter, base missing or another one, tensors that do not fit, an adapter without effect.
        """  # fmt: skip
        from peft import LoraConfig, get_peft_model

        folder = Path(folder)
        tensors, record = read_adapter(folder)
        ours = (folder / VQA_SETTINGS).is_file()
        settings = read_settings(VQASettings, folder / VQA_SETTINGS) if ours else None
        named = base_model or (settings.base_model if ours else record.get("base_model_name_or_path"))
        if not named:
            raise InputError(f"{folder}: the adapter names no base; give its folder with --base")
        root = base_folder(named)
        if not ours:
            from config import VQAConfig

            config = config or VQAConfig()
            settings = VQASettings(
                base_model=str(root), base_fingerprint=fingerprint(root), merger="frozen", prompt=config.prompt,
                vision_tower="lora" if any(".visual." in key for key in tensors) else "frozen",
                max_answer_tokens=config.max_answer_tokens, images=image_settings(config).to_dict(), answers={},
            )  # fmt: skip
            processor, tokenizer = load_processor(root, config.min_pixels, config.max_pixels)
        else:
            refuse_other_base(root, settings, folder, "--base (train_vqa.py, cli_demo.py, web_demo.py: --base_model)")
            settings = replace(settings, base_model=str(root))  # where it lies now
            processor, tokenizer = load_processor(folder)
        base = load_qwen(root, dtype, quantize, device, "full" in (settings.vision_tower, settings.merger))
        known = dict(base.named_modules())
        modules = adapted_modules(tensors)
        if lost := [name for name in modules if name not in known]:
            raise InputError(
                f"{folder}: an adapter of another base: {root} has no {lost[0]} ({len(lost)} such modules)"
            )
        if ours and (missing := sorted(named_by(record.get("target_modules"), known) - set(modules))):
            raise InputError(
                f"{folder}: the adapter holds nothing for {missing[0]} ({len(missing)} such modules are missing)"
            )
        # peft takes these starts off the base's own weights: "before" would be no base.
        start = str(record.get("init_lora_weights")).lower()
        if start.startswith(("pissa", "olora", "corda", "loftq")):
            raise InputError(
                f"{folder / ADAPTER_CONFIG}: init_lora_weights {start!r} changes the base itself; save it as plain LoRA first, by"
                " peft's path_initial_model_for_weight_conversion"
            )
        try:
            lora = LoraConfig(**{key: value for key, value in record.items() if key in LoraConfig.__dataclass_fields__})
            lora.target_modules, lora.inference_mode = modules, not trainable
            lora.base_model_name_or_path = str(root)
            model = cls(settings, get_peft_model(base, lora), tokenizer, processor)
        except (TypeError, ValueError) as error:
            raise InputError(f"{folder / ADAPTER_CONFIG}: {str(error).splitlines()[0]}") from None
        if trainable:
            train_in_float32(model)
        model.set_tensors(folder / ADAPTER, tensors)
        model = model if quantize != "none" else model.to(device)
        model.eval().check_alive(folder)
        return model

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The trained tensors under the names peft saves them by."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.peft, save_embedding_layers=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter in peft's layout, with settings, tokenizer and image processor."""
        save_trained(Path(folder), self.adapter_state(), ADAPTER, self.settings, VQA_SETTINGS, self)
        record = self.peft.peft_config["default"]
        training, record.inference_mode = record.inference_mode, True
        record.save_pretrained(str(folder))
        record.inference_mode = training

    def load_trained(self, folder: str | Path) -> None:
        """Copy a checkpoint's tensors into this model. Raises InputError unless they are the expected ones, of its base."""
        refuse_other_bases(Path(folder) / VQA_SETTINGS, self.settings)
        self.set_tensors(Path(folder) / ADAPTER, read_adapter(folder)[0])

    def refuse_checkpoint(self, folder: str | Path) -> None:
        """Raises InputError where `load_trained` would; nothing is copied."""
        refuse_other_bases(Path(folder) / VQA_SETTINGS, self.settings)
        self._refuse_tensors(Path(folder) / ADAPTER, read_adapter(folder)[0])

    def _refuse_tensors(self, where, tensors: dict[str, torch.Tensor]) -> None:
        own = self.adapter_state()
        shapes = [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
        _refuse_keys(where, own.keys() - tensors.keys(), tensors.keys() - own.keys(), shapes)
        if broken := next((key for key, value in tensors.items() if not value.isfinite().all()), None):
            raise InputError(f"{where}: tensor {broken} holds NaN or infinity: the run that wrote it diverged")

    def set_tensors(self, where, tensors: dict[str, torch.Tensor]) -> None:
        """Copy adapter tensors, by peft's names, into this model. Raises InputError unless they are the expected ones."""
        from peft import set_peft_model_state_dict

        self._refuse_tensors(where, tensors)
        set_peft_model_state_dict(self.peft, tensors)
        for key, value in self.adapter_state().items():
            if not torch.equal(value.cpu(), tensors[key].to(value.dtype).cpu()):
                raise InputError(f"{where}: tensor {key} did not arrive in the model")

    def trained_names(self) -> list[str]:
        """Names of the parameters in training."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    @torch.no_grad()
    def check_alive(self, where) -> None:
        """Show that the adapter does something: some B matrix is not zero, and a probe's hidden state changes with it (the
        model is in eval mode). Raises InputError: an adapter that was never trained, or does not reach the model."""
        b = {name: p for name, p in self.named_parameters() if "lora_B" in name}
        if b and not any(bool(p.any()) for p in b.values()):
            raise InputError(f"{where}: all {len(b)} B matrices are zero: the adapter was never trained")
        if not any("language_model" in name for name in b):
            return
        ids, _ = self.prompt.prefix(None)
        ids = torch.tensor([*ids, *self.prompt.branches(["Is there a road?"])[0][0]], device=self.device)[None]
        on = self.qwen.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
        with self.before():
            off = self.qwen.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
        if torch.equal(on, off):
            raise InputError(f"{where}: the adapter changes no output: it does not reach the model")

    def before(self):
        """Context in which the model is its base: the adapter is off, and modules trained in full are the original ones."""
        return self.peft.disable_adapter()

    @torch.no_grad()
    def reset_adapter(self, seed: int = 0) -> None:
        """Make the adapter new again: A random, B zero, modules trained in full as in the base."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in self.peft.modules():
                if hasattr(module, "reset_lora_parameters"):
                    module.reset_lora_parameters("default", True)
                if type(module).__name__ == "ModulesToSaveWrapper":
                    module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())
        train_in_float32(self)
        self._measure_magnitudes()

    @torch.no_grad()
    def _measure_magnitudes(self) -> None:
        """DoRA's, of weights in float32: peft's are rounded to the base's dtype, and a model with them does not begin as its
        base."""
        for module in self.peft.modules():
            if "default" in getattr(module, "lora_variant", {}):
                module.lora_variant["default"].init(module, "default")

    def merge(self, folder: str | Path, dtype: torch.dtype | None = None, settings: bool = True) -> None:
        """Write base and adapter as one model in the layout of the base, which plain transformers and vLLM load, with the
        adapter's `vqa.json` (prompt, bands, stretch) for whoever asks it, unless not `settings`; `dtype` of the file: by
        default the base's. The model itself has no adapter any more after it."""
        from peft.tuners.lora import LoraLayer

        if Path(folder).is_dir() and any(path.name != "lost+found" for path in Path(folder).iterdir()):
            raise InputError(f"{folder}: is there already; give a new folder, or empty it")
        base = base_folder(self.settings.base_model)
        record = json.loads((base / "config.json").read_text(encoding="utf-8"))
        name = record.get("dtype") or record.get("torch_dtype")
        for module in self.peft.modules():
            if isinstance(module, LoraLayer):  # one at a time: the whole in float32 is twice a base of 16 bits
                layer = module.get_base_layer()
                kept = layer.weight.dtype
                layer.float()
                module.merge(safe_merge=True)
                layer.to(kept)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")  # what is no LoraLayer is not
            merged = self.peft.merge_and_unload(safe_merge=True)
        merged = merged.to(dtype or (getattr(torch, name) if name else merged.dtype))
        with whole_folder(Path(folder)) as new:
            merged.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            save_processor(self.processor, new, record["model_type"])
            if settings:
                write_settings(new / VQA_SETTINGS, self.settings)
            open_weights(new, "config.json")
            for name in ("chat_template.json", "chat_template.jinja", "vocab.json", "merges.txt"):
                if (base / name).is_file() and not (new / name).exists():
                    shutil.copyfile(base / name, new / name)
            keep_settings_of(base, new, merged.dtype)

    # -- for the trainer

    def gradient_checkpointing_enable(self, **how) -> None:
        """Recompute activations in the backward pass (called by the Trainer)."""
        recompute(self.qwen, **how)

    def compile_layers(self, **options) -> None:
        """See `compile_layers`."""
        compile_layers(self.qwen.model.language_model, **options)

    def parameter_groups(self) -> dict[str, list[str]]:
        """{"language", "vision", "merger": names of trained parameters}: each may have its own learning rate."""
        groups: dict[str, list[str]] = {"language": [], "vision": [], "merger": []}
        for name in self.trained_names():
            side = "merger" if ".merger." in name else "vision" if ".visual." in name else "language"
            groups[side].append(name)
        return groups

    # -- images

    def encode_images(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """Patches (P, C) of B images with grids (B, 3) -> the image tokens (N, D) of each, as the language model reads
        them."""
        visual = self.qwen.model.visual
        weight = next(visual.parameters())
        # What is trained whole is float32, beside a base of 16 bits; the Trainer's autocast is not always there.
        whole = "full" in (self.settings.vision_tower, self.settings.merger)
        several = whole and len({p.dtype for p in visual.parameters()}) > 1
        kind = self.device.type
        mixed = torch.autocast(kind, torch.bfloat16) if several and not torch.is_autocast_enabled(kind) else None
        with mixed or contextlib.nullcontext():
            tokens = visual(pixel_values.to(weight.dtype), grid_thw=image_grid_thw).pooler_output
        return list(tokens.split((image_grid_thw.prod(-1) // self.processor.merge_size**2).tolist()))

    def token_store(self, cache_dir: str, store: PixelStore) -> TokenStore:
        """Where the image tokens of this model's base are kept."""
        weight = next(self.qwen.model.visual.parameters())
        quantized = getattr(self.qwen.config, "quantization_config", "")  # the tower, too, then answers otherwise
        recipe = f"{self.settings.base_fingerprint} {store.recipe} {weight.dtype}{quantized}"
        return TokenStore(cache_dir, recipe, store.settings.bands)

    @torch.no_grad()
    def prepare_tokens(self, tokens: TokenStore, store: PixelStore, paths: list[str], batch_size: int = 32) -> None:
        """Encode with the base's vision tower every image that `tokens` does not hold yet."""

        def encode(chunk):
            batch = pixel_batch([store[path] for path in chunk], self.processor, self.device)
            grids = batch["image_grid_thw"]
            return [{"tokens": row, "grid": grid} for row, grid in zip(self.encode_images(**batch), grids)]

        with self.before():
            tokens.prepare(paths, encode, batch_size)

    # -- training

    def hidden_states(self, tree: SceneTree, input_ids, position_ids, image_rows=None, image_tokens=None, pixel_values=None,
                      image_grid_thw=None) -> torch.Tensor:  # fmt: skip
        """Last layer of a packed row, (L, D)."""
        if image_rows is not None and image_tokens is None:
            image_tokens = torch.cat(self.encode_images(pixel_values, image_grid_thw))
        return packed_states(self.qwen.model, tree, input_ids, position_ids, image_rows, image_tokens)

    def forward(self, labels, input_ids, label_rows=None, **batch) -> torch.Tensor:
        """Sum of the cross entropies (nats) of all targets: of a packed row (`data.pack`), where only the positions that
        predict a target meet the vocabulary, or of padded rows (`data.pad_questions`) through transformers' own forward."""
        if label_rows is None:
            logits = self.qwen(input_ids=input_ids, mm_token_type_ids=(input_ids == self.prompt.image_token).int(),
                               use_cache=False, **batch).logits[:, :-1]  # fmt: skip
            return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        tree = SceneTree.of(batch)
        hidden = self.hidden_states(tree, input_ids, **batch)
        return F.cross_entropy(self.qwen.lm_head(hidden.index_select(0, label_rows)).float(), labels, reduction="sum")

    # -- answering

    def scene_items(self, scenes, store=None, tokens: TokenStore | None = None, blind: bool = False) -> QuestionDataset:
        """`scenes`: [(image path, [question, ...])] -> a dataset of their prompts, without answers."""
        listed = [
            QuestionScene(str(path), [q if isinstance(q, Question) else Question(q, "") for q in asked])
            for path, asked in scenes
        ]
        store = pixel_store(self) if store is None else store
        return QuestionDataset(
            listed, self.prompt, processor=self.processor, store=store, tokens=tokens, blind=blind, answers=False
        )

    @torch.inference_mode()
    def answer(
        self,
        scenes,
        *,
        store=None,
        tokens: TokenStore | None = None,
        blind: bool = False,
        decode: str = "generate",
        max_tokens: int | None = None,
        budget: int = 16384,
        progress: bool = False,
    ) -> list[list[str]]:
        """Answers to the questions of each scene, [(image path, [question, ...])] -> [[answer, ...]].

        Every image runs once for all of its questions, as many scenes at a time as `budget` tokens hold. decode "generate":
        greedy, at most `max_tokens` tokens; "candidates": the answer of the training split (of the question's type, where
        `scenes.Question`s are given) whose tokens are the most probable. Raises imagery.ImageError for an unreadable file.
        """  # fmt: skip
        items = self.scene_items(scenes, store, tokens, blind)
        answers: list[list[str]] = [[""] * len(scene.questions) for scene in items.scenes]
        room = max_tokens or self.settings.max_answer_tokens
        lengths = [[len(ids) + room for ids, _ in branches] for branches in items.branches]
        # Without reading an image its length is not known: scenes are taken a few at a time and cut to the budget then.
        training = self.training
        self.eval()
        for start in _batches(len(items), 16, "answering", progress):
            part = [items[0, i] for i in range(start, min(start + 16, len(items)))]
            prefixes = [len(item["prefix"][0]) for item in part]
            for piece in split_work(prefixes, lengths[start : start + 16], budget):
                chosen = [part[s] | {"branches": [part[s]["branches"][b] for b in own]} for s, own in piece]
                if decode == "candidates":
                    kinds = [[items.scenes[start + s].questions[b].kind for b in own] for s, own in piece]
                    made = self._choose(chosen, kinds)
                else:
                    made = self._generate(chosen, room)
                for (s, own), texts in zip(piece, made):
                    for b, text in zip(own, texts):
                        answers[start + s][b] = text
        self.train(training)
        return answers

    @torch.inference_mode()
    def chat(
        self, image: str | None, question: str, history=(), *, max_tokens: int | None = None, temperature: float = 0.0,
        top_p: float = 1.0, streamer=None, stop=None, store=None, cut=None,
    ) -> str:  # fmt: skip
        """The answer to one question after a `history` of (question, answer) about an image (None: about none).

        Greedy, as `answer`; drawn where `temperature` is above 0 (Holtzman et al. 2020 for `top_p`). `streamer`: a
        transformers streamer; `stop()` true ends the answer where it is. Of a history that is longer than the base reads the
        earliest turns are left out, and `cut(how many)` is told. Raises imagery.ImageError; InputError for a question that is.
        """
        part = {}
        if image is not None:
            part = pixel_batch([(pixel_store(self) if store is None else store)[str(image)]], self.processor)
        prefix, _ = self.prompt.prefix(tuple(part["image_grid_thw"][0].tolist()) if part else None)
        turns, most = tuple(map(tuple, history)), max_tokens or self.settings.max_answer_tokens
        context = self.qwen.config.get_text_config().max_position_embeddings
        for left_out in range(len(turns) + 1):
            asked = self.prompt.asked(Question(question, "", history=turns[left_out:]))
            ids = torch.tensor([[*prefix, *self.prompt.branches([asked])[0][0]]])
            if ids.shape[1] + most <= context:
                break
        else:
            raise InputError(
                f"the question and an answer of up to {most} tokens are longer than the {context} that the base reads"
            )
        if left_out and cut:
            cut(left_out)
        if part:
            part["mm_token_type_ids"] = (ids == self.prompt.image_token).int()
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | part
        how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # not those of the base
        if temperature > 0:
            # A slider at its end gives a whole number, which transformers does not take.
            how = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=most, eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id, **how,
        )  # fmt: skip
        criteria = [lambda ids, scores, **_: torch.full((len(ids),), bool(stop and stop()), device=ids.device)]
        training = self.training
        self.eval()
        made = self.qwen.generate(
            **{name: value.to(self.device) for name, value in given.items()},
            generation_config=config, streamer=streamer, stopping_criteria=criteria,
        )  # fmt: skip
        self.train(training)
        return self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def _prefill(self, scenes: list[dict], keep: int):
        """Run scenes with their questions; returns (tree with keys and values kept, logits (S, Q, V) at each branch's last
        token, position (S, Q) of the token to come)."""
        batch = {name: value.to(self.device) for name, value in pack(scenes, row_align(self.device)).items()}
        batch.pop("labels"), batch.pop("label_rows")
        tree = SceneTree.of(batch, keep=keep, kept={})
        positions = batch["position_ids"][0, 0]
        hidden = self.hidden_states(tree, **batch)
        last = tree.branch_rows.gather(2, (tree.branch_lengths - 1).clamp(min=0)[..., None])[..., 0]  # (S, Q)
        return tree, self.qwen.lm_head(hidden[last]), positions[last] + 1

    def _continue(self, tree: SceneTree, ids, positions, real, keep: int = 0) -> torch.Tensor:
        """Hidden states (N, D) of the N tokens of ids (S, Q, T) that are `real`, seen after their branches."""
        rows = torch.zeros_like(ids)
        rows[real] = torch.arange(int(real.sum()), device=ids.device)
        step = replace(tree, order=real.flatten().nonzero()[:, 0], continued=rows, keep=keep)
        return self.hidden_states(step, ids[real][None], positions[real].expand(3, 1, -1))

    def _generate(self, scenes: list[dict], room: int) -> list[list[str]]:
        """Greedy answers; one token of every unfinished branch a pass."""
        tree, logits, positions = self._prefill(scenes, keep=room)
        ends = torch.tensor(self.ends, device=self.device)
        real = tree.branch_lengths > 0  # (S, Q)
        made = []
        for step in range(room):
            token = logits.argmax(-1)  # (S, Q)
            real = real & ~torch.isin(token, ends)
            made.append(torch.where(real, token, ends[0]))
            if step + 1 == room or not real.any():
                break
            hidden = self._continue(tree, token[..., None], positions[..., None], real[..., None], keep=1)
            said = self.qwen.lm_head(hidden)  # under autocast not in the type of `hidden`
            logits = said.new_zeros(*real.shape, said.shape[-1])
            logits[real] = said
            tree.branch_lengths, positions = tree.branch_lengths + real, positions + real
        tokens = torch.stack(made, -1).tolist()
        answers = []
        for scene, rows in zip(scenes, tokens):
            cut = [row[: next((i for i, t in enumerate(row) if t in self.ends), len(row))] for row in rows]
            answers.append(self.tokenizer.batch_decode(cut[: len(scene["branches"])], skip_special_tokens=True))
        return [[text.strip() for text in row] for row in answers]

    def _choose(self, scenes: list[dict], kinds: list[list[str | None]]) -> list[list[str]]:
        """For each question the known answer of its type with the largest log probability, end token included.

        Best first through the tree of the answers' tokens: a log probability only falls as an answer grows, so the first
        whole answer that comes up is the best of all, and most of a large set (areas, counts) is never looked at.
        """
        known = self.settings.answers
        if not known:
            raise InputError("--decode candidates: the adapter records no answers; use --decode generate")
        every = sorted({answer for answers in known.values() for answer in answers})
        trees = {}  # of each type: {tokens so far: tokens that may follow}, {all tokens: answer}
        for kind in {kind for row in kinds for kind in row}:
            answers = known.get(kind or "") or every
            following, whole = {}, {}
            for answer, ids in zip(answers, self.tokenizer(answers, add_special_tokens=False)["input_ids"]):
                path = (*ids, self.prompt.end)
                whole[path] = answer
                for i, token in enumerate(path):
                    following.setdefault(path[:i], {})[token] = None
            trees[kind] = ({path: list(tokens) for path, tokens in following.items()}, whole)

        tree, logits, positions = self._prefill(scenes, keep=1)
        result = [[""] * len(row) for row in kinds]
        heaps = {(s, b): [(0.0, ())] for s, row in enumerate(kinds) for b in range(len(row))}
        asked = dict.fromkeys(heaps, ())  # the path each question waits to see continued
        said = dict(zip(asked, (logits[s, b].float().log_softmax(-1) for s, b in asked)))
        while asked:
            for place, path in list(asked.items()):
                (following, whole), heap = trees[kinds[place[0]][place[1]]], heaps[place]
                score, _ = heapq.heappop(heap)
                for token, more in zip(following[path], said[place][following[path]].tolist()):
                    heapq.heappush(heap, (score - more, (*path, token)))
                asked[place] = heap[0][1]
                if heap[0][1] in whole:
                    result[place[0]][place[1]] = whole[asked.pop(place)]
            if asked:
                ids = torch.zeros(*positions.shape, max(map(len, asked.values())), dtype=torch.long)
                real = torch.zeros_like(ids, dtype=torch.bool)
                for place, path in asked.items():
                    ids[place][: len(path)], real[place][: len(path)] = torch.tensor(path), True
                ids, real = ids.to(self.device), real.to(self.device)
                hidden = self._continue(
                    tree, ids, positions[..., None] + torch.arange(ids.shape[-1], device=ids.device), real
                )
                places = sorted(asked)
                last = torch.tensor([len(asked[place]) for place in places], device=ids.device).cumsum(0) - 1
                said = dict(zip(places, self.qwen.lm_head(hidden[last]).float().log_softmax(-1)))
        return result


# ----------------------------------------------------------------------------------------------------
# Captions

CAPTIONER, PROJECTOR = "captioner.json", "captioner.safetensors"
VISION = {  # model_type -> (vision encoder, image processor, tokens before the patches)
    "clip": (CLIPVisionModel, CLIPImageProcessorPil, 1),
    "siglip": (SiglipVisionModel, SiglipImageProcessorPil, 0),
}
# A vision encoder's tensors in a whole CLIP or SigLIP folder, and in one that holds the encoder alone; and the rest of the
# whole: position_ids are buffers of old files.
VISION_KEY = re.compile(r"^(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\..+)$")
VISION_UNUSED = re.compile(
    r"^(text_model\..+|logit_scale|logit_bias|(visual|text)_projection\.weight|.*\.position_ids)$"
)
THINKING = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


@dataclass
class CaptionerSettings:
    """What a captioner's folder records; the fields are those of `config.CaptionConfig`."""

    vision_model: str
    vision_fingerprint: str
    language_model: str
    language_fingerprint: str
    vision_layer: int
    projector: str
    freeze_vision_model: bool
    freeze_language_model_except_layers: int
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    max_caption_tokens: int
    prompts: dict
    """{language: prompt} of the languages trained on, "en" and "zh"; the one with the most captions first."""
    images: dict
    """`ImageSettings` of training: bands and stretch."""
    stage: int = 2
    """1 in a checkpoint of the first stage, which holds the projector alone."""
    vision_kept_as: str = ""
    """Of final/, which has a fingerprint of its own for weights that are its base's: by which fingerprint and dtype training
    kept what the encoder makes of an image. Empty where the encoder was trained."""


class Projector(nn.Module):
    """Patch features (B, N, V) -> tokens (B, M, D) as wide as a language model's word embeddings.

    "linear" or "mlp" (two layers with GELU: LLaVA-1.5, Liu et al. 2023b), M = N; "pixel_shuffle" joins 2 x 2 patches of the
    `side` x `side` before the two layers, M = N / 4 (InternVL 1.5, Chen et al. 2024, which also begins with a LayerNorm).
    """

    def __init__(self, kind: str, vision_width: int, language_width: int, side: int):
        super().__init__()
        self.kind, self.side = kind, side
        if kind == "pixel_shuffle" and side % 2:
            raise InputError(f"--projector pixel_shuffle: {side} x {side} patches cannot be joined 2 x 2; use mlp")
        width = vision_width * (4 if kind == "pixel_shuffle" else 1)
        layers = [nn.LayerNorm(width), nn.Linear(width, language_width)]
        if kind != "linear":
            layers += [nn.GELU(), nn.Linear(language_width, language_width)]
        self.layers = nn.Sequential(*layers)
        self.tokens = side * side // (4 if kind == "pixel_shuffle" else 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.kind == "pixel_shuffle":
            b, _, v = features.shape
            half = self.side // 2
            features = features.view(b, half, 2, half, 2, v).transpose(2, 3).reshape(b, half * half, 4 * v)
        return self.layers(features.to(self.layers[1].weight.dtype))


class Captioner(nn.Module):
    """A vision encoder (CLIP, SigLIP), a projector and a causal language model that describes what the encoder sees.

    ```python
    model = Captioner.from_pretrained("outputs/final")
    model.caption(["a.tif", "b.png"])                                     # ["a port with two ships .", ...]
    model.caption(["a.tif"], prompt="描述这幅图像。", num_beams=4)
    ```
    """

    def __init__(self, settings: CaptionerSettings, vision, language, tokenizer, processor):
        super().__init__()
        self.settings, self.tokenizer, self.processor = settings, tokenizer, processor
        if not settings.freeze_vision_model:
            vision = vision.float()  # all of it: images run through layers, too, that are not trained
        self.vision, self.language = vision.requires_grad_(False), language.requires_grad_(False)
        side = vision.config.image_size // vision.config.patch_size
        width = language.get_input_embeddings().embedding_dim
        self.projector = Projector(settings.projector, vision.config.hidden_size, width, side)
        with torch.no_grad():  # images begin as loud as words
            embedding = language.get_input_embeddings()
            words = embedding.weight.float().std() * getattr(embedding, "embed_scale", 1)  # Gemma's are made larger
            noise = torch.randn(8, side * side, vision.config.hidden_size, generator=torch.Generator().manual_seed(0))
            last = self.projector.layers[-1]
            last.bias.zero_()
            last.weight.mul_(words.cpu() / self.projector(noise).std())
        if settings.lora_rank:
            # Not peft's "all-linear", which takes the fused experts of a mixture, too: they cannot be merged.
            head = language.get_output_embeddings()
            parts = [(name, part) for name, part in language.named_modules() if part is not head]
            add_lora(language, [name for name, part in parts if isinstance(part, (nn.Linear, Conv1D))], settings)
        depth = len(self.layers)
        if not 0 <= settings.freeze_language_model_except_layers <= depth:
            raise InputError(
                f"--freeze_language_model_except_layers {settings.freeze_language_model_except_layers}: expected 0 to {depth},"
                f" the layers of {settings.language_model}"
            )
        stage = settings.stage
        self.set_stage(2)
        train_in_float32(self)
        self.set_stage(stage)
        self.prompt = CaptionPrompt(tokenizer, self.projector.tokens)
        self.ends = end_tokens(language, tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.never = [vocabulary[mark] for mark in ("<think>", "</think>") if mark in vocabulary] or None

    @property
    def device(self) -> torch.device:
        return self.projector.layers[1].weight.device

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the language model, whatever it calls them."""
        count = self.language.config.get_text_config().num_hidden_layers
        lists = (m for m in self.language.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        return next(lists)

    def set_stage(self, stage: int) -> None:
        """What is trained from now on: 1, the projector; 2, with it the language model's last layers or LoRA, and the
        vision encoder unless it is frozen."""
        self.settings.stage = stage
        self.language.requires_grad_(False)
        if stage == 2 and self.settings.lora_rank:
            for name, parameter in self.language.named_parameters():
                parameter.requires_grad_("lora_" in name)
        elif stage == 2:
            for layer in self.layers[len(self.layers) - self.settings.freeze_language_model_except_layers :]:
                layer.requires_grad_(True)
        self.vision.requires_grad_(stage == 2 and not self.settings.freeze_vision_model)
        if stage == 2 and not self.settings.freeze_vision_model:  # layers after the one that is read get no gradient
            read = self.settings.vision_layer % (self.vision.config.num_hidden_layers + 1)
            self.vision.encoder.layers[read:].requires_grad_(False)
            for name in ("post_layernorm", "head"):
                if hasattr(self.vision, name):
                    getattr(self.vision, name).requires_grad_(False)

    # -- making, saving, loading

    @classmethod
    def from_base(
        cls, config, *, seed: int = 0, dtype: torch.dtype = torch.float32, prompts: dict | None = None
    ) -> "Captioner":
        """A new projector between two bases (`config`: `config.CaptionConfig`). `dtype`: of what is frozen; what is trained
        is float32. Raises InputError: a base that is missing or of another kind, tensors that do not fit."""
        roots = base_folder(config.vision_model_name), base_folder(config.language_model_name)
        (vision, processor), (language, tokenizer) = load_vision(roots[0], dtype), load_language(roots[1], dtype)
        if config.image_fit == "squash":
            side = vision.config.image_size
            processor.size, processor.do_center_crop = {"height": side, "width": side}, False
        depth = vision.config.num_hidden_layers
        if not -depth - 1 <= config.vision_layer <= depth:
            raise InputError(f"--vision_layer {config.vision_layer}: expected {-depth - 1} to {depth}")
        settings = CaptionerSettings(
            vision_model=str(config.vision_model_name), vision_fingerprint=fingerprint(roots[0]),
            language_model=str(config.language_model_name), language_fingerprint=fingerprint(roots[1]),
            prompts=prompts or {"en": config.prompt, "zh": config.prompt_zh}, images=image_settings(config).to_dict(),
            **same_fields(CaptionerSettings, config),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(settings, vision, language, tokenizer, processor)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Captioner":
        """Load a captioner: `final/`, which holds all of it, or a checkpoint, which needs its two bases.

        Raises InputError: not such a folder, a base missing or changed since training, tensors that do not fit.
        """
        folder = Path(folder)
        try:
            settings = read_settings(CaptionerSettings, folder / CAPTIONER)
        except (FileNotFoundError, NotADirectoryError):
            hint = "; did you mean its final/?" if (folder / "final").is_dir() else ""
            raise InputError(f"{folder}: not a captioner ({CAPTIONER} is missing){hint}") from None
        roots = {}
        for side, name in (("vision", settings.vision_model), ("language", settings.language_model)):
            own = folder / side
            roots[side] = own if own.is_dir() else base_folder(name)
            found, recorded = fingerprint(roots[side]), getattr(settings, f"{side}_fingerprint")
            if found != recorded:
                raise InputError(
                    f"{roots[side]}: this {side} model (fingerprint {found}) is not the one of {folder} ({recorded})"
                )
        vision, processor = load_vision(roots["vision"], dtype, processor_from=folder)
        language, tokenizer = load_language(roots["language"], dtype, tokenizer_from=folder)
        model = cls(settings, vision, language, tokenizer, processor)
        model.load_trained(folder)
        return _in_dtype(model, dtype).to(device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained tensors and all that use must share with training; the bases are named, not copied."""
        state = self.state_dict()
        tensors = {name: state[name] for name in self.trained_names()}
        save_trained(Path(folder), tensors, PROJECTOR, self.settings, CAPTIONER, self)

    def save_whole(self, folder: str | Path) -> None:
        """Write a folder that needs no other: vision/ and language/ as plain transformers loads them, LoRA merged, and the
        projector."""
        folder = Path(folder)
        self.vision.config.architectures = [type(self.vision).__name__]
        self.vision.config.save_pretrained(folder / "vision")
        # The names of the hubs, which every version of transformers reads; version 5 writes CLIP's without the prefix.
        named = {f"vision_model.{key.removeprefix('vision_model.')}": x for key, x in self.vision.state_dict().items()}
        save_file(
            {key: x.contiguous().cpu() for key, x in named.items()}, folder / "vision" / WEIGHTS, {"format": "pt"}
        )
        self.processor.save_pretrained(folder / "vision")
        state = {key: value for key, value in self.language.state_dict().items() if "lora_" not in key}
        for name, module in self.language.named_modules():
            if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
                key, delta = f"{name}.base_layer.weight", module.get_delta_weight("default")
                state[key] = (state[key].float() + delta.float()).to(state[key].dtype)
        state = {key.replace(".base_layer.", "."): value for key, value in state.items()}
        self.language.save_pretrained(folder / "language", state_dict=state)
        self.tokenizer.save_pretrained(folder / "language")
        keep_settings_of(base_folder(self.settings.language_model), folder / "language", self.language.dtype)
        kept_as = f"{self.settings.vision_fingerprint} {next(self.vision.parameters()).dtype}"
        kept_as = kept_as if self.settings.freeze_vision_model else ""
        settings = replace(
            self.settings, vision_model="vision", language_model="language", lora_rank=0, freeze_vision_model=True,
            freeze_language_model_except_layers=0, stage=2, vision_fingerprint=fingerprint(folder / "vision"),
            language_fingerprint=fingerprint(folder / "language"), vision_kept_as=kept_as,
        )  # fmt: skip
        tensors = {name: value for name, value in self.state_dict().items() if name.startswith("projector.")}
        save_trained(folder, tensors, PROJECTOR, settings, CAPTIONER, self)

    def trained_names(self) -> list[str]:
        """Names of the tensors a checkpoint holds: the projector's, and whatever else is in training."""
        return [name for name, p in self.named_parameters() if p.requires_grad or name.startswith("projector.")]

    def load_trained(self, folder: str | Path) -> None:
        """Copy a checkpoint's tensors into this model. Raises InputError unless they are the expected ones, of its base."""
        refuse_other_bases(Path(folder) / CAPTIONER, self.settings)
        load_exactly(self, Path(folder) / PROJECTOR)

    def gradient_checkpointing_enable(self, **how) -> None:
        """Recompute activations in the backward pass (called by the Trainer)."""
        recompute(self.language, **how)
        if not self.settings.freeze_vision_model:
            recompute(self.vision, **how)

    def compile_layers(self, **options) -> None:
        """See `compile_layers`."""
        compile_layers(self.language.base_model, **options)

    def parameter_groups(self) -> dict[str, list[str]]:
        """{"projector", "language", "vision": names of trained parameters}: each may have its own learning rate."""
        groups: dict[str, list[str]] = {"projector": [], "language": [], "vision": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[name.split(".")[0]].append(name)
        return groups

    # -- images

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> patch features (B, N, V) of layer `vision_layer`, without the class token."""
        return self._see(pixel_values)[0]

    def _see(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what `encode_images` gives, the encoder's pooled output (B, V): CLIP's class token)"""
        train = not self.settings.freeze_vision_model and torch.is_grad_enabled()
        with torch.set_grad_enabled(train):
            weight = next(self.vision.parameters())
            seen = self.vision(pixel_values.to(weight.dtype), output_hidden_states=True)
            skip = VISION[self.vision.config.model_type.removesuffix("_vision_model")][2]
            return seen.hidden_states[self.settings.vision_layer][:, skip:], seen.pooler_output

    def _features(self, paths: list[str], store: PixelStore, tokens: TokenStore | None) -> torch.Tensor:
        """Patch features (B, N, V) of images; from `tokens` where they are kept."""
        kept = {}
        for path in paths if tokens is not None else ():
            with contextlib.suppress(KeyError):
                kept[path] = tokens[path][0]
        if missing := [path for path in dict.fromkeys(paths) if path not in kept]:
            batch = pixel_batch([store[path] for path in missing], self.processor, self.device)
            kept |= zip(missing, self.encode_images(batch["pixel_values"]))
        return torch.stack([kept[path].to(self.device) for path in paths])

    @torch.inference_mode()
    def embed_images(
        self, paths: list[str], store: PixelStore, batch_size: int = 32, tokens: TokenStore | None = None
    ) -> np.ndarray:
        """(N, V) float32: the vision encoder's pooled output of each image, of unit length; from `tokens` where it is kept."""
        kept = {path: tokens.more(path, "pooled") for path in paths} if tokens is not None else {}
        missing = [path for path in dict.fromkeys(paths) if kept.get(path) is None]
        for start in range(0, len(missing), batch_size):
            chunk = missing[start : start + batch_size]
            batch = pixel_batch([store[path] for path in chunk], self.processor, self.device)
            kept |= zip(chunk, self._see(batch["pixel_values"])[1].cpu())
        return F.normalize(torch.stack([kept[path].float() for path in paths]), dim=-1).numpy()

    def token_store(self, cache_dir: str, store: PixelStore) -> TokenStore:
        """Where the patch features and the pooled output of this model's vision encoder are kept."""
        dtype = next(self.vision.parameters()).dtype
        source, _, made_in = self.settings.vision_kept_as.partition(" ")
        source = source if made_in == str(dtype) else self.settings.vision_fingerprint
        recipe = f"{source} {self.settings.vision_layer} {store.recipe} {dtype}"
        return TokenStore(cache_dir, recipe, store.settings.bands)

    @torch.no_grad()
    def prepare_tokens(self, tokens: TokenStore, store: PixelStore, paths: list[str], batch_size: int = 32) -> None:
        """Encode every image that `tokens` does not hold yet."""

        def encode(chunk):
            batch = pixel_batch([store[path] for path in chunk], self.processor, self.device)
            grid = torch.tensor((1, 1, 1))
            return [
                {"tokens": row, "pooled": pooled, "grid": grid}
                for row, pooled in zip(*self._see(batch["pixel_values"]))
            ]

        tokens.prepare(paths, encode, batch_size)

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Word embeddings (B, L, D) of ids (B, L), with the projected patch features where ids are -1."""
        images = self.projector(features).flatten(0, 1)
        words = self.language.get_input_embeddings()(input_ids.clamp(min=0))
        return words.masked_scatter((input_ids < 0)[..., None], images.to(words.dtype))

    # -- training

    def forward(
        self, labels, input_ids, label_rows=None, image_tokens=None, pixel_values=None, attention_mask=None, **batch
    ) -> torch.Tensor:
        """Sum of the cross entropies (nats) of all targets: of a packed row (`data.pack`), where only the positions that
        predict a target meet the vocabulary, or of padded rows (`data.pad_questions`) through transformers' own forward."""
        features = self.encode_images(pixel_values) if image_tokens is None else image_tokens
        embedded = self.embed(input_ids, features.reshape(-1, self.projector.side**2, features.shape[-1]))
        if label_rows is None:
            # What stands before the first target, mostly the image, meets no vocabulary: 262 thousand words of Gemma 3.
            first = int((labels[:, 1:] >= 0).any(0).nonzero()[0])
            last = labels.shape[1] - first
            plain = {"attention_mask": attention_mask, "use_cache": False}
            logits = self.language(inputs_embeds=embedded, logits_to_keep=last, **plain).logits
            logits = logits[:, -last:-1]  # some models ignore what is to be kept
            return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, first + 1 :].flatten(), reduction="sum")
        tree = SceneTree.of(batch)
        hidden = packed_words(self.language.base_model, tree, embedded, batch["position_ids"][0])
        hidden = hidden.index_select(0, label_rows)
        return F.cross_entropy(self.language.get_output_embeddings()(hidden).float(), labels, reduction="sum")

    def mixed(self):
        """Autocast to bfloat16 where frozen weights are of 16 bits and trained ones of 32; else nothing."""
        several = len({p.dtype for p in self.parameters()}) > 1
        return torch.autocast(self.device.type, torch.bfloat16, enabled=several)

    @torch.no_grad()
    def can_pack(self) -> bool:
        """Whether the language model runs a packed row as it runs the rows apart. One whose attention does something of its
        own (a sliding window, a cap on scores, positions that are no rotary ones) does not, and is trained row by row. The
        probe is as long as a row may be, or a window would be wider than it."""
        draw = torch.Generator().manual_seed(0)
        words = self.language.get_input_embeddings()
        first, longest = len(self.prompt.prefix()[0]), self.settings.max_caption_tokens
        ids = torch.randint(0, words.num_embeddings, (first + longest + 6,), generator=draw).numpy()
        scene = {"prefix": (ids[:first], np.tile(np.arange(first), (3, 1))),
                 "branches": [(ids[first:-6], longest), (ids[-6:], 6)]}  # fmt: skip
        batch = {name: value.to(self.device) for name, value in pack([scene]).items()}
        rows = pad_questions([scene], 0)
        training = self.training
        self.eval()
        with self.mixed():
            try:
                tree = SceneTree.of(batch)
                embedded, body = words(batch["input_ids"]), self.language.base_model
                hidden = packed_words(body, tree, embedded, batch["position_ids"][0])
                packed = self.language.get_output_embeddings()(hidden[batch["label_rows"]]).float()
            except torch.OutOfMemoryError:  # a RuntimeError, too, but none that says how the model attends
                raise
            except (TypeError, ValueError, RuntimeError, AttributeError):
                return False
            finally:
                self.train(training)
            whole = self.language(
                inputs_embeds=words(rows["input_ids"].to(self.device)),
                attention_mask=rows["attention_mask"].to(self.device),
            ).logits.float()
        plain = whole[:, :-1][(rows["labels"][:, 1:] >= 0).to(self.device)]
        close = 1e-3 if words.weight.dtype == torch.float32 else 0.05
        return bool((packed - plain).norm() <= close * plain.norm())

    # -- writing captions

    def default_prompt(self) -> str:
        return next(iter(self.settings.prompts.values()))

    @torch.inference_mode()
    def caption(
        self, images, *, prompt: str | None = None, store: PixelStore | None = None, tokens: TokenStore | None = None,
        batch_size: int = 32, max_tokens: int | None = None, num_beams: int = 1, temperature: float = 0.0,
        top_p: float = 1.0, streamer=None, progress: bool = False,
    ) -> list[str]:  # fmt: skip
        """Paths of images -> a caption of each, in order.

        Greedy; a beam search with `num_beams`; drawn where `temperature` is above 0 (Holtzman et al. 2020 for `top_p`). At
        most `max_tokens` tokens. All prompts of a call are equally long, so nothing is padded and a caption does not depend
        on the images beside it. `streamer`: a transformers streamer, for one image. Raises imagery.ImageError.
        """
        store = store or pixel_store(self)
        ids = np.concatenate([self.prompt.prefix()[0], self.prompt.branches([prompt or self.default_prompt()])[0][0]])
        how = {"do_sample": temperature > 0, "num_beams": num_beams}
        how |= {"temperature": float(temperature), "top_p": float(top_p), "top_k": 0} if temperature > 0 else {}
        how |= {"max_new_tokens": max_tokens or self.settings.max_caption_tokens, "eos_token_id": self.ends}
        plain = GenerationConfig(**how, pad_token_id=self.ends[0], suppress_tokens=self.never)
        training, own = self.training, self.language.generation_config
        made = []
        try:
            self.eval()
            self.language.generation_config = plain  # what the base's file says about sampling is not ours
            for start in _batches(len(images), batch_size, "captions", progress):
                chunk = [str(image) for image in images[start : start + batch_size]]
                features = self._features(chunk, store, tokens)
                rows = torch.from_numpy(np.tile(ids, (len(chunk), 1))).to(self.device)
                with self.mixed():
                    said = self.language.generate(
                        inputs_embeds=self.embed(rows, features), generation_config=plain,
                        attention_mask=torch.ones_like(rows), streamer=streamer,
                    )  # fmt: skip
                made += self.tokenizer.batch_decode(said, skip_special_tokens=True)
        finally:
            self.language.generation_config = own
            self.train(training)
        return [" ".join(THINKING.sub(" ", text).split()) for text in made]


def load_vision(folder: str | Path, dtype: torch.dtype = torch.float32, processor_from: str | Path | None = None):
    """(vision encoder, image processor) of a CLIP or SigLIP folder. Raises InputError."""
    folder = Path(folder)
    weight_files(folder)
    config = _config_in(folder)
    kind = config.model_type.removesuffix("_vision_model")
    if kind not in VISION:
        raise InputError(
            f"{folder / 'config.json'}: model_type {config.model_type!r}: expected one of {', '.join(VISION)}"
        )
    part = getattr(config, "vision_config", config)
    tower_class, processor_class, _ = VISION[kind]
    tower = _load_part(tower_class, part, folder, VISION_KEY, [VISION_UNUSED], dtype)
    try:
        processor = processor_class.from_pretrained(processor_from or folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the image processor is missing: {str(error).splitlines()[0]}") from None
    return tower, processor


def load_language(folder: str | Path, dtype: torch.dtype = torch.float32, tokenizer_from: str | Path | None = None):
    """(causal language model with attention over packed scenes, tokenizer) of a folder. Raises InputError."""
    folder = Path(folder)
    weight_files(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from or folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: not a language model that can be read: {str(error).splitlines()[0]}") from None
    _refuse_keys(folder, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer names no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    with contextlib.suppress(ValueError):  # a model with attention of its own: `Captioner.can_pack` says no
        model.set_attn_implementation("scene")
    return model, tokenizer


def pixel_store(model: Encoder | VQA | Captioner, cache_dir: str | None = None) -> PixelStore:
    """Pixels as a model's vision tower takes them, read as in its training."""
    resize = QwenResize if hasattr(model.processor, "merge_size") else SquareResize
    return PixelStore(resize(model.processor), ImageSettings.from_dict(model.settings.images), cache_dir)


def pick_device(device: str, dtype: str):
    """(torch device, torch dtype) for the two flags. Raises InputError for a device this machine lacks."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"--device {device}: not usable here ({str(error).splitlines()[0]})") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, getattr(torch, dtype)


def keep_settings_of(base: Path, folder: Path, dtype: torch.dtype) -> None:
    """Put a base's own config.json and tokenizer_config.json in place of those that transformers 5 has written of it: version
    4, and what is built on it, would take a wrong rope_theta from them, or fail."""
    for name in ("config.json", "tokenizer_config.json"):
        if (base / name).is_file():
            record, made = (json.loads((place / name).read_text(encoding="utf-8")) for place in (base, folder))
            if record.get("model_type") != made.get("model_type"):
                continue  # of the base a part was taken, which has settings of its own
            record |= {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in record}
            (folder / name).write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def base_folder(name: str) -> Path:
    """A base's folder, as given or beside this file. `weight_files` says what to do when it is not there."""
    root = Path(name)
    return root if root.is_absolute() or root.exists() else Path(__file__).parent / root


def load_qwen(
    folder: str | Path, dtype: torch.dtype, quantize: str = "none", device: str = "cpu", whole_vision: bool = False
) -> nn.Module:
    """A whole Qwen2-VL or Qwen2.5-VL, with attention over packed scenes. whole_vision: the vision encoder is not quantised,
    because some of it is trained whole. Raises InputError naming every tensor that is missing, unexpected or of another
    shape."""
    from transformers import AutoModelForImageTextToText

    read_config(folder)
    weight_files(folder)
    options = {}
    if quantize != "none":
        if not str(device).startswith("cuda"):
            raise InputError(
                f"--quantize {quantize} (cli_demo.py: --quant): needs CUDA and bitsandbytes; leave it out on a CPU"
                " (--quantize none, where an adapter was trained with it)"
            )
        from transformers import BitsAndBytesConfig

        bits = {"load_in_8bit": True} if quantize == "8" else {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_use_double_quant": True,
        }  # fmt: skip
        bits |= {"llm_int8_skip_modules": ["lm_head", "model.visual"]} if whole_vision else {}
        try:
            options = {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": device}}
        except ImportError as error:
            raise InputError(f"--quantize {quantize}: {error}; `pip install bitsandbytes`") from None
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be read ({str(error).splitlines()[0]}); load the base again") from None
    _refuse_keys(folder, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    model.model.language_model.set_attn_implementation("scene")
    return model.requires_grad_(False)


def adapted_modules(tensors: Iterable[str]) -> list[str]:
    """The modules that have LoRA, read off the names of an adapter's tensors: a pattern written for 4.x names would find
    others, or none."""
    return sorted({m[1] for key in tensors if (m := re.match(r"base_model\.model\.(.+)\.lora_A\.weight$", key))})


def named_by(targets: str | list[str] | None, modules: Iterable[str]) -> set[str]:
    """Which modules the `target_modules` of peft's record are. Of ours a pattern; where training went on the modules
    themselves, of many only as much of their ends as tells them apart."""
    if not targets:
        return set()
    pattern = targets if isinstance(targets, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})"
    return {name for name in modules if re.fullmatch(pattern, name)}


def read_adapter(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by today's names, adapter_config.json) of a peft LoRA folder. Raises InputError."""
    folder = Path(folder)
    try:
        record = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / ADAPTER, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        hint = "; did you mean its best_model/?" if (folder / "best_model").is_dir() else ""
        missing = Path(error.filename).name if error.filename else ADAPTER
        raise InputError(f"{folder}: not an adapter ({missing} is missing){hint}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{folder}: the adapter cannot be read ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{folder / ADAPTER_CONFIG}: expected an object, found {type(record).__name__}")
    if record.get("peft_type") != "LORA":
        raise InputError(f"{folder / ADAPTER_CONFIG}: peft_type {record.get('peft_type')!r}: expected 'LORA'")
    for old, new in OLD_ADAPTER_KEYS.items():
        tensors = {re.sub(old, new, key): value for key, value in tensors.items()}
    for name in ("rank_pattern", "alpha_pattern"):  # they name modules, too
        record[name] = {
            re.sub(r"^(\^?)model\.(layers|embed_tokens|norm)\b", r"\1model.language_model.\2", key): value
            for key, value in (record.get(name) or {}).items()
        }
    return tensors, record
