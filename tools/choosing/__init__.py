# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which encoder suits a task: probes of all, a short fine-tuning of the best, and a verdict."""
