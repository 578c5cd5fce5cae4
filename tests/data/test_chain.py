"""Chain arithmetic against a reader of the problem text that knows nothing of how it was made."""

import re

import pytest

from jaxreason.core.errors import UserError
from jaxreason.data.chain import STEP_END, ChainArithmetic, check, example, iter_documents

CONFIGS = [
    ChainArithmetic(),
    ChainArithmetic(modulus=None, operations=("+", "-"), max_steps=9, max_value=99),
    ChainArithmetic(distractors=5, shuffled=True, seed=3),
    ChainArithmetic(distractors=40, min_steps=1, max_steps=1),
]


def _solve(prompt):
    """Evaluates a problem by its text alone, definitions in any order."""
    definitions = dict(re.findall(r"Let (\w+) = ([^.]+)\.", prompt))
    modulus = re.search(r"Work modulo (\d+)\.", prompt)
    (asked,) = re.findall(r"What is (\w+)\?", prompt)

    def value(term):
        if term not in definitions:
            return int(term)
        left, *rest = definitions[term].split()
        total = value(left)
        if rest:
            right = value(rest[1])
            total = {"+": total + right, "-": total - right, "*": total * right}[rest[0]]
        return total % int(modulus[1]) if modulus else total

    return value(asked)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_answer_is_what_the_problem_says(cfg):
    for i in range(300):
        one = example(cfg, i)
        assert str(_solve(one.prompt)) == one.answer
        assert re.findall(r"\\boxed\{(-?\d+)\}", one.solution) == [one.answer]


@pytest.mark.parametrize("cfg", CONFIGS)
def test_steps_are_what_the_solution_is_cut_into(cfg):
    for i in range(100):
        one = example(cfg, i)
        *steps, tail = one.solution.split(STEP_END)
        assert tuple(s + STEP_END for s in steps) == one.steps
        assert tail == f"The answer is \\boxed{{{one.answer}}}."
        assert cfg.min_steps <= len(steps) <= cfg.max_steps
        assert STEP_END not in one.prompt


def test_every_step_is_true():
    cfg = ChainArithmetic(max_steps=8)
    for i in range(200):
        for step in example(cfg, i).steps:
            sides = step.removesuffix(STEP_END).split(", which is ")
            _, _, computed, result = sides[0].split(" = ")
            assert eval(computed) == int(result)  # noqa: S307
            if len(sides) == 2:
                reduced, modulus = map(int, sides[1].split(" modulo "))
                assert int(result) % modulus == reduced != int(result)


def test_examples_are_a_pure_function_of_config_and_index():
    cfg = ChainArithmetic(seed=7)
    forward = [example(cfg, i) for i in range(20)]
    assert forward == [example(cfg, i) for i in reversed(range(20))][::-1]
    assert len({e.prompt for e in forward}) == 20
    assert forward != [example(ChainArithmetic(seed=8), i) for i in range(20)]
    assert example(ChainArithmetic(seed=7, num_examples=50), 19) == forward[19]
    with pytest.raises(IndexError):
        example(ChainArithmetic(num_examples=5), 5)


def test_example_0_is_the_committed_one():
    """Task data must not change under a run: these texts are what seed 0 means."""
    one = example(ChainArithmetic(), 0)
    assert (one.prompt, one.solution) == EXAMPLE_0


EXAMPLE_0 = (
    "Let p = 7. Let r = p * 1. Let a = r * 7. Let g = a + 1. Let f = g * 2. Let w = f * 5. "
    "Work modulo 97. What is w?\n\n",
    "r = p * 1 = 7 * 1 = 7.\n\n"
    "a = r * 7 = 7 * 7 = 49.\n\n"
    "g = a + 1 = 49 + 1 = 50.\n\n"
    "f = g * 2 = 50 * 2 = 100, which is 3 modulo 97.\n\n"
    "w = f * 5 = 3 * 5 = 15.\n\n"
    "The answer is \\boxed{15}.",
)


def _mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def test_difficulty_knobs_act():
    def some(**knobs):
        cfg = ChainArithmetic(**knobs)
        return [example(cfg, i) for i in range(200)]

    assert {len(e.steps) for e in some(min_steps=2, max_steps=4)} == {2, 3, 4}
    assert {len(e.steps) for e in some(min_steps=12, max_steps=12)} == {12}
    plain, distracted = some(), some(distractors=4)
    assert [e.prompt.count("Let") - len(e.steps) - 1 for e in plain] == [0] * 200
    assert [e.prompt.count("Let") - len(e.steps) - 1 for e in distracted] == [4] * 200
    assert _mean(len(e.steps) for e in distracted) < 7  # distractors are not solved for
    assert all(0 <= int(e.answer) < 11 for e in some(modulus=11))
    assert max(int(e.answer) for e in some(modulus=None, operations=("*",))) > 1000
    assert all("*" not in e.prompt and "-" not in e.prompt for e in some(operations=("+",)))
    largest = max(int(n) for e in some(max_value=500) for n in re.findall(r"\d+", e.prompt))
    assert 400 < largest <= 500

    def in_order(one):
        return one.prompt.split()[1] == one.steps[0].split()[2]  # the given number comes first

    assert all(in_order(e) for e in plain)
    assert _mean(in_order(e) for e in some(shuffled=True)) < 0.6


def test_documents_are_prompt_and_solution():
    cfg = ChainArithmetic(num_examples=4)
    documents = list(iter_documents(cfg))
    examples = [example(cfg, i) for i in range(4)]
    assert [d.text for d in documents] == [e.prompt + e.solution for e in examples]
    assert len({d.id for d in documents}) == 4


@pytest.mark.parametrize(
    "knobs",
    [
        {"num_examples": 0},
        {"min_steps": 0},
        {"min_steps": 5, "max_steps": 4},
        {"max_value": 0},
        {"operations": ()},
        {"operations": ("/",)},
        {"modulus": 1},
        {"distractors": -1},
    ],
)
def test_bad_fields_are_named(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        check(ChainArithmetic(**knobs))
