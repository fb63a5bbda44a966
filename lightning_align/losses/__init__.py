"""Objectives and estimators as pure functions: tensors and floats in, ``(loss, metrics)`` out.

Axes: ``B`` sequences, ``T`` token positions (entry ``t`` belongs to token ``t``), ``R`` responses, ``P`` pairs of them.
Metrics are ``dict[str, (numerator, denominator)]`` of detached scalars: sums over micro-batches and ranks are added
first and divided once, so that a metric means the same however a batch is split.
"""
