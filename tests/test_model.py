"""model.py: official weights reach both towers, embeddings do not depend on company, checkpoints are strict."""

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as model_module
from data import PixelStore, QwenResize, pixel_batch, token_batch
from imagery import ImageSettings
from model import DualEncoder, fingerprint, length_groups, load_tower, read_config
from tests.conftest import refused
from tests.official_layout import TEXT, write_clip, write_qwen_vl

MODES = ("frozen", "lora", "full")
TEXTS = ["a farm", "图像中有河流吗？", "How many buildings are there next to the road in the image? " * 3, "a", ""]


def pictures(count=5, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = [(56, 56), (28, 84), (84, 56), (112, 28)]
    return [rng.integers(0, 255, (*sizes[i % 4], 3), dtype=np.uint8) for i in range(count)]


def move(model, seed=3) -> None:
    """Change every trained tensor a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(model.trained_names()):
            parameter = model.get_parameter(name)
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def embed(model):
    model.eval()
    return model.embed_images(pictures()), model.embed_texts(TEXTS)


@pytest.fixture
def copied(base, tmp_path) -> Path:
    """A copy of the base that a test may break."""
    return Path(shutil.copytree(base, tmp_path / "copied"))


# ----------------------------------------------------------------------------------------------------
# Bases


@pytest.fixture(scope="module", params=["2.5 tied", "2.5 untied", "2 tied", "2 untied"])
def official(request, tmp_path_factory):
    """(folder in the hubs' layout, the same model as transformers loads it)."""
    family, tie = request.param.split()
    name = "qwen2_5_vl" if family == "2.5" else "qwen2_vl"
    folder = write_qwen_vl(tmp_path_factory.mktemp("official") / "tiny", name, tie=tie == "tied", shards=3, seed=4)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    keys = {key for path in model_module.weight_files(folder) for key in load_file(path)}
    assert "visual.blocks.0.attn.qkv.weight" in keys and "model.layers.0.self_attn.q_proj.weight" in keys
    assert ("lm_head.weight" in keys) == (tie == "untied") and len(model_module.weight_files(folder)) > 1
    return folder, whole


def assert_same_features(folder, whole):
    config = read_config(folder)
    processor, tokenizer = model_module.load_processor(folder)
    images = pixel_batch(pictures(), processor)
    ids = torch.tensor([tokenizer(TEXTS[2])["input_ids"]])
    image, text = load_tower(folder, "image", config).eval(), load_tower(folder, "text", config).eval()
    with torch.no_grad():
        ours = image(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
        theirs = whole.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
        assert torch.equal(ours, theirs) and float(ours.std()) > 0
        ours = text(input_ids=ids).last_hidden_state
        assert torch.equal(ours, whole.model.language_model(input_ids=ids).last_hidden_state)
        # And through the whole model's own door, position ids and all.
        through = whole(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        torch.testing.assert_close(ours, through.hidden_states[-1], rtol=1e-5, atol=1e-5)
    return image, text


def test_towers_give_the_features_of_the_whole_model(official):
    image, text = assert_same_features(*official)
    assert not any("language" in name or "layers." in name for name, _ in image.named_modules())
    assert not any("lm_head" in name or "visual" in name for name, _ in text.named_modules())


def test_folder_saved_again_by_transformers_5(official, tmp_path):
    folder, whole = official
    shutil.copytree(folder, tmp_path / "again", ignore=shutil.ignore_patterns("*.safetensors*"))
    whole.save_pretrained(tmp_path / "again")
    assert_same_features(tmp_path / "again", whole)
    # The 5.x names themselves, which a save may or may not use.
    tensors = {key: value.contiguous().clone() for key, value in whole.state_dict().items()}
    if whole.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    assert any(key.startswith("model.visual.") for key in tensors)
    assert any(key.startswith("model.language_model.layers.") for key in tensors)
    for path in (tmp_path / "again").glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, tmp_path / "again" / "model.safetensors", {"format": "pt"})
    assert_same_features(tmp_path / "again", whole)


def rewrite(folder, change) -> None:
    """`change(dict of tensors)` in whichever shard holds what it looks for."""
    for path in model_module.weight_files(folder):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("side", "key"), [("image", "visual.blocks.1.mlp.up_proj.weight"), ("text", "model.layers.1.mlp.up_proj.weight")]
)
def test_wrong_keys_are_refused_by_name(copied, settings, side, key, tmp_path):
    inner = key.removeprefix("visual.").removeprefix("model.")
    config = settings(base_model=str(copied))
    whole = Path(shutil.copytree(copied, tmp_path / "whole"))

    def attempt(*words):
        refused(lambda: DualEncoder.from_base(config), copied, *words)
        shutil.copytree(whole, copied, dirs_exist_ok=True)

    rewrite(copied, lambda tensors: tensors.pop(key, None))
    attempt("1 missing", inner)
    rewrite(copied, lambda tensors: tensors.update({key + "s": tensors.pop(key)}) if key in tensors else None)
    attempt("1 missing", inner, "1 unexpected", inner + "s")
    rewrite(copied, lambda tensors: tensors.update({key: tensors[key][:-1]}) if key in tensors else None)
    attempt("of another shape", inner)
    rewrite(copied, lambda tensors: tensors.update({"speech.weight": torch.ones(1)}) if key in tensors else None)
    attempt("1 unexpected", "speech.weight")
    DualEncoder.from_base(config)  # whole again


def test_broken_folders_are_refused(copied, settings, tmp_path):
    config = settings(base_model=str(copied))
    shard = model_module.weight_files(copied)[-1]
    data = shard.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for broken in (data[: len(data) // 2], data[:100], data[:3], b"", pointer, b"<html>" * 50):
        shard.write_bytes(broken)
        refused(lambda: DualEncoder.from_base(config), shard.name)
    shard.unlink()
    refused(lambda: DualEncoder.from_base(config), shard.name, "is missing", "load.py")
    (copied / "config.json").write_text(json.dumps({"model_type": "clip"}))
    refused(lambda: DualEncoder.from_base(config), "config.json", "'clip'", "qwen2_5_vl")
    refused(lambda: DualEncoder.from_base(settings(base_model=str(tmp_path / "none"))), "none", "load.py")


def test_fingerprint_sees_values_names_and_configuration(copied):
    first = fingerprint(copied)
    assert first == fingerprint(copied) and len(first) == 16
    rewrite(
        copied, lambda tensors: tensors.update({k: v + 1e-3 for k, v in tensors.items() if k.endswith("norm.weight")})
    )
    second = fingerprint(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert len({first, second, fingerprint(copied)}) == 3


# ----------------------------------------------------------------------------------------------------
# Encoding


def test_pool_image_is_the_mean_of_each_image(encoder):
    model = encoder().eval()
    images = pictures()
    with torch.no_grad():
        together = model.pool_image(**pixel_batch(images, model.processor))
        for row, picture in zip(together, images):
            batch = pixel_batch([picture], model.processor)
            tokens = model.image_tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
            assert len(tokens) == picture.shape[0] * picture.shape[1] // 28**2
            torch.testing.assert_close(row, sum(tokens) / len(tokens), rtol=1e-5, atol=1e-6)


def test_embeddings_do_not_depend_on_batch_mates(encoder):
    model = encoder(image_tower="full", text_tower="full")
    move(model)
    image, text = embed(model)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(5))
    for i, picture in enumerate(pictures()):
        torch.testing.assert_close(model.embed_images([picture])[0], image[i], rtol=0, atol=1e-5)
    for i, t in enumerate(TEXTS):
        torch.testing.assert_close(model.embed_texts([t])[0], text[i], rtol=0, atol=1e-5)
    backwards = model.embed_texts(TEXTS[::-1], batch_size=2).flip(0)
    torch.testing.assert_close(backwards, text, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.embed_images(pictures(), batch_size=2), image, rtol=0, atol=1e-5)
    assert model.embed_images([]).shape == (0, 16) and model.embed_texts([]).shape == (0, 16)


def test_length_grouping_equals_the_padded_forward(encoder):
    model = encoder().eval()
    rng = np.random.default_rng(0)
    texts = [" ".join(["farm"] * int(n)) for n in rng.integers(1, 60, 70)]
    rows, _ = model.tokenize(texts)
    batch = token_batch(rows, model.tokenizer.pad_token_id)
    groups = length_groups(batch["text_lengths"].tolist())
    assert len(groups) > 1 and sorted(i for group in groups for i in group) == list(range(70))
    mask = (torch.arange(batch["input_ids"].shape[1]) < batch["text_lengths"][:, None]).long()
    with torch.no_grad():
        hidden = model.text_tower(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        plain = hidden[torch.arange(70), batch["text_lengths"] - 1]
        torch.testing.assert_close(model.pool_text(**batch), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5], [1] * 40, list(range(1, 100)), [100] + [1] * 50])
def test_length_groups(lengths):
    groups = length_groups(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups[:-1]:
        assert len(group) >= 16
    for group in groups:
        assert all(lengths[i] >= 0.8 * lengths[group[0]] for i in group[16:])


def test_tokenize_cuts_and_keeps_the_end(encoder):
    model = encoder(max_text_tokens=6)
    rows, cut = model.tokenize(TEXTS)
    assert cut == sum(len(model.tokenizer(t)["input_ids"]) > 5 for t in TEXTS) > 0
    assert all(row[-1] == model.tokenizer.eos_token_id and len(row) <= 6 for row in rows)
    assert rows[4].tolist() == [model.tokenizer.eos_token_id]


def test_forward_takes_features_of_frozen_towers(encoder):
    model = encoder(image_tower="frozen", text_tower="frozen").eval()
    batch = pixel_batch(pictures(), model.processor)
    batch |= token_batch(model.tokenize(TEXTS)[0], model.tokenizer.pad_token_id)
    with torch.no_grad():
        whole = model(**batch)
    image = model.embed_images(pictures(), pool_only=True)
    text = model.embed_texts(TEXTS, pool_only=True)
    with torch.no_grad():
        stored = model(image_features=image, text_features=text)
    for name in ("image", "text"):
        torch.testing.assert_close(whole[name], stored[name], rtol=0, atol=1e-5)


def test_whitened_heads_have_near_identity_covariance(encoder):
    model = encoder(projection_dim=8)
    torch.manual_seed(0)
    mixing = torch.randn(64, 64)
    heads = (model.image_projection, model.text_projection)
    features = []
    for width in (head[0].normalized_shape[0] for head in heads):
        features.append(3 + 0.3 * torch.randn(500, width) @ mixing[:width, :width])
    model.whiten_heads(*features)
    for head, x in zip((model.image_projection.eval(), model.text_projection.eval()), features):
        with torch.no_grad():
            made = head(x).double()
        assert float(made.mean(0).abs().max()) < 1e-3
        covariance = (made - made.mean(0)).T @ (made - made.mean(0)) / (len(made) - 1)
        assert float((covariance - torch.eye(8)).abs().max()) < 0.1  # 1% of ridge shrinks a little


# ----------------------------------------------------------------------------------------------------
# LoRA, checkpointing, precision


def test_lora_starts_as_the_base_and_learns(encoder):
    frozen, lora = (encoder(image_tower=mode, text_tower=mode, lora_dropout=0.0) for mode in ("frozen", "lora"))
    for start in (lambda m: m.embed_images(pictures(), pool_only=True), lambda m: m.embed_texts(TEXTS, pool_only=True)):
        assert torch.equal(start(frozen.eval()), start(lora.eval()))
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert any(".lora_A." in n and n.startswith("image_tower") for n in trained)
    assert any(".lora_A." in n and n.startswith("text_tower") for n in trained)
    assert not any(p.requires_grad for n, p in lora.named_parameters() if "tower" in n and "lora_" not in n)
    # Every linear layer inside the blocks has its pair: 5 in a vision block of Qwen2.5-VL, 7 in a text layer.
    assert sum(".lora_A." in n for n in trained) == 2 * 5 + 2 * 7
    before = {n: p.detach().clone() for n, p in lora.named_parameters()}
    feature = lora.pool_text(*token_batch(lora.tokenize(TEXTS)[0], 0).values()).detach()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    lora.train()
    out = lora(**pixel_batch(pictures(), lora.processor), **token_batch(lora.tokenize(TEXTS)[0], 0))
    (out["image"] @ out["text"].T).diagonal().sum().backward()
    optimizer.step()
    lora.eval()
    with torch.no_grad():
        assert not torch.equal(feature, lora.pool_text(*token_batch(lora.tokenize(TEXTS)[0], 0).values()))
    for name, parameter in lora.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name


def test_seed_decides_heads_and_lora(encoder):
    one, two, three = encoder(seed=1), encoder(seed=1), encoder(seed=2)
    torch.rand(1)
    for name in one.trained_names():
        assert torch.equal(one.get_parameter(name), two.get_parameter(name))
    assert not torch.equal(one.text_projection[2].weight, three.text_projection[2].weight)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradient_checkpointing_gives_equal_gradients(encoder, mode):
    gradients = []
    for enabled in (False, True):
        model = encoder(image_tower=mode, text_tower=mode, lora_dropout=0.2)
        move(model)
        if enabled:
            model.gradient_checkpointing_enable()
            assert model.image_tower.is_gradient_checkpointing and model.text_tower.is_gradient_checkpointing
        model.train()
        torch.manual_seed(0)
        out = model(**pixel_batch(pictures(), model.processor), **token_batch(model.tokenize(TEXTS)[0], 0))
        (out["image"] @ out["text"].T).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1]) and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


def test_checkpointing_leaves_a_frozen_tower_alone(encoder):
    model = encoder(image_tower="frozen", text_tower="lora")
    model.gradient_checkpointing_enable()
    assert not model.image_tower.is_gradient_checkpointing and model.text_tower.is_gradient_checkpointing


def test_every_second_layer_may_be_checkpointed(encoder):
    """As the Trainer asks, with what --gradient_checkpointing_kwargs says taken apart."""
    model = encoder(image_tower="frozen", text_tower="lora")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None, every_n_layers=2, offload=False)
    chosen = [layer.gradient_checkpointing for layer in model.text_tower.layers]
    assert chosen == [number % 2 == 0 for number in range(len(chosen))] and len(chosen) > 1


def test_bfloat16_base_keeps_lora_in_float32(settings, base):
    config = read_config(base)
    model = DualEncoder.from_base(settings(), dtype=torch.bfloat16)
    types = {("lora" if "lora_" in n else "base", p.dtype) for n, p in model.named_parameters() if "tower" in n}
    assert types == {("lora", torch.float32), ("base", torch.bfloat16)}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "projection" in n or "logit" in n)
    assert load_tower(base, "text", config, torch.bfloat16).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("image_mode", MODES)
@pytest.mark.parametrize("text_mode", MODES)
def test_save_and_load_round_trip(encoder, base, tmp_path, image_mode, text_mode):
    changed = {"image_tower": image_mode, "text_tower": text_mode}
    changed |= {"loss": "sigmoid", "projection_hidden": 12, "max_text_tokens": 30, "stretch": "percentile"}
    model = encoder(**changed)
    move(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    heads = {
        n for n, _ in model.named_parameters() if n.startswith(("image_projection.", "text_projection.", "logit_"))
    }
    expected = set(heads)
    for side, mode in (("image", image_mode), ("text", text_mode)):
        own = {n for n, _ in model.named_parameters() if n.startswith(f"{side}_tower.")}
        expected |= {"frozen": set(), "lora": {n for n in own if "lora_" in n}, "full": own}[mode]
    assert keys == expected
    assert not [path.name for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    again = DualEncoder.from_pretrained(tmp_path)
    assert again.settings == model.settings and not again.training
    for a, b in zip(embed(model), embed(again)):
        assert torch.equal(a, b)
    assert torch.equal(again.logit_scale, model.logit_scale) and torch.equal(again.logit_bias, model.logit_bias)
    assert again.processor.size == model.processor.size


@pytest.fixture
def saved(encoder, copied, tmp_path) -> Path:
    model = encoder(base_model=str(copied))
    move(model)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_full_towers_need_no_base(encoder, copied, tmp_path):
    model = encoder(base_model=str(copied), image_tower="full", text_tower="full")
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(copied)
    for a, b in zip(embed(model), embed(DualEncoder.from_pretrained(tmp_path / "saved"))):
        assert torch.equal(a, b)


def test_changed_or_missing_base_is_refused(saved, copied, tmp_path, base):
    rewrite(copied, lambda t: t.update({k: v * 1.01 for k, v in t.items() if "norm" in k}))
    refused(lambda: DualEncoder.from_pretrained(saved), copied, "fingerprint", fingerprint(copied), "--base_model")
    DualEncoder.from_pretrained(saved, base_model=str(base))  # the right one, elsewhere
    shutil.rmtree(copied)
    refused(lambda: DualEncoder.from_pretrained(saved), "config.json is missing")


def test_wrong_tensors_in_a_checkpoint_are_refused(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    key = "text_projection.2.weight"
    for change, words in (
        ({k: v for k, v in tensors.items() if k != key}, ["1 missing", key]),
        (tensors | {"extra.weight": torch.ones(1)}, ["1 unexpected", "extra.weight"]),
        (tensors | {key: tensors[key][:-1].clone()}, ["1 of another shape", key]),
        ({k: v for k, v in tensors.items() if "lora_" not in k}, ["missing", "lora_"]),
    ):
        save_file(change, path, {"format": "pt"})
        refused(lambda: DualEncoder.from_pretrained(saved), path, *words)
    path.write_bytes(b"half")
    refused(lambda: DualEncoder.from_pretrained(saved), path, "cannot be read")
    path.unlink()
    refused(lambda: DualEncoder.from_pretrained(saved), path, "cannot be read")


def test_wrong_folders_are_refused(saved, tmp_path):
    refused(lambda: DualEncoder.from_pretrained(tmp_path / "none"), "none", "no model here")
    run = tmp_path / "run"
    shutil.copytree(saved, run / "best_model")
    refused(lambda: DualEncoder.from_pretrained(run), "best_model")
    (saved / "dual_encoder.json").write_text('{"base_model": "x"')
    refused(lambda: DualEncoder.from_pretrained(saved), "dual_encoder.json", "not readable")
    (saved / "dual_encoder.json").write_text('{"base_model": "x"}')
    refused(lambda: DualEncoder.from_pretrained(saved), "dual_encoder.json", "not readable")


def test_embedding_files_equals_embedding_pixels(encoder, tmp_path):
    from PIL import Image

    model = encoder().eval()
    path = tmp_path / "a.png"
    Image.fromarray(pictures(1)[0]).save(path)
    store = PixelStore(QwenResize(model.processor), ImageSettings(), str(tmp_path / "cache"))
    expected = model.embed_images([store[str(path)]])
    for images, options in (([str(path)], {}), ([path], {}), ([path], {"store": store})):
        assert torch.equal(model.embed_images(images, **options), expected)


def test_parameter_groups_hold_each_trained_parameter_once(encoder):
    model = encoder(image_tower="full", text_tower="lora", loss="infonce")
    groups = model.parameter_groups()
    flat = [name for names in groups.values() for name in names]
    assert sorted(flat) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert all(n.startswith("image_tower.") for n in groups["image"]) and "logit_scale" in groups["head"]
    assert all("lora_" in n for n in groups["text"]) and "logit_bias" not in flat


# ----------------------------------------------------------------------------------------------------
# CLIP, Chinese-CLIP, SigLIP


def test_siglip_2_reads_lower_case(tmp_path):
    model = DualEncoder.from_pretrained(write_clip(tmp_path / "towers", "siglip"))
    texts = ["Is there a River?", "is there a river?"]

    class GemmaTokenizer:
        def __call__(self, texts, **_):
            return {"input_ids": [[ord(letter) % 128 for letter in text] for text in texts]}

    model.tokenizer = GemmaTokenizer()
    (large, small), _ = model.tokenize(texts)
    assert np.array_equal(large, small)


def test_visitors_do_not_change_each_others_tokenizer(tmp_path):
    """A fast tokenizer keeps where it cuts and how it fills as state: what two threads ask of it must not mix."""
    model, calls = DualEncoder.from_pretrained(write_clip(tmp_path / "towers", "clip")), []

    def tokenizer(texts, **options):
        calls.append((threading.get_ident(), "truncation" in options))
        time.sleep(0.01)
        return {"input_ids": [[1, 2] for _ in texts]}

    model.tokenizer = tokenizer
    threads = [threading.Thread(target=model.tokenize, args=(["a river"],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 8 and all(calls[n][0] == calls[n + 1][0] for n in range(0, 8, 2))


@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip"])
def test_a_clip_scores_as_transformers_does(tmp_path, family):
    folder = write_clip(tmp_path / "towers", family)
    model = DualEncoder.from_pretrained(folder)
    peer = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*TEXT, "a", TEXT[0] * 9]  # the last is cut
    # SigLIP: padded to its full length and no mask, as its model card says; the others: to the longest, masked.
    limit = {"clip": 77, "siglip": 64, "chinese_clip": 52}[family]
    fill = "max_length" if family == "siglip" else True
    words = tokenizer(texts, padding=fill, truncation=True, max_length=limit, return_tensors="pt")
    if family == "siglip":
        assert (words["input_ids"].shape[1] == 64 and "attention_mask" not in words) or words.pop(
            "attention_mask"
        ) is not None
    images = pictures()
    resized = [model_module.pixel_store(model).resize(image) for image in images]  # tests/test_data.py compares it
    pixels = model.processor(images=resized, do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        theirs = peer(pixel_values=pixels, **words).logits_per_image
    cosines = model.embed_images(resized, batch_size=2) @ model.embed_texts(texts, batch_size=3).T
    ours = cosines * model.logit_scale.exp() + model.logit_bias
    assert torch.allclose(ours, theirs, atol=2e-5), (ours - theirs).abs().max()
    probabilities = theirs.sigmoid() if family == "siglip" else theirs.softmax(-1)
    assert torch.allclose(model.probabilities(cosines), probabilities, atol=1e-5)
    assert model.tokenize(texts)[1] == 1
    # What a text's embedding is does not depend on its company.
    assert torch.allclose(model.embed_texts(texts[:1]), model.embed_texts(texts)[:1], atol=1e-6)
    assert model.embed_images([]).shape == (0, peer.get_image_features(pixels).pooler_output.shape[1])


def test_the_probabilities_of_a_tower_in_16_bits_are_those_of_the_whole(tmp_path):
    folder = write_clip(tmp_path / "towers", "siglip")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"logit_scale": torch.tensor([4.7654]), "logit_bias": torch.tensor([-12.932])}  # as trained ones lie
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    cosines = torch.tensor([[0.08, 0.10, 0.11, 0.12, 0.14]])
    whole = torch.sigmoid(cosines * np.exp(4.7654) - 12.932)
    for dtype in (torch.float32, torch.bfloat16):
        model = DualEncoder.from_pretrained(folder, dtype=dtype)
        assert torch.allclose(model.probabilities(cosines), whole, atol=1e-4), dtype
        assert model.model.dtype == dtype


def test_a_clip_folder_is_strict(tmp_path):
    folder = write_clip(tmp_path / "towers")
    before = DualEncoder.from_pretrained(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["stranger"] = tensors.pop("text_projection.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(lambda: DualEncoder.from_pretrained(folder), folder, "1 missing (text_projection.weight)", "stranger")
    tensors["text_projection.weight"] = tensors.pop("stranger") + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert DualEncoder.from_pretrained(folder).fingerprint != before
    with (folder / "vocab.json").open() as file:
        words = json.load(file)
    (folder / "vocab.json").write_text(json.dumps(words | {"q</w>": 200}))
    refused(lambda: DualEncoder.from_pretrained(folder).embed_texts(["q"]), folder, "a token 200", "text tower has 160")
    (folder / "preprocessor_config.json").unlink()
    refused(lambda: DualEncoder.from_pretrained(folder), folder, "image processor")
    refused(lambda: DualEncoder.from_pretrained(tmp_path), tmp_path, "not a matcher's checkpoint")


def test_a_matchers_fingerprint_changes_with_its_weights(encoder, tmp_path):
    model = encoder()
    move(model)
    model.save_pretrained(tmp_path / "one")
    move(model, seed=4)
    model.save_pretrained(tmp_path / "two")
    prints = [DualEncoder.from_pretrained(tmp_path / name).fingerprint for name in ("one", "one", "two")]
    assert prints[0] == prints[1] != prints[2]
