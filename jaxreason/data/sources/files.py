"""Text files and JSON lines: one file or many, plain, .gz or .zst, local or in a bucket."""

import dataclasses
import io
import json
from collections.abc import Iterator

from jaxreason.core.errors import UserError, nearest
from jaxreason.data.sources.document import Document
from jaxreason.data.sources.paths import expand, not_utf8, open_binary, open_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles:
    """UTF-8 text files, a document each, or several where `split_on` is set."""

    path: str = ""
    """A file, a folder (every file below it) or a glob; several separated by commas; plain, `.gz`
    or `.zst`; local or in a bucket (`gs://...`)."""
    split_on: str | None = None
    r"""What separates the documents of a file, such as `\n\n\n`; None: a file is one document."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonlFiles:
    """Files with a JSON object a line, one of whose fields is the document's text."""

    path: str = ""
    """A file, a folder (every file below it) or a glob; several separated by commas; plain, `.gz`
    or `.zst`; local or in a bucket (`gs://...`)."""
    field: str = "text"
    """Name of the field with the text."""


def iter_text_files(cfg: TextFiles) -> Iterator[Document]:
    """Yields the documents of text files, named by file and part; see `expand` for the order.

    Raises:
        UserError: a path matches nothing, or a file is damaged or not UTF-8.
    """
    if cfg.split_on == "":
        raise UserError(
            "TextFiles.split_on is empty, expected the text between documents; "
            r"set it to None or to such as '\n\n\n'"
        )
    for name, path in expand(cfg.path):
        with open_text(path) as file:
            if cfg.split_on is None:
                yield Document(name, file.read())
                continue
            for number, text in enumerate(_parts(file, cfg.split_on), start=1):
                yield Document(f"{name}#{number}", text)


def _parts(file: io.TextIOBase, separator: str) -> Iterator[str]:
    rest = ""
    while chunk := file.read(1 << 20):
        *parts, rest = (rest + chunk).split(separator)
        yield from parts
    yield rest


def iter_jsonl_files(cfg: JsonlFiles) -> Iterator[Document]:
    """Yields the documents of JSON-lines files, named `file:line`, in the order of the lines.

    Raises:
        UserError: a path matches nothing, a file is damaged, or a line is not an object with the
            field; the message gives file and line.
    """
    for name, path in expand(cfg.path):
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield Document(
                        f"{name}:{number}", field_of(line, cfg.field, f"{path}:{number}")
                    )


def field_of(record: bytes, field: str, where: str) -> str:
    """Returns the text in field `field` of a JSON object; `where` names the record in errors."""
    try:
        fields = json.loads(record)
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({getattr(error, 'msg', error)}), expected one object a line "
            f"with the text in {field!r}; mend the line, or read the file as plain text"
        ) from None
    if not isinstance(fields, dict) or field not in fields:
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        hint = nearest(field, fields) if isinstance(fields, dict) else ""
        raise UserError(
            f"{where} has no field {field!r} (got {str(got)[:200]}){hint}; set the source's field"
        )
    text = fields[field]
    if not isinstance(text, str):
        raise UserError(
            f"{where} has {type(text).__name__} in {field!r}, expected a string; "
            "set the source's field to the one with the text"
        )
    if b"\\u" in record:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where} has half a surrogate pair in {field!r}, which is no text; mend the line"
            ) from None
    return text
