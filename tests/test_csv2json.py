"""csv2json.py: conversations, splits that never part an image, what is rejected, three files or none."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import config
import csv2json
import data2csv

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
FILES = ("data_vl.json", "data_vl_train.json", "data_vl_test.json")
HEADER = ("image_path", "question", "answer")


def write(path: Path, rows: list[tuple], header=HEADER) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def load(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def image_of(row: dict) -> str:
    return row["conversations"][0]["value"].rsplit("<|vision_start|>", 1)[1].removesuffix("<|vision_end|>")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder with ten images of one length: 0.tif to 9.tif."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiles").mkdir()
    for i in range(10):
        (tmp_path / "tiles" / f"{i}.tif").write_bytes(b"image %d" % i)
    return tmp_path


@pytest.fixture
def call(call_main):
    """`call("--flag", ...) -> (exit code, stdout, stderr)`."""
    return lambda *words: call_main(csv2json.main, *words)


def ten(here: Path, asked=3) -> Path:
    return write(
        here / "rsvqa-dataset.csv", [(f"tiles/{i}.tif", f"Q{k}?", "yes") for i in range(10) for k in range(asked)]
    )


def test_rows(here, call):
    rows = [
        ("tiles/0.tif", 'How many "roads",\nif any?', "3", "count", "0", "train"),
        (here / "tiles" / "1.tif", " 有水吗？ ", "没有", "", "", "val"),
        ("tiles/2.tif", "Is there water?", "no", "presence", "2", "test"),
        ("tiles/3.tif", "Is there water?", "yes", "presence", "3", "test_phili"),
    ]
    write(here / "rsvqa-dataset.csv", rows, (*HEADER, "type", "img_id", "split"))
    code, out, err = call()
    assert (
        code == 0
        and err == ""
        and out
        == (
            "data_vl.json: 4 rows (train 1, val 1, test 1, test_phili 1)\n"
            "data_vl_train.json: 2 rows (train 1, val 1)\n"
            "data_vl_test.json: 2 rows (test 1, test_phili 1)\n"
            "splits as given: 4 images (train 1, val 1, test 1, test_phili 1)\n"
        )
    )
    made, train, test = (load(here / name) for name in FILES)
    assert made == train + test and "有水吗？" in (here / "data_vl.json").read_text(encoding="utf-8")
    assert made[0] == {
        "id": "rsvqa_0",
        "conversations": [
            {"from": "user", "value": f'How many "roads",\nif any? <|vision_start|>{here}/tiles/0.tif<|vision_end|>'},
            {"from": "assistant", "value": "3"},
        ],
        "type": "count",
        "img_id": "0",
        "split": "train",
    }
    assert made[1] == {
        "id": "rsvqa_1",
        "conversations": [
            {"from": "user", "value": f"有水吗？ <|vision_start|>{here}/tiles/1.tif<|vision_end|>"},
            {"from": "assistant", "value": "没有"},
        ],
        "split": "val",
    }
    assert [row["split"] for row in test] == ["test", "test_phili"]


def test_a_link_to_another_disk_stays_one(here, call):
    ten(here)
    (here / "disk").mkdir()
    (here / "data_vl.json").symlink_to(here / "disk" / "data_vl.json")
    assert call()[0] == 0 and (here / "data_vl.json").is_symlink()
    assert len(load(here / "disk" / "data_vl.json")) == 30


def test_split_by_image(here, call):
    ten(here)
    code, out, _ = call()
    assert code == 0 and "splits by image, seed 0: 10 images (train 7, val 1, test 2)" in out
    made, train, test = (load(here / name) for name in FILES)
    assert [row["id"] for row in made] == [f"rsvqa_{i}" for i in range(30)]
    assert sorted(train + test, key=lambda row: int(row["id"][6:])) == made and len(test) == 6
    assert not {image_of(row) for row in train} & {image_of(row) for row in test}
    split_of = {}
    assert all(split_of.setdefault(image_of(row), row["split"]) == row["split"] for row in made)
    assert {row["split"] for row in test} == {"test"}


def test_the_same_bytes_under_other_names_are_one_image(here, call):
    (here / "copies").mkdir()
    rows = []
    for i in range(10):
        (here / "copies" / f"other_{i}.png").write_bytes((here / "tiles" / f"{i}.tif").read_bytes())
        rows += [
            (f"tiles/{i}.tif", "Q?", "yes"),
            (f"copies/other_{i}.png", "Q?", "yes"),
            (f"./tiles/../tiles/{i}.tif", "R?", "no"),
        ]
    write(here / "rsvqa-dataset.csv", rows)
    for seed in range(5):
        code, out, _ = call("--seed", seed)
        assert code == 0 and f"seed {seed}: 10 images (train 7, val 1, test 2)" in out and "warning" not in out
        splits = {}
        for row in load(here / "data_vl.json"):
            splits.setdefault(Path(image_of(row)).read_bytes(), set()).add(row["split"])
        assert all(len(found) == 1 for found in splits.values())


def test_only_files_of_equal_length_are_read(here, call, monkeypatch):
    for i in range(10):
        (here / "tiles" / f"{i}.tif").write_bytes(b"x" * (i if i > 1 else 0))
    read = []
    digest = config.digest
    monkeypatch.setattr(config, "digest", lambda path: read.append(Path(path).name) or digest(path))
    ten(here)
    assert "9 images" in call()[1] and read == ["0.tif", "1.tif"]


def test_a_seed_fixes_the_split(here, call):
    ten(here, 1)
    made = {}
    for seed in (0, 1, 2, 0, 1, 2):
        assert call("--seed", seed)[0] == 0
        text = "".join((here / name).read_text() for name in FILES)
        assert made.setdefault(seed, text) == text
    assert len(set(made.values())) == 3


def test_fractions(here, call):
    ten(here)
    for val, test, expected in ((0, 0, "train 10"), (0.01, 0, "train 9, val 1"), (0.3, 0.6, "train 1, val 3, test 6")):
        code, out, _ = call("--val_fraction", val, "--test_fraction", test)
        assert code == 0 and f"10 images ({expected})" in out
    code, _, err = call("--val_fraction", 0.5, "--test_fraction", 0.5)
    assert code == 2 and "10 different images are too few to hold out 5 for validation and 5 for the test" in err
    for flag in ("val_fraction", "test_fraction", "max_rejected"):
        for value in ("-0.1", "1.1", "nan"):
            code, _, err = call(f"--{flag}={value}")
            assert code == 2 and f"--{flag} {value}: expected a number from 0 to 1" in err


def test_given_splits_are_kept(here, call):
    rows = [(f"tiles/{i}.tif", "Q?", "yes", "train" if i < 8 else "test") for i in range(10)]
    write(here / "rsvqa-dataset.csv", rows, (*HEADER, "split"))
    code, out, _ = call("--seed", 7)
    assert code == 0 and "splits as given: 10 images (train 8, test 2)" in out and "warning" not in out
    assert [row["split"] for row in load(here / "data_vl.json")] == [row[3] for row in rows]
    write(here / "rsvqa-dataset.csv", rows[8:], (*HEADER, "split"))
    code, out, _ = call()
    assert code == 0 and "data_vl_train.json: 0 rows\n" in out and load(here / "data_vl_train.json") == []


def test_given_splits_that_leak_are_named(here, call):
    (here / "tiles" / "9.tif").write_bytes((here / "tiles" / "0.tif").read_bytes())
    rows = [(f"tiles/{i}.tif", "Q?", "yes", "train" if i < 8 else "test") for i in range(10)]
    write(here / "rsvqa-dataset.csv", [*rows, ("tiles/1.tif", "R?", "no", "val")], (*HEADER, "split"))
    code, out, _ = call()
    assert code == 0 and [row["split"] for row in load(here / "data_vl.json")] == [row[3] for row in rows] + ["val"]
    tiles = here / "tiles"
    assert f"warning: 2 images are in two splits, e.g. {tiles}/0.tif (train) = {tiles}/9.tif (test)" in out


def test_splits_that_cannot_be(here, call):
    for splits, message in (
        (("train", "", "test"), "row 1: column 'split' is empty, but 2 of 3 rows have one"),
        (("train", "trial", "test"), "row 1: column 'split': expected train, val, test or test_..., found 'trial'"),
    ):
        write(
            here / "rsvqa-dataset.csv",
            [(f"tiles/{i}.tif", "Q?", "a", s) for i, s in enumerate(splits)],
            (*HEADER, "split"),
        )
        code, out, err = call()
        assert code == 2 and out == "" and f"error: rsvqa-dataset.csv: {message}" in err
    assert not (here / "data_vl.json").exists()
    write(here / "rsvqa-dataset.csv", [(f"tiles/{i}.tif", "Q?", "a", " ") for i in range(10)], (*HEADER, "split"))
    assert "splits by image" in call()[1]  # a column without a value is no split
    names = ("Train", "training", "validation", "Test")  # as the hub and others call them
    write(
        here / "rsvqa-dataset.csv", [(f"tiles/{i}.tif", "Q?", "a", s) for i, s in enumerate(names)], (*HEADER, "split")
    )
    assert call()[0] == 0
    assert [row["split"] for row in json.loads((here / "data_vl.json").read_text())] == [
        "train",
        "train",
        "val",
        "test",
    ]


def test_rejected_rows(here, call):
    bad = [
        ("tiles/nowhere.tif", "Q?", "yes"),
        ("tiles/0.tif", "", "yes"),
        ("tiles/0.tif", "Q?", "  "),
        ("", "Q?", "yes"),
        ("tiles/0.tif", "Is <|vision_start|> here?", "yes"),
        ("tiles/0.tif", "Q?", "yes<|im_end|>"),
        ("tiles", "Q?", "yes"),
    ]
    good = [(f"tiles/{i}.tif", f"1 <| 2, {k} > 1|?", "yes") for i in range(10) for k in range(10)]
    source = write(here / "rsvqa-dataset.csv", [*good[:50], *bad, *good[50:]])
    code, out, err = call()
    assert code == 2 and out == "" and not (here / "data_vl.json").exists()
    assert "7 of 107 rows cannot be used (allowed: --max_rejected 0.01)" in err and str(here) in err
    assert "\n  row 50: no such image: tiles/nowhere.tif\n" in err and err.endswith("and 2 more\n")

    addresses = [(f"file://{here}/tiles/{i}.tif", "Q?", "yes") for i in range(10)]
    write(here / "addresses.csv", addresses)
    assert call("--csv", "addresses.csv", "--output", "addresses.json")[0] == 0
    assert {image_of(row) for row in load(here / "addresses.json")} == {str(here / f"tiles/{i}.tif") for i in range(10)}

    code, out, _ = call("--max_rejected", 0.1)
    assert code == 0 and "rejected: 7 rows, listed in data_vl_rejected.jsonl; first row 50: no such image" in out
    listed = [json.loads(line) for line in (here / "data_vl_rejected.jsonl").read_text().splitlines()]
    special = "which a model reads as a special token"
    assert listed == [
        {"file": source.name, "row": 50 + i, "reason": reason}
        for i, reason in enumerate(
            (
                "no such image: tiles/nowhere.tif",
                "column 'question' is empty",
                "column 'answer' is empty",
                "column 'image_path' is empty",
                f"column 'question' holds '<|vision_start|>', {special}",
                f"column 'answer' holds '<|im_end|>', {special}",
                "no such image: tiles",
            )
        )
    ]
    made = load(here / "data_vl.json")
    assert [row["id"] for row in made] == [f"rsvqa_{i}" for i in (*range(50), *range(57, 107))]
    ten(here)
    assert call()[0] == 0 and not (here / "data_vl_rejected.jsonl").exists()


def test_one_percent_is_still_allowed(here, call):
    rows = [(f"tiles/{i % 10}.tif", f"Q{i}", "a") for i in range(99)]
    write(here / "rsvqa-dataset.csv", [*rows, ("none.tif", "Q", "a")])
    assert call()[0] == 0
    write(here / "rsvqa-dataset.csv", [*rows[1:], ("none.tif", "Q", "a")])
    assert call()[0] == 2
    write(here / "rsvqa-dataset.csv", [("none.tif", "Q", "a")])
    assert "1 of 1 rows cannot be used" in call("--max_rejected", 1)[2]


def test_paths_that_windows_wrote(here, call):
    path = write(here / "rsvqa-dataset.csv", [(f"tiles\\{i}.tif", "Q?", "yes") for i in range(10)])
    code, _, err = call("--csv", path)
    assert code == 0, err
    assert {image_of(row) for row in load(here / "data_vl.json")} == {str(here / f"tiles/{i}.tif") for i in range(10)}


def test_images_beside_the_csv(here, call, monkeypatch):
    ten(here)
    (here / "else" / "tiles").mkdir(parents=True)
    (here / "else" / "tiles" / "3.tif").write_bytes(b"of another data set")
    monkeypatch.chdir(here / "else")
    assert call("--csv", "../rsvqa-dataset.csv")[0] == 0
    images = {image_of(row) for row in load(here / "else" / "data_vl.json")}
    assert str(here / "tiles" / "3.tif") in images and str(here / "tiles" / "4.tif") in images
    assert len(images) == 10 and all(os.path.isabs(path) for path in images)


BROKEN = [
    (b"", "line 1: expected the columns image_path, question, answer, found nothing"),
    (b"image_path,question,answer\n", "no row below the column names"),
    (b"image_path,question\na,b\n", "line 1: column 'answer' is missing (the file has image_path, question)"),
    (b"image_path;question;answer\na;b;c\n", "its columns are parted by semicolons"),
    (b"image_path,question,answer,answer\na,b,c,d\n", "line 1: a column name stands twice"),
    (b"image_path,question,answer\na,b,c\na,b, or,c\n", "line 3: 4 fields, expected 3 (image_path, question, answer)"),
    (b"image_path,question,answer\na,b\n", "line 2: 2 fields, expected 3"),
    (b'image_path,question,answer\na,"b,c\nd,e,f\n', "line 3: not a whole CSV, is a quote open?"),
    (b'image_path,question,answer\na,"b"c,d\n', "line 2: not a whole CSV, is a quote open?"),
    (b"image_path,question,answer\na,b,c\na,b\0,c\n", "line 3: holds a NUL byte"),
    (b"image_path,question,answer\na,b,c\na,b\xff,c\n", "line 3: not UTF-8 text"),
]


@pytest.mark.parametrize("content, message", BROKEN)
def test_broken_csv(here, call, content, message):
    (here / "rsvqa-dataset.csv").write_bytes(content)
    code, out, err = call()
    assert code == 2 and out == "" and f"error: rsvqa-dataset.csv: {message}" in err
    assert not (here / "data_vl.json").exists()


def test_other_names_of_columns(here, call):
    rows = [f"tiles/{i}.tif,presence,Q?,yes,{'test' if i > 4 else 'train'}\n" for i in range(10)]
    (here / "rsvqa-dataset.csv").write_text("Image,Question Type,Prompt,Ground_Truth,Split\n" + "".join(rows))
    assert call()[0] == 0
    row = load(here / "data_vl.json")[3]
    assert row["type"] == "presence" and row["conversations"][1]["value"] == "yes"
    assert [row["split"] for row in load(here / "data_vl.json")] == ["train"] * 5 + ["test"] * 5
    (here / "rsvqa-dataset.csv").write_text("Image,Prompt\na,b\n")
    assert "column 'answer' is missing (the file has Image, Prompt)" in call()[2]
    (here / "rsvqa-dataset.csv").write_text(
        "image_path,image,question,answer,category\n" + "tiles/1.tif,x,Q?,3,count\n" * 10
    )
    code, _, err = call("--val_fraction=0", "--test_fraction=0")
    assert code == 0, err
    assert load(here / "data_vl.json")[0]["type"] == "count"


def test_a_byte_order_mark_blank_lines_and_other_columns(here, call):
    text = "\ufeffnote, question ,answer,image_path\r\n" + "".join(
        f"x,Q?,yes, tiles/{i}.tif\r\n\r\n" for i in range(10)
    )
    (here / "rsvqa-dataset.csv").write_bytes(text.encode())
    assert call()[0] == 0
    made = load(here / "data_vl.json")
    assert [row["id"] for row in made] == [f"rsvqa_{i}" for i in range(10)]
    assert made[0]["conversations"][0]["value"].startswith("Q? <|vision_start|>/")


def test_missing_files_and_folders(here, call):
    code, _, err = call()
    assert code == 2 and "rsvqa-dataset.csv: no such file; run `python data2csv.py` first" in err
    code, _, err = call("--preset", "demo")
    assert (
        code == 2 and "data/demo/rsvqa-dataset.csv: no such file; run `python data2csv.py --preset demo` first" in err
    )
    code, _, err = call("--csv", "mine.csv")
    assert code == 2 and "mine.csv: no such file; check --csv" in err
    code, _, err = call("--csv", "tiles")
    assert code == 2 and "tiles: cannot be read: Is a directory" in err
    ten(here)
    (here / "x_test.json").mkdir()
    for output, message in (
        ("no/data.json", "its folder does not exist"),
        ("tiles", "is a folder"),
        (".", "is a folder"),
        ("x.json", "would write x_test.json, which is a folder"),
        ("rsvqa-dataset.csv", "would write over rsvqa-dataset.csv, which is read"),
    ):
        code, _, err = call("--output", output)
        assert code == 2 and f"error: --output {output}: {message}" in err
    assert not (here / "no").exists() and not (here / "x.json").exists()


def test_an_image_that_cannot_be_read(here, call, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(config, "beginning", refuse)
    ten(here)
    code, _, err = call()
    assert code == 2 and f"error: {here}/tiles/0.tif: cannot be read: Permission denied" in err


def test_three_files_or_none(here, call, monkeypatch):
    ten(here)
    before = {path.name for path in here.iterdir()}
    write_text = Path.write_text

    def full(path, *args, **more):
        if "_test.json" in path.name:
            write_text(path, "half")
            raise OSError(28, "No space left on device")
        return write_text(path, *args, **more)

    for old in (False, True):
        if old:
            for name in (*FILES, "data_vl_rejected.jsonl"):
                (here / name).write_text("old")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            code, out, err = call()
        assert code == 2 and out == "" and "data_vl_test.json: cannot be written" in err and "No space left" in err
        names = {path.name for path in here.iterdir()}
        assert names == (before | {*FILES, "data_vl_rejected.jsonl"} if old else before)
        assert not old or all((here / name).read_text() == "old" for name in FILES)
    assert call()[0] == 0 and len(load(here / FILES[0])) == 30


def test_both_commands_as_typed(here):
    asked = [
        {"id": i, "img_id": i, "type": "presence", "question": "Is there water?", "answers_ids": [i]} for i in range(10)
    ]
    answers = [{"id": i, "question_id": i, "answer": "no"} for i in range(10)]
    (here / "rsvqa_questions.json").write_text(json.dumps({"questions": asked}))
    (here / "rsvqa_answers.json").write_text(json.dumps({"answers": answers}))
    (here / "tiles").rename(here / "rsvqa_images")
    for script in ("data2csv", "csv2json"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script}; {script}.main([])"
        code += "; assert 'torch' not in sys.modules"
        made = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=60)
        assert made.returncode == 0 and "10 images" in made.stdout, made.stderr
    assert image_of(load(here / "data_vl.json")[4]) == str(here / "rsvqa_images" / "4.tif")
    made = subprocess.run(
        [sys.executable, ROOT / "csv2json.py", "--csv", "x"], cwd=here, capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 2 and made.stderr == "error: x: no such file; check --csv\n"


def test_preset_demo(here, call):
    folder = here / "data" / "demo"
    folder.mkdir(parents=True)
    ten(here).rename(folder / "rsvqa-dataset.csv")
    assert call("--preset", "demo")[0] == 0
    assert len(load(folder / "data_vl.json")) == 30 and len(load(folder / "data_vl_test.json")) == 6


def test_77000_rows_from_official_files_to_conversations(tmp_path, monkeypatch, call):
    """The size of RSVQA low resolution, in its form: every file lists all questions, those of other splits as stubs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Images_LR").mkdir()
    split_of = ["train"] * 572 + ["val"] * 100 + ["test"] * 100
    for i in range(len(split_of)):
        (tmp_path / "Images_LR" / f"{i}.tif").write_bytes(b"%04d" % i)
    texts = [
        (f'Is there "water", {n}?', "Line one\nline two, ", "水面 & <road>?")[n % 3] + f" {n}" for n in range(77200)
    ]
    for split in ("train", "val", "test"):
        asked, answers = [], []
        for n, text in enumerate(texts):
            if split_of[n // 100] == split:
                asked.append(
                    {"id": n, "img_id": n // 100, "type": "count", "question": text, "answers_ids": [n], "active": True}
                )
                answers.append({"id": n, "question_id": n, "answer": n % 7 if n % 2 else f"{n}, m2", "active": True})
            else:
                asked.append({"id": n, "active": False})
                answers.append({"id": n, "active": False})
        (tmp_path / f"LR_split_{split}_questions.json").write_text(json.dumps({"questions": asked}))
        (tmp_path / f"LR_split_{split}_answers.json").write_text(json.dumps({"answers": answers}))
    data2csv.main([])
    code, out, _ = call()
    assert code == 0 and "rsvqa-dataset.csv: 77200 rows of 772 images" in out and "left out: 154400 inactive" in out
    assert "data_vl_train.json: 67200 rows (train 57200, val 10000)" in out
    assert load(tmp_path / "data_vl.json") == [
        {
            "id": f"rsvqa_{n}",
            "conversations": [
                {"from": "user", "value": f"{text} <|vision_start|>{tmp_path}/Images_LR/{n // 100}.tif<|vision_end|>"},
                {"from": "assistant", "value": str(n % 7) if n % 2 else f"{n}, m2"},
            ],
            "type": "count",
            "img_id": str(n // 100),
            "split": split_of[n // 100],
        }
        for n, text in enumerate(texts)
    ]
    assert len(load(tmp_path / "data_vl_test.json")) == 10000


@pytest.mark.parametrize("name, rows", [("rsvqa_lr", 3505), ("rsvqa_hr", 3501)])
def test_real_rsvqa(name, rows, tmp_path, call):
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing")
    data2csv.main(["--data_dir", str(folder), "--output", str(tmp_path / "real.csv")])
    code, out, _ = call("--csv", tmp_path / "real.csv", "--output", tmp_path / "vl.json")
    assert code == 0 and "splits by image, seed 0: 35 images (train 24, val 4, test 7)" in out and "warning" not in out
    made, train, test = (load(tmp_path / f"vl{part}.json") for part in ("", "_train", "_test"))
    assert len(made) == rows == len(train) + len(test)
    held = {Path(image_of(row)).read_bytes() for row in test}
    assert len(held) == 7 and not held & {Path(image).read_bytes() for image in {image_of(row) for row in train}}


def test_outputs_that_are_one_file_are_refused(here, call):
    write(here / "rsvqa-dataset.csv", [("tiles/0.tif", "Q?", "yes")])
    (here / "data_vl.json").write_text("[]")
    (here / "data_vl_train.json").symlink_to(here / "data_vl.json")
    code, _, err = call("--val_fraction=0", "--test_fraction=0")
    assert code == 2 and "are one file, by a link" in err and (here / "data_vl.json").read_text() == "[]"


def test_a_letter_of_several_choices_is_no_answer(here, call):
    rows = [("tiles/0.tif", "What?", "A", "ship; car"), ("tiles/1.tif", "What?", "car", "ship; car")]
    write(here / "rsvqa-dataset.csv", rows, (*HEADER, "options"))
    assert call("--max_rejected=1", "--val_fraction=0", "--test_fraction=0")[0] == 0
    assert [row["conversations"][1]["value"] for row in load(here / "data_vl.json")] == ["car"]
