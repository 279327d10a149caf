"""The optimizers of optax as inner ones, and what becomes of a meta-gradient through them."""

import pathlib
import re

import optax
from optax import contrib

from metalearn.optimizers import meta_regularized

TABLE = pathlib.Path(__file__).parents[2] / "docs" / "optimizers.md"

FINITE = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "adabelief": optax.adabelief(0.1),
    "yogi": optax.yogi(0.1),
    "lion": optax.lion(0.1),
    "sign_sgd": optax.sign_sgd(0.1),
    "sm3": optax.sm3(0.1),
    "adan": optax.adan(0.1),
    "schedule_free_sgd": contrib.schedule_free_sgd(0.1),
    "meta_regularized": meta_regularized(0.1),
}
# NaN where a gradient is exactly zero; those of the first group take `eps_root`.
ROOTED = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadam": optax.nadam,
    "nadamw": optax.nadamw,
    "amsgrad": optax.amsgrad,
    "lamb": optax.lamb,
    "ademamix": contrib.ademamix,
}
NAN_AT_ZERO = {
    **{name: make(0.1) for name, make in ROOTED.items()},
    "adafactor": optax.adafactor(0.1),
    "prodigy": contrib.prodigy(0.1),
    "dadapt_adamw": contrib.dadapt_adamw(0.1),
    "schedule_free_adamw": contrib.schedule_free_adamw(0.1),
    "adopt": contrib.adopt(0.1),
    "madgrad": contrib.madgrad(0.1),
}
# NaN where a gradient is zero in every entry: they divide by its norm, or take the root of it.
NAN_AT_ALL_ZERO = {
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "clipped_by_block": optax.chain(optax.clip_by_block_rms(0.5), optax.sgd(0.1)),
    "clipped_adaptively": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "trust_ratio": optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.1)),
    "lars": optax.lars(0.1),
    "novograd": optax.novograd(0.1),
    "muon": contrib.muon(0.1),  # of a matrix; what is none goes to its Adam
}
# NaN whatever the gradient: they take a root of how far the loop has come, at first 0, or (radam)
# of a number that is negative in the third step.
NAN = {
    "dog": contrib.dog(0.1),
    "mechanize": contrib.mechanize(optax.sgd(0.1)),
    "radam": optax.radam(0.1),
}
# Their update itself is NaN where a gradient is zero in every entry.
UNDEFINED_AT_ALL_ZERO = {
    "normalized": optax.chain(contrib.normalize(), optax.sgd(0.1)),
}


def documented():
    """Return the rows of the documentation's table: (name, cells)."""
    table = TABLE.read_text().partition("\n## The table\n")[2]
    rows = re.findall(r"^\| `(.+?)` \| (.*) \|$", table, re.MULTILINE)
    return [(name, [cell.strip() for cell in cells.split(" | ")]) for name, cells in rows]
