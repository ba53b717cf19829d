"""Corrections of a row's own: every size is one function, however it is run, loaded, extracted or exported."""

import copy
import warnings

import pytest
import torch
from helpers import all_sizes, difference, elastic_of, flextron, let_tokens_choose, parent_of, random_subnetworks
from training import trainer, with_adapter

from flextron_trainer import convert
from flextron_trainer.conversion.corrections import warn_of_reversals
from flextron_trainer.conversion.rows import mean_loss
from flextron_trainer.export.verify import verify
from flextron_trainer.publishing.card import write_model_card
from modeling_flextron import FlextronConfig, FlextronForCausalLM, fit
from modeling_flextron.budgets import row_cost
from modeling_flextron.corrections import Owner, number_of_owner, owner_number, parameters_beside
from modeling_flextron.families import is_shared
from modeling_flextron.subnetwork import count_parameters, kv_cache_bytes, memory_of

IDS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def corrected(variant: str, **changes):
    """An elastic model, all rows of which but the full one have random corrections."""
    model = elastic_of(variant, **changes)
    owners = []
    for row in reversed(model.frontier[1:]):
        subnetwork = model.resolve_budget(row["subnetwork"])
        ranks = [(i + len(owners)) % 4 for i in range(len(subnetwork.layers))]
        owners.append(Owner(row["name"], subnetwork, {"o_proj": tuple(ranks), "down_proj": tuple(ranks[::-1])}))
    model.config.corrections = [owner.to_dict() for owner in owners]
    model.model.set_owners(model.config.owners())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not is_shared(name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module", params=["mha-tied-biased", "gqa-wide-heads", "qwen2", "gpt2", "neox"])
def variant(request):
    """Families that differ in what a correction meets: biases, groups, windows, layer norms, parallel layers."""
    return request.param


@pytest.fixture(scope="module")
def model(variant):
    return corrected(variant)


@torch.no_grad()
def logits(model, budget=None):
    return model(IDS, flextron_budget=budget).logits


@pytest.fixture(scope="module")
def one():
    """Of one family."""
    return corrected("gqa-wide-heads")


def own_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if not is_shared(name)}


def test_the_full_network_has_none(model, variant):
    plain = elastic_of(variant)
    assert torch.equal(logits(model), logits(plain))
    for row in model.frontier[1:]:
        assert difference(logits(model, row["name"]), logits(plain, row["name"])) > 1e-3


def test_a_size_is_one_function_however_it_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    model.export(tmp_path / "levels")
    for i, size in enumerate(all_sizes(model, 4)):  # every second one of the other kind
        folder = tmp_path / ("plain", "levels")[i % 2]
        small = FlextronForCausalLM.from_pretrained(folder, flextron_budget=size)
        assert small.built.to_dict() | {"layers": 0} == size.to_dict() | {"layers": 0}
        assert difference(logits(small), logits(model, size)) < 1e-5
        for inner in random_subnetworks(small, 2):
            outer = type(inner)(inner.hidden, tuple(size.layers[i] for i in inner.layers), inner.mlp, inner.heads)
            assert difference(logits(small, inner), logits(model, outer)) < 1e-5
        for name in (row["name"] for row in small.frontier):
            assert difference(logits(small, name), logits(model, size if name == "built" else name)) < 1e-5


def test_what_was_loaded_small_is_saved_and_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path / "all")
    small = FlextronForCausalLM.from_pretrained(tmp_path / "all", flextron_budget="0.6")
    small.export(tmp_path / "small")
    for name in ("0.6", "0.35", "0.15"):
        again = FlextronForCausalLM.from_pretrained(tmp_path / "small", flextron_budget=name)
        assert difference(logits(again), logits(model, name)) < 1e-5


def test_all_that_is_owned_is_counted(model, tmp_path):
    config, owners = model.config, model.model.owners
    for number, owner in enumerate(owners):
        own = [p.numel() for name, p in own_parameters(model).items() if owner_number(name) == str(number)]
        assert owner.parameters(config) == sum(own)
    model.save_pretrained(tmp_path)
    for size in all_sizes(model, 3):
        small = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=size)
        beside = parameters_beside(config, owners, size)
        assert count_parameters(config, size) + beside == small.num_parameters()
        assert beside == parameters_beside(small.config, small.model.owners, small.built)


def test_memory_holds_what_smaller_sizes_own(one):
    need = {row.name: row_cost(one.config, row, "memory") for row in one.frontier}
    dense = memory_of(one.config)
    for row in one.frontier[:-1]:
        assert need[row.name] > dense(row.subnetwork)
        assert one.resolve_budget(f"{need[row.name] / 1024}KiB") == row.subnetwork
        assert one.resolve_budget(f"{(need[row.name] - 1) / 1024}KiB") != row.subnetwork


def test_extracted(model, variant):
    for row in model.frontier:
        size = model.resolve_budget(row["name"])
        stock = model.extract(size, pad=True)
        with torch.no_grad():
            assert difference(stock(IDS).logits, logits(model, size)) < 1e-5


def test_tokens_that_choose_share_one_set_of_weights(tmp_path):
    model = let_tokens_choose(corrected("gqa-wide-heads"))
    assert (
        difference(logits(model, "auto:0.6"), logits(let_tokens_choose(elastic_of("gqa-wide-heads")), "auto:0.6"))
        < 1e-5
    )
    model.save_pretrained(tmp_path)
    small = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget="auto:0.35")
    for budget in ("auto:0.35", "0.35", "0.15"):
        assert difference(logits(small, budget), logits(model, budget)) < 1e-5


def test_generation_with_a_cache_is_that_without(one):
    for row in one.frontier:
        settings = {"flextron_budget": row["name"], "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(one.generate(IDS, **settings), one.generate(IDS, use_cache=False, **settings))


def test_a_row_trains_what_it_owns(one, tmp_path):
    model = copy.deepcopy(one)
    before = {name: parameter.clone() for name, parameter in own_parameters(model).items()}
    model(IDS, labels=IDS, flextron_budget="0.35").loss.backward()
    number = number_of_owner(model.model.owners, model.resolve_budget("0.35"))
    for name, parameter in own_parameters(model).items():
        assert (parameter.grad is not None and parameter.grad.any()) == (f"corrections.{number}." in name), name
    model.zero_grad()
    run = trainer(tmp_path, model=model, save_strategy="steps", save_steps=4)
    run.train()
    assert all(difference(parameter, before[name]) > 0 for name, parameter in own_parameters(run.model).items())
    resumed = trainer(tmp_path, model=copy.deepcopy(one), save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, parameter in own_parameters(run.model).items():
        assert difference(parameter, own_parameters(resumed.model)[name]) < 1e-6, name
    small = FlextronForCausalLM.from_pretrained(tmp_path / "checkpoint-8", flextron_budget="0.35")
    assert difference(logits(small), logits(run.model, "0.35")) < 1e-5


def test_an_adapter_beside_corrections(one, tmp_path):
    pytest.importorskip("peft")
    one.save_pretrained(tmp_path / "model")
    adapted = with_adapter(FlextronForCausalLM.from_pretrained(tmp_path / "model"), init_lora_weights=False)
    assert not [name for name, _ in adapted.named_parameters() if "lora" in name and "corrections" in name]
    with torch.no_grad():
        expected = {row["name"]: adapted(IDS, flextron_budget=row["name"]).logits for row in one.frontier}
    adapted.save_pretrained(tmp_path / "adapter")
    for name, logit in expected.items():
        small = FlextronForCausalLM.from_pretrained(tmp_path / "model", flextron_budget=name)
        small.load_adapter(tmp_path / "adapter")
        assert difference(logits(small), logit) < 1e-5
    merged = adapted.merge_and_unload()
    assert all(difference(logits(merged, name), logit) < 1e-5 for name, logit in expected.items())


def test_compiled(one):
    torch._dynamo.reset()
    compiled = torch.compile(one, backend="eager", fullgraph=True)
    for row in one.frontier[1:2]:  # one that has corrections
        size = one.resolve_budget(row["name"])
        with torch.no_grad():
            assert difference(compiled(IDS, flextron_budget=size).logits, logits(one, size)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o_proj": [1]}, "rank in each of the"),
        ({"down_proj": [-1] * 4}, "rank in each of the"),
        ({"subnetwork": {"mlp": 7}}, "choices on the `mlp` axis"),
        ({"name": 3}, "name of a row"),
        ({"more": 3}, "list of dicts"),
    ],
)
def test_other_things_are_no_owners(one, change, message):
    config = one.config.to_dict()
    config["corrections"] = [{**config["corrections"][0], **change}]
    with pytest.raises(ValueError, match=message):
        FlextronConfig(**config)


def test_another_choice_of_sizes_drops_them(one, tmp_path):
    one.save_pretrained(tmp_path)
    config = FlextronConfig.from_pretrained(tmp_path, elastic={"mlp": [96, 48]})
    assert config.corrections is None


@pytest.mark.parametrize("family", ["gqa-wide-heads", "gpt2"])
def test_conversion_fits_what_lowers_the_loss(family, tmp_path, caplog):
    data = torch.randint(0, 96, (32, 24), generator=torch.Generator().manual_seed(2))
    parent = parent_of(family)
    plain, model = (elastic_of(family, parent, order="norms", corrections=share) for share in (0, 0.05))
    assert difference(logits(model), parent(IDS).logits) < 1e-5
    for row in model.frontier[1:]:
        loss, before = (mean_loss(one, one.resolve_budget(row.name), [data]) for one in (model, plain))
        assert loss < before or row.name not in {owner.name for owner in model.model.owners}
    assert len(model.model.owners) >= 2
    for owner in model.model.owners:  # which fits its budget with what it owns
        size, own = count_parameters(model.config, owner.subnetwork, embeddings=False), owner.parameters(model.config)
        assert own <= 0.05 * size
        assert size + own <= float(owner.name) * model.config.parent_size() or owner.name == "0.15"
    model.export(tmp_path)
    assert verify(tmp_path)["rows"] == ["0.15", "0.35", "0.6", "everything"]
    small = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget="0.6")
    assert difference(logits(small), logits(model, "0.6")) < 1e-5
    write_model_card(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "corrections, which loading at a size folds into its weights" in card
    assert "the smaller sizes are slices of the parent, with corrections fitted to it." in card
    assert all(f"owns {owner.parameters(model.config):,} parameters" in card for owner in model.model.owners)


def test_a_row_that_loses_more_than_a_smaller_one_is_said():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_reversals({"0.3": 5.33, "0.35": 5.334, "0.5": 6.49, "0.75": 6.0, "0.8": 3.88})
    heads = [str(each.message).partition(" on ")[0] for each in said]
    assert heads == [f"Row {name!r} loses more than the smaller row '0.3'" for name in ("0.5", "0.75")]
    assert "(6.49 and 5.33 nats a token)" in str(said[0].message)


@pytest.mark.parametrize("reversed_", [False, True])
def test_a_conversion_says_so(reversed_, monkeypatch):
    def loss(model, subnetwork, batches):
        size = count_parameters(model.config, subnetwork) / 1e5
        return size if reversed_ else -size

    monkeypatch.setattr("flextron_trainer.conversion.corrections.mean_loss", loss)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        elastic_of("mha", parent_of("mha"), order="norms", corrections=0.05)
    assert any("loses more" in str(each.message) for each in said) is reversed_


@pytest.mark.parametrize(("data", "share"), [("weights", 0.03), (IDS, -0.1), (IDS, 1.0)])
def test_corrections_need_text_and_a_fraction(data, share):
    with pytest.raises(ValueError, match="fitted to calibration data"):
        convert(parent_of("mha"), data, corrections=share)


def test_what_smaller_rows_own_takes_memory(one, tmp_path, monkeypatch):
    """`fit` and `sizes` count what will be loaded; and a row is loaded by its name though its budget had room."""
    one.save_pretrained(tmp_path)
    rows = {entry["name"]: entry for entry in flextron("sizes", tmp_path, "--context", 8, "--device", "cpu")["rows"]}
    for row in one.frontier:
        small = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=row.name)
        assert small.built == row.subnetwork.within(row.subnetwork)
        need = 4 * small.num_parameters() + kv_cache_bytes(one.config, row.subnetwork, 8)
        assert rows[row.name]["memory"] == {"8": need}
        monkeypatch.setattr(fit, "free_memory", lambda device, need=need: need)
        settings = {"flextron_budget": "fit:1", "flextron_context": 8}
        assert FlextronForCausalLM.from_pretrained(tmp_path, **settings).built == small.built
