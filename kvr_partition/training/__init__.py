"""Turn searched partitions into a predictor: dataset, ways to predict, regret, export."""

from kvr_partition.training.dataset import Dataset, Row, load_dataset, measured_row
from kvr_partition.training.evaluation import Outcome, evaluate, scores
from kvr_partition.training.predictor import best_method, train
from kvr_partition.training.regressors import REGRESSORS

__all__ = [
    "REGRESSORS",
    "Dataset",
    "Outcome",
    "Row",
    "best_method",
    "evaluate",
    "load_dataset",
    "measured_row",
    "scores",
    "train",
]
