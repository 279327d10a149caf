"""What the packaged MAML configs share; each sets what its experiment is about."""

import ml_collections
from ml_collections.config_dict import placeholder


def maml() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Or "reverse", or "forward" for a small eta, or "auto": what `metalearn plan` would choose; or
    # an estimate from losses: "es", "pes", "inverse_variance".
    config.engine = "mixed_flow"

    # Those of the engine that are set; see its docstring. A text that is empty is not set.
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
    }

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "maml"
    config.algorithm.objective = "cross_entropy"
    # The inner one. Adam and its relatives need `eps_root`, such as 1e-8.
    config.algorithm.optimizer = {"name": "sgd", "learning_rate": 0.4}
    config.algorithm.optimizer.eps_root = placeholder(float)
    config.algorithm.inner_steps = 1
    config.algorithm.eval_steps = 3
    # Meta-SGD: the initial value of learned rates, which multiply the inner optimizer's
    # update; its own learning_rate should then be 1.
    config.algorithm.learned_rates = placeholder(float)
    config.algorithm.first_order = False
    config.algorithm.adapt = ""  # ANIL: "head"
    config.algorithm.batch_norm = "transductive"

    config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"}
    config.optimizer.clip = placeholder(float)  # the largest norm of a meta-gradient; None: any
    config.tasks_per_step = 16
    config.chunk = placeholder(int)  # tasks unrolled at once on a device; None: all it takes

    # Devices: that take tasks (None: as many as tasks_per_step divides by), that eta is cut over by
    # `rules`, and that share the tangents of "forward". See metalearn.experiments.devices.
    config.mesh = {"tasks": placeholder(int), "model": 1, "tangents": 1, "rules": ()}

    # Inner runs that go on from outer step to outer step, `steps` inner steps at a time, up to
    # horizons that are drawn from `shortest` to the algorithm's own. None: whole runs.
    config.truncation = {
        "steps": placeholder(int),
        "shortest": placeholder(int),
        "staggered": True,
    }

    # Of engines that stream ("forward"): inner steps that a program takes, so that an outer step
    # of hours shows how far it is, and can be stopped and checkpointed on its way (every
    # `checkpoint_within` segments; 0: where it is asked to stop). None: one program.
    config.segment = placeholder(int)
    config.checkpoint_within = 0

    config.health = (
        True  # look at one meta-gradient before a run starts; see metalearn.diagnostics.health
    )
    config.check_every = 0  # and again every so many outer steps; 0: never, here and below
    # What to do about a step that is not finite ("stop", "skip", "back_off" or "pass"), and about
    # inner runs that diverge ("warn", "stop" or "pass"); see metalearn.training.faults.
    config.faults = {"nonfinite": "stop", "most": 5, "shrink": 0.5}
    config.faults.update({"diverged": "warn", "ratio": 10.0, "patience": 3})
    config.isolate = False  # leave tasks out of an outer step that are not finite, and count them
    config.checkpoint_keep = 2  # the newest so many
    config.checkpoint_best = ""  # and the best by, such as, "max eval/accuracy"
    config.log_every = 10  # outer steps
    config.eval_tasks = 400  # validation tasks, on the way
    config.test_tasks = 1000  # test tasks, once, at the end
    config.wandb = {"mode": "auto", "project": "metalearn", "name": "", "group": ""}
    config.pictures = ()  # drawn at the end, and logged; see metalearn.experiments.pictures
    return config


def learned_optimizer() -> ml_collections.ConfigDict:
    """What the packaged configs of learned optimizers share."""
    config = maml()
    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "learned_optimizer"
    config.algorithm.problem = "supervised"  # or "streamed", for texts
    config.algorithm.judge = "training"  # or "validation": the outer loss
    config.algorithm.cap = 5.0  # a training loss above counts as this, with no derivative
    config.algorithm.rule = ml_collections.ConfigDict()
    config.algorithm.rule.name = "per_parameter"  # or "tuned": the base alone; "hypergradient"
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
    config.dataset.most = placeholder(int)  # images to train on, of a set of runs; None: all
    # Of the training split: `eval_every` and `checkpoint_best` see runs on these images alone.
    config.dataset.held_out = 0.2

    config.optimizer.clip = 1.0
    config.eval_every = 0
    return config


def shakespeare() -> ml_collections.ConfigDict:
    """A text of TFDS, bytes as tokens, nothing of it corrupted; each config sets its lengths."""
    dataset = ml_collections.ConfigDict()
    dataset.name = "text"
    dataset.tfds = "tiny_shakespeare"  # or any text of TFDS
    dataset.feature = "text"
    dataset.length = 64  # S
    dataset.batch = 8
    dataset.pieces = 1
    dataset.held_out = 0.1  # of a text that is trained on, for the outer loss
    # Validation and test runs train on their own split too. False: on the text of training.
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
    """What the packaged FDS configs share."""
    config = maml()
    config.engine_options.remat = "nested"

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "fds"
    # Any argument given here stays as it is; those that are learned are hyperparameters.
    config.algorithm.optimizer = {"name": "sgd"}
    config.algorithm.objective = "weighted_cross_entropy"
    config.algorithm.augment = "none"

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "training_run"
    config.dataset.data_dir = placeholder(str)
    # Of the training split: `eval_every` and `checkpoint_best` are judged by these examples, which
    # no run that is learned from sees. The final run trains on them too.
    config.dataset.held_out = 0.1
    config.dataset.label_noise = 0.0
    config.dataset.noise_seed = 0

    # The sign rule of arXiv:2007.07869, its moves taken back where the outer loss rose by more
    # than the tolerance, and smaller over time. The paper's: guarded=False, schedule="constant".
    config.optimizer = {"name": "fds_rule", "share": 0.1, "schedule": "linear"}
    config.optimizer.update({"guarded": True, "tolerance": 0.1})
    # A run that explodes is taken back by the rule, and is no failure.
    config.faults.update({"nonfinite": "pass", "diverged": "pass"})
    config.tasks_per_step = 1
    config.log_every = 1
    config.eval_every = 0
    # "tangents" too takes one hypergradient by forward mode; `metalearn draw` does it any time.
    config.pictures = ("schedules",)
    return config
