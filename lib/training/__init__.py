"""Training: one loop for any model, and what the fusion model adds to it.

- `config`: every setting; `losses`: the objective and its weights, where a loss is added
- `learner`: one training step of any model; `adversary`: the discriminator's side of it
- `fusion_learner`: the fusion model's loss and reports, and `train`
- `batches`: which pairs a step takes, prefetched
- `trainer`: the loop, with validation, checkpoints, resuming and callbacks; `run`: the run directory
- `distributed`: several processes; `nonfinite`: where a NaN appeared first
- `callbacks`: demo clips and TensorBoard; `plots`: figures of a training run
"""

from lib.training.config import TrainConfig
from lib.training.fusion_learner import train
from lib.training.losses import LossConfig
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer
