"""Models: an adapter for each library, the networks of the few-shot literature, a transformer.

The networks are in `linen_networks`, `nnx_networks` and `haiku_networks`, under the same names:
`MLP`, `ConvNet`, `LeNet`, `WideResNet`, `Transformer`. An `Architecture` (`transformer`) defines
what a `Transformer` computes in all three libraries, with a family of sizes; `layouts` has the
sizes and initial values of the image networks.
"""

from metalearn.model import Model
from metalearn.models.adapters import deterministic_flag, no_flag, train_flag
from metalearn.models.attention import BlockedAttention, causal_attention, full_attention
from metalearn.models.equinox import Equinox
from metalearn.models.functions import Functions
from metalearn.models.haiku import Haiku
from metalearn.models.hugging_face import load_hugging_face
from metalearn.models.linen import Linen
from metalearn.models.lora import LoRA
from metalearn.models.nnx import NNX
from metalearn.models.precision import Precision
from metalearn.models.pretrained import Match, Pretrained, Trainable, match, with_params
from metalearn.models.transformer import Architecture

__all__ = [
    "NNX",
    "Architecture",
    "BlockedAttention",
    "Equinox",
    "Functions",
    "Haiku",
    "Linen",
    "LoRA",
    "Match",
    "Model",
    "Precision",
    "Pretrained",
    "Trainable",
    "causal_attention",
    "deterministic_flag",
    "full_attention",
    "load_hugging_face",
    "match",
    "no_flag",
    "train_flag",
    "with_params",
]
