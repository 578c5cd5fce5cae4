"""Which fields a run may change when it goes on, and what it takes from a model it starts from."""

import dataclasses

import pytest

from jaxreason import config as config_lib
from jaxreason.core.mesh import MeshConfig
from jaxreason.models.decoder import ModelConfig
from jaxreason.nn.moe import Moe
from jaxreason.recipes import resume
from jaxreason.recipes.init import merge_shape
from jaxreason.recipes.pretrain import PretrainConfig

MOE = Moe(num_experts=4, top_k=2)


@pytest.mark.parametrize(
    ("moe", "bound"),
    [
        (None, []),
        (MOE, ["train.accumulate"]),
        (dataclasses.replace(MOE, capacity_factor=1.5), ["train.accumulate", "mesh.fsdp"]),
    ],
)
def test_a_mesh_is_free_where_it_changes_no_numbers(moe, bound, tmp_path):
    before = PretrainConfig(model=ModelConfig(vocab_size=64, moe=moe))
    config_lib.save(before, tmp_path / "config.json")
    form = moe and dataclasses.replace(moe, form="dense")
    after = dataclasses.replace(
        before,
        model=dataclasses.replace(before.model, moe=form),
        mesh=MeshConfig(fsdp=2),
        train=dataclasses.replace(before.train, accumulate=2),
    )
    differing = [path.removeprefix("config.") for path, *_ in resume.changes(tmp_path, after)]
    assert sorted(differing) == sorted(bound)


def test_experts_keep_the_settings_that_are_asked_for():
    source = ModelConfig(vocab_size=64, moe=MOE)
    wanted = dataclasses.replace(
        source, moe=dataclasses.replace(MOE, form="all_to_all", capacity_factor=1.25, balance=0.5)
    )
    assert merge_shape(wanted, source, "there").moe == wanted.moe
    assert merge_shape(ModelConfig(), source, "there").moe == MOE
