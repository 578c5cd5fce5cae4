"""Examples of fine-tuning: reading, splitting, what is too long, masks, the plan of rows."""

import dataclasses
import json

import numpy as np
import pytest

from jaxreason.core.errors import UserError
from jaxreason.core.text import ByteTokenizer
from jaxreason.data import Example, Examples, PairFiles, PairsConfig
from jaxreason.data.pairs import Conversation, Encoded
from jaxreason.data.pairs_build import open_pairs, split_examples

TOKENIZER = ByteTokenizer()


def encode(item) -> Encoded:
    """Bytes: the prompt, the completion, the end."""
    prompt, completion = TOKENIZER.encode(item.prompt), TOKENIZER.encode(item.completion)
    learned = [False] * len(prompt) + [True] * (len(completion) + 1)
    return Encoded([*prompt, *completion, 256], learned, len(completion))


def examples(count: int = 40) -> tuple[Example, ...]:
    return tuple(
        Example(f"{i}:" + "p" * (i % 5), "c" * (1 + i % 3), f"e{i}", f"g{i // 4}")
        for i in range(count)
    )


def pairs(**changes):
    cfg = PairsConfig(source=Examples(examples=examples()), seq_len=16, batch_size=2)
    return open_pairs(dataclasses.replace(cfg, **changes), TOKENIZER, encode)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_weights_are_on_completions_and_the_mask_on_prompts(packing):
    """Every row, taken apart into its segments, is whole examples with exact spans."""
    built = pairs(packing=packing)
    data, seen, most = built.dataset("held_out"), [], 0
    for _, batch in data.iterate():
        for r in range(2):
            row = {name: values[r] for name, values in batch.items()}
            assert (row["prompt_mask"][row["segment_ids"] == 0] == 0).all()
            most = max(most, row["segment_ids"].max())
            for segment in range(1, row["segment_ids"].max() + 1):
                at = row["segment_ids"] == segment
                tokens = row["tokens"][at]
                item = built.items["held_out"][row["example_id"][at][0]]
                n, m = len(item.prompt), len(item.completion)
                assert tokens.tolist() == encode(item).tokens
                assert row["prompt_mask"][at].tolist() == [1] * n + [0] * (m + 1)
                # The last prompt token predicts the first of the completion, the end nothing.
                assert row["loss_weights"][at].tolist() == [0] * (n - 1) + [1] * (m + 1) + [0]
                assert row["targets"][at][n - 1 : n + m].tolist() == encode(item).tokens[n:]
                assert row["positions"][at].tolist() == list(range(len(tokens)))
                seen.append(item.name)
    assert sorted(seen) == sorted(item.name for item in built.items["held_out"])
    assert (most > 1) == (packing == "best_fit")
    targets = sum(len(item.completion) + 1 for item in built.items["held_out"])
    size = sum(len(item.completion) for item in built.items["held_out"])
    assert data.bytes_per_token == size / targets


def test_a_batch_is_a_pure_function_of_its_step_and_hosts_read_parts_of_it():
    one, again = pairs(seed=3).dataset("train"), pairs(seed=3).dataset("train")
    for step in (0, 7, 31):
        whole = one.batch(step)
        parts = [
            pairs(seed=3).dataset("train", process_index=i, process_count=2).batch(step)
            for i in range(2)
        ]
        for name, values in again.batch(step).items():
            assert np.array_equal(whole[name], values)
            assert np.array_equal(whole[name], np.concatenate([part[name] for part in parts]))
    other = pairs(seed=4).dataset("train")
    assert one.corpus_sha256 == other.corpus_sha256 and one.plan_sha256 != other.plan_sha256
    assert pairs(held_out_fraction=0.3).sha256 != one.corpus_sha256


def test_groups_stay_on_one_side_and_the_split_is_stable():
    train, held_out = split_examples(examples(), 0.2)
    sides = [{item.group for item in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(held_out) == 8 and len(train) == 32
    again = split_examples(examples()[::-1], 0.2)[1]
    assert {item.name for item in again} == {item.name for item in held_out}
    twice = [Example(f"p{i % 10}", f"c{i}") for i in range(40)]
    train, held_out = split_examples(twice, 0.1)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out} and len(held_out) == 4
    with pytest.raises(UserError, match="1 groups leave 0 for training"):
        split_examples([Example("a", "b", group="g"), Example("b", "c", group="g")], 0.5)


def test_what_is_too_long():
    long = (*examples(), Example("p" * 10, "c" * 20, "long"), Example("p" * 30, "c", "prompt"))
    source = Examples(examples=long)
    with pytest.raises(UserError, match=r"'long' has 31 tokens, data.seq_len is 16 \(\d of"):
        pairs(source=source, held_out_fraction=0.01)
    dropped = pairs(source=source, too_long="drop").counts
    cut = pairs(source=source, too_long="truncate")
    total = lambda counts, what: counts[f"train_{what}"] + counts[f"held_out_{what}"]  # noqa: E731
    assert (total(dropped, "dropped"), total(dropped, "truncated")) == (2, 0)
    assert (total(cut.counts, "dropped"), total(cut.counts, "truncated")) == (1, 1)
    side = "train" if any(i.name == "long" for i in cut.items["train"]) else "held_out"
    place = [item.name for item in cut.items[side]].index("long")
    offsets = cut.stores[side].offsets
    tokens = cut.stores[side].tokens[offsets[place] : offsets[place + 1]]
    assert bytes(tokens.tolist()) == b"p" * 10 + b"c" * 6
    assert cut.prompts(side, place + 1)[place] == list(b"p" * 10)


def test_json_lines(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    lines = [{"prompt": "a", "completion": "b", "module": "m"}, {"messages": chat, "module": 3}]
    text = "\n\n".join(json.dumps(line) for line in lines)
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = PairFiles(path=str(tmp_path / "x.jsonl"), group_field="module")
    assert PairsConfig(source=source).read() == [
        Example("a", "b", "x.jsonl:1", "m"),
        Conversation(tuple(chat), "x.jsonl:3", "3"),
    ]


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "x.jsonl is empty"),
        ("\n\n", "x.jsonl is empty"),
        (GOOD + '{"prompt": "a"}', "line 2 has no field 'completion'"),
        (GOOD + '{"promt": "a", "completion": "b"}', "did you mean 'promt'"),
        (GOOD + '{"prompt": 3, "completion": "b"}', "line 2 has int in 'prompt'"),
        ('{"prompt": "a", "completion": ""}', "line 1 has an empty 'completion'"),
        ('{"prompt": "\\ud800", "completion": "b"}', "half a surrogate pair in 'prompt'"),
        ("[1]", "line 1 is a list"),
        (GOOD + "{", "line 2 is not JSON"),
        (GOOD.encode() + b'{"prompt": "\xff"}', "line 2' is not UTF-8"),
        ('{"messages": []}', "line 1 has no list of messages"),
        ('{"messages": ["hi"]}', "line 1, message 0: expected an object"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "unknown role 'bot'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message of the role assistant"),
    ],
)
def test_a_wrong_file_is_one_line(text, said, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        PairsConfig(path=str(tmp_path / "x.jsonl")).read()
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": PairFiles()}, "data.path is empty"),
        ({"source": Examples()}, "has no examples"),
        ({"source": Examples(examples=(Example("a", "", "e"),))}, "'e' has an empty completion"),
        ({"seq_len": 1}, "data.seq_len=1"),
        ({"seq_len": 4}, "examples are longer"),
        ({"seq_len": 2, "too_long": "drop"}, "are longer than data.seq_len=2"),
        ({"batch_size": 400}, "expected data.batch_size=400 or more"),
        ({"held_out_fraction": 0.0}, "data.held_out_fraction=0.0"),
        ({"held_out_batches": 0}, "data.held_out_batches=0"),
        ({"system": "Be brief."}, "data.system is set without data.chat"),
    ],
)
def test_a_wrong_config_is_one_line(changes, said):
    with pytest.raises(UserError) as error:
        pairs(**changes).dataset("train")
    assert said in str(error.value) and "\n" not in str(error.value)
