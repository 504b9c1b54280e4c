"""Indexing a folder of images, end to end, against the model's own forward rate and against other encode loops.

    pip install --no-deps clip-retrieval==2.45.0 && pip install sentence-transformers==6.2.0
    python benchmarks/bench_index.py --library ../shared/data/ucm_captions/images --images 256
    python benchmarks/bench_index.py --library big_folder --images 20000 --device cuda --dtype float16 --workers 16

All sides encode the same files with the same weights, dtype, batch size and threads:

    forward                 pixels of up to PRELOADED images read, resized, normalised and on the device before the clock
                            starts; the image tower and its projection
    ours                    library.index_library: plan, hash, read in worker processes, encode, write to the index, build
    sentence-transformers   SentenceTransformer.encode on Pillow images, opened as its documentation does (`Image.open`)
    clip-retrieval          its FilesReader (a DataLoader with the same number of workers), encode and normalise as its mapper
                            does; its writer is left out, in its favour. Our CLIP processor is its preprocessing (its own needs
                            torchvision).

Ours also reads GeoTIFF and places, stores payloads and can go on after a kill; the peers keep vectors in memory. The model is a
CLIP ViT-B/16 with random weights unless --shape says ViT-L/14 (RemoteCLIP's and GeoRSCLIP's larger tower, and the work of
Git-RSCLIP's ViT-L/16 at 256 pixels) or --model names a folder. Rounds are interleaved after one to warm up; the median of
their ratios is reported with the smallest and the largest. The aim for ours is 0.9 of the forward rate.
"""

import argparse
import importlib.util
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import InputError, user_errors
from data import pixel_batch
from imagery import read_image
from library import index_library
from model import DualEncoder, pixel_store
from report import table_text
from scenes import image_files
from trainer import write_json

PRELOADED = 8192  # images of the forward side: 5 GB at 224 pixels in float32
SIDES = ("forward", "ours", "sentence-transformers", "clip-retrieval")
PEERS = {"sentence-transformers": ("sentence_transformers", "pip install sentence-transformers==6.2.0"),
         "clip-retrieval": ("clip_retrieval", "pip install --no-deps clip-retrieval==2.45.0")}  # fmt: skip


SHAPES = {  # width, width within a layer, layers, heads, patch, projection
    "b16": (768, 3072, 12, 12, 16, 512),
    "l14": (1024, 4096, 24, 16, 14, 768),
}


def write_clip(folder: Path, shape: str) -> None:
    """A CLIP of this shape with random weights and a tokenizer of letters."""
    import json

    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    width, inner, layers, heads, patch, projection = SHAPES[shape]
    vision = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
              "patch_size": patch}  # fmt: skip
    text = {"num_hidden_layers": 2, "vocab_size": 60}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)).save_pretrained(folder)
    sizes = {"do_resize": True, "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "do_normalize": True,
             "resample": 3, "image_mean": [0.48145466, 0.4578275, 0.40821073], "do_rescale": True, "do_convert_rgb": True,
             "image_std": [0.26862954, 0.26130258, 0.27577711], "image_processor_type": "CLIPImageProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"} | marks
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="folder of images")
    parser.add_argument("--model", help="folder of a CLIP (default: random weights)")
    parser.add_argument("--shape", choices=list(SHAPES), default="b16", help="of the random weights")
    parser.add_argument("--images", type=int, default=256, help="how many of them")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="reading processes, of ours and of clip-retrieval")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sides", default=",".join(SIDES), help="some of: " + ", ".join(SIDES))
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    sides = [side.strip() for side in args.sides.split(",")]
    if unknown := sorted(set(sides) - set(SIDES)):
        raise InputError(f"--sides: no {unknown[0]!r}; there are {', '.join(SIDES)}")
    for side in sides:
        module, command = PEERS.get(side, (None, None))
        if module and importlib.util.find_spec(module) is None:
            raise InputError(f"{side} is not installed; run `{command}`, or leave it out of --sides")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        return compare(args, sides, scratch)


def compare(args, sides: list[str], scratch: Path) -> int:
    if args.model is None:
        args.model = scratch / "clip"
        write_clip(args.model, args.shape)
    files = image_files(args.library)[: args.images]
    root = scratch / "images"
    root.mkdir()
    for n, path in enumerate(files):
        shutil.copy(path, root / f"{n:06d}{path.suffix}")
    paths = sorted(root.iterdir())
    dtype = getattr(torch, args.dtype)
    model = DualEncoder.from_pretrained(args.model, device=args.device, dtype=dtype)
    store = pixel_store(model)
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    vectors = {}

    @torch.inference_mode()
    def forward():
        made = [model.encode_image(**batch) for batch in preloaded]
        wait()
        vectors["forward"] = torch.cat(made).float().cpu()
        return len(pixels)

    def ours():
        shutil.rmtree(scratch / "index", ignore_errors=True)
        index_library(model, root, scratch / "index", tile=0, workers=args.workers, batch_size=args.batch_size)

    def sentence_transformers():
        from PIL import Image

        images = [Image.open(path) for path in paths]
        made = peer.encode(images, batch_size=args.batch_size, convert_to_tensor=True, normalize_embeddings=True)
        wait()
        vectors["sentence-transformers"] = made.float().cpu()

    @torch.inference_mode()
    def clip_retrieval():
        # The file alone: the package's own __init__ imports its web server and what that needs.
        folder = importlib.util.find_spec("clip_retrieval").submodule_search_locations[0]
        spec = importlib.util.spec_from_file_location("reader", Path(folder) / "clip_inference/reader.py")
        spec.loader.exec_module(reader := importlib.util.module_from_spec(spec))

        def preprocess(image):
            return model.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

        batches = reader.FilesReader(
            lambda keys: keys, preprocess, None, root, args.batch_size, args.workers, enable_text=False
        )
        made = []
        for item in batches:
            features = model.model.get_image_features(item["image_tensor"].to(args.device, dtype)).pooler_output
            features = features / features.norm(dim=-1, keepdim=True)
            made.append(features.cpu())
        vectors["clip-retrieval"] = torch.cat(made).float()

    if "forward" in sides:
        pixels = [store.resize(read_image(path).rgb) for path in paths[:PRELOADED]]
        starts = range(0, len(pixels), args.batch_size)
        preloaded = [
            pixel_batch(pixels[start : start + args.batch_size], model.processor, args.device) for start in starts
        ]
    if "sentence-transformers" in sides:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import modules

        try:
            transformer = modules.CLIPModel(str(args.model))
        except AttributeError:
            from sentence_transformers.models import CLIPModel

            transformer = CLIPModel(str(args.model))
        peer = SentenceTransformer(modules=[transformer], device=args.device).to(dtype)
    runs = {
        "forward": forward,
        "ours": ours,
        "sentence-transformers": sentence_transformers,
        "clip-retrieval": clip_retrieval,
    }
    rates = {side: [] for side in sides}
    for round_number in range(args.rounds + 1):
        for side in sides:
            began = time.perf_counter()
            done = runs[side]() or len(paths)
            rate = done / (time.perf_counter() - began)
            if round_number:
                rates[side].append(rate)
            print(f"round {round_number}: {side} {rate:.1f} images/s", file=sys.stderr)
    if "ours" in sides:
        from library import Library

        with Library.open(scratch / "index", encoder=model) as library:
            vectors["ours"] = torch.from_numpy(library.everything()[1])
    rows = []
    for side in sides:
        ratios = [mine / first for first, mine in zip(rates[sides[0]], rates[side])]
        both = min(len(vectors[sides[0]]), len(vectors[side]))
        rows.append(
            {"side": side, "images/s": statistics.median(rates[side]), "ratio": statistics.median(ratios),
             "smallest": min(ratios), "largest": max(ratios),
             "cosine": float(torch.cosine_similarity(vectors[sides[0]][:both], vectors[side][:both]).min())}
        )  # fmt: skip
    shared = f"batches of {args.batch_size}, {args.threads} threads, {args.workers} workers, {args.device} {args.dtype}"
    print(f"{len(paths)} images, {shared}")
    heads = {"side": "side", "images/s": "images/s", "ratio": f"to {sides[0]}", "smallest": "smallest", "largest": "largest",
             "cosine": "least cosine to it"}  # fmt: skip
    print(table_text(rows, heads))
    if args.json:
        write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, "sides": rows})
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
