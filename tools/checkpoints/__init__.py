# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Published checkpoints and weights files: looked into, imported into bundles and exported from them."""
