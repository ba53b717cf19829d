"""Reading only what a budget needs, and writing so that nothing is half-written."""

import copy
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import difference, elastic_of, parent_of, run_python
from kinds import of_each_kind
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, pipeline

from flextron_trainer.files import write_file_beside
from modeling_flextron import FlextronConfig, FlextronForCausalLM, FlextronModel
from modeling_flextron.checkpoint import MARK, write_beside
from modeling_flextron.level_reader import Block, StoredTensor


@pytest.fixture(scope="module")
def model():
    return elastic_of("gqa-wide-heads")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def test_a_slice_is_read_when_it_is_indexed(saved):
    file = str(saved / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    with safe_open(file, framework="pt") as tensors:
        full = tensors.get_tensor(name)
    block = Block(file, name, tuple((0, size) for size in full.shape))
    part = StoredTensor([block], (5, 7), "F32")
    assert part.get_shape() == [5, 7] and part.get_dtype() == "F32"
    assert torch.equal(part[...], full[:5, :7]) and part[...].is_contiguous()
    assert torch.equal(part[1:3, 2], full[1:3, 2])
    assert part[...].untyped_storage().nbytes() == 5 * 7 * 4  # nothing of the rest stays alive


@torch.no_grad()
def test_loading_options(model, saved, ids):
    expected = model(ids, flextron_budget=0.35).logits
    load = AutoModelForCausalLM.from_pretrained
    assert difference(load(saved, flextron_budget="0.35", device_map="cpu")(ids).logits, expected) < 1e-5
    assert difference(load(saved, flextron_budget=0.35, device_map="auto")(ids).logits, expected) < 1e-5
    half = load(saved, flextron_budget=0.35, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and difference(half(ids).logits, expected) < 0.1 * expected.abs().max()
    config = FlextronConfig.from_pretrained(saved)
    assert difference(load(saved, config=config, flextron_budget=0.35)(ids).logits, expected) < 1e-5
    assert config.flextron_budget is None
    config.flextron_budget = 0.35
    small = AutoModelForCausalLM.from_config(config)
    assert small.num_parameters() == model.frontier[2]["parameters"]
    base = FlextronModel.from_pretrained(saved, flextron_budget=0.35)
    states = model.model(ids, flextron_budget=model.resolve_budget(0.35)).last_hidden_state
    assert difference(base(ids).last_hidden_state, states) < 1e-5


@of_each_kind
@torch.no_grad()
@pytest.mark.parametrize("share", [0, 0.4], ids=["all", "most"])
def test_offload_to_disk(elastic, ids, tmp_path, share):
    """The whole family, and at a budget: run, switched, generating, extracted."""
    elastic.save_pretrained(tmp_path / "saved")
    row, smaller = elastic.frontier[1:3]
    for budget, size in ((None, elastic.num_parameters()), (row["name"], row["parameters"])):
        loaded = FlextronForCausalLM.from_pretrained(
            tmp_path / "saved",
            flextron_budget=budget,
            device_map="auto",
            max_memory={"cpu": int(share * 4 * size)},
            offload_folder=tmp_path / str(budget),
        )
        assert "disk" in loaded.hf_device_map.values()
        assert ("cpu" in loaded.hf_device_map.values()) == (share > 0)
        expected = elastic.resolve_budget(budget or elastic.built)
        assert difference(loaded(ids).logits, elastic(ids, flextron_budget=expected).logits) < 1e-5
        expected = elastic.resolve_budget(smaller["name"])
        loaded.set_budget(smaller["name"])
        assert difference(loaded(ids).logits, elastic(ids, flextron_budget=expected).logits) < 1e-5
        options = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **options), elastic.generate(ids, flextron_budget=expected, **options))
        stock = loaded.extract(pad=True)
        assert difference(stock(ids).logits, elastic(ids, flextron_budget=expected).logits) < 1e-5


@of_each_kind
def test_pipeline_passes_the_budget(elastic, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    elastic.save_pretrained(tmp_path)
    row = elastic.frontier[2]
    kwargs = {"flextron_budget": row["name"]}
    write = pipeline("text-generation", str(tmp_path), tokenizer=tokenizer, model_kwargs={**kwargs})
    assert write.model.num_parameters() == row["parameters"]
    assert write("w5 w6 w7", max_new_tokens=3)[0]["generated_text"].startswith("w5 w6 w7")
    family = pipeline("text-generation", model=elastic, tokenizer=tokenizer)
    said = [pipe("w5 w7", max_new_tokens=5, do_sample=False, **more) for pipe, more in ((write, {}), (family, kwargs))]
    assert said[0] == said[1]


@torch.no_grad()
def test_a_loaded_part_saves_as_itself(model, saved, ids, tmp_path):
    for budget in ("0.35", {"mlp": [96, 48, 72, 24], "heads": [8, 4, 8, 4]}):
        part = FlextronForCausalLM.from_pretrained(saved, flextron_budget=budget)
        part.save_pretrained(tmp_path / "part")
        again = FlextronForCausalLM.from_pretrained(tmp_path / "part")
        assert torch.equal(part(ids).logits, again(ids).logits)
        smaller = FlextronForCausalLM.from_pretrained(tmp_path / "part", flextron_budget={"mlp": 24})
        assert difference(again(ids, flextron_budget={"mlp": 24}).logits, smaller(ids).logits) < 1e-5


def test_a_decoder_without_a_head_loads_into_a_model_with_one(ids, tmp_path):
    whole = elastic_of("gqa-tied-llama3")  # tied: the decoder has all the weights
    whole.model.save_pretrained(tmp_path)
    name = whole.frontier[2]["name"]
    loaded = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=name)
    assert difference(loaded(ids).logits, whole(ids, flextron_budget=name).logits) < 1e-5


def test_a_stock_model_is_not_taken_for_ours(tmp_path):
    parent_of("gqa-wide-heads").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`model_type`='llama' .*flextron convert"):
        FlextronForCausalLM.from_pretrained(tmp_path)


def test_a_subnetwork_object_is_a_budget_too(model, saved, ids):
    sub = model.resolve_budget(model.frontier[1]["name"])
    loaded = FlextronForCausalLM.from_pretrained(saved, flextron_budget=sub)
    assert difference(loaded(ids).logits, model(ids, flextron_budget=sub).logits) < 1e-5
    assert "layers" in repr(loaded.config)


def test_sharded_files(model, ids, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=0.35)
    assert difference(loaded(ids).logits, model(ids, flextron_budget=0.35).logits) < 1e-5
    model.save_pretrained(tmp_path)  # a single file now: the shards of the earlier save must go
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dtype"), [("plain", "float32"), ("levels", "bfloat16")])
def test_peak_memory_follows_the_budget(tmp_path, layout, dtype):
    """Loading a tenth of a 200 MB checkpoint never holds much more than that tenth."""
    config = FlextronConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
        elastic={"mlp": [4096, 256], "heads": [8, 2]},
    )  # fmt: skip
    sizes = {"mlp": 256, "heads": 2}
    model = FlextronForCausalLM(config).to(getattr(torch, dtype))
    model.config.frontier.append(model.config.row("small", model.resolve_budget(sizes)))
    (model.save_pretrained if layout == "plain" else model.export)(tmp_path)
    code = """
import torch
from modeling_flextron import FlextronForCausalLM
folder, dtype, budget = sys.argv[1], sys.argv[2], eval(sys.argv[3])
def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
tiny = torch.nn.Linear(2, 2)(torch.ones(2)).sum().backward()
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = FlextronForCausalLM.from_pretrained(folder, flextron_budget=budget, dtype=getattr(torch, dtype))
print("PEAK", memory("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""
    out = run_python(code, tmp_path, dtype, sizes).stdout
    peak, loaded = (int(number) for number in out.split("PEAK")[1].split())
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stored > 6 * loaded
    # Of a whole tensor a block of columns touches all pages, and four threads read one stored tensor each.
    assert peak < 1.5 * loaded + (4 * 512 * 4096 * 4 if layout == "plain" else 0)
    assert peak < 0.3 * stored


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_file_is_refused_by_name(model, tmp_path, damage):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 10_000 if damage == "truncated" else 0])
    with pytest.raises(OSError, match=r"model\.safetensors"):
        FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=0.35)


def test_a_pickle_is_not_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        FlextronForCausalLM.from_pretrained(tmp_path)


class TestWriting:
    def test_a_new_folder_appears_when_it_is_complete(self, tmp_path):
        target = tmp_path / "new"
        with write_beside(target) as folder:
            (folder / "config.json").write_text("{}")
            assert not target.exists()
        assert [path.name for path in target.iterdir()] == ["config.json"]
        assert oct(target.stat().st_mode & 0o777) == oct(0o777 & ~_umask())
        assert [path.name for path in tmp_path.iterdir()] == ["new"]

    def test_an_error_leaves_everything_as_it_was(self, tmp_path):
        target = tmp_path / "old"
        target.mkdir()
        (target / "config.json").write_text("old")
        with pytest.raises(ZeroDivisionError), write_beside(target) as folder:
            (folder / "config.json").write_text("new")
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), write_file_beside(target / "config.json") as file:
            file.write_text("new")
            raise ZeroDivisionError
        assert (target / "config.json").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["old"]

    def test_foreign_files_stay(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with write_beside(tmp_path) as folder:
            (folder / "config.json").write_text("{}")
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_only_weights_of_the_same_variant_are_replaced(self, model, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="50KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        (tmp_path / "model_lora_backup.safetensors").write_text("mine")
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path, variant="fp16")
        found = sorted(path.name for path in tmp_path.glob("*.safetensors*"))
        assert found == ["model.fp16.safetensors", "model.safetensors", "model_lora_backup.safetensors"]

    def test_a_target_that_nothing_can_be_moved_onto_from_beside_it(self, model, tmp_path, monkeypatch):
        """As a mount point: only moves inside it work."""
        from modeling_flextron import checkpoint

        move = os.replace

        def inside(source, target):
            assert tmp_path in source.parents and tmp_path in target.parents
            move(source, target)

        monkeypatch.setattr(checkpoint.os, "replace", inside)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob(".*"))

    def test_a_file_where_a_folder_belongs(self, model, tmp_path):
        (tmp_path / "name").write_text("mine")
        with pytest.raises(ValueError, match="file of this name"):
            model.save_pretrained(tmp_path / "name")

    def test_killed_in_the_middle_of_a_save(self, model, ids, tmp_path):
        """SIGKILL while the weights are written: the earlier save still loads and gives its own logits."""
        target = tmp_path / "model"
        model.save_pretrained(target)
        code = """
import os, signal, torch
from modeling_flextron import FlextronForCausalLM
import transformers.modeling_utils as utils
model = FlextronForCausalLM.from_pretrained(sys.argv[1])
torch.nn.init.zeros_(model.lm_head.weight)
def half_written(tensors, filename, metadata):
    open(filename, "wb").write(b"0" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
utils.safe_save_file = half_written
model.save_pretrained(sys.argv[1])
"""
        done = run_python(code, target, check=False)
        assert done.returncode == -signal.SIGKILL
        with torch.no_grad():
            again = FlextronForCausalLM.from_pretrained(target)
            assert torch.equal(again(ids).logits, model(ids).logits)
        assert json.loads((target / "config.json").read_text())["model_type"] == "flextron"
        assert [path for path in target.glob(".model-*/**/*") if path.name == "model.safetensors"]
        model.save_pretrained(target)
        assert not list(target.glob(".*"))  # the next save removes what that one left

    @pytest.mark.parametrize("write", [write_beside, write_file_beside])
    def test_only_what_nobody_writes_any_more_is_removed(self, tmp_path, write):
        """Also what was meant for another target in the same place; of others' hidden folders nothing."""
        for name in (".dead-abc", ".mine-abc"):
            (tmp_path / name / "files").mkdir(parents=True)
            (tmp_path / name / "files" / "model.safetensors").write_text("weights")
        (tmp_path / ".dead-abc" / MARK).touch()
        with write(tmp_path / "first") as first, write(tmp_path / "second") as second:
            for path in (first, second):
                (path / "config.json" if write is write_beside else path).write_text("{}")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine-abc", "first", "second"]

    def test_two_writers_of_a_new_folder(self, tmp_path):
        """The first to end has it; the other keeps what it wrote, and says where."""
        target = tmp_path / "new"
        with pytest.raises(FileExistsError, match=r"new: Another process has written .* is in .*new-\w+\.$") as caught:  # noqa: SIM117
            with write_beside(target) as slow:
                (slow / "config.json").write_text("slow")
                with write_beside(target) as fast:
                    (fast / "config.json").write_text("fast")
        assert (target / "config.json").read_text() == "fast"
        (kept,) = (path for path in tmp_path.iterdir() if path != target)
        assert (kept / "config.json").read_text() == "slow" and str(kept) in str(caught.value)

    def test_writers_of_an_old_folder_wait_for_each_other(self, tmp_path, monkeypatch):
        """Or of each a part would stay: here the second begins to move while the first is in the middle."""
        move, moved = os.replace, []

        def slowly(source, target):
            if Path(target).parent == tmp_path:
                moved.append(Path(source).read_text())
                if len(moved) == 1:
                    second.start()
                    time.sleep(0.2)
            move(source, target)

        def write(text):
            with write_beside(tmp_path) as folder:
                for name in ("config.json", "model.safetensors"):
                    (folder / name).write_text(text)

        second = threading.Thread(target=write, args=("second",))
        monkeypatch.setattr("modeling_flextron.checkpoint.os.replace", slowly)
        write("first")
        second.join()
        assert moved == ["first", "first", "second", "second"]
        assert {path.read_text() for path in tmp_path.iterdir()} == {"second"}


class TestSavingWhileLoading:
    """What is loaded is of one save, whatever another process does to the folder meanwhile."""

    LAYOUTS = {
        "plain": lambda model, folder: model.save_pretrained(folder),
        "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="50KB"),
        "levels": lambda model, folder: model.export(folder),
    }

    @pytest.fixture(params=LAYOUTS)
    def save(self, request):
        return self.LAYOUTS[request.param]

    @pytest.fixture
    def other(self, model):
        """The same shape and the same beginning of every tensor, with other weights behind it and another origin."""
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter[1:] += 0.5
        other.config.parent_name = "other"
        return other

    @pytest.mark.parametrize("auto", [False, True], ids=["class", "auto"])
    @pytest.mark.parametrize("budget", [None, "0.35"])
    @pytest.mark.parametrize("when", ["before the weights are opened", "after some were read"])
    def test_a_save_in_between_is_noticed(self, model, other, save, budget, auto, when, tmp_path, monkeypatch):
        save(model, tmp_path)
        load = (AutoModelForCausalLM if auto else FlextronForCausalLM).from_pretrained
        name = "_load_pretrained_model" if when.startswith("before") else "_finalize_model_loading"
        original = getattr(PreTrainedModel, name)

        def with_a_save(*args, **kwargs):
            save(other, tmp_path)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, name, staticmethod(with_a_save))
            with pytest.raises(ValueError, match=r"being saved into it.* Try again when that has ended"):
                load(tmp_path, flextron_budget=budget)
        ids = torch.arange(1, 9)[None]
        with torch.no_grad():  # and now it is the other one
            expected = other(ids, flextron_budget=budget or "1").logits
            assert difference(load(tmp_path, flextron_budget=budget)(ids).logits, expected) < 1e-5

    def test_a_config_that_was_read_before_a_save_is_noticed(self, model, other, save, tmp_path):
        save(model, tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert "_read_from" not in config.to_dict() | json.loads(config.to_json_string())
        FlextronForCausalLM.from_pretrained(tmp_path, config=config)
        save(other, tmp_path)
        with pytest.raises(ValueError, match=r"`config`=.*written again after the config was read\. Try again"):
            FlextronForCausalLM.from_pretrained(tmp_path, config=config)
        config = FlextronConfig.from_pretrained(tmp_path)
        FlextronForCausalLM.from_pretrained(tmp_path, config=config)
        config.save_pretrained(tmp_path)  # with what was changed in it
        FlextronForCausalLM.from_pretrained(tmp_path, config=config)

    def test_a_save_that_was_killed_between_its_files_is_noticed(self, model, other, save, tmp_path, monkeypatch):
        from modeling_flextron import checkpoint

        save(model, tmp_path)
        move = os.replace

        def once(source, target):
            move(source, target)
            if target.parent == tmp_path:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint.os, "replace", once)
            save(other, tmp_path)
        with pytest.raises(ValueError, match=r"`pretrained_model_name_or_path`=.*was stopped in the middle, save"):
            FlextronForCausalLM.from_pretrained(tmp_path)
        save(other, tmp_path)
        assert FlextronForCausalLM.from_pretrained(tmp_path).config.parent_name == "other"
        assert not list(tmp_path.glob(".*"))

    @torch.no_grad()
    def test_a_real_race(self, model, other, save, ids, tmp_path):
        """Another thread saves one model after the other: every load is one of the two, or is refused with the hint."""
        save(model, tmp_path)
        expected = {m.config.parent_name: m(ids, flextron_budget="0.35").logits for m in (model, other)}
        stop, said = threading.Event(), []

        def saving():
            while not stop.wait(0.05):
                for one in (other, model):
                    save(one, tmp_path)

        thread = threading.Thread(target=saving)
        thread.start()
        try:
            for _ in range(8):
                try:
                    found = AutoModelForCausalLM.from_pretrained(tmp_path, flextron_budget="0.35")
                except ValueError as error:
                    said.append(str(error))
                else:
                    assert difference(found(ids).logits, expected[found.config.parent_name]) < 1e-5
        finally:
            stop.set()
            thread.join()
        assert all("ry again" in message for message in said), said


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
