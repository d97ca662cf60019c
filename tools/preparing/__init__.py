# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Data before training: what a folder holds, the volume store, and volumes that need no download."""
