"""The model, and the law of its instability. Read `cascade` first, top to bottom."""

from lib.model.cascade import Cascade, CascadeConfig, StageConfig, StageTrace
from lib.model.discriminator import Discriminator
from lib.model.fusion import FusionModel, load_model
from lib.model.import_original import import_original_checkpoint
from lib.model.masks import MaskGenerator, MaskingConfig
from lib.model.projection import SpectralLinear, rms_ceiling, spectral_sigma
from lib.model.rms_law import check_collapse
