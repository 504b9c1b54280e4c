"""Tiny models with random weights in the file layout and 4.x key names that the hubs publish."""

import json
from pathlib import Path

TEXT = [
    "Is there a river in the image? yes no",
    "How many buildings are there? 0 1 2 3 4 5 6 7 8 9",
    "Describe the image. a farm field next to a road with two vehicles",
    "图像中有河流吗？有没有",
    "描述这幅图像。农田旁边有一条道路，两辆车。",
]


TEXT_ONLY = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '
' + message.content + '<|im_end|>
' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant
' }}{%- endif %}"""


def write_qwen_vl(folder, family="qwen2_5_vl", shards=2, seed=0, vocab=None, **sizes) -> Path:
    """Write a tiny Qwen2.5-VL ("qwen2_5_vl") or Qwen2-VL ("qwen2_vl") to `folder` and return it.

    vocab: `(vocabulary, merges)` of `demo_bases.train_bpe`, to share one; sizes: text_hidden, text_layers, text_heads,
    text_kv_heads, text_intermediate, depth, hidden, num_heads, intermediate, fullatt, max_pixels, tie (word
    embeddings tied, as in the 2B and 3B models; False adds `lm_head.weight`, as in the 7B)."""
    import torch
    import transformers

    import demo_bases

    default = {"text_hidden": 64, "text_layers": 2, "text_heads": 4, "text_kv_heads": 2, "text_intermediate": 96}
    default |= {"depth": 2, "hidden": 32, "num_heads": 2, "intermediate": 64, "fullatt": [1], "max_pixels": 168 * 168}
    default |= {"tie": True}
    if unknown := set(sizes) - set(default):
        raise TypeError(f"unknown sizes {sorted(unknown)}; there are {sorted(default)}")
    n = default | sizes
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = demo_bases.write_qwen_tokenizer(folder, *(vocab or demo_bases.train_bpe(TEXT * 2, 320)), family)
    if family == "qwen2_5_vl":  # as published: the template that takes images lies in chat_template.json alone
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEXT_ONLY}))
    text = {"hidden_size": n["text_hidden"], "intermediate_size": n["text_intermediate"]}
    text |= {"num_hidden_layers": n["text_layers"], "heads": n["text_heads"], "kv_heads": n["text_kv_heads"]}
    vision = {"depth": n["depth"], "hidden_size": n["hidden"], "num_heads": n["num_heads"]}
    vision |= {"intermediate_size": n["intermediate"], "fullatt": n["fullatt"]}
    config = demo_bases.qwen_config(tokenizer, family, text, vision) | {"tie_word_embeddings": n["tie"]}
    demo_bases.write_qwen_settings(folder, config, n["max_pixels"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.from_pretrained(folder))
    demo_bases.write_weights(model, folder, shards)
    return folder


def write_qwen3(folder, shards=2, seed=0, vocab=None) -> Path:
    """Write a tiny Qwen3 to `folder` and return it."""
    import torch
    import transformers

    import demo_bases

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = demo_bases.write_qwen_tokenizer(folder, *(vocab or demo_bases.train_bpe(TEXT * 2, 320)), "qwen3")
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "heads": 4, "kv_heads": 2}
    demo_bases.write_qwen_settings(folder, demo_bases.qwen_config(tokenizer, "qwen3", text))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    demo_bases.write_weights(model, folder, shards)
    return folder


def write_clip_tokenizer(folder, family="clip") -> None:
    """The tokenizer beside the tiny model of `write_clip`: CLIP's byte pairs, SigLIP's sentencepiece with its fixed length of
    64, Chinese-CLIP's BERT, which is published without settings."""
    import json

    if family == "clip":
        letters = sorted(set("".join(TEXT).lower()) - {" "})
        vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>"} | marks
    elif family == "siglip":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT * 3), model_prefix=str(folder / "spiece"), vocab_size=90, minloglevel=2,
            pad_id=-1, bos_id=-1, eos_id=1, unk_id=2, hard_vocab_limit=False, pad_piece="<pad>",
        )  # fmt: skip
        (folder / "spiece.vocab").unlink()
        settings = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 64, "do_lower_case": True,
                    "pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}  # fmt: skip
    else:
        words = sorted(set("".join(TEXT)) - {" "})
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        return
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_clip(folder, family="clip", seed=0, image_size=56, shards=1) -> Path:
    """Write a tiny whole CLIP ("clip"), SigLIP ("siglip") or Chinese-CLIP ("chinese_clip") to `folder`, with its tokenizer
    and the buffers that old files hold."""
    import json

    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_clip_tokenizer(folder, family)
    tower = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    eye = tower | {"image_size": image_size, "patch_size": 14}
    # CLIP's official configs name 2 as the end of text, which it is not: the highest id is.
    reader = tower | {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_size": 32}
    name = {"clip": "CLIP", "siglip": "Siglip", "chinese_clip": "ChineseCLIP"}[family]
    config_class, model_class = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Model")
    more = {} if family == "siglip" else {"projection_dim": 24}
    config = config_class(text_config=reader, vision_config=eye, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.save_pretrained(folder, max_shard_size="100GB" if shards == 1 else "60KB")
    if family == "clip" and shards == 1:
        tensors = load_file(folder / "model.safetensors")
        tensors["vision_model.embeddings.position_ids"] = torch.arange((image_size // 14) ** 2 + 1)[None]
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sizes = {"do_resize": True, "do_normalize": True, "resample": 3}
    if family != "siglip":
        sizes |= {"crop_size": image_size, "size": image_size, "do_center_crop": True,
                  "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
                  "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    else:
        sizes |= {"size": {"height": image_size, "width": image_size}, "image_processor_type": "SiglipImageProcessor",
                  "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    return folder
