"""Training: one loop for any model, and what the fusion model adds to it."""

from lib.training.config import TrainConfig
from lib.training.fusion_learner import train
from lib.training.losses import LossConfig, OwnTerm
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer
