"""Fine-tune Qwen2-VL or Qwen2.5-VL to answer questions about remote-sensing images, and prove what it brought.

    python train_vqa.py                                     # preset full: Qwen2-VL-2B on data_vl_train.json, CUDA
    python train_vqa.py --preset demo                       # a small model on drawn scenes, two CPU cores
    python train_vqa.py --resume_from_checkpoint output/training_...
    python train_vqa.py --eval_only --lora output/training_.../best_model
    python train_vqa.py merge --lora output/training_.../best_model --output merged/
    python train_vqa.py --task chat --data captions_zh.json         # dialogue: [{"img", "prompt", "label"}], free text

Leaves in output/training_YYYYMMDD_HHMMSS/: best_model/ (a peft adapter), checkpoint-N/, config.json, metrics.jsonl,
results.json, samples.jsonl (every test question with its answers before and after), report.html, TensorBoard events.
"""

import argparse
import contextlib
import copy
import html
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

import torch
import transformers

import caption_scores
import metrics
import report
from config import (
    InputError,
    VQAConfig,
    flag_given,
    flag_value,
    keeps_scores,
    parse,
    record_of,
    refuse_unwritable,
    use_files_of_training,
    user_errors,
    whole_checkpoints,
)
from data import (
    QuestionCollator,
    QuestionDataset,
    drop_too_long,
    drop_unreadable,
    image_settings,
    refuse_trained_images,
    row_align,
    say_trained_images,
)
from model import VQA, VQA_SETTINGS, load_processor, pixel_store, read_config
from scenes import (
    Question,
    QuestionScene,
    read_chat,
    read_conversations,
    sample_scenes,
)
from trainer import (
    PackedTask,
    Run,
    SceneTrainer,
    check_best_metric,
    dtype_of,
    held_out_loss,
    own_folder,
    parameters_text,
    prepared_tokens,
    read_history,
)

# ----------------------------------------------------------------------------------------------------
# Data


def describe(splits: dict[str, list[QuestionScene]]) -> str:
    parts = [(name, len(scenes), sum(len(s.questions) for s in scenes)) for name, scenes in splits.items() if scenes]
    return "; ".join(f"{name} {images} images, {questions} questions" for name, images, questions in parts)


def known_answers(scenes: list[QuestionScene]) -> dict[str, list[str]]:
    """{type of question: its distinct answers, sorted}: the closed set of `--decode candidates`."""
    found: dict[str, set[str]] = {}
    for scene in scenes:
        for question in scene.questions:
            found.setdefault(question.kind or "", set()).add(question.answer)
    return {kind: sorted(answers) for kind, answers in sorted(found.items())}


def watched_scenes(scenes: list[QuestionScene], most: int) -> list[QuestionScene]:
    """Whole scenes in a fixed random order, until they hold `most` questions."""
    chosen, total = [], 0
    for i in random.Random(0).sample(range(len(scenes)), len(scenes)):
        if not chosen or total + len(scenes[i].questions) <= most:
            chosen.append(scenes[i])
            total += len(scenes[i].questions)
    return chosen


# ----------------------------------------------------------------------------------------------------
# Scores


def columns_of(scenes: list[QuestionScene]) -> tuple[list[str], list[str], list[str]]:
    """(truths, types, images) of all questions, in order."""
    listed = [(q.answer, q.kind or "question", scene.image) for scene in scenes for q in scene.questions]
    return tuple(map(list, zip(*listed)))


def score(answers: list[list[str]], scenes: list[QuestionScene], samples: int = 1000) -> dict:
    """`metrics.rsvqa_scores` of the answers to each scene's questions."""
    return metrics.rsvqa_scores([a for row in answers for a in row], *columns_of(scenes), samples=samples)


def rightness(answers: list[list[str]], scenes: list[QuestionScene], protocol: str) -> list[bool]:
    """Whether each answer is right, under one of `metrics.PROTOCOLS`."""
    is_right = cache(metrics.is_right)  # few answers, said many times
    return [
        is_right(said, question.answer, question.kind, protocol)
        for row, scene in zip(answers, scenes)
        for said, question in zip(row, scene.questions)
    ]


def score_majority(train: list[QuestionScene], scenes: list[QuestionScene]) -> dict | None:
    """`score` when each question is answered by the most frequent training answer of its type; where a protocol compares by
    class, by the most frequent class, which may be another. None where training knows none of the types."""
    truths, kinds, _ = columns_of(train)
    if not set(kinds) & set(columns_of(scenes)[1]):
        return None

    def of(answers):
        known = metrics.majority_answers(answers, kinds)
        return score(
            [[known.get(q.kind or "question", known[None]) for q in scene.questions] for scene in scenes], scenes
        )

    found, bucket = of(truths), cache(metrics.bucket)  # few answers, said many times
    for protocol in set(protocols_of(found)) - {"exact"}:
        classed = metrics.PROTOCOLS[protocol]
        found[protocol] = of([bucket(a, k) if k in classed else a for a, k in zip(truths, kinds)])[protocol]
    return found


TITLES = {
    "exact": "Exact: the answer, normalised, equals the truth",
    "areas": "Areas by class, counts exact, as in the RSVQA paper on high resolution",
    "bucketed": "Bucketed: count and area by class (0, 1-10, 11-100, ...), as in the RSVQA paper on low resolution",
}
ROWS = (
    ("majority", "majority answer of the type"),
    ("blind", "blind: trained without images"),
    ("before", "before: adapter off"),
    ("after", "after"),
)


def table(results: dict, protocol: str) -> tuple[list[dict], dict]:
    """(rows, columns) of the result table under one of `metrics.PROTOCOLS`."""
    kinds = list(results["after"][protocol]["types"])
    columns = {"model": "", "micro": "overall", "macro": "average"}
    if results["after"][protocol].get("micro_closed") is not None and {"count", "area"} & set(kinds):
        columns |= {"micro_closed": "overall, no count/area", "macro_closed": "average, no count/area"}
    columns |= {f"type {kind}": kind for kind in kinds}
    rows = []
    for name, label in ROWS:
        if name in results:
            found = results[name][protocol]
            row = {"model": label} | {key: found.get(key) for key in columns if not key.startswith(("type ", "model"))}
            rows.append(row | {f"type {kind}": found["types"][kind]["accuracy"] for kind in kinds})
    return rows, columns


def protocols_of(found: dict) -> list[str]:
    """Which of `metrics.PROTOCOLS` differ for the types of these questions."""
    kinds = found["exact"]["types"].keys() & set(metrics.OPEN)
    return ["exact"] + ["areas"] * (len(kinds) == 2) + ["bucketed"] * bool(kinds)


def change_of(made: dict, scenes: list[QuestionScene]) -> dict:
    """{protocol: `metrics.mcnemar`}"""
    changes = {}
    for protocol in metrics.PROTOCOLS:
        before, after = (rightness(made[name], scenes, protocol) for name in ("before", "after"))
        changes[protocol] = metrics.mcnemar(before, after, columns_of(scenes)[2])
    return changes


def change_text(change: dict) -> str:
    return (
        f"after against before: {change['gained']} gained, {change['lost']} lost, difference {change['difference']:+.3f}"
        f" ({report.span_text(change['difference_interval'])} by image), McNemar p {report.p_text(change['p'])}"
    )


def summary(results: dict, best) -> str:
    after, before = results["after"], results["before"]
    lines = ["", f"{results['split']} split, {after['images']} images, {after['questions']} questions"]
    for protocol in protocols_of(after):
        lines += [TITLES[protocol], report.table_text(*table(results, protocol))]
        intervals = {name: results[name][protocol]["micro_interval"] for name, _ in ROWS if name in results}
        spans = [f"{name} {report.span_text(interval)}" for name, interval in intervals.items()]
        lines += ["95% intervals of overall, by image: " + ", ".join(spans)]
        lines += [change_text(results["change"][protocol]), ""]
    if after.get("count_mae") is not None:
        errors = [f"{name} {results[name]['count_mae']:.2f}" for name, _ in ROWS
                  if results.get(name, {}).get("count_mae") is not None]  # fmt: skip
        lines.append("count, mean absolute error of numeric answers: " + ", ".join(errors))
        if before.get("count_mae_share", 1) < 1:
            lines.append(f"answers to count questions that are numbers: before {before['count_mae_share']:.0%}, "
                         f"after {after['count_mae_share']:.0%}")  # fmt: skip
    if "steps" in results:
        lines.append(f"best step {results['best_step']} of {results['steps']}, {results['seconds']:.0f} s in all")
    return "\n".join([*lines, f"adapter {best}"])


def write_report(run: Path, results: dict, samples: list[dict], picture: Callable) -> None:
    """`report.html`: the tables, curves, flips by type, and pictures with their answers (`picture(path)`)."""
    sections = []
    for protocol in protocols_of(results["after"]):
        rows, columns = table(results, protocol)
        best = {key: "max" for key in columns if key != "model"}
        interval = report.span_text(results["after"][protocol]["micro_interval"])
        sections.append((TITLES[protocol], report.table_html(rows, columns, best=best)
                         + f"<p>95% interval of overall after training, by image: {interval}.</p>"
                         + f"<p>{html.escape(change_text(results['change'][protocol]))}.</p>"))  # fmt: skip
    flips = report.flips_by_type(samples)
    sections.append(("Before and after, exact", report.table_html(*flips) + "<p>All answers are in samples.jsonl.</p>"))
    curves = {"loss": "training loss", "eval_accuracy": "accuracy", "eval_accuracy_bucketed": "accuracy, bucketed"}
    sections += report.curves_section(read_history(run), curves)
    sections.append(("Examples", report.samples_html(report.varied(samples, 24), picture)))
    report.page("Questions about images", sections, run / "report.html", subtitle=f"{run}")


# ----------------------------------------------------------------------------------------------------
# Chat: free text


def score_chat(made: dict, scenes: list[QuestionScene], train: list[QuestionScene]) -> tuple[dict, list[dict]]:
    """({language, Chinese where question or answer is: `caption_scores.compare` of before and after}, a row for every question).

    Beside them: how many training answers there are and how many of them are distinct, for what a data set repeats a
    model copies; and the answers that equal the truth, apart for first questions and for those that follow others."""
    listed = [(scene.image, question) for scene in scenes for question in scene.questions]
    said = {name: [text for row in answers for text in row] for name, answers in made.items()}
    known = [question for scene in train for question in scene.questions]
    counted = Counter((question.text, question.answer) for question in known)
    usual = {text: answer for (text, answer), _ in reversed(counted.most_common())}
    guesses = {"most frequent answer to the question": [usual.get(question.text, "") for _, question in listed]}
    scores, rows = {}, []
    for language in ("en", "zh"):
        chosen = [n for n, (_, question) in enumerate(listed) if _spoken(question) == language]
        if not chosen:
            continue
        learnt = [[question.answer] for question in known if _spoken(question) == language]
        truths = [[listed[n][1].answer] for n in chosen]
        found = caption_scores.compare(
            {name: [texts[n] for n in chosen] for name, texts in said.items()}, truths, learnt, language=language,
            groups=[listed[n][0] for n in chosen],
        )  # fmt: skip
        for n, truth, values in zip(chosen, truths, caption_scores.per_image(found["after"])):
            image, question = listed[n]
            row = {"image": image, "language": language, "prompt": question.text, "history": question.history}
            row |= {"caption": said["after"][n], "before": said["before"][n], "references": truth}
            rows.append(row | values)
        distinct = len({text for texts in learnt for text in texts})
        training = {"answers": len(learnt), "distinct": distinct}
        scores[language] = {"models": caption_scores.without_images(found), "training": training}
        scores[language]["equal"] = [
            {"model": name}
            | {part: share_equal(answers, listed, numbers) for part, numbers in parts_of(listed, chosen)}
            for name, answers in (guesses | said).items()
        ]
    return scores, rows


def _spoken(question: Question) -> str:
    """The language that a question and its answer are scored in."""
    return caption_scores.language_of(question.text + question.answer)


def parts_of(listed: list, chosen: list[int]) -> list[tuple[str, list[int]]]:
    """The chosen questions that open a conversation and those that go on with one; without the empty part."""
    parts = {"first questions": [], "follow-ups": []}
    for n in chosen:
        parts["follow-ups" if listed[n][1].history else "first questions"].append(n)
    return [(f"{name} ({len(numbers)})", numbers) for name, numbers in parts.items() if numbers]


def share_equal(answers: list[str], listed: list, numbers: list[int]) -> float:
    """Share of answers that are the truth but for capitals, spaces and the full stop."""

    def bare(text):
        return "".join(text.casefold().split()).rstrip(".。")

    return sum(bare(answers[n]) == bare(listed[n][1].answer) for n in numbers) / len(numbers)


def chat_summary(results: dict, best) -> str:
    lines = ["", f"{results['split']} split, {results['images'][results['split']]} images"]
    for language, found in results["scores"].items():
        for title, rows, columns, notes in caption_scores.tables(found["models"]):
            lines += [caption_scores.questions_in(found, title), report.table_text(rows, columns), notes, ""]
        lines += ["Answers equal to the truth", report.table_text(*caption_scores.equal_table(found)), ""]
        training = found["training"]
        lines.append(f"{language}: {training['answers']} training answers, {training['distinct']} of them distinct")
    loss = results["loss"]
    lines.append(f"held-out loss, nats per token: before {loss['before']:.3f}, after {loss['after']:.3f}")
    if "steps" in results:
        lines.append(f"best step {results['best_step']} of {results['steps']}, {results['seconds']:.0f} s in all")
    return "\n".join([*lines, f"adapter {best}"])


# ----------------------------------------------------------------------------------------------------
# The run

# Settings that say where a run lies, not what it does.
PLACES = {"output_dir", "resume_from_checkpoint", "logging_dir", "cache_dir"}


def begun_blind(run: Path, settings: dict) -> str | None:
    """The newest whole checkpoint of a run's blind training, if that had the same settings and data."""

    def kept(record: dict) -> dict:
        record = record | {"settings": {key: value for key, value in record["settings"].items() if key not in PLACES}}
        return {key: value for key, value in record.items() if key != "transformers_version"}

    found = whole_checkpoints(run / "blind")
    last = found[max(found)] if found else None
    recorded = record_of(last) if last else {}
    return str(last) if recorded and kept(recorded) == kept(json.loads(json.dumps(settings))) else None


def refuse_other_settings(model: VQA, config: VQAConfig, argv: list[str]) -> None:
    """Raises InputError for a flag that says otherwise than the adapter of --lora, which keeps what it was trained with."""
    lora, sides = model.peft.peft_config["default"], model.processor.size
    targets = {name.rpartition(".")[2] for name in lora.target_modules if "language_model" in name}
    images = image_settings(config).to_dict()
    own = {
        "lora_rank": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout, "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora, "vision_tower": model.settings.vision_tower, "merger": model.settings.merger,
        "prompt": model.settings.prompt, "min_pixels": sides["shortest_edge"], "max_pixels": sides["longest_edge"],
        "lora_targets": sorted(targets),
    }  # fmt: skip
    own |= {name: value for name, value in model.settings.images.items() if name != "max_pixels"}
    asked = vars(config) | {name: images[name] for name in images if name != "max_pixels"}
    asked["lora_targets"] = sorted(config.lora_targets)
    for name, value in own.items():
        if flag_given(f"--{name}", argv) and asked[name] != value:
            raise InputError(f"--{name}: {config.lora} was trained with {value!r} and keeps that; leave the flag out")
    for side, names in model.parameter_groups().items():
        if not config.eval_only and not names and getattr(config, f"{side}_learning_rate", None) is not None:
            raise InputError(
                f"--{side}_learning_rate: that part is frozen in {config.lora}, and learns nothing; leave it out"
            )


class AnswerRun(Run):
    """A run: its data, its model, and what the model answers before and after. What differs between short answers and
    dialogue, reading and scoring for the most part, is in `Questions` and in `Dialogue`.

    Raises InputError for data, a base, an adapter or settings that it cannot use, before anything is trained."""

    def __init__(self, config: VQAConfig, args, changed: dict, argv: list[str]):
        super().__init__(config, args, changed)
        self.splits = self.read(argv)
        self.model = self.load(argv)
        if args.resume_from_checkpoint:  # here, and not after the answers before training
            self.model.refuse_checkpoint(args.resume_from_checkpoint)
        self.store = pixel_store(self.model, config.cache_dir)
        used = [self.tested] if config.eval_only else [*self.splits]  # of the others the answers alone are needed
        self.leave_out_unusable(used)
        self.say(f"data: {describe(self.splits)}")
        self.say(f"model: {self.model.settings.base_model}, {parameters_text(self.model)}")
        self.held = self.splits[self.tested]
        self.watched = watched_scenes(self.splits["val"], config.max_eval_questions)
        if not config.eval_only:
            check_best_metric(args, self.best_metrics())
        self.tokens = self.encode_images(used)
        self.collator = QuestionCollator(
            config.pack_tokens, packing=config.packing, pad_id=self.model.tokenizer.pad_token_id,
            align=row_align(args.device),
        )  # fmt: skip
        # {"before", "after", "blind": the answers to the questions of each scene that is held out}
        self.made: dict[str, list[list[str]]] = {}
        self.results: dict = {"config": changed, "split": self.tested, "images": self.images}

    # -- data and model

    def read(self, argv: list[str]) -> dict[str, list[QuestionScene]]:
        """{split: scenes}. Refuses held-out images that an adapter was trained on."""
        config, args = self.config, self.args
        root = None
        if config.eval_only:
            more = ("max_question_tokens", "max_answer_tokens")
            root = use_files_of_training(config, args, argv, config.lora, more)
            if not flag_given("--quantize", argv):  # of the model, whatever it is asked about
                config.quantize = record_of(config.lora).get("settings", {}).get("quantize", config.quantize)
        if not config.lora:
            read_config(config.base_model)  # a missing base is said before the data is read
        splits = self.load_splits(read=self.read_file, train_root=root)
        if config.eval_only:
            say_trained_images(config, args, config.lora, splits, self.say)
        elif config.lora and not args.resume_from_checkpoint:
            held_out = splits["val"] + splits["test"]
            refuse_trained_images(config, args, config.lora, held_out, self.say, warn=config.allow_leak)
        if config.max_test_scenes:
            splits["test"] = sample_scenes(splits["test"], config.max_test_scenes)
        return splits

    def load(self, argv: list[str]) -> VQA:
        """A base with a new adapter, or the adapter of --lora on its base."""
        config, args = self.config, self.args
        options = {"dtype": dtype_of(args), "device": str(args.device)}
        answers = self.closed_set()
        if not config.lora:
            return VQA.from_base(config, seed=args.seed, answers=answers, **options)
        # The adapter names its base; a flag, or the record of the run that is resumed, says where it lies now.
        moved = flag_value("--base_model", argv) or args.resume_from_checkpoint
        model = VQA.from_pretrained(
            config.lora, base_model=config.base_model if moved else None, config=config,
            trainable=not config.eval_only, quantize=config.quantize, **options,
        )  # fmt: skip
        if not args.resume_from_checkpoint:
            refuse_other_settings(model, config, argv)
        self.changed["base_model"] = model.settings.base_model
        if config.eval_only:
            model.settings.answers = model.settings.answers or answers
        else:  # what it learns from now on
            model.settings.answers, model.settings.max_answer_tokens = answers, config.max_answer_tokens
        return model

    def leave_out_unusable(self, used: list[str]) -> None:
        """Take out rows that are too long, and of the splits that are `used` the images that cannot be read."""
        config = self.config
        limits = {
            "question": ("--max_question_tokens", config.max_question_tokens),
            "answer": ("--max_answer_tokens", config.max_answer_tokens),
        }
        self.splits = drop_too_long(
            self.splits, self.model.tokenizer, config.max_rejected, self.rejected, self.too_long_advice, **limits
        )
        chosen = {name: self.splits[name] for name in used}
        self.splits |= drop_unreadable(chosen, self.store, config.max_rejected, self.rejected)

    def encode_images(self, used: list[str]):
        """The store of image tokens, which are constants where the vision tower is frozen; else None."""
        config, settings = self.config, self.model.settings
        frozen = settings.vision_tower == settings.merger == "frozen"
        if not (frozen and config.cache_dir and config.packing):
            return None
        paths = [scene.image for name in used for scene in self.splits[name]]
        return prepared_tokens(self.model, self.store, paths, config.cache_dir, self.args)

    def dataset_of(self, scenes: list[QuestionScene], blind: bool = False, texts_per_scene: int = 0) -> QuestionDataset:
        return QuestionDataset(
            scenes, self.model.prompt, processor=self.model.processor, store=self.store, tokens=self.tokens,
            texts_per_scene=texts_per_scene, seed=self.args.seed, blind=blind,
        )  # fmt: skip

    # -- asking. Layers are compiled for training alone: answering has other shapes at every token.

    @torch.compiler.set_stance("force_eager")
    def loss_of(self, dataset: QuestionDataset) -> float:
        return held_out_loss(self.model, dataset, self.collator, self.args.eval_batch_size)

    @torch.compiler.set_stance("force_eager")
    def ask(self, scenes: list[QuestionScene], **how) -> list[list[str]]:
        """The answers to each scene's questions."""
        return self.model.answer(
            [(scene.image, scene.questions) for scene in scenes], store=self.store, tokens=self.tokens,
            decode=self.config.decode, max_tokens=self.config.max_answer_tokens, budget=self.config.eval_pack_tokens, **how,
        )  # fmt: skip

    # -- what a run does

    def ask_before(self) -> None:
        with self.model.before():
            self.made["before"] = self.ask(self.held, progress=self.main_process)
            self.note_before()

    def trainer_of(self, args, blind: bool = False) -> SceneTrainer:
        config = self.config
        return SceneTrainer(
            model=self.model,
            task=PackedTask(lambda _: self.evaluate(blind)),
            args=args,
            train_dataset=self.dataset_of(self.splits["train"], blind, config.texts_per_scene),
            collator=self.collator,
            settings=self.record,
            watched=self.watched,
            rates={"vision": config.vision_learning_rate, "merger": config.merger_learning_rate, "language": None},
            early_stopping=config.early_stopping_patience,
        )

    def train(self) -> Path:
        """Train, and ask again; the best adapter's folder."""
        if self.config.compile_layers:
            self.model.compile_layers()
        trainer = self.trainer_of(self.args)
        if self.main_process:
            report.write_json(self.folder / "config.json", trainer.settings)
        outcome = trainer.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        best = trainer.save_best()
        self.results |= {"steps": outcome.global_step, "best_step": trainer.kept_step}
        self.made["after"] = self.ask(self.held, progress=self.main_process)
        if self.config.blind_baseline and self.has_blind_baseline:
            self.train_blind(trainer.settings)
            self.model.load_trained(best)
        return best

    def train_blind(self, settings: dict) -> None:
        """The same training without images: what the questions give away."""
        self.say("training the blind baseline: the same, without images")
        self.model.reset_adapter(self.args.seed)
        twin = copy.copy(self.args)
        begun = begun_blind(self.folder, settings) if self.args.resume_from_checkpoint else None
        twin.output_dir, twin.resume_from_checkpoint, twin.report_to = str(self.folder / "blind"), begun, []
        unseen = [p for name, p in self.model.named_parameters() if ".visual." in name and p.requires_grad]
        for parameter in unseen:  # it gets no gradient, for which DDP would wait
            parameter.requires_grad_(False)
        self.trainer_of(twin, blind=True).train(resume_from_checkpoint=begun)
        for parameter in unseen:
            parameter.requires_grad_(True)
        self.made["blind"] = self.ask(self.held, blind=True)

    def finish(self, adapter, keep: bool) -> dict:
        """Score what was answered, print it and, with `keep`, leave it in the run's folder."""
        self.score_all()
        self.results["seconds"] = self.seconds()
        text = self.as_text(adapter)
        if self.main_process and keep:
            report.write_json(self.folder / "results.json", self.results)
            rows = self.rows()
            report.write_atomic(self.folder / "samples.jsonl", report.json_lines(rows))
            self.write_page(rows)
            text += f"\nreport  {self.folder / 'report.html'}"
        self.say(text)
        return self.results


class Questions(AnswerRun):
    """Short answers, right or wrong."""

    name = "vqa"
    read_file = staticmethod(read_conversations)
    too_long_advice = "answers that are sentences are for --task chat"
    has_blind_baseline = True

    def closed_set(self) -> dict[str, list[str]]:
        return known_answers(self.splits["train"])

    def best_metrics(self) -> tuple[str, ...]:
        kinds = sorted({f"accuracy_{q.kind or 'question'}" for scene in self.watched for q in scene.questions})
        return ("accuracy", "accuracy_bucketed", *kinds)

    def note_before(self) -> None:
        if usual := score_majority(self.splits["train"], self.held):
            self.results["majority"] = usual

    def evaluate(self, blind: bool) -> dict[str, float]:
        found = score(self.ask(self.watched, blind=blind), self.watched, samples=1)
        kinds = {f"accuracy_{kind}": value["accuracy"] for kind, value in found["exact"]["types"].items()}
        return {"accuracy": found["exact"]["micro"], "accuracy_bucketed": found["bucketed"]["micro"]} | kinds

    def score_all(self) -> None:
        self.results |= {name: score(answers, self.held) for name, answers in self.made.items()}
        self.results["change"] = change_of(self.made, self.held)

    def rows(self) -> list[dict]:
        shown = {name: self.made[name] for name in ("before", "after", "blind") if name in self.made}
        return report.sample_rows(self.held, metrics.is_right, **shown)

    def as_text(self, adapter) -> str:
        return summary(self.results, adapter)

    def write_page(self, rows: list[dict]) -> None:
        write_report(self.folder, self.results, rows, self.store.picture)


class Dialogue(AnswerRun):
    """Free text."""

    name = "chat"
    read_file = staticmethod(read_chat)
    too_long_advice = ""
    has_blind_baseline = False

    def closed_set(self) -> dict[str, list[str]]:
        return {}

    def best_metrics(self) -> tuple[str, ...]:
        return ("loss",)

    @cached_property
    def held_texts(self) -> QuestionDataset:
        return self.dataset_of(self.held)

    @cached_property
    def watched_texts(self) -> QuestionDataset:
        return self.dataset_of(self.watched)

    def note_before(self) -> None:
        self.results["loss"] = {"before": self.loss_of(self.held_texts)}

    def evaluate(self, blind: bool) -> dict[str, float]:
        return {"loss": self.loss_of(self.watched_texts)}

    def score_all(self) -> None:
        self.results["loss"]["after"] = self.loss_of(self.held_texts)
        self.results["scores"], self.scored = score_chat(self.made, self.held, self.splits["train"])

    def rows(self) -> list[dict]:
        return self.scored

    def as_text(self, adapter) -> str:
        return chat_summary(self.results, adapter)

    def write_page(self, rows: list[dict]) -> None:
        caption_scores.write_page(
            self.folder / "report.html", "Dialogue", self.results["scores"], rows, read_history(self.folder),
            self.store.picture, subtitle=f"{self.folder}",
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Merge, and the command line


def merge(argv: list[str]) -> None:
    """`train_vqa.py merge`: base + adapter -> one model folder."""
    parser = argparse.ArgumentParser(prog="train_vqa.py merge", description="Write base and adapter as one model.")
    parser.add_argument("--lora", required=True, help="adapter folder: best_model/ or checkpoint-N/")
    parser.add_argument("--output", required=True, help="folder for the merged model")
    parser.add_argument("--base", help="folder of the base, if it is not where it was in training")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the file (auto: that of the base); the sum itself is made in float32",
    )  # fmt: skip
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: is there already and not empty; give another --output")
    refuse_unwritable(output.resolve().parent, "--output: its folder")
    read_as = "auto" if args.dtype == "auto" else torch.float32  # asked for more, the sum is not rounded to less
    model = VQA.from_pretrained(args.lora, base_model=args.base, dtype=read_as)
    ours = (Path(args.lora) / VQA_SETTINGS).is_file()
    if not ours:
        model.processor, _ = load_processor(model.settings.base_model)  # the base's pixel limits, not our preset's
    model.merge(output, None if args.dtype == "auto" else getattr(torch, args.dtype), settings=ours)
    print(f"merged  {output}")
    if not ours:
        print("an adapter of another tool: ask it as that tool did")
    elif model.settings.prompt != "{question}":
        print(f"ask it as it was trained: {model.settings.prompt!r}")


def main(argv: list[str] | None = None) -> dict | None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["merge"]:
        return merge(argv[1:])
    config, args, changed = parse(VQAConfig, argv, description=__doc__.split("\n")[0])
    transformers.utils.logging.disable_progress_bar()  # of weights: seconds at most
    if config.eval_only and not config.lora:
        raise InputError("--eval_only: give the adapter to score with --lora")
    with contextlib.nullcontext() if config.eval_only else own_folder(args):
        run = (Dialogue if config.task == "chat" else Questions)(config, args, changed, argv)
        run.ask_before()
        if config.eval_only:
            run.made["after"] = run.ask(run.held, progress=run.main_process)
            return run.finish(config.lora, keep=keeps_scores(argv))
        return run.finish(run.train(), keep=True)


if __name__ == "__main__":
    with user_errors():
        main()
