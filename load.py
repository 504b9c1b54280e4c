"""Bring the base models here, whole, and prove that they are.

    python load.py                                   # every base of preset full, from ModelScope
    python load.py Qwen/Qwen2.5-VL-3B-Instruct --source huggingface
    python load.py --source /mnt/usb/models          # a folder copied from another machine
    python load.py --preset demo                     # small models of the same classes, nothing to download
    python load.py --check                           # verify what is already here

A base lies in `./<org>/<name>` exactly as its hub publishes it. A broken download is resumed by running
the same command again; a model counts as present only after `verify_model` has read every shard's header.
"""

import argparse
import errno
import fnmatch
import hashlib
import json
import logging
import math
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from config import InputError, user_errors

FULL = [
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen3-0.6B",
    "openai/clip-vit-base-patch16",
]
DEMO = ["qwen2_5_vl", "clip", "qwen3"]

# -----------------------------------------------------------------------------
# Is a model folder whole?


def _mend(folder: Path) -> str:
    """The command that repairs `folder`."""
    folder = folder.absolute()
    if folder.parent.name == "demo" and folder.name in DEMO:
        return "run `python load.py --preset demo`"
    return f"run `python load.py {folder.parent.name}/{folder.name}`"


def _read_json(path: Path) -> dict:
    """Raises InputError if the file is absent, is not JSON, or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {_mend(path.parent)}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it and {_mend(path.parent)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object: delete it and {_mend(path.parent)}")
    return value


def _safetensors_keys(path: Path) -> set[str]:
    """Names of the tensors of one shard. Only the header is read, so 7 GB are checked in milliseconds:
    the header says where the last tensor ends, and the file must end there too.

    Raises InputError if the file is missing, short, too long or has an unreadable header."""
    mend = f"delete it and {_mend(path.parent)}"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(f"{path} is cut short ({size:,} bytes, its header alone needs more): {mend}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {_mend(path.parent)}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path} has no readable safetensors header ({type(error).__name__}): {mend}") from None
    if size != end:
        raise InputError(f"{path} has {size:,} bytes where its header promises {end:,}: {mend}")
    return set(header)


def verify_model(folder: str | os.PathLike) -> None:
    """Check that `folder` holds a whole model: config, tokenizer, image settings where the model sees, every
    shard of the index, every tensor of the index in its shard, every shard as long as its header promises.

    Raises InputError naming the first bad file and the command that mends it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no model in {folder}: {_mend(folder)}")
    config = _read_json(folder / "config.json")
    if "model_type" not in config:
        raise InputError(f"{folder / 'config.json'} names no model_type: delete it and {_mend(folder)}")
    _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        _read_json(folder / "tokenizer.json")
    else:
        _read_json(folder / "vocab.json")
        if not (folder / "merges.txt").is_file():
            raise InputError(f"{folder / 'merges.txt'} is missing: {_mend(folder)}")
    if "vision_config" in config:
        _read_json(folder / "preprocessor_config.json")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    for index in indexes:
        wanted: dict[str, set[str]] = {}
        try:
            for tensor, shard in _read_json(index)["weight_map"].items():
                wanted.setdefault(shard, set()).add(tensor)
        except (KeyError, AttributeError):
            raise InputError(f"{index} has no weight_map: delete it and {_mend(folder)}") from None
        for shard, tensors in sorted(wanted.items()):
            absent = sorted(tensors - _safetensors_keys(folder / shard))
            if absent:
                raise InputError(
                    f"{folder / shard} lacks {absent[0]} (and {len(absent) - 1} more) that {index.name} places there: "
                    f"delete both and {_mend(folder)}"
                )
    if not indexes:
        _safetensors_keys(folder / "model.safetensors")


# -----------------------------------------------------------------------------
# From a hub

MODELSCOPE_NAME = {"openai": "openai-mirror"}  # the organisation's name there; the folder here keeps the usual one
WAITS = (2, 8, 30)  # seconds before the 2nd, 3rd and 4th attempt, after the clients' own retries gave up
KEEP = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")  # everything that is not a weight and is needed


def choose_files(sizes: dict[str, int]) -> dict[str, int]:
    """Of a repository's `{path: bytes}` what a model needs: top-level settings and vocabulary, and one set of
    weights. The same weights also lie there as .bin, .h5, .msgpack, .onnx: safetensors are taken, and
    `pytorch_model*.bin` only where there are none (`convert_bin` turns them into safetensors)."""
    top = {path: size for path, size in sizes.items() if "/" not in path and "\\" not in path}
    weights = {p for p in top if fnmatch.fnmatch(p, "model*.safetensors")} or {
        p for p in top if fnmatch.fnmatch(p, "pytorch_model*.bin")
    }
    bins = any(path.endswith(".bin") for path in weights)
    return {
        path: size
        for path, size in top.items()
        if path in weights
        or (any(fnmatch.fnmatch(path, pattern) for pattern in KEEP) and (bins or not path.endswith(".bin.index.json")))
    }


def convert_bin(folder: Path) -> None:
    """Turn `pytorch_model*.bin` into `model.safetensors`, if there are no safetensors, and delete it.

    Raises InputError if a file is not a plain state dict (nothing is unpickled but tensors)."""
    bins = sorted(folder.glob("pytorch_model*.bin"))
    if not bins or any(folder.glob("model*.safetensors")):
        return
    import torch
    from safetensors.torch import save_file

    state = {}
    for path in bins:
        try:
            part = torch.load(path, map_location="cpu", weights_only=True)
            # position_ids are a counter that old versions stored; clones, because tied tensors share memory
            state |= {k: v.clone().contiguous() for k, v in part.items() if not k.endswith("position_ids")}
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} cannot be read ({reason}): delete it and {_mend(folder)}") from None
    save_file(state, folder / "model.safetensors.partial", metadata={"format": "pt"})
    shutil.copymode(bins[0], folder / "model.safetensors.partial")
    (folder / "model.safetensors.partial").rename(folder / "model.safetensors")
    for path in [*bins, *folder.glob("*.bin.index.json")]:
        path.unlink()


def _check_space(folder: Path, sizes: dict[str, int]) -> None:
    """Raises InputError if what is still to come does not fit beside `folder`."""
    there = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
    extra = sum(size for path, size in sizes.items() if path.endswith(".bin"))  # kept until it is converted
    need = max(0, sum(sizes.values()) - there) + extra
    home = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(home).free
    if need > free:
        raise InputError(
            f"disk full: {folder} still needs {need / 1e9:.2f} GB and {home} has {free / 1e9:.2f} GB free: "
            "make room, or name another disk with --root"
        )


def _explain(error, name: str, source: str, host: str, folder: Path, reached: bool = False) -> tuple[str, bool]:
    """A client's failure -> (one line that says what to do, whether another attempt may help)."""
    chain, seen = [error], set()
    for item in chain:  # causes, and ModelScope's list of failed files, are appended while we walk
        seen.add(id(item))
        more = [item.__cause__, item.__context__, *getattr(item, "failed_files", {}).values()]
        chain += [e for e in more if e is not None and id(e) not in seen]
    kinds = {base.__name__ for item in chain for base in type(item).__mro__}
    numbers = {getattr(item, "errno", None) for item in chain if isinstance(item, OSError)}
    statuses = {getattr(getattr(e, "response", None), "status_code", None) for e in chain}
    statuses |= {getattr(e, "status_code", None) for e in chain}
    variable = "HF_TOKEN" if source == "huggingface" else "MODELSCOPE_API_TOKEN"
    other = "modelscope" if source == "huggingface" else "huggingface"
    again = "run the same command again, what has arrived is kept"
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        return f"disk full while writing {folder}: make room, then {again}", False
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"no permission to write {folder}: choose another place with --root", False
    if "OfflineModeIsEnabled" in kinds:
        return f"{name}: HF_HUB_OFFLINE is set, which forbids downloads: unset it", False
    if "GatedRepoError" in kinds or statuses & {403}:
        return (
            f"{name} is gated on {host}: accept its terms on its page there, then give your token with --token "
            f"or {variable}",
            False,
        )
    if "RepositoryNotFoundError" in kinds or (404 in statuses and "RemoteEntryNotFoundError" not in kinds):
        return (
            f"no model {name} on {host}: check the spelling, try --source {other}, or give a token (--token or "
            f"{variable}) if it is private",
            False,
        )
    if 401 in statuses:
        return f"{host} does not accept the token for {name}: give a valid one with --token or {variable}", False
    if kinds & {"FileIntegrityError"} or "Consistency check failed" in str(error):
        return f"{name}: a file from {host} does not match its checksum or size: {again}", True
    if "RemoteEntryNotFoundError" in kinds:
        return f"{name}: {host} lists a file that it does not serve: {again}, or try --source {other}", False
    bad = sorted(status for status in statuses if isinstance(status, int) and status >= 429)
    if bad:
        return f"{host} answers {bad[0]} for {name}: try later, or try --source {other}", True
    network = {"ConnectionError", "TimeoutError", "TimeoutException", "TransportError", "NetworkError"}
    if kinds & (network | {"LocalEntryNotFoundError", "RequestException"}):
        what = f"the connection to {host} broke" if reached else f"no network, or {host} cannot be reached"
        return f"{what} ({name}): check the connection, then {again}", True
    line = " ".join(str(error).split())[:200]
    return f"{name} could not be fetched from {host} ({type(error).__name__}: {line}): {again}", True


class _Hub:
    """One face for both clients: `files()` of a model, `fetch()` some of them into a folder."""

    def __init__(self, source: str, name: str, token: str | None, endpoint: str | None):
        self.source, self.name, self.token, self.endpoint = source, name, token, endpoint
        self.revision = None
        if source == "huggingface":
            from huggingface_hub import HfApi

            self.api = HfApi(endpoint=endpoint, token=token)
            address = self.api.endpoint
        else:
            from modelscope_hub import HubApi  # the part of modelscope that talks to the hub

            organisation, _, model = name.partition("/")
            self.name = f"{MODELSCOPE_NAME.get(organisation, organisation)}/{model}"
            self.api = HubApi(endpoint=endpoint, token=token)
            address = self.api._config.endpoint
        self.host = urlsplit(address).netloc
        for logger in [*logging.root.manager.loggerDict]:  # the clients log each failure with its whole request
            if logger.startswith(("huggingface_hub", "modelscope")):
                logging.getLogger(logger).setLevel(logging.CRITICAL)

    def files(self) -> dict[str, tuple[int, str | None]]:
        """`{path: (bytes, sha256 or None)}`; raises the client's own errors."""
        if self.source == "huggingface":
            # Pinned: all files are of one commit, and the client resumes by it.
            self.revision = self.api.model_info(self.name).sha
            tree = self.api.list_repo_tree(self.name, recursive=True, revision=self.revision)
            return {f.path: (f.size, f.lfs.sha256 if f.lfs else None) for f in tree if hasattr(f, "size")}
        return {
            f.path: (f.size, f.sha256 or None)
            for f in self.api.list_repo_files(self.name, "model", recursive=True)
            if f.type != "tree"
        }

    def fetch(self, folder: Path, files: dict[str, tuple[int, str | None]]) -> None:
        """Download `files`; finished ones are left, broken ones resumed. Raises the client's own errors."""
        where = {"token": self.token, "endpoint": self.endpoint}
        if self.source == "modelscope":
            from modelscope.hub.snapshot_download import snapshot_download

            snapshot_download(self.name, local_dir=str(folder), allow_patterns=sorted(files), **where)
            return
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        # With a folder that is not empty the client returns *normally* when the hub cannot be reached: the caller
        # compares with the listing afterwards. And since its version 1 it deletes a partial file when a download
        # fails: the weights therefore go through its `http_get`, which resumes, into a partial file that stays.
        weights = sorted(path for path in files if path.endswith((".safetensors", ".bin")))
        small = sorted(set(files) - set(weights))
        snapshot_download(self.name, local_dir=folder, allow_patterns=small, revision=self.revision, **where)
        for path in weights:
            size, sha256 = files[path]
            part = folder / ".cache" / f"{path}.{self.revision}.part"
            part.parent.mkdir(exist_ok=True)
            with WeakFileLock(part.with_suffix(".lock")):
                if not _wrong(folder / path, size, sha256):
                    continue
                url = hf_hub_url(self.name, path, revision=self.revision, endpoint=self.endpoint)
                found = get_hf_file_metadata(url, **where)
                headers = build_hf_headers(token=self.token)
                if urlsplit(found.location).netloc != urlsplit(url).netloc:  # the token is not for the storage host
                    headers.pop("authorization", None)
                with part.open("ab") as file:
                    if file.tell() > size:
                        file.truncate(0)
                    http_get(found.location, file, resume_size=file.tell(), headers=headers, expected_size=size)
                part.replace(folder / path)


def _wrong(path: Path, size: int, sha256: str | None) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return True
    if not sha256:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest() != sha256.lower()


def download(name, root=".", source="modelscope", token=None, endpoint=None, waits=WAITS) -> Path:
    """Bring `name` ("org/model") into `root/org/model` and verify it; at once if it is there and whole.

    Raises InputError with one line for every failure: no network, no such model, gated, disk full, no permission,
    checksum, and a repository that is itself incomplete."""
    folder = Path(root) / name
    try:
        verify_model(folder)
        return folder
    except InputError:
        pass
    hub = _Hub(source, name, token, endpoint)
    try:
        listing = hub.files()
    except Exception as error:
        raise InputError(_explain(error, name, source, hub.host, folder)[0]) from error
    chosen = choose_files({path: size for path, (size, _) in listing.items()})
    if "config.json" not in chosen or not any(path.endswith((".safetensors", ".bin")) for path in chosen):
        raise InputError(f"{name} on {hub.host} is not a transformers model: it has no config.json or no weights")
    _check_space(folder, chosen)
    checked: set[str] = set()
    for attempt in range(len(waits) + 1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            hub.fetch(folder, {path: listing[path] for path in chosen})
            bad = [p for p in sorted(set(chosen) - checked) if _wrong(folder / p, *listing[p])]
            checked |= set(chosen) - set(bad)
            if not bad:
                break
            line, retry = f"{name}: {', '.join(bad)} did not arrive whole from {hub.host}: run the command again", True
            for path in bad:  # the client takes a file that is there for a finished one
                (folder / path).unlink(missing_ok=True)
            cause = None
        except Exception as error:
            (line, retry), cause = _explain(error, name, source, hub.host, folder, reached=True), error
        if not retry or attempt == len(waits):
            raise InputError(line) from cause
        print(f"{line}\n  attempt {attempt + 2} of {len(waits) + 1} in {waits[attempt]} s", file=sys.stderr)
        time.sleep(waits[attempt])
    convert_bin(folder)
    try:
        verify_model(folder)
    except InputError as error:  # every listed file is here with its right checksum: the repository lacks something
        reason = str(error).rpartition(": ")[0]
        raise InputError(f"{reason}, and {hub.host} does not list it: try another --source") from None
    return folder


# -----------------------------------------------------------------------------
# From a folder copied from elsewhere


def find_copy(source: Path, name: str, only: bool) -> Path:
    """Where `name` lies in `source`: <org>/<name>, <name>, either hub's cache layout, or `source` itself.

    Raises InputError if it is nowhere there."""
    organisation, _, model = name.rpartition("/")
    places = [source / organisation / model, source / model]
    places += [source / organisation / model.replace(".", "___")]  # ModelScope's older cache
    places += sorted(source.glob(f"models--{organisation}--{model}/snapshots/*"))  # Hugging Face's cache
    places += [source] if only else []
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise InputError(f"no {name} in {source}: expected {places[0]} or {places[1]} with a config.json")


def copy_model(name: str, source: Path, root=".", only: bool = True) -> Path:
    """Copy `name` from a folder into `root/org/model`, whole or not at all; at once if it is there and whole.

    Raises InputError if the source is absent or not whole, or the disk is full."""
    folder = Path(root) / name
    try:
        verify_model(folder)
        return folder
    except InputError:
        pass
    place = find_copy(source, name, only)
    sizes = choose_files({path.name: path.stat().st_size for path in place.iterdir() if path.is_file()})
    has_bins = any(path.endswith(".bin") for path in sizes)
    try:
        if not has_bins:
            verify_model(place)
    except InputError as error:
        raise InputError(f"{str(error).rpartition(': ')[0]}: copy that folder again") from None
    _check_space(folder.with_name(f".{folder.name}.new"), sizes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".copying-", dir=folder.parent) as temp:
            new = Path(temp) / "new" / folder.name
            new.mkdir(parents=True)
            for path in sizes:
                shutil.copyfile(place / path, new / path)
            convert_bin(new)
            verify_model(new)
            if folder.exists():
                folder.rename(Path(temp) / "old")
            new.rename(folder)
    except OSError as error:
        raise InputError(_explain(error, name, "modelscope", str(place), folder)[0]) from error
    return folder


# -----------------------------------------------------------------------------
# The demo bases: small models of the same classes, in the official file layout

TAGS = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end
vision_start vision_end vision_pad image_pad video_pad"""  # special: dropped by skip_special_tokens
PLAIN = "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
THINK = "<tool_response> </tool_response> <think> </think>"
SPECIAL = {"qwen2_vl": [f"<|{tag}|>" for tag in TAGS.split()]}  # numbered in this order after the byte-pair vocabulary
SPECIAL["qwen2_5_vl"] = SPECIAL["qwen2_vl"] + PLAIN.split()
SPECIAL["qwen3"] = SPECIAL["qwen2_5_vl"] + THINK.split()
SYSTEM = "You are a helpful assistant."
QWEN_SPLIT = (  # the official pre-tokenizer: words, single digits, punctuation, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
QWEN_VL_CHAT = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_CHAT = (  # prints what the official one prints where there are no tools: answers after the last question think
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thought = m.reasoning_content or '' %}{%- if not thought and '</think>' in m.content %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}{{- text }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)
PIXELS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
DEMO_SIZES = {  # changing anything here rebuilds the demo bases: it is part of their fingerprint
    "version": 3,
    "vocab": {"qwen": 2000, "clip": 1500},
    "text": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "heads": 4, "kv_heads": 2},
    "vision": {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 384, "fullatt": [1, 3]},
    "train": {"steps": 120, "batch": 16, "length": 64, "lr": 3e-3},
}


def _write_json(path: Path, value, indent=2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_bpe(vocab=None, merges=None, suffix: str = "", split: str = QWEN_SPLIT):
    """A byte-level `tokenizers.Tokenizer`: Qwen's by default; CLIP's has the suffix `</w>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    trained = {"vocab": vocab, "merges": merges} if vocab else {}
    tokenizer = Tokenizer(models.BPE(**trained, **({"end_of_word_suffix": suffix} if suffix else {})))
    tokenizer.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts, vocab_size: int, suffix: str = "", split: str = QWEN_SPLIT) -> tuple[dict, list]:
    """Byte-level BPE -> (vocab, merges) in the official order: 256 bytes, [256 bytes + suffix,] then merges.
    Few texts give fewer tokens than `vocab_size`: a pair is merged only if it occurs twice."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer, alphabet = byte_bpe(suffix=suffix, split=split), sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"vocab_size": vocab_size, "min_frequency": 2, "initial_alphabet": alphabet, "show_progress": False}
    settings |= {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [byte + suffix for byte in alphabet if suffix] + [a + b for a, b in merges]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def _write_vocab(folder: Path, tokenizer, vocab: dict, merges: list, head: str = "") -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocab, indent=None)
    (folder / "merges.txt").write_text(head + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")


def write_qwen_tokenizer(folder: Path, vocab: dict, merges: list, family: str):
    """Write the official tokenizer files of a Qwen family and return the tokenizer as transformers loads it."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    added = [AddedToken(t, normalized=False, special=t in SPECIAL["qwen2_vl"]) for t in SPECIAL[family]]
    tokenizer = byte_bpe(vocab, merges)
    tokenizer.add_tokens(added)
    _write_vocab(folder, tokenizer, vocab, merges)
    chat = {"chat_template": QWEN3_CHAT if family == "qwen3" else QWEN_VL_CHAT}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    # fmt: off
    config = {
        "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {
            str(len(vocab) + i): {"content": t.content, **flags, "special": t.special} for i, t in enumerate(added)
        },
        "additional_special_tokens": SPECIAL["qwen2_vl"][1:], "bos_token": None, **chat,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 32768, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }
    # fmt: on
    _write_json(folder / "tokenizer_config.json", config)
    if family != "qwen3":
        _write_json(folder / "chat_template.json", chat)
    return Qwen2Tokenizer.from_pretrained(folder)


def write_weights(model, folder: Path, shards: int = 1) -> None:
    """Save `model` under the key names its hub uses, in exactly `shards` files (+ index when more than one);
    config.json is already in `folder`.

    `save_pretrained` already turns the names back into the published 4.x ones (`visual.blocks...`,
    `model.layers...`, no tied `lm_head`), but writes its own config and cuts shards where it likes."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(dir=folder) as temp:
        model.save_pretrained(temp, max_shard_size="100GB")
        state = load_file(Path(temp) / "model.safetensors")
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in state.items()}
    total, done, parts = sum(sizes.values()), 0, [{} for _ in range(shards)]
    for key, tensor in state.items():
        parts[min(done * shards // total, shards - 1)][key] = tensor
        done += sizes[key]
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    for name, part in zip(names, parts):
        save_file(part, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # safetensors writes files no one else can read
    if shards > 1:
        where = {key: name for name, part in zip(names, parts) for key in part}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def qwen_config(tokenizer, family: str, text: dict, vision: dict | None = None) -> dict:
    """A flat 4.x config.json of Qwen2.5-VL, Qwen2-VL or Qwen3: text settings at the top, `vision_config` below."""
    width, heads = text["hidden_size"], text["heads"]
    # fmt: off
    config = {
        "model_type": family, "attention_dropout": 0.0,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "hidden_act": "silu", "hidden_size": width, "initializer_range": 0.02,
        "intermediate_size": text["intermediate_size"], "max_position_embeddings": 32768,
        "max_window_layers": text["num_hidden_layers"], "num_attention_heads": heads,
        "num_hidden_layers": text["num_hidden_layers"], "num_key_value_heads": text["kv_heads"],
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,  # padded, as the official one is
    }
    if family == "qwen3":
        return config | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": width // heads,
                         "rope_scaling": None, "sliding_window": None}
    tower = {"depth": vision["depth"], "num_heads": vision["num_heads"], "in_chans": 3, "patch_size": 14,
             "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    if family == "qwen2_5_vl":
        tower |= {"hidden_act": "silu", "hidden_size": vision["hidden_size"], "out_hidden_size": width,
                  "intermediate_size": vision["intermediate_size"], "window_size": 112, "tokens_per_second": 2,
                  "fullatt_block_indexes": vision["fullatt"]}
    else:  # Qwen2-VL calls the tower's width embed_dim, and the text's width hidden_size
        tower |= {"embed_dim": vision["hidden_size"], "hidden_size": width,
                  "mlp_ratio": vision["intermediate_size"] // vision["hidden_size"]}
    # fmt: on
    tags = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "vision": "<|vision_pad|>"}
    tags |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    pairs = width // heads // 2  # rotary pairs are shared out over time, height and width, 2 : 3 : 3
    side = 3 * pairs // 8
    return {
        "architectures": [f"Qwen2{'_5_' if family == 'qwen2_5_vl' else ''}VLForConditionalGeneration"],
        **config,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tags.items()},
        "rope_scaling": {"type": "mrope", "mrope_section": [pairs - 2 * side, side, side]},
        "vision_config": tower,
    }


def write_qwen_settings(folder: Path, config: dict, max_pixels: int = 168 * 168) -> None:
    """config.json, generation_config.json and, for a model that sees, preprocessor_config.json."""
    _write_json(folder / "config.json", config)
    end, pad = config["eos_token_id"], config["bos_token_id"]
    sampling = {"repetition_penalty": 1.05, "temperature": 1e-06}
    if config["model_type"] == "qwen3":
        sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    ends = {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad], "do_sample": True}
    _write_json(folder / "generation_config.json", {**ends, **sampling, "transformers_version": "4.51.0"})
    if "vision_config" in config:
        sizes = {"min_pixels": 56 * 56, "max_pixels": max_pixels, "patch_size": 14, "temporal_patch_size": 2}
        kind = "Qwen2_5_VLProcessor" if config["model_type"] == "qwen2_5_vl" else "Qwen2VLProcessor"
        sizes |= {"merge_size": 2, **PIXELS, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": kind}
        _write_json(folder / "preprocessor_config.json", sizes)


def demo_texts(data_dir: Path) -> dict[str, list]:
    """`{"en": captions, "zh": captions, "qa": [[question, answer]]}` of the demo data.

    Raises InputError if a file is missing or not of the demo data's form."""
    files = ["captions_en.json", "captions_zh.json", "rsvqa_questions.json", "rsvqa_answers.json"]
    for name in files:
        if not (data_dir / name).is_file():
            raise InputError(f"{data_dir / name} is missing: run `python demo_data.py` first")
    try:
        en, zh, questions, answers = (json.loads((data_dir / name).read_text(encoding="utf-8")) for name in files)
        answer_of = {row["question_id"]: str(row["answer"]) for row in answers["answers"] if row.get("active", True)}
        qa = [[r["question"], answer_of[r["id"]]] for r in questions["questions"] if r["id"] in answer_of]
        texts = {"en": [row["caption"] for row in en], "zh": [row["caption"] for row in zh], "qa": qa}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{data_dir} is not demo data ({error!r}): run `python demo_data.py` again") from None
    if not all(texts.values()):
        raise InputError(f"{data_dir} holds no captions or no questions: run `python demo_data.py` again")
    return texts


def _documents(texts: dict, think: str, seed: int) -> list[str]:
    """Training text: captions alone; captions and answers as the chat in which the model is asked later."""

    def chat(turns):
        user, end = "<|im_start|>user\n", "<|im_end|>\n"
        body = "".join(f"{user}{q}{end}<|im_start|>assistant\n{think}{a}{end}" for q, a in turns)
        return f"<|im_start|>system\n{SYSTEM}{end}{body}"

    shuffle = random.Random(seed)
    qa = texts["qa"][:]
    shuffle.shuffle(qa)
    documents = [chat(qa[i : i + 4]) for i in range(0, len(qa), 4)]
    documents += [f"{caption}<|endoftext|>" for caption in texts["en"] + texts["zh"]]
    documents += [chat([["Describe the image.", caption]]) for caption in texts["en"][::2]]
    documents += [chat([["描述这幅图像。", caption]]) for caption in texts["zh"][::2]]
    shuffle.shuffle(documents)
    return documents


def train_language(model, body, tokenizer, documents, seed, *, steps, batch, length, lr) -> tuple[float, float]:
    """Plain causal language modelling on packed text -> loss on rows left out (nats per token) before and after."""
    import torch

    ids = [token for ids in tokenizer(documents)["input_ids"] for token in ids]
    rows = torch.tensor(ids[: max(1, len(ids) // length) * length])
    rows = rows.view(-1, min(length, len(rows)))  # (N, T)
    left_out = rows[: max(1, min(32, len(rows) // 10))]
    rows = rows[len(left_out) :] if len(rows) > len(left_out) else rows
    generator = torch.Generator().manual_seed(seed)
    parameters = [*body.parameters()]  # the tied embedding is among them
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)

    def loss_of(x):
        logits = model.lm_head(body(input_ids=x, use_cache=False).last_hidden_state[:, :-1])  # (B, T-1, V)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())

    model.train()
    with torch.no_grad():
        before = loss_of(left_out).item()
    for step in range(steps):
        rate = min(1, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * step / steps))  # warm up, then cosine
        optimizer.param_groups[0]["lr"] = lr * rate
        loss = loss_of(rows[torch.randint(len(rows), (batch,), generator=generator)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return before, loss_of(left_out).item()


def _init_vision(model, folder: Path, seed: int) -> None:
    """A random tower that tells images apart. With the usual std of 0.02 a tower this narrow maps every image to
    nearly one vector; 1/sqrt(fan-in) keeps the signal, and the last layer is then centred and scaled so that image
    tokens vary around zero as strongly as the trained word embeddings do."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    generator, visual = torch.Generator().manual_seed(seed), model.model.visual
    with torch.no_grad():
        for name, weight in visual.named_parameters():
            if weight.dim() > 1:
                scale = weight[0].numel() ** -0.5 * (0.5 if "attn.proj" in name or "down_proj" in name else 1)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        draw = np.random.default_rng(seed)
        colours = [draw.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(16)]
        images = [Image.fromarray(c).resize((168, 168), Image.Resampling(2 * (i % 2))) for i, c in enumerate(colours)]
        inputs = Qwen2VLImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
        tokens = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output  # (tokens, D)
        last = visual.merger.mlp[2]
        scale = model.model.language_model.embed_tokens.weight.std() / (tokens - tokens.mean(0)).std()
        last.bias.sub_(tokens.mean(0)).mul_(scale)
        last.weight.mul_(scale)


def _write_qwen(folder: Path, family: str, vocab: dict, merges: list, texts: dict, seed: int) -> tuple[float, float]:
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM

    tokenizer = write_qwen_tokenizer(folder, vocab, merges, family)
    write_qwen_settings(folder, qwen_config(tokenizer, family, DEMO_SIZES["text"], DEMO_SIZES["vision"]))
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder)
    model = (Qwen3ForCausalLM if family == "qwen3" else Qwen2_5_VLForConditionalGeneration)(config)
    body = model.model if family == "qwen3" else model.model.language_model
    documents = _documents(texts, "<think>\n\n</think>\n\n" if family == "qwen3" else "", seed)
    losses = train_language(model, body, tokenizer, documents, seed, **DEMO_SIZES["train"])
    if family != "qwen3":
        _init_vision(model, folder, seed)
    write_weights(model, folder, shards=1 if family == "qwen3" else 2)
    return losses


def _write_clip(folder: Path, texts: list[str], seed: int) -> None:
    """A CLIP with fresh weights: 128 px images, patches of 16, both towers 4 layers of 128. Its words are English:
    other scripts fall to bytes, as in the original."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    texts = [" ".join(text.lower().split()) for text in texts]
    vocab, merges = train_bpe(texts, DEMO_SIZES["vocab"]["clip"], suffix="</w>", split=CLIP_SPLIT)
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab |= {start: len(vocab), end: len(vocab) + 1}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    _write_vocab(folder, tokenizer.backend_tokenizer, vocab, merges, head="#version: 0.2\n")
    roles = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    _write_json(folder / "special_tokens_map.json", roles)
    # fmt: off
    _write_json(folder / "tokenizer_config.json", {
        **roles, "do_lower_case": True, "errors": "replace", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer",
    })
    tower = {"hidden_act": "quick_gelu", "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4,
             "num_hidden_layers": 4, "projection_dim": 128}
    ids = {"bos_token_id": vocab[start], "eos_token_id": vocab[end], "pad_token_id": vocab[end]}
    _write_json(folder / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592, "projection_dim": 128, "torch_dtype": "float32",
        "text_config": {"model_type": "clip_text_model", **tower, **ids, "max_position_embeddings": 77,
                        "vocab_size": len(vocab)},
        "vision_config": {"model_type": "clip_vision_model", **tower, "image_size": 128, "patch_size": 16},
    })
    _write_json(folder / "preprocessor_config.json", {
        "crop_size": 128, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", **PIXELS, "resample": 3, "size": 128,
    })
    # fmt: on
    torch.manual_seed(seed)
    write_weights(CLIPModel(CLIPConfig.from_pretrained(folder)), folder)


def build_demo_bases(data_dir="data/demo", output_dir="models/demo", seed: int = 0) -> dict:
    """Write `output_dir/{qwen2_5_vl,clip,qwen3}` from the texts of `data_dir`; returns what was measured.
    At once if the same texts, settings and seed were built before. Written whole or not at all.

    Raises InputError if the demo data is missing or malformed, or the disk is full or read-only."""
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    texts = demo_texts(data_dir)
    fingerprint = hashlib.sha256(json.dumps([texts, DEMO_SIZES, seed], sort_keys=True).encode()).hexdigest()
    record = output_dir / "demo_bases.json"
    try:
        built = json.loads(record.read_text(encoding="utf-8"))
        if built["fingerprint"] == fingerprint:
            for name in DEMO:
                verify_model(output_dir / name)
            return {**built, "rebuilt": False}
    except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError: a broken base is rebuilt
        pass

    began = time.time()
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # One thread: matrices this small gain little from a second one, while threads that wait for each other on a
    # busy machine took 570 s instead of 40. It also makes the weights independent of the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".building-", dir=output_dir) as temp,
            torch.random.fork_rng(devices=[]),
        ):
            temp = Path(temp)
            for name in DEMO:
                (temp / name).mkdir()
            corpus = [*texts["en"], *texts["zh"], *(f"{q}\n{a}" for q, a in texts["qa"])]
            corpus += [f"system\n{SYSTEM}", "user\nDescribe the image.", "assistant\n", "描述这幅图像。"] * 2
            vocab, merges = train_bpe(corpus, DEMO_SIZES["vocab"]["qwen"])
            losses = {f: _write_qwen(temp / f, f, vocab, merges, texts, seed) for f in ("qwen2_5_vl", "qwen3")}
            _write_clip(temp / "clip", texts["en"], seed)
            for name in DEMO:
                verify_model(temp / name)
            record.unlink(missing_ok=True)  # from here to the last line nothing vouches for the folder
            for name in DEMO:
                if (output_dir / name).exists():
                    (output_dir / name).rename(temp / f"old-{name}")
                (temp / name).rename(output_dir / name)
            built = {"fingerprint": fingerprint, "seed": seed, "seconds": round(time.time() - began, 1)}
            built["loss_nats_per_token"] = {name: [round(loss, 3) for loss in pair] for name, pair in losses.items()}
            _write_json(temp / record.name, built)
            (temp / record.name).rename(record)
    except OSError as error:
        raise InputError(f"{output_dir} cannot be written: {error.strerror or error}") from error
    finally:
        torch.set_num_threads(threads)
    return {**built, "rebuilt": True}


# -----------------------------------------------------------------------------


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="ORG/NAME", help="models to bring (default: those of the preset)")
    parser.add_argument("--preset", choices=["full", "demo"], default="full", help="which bases (default: full)")
    parser.add_argument(
        "--source",
        default="modelscope",
        metavar="modelscope|huggingface|DIR",
        help="where from: a hub, or a folder copied from elsewhere (default: modelscope)",
    )
    parser.add_argument("--root", default=".", metavar="DIR", help="<org>/<name> and models/demo go here (default: .)")
    parser.add_argument("--check", action="store_true", help="only verify what is here; exit code 1 if not whole")
    parser.add_argument("--token", help="for gated models (or set HF_TOKEN / MODELSCOPE_API_TOKEN)")
    parser.add_argument("--endpoint", metavar="URL", help="a mirror (or set HF_ENDPOINT / MODELSCOPE_ENDPOINT)")
    parser.add_argument("--data", default="data/demo", metavar="DIR", help="texts of preset demo (default: data/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of preset demo (default: 0)")
    args = parser.parse_args(argv)
    root = Path(args.root)
    for name in args.models:
        if name.count("/") != 1 or not all(name.split("/")) or ".." in name:
            raise InputError(f"{name!r} is not a model's name: expected ORG/NAME, such as {FULL[0]}")
    demo = args.preset == "demo" and not args.models
    names = args.models or ([f"models/demo/{name}" for name in DEMO] if demo else FULL)

    if args.check:
        broken = 0
        for name in names:
            try:
                verify_model(root / name)
                print(f"whole    {root / name}")
            except InputError as error:
                broken += 1
                print(f"NOT OK   {error}", file=sys.stderr)
        if broken:
            raise SystemExit(1)
        return
    if demo:
        print("building the demo bases (about 40 s on two cores) ...", flush=True)
        built = build_demo_bases(args.data, root / "models" / "demo", args.seed)
        for name, (before, after) in built["loss_nats_per_token"].items():
            print(f"{name:10s} language loss {before:.2f} -> {after:.2f} nats per token")
        print(f"built in {built['seconds']} s" if built["rebuilt"] else "already built from the same texts and seed")
    for name in names:
        if not demo and args.source in ("modelscope", "huggingface"):
            print(f"{name} from {args.source} ...", flush=True)
            download(name, root, args.source, args.token, args.endpoint)
        elif not demo:
            if not Path(args.source).is_dir():
                raise InputError(f"--source {args.source} is neither modelscope, huggingface nor a folder")
            copy_model(name, Path(args.source), root, only=len(names) == 1)
        print(f"whole    {root / name}")


if __name__ == "__main__":
    with user_errors():
        main()
