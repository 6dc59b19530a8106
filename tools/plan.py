"""Predict memory, step time, balance and traffic of a run, and rank the fastest layouts for a number of GPUs.

    python tools/plan.py examples/share4v_7b/pretrain.yaml --world-size 16 --samples 1246000 parallel.tensor=1 \\
        parallel.pipeline=2

Needs no GPU. Exit code 2: the configuration cannot run; the reason is printed, and layouts that can run are ranked.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_share4v.config.arguments import positive, share
from megatron_share4v.config.load import load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.observability.charts import save_png
from megatron_share4v.planner.case import Assumptions, Case
from megatron_share4v.planner.gpus import GPUS
from megatron_share4v.planner.plot import draw_prediction
from megatron_share4v.planner.predict import Prediction
from megatron_share4v.planner.report import format_report, report_to_json
from megatron_share4v.planner.search import search
from megatron_share4v.planner.workload import Workload, assumed_workload, has_prepared_data

LARGEST = 16_384


def main() -> int:
    options = parse()
    with exit_on_user_error():
        if options.world_size > LARGEST:
            raise ConfigError(f"--world-size {options.world_size}: use 1 to {LARGEST}")
        config = load_run(options.config, options.overrides)
        workload = choose_workload(config, options)
        given = {"matrices": options.efficiency} if options.efficiency else {}
        setting = dict(
            world_size=options.world_size, workload=workload, gpu=GPUS[options.gpu], assumptions=Assumptions(**given)
        )
        try:
            requested = Prediction(Case.of(config, **setting))
            refusals = list(requested.refusals())
        except ConfigError as error:
            requested, refusals = None, [str(error)]
        found = search(config, **setting, keep=options.best)
    title = f"{options.config} on {options.world_size} x {GPUS[options.gpu].name}"
    if options.json:
        options.json.write_text(
            json.dumps(report_to_json(requested, refusals, found, title=title), indent=1) + "\n", encoding="utf-8"
        )
    drawn = requested or next(iter(found.best), None)
    if options.png and drawn is not None:
        save_png(draw_prediction(drawn, title=f"{title}, {drawn.case.layout}"), options.png)
    print(format_report(requested, refusals, found, title=title), end="")
    return 2 if refusals else 0


def choose_workload(config: RunConfig, options: argparse.Namespace) -> Workload:
    """Measure the prepared data of `config` if present and no option replaces it; otherwise use assumptions."""
    given = (options.samples, options.text_length, options.longest)
    if given == (None, None, None) and has_prepared_data(config):
        from megatron_share4v.planner.prepared_workload import measured_workload  # imports torch; planning needs none

        return measured_workload(config)
    return assumed_workload(config, samples=options.samples, text_length=options.text_length, longest=options.longest)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="dotted.key=value", help="overrides of values in the file"
    )
    parser.add_argument("--world-size", type=positive, required=True, metavar="N", help=f"GPUs, up to {LARGEST}")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200")
    parser.add_argument("--samples", type=positive, help="number of samples, if the data set is not prepared here")
    parser.add_argument(
        "--text-length", type=positive, help="mean text positions of a sample, if the data set is not prepared here"
    )
    parser.add_argument("--longest", type=positive, help="text positions of the longest sample of a step")
    parser.add_argument("--efficiency", type=share, help="share of the peak that wide products reach (default: 0.62)")
    parser.add_argument("--best", type=positive, default=10, metavar="K", help="layouts to rank")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    with exit_on_closed_output():
        sys.exit(main())
