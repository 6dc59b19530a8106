"""Run of one benchmark: generate missing predictions, compute the scores, and write all result files.

Replicas share the questions; each appends to a journal, so that a killed job resumes with any number of replicas.
answers.jsonl does not depend on how the work was split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm import tqdm

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.answers import make_answer, write_rows
from megatron_share4v.evaluate.judge import Judgement, collect_judgement, resume_instructions
from megatron_share4v.evaluate.loaded_benchmark import Evaluation
from megatron_share4v.evaluate.published import BenchmarkResult, save_chart, table
from megatron_share4v.evaluate.records import Answer, Doc
from megatron_share4v.evaluate.result import ModelFacts, result_of, write_result
from megatron_share4v.evaluate.task import by_id
from megatron_share4v.infer.answer_log import AnswerIndex, AnswerLog, DPGroup, resume_answer_log
from megatron_share4v.infer.batch_generate import GenerationResult
from megatron_share4v.logging import get_logger
from megatron_share4v.remote.openai_client import ChatClient

Client = Callable[[Iterator[Doc]], Iterator[list[GenerationResult]]]
JOURNAL, ANSWERS, RESULT, SUBMISSION, TABLE, CHART = (
    "journal",
    "answers.jsonl",
    "result.json",
    "submission",
    "table.md",
    "chart.png",
)


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

    compared: other results for table and chart. restart: forget earlier answers. Raises DataError for questions that
    cannot be encoded.
    """
    answers = _answers(evaluation, client, model, share, restart)
    return (
        None if answers is None else write_results(evaluation, answers, model=model, judging=judging, compared=compared)
    )


def write_results(
    evaluation: Evaluation,
    answers: Sequence[Answer],
    *,
    model: ModelFacts,
    judging: Judge = Judge(),
    compared: Sequence[BenchmarkResult] = (),
) -> dict[str, Any]:
    """Write all files from given predictions and return the content of result.json.

    Each benchmark defines how missing predictions count.
    """
    write_rows(evaluation.out / ANSWERS, evaluation.task.rows(evaluation.items, answers, model=model.name))
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
) -> list[Answer] | None:
    """Generate missing predictions; return all of them in order on rank 0, None elsewhere."""
    job: dict[str, object] = {
        "model": model.fingerprint,
        "benchmark": evaluation.task.name,
        "split": evaluation.folder.split,
    }
    job |= asdict(evaluation.decoding) | {"questions": evaluation.digest}
    journal = AnswerLog(evaluation.out / JOURNAL, rank=share.rank)
    try:
        done = resume_answer_log(journal, job=job, row=GenerationResult, share=share, restart=restart)
        left = [item for item in evaluation.items if item.id not in done]
        share.barrier()  # all ranks have read the journals before any rank appends
        _ask(evaluation, client, left[share.rank :: share.size], journal)
        share.barrier()
    finally:
        journal.close()
    if share.rank:
        return None
    rows = AnswerIndex(evaluation.out / JOURNAL, job=job, row=GenerationResult).rows(
        item.id for item in evaluation.items
    )
    answers = []
    for item, row in zip(evaluation.items, rows):
        assert row.text is not None, row  # the journal has no failed results
        answers.append(make_answer(item, evaluation.decoding.clean(row.text)))
    return answers


def _ask(evaluation: Evaluation, client: Client, items: Sequence[Doc], journal: AnswerLog) -> None:
    with tqdm(total=len(items), desc=evaluation.task.name, unit="question") as bar:
        for outcomes in client(iter(items)):
            journal.append(outcome for outcome in outcomes if outcome.error is None)
            bar.update(len(outcomes))
            if failed := next((outcome for outcome in outcomes if outcome.error is not None), None):
                raise DataError(
                    f"{evaluation.task.name}, question {failed.id}: {failed.error}. The answers so far are kept; the "
                    "same command goes on"
                )


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
