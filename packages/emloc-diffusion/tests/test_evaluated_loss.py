"""Losses that `emloc evaluate` measures on pictures: on all of them, under noise that the seed decides."""

import pytest

import emloc
from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import RESOLUTION

PROMPT = "a photo of sks square"


def test_every_picture_is_measured(tiny, tmp_path, monkeypatch):
    from emloc_diffusion.samples import Samples

    measured = []
    original = Samples.batch

    def noted(self, chosen, *rest):
        measured.extend(chosen)
        return original(self, chosen, *rest)

    monkeypatch.setattr(Samples, "batch", noted)
    data = str(write_pictures(tmp_path / "p", 5, seed=1))
    scores = emloc.evaluate(
        model_name_or_path=str(tiny.base), dataset=data, instance_prompt=PROMPT,
        resolution=RESOLUTION, num_noise_samples=2,
    )  # fmt: skip
    assert len(set(measured)) == scores["samples"] == 5


def test_the_noise_does_not_depend_on_how_many_are_measured_at_once(tiny, tmp_path):
    data = str(write_pictures(tmp_path / "p", 3, seed=1))

    def loss(size):
        return emloc.evaluate(
            model_name_or_path=str(tiny.base), dataset=data, instance_prompt=PROMPT,
            resolution=RESOLUTION, num_noise_samples=7, per_device_eval_batch_size=size,
        )["loss"]  # fmt: skip

    assert loss(1) == pytest.approx(loss(4), rel=1e-5)
