"""The token cache: what is stored, when it is built, and what damage does to it."""

import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxreason import data
from jaxreason.core.errors import UserError
from jaxreason.data import cache, corpus
from jaxreason.data.corpus import combined_sha256, open_corpora

TEXTS = {f"{i:02}.txt": f"file {i}: " + "αβγ words " * (i + 1) for i in range(40)}


@pytest.fixture
def cfg(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return data.DataConfig(
        path=str(folder), cache_dir=str(tmp_path / "cache"), held_out_fraction=0.2
    )


def _token_folders(cfg):
    return sorted(p for p in (pathlib.Path(cfg.cache_dir) / "tokens").glob("*"))


def _texts(tokenizer, store):
    documents = zip(store.offsets[:-1], store.offsets[1:])
    return [tokenizer.decode(store.tokens[a : b - 1].tolist()) for a, b in documents]


def test_every_document_is_stored_once_and_closed_by_eos(cfg):
    tokenizer, (one,) = open_corpora(cfg)
    stored = []
    for store in (one.train, one.held_out):
        assert len(store.offsets) > 1
        assert (store.tokens[store.offsets[1:] - 1] == tokenizer.eos_id).all()
        assert (store.tokens == tokenizer.eos_id).sum() == len(store.offsets) - 1
        texts = _texts(tokenizer, store)
        assert store.utf8_bytes == sum(len(t.encode()) for t in texts)
        stored += texts
    assert sorted(stored) == sorted(TEXTS.values())
    assert one.train.tokens.dtype == np.uint16


def _no_split(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("split again")

    monkeypatch.setattr("jaxreason.data.texts.split_documents", refuse)


def test_a_complete_cache_is_not_built_again(cfg, monkeypatch):
    _, (first,) = open_corpora(cfg)
    _no_split(monkeypatch)
    monkeypatch.setattr("jaxreason.data.corpus._write_tokens", None)
    _, (second,) = open_corpora(cfg)
    assert first.sha256 == second.sha256
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)


def test_changed_text_and_changed_split_are_other_corpora(cfg):
    _, (first,) = open_corpora(cfg)
    path = pathlib.Path(cfg.path) / "03.txt"
    path.write_text("quite another text")
    tokenizer, (changed,) = open_corpora(cfg)
    assert changed.sha256 != first.sha256
    every = _texts(tokenizer, changed.train) + _texts(tokenizer, changed.held_out)
    assert "quite another text" in every
    _, (split,) = open_corpora(dataclasses.replace(cfg, held_out_fraction=0.5))
    assert split.sha256 != changed.sha256
    assert len(split.held_out.offsets) > len(changed.held_out.offsets)


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble meta"])
@pytest.mark.parametrize("stage", ["texts", "tokens"])
def test_a_damaged_cache_is_built_again(cfg, stage, damage):
    _, (first,) = open_corpora(cfg)
    expected = first.train.tokens.copy()
    (folder,) = (pathlib.Path(cfg.cache_dir) / stage).iterdir()
    file = folder / ("0.train.jsonl" if stage == "texts" else "train.tokens")
    if damage == "truncate":
        os.truncate(file, file.stat().st_size - 2)
    elif damage == "remove":
        file.unlink()
    else:
        (folder / "meta.json").write_text('{"files": ')
    _, (again,) = open_corpora(cfg)
    np.testing.assert_array_equal(again.train.tokens, expected)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing left beside it


def test_a_builder_that_dies_leaves_nothing_that_is_used(cfg, monkeypatch):
    write = corpus._write_tokens

    def die(folder, split, *rest):
        write(folder, split, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jaxreason.data.corpus._write_tokens", die)
        with pytest.raises(KeyboardInterrupt):
            open_corpora(cfg)
    assert not _token_folders(cfg)
    _, (one,) = open_corpora(cfg)
    assert len(one.train.tokens)


def test_what_killed_builders_left_is_removed_after_a_day(cfg, tmp_path):
    folder = tmp_path / "cache" / "thing"
    old, fresh = (folder.with_name(f"thing.building-1-{n}") for n in ("old", "fresh"))
    for path in (old, fresh):
        path.mkdir(parents=True)
        (path / "half").write_text("x")
    for path in (old / "half", old):
        os.utime(path, (time.time() - 90_000, time.time() - 90_000))
    cache.build_once(folder, lambda into: {})
    assert fresh.exists() and not old.exists()


def test_builders_side_by_side_agree(cfg):
    code = (
        "import sys, jaxreason.data as data; from jaxreason.data import *;"
        "from jaxreason.data.corpus import open_corpora;"
        "sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline();"
        f"_, (c,) = open_corpora({cfg!r}); print(c.sha256, int(c.train.tokens.astype(int).sum()))"
    )
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for b in builders:
        assert b.stdin and b.stdout and b.stdout.readline() == "ready\n"
    for b in builders:  # all start together
        assert b.stdin
        b.stdin.write("\n")
        b.stdin.flush()
    lines = {b.communicate(timeout=60)[0] for b in builders}
    assert [b.returncode for b in builders] == [0, 0, 0]
    _, (here,) = open_corpora(cfg)
    assert lines == {f"{here.sha256} {int(here.train.tokens.astype(int).sum())}\n"}
    assert len(_token_folders(cfg)) == 1


def test_meta_says_what_the_cache_holds(cfg):
    _, (one,) = open_corpora(cfg)
    (folder,) = _token_folders(cfg)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["corpus_sha256"] == one.sha256
    assert meta["counts"]["train"]["tokens"] == len(one.train.tokens)
    assert meta["counts"]["held_out"]["documents"] == len(one.held_out.offsets) - 1


def test_cache_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXREASON_CACHE", str(tmp_path))
    assert cache.cache_root("") == tmp_path
    assert cache.cache_root("~/x") == pathlib.Path.home() / "x"
    monkeypatch.delenv("JAXREASON_CACHE")
    assert cache.cache_root("") == pathlib.Path.home() / ".cache" / "jaxreason"


def test_an_unwritable_cache_is_said(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = dataclasses.replace(cfg, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set data.cache_dir"):
        open_corpora(blocked)


def _mixture(cfg, tmp_path, lines):
    """`cfg`'s texts, and a source that repeats some of them amid text of its own."""
    folder = tmp_path / "more"
    folder.mkdir()
    for i, line in enumerate(lines):
        (folder / f"more{i}.txt").write_text(line, encoding="utf-8")
    parts = (data.Weighted(path=cfg.path), data.Weighted(path=str(folder)))
    return dataclasses.replace(cfg, path="", mixture=parts)


def _words(i, changed=0):
    return " ".join(f"word{(i * 7919 + 31 * k) % 997 if k >= changed else k}" for k in range(120))


def test_what_one_source_holds_out_no_other_trains_on(cfg, tmp_path):
    for i in range(40):
        (pathlib.Path(cfg.path) / f"{i:02}.txt").write_text(_words(i), encoding="utf-8")
    again = [_words(i, changed=3) for i in range(40)] + [_words(i) for i in range(100, 120)]
    mixed = _mixture(cfg, tmp_path, again)
    tokenizer, corpora = open_corpora(mixed)
    train = [_texts(tokenizer, c.train) for c in corpora]
    held_out = [_texts(tokenizer, c.held_out) for c in corpora]
    assert all(train) and all(held_out)

    def number(text):
        return text.split()[-1]  # near duplicates end alike

    for s in range(2):
        gone = {number(t) for t in held_out[1 - s]}
        assert gone and not gone & {number(t) for t in train[s]}
    (folder,) = (pathlib.Path(cfg.cache_dir) / "texts").iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    assert min(meta["dropped_as_held_out_in_another_source"]) > 0
    assert (
        sum(map(len, train))
        + sum(map(len, held_out))
        + sum(meta["dropped_as_held_out_in_another_source"])
        == len(again) + 40
    )


def test_a_tokenizer_is_trained_on_all_sources_and_no_held_out_text(cfg, tmp_path, monkeypatch):
    mixed = _mixture(cfg, tmp_path, [_words(i) for i in range(30)])
    seen = []
    tokenizer, corpora = open_corpora(mixed)

    def spy(_, *, train_texts, corpus_sha256, **__):
        seen.append((sorted(train_texts()), corpus_sha256))
        return tokenizer

    monkeypatch.setattr("jaxreason.data.corpus.make_tokenizer", spy)
    open_corpora(mixed)
    ((texts, sha256),) = seen
    assert texts == sorted(t for c in corpora for t in _texts(tokenizer, c.train))
    assert sha256 == combined_sha256([c.sha256 for c in corpora])


def test_a_trained_tokenizer_serves_both_builds(cfg):
    trained = dataclasses.replace(cfg, tokenizer=data.SentencePiece(train_vocab_size=300))
    train, held_out = (
        data.build(dataclasses.replace(trained, seq_len=8, batch_size=2), split=s)
        for s in ("train", "held_out")
    )
    assert train.tokenizer.fingerprint == held_out.tokenizer.fingerprint
    assert len(_token_folders(cfg)) == 1
    batch = held_out.batch(0)
    assert batch["tokens"].max() < train.tokenizer.vocab_size
    assert held_out.bytes_per_token > 1.5


def test_a_full_disk_is_said(tmp_path):
    def write(into):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        cache.build_once(tmp_path / "cache" / "thing", write)
    assert not list((tmp_path / "cache").iterdir())


def test_a_source_of_no_text_is_said(cfg):
    for path in pathlib.Path(cfg.path).iterdir():
        path.write_text("")
    with pytest.raises(UserError) as caught:
        open_corpora(cfg)
    assert "\n" not in str(caught.value)
