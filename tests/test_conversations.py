"""Conversations: what is learned of them, how they are packed and mixed, and a model's own answers."""

import copy
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from helpers import elastic_of, flextron, parent_of
from torch.nn.functional import cross_entropy
from training import arguments as settings_of

from flextron_trainer import FlextronTrainer, convert
from flextron_trainer.answers import write_answers
from flextron_trainer.conversations import documents_of
from flextron_trainer.data import calibration_batches, collator, load_text, mixed, pack, whole_in_blocks
from flextron_trainer.demo import train_tokenizer
from flextron_trainer.evaluation.quality import evaluate_model
from flextron_trainer.publishing.card import write_model_card

HEAD = "{{ '<|start|>' + message['role'] + '\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
TOOLS = "{% if tools %}{{ '<|start|>tools\n' + (tools | tojson) + '<|end|>\n' }}{% endif %}"
BODY = "{{ message['content'] + '<|end|>' }}"
PLAIN = TOOLS + "{% for message in messages %}" + HEAD + BODY + "{{ '\n' }}{% endfor %}" + ASKED
MARKED = (
    TOOLS
    + "{% for message in messages %}"
    + HEAD
    + "{% if message['role'] == 'assistant' %}{% generation %}"
    + BODY
    + "{% endgeneration %}{% else %}"
    + BODY
    + "{% endif %}{{ '\n' }}{% endfor %}"
    + ASKED
)
# As Qwen3 does: thoughts of earlier turns are not shown again.
FORGETFUL = PLAIN.replace(
    BODY, "{{ (message['content'] if loop.last else message['content'].split('~')[-1]) + '<|end|>' }}"
)
STRICT = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('a user begins') }}{% endif %}" + PLAIN
WORDS = ["hello you there", "what is two and three", "five", "the sky is blue ", "say it again\n\n  please", "\nyes."]


def says(*contents: str, system: bool = False) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn, perhaps with the system's before them."""
    roles = ["system"] * system + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


CHATS = [
    {"messages": says(*WORDS[:2])},
    {"messages": says("be kind", *WORDS[:4], system=True)},
    {"messages": says(*WORDS[4:6], *WORDS[1:3])},
]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([*WORDS, "def main(): return 0"] * 4, vocab_size=290)
    made.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    made.chat_template = PLAIN
    return made


@pytest.fixture
def template(tokenizer, request):
    """The tokenizer with another template, for one test."""
    tokenizer.chat_template = request.param
    yield tokenizer
    tokenizer.chat_template = PLAIN


def learned(tokenizer, ids: list[int], mask: list[bool]) -> list[str]:
    """The texts of runs of tokens that are learned."""
    runs, before = [], False
    for token, now in zip(ids, mask, strict=True):
        if now:
            runs = [*runs, []] if not before else runs
            runs[-1].append(token)
        before = now
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [PLAIN, MARKED, STRICT], indirect=True)
@pytest.mark.parametrize("row", CHATS)
def test_answers_and_the_ends_of_their_turns_are_learned(template, row):
    ((ids, mask),) = documents_of(template, row, "row")
    assert template.decode(ids) == template.apply_chat_template(row["messages"], tokenize=False)
    answers = [one["content"] for one in row["messages"] if one["role"] == "assistant"]
    assert learned(template, ids, mask) == [answer + "<|end|>" for answer in answers]
    ((same, everything),) = documents_of(template, row, "row", assistant_only=False)
    assert same == ids and all(everything)


@pytest.mark.parametrize("template", [PLAIN, MARKED], indirect=True)
def test_other_formats(template):
    row = {"prompt": says("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}], "text": None}
    ((ids, mask),) = documents_of(template, row, "row")
    assert learned(template, ids, mask) == ["d<|end|>"] and "b<|end|>" in template.decode(ids)
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    ((ids, mask),) = documents_of(template, row, "row")
    assert learned(template, ids, mask) == ["3<|end|>"] and "user\nadd\n\n1 2<|end|>" in template.decode(ids)
    ((ids, mask),) = documents_of(template, {"prompt": "the sky is", "completion": " blue"}, "row")
    assert learned(template, ids, mask) == [" blue" + template.eos_token]
    assert template.decode(ids) == "the sky is blue" + template.eos_token
    tools = [{"name": "f"}]
    for given in (tools, json.dumps(tools)):
        ((ids, _),) = documents_of(template, {**CHATS[0], "tools": given}, "row")
        assert template.decode(ids).startswith('<|start|>tools\n[{"name": "f"}]<|end|>')


@pytest.mark.parametrize("template", [PLAIN], indirect=True)
def test_what_tables_fill_in_is_not_shown(template):
    rows = datasets.Dataset.from_list([{**CHATS[0], "tools": [{"name": "f", key: 1}]} for key in "ab"])
    texts = [template.decode(documents_of(template, row, "row")[0][0]) for row in rows]
    assert not any("null" in text for text in texts)


@pytest.mark.parametrize("template", [FORGETFUL], indirect=True)
def test_every_answer_is_learned_behind_what_the_model_would_see(template):
    row = {"messages": says("a", "thought~b", "c", "more~d")}
    found = documents_of(template, row, "row")
    assert [learned(template, *document) for document in found] == [["thought~b<|end|>"], ["more~d<|end|>"]]
    assert "assistant\nb<|end|>" in template.decode(found[1][0])


def test_blocks_hold_whole_documents():
    sizes = torch.randint(1, 60, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    blocks = list(whole_in_blocks(([i] * size for i, size in enumerate(sizes)), 64))
    assert all(sum(map(len, block)) <= 64 for block in blocks)
    assert sorted(document[0] for block in blocks for document in block) == list(range(900))
    assert sum(sizes) / (64 * len(blocks)) > 0.9


def test_a_long_conversation_is_cut_behind_the_beginning_of_an_answer(tokenizer, monkeypatch):
    """None is divided among blocks; the log counts what is learned, masked and left out."""
    lines: list[str] = []
    monkeypatch.setattr("flextron_trainer.data.logger.warning", lines.append)
    rows = datasets.Dataset.from_list([{"messages": says("hi", "x" * 100)}, {"messages": says("y" * 100, "z")}, *CHATS])
    (whole, mask), *_ = documents_of(tokenizer, rows[0], "row")
    length = max(len(documents_of(tokenizer, row, "row")[0][0]) for row in CHATS)
    assert mask.index(True) < length < len(whole)
    assert documents_of(tokenizer, rows[1], "row")[0][1].index(True) > length
    blocks = pack(rows, tokenizer, length)
    documents = [
        (row["input_ids"][i:j], row["labels"][i:j])
        for row in blocks
        for starts in [[k for k, place in enumerate(row["position_ids"]) if place == 0]]
        for i, j in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)
    ]
    assert all(len(row["input_ids"]) <= length for row in blocks)
    expected = [documents_of(tokenizer, row, "row")[0] for row in rows]
    targets = [(ids, [t if m else -100 for t, m in zip(ids, mask, strict=True)]) for ids, mask in expected]
    kept = [(ids[:length], labels[:length]) for ids, labels in targets]
    kept = [(ids, labels) for ids, labels in kept if max(labels) >= 0]
    assert sorted(documents) == sorted(kept) and len(kept) < len(rows)
    seen = sum(label >= 0 for _, labels in kept for label in labels)
    total = sum(len(ids) for ids, _ in kept)
    (line,) = lines
    assert f"loss is that of {seen} tokens, and {total - seen} are masked" in line
    lost = sum(map(sum, (mask for _, mask in expected))) - seen
    assert f"{lost} more would be learned; 1 are left out" in line
    assert pack(rows, tokenizer, length, num_proc=2)[:] == blocks[:] and lines.pop() == line
    stream = pack(rows.to_iterable_dataset(), tokenizer, length)
    assert list(stream) == list(blocks)
    joined = pack(rows, tokenizer, length, document_boundaries=False, assistant_only=False)
    assert set(joined.column_names) == {"input_ids", "labels"} and len(lines) == 2
    with pytest.raises(ValueError, match="No answer begins in the first 4 tokens of a conversation"):
        pack(rows, tokenizer, 4)


def test_the_loss_is_that_of_answers(tokenizer):
    """As a stock model has it on each conversation alone, by hand."""
    parent = parent_of("mha", vocab_size=len(tokenizer))
    nats, count = 0.0, 0
    for row in CHATS:
        ids = torch.tensor(tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"])
        logits = parent(ids[None]).logits[0].log_softmax(-1)
        end, begin = tokenizer.convert_tokens_to_ids(["<|end|>", "<|start|>"])
        answering = False
        for i in range(1, len(ids)):
            if ids[i - 1] == begin:
                answering = tokenizer.decode(ids[i:]).startswith("assistant")
                header = len(tokenizer("assistant\n").input_ids)
                since = i
            if answering and i >= since + header:
                nats, count = nats - logits[i - 1, ids[i]].item(), count + 1
                answering = ids[i] != end
    blocks = pack(datasets.Dataset.from_list(CHATS), tokenizer, 256)
    found = evaluate_model(parent, blocks, batch_size=1)
    assert found["tokens"] == count and found["loss"] == pytest.approx(nats / count, rel=1e-4)
    row = {name: torch.tensor(values)[None] for name, values in blocks[0].items()}
    labels = row.pop("labels")[0, 1:]
    assert cross_entropy(parent(**row, use_cache=False).logits[0, :-1], labels).item() == pytest.approx(
        nats / count, rel=1e-4
    )


def test_calibration_reads_conversations(tokenizer):
    (batch,) = calibration_batches(
        CHATS, tokenizer=tokenizer, vocab_size=len(tokenizer), sequence_length=16, batch_size=64, max_samples=64
    )
    text = "".join(tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in CHATS)
    assert text.startswith(tokenizer.decode(batch.flatten())) and batch.numel() > len(tokenizer(text).input_ids) - 16


def test_mixtures(tokenizer):
    """Shares are those of blocks; all of every dataset is read."""
    text = pack(datasets.Dataset.from_dict({"text": WORDS * 40}), tokenizer, 32, document_boundaries=True)
    chats = pack(datasets.Dataset.from_list(CHATS[:1] * 20), tokenizer, 32)
    for parts in ((text, chats), (text.to_iterable_dataset(), chats.to_iterable_dataset())):
        rows = list(mixed(parts, [3, 1], seed=1))
        of_chats = [row for row in rows if -100 in row["labels"][1:20]]
        assert {tuple(row["input_ids"]) for row in rows} >= {tuple(row["input_ids"]) for row in text}
        assert 0.6 < sum(row in list(text) for row in rows) / len(rows) < 0.9 and of_chats
    assert mixed([text]) is text and list(mixed([text, chats], seed=1)) == list(mixed([text, chats], [1, 1], seed=1))
    for shares in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match=r"`weights`=.*the shares of 2 datasets"):
            mixed([text, chats], shares)


NO_ANSWER = {"messages": says("a")}
REFUSED = {
    "no answer": (NO_ANSWER, r"`dataset row 2`=.* No message of it is an assistant's"),
    "an empty answer": ({"messages": says("a", " ")}, r"`dataset row 2`=.* This answer is empty"),
    "an empty completion": ({"prompt": "a", "completion": ""}, r"`dataset row 2`=.* This completion is empty"),
    "another format": ({"messages": None, "text": "a"}, r"`dataset row 2`=\['text'\].* It has no messages"),
    "no messages": ({"messages": [{"content": "a"}]}, "Messages are a list of dicts"),
    "half of a chat": ({"prompt": says("a"), "completion": "b"}, "Messages are a list of dicts"),
    "the order": ({"messages": says("a", "b")[::-1]}, r"`dataset row 2`=.*refuses it: TemplateError: a user begins"),
    "no text": ({"messages": [{"role": "user", "content": 3}, says("a", "b")[1]]}, "template refuses it: TypeError"),
    "tools": ({"messages": says("a", "b"), "tools": "{"}, "Its `tools` are no JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("template", [STRICT], indirect=True)
def test_rows_that_are_refused(template, name):
    row, message = REFUSED[name]
    good = {"messages": says("a", "b")} if "messages" in row else {"prompt": "a", "completion": "b"}
    (documents_of(template, good, "row"))
    with pytest.raises(ValueError, match=message):
        documents_of(template, row, "dataset row 2")
    if name == "no answer":  # as `pack` says it
        with pytest.raises(ValueError, match=message):
            pack(datasets.Dataset.from_list([good, row]), template, 64)
        assert documents_of(template, row, "row", assistant_only=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"`tokenizer`=.* It has no chat template"),
        ("{% for %}", r"`tokenizer`=.* Its chat template is broken in line 1"),
        (PLAIN.replace("message['role']", "loop.length | string + message['role']"), "writes a prompt otherwise"),
    ],
    indirect=["template"],
)
def test_templates_that_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        documents_of(template, CHATS[0], "row")


def test_what_nothing_asked_for_is_no_answer(tokenizer):
    with pytest.raises(ValueError, match="no answer in it that follows a message"):
        documents_of(tokenizer, {"messages": says("a", "b", "c")[1:]}, "row")
    with pytest.raises(ValueError, match="Only a fast tokenizer"):
        documents_of(object(), CHATS[0], "row")


def test_text_is_no_conversation(tokenizer):
    rows = datasets.Dataset.from_dict({"text": WORDS})
    with pytest.raises(ValueError, match=r"`assistant_only`=True .*Text has no answers"):
        pack(rows, tokenizer, 8, assistant_only=True)


def test_files(tmp_path, caplog):
    """A folder of shards; conversations win over text; what has neither is refused by its name."""
    for name, rows in (("a.jsonl", CHATS[:1]), ("b.jsonl", CHATS[1:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        found = load_text(str(tmp_path), streaming=streaming)
        assert [row["messages"] for row in found] == [row["messages"] for row in CHATS]
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"several kinds of rows, such as .*a\.jsonl, .*c\.jsonl"):
            load_text(str(tmp_path), streaming=streaming)
    (tmp_path / "both.jsonl").write_text(json.dumps({**CHATS[0], "text": "a"}))
    load_text(str(tmp_path / "both.jsonl"))
    assert "Read are the columns messages; remove them to read `text`." in caplog.text
    (tmp_path / "neither.jsonl").write_text('{"question": "a", "score": "b"}')
    with pytest.raises(ValueError, match=r"neither\.jsonl: question, score.*One column must hold the text"):
        load_text(str(tmp_path / "neither.jsonl"))


PROMPTS = [
    {"prompt": "hello you"},
    {"prompt": says("what is two"), "tools": [{"name": "f"}], "chat_template_kwargs": {"quiet": True}},
    {"messages": says("a", "b", "c and a longer prompt than the others have", "an answer that is not kept")},
    {"instruction": "say it", "input": "again"},
    {"text": "the sky is"},
]


def test_a_stopped_run_of_answers_goes_on(tokenizer, tmp_path):
    """It ends with the same file as one that was not stopped, sampled, in the order of the prompts."""
    parent = parent_of("mha", vocab_size=len(tokenizer))
    parent.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|end|>")

    def run(name, prompts=PROMPTS, **changes):
        how = {"batch_size": 2, "max_new_tokens": 6, "do_sample": True, **changes}
        return write_answers(parent, tokenizer, prompts, tmp_path / name, **how)

    counts = run("whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert counts["answers"] == counts["written"] == len(rows) == 5
    asked = ["hello you", "what is two", PROMPTS[2]["messages"][2]["content"], "say it\n\nagain", "the sky is"]
    assert [row["messages"][-2]["content"] for row in rows] == asked and rows[1]["tools"] == [{"name": "f"}]
    assert rows[1]["chat_template_kwargs"] == {"quiet": True} and set(rows[0]) == {"messages", "finish_reason"}
    assert sum(row["finish_reason"] == "length" for row in rows) == counts["cut"]
    assert load_text(str(tmp_path)).column_names[:3] == [
        "messages",
        "finish_reason",
        "tools",
    ]  # settings are hidden
    run("part.jsonl", PROMPTS[:3])
    part = tmp_path / "part.jsonl"
    part.write_bytes(part.read_bytes() + b'{"messages": [{"ro')
    assert run("part.jsonl")["written"] == 3 and part.read_bytes() == whole
    assert run("part.jsonl")["written"] == 0 and part.read_bytes() == whole
    with pytest.raises(ValueError, match="were written with other settings"):
        run("part.jsonl", seed=1)
    for others in (PROMPTS[1:], PROMPTS[:4]):
        with pytest.raises(ValueError, match="is one to another prompt"):
            run("part.jsonl", others)
    with pytest.raises(ValueError, match=r"`prompts row 6`=.* It asks for nothing"):
        run("part.jsonl", [*PROMPTS, {"question": "a"}])
    assert part.read_bytes() == whole


@torch.no_grad()
def test_an_answer_is_that_to_its_prompt_alone(tokenizer, tmp_path):
    parent = parent_of("mha", vocab_size=len(tokenizer))
    write_answers(parent, tokenizer, PROMPTS, tmp_path / "a.jsonl", batch_size=5, max_new_tokens=5, do_sample=False)
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        row = json.loads(line)
        inputs = tokenizer.apply_chat_template(
            row["messages"][:-1], tools=row.get("tools"), add_generation_prompt=True, return_tensors="pt",
            return_dict=True,
        )  # fmt: skip
        ids = parent.generate(**inputs, max_new_tokens=5, min_new_tokens=1, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert row["messages"][-1]["content"] == tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def work(tokenizer, tmp_path_factory):
    """A folder with a parent, an elastic model, conversations, prompts and a text."""
    folder = tmp_path_factory.mktemp("chat")
    parent = parent_of("mha", vocab_size=len(tokenizer))
    parent.save_pretrained(folder / "parent")
    elastic = convert(parent, CHATS, tokenizer=tokenizer, sequence_length=16, order="importance", budgets=[1, 0.5])
    elastic.save_pretrained(folder / "elastic")
    for name in ("parent", "elastic"):
        tokenizer.save_pretrained(folder / name)
    write_model_card(elastic, folder / "elastic")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS * 8))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": says(word)}) + "\n" for word in WORDS))
    (folder / "text.txt").write_text(" ".join(WORDS) * 60)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def test_the_command_trains_on_a_mixture(work):
    """From a teacher on disk, which has read all of it."""
    common = ("--dataset", "chats.jsonl", "--sequence-length", 64)
    flextron("teach", "parent", "text.txt", "cache", "--draws", 4, "--device", "cpu", *common)
    result = flextron(
        "train", "elastic", "--output_dir", "run", "--dataset", "text.txt", *common, "--weights",
        "0.5,0.5", "--teacher", "cache", "--max_steps", 2, "--use_cpu", "--report_to", "none",
        "--save_strategy", "no", "--per_device_train_batch_size", 2,
    )  # fmt: skip
    names = ["2 % of text.txt, kept from training", "2 % of chats.jsonl, answers only, kept from training"]
    assert all(f"eval_{name}_loss_0.5" in result for name in names)
    card = Path("run/README.md").read_text()
    assert "| loss on 2 % of chats.jsonl, answers only, kept from training |" in card and "apply_chat_template" in card


@pytest.mark.parametrize("settings", [{"stage": "blocks"}, {"stage": "router", "router_method": "token"}])
def test_padding_behind_conversations_teaches_no_layer_and_no_router(tokenizer, tmp_path, settings):
    """Whatever it consists of: where documents share a row, no mask hides it."""
    blocks = pack(datasets.Dataset.from_list(CHATS), tokenizer, 120)
    assert len({len(row["input_ids"]) for row in blocks}) > 1
    settings = settings | ({"router_budgets": [0.6]} if settings["stage"] == "router" else {})
    begun, found = elastic_of("mha", parent_of("mha", vocab_size=len(tokenizer))), []
    for padding in (0, 7):
        run = FlextronTrainer(
            copy.deepcopy(begun), settings_of(tmp_path, max_steps=2, **settings), train_dataset=blocks,
            data_collator=collator(SimpleNamespace(pad_token_id=padding)),
        )  # fmt: skip
        run.train()
        found.append([run.model.config.token_routing, *(p.tolist() for p in run.model.parameters())])
    assert found[0] == found[1] and found[0][1:] != [p.tolist() for p in begun.parameters()]


def test_the_command_learns_conversations_in_every_stage_and_with_workers(work):
    common = ("--num_proc", 2, "--dataloader_num_workers", 2, "--sequence-length", 64, "--max_steps", 1, "--use_cpu",
              "--report_to", "none", "--save_strategy", "no")  # fmt: skip
    router = ("--router_method", "token", "--router_budgets", 0.6)
    for stage, *more in (("blocks",), ("router", *router), ("joint", *router, "--teacher", "parent")):
        flextron("train", "elastic", "chats.jsonl", "--stage", stage, *more, "--output_dir", stage, *common)
    stream = ("--streaming", *common[2:], "--dataloader_num_workers", 1)
    flextron("train", "elastic", "chats.jsonl", "--output_dir", "stream", *stream, "--eval-dataset", "text.txt")
    with pytest.raises(ValueError, match="compares the states of all tokens"):
        flextron(
            "train", "elastic", "chats.jsonl", "--stage", "blocks", "--assistant-only", "--output_dir", "x", *common
        )


def test_the_command_evaluates_answers_beside_text(work):
    options = ("--sequence-length", 64, "--device", "cpu")
    text = flextron("evaluate", "elastic", "text.txt", *options)["results"]["0.5"]
    chats = flextron("evaluate", "elastic", "chats.jsonl", *options)["results"]["0.5"]
    both = flextron("evaluate", "elastic", "text.txt", "--dataset", "chats.jsonl", "--write", *options)["results"][
        "0.5"
    ]
    assert both["loss"] == pytest.approx(text["loss"])
    assert both["chats.jsonl, answers only/loss"] == pytest.approx(chats["loss"]) != pytest.approx(text["loss"])
    card = Path("elastic/README.md").read_text()
    assert f"- loss, accuracy: chats.jsonl, answers only, {chats['tokens']} tokens" in card
    assert "| loss on chats.jsonl, answers only | perplexity on chats.jsonl, answers only |" in card
    everything = flextron("evaluate", "elastic", "chats.jsonl", "--no-assistant-only", *options)["results"]["0.5"]
    assert everything["tokens"] > 2 * chats["tokens"]


def test_the_command_answers(work):
    made = flextron(
        "answers", "parent", "prompts.jsonl", "answers.jsonl", "--max-new-tokens", 4, "--sample", "--temperature", 0.7,
        "--device", "cpu",
    )  # fmt: skip
    assert made["written"] == len(WORDS) == len(load_text("answers.jsonl"))
    (load, *_) = re.findall(r"```python\n(.*?)```", Path("elastic/README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(load, names)  # the card's own line
    assert names["tokenizer"].decode(names["outputs"][0]).startswith("<|start|>user\nWhy is the sky blue?<|end|>")
    said = flextron("generate", "elastic", "hello", "--chat", "--max-new-tokens", 4, "--device", "cpu")["text"]
    assert "hello" not in said
    for arguments, message in (
        (("parent", "prompts.jsonl", "answers.txt"), "a file of lines of JSON"),
        (("parent", "prompts.jsonl", "more.jsonl", "--top-p", 0.5), "are for draws"),
        (("parent", "prompts.jsonl", "more.jsonl", "--budget", "0.5"), "This model has one size"),
    ):
        with pytest.raises(ValueError, match=message):
            flextron("answers", *arguments)
    with pytest.raises(ValueError, match="There is nothing to learn from"):
        flextron("train", "elastic", "--output_dir", "none")
    Path("one.jsonl").write_text(json.dumps(CHATS[0]) + "\n")
    with pytest.raises(ValueError, match="It is one sample, of which none can be kept"):
        flextron("train", "elastic", "one.jsonl", "--output_dir", "none", "--sequence-length", 64)
    with pytest.raises(ValueError, match="One is given twice"):
        flextron("train", "elastic", "text.txt", "--dataset", "text.txt", "--output_dir", "none")
