"""data.py: resized pixels and features on disk, scenes to tensors."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from config import DataConfig, InputError
from data import (
    FeatureStore,
    MatchCollator,
    MatchDataset,
    PixelStore,
    QwenResize,
    SceneSampler,
    drop_too_long,
    drop_unreadable,
)
from imagery import ImageSettings
from scenes import Question, QuestionScene, Scene, load_splits
from tests.conftest import captions, picture, refused, save
from tests.official_layout import write_qwen_vl

# ----------------------------------------------------------------------------------------------------
# Pixels


class lambda_resize:
    """The smallest resize there is, for tests of the store alone."""

    key = "half"

    def __call__(self, rgb):
        return rgb[::2, ::2]


def test_truncated_image_is_found_before_training(folder):
    whole = (folder / "a3.png").read_bytes()
    (folder / "a3.png").write_bytes(whole[: len(whole) // 2])  # its header still reads
    splits = load_splits(DataConfig(train_file=str(save(folder / "c.json", captions(10))), val_fraction=0.2))
    store = PixelStore(lambda_resize(), ImageSettings(), str(folder / "cache"))
    refused(lambda: drop_unreadable(splits, store, 0.01), "1 of 10 images", "a3.png", "--max_rejected")
    report = folder / "rejected.jsonl"
    kept = drop_unreadable(splits, store, 0.1, report)
    assert sum(map(len, kept.values())) == 9
    assert not any(s.image.endswith("a3.png") for scenes in kept.values() for s in scenes)
    assert "a3.png" in json.loads(report.read_text())["file"]
    for _ in range(2):  # a second start of the run lists it once, too
        drop_unreadable(load_splits(DataConfig(train_file=str(folder / "c.json")), report=report), store, 0.1, report)
        assert "a3.png" in json.loads(report.read_text())["file"]
    only = {"train": splits["train"], "val": [Scene(str(folder / "a3.png"))], "test": []}
    refused(lambda: drop_unreadable(only, store, 1.0), "no image of the val split")


@pytest.fixture(scope="module")
def processors(base, tmp_path_factory):
    from model import load_processor

    other = write_qwen_vl(tmp_path_factory.mktemp("qwen2") / "tiny", family="qwen2_vl", shards=1)
    return [load_processor(folder, 28 * 28 * 4, 168 * 168)[0] for folder in (base, other)]


@pytest.mark.parametrize("size", [(70, 60), (256, 256), (28, 300), (1000, 40), (13, 17), (399, 401)])
def test_same_pixels_as_the_official_processor(processors, tmp_path, size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    path = picture(tmp_path / "a.png", 3, size)
    for processor in processors:
        assert type(processor) is Qwen2VLImageProcessorPil
        ours = data.pixel_batch([PixelStore(QwenResize(processor), ImageSettings())[str(path)]], processor)
        official = processor(images=[Image.open(path).convert("RGB")], do_resize=True, return_tensors="pt")
        assert torch.equal(ours["image_grid_thw"], official["image_grid_thw"])
        assert torch.equal(ours["pixel_values"], official["pixel_values"])


@pytest.mark.parametrize("size", [(256, 256), (70, 60), (28, 300), (13, 17), (1000, 641)])
@pytest.mark.parametrize("resample", [2, 3, 1])
def test_squares_are_those_of_the_official_processor(tmp_path, size, resample):
    """Noise, resized by torch and by Pillow: few bytes differ, by 2 of 255 at most; what torch cannot do is Pillow's."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    rgb = np.array(Image.open(picture(tmp_path / "a.png", 3, size)))
    for processor in (
        CLIPImageProcessorPil(size={"shortest_edge": 80}, crop_size=64, resample=resample),
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=64, resample=resample),  # a rim of black
        SiglipImageProcessorPil(size={"height": 56, "width": 64}, resample=resample),
        SiglipImageProcessorPil(size={"height": 512, "width": 512}, resample=resample, do_resize=False),
    ):
        rgb.flags.writeable = False
        ours = data.SquareResize(processor)(rgb)
        official = processor(images=[rgb], do_rescale=False, do_normalize=False)["pixel_values"][0].transpose(1, 2, 0)
        difference = np.abs(ours.astype(int) - official)
        most = 2 if resample > 1 and processor.do_resize else 0
        assert difference.max() <= most and (difference > 0).mean() < 0.06, (processor, difference.max())


def test_pixel_cache_hit_change_and_corruption(tmp_path, monkeypatch):
    path = str(picture(tmp_path / "a.png", 1))
    store = PixelStore(lambda_resize(), ImageSettings(), str(tmp_path / "cache"))
    reads = []
    read = data.read_rgb
    monkeypatch.setattr(data, "read_rgb", lambda *a, **k: reads.append(a[0]) or read(*a, **k))
    first = store[path]
    assert np.array_equal(store[path], first) and len(reads) == 1  # a hit
    assert not list((tmp_path / "cache").rglob("*.tmp"))

    (entry,) = (tmp_path / "cache").rglob("*.npy")
    whole = entry.read_bytes()
    for broken in (whole[:-7], whole[:20], b"", b"PK\3\4 no zip", b"\0" * len(whole)):
        entry.write_bytes(broken)
        assert np.array_equal(store[path], first)
        assert entry.read_bytes() == whole  # made anew
    assert len(reads) == 6

    picture(tmp_path / "a.png", 2)  # other content under the same name
    os.utime(path, ns=(1, 1))
    assert not np.array_equal(store[path], first) and len(reads) == 7
    other = PixelStore(lambda_resize(), ImageSettings(stretch="percentile"), str(tmp_path / "cache"))
    other[path]
    assert len(reads) == 8  # another stretch is another entry
    PixelStore(lambda_resize(), ImageSettings())[path]
    assert len(reads) == 9  # no folder: nothing kept
    link = tmp_path / "other" / "0.png"
    link.parent.mkdir()
    link.symlink_to(Path("..", "a.png"))
    assert np.array_equal(store[str(link)], store[path]) and len(reads) == 9  # the same file by another name


def test_prepare_reads_each_image_once_and_reports(folder, monkeypatch):
    (folder / "a1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    store = PixelStore(lambda_resize(), ImageSettings(), str(folder / "cache"))
    paths = [str(folder / f"a{i % 4}.png") for i in range(8)] + [str(folder / "gone.png")]
    bad = store.prepare(paths)
    assert list(bad) == [str(folder / "a1.png"), paths[-1]] and all(Path(path).name in bad[path] for path in bad)
    monkeypatch.setattr(data, "read_rgb", None)  # all is kept: nothing is read again
    assert store.prepare([path for path in paths[:-1] if path not in bad]) == {}


def test_a_cache_that_cannot_be_written_is_named_and_nothing_half_stays(folder, monkeypatch):
    store = PixelStore(lambda_resize(), ImageSettings(), str(folder / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store[str(folder / "a0.png")]
    assert not [path for path in (folder / "cache").rglob("*") if path.is_file()]
    shutil.rmtree(folder / "cache")
    (folder / "cache").mkdir()
    (folder / "cache" / "pixels").write_text("a file")
    with pytest.raises(InputError, match="cannot keep resized images"):
        store[str(folder / "a0.png")]


def test_many_files_are_read_in_processes(folder):
    paths = [str(folder / f"a{i % 4}.png") for i in range(30)]
    seen = data.over_files(_who_reads, paths, workers=2, disable=True)
    assert [path for path, _ in seen] == paths and os.getpid() not in {process for _, process in seen}
    few = data.over_files(_who_reads, paths[:7], workers=2, disable=True)
    assert {process for _, process in few} == {os.getpid()}, "a process is not started for them"
    store = PixelStore(lambda_resize(), ImageSettings())
    for path, pixels in zip(paths, data.each_file(store.__getitem__, paths, workers=2), strict=True):
        assert isinstance(pixels, np.ndarray) and np.array_equal(pixels, store[path])
    with pytest.raises(InputError, match=r"^no room for a3\.png$"):
        data.over_files(_refuse, paths, workers=2, disable=True)


def _who_reads(path):
    return path, os.getpid()


def _refuse(path):
    if path.endswith("a3.png"):
        raise InputError("no room for a3.png")


@pytest.mark.parametrize("size", [(3000, 10), (1, 201)])
def test_a_strip_of_a_picture_is_refused_by_name(processors, tmp_path, size):
    path = picture(tmp_path / "thin.png", size=size)
    for store in (PixelStore(QwenResize(processors[0]), ImageSettings()), clip_store(tmp_path)):
        with pytest.raises(data.ImageError, match=r"thin\.png.*200 times its width"):
            store[str(path)]


def clip_store(folder):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return PixelStore(data.SquareResize(CLIPImageProcessorPil()), ImageSettings())


@pytest.mark.parametrize("height", [1, 3])
def test_a_picture_as_low_as_it_has_colours(tmp_path, height):
    Image.new("RGB", (60, height), (200, 100, 20)).save(tmp_path / "low.png")
    made = clip_store(tmp_path)[str(tmp_path / "low.png")]
    assert made.shape == (224, 224, 3) and (made == (200, 100, 20)).all()


@pytest.mark.parametrize("value", [0, 255])
def test_pictures_of_one_colour_are_no_data_to_train_on(tmp_path, value):
    scenes = []
    for name in "abc":
        Image.new("RGB", (60, 60), (value,) * 3).save(tmp_path / f"{name}.png")
        scenes.append(data.Scene(str(tmp_path / f"{name}.png"), ["a farm"]))
    with pytest.raises(InputError, match="3 pictures looked at are black or white"):
        data.drop_unreadable({"train": scenes}, clip_store(tmp_path), 0.01)


# ----------------------------------------------------------------------------------------------------
# Features


def test_a_long_text_does_not_widen_every_feature_on_disk(tmp_path):
    keys = [f"text {i}" for i in range(500)] + ["x" * 20_000]
    FeatureStore(tmp_path, "r").get(keys, lambda chunk: np.ones((len(chunk), 4), np.float32))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.npz")) < 200_000


def test_feature_store(tmp_path):
    asked = []

    def compute(keys):
        asked.append(list(keys))
        return np.array([[len(key), ord(key[0])] for key in keys], dtype=np.float32)

    store = FeatureStore(str(tmp_path), "recipe 1")
    made = store.get(["aa", "b", "aa", "农田"], compute, batch=2)
    assert made.tolist() == [[2, 97], [1, 98], [2, 97], [2, ord("农")]] and asked == [["aa", "b"], ["农田"]]
    again = FeatureStore(str(tmp_path), "recipe 1").get(["b", "ccc", "aa"], compute)
    assert again.tolist() == [[1, 98], [3, 99], [2, 97]] and asked[2:] == [["ccc"]]
    FeatureStore(str(tmp_path), "recipe 2").get(["aa"], compute)
    assert asked[3:] == [["aa"]]
    assert not list(tmp_path.rglob("*.tmp"))
    for shard in store.folder.glob("*.npz"):
        shard.write_bytes(shard.read_bytes()[:50])  # cut short
    assert FeatureStore(str(tmp_path), "recipe 1").get(["b", "aa"], compute).tolist() == [[1, 98], [2, 97]]
    assert asked[4:] == [["b", "aa"]]


# ----------------------------------------------------------------------------------------------------
# Scenes -> tensors


def test_equal_texts_are_split_into_tokens_once():
    asked = []

    def tokenizer(texts, add_special_tokens, **_):
        asked.extend(texts)
        return {"input_ids": [[len(text)] for text in texts]}

    assert [ids.tolist() for ids in data.token_ids(tokenizer, ["a", "bb", "a"])] == [[1], [2], [1]]
    assert asked == ["a", "bb"] and data.token_ids(tokenizer, []) == []
    many = ["x" * (n % 1500) for n in range(3000)]  # in several calls
    assert [ids.tolist() for ids in data.token_ids(tokenizer, many)] == [[len(text)] for text in many]


@pytest.mark.parametrize(("size", "batch"), [(13, 4), (12, 4), (5, 8), (8, 8), (1, 1), (100, 7)])
def test_sampler(size, batch):
    sampler = SceneSampler(size, batch, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler) and {e for e, _ in drawn} == {epoch}
        order = [i for _, i in drawn]
        assert sorted(order[:size]) == list(range(size))  # a permutation, then filled up from its own start
        assert order[size:] == order[: len(order) - size]
        if size >= batch:
            assert len(order) % batch == 0 and len(order) - size < batch
        for k in range(0, len(order), batch):
            assert len(set(order[k : k + batch])) == len(order[k : k + batch])
        assert drawn == list(sampler)  # no hidden state
        orders.append(order)
    if size > 4:
        assert orders[0] != orders[1] != orders[2]
        assert [i for _, i in SceneSampler(size, batch, seed=4)] != orders[0]


@pytest.fixture(scope="module")
def small(processors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    scenes = []
    for i in range(4):
        path = picture(folder / f"{i}.png", i, (56 + 28 * i, 56))
        rows = [(f"text {k} of {i}", "shared" if k % 2 else None) for k in range(5)]
        scenes.append(Scene(str(path), [text for text, _ in rows], rows))
    scenes[3].rows.append(("text 0 of 0", None))  # also true of image 3
    scenes[3].texts.append("text 0 of 0")

    def tokenize(texts):
        return [np.arange(1, 2 + len(text) % 5) for text in texts], 0

    def make(**options):
        dataset = MatchDataset(scenes, tokenize, PixelStore(QwenResize(processors[0]), ImageSettings()), **options)
        return dataset, MatchCollator(dataset, processors[0], pad_id=0)

    return make


def test_texts_per_scene_depend_on_seed_epoch_and_scene_alone(small):
    dataset, _ = small(texts_per_scene=2, seed=1)
    picks = {epoch: [dataset[epoch, i]["rows"] for i in range(4)] for epoch in range(6)}
    assert all(len(rows) == 2 for rows in picks[0]) and len({str(rows) for rows in picks.values()}) > 1
    again, _ = small(texts_per_scene=2, seed=1)
    assert [again[3, i]["rows"] for i in (3, 1, 2, 0)] == [picks[3][i] for i in (3, 1, 2, 0)]
    other, _ = small(texts_per_scene=2, seed=2)
    assert any(other[epoch, i]["rows"] != picks[epoch][i] for epoch in picks for i in range(4))
    everything, _ = small(texts_per_scene=0)
    assert [len(everything[0, i]["rows"]) for i in range(4)] == [5, 5, 5, 6]


def test_collator_shapes_and_ids(small):
    dataset, collate = small()
    batch = collate([dataset[0, i] for i in (3, 0, 2)])
    assert batch["scene_ids"].tolist() == [3, 0, 2]
    texts = [dataset.texts[i] for i in batch["text_ids"]]
    assert len(texts) == len(set(texts)) == 5 * 3 + 1 and "shared" in texts
    assert batch["scene_texts"].shape == (3, 6) and batch["scene_texts"][1].tolist()[-1] == -1
    assert batch["triplets"].shape == (16, 3)
    for scene, text, negative in batch["triplets"].tolist():
        assert text in batch["scene_texts"][batch["scene_ids"].tolist().index(scene)].tolist()
        assert negative == -1 or dataset.texts[negative] == "shared"
    assert batch["image_grid_thw"].shape == (3, 3)
    assert len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod(1).sum())
    assert batch["image_grid_thw"][0].tolist() == [1, 4, 10]  # image 3 is 140 x 56: 14 pixels a patch
    lengths = batch["text_lengths"].tolist()
    assert batch["input_ids"].shape == (16, max(lengths))
    for row, length, text in zip(batch["input_ids"].tolist(), lengths, texts):
        assert row == [*range(1, 2 + len(text) % 5), *[0] * (max(lengths) - length)]


def test_image_drawn_twice_is_encoded_once(small):
    dataset, collate = small(texts_per_scene=2)
    batch = collate([dataset[0, 1], dataset[0, 2], dataset[5, 1]])
    assert batch["scene_ids"].tolist() == [1, 2] and batch["image_grid_thw"].shape == (2, 3)
    assert len(batch["triplets"]) == 6 and batch["triplets"][:, 0].tolist() == [1, 1, 2, 2, 1, 1]


def test_collator_with_features_of_frozen_towers(small):
    dataset, collate = small()
    dataset.image_features = np.arange(8, dtype=np.float32).reshape(4, 2)
    dataset.text_features = np.arange(len(dataset.texts), dtype=np.float32)[:, None]
    dataset.store = None  # no pixel is read
    batch = collate([dataset[0, 2], dataset[0, 0]])
    assert batch["image_features"].tolist() == [[4, 5], [0, 1]]
    assert batch["text_features"][:, 0].tolist() == batch["text_ids"].tolist()
    assert not {"pixel_values", "input_ids"} & set(batch)


def test_no_more_processes_than_shared_memory_has_room_for(monkeypatch, capsys):
    """In Docker's 64 MB training and indexing stood still for ever."""
    usage = data.shutil.disk_usage("/")
    pieces = [{"pixel_values": torch.zeros(5 * 2**18)}, {"pixel_values": torch.zeros(5 * 2**18)}]
    batch = lambda: {"pieces": pieces, "labels": torch.zeros(2**18), "targets": 3}  # noqa: E731 - 11 MiB
    for free, fit in ((64, 1), (256, 7), (20, 0), (9 * 1024, 8)):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free * 2**20))
        assert data.fitting_workers(8, batch, ahead=2) == fit
        assert ("--shm-size" in capsys.readouterr().err) == (fit < 8)
    assert data.fitting_workers(0, None, 2) == 0


def test_answers_of_short_tokens_are_counted():
    class Letters:
        def __call__(self, texts, **_):
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    scenes = [QuestionScene("a.png", [Question("?", "x" * 12), Question("?", "y")], "train")]
    kept = drop_too_long({"train": scenes}, Letters(), 1.0, answer=("--max_answer_tokens", 10))
    assert [question.answer for question in kept["train"][0].questions] == ["y"]
