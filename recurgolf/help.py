"""The text of `recurgolf --help`, made from the YAML that is there; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from recurgolf.conf import about, options, parts_of_systems

VERBS = {
    "train": "compose a run, train it, pack it, score the file (the default)",
    "plan": "parameters, visits, FLOPs and predicted bytes, before any training",
    "import": "somebody's checkpoint as a run folder: recurgolf import SYSTEM WEIGHTS CONFIG DEST",
    "evaluate": "score a finished run's file again: recurgolf evaluate FOLDER [eval=sliding]",
    "sample": 'let a finished run write: recurgolf sample FOLDER "How it begins"',
    "export": "a finished run as a folder that runs alone: recurgolf export RUN [RUN2 ...] DEST",
    "pack": "another quantizer on trained weights: recurgolf pack FOLDER DEST quant=gptq_int6",
    "audit": "is a finished run's score allowed and counted right? recurgolf audit FOLDER",
    "compare": "settings over seeds: recurgolf compare FOLDER... [--baseline lora.rank=0]",
    "board": "an HTML page of runs and sweeps: recurgolf board FOLDER... [--out board.html]",
    "resume": "go on with a run that was stopped: recurgolf resume FOLDER",
    "sweep": "run what is missing or failed: recurgolf sweep resume FOLDER; sweep show FOLDER",
    "search": "look for the best settings, by bits per byte and bytes (recurgolf search --help)",
    "control": "a looped run without its loop at equal cost: recurgolf control compare.match=flops",
    "adapters": "save, load, merge or blend adapters (recurgolf adapters --help)",
}

_EXAMPLES = """\
  recurgolf                                        the default, on the CPU, in four minutes
  recurgolf lora.rank=1 looping=cycle              any override of any key
  recurgolf -m lora.rank=1,2 'seed=range(1,4)'     every combination, then a table over seeds
"""


def help_text(folder: Path | None = None) -> str:
    """Verbs, groups with their options, systems with their groups, and three examples.

    Args:
        folder: a user's own, whose options are listed as well.
    """
    systems = parts_of_systems(folder)
    verbs = "\n".join(f"  {name:<10} {text}" for name, text in VERBS.items())
    groups = "\n".join(
        f"  {group:<20} {', '.join(name for name in names if name not in systems)}"
        for group, names in options(folder).items()
        if group != "hydra"
    )
    parts = "\n".join(f"  {name:<28} {', '.join(groups)}" for name, groups in systems.items())
    return (
        "recurgolf: depth-recurrent language models within a byte budget\n\n"
        "usage: recurgolf [VERB] [group=option] [key=value] ...\n\n"
        f"verbs\n{verbs}\n\n"
        f"groups and their options (group=option)\n{groups}\n\n"
        "systems (experiment=system), and the groups of which they have an option of their own "
        f"(group=system)\n{parts}\n\n"
        "every key of an option can be set: group.key=value; a wrong one names the nearest right "
        "one\n\n"
        f"examples\n{_EXAMPLES}\n"
        "flags\n"
        "  --help GROUP        what every option of a group is\n"
        "  -m, --multirun      run every combination of comma-separated values\n"
        "  --config-dir DIR    a folder with YAML of your own (see README)\n"
        "  --cfg job           print the composed configuration and stop\n"
        "  --hydra-help        what else Hydra can do\n"
    )


def group_help(group: str, folder: Path | None = None) -> str:
    """Every option of a group with what its YAML says of it."""
    lines = [f"{group}=OPTION\n"]
    for name in options(folder)[group]:
        lines.append(f"  {name:<28} {about(group, name, folder)}".rstrip())
    return "\n".join(lines)
