# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Training by several sites whose data stay where they are."""
