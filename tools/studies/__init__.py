# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The benchmark: studies of bundles on labelled data sets, what they cost, and their reports."""
