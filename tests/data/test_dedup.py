"""The split: no near-duplicate across the sides, whatever the order, by exact Jaccard."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest
from fixtures import make_text
from support import REPO, environment

from jaxreason.core.errors import UserError
from jaxreason.data import clusters, minhash
from jaxreason.data.dedup import exclude_near_duplicates, split_documents
from jaxreason.data.sources import Document, Stdlib, iter_documents

STORIES = [Document(name, text) for name, text in sorted(make_text.stories().items())]
WORDS = sorted({word for story in STORIES for word in story.text.lower().split()})


def shingles(text: str) -> set:
    """The definition, written out: 5 words of a long text, 8 characters of a short one."""
    text = " ".join(text.lower().split())
    words = text.split(" ")
    if len(words) >= 60:
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
    return {text[i : i + 8] for i in range(max(1, len(text) - 7))}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def edited(text: str, edits: int, rng: random.Random) -> str:
    words = text.split(" ")
    for at in rng.sample(range(len(words)), edits):
        words[at] = rng.choice(WORDS)
    return " ".join(words)


def pieces(count: int, words: int) -> list[Document]:
    """Texts of the stories' words, as short as asked for."""
    rng = random.Random(words)
    return [Document(f"p{i:03d}", " ".join(rng.choices(WORDS, k=words))) for i in range(count)]


def sides(split, docs: list[Document]) -> dict[str, str]:
    names = {docs[i].id: "train" for i in split.train}
    return names | {docs[i].id: "held_out" for i in split.held_out}


@pytest.mark.parametrize("words", [700, 100, 60, 39, 30])
def test_planted_near_duplicates_stay_on_one_side(words):
    rng = random.Random(1)
    originals = STORIES[:30] if words == 700 else pieces(60, words)
    edits = max(1, words // 70)
    docs = [
        Document(f"{doc.id}-{copy}", edited(doc.text, edits, rng) if copy else doc.text)
        for copy in range(3)
        for doc in originals
    ]
    rng.shuffle(docs)
    held_out = set()
    for seed in range(4):
        split = split_documents(docs, held_out_fraction=0.3, seed=seed)
        where = sides(split, docs)
        assert len(where) == len(docs)
        for doc in originals:
            assert len({where[f"{doc.id}-{copy}"] for copy in range(3)}) == 1, (doc.id, seed)
        assert 0.2 < len(split.held_out) / len(docs) <= 0.4
        assert split.report.clusters == len(originals)
        held_out |= {docs[i].id for i in split.held_out}
    assert len(held_out) > 0.5 * len(docs)  # other seeds hold out other documents


@pytest.mark.parametrize("source", ["stories", "short", "library"])
def test_no_pair_across_the_sides_is_alike(source):
    rng = random.Random(0)
    if source == "library":
        docs = [d for d in iter_documents(Stdlib()) if d.id.startswith(("encodings/", "email/"))]
        docs = [d._replace(text=d.text[:20_000]) for d in docs]
    else:
        docs = STORIES[:20] if source == "stories" else pieces(20, 45)
        docs = [
            Document(f"{doc.id}-{edits}", edited(doc.text, edits * len(doc.text) // 6000, rng))
            for doc in docs
            for edits in ((0, 3, 6, 10, 20, 40) if source == "stories" else (0, 50, 150, 300, 600))
        ]
    sets = [shingles(doc.text) for doc in docs]
    alike = [
        (i, j)
        for i in range(len(docs))
        for j in range(i)
        if len(sets[i]) < 2 * len(sets[j]) < 4 * len(sets[i]) and jaccard(sets[i], sets[j]) >= 0.8
    ]
    assert len(alike) >= 20
    for seed in range(5):
        split = split_documents(docs, held_out_fraction=0.4, seed=seed)
        out = set(split.held_out.tolist())
        assert out and len(out) < len(docs)
        assert not [(docs[i].id, docs[j].id) for i, j in alike if (i in out) != (j in out)]


def test_texts_that_differ_are_not_joined():
    docs = STORIES + pieces(100, 30) + [d._replace(id="q" + d.id) for d in pieces(100, 70)]
    report = split_documents(docs, held_out_fraction=0.1).report
    assert report.clusters == report.documents == len(docs)
    assert report.near_duplicates == 0 and report.largest_cluster == 1


def test_texts_that_share_less_than_half_are_not_joined():
    parts = [story.text for story in STORIES[:40]]
    docs = [Document(f"{i}", parts[0] + text) for i, text in enumerate(parts[1:])]
    near = [jaccard(shingles(docs[0].text), shingles(doc.text)) for doc in docs[1:]]
    assert 0.25 < min(near) < max(near) < 0.5  # enough for most pairs to agree in a band
    assert split_documents(docs, held_out_fraction=0.1).report.largest_cluster == 1


def test_near_duplicates_of_any_length_meet():
    # One may be compared by words only, the other by characters only: there is an overlap.
    for count in range(20, 100):
        text = pieces(1, count)[0].text
        docs = [Document("a", text), Document("b", text + " and so"), STORIES[0]]
        assert split_documents(docs, held_out_fraction=0.1).report.clusters == 2, count


def test_clusters_joined_in_any_order_have_one_label():
    a, b = np.array([4, 2, 0, 6]), np.array([5, 4, 2, 7])
    assert clusters._unite(np.arange(8), a, b).tolist() == [0, 1, 0, 3, 0, 0, 6, 6]


def test_the_estimate_is_the_jaccard_similarity():
    rng = random.Random(0)
    for share in (0.5, 0.85, 0.95):
        errors, exact = [], 0.0
        for _ in range(50):
            sentences = [
                f"{n} words{n} come{n} from{n} here{n}" for n in rng.sample(range(9999), 200)
            ]
            kept = int(share * len(sentences))
            own = (len(sentences) - kept) // 2
            a = ". ".join(sentences[: kept + own])
            b = ". ".join(sentences[:kept] + sentences[kept + own :])
            exact = jaccard(shingles(a), shingles(b))
            one, two = minhash.signature(a).words, minhash.signature(b).words
            assert one is not None and two is not None
            errors.append(minhash.similarity(one, two) - exact)
        deviation = np.sqrt(exact * (1 - exact) / minhash.NUM_HASHES)
        assert abs(np.mean(errors)) < 3.5 * deviation / np.sqrt(len(errors))
        assert 0.7 * deviation < np.std(errors) < 1.4 * deviation


def test_case_and_spacing_do_not_count():
    one, two = minhash.signature("The  Fox\n ran\toff"), minhash.signature(" the fox ran off ")
    assert one.digest == two.digest and (one.characters == two.characters).all()
    assert minhash.signature("the fox ran of").digest != one.digest


@pytest.mark.parametrize(
    "text", ["", " \n", "x", "\u6f22", "\u6f22\u5b57" * 900, "a" * 5000, "\ud800"]
)
def test_any_text_has_a_signature(text):
    one, two = minhash.signature(text), minhash.signature(text)
    assert one.digest == two.digest
    kinds = [row for row in one[1:] if row is not None]
    assert kinds and all(row.shape == (minhash.NUM_HASHES,) for row in kinds)


def test_text_without_spaces_is_compared_by_characters():
    rng = random.Random(0)
    text = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(2000))
    other = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(2000))
    near = text[:900] + "\u4e00" + text[901:]
    docs = [Document(name, t) for name, t in (("a", text), ("b", near), ("c", other))]
    assert split_documents(docs, held_out_fraction=0.5).report.clusters == 2


def test_the_split_ignores_the_order_of_the_documents():
    rng = random.Random(0)
    docs = [Document(f"{d.id}-{i}", edited(d.text, 4, rng)) for d in STORIES[:24] for i in range(2)]
    expected = sides(split_documents(docs, held_out_fraction=0.2), docs)
    for _ in range(3):
        rng.shuffle(docs)
        assert sides(split_documents(docs, held_out_fraction=0.2), docs) == expected


def test_the_split_is_the_same_in_another_process():
    code = """
import sys; sys.path[:0] = ["tests"]
from fixtures import make_text
from jaxreason.data.dedup import split_documents
from jaxreason.data.sources import Document
docs = [Document(n, t) for n, t in sorted(make_text.stories().items())]
print(split_documents(docs, held_out_fraction=0.1, seed=3).held_out.tolist())
"""
    out = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPO,
            env=environment(1, PYTHONHASHSEED=seed),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    here = split_documents(STORIES, held_out_fraction=0.1, seed=3).held_out.tolist()
    assert out == [f"{here}\n"] * 2 and here


def test_the_held_out_share_counts_bytes():
    docs = STORIES + [Document("long", " ".join(pieces(1, 120_000)[0].text.split()))]
    split = split_documents(docs, held_out_fraction=0.05)
    total = sum(len(doc.text.encode()) for doc in docs)
    report = split.report
    assert report.train_bytes + report.held_out_bytes == total
    assert 0.03 * total < report.held_out_bytes <= 0.05 * total
    assert len(docs) - 1 in split.train  # larger than the share
    everything = split_documents(docs, held_out_fraction=0)
    assert len(everything.held_out) == 0 and len(everything.train) == len(docs)


def test_one_document_is_held_out_of_few():
    for count in (2, 3, 9):
        split = split_documents(STORIES[:count], held_out_fraction=0.01)
        assert len(split.held_out) == 1 and len(split.train) == count - 1


def test_equal_train_texts_are_dropped_when_asked():
    docs = [Document(f"{copy}{doc.id}", doc.text) for copy in "ab" for doc in STORIES]
    kept = split_documents(docs, held_out_fraction=0.2)
    split = split_documents(docs, held_out_fraction=0.2, dedup_train=True)
    assert split.held_out.tolist() == kept.held_out.tolist()
    assert split.train.tolist() == [i for i in kept.train if i < len(STORIES)]
    assert split.report.dropped == len(split.train) and kept.report.dropped == 0


@pytest.mark.parametrize(
    ("docs", "says"),
    [
        ([], "no document"),
        (STORIES[:1], "one document"),
        ([Document(f"{i}", STORIES[0].text) for i in range(5)], "5 documents, all near-duplicates"),
    ],
)
def test_a_corpus_too_small_to_split(docs, says):
    with pytest.raises(UserError) as error:
        split_documents(docs, held_out_fraction=0.1)
    assert "too small to split" in str(error.value) and says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(split_documents(docs, held_out_fraction=0).train) == len(docs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("held_out_fraction", 1.0),
        ("held_out_fraction", -0.1),
        ("near_duplicate_threshold", 0.2),
        ("near_duplicate_threshold", 1.5),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(UserError, match=f"{name}={value}"):
        split_documents(STORIES, **{"held_out_fraction": 0.1, name: value})


def test_threshold_one_keeps_only_equal_texts_together():
    docs = [STORIES[0], STORIES[0]._replace(id="copy"), STORIES[1]]
    docs.append(Document("near", edited(STORIES[0].text, 1, random.Random(0))))
    report = split_documents(docs, held_out_fraction=0.5, near_duplicate_threshold=1).report
    assert report.clusters == 3
    assert split_documents(docs, held_out_fraction=0.5).report.clusters == 2


def test_train_text_near_a_held_out_source_is_excluded():
    rng = random.Random(0)
    held_out = STORIES[:5]
    train = [Document(f"near{i}", edited(d.text, 5, rng)) for i, d in enumerate(held_out)]
    assert exclude_near_duplicates(train + STORIES[5:9], held_out).tolist() == [5, 6, 7, 8]


def test_a_large_group_of_near_duplicates_is_one_cluster():
    rng = random.Random(0)
    docs = [Document(f"{i:04d}", edited(STORIES[0].text, 3, rng)) for i in range(600)]
    docs.append(STORIES[1])
    assert split_documents(docs, held_out_fraction=0.5).report.largest_cluster == 600


def test_the_standard_library_is_split_in_seconds():
    documents = list(iter_documents(Stdlib()))
    start = time.process_time()
    report = split_documents(documents, held_out_fraction=0.03).report
    assert time.process_time() - start < 6  # 0.7 s on an idle core
    assert report.near_duplicates > 20 and report.largest_cluster < 0.2 * report.documents
    assert 0.02 < report.held_out_bytes / (report.held_out_bytes + report.train_bytes) <= 0.03
