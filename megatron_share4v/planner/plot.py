"""A prediction as a picture: what each pipeline rank does when, and what fills its memory."""

from __future__ import annotations

from megatron_share4v.observability.canvas import FAINT, PALETTE, Canvas, Colour
from megatron_share4v.planner.predict import Prediction
from megatron_share4v.planner.report import CLASSES, PREDICTED

WIDTH, LEFT, RIGHT = 1000, 70, 24
ROWS = 16  # of more ranks, the first and the last ones are drawn
FORWARD, BACKWARD = (
    ((158, 190, 228), (108, 152, 206), (63, 105, 170), (36, 68, 120)),
    ((246, 203, 165), (238, 170, 116), (226, 135, 67), (180, 96, 34)),
)


def picture(plan: Prediction, *, title: str) -> Canvas:
    """Timeline above, memory below."""
    shown = _shown(plan.case.layout.pipeline)
    tall = max(9, min(24, 240 // len(shown)))
    memory_top = 76 + len(shown) * tall + 70
    bar = max(12, min(26, 220 // len(shown)))
    canvas = Canvas(WIDTH, memory_top + 34 + len(shown) * bar + 60)
    canvas.text(LEFT, 12, title, size=16)
    canvas.text(
        LEFT, 34, f"{PREDICTED}: step {plan.step_s:.3f} s, {plan.utilisation}, bubble {plan.bubble:.1%}", size=13
    )
    _timeline(canvas, plan, shown, top=64, tall=tall)
    _memory(canvas, plan, shown, top=memory_top, tall=bar)
    return canvas


def _shown(ranks: int) -> list[int]:
    return list(range(ranks)) if ranks <= ROWS else [*range(ROWS // 2), *range(ranks - ROWS // 2, ranks)]


def _timeline(canvas: Canvas, plan: Prediction, shown: list[int], *, top: float, tall: float) -> None:
    width, whole = WIDTH - LEFT - RIGHT, plan.pipeline_s + plan.after_s
    virtual = plan.case.layout.virtual
    for row, rank in enumerate(shown):
        y = top + row * tall
        canvas.text(LEFT - 8, y + tall / 2 - 8, f"rank {rank}", size=11, align="right")
        canvas.box(LEFT, y + 1, width, tall - 2, fill=(243, 244, 246))
        for timed in plan.timeline[rank]:
            shades = FORWARD if timed.piece.kind == "forward" else BACKWARD
            x, wide = LEFT + width * timed.start / whole, width * (timed.end - timed.start) / whole
            canvas.box(
                x,
                y + 1,
                max(wide - (0.5 if wide > 4 else 0), 0.5),
                tall - 2,
                fill=shades[_shade(timed.piece.chunk, virtual)],
            )
        canvas.box(
            LEFT + width * plan.pipeline_s / whole, y + 1, width * plan.after_s / whole, tall - 2, fill=PALETTE[2]
        )
    floor = top + len(shown) * tall
    for part in range(5):
        canvas.text(LEFT + width * part / 4, floor + 4, f"{whole * part / 4:.2f} s", size=11, align="middle")
    entries: list[tuple[str, Colour]] = [
        ("forward", FORWARD[2]),
        ("backward", BACKWARD[2]),
        ("gradients and update", PALETTE[2]),
        ("waiting", (243, 244, 246)),
    ]
    canvas.legend(LEFT, floor + 24, entries, columns=4, width=190)


def _shade(chunk: int, virtual: int) -> int:
    """Later chunks are darker; a single one is of the legend's colour."""
    return 2 if virtual == 1 else round(chunk * 3 / (virtual - 1))


def _memory(canvas: Canvas, plan: Prediction, shown: list[int], *, top: float, tall: float) -> None:
    limit, width = plan.case.gpu.memory, WIDTH - LEFT - RIGHT
    scale = width / max(plan.needed, limit) / 1.02
    canvas.text(LEFT, top - 2, f"memory, GB of {plan.case.gpu.name}'s {limit / 1e9:.0f}", size=12)
    y = top + 20
    for row, rank in enumerate(shown):
        x = float(LEFT)
        canvas.text(LEFT - 8, y + row * tall + tall / 2 - 8, f"rank {rank}", size=11, align="right")
        for number, name in enumerate(CLASSES):
            wide = getattr(plan.memory[rank], name) * scale
            canvas.box(x, y + row * tall + 1, wide, tall - 2, fill=PALETTE[number])
            x += wide
        canvas.text(x + 5, y + row * tall + tall / 2 - 8, f"{plan.memory[rank].total / 1e9:.1f}", size=11)
    floor = y + len(shown) * tall
    canvas.line(LEFT + limit * scale, y - 2, LEFT + limit * scale, floor + 2, fill=PALETTE[3])
    canvas.line(LEFT, y - 2, LEFT, floor + 2, fill=FAINT)
    canvas.legend(
        LEFT, floor + 14, [(name, PALETTE[number]) for number, name in enumerate(CLASSES)], columns=6, width=145
    )
