"""Models of unusual shape, and a family of them: blocks that run again, in another order, or not at all."""

import json
from functools import partial

import torch
from safetensors.torch import save_file
from torch import nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.extend.family import StoredParameter

WIDTH = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 10)
        self.down = nn.Linear(10, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Plain(nn.Module):
    """Two blocks, one after the other."""

    count = 2

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(self.count))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 300)

    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


class Again(Plain):
    """One block that is called three times in a row, as ALBERT's."""

    count = 1

    def body(self, x):
        return self.blocks[0](self.blocks[0](self.blocks[0](x)))


class Looping(Plain):
    """All blocks in turn, a norm, and all of them once more, as a universal transformer."""

    def body(self, x):
        for _ in range(2):
            x = self.norm(super().body(x))
        return x


class LastTwice(Plain):
    def body(self, x):
        return self.blocks[1](super().body(x))


class EachTwice(Plain):
    """The second block has not been handed over when the first is found to run again."""

    def body(self, x):
        for block in self.blocks:
            x = block(block(x))
        return x


class Backwards(Plain):
    def body(self, x):
        return self.blocks[0](self.blocks[1](x))


class Idle(Plain):
    """A block that no sample needs, as a tower without images."""

    def body(self, x):
        return self.blocks[0](x)


class InsideTwice(Plain):
    """A layer that reads two things inside its block."""

    def body(self, x):
        block = self.blocks[1]
        block.forward = lambda x: block.down(block.up(block.down(block.up(x)).relu()).relu())
        return super().body(x)


class SharedLayer(Plain):
    def __init__(self):
        super().__init__()
        self.blocks[1].up = self.blocks[0].up


class Gated(Plain):
    """Two layers that read the same, except in the last micro-batch."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.gate = nn.Linear(WIDTH, 10)
            block.forward = partial(self.run, block)

    @staticmethod
    def run(block, x):
        other = x if x.shape[1] == 5 else x + 1
        return block.down(block.up(x) * block.gate(other))


class AlwaysGated(Gated):
    @staticmethod
    def run(block, x):
        return block.down(block.up(x) * block.gate(x.clone()))


class TokensFirst(Plain):
    def body(self, x):
        return super().body(x.transpose(0, 1)).transpose(0, 1)


class Prompted(Plain):
    """Learnt tokens in front of the text's."""

    def body(self, x):
        return super().body(torch.cat([torch.ones(x.shape[0], 2, WIDTH), x], 1))[:, 2:]


class Family:
    """What the pass asks of a family, for the models above."""

    def __init__(self, kind, mask=None):
        self.kind, self.mask = kind, mask

    def skeleton(self, checkpoint, dtype):
        with torch.device("meta"):
            return self.kind().eval()

    def stored(self, model, parameter, checkpoint):
        return StoredParameter((parameter,)) if parameter in checkpoint.tensors else None

    def blocks(self, model):
        return [f"blocks.{index}" for index in range(self.kind.count)]

    def token_mask(self, batch, layer=None):
        return batch["mask"] if self.mask is None else self.mask(batch, layer)

    def loss(self, model, batch):
        return model(batch["x"]).sum(), 1


def real_batches():
    draw = torch.Generator().manual_seed(1)
    batches = []
    for lengths in ((5, 3), (4, 4), (1, 4)):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        batches.append({"x": torch.randn(*mask.shape, WIDTH, generator=draw), "mask": mask})
    return batches


REAL = 5 + 3 + 4 + 4 + 1 + 4


def written(model, folder):
    """A model as a checkpoint."""
    folder.mkdir(exist_ok=True)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return Checkpoint.open(folder)
