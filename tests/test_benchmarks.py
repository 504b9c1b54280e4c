"""The benchmarks run and compare equal work. Nothing here is timed: speed is measured, not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official_layout import write_qwen_vl
from PIL import Image

BENCH = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_match.py"


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


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.skipif(has_peer(), reason="sentence-transformers is installed")
def test_match_names_the_missing_peer():
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: sentence-transformers is not installed; run `pip install sentence-transformers=="
    )
    assert len(done.stderr.strip().splitlines()) == 1


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
