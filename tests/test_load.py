"""load.py: what counts as whole, both hubs through their real clients on the loopback, copies, the demo bases."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

# Before a client is imported: nothing of these tests belongs in the user's caches, and no proxy is asked.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"

import demo_bases
import load
from config import whole_folder
from model import DualEncoder
from tests import conftest
from tests.conftest import free_port
from tests.hub_server import Hub
from tests.official_layout import TEXT, write_clip, write_qwen_vl

HUBS = ["huggingface", "modelscope"]
SHARD = "model-00002-of-00002.safetensors"
NAME = "Org/Tiny"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("hub") / "Org" / "Tiny")


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "Org" / "Tiny"))


@pytest.fixture(autouse=True)
def homes(tmp_path, monkeypatch):
    for variable in ("MODELSCOPE_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    for variable in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def no_waiting(monkeypatch):
    """The clients' own back-off adds up to half a minute; here it is not the point."""
    import modelscope_hub._download_control as control

    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(control._DownloadControl, "sleep", lambda self, seconds: None)


def fetch(hub, root, source, name=NAME, **more):
    return load.download(name, root, source, endpoint=hub.url, waits=more.pop("waits", ()), **more)


def refused(call, *words) -> str:
    text = conftest.refused(call, *words)
    assert "\n" not in text
    return text


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


# --- whole or not ---


def test_a_whole_model_passes(tiny, tmp_path):
    load.verify_model(tiny)
    shutil.copytree(tiny, tmp_path / "five")
    (tmp_path / "five" / "preprocessor_config.json").rename(tmp_path / "five" / "processor_config.json")
    load.verify_model(tmp_path / "five")  # as transformers 5 saves it


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "preprocessor_config.json", SHARD, "model-00001-of-00002.safetensors"],
)
def test_a_missing_file_is_named_with_the_command_that_mends_it(model, name):
    (model / name).unlink()
    refused(lambda: load.verify_model(model), name, "python load.py Org/Tiny")


def test_one_byte_short_or_long_is_seen(model):
    data = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(data[:-1])
    refused(lambda: load.verify_model(model), SHARD, "is not whole")
    (model / SHARD).write_bytes(data + b"\0")
    refused(lambda: load.verify_model(model), SHARD, "is not whole")
    for broken in (b"", data[:5], b"\xff" * 100, b"<html>not found</html>" * 9, data[:40]):
        (model / SHARD).write_bytes(broken)
        refused(lambda: load.verify_model(model), SHARD)


def test_a_tensor_missing_from_its_shard_is_seen(model):
    rewrite_header(model / SHARD, lambda header: header.update({"renamed": header.pop("model.norm.weight", None)}))
    if "model.norm.weight" not in json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]:
        pytest.fail("the layout lost model.norm.weight")
    refused(lambda: load.verify_model(model), SHARD)


def test_a_broken_json_is_named(model):
    (model / "config.json").write_text('{"model_type": ')
    refused(lambda: load.verify_model(model), "config.json", "python load.py Org/Tiny")


def test_tokenizer_may_be_vocab_and_merges(model):
    (model / "tokenizer.json").unlink()
    load.verify_model(model)
    (model / "merges.txt").unlink()
    refused(lambda: load.verify_model(model), "merges.txt")


def test_check_reports_every_model_and_exits_1(tiny, tmp_path, capsys):
    root = str(tiny.parent.parent)
    load.main(["--check", "--root", root, NAME])
    with pytest.raises(SystemExit) as stop:
        load.main(["--check", "--root", root, "Org/None", NAME])
    assert stop.value.code == 1
    assert "Org/None" in capsys.readouterr().err


def test_the_command_that_mends_says_where(tiny, tmp_path):
    refused(
        lambda: load.verify_model(tmp_path / "disk" / "Org" / "Gone"), f"load.py Org/Gone --root {tmp_path / 'disk'}`"
    )
    lost = tmp_path / "disk" / "models" / "demo" / "clip"
    refused(lambda: load.verify_model(lost), f"load.py --preset demo --root {tmp_path / 'disk'}`")
    refused(lambda: load.verify_model(tmp_path / "models" / "epoch_5"), "python load.py FILE.pt")
    refused(lambda: load.verify_model("/nowhere"), "no model in /nowhere")


def test_bert_vocabulary_needs_no_settings(tmp_path):
    """Chinese-CLIP is published with its vocab.txt alone."""
    folder = write_clip(tmp_path / "hub" / "OFA-Sys" / "chinese", "chinese_clip")
    assert not (folder / "tokenizer_config.json").exists()
    with Hub({"OFA-Sys/chinese": folder}) as hub:
        made = fetch(hub, tmp_path / "here", "huggingface", "OFA-Sys/chinese")
    assert DualEncoder.from_pretrained(made).embed_texts(["一片农田"]).shape == (1, 24)


# --- the choice of files ---


def test_safetensors_are_taken_and_their_duplicates_left():
    names = """config.json vocab.json merges.txt model.safetensors pytorch_model.bin pytorch_model.bin.index.json
    tf_model.h5 flax_model.msgpack onnx/model.onnx README.md a/config.json"""
    sizes = dict.fromkeys(names.split(), 1)
    assert set(load.choose_files(sizes)) == {"config.json", "vocab.json", "merges.txt", "model.safetensors"}
    del sizes["model.safetensors"]
    assert {"pytorch_model.bin", "pytorch_model.bin.index.json"} <= set(load.choose_files(sizes))


# --- both hubs, through their real clients ---


@pytest.mark.parametrize("source", HUBS)
def test_full_download_and_a_second_run_asks_nothing(tiny, tmp_path, source):
    (tiny / "pytorch_model.bin").write_bytes(b"a duplicate")
    try:
        with Hub({NAME: tiny}) as hub:
            folder = fetch(hub, tmp_path, source)
            assert not hub.fetched("pytorch_model.bin")
            asked = len(hub.log)
            assert fetch(hub, tmp_path, source) == folder
            assert len(hub.log) == asked
    finally:
        (tiny / "pytorch_model.bin").unlink()
    for path in tiny.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.fixture(scope="session")
def big(tiny, tmp_path_factory) -> Path:
    """The same with a shard of 24 MB: Hugging Face's client writes in pieces of 10 MB."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("big") / "Tiny"))
    save_file(load_file(folder / SHARD) | {"filler": torch.arange(6_000_000)[::1].float()}, folder / SHARD)
    return folder


@pytest.mark.parametrize("source", HUBS)
def test_a_broken_download_is_resumed_by_the_next_run(big, tmp_path, source, no_waiting):
    with Hub({NAME: big}) as hub:
        hub.cut[SHARD] = [15_000_000] + [0] * 40  # every retry of the first run is cut too
        refused(lambda: fetch(hub, tmp_path, source), "broke", "run the same command again")
        refused(lambda: load.verify_model(tmp_path / NAME), SHARD)
        hub.cut.clear()
        hub.log.clear()
        folder = fetch(hub, tmp_path, source)
        assert not hub.fetched("model-00001-of-00002.safetensors")  # finished files are not fetched again
        (span,) = hub.fetched(SHARD)
        start = int(span.removeprefix("bytes=").split("-")[0])
        assert start >= 10_000_000
    assert (folder / SHARD).read_bytes() == (big / SHARD).read_bytes()


@pytest.mark.parametrize("source", HUBS)
def test_a_shard_cut_short_on_disk_is_fetched_again(tiny, tmp_path, source):
    with Hub({NAME: tiny}) as hub:
        folder = fetch(hub, tmp_path, source)
        (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-9])
        hub.log.clear()
        fetch(hub, tmp_path, source)
        assert len(hub.fetched(SHARD)) == 1 and not hub.fetched("model-00001-of-00002.safetensors")
    load.verify_model(folder)


@pytest.mark.parametrize("source", HUBS)
def test_refusals_are_one_line_that_says_what_to_do(tiny, tmp_path, source, no_waiting):
    token = "HF_TOKEN" if source == "huggingface" else "MODELSCOPE_API_TOKEN"
    with Hub({NAME: tiny}) as hub:
        refused(lambda: fetch(hub, tmp_path, source, "Org/None"), "no model Org/None", "spelling")
        hub.status = {NAME: 401}
        refused(lambda: fetch(hub, tmp_path, source), "token", token)
        hub.status = {NAME: 403}
        refused(lambda: fetch(hub, tmp_path, source), "gated", "--token", token)
        hub.status = {NAME: 500}
        refused(lambda: fetch(hub, tmp_path, source), "answers 500")
        assert not (tmp_path / NAME).exists()
        hub.status = {SHARD: 403}  # the usual form: the listing is public, the weights are not
        refused(lambda: fetch(hub, tmp_path, source), "gated", "--token", token)
    host = f"127.0.0.1:{free_port()}"  # no one listens there
    hub.url = f"http://{host}"
    refused(lambda: fetch(hub, tmp_path / "b", source), "no network", host)
    shutil.copytree(tiny, tmp_path / "c" / NAME, ignore=shutil.ignore_patterns(SHARD))  # half there, and no network:
    refused(lambda: fetch(hub, tmp_path / "c", source), "no network", host)  # the client alone would call it done


@pytest.mark.parametrize("source", HUBS)
def test_wrong_bytes_and_missing_shards_on_the_hub(tiny, tmp_path, source, no_waiting):
    with Hub({NAME: tiny}) as hub:
        hub.corrupt.add(SHARD)
        refused(lambda: fetch(hub, tmp_path, source, waits=(0,)), "Org/Tiny", "run the")
        assert len(hub.fetched(SHARD)) >= 2  # tried again, and not believed
        assert not (tmp_path / NAME / SHARD).exists()
        hub.corrupt.clear()
        hub.hidden.add(SHARD)
        refused(lambda: fetch(hub, tmp_path, source), SHARD, "try another --source")
        hub.hidden.clear()
        load.verify_model(fetch(hub, tmp_path, source))


@pytest.mark.parametrize("source", HUBS)
def test_a_repository_with_only_pytorch_bins(tiny, tmp_path, source):
    old = Path(shutil.copytree(tiny, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors*")))
    state = {k: v for shard in sorted(tiny.glob("*.safetensors")) for k, v in load_file(shard).items()}
    tied = state["model.embed_tokens.weight"]
    torch.save({**state, "lm_head.weight": tied, "x.position_ids": torch.arange(3)}, old / "pytorch_model.bin")
    with Hub({NAME: old}) as hub:
        folder = fetch(hub, tmp_path, source)
    assert not list(folder.glob("*.bin"))
    got = load_file(folder / "model.safetensors")
    assert set(got) == {*state, "lm_head.weight"} and all(torch.equal(got[k], v) for k, v in state.items())


def test_modelscope_knows_openai_by_another_name(tiny, tmp_path):
    with Hub({"openai-mirror/tiny": tiny}) as hub:
        assert fetch(hub, tmp_path, "modelscope", "openai/tiny") == tmp_path / "openai/tiny"


def test_disk_full_is_said_before_and_during(tiny, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with Hub({NAME: tiny}) as hub:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
            refused(lambda: fetch(hub, tmp_path, "modelscope"), "disk full", "--root")
            refused(lambda: load.copy_model(NAME, tiny, tmp_path), "disk full", "--root")
        assert not hub.fetched(SHARD) and not (tmp_path / NAME).exists()

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("modelscope_hub._download._finish_download", full)  # the real client, a full disk
        refused(lambda: fetch(hub, tmp_path, "modelscope"), "disk full while writing")
        monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
        refused(lambda: fetch(hub, tmp_path / "b", "huggingface"), "disk full while writing")


# --- a folder copied from elsewhere ---


@pytest.mark.parametrize(
    "place",
    ["Org/Tiny-1.5", "Tiny-1.5", ".", "Org/Tiny-1___5", "models--Org--Tiny-1.5/snapshots/abc"],
)
def test_a_copied_folder_is_found_and_verified(tiny, tmp_path, place):
    shutil.copytree(tiny, tmp_path / "usb" / place, dirs_exist_ok=True)
    load.main(["--source", str(tmp_path / "usb"), "--root", str(tmp_path), "Org/Tiny-1.5"])
    load.verify_model(tmp_path / "Org/Tiny-1.5")


def test_a_broken_copy_leaves_nothing_and_spares_what_is_there(tiny, model, tmp_path):
    usb = Path(shutil.copytree(tiny, tmp_path / "usb"))
    (usb / SHARD).write_bytes(b"short")
    (model / "config.json").unlink()
    before = sorted(path.name for path in model.iterdir())
    refused(lambda: load.copy_model(NAME, usb, tmp_path), SHARD, "copy that folder again")
    assert sorted(path.name for path in model.iterdir()) == before
    assert [path.name for path in model.parent.iterdir()] == ["Tiny"]
    shutil.copy(tiny / SHARD, usb)
    load.verify_model(load.copy_model(NAME, usb, tmp_path))  # and mends what was broken
    assert [path.name for path in model.parent.iterdir()] == ["Tiny"]
    refused(lambda: load.copy_model("Org/Other", tmp_path, tmp_path), "Org/Other", "config.json")


def test_a_copy_of_old_weights_that_lacks_a_file_names_the_source(tiny, tmp_path):
    usb = Path(shutil.copytree(tiny, tmp_path / "usb", ignore=shutil.ignore_patterns("*.safetensors*")))
    torch.save(load_file(tiny / SHARD), usb / "pytorch_model.bin")
    (usb / "tokenizer_config.json").unlink()
    lacking = f"{usb / 'tokenizer_config.json'} is missing: copy that folder again"
    refused(lambda: load.copy_model(NAME, usb, tmp_path), lacking)
    assert not list((tmp_path / NAME).parent.iterdir())


def test_a_model_that_another_process_copies_is_not_copied_beside_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("config.time.sleep", lambda _: None)  # the wait for one that was killed
    with whole_folder(tmp_path / NAME) as other:
        refused(lambda: load.copy_model(NAME, tiny, tmp_path), "another process is writing it; wait for its end")
        assert other.is_dir(), "it is the other's"
        shutil.copytree(tiny, other, dirs_exist_ok=True)
    assert load.copy_model(NAME, tiny, tmp_path) == tmp_path / NAME


# --- the official layout, and the demo bases ---


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("tie", [True, False])
def test_official_layout_loads_without_a_missing_key(tmp_path, family, tie):
    import transformers

    folder = write_qwen_vl(tmp_path / family, family, tie=tie)
    keys = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    fc = "visual.blocks.0.mlp.gate_proj.weight" if family == "qwen2_5_vl" else "visual.blocks.0.mlp.fc1.weight"
    assert {fc, "visual.merger.ln_q.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"} <= keys
    assert ("lm_head.weight" in keys) == (not tie)
    config = json.loads((folder / "config.json").read_text())
    assert "text_config" not in config and config["rope_scaling"]["type"] == "mrope"
    model, info = getattr(transformers, config["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == model.config.image_token_id < config["vocab_size"]
    for text in [*TEXT, "Ünbekannt 🛰️ 未知", "<|im_start|>user\nhi<|im_end|>\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def write_demo_texts(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"image": f"{i}.tif", "caption": f"{n} red roofs beside a lake"} for i, n in enumerate(["one", "two", "six"])
    ]
    for name in ("captions_en.json", "captions_zh.json"):
        zh = [{**row, "caption": "湖边有红色的屋顶。"} for row in rows]
        (folder / name).write_text(json.dumps(rows if "en" in name else zh), encoding="utf-8")
    questions = [{"id": i, "img_id": 0, "question": "Is there a lake?", "answers_ids": [i]} for i in range(8)]
    answers = [{"id": i, "question_id": i, "answer": "yes"} for i in range(8)]
    (folder / "rsvqa_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "rsvqa_answers.json").write_text(json.dumps({"answers": answers}))
    return folder


def test_demo_bases(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel, CLIPTokenizer
    from transformers import Qwen2_5_VLForConditionalGeneration as QwenVL

    out, data = tmp_path / "models" / "demo", tmp_path / "data"
    refused(lambda: load.build_demo_bases(data, out), "python demo_data.py")
    write_demo_texts(data)
    monkeypatch.setitem(
        demo_bases.DEMO_SIZES, "train", {"steps": 25, "batch": 4, "length": 32, "lr": 1e-2, "muon_lr": 0.02}
    )
    state = torch.random.get_rng_state()
    built = load.build_demo_bases(data, out)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers are left alone
    for name in ("qwen2_5_vl", "qwen3"):
        before, after = built["measured"][name]["nats_per_token"]
        assert after < 0.7 * before
    assert sorted(path.name for path in out.iterdir()) == ["clip", "demo_bases.json", "qwen2_5_vl", "qwen3"]
    for name, cls in {"qwen2_5_vl": QwenVL, "qwen3": AutoModelForCausalLM, "clip": CLIPModel}.items():
        load.verify_model(out / name)
        _, info = cls.from_pretrained(out / name, output_loading_info=True)
        assert not any(info.values()), info
    ask = [{"role": "user", "content": "湖 lake?"}]
    qwen3 = AutoTokenizer.from_pretrained(out / "qwen3")
    quick = qwen3.apply_chat_template(ask, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert quick == "<|im_start|>user\n湖 lake?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    see = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "lake?"}]}]
    shown = AutoTokenizer.from_pretrained(out / "qwen2_5_vl").apply_chat_template(see, tokenize=False)
    assert shown.endswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>lake?<|im_end|>\n")
    clip = CLIPTokenizer.from_pretrained(out / "clip")
    assert clip.decode(clip("A  LAKE 湖")["input_ids"], skip_special_tokens=True) == "a lake 湖"

    def bytes_of():
        return {path: path.read_bytes() for path in out.rglob("*.safetensors")}

    first = bytes_of()
    assert not load.build_demo_bases(data, out)["rebuilt"]
    (out / "qwen3" / "model.safetensors").unlink()  # a broken base is rebuilt, to the same bytes
    assert load.build_demo_bases(data, out)["rebuilt"] and bytes_of() == first

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo_bases, "_write_clip", fail)
    refused(lambda: load.build_demo_bases(data, out, seed=1), "No space left")
    assert bytes_of() == first and sorted(p.name for p in out.iterdir())[0] == "clip"


def test_what_lies_where_in_a_scene():
    line = {"kind": "road", "width": 20, "points": [[50, -5], [50, 205]]}  # north to south, in the west
    tank = {"kind": "tank", "x": 150, "y": 30, "w": 25, "l": 25, "angle": 0}
    pond = {"kind": "pond", "x": 150, "y": 150, "w": 10, "l": 100, "angle": 90}  # lies from west to east
    row = {"width": 200, "height": 200, "objects": [tank, pond, {**tank, "x": 155}], "clouds": [], "lines": [line]}
    kinds = ["pond", "road", "tank"]
    scenes = demo_bases.Scenes([row], [np.zeros((112, 112, 3), np.uint8)], [0], ["desert"], kinds, [0], [0])
    there, number, share = scenes.grid(0, 4).transpose(2, 3, 0, 1)  # (kinds, 4, 4) each
    assert number[2, 0].tolist() == [0, 0, 0, 2] and number[2].sum() == 2 and number[1].sum() == 0
    assert there[1].tolist() == [[1, 1, 0, 0]] * 4 and there[2, 0, 3] == there[0, 3, 3] == 1
    assert share[1, 0, 0] == pytest.approx(0.2, abs=0.05) and share[0, 3].argmax() in (2, 3) and share[0, :2].sum() == 0
    assert share[0].sum() * 50 * 50 == pytest.approx(1000, rel=0.4)  # drawn in pixels of 1.8
    part, whole = scenes.grid(0, 2, (0.5, 0, 0.5)), scenes.grid(0, 4)[:2, 2:]  # the quarter in the northeast
    assert (part[:, :, :2] == whole[:, :, :2]).all() and np.allclose(part, whole, atol=0.1)


def test_joined_quarters():
    pictures = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    source = np.array([[[0, 1], [1, 0]], [[1, 1], [1, 1]]])
    made = demo_bases._joined(pictures, source)
    assert (made[1] == pictures[1]).all()
    assert (made[0, :2, :2] == pictures[0, :2, :2]).all() and (made[0, :2, 2:] == pictures[1, :2, 2:]).all()
    assert (made[0, 2:, :2] == pictures[1, 2:, :2]).all() and (made[0, 2:, 2:] == pictures[0, 2:, 2:]).all()


def test_muon_steps_are_orthogonal_and_the_same_in_a_batch():
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in [(8, 24), (24, 8), (8, 24), (8, 8)]]
    gradients = [torch.randn(start.shape) for start in starts]

    def step(chosen):
        matrices = [torch.nn.Parameter(starts[i].clone()) for i in chosen]
        for matrix, i in zip(matrices, chosen):
            matrix.grad = gradients[i]
        with torch.no_grad():
            demo_bases._Muon(matrices, 0.5).step(1.0)
        return matrices

    for i, matrix in enumerate(step(range(4))):
        assert torch.allclose(matrix, step([i])[0], atol=1e-5)
        change = (starts[i] * (1 - 0.005) - matrix) / 0.5 / max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
        values = torch.linalg.svdvals(change)
        assert values.min() > 0.3 and values.max() < 1.3
        assert (change * gradients[i]).sum() > 0  # downhill


def test_towers_learn_from_scenes(tmp_path, monkeypatch):
    """A few steps on a few scenes: what is measured, and that the pixels are those of CLIP's own processor."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    import demo_data

    data, seen = tmp_path / "data", []
    demo_data.generate(data, 20, 0)
    for stage in ("train", "vision_train", "clip_train", "grounding", "reading"):
        monkeypatch.setitem(demo_bases.DEMO_SIZES[stage], "steps", 3)
        monkeypatch.setitem(demo_bases.DEMO_SIZES[stage], "batch", 4)
    forward = CLIPVisionModel.forward
    monkeypatch.setattr(CLIPVisionModel, "forward", lambda self, x, **more: seen.append(x) or forward(self, x, **more))
    measured = load.build_demo_bases(data, tmp_path / "demo")["measured"]
    assert {"nats_per_token", "cover_accuracy", "count_accuracy", "object_f1", "chat_accuracy"} == set(
        measured["qwen2_5_vl"]
    )
    before, after = measured["qwen3"]["reading_nats_per_token"]
    assert after < before
    rows = [{"image": f"images/scene_{n:05d}.tif", "caption": "一个全新的棒球场。", "split": "train"} for n in range(3)]
    rows.append({"image": "images/scene_00003.tif", "caption": "几架滑翔机。", "split": "test"})
    (data / "mine.json").write_text(json.dumps(rows))
    made = load.build_demo_bases(data, tmp_path / "own", more=data / "mine.json")
    assert made["rebuilt"] and len(made["measured"]["qwen2_5_vl"]) == 5
    for name, own, common in (("demo", False, True), ("own", True, True)):
        words = AutoTokenizer.from_pretrained(tmp_path / name / "qwen2_5_vl")
        assert (len(words("棒球场")["input_ids"]) == 1) == own and (len(words("公路")["input_ids"]) == 1) == common
    assert len(words("滑翔机")["input_ids"]) > 3, "a held-out text stays unseen"
    assert {"cover_accuracy", "count_accuracy", "object_f1", "vector"} == set(measured["clip"])
    kinds = [*demo_data.KINDS, *demo_data.LINES, "cloud"]
    assert set(measured["clip"]["object_f1"]) == set(measured["clip"]["vector"]["object_f1"]) == set(kinds)
    scenes = demo_bases.demo_scenes(data, 112)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "demo" / "clip")
    ours = processor([Image.fromarray(scenes.pictures[i]) for i in scenes.held], return_tensors="pt")["pixel_values"]
    assert torch.allclose(seen[-1], ours, atol=1e-5)

    # The table of words that the captioner's language model learns to read: each square's own.
    word_of = {kind: number for number, kind in enumerate([*scenes.covers, *scenes.kinds])}
    for number, row in enumerate(scenes.rows):
        table = demo_bases._inventory(scenes, number, 8, word_of)
        lying: dict = {}
        for o in row["objects"]:
            lying.setdefault((int(o["y"] / row["height"] * 8), int(o["x"] / row["width"] * 8)), set()).add(
                word_of[o["kind"]]
            )
        assert all(table[square] in words for square, words in lying.items())
        there = {row["cover"], *(o["kind"] for o in row["objects"]), *(x["kind"] for x in row["lines"])}
        assert (
            {word_of[kind] for kind in there | {"cloud"}}
            >= set(table.ravel().tolist())
            >= {word_of[line["kind"]] for line in row["lines"]}
        )


# --- the command line ---


def run(*arguments):
    command = [sys.executable, str(Path(load.__file__)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_heavy_and_mistakes_are_one_line(tmp_path):
    assert "--source" in run("--help").stdout
    code = "import sys, load; print(*[m for m in ('torch', 'transformers', 'modelscope') if m in sys.modules])"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(load.__file__).parent)
    assert alone.stdout.strip() == "" and alone.returncode == 0
    for arguments, words in {
        ("noslash",): "ORG/NAME",
        ("--source", str(tmp_path / "nowhere"), NAME): "neither",
        ("--preset", "demo", "--data", str(tmp_path), "--root", str(tmp_path)): "python demo_data.py",
    }.items():
        done = run(*arguments)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


# --- checkpoints of open_clip ---


class OpenClip(torch.nn.Module):
    """open_clip's CLIP with a ViT, in its own names and with torch's own attention, as plainly as can be written."""

    def __init__(self, width=32, layers=3, patch=14, side=56, words=160, out=24):
        super().__init__()
        self.visual = torch.nn.Module()
        self.visual.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        self.visual.class_embedding = torch.nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = torch.nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))
        self.visual.ln_pre, self.visual.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.visual.transformer, self.transformer = (self.blocks(width, layers) for _ in range(2))
        self.visual.proj = torch.nn.Parameter(torch.randn(width, out))
        self.token_embedding = torch.nn.Embedding(words, width)
        self.positional_embedding = torch.nn.Parameter(torch.randn(77, width))
        self.ln_final = torch.nn.LayerNorm(width)
        self.text_projection = torch.nn.Parameter(torch.randn(width, out))
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))
        self.register_buffer("attn_mask", torch.full((77, 77), float("-inf")).triu(1))
        for weight in self.parameters():  # norms and biases are ones and zeros otherwise, and would prove nothing
            torch.nn.init.normal_(weight, std=0.3)

    @staticmethod
    def blocks(width, layers):
        tower = torch.nn.Module()
        tower.resblocks = torch.nn.ModuleList()
        for _ in range(layers):
            block = torch.nn.Module()
            block.ln_1, block.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
            block.attn = torch.nn.MultiheadAttention(width, 2, batch_first=True)
            block.mlp = torch.nn.Module()
            block.mlp.c_fc, block.mlp.c_proj = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)
            tower.resblocks.append(block)
        return tower

    @staticmethod
    def run(tower, x, mask=None):
        for block in tower.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = block.mlp.c_fc(block.ln_2(x))
            x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))  # QuickGELU
        return x

    def encode_image(self, pixels):
        v = self.visual
        x = v.conv1(pixels).flatten(2).mT
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        return v.ln_post(self.run(v.transformer, v.ln_pre(x))[:, 0]) @ v.proj

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.run(self.transformer, x, self.attn_mask))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


@pytest.fixture
def checkpoint(tmp_path):
    """(an open_clip model, its state dict in a file, the base it fits)"""
    torch.manual_seed(0)
    model = OpenClip().eval()
    torch.save(model.state_dict(), tmp_path / "Remote-ViT.pt")
    return model, tmp_path / "Remote-ViT.pt", write_clip(tmp_path / "org" / "clip-base")


def test_an_open_clip_checkpoint_gives_the_same_vectors(checkpoint, tmp_path, capsys):
    model, path, _ = checkpoint
    load.main([str(path), "--like", "org/clip-base", "--root", str(tmp_path)])
    folder = tmp_path / "models" / "Remote-ViT"
    assert "width 32 with patches of 14" in capsys.readouterr().out
    towers, report = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels, ids = torch.randn(2, 3, 56, 56), torch.randint(3, 150, (2, 77))
    ids[0, 9], ids[1, 76] = 159, 159  # the end of the text
    with torch.no_grad():
        images = towers.get_image_features(pixel_values=pixels).pooler_output
        texts = towers.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(images, model.encode_image(pixels), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(texts, model.encode_text(ids), rtol=1e-4, atol=1e-4)
    assert towers.logit_scale == model.logit_scale
    encoder = DualEncoder.from_pretrained(folder)
    assert encoder.embed_texts(["a farm field"]).shape == (1, 24)


def test_other_forms_of_the_same_checkpoint(checkpoint, tmp_path):
    """Of training on several GPUs; in safetensors; in half precision with the buffers of OpenAI's own code."""
    model, _, base = checkpoint
    model.half()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    numbers = {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | numbers, tmp_path / "plain.pt")
    torch.save({"epoch": 5, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_5.pt")
    save_file(state, tmp_path / "open_clip_model.safetensors")
    made = []
    for name in ("plain.pt", "epoch_5.pt", "open_clip_model.safetensors"):
        folder = load.convert_open_clip(tmp_path / name, tmp_path / "from" / name, str(base))
        made.append((folder / "model.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]
    got = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}, "what the base's config says"
    assert torch.equal(got["visual_projection.weight"], model.visual.proj.T.float())


@pytest.mark.parametrize("source", HUBS)
def test_a_checkpoint_on_a_hub_is_brought_and_converted(checkpoint, tmp_path, source):
    _, path, base = checkpoint
    (tmp_path / "published" / "ckpt").mkdir(parents=True)
    path.rename(tmp_path / "published" / "ckpt" / "RS_ViT.pt")
    with Hub({"Org/GeoCLIP": tmp_path / "published"}) as hub:
        where = ["--source", source, "--endpoint", hub.url, "--root", str(tmp_path / "here")]
        refused(lambda: load.main(["Org/GeoCLIP", *where]), "python load.py Org/GeoCLIP/ckpt/RS_ViT.pt")
        refused(lambda: load.main(["Org/GeoCLIP/none.pt", *where]), "no none.pt", "ckpt/RS_ViT.pt")
        load.main(["Org/GeoCLIP/ckpt/RS_ViT.pt", "--like", str(base), *where])
        hub.log.clear()
        refused(lambda: load.main(["Org/GeoCLIP/ckpt/RS_ViT.pt", *where]), "RS_ViT is there already")
        assert not hub.log
    load.verify_model(tmp_path / "here" / "Org" / "RS_ViT")


def test_check_of_a_checkpoint(checkpoint, tmp_path, capsys):
    _, path, _ = checkpoint
    command = [str(path), "--like", "org/clip-base", "--root", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        load.main([*command, "--check"])
    assert stop.value.code == 1 and "NOT OK" in capsys.readouterr().err
    load.main(command)
    load.main([*command, "--check"])
    assert f"whole    {tmp_path / 'models' / 'Remote-ViT'}" in capsys.readouterr().out
    refused(lambda: load.main([str(tmp_path / "runs" / "x.pt")]), "no such file")


def test_checkpoints_that_cannot_be_converted(checkpoint, tmp_path):
    model, _, base = checkpoint

    def convert(state, like=str(base)):
        torch.save(state, tmp_path / "x.pt")
        return lambda: load.convert_open_clip(tmp_path / "x.pt", tmp_path / "out", like, tmp_path)

    state = model.state_dict()
    resnet = {k: v for k, v in state.items() if "visual" not in k} | {
        "visual.layer4.0.conv1.weight": state["logit_scale"]
    }
    refused(convert(resnet), "x.pt", "a ResNet")
    refused(convert({"a": state["logit_scale"]}), "no checkpoint of open_clip's CLIP")
    refused(convert(state, None), "name the base", "--like")
    large = state | {
        "visual.conv1.weight": torch.zeros(768, 3, 32, 32),
        "visual.positional_embedding": torch.zeros(50, 768),
    }
    refused(convert(large, None), "224 a side", "run `python load.py openai/clip-vit-base-patch32` first")
    refused(convert(large), "does not fit", "--like")
    refused(convert(state | {"extra": state["logit_scale"]}), "in 1 tensors", "extra is [] in it and missing there")
    refused(convert({"epoch": 3}), "x.pt cannot be read", "epoch in it is no tensor")
    (tmp_path / "x.pt").write_bytes(b"PK nonsense")
    refused(lambda: load.convert_open_clip(tmp_path / "x.pt", tmp_path / "out", str(base)), "x.pt cannot be read")
    refused(lambda: load.main([str(tmp_path / "none.pt"), "--source", str(tmp_path)]), "none.pt: no such file")
    (tmp_path / "kept").mkdir()
    refused(lambda: load.convert_open_clip(tmp_path / "x.pt", tmp_path / "kept", str(base)), "kept is there already")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".copying*"))
