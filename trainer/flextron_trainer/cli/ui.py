"""`flextron ui`."""

import runpy
from pathlib import Path
from typing import Annotated

import typer

from .options import Model, Trust, command, print_result
from .refusals import invalid


def ui(
    model: Model,
    port: Annotated[int | None, typer.Option(help="Port of the page; default: the first free one from 7860.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Also make a public link, through Gradio's servers.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Open a page with a slider for the size: text, speed, memory, and which tokens get more compute.

    Example: `flextron ui elastic`

    It is the Space of `examples/space/`, which runs the code of the model's repo; here that of this package runs. Needs
    `pip install "flextron[ui]"`. Ends with Ctrl-C.
    """
    from ..models import read_config

    try:
        import gradio  # noqa: F401
    except ImportError:
        raise invalid("ui", model, "The page needs gradio.", 'Run `pip install "flextron[ui]"`.') from None
    from modeling_flextron import FlextronConfig

    read_config(model, "model", FlextronConfig)
    here = Path(__file__)
    places = here.parents[1] / "space" / "app.py", here.parents[3] / "examples" / "space" / "app.py"
    app = next(path for path in places if path.is_file())  # in the installed package, or in a checkout
    page = runpy.run_path(str(app))["build"](model, trust_remote_code)
    _, url, _ = page.launch(server_port=port, share=share, prevent_thread_lock=True)
    print_result(command("push", model, "you/name"), model=model, url=url)
    page.block_thread()
