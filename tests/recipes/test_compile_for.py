"""--compile_for: the very programs of a run, described without data; its errors; its report."""

import dataclasses
import json
import pathlib
import re

import jax
import pytest
from fixtures import tiny, tiny_finetune, tiny_first
from support import run_python

from jaxreason import main
from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.mesh import use_mesh
from jaxreason.data import HfJson, SentencePiece
from jaxreason.depth.decision import Decision
from jaxreason.models.decoder import ModelConfig
from jaxreason.recipes import compile_for, pretrain
from jaxreason.recipes.init import InitConfig
from jaxreason.recipes.program import Program

BASELINE = "--config=tests/fixtures/tiny.py:baseline"


def lowered(program: Program) -> list[str]:
    with use_mesh(program.mesh):
        return [
            program.step_fn(phase).lower(*program.arguments(phase)).as_text()
            for phase in program.phases
        ]


@pytest.mark.parametrize("arm", ["baseline", "linen"])
def test_what_is_compiled_is_what_runs(arm, tmp_path):
    """The same text for both phases, with real batches and with shapes alone."""
    cfg = tiny.get_config(arm)
    data = dataclasses.replace(cfg.data, cache_dir=str(tmp_path))
    cfg = dataclasses.replace(
        cfg, data=data, method=tiny.METHODS["linen" if arm == "linen" else arm]
    )
    built = pretrain.build(cfg)
    described = compile_for.program_for(cfg, jax.devices())
    assert lowered(described) == lowered(built)
    assert [p.name for p in described.phases] == (
        ["let", "next_token"] if arm == "linen" else ["next_token"]
    )
    batch = built.put(built.train_data.batch(0))
    shapes = {k: (v.shape, v.dtype, v.sharding) for k, v in batch.items()}
    wanted = described.arguments(described.phases[0])[2]
    assert shapes == {k: (s.shape, s.dtype, s.sharding) for k, s in wanted.items()}


def test_the_vocabulary_without_data():
    cfg = tiny.get_config("baseline")
    assert pretrain.vocab_of(cfg) == 257

    def with_tokenizer(tokenizer, vocab_size=0):
        model = dataclasses.replace(cfg.model, vocab_size=vocab_size)
        data = dataclasses.replace(cfg.data, tokenizer=tokenizer)
        return dataclasses.replace(cfg, data=data, model=model)

    trained = SentencePiece(train_vocab_size=777)
    assert pretrain.vocab_of(with_tokenizer(trained)) == 777
    assert pretrain.vocab_of(with_tokenizer(HfJson(path="absent"), 4096)) == 4096
    with pytest.raises(UserError, match=r"set --config\.model\.vocab_size=N"):
        pretrain.vocab_of(with_tokenizer(HfJson(path="absent")))


def test_fine_tuning_and_skipping_compile_what_they_run(tmp_path):
    """On 8 devices: the text, the shapes and the shardings of the run with its real arrays."""
    out = run_python(
        pathlib.Path(__file__).parents[1] / "fixtures/described_runs.py", str(tmp_path)
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row[:2] for row in rows] == [
        ["lora", "finetune"], ["full", "finetune"], ["first", "routers"], ["first", "lora"],
        ["layerskip", "lora"],
    ]  # fmt: skip
    for *_, same_text, same_flops, otherwise, cut in rows:
        assert same_text and same_flops and not otherwise and cut > 20


SHAPE = ModelConfig(vocab_size=272, d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, d_ff=64)


def test_without_the_base_its_shape_is_the_config_s():
    """And the line that asks for it; rows are checked as in a run."""
    for cfg in (tiny_finetune.get_config("lora"), tiny_first.get_config("first")):
        shaped = dataclasses.replace(cfg, model=SHAPE, init=InitConfig(path="absent"))
        assert compile_for.program_for(shaped, jax.devices()).model.num_layers == 4
        asked = r"absent.*--config\.init\.path.*--config\.model\.vocab_size"
        for model in (ModelConfig(), ModelConfig(vocab_size=272, remat="full")):
            with pytest.raises(UserError, match=asked):
                compile_for.program_for(dataclasses.replace(shaped, model=model), jax.devices())
        odd = dataclasses.replace(shaped, train=dataclasses.replace(cfg.train, accumulate=3))
        with pytest.raises(UserError, match="data.batch_size 8 is not a multiple"):
            compile_for.program_for(odd, jax.devices())


def test_a_frozen_base_is_read_and_has_no_moments():
    """Bytes of a step by hand; routers alone move no adapters, nothing trained no activations."""
    lora = dataclasses.replace(tiny_finetune.get_config("lora"), model=SHAPE)
    program = compile_for.program_for(lora, jax.devices())
    frozen = program.arguments(program.phases[0])[1]["model"]
    base, adapters = P.count(frozen), P.count(program.specs["lora"])
    kept = 32 + (2 * 4 + 2 * 2) * 8 + 32 + 2 * 64  # By token and layer, written and read.
    bytes_ = 4 * (base + 2 * 3 * adapters) + 2 * 4 * (base - 272 * 32 + adapters)
    bytes_ += 4 * 2 * (8 * 32) * 4 * kept
    assert program.traffic(program.phases[0]) == pytest.approx(bytes_, rel=1e-3)

    first = dataclasses.replace(tiny_first.get_config("first"), model=SHAPE)
    skipping = compile_for.program_for(first, jax.devices())
    routers, adapted = skipping.phases
    fewer = {group: P.count(specs) for group, specs in skipping.specs.items()}
    assert fewer["routers"] == 4 * 33
    moved = (2 * 3 + 2) * 4 * (fewer["lora"] - fewer["routers"])
    gap = skipping.traffic(adapted) - skipping.traffic(routers)
    assert gap == pytest.approx(moved, rel=0.01)
    top = dataclasses.replace(first.method, decision=Decision(rule="top", kept=3))
    ahead = compile_for.program_for(dataclasses.replace(first, method=top), jax.devices())
    extra = ahead.traffic(ahead.phases[1]) - skipping.traffic(adapted)
    assert extra == pytest.approx(4 * (base - 2 * 272 * 32))  # The blocks, once more.

    peer = dataclasses.replace(tiny_first.get_config("influence"), model=SHAPE)
    nothing = compile_for.program_for(peer, jax.devices())
    assert nothing.traffic(nothing.phases[0]) == pytest.approx(
        4 * base + 4 * (base - 272 * 32), abs=100
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--compile_for=tpu:v5:4x4"], "did you mean 'v5"),
        (["--compile_for"], "has no value"),
        (["--json=x.json"], "--json is the report of --compile_for"),
        (["--compile_for=gpu:b200:8"], "jax\\[cuda13\\]|no description of this GPU"),
    ],
)
def test_a_flag_that_does_not_do_is_one_line(flags, says, capsys):
    assert main.main([BASELINE, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(says, error)


def test_a_compiler_that_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setattr(compile_for.importlib.util, "find_spec", lambda name: None)
    assert main.main([BASELINE, "--compile_for=tpu:v5e:4x4"]) == 2
    assert "jaxreason[aot]" in capsys.readouterr().err
    assert main.main([BASELINE, "--compile_for=gpu:h100:8"]) == 2
    assert "jaxreason[cuda]" in capsys.readouterr().err


def test_a_teacher_of_a_shape_leaves_with_its_phase():
    """LET on 8 simulated devices: bytes from shapes are the compiler's, transfers are there."""
    out = run_python(
        """
        import dataclasses, json
        import jax
        from fixtures import tiny, tiny_finetune, tiny_first
        from jaxreason.core.chips import parse_target
        from jaxreason.core.mesh import MeshConfig
        from jaxreason.models.decoder import ModelConfig
        from jaxreason.recipes import compile_for
        from jaxreason.recipes.teacher import TeacherConfig
        from jaxreason.train.aot import shard_bytes

        cfg = tiny.get_config("let")
        shape = ModelConfig(d_model=16, num_layers=1, num_heads=2, d_ff=32, tie_embeddings=True)
        cfg = dataclasses.replace(
            cfg, teacher=TeacherConfig(shape=shape), mesh=MeshConfig(data=2, fsdp=4),
            model=dataclasses.replace(cfg.model, kernels="xla", attention="reference"),
        )
        compile_for.devices_of = lambda target: jax.devices()
        target = parse_target("gpu:h100:8")
        program, phases = compile_for.compile_phases(cfg, target)
        report = compile_for.report(program, target, phases)
        wanted = [shard_bytes(program.arguments(phase)) for phase in program.phases]
        print(json.dumps([report, wanted]))
        """,
        JAXREASON_CPU_FLAGS="0",
    )
    report, wanted = json.loads(out)
    let, after = report["phases"]
    assert [p["phase"] for p in report["phases"]] == ["let", "next_token"]
    # What the step does not read (a batch's ids) is no argument of the program.
    unread = 8 * 32 * 4 * 2 / 8
    for phase, bytes_of_shapes in zip(report["phases"], wanted, strict=True):
        assert 0 <= bytes_of_shapes - phase["memory"]["arguments"] <= 2 * unread
        kinds = {(c["kind"], *c["axes"]) for c in phase["collectives"]}
        assert ("all-gather", "fsdp") in kinds and phase["sent"] > 0
        assert phase["bound"]["mfu"] <= 1 and phase["bound"]["step"] > 0
    left = let["memory"]["arguments"] - after["memory"]["arguments"]
    assert abs(left - report["teacher_bytes"]) <= 2 * unread < report["teacher_bytes"]
    assert let["flops"] > after["flops"] > 0
