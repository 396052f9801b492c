"""Models and data of the reproduction, made once.

    python tools/reproduce/prepare.py smollm2 --out SMOLLM2
    python tools/reproduce/prepare.py smollm2-off-grid --out SMOLLM2
    python tools/reproduce/prepare.py mathqa --source FOLDER --out data/mathqa
    python tools/reproduce/prepare.py text --source wiki.valid.raw --out data/text.jsonl
    python tools/reproduce/prepare.py easy-vqa --out data/easy_vqa
    python tools/reproduce/prepare.py internvl
    python tools/reproduce/prepare.py small-internvl

Each prints the path of what it made. MathQA's FOLDER holds `dev.json` and `test.json`, lists of `Problem`,
`options`, `Rationale` and `correct`; dev becomes the training file, as the test set is not to be looked at.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from emloc.artefacts.small_files import write_text

SPLITS = {"train": "dev.json", "test": "test.json"}


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(COMMANDS))
    parser.add_argument("--source", type=Path, help="what is read")
    parser.add_argument("--out", type=Path, help="where it goes")
    options = parser.parse_args()
    print(COMMANDS[options.what](options.source, options.out))


def smollm2(source: Path | None, out: Path | None) -> Path:
    """SmolLM2-135M-Instruct as the LLM demo has it, in bfloat16: what QLoRA is compared with is 16 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emloc_llm.demo.model import smollm2

    assert out is not None
    found = smollm2()
    AutoModelForCausalLM.from_pretrained(found, dtype=torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(found).save_pretrained(out)
    return out


def smollm2_off_grid(source: Path | None, out: Path | None) -> Path:
    """The same function with other weights, in float32.

    SmolLM2's weights come out of a 4-bit file, so a grid of 4 bits in groups of 32 gives them back exactly,
    as it does of no other model. Here each block's norm weights are folded into the layers that read them,
    and every channel between `v_proj` and `o_proj`, and between `up_proj` and `down_proj`, is scaled by
    exp(0.3 · normal), seed 0, and back.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emloc_llm.demo.model import smollm2

    assert out is not None
    place = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    text = "Natalia sold clips to 48 of her friends, and then she sold half as many in May."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        _off_the_grid(model)
        changed = float((model(ids).logits - before).abs().max() / before.abs().max())
    if changed > 1e-5:
        raise SystemExit(f"error: the logits changed by {changed:.1e} of their largest value")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _off_the_grid(model: Any) -> None:
    import torch

    draw = torch.Generator().manual_seed(0)
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for reader in readers:
                reader.weight.mul_(norm.weight)
            norm.weight.fill_(1)
        scales = torch.exp(0.3 * torch.randn(attention.v_proj.out_features, generator=draw))
        attention.v_proj.weight.div_(scales[:, None])
        by_head = scales.view(model.config.num_key_value_heads, -1)  # each serves several queries
        attention.o_proj.weight.mul_(by_head.repeat_interleave(heads, 0).flatten())
        scales = torch.exp(0.3 * torch.randn(mlp.up_proj.out_features, generator=draw))
        mlp.up_proj.weight.div_(scales[:, None])
        mlp.down_proj.weight.mul_(scales)


def internvl(source: Path | None, out: Path | None) -> Path:
    """The VLM demo's InternVL with more blocks in its language model, so that blocks can be left out."""
    from emloc_vlm.demo.base import Recipe, trained_base
    from emloc_vlm.demo.small_internvl import Shape

    return trained_base(Recipe(shape=Shape(layers=8)))


def small_internvl(source: Path | None, out: Path | None) -> Path:
    """A smaller one, with about the parameters that EMLoC holds of the other at keep_ratio 0.5."""
    from emloc_vlm.demo.base import Recipe, trained_base
    from emloc_vlm.demo.small_internvl import Shape

    return trained_base(Recipe(shape=Shape(vision_width=80, width=96, layers=6)))


def mathqa(source: Path | None, out: Path | None) -> Path:
    """MathQA's lists as JSONL of `prompt` and `completion`, the answer's letter at the end."""
    assert source is not None
    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    for split, name in SPLITS.items():
        entries = json.loads((source / name).read_text("utf-8"))
        rows = [json.dumps(mathqa_row(entry), ensure_ascii=False) for entry in entries]
        write_text(out / f"{split}.jsonl", "\n".join(rows) + "\n")
    return out


def mathqa_row(entry: dict[str, str]) -> dict[str, str]:
    """One problem: the question with its options, and the rationale closed by `#### letter`."""
    options = re.split(r"\s*,\s*(?=[b-e] \) )", entry["options"].strip())
    shown = "\n".join(re.sub(r"^([a-e]) \) ", r"\1) ", option) for option in options)
    prompt = f"{entry['Problem'].strip()}\n{shown}\nReason, then give the letter after ####."
    rationale = entry["Rationale"].strip().strip('"').strip()
    return {"prompt": prompt, "completion": f"{rationale}\n#### {entry['correct'].strip()}"}


def text(source: Path | None, out: Path | None) -> Path:
    """Plain text as JSONL of `text`, a paragraph of at least 200 characters per row."""
    assert source is not None
    assert out is not None
    paragraphs = (line.strip() for line in source.read_text("utf-8").splitlines())
    rows = [
        json.dumps({"text": line}, ensure_ascii=False) for line in paragraphs if len(line) >= 200
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(rows) + "\n")
    return out


def easy_vqa(source: Path | None, out: Path | None) -> Path:
    """Questions about colour, which the VLM demo's base has never been asked; train and test pictures."""
    from emloc.demos.easy_vqa import easy_vqa, questions, write_table

    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        chosen = [q for q in questions(easy_vqa(), split) if q.names_a_color]
        write_table(out / f"{split}.jsonl", chosen, easy_vqa())
        shutil.copytree(easy_vqa() / split / "images", out / split / "images", dirs_exist_ok=True)
    return out


COMMANDS = {
    "smollm2": smollm2,
    "smollm2-off-grid": smollm2_off_grid,
    "internvl": internvl,
    "small-internvl": small_internvl,
    "mathqa": mathqa,
    "text": text,
    "easy-vqa": easy_vqa,
}

if __name__ == "__main__":
    main()
