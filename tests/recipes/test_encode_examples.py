"""Which tokens of a pair and of a conversation are learned, exactly."""

import dataclasses

import pytest
import tokenizers
from tiny_models import files, tokenizer

from jaxreason.core.errors import UserError
from jaxreason.core.text import HfJson, load_hf_json
from jaxreason.data import Example, PairsConfig
from jaxreason.data.pairs import Conversation
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.model import Model
from jaxreason.recipes.encode_examples import make_encode
from jaxreason.rollout.chat_template import render_chat
from jaxreason.rollout.requests import encode_prompts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
# Like templates that leave out the reasoning of all replies but the last.
FORGETS = CHATML.replace(
    "{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else m.content[:1] }}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "in the end"},
    {"role": "assistant", "content": "there"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "thin air"},
    {"role": "user", "content": "never seen"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """A model without parameters, with the tiny byte-level BPE tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in files().items():
        (folder / name).write_bytes(content)
    tokenizer = load_hf_json(HfJson(path=str(folder), parse_special=True))
    return Model(
        None, ModelConfig(vocab_size=271), tokenizer, CHATML, eos_ids=(2, 0), files=files()
    )


READER = tokenizers.Tokenizer.from_str(tokenizer())


def spans(encoded) -> list[str]:
    """The texts of the runs of learned tokens."""
    texts, run = [], []
    for token, learned in [*zip(encoded.tokens, encoded.learned, strict=True), (0, False)]:
        if learned:
            run.append(token)
        elif run:
            texts.append(READER.decode(run, skip_special_tokens=False))
            run = []
    return texts


def test_a_pair_is_the_prompt_of_generation_then_the_completion(model):
    example = Example("the prompt t", "he completion", "e")
    for bos in (None, 1):
        dressed = dataclasses.replace(model, bos_id=bos)
        got = make_encode(dressed, PairsConfig())(example)
        prompt = list(encode_prompts(dressed, [example.prompt])[0])
        completion = [*model.tokenizer.encode(example.completion), 2]
        # As one text the "t" and the "he" would be one token.
        assert model.tokenizer.encode(example.prompt + example.completion) != prompt + completion
        assert got.tokens == prompt + completion
        assert got.learned == [False] * len(prompt) + [True] * len(completion)
        assert got.completion_bytes == 13
    ends = dataclasses.replace(model, eos_ids=(0,))
    assert make_encode(ends, PairsConfig())(example).tokens[-1] == 0


def test_replies_of_a_conversation_and_nothing_else(model):
    item = Conversation(tuple(CHAT), "c")
    got = make_encode(model, PairsConfig())(item)
    assert spans(got) == ["there<|im_end|>", "thin air<|im_end|>"]
    assert got.tokens == render_chat(model, CHAT[:5], add_generation_prompt=False)[:-1]
    assert got.completion_bytes == len("there") + len("thin air")
    for reply in (2, 4):  # What generation would be given is what stands before the reply.
        prompt = render_chat(model, CHAT[:reply])
        assert got.tokens[: len(prompt)] == prompt and got.learned[len(prompt)]
        assert not got.learned[len(prompt) - 1]
    last = make_encode(model, PairsConfig(learned_turns="last"))(item)
    assert last.tokens == got.tokens and spans(last) == ["thin air<|im_end|>"]


def test_a_pair_as_a_conversation(model):
    cfg = PairsConfig(chat=True, system="Be brief.")
    got = make_encode(model, cfg)(Example("in the end", "there"))
    whole = make_encode(model, PairsConfig())(Conversation(tuple(CHAT[:3])))
    assert got.tokens == whole.tokens and got.learned == whole.learned


def test_a_template_whose_replies_have_no_end_gets_one(model):
    plain = dataclasses.replace(model, chat_template=PLAIN)
    got = make_encode(plain, PairsConfig(learned_turns="last"))(Conversation(tuple(CHAT)))
    assert got.tokens[-1] == 2 and spans(got) == [" thin air\n<|im_end|>"]


def test_tokens_across_the_border_count_as_the_reply(model, monkeypatch):
    """The prompt ends in a space that the reply's first token takes: offsets decide."""
    plain = dataclasses.replace(model, chat_template=PLAIN)
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "the"}]
    tokens = model.tokenizer.encode("u: x\na: the\n")
    head = model.tokenizer.encode("u: x\na: ")
    assert tokens[: len(head)] != head
    got = make_encode(plain, PairsConfig())(Conversation(tuple(chat)))
    assert got.tokens == [*tokens, 2] and spans(got) == [" the\n<|im_end|>"]
    monkeypatch.delattr(type(model.tokenizer), "encode_with_offsets")
    cut = make_encode(plain, PairsConfig())(Conversation(tuple(chat)))
    assert cut.tokens[: len(head)] == head and spans(cut) == ["the\n<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "cfg", "said"),
    [
        (None, PairsConfig(chat=True), "has no chat template"),
        ("{{ raise_exception('no system') }}", PairsConfig(), "x.jsonl:4: the chat template refus"),
        ("{{ nope.nope }}", PairsConfig(), "x.jsonl:4: the chat template refuses"),
        (FORGETS, PairsConfig(), "x.jsonl:4: the chat template writes the text up to message"),
        ("{{ messages | length }}", PairsConfig(), "x.jsonl:4: "),
    ],
)
def test_a_template_that_does_not_fit_is_one_line(template, cfg, said, model):
    wrong = dataclasses.replace(model, chat_template=template)
    with pytest.raises(UserError) as error:
        make_encode(wrong, cfg)(Conversation(tuple(CHAT), "x.jsonl:4"))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_last_turn_of_a_template_that_forgets(model):
    forgets = dataclasses.replace(model, chat_template=FORGETS)
    got = make_encode(forgets, PairsConfig(learned_turns="last"))(Conversation(tuple(CHAT)))
    assert spans(got) == ["thin air<|im_end|>"]
    text = READER.decode(got.tokens, skip_special_tokens=False)
    assert "assistant\nt<|im_end|>" in text
