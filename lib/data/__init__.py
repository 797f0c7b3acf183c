"""Folders of music → pairs of clips → latents on disk.

- `pairs`: `build_manifest` checks the files, makes pairs, splits them by song and writes the manifest
- `latents`: `encode_manifest` encodes every clip once, into a checksummed file; `LatentPairs` reads them
"""

from lib.data.latents import LatentPairs, encode_manifest
from lib.data.pairs import Manifest, build_manifest, read_manifest
