"""Sources: every kind read back as written, in order and as a stream, or one line of error."""

import argparse
import functools
import gzip
import json
import pathlib
import random
import sys
import tracemalloc

import pytest
import zstandard
from fixtures import make_text
from support import run_python

from jaxreason.core.errors import UserError
from jaxreason.data.sources import (
    ArrayRecords,
    Document,
    JsonlFiles,
    Stdlib,
    TextFiles,
    iter_documents,
    source_for_path,
    stdlib,
)

TEXTS = ["one\r\n two\n", "caf\u00e9 \u2028 \U0001f600", "  \n\t x", "last"]
STORIES = make_text.FOLDER
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def texts(cfg) -> list[str]:
    return [document.text for document in iter_documents(cfg)]


def error_of(cfg) -> str:
    with pytest.raises(UserError) as error:
        list(iter_documents(cfg))
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


def jsonl(lines: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, field: line}) + "\n" for line in lines).encode()


def test_the_committed_stories_are_what_the_grammar_tells():
    assert {path.name: path.read_text() for path in STORIES.iterdir()} == make_text.stories()
    size = sum(len(text) for text in make_text.stories().values())
    assert 150_000 < size < 250_000


def test_stories_through_every_text_path():
    stories = [Document(name, text) for name, text in sorted(make_text.stories().items())]
    folder = str(STORIES)
    for path in (folder, f"{folder}/*.txt", f"{STORIES.parent}/**/story_*.txt"):
        assert list(iter_documents(source_for_path(path))) == stories
    two = f"{folder}/story_03.txt, {folder}/story_01.txt,{folder}/story_03.txt"
    assert list(iter_documents(source_for_path(two))) == [stories[1], stories[3]]


@pytest.mark.parametrize("suffix", PACK)
def test_packed_text_and_jsonl(tmp_path, suffix):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"t{number}.txt{suffix}").write_bytes(PACK[suffix](text.encode()))
    assert texts(source_for_path(str(tmp_path))) == TEXTS
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b"\xef\xbb\xbf" + jsonl(TEXTS) + b"\n  \n" + jsonl(["x"])[:-1]))
    cfg = source_for_path(str(path))
    assert isinstance(cfg, JsonlFiles)
    assert texts(cfg) == [*TEXTS, "x"]
    assert [d.id for d in iter_documents(cfg)][-2:] == [f"{path.name}:4", f"{path.name}:7"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_in_several_parts(tmp_path, suffix):
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(PACK[suffix](jsonl(TEXTS[:2])) + PACK[suffix](jsonl(TEXTS[2:])))
    assert texts(JsonlFiles(path=str(path))) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_packed_file_that_is_cut_off_or_damaged(tmp_path, suffix, name):
    noise = random.Random(0)
    body = jsonl([f"{noise.getrandbits(4000):x}" for _ in range(400)])
    packed = PACK[suffix](body)
    path = tmp_path / (name + suffix)
    for cut in (len(packed) - 1, len(packed) // 2, 3):
        path.write_bytes(packed[:cut])
        assert "damaged or cut off" in error_of(source_for_path(str(path)))
    path.write_bytes(body)
    assert "damaged or cut off" in error_of(source_for_path(str(path)))


def test_ids_do_not_change_when_a_corpus_moves(tmp_path):
    ids = []
    for root in (tmp_path / "here", tmp_path / "far/away"):
        for name in ("b/x.txt", "a/x.txt", "a/deep/y.txt", ".hidden/z.txt", "a/.z.txt"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        ids.append([d.id for d in iter_documents(TextFiles(path=str(root)))])
    assert ids == [["a/deep/y.txt", "a/x.txt", "b/x.txt"]] * 2


def test_a_file_is_split_into_documents(tmp_path):
    parts = ["a" * 700_000, "b\n\nb", "c" * 700_000, "d"]
    (tmp_path / "x.md").write_text("\n\n\n".join(parts))
    cfg = TextFiles(path=str(tmp_path / "x.md"), split_on="\n\n\n")
    assert texts(cfg) == parts
    assert [d.id for d in iter_documents(cfg)] == [f"x.md#{n}" for n in (1, 2, 3, 4)]
    # The separator lies across two reads of 2**20 characters.
    parts = ["a" * (2**20 - 1), "b"]
    (tmp_path / "x.md").write_text("\n\n\n".join(parts))
    assert texts(cfg) == parts


@pytest.mark.parametrize("suffix", PACK)
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    noise = random.Random(0)
    body = jsonl([f"{noise.getrandbits(40_000):x}" for _ in range(900)])  # 9 MB
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(PACK[suffix](body))
    sources = [JsonlFiles(path=str(path)), TextFiles(path=str(path), split_on="}\n")]
    del body
    for cfg in sources:
        tracemalloc.start()
        assert sum(1 for _ in iter_documents(cfg)) == 900
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # A read of text is 2**20 characters, which non-ASCII text would hold in 4 bytes each.
        assert peak < 6e6


@pytest.mark.parametrize(
    ("name", "content", "cfg", "says"),
    [
        ("a.jsonl", jsonl(["x"]) + b"{bad\n", JsonlFiles, "a.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1]\n", JsonlFiles, "a.jsonl:1 has no field 'text' (got list)"),
        ("a.jsonl", b"[" * 100_000, JsonlFiles, "a.jsonl:1 is not JSON"),
        ("a.jsonl", jsonl(["x"], "texts"), JsonlFiles, "did you mean 'texts'"),
        ("a.jsonl", b'{"text": null}\n', JsonlFiles, "a.jsonl:1 has NoneType in 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', JsonlFiles, "a.jsonl:1 has half a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}\n', JsonlFiles, "a.jsonl:1' is not UTF-8"),
        ("a.jsonl", b"\n\n", JsonlFiles, "holds no text"),
        (
            "a.txt",
            b"ok \xff\xfe no",
            TextFiles,
            "a.txt' is not UTF-8 text (bytes ff: invalid start",
        ),
        ("a.txt", b" \n", TextFiles, "holds no text"),
        ("a.txt", b"x", functools.partial(TextFiles, split_on=""), "split_on is empty"),
        ("b.txt", b"x", TextFiles, "no file matches"),
        ("a.array_record", b"x" * 99, ArrayRecords, "cannot be read as an ArrayRecord"),
    ],
)
def test_files_that_are_not_right(tmp_path, name, content, cfg, says):
    (tmp_path / name).write_bytes(content)
    path = tmp_path / ("a.txt" if cfg is TextFiles else name)
    assert says in error_of(cfg(path=str(path)))


@pytest.mark.parametrize("path", ["", "no/such/file", "no/*.txt", "{dir}/*.txt", "{dir}", "a,,b"])
def test_paths_that_match_nothing(tmp_path, path):
    with pytest.raises(UserError, match="^no file matches"):
        source_for_path(path.format(dir=tmp_path))


def test_the_kind_is_told_by_the_names(tmp_path):
    def kind(*names: str) -> type:
        for old in tmp_path.iterdir():
            old.unlink()
        for name in names:
            (tmp_path / name).write_text("x")
        return type(source_for_path(str(tmp_path)))

    for name in ("a.jsonl", "a.jsonl.gz", "a.ndjson.zst", "c4-train.0001.json.gz", "A.JSONL"):
        assert kind(name) is JsonlFiles
    for name in ("a.txt", "a.py", "a.md.zst", "README", "a.txt.gz"):
        assert kind(name) is TextFiles
    for name in ("a.array_record", "a.array_record-00001-of-00002"):
        assert kind(name) is ArrayRecords
    assert kind("a.txt", "b.py") is TextFiles
    with pytest.raises(UserError, match="TextFiles .*JsonlFiles|JsonlFiles .*TextFiles"):
        kind("a.txt", "b.jsonl")
    for name in ("a.parquet", "a.zip", "x.tfrecord-00001-of-00002"):
        with pytest.raises(UserError, match="not read"):
            kind("a.txt", name)


def test_the_standard_library():
    documents = list(iter_documents(Stdlib()))
    ids = [document.id for document in documents]
    assert ids == sorted(set(ids))
    assert {"argparse.py", "json/decoder.py", "email/message.py"} <= set(ids)
    assert not [i for i in ids if set(i.split("/")[:-1]) & {"test", "tests", "site-packages"}]
    assert not [i for i in ids if "_sysconfigdata" in i]
    assert 5e6 < sum(len(document.text) for document in documents) < 3e7
    source = pathlib.Path(argparse.__file__).read_text()
    assert documents[ids.index("argparse.py")].text == source
    summary = stdlib.summary(Stdlib())
    assert summary.python == ".".join(map(str, sys.version_info[:3]))
    assert summary.files + summary.skipped == len(stdlib.files(Stdlib()))
    assert len(summary.sha256) == 64


def test_a_library_file_that_is_not_text_is_skipped_and_counted(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\n# caf\u00e9\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"# \xff\n")
    (tmp_path / "c.py").write_bytes(b"# coding: klingon\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/d.py").write_text("d\n")
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = list(iter_documents(Stdlib()))
    assert documents == [Document("a.py", "# -*- coding: latin-1 -*-\n# caf\u00e9\n")]
    assert stdlib.summary(Stdlib()).skipped == 2
    assert [d.id for d in iter_documents(Stdlib(tests=True))] == ["a.py", "test/d.py"]
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "no")})
    assert "no source files" in error_of(Stdlib())


def test_array_records(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")

    def write(name: str, records: list[bytes]) -> pathlib.Path:
        path = tmp_path / name
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return path

    many = [f"text {i} " + "x" * (i % 50) for i in range(600)]  # more than one read
    first = write("a.array_record-00000-of-00002", [t.encode() for t in many])
    write("a.array_record-00001-of-00002", [t.encode() for t in TEXTS])
    cfg = source_for_path(str(tmp_path))
    assert texts(cfg) == many + TEXTS
    assert [d.id for d in iter_documents(cfg)][-1] == "a.array_record-00001-of-00002/3"
    path = write("j.array_record", jsonl(TEXTS).splitlines())
    assert texts(ArrayRecords(path=str(path), field="text")) == TEXTS
    assert "j.array_record/0 has no field 'body'" in error_of(
        ArrayRecords(path=str(path), field="body")
    )
    path = write("bad.array_record", [b"ok", b"\xff\xfe"])
    assert "bad.array_record/1' is not UTF-8" in error_of(ArrayRecords(path=str(path)))
    assert "holds no text" in error_of(ArrayRecords(path=str(write("no.array_record", []))))
    packed = bytearray(first.read_bytes())
    for damaged in (
        packed[:-100],
        b"",
        packed[:1000] + bytes([packed[1000] ^ 255]) + packed[1001:],
    ):
        first.write_bytes(damaged)
        assert "cannot be read as an ArrayRecord" in error_of(ArrayRecords(path=str(first)))


def test_tfds_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    # In a process of its own, as another test may have imported anything.
    out = run_python(
        """
        import sys, numpy as np, tensorflow_datasets as tfds
        from jaxreason.core.errors import UserError
        from jaxreason.data.sources import Tfds, iter_documents

        folder, texts = sys.argv[1], ["one\\r\\n two", "caf\\u00e9", *map(str, range(300))]

        class TinyText(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {"text": tfds.features.Text(), "n": np.int64}
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(texts)}

            def _generate_examples(self, texts):
                yield from ((i, {"text": text, "n": i}) for i, text in enumerate(texts))

        builder = TinyText(data_dir=folder, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")

        def read(**fields):
            cfg = Tfds(**{"name": "tiny_text", "data_dir": folder, **fields})
            return list(iter_documents(cfg))

        documents = read()
        assert [d.text for d in documents] != texts and documents == read()  # TFDS shuffles once
        assert sorted(d.text for d in documents) == sorted(texts)
        assert documents[5].id == "tiny_text/train/5"
        assert [d.text for d in read(split="train[:3]")] == [d.text for d in documents[:3]]
        assert "tensorflow" not in sys.modules and "torch" not in sys.modules
        for fields in ({"split": "test"}, {"name": "tiny_txt"}, {"field": "txt"}, {"field": "n"},
                       {"data_dir": folder + "/no"}, {"name": ""}, {"split": "train[:x"}):
            try:
                read(**fields)
            except UserError as error:
                assert "\\n" not in str(error)
                print(error)
            else:
                raise AssertionError(fields)
        """,
        str(tmp_path),
        devices=1,
    )
    for says in (
        "split 'test'",
        "'tiny_txt'",
        "did you mean 'text'",
        " in 'n', expected text",
        "train[:x",
    ):
        assert says in out
