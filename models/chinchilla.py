"""A family of language models from 44M to 16B parameters.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (arXiv:2203.15556,
table A9): a vocabulary of 32,000, an MLP four times as wide as the model. It is the family
at which the paper of mixed-mode differentiation measures (arXiv:2505.00793).

Theirs have the relative positions of Transformer-XL, whose extra projection, a matrix of
width x heads * head_dim per layer, rotary positions do without: a model here has 4 to 8%
fewer parameters than its name says, all of them in that projection. Their counts hold one
embedding, so it is tied to the head here.

For a smaller vocabulary, or another attention, replace a field:

>>> import dataclasses
>>> dataclasses.replace(SIZES["44M"], vocabulary=256, remat="block").parameters
25305600
"""

from __future__ import annotations

from metalearn.models.transformer import Architecture


def _size(width: int, heads: int, head_dim: int, layers: int) -> Architecture:
    return Architecture(32_000, width, layers, heads, head_dim=head_dim, tied=True)


SIZES = {
    "44M": _size(512, 8, 64, 8),
    "57M": _size(576, 9, 64, 9),
    "74M": _size(640, 10, 64, 10),
    "106M": _size(640, 10, 64, 16),
    "163M": _size(768, 12, 64, 18),
    "251M": _size(1024, 16, 64, 16),
    "425M": _size(1280, 10, 128, 18),
    "587M": _size(1408, 11, 128, 21),
    "1018M": _size(1792, 14, 128, 23),
    "1593M": _size(2048, 16, 128, 28),
    "2980M": _size(2560, 20, 128, 34),
    "4516M": _size(3072, 24, 128, 36),
    "6796M": _size(3584, 28, 128, 40),
    "9293M": _size(4096, 32, 128, 42),
    "11452M": _size(4352, 32, 128, 47),  # heads * head_dim is less than the width
    "16183M": _size(5120, 40, 128, 47),
}
