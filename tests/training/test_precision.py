"""`trainer.precision=auto` follows from what the processor says, never from a measurement."""

import platform

import pytest
import torch

from recurgolf.training.precision import instructions, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("line", "known"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw", False),
    ],
)
def test_instructions_are_read_word_by_word(tmp_path, line, known):
    told = tmp_path / "cpuinfo"
    told.write_text(f"processor\t: 0\n{line}\nbugs\t: bf16\n")
    assert bool(instructions(told) & {"avx512_bf16", "amx_bf16", "bf16"}) is known


def test_a_system_that_tells_nothing_trains_in_float32(tmp_path):
    assert instructions(tmp_path / "nothing") == set()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 instructions")
def test_auto_is_what_torch_finds_in_the_processor():
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        pytest.skip("this torch does not tell")
    able = capabilities()["avx512_bf16"] or capabilities()["amx_bf16"]
    assert resolve_precision("auto", CPU) == ("bfloat16" if able else "float32")
    assert resolve_precision("float32", CPU) == "float32"
