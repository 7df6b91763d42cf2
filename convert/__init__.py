"""Checkpoints as djax parameters: Hugging Face safetensors in, device shards or an Orbax directory out."""

from convert.checkpoint import restore, save, verify
from convert.errors import (
    CheckpointError,
    ConfigError,
    DestinationError,
    HeaderError,
    IndexFileError,
    MappingError,
    MissingKeyError,
    OutOfSpaceError,
    SourceError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedKeyError,
)
from convert.hf_config import model_config, read_config
from convert.huggingface import export
from convert.load import Description, Parameter, Progress, describe, load_params
from convert.run import convert
from convert.source import resolve_source

__all__ = [
    "CheckpointError", "ConfigError", "Description", "DestinationError", "HeaderError", "IndexFileError",
    "MappingError", "MissingKeyError", "OutOfSpaceError", "Parameter", "Progress", "SourceError",
    "TensorDtypeError", "TensorShapeError", "UnexpectedKeyError", "convert", "describe", "export", "load_params",
    "model_config", "read_config", "resolve_source", "restore", "save", "verify",
]
