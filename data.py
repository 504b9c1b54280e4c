"""Scenes to tensors: pixels read and resized once, features kept, a scene packed into one sequence."""

import contextlib
import copy
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from config import (
    CUT_SHORT,
    DataConfig,
    InputError,
    by_content,
    processors,
    record_of,
    use_files_of_training,
    was_trained_on,
)
from imagery import RENDERING, ImageError, ImageSettings, file_state, guessed_bands, read_image, read_rgb
from scenes import (
    Question,
    QuestionScene,
    Rejected,
    Scene,
    find_leaks,
    images_of,
    list_rejected,
    load_splits,
    read_chat,
    read_conversations,
    read_scenes,
)

# ----------------------------------------------------------------------------------------------------
# Pixels: every image is decoded and resized once


def image_settings(config: DataConfig) -> ImageSettings:
    """The `ImageSettings` a configuration asks for. Raises InputError."""
    return ImageSettings(
        bands=config.bands,
        stretch=config.stretch,
        percentiles=tuple(config.percentiles),
        reflectance=tuple(config.reflectance),
        nodata=config.nodata,
    )


def digest_of(text: str) -> str:
    """32 hex digits, by which caches name what belongs to a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def rows_digest(scenes: Iterable[Scene | QuestionScene]) -> str:
    """A text that changes when the rows of these images do, not when they are moved."""
    rows = [[Path(scene.image).name, scene.rows] for scene in scenes]
    return digest_of(json.dumps(rows, default=vars))  # not asdict, which copies: 12 s of a million questions


class _Calls(Dataset):
    """function(path) of `size` paths at a time. An InputError is given back: a DataLoader would wrap it in a traceback."""

    def __init__(self, function: Callable, paths: list, size: int):
        self.function, self.paths, self.size = function, paths, size

    def __len__(self) -> int:
        return -(-len(self.paths) // self.size)

    def __getitem__(self, number: int) -> list:
        return [self._call(path) for path in self.paths[number * self.size : (number + 1) * self.size]]

    def _call(self, path):
        try:
            return self.function(path)
        except InputError as error:
            return error


def each_file(function: Callable, paths: list[str], workers: int | None = None, size: int = 4) -> Iterator:
    """function(path) of each path in turn, or the InputError that it raised; made ahead in processes, `size` paths at a time.

    workers: the number of processes, 0 for none; None: as many as there are processors, up to 16. Fewer where there is
    little to do. Threads would not share the work: GDAL opens files under Python's lock. And a process that is forked
    while a thread ends that used GDAL may wait for ever for a lock of PROJ's database.
    """
    if workers is None:
        workers = min(16, processors() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    calls = _Calls(function, paths, size)
    workers = min(workers, len(calls) // (2 if multiprocessing.get_start_method() == "fork" else 128))
    for made in DataLoader(calls, None, num_workers=workers if workers > 1 else 0, collate_fn=list):
        yield from made


def fitting_workers(workers: int, batch: Callable[[], dict | None], ahead: int) -> int:
    """How many of these reading processes have room in shared memory for `ahead` batches each, of the tensors in `batch()`: where
    it is full, as soon in Docker's 64 MB, they would wait for ever. Says so where it is fewer."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # no such thing here
        return workers
    if not workers or free > 8 * 2**30:
        return workers
    from accelerate.utils import recursively_apply

    sizes = [1]
    recursively_apply(lambda tensor: sizes.append(tensor.nbytes), batch())
    each = (ahead + 1) * sum(sizes)
    if (fit := free // each) < workers:
        print(
            f"shared memory: {free / 2**20:.0f} MiB are free in /dev/shm, {each / 2**20:.0f} are needed for each process that"
            f" reads ahead: {fit} of {workers} are started (Docker: --shm-size 8g)",
            file=sys.stderr,
        )
    return min(workers, fit)


def over_files(function: Callable, paths: Iterable[str], workers: int | None = None, size: int = 4, **bar) -> list:
    """[function(path) for path in paths] by `each_file`; raises the first InputError. bar: what tqdm takes."""
    paths, done = list(paths), []
    with tqdm(total=len(paths), leave=False, **{"disable": not paths, **bar}) as shown:
        for made in each_file(function, paths, workers, size):
            if isinstance(made, InputError):
                raise made
            done.append(made)
            shown.update()
    return done


def refuse_trained_images(config, args, folder: str | Path, held: list, say: Callable, warn: bool = False) -> None:
    """Whether the weights in `folder` have seen images that are held out now, as where a split was drawn anew when data was
    added, or two data sets share pictures. Where a run wrote nothing beside its weights nothing is known. Raises
    InputError; with `warn` that is only said."""
    known, theirs, how = record_of(folder), copy.copy(config), copy.copy(args)
    if not known:
        return
    if hasattr(theirs, "task"):
        theirs.task = "chat" if known.get("task") == "chat" else "rsvqa"
    root = use_files_of_training(theirs, how, [], folder)
    read = {"vqa": read_conversations, "chat": read_chat}.get(known.get("task"), read_scenes)
    try:
        with contextlib.redirect_stdout(None):
            trained = load_splits(theirs, how.seed, read=read, train_root=root)["train"]
    except InputError as error:
        say(f"warning: {folder}: the images that it was trained on cannot be looked at ({error})")
        return
    if known.get("trained_on", told := rows_digest(trained)) != told:
        say(
            f"warning: {theirs.train_file} has changed since {folder} was trained: images that it was trained on may be held out"
            " now"
        )
    seen = {"train": trained, "held out": held}
    if leaks := find_leaks(seen, by_content(images_of(seen))):
        message = f"{len(leaks)} images that are held out were in the training of {folder}, first {leaks[0][2]}"
        if not warn:
            raise InputError(f"{message}: leave them in the training split (a row's `split`), or give --allow_leak")
        say(f"warning: {message}")
    earlier = known["settings"].get("lora")  # it went on from another itself
    if earlier and Path(earlier).resolve() != Path(folder).resolve():
        refuse_trained_images(config, args, earlier, held, say, warn)


def say_trained_images(config, args, folder: str | Path, splits: dict[str, list], say: Callable) -> None:
    """Before the weights in `folder` are scored: whether they have seen images that are held out, or may have."""
    known = record_of(folder)
    if not was_trained_on(known, config.train_file):
        refuse_trained_images(config, args, folder, splits["test"] or splits["val"], say, warn=True)
    elif known.get("trained_on", now := rows_digest(splits["train"])) != now:
        why = "or another --seed, --max_samples or the like draws other rows"
        say(f"warning: {config.train_file} has changed since: images that were trained on may be held out now ({why})")


def refuse_resume_on_held_out(config, args, splits: dict[str, list], trained_on: str, say: Callable) -> None:
    """Where a run goes on with other training rows (`rows_digest`) than it began with, images that it has seen may be held out
    now. Raises InputError, but with --allow_leak."""
    begun = args.resume_from_checkpoint
    if begun and record_of(begun).get("trained_on", trained_on) != trained_on:
        refuse_trained_images(config, args, begun, splits["val"] + splits["test"], say, warn=config.allow_leak)


def _refuse_thin(rgb: np.ndarray) -> None:
    """Qwen-VL's processor takes no picture longer than 200 times its width, and no model sees anything in one."""
    height, width = rgb.shape[:2]
    if max(height, width) > 200 * min(height, width):
        raise ImageError(f"{width} x {height} pixels: longer than 200 times its width; cut it into pieces")


class QwenResize:
    """Bring an RGB image to the size the Qwen-VL processor would, by the same Pillow resize.

    Sides become multiples of patch_size * merge_size, area between the processor's limits (Qwen2-VL, section 2.1).
    """

    def __init__(self, processor):
        self.factor = processor.patch_size * processor.merge_size
        self.low, self.high = processor.size["shortest_edge"], processor.size["longest_edge"]
        self.resample = Image.Resampling(processor.resample)
        self.key = f"qwen-{self.factor}-{self.low}-{self.high}-{int(self.resample)}"

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (H', W', 3) uint8."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        _refuse_thin(rgb)
        h, w = smart_resize(*rgb.shape[:2], self.factor, self.low, self.high)
        return np.asarray(Image.fromarray(rgb).resize((w, h), self.resample))


TORCH_MODES = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers; what else there is goes through the processor


class SquareResize:
    """Bring an RGB image to the square that a CLIP or SigLIP processor makes of it.

    By torch's resize of bytes, as transformers' own processors do where torchvision is installed. It takes a fifth of
    Pillow's time. Of photographs one byte in 250 differs, by 2 of 255 at most; a test compares them.
    """

    def __init__(self, processor):
        self.processor, self.size = processor, dict(processor.size)
        self.crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
        how = [self.size, self.crop and dict(self.crop), int(processor.resample)]
        self.key = f"square-torch-{json.dumps(how, sort_keys=True)}"

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (S, S, 3) uint8."""
        from transformers.image_transforms import get_resize_output_image_size

        _refuse_thin(rgb)
        mode, shortest = TORCH_MODES.get(int(self.processor.resample)), self.size.get("shortest_edge")
        if mode is None or not self.processor.do_resize or self.size.get("longest_edge"):
            made = self.processor(
                images=[rgb], do_rescale=False, do_normalize=False, input_data_format="channels_last"
            )["pixel_values"][0]  # fmt: skip
            return np.ascontiguousarray(np.asarray(made).transpose(1, 2, 0))
        if shortest:
            sides = get_resize_output_image_size(rgb, shortest, False, input_data_format="channels_last")
        else:
            sides = (self.size["height"], self.size["width"])
        made = torch.from_numpy(np.require(rgb, requirements="CW"))  # torch warns of what may not be written
        made = made[None].permute(0, 3, 1, 2)  # in the order of channels_last, which is fastest
        made = torch.nn.functional.interpolate(made, sides, mode=mode, antialias=True)[0].numpy()
        if self.crop:
            made = self.processor.center_crop(made, self.crop)
        return np.ascontiguousarray(made.transpose(1, 2, 0))


@contextlib.contextmanager
def _kept(entry: Path, what: str):
    """Gives the path of a temporary file, which becomes `entry` at the end: whole or not at all. Raises InputError."""
    temporary = entry.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, entry)
    except (OSError, SafetensorError) as error:
        why = "the disk is full" if CUT_SHORT.search(str(error)) else error
        raise InputError(f"{entry.parent}: cannot keep {what}: {why}; see --cache_dir") from None
    finally:
        with contextlib.suppress(OSError):  # it has become the entry, or its folder is none
            temporary.unlink()


def identity_of(path: str, bands: str) -> str:
    """A text that changes when the file at `path` does, or one of `imagery.band_files`; the same through links to it. Raises
    ImageError."""
    try:
        size, mtime_ns = file_state(path, bands)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
    return f"{os.path.realpath(path)}|{size}|{mtime_ns}"


class PixelStore:
    """Resized RGB pixels by image path, made once and kept on disk under `cache_dir/pixels`.

    An entry is found again while path, size and time of change of the file, the image settings and the resize are the
    same. Without a cache folder each call decodes anew.
    """

    def __init__(self, resize, settings: ImageSettings, cache_dir: str | None = None):
        self.resize, self.settings = resize, settings
        self.folder = Path(cache_dir) / "pixels" if cache_dir else None
        self.recipe = json.dumps([resize.key, settings.to_dict(), RENDERING], sort_keys=True)

    def __getitem__(self, path: str) -> np.ndarray:
        """(H, W, 3) uint8. Raises ImageError."""
        entry = self._entry(path)
        if entry is not None:
            # Else it is not there yet, or was cut short by a full disk: it is made anew.
            with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile):
                return np.load(entry)
        pixels = self.resized(path, read_rgb(path, self.settings))
        if entry is not None:
            with _kept(entry, "resized images") as temporary, open(temporary, "wb") as file:
                np.save(file, pixels)
        return pixels

    def picture(self, path: str) -> np.ndarray:
        """A file for a page, by the same bands and stretch, at most 448 pixels a side. Raises ImageError."""
        return read_image(path, self.settings, max_side=448).rgb

    def resized(self, path: str, rgb: np.ndarray) -> np.ndarray:
        """The picture (H, W, 3) of a file as the vision tower takes it. Raises ImageError, naming the file."""
        try:
            return self.resize(rgb)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None

    def identity(self, path: str) -> str:
        """As `identity_of`, for the bands of these settings."""
        return identity_of(path, self.settings.bands)

    def _entry(self, path: str) -> Path | None:
        if self.folder is None:
            return None
        digest = digest_of(f"{self.identity(path)}|{self.recipe}")
        return self.folder / digest[:2] / f"{digest}.npy"

    def prepare(self, paths: list[str], desc: str = "images") -> dict[str, str]:
        """Decode every image once, in processes; returns {path: reason} of those that fail.

        A truncated file is found here, before training, not in the middle of an epoch.
        """

        def is_kept(path):
            try:
                return (entry := self._entry(path)) is not None and entry.exists()
            except ImageError:  # gone: `attempt` says so
                return False

        missing = [path for path in dict.fromkeys(paths) if not is_kept(path)]
        # Each process of a distributed run begins at its own share, and finds what the others have made meanwhile.
        rank, world = (int(os.environ.get(name, n)) for name, n in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        first = rank * len(missing) // world
        order = missing[first:] + missing[:first]
        reasons = dict(zip(order, over_files(self._attempt, order, desc=desc)))
        return {path: reasons[path] for path in missing if reasons[path]}

    def _attempt(self, path: str) -> str | None:
        try:
            self[path]
        except ImageError as error:
            return str(error)


def is_blank(rgb: np.ndarray) -> bool:
    """Whether a picture is all black or all white, as under a stretch that does not fit the file."""
    return rgb.max(initial=0) == 0 or rgb.min(initial=255) == 255


def drop_unreadable(
    splits: dict[str, list[Scene]], store: PixelStore, max_rejected: float, report: Path | None = None
) -> dict[str, list[Scene]]:
    """Decode all images; scenes whose image fails are listed in `report` and left out.

    Raises InputError when more than `max_rejected` of the images fail, or a split would be empty.
    """
    bad = store.prepare([scene.image for scenes in splits.values() for scene in scenes], "reading images")
    if bad:
        total = sum(len(scenes) for scenes in splits.values())
        if len(bad) > max_rejected * total:
            raise InputError(
                f"{len(bad)} of {total} images cannot be decoded (allowed: --max_rejected {max_rejected:g}):"
                + "".join(f"\n  {reason}" for reason in list(bad.values())[:5])
            )
        print(
            f"data: {len(bad)} images cannot be decoded and are left out" + (f", listed in {report}" if report else "")
        )
        list_rejected(report, [Rejected(path, -1, reason) for path, reason in bad.items()])
    kept = {name: [scene for scene in scenes if scene.image not in bad] for name, scenes in splits.items()}
    images = [scene.image for scenes in kept.values() for scene in scenes]
    if note := guessed_bands(images, store.settings):
        print(f"data: {note}")
    looked = images[:: max(1, len(images) // 32)]
    if len(looked) > 1 and all(is_blank(store[image]) for image in looked):
        raise InputError(
            f"all of {len(looked)} pictures looked at are black or white, with --stretch {store.settings.stretch}: it does not"
            f" fit the values in the files, such as {looked[0]}; give --stretch percentile, or --reflectance in the files' own"
            " units"
        )
    for name in splits:
        if splits[name] and not kept[name]:
            raise InputError(f"no image of the {name} split can be decoded")
    return kept


def token_ids(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, without marks around it. Equal texts are split once: a million questions of RSVQA HR are few
    different ones. Some at a time: a tokenizer makes 150 bytes of each token."""
    known, ids = list(dict.fromkeys(texts)), {}
    for start in range(0, len(known), 1024):
        part = known[start : start + 1024]
        rows = tokenizer(part, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
        ids |= zip(part, (np.array(row, dtype=np.int64) for row in rows))
    return [ids[text] for text in texts]


def drop_too_long(
    splits: dict[str, list[QuestionScene]], tokenizer, max_rejected: float, report: Path | None = None,
    advice: str = "", **limits: tuple[str, int],
) -> dict[str, list[QuestionScene]]:  # fmt: skip
    """Splits without the questions and, except in the test split, the answers that are too long: listed in `report` and
    counted. A test answer that is too long stays: no model can be right on it, and that is part of the score.

    limits: question=(flag, tokens), answer=(flag, tokens). Raises InputError when more than `max_rejected` would go, with
    `advice` where answers are what is too long."""
    rejected, kept, longest = [], {}, Counter()
    for name, scenes in splits.items():
        listed = [question for scene in scenes for question in scene.questions]
        reasons: dict[int, str] = {}
        for part, (flag, limit) in limits.items():
            if (part == "answer" and name == "test") or not listed:
                continue
            said = [(q, q.text if part == "question" else q.answer) for q in listed]
            # A token is a byte at least, and some tokenizers begin with a mark of their own: most need not be split.
            said = [(q, text) for q, text in said if not text.isascii() or len(text) >= limit]
            for question, ids in zip((q for q, _ in said), token_ids(tokenizer, [text for _, text in said])):
                if len(ids) > limit:
                    longest[flag] = max(longest[flag], len(ids))
                    reasons.setdefault(id(question), f"{part} of {len(ids)} tokens: above {flag} {limit}")
        kept[name] = []
        for scene in scenes:
            long = [question for question in scene.questions if id(question) in reasons]
            rejected += [Rejected(scene.image, q.id, reasons[id(q)]) for q in long]
            if len(long) < len(scene.questions):
                chosen = [question for question in scene.questions if id(question) not in reasons]
                kept[name].append(QuestionScene(scene.image, chosen, scene.split))
    total = sum(len(scene.questions) for scenes in splits.values() for scene in scenes)
    if len(rejected) > max_rejected * total:
        raise InputError(
            f"{len(rejected)} of {total} texts are too long (allowed: --max_rejected {max_rejected:g}),"
            f" e.g. of {rejected[0].file}: {rejected[0].reason}; all would pass with"
            f" {' '.join(f'{flag} {most}' for flag, most in longest.items())}"
            + (f"; {advice}" if advice and any(row.reason.startswith("answer") for row in rejected) else "")
        )
    if rejected:
        print(f"data: {len(rejected)} texts left out as too long" + (f", listed in {report}" if report else ""))
        list_rejected(report, rejected)
    for name in splits:
        if splits[name] and not kept[name]:
            raise InputError(
                f"no text of the {name} split is short enough: see {' and '.join(flag for flag, _ in limits.values())}"
            )
    return kept


# ----------------------------------------------------------------------------------------------------
# Features of frozen towers: constants, kept on disk


class FeatureStore:
    """Arrays by key in one folder per `recipe` (tower fingerprint, image settings, ...), written atomically."""

    def __init__(self, cache_dir: str, recipe: str):
        self.folder = Path(cache_dir) / "features" / digest_of(recipe)

    def get(self, keys: list[str], compute, desc: str = "features", batch: int = 256) -> np.ndarray:
        """(len(keys), D) float32, row by row from disk where present; `compute(list of keys) -> (n, D)` for the rest."""
        table: dict[str, np.ndarray] = {}
        for shard in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(shard) as stored:
                    table.update(zip(stored["digests"].tolist(), stored["features"]))
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
                shard.unlink(missing_ok=True)  # cut short by a full disk: make it anew
        name_of = {key: digest_of(key) for key in dict.fromkeys(keys)}
        missing = [key for key, name in name_of.items() if name not in table]
        made = [
            compute(missing[i : i + batch]) for i in tqdm(range(0, len(missing), batch), desc=desc, disable=not missing)
        ]
        if missing:
            features = np.concatenate(made)
            # Not the keys: one may be a long text, and an array is as wide as its longest entry.
            digests = [name_of[key] for key in missing]
            table.update(zip(digests, features))
            name = digest_of("\n".join(digests))
            with _kept(self.folder / f"{name}.npz", "features") as temporary, open(temporary, "wb") as file:
                np.savez(file, digests=np.array(digests), features=features)
        return np.stack([table[name_of[key]] for key in keys])


class TokenStore:
    """What a frozen vision tower makes of an image, its tokens (N, D) and perhaps more, one file per image, in one folder per
    `recipe` (the tower's fingerprint and the pixel recipe). N may differ from image to image. bands: as in `ImageSettings`."""

    def __init__(self, cache_dir: str, recipe: str, bands: str = "auto"):
        self.bands, self.folder = bands, Path(cache_dir) / "tokens" / digest_of(recipe)

    def _entry(self, path: str) -> Path:
        digest = digest_of(identity_of(path, self.bands))
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def __getitem__(self, path: str) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """(N, D) tokens and the image's grid (t, h, w) in patches; KeyError where they are not kept, or cut short."""
        try:
            stored = load_file(self._entry(path))
        except (FileNotFoundError, SafetensorError):
            raise KeyError(path) from None
        return stored["tokens"], tuple(stored["grid"].tolist())

    def more(self, path: str, name: str) -> torch.Tensor | None:
        """What is kept of an image beside its tokens; None where it is not, or by a version that did not keep it."""
        with contextlib.suppress(OSError, SafetensorError), safe_open(self._entry(path), framework="pt") as file:
            return file.get_tensor(name)

    def prepare(self, paths: list[str], encode, batch: int = 32) -> None:
        """Make what is missing: `encode(list of paths)` -> [{"tokens": (N, D), "grid": (3,), ...}]. Files cut short are made
        anew."""
        missing = [path for path in dict.fromkeys(paths) if not _whole_safetensors(self._entry(path))]
        for start in tqdm(range(0, len(missing), batch), desc="encoding images", disable=not missing, leave=False):
            chunk = missing[start : start + batch]
            for path, made in zip(chunk, encode(chunk)):
                with _kept(self._entry(path), "image tokens") as temporary:
                    # Not by save_file, whose files no other user may read.
                    temporary.write_bytes(save({name: value.contiguous().cpu() for name, value in made.items()}))


def _whole_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:  # checks the header against the file's length
            return "tokens" in file.keys()  # noqa: SIM118 - a safe_open handle is no mapping
    except (OSError, SafetensorError):
        return False


# ----------------------------------------------------------------------------------------------------
# Scenes -> batches


class SceneSampler(Sampler):
    """Scenes in a shuffled order that depends on (seed, epoch) alone, as (epoch, index) pairs.

    The epoch travels with the index, so worker processes draw the same texts wherever they run, and a resumed run needs
    no hidden state. An epoch is filled up to whole global batches from the start of its own order, so every step has the
    same size on any number of processes.
    """

    def __init__(self, size: int, global_batch: int, seed: int = 0):
        self.size, self.seed, self.epoch = size, seed, 0
        self.length = size if size < global_batch else -(-size // global_batch) * global_batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        for position in range(self.length):
            yield self.epoch, int(order[position % self.size])


class MatchDataset(Dataset):
    """Scenes of the matcher: (epoch, index) -> the image and `texts_per_scene` of its rows, as token ids.

    All texts are tokenized once, when the dataset is made; `text_ids` numbers them, equal texts once.
    """

    def __init__(
        self, scenes: list[Scene], tokenize, store: PixelStore | None, *, texts_per_scene: int = 0, seed: int = 0
    ):
        self.scenes, self.store, self.seed, self.texts_per_scene = scenes, store, seed, texts_per_scene
        listed = [text for scene in scenes for row in scene.rows for text in row if text is not None]
        self.texts = list(dict.fromkeys([*listed, *(text for scene in scenes for text in scene.texts)]))
        self.text_ids = {text: i for i, text in enumerate(self.texts)}
        self.tokens, self.cut = tokenize(self.texts)
        self.scene_texts = [np.array([self.text_ids[t] for t in s.texts]) for s in scenes]
        self.image_features = self.text_features = None  # of frozen towers: (scenes, D), (texts, D)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        scene = self.scenes[index]
        rows = scene.rows
        if self.texts_per_scene and len(rows) > self.texts_per_scene:
            pick = np.random.default_rng((self.seed, epoch, index)).permutation(len(rows))[: self.texts_per_scene]
            rows = [rows[i] for i in sorted(pick)]
        return {
            "scene": index,
            "pixels": self.store[scene.image] if self.image_features is None else None,
            "rows": [
                (self.text_ids[text], -1 if negative is None else self.text_ids[negative]) for text, negative in rows
            ],
        }


class MatchCollator:
    """Examples of `MatchDataset` -> one batch, each image and each text in it once.

    scene_ids (B,); scene_texts (B, K): ids of every text true of the image, -1 filled; text_ids (T,);
    triplets (M, 3): scene id, text id, negative's id or -1; pixel_values (P, C), image_grid_thw (B, 3), input_ids (T, L),
    text_lengths (T,); or image_features (B, D), text_features (T, D) of a frozen tower.
    """

    def __init__(self, dataset: MatchDataset, processor, pad_id: int):
        self.dataset, self.processor, self.pad_id = dataset, processor, pad_id

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        data = self.dataset
        triplets = np.array([(e["scene"], p, n) for e in examples for p, n in e["rows"]], dtype=np.int64)
        examples = list({e["scene"]: e for e in examples}.values())  # a scene drawn twice is encoded once
        scene_ids = np.array([e["scene"] for e in examples])
        text_ids = np.array(list(dict.fromkeys(t for t in triplets[:, 1:].ravel().tolist() if t >= 0)))
        batch = {
            "scene_ids": torch.from_numpy(scene_ids),
            "scene_texts": pad_rows([data.scene_texts[i] for i in scene_ids], -1),
            "text_ids": torch.from_numpy(text_ids),
            "triplets": torch.from_numpy(triplets),
        }
        if data.image_features is None:
            batch |= pixel_batch([e["pixels"] for e in examples], self.processor)
        else:
            batch["image_features"] = torch.from_numpy(data.image_features[scene_ids])
        if data.text_features is None:
            batch |= token_batch([data.tokens[i] for i in text_ids], self.pad_id)
        else:
            batch["text_features"] = torch.from_numpy(data.text_features[text_ids])
        return batch


# ----------------------------------------------------------------------------------------------------
# Packing: one image and its texts as one sequence


class ChatPrompt:
    """Token ids of a conversation about an image, in the two parts that packing needs.

    The *prefix* is all that questions about one image share (system text, image tokens, the prompt template up to the
    question); a *branch* is one question and, in training, its answer with the token that ends it.
    """

    def __init__(self, tokenizer, template: str, image_token: int, merge: int):
        if template.count("{question}") != 1:
            raise InputError(f"--prompt {template!r}: expected {{question}} in it, once")
        if not tokenizer.chat_template:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
        before, after = template.split("{question}")
        self.tokenizer, self.image_token, self.merge = tokenizer, image_token, merge
        mark = "\u2063"  # stands for the question while the chat template is rendered
        self.heads = {}
        for image in (True, False):
            content = [{"type": "image"}] * image + [{"type": "text", "text": f"{before}{mark}{after}"}]
            try:
                whole = tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
                )
                head, self.after = whole.split(mark)
            except (TypeError, ValueError, TemplateError):
                raise InputError(
                    f"{tokenizer.name_or_path}: its chat template takes no image and question; use an Instruct model, or put"
                    " that one's chat_template.jinja there"
                ) from None
            ids = tokenizer(head, add_special_tokens=False)["input_ids"]
            self.heads[image] = ids
            if ids.count(image_token) != image:
                raise InputError(f"{tokenizer.name_or_path}: the chat template puts no image into a message")
        self.end = tokenizer.eos_token_id
        # From an answer to the next question, rendered once: the template's own words between two turns.
        turns = [{"role": "user", "content": f"{before}x{after}"}, {"role": "assistant", "content": mark},
                 {"role": "user", "content": f"{before}{mark}{after}"}]  # fmt: skip
        self.between = tokenizer.apply_chat_template(turns, tokenize=False).split(mark)[1]
        self.marks = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))

    def asked(self, question: "Question") -> str:
        """A question behind the turns before it, as `branches` takes it. The template's marks are cut out of what people
        say, so that nobody speaks for another."""
        said = [self.marks.sub(" ", text) for pair in question.history for text in pair]
        turns = [f"{q}{self.after}{a}{self.between}" for q, a in zip(said[::2], said[1::2])]
        return "".join([*turns, self.marks.sub(" ", question.text)])

    def prefix(self, grid: tuple[int, int, int] | None) -> tuple[np.ndarray, np.ndarray]:
        """Prefix of an image with `grid` (t, h, w) patches (None: no image): ids (P,) and rotary positions (3, P).

        Text counts up in all three rows; an image's tokens have the place of their cell as height and width, and text
        goes on after the largest of them (M-RoPE, Wang et al. 2024, arXiv:2409.12191, section 2.1).
        """
        if grid is None:
            ids = np.array(self.heads[False], dtype=np.int64)
            return ids, np.tile(np.arange(len(ids)), (3, 1))
        t, h, w = grid[0], grid[1] // self.merge, grid[2] // self.merge
        place = self.heads[True].index(self.image_token)
        head, tail = self.heads[True][:place], self.heads[True][place + 1 :]
        ids = np.array([*head, *[self.image_token] * (t * h * w), *tail], dtype=np.int64)
        cells = np.indices((t, h, w)).reshape(3, -1) + place
        rest = np.tile(np.arange(len(tail)), (3, 1)) + place + max(t, h, w)
        return ids, np.concatenate([np.tile(np.arange(place), (3, 1)), cells, rest], axis=1)

    def branches(self, questions: list[str], answers: list[str] | None = None) -> list[tuple[np.ndarray, int]]:
        """For each question its ids and how many at their end are to be predicted (0 without an answer)."""
        asked = token_ids(self.tokenizer, [question + self.after for question in questions])
        if answers is None:
            return [(ids, 0) for ids in asked]
        said = token_ids(self.tokenizer, [self.marks.sub(" ", answer) for answer in answers])
        return [(np.concatenate([q, a, [self.end]]), len(a) + 1) for q, a in zip(asked, said)]


class CaptionPrompt:
    """Token ids of "describe this image" and its captions, for a language model that takes image tokens in place of words.

    As `ChatPrompt`: the prefix ends where the image ends, a branch is a prompt and, in training, the caption that answers
    it with the token that ends it. The chat template is the model's own, with thinking turned off where it can be; a model
    without one reads the prompt as a line of its own.
    """

    image_token = -1  # no word of the vocabulary: `model.Captioner` puts the image's tokens there

    def __init__(self, tokenizer, image_tokens: int):
        self.tokenizer, self.image_tokens, self.end = tokenizer, image_tokens, tokenizer.eos_token_id
        image, prompt = "\u2063", "\u2064"  # stand for both while the chat template is rendered
        if tokenizer.chat_template:
            whole = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{image}\n{prompt}"}],
                tokenize=False, add_generation_prompt=True, enable_thinking=False,
                date_string="26 Jul 2024",  # Llama 3's own where it has no clock: a prompt must not change overnight
            )  # fmt: skip
        else:
            begin = tokenizer.bos_token if tokenizer("")["input_ids"] else ""
            whole = f"{begin}{image}\n{prompt}\n"
        head, rest = whole.split(image)
        self.before, self.after = rest.split(prompt)
        self.head = tokenizer(head, add_special_tokens=False)["input_ids"]

    @staticmethod
    def asked(question: "Question") -> str:
        """The prompt; captions have no turns before them."""
        return question.text

    def prefix(self, grid=None) -> tuple[np.ndarray, np.ndarray]:
        """ids (P,), -1 at the image's tokens, and positions (3, P), the three rows alike."""
        ids = np.array([*self.head, *[self.image_token] * self.image_tokens], dtype=np.int64)
        return ids, np.tile(np.arange(len(ids)), (3, 1))

    def branches(self, prompts: list[str], captions: list[str] | None = None) -> list[tuple[np.ndarray, int]]:
        """For each prompt its ids, with those of its caption, and how many at their end are to be predicted."""
        asked = token_ids(self.tokenizer, [f"{self.before}{prompt}{self.after}" for prompt in prompts])
        if captions is None:
            return [(ids, 0) for ids in asked]
        said = token_ids(self.tokenizer, captions)
        return [(np.concatenate([q, ids, [self.end]]), len(ids) + 1) for q, ids in zip(asked, said)]


def split_work(prefixes: list[int], branches: list[list[int]], budget: int) -> list[list[tuple[int, list[int]]]]:
    """Cut scenes into pieces of at most `budget` tokens: [[(scene, its branches in this piece)]].

    prefixes: length of each scene's prefix; branches: lengths of its branches. Scenes stay together where they fit; the
    prefix of one that is cut is in each of its pieces. A piece has at least one branch, however long."""
    pieces, used = [[]], 0
    for scene, (prefix, lengths) in enumerate(zip(prefixes, branches)):
        if pieces[-1] and used + prefix + sum(lengths) > budget:
            pieces.append([])
            used = 0
        chosen: list[int] = []
        used += prefix
        for branch, length in enumerate(lengths):
            if chosen and used + length > budget:
                pieces[-1].append((scene, chosen))
                pieces.append([])
                chosen, used = [], prefix
            chosen.append(branch)
            used += length
        pieces[-1].append((scene, chosen))
    return pieces


def row_align(device) -> int:
    """What to round the widths of a packed row's tables to: tensor cores take 16-bit products in eights, and other widths fall
    back to slow kernels (5% of a step on an H100). A CPU does not care, and would only compute the filling."""
    return 8 if torch.device(device).type == "cuda" else 1


def pack(scenes: list[dict], align: int = 1, split: bool = False) -> dict[str, torch.Tensor]:
    """Scenes -> one row of L tokens: each scene's prefix, then its branches; every token stands there once.

    A scene: {"prefix": (ids (P,), positions (3, P)), "branches": [(ids (T,), targets)], and of its image "tokens" (N, D) or
    "pixel_values" + "grid", or neither}; targets: how many at a branch's end are to be predicted, or where in it they
    stand (`nested`). Returns

    - input_ids (1, L); position_ids (3, 1, L): a branch goes on where its prefix ends;
    - prefix_rows (S, P), prefix_lengths (S,); branch_rows (S, Q, T), branch_lengths (S, Q): where a scene's tokens stand
      in the row, filled with 0 on the right to a multiple of `align`; long_rows (S, Q', T'): with `split`, the branches that
      are so long that in one table the others would be mostly filling (else empty, Q' = 0);
    - order (L,): where each token of the row stands in [prefix_rows, branch_rows, long_rows] laid flat;
    - label_rows (M,), labels (M,): the row positions that predict something, and what; a branch that is predicted from its
      first token on begins at the last position of its prefix;
    - image_rows (N,) with image_tokens (N, D), or with pixel_values and image_grid_thw (S, 3).
    """
    first = max(len(scene["prefix"][0]) for scene in scenes)
    lengths = [np.array([len(ids) for ids, _ in scene["branches"]], dtype=np.int64) for scene in scenes]
    most, longest = max(map(len, lengths), default=0), max((max(own, default=0) for own in lengths), default=0)
    tables = _two_tables(lengths, first) if split and most else [(most, longest)]
    first, *widths = (-(-width // align) * align for width in (first, *(width for _, width in tables)))
    prefix_rows = np.zeros((len(scenes), first), dtype=np.int64)
    rows = [np.zeros((len(scenes), count, width), dtype=np.int64) for (count, _), width in zip(tables, widths)]
    starts = np.cumsum([prefix_rows.size, *(table.size for table in rows)])
    prefix_lengths = np.array([len(scene["prefix"][0]) for scene in scenes])
    branch_lengths = np.zeros(rows[0].shape[:2], dtype=np.int64)
    ids, positions, order, label_rows, labels = [], [], [], [], []
    at = 0
    for s, scene in enumerate(scenes):
        own, places = scene["prefix"]
        prefix_rows[s, : len(own)] = np.arange(at, at + len(own))
        ids.append(own), positions.append(places), order.append(s * first + np.arange(len(own)))
        at += len(own)
        last, start, used = at - 1, int(places.max()) + 1, [0] * len(rows)
        for branch, targets in scene["branches"]:
            n = len(branch)
            table = int(n > tables[0][1])
            b, used[table] = used[table], used[table] + 1
            rows[table][s, b, :n] = np.arange(at, at + n)
            if not table:
                branch_lengths[s, b] = n
            ids.append(branch), positions.append(np.tile(start + np.arange(n), (3, 1)))
            _, count, width = rows[table].shape
            order.append(starts[table] + (s * count + b) * width + np.arange(n))
            wanted = np.arange(n - targets, n) if np.ndim(targets) == 0 else targets
            label_rows.append(np.r_[last, at : at + n - 1][wanted])
            labels.append(branch[wanted])
            at += n
    none = np.zeros(0, dtype=np.int64)
    made = {
        "input_ids": np.concatenate(ids)[None],
        "position_ids": np.concatenate(positions, axis=1)[:, None],
        "prefix_rows": prefix_rows, "prefix_lengths": prefix_lengths,
        "branch_rows": rows[0], "branch_lengths": branch_lengths,
        "long_rows": rows[1] if len(rows) > 1 else np.zeros((len(scenes), 0, 0), dtype=np.int64),
        "order": np.concatenate(order),
        "label_rows": np.concatenate([none, *label_rows]), "labels": np.concatenate([none, *labels]),
    }  # fmt: skip
    result = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in made.items()}
    return result | _image_part(scenes, made["input_ids"][0])


def _two_tables(lengths: list[np.ndarray], prefix: int) -> list[tuple[int, int]]:
    """[(branches of a scene, longest)] of one table for all branches, or of two, the short and the long, where that makes
    attention over (branches, tokens, prefix + tokens) at least a third smaller: a caption among short phrases."""
    ends = np.unique(np.concatenate(lengths))
    counts = np.stack([np.searchsorted(np.sort(own), ends, side="right") for own in lengths])  # (S, ends)
    short, long = counts.max(0), (counts[:, -1:] - counts).max(0)
    work = short * ends * (prefix + ends) + long * ends[-1] * (prefix + ends[-1])
    best = int(work.argmin())
    if work[best] > 2 / 3 * work[-1]:
        return [(int(short[-1]), int(ends[-1]))]
    return [(int(short[best]), int(ends[best])), (int(long[best]), int(ends[-1]))]


def pad_questions(scenes: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """Scenes (as for `pack`, targets as numbers) -> a padded row of each question with its own copy of the image: the
    plain form.

    input_ids, attention_mask, labels (B, L), filled on the right, -100 where nothing is predicted; pixel_values and
    image_grid_thw (B, 3)."""
    rows, targets, copies = [], [], []
    for scene in scenes:
        for branch, count in scene["branches"]:
            rows.append(np.concatenate([scene["prefix"][0], branch]))
            targets.append(np.where(np.arange(len(rows[-1])) < len(rows[-1]) - count, -100, rows[-1]))
            copies.append(scene)
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_rows(rows, pad_id)
    result = {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1])[None] < lengths[:, None]).long(),
        "labels": pad_rows(targets, -100),
    }
    if "pixel_values" in scenes[0]:
        result["pixel_values"] = torch.cat([scene["pixel_values"] for scene in copies])
        result["image_grid_thw"] = torch.tensor([scene["grid"] for scene in copies])
    return result


def _image_part(scenes: list[dict], input_ids: np.ndarray) -> dict[str, torch.Tensor]:
    if not any("image_token" in scene for scene in scenes):
        return {}
    image_token = scenes[0]["image_token"]
    part = {"image_rows": torch.from_numpy(np.flatnonzero(input_ids == image_token))}
    if "tokens" in scenes[0]:
        return part | {"image_tokens": torch.cat([scene["tokens"] for scene in scenes])}
    return part | {
        "pixel_values": torch.cat([scene["pixel_values"] for scene in scenes]),
        "image_grid_thw": torch.tensor([scene["grid"] for scene in scenes]),
    }


class QuestionDataset(Dataset):
    """Scenes of questions: (epoch, index) -> the image and `texts_per_scene` of its questions, as token ids.

    tokens: a prepared `TokenStore` (frozen vision tower); else store: a `PixelStore`, and `processor`. `blind`: no image.
    `share`: what all of a scene's branches begin with (captions: their one prompt) becomes part of the prefix.
    """

    def __init__(
        self, scenes: list[QuestionScene], prompt: "ChatPrompt | CaptionPrompt", *, processor=None,
        store: PixelStore | None = None, tokens: TokenStore | None = None, texts_per_scene: int = 0, seed: int = 0,
        blind: bool = False, answers: bool = True, share: bool = False,
    ):  # fmt: skip
        self.scenes, self.prompt, self.processor, self.store, self.tokens = scenes, prompt, processor, store, tokens
        self.texts_per_scene, self.seed, self.blind, self.share = texts_per_scene, seed, blind, share
        listed = [question for scene in scenes for question in scene.questions]
        made = iter(prompt.branches([prompt.asked(q) for q in listed], [q.answer for q in listed] if answers else None))
        self.branches = [[next(made) for _ in scene.questions] for scene in scenes]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        branches = self.branches[index]
        if self.texts_per_scene and len(branches) > self.texts_per_scene:
            branches = [branches[i] for i in self._drawn(epoch, index)]
        example = {"scene": index, "branches": branches} | self.image(self.scenes[index].image)
        return share_beginning(example) if self.share else example

    def _drawn(self, epoch: int, index: int) -> list[int]:
        """Which of a scene's texts an epoch takes: at random, but of all that is asked one answer before any second one, or
        four short captions would outvote the one in detail or in another language."""
        questions, before = self.scenes[index].questions, Counter()
        turn: dict[int, int] = {}
        for i in np.random.default_rng((self.seed, epoch, index)).permutation(len(questions)):
            asked = questions[i].history, questions[i].text
            turn[i] = before[asked]
            before[asked] += 1
        return sorted(sorted(turn, key=turn.get)[: self.texts_per_scene])

    def image(self, path: str) -> dict:
        """What a scene needs of its image: the prefix with room for it, and its tokens or its patches."""
        if self.blind:
            return {"prefix": self.prompt.prefix(None)}
        part = {"image_token": self.prompt.image_token}
        if self.tokens is not None:
            part["tokens"], part["grid"] = self.tokens[path]
        else:
            made = pixel_batch([self.store[path]], self.processor)
            part["pixel_values"], part["grid"] = made["pixel_values"], tuple(made["image_grid_thw"][0].tolist())
        return part | {"prefix": self.prompt.prefix(part["grid"])}


def share_beginning(scene: dict) -> dict:
    """A scene (as for `pack`, targets as numbers) with the tokens that all of its branches begin with, as far as none is a
    target, moved to the end of its prefix: they are then run once."""
    branches = scene["branches"]
    room = min(len(ids) - targets for ids, targets in branches)
    same = np.all([ids[:room] == branches[0][0][:room] for ids, _ in branches], axis=0)
    count = room if same.all() else int(same.argmin())
    ids, positions = scene["prefix"]
    more = np.tile(positions.max() + 1 + np.arange(count), (3, 1))
    return scene | {
        "prefix": (np.concatenate([ids, branches[0][0][:count]]), np.concatenate([positions, more], axis=1)),
        "branches": [(ids[count:], targets) for ids, targets in branches],
    }


def nested(branches: list[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Branches (ids (T,), number of targets at their end) without those that another one begins with, which takes over their
    targets: [(ids, where its targets stand)]. The turns of a dialogue, each behind the ones before it, are run once. Loss
    and gradient stay the same, for no token sees what comes after it."""
    keys = [ids.tobytes() for ids, _ in branches]
    places = [np.arange(len(ids) - targets, len(ids)) for ids, targets in branches]
    order, whole = sorted(range(len(keys)), key=keys.__getitem__), []  # what begins with a branch comes right behind it
    for this, following in itertools.zip_longest(order, order[1:]):
        if following is not None and keys[following] != keys[this] and keys[following].startswith(keys[this]):
            places[following] = np.concatenate([places[this], places[following]])
        else:
            whole.append(this)
    return [(branches[i][0], places[i]) for i in sorted(whole)]


class QuestionCollator:
    """Examples of `QuestionDataset` -> {"pieces": [pack, ...], "targets": number of tokens to predict}: packed, each piece
    within `budget` tokens; with `packing=False` as padded rows, as many at once as the budget holds."""

    def __init__(self, budget: int, *, packing: bool = True, pad_id: int = 0, align: int = 1):
        self.budget, self.packing, self.pad_id, self.align = budget, packing, pad_id, align

    def __call__(self, examples: list[dict]) -> dict:
        targets = sum(count for example in examples for _, count in example["branches"])
        if not self.packing:
            rows = [example | {"branches": [branch]} for example in examples for branch in example["branches"]]
            pieces, longest = [[]], 0
            for row in rows:
                length = len(row["prefix"][0]) + len(row["branches"][0][0])
                if pieces[-1] and max(longest, length) * (len(pieces[-1]) + 1) > self.budget:
                    pieces.append([])
                    longest = 0
                longest = max(longest, length)
                pieces[-1].append(row)
            return {"pieces": [pad_questions(piece, self.pad_id) for piece in pieces], "targets": targets}
        examples = [example | {"branches": nested(example["branches"])} for example in examples]
        prefixes = [len(example["prefix"][0]) for example in examples]
        lengths = [[len(ids) for ids, _ in example["branches"]] for example in examples]
        pieces = [
            pack(
                [examples[s] | {"branches": [examples[s]["branches"][b] for b in chosen]} for s, chosen in piece],
                self.align,
                split=self.align == 1,  # a GPU pays for launches more than for filling
            )
            for piece in split_work(prefixes, lengths, self.budget)
        ]
        return {"pieces": pieces, "targets": targets}


def pixel_batch(images: list[np.ndarray], processor, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Resized (H, W, 3) uint8 images -> what a vision tower takes, on `device`. Qwen-VL: pixel_values (P, C) float32 and
    image_grid_thw (B, 3) int64; CLIP, SigLIP: pixel_values (B, 3, S, S) float32, and a grid that says one image each."""
    return normalised(stacked(images, processor), processor, device)


def stacked(images: list[np.ndarray], processor) -> dict[str, torch.Tensor]:
    """The first half of `pixel_batch`, for a reading process to send: squares are still (B, S, S, 3) uint8."""
    if hasattr(processor, "merge_size"):
        made = processor(images=images, do_resize=False, return_tensors="pt")
        return {name: made[name] for name in ("pixel_values", "image_grid_thw")}
    return {
        "pixel_values": torch.from_numpy(np.stack(images)),
        "image_grid_thw": torch.ones(len(images), 3, dtype=torch.long),
    }


def normalised(
    batch: dict[str, torch.Tensor], processor, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """The second half of `pixel_batch`: bring to the device, and scale squares there as their processor would."""
    cuda = torch.device(device).type == "cuda"  # mps would read pages that are free by then (pytorch/pytorch#139550)
    batch = {name: value.to(device, non_blocking=cuda) for name, value in batch.items()}
    if batch["pixel_values"].dtype == torch.uint8:
        # What the processor makes of black and of white says it all: a line for each channel.
        ends = [np.full((2, 2, 3), value, np.uint8) for value in (0, 255)]
        made = processor(images=ends, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        low, high = made[..., :1, :1].to(device, non_blocking=cuda)  # (3, 1, 1) each; waiting would empty a GPU's queue
        pixels = batch["pixel_values"].permute(0, 3, 1, 2).contiguous().float()
        batch["pixel_values"] = pixels.mul_((high - low) / 255).add_(low)
    return batch


def token_batch(rows: list[np.ndarray], pad_id: int) -> dict[str, torch.Tensor]:
    """Token ids of each text -> input_ids (T, L), filled on the right, and text_lengths (T,)."""
    return {
        "input_ids": pad_rows(rows, pad_id),
        "text_lengths": torch.tensor([len(row) for row in rows]),
    }


def pad_rows(rows: list[np.ndarray], fill: int) -> torch.Tensor:
    """Integer rows of different lengths -> (N, longest) int64, filled on the right."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=fill).long()
