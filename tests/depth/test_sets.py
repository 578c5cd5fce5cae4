"""Sets of layers that ignore the input: unified, random, by block influence."""

import jax
import numpy as np
import pytest
from depth.models import SCANNED, random_model, rows
from goldens import golden

from jaxreason.core.errors import UserError
from jaxreason.depth.block_influence import block_influence
from jaxreason.depth.evenly import Evenly
from jaxreason.depth.sets import (
    AllLayers,
    BlockInfluence,
    RandomLayers,
    SkipCost,
    Unified,
    choose,
    most_influential,
    random_set,
)
from jaxreason.depth.unified import keep_count, unified_set
from jaxreason.models import decoder

ENDS = (True, False, False, False, False, True)


def test_unified_equals_the_official_code():
    z = golden("unified_layer_skip")
    seen = 0
    for layers, speedup, keep in zip(z["n_layers"], z["speedup"], z["keep"], strict=True):
        got = unified_set(int(layers), keep_count(int(layers), float(speedup)))
        np.testing.assert_array_equal(keep[:layers], np.array(got, int))
        assert (keep[layers:] == -1).all()
        seen += 1
    assert seen == 42


def test_unified_is_a_front_and_the_last_layer_below_a_speedup_of_two():
    kept = [i for i, keep in enumerate(unified_set(32, keep_count(32, 1.5))) if keep]
    assert kept == [*range(20), 31]
    spread = [i for i, keep in enumerate(unified_set(32, keep_count(32, 4))) if keep]
    assert spread == [0, 4, 8, 12, 16, 20, 24, 31]


@pytest.mark.parametrize("kept", [0, 1, 33])
def test_unified_refuses_what_the_official_code_cannot(kept):
    with pytest.raises(UserError, match="cannot keep"):
        unified_set(32, kept)


def test_random_sets_have_their_size_and_follow_the_seed():
    sets = [random_set(6, 4, seed, ENDS) for seed in range(20)]
    assert all(sum(s) == 4 and s[0] and s[-1] for s in sets)
    assert sets == [random_set(6, 4, seed, ENDS) for seed in range(20)]
    assert len(set(sets)) == 6  # All choices of two of the four layers between come up.
    with pytest.raises(UserError):
        random_set(6, 1, 0, ENDS)


def test_block_influence_is_one_minus_the_mean_cosine():
    params, _ = random_model()
    batches = [rows([[1, 2, 3, 4], [5, 6]], [4, 2]), rows([[7, 8, 9, 1], [2]], [4, 1])]
    got = block_influence(
        lambda p, batch, wrap: decoder.forward(p, SCANNED, batch, wrap=wrap), params, batches, 5
    )
    cosines = [[] for _ in range(5)]
    for batch in batches:
        states = jax.jit(
            lambda b: decoder.forward(params, SCANNED, b, capture=tuple(range(6))).captured
        )(batch)
        for layer in range(5):
            for row, t in np.argwhere(np.asarray(batch["segment_ids"]) > 0):
                a, b = (np.asarray(states[i][row, t], np.float64) for i in (layer, layer + 1))
                cosines[layer].append(a @ b / np.sqrt((a @ a) * (b @ b)))
    np.testing.assert_allclose(got, [1 - np.mean(c) for c in cosines], atol=1e-6)
    assert len(cosines[0]) == 11


def test_the_least_influential_layers_are_left_out():
    influence = np.array([0.0, 0.5, 0.1, 0.3, 0.3, 0.0])
    assert most_influential(influence, 4, ENDS) == (True, True, False, True, False, True)
    assert most_influential(influence, 3, (False,) * 6) == (False, True, False, True, True, False)


def test_block_influence_without_text_is_a_user_error():
    with pytest.raises(UserError, match="no token"):
        block_influence(decoder.forward, {}, [], 5)


def test_every_method_gives_its_set():
    asked = []

    def influence(batches):
        asked.append(batches)
        return np.array([0.0, 0.5, 0.1, 0.3, 0.2, 0.4])

    def costs(*args):
        asked.append(args)
        return np.array([np.inf, 0.1, 0.9, -0.2, 0.3, np.inf])

    assert choose(AllLayers(), 6, influence, costs) == (True,) * 6
    assert choose(Unified(kept=3), 6, influence, costs) == (True, False, False, True, False, True)
    assert choose(Evenly(kept=3), 6, influence, costs) == (True, False, False, True, False, True)
    assert choose(RandomLayers(kept=4, seed=3), 6, influence, costs) == random_set(6, 4, 3, ENDS)
    by_influence = (False, True, False, True, False, True)
    assert choose(BlockInfluence(kept=3, batches=7), 6, influence, costs) == by_influence
    by_cost = (True, False, True, False, True, True)
    assert choose(SkipCost(kept=4, batches=3, scope="everywhere"), 6, influence, costs) == by_cost
    assert asked == [7, (3, ENDS, "everywhere")]
    with pytest.raises(UserError, match="kept is 7"):
        choose(BlockInfluence(kept=7), 6, influence, costs)
    with pytest.raises(UserError, match="kept is 1; expected 2"):
        choose(SkipCost(kept=1), 6, influence, costs)
    assert len(asked) == 2  # Refused before the base is run.
    with pytest.raises(UserError, match="batches is 0"):
        SkipCost(kept=4, batches=0).validate()
