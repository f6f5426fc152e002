"""What ends a run without being anyone's mistake in the request: told in a few lines, exit code 1.

Light on purpose: the command line imports it to know the difference.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from recurgolf.config import RunFailed

if TYPE_CHECKING:
    from recurgolf.settings import TrainerConfig

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate")
_NO_SPACE = ("no space left", "file too large", "quota exceeded", "os error 27", "os error 28")


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that a file could not grow; safetensors tells it in words only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(words in str(error).lower() for words in _NO_SPACE)


def full_disk(path: Path, needed: int, error: BaseException, left: str) -> RunFailed:
    """The message for a file that did not fit.

    Args:
        path: what was being written.
        needed: bytes of it; 0: the error says, or nobody knows.
        left: what can still be used, in words.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    what = f"it needs {needed:,} bytes and its" if needed else "its"
    return RunFailed(
        f"cannot write {path}: {getattr(error, 'strerror', None) or error}; {what} disk has "
        f"{shutil.disk_usage(there).free:,} bytes free (or a quota or a size limit forbids it). "
        f"{left}"
    )


def lacks_compiler(error: BaseException) -> bool:
    """Whether torch.compile found no C++ compiler, or one that does not work."""
    return any(name in str(error) for name in ("InvalidCxxCompiler", "CppCompileError"))


def no_compiler(error: BaseException) -> RunFailed:
    """The message for that, with what needs none."""
    return RunFailed(
        f"trainer.compile=true, and torch.compile cannot compile here: {_first_line(error)}\n"
        "  trainer.compile_backend=aot_eager needs none; trainer.compile=false trains without"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the machine."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


def out_of_memory(error: BaseException, where: str, config: TrainerConfig) -> RunFailed:
    """The message for a step that did not fit, with what to lower.

    Args:
        where: step or phase, in words.
    """
    rows = config.batch_tokens // (config.devices * config.grad_accum * config.seq_len)
    advice = []
    if rows > 1:
        advice.append(
            f"raise trainer.grad_accum={config.grad_accum} (a micro-step has {rows} rows of "
            f"{config.seq_len} tokens; the result stays the same)"
        )
    if not config.activation_checkpointing:
        advice.append("set trainer.activation_checkpointing=true (same result, more time)")
    advice.append(f"lower trainer.batch_tokens={config.batch_tokens} or looping.passes")
    advice.append("let gradients flow through fewer passes (looping.backprop_passes)")
    return RunFailed(
        f"out of memory on {config.device} {where}: {_first_line(error)}\n"
        + "\n".join(f"  {line}" for line in advice)
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
