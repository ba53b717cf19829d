"""Conversion: ranking, permutation, choices, the frontier. What it refuses is in test_bad_input.py."""

import math
from functools import partial
from itertools import pairwise
from unittest.mock import Mock

import datasets
import pytest
import torch
from helpers import CHOICES, all_sizes, difference, elastic_of, parent_of, run_python
from kinds import of_each_kind

from flextron_trainer import convert as convert_in_any_order
from flextron_trainer.conversion.convert import origin_of
from flextron_trainer.conversion.importance import Importance, fingerprint, fingerprint_of_data, measure, rank_layers
from flextron_trainer.conversion.orders import RANKINGS
from flextron_trainer.conversion.rows import mean_loss
from flextron_trainer.conversion.sizes import elastic_config, family_config
from flextron_trainer.conversion.transplant import transplant
from flextron_trainer.conversion.weights import ranked_heads, take
from flextron_trainer.layerwise import Walk, portions_of
from flextron_trainer.publishing.card import write_model_card
from modeling_flextron import FlextronForCausalLM, SubNetwork, count_parameters
from modeling_flextron.subnetwork import AXES, smallest_subnetwork

convert = partial(convert_in_any_order, order="importance")  # to choose an order takes four passes
DATA = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(2))


@of_each_kind
@torch.no_grad()
def test_from_a_folder_as_from_a_model(parent, ids, tmp_path):
    parent.save_pretrained(tmp_path / "parent")
    from_model = convert(parent, DATA, **CHOICES)
    from_folder = convert(tmp_path / "parent", DATA, **CHOICES)
    for (name, a), (_, b) in zip(from_model.named_parameters(), from_folder.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert from_folder.config.parent_name == "parent" and from_model.config.parent_name is None
    from_folder.config.parent_name = None
    assert from_model.config.to_dict() == from_folder.config.to_dict()


@of_each_kind
@torch.no_grad()
def test_a_model_given_by_the_user_stays_as_it_is(parent, ids):
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    elastic = convert(parent, DATA, **CHOICES)
    for parameter in elastic.parameters():
        parameter.fill_(0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items())


@of_each_kind
@pytest.mark.parametrize("order", ["importance", "norms", "variance", "obs", "random", "reverse"])
@torch.no_grad()
def test_every_order_keeps_the_function(parent, ids, order):
    expected = parent(ids).logits  # of which the largest are above 1, and rounding is relative
    close = 1e-5 * expected.abs().max()
    assert difference(convert(parent, DATA, order=order, **CHOICES)(ids).logits, expected) < close


@of_each_kind
@torch.no_grad()
def test_by_weights_only_when_asked_for(parent, ids):
    with pytest.raises(ValueError, match=r"`calibration`=None cannot be used.*'weights' to do that all the same"):
        convert(parent, **CHOICES)
    elastic = convert(parent, "weights", **CHOICES)
    assert difference(elastic(ids).logits, parent(ids).logits) < 2e-5


def test_scores_sort_every_axis():
    """The stored order is descending in the scores that the finished model itself measures."""
    for variant in ("mha", "gqa-wide-heads"):
        elastic = elastic_of(variant, sequence_length=24)
        scores = measure(elastic, [DATA])
        kv_heads = elastic.config.num_key_value_heads
        assert (scores.mlp.diff(dim=1) <= 1e-4).all()
        assert (scores.hidden.diff() <= 1e-3).all()
        groups = scores.heads.view(4, 1, -1) if variant == "mha" else scores.heads.view(4, kv_heads, -1)
        assert (groups.diff(dim=-1) <= 1e-4).all()


def test_scores_are_those_of_the_definition():
    """Minitron's aggregation, computed by hand at the places that stock hooks show."""
    parent = parent_of("gqa-wide-heads")
    seen = {}

    def keep(name):
        def hook(module, inputs, output=None):
            seen.setdefault(name, []).append(inputs[0] if output is None else output)

        return hook

    for i, layer in enumerate(parent.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(keep(f"mlp{i}"))
        layer.self_attn.o_proj.register_forward_pre_hook(keep(f"heads{i}"))
        layer.input_layernorm.register_forward_hook(keep(f"norm{i}a"))
        layer.post_attention_layernorm.register_forward_hook(keep(f"norm{i}b"))
    with torch.no_grad():
        states = parent(DATA, output_hidden_states=True).hidden_states

    def score(name):
        return torch.cat(seen[name]).abs().mean(dim=1).square().sum(dim=0).sqrt()

    config = family_config(parent.config, dict.fromkeys(("mlp", "heads", "hidden", "depth")))
    unpermuted = take(parent, config, release=False)
    found = measure(unpermuted, list(DATA.split(5)))
    torch.testing.assert_close(found.mlp, torch.stack([score(f"mlp{i}") for i in range(4)]))
    by_head = torch.stack([score(f"heads{i}").view(8, 16).norm(dim=-1) for i in range(4)])
    torch.testing.assert_close(found.heads, by_head)
    torch.testing.assert_close(found.hidden, sum(score(f"norm{i}{p}") for i in range(4) for p in "ab"))
    turn = 1 - torch.cosine_similarity(states[0], states[1], dim=-1).mean()
    torch.testing.assert_close(found.layers[0], turn, atol=2e-3, rtol=0.02)  # batches of unequal size


def test_heads_are_ranked_inside_their_groups():
    scores = torch.tensor([1.0, 5.0, 2.0, 9.0, 8.0, 7.0])  # two groups of three
    assert ranked_heads(scores, 2) == [1, 3, 2, 4, 0, 5]
    assert ranked_heads(scores, 6) == [3, 4, 5, 1, 2, 0]
    assert ranked_heads(scores, 1) == [3, 4, 5, 1, 2, 0]


@of_each_kind
def test_scores_are_saved_and_used_again(parent, tmp_path, monkeypatch):
    path = tmp_path / "scores" / "importance.safetensors"
    first = convert(parent, DATA, importance=path, mlp=[1, 0.5], depth=[1, 0.75])
    monkeypatch.setattr("flextron_trainer.conversion.importance.measure", None)  # a second measurement would fail
    monkeypatch.setattr("flextron_trainer.conversion.importance.rank_layers", None)
    again = convert(parent, DATA, importance=path, mlp=[1, 0.25], depth=[1, 0.75])
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again.config.choices("mlp") == [96, 24]


def test_scores_of_other_data_are_measured_again(tmp_path):
    path, parent = tmp_path / "importance.safetensors", parent_of("gqa-wide-heads")
    convert(parent, DATA, importance=path)
    with pytest.warns(UserWarning, match="other calibration data"):
        again = convert(parent, DATA.flip(1) % 50, importance=path)
    fresh = convert(parent, DATA.flip(1) % 50)
    for (name, a), (_, b) in zip(fresh.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_layers_are_dropped_in_the_order_of_the_least_error():
    parent = parent_of("mha")
    with torch.no_grad():  # layer 2 does nothing, layer 1 little
        for name, parameter in parent.named_parameters():
            if "layers.2." in name and ("o_proj" in name or "down_proj" in name):
                parameter.zero_()
            if "layers.1." in name and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(0.01)
    for data in (DATA, "weights"):
        elastic = convert(parent, data, depth=[1, 0.5])
        assert elastic.config.elastic["layer_ranking"] == [2, 1]


@pytest.mark.parametrize("variant", ["mha", "gqa-tied-llama3", "gpt2", "neox", "qwen2"])
@torch.no_grad()
def test_layers_are_ranked_by_the_logits_without_computing_them(variant, monkeypatch):
    parent = parent_of(variant)
    model = take(parent, family_config(parent.config, dict.fromkeys(AXES)), release=False)
    batches = list(DATA[:6].split(4))
    remaining, expected = list(range(4)), []
    for _ in range(2):
        errors = {}
        for layer in set(remaining) - model.config.anchors():
            kept = tuple(other for other in remaining if other != layer)
            part = SubNetwork(64, kept, (96,) * len(kept), (model.built.heads[0],) * len(kept))
            errors[layer] = sum(
                (model(ids).logits - model(ids, flextron_budget=part).logits).square().sum() for ids in batches
            )
        expected.append(min(errors, key=errors.get))
        remaining.remove(expected[-1])
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits"))
    assert rank_layers(model, batches, 2).tolist() == expected


@torch.no_grad()
def test_running_layer_by_layer_is_running_the_model(elastic, ids):
    for subnetwork in all_sizes(elastic, 3):
        (states,) = Walk(elastic, subnetwork).all([ids])
        torch.testing.assert_close(states, elastic.model(ids, flextron_budget=subnetwork).last_hidden_state)
    assert [len(part) for part in portions_of([ids] * 5, 2 * ids.numel())] == [2, 2, 1]
    batches = list(torch.zeros(10, 4).split(3))
    assert [len(next(portions_of(batches, count))) for count in (1, 12, 23, 24, 1000)] == [1, 1, 1, 2, 4]


def test_second_moments_are_kept_and_used_again(tmp_path, monkeypatch):
    same = {"mlp": [1, 0.5], "heads": [1, 0.5], "budgets": [1, 0.7], "order": "obs", "moments": tmp_path / "moments"}
    first = convert(parent_of("gqa-wide-heads"), DATA, **same)
    assert len(list((tmp_path / "moments").iterdir())) == 2 * 4
    monkeypatch.setattr("flextron_trainer.conversion.reconstruction.run_half", None)  # measured no more
    again = convert(parent_of("gqa-wide-heads"), DATA, **same)
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    (tmp_path / "moments" / "layer-000-mlp.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"`moments`=.* is not a file of second moments"):
        convert(parent_of("gqa-wide-heads"), DATA, **same)
    with pytest.raises(TypeError):  # on other text they are measured
        convert(parent_of("gqa-wide-heads"), DATA.flip(1), **same)


def test_what_a_conversion_took_stays_with_the_model():
    same = {"mlp": [1, 0.75, 0.5], "heads": [1, 0.5], "budgets": [1, 0.6], "sequence_length": 16, "batch_size": 4}
    made = convert(parent_of("mha"), DATA, **same, order="auto", search_evaluations=5).config.conversion
    assert made["order"] in RANKINGS and made["calibration_tokens"] == DATA.numel()
    search = made["search"]
    assert 0 < search["evaluations"] <= 5 and search["tokens"] == search["evaluations"] * DATA.numel()
    assert 0.3 * search["tokens"] < search["full_size_tokens"] < search["tokens"]
    assert convert(parent_of("mha"), "weights", **same).config.conversion == {"order": "weights"}


def test_sizes_of_one():
    elastic = convert(parent_of("mha"), DATA, heads=[4, 2, 1], depth=[4, 2, 1])
    assert elastic.config.choices("heads") == [4, 2, 1] and elastic.config.choices("depth") == [4, 2, 1]


@of_each_kind
def test_scores_of_another_parent_are_refused(parent, tmp_path):
    path = tmp_path / "importance.safetensors"
    convert(parent, DATA, importance=path)
    other = parent_of("mha", num_hidden_layers=3)
    with pytest.raises(ValueError, match="scores of another parent"):
        convert(other, DATA, importance=path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a file of importance scores"):
        convert(parent, DATA, importance=path)


def test_fingerprints_differ():
    a, b = parent_of("mha"), parent_of("mha")
    assert fingerprint(a) == fingerprint(b)
    with torch.no_grad():
        b.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert fingerprint(a) != fingerprint(b)


def test_calibrations_are_told_apart():
    config = elastic_of("mha").config
    ids = torch.arange(48).view(2, 24)
    found = [
        fingerprint_of_data(config, [ids]),
        fingerprint_of_data(config, [ids.view(8, 6)]),
        fingerprint_of_data(config, [ids], rotated=True),
        fingerprint_of_data(config, [ids + 1]),
    ]
    assert len(set(found)) == 4
    assert fingerprint_of_data(config, [ids[:1], ids[1:]]) == found[0]  # batches do not matter


@pytest.mark.parametrize(
    "data",
    [
        DATA,
        list(DATA),
        DATA.tolist(),
        [{"input_ids": row} for row in DATA.tolist()],
        datasets.Dataset.from_dict({"input_ids": DATA.tolist()}),
        datasets.Dataset.from_dict({"input_ids": DATA.tolist()}).to_iterable_dataset(),
    ],
    ids=["tensor", "tensors", "lists", "dicts", "dataset", "stream"],
)
def test_kinds_of_calibration_data(data):
    parent = parent_of("mha")
    expected = convert(parent, DATA, sequence_length=24)
    found = convert(parent, data, sequence_length=24)
    assert torch.equal(expected.model.layers[0].mlp.up_proj.weight, found.model.layers[0].mlp.up_proj.weight)


class TestFrontier:
    def test_rows_keep_their_budgets_and_nest(self, elastic):
        full = elastic.config.parent_size()
        rows = [elastic.config.resolve(row["subnetwork"]) for row in elastic.frontier]
        for row, sub in zip(elastic.frontier, rows, strict=True):
            assert count_parameters(elastic.config, sub, embeddings=False) <= float(row["name"]) * full
        for larger, smaller in pairwise(rows):
            assert larger.contains(smaller)

    def test_named_budgets_in_any_unit(self, parent):
        elastic = convert(parent, DATA, budgets={"all": 1, "half": "0.5", "tiny": 40_000, "phone": "1MiB"})
        assert {row["name"] for row in elastic.frontier} <= {"all", "half", "tiny", "phone"}

    def test_the_full_network_is_always_a_row(self):
        parent = parent_of("mha")
        for budgets, names in (([0.5], ["1", "0.5"]), ({"half": 0.5}, ["1", "half"]), (["1.0", 0.5], ["1.0", "0.5"])):
            elastic = convert(parent, DATA, budgets=budgets)
            assert [row["name"] for row in elastic.frontier] == names
            assert elastic.resolve_budget(names[0]) == elastic.config.built == elastic.resolve_budget(1)

    @pytest.mark.parametrize("budgets", [[100, 50], ["100", "50"], [1, "1KiB"]])
    def test_numbers_that_nothing_keeps_are_refused(self, budgets):
        """Percents, most likely, before anything is measured."""
        with pytest.raises(ValueError, match=r"`budgets\[.*The smallest sub-network costs [\d,]+ .*: 0\.5 is 50 %"):
            convert(parent_of("mha"), DATA, budgets=budgets)

    def test_what_cannot_be_reached_becomes_the_smallest_with_a_warning(self, parent):
        with pytest.warns(UserWarning, match="do not reach budget 0.01"):
            elastic = convert(parent, DATA, mlp=[1, 0.5], heads=[1, 0.5], budgets=[1, 0.01])
        row = elastic.frontier[-1]
        fraction = row["non_embedding_parameters"] / elastic.config.parent_size()
        assert 0 <= float(row["name"]) - fraction < 0.001
        assert elastic.resolve_budget(float(row["name"])) == elastic.resolve_budget(row["name"])

    def test_a_row_made_for_a_budget_answers_to_it(self):
        """Half of everything is a little more than half, because norms do not halve."""
        elastic = convert(parent_of("mha"), DATA, mlp=[1, 0.5], heads=[1, 0.5], budgets=[1, 0.5])
        row = elastic.frontier[-1]
        assert row["name"] == "0.5" and 0.5 < row["non_embedding_parameters"] / elastic.config.parent_size() < 0.505
        for budget in (0.5, "0.5", "0.50"):
            assert elastic.resolve_budget(budget) == elastic.resolve_budget(row["subnetwork"]) != elastic.built
        with pytest.raises(ValueError, match=r"smallest row of the frontier, '0\.5', costs"):
            elastic.resolve_budget(0.499)

    def test_axes_are_mixed_by_loss_and_not_by_size(self, monkeypatch):
        """Among the largest networks within a budget the one with the lowest measured loss is taken."""
        import importlib

        module = importlib.import_module("flextron_trainer.conversion.rows")
        monkeypatch.setattr(module, "mean_loss", lambda model, sub, batches: -sub.mlp[0])
        wide = elastic_of("mha", parent_of("mha"), budgets=[1, 0.5])
        monkeypatch.setattr(module, "mean_loss", lambda model, sub, batches: sub.mlp[0])
        narrow = elastic_of("mha", parent_of("mha"), budgets=[1, 0.5])
        mlp = [model.resolve_budget(0.5).mlp[0] for model in (wide, narrow)]
        assert mlp[0] > mlp[1]

    def test_rows_nest_whatever_the_losses_say(self, monkeypatch):
        """The larger row wants many heads, the smaller one many neurons: it gets those of the larger row at most."""
        import importlib

        def loss(model, sub, batches):
            large = count_parameters(model.config, sub, embeddings=False) > 0.5 * model.config.parent_size()
            return sub.mlp[0] if large else -sub.mlp[0]

        monkeypatch.setattr(importlib.import_module("flextron_trainer.conversion.rows"), "mean_loss", loss)
        elastic = elastic_of("mha", parent_of("mha"), budgets=[1, 0.7, 0.45], hidden=[1], depth=[1])
        larger, smaller = (elastic.resolve_budget(name) for name in ("0.7", "0.45"))
        assert larger.mlp[0] < 96 and larger.contains(smaller)


@pytest.mark.slow
def test_conversion_of_a_folder_holds_one_copy(tmp_path):
    """The memory that a conversion takes stays well below two copies of the weights (mapped files do not count)."""
    code = """
import threading, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from flextron_trainer import convert
folder = sys.argv[1]
shape = dict(vocab_size=2000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)
def memory():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, memory())
        time.sleep(0.002)
if sys.argv[2] == "save":
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
else:
    small = LlamaForCausalLM(LlamaConfig(**{**shape, "num_hidden_layers": 1, "intermediate_size": 64}))
    data = torch.randint(0, 2000, (4, 16))
    convert(small, data, order="variance")
    before = memory()
    threading.Thread(target=watch, daemon=True).start()
    model = convert(folder, data, order="variance")
    print("PEAK", peak - before, sum(p.numel() * 4 for p in model.parameters()))
"""
    run_python(code, tmp_path, "save")
    peak, size = (int(number) for number in run_python(code, tmp_path, "convert").stdout.split("PEAK")[1].split())
    assert size > 200e6
    assert 0.9 * size < peak < 1.3 * size


def test_importance_reordered_is_deterministic():
    scores = Importance(*(torch.rand(2, 3) for _ in range(2)), torch.rand(4), torch.rand(2), torch.empty(0).long())
    assert torch.equal(scores.reordered("random", 1).mlp, scores.reordered("random", 1).mlp)
    assert not torch.equal(scores.reordered("random", 1).mlp, scores.reordered("random", 2).mlp)
    assert torch.equal(scores.reordered("reverse", 1).hidden, -scores.hidden)


def test_the_parent_and_its_licence_are_remembered(tmp_path):
    folder = tmp_path / "parent"
    parent_of("mha").save_pretrained(folder)
    assert origin_of(str(folder)) == ("parent", None)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: ours\ntags: [a]\n---\n# Parent\n")
    expected = ("parent", {"license": "other", "license_name": "ours"})
    config = elastic_of("mha", folder).config
    assert (config.parent_name, config.parent_license) == expected
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert origin_of(str(folder)) == ("parent", None)
    assert origin_of("them/unreachable") == ("them/unreachable", None)
    assert origin_of(str(tmp_path / "gone")) == ("gone", None)
    assert elastic_of("mha").config.parent_name is None


def test_the_commit_of_a_parent_on_the_hub_is_remembered(tmp_path, monkeypatch):
    """Where it came from there; `transplant` reads the base at that commit, and the card names it."""
    commit, place = "a1" * 20, tmp_path / "hub" / "models--them--parent"
    parent_of("mha").save_pretrained(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    hub = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    elastic = convert_in_any_order("them/parent", "weights", mlp=[1, 0.5], **hub)
    elastic.save_pretrained(tmp_path / "out")
    config = FlextronForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.parent_name, config.parent_revision) == ("them/parent", commit)
    write_model_card(elastic, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"at commit [a1a1a1a](https://huggingface.co/them/parent/tree/{commit})" in card
    assert "revision" not in card.partition("# ")[0]  # metadata of the Hub has no such field
    asked = Mock(side_effect=InterruptedError)
    monkeypatch.setattr("flextron_trainer.conversion.transplant.plain_parent", asked)
    with pytest.raises(InterruptedError):
        transplant(elastic, parent_of("mha"))
    asked.assert_called_once_with("them/parent", trust_remote_code=False, revision=commit)
    assert elastic_of("mha").config.parent_revision is None


def test_searched_rows_beat_the_uniform_ones_within_their_budgets(monkeypatch):
    parent = parent_of("mha")
    same = {
        "mlp": [1, 0.75, 0.5, 0.25],
        "heads": [1, 0.5],
        "hidden": [1],
        "depth": [1],
        "budgets": [1, 0.7, 0.5],
        "sequence_length": 24,
    }
    uniform, searched = (convert(parent, DATA, **same, search_evaluations=count) for count in (0, 40))
    assert searched.config.frontier[0] == uniform.config.frontier[0]
    for one, other in zip(uniform.config.frontier[1:], searched.config.frontier[1:], strict=True):
        losses = [mean_loss(searched, searched.resolve_budget(row["subnetwork"]), [DATA]) for row in (one, other)]
        assert losses[1] < losses[0] and other["name"] == one["name"]
        assert other["non_embedding_parameters"] <= float(other["name"]) * searched.config.parent_size()
    worse = lambda config, *_, **__: (smallest_subnetwork(config), math.inf)  # noqa: E731
    monkeypatch.setattr("flextron_trainer.conversion.rows.search", worse)
    assert convert(parent, DATA, **same, search_evaluations=40).config.frontier == uniform.config.frontier
    with pytest.raises(ValueError, match="search_evaluations"):
        convert(parent, "weights", **same, search_evaluations=40)


def test_a_row_may_be_called_as_its_budget_among_others_with_names():
    rows = elastic_config(parent_of("mha").config, budgets={"1": 1, "0.5": 0.5, "small": 0.25}).frontier
    assert [row.name for row in rows] == ["1", "0.5", "small"]
    with pytest.raises(ValueError, match=r"`budgets`='0.5' .* is not another budget than its own"):
        elastic_config(parent_of("mha").config, budgets={"1": 1, "0.5": 0.4})
