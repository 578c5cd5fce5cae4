"""Batches: true successors, restarts, hosts, the held-out pass, speed."""

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from jaxreason import data
from jaxreason.core.errors import UserError
from jaxreason.core.text import Bytes, make_tokenizer
from jaxreason.data.chain import iter_documents
from jaxreason.data.corpus import TokenStore
from jaxreason.data.pipeline import Dataset
from jaxreason.data.plan import Plan

EOS = 9_999
BYTES = make_tokenizer(Bytes(), train_texts=lambda: [], cache_dir="", corpus_sha256="")
PACKINGS = ["chop", "best_fit", "none"]


def _store(lengths, first_token):
    """Documents of distinct tokens, so that a token says where it came from."""
    documents, token = [], first_token
    for n in lengths:
        documents.append(list(range(token, token + n - 1)) + [EOS])
        token += n
    offsets = np.cumsum([0, *lengths])
    return TokenStore(np.array(sum(documents, []), np.uint16), offsets, 3 * int(sum(lengths)))


STORES = [_store([5, 1, 17, 8, 3, 40, 2, 9], 100), _store([4, 30, 6, 6], 1000)]


def _dataset(
    *,
    packing: Any = "chop",
    stores=STORES,
    weights=(2.0, 1.0),
    batch_size=6,
    seed=0,
    endless=True,
    **kw,
):
    plan = Plan(
        [np.diff(s.offsets) for s in stores],
        seq_len=8,
        packing=packing,
        seed=seed,
        weights=list(weights[: len(stores)]) if endless else None,
    )
    settings: dict[str, Any] = dict(tokenizer=BYTES, corpus_sha256="", batch_size=batch_size)
    return Dataset(stores, plan, endless=endless, **settings | kw)


def _equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def _rows(batches):
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_pair_is_a_true_successor(packing):
    documents = [
        s.tokens[a:b].tolist() for s in STORES for a, b in zip(s.offsets[:-1], s.offsets[1:])
    ]
    rows = _rows([_dataset(packing=packing).batch(step) for step in range(40)])
    assert {n: v.dtype.name for n, v in rows.items() if v.dtype != np.int32} == {
        "loss_weights": "float32"
    }
    for tokens, targets, positions, segments, weights, examples in zip(
        *(rows[n].tolist() for n in ("tokens", "targets", "positions", "segment_ids")),
        rows["loss_weights"].tolist(),
        rows["example_id"].tolist(),
    ):
        place = seen = 0
        for i, segment in enumerate(segments):
            if segment == 0:
                assert (weights[i], examples[i], set(segments[i:])) == (0.0, -1, {0})
                break
            document = documents[examples[i]]
            if segment != seen:  # a span starts
                assert segment == seen + 1 and positions[i] == 0
                seen = segment
                place = document.index(tokens[i])
            assert tokens[i] == document[place]
            if place + 1 < len(document):
                assert (weights[i], targets[i]) == (1.0, document[place + 1])
            else:
                assert (tokens[i], weights[i]) == (EOS, 0.0)
            if i + 1 < 8 and segments[i + 1] == segment:
                assert positions[i + 1] == positions[i] + 1 and examples[i + 1] == examples[i]
            place += 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_holds_every_token_once(packing):
    store = STORES[0]
    one = _dataset(packing=packing, stores=[store], batch_size=1)
    for epoch in range(3):
        steps = range(epoch * one.num_rows, (epoch + 1) * one.num_rows)
        rows = _rows([one.batch(s) for s in steps])
        held = np.sort(rows["tokens"][rows["segment_ids"] > 0])
        np.testing.assert_array_equal(held, np.sort(store.tokens))
        targets = np.sort(rows["targets"][rows["loss_weights"] > 0])
        firsts = store.offsets[:-1]
        np.testing.assert_array_equal(targets, np.sort(np.delete(store.tokens, firsts)))


def test_no_padding_when_chopping_but_in_the_last_row():
    one = _dataset(stores=[_store([40, 9, 15], 100)])  # 64 tokens, 8 rows
    assert one.num_rows == 8
    assert (one.batch(3)["segment_ids"] > 0).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_hosts_together_hold_the_batch_of_one(packing):
    for endless in (True, False):
        whole = _dataset(packing=packing, endless=endless)
        for step in range(whole.num_batches):
            for count in (2, 3, 6):
                parts = [
                    _dataset(
                        packing=packing, endless=endless, process_index=p, process_count=count
                    ).batch(step)
                    for p in range(count)
                ]
                _equal(_rows(parts), whole.batch(step))


def test_batch_does_not_depend_on_the_order_of_calls():
    one, other = _dataset(), _dataset()
    forward = [one.batch(s) for s in range(30)]
    for s in np.random.default_rng(0).permutation(30):
        _equal(other.batch(int(s)), forward[s])


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_restart_continues_where_the_run_was_on_any_number_of_hosts(prefetch):
    straight = list(_dataset(prefetch=prefetch).iterate(0, 20))
    assert [s for s, _ in straight] == list(range(20))
    iterator = _dataset(prefetch=prefetch).iterate()
    before = [next(iterator) for _ in range(7)]
    iterator.close()
    hosts = [_dataset(prefetch=prefetch, process_index=p, process_count=2) for p in range(2)]
    after = [(a[0], _rows([a[1], b[1]])) for a, b in zip(*(h.iterate(7, 20) for h in hosts))]
    assert len(after) == 13
    for (s, got), (t, expected) in zip(before + after, straight):
        assert s == t
        _equal(got, expected)


def test_seeds_and_epochs_differ():
    def order(dataset, epoch):
        n = dataset.num_rows
        return [dataset.batch(s)["tokens"].tolist() for s in range(epoch * n, (epoch + 1) * n)]

    def one(seed):
        return _dataset(stores=STORES[:1], batch_size=1, seed=seed)

    assert order(one(0), 0) == order(one(0), 0)
    assert order(one(0), 0) != order(one(0), 1)
    assert order(one(0), 0) != order(one(1), 0)


def test_mixture_proportions_hold_at_every_prefix():
    stores = [*STORES, _store([8] * 5, 3000)]
    mixed = _dataset(stores=stores, weights=(0.5, 0.2, 0.3), packing="none", batch_size=1)
    first = np.array([mixed.batch(s)["tokens"][0, 0] for s in range(100)])
    last = np.array([mixed.batch(s)["example_id"][0, 0] for s in range(100)])
    sources = np.searchsorted([8, 12], last, "right")
    assert set(sources[(first >= 100) & (first < 1000)]) == {0}
    had = np.cumsum(sources[:, None] == np.arange(3), axis=0)
    assert np.abs(had - np.arange(1, 101)[:, None] * [0.5, 0.2, 0.3]).max() < 1


def test_held_out_is_one_pass_padded_to_whole_batches():
    held_out = _dataset(endless=False, batch_size=4)
    assert held_out.num_batches == -(-held_out.num_rows // 4)
    assert held_out.num_rows % 4  # so that the last batch is partial
    batches = dict(held_out.iterate())
    rows = _rows(list(batches.values()))
    tokens = rows["tokens"][rows["segment_ids"] > 0]
    everything = np.concatenate([s.tokens for s in STORES])
    np.testing.assert_array_equal(np.sort(tokens), np.sort(everything))
    padding = rows["segment_ids"][held_out.num_rows :]
    assert padding.shape[0] == len(batches) * 4 - held_out.num_rows and not padding.any()
    with pytest.raises(IndexError):
        held_out.batch(held_out.num_batches)
    few = _dataset(endless=False, batch_size=4, max_batches=2)
    assert few.num_batches == 2 and len(list(few.iterate())) == 2
    _equal(few.batch(1), batches[1])


def test_bytes_per_token_counts_targets():
    counted = _dataset(stores=STORES[:1], endless=False, packing="none")
    weights = sum(b["loss_weights"].sum() for _, b in counted.iterate())
    assert counted.bytes_per_token == pytest.approx(STORES[0].utf8_bytes / weights)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


CHAIN = data.ChainArithmetic(num_examples=400)


def _config(cache, **changes):
    settings: dict[str, Any] = dict(
        source=CHAIN, seq_len=32, batch_size=4, cache_dir=cache, held_out_fraction=0.1
    )
    return data.DataConfig(**settings | changes)


def test_text_comes_back_from_the_rows(cache):
    """A batch of the real thing decodes to the documents it names."""
    cfg = _config(cache, packing="none", seq_len=1024)
    train = data.build(cfg, split="train")
    texts = {d.text for d in iter_documents(CHAIN)}
    batch = train.batch(0)
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"]):
        ids = tokens[segments == 1].tolist()
        assert ids[-1] == train.tokenizer.eos_id
        assert train.tokenizer.decode(ids[:-1]) in texts


def test_splits_share_no_document_and_hash_alike(cache):
    cfg = _config(cache, packing="none", seq_len=1024)
    train, held_out = (data.build(cfg, split=s) for s in ("train", "held_out"))
    assert train.corpus_sha256 == held_out.corpus_sha256
    assert train.num_rows + held_out.num_rows == 400
    assert 10 < held_out.num_rows < 90
    seen = {r.tobytes() for s in range(train.num_batches) for r in train.batch(s)["tokens"]}
    kept_out = [r for _, b in held_out.iterate() for r in b["tokens"] if r.any()]
    assert len(kept_out) == held_out.num_rows
    assert not any(r.tobytes() in seen for r in kept_out)


def test_held_out_ignores_the_seed_and_train_does_not(cache):
    def first(split, seed):
        return data.build(_config(cache, seed=seed), split=split).batch(0)

    _equal(first("held_out", 0), first("held_out", 1))
    assert not np.array_equal(first("train", 0)["tokens"], first("train", 1)["tokens"])


def test_another_process_sees_the_same_rows(cache):
    other = data.ChainArithmetic(num_examples=200, seed=1)
    cfg = _config(
        cache, mixture=(data.Weighted(source=CHAIN, weight=3.0), data.Weighted(source=other))
    )
    here = data.build(cfg, split="train")
    code = (
        "from jaxreason import data; from jaxreason.data import *;"
        f"d = data.build({cfg!r}, split='train');"
        "print(d.corpus_sha256, d.plan_sha256, d.batch(5)['tokens'].sum(), len(d.batch(5)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    batch = here.batch(5)
    expected = [here.corpus_sha256, here.plan_sha256, str(batch["tokens"].sum()), str(len(batch))]
    assert out.stdout.split() == expected


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"batch_size": 6}, 4, "multiple of 4; use 4"),
        ({"batch_size": 0}, 1, "batch_size=0"),
        ({"seq_len": 1}, 1, "seq_len=1"),
        ({"seq_len": 10_000_000}, 1, "train tokens, expected data.seq_len=10000000"),
        ({"batch_size": 100_000}, 1, "or more; lower either"),
        ({"held_out_fraction": 1.0}, 1, "held_out_fraction=1.0"),
        ({"held_out_batches": 0}, 1, "held_out_batches=0"),
        ({"near_duplicate_threshold": 0.4}, 1, "near_duplicate_threshold=0.4"),
        ({"cache_dir": "gs://bucket/cache"}, 1, "local folder"),
        ({"mixture": (data.Weighted(source=CHAIN, weight=-1.0),)}, 1, "weight -1.0"),
        ({"mixture": (data.Weighted(),), "path": "x.txt"}, 1, "expected one of them"),
        ({"source": data.ChainArithmetic(modulus=0)}, 1, "modulus=0"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(cache, changes, processes, message):
    with pytest.raises(UserError, match=message) as caught:
        data.build(_config(cache, **changes), split="train", process_count=processes)
    assert "\n" not in str(caught.value)


def test_no_held_out_documents_is_said(cache):
    cfg = _config(cache, held_out_fraction=0.0)
    data.build(cfg, split="train")
    with pytest.raises(UserError, match="raise the fraction"):
        data.build(cfg, split="held_out")


def test_batches_are_made_fast(cache):
    cfg = data.DataConfig(cache_dir=cache)  # the standard library, as bytes
    train = data.build(cfg, split="train")
    train.batch(0)
    start = time.perf_counter()
    for step in range(1, 101):
        train.batch(step)
    milliseconds = (time.perf_counter() - start) * 10
    print(f"batch of 16 x 256: {milliseconds:.2f} ms")
    assert milliseconds < 20
