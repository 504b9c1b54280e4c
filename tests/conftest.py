"""Shared by all tests: one thread, a tiny base, a small dataset of drawn images. Made once a session."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before torch; child processes inherit it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from PIL import Image

from config import MatchConfig
from tests.official_layout import write_qwen_vl

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

COLOURS = {"farmland": (90, 160, 60), "water": (40, 80, 170), "desert": (210, 190, 120), "roofs": (170, 90, 80)}
CHINESE = {"farmland": "农田", "water": "水面", "desert": "沙漠", "roofs": "屋顶"}


def draw(path: Path, seed: int, size=(70, 60), colour=(90, 160, 60)) -> Path:
    """One noisy image, never twice the same; the format follows the name."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-40, 40, (size[1], size[0], 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


@dataclass
class Drawn:
    """A dataset on disk: image folder and one triplet file per split; captions of all with their split."""

    root: Path
    images: Path
    train: Path
    val: Path
    test: Path
    captions: Path

    def flags(self) -> list[str]:
        return [f"--train_file={self.train}", f"--val_file={self.val}", f"--test_file={self.test}",
                f"--image_root={self.images}"]  # fmt: skip


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Drawn:
    """13 training images with 4 rows each (4 x 3 + 1: the last batch is filled up), 6 for validation, 6 for test."""
    root = tmp_path_factory.mktemp("drawn")
    images = root / "images"
    images.mkdir()
    names = list(COLOURS)
    captions = []
    for number, (split, count) in enumerate({"train": 13, "val": 6, "test": 6}.items()):
        rows = []
        for i in range(count):
            kind = names[i % 4]
            file = f"{split}_{i}.{'tif' if i % 3 == 0 else 'png'}"
            draw(images / file, 1000 * number + i, (56 + 14 * (i % 3), 60), COLOURS[kind])
            other = names[(i + 1) % 4]
            texts = [f"a piece of {kind}", f"{kind} number {i} from above", f"there is {kind}, seen in {split} {i}"]
            texts.append(f"第{i}幅图像中有{CHINESE[kind]}")
            for k, text in enumerate(texts):
                negative = f"第{i}幅图像中有{CHINESE[other]}" if k == 3 else f"a piece of {other}"
                rows.append({"image_name": file, "positive": text, "negative": negative})
                captions.append({"image": file, "caption": text, "split": split})
        (root / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False))
    (root / "captions.json").write_text(json.dumps(captions, ensure_ascii=False))
    return Drawn(root, images, *(root / f"{name}.json" for name in ("train", "val", "test", "captions")))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny Qwen2.5-VL with random weights, in two shards."""
    return write_qwen_vl(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def settings(base):
    """`settings(field=value, ...)`: a MatchConfig on the tiny base."""

    def make(**changed) -> MatchConfig:
        small = {"base_model": str(base), "projection_dim": 16, "lora_rank": 4, "lora_alpha": 8, "cache_dir": None}
        return MatchConfig(**(small | {"max_pixels": 56 * 56, "min_pixels": 28 * 28} | changed))

    return make


@pytest.fixture(scope="session")
def encoder(settings):
    """`encoder(field=value, ...)`: a new DualEncoder on the tiny base."""
    from model import DualEncoder

    return lambda seed=0, **changed: DualEncoder.from_base(settings(**changed), seed=seed)
