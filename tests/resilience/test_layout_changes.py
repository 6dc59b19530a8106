"""One run over five starts, each with another parallel layout.

The samples equal those of a run without interruptions; the losses are equal up to rounding.
"""

from __future__ import annotations

from fault_injection import train
from launching import lines
from tolerances import RESUME_OTHER_LAYOUT_LOSS

# tensor, pipeline, context, sequence parallelism, ranks, step at which rank 0 is killed. Steps 3, 6 and 8 are saved.
STARTS = (
    (1, 1, 1, "false", 2, 4),
    (2, 1, 2, "true", 4, 5),
    (1, 2, 1, "false", 2, 5),
    (2, 2, 1, "true", 4, 7),
    (1, 1, 2, "false", 4, None),
)


def test_samples_and_losses_are_equal_after_layout_changes(runs) -> None:
    directory = runs.root / "layouts"
    for tensor, pipeline, context, sequence, ranks, killed in STARTS:
        layout = (
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.context={context}",
            f"parallel.sequence={sequence}",
        )
        outcome = train(
            runs.config, ranks, f"run.directory={directory}", *layout, faults=f"kill:0:{killed}" if killed else ""
        )
        data = ranks // tensor // pipeline // context
        assert (outcome.codes[0] == -9) if killed else (outcome.codes == [0] * ranks), outcome.output
        assert f"tensor {tensor} x pipeline {pipeline} (virtual 1) x data {data} x context {context}" in outcome.output
    assert "at step 6" in outcome.output and outcome.output.count("parallel.pipeline: was 2, is 1") == 1, (
        "the last start logs the layout change"
    )
    assert lines(directory / "samples.jsonl") == lines(runs.root / "reference" / "samples.jsonl")
    actual, reference = lines(directory / "metrics.jsonl"), lines(runs.root / "reference" / "metrics.jsonl")
    assert [line["step"] for line in actual] == list(range(1, 9))
    assert (
        max(abs(one["loss"] - other["loss"]) for one, other in zip(actual, reference, strict=True))
        < RESUME_OTHER_LAYOUT_LOSS
    )
