"""Shared fixtures: small audio files and folders that the tests write themselves."""

import torch

torch.set_num_threads(1)  # tests run in parallel processes
