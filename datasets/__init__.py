"""Distributions over tasks, whose episodes are drawn on the device, and the datasets behind them.

A dataset is read once, on the host, into a `ClassIndex` (uint8 examples ordered by
class); `FewShot` puts it on the device and draws episodes from it inside jit. `Text` does
the same with windows of a text, part of which may be corrupted. `TrainingRuns` splits a whole
dataset, such as one of `read_images`, to learn hyperparameters of training on it. A
`Sinusoid` needs no data. `digits()` works offline, `omniglot()` after it has been prepared;
your own examples become tasks with `FewShot.from_arrays`:

>>> import jax, numpy as np
>>> images, labels = np.zeros([60, 28, 28, 1], np.uint8), np.arange(60) % 6
>>> tasks = FewShot.from_arrays(images, labels, ways=5, shots=1, queries=9)
>>> inputs, labels = tasks.sample(jax.random.key(0)).query
>>> inputs.shape, labels.shape
((45, 28, 28, 1), (45,))

Datasets are TensorFlow Datasets (TFDS), read and prepared without TensorFlow.
Importing this package imports neither: TFDS is loaded when a dataset is first read.
"""

from metalearn.datasets.cifar_few_shot import cifar_fs, fc100
from metalearn.datasets.class_index import ClassIndex, from_labels, rotate, select
from metalearn.datasets.corruption import Corruption
from metalearn.datasets.digits import digits
from metalearn.datasets.few_shot import FewShot
from metalearn.datasets.folders import Folder, image_folder, read_folder
from metalearn.datasets.given import GivenTasks, TaskStream
from metalearn.datasets.host_few_shot import HostFewShot
from metalearn.datasets.host_text import HostText
from metalearn.datasets.host_training_runs import HostHeldOut, HostTrainingRuns
from metalearn.datasets.images import Images, read_images, with_label_noise
from metalearn.datasets.meta_training_runs import MetaTrainingRuns
from metalearn.datasets.mini_imagenet import mini_imagenet
from metalearn.datasets.omniglot import omniglot
from metalearn.datasets.reading import DatasetNotPreparedError, open_source
from metalearn.datasets.synthetic import Quadratics, SideBySide, Sinusoid
from metalearn.datasets.text import BYTES, Text, Tokenizer, read_text
from metalearn.datasets.training_runs import HeldOut, TrainingRuns
from metalearn.datasets.unequal import UnequalFewShot

__all__ = [
    "BYTES",
    "ClassIndex",
    "Corruption",
    "DatasetNotPreparedError",
    "FewShot",
    "Folder",
    "GivenTasks",
    "HeldOut",
    "HostFewShot",
    "HostHeldOut",
    "HostText",
    "HostTrainingRuns",
    "Images",
    "MetaTrainingRuns",
    "Quadratics",
    "SideBySide",
    "Sinusoid",
    "TaskStream",
    "Text",
    "Tokenizer",
    "TrainingRuns",
    "UnequalFewShot",
    "cifar_fs",
    "digits",
    "fc100",
    "from_labels",
    "image_folder",
    "mini_imagenet",
    "omniglot",
    "open_source",
    "read_folder",
    "read_images",
    "read_text",
    "rotate",
    "select",
    "with_label_noise",
]
