"""train_caption.py and caption.py from the command line: data, two stages, resume, scores, errors."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import caption
import train_caption
from config import InputError, resolve_checkpoint
from model import Captioner
from tests.conftest import draw
from tests.processes import run_on_two

SMALL = ["--preset=demo", "--stretch=auto", "--num_epochs=2", "--batch_size=4", "--disable_tqdm=true", "--learning_rate=0.003",
         "--max_rejected=0.2", "--max_caption_tokens=32", "--freeze_language_model_except_layers=1"]  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_java")


@pytest.fixture
def bases(clip_base, qwen3_base):
    return [f"--vision_model_name={clip_base}", f"--language_model_name={qwen3_base}"]


@pytest.fixture
def run(bases, drawn, tmp_path):
    """`run(flags...)`: train_caption.main on the tiny bases in its own output folder."""

    def start(*flags, output="run", data=None):
        where = [f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / output}"]
        return train_caption.main([*SMALL, *bases, *where, f"--data_path={data or drawn.captions}", *flags])

    return start


@pytest.fixture(scope="module")
def trained(no_java, clip_base, qwen3_base, drawn, tmp_path_factory):
    """A finished run in English and Chinese."""
    folder = tmp_path_factory.mktemp("trained")
    results = train_caption.main(
        [*SMALL, f"--vision_model_name={clip_base}", f"--language_model_name={qwen3_base}", f"--output_dir={folder / 'run'}",
         f"--cache_dir={folder / 'cache'}", f"--data_path={drawn.captions}", f"--image_root={drawn.images}"]
    )  # fmt: skip
    return folder / "run", results


def test_whole_run(trained, drawn):
    run, results = trained
    for name in ("final/captioner.safetensors", "final/vision/model.safetensors", "final/language/config.json", "config.json",
                 "metrics.jsonl", "results.json", "captions.jsonl", "report.html", "projector/metrics.jsonl"):  # fmt: skip
        assert (run / name).is_file(), name
    assert results["images"] == {"train": 13, "val": 6, "test": 6} and set(results["scores"]) == {"en", "zh"}
    rows = [json.loads(line) for line in (run / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["language"] for row in rows} == {"en", "zh"}
    for row in rows:
        assert row["prompt"] == ("描述这幅图像。" if row["language"] == "zh" else "Describe the image.")
        assert all(bool(re.search("[\u4e00-\u9fff]", text)) == (row["language"] == "zh") for text in row["references"])
    model = Captioner.from_pretrained(run / "final")
    english = [row for row in rows if row["language"] == "en"]
    assert model.caption([row["image"] for row in english]) == [row["caption"] for row in english]
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_the_first_stage_trains_the_projector_alone(trained, qwen3_base):
    run, _ = trained
    first = sorted((run / "projector").glob("checkpoint-*"))[-1]
    assert all(name.startswith("projector.") for name in load_file(first / "captioner.safetensors"))
    second = sorted(run.glob("checkpoint-*"))[-1]
    names = load_file(second / "captioner.safetensors")
    assert {name.split(".")[0] for name in names} == {"projector", "language"}
    base = transformers.AutoModelForCausalLM.from_pretrained(qwen3_base).state_dict()
    written = transformers.AutoModelForCausalLM.from_pretrained(run / "final" / "language").state_dict()
    changed = {name for name in base if not torch.equal(base[name], written[name])}
    assert changed and all(name.startswith("model.layers.2.") for name in changed)


def test_packed_and_row_by_row_end_alike(run, tmp_path):
    flags = ["--projector_epochs=0", "--max_steps=3", "--language=en"]
    run(*flags, output="packed")
    run(*flags, "--no_packing", output="rows")
    a, b = (load_file(tmp_path / name / "final" / "captioner.safetensors") for name in ("packed", "rows"))
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-3, atol=2e-5), name


def test_compiled_layers_end_alike(run, tmp_path, monkeypatch):
    """The layers are traced whole, in both stages, and the weights are the same. (Their gradients are traced, too, in the
    questions' test of the same layers, which takes three times as long.)"""
    plain = Captioner.compile_layers
    monkeypatch.setattr(Captioner, "compile_layers", lambda model: plain(model, backend="eager", fullgraph=True))
    flags = ["--language=en", "--optim=sgd", "--learning_rate=0.05", "--max_grad_norm=0", "--num_epochs=1"]
    torch._dynamo.utils.counters.clear()
    run(*flags, output="eager")
    assert not torch._dynamo.utils.counters["stats"]
    run(*flags, "--torch_compile", output="compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6, "dynamic shapes: not a graph a step"
    a, b = (load_file(tmp_path / name / "final" / "captioner.safetensors") for name in ("eager", "compiled"))
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-3, atol=2e-5), name


def test_two_processes_equal_one_with_twice_the_batch(run, bases, drawn, tmp_path, monkeypatch):
    """Through both stages: what wrapped the model for the first must be gone in the second."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # no Java there either
    flags = ["--language=en", "--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false", "--optim=sgd",
             "--learning_rate=0.05", "--projector_stage_learning_rate=0.05", "--max_grad_norm=0", "--num_epochs=1"]  # fmt: skip
    run(*flags, output="one")
    words = [*SMALL, *bases, f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'two'}",
             f"--data_path={drawn.captions}", *flags, "--batch_size=2", "--ddp_backend=gloo"]  # fmt: skip
    run_on_two(train_caption.main, words)
    one, two = (load_file(tmp_path / name / "final" / "language" / "model.safetensors") for name in ("one", "two"))
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[1].split("=")[1]).state_dict()
    moved = [name for name in one if not torch.equal(one[name], base[name])]
    assert moved
    for name in moved:
        change = one[name] - base[name]
        assert ((two[name] - one[name]).norm() / change.norm()).item() < 1e-3, name


@pytest.mark.parametrize("stop", ["projector", "checkpoint-4"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(stop, run, tmp_path):
    flags = ["--language=en", "--save_total_limit=9", "--lora_rank=2", "--lora_dropout=0.1"]
    run(*flags, output="whole")
    whole = tmp_path / "whole"
    want = load_file(whole / "final" / "language" / "model.safetensors") | load_file(
        whole / "final" / "captioner.safetensors"
    )
    shutil.copytree(whole, tmp_path / "cut")
    cut = tmp_path / "cut"
    for folder in ("final", "checkpoint-8", {"projector": "checkpoint-4", "checkpoint-4": "projector"}[stop]):
        shutil.rmtree(cut / folder)
    train_caption.main([f"--resume_from_checkpoint={cut}", f"--output_dir={cut}", "--disable_tqdm=false"])
    got = load_file(cut / "final" / "language" / "model.safetensors") | load_file(
        cut / "final" / "captioner.safetensors"
    )
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def test_the_steps_of_the_second_stage_are_not_those_of_the_first(run, tmp_path):
    run("--max_steps=1", "--projector_epochs=1", "--language=en")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/projector/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4 and (tmp_path / "run" / "checkpoint-1").exists()  # 13 images, 4 a step


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_in_another_language_is_told_before_training(split, run, drawn, tmp_path):
    rows = json.loads(drawn.captions.read_text())
    rows = [row for row in rows if (row["split"] == split) == bool(re.search("[一-龥]", row["caption"]))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=f"the {split} split has no caption in a language of the training split"):
        run(f"--image_root={drawn.images}", data=tmp_path / "rows.json")


def test_a_folder_with_images_and_captions(run, drawn, tmp_path, capsys):
    """The README's layout, and what is said of images that no caption is about."""
    data = tmp_path / "data"
    shutil.copytree(drawn.images, data / "images")
    shutil.copy(drawn.captions, data / "captions.json")
    draw(data / "images" / "nobody.png", 77)
    results = run("--max_steps=1", "--projector_epochs=0", data=data)
    assert results["images"]["train"] == 13
    assert f"1 images of {data} have no caption" in capsys.readouterr().out


def test_long_captions_and_bad_rows_are_listed(run, drawn, tmp_path):
    rows = json.loads(drawn.captions.read_text())
    rows.append({"image": "train_0.tif", "caption": "word " * 60, "split": "train"})
    rows.append({"image": "none.tif", "caption": "a road", "split": "train"})
    rows.append({"image": "train_1.png", "caption": "  ", "split": "train"})
    (tmp_path / "c.json").write_text(json.dumps(rows))
    run("--max_steps=1", "--projector_epochs=0", f"--image_root={drawn.images}", data=tmp_path / "c.json")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert len(reasons) == 3
    for said in ("none.tif: no such image", "field 'caption' is empty", "--max_caption_tokens 32"):
        assert any(said in reason for reason in reasons), said


def test_errors_name_the_flag_the_file_or_the_command(run, drawn, bases, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no model here .* run `python load.py"):
        run("--vision_model_name=nowhere")
    with pytest.raises(InputError, match=r"captions.json: no such file"):
        run(data=tmp_path)
    with pytest.raises(InputError, match="expected 0 to 3, the layers of"):
        run("--freeze_language_model_except_layers=8")
    best = ["--projector_epochs=1", "--load_best_model_at_end=true", "--save_strategy=epoch", "--eval_strategy=epoch"]
    with pytest.raises(InputError, match=r"--metric_for_best_model cider: expected one of loss, CIDEr_en"):
        run(*best, "--metric_for_best_model=cider", output="other")
    assert not (tmp_path / "other" / "projector").exists(), "before the first stage"
    (tmp_path / "run" / "final").mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match="holds a run already"):
        run()


# ----------------------------------------------------------------------------------------------------
# caption.py


def test_what_is_written_before_a_stop_is_kept(trained, drawn, tmp_path, monkeypatch, capsys):
    final, out, write, calls = str(trained[0] / "final"), tmp_path / "out.json", Captioner.caption, []

    def stopped(*given, **how):
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return write(*given, **how)

    monkeypatch.setattr(Captioner, "caption", stopped)
    where = ["--model_path", final, "--output_file", str(out), "--batch_size", "2"]
    for command in (["generate", "--image_path", str(drawn.images)], ["eval", "--test_dir", str(drawn.images)]):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            caption.main([*command, *where])
        rows = json.loads((tmp_path / "out.json.partial").read_text())
        assert [set(row) for row in rows] == [{"image", "caption"}] * 2 and not out.exists()
        assert "2 captions so far -> " in capsys.readouterr().err
        (tmp_path / "out.json.partial").unlink()


def test_generate_one_image_a_list_and_a_folder(trained, drawn, tmp_path, capsys):
    final = str(trained[0] / "final")
    images = sorted(drawn.images.glob("test_*"))
    want = Captioner.from_pretrained(final).caption(images)
    capsys.readouterr()
    assert caption.main(["generate", "--model_path", final, "--image_path", str(images[0])]) == 0
    assert capsys.readouterr().out.strip() == want[0]
    assert caption.main(["generate", "--model_path", final, "--image_path", *map(str, images[:2])]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{path}\t{text}" for path, text in zip(images[:2], want)]
    out = tmp_path / "out.json"
    assert (
        caption.main(["generate", "--model_path", final, "--image_path", str(drawn.images), "--output_file", str(out)])
        == 0
    )
    rows = {row["image"]: row["caption"] for row in json.loads(out.read_text())}
    assert len(rows) == 25 and [rows[str(path)] for path in images] == want
    assert caption.main(
        ["generate", "--model_path", final, "--image_path", str(images[0]), "--max_length", "1", "--prompt", "描述这幅图像。"]
    ) == 0  # fmt: skip
    assert len(capsys.readouterr().out.split("->")[-1].split()) <= 2


def test_eval_without_and_with_references(trained, drawn, tmp_path, capsys):
    run, results = trained
    out = tmp_path / "eval" / "results.json"
    kept, whole = tmp_path / "kept", ["--test_dir", str(drawn.images), "--output_file", str(out)]
    flags = ["eval", "--model_path", str(run / "final"), *whole, "--cache_dir", str(kept)]
    assert caption.main(flags) == 0
    assert len(list(kept.rglob("*.npy"))) == 25, "pixels are made once, for other prompts and settings too"
    plain = json.loads(out.read_text())
    assert plain["images"] == 25 and "scores" not in plain and "references" not in plain["captions"][0]
    assert out.with_suffix(".html").is_file()
    given = ["--references", str(drawn.captions), "--training", str(drawn.captions)]
    assert caption.main([*flags, *given]) == 0
    scored = json.loads(out.read_text())
    assert scored["images"] == 6 and "19 images" in capsys.readouterr().out
    for name in ("frequent", "nearest", "captioner"):
        ours, theirs = (
            found[name]["parts"][0]["scores"] for found in (scored["scores"], results["scores"]["en"]["models"])
        )
        assert ours["CIDEr"]["value"] == pytest.approx(theirs["CIDEr"]["value"]), name
    assert {row["image"] for row in scored["captions"]} == {str(path) for path in drawn.images.glob("test_*")}
    assert caption.main([*flags, *given, "--prompt", "描述这幅图像。"]) == 0
    chinese = json.loads(out.read_text())
    assert chinese["language"] == "zh" and all("图像" in r for row in chinese["captions"] for r in row["references"])


def test_every_image_is_seen_once(run, drawn, tmp_path, monkeypatch):
    """By the training with its scores, and not again by an eval over the same images."""
    seen = []
    see = Captioner._see
    monkeypatch.setattr(Captioner, "_see", lambda model, pixels: seen.append(len(pixels)) or see(model, pixels))
    run("--language=en", f"--image_root={drawn.images}")
    assert sum(seen) == 25, "13 + 6 + 6 images"
    whole = ["--test_dir", str(drawn.images), "--output_file", str(tmp_path / "r.json")]
    given = ["--references", str(drawn.captions), "--training", str(drawn.captions), "--max_rejected", "0.2"]
    for kept, again in ((tmp_path / "cache", 25), (tmp_path / "other", 25 + 6 + 6 + 13)):
        caption.main(["eval", "--model_path", str(tmp_path / "run/final"), *whole, *given, "--cache_dir", str(kept)])
        assert sum(seen) == again, kept
    (tmp_path / "run/final/captioner.json").write_text(
        (tmp_path / "run/final/captioner.json").read_text().replace("torch.float32", "torch.bfloat16")
    )
    caption.main(["eval", "--model_path", str(tmp_path / "run/final"), *whole, "--cache_dir", str(tmp_path / "cache")])
    assert sum(seen) > again, "of weights rounded to 16 bits it would be something else"


def test_references_are_found_by_file_name_and_others_passed_over(trained, drawn, tmp_path, capsys):
    """The folder of the README: captions of all images, named below the file's folder, and a folder of some images."""
    run, _ = trained
    rows = json.loads(drawn.captions.read_text())
    file = tmp_path / "captions.json"
    file.write_text(json.dumps([row | {"image": f"images/{row['image']}"} for row in rows]))
    some = tmp_path / "test_images" / "deeper"
    some.mkdir(parents=True)
    for path in sorted(drawn.images.glob("test_*"))[:4]:
        shutil.copy(path, some)
    out = tmp_path / "out.json"
    flags = ["eval", "--model_path", str(run / "final"), "--test_dir", str(some.parent), "--output_file", str(out)]
    assert caption.main([*flags, "--references", str(file)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(out.read_text())["images"] == 4 and f"images of {file} are not in {some.parent}" in printed
    shutil.copytree(run / "final", tmp_path / "english")
    about = json.loads((tmp_path / "english" / "captioner.json").read_text())
    about["prompts"].pop("zh", None)
    (tmp_path / "english" / "captioner.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="--language zh: the model was trained in another"):
        caption.main([*flags, "--model_path", str(tmp_path / "english"), "--references", str(file), "--language", "zh"])
    file.write_text(json.dumps([row | {"image": "other.png"} for row in rows]))
    with pytest.raises(InputError, match="no row of the 4 images"):
        caption.main([*flags, "--references", str(file)])


def test_eval_counts_objects(trained, drawn, tmp_path, capsys):
    words = {"water": ["water"], "farmland": ["farmland"]}
    present = {path.name: ["water"] for path in drawn.images.iterdir()}
    (tmp_path / "o.json").write_text(json.dumps({"words": words, "images": present}))
    caption.main(
        ["eval", "--model_path", str(trained[0] / "final"), "--test_dir", str(drawn.images), "--objects",
         str(tmp_path / "o.json"), "--output_file", str(tmp_path / "r.json")]
    )  # fmt: skip
    found = json.loads((tmp_path / "r.json").read_text())["objects"]
    captions = [row["caption"] for row in json.loads((tmp_path / "r.json").read_text())["captions"]]
    right = sum("water" in text for text in captions)
    assert found["recall"] == pytest.approx(right / len(captions))


@pytest.mark.parametrize("side", ["vision", "language"])
def test_a_checkpoint_of_another_base_is_not_taken_over(trained, tmp_path, side):
    model = Captioner.from_pretrained(resolve_checkpoint(trained[0]))
    checkpoint = shutil.copytree(resolve_checkpoint(trained[0]), tmp_path / "checkpoint")
    about = checkpoint / "captioner.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {f"{side}_fingerprint": "0123"}))
    with pytest.raises(InputError, match=rf"was trained on \(.*give the right one with --{side}_model_name"):
        model.load_trained(checkpoint)


def test_objects_of_images_of_one_name(tmp_path):
    file, images = tmp_path / "objects.json", ["test/port/1.png", "test/lake/1.png"]
    words = {"ship": ["ship"], "jetty": ["jetty"]}

    def read(listed):
        file.write_text(json.dumps({"words": words, "images": listed}))
        return caption.read_objects(str(file), images)[2]

    assert read({"port/1.png": ["jetty"], "1.png": ["ship"]}) == dict(zip(images, (["jetty"], ["ship"])))
    with pytest.raises(InputError, match=r"1\.png is both test/port/1\.png and test/lake/1\.png: name them"):
        read({"1.png": ["ship"]})


def test_what_captions_are_compared_with_is_read_first(trained, drawn, tmp_path, monkeypatch):
    """A mistake in it must not cost the hours that writing captions takes."""
    monkeypatch.setattr(caption, "write_captions", lambda *_: pytest.fail("captions were written before"))
    common = ["eval", "--model_path", str(trained[0] / "final"), "--test_dir", str(drawn.images)]
    common += ["--output_file", str(tmp_path / "r.json"), "--references", str(drawn.captions), "--language=en"]
    objects = tmp_path / "objects.json"
    for words, named, said in (
        ({"ship": "ship"}, {}, "ship: expected a list of texts"),
        ({}, {"a.png": None}, "a.png"),
    ):
        objects.write_text(json.dumps({"words": words, "images": named}))
        with pytest.raises(InputError, match=said):
            caption.main([*common, "--objects", str(objects)])
    rows = [row | {"split": "test"} for row in json.loads(drawn.captions.read_text())]
    (tmp_path / "tests.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="no row of split 'train'"):
        caption.main([*common, "--training", str(tmp_path / "tests.json")])
    one = next(row["image"] for row in rows)
    for row in rows:
        row["split"] = None
    (tmp_path / "drawn.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="names no splits, and all of its images are scored"):
        caption.main(
            [*common[:-2], str(tmp_path / "drawn.json"), "--language=en", "--training", str(tmp_path / "drawn.json")]
        )
    args = caption.build_parser().parse_args([*common, "--training", str(tmp_path / "drawn.json")])
    scored = [str(drawn.images / one)]
    monkeypatch.setattr("data.drop_unreadable", lambda splits, *_: splits)
    known = caption.training_scenes(args, scored, None, "en")
    assert known and not {scene.image for scene in known} & set(scored)
    with pytest.raises(InputError, match="the page stands beside it"):
        caption.main([word.replace("r.json", "r.html") for word in common])


def test_a_broken_image_is_named_and_the_others_are_captioned(trained, drawn, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(next(drawn.images.glob("test_1*")), folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    out = tmp_path / "r.json"
    flags = ["--model_path", str(trained[0] / "final")]
    assert caption.main(["eval", *flags, "--test_dir", str(folder), "--output_file", str(out)]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert len(json.loads(out.read_text())["captions"]) == 1
    assert caption.main(["generate", *flags, "--image_path", str(folder / "bad.png")]) == 2


def test_the_demo_preset_of_generate_writes_no_file():
    args = caption.build_parser().parse_args(["generate", "--preset", "demo", "--image_path", "a.tif"])
    caption.checked(args)
    assert args.model_path == caption.DEMO["model_path"] and args.output_file is None and args.prompt is None
    args = caption.build_parser().parse_args(["eval", "--preset", "demo"])
    caption.checked(args)
    assert {name: getattr(args, name) for name in caption.DEMO} == caption.DEMO


@pytest.mark.parametrize("flags, message", [
    (["generate"], "needs --model_path"),
    (["generate", "--model_path", "x"], "needs --image_path"),
    (["eval", "--model_path", "x", "--test_dir", "y"], "needs --output_file"),
    (["generate", "--model_path", "x", "--image_path", "y", "--num_beams", "0"], "--num_beams 0: expected"),
    (["generate", "--model_path", "x", "--image_path", "y", "--num_beams", "2", "--temperature", "1"], "give one of them"),
    (["generate", "--model_path", "nowhere", "--image_path", "y.png"], r"nowhere: not a captioner"),
    (["generate", "--model_path", "x", "--image_path", "y.png", "--output_file", "/proc/x/y.json"], "--output_file: its folder"),
    (["eval", "--model_path", "x", "--test_dir", "y", "--output_file", "r.json", "--cache_dir", __file__], "is a file"),
])  # fmt: skip
def test_user_errors(flags, message):
    with pytest.raises(InputError, match=message):
        caption.main(flags)


def test_references_of_a_split_that_is_not_there(trained, drawn, tmp_path):
    flags = ["eval", "--model_path", str(trained[0] / "final"), "--test_dir", str(drawn.images), "--output_file",
             str(tmp_path / "r.json"), "--references", str(drawn.captions), "--split", "dev"]  # fmt: skip
    with pytest.raises(InputError, match=r"no row of split 'dev'; there are \['test', 'train', 'val'\]"):
        caption.main(flags)
    assert not (tmp_path / "r.json").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no image in it"):
        caption.main(
            ["eval", "--model_path", str(trained[0] / "final"), "--test_dir", str(empty), "--output_file", "r.json"]
        )
