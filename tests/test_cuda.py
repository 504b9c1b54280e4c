"""What only a GPU shows: bf16 training, quantized bases, the same numbers as on a CPU. Skipped without CUDA."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

import inference_script
import library
import train_caption
import train_match
import train_vqa
from model import VQA, Captioner, DualEncoder
from tests.conftest import loss_and_gradient, question_dataset, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
ON_CUDA = ["--preset=demo", "--use_cpu=false", "--bf16=true", "--disable_tqdm=true", "--max_rejected=0.2"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_packed_loss_and_gradient_on_cuda(family, base, qwen2_base, answerer, scenes, monkeypatch):
    """fp32: packed = rows on CUDA, and both = the CPU; bf16: packed = rows as far as bf16 goes."""
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", False
    )  # which the patches' convolution has: 8e-5 of the gradient
    model = answerer(base_model=str(base if family == "qwen2_5_vl" else qwen2_base), strength=0.02).train()
    data = question_dataset(model, scenes)
    examples = [data[0, i] for i in range(len(scenes))]
    on_cpu = loss_and_gradient(model, examples, packing=False)
    model.cuda()
    for packing in (True, False):
        loss, gradient, *_ = loss_and_gradient(model, examples, packing=packing)
        assert loss == pytest.approx(on_cpu[0], rel=1e-4) and relative(gradient.cpu(), on_cpu[1]) < 1e-4, packing
    with torch.autocast("cuda", torch.bfloat16):
        packed, rows = (loss_and_gradient(model, examples, packing=packing) for packing in (True, False))
    assert packed[0] == pytest.approx(rows[0], rel=1e-2) and relative(packed[1], rows[1]) < 5e-2


def test_questions_are_trained_and_answered(base, asked, tmp_path):
    flags = [*ON_CUDA, f"--base_model={base}", f"--cache_dir={tmp_path / 'cache'}", "--stretch=auto", "--max_pixels=12544",
             "--num_train_epochs=2", "--gradient_checkpointing=true", *asked.flags()]  # fmt: skip
    trained = train_vqa.main([*flags, "--no_blind_baseline", f"--output_dir={tmp_path / 'run'}"])
    best = tmp_path / "run" / "best_model"
    assert all(value.dtype == torch.float32 for value in load_file(best / "adapter_model.safetensors").values())
    again = train_vqa.main([*flags, "--eval_only", f"--lora={best}", f"--output_dir={tmp_path / 'unused'}"])
    for name in ("before", "after"):
        assert again[name] == trained[name], name
    resumed = train_vqa.main([f"--resume_from_checkpoint={tmp_path / 'run'}", "--num_train_epochs=3"])
    assert resumed["steps"] > trained["steps"]


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quantized_base_trains_and_answers(bits, base, asked, scenes, tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    flags = [*ON_CUDA, f"--base_model={base}", "--cache_dir=none", "--stretch=auto", "--max_pixels=12544", f"--quantize={bits}",
             "--num_train_epochs=2", "--learning_rate=0.01", "--no_blind_baseline", *asked.flags()]  # fmt: skip
    train_vqa.main([*flags, f"--output_dir={tmp_path / 'run'}"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows if "loss" in row)
    model = VQA.from_pretrained(tmp_path / "run" / "best_model", device="cuda", dtype=torch.bfloat16, quantize=bits)
    kinds = {type(module).__name__ for module in model.qwen.modules()}
    assert any(name in kinds for name in ("Linear4bit", "Linear8bitLt")), kinds
    asked_ = [(scene.image, [q.text for q in scene.questions]) for scene in scenes]
    assert [len(row) for row in model.answer(asked_)] == [3, 1, 2]
    assert isinstance(model.chat(scenes[0].image, "What is it?", max_tokens=4), str)


def test_answers_in_float32_are_those_of_a_cpu(answerer, scenes):
    model = answerer(strength=0.3)
    asked_ = [(scene.image, [q.text for q in scene.questions]) for scene in scenes]
    on_cpu = model.answer(asked_, max_tokens=6)
    model.cuda()
    assert model.answer(asked_, max_tokens=6) == on_cpu
    assert model.chat(scenes[1].image, "What is it?", max_tokens=6) == on_cpu[1][0]


def test_matcher_is_trained_and_scores(base, drawn, tmp_path, call_main, monkeypatch):
    flags = [*ON_CUDA, f"--base_model={base}", f"--cache_dir={tmp_path / 'cache'}", "--max_pixels=3136", "--min_pixels=784",
             "--num_train_epochs=2", "--projection_dim=16", *drawn.flags()]  # fmt: skip
    for number, more in enumerate((["--loss=triplet"], ["--loss=infonce", "--grad_cache_chunk=2"], ["--loss=sigmoid"])):
        train_match.main([*flags, *more, f"--output_dir={tmp_path / str(number)}"])
    folder = tmp_path / "0" / "best_model"
    images = sorted(str(path) for path in drawn.images.iterdir())[:5]
    made = [DualEncoder.from_pretrained(folder, device=device) for device in ("cpu", "cuda")]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default, for convolutions
    for embedded in ([model.embed_images(images) for model in made], [model.embed_texts(["a lake"]) for model in made]):
        assert (embedded[0] - embedded[1]).abs().max() < 1e-4
    code, printed, error = call_main(
        inference_script.main, "--checkpoint", folder, "--image_path", images[0], "--text", "a piece of water"
    )
    assert code == 0 and "a piece of water" in printed, error


def test_captioner_is_trained_and_writes(clip_base, qwen3_base, drawn, tmp_path):
    train_caption.main([*ON_CUDA, f"--vision_model_name={clip_base}", f"--language_model_name={qwen3_base}",
                        f"--train_file={drawn.captions}", f"--image_root={drawn.images}", f"--cache_dir={tmp_path / 'cache'}",
                        "--language=en", "--stretch=auto", "--num_epochs=1", "--max_caption_tokens=32",
                        "--freeze_language_model_except_layers=1", f"--output_dir={tmp_path / 'run'}"])  # fmt: skip
    images = sorted(str(path) for path in drawn.images.iterdir())[:3]
    made = [Captioner.from_pretrained(tmp_path / "run" / "final", device=device) for device in ("cpu", "cuda")]
    first, second = (model.caption(images, max_tokens=8) for model in made)
    assert first == second
    half = Captioner.from_pretrained(tmp_path / "run" / "final", device="cuda", dtype=torch.bfloat16)
    assert len(half.caption(images, max_tokens=8, num_beams=2)) == 3


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_an_index_is_that_of_a_cpu(family, clip_base, siglip_base, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(library, "FLUSH", 4)
    made = []
    for device in ("cpu", "cuda"):
        model = DualEncoder.from_pretrained(clip_base if family == "clip" else siglip_base, device=device)
        where = str(tmp_path / device)
        library.index_library(model, drawn.images, where, tile=0, workers=2, batch_size=3)
        with library.Library.open(where, encoder=model) as opened:
            made.append(opened.everything())
    assert made[0][0] == made[1][0] and len(made[0][0]) == 25
    assert abs(made[0][1] - made[1][1]).max() < 1e-4
