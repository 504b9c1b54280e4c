"""Use a trained captioner: write captions of images, and score them.

    python caption.py generate --model_path outputs/final --image_path image.tif --prompt "Describe the image."
    python caption.py generate --model_path outputs/final --image_path images/ --output_file captions.json
    python caption.py eval --model_path outputs/final --test_dir test_images --output_file eval_results.json
    python caption.py eval --model_path outputs/final --test_dir test_images --references captions.json ...

eval writes captions of every image; with --references those of the images that have some, their scores, and a page with the
best and the worst beside --output_file. An image that cannot be read is listed with its reason, the others are captioned, and
the exit code is 1 (0: all done; 2: nothing was done).
"""

import argparse
import functools
import html
import json
import signal
import sys
from pathlib import Path

from config import (
    InputError,
    add_device_flags,
    by_content,
    cache_folder,
    refuse_outside,
    refuse_unwritable_file,
    user_errors,
)
from scenes import Scene, find_leaks, has_word, image_files, images_of, is_chinese, load_json, read_scenes

DEMO = {
    "model_path": "output/demo_caption/final",
    "test_dir": "data/demo/images",
    "references": "data/demo/captions_en.json",
    "training": "data/demo/captions_en.json",
    "objects": "data/demo/objects.json",
    "output_file": "output/demo_caption/eval/results.json",
    "prompt": "Describe the image in detail.",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="eval|generate")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--preset", default="full", choices=["full", "demo"], help="demo: the model and data of make demo"
    )
    shared.add_argument("--model_path", help="final/ or checkpoint-N/ of a train_caption.py run")
    shared.add_argument("--prompt", help="what the model is asked (default: the prompt it was trained with)")
    shared.add_argument("--max_length", type=int, help="most tokens of a caption (default: as in training)")
    shared.add_argument("--num_beams", type=int, default=1, help="beam search over so many captions (1: greedy)")
    shared.add_argument("--temperature", type=float, default=0.0, help="above 0: draw words instead of the best ones")
    shared.add_argument(
        "--top_p", type=float, default=1.0, help="with --temperature: draw from the likeliest words of this total share"
    )
    shared.add_argument("--seed", type=int, default=0, help="another seed draws other words")
    shared.add_argument("--batch_size", type=int, default=32, help="images captioned at once (default: 32)")
    add_device_flags(shared)

    generate = commands.add_parser("generate", parents=[shared], help="write captions", description="Write captions.")
    generate.add_argument("--image_path", nargs="+", help="images, or folders of them")
    generate.add_argument("--output_file", help='file for [{"image", "caption"}] (default: the terminal)')

    score = commands.add_parser(
        "eval", parents=[shared], help="caption a folder and score", description="Score captions."
    )
    score.add_argument("--test_dir", help="folder of images, searched in depth")
    score.add_argument("--output_file", help="JSON file for captions and scores; its page is beside it")
    score.add_argument("--references", help="captions to score against, in any form train_caption.py reads")
    score.add_argument("--split", default="test", help="split of the references to score, where they have splits")
    score.add_argument("--language", choices=["en", "zh"], help="language of the references (default: the prompt's)")
    score.add_argument("--training", help="captions of training: adds the baselines and the share of copied captions")
    score.add_argument(
        "--objects", help='{"words": {object: [word]}, "images": {image: [object]}}: are they named rightly?'
    )
    score.add_argument(
        "--cache_dir", default=".cache", help="where resized images are kept, as in training (none: nowhere)"
    )
    score.add_argument(
        "--max_rejected", type=float, default=0.01, help="share of references that may be unusable (0 to 1)"
    )
    return parser


def checked(args) -> None:
    """Fill in a preset's defaults and refuse what no run can use. Raises InputError."""
    if args.preset == "demo":
        names = list(DEMO) if args.command == "eval" else ["model_path"]
        for name in names:
            if getattr(args, name) is None:
                setattr(args, name, DEMO[name])
    needed = ["model_path", "image_path"] if args.command == "generate" else ["model_path", "test_dir", "output_file"]
    for name in needed:
        if not getattr(args, name):
            raise InputError(f"{args.command} needs --{name}")
    refuse_outside(
        args, max_length=(1, 4096), num_beams=(1, 64), temperature=(0, 100), top_p=(0.01, 1), batch_size=(1, 4096),
        seed=(0, 2**32 - 1),
    )  # fmt: skip
    if args.temperature and args.num_beams > 1:
        raise InputError("--num_beams searches and --temperature draws: give one of them")
    if args.output_file:
        refuse_unwritable_file(args.output_file, "--output_file")
    if args.command == "eval":
        if Path(args.output_file).suffix.lower() in (".html", ".htm"):
            raise InputError(f"--output_file {args.output_file}: a JSON file; the page stands beside it as .html")
        args.cache_dir = cache_folder(args.cache_dir)


def load(args):
    from transformers import set_seed
    from transformers.utils import logging

    from model import Captioner, pick_device

    logging.disable_progress_bar()
    device, dtype = pick_device(args.device, args.dtype)
    model = Captioner.from_pretrained(args.model_path, device=device, dtype=dtype)
    set_seed(args.seed)
    return model


def write_captions(
    model, store, paths: list[str], args, streamer=None, tokens=None
) -> tuple[dict[str, str], dict[str, str]]:
    """({image: caption}, {image: why it has none}) of images whose pixels `store` (`data.PixelStore`) reads, some of which
    `tokens` (`data.TokenStore`) may hold encoded. What is written before an error, Ctrl-C or SIGTERM is left beside the
    output file."""
    from tqdm import tqdm

    from imagery import ImageError

    captions, broken = {}, {}
    hidden = None if len(paths) > args.batch_size else True  # None: shown in a terminal
    try:
        for start in tqdm(range(0, len(paths), args.batch_size), "captions", unit="batch", leave=False, disable=hidden):
            whole, pixels = [], {}
            for path in paths[start : start + args.batch_size]:
                try:
                    pixels[path] = store[path]
                    whole.append(path)
                except ImageError as error:
                    broken[path] = str(error)
            if whole:
                made = model.caption(
                    whole, prompt=args.prompt, store=pixels, batch_size=args.batch_size, max_tokens=args.max_length,
                    num_beams=args.num_beams, temperature=args.temperature, top_p=args.top_p, streamer=streamer,
                    tokens=tokens,
                )  # fmt: skip
                captions |= dict(zip(whole, made))
    except BaseException:
        if captions and args.output_file:
            from report import write_json

            part = f"{args.output_file}.partial"
            rows = [{"image": path, "caption": caption} for path, caption in captions.items()]
            write_json(part, rows)
            print(f"\n{len(captions)} captions so far -> {part}; another run writes all of them", file=sys.stderr)
        raise
    return captions, broken


def write_whole(path, content) -> None:
    """Write results, and remove what a run that was cut short left beside their place."""
    from report import write_json

    write_json(path, content)
    Path(f"{path}.partial").unlink(missing_ok=True)


def say_broken(broken: dict[str, str]) -> int:
    """Print what could not be read; the exit code."""
    for reason in list(broken.values())[:5]:
        print(f"error: {reason}", file=sys.stderr)
    if len(broken) > 5:
        print(f"error: and {len(broken) - 5} more images", file=sys.stderr)
    return 1 if broken else 0


# ----------------------------------------------------------------------------------------------------
# generate


def generate(args) -> int:
    from model import pixel_store

    paths = []
    for given in args.image_path:
        paths += [str(path) for path in image_files(given)] if Path(given).is_dir() else [given]
    model = load(args)
    streamer = None
    if len(paths) == 1 and not args.output_file and sys.stdout and sys.stdout.isatty() and args.num_beams == 1:
        from transformers import TextStreamer

        streamer = TextStreamer(model.tokenizer, skip_special_tokens=True)
    captions, broken = write_captions(model, pixel_store(model), paths, args, streamer)
    if args.output_file:
        rows = [{"image": path, "caption": captions[path]} for path in paths if path in captions]
        rows += [{"image": path, "error": reason} for path, reason in broken.items()]
        write_whole(args.output_file, rows)
        print(f"{len(captions)} captions -> {args.output_file}")
    elif len(paths) == 1 and captions and streamer is None:
        print(captions[paths[0]])
    elif len(paths) > 1:
        for path, caption in captions.items():
            print(f"{path}\t{caption}")
    code = say_broken(broken)
    return code if captions else 2


# ----------------------------------------------------------------------------------------------------
# eval


def reference_scenes(args, images: list[str], language: str) -> dict[str, list[str]]:
    """{image: its references} of the split asked for, of those `images` that have any."""
    found = read_scenes(
        args.references, more_roots=(args.test_dir,), language=language, max_rejected=args.max_rejected, among=images
    )
    for bad in found.rejected[:5]:
        print(f"warning: {bad.file}: row {bad.row}: {bad.reason}", file=sys.stderr)
    elsewhere = [name for name, split in found.elsewhere.items() if split in (None, args.split)]
    if elsewhere:
        print(
            f"{len(elsewhere)} images of {args.references} are not in {args.test_dir} and are left out, first {elsewhere[0]}"
        )
    splits = {scene.split for scene in found.scenes}
    if splits != {None} and args.split not in splits:
        raise InputError(f"{args.references}: no row of split {args.split!r}; there are {sorted(map(str, splits))}")
    chosen = {
        scene.image: [text for text in scene.listed if has_word(text)]
        for scene in found.scenes
        if splits == {None} or scene.split == args.split
    }
    return {image: texts for image, texts in chosen.items() if texts}


def read_objects(path: str, images: list[str]) -> tuple[dict, list, dict[str, list[str]]]:
    """(words of each object, phrases to ignore, {image: objects in it}) of an --objects file. Raises InputError."""
    from imagery import ImageError, image_size

    content = load_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in ("words", "images")):
        raise InputError(f'{path}: expected {{"words": {{object: [word]}}, "images": {{image: [object]}}}}')
    words, listed, ignore = content["words"], content["images"], content.get("ignore", [])
    lists = [("words", *item) for item in words.items()] + [("images", *item) for item in listed.items()]
    for field, name, value in [*lists, ("ignore", "it", ignore)]:
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise InputError(
                f"{path}: field {field!r}: {name}: expected a list of texts, found {json.dumps(value)[:60]}"
            )
    present, taken = {}, {}
    for image in images:
        parts = Path(image).parts
        name = next((tail for n in range(len(parts)) if (tail := Path(*parts[n:]).as_posix()) in listed), None)
        if name is None:
            try:
                image_size(image)
            except ImageError:
                continue  # it has no caption either, and is told with the others that cannot be read
            raise InputError(f"{path}: field 'images': {Path(image).name} is missing")
        if name in taken:
            raise InputError(
                f"{path}: field 'images': {name} is both {taken[name]} and {image}: name them with their folders"
            )
        present[image], taken[name] = listed[name], image
        if unknown := set(present[image]) - set(words):
            raise InputError(f"{path}: field 'words': {sorted(unknown)[0]!r} of {name} is missing")
    return words, ignore, present


def objects_line(found: dict) -> str:
    """`metrics.object_mentions` in one line."""
    parts = []
    for name in ("precision", "recall"):
        low, high = found[f"{name}_interval"] or (0, 0)
        parts.append(f"{name} {found[name]:.3f} ({low:.3f} to {high:.3f})" if found[name] is not None else f"{name} –")
    return (
        f"objects named: {', '.join(parts)} of {found['present']} in the images;"
        f" captions that name one that is not there: {found['hallucinating']:.1%}"
    )


def choose_language(args, model) -> str:
    """The language to score in; the model is asked with the prompt that was given, or that it learnt for this language."""
    if args.language and not args.prompt:
        args.prompt = model.settings.prompts.get(args.language)
        if args.prompt is None:
            raise InputError(
                f"--language {args.language}: the model was trained in another; give the --prompt to ask it with"
            )
    args.prompt = args.prompt or model.default_prompt()
    learnt = {text: name for name, text in model.settings.prompts.items()}
    return args.language or learnt.get(args.prompt) or ("zh" if is_chinese(args.prompt) else "en")


def training_scenes(args, images: list[str], store, language: str) -> list[Scene]:
    """What the captioner learnt from, of --training; says where `images` are among it."""
    from data import drop_unreadable

    found = read_scenes(args.training, more_roots=(args.test_dir,), language=language, max_rejected=args.max_rejected)
    known = [scene for scene in found.scenes if scene.split in (None, "train")]
    if not known:
        raise InputError(f"{args.training}: no row of split 'train'")
    both = {"train": [scene for scene in known if scene.split], "test": [Scene(image) for image in images]}
    content = by_content(images_of(both | {"all": known}))
    if leaks := find_leaks(both, content):
        print(
            f"warning: {len(leaks)} of these images are in the training split of {args.training}, first {leaks[0][2]}"
        )
    # A file without splits may list what was held out, too: the nearest training image would be the image itself.
    scored = {content[image] for image in images}
    if same := [scene for scene in known if not scene.split and content[scene.image] in scored]:
        print(
            f"{len(same)} of these images are in {args.training}, which names no splits: the baselines go without them"
        )
        known = [scene for scene in known if scene.split or content[scene.image] not in scored]
    if not known:
        raise InputError(
            f"{args.training}: names no splits, and all of its images are scored; give what was trained on"
        )
    return drop_unreadable({"train": known}, store, args.max_rejected)["train"]


def score_captions(
    rows: list[dict], references: dict[str, list[str]], known: list[Scene], embed, language: str
) -> dict:
    """`caption_scores.compare` of the captions in `rows` and, where training scenes are known, of baselines, for which
    `embed(paths)` are the features of images. Each row gets its references and scores."""
    import caption_scores

    images, texts = [row["image"] for row in rows], [scene.listed for scene in known]
    truths = [references[image] for image in images]
    made = {"captioner": [row["caption"] for row in rows]}
    if known:
        made = caption_scores.baselines(embed(images), embed([scene.image for scene in known]), texts) | made
    found = caption_scores.compare(made, truths, texts, language=language)
    for row, truth, scores in zip(rows, truths, caption_scores.per_image(found["captioner"])):
        row |= {"references": truth} | scores
    return found


def evaluate(args) -> int:
    import caption_scores
    import metrics
    import report
    from model import pixel_store

    model = load(args)
    language = choose_language(args, model)
    prompt = args.prompt
    images = [str(path) for path in image_files(args.test_dir)]
    references = reference_scenes(args, images, language) if args.references else {}
    if references:
        if unscored := len(images) - len(references):
            print(f"{unscored} images of {args.test_dir} have no reference in split or language and are left out")
        images = list(references)
    # What the captions are compared with is read before they are written, which may take hours.
    told = read_objects(args.objects, images) if args.objects else None
    store = pixel_store(model, args.cache_dir)
    known = training_scenes(args, images, store, language) if references and args.training else []
    tokens = model.token_store(args.cache_dir, store) if args.cache_dir else None
    captions, broken = write_captions(model, store, images, args, tokens=tokens)
    if not captions:
        raise InputError(f"{args.test_dir}: no image could be read; {next(iter(broken.values()))}")
    images = list(captions)
    rows = [{"image": image, "caption": captions[image]} for image in images]
    result = {"model": str(args.model_path), "prompt": prompt, "language": language, "images": len(images)}
    sections, output = [], Path(args.output_file)
    # Written before the scores, too, which are one more thing that may fail.
    report.write_json(output, result | {"captions": rows, "errors": broken})

    if references:
        embed = functools.partial(model.embed_images, store=store, tokens=tokens)
        found = score_captions(rows, references, known, embed, language)
        result["scores"] = caption_scores.without_images(found)
        for title, table, columns, notes in caption_scores.tables(found):
            print(f"{title}, prompt {prompt!r}", report.table_text(table, columns), notes, "", sep="\n")
            sections.append((title, report.table_html(table, columns) + f"<p>{html.escape(notes)}</p>"))
    if told:
        words, ignore, named = told
        present = [named[image] for image in images]
        found = result["objects"] = metrics.object_mentions(list(captions.values()), present, words, ignore)
        line = objects_line(found)
        print(line)
        sections.append(("Objects named", f"<p>{html.escape(line)}</p>"))

    result["captions"] = rows
    result["errors"] = broken
    write_whole(output, result)
    sections += report.caption_sections(rows, store.picture)
    page = report.page("Captions", sections, output.with_suffix(".html"), subtitle=f"{args.model_path}: {prompt}")
    print(f"{len(rows)} captions -> {output}, {page}")
    return say_broken(broken)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    checked(args)
    return generate(args) if args.command == "generate" else evaluate(args)


if __name__ == "__main__":
    if (
        signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
    ):  # clusters end a job with it: what is written stays, as at Ctrl-C
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with user_errors():
        sys.exit(main())
