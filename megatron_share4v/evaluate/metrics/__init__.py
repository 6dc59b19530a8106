"""Scores of the ShareGPT4V suite as pure functions: records in, frozen dataclasses out, no files, no model, only the
standard library.

    profile      the two profiles: official (bugs reproduced, the default everywhere) and corrected
    arithmetic   sums and rounding in the order and manner of the official scripts
    vqa_answers  the two answer normalisers: VQAEval's and EvalAI's (m4c)
    vqa          VQA-v2, TextVQA, VizWiz
    gqa  science_qa  seed  pope  mme  mmbench  qbench     one benchmark each
    mm_vet  llava_bench                                    parsing of the judge's replies, and their aggregation

Each value has the scale in which the official script prints it, before rounding for display unless the script keeps the
rounded one; each result's `headline` is the number of the paper's table (percent, or points for MME). Where the
official script stops with an exception there is no official number: a division by zero becomes nan, an answer that
breaks its parser counts as wrong, and data that are incomplete raise DataError. The results do not depend on the
profile unless a function takes one; its docstring names the bugs that `corrected` mends.
"""
