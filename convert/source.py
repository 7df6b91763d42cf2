"""Sources of checkpoints: a local directory, or a hub repository's safe files."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from convert.errors import SourceError
from convert.hf_config import CONFIG_NAME, hf_fields
from djax.errors import first_line
from djax.models.config import ModelConfig

TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json",
)
"""Files that belong to a tokenizer. They are data; code and pickles are never fetched, copied or opened."""
_HUB_FILES = ("*.safetensors", CONFIG_NAME, "model.safetensors.index.json", *TEXT_FILES)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download  # imported on first use: a local load needs no network client

    name, _, revision = repository.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the client raises its own, its HTTP library's and OSError
        raise SourceError(
            f"is no local directory, and fetching it from the hub failed ({first_line(error, 200)}); check the name "
            "and the network, or give a local directory", file=repository) from error


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """The local directory of a checkpoint: `source` itself if it exists, else a download of that hub id.

    A hub id is `owner/name` or `owner/name@revision`. Only safetensors, JSON and tokenizer text files are
    fetched. Raises SourceError if there is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise SourceError("is a file; give the directory that holds config.json and the safetensors files", file=path)
    text = os.fspath(source)
    if not isinstance(source, str) or not _HUB_ID.fullmatch(text) or ".." in text:
        raise SourceError("is no local directory, and no hub id (owner/name)", file=text)
    return _download(text)


def refuse_other_kinds(directory: Path) -> None:
    """Call a directory what it is where it holds no weights of a model.

    Raises:
        SourceError: an adapter, a GGUF file, a tokenizer alone, or arrays that another program saved with Orbax.
    """
    names = {path.name for path in directory.iterdir()}
    if any(name.endswith(".safetensors") and not name.startswith("adapter_") for name in names):
        return
    if any(name.startswith("adapter_") for name in names):
        raise SourceError(
            "holds a LoRA (PEFT) adapter and not a model; merge it into its base model first, with peft's "
            "merge_and_unload() and save_pretrained(), and give that directory", file=directory)
    if any(name.endswith(".gguf") for name in names):
        raise SourceError("holds a GGUF file, which is not read; give the safetensors of the model", file=directory)
    if "_METADATA" in names or "_CHECKPOINT_METADATA" in names:
        raise SourceError(
            "holds arrays saved by Orbax, without the manifest that 'djax convert' writes; give the directory above, "
            "or convert the original checkpoint", file=directory)
    if "tokenizer.json" in names and CONFIG_NAME not in names:
        raise SourceError("holds a tokenizer and no model; give the directory that holds both", file=directory)


def write_text_files(destination: Path, config: ModelConfig, *, source: Path | None) -> None:
    """Copy config.json and the tokenizer's files from `source`, those that are there; else config.json of `config`."""
    if source is not None:
        for name in (CONFIG_NAME, *TEXT_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, destination / name)
    if not (destination / CONFIG_NAME).exists():
        (destination / CONFIG_NAME).write_text(json.dumps(hf_fields(config), indent=2) + "\n")
