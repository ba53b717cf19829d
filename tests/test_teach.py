"""Teachers on disk: what is drawn, what a cache holds and refuses, and training from one."""

import json
import math
import shutil

import pytest
import torch
from helpers import elastic_of, flextron, parent_of, run_python
from safetensors.torch import load_file
from test_teachers import resized, tokenizer_of
from training import VARIANT, arguments, losses, rows

from flextron_trainer import FlextronTrainer, teach
from flextron_trainer.data import collator
from flextron_trainer.losses import SampledTeacher, Teacher, chunked_loss
from flextron_trainer.training.teacher_cache import FILE, TeacherCache, draw_tokens, read_rows

HOW = {"batch_size": 4, "samples_per_shard": 16}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What the parent foretells of the rows that are trained on, in four shards."""
    folder = tmp_path_factory.mktemp("teach") / "cache"
    told = teach(parent_of(VARIANT), rows(), folder, tokenizer=tokenizer_of(), draws=255, **HOW)
    assert told["samples"] == 64 and told["tokens"] == sum(len(row["input_ids"]) for row in rows())
    return folder


def run(output, teacher, data=None, model=None, tokenizer=None, **changes) -> FlextronTrainer:
    return FlextronTrainer(
        model or elastic_of(VARIANT), arguments(output, max_steps=3, optim="sgd", learning_rate=0.1, **changes),
        teacher=teacher, train_dataset=rows() if data is None else data, processing_class=tokenizer,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is drawn


def sampled(ids, counts, sizes, draws, entropies, vocab_size) -> SampledTeacher:
    filled = torch.arange(int(sizes.max())) < sizes[:, None]
    found, shares = torch.zeros(filled.shape, dtype=torch.long), torch.zeros(filled.shape)
    found[filled], shares[filled] = ids, counts.float() / draws
    return SampledTeacher(found, shares, entropies, vocab_size)


def test_each_token_is_drawn_as_often_as_its_probability_says():
    probabilities = torch.tensor(
        [[0.5, 0.0, 0.26, 0.2, 0.04], [0.0, 1.0, 0.0, 0.0, 0.0], [1e-4, 0.3, 0.3, 0.2, 0.1999]]
    )
    total = torch.zeros(3, 5)
    generator, times, draws = torch.Generator().manual_seed(0), 1000, 7
    for _ in range(times):
        ids, counts, sizes = draw_tokens(probabilities, draws, torch.rand(3, generator=generator))
        assert counts.sum() == 3 * draws and sizes.sum() == len(ids)
        total.index_put_((torch.arange(3).repeat_interleave(sizes), ids), counts.float(), accumulate=True)
        each = torch.zeros(3, 5).index_put_((torch.arange(3).repeat_interleave(sizes), ids), counts.float())
        assert ((each - draws * probabilities).abs() < 1 + 1e-5).all()  # by independent draws it could be any number
    share = total / (times * draws)
    deviation = (probabilities * (1 - probabilities) / (times * draws)).sqrt()
    assert ((share - probabilities).abs() <= 4 * deviation + 1e-6).all()
    assert not total[probabilities == 0].any()


def test_the_expectation_is_the_loss_of_the_teacher_and_its_gradient():
    """Over 500 draws of 3 tokens each; from the most likely 3 tokens both are far away."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, states, output = (2 * torch.randn(n, 8, generator=generator) / 2 for n in (6, 20, 6, 20))
    targets, draws, times = torch.randint(0, 20, (6,), generator=generator), 3, 500
    hidden.requires_grad_(), weight.requires_grad_()

    def both(teacher):
        loss = chunked_loss(hidden, weight, targets, teacher=teacher, ce_weight=0.5, chunk_size=4)
        return torch.cat(
            [part.flatten() for part in (loss[None].detach(), *torch.autograd.grad(loss, (hidden, weight)))]
        )

    exact = both(Teacher(states, output))
    log_probabilities = (states @ output.T).log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropies = -(probabilities * log_probabilities).sum(-1)
    found = []
    for _ in range(times):
        ids, counts, sizes = draw_tokens(probabilities, draws, torch.rand(6, generator=generator))
        found.append(both(sampled(ids, counts, sizes, draws, entropies, 20)))
    samples = torch.stack(found)
    error = samples.std(0) / times**0.5
    assert ((samples.mean(0) - exact).abs() < 5 * error + 1e-5).all()
    top, ids = probabilities.topk(draws)
    shares = top / top.sum(-1, keepdim=True)
    biased = both(SampledTeacher(ids, shares, entropies, 20))
    assert (biased - exact)[1:].norm() > 5 * error[1:].norm()
    assert (samples.mean(0) - exact)[1:].norm() < 2 * error[1:].norm()


def test_rows_are_told_apart_whatever_they_are_padded_to():
    one, other = {"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7, 0, 0]}
    alone, padded = (read_rows(collator()(batch)) for batch in ([one], [one, other]))
    assert alone[0] == padded[0][0] != padded[0][1]
    assert padded[1].tolist() == [[True, True, True, False, False], [True] * 5]
    parted = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in (one, other)]
    assert read_rows(collator()(parted))[0].tolist() == padded[0].tolist()  # one document is one, said or not
    parted[0]["position_ids"] = [0, 0, 1]
    assert read_rows(collator()(parted[:1]))[0] == read_rows(collator()(parted))[0][0] != alone[0]


# ---------------------------------------------------------------------------------------------------- training


def test_from_many_draws_it_is_nearly_the_run_of_the_teacher(cache, tmp_path):
    live, cached = run(tmp_path, parent_of(VARIANT)), run(tmp_path, cache, tokenizer=tokenizer_of())
    start = {name: parameter.detach().clone() for name, parameter in live.model.named_parameters()}
    live.train(), cached.train()
    assert cached.teacher is None
    assert [log["loss"] for log in losses(cached)] == pytest.approx([log["loss"] for log in losses(live)], rel=0.02)
    states = dict(live.model.named_parameters()), dict(cached.model.named_parameters())
    moved = sum((p - start[name]).square().sum() for name, p in states[0].items())
    apart = sum((p - states[1][name]).square().sum() for name, p in states[0].items())
    assert apart < 1e-2 * moved


@pytest.mark.parametrize(
    "how", [{"stage": "router", "router_method": "gumbel"}, {"temperature": 2.0, "ce_weight": 0.5}]
)
def test_other_stages_and_temperatures(how, cache, tmp_path):
    if "temperature" in how:
        teach(parent_of(VARIANT), rows(), tmp_path / "warm", temperature=2.0, draws=255, **HOW)
        cache = tmp_path / "warm"
    live, cached = run(tmp_path, parent_of(VARIANT), **how), run(tmp_path, cache, **how)
    live.train(), cached.train()
    assert [log["loss"] for log in losses(cached)] == pytest.approx([log["loss"] for log in losses(live)], rel=0.05)


def test_documents_and_more_tokens_than_fit_in_two_bytes(tmp_path):
    """Of a model whose tokens need three bytes; the rows hold several documents."""
    parent = resized(parent_of(VARIANT), 66_000)
    data = [
        {"input_ids": row["input_ids"], "position_ids": [0, 1, 2, *range(len(row["input_ids"]) - 3)]} for row in rows(4)
    ]
    with torch.no_grad():
        parent.lm_head.weight[:65_800] = 0  # so that later ones are drawn, too
        parent.lm_head.weight[65_800:] *= 5
    teach(parent, data, tmp_path / "cache", draws=20, batch_size=2)
    cache = TeacherCache(tmp_path / "cache")
    batch = collator()(data)
    drawn = cache.read(batch)
    with torch.no_grad():
        expected = parent(**{k: batch[k] for k in ("input_ids", "position_ids")}).logits.softmax(-1)
    found = torch.zeros_like(expected).scatter_add_(-1, drawn.ids, drawn.shares)
    assert drawn.ids.max() > 65_800 and (drawn.shares.sum(-1)[0] - 1).abs().max() < 1e-5
    assert (found - expected)[0].abs().max() <= 1 / 20 + 1e-4


# ------------------------------------------------------------------------------------------------ what is on disk


def test_a_killed_run_goes_on_and_gives_the_same_files(cache, tmp_path):
    code = """
import itertools, os, signal
from helpers import parent_of
from test_teach import HOW, VARIANT, tokenizer_of
from training import rows
from flextron_trainer import teach

class Killing(list):
    def __iter__(self):
        for i, row in enumerate(list.__iter__(self)):
            if i == 40:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

teach(parent_of(VARIANT), Killing(rows()), sys.argv[1], tokenizer=tokenizer_of(), draws=255, **HOW)
"""
    folder = tmp_path / "cache"
    assert run_python(code, folder, check=False).returncode == -9
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "teacher-00000.safetensors",
        "teacher-00001.safetensors",
    ]
    with pytest.raises(ValueError, match=r"`teacher`=.* Not all of its text .* goes on where it was stopped"):
        run(tmp_path, folder)
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))]
    assert teach(parent_of(VARIANT), rows(), folder, tokenizer=tokenizer_of(), draws=255, **HOW)["samples"] == 64
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))][:2] == times
    for path in cache.iterdir():
        if path.is_file():
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_no_cache_of_this_run_is_refused(cache, tmp_path):
    folder = tmp_path / "cache"

    def refused(pattern, **changes):
        with pytest.raises(ValueError, match=pattern):
            run(tmp_path, folder, **changes).train()

    shutil.copytree(cache, folder)
    refused(r"`teacher`=.* Token 0 is 'w0' in its tokenizer and 'v0' in that of", tokenizer=tokenizer_of(prefix="v"))
    refused(r"`teacher`=.* were drawn at temperature 1\.0, and the run has 2\.0", temperature=2.0)
    refused(r"drawn from 96 tokens, and the model has 90\. .*--vocab-size 90", model=resized(elastic_of(VARIANT), 90))
    longer = [{"input_ids": torch.arange(1, 25)}] * 8
    refused(r"8 of 8 rows .* not among its 64, which have at most 16 tokens; the first of these has 24", data=longer)
    refused(r"1 of 64 rows of the training text are not among its 64", data=[*rows(), {"input_ids": torch.arange(16)}])
    parted = [{**row, "position_ids": [0, *range(len(row["input_ids"]) - 1)]} for row in rows(8)]
    refused(r"8 of 8 rows .* document boundaries", data=parted)
    (folder / "teacher-00002.safetensors").rename(folder / "gone")
    refused(r"`teacher`=.* Shards of the cache are missing: teacher-00002\.safetensors\.")
    (folder / "teacher-00002.safetensors").write_bytes((folder / "gone").read_bytes()[:200])
    refused(r"`teacher`='.*teacher-00002\.safetensors' .* It is damaged")
    (folder / FILE).write_text('{"format": 0}')
    refused(r"teacher_cache\.json is none of a cache of a teacher \(it is not of format 1\)")


def test_what_cannot_be_taught_is_refused(cache, tmp_path):
    def refused(pattern, data=None, folder="new", parent=None, **changes):
        with pytest.raises(ValueError, match=pattern):
            teach(
                parent or parent_of(VARIANT), rows(8) if data is None else data, tmp_path / folder, **{**HOW, **changes}
            )

    refused(r"`draws`=300 cannot be used\. At most 255", draws=300)
    for temperature in (0, math.nan, math.inf):
        refused(rf"`temperature`={temperature} cannot be used", temperature=temperature)
    refused(r"`vocab_size`=97 cannot be used\. The teacher has 96 tokens", vocab_size=97)
    refused(r"`dataset`='list' cannot be used\. It holds no rows", data=[])
    refused(r"the text has token 99", data=[{"input_ids": [1, 99, 3]}], folder="unknown")
    shutil.copytree(cache, tmp_path / "cache")
    refused(r"`draws`=20 cannot be used\. There is a cache with draws 255\.", folder="cache", draws=20)
    refused(
        r"`dataset`=.* not those, in this order, that teacher-00000\.safetensors was made of",
        rows(seed=4),
        "cache",
        draws=255,
        tokenizer=tokenizer_of(prefix="v"),
    )
    for path in cache.iterdir():  # a mistaken call leaves a cache as it was
        assert not path.is_file() or (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes(), path.name
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refused(r"`cache`=.* There is something in it that is no cache", folder="other")
    refused(r"`cache`=.* There is something in it that is no cache", folder="other/file")


def test_the_verbs(tmp_path):
    parent_of(VARIANT).save_pretrained(tmp_path / "parent")
    elastic_of(VARIANT).save_pretrained(tmp_path / "elastic")
    for name in ("parent", "elastic"):
        tokenizer_of().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * 7 % 96}" for i in range(1600)))
    told = flextron(
        "teach", tmp_path / "parent", tmp_path / "text.txt", tmp_path / "cache", "--sequence-length", 16,
        "--document-boundaries", "--device", "cpu",
    )  # fmt: skip
    assert told["samples"] == 100 and 3 < told["bytes_per_token"] < 200
    assert load_file(tmp_path / "cache" / "teacher-00000.safetensors")["keys"].shape == (100,)
    assert json.loads((tmp_path / "cache" / FILE).read_text())["teacher"] == "parent"
    how = [
        "train", tmp_path / "elastic", tmp_path / "text.txt", "--teacher", tmp_path / "cache", "--sequence-length", 16,
        "--document-boundaries", "--output_dir", tmp_path / "run", "--max_steps", 2, "--use_cpu", "--report_to", "none",
    ]  # fmt: skip
    assert flextron(*how, "--plan")["gib"]["teacher"] == 0
    assert flextron(*how)["eval_loss"] > 0
