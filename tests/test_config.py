"""config.py: every setting documented and on the command line, who wins over whom, what is refused, what is resumed."""

import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import (
    PRESETS,
    TRAINING_DEFAULTS,
    CaptionConfig,
    InputError,
    MatchConfig,
    VQAConfig,
    field_help,
    flag_value,
    parse,
    refuse_other_parallelism,
    resolve_checkpoint,
    user_errors,
    whole_folder,
)
from tests.conftest import refused

FIELDS = [field.name for field in dataclasses.fields(MatchConfig)]


def read(*words, out="somewhere/new"):
    return parse(MatchConfig, [f"--output_dir={out}", "--use_cpu=true", *map(str, words)])


def help_text(capsys, flag="--help") -> str:
    with pytest.raises(SystemExit) as stop:
        parse(MatchConfig, [flag])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_field_is_documented_and_a_flag(capsys):
    documented = field_help(MatchConfig)
    assert set(documented) == set(FIELDS)
    shown = " ".join(help_text(capsys).split())
    for name in FIELDS:
        assert len(documented[name]) > 15, name
        assert f"--{name} " in shown, name
        # argparse breaks lines at spaces and hyphens: compare without either
        assert documented[name].replace(" ", "").replace("-", "") in shown.replace(" ", "").replace("-", ""), name
    assert "turns --whiten_init off" in shown
    assert "--warmup_steps" not in shown and "--help_all" in shown
    assert "--warmup_steps" in help_text(capsys, "--help_all")


def test_command_line_wins_over_preset_and_preset_over_default():
    config, args, changed = read()
    assert config.preset == "full" and config.projection_dim == MatchConfig.projection_dim == 512
    assert args.learning_rate == PRESETS["MatchConfig"]["full"]["learning_rate"] and args.eval_strategy == "epoch"
    config, args, changed = read("--preset", "demo")
    demo = PRESETS["MatchConfig"]["demo"]
    assert config.preset == "demo" and config.projection_dim == demo["projection_dim"] != 512
    assert args.learning_rate == demo["learning_rate"] and config.train_file == demo["train_file"]
    config, args, changed = read("--preset=demo", "--projection_dim=64", "--learning_rate", "3e-4")
    assert config.projection_dim == 64 and args.learning_rate == 3e-4
    assert changed["projection_dim"] == 64 and changed["preset"] == "demo" and "margin" not in changed


def test_own_data_does_not_meet_the_presets_data(tmp_path):
    config, _, _ = read("--preset", "demo", "--train_file", "mine.json")
    assert (config.train_file, config.val_file, config.test_file, config.image_root) == ("mine.json", None, None, None)
    assert config.base_model == PRESETS["MatchConfig"]["demo"]["base_model"]


def test_chat_has_data_and_limits_of_its_own():
    config = parse(VQAConfig, ["--preset", "demo", "--task", "chat"])[0]
    assert config.train_file == "data/demo/chat_zh.json" and config.test_file is None and config.prompt == "{question}"
    config = parse(VQAConfig, ["--preset", "demo", "--task", "chat", "--data", "mine.json"])[0]
    assert (config.train_file, config.test_file, config.max_answer_tokens) == ("mine.json", None, 512)


@pytest.mark.parametrize(("metric", "greater"), [("loss", False), ("mR", True)])
def test_the_best_loss_is_the_least(metric, greater):
    assert read("--metric_for_best_model", metric)[1].greater_is_better is greater


def test_no_flags_and_booleans():
    assert read()[0].allow_leak is False
    assert read("--allow_leak")[0].allow_leak is True
    assert read("--allow_leak", "false")[0].allow_leak is False
    assert read()[1].load_best_model_at_end is True
    assert read("--load_best_model_at_end", "false")[1].load_best_model_at_end is False
    assert read()[1].remove_unused_columns is False
    assert read()[1].disable_tqdm is False
    assert read()[1].average_tokens_across_devices is True
    assert read("--no_average_tokens_across_devices")[1].average_tokens_across_devices is False


def test_the_command_line_chooses_16_bits(monkeypatch, tmp_path):
    import torch
    from transformers import TrainingArguments

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would look for the card
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    monkeypatch.setattr("config.refuse_schedule", lambda _: None)
    for words, wanted in (
        ([], (True, False, True)),
        (["--bf16=false"], (False, False, True)),
        (["--fp16"], (False, True, True)),
        (["--tf32", "false", "--bf16", "true"], (True, False, False)),
        (["--use_cpu"], (False, False, None)),
    ):
        args = parse(MatchConfig, [f"--output_dir={tmp_path / 'new'}", *words])[1]
        assert (args.bf16, args.fp16, args.tf32) == wanted, words


def test_a_run_is_started_for_one_gpu_or_for_ddp(monkeypatch):
    import torch
    from transformers import Trainer

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        args = SimpleNamespace(use_cpu=False)
        refused(lambda: refuse_other_parallelism(args), "2 GPUs are visible to one process", "accelerate/ddp.yaml")
        patch.setenv("LOCAL_RANK", "0")
        refuse_other_parallelism(args)
    for name in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{name}", "true")
            refused(read, "started for", "every GPU holds a whole model")

    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            """As those of the package schedulefree."""

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda args, model: (ScheduleFree, {}))
    refused(lambda: read("--optim=schedule_free_sgd"), "--optim schedule_free_sgd", "outside the model")


@pytest.mark.parametrize("words", ["--neftune_noise_alpha=5", "--label_smoothing_factor=0.5", "--temperature=0.001",
                                   "--data_seed=-1", "--adam_beta1=2", "--max_steps=0", "--fp16", "--push_to_hub",
                                   "--train_sampling_strategy=sequential", "--remove_unused_columns=true",
                                   "--dataloader_drop_last=true", "--fsdp=full_shard", "--deepspeed=zero3.json",
                                   "--adam_epsilon=-1", "--optim=adamw_bnb_8bit", "--optim=galore_adamw",
                                   "--lr_scheduler_type=warmup_stable_decay",
                                   '--lr_scheduler_kwargs={"no_such": 1}'])  # fmt: skip
def test_what_could_not_work_is_refused_at_once(words, monkeypatch):
    if "bnb" in words:
        monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    refused(lambda: read(words), words.partition("=")[0])


def test_what_could_work_is_not_refused():
    for words in (["--optim=adafactor"], ["--optim=sgd"], ["--lr_scheduler_type=reduce_lr_on_plateau"],
                  ["--lr_scheduler_type=cosine_with_min_lr", '--lr_scheduler_kwargs={"min_lr": 1e-6}'],
                  ["--train_sampling_strategy=random"], ["--max_steps=5", "--warmup_steps=10"]):  # fmt: skip
        read(*words)


def test_no_secret_is_recorded(tmp_path):
    assert (
        parse(MatchConfig, [f"--output_dir={tmp_path / 'new'}", "--hub_token=hf_x", "--margin=0.4"])[2]["margin"] == 0.4
    )
    assert "hub_token" not in parse(MatchConfig, [f"--output_dir={tmp_path / 'new'}", "--hub_token=hf_x"])[2]


def test_dashes_and_equal_signs():
    assert read("--projection-dim=64", "--preset=demo")[0].projection_dim == 64
    assert read("--percentiles", "1", "99")[0].percentiles == [1.0, 99.0]
    assert read("--cache_dir", "none")[0].cache_dir is None


def test_flag_value_is_what_the_command_line_itself_gives(capsys):
    for words in (["--base_model", "x"], ["--base-model=x"], ["--preset", "demo", "--base_model=x", "--lora=y"]):
        assert flag_value("--base_model", words) == "x", words
    assert flag_value("--base_model", ["--preset", "demo"]) is None
    with pytest.raises(SystemExit):  # it would miss a flag cut short
        read("--base_mod=x")
    assert "--base_mod" in capsys.readouterr().err


def test_the_last_of_two_equal_flags_counts_for_presets_too():
    words = ["--output_dir=somewhere/new", "--use_cpu=true", "--task=rsvqa", "--preset=demo", "--preset", "full"]
    config, _, _ = parse(VQAConfig, [*words, "--task=chat"])
    assert (config.task, config.prompt, config.max_answer_tokens) == ("chat", "{question}", 512)
    assert config.base_model == VQAConfig.base_model


@pytest.mark.parametrize(
    "words",
    ["--val_fraction=1.5", "--max_rejected=2", "--lora_rank=0", "--projection_dim=0", "--texts_per_scene=-1",
     "--margin=-1", "--temperature=0", "--max_text_tokens=1", "--lora_dropout=1.5", "--max_pixels=10", "--max_samples=-3",
     "--max_samples=0", "--grad_cache_chunk=-1", "--max_eval_scenes=0", "--early_stopping_patience=-1", "--learning_rate=-1",
     "--per_device_train_batch_size=0", "--gradient_accumulation_steps=0", "--report_to=nosuch",
     "--head_learning_rate=-0.5", "--num_train_epochs=0"],
)  # fmt: skip
def test_values_out_of_bounds(words):
    flag, value = words.split("=")
    refused(lambda: read(words), flag, value)


def test_refused_combinations(tmp_path):
    refused(lambda: read("--min_pixels=5000", "--max_pixels=2000"), "--min_pixels", "--max_pixels")
    refused(lambda: read("--eval_strategy=no"), "do not go together")  # the best model needs evaluations


@pytest.mark.parametrize("words", ["--preset=big", "--loss=hinge", "--lora_rank=many", "--no_such_flag=1"])
def test_unknown_values_end_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        read(words)
    assert stop.value.code == 2 and words.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(("code", "left"), [(0, True), (1, True), (2, False)])
def test_a_process_of_several_leaves_its_group_when_all_is_done(tmp_path, code, left):
    """Its threads ended an index run with SIGABRT, once in many; where a run fails others may wait, and it just ends."""
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit), user_errors():
            sys.exit(code)
        assert distributed.is_initialized() is not left
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_user_errors_are_one_line(capsys):
    for error, code in ((InputError("a.json: no such file"), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141)):
        with pytest.raises(SystemExit) as stop, user_errors():
            raise error
        assert stop.value.code == code
    assert capsys.readouterr().err.splitlines()[0] == "error: a.json: no such file"
    with pytest.raises(ValueError, match="a bug"), user_errors():
        raise ValueError("a bug")  # is shown with its traceback


def test_an_output_of_another_encoding_loses_no_work(monkeypatch):
    from report import json_to_print

    stream = io.TextIOWrapper(io.BytesIO(), encoding="gbk")
    monkeypatch.setattr(sys, "stdout", stream)
    with user_errors():
        print("12 km², 农田 ✓")
        said = json_to_print([{"text": "km² 农田"}])
    stream.flush()
    assert stream.buffer.getvalue().decode("gbk") == "12 km?, 农田 ?\n"
    assert json.loads(said.encode("gbk")) == [{"text": "km² 农田"}]


# ----------------------------------------------------------------------------------------------------
# Resume


def checkpoint(run: Path, step: int, settings: dict) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "config.json").write_text(json.dumps({"task": "match", "settings": settings}))
    return folder


@pytest.mark.parametrize("preset", ["full", "demo"])
def test_a_resumed_run_has_the_settings_it_had(tmp_path, preset, capsys):
    """Also those that were set back to the library's default against a preset, which no record mentions."""
    words = ["--preset", preset, "--margin=0.3", "--warmup_steps=0", "--num_train_epochs=3", "--logging_steps=500",
             "--dataloader_num_workers=0", "--report_to=none"]  # fmt: skip
    config, args, changed = read(*words, out=tmp_path / "run")
    assert ("warmup_steps" not in changed and "gradient_checkpointing" not in changed) or preset == "full"
    folder = checkpoint(tmp_path / "run", 7, changed)
    again, args_again, changed_again = parse(MatchConfig, ["--resume_from_checkpoint", str(tmp_path / "run")])
    assert again == config
    assert args_again.resume_from_checkpoint == str(folder) and args_again.output_dir == str(tmp_path / "run")
    one, two = args.to_dict(), args_again.to_dict()
    different = {key for key in one if one[key] != two[key]}
    assert different <= {"resume_from_checkpoint", "logging_dir"}, different
    changed_again.pop("resume_from_checkpoint")
    assert changed_again == changed
    assert "resumed with a change" not in capsys.readouterr().out


def test_command_line_wins_over_the_resumed_run(tmp_path, capsys):
    _, _, changed = read("--margin=0.3", "--preset=demo", out=tmp_path / "run")
    checkpoint(tmp_path / "run", 7, changed)
    config, args, _ = parse(
        MatchConfig, [f"--resume-from-checkpoint={tmp_path / 'run'}", "--margin=0.5", f"--output_dir={tmp_path / 'b'}"]
    )
    assert config.margin == 0.5 and config.preset == "demo" and args.output_dir == str(tmp_path / "b")
    assert "resumed with a change: margin 0.3 -> 0.5" in capsys.readouterr().out


def test_a_run_of_another_script_is_not_resumed(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    (checkpoint / "config.json").write_text('{"task": "vqa", "settings": {}}')
    with pytest.raises(InputError, match=r"a run of train_vqa\.py"):
        parse(MatchConfig, [f"--resume_from_checkpoint={tmp_path / 'run'}"])
    with pytest.raises(InputError, match="a run of --task rsvqa, which it goes on with"):
        parse(VQAConfig, [f"--resume_from_checkpoint={tmp_path / 'run'}", "--task=chat"])
    for text in ("", "[]", '{"task": "vqa"}', '{"settings": [1]}'):
        (checkpoint / "config.json").write_text(text)
        with pytest.raises(InputError, match="not a whole checkpoint"):
            parse(VQAConfig, [f"--resume_from_checkpoint={tmp_path / 'run'}"])


def test_settings_that_would_fail_later(tmp_path):
    for words, message in (
        (["--seed=-1"], "--seed -1"),
        (["--dataloader_num_workers=-1"], "--dataloader_num_workers -1"),
        (["--report_to", "neptune"], "--report_to neptune: is not installed: pip install neptune"),
        (["--report_to", "tensorboard,swanlab"], 'pip install "swanlab<0.7"'),
        (["--report_to", "tensorboard,nosuch"], "--report_to nosuch: expected one of"),
        (
            ["--early_stopping_patience=1", "--eval_strategy=no", "--load_best_model_at_end=false"],
            "--load_best_model_at_end",
        ),
    ):
        with pytest.raises(InputError, match=message):
            parse(VQAConfig, [f"--output_dir={tmp_path / 'run'}", "--use_cpu=true", *words])


def test_several_trackers_also_of_a_resumed_run(tmp_path):
    _, args, changed = read("--report_to", "tensorboard, tensorboard")
    assert args.report_to == ["tensorboard", "tensorboard"]
    checkpoint(tmp_path / "run", 7, changed)
    assert parse(MatchConfig, [f"--resume_from_checkpoint={tmp_path / 'run'}"])[1].report_to == args.report_to


def test_resolve_checkpoint(tmp_path):
    run = tmp_path / "run"
    refused(lambda: resolve_checkpoint(run), run, "does not exist")
    run.mkdir()
    refused(lambda: resolve_checkpoint(run), run, "no whole checkpoint")
    first, last = checkpoint(run, 9, {}), checkpoint(run, 100, {})
    half = checkpoint(run, 200, {})
    half.rename(run / "checkpoint-200.partial")
    checkpoint(run, 300, {}).rename(run / "checkpoint-300.deleted")
    (run / "checkpoint-400").mkdir()  # without a state
    cut = checkpoint(run, 500, {})
    (cut / "trainer_state.json").write_text('{"global_st')  # the one before it counts
    assert resolve_checkpoint(run) == last  # 100 is after 9, by number
    assert resolve_checkpoint(str(first)) == first


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk")
    for number in (1, 2):
        with whole_folder(link) as new:
            (new / f"{number}.txt").write_text("whole")
        assert [path.name for path in link.iterdir()] == [f"{number}.txt"]  # the old one is gone
    with pytest.raises(ValueError, match="broken"), whole_folder(link) as new:
        (new / "3.txt").write_text("half")
        raise ValueError("broken")
    assert [path.name for path in link.iterdir()] == ["2.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"] and link.is_symlink()
    (tmp_path / "disk.partial").write_text("mine")
    with pytest.raises(InputError, match="is in the way"), whole_folder(link):
        pass
    assert (tmp_path / "disk.partial").read_text() == "mine"


@pytest.mark.parametrize("number, left", [(1, "old"), (2, "new")])
def test_an_interruption_between_two_renames_loses_no_folder(number, left, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    rename, done = os.replace, []

    def interrupted(source, target):
        rename(source, target)
        done.append(target)
        if len(done) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "model") as new:
        (new / "new").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", f"model/{left}"]


def test_new_run_into_a_used_folder(tmp_path):
    checkpoint(tmp_path, 4, {})
    refused(lambda: read(out=tmp_path), tmp_path, "--resume_from_checkpoint")
    for cls, words in ((MatchConfig, ["--eval_only", str(tmp_path)]), (VQAConfig, ["--eval_only"])):
        assert parse(cls, ["--use_cpu=true", *words])[0].eval_only  # keeps nothing
        refused(lambda: parse(cls, [f"--output_dir={tmp_path}", "--use_cpu=true", *words]), tmp_path)  # noqa: B023
    refused(lambda: parse(VQAConfig, [f"--output_dir={tmp_path}", "--eval_only=false", "--use_cpu=true"]), tmp_path)
    _, args, _ = parse(MatchConfig, ["--use_cpu=true"])
    assert Path(args.output_dir).parent.name == "output" and TRAINING_DEFAULTS["output_dir"] is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 12502144 vs 12502032"),
            "disk is full",
        ),
        (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), "for want of memory"),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), "for want of memory"),
    ],
)
def test_what_the_machine_lacks_is_said_in_a_line(error, said, capsys):
    with pytest.raises(SystemExit) as ended, user_errors():
        raise error
    assert ended.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a fault"), user_errors():
        raise RuntimeError("a fault")


def test_settings_that_would_do_nothing_are_refused():
    run = ["--output_dir=output/none", "--use_cpu=true"]
    for config, words, told in (
        (VQAConfig, ["--vision_learning_rate=1e-5"], "--vision_learning_rate: that part is frozen"),
        (VQAConfig, ["--merger_learning_rate=1e-5"], "--merger"),
        (MatchConfig, ["--image_tower=frozen", "--image_learning_rate=1e-5"], "--image_tower"),
        (CaptionConfig, ["--vision_learning_rate=1e-5"], "--no_freeze_vision_model"),
    ):
        refused(lambda config=config, words=words: parse(config, [*run, *words]), told)
    parse(VQAConfig, [*run, "--vision_learning_rate=1e-5", "--vision_tower=lora"])
    assert parse(VQAConfig, [*run, "--vision_learning_rate=1e-5", "--lora=adapter"])[0].vision_learning_rate == 1e-5
    parse(VQAConfig, [*run, "--merger_learning_rate=1e-5", "--vision_tower=full"])  # which includes the merger
    parse(CaptionConfig, [*run, "--vision_learning_rate=1e-5", "--no_freeze_vision_model"])
    with pytest.raises(SystemExit):  # the vision encoder of a captioner has a size of its own
        parse(CaptionConfig, [*run, "--max_pixels=784"])
