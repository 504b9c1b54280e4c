"""A merged adapter behind an OpenAI-compatible server says what the adapter said at the end of its training.

    python train_vqa.py merge --lora output/demo_chat/best_model --output merged
    vllm serve merged --max-model-len 8192 --limit-mm-per-prompt '{"image": 1, "video": 0}' --generation-config vllm
    python benchmarks/served_answers.py --run output/demo_chat --base_url http://127.0.0.1:8000/v1

Asks the server questions of the run's samples.jsonl, evenly taken from it, with their history, several at a time, and
prints how many answers are the same, the first that are not, and how many would be without the adapter. In bfloat16
two answers that are nearly as probable as each other may change places.
"""

import argparse
import base64
import functools
import io
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI, OpenAIError
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import InputError, refuse_outside, user_errors  # noqa: E402
from imagery import ImageSettings, read_image  # noqa: E402
from scenes import load_json  # noqa: E402


def png_url(picture: Image.Image) -> str:
    png = io.BytesIO()
    picture.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def messages_of(url: str, turns: Sequence[str]) -> list[dict]:
    """A conversation in the words of the protocol: questions and answers in turn, the picture at `url` before the first."""
    made = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    made[0]["content"] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": turns[0]}]
    return made


def read_samples(run: Path) -> list[dict]:
    """[{"image", "turns", "before", "after"}] of a run's samples.jsonl, of either task. Raises InputError."""
    found = []
    for row in load_json(run / "samples.jsonl"):
        image, question, after = (row.get(a, row.get(b)) for a, b in
                                  (("image", "image_path"), ("prompt", "question"), ("caption", "after")))  # fmt: skip
        turns = [*(text for pair in row.get("history", ()) for text in pair), question]
        found.append({"image": image, "turns": turns, "before": row["before"], "after": after})
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the train_vqa.py run that was merged")
    parser.add_argument("--base_url", required=True, help="the server's address, with /v1")
    parser.add_argument("--model", default="merged", help="its name there: the folder as it was given to the server")
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=8, help="requests on their way at a time")
    args = parser.parse_args(argv)
    refuse_outside(args, num_samples=(1, 10**9), concurrency=(1, 1024))

    settings = load_json(args.run / "best_model" / "vqa.json")
    images = ImageSettings.from_dict(settings["images"])
    samples = read_samples(args.run)
    count = min(args.num_samples, len(samples))
    samples = [samples[i * len(samples) // count] for i in range(count)]
    client = OpenAI(base_url=args.base_url, api_key="none", timeout=120)

    @functools.lru_cache(64)  # the samples of an image follow one another
    def url_of(path: str) -> str:
        return png_url(Image.fromarray(read_image(path, images).rgb))

    def ask(sample) -> str:
        turns = [
            text if n % 2 else settings["prompt"].replace("{question}", text) for n, text in enumerate(sample["turns"])
        ]
        messages = messages_of(url_of(sample["image"]), turns)
        made = client.chat.completions.create(
            model=args.model, messages=messages, temperature=0, max_tokens=settings["max_answer_tokens"]
        )
        return (made.choices[0].message.content or "").strip()

    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(args.concurrency) as pool:
            answers = list(pool.map(ask, samples))
    except OpenAIError as error:
        raise InputError(f"{args.base_url}: {type(error).__name__}: {error}") from None
    rate = len(samples) / (time.perf_counter() - started)
    other = [(sample, said) for sample, said in zip(samples, answers) if said != sample["after"].strip()]
    before = sum(said == sample["before"].strip() for sample, said in zip(samples, answers))
    print(f"{len(samples)} questions of {args.run / 'samples.jsonl'}, {rate:.1f}/s: {len(samples) - len(other)} answers "
          f"as after training, {before} as before it")  # fmt: skip
    for sample, said in other[:10]:
        print(f"  {sample['image']}: {sample['turns'][-1]!r}: here {sample['after']!r}, there {said!r}")
    return 1 if other else 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
