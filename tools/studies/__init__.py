# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Studies of bundles on labelled data sets: what they hold, what they cost, and how they are run."""
