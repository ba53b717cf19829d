"""A Gradio Space for a Flextron model: one set of weights, and a slider for how much of it runs.

It needs gradio and transformers, and no package of Flextron: the code that runs lies in the model's repo. Set the
variable MODEL of the Space to your repo, or run `flextron ui MODEL` here.
"""

import os
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = os.environ.get("MODEL", "you/flextron-llama")


class Writer:
    """Writes text with an elastic model, at a size that may change from one call to the next.

    Args:
        repo: Folder or Hub id.
        trust_remote_code: Run the code that lies there, which needs no package of Flextron.
    """

    def __init__(self, repo: str, trust_remote_code: bool):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=trust_remote_code)
        self.model = model.to(device).eval()
        self.rows = {row["name"]: row for row in reversed(self.model.frontier)}  # smallest first
        routing = self.model.config.token_routing
        self.routed = [f"auto:{entry['target']}" for entry in routing["targets"]] if routing else []
        self.sizes = [*self.rows, *self.routed]

    def start(self, prompt: str) -> torch.Tensor:
        """The tokens of a prompt `[1, S]`, as a turn of a conversation where the model is made for those."""
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer(prompt or self.tokenizer.bos_token or " ", return_tensors="pt")["input_ids"]
        return ids.to(self.model.device)

    def write(self, ids: torch.Tensor, cache: Any, size: str, tokens: int) -> tuple[torch.Tensor, Any, str]:
        """Go on from tokens, on their KV cache when there is one that this size can read, else reading them again.

        Returns:
            All tokens, their KV cache, and what it took.
        """
        how = "on the kept KV cache" if cache is not None else "the text was read first"
        settings = {"max_new_tokens": tokens, "do_sample": False, "flextron_budget": size}
        settings |= {"return_dict_in_generate": True, "pad_token_id": self.tokenizer.pad_token_id}
        start = time.perf_counter()
        try:
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
        except ValueError:  # another depth, or heads of their own keys and values
            if cache is None:
                raise
            how, start = "this size cannot read the kept KV cache: the text was read again", time.perf_counter()
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        written = out.sequences.shape[1] - ids.shape[1]
        speed = f"{written} tokens at {written / (time.perf_counter() - start):,.1f} per second, {how}"
        return out.sequences, out.past_key_values, f"{self.describe(size, out.sequences.shape[1])}; {speed}"

    def describe(self, size: str, tokens: int = 0) -> str:
        """A size in a line, with the memory of its weights and of the KV cache of so many tokens."""
        if size in self.routed:
            return f"**{size}**: every token chooses its sizes"
        row, value = self.rows[size], self.model.dtype.itemsize
        memory = value * (row["parameters"] + tokens * row["kv_values_per_token"]) / 1e6
        loss = "" if row["loss"] is None else f", loss {row['loss']:.3f}"
        return f"**{size}**: {row['parameters']:,} parameters, {memory:,.1f} MB{loss}"

    def compute(self, ids: torch.Tensor, size: str) -> list[tuple[str, float]]:
        """Tokens and the part of the full width that each of them got, where tokens choose."""
        if size not in self.routed:
            return []
        with torch.no_grad():
            self.model(ids, flextron_budget=size)
        routing, full = self.model.last_routing, self.model.config.token_routing
        widths = [(axis, each) for axis in ("mlp", "heads") for each in getattr(routing, axis).values()]
        share = torch.stack([each[0].float() / full[axis][0] for axis, each in widths]).mean(0).tolist()
        return [(self.tokenizer.decode([token]), part) for token, part in zip(ids[0].tolist(), share, strict=True)]


def build(repo: str, trust_remote_code: bool) -> Any:
    """The page of a model."""
    import gradio as gr

    writer = Writer(repo, trust_remote_code)
    largest, end = len(writer.rows) - 1, len(writer.sizes) - 1

    def run(ids: torch.Tensor, cache: Any, place: float, tokens: float) -> tuple:
        size = writer.sizes[int(place)]
        ids, cache, report = writer.write(ids, cache, size, int(tokens))
        text = writer.tokenizer.decode(ids[0], skip_special_tokens=True)
        return (ids, cache), text, report, gr.update(value=writer.compute(ids, size), visible=size in writer.routed)

    def begin(prompt: str, place: float, tokens: float) -> tuple:
        return run(writer.start(prompt), None, place, tokens)

    def go_on(kept: tuple | None, prompt: str, place: float, tokens: float) -> tuple:
        return begin(prompt, place, tokens) if kept is None else run(*kept, place, tokens)

    with gr.Blocks(title=f"{repo} at every size") as page:
        gr.Markdown(f"# One model, every size\n`{repo}`. Move the slider, also in the middle of a text.")
        size = gr.Slider(0, end, largest, step=1, label="Size, smallest first", elem_id="size")
        about = gr.Markdown(writer.describe(writer.sizes[largest]), elem_id="about")
        tokens = gr.Slider(1, 256, 64, step=1, label="Tokens to write")
        prompt = gr.Textbox("Once upon a time", label="Prompt", elem_id="prompt")
        with gr.Row():
            write = gr.Button("Write", variant="primary", elem_id="write")
            more = gr.Button("Go on at this size", elem_id="more")
        text = gr.Textbox(label="Text", lines=8, interactive=False, elem_id="text")
        report = gr.Markdown(elem_id="report")
        shares = gr.HighlightedText(label="Part of the full width that each token got", visible=False)
        kept = gr.State(None)
        size.change(lambda place: writer.describe(writer.sizes[int(place)]), size, about)
        outputs: dict[str, Any] = {"outputs": [kept, text, report, shares], "concurrency_id": "model"}
        gr.on([write.click, prompt.submit], begin, [prompt, size, tokens], **outputs)
        more.click(go_on, [kept, prompt, size, tokens], **outputs)
    return page


if __name__ == "__main__":
    build(MODEL, trust_remote_code=True).launch()
