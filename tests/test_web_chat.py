"""The page's Converse tab: turns, both answers side by side, stop, clear; in-process and in a browser."""

import os
import time

import pytest

from config import InputError
from model import VQA
from tests.conftest import draw, free_port
from tests.processes import forked
from tests.test_web_demo import CHROMIUM
from web_demo import Page, build_parser, main, turns_of


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return str(draw(tmp_path_factory.mktemp("talk") / "a.tif", 1, (60, 84), (40, 120, 60)))


@pytest.fixture(scope="module")
def page(chat_adapter):
    args = build_parser().parse_args(["--from_pretrained", str(chat_adapter)])
    return Page(args, chatter=VQA.from_pretrained(chat_adapter))


def last(made):
    *_, end = made
    return end


def test_turns_of_messages():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    assert turns_of(messages) == [("q", "a")] and turns_of(messages[:1]) == []
    assert turns_of([messages[0], {"role": "assistant", "content": ""}]) == [("q", "…")]


def test_what_is_said_is_shown_as_it_is(page, picture, monkeypatch):
    asked, answer = [], "<p>ship</p> <img src=x> a<b &amp; c"
    monkeypatch.setattr(page, "talk", lambda *given, **how: asked.append(given[1:]) or iter([answer[:5], answer]))
    told, _ = last(page.converse(picture, "<image> a < b?", [], [], False, 0.0, 1.0, 4, "en"))
    assert [message["content"] for message in told] == [
        "&lt;image&gt; a &lt; b?", "&lt;p&gt;ship&lt;/p&gt; &lt;img src=x&gt; a&lt;b &amp;amp; c",
    ]  # fmt: skip
    last(page.converse(picture, "And?", told, [], False, 0.0, 1.0, 4, "en"))
    assert asked[1] == ("And?", [("<image> a < b?", answer)]), "the model is told what was said"


def test_turns_that_are_left_out_are_told_of_once_an_answer(page, monkeypatch):
    def talk(pixels, question, history, *, cut, **how):
        heard.append(len(history))
        for text in ("a", "ab"):
            if question == "Longer than the base reads?":
                cut(1)
            yield text

    heard, said = [], []
    monkeypatch.setattr(page, "talk", talk)
    for question, turns, told_of in (("And?", 20, 0), ("And?", 21, 1), ("Longer than the base reads?", 2, 1)):
        told = [{"role": role, "content": "x"} for _ in range(turns) for role in ("user", "assistant")]
        said.clear()
        last(page.converse(None, question, told, told, True, 0.0, 1.0, 4, "en", lambda: said.append("cut")))
        assert len(said) == told_of, (question, turns)
    assert heard == [20, 20, 20, 20, 2, 2], "with and without the adapter the same turns"


def test_turns_stream_with_their_history_and_without_the_adapter(page, picture):
    fields = (True, 0.0, 1.0, 6, "en")
    told, plain = last(page.converse(picture, "How many buildings?", [], [], *fields))
    told, plain = last(page.converse(picture, "And now?", told, plain, *fields))
    model = page.chatter
    first = model.chat(picture, "How many buildings?", max_tokens=6)
    second = model.chat(picture, "And now?", [("How many buildings?", first)], max_tokens=6)
    assert [a for _, a in turns_of(told)] == [first or "…", second or "…"]
    with model.before():
        base = model.chat(picture, "How many buildings?", max_tokens=6)
    assert turns_of(plain)[0] == ("How many buildings?", base or "…") and len(plain) == 4
    # What the adapter was asked and said before is what its base is told too, also where only it was asked.
    with model.before():
        base = model.chat(picture, "And now?", [("How many buildings?", first)], max_tokens=6)
    _, late = last(page.converse(picture, "And now?", told[:2], [], *fields))
    assert turns_of(plain)[1] == turns_of(late)[0] == ("And now?", base or "…")
    assert last(page.converse(picture, "Hello", [], [], True, 2, 1, 4, "en")), (
        "whole numbers, as sliders give at their ends"
    )
    told, plain = last(page.converse(None, "Hello", [], [], False, 0.0, 1.0, 4, "en"))
    assert len(told) == 2 and plain == [], "without a picture, and without the other answer, if one likes"
    for words in ("", "x" * 5000):
        with pytest.raises(InputError):
            last(page.converse(picture, words, [], [], *fields))


def test_closing_the_stream_stops_the_model(page, picture, monkeypatch):
    chat, said = page.chatter.chat, []

    def spoken(*given, streamer, **how):
        streamer.on_finalized_text("Well, ")  # what a model of no training says may have no end of a word in it
        said.append(chat(*given, streamer=streamer, **how))

    monkeypatch.setattr(page.chatter, "chat", spoken)
    stream = page.talk(page.pixels(page.chatter, picture, "en"), "How many buildings?", [], max_tokens=2000)
    began = time.monotonic()
    assert next(stream) == "Well, "
    stream.close()
    assert time.monotonic() - began < 20
    assert not page.lock.locked() and len(page.chatter.tokenizer.encode(said[0])) < 1000, "the model went on"


def test_a_fast_model_does_not_drown_the_browser(page, picture, monkeypatch):
    def chat(*_, streamer, **__):
        for n in range(1000):
            streamer.on_finalized_text(f"{n} ", stream_end=n == 999)

    monkeypatch.setattr(page.chatter, "chat", chat)
    seen = list(page.talk({}, "How many?", []))
    assert seen[0].startswith("0 ") and seen[-1] == "".join(f"{n} " for n in range(1000)), "the first at once, then all"
    assert len(seen) < 500 and len(set(seen)) == len(seen)


def test_an_error_of_the_model_reaches_the_reader(page, picture, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(page.chatter, "chat", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(page.talk({}, "How many?", []))
    seen, stream = [], page.converse(picture, "How many?", [], [], True, 0.0, 1.0, 6, "en")
    with pytest.raises(RuntimeError, match="out of memory"):
        for told, plain in stream:
            seen.append((len(told), len(plain)))
    assert seen[-1] == (0, 0), "no question without an answer stays in the conversation"


def ask(tab, words, send) -> None:
    """Ask until the page has taken the question: it takes none while an answer comes, and no text tells when that ends."""
    from playwright.sync_api import TimeoutError as Late

    for _ in range(12):
        tab.get_by_label("Your question").fill(words)
        send()
        try:
            return tab.get_by_text(words, exact=True).first.wait_for(timeout=15_000)
        except Late:
            continue
    raise AssertionError(f"the page does not take {words!r}: {tab.locator('body').inner_text()}")


def settle(tab) -> None:
    """Wait until the answers seem to be there; on a slow machine the page may be at the next one still."""
    said = None
    while said != (said := tab.locator(".talk").all_inner_texts()):
        tab.wait_for_timeout(700)


def test_browser_converses(chat_adapter, picture, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"{CHROMIUM} is not installed")
    follow_up = "And <b>now</b>, a<b &amp; <image> <img src=x.png>?"  # what is said is no page
    port, log = free_port(), tmp_path / "log"
    words = ["--from_pretrained", str(chat_adapter), "--port", str(port), "--device", "cpu"]
    log.touch()
    with forked(main, words, log=log) as server:
        until = time.monotonic() + 120
        while b"Ctrl-C stops it" not in log.read_bytes():
            assert server.is_alive() and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        with sync_api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            chinese = browser.new_page(locale="zh-CN")
            chinese.goto(f"http://127.0.0.1:{port}")
            chinese.get_by_label("你的问题").wait_for(timeout=120_000)
            tab = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-US")
            tab.set_default_timeout(120_000)  # milliseconds; other work may hold the machine
            tab.goto(f"http://127.0.0.1:{port}")
            tab.locator("input[type=file]").first.set_input_files(picture)
            tab.locator(".image-container img, .image-frame img").first.wait_for()  # another picture clears the talk
            tab.wait_for_timeout(500)
            tab.get_by_role("button", name="Sampling").click()
            tab.get_by_label("number input for Most tokens").fill("8")
            tab.get_by_label("Answer without the adapter too").check()
            tab.locator(".talk").nth(1).wait_for()
            for words in ("How many buildings?", follow_up):
                ask(tab, words, tab.get_by_role("button", name="Send").click)
                # Both answers of this turn: the question stands in both columns.
                sync_api.expect(tab.get_by_text(words, exact=True)).to_have_count(2, timeout=60_000)
                settle(tab)
            tab.screenshot(path=tmp_path / "converse.png", full_page=True)
            tab.get_by_role("button", name="Again", exact=True).click()
            settle(tab)
            sync_api.expect(tab.get_by_text(follow_up, exact=True)).to_have_count(2)
            tab.locator("label", has_text="中文").click()  # which gives this visitor buttons of their own
            tab.get_by_role("button", name="重答", exact=True).click()
            settle(tab)
            sync_api.expect(tab.get_by_text(follow_up, exact=True)).to_have_count(2)
            sync_api.expect(tab.get_by_text("请先输入文字", exact=False)).to_have_count(0)
            tab.locator("label", has_text="English").click()
            tab.get_by_label("number input for Most tokens").fill("1000")  # a long answer, and what comes in its middle
            ask(tab, "A long one?", lambda: tab.get_by_label("Your question").press("Enter"))
            tab.get_by_label("Your question").fill("Too early?")
            tab.get_by_role("button", name="Send").click()
            tab.get_by_role("button", name="Again", exact=True).click()
            tab.wait_for_timeout(1000)
            sync_api.expect(tab.get_by_text("Too early?", exact=True)).to_have_count(0)
            assert tab.get_by_label("Your question").input_value() == "Too early?"
            tab.locator("label", has_text="中文").click()
            tab.get_by_role("button", name="清空").click()
            sync_api.expect(tab.get_by_text(follow_up, exact=True)).to_have_count(0, timeout=60_000)
            browser.close()
