"""ArrayRecord files whose records are text, or JSON objects with a text field."""

import dataclasses
from collections.abc import Iterator

from jaxreason.core.errors import UserError
from jaxreason.data.sources.document import Document
from jaxreason.data.sources.files import field_of
from jaxreason.data.sources.paths import expand, not_utf8

_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecords:
    """ArrayRecord files: each record a UTF-8 text, or a JSON object with the text in a field."""

    path: str = ""
    """A file, a folder (every file below it) or a glob; several separated by commas."""
    field: str | None = None
    """Field with the text where records are JSON objects; None: a record is the text."""


def iter_array_records(cfg: ArrayRecords) -> Iterator[Document]:
    """Yields the records, named `file/index`, in the order of files and records.

    Raises:
        UserError: a path matches nothing, a file is not ArrayRecord or is damaged, a record is no
            text, or the package `array_record` is not installed.
    """
    try:
        from array_record.python import array_record_module  # type: ignore[attr-defined]
    except ImportError:
        raise UserError(
            "reading ArrayRecord files needs the package array_record; "
            "install it: pip install 'jaxreason[tfds]'"
        ) from None
    for name, path in expand(cfg.path):
        reader = array_record_module.ArrayRecordReader(str(path))
        count = reader.num_records()
        # A damaged file shows as one of no records, and opening does not raise.
        if not reader.ok():
            raise _damaged(str(path))
        for start in range(0, count, _BATCH):
            stop = min(start + _BATCH, count)
            try:
                records = reader.read(start, stop)
            except (RuntimeError, ValueError, IndexError):  # checksums are checked on reading
                raise _damaged(str(path)) from None
            if len(records) != stop - start:
                raise _damaged(str(path))
            for index, record in enumerate(records, start):
                yield Document(f"{name}/{index}", _text(record, cfg.field, f"{path}/{index}"))
        reader.close()


def _text(record: bytes, field: str | None, where: str) -> str:
    if field is not None:
        return field_of(record, field, where)
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from None


def _damaged(path: str) -> UserError:
    return UserError(
        f"{path!r} cannot be read as an ArrayRecord file (damaged, cut off, or another kind of "
        "file); get it anew, or read it as what it is"
    )
