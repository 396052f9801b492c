"""Stages that stream multiply float32 in float32, and leave torch's settings as they were."""

import pytest
import torch

import emloc
from emloc.machine.exact_products import exact_products
from emloc.streaming import lockstep


def precisions():
    backends = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    return [place.fp32_precision for place in places]


def test_nothing_is_rounded_inside_and_all_is_as_before_afterwards():
    before = precisions()
    assert "tf32" in before  # torch's default, for convolutions
    with pytest.raises(ZeroDivisionError), exact_products():
        assert "tf32" not in precisions()
        assert not torch.backends.cudnn.allow_tf32  # readable by the older name as well
        raise ZeroDivisionError
    assert precisions() == before


def test_what_a_program_has_set_is_left():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert "tf32" not in precisions()
        assert precisions()[0] == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_a_program_has_set_by_the_newer_names_is_left():
    backends = torch.backends
    set_before = backends.cuda.matmul.fp32_precision, backends.cudnn.rnn.fp32_precision
    backends.cuda.matmul.fp32_precision, backends.cudnn.rnn.fp32_precision = "tf32", "ieee"
    try:
        before = precisions()
        with exact_products():
            assert "tf32" not in precisions()
        assert precisions() == before
    finally:
        backends.cuda.matmul.fp32_precision, backends.cudnn.rnn.fp32_precision = set_before


def test_compress_is_exact(toy, tmp_path, monkeypatch):
    seen, advance = [], lockstep._advance

    def watched(*given):
        seen.append(precisions())
        return advance(*given)

    monkeypatch.setattr(lockstep, "_advance", watched)
    emloc.compress(output_dir=tmp_path / "emulator", device="cpu", **toy.example)
    assert seen
    assert all("tf32" not in one for one in seen)
