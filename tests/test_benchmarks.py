"""The benchmarks run and compare equal work. Nothing here is timed: speed is measured, not asserted."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from official_layout import write_clip, write_qwen3, write_qwen_vl
from PIL import Image

from config import InputError
from tests.processes import run_script

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
BENCH = FOLDER / "bench_match.py"


def has_peer() -> bool:
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """Command-line arguments for a tiny base and tiny triplets."""
    folder = tmp_path_factory.mktemp("bench")
    write_qwen_vl(folder / "base", max_pixels=56 * 56)
    random = np.random.default_rng(0)
    rows = []
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (60 + i, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        for k in range(3):
            row = {"positive": f"image {i} has {k} roads", "negative": f"image {i} has {k} rivers and a farm"}
            rows.append({"image_name": f"{i}.png", **row})
    (folder / "triplets.json").write_text(json.dumps(rows))
    sizes = ["--rounds", "1", "--steps", "1", "--scenes", "2", "--texts", "3", "--mini_batch", "3", "--threads", "1"]
    return ["--data", str(folder / "triplets.json"), "--base", str(folder / "base"), *sizes]


def run(*arguments: str, script: Path = BENCH) -> subprocess.CompletedProcess:
    return run_script([sys.executable, script, *arguments])


@pytest.fixture
def load_benchmark(monkeypatch):
    """A benchmark as a module: a mistake needs no process of its own, and must not change the threads of this one."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return importlib.import_module


@pytest.fixture
def run_here(load_benchmark, monkeypatch, capsys):
    """run_here(name, *words): what the benchmark prints, without a process of its own; its children are forks."""

    def run_here(name: str, *words: str) -> str:
        bench = load_benchmark(name)
        monkeypatch.setattr(bench, "quiet", lambda options: None)
        run = SimpleNamespace(run=lambda command, **how: run_script(command))
        monkeypatch.setattr(load_benchmark("common"), "subprocess", run)
        bench.main(list(words))
        return capsys.readouterr().out

    return run_here


@pytest.mark.skipif(has_peer(), reason="sentence-transformers is installed")
def test_match_names_the_missing_peer(load_benchmark):
    with pytest.raises(
        InputError, match=r"^sentence-transformers is not installed; run `pip install sentence-transformers=="
    ):
        load_benchmark("bench_match").main([])


@pytest.mark.skipif(not has_peer(), reason="sentence-transformers is not installed (a benchmark's peer)")
@pytest.mark.parametrize("options", [["--loss", "triplet"], ["--loss", "cached", "--shape", "tiny"]])
def test_match_compares_equal_work(tiny, tmp_path, options):
    out = tmp_path / "result.json"
    done = run(*tiny, *options, "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["equal"]["loss_difference"] <= 1e-4
    assert found["equal"]["gradient_difference"] <= 1e-3
    for part, texts in (("scene", 3), ("one_row", 1)):
        assert found[part]["texts_per_scene"] == texts
        assert found[part]["rows_per_step"] == texts * found[part]["scenes_per_step"]
        assert len(found[part]["ratios"]) == 1
        assert set(found[part]["samples_per_second"]) == {"ours", "theirs"}
    assert found["scene"]["encoded_per_step"]["ours"]["images"] == 2
    assert found["scene"]["encoded_per_step"]["theirs"] == {"images": 6, "texts": 12}
    if "triplet" in options:
        assert found["scene"]["largest_relative_loss_difference"] < 1e-3
    for side in ("ours", "theirs"):
        assert found["memory"][side]["peak"] >= found["memory"][side]["loaded"] > 0
        parts = found["profile"][side]
        assert {"reading", "processor", "backward", "optimizer"} < set(parts)
        assert parts["forward, images"] > 0 and parts["backward"] > 0 and parts["optimizer"] > 0
    assert "ours" in done.stdout and "theirs" in done.stdout


@pytest.fixture(scope="module")
def tiny_questions(tmp_path_factory) -> list[str]:
    """Arguments for a tiny base and questions about 5 images, of which 2 are held out."""
    folder = tmp_path_factory.mktemp("bench_vqa")
    write_qwen_vl(folder / "base")
    random = np.random.default_rng(0)
    rows = []
    for i in range(5):
        Image.fromarray(random.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        for k, answer in enumerate(("yes", "no", "12", "a farm field")):
            asked = f"Is there road number {k}? <|vision_start|>{folder / f'{i}.png'}<|vision_end|>"
            turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": answer}]
            split = "train" if i < 3 else "val"
            rows.append({"id": f"{i}_{k}", "conversations": turns, "type": "presence", "split": split})
    (folder / "questions.json").write_text(json.dumps(rows))
    sizes = ["--rounds", "1", "--threads", "1", "--lora_rank", "4", "--max_pixels", str(56 * 56)]
    return ["--data", str(folder / "questions.json"), "--base", str(folder / "base"), *sizes]


def test_vqa_training_compares_equal_work(tiny_questions, tmp_path, run_here):
    out = tmp_path / "result.json"
    sizes = ["--steps", "1", "--our_steps", "2", "--scenes", "2", "--texts", "3", "--rows", "2", "4", "6"]
    race = ["--target_accuracy", "0", "--sweep", "1x3", "--seeds", "1", "--limit", "12", "--peer_limit", "12"]
    said = run_here("bench_vqa", *tiny_questions, *sizes, *race, "--json", str(out))
    found = json.loads(out.read_text())
    for side in ("ours", "tower"):
        assert found["equal"][side]["loss_difference"] <= 1e-4
        assert 0 < found["equal"][side]["gradient_difference"] <= 1e-4
    assert found["equal"]["questions"] == 6
    assert set(found["tuned"]["rows"]) == {"2", "6"}, "4 does not divide 6"
    assert set(found["compare"]["rates"]) == {"ours", "tower", "rows"}
    assert set(found["compare"]["ratios"]) == {"ours/rows", "tower/rows"}
    work = found["work"]["measured"]
    assert work["ours"]["vision"] == 0 < work["rows"]["vision"]
    assert work["ours"]["head"] == work["swift"]["head"] < work["rows"]["head"]
    assert all(memory["peak"] >= memory["loaded"] > 0 for memory in found["memory"].values())
    assert found["race"]["best"] == "1x3" and found["race"]["rows"][0]["reached"]
    for line in (
        "ms-swift is left out",
        "same work (cached image tokens)",
        "ours/rows",
        "peak memory, rows",
        "fastest of ours",
    ):
        assert line in said, line


def test_vqa_answers_are_the_same(tiny_questions, tmp_path):
    out = tmp_path / "result.json"
    sizes = ["--images", "2", "--batches", "1", "3", "--train_steps", "2", "--our_repeats", "1", "--max_tokens", "4"]
    done = run(*tiny_questions, *sizes, "--json", str(out), script=FOLDER / "bench_vqa_eval.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["questions"] == 8
    assert found["equal"] == {"ours": 1, "tower": 1, "rows 1": 1, "rows 3": 1}
    assert set(found["ratios"]) == {"ours / rows 1", "tower / rows 1", "ours / rows 3", "tower / rows 3"}
    assert "same answers to 8 questions of 2 images" in done.stdout


def test_dialogue_training_compares_equal_work(tiny_questions, tmp_path, run_here, load_benchmark):
    out, bench = tmp_path / "result.json", load_benchmark("bench_dialogue")
    sizes = ["--scenes", "2", "--texts", "4", "--turns", "2", "--rows", "2", "--our_steps", "2", "--json", str(out)]
    said = run_here("bench_dialogue", *tiny_questions, *sizes)
    found = json.loads(out.read_text())
    for side in ("ours", "turns"):
        assert found["equal"][side]["loss_difference"] <= 1e-4
        assert 0 < found["equal"][side]["gradient_difference"] <= 1e-4
    assert set(found["rates"]) == {"ours", "turns", "dialogues"} and set(found["ratios"]) == {"turns", "dialogues"}
    assert "times as fast" in said
    with pytest.raises(InputError, match="no multiple of --turns 3"):
        bench.main([*tiny_questions, "--texts", "4", "--turns", "3"])


@pytest.mark.parametrize("frozen", [True, False])
def test_caption_training_compares_equal_work(frozen, tmp_path, run_here):
    random = np.random.default_rng(0)
    rows = []
    for i in range(6):
        Image.fromarray(random.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        captions = [f"image {i}", f"image {i} shows {i + 1} farm fields", f"two roads and a river in image {i}"]
        rows += [{"image": f"{i}.png", "caption": text, "split": "val" if i > 3 else "train"} for text in captions]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    out = tmp_path / "result.json"
    files = ["--data", str(tmp_path / "captions.json"), "--json", str(out)]
    files += ["--bases", str(write_clip(tmp_path / "clip")), str(write_qwen3(tmp_path / "qwen3"))]
    sizes = ["--captions", "3", "--rows", "2", "6", "--rounds", "1", "--our_steps", "2", "--threads", "1"]
    sizes += ["--parts"] if frozen else ["--no_freeze_vision_model", "--projector", "pixel_shuffle", "--no_memory"]
    race = ["--target_loss", "0", "--limit", "0", "--eval_every", "1", "--sweep", "3x2"]
    said = run_here("bench_caption", *files, *sizes, *race)
    found = json.loads(out.read_text())
    sides = {"ours", "rows"} | (set() if frozen else {"rows, head"})
    assert set(found["equal"]) == set(found["compare"]["rates"]) == sides
    assert found["equal"]["ours"]["loss_difference"] <= 1e-4
    assert 0 < found["equal"]["ours"]["gradient_difference"] <= 1e-4
    assert set(found["tuned"]["rows"]) == {"2", "6"} and len(found["compare"]["ratios"]["rows"]) == 1
    assert set(found["memory"]) == (sides if frozen else set())
    assert all(memory["peak"] >= memory["loaded"] > 0 for memory in found["memory"].values())
    assert list(found["race"]) == ["ours 2x3", "ours 3x2", "rows"]
    assert all(side["step"] == 1 and not side["reached"] for side in found["race"].values())
    for line in ("same work: loss", "captions/s by rows a micro-batch", "ours / it", "not reached in 0 s"):
        assert line in said, line


@pytest.mark.parametrize("name", ["bench_vqa", "bench_vqa_eval"])
def test_vqa_names_missing_data(name, load_benchmark):
    with pytest.raises(InputError, match=r"^--data nowhere: not there"):
        load_benchmark(name).main(["--data", "nowhere"])


def test_search_is_exact_where_it_says_so(tmp_path):
    needs = {
        "faiss flat": "faiss",
        "faiss hnsw": "faiss",
        "lancedb": "lancedb",
        "lancedb exact": "lancedb",
        "sklearn": "sklearn",
    }
    sides = ["ours", "ours exact", "numpy", *(side for side, name in needs.items() if importlib.util.find_spec(name))]
    out, folder = tmp_path / "result.json", tmp_path / "folder"
    sizes = ["--points", "2000", "--dim", "16", "--clusters", "50", "--queries", "6", "--rounds", "1", "--threads", "1"]
    command = [*sizes, "--sides", ",".join(sides), "--folder", str(folder), "--json", str(out)]
    done = run(*command, script=FOLDER / "bench_search.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["absent"] == {}
    assert list(found["search"]) == sides and set(found["builds"]) == set(sides) - {"ours exact", "lancedb exact"}
    assert found["shares"]["no filter"] == 1 and 0 < found["shares"]["box 1%"] < found["shares"]["box 20%"] < 0.3
    for side, filters in found["search"].items():
        assert list(filters) == list(found["shares"])
        for which, numbers in filters.items():
            assert numbers["answered"] == [6]
            assert 0 < numbers["p50_ms"][0] <= numbers["p95_ms"][0]
            if side in ("ours", "ours exact", "faiss flat", "numpy", "lancedb exact", "sklearn"):  # ours scans so few
                assert [numbers[f"recall{kind}"] for kind in ("", "_image", "_text")] == [[1], [1], [1]], (side, which)
        (serving,) = found["rounds"][side]
        assert serving["peak"] >= serving["loaded"] > 0 and serving["opening_seconds"] > 0
    assert all(made["peak"] >= made["loaded"] > 0 and made["disk"] > 4 * 2000 * 16 for made in found["builds"].values())
    assert found["scan"]["times_the_limit"]["ours exact"][0] > 0 and found["bandwidth"][0] > 0
    assert [aim["met"] in (True, False) for aim in found["aims"]] == [True] * (len(found["shares"]) + 1)
    for line in ("no filter (100.0% of the points)", "read bandwidth", "peak MiB, serving"):
        assert line in done.stdout, line
    again = run(*command, "--sides", "numpy", script=FOLDER / "bench_search.py")
    assert again.returncode == 0, again.stderr
    assert json.loads(out.read_text())["builds"]["numpy"] == found["builds"]["numpy"], "taken again from the folder"
    other = run(*command, "--dim", "8", script=FOLDER / "bench_search.py")
    assert other.returncode == 2 and other.stderr.startswith(f"error: --folder {folder}: holds data and builds of")


def test_search_names_missing_peers(monkeypatch, load_benchmark):
    bench_search = load_benchmark("bench_search")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"run `pip install faiss-cpu==[\d.]+ scikit-learn==[\d.]+`"):
        bench_search.main(["--sides", "ours,faiss flat,faiss hnsw,sklearn", "--threads", "1"])
    with pytest.raises(InputError, match=r"expected some of ours, ours exact, .*; got annoy"):
        bench_search.main(["--sides", "ours,annoy", "--threads", "1"])
