"""The number of threads torch computes with, inside and after."""

import pytest
import torch

from lib.util.threads import torch_threads


def test_the_number_holds_inside_and_the_one_before_comes_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with torch_threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), torch_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
