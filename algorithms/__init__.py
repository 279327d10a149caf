"""Algorithms: what is learned, and what one inner step is."""

from metalearn.algorithms.cavia import CAVIA
from metalearn.algorithms.comln import COMLN
from metalearn.algorithms.data_rater.algorithm import DataRater
from metalearn.algorithms.data_rater.networks import text_rater
from metalearn.algorithms.data_rater.selection import Selection, rate_examples, top_fraction
from metalearn.algorithms.data_weights.algorithm import DataWeights
from metalearn.algorithms.data_weights.attribution import (
    Attribution,
    attribute,
    predicted_changes,
)
from metalearn.algorithms.data_weights.validation import (
    LeaveOut,
    attribution_baselines,
    lds,
    leave_k_out,
)
from metalearn.algorithms.epochs import epochs, read_rows
from metalearn.algorithms.fds.algorithm import FDS
from metalearn.algorithms.fds.augmentation import jitter
from metalearn.algorithms.fds.hyperparameter import Hyperparameter
from metalearn.algorithms.fds.outer_rules import fds_rule, in_ranges, sign_steps, within
from metalearn.algorithms.fds.schedule import Schedule, load_schedules, save_schedules
from metalearn.algorithms.learned_loss import LearnedLoss
from metalearn.algorithms.learned_optimizer.algorithm import LearnedOptimizer
from metalearn.algorithms.learned_optimizer.export import load_optimizer, load_rule, save_optimizer
from metalearn.algorithms.learned_optimizer.features import (
    FactoredMoments,
    Feature,
    Gradient,
    Momenta,
    ParameterScale,
    ParameterValue,
    ReciprocalRoot,
    SecondMoments,
    StepFeatures,
    Tensor,
)
from metalearn.algorithms.learned_optimizer.hypergradient_rule import HypergradientRule
from metalearn.algorithms.learned_optimizer.meta_training import MetaTraining
from metalearn.algorithms.learned_optimizer.mirror_descent import MirrorDescent
from metalearn.algorithms.learned_optimizer.networks import Network, PointwiseGRU, PointwiseMLP
from metalearn.algorithms.learned_optimizer.per_parameter import PerParameter
from metalearn.algorithms.learned_optimizer.problems import (
    Problem,
    Quadratic,
    StepLoss,
    Streamed,
    Supervised,
    Together,
)
from metalearn.algorithms.learned_optimizer.tuned_rule import TunedRule
from metalearn.algorithms.learned_optimizer.update_rule import UpdateRule
from metalearn.algorithms.learning_rates import LearningRates
from metalearn.algorithms.loss_weights.algorithm import LossWeights
from metalearn.algorithms.loss_weights.weighting import (
    DomainWeights,
    ExampleWeights,
    TokenWeights,
    Weighting,
    bounded,
    mean_one,
    unbounded,
)
from metalearn.algorithms.maml import MAML
from metalearn.algorithms.maml_plus_plus import MAMLPlusPlus
from metalearn.algorithms.meta_curvature import MetaCurvature
from metalearn.algorithms.meta_ntk import MetaNTK
from metalearn.algorithms.objectives import (
    cross_entropy,
    squared_error,
    weighted_cross_entropy,
)
from metalearn.algorithms.protonet import ProtoNet
from metalearn.algorithms.r2d2 import R2D2
from metalearn.algorithms.reptile import Reptile
from metalearn.algorithms.sgd import sgd

__all__ = [
    "Attribution",
    "CAVIA",
    "COMLN",
    "DataRater",
    "DataWeights",
    "DomainWeights",
    "ExampleWeights",
    "FDS",
    "FactoredMoments",
    "Feature",
    "Gradient",
    "HypergradientRule",
    "Hyperparameter",
    "LearnedLoss",
    "LearnedOptimizer",
    "LearningRates",
    "LeaveOut",
    "LossWeights",
    "MAML",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaNTK",
    "MetaTraining",
    "MirrorDescent",
    "Momenta",
    "Network",
    "ParameterScale",
    "ParameterValue",
    "PerParameter",
    "PointwiseGRU",
    "PointwiseMLP",
    "Problem",
    "ProtoNet",
    "Quadratic",
    "R2D2",
    "ReciprocalRoot",
    "Reptile",
    "Schedule",
    "SecondMoments",
    "Selection",
    "StepFeatures",
    "StepLoss",
    "Streamed",
    "Supervised",
    "Tensor",
    "Together",
    "TokenWeights",
    "TunedRule",
    "UpdateRule",
    "Weighting",
    "attribute",
    "attribution_baselines",
    "bounded",
    "cross_entropy",
    "epochs",
    "fds_rule",
    "in_ranges",
    "jitter",
    "lds",
    "leave_k_out",
    "load_optimizer",
    "load_rule",
    "load_schedules",
    "mean_one",
    "predicted_changes",
    "rate_examples",
    "read_rows",
    "save_optimizer",
    "save_schedules",
    "sgd",
    "sign_steps",
    "squared_error",
    "text_rater",
    "top_fraction",
    "unbounded",
    "weighted_cross_entropy",
    "within",
]
