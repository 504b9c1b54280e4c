"""scenes.py: what is read and under which names, what is refused and how it is said, splits by image."""

import csv
import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from config import DataConfig, InputError
from scenes import (
    NO_IMAGE,
    Scene,
    by_content,
    captions_as_answers,
    find_leaks,
    image_files,
    images_of,
    is_chinese,
    load_json,
    load_splits,
    read_chat,
    read_conversations,
    read_scenes,
)
from tests.conftest import captions, picture, refused, save

UCM = Path(__file__).parents[2] / "shared" / "data" / "ucm_captions"


# ----------------------------------------------------------------------------------------------------
# Reading


def test_missing_file_and_folder(tmp_path):
    refused(lambda: read_scenes(tmp_path / "none.json"), tmp_path / "none.json", "no such file")
    refused(lambda: read_scenes(tmp_path), tmp_path / "captions.json", "no such file")
    (tmp_path / "captions.json").mkdir()
    refused(lambda: read_scenes(tmp_path), "is a folder")


def test_broken_json_has_line_and_column(tmp_path):
    broken = save(tmp_path / "b.json", '[\n  {"image": "a.png",\n   "caption": oops}\n]')
    refused(lambda: read_scenes(broken), broken, "not JSON: line 3, column 15")
    lines = save(tmp_path / "b.jsonl", '{"image": "a.png", "caption": "x"}\n\n{"image": }\n')
    refused(lambda: read_scenes(lines), lines, "line 3, column 11")


def test_not_utf8_and_byte_order_mark(tmp_path):
    (tmp_path / "latin.json").write_bytes('[{"image": "é"}]'.encode("latin-1"))
    refused(lambda: load_json(tmp_path / "latin.json"), "UTF-8", "byte 12")
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert load_json(tmp_path / "bom.json") == [1]


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    """A line separator (U+2028) may stand unescaped inside a JSON text; str.splitlines would cut there."""
    rows = [{"image": "a", "caption": "one\u2028two\x85three"}, {"image": "b", "caption": "x"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode())
    assert load_json(path) == rows


@pytest.mark.parametrize("content", [{"rows": []}, [1, 2], "text", [{"picture": "a", "caption": "b"}], []])
def test_unknown_form(tmp_path, content):
    path = save(tmp_path / "f.json", json.dumps(content))
    text = refused(lambda: read_scenes(path), path)
    assert "expected rows of" in text or "is empty" in text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "a0.png", "caption": 5}, ["row 9", "'caption'", "expected a text", "int"]),
        ({"image": "a0.png", "caption": "  "}, ["row 9", "'caption'", "is empty"]),
        ({"image": "a0.png"}, ["row 9", "'caption'", "is missing", "image"]),
        ({"image": None, "caption": "x"}, ["row 9", "'image'", "expected a text"]),
        ({"image": "gone.png", "caption": "x"}, ["row 9", "gone.png", "no such image", "--image_root"]),
        ({"image": "A0.PNG", "caption": "x"}, ["no such image", "a0.png: capitals count"]),
        ({"image": "words.png", "caption": "x"}, ["row 9", "words.png"]),
        ({"image": "a0.png", "caption": "\ud800"}, ["row 9", "'caption'", "surrogate"]),
        (["a0.png", "x"], ["row 9", "expected an object", "list"]),
    ],
)
def test_bad_row_names_file_index_field(folder, row, words):
    (folder / "words.png").write_text("this is no image")
    path = folder / "c.json"
    path.write_text(json.dumps([*captions(9), row, *captions(1)]))
    refused(lambda: read_scenes(path), path, "1 of 11 rows", *words)
    read = read_scenes(path, max_rejected=0.1)  # few enough: the run goes on
    assert len(read.scenes) == 9 and [bad.row for bad in read.rejected] == [9] and read.rows == 11


def test_duplicates_are_dropped_and_counted(folder):
    path = save(folder / "c.json", [*captions(3), *captions(2), {"image": "a0.png", "caption": " text 0 "}])
    read = read_scenes(path)
    assert read.duplicates == 3 and [s.rows for s in read.scenes] == [[(f"text {i}", None)] for i in range(3)]


def test_negative_equal_to_a_positive(folder):
    rows = [
        {"image_name": "a0.png", "positive": "a farm", "negative": "a lake"},
        {"image_name": "a0.png", "positive": "fields", "negative": "a farm"},  # true of the same image
        {"image_name": "a1.png", "positive": "a lake", "negative": "a farm"},
    ]
    path = save(folder / "t.json", rows)
    refused(lambda: read_scenes(path), "row 1", "'negative'", "a farm", "also a positive")
    read = read_scenes(path, max_rejected=0.5)
    assert [bad.row for bad in read.rejected] == [1]
    assert read.scenes[0].rows == [("a farm", "a lake")] and read.scenes[0].texts == ["a farm", "fields"]


def test_triplet_form(folder):
    rows = [{"image_name": "a0.png", "positive": "p", "negative": "n"}, {"image_name": "a0.png", "positive": "q"}]
    (scene,) = read_scenes(save(folder / "t.json", rows)).scenes
    assert scene.rows == [("p", "n"), ("q", None)] and scene.texts == ["p", "q"]
    assert scene.image == str(folder / "a0.png")


def test_caption_form_gathers_rows_by_image(folder):
    rows = [{"image": "a0.png", "caption": t} for t in ("x", "y")] + captions(2, 1)
    scenes = read_scenes(save(folder / "c.json", rows)).scenes
    assert [scene.texts for scene in scenes] == [["x", "y"], ["text 1"], ["text 2"]]


def test_karpathy_form_with_restval_and_filepath(folder):
    (folder / "images" / "part").mkdir(parents=True)
    picture(folder / "images" / "part" / "b.png", 50)
    entries = [
        {"filename": "a0.png", "split": "train", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "a1.png", "split": "restval", "sentences": [{"raw": "three"}]},
        {"filename": "b.png", "filepath": "part", "split": "val", "sentences": [{"raw": "four"}]},
        {"filename": "a2.png", "split": "test", "sentences": [{"raw": "five"}]},
    ]
    path = save(folder / "k.json", {"images": entries, "dataset": "x"})
    splits = load_splits(DataConfig(train_file=str(path)))
    assert {name: [s.texts for s in scenes] for name, scenes in splits.items()} == {
        "train": [["one", "two"], ["three"]],
        "val": [["four"]],
        "test": [["five"]],
    }
    entries[0]["sentences"] = []
    refused(lambda: read_scenes(save(path, {"images": entries})), "row 0", "'sentences'")


def test_coco_form(folder):
    images = [{"id": i, "file_name": f"a{i}.png", "width": 8} for i in range(3)]
    notes = [
        {"id": 9 - n, "image_id": str(n % 2), "caption": text} for n, text in enumerate(["x", "y", "x2", "...", "x"])
    ]
    notes.append({"id": 1, "image_id": 2, "caption": "z"})  # numbers here, texts there
    path = save(folder / "coco.json", {"info": {}, "images": images, "annotations": notes})
    read = read_scenes(path)
    assert [(scene.name, scene.texts) for scene in read.scenes] == [
        ("a0.png", ["x", "x2"]), ("a1.png", ["y"]), ("a2.png", ["z"]),
    ]  # fmt: skip
    assert read.scenes[0].listed == ["x", "x2", "x"] and [bad.row for bad in read.left_out] == [1]
    notes.pop()
    refused(lambda: read_scenes(save(path, {"images": images, "annotations": notes})), "row 2", "there is no text")
    del images[1]["file_name"]
    refused(
        lambda: read_scenes(save(path, {"images": images, "annotations": notes})), "row 1", "'file_name' is missing"
    )
    images[1]["file_name"] = "a1.png"
    boxes = [{"id": n, "image_id": n, "bbox": [0, 0, 1, 1]} for n in range(3)]
    refused(lambda: read_scenes(save(path, {"images": images, "annotations": boxes})), "'captions': expected a text")


def test_rows_of_training_frameworks(folder):
    """ms-swift's query and response, LLaMA-Factory's instruction and output, an image as a file's address."""
    (folder / "a b.png").write_bytes((folder / "a0.png").read_bytes())
    swift = {"query": "<image>And now?", "response": "no", "images": ["a0.png"], "history": [["Ships?", "yes"]]}
    alpaca = {
        "instruction": "<image>Count.",
        "input": "Only ships.",
        "output": "2",
        "images": [{"path": "a1.png"}],
        "system": "x",
    }
    content = [{"type": "image", "image": f"file://{folder}/a%20b.png"}, {"type": "text", "text": "Ships?"}]
    parts = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}
    made = []
    for row in (swift, alpaca, parts):
        for read in (read_chat, read_conversations):
            ((scene,),) = [read(save(folder / "rows.json", [row])).scenes]
            made.append((Path(scene.image).name, [(q.text, q.answer, q.history) for q in scene.questions]))
    assert made[::2] == made[1::2] == [
        ("a0.png", [("And now?", "no", (("Ships?", "yes"),))]),
        ("a1.png", [("Count.\nOnly ships.", "2", ())]),
        ("a b.png", [("Ships?", "yes", ())]),
    ]  # fmt: skip
    refused(lambda: read_chat(save(folder / "rows.json", [swift | {"images": ["a0.png"] * 2}])), "found 2")


def test_negatives_of_a_triplet(folder):
    """One, several, or none, in JSON and in a table as pandas writes it: a list is not one text with brackets."""
    want = [[("p0", "n0"), ("p0", "n00")], [("p1", None)], [("p2", "n2")]]
    given = [["n0", "n00"], None, "n2"]

    def rows(path):
        return [scene.rows for scene in read_scenes(path).scenes]

    for field in ("negative", "negatives", "Negative"):
        made = [{"Image": f"a{k}.png", "Positive": f"p{k}", field: given[k]} for k in range(3)]
        assert rows(save(folder / "t.json", made)) == want
        table = [f'a{k}.png,p{k},"{given[k] or ""}"' for k in range(3)]
        (folder / "t.csv").write_text("\n".join([f"Image,Positive,{field}", *table]))
        assert rows(folder / "t.csv") == want
    made[1] = made[1] | {"Negative": 3}
    refused(lambda: rows(save(folder / "t.json", made)), "row 1", "'Negative': expected a text, found int")
    made[1] = made[1] | {"Positive": "...", "Negative": "n1"}
    refused(lambda: rows(save(folder / "t.json", made)), "row 1", "'...' holds no word")
    refused(lambda: rows(folder), "captions.json: no such file", "classify")


def test_names_of_a_folder_that_was_packed_on_a_mac(folder):
    for k, (here, there) in enumerate([("NFC", "NFD"), ("NFD", "NFC")]):
        name = f"forêt {k}.png"
        (folder / "images").mkdir(exist_ok=True)
        picture(folder / "images" / unicodedata.normalize(there, name), k)
        save(folder / "c.json", [{"image": unicodedata.normalize(here, name), "caption": "a wood"}])
        (scene,) = read_scenes(folder / "c.json").scenes
        assert scene.image == str(folder / "images" / unicodedata.normalize(there, name))


def test_captions_by_image_and_in_numbered_columns(folder):
    want = [("a0.png", ["one", "two"], "train"), ("a1.png", ["three"], "test")]

    def read(name, content):
        return [(scene.name, scene.texts, scene.split) for scene in read_scenes(save(folder / name, content)).scenes]

    assert read("by.json", {"a0.png": ["one", "two"], "a1.png": "three"}) == [(*row[:2], None) for row in want]
    whole = {
        "a0.png": {"captions": ["one", "two"], "split": "train"},
        "a1.png": {"captions": ["three"], "split": "test"},
    }
    assert read("by.json", whole) == want
    rows = [
        {"image": name, "caption_1": texts[0], "caption_2": texts[-1] if len(texts) > 1 else None, "split": split}
        for name, texts, split in want
    ]
    assert read("rows.json", rows) == want
    table = "filename,Caption,Caption2,Caption3,split\na0.png,one,two,,train\na1.png,,three, ,test\n"
    (folder / "rows.csv").write_text(table)
    assert [(scene.name, scene.texts, scene.split) for scene in read_scenes(folder / "rows.csv").scenes] == want
    # One column with a number beside no other is a column like any.
    refused(lambda: read("rows.json", [{"image": "a0.png", "text_2": "one"}]), "its first row has ['image', 'text_2']")
    beside = {"image": "a0.png", "text": "a harbour", "caption_1": "a note"}
    assert read("rows.json", [beside]) == [("a0.png", ["a harbour"], None)]
    rows[1] |= {"caption_1": "", "caption_2": "."}
    refused(lambda: read("rows.json", rows), "row 1", "none of them holds a word")
    alone = {"image": "a1.png", "caption": "three", "split": "test"}  # beside rows of several
    assert read("rows.json", [rows[0], alone]) == want
    assert read("rows.json", [alone, rows[0]]) == want[::-1]
    assert read("rows.json", [rows[0], alone | {"caption": ["three", " "]}]) == want
    refused(lambda: read("by.json", {"a0.png": [3], "a1.png": ["x"]}), "row 0", "expected a text, found int")
    refused(lambda: read("by.json", {"a0.png": ["x"], "classes": ["x"]}), "its top level is dict")


@pytest.mark.parametrize("folders", [True, False, "NWPU_images"])
def test_nwpu_captions_form(folder, folders):
    root = folder / (folders if isinstance(folders, str) else "")
    content: dict = {"airport": [], "sea ice": []}
    for i, label in enumerate(["airport", "airport", "sea ice"]):
        name = f"{label}_{i}.jpg"
        (root / label).mkdir(exist_ok=True, parents=True)
        picture((root / label if folders else root) / name, i)
        texts = {"raw": f"one {i}", **{f"raw_{n}": f"text {n} of {i}" for n in range(1, 5)}}
        content[label].append(
            {"filename": name, "imgid": i, "sentids": [1, 2], "split": ["train", "val", "test"][i], **texts}
        )
    splits = load_splits(DataConfig(train_file=str(save(folder / "dataset_nwpu.json", content))))
    assert [len(splits[name]) for name in ("train", "val", "test")] == [1, 1, 1]
    (scene,) = splits["test"]
    assert scene.label == "sea ice" and scene.texts == ["one 2", *(f"text {n} of 2" for n in range(1, 5))]
    assert scene.name == ("sea ice/sea ice_2.jpg" if folders else "sea ice_2.jpg")
    content["airport"][1] = {"imgid": 1}
    refused(lambda: read_scenes(save(folder / "dataset_nwpu.json", content)), "row 1", "'filename' is missing")


def test_scene_form_with_chinese_answer(folder):
    rows = [{"image": "a0.png", "captions": ["x", "y", "x"], "zh_answer": "农田"}]
    read = read_scenes(save(folder / "s.jsonl", "\n".join(json.dumps(row) for row in rows)))
    assert read.scenes[0].texts == ["x", "y", "农田"] and read.duplicates == 1
    assert read.scenes[0].listed == ["x", "y", "x", "农田"], "a repeat within an entry counts among the references"
    refused(lambda: read_scenes(save(folder / "s.json", [{"image": "a0.png", "captions": ["...", ""]}])), "'captions'")
    refused(lambda: read_scenes(save(folder / "s.json", [{"image": "a0.png", "captions": ["x", 1]}])), "'captions'")


def test_a_sentence_without_a_word_costs_no_image(folder, capsys):
    rows = [{"filename": f"a{i}.png", "sentences": [{"raw": "a farm"}, {"raw": text}, {"raw": "a farm"}]}
            for i, text in enumerate(["", "...", "a field"])]  # fmt: skip
    path = save(folder / "k.json", {"images": rows})
    read = read_scenes(path)
    assert [scene.texts for scene in read.scenes] == [["a farm"], ["a farm"], ["a farm", "a field"]]
    assert [scene.listed.count("a farm") for scene in read.scenes] == [2, 2, 2]
    assert not read.rejected and [bad.row for bad in read.left_out] == [0, 1]
    answers = captions_as_answers(read.scenes, "Describe.", "描述。")
    assert [(q.answer, q.times) for q in answers[2].questions] == [("a farm", 2), ("a field", 1)]
    report = folder / "rejected.jsonl"
    load_splits(DataConfig(train_file=str(path)), report=report)
    assert "texts without a word left out of 2 rows" in capsys.readouterr().out
    assert len(report.read_text().splitlines()) == 2
    rows = [{"image": "a0.png", "caption": t} for t in ("a farm", "...")] + [{"image": "a1.png", "caption": "!"}]
    read = read_scenes(save(folder / "c.json", rows))
    assert [scene.texts for scene in read.scenes] == [["a farm"]] and not read.rejected
    assert [bad.row for bad in read.left_out] == [1, 2], "an image is not dropped without a word about it"


def test_images_below_links_are_found_and_a_closed_folder_is_said(folder, monkeypatch):
    (folder / "real").mkdir()
    picture(folder / "real" / "c.png", 5)
    (folder / "library").mkdir()
    (folder / "library" / "2020").symlink_to(folder / "real")
    (folder / "library" / "up").symlink_to(folder / "library")
    (folder / "library" / "x.png").mkdir()
    found = image_files(folder / "library")
    assert found == [folder / "library" / "2020" / "c.png"]
    picture(folder / "real" / "d.png", 6)
    (folder / "a_link").symlink_to(folder / "real")  # of two names of a folder its own is the one that rows have
    assert {path.parent.name for path in image_files(folder) if path.name in ("c.png", "d.png")} == {"real"}
    (folder / "library" / "nas").symlink_to(folder / "not mounted")
    refused(lambda: image_files(folder / "library"), "nas: the link leads nowhere", "not mounted")
    (folder / "library" / "nas").unlink()

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", closed)
    refused(lambda: image_files(folder), "cannot be read: Permission denied")


def test_language_filter(folder):
    path = save(folder / "s.json", [{"image": "a0.png", "captions": ["a farm"], "zh_answer": "一片农田"}])
    assert read_scenes(path, language="en").scenes[0].texts == ["a farm"]
    assert read_scenes(path, language="zh").scenes[0].texts == ["一片农田"]
    assert read_scenes(path, language="all").scenes[0].texts == ["a farm", "一片农田"]
    refused(lambda: read_scenes(save(path, captions(2)), language="zh"), "no usable row", "--language zh")


def test_image_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = save(elsewhere / "c.json", captions(3))
    refused(lambda: read_scenes(path), "--image_root")
    assert len(read_scenes(path, image_root=str(folder)).scenes) == 3


def test_captions_of_a_table(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "pairs.csv").write_text('filepath,title\na.png,"a farm, and a road"\nb.png,a lake\n')
    (tmp_path / "pairs.tsv").write_text(
        "image\tcaption\tsplit\na.png\ta farm, and a road\ttest\nb.png\ta lake\ttrain\n"
    )
    for name in ("pairs.csv", "pairs.tsv"):
        scenes = read_scenes(tmp_path / name).scenes
        assert [(Path(scene.image).name, scene.texts) for scene in scenes] == [
            ("a.png", ["a farm, and a road"]), ("b.png", ["a lake"])
        ]  # fmt: skip
    assert [scene.split for scene in scenes] == ["test", "train"]
    (tmp_path / "pairs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        InputError, match=r"expected rows of an image.*filepath.* and its text.*title.*its first row has"
    ):
        read_scenes(tmp_path / "pairs.csv")


OTHER_NAMES = {
    "metadata.jsonl": lambda image, text: {"file_name": image, "text": text},
    "lists.json": lambda image, text: {"filename": image, "sentences": [text]},
    "raw.json": lambda image, text: {"filename": image, "sentences": [{"raw": text}]},
    "rsicap.json": lambda image, text: {"filename": image, "text_output": text},
    "vrsbench.json": lambda image, text: {"image_id": image, "question": "Describe it.", "ground_truth": text},
    "table.csv": lambda image, text: {"Image": image, "Caption": text},
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_captions_under_other_names(tmp_path, name):
    rows = [OTHER_NAMES[name](*pair) for pair in (("a.png", "a farm"), ("b.png", "a lake"))]
    content = {"annotations": rows} if name == "rsicap.json" else rows
    if name.endswith(".csv"):
        text = "Image,Caption\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(content)
    (tmp_path / name).write_text(text)
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    scenes = read_scenes(tmp_path / name).scenes
    assert [(Path(scene.image).name, scene.texts, scene.split) for scene in scenes] == [
        ("a.png", ["a farm"], None), ("b.png", ["a lake"], None)
    ]  # fmt: skip


def test_images_in_a_folder_below(tmp_path):
    for folder in ("RSICD_images", "val2017"):
        (tmp_path / folder).mkdir()
    picture(tmp_path / "RSICD_images" / "a.png")
    picture(tmp_path / "val2017" / "b.png")
    (tmp_path / "dataset.json").write_text(json.dumps([{"image": name, "caption": "x"} for name in ("a.png", "b.png")]))
    found = read_scenes(tmp_path / "dataset.json").scenes
    assert [Path(scene.image).parent.name for scene in found] == ["RSICD_images", "val2017"]
    picture(tmp_path / "val2017" / "a.png")
    with pytest.raises(InputError, match=r"may be .*RSICD_images/a\.png or .*val2017/a\.png: set --image_root"):
        read_scenes(tmp_path / "dataset.json")
    both = os.pathsep.join(str(tmp_path / name) for name in ("val2017", "RSICD_images"))
    found = read_scenes(tmp_path / "dataset.json", image_root=both).scenes
    assert {Path(scene.image).parent.name for scene in found} == {"val2017"}


def test_images_named_by_their_whole_path_may_have_moved(tmp_path):
    """As csv2json.py names them; they are looked for below --image_root alone, never beside a file that names others."""
    new = tmp_path / "new"
    for folder in ("a", "b"):
        (new / folder).mkdir(parents=True)
    for name in ("a/0.tif", "b/0.tif", "1.tif"):
        picture(new / name, len(name))
    picture(tmp_path / "2.tif")
    old = ["/old/set/a/0.tif", "/old/set/b/0.tif", "\\old\\set\\1.tif", "/old/set/2.tif"]
    rows = [{"image": name, "question": "is it?", "answer": "yes", "caption": "a farm"} for name in old]
    path = save(tmp_path / "rows.json", rows)
    for read in (read_scenes, read_conversations):
        found = read(path, image_root=str(new), max_rejected=1)
        assert [scene.image for scene in found.scenes] == [str(new / name) for name in ("a/0.tif", "b/0.tif", "1.tif")]
        refused(lambda read=read: read(path), "/old/set/2.tif", "set --image_root")
        one = read(path, image_root=str(new / "a"), max_rejected=1)  # folders of the same names
        assert [scene.image for scene in one.scenes] == [str(new / "a" / "0.tif")] and len(one.rejected) == 3
        two = read(path, image_root=os.pathsep.join([str(new / "a"), str(new / "b")]), max_rejected=1)
        assert [scene.image for scene in two.scenes] == [str(new / "a" / "0.tif"), str(new / "b" / "0.tif")]
    windows = save(tmp_path / "windows.json", [{"image": "D:\\set\\1.tif", "caption": "a farm"}])
    assert read_scenes(windows, image_root=str(new)).scenes[0].image == str(new / "1.tif")
    named = save(tmp_path / "named.json", [{"image": "new/1.tif", "caption": "a farm"}])
    assert read_scenes(named, image_root=str(new)).scenes[0].image == str(new / "1.tif")


def test_windows_paths(tmp_path):
    (tmp_path / "images").mkdir()
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "rows.json").write_text(
        json.dumps([{"image": "images\\a.png", "caption": "a farm", "question": "Q?", "answer": "a"}])
    )
    for read in (read_scenes, read_conversations):
        assert Path(read(tmp_path / "rows.json").scenes[0].image).name == "a.png"


def test_splits_by_other_names(tmp_path):
    names = ["Train", "validation", "TEST", "test_phili"]
    for n in range(len(names)):
        picture(tmp_path / f"{n}.png")
    table = "filename,caption,Split\n" + "".join(f"{n}.png,farm {n},{name}\n" for n, name in enumerate(names))
    (tmp_path / "a.csv").write_text(table)
    found = read_scenes(tmp_path / "a.csv").scenes
    assert [scene.split for scene in found] == ["train", "val", "test", "test_phili"]
    (tmp_path / "a.csv").write_text(table.replace("validation", " "))
    with pytest.raises(InputError, match="column 'Split' is filled in 3 of 4 rows"):
        read_scenes(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('image,caption\na.png,"an open quote\nb.png,a lake\n', "line 3: not a whole CSV, is a quote open"),
        ("image,caption\na.png,a lake\nb.png,two ships, one large\n", "line 3: 3 fields, expected 2 .*needs quotes"),
        ("image,caption,split\na.png,a lake\n", "line 2: 2 fields, expected 3"),
        ("image;caption\na.png;a lake\n", "parted by semicolons"),
    ],
)
def test_tables_that_are_not_whole(tmp_path, text, message):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_scenes(tmp_path / "a.csv")


def test_lists_of_captions_in_a_table(tmp_path):
    """As pandas writes a column of lists, or of numpy's arrays; an empty cell at the end of a line is none."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    cells = ["['Many planes .'\n 'It\\'s a farm, \"big\" .']", "[\"It's a lake .\", 'Blue .']"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["filename", "captions"], ["a.png", cells[0], ""], ["b.png", cells[1]]])
    assert [scene.texts for scene in read_scenes(tmp_path / "a.csv").scenes] == [
        ["Many planes .", "It's a farm, \"big\" ."], ["It's a lake .", "Blue ."]
    ]  # fmt: skip


def test_files_of_another_kind_name_the_way(tmp_path):
    for name, words in (("a.xlsx", "export it as CSV"), ("a.parquet", "hub2data.py")):
        (tmp_path / name).write_bytes(b"PK\x03\x04\xff\xfe")
        with pytest.raises(InputError, match=words):
            read_scenes(tmp_path / name)
    (tmp_path / "q.json").write_text(
        json.dumps({"questions": [{"id": 0, "img_id": 0, "question": "Q?", "answers_ids": [0]}]})
    )
    with pytest.raises(InputError, match=r"run data2csv\.py and csv2json\.py"):
        read_conversations(tmp_path / "q.json")
    (tmp_path / "a.NDJSON").write_text('{"a": 1}\n{"a": 2}\n')
    assert load_json(tmp_path / "a.NDJSON") == [{"a": 1}, {"a": 2}]


def test_among_given_images_takes_no_namesake(tmp_path):
    for n, folder in enumerate(("s0", "s1")):
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "a.png", seed=n)
    rows = [{"image": f"{folder}/a.png", "caption": f"of {folder}"} for folder in ("s0", "s1")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (scene,) = read_scenes(tmp_path / "rows.json", among=[str(tmp_path / "s0/a.png")]).scenes
    assert scene.texts == ["of s0"]  # s1/a.png is another picture
    (tmp_path / "apart").mkdir()
    shutil.copy(tmp_path / "s1/a.png", tmp_path / "apart")
    (scene,) = read_scenes(tmp_path / "rows.json", among=[str(tmp_path / "apart/a.png")]).scenes
    assert scene.texts == ["of s1"]  # a copy of s1's picture, not of s0's
    (tmp_path / "rows.json").rename(tmp_path / "apart/rows.json")  # now neither is found by its path
    with pytest.raises(InputError, match=r"both end in a\.png"):
        read_scenes(tmp_path / "apart/rows.json", among=[str(tmp_path / "s0/a.png")])


# ----------------------------------------------------------------------------------------------------
# Questions


def test_questions_of_vrsbench(tmp_path):
    picture(tmp_path / "a.png")
    row = {
        "image_id": "a.png",
        "question": "How many?",
        "ground_truth": "2",
        "type": "object quantity",
        "question_id": 7,
    }
    (tmp_path / "eval.json").write_text(json.dumps([row]))
    for read in (read_conversations, read_chat):
        found = read(tmp_path / "eval.json").scenes[0].questions[0]
        assert (found.text, found.answer, found.kind) == ("How many?", "2", "object quantity")
    with pytest.raises(InputError, match=r"questions and conversations are for train_vqa\.py"):
        read_scenes(tmp_path / "eval.json")  # "2" is no caption
    (tmp_path / "eval.json").write_text(json.dumps([{"image": "a.png", "ques": "How many?"}]))
    with pytest.raises(
        InputError, match=r"nor a question.*the row has image, ques.*make rows of image, question, answer"
    ):
        read_conversations(tmp_path / "eval.json")


ONE_QUESTION = {
    "plain.json": [{"image": "a.png", "question": "How many?", "answer": "2", "type": "count", "split": "test"}],
    "plain.jsonl": [{"image_path": "a.png", "question": "How many?", "answer": 2.0, "type": "count", "split": "test"}],
    "plain.csv": "image_path,question,answer,type,split\na.png,How many?,2,count,test\n",
    "earthvqa.json": {
        "b.png": [],
        "a.png": [{"Type": "count", "Question": "How many?", "Answer": "2", "split": "test"}],
    },
    "floodnet.json": {
        "0": {
            "Image_ID": "a.png",
            "Question": "How many?",
            "Ground_Truth": 2,
            "Question_Type": "count",
            "split": "test",
        }
    },
}


@pytest.mark.parametrize("name", ONE_QUESTION)
def test_rows_of_one_question(tmp_path, name):
    picture(tmp_path / "a.png")
    content = ONE_QUESTION[name]
    (tmp_path / name).write_text(content if name.endswith(".csv") else json.dumps(content))
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    for read in (read_conversations, read_chat):
        (scene,) = read(tmp_path / name).scenes
        found = scene.questions[0]
        assert (found.text, found.answer, found.kind, scene.split) == ("How many?", "2", "count", "test")


def test_a_split_is_given_to_all_images_or_to_none(folder):
    rows = captions(4, split="train") + captions(2, 4, split="test") + captions(1, 6)
    save(folder / "c.json", rows)
    refused(lambda: load_splits(DataConfig(train_file=str(folder / "c.json"))), "1 of 7 images have no split", "a6.png")


def test_pictures_lie_in_a_folder_of_the_name_of_the_file(tmp_path):
    """EarthVQA as it is unpacked: Train.json beside Train/images_png and Train/masks_png."""
    for folder in ("Train/images_png", "Train/masks_png", "Val/images_png"):
        (tmp_path / folder).mkdir(parents=True)
        picture(tmp_path / folder / "0.png")
    save(tmp_path / "Train.json", {"0.png": [{"Type": "count", "Question": "How many?", "Answer": "2"}]})
    (scene,) = read_conversations(tmp_path / "Train.json").scenes
    assert scene.image == str(tmp_path / "Train/images_png/0.png")
    rows = [{"image": "0.png", "question": "How many?", "answer": "2"}]
    save(tmp_path / "Train.json", {"data": rows})  # what stands under one word is no image of that name
    assert [s.image for s in read_conversations(tmp_path / "Train.json").scenes] == [scene.image]


def test_answers_that_are_not_to_be_learnt(tmp_path):
    picture(tmp_path / "a.png")
    said = [("Where?", "at sea", False), ("What?", "a ship", None), ("Why?", "it sails", True)]
    turns = []
    for question, answer, loss in said:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer} | ({} if loss is None else {"loss": loss}))
    (scene,) = read_conversations(save(tmp_path / "q.json", [{"messages": turns, "images": ["a.png"]}])).scenes
    assert [(q.answer, len(q.history)) for q in scene.questions] == [("a ship", 1), ("it sails", 2)]
    none = [{"messages": turns[:2], "images": ["a.png"]}]
    refused(lambda: read_conversations(save(tmp_path / "q.json", none)), "row 0", "no answer in it is to be learnt")


def test_marks_in_answers_and_boxes_that_are_not_filled_in(tmp_path):
    picture(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Where?", "answer": "at <|box_start|>(1,2),(3,4)<|box_end|>"}
    turns = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": row["answer"]}]
    save(tmp_path / "q.json", [row, {"messages": turns, "images": ["a.png"]}])
    (scene,) = read_conversations(tmp_path / "q.json").scenes
    assert [question.answer for question in scene.questions] == ["at (1,2),(3,4)"]
    turns[1]["content"] = "<bbox>"
    boxes = {"messages": turns, "images": ["a.png"], "objects": {"ref": ["ship"], "bbox": [[1, 2, 3, 4]]}}
    save(tmp_path / "q.json", [boxes])
    with pytest.raises(InputError, match="field 'objects': <bbox> and <ref-object> are not filled in"):
        read_conversations(tmp_path / "q.json")
    save(tmp_path / "q.json", [row | {"answer": "<|box_end|>"}])
    with pytest.raises(InputError, match="field 'answer' is empty"):
        read_conversations(tmp_path / "q.json")


# ----------------------------------------------------------------------------------------------------
# Splits


def test_copies_of_a_picture_are_held_out_together(folder):
    for i in range(10):
        shutil.copy(folder / f"a{i}.png", folder / f"b{i}.png")
    rows = [{"image": f"{name}{i}.png", "caption": "x"} for name in "ab" for i in range(10)]
    path = save(folder / "c.json", rows)
    for seed in range(5):
        splits = load_splits(DataConfig(train_file=str(path), val_fraction=0.3), seed)
        assert (
            len(splits["val"]) == 6
            and len(splits["train"]) == 14
            and not find_leaks(splits, by_content(images_of(splits)))
        )


def test_a_second_test_split_is_said_and_can_be_chosen(folder, capsys):
    rows = [{"image": f"a{i}.png", "caption": "x", "split": split}
            for i, split in enumerate(["train", "train", "val", "test", "test_phili", "test_phili"])]  # fmt: skip
    path = str(save(folder / "c.json", rows))
    splits = load_splits(DataConfig(train_file=path))
    assert len(splits["test"]) == 1 and "2 of test_phili); --test_split test_phili" in capsys.readouterr().out
    for files in ({}, {"test_file": path}):
        splits = load_splits(DataConfig(train_file=path, test_split="test_phili", **files))
        assert [scene.split for scene in splits["test"]] == ["test_phili"] * 2 and len(splits["train"]) == 2
        with pytest.raises(InputError, match=r"--test_split test_x: .* expected test or test_phili"):
            load_splits(DataConfig(train_file=path, test_split="test_x", **files))
    others = str(save(folder / "d.json", [row for row in rows if row["split"] == "test_phili"]))
    refused(
        lambda: load_splits(DataConfig(train_file=path, test_file=others)), "--test_split test", "expected test_phili"
    )


def test_held_out_images_share_no_image(folder):
    rows = [{"image": f"a{i}.png", "caption": f"text {i} {k}"} for k in range(3) for i in range(10)]
    config = DataConfig(train_file=str(save(folder / "c.json", rows)), val_fraction=0.3)
    splits = load_splits(config, seed=1)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [7, 3, 0]
    assert not {s.image for s in splits["train"]} & {s.image for s in splits["val"]}
    assert all(len(s.rows) == 3 for name in splits for s in splits[name])
    assert splits == load_splits(config, seed=1) and splits != load_splits(config, seed=2)


def test_own_splits_and_named_files(folder):
    rows = captions(4, split="train") + captions(2, 4, split="val") + captions(2, 6, split="test")
    path = save(folder / "c.json", rows)
    splits = load_splits(DataConfig(train_file=str(path)))
    assert [len(splits[name]) for name in ("train", "val", "test")] == [4, 2, 2]
    other = save(folder / "v.json", captions(2, 8))
    splits = load_splits(DataConfig(train_file=str(path), val_file=str(other)))
    assert [Path(s.image).name for s in splits["val"]] == ["a8.png", "a9.png"]
    bad = save(folder / "w.json", captions(2, split="holdout"))
    refused(lambda: load_splits(DataConfig(train_file=str(bad))), "'holdout'", "train, val or test")
    mixed = save(folder / "m.json", [*captions(1, split="train"), *captions(1, split="val")])
    refused(lambda: load_splits(DataConfig(train_file=str(mixed))), "row 1", "'val'", "'train'")
    refused(lambda: load_splits(DataConfig()), "--train_file")


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val"), ("val", "test")])
def test_same_image_under_another_name_is_refused(folder, splits, capsys):
    shutil.copy(folder / "a0.png", folder / "other name.png")
    (folder / "a1.png").write_bytes((folder / "a2.png").read_bytes()[:-1] + b"x")  # as long as a2, not the same
    first, second = splits
    rest = next(name for name in ("train", "val", "test") if name not in splits)
    rows = [
        {"image": "a0.png", "caption": "x", "split": first},
        {"image": "other name.png", "caption": "y", "split": second},
        {"image": "a3.png", "caption": "z", "split": rest},
        {"image": "a4.png", "caption": "z", "split": "train"},
    ]
    path = save(folder / "c.json", rows)
    refused(lambda: load_splits(DataConfig(train_file=str(path))), "a0.png", "other name.png", second, "--allow_leak")
    kept = load_splits(DataConfig(train_file=str(path), allow_leak=True))
    assert sum(map(len, kept.values())) == 4 and "warning: 1 images" in capsys.readouterr().out
    splits = {"train": [Scene(str(folder / "a1.png"))], "val": [Scene(str(folder / "a2.png"))]}
    assert not find_leaks(splits, by_content(images_of(splits)))


def test_few_bad_rows_are_listed_and_the_run_goes_on(folder, capsys):
    path = save(folder / "c.json", [*captions(10), *captions(9), {"image": "gone.png", "caption": "x"}])
    report = folder / "run" / "rejected.jsonl"
    refused(lambda: load_splits(DataConfig(train_file=str(path)), report=report), "1 of 20 rows", "--max_rejected 0.01")
    load_splits(DataConfig(train_file=str(path), max_rejected=0.05), report=report)
    (listed,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert listed["file"] == str(path) and listed["row"] == 19 and "gone.png" in listed["reason"]
    out = capsys.readouterr().out
    assert "1 bad rows left out" in out and "9 duplicate rows dropped" in out


def test_max_samples(folder):
    path = save(folder / "c.json", captions(10))
    splits = load_splits(DataConfig(train_file=str(path), val_fraction=0.5, max_samples=2))
    assert [len(splits[name]) for name in ("train", "val", "test")] == [2, 2, 0]


@pytest.mark.skipif(not UCM.is_dir(), reason="the real UCM captions are not at ../shared/data/ucm_captions")
def test_real_ucm_captions(monkeypatch):
    splits = load_splits(DataConfig(train_file=str(UCM / "ucm_captions.jsonl")))
    assert {name: len(scenes) for name, scenes in splits.items()} == {"train": 1680, "val": 210, "test": 210}
    scenes = [scene for part in splits.values() for scene in part]
    assert len({scene.image for scene in scenes}) == 2100
    english = load_splits(DataConfig(train_file=str(UCM / "ucm_captions.jsonl"), language="en"))
    texts = [text for part in english.values() for scene in part for text in scene.texts]
    assert texts and not any(is_chinese(text) for text in texts) and len(texts) > 2100


@pytest.mark.parametrize("read", [read_scenes, read_conversations])
@pytest.mark.parametrize("value", [0, 1, ["train"]])
def test_a_split_that_is_no_text(folder, read, value):
    rows = [{"image": f"a{i}.png", "caption": "x", "question": "a?", "answer": "b", "split": "train"} for i in range(4)]
    rows[1]["split"] = value
    refused(lambda: read(save(folder / "rows.json", rows)), "row 1", "field 'split': expected a text")


def test_coco_annotations_of_no_image(folder, capsys):
    images = [{"id": 1, "file_name": "a0.png"}, {"file_name": "a1.png"}]
    said = [{"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "two"}, {"caption": "three"}, None]
    found = read_scenes(save(folder / "coco.json", {"images": images, "annotations": said}), max_rejected=0.5)
    assert [scene.texts for scene in found.scenes] == [["one"]] and [bad.row for bad in found.rejected] == [1]
    assert [(left.row, left.reason) for left in found.left_out] == [(row, NO_IMAGE) for row in (1, 2, 3)]
    again = save(folder / "again.json", {"images": [images[0], images[0]], "annotations": said[:1]})
    assert [scene.texts for scene in read_scenes(again).scenes] == [["one"]]
    parted = [images[0] | {"split": "train"}, images[0] | {"split": "test"}]
    parted = save(folder / "parted.json", {"images": parted, "annotations": said[:1]})
    refused(lambda: read_scenes(parted), "id 1 stands for 2 images")
    images[1]["id"] = 1
    twice = save(folder / "twice.json", {"images": images, "annotations": said})
    refused(lambda: read_scenes(twice), "field 'images': id 1 stands for 2 images")
    alone = [{"id": n, "file_name": f"a{n}.png"} for n in range(4)]
    coco = {"images": alone, "annotations": [{"image_id": n, "caption": f"{n} ships"} for n in (0, 1, 2, 3, 9)]}
    load_splits(DataConfig(train_file=str(save(folder / "other.json", coco)), val_fraction=0.5))
    assert "texts of images that are not in the file left out of 1 rows" in capsys.readouterr().out


def test_every_text_of_a_row_is_read(folder):
    rows = [
        {"image": "a0.png", "caption": "two ships", "zh_answer": "两艘船"},
        {"image": "a1.png", "captions": ["x one", "y two"], "caption_1": "three", "caption_2": "...", "caption_3": ""},
    ]
    found = read_scenes(save(folder / "rows.json", rows[:1]))
    assert found.scenes[0].texts == ["two ships", "两艘船"]
    found = read_scenes(save(folder / "rows.json", rows[1:]))
    assert found.scenes[0].texts == ["x one", "y two", "three"] and len(found.left_out) == 1
    row = {"image": "a0.png", "question": "What is it?", "answer": "a pier", "caption": "two ships"}
    assert [(q.text, q.answer) for q in read_chat(save(folder / "rows.json", [row])).scenes[0].questions] == [
        ("What is it?", "a pier")
    ]


@pytest.mark.parametrize("text", ['[{"image": "a0.png", "caption": "x", "id": ' + "1" * 5000 + "}]", "[" * 10**5])
def test_json_that_python_does_not_read(folder, text):
    for name in ("rows.json", "rows.jsonl"):
        (folder / name).write_text(text)
        refused(lambda name=name: read_scenes(folder / name), name, "not JSON")


@pytest.mark.parametrize("read", [read_scenes, read_conversations])
def test_an_image_that_is_written_into_its_row(folder, read):
    """Inline base64 is no path: the row is bad, not the run, and the message is short."""
    rows = [{"image": f"a{i}.png", "caption": "x", "question": "a?", "answer": "b"} for i in range(4)]
    rows[1]["image"] = "A" * 5000
    found = read(save(folder / "rows.json", rows), max_rejected=0.5)
    assert len(found.scenes) == 3 and len(found.rejected[0].reason) < 400


@pytest.mark.parametrize("heading", ["caption 2", "caption-2", "caption_2", "caption2"])
def test_headings_of_spreadsheets_are_numbered_columns(folder, heading):
    picture(folder / "a.png")
    (folder / "c.csv").write_text(f"image,caption,{heading}\na.png,a ship,two ships\n")
    assert read_scenes(folder / "c.csv").scenes[0].texts == ["a ship", "two ships"]


def test_numbered_texts_are_questions(folder):
    """LLaVA's question files and GeoChat-Bench's; an answer file of LLaVA has a prompt and a text."""
    picture(folder / "a.png")
    row = {"question_id": 1, "image": "a.png", "text": "Is there water?", "category": "presence", "ground_truth": "yes"}
    path = save(folder / "bench.jsonl", row)
    for read in (read_chat, read_conversations):
        (question,) = read(path).scenes[0].questions
        assert (question.text, question.answer, question.kind) == ("Is there water?", "yes", "presence")
    with pytest.raises(InputError, match=r"questions and conversations are for train_vqa\.py"):
        read_scenes(path)
    classed = {"question_id": 1, "image": "a.png", "text": "a ship", "label": "harbour"}
    assert read_scenes(save(folder / "classed.jsonl", classed)).scenes[0].texts == ["a ship"]
    answers = save(
        folder / "answers.jsonl", {"question_id": 1, "image": "a.png", "prompt": "Describe it.", "text": "a ship"}
    )
    assert read_scenes(answers).scenes[0].texts == ["a ship"]


def test_empty_rows_as_a_spreadsheet_writes_them(folder):
    picture(folder / "a.png")
    (folder / "t.csv").write_text("image,caption\na.png,a ship\n,\n , \n\n")
    assert read_scenes(folder / "t.csv").scenes[0].texts == ["a ship"]


def test_a_letter_of_several_choices_is_no_answer(folder):
    picture(folder / "a.png")
    row = {"image": "a.png", "question": "What?", "options": ["A. ship", "B. car"], "answer": "A"}
    with pytest.raises(InputError, match=r"the answer 'A' names one of several choices.*write them into the question"):
        read_conversations(save(folder / "q.json", [row]))
    with pytest.raises(InputError, match="names one of several choices"):
        read_conversations(save(folder / "q.json", [row | {"answer": 1}]))
    for names in (("A", "B"), ("option_a", "option_b"), ("Choice1", "Choice2")):
        with pytest.raises(InputError, match="names one of several choices"):
            one = {key: row[key] for key in ("image", "question", "answer")} | dict(zip(names, ("ship", "car")))
            read_conversations(save(folder / "q.json", [one]))
    written = {"question": "What? A. ship B. car"}
    bands, none = {"r": 100, "g": 90, "b": 80}, {"A": None, "B": None, "option_c": None}
    for more in (
        {"answer": "ship"}, written, {"options": ["A", "B", "H"]}, {"options": ["2", "3"], "answer": 3},
        {"options": None, "answer": "2"} | bands, {"options": None, "answer": "2"} | none,
    ):  # fmt: skip
        assert len(read_conversations(save(folder / "q.json", [row | more])).scenes[0].questions) == 1


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_images_among_the_parts_of_a_turn(folder, key):
    picture(folder / "a.png")
    turn = [{"type": "image", key: "a.png"}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": turn}, {"role": "assistant", "content": "a ship"}]}
    assert read_conversations(save(folder / "q.json", [row])).scenes[0].questions[0].text == "What?"


def test_a_bare_list_of_karpathys_entries(folder):
    (folder / "UCM").mkdir()
    picture(folder / "UCM" / "a.png")
    entry = {"filepath": "UCM", "filename": "a.png", "sentences": [{"raw": "a ship"}], "split": "train"}
    assert read_scenes(save(folder / "c.json", [entry])).scenes[0].texts == ["a ship"]
    named = {"filename": "a0.png", "sentences": ["a car"]}  # other lists with these fields
    for more in ({"image": "UCM/a.png"}, {"filepath": "UCM/a.png"}):
        (scene,) = read_scenes(save(folder / "d.json", [named | more])).scenes
        assert scene.image.endswith("UCM/a.png")
    with pytest.raises(InputError, match="what changed between two images"):
        read_scenes(save(folder / "cc.json", {"images": [entry | {"changeflag": 1}]}))
    asked = {"questions": [{"question_id": 1, "image_id": 2, "question": "What?"}]}
    with pytest.raises(InputError, match="join them with the answers by question_id"):
        read_conversations(save(folder / "q.json", asked))


def test_files_that_differ_behind_64_kb_are_two(tmp_path):
    for name, end in (("a", b"1"), ("b", b"2")):
        (tmp_path / name).write_bytes(bytes(1 << 17) + end)
    assert len(set(by_content([str(tmp_path / "a"), str(tmp_path / "b")]).values())) == 2


def test_a_caption_of_two_rows_counts_once(folder):
    rows = [{"image": "a0.png", "caption": "a ship"}] * 2
    assert read_scenes(save(folder / "c.json", rows)).scenes[0].listed == ["a ship"]
