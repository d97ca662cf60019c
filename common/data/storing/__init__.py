# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Store: prepared volumes on the disk, read by chunks."""
