"""Chat templates as `transformers` renders them, and a conversation with a scripted terminal."""

import dataclasses
import io
import json
import os
import signal

import pytest
from rollout_model import tiny_model

from jaxreason.core.errors import UserError
from jaxreason.rollout import GREEDY, Stats, prepare
from jaxreason.rollout.chat import chat
from jaxreason.rollout.chat_template import render, render_chat, special_tokens

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model():
    files = {
        "tokenizer_config.json": json.dumps(
            {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
        ).encode(),
        "special_tokens_map.json": b"not json",
    }
    return dataclasses.replace(prepare(tiny_model()), chat_template=CHATML, files=files)


def test_templates_render(model):
    assert render(CHATML, HELLO, {}) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(CHATML, HELLO, {}, add_generation_prompt=False).endswith("Hello<|im_end|>\n")
    assert special_tokens(model) == {"bos_token": "<s>", "eos_token": "</s>"}
    marked = "{{ bos_token }}{% generation %}{{ messages[0] | tojson }}{% endgeneration %}"
    want = '<s>{"role": "user", "content": "\u00e9"}'
    assert render(marked, [{"role": "user", "content": "\u00e9"}], {"bos_token": "<s>"}) == want
    looped = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}"
    assert render(looped, HELLO * 3, {}) == "x"
    assert render_chat(model, HELLO) == model.tokenizer.encode(render(CHATML, HELLO, {}))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('Only user') }}",
        "{% for %}",
        "{{ messages[7].content }}{{ messages[0].x.y }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_a_template_must_not_do_is_one_line(template):
    with pytest.raises(UserError, match="chat template refuses") as error:
        render(template, HELLO, {})
    assert "\n" not in str(error.value)


def test_models_that_cannot_chat(model):
    with pytest.raises(UserError, match="no chat template"):
        render_chat(dataclasses.replace(model, chat_template=None), HELLO)
    with pytest.raises(UserError, match="no tokenizer"):
        render_chat(dataclasses.replace(model, tokenizer=None), HELLO)


class Terminal:
    """Answers `read` with the script's lines; an exception in it is raised."""

    def __init__(self, *script):
        self.script, self.out = list(script), io.StringIO()

    def read(self, prompt: str) -> str:
        self.out.write(prompt)
        if not self.script:
            raise EOFError
        line = self.script.pop(0)
        if isinstance(line, type):
            raise line
        return line


def talk(model, *script, out=None, **how):
    terminal, prompts = Terminal(*script), []
    terminal.out = out or terminal.out
    encode = model.tokenizer.encode

    class Recording(type(model.tokenizer)):
        def encode(self, text):
            prompts.append(text)
            return encode(text)

    heard = dataclasses.replace(model, tokenizer=Recording())
    chat(heard, GREEDY, read=terminal.read, out=terminal.out, max_new_tokens=6, **how)
    return terminal.out.getvalue(), prompts[1:]  # The first tries the template.


def test_a_conversation_keeps_its_history(model):
    stats = Stats()
    text, prompts = talk(model, "Hi", "", "again", "/reset", "new", "/quit", "no", stats=stats)
    assert len(prompts) == 3
    reply = text.split("> ")[1].rstrip("\n")
    assert prompts[1] == (
        prompts[0] + reply + "<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompts[2] == prompts[0].replace("Hi", "new")
    assert text.startswith("/reset forgets") and "(forgotten)" in text
    assert stats.decode_tokens > 0


def test_a_system_message_survives_a_reset(model):
    _, prompts = talk(model, "a", "/reset", "b", "/help", system="Be brief.")
    assert len(prompts) == 2
    assert all(p.startswith("<|im_start|>system\nBe brief.") for p in prompts)


def test_ctrl_c_stops_a_reply_and_not_the_chat(model):
    class Impatient(io.StringIO):
        pressed = False

        def flush(self):
            if not self.pressed:
                self.pressed = True
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    long = dataclasses.replace(model, eos_ids=())
    text, prompts = talk(long, "Hi", KeyboardInterrupt, "more", "/quit", out=Impatient())
    assert "(stopped)" in text and len(prompts) == 2
    stopped = text.split("> ")[1].split(" (stopped)")[0]
    assert f"assistant\n{stopped}<|im_end|>" in prompts[1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_refused_message_leaves_the_history_as_it_was(model):
    picky = (
        CHATML + "{% if messages[-1]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    )
    text, prompts = talk(dataclasses.replace(model, chat_template=picky), "bad", "good")
    assert "error: the chat template refuses" in text
    assert len(prompts) == 1 and "bad" not in prompts[0]
