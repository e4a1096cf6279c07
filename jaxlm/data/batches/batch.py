"""The type of every batch that a loader makes."""

from __future__ import annotations

import numpy as np

Batch = dict[str, np.ndarray]
"""Arrays by name, each with one row for each example.

    language models   inputs, targets int32 and weights float32, each [B, T]; packed documents add segment_ids
                      and positions, int32 [B, T]
    translation       src int32 [B, S]; inputs, targets int32 and weights float32, each [B, T]
    preferences       chosen_inputs, chosen_targets, chosen_weights and rejected_inputs, ..., each [B, T]
"""
