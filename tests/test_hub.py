"""The whole circle against a Hub of our own: create, push, card, load, pin, offline, private, and what goes wrong.

Three processes do all of it, because the Hub's address is read at import: one pushes and uses what else takes an id
of the Hub, one loads without our package, one loads again without the network.
"""

import json
import re
from pathlib import Path

import datasets
import pytest
from helpers import elastic_of, parent_of, run_python
from hub_server import HubServer, Repo
from huggingface_hub import CommitOperationDelete, ModelCard
from planted import plant

from flextron_trainer.hub import commit_files, files_of
from flextron_trainer.measuring.loading import fetched_bytes
from modeling_flextron.permutation import FILE as PERMUTATION

# A Hub that fails is asked again after seconds, which count nowhere here.
HASTE = """
import time
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 100)
"""

PUSH = """
import json, sys
from pathlib import Path
import pytest
import torch
from helpers import elastic_of, flextron, parent_of
from huggingface_hub.constants import HF_HUB_CACHE
from planted import plant
from training import rows, trainer
from flextron_trainer.data import load_text
from flextron_trainer.demo import train_tokenizer
from flextron_trainer.evaluation.quality import evaluate_frontier
from flextron_trainer.measuring import bench as benching
from flextron_trainer.measuring.loading import _measure

elastic = elastic_of("gqa-wide-heads", parent_of("gqa-wide-heads", vocab_size=300))
tokenizer = train_tokenizer(["def main():\\n    return 0\\n"] * 20, vocab_size=300)
evaluate_frontier(elastic, rows(4), text="wiki")
ids, done = torch.arange(1, 9)[None], {}

def change():
    elastic.lm_head.weight.data.mul_(1.5)

def push(title, repo="me/elastic", **options):
    commit = elastic.push_to_hub(repo, tokenizer=tokenizer, commit_message=title, **options)
    with torch.no_grad():
        logits = elastic(ids, flextron_budget="0.35").logits[0, -1].tolist()
    done[title] = {"oid": commit.oid, "pr": commit.pr_url, "logits": logits}

push("first", tags=["mine"], max_shard_size="100KB")
change()
push("second")
change()
push("request", create_pr=True)
change()
push("branch", revision="dev")
try:
    push("both", revision="dev", create_pr=True)
except ValueError as error:
    done["both"] = str(error)
change()
try:
    push("third")
except OSError as error:
    done["refused"] = str(error)
elastic.save_pretrained("saved")
tokenizer.save_pretrained("saved")
Path("saved/run.yaml").write_text("parent: /home/me/parent")  # which no push sends
plant(Path("saved"), Path("marker").resolve())
done["command"] = flextron("push", "saved", "me/private", "--private", "--commit-message", "by command", "--tag", "cli")
push("fourth")
done["sizes"] = flextron("sizes", "me/elastic", "--context", 16, "--device", "cpu")
done["fetched"] = sorted(path.suffix for path in Path(HF_HUB_CACHE, "models--me--elastic").rglob("snapshots/*/*"))

run = trainer(
    "run", model=elastic, teacher=None, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1,
    push_to_hub=True, hub_model_id="me/trained", hub_strategy="checkpoint", hub_always_push=True,
)
run.processing_class = tokenizer
run.train()
run.evaluate()
run.push_to_hub(tags=["trained"])
done["generated"] = flextron("generate", "me/trained", "def main", "--max-new-tokens", 1, "--budget", "0.35")
done["verified"] = flextron("verify", "me/trained")

# Loads in fresh processes: test_bench.py.
benching.measure_loads = lambda loads, *_: [_measure(load) for load in loads]
how = ("--budgets", "0.35", "--rounds", 1, "--batch-sizes", 1, "--threads", 1, "--device", "cpu")
done["bench"] = flextron("bench", "me/family", *how)
done["ran"] = Path("marker").exists()
for streaming in (False, True):
    assert list(load_text("me/text", streaming=streaming)) == [{"text": "w2 w3"}]
    assert list(load_text("me/text", split="validation", streaming=streaming)) == [{"text": "w4"}]
    for name, split, reason in (("me/text", "other", "(Bad|Unknown) split"), ("me/none", "train", "doesn't exist")):
        with pytest.raises(ValueError, match=f"the Hub gave no dataset of this name: .*{reason}"):
            load_text(name, split=split, streaming=streaming)
print(json.dumps(done))
"""

LOAD = """
import json, sys
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from transformers import AutoModelForCausalLM

first, done, ids = sys.argv[1], {}, torch.arange(1, 9)[None]

def load(repo="me/elastic", budget="0.35", **options):
    return AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, flextron_budget=budget, **options)

@torch.no_grad()
def logits(model):
    return model(ids).logits[0, -1].tolist()

def refused(**options):
    try:
        load(**options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

model = load()
done["main"], done["parameters"] = logits(model), model.num_parameters()
done["pinned"] = logits(load(revision=first))
done["cut"] = logits(load("me/cut"))
done["broken"] = refused(repo="me/broken")
done["cached"] = isinstance(try_to_load_from_cache("me/broken", "model.level0.safetensors"), str)
done["anonymous"] = refused(repo="me/private", token=False)
done["private"] = logits(load("me/private"))
model.push_to_hub("me/again", tags=["again"])
done["refused"] = {}
for name, call in {
    "tokenizer": lambda: model.push_to_hub("me/again", tokenizer="any"),
    "export": lambda: model.export("levels"),
}.items():
    try:
        call()
    except (ValueError, ImportError) as error:
        done["refused"][name] = str(error)
done["again"] = logits(load("me/again", budget=None))
space = {}
for code in open(hf_hub_download("me/elastic", "README.md")).read().split("```python\\n")[1:]:
    exec(code.partition("```")[0], space)
done["draft"] = space["outputs"].shape[1]
print("\\n" + json.dumps(done))
"""

OFFLINE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

def load(repo, budget="0.35"):
    return AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, flextron_budget=budget)

done = {}
with torch.no_grad():
    done["main"] = load("me/elastic")(torch.arange(1, 9)[None]).logits[0, -1].tolist()
for name, options in {"never": ("me/never",), "larger": ("me/private", "0.6")}.items():
    try:
        load(*options)
    except OSError as error:
        done[name] = str(error)
print("\\n" + json.dumps(done))
"""


BUSY = (
    "config.json",
    "model.level1.safetensors",
    "tokenizer.json",
    "model.level0.safetensors.index.json",
)  # the first time that they are asked for


def last_line(done) -> dict:
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server
        assert not server.unknown


def add(hub, repo: str, files: dict[str, Path]) -> None:
    hub.repos[repo] = Repo()
    hub.repos[repo].add({name: path.read_bytes() for name, path in files.items()}, "files", "main", None)


def texts(folder: Path) -> dict[str, Path]:
    """The files of a data set of two splits."""
    files = {}
    for split, text in (("train", "w2 w3"), ("validation", "w4")):
        files[f"data/{split}-00000-of-00001.parquet"] = folder / f"{split}.parquet"
        datasets.Dataset.from_dict({"text": [text]}).to_parquet(folder / f"{split}.parquet")
    return files


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """What the process that pushes saw, and its home."""
    home = tmp_path_factory.mktemp("push")
    elastic_of("gqa-wide-heads", parent_of("gqa-wide-heads", max_position_embeddings=32)).export(home / "family")
    plant(home / "family", home / "marker")
    add(hub, "me/family", files_of(home / "family"))
    add(hub, "datasets/me/text", texts(home))
    hub.refuse_commits("me/elastic", "second", 1)
    hub.refuse_commits("me/elastic", "third", 100)
    hub.refuse_commits("me/trained", "Training in progress, step 2", 100)
    for path in BUSY:
        hub.be_busy("me/trained", path, 1)
    return last_line(run_python(HASTE + PUSH, env=hub.environment(home / "cache"), folder=home)) | {"home": home}


@pytest.fixture(scope="module")
def loaded(hub, pushed, tmp_path_factory):
    """What a process without our package saw, and its home."""
    hub.copy("me/elastic", "me/cut")
    hub.copy("me/elastic", "me/broken")
    hub.copy("me/elastic", "me/again")
    hub.cut("me/cut", "model.level0.safetensors", 1)
    hub.cut("me/broken", "model.level0.safetensors", 1000)
    home = tmp_path_factory.mktemp("load")
    done = run_python(
        HASTE + LOAD, pushed["first"]["oid"], package=False, env=hub.environment(home / "cache"), folder=home
    )
    return last_line(done), home


def weights(files) -> set[str]:
    return {path for path in files if re.match(r"model[^/]*\.(safetensors|json)$", path)}


def card_of(hub, repo, revision="main") -> ModelCard:
    return ModelCard(hub.files(repo, revision)["README.md"].decode())


class TestPush:
    def test_each_push_is_one_commit(self, hub, pushed):
        assert hub.titles("me/elastic") == ["fourth", "second", "first", "initial commit"]
        assert hub.titles("me/elastic", "dev") == ["branch", "second", "first", "initial commit"]
        assert hub.titles("me/private") == ["by command", "initial commit"]

    def test_everything_is_in_it(self, hub, pushed):
        files = hub.files("me/elastic")
        expected = {"config.json", "modeling_flextron.py", "loading.py", "README.md", "frontier.png", "tokenizer.json"}
        assert expected <= set(files) and not [path for path in files if path.endswith((".bin", ".pt"))]

    def test_stale_shards_are_deleted(self, hub, pushed):
        assert any("level3-00001-of-" in path for path in hub.files("me/elastic", pushed["first"]["oid"]))
        levels = {f"model.level{level}.safetensors" for level in range(4)}
        indexes = {f"model.level{level}.safetensors.index.json" for level in range(3)}
        assert weights(hub.files("me/elastic")) == levels | indexes | {"model.safetensors.index.json"}

    def test_a_pull_request_leaves_the_branch(self, hub, pushed):
        assert pushed["request"]["pr"].endswith("/discussions/1")
        assert hub.titles("me/elastic", "refs/pr/1")[0] == "request"
        assert "`revision`='dev' cannot be used" in pushed["both"]

    def test_a_refused_commit_changes_nothing(self, hub, pushed):
        assert "500" in pushed["refused"]
        assert "third" not in hub.titles("me/elastic") and hub.titles("me/elastic")[0] == "fourth"

    def test_what_a_busy_hub_does_not_give_is_asked_for_again(self, hub, pushed):
        """A commit, config, weights and tokenizer for `generate`, and what `verify` reads beside."""
        assert pushed["generated"]["text"].startswith("def main") and all(left < 0 for left in hub.busy.values())
        assert hub.refused["me/elastic", "second"] == -1

    def test_the_command_pushes_the_same(self, hub, pushed):
        assert pushed["command"]["repo"] == "me/private" and hub.repos["me/private"].private
        assert set(hub.files("me/private")) == set(hub.files("me/elastic"))
        assert "cli" in card_of(hub, "me/private").data.tags
        assert not pushed["ran"] and not [p for p, b in hub.files("me/private").items() if b"--planted" in b]

    def test_what_arrived_is_whole(self, hub, pushed):
        shards = [content for path, content in hub.files("me/trained").items() if path.startswith("model.level")]
        shards = [content for content in shards if not content.startswith(b"{")]  # without the indexes
        assert pushed["verified"]["bytes"] == sum(map(len, shards)) and len(pushed["verified"]["rows"]) == 4

    def test_card(self, hub, pushed):
        card = card_of(hub, "me/elastic")
        frontier = json.loads(hub.files("me/elastic")["config.json"])["frontier"]
        assert len(card.data.eval_results) == 2 * len(frontier) and "mine" not in card.data.tags
        assert "mine" in card_of(hub, "me/elastic", pushed["first"]["oid"]).data.tags
        assert 'repo = "me/elastic"\n' in card.text and 'save_pretrained("elastic-' in card.text

    def test_trainer(self, hub, pushed):
        """A push in the background that is refused stops nothing."""
        step = "Training in progress, step"
        assert hub.titles("me/trained") == ["End of training", f"{step} 3", f"{step} 1", "initial commit"]
        files, card = hub.files("me/trained"), card_of(hub, "me/trained")
        assert "trainer_state.json" not in files and "last-checkpoint/trainer_state.json" in files
        assert "last-checkpoint/model.safetensors" in files
        assert not [path for path in files if path.endswith((".bin", ".pt", ".pth", "arguments.json"))]
        assert "tokenizer.json" in files and "- `max_steps`: `3`" in card.text and "trained" in card.data.tags


def test_sizes_of_a_hub_id(hub, pushed):
    """Of the config and the indices alone."""
    assert set(pushed["fetched"]) == {".json"}
    rows = {row["name"]: row["download"] for row in pushed["sizes"]["rows"]}
    shards = [content for path, content in hub.files("me/elastic").items() if path.startswith("model.level")]
    assert rows["1"] == sum(len(content) for content in shards if not content.startswith(b"{"))
    assert list(rows.values()) == sorted(rows.values(), reverse=True)


def test_bench_takes_a_hub_id(pushed):
    """And loads of a budget are downloads of its own bytes."""
    result, family = pushed["bench"], pushed["home"] / "family"
    assert result["context"] == 16  # of its 32 positions
    fetched = {row["how"]: row["fetched_bytes"] for row in result["loading"]}
    assert fetched == {"budget": fetched_bytes(family, "0.35"), "slice": fetched_bytes(family, None)}


class TestLoad:
    def test_cold_at_a_budget(self, hub, pushed, loaded):
        done, _ = loaded
        assert done["main"] == pytest.approx(pushed["fourth"]["logits"], abs=1e-5)
        row = next(r for r in json.loads(hub.files("me/elastic")["config.json"])["frontier"] if r["name"] == "0.35")
        assert done["parameters"] == row["parameters"]

    def test_a_budget_downloads_its_levels_and_a_larger_one_those_that_are_missing(self, hub, loaded):
        """0.35 first; the card then loads 0.15 and everything."""
        fetched = [path for path, _ in hub.gets("me/elastic") if re.fullmatch(r"model\.level\d\.safetensors", path)]
        assert sorted(fetched[:2]) == ["model.level0.safetensors", "model.level1.safetensors"]
        assert sorted(fetched[2:]) == ["model.level2.safetensors", "model.level3.safetensors"]
        private = {path for path, _ in hub.gets("me/private") if path.endswith(".safetensors")}
        private.remove(PERMUTATION)  # small, and of all sizes
        assert private == {"model.level0.safetensors", "model.level1.safetensors"}
        downloads = sum(len(hub.files("me/private")[path]) for path in private)
        row = next(r for r in json.loads(hub.files("me/private")["config.json"])["frontier"] if r["name"] == "0.35")
        assert downloads < 4 * row["parameters"] + 20_000  # two headers, and nothing of larger sizes

    def test_pinned(self, pushed, loaded):
        assert loaded[0]["pinned"] == pytest.approx(pushed["first"]["logits"], abs=1e-5)

    def test_after_a_cut_connection_it_tries_again(self, hub, pushed, loaded):
        assert [path for path, _ in hub.gets("me/cut")].count("model.level0.safetensors") == 2
        assert loaded[0]["cut"] == pytest.approx(pushed["fourth"]["logits"], abs=1e-5)

    def test_a_connection_that_stays_cut_is_an_error(self, loaded):
        assert loaded[0]["broken"].startswith("OSError: peer closed connection") and not loaded[0]["cached"]
        assert "`from_pretrained('me/broken', flextron_budget='0.35')` fetches them" in loaded[0]["broken"]

    def test_private(self, pushed, loaded):
        assert "me/private" in loaded[0]["anonymous"] and "token" in loaded[0]["anonymous"]
        assert loaded[0]["private"] == pytest.approx(pushed["fourth"]["logits"], abs=1e-5)

    def test_remote_code_pushes_whole_tensors_and_keeps_the_card(self, hub, loaded):
        """Levels and cards are written by the package."""
        assert "model.safetensors" in hub.files("me/again") and len(hub.titles("me/again")) == 2
        assert loaded[0]["again"] == pytest.approx(loaded[0]["main"], abs=1e-5)
        before, after = card_of(hub, "me/elastic"), card_of(hub, "me/again")
        assert after.text == before.text and after.data.tags == [*before.data.tags, "again"]
        refused = loaded[0]["refused"]
        assert "the model is pushed alone. Call `tokenizer.push_to_hub('me/again')` as well" in refused["tokenizer"]
        assert "`export` needs the package" in refused["export"]

    def test_snippets_of_the_card_run(self, loaded):
        _, home = loaded
        assert (home / "elastic-0.15" / "config.json").is_file()
        assert loaded[0]["draft"] > 4


def test_offline(hub, pushed, loaded):
    before = len(hub.requests)
    env = hub.environment(loaded[1] / "cache", HF_HUB_OFFLINE="1")
    done = last_line(run_python(OFFLINE, package=False, env=env))
    assert done["main"] == pytest.approx(pushed["fourth"]["logits"], abs=1e-5)
    assert "`from_pretrained('me/private', flextron_budget='0.6')` fetches them" in done["larger"]
    assert "couldn't find them in the cached files" in done["never"] and len(hub.requests) == before


def test_a_push_deletes_scores_that_no_longer_hold(tmp_path, monkeypatch):
    """With the card, which says the same; files of others stay."""
    path = tmp_path / "README.md"
    path.touch()
    ours = [".eval_results/flextron-0-1.yaml", ".eval_results/flextron-1-0.5.yaml"]
    there = [*ours, ".eval_results/other.yaml", "README.md"]
    monkeypatch.setattr("flextron_trainer.hub.list_repo_files", lambda *args, **kwargs: there)
    monkeypatch.setattr("flextron_trainer.hub.create_commit", lambda repo, operations, **kwargs: operations)
    *_, deleted = commit_files({"README.md": path, ours[0]: path}, "me/elastic")
    assert isinstance(deleted, CommitOperationDelete) and deleted.path_in_repo == ours[1]
    kept = commit_files({"last-checkpoint/config.json": path}, "me/elastic")
    assert [operation.path_in_repo for operation in kept] == ["last-checkpoint/config.json"]
