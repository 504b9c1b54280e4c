"""Imports run downward only, and importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom; a file may import files of lower tiers. Scripts stand on top and import no other script.
TIERS = [
    ["config"],
    ["imagery"],
    ["scenes", "losses", "metrics", "report"],
    ["caption_scores"],
    ["data"],
    ["store", "places", "demo_data"],
    ["model"],
    ["trainer", "demo_bases", "library"],
]
TRAINING = ["train_match", "train_vqa", "train_caption"]
USE = ["inference_script", "compare_before_after", "caption", "search", "cli_demo", "web_demo"]
MAKE = ["load", "hub2data", "data2csv", "csv2json", "translation_en2zh"]
TIER = {name: i for i, names in enumerate(TIERS) for name in names}
SCRIPTS = {name: len(TIERS) for name in TRAINING + USE + MAKE}
KNOWN = TIER | SCRIPTS
HERE = sorted(path.stem for path in ROOT.glob("*.py"))


def imported(source: str) -> set[str]:
    """Top-level names of the modules a source imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return names


def wrong(name: str, source: str) -> list[str]:
    found = []
    for other in imported(source):
        if other in KNOWN and KNOWN[other] >= KNOWN[name] and other != name:
            found.append(f"{name} imports {other}")
        if other in ("tests", "benchmarks") or other.startswith("."):
            found.append(f"{name} imports {other}")
    return found


@pytest.mark.parametrize("name", HERE)
def test_imports_run_downward_only(name):
    assert name in KNOWN, f"{name}.py is in no tier: add it to DESIGN's list of files and to this test"
    assert not wrong(name, (ROOT / f"{name}.py").read_text())


def test_this_test_can_fail():
    assert wrong("data", "import model") == ["data imports model"]
    assert wrong("data", "def f():\n    from trainer import x") == ["data imports trainer"]
    assert wrong("model", "import train_match") and wrong("search", "import load") and wrong("losses", "import metrics")
    assert wrong("config", "from .data import x") and wrong(
        "model", "import importlib\nimportlib.import_module('trainer')"
    )
    assert not wrong("trainer", "import model, data, torch") and not wrong("search", "from model import DualEncoder")


@pytest.mark.parametrize(
    ("names", "heavy"),
    [
        ("config", ("torch", "transformers", "numpy", "PIL")),
        ("scenes, data2csv, csv2json, hub2data, translation_en2zh", ("torch", "transformers", "datasets", "openai")),
    ],
)
def test_what_needs_no_model_starts_at_once(names, heavy):
    code = f"import sys, {names}; print([name for name in {heavy} if name in sys.modules])"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0 and made.stdout.strip() == "[]", made.stdout + made.stderr


def test_importing_does_no_work(tmp_path):
    """All modules twice in a fresh process, from an empty folder: nothing printed, nothing written, no random number
    drawn, no thread left."""
    code = f"""
import importlib, os, random, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import numpy, torch
before = (torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate())
for name in {HERE!r}:
    for _ in range(2):
        sys.modules.pop(name, None)
        importlib.import_module(name)
after = (torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate())
assert torch.equal(before[0], after[0]) and before[1:] == after[1:], "a random number was drawn"
assert threading.active_count() == 1, threading.enumerate()
assert os.listdir(".") == [], os.listdir(".")
"""
    made = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert made.stdout == "" and made.stderr == "", made.stdout + made.stderr


def text_files(source: str) -> list[str]:
    """Calls that read or write a text file in whatever encoding the machine has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        ours = name in ("open", "fdopen") and not ast.unparse(node.func).startswith("rasterio.")
        mode = ours and any(text[:1] in ("r", "w", "a", "x") and "b" not in text for text in texts)
        if (name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)) or mode:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_texts_are_utf_8_whatever_the_locale():
    # In a Latin-1 locale a captioner was asked in garbled Chinese, and answered without a word of it.
    assert text_files("path.read_text(); os.fdopen(out, 'w'); open(path, 'ab')") == [
        "line 1: path.read_text()", "line 1: os.fdopen(out, 'w')",
    ]  # fmt: skip
    for name in HERE:
        assert not text_files((ROOT / f"{name}.py").read_text(encoding="utf-8")), f"{name}.py"
