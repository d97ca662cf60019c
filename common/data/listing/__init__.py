# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""List: which cases there are, what is known of them, and how they are split."""
