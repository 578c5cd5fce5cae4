"""Data: sources of documents, a plan of which row holds what, and batches as a function of step."""

from jaxreason.core.text import Bytes, HfJson, SentencePiece
from jaxreason.data.chain import ChainArithmetic
from jaxreason.data.config import DataConfig, Weighted, check
from jaxreason.data.pipeline import Dataset, build
from jaxreason.data.sources import ArrayRecords, JsonlFiles, Stdlib, TextFiles, Tfds

__all__ = [
    "ArrayRecords",
    "Bytes",
    "ChainArithmetic",
    "DataConfig",
    "Dataset",
    "HfJson",
    "JsonlFiles",
    "SentencePiece",
    "Stdlib",
    "TextFiles",
    "Tfds",
    "Weighted",
    "build",
    "check",
]
