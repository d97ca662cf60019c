# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of predictions and of embeddings that are there already."""
