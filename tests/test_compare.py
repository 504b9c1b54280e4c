"""compare_before_after.py: both answers are what they claim, the sample is what was asked for, mistakes cost one line."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import compare_before_after
import imagery
import report
from compare_before_after import Images, compare
from config import InputError, VQAConfig, user_errors
from metrics import normalise_answer
from model import VQA
from scenes import read_conversations
from tests.conftest import COLOURS, draw

ROOT = Path(__file__).parents[1]
FIELDS = ["id", "image_path", "type", "question", "truth", "before", "before_right", "after", "after_right", "flip"]
KINDS = {
    "presence": ["Is there a river in the image?", "Is there a road in the image?"],
    "count": ["How many buildings are there?", "How many vehicles are there?"],
    "图像": ["图像中有河流吗？", "图像中有道路吗？"],
}


@dataclass
class World:
    """A tiny adapter, moved at random, and questions whose truths were chosen by what it answers."""

    root: Path
    config: VQAConfig
    lora: Path
    data: Path

    def rows(self) -> list[dict]:
        return json.loads(self.data.read_text())

    def scenes(self) -> list:
        return read_conversations(self.data).scenes


@pytest.fixture(scope="module")
def loud(base, tmp_path_factory) -> Path:
    """The tiny base with 25-fold weights: its answers depend on image and question, and hold what a terminal and a page
    must be protected from."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("loud") / "tiny"))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        inner = {name for name, value in tensors.items() if value.dim() == 2 and ("layers" in name or "visual" in name)}
        save_file({n: 25 * v if n in inner else v for n, v in tensors.items()}, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def world(loud, tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("compare")
    config = VQAConfig(
        base_model=str(loud), lora_rank=4, lora_alpha=8, max_pixels=56 * 56, min_pixels=28 * 28, max_answer_tokens=3
    )
    model = VQA.from_base(config, answers={"presence": ["yes", "no"], "count": ["0", "1", "12"]})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.06 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(root / "run" / "best_model")
    images = [
        draw(root / f"{i} 号.{'tif' if i % 2 else 'png'}", i, (70 + 14 * (i % 3), 60), list(COLOURS.values())[i % 4])
        for i in range(6)
    ]
    asked = [(kind, text) for kind, texts in KINDS.items() for text in texts]
    listed = [(str(path), [text for _, text in asked]) for path in images]
    after = model.answer(listed)
    with model.before():
        before = model.answer(listed)
    rows = []
    for i, path in enumerate(images):
        for k, (kind, text) in enumerate(asked):
            truth = [before[i][k], after[i][k], "a castle"][(i + k) % 3] or "a castle"
            asked_text = f"{text} <|vision_start|>{path.name}<|vision_end|>"
            turns = [{"from": "user", "value": asked_text}, {"from": "assistant", "value": truth}]
            rows.append({"id": f"q{i}_{k}", "conversations": turns, "type": kind, "split": "test"})
    (root / "data.json").write_text(json.dumps(rows, ensure_ascii=False))
    return World(root, config, root / "run" / "best_model", root / "data.json")


@pytest.fixture(scope="module")
def model(world) -> VQA:
    return VQA.from_pretrained(world.lora)


@pytest.fixture
def call(world, call_main, monkeypatch, model):
    """`call("--flag", ...) -> (exit code, stdout, stderr)` of the script, with the adapter loaded once for all tests."""
    load = VQA.from_pretrained

    def loaded(folder, *, base_model=None, config=None, **options):
        if Path(folder) == world.lora and base_model is None:
            return model
        return load(folder, base_model=base_model, config=config, **options)

    monkeypatch.setattr(VQA, "from_pretrained", loaded)

    def run(*words):
        given = ["--lora", world.lora, "--data", world.data, "--device", "cpu"]
        return call_main(compare_before_after.main, *given, *words)

    return run


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").split("\n")[:-1]]


# ----------------------------------------------------------------------------------------------------
# What is answered


def test_before_is_a_fresh_base_and_after_the_adapter(world, model):
    scenes = world.scenes()
    rows, shown = compare(model, scenes, Images(model, 0), number=0)
    assert rows == shown and len(rows) == 36
    fresh = VQA.from_base(world.config)  # B is zero: the base itself, which never met this adapter
    asked = [(scene.image, scene.questions) for scene in scenes]
    before, after = fresh.answer(asked), model.answer(asked)
    assert [row["before"] for row in rows] == [text for texts in before for text in texts]
    assert [row["after"] for row in rows] == [text for texts in after for text in texts]
    assert before != after and len({text for texts in before for text in texts}) > 10
    assert [row["question"] for row in rows] == [question.text for scene in scenes for question in scene.questions]


def test_happy_path(call, world):
    code, out, err = call("--num_samples", 0)
    folder = world.root / "run" / "compare"
    rows = read(folder)
    assert code == 0 and err == "" and len(rows) == 36
    assert {row["flip"] for row in rows} == set(report.FLIPS)
    known = {row["id"]: row for row in world.rows()}
    for row in rows:
        assert list(row) == FIELDS and row["flip"] == report.flip_of(row)
        source = known[row["id"]]
        assert row["truth"] == source["conversations"][1]["value"] and row["type"] == source["type"]
        assert (
            Path(row["image_path"]).is_file()
            and f"<|vision_start|>{Path(row['image_path']).name}" in (source["conversations"][0]["value"])
        )
        for side in ("before", "after"):
            same = normalise_answer(row[side], row["type"]) == normalise_answer(row["truth"], row["type"])
            assert row[f"{side}_right"] == same
    gained, lost = (sum(row["flip"] == flip for row in rows) for flip in ("gained", "lost"))
    assert f"{gained} gained, {lost} lost, McNemar p" in out and "are a sample" not in out
    assert "6 images, 36 questions (count, presence, 图像)" in out and str(folder / "report.html") in out
    assert "✓" in out and "✗" in out
    page = (folder / "report.html").read_text("utf-8")
    assert page.count('<figure class="card">') == 6 and page.count('<li class="qa') == 36 and "<script" not in page
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "samples.jsonl"]


def test_each_image_is_read_once(call, world, tmp_path, monkeypatch):
    seen = []
    read_image = imagery.read_image
    monkeypatch.setattr(
        imagery, "read_image", lambda path, *a, **k: seen.append(str(path)) or read_image(path, *a, **k)
    )
    for words in (["--num_samples", 20], ["--num_samples", 0], ["--only", "lost", "wrong"]):
        seen.clear()
        assert call(*words, "--output", tmp_path)[0] == 0
        assert sorted(seen) == sorted(set(seen)) and len(seen) == 6


def test_candidates_choose_from_the_known_answers(call, tmp_path):
    assert call("--decode", "candidates", "--num_samples", 12, "--output", tmp_path)[0] == 0
    for row in read(tmp_path):
        known = {"presence": {"yes", "no"}, "count": {"0", "1", "12"}}.get(row["type"], {"yes", "no", "0", "1", "12"})
        assert row["before"] in known and row["after"] in known


# ----------------------------------------------------------------------------------------------------
# What is drawn


def test_sample_is_seeded_and_takes_types_in_turn(call, tmp_path):
    made = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        code, out, _ = call("--num_samples", 7, "--seed", seed, "--output", tmp_path / name)
        assert code == 0 and "7 questions, types in turn, are a sample; the full score: python train_vqa.py" in out
        made[name] = read(tmp_path / name)
    assert (
        made["a"] == made["b"] and (tmp_path / "a/report.html").read_text() == (tmp_path / "b/report.html").read_text()
    )
    assert {row["id"] for row in made["a"]} != {row["id"] for row in made["c"]}
    counts = sorted([row["type"] for row in made["a"]].count(kind) for kind in KINDS)
    assert counts == [2, 2, 3] and len({row["id"] for row in made["a"]}) == 7
    assert call("--num_samples", 3, "--seed", 5, "--output", tmp_path / "d")[0] == 0
    assert {row["type"] for row in read(tmp_path / "d")} == set(KINDS)
    code, out, _ = call("--num_samples", 500, "--output", tmp_path / "e")  # more than there are
    assert code == 0 and len(read(tmp_path / "e")) == 36 and "are a sample" not in out


def test_sample_answers_are_those_of_all_questions(call, tmp_path):
    """The questions asked beside one change nothing."""
    assert call("--num_samples", 0, "--output", tmp_path / "all")[0] == 0
    whole = {row["id"]: row for row in read(tmp_path / "all")}
    assert call("--num_samples", 9, "--output", tmp_path / "few")[0] == 0
    assert all(whole[row["id"]] == row for row in read(tmp_path / "few"))


def test_type_filter(call, tmp_path):
    code, out, _ = call("--type", "count", "--type", "图像", "--num_samples", 0, "--output", tmp_path)
    rows = read(tmp_path)
    assert code == 0 and len(rows) == 24 and {row["type"] for row in rows} == {"count", "图像"}
    assert "24 questions (count, 图像)" in out
    code, _, err = call("--type", "presence", "colour", "--output", tmp_path / "none")
    assert code == 2 and "--type colour" in err and "count, presence, 图像" in err and not (tmp_path / "none").exists()


def test_only_searches_until_enough_are_found(call, tmp_path, model, world, monkeypatch):
    for flips in (["lost"], ["gained"], ["wrong", "lost"]):
        code, out, _ = call("--only", *flips, "--num_samples", 3, "--output", tmp_path)
        rows = read(tmp_path)
        assert code == 0 and len(rows) == 3 and {row["flip"] for row in rows} <= set(flips)
        assert f"are {' or '.join(flips)}, 3 shown" in out
    monkeypatch.setattr(compare_before_after, "CHUNK", 1)
    images = Images(model, 0)
    rows, shown = compare(model, world.scenes(), images, number=2, only=["lost"], seed=1)
    assert len(shown) == 2 and len({row["image_path"] for row in rows}) < 6
    assert {row["image_path"] for row in shown} <= images.pictures.keys() < {scene.image for scene in world.scenes()}
    assert len(rows) == 6 * len(
        {row["image_path"] for row in rows}
    )  # whole scenes, and none after the second was found
    rows, shown = compare(model, world.scenes(), Images(model, 0), number=0, only=["lost"])
    assert len(rows) == 36 and len(shown) == sum(row["flip"] == "lost" for row in rows) > 2
    again = compare(model, world.scenes(), Images(model, 0), number=500, only=["lost"])[1]
    assert sorted(row["id"] for row in again) == sorted(row["id"] for row in shown)


def test_only_that_finds_nothing_says_so(call, world, tmp_path):
    rows = world.rows()
    for row in rows:
        row["conversations"][1]["value"] = "a castle"
    (world.root / "castles.json").write_text(json.dumps(rows, ensure_ascii=False))
    code, out, _ = call("--data", world.root / "castles.json", "--only", "gained", "--output", tmp_path)
    assert code == 0 and "searched 36 questions on 6 images: 0 are gained, 0 shown" in out and read(tmp_path) == []
    assert "No samples." in (tmp_path / "report.html").read_text()


def test_the_second_test_split_is_named_and_can_be_chosen(world):
    rows = world.rows()
    images = list(dict.fromkeys(str(scene.image) for scene in world.scenes()))
    for row in rows:
        row["split"] = "test" if Path(images[0]).name in json.dumps(row, ensure_ascii=False) else "test_phili"
    path = world.root / "both.json"
    path.write_text(json.dumps(rows))
    scenes, line = compare_before_after.read_questions(str(path), image_root=None, max_rejected=0)
    assert len(scenes) == 1 and "test split (--test_split test_phili takes that one)" in line
    scenes, _ = compare_before_after.read_questions(str(path), image_root=None, max_rejected=0, test_split="test_phili")
    assert len(scenes) == len(images) - 1
    with pytest.raises(InputError, match="--test_split test_x: no row is of that split; expected test or test_phili"):
        compare_before_after.read_questions(str(path), image_root=None, max_rejected=0, test_split="test_x")


def test_a_file_of_all_splits_gives_its_test_split(call, world, tmp_path):
    rows = world.rows()
    for i, row in enumerate(rows):
        row["split"] = "train" if i < 24 else "test"
    (world.root / "splits.json").write_text(json.dumps(rows, ensure_ascii=False))
    code, out, _ = call("--data", world.root / "splits.json", "--num_samples", 0, "--output", tmp_path)
    assert code == 0 and "test split: 2 images, 12 questions" in out and len(read(tmp_path)) == 12
    for row in rows:
        del row["split"], row["type"], row["id"]
    (world.root / "plain.json").write_text(json.dumps(rows, ensure_ascii=False))
    code, out, _ = call("--data", world.root / "plain.json", "--num_samples", 0, "--output", tmp_path)
    assert code == 0 and "all splits: 6 images" in out
    assert {(row["type"], row["id"]) for row in read(tmp_path)} == {("question", None)}
    assert call("--data", world.root / "plain.json", "--type", "question", "--output", tmp_path)[0] == 0


def test_images_that_were_trained_on_are_said(call, world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world.lora, run / "best_model")
    rows = [row | {"split": "train"} for row in world.rows()]
    (world.root / "train.json").write_text(json.dumps(rows, ensure_ascii=False))
    record = {"task": "vqa", "settings": {"train_file": str(world.root / "train.json")}}
    (run / "best_model" / "config.json").write_text(json.dumps(record))
    words = ["--lora", run / "best_model", "--num_samples", 2, "--output", tmp_path / "out"]
    code, out, _ = call(*words)
    assert code == 0 and "warning: 5 images that are held out were in the training of" in out
    assert "--task" not in out and "--train_file" not in out
    (run / "best_model" / "config.json").write_text(json.dumps(record | {"task": "chat"}))
    code, out, _ = call(*words)
    assert "--eval_only --lora" in out and "--task chat" in out


def test_what_was_said_before_a_question_stays_with_it(call, world, tmp_path):
    rows = [{"img": row_of["conversations"][0]["value"].split("<|vision_start|>")[1].split("<|")[0],
             "prompt": "And <b>where</b>?", "label": "north", "history": [["Is there a road?", "yes"]]}
            for row_of in world.rows()[:2]]  # fmt: skip
    (world.root / "talk.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert call("--data", world.root / "talk.json", "--output", tmp_path)[0] == 0
    assert all(row["history"] == [["Is there a road?", "yes"]] for row in read(tmp_path))
    assert "Is there a road? yes → And &lt;b&gt;where&lt;/b&gt;?" in (tmp_path / "report.html").read_text()


# ----------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.fixture
def torn(world, tmp_path) -> Path:
    """The data in a folder where the pixels of one image are cut off behind a whole header."""
    for path in world.root.glob("*号.*"):
        shutil.copy(path, tmp_path)
    whole = (tmp_path / "2 号.png").read_bytes()
    (tmp_path / "2 号.png").write_bytes(whole[: len(whole) // 3])
    return Path(shutil.copy(world.data, tmp_path / "torn.json"))


@pytest.mark.parametrize(
    "words", [["--num_samples", 0], ["--num_samples", 500], ["--only", "lost", "wrong", "gained", "right"]]
)
def test_an_unreadable_image_is_left_out_counted_and_named(call, torn, tmp_path, words):
    code, _, err = call("--data", torn, *words, "--max_rejected", 0.2, "--output", tmp_path / "out")
    rows = read(tmp_path / "out")
    assert code == 0 and "1 images cannot be read" in err and "2 号.png" in err and "Traceback" not in err
    assert all("2 号.png" not in row["image_path"] for row in rows) and len(rows) == (
        20 if words[0] == "--only" else 30
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 images cannot be read" in page and '<figure class="card"' in page


def test_too_many_unreadable_images_stop_the_run(call, torn, tmp_path):
    code, _, err = call("--data", torn, "--num_samples", 0, "--output", tmp_path / "out")
    assert code == 2 and "1 images cannot be read, and --max_rejected allows 0" in err and "2 号.png" in err
    assert not (tmp_path / "out").exists()
    for path in tmp_path.glob("*号.*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    code, _, err = call("--data", torn, "--max_rejected", 1, "--output", tmp_path / "out")
    assert code == 2 and "Traceback" not in err and not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_leave_nothing(call, world, loud, tmp_path):
    other = Path(shutil.copytree(loud, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "another base"}))
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    out = tmp_path / "out"
    for words, said in [
        (["--lora", tmp_path / "none"], "none: no such folder"),
        (["--lora", world.lora.parent], "did you mean its best_model/?"),
        (["--base", other], "is not the one"),
        (["--base", tmp_path / "nothing"], "no model here"),
        (["--data", tmp_path / "none.json"], "no such file"),
        (["--type", "colour"], "--type colour"),
        (["--num_samples", -1], "--num_samples -1"),
        (["--max_rejected", 1.5], "--max_rejected 1.5"),
        (["--device", "cuda:77"], "--device cuda:77"),
    ]:
        code, _, err = call(*words, "--output", out)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, (words, err)
        assert not out.exists()
    for bad in (tmp_path / "file", tmp_path / "file" / "deeper" / "out", tmp_path / "taken"):
        code, printed, err = call("--output", bad)
        assert code == 2 and "--output" in err and printed == "" and len(err.strip().splitlines()) == 1
    assert (tmp_path / "file").read_text() == "x"
    assert call("--only", "better")[0] == 2


def test_files_are_written_whole_or_not_at_all(call, tmp_path, monkeypatch):
    assert call("--num_samples", 2, "--output", tmp_path)[0] == 0
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for error, wanted in ((KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)):

        def fail(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(report.os, "replace", fail)
            code, _, err = call("--num_samples", 5, "--output", tmp_path)
        assert code == wanted and len(err.strip().splitlines()) == 1
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    assert call("--num_samples", 5, "--output", tmp_path)[0] == 0 and len(read(tmp_path)) == 5


def test_another_tools_adapter_says_its_defaults(call, world, loud, tmp_path):
    folder = Path(shutil.copytree(world.lora, tmp_path / "peft"))
    (folder / "vqa.json").unlink()
    code, out, _ = call("--lora", folder, "--num_samples", 2)
    assert "--train_file data_vl_train.json" in out
    assert code == 0 and "no vqa.json" in out and "preset full" in out and "'Answer with one word" in out
    assert len(read(tmp_path / "compare")) == 2  # beside the adapter
    code, _, err = call("--lora", folder, "--decode", "candidates", "--output", tmp_path / "none")
    assert code == 2 and "records no answers" in err and not (tmp_path / "none").exists()
    record = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": None}))
    code, _, err = call("--lora", folder, "--output", tmp_path / "none")
    assert code == 2 and "--base" in err and not (tmp_path / "none").exists()
    assert call("--lora", folder, "--base", loud, "--num_samples", 2)[0] == 0


def test_presets(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for words, said in [
        ([], "--lora"),
        (["--preset", "demo"], "train_vqa.py --preset demo --output_dir output/demo_vqa"),
    ]:
        with pytest.raises(SystemExit) as stop, user_errors():
            compare_before_after.main(words)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert compare_before_after.preset_config("demo").prompt == "{question}"
    assert compare_before_after.preset_config("full") == VQAConfig(
        train_file="data_vl_train.json", test_file="data_vl_test.json"
    )


def test_right_is_the_exact_protocol():
    from metrics import is_right

    assert is_right("Yes.", "yes", "presence") and not is_right("no", "yes", "presence")
    assert is_right("12 buildings", "12", "count") and not is_right("", "12", "count")


def test_real_process(world, tmp_path):
    command = [sys.executable, str(ROOT / "compare_before_after.py")]
    flags = ["--lora", str(world.lora), "--data", str(world.data), "--num_samples", "2", "--output", str(tmp_path)]
    made = subprocess.run(
        [*command, *flags, "--device", "cpu"], capture_output=True, timeout=120,
        env={"PATH": "", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "COLUMNS": "60"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr.decode()  # a terminal without ✓ and 图 gets question marks
    assert len(read(tmp_path)) == 2 and b"report  " in made.stdout
    made = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0 and "--num_samples" in made.stdout
    code = "import sys, compare_before_after; print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
    light = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert light.stdout.strip() == "" and light.returncode == 0  # so --help and mistakes answer at once


def test_the_full_score_of_the_file_that_was_trained_on(tmp_path):
    """--eval_only finds the images that training held out; asked of the whole file, it would refuse the others as leaks."""
    config, data = VQAConfig(), str(tmp_path / "all.json")

    def said(settings, **asked):
        (tmp_path / "config.json").write_text(json.dumps({"task": "vqa", "settings": settings}))
        args = {"preset": "full", "lora": str(tmp_path), "data": data, "image_root": None, "test_split": "test"}
        args |= {"decode": config.decode, "prompt": None} | asked
        return compare_before_after.full_score(SimpleNamespace(**args), config.base_model, config)

    alone = f"python train_vqa.py --eval_only --lora {tmp_path}"
    assert said({"train_file": data}) == alone
    assert (
        said({"train_file": data}, test_split="test_b", image_root="p") == f"{alone} --image_root p --test_split test_b"
    )
    for other in ({"train_file": "b.json"}, {"train_file": data, "test_file": "c.json"}):
        assert said(other) == f"{alone} --test_file {data} --test_split test"
