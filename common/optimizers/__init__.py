# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules as pure functions of the epoch: nothing to save, nothing to resume."""

from .schedules import ClassificationSchedule, FineTuningSchedule, Poly

__all__ = ["ClassificationSchedule", "FineTuningSchedule", "Poly"]
