"""Teachers of every kind guide a run from the command line, and leave when their phase ends."""

import gc
import json
import pathlib

import jax
import numpy as np
import pytest
from support import REPO

from jaxreason import config
from jaxreason.core.mesh import use_mesh
from jaxreason.main import main
from jaxreason.recipes import pretrain
from jaxreason.recipes.pretrain import PretrainConfig
from jaxreason.train.log import read_metrics

TINY = f"--config={REPO}/tests/fixtures/tiny.py"
SHORT = (
    "--config.train.steps=4",
    "--config.train.eval_every=0",
    "--config.checkpoint.every_steps=0",
)
TEACHER_WIDTH = 24  # of all teachers; no array of the student has such an axis
# Arm: the phases of its four steps, with what the row of a guided step reports.
ARMS = {
    "let": (["let"] * 2 + ["next_token"] * 2, "align_cosine"),
    "linen": (["let"] * 2 + ["next_token"] * 2, "align_cosine"),
    "nnx": (["let"] * 2 + ["next_token"] * 2, "align_cosine"),
    "salt": (["distill"] * 2 + ["next_token"] * 2, "kl"),
    "distill": (["distill"] * 4, "kl"),
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> pathlib.Path:
    """A folder with a trained teacher."""
    room = tmp_path_factory.mktemp("teachers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXREASON_CACHE", str(room / "cache"))
        assert main([f"{TINY}:teacher", *SHORT, f"--config.run.dir={room}/teacher"]) == 0
    return room


@pytest.fixture(autouse=True)
def cache(room, monkeypatch):
    monkeypatch.setenv("JAXREASON_CACHE", str(room / "cache"))


def arguments(room: pathlib.Path, arm: str) -> list[str]:
    own = [] if arm in ("linen", "nnx", "baseline") else [f"--config.teacher.path={room}/teacher"]
    return [f"{TINY}:{arm}", *SHORT, *own]


def teacher_bytes(earlier: set[int]) -> int:
    """Bytes on the devices in arrays of the teacher's width that are not among `earlier` (ids)."""
    arrays = (a for a in jax.live_arrays() if TEACHER_WIDTH in a.shape)
    return sum(a.nbytes for a in arrays if id(a) not in earlier)


@pytest.mark.parametrize("arm", ARMS)
def test_a_teacher_guides_and_leaves(arm, room, monkeypatch):
    phases, metric = ARMS[arm]
    seen, make = [], pretrain.Built.step_fn

    def watched(built, phase):
        step = make(built, phase)

        def call(state, frozen, batch):
            seen.append((phase.name, sorted(frozen), teacher_bytes(earlier)))
            return step(state, frozen, batch)

        return call

    monkeypatch.setattr(pretrain.Built, "step_fn", watched)
    gc.collect()
    # Whatever other tests of this process still hold; it is held here too, so that no id is reused.
    held = jax.live_arrays()
    earlier = {id(array) for array in held}
    assert teacher_bytes(earlier) == 0
    assert main([*arguments(room, arm), f"--config.run.dir={room}/{arm}"]) == 0
    assert [name for name, _, _ in seen] == phases
    facts = json.loads((room / arm / "facts.json").read_text())
    for name, frozen, size in seen:
        # Scales and biases of the teacher have that width too, so it is nearly all there is.
        guided = name != "next_token"
        assert frozen == (["teacher"] if guided else [])
        assert size >= 4 * 0.9 * facts["teacher_params"] if guided else size == 0
    rows = [row for row in read_metrics(room / arm) if row["kind"] == "train"]
    assert [metric in row for row in rows] == [name != "next_token" for name in phases]
    assert all(np.isfinite(row["total"]) and row["skipped"] == 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


def built_and_state(room: pathlib.Path, arm: str, *more: str):
    """The parts of an arm's run, and its first state and batch."""
    recipes = {"pretrain": PretrainConfig}
    command = config.parse([*arguments(room, arm), *more], recipes=recipes)
    built = pretrain.build(command.config)
    return built, built.init_state(), built.put(built.train_data.batch(0))


def test_after_its_phase_the_program_is_the_baseline(room):
    """The second phase of LET and of SALT compiles to what plain next-token training does."""
    texts, flops = {}, {}
    for arm in ("baseline", "let", "salt"):
        built, state, batch = built_and_state(room, arm)
        # Auxiliary state is kept by phase; there is none here, so the trees are the same.
        with use_mesh(built.mesh):
            for phase in built.phases:
                frozen = {name: model.load() for name, model in phase.frozen.items()}
                lowered = built.step_fn(phase).lower(state, frozen, batch)
                texts[arm, phase.name] = lowered.as_text()
                flops[arm, phase.name] = lowered.cost_analysis()["flops"]
                flops[arm, phase.name, "ours"] = built.flops(phase)
    plain = texts["baseline", "next_token"]
    assert texts["let", "next_token"] == plain and texts["salt", "next_token"] == plain
    assert texts["let", "let"] != plain and texts["salt", "distill"] != plain
    for arm, phase in (("let", "let"), ("salt", "distill")):
        teacher = flops[arm, phase, "ours"] - flops["baseline", "next_token", "ours"]
        assert teacher > 0
        more = flops[arm, phase] - flops["baseline", "next_token"]
        # Ours leaves out norms and objectives, and counts half of the attention's square.
        assert more > teacher, f"{arm}: XLA counts {more}, we {teacher}"
        assert arm == "salt" or more < 2 * teacher, f"XLA counts {more}, we {teacher}"


def test_one_step_without_jit(room):
    """What `JAX_DISABLE_JIT=1` gives, to step through with a debugger, is what jit gives."""
    built, _, batch = built_and_state(room, "let", "--config.model.num_layers=1")
    results = []
    for plain in (True, False):
        state = built.init_state()
        frozen = {name: model.load() for name, model in built.phases[0].frozen.items()}
        with use_mesh(built.mesh), jax.disable_jit(plain):
            new, metrics = built.step_fn(built.phases[0])(state, frozen, batch)
        results.append(({k: float(v) for k, v in metrics.items()}, new.params))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), results[0][1], results[1][1]
    )
