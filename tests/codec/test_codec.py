"""`load_codec` names its choices."""

import pytest

from lib.codec.codec import CODECS, load_codec
from lib.util.errors import UserError


def test_load_codec_names_its_choices():
    assert load_codec("mdct").name == "mdct"
    with pytest.raises(UserError) as caught:
        load_codec("opus")
    assert all(choice in str(caught.value) for choice in ("opus", *CODECS, "directory"))
