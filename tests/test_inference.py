"""inference_script.py: pairs, JSON in and out, what is encoded how often, what is said of bad rows."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import inference_script
from config import InputError
from inference_script import score_rows
from model import DualEncoder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(encoder, tmp_path_factory) -> Path:
    """A matcher whose heads and LoRA were moved, so that scores spread."""
    model = encoder()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in model.trained_names():
            parameter = model.get_parameter(name)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("trained") / "best_model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def matcher(checkpoint) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


@pytest.fixture
def call(checkpoint, call_main, monkeypatch):
    """`call("--flag", ...) -> (exit code, stdout, stderr)` of the script, `stdin` in bytes."""

    def run(*words, stdin: bytes = b"", folder=checkpoint):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        return call_main(inference_script.main, "--checkpoint", folder, "--device", "cpu", *words)

    return run


@pytest.fixture
def images(drawn):
    return sorted(drawn.images.glob("train_*"))[:4]


def expected(matcher, path, text) -> float:
    return float(matcher.embed_images([path])[0] @ matcher.embed_texts([text])[0])


def test_pair(call, matcher, images):
    code, out, _ = call("--image_path", images[0], "--text", "一片农田")
    score, text = out.strip().split("  ")
    assert code == 0 and text == "一片农田"
    assert float(score) == pytest.approx(expected(matcher, images[0], "一片农田"), abs=1e-4)


def test_several_texts_are_ranked(call, matcher, images):
    texts = ["farmland", "a harbour with boats", "一片农田", "road"]
    code, out, _ = call("--image_path", images[0], "--text", *texts)
    lines = [line.split("  ") for line in out.strip().splitlines()]
    scores = [float(score) for score, _ in lines]
    assert code == 0 and sorted(text for _, text in lines) == sorted(texts)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4
    for score, text in zip(scores, (text for _, text in lines)):
        assert score == pytest.approx(expected(matcher, images[0], text), abs=1e-4)


def test_json_in_and_out(call, matcher, images, tmp_path):
    rows = [
        {"image_path": str(p), "text": t, "id": i} for i, (p, t) in enumerate(zip(images, ["a", "b b", "农田", "a"]))
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows, ensure_ascii=False))
    code, out, err = call("--json_input", tmp_path / "in.json", "--json_output", tmp_path / "out.json")
    assert code == 0 and out == "" and "4 of 4 rows scored" in err
    text = (tmp_path / "out.json").read_text()
    assert "农田" in text  # not \\u escapes
    made = json.loads(text)
    assert [{k: v for k, v in row.items() if k != "score"} for row in made] == rows
    for row in made:
        assert row["score"] == pytest.approx(expected(matcher, row["image_path"], row["text"]), abs=1e-4)
    code, again, _ = call("--json_input", tmp_path / "out.json")  # an output as input: scored anew, to stdout
    assert code == 0 and json.loads(again) == made


def test_standard_input_and_output(call, images):
    rows = [{"image_path": str(images[1]), "text": "农田"}]
    data = json.dumps(rows, ensure_ascii=False).encode()
    code, out, _ = call("--json_input", "-", "--json_output", "-", stdin=data)
    assert code == 0 and json.loads(out)[0]["text"] == "农田" and "score" in json.loads(out)[0]
    assert call("--json_input", "-", stdin=b"\xef\xbb\xbf" + data)[0] == 0  # a byte order mark
    code, out, err = call("--json_input", "-", stdin=b'[\n{"a": }]')
    assert code == 2 and out == "" and "line 2, column 7" in err
    code, _, err = call("--json_input", "-", stdin="[é]".encode("latin-1"))
    assert code == 2 and "UTF-8" in err


def test_paths_are_found_beside_the_file_and_under_image_root(call, images, tmp_path):
    shutil.copy(images[0], tmp_path / "a.png")
    (tmp_path / "in.json").write_text(json.dumps([{"image_path": "a.png", "text": "x"}]))
    assert call("--json_input", tmp_path / "in.json")[0] == 0
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "sub" / "a.png")
    assert call("--json_input", tmp_path / "in.json")[0] == 1
    assert call("--json_input", tmp_path / "in.json", "--image_root", tmp_path / "sub")[0] == 0
    (tmp_path / "images").mkdir()
    shutil.copy(tmp_path / "sub" / "a.png", tmp_path / "images" / "a.png")
    assert call("--json_input", tmp_path / "in.json")[0] == 0  # beside captions.json, as train_match.py finds it
    names = ["sub\\a.png", f"file://{tmp_path}/sub/a.png", str(tmp_path / "sub/a.png")]
    (tmp_path / "in.json").write_text(json.dumps([{"image_path": name, "text": "x"} for name in names]))
    code, _, _ = call("--json_input", tmp_path / "in.json", "--json_output", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and [row["image_path"] for row in rows] == names and len({row["score"] for row in rows}) == 1


def test_each_image_and_each_text_is_encoded_once(matcher, images, monkeypatch):
    seen = {"image": 0, "text": 0}
    pool_image, pool_text = matcher.pool_image, matcher.pool_text

    def image(pixel_values, image_grid_thw):
        seen["image"] += len(image_grid_thw)
        return pool_image(pixel_values, image_grid_thw)

    def text(input_ids, text_lengths):
        seen["text"] += len(text_lengths)
        return pool_text(input_ids, text_lengths)

    monkeypatch.setattr(matcher, "pool_image", image)
    monkeypatch.setattr(matcher, "pool_text", text)
    texts = ["a", "b", " a ", "c"]
    rows = [{"image_path": str(p), "text": t} for t in texts for p in images]
    results = score_rows(matcher, rows, batch_size=3)
    assert seen == {"image": 4, "text": 3} and all("score" in row for row in results)


def test_scores_do_not_depend_on_batch_mates(matcher, images):
    long = "a farm field next to a road with two vehicles " * 3
    rows = [{"image_path": str(p), "text": t} for p in images for t in ("a", long, "农田")]
    together = [row["score"] for row in score_rows(matcher, rows)]
    assert together == pytest.approx([score_rows(matcher, [row])[0]["score"] for row in rows], abs=1e-4)
    small = [row["score"] for row in score_rows(matcher, rows[::-1], batch_size=1)][::-1]
    assert together == pytest.approx(small, abs=1e-4) and len(set(together)) > 6


def test_bad_rows_do_not_stop_the_others(call, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:200])
    good = {"image_path": str(images[0]), "text": "a farm"}
    rows = [
        good,
        {"image_path": str(tmp_path / "gone.png"), "text": "x"},
        {"image_path": str(broken), "text": "x"},
        {"text": "x"},
        {"image_path": 5, "text": "x"},
        {"image_path": str(images[0]), "text": " "},
        ["not", "an", "object"],
        {"image_path": str(tmp_path), "text": "a folder"},
        {"image_path": str(images[0]), "text": "\ud800"},
        {"image_path": "a\0b.png", "text": "x"},
        good | {"error": "an old error"},
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    code, _, err = call("--json_input", tmp_path / "in.json", "--json_output", tmp_path / "out.json")
    made = json.loads((tmp_path / "out.json").read_text())
    assert code == 1 and len(made) == len(rows) and "2 of 11 rows scored" in err and "and 4 more rows" in err
    assert [i for i, row in enumerate(made) if "score" in row] == [0, 10]
    assert all(("score" in row) != ("error" in row) for row in made) and made[0]["score"] == made[10]["score"]
    for i, word in [(1, "gone.png"), (2, "broken.png"), (3, "'image_path' is missing"), (4, "int"),
                    (5, "'text' is empty"), (6, "list"), (7, tmp_path.name), (8, "'text'"), (9, "row 9")]:  # fmt: skip
        assert made[i]["error"].startswith(f"row {i}: ") and word in made[i]["error"], made[i]
    code, out, err = call("--image_path", tmp_path / "gone.png", "--text", "x")
    assert code == 2 and out == "" and "gone.png" in err
    code, out, err = call("--image_path", images[0], "--text", "", "x")
    assert code == 1 and out.endswith("x\n") and "'text' is empty" in err


def test_nothing_is_written_when_nothing_was_done(call, checkpoint, images, tmp_path):
    out = tmp_path / "out.json"
    rows = json.dumps([{"image_path": str(images[0]), "text": "x"}])
    (tmp_path / "in.json").write_text(rows)
    (tmp_path / "broken.json").write_text('[{"image_path": ]')
    (tmp_path / "object.json").write_text('{"image_path": "a"}')
    for words, said in [
        (["--json_input", tmp_path / "none.json"], "no such file"),
        (["--json_input", tmp_path / "broken.json"], "line 1, column 17"),
        (["--json_input", tmp_path / "object.json"], "expected a list"),
        (["--json_input", tmp_path / "in.json", "--image_path", images[0]], "either --image_path"),
        (["--json_input", tmp_path / "in.json", "--batch_size", 0], "--batch_size 0"),
        (["--json_input", tmp_path / "in.json", "--device", "cuda:77"], "--device cuda:77"),
        (["--image_path", images[0]], "both --image_path and --text"),
        ([], "either --image_path"),
    ]:
        code, printed, err = call(*words, "--json_output", out)
        assert code == 2 and printed == "" and said in err and "Traceback" not in err, (words, err)
        assert not out.exists()
    for folder, said in [(tmp_path / "none", "no model here"), (checkpoint.parent, "best_model")]:
        code, _, err = call("--json_input", tmp_path / "in.json", "--json_output", out, folder=folder)
        assert code == 2 and str(folder) in err and said in err and not out.exists()
    for bad in (tmp_path / "no" / "out.json", tmp_path, Path("/proc/out.json")):
        code, _, err = call("--json_input", tmp_path / "in.json", "--json_output", bad)
        assert code == 2 and "--json_output" in err


def test_output_is_written_whole_or_not_at_all(call, images, tmp_path, monkeypatch):
    import report

    out = tmp_path / "out.json"
    out.write_text("old")
    (tmp_path / "in.json").write_text(json.dumps([{"image_path": str(images[0]), "text": "x"}]))

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report.os, "replace", fail)
        code, _, _ = call("--json_input", tmp_path / "in.json", "--json_output", out)
    assert code == 130 and out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.json", "out.json"]
    assert call("--json_input", tmp_path / "in.json", "--json_output", out)[0] == 0 and out.read_text() != "old"


def test_empty_list_and_unusable_top_level(matcher, call, tmp_path):
    assert score_rows(matcher, []) == []
    with pytest.raises(InputError, match="expected a list"):
        score_rows(matcher, {"a": 1})
    (tmp_path / "in.json").write_text("[]")
    code, out, _ = call("--json_input", tmp_path / "in.json")
    assert code == 0 and json.loads(out) == []


def test_missing_base_is_one_line(call, checkpoint, images, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    recorded = json.loads((folder / "dual_encoder.json").read_text())
    (folder / "dual_encoder.json").write_text(json.dumps(recorded | {"base_model": str(tmp_path / "Qwen" / "none")}))
    code, _, err = call("--image_path", images[0], "--text", "x", folder=folder)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "load.py" in err
    assert call("--image_path", images[0], "--text", "x", "--base_model", recorded["base_model"], folder=folder)[0] == 0


def test_real_process_with_unicode_and_help(checkpoint, images, tmp_path):
    copied = tmp_path / "农田 图像.png"
    shutil.copy(images[1], copied)
    rows = json.dumps([{"image_path": copied.name, "text": "一片农田 🌾"}], ensure_ascii=False).encode()
    command = [sys.executable, str(ROOT / "inference_script.py")]
    made = subprocess.run(
        [*command, "--checkpoint", str(checkpoint), "--json_input", "-", "--json_output", "-"],
        input=rows, capture_output=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr.decode()
    assert json.loads(made.stdout)[0]["text"] == "一片农田 🌾" and np.isfinite(json.loads(made.stdout)[0]["score"])
    made = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0 and "--checkpoint" in made.stdout
    code = "import sys, inference_script; print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
    light = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert light.stdout.strip() == "" and light.returncode == 0  # so --help and mistakes answer at once
    made = subprocess.run([*command, "--image_path", "a"], capture_output=True, text=True, timeout=60)
    assert made.returncode == 2 and "--checkpoint" in made.stderr
