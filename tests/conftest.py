"""Shared by all tests: one thread, a tiny base, a small dataset of drawn images. Made once a session."""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before torch; child processes inherit it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from PIL import Image

from config import CaptionConfig, InputError, MatchConfig, VQAConfig, user_errors
from data import PixelStore, QuestionDataset, QwenResize, image_settings
from scenes import Question, QuestionScene
from tests.official_layout import write_clip, write_qwen3, write_qwen_vl

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

COLOURS = {"farmland": (90, 160, 60), "water": (40, 80, 170), "desert": (210, 190, 120), "roofs": (170, 90, 80)}
CHINESE = {"farmland": "农田", "water": "水面", "desert": "沙漠", "roofs": "屋顶"}
QUESTIONS = [
    [("Is there a river in the image?", "yes"), ("How many buildings are there?", "12"), ("farm?", "no")],
    [("Describe the image.", "a farm field next to a road")],
    [("图像中有河流吗？", "有"), ("How many?", "3")],
]


def draw(path: Path, seed: int, size=(70, 60), colour=(90, 160, 60)) -> Path:
    """One noisy image, never twice the same; the format follows the name."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-40, 40, (size[1], size[0], 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


def save(path: Path, value) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def refused(call, *words) -> str:
    with pytest.raises(InputError) as error:
        call()
    for word in words:
        assert str(word) in str(error.value), f"{word!r} is not in: {error.value}"
    return str(error.value)


def picture(path: Path, seed: int = 0, size=(40, 30)) -> Path:
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten images a0.png .. a9.png, all different."""
    for i in range(10):
        picture(tmp_path / f"a{i}.png", i)
    return tmp_path


def captions(count=10, start=0, **more) -> list[dict]:
    return [{"image": f"a{i}.png", "caption": f"text {i}", **more} for i in range(start, start + count)]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> list[QuestionScene]:
    """Three images of three sizes with 3, 1 and 2 questions."""
    folder = tmp_path_factory.mktemp("scenes")
    kinds = ["presence", "count", "presence"]
    return [
        QuestionScene(
            str(draw(folder / f"{i}.png", i, (60 + 30 * i, 80))), [Question(*row, k) for row, k in zip(rows, kinds)]
        )
        for i, rows in enumerate(QUESTIONS)
    ]


def question_dataset(model, scenes, **options) -> QuestionDataset:
    store = PixelStore(QwenResize(model.processor), image_settings(VQAConfig()))
    return QuestionDataset(scenes, model.prompt, processor=model.processor, store=store, **options)


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


@pytest.fixture
def call_main(capsys):
    """`call_main(script.main, "--flag", ...) -> (exit code, stdout, stderr)`."""

    def run(main, *words):
        try:
            with user_errors():
                code = main([str(word) for word in words]) or 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


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


@pytest.fixture(scope="session")
def matcher(encoder, tmp_path_factory) -> Path:
    """A tiny matcher's folder."""
    folder = tmp_path_factory.mktemp("matcher") / "best_model"
    encoder(image_tower="full", text_tower="full").save_pretrained(folder)
    return folder


@dataclass
class Asked:
    """Questions on disk: conversations of a training file (splits train and val) and a test file."""

    root: Path
    train: Path
    test: Path

    def flags(self) -> list[str]:
        return [f"--train_file={self.train}", f"--test_file={self.test}"]


def conversation(number: int, image, question: str, answer: str, kind: str, split: str | None = None) -> dict:
    """One row as csv2json.py writes it."""
    asked = {"from": "user", "value": f"{question} <|vision_start|>{image}<|vision_end|>"}
    row = {"id": f"rsvqa_{number}", "conversations": [asked, {"from": "assistant", "value": answer}], "type": kind}
    return row | ({"split": split} if split else {})


@pytest.fixture(scope="session")
def asked(tmp_path_factory) -> Asked:
    """9 training, 4 validation and 5 test images of different sizes with 3 to 6 questions each."""
    root = tmp_path_factory.mktemp("asked")
    rows = {"train": [], "test": []}
    names = list(COLOURS)
    for part, (split, count) in enumerate({"train": 9, "val": 4, "test": 5}.items()):
        for i in range(count):
            kind = names[i % 4]
            image = draw(root / f"{split}_{i}.png", 500 * part + i, (56 + 28 * (i % 3), 60), COLOURS[kind])
            listed = [(f"Is there {name}?", "yes" if name == kind else "no", "presence") for name in names[: 2 + i % 3]]
            listed += [("How many buildings are there?", str(i * 7 % 13), "count"), ("Is it a rural or an urban area?",
                       "urban" if kind == "roofs" else "rural", "rural_urban")]  # fmt: skip
            target = rows["test" if split == "test" else "train"]
            target += [conversation(len(target) + k, image, *row, split) for k, row in enumerate(listed)]
    for name, listed in rows.items():
        (root / f"{name}.json").write_text(json.dumps(listed))
    return Asked(root, root / "train.json", root / "test.json")


@pytest.fixture(scope="session")
def qwen2_base(tmp_path_factory) -> Path:
    """A tiny Qwen2-VL with random weights."""
    return write_qwen_vl(tmp_path_factory.mktemp("base") / "tiny2", "qwen2_vl")


@pytest.fixture(scope="session")
def vqa_settings(base):
    """`vqa_settings(field=value, ...)`: a VQAConfig on the tiny base."""

    def make(**changed) -> VQAConfig:
        small = {"base_model": str(base), "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "cache_dir": None}
        return VQAConfig(**(small | {"max_pixels": 112 * 112, "min_pixels": 28 * 28} | changed))

    return make


@pytest.fixture(scope="session")
def answerer(vqa_settings):
    """`answerer(field=value, ...)`: a VQA on the tiny base whose adapter does something."""
    import torch

    from model import VQA

    def make(seed=0, strength=0.05, dtype=torch.float32, **changed) -> VQA:
        model = VQA.from_base(vqa_settings(**changed), seed=seed, dtype=dtype)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed + 1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, strength)
        return model

    return make


@pytest.fixture(scope="module")
def no_java():
    """METEOR takes ten seconds to start; tests/test_caption_scores.py runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caption_scores.shutil.which", lambda _: None)
        yield


@pytest.fixture(scope="session")
def clip_base(tmp_path_factory) -> Path:
    """A tiny CLIP with random weights: 4 x 4 patches."""
    return write_clip(tmp_path_factory.mktemp("base") / "clip")


@pytest.fixture(scope="session")
def siglip_base(tmp_path_factory) -> Path:
    """A tiny SigLIP with random weights: 4 x 4 patches."""
    return write_clip(tmp_path_factory.mktemp("base") / "siglip", "siglip")


@pytest.fixture(scope="session")
def qwen3_base(tmp_path_factory) -> Path:
    """A tiny Qwen3 with random weights, in two shards."""
    return write_qwen3(tmp_path_factory.mktemp("base") / "qwen3")


@pytest.fixture(scope="session")
def captioner(clip_base, qwen3_base):
    """`captioner(field=value, ...)`: a new Captioner on the tiny bases."""
    from model import Captioner

    def make(seed=0, dtype=torch.float32, **changed) -> Captioner:
        small = {"vision_model_name": str(clip_base), "language_model_name": str(qwen3_base), "cache_dir": None,
                 "lora_alpha": 8, "lora_dropout": 0.0, "max_caption_tokens": 12}  # fmt: skip
        return Captioner.from_base(CaptionConfig(**(small | changed)), seed=seed, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def chat_adapter(answerer, tmp_path_factory) -> Path:
    """The folder of an adapter that says something, for whoever talks."""
    folder = tmp_path_factory.mktemp("chat") / "best_model"
    answerer(strength=0.3, prompt="{question}").save_pretrained(folder)
    return folder


def loss_and_gradient(model, examples, *, packing, budget=10**6):
    """(loss, gradient, names of the parameters that have one, number of pieces) of one step over scenes of a packed task."""
    from data import QuestionCollator

    batch = QuestionCollator(budget, packing=packing, pad_id=model.tokenizer.pad_token_id)(examples)
    model.zero_grad()
    total = 0.0
    for piece in batch["pieces"]:
        loss = model(**{name: value.to(model.device) for name, value in piece.items()}) / batch["targets"]
        loss.backward()
        total += loss.item()
    found = {name: p.grad.flatten() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return total, torch.cat(list(found.values())), list(found), len(batch["pieces"])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]
