"""TensorFlow Datasets, read without TensorFlow through their random-access form."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxreason.core.errors import UserError, nearest
from jaxreason.data.sources.document import Document
from jaxreason.data.sources.paths import not_utf8

_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """A dataset of TensorFlow Datasets in its ArrayRecord form; TensorFlow is not needed."""

    name: str = ""
    """Name with configuration and version as TFDS writes it, such as `lm1b` or `c4/en:3.1.0`."""
    split: str = "train"
    """Split, slices included: `train`, `train[:10%]`, `train+test`."""
    field: str = "text"
    """Feature with the text."""
    data_dir: str | None = None
    """Folder of prepared datasets, local or in a bucket; None: TFDS' own default."""
    download: bool = False
    """Whether a dataset that is not in the folder is downloaded and prepared there, where TFDS can
    do so without TensorFlow."""


def iter_tfds(cfg: Tfds) -> Iterator[Document]:
    """Yields the examples' texts, named `name/split/index`, in the order TFDS stores them.

    Raises:
        UserError: the dataset, split or field is not there or has no ArrayRecord form, or the
            package tensorflow-datasets is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(
            "reading TensorFlow Datasets needs the package tensorflow-datasets; "
            "install it: pip install 'jaxreason[tfds]'"
        ) from None
    try:
        source: Any = tfds.data_source(
            cfg.name, split=cfg.split, data_dir=cfg.data_dir, download=cfg.download
        )
        count = len(source)
    except (
        tfds.core.DatasetNotFoundError,
        AssertionError,
        ImportError,
        KeyError,
        NotImplementedError,
        OSError,
        ValueError,
    ) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise UserError(
            f"cannot open TFDS dataset {cfg.name!r}, split {cfg.split!r}, in "
            f"{cfg.data_dir or 'the default folder'} ({reason}); expected a dataset prepared with "
            "file_format='array_record'; check name, split and data_dir, or set download=True"
        ) from None
    for start in range(0, count, _BATCH):
        stop = min(start + _BATCH, count)
        for index, example in enumerate(source.__getitems__(range(start, stop)), start):
            where = f"{cfg.name}/{cfg.split}/{index}"
            yield Document(where, _text(example, cfg.field, where))


def _text(example: dict, field: str, where: str) -> str:
    if field not in example:
        raise UserError(
            f"{where} has no feature {field!r}, expected one of {sorted(example)}"
            f"{nearest(field, example)}; set the source's field"
        )
    value = example[field]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(where, error) from None
    if not isinstance(value, str):
        raise UserError(
            f"{where} has {type(value).__name__} in {field!r}, expected text; "
            "set the source's field to the feature with the text"
        )
    return value
