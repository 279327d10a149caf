"""From a user's seed to a key: different seeds are different keys.

`jax.random.key` takes the last 32 bits of an integer where JAX has no 64-bit ones, its default:
key(2**32) is key(0), and key(-1) is key(2**32 - 1). Here both halves of a seed count. Below 2**32
the keys are those of `jax.random.key`.
"""

from __future__ import annotations

import jax

from metalearn._utils.checks import is_integer

LARGEST = 2**63 - 1


def key_of(seed: int) -> jax.Array:
    """Return the key () of a seed, from 0 to 2^63 - 1.

    Raises:
      ValueError: for what is no such integer; a boolean is none.
    """
    if not is_integer(seed) or not 0 <= int(seed) <= LARGEST:
        raise ValueError(
            f"seed={seed!s:.80} is no seed: those are integers from 0 to {LARGEST}. Below 0 and "
            "above, two of them would draw the same numbers."
        )
    with jax.enable_x64(True):
        return jax.random.key(int(seed))
