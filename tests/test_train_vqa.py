"""train_vqa.py from the command line: data, training, before and after, resume, merge."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import train_vqa
from config import (
    InputError,
    VQAConfig,
    refuse_unwritable,
    resolve_checkpoint,
    use_files_of_training,
    whole_checkpoints,
)
from model import VQA, load_processor
from scenes import read_chat, read_conversations
from tests.conftest import conversation, draw, relative
from tests.processes import run_on_two_processes
from trainer import read_history

SMALL = ["--preset=demo", "--min_pixels=784", "--max_pixels=12544", "--stretch=auto", "--lora_rank=4", "--num_train_epochs=2",
         "--per_device_train_batch_size=3", "--disable_tqdm=true", "--learning_rate=0.01", "--max_rejected=0.2"]  # fmt: skip


@pytest.fixture
def run(base, asked, tmp_path):
    """`run(flags...)`: train_vqa.main on the tiny base in its own output folder."""

    def start(*flags, output="run"):
        where = [f"--base_model={base}", f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / output}"]
        return train_vqa.main([*SMALL, *where, *asked.flags(), *flags])

    return start


def test_whole_run(run, tmp_path, capsys):
    results = run("--no_blind_baseline")
    folder = tmp_path / "run"
    for name in ("best_model/adapter_model.safetensors", "best_model/vqa.json", "config.json", "metrics.jsonl", "results.json",
                 "samples.jsonl", "report.html"):  # fmt: skip
        assert (folder / name).is_file(), name
    printed = capsys.readouterr().out
    assert "before: adapter off" in printed and "majority answer" in printed and "McNemar" in printed
    assert results["images"] == {"train": 9, "val": 4, "test": 5} and "blind" not in results
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == results["after"]["questions"] == results["before"]["questions"]
    share = sum(row["after_right"] for row in rows) / len(rows)
    assert share == pytest.approx(results["after"]["exact"]["micro"])
    settings = json.loads((folder / "best_model" / "vqa.json").read_text())
    assert set(settings["answers"]) == {"presence", "count", "rural_urban"}
    assert settings["answers"]["presence"] == ["no", "yes"]


def test_eval_only_repeats_the_scores(run, base, asked, tmp_path, capsys):
    trained = run("--no_blind_baseline")
    again = run("--eval_only", f"--lora={tmp_path / 'run' / 'best_model'}", output="again")
    for name in ("before", "after", "majority", "change"):
        assert again[name] == trained[name], name
    kept = tmp_path / "again"
    assert json.loads((kept / "results.json").read_text())["after"] == json.loads(json.dumps(again["after"]))
    assert (kept / "samples.jsonl").read_text() == (tmp_path / "run" / "samples.jsonl").read_text()
    assert (kept / "report.html").is_file() and not (kept / "best_model").exists()
    chosen = run("--eval_only", f"--lora={tmp_path / 'run' / 'best_model'}", "--decode=candidates", output="chosen")
    rows = chosen["after"]["exact"]
    assert rows["micro"] >= 0 and chosen["after"]["questions"] == trained["after"]["questions"]


def test_eval_only_takes_the_files_of_training(run, base, asked, tmp_path, monkeypatch):
    trained = run("--no_blind_baseline")
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    rows = [row | {"conversations": [row["conversations"][0], {"from": "assistant", "value": "maybe"}]}
            for row in json.loads(asked.train.read_text())]  # fmt: skip
    (other / "data_vl_train.json").write_text(json.dumps(rows))
    common = ["--eval_only", f"--lora={tmp_path / 'run' / 'best_model'}", "--use_cpu", "--bf16=false"]
    again = train_vqa.main(common)
    assert again["majority"] == trained["majority"] and again["after"] == trained["after"]
    named = train_vqa.main([*common, "--train_file=data_vl_train.json", f"--test_file={asked.test}"])
    assert named["majority"]["exact"]["micro"] == 0 and named["after"] == trained["after"]


@pytest.mark.parametrize("recorded, first", [("theirs", ["theirs"]), (None, ["d", "d/images"])])
def test_images_of_another_test_file_are_not_those_of_training(recorded, first, tmp_path):
    """Two data sets may number their images alike: each file's are looked for in its own place."""
    settings = {"train_file": "d/a.json"} | ({"image_root": recorded} if recorded else {})
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings}))
    for argv, root, train_root in (
        ([], recorded, None),
        (["--image_root=ours", "--test_file=b.json"], "ours", os.pathsep.join([*first, "ours"])),
        (["--test_file=b.json"], recorded and os.pathsep.join([".", "images", recorded]), recorded),
    ):
        config = VQAConfig(
            lora=str(tmp_path), image_root="ours" if len(argv) == 2 else None, test_file="b.json", val_fraction=0.5
        )
        args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, seed=7)
        assert use_files_of_training(config, args, argv, tmp_path) == train_root
        assert (config.train_file, config.image_root, args.seed) == ("d/a.json", root, 42)
        assert config.test_file == (None if not argv else "b.json")  # not the preset's


def test_eval_only_scores_what_was_held_out_then(run, base, asked, tmp_path):
    """By another seed or share other images would be held out, which were trained on."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row | {"split": None} for row in json.loads(asked.train.read_text())]))
    where = [f"--base_model={base}", f"--train_file={rows}", f"--cache_dir={tmp_path / 'cache'}"]
    split = ["--seed=5", "--val_fraction=0.4"]
    trained = train_vqa.main([*SMALL, *where, *split, "--no_blind_baseline", f"--output_dir={tmp_path / 'run'}"])
    lora = f"--lora={tmp_path / 'run' / 'best_model'}"
    for words in ([], [f"--train_file={rows}"]):
        again = train_vqa.main(["--preset=demo", "--eval_only", lora, *words])
        assert again["images"] == trained["images"] and again["after"] == trained["after"]
    with pytest.raises(InputError, match="was trained with --task rsvqa"):
        train_vqa.main(["--preset=demo", "--task=chat", "--eval_only", lora])
    with pytest.raises(InputError, match=r"--max_pixels: .* was trained with 12544 and keeps that"):
        train_vqa.main(["--preset=demo", "--eval_only", lora, "--max_pixels=3136"])


def test_resuming_from_the_end_trains_no_step(run, tmp_path):
    """As after a kill while the test questions are answered."""
    run(
        "--no_blind_baseline",
        "--lr_scheduler_type=constant",
        "--num_train_epochs=1.5",
        "--load_best_model_at_end=false",
    )
    whole, folder = adapter(tmp_path / "run"), tmp_path / "run"
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    steps = sorted(path.name for path in folder.glob("checkpoint-*"))
    for name in ("best_model", "results.json"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    bar = "--disable_tqdm=false"  # the progress bar is ended, too, by what has no step to go
    again = train_vqa.main([f"--resume_from_checkpoint={folder}", bar])
    assert again["steps"] == again["best_step"] == int(last.name[11:])
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == steps
    assert all(torch.equal(tensor, whole[key]) for key, tensor in adapter(folder).items())
    (last / "optimizer.pt").unlink()
    with pytest.raises(InputError, match="holds no optimizer and scheduler"):
        train_vqa.main([f"--resume_from_checkpoint={folder}"])


def test_a_run_of_one_step_trains(run, tmp_path):
    run(
        "--no_blind_baseline",
        "--max_steps=1",
        "--eval_strategy=no",
        "--save_strategy=no",
        "--load_best_model_at_end=false",
    )
    assert any(value.any() for key, value in adapter(tmp_path / "run").items() if "lora_B" in key)


def test_a_score_that_is_none_is_said_before_anything_is_answered(run, tmp_path, monkeypatch):
    choose = ["--no_blind_baseline", "--max_steps=2", "--load_best_model_at_end=true", "--save_strategy=steps",
              "--eval_strategy=steps", "--save_steps=1", "--eval_steps=1"]  # fmt: skip
    expected = r"--metric_for_best_model accuracy_presense: expected one of accuracy, .*_presence"
    with monkeypatch.context() as patch, pytest.raises(InputError, match=expected):
        patch.setattr(VQA, "answer", None)
        run(*choose, "--metric_for_best_model=accuracy_presense", output="other")
    assert not (tmp_path / "other" / "metrics.jsonl").exists(), "no step was made"
    assert run(*choose, "--metric_for_best_model=eval_accuracy_presence")["best_step"] in (1, 2)


def test_folders_that_cannot_be_written_are_said_first(run, tmp_path):
    (tmp_path / "file").write_text("")
    for flag, path in (
        ("output_dir", tmp_path / "file"),
        ("output_dir", tmp_path / "file" / "run"),
        ("cache_dir", tmp_path / "file"),
    ):
        with pytest.raises(InputError, match=f"--{flag} .*file"):
            run(f"--{flag}={path}")
    with pytest.raises(InputError, match="--output: its folder"):
        train_vqa.merge([f"--lora={tmp_path}", f"--output={tmp_path / 'file' / 'merged'}"])
    refuse_unwritable(tmp_path / "a" / "b", "--output_dir")
    assert not (tmp_path / "a").exists(), "asking leaves nothing behind"


def test_blind_baseline_is_trained_goes_on_and_the_adapter_is_back(run, tmp_path):
    results = run("--save_total_limit=9", "--lora_dropout=0.1")
    assert 0 <= results["blind"]["exact"]["micro"] <= 1 and (tmp_path / "run" / "blind" / "metrics.jsonl").is_file()
    alone = run("--eval_only", f"--lora={tmp_path / 'run' / 'best_model'}", output="alone")
    assert alone["after"] == results["after"], "the blind training must not touch the adapter that is scored"

    first, last = whole_checkpoints(tmp_path / "run" / "blind").values()
    shutil.rmtree(max(first, last))  # as a kill late in the blind training leaves it
    again = train_vqa.main([f"--resume_from_checkpoint={tmp_path / 'run'}"])
    assert again["blind"] == results["blind"] and again["after"] == results["after"]
    steps = [row["step"] for row in read_history(tmp_path / "run" / "blind") if "loss" in row]
    assert steps == sorted(set(steps))
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert train_vqa.begun_blind(tmp_path / "run", settings) == str(max(first, last))
    assert train_vqa.begun_blind(tmp_path / "run", settings | {"trained_on": "another"}) is None
    assert train_vqa.begun_blind(tmp_path, settings) is None
    about = resolve_checkpoint(tmp_path / "run") / "vqa.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_fingerprint": "0123"}))
    with pytest.raises(InputError, match=r"is not the one .* was trained on \(0123"):  # as after another download
        train_vqa.main([f"--resume_from_checkpoint={tmp_path / 'run'}", "--num_train_epochs=9"])


def adapter(folder) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in load_file(folder / "best_model" / "adapter_model.safetensors").items()}


def test_packing_accumulation_and_budget_train_the_same_adapter(run, tmp_path):
    """Rows one by one, packed, in two micro-batches, and in small pieces: the same weights after two epochs."""
    common = ["--no_blind_baseline", "--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false",
              "--learning_rate=0.001", "--optim=sgd", "--max_grad_norm=0"]  # fmt: skip
    variants = {
        "packed": [], "rows": ["--no_packing"], "small": ["--pack_tokens=150"], "no cache": ["--cache_dir=none"],
        "two": ["--per_device_train_batch_size=1", "--gradient_accumulation_steps=3"],
        "checkpointed": ["--gradient_checkpointing=true"],
    }  # fmt: skip
    made = {}
    for name, flags in variants.items():
        run(*common, *flags, output=name)
        made[name] = adapter(tmp_path / name)
    first = made.pop("packed")
    moved = torch.cat([value.flatten() for key, value in first.items() if "lora_B" in key])
    assert moved.abs().max() > 0
    for name, tensors in made.items():
        other = torch.cat([value.flatten() for key, value in tensors.items() if "lora_B" in key])
        assert ((other - moved).norm() / moved.norm()).item() < 1e-4, name


def test_two_processes_equal_one_with_twice_the_batch(run, base, asked, tmp_path):
    flags = ["--no_blind_baseline", "--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false",
             "--learning_rate=0.01", "--optim=sgd", "--max_grad_norm=0", "--pack_tokens=150",
             "--logging_steps=1"]  # fmt: skip
    run(*flags, "--per_device_train_batch_size=4", output="one")
    words = [*SMALL, f"--base_model={base}", "--cache_dir=none", f"--output_dir={tmp_path / 'two'}", *asked.flags(), *flags,
             "--per_device_train_batch_size=2", "--ddp_backend=gloo"]  # fmt: skip
    run_on_two_processes("train_vqa.py", *words)
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    moved = {key: value for key, value in one.items() if "lora_B" in key}
    assert max(value.abs().max() for value in moved.values()) > 1e-4
    for key, value in moved.items():
        assert ((two[key] - value).norm() / value.norm()).item() < 1e-4, key
    logged = [[row["loss"] for row in read_history(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    assert len(logged[0]) > 1 and logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_resumed_run_ends_with_the_same_adapter(run, tmp_path):
    flags = ["--no_blind_baseline", "--lora_dropout=0.1", "--texts_per_scene=2", "--save_strategy=steps", "--save_steps=2",
             "--eval_strategy=steps", "--eval_steps=2", "--num_train_epochs=3", "--save_total_limit=9"]  # fmt: skip
    run(*flags)
    whole = adapter(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for leftover in [*(tmp_path / "cut").glob("checkpoint-[4-9]"), tmp_path / "cut" / "best_model"]:
        shutil.rmtree(leftover)
    train_vqa.main([f"--resume_from_checkpoint={tmp_path / 'cut'}"])
    again = adapter(tmp_path / "cut")
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_answered(run, tmp_path, monkeypatch):
    run("--no_blind_baseline", "--max_steps=1")
    monkeypatch.setattr(train_vqa.VQA, "answer", None)
    with pytest.raises(
        InputError, match=r"adapter_model\.safetensors: tensors do not fit the model: .* of another shape"
    ):
        train_vqa.main([f"--resume_from_checkpoint={tmp_path / 'run'}", "--lora_rank=3"])


def test_training_goes_on_from_an_adapter(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "peft.tuners.tuners_utils.MIN_TARGET_MODULES_FOR_OPTIMIZATION", 2
    )  # 20: what a real base has is more
    run("--no_blind_baseline")
    results = run(
        "--no_blind_baseline", f"--lora={tmp_path / 'run' / 'best_model'}", "--num_train_epochs=1", output="more"
    )
    assert results["after"]["questions"] and (tmp_path / "more" / "best_model" / "vqa.json").is_file()
    first, second = adapter(tmp_path / "run"), adapter(tmp_path / "more")
    again = run("--eval_only", f"--lora={tmp_path / 'more' / 'best_model'}", output="again")
    assert again["after"] == results["after"], "peft names many modules by their ends"
    assert first.keys() == second.keys() and any(not torch.equal(first[key], second[key]) for key in first)


def test_what_an_adapter_was_trained_on_is_not_held_out_later(run, asked, tmp_path, capsys):
    """More data came, and a split was drawn anew."""
    run("--no_blind_baseline", "--max_steps=1")
    for name, file, split in (("train", asked.test, "train"), ("test", asked.train, "test")):
        rows = [row | {"split": split} for row in json.loads(file.read_text()) if row["split"] != "val"]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    more = ["--no_blind_baseline", f"--lora={tmp_path / 'run' / 'best_model'}", f"--train_file={tmp_path / 'train.json'}",
            f"--test_file={tmp_path / 'test.json'}", "--max_steps=1"]  # fmt: skip
    with pytest.raises(
        InputError, match=r"9 images that are held out were in the training of .*best_model, first .*split"
    ):
        run(*more, output="more")
    assert not (tmp_path / "more" / "metrics.jsonl").exists()
    settings = json.loads((tmp_path / "run" / "best_model" / "config.json").read_text())
    run("--eval_only", *more[1:4], output="scored")
    assert "warning: 9 images that are held out" in capsys.readouterr().out
    run(*more, "--allow_leak", output="more")
    assert "warning: 9 images that are held out" in capsys.readouterr().out
    link = f"--lora={tmp_path / 'more' / 'best_model'}"
    with pytest.raises(InputError, match=r"9 images that are held out .*run/best_model"):  # a chain of runs
        run("--no_blind_baseline", link, *more[2:], output="third")
    with pytest.raises(InputError, match=r"held out .*more/best_model"):  # another seed draws another validation split
        run("--no_blind_baseline", link, *more[2:], "--seed=7", output="third")
    record = tmp_path / "run" / "best_model" / "config.json"
    record.write_text("{}")
    run(*more, output="other")  # another tool's
    record.write_text(json.dumps(settings))
    record.write_text(record.read_text().replace(str(asked.train), str(tmp_path / "gone.json")))
    run(*more, output="again")
    assert "cannot be looked at" in capsys.readouterr().out


def test_data_that_has_changed_is_said_when_an_adapter_is_scored(run, asked, tmp_path, capsys):
    rows = json.loads(asked.train.read_text())
    (tmp_path / "train.json").write_text(json.dumps(rows))
    file = f"--train_file={tmp_path / 'train.json'}"
    run("--no_blind_baseline", "--max_steps=1", file)
    score = ["--eval_only", f"--lora={tmp_path / 'run' / 'best_model'}", file]
    run(*score, output="same")
    assert "has changed since" not in capsys.readouterr().out
    (tmp_path / "train.json").write_text(json.dumps(rows[1:]))  # of a training image
    run(*score, output="other")
    assert "train.json has changed since: images that were trained on may be held out" in capsys.readouterr().out


def test_the_base_is_the_adapters_unless_a_flag_says_otherwise(run, base, asked, tmp_path):
    """With --preset, whose own base is another; a resumed run keeps to what it began with."""
    moved, lora = tmp_path / "moved", f"--lora={tmp_path / 'run' / 'best_model'}"
    shutil.copytree(base, moved)
    run("--no_blind_baseline", f"--base_model={moved}", "--num_train_epochs=1")
    rest = [*SMALL, *asked.flags(), lora, "--no_blind_baseline", "--cache_dir=none"]
    assert train_vqa.main([*rest, "--eval_only"])["config"]["base_model"] == str(moved)
    moved.rename(tmp_path / "away")
    with pytest.raises(InputError, match="no model here"):
        train_vqa.main([*rest, "--eval_only"])
    more = [f"--output_dir={tmp_path / 'more'}", f"--base_model={tmp_path / 'away'}"]
    train_vqa.main([*rest, *more])
    settings = json.loads((tmp_path / "more" / "best_model" / "vqa.json").read_text())
    assert settings["base_model"] == str(tmp_path / "away")
    for leftover in (sorted((tmp_path / "more").glob("checkpoint-*"))[-1], tmp_path / "more" / "best_model"):
        shutil.rmtree(leftover)
    train_vqa.main([f"--resume_from_checkpoint={tmp_path / 'more'}"])
    assert (tmp_path / "more" / "best_model" / "vqa.json").is_file()


def test_merge_command(run, tmp_path, capsys):
    run("--no_blind_baseline")
    train_vqa.main(["merge", f"--lora={tmp_path / 'run' / 'best_model'}", f"--output={tmp_path / 'merged'}"])
    assert (tmp_path / "merged" / "model.safetensors").is_file() and "merged" in capsys.readouterr().out
    with pytest.raises(InputError, match="is there already"):
        train_vqa.main(["merge", f"--lora={tmp_path / 'run' / 'best_model'}", f"--output={tmp_path / 'merged'}"])
    with pytest.raises(InputError, match="not an adapter"):
        train_vqa.main(["merge", f"--lora={tmp_path}", f"--output={tmp_path / 'other'}"])
    assert not (tmp_path / "other").exists()


def test_mistakes_are_said_in_one_line(run, base, asked, tmp_path):
    with pytest.raises(InputError, match="--lora"):
        run("--eval_only")
    with pytest.raises(InputError, match="did you mean its best_model"):
        (tmp_path / "r" / "best_model").mkdir(parents=True)
        run("--eval_only", f"--lora={tmp_path / 'r'}")
    with pytest.raises(InputError, match="no model here"):
        run(f"--base_model={tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="no such file"):
        run(f"--train_file={tmp_path / 'none.json'}")
    with pytest.raises(InputError, match=r"too long .*all would pass with --max_question_tokens \d"):
        run("--max_question_tokens=3")
    with pytest.raises(InputError, match="expected"):
        run("--prompt=hello")
    with pytest.raises(InputError, match="pack_tokens"):
        run("--pack_tokens=1")
    assert not (tmp_path / "run" / "best_model").exists()


def test_long_answers_are_left_out_and_listed(run, asked, tmp_path):
    rows = json.loads(asked.train.read_text())
    image = draw(tmp_path / "long.png", 1)
    rows.append(conversation(999, image, "Describe it.", "word " * 60, "presence", "train"))
    rows.append(conversation(998, image, "Is it long?", "yes", "presence", "train"))
    (tmp_path / "train.json").write_text(json.dumps(rows))
    results = run("--no_blind_baseline", "--num_train_epochs=1", f"--train_file={tmp_path / 'train.json'}")
    listed = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [row["row"] for row in listed] == ["rsvqa_999"] and "--max_answer_tokens" in listed[0]["reason"]
    assert results["images"]["train"] == 10
    with pytest.raises(
        InputError, match=r"1 of .* texts are too long .*; answers that are sentences are for --task chat"
    ):
        run(f"--train_file={tmp_path / 'train.json'}", "--max_rejected=0", output="strict")


def test_a_part_of_the_test_split_is_scored(run, asked, tmp_path):
    """The same part whatever the seed, so that runs can be compared."""
    scored = {}
    for seed in (1, 2):
        results = run(
            "--no_blind_baseline", "--max_steps=1", "--max_test_scenes=2", f"--seed={seed}", output=f"run{seed}"
        )
        lines = (tmp_path / f"run{seed}" / "samples.jsonl").read_text().splitlines()
        scored[seed] = {json.loads(line)["image_path"] for line in lines}
        assert results["images"]["test"] == len(scored[seed]) == 2
    assert scored[1] == scored[2]


def test_an_image_that_cannot_be_decoded_is_left_out(run, asked, tmp_path):
    rows = json.loads(asked.train.read_text())
    image = draw(tmp_path / "cut.png", 3, (200, 200))
    image.write_bytes(image.read_bytes()[:900])
    rows.append(conversation(999, image, "Is there water?", "no", "presence", "train"))
    (tmp_path / "train.json").write_text(json.dumps(rows))
    results = run("--no_blind_baseline", "--num_train_epochs=1", f"--train_file={tmp_path / 'train.json'}")
    assert results["images"]["train"] == 9
    assert "cut.png" in (tmp_path / "run" / "rejected.jsonl").read_text()


# ----------------------------------------------------------------------------------------------------
# Reading questions


def read(tmp_path, rows, **options):
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False))
    return read_conversations(tmp_path / "rows.json", **options)


def test_rows_are_gathered_by_image(tmp_path):
    a, b = draw(tmp_path / "a.png", 1), draw(tmp_path / "b.png", 2)
    rows = [conversation(i, image, f"Question {i}?", "yes", "presence") for i, image in enumerate([a, b, a, a])]
    found = read(tmp_path, [*rows, rows[0]])
    assert [len(scene.questions) for scene in found.scenes] == [3, 1] and found.duplicates == 1 and found.rows == 5
    question = found.scenes[0].questions[1]
    assert (question.text, question.answer, question.kind, question.id) == ("Question 2?", "yes", "presence", "rsvqa_2")


def test_chat_rows_and_llava_names_are_read(tmp_path):
    draw(tmp_path / "a.png", 1)
    found = read(tmp_path, [{"img": "a.png", "prompt": "这是什么？", "label": "一片农田。"}])
    assert found.scenes[0].questions[0].answer == "一片农田。" and found.scenes[0].questions[0].kind is None
    turns = [
        {"from": "human", "value": "<|vision_start|>a.png<|vision_end|>What is it?"},
        {"from": "gpt", "value": "A farm."},
    ]
    assert read(tmp_path, [{"conversations": turns}]).scenes[0].questions[0].text == "What is it?"
    turns[0]["value"] = "<image>\nWhat is it?"
    more = [*turns, {"from": "human", "value": "How large?"}, {"from": "gpt", "value": "Two fields."}]
    first, second = read(tmp_path, [{"image": "a.png", "conversations": more}]).scenes[0].questions
    assert first.text == "What is it?" and second.history == (("What is it?", "A farm."),)


def test_messages_of_other_trainers_are_read(tmp_path):
    draw(tmp_path / "a.png", 1)
    told = {"role": "system", "content": "You are helpful."}
    asked, said = {"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A farm."}
    more = [{"role": "user", "content": "How large?"}, {"role": "assistant", "content": "Two fields."}]
    picture, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}
    parts = [{"role": "user", "content": [picture, text]}, said]
    for row in (
        {"messages": [told, asked, said, *more], "images": ["a.png"]},  # ms-swift, LLaMA-Factory
        {"messages": [asked, said, *more], "images": [{"path": "a.png", "bytes": None}]},
        {"messages": [*parts, *more]},
        {"messages": [*parts, *more], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, text]}, said, *more], "images": ["a.png"]},  # TRL
    ):
        for read_rows in (read_conversations, read_chat):
            (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
            first, second = read_rows(tmp_path / "rows.jsonl").scenes[0].questions
            assert (first.text, first.answer, first.history) == ("What is it?", "A farm.", ())
            assert (second.text, second.answer, second.history) == (
                "How large?", "Two fields.", (("What is it?", "A farm."),)
            )  # fmt: skip


def turn(asked="Q? <|vision_start|>a.png<|vision_end|>", said="A"):
    return {"conversations": [{"from": "user", "value": asked}, {"from": "assistant", "value": said}]}


@pytest.mark.parametrize(("row", "reason"), [
    ("text", "expected an object"),
    ({}, "'conversations'"),
    ({"conversations": [{"from": "user", "value": "Q"}]}, "by turns, found 1"),
    ({"conversations": turn()["conversations"][::-1]}, "'from'"),
    (turn(asked="Q?"), "one <|vision_start|>"),
    (turn(asked="<|vision_start|>a.png<|vision_end|>"), "one <|vision_start|>"),
    (turn(asked="Q? <|vision_start|>a.png<|vision_end|><|vision_start|>b.png<|vision_end|>"), "one <|vision_start|>"),
    (turn(asked="Q? <|vision_start|>none.png<|vision_end|>"), "no such image"),
    ({"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}]}, "found 0 images"),
    ({"messages": [{"role": "user", "content": "Q?"}] * 2, "images": ["a.png"]}, "'role'"),
    ({"messages": turn()["conversations"], "images": ["a.png"]}, "'role'"),
    ({"messages": {"role": "user"}}, "'messages'"),
    (
        {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}], "images": ["a.png", "b.png"]},
        "found 2 images",
    ),
    (turn(said=""), "'value' is empty"),
    (turn(said=3), "expected a text"),
    (turn() | {"type": ["count"]}, "'type'"),
    ({"img": "a.png", "prompt": "Q", "label": " "}, "'label' is empty"),
])  # fmt: skip
def test_bad_rows_are_rejected_with_their_reason(row, reason, tmp_path):
    draw(tmp_path / "a.png", 1)
    found = read(tmp_path, [turn(), row], max_rejected=0.5)
    assert [bad.row for bad in found.rejected] == [1] and reason in found.rejected[0].reason
    with pytest.raises(InputError, match="1 of 2 rows"):
        read(tmp_path, [turn(), row])


def test_an_image_in_two_splits_is_an_error(tmp_path):
    image = draw(tmp_path / "a.png", 1)
    rows = [
        conversation(0, image, "A?", "yes", "presence", "train"),
        conversation(1, image, "B?", "no", "presence", "val"),
    ]
    with pytest.raises(InputError, match="is in split"):
        read(tmp_path, rows)
    for content in ({}, [], "x"):
        with pytest.raises(InputError, match="expected a list"):
            read(tmp_path, content)


def test_majority_and_table_hold_what_they_say(asked):
    train = read_conversations(asked.train).scenes
    test = read_conversations(asked.test).scenes
    found = train_vqa.score_majority(train, test)
    truths, kinds, images = train_vqa.columns_of(test)
    counts = [a for scene in train for q in scene.questions if q.kind == "count" for a in [q.answer]]
    most = max(sorted(set(counts)), key=counts.count)
    expected = {"presence": "no", "count": most, "rural_urban": "rural"}
    assert found["exact"]["micro"] == pytest.approx(np.mean([expected[k] == t for t, k in zip(truths, kinds)]))
    assert found["bucketed"]["types"]["count"]["accuracy"] == pytest.approx(
        np.mean([1 <= int(t) <= 10 for t, k in zip(truths, kinds) if k == "count"])
    )
    assert len(set(images)) == 5


def test_compiled_layers_train_the_same_adapter(run, tmp_path, monkeypatch):
    """The layers are traced whole (an operation that breaks the graph would be an error) and the weights are the same."""
    plain = VQA.compile_layers
    monkeypatch.setattr(VQA, "compile_layers", lambda model: plain(model, backend="aot_eager", fullgraph=True))
    flags = ["--no_blind_baseline", "--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false",
             "--learning_rate=0.001", "--optim=sgd", "--max_grad_norm=0", "--texts_per_scene=2"]  # fmt: skip
    # The first layer's input then has a gradient as the others' have, and fewer products are LoRA's: less to trace.
    flags += ["--merger=full", "--lora_targets", "v_proj", "down_proj"]
    torch._dynamo.utils.counters.clear()
    run(*flags, output="eager")
    assert not torch._dynamo.utils.counters["stats"]
    run(*flags, "--torch_compile", output="compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "dynamic shapes: not a graph a step"
    first, second = (
        torch.cat([value.flatten() for key, value in adapter(tmp_path / name).items() if "lora_B" in key])
        for name in ("eager", "compiled")
    )
    assert first.abs().max() > 0 and relative(second, first) < 1e-4


def test_another_tools_adapter_is_merged_as_its_base_sees(answerer, base, tmp_path, capsys):
    """Nobody knows how it was asked, and our preset's pixel limits are not its own."""
    answerer(strength=0.2).save_pretrained(tmp_path / "theirs")
    for name in ("vqa.json", "preprocessor_config.json"):
        (tmp_path / "theirs" / name).unlink()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "merged")
    train_vqa.merge(["--lora", str(tmp_path / "theirs"), "--output", str(tmp_path / "link"), "--base", str(base)])
    made = tmp_path / "disk" / "merged"
    assert not (made / "vqa.json").exists() and "ask it as that tool did" in capsys.readouterr().out
    assert load_processor(made)[0].size == load_processor(base)[0].size
