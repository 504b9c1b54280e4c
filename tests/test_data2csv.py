"""data2csv.py: both forms of RSVQA, what is left out and why, what is said of broken files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import data2csv

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"


def question(number, img_id=0, text="Is there water?", **more) -> dict:
    row = {"id": number, "img_id": img_id, "type": "presence", "question": text, "answers_ids": [number]}
    return row | {"active": True} | more


def answer(number, text="yes", **more) -> dict:
    return {"id": number, "question_id": number, "answer": text, "active": True} | more


def write(folder: Path, questions: list, answers: list, name="rsvqa") -> None:
    (folder / f"{name}_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / f"{name}_answers.json").write_text(json.dumps({"answers": answers}))


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())


def read(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder with one image folder."""
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "rsvqa_images", "0.tif", "1.tif")
    return tmp_path


@pytest.fixture
def call(call_main):
    """`call("--flag", ...) -> (exit code, stdout, stderr)`."""
    return lambda *words: call_main(data2csv.main, *words)


def test_single_files(here, call):
    asked = [
        question(0, 0, "Is there water?", split="train"),
        question(1, 0, 'How many "roads", \nif any?', type="count", split="train"),
        question(2, 1, "有水吗？", split="test"),
    ]
    write(here, asked, [answer(2, "没有"), answer(1, 34), answer(0, " yes ")])
    code, out, err = call()
    assert code == 0 and err == ""
    assert out == ("rsvqa-dataset.csv: 3 rows of 2 images\ntypes: presence 2, count 1\nsplits: train 2, test 1\n")
    text = (here / "rsvqa-dataset.csv").read_bytes().decode()
    assert text.startswith("image_path,question,answer,type,img_id,split\nrsvqa_images/0.tif,Is there water?,yes,")
    assert [list(row.values()) for row in read(here / "rsvqa-dataset.csv")] == [
        ["rsvqa_images/0.tif", "Is there water?", "yes", "presence", "0", "train"],
        ["rsvqa_images/0.tif", 'How many "roads", \nif any?', "34", "count", "0", "train"],
        ["rsvqa_images/1.tif", "有水吗？", "没有", "presence", "1", "test"],
    ]


def test_official_files_of_each_split(here, call):
    """Every file lists every question; those of other splits are bare ids."""
    for of, splits in (("LR", ("train", "val", "test")), ("USGS", ("train", "val", "test", "test_phili"))):
        folder = here / of
        folder.mkdir()
        touch(folder / ("Images_LR" if of == "LR" else "Data"), *(f"{i}.tif" for i in range(len(splits))))
        for i, split in enumerate(splits):
            stubs = [{"id": n, "active": False} for n in range(len(splits))]
            questions, answers = list(stubs), list(stubs)
            questions[i], answers[i] = question(i, i), answer(i, f"answer {i}")
            write(folder, questions, answers, f"{of}_split_{split}")
        code, out, _ = call("--data_dir", of, "--output", f"{of}.csv")
        n = len(splits)
        assert code == 0 and f"left out: {n * (n - 1)} inactive" in out
        assert f"splits: {', '.join(f'{split} 1' for split in splits)}\n" in out
        rows = read(here / f"{of}.csv")
        assert [(row["split"], row["answer"], row["img_id"]) for row in rows] == [
            (split, f"answer {i}", str(i)) for i, split in enumerate(splits)
        ]
        assert rows[0]["image_path"] == f"{of}/{'Images_LR' if of == 'LR' else 'Data'}/0.tif"


def test_some_splits_alone_and_two_data_sets_in_one_folder(here, call):
    write(here, [question(0)], [answer(0)], "LR_split_test")
    assert call()[0] == 0 and read(here / "rsvqa-dataset.csv")[0]["split"] == "test"
    write(here, [question(0)], [answer(0)], "USGS_split_val")
    code, _, err = call()
    assert code == 2 and "both LR_split_* and USGS_split_*" in err


def test_named_files(here, call):
    folder = here / "deep"
    folder.mkdir()
    touch(here / "tiles", "0.png")
    write(folder, [question(0)], [answer(0)], "USGS_split_test_phili")
    flags = ["--questions", "deep/USGS_split_test_phili_questions.json", "--images", "tiles", "--output", "my.csv"]
    assert call(*flags, "--answers", "deep/USGS_split_test_phili_answers.json")[0] == 0
    row = read(here / "my.csv")[0]
    assert row["image_path"] == "tiles/0.png" and row["split"] == "test_phili"
    code, _, err = call(*flags)
    assert code == 2 and "--questions and --answers together" in err


def test_images_by_suffix_and_folder(here, call):
    for folder in (here / "rsvqa_images").iterdir():
        folder.unlink()
    (here / "rsvqa_images").rmdir()
    write(here, [question(i, i) for i in range(6)], [answer(i) for i in range(6)])
    code, _, err = call()
    assert code == 2 and "rsvqa_images, images, Images_LR, Data" in err and "--images" in err
    touch(here / "images", "0.tif", "0.png", "1.tiff", "2.png", "3.jpg", "4.jpeg", "5.TIF", "6.txt")
    (here / "images" / "7.tif").mkdir()
    assert call()[0] == 0
    assert [row["image_path"][7:] for row in read(here / "rsvqa-dataset.csv")] == [
        "0.tif", "1.tiff", "2.png", "3.jpg", "4.jpeg", "5.TIF",
    ]  # fmt: skip
    code, _, err = call("--images", "nowhere")
    assert code == 2 and err.startswith("error: nowhere: the image folder cannot be read: No such file")


def test_an_id_is_the_same_as_a_number_and_as_text(here, call):
    written = question(1, text="by text", answers_ids=["1"]) | {"id": "1"}
    write(here, [question(0, answers_ids=["0"]), written], [answer(0), answer("1", question_id=1)])
    assert call()[0] == 0 and len(read(here / "rsvqa-dataset.csv")) == 2
    write(here, [question(0)], [answer(0), answer("0")])
    code, _, err = call()
    assert code == 2 and "field 'id': 0 is the id of an earlier answer too" in err


def test_what_is_left_out_is_counted_by_reason(here, call):
    asked = [
        question(0),
        question(1, active=False),
        {"id": 2, "active": False},
        question(3, text="  "),
        question(4, img_id=99),
        question(5, text="no answer", answers_ids=[]),
        question(6, text="inactive answer"),
        question(7, text="unknown answer", answers_ids=[12345]),
        question(8, text="blank answer"),
        question(9),
        question(10, text=" Is there water? "),
        question(11),
        question(12, img_id=1),
        question(13, text="two answers", answers_ids=[13, 130, 131]),
    ]
    answers = [answer(i) for i in (0, 1, 3, 4, 5, 9, 10, 12)] + [
        answer(6, active=False),
        answer(8, " "),
        answer(11, "no"),
        answer(13, "not this", active=False),
        answer(130, "this", question_id=13),
        answer(131, "nor this", question_id=13),
    ]
    write(here, asked, answers)
    code, out, _ = call()
    assert code == 0 and out.splitlines() == [
        "rsvqa-dataset.csv: 3 rows of 2 images",
        "types: presence 3",
        "left out: 2 inactive (switched off, or of another split), first questions[1] of rsvqa_questions.json",
        "left out: 1 empty question (no text in it), first questions[3] of rsvqa_questions.json",
        "left out: 1 image missing (no file of that img_id), first questions[4] of rsvqa_questions.json",
        "left out: 4 unanswered (no active answer), first questions[5] of rsvqa_questions.json",
        "left out: 2 duplicate (same image, question and answer), first questions[9] of rsvqa_questions.json",
        "left out: 1 contradicting (same image and question, another answer: the first is kept), first questions[11] of"
        " rsvqa_questions.json",
    ]
    rows = read(here / "rsvqa-dataset.csv")
    assert [(row["img_id"], row["question"], row["answer"]) for row in rows] == [
        ("0", "Is there water?", "yes"), ("1", "Is there water?", "yes"), ("0", "two answers", "this"),
    ]  # fmt: skip
    assert {row["split"] for row in rows} == {""}


BROKEN_QUESTIONS = [
    (5, "expected an object, found int"),
    ({k: v for k, v in question(0).items() if k != "question"}, "field 'question' is missing (the row has id, img_id,"),
    (question(0, type=None), "field 'type': expected a text, found NoneType null"),
    (question(0, text=7), "field 'question': expected a text, found int 7"),
    (question(True), "field 'id': expected a whole number or a text, found bool true"),
    (question(0, img_id=1.5), "field 'img_id': expected a whole number or a text, found float 1.5"),
    (question(0, active="yes"), "field 'active': expected true or false, found str \"yes\""),
    (question(0, answers_ids=0), "field 'answers_ids': expected a list, found int 0"),
    (question(0, answers_ids=[[0]]), "field 'answers_ids': expected ids, found [0]"),
    (question(0, answers_ids=[1]), "field 'answers_ids': answer 1 belongs to question 1"),
    (question(0, split=3), "field 'split': expected a text, found int 3"),
    (question(0, text="a\0b"), "field 'question' holds what is no character: 'a\\x00b'"),
    (question(0, text="a\ud800"), "field 'question' holds what is no character: 'a\\ud800'"),
]


@pytest.mark.parametrize("row, message", BROKEN_QUESTIONS)
def test_malformed_questions(here, call, row, message):
    write(here, [question(1), row], [answer(0), answer(1)])
    code, out, err = call()
    assert code == 2 and out == "" and f"error: rsvqa_questions.json: questions[1]: {message}" in err
    assert not (here / "rsvqa-dataset.csv").exists()


BROKEN_ANSWERS = [
    ([], "expected an object, found list"),
    ({"id": 0, "question_id": 0}, "field 'answer' is missing (the row has id, question_id)"),
    (answer(0, True), "field 'answer': expected a text or a whole number or a number, found bool true"),
    (answer(0, float("nan")), "field 'answer': expected a text or a whole number or a number, found float NaN"),
    (answer(0, question_id=None), "field 'question_id': expected a whole number or a text, found NoneType null"),
    (answer(1), "field 'id': 1 is the id of an earlier answer too"),
]


@pytest.mark.parametrize("row, message", BROKEN_ANSWERS)
def test_malformed_answers(here, call, row, message):
    write(here, [question(1)], [answer(1), row])
    code, _, err = call()
    assert code == 2 and f"error: rsvqa_answers.json: answers[1]: {message}" in err


BROKEN_FILES = [
    (b'{"questions": [\n{"id": }]}', "not JSON: line 2, column 8: Expecting value"),
    (b'{"questions": ["\xff"]}', "not UTF-8 text (byte 16)"),
    (b"[]", 'expected {"questions": [...]} at the top level'),
    (b'{"questions": {}}', 'expected {"questions": [...]} at the top level'),
    (b'{"questions": []}', "no row remains (images in rsvqa_images):\n  no question in the file"),
]


@pytest.mark.parametrize("content, message", BROKEN_FILES)
def test_broken_files(here, call, content, message):
    write(here, [], [])
    (here / "rsvqa_questions.json").write_bytes(content)
    code, _, err = call()
    assert code == 2 and f"error: rsvqa_questions.json: {message}" in err


def test_missing_files(here, call):
    code, _, err = call()
    assert code == 2 and "holds no rsvqa_questions.json, LR_split_*_questions.json" in err and "--data_dir" in err
    write(here, [question(0)], [answer(0)])
    (here / "rsvqa_answers.json").unlink()
    code, _, err = call()
    assert code == 2 and "rsvqa_answers.json: no such file" in err
    code, _, err = call("--preset", "demo")
    assert code == 2 and "data/demo: holds no" in err and "run `python demo_data.py` first" in err


def test_no_row_remains(here, call):
    write(here, [question(0, 8), question(1, 9)], [answer(0), answer(1)])
    code, _, err = call()
    assert code == 2 and "no row remains (images in rsvqa_images):\n  2 image missing" in err


def test_outputs_that_cannot_be(here, call, monkeypatch):
    write(here, [question(0)], [answer(0)])
    for output, message in (
        ("no/where.csv", "its folder does not exist"),
        ("rsvqa_images", "is a folder"),
        ("rsvqa_answers.json", "is one of the files that are read"),
    ):
        code, _, err = call("--output", output)
        assert code == 2 and f"error: --output {output}: {message}" in err
    assert not (here / "no").exists()
    (here / "rsvqa-dataset.csv").write_text("old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("report.os.replace", full)
    code, _, err = call()
    assert code == 2 and "rsvqa-dataset.csv: cannot be written" in err and "No space left" in err
    assert (here / "rsvqa-dataset.csv").read_text() == "old" and len(list(here.iterdir())) == 4


def test_a_malformed_row_leaves_the_old_file(here, call):
    (here / "rsvqa-dataset.csv").write_text("old")
    write(here, [question(0), 5], [answer(0)])
    assert call()[0] == 2 and (here / "rsvqa-dataset.csv").read_text() == "old"


def test_ben_and_whole_files_and_paths_from_the_csv(here, call, tmp_path_factory):
    for name in ("train", "val"):
        write(here, [question(0)], [answer(0)])
        for kind in ("questions", "answers"):
            (here / f"rsvqa_{kind}.json").rename(here / f"RSVQAxBEN_split_{name}_{kind}.json")
    assert call("--output", "ben.csv")[0] == 0
    assert [(row["split"], row["image_path"]) for row in read(here / "ben.csv")] == [("train", "rsvqa_images/0.tif")]
    for name in ("train", "val"):
        for kind in ("questions", "answers"):
            (here / f"RSVQAxBEN_split_{name}_{kind}.json").rename(here / f"all_{kind}.json")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert call("--data_dir", here, "--output", elsewhere / "all.csv")[0] == 0
    assert read(elsewhere / "all.csv")[0]["image_path"] == str(here / "rsvqa_images" / "0.tif")


def test_preset_demo(here, call):
    folder = here / "data" / "demo"
    folder.mkdir(parents=True)
    touch(folder / "images", "0.tif")
    touch(folder / "rsvqa_images", "0.tif")
    write(folder, [question(0)], [answer(0)])
    assert call("--preset", "demo")[0] == 0
    assert read(folder / "rsvqa-dataset.csv")[0]["image_path"] == "rsvqa_images/0.tif"  # from the CSV's folder


def test_the_command_needs_no_torch(here):
    write(here, [question(0), question(1, active=False)], [answer(0)])
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data2csv; data2csv.main([])"
    code += "; assert 'torch' not in sys.modules"
    made = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    made = subprocess.run(
        [sys.executable, ROOT / "data2csv.py", "--images", "x"], cwd=here, capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 2 and made.stderr.startswith("error: x:") and "Traceback" not in made.stderr


@pytest.mark.parametrize(
    "name, rows, types",
    [
        ("rsvqa_lr", 3505, {"comp": 1376, "count": 1048, "presence": 1046, "rural_urban": 35}),
        ("rsvqa_hr", 3501, {"comp": 1161, "count": 920, "presence": 913, "area": 507}),
    ],
)
def test_real_rsvqa(name, rows, types, tmp_path, call):
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing")
    code, out, _ = call("--data_dir", folder, "--output", tmp_path / "real.csv")
    assert code == 0 and f"{rows} rows of 35 images" in out and "left out" not in out
    made = read(tmp_path / "real.csv")
    assert {kind: sum(row["type"] == kind for row in made) for kind in types} == types
    asked = json.loads((folder / "rsvqa_questions.json").read_text())["questions"]
    answers = {
        row["question_id"]: row["answer"] for row in json.loads((folder / "rsvqa_answers.json").read_text())["answers"]
    }
    assert [(row["image_path"], row["question"], row["answer"]) for row in made] == [
        (str(folder / "images" / f"{q['img_id']}.tif"), q["question"], answers[q["id"]]) for q in asked
    ]
