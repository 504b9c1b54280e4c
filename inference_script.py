"""Score image-text pairs with a trained matcher: cosine, from -1 to 1; higher is a better match.

    python inference_script.py --checkpoint output/training_.../best_model --image_path a.tif --text "一片农田"
    python inference_script.py --checkpoint ... --image_path a.tif --text "farmland" "a harbour" "a forest"
    python inference_script.py --checkpoint ... --json_input input.json --json_output output_scores.json
    cat input.json | python inference_script.py --checkpoint ... --json_input - --json_output - | ...

The JSON is [{"image_path": ..., "text": ...}]; the same rows come back with "score". A row that cannot be scored comes
back with "error" instead, the others are scored, and the exit code is 1 (0: every row scored; 2: nothing was done).
"""

import argparse
import os
import sys
from pathlib import Path

from config import NO_CHARACTER, InputError, add_device_flags, refuse_unwritable_file, user_errors


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="best_model/ or checkpoint-N/ of a train_match.py run")
    parser.add_argument("--image_path", help="image of the pair")
    parser.add_argument("--text", nargs="+", help="one or more texts to score against the image")
    parser.add_argument(
        "--json_input", help='file of [{"image_path", "text"}], a CSV of these columns, or - for standard input'
    )
    parser.add_argument("--json_output", help="file for the rows with their scores, or - for standard output")
    parser.add_argument(
        "--image_root", help="folder that relative image paths start from (default: the input file's, then here)"
    )
    parser.add_argument("--base_model", help="folder of the base, if it is not where it was in training")
    add_device_flags(parser)
    parser.add_argument(
        "--batch_size", type=int, default=32, help="images encoded at once (32); texts: four times as many"
    )
    return parser


def score_rows(
    model, rows: list, *, root: Path | None = None, batch_size: int = 32, progress: bool = False
) -> list[dict]:
    """The rows with `score`, or with `error`; each distinct image and each distinct text is encoded once.

    Raises InputError when `rows` is not a list.
    """
    import torch

    from data import each_file
    from model import pixel_store
    from scenes import path_of

    if not isinstance(rows, list):
        raise InputError(f'input: expected a list of {{"image_path", "text"}}, found {type(rows).__name__}')
    results = [dict(row) if isinstance(row, dict) else {"row": row} for row in rows]
    for number, (row, result) in enumerate(zip(rows, results)):
        result.pop("score", None)
        result.pop("error", None)
        if reason := row_error(row):
            result["error"] = f"row {number}: {reason}"

    def located(name: str) -> str:
        name = path_of(name)
        for path in (name, name.replace("\\", "/")):  # the second: written on Windows
            for place in (root / path, root / "images" / path, Path(path)) if root else (Path(path),):
                if os.path.exists(place):
                    return str(place)
        return name

    good = [i for i, result in enumerate(results) if "error" not in result]
    paths = {path: k for k, path in enumerate(dict.fromkeys(rows[i]["image_path"] for i in good))}
    texts = {text: k for k, text in enumerate(dict.fromkeys(rows[i]["text"].strip() for i in good))}
    read = each_file(pixel_store(model).__getitem__, [located(path) for path in paths])
    images = torch.full((len(paths), model.settings.projection_dim), torch.nan)
    from tqdm import tqdm

    names, broken = list(paths), {}
    bar = tqdm(total=len(names), desc="images", unit="image", disable=not progress, file=sys.stderr)
    for start in range(0, len(names), batch_size):
        chunk = list(zip(names[start : start + batch_size], read))
        broken |= {path: str(pixels) for path, pixels in chunk if isinstance(pixels, InputError)}
        whole = [(path, pixels) for path, pixels in chunk if not isinstance(pixels, InputError)]
        if whole:
            made = model.embed_images([pixels for _, pixels in whole], batch_size=batch_size)
            images[[paths[path] for path, _ in whole]] = made
        bar.update(len(chunk))
    bar.close()
    embedded = model.embed_texts(list(texts), batch_size=4 * batch_size, progress=progress)
    for i in good:
        path, text = rows[i]["image_path"], rows[i]["text"].strip()
        if path in broken:
            results[i]["error"] = f"row {i}: {broken[path]}"
        else:
            results[i]["score"] = round(float(images[paths[path]] @ embedded[texts[text]]), 6)
    return results


def row_error(row) -> str | None:
    """What is wrong with a row before anything is read, or None."""
    if not isinstance(row, dict):
        return f'expected {{"image_path", "text"}}, found {type(row).__name__}'
    for name in ("image_path", "text"):
        if name not in row:
            return f"field {name!r} is missing"
        if not isinstance(row[name], str):
            return f"field {name!r}: expected a text, found {type(row[name]).__name__}"
        if not row[name].strip():
            return f"field {name!r} is empty"
        if NO_CHARACTER.search(row[name]):
            return f"field {name!r} holds what is no character: {row[name][:60]!a}"
    return None


def read_rows(source: str):
    """Rows of a JSON, CSV or TSV file, or of JSON from standard input. Raises InputError with line and column."""
    from scenes import load_rows, parse_json

    if source != "-":
        return load_rows(Path(source))
    try:
        return parse_json(sys.stdin.buffer.read().decode("utf-8-sig"), "standard input")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 text (byte {error.start})") from None


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch_size {args.batch_size}: expected 1 or more")
    if bool(args.json_input) == bool(args.image_path or args.text):
        raise InputError("give either --image_path with --text, or --json_input")
    if args.json_input:
        rows = read_rows(args.json_input)
        folder = Path(args.json_input).parent if args.json_input != "-" else None
    else:
        if not (args.image_path and args.text):
            raise InputError("a pair needs both --image_path and --text")
        rows, folder = [{"image_path": args.image_path, "text": text} for text in args.text], None
    to_file = args.json_output and args.json_output != "-"
    if to_file:
        if not Path(args.json_output).resolve().parent.is_dir():
            raise InputError(f"--json_output {args.json_output}: its folder does not exist")
        refuse_unwritable_file(args.json_output, "--json_output")

    from transformers.utils import logging

    from model import DualEncoder, pick_device

    logging.disable_progress_bar()
    device, dtype = pick_device(args.device, args.dtype)
    model = DualEncoder.from_pretrained(args.checkpoint, base_model=args.base_model, device=device, dtype=dtype)
    root = Path(args.image_root) if args.image_root else folder
    results = score_rows(model, rows, root=root, batch_size=args.batch_size, progress=bool(args.json_input))
    errors = [result["error"] for result in results if "error" in result]

    if to_file:
        from report import write_json

        write_json(args.json_output, results)
        print(f"{len(results) - len(errors)} of {len(results)} rows scored -> {args.json_output}", file=sys.stderr)
    elif args.json_input or args.json_output:
        from report import json_to_print

        print(json_to_print(results))  # half a surrogate pair is told as an error, and shown as "?"
    else:
        for result in sorted((r for r in results if "score" in r), key=lambda r: -r["score"]):
            print(f"{result['score']:+.4f}  {result['text']}")
    # Pairs of the command line have one image and no row to name.
    told = errors if args.json_input else list(dict.fromkeys(error.partition(": ")[2] for error in errors))
    for error in told[:5]:
        print(f"error: {error}", file=sys.stderr)
    if len(told) > 5:
        print(f"error: and {len(told) - 5} more rows", file=sys.stderr)
    if len(errors) == len(results) and not args.json_input:
        return 2
    return 1 if errors else 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
