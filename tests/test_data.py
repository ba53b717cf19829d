"""Text to blocks of ids. Data sets of the Hub: `test_hub.py`."""

import bz2
import copy
import gzip
import json
import pickle

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from training import trainer
from transformers import PreTrainedTokenizerFast

from flextron_trainer.data import calibration_batches, collator, hold_out, load_text, pack, tokens_of


def words(begin: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose word `w7` is token 7; with `begin`, one that adds `<begin>`, token 0, as that of Llama does."""
    tokens = {"<begin>" if begin else "<unk>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, 30)}}
    model = Tokenizer(models.WordLevel(tokens, None if begin else "<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin:
        model.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", bos_token="<begin>" if begin else None)


@pytest.fixture(scope="module")
def tokenizer():
    return words()


def test_pack_joins_documents_and_drops_the_rest(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["w2 w3 w4", "w5 w6", "w7 w8 w9"]})
    blocks = pack(rows, tokenizer, 4)
    assert blocks["input_ids"][:] == [[2, 3, 4, 1], [5, 6, 1, 7]] and blocks["labels"][:] == blocks["input_ids"][:]
    assert pack(rows, tokenizer, 3, num_proc=2)["input_ids"][:] == [[2, 3, 4], [1, 5, 6], [1, 7, 8]]


def test_blocks_are_those_of_the_whole_text(tokenizer):
    """Whatever the batches, the processes or the shards that it is read in, no tail of one is lost."""
    texts = [" ".join(f"w{2 + (i + j) % 28}" for j in range(i % 9)) for i in range(1200)]
    stream = [token for text in texts for token in [*tokenizer(text).input_ids, 1]]
    rows = datasets.Dataset.from_dict({"text": texts})
    for length, boundaries in ((64, False), (1024, True)):
        whole = pack(rows, tokenizer, length, document_boundaries=boundaries)
        assert whole["input_ids"][:] == [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        assert pack(rows, tokenizer, length, num_proc=2, document_boundaries=boundaries)[:] == whole[:]
        read = pack(rows.to_iterable_dataset(num_shards=5), tokenizer, length, document_boundaries=boundaries)
        assert list(read) == list(whole) == list(read)  # a stream can be read again
    short = datasets.Dataset.from_dict({"text": ["w2 w3 w4 w5"] * 5000})
    assert len(pack(short, tokenizer, 1024)) == 24  # of 25,000 tokens


def test_the_cache_holds_what_was_packed(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "w2 w3 w4"}\n' * 2000)
    blocks = [pack(load_text(str(tmp_path / "rows.jsonl")), tokenizer, 64) for _ in range(2)]
    assert blocks[0].cache_files and blocks[0].cache_files == blocks[1].cache_files and len(blocks[0]) == 125
    assert pack(load_text(str(tmp_path / "rows.jsonl")), tokenizer, 128).cache_files != blocks[0].cache_files


def test_documents_begin_and_end_as_the_model_sees_them():
    """Also where the tokenizer adds a token in front: in training, calibration and evaluation."""
    tokenizer, rows = words(begin=True), datasets.Dataset.from_dict({"text": ["w2 w3", "", "w4 w5 w6"]})
    assert tokenizer("w2").input_ids == [0, 2]
    expected = [[0, 2, 3, 1], [0, 1, 0, 4], [5, 6, 1]]
    blocks = pack(rows, tokenizer, 4, document_boundaries=True)
    assert blocks["input_ids"][:] == expected[:2] and blocks["position_ids"][:] == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert blocks["labels"][:] == [[-100, 2, 3, 1], [-100, 1, -100, 4]]
    assert [row["input_ids"] for row in pack(rows.to_iterable_dataset(), tokenizer, 4)] == expected[:2]
    options = {"vocab_size": 30, "sequence_length": 4, "batch_size": 8, "max_samples": 8}
    for data in (rows, rows.to_iterable_dataset(), rows["text"][:], [{"text": text} for text in rows["text"]]):
        (batch,) = calibration_batches(data, tokenizer=tokenizer, **options)
        assert batch.tolist() == expected[:2]
    assert tokens_of(tokenizer, ["w2 <end>"]) == [[0, 2, 1]]  # ended once
    tokenizer.eos_token = None
    assert tokens_of(tokenizer, ["w2"]) == [[0, 2]]
    with pytest.raises(ValueError, match=r"`dataset`=None cannot be used\. Every row of its text column is a text"):
        pack(datasets.Dataset.from_dict({"text": ["w2", None]}), tokenizer, 2)


def test_a_stream_is_packed_as_it_is_read(tokenizer, tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["w2 w3 w4", "w5 w6", "w7 w8 w9"]})
    assert list(pack(rows.to_iterable_dataset(), tokenizer, 4)) == list(pack(rows, tokenizer, 4))
    with pytest.raises(ValueError, match="ends before the first block of 64"):
        pack(rows.to_iterable_dataset(), tokenizer, 64)
    many = datasets.Dataset.from_dict({"text": ["w2 w3 w4 w5 w6 w7 w8"] * 20}).to_iterable_dataset()
    run = trainer(tmp_path, max_steps=2, logging_steps=2)
    run.train_dataset = pack(many, tokenizer, 8)
    run.processing_class = copy.deepcopy(tokenizer)
    run.processing_class.pad_token = "<end>"  # which also ends documents: nothing here is padding
    run.train()
    assert run.state.num_input_tokens_seen == 2 * 4 * 8


def test_another_column_is_found_when_it_is_the_only_one(tokenizer):
    rows = datasets.Dataset.from_dict({"content": ["w2 w3 w4"], "score": [1]})
    assert pack(rows, tokenizer, 4)["input_ids"][:] == [[2, 3, 4, 1]]


def test_too_short_and_unclear_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"'1 rows of text' .* before the first block of 64"):
        pack(datasets.Dataset.from_dict({"text": ["w2 w3 w4"]}), tokenizer, 64)
    with pytest.raises(ValueError, match="One column must hold the text"):
        pack(datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), tokenizer, 4)


def test_load_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "b.md").write_text("two")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    assert load_text(str(tmp_path))["text"][:] == ["one", "two"]
    assert load_text(str(tmp_path / "a.txt"))["text"][:] == ["one"]
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert load_text(str(tmp_path / "rows.jsonl"))["text"][:] == ["x", "y"]
    datasets.Dataset.from_dict({"text": ["p"]}).to_parquet(tmp_path / "rows.parquet")
    assert load_text(str(tmp_path / "rows.parquet"))["text"][:] == ["p"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text that could be read"):
        load_text(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no such file"):
        load_text(str(tmp_path / "nowhere"))


ROWS = [{"text": "line\none {}", "n": 1}, {"text": "two", "n": 2}]


def shards(folder, names):
    """Files whose rows are `ROWS`, in the format that their names say."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_list(ROWS)
        if "parquet" in name:
            rows.to_parquet(path)
        elif "json" in name.lower():
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        else:
            rows.to_csv(path, sep="," if "csv" in name else "\t")
        if path.suffix in (".gz", ".bz2"):
            path.write_bytes({".gz": gzip, ".bz2": bz2}[path.suffix].compress(path.read_bytes()))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl", "b.jsonl"],
        ["a.JSON", "sub/b.jsonl.gz", "c[1].ndjson", "d.jsonl.bz2"],
        ["train-0.parquet", "train-1.parquet"],
        ["a.csv", "b.csv.gz"],
        ["a.tsv"],
    ],
)
def test_a_folder_of_shards_is_its_rows(tokenizer, tmp_path, names, streaming):
    """For training and for calibration: no braces, no escapes."""
    shards(tmp_path, names)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "notes.txt").write_text("hidden")
    found = load_text(str(tmp_path), streaming=streaming)
    assert [row["text"] for row in found] == [row["text"] for row in ROWS] * len(names)


def test_what_is_not_one_kind_of_text_is_refused_by_name(tmp_path):
    shards(tmp_path, ["a.jsonl", "sub/b.parquet"])
    with pytest.raises(ValueError, match=r"several kinds of data, such as .*a\.jsonl.*b\.parquet.*'text/\*\.jsonl'"):
        load_text(str(tmp_path))
    (tmp_path / "sub" / "b.parquet").unlink()
    (tmp_path / "README.md").write_text("about the rows")
    with pytest.raises(ValueError, match=r"several kinds of data, such as .*README\.md.*a\.jsonl"):
        load_text(str(tmp_path))
    shards(tmp_path, ["more/b.jsonl"])
    assert len(load_text(str(tmp_path / "*.jsonl"))) == 2 and len(load_text(str(tmp_path / "**" / "*.jsonl"))) == 4
    shards(tmp_path, ["data/train-0.jsonl", "data/test-0.jsonl"])
    with pytest.raises(ValueError, match=r"several splits, such as .*test-0\.jsonl.*train-0\.jsonl"):
        load_text(str(tmp_path / "data"))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"several kinds of data, such as .*\.arrow.*\.json"):
        load_text(str(tmp_path / "saved"))
    assert load_text(str(tmp_path / "saved" / "*.arrow"))["n"][:] == [1, 2]


def test_what_is_no_text_is_named(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())
    (tmp_path / "b.bin").write_bytes(b"one\x00two")
    (tmp_path / "latin.txt").write_bytes("gr\xfcn".encode("latin-1"))
    for name in ("b.bin", "latin.txt"):
        with pytest.raises(ValueError, match=f"no text in UTF-8 that could be read, only .*{name}"):
            load_text(str(tmp_path / name))
    (tmp_path / "long.txt").write_bytes(b"-" * 5000 + b"\xff.")
    assert load_text(str(tmp_path))["text"][:] == ["one", "-" * 5000 + "\ufffd."]
    assert "left out" in caplog.text and "b.bin" in caplog.text and "latin.txt" in caplog.text
    assert "long.txt is no UTF-8 at byte 5000" in caplog.text


def test_text_is_tokenized_once(tokenizer, tmp_path):
    """Of a folder, too, until a file changes."""
    (tmp_path / "a[1].txt").write_text("w2 w3 w4")
    (tmp_path / "b.txt").write_text("w5 w6")
    files = [pack(load_text(str(tmp_path)), tokenizer, 4).cache_files for _ in range(2)]
    assert files[0] and files[0] == files[1]
    (tmp_path / "b.txt").write_text("w7 w8 w9 w10")
    changed = pack(load_text(str(tmp_path)), tokenizer, 4)
    assert changed.cache_files != files[0] and changed["input_ids"][:] == [[2, 3, 4, 1], [7, 8, 9, 10]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.txt", "folder"])
def test_every_source_can_be_streamed(tokenizer, tmp_path, name):
    path, text = tmp_path / name, "w2 w3 w4 w5"
    if name == "folder":
        path.mkdir()
        (path / "a.txt").write_text(text)
    elif name == "rows.parquet":
        datasets.Dataset.from_dict({"content": [text]}).to_parquet(path)
    else:
        path.write_text(text if name == "rows.txt" else json.dumps({"content": text, "score": 1}) + "\n")
    stream = pack(load_text(str(path), streaming=True), tokenizer, 5)
    assert [row["input_ids"] for row in stream] == [[2, 3, 4, 5, 1]]
    with pytest.raises(ValueError, match="ends before the first block of 6"):
        pack(load_text(str(path), streaming=True), tokenizer, 6)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "cannot be read as json: it is empty|holds no rows"),
        ("broken.jsonl", "{", "cannot be read as json"),
        ("empty.csv", "", "cannot be read as csv"),
        ("empty.parquet", "", "cannot be read as parquet"),
        ("empty.txt", "", "no text that could be read"),
        ("two.jsonl", '{"a": "x", "b": "y"}', "One column must hold the text"),
    ],
)
def test_what_holds_no_text_is_refused(tokenizer, tmp_path, name, content, message, streaming):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        pack(load_text(str(tmp_path / name), streaming=streaming), tokenizer, 64)


def test_the_standard_library_is_a_corpus():
    rows = load_text("stdlib")
    assert len(rows) > 300 and not any("site-packages" in text[:100] for text in rows["text"][:20])


def test_collator_pads_and_copies_labels():
    batch = collator()([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    full = collator()([{"input_ids": torch.tensor([1, 2]), "labels": [-100, 2]}])
    assert set(full) == {"input_ids", "labels"} and full["labels"].tolist() == [[-100, 2]]


def test_collator_reaches_workers_of_any_kind(tokenizer):
    """Those that are not forked get it pickled."""
    again = pickle.loads(pickle.dumps(collator(tokenizer)))
    data = [{"input_ids": [5, 6]}, {"input_ids": [7]}]
    expected = collator(tokenizer)(data)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again(data).items())


def test_collator_hides_padding_that_the_rows_bring(tokenizer):
    batch = collator()([{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}])
    assert batch["labels"].tolist() == [[5, 6, -100]]
    padded = collator(tokenizer)([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    assert padded["input_ids"][1, 1] == (tokenizer.pad_token_id or 0)


def test_calibration_reads_no_more_than_it_needs(tokenizer):
    def endless():
        while True:
            yield "w2 w3 w4 w5"

    batches = calibration_batches(
        endless(), tokenizer=tokenizer, vocab_size=30, sequence_length=3, batch_size=2, max_samples=5
    )
    assert [tuple(batch.shape) for batch in batches] == [(2, 3), (2, 3), (1, 3)]
    assert batches[0].tolist() == [[2, 3, 4], [5, 1, 2]]


def test_calibration_text_in_any_column_name(tokenizer):
    rows = datasets.Dataset.from_dict({"content": ["w2 w3 w4 w5"]})
    (batch,) = calibration_batches(
        rows, tokenizer=tokenizer, vocab_size=30, sequence_length=2, batch_size=4, max_samples=5
    )
    assert batch.tolist() == [[2, 3], [4, 5]]


def test_calibration_does_not_see_padding(tokenizer):
    rows = [{"input_ids": [2, 3, 0], "attention_mask": [1, 1, 0]}, {"input_ids": torch.tensor([4, 5, 6])}]
    (batch,) = calibration_batches(rows, tokenizer=None, vocab_size=30, sequence_length=2, batch_size=4, max_samples=5)
    assert batch.tolist() == [[2, 3], [4, 5]]


def test_an_eighth_of_the_samples_is_held_out():
    samples = torch.arange(40).view(20, 2)
    for size in (1, 3, 20, 64):
        seen, held_out = hold_out(list(samples.split(size)))
        assert torch.equal(torch.cat([*seen, *held_out]), samples) and len(torch.cat(held_out)) == 2
        assert max(map(len, seen)) <= size
    with pytest.warns(UserWarning, match="has one sample"):
        seen, held_out = hold_out([samples[:1]])
    assert torch.equal(seen[0], samples[:1]) and torch.equal(held_out[0], samples[:1])
