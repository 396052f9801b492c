"""Going on from an adapter, asked of a family that begins every training with a new LoRA."""

import pytest

import emloc
from emloc.adapters.going_on import OPTIONS, lora_options
from emloc.artefacts.adapter import Adapter
from emloc.errors import ConfigError
from emloc.options.lora import LoraOptions


def test_such_a_family_refuses_it(toy, tmp_path):
    place = {"output_dir": tmp_path / "adapter"}
    adapter = str(toy.stages["corrected"])
    data = {name: value for name, value in toy.example.items() if name != "model_name_or_path"}
    with pytest.raises(ConfigError, match="starts every training with a new LoRA and cannot"):
        emloc.polish(adapter=adapter, **data, **place)
    message = "starts with a new LoRA and trains on all samples; leave adapter out"
    with pytest.raises(ConfigError, match=message):
        emloc.train(adapter=adapter, **toy.example, **place)
    with pytest.raises(ConfigError, match="leave num_held_back_samples out"):
        emloc.train(num_held_back_samples=2, **toy.example, **place)
    assert not list(tmp_path.iterdir())


def test_every_option_that_an_adapter_answers_is_one_of_a_new_lora(toy):
    answered = lora_options(Adapter.open(str(toy.stages["adapter"])))
    assert answered.keys() <= OPTIONS <= LoraOptions.model_fields.keys()
