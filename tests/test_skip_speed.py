"""What the timing of skipped layers makes of its times: turns, costs with intervals, the line."""

import argparse

import numpy as np
import pytest
from rollout_model import tiny_model

from benchmarks import turns
from benchmarks.skip_speed import CHUNKS, TURN, Bench, costs_of, cpu, fit, passes, spread


def way(log, name, chunks, seconds=lambda i: 1.0, fails_at=None):
    def run(cancel, stats):
        for i in range(chunks):
            if cancel():
                log.append(f"{name} stopped")
                return
            if i == fails_at:
                raise RuntimeError(f"{name} broke")
            log.append(name)
            stats.decode_seconds += seconds(i)

    return run


def test_ways_take_turns_and_every_chunk_is_timed():
    log = []
    found = turns.decode_seconds(
        {
            "a": way(log, "a", 4, lambda i: 1.0 + i),
            "b": way(log, "b", 4, lambda i: 10.0 + i),
            "c": way(log, "c", 2),
        }
    )
    # The first round hands on before anything ran.
    assert sorted(log[:3]) == ["a", "b", "c"] and log == [*"abc", *"abc", *"ab", *"ab"]
    assert found["a"] == [1, 2, 3, 4] and found["b"] == [10, 11, 12, 13] and found["c"] == [1, 1]


def test_an_error_in_one_way_ends_all():
    log = []
    with pytest.raises(RuntimeError, match="b broke"):
        turns.decode_seconds({"a": way(log, "a", 9), "b": way(log, "b", 9, fails_at=2)})
    assert log.count("a") == 3 and log[-1] == "a stopped"


def test_a_cost_is_seen_in_ratios_of_neighbours_through_noise_that_both_share():
    rng = np.random.default_rng(0)
    noise = np.repeat(rng.uniform(1, 3, 50), 4)  # Slower for a while: by a factor for both.
    plain = noise * rng.normal(1, 0.02, 200)
    dearer = 1.03 * noise * rng.normal(1, 0.02, 200)
    pairs = turns.ratios(dearer, plain)
    found = turns.cost([1], [pairs])
    assert found["pairs"] == [200]
    low, high = found["interval"]
    assert 0.02 < low < found["median"] < high < 0.04 and low < 0.03 < high
    # Times that are no neighbours tell less: the same, shuffled, do not show the cost.
    assert turns.cost([1], [turns.ratios(rng.permutation(dearer), plain)])["interval"][0] < 0
    none = turns.cost([1], [turns.ratios(noise * rng.normal(1, 0.02, 200), plain)])["interval"]
    assert none[0] < 0 < none[1]


def test_parts_of_a_whole_are_weighed_by_their_times():
    found = turns.cost([1.0, 3.0], [np.full(5, 1.2), np.full(9, 1.04)])
    assert found["median"] == pytest.approx(0.25 * 0.2 + 0.75 * 0.04)
    assert found["interval"] == pytest.approx([found["median"]] * 2)
    assert found["pairs"] == [5, 9]


@pytest.mark.parametrize("lengths", [(2, 3), (0, 0)])
def test_times_that_are_no_pairs_are_refused(lengths):
    with pytest.raises(ValueError, match=f"^{lengths[0]} and {lengths[1]} times"):
        turns.ratios([1.0] * lengths[0], [1.0] * lengths[1])


def test_the_line_passes_where_times_are_one_and_not_where_they_bend():
    kept = [0, 6, 12, 18, 24, 30]
    line = fit(kept, [2 + 0.5 * k for k in kept])
    assert line["passes"] and line["r2"] == pytest.approx(1)
    assert (line["a_ms"], line["b_ms"]) == (pytest.approx(2), pytest.approx(0.5))
    assert line["off"] == pytest.approx(0, abs=1e-9)
    assert not fit(kept, [2 + 0.02 * k**2 for k in kept])["passes"]  # As a loop over masks.
    # A fixed price of the first layer: the slope is not what layers cost in all.
    assert not fit(kept, [2.0, *(5 + 0.3 * k for k in kept[1:])])["passes"]


def test_sets_are_spread_evenly():
    assert spread(6, 3) == (True, False) * 3 or spread(6, 3) == (False, True) * 3
    assert [sum(spread(30, k)) for k in (0, 6, 30)] == [0, 6, 30]


def times(rng, cost, number=200):
    """A plain way twice and a dearer one, all slowed by the same noise."""
    noise = rng.uniform(1, 2, number)
    ways = {"plain": 1.0, "routers": 1 + cost, "again": 1.0}
    return {n: x * noise * rng.normal(1, 0.005, number) for n, x in ways.items()}


def test_costs_are_found_and_weighed_and_what_is_above_the_bound_does_not_pass():
    rng = np.random.default_rng(0)
    line = fit([0, 1, 2], [1.0, 2.0, 3.0])
    for cost, good in ((0.0, True), (0.015, True), (0.0199, False), (0.03, False)):
        chunks = {n: TURN * v for n, v in times(rng, cost).items()}
        read = {n: 10 * v for n, v in times(rng, 0.001).items()}
        found = costs_of(read, chunks, steps=90)
        assert found["routers_cost_a_step"]["median"] == pytest.approx(cost, abs=1.5e-3)
        assert found["routers_cost_of_the_prompt"]["median"] == pytest.approx(0.001, abs=1.5e-3)
        whole = found["routers_cost_of_the_whole"]
        # The prompt takes as long as 10 of the 90 steps.
        assert whole["median"] == pytest.approx(0.9 * cost + 0.0001, abs=1.5e-3)
        assert abs(found["control_a_step"]["median"]) < 1.5e-3
        dear = found["routers_cost_a_step"]
        assert passes(line, 1, dear) == good
        assert not passes(line, 2, dear) and not passes({"passes": False}, 1, dear)


def test_routed_generation_is_compared_by_as_many_chunks():
    args = argparse.Namespace(prompt=6, new=9, rounds=1, requests=1)
    found = Bench(args, tiny_model(num_layers=2), 2).costs()
    steps = found["turns"]["decode_ms_a_step"]
    assert {n: len(v) for n, v in steps.items()} == dict.fromkeys(
        ("plain", "routers", "again"), CHUNKS - 1
    )
    assert all(x > 0 for v in steps.values() for x in v)
    assert found["routers_cost_of_the_whole"]["pairs"] == [3, CHUNKS - 1]


def test_the_processor_is_noted(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu amx_bf16 avx\n\n")
    assert cpu(str(info)) == {"name": "A CPU", "bfloat16": ["amx_bf16"]}
    assert cpu(str(tmp_path / "none")) == {}
