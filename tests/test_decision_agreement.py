"""The two sides of `benchmarks.decision_agreement` are asked for the same prompts, and compared."""

import numpy as np

from benchmarks.decision_agreement import compare, prompts_of


def test_prompts_are_what_stands_before_the_first_learned_token():
    tokens = np.array([[5, 6, 7, 8, 9, 10, 11, 0], [1, 2, 3, 4, 12, 13, 14, 15]], np.int32)
    ids = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    # The second row is a conversation: what the user says behind the first reply decides nothing.
    mask = np.array([[1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1, 0]], np.int32)
    batch = {"tokens": tokens, "segment_ids": ids, "prompt_mask": mask}
    assert prompts_of(batch) == [(0, 1, [5, 6]), (0, 2, [8]), (1, 1, [1, 2, 3])]


def test_an_exchanged_layer_is_one_difference():
    trained = [{"prompt": [1], "layers": [0, 1, 3]}, {"prompt": [2], "layers": [0, 2, 3]}]
    found = compare(trained, [[0, 1, 3], [0, 1, 3]])
    assert found == {"prompts": 2, "sets": 2, "same": 1, "most_layers_exchanged": 1}
