"""Changed configs that once failed inside a library, or were taken without a word.

Each with what it is refused with now: (config, its changed fields, a regular expression).
"""

from typing import Any

KEPT: list[tuple[str, dict[str, Any], str]] = [
    # Refused by the config itself.
    (
        "maml_digits",
        {"seed": 10**30},
        r"config\.seed is 10+, but integers go up to 9223372036854775807",
    ),
    (
        "maml_digits",
        {"tasks_per_step": 10**12},
        r"config\.tasks_per_step is 10+, but integers go up to",
    ),
    (
        "maml_digits",
        {"optimizer.learning_rate": float("nan")},
        "config.optimizer.learning_rate is nan",
    ),
    ("maml_digits", {"steps": -1}, "config.steps is -1, but it is 0 or more"),
    ("maml_digits", {"test_tasks": 0}, "config.test_tasks is 0, but it is 1 or more"),
    ("maml_digits", {"eval_every": -1}, "config.eval_every is -1"),
    ("maml_digits", {"checkpoint_every": -1}, "config.checkpoint_every is -1"),
    # A name changed alone, its keys still those of another.
    ("maml_digits", {"dataset.name": "text"}, "The dataset 'text' has no option 'rotations'"),
    (
        "maml_digits",
        {"dataset.name": "sinusoid"},
        "The dataset 'sinusoid' has no option 'rotations'",
    ),
    (
        "maml_sinusoid",
        {"dataset.name": "digits"},
        "The dataset 'digits' needs ways, which this config",
    ),
    (
        "fds_digits",
        {"dataset.name": "optimizer_runs"},
        "The dataset 'optimizer_runs' has no option 'la",
    ),
    ("maml_digits", {"algorithm.name": "fds"}, "The algorithm 'fds' has no option 'learned_rates'"),
    ("fds_digits", {"algorithm.name": "maml"}, "The algorithm 'maml' has no option 'augment'"),
    (
        "learning_rates_shakespeare",
        {"algorithm.name": "maml"},
        "The algorithm 'maml' has no option 'i",
    ),
    ("maml_digits", {"model.name": "mlp"}, "The network 'MLP' has no option 'filters'"),
    (
        "maml_digits",
        {"model.name": "transformer"},
        "The network 'transformer' has no option 'filters'",
    ),
    (
        "maml_sinusoid",
        {"model.name": "conv_net", "model.library": "haiku"},
        "The network 'ConvNet' has",
    ),
    (
        "maml_sinusoid",
        {"model.name": "conv_net", "model.library": "nnx"},
        "The network 'ConvNet' has",
    ),
    (
        "fds_fashion_mnist",
        {"model.name": "transformer"},
        "The network 'transformer' has no option 'convolution'",
    ),
    (
        "maml_digits",
        {"algorithm.optimizer.eps_root": 0.3},
        "The optimizer 'sgd' has no option 'eps_ro",
    ),
    (
        "loss_weights_shakespeare",
        {"optimizer.name": "sgd"},
        "The optimizer 'sgd' has no option 'b2'",
    ),
    (
        "loss_weights_shakespeare",
        {"algorithm.weighting.name": "domain"},
        "'domain' needs domains, whic",
    ),
    # Values that only a library refused, or nobody.
    (
        "maml_digits",
        {"algorithm.adapted": "("},
        r"`MAML\(adapted='\('\)`: it is no regular expression",
    ),
    ("maml_digits", {"optimizer.clip": -1.0}, r"`optimizer\(clip=-1.0\)`: it is a number above 0"),
    ("maml_digits", {"truncation.shortest": 3}, "truncation.shortest=3 is of truncated unrolls,"),
    ("maml_digits", {"model.filters": 0}, r"`ConvNet\(filters=0\)`: it is an integer, 1 or more"),
    ("maml_digits", {"model.library": "haiku", "model.blocks": -1}, r"`ConvNet\(blocks=-1\)`"),
    ("maml_digits", {"model.library": "nnx", "model.filters": -1}, r"`ConvNet\(filters=-1\)`"),
    (
        "maml_sinusoid",
        {"model.hidden": (0,)},
        r"`MLP\(hidden=\(0,\)\)`: a width is an integer, 1 or more",
    ),
    (
        "maml_sinusoid",
        {"model.hidden": ("x_y",), "model.library": "nnx"},
        r"`MLP\(hidden=\('x_y',\)\)`",
    ),
    (
        "maml_sinusoid",
        {"model.hidden": (1.5,), "model.library": "haiku"},
        r"`MLP\(hidden=\(1.5,\)\)`",
    ),
    ("maml_sinusoid", {"dataset.shots": 0}, r"`Sinusoid\(shots=0\)`: it is an integer, 1 or more"),
    ("maml_sinusoid", {"algorithm.objective": "cross_entropy"}, "`cross_entropy` takes logits"),
    (
        "maml_digits",
        {"algorithm.objective": "squared_error"},
        "`squared_error` takes outputs and targe",
    ),
    ("maml_sinusoid", {"wandb.project": "a/b"}, "W&B takes no project called 'a/b'"),
    (
        "fds_digits",
        {"dataset.noise_seed": -1},
        r"`with_label_noise\(seed=-1\)`: it is an integer, 0 or more",
    ),
    ("fds_digits", {"dataset.tfds": "x_y"}, r"TFDS has no dataset called 'x_y' \("),
    ("fds_digits", {"dataset.tfds": ""}, r"TFDS has no dataset called '' \("),
    ("fds_digits", {"algorithm.batch": 0}, r"`FDS\(batch=0\)`: it is an integer, 1 or more"),
    ("fds_digits", {"optimizer.share": -1.0}, r"`fds_rule\(share=-1.0\)`: it is a number above 0"),
    (
        "learned_optimizer_digits",
        {"dataset.most": 0},
        r"`dataset\(most=0\)`: it is an integer, 1 or more",
    ),
    (
        "learned_optimizer_digits",
        {"algorithm.rule.network": "gru"},
        "The network 'gru' has one hidden",
    ),
    (
        "learned_optimizer_digits",
        {"algorithm.rule.hidden": (0,)},
        r"`PointwiseMLP\(hidden=\(0,\)\)`",
    ),
    (
        "learned_optimizer_digits",
        {"algorithm.rule.hidden": ("",)},
        r"`PointwiseMLP\(hidden=\('',\)\)`",
    ),
    (
        "learned_optimizer_digits",
        {"algorithm.batch": 0},
        r"`Supervised\(batch=0\)`: it is an integer, 1 or more",
    ),
    (
        "learned_optimizer_shakespeare",
        {"algorithm.problem": "supervised"},
        r"`Supervised\(batch=None\)`",
    ),
    (
        "learned_optimizer_shakespeare",
        {"algorithm.problem": "supervised", "algorithm.batch": 2},
        "reads r",
    ),
    (
        "loss_weights_shakespeare",
        {"algorithm.weighting.features": ()},
        "reads at least one feature",
    ),
    (
        "loss_weights_shakespeare",
        {"algorithm.weighting.features": ((1, 2),)},
        r"No feature is called \[1",
    ),
    (
        "loss_weights_shakespeare",
        {"algorithm.weighting.hidden": (-1,)},
        r"`ExampleWeights\(hidden=\(-1",
    ),
    (
        "learning_rates_shakespeare",
        {"dataset.corruption.share": 0.3},
        "some are to be clean and some",
    ),
    (
        "learning_rates_shakespeare",
        {"algorithm.optimizer": {"name": "adam", "learning_rate": 0.1}},
        "its inner optimizer has none of its own",
    ),
    ("loss_weights_shakespeare", {"dataset.corruption.seed": -1}, r"`Corruption` got seed=-1"),
    (
        "learning_rates_shakespeare",
        {"dataset.held_out": -1.0},
        "dataset.held_out=-1.0 is the share of",
    ),
    # Sizes and patterns that a library failed on, or never came back from.
    ("maml_digits", {"tasks_per_step": 0}, "An outer step takes at least one task, not 0"),
    ("maml_digits", {"tasks_per_step": 10**9}, "config.tasks_per_step is 1000000000, but integ"),
    ("maml_digits", {"chunk": 0}, "tasks_per_step=2 does not divide into chunks of 0"),
    ("maml_digits", {"mesh.tasks": 0}, r"`mesh\(tasks=0\)`: it is an integer, 1 or more"),
    ("maml_digits", {"mesh.model": 0}, r"`mesh\(model=0\)`: it is an integer, 1 or more"),
    ("maml_digits", {"model.blocks": 10**9}, r"`ConvNet\(blocks=1000000000\)`: it is 1000 at m"),
    (
        "maml_digits",
        {"model.filters": 10**9, "model.blocks": 2},
        "eta has [0-9,]* numbers and takes .* TiB",
    ),
    ("maml_digits", {"algorithm.adapted": "(a+)+$"}, "it repeats a group, which can take longer"),
    ("maml_digits", {"mesh.rules": (("(a+)+$", None),)}, "it repeats a group, which can take"),
    ("maml_digits", {"test_tasks": 10**9}, "config.test_tasks is 1000000000, but integers go up"),
    ("maml_digits", {"engine": "es", "engine_options.pairs": 10**9}, r"`ES\(pairs=1000000000\)`"),
    ("fds_digits", {"dataset.held_out": 1.0}, "dataset.held_out=1.0 is the share of the train"),
    ("fds_digits", {"algorithm.eval_steps": 0}, r"`FDS\(eval_steps=0\)`: it is an integer"),
    ("maml_sinusoid", {"seed": -1}, "config.seed is -1, but it is 0 or more"),
]
