"""The model that fine-tuning starts from, its day, and what a run on it counts."""

import dataclasses
import datetime
import json
import pathlib
import shutil

import numpy as np
import pytest
from fixtures import tiny_finetune
from tiny_models import LLAMA, write_folder

from jaxreason import config as config_lib
from jaxreason.core.errors import UserError
from jaxreason.data import Example, Examples
from jaxreason.recipes import base as base_lib
from jaxreason.recipes import finetune
from jaxreason.recipes.base import kept_model
from jaxreason.recipes.encode_examples import make_encode
from jaxreason.recipes.open_model import keep_tokenizer
from jaxreason.recipes.pretrain import PretrainConfig

DATED = (
    "{% for m in messages %}{% if loop.first %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
ITEMS = tuple(Example(f"p{i}: ", "yes" if i % 2 else "never", f"e{i}") for i in range(90))


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> pathlib.Path:
    room = tmp_path_factory.mktemp("base")
    write_folder(room / "base")
    shutil.copytree(room / "base", room / "dated")
    (room / "dated/chat_template.jinja").write_text(DATED)
    return room


def config(room: pathlib.Path, base: str, run: str, arm: str = "lora"):
    cfg = tiny_finetune.get_config(arm)
    return dataclasses.replace(
        cfg,
        run=dataclasses.replace(cfg.run, dir=str(room / run)),
        init=dataclasses.replace(cfg.init, path=str(room / base)),
        data=dataclasses.replace(
            cfg.data, chat=base == "dated", seq_len=48, source=Examples(examples=ITEMS)
        ),
    )


def test_a_run_that_goes_on_another_day_has_the_same_examples(room, monkeypatch):
    monkeypatch.setattr(base_lib, "_today", lambda: "2026-02-27")
    cfg = config(room, "dated", "dated_run")
    began = finetune.build(cfg)
    assert began.cfg.base.date == "2026-02-27"
    (note,) = began.notes()
    assert "this run's examples are of 2026-02-27 (base.date)" in note
    prompt = began.pairs.prompts("train", 1)[0]
    assert began.held_out.tokenizer.decode(prompt).startswith("27 Feb 2026")
    config_lib.save(began.cfg, room / "dated_run/config.json")  # As a run that was killed at once.

    monkeypatch.setattr(base_lib, "_today", lambda: "2026-02-28")
    again = finetune.build(cfg)
    assert again.pairs.sha256 == began.pairs.sha256 and again.cfg.base == began.cfg.base
    elsewhere = config(room, "dated", "another")
    assert finetune.build(elsewhere).pairs.sha256 != began.pairs.sha256
    told = dataclasses.replace(elsewhere, base=dataclasses.replace(cfg.base, date="2026-02-27"))
    assert finetune.build(told).pairs.sha256 == began.pairs.sha256

    # A model that was opened from the run is asked for scores as it was trained.
    keep_tokenizer(began.held_out.tokenizer, room / "dated_run/tokenizer", began.files)
    model = kept_model(began.cfg, room / "dated_run")
    encoded = make_encode(model, cfg.data)(ITEMS[0])
    assert began.held_out.tokenizer.decode(encoded.tokens).startswith("27 Feb 2026")


def test_other_templates_have_no_day(room):
    plain = finetune.build(config(room, "base", "plain"))
    assert plain.cfg.base.date == "" and plain.notes() == []
    assert datetime.date.fromisoformat(base_lib._today()) <= datetime.date.today()


def test_a_folder_of_something_else_is_one_line(room):
    folder = room / "other"
    for content, said in (
        (
            config_lib.dump(PretrainConfig()),
            "the run of a PretrainConfig, this config is a F",
        ),
        (json.dumps({"model_type": "llama"}), "a config.json that is not a run's, this conf"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=said) as error:
            finetune.build(config(room, "base", "other"))
        assert "\n" not in str(error.value) and "choose another run.dir" in str(error.value)
        assert (folder / "config.json").read_text() == content


def test_learned_tokens_are_those_of_the_batches(room):
    """Over whole passes exactly; the facts name them for a step and for the run."""
    built = finetune.build(config(room, "base", "new"))
    rows, batch = built.train_data.num_rows, built.cfg.data.batch_size
    steps = np.lcm(rows, batch) // batch
    weights = [float(built.train_data.batch(i)["loss_weights"].sum()) for i in range(steps)]
    facts = built.facts
    assert facts["learned_tokens_per_step"] == pytest.approx(np.mean(weights), abs=0.05)
    assert facts["learned_tokens"] == pytest.approx(20 * np.mean(weights), abs=0.5)
    tokens = sum(int((built.train_data.batch(i)["segment_ids"] > 0).sum()) for i in range(steps))
    assert facts["learned_share"] == pytest.approx(sum(weights) / tokens, abs=1e-4)


def test_flops_are_those_of_every_product(room):
    """Products with frozen weights twice, those of attention and of adapters three times."""
    built = finetune.build(config(room, "base", "new"))
    heads, width, layers, d, ff = 4, 8, 2, 32, 64
    weights = layers * (d * width * (2 * heads + 2 * 2) + 3 * d * ff) + d * LLAMA.vocab_size
    seq_len = built.cfg.data.seq_len
    attention = layers * 2 * heads * width * seq_len / 2  # Multiply-adds: scores, then values.
    adapters = built.facts["params_trained"]
    a_token = 2 * 2 * weights + 3 * 2 * attention + 3 * 2 * adapters
    assert built.model_flops == pytest.approx(a_token * 8 * seq_len, rel=1e-6)
    whole = finetune.build(config(room, "base", "full_new", "full"))
    assert whole.model_flops == pytest.approx(6 * (weights + attention) * 8 * seq_len, rel=1e-6)
