"""A teacher whose states come from disk teaches what the teacher itself does."""

import numpy as np
import pytest
from support import REPO

from jaxreason.main import main
from jaxreason.recipes import teacher_cache
from jaxreason.train.log import read_metrics
from jaxreason.train.phase import FrozenModel

TINY = f"--config={REPO}/tests/fixtures/tiny.py"
SHORT = (
    "--config.train.steps=4",
    "--config.train.eval_every=0",
    "--config.checkpoint.every_steps=0",
)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a trained teacher."""
    room = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXREASON_CACHE", str(room / "cache"))
        assert main([f"{TINY}:teacher", *SHORT, f"--config.run.dir={room}/teacher"]) == 0
        yield room


def losses(room, arm: str, name: str, *flags: str) -> list[float]:
    flags = (*SHORT, f"--config.teacher.path={room}/teacher", *flags)
    assert main([f"{TINY}:{arm}", *flags, f"--config.run.dir={room}/{name}"]) == 0
    return [row["total"] for row in read_metrics(room / name) if row["kind"] == "train"]


@pytest.mark.parametrize("arm", ["let", "distill"])
def test_cached_states_teach_the_same_and_are_made_once(arm, room, monkeypatch):
    computed = []
    write = teacher_cache._write
    monkeypatch.setattr(
        teacher_cache, "_write", lambda path, arrays: (computed.append(path), write(path, arrays))
    )
    plain = losses(room, arm, f"{arm}-plain")
    assert not computed
    cache = f"--config.teacher.cache_dir={room}/states-{arm}"
    first = losses(room, arm, f"{arm}-first", cache)
    guided = 2 if arm == "let" else 4  # LET's teacher leaves after half of the steps.
    assert [path.name for path in computed] == [f"{i:08d}.npz" for i in range(guided)]
    np.testing.assert_allclose(first, plain, rtol=1e-5)

    computed[1].write_bytes(computed[1].read_bytes()[:-40])  # Torn: made again.
    del computed[2:]
    second = losses(room, arm, f"{arm}-second", cache)
    assert [path.name for path in computed[2:]] == ["00000001.npz"]
    assert second == first
    # Other rows are other states, and so is another text of the same lengths.
    losses(room, arm, f"{arm}-other", cache, "--config.data.seed=5")
    assert len(computed) == 3 + guided
    text = room / f"text-{arm}"
    text.mkdir()
    for path in sorted((REPO / "tests/fixtures/text").iterdir()):
        (text / path.name).write_bytes(path.read_bytes().replace(b"e", b"o"))
    losses(room, arm, f"{arm}-text", cache, f"--config.data.path={text}")
    assert len(computed) == 3 + 2 * guided


def test_the_same_weights_with_other_settings_are_another_teacher(room):
    params = {"w": np.ones((2, 2), np.float32)}
    model = FrozenModel(lambda: params, lambda p, batch, capture: None)
    folders = {
        teacher_cache.CachedTeacher(
            model, room, captures=(), needs_logits=False, identity=identity, rows=rows
        ).directory
        for identity, rows in [("a", "r"), ("b", "r"), ("a", "s")]
    }
    assert len(folders) == 3
