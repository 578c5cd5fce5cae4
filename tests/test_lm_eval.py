"""The lm-eval adapter: the numbers of the harness' own `hf` model on the same weights."""

import json
import math

import numpy as np
import pytest
from goldens import FOLDER
from rollout_model import full_logprobs, ragged_prompts, tiny_model
from support import REPO

from benchmarks.torch_lm_eval import TASKS, folder_with_its_end_token, numbers
from jaxreason import lm_eval as ours
from jaxreason.core.errors import UserError
from jaxreason.eval.likelihood import continuation_logprobs

INCLUDE = str(REPO / "tests/fixtures/lm_eval")


def test_continuations_score_as_the_whole_forward():
    model, texts = tiny_model(), ragged_prompts(9, longest=40)
    pairs = [(t[:1], t[1:] or [4]) if i % 2 else (t, [5, 6]) for i, t in enumerate(texts)]
    best = int(np.argmax(full_logprobs(model, texts[3])[-1]))
    pairs.append((texts[3], [best]))
    got = continuation_logprobs(model, pairs, batch_size=4)
    for (context, continuation), (total, greedy) in zip(pairs, got):
        table = full_logprobs(model, [*context, *continuation])[len(context) - 1 : -1]
        want = table[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(total, want.sum(), atol=1e-4)
        assert greedy == (table.argmax(axis=-1) == continuation).all()
    assert got[-1][1]
    (cut,) = continuation_logprobs(model, [(texts[3], [best])], max_length=5)
    assert cut == continuation_logprobs(model, [(texts[3][-5:], [best])])[0]


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    lm_eval = pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.chdir(REPO)
        yield lm_eval, str(folder_with_its_end_token(folder / "model"))


def test_the_numbers_of_the_hf_model(harness):
    lm_eval, folder = harness
    from lm_eval.tasks import TaskManager

    ours.register()
    results = lm_eval.simple_evaluate(
        model="jaxreason", model_args=f"checkpoint={folder},dtype=float32", batch_size=4,
        tasks=TASKS, task_manager=TaskManager(include_path=INCLUDE), bootstrap_iters=0,
    )  # fmt: skip
    got = json.loads(json.dumps(numbers(results)))
    want = json.loads((FOLDER / "lm_eval_smollm2.json").read_text())
    for task, metrics in want["metrics"].items():
        for name, value in metrics.items():
            assert math.isclose(got["metrics"][task][name], value, rel_tol=1e-4), (task, name)
    for task in ("local_choice", "local_perplexity"):
        for mine, theirs in zip(got["samples"][task], want["samples"][task], strict=True):
            for (a,), (b,) in zip(mine, theirs, strict=True):
                a, b = (x if isinstance(x, list) else [x] for x in (a, b))
                np.testing.assert_allclose(a[0], b[0], rtol=1e-5, atol=2e-4)
                assert a[1:] == b[1:]  # Whether greedy decoding gives it.
    # Half characters at the end are not shown here.
    mine, theirs = (
        [t[0][0].rstrip("\ufffd") for t in x["samples"]["local_generate"]] for x in (got, want)
    )
    assert mine == theirs


def test_the_command_knows_our_models(harness, capsys):
    _, folder = harness
    arguments = ["--model", "jaxreason", "--model_args", f"checkpoint={folder},dtype=float32"]
    arguments += ["--tasks", "local_choice", "--include_path", INCLUDE, "--batch_size", "4"]
    assert ours.main(["run", *arguments]) == 0
    assert "|local_choice|" in capsys.readouterr().out


def test_what_it_cannot_do_is_told_in_a_line(harness, capsys):
    _, folder = harness
    assert ours.main(["run", "--model", "jaxreason", "--tasks", "local_choice", "--include_path",
                      INCLUDE]) == 2  # fmt: skip
    assert "error: --model_args lacks checkpoint" in capsys.readouterr().err
    lm = ours.register()(model=tiny_model())
    for kwargs, says in (
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"max_gen_toks": 5000}, "5000 new tokens"),
    ):
        with pytest.raises(UserError, match=says):
            lm._request(0, "text", {"until": ["x"], **kwargs})
    sampled = lm._request(0, "text", {"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert sampled.sampling.temperature == 0.7 and sampled.sampling.top_p == 0.9
