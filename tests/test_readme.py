"""The README's commands run as they stand: each block is executed against a tiny base and data set."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = ["README.md", "README_zh.md"]


def commands(name: str) -> list[list[str]]:
    """Every `python ...`, `make ...` and `accelerate ...` line of the bash blocks, comments and pipes cut off."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "|" in words:
                words = words[words.index("|") + 1 :]
            if ">" in words:
                words = words[: words.index(">")]
            if words and words[0] in ("python", "make", "accelerate"):
                found.append(words)
    return found


@pytest.mark.parametrize("name", READMES)
def test_every_command_names_a_script_and_flags_that_exist(name):
    import importlib

    from transformers import TrainingArguments

    from config import ALIASES, CaptionConfig, MatchConfig, VQAConfig

    training = {}
    for script, config in (
        ("train_match.py", MatchConfig),
        ("train_vqa.py", VQAConfig),
        ("train_caption.py", CaptionConfig),
    ):
        fields = set(config.__dataclass_fields__) | set(TrainingArguments.__dataclass_fields__)
        fields |= {flag.lstrip("-") for flag in ALIASES.get(config.__name__, {})}
        training[script] = fields | {f"no_{field}" for field in fields} | {"help", "help_all"}
    seen = commands(name)
    assert len(seen) > 8
    for words in seen:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
            continue
        if words[:2] == ["python", "-m"]:
            continue
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file(), words
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file(), words
        flags = {word.lstrip("-") for word in words[words.index(script) :] if word.startswith("--")}
        if script in training and "merge" not in words:
            assert flags <= training[script], (words, flags - training[script])
        elif script in ("inference_script.py", "compare_before_after.py", "search.py", "web_demo.py"):
            actions = list(importlib.import_module(script[:-3]).build_parser()._actions)
            for action in actions:  # those of the subcommand too
                if isinstance(action.choices, dict):
                    actions += action.choices[words[words.index(script) + 1]]._actions
            known = {option.lstrip("-") for action in actions for option in action.option_strings}
            assert flags <= known, (words, flags - known)
        else:
            text = (ROOT / script).read_text(encoding="utf-8")
            assert all(f'"--{flag}"' in text for flag in flags), words


def test_both_readmes_show_the_same_commands():
    strip = lambda name: [[word for word in words if word.isascii()] for words in commands(name)]  # noqa: E731
    assert strip("README.md") == strip("README_zh.md")


def test_the_readme_path_from_captions_to_scores(base, drawn, tmp_path, monkeypatch, capsys):
    """`train_match.py --train_file captions.json ...`, then both ways of scoring, as the README words them."""
    import json

    import inference_script
    import train_match

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "output" / "training_x"
    train_match.main(
        ["--train_file", str(drawn.captions), "--image_root", str(drawn.images),
         "--base_model", str(base), "--output_dir", str(run), "--cache_dir", str(tmp_path / "cache"),
         "--per_device_train_batch_size", "4", "--max_steps", "2", "--use_cpu", "true", "--report_to", "none",
         "--dataloader_num_workers", "0", "--projection_dim", "16", "--disable_tqdm", "true"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "mR" in printed and str(run / "best_model") in printed
    image = sorted(drawn.images.iterdir())[0]
    pair = ["--checkpoint", str(run / "best_model"), "--image_path", str(image), "--text", "a harbour", "一片农田"]
    assert inference_script.main(pair) == 0
    assert re.search(r"^[+-]\d\.\d{4}  (a harbour|一片农田)$", capsys.readouterr().out, re.M)
    (tmp_path / "input.json").write_text(json.dumps([{"image_path": str(image), "text": "two ships"}]))
    files = ["--json_input", "input.json", "--json_output", "output_scores.json"]
    assert inference_script.main(["--checkpoint", str(run / "best_model"), *files]) == 0
    assert -1 <= json.loads((tmp_path / "output_scores.json").read_text())[0]["score"] <= 1


def test_the_readme_path_from_rsvqa_to_a_merged_model(base, asked, tmp_path, monkeypatch, capsys):
    """data2csv.py, csv2json.py, train_vqa.py, compare_before_after.py, --eval_only, merge: the five commands and one."""
    import json

    import compare_before_after
    import csv2json
    import data2csv
    import train_vqa

    monkeypatch.chdir(tmp_path)
    images = sorted(asked.root.glob("*.png"))
    (tmp_path / "rsvqa_images").mkdir()
    questions, answers = [], []
    for i, image in enumerate(images):
        (tmp_path / "rsvqa_images" / f"{i}.png").write_bytes(image.read_bytes())
        for kind, text, answer in (("presence", "Is there water?", "no"), ("count", "How many roads?", str(i))):
            number = len(questions)
            questions.append({"id": number, "img_id": i, "type": kind, "question": text, "answers_ids": [number]})
            answers.append({"id": number, "question_id": number, "answer": answer})
    (tmp_path / "rsvqa_questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "rsvqa_answers.json").write_text(json.dumps({"answers": answers}))
    data2csv.main([])
    csv2json.main([])
    run = tmp_path / "output" / "training_x"
    small = ["--base_model", str(base), "--cache_dir", str(tmp_path / "cache"), "--min_pixels", "784", "--lora_rank", "4",
             "--use_cpu", "true", "--dataloader_num_workers", "0", "--disable_tqdm", "true"]  # fmt: skip
    train_vqa.main(
        [*small, "--output_dir", str(run), "--num_train_epochs", "1", "--report_to", "none", "--learning_rate", "0.01"]
    )
    lora = ["--lora", str(run / "best_model")]
    compare_before_after.main(["--base", str(base), *lora, "--num_samples", "4"])
    train_vqa.main([*small, "--eval_only", *lora])
    train_vqa.main(["merge", *lora, "--output", "merged"])
    printed = capsys.readouterr().out
    for said in ("data_vl_test.json", "before: adapter off", "blind: trained without images", "gained", "merged"):
        assert said in printed, said
    assert (tmp_path / "merged" / "model.safetensors").is_file() and (run / "compare" / "report.html").is_file()


def test_the_readme_path_from_captions_to_a_described_image(
    clip_base, qwen3_base, drawn, tmp_path, monkeypatch, capsys
):
    """`train_caption.py --data_path ./data --output_dir ./outputs ...`, `caption.py eval` and `generate`."""
    import json
    import shutil

    import caption
    import train_caption

    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawn.images, "data/images")
    rows = [row for row in json.loads(drawn.captions.read_text()) if row["split"] != "test"]
    (tmp_path / "data" / "captions.json").write_text(json.dumps(rows, ensure_ascii=False))
    (tmp_path / "test_images").mkdir()
    tested = [row for row in json.loads(drawn.captions.read_text()) if row["split"] == "test"]
    for name in {row["image"] for row in tested}:
        shutil.move(f"data/images/{name}", f"test_images/{name}")
    (tmp_path / "captions.json").write_text(json.dumps(tested, ensure_ascii=False))
    bases = [
        "--vision_model_name",
        str(clip_base),
        "--language_model_name",
        str(qwen3_base),
        "--learning_rate",
        "0.003",
    ]
    small = [
        "--use_cpu",
        "true",
        "--dataloader_num_workers",
        "0",
        "--disable_tqdm",
        "true",
        "--max_caption_tokens",
        "32",
    ]
    with monkeypatch.context() as patch:
        patch.setattr("caption_scores.shutil.which", lambda _: None)  # Java starts once, in eval
        train_caption.main(
            [
                "--data_path",
                "./data",
                "--output_dir",
                "./outputs",
                "--batch_size",
                "4",
                "--num_epochs",
                "3",
                *bases,
                *small,
            ]
        )
    out = ["--output_file", "./eval_results.json", "--references", "captions.json"]
    assert caption.main(["eval", "--model_path", "./outputs/final", "--test_dir", "./test_images", *out]) == 0
    image = next((tmp_path / "test_images").iterdir())
    said = ["--image_path", str(image), "--prompt", "Describe the image.", "--max_length", "64"]
    assert caption.main(["generate", "--model_path", "./outputs/final", *said]) == 0
    assert (
        "CIDEr" in capsys.readouterr().out and len(json.loads(Path("eval_results.json").read_text())["captions"]) == 6
    )
