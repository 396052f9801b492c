"""What a LoRA reads is summed over all runs of its block, before any candidate depends on it."""

from functools import partial

import pytest
import torch
from odd_models import Again, EachTwice, Family, LastTwice, Looping, Plain, real_batches, written

from emloc.correction.limits import CandidateLora, Watched, batch_losses
from emloc.correction.reads import Reads
from emloc.streaming.stream import UnitStream


@pytest.mark.parametrize("kind", [Plain, Again, EachTwice, LastTwice, Looping])
def test_sums_are_those_of_plain_forwards(kind, tmp_path):
    """With the LoRA in its place, on the micro-batches that are summed; later ones add nothing."""
    torch.manual_seed(0)
    model = kind().eval()
    stream = UnitStream(Family(kind), written(model, tmp_path / "base"))
    layers = [f"{block}.{name}" for block in stream.blocks for name in ("up", "down")]
    loras = {}
    for layer in layers:
        d_out, d_in = model.get_submodule(layer).weight.shape
        down, up = torch.randn(2, d_in), torch.randn(d_out, 2) / 4
        loras[layer] = CandidateLora(down, [up, -up], 0.5, None)
    batches, reads = real_batches(), Reads(tmp_path / "sums", layers, calls=2)
    known = []

    def lora_of(layer):
        known.append(reads.crossed(layer))
        return loras[layer]

    losses = batch_losses(
        stream, batches, layers, lora_of, [0, 1], Watched(reads, loras.__getitem__)
    )
    assert all(sums is not None for sums in known)

    for sign, found in zip((1, -1), losses):
        adapted = kind().eval()
        adapted.load_state_dict(model.state_dict())
        sums = dict.fromkeys(layers, 0.0)

        def add(layer, mask, sums, _, inputs):
            x = inputs[0][mask].double()
            sums[layer] = sums[layer] + x.T @ x @ loras[layer].down.T.double()

        with torch.no_grad():
            for layer, lora in loras.items():
                adapted.get_submodule(layer).weight += sign * 0.5 * lora.ups[0] @ lora.down
            for number, batch in enumerate(batches):
                handles = [
                    adapted.get_submodule(layer).register_forward_pre_hook(
                        partial(add, layer, batch["mask"], sums)
                    )
                    for layer in (layers if number < reads.calls else ())
                ]
                expected = adapted(batch["x"]).sum()
                for handle in handles:
                    handle.remove()
                assert found[number].total == pytest.approx(float(expected), rel=1e-4)
        if sign == 1:
            for layer in layers:
                torch.testing.assert_close(
                    reads.crossed(layer).double(), sums[layer], rtol=1e-4, atol=1e-4
                )
