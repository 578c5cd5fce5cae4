"""Which tokens of a pair and of a conversation are learned, exactly."""

import dataclasses
import io
import re

import pytest
import sentencepiece
import tokenizers
from tiny_models import files, tokenizer

from jaxreason.core.errors import UserError
from jaxreason.core.text import HfJson, SentencePieceTokenizer, load_hf_json
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
OPEN = PLAIN.replace("a: ", "a:")  # The template writes a space in front of every reply.
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
    assert got.tokens[-1] == 2 and spans(got) == ["thin air\n<|im_end|>"]


def reply_to(text: str, reply: str) -> Conversation:
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    return Conversation(tuple(chat), "x.jsonl:4")


@pytest.mark.parametrize("reply", ["the", " the", "\n\n  the", "\tin", "in", " ", "\u00e9 \u65e5"])
@pytest.mark.parametrize("template", [PLAIN, OPEN, CHATML])
def test_a_reply_stands_behind_the_prompt_that_generation_encodes(template, reply, model):
    """Whatever token would lie across the border in the whole text."""
    chatty = dataclasses.replace(model, chat_template=template)
    item = reply_to("x", reply)
    prompt = render_chat(chatty, item.messages[:1])
    got = make_encode(chatty, PairsConfig())(item)
    assert got.tokens[: len(prompt)] == prompt
    assert got.learned == [False] * len(prompt) + [True] * (len(got.tokens) - len(prompt))
    written = {PLAIN: f"{reply}\n", OPEN: f" {reply}\n", CHATML: reply}[template]
    assert spans(got) == [f"{written}<|im_end|>"]
    whole = render_chat(chatty, item.messages, add_generation_prompt=False)
    if template is PLAIN and reply == "the":  # The prompt's last space would be the reply's.
        assert whole[: len(prompt)] != prompt


def test_later_replies_stand_behind_their_own_beginning_too(model):
    plain = dataclasses.replace(model, chat_template=PLAIN)
    got = make_encode(plain, PairsConfig())(Conversation(tuple(CHAT)))
    assert spans(got) == ["there\n", "thin air\n<|im_end|>"]
    assert READER.decode(got.tokens, skip_special_tokens=False) == (
        "s: Be brief.\nu: in the end\na: there\nu: and then\na: thin air\n<|im_end|>"
    )
    prompt = render_chat(plain, CHAT[:2])
    assert got.tokens[: len(prompt)] == prompt
    last = make_encode(plain, PairsConfig(learned_turns="last"))(Conversation(tuple(CHAT)))
    prompt = render_chat(plain, CHAT[:4])
    assert last.tokens[: len(prompt)] == prompt and spans(last) == ["thin air\n<|im_end|>"]


def test_a_pair_of_a_tokenizer_that_puts_a_space_in_front_of_texts():
    """Llama 2's: behind a prompt that ends in a space, the completion has none of its own."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["so there the air", "count the air there: 1 2 3"] * 20),
        model_writer=made, vocab_size=290, model_type="bpe", byte_fallback=True, minloglevel=2,
        num_threads=1, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(made.getvalue())
    llama = Model(None, ModelConfig(vocab_size=290), tokenizer, eos_ids=(2,), bos_id=1)
    for prompt, completion in (("count the: ", "there"), ("count the:", " there")):
        got = make_encode(llama, PairsConfig())(Example(prompt, completion))
        (head,) = encode_prompts(llama, [prompt])
        assert got.tokens[: len(head)] == list(head) and got.learned.index(True) == len(head)
        assert got.tokens[-1] == 2 and tokenizer.decode(got.tokens) == prompt + completion
        assert got.tokens[len(head) : -1] != tokenizer.encode(completion)


def test_the_first_token_is_there_once(model):
    """As in generation: where the prompt writes it out it is not put there again."""
    dressed = dataclasses.replace(model, bos_id=1)
    for prompt in ("<|im_start|>in the end: ", "in the end: "):
        got = make_encode(dressed, PairsConfig())(Example(prompt, "there"))
        head = list(encode_prompts(dressed, [prompt])[0])
        assert got.tokens[: len(head)] == head and got.tokens.count(1) == 1
        assert not any(got.learned[: len(head)])


def test_a_token_that_ends_generation_is_not_in_what_is_learned(model):
    plain, chat = make_encode(model, PairsConfig()), make_encode(model, PairsConfig(chat=True))
    said = "x.jsonl:4: {} writes out a token that ends generation (id {}) behind 'an end: '"
    for end, token in (("<|im_end|>", 2), ("<|endoftext|>", 0)):
        text = f"an end: {end} there"
        for encode, what in ((plain, "the completion"), (chat, "the reply, message 1,")):
            with pytest.raises(UserError, match=re.escape(said.format(what, token))) as error:
                encode(Example("x", text, "x.jsonl:4"))
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="the reply, message 1,"):
            plain(reply_to("x", f"there{end}"))
        # At a pair's end it is the end; in a prompt it is what generation would read.
        got = plain(Example("x", f"there{end}"))
        assert got.tokens == [*model.tokenizer.encode("xthere"), token]
        assert plain(Example(text, "there")).tokens[-1] == 2
    unlearned = [{**CHAT[2], "content": "an <|im_end|>"} if m is CHAT[2] else m for m in CHAT]
    last = make_encode(model, PairsConfig(learned_turns="last"))
    assert spans(last(Conversation(tuple(unlearned)))) == ["thin air<|im_end|>"]
    with pytest.raises(UserError, match="the reply, message 2,"):
        plain(Conversation(tuple(unlearned)))


def test_a_template_is_told_one_day(model):
    dated = dataclasses.replace(model, chat_template="{{ strftime_now('%d %b %Y %H') }} " + CHATML)

    def prompt(model, **how):
        encoded = make_encode(model, PairsConfig(chat=True), **how)(Example("x", "y"))
        return READER.decode(encoded.tokens, skip_special_tokens=False).split(" <|im_start|>")[0]

    assert prompt(dated, date="2024-07-26") == "26 Jul 2024 00"
    of_a_run = dataclasses.replace(dated, source={"template_date": "2024-02-29"})
    assert prompt(of_a_run) == "29 Feb 2024 00"
    assert prompt(of_a_run, date="2024-07-26") == "26 Jul 2024 00"
    assert prompt(dated).split()[2] >= "2026"
    with pytest.raises(UserError, match="base.date is 'soon', expected a day as YYYY-MM-DD"):
        make_encode(dated, PairsConfig(chat=True), date="soon")


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
