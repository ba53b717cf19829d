"""From a trained dense model to an elastic one: rank, permute once, choose the recommended sizes.

The function of the full network does not change. A parent that is loaded here is taken apart tensor by tensor, so
that no second copy of it exists at any time.
"""

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import metadata_load
from transformers.utils import logging

from modeling_flextron import FlextronConfig, FlextronForCausalLM
from modeling_flextron.config_checks import LICENSE_FIELDS
from modeling_flextron.errors import invalid, require_int
from modeling_flextron.frontier import held
from modeling_flextron.loading import hub_options
from modeling_flextron.permutation import ROTATED
from modeling_flextron.subnetwork import SubNetwork

from ..data import calibration_batches, hold_out, known_tokenizer
from ..layerwise import portions_of
from ..models import file_of
from .corrections import add_corrections, train_corrections, warn_of_reversals
from .importance import CONTROLS, fingerprint, fingerprint_of_data, read_or_measure
from .moment_files import moment_files
from .moments import MOMENT_TOKENS
from .orders import RANKINGS, best_order, rankings
from .parents import commit_of, place_of, plain_parent
from .places import place_in
from .reconstruction import sorted_moments
from .rotation import check_rotation
from .rotation import rotate as turn
from .rows import ROW_SAMPLES, TextLoss, choose_rows, mean_loss, named_budgets, search_rows
from .sensitivity import SENSITIVITY_TOKENS, predicted_losses, rows_by_prediction, sensitivities
from .sizes import DEFAULT_BUDGETS, Choices, family_config
from .weights import permute, take

logger = logging.get_logger(__name__)
ORDERS = ("auto", *RANKINGS, *CONTROLS)


def convert(
    parent: str | os.PathLike | torch.nn.Module,
    calibration: Any = None,
    *,
    mlp: Choices | None = None,
    heads: Choices | None = None,
    hidden: Choices | None = None,
    depth: Choices | None = None,
    budgets: Sequence[Any] | Mapping[str, Any] = DEFAULT_BUDGETS,
    tokenizer: Any = None,
    importance: str | os.PathLike | None = None,
    moments: str | os.PathLike | None = None,
    order: str = "auto",
    uniform: bool = True,
    search_evaluations: int = 0,
    nested: bool = True,
    corrections: float = 0.0,
    rotate: bool = False,
    block_steps: int = 0,
    max_samples: int = 1024,
    sequence_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    offload_folder: str | os.PathLike | None = None,
    trust_remote_code: bool = False,
    **load_kwargs: Any,
) -> FlextronForCausalLM:
    """Convert a trained dense model into an elastic one.

    Args:
        parent: A model, a Hub id or a folder. A model stays as it is; one loaded here is taken apart. Of a `PeftModel`,
            and of an adapter's id or folder, whose base is loaded, the adapter is merged. Weights that a `device_map`
            put elsewhere are read one by one.
        calibration: Text or token ids that are typical of the model's use: a list, a `datasets.Dataset`, a
            streamed one, or a tensor `[N, S]`. `"weights"` ranks by the norms of the weights, which of a language model
            that was really trained makes something worse than a random order, and chooses rows by size alone.
        mlp, heads, hidden, depth: Allowed sizes on each axis, descending, the full one first: fractions of the
            parent's size, or sizes. None for the default: about thirty-seconds for `mlp`, and half as much below
            the quarter; about eighths for `heads`, down to a quarter; and the full size alone for `hidden` and
            `depth`. Families whose stock class has hidden / heads channels in a head (GPT-2, GPT-NeoX) get a hidden
            size for every number of heads.
        budgets: What the rows of the frontier may cost at most, in units of the budget grammar. A mapping also
            names the rows; otherwise a row is called as its budget is written. The full network has a row in any case,
            called "1" where no budget means it. Of a fraction that the choices cannot reach the smallest sub-network
            takes the place, with a warning, and is called by the fraction that this costs; so of whatever has a name.
        tokenizer: For text; by default that of `parent` when it is an id or a folder.
        importance: File to keep the scores in (`importance.safetensors`). A later conversion of the same parent
            with the same data and other choices reads them.
        moments: Folder to keep the second moments in that orders are made from, for a later conversion, too: for every
            layer `4 F^2` bytes for its F neurons, and `4 C^2` for the C channels of its heads. Nothing is kept with an
            order that needs none of them.
        order: How neurons and heads are sorted: `"importance"` (mean activation), `"norms"` (times the norm of the
            outgoing weights), `"variance"` (of the activation, times that norm squared) or `"obs"` (removed one after
            the other, the rest making up for each). `"auto"` takes the one whose slices lose least on the last eighth
            of the calibration data, which is held out for that. `"random"` and `"reverse"` are controls that show what
            the ranking by importance is worth.
        uniform: All layers of a row have the same sizes, as stock classes need. False gives each layer sizes of its
            own, those with which least will be lost by a second-order prediction (docs/method.md); stock classes cannot
            hold them: `export` with `--snap` or `--pad` for these.
        search_evaluations: For each budget, an evolutionary search over the sizes of every layer asks for so many
            losses on the calibration data (200 are enough for eight layers). Elastic training of such rows ends at
            lower losses than that of uniform ones, and stock classes cannot hold them: `export` with `--snap` or
            `--pad` for these. 0 for uniform rows.
        nested: Choose rows of which each contains the next, so that a model loaded at one can go down to the smaller
            ones. False chooses each by itself, where sizes are too few for both that and the budgets.
        corrections: Part of its non-embedding parameters that a row may own beside the shared weights, such as 0.03:
            low-rank corrections of what its layers write, fitted to the parent where that lowers the loss on the last
            eighth of the calibration data (docs/method.md). They are folded in where the row is loaded or extracted,
            and `budgets` limit a row together with them.
        rotate: Turn the residual stream into its principal axes first, so that smaller sizes of `hidden` keep more of
            it. For models with RMS norms; embeddings that are tied to the output are untied, and adapters of the
            parent do not fit. The full network stays the same but for rounding.
        block_steps: Steps in which each layer's corrections learn, of `batch_size` samples, where that lowers the loss
            further. To train the shared weights as well, layer by layer, is stage `blocks` of the trainer.
        max_samples, sequence_length, batch_size: Size of the calibration.
        seed: For `order="random"` and the search.
        device: Where to run; by default where the parent is.
        offload_folder: Keep the weights of the result in files there, without names, that are mapped into memory: for
            parents that are larger than it. The result is the same. It runs on the CPU, and is saved like any other.
            With a `device_map` beside it the parent's weights are offloaded there, too.
        trust_remote_code: Run the code that the files of an id or a folder name, where they name some.
        load_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` with an id or a folder; `revision`, `token`,
            `cache_dir` and the like also to what reads its tokenizer and its card.

    Returns:
        The elastic model in the parent's dtype, in evaluation mode, with its frontier.

    Raises:
        ValueError: an unsupported architecture, quantized weights or an adapter that cannot be merged (see
            `plain_parent`), sizes that do not divide, no calibration data, ids outside the
            parent's vocabulary, a number or size in a list of `budgets` that no sub-network keeps, or a checkpoint with
            missing or unexpected tensors.
    """
    by_weights = isinstance(calibration, str) and calibration == "weights"
    _check_request(
        calibration, by_weights, order=order, uniform=uniform, nested=nested, search_evaluations=search_evaluations,
        corrections=corrections, block_steps=block_steps, device=device, offload_folder=offload_folder,
    )  # fmt: skip
    dtype, place = None, None if offload_folder is None else place_in(offload_folder)
    if offload_folder is not None and "device_map" in load_kwargs:
        load_kwargs["offload_folder"] = os.fspath(offload_folder)
    elif offload_folder is not None and load_kwargs.get("dtype", "auto") != "auto":
        dtype = load_kwargs.pop("dtype")  # the parent stays mapped, as it is stored
    dense = plain_parent(parent, trust_remote_code=trust_remote_code, **load_kwargs)
    config = family_config(dense.config, {"mlp": mlp, "heads": heads, "hidden": hidden, "depth": depth})
    counted = config
    if rotate:
        if by_weights or offload_folder is not None or len(config.choices("hidden")) < 2:
            rule = "It sorts what the residual stream holds on some text, for smaller sizes of `hidden`, in memory."
            raise invalid("rotate", rotate, rule, "Pass such sizes and text, and no `offload_folder`; or leave it out.")
        check_rotation(config)
        counted = copy.deepcopy(config)
        counted.tie_word_embeddings = False
    hub = hub_options(load_kwargs)
    named, origin = named_budgets(counted, budgets), origin_of(dense.name_or_path, **hub)
    commit = commit_of(parent, **hub)

    batches: list[torch.Tensor] = []
    if not by_weights:
        if tokenizer is None and isinstance(parent, (str, os.PathLike)):
            tokenizer = _tokenizer_of(parent, trust_remote_code, hub)
        batches = calibration_batches(
            calibration,
            tokenizer=tokenizer,
            vocab_size=config.vocab_size,
            sequence_length=min(sequence_length, config.max_position_embeddings),
            batch_size=batch_size,
            max_samples=max_samples,
        )

    # The first weights of an offloaded parent are on the device meta, and files are mapped for the CPU.
    here = "cpu" if dense.device.type == "meta" or place is not None else dense.device
    elastic = take(dense, config, release=dense is not parent, place=place, dtype=dtype).to(device or here)
    depth_drops = config.num_hidden_layers - config.choices("depth")[-1]
    seen, held_out = hold_out(batches) if batches and (order == "auto" or corrections) else (batches, [])
    fitted = list(next(portions_of(seen, MOMENT_TOKENS)))
    about = {"parent": fingerprint(elastic), "data": fingerprint_of_data(config, seen, rotate)}
    rotation = turn(elastic, fitted) if rotate else None
    scores = read_or_measure(importance, elastic, seen, depth_drops, **about)
    elastic.config.elastic["layer_ranking"] = scores.layer_ranking.tolist()
    record: dict[str, Any] = {"order": order if batches or order in CONTROLS else "weights"}
    rows = batches[: -(-ROW_SAMPLES // batch_size)]
    about["data"], again = fingerprint_of_data(config, fitted, rotate), bool(corrections) or not uniform
    with moment_files(moments, config, **about, wanted=again, for_now=offload_folder) as files:
        sort = partial(permute, elastic, place=place)
        if order in CONTROLS or not batches:
            sort(scores.reordered(order, seed))
        else:
            found = rankings(elastic, scores, fitted, RANKINGS if order == "auto" else [order], files)
            if order == "auto":
                slices = _rows_by_size(elastic.config, named, nested, corrections)
                measured = partial(mean_loss, elastic, batches=held_out)
                order, lost = best_order(
                    found, slices, partial(sort, progress=False), measured, measured(elastic.config.built)
                )
                record["order"] = order
                logger.info(f"Order of units: {order!r}. What the slices lose in each, in nats, mean of rows: {lost}.")
            sort(found[order])
        if batches:
            record["calibration_tokens"] = sum(batch.numel() for batch in batches)
        metrics = None
        if corrections or not uniform:
            metrics = sensitivities(elastic, next(portions_of(fitted, SENSITIVITY_TOKENS)), seed)
        if not uniform and metrics is not None:
            record["rows"] = {"predicted": True}
            losses = predicted_losses(elastic, sorted_moments(elastic, fitted, files), metrics, corrections)
            elastic.config.frontier = rows_by_prediction(elastic.config, named, losses, corrections)
        else:
            loss = TextLoss(elastic, rows) if rows else None
            elastic.config.frontier = choose_rows(elastic.config, named, loss, nested, corrections)
            record |= _searched(elastic, named, loss, search_evaluations, seed, corrections)
        elastic.config.conversion = record
        if corrections:
            inputs = sorted_moments(elastic, fitted, files)
            fits = add_corrections(elastic, inputs, fitted, held_out, corrections, metrics)
            if block_steps:
                learned = train_corrections(elastic, seen, held_out, block_steps, seed)
                fits |= {name: (before, min(before, after)) for name, (before, after) in learned.items()}
            warn_of_reversals({name: after for name, (_, after) in fits.items()})
    if rotation is not None:  # no channel of the parent is left that an adapter could be for
        elastic.permutation = replace(elastic.permutation, conversion=f"{ROTATED}{rotation}")
    elastic.config.parent_name, elastic.config.parent_license = origin
    elastic.config.parent_revision = commit
    elastic.config.validate()
    return elastic


def _check_request(
    calibration: Any,
    by_weights: bool,
    *,
    order: str,
    uniform: bool,
    nested: bool,
    search_evaluations: int,
    corrections: float,
    block_steps: int,
    device: Any,
    offload_folder: Any,
) -> None:
    """Refuse arguments of `convert` that contradict each other, before anything is read."""
    if calibration is None:
        rule = "Without text units are ranked by the norms of their weights, which can be worse than a random order."
        raise invalid("calibration", None, rule, "Pass some text, or 'weights' to do that all the same.")
    if order not in ORDERS:
        raise invalid("order", order, f"The orders are {', '.join(ORDERS)}.", "Use 'auto' to get a good model.")
    require_int("search_evaluations", search_evaluations, minimum=0)
    if not uniform and (by_weights or search_evaluations or not nested):
        rule = "Sizes of each layer come from a prediction on calibration data, each row from the one before."
        remedy = "Pass some text for `calibration`, and neither `search_evaluations` nor `nested=False`."
        raise invalid("uniform", uniform, rule, remedy)
    if search_evaluations and by_weights:
        rule = "The search asks for losses on calibration data, and there is none."
        raise invalid(
            "search_evaluations", search_evaluations, rule, "Pass `calibration=` with some text, or leave it."
        )
    if not 0 <= corrections < 1 or (corrections and by_weights):
        rule = "It is the part of a row's parameters that it may own, fitted to calibration data."
        raise invalid("corrections", corrections, rule, "Pass 0.03 with some text for `calibration`, or 0 for none.")
    if offload_folder is not None and device is not None and torch.device(device).type != "cpu":
        rule = "Weights in files are mapped into the memory of the CPU."
        raise invalid("device", str(device), rule, "Pass 'cpu', or no `offload_folder`.")
    require_int("block_steps", block_steps, minimum=0)
    if block_steps and offload_folder is not None:
        rule = "Layers that learn are in memory, one after the other, and stay there."
        raise invalid("block_steps", block_steps, rule, "Leave out `offload_folder`, or train in stage 'blocks'.")
    if block_steps and not corrections:
        rule = "Only what rows own learns here, so that the full network stays the parent."
        raise invalid("block_steps", block_steps, rule, "Pass corrections=0.03, or train all in stage 'blocks'.")


def _searched(
    elastic: FlextronForCausalLM,
    named: dict[str, Any],
    loss: TextLoss | None,
    evaluations: int,
    seed: int,
    corrections: float,
) -> dict[str, Any]:
    """Give the model what a search finds that starts at its rows; return what that and the rows took, by its name."""
    if loss is None:
        return {}
    if not evaluations:
        return {"rows": loss.effort()}
    searched = TextLoss(elastic, loss.batches, loss.known)
    elastic.config.frontier = search_rows(
        elastic.config, elastic.config.frontier, named, searched, evaluations, seed, corrections
    )
    effort = searched.effort()
    logger.info("The search: {evaluations:,} evaluations of {tokens:,} tokens together, {full_size_tokens:,}"
                " at full size.".format(**effort))  # fmt: skip
    return {"rows": loss.effort(), "search": effort}


def _rows_by_size(config: FlextronConfig, named: dict[str, Any], nested: bool, corrections: float) -> list[SubNetwork]:
    """The largest sub-networks within the budgets, the full one left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rows that are kept say what is wrong with the budgets
        rows = choose_rows(config, named, None, nested, corrections)
    return [subnetwork for subnetwork in held(rows).values() if subnetwork != config.built]


def origin_of(source: str, **hub: Any) -> tuple[str | None, dict[str, str] | None]:
    """Name and licence of a model, the licence as the metadata of its card has it; None for what is not known.

    Args:
        source: Its Hub id or folder; of a folder only the name is told.
        hub: `revision`, `token`, `cache_dir` and the like.
    """
    if not source:
        return None, None
    try:
        card = file_of(source, "README.md", **{**hub, "subfolder": ""})
        metadata = (card and metadata_load(card)) or {}
    except (ValueError, OSError, yaml.YAMLError, RecursionError):  # of a model in memory the folder may be gone
        metadata = {}
    terms = {name: metadata[name] for name in LICENSE_FIELDS if isinstance(metadata.get(name), str)}
    name = Path(source).resolve().name if Path(source).is_dir() or os.path.isabs(source) else source
    return name, terms or None


def _tokenizer_of(source: str | os.PathLike, trust_remote_code: bool, hub: dict[str, Any]) -> Any:
    place = place_of(source, "tokenizer_config.json", **hub)
    if place != os.fspath(source):
        hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    # Token ids need none; text without one is refused where it is read.
    return known_tokenizer(place, trust_remote_code=trust_remote_code, **hub)
