"""translation_en2zh.py: what a server can do wrong, kills, every check of a text, rows that training reads."""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import translation_en2zh as script
from config import user_errors
from scenes import read_conversations
from tests.conftest import free_port
from tests.processes import forked, transformers_serve

ROOT = Path(__file__).parents[1]
GLOSSARY = script.read_glossary(str(script.PROMPTS / "glossary_zh.json"))


# ----------------------------------------------------------------------------------------------------
# A server that translates the captions of `english`, and breaks on demand


def english(number: int) -> str:
    return f"Two white planes are parked in the northeast of the airport with {number} buildings."


def chinese(number: int) -> str:
    return f"机场东北部停着两架白色飞机，还有{number}栋建筑。"


BAD_TEXTS = {
    "refusal": "抱歉，作为AI语言模型，我无法翻译这些内容。",
    "meta": "以下是翻译：{}",
    "dropped": "机场东北部停着白色飞机，还有一些建筑。",
    "direction": "机场西南部停着两架白色飞机，还有{n}栋建筑。",
    "colour": "机场东北部停着两架红色飞机，还有{n}栋建筑。",
    "english": "机场东北部停着两架白色planes，还有{n}栋建筑和飞机。",
    "classifier": "机场东北部停着两白色飞机，还有{n}栋建筑。",
    "short": "机场。",
    "same": "机场东北部停着两架白色飞机，还有7栋建筑。",
}


class Server:
    """`with Server() as server: ...` -> `server.url`.

    plan       {number: [fault, ...]}  what to do wrong at each request about the captions of that number ("ok": nothing)
    sent_back  numbers that get a bad answer to their first message, whenever it comes
    status     (code, message) of every answer
    seen       counts requests by their messages; asked: by their number
    """

    def __init__(self):
        self.plan: dict[int, list[str]] = {}
        self.sent_back: set[int] = set()
        self.seen, self.asked, self.fill = Counter(), Counter(), 0
        self.times: list[float] = []
        self.bodies: list[dict] = []
        self.under_way = self.most = 0
        self.status: tuple[int, str] | None = None
        self.lock, self.stop, self.told = threading.Lock(), threading.Event(), threading.Event()

    def __enter__(self):
        outer = self

        class Handler(_Handler):
            server_of_test = outer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.stop.set()
        self.http.shutdown()
        self.http.server_close()

    def total(self) -> int:
        return sum(self.seen.values())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *words):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # a client that was killed
            super().handle()

    def do_POST(self):
        server = self.server_of_test
        data = self.rfile.read(size := int(self.headers["content-length"]))
        if len(data) < size:  # its client was killed
            self.close_connection = True
            return
        body = json.loads(data)
        text = body["messages"][0]["content"]
        number = int(re.search(r"with (\d+) buildings", text)[1])
        with server.lock:
            server.seen[json.dumps(body["messages"])] += 1
            step = server.asked[number]
            server.asked[number] += 1
            server.times.append(time.monotonic())
            server.bodies.append(body | {"path": self.path, "key": self.headers["authorization"]})
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            end = time.monotonic() + 10
            while server.most < server.fill and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.1 if server.fill else 0)  # one too many would come now
            steps = server.plan.get(number, [])
            fault = "dropped" if number in server.sent_back and len(body["messages"]) == 1 else "ok"
            self.act(steps[step] if step < len(steps) else fault, number)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.under_way -= 1

    def act(self, fault: str, number: int):
        server = self.server_of_test
        if server.status:
            return self.send(server.status[0], json.dumps({"error": {"message": server.status[1], "code": "x"}}))
        if fault.startswith("429"):
            self.send(429, '{"error": {"message": "slow down"}}', {"Retry-After": fault[4:]} if fault[4:] else {})
            server.told.set()
            return None
        if fault.isdigit():
            return self.send(int(fault), json.dumps({"error": {"message": f"planted {fault}"}}))
        if fault == "newer" and "max_tokens" in server.bodies[-1]:
            said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            return self.send(400, json.dumps({"error": {"message": said, "code": "unsupported_parameter"}}))
        if fault == "loop":
            return self.send(307, "", {"Location": self.path})
        if fault == "slow":
            server.stop.wait(5)
            self.close_connection = True
            return None
        if fault == "drip":  # never silent for long, and never done
            self.send_response(200)
            self.send_header("Content-Length", "99")
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b" ")
                server.stop.wait(0.1)
            self.close_connection = True
            return None
        if fault == "late":  # 0.4 s after another was told to wait
            server.told.wait(60)
            server.stop.wait(0.4)
        if fault == "malformed":
            return self.send(200, '{"choices": [{"message"')
        if fault == "half":  # of a surrogate pair, where a server cut the text
            return self.send(200, '{"choices": [{"message": {"content": "一片农田\\ud83d"}}]}')
        if fault == "page":
            return self.send(200, "<html>gateway</html>", {"Content-Type": "text/html"})
        text, why, message = chinese(number), "stop", {}
        if fault in BAD_TEXTS:
            text = BAD_TEXTS[fault].replace("{n}", str(number)).replace("{}", text)
        elif fault == "length":
            text, why = text[:12], "length"
        elif fault == "filtered":
            message, why = {"content": None}, "content_filter"
        elif fault == "broken":
            text, why = text[:12], "insufficient_system_resource"
        elif fault == "none":
            message = {"content": None}
        elif fault == "spent":
            text, why = "<think>There are two planes, and the captions say", "length"
        elif fault == "declines":
            message = {"content": None, "refusal": "I'm sorry, I can't help with that."}
        elif fault == "thinks":
            text = f"<think>two planes\n</think>\n\n“{text}”"
        elif fault == "parts":
            message = {"content": [{"type": "thinking", "thinking": "two"}, {"type": "text", "text": text}]}
        elif fault == "tells":  # a proxy that answers 200 with the request's headers
            return self.send(200, f"no such route; {'x' * 150} {self.headers['authorization']}")
        elif fault == "detail":
            text = f"{number}栋建筑旁的机场里，两架白色飞机停在东北部。"
        message = {"role": "assistant", "content": text} | message
        choices = [] if fault == "choices" else [{"index": 0, "finish_reason": why, "message": message}]
        made = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})
        if fault == "cut":  # the connection closes in the middle of the body
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(made)))
            self.end_headers()
            self.wfile.write(made[: len(made) // 2].encode())
            self.close_connection = True
            return None
        return self.send(200, made)

    def send(self, status: int, text: str, headers=None):
        data = text.encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": len(data)} | (headers or {})
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    with Server() as running:
        yield running


def write_input(folder: Path, captions: list[list[str]], split="train", name="captions_en.json") -> Path:
    """Scenes with one tiny image each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    first = folder / "images" / "0.png"
    Image.new("RGB", (56, 56), (90, 160, 60)).save(first)
    for i in range(1, len(captions)):
        path = folder / "images" / f"{i}.png"
        if not path.exists():
            os.link(first, path)
    rows = [{"image": f"{i}.png", "caption": text} | ({"split": split} if split else {})
            for i, texts in enumerate(captions) for text in texts]  # fmt: skip
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def rows_in(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def aside_in(path: Path) -> dict[str, dict]:
    return {row["img"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


@pytest.fixture
def call(call_main, tmp_path, server):
    """`call("--flag", ...) -> (exit code, stdout, stderr)` on captions_en.json of `tmp_path`; a row for each text."""

    def run(*words, url=None):
        given = ["--input", tmp_path / "captions_en.json", "--output", tmp_path / "zh.json"]
        given += ["--base_url", url or server.url, "--model", "m", "--backoff", 0.01, "--questions", 1]
        return call_main(script.main, *given, *words)

    return run


# ----------------------------------------------------------------------------------------------------
# Rows


def test_rows_and_what_is_sent(tmp_path, call, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # no way to a server on this machine
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    write_input(tmp_path, [[english(i), f"An airport with {i} buildings."] for i in range(6)])
    server.plan = {3: ["thinks"]}
    code, out, err = call("--extra", '{"chat_template_kwargs": {"enable_thinking": false}}')
    assert code == 0 and "6 rows of 6 images" in out and "error" not in err
    rows = rows_in(tmp_path / "zh.json")
    questions = script.read_questions(str(script.PROMPTS / "questions_zh.txt"))
    assert [row["img"] for row in rows] == [f"{i}.png" for i in range(6)]
    assert [row["label"] for row in rows] == [chinese(i) for i in range(6)]
    assert {row["split"] for row in rows} == {"train"} and all(
        set(row) == {"img", "prompt", "label", "split"} for row in rows
    )
    assert {row["prompt"] for row in rows} <= set(questions) and len({row["prompt"] for row in rows}) > 1
    sent = server.bodies[0]
    assert sent["path"] == "/v1/chat/completions" and sent["key"] == "Bearer secret" and sent["temperature"] == 0
    assert sent["model"] == "m" and sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert all("airport: 机场" in body["messages"][0]["content"] for body in server.bodies)
    assert all(
        body["messages"][0]["content"].count("buildings") == 2 for body in server.bodies
    )  # both captions, merged

    found = read_conversations(tmp_path / "zh.json")
    assert not found.rejected and [scene.split for scene in found.scenes] == ["train"] * 6
    assert [scene.questions[0].answer for scene in found.scenes] == [row["label"] for row in rows]

    report = rows_in(tmp_path / "zh.json.report.json")
    assert report["rows"] == report["requests"] == 6 and report["cached"] == 0 and report["rejected"] == {}
    assert report["length"] == {"min": len(chinese(0)), "median": len(chinese(0)), "max": len(chinese(0))}
    assert len(report["samples"]) == 5 and not (tmp_path / "zh.json.rejected.jsonl").exists()

    before = (tmp_path / "zh.json").read_bytes()
    code, out, _ = call("--extra", '{"chat_template_kwargs": {"enable_thinking": false}}')
    assert code == 0 and server.total() == 6 and (tmp_path / "zh.json").read_bytes() == before
    assert rows_in(tmp_path / "zh.json.report.json")["cached"] == 6 and "6 answers from the cache, 0 requests" in out
    call("--seed", "5", "--questions", "3", "--extra", '{"chat_template_kwargs": {"enable_thinking": false}}')
    more = rows_in(tmp_path / "zh.json")
    assert server.total() == 6 and len(more) == 18 and len({(row["img"], row["prompt"]) for row in more}) == 18
    call("--temperature", "0.5")  # another sampling is another answer
    assert server.total() == 12


def test_each_caption_by_itself(tmp_path, call, server):
    write_input(tmp_path, [[english(2 * i), english(2 * i + 1)] for i in range(3)], split=None)
    code, out, _ = call("--each")
    rows = rows_in(tmp_path / "zh.json")
    assert code == 0 and [row["label"] for row in rows] == [chinese(i) for i in range(6)]
    assert [row["img"] for row in rows] == ["0.png", "0.png", "1.png", "1.png", "2.png", "2.png"]
    assert all("split" not in row for row in rows) and "6 rows of 3 images" in out
    assert all(rows[i]["prompt"] != rows[i + 1]["prompt"] for i in (0, 2, 4))
    assert len(read_conversations(tmp_path / "zh.json").scenes) == 3


def test_images_are_found_from_another_folder(tmp_path, call_main, server):
    source = write_input(tmp_path / "in", [[english(0)]])
    (tmp_path / "out").mkdir()
    words = [
        "--input",
        source,
        "--output",
        tmp_path / "out" / "zh.jsonl",
        "--base_url",
        server.url,
        "--model",
        "m",
        "--questions",
        1,
    ]
    assert call_main(script.main, *words)[0] == 0
    (scene,) = read_conversations(tmp_path / "out" / "zh.jsonl").scenes
    assert scene.image == str(tmp_path / "in" / "images" / "0.png")
    write_input(tmp_path / "out", [[]])  # another image of that name lies there
    assert call_main(script.main, *words)[0] == 0 and server.total() == 1
    (scene,) = read_conversations(tmp_path / "out" / "zh.jsonl").scenes
    assert scene.image == str(tmp_path / "in" / "images" / "0.png")


def test_rows_and_images_may_be_moved_together(tmp_path, call_main, server):
    folder = tmp_path / "rsicd"
    folder.mkdir()
    source = write_input(folder, [[english(4)]], name="captions.json")
    (folder / "images").rename(folder / "RSICD_images")
    words = ["--input", source, "--image_root", folder / "RSICD_images", "--output", folder / "zh.json"]
    assert call_main(script.main, *words, "--base_url", server.url, "--model", "m")[0] == 0
    folder.rename(tmp_path / "moved")
    (scene,) = read_conversations(tmp_path / "moved" / "zh.json").scenes
    assert scene.image == str(tmp_path / "moved" / "RSICD_images" / "0.png")


@pytest.mark.parametrize("form", ["triplets", "karpathy", "scenes", "folder"])
def test_every_form_of_captions(tmp_path, call_main, server, form):
    source = write_input(tmp_path, [[english(4)]], name="captions.json")
    content = {
        "triplets": [{"image_name": "images/0.png", "positive": english(4), "negative": "A desert."}],
        "karpathy": {"images": [{"filename": "0.png", "filepath": "images", "split": "restval",
                                 "sentences": [{"raw": english(4)}]}]},
        "scenes": [{"image": "0.png", "captions": [english(4)], "zh_answer": "机场。", "split": "test"}],
    }  # fmt: skip
    if form != "folder":
        source.write_text(json.dumps(content[form]))
    given = tmp_path if form == "folder" else source
    words = [
        "--input",
        given,
        "--output",
        tmp_path / "zh.json",
        "--base_url",
        server.url,
        "--model",
        "m",
        "--questions",
        1,
    ]
    assert call_main(script.main, *words)[0] == 0
    (row,) = rows_in(tmp_path / "zh.json")
    (scene,) = read_conversations(tmp_path / "zh.json").scenes
    assert row["label"] == chinese(4) and Path(scene.image).name == "0.png"
    assert row.get("split") == {"triplets": None, "karpathy": "train", "scenes": "test", "folder": "train"}[form]
    assert row["img"] == ("images/0.png" if form in ("triplets", "karpathy") else "0.png")


# ----------------------------------------------------------------------------------------------------
# Faults


def test_every_planted_fault_is_caught_and_counted(tmp_path, call, server):
    server.plan = {
        0: ["429:1", "ok"], 1: ["500"], 2: ["503", "502"], 3: ["slow"], 4: ["cut"], 5: ["malformed"], 6: ["page"],
        7: ["half"], 8: ["choices"], 9: ["none"], 10: ["429"], 20: ["drip"],
        # answers that are sent back once, and come right
        11: ["refusal"], 12: ["dropped"], 13: ["direction"], 14: ["english"], 15: ["colour"], 16: ["length"],
        17: ["meta"], 18: ["classifier"], 19: ["short"], 28: ["declines"],
        # and those that stay wrong
        21: ["refusal"] * 2, 22: ["dropped"] * 2, 23: ["direction"] * 2, 24: ["english"] * 2, 25: ["colour"] * 2,
        26: ["length"] * 2,
        # one request that the server does not take, one that it breaks off, one that its filter stops
        27: ["400"], 29: ["broken"], 30: ["filtered"],
    }  # fmt: skip
    write_input(tmp_path, [[english(i)] for i in range(31)])
    code, out, err = call("--timeout", 3, "--concurrency", 4)
    report = rows_in(tmp_path / "zh.json.report.json")
    assert code == 1 and "1 texts have no answer" in err
    assert report["retries"] == {
        "429": 2,
        "5xx": 3,
        "timeout": 2,
        "connection": 1,
        "malformed body": 3,
        "empty answer": 2,
        "broken off": 1,
    }
    assert report["sent_back"] == {
        "refusal": 3, "number missing": 3, "direction missing": 3, "direction added": 2, "colour missing": 3,
        "colour added": 2, "English left": 2, "cut off": 2, "meta talk": 1, "number without a classifier": 1,
        "too short": 2, "glossary": 1,
    }  # fmt: skip
    aside = aside_in(tmp_path / "zh.json.rejected.jsonl")
    assert set(aside) == {f"{i}.png" for i in (*range(21, 28), 30)} and report["rejected_texts"] == 8
    assert aside["30.png"]["reasons"] == ["content filter"] and "before its first word" not in err
    assert aside["21.png"]["reasons"] == ["refusal"] and aside["26.png"]["reasons"] == ["cut off"]
    assert aside["22.png"]["reasons"] == ["number missing"]
    assert aside["23.png"]["reasons"] == ["direction missing", "direction added"]
    assert aside["24.png"]["reasons"] == ["English left"]
    assert aside["25.png"]["reasons"] == ["colour missing", "colour added"]
    assert aside["27.png"]["reasons"] == ["no answer"] and "planted 400" in aside["27.png"]["details"][0]
    assert aside["25.png"]["earlier"][0]["answer"] == BAD_TEXTS["colour"].replace("{n}", "25")
    assert report["rejected"]["no answer"] == 1 and report["rejected"]["direction added"] == 1
    rows = {row["img"]: row["label"] for row in rows_in(tmp_path / "zh.json")}
    assert rows == {f"{i}.png": chinese(i) for i in range(31) if f"{i}.png" not in aside}
    assert "put aside: " in out and report["requests"] == server.total() == 31 + 14 + 16
    told = [body["messages"] for body in server.bodies if len(body["messages"]) == 3 and "with 13 b" in str(body)]
    assert (
        told[0][1]["content"] == BAD_TEXTS["direction"].replace("{n}", "13")
        and "缺少方位“东北”" in told[0][2]["content"]
    )

    before = server.total()
    code, _, _ = call("--timeout", 3)  # only the one without an answer is asked again; bad answers are not paid twice
    assert code == 0 and server.total() == before + 1 and len(rows_in(tmp_path / "zh.json")) == 24


def test_retry_after_is_honoured_by_all(tmp_path, call, server):
    server.plan = {0: ["429:1"], 1: ["late"]}  # the second worker is free at 0.4 s
    write_input(tmp_path, [[english(i)] for i in range(4)])
    assert call("--concurrency", 2)[0] == 0 and server.total() == 5
    assert server.times[2] - server.times[0] >= 1
    headers = {"retry-after": formatdate(time.time() + 30, usegmt=True)}
    assert 28 < script.wait_asked(headers) <= 30
    assert script.wait_asked({"retry-after": "0.5"}) == 0.5 and script.wait_asked({"retry-after": "soon"}) is None
    assert script.wait_asked({}) is None


def test_limits(tmp_path, call, server, monkeypatch):
    write_input(tmp_path, [[english(i)] for i in range(6)])
    server.fill = 3  # answers wait until so many are under way
    assert call("--concurrency", 3)[0] == 0 and server.most == 3
    sent, request = [], script.Endpoint._request
    monkeypatch.setattr(script.Endpoint, "_request", lambda *given: sent.append(time.monotonic()) or request(*given))
    assert call("--requests_per_minute", 600, "--temperature", "1")[0] == 0
    assert len(sent) == 6 and sent[-1] - sent[0] >= 0.45


def test_a_redirection_in_circles_costs_few_requests(tmp_path, call, server):
    server.plan = {0: ["loop"] * 99}
    write_input(tmp_path, [[english(0)]])
    code, _, err = call("--retries", 1)
    assert code == 2 and "redirects" in err and server.total() == 6, err


@pytest.mark.parametrize("status, told", [(401, "--api_key"), (402, "--api_key"), (403, "--api_key"), (404, "--model")])
def test_what_no_retry_can_mend_stops_the_run(tmp_path, call, server, status, told):
    write_input(tmp_path, [[english(i)] for i in range(50)])
    server.status = (status, "not you,\nwith sk-123")
    code, out, err = call("--api_key", "sk-123", "--concurrency", 2)
    assert code == 2 and out == "" and server.total() <= 4
    line = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1 and f"HTTP {status}: " in line[0] and told in line[0] and "sk-123" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions_en.json", "images"]


def test_an_answer_in_parts_is_one(tmp_path, call, server):
    write_input(tmp_path, [[english(i)] for i in range(3)])
    server.plan = {i: ["parts"] * 9 for i in range(3)}
    assert call()[0] == 0 and server.total() == 3
    assert sorted(row["label"] for row in rows_in(tmp_path / "zh.json")) == sorted(chinese(i) for i in range(3))


@pytest.mark.parametrize("pad", [0, 186])
def test_a_key_that_comes_back_is_not_shown(tmp_path, call, server, pad):
    """Neither whole nor in part, where the message is cut; nor in the files."""
    write_input(tmp_path, [[english(i)] for i in range(3)])
    server.plan = {1: ["tells"] * 9}
    code, out, err = call("--api_key", "sk-0123456789", "--retries", 1)
    assert code == 1 and server.asked[1] == 2
    left = "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
    assert "sk-01" not in out + err + left and "it holds the key" in left
    server.status = (401, "n" * pad + " your key is sk-0123456789")
    code, out, err = call("--api_key", "sk-0123456789", "--temperature", "1")
    assert code == 2 and "sk-01" not in out + err and "HTTP 401" in err


def test_a_server_that_is_not_there_or_goes_away(tmp_path, call, server):
    write_input(tmp_path, [[english(i)] for i in range(20)])
    code, _, err = call("--retries", 2, url=f"http://127.0.0.1:{free_port()}/v1")  # no one listens there
    assert code == 2 and "no answer after 3 tries" in err and "connection failed" in err
    server.status = (400, "no such thing")
    code, _, err = call()
    assert code == 2 and "refuses every request" in err and "no such thing" in err
    server.status, server.plan = None, {i: ["500"] * 9 for i in range(5, 20)}
    code, _, err = call("--retries", 1, "--concurrency", 2)
    assert code == 2 and "answers so far are kept" in err and not (tmp_path / "zh.json").exists()
    server.plan, before = {}, server.total()
    assert call()[0] == 0 and server.total() == before + 15 and len(rows_in(tmp_path / "zh.json")) == 20
    server.plan = {0: ["429:9999"]}
    server.asked.clear()
    code, _, err = call("--temperature", "1", "--concurrency", 1)
    assert code == 2 and "asks to wait 9999 s" in err


def test_one_failure_does_not_hold_up_the_rest(tmp_path, call, server):
    write_input(tmp_path, [[english(i)] for i in range(4)])
    server.plan = {2: ["500"] * 9}
    for _ in range(2):  # the second run asks for nothing else, and must not take the server for dead
        code, _, err = call("--retries", 1, "--concurrency", 1)
        assert code == 1 and "1 texts have no answer" in err and len(rows_in(tmp_path / "zh.json")) == 3


def test_duplicates_are_asked_for_more_detail(tmp_path, call, server):
    """Seven images with one description: three keep it, two come back better, two stay as they are."""
    captions = [[english(7)] for _ in range(5)] + [[english(7) + " " + "An airport."], ["An airport.", english(7)]]
    write_input(tmp_path, [*captions, [english(1)]])
    server.plan = {7: ["same"] * 3 + ["detail", "same", "detail", "same"]}
    code, _, _ = call("--concurrency", 1)
    report = rows_in(tmp_path / "zh.json.report.json")
    assert code == 0 and report["duplicates"] == {"before": 6, "after": 3} and report["rejected"] == {"duplicate": 2}
    assert report["requests"] == server.total() == 8  # five equal requests are one, four more for detail, one other
    labels = Counter(row["label"] for row in rows_in(tmp_path / "zh.json"))
    assert sorted(labels.values()) == [1, 2, 3] and labels[BAD_TEXTS["same"]] == 3
    assert set(aside_in(tmp_path / "zh.json.rejected.jsonl")) == {"4.png", "6.png"}
    code, _, _ = call("--keep_duplicates")
    assert code == 0 and server.total() == 8 and len(rows_in(tmp_path / "zh.json")) == 8
    assert rows_in(tmp_path / "zh.json.report.json")["duplicates"]["after"] == 5
    assert call("--max_duplicates", 10)[0] == 0 and server.total() == 8 and len(rows_in(tmp_path / "zh.json")) == 8


def test_nearly_the_same_words_are_one_group_unless_a_fact_differs():
    long = "这是一张遥感图像，显示了一片广阔的农田，农作物规整而繁茂，旁边停着{}架白色飞机，展现出生机。"
    near = long.format("四").replace("这是一张", "这是一幅").replace("。", " ！")
    texts = [long.format("四"), near, long.format("五"), "机场。", "机场", "港口。"]
    groups = script.Groups()
    assert [groups.of(text) for text in texts] == [0, 0, 1, 2, 2, 3]
    assert groups.of(long.format("四") + "远处还有一片沙漠和许多弯弯曲曲的河流以及一座灯塔。") == 4


def test_groups_are_what_comparing_all_with_all_finds():
    dice = random.Random(0)
    words = ["一片农田", "许多树木", "几条小路", "整齐排列", "停车场旁", "茂盛生长", "一座机场", "宁静景象"]
    texts = ["".join(dice.choices(words, k=8)) for _ in range(60)]
    texts += [text[:-1] + dice.choice("景色中") for text in texts]
    groups, firsts, expected = script.Groups(), [], []
    for text in map(script.plain, texts):
        parts, facts = script.Groups.parts(text), script.FACTS.findall(text)
        like = [n for n, (known, told) in enumerate(firsts)
                if told == facts and len(parts & known) >= 0.8 * len(parts | known)]  # fmt: skip
        expected.append(like[0] if like else len(firsts))
        if not like:
            firsts.append((parts, facts))
    assert [groups.of(text) for text in texts] == expected and len(set(expected)) < len(texts)


def test_chinese_that_is_there_is_checked_and_nobody_asked(tmp_path, call_main):
    rows = [
        {"image": f"{i}.png", "captions": [english(i)], "zh_answer": text.format(n=i), "split": "train"}
        for i, text in enumerate([chinese(0), chinese(1), *list(BAD_TEXTS.values())[2:8]])
    ]
    write_input(tmp_path, [[""]] * len(rows))
    (tmp_path / "captions_en.json").write_text(json.dumps(rows))
    given = ["--input", tmp_path / "captions_en.json", "--output", tmp_path / "zh.json"]
    code, out, err = call_main(script.main, *given, "--check")
    made = rows_in(tmp_path / "zh.json")
    assert code == 0 and {row["img"] for row in made} == {"0.png", "1.png"} and len(made) == 6, err
    assert len({row["prompt"] for row in made}) > 3 and "8 texts checked" in out
    aside = aside_in(tmp_path / "zh.json.rejected.jsonl")
    assert set(aside) == {f"{i}.png" for i in range(2, 8)}
    assert not (tmp_path / "zh.json.cache.jsonl").exists()
    (tmp_path / "captions_en.json").write_text(json.dumps([{"image": "0.png", "caption": "A lake."}]))
    code, _, err = call_main(script.main, *given, "--check")
    assert code == 2 and "no Chinese text" in err


def test_one_of_several_chinese_texts_need_not_say_all(tmp_path, call_main):
    texts = ["A plane.", "A red building near three trees.", "图中有一架飞机停在地面。", "三棵树旁有一栋红色建筑。"]
    rows = [{"image": "0.png", "caption": text, "split": "train"} for text in [*texts, "图中有四座桥。"]]
    rows[2]["prompt"] = "图中有飞机吗？"
    write_input(tmp_path, [[""]])
    (tmp_path / "captions_en.json").write_text(json.dumps(rows))
    given = ["--input", tmp_path / "captions_en.json", "--output", tmp_path / "zh.json"]
    assert call_main(script.main, *given, "--check", "--questions", 2)[0] == 0
    assert Counter(row["label"] for row in rows_in(tmp_path / "zh.json")) == {texts[2]: 2, texts[3]: 2}
    assert call_main(script.main, *given, "--check")[0] == 0
    made = rows_in(tmp_path / "zh.json")
    assert Counter(row["label"] for row in made) == {texts[2]: 1, texts[3]: 3}
    assert made[0]["prompt"] == "图中有飞机吗？", "the file's own question stays"
    assert list(aside_in(tmp_path / "zh.json.rejected.jsonl")) == ["0.png"]
    for words in (["--check", "--each"], ["--check", "--model", "m"]):
        code, _, err = call_main(script.main, *given, *words)
        assert code == 2 and "--check asks nobody" in err


def test_chinese_without_english_is_judged_by_its_form():
    assert script.check([], "图中有三架红色飞机停在北部。", GLOSSARY) == []
    for text, reason in (("机场。", "too short"), ("抱歉，我无法描述。", "refusal"), ("a port", "not Chinese")):
        assert [why for why, _ in script.check([], text, GLOSSARY)] == [reason]


# ----------------------------------------------------------------------------------------------------
# Kills


def translate(words):
    with user_errors():
        sys.exit(script.main(words))


def test_kills_lose_nothing_and_pay_nothing_twice(tmp_path, server):
    """2,000 captions, five SIGKILLs, a half-written line: at most what was under way is asked for again."""
    count, workers = 2000, 16
    source = write_input(tmp_path, [[english(i + k) for k in range(20)] for i in range(0, count, 20)])
    server.sent_back = set(range(0, count, 50))  # these take two requests
    words = ["--input", source, "--output", tmp_path / "zh.json", "--base_url", server.url, "--model", "m",
             "--concurrency", workers, "--each"]  # fmt: skip
    words = [str(word) for word in words]
    cache = tmp_path / "zh.json.cache.jsonl"
    kept = 0
    for at in (1, 400, 1000, 1700, count + 15):  # the last one falls among the second tries
        with forked(translate, words) as process:
            while server.total() < at:
                assert process.is_alive()
                time.sleep(0.002)
        assert not (tmp_path / "zh.json").exists()
        lines = cache.read_bytes().split(b"\n")[:-1] if cache.exists() else []
        assert len(lines) >= kept
        kept = len(lines)
        if at == 1000:  # the kill that falls into a write
            with open(cache, "ab") as file:
                file.write(b'{"key": "abc", "te')

    def run() -> int:
        with forked(translate, words) as process:
            process.join(120)
            return process.exitcode

    assert run() == 0
    repeated = server.total() - len(server.seen)
    assert len(server.seen) == count + count // 50 and repeated <= 5 * workers
    assert [row["label"] for row in rows_in(tmp_path / "zh.json")] == [chinese(i) for i in range(count)]
    before = server.total()
    assert run() == 0 and server.total() == before
    assert rows_in(tmp_path / "zh.json.report.json")["requests"] == 0


def test_half_a_line_is_ignored(tmp_path):
    path = tmp_path / "cache.jsonl"
    cache = script.Cache(path)
    cache.add("a", script.Answer("一\u2028二"))
    cache.close()
    with open(path, "ab") as file:
        file.write('{"key": "b", "text": "三'.encode()[:-1])
    cache = script.Cache(path)
    assert cache.answers == {"a": script.Answer("一\u2028二")}
    with pytest.raises(script.InputError, match="another run"):
        script.Cache(path)
    cache.add("c", script.Answer("四", True))
    cache.close()
    assert script.Cache(path).answers == {"a": script.Answer("一\u2028二"), "c": script.Answer("四", True)}


# ----------------------------------------------------------------------------------------------------
# Checks: (captions, good text, bad text, its reason)

PAIRS = [
    ("two planes", "两架飞机", "一架飞机", "number missing"),
    ("two planes", "2架飞机", "两飞机", "number without a classifier"),
    ("two large planes", "两架大型飞机", "三架大型飞机", "number added"),
    ("three ships at the pier", "码头有三艘船", "码头有船", "number missing"),
    ("twelve buildings", "十二栋建筑", "十一栋建筑", "number missing"),
    ("twenty-five cars", "25辆汽车", "二十辆汽车", "number missing"),
    ("120 cars", "一百二十辆汽车", "102辆汽车", "number missing"),
    ("1,200 houses", "1200座房屋", "120座房屋", "number missing"),
    ("a bridge 0.5 km long", "一座长0.5千米的桥", "一座长5千米的桥", "number missing"),
    ("many trees", "许多树木", "有树木", "number missing"),
    ("several buildings", "几栋建筑", "有建筑", "number missing"),
    ("one tennis court", "一个网球场", "网球场有两个", "number missing"),
    ("a plane on each of the two sides of one road", "一条道路两侧各有一架飞机", "一条道路旁有一架飞机", "number missing"),
    ("some cars", "一些汽车", "五辆汽车", "number added"),
    ("a crossroads", "一个十字路口", "四个十字路口", "number added"),
    ("A river north of the town", "城镇北边有一条河流", "城镇南边有一条河流", "direction missing"),
    ("a lake in the northwest", "西北部有一个湖泊", "北部有一个湖泊", "direction missing"),
    ("a lake in the north", "北部有一个湖泊", "东北部有一个湖泊", "direction added"),
    ("a pond in the center", "中央有一个池塘", "图像中有一个池塘", "direction missing"),
    ("a church on the left", "左侧有一座教堂", "右侧有一座教堂", "direction added"),
    ("a church on the right", "右侧有一座教堂", "有一座教堂在旁边", "direction missing"),
    ("a road in the upper left corner", "左上角有一条道路", "左下角有一条道路", "direction missing"),
    ("a road at the bottom", "下方有一条道路", "上方有一条道路", "direction missing"),
    ("a church right next to a lake", "教堂紧挨着一个湖泊", "教堂在湖泊左边", "direction added"),
    ("a red roof", "红色的屋顶", "蓝色的屋顶", "colour missing"),
    ("gray roofs", "灰色屋顶", "屋顶", "colour missing"),
    ("reddish soil", "泛红的土壤", "土壤一片", "colour missing"),
    ("a roof", "一个屋顶", "一个红色屋顶", "colour added"),
    ("trees near bare land", "绿树靠近裸露的黄土地和裸地", "树木旁的裸地是紫色的", "colour added"),
    ("storage tanks", "储罐", "坦克", "glossary"),
    ("residential areas", "居民区", "居住的地方", "glossary"),
    ("a 30 m wide river", "一条30m宽的河流", "一条30 m宽的river河流", "English left"),
    ("an RGB picture of a T junction", "RGB图像，有一个T字路口", "Picture里有一个T字路口", "English left"),
    ("a car of the UNHCR", "UNHCR的一辆汽车", "UNICEF的一辆汽车", "English left"),
    ("a dense forest beside a wide and quiet lake", "宽阔平静的湖泊旁有一片茂密的森林", "湖旁林", "too short"),
    ("a dense forest", "一片茂密的森林", "A dense forest", "not Chinese"),
    ("a dense forest", "一片茂密的森林", "一片茂密的森林" * 20, "too long"),
    ("a forest", "一片无法通行的森林", "抱歉，我无法翻译。", "refusal"),
    ("a forest", "一片森林", "As an AI language model, I cannot translate", "refusal"),
    ("a forest", "一片森林", "以下是翻译：一片森林", "meta talk"),
    ("a forest", "一片森林", "好的，一片森林", "meta talk"),
    ("a forest", "一片森林", "**一片森林**", "meta talk"),
]  # fmt: skip


@pytest.mark.parametrize("caption, good, bad, reason", PAIRS)
def test_checks(caption, good, bad, reason):
    assert script.check([caption], good, GLOSSARY) == []
    assert reason in [found for found, _ in script.check([caption], bad, GLOSSARY)]


def test_captions_that_disagree_leave_the_choice():
    captions = ["two planes at the airport", "several planes at the airport", "three planes"]
    for text in ("机场有两架飞机", "机场有三架飞机", "机场有几架飞机"):
        assert script.check(captions, text, GLOSSARY) == []
    assert script.check(captions, "机场有飞机停着", GLOSSARY)[0][0] == "number missing"
    kinds = ["many planes", "eight different kinds of planes"]
    assert script.check(kinds, "这里有八架飞机", GLOSSARY) == script.check(kinds, "这里有许多飞机", GLOSSARY) == []
    agreed = ["two planes at the airport with three hangars", "two planes"]
    assert script.check(agreed, "机场有两架飞机和三个机库", GLOSSARY) == []
    assert script.check(agreed, "机场有两架飞机和机库", GLOSSARY)[0][0] == "number missing"


def test_numbers():
    value = lambda text: [sorted(values) for values, _, _ in script.chinese_numbers(text)]  # noqa: E731
    assert value("十五栋，二十辆，一百零三个，两千三百座") == [[15], [20], [103], [2300]]
    assert value("两三架") == [[2, 3, 23]] and 12 in value("十几架")[0] and value("第三条A380") == []
    assert script.english_numbers("another one, each one and thirty-two tanks") == [(32, "tank")]


def test_clean():
    assert script.clean("<think>a</think>\n\n“一片\n森林。”") == "一片森林。"
    assert script.clean("thoughts</think>一片森林") == "一片森林" and script.clean("<think>never ends") == ""
    assert script.clean("“东”和“西”") == "“东”和“西”"
    for first, last in ("『』", "《》", "‘’", "（）", ('\\"', '\\"'), ("", "\\n"), ('"', '\\n"')):
        assert script.clean(f"{first}一片森林。{last}") == "一片森林。", (first, last)
    for text in ("一片森林。（完）", "一片森林##", "/一片森林", "一片\\t森林"):
        assert [reason for reason, _ in script.check_form([], script.clean(text), 2)] == ["markup"], text
    assert script.check_language([], "一片森林。ｆｏｒｅｓｔ")[0][0] == "English left"
    assert not script.check_form([], "一片森林（东部）里的1#楼", 2)


def test_glossary_file():
    assert len(GLOSSARY) >= 60 and all(
        re.search("[\u4e00-\u9fff]", a) for accepted in GLOSSARY.values() for a in accepted
    )
    assert list(script.terms_in(["Storage tanks, a railway station and cities"], GLOSSARY)) == [
        "railway station",
        "storage tank",
    ]


# ----------------------------------------------------------------------------------------------------
# What the user gives


def test_input_errors(tmp_path, call_main, server):
    source = write_input(tmp_path, [[english(0)]])
    before = sorted(path.name for path in tmp_path.iterdir())
    files = {
        "no_captions.txt": "翻译 {glossary}", "no_glossary.txt": "翻译 {captions}", "empty.txt": "# nothing\n",
        "list.json": "[]", "broken.json": "{", "wrong.json": '{"river": "河"}', "none.json": '{"river": []}',
    }  # fmt: skip
    others = tmp_path / "given"
    others.mkdir()
    for name, text in files.items():
        (others / name).write_text(text, encoding="utf-8")
    cases = [
        (["--base_url", ""], "give --base_url"), (["--local", "x"], "one of them"), 
        (["--base_url", "here"], "expected an address"), (["--base_url", "http://127.0.0.1:99999/v1"], "expected an address"),
        (["--base_url", "http://[::1:8765/v1"], "expected an address"), (["--base_url", "http://a b/v1"], "expected an address"),
        (["--model", ""], "needs --model"), (["--concurrency", 0], "--concurrency 0"), (["--timeout", "nan"], "--timeout nan"),
        (["--retries", -1], "--retries -1"), (["--extra", "{"], "--extra: not JSON"), (["--extra", "[]"], "a JSON object"),
        (["--api_key", "钥匙"], "--api_key"),
        (["--prompt_file", others / "no_captions.txt"], "placeholder {captions} is missing"),
        (["--prompt_file", others / "no_glossary.txt"], "placeholder {glossary} is missing"),
        (["--prompt_file", others / "absent.txt"], "cannot be read"), (["--questions_file", others / "empty.txt"], "no question"),
        (["--glossary", others / "list.json"], "expected {English term"), (["--glossary", others / "broken.json"], "line 1"),
        (["--glossary", others / "wrong.json"], "term 'river'"), (["--glossary", others / "none.json"], "term 'river'"),
        (["--output", source], "would write over"), (["--output", tmp_path / "no" / "zh.json"], "folder does not exist"),
        (["--output", tmp_path / "images"], "is a folder"), (["--input", tmp_path / "absent.json"], "no such file"),
        (["--prompt_file", others / "zh.txt", "--output", others / "zh.txt"], "would write over"),
    ]  # fmt: skip
    for words, told in cases:
        given = ["--input", source, "--output", tmp_path / "zh.json", "--base_url", server.url, "--model", "m", *words]
        code, out, err = call_main(script.main, *given)
        assert code == 2 and out == "" and told in err, (words, err)
        assert err.startswith("error: ") and err.count("\n") == 1, err
    assert server.total() == 0 and sorted(path.name for path in tmp_path.iterdir()) == [
        *before[:1],
        "given",
        *before[1:],
    ]


def test_no_usable_answer(tmp_path, call, server):
    write_input(tmp_path, [[english(0)]])
    server.plan = {0: ["refusal"] * 2}
    code, _, err = call()
    assert code == 2 and "no answer passed the checks" in err and not (tmp_path / "zh.json").exists()
    assert aside_in(tmp_path / "zh.json.rejected.jsonl")["0.png"]["reasons"] == ["refusal"]


def test_captions_with_braces(tmp_path, call, server):
    write_input(tmp_path, [[english(0) + " {glossary} {captions} {x}"]])
    call("--retries", 0)
    assert "{glossary} {captions} {x}" in server.bodies[0]["messages"][0]["content"]


def test_a_model_that_thinks_to_its_last_token_is_not_asked_again(tmp_path, call, server):
    write_input(tmp_path, [[english(i)] for i in range(12)])
    server.plan = {i: ["spent"] * 9 for i in range(12)}
    code, _, err = call("--concurrency", 1)
    assert code == 2 and server.total() == 5 and "cut at --max_tokens 1024 before its first word" in err
    assert "enable_thinking" in err
    server.plan = {3: ["spent"] * 9}
    code, out, err = call("--concurrency", 1, "--max_tokens", 2000)
    assert code == 0 and server.asked[3] == 2 and "cut off 1" in out, "those five are asked for again, with more room"
    assert "of 1 texts the answer was cut at --max_tokens 2000" in err


def test_settings_that_a_server_does_not_take(tmp_path, call, server):
    write_input(tmp_path, [[english(i)] for i in range(3)])
    server.plan = {i: ["newer"] * 9 for i in range(3)}
    assert call("--concurrency", 1, "--extra", '{"temperature": null, "top_k": 20}')[0] == 0
    assert server.total() == 4, "one request tells it"
    assert all("temperature" not in body and body["top_k"] == 20 for body in server.bodies)
    assert [set(body) & {"max_tokens", "max_completion_tokens"} for body in server.bodies] == [
        {"max_tokens"}, *[{"max_completion_tokens"}] * 3,
    ]  # fmt: skip
    code, _, err = call("--concurrency", 1, "--extra", '{"max_tokens": 300}', "--retries", 0)
    assert code == 2 and "Use 'max_completion_tokens' instead" in err
    code, _, err = call("--extra", '{"stream": true}')
    assert code == 2 and "--extra: stream" in err


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("There are twenty to thirty planes at the airport.", "机场停着二三十架飞机。"),
        ("Three fourths of the field is green.", "四分之三的农田是绿色的。"),
        ("A Boeing 737-800 is parked at the airport.", "机场停着一架波音737-800飞机。"),
        ("The number of planes at the airport is 7.", "机场飞机数量为7。"),
        ("A runway marked with the number 27 lies in the field.", "田野中有一条标有数字27的跑道。"),
        ("A right-angled road crosses the field.", "一条直角形的道路穿过田野。"),
        ("There are a few houses near the road.", "道路旁有少量房屋。"),
        ("There is a watchtower near the river.", "河边有一座瞭望塔。"),
    ],
)
def test_faithful_texts_are_taken(said, text):
    assert script.check([said], text, {}) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("湖上有船，湖邊有樹。", "traditional characters"),
        ("湖上有船，湖边有树。</s>", "markup"),
        ("<p>湖上有船，湖边有树。</p>", "markup"),
        ("我已按照您的要求完成翻译。湖上有船，湖边有树。", "meta talk"),
        ("湖上有船，湖边有树（已合并重复内容）。", "meta talk"),
    ],
)
def test_texts_that_are_no_description_are_not(text, reason):
    assert reason in [why for why, _ in script.check(["Ships on a lake, trees beside it."], text, {})]


# ----------------------------------------------------------------------------------------------------
# Models


def test_local_model(tmp_path, call_main, qwen3_base, monkeypatch):
    """A model with random weights says nothing of use: what it says is asked for in batches, kept and judged."""
    source = write_input(tmp_path, [[english(i)] for i in range(5)])
    words = ["--input", source, "--output", tmp_path / "zh.json", "--local", qwen3_base, "--device", "cpu",
             "--max_tokens", 8, "--max_duplicates", 9, "--batch_size", 2]  # fmt: skip
    code, _, err = call_main(script.main, *words)
    assert code == 2 and "no answer passed the checks" in err
    report = rows_in(tmp_path / "zh.json.report.json")
    assert report["requests"] == 5 and report["rejected_texts"] == 5
    call_main(script.main, *words)
    assert rows_in(tmp_path / "zh.json.report.json")["requests"] == 0  # all from the cache

    monkeypatch.setattr(
        script.Translator, "judge", lambda self, item, answer: setattr(item, "text", f"描述{answer.text}")
    )
    assert call_main(script.main, *words)[0] == 0
    batched = rows_in(tmp_path / "zh.json")
    (tmp_path / "zh.json.cache.jsonl").unlink()
    assert call_main(script.main, *words[:-1], 1)[0] == 0
    assert rows_in(tmp_path / "zh.json") == batched and len(batched) == 15  # padding changes nothing
    base = Path(shutil.copytree(qwen3_base, tmp_path / "penalised"))
    (base / "generation_config.json").write_text(json.dumps({"repetition_penalty": 9.0, "do_sample": True}))
    words[words.index("--local") + 1] = base
    assert call_main(script.main, *words)[0] == 0
    assert rows_in(tmp_path / "zh.json") == batched  # greedy is greedy, whatever the base would do
    code, _, err = call_main(script.main, *words[:4], "--local", tmp_path / "nothing")
    assert code == 2 and "no model here" in err


SERVING = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "transformers.cli.serve"))


@pytest.mark.skipif(not SERVING, reason="transformers serve needs fastapi and uvicorn")
def test_transformers_serve(tmp_path, call_main, qwen3_base):
    """The protocol against a real server."""
    source = write_input(tmp_path, [[english(i)] for i in range(2)])
    with transformers_serve(str(qwen3_base), tmp_path) as url:
        given = ["--input", source, "--output", tmp_path / "zh.json", "--base_url", url,
                 "--model", qwen3_base, "--max_tokens", 8, "--retries", 0]  # fmt: skip
        _, _, err = call_main(script.main, *given)
        assert "no answer passed the checks" in err, err + (tmp_path / "log").read_text()[-2000:]
        report = rows_in(tmp_path / "zh.json.report.json")
        assert report["requests"] == 2 and report["retries"] == {} and "no answer" not in report["rejected"]


# Found by a critical reader: counts above ninety-nine, words that look like counts, names with numbers, palms.
FAITHFUL = {
    "nearly one hundred cars in a parking lot": "停车场里停着近百辆汽车。",
    "about 30% of the scene is farmland": "约百分之三十的画面是农田。",
    "two-thirds of the image is forest": "图像的三分之二是森林。",
    "the road is 3.5 m wide": "道路宽三点五米。",
    "a road of one and a half kilometres": "一条长一点五公里的道路。",
    "a city of 1.5 million people": "一座有150万人的城市。",
    "there are 0 ships in the harbor": "港口里没有船只。",
    "a four-way intersection": "一个十字路口。",
    "the 2nd largest lake": "第二大湖泊。",
    "a village in Shandong": "山东的一座村庄。",
    "traffic streams along the freeway": "车流沿高速公路行驶。",
    "a shopping center with a parking lot": "一座商场，带有停车场。",
    "a hexagonal building": "一座六角形建筑物。",
    "a maroon roof": "红褐色的屋顶。",
    "many green trees": "绿树成荫。",
    "a Boeing 747 at the airport": "机场里有一架Boeing 747。",
    "the Yellow River": "黄河。",
    "a 4 x 3 grid of houses": "房屋排成4×3的网格。",
    "there is no river in the image": "图中没有河流。",
    "a parking lot without cars": "停车场里空无一车。",
    "a dense forest": "森林十分茂密，显得十分宁静。",
    "dozens of cars in a parking lot": "停车场里有几十辆汽车。",
    "many cars in a parking lot": "停车场里有数十辆汽车。",
    "roads lead in all directions": "道路通往四面八方。",
    "a square building": "四四方方的建筑物。",
    "many cars are in the parking lot": "停车场里有上百辆汽车。",
    "two hundred cars in a parking lot": "停车场里有两百辆汽车。",
    "five thousand houses in a town": "城镇里有五千栋房屋。",
    "three dozen boats in a harbor": "港口里有三十六艘船。",
    "half a dozen cars in a parking lot": "停车场里有六辆汽车。",
    "a hundred cars in a parking lot": "停车场里有一百辆汽车。",
    "a thousand containers in a port": "港口里有一千个集装箱。",
    "the stadium seats 80,000 people": "这座体育场可容纳8万名观众和人。",
    "two hundred and fifty cars in a parking lot": "停车场里有250辆汽车。",
    "an A380 parked at the airport": "机场停着一架A380。",
    "a Boeing 747 parked at the terminal": "一架波音747停在航站楼旁。",
    "Highway 101 crosses a river": "101号公路跨越一条河流。",
    "there are 2-3 boats on the river": "河上有2-3艘船。",
    "two to three boats on the river": "河上有两到三艘船。",
    "many palm trees on the beach": "沙滩上有许多棕榈树。",
    "a ship left a long white wake on the sea": "船在海上留下一道长长的白色尾迹。",
    "an image of Beijing airport": "北京机场的图像。",
    "a lake in the NE corner": "东北角有一个湖。",
    "a building is on the left of a road": "道路左侧有一栋建筑物。",
    "twenty-one ships in a harbor": "港口里有二十一艘船。",
    "one hundred and two trucks in a parking lot": "停车场里有一百零二辆卡车。",
    "forest covers 50% of the image": "图像中约一半的区域被森林覆盖。",
    "the parking lot was built in the 1990s": "停车场建于20世纪90年代。",
    "the second floor of the parking lot is empty": "停车场的二层空着。",
    "a four-leaf clover interchange": "四叶草形立交桥。",
    "a river divides the land into two halves": "河流将土地一分为二。",
    "a stadium with red, yellow and blue seats": "体育场的座椅有红、黄、蓝三种颜色。",
    "there is plenty of space left for parking": "还有很多停车空间。",
    "evergreen woods and a minefield": "绿色的树林和雷场。",
    "the southwestern part is bare": "西南部裸露。",
    "planes are on the runway, which has no cars": "跑道上停着飞机，没有汽车。",
    "a sunken ship near the beach": "海滩附近有一艘沉没的船。",
    "a submerged bridge over the river": "河上有一座被淹没的桥梁。",
    "bare land next to the road": "道路旁是没有植被的裸地。",
    "neither ships nor cars in the port": "港口里没有船，也没有汽车。",
    "a dense rainforest": "绿色热带雨林。",
    "a midwestern town": "中西部城镇。",
    "fifty percent of the land is bare": "一半的土地裸露。",
}
UNFAITHFUL = [
    ("two hundred cars in a parking lot", "停车场里有两辆汽车。", "number"),
    ("ten trucks in a lot", "停车场里有卡车。", "number missing"),
    ("a parking lot with trucks", "停车场里有十辆卡车。", "number added"),
    ("a parking lot with trucks", "停车场里有两百辆卡车。", "number added"),
    ("a building on the left of a road", "道路旁有一栋建筑物。", "direction missing"),
    ("a building on the left", "北侧有一栋建筑物。", "direction added"),
    ("a house by the river", "河边有一栋红色房屋。", "colour added"),
    ("two planes are parked beside a building", "1. 两架飞机停在建筑旁。2. 旁边有一栋建筑。", "meta"),
    ("two planes are parked beside a building", "中文：两架飞机停在一栋建筑物旁。", "meta"),
    ("two planes are parked beside a building", "• 两架飞机停在一栋建筑物旁。", "meta"),
    ("two planes are parked beside a building", "两架飞机停在一栋建筑物旁。如有需要请告诉我。", "meta"),
    ("there is no river in the image", "图中有一条河流。", "negation lost"),
    ("there is no lake beside the forest", "森林旁有一片湖泊。", "negation lost"),
    ("ten planes are parked", "停着十几架飞机。", "number missing"),
    ("a plane on the runway", "跑道的北\ufffd\ufffd侧有一架飞机。", "broken characters"),
    ("a plane on the runway", "跑道上有一架самолет。", "another script"),
    ("a plane on the runway", "跑道上有一架飞机。跑道上有一架飞机。", "repetition"),
    ("a plane on the runway", "跑道上有一架飞机，北侧北侧北侧北侧北侧。", "repetition"),
    ("a plane on the runway", "这是一段中文描述。跑道上有一架飞机。", "meta"),
    ("a plane on the runway", "我看不到图像，但跑道上有一架飞机。", "refusal"),
    ("a plane on the runway", "<think>" * 10_000, "too long"),
    ("2 planes", "2.5架飞机停在那里", "number"),
    ("one plane is on the apron", "一些飞机停在停机坪上。", "number missing"),
    ("a plane is on the runway", "跑道上没有飞机。", "negation added"),
    ("fifty cars in a parking lot", "停车场里一半是汽车。", "number missing"),
    ("a red ship is in the port", "港口里没有红色的船。", "negation added"),
    ("two planes are on the runway", "跑道上没有两架飞机。", "negation added"),
    ("some houses are scattered near a lake", "湖边散布着一些红色房屋。", "colour added"),  # scatte-red
    ("many rectangular buildings", "许多棕色的长方形建筑。", "colour added"),
    ("at least ten cars in a parking lot", "停车场东侧至少有十辆汽车。", "direction added"),
    ("houses with bright roofs", "右侧有一些屋顶明亮的房屋。", "direction added"),
]


@pytest.mark.parametrize("caption", FAITHFUL)
def test_a_faithful_text_is_taken(caption):
    assert script.check([caption], FAITHFUL[caption], script.read_glossary("prompts/glossary_zh.json")) == []


@pytest.mark.parametrize(("caption", "text", "reason"), UNFAITHFUL)
def test_an_unfaithful_text_is_not(caption, text, reason):
    found = script.check([caption], text, script.read_glossary("prompts/glossary_zh.json"))
    assert any(reason in name for name, _ in found), found


def test_more_room_asks_again_only_for_what_was_cut(tmp_path, call, server):
    server.plan = {1: ["length"] * 2}
    write_input(tmp_path, [[english(i)] for i in range(4)])
    assert call("--max_tokens", 50)[0] == 0 and server.total() == 5
    assert call("--max_tokens", 50)[0] == 0 and server.total() == 5
    code, *_ = call("--max_tokens", 100)
    assert code == 0 and server.total() == 6 and len(rows_in(tmp_path / "zh.json")) == 4


def test_few_texts_and_a_server_that_takes_none(tmp_path, call, server):
    write_input(tmp_path, [[english(i)] for i in range(2)])
    server.status = (400, "Model Not Exist")
    code, out, err = call()
    assert code == 2 and "Model Not Exist" in err and out == ""
    assert not (tmp_path / "zh.json.report.json").exists()


def test_images_without_english_are_said(tmp_path, call, server):
    write_input(tmp_path, [[english(0)], ["两架白色飞机停在机场。"]])
    code, _, err = call()
    assert code == 0 and "1 images have no text without Chinese characters" in err and server.total() == 1
    assert rows_in(tmp_path / "zh.json.report.json")["images_without_english"] == 1
    code, _, err = call("--output", ".")
    assert code == 2 and "is a folder" in err


def test_captions_of_an_image_are_asked_for_in_different_words():
    for seed in range(10):
        items = [script.Item("x.png", [str(n)], None, [], f"text {n}") for n in range(3)]
        assert sorted(row["prompt"] for row in script.rows_of(items, ["a", "b", "c"], 1, seed)) == ["a", "b", "c"]
