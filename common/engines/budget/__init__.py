# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a training or a prediction needs of a GPU, found out without one, and what fits."""
