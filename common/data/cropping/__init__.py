# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Crop: what a run reads of stored volumes, a pure function of (seed, epoch, sample)."""
