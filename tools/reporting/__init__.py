# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Reports of studies: scores, comparisons, pictures and tables of what was run."""
