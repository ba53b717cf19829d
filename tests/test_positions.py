"""Which tokens see each other: documents in one row, with and without padding, and positions that are too large."""

import functools

import pytest
import torch
from flash import flash  # noqa: F401  a fixture
from helpers import difference, elastic_of, parent_of, random_subnetworks
from test_packing import VARIANT, arguments, documents, packed
from test_token_routing import AUTO, routed
from transformers import DynamicCache, StaticCache

from flextron_trainer import FlextronTrainer
from modeling_flextron.positions import documents as places_of

GREEDY = {"do_sample": False, "eos_token_id": 95, "pad_token_id": 0}


@functools.cache
def shared(variant: str):
    return routed(variant)


def rows(pad_left: bool) -> tuple[dict[str, torch.Tensor], list[tuple[int, slice, list[int]]]]:
    """Rows of documents, some of them padded, with a mask; and row, place and tokens of each document."""
    blocks = [[*block[:1], [None] * 2, *block[1:]] if len(block) > 2 else block for block in documents()]
    blocks = [[*block, [None] * (26 - sum(map(len, block)))] for block in blocks]
    if pad_left:
        blocks = [[block[-1], *block[:-1]] for block in blocks]
    inputs, found = {"input_ids": [], "attention_mask": [], "position_ids": []}, []
    for row, block in enumerate(blocks):
        begin = 0
        for part in block:
            if part and part[0] is not None:
                found.append((row, slice(begin, begin + len(part)), part))
            begin += len(part)
        tokens = [token for part in block for token in part]
        inputs["input_ids"].append([token or 0 for token in tokens])
        inputs["attention_mask"].append([int(token is not None) for token in tokens])
        places = [0 if token is None else place for part in block for place, token in enumerate(part)]
        inputs["position_ids"].append(places)
    return {name: torch.tensor(values) for name, values in inputs.items()}, found


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("variant", ["gqa-wide-heads", "mistral", "qwen2", "gpt2"])
def test_documents_of_a_row_do_not_see_each_other(variant, attention, flash):  # noqa: F811
    """Whether there is a mask or not, and wherever padding is between them."""
    model = shared(variant)
    for budget in (None, *random_subnetworks(model, 1), AUTO):
        for left in (False, True):
            inputs, parts = rows(left)
            model.set_attn_implementation("sdpa")
            alone = [model(torch.tensor([part]), flextron_budget=budget).logits[0] for _, _, part in parts]
            model.config._attn_implementation = attention
            with torch.compiler.set_stance("force_eager"):
                output = model(**inputs, flextron_budget=budget)
            for (row, place, _), expected in zip(parts, alone, strict=True):
                assert difference(output.logits[row, place], expected) < 3e-5
            assert set(output) == {"logits"}  # no cache could go on with all of them
            if attention == "flex_attention":
                return


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing():
    model = elastic_of("gqa-wide-heads")
    blocks = [row for row in packed(documents())]
    ids, positions = (torch.tensor([row[name] for row in blocks]) for name in ("input_ids", "position_ids"))
    expected = model(ids, position_ids=positions, labels=ids, use_cache=False).loss
    assert model(ids, position_ids=positions, labels=ids, attention_mask=torch.ones_like(ids)).loss == expected
    assert (model(ids, labels=ids).loss - expected).abs() > 5e-3


@torch.no_grad()
def test_one_document_in_a_row_is_left_as_it_is():
    """Padding anywhere, or positions that begin anywhere, are those of stock models."""
    parent, model = parent_of("gqa-wide-heads"), elastic_of("gqa-wide-heads")
    ids = torch.randint(1, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 4:6], mask[2, 9:] = 0, 0, 0
    begin = torch.tensor([[0], [5], [40]])
    assert places_of(torch.arange(7, 19)[None], None, None, False) is None
    for positions in ((mask.cumsum(-1) - 1).clamp(min=0) + begin, torch.arange(12) + begin):  # padding counts, or not
        assert places_of(positions, mask, None, False) is None
        found, expected = (m(ids, attention_mask=mask, position_ids=positions).logits for m in (model, parent))
        assert difference(found[mask.bool()], expected[mask.bool()]) < 1e-5


@torch.no_grad()
def test_text_behind_padding_is_that_of_stock_models():
    """Without a cache `generate` gives positions that begin again, though not at 0, to what it writes there."""
    parent, model = parent_of("gpt2"), elastic_of("gpt2")
    ids, mask = (
        torch.randint(1, 95, (3, 7), generator=torch.Generator().manual_seed(1)),
        torch.ones(3, 7).tril(2).long(),
    )
    options = {"attention_mask": mask, "use_cache": False, "max_new_tokens": 4, **GREEDY}
    assert torch.equal(model.generate(ids, **options), parent.generate(ids, **options))


def test_what_documents_cannot_have():
    model, (inputs, _) = elastic_of("gqa-wide-heads"), rows(False)
    with pytest.raises(ValueError, match=r"`past_key_values`='DynamicCache' .*a cache could continue only one"):
        model(**inputs, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"`past_key_values`=.*a cache could continue only one"):
        model.generate(**inputs, max_new_tokens=2)
    inputs["attention_mask"][0, 3] = 0
    with pytest.raises(ValueError, match=r"`attention_mask`='padding amid a document' .*padded between them only"):
        model(**inputs)


@torch.no_grad()
def test_compiled():
    """A graph keeps documents apart where it is told that there is no cache."""
    model, (inputs, _) = elastic_of("gqa-wide-heads"), rows(False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    real = inputs["attention_mask"].bool()
    found = compiled(**inputs, use_cache=False).logits
    assert difference(found[real], model(**inputs).logits[real]) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("teacher", ["parent", None])
def test_training_with_a_mask_is_training_without(tmp_path, teacher):
    logs = []
    for masked in (False, True):
        data = [{**row, "attention_mask": [1] * 24} for row in packed(documents())]
        run = FlextronTrainer(
            elastic_of(VARIANT),
            arguments(tmp_path, max_steps=1, per_device_train_batch_size=len(data), optim="sgd"),
            teacher=parent_of(VARIANT) if teacher else None,
            train_dataset=data,
            data_collator=lambda rows, masked=masked: {
                name: torch.tensor([row[name] for row in rows])
                for name in rows[0]
                if masked or name != "attention_mask"
            },
        )
        run.train()
        logs.append([run.state.log_history[0][name] for name in ("loss_1", "loss_0.15", "grad_norm")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


class TestLearnedPositions:
    @pytest.fixture(scope="class")
    def model(self):
        return elastic_of("gpt2", parent_of("gpt2", max_position_embeddings=24))

    @torch.no_grad()
    def test_a_row_may_be_longer_than_the_table(self, model):
        """Documents below the limit, of stock GPT-2's padding-free batches."""
        parent = model.extract()
        generator = torch.Generator().manual_seed(1)
        ids, positions = torch.randint(1, 95, (1, 60), generator=generator), torch.arange(60)[None] % 20
        found = model(ids, position_ids=positions, use_cache=False).logits
        assert difference(found, parent(ids, position_ids=positions, use_cache=False).logits) < 1e-5
        assert difference(found[:, 20:40], model(ids[:, 20:40]).logits) < 1e-5

    @torch.no_grad()
    @pytest.mark.parametrize("cache", [None, "dynamic", "static"])
    def test_text_is_written_up_to_the_last_position(self, model, cache):
        ids = torch.randint(1, 95, (1, 20), generator=torch.Generator().manual_seed(1))
        how = {"use_cache": False} if cache is None else {"cache_implementation": cache}
        padded = torch.nn.functional.pad(ids, (6, 0)), torch.nn.functional.pad(torch.ones_like(ids), (6, 0))
        for inputs, mask in ((ids, torch.ones_like(ids)), padded):
            text = model.generate(inputs, attention_mask=mask, max_new_tokens=5, **how, **GREEDY)
            assert text.shape[1] == inputs.shape[1] + 5
            with pytest.raises(ValueError, match=r"`position_ids`=24 .*has 24 learned positions.*write fewer tokens"):
                model.generate(inputs, attention_mask=mask, max_new_tokens=6, **how, **GREEDY)

    @pytest.mark.parametrize("positions", [[3, 24], [-1, 0]])
    def test_other_positions(self, model, positions):
        with pytest.raises(ValueError, match=rf"`position_ids`=({positions[0]}|{positions[1]}) .*learned positions"):
            model(torch.ones(1, 2, dtype=torch.long), position_ids=torch.tensor([positions]))

    def test_positions_are_read_where_there_may_be_too_many(self, model, monkeypatch):
        """On a GPU, which would have to wait for it at every token."""
        asked = []
        monkeypatch.setattr(torch.Tensor, "aminmax", lambda self: asked.append(self) or (torch.zeros(()),) * 2)
        with torch.device("meta"):
            model = type(model)(model.config)
        ids, cache = torch.ones(1, 20, dtype=torch.long, device="meta"), DynamicCache(config=model.config)
        static, longer = (StaticCache(config=model.config, max_cache_len=length) for length in (24, 25))
        model(ids, past_key_values=longer)
        for part in (ids, *[ids[:, -1:]] * 4):
            model(part, past_key_values=cache)
            model(part, past_key_values=static)
        assert not asked
        model(ids[:, -1:], past_key_values=cache)
        assert len(asked) == 1
        model(ids[:, -1:], past_key_values=longer)
        assert len(asked) == 2
