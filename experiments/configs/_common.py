"""The options that packaged configs share; each config sets those of its experiment."""

import ml_collections
from ml_collections.config_dict import placeholder


def maml() -> ml_collections.ConfigDict:
    """Return the options of a run, with MAML as the algorithm."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Or "reverse", or "forward" for a small eta, or "auto": the choice of `metalearn plan`; or
    # an estimate from losses: "es", "pes", "inverse_variance"; or an approximation, "implicit",
    # "truncated" or "sama", whose error `metalearn compare` measures.
    config.engine = "mixed_flow"

    # Options of the engine; see its docstring. An empty text is not set.
    config.engine_options = {
        "remat": placeholder(str),
        "segment": placeholder(int),
        "budget": placeholder(int),
        "peel": placeholder(bool),
        "micro_batches": placeholder(int),
        "store": placeholder(str),
        "true_rules": placeholder(tuple),  # names; see docs/custom_rules.md
        "directions": placeholder(int),
        "chunk": placeholder(int),
        "max_directions": placeholder(int),
        "pairs": placeholder(int),
        "sigma": placeholder(float),
        "solver": placeholder(str),
        "iterations": placeholder(int),
        "tolerance": placeholder(float),
        "damping": placeholder(float),
        "relaxation": placeholder(float),
        "rank": placeholder(int),
        "variables": placeholder(str),
        "stationary": placeholder(float),
        "warm_start": placeholder(bool),
        "last": placeholder(int),
        "finite_difference": placeholder(float),
    }

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "maml"
    config.algorithm.objective = "cross_entropy"
    # The inner optimizer. Adam and its relatives need `eps_root`: 1e-8 against NaN, and more, such
    # as 1e-6, where the meta-gradient predicts too little (docs/smoothness.md).
    config.algorithm.optimizer = {"name": "sgd", "learning_rate": 0.4}
    config.algorithm.optimizer.eps_root = placeholder(float)
    config.algorithm.inner_steps = 1
    config.algorithm.eval_steps = 3
    # Meta-SGD: the initial value of learned rates, which multiply the inner optimizer's
    # update; its own learning_rate should then be 1.
    config.algorithm.learned_rates = placeholder(float)
    config.algorithm.first_order = False
    config.algorithm.adapted = ""  # ANIL: "head"
    config.algorithm.learned = ""  # a pattern of the parameters that are learned; "": all
    config.algorithm.batch_norm = "transductive"

    # Floating-point types of the model's computation and of its parameters, such as "bfloat16"
    # (None: its own), and whether inner and outer optimizer sum their updates in float32.
    config.precision = {
        "compute": placeholder(str),
        "params": placeholder(str),
        "master_weights": False,
    }
    # Low-rank terms of `rank` added to the matrices that match `paths`; None: none. Their
    # parameters are "lora/...", those of the model "base/...".
    config.lora = {"rank": placeholder(int), "paths": "", "scale": 1.0}

    config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"}
    config.optimizer.clip = placeholder(
        float
    )  # the largest norm of a meta-gradient; None: no bound
    # The decay of the average of eta that is learned, such as 0.999; None: the last eta.
    config.optimizer.average = placeholder(float)
    config.tasks_per_step = 16
    # Tasks unrolled at once on a device. None: all of its share, or on a CPU one at a time where
    # all would outgrow its cache.
    config.chunk = placeholder(int)

    # Devices over which tasks are divided (None: as many as divide tasks_per_step), which share
    # the examples of a task's inner batches, over which `rules` shard eta, and which share the
    # tangents of "forward": see build/trainers.py.
    config.mesh = {"tasks": placeholder(int), "data": 1, "model": 1, "tangents": 1, "rules": ()}

    # Truncated unrolls of `steps` inner steps, carried across outer steps up to horizons drawn
    # from `shortest` to the algorithm's own. None: full unrolls. `transform`: of each task's
    # meta-gradient before the mean, such as "optax.scale_by_adam".
    config.truncation = {
        "steps": placeholder(int),
        "shortest": placeholder(int),
        "staggered": True,
        "transform": placeholder(str),
    }

    # Segmented unrolls: inner steps of a program (0: about sqrt(T)), so that an inner run of any
    # length shows its progress, and can be stopped and checkpointed between any two programs (every
    # `checkpoint_within` of them; 0: only when stopped). None: an outer step is one program.
    config.segment = placeholder(int)
    config.checkpoint_within = 0
    # The states between segments that the backward pass reads: at most so many, in so much memory,
    # such as "4GiB" (unset: a quarter of the host's, 0 of the others); docs/replay.md.
    config.replay = {"states": placeholder(int), "device": "", "host": "", "disk": "", "folder": ""}
    config.replay.update({"gradients": ""})  # of inner gradients beside the states: 0 if unset

    config.health = True  # check one meta-gradient before a run; see metalearn.diagnostics.health
    config.check_every = 0  # and again every so many outer steps; 0: never, here and below
    # The response to a non-finite step ("stop", "skip", "back_off" or "pass"), and to inner loops
    # that diverge ("warn", "stop" or "pass"); see metalearn.training.faults.
    config.faults = {"nonfinite": "stop", "most": 5, "shrink": 0.5}
    config.faults.update({"diverged": "warn", "ratio": 10.0, "patience": 3})
    config.isolate = False  # mask non-finite tasks, and count them
    config.checkpoint_keep = 2  # the number of newest checkpoints to keep
    config.checkpoint_best = ""  # keep the best too, by a metric such as "max eval/accuracy"
    config.log_every = 10  # outer steps
    config.eval_tasks = 400  # validation tasks, during training
    config.test_tasks = 1000  # test tasks, once, at the end
    config.wandb = {"mode": "auto", "project": "metalearn", "name": "", "group": ""}
    config.pictures = ()  # drawn and logged at the end; see `Algorithm.pictures`
    return config


def learned_optimizer() -> ml_collections.ConfigDict:
    """Return the options that packaged configs of learned optimizers share."""
    config = maml()
    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "learned_optimizer"
    config.algorithm.problem = "supervised"  # or "streamed", for texts
    config.algorithm.judge = "training"  # or "validation": the outer loss
    config.algorithm.cap = 5.0  # upper bound of a training loss in the outer loss
    config.algorithm.rule = ml_collections.ConfigDict()
    config.algorithm.rule.name = "per_parameter"  # or "tuned": only the base; or "hypergradient"
    config.algorithm.rule.network = "mlp"  # or "gru", of one hidden size
    config.algorithm.rule.hidden = (32, 32)
    config.algorithm.rule.step_scale = 1e-3
    config.algorithm.rule.magnitude_scale = 1e-3
    config.algorithm.rule.preconditioned = False  # the network's term is divided by sqrt(v)
    config.algorithm.rule.base = ml_collections.ConfigDict()  # {}: no base
    config.algorithm.rule.base.name = "adam"
    config.algorithm.rule.base.hyperparameters = {
        "learning_rate": {"low": 1e-5, "high": 1.0, "start": 0.01, "space": "log"},
        "b1": {"low": 0.0, "high": 1.0, "start": 0.9, "space": "logit"},
    }

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "optimizer_runs"
    config.dataset.data_dir = placeholder(str)
    config.dataset.on = "device"  # or "host": see docs/data.md
    config.dataset.most = placeholder(int)  # number of images in a split; None: all
    # Share of the training split, on which `eval_every` and `checkpoint_best` run.
    config.dataset.held_out = 0.2

    config.optimizer.clip = 1.0
    config.eval_every = 0
    return config


def shakespeare() -> ml_collections.ConfigDict:
    """Return the options of a text of TFDS, bytes as tokens, without corruption."""
    dataset = ml_collections.ConfigDict()
    dataset.name = "text"
    dataset.tfds = "tiny_shakespeare"  # or any text of TFDS
    dataset.feature = "text"
    dataset.on = "device"  # or "host": see docs/data.md
    dataset.length = 64  # S
    dataset.batch = 8
    dataset.pieces = 1
    dataset.held_out = 0.1  # share of the training text, for the outer loss
    # True: validation and test runs train on their own split. False: on the training text.
    dataset.fresh = False
    dataset.probes = 0
    dataset.eval_probes = 0
    dataset.corruption = {
        "share": 0.0,
        "kinds": placeholder(tuple),
        "probability": 0.5,
        "seed": 0,
    }
    return dataset


def fds() -> ml_collections.ConfigDict:
    """Return the options that packaged FDS configs share."""
    config = maml()
    config.engine_options.remat = "nested"

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "fds"
    # Arguments set here are fixed; learned ones are in `hyperparameters`.
    config.algorithm.optimizer = {"name": "sgd"}
    config.algorithm.objective = "weighted_cross_entropy"
    config.algorithm.augment = "none"

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "training_run"
    config.dataset.data_dir = placeholder(str)
    config.dataset.on = "device"  # or "host": see docs/data.md
    # Share of the training split, on which `eval_every` and `checkpoint_best` are computed, and
    # which meta-training does not use. The final run trains on it too.
    config.dataset.held_out = 0.1
    config.dataset.label_noise = 0.0
    config.dataset.noise_seed = 0

    # The sign rule of arXiv:2007.07869, with updates reverted if the outer loss rises by more than
    # the tolerance, and shrinking steps. The paper's rule: guarded=False, schedule="constant".
    config.optimizer = {"name": "fds_rule", "share": 0.1, "schedule": "linear"}
    config.optimizer.update({"guarded": True, "tolerance": 0.1})
    # The rule reverts updates after which the inner loop diverges: these are not failures.
    config.faults.update({"nonfinite": "pass", "diverged": "pass"})
    config.tasks_per_step = 1
    config.log_every = 1
    config.eval_every = 0
    # "tangents" computes one more hypergradient, by forward mode; or use `metalearn draw` later.
    config.pictures = ("schedules",)
    return config
