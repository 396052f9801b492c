"""A tiny random ViT and pictures of four colours, for tests."""

import timm
import torch
from PIL import Image
from timm.models import save_for_hf

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
COLOURS = {
    "blue": (40, 60, 230),
    "dark": (20, 20, 20),
    "green": (40, 200, 60),
    "red": (220, 30, 40),
}


def write_example(folder, seed):
    """Write both; returns options that every stage of emloc accepts."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(COLOURS), **SIZES)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name and name.endswith("weight")), 0.2)
    save_for_hf(model, folder / "model", safe_serialization=True)
    for name, colour in COLOURS.items():
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(6):
            noise = torch.randn(40, 36, 3) * 40 + torch.tensor(colour)
            picture = Image.fromarray(noise.clamp(0, 255).byte().numpy())
            picture.save(folder / "pictures" / name / f"{number}.png")
    return {"model_name_or_path": str(folder / "model"), "dataset": str(folder / "pictures")}
