"""trainer.py and train_match.py: whole runs on the tiny base; resume, kills, two processes, the best model."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import config
import losses
import model
import train_match
import trainer as trainer_module
from config import InputError, record_of, resolve_checkpoint
from imagery import ImageSettings
from model import DualEncoder
from scenes import Scene, is_chinese
from tests.conftest import draw
from tests.processes import FORKS, forked, run_on_two
from trainer import SceneTrainer, read_history

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def flags(base, drawn):
    """Flags of a tiny run; a later flag of the same name wins."""
    small = "--max_pixels 3136 --min_pixels 784 --projection_dim 16 --lora_rank 4 --lora_alpha 8 --learning_rate 1e-2"
    run = "--per_device_train_batch_size 4 --per_device_eval_batch_size 8 --num_train_epochs 2 --logging_steps 1"
    quiet = "--use_cpu true --report_to none --disable_tqdm true --gradient_checkpointing false --cache_dir none"
    known = [f"--base_model={base}", *drawn.flags(), "--dataloader_num_workers=0"]
    return [*known, *small.split(), *run.split(), *quiet.split()]


@pytest.fixture
def train(flags, monkeypatch):
    """`train(folder, "--flag value ...")`: a run without report and baseline, which are not the point here."""
    monkeypatch.setattr(train_match, "write_report", lambda *a: None)
    monkeypatch.setattr(train_match, "histogram_baseline", lambda *a: {})
    return lambda folder, words="": train_match.main([*flags, f"--output_dir={folder}", *words.split()])


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def distance(one: dict, other: dict) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_identical(one, other, where="") -> None:
    """Tensors, containers and numbers are equal bit by bit."""
    if torch.is_tensor(one):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other)):
            assert_identical(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def assert_same_run(one: Path, other: Path, last: int) -> None:
    for name in ("best_model", f"checkpoint-{last}"):
        assert_identical(weights(one / name), weights(other / name), name)
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(run / f"checkpoint-{last}" / name, weights_only=True) for run in (one, other)]
        assert_identical(*states, name)
    rows = [
        [{k: v for k, v in row.items() if not k.endswith(("runtime", "per_second"))} for row in read_history(run)]
        for run in (one, other)
    ]
    assert [row for row in rows[0] if "train_loss" not in row] == [row for row in rows[1] if "train_loss" not in row]


# ----------------------------------------------------------------------------------------------------
# One run, end to end


def test_run_end_to_end(flags, tmp_path, capsys):
    run = tmp_path / "run"
    results = train_match.main([*flags, f"--output_dir={run}", f"--cache_dir={tmp_path / 'cache'}"])
    assert results["steps"] == 8 and results["split"] == "test"  # 13 scenes in batches of 4, filled up; 2 epochs
    assert results["images"] == {"train": 13, "val": 6, "test": 6}
    for name in ("untrained", "trained", "histogram"):
        assert 0 <= results[name]["mR"] <= 1 and 0 <= results[name]["accuracy"] <= 1
    assert json.loads((run / "results.json").read_text())["trained"] == results["trained"]
    assert "<html" in (run / "report.html").read_text() and not (run / "rejected.jsonl").exists()
    settings = json.loads((run / "config.json").read_text())
    assert settings["task"] == "match" and settings["settings"]["projection_dim"] == 16
    rows = read_history(run)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "eval_mR" in row] == [4, 8]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    expected = {"model.safetensors", "dual_encoder.json", "config.json", "base_config", "tokenizer.json"}
    expected |= {"preprocessor_config.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for path in run.glob("checkpoint-*"):
        assert expected <= {p.name for p in path.iterdir()}
        assert json.loads((path / "config.json").read_text()) == settings
    best = {p.name for p in (run / "best_model").iterdir()}
    assert "model.safetensors" in best and "optimizer.pt" not in best
    assert not [p for p in run.iterdir() if p.name.endswith((".partial", ".deleted"))]
    model = DualEncoder.from_pretrained(run / "best_model")
    assert set(weights(run / "best_model")) == set(model.trained_names())
    out = capsys.readouterr().out
    assert str(run / "best_model") in out and "data: train 13 images" in out
    assert list((tmp_path / "cache" / "pixels").rglob("*.npy"))


def test_one_validation_image_and_no_test_split_are_scored(drawn, base, tmp_path, capsys):
    """No text can be taken of another image then: accuracy is left out, the rest is there."""
    rows = json.loads(drawn.train.read_text())
    few = tmp_path / "few.json"
    names = sorted({row["image_name"] for row in rows})[:5]
    few.write_text(json.dumps([row for row in rows if row["image_name"] in names]))
    train_match.main(["--preset=demo", f"--base_model={base}", f"--train_file={few}", f"--image_root={drawn.images}",
                      "--num_train_epochs=1", "--projection_dim=16", f"--output_dir={tmp_path / 'run'}", "--cache_dir=none",
                      "--save_strategy=epoch", "--eval_strategy=epoch", "--disable_tqdm=true"])  # fmt: skip
    out = capsys.readouterr().out
    assert "val split, 1 images" in out and "by image: mR" in out and (tmp_path / "run" / "report.html").is_file()


def test_training_lowers_the_loss(train, tmp_path):
    train(tmp_path / "run", "--num_train_epochs 8 --image_tower full --text_tower full --loss infonce")
    losses = [row["loss"] for row in read_history(tmp_path / "run") if "loss" in row]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_rates_reach_the_optimizer(train, tmp_path, monkeypatch):
    made = []
    create = SceneTrainer.create_optimizer
    monkeypatch.setattr(SceneTrainer, "create_optimizer", lambda self, *a: made.append(self) or create(self, *a))

    def rates(words):
        train(tmp_path / str(len(made)), f"--max_steps 1 --save_strategy no --load_best_model_at_end false {words}")
        trainer = made[-1]
        names = {id(p): n.split(".")[0] for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
        found = {}
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                found.setdefault(names[id(parameter)], set()).add((group["initial_lr"], group["weight_decay"]))
        return found

    given = "--image_learning_rate 1e-4 --text_learning_rate 2e-4 --head_learning_rate 3e-4 --weight_decay 0.1"
    found = rates(f"{given} --loss infonce --image_tower full")
    assert found == {
        "image_tower": {(1e-4, 0.1), (1e-4, 0.0)},  # norms and biases are not decayed
        "text_tower": {(2e-4, 0.1)},  # LoRA matrices
        "image_projection": {(3e-4, 0.1), (3e-4, 0.0)},
        "text_projection": {(3e-4, 0.1), (3e-4, 0.0)},
        "logit_scale": found["logit_scale"],
    }
    assert {rate for rate, _ in found["logit_scale"]} == {3e-4}
    assert set(rates("--image_learning_rate 0 --head_learning_rate 0")["text_projection"]) == {(0.0, 0.0)}
    found = rates("--learning_rate 1e-3")  # LoRA: heads learn ten times as fast
    assert {rate for rate, _ in found["text_tower"]} == {1e-3}
    assert {round(rate, 9) for rate, _ in found["text_projection"]} == {1e-2}


def test_the_temperature_comes_back_from_its_bound(train, tmp_path, monkeypatch):
    """A clamp in the loss alone would end its gradient for good."""
    for module in (losses, train_match):
        monkeypatch.setattr(module, "LOG_SCALE_MOST", 2.0)  # --temperature 0.1 starts above, at 2.3
    words = "--loss infonce --temperature 0.1 --eval_strategy no --save_strategy no --load_best_model_at_end false"
    train(tmp_path / "one", f"{words} --max_steps 1")
    assert float(weights(tmp_path / "one/best_model")["logit_scale"]) == 2.0
    train(tmp_path / "more", f"{words} --max_steps 4 --head_learning_rate 0.1")
    assert float(weights(tmp_path / "more/best_model")["logit_scale"]) < 2.0


def test_the_last_checkpoint_stays_where_the_best_is_not_asked_for(train, tmp_path, scripted):
    scripted([0.9, 0.5, 0.3])
    train(tmp_path / "run", "--num_train_epochs 3 --save_total_limit 1 --load_best_model_at_end false")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-12"]


@pytest.fixture
def scripted(monkeypatch):
    """Give the validation split a chosen mR at each evaluation."""

    def script(values):
        values = iter(values)
        score = train_match.score_scenes

        def scored(image, text, scenes, *rest):
            found = score(image, text, scenes, *rest)
            return found | {"mR": next(values)} if "val_" in Path(scenes[0].image).name else found

        monkeypatch.setattr(train_match, "score_scenes", scored)

    return script


def test_clipping_what_is_trained_is_clipping_all(train, tmp_path, monkeypatch):
    words = "--max_steps 3 --max_grad_norm 0.01"
    train(tmp_path / "trained", words)
    assert all(row["grad_norm"] > 0.01 for row in read_history(tmp_path / "trained") if "grad_norm" in row)
    monkeypatch.delattr(SceneTrainer, "_clip_grad_norm")  # what transformers does
    train(tmp_path / "all", words)
    assert_identical(*(weights(tmp_path / name / "best_model") for name in ("trained", "all")))


def test_early_stopping_and_the_best_model(train, tmp_path, scripted):
    scripted([0.1, 0.5, 0.3, 0.2, 0.9, 0.9])
    results = train(tmp_path / "run", "--num_train_epochs 6 --early_stopping_patience 2")
    assert results["steps"] == 16 and results["best_step"] == 8
    run = tmp_path / "run"
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-8"]
    assert_identical(weights(run / "best_model"), weights(run / "checkpoint-8"))
    assert distance(weights(run / "best_model"), weights(run / "checkpoint-16")) > 1e-4


@pytest.mark.parametrize("logged", [1, 100])
def test_a_run_that_diverges_stops_and_keeps_nothing_of_it(train, tmp_path, monkeypatch, logged):
    step, calls = train_match.MatchTask.step, []
    monkeypatch.setattr(
        train_match.MatchTask, "step",
        lambda *args: calls.append(1) or step(*args) * (torch.nan if len(calls) == 2 else 1),
    )  # fmt: skip
    every = f"--save_strategy steps --eval_strategy steps --save_steps 3 --eval_steps 3 --logging_steps {logged}"
    with pytest.raises(InputError, match=r"the loss is nan at step [23]: .*--learning_rate \(now 0.01\)"):
        train(tmp_path / "run", every)
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "best_model").exists()


def test_best_model_is_that_of_the_best_metric(train, tmp_path, scripted):
    scripted([0.1, 0.2, 0.4, 0.3])
    results = train(tmp_path / "run", "--num_train_epochs 4 --save_total_limit 1")
    assert results["best_step"] == 12 and results["steps"] == 16
    assert_identical(weights(tmp_path / "run" / "best_model"), weights(tmp_path / "run" / "checkpoint-12"))


def test_frozen_towers_with_cached_features_give_the_same_curve(train, tmp_path):
    frozen = "--image_tower frozen --text_tower frozen --num_train_epochs 3"
    train(tmp_path / "plain", frozen)
    train(tmp_path / "kept", f"{frozen} --cache_dir {tmp_path / 'cache'}")
    assert list((tmp_path / "cache" / "features").rglob("*.npz"))
    train(tmp_path / "again", f"{frozen} --cache_dir {tmp_path / 'cache'}")
    curves = [[row["loss"] for row in read_history(tmp_path / n) if "loss" in row] for n in ("plain", "kept", "again")]
    assert len(curves[0]) == 12 and curves[0][0] != curves[0][-1]
    assert curves[1] == pytest.approx(curves[0], abs=2e-4) and curves[2] == curves[1]  # logged to four digits
    assert distance(weights(tmp_path / "plain/best_model"), weights(tmp_path / "kept/best_model")) < 1e-4


def test_features_are_made_anew_when_an_image_changes(train, tmp_path, drawn):
    from tests.conftest import draw

    images = Path(shutil.copytree(drawn.images, tmp_path / "images"))
    words = f"--image_tower frozen --max_steps 1 --image_root {images} --cache_dir "
    first = train(tmp_path / "1", f"{words}{tmp_path / 'kept'}")["untrained"]
    for i, path in enumerate(sorted(images.glob("test_*"))):
        draw(path, 5000 + i, (112, 90), (10 * i, 200, 20))  # other content under the same names
    fresh = train(tmp_path / "2", f"{words}{tmp_path / 'new'}")["untrained"]
    assert train(tmp_path / "3", f"{words}{tmp_path / 'kept'}")["untrained"] == fresh != first


def test_features_of_another_precision_are_made_anew(train, tmp_path):
    """The temperature, a model's first parameter, is float32 whatever its towers are in."""
    words = f"--image_tower frozen --text_tower frozen --max_steps 1 --cache_dir {tmp_path / 'cache'} --bf16 "
    for bf16 in ("false", "true"):
        train(tmp_path / bf16, words + bf16)
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 4


def test_two_micro_batches_equal_one_batch(train, tmp_path):
    words = "--max_samples 12 --in_batch_negatives none --lora_dropout 0 --optim sgd --max_grad_norm 0 --margin 1 "
    words += "--learning_rate 0.3 "
    train(tmp_path / "one", words)
    train(tmp_path / "two", words + "--per_device_train_batch_size 2 --gradient_accumulation_steps 2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert distance(weights(one / "checkpoint-6"), weights(two / "checkpoint-6")) < 1e-5
    assert distance(weights(one / "checkpoint-3"), weights(one / "checkpoint-6")) > 1e-3
    curves = [[row["loss"] for row in read_history(run) if "loss" in row] for run in (one, two)]
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)


def test_mined_negatives(train, tmp_path, capsys):
    train(tmp_path / "run", "--mine_negatives --mine_margin 0 --max_steps 1")
    assert "of 52 rows got a mined negative" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "mined_negatives.json").read_text())["negatives"]
    assert sum(new is not None for own in found for new in own[:3]) > 20  # the fourth text of an image is Chinese
    assert all(is_chinese(new) == (n == 3) for own in found for n, new in enumerate(own) if new)
    assert any(own[3] for own in found)


def test_a_resumed_run_keeps_its_mined_negatives(train, tmp_path):
    words = (
        "--mine_negatives --mine_margin 0 --save_strategy steps --eval_strategy steps --save_steps 3 --eval_steps 3 "
    )
    words += "--save_total_limit -1 "  # as transformers has it: all are kept
    train(tmp_path / "run", words)
    last = max(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*"))
    whole = weights(tmp_path / "run" / f"checkpoint-{last}")
    measured = json.loads((tmp_path / "run" / "untrained.json").read_text())
    again = train(tmp_path / "run", f"--resume_from_checkpoint {tmp_path / 'run' / 'checkpoint-3'}")
    assert_identical(weights(tmp_path / "run" / f"checkpoint-{last}"), whole)
    assert again["untrained"] == measured["scores"]
    # With other negatives the run would have gone elsewhere: the file is what decides.
    mined = tmp_path / "run" / "mined_negatives.json"
    found = json.loads(mined.read_text())
    mined.write_text(json.dumps(found | {"negatives": [[None] * len(row) for row in found["negatives"]]}))
    train(tmp_path / "run", f"--resume_from_checkpoint {tmp_path / 'run' / 'checkpoint-3'}")
    assert distance(weights(tmp_path / "run" / f"checkpoint-{last}"), whole) > 0
    for path in (mined, tmp_path / "run" / "untrained.json"):  # of other data: nothing is paired with the wrong rows
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": "other"}))
    with pytest.raises(InputError, match="mined for other training rows"):
        train(tmp_path / "run", f"--resume_from_checkpoint {tmp_path / 'run' / 'checkpoint-3'}")
    mined.unlink()
    again = train(tmp_path / "run", f"--resume_from_checkpoint {tmp_path / 'run' / 'checkpoint-3'}")
    assert "untrained" not in again
    assert json.loads(mined.read_text()) == found, "mined anew with the model that a run begins with"


def test_a_run_goes_on_in_another_folder(train, tmp_path):
    """With the negatives and the scores before training of its first start."""
    words = "--mine_negatives --mine_margin 0 --max_steps 4 "
    words += "--save_strategy steps --eval_strategy steps --save_steps 2 --eval_steps 2 "
    whole = train(tmp_path / "one", words + "--save_total_limit 9")
    again = train(tmp_path / "two", words + f"--resume_from_checkpoint {tmp_path / 'one' / 'checkpoint-2'}")
    assert again["untrained"] == whole["untrained"]
    assert_identical(weights(tmp_path / "two" / "checkpoint-4"), weights(tmp_path / "one" / "checkpoint-4"))
    for name in ("mined_negatives.json", "untrained.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
        (tmp_path / "one" / name).unlink()
    again = train(tmp_path / "three", words + f"--resume_from_checkpoint {tmp_path / 'one' / 'checkpoint-2'}")
    assert again["untrained"] == whole["untrained"]
    mined = [(tmp_path / run / "mined_negatives.json").read_text() for run in ("two", "three")]
    assert mined[0] == mined[1]


def test_a_run_that_could_learn_nothing_is_refused(train, drawn, tmp_path):
    alone = f"--train_file={drawn.captions} --val_file= --max_steps 1"
    small = "--per_device_train_batch_size 1 --loss infonce --gradient_accumulation_steps 8"
    for words, said in (
        (small, "_batch_size 1: the data gives no neg"),
        ("--in_batch_negatives none", "no row has a negative"),
        ("--mine_model somewhere", "--mine_model: mines only with"),
    ):
        with pytest.raises(InputError, match=said):
            train(tmp_path / "run", f"{alone} {words}")


def test_a_resume_on_another_base_or_on_what_was_trained_on_is_refused(train, drawn, tmp_path):
    train(tmp_path / "run", "--num_train_epochs 1")
    again = f"--resume_from_checkpoint {tmp_path / 'run'} --num_train_epochs 2"
    with pytest.raises(InputError, match="13 images that are held out were in the training of"):
        train(tmp_path / "run", f"{again} --train_file={drawn.test} --test_file={drawn.train}")
    checkpoint = resolve_checkpoint(tmp_path / "run")
    about = checkpoint / "dual_encoder.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_fingerprint": "0123"}))
    with pytest.raises(InputError, match=r"this base .* is not the one .*checkpoint-4 was trained on \(0123"):
        train(tmp_path / "run", again)


def test_one_process_goes_on_with_a_run_of_several(train, tmp_path):
    train(tmp_path / "run", "--num_train_epochs 1 --ddp_backend gloo")
    assert train_match.main(["--resume_from_checkpoint", str(tmp_path / "run"), "--num_train_epochs=2"])["steps"] == 8
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert recorded["ddp_backend"] == "gloo"


def test_a_trained_matcher_can_mine(train, tmp_path, capsys):
    train(tmp_path / "one", "--max_steps 2")
    train(
        tmp_path / "two",
        f"--max_steps 1 --mine_negatives --mine_margin 0 --mine_model {tmp_path / 'one' / 'best_model'}",
    )
    assert "rows got a mined negative" in capsys.readouterr().out
    assert any(new for found in json.loads((tmp_path / "two" / "mined_negatives.json").read_text()) for new in found)


def test_eval_only_scores_a_checkpoint_as_its_run_did(train, drawn, tmp_path, capsys):
    trained = train(tmp_path / "run", "--max_steps 3")["trained"]
    only = f"--eval_only {tmp_path / 'run' / 'best_model'}"
    again = train(tmp_path / "other", only)["trained"]
    with pytest.raises(InputError, match="holds a run already"):
        train(tmp_path / "run", only)
    assert set(again) == set(trained)
    for name, value in trained.items():  # an interval is a pair
        assert again[name] == pytest.approx(value), name
    kept = tmp_path / "other"
    assert json.loads((kept / "results.json").read_text())["trained"] == json.loads(json.dumps(again))
    assert "warning" not in capsys.readouterr().out
    train(tmp_path / "seen", f"{only} --train_file {drawn.test} --test_file {drawn.train}")
    assert "warning: 13 images that are held out were in the training of" in capsys.readouterr().out


def test_data_that_has_changed_is_said_when_a_matcher_is_scored(train, drawn, tmp_path, capsys):
    rows, file = json.loads(drawn.train.read_text()), tmp_path / "train.json"
    file.write_text(json.dumps(rows))
    own = f"--train_file {file} --image_root {drawn.images}"
    train(tmp_path / "run", f"{own} --max_steps 1")
    only = f"{own} --eval_only {tmp_path / 'run' / 'best_model'}"
    train(tmp_path / "same", only)
    assert "has changed since" not in capsys.readouterr().out
    file.write_text(json.dumps(rows[1:]))
    train(tmp_path / "other", only)
    assert "train.json has changed since: images that were trained on may be held out" in capsys.readouterr().out


def test_eval_only_scores_what_was_held_out_then(flags, tmp_path, monkeypatch):
    """By another seed or share other images would be held out, which were trained on."""
    monkeypatch.setattr(train_match, "histogram_baseline", lambda *a: {})
    monkeypatch.setattr(train_match, "write_report", lambda *a: None)
    own = [word for word in flags if not word.startswith(("--val_file", "--test_file"))]
    split = ["--seed=7", "--val_fraction=0.4", "--max_steps=2", "--margin=0.01"]
    trained = train_match.main([*own, *split, f"--output_dir={tmp_path / 'run'}"])
    only = ["--preset=demo", f"--eval_only={tmp_path / 'run' / 'best_model'}", "--use_cpu=true", "--cache_dir=none"]
    monkeypatch.setattr(sys, "argv", ["train_match.py", *only])
    again = train_match.main()
    assert again["images"] == trained["images"] and again["trained"] == trained["trained"]


def test_one_image_has_nothing_to_be_told_from(flags, drawn, tmp_path):
    rows = json.loads(drawn.captions.read_text())
    one = next(row["image"] for row in rows if row["split"] == "train")
    (tmp_path / "one.json").write_text(json.dumps([r for r in rows if r["split"] != "train" or r["image"] == one]))
    own = [f"--train_file={tmp_path / 'one.json'}", f"--image_root={drawn.images}", f"--output_dir={tmp_path / 'run'}"]
    own = [*[flag for flag in flags if "_file=" not in flag], *own]
    with pytest.raises(InputError, match="one image and no row has a negative"):
        train_match.main(own)


def test_a_run_has_its_folder_to_itself(train, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    other = os.open(tmp_path / "run", os.O_RDONLY)  # as another process has it
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="another training is writing to it"):
        patch.setattr(trainer_module.time, "sleep", lambda seconds: None)
        train(tmp_path / "run", "--max_steps 1")
    os.close(other)
    train(tmp_path / "run", "--max_steps 1")
    other = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again
    os.close(other)


def test_numbers_that_are_no_json_stay_out_of_the_history(tmp_path):
    log = trainer_module.MetricsFile()
    args, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(is_world_process_zero=True, global_step=0)
    log.on_train_begin(args, state, None)
    log.on_log(args, state, None, logs={"loss": 1.5, "grad_norm": float("inf"), "other": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 1.5}\n'


def test_colours_know_no_word_of_the_test(tmp_path):
    """A test text without a word of training used to end the run after hours, in the baseline."""
    said = {"a": ["a farm"], "b": ["a field"], "c": ["helipad", "вертолёт"]}
    scenes = [
        Scene(str(draw(tmp_path / f"{name}.png", k, (20, 20), (60 * k, 90, 60))), texts, [(t, None) for t in texts])
        for k, (name, texts) in enumerate(said.items())
    ]
    found = train_match.histogram_baseline(scenes[:2], scenes[2:], ImageSettings(), 0.2)
    assert found["mR"] == 1.0  # of one image


def test_repeated_captions_of_an_image_count_as_published():
    """RSICD repeats sentences until an image has five: a table over them has five texts an image."""
    scenes = [Scene("a", ["x", "y"], [], listed=["x", "x", "x", "y"]), Scene("b", ["z"], [], listed=["z", "z"])]
    scenes += [Scene("c", ["w"], [])]
    texts, rng = ["x", "y", "z", "w"], np.random.default_rng(0)
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.standard_normal((2, 4, 8)))
    found = train_match.score_scenes(image[:3], text, scenes, texts, 0.2)
    plain = train_match.metrics.retrieval(image[:3], text[[0, 0, 0, 1, 2, 2, 3]], np.array([0, 0, 0, 0, 1, 1, 2]))
    assert found["texts"] == 7
    for name in ("i2t_R@1", "t2i_R@1", "mR"):
        assert found[f"strict_{name}"] == pytest.approx(plain[name]), name


# ----------------------------------------------------------------------------------------------------
# Resume


HARD = (  # what a resumed run could get wrong: dropout, drawn texts, micro-batches, a checkpoint inside an epoch
    "--lora_dropout 0.2 --projection_dropout 0.1 --texts_per_scene 2 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 2 --num_train_epochs 3 --eval_strategy steps --save_strategy steps --eval_steps 3 "
    "--save_steps 3 --warmup_steps 0"
)


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """7 micro-batches, so 4 steps, an epoch; 12 in all; checkpoints at 3, 6, 9, 12."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_match, "write_report", lambda *a: None)
        patch.setattr(train_match, "histogram_baseline", lambda *a: {})
        results = train_match.main([*flags, f"--output_dir={run}", *HARD.split()])
    assert results["steps"] == 12
    kept = sorted(run.glob("checkpoint-*"))
    assert len(kept) == 2 and distance(weights(kept[0]), weights(kept[1])) > 1e-3
    return run


class Stop(Exception):
    pass


def stop_after(monkeypatch, step):
    save = SceneTrainer._save_checkpoint

    def saving(self, *args):
        save(self, *args)
        if self.state.global_step == step:
            raise Stop

    monkeypatch.setattr(SceneTrainer, "_save_checkpoint", saving)
    return lambda: monkeypatch.setattr(SceneTrainer, "_save_checkpoint", save)


@pytest.mark.parametrize("step", [3, 6])
def test_resumed_run_is_bit_identical(train, uninterrupted, tmp_path, monkeypatch, step):
    undo = stop_after(monkeypatch, step)
    with pytest.raises(Stop):
        train(tmp_path / "run", HARD)
    undo()
    assert not (tmp_path / "run" / "best_model").exists()
    torch.rand(7)  # whatever happened in between
    random.random()
    results = train_match.main(["--resume_from_checkpoint", str(tmp_path / "run")])  # settings come from the run
    assert results["steps"] == 12
    assert_same_run(uninterrupted, tmp_path / "run", 12)


def test_ctrl_c_says_what_is_kept(train, tmp_path, monkeypatch, capsys):
    step, run = SceneTrainer.training_step, tmp_path / "run"
    for last, said in (
        (0, "no checkpoint is saved yet"),
        (5, f"checkpoint-4 is kept: --resume_from_checkpoint {run} goes on"),
    ):

        def training_step(self, *given, last=last):
            if self.state.global_step == last:
                raise KeyboardInterrupt
            return step(self, *given)

        monkeypatch.setattr(SceneTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            train(run)
        assert said in capsys.readouterr().err


def test_resume_from_an_earlier_checkpoint_replaces_later_ones(train, tmp_path):
    """Other settings give other weights: a folder of that number from before must not stand for them."""
    train(tmp_path / "run", "--num_train_epochs 2")
    before = weights(tmp_path / "run" / "checkpoint-8")
    words = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4"), "--margin", "1.5"]
    train_match.main(words)
    assert distance(before, weights(tmp_path / "run" / "checkpoint-8")) > 1e-4


def test_a_resume_takes_the_rates_and_the_decay_that_it_is_asked_for(train, tmp_path):
    every = (
        "--save_strategy steps --eval_strategy steps --save_steps 2 --eval_steps 2 --max_steps 6 --save_total_limit 9"
    )
    train(tmp_path / "run", f"{every} --loss infonce --weight_decay 0.1 --text_learning_rate 2e-3")
    before = [row["learning_rate"] for row in read_history(tmp_path / "run") if "learning_rate" in row]
    resume = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]
    settings = record_of(tmp_path / "run")["settings"]
    slower = settings["learning_rate"] / 100
    asked = [f"--learning_rate={slower}", "--weight_decay=0.2", "--text_learning_rate=1e-5"]
    train_match.main([*resume, f"--output_dir={tmp_path / 'slow'}", *asked])
    after = [row["learning_rate"] for row in read_history(tmp_path / "slow") if "learning_rate" in row]
    assert after[-4:] == pytest.approx([rate / 100 for rate in before[-4:]], rel=1e-6)
    kept = torch.load(tmp_path / "slow" / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in kept} == {0.0, 0.2}
    assert {slower, 1e-5} <= (rates := {group["initial_lr"] for group in kept}) and 2e-3 not in rates
    with pytest.raises(InputError, match=r"checkpoint-2: cannot resume, its optimizer .*--weight_decay"):
        train_match.main([*resume, f"--output_dir={tmp_path / 'none'}", "--weight_decay=0"])
    train(tmp_path / "plateau", f"{every} --lr_scheduler_type reduce_lr_on_plateau")
    resume = ["--resume_from_checkpoint", str(tmp_path / "plateau" / "checkpoint-2")]
    train_match.main([*resume, f"--output_dir={tmp_path / 'again'}", f"--learning_rate={slower}"])
    after = [row["learning_rate"] for row in read_history(tmp_path / "again") if "learning_rate" in row]
    assert after[-1] == pytest.approx(slower), "a schedule that keeps no first rates"
    with pytest.raises(InputError, match="its schedule of rates was of another kind"):
        train_match.main([*resume, f"--output_dir={tmp_path / 'other'}", "--lr_scheduler_type=cosine"])


def test_a_branch_that_was_left_is_not_resumed(train, tmp_path):
    every = "--save_strategy steps --eval_strategy steps --save_steps 2 --eval_steps 2 --save_total_limit 9"
    train(tmp_path / "run", f"--max_steps 6 {every}")
    train_match.main(["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2"), "--max_steps=4"])
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_patience_goes_on_after_a_resume(train, tmp_path, scripted):
    scripted([0.5, 0.4, 0.3, 0.2])
    train(tmp_path / "whole", "--num_train_epochs 4 --early_stopping_patience 2 --save_total_limit 9")
    assert read_history(tmp_path / "whole")[-1]["step"] == 12
    scripted([0.3, 0.2, 0.1])
    again = train_match.main(["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-8")])
    assert (again["steps"], again["best_step"]) == (12, 4)


def test_a_resume_compares_scores_of_the_same_kind_alone(train, tmp_path, scripted, capsys):
    scripted([0.9, 0.3, 0.2, 0.0])
    run = tmp_path / "run"
    train(run, "--num_train_epochs 1")
    again = ["--resume_from_checkpoint", str(run), "--num_train_epochs=3"]
    results = train_match.main([*again, "--max_eval_scenes=2"])  # another part of the validation split
    assert (results["best_step"], results["steps"]) == (8, 12)
    assert "the best step is looked for from here on" in capsys.readouterr().out
    scripted([0.8])
    assert train_match.main([*again, "--num_train_epochs=4"])["best_step"] == 16, "the same as the last time"
    assert "looked for" not in capsys.readouterr().out


def test_a_resume_saves_when_it_is_asked_to(train, tmp_path, capsys):
    """Not when the checkpoint's own run was."""
    run = tmp_path / "run"
    train(run, "--num_train_epochs 1 --save_total_limit 9")
    again = ["--resume_from_checkpoint", str(run), "--num_train_epochs=2", "--save_strategy=steps", "--save_steps=1"]
    train_match.main([*again, "--eval_strategy=steps", "--eval_steps=1", "--per_device_train_batch_size=2"])
    assert "step 4 was epoch 1.00 and is 0.57 with these batches" in capsys.readouterr().out
    names = sorted(int(path.name[11:]) for path in run.glob("checkpoint-*"))
    assert set(range(7, 15)) <= set(names), "one a step, of which nine are kept"
    best = weights(run / "best_model")
    train_match.main([*again[:2], "--max_eval_scenes=2"])
    assert "nothing is left to train" in capsys.readouterr().out
    assert_identical(weights(run / "best_model"), best)


def test_a_best_step_between_saves_is_saved(train, tmp_path, scripted):
    scripted([0.9, 0.2, 0.5, 0.3])  # the first step of a warm-up has a rate of 0: its weights are those before training
    every = "--eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 2"
    results = train(tmp_path / "run", f"--max_steps 4 {every}")
    assert results["best_step"] == 3
    assert_identical(weights(tmp_path / "run" / "best_model"), weights(tmp_path / "run" / "checkpoint-3"))


def test_a_run_that_is_over_may_end_in_another_folder(train, tmp_path, scripted):
    scripted([0.5, 0.1])
    train(tmp_path / "run", "--num_train_epochs 2")
    train_match.main(["--resume_from_checkpoint", str(tmp_path / "run"), f"--output_dir={tmp_path / 'other'}"])
    best = weights(tmp_path / "run" / "best_model")
    assert_identical(weights(tmp_path / "other" / "best_model"), best)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(InputError, match="the best step's weights are not there"):
        train_match.main(["--resume_from_checkpoint", str(tmp_path / "run"), f"--output_dir={tmp_path / 'third'}"])


def test_a_run_that_is_over_may_be_moved(train, tmp_path, scripted):
    scripted([0.5, 0.1])
    train(tmp_path / "run", "--num_train_epochs 2")
    best = weights(tmp_path / "run" / "best_model")
    shutil.rmtree(tmp_path / "run" / "best_model")
    (tmp_path / "run").rename(tmp_path / "moved")
    train_match.main(["--resume_from_checkpoint", str(tmp_path / "moved")])
    assert_identical(weights(tmp_path / "moved" / "best_model"), best)


def test_a_moved_run_that_goes_on_elsewhere_knows_its_best_step(train, tmp_path, scripted, capsys):
    scripted([0.5, 0.1, 0.3, 0.2])
    train(tmp_path / "run", "--num_train_epochs 2")
    best = weights(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run").rename(tmp_path / "moved")
    again = ["--resume_from_checkpoint", str(tmp_path / "moved"), "--num_train_epochs=3"]
    assert train_match.main([*again, f"--output_dir={tmp_path / 'other'}"])["best_step"] == 4
    assert_identical(weights(tmp_path / "other" / "best_model"), best)
    shutil.rmtree(tmp_path / "moved" / "checkpoint-4")
    capsys.readouterr()
    assert train_match.main([*again, f"--output_dir={tmp_path / 'third'}"])["best_step"] == 12
    assert (
        "checkpoint-4, the best step's, is not there any more: the best step is looked for" in capsys.readouterr().out
    )
    assert_identical(weights(tmp_path / "third" / "best_model"), weights(tmp_path / "third" / "checkpoint-12"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "dual_encoder.json"])
def test_a_checkpoint_that_was_copied_by_half_is_refused(train, uninterrupted, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    data = (run / "checkpoint-12" / name).read_bytes()
    for size in (len(data) // 2, 0):
        (run / "checkpoint-12" / name).write_bytes(data[:size])
        with pytest.raises(
            InputError, match=r"checkpoint-12.* a file in it cannot be read|dual_encoder\.json: not JSON"
        ):
            train_match.main(["--resume_from_checkpoint", str(run), "--num_train_epochs=4"])


def test_a_new_run_does_not_mix_with_an_old_one(train, tmp_path):
    """Saving would find the old folders in its way, and the best model be the old run's."""
    train(tmp_path / "run", "--num_train_epochs 1")
    with pytest.raises(InputError, match="resume_from_checkpoint"):
        train(tmp_path / "run", "--num_train_epochs 1 --learning_rate 1e-4")


def test_what_a_killed_process_leaves_is_cleared(train, tmp_path, uninterrupted):
    run = tmp_path / "run"
    for name in ("checkpoint-3.partial", "checkpoint-1.deleted", "best_model.partial"):
        (run / name).mkdir(parents=True)
        (run / name / "trainer_state.json").write_text('{"global_step": 3}')
    train(run, HARD)
    assert not [p.name for p in run.iterdir() if p.name.endswith((".partial", ".deleted"))]
    assert_same_run(uninterrupted, run, 12)


def test_flags_of_reading_processes_do_no_harm_where_none_have_room(train, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    words = "--dataloader_num_workers 2 --dataloader_prefetch_factor 4 --dataloader_persistent_workers true"
    train(tmp_path / "run", f"--max_steps 1 {words}")


def test_metrics_of_a_resumed_run_continue(tmp_path):
    other = '[1]\n{"loss": 3}\n'  # somebody's own notes
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1}\n' + other + '{"step": 2, "loss": 2}\n{"step": 3, "lo'
    )
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2]
    assert read_history(tmp_path / "none") == []


def train_and_die(argv, where, count, sleep, saving):
    """Training that is killed (`os.kill`) at the `count`-th time it comes to `where`, and says when it begins to save."""
    save_file, rmtree, save = model.save_file, shutil.rmtree, SceneTrainer._save_optimizer_and_scheduler
    left = {where: count}

    def die_at(place):
        if place in left:
            left[place] -= 1
            if left[place] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def half_a_file(tensors, path, *rest):
        save_file(tensors, path, *rest)
        data = Path(path).read_bytes()
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            die_at("weights")
            file.write(data[len(data) // 2 :])

    def half_a_tree(path, *rest, **options):
        if str(path).endswith(".deleted"):
            os.remove(os.path.join(path, "model.safetensors"))
            die_at("delete")
        rmtree(path, *rest, **options)

    def slow(self, folder):
        saving.send("now")
        time.sleep(sleep)
        save(self, folder)
        die_at("optimizer")

    model.save_file, shutil.rmtree, SceneTrainer._save_optimizer_and_scheduler = half_a_file, half_a_tree, slow
    train_bare([argv])


def train_bare(runs):
    """Trainings without the page and the baseline of colours, one after another."""
    train_match.write_report = lambda *a: None
    train_match.histogram_baseline = lambda *a: {}
    for argv in runs:
        train_match.main(argv)


def killed(argv, where="", count=1, sleep=0.0, kill_after=None) -> int:
    """`train_and_die` in a process of its own; gives its exit status."""
    seen, saving = FORKS.Pipe(duplex=False)
    with forked(train_and_die, argv, where, count, sleep, saving) as process:
        if kill_after is not None:
            assert seen.poll(120)
            time.sleep(kill_after)
            process.kill()
        process.join(120)
        return process.exitcode


def train_in_a_group(argv, step, stepping):
    """Training in a process group of its own, as a job's processes are. Says so in a step, and waits for SIGTERM there."""
    train_step = SceneTrainer.training_step

    def slow(self, *given, **how):
        if self.state.global_step == step - 1 and not self.sigterm.asked:
            stepping.send("now")
            end = time.monotonic() + 60
            while not self.sigterm.asked and time.monotonic() < end:
                time.sleep(0.01)
        return train_step(self, *given, **how)

    os.setpgrp()
    SceneTrainer.training_step = slow
    train_bare([argv])


@pytest.mark.parametrize("step", [5, 6, 12])  # inside an epoch; where scores are due; the last
def test_sigterm_saves_the_step_that_is_under_way(flags, uninterrupted, tmp_path, monkeypatch, step):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*flags, f"--output_dir={run}", *HARD.split(), "--dataloader_num_workers=1", "--save_total_limit=1"]
    said, stepping = FORKS.Pipe(duplex=False)
    with forked(train_in_a_group, argv, step, stepping, log=log) as process:
        stepping.close()
        assert said.poll(120), log.read_text()
        assert said.recv() == "now"
        os.killpg(process.pid, signal.SIGTERM)  # its reading process gets it, too
        process.join(120)
        assert process.exitcode == 128 + signal.SIGTERM
    assert f"{run / f'checkpoint-{step}'} is kept: --resume_from_checkpoint {run} goes on" in log.read_text()
    assert f"checkpoint-{step}" in assert_whole(run) and not (run / "best_model").exists()
    monkeypatch.setattr(train_match, "write_report", lambda *a: None)
    monkeypatch.setattr(train_match, "histogram_baseline", lambda *a: {})
    train_match.main(["--resume_from_checkpoint", str(run), "--save_total_limit=2"])
    assert_same_run(uninterrupted, run, 12)


def train_and_score_slowly(argv, scoring):
    """Training that says so when it scores its first step, and then takes a minute."""

    def slow(self, model):
        scoring.send("now")
        time.sleep(60)

    train_match.MatchRun.evaluate = slow
    train_bare([argv])


def test_sigterm_while_scores_are_made_saves_at_once(flags, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*flags, f"--output_dir={run}", *HARD.split(), "--save_strategy=no", "--load_best_model_at_end=false"]
    said, scoring = FORKS.Pipe(duplex=False)
    with forked(train_and_score_slowly, argv, scoring, log=log) as process:
        scoring.close()
        assert said.poll(120), log.read_text()
        assert not list(run.glob("checkpoint-*"))
        process.terminate()
        end = time.monotonic() + 60
        while not (run / "checkpoint-3").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()  # before its scores are there
        process.join(20)
    assert assert_whole(run) == ["checkpoint-3"]


def assert_whole(run: Path) -> list[str]:
    found = [path for path in run.glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in found:
        model = DualEncoder.from_pretrained(path)
        assert set(weights(path)) == set(model.trained_names())
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(path / name, weights_only=False)
        json.loads((path / "trainer_state.json").read_text())
    return sorted(path.name for path in found)


def test_sigkill_inside_a_checkpoint_write(flags, uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert killed([*flags, f"--output_dir={run}", *HARD.split()], where="weights", count=2) == -9
    assert assert_whole(run) == ["checkpoint-3"] and (run / "checkpoint-6.partial").exists()
    resume = ["--resume_from_checkpoint", str(run)]
    assert killed(resume, sleep=0.4, kill_after=random.uniform(0, 0.8)) == -9
    assert "checkpoint-3" in assert_whole(run)
    # Steps 6, 9 and 12 are saved; with two kept, 3 goes when 9 is there. Killed in the middle of that.
    assert killed(resume, where="delete", count=1) == -9
    whole = assert_whole(run)
    assert "checkpoint-9" in whole or "checkpoint-12" in whole
    monkeypatch.setattr(train_match, "write_report", lambda *a: None)
    monkeypatch.setattr(train_match, "histogram_baseline", lambda *a: {})
    train_match.main(["--resume_from_checkpoint", str(resolve_checkpoint(run))])
    assert_same_run(uninterrupted, run, 12)


# ----------------------------------------------------------------------------------------------------
# Two processes


PARALLEL = {
    "infonce": "--loss infonce --image_tower full",
    "semi_hard_cached": "--in_batch_negatives semi_hard --margin 0.5 --grad_cache_chunk 1",
    "infonce_cached": "--loss infonce --grad_cache_chunk 1 --text_tower frozen",
}
EXACT = "--lora_dropout 0 --optim sgd --max_grad_norm 0 --learning_rate 0.02 --texts_per_scene 2 --save_strategy steps "
EXACT += "--save_steps 3 --eval_strategy steps --eval_steps 3 --save_total_limit 10 --num_train_epochs 2 "


def test_two_processes_equal_one_with_twice_the_batch(train, flags, tmp_path):
    """Also after a resume inside the second epoch: 13 scenes in global batches of 4 are 4 steps an epoch, 8 in all."""
    runs = []
    for name, words in PARALLEL.items():
        out = [f"--output_dir={tmp_path / 'two' / name}", "--per_device_train_batch_size=2"]
        runs.append([*flags, *EXACT.split(), *words.split(), *out, "--ddp_backend=gloo"])
    runs.append(["--resume_from_checkpoint", str(tmp_path / "two" / "infonce" / "checkpoint-6"),
                 f"--output_dir={tmp_path / 'two' / 'resumed'}"])  # fmt: skip
    run_on_two(train_bare, runs)
    for name, words in PARALLEL.items():
        train(tmp_path / "one" / name, EXACT + words)
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        for step in (3, 8):
            assert distance(weights(one / f"checkpoint-{step}"), weights(two / f"checkpoint-{step}")) < 1e-5, name
        assert distance(weights(one / "checkpoint-3"), weights(one / "checkpoint-8")) > 1e-3, name
        curves = [[row["loss"] for row in read_history(run) if "loss" in row] for run in (one, two)]
        assert curves[0] == pytest.approx(curves[1], abs=2e-4) and len(curves[0]) == 8
    assert_identical(*(weights(tmp_path / "two" / name / "checkpoint-8") for name in ("infonce", "resumed")))


def train_apart(flags, files, out):
    rank = int(os.environ["RANK"])
    config.refuse_apart.__defaults__ = (1,)  # seconds
    with pytest.raises(InputError, match="process 1 has other training rows than process 0"):
        train_match.main([*flags, f"--output_dir={out}", f"--train_file={files[rank]}"])
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # each on a machine of its own, and then in a folder of its own
    os.mkdir(f"{out}{rank}")
    os.chdir(f"{out}{rank}")
    with pytest.raises(InputError, match="--output_dir run: not the same folder on all machines"):
        train_match.main([*flags, "--output_dir=run"])
    train_match.main([*flags, f"--output_dir={out}", "--max_steps=1"])


def test_machines_that_see_other_rows_or_other_folders_are_refused(flags, drawn, tmp_path):
    given = next(Path(word.partition("=")[2]) for word in flags if word.startswith("--train_file="))
    rows = json.loads(given.read_text())
    shorter = given.with_name("shorter.json")
    shorter.write_text(json.dumps(rows[:-1]))
    out = tmp_path / "run"
    run_on_two(train_apart, [*flags, "--ddp_backend=gloo"], [given, shorter], out)
    assert (out / "best_model").is_dir() and not list(out.glob(".seen_by_all*"))


def test_gathered_rows_without_processes():
    class Alone:
        num_processes = 1

    tensor = torch.ones(2, 3, requires_grad=True)
    assert trainer_module.gather_rows(Alone, tensor)[0] is tensor
