"""Every family against transformers: logits, states, bfloat16, packing, padding, re-export."""

import dataclasses
import functools
import json
import pathlib
import struct

import numpy as np
import pytest
from goldens import FOLDER, open_family

from benchmarks import parity
from jaxreason.models import decoder
from jaxreason.models.hf import load_hf, save_hf
from jaxreason.objectives.moe import router_losses

FAMILIES = sorted(folder.name for folder in (FOLDER / "hf").iterdir())


# Kept, since several tests read them, until the last one here is done.
opened = functools.cache(open_family)


@pytest.fixture(scope="module", autouse=True)
def release():
    yield
    opened.cache_clear()


def tensors(folder: pathlib.Path) -> dict[str, tuple]:
    """{name: (dtype, shape, bytes)} of a folder's safetensors, read without our reader."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            if name != "__metadata__":
                first, last = (8 + size + at for at in entry["data_offsets"])
                if name.endswith("embed_positions.weight"):
                    # OPT's positions begin at row 2; nothing real reads the rows before.
                    first += 2 * (last - first) // entry["shape"][0]
                found[name] = entry["dtype"], entry["shape"], raw[first:last]
    return found


def test_every_family_is_here():
    kinds = {
        json.loads((FOLDER / "hf" / f / "config.json").read_text())["model_type"] for f in FAMILIES
    }
    assert kinds == {"llama", "qwen2", "qwen3", "gpt_neox", "opt", "olmoe"} and len(FAMILIES) == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_hidden_state(family):
    model, ref = opened(family)
    found = parity.compare(model, ref)
    assert found["logits"] < 1e-4 and found["hidden"] < 1e-4
    assert found["bf16_ours"] < 1.5 * found["bf16_theirs"]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_left_padded_rows_equal_separate_ones(family):
    model, ref = opened(family)
    rows, (height, width) = parity.kept(ref), ref["tokens"].shape
    packed = parity.batch_of([rows[:1], rows[1:]], width, height=height)
    left = parity.batch_of([[row] for row in rows], width, height=height, left=True)
    for batch in (packed, left):
        ours = parity.forward(model, batch, "float32")
        np.testing.assert_allclose(ours["logits"], ref["logits"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(ours["hidden"], ref["hidden"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_has_the_original_tensors(family, tmp_path):
    model, _ = opened(family)
    source = FOLDER / "hf" / family
    save_hf(model, tmp_path / "out", dtype=parity.stored_dtype(source))
    buffers = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
    original = {n: t for n, t in tensors(source).items() if not n.endswith(buffers)}
    ours = tensors(tmp_path / "out")
    assert ours.keys() == original.keys()
    assert [name for name in original if ours[name] != original[name]] == []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    again = load_hf(tmp_path / "out", dtype="float32")
    explicit = [dataclasses.replace(m.config, head_dim=m.config.head_width) for m in (again, model)]
    assert explicit[0] == explicit[1]
    assert (again.eos_ids, again.bos_id) == (model.eos_ids, model.bos_id)


@pytest.mark.parametrize("family", ["olmoe", "olmoe_norm"])
def test_load_balancing_loss_is_olmoes(family):
    model, ref = opened(family)
    batch = parity.batch_of([[row] for row in parity.kept(ref)], ref["tokens"].shape[1])
    objective = router_losses(model.config.moe)
    outputs = decoder.forward(model.params, model.config, batch)
    terms, _, _ = objective.terms(outputs, None, batch, None, None, 0)
    loss = terms["balance"] / objective.denominators(batch)["balance"]
    np.testing.assert_allclose(loss, ref["aux_loss"], rtol=1e-5)
