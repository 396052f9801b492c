"""Embeddings in few bits, whatever an architecture makes of its own and calls it."""

import pytest
import torch
from tiny_models import write_tiny
from transformers import AutoModelForCausalLM

import emloc
from emloc_llm.example import write_rows

SIZES = {"format": "quantized", "bits": 8}


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "opt"])
def test_other_architectures(model_type, tmp_path):
    """Scaled embeddings, names without the base model's prefix, a learnt table of positions."""
    write_tiny(tmp_path / "model", model_type)
    data = write_rows(tmp_path / "train.jsonl", 4, 0)
    options = {"model_name_or_path": str(tmp_path / "model"), "dataset": str(data)}
    folder = emloc.compress(output_dir=tmp_path / "e", embedding_bits=8, **SIZES, **options)
    assert emloc.verify(path=folder)["kind"] == "emulator"
    held, base = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)
        for f in (folder, options["model_name_or_path"])
    )
    ids = torch.arange(5, 9)[None]
    with torch.no_grad():
        near, rows = held.get_input_embeddings()(ids), base.get_input_embeddings()(ids)
        assert (near - rows).norm() < 0.03 * rows.norm()
        near, logits = held(ids).logits, base(ids).logits
        assert (near - logits).norm() < 0.15 * logits.norm()
