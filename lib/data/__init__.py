"""Folders of music → `pairs` of clips, split by song → `latents` on disk."""

from lib.data.latents import LatentPairs, encode_manifest
from lib.data.pairs import Manifest, build_manifest, read_manifest
