"""The demo bases: small models of the real classes, in the official file layout, trained for a few minutes.

`python load.py --preset demo` builds Qwen2.5-VL, Qwen3 and CLIP with file and tensor names as the hubs publish them, so
that every path of preset `full` runs on them. The language side is trained on the texts of the training scenes, the
vision tower on what lies where in them, then the language side on reading the tower, or, where it has none, on telling a
scene from a table of words; held-out scenes are not seen.
"""

import hashlib
import json
import math
import random
import shutil
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from config import PARTIAL, InputError, fresh_folder, in_workers, processors
from demo_data import KINDS, LINES, NAMES, REGIONS, corners, one
from imagery import ImageSettings, read_image
from report import write_json

DEMO = ["qwen2_5_vl", "clip", "qwen3"]
TAGS = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end
vision_start vision_end vision_pad image_pad video_pad"""  # special: dropped by skip_special_tokens
PLAIN = "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
THINK = "<tool_response> </tool_response> <think> </think>"
SPECIAL = {"qwen2_vl": [f"<|{tag}|>" for tag in TAGS.split()]}  # numbered in this order after the byte-pair vocabulary
SPECIAL["qwen2_5_vl"] = SPECIAL["qwen2_vl"] + PLAIN.split()
SPECIAL["qwen3"] = SPECIAL["qwen2_5_vl"] + THINK.split()
SYSTEM = "You are a helpful assistant."
# What a caption answers, unless its row says otherwise.
DESCRIBE = {"en": "Describe the image.", "zh": "描述这幅图像。"}
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
    "version": 9,
    "vocab": {"qwen": 2000, "clip": 1500},
    "text": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "heads": 4, "kv_heads": 2},
    "vision": {"depth": 3, "hidden_size": 128, "num_heads": 4, "intermediate_size": 384, "fullatt": [0, 2]},
    "train": {"steps": 80, "batch": 16, "length": 64, "lr": 1e-2, "muon_lr": 0.02},
    "grounding": {"steps": 450, "batch": 6, "short": 20, "chat": 18, "captions": 2, "lr": 2e-3, "muon_lr": 0.02},
    "reading": {"steps": 600, "batch": 6, "captions": 5, "lr": 2e-3, "muon_lr": 0.02},
    "side": 112,  # pixels of the pictures that the vision towers learn from
    "vision_train": {"steps": 500, "batch": 32, "lr": 1e-3, "head_lr": 1e-2, "muon_lr": 0.02},
    "clip": {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8},
    "clip_train": {"steps": 900, "batch": 32, "lr": 1e-3, "head_lr": 1e-2, "muon_lr": 0.02},
    # F1 of what lies in a cell, 600 steps: 0.73, and 0.78 where the image's vector weighs a third; at 900 steps 0.81 with
    # joined quarters, which close the gap between training scenes and others.
    "clip_views": {"zoom": 1.25, "mosaic": 0.4, "whole_weight": 0.3},
}


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
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
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
    write_json(folder / "tokenizer_config.json", config)
    if family != "qwen3":
        write_json(folder / "chat_template.json", chat)
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
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


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
    write_json(folder / "config.json", config)
    end, pad = config["eos_token_id"], config["bos_token_id"]
    sampling = {"repetition_penalty": 1.05, "temperature": 1e-06}
    if config["model_type"] == "qwen3":
        sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    ends = {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad], "do_sample": True}
    write_json(folder / "generation_config.json", {**ends, **sampling, "transformers_version": "4.51.0"})
    if "vision_config" in config:
        sizes = {"min_pixels": 56 * 56, "max_pixels": max_pixels, "patch_size": 14, "temporal_patch_size": 2}
        kind = "Qwen2_5_VLProcessor" if config["model_type"] == "qwen2_5_vl" else "Qwen2VLProcessor"
        sizes |= {"merge_size": 2, **PIXELS, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": kind}
        write_json(folder / "preprocessor_config.json", sizes)


def demo_texts(data_dir: Path, more: str | Path | None = None) -> dict[str, list]:
    """`{"en": captions, "zh": captions, "asked": [[prompt, caption, image]], "qa": [[question, answer]], "more": [[prompt,
    text]]}` of the demo data and of `more`, a caption file of the user's (its training split).

    Raises InputError if a file is missing or not of the demo data's form, or `more` is none that `scenes.read_scenes` reads."""
    files = ["captions_en.json", "captions_zh.json", "rsvqa_questions.json", "rsvqa_answers.json"]
    for name in files:
        if not (data_dir / name).is_file():
            raise InputError(f"{data_dir / name} is missing: run `python demo_data.py` first")
    try:
        en, zh, questions, answers = (json.loads((data_dir / name).read_text(encoding="utf-8")) for name in files)
        answer_of = {row["question_id"]: str(row["answer"]) for row in answers["answers"] if row.get("active", True)}
        seen = [r for r in questions["questions"] if r["id"] in answer_of and r.get("split", "train") == "train"]
        texts = {"qa": [[r["question"], answer_of[r["id"]]] for r in seen], "asked": []}
        for language, rows in (("en", en), ("zh", zh)):  # held-out scenes' texts stay unseen by the bases too
            rows = [row for row in rows if row.get("split", "train") == "train"]
            texts[language] = [row["caption"] for row in rows]
            texts["asked"] += [[row.get("prompt", DESCRIBE[language]), row["caption"], row["image"]] for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{data_dir} is not demo data ({error!r}): run `python demo_data.py` again") from None
    if not all(texts.values()):
        raise InputError(f"{data_dir} holds no captions or no questions: run `python demo_data.py` again")
    texts["more"] = []
    if more:
        from scenes import is_chinese, read_scenes

        for scene in read_scenes(more).scenes:
            if scene.split in (None, "train"):
                texts["more"] += [[DESCRIBE["zh" if is_chinese(text) else "en"], text] for text in scene.texts]
        if not texts["more"]:
            raise InputError(f"{more}: no text of a training split in it")
    return texts


def words_zh(texts: list[str]) -> list[str]:
    """The words of Chinese texts, for learning tokens. A tokenizer learnt on whole sentences as few as these joins words of
    different meaning into one token ("三栋建筑物"), each too rare to be learnt: the language model's loss on Chinese captions
    was 3.5 nats a token with it, and is 0.9 with tokens that end where a word does."""
    from caption_scores import jieba_cutter

    return [word for text in texts for word in jieba_cutter().cut(text)]


def _corpus(texts: dict) -> list[str]:
    """What the tokens of the Qwen models are learnt from: `demo_texts` and, twice, or no pair of them would be merged, the words
    of their chat."""
    given = {name: [text for prompt, text in texts["more"] if prompt == asked] for name, asked in DESCRIBE.items()}
    chat = [f"system\n{SYSTEM}", "assistant\n", *{f"user\n{prompt}": 0 for prompt, *_ in texts["asked"]}]
    asked = [f"{question}\n{answer}" for question, answer in texts["qa"]]
    return [*texts["en"], *words_zh(texts["zh"]), *asked, *given["en"], *words_zh(given["zh"]), *chat * 2]


def _documents(texts: dict, family: str, seed: int) -> list[str]:
    """Training text: captions and answers, as the chat in which the model is asked later. The captioner's language model
    reads captions only."""
    user, answer, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    shuffle = random.Random(seed)
    if family == "qwen3":
        documents = [
            f"{user}{prompt}{end}{answer}<think>\n\n</think>\n\n{said}{end}"
            for prompt, said, *_ in texts["asked"] + texts["more"]
        ]
    else:
        qa = texts["qa"][:]
        shuffle.shuffle(qa)
        chats = [qa[i : i + 4] for i in range(0, len(qa), 4)] + [[turn[:2]] for turn in texts["asked"][::2]]
        chats += [[turn] for turn in texts["more"]]
        system = f"<|im_start|>system\n{SYSTEM}{end}"
        documents = [system + "".join(f"{user}{q}{end}{answer}{a}{end}" for q, a in turns) for turns in chats]
        documents += [f"{caption}<|endoftext|>" for caption in texts["en"] + texts["zh"]]
    shuffle.shuffle(documents)
    return documents


def train_language(
    model, body, tokenizer, documents, seed, *, steps, batch, length, lr, muon_lr
) -> tuple[float, float]:
    """Plain causal language modelling on packed text -> loss on rows left out (nats per token) before and after."""
    import numpy as np
    import torch

    ids = [token for ids in tokenizer(documents)["input_ids"] for token in ids]
    rows = torch.tensor(ids[: max(1, len(ids) // length) * length])
    rows = rows.view(-1, min(length, len(rows)))  # (N, T)
    left_out = rows[: max(1, min(32, len(rows) // 10))]
    rows = rows[len(left_out) :] if len(rows) > len(left_out) else rows

    def loss_of(x):
        logits = model.lm_head(body(input_ids=x, use_cache=False).last_hidden_state[:, :-1])  # (B, T-1, V)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())

    def measure():
        with torch.no_grad():
            return loss_of(left_out).item()

    before, draw, named = measure(), np.random.default_rng(seed), body.named_parameters()  # the tied embedding is there
    rates = {"lr": lr, "muon_lr": muon_lr}
    _train(lambda chosen: loss_of(rows[chosen]), named, [], len(rows), draw, steps=steps, batch=batch, **rates)
    return before, measure()


def _init_vision(visual, seed: int, residual: float) -> None:
    """Random weights that tell images apart: with the usual std of 0.02 a tower this narrow maps every image to nearly
    one vector; 1/sqrt(fan-in) keeps the signal. What writes to the residual stream is `residual` times as large."""
    import torch

    generator, writes = torch.Generator().manual_seed(seed), ("attn.proj", "down_proj", "out_proj", "fc2")
    with torch.no_grad():
        for name, weight in visual.named_parameters():
            if weight.dim() > 1:
                scale = weight[0].numel() ** -0.5 * (residual if any(w in name for w in writes) else 1)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def _init_places(weight, seed: int) -> None:
    """Position embeddings (1 + n * n, D) of a CLIP start as waves along rows and columns, so that neighbours are alike
    from the first step (rotary towers have this built in)."""
    import torch

    n = math.isqrt(len(weight) - 1)
    angle = torch.arange(n)[:, None] * torch.tensor([0.4, 0.8, 1.6])
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # (n, 6)
    wave = torch.cat([wave[:, None].expand(n, n, -1), wave[None].expand(n, n, -1)], 2).flatten(0, 1)
    places = wave @ torch.randn(wave.shape[1], weight.shape[1], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.zero_()[1:] = 0.5 * places / places.std()


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
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), for matrices; those of one shape at once.
    Here it reached in 100 steps what AdamW did in 250. `torch.optim.Muon` iterates in bfloat16, six times slower on a
    CPU."""

    def __init__(self, matrices, lr: float):
        shapes: dict = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        self.groups = [(alike, alike[0].new_zeros(len(alike), *shape)) for shape, alike in shapes.items()]
        self.lr = lr

    def step(self, share: float) -> None:
        """One update at `share` of the learning rate."""
        import torch

        rate = self.lr * share
        for matrices, momentum in self.groups:
            gradient = torch.stack([matrix.grad for matrix in matrices])  # (N, rows, columns)
            update = gradient.lerp(momentum.lerp_(gradient, 0.05), 0.95)
            rows, columns = update.shape[1:]
            x = update if rows <= columns else update.mT
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):  # x = 3.4445 x + (-4.775 g + 2.0315 g g) x, g = x x'
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
            for matrix, change in zip(matrices, x if rows <= columns else x.mT):
                matrix.mul_(1 - 0.01 * rate).sub_(change, alpha=rate * max(1, rows / columns) ** 0.5)


def _train(loss_of, named, heads, items, draw, *, steps, batch, lr, muon_lr, head_lr=None) -> None:
    """Minimise `loss_of(chosen)` over batches of `items`, shuffled anew by `draw` whenever they run out: Muon for the
    matrices among `named` (name, parameter), AdamW for embeddings, vectors and, at `head_lr`, `heads`; ten steps of
    warm-up, then linearly down to nothing."""
    import torch

    named = list(named)
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    groups = [{"params": others, "rate": lr}] + [{"params": heads, "rate": head_lr}] * bool(heads)
    muon, adam = _Muon(matrices, muon_lr), torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    order: list[int] = []
    for step in range(steps):
        if len(order) < batch:
            order = draw.permutation(items).tolist()
        chosen, order = order[:batch], order[batch:]
        for weight in [*matrices, *others, *heads]:
            weight.grad = None
        loss_of(chosen).backward()
        share = min(1, (step + 1) / 10) * (1 - step / steps)
        for group in adam.param_groups:
            group["lr"] = group["rate"] * share
        adam.step()
        with torch.no_grad():
            muon.step(share)


@dataclass
class Scenes:
    """The training and validation scenes as the vision towers learn them; lists run over the scenes."""

    rows: list[dict]
    """Their truths, as demo_data.py wrote them."""
    pictures: list
    """(side, side, 3) uint8: the image, squeezed."""
    cover: list[int]
    """Land cover, as an index of `covers`."""
    covers: list[str]
    kinds: list[str]
    train: list[int]
    held: list[int]
    """Indices of the training and of the validation scenes."""

    def grid(self, index: int, cells: int, window: tuple[float, float, float] = (0, 0, 1)):
        """What lies in each cell of a scene, (cells, cells, 3, kinds) float32: whether a kind is there, how many of it
        have their centre there, the share it covers. A line is there where it covers an eighth. `window`: of the part
        (left, top, side) of the picture, in fractions of its sides."""
        import numpy as np
        from PIL import Image, ImageDraw

        row, side, part = self.rows[index], len(self.pictures[index]), window[2]
        grid = np.zeros((cells, cells, 3, len(self.kinds)), np.float32)
        scale = side / row["width"] / part, side / row["height"] / part
        left, top = window[0] * side / part, window[1] * side / part

        def place(x, y):
            return x * scale[0] - left, y * scale[1] - top

        objects = [(o["kind"], o) for o in row["objects"]] + [("cloud", o) for o in row["clouds"]]
        for number, kind in enumerate(self.kinds):
            sheet = Image.new("L", (side, side))
            pen = ImageDraw.Draw(sheet)
            for o in (o for name, o in objects if name == kind):
                column, line = (math.floor(at / side * cells) for at in place(o["x"], o["y"]))
                if 0 <= column < cells and 0 <= line < cells:
                    grid[line, column, :2, number] += 1
                pen.polygon([place(x, y) for x, y in corners(o)], fill=8)
            for line in (line for line in row["lines"] if line["kind"] == kind):
                points = [place(x, y) for x, y in line["points"]]
                pen.line(points, fill=8, width=max(1, round(line["width"] * scale[0])))
            if sheet.getbbox():
                share = np.asarray(sheet, np.float32).reshape(cells, side // cells, cells, -1).mean((1, 3)) / 8
                grid[:, :, 2, number] = share
                grid[:, :, 0, number] += (share > 1 / 8) & (kind in LINES)
        grid[:, :, 0] = grid[:, :, 0] > 0
        return grid


def demo_scenes(data_dir: Path, side: int) -> Scenes | None:
    """None where the folder holds texts only."""
    import numpy as np
    from PIL import Image

    if not (data_dir / "scenes.jsonl").is_file():
        return None
    rows = [json.loads(line) for line in (data_dir / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] in ("train", "val")]
    covers = sorted({row["cover"] for row in rows})
    kinds = [*sorted({k for row in rows for k in row["counts"]}), "cloud"]

    def picture(row):
        rgb = read_image(data_dir / "images" / row["image"], ImageSettings(stretch="percentile")).rgb
        return np.asarray(Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC))

    pictures = [picture(row) for row in rows]
    train, held = ([i for i, row in enumerate(rows) if row["split"] == split] for split in ("train", "val"))
    if not train or not held:
        raise InputError(f"{data_dir}: no scene of its validation split; draw more: python demo_data.py --scenes 8")
    return Scenes(rows, pictures, [covers.index(row["cover"]) for row in rows], covers, kinds, train, held)


def _init_filters(weight, patches) -> None:
    """The first patches' filters start as the principal components of `patches` (N, 3 * 14 * 14), each at equal
    strength: brightness, nearly all of a patch's energy, would else drown texture."""
    import torch

    flat, width = patches.double(), len(weight)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    filters = vectors.flip(1)[:, :width] * (values.flip(0)[:width] + 0.01 * values[-width:].mean()).rsqrt()
    with torch.no_grad():
        if weight.dim() == 5:  # two frames of an image are the same: half of each
            filters, weight = filters / 2, weight.movedim(2, 0)
        weight.copy_(filters.T.view(width, 3, *weight.shape[-2:]))


def _joined(pictures, source):
    """Pictures (or grids) of quarters, (B, n, n, ...): quarter (r, c) of number b is that of number source[b, r, c]."""
    import numpy as np

    half = pictures.shape[1] // 2
    quarters = pictures.reshape(len(pictures), 2, half, 2, half, *pictures.shape[3:]).swapaxes(2, 3)
    return quarters[(source, *np.ogrid[:2, :2])].swapaxes(2, 3).reshape(pictures.shape)


def train_vision(
    encode, named, scenes: Scenes, seed: int, *, steps, batch, lr, head_lr, muon_lr, zoom=1.0, mosaic=0.0,
    whole_weight=1.0,
) -> dict:  # fmt: skip
    """Teach a demo vision tower to see, as the real one has been: each token says of the square of the image that it
    stands for the land cover, which objects, lines and clouds lie there, how many, and what share of it they cover, by
    the truth of the training scenes, with turns, flips, changes of light, up to `zoom` times enlarged parts, and, for the
    share `mosaic` of them, quarters of different scenes joined (as CutMix does, Yun et al. 2019; exact here, since every
    square has its own truth). A tower with random weights takes hours to learn from captions alone what this gives in
    minutes.

    `encode` turns images (side, side, 3) uint8 into tokens (B, squares, D), row by row, and, if it has one, a vector of
    the whole image (B, E), which says the cover and which kinds there are; `named` are the parameters that learn. Returns
    what they tell of the validation scenes: their cover, the number of each kind of object where there are any, the
    squares of 28 x 28 pixels (of the vector: the scenes) each kind lies in. `whole_weight`: of the vector's part in the
    loss."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.nn import functional as F

    kinds, covers, side = scenes.kinds, scenes.covers, len(scenes.pictures[0])
    draw, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shapes = [x.shape for x in encode(scenes.pictures[:1])]
    cells = math.isqrt(shapes[0][1])
    grids = [scenes.grid(i, cells) for i in range(len(scenes.pictures))]
    heads = [torch.nn.Linear(shape[-1], len(covers) + n * len(kinds)) for shape, n in zip(shapes, (3, 1))]
    for head in heads:
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
            head.bias.zero_()[len(covers) :] = -2.5  # most squares hold nothing: what is rare need not be learnt first

    def say(images):
        """-> cover logits (B, squares, covers), presence logits, log numbers and share logits (B, squares, kinds); if there
        is a vector, its cover logits (B, covers) and presence logits (B, kinds)."""
        sizes = [len(covers), *[len(kinds)] * 3]
        tokens, *vector = (head(F.layer_norm(x, x.shape[-1:])) for head, x in zip(heads, encode(images)))
        return tokens.split(sizes, -1), *(x.split(sizes[:2], -1) for x in vector)

    def wrong(said, truth):
        return F.binary_cross_entropy_with_logits(said, truth, reduction="none")

    def view(i):
        """A scene as it might have been taken: (side, side, 3) uint8 and its grid."""
        image, grid = scenes.pictures[i], grids[i]
        if zoom > 1 and draw.random() < 0.75:
            part = draw.uniform(1 / zoom, 1)
            left, top = draw.uniform(0, 1 - part, 2)
            box = [side * at for at in (left, top, left + part, top + part)]
            image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box))
            grid = scenes.grid(i, cells, (left, top, part))
        turns, flip = int(draw.integers(4)), bool(draw.integers(2))
        image, grid = np.rot90(image, turns), np.rot90(grid, turns)
        image, grid = (image[:, ::-1], grid[:, ::-1]) if flip else (image, grid)
        light = (image.astype(np.float32) - 128) * draw.uniform(0.7, 1.3) + 128 + draw.normal(0, 12, (1, 1, 3))
        return np.clip(light, 0, 255).astype(np.uint8), grid

    def loss_of(chosen):
        mixed = draw.random(len(chosen)) < mosaic if mosaic else np.zeros(len(chosen), bool)
        source = np.tile(np.arange(len(chosen))[:, None, None], (1, 2, 2))
        source[mixed] = draw.integers(len(chosen), size=(mixed.sum(), 2, 2))
        images, truth = (_joined(np.stack(x), source) for x in zip(*map(view, chosen)))
        there, number, share = torch.from_numpy(truth).flatten(1, 2).unbind(2)
        cover = torch.tensor([scenes.cover[i] for i in chosen])
        (covered, *found), *vector = say(list(images))
        apart = wrong(found[0], there) + wrong(found[2], share)
        apart = apart + 0.3 * F.poisson_nll_loss(found[1], number, reduction="none")
        quarters = covered[mixed].unflatten(1, (2, cells // 2, 2, cells // 2)).mean((2, 4)).flatten(0, 2)
        covered = torch.cat([covered[~mixed].mean(1), quarters])
        # A joined picture has a cover in each of its quarters.
        cover_of = torch.cat([cover[~mixed], cover[source[mixed]].flatten()])
        loss = F.cross_entropy(covered, cover_of) + apart.sum((1, 2)).mean() / 16
        for whole, found in vector:
            lone = F.cross_entropy(whole, cover, reduction="none")[~mixed].sum() / len(chosen)
            loss = loss + whole_weight * (lone + wrong(found, there.amax(1)).sum(-1).mean())
        return loss

    more, rates = [p for head in heads for p in head.parameters()], {"lr": lr, "muon_lr": muon_lr, "head_lr": head_lr}
    _train(loss_of, named, more, scenes.train, draw, steps=steps, batch=batch, **rates)
    with torch.no_grad():
        return _vision_scores(scenes, [grids[i] for i in scenes.held], say([scenes.pictures[i] for i in scenes.held]))


def _vision_scores(scenes: Scenes, grids: list, said: tuple) -> dict:
    """How much of what the heads of `train_vision` said of the validation scenes is true of their grids."""
    import numpy as np
    import torch

    cover = torch.tensor([scenes.cover[i] for i in scenes.held])
    truth = torch.from_numpy(np.stack(grids)).flatten(1, 2)  # (N, squares, 3, kinds)

    def told(whole, found, truth):
        """How often the cover is right, and each kind's F1: found (..., kinds) against truth."""
        right, said, truth = whole.argmax(1) == cover, found.flatten(0, -2) > 0, truth.flatten(0, -2)
        f1 = 2 * (truth * said).sum(0) / (truth.sum(0) + said.sum(0)).clamp(min=1)
        scores = dict(zip(scenes.kinds, [round(x, 2) for x in f1.tolist()]))
        return {"cover_accuracy": round(right.float().mean().item(), 3), "object_f1": scores}

    (covered, there, number, _), *vector = said
    count = truth[:, :, 1].sum(1)
    counted = (number.exp().sum(1).round() == count)[count > 0]
    part = grids[0].shape[0] // 4  # 28 pixels a side
    there, truth = (x.unflatten(1, (4, part, 4, part)).amax((2, 4)) for x in (there, truth[:, :, 0]))
    measured = told(covered.mean(1), there, truth) | {"count_accuracy": round(counted.float().mean().item(), 3)}
    for whole, found in vector:
        measured["vector"] = told(whole, found, truth.amax((1, 2)))
    return measured


def _facts(row: dict) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What the truth of a scene says, as (words, what follows them): short phrases, and as questions of a chat. Words and
    answers are other ones than those of the demo's questions and dialogues: the base knows the scenes, not the task."""
    draw, counts, objects = random.Random(row["img_id"]), row["counts"], {o["kind"] for o in row["objects"]}
    many = {kind: names[1] for kind, names in NAMES.items()}
    chinese = {kind: words[3] for kind, words in KINDS.items()} | {kind: words[1] for kind, words in LINES.items()}
    short, chat = [], []

    def there(what, true):
        short.append((f" {what}", "present" if true else "absent"))
        chat.append((f"Can you see {what}?", "present" if true else "absent"))

    for kind, count in counts.items():
        there(one(kind), count > 0)
        if kind in LINES:
            continue
        short.append((f" number of {many[kind]}", str(count)))
        chat.append((f"Count the {many[kind]}.", str(count)))
        places = [(o["x"] / row["width"], o["y"] / row["height"]) for o in row["objects"] if o["kind"] == kind]
        for side, axis, far in (("north", 1, 0), ("south", 1, 1), ("west", 0, 0), ("east", 0, 1)) if count else ():
            nearest = min(abs(far - place[axis]) for place in places)
            if nearest < 0.42 or nearest > 0.55:  # nothing that lies on the border
                there(f"{one(kind)} in the {side}", nearest < 0.5)
    there("clouds", bool(row["clouds"]))
    for kind in draw.sample(sorted(counts), 6):
        chat.append((f"能看到{chinese[kind]}吗？", "存在" if counts[kind] else "不存在"))
    for group in row["groups"]:
        kind, where = group["kind"], group["where"]
        chat.append((f"数一数{chinese[kind]}。", str(counts[kind])))
        if where in REGIONS:
            chat += [(f"Where do the {many[kind]} lie?", where), (f"{chinese[kind]}位于何处？", REGIONS[where][1])]
    short += [(" area", row["rural_urban"]), (" cover", row["cover"])]
    chat.append(("Which kind of area, rural or urban?", row["rural_urban"]))
    countable = [kind for kind in counts if kind not in LINES]
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


def _captions_of(scenes: Scenes, texts: dict) -> list[list]:
    """[[prompt, caption]] of each scene, of `demo_texts`; none of a validation scene."""
    told: dict[str, list] = {row["image"]: [] for row in scenes.rows}
    for prompt, caption, image in texts["asked"]:
        told[image].append([prompt, caption])
    return list(told.values())


def _branches(prompt, turns) -> list:
    """The branches of (question, answer) pairs: `data.ChatPrompt` or `data.CaptionPrompt`."""
    return prompt.branches([asked for asked, _ in turns], [said for _, said in turns])


def _packed_logits(model, scenes: list[dict], states_of):
    """Scenes as `data.pack` takes them -> logits (M, V) of what is to be predicted, and labels (M,); `states_of` gives the
    last layer (L, D) from (tree, the rest of the batch)."""
    from data import pack
    from model import SceneTree

    batch = pack(scenes, split=True)
    labels, places = batch.pop("labels"), batch.pop("label_rows")
    tree = SceneTree.of(batch)
    return model.lm_head(states_of(tree, batch)[places]), labels


def train_grounding(
    model, tokenizer, processor, scenes: Scenes, texts: dict, seed: int, *, steps, batch, short, chat, captions, lr, muon_lr,
):  # fmt: skip
    """Teach the demo language model to read the vision tower's tokens, as the real one has been: facts of the training
    scenes, each scene packed once with `short` phrases, `chat` questions and `captions` of `texts` (`demo_texts`)
    drawn anew. Without it LoRA would first have to learn what an image is; without the captions, and some texts of "more"
    in every step, the model forgets its language meanwhile (in Chinese up to the loss of a guess). Returns the share of
    right answers to the validation scenes' chat questions.

    Many small steps: at equal work, 6 scenes a step reached 0.93 on presence where 24 reached 0.84."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from data import ChatPrompt, pixel_batch
    from model import packed_states

    tokens = []
    with torch.no_grad():
        for start in range(0, len(scenes.pictures), 50):
            inputs = pixel_batch(scenes.pictures[start : start + 50], processor)
            made = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            tokens += made.chunk(len(inputs["image_grid_thw"]))
    prompt = ChatPrompt(tokenizer, "{question}", model.config.image_token_id, processor.merge_size)
    side = len(scenes.pictures[0]) // 14
    prefix = prompt.prefix((1, side, side))
    facts = [_facts(row) for row in scenes.rows]

    chats = [_branches(prompt, turns) for _, turns in facts]
    told = [_branches(prompt, turns) for turns in _captions_of(scenes, texts)]
    alone = _branches(prompt, texts["more"])
    phrases = []
    for shorts, _ in facts:
        words, said = (tokenizer(list(part))["input_ids"] for part in zip(*shorts))
        phrases.append([(np.array([*w, *s]), len(s)) for w, s in zip(words, said)])

    def logits(chosen, branches):
        scene = {"image_token": prompt.image_token, "prefix": prefix}
        return logits_of([scene | {"tokens": tokens[i], "branches": own} for i, own in zip(chosen, branches)])

    def logits_of(scenes):
        return _packed_logits(model, scenes, lambda tree, batch: packed_states(model.model, tree, **batch))

    body, draw = model.model.language_model, np.random.default_rng(seed)
    body.set_attn_implementation("scene")

    def loss_of(chosen):
        parts = ((phrases, short), (chats, chat), (told, captions))
        drawn = [[own[i][k] for own, most in parts for k in draw.permutation(len(own[i]))[:most]] for i in chosen]
        loss = F.cross_entropy(*logits(chosen, drawn))
        if alone:
            some = [alone[k] for k in draw.integers(len(alone), size=batch)]
            loss = loss + F.cross_entropy(*logits_of([{"prefix": prompt.prefix(None), "branches": some}]))
        return loss

    named = body.named_parameters()
    _train(loss_of, named, [], scenes.train, draw, steps=steps, batch=batch, lr=lr, muon_lr=muon_lr)
    right = []
    with torch.no_grad():
        for start in range(0, len(scenes.held), 25):
            chosen = scenes.held[start : start + 25]
            said, labels = logits(chosen, [chats[i] for i in chosen])
            hits = iter((said.argmax(-1) == labels).tolist())
            right += [all([next(hits) for _ in range(count)]) for i in chosen for _, count in chats[i]]
    body.set_attn_implementation("sdpa")
    return {"chat_accuracy": round(float(np.mean(right)), 3)}


def _inventory(scenes: Scenes, index: int, cells: int, word_of: dict[str, int]):
    """A word (token id of `word_of`) for each square of a scene, (cells, cells): the object whose centre lies there, else the
    line that crosses it, else the cloud that covers a third, else the land cover."""
    import numpy as np

    grid, words = scenes.grid(index, cells), np.full((cells, cells), word_of[scenes.rows[index]["cover"]])
    covered = [(kind, grid[:, :, int(kind not in LINES), n]) for n, kind in enumerate(scenes.kinds) if kind != "cloud"]
    covered.sort(key=lambda pair: pair[0] not in LINES)  # lines first: objects are written over them
    for kind, there in [("cloud", grid[:, :, 2, scenes.kinds.index("cloud")] > 1 / 3), *covered]:
        words[there > 0] = word_of[kind]
    return words


def train_reading(
    model, tokenizer, scenes: Scenes, texts: dict, seed: int, *, steps, batch, captions, lr, muon_lr
) -> dict:
    """Teach a language model without eyes to describe a training scene from a word for each square of it (`_inventory`), row
    by row, where a captioner puts the image's tokens: real language models make sentences of a table without being taught.
    Each scene is packed once with `captions` of its texts, and some texts of "more" stand in every step. Returns the loss
    (nats per token) on scenes left out, before and after.

    A captioner on it reached in 1 epoch (held-out loss 0.320, CIDEr 3.25) what took 4 before (0.339, 3.25), when reading,
    counting and placing had to be learnt through its projector."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from data import CaptionPrompt
    from model import packed_words

    cells = len(scenes.pictures[0]) // 14  # the squares that are patches to the demo's CLIP
    words = {kind: kind for kind in [*scenes.covers, *scenes.kinds]} | {"cloud": "clouds"}
    word_of = {kind: tokenizer(f" {word}")["input_ids"][-1] for kind, word in words.items()}  # one token each
    prompt, blind = CaptionPrompt(tokenizer, cells * cells), CaptionPrompt(tokenizer, 0)
    packed, alone, told = [], _branches(blind, texts["more"]), _captions_of(scenes, texts)
    for i in scenes.train:
        ids, places = prompt.prefix()
        ids[ids == prompt.image_token] = _inventory(scenes, i, cells, word_of).ravel()
        packed.append(((ids, places), _branches(prompt, told[i])))
    draw, body = np.random.default_rng(seed), model.model

    def states_of(tree, row):
        return packed_words(body, tree, body.embed_tokens(row["input_ids"]), row["position_ids"][0])

    def loss_of(chosen, most=captions, more=batch):
        rows = [
            {"prefix": packed[i][0], "branches": [packed[i][1][k] for k in draw.permutation(len(packed[i][1]))[:most]]}
            for i in chosen
        ]
        if alone and more:
            some = [alone[k] for k in draw.integers(len(alone), size=more)]
            rows.append({"prefix": blind.prefix(), "branches": some})
        return F.cross_entropy(*_packed_logits(model, rows, states_of))

    held, learnt = range(count := max(1, len(packed) // 20)), range(count, len(packed))

    def measure():
        with torch.no_grad():
            return round(loss_of(held, most=None, more=0).item(), 3)

    body.set_attn_implementation("scene")
    before = measure()
    _train(loss_of, body.named_parameters(), [], learnt, draw, steps=steps, batch=batch, lr=lr, muon_lr=muon_lr)
    measured = {"reading_nats_per_token": [before, measure()]}
    body.set_attn_implementation("sdpa")
    return measured


def _write_qwen(folder: Path, family: str, vocab: dict, merges: list, texts: dict, scenes, seed: int) -> dict:
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from data import pixel_batch

    tokenizer = write_qwen_tokenizer(folder, vocab, merges, family)
    write_qwen_settings(folder, qwen_config(tokenizer, family, DEMO_SIZES["text"], DEMO_SIZES["vision"]))
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder)
    model = (Qwen3ForCausalLM if family == "qwen3" else Qwen2_5_VLForConditionalGeneration)(config)
    body = model.model if family == "qwen3" else model.model.language_model
    lengths = [sum(len(row[1]) for row in texts[name]) for name in ("asked", "more")]
    train = DEMO_SIZES["train"] | {"steps": round(DEMO_SIZES["train"]["steps"] * (1 + 2 * lengths[1] / lengths[0]))}
    before, after = train_language(model, body, tokenizer, _documents(texts, family, seed), seed, **train)
    measured = {"nats_per_token": [round(before, 3), round(after, 3)]}
    if family == "qwen3" and scenes:
        measured |= train_reading(model, tokenizer, scenes, texts, seed, **DEMO_SIZES["reading"])
    if family != "qwen3":
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        _init_vision(model.model.visual, seed, residual=0.5)
        if scenes:
            visual = model.model.visual

            def encode(images):
                inputs = pixel_batch(images, processor)
                tokens = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
                return (tokens.view(len(images), -1, tokens.shape[-1]),)

            some = pixel_batch([scenes.pictures[i] for i in scenes.train[:200]], processor)["pixel_values"]
            some = some.view(len(some), 3, 2, -1)[:, :, 0].flatten(1)  # both frames of an image are the same
            _init_filters(visual.patch_embed.proj.weight, some)
            measured |= train_vision(encode, visual.named_parameters(), scenes, seed, **DEMO_SIZES["vision_train"])
        _scale_vision(model, processor, seed)
        if scenes:
            rates = DEMO_SIZES["grounding"]
            measured |= train_grounding(model, tokenizer, processor, scenes, texts, seed, **rates)
    write_weights(model, folder, shards=1 if family == "qwen3" else 2)
    return measured


def _write_clip_settings(folder: Path, texts: list[str]) -> None:
    """The tokenizer and the settings of a CLIP for images of 112 px in patches of 14. Its words are English: other scripts
    fall to bytes, as in the original."""
    from transformers import CLIPTokenizer

    side = DEMO_SIZES["side"]
    texts = [" ".join(text.lower().split()) for text in texts]
    vocab, merges = train_bpe(texts, DEMO_SIZES["vocab"]["clip"], suffix="</w>", split=CLIP_SPLIT)
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab |= {start: len(vocab), end: len(vocab) + 1}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    _write_vocab(folder, tokenizer.backend_tokenizer, vocab, merges, head="#version: 0.2\n")
    roles = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    write_json(folder / "special_tokens_map.json", roles)
    # fmt: off
    write_json(folder / "tokenizer_config.json", {
        **roles, "do_lower_case": True, "errors": "replace", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer",
    })
    tower = {"hidden_act": "quick_gelu", "projection_dim": 128}
    text = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 4}
    ids = {"bos_token_id": vocab[start], "eos_token_id": vocab[end], "pad_token_id": vocab[end]}
    write_json(folder / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592, "projection_dim": 128, "torch_dtype": "float32",
        "text_config": {"model_type": "clip_text_model", **tower, **text, **ids, "max_position_embeddings": 77,
                        "vocab_size": len(vocab)},
        "vision_config": {"model_type": "clip_vision_model", **tower, **DEMO_SIZES["clip"], "image_size": side,
                          "patch_size": 14},
    })
    write_json(folder / "preprocessor_config.json", {
        "crop_size": side, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", **PIXELS, "resample": 3, "size": side,
    })
    # fmt: on


def _write_clip(folder: Path, texts: list[str], scenes: Scenes | None, seed: int) -> dict:
    """A CLIP whose vision tower has learnt to see. What reads its patches, as LLaVA's kind of captioner does, reads them
    before the last layer; that one serves the vector of the image. The text tower has fresh weights."""
    import numpy as np
    import torch
    from transformers import CLIPConfig, CLIPModel

    _write_clip_settings(folder, texts)
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig.from_pretrained(folder))
    measured = {}
    if scenes:
        vision = model.vision_model
        named = [*vision.named_parameters(), *model.visual_projection.named_parameters()]
        _init_vision(vision, seed, residual=0.1)
        _init_places(vision.embeddings.position_embedding.weight, seed)

        def pixels(images):
            scaled = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
            mean, std = (torch.tensor(PIXELS[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
            return (scaled - mean) / std  # (B, 3, side, side)

        def encode(images):
            seen = vision(pixels(images), output_hidden_states=True)
            return seen.hidden_states[-2][:, 1:], model.visual_projection(seen.pooler_output)  # no class token

        some = torch.nn.functional.unfold(pixels([scenes.pictures[i] for i in scenes.train[:200]]), 14, stride=14)
        _init_filters(vision.embeddings.patch_embedding.weight, some.transpose(1, 2).flatten(0, 1))
        measured = train_vision(encode, named, scenes, seed, **DEMO_SIZES["clip_train"], **DEMO_SIZES["clip_views"])
    write_weights(model, folder)
    return measured


def _write_base(job: tuple) -> dict:
    """One base, with one thread: matrices this small gain little from a second one, which another base uses better, and so
    the weights do not depend on the machine."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    folder, name, vocab, merges, texts, scenes, seed = job
    disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            if name == "clip":
                return _write_clip(folder, texts["en"], scenes, seed)
            return _write_qwen(folder, name, vocab, merges, texts, scenes, seed)
    finally:
        torch.set_num_threads(threads)


def build(data_dir, output_dir, seed: int, verify, more=None) -> dict:
    """Write `output_dir/{qwen2_5_vl,clip,qwen3}` from the texts of `data_dir`; returns what was measured. The Qwen models
    also learn the words of `more`, a caption file.
    At once if the same data, settings and seed were built before and `verify(folder)` finds the bases whole. Written
    whole or not at all.

    Raises InputError if the demo data is missing or malformed, or the disk is full or read-only."""
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    texts = demo_texts(data_dir, more)
    manifest = data_dir / "manifest.json"  # stands for the pictures
    made = json.loads(manifest.read_text(encoding="utf-8"))["sha256"] if manifest.is_file() else None
    known = {name: rows for name, rows in texts.items() if rows}
    fingerprint = hashlib.sha256(json.dumps([known, made, DEMO_SIZES, seed], sort_keys=True).encode()).hexdigest()
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
    try:
        busy = f"{output_dir}: another process is building these bases; wait for its end"
        with fresh_folder(output_dir / PARTIAL, busy) as temp:
            for name in DEMO:
                (temp / name).mkdir()
            scenes = demo_scenes(data_dir, DEMO_SIZES["side"])
            vocab, merges = train_bpe(_corpus(texts), DEMO_SIZES["vocab"]["qwen"])
            jobs = [(temp / name, name, vocab, merges, texts, scenes, seed) for name in DEMO]
            workers = min(processors(), len(jobs)) if scenes and len(scenes.rows) >= 100 else 1
            measured = dict(zip(DEMO, in_workers(_write_base, jobs, workers)))
            for name in DEMO:
                verify(temp / name)
            record.unlink(missing_ok=True)  # from here to the last line nothing vouches for the folder
            for name in DEMO:
                if (output_dir / name).exists():
                    (output_dir / name).rename(temp / f"old-{name}")
                (temp / name).rename(output_dir / name)
            built = {"fingerprint": fingerprint, "seed": seed, "seconds": round(time.time() - began, 1)}
            built["measured"] = measured
            write_json(record, built)
    except OSError as error:
        raise InputError(f"{output_dir} cannot be written: {error.strerror or error}") from error
    except BrokenProcessPool:
        raise InputError("a process that built a demo base was killed: is there memory for two of 1 GB each?") from None
    return {**built, "rebuilt": True}
