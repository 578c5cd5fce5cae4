"""The runs that `benchmarks.maxtext` compiles beside MaxText: its models, batch and remat policy.

    python -m jaxreason.main --config=benchmarks/maxtext_shapes.py:llama2_7b,32,4,full \
        --compile_for=tpu:v5p:2x4x4

The argument is PRESET,CHIPS,SEQUENCES A CHIP,REMAT. Plain next-token prediction with AdamW, rows of
2,048 tokens, everything cut over fsdp: MaxText's own defaults.
"""

import dataclasses

from jaxreason.core.errors import UserError
from jaxreason.data import DataConfig
from jaxreason.models.presets import PRESETS
from jaxreason.recipes.pretrain import PretrainConfig, RunConfig
from jaxreason.train.optim import OptimConfig

VOCABULARY = {"llama2_7b": 32000, "llama_1p4b": 49152}
SEQ_LEN = 2048


def get_config(arg: str = "llama2_7b,32,4,full") -> PretrainConfig:
    """The run of a case."""
    fields = arg.split(",")
    if len(fields) != 4 or fields[0] not in VOCABULARY or not all(map(str.isdigit, fields[1:3])):
        raise UserError(
            f"case {arg!r}; expected PRESET,CHIPS,SEQUENCES,REMAT, as llama2_7b,32,4,full; presets "
            f"here: {', '.join(VOCABULARY)}"
        )
    preset, chips, rows, remat = fields
    return PretrainConfig(
        run=RunConfig(title=f"{preset}, {rows} sequences a chip, remat {remat}"),
        model=dataclasses.replace(PRESETS[preset], vocab_size=VOCABULARY[preset], remat=remat),
        data=DataConfig(seq_len=SEQ_LEN, batch_size=int(chips) * int(rows)),
        optim=OptimConfig(clip_norm=1.0),
        compute_dtype="bfloat16",
    )
