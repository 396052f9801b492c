"""What shapes a new LoRA is refused where training goes on from one that is there, whoever's option it is."""

import pytest

import emloc
from emloc.config import PolishConfig, TrainConfig
from emloc.errors import ConfigError
from emloc.extend.plugin_options import with_family_options
from emloc.extend.plugins import family_named
from emloc.options.marks import OfNewLora, marked

OPTIONS = {
    "vlm": {
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "freeze_language_model": True,
    },
    "diffusion": {"lora_conv": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_families_options_are_refused_as_the_cores_are(name, tmp_path):
    family = family_named(name)
    assert (
        marked(with_family_options(TrainConfig, family), OfNewLora).keys() == OPTIONS[name].keys()
    )
    example = family.write_example(tmp_path / "example", seed=0)
    adapter = emloc.train(**example, output_dir=tmp_path / "first", max_steps=1)
    rest = {key: value for key, value in example.items() if key != "model_name_or_path"}
    for option, value in OPTIONS[name].items():
        says = f"train: adapter=.* is continued as it is, but {option} is for a new LoRA"
        with pytest.raises(ConfigError, match=says):
            emloc.train(
                **example,
                adapter=adapter,
                output_dir=tmp_path / "on",
                max_steps=1,
                **{option: value},
            )
        if option in with_family_options(PolishConfig, family).model_fields:
            with pytest.raises(ConfigError, match=f"polish: .* {option} is for a new LoRA"):
                emloc.polish(**rest, adapter=adapter, output_dir=tmp_path / "on", **{option: value})
    assert not (tmp_path / "on").exists()
