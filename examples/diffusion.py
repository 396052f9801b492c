"""Teach a diffusion pipeline a subject on its emulator and put the LoRA on the original.

    python examples/diffusion.py PIPELINE PICTURES "a photo of sks dog" OUTPUT_FOLDER

PIPELINE is a folder of diffusers or a hub id (Stable Diffusion 1, 2, XL or 3, FLUX.1); PICTURES is a
folder of 3 to 6 pictures of the subject, which the prompt names by a rare word.
"""

import sys
from pathlib import Path

import emloc

model, pictures, prompt, output = sys.argv[1:5]
steps = int(sys.argv[5]) if len(sys.argv) > 5 else 400
resolution = int(sys.argv[6]) if len(sys.argv) > 6 else 512
folder = Path(output)
data = {"instance_data_dir": pictures, "instance_prompt": prompt, "resolution": resolution}

# 1. A light stand-in of the denoiser; the other models of the pipeline are carried along.
emulator = emloc.compress(
    model_name_or_path=model,
    output_dir=folder / "emulator",
    bits_per_weight=4.2,
    num_calibration_samples=64,  # noises and timesteps, over the pictures in turn
    calibration_batch_size=4,
    **data,
)

# 2. A LoRA on the stand-in. Any trainer of yours works as well: after `import emloc_diffusion`,
#    DiffusionPipeline.from_pretrained(emulator) and unet.add_adapter are enough.
adapter = emloc.train(
    emulator=emulator,
    output_dir=folder / "adapter",
    max_train_steps=steps,
    train_batch_size=1,
    learning_rate=1e-4,
    lora_r=16,
    lora_alpha=16,
    **data,
)

# 3. The LoRA, fitted to the original. How far to correct is chosen by the denoising loss.
corrected = emloc.correct(
    adapter=adapter, emulator=emulator, output_dir=folder / "corrected", **data
)

# The result holds pytorch_lora_weights.safetensors for pipe.load_lora_weights, kohya's file for other
# programs (of UNets), and PEFT's.
for name, lora in {"base": None, "without correction": adapter, "corrected": corrected}.items():
    scores = emloc.evaluate(
        model_name_or_path=model,
        adapter=None if lora is None else str(lora),
        allow_mismatch=lora == adapter,  # it was made for the emulator, and is scored all the same
        **data,
    )
    print(f"{name}: denoising loss {scores['loss']:.4f}")

print("merged pipeline:", emloc.merge(adapter=corrected, output_dir=folder / "merged"))
