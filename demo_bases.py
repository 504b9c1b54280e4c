"""The demo bases: small models of the real classes, in the official file layout, trained for a few minutes.

`python load.py --preset demo` builds Qwen2.5-VL, Qwen3 and CLIP with file and tensor names as the hubs publish them, so
that every path of preset `full` runs on them. The language side is trained on the texts of the training scenes, the
vision tower on what lies where in them, then the language side on reading the tower; held-out scenes are not seen.
"""

import functools
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import InputError
from imagery import ImageSettings, read_image

DEMO = ["qwen2_5_vl", "clip", "qwen3"]
TAGS = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end
vision_start vision_end vision_pad image_pad video_pad"""  # special: dropped by skip_special_tokens
PLAIN = "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
THINK = "<tool_response> </tool_response> <think> </think>"
SPECIAL = {"qwen2_vl": [f"<|{tag}|>" for tag in TAGS.split()]}  # numbered in this order after the byte-pair vocabulary
SPECIAL["qwen2_5_vl"] = SPECIAL["qwen2_vl"] + PLAIN.split()
SPECIAL["qwen3"] = SPECIAL["qwen2_5_vl"] + THINK.split()
SYSTEM = "You are a helpful assistant."
QWEN_SPLIT = (  # the official pre-tokenizer: words, single digits, punctuation, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
QWEN_VL_CHAT = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_CHAT = (  # prints what the official one prints where there are no tools: answers after the last question think
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thought = m.reasoning_content or '' %}{%- if not thought and '</think>' in m.content %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}{{- text }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)
PIXELS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
DEMO_SIZES = {  # changing anything here rebuilds the demo bases: it is part of their fingerprint
    "version": 4,
    "vocab": {"qwen": 2000, "clip": 1500},
    "text": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "heads": 4, "kv_heads": 2},
    "vision": {"depth": 3, "hidden_size": 128, "num_heads": 4, "intermediate_size": 384, "fullatt": [0, 2]},
    "train": {"steps": 80, "batch": 16, "length": 64, "lr": 3e-3},
    "qwen3_steps": 30,  # its training proper comes with the captioner
    "grounding": {"steps": 450, "scenes": 6, "short": 20, "chat": 10, "lr": 2e-3, "muon_lr": 0.02},
    "vision_train": {"steps": 600, "batch": 32, "side": 112, "lr": 1e-3, "muon_lr": 0.02},
}


def _write_json(path: Path, value, indent=2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_bpe(vocab=None, merges=None, suffix: str = "", split: str = QWEN_SPLIT):
    """A byte-level `tokenizers.Tokenizer`: Qwen's by default; CLIP's has the suffix `</w>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    trained = {"vocab": vocab, "merges": merges} if vocab else {}
    tokenizer = Tokenizer(models.BPE(**trained, **({"end_of_word_suffix": suffix} if suffix else {})))
    tokenizer.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts, vocab_size: int, suffix: str = "", split: str = QWEN_SPLIT) -> tuple[dict, list]:
    """Byte-level BPE -> (vocab, merges) in the official order: 256 bytes, [256 bytes + suffix,] then merges.
    Few texts give fewer tokens than `vocab_size`: a pair is merged only if it occurs twice."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer, alphabet = byte_bpe(suffix=suffix, split=split), sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"vocab_size": vocab_size, "min_frequency": 2, "initial_alphabet": alphabet, "show_progress": False}
    settings |= {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [byte + suffix for byte in alphabet if suffix] + [a + b for a, b in merges]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def _write_vocab(folder: Path, tokenizer, vocab: dict, merges: list, head: str = "") -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocab, indent=None)
    (folder / "merges.txt").write_text(head + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")


def write_qwen_tokenizer(folder: Path, vocab: dict, merges: list, family: str):
    """Write the official tokenizer files of a Qwen family and return the tokenizer as transformers loads it."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    added = [AddedToken(t, normalized=False, special=t in SPECIAL["qwen2_vl"]) for t in SPECIAL[family]]
    tokenizer = byte_bpe(vocab, merges)
    tokenizer.add_tokens(added)
    _write_vocab(folder, tokenizer, vocab, merges)
    chat = {"chat_template": QWEN3_CHAT if family == "qwen3" else QWEN_VL_CHAT}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    # fmt: off
    config = {
        "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {
            str(len(vocab) + i): {"content": t.content, **flags, "special": t.special} for i, t in enumerate(added)
        },
        "additional_special_tokens": SPECIAL["qwen2_vl"][1:], "bos_token": None, **chat,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 32768, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }
    # fmt: on
    _write_json(folder / "tokenizer_config.json", config)
    if family != "qwen3":
        _write_json(folder / "chat_template.json", chat)
    return Qwen2Tokenizer.from_pretrained(folder)


def write_weights(model, folder: Path, shards: int = 1) -> None:
    """Save `model` under the key names its hub uses, in exactly `shards` files (+ index when more than one);
    config.json is already in `folder`.

    `save_pretrained` already turns the names back into the published 4.x ones (`visual.blocks...`,
    `model.layers...`, no tied `lm_head`), but writes its own config and cuts shards where it likes."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(dir=folder) as temp:
        model.save_pretrained(temp, max_shard_size="100GB")
        state = load_file(Path(temp) / "model.safetensors")
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in state.items()}
    total, done, parts = sum(sizes.values()), 0, [{} for _ in range(shards)]
    for key, tensor in state.items():
        parts[min(done * shards // total, shards - 1)][key] = tensor
        done += sizes[key]
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    for name, part in zip(names, parts):
        save_file(part, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # safetensors writes files no one else can read
    if shards > 1:
        where = {key: name for name, part in zip(names, parts) for key in part}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def qwen_config(tokenizer, family: str, text: dict, vision: dict | None = None) -> dict:
    """A flat 4.x config.json of Qwen2.5-VL, Qwen2-VL or Qwen3: text settings at the top, `vision_config` below."""
    width, heads = text["hidden_size"], text["heads"]
    # fmt: off
    config = {
        "model_type": family, "attention_dropout": 0.0,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "hidden_act": "silu", "hidden_size": width, "initializer_range": 0.02,
        "intermediate_size": text["intermediate_size"], "max_position_embeddings": 32768,
        "max_window_layers": text["num_hidden_layers"], "num_attention_heads": heads,
        "num_hidden_layers": text["num_hidden_layers"], "num_key_value_heads": text["kv_heads"],
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,  # padded, as the official one is
    }
    if family == "qwen3":
        return config | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": width // heads,
                         "rope_scaling": None, "sliding_window": None}
    tower = {"depth": vision["depth"], "num_heads": vision["num_heads"], "in_chans": 3, "patch_size": 14,
             "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    if family == "qwen2_5_vl":
        tower |= {"hidden_act": "silu", "hidden_size": vision["hidden_size"], "out_hidden_size": width,
                  "intermediate_size": vision["intermediate_size"], "window_size": 112, "tokens_per_second": 2,
                  "fullatt_block_indexes": vision["fullatt"]}
    else:  # Qwen2-VL calls the tower's width embed_dim, and the text's width hidden_size
        tower |= {"embed_dim": vision["hidden_size"], "hidden_size": width,
                  "mlp_ratio": vision["intermediate_size"] // vision["hidden_size"]}
    # fmt: on
    tags = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "vision": "<|vision_pad|>"}
    tags |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    pairs = width // heads // 2  # rotary pairs are shared out over time, height and width, 2 : 3 : 3
    side = 3 * pairs // 8
    return {
        "architectures": [f"Qwen2{'_5_' if family == 'qwen2_5_vl' else ''}VLForConditionalGeneration"],
        **config,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tags.items()},
        "rope_scaling": {"type": "mrope", "mrope_section": [pairs - 2 * side, side, side]},
        "vision_config": tower,
    }


def write_qwen_settings(folder: Path, config: dict, max_pixels: int = 168 * 168) -> None:
    """config.json, generation_config.json and, for a model that sees, preprocessor_config.json."""
    _write_json(folder / "config.json", config)
    end, pad = config["eos_token_id"], config["bos_token_id"]
    sampling = {"repetition_penalty": 1.05, "temperature": 1e-06}
    if config["model_type"] == "qwen3":
        sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    ends = {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad], "do_sample": True}
    _write_json(folder / "generation_config.json", {**ends, **sampling, "transformers_version": "4.51.0"})
    if "vision_config" in config:
        sizes = {"min_pixels": 56 * 56, "max_pixels": max_pixels, "patch_size": 14, "temporal_patch_size": 2}
        kind = "Qwen2_5_VLProcessor" if config["model_type"] == "qwen2_5_vl" else "Qwen2VLProcessor"
        sizes |= {"merge_size": 2, **PIXELS, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": kind}
        _write_json(folder / "preprocessor_config.json", sizes)


def demo_texts(data_dir: Path) -> dict[str, list]:
    """`{"en": captions, "zh": captions, "qa": [[question, answer]]}` of the demo data.

    Raises InputError if a file is missing or not of the demo data's form."""
    files = ["captions_en.json", "captions_zh.json", "rsvqa_questions.json", "rsvqa_answers.json"]
    for name in files:
        if not (data_dir / name).is_file():
            raise InputError(f"{data_dir / name} is missing: run `python demo_data.py` first")
    try:
        en, zh, questions, answers = (json.loads((data_dir / name).read_text(encoding="utf-8")) for name in files)
        answer_of = {row["question_id"]: str(row["answer"]) for row in answers["answers"] if row.get("active", True)}
        seen = [r for r in questions["questions"] if r["id"] in answer_of and r.get("split", "train") == "train"]
        texts = {"qa": [[r["question"], answer_of[r["id"]]] for r in seen]}
        for language, rows in (("en", en), ("zh", zh)):  # held-out scenes' texts stay unseen by the bases too
            texts[language] = [row["caption"] for row in rows if row.get("split", "train") == "train"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{data_dir} is not demo data ({error!r}): run `python demo_data.py` again") from None
    if not all(texts.values()):
        raise InputError(f"{data_dir} holds no captions or no questions: run `python demo_data.py` again")
    return texts


def _documents(texts: dict, think: str, seed: int) -> list[str]:
    """Training text: captions alone; captions and answers as the chat in which the model is asked later."""

    def chat(turns):
        user, end = "<|im_start|>user\n", "<|im_end|>\n"
        body = "".join(f"{user}{q}{end}<|im_start|>assistant\n{think}{a}{end}" for q, a in turns)
        return f"<|im_start|>system\n{SYSTEM}{end}{body}"

    shuffle = random.Random(seed)
    qa = texts["qa"][:]
    shuffle.shuffle(qa)
    documents = [chat(qa[i : i + 4]) for i in range(0, len(qa), 4)]
    documents += [f"{caption}<|endoftext|>" for caption in texts["en"] + texts["zh"]]
    documents += [chat([["Describe the image.", caption]]) for caption in texts["en"][::2]]
    documents += [chat([["描述这幅图像。", caption]]) for caption in texts["zh"][::2]]
    shuffle.shuffle(documents)
    return documents


def train_language(model, body, tokenizer, documents, seed, *, steps, batch, length, lr) -> tuple[float, float]:
    """Plain causal language modelling on packed text -> loss on rows left out (nats per token) before and after."""
    import torch

    ids = [token for ids in tokenizer(documents)["input_ids"] for token in ids]
    rows = torch.tensor(ids[: max(1, len(ids) // length) * length])
    rows = rows.view(-1, min(length, len(rows)))  # (N, T)
    left_out = rows[: max(1, min(32, len(rows) // 10))]
    rows = rows[len(left_out) :] if len(rows) > len(left_out) else rows
    generator = torch.Generator().manual_seed(seed)
    parameters = [*body.parameters()]  # the tied embedding is among them
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)

    def loss_of(x):
        logits = model.lm_head(body(input_ids=x, use_cache=False).last_hidden_state[:, :-1])  # (B, T-1, V)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())

    model.train()
    with torch.no_grad():
        before = loss_of(left_out).item()
    for step in range(steps):
        rate = min(1, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * step / steps))  # warm up, then cosine
        optimizer.param_groups[0]["lr"] = lr * rate
        loss = loss_of(rows[torch.randint(len(rows), (batch,), generator=generator)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return before, loss_of(left_out).item()


def _init_vision(visual, seed: int) -> None:
    """Random weights that tell images apart: with the usual std of 0.02 a tower this narrow maps every image to nearly
    one vector; 1/sqrt(fan-in) keeps the signal."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in visual.named_parameters():
            if weight.dim() > 1:
                scale = weight[0].numel() ** -0.5 * (0.5 if "attn.proj" in name or "down_proj" in name else 1)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def _scale_vision(model, processor, seed: int) -> None:
    """Centre and scale the tower's last layer, so that image tokens vary around zero as strongly as the trained word
    embeddings do: the language model reads both."""
    import numpy as np
    import torch
    from PIL import Image

    draw = np.random.default_rng(seed)
    colours = [draw.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(16)]
    images = [Image.fromarray(c).resize((168, 168), Image.Resampling(2 * (i % 2))) for i, c in enumerate(colours)]
    inputs = processor(images, return_tensors="pt")
    visual = model.model.visual
    with torch.no_grad():
        tokens = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output  # (tokens, D)
        last = visual.merger.mlp[2]
        scale = model.model.language_model.embed_tokens.weight.std() / (tokens - tokens.mean(0)).std()
        last.bias.sub_(tokens.mean(0)).mul_(scale)
        last.weight.mul_(scale)


class _Muon:
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), for matrices. Here it reached in 100
    steps what AdamW did in 250. `torch.optim.Muon` iterates in bfloat16, six times slower on a CPU."""

    def __init__(self, matrices, lr: float):
        self.pairs = [(matrix, matrix.new_zeros(matrix.shape)) for matrix in matrices]
        self.lr = lr

    def step(self, share: float) -> None:
        """One update at `share` of the learning rate."""
        for matrix, momentum in self.pairs:
            momentum.lerp_(matrix.grad, 0.05)
            update = matrix.grad.lerp(momentum, 0.95)
            wide = update.shape[0] <= update.shape[1]
            x = (update if wide else update.T) / (update.norm() + 1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
            rate = self.lr * share
            scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
            matrix.mul_(1 - 0.01 * rate).sub_(x if wide else x.T, alpha=rate * scale)


@functools.cache
def _small_picture(path: Path, side: int):
    """(side, side, 3) uint8; both stages of the training read it."""
    import numpy as np
    from PIL import Image

    rgb = read_image(path, ImageSettings(stretch="percentile")).rgb
    return np.asarray(Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC))


def _pictures(rows: list[dict], data_dir: Path, side: int) -> list:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the GIL
        return list(pool.map(lambda row: _small_picture(data_dir / "images" / row["image"], side), rows))


def train_vision(visual, processor, data_dir: Path, seed: int, *, steps, batch, side, lr, muon_lr) -> dict:
    """Teach the demo vision tower to see, as the real one has been: each merged token says the land cover, which
    objects, lines and clouds lie in its 28 x 28 pixels, and how many, by the truth of the training scenes, with turns,
    flips and changes of light. Returns what it tells of the validation scenes: their cover, the cells each kind lies
    in, and the number of each kind of object where there are any. A tower with random weights takes hours to learn
    from captions alone what this gives in minutes."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw
    from torch.nn import functional as F

    rows = [json.loads(line) for line in (data_dir / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] in ("train", "val")]
    covers = sorted({row["cover"] for row in rows})
    kinds = [*sorted({k for row in rows for k in row["counts"]}), "cloud"]
    cells = side // 28

    def labels(row):
        """(cells, cells, 2, kinds): whether something of a kind lies in a cell, and how many have their centre there."""
        grid, scale = np.zeros((cells, cells, 2, len(kinds)), np.float32), (side / row["width"], side / row["height"])
        for kind, o in [(o["kind"], o) for o in row["objects"]] + [("cloud", o) for o in row["clouds"]]:
            column, line_ = (min(int(o[axis] * share / 28), cells - 1) for axis, share in zip("xy", scale))
            grid[line_, column, :, kinds.index(kind)] += 1
        for line in row["lines"]:  # in a cell where it covers an eighth of it
            sheet = Image.new("L", (side, side))
            points = [(x * scale[0], y * scale[1]) for x, y in line["points"]]
            ImageDraw.Draw(sheet).line(points, fill=8, width=max(1, round(line["width"] * scale[0])))
            share = np.asarray(sheet, np.float32).reshape(cells, 28, cells, 28).mean((1, 3))
            grid[:, :, 0, kinds.index(line["kind"])] += share > 1
        grid[:, :, 0] = grid[:, :, 0] > 0
        return grid

    pictures = _pictures(rows, data_dir, side)
    grids, cover = [labels(row) for row in rows], [covers.index(row["cover"]) for row in rows]
    train = [i for i, row in enumerate(rows) if row["split"] == "train"]
    held = [i for i, row in enumerate(rows) if row["split"] == "val"]
    draw, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def encode(images):
        """-> cover logits (B, covers), presence logits and log numbers (B, cells, kinds)."""
        inputs = processor(images, do_resize=False, return_tensors="pt")
        tokens = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        said = head(F.layer_norm(tokens, tokens.shape[-1:])).view(len(images), cells * cells, -1)
        whole, there, number = said.split([len(covers), len(kinds), len(kinds)], -1)
        return whole.mean(1), there, number

    # The first patches' filters start as the principal components of patches, each at equal strength: brightness, nearly
    # all of a patch's energy, would else drown texture.
    some = processor([pictures[i] for i in train[:200]], do_resize=False, return_tensors="pt")["pixel_values"]
    flat = some.view(len(some), 3, 2, -1)[:, :, 0].flatten(1).double()  # both frames of an image are the same
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    width = visual.config.hidden_size
    filters = vectors.flip(1)[:, :width] * (values.flip(0)[:width] + 0.01 * values[-width:].mean()).rsqrt()
    patch = visual.patch_embed.proj.weight
    with torch.no_grad():
        patch.copy_((filters.T.view(width, 3, 1, *patch.shape[3:]) / 2).expand_as(patch))

    head = torch.nn.Linear(visual.config.out_hidden_size, len(covers) + 2 * len(kinds))
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
        head.bias.zero_()[len(covers) :] = -2.5  # most cells hold nothing: what is rare need not be learnt first
    matrices = [p for p in visual.parameters() if p.dim() == 2]
    others = [p for p in visual.parameters() if p.dim() != 2] + [*head.parameters()]
    muon, adam = _Muon(matrices, muon_lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    order: list[int] = []
    for step in range(steps):
        if len(order) < batch:
            order = draw.permutation(train).tolist()
        chosen, order = order[:batch], order[batch:]
        images, targets = [], []
        for i in chosen:
            turns, flip = int(draw.integers(4)), bool(draw.integers(2))
            image, grid = np.rot90(pictures[i], turns), np.rot90(grids[i], turns)
            image, grid = (image[:, ::-1], grid[:, ::-1]) if flip else (image, grid)
            light = (image.astype(np.float32) - 128) * draw.uniform(0.7, 1.3) + 128 + draw.normal(0, 12, (1, 1, 3))
            images.append(np.clip(light, 0, 255).astype(np.uint8))
            targets.append(grid.reshape(-1, 2, len(kinds)))
        (whole, there, number), truth = encode(images), torch.from_numpy(np.stack(targets))
        found = F.binary_cross_entropy_with_logits(there, truth[:, :, 0], reduction="none")
        found = found + 0.3 * F.poisson_nll_loss(number, truth[:, :, 1], reduction="none")
        loss = F.cross_entropy(whole, torch.tensor([cover[i] for i in chosen])) + found.sum(-1).mean()
        visual.zero_grad(), head.zero_grad()
        loss.backward()
        share = min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        adam.param_groups[0]["lr"] = lr * share
        adam.step()
        with torch.no_grad():
            muon.step(share)
    with torch.no_grad():
        whole, there, number = encode([pictures[i] for i in held])
        right = whole.argmax(1) == torch.tensor([cover[i] for i in held])
        truth = torch.from_numpy(np.stack([grids[i] for i in held])).flatten(1, 2)  # (N, cells, 2, kinds)
        count, said = truth[:, :, 1].sum(1), there > 0
        counted = (number.exp().sum(1).round() == count)[count > 0]
        truth = truth[:, :, 0]
        f1 = 2 * (truth * said).sum((0, 1)) / (truth.sum((0, 1)) + said.sum((0, 1))).clamp(min=1)
    return {
        "cover_accuracy": round(right.float().mean().item(), 3),
        "count_accuracy": round(counted.float().mean().item(), 3),
        "object_f1": dict(zip(kinds, [round(x, 2) for x in f1.tolist()])),
    }


NOUNS = {"tank": "storage tank", "field": "sports field"}  # other kinds are called what they are


def _facts(row: dict) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What the truth of a scene says, as (words, what follows them): short phrases, and as questions of a chat. Words and
    answers are other ones than those of the demo's RSVQA questions: the base knows the scenes, not the task."""
    draw, counts, objects = random.Random(row["img_id"]), row["counts"], {o["kind"] for o in row["objects"]}
    lines = {"road", "river", "railway", "runway"}
    noun = {kind: NOUNS.get(kind, kind) for kind in counts}
    one = {kind: f"{'an' if kind == 'aircraft' else 'a'} {noun[kind]}" for kind in counts}
    many = {kind: noun[kind] if kind == "aircraft" else f"{noun[kind]}s" for kind in counts}
    short, chat = [], []

    def there(what, true):
        short.append((f" {what}", "present" if true else "absent"))
        chat.append((f"Can you see {what}?", "present" if true else "absent"))

    for kind, count in counts.items():
        there(one[kind], count > 0)
        if kind in lines:
            continue
        short.append((f" number of {many[kind]}", str(count)))
        chat.append((f"Count the {many[kind]}.", str(count)))
        places = [(o["x"] / row["width"], o["y"] / row["height"]) for o in row["objects"] if o["kind"] == kind]
        for side, axis, far in (("north", 1, 0), ("south", 1, 1), ("west", 0, 0), ("east", 0, 1)) if count else ():
            nearest = min(abs(far - place[axis]) for place in places)
            if nearest < 0.42 or nearest > 0.55:  # nothing that lies on the border
                there(f"{one[kind]} in the {side}", nearest < 0.5)
    there("clouds", bool(row["clouds"]))
    short += [(" area", row["rural_urban"]), (" cover", row["cover"])]
    chat.append(("Which kind of area, rural or urban?", row["rural_urban"]))
    countable = [kind for kind in counts if kind not in lines]
    for form in range(6):
        a = draw.choice(sorted(objects) or countable)
        a, b = draw.sample([a, draw.choice([kind for kind in countable if kind != a])], 2)
        if form < 2:
            more = "equal" if counts[a] == counts[b] else many[a] if counts[a] > counts[b] else many[b]
            chat.append((f"Which are more, {many[a]} or {many[b]}?", more))
        elif form < 5:
            chat.append((f"Do the {many[a]} outnumber the {many[b]}?", "true" if counts[a] > counts[b] else "false"))
        else:
            chat.append((f"As many {many[a]} as {many[b]}?", "true" if counts[a] == counts[b] else "false"))
    return short, chat


def train_grounding(model, tokenizer, processor, data_dir: Path, seed: int, *, steps, scenes, short, chat, lr, muon_lr):
    """Teach the demo language model to read the vision tower's tokens, as the real one has been: facts of the training
    scenes, each scene packed once with `short` phrases and `chat` questions drawn anew. Without it LoRA would first have
    to learn what an image is. Returns the share of right answers to the validation scenes' chat questions.

    Many small steps: at equal work, 6 scenes a step reached 0.93 on presence where 24 reached 0.84."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from data import ChatPrompt, pack, pixel_batch
    from model import TREE_KEYS, SceneTree, packed_states

    rows = [json.loads(line) for line in (data_dir / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] in ("train", "val")]
    train = [i for i, row in enumerate(rows) if row["split"] == "train"]
    held = [i for i, row in enumerate(rows) if row["split"] == "val"]
    side = DEMO_SIZES["vision_train"]["side"]
    pictures = _pictures(rows, data_dir, side)
    tokens = []
    with torch.no_grad():
        for start in range(0, len(rows), 50):
            inputs = pixel_batch(pictures[start : start + 50], processor)
            made = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            tokens += made.chunk(len(inputs["image_grid_thw"]))
    prompt = ChatPrompt(tokenizer, "{question}", model.config.image_token_id, processor.merge_size)
    prefix = prompt.prefix((1, side // 14, side // 14))
    facts = [_facts(row) for row in rows]
    asked = [prompt.branches(*map(list, zip(*chats))) for _, chats in facts]
    phrases = []
    for shorts, _ in facts:
        words, said = (tokenizer(list(part))["input_ids"] for part in zip(*shorts))
        phrases.append([(np.array([*w, *s]), len(s)) for w, s in zip(words, said)])

    def logits(chosen, branches):
        scene = {"image_token": prompt.image_token, "prefix": prefix}
        batch = pack([scene | {"tokens": tokens[i], "branches": own} for i, own in zip(chosen, branches)])
        labels, places = batch.pop("labels"), batch.pop("label_rows")
        tree = SceneTree(**{name: batch.pop(name) for name in TREE_KEYS})
        return model.lm_head(packed_states(model.model, tree, **batch)[places]), labels

    body, draw = model.model.language_model, np.random.default_rng(seed)
    body.set_attn_implementation("scene")
    matrices = [p for name, p in body.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in body.named_parameters() if p.dim() != 2 or "embed_tokens" in name]
    muon, adam = _Muon(matrices, muon_lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    order: list[int] = []
    for step in range(steps):
        if len(order) < scenes:
            order = draw.permutation(train).tolist()
        chosen, order = order[:scenes], order[scenes:]
        drawn = [[phrases[i][k] for k in draw.permutation(len(phrases[i]))[:short]]
                 + [asked[i][k] for k in draw.permutation(len(asked[i]))[:chat]] for i in chosen]  # fmt: skip
        said, labels = logits(chosen, drawn)
        body.zero_grad()
        F.cross_entropy(said, labels).backward()
        share = min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        adam.param_groups[0]["lr"] = lr * share
        adam.step()
        with torch.no_grad():
            muon.step(share)
    right = []
    with torch.no_grad():
        for start in range(0, len(held), 25):
            chosen = held[start : start + 25]
            said, labels = logits(chosen, [asked[i] for i in chosen])
            hits = iter((said.argmax(-1) == labels).tolist())
            right += [all([next(hits) for _ in range(count)]) for i in chosen for _, count in asked[i]]
    body.set_attn_implementation("sdpa")
    return {"chat_accuracy": round(float(np.mean(right)), 3)}


def _write_qwen(folder: Path, family: str, vocab: dict, merges: list, texts: dict, data_dir: Path, seed: int) -> dict:
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = write_qwen_tokenizer(folder, vocab, merges, family)
    write_qwen_settings(folder, qwen_config(tokenizer, family, DEMO_SIZES["text"], DEMO_SIZES["vision"]))
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder)
    model = (Qwen3ForCausalLM if family == "qwen3" else Qwen2_5_VLForConditionalGeneration)(config)
    body = model.model if family == "qwen3" else model.model.language_model
    documents = _documents(texts, "<think>\n\n</think>\n\n" if family == "qwen3" else "", seed)
    budget = DEMO_SIZES["train"] | ({"steps": DEMO_SIZES["qwen3_steps"]} if family == "qwen3" else {})
    before, after = train_language(model, body, tokenizer, documents, seed, **budget)
    measured = {"nats_per_token": [round(before, 3), round(after, 3)]}
    if family != "qwen3":
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        _init_vision(model.model.visual, seed)
        if (data_dir / "scenes.jsonl").is_file():
            measured |= train_vision(model.model.visual, processor, data_dir, seed, **DEMO_SIZES["vision_train"])
        _scale_vision(model, processor, seed)
        if (data_dir / "scenes.jsonl").is_file():
            measured |= train_grounding(model, tokenizer, processor, data_dir, seed, **DEMO_SIZES["grounding"])
    write_weights(model, folder, shards=1 if family == "qwen3" else 2)
    return measured


def _write_clip(folder: Path, texts: list[str], seed: int) -> None:
    """A CLIP with fresh weights: 128 px images, patches of 16, both towers 4 layers of 128. Its words are English:
    other scripts fall to bytes, as in the original."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    texts = [" ".join(text.lower().split()) for text in texts]
    vocab, merges = train_bpe(texts, DEMO_SIZES["vocab"]["clip"], suffix="</w>", split=CLIP_SPLIT)
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab |= {start: len(vocab), end: len(vocab) + 1}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    _write_vocab(folder, tokenizer.backend_tokenizer, vocab, merges, head="#version: 0.2\n")
    roles = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    _write_json(folder / "special_tokens_map.json", roles)
    # fmt: off
    _write_json(folder / "tokenizer_config.json", {
        **roles, "do_lower_case": True, "errors": "replace", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer",
    })
    tower = {"hidden_act": "quick_gelu", "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4,
             "num_hidden_layers": 4, "projection_dim": 128}
    ids = {"bos_token_id": vocab[start], "eos_token_id": vocab[end], "pad_token_id": vocab[end]}
    _write_json(folder / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592, "projection_dim": 128, "torch_dtype": "float32",
        "text_config": {"model_type": "clip_text_model", **tower, **ids, "max_position_embeddings": 77,
                        "vocab_size": len(vocab)},
        "vision_config": {"model_type": "clip_vision_model", **tower, "image_size": 128, "patch_size": 16},
    })
    _write_json(folder / "preprocessor_config.json", {
        "crop_size": 128, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", **PIXELS, "resample": 3, "size": 128,
    })
    # fmt: on
    torch.manual_seed(seed)
    write_weights(CLIPModel(CLIPConfig.from_pretrained(folder)), folder)


def build(data_dir, output_dir, seed: int, verify) -> dict:
    """Write `output_dir/{qwen2_5_vl,clip,qwen3}` from the texts of `data_dir`; returns what was measured.
    At once if the same data, settings and seed were built before and `verify(folder)` finds the bases whole. Written
    whole or not at all.

    Raises InputError if the demo data is missing or malformed, or the disk is full or read-only."""
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    texts = demo_texts(data_dir)
    manifest = data_dir / "manifest.json"  # stands for the pictures
    made = json.loads(manifest.read_text())["sha256"] if manifest.is_file() else None
    fingerprint = hashlib.sha256(json.dumps([texts, made, DEMO_SIZES, seed], sort_keys=True).encode()).hexdigest()
    record = output_dir / "demo_bases.json"
    try:
        built = json.loads(record.read_text(encoding="utf-8"))
        if built["fingerprint"] == fingerprint:
            for name in DEMO:
                verify(output_dir / name)
            return {**built, "rebuilt": False}
    except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError: a broken base is rebuilt
        pass

    began = time.time()
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Two threads at most: matrices this small gain nothing from more, and the weights do not depend on the machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".building-", dir=output_dir) as temp,
            torch.random.fork_rng(devices=[]),
        ):
            temp = Path(temp)
            for name in DEMO:
                (temp / name).mkdir()
            corpus = [*texts["en"], *texts["zh"], *(f"{q}\n{a}" for q, a in texts["qa"])]
            corpus += [f"system\n{SYSTEM}", "user\nDescribe the image.", "assistant\n", "描述这幅图像。"] * 2
            vocab, merges = train_bpe(corpus, DEMO_SIZES["vocab"]["qwen"])
            measured = {
                f: _write_qwen(temp / f, f, vocab, merges, texts, data_dir, seed) for f in ("qwen2_5_vl", "qwen3")
            }
            _write_clip(temp / "clip", texts["en"], seed)
            for name in DEMO:
                verify(temp / name)
            record.unlink(missing_ok=True)  # from here to the last line nothing vouches for the folder
            for name in DEMO:
                if (output_dir / name).exists():
                    (output_dir / name).rename(temp / f"old-{name}")
                (temp / name).rename(output_dir / name)
            built = {"fingerprint": fingerprint, "seed": seed, "seconds": round(time.time() - began, 1)}
            built["measured"] = measured
            _write_json(temp / record.name, built)
            (temp / record.name).rename(record)
    except OSError as error:
        raise InputError(f"{output_dir} cannot be written: {error.strerror or error}") from error
    finally:
        torch.set_num_threads(threads)
    return {**built, "rebuilt": True}
