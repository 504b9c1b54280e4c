"""The models: `DualEncoder` (match, search). VQA and captioner join it here.

A checkpoint holds the tensors that were trained and nothing else; it names its base and the base's
fingerprint, and brings tokenizer, image processor and every setting that use must share with training.
Loading is strict: a missing, unexpected or misshapen tensor is an error, never a warning.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel

from config import InputError
from data import PixelStore, QwenResize, image_settings, pixel_batch, token_batch
from imagery import ImageSettings

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


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, shards in order. Raises InputError if one is not there."""
    folder = Path(folder)
    command = f"run `python load.py {folder}`" if not str(folder).startswith("models/demo") else "run `make demo`"
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no model here (config.json is missing); {command}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
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
    digest = hashlib.blake2b(digest_size=8)
    paths = weight_files(folder)
    digest.update((Path(folder) / "config.json").read_bytes())
    for path in paths:
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


def load_tower(folder: str | Path, side: str, config, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One tower (`side`: "image" or "text") of a Qwen-VL folder, reading only that tower's tensors.

    Raises InputError naming every missing or unexpected key.
    """
    tensors, strangers = {}, []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                    match = KEYS[side].match(key)
                    if match:
                        tensors[match[1]] = file.get_tensor(key)
                    elif not any(pattern.match(key) for pattern in KEYS.values()):
                        strangers.append(key)
        except SafetensorError as error:
            raise InputError(f"{path}: cannot be read ({error}); load the base again") from None
    part = config.vision_config if side == "image" else config.text_config
    tower, info = TOWERS[config.model_type][side == "text"].from_pretrained(
        None, config=part, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )  # what does not fit is refused below, all of it at once
    _refuse_keys(folder, info["missing_keys"], [*info["unexpected_keys"], *strangers], info["mismatched_keys"])
    return tower


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
        raise InputError(
            f"{folder}: no model here (config.json is missing); run `python load.py`, or `make demo` first"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{path}: not a model configuration: {str(error).splitlines()[0]}") from None
    if config.model_type not in TOWERS:
        raise InputError(f"{path}: model_type {config.model_type!r}: expected one of {', '.join(TOWERS)}")
    return config


# ----------------------------------------------------------------------------------------------------
# Dual encoder


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


class DualEncoder(nn.Module):
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
            base_model=config.base_model,
            base_fingerprint=fingerprint(config.base_model),
            logit_scale=float(np.log(10.0 if config.loss == "sigmoid" else 1 / config.temperature)),
            logit_bias=-10.0 if config.loss == "sigmoid" else 0.0,
            images=image_settings(config).to_dict(),
            **{name: getattr(config, name) for name in COPIED_SETTINGS},
        )
        towers = [
            load_tower(config.base_model, side, base, torch.float32 if mode == "full" else dtype)
            for side, mode in (("image", config.image_tower), ("text", config.text_tower))
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the heads and LoRA start the same whatever was drawn before
            return cls(settings, *towers, tokenizer, processor, base)

    def save_pretrained(self, folder: str | Path, state_dict: dict | None = None) -> None:
        """Write the trained tensors and all that use must share with training into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = self.trained_names()
        source = self.state_dict() if state_dict is None else state_dict
        save_file(
            {name: source[name].detach().contiguous().cpu() for name in names}, folder / WEIGHTS, {"format": "pt"}
        )
        (folder / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=2, ensure_ascii=False) + "\n")
        self.base_config.save_pretrained(folder / "base_config")
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        base_model: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "DualEncoder":
        """Load a checkpoint folder; a tower that was trained in full comes from it alone, others from the base.

        Raises InputError: not such a folder, base missing or changed since training, tensors that do not fit.
        """
        folder = Path(folder)
        try:
            settings = DualEncoderSettings(**json.loads((folder / SETTINGS).read_text()))
        except FileNotFoundError:
            hint = "; did you mean its best_model/?" if (folder / "best_model").is_dir() else ""
            raise InputError(f"{folder}: not a matcher's checkpoint ({SETTINGS} is missing){hint}") from None
        except (TypeError, ValueError) as error:
            raise InputError(f"{folder / SETTINGS}: not readable: {error}") from None
        base = read_config(folder / "base_config")
        towers = []
        for side, mode in (("image", settings.image_tower), ("text", settings.text_tower)):
            if mode == "full":
                part = base.vision_config if side == "image" else base.text_config
                towers.append(TOWERS[base.model_type][side == "text"]._from_config(part, dtype=dtype))
                continue
            root = Path(base_model or settings.base_model)
            if not root.is_absolute() and not root.exists():
                root = Path(__file__).parent / root
            found = fingerprint(root)
            if found != settings.base_fingerprint:
                raise InputError(
                    f"{root}: this base (fingerprint {found}) is not the one {folder} was trained on"
                    f" ({settings.base_fingerprint}); give the right one with --base_model"
                )
            towers.append(load_tower(root, side, base, dtype))
        processor, tokenizer = load_processor(folder)
        model = cls(settings, *towers, tokenizer, processor, base)
        model.load_trained(folder)
        return model.to(device=device, dtype=dtype).eval()

    def trained_names(self) -> list[str]:
        """Names of the tensors a checkpoint holds: those of towers in training, the heads, scale and bias."""
        heads = ("image_projection.", "text_projection.", "logit_")
        return [name for name, p in self.named_parameters() if p.requires_grad or name.startswith(heads)]

    def load_trained(self, folder: str | Path) -> None:
        """Copy a checkpoint's tensors into this model. Raises InputError unless they are exactly the expected ones."""
        path = Path(folder) / WEIGHTS
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        expected, own = set(self.trained_names()), self.state_dict()
        shapes = [name for name in expected & set(tensors) if tensors[name].shape != own[name].shape]
        _refuse_keys(path, expected - set(tensors), set(tensors) - expected, shapes)
        self.load_state_dict(tensors, strict=False)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **_) -> None:
        """Recompute activations in the backward pass, in towers that are trained (called by the Trainer)."""
        for side in ("image", "text"):
            if getattr(self.settings, f"{side}_tower") != "frozen":
                tower = getattr(self, f"{side}_tower")
                tower.gradient_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **_) -> None:
        """The name newer transformers call."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

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
            scale = (values[:rank].clamp(min=0) + 0.01 * values[0]).rsqrt()
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

    def encode_image(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches (P, C) and grids (B, 3) -> unit embeddings (B, projection_dim)."""
        return self.project_image(self.pool_image(pixel_values, image_grid_thw))

    def encode_text(self, input_ids: torch.Tensor, text_lengths: torch.Tensor) -> torch.Tensor:
        """Token ids (T, L) and lengths (T,) -> unit embeddings (T, projection_dim)."""
        return self.project_text(self.pool_text(input_ids, text_lengths))

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
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        cut = sum(len(row) > limit for row in rows)
        return [np.array([*row[:limit], self.tokenizer.eos_token_id]) for row in rows], cut

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @torch.inference_mode()
    def embed_images(
        self, images, *, batch_size: int = 32, store=None, progress: bool = False, pool_only: bool = False
    ) -> torch.Tensor:
        """Paths or resized (H, W, 3) uint8 arrays -> unit embeddings (N, projection_dim) float32 on the CPU.

        Files are read a batch at a time, from `store` (a `data.PixelStore`) where one is given. Raises
        imagery.ImageError for a file that cannot be read.
        `pool_only` stops before the projection (features of a frozen tower).
        """
        store = store or PixelStore(QwenResize(self.processor), ImageSettings.from_dict(self.settings.images))
        made = []
        for start in _batches(len(images), batch_size, "images", progress):
            chunk = [images[i] for i in range(start, min(start + batch_size, len(images)))]
            pixels = [store[str(image)] if isinstance(image, (str, Path)) else image for image in chunk]
            batch = {key: value.to(self.device) for key, value in pixel_batch(pixels, self.processor).items()}
            features = self.pool_image(**batch)
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
        if not made:
            return torch.zeros(0, self.settings.projection_dim)
        sorted_rows = torch.cat(made)
        result = torch.empty_like(sorted_rows)
        result[torch.tensor(order)] = sorted_rows
        return result


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


COPIED_SETTINGS = (
    "image_tower",
    "text_tower",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "projection_dim",
    "projection_hidden",
    "projection_dropout",
    "max_text_tokens",
    "loss",
)


def add_lora(tower: nn.Module, targets: str, settings) -> None:
    """Inject trainable fp32 LoRA layers (Hu et al. 2021) into the modules that match `targets`, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, target_modules=targets
    )
    inject_adapter_in_model(config, tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()  # updates of 1e-5 vanish in bf16


def load_processor(folder: str | Path, min_pixels: int | None = None, max_pixels: int | None = None):
    """(image processor, tokenizer) of a Qwen-VL folder, with the pixel limits given.

    The Pillow processor is used whether or not torchvision is there, so that pixels are the same on every machine.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: tokenizer or image processor is missing: {str(error).splitlines()[0]}") from None
    if min_pixels is not None:
        processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise InputError(f"{folder}: the tokenizer names no end-of-text or no padding token")
    return processor, tokenizer


def _batches(total: int, size: int, desc: str, progress: bool):
    from tqdm import tqdm

    return tqdm(range(0, total, size), desc=desc, unit="batch", disable=not progress, leave=False)
