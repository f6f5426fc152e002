"""What a tokenizer does to text before it cuts it, seen from outside.

The challenge's tokenizers normalize by NFKC, which leaves nearly all bytes as they are. A file can
hold any table of replacements, and one that lengthens the text lowers every score per byte of it.
"""

from __future__ import annotations

import string
from pathlib import Path

import sentencepiece

STANDARD = ("identity", "nmt_nfkc")
PROBES = (*string.ascii_letters, *string.digits, *string.punctuation, *"äéñßøçа日本の中한ا")


def normalizer_of(path: Path) -> str:
    """What a tokenizer's file replaces that no standard normalizer does: `'e' becomes 'eeee'`;
    empty where it does nothing of the kind."""
    if path.suffix != ".model":
        return ""
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    standard = [sentencepiece.SentencePieceNormalizer(rule_name=name) for name in STANDARD]
    for probe in PROBES:
        text = f"x{probe}x"
        got = _bare(model.normalize(text))
        if got not in {_bare(one.normalize(text)) for one in standard}:
            return f"{probe!r} becomes {got[1:-1]!r}"
    return ""


def _bare(text: str) -> str:
    """Without the sign for a space that some put in front."""
    return text.replace("\u2581", "")
