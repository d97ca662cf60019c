# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""This collection beside nnU-Net itself, trained alike."""
