"""Torch's tools: the number of threads, cached tables, and no code run from any file."""

import argparse
import os
import pickle
import random

import pytest
import torch

from lib.util.errors import UserError
from lib.util.tensors import cached_table, safe_torch_load, torch_threads


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with torch_threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), torch_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


def test_a_cached_table_is_computed_once_and_takes_part_in_a_backward_pass():
    calls = []

    @cached_table
    def table(size: int) -> torch.Tensor:
        calls.append(size)
        return torch.ones(size)

    with torch.inference_mode():
        assert table(3) is table(3)
    weight = torch.zeros(3, requires_grad=True)
    (weight * table(3)).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3))
    assert calls == [3]


class Marker:
    """Unpickling it creates a file: proof that code ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_safe_torch_load_reads_plain_values(tmp_path):
    content = {"tensor": torch.arange(3.0), "epoch": 3, "names": ["a", "b"], "none": None, "nested": {"x": (1, 2.5)}}
    torch.save(content, tmp_path / "a.pt")
    loaded = safe_torch_load(tmp_path / "a.pt")
    assert torch.equal(loaded.pop("tensor"), content.pop("tensor"))
    assert loaded == content


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped):
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    torch.save({"epoch": Marker(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.pt: refused, .*run code .*mkdir"):
        safe_torch_load(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file is as dangerous as it looks


def test_a_bare_pickle_with_code_is_refused_and_not_run(tmp_path):
    path, marker = tmp_path / "evil.pkl", tmp_path / "marker"
    path.write_bytes(pickle.dumps(Marker(marker), protocol=2))
    with pytest.raises(UserError, match=r"evil\.pkl: refused"):
        safe_torch_load(path)
    assert not marker.exists()


def test_only_the_allowed_class_is_loaded_and_only_for_that_call(tmp_path):
    path = tmp_path / "args.pt"
    torch.save({"args": argparse.Namespace(lr=1e-4)}, path)
    with pytest.raises(UserError, match=r"refused.*argparse\.Namespace"):
        safe_torch_load(path)
    assert safe_torch_load(path, allowed=(argparse.Namespace,))["args"].lr == 1e-4
    with pytest.raises(UserError, match="refused"):
        safe_torch_load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_raise_user_error_and_nothing_else(tmp_path, zipped):
    """Truncated anywhere, flipped bytes, plain noise: the file is named, whatever the unpickler stumbles on."""
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"a": torch.randn(20), "b": {"c": [1, "x"]}}, good, _use_new_zipfile_serialization=zipped)
    content, rng, refused = good.read_bytes(), random.Random(0), 0
    for attempt in range(300):
        damaged = bytearray(content)
        if attempt % 3 == 0:
            damaged = damaged[: rng.randrange(len(content))]
        elif attempt % 3 == 1:
            for _ in range(3):
                damaged[rng.randrange(len(content))] = rng.randrange(256)
        else:
            damaged = rng.randbytes(rng.randrange(60))
        bad.write_bytes(damaged)
        try:
            safe_torch_load(bad)  # a flipped byte of a tensor's data is a valid file
        except UserError as error:
            refused += str(bad) in str(error)
    assert refused > 150


@pytest.mark.parametrize("content", [b"", b"hello\n", b"RIFF....WAVE"])
def test_other_files_are_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt: .*not a torch checkpoint"):
        safe_torch_load(tmp_path / "x.pt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        safe_torch_load(tmp_path / "none.pt")
    with pytest.raises(UserError, match=str(tmp_path)):
        safe_torch_load(tmp_path)
