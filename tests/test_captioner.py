"""The captioner against the plain forms: one row per caption, transformers' own generate, whole processors."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from config import CaptionConfig, InputError
from data import CaptionPrompt, QuestionDataset, SquareResize, pack, pixel_batch, share_beginning
from imagery import read_image
from model import Captioner, load_language, load_vision, pixel_store
from scenes import Question, QuestionScene, captions_as_answers, image_files, read_scenes
from tests.conftest import draw, loss_and_gradient, relative
from tests.official_layout import TEXT, write_clip

ASK, ASK_ZH = "Describe the image.", "描述这幅图像。"
CAPTIONS = [
    [(ASK, "a farm field next to a road"), (ASK, "two vehicles"), (ASK, "a farm")],
    [(ASK, "river"), (ASK_ZH, "农田旁边有一条道路"), ("Describe the image in two words.", "a road")],
    [(ASK, "buildings and a road")],
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[QuestionScene]:
    """Three images with captions: to one prompt, to three, and one alone."""
    folder = tmp_path_factory.mktemp("scenes")
    return [
        QuestionScene(str(draw(folder / f"{i}.png", i, (60 + 30 * i, 80))), [Question(*row) for row in rows])
        for i, rows in enumerate(CAPTIONS)
    ]


def examples_of(model, scenes, **options) -> list[dict]:
    data = QuestionDataset(scenes, model.prompt, processor=model.processor, store=pixel_store(model), **options)
    return [data[0, i] for i in range(len(scenes))]


def unsettled(model: Captioner) -> Captioner:
    """LoRA that does something."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


# ----------------------------------------------------------------------------------------------------
# Packing


def test_captions_are_drawn_of_all_prompts_in_turn(captioner, scenes):
    model = captioner()
    many = [Question(ASK, f"a road and {n} vehicles") for n in range(7)]
    scene = QuestionScene(scenes[0].image, [*many, Question(ASK_ZH, "一条道路"), Question("In detail.", "two roads")])

    def drawn(count):
        data = QuestionDataset(
            [scene], model.prompt, store=pixel_store(model), processor=model.processor, texts_per_scene=count
        )
        return [data._drawn(epoch, 0) for epoch in range(40)]

    assert all(len(row) == 3 and row[1:] == [7, 8] for row in drawn(3))
    assert {row[0] for row in drawn(3)} == set(range(7)), "of one prompt any"
    pairs = drawn(2)
    assert all(row[1] > 6 for row in pairs) and {i for row in pairs for i in row} >= {7, 8}, "never two of one prompt"
    assert all(set(row) > {7, 8} for row in drawn(5)) and drawn(5) == drawn(5)


KINDS = [{}, {"projector": "linear"}, {"projector": "pixel_shuffle"}, {"lora_rank": 4}, {"freeze_vision_model": False},
         {"freeze_language_model_except_layers": 3}]  # fmt: skip


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_packed_loss_and_gradient_are_those_of_separate_rows(options, captioner, scenes):
    model = unsettled(captioner(**options)).train()
    plain = loss_and_gradient(model, examples_of(model, scenes), packing=False)
    for budget in (10**6, 60):
        packed = loss_and_gradient(model, examples_of(model, scenes, share=True), packing=True, budget=budget)
        assert packed[0] == pytest.approx(plain[0], rel=1e-5) and relative(packed[1], plain[1]) < 1e-5
        assert packed[2] == plain[2]
    sides = {name.split(".")[0] for name in plain[2]}
    assert sides == {"projector", "language"} | ({"vision"} if "freeze_vision_model" in options else set())


def test_siglip_packs_as_well(captioner, siglip_base, scenes):
    model = captioner(vision_model_name=str(siglip_base), vision_layer=-1, freeze_vision_model=False)
    plain = loss_and_gradient(model, examples_of(model, scenes), packing=False)
    packed = loss_and_gradient(model, examples_of(model, scenes, share=True), packing=True)
    assert packed[0] == pytest.approx(plain[0], rel=1e-5) and relative(packed[1], plain[1]) < 1e-5


def test_cached_features_and_checkpointing_change_nothing(captioner, scenes, tmp_path):
    model = captioner().train()
    plain = loss_and_gradient(model, examples_of(model, scenes, share=True), packing=True)
    store = pixel_store(model)
    tokens = model.token_store(str(tmp_path), store)
    model.prepare_tokens(tokens, store, [scene.image for scene in scenes], batch_size=2)
    cached = examples_of(model, scenes, share=True, tokens=tokens)
    assert "pixel_values" not in cached[0] and cached[0]["tokens"].shape == (16, 32)
    paths = [scene.image for scene in scenes]
    pooled, said = model.embed_images(paths, store), model.caption(paths, store=store, max_tokens=6)
    assert np.allclose(model.embed_images(paths, {}, tokens=tokens), pooled, atol=1e-6), "no picture is read"
    some = model.token_store(str(tmp_path / "some"), store)
    model.prepare_tokens(some, store, paths[1:])
    assert np.allclose(model.embed_images(paths, store, tokens=some), pooled, atol=1e-6)
    assert model.caption(paths, store=store, tokens=some, max_tokens=6) == said
    for file in some.folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])  # as a machine that went down leaves them
    assert model.caption(paths, store=store, tokens=some, max_tokens=6) == said
    again = loss_and_gradient(model, cached, packing=True)
    model.gradient_checkpointing_enable()
    third = loss_and_gradient(model, cached, packing=True)
    for other in (again, third):
        assert other[0] == pytest.approx(plain[0], rel=1e-6) and relative(other[1], plain[1]) < 1e-5


def test_a_full_memory_is_no_attention_of_its_own(captioner, monkeypatch):
    model = captioner()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("model.packed_words", full)
    with pytest.raises(torch.OutOfMemoryError):
        model.can_pack()


def test_what_all_captions_begin_with_is_run_once(captioner, scenes):
    model = captioner()
    apart, together = examples_of(model, scenes), examples_of(model, scenes, share=True)
    for before, after in zip(apart, together):
        moved = len(after["prefix"][0]) - len(before["prefix"][0])
        assert moved > 0 and after["prefix"][1].max() == len(after["prefix"][0]) - 1
        for (ids, targets), (rest, left) in zip(before["branches"], after["branches"]):
            assert targets == left and ids.tolist() == [*after["prefix"][0][-moved:].tolist(), *rest.tolist()]
    assert all(len(ids) == targets for ids, targets in together[0]["branches"]), "one prompt: only captions are left"
    assert all(len(ids) > targets for ids, targets in together[1]["branches"]), "three prompts: they stay apart"


def test_a_caption_does_not_see_another(captioner, scenes):
    model = captioner().eval()
    example = examples_of(model, scenes, share=True)[0]
    alone = [model(**pack([example | {"branches": [branch]}])).item() for branch in example["branches"]]
    assert model(**pack([example])).item() == pytest.approx(sum(alone), rel=1e-5)
    assert model(**pack([example | {"branches": example["branches"][::-1]}])).item() == pytest.approx(
        sum(alone), rel=1e-5
    )


def tiny(kind: str, **options):
    """A tiny language model of another family, saved with the tokenizer of the tiny Qwen3."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=352, **options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # fmt: skip


@pytest.mark.parametrize("kind, options, packs", [
    ("llama", SMALL, True),
    ("qwen2", SMALL, True),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 1}, False),
    ("mistral", SMALL | {"sliding_window": 3}, False),  # branches further away than the window
    ("mistral", SMALL | {"sliding_window": 16}, False),  # as long as a caption, shorter than a row
    ("gemma2", SMALL | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 0.5}, False),  # the head caps its scores
])  # fmt: skip
def test_any_language_model_trains_and_writes(kind, options, packs, captioner, qwen3_base, scenes, tmp_path):
    tiny(kind, **options).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(qwen3_base / name, tmp_path / name)
    model = captioner(language_model_name=str(tmp_path), freeze_language_model_except_layers=1).train()
    assert model.can_pack() == packs
    loss, gradient, names, _ = loss_and_gradient(model, examples_of(model, scenes), packing=False)
    assert (
        np.isfinite(loss)
        and gradient.norm() > 0
        and {name.split(".")[0] for name in names} == {"projector", "language"}
    )
    if packs:
        packed = loss_and_gradient(model, examples_of(model, scenes, share=True), packing=True)
        assert packed[0] == pytest.approx(loss, rel=1e-5) and relative(packed[1], gradient) < 1e-5
    images = [scene.image for scene in scenes]
    assert len(model.caption(images, max_tokens=3)) == 3


# ----------------------------------------------------------------------------------------------------
# Stages, saving, loading


def test_what_each_stage_trains(captioner):
    model = captioner(freeze_language_model_except_layers=1)
    assert {name.split(".")[0] for name in model.trained_names()} == {"projector", "language"}
    assert all(".layers.2." in name for name in model.parameter_groups()["language"])
    model.set_stage(1)
    assert {name.split(".")[0] for name in model.trained_names()} == {"projector"}
    assert not model.parameter_groups()["language"]
    lora = captioner(lora_rank=2, freeze_vision_model=False, vision_layer=-2)
    assert all("lora_" in name for name in lora.parameter_groups()["language"])
    vision = lora.parameter_groups()["vision"]
    assert vision and not any(word in name for name in vision for word in ("layers.2", "post_layernorm"))


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}, KINDS[2] | KINDS[4]], ids=str)
def test_checkpoint_and_whole_folder_write_the_same_captions(options, captioner, qwen3_base, scenes, tmp_path):
    model = unsettled(captioner(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    images = [scene.image for scene in scenes]
    want = model.caption(images)
    model.save_pretrained(tmp_path / "checkpoint")
    model.save_whole(tmp_path / "final")
    again = Captioner.from_pretrained(tmp_path / "checkpoint")
    assert again.caption(images) == want
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert name == other and torch.equal(a, b), name
    moved = (tmp_path / "final").rename(tmp_path / "elsewhere")
    whole = Captioner.from_pretrained(moved)
    assert whole.caption(images) == want and whole.default_prompt() == ASK
    assert set(load_file(moved / "captioner.safetensors")) == {f"projector.{n}" for n in model.projector.state_dict()}
    plain = transformers.AutoModelForCausalLM.from_pretrained(moved / "language")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(plain(ids).logits, model.language(ids).logits, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(moved / "language").chat_template
    _, info = transformers.CLIPVisionModel.from_pretrained(moved / "vision", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # What version 4 of transformers reads is as the hubs have it.
    assert all(key.startswith("vision_model.") for key in load_file(moved / "vision/model.safetensors"))
    for name in ("config.json", "tokenizer_config.json"):
        own = json.loads((qwen3_base / name).read_text())
        assert json.loads((moved / "language" / name).read_text()) == own | {k: "float32" for k in own if "dtype" in k}


def test_lora_on_a_mixture_of_experts_is_merged(captioner, scenes, qwen3_base, tmp_path):
    """The experts are fused tensors, which no LoRA layer of ours takes: attention alone is adapted."""
    config = transformers.AutoConfig.from_pretrained(qwen3_base).to_dict()
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    more = {"intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    mixture = transformers.Qwen3MoeConfig(**{name: config[name] for name in kept}, **more)
    transformers.Qwen3MoeForCausalLM(mixture).save_pretrained(tmp_path / "moe")
    transformers.AutoTokenizer.from_pretrained(qwen3_base).save_pretrained(tmp_path / "moe")
    model = unsettled(captioner(language_model_name=str(tmp_path / "moe"), lora_rank=4, lora_dropout=0.1))
    assert {name.split(".")[-4] for name in model.parameter_groups()["language"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    model.eval()
    model.save_whole(tmp_path / "final")
    plain, ids = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final/language"),
        torch.tensor([[5, 6, 7]]),
    )
    assert torch.allclose(plain(ids).logits, model.language(ids).logits, atol=1e-5)


def test_a_checkpoint_of_the_first_stage_holds_the_projector_alone(captioner, scenes, tmp_path):
    model = captioner()
    model.set_stage(1)
    model.save_pretrained(tmp_path)
    assert all(name.startswith("projector.") for name in load_file(tmp_path / "captioner.safetensors"))
    assert Captioner.from_pretrained(tmp_path).caption([scenes[0].image]) == model.caption([scenes[0].image])


def test_broken_folders_are_named(captioner, clip_base, tmp_path):
    with pytest.raises(InputError, match=r"captioner.json is missing"):
        Captioner.from_pretrained(tmp_path)
    (tmp_path / "final").mkdir()
    with pytest.raises(InputError, match="did you mean its final/"):
        Captioner.from_pretrained(tmp_path)
    model = captioner()
    model.save_pretrained(tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "captioner.safetensors")
    tensors["stranger"] = tensors.pop("projector.layers.1.weight")
    save_file(tensors, tmp_path / "c" / "captioner.safetensors")
    with pytest.raises(InputError, match=r"1 missing .*projector.layers.1.weight.* 1 unexpected .*stranger"):
        Captioner.from_pretrained(tmp_path / "c")
    record = json.loads((tmp_path / "c" / "captioner.json").read_text())
    other = write_clip(tmp_path / "other", seed=5)
    (tmp_path / "c" / "captioner.json").write_text(json.dumps(record | {"vision_model": str(other)}))
    with pytest.raises(InputError, match=r"other: this vision model .* is not the one"):
        Captioner.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("options, message", [
    ({"freeze_language_model_except_layers": 4}, "expected 0 to 3"),
    ({"vision_layer": 9}, "expected -4 to 3"),
    ({"vision_model_name": "nowhere"}, "nowhere: no model here"),
])  # fmt: skip
def test_settings_that_no_base_has(options, message, captioner):
    with pytest.raises(InputError, match=message):
        captioner(**options)


def test_bases_of_another_kind_are_refused(captioner, clip_base, qwen3_base, tmp_path):
    with pytest.raises(InputError, match="model_type 'qwen3': expected one of clip, siglip"):
        captioner(vision_model_name=str(qwen3_base))
    with pytest.raises(InputError, match="not a language model"):
        captioner(language_model_name=str(clip_base))
    odd = write_clip(tmp_path, image_size=42)
    with pytest.raises(InputError, match="3 x 3 patches cannot be joined"):
        captioner(vision_model_name=str(odd), projector="pixel_shuffle")


# ----------------------------------------------------------------------------------------------------
# Official layouts


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_features_are_those_of_the_whole_model(family, clip_base, siglip_base, captioner, scenes):
    folder = clip_base if family == "clip" else siglip_base
    whole = transformers.AutoModel.from_pretrained(folder).eval()
    model = captioner(vision_model_name=str(folder))
    rgb = read_image(scenes[1].image, pixel_store(model).settings).rgb
    processor = type(model.processor).from_pretrained(folder)
    resized = SquareResize(processor)(rgb)  # tests/test_data.py compares it
    inputs = processor(images=[resized], do_resize=False, return_tensors="pt")
    ours = pixel_batch([resized], processor)
    assert torch.allclose(ours["pixel_values"], inputs["pixel_values"], atol=1e-6)
    with torch.no_grad():
        states = whole.vision_model(inputs["pixel_values"], output_hidden_states=True)
        features = model.encode_images(ours["pixel_values"])
    skip = 1 if family == "clip" else 0
    assert torch.allclose(features, states.hidden_states[-2][:, skip:], atol=5e-6) and features.shape == (1, 16, 32)
    pooled = model.embed_images([scenes[1].image], pixel_store(model))
    assert np.allclose(pooled[0], torch.nn.functional.normalize(states.pooler_output, dim=-1)[0].numpy(), atol=1e-5)


def test_missing_and_unexpected_tensors_are_errors(clip_base, qwen3_base, tmp_path):
    broken = shutil.copytree(clip_base, tmp_path / "clip")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("vision_model.pre_layrnorm.weight")
    tensors["vision_model.strange.weight"] = torch.zeros(2)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing .*pre_layrnorm.weight.* 1 unexpected .*strange"):
        load_vision(broken)
    broken = shutil.copytree(qwen3_base, tmp_path / "qwen3")
    file = sorted(broken.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors.pop("model.layers.0.self_attn.q_norm.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing .*q_norm"):
        load_language(broken)


def test_squashing_loses_no_edge(captioner, tmp_path):
    model, cut = captioner(image_fit="squash"), captioner()
    rgb = np.zeros((50, 200, 3), np.uint8)
    rgb[:, :40] = 255  # left of what a centre crop keeps
    assert SquareResize(model.processor)(rgb)[:, :5].min() > 200 and SquareResize(cut.processor)(rgb).max() == 0
    model.save_pretrained(tmp_path)
    assert SquareResize(Captioner.from_pretrained(tmp_path).processor)(rgb)[:, :5].min() > 200


# ----------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_captions_equal_transformers_generate_one_by_one(how, captioner, scenes):
    model = captioner(projector="pixel_shuffle").eval()
    with torch.no_grad():  # images loud enough to matter, and a head that does not repeat the last word
        model.projector.layers[-1].weight.mul_(30)
        head = model.language.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    images = [scene.image for scene in scenes]
    want = []
    for image in images:
        store = pixel_store(model)
        ids = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"@\n{ASK}"}], add_generation_prompt=True, enable_thinking=False, tokenize=False
        )  # fmt: skip
        before, after = (model.tokenizer(part, return_tensors="pt")["input_ids"] for part in ids.split("@"))
        words = model.language.get_input_embeddings()
        with torch.no_grad():
            seen = model.projector(model.encode_images(pixel_batch([store[image]], model.processor)["pixel_values"]))
            embedded = torch.cat([words(before), seen, words(after)], 1)
            said = model.language.generate(
                inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2]), max_new_tokens=12, do_sample=False,
                temperature=None, top_p=None, top_k=None, suppress_tokens=model.never, **how,
            )  # fmt: skip
        want.append(" ".join(model.tokenizer.decode(said[0], skip_special_tokens=True).split()))
    assert len(set(want)) > 1, "captions that are all alike prove nothing"
    assert model.caption(images, **how) == want
    assert [model.caption([image], **how)[0] for image in images] == want
    assert model.caption(images, batch_size=2, **how) == want


def test_length_prompt_and_drawing(captioner, scenes):
    model = captioner()
    image = [scenes[0].image]
    assert len(model.tokenizer(model.caption(image, max_tokens=2)[0])["input_ids"]) <= 2
    assert model.caption(image) == model.caption(image, temperature=0.0)
    torch.manual_seed(1)
    drawn = {model.caption(image, temperature=5.0)[0] for _ in range(4)}
    assert len(drawn) > 1
    assert model.caption(image, temperature=5.0, top_p=1e-6) == model.caption(image), "the likeliest word alone"


def test_no_thought_leaks_into_a_caption(captioner, scenes):
    """The prompt turns thinking off, the thinking tokens cannot be drawn, and what is written out as text is cut."""
    model = captioner()
    text = model.tokenizer.decode(model.prompt.branches([ASK])[0][0])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    think = model.tokenizer.convert_tokens_to_ids("<think>")
    head = model.language.get_output_embeddings()
    with torch.no_grad():  # a base that would always begin to think
        head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[think] = head.weight.sum(0) * 50
    assert "think" not in model.caption([scenes[0].image])[0]

    class Thinker:
        def batch_decode(self, *_, **__):
            return ["<think>\nA farm? I see</think>\n\na farm", "a road <think> or not"]

    model.tokenizer.__class__.batch_decode, kept = Thinker.batch_decode, model.tokenizer.__class__.batch_decode
    try:
        assert model.caption([scene.image for scene in scenes[:2]]) == ["a farm", "a road"]
    finally:
        model.tokenizer.__class__.batch_decode = kept


def test_a_trained_vision_encoder_beside_16_bits(captioner, scenes, tmp_path):
    model = captioner(dtype=torch.bfloat16, freeze_vision_model=False)
    assert {p.dtype for p in model.vision.parameters()} == {torch.float32}
    images = [scene.image for scene in scenes]
    assert len(model.caption(images, max_tokens=3)) == len(model.embed_images(images, pixel_store(model))) == 3


def test_rotary_frequencies_stay_float32(captioner, tmp_path):
    captioner().save_whole(tmp_path / "final")
    model = Captioner.from_pretrained(tmp_path / "final", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_sixteen_bit_bases(captioner, scenes):
    model = captioner(dtype=torch.bfloat16)
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}, {p.dtype for p in model.parameters()}
    assert kinds == ({torch.float32}, {torch.float32, torch.bfloat16})
    assert model.can_pack()
    assert len(model.caption([scene.image for scene in scenes], max_tokens=3)) == 3
    rows = examples_of(model, scenes, share=True)
    with model.mixed():
        loss, gradient, *_ = loss_and_gradient(model, rows, packing=True)
    assert np.isfinite(loss) and gradient.dtype == torch.float32 and gradient.norm() > 0


# ----------------------------------------------------------------------------------------------------
# Data


def test_a_prompt_is_the_same_tomorrow(qwen3_base):
    """Llama 3.2's template writes today's date where it is given none."""
    _, tokenizer = load_language(qwen3_base)
    date = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    tokenizer.chat_template = date + tokenizer.chat_template
    assert tokenizer.decode(CaptionPrompt(tokenizer, 2).head).startswith("26 Jul 2024")


def test_a_model_without_chat_template_reads_a_line(qwen3_base):
    _, tokenizer = load_language(qwen3_base)
    tokenizer.chat_template = None
    prompt = CaptionPrompt(tokenizer, 2)
    ids, targets = prompt.branches([ASK], ["a road"])[0]
    assert prompt.prefix()[0].tolist() == [-1, -1] and tokenizer.decode(ids[:-targets]) == f"\n{ASK}\n"
    assert tokenizer.decode(ids[-targets:]) == "a road" + tokenizer.eos_token


def test_captions_answer_their_rows_prompt_or_their_languages(tmp_path):
    draw(tmp_path / "a.png", 0)
    rows = [{"image": "a.png", "caption": "a road"}, {"image": "a.png", "caption": "一条道路"},
            {"image": "a.png", "caption": "a road, two cars", "prompt": "In detail."}]  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(rows, ensure_ascii=False))
    config = CaptionConfig()
    scene = captions_as_answers(read_scenes(tmp_path).scenes, config.prompt, config.prompt_zh)[0]
    assert [(q.text, q.kind) for q in scene.questions] == [(ASK, "en"), (ASK_ZH, "zh"), ("In detail.", "en")]
    (tmp_path / "s.jsonl").write_text(
        json.dumps({"image": "a.png", "captions": ["x"], "zh_prompt": "问？", "zh_answer": " 路 "}, ensure_ascii=False)
    )
    scene = read_scenes(tmp_path / "s.jsonl").scenes[0]
    assert scene.texts == ["x", "路"] and scene.prompts == {"路": "问？"}


def test_image_files(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        image_files(tmp_path / "none")
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(InputError, match="no image in it"):
        image_files(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "deep/a.tif", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in image_files(tmp_path)] == ["b.PNG", "a.tif"]


def test_sharing_leaves_targets_alone():
    scene = {"prefix": (np.array([1]), np.zeros((3, 1), np.int64)),
             "branches": [(np.array([7, 8, 9]), 1), (np.array([7, 8, 9, 9]), 2)]}  # fmt: skip
    shared = share_beginning(scene)
    assert shared["prefix"][0].tolist() == [1, 7, 8] and shared["prefix"][1][0].tolist() == [0, 1, 2]
    assert [ids.tolist() for ids, _ in shared["branches"]] == [[9], [9, 9]]
    assert TEXT  # the tokenizer's text is the tests' only vocabulary
