"""recurgolf completion: a script with which a shell completes verbs, groups, options and keys.

The words stand in the script, so that a tab starts no Python: make it again after an upgrade.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from recurgolf.conf import options
from recurgolf.config import ConfigError
from recurgolf.help import VERBS, field_keys
from recurgolf.verbs import parser_of

BASH = """\
_recurgolf() {{
  local line="${{COMP_LINE:0:COMP_POINT}}"
  local word="${{line##* }}"
  # Bash cuts words at =, so an option is completed without what stands in front of it.
  local head=""
  [[ "$word" == *=* ]] && head="${{word%=*}}="
  COMPREPLY=()
  local words={words} found
  while IFS= read -r found; do
    COMPREPLY+=("${{found#"$head"}}")
  done < <(compgen -W "$words" -- "$word")
  [[ ${{#COMPREPLY[@]}} == 1 && "${{COMPREPLY[0]}}" != *= ]] || compopt -o nospace 2>/dev/null
}}
complete -o default -F _recurgolf recurgolf
"""

ZSH = """\
#compdef recurgolf
_recurgolf() {{
  local -a words
  words=({words})
  compadd -S '' -- ${{(M)words:#*=}}
  compadd -- ${{words:#*=}}
  _files
}}
compdef _recurgolf recurgolf
"""

FISH = """\
complete -c recurgolf -a {words}
"""

SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def main(arguments: Sequence[str]) -> int:
    """Print a script for tab completion.

    Add the line of your shell to its start file:

    eval "$(recurgolf completion bash)"      in ~/.bashrc
    eval "$(recurgolf completion zsh)"       in ~/.zshrc, after compinit
    recurgolf completion fish | source       in ~/.config/fish/config.fish
    """
    parser = parser_of("completion", main.__doc__)
    parser.add_argument("shell", help=", ".join(SHELLS))
    parser.add_argument(
        "--config-dir", type=Path, help="a folder with YAML of your own, whose options count too"
    )
    asked = parser.parse_args(arguments)
    if asked.shell not in SHELLS:
        raise ConfigError(f"completion {asked.shell!r}: one of {', '.join(SHELLS)}")
    print(script(asked.shell, words(asked.config_dir)), end="")
    return 0


def words(folder: Path | None = None) -> list[str]:
    """All that may be typed behind `recurgolf`: verbs, flags, `group=option`, `key=`."""
    import recurgolf.run  # noqa: F401 - fills the registry

    found = [*VERBS, "--help", "--version", "--multirun", "--config-dir"]
    for group, names in options(folder).items():
        found += [f"{group}={name}" for name in names]
        dotted = group.replace("/", ".")
        found += [f"{dotted}.{key}=" for key in field_keys(group)]
    return sorted({*found, "seed=", "name="}, key=lambda word: ("=" in word, word))


def script(shell: str, known: Iterable[str]) -> str:
    """The script of a shell for these words."""
    each = " ".join(map(shlex.quote, known))
    return SHELLS[shell].format(words=each if shell == "zsh" else shlex.quote(" ".join(known)))
