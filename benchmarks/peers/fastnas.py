"""FastNAS of nvidia-modelopt on a LLaMA: how much each layer's MLP suffers at each width, then a search by threshold.

    FOLDER/modelopt/bin/python benchmarks/peers/fastnas.py PARENT OUT --calibration rows.npy --ratio 0.75 0.5

Only MLP widths change, so that ratios below what attention takes are out of reach; the smallest is then given.
"""

import modelopt.torch.prune as mtp
from nas import limit, load, loss, quiet, score, space, widths
from shared import arguments, begin, write


def main() -> None:
    options = arguments(__doc__).parse_args()
    parent, rows = begin(options)
    sensitivities = options.out / "sensitivities.pth"  # measured for the first ratio, read for the others
    options.out.mkdir(parents=True, exist_ok=True)
    sensitivities.unlink(missing_ok=True)
    for ratio in options.ratio:
        constraint, smallest = limit(parent, ratio, options.grid)
        with quiet():
            model, _ = mtp.prune(
                load(options.parent), mode=[("fastnas", space(parent, options.grid))], constraints=constraint,
                dummy_input=(rows[:1, :8],), config=score(rows) | {"checkpoint": str(sensitivities)},
            )  # fmt: skip
        write(
            options.out, parent, model.state_dict(), {"mlp": widths(model)}, distribution="nvidia-modelopt",
            ratio=ratio, loss=loss(model, rows), peer="fastnas", smallest_ratio=smallest,
        )  # fmt: skip


if __name__ == "__main__":
    main()
