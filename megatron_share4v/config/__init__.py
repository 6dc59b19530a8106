"""Typed, frozen configuration: what a run, a model and a data set are. No torch import here."""
