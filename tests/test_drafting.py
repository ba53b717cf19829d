"""Drafts by a smaller sub-network: the text stays, the fastest draft is chosen, and none where plain decoding wins."""

import functools
from dataclasses import replace

import pytest
import torch
from helpers import elastic_of

from modeling_flextron.drafting import (
    UNKNOWN,
    Watch,
    best_draft,
    constant,
    expected_acceptance,
    share_draft,
    tokens_per_cycle,
)
from modeling_flextron.latency import LENGTHS, LatencyTable, shape_of

GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    """Shared: only what it has seen of its drafts changes."""
    return elastic_of("gqa-wide-heads")


@pytest.fixture
def prompt():
    """Token ids `[1, 8]`."""
    return torch.randint(3, 96, (1, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plain(model, prompt):
    """What is written without drafts."""
    return model.generate(prompt, **GREEDY)


def table_of(config, more: float, **changes) -> LatencyTable:
    """A table by which the seconds of a token are 1 and those of a draft follow its sizes."""

    def sizes(axis: str) -> dict[str, float]:
        choices, share = config.choices(axis), 0.5 / config.num_hidden_layers
        return {str(size): share + share * (size / choices[0] - 1) for size in choices}

    layer = 1 / config.num_hidden_layers
    row = {"rest": 0.0, "layer": 0.0, "mlp": sizes("mlp"), "heads": sizes("heads")}
    costs = {str(hidden): row for hidden in config.choices("hidden")}
    assert sum(row[axis][str(config.choices(axis)[0])] for axis in ("mlp", "heads")) == layer
    drafting = {"loop": 0.0, "more": {str(length): more for length in LENGTHS}}
    return LatencyTable("here", {}, shape_of(config), {"decode": costs}, **{"drafting": drafting} | changes)


@pytest.fixture
def with_table(model, monkeypatch):
    """Give the model a table, and let it forget its drafts."""

    def give(**changes) -> None:
        model.drafts.seen.clear()
        monkeypatch.setattr("modeling_flextron.switching.table_of", lambda config: table_of(config, **changes))

    return give


def written_by_hand(model, draft, prompt, text, length) -> list[int]:
    """The pieces in which greedy drafting must write a text."""
    pieces, at = [], prompt.shape[1]
    while at < text.shape[1]:
        few = min(length, text.shape[1] - at - 1)
        drafted = draft.generate(text[:, :at], max_new_tokens=few, do_sample=False)[0, at:] if few else ()
        kept = 0
        while kept < len(drafted) and drafted[kept] == text[0, at + kept]:
            kept += 1
        pieces.append(kept + 1)
        at += kept + 1
    return pieces


# ------------------------------------------------------------------------------------------------ choosing


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9])
def test_tokens_per_cycle_is_the_closed_form(acceptance):
    for length in LENGTHS:
        assert tokens_per_cycle(acceptance, length) == pytest.approx(
            (1 - acceptance ** (length + 1)) / (1 - acceptance)
        )
    assert tokens_per_cycle(1.0, 4) == 5


def test_the_fastest_draft_is_chosen_or_none():
    cycles = dict.fromkeys(LENGTHS, 1.1)
    assert best_draft(1.0, {"small": (0.1, 0.5), "large": (0.5, 0.9)}, cycles) == ("small", 2)
    assert best_draft(1.0, {"small": (0.1, 0.2), "large": (0.1, 0.95)}, cycles) == ("large", 8)
    # Computed by hand: at c = 0.25, v = 1.1 and 4 tokens a draft breaks even at an acceptance of 0.55.
    for acceptance, length in ((0.5, None), (0.65, 4)):
        best = best_draft(1.0, {"draft": (0.25, acceptance)}, {4: 1.1})
        assert best == (None if length is None else ("draft", length))
    assert best_draft(1.0, {"draft": (0.1, 1.0)}, dict.fromkeys(LENGTHS, 20.0)) is None
    assert best_draft(1.0, {}, cycles) is None


def test_losses_give_a_first_acceptance():
    assert expected_acceptance(None, 3.0) == expected_acceptance(3.0, None) == UNKNOWN
    assert expected_acceptance(3.0, 3.0) == expected_acceptance(3.0, 2.9) == 1
    assert expected_acceptance(3.0, 3.08) == pytest.approx(0.8)
    assert expected_acceptance(3.0, 9.0) < 0.3


# ---------------------------------------------------------------------------------------------- generating


def test_pieces_are_counted_as_they_are_written(model, prompt):
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 96, "pad_token_id": 0}
    text = model.generate(prompt, **options)
    length = 3
    draft, watch = share_draft(model, model.resolve_budget({"mlp": 72}), **constant(length)), Watch()
    assert torch.equal(text, model.generate(prompt, assistant_model=draft, streamer=watch, **options))
    pieces = written_by_hand(model, draft, prompt, text, length)
    assert watch.sizes == [prompt.numel(), *pieces] and {1, length + 1} < set(pieces)  # or this test shows nothing
    kept, decided = watch.kept(length)
    assert kept == sum(pieces[:-1]) - len(pieces[:-1])
    assert decided == kept + sum(piece <= length for piece in pieces[:-1])


def test_a_draft_is_another_head_around_the_same_layers(model):
    before = model.generation_config.to_dict(), model.config.to_dict(), model.subnetwork
    draft = share_draft(model, model.resolve_budget({"mlp": 72}), **constant(3))
    assert draft is not model and draft.model is not model.model and draft.config is model.config
    assert all(ours is theirs for ours, theirs in zip(draft.model.children(), model.model.children(), strict=True))
    assert draft.subnetwork.mlp[0] == 72 and draft.generation_config.num_assistant_tokens == 3
    assert (model.generation_config.to_dict(), model.config.to_dict(), model.subnetwork) == before
    assert not model.model._shared


def test_a_wrapper_of_forward_stays_with_the_model(model, prompt):
    """As `model.forward = torch.compile(model.forward)` puts one there, which runs the model and nothing else."""
    size, plain = model.resolve_budget({"mlp": 72}), model.forward
    expected = model(prompt, flextron_budget=size).logits
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    try:
        for other in (share_draft(model, size), model.share(size)):
            assert torch.equal(other(prompt).logits, expected)
        assert not torch.equal(model(prompt).logits, expected)
    finally:
        del model.forward


def test_what_was_kept_of_drafts():
    watch = Watch()
    for size in (5, 1, 3, 4, 2):  # the prompt, nothing kept, two of three, all of them, the end
        watch.put(torch.zeros(1, size))
    assert watch.kept(3) == (5, 7)


def test_a_budget_drafts_and_changes_nothing(model, prompt, plain):
    for budget in (0.35, "0.15", {"mlp": 24}):
        assert torch.equal(plain, model.generate(prompt, draft_budget=budget, **GREEDY))
    half = model.generate(prompt, flextron_budget=0.6, **GREEDY)
    assert torch.equal(half, model.generate(prompt, flextron_budget=0.6, draft_budget=0.35, **GREEDY))
    watch = Watch()
    settings = {"num_assistant_tokens": 2, "assistant_confidence_threshold": 0.0}
    model.generate(prompt, draft_budget={"mlp": 72}, streamer=watch, **settings, **GREEDY)
    assert max(watch.sizes[1:]) == 3  # these settings are those of the draft
    assert model.subnetwork == model.built


@pytest.mark.parametrize("how", ["good", "slow cycles", "refused", "no times", "no table"])
def test_auto_drafts_only_where_that_pays(model, prompt, plain, with_table, monkeypatch, how):
    with_table(more=5.0 if how == "slow cycles" else 0.0, **({"drafting": {}} if how == "no times" else {}))
    if how == "no table":
        monkeypatch.setattr("modeling_flextron.switching.table_of", lambda config: None)
    if how == "refused":
        for row in model.frontier[1:]:
            model.drafts.add(model.built, model.resolve_budget(row["name"]), 0, 100000)
    runs, run = [], type(model).forward

    @functools.wraps(run)
    def forward(self, *args, **kwargs):
        runs.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    watch = Watch()
    assert torch.equal(plain, model.generate(prompt, draft_budget="auto", streamer=watch, **GREEDY))
    assert sum(watch.sizes) == plain.numel()  # the streamer of the caller gets everything
    drafting = how == "good"
    assert (model.drafts.chosen is not None) == drafting == any(run is not model for run in runs)
    if drafting:
        subnetwork, length = model.drafts.chosen
        assert model.drafts.seen == {(model.built, subnetwork): watch.kept(length)}


def test_rows_count_by_their_sizes_and_not_by_their_names(with_table, monkeypatch):
    named = elastic_of("gqa-wide-heads")
    full, first, second = named.config.frontier[:3]
    full, first = replace(full, loss=3.0), replace(first, name=second.name, loss=3.08)
    second = replace(second, name=named.config.frontier[1].name, loss=9.0)
    named.config.frontier[:3] = full, first, second
    found = {}
    monkeypatch.setattr("modeling_flextron.drafting.best_draft", lambda token, drafts, cycles: found.update(drafts))
    with_table(more=0.0)
    named.drafts.choose(named, named.built)
    accepted = [found[named.resolve_budget(row["subnetwork"])][1] for row in (first, second)]
    assert accepted == [expected_acceptance(3.0, 3.08), expected_acceptance(3.0, 9.0)]


def test_auto_learns_from_what_was_kept_and_forgets(model, with_table):
    with_table(more=0.3)
    model.drafts.choose(model, model.built)
    first, _ = model.drafts.chosen
    tried = []
    for _ in range(len(model.frontier)):  # nothing of what a draft writes is ever kept
        model.drafts.choose(model, model.built)
        if model.drafts.chosen is None:
            break
        tried.append(model.drafts.chosen[0])
        model.drafts.add(model.built, tried[-1], 0, 1000)
    assert model.drafts.chosen is None and tried[0] == first and len(set(tried)) == len(tried)
    calls = 0
    while model.drafts.chosen is None and calls < 99:
        model.drafts.choose(model, model.built)
        calls += 1
    assert 5 < calls < 99
    model.drafts.choose(model, model.resolve_budget(model.frontier[-1]["name"]))
    assert model.drafts.chosen is None  # nothing is smaller


def test_sampling_goes_on_with_drafts(model, prompt, with_table):
    with_table(more=0.0)
    torch.manual_seed(0)
    ids = model.generate(prompt, draft_budget="auto", do_sample=True, max_new_tokens=12, min_new_tokens=12)
    assert ids.shape == (1, 20) and model.drafts.chosen is not None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"draft_budget": "fast"}, "`draft_budget`='fast'.*It is \"auto\" or a budget.*rows of the frontier"),
        ({"draft_budget": 1}, "not smaller than the one"),
        ({"draft_budget": 0.35, "flextron_budget": 0.15}, "not smaller than the one.*at a larger one"),
        ({"draft_budget": 0.35, "assistant_model": "another"}, "`assistant_model` drafts already"),
        ({"draft_budget": 0.35, "batch": 2}, "`draft_budget`=0.35.*one sequence at a time, and the batch has 2"),
        ({"draft_budget": "auto", "batch": 2}, "one sequence at a time"),
    ],
)
def test_what_cannot_draft_is_refused(model, prompt, arguments, message):
    batch = prompt.repeat(arguments.pop("batch", 1), 1)
    with pytest.raises(ValueError, match=message):
        model.generate(batch, **arguments)
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=batch, **arguments)


def test_a_model_with_nothing_smaller_says_so(model, prompt, tmp_path, with_table):
    model.save_pretrained(tmp_path)
    smallest = type(model).from_pretrained(tmp_path, flextron_budget=model.frontier[-1]["name"])
    with pytest.raises(ValueError, match="not smaller than the one"):
        smallest.generate(prompt, draft_budget=smallest.frontier[-1]["name"], **GREEDY)
    with_table(more=0.0)
    expected = smallest.generate(prompt, **GREEDY)
    assert torch.equal(expected, smallest.generate(prompt, draft_budget="auto", **GREEDY))
    assert smallest.drafts.chosen is None
