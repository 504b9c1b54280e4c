"""Answering questions: one prefill an image (`VQA.answer`) against `model.generate`, row by row and in batches.

    python benchmarks/bench_vqa_eval.py                                   # small shape, RSVQA LR, CPU
    python benchmarks/bench_vqa_eval.py --device cuda --dtype bfloat16 --shape 2b --images 11 --batches 1 8 32

Sides, all with the same weights and adapter, greedy decoding, no repetition penalty, the same end tokens and the same most
new tokens:

    ours    VQA.answer: the image once for all of its questions, image tokens from the cache of the frozen tower
    tower   ours, with the vision tower run once an image (images the cache has never seen)
    rows N  transformers' generate with its key-value cache on N rows, left-padded; each row's image is opened and encoded

The base has random weights, which would answer noise up to the limit. So the adapter is first trained for --train_steps steps
on the training images, until answers are words and end as real ones do; how long they are is printed. Then every side
answers the same questions of held-out images, and the answers must be equal: all of them in float32; in bfloat16, whose
rounding turns over ties, at least 95%. Rounds are interleaved; the median of their ratios is reported with the smallest and
the largest. Timed is everything from image paths and question texts to answer texts.
"""

import json
import statistics
import sys
import time

import torch
from bench_vqa import Bench, RowCollator, check, common_arguments, opening, quiet, say, span, synchronize
from transformers import PrinterCallback

from config import InputError, VQAConfig, user_errors
from report import write_json


def arguments(argv=None):
    parser = common_arguments(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=1, help="held-out images of a round")
    add("--batches", type=int, nargs="+", default=[1, 8], help="rows at once of model.generate")
    add("--max_tokens", type=int, default=VQAConfig.max_answer_tokens, help="most new tokens of an answer")
    add("--train_steps", type=int, default=60, help="of 4 images x 25 questions, before anything is measured")
    add("--our_repeats", type=int, default=3, help="of ours, for each time of theirs: a clock of enough seconds")
    options = parser.parse_args(argv)
    check(options, "rounds", "images", "max_tokens", "our_repeats", "threads")
    return options


def train_a_little(bench: Bench, steps: int) -> list[float]:
    """Losses; the adapter stays trained."""
    bench.reset()
    trainer = bench.ours(bench.dataset(bench.train, texts=25), bench.settings(steps, 4))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    bench.model.eval()
    return [float(loss) for loss in trainer.losses]


@torch.inference_mode()
def generate(bench: Bench, rows: list[dict], size: int, most: int) -> list[str]:
    """Answers of `size` rows at a time, the way of model cards."""
    model, collator, answers = bench.model, RowCollator(bench.model), []
    with bench.plain_attention():
        for start in range(0, len(rows), size):
            prompts, pixels = collator.prompts(rows[start : start + size])
            batch = collator.batch(prompts, pixels, left=True)
            batch = {name: value.to(model.device) for name, value in batch.items()}
            made = model.peft.generate(
                **batch, do_sample=False, repetition_penalty=1.0, temperature=None, top_p=None, top_k=None,
                max_new_tokens=most, eos_token_id=model.ends, pad_token_id=model.tokenizer.pad_token_id,
            )  # fmt: skip
            made = made[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in model.tokenizer.batch_decode(made, skip_special_tokens=True)]
    return answers


def main(argv: list[str] | None = None) -> dict:
    options = arguments(argv)
    quiet(options)
    bench = Bench(options)
    say(opening(bench))
    held = bench.held[: options.images]
    if not held:
        raise InputError(f"{options.data}: no image is held out (split val or test)")
    losses = train_a_little(bench, options.train_steps) if options.train_steps else []
    scenes = [(scene.image, scene.questions) for scene in held]
    rows = [{"image": scene.image, "question": q.text} for scene in held for q in scene.questions]

    def ours(tokens):
        made = bench.model.answer(scenes, store=bench.store, tokens=tokens, max_tokens=options.max_tokens)
        return [text for texts in made for text in texts]

    sides = {"ours": lambda: ours(bench.tokens), "tower": lambda: ours(None)}
    for size in options.batches:
        sides[f"rows {size}"] = lambda size=size: generate(bench, rows, size, options.max_tokens)

    # ---- the same answers
    said = {side: answer() for side, answer in sides.items()}
    counts = [len(ids) + 1 for ids in bench.model.tokenizer(said["ours"], add_special_tokens=False)["input_ids"]]
    truth = [q.answer for scene in held for q in scene.questions]
    shown = f"training: {len(losses)} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}; " if losses else "no training; "
    say(f"{shown}answers are {statistics.mean(counts):.1f} tokens with their end (longest {max(counts)} of at most "
        f"{options.max_tokens + 1}), {len(set(said['ours']))} different ones, "
        f"{statistics.mean(a == b for a, b in zip(said['ours'], truth)):.0%} right")  # fmt: skip
    equal = {side: statistics.mean(a == b for a, b in zip(said["ours"], made)) for side, made in said.items()}
    needed = 1.0 if options.dtype == "float32" else 0.95
    if min(equal.values()) < needed:
        raise SystemExit(f"the sides do not give the same answers: {json.dumps(equal)}")
    shares = ", ".join(f"{side} {share:.1%}" for side, share in equal.items() if side != "ours")
    say(f"same answers to {len(rows)} questions of {len(held)} images: {shares}")

    # ---- rounds
    rates = {side: [] for side in sides}
    for number in range(options.rounds):
        for side, answer in sides.items():
            repeats = options.our_repeats if side in ("ours", "tower") else 1
            start = time.perf_counter()
            for _ in range(repeats):
                answer()
            synchronize(options.device)
            rates[side].append(repeats * len(rows) / (time.perf_counter() - start))
        shown = ", ".join(f"{side} {kept[-1]:.1f}" for side, kept in rates.items())
        say(f"  round {number + 1} of {options.rounds}, answers/s: {shown}")
    ratios = {f"{side} / {peer}": [a / b for a, b in zip(rates[side], rates[peer])]
              for peer in list(sides)[2:] for side in ("ours", "tower")}  # fmt: skip
    say(f"\n{'':28}answers/s, median (smallest to largest)")
    for side, kept in rates.items():
        say(f"{side:28}{span(kept)}")
    say(f"\n{'times as fast':28}median of rounds (smallest to largest)")
    for name, kept in ratios.items():
        say(f"{name:28}{span(kept)}")
    results = {"settings": vars(options), "questions": len(rows), "tokens": statistics.mean(counts), "equal": equal,
               "rates": rates, "ratios": ratios}  # fmt: skip
    if options.json:
        write_json(options.json, results)
        say(f"written: {options.json}")
    return results


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
