"""Models: an adapter for each library, and the networks of the few-shot literature.

The networks live in `linen_networks`, `nnx_networks` and `haiku_networks`, under the
same names: `MLP`, `ConvNet`.
"""

from metalearn.model import Model
from metalearn.models.functions import Functions
from metalearn.models.haiku import Haiku
from metalearn.models.linen import Linen
from metalearn.models.mode import deterministic_flag, no_flag, train_flag
from metalearn.models.nnx import NNX

__all__ = [
    "NNX",
    "Functions",
    "Haiku",
    "Linen",
    "Model",
    "deterministic_flag",
    "no_flag",
    "train_flag",
]
