"""Skip costs against losses of the teacher-forced forward, taken one layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from depth.models import ALL, SCANNED, forced, random_model, rows, static

from jaxreason.core.errors import UserError
from jaxreason.depth.first import FirstConfig
from jaxreason.depth.skip_cost import skip_costs
from jaxreason.models import decoder


def batch_of(tokens: list[list[int]], prompts: list[int]) -> dict:
    batch = rows(tokens, prompts)
    targets = np.roll(np.asarray(batch["tokens"]), -1, axis=1)
    weights = np.zeros(targets.shape, np.float32)
    for i, (row, prompt) in enumerate(zip(tokens, prompts)):
        weights[i, max(prompt - 1, 0) : len(row) - 1] = 1.0
    return batch | {"targets": jnp.asarray(targets), "loss_weights": jnp.asarray(weights)}


def run(params, batch, wrap):
    return decoder.forward(params, SCANNED, batch, wrap=wrap)


@pytest.mark.parametrize("scope", ["decode_only", "everywhere"])
def test_a_cost_is_the_rise_of_the_loss_without_the_layer(scope):
    params, _ = random_model()
    batches = [
        batch_of([[1, 2, 3, 4, 9], [5, 6, 7]], [2, 1]),
        batch_of([[7, 8, 9, 1], [2, 30, 31, 5]], [3, 0]),  # Without a prompt nothing is skipped.
    ]
    cfg = FirstConfig(scope=scope, decision=ALL)

    def loss(keep) -> float:
        total = weight = 0.0
        for batch in batches:
            logits, _ = forced(params, cfg, static(keep), batch)
            logp = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
            nll = -np.take_along_axis(logp, np.asarray(batch["targets"])[..., None], -1)[..., 0]
            w = np.asarray(batch["loss_weights"], np.float64)
            total, weight = total + float((nll * w).sum()), weight + float(w.sum())
        assert weight == 9
        return total / weight

    got = skip_costs(run, params, batches, (True, False, False, False, False), scope=scope)
    others = lambda layer: [i for i in range(5) if i != layer]  # noqa: E731
    want = [loss(others(layer)) - loss(range(5)) for layer in range(1, 5)]
    assert got[0] == np.inf
    np.testing.assert_allclose(got[1:], want, atol=1e-5)
    assert np.ptp(want) > 0.01  # The layers do differ.


def test_without_a_learned_token_there_is_no_cost():
    params, _ = random_model()
    batch = batch_of([[1, 2, 3]], [3])
    nothing = batch | {"loss_weights": jnp.zeros_like(batch["loss_weights"])}
    with pytest.raises(UserError, match="no learned token"):
        skip_costs(run, params, [nothing], (False,) * 5)
