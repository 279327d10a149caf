"""What batch normalisation does inside an inner loop, said once and by name.

The most repeated question of the field, and the usual reason why two implementations
of MAML disagree. Three answers are in use:

- "transductive": always normalise by the batch at hand, support and query alike, and
  keep no running statistics. This is what MAML's own code does (Finn et al. 2017,
  arXiv:1703.03400), and most published few-shot numbers: the queries of a task are
  seen together, and help each other. The default. Dropout, if any, stays on with it: a
  network that has dropout wants "running" or "frozen".
- "running": a task starts from the model's initial statistics, updates them on its own
  support set at every inner step, and its queries are normalised by them one by one.
  No information passes between queries. After few steps the running averages are
  young: give the layer a small momentum (0 trusts the last support batch alone). The
  statistics depend on the parameters and so carry a derivative; `flax.nnx.BatchNorm` cuts it
  with a `stop_gradient` of its own, the layers of `metalearn.models` do not.
- "frozen": the model's initial statistics are used throughout and never change. They have
  to come from somewhere: a pre-trained network whose `init` returns them. (Of an untrained
  one they are mean 0 and variance 1; in `hk.BatchNorm` variance 0, and the result NaN.)

`train` in the table is the flag that reaches the network, so dropout follows it too.
"""

from __future__ import annotations

from typing import NamedTuple

from metalearn._utils.checks import pick


class BatchNorm(NamedTuple):
    """How a network is called on the support and on the query set."""

    train_on_support: bool
    train_on_query: bool
    carry_statistics: bool  # from one inner step to the next, and to the query set


POLICIES = {
    "transductive": BatchNorm(train_on_support=True, train_on_query=True, carry_statistics=False),
    "running": BatchNorm(train_on_support=True, train_on_query=False, carry_statistics=True),
    "frozen": BatchNorm(train_on_support=False, train_on_query=False, carry_statistics=False),
}


def batch_norm_policy(name: str) -> BatchNorm:
    """Return the policy of that name; ValueError with the names there are."""
    return pick(POLICIES, name, "batch-normalisation policy")
