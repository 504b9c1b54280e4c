"""Train a captioner of remote-sensing images: CLIP or SigLIP, a projector, and any causal language model.

    python train_caption.py --data_path ./data --output_dir ./outputs --batch_size 4 --num_epochs 3
    python train_caption.py --preset demo                   # small models on drawn scenes, two CPU cores
    python train_caption.py --resume_from_checkpoint outputs

Two stages, as LLaVA has them: the projector alone (outputs/projector/), then the projector with the language model's last
layers or LoRA. Leaves in the output folder: final/ (a whole model), checkpoint-N/, config.json, metrics.jsonl,
results.json, captions.jsonl (every test image with its references and captions), report.html, TensorBoard events.
"""

import contextlib
import copy
import random
from collections import Counter
from pathlib import Path

import torch
import transformers

import caption_scores
import report
from config import PROJECTOR_STAGE, CaptionConfig, InputError, parse, user_errors
from data import (
    QuestionCollator,
    QuestionDataset,
    drop_too_long,
    drop_unreadable,
    row_align,
)
from model import Captioner, base_folder, pixel_store, weight_files
from scenes import QuestionScene, captions_as_answers, image_files
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


def prompts_of(scenes: list[QuestionScene]) -> dict[str, str]:
    """{language: its most frequent prompt}, the language with the most captions first."""
    asked: dict[str, Counter] = {}
    for scene in scenes:
        for question in scene.questions:
            asked.setdefault(question.kind, Counter())[question.text] += 1
    languages = sorted(asked, key=lambda language: -asked[language].total())
    return {language: asked[language].most_common(1)[0][0] for language in languages}


def in_language(scenes: list[QuestionScene], language: str) -> tuple[list[str], list[list[str]]]:
    """(images, captions of each, repeats too) of the scenes that have captions in a language."""
    listed = [
        (scene.image, [text for q in scene.questions if q.kind == language for text in [q.answer] * q.times])
        for scene in scenes
    ]
    listed = [(image, texts) for image, texts in listed if texts]
    return [image for image, _ in listed], [texts for _, texts in listed]


def describe(splits: dict[str, list[QuestionScene]]) -> str:
    parts = []
    for name, scenes in splits.items():
        kinds = Counter(question.kind for scene in scenes for question in scene.questions)
        if scenes:
            parts.append(f"{name} {len(scenes)} images, {' + '.join(f'{n} {k}' for k, n in kinds.items())} captions")
    return "; ".join(parts)


def without_caption(config: CaptionConfig, splits: dict[str, list[QuestionScene]]) -> int:
    """How many images of a data folder no caption is about (0 where the data is a file, or only a part of it is asked for)."""
    folder = Path(config.train_file)
    if not folder.is_dir() or config.max_samples or config.language != "all" or config.image_root:
        return 0
    described = {Path(scene.image).resolve() for scenes in splits.values() for scene in scenes}
    images = []
    with contextlib.suppress(InputError):  # none with a usual ending
        images = image_files(folder / "images")
    return sum(path.resolve() not in described for path in images)


# ----------------------------------------------------------------------------------------------------
# Scores


def summary(results: dict, final) -> str:
    lines = []
    for found in results["scores"].values():
        for title, rows, columns, notes in caption_scores.tables(found["models"]):
            lines += ["", f"{results['split']} split, {title}, prompt {found['prompt']!r}"]
            lines += [report.table_text(rows, columns), notes]
    if "steps" in results:
        lines.append(f"best step {results['best_step']} of {results['steps']}, {results['seconds']:.0f} s in all")
    return "\n".join([*lines, f"model  {final}"])


# ----------------------------------------------------------------------------------------------------
# The run


class CaptionRun(Run):
    """A run: its data, its model, and what the model writes.

    Raises InputError for data, bases or settings that it cannot use, before anything is trained."""

    name = "caption"

    def __init__(self, config: CaptionConfig, args, changed: dict):
        super().__init__(config, args, changed)
        for name in (config.vision_model_name, config.language_model_name):
            weight_files(base_folder(name))  # a missing base is said before the data is read
        self.splits = self.read()
        self.prompts = prompts_of(self.splits["train"])
        self.refuse_other_languages()
        made = Captioner.from_base(config, seed=args.seed, dtype=dtype_of(args), prompts=self.prompts)
        self.model = made.to(args.device)
        self.store = pixel_store(self.model, config.cache_dir)
        self.leave_out_unusable()
        self.say(f"data: {describe(self.splits)}")
        self.packing = config.packing and self.model.can_pack()
        self.describe_model()
        self.tokens = self.encode_images()
        self.collator = QuestionCollator(
            config.pack_tokens, packing=self.packing, pad_id=self.model.tokenizer.pad_token_id,
            align=row_align(args.device),
        )  # fmt: skip
        held_out = self.splits["val"]
        self.watched = random.Random(0).sample(held_out, min(len(held_out), config.max_eval_scenes))
        self.watched_texts = self.dataset_of(self.watched)
        scored = [f"CIDEr_{language}" for language in self.prompts if in_language(self.watched, language)[0]]
        check_best_metric(args, ("loss", *scored, "CIDEr"))

    # -- data and model

    def read(self) -> dict[str, list[QuestionScene]]:
        config, listed = self.config, self.load_splits()
        splits = {name: captions_as_answers(scenes, config.prompt, config.prompt_zh) for name, scenes in listed.items()}
        if count := without_caption(config, splits):
            self.say(f"data: {count} images of {config.train_file} have no caption and are left out")
        return splits

    def refuse_other_languages(self) -> None:
        for name in ("val", "test"):
            held_out = self.splits[name]
            if held_out and not any(in_language(held_out, language)[0] for language in self.prompts):
                raise InputError(
                    f"the {name} split has no caption in a language of the training split ({', '.join(self.prompts)}):"
                    " nothing could be scored"
                )

    def leave_out_unusable(self) -> None:
        """Take out captions that are too long, and images that cannot be read."""
        config = self.config
        limit = ("--max_caption_tokens", config.max_caption_tokens)
        tokenizer, allowed = self.model.tokenizer, (config.max_rejected, self.rejected)
        self.splits = drop_too_long(self.splits, tokenizer, *allowed, answer=limit)
        self.splits = drop_unreadable(self.splits, self.store, *allowed)

    def describe_model(self) -> None:
        config, model = self.config, self.model
        if config.packing and not self.packing:
            self.say(
                f"model: {config.language_model_name} has attention of its own: every caption runs as a row by itself"
            )
        parts = f"{config.vision_model_name} + {config.projector} + {config.language_model_name}"
        self.say(f"model: {parts}, {parameters_text(model)}, {model.projector.tokens} tokens an image")

    def encode_images(self):
        """The store of image features, which are constants where the vision encoder is frozen; else None."""
        if not (self.config.freeze_vision_model and self.config.cache_dir and self.packing):
            return None
        paths = [scene.image for scenes in self.splits.values() for scene in scenes]
        return prepared_tokens(self.model, self.store, paths, self.config.cache_dir, self.args)

    def dataset_of(self, scenes: list[QuestionScene], texts_per_scene: int = 0) -> QuestionDataset:
        return QuestionDataset(
            scenes, self.model.prompt, processor=self.model.processor, store=self.store, tokens=self.tokens,
            texts_per_scene=texts_per_scene, seed=self.args.seed, share=self.packing,
        )  # fmt: skip

    # -- training. Layers are compiled for it alone: writing has other shapes at every word.

    @torch.compiler.set_stance("force_eager")
    def write(self, images: list[str], prompt: str, progress: bool = False) -> list[str]:
        """A caption of each image."""
        return self.model.caption(
            images, prompt=prompt, store=self.store, tokens=self.tokens, batch_size=self.args.eval_batch_size,
            progress=progress,
        )  # fmt: skip

    @torch.compiler.set_stance("force_eager")
    def evaluate(self, _) -> dict[str, float]:
        loss = held_out_loss(self.model, self.watched_texts, self.collator, self.args.eval_batch_size)
        ciders = {}
        for language, prompt in self.prompts.items():
            images, references = in_language(self.watched, language)
            if images:
                said = self.write(images, prompt)
                ciders[f"CIDEr_{language}"] = caption_scores.cider(said, references, language=language)
        return {"loss": loss, **ciders, "CIDEr": sum(ciders.values()) / max(1, len(ciders))}

    def trainer_of(self, args, rates: dict, patience: int = 0) -> SceneTrainer:
        return SceneTrainer(
            model=self.model, task=PackedTask(self.evaluate), args=args, collator=self.collator, rates=rates,
            train_dataset=self.dataset_of(self.splits["train"], self.config.texts_per_scene),
            settings=self.record, watched=self.watched, early_stopping=patience,
        )  # fmt: skip

    def train(self) -> tuple[Path, dict]:
        """(the folder of the best model, how many steps it took)"""
        config, resume = self.config, self.args.resume_from_checkpoint
        if config.compile_layers:
            self.model.compile_layers()
        if self.main_process:
            report.write_json(self.folder / "config.json", self.record)
        if config.projector_epochs and (not resume or Path(resume).parent.name == PROJECTOR_STAGE):
            self.train_projector(resume)
            resume = None
        encoder = "" if config.freeze_vision_model else " and the vision encoder"
        self.say(f"stage 2: the projector and the language model{encoder}")
        rates = {"projector": config.projector_learning_rate, "vision": config.vision_learning_rate}
        trainer = self.trainer_of(self.args, rates, config.early_stopping_patience)
        outcome = trainer.train(resume_from_checkpoint=resume)
        final = trainer.save_best("final", self.model.save_whole)
        return final, {"steps": outcome.global_step, "best_step": trainer.kept_step}

    def train_projector(self, resume: str | None) -> None:
        config, twin = self.config, copy.copy(self.args)
        twin.output_dir, twin.num_train_epochs = str(self.folder / PROJECTOR_STAGE), config.projector_epochs
        twin.max_steps = -1  # of the second stage; it would count more than the epochs
        # Other trackers keep one run a process: a step of it that is written already would not be written again.
        twin.report_to = [name for name in self.args.report_to if name == "tensorboard"]
        twin.learning_rate = config.projector_stage_learning_rate
        twin.load_best_model_at_end, twin.eval_strategy = False, "no"
        self.model.set_stage(1)
        counted = " (--max_steps counts the second stage)" if self.args.max_steps > 0 else ""
        self.say(f"stage 1: the projector, {config.projector_epochs:g} epochs{counted}")
        self.trainer_of(twin, {}).train(resume_from_checkpoint=resume)
        self.model.set_stage(2)

    # -- results

    def score(self) -> tuple[dict, list[dict]]:
        """({language: the captioner's and the baselines' scores}, a row for every image)"""
        scores, rows, held_out = {}, [], self.splits[self.tested]
        paths = [scene.image for scene in (*self.splits["train"], *held_out)]
        pooled = dict(zip(paths, self.model.embed_images(paths, self.store, self.args.eval_batch_size, self.tokens)))
        for language, prompt in self.prompts.items():
            images, references = in_language(held_out, language)
            if not images:
                continue
            known, texts = in_language(self.splits["train"], language)
            features = ([pooled[path] for path in part] for part in (images, known))
            made = caption_scores.baselines(*features, texts)
            said = made["captioner"] = self.write(images, prompt, progress=True)
            found = caption_scores.compare(made, references, texts, language=language)
            for image, text, truths, values in zip(
                images, said, references, caption_scores.per_image(found["captioner"])
            ):
                row = {"image": image, "language": language, "prompt": prompt, "caption": text, "references": truths}
                rows.append(row | values)
            models = caption_scores.without_images(found)
            scores[language] = {"prompt": prompt, "images": len(images), "models": models}
        return scores, rows

    def finish(self, final: Path, steps: dict) -> dict:
        """Score the captions of the tested split, print and leave them in the run's folder."""
        results = {"config": self.changed, "split": self.tested, "images": self.images, "scores": {}} | steps
        if not self.main_process:
            return results
        results["scores"], rows = self.score()
        results["seconds"] = self.seconds()
        report.write_json(self.folder / "results.json", results)
        report.write_atomic(self.folder / "captions.jsonl", report.json_lines(rows))
        caption_scores.write_page(
            self.folder / "report.html", "Captions", results["scores"], rows, read_history(self.folder),
            self.store.picture, subtitle=f"{self.folder}",
        )  # fmt: skip
        print(summary(results, final))
        print(f"report  {self.folder / 'report.html'}")
        return results


def main(argv: list[str] | None = None) -> dict:
    config, args, changed = parse(CaptionConfig, argv, description=__doc__.split("\n")[0])
    transformers.utils.logging.disable_progress_bar()  # of weights: seconds at most
    with own_folder(args):
        run = CaptionRun(config, args, changed)
        return run.finish(*run.train())


if __name__ == "__main__":
    with user_errors():
        main()
