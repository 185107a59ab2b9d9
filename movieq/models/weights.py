"""Weights on this machine: find, verify and download them. Imports no torch.

A local folder is used without checks. Downloads lie in the cache of the hub (`HF_HOME`), where other tools find them too. `pull` records
what it has verified next to them, and only recorded files are loaded. A file that has changed since is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import msgspec

from movieq.errors import ModelUnavailable
from movieq.models.table import Lora, LoraFile, Model, Weights

_READ: Final = (".json", ".txt", ".model", ".jinja")
"""Endings of the other files that a pipeline reads: no pickle, no code."""


_STEMS: Final = ("diffusion_pytorch_model", "model")
"""The names of weight files, without ending: of diffusers, then of transformers."""


class _Checked(msgspec.Struct, frozen=True):
    """A verified file. `hash` is that of the hub: SHA-256 of a large file, git's blob SHA-1 of a small one."""

    size: int
    mtime_ns: int
    hash: str


def sources(model: Model) -> list[Weights]:
    """Return all weights of a model."""
    return [each for each in (model.weights, *model.components.values()) if each is not None]


def find(weights: Weights) -> Path:
    """Return the folder of the weights after verifying its files. Raises ModelUnavailable, which says what to do."""
    if weights.revision is None:
        folder = Path(weights.repository)
        if not folder.is_dir():
            raise ModelUnavailable(
                f"the folder {folder} does not exist on this worker's machine: put it there, or name another one in the entry"
            )
        return folder
    folder, checked = _snapshot(weights), _stamp(weights)
    if not checked.is_file():
        raise ModelUnavailable(f"{weights.repository} is not on this worker's machine, or not verified: run `movieq models pull`")
    _verify(weights.repository, weights.revision, folder, _read(checked))
    return folder


def _verify(repository: str, revision: str, folder: Path, known: dict[str, _Checked]) -> None:
    """Raise ModelUnavailable if a file of a pull is missing or has changed."""
    for name, before in known.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != before.size:
            raise ModelUnavailable(f"{repository}: {name} is missing or incomplete: run `movieq models pull`")
        if file.stat().st_mtime_ns != before.mtime_ns and hashed(file, before.hash) != before.hash:
            raise ModelUnavailable(f"{repository}: {name} differs from revision {revision[:12]}: run `movieq models pull`")


def beside(weights: Weights, name: str) -> Path | None:
    """Return the path of a cache file derived from the weights: another path when they change. Its folder may not exist yet.

    It is next to the record of `pull`, or in the user's cache for a local folder. None if the user has no home folder.
    """
    if weights.revision is not None:
        return _stamp(weights).with_suffix(f".{name}")
    folder = Path(weights.repository) / weights.subfolder
    files = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*.safetensors"))
    cache = cache_folder()
    return cache and cache / f"{hashlib.sha256(repr(files).encode()).hexdigest()[:32]}.{name}"


def cache_folder() -> Path | None:
    """Return movieq's folder in the user's cache, which may not exist yet; None if the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "movieq"
    except RuntimeError:
        return None


def begun(weights: Weights) -> bool:
    """Whether these weights were ever pulled to this machine. Always true for a local folder."""
    return weights.revision is None or _stamp(weights).is_file()


def lora_files(lora: Lora) -> list[LoraFile]:
    """Return all files of a LoRA."""
    return [each for each in (lora.weights, lora.second) if each is not None]


def find_file(source: LoraFile) -> Path:
    """Return the path of the file after verifying its hash. Raises ModelUnavailable, which says what to do."""
    if source.revision is None:
        path = Path(source.repository) / source.file
        try:
            stat = path.stat()
            found = _sha256(path, stat.st_size, stat.st_mtime_ns)
        except OSError:
            raise ModelUnavailable(f"{path} is not on this worker's machine") from None
        if found != source.sha256:
            raise ModelUnavailable(f"{path} has the hash {found} instead of {source.sha256}")
        return path
    folder, checked = _home(source.repository) / "snapshots" / source.revision, _file_stamp(source)
    if not checked.is_file():
        raise ModelUnavailable(
            f"{source.repository}: {source.file} is not on this worker's machine, or not verified: run `movieq models pull`"
        )
    known = _read(checked)
    if source.sha256 not in (None, known[source.file].hash):
        raise ModelUnavailable(f"{source.repository}: {source.file} was pulled with another hash: run `movieq models pull`")
    _verify(source.repository, source.revision, folder, known)
    return folder / source.file


def pull_file(source: LoraFile) -> int:
    """Download the file and verify its hash, that of the entry or of the hub; return its bytes. Raises ModelUnavailable."""
    if source.revision is not None:
        listed = {file.name: file.hash for file in _listed(source.repository, source.revision)}
        if source.file not in listed:
            raise ModelUnavailable(f"{source.repository} has no {source.file} at revision {source.revision[:12]}")
        checked = _pulled(source.repository, source.revision, source.file, source.sha256 or listed[source.file])
        _file_stamp(source).parent.mkdir(exist_ok=True)
        _file_stamp(source).write_bytes(msgspec.json.encode({source.file: checked}))
    return find_file(source).stat().st_size


def _file_stamp(source: LoraFile) -> Path:
    name = hashlib.sha256(source.file.encode()).hexdigest()[:16]
    return _home(source.repository) / "movieq" / f"{source.revision}-{name}.json"


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Return the hash of a file of this size and time, which is calculated once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pulled(repository: str, revision: str, name: str, expected: str) -> _Checked:
    """Download a file and verify its hash; one that is not what it should be is deleted. Raises ModelUnavailable."""
    path = _downloaded(repository, revision, name)
    if (found := hashed(path, expected)) != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ModelUnavailable(f"{repository}: {name} arrived with the hash {found} instead of {expected}, and was deleted")
    return _Checked(path.stat().st_size, path.stat().st_mtime_ns, expected)


class Wanted(msgspec.Struct, frozen=True):
    """A file of a repository that a model needs."""

    name: str
    size: int
    hash: str


def listing(weights: Weights) -> list[Wanted]:
    """Return the files of a repository that a model needs, as the hub lists them. Raises ModelUnavailable."""
    assert weights.revision is not None
    files, revision = _listed(weights.repository, weights.revision), weights.revision
    return list(needed(weights, files, lambda name: _downloaded(weights.repository, revision, name).read_bytes()))


def _listed(repository: str, revision: str) -> list[Wanted]:
    """Return the files of a repository as the hub lists them. Raises ModelUnavailable."""
    from huggingface_hub import HfApi

    try:
        info: Any = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=30)
    except Exception as error:  # of its HTTP client, which changes from version to version
        raise ModelUnavailable(f"{repository}: the hub did not answer: {error}") from None
    return [Wanted(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else each.blob_id) for each in info.siblings]


def needed(weights: Weights, files: list[Wanted], read: Callable[[str], bytes]) -> Iterator[Wanted]:
    """Yield the files that are loaded; `read` returns the content of a small one.

    Of a pipeline these are the folders that model_index.json names, and in each folder the weights that its index or its name says: no
    other variant, no second copy in another layout, no pickle.
    """
    here = {file.name: file for file in files if not weights.subfolder or file.name.startswith(f"{weights.subfolder}/")}
    root = f"{weights.subfolder}/" if weights.subfolder else ""
    folders = [root]
    if f"{root}model_index.json" in here:
        folders = [f"{root}{name}/" for name in components(read(f"{root}model_index.json"))]
    chosen: set[str] = set()
    for folder in folders:
        names = {name.removeprefix(folder) for name in here if name.startswith(folder) and "/" not in name.removeprefix(folder)}
        chosen |= {folder + name for name in loaded_files(names, weights.variant, partial(_read_in, folder, read))}
    for name, file in here.items():
        folder = name.rpartition("/")[0]
        is_listed = any(f"{folder}/".startswith(each) for each in folders) or f"{folder}/".removeprefix("/") == root
        if name in chosen or (name.endswith(_READ) and is_listed):
            yield file


def _read_in(folder: str, read: Callable[[str], bytes], name: str) -> bytes:
    return read(folder + name)


def components(model_index: bytes) -> list[str]:
    """Return the names of a pipeline's components, which are the folders that they lie in. Raises ModelUnavailable."""
    index = json_object("model_index.json", model_index)
    return [name for name, listed in index.items() if isinstance(listed, list) and listed and isinstance(listed[0], str)]


def loaded_files(names: Collection[str], variant: str | None, read: Callable[[str], bytes]) -> list[str]:
    """Return which of the files of one folder diffusers and transformers load as weights; `read` returns the content of a small one.

    An index names its files; without one it is the single file of the usual name, or the numbered ones. Raises ModelUnavailable.
    """
    config = json_object("config.json", read("config.json")) if "config.json" in names else {}
    own = config.get("transformers_weights")
    for stem in [own.partition(".")[0]] if isinstance(own, str) else _STEMS:
        for middle in ([f".{variant}"] if variant else []) + [""]:
            if (index := f"{stem}.safetensors.index{middle}.json") in names:
                listed = json_object(index, read(index)).get("weight_map")
                return sorted({name for name in listed.values() if name in names}) if isinstance(listed, dict) else []
            if (single := f"{stem}{middle}.safetensors") in names:
                return [single]
            numbered = re.compile(rf"{re.escape(stem + middle)}-\d+-of-\d+\.safetensors")
            if shards := sorted(name for name in names if numbered.fullmatch(name)):
                return shards
    return []


def json_object(name: str, content: bytes) -> dict[str, Any]:
    """Return a JSON object of a repository, which may have Infinity, as Python writes it. Raises ModelUnavailable."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{name} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def pull(weights: Weights) -> int:
    """Download and verify every file of the weights; return their bytes. Continues an interrupted download.

    Raises ModelUnavailable if the hub cannot be reached, or sends something else.
    """
    if weights.revision is None:
        find(weights)
        return 0
    known = {file.name: _pulled(weights.repository, weights.revision, file.name, file.hash) for file in listing(weights)}
    checked = _stamp(weights)
    checked.parent.mkdir(exist_ok=True)
    checked.write_bytes(msgspec.json.encode(known))
    return sum(each.size for each in known.values())


def _downloaded(repository: str, revision: str, name: str) -> Path:
    """Return the local path of a file of the hub, downloaded if it is not there. Raises ModelUnavailable."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except GatedRepoError:
        raise ModelUnavailable(
            f"{repository} asks for consent: accept its licence at https://huggingface.co/{repository}, then set HF_TOKEN"
        ) from None
    except Exception as error:  # of its HTTP client, which changes from version to version
        raise ModelUnavailable(f"{repository}: {name}: {error}; run `movieq models pull` again to continue") from None


def hashed(path: Path, like: str) -> str:
    """Return the hash of a file, by the same algorithm as the hash `like`."""
    if len(like) == 64:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _home(repository: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _snapshot(weights: Weights) -> Path:
    return _home(weights.repository) / "snapshots" / str(weights.revision)


def _stamp(weights: Weights) -> Path:
    return _home(weights.repository) / "movieq" / f"{weights.revision}{weights.subfolder and '-' + weights.subfolder}.json"


def _read(checked: Path) -> dict[str, _Checked]:
    try:
        return msgspec.json.decode(checked.read_bytes(), type=dict[str, _Checked])
    except (OSError, msgspec.DecodeError) as error:
        raise ModelUnavailable(f"{checked} cannot be read ({error}): run `movieq models pull`") from None
