"""What stands in a file is what is read: no type is inferred, nothing is fetched, faults name their line."""

import bz2
import datetime
import gzip
import importlib
import json
import lzma
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Json, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.config import TrainConfig
from emloc.errors import ConfigError, DataError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc_llm.data import load_samples
from emloc_llm.rows import load_rows

TOKENIZER = byte_tokenizer()
LOOKS = ["2024-01-05", "00123", "1.50", "2.00", "NA", "None", "null", "true", "1e3", "-0", " x ", "nan",
         "2024-01-05T00:00:00Z", "12:30", "Inf", "0x1F", "1_000"]  # fmt: skip
PAIR = {"prompt": "zip", "completion": "00123"}


def options(path, **more):
    return with_plugin_options(TrainConfig)(output_dir="o", dataset=str(path), **more)


def references(path, **more):
    return [sample.reference for sample in load_samples(options(path, **more), TOKENIZER, 0)]


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("reading fetched something")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.mark.parametrize("text", LOOKS)
def test_text_stays_what_it_looks_like(tmp_path, text):
    rows = [{"prompt": "a", "completion": text}] * 2
    alpaca = [{"instruction": "a", "input": "", "output": text}]
    (tmp_path / "d.csv").write_bytes(f"prompt,completion\r\na,{text}\r\n".encode("utf-8-sig"))
    (tmp_path / "d.tsv").write_text(f"prompt\tcompletion\na\t{text}\n")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.csv").write_text(f"prompt,completion\na,{text}\n")
    lines(tmp_path / "d.jsonl", rows)
    lines(tmp_path / "alpaca.jsonl", alpaca)
    for name in ("d.csv", "d.tsv", "d.json", "d.parquet", "d.jsonl", "alpaca.jsonl", "folder"):
        assert set(references(tmp_path / name)) == {text}, name


def test_whole_numbers_are_answers_and_nothing_else_is_text(tmp_path):
    assert references(lines(tmp_path / "d.jsonl", [{"prompt": "how many?", "completion": 12}])) == [
        "12"
    ]
    for value, kind in ((2.5, "a number"), (True, "a truth value"), ({"a": 1}, "an object"),
                        (["red", "blue"], "turn 1 of completion")):  # fmt: skip
        path = lines(tmp_path / "d.jsonl", [PAIR, {"prompt": "a", "completion": value}])
        if isinstance(value, list):
            kind = "a list"
        with pytest.raises(DataError, match=f"d.jsonl, line 2: completion is {kind}"):
            references(path)
    with pytest.raises(DataError, match="line 1: instruction is a number"):
        references(lines(tmp_path / "d.jsonl", [{"instruction": 5, "output": 6}]))
    pq.write_table(
        pa.table({"prompt": ["a"], "completion": [datetime.date(2024, 1, 5)]}),
        tmp_path / "d.parquet",
    )
    with pytest.raises(DataError, match=r"d.parquet, row 1: completion is of the type date"):
        references(tmp_path / "d.parquet")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.none() | st.booleans() | st.integers()
                                | st.text(max_size=3), max_size=3), min_size=1, max_size=4))  # fmt: skip
def test_tool_arguments_are_those_of_the_line(tmp_path_factory, found):
    """Rows have their own keys, and null is null: no schema is made for all of them."""
    path = tmp_path_factory.getbasetemp() / "arguments.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": arguments}}]}]}
        for arguments in found
    ]  # fmt: skip
    lines(path, rows)
    assert [dict(row) for row in load_rows(options(path))] == rows
    assert [dict(row) for row in load_rows(options(path, streaming=True))] == rows


def test_parquets_made_up_nulls_are_missing_and_its_json_is_read(tmp_path):
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [
        {"type": "function", "function": call}]}]} for call in calls]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert [dict(row) for row in load_rows(options(tmp_path / "d.parquet"))] == rows
    made = Dataset.from_dict(
        {"messages": [row["messages"] for row in rows], "tools": [[{"x": None}]] * 2},
        features=Features({"messages": List(Json()), "tools": Json()}),
    )
    made.to_parquet(tmp_path / "j.parquet")
    found = [dict(row) for row in load_rows(options(tmp_path / "j.parquet"))]
    assert found == [{**row, "tools": [{"x": None}]} for row in rows]


def test_pictures_in_parquet_are_not_decoded(tmp_path):
    """A path there may be an address, and decoding would fetch it."""
    entry = {"path": "https://x.invalid/a.png", "bytes": None}
    inner = List({"role": Value("string"), "content": Value("string"), "image": Image()})
    features = Features({"text": Value("string"), "picture": Image(), "turns": inner})
    row = {"text": "a", "picture": entry,
           "turns": [{"role": "user", "content": "q", "image": entry}]}  # fmt: skip
    table = pa.Table.from_pylist([row], schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "d.parquet")
    [found] = load_rows(options(tmp_path / "d.parquet"))
    assert found["picture"] == {"path": "https://x.invalid/a.png"}
    assert found["turns"][0]["image"] == found["picture"]


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl", "d.json"])
def test_files_that_are_not_utf8_name_the_line(tmp_path, name):
    text = {"d.csv": 'prompt,completion\na,"b\nc"\nd,café\n',
            "d.jsonl": '{"prompt": "a", "completion": "b"}\n\n\n{"prompt": "café", "completion": "b"}\n',
            "d.json": '[\n\n\n{"prompt": "café", "completion": "b"}]\n'}[name]  # fmt: skip
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=rf"{name}, line 4 is not UTF-8 .*Latin-1"):
        references(tmp_path / name)
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16; save it as UTF-8"):
        references(tmp_path / name)
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert references(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "", "is empty"),
        ("d.csv", "prompt,completion\n", "is empty"),
        ("d.json", "[]", "is empty"),
        ("d.parquet", "", "cannot be read as parquet"),
        ("d.parquet", "PAR1" + "x" * 40 + "PAR1", "cannot be read as parquet"),
        ("d.jsonl", '{"prompt": "a"', "line 1 is not JSON"),
        ("d.jsonl", "[" * 10**5, "line 1 is not JSON"),
        ("d.jsonl", '["a"]', "line 1 should be an object"),
        ("d.csv", 'prompt,completion\na,b\nc,"d\ne,f\n', "line 3: this is not CSV"),
        ("d.csv", "prompt,completion\na,b\nc,d,e\n", "line 3: there are 3 cells for 2 columns"),
        ("d.csv", "prompt;completion\na;b\n", "separated by commas"),
        ("d.csv", "prompt,prompt\na,b\n", "two columns named 'prompt'"),
        ("d.xml", "<a/>", "expected a file ending in"),
        (
            "d.jsonl",
            '{"prompt": "a", "completion": "\\ud800"}',
            "line 1: the text cannot be tokenised",
        ),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        references(tmp_path / name)


def test_long_cells_quotes_and_lines_of_json(tmp_path):
    long = "x" * 200_000
    (tmp_path / "d.csv").write_text(f'prompt,completion\n"a\nb","c ""d"", {long}"\n')
    [row] = load_rows(options(tmp_path / "d.csv"))
    assert dict(row) == {"prompt": "a\nb", "completion": f'c "d", {long}'}
    assert row.where.endswith("d.csv, line 2")
    lines(tmp_path / "lines.json", [PAIR, PAIR])
    assert references(tmp_path / "lines.json") == ["00123"] * 2


def test_devices_and_addresses_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "d.jsonl")
    for name in (tmp_path / "d.jsonl", "/dev/zero", "https://x.invalid/a.jsonl", "s3://bucket/a"):
        with pytest.raises(DataError, match=r"not opened|no such file"):
            references(name)


def test_a_folder_is_read_as_its_files_are(tmp_path):
    lines(tmp_path / "a/data/train-00000-of-00002.jsonl", [PAIR])
    lines(tmp_path / "a/data/train-00001-of-00002.jsonl", [PAIR, PAIR])
    lines(tmp_path / "a/data/test-00000-of-00001.jsonl", [{"prompt": "a", "completion": "NA"}])
    assert references(tmp_path / "a") == ["00123"] * 3
    assert references(tmp_path / "a", dataset_split="test") == ["NA"]
    assert references(tmp_path / "a", dataset_split="train[1:]+test") == ["00123", "00123", "NA"]
    with pytest.raises(DataError, match="has no split 'dev', only test, train"):
        references(tmp_path / "a", dataset_split="dev")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.csv").write_text("prompt;completion\nzip;00123\n")
    (tmp_path / "b/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: x.csv\n  sep: ';'\n---\n# Data\n"
    )
    assert references(tmp_path / "b") == ["00123"]


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "name",
    ["https://x.invalid/a.jsonl", "hf://datasets/a/b/c.jsonl", "zip://a::https://x.invalid/a.zip",
     "../outside.jsonl", "/etc/hostname"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["data_files", "data_dir"])
def test_a_folders_card_leads_nowhere_else(tmp_path, file, name, key):
    lines(tmp_path / "outside.jsonl", [PAIR])
    lines(tmp_path / "a/train.jsonl", [PAIR])
    card = f"configs:\n- config_name: default\n  {key}: {name}\n"
    (tmp_path / "a" / file).write_text(f"---\n{card}---\n" if file == "README.md" else card)
    with pytest.raises(DataError, match=r"an address|lies outside"):
        references(tmp_path / "a")


def test_a_folders_scripts_do_not_run(tmp_path):
    lines(tmp_path / "a/train.jsonl", [PAIR])
    (tmp_path / "a/a.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        references(tmp_path / "a")
    assert not (tmp_path / "ran").exists()


def test_columns_that_are_not_used_are_said_once(tmp_path, capfd):
    rows = [
        {**PAIR, "source": "web"},
        {**PAIR, "source": "web", "loss_weight": 2},
        {**PAIR, "id": None},
    ]
    path = lines(tmp_path / "d.jsonl", rows)
    load_rows(options(path))
    said = " ".join(capfd.readouterr().err.split())
    assert "the column source is not used" in said
    assert "the column loss_weight is not used" in said
    assert said.count("source") == 1
    assert " id" not in said
    both = lines(tmp_path / "e.jsonl", [{"messages": [{"role": "user", "content": "q"}], **PAIR}])
    load_rows(options(both))
    assert "the columns prompt, completion" in " ".join(capfd.readouterr().err.split())


def test_column_maps(tmp_path):
    path = lines(tmp_path / "d.jsonl", [{"completion": "old", "q": "zip", "a": "00123"}])
    mapped = {"q": "prompt", "a": "completion"}
    assert references(path, column_map=mapped) == ["00123"]  # theirs goes before a column of ours
    with pytest.raises(DataError, match="no column b"):
        references(path, column_map={"b": "prompt"})
    with pytest.raises(ConfigError, match="which is none of messages"):
        references(path, column_map={"q": "query"})
    with pytest.raises(ConfigError, match="two columns to prompt"):
        references(path, column_map={"q": "prompt", "a": "prompt"})


def test_streams_are_the_same_rows(tmp_path):
    rows = [{"prompt": str(n), "completion": f"{n:05}"} for n in range(2500)]
    path = lines(tmp_path / "d.jsonl", rows)
    stream = load_rows(options(path, streaming=True))
    assert [dict(row) for row in stream] == rows == [dict(row) for row in stream]
    shuffled = [row["prompt"] for row in stream.shuffled(0)]
    assert shuffled != [row["prompt"] for row in rows]
    assert sorted(shuffled, key=int) == [row["prompt"] for row in rows]
    table = load_rows(options(path))
    expected = Dataset.from_list(rows).shuffle(seed=3)["prompt"]
    assert [row["prompt"] for row in table.shuffled(3)] == list(expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_of_the_hub_is_neither_inferred_nor_decoded(tmp_path, monkeypatch, streaming):
    import datasets

    class Builder:
        class config:
            data_files: dict[str, list[str]] = {}  # noqa: RUF012

    entry = {"path": "https://x.invalid/a.png", "bytes": None}
    features = Features({"text": Value("string"), "image": Image(), "turns": List(Json())})
    rows = {"text": ["a"], "image": [entry], "turns": [[{"content": "3", "name": None}]]}
    table = Dataset.from_dict(rows, features=features)
    loaded = table.to_iterable_dataset() if streaming else table
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: Builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    [row] = load_rows(options("some/data", streaming=streaming))
    assert row["image"] == {"path": "https://x.invalid/a.png"}
    assert row["turns"] == [{"content": "3", "name": None}]
    (tmp_path / "d.csv").write_text("prompt,completion\nzip,00123\n")
    Builder.config.data_files = {"train": [str(tmp_path / "d.csv")]}
    [row] = load_rows(options("some/data", streaming=streaming))
    assert dict(row) == PAIR


def hub_data(monkeypatch, kind, data_files, **card):
    """A hub id whose files are those given, as the library finds them; it may not load any itself."""
    import datasets
    from datasets import packaged_modules

    module = importlib.import_module(f"{packaged_modules.__name__}.{kind}.{kind}")
    config = next(getattr(module, n) for n in dir(module) if n.lower() == f"{kind}config")

    class Builder:
        pass

    Builder.__module__ = module.__name__
    builder = Builder()
    builder.config = config(**card)
    builder.config.data_files = data_files

    def refuse(*_, **__):
        raise AssertionError("types were inferred")

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: builder)
    monkeypatch.setattr(datasets, "load_dataset", refuse)


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXTS = {"csv": "prompt,completion\nzip,00123\n", "jsonl": json.dumps(PAIR) + "\n",
         "json": json.dumps([PAIR]), "tsv": "prompt\tcompletion\nzip\t00123\n"}  # fmt: skip


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("kind", TEXTS)
def test_compressed_text_is_read_as_text(tmp_path, monkeypatch, kind, packing):
    path = tmp_path / f"a/train.{kind}{packing}"
    path.parent.mkdir()
    path.write_bytes(PACKED[packing](TEXTS[kind].encode()))
    assert references(path) == references(path.parent) == ["00123"]
    for streaming in (False, True):
        module = "csv" if kind.endswith("sv") else "json"
        hub_data(monkeypatch, module, {"train": [str(path)], "test": [str(path)]})
        assert references("some/data", streaming=streaming) == ["00123"]
    assert references("some/data", dataset_split="all") == ["00123"] * 2
    with pytest.raises(DataError, match="some/data has no split 'dev', only test, train"):
        references("some/data", dataset_split="dev")
    path.write_bytes(PACKED[packing](TEXTS[kind].encode() * 50)[:-9])
    with pytest.raises(DataError, match="cannot be read to its end"):
        references(path)
    path.write_bytes(b"plain")
    with pytest.raises(DataError, match="cannot be read to its end"):
        references(path)


def test_faults_of_compressed_text_name_the_line(tmp_path):
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode() + b"\n{"))
    with pytest.raises(DataError, match=r"d.jsonl.gz, line 2 is not JSON"):
        references(tmp_path / "d.jsonl.gz")
    (tmp_path / "d.parquet.gz").write_bytes(gzip.compress(b"a"))
    with pytest.raises(DataError, match="expected a file ending in"):
        references(tmp_path / "d.parquet.gz")


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_cards_separator_counts(tmp_path, monkeypatch, separator, local):
    path = tmp_path / "a/x.csv"
    path.parent.mkdir()
    path.write_text(TEXTS["csv"].replace(",", separator))
    card = {"config_name": "default", "data_files": "x.csv", "sep": separator}
    (tmp_path / "a/README.md").write_text(f"---\n{json.dumps({'configs': [card]})}\n---\n")
    hub_data(monkeypatch, "csv", {"train": [str(path)]}, sep=separator)
    if local:
        monkeypatch.undo()
    assert references(path.parent if local else "some/data") == ["00123"]


@pytest.mark.parametrize(
    ("kind", "file", "card", "message"),
    [
        ("csv", "train.csv", {"skiprows": 1}, "has the option skiprows, which is not supported"),
        ("csv", "train.csv", {"sep": "||"}, r"a separator is one character, not '\|\|'"),
        ("json", "train.json", {"field": "data"}, "has the option field, which is not supported"),
        ("csv", "train.zip", {}, "has rows in train.zip, .*; download it"),
        ("json", "train.jsonl.zst", {}, "has rows in train.jsonl.zst, .*; download it"),
        ("imagefolder", "train.zip", {}, "keeps its pictures in the archive train.zip; download it"),
    ],
)  # fmt: skip
def test_hub_data_that_only_inference_would_read_is_refused(monkeypatch, kind, file, card, message):
    hub_data(monkeypatch, kind, {"train": [f"hf://datasets/some/data@abc/{file}"]}, **card)
    with pytest.raises(DataError, match=message):
        references("some/data")


def test_metadata_of_the_hubs_pictures_is_text(tmp_path, monkeypatch):
    import huggingface_hub

    home = tmp_path / "datasets--some--data/snapshots/abc"
    (home / "train").mkdir(parents=True)
    (home / "train/metadata.csv").write_text("file_name,prompt,completion\na.png,zip,00123\n")
    (home / "train/a.png").write_bytes(b"a")
    fetched = {}

    def fetch(name, **given):
        fetched.update(given, name=name)
        return str(home)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    at = "hf://datasets/some/data@abc/train/"
    hub_data(monkeypatch, "imagefolder", {"train": [at + "a.png", at + "metadata.csv"]})
    [row] = load_rows(options("some/data"))
    assert dict(row) == {"image": "a.png", **PAIR}
    assert row.folder == home / "train"
    assert (fetched["name"], fetched["revision"]) == ("some/data", "abc")
    assert fetched["allow_patterns"] == ["train/a.png", "train/metadata.csv"]


@pytest.mark.parametrize("name", ["train.jsonl", "README.md", "dataset_infos.json", "metadata.csv"])
def test_links_out_of_a_folder_are_not_followed(tmp_path, name):
    lines(tmp_path / "outside", [PAIR])
    lines(tmp_path / "a/train.jsonl", [PAIR])
    (tmp_path / "a" / name).unlink(missing_ok=True)
    (tmp_path / "a" / name).symlink_to(tmp_path / "outside")
    if name == "metadata.csv":
        (tmp_path / "a/train.jsonl").unlink()
        (tmp_path / "a/a.png").write_bytes(b"a")
    with pytest.raises(DataError, match="is a link that leads out of"):
        references(tmp_path / "a")


def test_links_inside_a_folder_and_to_the_hubs_blobs_are_followed(tmp_path):
    lines(tmp_path / "a/inner/one", [PAIR])
    (tmp_path / "a/train.jsonl").symlink_to(tmp_path / "a/inner/one")
    assert references(tmp_path / "a") == ["00123"]
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert references(tmp_path / "b") == ["00123"]
    blob = lines(tmp_path / "datasets--a--b/blobs/abc", [PAIR])
    snapshot = tmp_path / "datasets--a--b/snapshots/def"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to(blob)
    assert references(snapshot) == ["00123"]


def test_what_save_to_disk_wrote_is_read(tmp_path):
    entry = {"path": "a.png", "bytes": b"no picture"}
    features = Features(
        {"prompt": Value("string"), "completion": Value("string"), "image": Image()}
    )
    table = Dataset.from_list([{**PAIR, "image": entry}] * 3, features=features)
    table.save_to_disk(tmp_path / "a", num_shards=2)
    rows = load_rows(options(tmp_path / "a"))
    assert [dict(row) for row in rows] == [{**PAIR, "image": entry}] * 3
    DatasetDict({"train": table, "mine": table.select([0])}).save_to_disk(tmp_path / "b")
    assert len(load_rows(options(tmp_path / "b"))) == 3
    assert references(tmp_path / "b", dataset_split="mine") == ["00123"]
    with pytest.raises(DataError, match="has no split 'dev', only mine, train"):
        references(tmp_path / "b", dataset_split="dev")
    (tmp_path / "a/state.json").write_text('{"_data_files": [{"filename": "../b/x.arrow"}]}')
    with pytest.raises(DataError, match="lies outside"):
        references(tmp_path / "a")
    (tmp_path / "a/state.json").write_text('{"_data_files": []}')
    with pytest.raises(DataError, match="save it with to_parquet or to_json"):
        references(tmp_path / "a")
    (tmp_path / "d.arrow").write_bytes(b"damaged" * 9)
    with pytest.raises(DataError, match="cannot be read as Arrow"):
        references(tmp_path / "d.arrow")


def test_columns_without_names_hold_nothing(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion,,\nzip,00123,,\nzip,00123, ,\n")
    assert [dict(row) for row in load_rows(options(path))] == [PAIR] * 2
    path.write_text("prompt,completion,,\nzip,00123,,\nzip,00123,,x\n")
    with pytest.raises(DataError, match=r"d.csv, line 3: column 4 has content but no name"):
        references(path)


def test_row_numbers_of_pandas_are_no_content(tmp_path):
    (tmp_path / "d.csv").write_text(",prompt,completion\n0,a,007\n1,b,1.50\n")
    rows = load_rows(
        with_plugin_options(TrainConfig)(output_dir="o", dataset=str(tmp_path / "d.csv"))
    )
    assert [row["completion"] for row in rows] == ["007", "1.50"]


def test_a_line_of_a_packed_file_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("emloc.integrations.transformers.data.files.LONGEST_LINE", 1 << 20)
    row = json.dumps({"prompt": "a" * (1 << 20), "completion": "b"})
    for name, text in (
        ("d.jsonl.gz", row + "\n"),
        ("d.csv.gz", "prompt,completion\n" + "a" * (1 << 21)),
    ):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        with pytest.raises(
            DataError, match=rf"{name}, line \d has more than 1 MiB, but is one row"
        ):
            references(tmp_path / name)
