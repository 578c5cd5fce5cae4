"""Conversations as text, by a model's own Jinja template, rendered in a sandbox.

A template is text from outside. It gets messages and flags, reaches no Python object beyond them,
and what it raises is one line.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxreason.core.errors import UserError

Message = Mapping[str, Any]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part, which changes no text."""

    tags = {"generation"}

    def parse(self, parser):
        parser.stream.skip(1)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body)


def render_chat(
    model: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """The tokens of a conversation, ready for the model's next reply.

    `messages` have `role` and `content`. The template writes the beginning-of-text token itself
    where the model wants one.

    Raises:
        UserError: the model has no template or no tokenizer, or the template refuses the messages.
    """
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer; a conversation needs one")
    if not model.chat_template:
        raise UserError(
            f"the model {model.name!r} has no chat template; give a plain prompt, or use an "
            "instruction-tuned model"
        )
    text = render(
        model.chat_template, messages, special_tokens(model),
        add_generation_prompt=add_generation_prompt,
    )  # fmt: skip
    return model.tokenizer.encode(text)


def special_tokens(model: Any) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, as the model's tokenizer files name them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            fields = json.loads(model.files.get(name, b"{}"))
        except ValueError:  # Told of where the tokenizer is opened.
            continue
        for key, token in fields.items() if isinstance(fields, dict) else ():
            token = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(token, str):
                found[key] = token
    return found


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """The template, ready to render; a data set renders one thousands of times."""

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def render(
    template: str,
    messages: Sequence[Message],
    tokens: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text of `messages`, as `transformers` renders it.

    Raises:
        UserError: the template fails.
    """

    try:
        return _compiled(template).render(
            messages=list(messages), tools=None, documents=None,
            add_generation_prompt=add_generation_prompt, **tokens,
        )  # fmt: skip
    except Exception as error:  # A template can raise anything.
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the chat template refuses the messages ({line[:300]})") from None
