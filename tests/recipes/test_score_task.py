"""Answers for scoring: the prompts of training, the layers that ran, times of single answers."""

import dataclasses

import skip_model
from rollout_model import tiny_model

from jaxreason.data import Example
from jaxreason.data.pairs_config import PairsConfig
from jaxreason.eval.task import evaluate
from jaxreason.recipes.encode_examples import make_encode
from jaxreason.recipes.score_task import (
    AnswerConfig,
    answerer,
    asked_of,
    prompt_tokens,
    times_per_token,
)
from jaxreason.rollout import GREEDY, generate

EXAMPLES = [Example(f"count {i}", f"so #### {i}", f"e{i}") for i in range(3)]


def encoder(model):
    return make_encode(model, PairsConfig(path="unused.jsonl"))


def test_prompts_end_where_learning_begins():
    model = tiny_model()
    assert prompt_tokens(encoder(model), EXAMPLES[1]) == model.tokenizer.encode("count 1")


def test_answers_are_those_of_generation():
    model = skip_model.random_routers("decode_only")
    complete = answerer(model, encoder(model), AnswerConfig(max_new_tokens=7, slots=2))
    found = evaluate(complete, EXAMPLES, ["exact"], batch_size=3)
    direct = generate(model, [e.prompt for e in EXAMPLES], GREEDY, max_new_tokens=7, slots=2)
    assert [r.text for r in found] == [c.text.strip() for c in direct]
    assert [r.tokens for r in found] == [len(c.tokens) for c in direct]
    assert [r.layers for r in found] == [c.layers for c in direct]
    assert all(r.layers[0] == 0 for r in found)  # The layer that always runs.
    assert found[0].seconds_per_token is None  # Not measured where others ran beside it.


def test_a_given_set_takes_the_place_of_the_routers():
    model = skip_model.random_routers("decode_only")
    keep = (True, False, False, True)
    (answer,) = answerer(model, encoder(model), AnswerConfig(max_new_tokens=4), keep=keep)(
        EXAMPLES[:1]
    )
    assert answer.layers == (0, 3)


def test_all_that_an_answer_depends_on_is_in_its_hash():
    model = skip_model.random_routers("decode_only")
    cfg, encode = AnswerConfig(max_new_tokens=4), encoder(model)
    asked = asked_of(model, encode, cfg, "abc")
    seen = {asked(example) for example in EXAMPLES}
    assert len(seen) == 3 and asked(EXAMPLES[0]) in seen  # The same whenever it is asked.
    chat = dataclasses.replace(
        model, chat_template="{% for m in messages %}{{ m.content }}!{% endfor %}"
    )
    wrapped = make_encode(chat, PairsConfig(path="unused.jsonl", chat=True))
    for other in (
        asked_of(model, encode, cfg, "abd"),
        asked_of(model, encode, dataclasses.replace(cfg, max_new_tokens=5), "abc"),
        asked_of(model, encode, dataclasses.replace(cfg, stop=("x",)), "abc"),
        asked_of(dataclasses.replace(model, dtype="bfloat16"), encode, cfg, "abc"),
        asked_of(dataclasses.replace(model, depth=None), encode, cfg, "abc"),
        asked_of(dataclasses.replace(model, eos_ids=(1,)), encode, cfg, "abc"),
        asked_of(model, encode, cfg, "abc", keep=(True, False, True, True)),
        asked_of(model, wrapped, cfg, "abc"),
    ):
        assert other(EXAMPLES[0]) not in seen
        seen.add(other(EXAMPLES[0]))
    reworded = dataclasses.replace(EXAMPLES[0], completion="so #### 9")
    assert asked(reworded) == asked(EXAMPLES[0])  # The reference has a place of its own.


def test_times_are_of_single_answers():
    model = skip_model.constant((True, False, True, False), "decode_only")
    encode = encoder(model)
    found = times_per_token(model, encode, EXAMPLES[:2], tokens=4)
    assert [layers for _, _, layers in found] == [2, 2]
    assert all(own > 0 and whole > 0 for own, whole, _ in found)
    answers = [
        answerer(model, encode, AnswerConfig(max_new_tokens=4, slots=1))([e]) for e in EXAMPLES
    ]
    assert any(answer.tokens > 1 for (answer,) in answers)
    for (answer,) in answers:  # An answer of one token, which the prompt gave, has no such time.
        assert (answer.seconds_per_token is not None) == (answer.tokens > 1)
