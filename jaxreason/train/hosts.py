"""Agreement between the hosts of a run: one looks, all learn the answer or raise its error."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxreason.core.errors import UserError


def on_first_host(look: Callable[[], Any]) -> Any:
    """Calls `look` on the first host and returns its result on every host.

    Called by all hosts at the same place; it synchronises them through their devices.

    Args:
      look: returns something that JSON can carry.

    Raises:
      UserError: `look` raised it on the first host; every host raises the same line.
    """
    if jax.process_count() == 1:
        return look()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": look()}
        except UserError as e:
            answer = {"error": str(e)}
    answer = _broadcast(answer)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def any_host(flag: bool) -> bool:
    """Returns whether `flag` is set on at least one host; called by all at the same place."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def _broadcast(answer: dict[str, Any]) -> dict[str, Any]:
    data = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    # The size is rounded up, so that few shapes are compiled; spaces after JSON are harmless.
    padded = np.full(1 << max(size - 1, 1).bit_length(), ord(" "), np.uint8)
    if jax.process_index() == 0:
        padded[: data.size] = data
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)).decode())
