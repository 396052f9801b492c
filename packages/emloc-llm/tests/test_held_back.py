"""Samples that training holds back."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.integrations.transformers.held_back import hold_back


class Sample:
    """Equal to no other."""


@given(st.integers(0, 60), st.integers(0, 20), st.integers(0, 3))
def test_every_sample_is_learnt_or_held_back_and_a_fifth_at_most(count, wanted, seed):
    samples = [Sample() for _ in range(count)]
    config = SimpleNamespace(num_held_back_samples=wanted, seed=seed)
    learnt, held_back = hold_back(samples, config)
    assert len(held_back) == min(wanted, count // 5)
    assert learnt == [sample for sample in samples if sample not in held_back]
    assert (learnt, held_back) == hold_back(samples, config)


def test_what_a_mixture_repeats_is_on_one_side_alone():
    samples = [Sample() for _ in range(10)]
    mixed = [*samples[:5], *samples[:5], *samples]
    learnt, held_back = hold_back(mixed, SimpleNamespace(num_held_back_samples=2, seed=1))
    assert len({id(sample) for sample in held_back}) == len(held_back) == 2
    assert not {id(sample) for sample in held_back} & {id(sample) for sample in learnt}


def test_seeds_draw_others():
    samples = [Sample() for _ in range(50)]
    drawn = [
        hold_back(samples, SimpleNamespace(num_held_back_samples=5, seed=seed))[1]
        for seed in range(4)
    ]
    assert any(each != drawn[0] for each in drawn)


def test_streaming_data_cannot_be_held_back(tmp_path):
    import emloc
    from emloc.errors import ConfigError
    from emloc.extend.plugins import family_named

    example = family_named("llm").write_example(tmp_path / "example", seed=0)
    with pytest.raises(ConfigError, match="streaming cannot hold samples back"):
        emloc.train(
            output_dir=tmp_path / "adapter", streaming=True, max_steps=1, num_held_back_samples=2,
            **example,
        )  # fmt: skip


def test_packed_samples_that_are_held_back_have_something_to_tell(tiny, tmp_path):
    """They are scored alone and cut, so those whose prompt fills max_length are not the ones."""
    rows = [{"prompt": "a" * (80 if n % 2 else 10), "completion": "yes"} for n in range(20)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = emloc.train(
        emulator=str(tiny.emulator), dataset=str(data), output_dir=tmp_path / "a", max_steps=1,
        max_length=64, packing=True, num_held_back_samples=2,
    )  # fmt: skip
    summary = Manifest.read(adapter).summary
    assert all(loss > 0 for loss in summary["held_back_loss"])
    assert summary["samples"] == 18
