"""Where documents come from: one frozen config a source, one function that streams it."""

from collections.abc import Callable, Iterator

from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.data.sources.array_records import ArrayRecords, iter_array_records
from jaxreason.data.sources.document import Document
from jaxreason.data.sources.files import JsonlFiles, TextFiles, iter_jsonl_files, iter_text_files
from jaxreason.data.sources.paths import expand
from jaxreason.data.sources.stdlib import Stdlib, iter_stdlib
from jaxreason.data.sources.tfds import Tfds, iter_tfds

__all__ = [
    "ArrayRecords",
    "Document",
    "JsonlFiles",
    "Source",
    "Stdlib",
    "TextFiles",
    "Tfds",
    "iter_documents",
    "source_for_path",
]

Source = Stdlib | TextFiles | JsonlFiles | Tfds | ArrayRecords

_READERS: dict[type, Callable[..., Iterator[Document]]] = {
    Stdlib: iter_stdlib,
    TextFiles: iter_text_files,
    JsonlFiles: iter_jsonl_files,
    Tfds: iter_tfds,
    ArrayRecords: iter_array_records,
}


def iter_documents(cfg: Source) -> Iterator[Document]:
    """Yields the documents of a source in one fixed order, holding one at a time.

    Documents without any text but white space are left out.

    Raises:
        UserError: the source is absent, damaged or of another kind, or has no document at all; some
            of it only when the iteration reaches it.
    """
    if type(cfg) not in _READERS:
        known = ", ".join(kind.__name__ for kind in _READERS)
        raise UserError(f"unknown source {type(cfg).__name__}, expected one of {known}")
    empty = True
    for document in _READERS[type(cfg)](cfg):
        if document.text and not document.text.isspace():
            empty = False
            yield document
    if empty:
        raise UserError(
            f"the source {cfg} holds no text, expected at least one document; check its path"
        )


_KINDS = {
    ".jsonl": JsonlFiles,
    ".ndjson": JsonlFiles,
    ".json": JsonlFiles,  # the web's crawls call JSON lines so
    ".array_record": ArrayRecords,
    ".arrayrecord": ArrayRecords,
}
_UNREADABLE = frozenset(
    ".7z .arrow .avro .bin .bz2 .csv .db .doc .docx .epub .feather .gguf .gif .h5 .idx .jpeg .jpg "
    ".npy .npz .parquet .pdf .pkl .png .pt .pyc .rar .riegeli .safetensors .so .sqlite .tar "
    ".tfrecord .tgz .tsv .xls .xlsx .xz .zip".split()
)


def source_for_path(path: str) -> TextFiles | JsonlFiles | ArrayRecords:
    """Returns the source that reads `path`, told by the names of the files it stands for.

    `.jsonl`, `.ndjson` and `.json` are JSON lines, `.array_record` (with or without a shard number)
    is ArrayRecord, known binary formats are refused, anything else is text; `.gz` and `.zst` are
    looked through. A folder must hold files of one kind.

    Raises:
        UserError: nothing matches, or the files are of several kinds, or of one that is not read.
    """
    kinds: dict[type, str] = {}
    for name, file in expand(path):
        kinds.setdefault(_kind(file), name)
    if len(kinds) > 1:
        got = " and ".join(f"{kind.__name__} ({name})" for kind, name in kinds.items())
        raise UserError(
            f"{path!r} holds {got}, expected files of one kind; "
            "name some of them with a glob, or give the source in full"
        )
    return next(iter(kinds))(path=path)


def _kind(file: epath.Path) -> type:
    name = file.name.lower()
    if ".array_record-" in name:  # a shard: name.array_record-00000-of-00004
        return ArrayRecords
    suffix = epath.Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
    if suffix in _UNREADABLE or ".tfrecord-" in name:
        raise UserError(
            f"{str(file)!r} is a kind of file that is not read, expected text, JSON lines or "
            "ArrayRecord, plain, .gz or .zst; convert it (to .jsonl, a text field a line)"
        )
    return _KINDS.get(suffix, TextFiles)
