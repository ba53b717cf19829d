"""Latency tables: what is measured, what is predicted from it, and budgets in milliseconds."""

import json
import logging
import random
import re
from dataclasses import replace

import pytest
import torch
from helpers import all_sizes, elastic_of, flextron, run_python

from flextron_trainer.measuring import latency as module
from flextron_trainer.measuring.latency import entry_of, file_of, measure_latency, write_table
from modeling_flextron import FlextronConfig, FlextronForCausalLM
from modeling_flextron.budgets import resolve
from modeling_flextron.latency import LENGTHS, MODES, LatencyTable, device_name, nearest


def additive(network) -> float:
    """A made-up time in which parts add up."""
    layers = sum(2e-6 * mlp + 3e-5 * heads for mlp, heads in zip(network.mlp, network.heads, strict=True))
    return (1e-3 + layers + 5e-4 * len(network.layers)) * network.hidden / 64


@pytest.fixture
def clock(monkeypatch):
    """Rounds that take no time, with `additive` times and noise; counts them, and may fail in one."""

    class Clock:
        rounds, fail_in, noise = 0, None, 0.0

    def round_(self, networks, generator):
        Clock.rounds += 1
        if Clock.rounds == Clock.fail_in:
            raise KeyboardInterrupt
        noise = [1 + Clock.noise * generator.uniform(-1, 1) for _ in networks]
        times = [additive(network) * factor for network, factor in zip(networks, noise, strict=True)]
        return {"decode": times, "prefill": [10 * t for t in times]}

    monkeypatch.setattr(module._Runner, "round", round_)
    monkeypatch.setattr(module._Runner, "drafting", lambda self: {})
    return Clock


def saved_with_table(model, folder, **changes):
    model.save_pretrained(folder)
    table = measure_latency(model, rounds=1, context=8)
    for key, value in changes.items():
        object.__setattr__(table, key, value)
    write_table(table, folder / file_of(table))
    config = FlextronConfig.from_pretrained(folder)
    config.latency_tables[file_of(table)] = entry_of(table)
    config.to_json_file(folder / "config.json")
    return table


def test_additive_times_are_predicted_exactly(elastic, clock):
    table = measure_latency(elastic, rounds=2, context=8)
    for network in all_sizes(elastic, 20):
        assert table.predict(network) == pytest.approx(additive(network))
        assert table.predict(network, "prefill") == pytest.approx(10 * additive(network))
    for mode in MODES:
        assert table.errors[mode]["worst"] < 1e-9 and len(table.errors[mode]["points"]) == 10
        assert set(table.costs[mode]) == {str(size) for size in elastic.config.choices("hidden")}
        for costs in table.costs[mode].values():
            assert set(costs["mlp"]) == {str(size) for size in elastic.config.choices("mlp")}
            assert set(costs["heads"]) == {str(size) for size in elastic.config.choices("heads")}


def test_noise_shows_in_spread_and_error(clock):
    clock.noise = 0.2
    table = measure_latency(elastic_of("mha"), rounds=20, context=8)
    assert 0.1 < table.spread["decode"] < 0.3 and 0 < table.errors["decode"]["worst"] < 0.2


def test_a_real_measurement(tmp_path):
    model = elastic_of("mha")
    table = measure_latency(model.train(), rounds=2, context=16, batch=2, checks=3)
    assert model.training
    for mode in MODES:
        assert all(table.predict(network, mode) > 0 for network in [model.built])
    assert table.conditions["batch"] == 2 and table.conditions["versions"]["torch"] == torch.__version__
    assert table.device == device_name("cpu") and table.drafting == {}  # which needs batch 1
    write_table(table, tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json", model.config) == table


def test_what_drafting_adds_is_told_apart():
    parts = {"token": 5.0, "draft": 1.5}
    rounds = [parts | {"1": 6.0, "2": 9.0, "4": 13.0, "8": 20.0}] * 3
    table = module._drafting(rounds, decode=4.5)
    assert table == {"loop": 0.5, "more": {"1": 0.0, "2": 1.0, "4": 2.0, "8": 3.0}}
    assert module._drafting([*rounds, {}], decode=4.5) == {}


def test_the_context_is_what_the_model_has_room_for(clock):
    assert measure_latency(elastic_of("mha"), rounds=1).conditions["context"] == 127


def test_an_interrupted_measurement_goes_on(clock, tmp_path):
    model, clock.fail_in = elastic_of("mha"), 4
    options = {"rounds": 6, "context": 8, "progress": tmp_path / "rounds.json"}
    with pytest.raises(KeyboardInterrupt):
        measure_latency(model, **options)
    assert clock.rounds == 4 and (tmp_path / "rounds.json").is_file()
    clock.fail_in = None
    table = measure_latency(model, **options)
    assert clock.rounds == 4 + 3 and table.conditions["rounds"] == 6
    assert not (tmp_path / "rounds.json").exists()
    (tmp_path / "rounds.json").write_text(json.dumps({"conditions": {"other": 1}, "rounds": [{}] * 6}))
    measure_latency(model, **options)
    assert clock.rounds == 7 + 6  # rounds of other conditions are not used


@torch.no_grad()
def test_budgets_in_milliseconds(elastic, clock, ids, tmp_path, caplog):
    table = saved_with_table(elastic, tmp_path / "model")
    rows = elastic.frontier
    times = [1e3 * additive(elastic.resolve_budget(row["name"])) for row in rows]
    family = FlextronForCausalLM.from_pretrained(tmp_path / "model")
    for row, milliseconds in zip(rows, times, strict=True):
        text = f"{milliseconds + 1e-6:.6f}ms"
        loaded = FlextronForCausalLM.from_pretrained(tmp_path / "model", flextron_budget=text)
        assert loaded.num_parameters() == row["parameters"]
        assert family.resolve_budget(text) == elastic.resolve_budget(row["name"])
        smaller = loaded.frontier[-1]
        assert loaded.resolve_budget(f"{times[-1] + 1e-6:.6f}ms") == loaded.resolve_budget(smaller["name"])
    with pytest.raises(ValueError, match=rf"{table.device[:5]}.*Ask for at least that"):
        family.set_budget(f"{times[-1] * 0.99:.6f}ms")
    family.save_pretrained(tmp_path / "again")
    again = FlextronForCausalLM.from_pretrained(tmp_path / "again", flextron_budget="1s")
    assert (tmp_path / "again" / file_of(table)).is_file() and again.num_parameters() == rows[0]["parameters"]
    assert not [record for record in caplog.records if "Latency budgets" in record.message]


def test_tables_are_read_at_the_revision_of_their_model(elastic, clock, tmp_path, monkeypatch):
    saved_with_table(elastic, tmp_path)
    asked: list[dict] = []

    def find(source, file, **where):
        asked.append(where)
        return str(tmp_path / file)

    monkeypatch.setattr("modeling_flextron.latency.cached_file", find)
    config = FlextronConfig.from_pretrained(tmp_path, revision="older")
    resolve(config, "1s")
    assert "_read_at" not in config.to_dict() and asked[-1] == {"revision": "older"}
    FlextronForCausalLM.from_pretrained(tmp_path, config=config, revision="oldest", flextron_budget="1s")
    assert asked[-1] == {"revision": "oldest"}


def test_the_table_of_another_device_is_used_and_named(clock, tmp_path, caplog):
    from transformers.utils import logging as transformers_logging

    model = elastic_of("mha")
    saved_with_table(model, tmp_path, device="Another processor")
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="modeling_flextron.latency"):
        FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget="1s")
    transformers_logging.disable_propagation()
    assert "use the table of Another processor; this machine has" in caplog.text


def test_the_nearest_table():
    def table(device, kind, dtype="float32", batch=1):
        return {"device": device, "kind": kind, "dtype": dtype, "batch": batch, "context": 512}

    tables = {
        "a": table("Xeon", "cpu"),
        "b": table("H200", "cuda", "bfloat16"),
        "c": table("EPYC", "cpu", "bfloat16"),
        "d": table("H200", "cuda"),
        "e": table("H200", "cuda", batch=8),
    }
    assert nearest(tables, "cpu", "Xeon", "bfloat16") == "a"
    assert nearest(tables, "cuda", "H200", "float32") == "d"
    assert nearest(tables, "cuda", "A100", "bfloat16") == "b"
    assert nearest(tables, "cpu", "Ryzen", "bfloat16") == "c"


def test_bad_tables_are_refused(clock, tmp_path):
    model = elastic_of("mha")
    table = saved_with_table(model, tmp_path)
    path = tmp_path / file_of(table)
    good = path.read_text()
    with pytest.raises(ValueError, match="needs\\. Make one on this machine with `flextron measure`"):
        model.resolve_budget("25ms")
    other = elastic_of("gqa-wide-heads")
    with pytest.raises(ValueError, match="measured on a model with `heads`"):
        LatencyTable.load(path, other.config)
    for broken in ("", "{", "[]", good.replace('"mlp"', '"lmp"'), json.dumps({**json.loads(good), "more": 1})):
        path.write_text(broken)
        with pytest.raises(ValueError, match=rf"{path.name}.*cannot be used.*`flextron measure`"):
            FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget="1s")
    path.unlink()
    with pytest.raises(OSError, match=path.name):
        FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget="1s")
    kept = FlextronForCausalLM.from_pretrained(tmp_path)  # any other budget needs no table
    kept.save_pretrained(tmp_path / "without")
    assert FlextronConfig.from_pretrained(tmp_path / "without").latency_tables == {}
    for entry in (
        {"../../etc.json": entry_of(table)},
        {"latency/x.json": {}},
        {"/latency/x.json": entry_of(table)},
        "x",
    ):
        with pytest.raises(ValueError, match="`latency_tables`="):
            FlextronConfig(latency_tables=entry)
    for name, value in (("batch", 0), ("rounds", 0), ("context", 128)):
        with pytest.raises(ValueError, match=f"`{name}`={value}"):
            measure_latency(model, **{"rounds": 1, "context": 8, name: value})


def places(value, path=()):
    """Every place in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


DAMAGE = (
    None, True, -1, 0, -1e30, 1e30, float("nan"), float("-inf"), 10**400, "", "x", "1", [], [1], ["x"], {}, {"x": 1}
)  # fmt: skip


def damaged(good: str, seed: int) -> tuple[str, tuple]:
    """A table with something in it deleted or replaced, or cut off; and where."""
    generator, table = random.Random(seed), json.loads(good)
    if seed % 10 == 0:
        return good[: generator.randrange(len(good))], ()
    field = generator.choice(list(table))
    where = generator.choice([path for path in places(table) if path[0] == field])
    *outer, key = where
    for step in outer:
        table = table[step]
    if generator.random() < 0.3:
        del table[key]
    else:
        table[key] = generator.choice(DAMAGE)
    root = json.loads(good)
    return json.dumps(_with(root, outer, table)), where


def _with(root, outer, value):
    if not outer:
        return value
    root[outer[0]] = _with(root[outer[0]], outer[1:], value)
    return root


def test_a_damaged_table_is_refused_or_harmless(clock, tmp_path):
    """Whatever happens to its file: the error names file and field, or every use of it works."""
    model = elastic_of("mha")
    table = saved_with_table(model, tmp_path, drafting={"loop": 0.0, "more": dict.fromkeys("1248", 1e-4)})
    path, good = tmp_path / file_of(table), (tmp_path / file_of(table)).read_text()
    sizes, taken = all_sizes(model, 4), 0
    tables = [damaged(good, seed) for seed in range(200)]
    for value in (1, 1e5, -1, 0):  # where a table says twice what it is
        slow = json.loads(good)
        slow["costs"]["decode"]["64"]["layer"] = value
        tables.append((json.dumps(slow), ("costs", "layer")))
    for text, where in tables:
        path.write_text(text)
        try:
            found = LatencyTable.load(path, model.config)
        except ValueError as error:
            assert str(path) in str(error) and "`flextron measure`" in str(error), (where, error)
            named = {str(each) for each in where[:1]} | ({"costs"} if "shape" in where else set())  # of other sizes
            assert not where or any(f"['{field}']" in str(error) for field in named) or len(where) == 1, (where, error)
            continue
        taken += 1
        assert file_of(found) and entry_of(found)
        if found.drafting:
            assert all(found.drafting["loop"] + found.drafting["more"][str(length)] >= 0 for length in LENGTHS)
        for mode in MODES:
            for size in sizes:  # another time of a part is one that might have been measured
                assert abs(found.predict(size, mode)) < 1e9, where
            assert found.predict(model.built, mode) > 0, where
    assert 0 < taken < 200


@pytest.mark.parametrize("device", ["Procesador Ñandú 3", "名前", "İ", "²", "  ", "-"])
def test_a_device_may_have_any_name(clock, tmp_path, device):
    model = elastic_of("mha")
    table = saved_with_table(model, tmp_path, device=device)
    assert re.fullmatch(r"latency/[a-z0-9-]+\.json", file_of(table))
    assert FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget="1s").latency_table.device == device
    others = [file_of(replace(table, device=other)) for other in ("Procesador Ñandú 4", "名", "²²")]
    assert file_of(table) not in others


def test_a_config_lists_tables_that_can_be_told_apart():
    good = {"device": "x", "kind": "cpu", "dtype": "float32", "batch": 1, "context": 8}
    assert FlextronConfig(latency_tables={"latency/ñ.json": good}).latency_tables  # as older versions wrote them
    for file, entry in (
        (3, good), ("latency/../x.json", good), ("latency/.json", good), ("latency/a/b.json", good), ("x.json", good),
        *(("latency/x.json", {**good, field: value}) for field in good for value in (None, [], True, 0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="`latency_tables"):
            FlextronConfig(latency_tables={file: entry})


def test_damaged_rounds_are_measured_again(clock, tmp_path, caplog):
    model, path = elastic_of("mha"), tmp_path / "rounds.json"
    clock.fail_in = 3
    with pytest.raises(KeyboardInterrupt):
        measure_latency(model, rounds=3, context=8, progress=path)
    kept, clock.fail_in = json.loads(path.read_text()), None
    for damage in ("", "{", "[]", "{}", json.dumps(kept | {"rounds": [{}]}), json.dumps(kept | {"rounds": 3})):
        path.write_text(damage)
        clock.rounds = 0
        table = measure_latency(model, rounds=2, context=8, progress=path)
        assert clock.rounds == 2 and table.conditions["rounds"] == 2


def test_the_command_and_loading_without_the_package(tmp_path):
    elastic_of("mha").save_pretrained(tmp_path / "model")
    options = ("--rounds", 2, "--context", 16, "--device", "cpu")
    result = flextron("measure", tmp_path / "model", *options)
    assert set(result["error"]) == set(MODES) and set(result["decode_ms"]) == {"1", "0.6", "0.35", "0.15"}
    half = flextron("measure", tmp_path / "model", *options, "--dtype", "bfloat16")
    tables = FlextronConfig.from_pretrained(tmp_path / "model").latency_tables
    assert len(tables) == 2 and {table["dtype"] for table in tables.values()} == {"float32", "bfloat16"}
    assert result["table"] != half["table"]
    measured = json.loads((tmp_path / "model" / result["table"]).read_text())["drafting"]
    assert set(measured["more"]) == {"1", "2", "4", "8"} and measured["loop"] >= 0
    slow = max(result["decode_ms"].values())
    code = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, flextron_budget=sys.argv[2])
options = {"input_ids": torch.tensor([[3, 4, 5]]), "max_new_tokens": 6, "do_sample": False}
assert torch.equal(model.generate(**options), model.generate(draft_budget="auto", **options))
print("SIZE", model.num_parameters())
"""
    assert "SIZE" in run_python(code, tmp_path / "model", f"{2 * slow:.3f}ms", package=False).stdout
    with pytest.raises(ValueError, match="not the folder of a saved model"):
        flextron("measure", tmp_path)


def test_measuring_takes_every_network_in_another_order_each_round():
    model, seen = elastic_of("mha"), []
    run = module._Runner(model, batch=1, context=4, seed=0)
    networks = all_sizes(model, 2)
    forward = model.forward

    def spy(*args, flextron_budget, **kwargs):
        seen.append(flextron_budget)
        return forward(*args, flextron_budget=flextron_budget, **kwargs)

    model.forward = spy
    run.round(networks, random.Random(0))
    run.round(networks, random.Random(1))
    calls = len(seen) // 2
    assert set(seen[:calls]) == set(seen[calls:]) == set(networks) and seen[:calls] != seen[calls:]
