"""Tools that every package uses and that know nothing of audio or models.

- `errors`: `UserError`, for everything a user can put right
- `configs`: checks of a config's fields, reading a config back, and what differs between two
- `files`: atomic writes, JSON read with errors that name the fix, prefetch
- `tensors`: torch's threads, cached tables, weights loaded without running code
- `signals`: stops requested by signals
- `stats`: medians, standard errors clustered by song, paired comparisons
- `provenance`: `code_fingerprint`, the hash of the code by which everything cached is keyed
"""

from lib.util.errors import UserError
