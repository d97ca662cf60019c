# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How fast the parts are and what they hold in memory, against the same mathematics written plainly."""
