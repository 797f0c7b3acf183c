import pytest

from lib.codec.mdct import MdctCodec


@pytest.fixture(scope="module")
def codec():
    return MdctCodec()
