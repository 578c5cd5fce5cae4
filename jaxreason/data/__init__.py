"""Data: sources of documents, a plan of which row holds what, and batches as a function of step."""

from jaxreason.core.text import Bytes, HfJson, SentencePiece
from jaxreason.data.chain import ChainArithmetic
from jaxreason.data.config import DataConfig, Weighted, check
from jaxreason.data.pairs import Example
from jaxreason.data.pairs_config import PairsConfig
from jaxreason.data.pairs_source import Examples, PairFiles
from jaxreason.data.pipeline import Dataset, build
from jaxreason.data.sources import ArrayRecords, JsonlFiles, Stdlib, TextFiles, Tfds
from jaxreason.data.tasks import Docstrings, GsmSymbolic

__all__ = [
    "ArrayRecords",
    "Bytes",
    "ChainArithmetic",
    "DataConfig",
    "Dataset",
    "Docstrings",
    "Example",
    "Examples",
    "GsmSymbolic",
    "HfJson",
    "JsonlFiles",
    "PairFiles",
    "PairsConfig",
    "SentencePiece",
    "Stdlib",
    "TextFiles",
    "Tfds",
    "Weighted",
    "build",
    "check",
]
