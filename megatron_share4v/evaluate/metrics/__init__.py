"""Scores of the ShareGPT4V suite as pure functions: records in, frozen dataclasses out, no files, no model, only the
standard library.

    profile      official (default, reproduces bugs) and corrected
    arithmetic   sums and rounding in the order and manner of the official scripts
    vqa_answers  answer normalisation of VQAEval and EvalAI (m4c)
    vqa          VQA-v2, TextVQA, VizWiz
    gqa  science_qa  seed  pope  mme  mmbench  qbench     one benchmark each
    mm_vet  llava_bench                                    parsing of the judge's replies, and their aggregation

Each value has the scale in which the official script prints it, before rounding for display unless the script keeps the
rounded value. `headline` of each result is the number in the paper's table (percent, or points for MME). Where the
official script stops with an exception, there is no official number: a division by zero becomes NaN, an answer that
breaks its parser counts as wrong, and incomplete data raise DataError. Results depend on the profile only where a
function takes one; its docstring lists the bugs that `corrected` fixes.
"""
