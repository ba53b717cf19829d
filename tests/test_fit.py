"""`flextron_budget="fit"`: what is free on a device, and the best row that fits it."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import difference, elastic_of, flextron
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from typer.testing import CliRunner

from flextron_trainer.cli import app
from flextron_trainer.conversion.sizes import elastic_config
from flextron_trainer.measuring import sizes
from flextron_trainer.measuring.latency import entry_of, file_of
from modeling_flextron import FlextronForCausalLM, LatencyTable, fit, latency
from modeling_flextron.memory import free_memory, in_units
from modeling_flextron.subnetwork import kv_cache_bytes, memory_of, weight_bytes

GIB = 2**30


def machine(root, available: int, **files: int | str):
    """The files of a machine with so much memory available, below a folder."""
    text = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {available // 1024} kB\n"}
    for name, content in {**text, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


class TestFreeMemory:
    def test_of_this_machine(self):
        assert GIB // 64 < free_memory("cpu") == pytest.approx(free_memory(torch.device("cpu")), rel=0.5)

    def test_without_control_groups(self, tmp_path):
        assert free_memory("cpu", machine(tmp_path, 8 * GIB)) == 8 * GIB

    def test_version_2(self, tmp_path):
        """The group's own limit, that of the group around it, or neither; files that are kept can be dropped."""
        group = "sys/fs/cgroup/a/b/"
        files = {
            "proc/self/cgroup": "0::/a/b",
            group + "memory.max": "max",
            "sys/fs/cgroup/a/memory.max": 4 * GIB,
            "sys/fs/cgroup/a/memory.current": 3 * GIB,
            "sys/fs/cgroup/a/memory.stat": f"anon 7\ninactive_file {GIB}",
        }
        assert free_memory("cpu", machine(tmp_path, 8 * GIB, **files)) == 2 * GIB
        files |= {group + "memory.max": 2 * GIB, group + "memory.current": GIB, group + "memory.stat": "anon 7"}
        assert free_memory("cpu", machine(tmp_path, 8 * GIB, **files)) == GIB
        assert free_memory("cpu", machine(tmp_path, GIB // 2, **files)) == GIB // 2
        files |= {group + "memory.current": 3 * GIB}  # a limit that was lowered since
        assert free_memory("cpu", machine(tmp_path, GIB, **files)) == 0

    def test_version_1_in_a_container(self, tmp_path):
        """Whose group is not where its name says, but where the tree begins."""
        tree = "sys/fs/cgroup/memory/memory."
        files = {
            "proc/self/cgroup": "12:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1",
            tree + "limit_in_bytes": 2 * GIB,
            tree + "usage_in_bytes": GIB,
            tree + "stat": "total_inactive_file 5",
        }
        assert free_memory("cpu", machine(tmp_path, 8 * GIB, **files)) == GIB + 5
        files |= {tree + "limit_in_bytes": 9223372036854771712}
        assert free_memory("cpu", machine(tmp_path, 8 * GIB, **files)) == 8 * GIB

    def test_of_an_accelerator(self, monkeypatch):
        """What torch keeps for later is free, too."""
        module = SimpleNamespace(
            mem_get_info=lambda device: (5, 9), memory_reserved=lambda device: 3, memory_allocated=lambda device: 1
        )
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        assert free_memory("cuda:1") == 7
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
        monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 40)
        assert free_memory("mps") == 60

    def test_a_device_that_is_not_there(self):
        with pytest.raises(ValueError, match=r"`device`='cuda:7' .*is free cannot be read.*such as '6GiB'"):
            free_memory("cuda:7")

    def test_units(self):
        assert [in_units(n) for n in (5, 2048, 5.5 * 2**20, 2**41)] == ["5 B", "2.0 KiB", "5.5 MiB", "2,048.0 GiB"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in whole tensors and in levels."""
    model, root = elastic_of("mha"), tmp_path_factory.mktemp("fit")
    model.save_pretrained(root / "plain")
    model.export(root / "levels")
    return root / "plain", root / "levels"


@pytest.fixture
def said(monkeypatch):
    """The lines of the log."""
    lines = []
    monkeypatch.setattr(fit.logger, "warning", lines.append)
    return lines


def need(row: str, dtype=torch.float32, context: int = 128) -> int:
    config = elastic_of("mha").config
    sub = config.resolve(row)
    return weight_bytes(config, sub, dtype) + kv_cache_bytes(config, sub, context, dtype)


def limit(row: str, share: float = 0.8, **kwargs) -> dict:
    """Arguments with which as much is free as a row needs."""
    return {"max_memory": {"cpu": int(need(row, **kwargs) / share) + 1}}


@pytest.mark.parametrize("layout", [0, 1], ids=["plain", "levels"])
def test_the_best_row_that_fits_is_loaded(folders, layout, said):
    names = [row.name for row in elastic_of("mha").frontier]
    for name in names:
        model = FlextronForCausalLM.from_pretrained(folders[layout], flextron_budget="fit", **limit(name))
        expected = FlextronForCausalLM.from_pretrained(folders[layout], flextron_budget=name)
        assert model.built == expected.built and model.frontier[0].name == name
        assert difference(model(torch.tensor([[1, 2, 3]])).logits, expected(torch.tensor([[1, 2, 3]])).logits) == 0
    assert len(said) == len(names) and "none is larger" in said[0]
    assert re.search(r"'fit': .* of memory are free on cpu, of which 80% .* row '0\.6' needs .* 128 tokens", said[1])
    assert said[1].endswith(f"the next larger one, '1', needs {in_units(need('1'))}.")


def test_levels_are_read_for_that_row_alone(folders, said, tmp_path):
    """Of the others there are no files."""
    for path in folders[1].iterdir():
        if path.is_file() and not re.search(r"level[23]\.|model\.safetensors\.index", path.name):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget="fit", **limit("0.35"))
    assert model.frontier[0].name == "0.35"


def test_dtype_context_and_share_count(folders, said):
    def row(budget="fit", **kwargs):
        return FlextronForCausalLM.from_pretrained(folders[0], flextron_budget=budget, **kwargs).frontier[0].name

    assert row(**limit("0.6")) == "0.6"
    assert row(dtype=torch.bfloat16, **limit("0.6")) == "1"
    assert row(dtype="bfloat16", **limit("0.6", dtype=torch.bfloat16)) == "0.6"
    assert row(flextron_context=8, **limit("0.6", context=8)) == "0.6"
    assert row("fit:0.3", **limit("0.6", share=0.3)) == "0.6" == row("fit:1", **limit("0.6", share=1))
    assert row("fit:0.9", max_memory={"cpu": f"{need('0.35') / 0.9 / 2**20 + 1e-3}MiB"}) == "0.35"


def test_every_class_and_device_map(folders, said):
    repo = folders[1]
    for kind in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        for device_map in ("cpu", {"": "cpu"}, "auto"):
            model = kind.from_pretrained(repo, flextron_budget="fit", device_map=device_map, **limit("0.35"))
            assert model.built.hidden == elastic_of("mha").resolve_budget("0.35").hidden
    assert len(said) == 9 and model.config.flextron_budget is None


def test_devices(monkeypatch):
    assert fit.target_devices(None) == fit.target_devices("cpu") == {"cpu": torch.device("cpu")}
    assert fit.target_devices(torch.device("cuda:2")) == fit.target_devices("cuda:2") == {2: torch.device("cuda:2")}
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert fit.target_devices("cuda") == {3: torch.device("cuda:3")}
    both = {0: torch.device("cuda:0"), "cpu": torch.device("cpu")}
    assert fit.target_devices({"model": "cuda:0", "lm_head": "cpu", "model.norm": "disk"}) == both
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert list(fit.target_devices("auto")) == [0, 1] and list(fit.target_devices("auto", {1: 9, "cpu": 9})) == [1]
    monkeypatch.setattr(fit, "free_memory", lambda device: {"cuda": 10**9, "cpu": 5}[device.type])
    assert fit.fit(elastic_of("mha").config, "fit", "auto").hidden == 64


def test_what_does_not_fit(folders):
    least = in_units(need("0.15"))
    for free, words in ((10_000, "9.8 KiB of memory are free on cpu"), (0, "0 B of memory are free on cpu")):
        rule = rf"`flextron_budget`='fit' .*{words}, of which 80% .*smallest row, '0\.15', needs {least} .*'fit:1'"
        with pytest.raises(ValueError, match=rule):
            FlextronForCausalLM.from_pretrained(folders[0], flextron_budget="fit", max_memory={"cpu": free})
    with pytest.raises(ValueError, match=r"`flextron_budget`='fit:1\.5' .*lies in \(0, 1\]"):
        FlextronForCausalLM.from_pretrained(folders[0], flextron_budget="fit:1.5")


def test_a_model_in_memory_is_not_fitted_again(folders):
    model = elastic_of("mha")
    for call in (model.set_budget, model.config.resolve, lambda budget: model.generate(flextron_budget=budget)):
        with pytest.raises(ValueError, match=r"`flextron_budget`='fit' .*before weights are loaded.*from_pretrained"):
            call("fit")


class TestSizes:
    """`flextron sizes`."""

    def test_from_the_config_and_the_indices_alone(self, folders, tmp_path):
        model, (plain, levels) = elastic_of("mha"), folders
        for path in levels.glob("*.json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        found = flextron("sizes", tmp_path, "--context", 100, "--context", 8, "--device", "cpu")
        assert found["free"] > 2**20 and found["dtype"] == "float32"
        for entry, row in zip(found["rows"], model.frontier, strict=True):
            files = FlextronForCausalLM.from_pretrained(levels, flextron_budget=row.name)
            assert (entry["name"], entry["parameters"]) == (row.name, files.num_parameters())
            assert entry["memory"] == {str(tokens): need(row.name, context=tokens) for tokens in (8, 100)}
            assert entry["fits_tokens"] == 100 and "tokens_per_second" not in entry and "loss" not in entry
        downloads = [entry["download"] for entry in found["rows"]]
        assert downloads == sorted(downloads, reverse=True) and len(set(downloads)) == 4
        found = flextron("sizes", plain, "--dtype", "bfloat16", "--device", "cpu")
        stored = (plain / "model.safetensors").stat().st_size
        assert {entry["download"] for entry in found["rows"]} == {stored}
        assert found["rows"][0]["memory"] == {"128": need("1", torch.bfloat16)}  # as many as there are positions

    def test_people_read_one_table_in_units(self, folders):
        shown = CliRunner().invoke(app, ["sizes", str(folders[0]), "--device", "cpu"], env={"COLUMNS": "160"}).output
        assert shown.count("parameters") == 1 and "KiB" in shown and "128 tokens" in shown
        assert f"next: flextron generate {folders[0]} 'Once upon a time' --budget fit" in shown

    def test_what_was_measured_and_what_fits(self, monkeypatch, tmp_path):
        model = elastic_of("mha")
        figures = {row.name: {"loss": 2.0 + i, "arc/acc": 0.5} for i, row in enumerate(model.frontier)}
        model.config.record(figures, text="wiki")
        times = {"mlp": {str(size): 0.001 * size for size in model.config.choices("mlp")}, "layer": 0.0, "rest": 0.0}
        times["heads"] = {str(size): 0.0 for size in model.config.choices("heads")}
        costs = {"decode": {str(size): times for size in model.config.choices("hidden")}}
        conditions = {"kind": "cpu", "dtype": "float32", "batch": 2, "context": 9}
        shape = {**latency.shape_of(model.config), "layers": 4}
        for device in (latency.device_name("cpu"), "another"):
            config = copy.deepcopy(model.config)
            table = LatencyTable(device, conditions, shape, costs)
            monkeypatch.setattr(latency.LatencyTable, "load", lambda *_, table=table: table)
            monkeypatch.setattr(latency, "_beside", lambda *_: "")
            config.latency_tables = {file_of(table): entry_of(table)}
            config.save_pretrained(tmp_path)
            config.latency_tables = {file_of(table): entry_of(table)}
            (tmp_path / "model.safetensors").write_bytes(b"1234")
            rows = sizes.sizes_here(str(tmp_path), config, "cpu", int(need("0.35") / 0.8) + 1, [8, 128])
            assert [row["fits_tokens"] for row in rows] == [None, 8, 128, 128]
            assert [row["loss"] for row in rows] == [2.0, 3.0, 4.0, 5.0]
            shown = {column.head: column.cells[0] for column in sizes.table_of_sizes(rows).columns}
            assert (shown["fits now"], shown["loss"], shown["download"]) == ("no", "2.0000", "4 B")
            assert ("tokens/s" in shown) == ("tokens_per_second" in rows[0]) == (device != "another")
        model.config.latency_tables = {}

    def test_what_it_cannot_show(self, folders):
        for options, words in (
            (("--context", 0), "`context`=0 .*has 128 positions"),
            (("--context", 129), "`context`=129 .*has 128 positions"),
            (("--dtype", "float33"), "`dtype`='float33'"),
            (("--device", "cuda:9"), "`device`='cuda:9'"),
        ):
            with pytest.raises(ValueError, match=words):
                flextron("sizes", folders[0], *options)


class TestTolerance:
    """A row that is called by a budget answers to it, up to one percent above, whatever lies between."""

    def config(self, share: float, name: str = "0.5"):
        """A config whose smallest row costs this share of the parent, with one between that is better."""
        parent = LlamaConfig(hidden_size=96, num_attention_heads=12, intermediate_size=384, num_hidden_layers=8)
        config = elastic_config(parent, budgets=[1, 0.5])
        full, row = config.frontier
        config.parent_non_embedding_parameters = round(row.non_embedding_parameters / share)
        mlp = row.subnetwork.mlp
        larger = replace(row.subnetwork, mlp=(config.choices("mlp")[config.choices("mlp").index(mlp[0]) - 1], *mlp[1:]))
        config.frontier = [replace(full, name="full"), config.row("between", larger), replace(row, name=name)]
        assert 1 < config.frontier[1].non_embedding_parameters / row.non_embedding_parameters < 1.007
        config.record({"full": {"loss": 1.0}, "between": {"loss": 2.0}, name: {"loss": 2.5}}, text="wiki")
        return config, row.subnetwork, larger

    @pytest.mark.parametrize("share", [0.4963, 0.4951, 0.5002, 0.5049])
    def test_within(self, share):
        config, own, larger = self.config(share)
        for part in (config, config.narrowed(larger), config.narrowed(own)):
            held = part.resolve(0.5)
            assert held.mlp == own.mlp == part.resolve("0.50").mlp == part.resolve("0.5").mlp
            assert [row.name for row in part.frontier if row.subnetwork == held] == ["0.5"]
        if share > 0.5:  # an unnamed one, where nothing else is small enough
            named, own, _ = self.config(share, "half")
            assert named.resolve(0.5) == own
            with pytest.raises(ValueError, match="smallest row of the frontier, 'half', costs"):
                named.resolve(0.494)

    @pytest.mark.parametrize("share", [0.494, 0.3])
    def test_a_row_that_uses_less_than_its_name_allows(self, share):
        """As rows with corrections do: it is reached by its name, which a larger row would fit as well."""
        config, own, larger = self.config(share)
        assert config.resolve(0.5) == config.narrowed(larger).resolve("0.5") == own
        assert self.config(share, "half")[0].resolve(0.5) == larger

    def test_beyond(self):
        for name in ("0.5", "half"):
            with pytest.raises(ValueError, match="smallest row of the frontier"):
                self.config(0.506, name)[0].resolve(0.5)

    def test_memory_is_a_limit(self):
        config, own, _ = self.config(0.5, "half")
        assert config.resolve(f"{memory_of(config)(own) / 2**20 + 1e-3}MiB") == own
        with pytest.raises(ValueError, match="smallest row"):
            config.resolve(f"{memory_of(config)(own) / 2**20 * 0.995}MiB")

    def test_of_a_converted_model(self, tmp_path):
        """Half of everything is a little more than half, because norms do not halve."""
        halves = {"mlp": [1, 0.5], "heads": [1, 0.5], "hidden": [1], "depth": [1]}
        model = elastic_of("mha", budgets={"half": 0.5}, **halves)
        own = model.frontier[-1]
        assert own.name == "half" and 0.5 < own.non_embedding_parameters / model.config.parent_size() < 0.505
        model.set_budget(0.5)
        assert model.subnetwork == own.subnetwork
        model.set_budget(None)
        model.save_pretrained(tmp_path / "whole")
        loaded = FlextronForCausalLM.from_pretrained(tmp_path / "whole", flextron_budget=0.5)
        loaded.set_budget(0.5)
        assert loaded.subnetwork == own.subnetwork and loaded.frontier[0].name == "half"
        found = flextron("export", tmp_path / "whole", tmp_path / "small", "--plain", "--budget", "0.5")
        assert found["parameters"] == own.parameters
