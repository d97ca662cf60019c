# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Curves: scores over numbers of labelled cases, and learning rates over epochs."""
