"""The way from an adapter to an OpenAI-compatible server: `train_vqa.py merge`, `transformers serve`, a request with an image."""

import importlib.util
import json
import re

import pytest
from PIL import Image

import train_vqa
from benchmarks import served_answers
from model import VQA
from scenes import Question
from tests.conftest import draw
from tests.processes import transformers_serve

SERVING = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai", "transformers.cli.serve"))


@pytest.mark.skipif(not SERVING, reason="transformers serve needs fastapi, uvicorn and openai")
def test_a_merged_adapter_says_the_same_behind_a_server(answerer, tmp_path, monkeypatch, call_main):
    from openai import BadRequestError, OpenAI

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    answerer(seed=5, strength=0.6, prompt="{question}", max_answer_tokens=12).save_pretrained(tmp_path / "best_model")
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
        samples = []
        for (image, text, history), answer in zip(asked, expected):
            turns = [*(said for pair in history for said in pair), text]
            messages = served_answers.messages_of(served_answers.png_url(Image.open(image)), turns)
            made = client.chat.completions.create(messages=messages, **how)
            said = made.choices[0].message.content
            assert bare(said) == bare(answer)
            samples.append({"image": str(image), "prompt": text, "history": history, "caption": said, "before": "no"})
            parts = client.chat.completions.create(messages=messages, stream=True, **how)
            assert bare("".join(part.choices[0].delta.content or "" for part in parts if part.choices)) == bare(answer)
        prefix, _ = model.prompt.prefix((1, 6, 8))  # what is left of 168 x 140 under 112 x 112 pixels
        assert made.usage.prompt_tokens == len(prefix) + len(model.prompt.branches([text])[0][0])
        with pytest.raises(BadRequestError):
            client.chat.completions.create(messages=messages, **how | {"model": "other"})
        asking = ["--run", tmp_path, "--base_url", url]
        lines = [json.dumps(row) + "\n" for row in samples]
        (tmp_path / "samples.jsonl").write_text("".join(lines))
        status, printed, _ = call_main(served_answers.main, *asking)
        assert status == 0 and "3 answers as after training, 0 as before" in printed
        (tmp_path / "samples.jsonl").write_text("".join([*lines[:2], json.dumps(samples[2] | {"caption": "no"})]))
        status, printed, _ = call_main(served_answers.main, *asking)
        assert (
            status == 1 and "2 answers as after" in printed and "flat.png: '图中有什么？': here 'no', there" in printed
        )
    assert "Connection error" in call_main(served_answers.main, *asking)[2]
