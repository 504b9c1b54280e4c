"""Training on dialogues: every turn of a scene's dialogues run once, against what others run for them.

    python benchmarks/bench_dialogue.py                                   # small shape, real 152k vocabulary, CPU
    python benchmarks/bench_dialogue.py --device cuda --dtype bfloat16 --shape 2b --texts 100 --rows 20

The questions of each RSVQA image follow one another in dialogues of --turns turns, as instruction sets join them; the model
learns every answer. Sides, all with the same weights, dialogues, LoRA, AdamW, pixels, threads and dtype, and a frozen vision
tower:

    ours       SceneTrainer, PackedTask, QuestionCollator of this project: the image once, a branch for each dialogue
    turns      ours without `data.nested`: a branch for each turn, behind a copy of the turns before it
    dialogues  transformers.Trainer with a padded row for each dialogue, all of its answers predicted, as LLaVA's and
               ms-swift's loaders write it; the processor opens and the tower encodes the image of every row

That all do the same work is shown first: loss and LoRA gradient of one step are equal. Rounds are interleaved; the median of
their ratios is reported with the smallest and the largest.
"""

import contextlib
import sys
from unittest import mock

from bench_vqa import Bench, RowCollator, check, common_arguments, opening, quiet, same_work, say, span

import data
from config import InputError, VQAConfig, user_errors
from scenes import Question, QuestionScene
from trainer import write_json

SIDES = ("ours", "turns", "dialogues")


def arguments(argv=None):
    parser = common_arguments(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--scenes", type=int, default=4, help="images of an optimizer step")
    add("--texts", type=int, default=25, help="questions of each image in a step")
    add("--turns", type=int, default=5, help="questions of a dialogue")
    add("--steps", type=int, default=1, help="timed optimizer steps of the peer's round")
    add("--our_steps", type=int, default=3, help="of ours, for each of the peer's: a clock of enough seconds")
    add("--rows", type=int, default=4, help="rows a micro-batch of the peer")
    add("--pack_tokens", type=int, default=VQAConfig.pack_tokens)
    options = parser.parse_args(argv)
    check(options, "rounds", "scenes", "texts", "turns", "steps", "our_steps", "rows", "threads")
    if options.texts % options.turns:
        raise InputError(f"--texts {options.texts}: no multiple of --turns {options.turns}")
    if options.scenes * options.texts // options.turns % options.rows:
        raise InputError(f"--rows {options.rows}: does not divide the dialogues of a step")
    return options


class DialogueCollator(RowCollator):
    """A row for each dialogue: {"image", "question" (its first), "turns": [(question, answer)]}."""

    def __init__(self, model):
        super().__init__(model)
        self.prompt = model.prompt

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, rows: list[dict]) -> dict:
        prompts, pixels = self.prompts(rows)
        between, end = self.prompt.between.removeprefix(self.tokenizer.eos_token), self.tokenizer.eos_token
        labels = []
        for ids, row in zip(prompts, rows):
            wanted = [-100] * len(ids)
            for number, (question, answer) in enumerate(row["turns"]):
                asked = self.ids(f"{between}{question}{self.prompt.after}") if number else []
                said = self.ids(answer + end)
                ids += asked + said
                wanted += [-100] * len(asked) + said
            labels.append(wanted)
        return self.batch(prompts, pixels) | {"labels": data.pad_rows(labels, -100)}


class Work:
    """The dialogues of the first steps: the same for all sides."""

    def __init__(self, bench: Bench, options, steps: int):
        enough = [scene for scene in bench.train if len(scene.questions) >= options.texts]
        if not enough:
            raise InputError(f"--texts {options.texts}: no training image has as many questions")
        listed = (enough * -(-(steps + 2) * options.scenes // len(enough)))[: (steps + 2) * options.scenes]
        scenes, self.rows = [], []
        for scene in listed:
            turns = [(q.text, q.answer) for q in scene.questions[: options.texts]]
            parts = [turns[n : n + options.turns] for n in range(0, len(turns), options.turns)]
            questions = [Question(*turn, history=tuple(part[:n])) for part in parts for n, turn in enumerate(part)]
            scenes.append(QuestionScene(scene.image, questions))
            self.rows.append([{"image": scene.image, "question": part[0][0], "turns": part} for part in parts])
        self.scenes, self.per_step = options.scenes, options.scenes * options.texts // options.turns
        self.dataset = self.tower = bench.dataset(scenes)
        keys = list(data.SceneSampler(len(scenes), options.scenes, 0))[: steps * options.scenes]
        self.rows = [row for _, index in keys for row in self.rows[index]]


def measure(bench: Bench, work: Work, side: str, steps: int, **settings) -> dict:
    plain = mock.patch.object(data, "nested", lambda branches: branches)
    with plain if side == "turns" else contextlib.nullcontext():
        return bench.run("rows" if side == "dialogues" else "ours", work, steps, bench.options.rows, **settings)


def main(argv: list[str] | None = None) -> dict:
    options = arguments(argv)
    options.prompt = "{question}"  # of a chat
    quiet(options)
    bench = Bench(options, DialogueCollator)
    say(opening(bench))
    work = Work(bench, options, options.steps * options.our_steps + 1)
    equal = same_work(
        {side: measure(bench, work, side, 1, strength=0.02, max_grad_norm=0) for side in SIDES},
        SIDES[-1],
        options.dtype,
    )
    for side in SIDES[:-1]:
        loss, *differences = equal[side].values()
        say(f"same work: loss of {side} {loss:.6f}, relative differences to {SIDES[-1]}: loss {differences[0]:.1e},"
            f" LoRA gradient {differences[1]:.1e}")  # fmt: skip
    rates = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side, kept in rates.items():
            steps = options.steps * (1 if side == "dialogues" else options.our_steps)
            kept.append(steps * work.per_step * options.turns / measure(bench, work, side, steps)["seconds"])
        shown = ", ".join(f"{side} {kept[-1]:.1f}" for side, kept in rates.items())
        say(f"  round {number + 1} of {options.rounds}, turns/s: {shown}")
    ratios = {side: [a / b for a, b in zip(rates["ours"], rates[side])] for side in SIDES[1:]}
    for side, kept in rates.items():
        times = f"   ours is {span(ratios[side], 2)} times as fast" if side in ratios else ""
        say(f"{side:12}{span(kept)} turns/s{times}")
    results = {"settings": vars(options), "equal": equal, "rates": rates, "ratios": ratios}
    if options.json:
        write_json(options.json, results)
        say(f"written: {options.json}")
    return results


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
