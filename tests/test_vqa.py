"""Scene packing and the VQA wrapper, against the plain forms: one row per question, transformers' own generate."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file

from config import InputError, VQAConfig
from data import PixelStore, QuestionCollator, QwenResize, TokenStore, image_settings, pack, split_work
from model import VQA, load_qwen
from scenes import Question, QuestionScene
from tests.conftest import loss_and_gradient, question_dataset, relative
from tests.official_layout import write_qwen_vl
from trainer import held_out_loss

# ----------------------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("budget", [10**6, 200, 90], ids=["one piece", "scenes apart", "a scene in pieces"])
def test_packed_loss_and_gradient_are_those_of_separate_rows(family, budget, base, qwen2_base, answerer, scenes):
    model = answerer(base_model=str(base if family == "qwen2_5_vl" else qwen2_base), strength=0.02).train()
    examples = [question_dataset(model, scenes)[0, i] for i in range(3)]
    assert len({example["grid"] for example in examples}) == 3, "images of different sizes"
    plain = loss_and_gradient(model, examples, packing=False)
    packed = loss_and_gradient(model, examples, packing=True, budget=budget)
    assert packed[3] == {10**6: 1, 200: 3, 90: 6}[budget]
    assert packed[0] == pytest.approx(plain[0], rel=1e-5) and relative(packed[1], plain[1]) < 1e-5


@pytest.mark.parametrize("options", [{"vision_tower": "full"}, {"vision_tower": "lora"}, {"merger": "full"}, {"use_dora": True},
                                     {"use_rslora": True, "lora_targets": ["q_proj", "v_proj"]}], ids=str)  # fmt: skip
def test_parity_of_every_kind_of_adapter(options, answerer, scenes):
    model = answerer(strength=0.02, **options).train()
    examples = [question_dataset(model, scenes)[0, i] for i in range(3)]
    plain = loss_and_gradient(model, examples, packing=False)
    packed = loss_and_gradient(model, examples, packing=True)
    assert packed[0] == pytest.approx(plain[0], rel=1e-5) and relative(packed[1], plain[1]) < 1e-5
    vision = [p for name, p in model.named_parameters() if p.requires_grad and "visual" in name]
    assert bool(vision) == ("vision_tower" in options or "merger" in options)
    assert all(p.grad is not None for p in vision)


def test_a_branch_does_not_see_another(answerer, scenes):
    """Loss of a question is the same whatever stands beside it, and a wrong tree would show here."""
    model = answerer().eval()
    example = question_dataset(model, scenes)[0, 0]
    together = pack([example])
    alone = [model(**pack([example | {"branches": [branch]}])).item() for branch in example["branches"]]
    assert model(**together).item() == pytest.approx(sum(alone), rel=1e-5)
    swapped = pack([example | {"branches": example["branches"][::-1]}])
    assert model(**swapped).item() == pytest.approx(sum(alone), rel=1e-5)


def test_gradient_checkpointing_and_cached_tokens_change_nothing(answerer, scenes, tmp_path):
    model = answerer(strength=0.02).train()
    examples = [question_dataset(model, scenes)[0, i] for i in range(3)]
    plain = loss_and_gradient(model, examples, packing=True)
    store = PixelStore(QwenResize(model.processor), image_settings(VQAConfig()))
    tokens = model.token_store(str(tmp_path), store)
    model.prepare_tokens(tokens, store, [scene.image for scene in scenes])
    cached = [question_dataset(model, scenes, tokens=tokens)[0, i] for i in range(3)]
    assert "pixel_values" not in cached[0] and cached[0]["tokens"].shape[0] < cached[2]["tokens"].shape[0]
    again = loss_and_gradient(model, cached, packing=True)
    assert again[0] == pytest.approx(plain[0], rel=1e-6) and relative(again[1], plain[1]) < 1e-5
    model.gradient_checkpointing_enable()
    third = loss_and_gradient(model, cached, packing=True)
    assert third[0] == pytest.approx(plain[0], rel=1e-6) and relative(third[1], plain[1]) < 1e-5


def test_lora_reads_16_bits_as_they_are(answerer, scenes):
    """Autocast takes what LoRA reads to bfloat16: that peft made it float32 before would change no bit."""
    model = answerer(strength=0.02, dtype=torch.bfloat16).train()
    examples = [question_dataset(model, scenes)[0, i] for i in range(3)]
    found = []
    for active in (False, True):
        with disable_input_dtype_casting(model, active=active), torch.autocast("cpu", torch.bfloat16):
            found.append(loss_and_gradient(model, examples, packing=True))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1]) and found[0][1].any()


def test_aligned_and_split_tables_change_nothing(answerer, scenes):
    model = answerer(strength=0.02).train()
    examples = [question_dataset(model, scenes)[0, i] for i in range(3)]
    long = Question("Is there " + "a road and " * 12 + "a river?", "no", "presence")
    examples += [question_dataset(model, [QuestionScene(scenes[0].image, [*scenes[0].questions, long])])[0, 0]]
    found = []
    for options in ({}, {"align": 8}, {"split": True}):
        packed = pack(examples, **options)
        tables = [packed[name] for name in ("prefix_rows", "branch_rows", "long_rows")]
        assert "align" not in options or not any(table.shape[-1] % 8 for table in tables)
        assert bool(tables[2].numel()) == ("split" in options)
        assert not tables[2].numel() or (tables[1].shape[-1] < tables[2].shape[-1] and tables[2].shape[1] == 1)
        model.zero_grad()
        loss = model(**packed)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6) and relative(gradient, found[0][1]) < 1e-5


def test_tokens_of_a_file_cut_short_are_made_anew(answerer, scenes, tmp_path):
    model = answerer()
    store = PixelStore(QwenResize(model.processor), image_settings(VQAConfig()))
    tokens = TokenStore(str(tmp_path), "recipe")
    with pytest.raises(KeyError):
        tokens[scenes[0].image]
    model.prepare_tokens(tokens, store, [scenes[0].image])
    whole = tokens[scenes[0].image][0].clone()
    file = next(tokens.folder.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    model.prepare_tokens(tokens, store, [scenes[0].image])
    assert torch.equal(tokens[scenes[0].image][0], whole)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_prefix_positions_are_those_of_transformers(family, base, qwen2_base, answerer):
    model = answerer(base_model=str(base if family == "qwen2_5_vl" else qwen2_base))
    for grid in ((1, 2, 2), (1, 4, 10), (1, 12, 6)):
        ids, positions = model.prompt.prefix(grid)
        row = torch.tensor(ids)[None]
        image = (row == model.prompt.image_token).int()
        expected, _ = model.qwen.model.get_rope_index(row, image, torch.tensor([grid]))
        assert torch.equal(expected[:, 0], torch.tensor(positions)), grid


def test_prompt_is_the_chat_template_and_its_parts_tokenize_as_the_whole(answerer):
    for template in ("{question}", "Answer with one word.\n{question}", "{question}\nBe short."):
        prompt = answerer(prompt=template).prompt
        for question in ("Is there a river in the image?", "图像中有河流吗？", " 3 roads"):
            content = [{"type": "image"}, {"type": "text", "text": template.replace("{question}", question)}]
            whole = prompt.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            ids = prompt.tokenizer(whole, add_special_tokens=False)["input_ids"]
            parts = [*prompt.prefix((1, 2, 2))[0], *prompt.branches([question])[0][0]]
            assert parts == ids, (template, question)
    ((ids, targets),) = prompt.branches(["a?"], ["yes"])
    assert targets == len(prompt.tokenizer("yes")["input_ids"]) + 1 and ids[-1] == prompt.tokenizer.eos_token_id


@pytest.mark.parametrize("template", ["no field", "{question} {question}"])
def test_prompt_needs_one_question(template, answerer):
    with pytest.raises(InputError, match="--prompt"):
        answerer(prompt=template)


def test_split_work_keeps_order_budget_and_every_branch():
    rng = np.random.default_rng(0)
    for _ in range(200):
        prefixes = rng.integers(1, 50, rng.integers(1, 6)).tolist()
        branches = [rng.integers(1, 30, rng.integers(1, 12)).tolist() for _ in prefixes]
        budget = int(rng.integers(40, 400))
        pieces = split_work(prefixes, branches, budget)
        listed = [(s, b) for piece in pieces for s, chosen in piece for b in chosen]
        assert listed == [(s, b) for s, row in enumerate(branches) for b in range(len(row))]
        for piece in pieces:
            used = sum(prefixes[s] + sum(branches[s][b] for b in chosen) for s, chosen in piece)
            assert used <= budget or (len(piece) == 1 and len(piece[0][1]) == 1)


@pytest.mark.parametrize("split", [False, True])
def test_packed_row_holds_every_token_once(split, answerer, scenes):
    model = answerer()
    examples = [question_dataset(model, scenes)[0, i] for i in range(3)]
    packed = pack(examples, split=split)
    whole = np.concatenate([np.concatenate([e["prefix"][0], *[b for b, _ in e["branches"]]]) for e in examples])
    assert packed["input_ids"][0].tolist() == whole.tolist()
    laid = torch.cat([packed[name].flatten() for name in ("prefix_rows", "branch_rows", "long_rows")])
    assert laid[packed["order"]].tolist() == list(range(len(whole)))
    answers = [
        t for s in scenes for q in s.questions for t in [*model.tokenizer(q.answer)["input_ids"], model.prompt.end]
    ]
    assert packed["labels"].tolist() == answers
    assert torch.equal(packed["input_ids"][0][packed["label_rows"] + 1], packed["labels"])


def test_texts_per_scene_draws_anew_each_epoch(answerer, scenes):
    data = question_dataset(answerer(), scenes, texts_per_scene=2, seed=3)
    drawn = {e: [len(b) for b, _ in data[e, 0]["branches"]] for e in range(12)}
    assert all(len(row) == 2 for row in drawn.values()) and len({tuple(row) for row in drawn.values()}) > 1
    assert [len(b) for b, _ in data[5, 0]["branches"]] == drawn[5] and len(data[0, 1]["branches"]) == 1


# ----------------------------------------------------------------------------------------------------
# Answers


def sharpen(folder):
    """Words as far apart as a trained model's, so that an adapter alone can make any of them likely."""
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        made = {
            key: value * 20 if "embed_tokens" in key or "lm_head" in key else value for key, value in tensors.items()
        }
        save_file(made, shard, {"format": "pt"})
    return folder


def overfit(model, scenes, steps: int = 80) -> None:
    """Train until most answers are learnt; the loss must have fallen."""
    model.train()
    examples = [question_dataset(model, scenes)[0, i] for i in range(len(scenes))]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.006)
    losses = []
    for _ in range(steps):
        losses.append(loss_and_gradient(model, examples, packing=True)[0])
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0], losses[::8][::8][::8]
    model.eval()


def plain_answers(model, scenes, room: int, qwen=None) -> list[list[str]]:
    """transformers' own greedy generate, a row at a time, through its own positions and cache."""
    qwen, made = qwen or model.qwen, []
    for scene in scenes:
        made.append([])
        for question in scene.questions:
            item = model.scene_items([(scene.image, [question.text])])[0, 0]
            ids = torch.tensor(np.concatenate([item["prefix"][0], item["branches"][0][0]]))[None]
            out = qwen.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=item["pixel_values"],
                image_grid_thw=torch.tensor([item["grid"]]), mm_token_type_ids=(ids == model.prompt.image_token).int(),
                max_new_tokens=room, do_sample=False, repetition_penalty=1.0,
            )  # fmt: skip
            made[-1].append(model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return made


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("budget", [10**6, 150])
def test_answers_are_those_of_generate(family, budget, base, qwen2_base, answerer, scenes):
    model = answerer(base_model=str(base if family == "qwen2_5_vl" else qwen2_base)).eval()
    asked = [(scene.image, [q.text for q in scene.questions]) for scene in scenes]
    assert model.answer(asked, max_tokens=7, budget=budget) == plain_answers(model, scenes, 7)


def test_answers_that_end_early_are_those_of_generate(answerer, scenes, tmp_path):
    """A model that has learnt answers of different lengths: branches finish at different moments."""
    model = answerer(base_model=str(sharpen(write_qwen_vl(tmp_path / "base"))), lora_rank=16)
    overfit(model, scenes)
    asked = [(scene.image, [q.text for q in scene.questions]) for scene in scenes]
    made, expected = model.answer(asked, max_tokens=16), plain_answers(model, scenes, 16)
    lengths = {len(model.tokenizer(text)["input_ids"]) for row in expected for text in row}
    assert made == expected and len(lengths) > 1, lengths


def test_answers_under_autocast_of_another_type(answerer, scenes):
    """As an evaluation inside a training with --fp16 runs: float32 weights, float16 products."""
    model = answerer().eval()
    asked = [(scene.image, [q.text for q in scene.questions]) for scene in scenes]
    with torch.autocast("cpu", torch.float16):
        made = model.answer(asked, max_tokens=3)
    assert list(map(len, made)) == [len(questions) for _, questions in asked]


def test_before_is_a_fresh_base_and_the_adapter_comes_back(answerer, scenes):
    for options in ({}, {"merger": "full"}, {"vision_tower": "full"}):
        model = answerer(strength=0.3, **options).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "visual" in name:
                    parameter.mul_(1.5)
        asked = [(scene.image, [q.text for q in scene.questions]) for scene in scenes]
        after = model.answer(asked, max_tokens=7)
        fresh = load_qwen(model.settings.base_model, torch.float32).eval()
        expected = plain_answers(model, scenes, 7, qwen=fresh)
        with model.before():
            assert model.answer(asked, max_tokens=7) == expected
        assert model.answer(asked, max_tokens=7) == after != expected


def test_candidates_are_scored_as_whole_rows(answerer, scenes):
    """The chosen answer is the one whose tokens are the most probable after the question, each row on its own."""
    model = answerer(strength=0.3).eval()
    model.settings.answers = {"presence": ["yes", "no", "有"], "count": ["0", "3", "12", "a farm field"]}
    made = model.answer([(scene.image, scene.questions) for scene in scenes], decode="candidates")
    few = model.answer([(scene.image, scene.questions) for scene in scenes], decode="candidates", budget=100)
    assert made == few
    for scene, row in zip(scenes, made):
        for question, said in zip(scene.questions, row):
            scores = {}
            for answer in model.settings.answers[question.kind]:
                one = QuestionScene(scene.image, [Question(question.text, answer)])
                batch = QuestionCollator(10**6, packing=False, pad_id=0)([question_dataset(model, [one])[0, 0]])
                scores[answer] = -model(**batch["pieces"][0]).item()
            assert said == max(scores, key=scores.get), scores
    free = model.answer([(scenes[0].image, ["A question of no type?"])], decode="candidates")
    assert free[0][0] in {a for known in model.settings.answers.values() for a in known}
    model.settings.answers = {}
    with pytest.raises(InputError, match="records no answers"):
        model.answer([(scenes[0].image, ["a?"])], decode="candidates")


def test_blind_answers_do_not_depend_on_the_image(answerer, scenes):
    model = answerer(strength=0.3).eval()
    texts = ["Is there a river?", "How many?"]
    made = model.answer([(scene.image, texts) for scene in scenes], blind=True, max_tokens=5)
    assert made[0] == made[1] == made[2]
    assert made != model.answer([(scene.image, texts) for scene in scenes], max_tokens=5)


def test_no_question_is_no_answer(answerer, scenes):
    model = answerer()
    assert model.answer([]) == [] and model.answer([(scenes[0].image, [])]) == [[]]


# ----------------------------------------------------------------------------------------------------
# Adapters on disk


@pytest.mark.parametrize("options", [{}, {"vision_tower": "lora"}, {"merger": "full"}, {"vision_tower": "full"},
                                     {"use_dora": True}, {"use_rslora": True}], ids=str)  # fmt: skip
def test_saved_adapter_answers_the_same(options, answerer, scenes, tmp_path):
    model = answerer(strength=0.2, **options).eval()
    asked = [(scene.image, [q.text for q in scene.questions]) for scene in scenes]
    model.save_pretrained(tmp_path / "a")
    again = VQA.from_pretrained(tmp_path / "a")
    assert again.answer(asked, max_tokens=6) == model.answer(asked, max_tokens=6)
    assert all(torch.equal(value, again.adapter_state()[key]) for key, value in model.adapter_state().items())


def test_plain_peft_loads_what_we_save(answerer, scenes, tmp_path):
    from peft import PeftModel

    model = answerer(strength=0.2).eval()
    model.save_pretrained(tmp_path / "a")
    plain = PeftModel.from_pretrained(load_qwen(model.settings.base_model, torch.float32), tmp_path / "a").eval()
    assert plain_answers(model, scenes, 6, qwen=plain) == plain_answers(model, scenes, 6)


def test_adapters_with_4x_names_are_recognised(answerer, scenes, tmp_path):
    """As peft saved them under transformers 4.49: `model.layers…`, `visual…`, and no vqa.json beside them."""
    model = answerer(strength=0.2, vision_tower="lora").eval()
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    old = {
        key.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ): value
        for key, value in tensors.items()
    }
    assert not set(old) & set(tensors)
    save_file(old, tmp_path / "a" / "adapter_model.safetensors")
    record = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    record["target_modules"] = r"^(?!.*visual).*(?:q_proj|v_proj).*$"  # a pattern of another tool, of no use here
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(record))
    (tmp_path / "a" / "vqa.json").unlink()
    config = VQAConfig(max_pixels=112 * 112, min_pixels=28 * 28)
    again = VQA.from_pretrained(tmp_path / "a", config=config)
    asked = [(scene.image, [q.text for q in scene.questions]) for scene in scenes]
    assert again.answer(asked, max_tokens=6) == model.answer(asked, max_tokens=6)


def test_module_patterns_with_4x_names_are_recognised(answerer, tmp_path):
    """A pattern that names no module would be passed over in silence."""
    model = answerer(strength=0.2)
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    record = json.loads(file.read_text())
    scaled = record["lora_alpha"] * 3
    new, old = (f"{path}layers.0.self_attn.q_proj" for path in ("model.language_model.", "model."))
    found = {}
    for name, path in (("new", new), ("old", old), ("none", "model.layers.9.self_attn.q_proj")):
        file.write_text(json.dumps(record | {"alpha_pattern": {path: scaled}}))
        module = dict(VQA.from_pretrained(tmp_path / "a").peft.base_model.model.named_modules())[new]
        found[name] = module.scaling["default"]
    assert found["new"] == found["old"] == pytest.approx(3 * found["none"])


def test_a_base_that_cannot_be_asked_is_refused_in_words(base, tmp_path, vqa_settings):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    with pytest.raises(InputError, match=r"quantised \(awq\); give the base"):
        VQA.from_base(vqa_settings(base_model=str(folder)))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").unlink()  # tokenizer_config.json has one that takes texts alone
    with pytest.raises(InputError, match="its chat template takes no image and question"):
        VQA.from_base(vqa_settings(base_model=str(folder)))


def broken(tmp_path, model, change) -> str:
    """The message when an adapter whose tensors `change` has altered is loaded."""
    folder = tmp_path / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(folder, tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        VQA.from_pretrained(folder)
    return str(caught.value)


def test_adapters_that_do_not_arrive_are_errors(answerer, tmp_path):
    model = answerer()

    def renamed(_, tensors):
        for key in [key for key in tensors if "layers.1." in key]:
            tensors[key.replace("layers.1.", "layers.7.")] = tensors.pop(key)

    assert "of another base" in broken(tmp_path, model, renamed)
    assert "missing" in broken(tmp_path, model, lambda _, t: t.pop(next(key for key in t if "lora_B" in key)))

    def without_a_module(_, tensors):
        name = next(key for key in tensors if "lora_B" in key)
        for key in (name, name.replace("lora_B", "lora_A")):
            tensors.pop(key)

    assert "holds nothing for model.language_model.layers" in broken(tmp_path, model, without_a_module)
    assert "unexpected" in broken(
        tmp_path, model, lambda _, t: t.update({"base_model.model.extra.weight": torch.ones(2)})
    )

    def narrower(_, tensors):
        key = next(key for key in tensors if "lora_A" in key)
        tensors[key] = tensors[key][:, :-1].contiguous()

    assert "of another shape" in broken(tmp_path, model, narrower)
    zeros = broken(tmp_path, model, lambda _, t: [t[key].zero_() for key in t if "lora_B" in key])
    assert "never trained" in zeros
    nan = broken(tmp_path, model, lambda _, t: t[next(key for key in t if "lora_A" in key)][0].fill_(torch.nan))
    assert "lora_A.weight holds NaN" in nan and "diverged" in nan
    without_a = broken(tmp_path, model, lambda _, t: [t[key].zero_() for key in t if "lora_A" in key])
    assert "changes no output" in without_a

    def other_kind(folder, _):
        record = json.loads((folder / "adapter_config.json").read_text()) | {"peft_type": "IA3"}
        (folder / "adapter_config.json").write_text(json.dumps(record))

    assert "expected 'LORA'" in broken(tmp_path, model, other_kind)

    def other_start(folder, _):
        record = json.loads((folder / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa_niter_4"}
        (folder / "adapter_config.json").write_text(json.dumps(record))

    assert "changes the base itself" in broken(tmp_path, model, other_start)
    assert "not an adapter" in broken(tmp_path, model, lambda folder, _: (folder / "adapter_config.json").unlink())


def test_another_base_is_an_error(answerer, tmp_path):
    answerer().save_pretrained(tmp_path / "a")
    other = write_qwen_vl(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match="is not the one"):
        VQA.from_pretrained(tmp_path / "a", base_model=str(other))
    with pytest.raises(InputError, match="no model here"):
        VQA.from_pretrained(tmp_path / "a", base_model=str(tmp_path / "nowhere"))


def test_a_base_that_was_moved_is_found_by_its_flag(base, answerer, tmp_path):
    """From then on the model knows where it lies: merging and saving again need no flag."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(base, first)
    (first / "vocab.json").write_text("{}")  # merge copies from the base what the tokenizer does not write
    answerer(base_model=str(first)).save_pretrained(tmp_path / "a")
    first.rename(second)
    with pytest.raises(InputError, match="no model here"):
        VQA.from_pretrained(tmp_path / "a")
    model = VQA.from_pretrained(tmp_path / "a", base_model=str(second))
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "vqa.json").read_text())["base_model"] == str(second)
    model.merge(tmp_path / "merged")
    assert (tmp_path / "merged" / "vocab.json").is_file() and load_qwen(tmp_path / "merged", torch.float32)
    for name in ("config.json", "tokenizer_config.json"):  # version 4 of transformers reads them
        assert json.loads((tmp_path / "merged" / name).read_text()) == json.loads((second / name).read_text())
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert len(modes) == 1  # a server of another user reads the weights as it does the settings


def test_base_with_tensors_that_do_not_fit_is_an_error(base, vqa_settings, tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(base, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors.pop(next(key for key in tensors if "norm" in key))
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(InputError, match="missing"):
        VQA.from_base(vqa_settings(base_model=str(folder)))


def test_quantization_without_cuda_is_an_error(vqa_settings):
    with pytest.raises(InputError, match="needs CUDA"):
        VQA.from_base(vqa_settings(quantize="4"))


def test_new_adapter_answers_as_the_base(vqa_settings, scenes):
    model = VQA.from_base(vqa_settings(), seed=4).eval()
    asked = [(scene.image, [q.text for q in scene.questions]) for scene in scenes]
    with model.before():
        before = model.answer(asked, max_tokens=5)
    assert model.answer(asked, max_tokens=5) == before


def test_what_is_trained_whole_beside_a_base_of_16_bits_is_float32(answerer, scenes, tmp_path):
    for options in ({"merger": "full"}, {"vision_tower": "full"}):
        model = answerer(dtype=torch.bfloat16, **options).eval()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert model.answer([(scenes[0].image, ["Is there a road?"])])  # outside of the Trainer's autocast, too
        model.save_pretrained(tmp_path / "a")
        again = VQA.from_pretrained(tmp_path / "a", dtype=torch.bfloat16, trainable=True)
        assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}
        state = again.adapter_state()
        assert all(torch.equal(value, state[key]) for key, value in model.adapter_state().items())


def test_reset_makes_doras_magnitudes_new(answerer, vqa_settings):
    model = answerer(seed=2, use_dora=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    model.reset_adapter(2)
    new = VQA.from_base(vqa_settings(use_dora=True), seed=2).adapter_state()
    for name, value in model.adapter_state().items():
        assert "magnitude" not in name or torch.allclose(value, new[name]), name
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_doras_magnitudes_are_measured_in_float32(vqa_settings):
    model = VQA.from_base(vqa_settings(use_dora=True), seed=2, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.adapter_state().items() if "magnitude" in name}
    model.reset_adapter(3)  # B is zero: the base's own norms again
    assert before and all(
        torch.equal(value, before[name]) for name, value in model.adapter_state().items() if name in before
    )


def test_marks_in_an_answer_are_no_images(answerer, scenes):
    branch, targets = answerer().prompt.branches(["a?"], ["<|image_pad|>"])[0]
    assert answerer().prompt.image_token not in branch and targets >= 1


def test_reset_makes_the_adapter_new(answerer, vqa_settings):
    model = answerer(seed=2, merger="full")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "merger" in name:
                parameter.add_(1)
    model.reset_adapter(2)
    new = VQA.from_base(vqa_settings(merger="full"), seed=2)
    b = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert b and not any(p.any() for p in b)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, new.get_parameter(name)), name


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("tie", [True, False])
def test_official_layout_trains_saves_merges_and_answers_the_same(family, tie, tmp_path, scenes, vqa_settings):
    """A sharded base with 4.x names: load, train, save, merge, reload in plain transformers, same answers."""
    from transformers import AutoModelForImageTextToText

    folder = sharpen(write_qwen_vl(tmp_path / "base", family, shards=3, tie=tie))
    keys = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.self_attn.q_proj.weight" in keys and ("lm_head.weight" in keys) == (not tie)
    model = VQA.from_base(vqa_settings(base_model=str(folder), lora_rank=16))
    overfit(model, scenes)
    model.save_pretrained(tmp_path / "adapter")
    expected = plain_answers(model, scenes, 6)
    with model.before():
        assert plain_answers(model, scenes, 6) != expected
    VQA.from_pretrained(tmp_path / "adapter").merge(tmp_path / "merged")
    merged, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert plain_answers(model, scenes, 6, qwen=merged.eval()) == expected
    index = tmp_path / "merged" / "model.safetensors"
    assert "model.layers.0.self_attn.q_proj.weight" in load_file(index), "the names vLLM and 4.x read"
    for name in ("tokenizer_config.json", "preprocessor_config.json", "generation_config.json", "config.json"):
        assert (tmp_path / "merged" / name).is_file(), name
    assert not (tmp_path / "merged.partial").exists()
    for made in ("merged", "adapter"):  # transformers 4 knows the limits by these names alone
        known = json.loads((tmp_path / made / "preprocessor_config.json").read_text())
        size = known["size"]
        assert (known["min_pixels"], known["max_pixels"]) == (size["shortest_edge"], size["longest_edge"])
        assert known["processor_class"] == type(merged).__name__.replace("ForConditionalGeneration", "Processor")


def test_a_held_out_loss_is_without_dropout(answerer, scenes):
    model = answerer(lora_dropout=0.5).train()
    collator = QuestionCollator(10**6, pad_id=model.tokenizer.pad_token_id)
    one, two = (held_out_loss(model, question_dataset(model, scenes), collator, 2) for _ in range(2))
    assert one == two and model.training


@pytest.mark.parametrize("asked, made", [(None, torch.bfloat16), (torch.float16, torch.float16)])
def test_a_merged_model_has_the_numbers_of_its_base(base, answerer, tmp_path, asked, made):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    record = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(record))
    answerer(base_model=str(folder)).merge(tmp_path / "merged", asked)
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {made}


@pytest.mark.parametrize("dora", [False, True])
def test_merging_into_a_base_of_16_bits_is_merging_in_float32(base, answerer, tmp_path, dora):
    """Layer by layer, rounded once: the base is not held in float32."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    record = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(record))
    rounded = {}
    for shard in folder.glob("*.safetensors"):
        part = {name: tensor.bfloat16() for name, tensor in load_file(shard).items()}
        save_file(part, shard, {"format": "pt"})
        rounded |= part
    answerer(base_model=str(folder), strength=0.3, use_dora=dora).save_pretrained(tmp_path / "adapter")
    for name, dtype in (("whole", torch.float32), ("layers", "auto")):
        VQA.from_pretrained(tmp_path / "adapter", dtype=dtype).merge(tmp_path / name)
    whole, layers = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "layers"))
    assert whole.keys() == layers.keys() and all(torch.equal(whole[key], layers[key]) for key in whole)
    assert sum(not torch.equal(rounded[key], layers[key]) for key in rounded.keys() & layers.keys()) > 5
