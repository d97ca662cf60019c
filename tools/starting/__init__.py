# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The quick start: the whole chain on small volumes, and its report."""
