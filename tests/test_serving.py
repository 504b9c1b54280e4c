"""The way from an adapter to an OpenAI-compatible server: `train_vqa.py merge`, `transformers serve`, a request with an image."""

import base64
import importlib.util
import re

import pytest
from PIL import Image

import train_vqa
from model import VQA
from scenes import Question
from tests.conftest import draw, transformers_serve

SERVING = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai", "transformers.cli.serve"))


def turns(image, question: str, history=()) -> list[dict]:
    """A conversation in the words of the protocol; the image stands in the first turn, before the text."""
    said = [*(text for pair in history for text in pair), question]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    messages[0]["content"] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": said[0]}]
    return messages


@pytest.mark.skipif(not SERVING, reason="transformers serve needs fastapi, uvicorn and openai")
def test_a_merged_adapter_says_the_same_behind_a_server(answerer, tmp_path, monkeypatch, call_main):
    from openai import BadRequestError, OpenAI

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    answerer(seed=5, strength=0.6, prompt="{question}").save_pretrained(tmp_path / "best_model")
    merge = ["merge", "--lora", tmp_path / "best_model", "--output", tmp_path / "merged"]
    assert call_main(train_vqa.main, *merge)[0] == 0
    model = VQA.from_pretrained(tmp_path / "best_model")
    # One of a size that no processor changes, and one above the adapter's limit of pixels and below the base's, of one
    # colour: resized it is the same by any processor.
    noise, flat = draw(tmp_path / "noise.png", 3, (112, 84), (40, 120, 60)), tmp_path / "flat.png"
    Image.new("RGB", (168, 140), (200, 40, 90)).save(flat)
    past = (("图中有什么？", "一片农田。"), ("What else?", "a river"))
    asked = [(noise, "图中有什么？", ()), (noise, "有几栋建筑？", past), (flat, "图中有什么？", ())]
    scenes = [(str(image), [Question(text, "", history=history)]) for image, text, history in asked]
    expected = [row[0] for row in model.answer(scenes, max_tokens=12)]
    with model.before():
        assert not set(expected) & {row[0] for row in model.answer(scenes, max_tokens=12)}
    assert len(set(expected)) == 3, "image, question and history matter"

    def bare(text):  # a small model with random weights also says marks, which the server lets through
        return re.sub(r"<\|\w+\|>", "", text).strip()

    with transformers_serve("merged", tmp_path) as url:
        client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        how = {"model": "merged", "max_tokens": 12, "temperature": 0}
        for (image, text, history), answer in zip(asked, expected):
            messages = turns(image, text, history)
            made = client.chat.completions.create(messages=messages, **how)
            assert bare(made.choices[0].message.content) == bare(answer)
            parts = client.chat.completions.create(messages=messages, stream=True, **how)
            assert bare("".join(part.choices[0].delta.content or "" for part in parts if part.choices)) == bare(answer)
        prefix, _ = model.prompt.prefix((1, 6, 8))  # what is left of 168 x 140 under 112 x 112 pixels
        assert made.usage.prompt_tokens == len(prefix) + len(model.prompt.branches([text])[0][0])
        with pytest.raises(BadRequestError):
            client.chat.completions.create(messages=messages, **how | {"model": "other"})
