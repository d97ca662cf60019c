# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Check: look at files before a long run begins, and take what passes."""
