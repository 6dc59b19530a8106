"""The planner: what a run will take, from its configuration alone, before anything is launched.

Pure arithmetic: no GPU, no processes, no model.
"""
