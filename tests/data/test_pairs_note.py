"""A held-out part that one large group fills is said."""

from jaxreason.core.text import ByteTokenizer
from jaxreason.data import Example, Examples, PairsConfig
from jaxreason.data.pairs import Encoded
from jaxreason.data.pairs_build import open_pairs


def encode(item):
    tokens = [*item.prompt.encode(), *item.completion.encode()]
    first = len(item.prompt)
    return Encoded(tokens, [i >= first for i in range(len(tokens))], len(item.completion))


def notes(sizes):
    items = tuple(Example(f"{g}{i}", "y", f"{g}{i}", g) for g, n in sizes.items() for i in range(n))
    cfg = PairsConfig(source=Examples(examples=items), seq_len=16, batch_size=2)
    return open_pairs(cfg, ByteTokenizer(), encode).notes()


def test_a_group_that_makes_the_held_out_part_large_is_noted():
    small = {f"g{i}": 2 for i in range(40)}
    assert notes(small) == []
    said = [found for i in range(40) if (found := notes({**small, f"g{i}": 60}))]
    assert said and all(len(found) == 1 for found in said) and len(said) < 40
    assert "examples, more than the 14 of data.held_out_fraction" in said[0][0]
    assert "has 60" in said[0][0]
