"""The page with a slider for the size: what it shows for a size, and that a text goes on at another one."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import elastic_of, flextron, let_tokens_choose
from planted import plant

from flextron_trainer.demo import train_tokenizer

SPACE = Path(__file__).parent.parent / "examples" / "space"


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "model"
    tokenizer = train_tokenizer([path.read_text() for path in sorted(SPACE.iterdir())], 300)
    model = elastic_of("gqa-wide-heads", mlp=[1, 0.5], heads=[1, 0.5], depth=[1, 0.5], budgets=[1, 0.6, 0.35])
    model.resize_token_embeddings(300)
    let_tokens_choose(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plant(folder, folder / "marker")
    yield runpy.run_path(str(SPACE / "app.py"))["Writer"](str(folder), False)
    assert not (folder / "marker").exists()


def test_a_text_goes_on_at_every_size(writer):
    """On the kept KV cache where its depth stays, as by hand, and else by reading the text again."""
    ids = writer.start("def ")
    assert set(writer.rows) | set(writer.routed) == set(writer.sizes) and len(writer.routed) == 2
    first, cache, report = writer.write(ids, None, "1", 4)
    assert "the text was read first" in report and f"{writer.rows['1']['parameters']:,} parameters" in report
    depths = {name: row["subnetwork"]["layers"] for name, row in writer.rows.items()}
    for name in writer.rows:
        before, cache, _ = writer.write(ids, None, "1", 4)
        after, cache, report = writer.write(before, cache, name, 3)
        assert torch.equal(after[:, : before.shape[1]], first) and after.shape[1] == before.shape[1] + 3
        assert ("on the kept KV cache" in report) == (depths[name] == depths["1"])
        assert cache.get_seq_length() == after.shape[1] - 1
    assert len(set(depths.values())) > 1


def test_tokens_that_choose_are_shown(writer):
    ids, _, report = writer.write(writer.start("def run"), None, writer.routed[0], 2)
    shares = writer.compute(ids, writer.routed[0])
    assert "every token chooses" in report and len(shares) == ids.shape[1]
    assert all(0 < share <= 1 for _, share in shares) and writer.compute(ids, "1") == []


def test_the_page_needs_gradio(writer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r'`pip install "flextron\[ui\]"`'):
        flextron("ui", writer.model.name_or_path)


def test_the_page_is_built(writer):
    pytest.importorskip("gradio")
    page = runpy.run_path(str(SPACE / "app.py"))["build"](writer.model.name_or_path, False)
    assert {"size", "text", "report"} <= {getattr(block, "elem_id", None) for block in page.blocks.values()}
