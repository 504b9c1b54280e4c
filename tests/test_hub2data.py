import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from hub_server import Hub
from PIL import Image

import csv2json
import hub2data
from config import InputError
from library import read_attributes
from scenes import read_conversations, read_scenes
from tests.conftest import refused

ROOT = Path(__file__).parents[1]


def png(n: int, form: str = "PNG") -> bytes:
    """A picture of its own for each n."""
    made = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 256, (32, 32, 3), np.uint8)).save(made, form)
    return made.getvalue()


def write(folder: Path, split: str, columns: dict, kinds: dict | None = None) -> Path:
    """A parquet file in the layout that `push_to_hub` gives: images as {"bytes", "path"}."""
    rows = datasets.Dataset.from_dict(columns)
    for name, kind in ({"image": datasets.Image()} | (kinds or {})).items():
        rows = rows.cast_column(name, kind)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def image(n: int, path: str | None = None, form: str = "PNG") -> dict:
    return {"bytes": png(n, form), "path": path}


@pytest.fixture
def captions(tmp_path) -> Path:
    """Captions in the form of RSICD on the hub; the second training image is the second of the test split too."""
    folder = tmp_path / "rsicd"
    said = {"train": (0, 1, 2), "valid": (3,), "test": (4, 1)}
    for split, numbers in said.items():
        write(folder, split, {
            "filename": [f"rsicd_images/{split}_{n}.jpg" for n in numbers],
            "captions": [[f"ship {n} .", f"two  ships {n} ."] for n in numbers],
            "image": [image(n, form="JPEG") for n in numbers],
        })  # fmt: skip
    return folder


def test_captions(captions, tmp_path, capsys):
    out = tmp_path / "out"
    hub2data.main([str(captions), "--output", str(out)])
    found = read_scenes(out)
    assert not found.rejected and {Path(s.image).name: (s.split, s.texts) for s in found.scenes} == {
        "train_0.jpg": ("train", ["ship 0 .", "two ships 0 ."]),
        "train_1.jpg": ("test", ["ship 1 .", "two ships 1 ."]),  # held out, under the name it came with first
        "train_2.jpg": ("train", ["ship 2 .", "two ships 2 ."]),
        "valid_3.jpg": ("val", ["ship 3 .", "two ships 3 ."]),
        "test_4.jpg": ("test", ["ship 4 .", "two ships 4 ."]),
    }
    assert (out / "images/train_0.jpg").read_bytes() == png(0, "JPEG")  # not compressed again
    printed = capsys.readouterr().out
    assert "5 images (train 2, test 2, val 1)" in printed and "10 captions" in printed
    assert "left out: 1 rows" in printed and (out / "rejected.txt").read_text() == (
        "train_1.jpg: a row of split train: the image is in test too\n"
    )


def test_questions_an_image_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "vqa", "train", {
        "image": [image(0), image(0), image(1), {"bytes": b"no picture", "path": "bad.png"}],
        "question": ["Is there a road?", "How many ships?", "Is there a road?", "What?"],
        "answer": ["yes", "2", "no", "x"],
        "question_type": ["presence", "count", "presence", "presence"],
    })  # fmt: skip
    hub2data.main([str(source), "--output", "out"])
    assert sorted(os.listdir("out/images")) == ["train_000000.png", "train_000002.png"]
    assert "left out: 1 rows" in capsys.readouterr().out and "train, row 3" in Path("out/rejected.txt").read_text()
    csv2json.main(
        ["--csv", "out/rsvqa-dataset.csv", "--output", "out/data_vl.json", "--val_fraction=0", "--test_fraction=0"]
    )
    scenes = read_conversations("out/data_vl.json").scenes
    asked = {Path(s.image).name: [(q.text, q.answer, q.kind) for q in s.questions] for s in scenes}
    assert asked == {
        "train_000000.png": [("Is there a road?", "yes", "presence"), ("How many ships?", "2", "count")],
        "train_000002.png": [("Is there a road?", "no", "presence")],
    }


def test_questions_in_lists_and_several_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "vqa", "all", {"image": [image(0)], "q": [["a?", "b?"]], "a": [["1", "2"]]})
    hub2data.main([str(source), "--output", "lists", "--question", "q", "--answer", "a"])
    rows = Path("lists/rsvqa-dataset.csv").read_text().splitlines()
    assert rows[1:] == ["images/all_000000.png,a?,1,", "images/all_000000.png,b?,2,"]
    source = write(tmp_path / "many", "all", {"image": [image(0)], "question": ["c?"], "answers": [["x", "y", "y"]]})
    hub2data.main([str(source), "--output", "several"])
    assert Path("several/rsvqa-dataset.csv").read_text().splitlines()[1] == "images/all_000000.png,c?,y,"
    read = read_conversations("several/rsvqa-dataset.csv")  # as it is, from wherever
    assert [scene.image for scene in read.scenes] == ["several/images/all_000000.png"]


def test_answers_of_all_kinds(tmp_path):
    def made(name, asked, answers, feature=None, **more):
        columns = {"image": [image(n) for n in range(len(asked))], "question": asked, "answer": answers} | more
        hub2data.main(
            [str(write(tmp_path / name, "train", columns, feature)), "--output", str(tmp_path / f"{name}_out")]
        )
        rows = (tmp_path / f"{name}_out/rsvqa-dataset.csv").read_text().splitlines()[1:]
        return [row.split(",")[2] for row in rows]

    assert made("classes", ["a?"] * 3, [1, 0, 1], {"answer": datasets.ClassLabel(names=["no", "yes"])}) == [
        "yes",
        "no",
        "yes",
    ]
    assert made("counts", ["a?"] * 4, [0.0, 2.5, None, 1e6]) == ["0", "2.5", "1000000"]
    assert made("signs", ["a?"] * 2, [True, False]) == ["yes", "no"]
    assert made("people", ["a?"] * 2, [[3.0, 3.0, 2.0], [None, 1.0, 1.0]]) == ["3", "1"]
    assert made("gaps", ["a?", "b?", "", None], ["x", " ", "y", "z"]) == ["x"]
    told = (tmp_path / "gaps_out/rejected.txt").read_text()
    assert "row 1: no question with an answer" in told and told.count("nothing is asked") == 2
    assert len(os.listdir(tmp_path / "gaps_out/images")) == 1
    both = [[{"question": "a?", "answer": "x"}, {"question": "b?", "answer": "y"}], [{"q": 1}]]
    source = write(tmp_path / "both", "train", {"image": [image(0), image(1)], "qa_pairs": both})
    hub2data.main([str(source), "--output", str(tmp_path / "pairs"), "--question", "qa_pairs", "--answer", "qa_pairs"])
    rows = (tmp_path / "pairs/rsvqa-dataset.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1:3] for row in rows] == [["a?", "x"], ["b?", "y"]]


def test_types_of_questions(tmp_path):
    """A class, or one for each of a list of questions."""
    kinds = datasets.ClassLabel(names=["presence", "count"])
    for n, (question, answer, kind, feature) in enumerate(
        [("a?", "b", 1, kinds), (["a?", "b?"], ["c", "d"], [1, -1], datasets.List(kinds)),
         (["a?", "b?"], ["c", "d"], ["count", "presence"], None), ("a?", "b", 7, None)]
    ):  # fmt: skip
        columns = {"image": [image(0)], "question": [question], "answer": [answer], "type": [kind]}
        source = write(tmp_path / f"in{n}", "train", columns, {"type": feature} if feature else {})
        hub2data.main([str(source), "--output", str(tmp_path / f"out{n}")])
        (scene,) = read_conversations(tmp_path / f"out{n}/rsvqa-dataset.csv").scenes
        assert [q.kind or None for q in scene.questions] == [["count"], ["count", None], ["count", "presence"], ["7"]][
            n
        ]


def test_labels(tmp_path):
    source = write(
        tmp_path / "eurosat", "train", {"image": [image(0, "a/x.png"), image(1, "b/x.png")], "label": [1, 0]},
        {"label": datasets.ClassLabel(names=["River", "Sea Lake"])},
    )  # fmt: skip
    hub2data.main([str(source), "--output", str(tmp_path / "out")])
    names = sorted(os.listdir(tmp_path / "out/images"))
    assert names[0] == "x.png" and names[1].startswith("x_") and len(names) == 2  # two pictures of one name
    found = read_attributes(tmp_path / "out/labels.csv")
    assert found["x.png"] == {"label": "Sea Lake"} and found[names[1]]["label"] == "River"


def test_a_second_label_of_an_image_is_refused(tmp_path):
    columns = {
        "image": [image(0, "0.png"), image(0, "0.png"), image(1, "1.png")],
        "label": ["forest", "river", "urban"],
    }
    hub2data.main([str(write(tmp_path / "in", "train", columns)), "--output", str(tmp_path / "out")])
    assert read_attributes(tmp_path / "out/labels.csv")["0.png"]["label"] == "forest"
    assert (
        "row 1: 0.png has the label 'forest' already, and here 'river'" in (tmp_path / "out/rejected.txt").read_text()
    )


def test_several_labels_an_image_are_no_class(tmp_path):
    labels = [["Coniferous forest", "Pastures"], ["Pastures"]]
    folder = write(tmp_path / "ben", "train", {"image": [image(0), image(1)], "labels": labels})
    refused(
        lambda: hub2data.main([str(folder), "--output", str(tmp_path / "x")]), "column 'labels' holds several labels"
    )


def test_unlabelled_images_are_no_class(tmp_path):
    source = write(tmp_path / "in", "train", {"image": [image(0), image(1)], "label": [0, -1]},
                   {"label": datasets.ClassLabel(names=["River"])})  # fmt: skip
    hub2data.main([str(source), "--output", str(tmp_path / "out")])
    assert [row.get("label") for row in read_attributes(tmp_path / "out/labels.csv").values()].count("River") == 1
    assert "-1" not in (tmp_path / "out/labels.csv").read_text()


def test_splits_of_other_names_are_never_trained_on(tmp_path, capsys):
    """Several tests stay tests; what is none of train, val and test is left out and said."""
    for n, split in enumerate(("train", "validation", "testA", "test_phili", "extra")):
        write(tmp_path / "in", split, {"image": [image(n)], "question": ["a?"], "answer": ["b"]})
    hub2data.main([str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    lines = (tmp_path / "out/rsvqa-dataset.csv").read_text().splitlines()[1:]
    assert sorted(line.rpartition(",")[2] for line in lines) == ["test_A", "test_phili", "train", "val"]
    assert "split extra: left out" in capsys.readouterr().out
    for split in ("en", "zh"):  # names that say nothing of training
        write(tmp_path / "languages", split, {"image": [image(len(split))], "caption": [split]})
    hub2data.main([str(tmp_path / "languages"), "--output", str(tmp_path / "both")])
    assert [scene.split for scene in read_scenes(tmp_path / "both").scenes] == [None]


def test_answers_as_vqav2_and_vrsbench_have_them(tmp_path):
    answers = [[{"answer": "no"}, {"answer": "yes"}, {"answer": "yes"}]]
    source = write(tmp_path / "v2", "train", {"image": [image(0)], "question": ["is it?"], "answers": answers})
    hub2data.main([str(source), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out/rsvqa-dataset.csv").read_text().splitlines()[1].endswith(",is it?,yes,")
    columns = {"image": [image(0), image(1)], "question": ["how many?", "where?"], "ground_truth": ["3", "there"]}
    hub2data.main([str(write(tmp_path / "vrs", "train", columns)), "--output", str(tmp_path / "vqa")])
    assert sorted(os.listdir(tmp_path / "vqa")) == ["images", "rsvqa-dataset.csv"]
    columns = {"image": [image(0)], "ground_truth": ["a farm"]}
    hub2data.main([str(write(tmp_path / "said", "train", columns)), "--output", str(tmp_path / "captions")])
    assert read_scenes(tmp_path / "captions").scenes[0].texts == ["a farm"]
    columns = {"image": [image(0), image(1)], "question": [["a?", "b?", "c?"], ["d?"]], "answer": [["1", "2"], ["3"]]}
    hub2data.main([str(write(tmp_path / "odd", "train", columns)), "--output", str(tmp_path / "uneven")])
    assert "3 questions and 2 answers" in (tmp_path / "uneven/rejected.txt").read_text()
    assert len(os.listdir(tmp_path / "uneven/images")) == 1, "no picture without a row"
    columns = {"image": [image(0)], "question": ["is it?"], "answers": [[{"text": "yes"}]], "caption": ["a farm"]}
    hub2data.main([str(write(tmp_path / "other", "train", columns)), "--output", str(tmp_path / "kept")])
    assert "without 'answer'" in (tmp_path / "kept/rejected.txt").read_text()
    assert read_scenes(tmp_path / "kept").scenes[0].texts == ["a farm"]
    columns = {
        "image": [image(n) for n in range(2)],
        "question": [["a?"], []],
        "answer": [["b"], []],
        "caption": ["c", "d"],
    }
    hub2data.main([str(write(tmp_path / "some", "train", columns)), "--output", str(tmp_path / "both")])
    assert len(read_scenes(tmp_path / "both").scenes) == 2 and not (tmp_path / "both/rejected.txt").exists()


def test_an_empty_folder_is_filled_where_it_is(captions, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    hub2data.main([str(captions), "--output", str(tmp_path / "link")])
    assert (tmp_path / "link").is_symlink() and read_scenes(tmp_path / "disk").scenes
    (tmp_path / "here" / "lost+found").mkdir(parents=True)
    (tmp_path / "here" / ".partial" / "made").mkdir(parents=True)  # of a run that was killed
    monkeypatch.chdir(tmp_path / "here")
    hub2data.main([str(captions), "--output", "."])
    assert sorted(os.listdir()) == ["captions.json", "images", "lost+found", "rejected.txt"]
    (tmp_path / ".new.partial" / "made").mkdir(parents=True)
    hub2data.main([str(captions), "--output", str(tmp_path / "new")])
    assert read_scenes(tmp_path / "new").scenes and not (tmp_path / ".new.partial").exists()


def test_long_names(tmp_path):
    source = write(tmp_path / "in", "train", {"image": [image(0)], "name": ["船" * 200], "caption": ["a ship"]})
    hub2data.main([str(source), "--output", str(tmp_path / "out")])
    assert read_scenes(tmp_path / "out").scenes[0].texts == ["a ship"]


def test_files_of_several_tables(tmp_path):
    write(tmp_path / "in", "train", {"image": [image(0)], "caption": ["a"]})
    write(tmp_path / "in", "test", {"image": [image(1)], "caption": ["b"], "extra": [1]})
    refused(lambda: hub2data.main([str(tmp_path / "in"), "--output", str(tmp_path / "out")]), "in", "no one table")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("cell", [png(0), {"bytes": png(0), "path": "a/0.png"}], ids=["bytes", "with path"])
def test_parquet_by_others_than_the_hub(cell, tmp_path):
    """pandas and pyarrow write the bytes of an image without saying that they are one."""
    (tmp_path / "in").mkdir()
    table = pyarrow.table({"jpg": [cell], "text": ["a farm"]})
    pyarrow.parquet.write_table(table, tmp_path / "in/train.parquet")
    hub2data.main([str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    (scene,) = read_scenes(tmp_path / "out").scenes
    assert scene.texts == ["a farm"] and Path(scene.image).read_bytes() == png(0)


def test_a_parquet_file_cut_short(captions, tmp_path):
    file = captions / "data/test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-500])
    made = subprocess.run([sys.executable, ROOT / "hub2data.py", captions, "--output", "out"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    said = made.stderr.splitlines()  # before it, datasets' own line names the file
    assert made.returncode == 2 and said[-1].startswith(f"error: {captions}: a parquet file of it is not whole"), said
    assert "Traceback" not in made.stderr and "test-00000" in made.stderr and sorted(os.listdir(tmp_path)) == ["rsicd"]


def test_names_stay_inside(tmp_path):
    columns = {
        "image": [image(0), image(1)],
        "filename": ["../../up.png", "..\\.hidden?.tif"],
        "caption": ["one", "two"],
    }
    hub2data.main([str(write(tmp_path / "evil", "train", columns)), "--output", str(tmp_path / "out")])
    assert sorted(os.listdir(tmp_path / "out/images")) == ["hidden_.png", "up.png"]  # the ending is the content's
    assert sorted(os.listdir(tmp_path)) == ["evil", "out"]


def test_mistakes(captions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = write(
        tmp_path / "text", "train", {"image": ["a.png"], "caption": ["a"]}, {"image": datasets.Value("string")}
    )
    two = write(
        tmp_path / "two", "train", {"before": [image(0)], "image": [image(1)], "x": ["a"]}, {"before": datasets.Image()}
    )
    half = write(tmp_path / "half", "train", {"image": [image(0)], "question": ["a"]})
    (tmp_path / "none").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    for argv, message in (
        ([text], "no column of images"),
        ([two], "no captions, questions or labels"),
        ([two, "--image", "x"], "not a column of images"),
        (
            [captions, "--caption", "said"],
            "--caption said: no such column; there are: filename (Value), captions (List)",
        ),
        ([half], "no column of answers"),
        (["none"], "no parquet file"),
        (["nothing/at/all"], "neither a folder nor ORG/NAME"),
        ([captions, "--output", "full"], "full: is there already"),
    ):
        with pytest.raises(InputError, match="^.*" + message.replace("(", r"\(").replace(")", r"\)")):
            hub2data.main([str(part) for part in (argv if "--output" in argv else [*argv, "--output", "new"])])
    assert not (tmp_path / "new").exists() and not [f for f in os.listdir(tmp_path) if f.startswith(".")]


def test_from_the_hub(captions, tmp_path):
    """The real clients against a hub on the loopback; what is not there is one line and exit code 2."""
    with Hub({"org/rsicd": captions}) as hub:
        known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        runs = [subprocess.run([sys.executable, ROOT / "hub2data.py", name], cwd=tmp_path, env=os.environ | known,
                               capture_output=True, text=True, timeout=120) for name in ("org/rsicd", "org/absent")]  # fmt: skip
    assert runs[0].returncode == 0, runs[0].stderr
    assert len(json.loads((tmp_path / "data/rsicd/captions.json").read_text())) == 5
    assert runs[1].returncode == 2 and runs[1].stderr.startswith("error: org/absent: cannot be loaded as a dataset")
    assert "Traceback" not in runs[1].stderr and not (tmp_path / "data/absent").exists()


def test_numbered_columns_are_captions_and_what_is_not_read_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns = {"image": [image(0)], "raw": ["a"], "raw_1": ["b"], "raw_2": ["c"], "options": [["x", "y"]]}
    hub2data.main([str(write(tmp_path / "nwpu", "all", columns)), "--output", "one"])
    assert read_scenes("one").scenes[0].texts == ["a", "b", "c"]
    said = capsys.readouterr().out
    assert "caption = raw and raw_1 and raw_2" in said and "not read: options\n" in said
    columns = {"image": [image(0)], "caption 1": ["a"], "caption 2": ["b"]}
    hub2data.main([str(write(tmp_path / "spaces", "all", columns)), "--output", "two"])
    assert read_scenes("two").scenes[0].texts == ["a", "b"]
    hub2data.main([str(tmp_path / "spaces"), "--output", "asked", "--caption", "caption 2"])
    assert read_scenes("asked").scenes[0].texts == ["b"], "the one that was asked for"
    columns = {"image": [image(0)], "image_1": [image(1)], "caption": ["a"], "caption_1": ["b"]}
    source = write(tmp_path / "pairs", "all", columns, {"image_1": datasets.Image()})
    hub2data.main([str(source), "--output", "pair", "--image", "image"])
    assert read_scenes("pair").scenes[0].texts == ["a"], "the other is of the other image"


def test_types_of_questions_that_are_objects(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [
        [{"question": "a?", "answer": "1", "type": "count"}, {"question": "b?", "answer": "yes", "type": "presence"}]
    ]
    source = write(tmp_path / "qa", "all", {"image": [image(0)], "qa": pairs})
    hub2data.main([str(source), "--output", "out", "--question", "qa", "--answer", "qa"])
    rows = Path("out/rsvqa-dataset.csv").read_text().splitlines()
    assert rows[1:] == ["images/all_000000.png,a?,1,count", "images/all_000000.png,b?,yes,presence"]
    columns = {"image": [image(0), image(1)], "question": ["a?", "b?"], "answer": ["A", "yes"], "type": [0, 1],
               "options": [["ship", "car"], None]}  # fmt: skip
    hub2data.main([str(write(tmp_path / "mc", "all", columns)), "--output", "types"])
    assert Path("types/rsvqa-dataset.csv").read_text().splitlines()[1:] == ["images/all_000001.png,b?,yes,1"]
    assert "the answer 'A' names one of several choices" in Path("types/rejected.txt").read_text()


def test_tar_shards_of_webdataset(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "000000.tar", "w") as shard:
        for n in range(2):
            for name, data in ((f"{n}.png", png(n)), (f"{n}.txt", f"ship {n}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    hub2data.main([str(tmp_path / "shards"), "--output", str(tmp_path / "out")])
    assert sorted(scene.texts[0] for scene in read_scenes(tmp_path / "out").scenes) == ["ship 0", "ship 1"]


def test_every_row_of_an_image_that_is_held_out_is_told(tmp_path, capsys):
    write(tmp_path / "source", "train", {"image": [image(0)] * 2 + [image(1)], "caption": ["a", "b", "c"]})
    source = write(tmp_path / "source", "test", {"image": [image(0)], "caption": ["d"]})
    hub2data.main([str(source), "--output", str(tmp_path / "made")])
    assert "left out: 2 rows" in capsys.readouterr().out
