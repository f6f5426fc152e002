"""recurgolf control: the flat control of a looped experiment, as overrides to read and to sweep."""

from __future__ import annotations

from collections.abc import Sequence

from recurgolf.compare.control import KEY, flat_control
from recurgolf.overrides import split_arguments

USAGE = f"""usage: recurgolf control experiment=NAME [key=value ...] [{KEY}=bytes|flops|seconds]

Prints overrides of a run without loop and adapters that has as many bytes (the default) as the
looped one, and with {KEY}=flops or seconds trains for as many FLOPs or seconds too.
The last line is those overrides alone:

    recurgolf -m $(recurgolf control experiment=per_iteration_lora_cpu | tail -1) seed=1,2,3
"""


def main(arguments: Sequence[str]) -> int:
    """Print the flat control of what the overrides compose."""
    from recurgolf.composing import compose

    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    given, folder = split_arguments(arguments, "control")
    match = "bytes"
    overrides = []
    for override in given:
        key, _, value = override.partition("=")
        if key == KEY:
            match = value
        else:
            overrides.append(override)
    control = flat_control(overrides, match, lambda own: compose(own, folder))
    unit = {"flops": "FLOPs of training", "bytes": "bytes, predicted", "seconds": "seconds"}[match]
    print(f"looped   {control.wanted:,.0f} {unit}")
    print(f"control  {control.found:,.0f} {unit}, {control.ratio:.4f} of it")
    print(" ".join(control.overrides))
    return 0
