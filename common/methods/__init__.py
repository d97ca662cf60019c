# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Self-supervised methods, one file each: idea, shapes, views, module, loss."""
