"""Parsers of the families' own: visual rows and benchmarks, processors, schedulers, pictures, benches."""

import json
import math
from types import SimpleNamespace

import torch
from PIL import Image

from emloc.artefacts.json_files import read_json
from emloc_baselines.bench.config import read_config
from emloc_baselines.bench.records import read_records
from emloc_diffusion.companions import companions
from emloc_diffusion.data.images import load_pictures, open_picture
from emloc_diffusion.objective import objective_of
from emloc_diffusion.scoring.prompts import own_prompts
from emloc_vlm.encode import collate
from emloc_vlm.internvl_chat import added_tokens, native_config
from emloc_vlm.processor import load_processor
from emloc_vlm.rows import load_examples
from fuzzing.examples import Examples, document
from fuzzing.of_data import OPTIONS
from fuzzing.parser import Parser

VISUAL = {
    **OPTIONS,
    "image_folder": None,
    "on_bad_image": "stop",
    "max_length": 512,
    "max_dynamic_patch": None,
}
IMAGE = "a.png"
ENTRIES = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "Colour?"}]
VISUAL_ROWS = {
    "messages": {"messages": [{"role": "user", "content": ENTRIES}, {"role": "assistant", "content": "red"}]},
    "conversations": {
        "image": IMAGE,
        "conversations": [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}],
    },
    "table": {"image": IMAGE, "question": "Colour?", "answer": ["red", "crimson"], "kind": "open",
              "options": {"A": "red", "B": "blue"}},
}  # fmt: skip
RAD = {"qid": 1, "image_name": IMAGE, "question": "Is it axial?", "answer": "Yes", "answer_type": "CLOSED",
       "question_type": "PLANE"}  # fmt: skip
CUISINE = {
    "qa_id": "20", "lang": "en", "multi_choice_prompt": "What is it?\n1. Okpa\n2. Moin moin\n\nAn id.",
    "open_ended_prompt": "What is it?", "image_url": "https://x.org/a/b.jpg?d", "answer": "Moin moin",
    "multi_choice_answer": 2, "task": "t",
}  # fmt: skip
CUISINE_LISTS = {"question": "What?", "options": ["Okpa", "Moin moin"], "mcq_answer_index": 1,
                 "answer": "Moin moin", "image_path": IMAGE}  # fmt: skip
WEBSRC = {
    "id": "mo040009941265",
    "question": "q?",
    "answer": "yes",
    "element_id": "-1",
    "image": IMAGE,
}
PMC = [["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"],
       [IMAGE, "What is it?", "Focal", " A:Diffuse", " B:Focal", " C:None", " D:Other", "B"]]  # fmt: skip
QUESTIONS = {
    "data_subtype": "val",
    "questions": [{"question_id": 1, "image_id": 1, "question": "q?"}],
}
ANNOTATIONS = {
    "annotations": [{"question_id": 1, "answers": [{"answer": "yes"}], "answer_type": "yes/no"}]
}


TOKEN_FILES = ("added_tokens.json", "tokenizer.json", "tokenizer_config.json")


def parsers(examples: Examples) -> list[Parser]:
    """All of them."""
    processor = load_processor(examples.model("vlm"))
    return [
        *(_visual(examples, processor, name, row) for name, row in VISUAL_ROWS.items()),
        _meta(examples), *_benchmarks(examples), _processor(examples), _original(examples),
        *(_added_tokens(examples, file) for file in TOKEN_FILES),
        _scheduler(examples), *(_companion(examples, part) for part in ("vae", "text_encoder")),
        _picture(examples), _caption(examples), _prompts(examples), _bench(examples), _records(examples),
    ]  # fmt: skip


def _picture_folder(examples, name):
    folder = examples.empty(name)
    Image.new("RGB", (16, 16), "#d02020").save(folder / IMAGE)
    return folder


def _visual(examples, processor, name, row):
    def read(folder):
        options = SimpleNamespace(**VISUAL)
        rows = load_examples(options, str(folder / "rows.jsonl"))
        return rows, collate(rows[:2], processor, options)

    def means(folder, result):
        rows, batch = result
        lines = [line for line in (folder / "rows.jsonl").read_bytes().split(b"\n") if line.strip()]
        assert len(rows) == len(lines)
        for example in rows:
            entries = [part for turn in example.messages for part in turn.get("content") or []]
            assert len(example.images) == sum(part["type"] == "image" for part in entries)
            for image in example.images:
                inside = not hasattr(image.source, "resolve")
                assert inside or image.source.resolve().is_relative_to(folder.resolve())
        assert ((batch["labels"] == -100) | (batch["labels"] == batch["input_ids"])).all()

    folder = _picture_folder(examples, f"visual {name}")
    return Parser(f"visual: {name}", folder, "rows.jsonl", "jsonl", [[row, row]], read, means, 8)


def _meta(examples):
    folder = _picture_folder(examples, "meta")
    (folder / "rows.jsonl").write_text(json.dumps(VISUAL_ROWS["conversations"]) + "\n")
    seed = {"a set": {"root": ".", "annotation": "rows.jsonl", "repeat_time": 2, "length": 1}}

    def read(folder):
        return load_examples(SimpleNamespace(**VISUAL), str(folder / "meta.json"))

    def means(folder, rows):
        entries = document(folder / "meta.json").values()
        times = sum(math.floor(entry.get("repeat_time", 1)) for entry in entries)
        assert times <= len(rows) <= times + len(entries)

    return Parser("visual: meta file", folder, "meta.json", "json", [seed], read, means, 3)


def _benchmarks(examples):
    def read(file):
        return lambda folder: load_examples(SimpleNamespace(**VISUAL), str(folder / file))

    def means(folder, rows):
        for example in rows:
            assert example.references
            assert all(isinstance(one, str) for one in example.references)
            if example.metric in ("multiple_choice",):
                assert example.references[0] in example.options

    made = [
        ("VQA-RAD", "rad.json", "json", [[RAD, RAD]]),
        ("WorldCuisines", "cuisine.jsonl", "jsonl", [[CUISINE], [CUISINE_LISTS]]),
        ("WebSRC", "src.jsonl", "jsonl", [[WEBSRC]]),
        ("PMC-VQA", "pmc.csv", "csv", [PMC]),
        ("VQA v2", "v2_questions.json", "json", [QUESTIONS]),
        ("VQA v2 answers", "v2_annotations.json", "json", [ANNOTATIONS]),
    ]
    for name, file, form, seeds in made:
        folder = _picture_folder(examples, name)
        (folder / "v2_questions.json").write_text(json.dumps(QUESTIONS))
        (folder / "v2_annotations.json").write_text(json.dumps(ANNOTATIONS))
        yield Parser(name, folder, file, form, seeds, read(file), means, 3)


def _processor(examples):
    folder = examples.copy(examples.model("vlm"), "processor")
    rows = _picture_folder(examples, "processed")
    (rows / "rows.jsonl").write_text(json.dumps(VISUAL_ROWS["messages"]) + "\n")

    def read(folder):
        options = SimpleNamespace(**VISUAL)
        processor = load_processor(folder)
        return collate(load_examples(options, str(rows / "rows.jsonl")), processor, options)

    def means(folder, batch):
        assert batch["input_ids"].shape == batch["labels"].shape
        assert batch["pixel_values"].ndim == 4

    name = "processor_config.json"
    return Parser("processor", folder, name, "json", [document(folder / name)], read, means, 15)


def _original(examples):
    """OpenGVLab's configuration of an InternVL."""
    llm = {
        "model_type": "qwen2", "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 6,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 50, "rope_theta": 5000.0,
        "hidden_act": "silu", "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3, "num_hidden_layers": 3,
        "image_size": 12, "patch_size": 3, "layer_norm_eps": 1e-6, "norm_type": "layer_norm",
        "qk_normalization": False, "qkv_bias": True,
    }  # fmt: skip
    seed = {
        "model_type": "internvl_chat", "ps_version": "v2", "downsample_ratio": 0.5, "select_layer": -1,
        "force_image_size": 12, "torch_dtype": "bfloat16", "dynamic_image_size": True,
        "use_thumbnail": True, "max_dynamic_patch": 12, "llm_config": llm, "vision_config": vision,
    }  # fmt: skip

    def read(folder):
        return native_config(read_json(folder / "config.json"), 45)

    def means(folder, config):
        written = document(folder / "config.json")
        text = config["text_config"]
        for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
            assert text.get(key) == written["llm_config"].get(key)
        assert config["image_seq_length"] >= 1
        side = config["vision_config"]["image_size"][0]
        assert isinstance(side, int)
        assert side > 0

    folder = examples.empty("original")
    return Parser("original InternVL", folder, "config.json", "json", [seed], read, means)


def _added_tokens(examples, file):
    """The ids of tokens that were added to a vocabulary."""
    token = {"content": "<IMG_CONTEXT>", "id": 45, "special": True}
    seeds = {
        "added_tokens.json": {"<IMG_CONTEXT>": 45, "<img>": 46},
        "tokenizer.json": {"version": "1.0", "added_tokens": [token]},
        "tokenizer_config.json": {"added_tokens_decoder": {"45": token}},
    }

    def means(folder, ids):
        assert all(isinstance(name, str) and 0 <= index < 2**32 for name, index in ids.items())

    folder = examples.empty(f"added {file}")
    return Parser(f"added tokens: {file}", folder, file, "json", [seeds[file]], added_tokens, means)


def _scheduler(examples):
    folder = examples.copy(examples.model("diffusion"), "scheduler")
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
            "use_dynamic_shifting": False}  # fmt: skip

    def read(folder):
        objective = objective_of(folder)
        return objective.draw(torch.ones(2, 4, 3, 3), torch.Generator().manual_seed(0))

    def means(folder, noised):
        for tensor in (noised.sample, noised.target, noised.timestep):
            assert tensor.isfinite().all()
        assert (noised.timestep >= 0).all()

    name = "scheduler/scheduler_config.json"
    seeds = [document(folder / name), flow]
    return Parser("scheduler", folder, name, "json", seeds, read, means, 3)


def _companion(examples, part):
    """Another model of a pipeline, as the planner knows it: by its configuration."""
    folder = examples.copy(examples.model("diffusion"), f"companion {part}")

    def read(folder):
        companions.cache_clear()
        return companions(folder, 64)

    def means(folder, sizes):
        assert sizes[part].parameters > 0

    name = f"{part}/config.json"
    return Parser(
        f"companion {part}", folder, name, "json", [document(folder / name)], read, means, 60
    )


def _picture(examples):
    folder = _picture_folder(examples, "picture")
    seeds = [(folder / IMAGE).read_bytes()]
    for suffix in ("gif", "bmp", "tiff"):
        Image.new("RGB", (9, 7), "#20a030").save(folder / f"b.{suffix}")
        seeds.append((folder / f"b.{suffix}").read_bytes())

    def read(folder):
        return [open_picture(one, 16) for one in load_pictures(folder, "a photo of sks dog")]

    def means(folder, squares):
        for square in squares:
            assert square.pixels.shape == (3, 16, 16)
            assert square.pixels.abs().max() <= 1

    return Parser("picture", folder, IMAGE, "bytes", seeds, read, means, 4)


def _caption(examples):
    folder = _picture_folder(examples, "caption")

    def read(folder):
        return load_pictures(folder)

    def means(folder, pictures):
        text = (folder / "a.txt").read_bytes().decode("utf-8-sig")
        assert pictures[0].caption == " ".join(text.split())

    return Parser("caption", folder, "a.txt", "text", ["a photo of a square"], read, means, 2)


def _prompts(examples):
    seeds = ["a sks dog in the snow\na sks dog on the moon\n"]

    def read(folder):
        return own_prompts(folder / "prompts.txt", "sks")

    def means(folder, prompts):
        assert all("sks" in prompt and plain for prompt, plain in prompts.items())

    return Parser("prompts", examples.empty("prompts"), "prompts.txt", "text", seeds, read, means)


def _bench(examples):
    seed = {
        "model_name_or_path": "a/b", "output_dir": "out", "seeds": [0, 1], "keep_ratio": [0.4, 0.7],
        "max_length": 96, "train": {"max_steps": 3, "learning_rate": [1e-4, 1e-2]},
        "datasets": {"words": {"dataset": "train.jsonl", "evaluate": {"dataset": "test.jsonl"}}},
        "methods": {"lora": {}, "emloc": {"correct": {"limit": 3}}},
    }  # fmt: skip

    def read(folder):
        return read_config(folder / "bench.yaml")

    def means(folder, config):
        assert config.methods
        assert all(0 < ratio <= 1 for ratio in config.keep_ratio)
        for label in config.methods:
            for name in config.datasets:
                assert all(map(math.isfinite, config.learning_rates(name, label)))

    return Parser("bench", examples.empty("bench"), "bench.yaml", "yaml", [seed], read, means, 40)


def _records(examples):
    seed = [{"dataset": "words", "label": "lora", "loss": 1.5, "score": 0.5, "seed": 0}] * 2

    def read(folder):
        return read_records(folder / "results.jsonl")

    def means(folder, records):
        assert all(record["dataset"] is not None for record in records)

    folder = examples.empty("records")
    return Parser("records", folder, "results.jsonl", "jsonl", [seed], read, means)
