"""Run of one benchmark: generate missing predictions, compute the scores, and write all result files.

Replicas share the questions; each appends to a journal, so that a killed job resumes with any number of replicas.
answers.jsonl does not depend on how the work was split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.answers import make_answer, write_rows
from megatron_share4v.evaluate.judge import Judgement, collect_judgement, resume_instructions
from megatron_share4v.evaluate.loaded_benchmark import Evaluation
from megatron_share4v.evaluate.published import BenchmarkResult, save_chart, table
from megatron_share4v.evaluate.records import Answer, Doc, Failure
from megatron_share4v.evaluate.result import ModelFacts, result_of, write_result
from megatron_share4v.evaluate.task import by_id
from megatron_share4v.infer.answer_log import AnswerIndex, AnswerLog, DPGroup, resume_answer_log
from megatron_share4v.infer.batch_generate import GenerationResult
from megatron_share4v.infer.picture_stamps import PictureSource, PictureStamps
from megatron_share4v.logging import get_logger
from megatron_share4v.remote.openai_client import ChatClient

Client = Callable[[Iterator[Doc]], Iterator[list[GenerationResult]]]
JOURNAL, ANSWERS, FAILED, RESULT, SUBMISSION, TABLE, CHART = (
    "journal",
    "answers.jsonl",
    "failed.jsonl",
    "result.json",
    "submission",
    "table.md",
    "chart.png",
)
SHOWN_FAILURES, MAX_FIRST_FAILURES = 5, 64
"""Failures that are logged each, and those that end an evaluation when nothing has been answered before them."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Judge settings. model: None for the official one. chat: None to write the requests to a file."""

    model: str | None = None
    chat: ChatClient | None = None
    seed: int | None = None


def run_benchmark(
    evaluation: Evaluation,
    client: Client,
    *,
    model: ModelFacts,
    share: DPGroup,
    judging: Judge = Judge(),
    compared: Sequence[BenchmarkResult] = (),
    restart: bool = False,
) -> dict[str, Any] | None:
    """Generate missing predictions and write all files; return the content of result.json on rank 0, None elsewhere.

    compared: other results for table and chart. restart: forget earlier answers. A question that cannot be put to the
    model, for example because its picture is broken, has no answer and is listed in failed.jsonl; the same call tries
    it again. Raises DataError when that is so for every question.
    """
    outcome = _answers(evaluation, client, model, share, restart)
    if outcome is None:
        return None
    answers, failures = outcome
    return write_results(evaluation, answers, failures=failures, model=model, judging=judging, compared=compared)


def write_results(
    evaluation: Evaluation,
    answers: Sequence[Answer],
    *,
    failures: Sequence[Failure] = (),
    model: ModelFacts,
    judging: Judge = Judge(),
    compared: Sequence[BenchmarkResult] = (),
) -> dict[str, Any]:
    """Write all files from given predictions and return the content of result.json.

    Each benchmark defines how missing predictions count. failures: why some of them are missing.
    """
    write_rows(evaluation.out / ANSWERS, evaluation.task.rows(evaluation.items, answers, model=model.name))
    _write_failures(evaluation, failures)
    verdict = _judged(evaluation, answers, judging)
    scores = evaluation.task.score(
        evaluation.folder,
        evaluation.items,
        answers,
        profile=evaluation.profile,
        verdicts=verdict.verdicts if verdict else None,
        whole=evaluation.whole,
    )
    if evaluation.task.judged and verdict is None:
        gaps = evaluation.task.describe_gaps(evaluation.folder, evaluation.items, by_id(answers))
        next_step = resume_instructions(evaluation.out, model=judging.model or evaluation.task.judged.official)
        scores = replace(scores, note="; ".join([*gaps, next_step]))
    if failures:
        count = f"{len(failures)} questions failed and are in {FAILED}, the first is {failures[0]}"
        scores = replace(scores, note="; ".join(filter(None, (count, scores.note))))
    if scores.note:
        log = get_logger().info if scores.complete else get_logger().warning
        log("%s: %s", evaluation.task.name, scores.note)
    content = result_of(evaluation, scores, answered=len(by_id(answers)), model=model, judgement=verdict)
    write_result(evaluation.out / RESULT, content)
    _write_submission(evaluation, answers, verdict)
    measured = [*compared, BenchmarkResult.read(evaluation.out / RESULT)]
    (evaluation.out / TABLE).write_text(table(measured), encoding="utf-8")
    save_chart(evaluation.out / CHART, measured)
    return content


def _answers(
    evaluation: Evaluation, client: Client, model: ModelFacts, share: DPGroup, restart: bool
) -> tuple[list[Answer], list[Failure]] | None:
    """Generate missing predictions; return all of them in order and the failures on rank 0, None elsewhere."""
    job: dict[str, object] = {
        "model": model.fingerprint,
        "benchmark": evaluation.task.name,
        "split": evaluation.folder.split,
    }
    job |= asdict(evaluation.decoding) | {"questions": evaluation.digest}
    items = {item.id: item for item in evaluation.items}
    stamps = PictureStamps(lambda name: _picture(items.get(name)))
    journal = AnswerLog(evaluation.out / JOURNAL, rank=share.rank)
    try:
        done = resume_answer_log(journal, job=job, row=GenerationResult, share=share, restart=restart, stamps=stamps)
        left = [item for item in evaluation.items if item.id not in done or item.id in done.errors]
        share.barrier()  # all ranks have read the journals before any rank appends
        any_done = len(left) < len(evaluation.items)
        _ask(evaluation, client, left[share.rank :: share.size], journal, stamps=stamps, any_done=any_done)
        share.barrier()
    finally:
        journal.close()
        stamps.close()
    if share.rank:
        return None
    index = AnswerIndex(evaluation.out / JOURNAL, job=job, row=GenerationResult, find_changed=done.changed.intersection)
    return _split(evaluation, index)


def _picture(item: Doc | None) -> PictureSource | None:
    if item is None or item.image is None:
        return None
    return PictureSource(file=str(item.image)) if isinstance(item.image, Path) else PictureSource(data=item.image)


def _split(evaluation: Evaluation, index: AnswerIndex[GenerationResult]) -> tuple[list[Answer], list[Failure]]:
    """Split the journaled results into answers and failures, in the order of the questions."""
    rows = index.rows(item.id for item in evaluation.items)
    answers, failures = [], []
    for item, row in zip(evaluation.items, rows):
        if row.text is None:
            image = str(item.image) if isinstance(item.image, Path) else None
            failures.append(Failure(item.question_id, image, row.error or ""))
        else:
            answers.append(make_answer(item, evaluation.decoding.clean(row.text)))
    if not answers:
        raise DataError(f"{evaluation.task.name}: no question could be asked; {failures[0]}")
    return answers, failures


def _ask(
    evaluation: Evaluation,
    client: Client,
    items: Sequence[Doc],
    journal: AnswerLog,
    *,
    stamps: PictureStamps,
    any_done: bool,
) -> None:
    """Put questions to the model and append the outcomes to the journal.

    any_done: some questions have been answered before. Raises DataError when the first MAX_FIRST_FAILURES of all
    questions fail: the fault is then not in single pictures.
    """
    failed = 0
    with tqdm(total=len(items), desc=evaluation.task.name, unit="question") as bar:
        for outcomes in client(stamps.watch(items)):
            journal.append(outcomes, stamps=stamps)
            bar.update(len(outcomes))
            errors = [outcome for outcome in outcomes if outcome.error is not None]
            failed, any_done = failed + len(errors), any_done or len(errors) < len(outcomes)
            if failed >= MAX_FIRST_FAILURES and not any_done:
                raise DataError(
                    f"{evaluation.task.name}: the first {failed} questions could not be asked; question "
                    f"{errors[-1].id}: {errors[-1].error}"
                )


def _write_failures(evaluation: Evaluation, failures: Sequence[Failure]) -> None:
    for failure in failures[:SHOWN_FAILURES]:
        get_logger().warning("%s, %s", evaluation.task.name, failure)
    if failures:
        write_rows(evaluation.out / FAILED, map(asdict, failures))
    else:
        (evaluation.out / FAILED).unlink(missing_ok=True)


def _judged(evaluation: Evaluation, answers: Sequence[Answer], judging: Judge) -> Judgement | None:
    if evaluation.task.judged is None:
        return None
    requests = evaluation.task.judged.requests(evaluation.items, by_id(answers), evaluation.profile)
    model = judging.model or evaluation.task.judged.official
    with tqdm(total=len(requests), desc="judge", unit="reply", disable=judging.chat is None) as bar:
        return collect_judgement(
            requests, evaluation.out, model=model, chat=judging.chat, seed=judging.seed, on_reply=lambda _: bar.update()
        )


def _write_submission(evaluation: Evaluation, answers: Sequence[Answer], verdict: Judgement | None) -> None:
    """Write the files for evaluation servers and official scorers, which require all questions."""
    if not evaluation.whole:
        get_logger().warning("no submission files: only %d questions were evaluated", len(evaluation.items))
        return
    try:
        files = dict(evaluation.task.submission(evaluation.folder, evaluation.items, answers))
    except DataError as error:
        if len(by_id(answers)) == len(evaluation.items):
            raise
        get_logger().warning("no submission files: %s", error)
        return
    if verdict and evaluation.task.judged:
        files |= evaluation.task.judged.files(evaluation.items, by_id(answers), verdict.verdicts, verdict.model)
    for name, content in files.items():
        (evaluation.out / SUBMISSION).mkdir(exist_ok=True)
        (evaluation.out / SUBMISSION / name).write_bytes(content)
