# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""nnU-Net itself as the witness of what is exported for it: samples, its environment, and what it said of them."""
