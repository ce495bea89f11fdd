"""Random generators that depend on their arguments only.

Python's `hash()` of a string changes from process to process, and a generator that is carried
through the run makes every draw depend on all draws before it. Here a draw belongs to a name such
as ("batches", seed, epoch), so a resumed run, another process and another Python version repeat it.
"""

from __future__ import annotations

import hashlib
import random


def seeded(*parts: object) -> random.Random:
    """A generator seeded by the text forms of `parts` (numbers and strings; order matters)."""
    # The lengths keep ("ab", "c") and ("a", "bc") apart.
    texts = [str(part).encode("utf-8", "surrogatepass") for part in parts]
    joined = b"".join(str(len(text)).encode() + b":" + text for text in texts)
    return random.Random(int.from_bytes(hashlib.sha256(joined).digest(), "big"))
