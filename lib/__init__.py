"""Fuse two clips of music in the latent space of a frozen codec; study why the cascade that does it goes quiet."""

import os

# Set before torch loads OpenMP, and inherited by notebook kernels: threads that wait by spinning take each other's
# cores as soon as another process wants one, and training on busy cores becomes several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
