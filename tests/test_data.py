"""Text to blocks of ids."""

import copy
import json

import datasets
import pytest
import torch
from helpers import run_python
from hub_server import HubServer, Repo
from tokenizers import Tokenizer, models, pre_tokenizers
from training import trainer
from transformers import PreTrainedTokenizerFast

from flextron_trainer.data import calibration_batches, collator, load_text, pack


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, 30)}}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def test_pack_joins_documents_and_drops_the_rest(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["w2 w3 w4", "w5 w6", "w7 w8 w9"]})
    blocks = pack(rows, tokenizer, 4)
    assert blocks["input_ids"][:] == [[2, 3, 4, 1], [5, 6, 1, 7]] and blocks["labels"][:] == blocks["input_ids"][:]
    assert pack(rows, tokenizer, 3, num_proc=2)["input_ids"][:] == [[2, 3, 4], [1, 5, 6], [7, 8, 9]]  # two shards


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
    with pytest.raises(ValueError, match="4 tokens, fewer than one block of 64"):
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


def test_a_dataset_of_the_hub(tmp_path):
    """By its id: every split, downloaded or streamed; what is not there is refused."""
    with HubServer() as hub:
        hub.repos["datasets/me/text"] = Repo()
        files = {}
        for split, text in (("train", "w2 w3"), ("validation", "w4")):
            path = tmp_path / f"{split}.parquet"
            datasets.Dataset.from_dict({"text": [text]}).to_parquet(path)
            files[f"data/{split}-00000-of-00001.parquet"] = path.read_bytes()
        hub.repos["datasets/me/text"].add(files, "text", "main", None)
        run_python(
            """
import pytest
from flextron_trainer.data import load_text
for streaming in (False, True):
    assert list(load_text("me/text", streaming=streaming)) == [{"text": "w2 w3"}]
    assert list(load_text("me/text", split="validation", streaming=streaming)) == [{"text": "w4"}]
    for name, split, reason in (("me/text", "other", "(Bad|Unknown) split"), ("me/none", "train", "doesn't exist")):
        with pytest.raises(ValueError, match=f"the Hub gave no dataset of this name: .*{reason}"):
            load_text(name, split=split, streaming=streaming)
""",
            env=hub.environment(tmp_path / "home"),
        )
        assert not hub.unknown


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "cannot be read as json: it is empty|holds no rows"),
        ("broken.jsonl", "{", "cannot be read as json"),
        ("empty.csv", "", "cannot be read as csv"),
        ("empty.parquet", "", "cannot be read as parquet"),
        ("empty.txt", "", "fewer than one block|ends before the first block"),
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
    assert batches[0].tolist() == [[2, 3, 4], [5, 2, 3]]


def test_calibration_text_in_any_column_name(tokenizer):
    rows = datasets.Dataset.from_dict({"content": ["w2 w3 w4 w5"]})
    (batch,) = calibration_batches(
        rows, tokenizer=tokenizer, vocab_size=30, sequence_length=2, batch_size=4, max_samples=5
    )
    assert batch.tolist() == [[2, 3], [4, 5]]
