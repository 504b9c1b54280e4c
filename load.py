"""Bring the base models here, whole, and prove that they are.

    python load.py                                   # every base of preset full, from ModelScope
    python load.py Qwen/Qwen2.5-VL-3B-Instruct --source huggingface
    python load.py lcybuaa/Git-RSCLIP --source huggingface            # towers for search.py
    python load.py chendelong/RemoteCLIP/RemoteCLIP-ViT-B-32.pt --source huggingface    # a checkpoint of open_clip ...
    python load.py epoch_5.pt --like openai/clip-vit-base-patch32     # ... or a file that is here -> models/epoch_5
    python load.py --source /mnt/usb/models          # a folder copied from another machine
    python load.py --preset demo                     # small models of the same classes, nothing to download
    python load.py --check                           # verify what is already here

A base lies in `./<org>/<name>` exactly as its hub publishes it; a checkpoint of open_clip, as RemoteCLIP, GeoRSCLIP and
SkyCLIP are published, becomes a folder of transformers' layout. A broken download is resumed by running
the same command again; a model counts as present only after `verify_model` has read every shard's header.
"""

import argparse
import contextlib
import errno
import fnmatch
import glob
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import demo_bases
from config import PARTIAL, InputError, user_errors, whole_folder
from demo_bases import DEMO

FULL = [
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen3-0.6B",
    "openai/clip-vit-base-patch16",
]

HUBS = ("modelscope", "huggingface")
CHECKPOINTS = (".pt", ".pth", ".bin", ".safetensors")

# (pixels of a patch, width) of a ViT of open_clip and pixels of its image -> the base that such checkpoints start from. It
# gives what a state dict does not hold: tokenizer, heads, and the activation (QuickGELU in OpenAI's, GELU in LAION's).
LIKE = {
    (32, 768, 224): "openai/clip-vit-base-patch32",
    (16, 768, 224): "openai/clip-vit-base-patch16",
    (14, 1024, 224): "openai/clip-vit-large-patch14",
    (14, 1024, 336): "openai/clip-vit-large-patch14-336",
    (14, 1280, 224): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}

# -----------------------------------------------------------------------------
# Is a model folder whole?


def _mend(folder: Path) -> str:
    """The command that repairs `folder`."""
    folder = folder.absolute()
    if folder.parent.name == "models":
        first = f"remove {folder}, and " if folder.exists() else ""
        return f"{first}put it there whole: `python load.py FILE.pt` where it was made of a checkpoint"
    demo = folder.parent.name == "demo" and folder.name in DEMO
    above = [folder, *folder.parents]
    root = above[min(3 if demo else 2, len(above) - 1)]
    elsewhere = "" if root == Path.cwd() else f" --root {shlex.quote(str(root))}"
    return f"run `python load.py {'--preset demo' if demo else f'{folder.parent.name}/{folder.name}'}{elsewhere}`"


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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return set(file.keys())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {_mend(path.parent)}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not whole ({error}): delete it and {_mend(path.parent)}") from None


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
    # BERT's vocabulary needs no settings, and Chinese-CLIP is published without.
    if (folder / "tokenizer_config.json").exists() or not (folder / "vocab.txt").is_file():
        _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        _read_json(folder / "tokenizer.json")
    elif not any((folder / name).is_file() for name in ("spiece.model", "vocab.txt")):  # SigLIP's, BERT's
        _read_json(folder / "vocab.json")
        if not (folder / "merges.txt").is_file():
            raise InputError(f"{folder / 'merges.txt'} is missing: {_mend(folder)}")
    if "vision_config" in config:
        # Before and since transformers 5.
        both = [folder / "preprocessor_config.json", folder / "processor_config.json"]
        _read_json(next((path for path in both if path.exists()), both[0]))
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


def _is_whole(folder: Path) -> bool:
    try:
        verify_model(folder)
        return True
    except InputError:
        return False


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


def read_state(path: Path) -> dict:
    """The tensors of a file of weights by their names; nothing is unpickled but tensors. Raises InputError."""
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)  # a checkpoint of open_clip's training
        if odd := [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]:
            raise ValueError(f"{odd[0]} in it is no tensor")
        return state
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read ({reason})") from None


def convert_bin(folder: Path) -> None:
    """Turn `pytorch_model*.bin` into `model.safetensors`, if there are no safetensors, and delete it.

    Raises InputError if a file is not a plain state dict (nothing is unpickled but tensors)."""
    bins = sorted(folder.glob("pytorch_model*.bin"))
    if not bins or any(folder.glob("model*.safetensors")):
        return
    from safetensors.torch import save_file

    state = {}
    for path in bins:
        try:
            # position_ids are a counter that old versions stored; clones, because tied tensors share memory
            part = read_state(path)
            state |= {k: v.clone().contiguous() for k, v in part.items() if not k.endswith("position_ids")}
        except InputError as error:
            raise InputError(f"{error}: delete it and {_mend(folder)}") from None
    save_file(state, folder / "model.safetensors.partial", metadata={"format": "pt"})
    shutil.copymode(bins[0], folder / "model.safetensors.partial")
    (folder / "model.safetensors.partial").rename(folder / "model.safetensors")
    for path in [*bins, *folder.glob("*.bin.index.json")]:
        path.unlink()


def _check_space(folder: Path, sizes: dict[str, int]) -> None:
    """Raises InputError if what is still to come does not fit beside `folder`."""
    brought = []  # of each file, whole or in part, under its name and what a client adds to it
    for path, size in sizes.items():
        parts = folder.rglob(f"{glob.escape(Path(path).name)}*")
        brought.append(min(size, max((part.stat().st_size for part in parts if part.is_file()), default=0)))
    extra = sum(size for path, size in sizes.items() if path.endswith(".bin"))  # kept until it is converted
    need = sum(sizes.values()) - sum(brought) + extra
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
        self.asked = name
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
        weights = sorted(path for path in files if path.endswith(CHECKPOINTS))
        if small := sorted(set(files) - set(weights)):
            snapshot_download(self.name, local_dir=folder, allow_patterns=small, revision=self.revision, **where)
        for path in weights:
            size, sha256 = files[path]
            part = folder / ".cache" / f"{path}.{self.revision}.part"
            for parent in (part.parent, (folder / path).parent):
                parent.mkdir(parents=True, exist_ok=True)
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
                        file.seek(0)
                        file.truncate()
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
    if _is_whole(folder):
        return folder
    hub, listing = _listed(name, folder, source, token, endpoint)
    chosen = choose_files({path: size for path, (size, _) in listing.items()})
    if "config.json" not in chosen or not any(path.endswith((".safetensors", ".bin")) for path in chosen):
        reason = f"{name} on {hub.host} is not a transformers model: it has no config.json or no weights"
        if found := sorted(path for path in listing if path.endswith((".pt", ".pth"))):
            reason += f"; {found[0]} in it may be a checkpoint of open_clip: `python load.py {name}/{found[0]}`"
        raise InputError(reason)
    _bring(hub, folder, {path: listing[path] for path in chosen}, waits)
    convert_bin(folder)
    try:
        verify_model(folder)
    except InputError as error:  # every listed file is here with its right checksum: the repository lacks something
        reason = str(error).rpartition(": ")[0]
        lacks = "does not list it" if reason.endswith("is missing") else "has it so"
        raise InputError(f"{reason}, and {hub.host} {lacks}: try another --source") from None
    return folder


def download_file(name, root=".", source="modelscope", token=None, endpoint=None, waits=WAITS) -> Path:
    """Bring one file, "org/model/path", into `root/org/model/path`. Raises InputError as `download` does."""
    model, path = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    folder = Path(root) / model
    hub, listing = _listed(model, folder, source, token, endpoint)
    if path not in listing:
        there = ", ".join(sorted(p for p in listing if p.endswith(CHECKPOINTS))) or "no weights"
        raise InputError(f"{model} on {hub.host} has no {path}; it has {there}")
    _bring(hub, folder, {path: listing[path]}, waits)
    return folder / path


def _listed(name, folder, source, token, endpoint) -> tuple[_Hub, dict[str, tuple[int, str | None]]]:
    """The hub of a model, and what it lists."""
    hub = _Hub(source, name, token, endpoint)
    try:
        return hub, hub.files()
    except Exception as error:
        raise InputError(_explain(error, name, source, hub.host, folder)[0]) from error


def _bring(hub: _Hub, folder: Path, listing: dict[str, tuple[int, str | None]], waits) -> None:
    """Bring the files {path: (bytes, sha256)} and prove that they are whole; `waits` seconds before each next attempt."""
    name, source = hub.asked, hub.source
    _check_space(folder, {path: size for path, (size, _) in listing.items()})
    checked: set[str] = set()
    for attempt in range(len(waits) + 1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            hub.fetch(folder, listing)
            bad = [p for p in sorted(set(listing) - checked) if _wrong(folder / p, *listing[p])]
            checked |= set(listing) - set(bad)
            if not bad:
                return
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


@contextlib.contextmanager
def _said_of(place: Path, copy: Path):
    """What is wrong with a copy is said of the folder that it was copied from."""
    try:
        yield
    except InputError as error:
        reason = str(error).rpartition(": ")[0].replace(str(copy), str(place))
        raise InputError(f"{reason}: copy that folder again") from None


def copy_model(name: str, source: Path, root=".", only: bool = True) -> Path:
    """Copy `name` from a folder into `root/org/model`, whole or not at all; at once if it is there and whole.

    Raises InputError if the source is absent or not whole, or the disk is full."""
    folder = Path(root) / name
    if _is_whole(folder):
        return folder
    place = find_copy(source, name, only)
    sizes = choose_files({path.name: path.stat().st_size for path in place.iterdir() if path.is_file()})
    _check_space(Path(f"{folder.resolve()}{PARTIAL}"), sizes)
    if not any(path.endswith(".bin") for path in sizes):
        with _said_of(place, place):
            verify_model(place)  # before gigabytes are copied
    try:
        with whole_folder(folder) as new:
            for path in sizes:
                shutil.copyfile(place / path, new / path)
            with _said_of(place, new):
                convert_bin(new)
                verify_model(new)
    except OSError as error:
        reason = _explain(error, name, "modelscope", str(place), folder)[0]
        raise InputError(reason.replace(", what has arrived is kept", "")) from error  # nothing is: it lies there still
    return folder


# -----------------------------------------------------------------------------
# From a checkpoint of open_clip

_FIXED = {  # open_clip's name -> transformers'
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_NO_WEIGHTS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}  # buffers, some of OpenAI's own code
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_IN_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2"}  # fmt: skip


def from_open_clip(state: dict) -> dict:
    """The tensors of open_clip's CLIP with a ViT under the names of transformers' `CLIPModel`. What has no name there keeps
    its own."""
    made = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.").removeprefix("text.")  # of training on several GPUs; of CustomTextCLIP
        module, _, kind = name.rpartition(".")
        if block := _BLOCK.fullmatch(name):
            visual, number, module, kind = block.groups()
            layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
            if module == "attn.in_proj":
                made |= {f"{layer}.self_attn.{k}_proj.{kind}": part for k, part in zip("qkv", tensor.chunk(3))}
            else:
                made[f"{layer}.{_IN_BLOCK.get(module, module)}.{kind}"] = tensor
        elif name in _FIXED:
            made[_FIXED[name]] = tensor.T if name in ("visual.proj", "text_projection") else tensor
        elif module in _FIXED:
            made[f"{_FIXED[module]}.{kind}"] = tensor
        elif name not in _NO_WEIGHTS:
            made[name] = tensor
    return made


def convert_open_clip(path: Path, folder: Path, like: str | None = None, root=".") -> Path:
    """Write the open_clip checkpoint `path` to `folder` in transformers' layout, with the settings and the tokenizer of
    `like`, the base that it was trained from: ORG/NAME below `root`, or a folder; by default by its shape (`LIKE`).

    Raises InputError if it is no CLIP with a ViT, or does not fit `like`, or `folder` is there already."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if folder.exists():  # of another file of that name, for all we know
        raise InputError(f"{folder} is there already: remove it to convert {path} anew")
    state = from_open_clip(read_state(path))
    conv = state.get("vision_model.embeddings.patch_embedding.weight")
    places = state.get("vision_model.embeddings.position_embedding.weight")
    if conv is None or places is None or "text_model.embeddings.token_embedding.weight" not in state:
        which = "its image tower is a ResNet" if any("layer4" in name for name in state) else "names are missing"
        raise InputError(
            f"{path} is no checkpoint of open_clip's CLIP with a ViT ({which}, e.g. {next(iter(state), 'none')})"
        )
    width, patch = conv.shape[0], conv.shape[-1]
    pixels = round((len(places) - 1) ** 0.5) * patch
    like = like or LIKE.get((patch, width, pixels))
    shape = f"a ViT of width {width} with patches of {patch} pixels, {pixels} a side"
    if like is None:
        raise InputError(f"{path} is {shape}: name the base that it was trained from with --like")
    base = next((place for place in (Path(root) / like, Path(like)) if place.is_dir()), None)
    if base is None:
        raise InputError(f"{path} is {shape}, so it needs the settings of {like}: run `python load.py {like}` first")
    verify_model(base)
    wanted = {}
    for file in sorted(base.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            wanted |= {k: tensors.get_slice(k).get_shape() for k in tensors.keys() if not k.endswith("position_ids")}  # noqa: SIM118
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        said = f"{wrong[0]} is {found.get(wrong[0], 'missing')} in it and {wanted.get(wrong[0], 'missing')} there"
        raise InputError(
            f"{path} does not fit {base} in {len(wrong)} tensors ({said}): give the base that it was trained from with --like"
        )
    try:
        with whole_folder(folder) as new:
            for name in choose_files({file.name: 0 for file in base.iterdir() if file.is_file()}):
                if ".safetensors" not in name:
                    shutil.copyfile(base / name, new / name)
            save_file(
                {k: v.clone().float().contiguous() for k, v in state.items()},
                new / "model.safetensors",
                metadata={"format": "pt"},
            )
            shutil.copymode(new / "config.json", new / "model.safetensors")
            verify_model(new)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    print(f"{path}: {shape}, with the settings of {like}")
    return folder


def build_demo_bases(data_dir="data/demo", output_dir="models/demo", seed: int = 0, more=None) -> dict:
    """The small bases of preset demo: see `demo_bases.build`. Returns what was measured."""
    return demo_bases.build(data_dir, output_dir, seed, verify_model, more)


# -----------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="ORG/NAME",
        help="models to bring (default: those of the preset), or checkpoints of open_clip: ORG/NAME/FILE.pt, FILE.pt",
    )
    parser.add_argument("--preset", choices=["full", "demo"], default="full", help="which bases (default: full)")
    parser.add_argument(
        "--source",
        default="modelscope",
        metavar="modelscope|huggingface|DIR",
        help="where from: a hub, or a folder copied from elsewhere (default: modelscope)",
    )
    parser.add_argument(
        "--like", metavar="ORG/NAME|DIR", help="base of an open_clip checkpoint (default: by its shape)"
    )
    parser.add_argument("--root", default=".", metavar="DIR", help="<org>/<name> and models/demo go here (default: .)")
    parser.add_argument("--check", action="store_true", help="only verify what is here; exit code 1 if not whole")
    parser.add_argument("--token", help="for gated models (or set HF_TOKEN / MODELSCOPE_API_TOKEN)")
    parser.add_argument("--endpoint", metavar="URL", help="a mirror (or set HF_ENDPOINT / MODELSCOPE_ENDPOINT)")
    parser.add_argument("--data", default="data/demo", metavar="DIR", help="texts of preset demo (default: data/demo)")
    parser.add_argument(
        "--texts", metavar="FILE", help="preset demo: captions of your own whose words the small models learn, too"
    )
    parser.add_argument("--seed", type=int, default=0, help="of preset demo (default: 0)")
    return parser


def checked(args) -> list[str]:
    """Take the checkpoints out of `args.models` and return them. Raises InputError for what is neither one nor ORG/NAME."""
    files = [name for name in args.models if name.endswith(CHECKPOINTS)]
    for name in files:
        if not Path(name).is_file() and (
            name.count("/") < 2 or name[0] in "/.~" or ".." in name or args.source not in HUBS
        ):
            raise InputError(f"{name}: no such file; on a hub it is ORG/NAME/{Path(name).name}")
    args.models = [name for name in args.models if name not in files]
    for name in args.models:
        if name.count("/") != 1 or not all(name.split("/")) or ".." in name:
            here = f"; of a folder: --source {Path(name).parent} ORG/{Path(name).name}" if Path(name).is_dir() else ""
            raise InputError(f"{name!r} is not a model's name: expected ORG/NAME, such as {FULL[0]}{here}")
    return files


def check_all(folders: list[Path]) -> None:
    """Say of each folder whether its model is whole; exit code 1 where one is not."""
    broken = 0
    for folder in folders:
        try:
            verify_model(folder)
            print(f"whole    {folder}")
        except InputError as error:
            broken += 1
            print(f"NOT OK   {error}", file=sys.stderr)
    if broken:
        raise SystemExit(1)


def say_built(built: dict) -> None:
    """What the demo bases have learnt."""
    losses = {
        "nats_per_token": "language loss",
        "reading_nats_per_token": "loss of captions, read from tables of words,",
    }
    for name, found in built["measured"].items():
        for key, loss in losses.items():
            if key in found:
                before, after = found[key]
                print(f"{name:10s} {loss} {before:.2f} -> {after:.2f} nats per token")
        if "cover_accuracy" in found:
            print(f"{name:10s} land cover named in {found['cover_accuracy']:.0%} of validation scenes")
    print(f"built in {built['seconds']} s" if built["rebuilt"] else "already built from the same texts and seed")


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    root, files = Path(args.root), checked(args)
    demo = args.preset == "demo" and not args.models and not files
    names = args.models or ([] if files else [f"models/demo/{name}" for name in DEMO] if demo else FULL)
    converted = {
        name: root / ("models" if Path(name).is_file() else name.split("/")[0]) / Path(name).stem for name in files
    }
    if args.check:
        check_all([*(root / name for name in names), *converted.values()])
        return
    if demo:
        print("building the demo bases (about ten minutes on two cores) ...", flush=True)
        say_built(build_demo_bases(args.data, root / "models" / "demo", args.seed, args.texts))
    for name in names:
        if not demo and args.source in HUBS:
            print(f"{name} from {args.source} ...", flush=True)
            download(name, root, args.source, args.token, args.endpoint)
        elif not demo:
            if not Path(args.source).is_dir():
                raise InputError(f"--source {args.source} is neither modelscope, huggingface nor a folder")
            copy_model(name, Path(args.source), root, only=len(names) == 1)
        print(f"whole    {root / name}")
    for name, folder in converted.items():
        path = Path(name)
        if not path.is_file() and not folder.exists():  # else there is no need to bring it
            print(f"{name} from {args.source} ...", flush=True)
            path = download_file(name, root, args.source, args.token, args.endpoint)
        convert_open_clip(path, folder, args.like, root)
        print(f"whole    {folder}")


if __name__ == "__main__":
    with user_errors():
        main()
