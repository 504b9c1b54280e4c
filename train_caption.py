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
import json
import random
import time
from collections import Counter
from pathlib import Path

import torch
import transformers

import caption_scores
import report
from config import PROJECTOR_STAGE, CaptionConfig, InputError, parse, user_errors
from data import QuestionCollator, QuestionDataset, drop_too_long, drop_unreadable, row_align
from imagery import ImageSettings, read_image
from model import Captioner, base_folder, pixel_store, weight_files
from scenes import QuestionScene, captions_as_answers, image_files, load_splits
from trainer import PackedTask, SceneTrainer, check_best_metric, held_out_loss, read_history, write_json

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


def main(argv: list[str] | None = None) -> dict:
    config, args, changed = parse(CaptionConfig, argv, description=__doc__.split("\n")[0])
    transformers.utils.logging.disable_progress_bar()  # of weights: seconds at most
    run = Path(args.output_dir)
    main_process = args.process_index == 0
    say = print if main_process else (lambda *_: None)
    started = time.perf_counter()
    rejected = run / "rejected.jsonl" if main_process else None

    # ---- data and model
    for name in (config.vision_model_name, config.language_model_name):
        weight_files(base_folder(name))  # a missing base is said before the data is read
    splits = {
        name: captions_as_answers(scenes, config.prompt, config.prompt_zh)
        for name, scenes in load_splits(config, args.seed, rejected).items()
    }
    if count := without_caption(config, splits):
        say(f"data: {count} images of {config.train_file} have no caption and are left out")
    prompts = prompts_of(splits["train"])
    for name in ("val", "test"):
        if splits[name] and not any(in_language(splits[name], language)[0] for language in prompts):
            raise InputError(
                f"the {name} split has no caption in a language of the training split ({', '.join(prompts)}): nothing could be"
                " scored"
            )
    model = Captioner.from_base(
        config, seed=args.seed, dtype=torch.bfloat16 if args.bf16 else torch.float32, prompts=prompts
    ).to(args.device)
    splits = drop_too_long(
        splits,
        model.tokenizer,
        config.max_rejected,
        rejected,
        answer=("--max_caption_tokens", config.max_caption_tokens),
    )
    store = pixel_store(model, config.cache_dir)
    splits = drop_unreadable(splits, store, config.max_rejected, rejected)
    say(f"data: {describe(splits)}")
    packing = config.packing and model.can_pack()
    if config.packing and not packing:
        say(f"model: {config.language_model_name} has attention of its own: every caption runs as a row by itself")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"model: {config.vision_model_name} + {config.projector} + {config.language_model_name},"
        f" {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {trained / 1e6:.2f} M trained,"
        f" {model.projector.tokens} tokens an image"
    )

    # ---- a frozen vision encoder's features are constants
    tokens = None
    if config.freeze_vision_model and config.cache_dir and packing:
        tokens = model.token_store(config.cache_dir, store)
        if main_process:
            paths = [scene.image for scenes in splits.values() for scene in scenes]
            model.prepare_tokens(tokens, store, paths, args.eval_batch_size)
        if args.world_size > 1:
            torch.distributed.barrier()

    # Layers are compiled for training alone: writing has other shapes at every word.
    @torch.compiler.set_stance("force_eager")
    def write(images, prompt, progress=False):
        return model.caption(
            images, prompt=prompt, store=store, tokens=tokens, batch_size=args.eval_batch_size, progress=progress
        )

    # ---- training
    if config.compile_layers:
        model.compile_layers()
    collator = QuestionCollator(
        config.pack_tokens, packing=packing, pad_id=model.tokenizer.pad_token_id, align=row_align(args.device)
    )

    def dataset_of(scenes, texts_per_scene=0):
        return QuestionDataset(
            scenes, model.prompt, processor=model.processor, store=store, tokens=tokens,
            texts_per_scene=texts_per_scene, seed=args.seed, share=packing,
        )  # fmt: skip

    watched = random.Random(0).sample(splits["val"], min(len(splits["val"]), config.max_eval_scenes))
    held_out = dataset_of(watched)

    @torch.compiler.set_stance("force_eager")
    def evaluate(_):
        found = {"loss": held_out_loss(model, held_out, collator, args.eval_batch_size)}
        for language, prompt in prompts.items():
            images, references = in_language(watched, language)
            if images:
                found[f"CIDEr_{language}"] = caption_scores.cider(write(images, prompt), references, language=language)
        values = [value for name, value in found.items() if name != "loss"]
        return found | {"CIDEr": sum(values) / max(1, len(values))}

    def trainer_of(arguments, rates, patience=0):
        return SceneTrainer(
            model=model, task=PackedTask(evaluate), args=arguments, collator=collator, rates=rates,
            train_dataset=dataset_of(splits["train"], config.texts_per_scene),
            settings={"task": "caption", "settings": changed}, watched=watched, early_stopping=patience,
        )  # fmt: skip

    if main_process:
        write_json(run / "config.json", {"task": "caption", "settings": changed})
    scored = [f"CIDEr_{language}" for language in prompts if in_language(watched, language)[0]]
    check_best_metric(args, ("loss", *scored, "CIDEr"))
    resume = args.resume_from_checkpoint
    first_stage = not resume or Path(resume).parent.name == PROJECTOR_STAGE
    if config.projector_epochs and first_stage:
        twin = copy.copy(args)
        twin.output_dir, twin.num_train_epochs = str(run / PROJECTOR_STAGE), config.projector_epochs
        twin.max_steps = -1  # of the second stage; it would count more than the epochs
        # Other trackers keep one run a process: a step of it that is written already would not be written again.
        twin.report_to = [name for name in args.report_to if name == "tensorboard"]
        twin.learning_rate, twin.load_best_model_at_end, twin.eval_strategy = (
            config.projector_stage_learning_rate,
            False,
            "no",
        )
        model.set_stage(1)
        say(
            f"stage 1: the projector, {config.projector_epochs:g} epochs"
            + (" (--max_steps counts the second stage)" if args.max_steps > 0 else "")
        )
        trainer_of(twin, {}).train(resume_from_checkpoint=resume)
        model.set_stage(2)
        resume = None
    say(
        "stage 2: the projector and the language model"
        + ("" if config.freeze_vision_model else " and the vision encoder")
    )
    rates = {"projector": config.projector_learning_rate, "vision": config.vision_learning_rate}
    trainer = trainer_of(args, rates, config.early_stopping_patience)
    outcome = trainer.train(resume_from_checkpoint=resume)
    final = trainer.save_best("final", model.save_whole)

    # ---- results
    tested = "test" if splits["test"] else "val"
    results: dict = {
        "config": changed, "split": tested, "images": {name: len(scenes) for name, scenes in splits.items()},
        "scores": {}, "steps": outcome.global_step, "best_step": trainer.kept_step,
    }  # fmt: skip
    if main_process:
        rows: list[dict] = []
        paths = [scene.image for name in ("train", tested) for scene in splits[name]]
        pooled = dict(zip(paths, model.embed_images(paths, store, args.eval_batch_size)))
        for language, prompt in prompts.items():
            images, references = in_language(splits[tested], language)
            if not images:
                continue
            known, texts = in_language(splits["train"], language)
            features = ([pooled[path] for path in part] for part in (images, known))
            made = caption_scores.baselines(*features, texts)
            made["captioner"] = write(images, prompt, progress=True)
            found = caption_scores.compare(made, references, texts, language=language)
            for image, text, truths, scores in zip(
                images, made["captioner"], references, caption_scores.per_image(found["captioner"])
            ):
                row = {"image": image, "language": language, "prompt": prompt, "caption": text, "references": truths}
                rows.append(row | scores)
            models = caption_scores.without_images(found)
            results["scores"][language] = {"prompt": prompt, "images": len(images), "models": models}
        results["seconds"] = round(time.perf_counter() - started, 1)
        write_json(run / "results.json", results)
        listed = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        report.write_atomic(run / "captions.jsonl", "".join(listed))
        settings = ImageSettings.from_dict(model.settings.images)
        caption_scores.write_page(
            run / "report.html", "Captions", results["scores"], rows, read_history(run),
            lambda path: read_image(path, settings, max_side=448).rgb, subtitle=f"{run}",
        )  # fmt: skip
        print(summary(results, final))
        print(f"report  {run / 'report.html'}")
    return results


if __name__ == "__main__":
    with user_errors():
        main()
