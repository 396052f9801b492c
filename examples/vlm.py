"""Fine-tune a vision-language model on its emulator and put the LoRA on the original.

    python examples/vlm.py MODEL TRAIN.jsonl TEST.jsonl OUTPUT_FOLDER

MODEL is a local folder or a hub id; the data sets hold `messages` with image entries, or `image`,
`question` and `answer`.
"""

import sys
from pathlib import Path

import emloc

model, train_data, test_data, output = sys.argv[1:5]
steps = int(sys.argv[5]) if len(sys.argv) > 5 else 300
folder = Path(output)

# 1. A light stand-in of the model. Streams the checkpoint: one block is in memory at a time.
emulator = emloc.compress(
    model_name_or_path=model,
    dataset=train_data,
    output_dir=folder / "emulator",
    bits_per_weight=4.2,
    num_calibration_samples=64,
    max_length=4096,
)

# 2. A LoRA on the stand-in. Any trainer of yours works as well: after `import emloc_vlm`,
#    AutoModelForImageTextToText.from_pretrained(emulator) and peft.get_peft_model are enough.
adapter = emloc.train(
    emulator=emulator,
    dataset=train_data,
    output_dir=folder / "adapter",
    max_steps=steps,
    learning_rate=2e-4,
    lora_r=16,
    lora_alpha=32,
    max_length=4096,
)

# 3. The LoRA, fitted to the original. How far to correct is chosen on calibration samples.
corrected = emloc.correct(
    adapter=adapter,
    emulator=emulator,
    dataset=train_data,
    output_dir=folder / "corrected",
    max_length=4096,
)

# The result is an ordinary PEFT adapter of the original model.
for name, lora in {"base": None, "without correction": adapter, "corrected": corrected}.items():
    scores = emloc.evaluate(
        model_name_or_path=model,
        adapter=None if lora is None else str(lora),
        allow_mismatch=lora == adapter,  # it was made for the emulator, and is scored all the same
        dataset=test_data,
        max_new_tokens=64,
        max_length=4096,
    )
    print(f"{name}: loss {scores['loss']:.4f}, exact match {scores['exact_match']:.1%}")

print("merged model:", emloc.merge(adapter=corrected, output_dir=folder / "merged"))
