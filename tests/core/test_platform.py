"""Which CPUs get the flags and bfloat16: those that multiply it in hardware."""

import pytest

from jaxreason.core.platform import cpu_has_bfloat16

ZEN4 = "flags\t\t: fpu vme avx512f avx512dq avx512_bf16 avx512vbmi\n"
SAPPHIRE_RAPIDS = "flags\t\t: fpu vme avx512f avx512_bf16 amx_bf16 amx_tile amx_int8\n"
SKYLAKE = "flags\t\t: fpu vme avx512f avx512dq avx512cd avx512bw avx512vl\n"
AMX_WITHOUT_BF16 = "flags\t\t: fpu amx_tile amx_int8 my_avx512_bf16x\n"


@pytest.mark.parametrize(
    "text, has",
    [(ZEN4, True), (SAPPHIRE_RAPIDS, True), (SKYLAKE, False), (AMX_WITHOUT_BF16, False)],
)
def test_bfloat16_is_read_from_the_flags(tmp_path, monkeypatch, text, has):
    monkeypatch.setattr("sys.platform", "linux")
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{text}")
    assert cpu_has_bfloat16(str(path)) is has


def test_without_the_file_or_linux_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    assert not cpu_has_bfloat16(str(tmp_path / "none"))
    path = tmp_path / "cpuinfo"
    path.write_text(ZEN4)
    monkeypatch.setattr("sys.platform", "darwin")
    assert not cpu_has_bfloat16(str(path))
