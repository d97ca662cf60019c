# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The checks of the project: of its configs here, the others in steps."""
