# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Prepare: what is done to each volume once, and by how many processes."""
